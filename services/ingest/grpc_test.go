package ingest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// until waits for something that nobody reports.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// door opens gRPC for s. When the test ends nothing must be left behind.
func door(t testing.TB, s *Service, change func(*GRPCConfig)) *GRPC {
	t.Helper()
	g, stop := closableDoor(t, s, change)
	t.Cleanup(stop)
	return g
}

func closableDoor(t testing.TB, s *Service, change func(*GRPCConfig)) (*GRPC, func()) {
	t.Helper()
	c := GRPCConfig{Ingest: s, Listen: "127.0.0.1:0", Logger: servicetest.Logger(t)}
	if change != nil {
		change(&c)
	}
	g, err := NewGRPC(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	return g, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("GRPC.Run: got %v, want nil", err)
		}
		c := g.Counts()
		if c.Connections != 0 || c.Calls != 0 {
			t.Errorf("got %+v after Run, want no connections, no calls", c)
		}
		// What was on its way to the disk when its stream ended gives its room back
		// with the answer.
		until(t, "room given back", func() bool { c := g.Counts(); return c.Held == 0 && c.HeldBytes == 0 })
	})
}

func dial(t testing.TB, g *GRPC, o ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if len(o) == 0 {
		o = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	}
	c, err := grpc.NewClient("passthrough:///"+g.Addr().String(), o...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // may be closed by the test
	return c
}

func client(t testing.TB, g *GRPC) pb.IngestServiceClient {
	return pb.NewIngestServiceClient(dial(t, g))
}

// lazyWindow is what HTTP/2 lets us send to a lazy client that does not read.
const lazyWindow = 64 << 10

// lazyClient has windows that do not grow.
func lazyClient(t testing.TB, g *GRPC) pb.IngestServiceClient {
	return pb.NewIngestServiceClient(dial(t, g, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(lazyWindow), grpc.WithStaticConnWindowSize(lazyWindow)))
}

func submit(t testing.TB, ctx context.Context, c pb.IngestServiceClient) pb.IngestService_SubmitClient {
	t.Helper()
	s, err := c.Submit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// message returns the protobuf form of a canonical envelope.
func message(t testing.TB, raw []byte) *pb.Envelope {
	t.Helper()
	var m pb.Envelope
	if err := proto.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return &m
}

// receipts reads n receipts, which must come in order from an id on.
func receipts(t testing.TB, s pb.IngestService_SubmitClient, first, n uint64) []*pb.Receipt {
	t.Helper()
	var out []*pb.Receipt
	for i := range n {
		m, err := s.Recv()
		if err != nil {
			t.Fatalf("receipt %d: %v", first+i, err)
		}
		if m.Id != first+i {
			t.Fatalf("got the receipt of %d, want of %d", m.Id, first+i)
		}
		out = append(out, m.Receipt)
	}
	return out
}

// sendFrames sends frames first to last of each device on a stream, which is read
// at the same time, and fails unless all are stored, in order.
func sendFrames(t testing.TB, s pb.IngestService_SubmitClient, devices, first, last int) {
	t.Helper()
	var msgs []*pb.SubmitRequest
	for i := first; i <= last; i++ {
		for d := range devices {
			msgs = append(msgs, &pb.SubmitRequest{Id: uint64(len(msgs) + 1), Envelope: message(t, sign(frame(fmt.Sprint("dev", d), uint64(i), 1)).Marshal())})
		}
	}
	go func() {
		for _, m := range msgs {
			if err := s.Send(m); err != nil {
				t.Errorf("sending: %v", err)
				return
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
	}()
	for i, r := range receipts(t, s, 1, uint64(len(msgs))) {
		if r.Status != pb.Receipt_STATUS_STORED {
			t.Errorf("record %d: got %v, want stored", i+1, r)
		}
	}
	if m, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, %v, want the end", m, err)
	}
}

func TestGRPCReceiptMeansStored(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	st := submit(t, within(t), client(t, door(t, s, nil)))
	for i := range 3 {
		raw := envelope(i + 1)
		if err := st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: message(t, raw)}); err != nil {
			t.Fatal(err)
		}
		checkStored(t, b, raw, receipts(t, st, uint64(i), 1)[0])
	}
	if c := s.Counts().Doors[DoorGRPC]; c != (DoorCounts{Received: 3, Stored: 3}) {
		t.Errorf("got %+v, want 3 received and stored", c)
	}
}

func TestGRPCThousandDevices(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	g := door(t, running(t, b, nil), nil)
	n := 5
	if testing.Short() {
		n = 1
	}
	sendFrames(t, submit(t, within(t), client(t, g)), 1000, 1, n)
	checkOrder(t, b, 1000, n, false)
}

// Several records of each stream are on their way whenever the stream is taken
// away, and the queue is small: nothing is lost, doubled or overtaken, and no
// gateway hears of it.
func TestGRPCOrderThroughFailures(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) {
		c.MaxBatch, c.MaxPending, c.StoreWait, c.MaxDelay = 3, 40, 20*time.Millisecond, time.Millisecond
	})
	c := client(t, door(t, s, nil))
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			storing(t, b, false)
			select {
			case <-time.After(40 * time.Millisecond):
			case <-stop:
			}
			storing(t, b, true)
			select {
			case <-time.After(20 * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	n := 100
	if testing.Short() {
		n = 30
	}
	sendFrames(t, submit(t, within(t), c), 4, 1, n)
	close(stop)
	<-done
	checkOrder(t, b, 4, n, false)
	k := s.Counts()
	if k.Busy[ReasonUnavailable]+k.Busy[ReasonUnknown] == 0 || k.Busy[ReasonQueueFull] == 0 {
		t.Errorf("got %+v, want busy answers because of store and queue: the test has tested nothing", k)
	}
}

// storing takes the subject of INGRESS away, or gives it back.
func storing(t testing.TB, b *bus.Bus, on bool) {
	t.Helper()
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err != nil {
		t.Error(err)
		return
	}
	c := st.CachedInfo().Config
	c.Subjects = []string{"elsewhere"}
	if on {
		c.Subjects = []string{topic.Ingress(district)}
	}
	if _, err := b.JS.UpdateStream(within(t), c); err != nil {
		t.Error(err)
	}
}

// roomFor leaves room in INGRESS for n messages more; all if n is negative.
func roomFor(t testing.TB, b *bus.Bus, n int64) {
	t.Helper()
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	c := st.CachedInfo().Config
	c.MaxMsgs = -1
	if n >= 0 {
		c.MaxMsgs = int64(st.CachedInfo().State.Msgs) + n
	}
	if _, err := b.JS.UpdateStream(within(t), c); err != nil {
		t.Fatal(err)
	}
}

// While the stream is full a gateway gets no receipts; afterwards it gets all.
func TestGRPCWaitsForAFullStream(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.MaxBatch, c.StoreWait = 4, 50*time.Millisecond })
	g := door(t, s, func(c *GRPCConfig) { c.Window = 16 })
	c := client(t, g)
	sendFrames(t, submit(t, within(t), c), 2, 1, 1)
	roomFor(t, b, 0)
	before := s.Counts().Stored
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		sendFrames(t, submit(t, within(t), c), 2, 2, 40)
	}()
	until(t, "busy answers", func() bool { return s.Counts().Busy[ReasonStreamFull] >= 20 })
	if k := g.Counts(); k.Held > 16 || k.Held == 0 {
		t.Errorf("got %d records held, want 1 to 16, the window", k.Held)
	}
	if n := s.Counts().Stored - before; n != 0 {
		t.Errorf("got %d stored in a full stream, want none: the test has tested nothing", n)
	}
	roomFor(t, b, -1)
	<-answered
	checkOrder(t, b, 2, 40, false)
}

// Two rows wait for one record. When it is not stored, neither may go on behind
// it.
func TestNobodyOvertakesARecordThatAnotherBrought(t *testing.T) {
	t.Parallel()
	s, err := New(Config{District: district, Bus: &bus.Bus{}})
	if err != nil {
		t.Fatal(err)
	}
	s.running = true // and no writer
	one, two := s.newRow(DoorGRPC), s.newRow(DoorGRPC)
	var got []answer
	take := func(r *row, n uint64) {
		s.take(envelope(int(n)), turn{own: &r.session, number: n, base: 1}, func(a answer) { got = append(got, a) })
	}
	take(one, 1)
	take(two, 1)
	s.failAll(nil)
	take(two, 2)
	if len(got) != 3 || got[0].reason != ReasonBehind || got[1].reason != ReasonBehind || got[2].reason != ReasonTurn {
		t.Fatalf("got %+v, want both told, and the second row's next record out of turn", got)
	}
	take(two, 1)
	take(two, 2)
	if len(got) != 3 || len(s.queue) != 2 {
		t.Errorf("got %+v, %d queued, want both records taken, in their order", got[3:], len(s.queue))
	}
}

// A row's second record is on its way to us when the first one is given up.
func TestRowDoesNotOvertakeItself(t *testing.T) {
	t.Parallel()
	s, err := New(Config{District: district, Bus: &bus.Bus{}})
	if err != nil {
		t.Fatal(err)
	}
	s.running = true // and no writer
	r := s.newRow(DoorGRPC)
	take := func() func() {
		it, envelope, tn, what := r.step()
		if what != stepSend {
			t.Fatalf("got step %d, want a record to send", what)
		}
		return func() { s.take(envelope, tn, func(a answer) { r.answered(it, a) }) }
	}
	for i := range 3 {
		if !r.add(&item{envelope: envelope(i)}) {
			t.Fatal("not added")
		}
	}
	take()()
	second := take()
	s.failAll(nil)
	second()
	if n, why := r.rest(); n != 3 || why.reason != ReasonTurn || len(s.queue) != 0 {
		t.Fatalf("got %d queued, the newest answer %q, want the second record out of turn", len(s.queue), why.reason)
	}
	if _, _, _, what := r.step(); what != stepPause {
		t.Errorf("got step %d, want the round over", what)
	}
	if pause, ok := r.again(); pause != minPause || !ok {
		t.Errorf("got a pause of %v, %v, want %v and another round", pause, ok, minPause)
	}
	for range 3 {
		take()()
	}
	for i, rec := range s.queue {
		if !bytes.Equal(rec.envelope, envelope(i)) {
			t.Errorf("record %d is queued out of order", i)
		}
	}
}

// A gateway that never reads stops itself and nobody else, and what is kept for
// it is bounded.
func TestGRPCClientThatNeverReads(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	const window, size = 64, 2000
	g := door(t, s, func(c *GRPCConfig) { c.Window, c.Held = window, 128 })
	pad := make([]byte, size)
	ctx, cancel := context.WithCancel(within(t))
	const lazy = 2
	var sent atomic.Int64
	var senders sync.WaitGroup
	for i := range lazy {
		st := submit(t, ctx, lazyClient(t, g))
		senders.Go(func() {
			for n := 0; ; n++ {
				// What they bring is not a frame, which only validation would notice.
				e := sign(append(fmt.Appendf(nil, "%d %d ", i, n), pad...))
				if st.Send(&pb.SubmitRequest{Id: uint64(n), Envelope: message(t, e.Marshal())}) != nil {
					return
				}
				sent.Add(1)
			}
		})
	}
	// Each can be ahead by its window, and by what both ends' transports hold of
	// records and of receipts, which have more than 64 bytes; grpc has buffers of
	// 64 KiB beside the windows.
	bound := int64(lazy * (window + (streamWindow+(128<<10))/size + (lazyWindow+(128<<10))/64))
	last := int64(-1)
	until(t, "senders slowed down", func() bool {
		n := sent.Load()
		defer func() { last = n }()
		time.Sleep(200 * time.Millisecond)
		return n == last && n > 0
	})
	if n := sent.Load(); n > bound {
		t.Errorf("got %d records sent without a receipt read, want at most %d", n, bound)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	sendFrames(t, submit(t, within(t), client(t, g)), 10, 1, 20)
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("%d records sent by %d that never read; heap %d KiB, then %d KiB; %+v", last, lazy, before.HeapAlloc>>10, after.HeapAlloc>>10, g.Counts())
	if n := sent.Load(); n > bound {
		t.Errorf("got %d records sent without a receipt read, want at most %d", n, bound)
	}
	// None of them holds room of all: what they have sent is stored.
	until(t, "room given back", func() bool { return g.Counts().Held == 0 })
	cancel()
	senders.Wait()
	until(t, "calls ended", func() bool { return g.Counts().Calls == 0 })
}

func TestGRPCEndsAStreamThatIsNotRead(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	g := door(t, s, func(c *GRPCConfig) { c.ReadWait = 50 * time.Millisecond })
	st := submit(t, within(t), lazyClient(t, g))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := 0; st.Send(&pb.SubmitRequest{Id: uint64(i)}) == nil; i++ { // refused, each with its receipt
		}
	}()
	until(t, "call begun", func() bool { return s.Counts().Doors[DoorGRPC].Received > 0 })
	until(t, "call ended", func() bool { return g.Counts().Calls == 0 })
	for {
		if _, err := st.Recv(); err != nil {
			if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "receipts: not read for 50ms") {
				t.Errorf("got %v, want deadline exceeded", err)
			}
			<-sent
			return
		}
	}
}

func TestGRPCRefusesRecordByRecord(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	c := client(t, door(t, s, nil))
	with := func(change func(*pb.Envelope)) *pb.SubmitRequest {
		m := message(t, envelope(1))
		change(m)
		return &pb.SubmitRequest{Envelope: m}
	}
	unknown := protowire.AppendTag(nil, 99, protowire.VarintType)
	unknown = append(unknown, 1)
	bad := []struct {
		name, reason string
		m            *pb.SubmitRequest
	}{
		{"no envelope", "envelope: must be given", &pb.SubmitRequest{}},
		{"empty envelope", `kind "": unknown`, &pb.SubmitRequest{Envelope: &pb.Envelope{}}},
		{"unknown kind", `kind "gossip": unknown`, with(func(m *pb.Envelope) { m.Kind = "gossip" })},
		{"short signature", "signature: must be 64 bytes, has 3", with(func(m *pb.Envelope) { m.Signature = []byte{1, 2, 3} })},
		{"too large", "body: 262", with(func(m *pb.Envelope) { m.Payload = make([]byte, identity.MaxEnvelope) })},
		{"unknown field of the envelope", "envelope: 3 bytes of unknown fields", with(func(m *pb.Envelope) { m.ProtoReflect().SetUnknown(unknown) })},
		{"unknown field of the message", "message: 3 bytes of unknown fields", func() *pb.SubmitRequest {
			m := with(func(*pb.Envelope) {})
			m.ProtoReflect().SetUnknown(unknown)
			return m
		}()},
	}
	st := submit(t, within(t), c)
	for i, x := range bad {
		x.m.Id = uint64(i)
		if err := st.Send(x.m); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Send(&pb.SubmitRequest{Id: uint64(len(bad)), Envelope: message(t, envelope(1))}); err != nil {
		t.Fatal(err)
	}
	got := receipts(t, st, 0, uint64(len(bad)+1))
	for i, x := range bad {
		if got[i].Status != pb.Receipt_STATUS_REFUSED || !strings.HasPrefix(got[i].Reason, x.reason) {
			t.Errorf("%s: got %v, want refused, %s", x.name, got[i], x.reason)
		}
	}
	checkStored(t, b, envelope(1), got[len(bad)])
	if k := s.Counts().Doors[DoorGRPC]; k != (DoorCounts{Received: uint64(len(bad)) + 1, Stored: 1, Refused: uint64(len(bad))}) {
		t.Errorf("got %+v, want %d refused, 1 stored", k, len(bad))
	}
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }
func (rawCodec) Name() string                    { return "proto" }

// violation returns the first field violation of a status.
func violation(err error) *errdetails.BadRequest_FieldViolation {
	for _, d := range status.Convert(err).Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			return b.FieldViolations[0]
		}
	}
	return nil
}

// A message that cannot be taken ends the stream.
func TestGRPCMessagesThatEndTheStream(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	g := door(t, running(t, b, nil), func(c *GRPCConfig) { c.MaxMessage = 300_000 })
	conn := dial(t, g)
	good, err := proto.Marshal(&pb.SubmitRequest{Id: 7, Envelope: message(t, envelope(1))})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		raw  []byte
		code codes.Code
		text string
	}{
		{"too large", make([]byte, 300_001), codes.ResourceExhausted, "larger than max (300001 vs. 300000)"},
		{"not protobuf", []byte("\xff\xff"), codes.Internal, "failed to unmarshal the received message"},
	} {
		t.Run(x.name, func(t *testing.T) {
			st, err := conn.NewStream(within(t), &pb.IngestService_ServiceDesc.Streams[0], pb.IngestService_Submit_FullMethodName, grpc.ForceCodec(rawCodec{}))
			if err != nil {
				t.Fatal(err)
			}
			if err := st.SendMsg(&good); err != nil {
				t.Fatal(err)
			}
			var raw []byte
			if err := st.RecvMsg(&raw); err != nil {
				t.Fatal(err)
			}
			var m pb.SubmitResponse
			if err := proto.Unmarshal(raw, &m); err != nil || m.Id != 7 {
				t.Fatalf("got %v, %v, want the receipt of 7", &m, err)
			}
			checkStored(t, b, envelope(1), m.Receipt)
			if err := st.SendMsg(&x.raw); err != nil {
				t.Fatal(err)
			}
			if err = st.RecvMsg(&raw); status.Code(err) != x.code || !strings.Contains(err.Error(), x.text) {
				t.Errorf("got %v, want %v, %s", err, x.code, x.text)
			}
		})
	}
}

// A gateway goes in the middle. Whatever it has a receipt for is stored once;
// nothing is left behind; and all that it sends again is stored once.
func TestGRPCCancelInTheMiddle(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.MaxBatch = 5 })
	g := door(t, s, nil)
	c := client(t, g)
	const n = 400
	ctx, cancel := context.WithCancel(within(t))
	st := submit(t, ctx, c)
	go func() {
		for i := 1; i <= n; i++ {
			if st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: message(t, sign(frame("dev0", uint64(i), 1)).Marshal())}) != nil {
				return
			}
		}
	}()
	got := receipts(t, st, 1, 60)
	cancel()
	for {
		m, err := st.Recv()
		if err != nil {
			break
		}
		got = append(got, m.Receipt)
	}
	until(t, "call ended, all answered", func() bool { return g.Counts().Calls == 0 && g.Counts().Held == 0 && s.Counts().Pending == 0 })
	if len(got) == n {
		t.Fatal("got all receipts: the test has tested nothing")
	}
	salts := map[string]int{}
	for _, rec := range stream(t, b) {
		salts[string(rec.Salt)]++
	}
	for i, r := range got {
		if salts[string(r.Salt)] != 1 {
			t.Errorf("record %d has a receipt and is in the stream %d times, want once", i+1, salts[string(r.Salt)])
		}
	}
	t.Logf("%d receipts, %d stored", len(got), len(salts))
	sendFrames(t, submit(t, within(t), c), 1, 1, n)
	checkOrder(t, b, 1, n, false)
}

func TestGRPCTwoGatewaysWithTheSameFrames(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	g := door(t, running(t, b, func(c *Config) { c.MaxBatch = 4 }), nil)
	const n = 100
	got := make([][]*pb.Receipt, 2)
	var wg sync.WaitGroup
	for i := range got {
		st := submit(t, within(t), client(t, g))
		wg.Go(func() {
			for k := range n {
				if err := st.Send(&pb.SubmitRequest{Id: uint64(k), Envelope: message(t, sign(frame("dev0", uint64(k+1), 1)).Marshal())}); err != nil {
					t.Error(err)
				}
			}
			got[i] = receipts(t, st, 0, n)
		})
	}
	wg.Wait()
	for k := range n {
		if !proto.Equal(got[0][k], got[1][k]) {
			t.Errorf("frame %d: got %v and %v, want the same receipt", k+1, got[0][k], got[1][k])
		}
	}
	checkOrder(t, b, 1, n, false)
}

// When nothing can be stored for too long, streams end and say why.
func TestGRPCLosesPatience(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.StoreWait = 20 * time.Millisecond })
	g := door(t, s, func(c *GRPCConfig) { c.Patience = 50 * time.Millisecond })
	storing(t, b, false)
	st := submit(t, within(t), client(t, g))
	for i := range 3 {
		if err := st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: message(t, envelope(i))}); err != nil {
			t.Fatal(err)
		}
	}
	m, err := st.Recv()
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "nothing could be stored for 50ms, send what has no receipt again: ") {
		t.Fatalf("got %v, %v, want unavailable", m, err)
	}
	details := status.Convert(err).Details()
	if len(details) != 2 || details[1].(*errdetails.RetryInfo).RetryDelay.AsDuration() != time.Second {
		t.Errorf("got %v, want a reason and when to come again", details)
	}
	storing(t, b, true)
}

// A door that closes gives receipts for what is on its way.
func TestGRPCDrains(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	g, stop := closableDoor(t, s, func(c *GRPCConfig) { c.Drain = 20 * time.Second })
	st := submit(t, within(t), client(t, g))
	const n = 200
	for i := range n {
		if err := st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: message(t, envelope(i))}); err != nil {
			t.Fatal(err)
		}
	}
	got := receipts(t, st, 0, 1) // so that the stream is there
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	for {
		m, err := st.Recv()
		if err != nil {
			// Records that were not read yet may be left; then the status says so.
			if code := status.Code(err); code != codes.Unavailable {
				t.Errorf("got %v, want unavailable", err)
			}
			break
		}
		got = append(got, m.Receipt)
	}
	<-stopped
	if k := s.Counts(); k.Stored != uint64(len(got)) || k.Pending != 0 {
		t.Errorf("got %d receipts for %+v, want one for each stored", len(got), k)
	}
}

// What is held because nothing can be stored does not hold up the end.
func TestGRPCDrainsWhileBusy(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.StoreWait = 20 * time.Millisecond })
	g, stop := closableDoor(t, s, func(c *GRPCConfig) { c.Drain, c.Patience = 20*time.Second, time.Hour })
	storing(t, b, false)
	defer storing(t, b, true)
	conn := dial(t, g)
	watch, err := healthpb.NewHealthClient(conn).Watch(within(t), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil {
		t.Fatalf("got %v, %v, want the health", m, err)
	}
	c := pb.NewIngestServiceClient(conn)
	st := submit(t, within(t), c)
	if err := st.Send(&pb.SubmitRequest{Envelope: message(t, envelope(1))}); err != nil {
		t.Fatal(err)
	}
	batch := make(chan *pb.SubmitBatchResponse, 1)
	go func() {
		r, err := c.SubmitBatch(within(t), &pb.SubmitBatchRequest{Envelopes: []*pb.Envelope{message(t, envelope(2))}})
		if err != nil {
			t.Error(err)
		}
		batch <- r
	}()
	until(t, "both busy", func() bool {
		d := s.Counts().Doors
		return d[DoorGRPC].Busy > 0 && d[DoorBatch].Busy > 0
	})
	began := time.Now()
	go stop()
	if m, err := st.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the program ends") {
		t.Errorf("got %v, %v, want unavailable", m, err)
	}
	if r := <-batch; len(r.GetReceipts()) != 1 || r.Receipts[0].Status != pb.Receipt_STATUS_BUSY {
		t.Errorf("got %v, want busy", r)
	}
	stop()
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("got the end after %v, want it before calls are cut off", d)
	}
}

func TestGRPCTooManyCallsAndConnections(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	g := door(t, running(t, b, nil), func(c *GRPCConfig) { c.Calls, c.Connections = 2, 3 })
	c := client(t, g)
	ctx, cancel := context.WithCancel(within(t))
	for i := range 2 {
		st := submit(t, ctx, c)
		if err := st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: message(t, envelope(i))}); err != nil {
			t.Fatal(err)
		}
		receipts(t, st, uint64(i), 1)
	}
	st := submit(t, within(t), c)
	if _, err := st.Recv(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "2 calls are open, no more are taken") {
		t.Errorf("got %v, want resource exhausted", err)
	}
	if _, err := c.SubmitBatch(within(t), &pb.SubmitBatchRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v, want resource exhausted", err)
	}
	if k := g.Counts(); k.Calls != 2 || k.CallsRefused != 2 {
		t.Errorf("got %+v, want 2 calls open, 2 refused", k)
	}
	cancel()
	until(t, "calls ended", func() bool { return g.Counts().Calls == 0 })

	for range 2 {
		conn, err := net.Dial("tcp", g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() }) // nothing is written to it
	}
	until(t, "three connections", func() bool { return g.Counts().Connections == 3 })
	const crowd = 500
	for range crowd {
		conn, err := net.Dial("tcp", g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("got %d bytes, %v, want the connection closed", n, err)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if k := g.Counts(); k.ConnectionsRefused != crowd {
		t.Errorf("got %+v, want %d connections refused", k, crowd)
	}
	if _, err := c.SubmitBatch(within(t), &pb.SubmitBatchRequest{Envelopes: []*pb.Envelope{message(t, envelope(9))}}); err != nil {
		t.Errorf("who is connected: got %v, want an answer", err)
	}
}

func TestGRPCHealthAndReflection(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	g := door(t, running(t, b, nil), nil)
	conn := dial(t, g)
	until(t, "serving", func() bool {
		r, err := healthpb.NewHealthClient(conn).Check(within(t), &healthpb.HealthCheckRequest{Service: "stopline.v1.IngestService"})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status == healthpb.HealthCheckResponse_SERVING
	})
	st, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	if m, err := st.Recv(); err != nil || !strings.Contains(m.String(), "stopline.v1.IngestService") {
		t.Errorf("got %v, %v, want the service", m, err)
	}
	_ = conn.Close()
}

// Not before records are taken.
func TestGRPCHealthBeforeIngest(t *testing.T) {
	t.Parallel()
	s, err := New(Config{District: district, Bus: &bus.Bus{}})
	if err != nil {
		t.Fatal(err)
	}
	g := door(t, s, func(c *GRPCConfig) { c.Patience = 20 * time.Millisecond })
	conn := dial(t, g)
	r, err := healthpb.NewHealthClient(conn).Check(within(t), &healthpb.HealthCheckRequest{})
	if err != nil || r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("got %v, %v, want not serving", r, err)
	}
	st := submit(t, within(t), pb.NewIngestServiceClient(conn))
	if err := st.Send(&pb.SubmitRequest{Envelope: message(t, envelope(1))}); err != nil {
		t.Fatal(err)
	}
	if m, err := st.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "ingest is not running") {
		t.Errorf("got %v, %v, want unavailable", m, err)
	}
}

// certificates makes a CA and a certificate that it has signed, in files.
func certificates(t *testing.T) (caFile, certFile, keyFile string) {
	t.Helper()
	dir := t.TempDir()
	put := func(name, kind string, b []byte) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := put("cert.pem", "CERTIFICATE", der)
	return cert, cert, put("key.pem", "PRIVATE KEY", k)
}

func TestGRPCWithTLS(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	ca, cert, key := certificates(t)
	g := door(t, running(t, b, nil), func(c *GRPCConfig) { c.ClientCAFile, c.CertFile, c.KeyFile = ca, cert, key })
	own, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	pemBytes, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	roots.AppendCertsFromPEM(pemBytes)
	for _, x := range []struct {
		name  string
		creds credentials.TransportCredentials
		ok    bool
	}{
		{"known gateway", credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "127.0.0.1", Certificates: []tls.Certificate{own}}), true},
		{"no certificate", credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}), false},
		{"no TLS", insecure.NewCredentials(), false},
	} {
		t.Run(x.name, func(t *testing.T) {
			conn := dial(t, g, grpc.WithTransportCredentials(x.creds))
			r, err := pb.NewIngestServiceClient(conn).SubmitBatch(within(t), &pb.SubmitBatchRequest{Envelopes: []*pb.Envelope{message(t, envelope(1))}})
			switch {
			case x.ok && err != nil:
				t.Errorf("got %v, want a receipt", err)
			case x.ok:
				checkStored(t, b, envelope(1), r.Receipts[0])
			case status.Code(err) != codes.Unavailable:
				t.Errorf("got %v, %v, want unavailable", r, err)
			}
			_ = conn.Close()
		})
	}
}

func TestGRPCConfig(t *testing.T) {
	t.Parallel()
	_, err := NewGRPC(GRPCConfig{CertFile: "x", Window: -1, MaxMessage: 100, Drain: -1})
	for _, want := range []string{
		"GRPC.Ingest: must be given", "GRPC.Listen: must not be empty", "GRPC.CertFile, KeyFile: must be given both",
		"GRPC.Window: -1, must be 1 to", "GRPC.MaxMessage: 100, must be 262656 to", "GRPC.Drain: -1",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %s", err, want)
		}
	}
	s, err := New(Config{District: district, Bus: &bus.Bus{}})
	if err != nil {
		t.Fatal(err)
	}
	ca, cert, key := certificates(t)
	for _, x := range []struct {
		c    GRPCConfig
		want string
	}{
		{GRPCConfig{ClientCAFile: ca}, "GRPC.ClientCAFile: needs CertFile"},
		{GRPCConfig{CertFile: cert, KeyFile: cert}, "GRPC.CertFile, KeyFile: "},
		{GRPCConfig{CertFile: cert, KeyFile: key, ClientCAFile: key}, "has no PEM certificate"},
		{GRPCConfig{CertFile: cert, KeyFile: key, ClientCAFile: "none"}, "GRPC.ClientCAFile: open none"},
	} {
		x.c.Ingest, x.c.Listen = s, "127.0.0.1:0"
		if g, err := NewGRPC(x.c); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("got %v, %v, want %s", g, err, x.want)
		}
	}
}
