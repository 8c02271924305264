package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/topic"
)

// ServerOptions configure an embedded server.
type ServerOptions struct {
	// Dir holds JetStream's files. Required.
	Dir string
	// Listen is host:port to take connections on; port 0 picks a free one. Empty:
	// connections of this process only, by [Server.Connect].
	Listen string
	// Logger takes the server's log. Optional.
	Logger *slog.Logger
	// MaxPayload bounds one message, bytes; 0 means [topic.MaxPayload].
	MaxPayload int32
	// MaxStore bounds all streams together, bytes; 0 means 1 TiB, that is: only
	// the streams' own bounds hold.
	MaxStore int64
	// Devices lets devices in by MQTT. Optional.
	Devices *DeviceOptions
}

// Validate reports everything that is wrong with o.
func (o ServerOptions) Validate() error {
	var errs []error
	if o.Dir == "" {
		errs = append(errs, errors.New("bus: Dir: must not be empty"))
	}
	if o.Listen != "" {
		if _, _, err := splitListen(o.Listen); err != nil {
			errs = append(errs, fmt.Errorf("bus: Listen: %w", err))
		}
	}
	if o.MaxPayload < 0 {
		errs = append(errs, fmt.Errorf("bus: MaxPayload: %d, must not be negative", o.MaxPayload))
	}
	if o.MaxStore < 0 {
		errs = append(errs, fmt.Errorf("bus: MaxStore: %d, must not be negative", o.MaxStore))
	}
	if o.Devices != nil {
		errs = append(errs, o.Devices.validate())
	}
	return errors.Join(errs...)
}

func splitListen(s string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, err
	}
	if port, err = strconv.Atoi(p); err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("%q: port must be 0 to 65535", s)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// Server is an embedded nats-server with JetStream.
type Server struct {
	s       *server.Server
	listen  bool
	log     *slog.Logger
	devices *devices        // nil where none are let in
	mqtt    server.MQTTOpts // as it listens
}

// startWait is how long a server may take to come up: recovering streams of
// some gigabytes takes seconds.
const startWait = time.Minute

// StartServer starts a server that syncs every stored message to disk before
// it acknowledges. It leaves signals to the program.
func StartServer(o ServerOptions) (*Server, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	so := &server.Options{
		ServerName: "stopline", NoSigs: true,
		JetStream: true, StoreDir: o.Dir, JetStreamMaxStore: o.MaxStore,
		// Without this JetStream acknowledges up to two minutes before it syncs, and
		// a power cut takes everything since.
		SyncAlways: true,
		MaxPayload: o.MaxPayload,
		DontListen: o.Listen == "",
	}
	if so.MaxPayload == 0 {
		so.MaxPayload = topic.MaxPayload
	}
	if so.JetStreamMaxStore == 0 {
		// Not a share of the free disk: then a full disk would refuse to declare
		// streams that are already there.
		so.JetStreamMaxStore = 1 << 40
	}
	// A client that does not read loses its connection; it must be able to hold
	// several of the largest messages before that.
	so.MaxPending = max(server.MAX_PENDING_SIZE, 8*int64(so.MaxPayload))
	if o.Listen != "" {
		so.Host, so.Port, _ = splitListen(o.Listen) // checked by Validate
	}
	log := orDiscard(o.Logger)
	var dev *devices
	if o.Devices != nil {
		var err error
		if dev, err = newDevices(*o.Devices, o.Listen != "", log); err == nil {
			err = dev.configure(so)
		}
		if err != nil {
			return nil, err
		}
	}
	s, err := server.NewServer(so)
	if err != nil {
		return nil, fmt.Errorf("bus: starting NATS: %w", err)
	}
	s.SetLoggerV2(serverLog{log.With("part", "nats"), dev}, false, false, false)
	s.Start()
	if !s.ReadyForConnections(startWait) || !s.JetStreamEnabled() {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, fmt.Errorf("bus: NATS in %s is not ready: see its log", o.Dir)
	}
	if dev != nil {
		ctx, cancel := context.WithTimeout(context.Background(), startWait)
		defer cancel()
		if err := dev.open(ctx, s); err != nil {
			s.Shutdown()
			s.WaitForShutdown()
			return nil, err
		}
	}
	return &Server{s: s, listen: o.Listen != "", log: log, devices: dev, mqtt: so.MQTT}, nil
}

// Connect returns a connection within the process, which no firewall or full
// socket buffer can touch. name is for the server's log.
func (s *Server) Connect(name string) (*Bus, error) {
	return connect("", []nats.Option{nats.InProcessServer(s.s), nats.Name(name)}, s.log)
}

// URL returns where the server listens, and "" where it does not.
func (s *Server) URL() string {
	if !s.listen {
		return ""
	}
	return s.s.ClientURL()
}

// Shutdown stops the server and waits until its files are closed. Close the
// connections first, or what they have in flight is lost.
func (s *Server) Shutdown() {
	if s.devices != nil {
		s.devices.close()
	}
	s.s.Shutdown()
	s.s.WaitForShutdown()
}

func orDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// serverLog gives nats-server's log to slog. What the server calls a notice is
// detail to our operators.
type serverLog struct {
	l       *slog.Logger
	devices *devices // may be nil
}

func (s serverLog) log(level slog.Level, format string, v []any) {
	if s.l.Enabled(context.Background(), level) {
		s.l.Log(context.Background(), level, "nats server", "text", fmt.Sprintf(format, v...))
	}
}
func (s serverLog) Noticef(format string, v ...any) { s.log(slog.LevelDebug, format, v) }
func (s serverLog) Warnf(format string, v ...any) {
	if s.devices != nil && s.devices.noted(format, v) {
		return
	}
	level := slog.LevelWarn
	if strings.HasPrefix(format, "Maximum payloads over") || strings.HasPrefix(format, "Websocket not configured with TLS") {
		level = slog.LevelDebug // we chose it: see topic.MaxPayload, DeviceOptions.CertFile
	}
	s.log(level, format, v)
}
func (s serverLog) Errorf(format string, v ...any) {
	if s.devices != nil && s.devices.noted(format, v) {
		return
	}
	s.log(slog.LevelError, format, v)
}
func (s serverLog) Fatalf(format string, v ...any) { s.log(slog.LevelError, format, v) }
func (s serverLog) Debugf(format string, v ...any) { s.log(slog.LevelDebug, format, v) }
func (s serverLog) Tracef(format string, v ...any) { s.log(slog.LevelDebug, format, v) }
