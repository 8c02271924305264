package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"golang.org/x/net/http2"
)

// handshakeTime is how long a client may take to say what it wants.
const handshakeTime = 10 * time.Second

// maxConns bounds connections; who comes on top is turned away.
const maxConns = 16384

// door is one address for gRPC and REST. Whoever speaks nothing but HTTP/2 is a
// gRPC client; everybody else, who can speak HTTP/1.1, is served REST by it.
type door struct {
	l    net.Listener
	tls  *tls.Config // nil: none
	log  *slog.Logger
	grpc *room
	http *room
}

// serverTLS is TLS 1.3 that asks for a client's certificate and takes any: the
// registry says whose it is. The files are read again when they have changed.
func serverTLS(certFile, keyFile string) (*tls.Config, error) {
	c := &certificate{cert: certFile, key: keyFile}
	if _, err := c.get(nil); err != nil {
		return nil, fmt.Errorf("gateway: API: %w", err)
	}
	base := &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, GetCertificate: c.get, NextProtos: []string{"http/1.1"}}
	onlyH2 := base.Clone()
	onlyH2.NextProtos = []string{http2.NextProtoTLS}
	base.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(h.SupportedProtos, http2.NextProtoTLS) && !slices.Contains(h.SupportedProtos, "http/1.1") {
			return onlyH2, nil
		}
		return nil, nil
	}
	return base, nil
}

// certificate is read from its files whenever they have changed.
type certificate struct {
	cert, key string

	mu   sync.Mutex
	at   time.Time // when the files were written
	next time.Time // when to look again
	have *tls.Certificate
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.have != nil && now.Before(c.next) {
		return c.have, nil
	}
	c.next = now.Add(10 * time.Second)
	st, err := os.Stat(c.cert)
	if err == nil && (c.have == nil || !st.ModTime().Equal(c.at)) {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(c.cert, c.key); err == nil {
			c.have, c.at = &pair, st.ModTime()
		}
	}
	if c.have != nil { // half-written files: the old one goes on
		return c.have, nil
	}
	return nil, err
}

func openDoor(addr string, tc *tls.Config, log *slog.Logger) (*door, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("gateway: API: %w", err)
	}
	return &door{l: l, tls: tc, log: log, grpc: newRoom(l.Addr()), http: newRoom(l.Addr())}, nil
}

func (d *door) addr() string { return d.l.Addr().String() }

// run shows connections in until ctx ends.
func (d *door) run(ctx context.Context) error {
	var inside sync.WaitGroup
	defer inside.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = d.l.Close() })() // Accept ends by it
	places := make(chan struct{}, maxConns)
	for {
		conn, err := d.l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // came too late
			}
			return nil
		}
		if err != nil {
			var ne net.Error
			if errors.Is(err, net.ErrClosed) || !errors.As(err, &ne) {
				return err
			}
			d.log.Warn("gateway: cannot take a connection", "err", err) // such as too many open files
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			_ = conn.Close() // it will see that
			continue
		}
		conn = &placed{Conn: conn, leave: sync.OnceFunc(func() { <-places })}
		inside.Go(func() { d.show(ctx, conn) })
	}
}

// placed gives its place back when it is closed.
type placed struct {
	net.Conn
	leave func()
}

func (p *placed) Close() error {
	p.leave()
	return p.Conn.Close()
}

// show finds out what a connection speaks.
func (d *door) show(ctx context.Context, conn net.Conn) {
	end := context.AfterFunc(ctx, func() { _ = conn.Close() }) // who has not said what they want yet
	room, conn, err := d.which(ctx, conn)
	if !end() {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		d.log.Debug("gateway: a connection comes to nothing", "remote", conn.RemoteAddr(), "err", err)
		_ = conn.Close() // it is of no use
		return
	}
	room.enter(conn)
}

func (d *door) which(ctx context.Context, conn net.Conn) (*room, net.Conn, error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, conn, err
	}
	if d.tls != nil {
		t := tls.Server(conn, d.tls)
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, conn, err
		}
		r := d.http
		if t.ConnectionState().NegotiatedProtocol == http2.NextProtoTLS {
			r = d.grpc
		}
		return r, t, t.SetDeadline(time.Time{})
	}
	p := &peeked{Conn: conn, r: bufio.NewReaderSize(conn, 4096)}
	preface := []byte(http2.ClientPreface)
	r := d.grpc
	for n := 1; n <= len(preface); n++ { // no more than has come: a short GET is all there is
		b, err := p.r.Peek(n)
		if err != nil {
			return nil, conn, err
		}
		if !bytes.Equal(b, preface[:n]) {
			r = d.http
			break
		}
	}
	return r, p, p.SetDeadline(time.Time{})
}

// peeked is a connection of which the first bytes have been looked at.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.r.Read(b) }

// room is a listener to which connections are handed.
type room struct {
	at    net.Addr
	conns chan net.Conn
	once  sync.Once
	shut  chan struct{}
}

func newRoom(at net.Addr) *room {
	return &room{at: at, conns: make(chan net.Conn), shut: make(chan struct{})}
}

func (r *room) enter(c net.Conn) {
	select {
	case r.conns <- c:
	case <-r.shut:
		_ = c.Close() // nobody is in
	}
}

func (r *room) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.shut:
		return nil, net.ErrClosed
	}
}

func (r *room) Close() error {
	r.once.Do(func() { close(r.shut) })
	return nil
}

func (r *room) Addr() net.Addr { return r.at }

// handshaken are gRPC's credentials for connections that the door has dealt with.
type handshaken struct{}

func (handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if t, ok := c.(*tls.Conn); ok {
		return c, credentials.TLSInfo{State: t.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
	}
	return c, plain{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
}

type plain struct{ credentials.CommonAuthInfo }

func (plain) AuthType() string { return "none" }

func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("gateway: is no client")
}
func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (h handshaken) Clone() credentials.TransportCredentials { return h }
func (handshaken) OverrideServerName(string) error           { return nil }
