package bus_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

var tokenKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

const own = traffic.DeviceID("rsu-1")

// mqttServer is a server with a door for devices of the district harbour.
func mqttServer(t *testing.T, change func(*bus.DeviceOptions)) (*bus.Server, *bus.Bus) {
	t.Helper()
	o := bus.DeviceOptions{MQTT: "127.0.0.1:0", Websocket: "127.0.0.1:0", District: "harbour", TokenKey: tokenKey.Public().(ed25519.PublicKey)}
	if change != nil {
		change(&o)
	}
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Devices: &o, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s, servicetest.Connect(t, s)
}

func token(t *testing.T, key ed25519.PrivateKey, d traffic.DistrictID, device traffic.DeviceID, life time.Duration) string {
	t.Helper()
	from := time.Now()
	if life < 0 {
		from = from.Add(2 * life)
		life = -life
	}
	s, err := bus.NewToken(key, d, device, from, from.Add(life))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// as is who a client says it is.
type as struct {
	user     traffic.DeviceID
	clientID string
	password string
	url      string // tcp unless given
	change   func(*mqtt.ClientOptions)
}

// dial connects a stock client; lost is closed when the server ends it.
func dial(s *bus.Server, a as) (c mqtt.Client, lost chan struct{}, err error) {
	lost = make(chan struct{})
	if a.url == "" {
		a.url = "tcp://" + s.MQTTAddr()
	}
	o := mqtt.NewClientOptions().AddBroker(a.url).SetClientID(a.clientID).SetUsername(string(a.user)).SetPassword(a.password).
		SetAutoReconnect(false).SetConnectRetry(false).SetProtocolVersion(4).SetConnectTimeout(10 * time.Second).
		SetConnectionLostHandler(func(mqtt.Client, error) { close(lost) })
	if a.change != nil {
		a.change(o)
	}
	c = mqtt.NewClient(o)
	tok := c.Connect()
	tok.Wait()
	return c, lost, tok.Error()
}

// device connects as the device rsu-1, with a good token.
func device(t *testing.T, s *bus.Server, change func(*as)) (mqtt.Client, chan struct{}) {
	t.Helper()
	a := as{user: own, clientID: string(own), password: token(t, tokenKey, "harbour", own, time.Hour)}
	if change != nil {
		change(&a)
	}
	c, lost, err := dial(s, a)
	if err != nil {
		t.Fatalf("connecting: %v", err)
	}
	t.Cleanup(func() { c.Disconnect(100) })
	return c, lost
}

func up(d traffic.DeviceID) string   { return topic.MQTT(topic.DeviceUp("harbour", d)) }
func down(d traffic.DeviceID) string { return topic.MQTT(topic.DeviceDown("harbour", d)) }

// subscribe returns the QoS granted, 128 where the server refuses.
func subscribe(t *testing.T, c mqtt.Client, filter string, qos byte, f mqtt.MessageHandler) byte {
	t.Helper()
	tok := c.Subscribe(filter, qos, f).(*mqtt.SubscribeToken)
	if !tok.WaitTimeout(10 * time.Second) {
		t.Fatalf("no SUBACK for %s", filter)
	}
	return tok.Result()[filter]
}

func mqttPublish(t *testing.T, c mqtt.Client, to string, qos byte, payload string) {
	t.Helper()
	if tok := c.Publish(to, qos, false, payload); !tok.WaitTimeout(10*time.Second) || tok.Error() != nil {
		t.Fatalf("publishing on %s: %v", to, tok.Error())
	}
}

// heard collects what comes on a subject pattern among the services.
type heard struct {
	c chan *nats.Msg
}

func hear(t *testing.T, b *bus.Bus, subject string) *heard {
	t.Helper()
	h := &heard{make(chan *nats.Msg, 1024)}
	if _, err := b.NC.ChanQueueSubscribe(subject, "q", h.c); err != nil {
		t.Fatal(err)
	}
	if err := b.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *heard) next(t *testing.T) *nats.Msg {
	t.Helper()
	select {
	case m := <-h.c:
		return m
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came")
		return nil
	}
}

func (h *heard) want(t *testing.T, subject, data string) {
	t.Helper()
	m := h.next(t)
	for strings.HasPrefix(m.Subject, "$JS.EVENT.") { // the server's own news
		m = h.next(t)
	}
	if m.Subject != subject || string(m.Data) != data {
		t.Fatalf("got %q on %s, want %q on %s", m.Data, m.Subject, data, subject)
	}
}

// Both ways, both qualities, both transports; client ids of one device side by
// side, and a device whose id is not a token.
func TestDeviceSpeaks(t *testing.T) {
	s, b := mqttServer(t, nil)
	h := hear(t, b, topic.DeviceUpAll("harbour"))
	for i, tt := range []struct {
		user traffic.DeviceID
		cid  string
		url  string
	}{
		{own, "rsu-1", ""}, {own, "rsu-1:1", ""}, {own, "rsu-1:2", s.WebsocketURL()}, {own, "rsu-1:3", ""}, {"a.b/c #1", "a=2Eb=2Fc=20=231", s.WebsocketURL()},
	} {
		c, _ := device(t, s, func(a *as) {
			a.user, a.clientID, a.url, a.password = tt.user, tt.cid, tt.url, token(t, tokenKey, "harbour", tt.user, time.Hour)
		})
		for qos := range byte(2) {
			got := make(chan string, 16)
			if granted := subscribe(t, c, down(tt.user), qos, func(_ mqtt.Client, m mqtt.Message) { got <- string(m.Payload()) }); granted != qos {
				t.Fatalf("%s: subscription granted %d, want %d", tt.cid, granted, qos)
			}
			say := fmt.Sprintf("record %d.%d", i, qos)
			mqttPublish(t, c, up(tt.user), qos, say)
			h.want(t, topic.DeviceUp("harbour", tt.user), say)
			if err := b.Send(topic.DeviceDown("harbour", tt.user), []byte("receipt "+say)); err != nil {
				t.Fatal(err)
			}
			select {
			case m := <-got:
				if m != "receipt "+say {
					t.Errorf("got %q, want %q", m, "receipt "+say)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("%s: no receipt", tt.cid)
			}
		}
	}
	if c := s.DeviceCounts(); c.Connected != 5 || c.Accepted != 5 || len(c.Refused) != 0 {
		t.Errorf("got %+v, want 5 connected and nothing refused", c)
	}
}

// Who is refused at the door, and by which reason. The first row shows that what
// is refused below is refused for that reason only.
func TestDeviceRefusedAtTheDoor(t *testing.T) {
	revoked := traffic.DeviceID("rsu-9")
	s, _ := mqttServer(t, func(o *bus.DeviceOptions) {
		o.Active = func(d traffic.DeviceID) bool { return d != revoked }
	})
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize))
	good := token(t, tokenKey, "harbour", own, time.Hour)
	head, _, _ := strings.Cut(good, ".")
	for _, tt := range []struct {
		what, reason string
		a            as
	}{
		{"good", "", as{own, "rsu-1", good, "", nil}},
		{"no user, no password", bus.DeviceToken, as{"", "rsu-1", "", "", nil}},
		{"no password", bus.DeviceToken, as{own, "rsu-1", "", "", nil}},
		{"not a token", bus.DeviceToken, as{own, "rsu-1", "secret", "", nil}},
		{"damaged", bus.DeviceToken, as{own, "rsu-1", good[:len(good)-2] + "AA", "", nil}},
		{"two parts", bus.DeviceToken, as{own, "rsu-1", head + "." + head, "", nil}},
		{"signed by another", bus.DeviceToken, as{own, "rsu-1", token(t, other, "harbour", own, time.Hour), "", nil}},
		{"expired", bus.DeviceExpired, as{own, "rsu-1", token(t, tokenKey, "harbour", own, -time.Hour), "", nil}},
		{"token of another device", bus.DeviceOther, as{own, "rsu-1", token(t, tokenKey, "harbour", "rsu-2", time.Hour), "", nil}},
		{"token of another district", bus.DeviceOther, as{own, "rsu-1", token(t, tokenKey, "airport", own, time.Hour), "", nil}},
		{"client id of another device", bus.DeviceClientID, as{own, "rsu-2", good, "", nil}},
		{"client id that begins alike", bus.DeviceClientID, as{own, "rsu-10", good, "", nil}},
		{"one session too many", bus.DeviceClientID, as{own, "rsu-1:4", good, "", nil}},
		{"client id with more behind", bus.DeviceClientID, as{own, "rsu-1:11", good, "", nil}},
		{"client id by the server", bus.DeviceClientID, as{own, "", good, "", nil}},
		{"client id with quotes", bus.DeviceClientID, as{own, `x"-mid:1-"rsu-1`, good, "", nil}},
		{"the set-up's name", bus.DeviceToken, as{"DEVICES", "rsu-1", "", "", nil}},
		{"revoked", bus.DeviceRevoked, as{revoked, "rsu-9", token(t, tokenKey, "harbour", revoked, time.Hour), "", nil}},
	} {
		for _, url := range []string{"", s.WebsocketURL()} {
			before := s.DeviceCounts()
			tt.a.url = url
			c, _, err := dial(s, tt.a)
			if (err == nil) != (tt.reason == "") {
				t.Errorf("%s, %s: got %v", tt.what, url, err)
			}
			if err == nil {
				c.Disconnect(100)
			}
			after := s.DeviceCounts()
			want := maps.Clone(before.Refused)
			if tt.reason != "" {
				want[tt.reason]++
			}
			if !maps.Equal(after.Refused, want) {
				t.Errorf("%s: refusals by reason: got %v, want %v", tt.what, after.Refused, want)
			}
		}
	}
}

// What a device may say and hear once it is in: its own two topics.
func TestDeviceKeepsToItsTopics(t *testing.T) {
	s, b := mqttServer(t, nil)
	if err := b.Declare(context.Background(), topic.Streams("harbour")); err != nil {
		t.Fatal(err)
	}
	all := hear(t, b, ">")
	c, _ := device(t, s, nil)
	for _, to := range []string{
		up("rsu-2"), down(own), down("rsu-2"), topic.MQTT(topic.DeviceUp("airport", own)),
		topic.MQTT(topic.Ingress("harbour")), topic.MQTT(topic.Accepted("harbour")), topic.MQTT(topic.Inbox("harbour", "frame", "rsu-1")),
		topic.MQTT(topic.Command("harbour", "j1")), topic.MQTT(topic.Decision("harbour", 1)),
		"$JS/API/STREAM/DELETE/INGRESS", "$JS/API/INFO", "$SYS/REQ/SERVER/PING", "$MQTT/msgs/" + up(own), "$MQTT/sess/x", "_INBOX/x", "/" + up(own), up(own) + "/", "x",
	} {
		for qos := range byte(2) {
			before := s.DeviceCounts().Topics
			mqttPublish(t, c, to, qos, "forged") // with QoS 1 it is acknowledged all the same: MQTT 3.1.1 knows no refusal
			mqttPublish(t, c, up(own), qos, "honest")
			all.want(t, topic.DeviceUp("harbour", own), "honest") // and nothing before it
			if got := s.DeviceCounts().Topics; got != before+1 {
				t.Errorf("publish on %s with QoS %d: counted %d, want 1", to, qos, got-before)
			}
		}
	}
	for _, filter := range []string{
		down("rsu-2"), up(own), up("rsu-2"), "#", "+/#", "stopline/#", "stopline/harbour/device/+/down", "stopline/harbour/device/+/up", "stopline/harbour/device/rsu-1/+", down(own) + "/#",
		"$JS/#", "$SYS/#", "$MQTT/#", "$MQTT/sub/#", "_INBOX/#", topic.MQTT(topic.DecisionAll("harbour")),
	} {
		for qos := range byte(2) {
			before := s.DeviceCounts().Subscriptions
			if granted := subscribe(t, c, filter, qos, nil); granted != 0x80 {
				t.Errorf("subscription to %s: granted %d, want refused", filter, granted)
			}
			// The server refuses its own subjects itself, without a word.
			if got := s.DeviceCounts().Subscriptions; got != before+1 && !strings.HasPrefix(filter, "$MQTT/") {
				t.Errorf("subscription to %s: counted %d, want 1", filter, got-before)
			}
		}
	}
}

// Retain flags are ignored, wills go where the device may publish, QoS 2 ends the
// connection, and so does a message that no envelope can be.
func TestDeviceBounds(t *testing.T) {
	s, b := mqttServer(t, nil)
	h := hear(t, b, topic.DeviceUpAll("harbour"))

	c, _ := device(t, s, nil)
	if tok := c.Publish(up(own), 1, true, "kept?"); !tok.WaitTimeout(10 * time.Second) {
		t.Fatal("no PUBACK")
	}
	h.want(t, topic.DeviceUp("harbour", own), "kept?")
	if got := s.DeviceCounts().Retained; got != 1 {
		t.Errorf("retain flags ignored: got %d, want 1", got)
	}

	wc, lost := device(t, s, func(a *as) {
		a.clientID = "rsu-1:2"
		a.change = func(o *mqtt.ClientOptions) { o.SetWill(up("rsu-2"), "another's will", 0, false) }
	})
	wc.Publish(up(own), 2, false, "twice")
	wait(t, lost, "a client that publishes with QoS 2")
	wc, lost = device(t, s, func(a *as) {
		a.clientID = "rsu-1:2"
		a.change = func(o *mqtt.ClientOptions) { o.SetWill(up(own), "own will", 1, false) }
	})
	wc.Publish(up(own), 2, false, "twice")
	wait(t, lost, "a client that publishes with QoS 2")
	h.want(t, topic.DeviceUp("harbour", own), "own will")

	wc, lost = device(t, s, func(a *as) { a.clientID = "rsu-1:3" })
	mqttPublish(t, wc, up(own), 1, strings.Repeat("x", bus.MaxDeviceMessage-200))
	if got := len(h.next(t).Data); got != bus.MaxDeviceMessage-200 {
		t.Errorf("got %d bytes", got)
	}
	wc.Publish(up(own), 1, false, strings.Repeat("x", bus.MaxDeviceMessage+1))
	wait(t, lost, "a client whose message is too large")

	// All the while nobody else was harmed.
	mqttPublish(t, c, up(own), 1, "still here")
	h.want(t, topic.DeviceUp("harbour", own), "still here")
}

func wait(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s is still connected", what)
	}
}

// A token that expires ends the connection; so does a device's revocation.
func TestDeviceConnectionEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a token to expire; not with -short")
	}
	var revoked atomic.Bool
	s, _ := mqttServer(t, func(o *bus.DeviceOptions) {
		o.Active = func(d traffic.DeviceID) bool { return d != own || !revoked.Load() }
	})
	_, expired := device(t, s, func(a *as) { a.password = token(t, tokenKey, "harbour", own, 2*time.Second) })
	_, dropped := device(t, s, func(a *as) { a.clientID = "rsu-1:1" })
	_, kept := device(t, s, func(a *as) {
		a.user, a.clientID, a.password = "rsu-2", "rsu-2", token(t, tokenKey, "harbour", "rsu-2", time.Hour)
	})
	wait(t, expired, "a client whose token has expired")
	select {
	case <-dropped:
		t.Fatal("a good client lost its connection")
	default:
	}
	began := time.Now()
	revoked.Store(true)
	wait(t, dropped, "a revoked device")
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("a revoked device was connected for %v", d)
	}
	select {
	case <-kept:
		t.Error("a device that is not revoked lost its connection")
	default:
	}
	if c := s.DeviceCounts(); c.Dropped != 1 || c.Connected != 1 {
		t.Errorf("got %+v, want 1 dropped and 1 connected", c)
	}
}

// Connections beyond the bound are refused and counted, and there is room again
// when one goes.
func TestDeviceFullHouse(t *testing.T) {
	s, b := mqttServer(t, func(o *bus.DeviceOptions) { o.MaxConnections = 3 })
	h := hear(t, b, topic.DeviceUpAll("harbour"))
	who := func(i int) as {
		d := traffic.DeviceID(fmt.Sprintf("rsu-%d", i))
		return as{user: d, clientID: string(d), password: token(t, tokenKey, "harbour", d, time.Hour)}
	}
	var in []mqtt.Client
	for i := range 3 {
		c, _, err := dial(s, who(i))
		if err != nil {
			t.Fatal(err)
		}
		in = append(in, c)
	}
	if _, _, err := dial(s, who(3)); err == nil {
		t.Fatal("a fourth connection was let in, want at most 3")
	}
	if got := s.DeviceCounts().Refused[bus.DeviceFull]; got != 1 {
		t.Errorf("refused for want of room: got %d, want 1", got)
	}
	in[0].Disconnect(100)
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, _, err := dial(s, who(3))
		if err == nil {
			in[0] = c
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no room after a connection has gone: %v", err)
		}
	}
	mqttPublish(t, in[0], up("rsu-3"), 1, "in")
	h.want(t, topic.DeviceUp("harbour", "rsu-3"), "in")
	for _, c := range in {
		c.Disconnect(100)
	}
}

// No NATS client gets in by the devices' doors, with or without a token; nor by
// a websocket for leaf nodes.
func TestDeviceDoorsAreForMQTTOnly(t *testing.T) {
	s, b := mqttServer(t, nil)
	good := token(t, tokenKey, "harbour", own, time.Hour)
	ws := strings.TrimSuffix(s.WebsocketURL(), "/mqtt")
	for _, o := range [][]nats.Option{{}, {nats.UserInfo(string(own), good)}, {nats.Token(good)}, {nats.UserInfo("DEVICES", "")}, {nats.ProxyPath("/leafnode")}} {
		nc, err := nats.Connect(ws, append(o, nats.Timeout(10*time.Second), nats.NoReconnect())...)
		if err == nil {
			nc.Close()
			t.Error("a NATS client got in by the websocket")
		}
	}
	nc, err := net.Dial("tcp", s.MQTTAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = nc.Close() }()
	if _, err := nc.Write([]byte("CONNECT {\"user\":\"rsu-1\"}\r\nPING\r\n")); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(nc); len(b) > 0 { // until the server hangs up
		t.Errorf("NATS to the MQTT listener: got %q, %v, want nothing", b, err)
	}
	if got := s.DeviceCounts().Refused[bus.DeviceProtocol]; got == 0 {
		t.Error("nothing counted as not MQTT")
	}
	if s.URL() != "" {
		t.Errorf("the server listens for NATS clients on %s, which nobody has asked for", s.URL())
	}
	if err := b.NC.FlushTimeout(10 * time.Second); err != nil {
		t.Errorf("services are cut off: %v", err)
	}
}

// With a listener for NATS clients the services of other processes come in by
// that one, as they did.
func TestDevicesBesideNATS(t *testing.T) {
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Listen: "127.0.0.1:0", Logger: servicetest.Logger(t),
		Devices: &bus.DeviceOptions{MQTT: "127.0.0.1:0", District: "harbour", TokenKey: tokenKey.Public().(ed25519.PublicKey)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	b, err := bus.Connect(bus.ConnectOptions{URL: s.URL()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	h := hear(t, b, topic.DeviceUpAll("harbour"))
	c, _ := device(t, s, nil)
	mqttPublish(t, c, up(own), 1, "x")
	h.want(t, topic.DeviceUp("harbour", own), "x")
	if s.WebsocketURL() != "" {
		t.Errorf("got %s, want no websocket", s.WebsocketURL())
	}
}

// The books that the server keeps for MQTT are in memory and hold no records; a
// session that outlives its connection is one of four that its device may have,
// and what was there before is there after a restart.
func TestDeviceBooksStaySmall(t *testing.T) {
	dir := t.TempDir()
	open := func() (*bus.Server, *bus.Bus) {
		s, err := bus.StartServer(bus.ServerOptions{Dir: dir, Logger: servicetest.Logger(t),
			Devices: &bus.DeviceOptions{MQTT: "127.0.0.1:0", District: "harbour", TokenKey: tokenKey.Public().(ed25519.PublicKey)}})
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.Connect("test")
		if err != nil {
			t.Fatal(err)
		}
		return s, b
	}
	s, b := open()
	if err := b.Declare(context.Background(), topic.Streams("harbour")); err != nil {
		t.Fatal(err)
	}
	if err := b.Publish(context.Background(), topic.Ingress("harbour"), "1", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, cid := range []string{"rsu-1", "rsu-1:1", "rsu-1:2", "rsu-1:3"} {
			c, _ := device(t, s, func(a *as) {
				a.clientID = cid
				a.change = func(o *mqtt.ClientOptions) { o.SetCleanSession(false) }
			})
			if granted := subscribe(t, c, down(own), 1, nil); granted != 1 {
				t.Fatalf("granted %d, want 1", granted)
			}
			for range 10 {
				mqttPublish(t, c, up(own), 1, "x")
			}
			c.Disconnect(100)
		}
	}
	books := bus.DeviceBooks(t, s)
	if books["$MQTT_sess"] != 4 || books["$MQTT_msgs"] != 0 || books["$MQTT_rmsgs"] != 0 || len(books) != 5 {
		t.Errorf("messages by stream: got %v, want 4 sessions and nothing else", books)
	}
	b.Close()
	s.Shutdown()
	s, b = open()
	defer s.Shutdown()
	defer b.Close()
	st, err := b.JS.Stream(context.Background(), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.CachedInfo().State.Msgs; got != 1 {
		t.Errorf("INGRESS after a restart: got %d messages, want 1", got)
	}
	device(t, s, nil)
}

// With a certificate both doors speak TLS and nothing else.
func TestDeviceWithTLS(t *testing.T) {
	dir := t.TempDir()
	pool, certFile, keyFile := certificate(t, dir)
	s, b := mqttServer(t, func(o *bus.DeviceOptions) { o.CertFile, o.KeyFile = certFile, keyFile })
	h := hear(t, b, topic.DeviceUpAll("harbour"))
	if !strings.HasPrefix(s.WebsocketURL(), "wss://") {
		t.Errorf("got %s, want wss", s.WebsocketURL())
	}
	for i, url := range []string{"ssl://" + s.MQTTAddr(), s.WebsocketURL()} {
		c, _ := device(t, s, func(a *as) {
			a.url, a.clientID = url, []string{"rsu-1", "rsu-1:1"}[i]
			a.change = func(o *mqtt.ClientOptions) { o.SetTLSConfig(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}) }
		})
		mqttPublish(t, c, up(own), 1, url)
		h.want(t, topic.DeviceUp("harbour", own), url)
	}
	for _, url := range []string{"tcp://" + s.MQTTAddr(), "ws" + strings.TrimPrefix(s.WebsocketURL(), "wss")} {
		if _, _, err := dial(s, as{own, "rsu-1:2", token(t, tokenKey, "harbour", own, time.Hour), url, nil}); err == nil {
			t.Errorf("%s: let in without TLS", url)
		}
	}
}

// certificate makes one for 127.0.0.1, signed by itself.
func certificate(t *testing.T, dir string) (pool *x509.CertPool, certFile, keyFile string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	pool = x509.NewCertPool()
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool.AppendCertsFromPEM(certPEM)
	if err := errors.Join(os.WriteFile(certFile, certPEM, 0o600), os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return pool, certFile, keyFile
}

func TestDeviceOptionsValidate(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	pub := tokenKey.Public().(ed25519.PublicKey)
	for _, tt := range []struct {
		o    bus.DeviceOptions
		want []string
	}{
		{bus.DeviceOptions{}, []string{"MQTT:", "District: must not be empty", "TokenKey: 0 bytes, must be 32"}},
		{bus.DeviceOptions{MQTT: "x:99999", Websocket: "y", CertFile: "a", District: "d", TokenKey: pub, MaxConnections: -1},
			[]string{"MQTT:", "Websocket:", "CertFile, KeyFile: give both", "MaxConnections: -1"}},
		{bus.DeviceOptions{MQTT: taken.Addr().String(), District: "d", TokenKey: pub}, []string{"Devices.MQTT: listen tcp", "in use"}},
		{bus.DeviceOptions{MQTT: "127.0.0.1:0", Websocket: taken.Addr().String(), District: "d", TokenKey: pub}, []string{"Devices.Websocket: listen tcp"}},
		{bus.DeviceOptions{MQTT: "127.0.0.1:0", CertFile: "none.pem", KeyFile: "none.pem", District: "d", TokenKey: pub}, []string{"CertFile, KeyFile: open none.pem"}},
	} {
		_, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Devices: &tt.o})
		if err == nil {
			t.Errorf("%+v: got no error", tt.o)
			continue
		}
		for _, w := range tt.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("got %v, want %q in it", err, w)
			}
		}
	}
}

func TestNewTokenBounds(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		key    ed25519.PrivateKey
		d      traffic.DistrictID
		device traffic.DeviceID
		life   time.Duration
		want   string
	}{
		{tokenKey, "", own, time.Hour, "must not be empty"}, {tokenKey, "d", "", time.Hour, "must not be empty"},
		{tokenKey, "d", own, 0, "must be 1 s to"}, {tokenKey, "d", own, bus.MaxTokenLife + time.Second, "must be 1 s to"},
		{nil, "d", own, time.Hour, "key has 0 bytes"},
	} {
		if _, err := bus.NewToken(tt.key, tt.d, tt.device, now, now.Add(tt.life)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
}

// A device cannot fill the log.
func TestDeviceCannotFillTheLog(t *testing.T) {
	var lines countLines
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&lines, nil)),
		Devices: &bus.DeviceOptions{MQTT: "127.0.0.1:0", District: "harbour", TokenKey: tokenKey.Public().(ed25519.PublicKey)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	c, _ := device(t, s, nil)
	const n = 2000
	began := time.Now()
	for range n {
		c.Publish("x", 0, false, "forged")
	}
	mqttPublish(t, c, "x", 1, "forged")
	if got := s.DeviceCounts().Topics; got != n+1 {
		t.Errorf("counted %d, want %d", got, n+1)
	}
	if got, most := lines.n.Load(), 10*int64(time.Since(began)/time.Second+2); got == 0 || got > most {
		t.Errorf("%d lines in the log, want 1 to %d", got, most)
	}
}

type countLines struct{ n atomic.Int64 }

func (c *countLines) Write(p []byte) (int, error) {
	c.n.Add(1)
	return len(p), nil
}

// Whatever is not a token that the key has signed is no token, and what it has
// signed is good for its device and time only.
func FuzzToken(f *testing.F) {
	now := time.Unix(1_800_000_000, 0)
	good, err := bus.NewToken(tokenKey, "harbour", own, now, now.Add(time.Hour))
	if err != nil {
		f.Fatal(err)
	}
	pub := tokenKey.Public().(ed25519.PublicKey)
	if until, err := bus.CheckToken(pub, "harbour", own, good, now); err != nil || !until.Equal(now.Add(time.Hour)) {
		f.Fatalf("got %v, %v, want good for an hour", until, err)
	}
	f.Add(good, "rsu-1", int64(0))
	f.Add(good, "rsu-2", int64(3600))
	f.Add(good+"=", "rsu-1", int64(-61))
	f.Add("e30.e30.", "", int64(0))
	f.Add("", "", int64(0))
	f.Fuzz(func(t *testing.T, token, device string, seconds int64) {
		_, err := bus.CheckToken(pub, "harbour", traffic.DeviceID(device), token, now.Add(time.Duration(seconds%1e6)*time.Second))
		if err != nil {
			return
		}
		signed, signature, _ := cutLast(token, ".")
		sig, err := base64.RawURLEncoding.DecodeString(signature)
		if err != nil || !ed25519.Verify(pub, []byte(signed), sig) || (device != string(own) || seconds%1e6 < -60 || seconds%1e6 >= 3600) {
			t.Errorf("%q was good for %q after %d s (%v)", token, device, seconds%1e6, err)
		}
	})
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
