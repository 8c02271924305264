package signalcontrol

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// inbox stands for ingest. What it answers to its n-th envelope, from 1, is up to
// the test: room's error is returned, answer's error is the receipt's.
type inbox struct {
	room, answer func(n int) error

	mu   sync.Mutex
	sent [][]byte
	from []string
}

func (i *inbox) SendAsync(_ context.Context, d traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, done func(*pb.Receipt, error)) error {
	i.mu.Lock()
	i.sent = append(i.sent, envelope)
	i.from = append(i.from, fmt.Sprintf("%s/%s/%s", d, k, source))
	n := len(i.sent)
	i.mu.Unlock()
	if i.room != nil {
		if err := i.room(n); err != nil {
			return err
		}
	}
	var err error
	if i.answer != nil {
		err = i.answer(n)
	}
	go done(&pb.Receipt{}, err)
	return nil
}

func (i *inbox) envelopes() [][]byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([][]byte(nil), i.sent...)
}

// world is a running signal-control with its surroundings.
type world struct {
	t *testing.T
	*ledgertest.Chain
	*Service
	bus   *bus.Bus
	clock atomic.Int64
	reads atomic.Int64 // of the clock
	stats decided.Stats

	mu     sync.Mutex
	street [][]byte // commands as roadside units get them
	status []*pb.Status
}

// start runs the service with its clock at the test districts' start; every block
// of ledgertest is later.
func start(t *testing.T, in Inbox, ctrl timing.Controller) *world {
	t.Helper()
	d := ledgertest.New("signal-control", 4)
	w := &world{t: t, Chain: d.NewChain(), bus: servicetest.District(t, d.ID)}
	w.clock.Store(ledgertest.Start.UnixNano())
	if in == nil {
		s, err := bus.NewSender(bus.SenderConfig{Bus: w.bus, Timeout: 100 * time.Millisecond, Logger: servicetest.Logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		in = s
	}
	for subject, f := range map[string]func(m *nats.Msg){
		topic.Command(d.ID, "J1"): func(m *nats.Msg) { w.street = append(w.street, m.Data) },
		topic.StatusAll(d.ID): func(m *nats.Msg) {
			var s pb.Status
			if err := proto.Unmarshal(m.Data, &s); err != nil {
				t.Errorf("status: %v", err)
			}
			w.status = append(w.status, &s)
		},
	} {
		stop, err := w.bus.Listen(subject, "", func(m *nats.Msg) {
			w.mu.Lock()
			defer w.mu.Unlock()
			f(m)
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(stop)
	}
	if ctrl.Next == nil {
		var err error
		if ctrl, err = timing.Named("fixed"); err != nil {
			t.Fatal(err)
		}
	}
	state, err := agreed.Open("", &d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	w.Service, err = New(Config{
		CoreConfig: CoreConfig{District: d.ID, Key: d.ControlKey, Policy: "day", PolicyVersion: "1", Controller: ctrl},
		Bus:        w.bus, Inbox: in, State: state, Now: w.now, Logger: servicetest.Logger(t),
		Follow: decided.Config{Bus: w.bus, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators,
			GapWait: 10 * time.Millisecond, Stats: &w.stats, Logger: servicetest.Logger(t)},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	w.wait("the service has read its clock", func() bool { return w.lastDecision.Load() != 0 })
	return w
}

func (w *world) now() time.Time {
	w.reads.Add(1)
	return time.Unix(0, w.clock.Load()).UTC()
}

// publish makes a validator's copy of a block known.
func (w *world) publish(validator uint64, m *pb.Block) {
	w.t.Helper()
	w.publishRaw(validator, wire.EncodeBlock(m))
}

func (w *world) publishRaw(validator uint64, raw []byte) {
	w.t.Helper()
	if err := w.bus.Publish(w.t.Context(), topic.Decision(w.ID, validator), "", raw); err != nil {
		w.t.Fatal(err)
	}
}

func toProto(b *ledgertest.Block) *pb.Block {
	return wire.BlockToProto(&b.Block, b.Batches, b.Verdicts)
}

// decide publishes a block of records and waits until it has been dealt with.
func (w *world) decide(batches ...[]ledgertest.Record) *ledgertest.Block {
	w.t.Helper()
	b := w.Decide(batches...)
	w.publish(1, toProto(b))
	w.wait("block", func() bool { return w.Counters.Blocks.Load() == uint64(b.Header.Height) })
	return b
}

// frame returns a periodic frame of now.
func (w *world) frame(seq uint64) ledgertest.Record { return w.Frame(seq, w.now()) }

// wait polls for what other goroutines do.
func (w *world) wait(what string, cond func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// commands waits for the n commands that the street is to get, checks who signed
// them, and returns them.
func (w *world) commands(n int) []*traffic.Command {
	w.t.Helper()
	var got [][]byte
	w.wait(fmt.Sprint(n, " commands"), func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		got = append([][]byte(nil), w.street...)
		return len(got) >= n
	})
	if len(got) != n {
		w.t.Fatalf("got %d commands on the street, want %d", len(got), n)
	}
	out := make([]*traffic.Command, n)
	for i, raw := range got {
		e, err := identity.ParseEnvelope(raw)
		if err != nil {
			w.t.Fatal(err)
		}
		if pub := w.ControlKey.Public().(ed25519.PublicKey); e.Kind != identity.KindCommand || !e.Verify(pub) {
			w.t.Errorf("command %d: kind %q, not a command signed by signal-control", i, e.Kind)
		}
		if out[i], err = wire.DecodeCommand(e.ContentType, e.Payload); err != nil {
			w.t.Fatal(err)
		}
	}
	return out
}

// checkCounters compares all counters, once they have settled.
func (w *world) checkCounters(sent, sealed, unsealed, stale, refused uint64) {
	w.t.Helper()
	c := &w.Counters
	want := [5]uint64{sent, sealed, unsealed, stale, refused}
	var got [5]uint64
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		got = [5]uint64{c.Sent.Load(), c.Sealed.Load(), c.Unsealed.Load(), c.Stale.Load(), c.Refused.Load()}
		if got == want || time.Now().After(end) {
			break
		}
	}
	if got != want {
		w.t.Errorf("got sent, sealed, unsealed, stale, refused %v, want %v", got, want)
	}
}

// TestServiceCommands: one command for each periodic frame that was agreed, the
// same bytes to the street and to ingest, and junk of every sort changes nothing.
func TestServiceCommands(t *testing.T) {
	in := &inbox{}
	w := start(t, in, timing.Controller{})
	refused := w.frame(77)
	refused.Refused = true
	b := w.Decide([]ledgertest.Record{w.frame(1), refused}, []ledgertest.Record{w.Command(5, 1, w.now())})
	// Before the true block comes what a liar might send in its place.
	w.publishRaw(2, []byte("junk"))
	w.publishRaw(2, nil)
	for _, spoil := range []func(m *pb.Block){
		func(m *pb.Block) { m.Votes = m.Votes[:2] },
		func(m *pb.Block) { m.Header[len(m.Header)-1] ^= 1 },
		func(m *pb.Block) { // a frame that was never agreed, under a header that was
			m.Batches[0] = ledgertest.Batch(w.frame(99))
		},
		func(m *pb.Block) { m.Verdicts[0] ^= 3 }, // lets the refused frame in
		func(m *pb.Block) { m.Batches = nil },
	} {
		m := proto.Clone(toProto(b)).(*pb.Block)
		spoil(m)
		w.publish(2, m)
	}
	w.publish(1, toProto(b))
	w.publish(3, toProto(b)) // another honest copy: no second command
	w.wait("block 1", func() bool { return w.Counters.Blocks.Load() == 1 })
	w.decide([]ledgertest.Record{w.Change(identity.Change{Action: "put", Type: identity.TypeSoftware, ID: "v1", Body: []byte("{}"), Nonce: 1})})
	w.clock.Add(int64(3 * time.Second))
	// An accepted record that we cannot read does not keep us from the others.
	strange := ledgertest.NewRecord(w.DeviceKey, identity.KindFrame, identity.Protobuf, []byte("\xff\xff"))
	event := *mustFrame(t, w.frame(3))
	event.Interval = 0
	w.decide([]ledgertest.Record{w.frame(2), strange, ledgertest.NewRecord(w.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&event))})

	cmds := w.commands(2)
	for i, want := range []struct {
		height uint64
		rests  string
	}{{1, "rsu-J1/1/1"}, {3, "rsu-J1/1/2"}} {
		c := cmds[i]
		if c.Height != want.height || c.RestsOn.String() != want.rests || c.District != w.ID || c.Junction != "J1" {
			t.Errorf("command %d: got height %d, frame %s for %s of %s, want %d, %s", i, c.Height, c.RestsOn, c.Junction, c.District, want.height, want.rests)
		}
	}
	if cmds[1].Seq <= cmds[0].Seq {
		t.Errorf("got seq %d after %d, want it to rise", cmds[1].Seq, cmds[0].Seq)
	}
	if got := cmds[1].Expires.Sub(cmds[1].Issued); got != Validity || !cmds[1].Issued.Equal(w.now()) {
		t.Errorf("got issued %v, valid for %v, want %v and %v", cmds[1].Issued, got, w.now(), Validity)
	}
	w.checkCounters(2, 2, 0, 0, 0)
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, raw := range in.envelopes() {
		if !bytes.Equal(raw, w.street[i]) || in.from[i] != "harbour/command/J1" {
			t.Errorf("command %d: ingest got other bytes than the street, or from %s", i, in.from[i])
		}
	}
	if got := w.stats.Junk.Load(); got != 7 {
		t.Errorf("got %d copies called junk, want 7", got)
	}
}

func mustFrame(t *testing.T, r ledgertest.Record) *traffic.Frame {
	t.Helper()
	c := wire.Candidate(r.Envelope, r.Salt[:])
	if c.Err != nil || c.Frame == nil {
		t.Fatalf("not a frame: %v", c.Err)
	}
	return c.Frame
}

// TestServiceRefusals: stale frames and such that nothing can be decided on are
// counted, and those beside them are decided.
func TestServiceRefusals(t *testing.T) {
	w := start(t, &inbox{}, timing.Controller{})
	w.clock.Add(int64(time.Minute))
	nowhere := *mustFrame(t, w.frame(1))
	nowhere.Junction = "nowhere"
	w.decide([]ledgertest.Record{ledgertest.NewRecord(w.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&nowhere)), w.frame(1)})
	w.decide([]ledgertest.Record{w.Frame(2, w.now().Add(-2001*time.Millisecond))})
	w.decide([]ledgertest.Record{w.frame(3)})
	if cmds := w.commands(2); cmds[1].RestsOn.Seq != 3 {
		t.Errorf("got a command on frame %s, want 3", cmds[1].RestsOn)
	}
	w.checkCounters(2, 2, 0, 1, 1)
}

// TestServiceBadController: what a controller wants and a junction has not is
// never sent.
func TestServiceBadController(t *testing.T) {
	in := &inbox{}
	w := start(t, in, timing.Controller{Name: "broken", Version: "1",
		Next: func(_ *traffic.Junction, _ timing.Rules, m timing.Memory, v timing.View) (timing.Memory, timing.Decision) {
			m.AtMS++
			return m, timing.Decision{Stage: int(m.AtMS), Rule: "more"} // 1, then 2 of 2
		}})
	w.decide([]ledgertest.Record{w.frame(1)})
	w.decide([]ledgertest.Record{w.frame(2)})
	w.commands(1)
	w.checkCounters(1, 1, 0, 0, 1)
	if got := len(in.envelopes()); got != 1 {
		t.Errorf("got %d commands at ingest, want 1", got)
	}
}

// TestServiceUnsealed: what ingest refuses or never answers is counted, and the
// next commands are not kept from it.
func TestServiceUnsealed(t *testing.T) {
	in := &inbox{answer: func(n int) error {
		switch n {
		case 1:
			return kind.Errorf(kind.Invalid, "refused")
		case 2:
			return kind.Errorf(kind.Unavailable, "never answered")
		}
		return nil
	}}
	w := start(t, in, timing.Controller{})
	for seq := range uint64(4) {
		w.decide([]ledgertest.Record{w.frame(seq + 1)})
	}
	w.commands(4)
	w.checkCounters(4, 2, 2, 0, 0)
}

// TestServiceNoRoom: what cannot go into the log does not go to the street, and
// is not taken for a decision: without others, decisions become stale.
func TestServiceNoRoom(t *testing.T) {
	in := &inbox{room: func(n int) error {
		if n == 2 || n >= 4 {
			return kind.Errorf(kind.Unavailable, "no room")
		}
		return nil
	}}
	w := start(t, in, timing.Controller{})
	for seq := range uint64(3) {
		w.decide([]ledgertest.Record{w.frame(seq + 1)})
	}
	if cmds := w.commands(2); cmds[0].RestsOn.Seq != 1 || cmds[1].RestsOn.Seq != 3 {
		t.Errorf("got commands on frames %s and %s, want 1 and 3", cmds[0].RestsOn, cmds[1].RestsOn)
	}
	w.checkCounters(2, 2, 1, 0, 0)
	w.clock.Add(int64(MaxDecisionAge + time.Millisecond))
	w.decide([]ledgertest.Record{w.frame(4)})
	w.wait("stale", w.Stale)
	w.checkCounters(2, 2, 2, 0, 0)
}

// ingest answers on the inbox as answer says, and keeps what it has stored.
type ingest struct {
	mu     sync.Mutex
	asked  int
	stored [][]byte
}

func (w *world) ingest(answer func(asked int) *pb.Receipt) *ingest {
	w.t.Helper()
	in := &ingest{}
	stop, err := w.bus.Listen(topic.Inbox(w.ID, string(identity.KindCommand), "J1"), "", func(m *nats.Msg) {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.asked++
		r := answer(in.asked)
		if r == nil {
			return // silence
		}
		if r.Status == pb.Receipt_STATUS_STORED {
			in.stored = append(in.stored, m.Data)
		}
		raw, err := proto.Marshal(r)
		if err == nil {
			err = m.Respond(raw)
		}
		if err != nil {
			w.t.Error(err)
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(stop)
	return in
}

// TestServiceRetries: with the real sender, busy and silence are tried again, a
// refusal is not, and what is stored is what the street was given, in its order.
func TestServiceRetries(t *testing.T) {
	w := start(t, nil, timing.Controller{})
	w.decide([]ledgertest.Record{w.frame(1)}) // nobody listens yet
	w.commands(1)
	if got := w.Counters.Sealed.Load() + w.Counters.Unsealed.Load(); got != 0 {
		t.Errorf("without ingest: got %d answers, want none yet", got)
	}
	in := w.ingest(func(asked int) *pb.Receipt {
		switch asked {
		case 1:
			return &pb.Receipt{Status: pb.Receipt_STATUS_BUSY}
		case 2:
			return nil
		case 4:
			return &pb.Receipt{Status: pb.Receipt_STATUS_REFUSED, Reason: "size"}
		}
		return &pb.Receipt{Status: pb.Receipt_STATUS_STORED}
	})
	w.checkCounters(1, 1, 0, 0, 0)
	w.decide([]ledgertest.Record{w.frame(2)})
	w.checkCounters(2, 1, 1, 0, 0)
	w.decide([]ledgertest.Record{w.frame(3)})
	w.commands(3)
	w.checkCounters(3, 2, 1, 0, 0)
	in.mu.Lock()
	defer in.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(in.stored) != 2 || !bytes.Equal(in.stored[0], w.street[0]) || !bytes.Equal(in.stored[1], w.street[2]) {
		t.Errorf("got %d stored, want the first and the third command of the street", len(in.stored))
	}
}

// TestServiceStale: it says once that decisions are stale, and once that they are
// back.
func TestServiceStale(t *testing.T) {
	w := start(t, &inbox{}, timing.Controller{})
	statuses := func(n int) string {
		t.Helper()
		var out []string
		w.wait(fmt.Sprint(n, " status messages"), func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			out = out[:0]
			for _, s := range w.status {
				out = append(out, fmt.Sprintf("%s %s %s %d", s.District, s.Device, s.Signal.Mode, s.Signal.Stage))
			}
			return len(out) >= n
		})
		return strings.Join(out, ", ")
	}
	w.decide([]ledgertest.Record{w.frame(1)})
	w.commands(1)
	w.clock.Add(int64(MaxDecisionAge)) // not above it
	// A stale frame is no decision, whatever the block is.
	w.decide([]ledgertest.Record{w.Frame(2, ledgertest.Start.Add(-time.Second))})
	// Only the watch reads the clock now; what it has read before the last time it
	// has also acted on.
	for n := w.reads.Load(); w.reads.Load() < n+2; time.Sleep(2 * time.Millisecond) {
	}
	if w.Stale() {
		t.Error("stale at exactly the allowed age")
	}
	w.clock.Add(1)
	const stale, fresh = "harbour signal-control decisions-stale -1", "harbour signal-control decisions-fresh -1"
	if got := statuses(1); got != stale || !w.Stale() {
		t.Errorf("got %q, stale %v, want %q", got, w.Stale(), stale)
	}
	w.decide([]ledgertest.Record{w.frame(3)})
	if got, want := statuses(2), stale+", "+fresh; got != want || w.Stale() {
		t.Errorf("got %q, stale %v, want %q", got, w.Stale(), want)
	}
	w.clock.Add(int64(time.Hour))
	if got, want := statuses(3), stale+", "+fresh+", "+stale; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	w.checkCounters(2, 2, 0, 1, 0)
}

// TestServiceEarlierBlocks: a block of before the start may have been commanded
// on by the run before, and is passed over.
func TestServiceEarlierBlocks(t *testing.T) {
	w := start(t, &inbox{}, timing.Controller{})
	w.Decide([]ledgertest.Record{w.frame(1)})
	b := w.Blocks[0]
	b.Header.Time = ledgertest.Start // the service's own start
	w.Vote(b)
	w.publish(1, toProto(b))
	w.wait("block 1", func() bool { return w.Counters.Blocks.Load() == 1 })
	w.decide([]ledgertest.Record{w.frame(2)})
	if cmds := w.commands(1); cmds[0].RestsOn.Seq != 2 {
		t.Errorf("got a command on frame %s, want 2", cmds[0].RestsOn)
	}
	if got := w.Counters.Earlier.Load(); got != 1 {
		t.Errorf("got %d earlier blocks, want 1", got)
	}
}

// TestServiceEnds: a follower that fails ends the service with its error.
func TestServiceEnds(t *testing.T) {
	d := ledgertest.New("signal-control", 4)
	b := servicetest.District(t, d.ID)
	ctrl, err := timing.Named("fixed")
	if err != nil {
		t.Fatal(err)
	}
	state, err := agreed.Open("", &d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	c := Config{CoreConfig: CoreConfig{District: d.ID, Key: d.ControlKey, Controller: ctrl}, Bus: b, Inbox: &inbox{}, State: state}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "decide: ") {
		t.Errorf("nobody to follow: got %v, want the follower's error", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.Follow = decided.Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators}
	if s, err = New(c); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("ended before it began: got %v, want none", err)
	}
}

func TestNewRefuses(t *testing.T) {
	d := ledgertest.New("signal-control", 4)
	ctrl, err := timing.Named("fixed")
	if err != nil {
		t.Fatal(err)
	}
	good := CoreConfig{District: d.ID, Key: d.ControlKey, Controller: ctrl}
	if _, err := New(Config{CoreConfig: good}); err == nil || !strings.Contains(err.Error(), "bus, inbox and state") {
		t.Errorf("got %v, want a complaint about bus, inbox and state", err)
	}
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "district") {
		t.Errorf("got %v, want the core's complaint", err)
	}
}
