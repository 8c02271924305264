package roadside

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// inbox is ingest in memory: answer says what becomes of the nth envelope.
type inbox struct {
	mu     sync.Mutex
	answer func(n int, envelope []byte) (*pb.Receipt, error)
	n      int
	stored [][]byte
	line   chan func()
}

func newInbox(answer func(n int, envelope []byte) (*pb.Receipt, error)) *inbox {
	return &inbox{answer: answer}
}

func receipt(envelope []byte) *pb.Receipt {
	salt := sha256.Sum256([]byte("salt"))
	c := ledger.Commit(salt, envelope)
	return &pb.Receipt{Status: pb.Receipt_STATUS_STORED, Salt: salt[:], Commitment: c[:]}
}

func (i *inbox) SendAsync(ctx context.Context, d traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, done func(*pb.Receipt, error)) error {
	if d != district || k != identity.KindFrame || source != "rsu-h0101" {
		return fmt.Errorf("sent to %s/%s/%s", d, k, source)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.line == nil {
		i.line = make(chan func(), 1000)
		go func() { // answers come one after another, later
			for f := range i.line {
				f()
			}
		}()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	i.n++
	r, err := receipt(envelope), error(nil)
	if i.answer != nil {
		r, err = i.answer(i.n, envelope)
	}
	if err != nil && kind.Of(err) != kind.Invalid {
		return err // nothing is taken out of order
	}
	if err == nil && r.Status == pb.Receipt_STATUS_STORED {
		i.stored = append(i.stored, envelope)
	}
	i.line <- func() { done(r, err) }
	return nil
}

type line struct {
	commands chan []byte
	status   chan *pb.Status
	err      error
}

func newLine() *line {
	return &line{commands: make(chan []byte), status: make(chan *pb.Status, 10_000)}
}

func (l *line) Commands(ctx context.Context, f func([]byte)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-l.commands:
			f(e)
		}
	}
}

func (l *line) Status(_ context.Context, s *pb.Status) error {
	l.status <- s
	return l.err
}

// shell runs one unit by ticks that the test gives.
type shell struct {
	*street
	unit  *Unit
	inbox *inbox
	line  *line
	ticks chan time.Time
	stop  context.CancelFunc
	done  chan error
}

func newShell(t *testing.T, in *inbox, change func(*RunConfig)) *shell {
	t.Helper()
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	sh := &shell{street: s, unit: s.units[0], inbox: in, line: newLine(), ticks: make(chan time.Time), done: make(chan error, 1)}
	ctx, stop := context.WithCancel(context.Background())
	sh.stop = stop
	c := RunConfig{Inbox: in, Line: sh.line, Now: s.city.Now, Ticks: sh.ticks, RetryFirst: time.Millisecond, RetryMost: 2 * time.Millisecond}
	if change != nil {
		change(&c)
	}
	go func() { sh.done <- sh.unit.Run(ctx, c) }()
	t.Cleanup(stop)
	return sh
}

func (s *shell) tick(n int) {
	s.t.Helper()
	for range n {
		s.ticks <- s.city.Now()
		if _, err := s.city.Step(); err != nil {
			s.t.Fatal(err)
		}
	}
}

// wait waits until the unit has done what ok asks for.
func (s *shell) wait(what string, ok func(Counters) bool) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(s.unit.Counters()); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: %+v", what, s.unit.Counters())
		}
	}
}

func (s *shell) end() error {
	s.stop()
	return <-s.done
}

func sequences(t *testing.T, envelopes [][]byte) (seqs []uint64) {
	t.Helper()
	for _, b := range envelopes {
		e, err := identity.ParseEnvelope(b)
		if err != nil {
			t.Fatal(err)
		}
		f, err := wire.DecodeFrame(e.ContentType, e.Payload)
		if err != nil {
			t.Fatal(err)
		}
		seqs = append(seqs, f.Seq)
	}
	return seqs
}

// Frames come in their order whatever the network does, each until it is
// stored; who refuses one is not asked again.
func TestRunRetriesInOrder(t *testing.T) {
	wrong := receipt([]byte("another frame"))
	in := newInbox(func(n int, e []byte) (*pb.Receipt, error) {
		switch n % 5 {
		case 1:
			return nil, errors.New("no responders")
		case 2:
			return &pb.Receipt{Status: pb.Receipt_STATUS_BUSY}, kind.Errorf(kind.Unavailable, "busy")
		case 3:
			return &pb.Receipt{Status: pb.Receipt_STATUS_STORED, Salt: wrong.Salt, Commitment: wrong.Commitment}, nil
		}
		return receipt(e), nil
	})
	// What a bad receipt was for may have been stored: it comes twice then.
	s := newShell(t, in, nil)
	s.tick(300)
	c := s.unit.Counters()
	total := c.Frames + c.EventFrames
	s.wait("all frames stored", func(c Counters) bool { return c.Stored == total })
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	in.stored = firsts(in.stored)
	seqs := sequences(t, in.stored)
	if uint64(len(seqs)) != total || seqs[0] != 1 || seqs[len(seqs)-1] != total || !slices.IsSorted(seqs) {
		t.Errorf("stored %v, want 1 to %d in order", seqs, total)
	}
	if c := s.unit.Counters(); c.Frames != 30 || c.EventFrames == 0 || c.SendRetries == 0 || c.BadReceipts == 0 || c.SendDropped != 0 {
		t.Errorf("got %+v; want 30 periodic frames, some at events, retries and bad receipts counted, none dropped", c)
	}
	for _, e := range in.stored {
		s.judge(e)
	}
}

// firsts leaves out what came before.
func firsts(envelopes [][]byte) (out [][]byte) {
	seen := map[string]bool{}
	for _, e := range envelopes {
		if !seen[string(e)] {
			seen[string(e)] = true
			out = append(out, e)
		}
	}
	return out
}

func TestRunCountsRefusedFrames(t *testing.T) {
	in := newInbox(func(n int, e []byte) (*pb.Receipt, error) {
		if n == 2 {
			return &pb.Receipt{Status: pb.Receipt_STATUS_REFUSED, Reason: "test"}, kind.Errorf(kind.Invalid, "test")
		}
		return receipt(e), nil
	})
	s := newShell(t, in, nil)
	s.tick(51)
	s.wait("5 stored", func(c Counters) bool { return c.Stored+c.SendRefused == c.Frames+c.EventFrames && c.Frames == 6 })
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	if c := s.unit.Counters(); c.SendRefused != 1 || c.SendRetries != 0 || slices.Contains(sequences(t, in.stored), 2) {
		t.Errorf("got %+v and %v; want frame 2 refused, and not sent again", c, sequences(t, in.stored))
	}
}

// While ingest is away the queue fills; the oldest without events go first, and
// each is counted. What is left at the end is counted too.
func TestRunBoundsItsQueue(t *testing.T) {
	var away sync.Mutex
	gone := true
	in := newInbox(func(n int, e []byte) (*pb.Receipt, error) {
		away.Lock()
		defer away.Unlock()
		if gone {
			return nil, errors.New("no responders")
		}
		return receipt(e), nil
	})
	store, err := OpenStore(StoreConfig{MaxFrames: 20})
	if err != nil {
		t.Fatal(err)
	}
	s := newShell(t, in, func(c *RunConfig) { c.Store = store })
	s.tick(900)
	s.wait("ticks", func(c Counters) bool { return c.Ticks == 900 })
	c := s.unit.Counters()
	total := c.Frames + c.EventFrames
	// What is on its way is counted when it is answered.
	s.wait("all but 20 dropped", func(c Counters) bool { return c.SendDropped == total-20 })
	if st := s.unit.Status(s.city.Now()).Store; st.Waiting != 20 || st.Events < 10 {
		t.Errorf("got %+v, want 20 frames to wait, most with events", st)
	}
	away.Lock()
	gone = false
	away.Unlock()
	s.wait("the rest stored", func(c Counters) bool { return c.Stored+c.SendDropped == total })
	away.Lock()
	gone = true
	away.Unlock()
	events := 0
	for _, e := range in.stored {
		env, err := identity.ParseEnvelope(e)
		if err != nil {
			t.Fatal(err)
		}
		f, err := wire.DecodeFrame(env.ContentType, env.Payload)
		if err != nil {
			t.Fatal(err)
		}
		if len(f.Events) > 0 {
			events++
		}
	}
	if events < 10 {
		t.Errorf("%d of %d kept frames have events, want most", events, len(in.stored))
	}
}

func TestRunSendsTheRestAtTheEnd(t *testing.T) {
	hold := make(chan struct{})
	in := newInbox(func(n int, e []byte) (*pb.Receipt, error) {
		<-hold
		return receipt(e), nil
	})
	s := newShell(t, in, nil)
	s.tick(50)
	s.wait("ticks", func(c Counters) bool { return c.Ticks == 50 })
	s.stop()
	close(hold)
	if err := <-s.done; err != nil {
		t.Fatal(err)
	}
	c := s.unit.Counters()
	if c.Stored != c.Frames+c.EventFrames || c.Frames != 5 {
		t.Errorf("stored %d of %d frames after the end", c.Stored, c.Frames+c.EventFrames)
	}
}

// What a unit could not send is sent by its next boot, before anything else; a
// command that was obeyed before cannot be replayed.
func TestRunGoesOnAfterARestart(t *testing.T) {
	dir := t.TempDir()
	open := func() *Store {
		s, err := OpenStore(StoreConfig{Dir: dir, Flush: 10 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	store := open()
	away := newInbox(func(int, []byte) (*pb.Receipt, error) { return nil, errors.New("no responders") })
	s := newShell(t, away, func(c *RunConfig) { c.Store, c.Drain = store, time.Millisecond })
	s.tick(200)
	replay := seal("signal-control", s.command("h0101", 2))
	s.line.commands <- replay
	if got := <-s.line.status; got.Result == nil || !got.Result.Applied {
		t.Fatalf("got status %v, want the command applied", got)
	}
	s.tick(100)
	made := func(c Counters) uint64 { return c.Frames + c.EventFrames }
	s.wait("everything written", func(c Counters) bool { return c.Ticks == 300 && store.Stats().Kept == made(c) })
	// kill -9: the folder as it is, whatever the process still meant to do.
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	first := made(s.unit.Counters())
	if err := s.end(); err != nil {
		t.Errorf("the end with frames left: %v, want no error, as they are kept", err)
	}
	if c := s.unit.Counters(); c.SendDropped != 0 || store.Stats().Waiting != int(first) {
		t.Errorf("got %+v and %+v, want %d frames kept", c, store.Stats(), first)
	}

	if err := s.unit.Run(context.Background(), RunConfig{Inbox: away, Line: s.line, Store: open()}); err == nil || !strings.Contains(err.Error(), "boot_epoch: 1, the store holds frame 1/") {
		t.Errorf("the same boot again: got %v, want it refused by its epoch", err)
	}

	dir = copied
	store = open()
	if n := store.Stats().Found; n != first {
		t.Fatalf("found %d frames after the kill, want %d", n, first)
	}
	cfg := s.unit.cfg
	cfg.BootEpoch, cfg.LastCommand = 2, store.LastCommand()
	unit, err := New(s.city.Now(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got := unit.Command(s.city.Now(), replay); got.Applied || !strings.HasPrefix(got.Reason, "seq: ") {
		t.Errorf("the command again: got %+v, want it refused by its sequence", got)
	}
	s.unit, s.inbox, s.ticks = unit, newInbox(nil), make(chan time.Time)
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go func() {
		s.done <- unit.Run(ctx, RunConfig{Inbox: s.inbox, Line: s.line, Now: s.city.Now, Ticks: s.ticks, Store: store})
	}()
	s.tick(50)
	s.wait("everything stored", func(c Counters) bool { return c.Ticks == 50 && c.Stored == first+made(c) })
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	for _, e := range s.inbox.stored {
		s.judge(e) // which wants them in order, and no gap
	}
	if st := store.Stats(); s.frames != len(s.inbox.stored) || st.Waiting != 0 || st.Dropped != 0 {
		t.Errorf("got %d frames and %+v, want nothing left", s.frames, st)
	}
}

func TestRunSaysWhatItCouldNotSend(t *testing.T) {
	in := newInbox(func(n int, e []byte) (*pb.Receipt, error) { return nil, errors.New("no responders") })
	s := newShell(t, in, func(c *RunConfig) { c.Drain = 10 * time.Millisecond })
	s.tick(50)
	s.wait("ticks", func(c Counters) bool { return c.Ticks == 50 })
	err := s.end()
	c := s.unit.Counters()
	if err == nil || !strings.Contains(err.Error(), "were not receipted before the end") || c.SendDropped != c.Frames+c.EventFrames {
		t.Errorf("got %v and %d counted of %d", err, c.SendDropped, c.Frames+c.EventFrames)
	}
}

func TestRunObeysAndSays(t *testing.T) {
	s := newShell(t, newInbox(nil), nil)
	s.tick(200)
	for len(s.line.status) > 0 {
		<-s.line.status
	}
	s.line.commands <- seal("signal-control", s.command("h0101", 2))
	got := <-s.line.status
	if !got.Result.Applied || got.Result.Seq != 1 || got.Junction != "h0101" || got.District != "harbour" || got.Device != "rsu-h0101" {
		t.Errorf("got status %v, want command 1 applied", got)
	}
	s.line.commands <- seal("stranger", s.command("h0101", 2))
	if got = <-s.line.status; got.Result.Applied || !strings.HasPrefix(got.Result.Reason, "key: ") {
		t.Errorf("got status %v, want a refusal by key", got)
	}
	// The tick that falls back, when the change to stage 2 is over, says so.
	s.tick(200)
	s.wait("ticks", func(c Counters) bool { return c.Ticks == 400 && c.Fallbacks == 1 })
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	close(s.line.status)
	for m := range s.line.status {
		got = m
	}
	if got.Result != nil || got.Signal.Mode != string(traffic.Local) {
		t.Errorf("got status %v last, want that it is back on the local plan", got)
	}
	if c := s.unit.Counters(); c.Applied != 1 || c.Refused[RuleKey] != 1 || c.StatusErrors != 0 {
		t.Errorf("got %+v", c)
	}
}

func TestRunEndsWithItsTicks(t *testing.T) {
	s := newShell(t, newInbox(nil), nil)
	s.tick(10)
	close(s.ticks)
	if err := <-s.done; err != nil {
		t.Fatal(err)
	}
	if c := s.unit.Counters(); c.Stored != c.Frames+c.EventFrames {
		t.Errorf("stored %d of %d", c.Stored, c.Frames+c.EventFrames)
	}
}

func TestRunConfigErrors(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	err := s.units[0].Run(context.Background(), RunConfig{Window: -1, Tick: -1, Drain: -1})
	for _, want := range []string{"inbox: must be set", "line: must be set", "window: -1 is negative", "tick: -1ns is negative", "drain: -1ns is negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}

// Over a real server: a command reaches the unit of its junction and no other,
// and the answer is published.
func TestOnBus(t *testing.T) {
	b := servicetest.Connect(t, servicetest.NATS(t))
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	ctx, stop := context.WithCancel(context.Background())
	said := make(chan *pb.Status, 100)
	var all sync.WaitGroup
	all.Add(2)
	go func() {
		defer all.Done()
		if err := b.Subscribe(ctx, topic.StatusAll(district), func(_ string, data []byte) {
			var m pb.Status
			if err := wire.Decode(identity.Protobuf, data, &m); err != nil {
				t.Error(err)
			}
			if m.Result != nil {
				said <- &m
			}
		}); err != nil {
			t.Error(err)
		}
	}()
	go func() {
		defer all.Done()
		if err := s.units[0].Run(ctx, RunConfig{Inbox: newInbox(nil), Line: OnBus(b, district, "h0101"), Now: s.city.Now}); err != nil {
			t.Error(err)
		}
	}()
	// Core messages are lost until both subscriptions stand: send until one is
	// answered, as signal-control does each second.
	var got *pb.Status
	for deadline := time.Now().Add(20 * time.Second); got == nil && time.Now().Before(deadline); {
		if err := b.Send(topic.Command(district, "h0102"), seal("signal-control", s.command("h0101", 1))); err != nil {
			t.Fatal(err)
		}
		if err := b.Send(topic.Command(district, "h0101"), seal("signal-control", s.command("h0101", 2))); err != nil {
			t.Fatal(err)
		}
		select {
		case got = <-said:
		case <-time.After(20 * time.Millisecond):
		}
	}
	stop()
	all.Wait()
	if got == nil || !got.Result.Applied || got.Result.Seq%2 != 0 {
		t.Errorf("got %v, want an even command applied: odd ones went to another junction", got)
	}
}
