package ingest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
)

// GRPCConfig configures a [GRPC].
type GRPCConfig struct {
	// Ingest takes the records. Required.
	Ingest *Service
	// Listen is the TCP address, such as 127.0.0.1:9443. Required; port 0 is any.
	Listen string
	// CertFile and KeyFile, PEM, turn TLS on (1.3 or 1.2). Optional, both or none.
	CertFile, KeyFile string
	// ClientCAFile, PEM, has the certificates by which gateways must be known.
	// Optional.
	ClientCAFile string
	// Connections is how many there may be; further ones are closed at once. 0
	// means 256.
	Connections int
	// Streams is how many calls of any kind a connection may have; further ones
	// wait in the gateway. 0 means 16.
	Streams int
	// Calls is how many calls of IngestService there may be; further ones end with
	// RESOURCE_EXHAUSTED. 0 means 256.
	Calls int
	// MaxMessage bounds one message, bytes; a call with a larger one ends with
	// RESOURCE_EXHAUSTED. 0 means 1 MiB.
	MaxMessage int
	// Window is how many records of one stream may be without a receipt that the
	// gateway's end has room for; then the stream is not read. 0 means 1024.
	Window int
	// WindowBytes bounds those of them that are not stored yet; 0 means 4 MiB.
	WindowBytes int
	// Held and HeldBytes bound what is not stored yet of all streams; then none is
	// read. 0 means 8192 and 64 MiB.
	Held, HeldBytes int
	// Patience is how long a stream is kept on which nothing can be stored; then it
	// ends with UNAVAILABLE, and why. 0 means 30 s.
	Patience time.Duration
	// ReadWait is how long a stream may have no room for a receipt; then it ends
	// with DEADLINE_EXCEEDED. 0 means 2 min.
	ReadWait time.Duration
	// Drain is how long calls may go on when Run is to end; 0 means 10 s.
	Drain time.Duration
	// Revoked reports whether the registry has revoked a key. A stream that has
	// brought records of such keys only ends with PERMISSION_DENIED. It must be quick
	// and safe for concurrent use. Optional: then validation refuses the records,
	// and the stream stays.
	Revoked func(identity.KeyID) bool
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong with c.
func (c GRPCConfig) Validate() error {
	var errs []error
	if c.Ingest == nil {
		errs = append(errs, errors.New("ingest: GRPC.Ingest: must be given"))
	}
	if c.Listen == "" {
		errs = append(errs, errors.New("ingest: GRPC.Listen: must not be empty"))
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, errors.New("ingest: GRPC.CertFile, KeyFile: must be given both or not at all"))
	}
	if c.ClientCAFile != "" && c.CertFile == "" {
		errs = append(errs, errors.New("ingest: GRPC.ClientCAFile: needs CertFile and KeyFile"))
	}
	record := int64(identity.MaxEnvelope)
	if c.Ingest != nil {
		record = int64(c.Ingest.MaxRecord)
	}
	record += itemCost
	c = c.orDefaults()
	for _, f := range []struct {
		name            string
		value, min, max int64
	}{
		{"Connections", int64(c.Connections), 1, 1 << 20}, {"Streams", int64(c.Streams), 1, 1 << 16}, {"Calls", int64(c.Calls), 1, 1 << 20},
		{"MaxMessage", int64(c.MaxMessage), record, 64 << 20}, {"Window", int64(c.Window), 1, 1 << 20}, {"WindowBytes", int64(c.WindowBytes), record, 1 << 40},
		{"Held", int64(c.Held), 1, 1 << 24}, {"HeldBytes", int64(c.HeldBytes), record, 1 << 40}, {"Patience", int64(c.Patience), 1, int64(time.Hour)},
		{"ReadWait", int64(c.ReadWait), int64(time.Millisecond), int64(time.Hour)}, {"Drain", int64(c.Drain), 1, int64(time.Hour)},
	} {
		if f.value < f.min || f.value > f.max {
			errs = append(errs, fmt.Errorf("ingest: GRPC.%s: %d, must be %d to %d", f.name, f.value, f.min, f.max))
		}
	}
	return errors.Join(errs...)
}

func (c GRPCConfig) orDefaults() GRPCConfig {
	c.Connections = or(c.Connections, 256)
	c.Streams = or(c.Streams, 16)
	c.Calls = or(c.Calls, 256)
	c.MaxMessage = or(c.MaxMessage, 1<<20)
	c.Window = or(c.Window, 1024)
	c.WindowBytes = or(c.WindowBytes, 4<<20)
	c.Held = or(c.Held, 8192)
	c.HeldBytes = or(c.HeldBytes, 64<<20)
	c.Patience = or(c.Patience, 30*time.Second)
	c.ReadWait = or(c.ReadWait, 2*time.Minute)
	c.Drain = or(c.Drain, 10*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Of every connection.
const (
	handshakeWait = 10 * time.Second // TLS and HTTP/2 prefaces
	pingEvery     = 30 * time.Second // of us, when nothing comes
	pingWait      = 10 * time.Second // for the answer; then the connection is closed
	pingMin       = 10 * time.Second // between pings of a gateway; who pings more often is sent away
	headerBytes   = 8 << 10
	// streamWindow is what HTTP/2 lets a stream send that is not read. It is fixed:
	// the one that grows with the connection's speed would not be bounded by us.
	streamWindow = 256 << 10
	connWindow   = 1 << 20
)

// GRPC is the door for gateways that speak for many devices: IngestService,
// grpc.health.v1 and reflection. Make it with [NewGRPC], run it with [GRPC.Run].
//
// # Receipts and order
//
// The records of a stream are stored in the order in which they came, and their
// receipts come in that order as well, each stored or refused. There is no busy
// receipt: what is answered busy inside is held and tried again, and nothing
// behind it overtakes it. Meanwhile the stream is read until its window is full,
// and then the gateway is slowed by HTTP/2's flow control. A gateway may so send
// its devices' frames as they come, without waiting for receipts.
//
// A stream that ends with another status than OK leaves records without a
// receipt, of which nobody says whether they are stored. The gateway keeps each
// record until it has its receipt, and sends those without one again, in order,
// on a new stream: what is stored gets the same receipt and is not stored twice.
// UNAVAILABLE says that nothing could be stored for a while (see its text), or
// that the program ends.
//
// # Whole calls at fault
//
// INVALID_ARGUMENT carries google.rpc.BadRequest with field and rule; UNAVAILABLE
// and too many calls carry google.rpc.ErrorInfo and RetryInfo. Two faults are
// found by grpc before we see the message, and end a stream at once in its words:
// RESOURCE_EXHAUSTED for a message larger than [GRPCConfig.MaxMessage], INTERNAL
// for one that is not the schema's.
type GRPC struct {
	GRPCConfig
	pb.UnimplementedIngestServiceServer
	log      *slog.Logger
	server   *grpc.Server
	health   *health.Server
	listener *limited
	room     room
	stopping chan struct{} // closed when Run is to end
	parts    sync.WaitGroup
	calls    atomic.Int64
	turned   atomic.Uint64 // calls turned away
}

// GRPCCounts says what is open now, and what was turned away since the start.
// Records are in [Counts].
type GRPCCounts struct {
	Connections, Calls int64
	// Held records of streams, which are not stored yet, and their bytes with what
	// keeping them costs.
	Held, HeldBytes                  int64
	ConnectionsRefused, CallsRefused uint64
}

// NewGRPC listens on c.Listen. Nothing is answered until Run; who does not run it
// must close it.
func NewGRPC(c GRPCConfig) (*GRPC, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.orDefaults()
	options := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(c.MaxMessage), grpc.MaxConcurrentStreams(uint32(c.Streams)), grpc.ConnectionTimeout(handshakeWait),
		grpc.MaxHeaderListSize(headerBytes), grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingEvery, Timeout: pingWait}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingMin, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	}
	if c.CertFile != "" {
		t, err := c.tls()
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.Creds(credentials.NewTLS(t)))
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "ingest: gRPC: %w", err)
	}
	g := &GRPC{
		GRPCConfig: c, log: c.Logger, health: health.NewServer(),
		listener: &limited{Listener: l, max: int64(c.Connections)},
		room:     newRoom(c.Held, c.HeldBytes), stopping: make(chan struct{}),
	}
	g.server = grpc.NewServer(append(options, grpc.StreamInterceptor(g.side))...)
	g.serving(healthpb.HealthCheckResponse_NOT_SERVING)
	pb.RegisterIngestServiceServer(g.server, g)
	healthpb.RegisterHealthServer(g.server, g.health)
	reflection.Register(g.server)
	return g, nil
}

func (g *GRPC) serving(s healthpb.HealthCheckResponse_ServingStatus) {
	g.health.SetServingStatus("", s)
	g.health.SetServingStatus(pb.IngestService_ServiceDesc.ServiceName, s)
}

func (c *GRPCConfig) tls() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "ingest: GRPC.CertFile, KeyFile: %w", err)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}}
	if c.ClientCAFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(c.ClientCAFile)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "ingest: GRPC.ClientCAFile: %w", err)
	}
	t.ClientCAs = x509.NewCertPool()
	if !t.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, kind.Errorf(kind.Invalid, "ingest: GRPC.ClientCAFile: %s: has no PEM certificate", c.ClientCAFile)
	}
	t.ClientAuth = tls.RequireAndVerifyClientCert
	return t, nil
}

// Addr returns the address on which the door listens.
func (g *GRPC) Addr() net.Addr { return g.listener.Addr() }

// Close ends the door at once. It is for doors that are not run.
func (g *GRPC) Close() {
	g.server.Stop()
	_ = g.listener.Close() // may be closed already; nothing was written to it
}

// Counts returns a snapshot.
func (g *GRPC) Counts() GRPCCounts {
	return GRPCCounts{
		Connections: g.listener.open.Load(), Calls: g.calls.Load(), Held: g.room.held.Load(), HeldBytes: g.room.heldBytes.Load(),
		ConnectionsRefused: g.listener.refused.Load(), CallsRefused: g.turned.Load(),
	}
}

// Run answers gateways until ctx ends. Then streams take no more records, what
// they have taken gets its receipts as far as it can be stored, and calls end with
// UNAVAILABLE; those that have not ended after [GRPCConfig.Drain] are cut off. It
// may be stopped together with the Service. It must be called only once.
func (g *GRPC) Run(ctx context.Context) error {
	served := make(chan error, 1)
	g.parts.Go(func() { served <- g.server.Serve(g.listener) })
	g.parts.Go(func() {
		select {
		case <-g.Ingest.Ready():
			g.serving(healthpb.HealthCheckResponse_SERVING)
		case <-ctx.Done():
		case <-g.stopping:
		}
	})
	var err error
	select {
	case err = <-served:
		if err == nil {
			err = errors.New("has been closed")
		}
		err = kind.Errorf(kind.Unavailable, "ingest: gRPC on %s: %w", g.Addr(), err)
	case <-ctx.Done():
	}
	g.health.Shutdown()
	close(g.stopping)
	cut := time.AfterFunc(g.Drain, func() {
		g.log.Warn("ingest: gRPC calls have not ended in time and are cut off", "count", g.calls.Load())
		g.server.Stop()
	})
	g.server.GracefulStop()
	cut.Stop()
	g.parts.Wait()
	return err
}

// fault is the status of a call that is at fault as a whole.
func fault(code codes.Code, r *refusal) error {
	return detailed(code, r.text, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: r.field, Description: r.text, Reason: upper(r.reason)},
	}})
}

// later is the status of a call that may be made again.
func later(code codes.Code, reason, text string) error {
	return detailed(code, text, &errdetails.ErrorInfo{Reason: upper(reason), Domain: "stopline"}, &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
}

// upper is how google.rpc writes reasons.
func upper(reason string) string { return strings.ToUpper(strings.ReplaceAll(reason, "-", "_")) }

func detailed(code codes.Code, text string, details ...protoadapt.MessageV1) error {
	st := status.New(code, strings.ToValidUTF8(text, "\uFFFD"))
	if d, err := st.WithDetails(details...); err == nil { // else the text says it as well
		st = d
	}
	return st.Err()
}

// Reasons why calls end, with those of records.
const (
	reasonCalls    = "too-many-calls"
	reasonStopping = "stopping"
)

// enter counts a call in, or turns it away. Who enters leaves.
func (g *GRPC) enter() error {
	select {
	case <-g.stopping:
		return g.leaving()
	default:
	}
	if g.calls.Add(1) > int64(g.Calls) {
		g.calls.Add(-1)
		g.turned.Add(1)
		return later(codes.ResourceExhausted, reasonCalls, fmt.Sprintf("%d calls are open, no more are taken", g.Calls))
	}
	return nil
}

func (g *GRPC) leave() { g.calls.Add(-1) }

func (g *GRPC) leaving() error {
	return later(codes.Unavailable, reasonStopping, "the program ends; send what has no receipt again, the same bytes")
}

// side ends streams that are not ours when Run is to end: those of health and of
// reflection have no end of their own.
func (g *GRPC) side(srv any, rpc grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if info.FullMethod == pb.IngestService_Submit_FullMethodName {
		return handle(srv, rpc) // knows what is still to be answered
	}
	done := make(chan error, 1)
	g.parts.Go(func() { done <- handle(srv, rpc) }) // ends with the stream's context, when we return
	select {
	case err := <-done:
		return err
	case <-g.stopping:
		return g.leaving()
	}
}

// fromMessage returns the canonical encoding of an envelope. Of a field that came
// twice it has the last, as protobuf wants.
func (s *Service) fromMessage(m *pb.Envelope) ([]byte, *refusal) {
	if m == nil {
		return nil, &refusal{ReasonEmpty, "envelope", "envelope: must be given"}
	}
	if n := len(m.ProtoReflect().GetUnknown()); n > 0 {
		return nil, &refusal{ReasonEnvelope, "envelope", fmt.Sprintf("envelope: %d bytes of unknown fields", n)}
	}
	b, _, ref := s.fromProto(m)
	return b, ref
}

// SubmitBatch implements IngestService. See [BatchLimits], but for the size.
func (g *GRPC) SubmitBatch(ctx context.Context, req *pb.SubmitBatchRequest) (*pb.SubmitBatchResponse, error) {
	if err := g.enter(); err != nil {
		return nil, err
	}
	defer g.leave()
	s := g.Ingest
	var ref *refusal
	switch n := len(req.Envelopes); {
	case n == 0:
		ref = errNone
	case n > s.Batch.Records:
		ref = s.tooMany()
	case len(req.ProtoReflect().GetUnknown()) > 0:
		ref = &refusal{ReasonBatch, "request", "request: has unknown fields"}
	}
	if ref != nil {
		s.refuse(turn{door: DoorBatch}, ref, func(answer) {})
		return nil, fault(codes.InvalidArgument, ref)
	}
	items := make([]*item, len(req.Envelopes))
	for i, m := range req.Envelopes {
		envelope, ref := s.fromMessage(m)
		items[i] = s.item(DoorBatch, envelope, ref)
	}
	wait := s.Batch.Wait
	if d, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(d)*3/4) // so that there is time to say what was stored
	}
	receipts, err := s.store(ctx, items, wait, g.stopping)
	if err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return &pb.SubmitBatchResponse{Receipts: receipts}, nil
}

// submission is one call of Submit. It has three parts beside its handler, so that
// none waits for another: one reads, the row stores, one writes. When the handler
// returns, grpc ends its context, and with that all of them.
type submission struct {
	g      *GRPC
	rpc    pb.IngestService_SubmitServer
	row    *row
	window chan struct{} // one for each record without a receipt that is sent
	room   room          // for those not stored

	// since is when the send began that is going on, UnixNano; 0 if none is.
	since atomic.Int64

	mu   sync.Mutex
	keys map[identity.KeyID]bool // of the records so far; guarded by mu
}

// revokedEvery is how often streams' keys are asked about again; maxKeys bounds
// them: a stream with more is a gateway's of many devices, and goes on.
var revokedEvery = 5 * time.Second

const maxKeys = 1024

// revoked reports whether the stream has brought records, and has brought only
// such as are signed by keys that are revoked by now. A gateway's stream for many
// devices must not end because of one.
func (st *submission) revoked() bool {
	if st.g.Revoked == nil {
		return false
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.keys) == 0 || len(st.keys) > maxKeys {
		return false
	}
	for k := range st.keys {
		if !st.g.Revoked(k) {
			return false
		}
	}
	return true
}

// saw notes whose record came.
func (st *submission) saw(k identity.KeyID) {
	if st.g.Revoked == nil {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.keys == nil {
		st.keys = map[identity.KeyID]bool{}
	}
	if len(st.keys) <= maxKeys {
		st.keys[k] = true
	}
}

// Submit implements IngestService.
func (g *GRPC) Submit(rpc pb.IngestService_SubmitServer) error {
	if err := g.enter(); err != nil {
		return err
	}
	defer g.leave()
	ctx, cancel := context.WithCancel(rpc.Context())
	defer cancel()
	st := &submission{g: g, rpc: rpc, row: g.Ingest.newRow(DoorGRPC), window: make(chan struct{}, g.Window), room: newRoom(g.Window, g.WindowBytes)}
	st.row.patience, st.row.halt = g.Patience, g.stopping
	read, wrote := make(chan error, 1), make(chan error, 1)
	g.parts.Go(func() { read <- st.read(ctx) })
	g.parts.Go(func() { st.row.run(ctx) })
	g.parts.Go(func() { wrote <- st.write(ctx) })

	watch := time.NewTicker(g.ReadWait / 4)
	defer watch.Stop()
	look := time.NewTicker(revokedEvery)
	defer look.Stop()
	stopping := g.stopping
	var end error // for when all that is taken has its receipt
	for {
		select {
		case err := <-read:
			read = nil
			if stopping != nil { // else it may have been us who made it end
				end = err
			}
			st.row.close()
		case <-stopping:
			stopping = nil
			if read != nil { // else the gateway has sent all
				end = g.leaving()
			}
			st.row.close()
		case err := <-wrote:
			switch n, why := st.row.rest(); {
			case err != nil:
				return err
			case ctx.Err() != nil:
				return status.FromContextError(ctx.Err()).Err()
			case n > 0 && stopping == nil:
				return g.leaving()
			case n > 0:
				g.log.Warn("ingest: a gRPC stream ends, nothing could be stored for too long", "count", n, "reason", why.reason)
				return later(codes.Unavailable, why.reason, fmt.Sprintf("nothing could be stored for %s, send what has no receipt again: %s", g.Patience, why.text))
			}
			return end
		case <-look.C:
			if st.revoked() {
				g.log.Warn("ingest: a gRPC stream ends, the registry has revoked the keys of its records")
				return status.Error(codes.PermissionDenied, "key_id: the keys of all records of this stream have been revoked")
			}
		case now := <-watch.C:
			if since := st.since.Load(); since != 0 && now.Sub(time.Unix(0, since)) > g.ReadWait {
				g.log.Warn("ingest: a gRPC stream ends, its receipts are not read", "elapsed", g.ReadWait)
				return status.Errorf(codes.DeadlineExceeded, "receipts: not read for %s", g.ReadWait)
			}
		}
	}
}

// read takes records until the gateway has sent all (nil), or cannot go on, or
// the row takes no more.
func (st *submission) read(ctx context.Context) error {
	for {
		select {
		case st.window <- struct{}{}:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
		m, err := st.rpc.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil { // grpc has told the gateway already
			return err
		}
		var envelope []byte
		var ref *refusal
		if n := len(m.ProtoReflect().GetUnknown()); n > 0 {
			ref = &refusal{ReasonEnvelope, "message", fmt.Sprintf("message: %d bytes of unknown fields", n)}
		} else {
			if envelope, ref = st.g.Ingest.fromMessage(m.Envelope); ref == nil {
				st.saw(identity.KeyID(m.Envelope.KeyId))
			}
		}
		it := st.g.Ingest.item(DoorGRPC, envelope, ref)
		it.id = m.Id
		if !it.final {
			// In this order everywhere, so that nobody holds room of all and waits for
			// its own.
			n := len(envelope)
			if err := st.room.take(ctx, n); err != nil {
				return status.FromContextError(err).Err()
			}
			if err := st.g.room.take(ctx, n); err != nil {
				st.room.give(n)
				return status.FromContextError(err).Err()
			}
			it.free = func() {
				st.room.give(n)
				st.g.room.give(n)
			}
		}
		if !st.row.add(it) {
			it.give()
			return nil // the handler knows why
		}
	}
}

// write sends receipts until there are no more.
func (st *submission) write(ctx context.Context) error {
	for {
		it := st.row.next(ctx)
		if it == nil {
			return nil
		}
		st.since.Store(time.Now().UnixNano())
		err := st.rpc.Send(&pb.SubmitResponse{Id: it.id, Receipt: it.answer.receipt()})
		st.since.Store(0)
		if err != nil {
			return err
		}
		<-st.window
	}
}

// itemCost is about what holding a record costs beside its envelope, bytes.
const itemCost = 512

// room bounds records and their bytes. Who comes first is served first.
type room struct {
	records, bytes *semaphore.Weighted
	held           *atomic.Int64
	heldBytes      *atomic.Int64
}

func newRoom(records, bytes int) room {
	return room{semaphore.NewWeighted(int64(records)), semaphore.NewWeighted(int64(bytes)), new(atomic.Int64), new(atomic.Int64)}
}

// take waits for room for a record of n bytes.
func (r room) take(ctx context.Context, n int) error {
	if err := r.records.Acquire(ctx, 1); err != nil {
		return err
	}
	if err := r.bytes.Acquire(ctx, int64(n)+itemCost); err != nil {
		r.records.Release(1)
		return err
	}
	r.held.Add(1)
	r.heldBytes.Add(int64(n) + itemCost)
	return nil
}

func (r room) give(n int) {
	r.held.Add(-1)
	r.heldBytes.Add(-int64(n) - itemCost)
	r.bytes.Release(int64(n) + itemCost)
	r.records.Release(1)
}

// limited closes connections that are too many as soon as they come, so that
// their senders need not wait to learn it.
type limited struct {
	net.Listener
	max     int64
	open    atomic.Int64
	refused atomic.Uint64
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= l.max {
			return &limitedConn{Conn: c, l: l}, nil
		}
		l.open.Add(-1)
		l.refused.Add(1)
		_ = c.Close() // nothing was written to it
	}
}

type limitedConn struct {
	net.Conn
	l    *limited
	once sync.Once
}

func (c *limitedConn) Close() error {
	c.once.Do(func() { c.l.open.Add(-1) })
	return c.Conn.Close()
}
