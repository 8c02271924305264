package bus

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// DeviceOptions let devices in, by MQTT 3.1.1 with QoS 0 and 1. A device gives
// its id as user name and a token (see [NewToken]) as password. Its client id is
// [topic.Token] of its id, with :1, :2 or :3 behind it for further connections at
// the same time. It may publish on topic.DeviceUp and subscribe to
// topic.DeviceDown, and nothing else.
type DeviceOptions struct {
	// MQTT is host:port to take MQTT connections on; port 0 picks a free one.
	// Required.
	MQTT string
	// Websocket is host:port to take MQTT over websocket on, at the path /mqtt.
	// Optional.
	Websocket string
	// CertFile and KeyFile hold the certificate and key of both listeners, PEM.
	// Without them tokens travel in the clear: for a trusted network only. Optional.
	CertFile, KeyFile string
	// District whose devices they are. Required.
	District traffic.DistrictID
	// TokenKey verifies tokens. Required.
	TokenKey ed25519.PublicKey
	// Active reports whether the registry has a device, and has not revoked it. It
	// is asked at each connection, and every few seconds for each that is there;
	// it must be quick and safe for concurrent use. Optional: all are active.
	Active func(traffic.DeviceID) bool
	// MaxConnections bounds connections of devices; 0 means 16384. It is lowered to
	// what the process may open.
	MaxConnections int
}

func (o DeviceOptions) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("bus: Devices."+format, args...))
	}
	if _, _, err := splitListen(o.MQTT); err != nil {
		bad("MQTT: %w", err)
	}
	if _, _, err := splitListen(o.Websocket); o.Websocket != "" && err != nil {
		bad("Websocket: %w", err)
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		bad("CertFile, KeyFile: give both or neither")
	}
	if o.District == "" {
		bad("District: must not be empty")
	}
	if len(o.TokenKey) != ed25519.PublicKeySize {
		bad("TokenKey: %d bytes, must be %d", len(o.TokenKey), ed25519.PublicKeySize)
	}
	if o.MaxConnections < 0 || o.MaxConnections > maxDeviceConnections {
		bad("MaxConnections: %d, must be 0 to %d", o.MaxConnections, maxDeviceConnections)
	}
	return errors.Join(errs...)
}

const (
	maxDeviceConnections = 1 << 20
	// deviceSessions is how many sessions a device may have: client ids without
	// bound would be memory without bound, as a session that is not clean outlives
	// its connection.
	deviceSessions = 4
	// filesKept of those that the process may open are not for devices.
	filesKept = 1024
	// waiting connections may be there beside those let in, without a CONNECT yet.
	waitingConnections = 512
	// MaxDeviceMessage bounds one message of a device: the largest envelope in
	// base64, its names, and MQTT's header.
	MaxDeviceMessage = identity.MaxEnvelope*4/3 + 2048
	// connectWait is how long a connection may take to send its CONNECT.
	connectWait = 10 * time.Second
	// sweepLeast is the least time between two sweeps because of a full house.
	sweepLeast = 100 * time.Millisecond
	// consumerIdle is how long a session's QoS 1 subscription outlives its
	// connection. Receipts are QoS 0, so it never holds anything.
	consumerIdle = 10 * time.Minute
	// deviceStreams bounds MQTT's own bookkeeping, bytes of memory.
	deviceStreams = 256 << 20
	devicesName   = "DEVICES" // the account that devices are in
)

// sweepEvery is how often connections are asked about again.
var sweepEvery = 5 * time.Second

// Reasons why a connection was refused or ended, as counted in
// [DeviceCounts.Refused].
const (
	DeviceToken    = "token"        // none, damaged, or signed by another
	DeviceOther    = "other-device" // a good token of another device or district
	DeviceEarly    = "not-yet"
	DeviceExpired  = "expired"
	DeviceRevoked  = "revoked" // or never in the registry
	DeviceClientID = "client-id"
	DeviceFull     = "full" // too many connections
	DeviceProtocol = "not-mqtt"
	DeviceStarting = "starting"
)

// DeviceCounts says what became of devices' connections since the start.
type DeviceCounts struct {
	// Connected is how many there are now.
	Connected int
	// Accepted connections, ever.
	Accepted uint64
	// Refused connections by reason.
	Refused map[string]uint64
	// Dropped connections whose devices were revoked meanwhile.
	Dropped uint64
	// Topics and Subscriptions are attempts to publish on, or subscribe to, a topic
	// that is not the device's own. MQTT 3.1.1 has no way to refuse a publish: it is
	// acknowledged, and goes nowhere.
	Topics, Subscriptions uint64
	// Retained flags that were ignored.
	Retained uint64
}

// devices is the door for devices: who is let in, and who is still there.
type devices struct {
	DeviceOptions
	log     *slog.Logger
	listens bool // the server has a listener for NATS clients too
	issuer  string
	limit   *limiter

	// mu is the innermost lock: the server logs, and so comes here, with locks of
	// its own in hand.
	mu     sync.Mutex
	server *server.Server  // nil until open
	acc    *server.Account // of the devices; nil until all is set up
	setup  string          // password of the one connection that sets up
	setAcc *server.Account // what it gets
	live   map[uint64]traffic.DeviceID
	counts DeviceCounts
	swept  time.Time

	end  sync.Once
	stop chan struct{}
	done chan struct{}
}

func newDevices(o DeviceOptions, listens bool, log *slog.Logger) (*devices, error) {
	if o.MaxConnections == 0 {
		o.MaxConnections = 1 << 14
	}
	if most := openFiles(); most > 0 && uint64(o.MaxConnections)+waitingConnections+filesKept > most {
		if most < filesKept+waitingConnections+16 {
			return nil, fmt.Errorf("bus: Devices: the process may open %d files, at least %d are needed (ulimit -n)", most, filesKept+waitingConnections+16)
		}
		log.Warn("bus: fewer devices than configured, for want of open files (ulimit -n)", "files", most, "devices", most-waitingConnections-filesKept, "configured", o.MaxConnections)
		o.MaxConnections = int(most - waitingConnections - filesKept)
	}
	issuer, err := tokenIssuer(o.TokenKey)
	if err != nil {
		return nil, fmt.Errorf("bus: Devices.TokenKey: %w", err)
	}
	return &devices{
		DeviceOptions: o, log: log, listens: listens, issuer: issuer, limit: &limiter{per: time.Second, most: 10},
		live: map[uint64]traffic.DeviceID{}, counts: DeviceCounts{Refused: map[string]uint64{}},
		stop: make(chan struct{}), done: make(chan struct{}),
	}, nil
}

// configure adds the listeners to the server's options.
func (d *devices) configure(so *server.Options) error {
	for _, a := range []struct{ name, addr string }{{"MQTT", d.MQTT}, {"Websocket", d.Websocket}} {
		if a.addr == "" {
			continue
		}
		// The server would try for a minute, and not say why in the end.
		l, err := net.Listen("tcp", a.addr)
		if err == nil {
			err = l.Close()
		}
		if err != nil {
			return fmt.Errorf("bus: Devices.%s: %w", a.name, err)
		}
	}
	// QoS 2 can only be turned off in the text form of the options.
	var text server.Options
	if err := text.ProcessConfigString("mqtt { port: -1, reject_qos2_publish: true, downgrade_qos2_subscribe: true }"); err != nil {
		return fmt.Errorf("bus: Devices: %w", err)
	}
	so.MQTT = text.MQTT
	so.MQTT.Host, so.MQTT.Port, _ = splitListen(d.MQTT) // checked by validate, as below
	so.MQTT.AuthTimeout = connectWait.Seconds()
	so.MQTT.ConsumerMemoryStorage = true
	so.MQTT.ConsumerInactiveThreshold = consumerIdle
	if d.Websocket != "" {
		so.Websocket.Host, so.Websocket.Port, _ = splitListen(d.Websocket)
		so.Websocket.NoTLS = d.CertFile == ""
		so.Websocket.HandshakeTimeout = connectWait
		so.Websocket.AuthTimeout = connectWait.Seconds()
	}
	if d.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(d.CertFile, d.KeyFile)
		if err != nil {
			return fmt.Errorf("bus: Devices.CertFile, KeyFile: %w", err)
		}
		t := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
		so.MQTT.TLSConfig, so.MQTT.TLSTimeout = t, connectWait.Seconds()
		so.Websocket.TLSConfig = t.Clone()
	}
	so.MaxConn = d.MaxConnections + waitingConnections
	// Each device that connects asks JetStream for its session twice.
	so.JetStreamRequestQueueLimit = 4 * int64(so.MaxConn)
	so.CustomClientAuthentication = d
	return nil
}

// open puts devices into an account of their own, which shares two kinds of
// subjects with the services' and nothing else, and makes there the streams in
// which the server keeps its MQTT books: in memory and bounded.
func (d *devices) open(ctx context.Context, s *server.Server) error {
	acc, err := s.RegisterAccount(devicesName)
	if err != nil {
		return fmt.Errorf("bus: Devices: account: %w", err)
	}
	c := jwt.NewAccountClaims(devicesName)
	c.Limits.Payload = MaxDeviceMessage
	c.Limits.JetStreamLimits = jwt.JetStreamLimits{MemoryStorage: deviceStreams, Streams: 5, Consumer: -1, MaxAckPending: -1}
	s.UpdateAccountClaims(acc, c)
	services := s.GlobalAccount()
	up, down := topic.DeviceUpAll(d.District), topic.DeviceDownAll(d.District)
	for _, err := range []error{
		acc.AddStreamExport(up, []*server.Account{services}), services.AddStreamImport(acc, up, ""),
		services.AddStreamExport(down, []*server.Account{acc}), acc.AddStreamImport(services, down, ""),
	} {
		if err != nil {
			return fmt.Errorf("bus: Devices: sharing subjects: %w", err)
		}
	}
	d.mu.Lock()
	d.server, d.setup, d.setAcc = s, rand.Text(), acc
	password := d.setup
	d.mu.Unlock()
	err = d.streams(ctx, s, password)
	d.mu.Lock()
	d.setup, d.setAcc = "", nil
	if err == nil {
		d.acc = acc
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	go d.loop()
	return nil
}

// streams makes the streams that the server would make for its first MQTT
// client, with the same names, subjects and rules, but in memory. On disk, with
// a sync for each message, every PUBLISH with QoS 1 would cost one and every
// connection another; and all that they would keep is a PUBACK's promise, where
// ours is the receipt.
func (d *devices) streams(ctx context.Context, s *server.Server, password string) error {
	nc, err := nats.Connect("", nats.InProcessServer(s), nats.UserInfo(devicesName, password), nats.Name("devices"))
	if err != nil {
		return fmt.Errorf("bus: Devices: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("bus: Devices: %w", err)
	}
	sessions := int64(deviceSessions * d.MaxConnections)
	for _, c := range []jetstream.StreamConfig{
		{Name: "$MQTT_sess", Subjects: []string{"$MQTT.sess.>"}, MaxMsgsPerSubject: 1, MaxMsgs: sessions, MaxBytes: deviceStreams / 2, MaxMsgSize: 1 << 14},
		// No device may subscribe to what another device publishes, so this is empty.
		{Name: "$MQTT_msgs", Subjects: []string{"$MQTT.msgs.>"}, Retention: jetstream.InterestPolicy, MaxBytes: 1 << 24, MaxConsumers: int(sessions)},
		// QoS 2 is turned off.
		{Name: "$MQTT_qos2in", Subjects: []string{"$MQTT.qos2.in.>"}, MaxMsgsPerSubject: 1, DiscardNewPerSubject: true, MaxBytes: 1 << 16},
		{Name: "$MQTT_out", Subjects: []string{"$MQTT.out.>"}, Retention: jetstream.InterestPolicy, MaxBytes: 1 << 16, MaxConsumers: 1},
		// Retained messages are too large for this, however small.
		{Name: "$MQTT_rmsgs", Subjects: []string{"$MQTT.rmsgs.>"}, MaxMsgsPerSubject: 1, MaxBytes: 1 << 16, MaxMsgSize: 1},
	} {
		c.Storage, c.Discard = jetstream.MemoryStorage, jetstream.DiscardNew
		if _, err := js.CreateStream(ctx, c); err != nil {
			return fmt.Errorf("bus: Devices: stream %s: %w", c.Name, err)
		}
	}
	return nil
}

// close ends the watch over connections.
func (d *devices) close() {
	d.mu.Lock()
	running := d.acc != nil
	d.mu.Unlock()
	d.end.Do(func() { close(d.stop) })
	if running {
		<-d.done
	}
}

// clientName is how the server names a client: address, protocol and number, and
// with MQTT the client id, quoted.
var clientName = regexp.MustCompile(`(?s)^.* - (cid|wid|mid|mid_ws):(\d+)(?: - (".*"))?$`)

// Check decides who is let in; it is called by the server for each client.
func (d *devices) Check(c server.ClientAuthentication) bool {
	// The interface does not tell MQTT from NATS, nor the client id; the name
	// does. A name that we do not understand lets nobody in.
	protocol, clientID := "", ""
	name, ok := c.(fmt.Stringer)
	if ok {
		if m := clientName.FindStringSubmatch(name.String()); m != nil {
			protocol = m[1]
			clientID, _ = strconv.Unquote(m[3]) // "" is no client id of a device
		}
	}
	o := c.GetOpts()
	switch protocol {
	case "cid":
		if a := c.RemoteAddress(); a != nil && a.Network() == "pipe" {
			return d.inProcess(c, o)
		}
		if d.listens {
			return true // by the server's own door, for NATS clients
		}
	case "mid", "mid_ws":
		device := traffic.DeviceID(o.Username)
		reason, err := d.admit(c, device, clientID, o.Password)
		if err != nil {
			d.refused(c, reason, "device", device, err)
		}
		return err == nil
	}
	d.refused(c, DeviceProtocol, "", "", errors.New("only MQTT is spoken here; over websocket at the path /mqtt"))
	return false
}

// inProcess lets in what is in this process: the services, and our own set-up.
func (d *devices) inProcess(c server.ClientAuthentication, o *server.ClientOpts) bool {
	if o.Username != devicesName {
		return true
	}
	d.mu.Lock()
	acc := d.setAcc
	ok := d.setup != "" && subtle.ConstantTimeCompare([]byte(o.Password), []byte(d.setup)) == 1
	d.mu.Unlock()
	if ok {
		c.RegisterUser(&server.User{Username: devicesName, Account: acc})
	}
	return ok
}

// admit lets a device in, or says why not.
func (d *devices) admit(c server.ClientAuthentication, device traffic.DeviceID, clientID, token string) (reason string, err error) {
	expires, err := checkToken(d.issuer, d.District, device, token, time.Now())
	if err != nil {
		for _, e := range []error{errTokenOther, errTokenEarly, errTokenLapsed} {
			if errors.Is(err, e) {
				return e.Error(), err
			}
		}
		return DeviceToken, err
	}
	if !deviceClientID(device, clientID) {
		return DeviceClientID, fmt.Errorf("client id: %.80q, must be %s, or that with :1, :2 or :3 behind it", clientID, topic.Token(string(device)))
	}
	if d.Active != nil && !d.Active(device) {
		return DeviceRevoked, errors.New("the registry has no such device in force")
	}
	id := c.GetID() // not under mu: the server may log while it holds its client's lock
	d.mu.Lock()
	acc := d.acc
	full := len(d.live) >= d.MaxConnections
	sweep := full && time.Since(d.swept) >= sweepLeast
	d.mu.Unlock()
	if sweep {
		d.sweep(false)
	}
	d.mu.Lock()
	switch {
	case acc == nil:
		d.mu.Unlock()
		return DeviceStarting, errors.New("not ready yet")
	case len(d.live) >= d.MaxConnections:
		d.mu.Unlock()
		return DeviceFull, fmt.Errorf("%d devices are connected, no more are let in", d.MaxConnections)
	}
	d.live[id] = device
	d.counts.Accepted++
	d.mu.Unlock()
	c.RegisterUser(&server.User{
		Username: string(device), Account: acc, ConnectionDeadline: expires,
		Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: []string{topic.DeviceUp(d.District, device)}},
			Subscribe: &server.SubjectPermission{Allow: []string{topic.DeviceDown(d.District, device)}},
		},
	})
	return "", nil
}

// deviceClientID reports whether a client id is one of the device's own. With
// another's it could end that device's connection and take over its session.
func deviceClientID(device traffic.DeviceID, clientID string) bool {
	own, n, more := strings.Cut(clientID, ":")
	return own == topic.Token(string(device)) && (!more || len(n) == 1 && n[0] > '0' && n[0] < '0'+deviceSessions)
}

// refused counts and logs a refusal.
func (d *devices) refused(c server.ClientAuthentication, reason, key string, device traffic.DeviceID, err error) {
	d.mu.Lock()
	d.counts.Refused[reason]++
	d.mu.Unlock()
	args := []any{"reason", reason, "err", err}
	if addr := c.RemoteAddress(); addr != nil {
		args = append(args, "from", addr.String())
	}
	if key != "" {
		args = append(args, key, fmt.Sprintf("%.80q", device))
	}
	d.warn("bus: a device's connection refused", args...)
}

// warn logs unless there is too much to log already: what goes on at this door
// is not for us to decide.
func (d *devices) warn(text string, args ...any) {
	ok, dropped := d.limit.allow(time.Now())
	if !ok {
		return
	}
	if dropped > 0 {
		args = append(args, "unlogged", dropped)
	}
	d.log.Warn(text, args...)
}

// loop asks about connections until stop.
func (d *devices) loop() {
	defer close(d.done)
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-t.C:
			d.sweep(true)
		}
	}
}

// sweep forgets connections that are gone, and if ask drops those whose devices
// are not active any more.
func (d *devices) sweep(ask bool) {
	d.mu.Lock()
	d.swept = time.Now()
	live := maps.Clone(d.live)
	d.mu.Unlock()
	var gone, drop []uint64
	for id, device := range live {
		switch {
		case d.server.GetClient(id) == nil:
			gone = append(gone, id)
		case ask && d.Active != nil && !d.Active(device):
			drop = append(drop, id)
		}
	}
	for _, id := range drop {
		d.warn("bus: a device's connection ended, the registry has it no more", "reason", DeviceRevoked, "device", live[id])
		if err := d.server.DisconnectClientByID(id); err != nil {
			d.log.Debug("bus: a device was gone already", "device", live[id], "err", err)
		}
	}
	d.mu.Lock()
	for _, id := range append(gone, drop...) {
		delete(d.live, id)
	}
	d.counts.Dropped += uint64(len(drop))
	d.mu.Unlock()
}

// noted takes lines of the server's log that are about devices: some are counted,
// none may fill the log. It reports whether the line is dealt with.
func (d *devices) noted(format string, v []any) bool {
	counted := func(n *uint64, text string) bool {
		d.mu.Lock()
		*n++
		d.mu.Unlock()
		d.warn(text, "text", fmt.Sprintf(format, v...))
		return true
	}
	switch {
	case !strings.Contains(format, " - mid:") && !strings.Contains(format, " - mid_ws:") && !strings.Contains(format, " - wid:"):
		return false
	case strings.HasSuffix(format, " - Publish Violation - Subject %q"):
		return counted(&d.counts.Topics, "bus: a device publishes on a topic not its own")
	case strings.Contains(format, " - Subscription Violation"):
		return counted(&d.counts.Subscriptions, "bus: a device subscribes to a topic not its own")
	case strings.Contains(format, " - unable to store retained message "):
		return counted(&d.counts.Retained, "bus: a device's retain flag is ignored")
	case strings.Contains(fmt.Sprintf(format, v...), server.ErrAuthentication.Error()):
		return true // we said why
	}
	d.warn("nats server, about a device", "text", fmt.Sprintf(format, v...))
	return true
}

// DeviceCounts returns what became of devices' connections; all zero where no
// devices are let in.
func (s *Server) DeviceCounts() DeviceCounts {
	if s.devices == nil {
		return DeviceCounts{}
	}
	s.devices.sweep(false)
	s.devices.mu.Lock()
	defer s.devices.mu.Unlock()
	c := s.devices.counts
	c.Refused = maps.Clone(c.Refused)
	c.Connected = len(s.devices.live)
	return c
}

// MQTTAddr returns host:port where devices connect, and "" where none can.
func (s *Server) MQTTAddr() string {
	if s.devices == nil {
		return ""
	}
	return net.JoinHostPort(s.mqtt.Host, strconv.Itoa(s.mqtt.Port))
}

// WebsocketURL returns where devices connect over websocket, and "" where none
// can.
func (s *Server) WebsocketURL() string {
	if s.devices == nil || s.devices.Websocket == "" {
		return ""
	}
	return s.s.WebsocketURL() + "/mqtt"
}

// limiter lets through most of something per duration.
type limiter struct {
	per  time.Duration
	most int

	mu      sync.Mutex
	since   time.Time
	n       int
	dropped uint64
}

// allow reports whether one more may pass, and if so how many have not since the
// last that did.
func (l *limiter) allow(now time.Time) (ok bool, dropped uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= l.per {
		l.since, l.n = now, 0
	}
	if l.n >= l.most {
		l.dropped++
		return false, 0
	}
	l.n++
	dropped, l.dropped = l.dropped, 0
	return true, dropped
}
