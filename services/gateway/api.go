package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/run"
)

// APIConfig says how agencies reach a gateway.
type APIConfig struct {
	// Listen is the address that speaks gRPC and REST.
	Listen string
	// CertFile and KeyFile are PEM, for TLS 1.3. Clients may show a certificate; who
	// they are is said by its key in the registry, not by who issued it.
	CertFile, KeyFile string
	// Insecure serves without TLS: only for a demo on one machine.
	Insecure bool
	// Name of the gateway's service in the registry, and its Key, which signs access
	// records and receipts. Required.
	Name string
	Key  ed25519.PrivateKey
	// Policy is the district's tlog policy, by which bundles are verified. Required.
	Policy []byte
	// Limits of calls; nil is [DefaultLimits].
	Limits *Limits
	// MaxBody bounds the body of a request, bytes, but for a bundle to verify; 0 is
	// 1 MiB.
	MaxBody int64
	// Timeout bounds a call that is no stream; 0 is 20 s. A client's own deadline
	// holds where it is earlier.
	Timeout time.Duration
	// Drain is how long calls may go on when the gateway ends; 0 is 5 s.
	Drain time.Duration
	// Devices lets devices be brought in and retired; nil only lists them.
	Devices *DevicesConfig
	// HTTP reaches OIDC issuers; nil is a client that follows no redirects.
	HTTP *http.Client
}

// Validate reports everything that is wrong, joined.
func (c *APIConfig) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("gateway: API: "+format, a...)) }
	if c.Listen == "" {
		bad("Listen: must be given")
	}
	if c.Name == "" || len(c.Key) != ed25519.PrivateKeySize {
		bad("Name and Key: must be given")
	}
	if _, err := ledger.ParsePolicy(c.Policy); err != nil {
		bad("Policy: %w", err)
	}
	if given := c.CertFile != "" && c.KeyFile != ""; given == c.Insecure || (c.CertFile == "") != (c.KeyFile == "") {
		bad("CertFile and KeyFile: must be given, or Insecure, and not both")
	}
	if c.Devices != nil {
		errs = append(errs, c.Devices.Validate())
	}
	if c.MaxBody < 0 || c.Timeout < 0 || c.Drain < 0 {
		bad("MaxBody, Timeout, Drain: must not be negative")
	}
	return errors.Join(errs...)
}

// maxBundle is the largest message: a bundle to verify, and what is around it.
const maxBundle = 16<<20 + 1<<10

// API is what agencies call.
type API struct {
	cfg      APIConfig
	g        *Gateway
	policy   *ledger.Policy
	guard    *Guard
	recorder *Recorder
	audit    *auditor
	parts    []part
	listens  []listener
	byName   map[string]part // by service
	server   *grpc.Server
	inner    *bufconn.Listener
	conns    connPool
	rest     http.Handler
	door     *door
	compiled atomic.Pointer[compiled]

	draining context.Context // ended when streams have to end
	drain    context.CancelFunc
	stop     chan struct{} // closed by Drain
	stopOnce sync.Once
	stopped  chan struct{} // closed when everything is on its way to ingest
}

// compiled is the access policy of a registry.
type compiled struct {
	reg    *identity.Registry
	policy string // hash of its entry
	engine *access.Engine
}

func newAPI(c APIConfig, g *Gateway) (_ *API, err error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Limits == nil {
		c.Limits = DefaultLimits()
	}
	if c.MaxBody == 0 {
		c.MaxBody = 1 << 20
	}
	if c.Timeout == 0 {
		c.Timeout = 20 * time.Second
	}
	if c.Drain == 0 {
		c.Drain = 5 * time.Second
	}
	a := &API{cfg: c, g: g, byName: map[string]part{}, inner: bufconn.Listen(1 << 20), stop: make(chan struct{}), stopped: make(chan struct{})}
	a.draining, a.drain = context.WithCancel(context.Background())
	if a.policy, err = ledger.ParsePolicy(c.Policy); err != nil {
		return nil, err
	}
	if a.recorder, err = NewRecorder(RecorderConfig{Bus: g.cfg.Bus, District: g.cfg.District, Name: c.Name, Key: c.Key, Now: g.cfg.Now, Logger: g.log}); err != nil {
		return nil, err
	}
	var secret [32]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return nil, err
	}
	a.audit = newAuditor(a.bus(), a.district())
	a.guard = &Guard{District: g.cfg.District, Auth: NewAuthenticator(g.cfg.District, a.registry, g.cfg.Now, c.HTTP), Engine: a.engine, Recorder: a.recorder,
		Limits: c.Limits, Objects: a.objects, Approved: a.approved, Now: g.cfg.Now, Log: g.log, Inner: hex.EncodeToString(secret[:])}
	if err := a.guard.Open(); err != nil {
		return nil, err
	}
	a.server = grpc.NewServer(
		grpc.Creds(handshaken{}), grpc.MaxRecvMsgSize(maxBundle), grpc.MaxHeaderListSize(32<<10), grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxConcurrentStreams(8192),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 30 * time.Minute, Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(a.unary, a.guard.Unary), grpc.ChainStreamInterceptor(a.stream, a.guard.Stream),
	)
	if a.parts, err = a.makeParts(); err != nil {
		return nil, err
	}
	for _, p := range a.parts {
		before := len(a.server.GetServiceInfo())
		p.register(a.server)
		if len(a.server.GetServiceInfo()) != before+1 {
			return nil, fmt.Errorf("gateway: %T must register one service", p)
		}
		for name := range a.server.GetServiceInfo() {
			if a.byName[name] == nil {
				a.byName[name] = p
			}
		}
		if l, ok := p.(listener); ok {
			a.listens = append(a.listens, l)
		}
	}
	reflection.Register(a.server)
	for range 4 { // one connection's writer would be a bottleneck
		conn, err := grpc.NewClient("passthrough:///gateway", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.inner.DialContext(ctx) }),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(maxBundle)))
		if err != nil {
			return nil, err
		}
		a.conns.all = append(a.conns.all, conn)
	}
	if a.rest, err = a.newREST(); err != nil {
		return nil, err
	}
	var tc *tls.Config
	if !c.Insecure {
		if tc, err = serverTLS(c.CertFile, c.KeyFile); err != nil {
			return nil, err
		}
	}
	if a.door, err = openDoor(c.Listen, tc, g.log); err != nil {
		return nil, err
	}
	return a, nil
}

// engine is the access policy in force, nil where there is none that can be used.
func (a *API) engine() *access.Engine {
	reg := a.registry()
	was := a.compiled.Load()
	if was != nil && was.reg == reg {
		return was.engine
	}
	now := &compiled{reg: reg}
	if e, ok := reg.Entry(identity.TypeAccess, identity.AccessID); ok {
		now.policy = string(e.Hash())
	}
	if was != nil && was.policy == now.policy {
		now.engine = was.engine
	} else if p, ok := reg.Access(); ok {
		e, err := access.Compile(reg.District(), p)
		if err != nil {
			a.log().Error("gateway: the access policy cannot be used, so nobody is granted anything", "version", p.Version, "err", err)
		} else {
			now.engine = e
		}
	}
	a.compiled.Store(now)
	return now.engine
}

// objects asks the part whose method it is.
func (a *API) objects(ctx context.Context, method string, req proto.Message) ([]access.Object, error) {
	p := a.byName[strings.TrimPrefix(path.Dir(method), "/")]
	if p == nil {
		return nil, refuse(codes.Unimplemented, "UNKNOWN_METHOD", "method: is not known")
	}
	o, err := p.objects(ctx, method, req)
	return o, a.status(err)
}

// Addr is where the API listens.
func (a *API) Addr() string { return a.door.addr() }

// REST serves the REST side behind the same guard, for another listener.
func (a *API) REST() http.Handler { return a.rest }

// Guard and Recorder are for those who watch them.
func (a *API) Guard() *Guard       { return a.guard }
func (a *API) Recorder() *Recorder { return a.recorder }

// decided tells who wants to know of the accepted records of a block.
func (a *API) decided(b *decided.Block, r *decided.Record, c *validate.Candidate) {
	if c.Access != nil || c.Request != nil || c.Override != nil {
		a.recorder.Decided(ledger.Commit(r.Salt, r.Raw), r.Index)
	}
	for _, l := range a.listens {
		l.accepted(b, r, c)
	}
}

// Drain ends the API: no new calls, streams are told to come again, and what is
// on record is brought to ingest. It returns when that is done, or after the
// drain time. Run must be running.
func (a *API) Drain() {
	a.stopOnce.Do(func() { close(a.stop) })
	<-a.stopped
}

// Run serves until ctx ends, then drains.
func (a *API) Run(ctx context.Context) error {
	// What is asked at the very end must still be put on record: so the recorder
	// ends after the server, and the guard's counts between them.
	recording, stopRecording := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRecording()
	counting, stopCounting := context.WithCancel(recording)
	defer stopCounting()
	serving, stopServing := context.WithCancel(counting)
	defer stopServing()
	restServer := &http.Server{Handler: a.rest, ReadHeaderTimeout: handshakeTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10}
	counted := make(chan struct{})
	// stay holds an actor that is done until all are: the first to return would end
	// the others.
	stay := func(f func() error) func(context.Context) error {
		return func(context.Context) error {
			err := f()
			if err == nil {
				<-recording.Done()
			}
			return err
		}
	}
	actors := []run.Actor{
		{Name: "recorder", Run: func(context.Context) error { return a.recorder.Run(recording) }},
		{Name: "counts", Run: stay(func() error {
			defer close(counted)
			return a.guard.Run(counting)
		})},
		{Name: "inner gRPC", Run: stay(func() error { return a.server.Serve(a.inner) })},
		{Name: "gRPC", Run: stay(func() error { return a.server.Serve(a.door.grpc) })},
		{Name: "REST", Run: stay(func() error {
			if err := restServer.Serve(a.door.http); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})},
		{Name: "door", Run: stay(func() error { return a.door.run(serving) })},
		{Name: "end", Run: func(ctx context.Context) error {
			drained := sync.OnceFunc(func() { close(a.stopped) })
			defer drained()
			select {
			case <-ctx.Done():
			case <-a.stop:
			}
			end, cancel := context.WithTimeout(recording, a.cfg.Drain)
			defer cancel()
			a.drain()
			stopServing()
			// REST first: its calls are calls of the gRPC server too.
			if err := restServer.Shutdown(end); err != nil {
				_ = restServer.Close() // whoever is left has had their time
			}
			graceful := make(chan struct{})
			go func() {
				defer close(graceful)
				a.server.GracefulStop()
			}()
			select {
			case <-graceful:
			case <-end.Done():
				a.server.Stop()
				<-graceful
			}
			stopCounting()
			<-counted
			a.recorder.Flush(end)
			drained()    // who waits for it is who ends ctx
			<-ctx.Done() // a drained API stays until the gateway ends
			stopRecording()
			for _, c := range a.conns.all {
				_ = c.Close() // in this process: nobody to tell
			}
			return nil
		}},
	}
	for _, p := range a.parts {
		if r, ok := p.(runner); ok {
			actors = append(actors, run.Actor{Name: fmt.Sprintf("%T", p), Run: stay(func() error { return r.run(counting) })})
		}
	}
	return run.All(ctx, actors...)
}

// connPool spreads calls over connections.
type connPool struct {
	all  []*grpc.ClientConn
	next atomic.Uint32
}

func (p *connPool) pick() *grpc.ClientConn { return p.all[int(p.next.Add(1))%len(p.all)] }

func (p *connPool) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return p.pick().Invoke(ctx, method, args, reply, opts...)
}

func (p *connPool) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return p.pick().NewStream(ctx, d, method, opts...)
}

// unary is before the guard: time, size, and errors in one form.
func (a *API) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Timeout)
	defer cancel()
	if m, ok := req.(proto.Message); ok && info.FullMethod != verifyBundle && int64(proto.Size(m)) > a.cfg.MaxBody {
		return nil, refuse(codes.ResourceExhausted, "TOO_LARGE", fmt.Sprintf("request: larger than %d bytes", a.cfg.MaxBody))
	}
	out, err := handler(ctx, req)
	return out, a.status(err)
}

// stream is before the guard. What describes the API is public and has no guard.
func (a *API) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	defer context.AfterFunc(a.draining, func() {
		cancel(refuse(codes.Unavailable, "DRAINING", "the gateway is being ended: come again", retryIn(time.Second)))
	})()
	return a.status(handler(srv, &inContext{ss, ctx}))
}

type inContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *inContext) Context() context.Context { return s.ctx }
