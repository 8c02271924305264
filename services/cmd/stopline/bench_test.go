//go:build unix

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

// Figures of the benchmarks.
const (
	// benchJunctions is what a district must have for the target of 1,250 frames
	// a second at its natural rate, one a second from each.
	benchJunctions = 1250
	benchWindow    = 1000 // frames sent and not yet agreed, where nothing else holds them back
	benchStuck     = time.Minute
)

// BenchmarkPipeline measures a district from its inbox to its sealed
// checkpoints, in one process: every service with a connection of its own, every
// sync a real one. Each frame is signed by its own unit and answered by a
// command, which is signed, sent, agreed and sealed too, but not counted.
//
// The frames are made before the clock runs, by the built-in city of 1,250
// junctions with a roadside unit at each: on the street they are other people's
// computers. The district's clock is the city's: it is moved to each frame's time
// when that is sent, so that ages and windows are those of 1,250 junctions with
// one frame a second, however fast this machine is.
//
// A frame counts as agreed when a follower of the decisions has verified its
// block, and as sealed when a published checkpoint covers the leaf with the
// commitment in its receipt. Latencies are by our own clock, from sending.
//
// First frames come at the natural rate, 1,250 a second (figures that begin with
// at-1250/s); then as fast as they are taken, with 1,000 of them on their way:
//
//	frames/s, readings/s    sealed
//	cpu-s/1000frames        of the process, street excluded, commands included
//	cores                   used
//	of-verify-%             of the rate at which all cores could check five
//	                        signatures a frame, in batches, and do nothing else
//	of-cpu-verify-%         the same of the cores that this run was given
//	views                   leaders that were replaced
func BenchmarkPipeline(b *testing.B) {
	for b.Loop() {
		p := newBench(b, 28)
		p.send(2*time.Second, benchJunctions) // warm
		p.report("at-1250/s-", p.send(5*time.Second, benchJunctions))
		p.settle()
		p.send(time.Second, 0) // fills the window
		s := p.send(6*time.Second, 0)
		p.settle()
		p.report("", s)
		check := p.verifyCost()
		n := float64(len(p.sealedIn(s)))
		b.ReportMetric(check*1e6, "check-µs")
		b.ReportMetric(100*5*check*n/s.wall()/float64(runtime.GOMAXPROCS(0)), "of-verify-%")
		b.ReportMetric(100*5*check*n/s.cpu(), "of-cpu-verify-%")
		p.end()
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkOverload offers a district five times what it can take for five
// seconds, without a window, and shows what becomes of it:
//
//	capacity-frames/s   measured just before
//	offered-frames/s    for five seconds
//	busy                answers by which senders were told to wait
//	backlog             frames with a receipt and not agreed, at the worst
//	drained-s           from the end of the overload until all is sealed
//	after-…-ms          latencies at 625 frames/s right after
//	lost, views         must be 0
func BenchmarkOverload(b *testing.B) {
	for b.Loop() {
		p := newBench(b, 80)
		p.send(2*time.Second, 0)
		s := p.send(3*time.Second, 0)
		p.settle()
		capacity := float64(len(p.sealedIn(s))) / s.wall()
		busy := p.busy()
		stop := make(chan struct{})
		var watch sync.WaitGroup
		backlog := 0
		watch.Go(func() {
			for {
				p.m.mu.Lock()
				backlog = max(backlog, p.m.stored-p.m.agreed)
				p.m.mu.Unlock()
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		s = p.send(5*time.Second, int(5*capacity))
		p.settle()
		drained := time.Since(s.until.at)
		close(stop)
		watch.Wait()
		b.ReportMetric(capacity, "capacity-frames/s")
		b.ReportMetric(float64(s.to-s.from)/s.wall(), "offered-frames/s")
		b.ReportMetric(float64(p.busy()-busy), "busy")
		b.ReportMetric(float64(backlog), "backlog")
		b.ReportMetric(drained.Seconds(), "drained-s")
		p.report("after-", p.send(5*time.Second, benchJunctions/2))
		p.settle()
		b.ReportMetric(float64(p.next-p.m.count(&p.m.sealed)), "lost")
		p.end()
	}
	b.ReportMetric(0, "ns/op")
}

// benchFrame is one frame that a unit of the city has signed.
type benchFrame struct {
	at       time.Time // simulated
	device   traffic.DeviceID
	envelope []byte
	readings int

	// By our clock; guarded by the meter.
	sent, agreed, sealed time.Time
	index                uint64
}

// bench is a district that runs, and frames to send to it.
type bench struct {
	b      *testing.B
	l      *local
	clock  *simClock
	m      *meter
	frames []benchFrame
	next   int // frame to send
	ctx    context.Context
	stop   context.CancelFunc
	done   chan struct{}
	err    error // why the services ended; read after done
	unseal func()
}

// newBench makes a district, lets its city run for so many seconds, and starts
// the services.
func newBench(b *testing.B, seconds int) *bench {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	rules, err := timing.RulesNamed("field")
	must(err)
	ctrl, err := timing.Named("actuated")
	must(err)
	c, err := sim.New(sim.Config{Seed: 1, Junctions: benchJunctions, FlatDemand: true})
	must(err)
	w := cityWorld{c}
	var defs []*traffic.Junction
	for _, j := range w.Junctions() {
		defs = append(defs, rules.Apply(j))
	}
	p := &bench{b: b, clock: newSimClock(w.Now()), done: make(chan struct{})}
	dir, err := os.MkdirTemp(b.TempDir(), "")
	must(err)
	p.l, err = newLocal(b.Context(), localOptions{
		dir: dir, now: p.clock.now, log: slog.New(slog.NewTextHandler(benchLog{b}, &slog.HandlerOptions{Level: slog.LevelError})),
		open: district.Options{ID: "bench", Junctions: defs, Created: p.clock.now().Add(-time.Second), PolicyName: "bench",
			Policy: identity.Policy{Version: "1", Controller: ctrl.Name, Rules: rules.Name}},
		core: signalcontrol.CoreConfig{District: "bench", Policy: "bench", PolicyVersion: "1", Controller: ctrl, Rules: rules},
	})
	must(err)
	began := time.Now()
	p.frames = benchFrames(b, p.l, w, defs, rules, seconds)
	b.Logf("the city made %d frames, %v each", len(p.frames), (time.Since(began) / time.Duration(len(p.frames))).Round(time.Microsecond))
	must(w.Close())
	p.m = newMeter(len(p.frames))
	p.l.street.onBlock = p.m.block
	p.unseal, err = p.l.street.bus.Listen(topic.Seal("bench"), "", p.m.seal)
	must(err)
	p.ctx, p.stop = context.WithCancel(context.Background())
	go func() {
		defer close(p.done)
		p.err = p.l.run(p.ctx)
	}()
	ready, cancel := context.WithTimeout(p.ctx, readyWait)
	defer cancel()
	must(p.l.ready(ready, p.done))
	runtime.GC() // what starting left
	return p
}

// end stops the district.
func (p *bench) end() {
	v := p.l.validation.Counts()
	if v.Quarantined > 0 {
		p.b.Errorf("%d records were quarantined: %v", v.Quarantined, v.ByRule)
	}
	var views uint64
	for _, n := range p.l.validators {
		views = max(views, n.Stats().View)
	}
	p.b.ReportMetric(float64(views), "views")
	p.b.ReportMetric(float64(peakRSSMB()), "peak-rss-MB")
	c := &p.l.control.Counters
	p.b.Logf("%d frames sent, %d commands, of which sealed %d and not %d; frames too old to command on %d, refused %d; blocks %d; busy %v", p.next,
		c.Sent.Load(), c.Sealed.Load(), c.Unsealed.Load(), c.Stale.Load(), c.Refused.Load(), p.l.validators[0].Stats().Blocks, p.l.ingest.Counts().Busy)
	p.unseal()
	p.stop()
	<-p.done
	p.l.close()
	if p.err != nil {
		p.b.Errorf("services: %v", p.err)
	}
}

// span is one time of sending.
type span struct {
	from, to     int // frames
	began, until usage
}

func (s span) wall() float64 { return s.until.at.Sub(s.began.at).Seconds() }
func (s span) cpu() float64  { return (s.until.cpu - s.began.cpu).Seconds() }

// send sends frames for a time, so many a second; 0: as many as the window lets.
func (p *bench) send(length time.Duration, rate int) span {
	p.b.Helper()
	s := span{from: p.next, began: used()}
	for i := 0; time.Since(s.began.at) < length; i++ {
		if p.next == len(p.frames) {
			p.b.Fatalf("all %d frames are sent: this machine needs a city that runs for longer", len(p.frames))
		}
		if rate > 0 {
			// Ten times in a millisecond it makes no difference; the scheduler wants more.
			if early := time.Until(s.began.at.Add(time.Duration(i) * time.Second / time.Duration(rate))); early > 0 {
				time.Sleep(early)
			}
		} else if !p.m.room(benchWindow, benchStuck) {
			p.b.Fatalf("nothing is agreed any more: %s", p.state())
		}
		f := &p.frames[p.next]
		p.next++
		p.clock.set(f.at)
		p.m.mu.Lock()
		f.sent = time.Now()
		p.m.sent++
		p.m.mu.Unlock()
		if err := p.l.street.sender.SendAsync(p.ctx, "bench", identity.KindFrame, string(f.device), f.envelope,
			func(r *pb.Receipt, err error) { p.m.receipt(f, r, err) }); err != nil {
			p.b.Fatal(err)
		}
	}
	s.until, s.to = used(), p.next
	return s
}

func (p *bench) state() string {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	return fmt.Sprintf("of %d frames sent %d are stored, %d agreed, %d sealed; receipts refused: %v; validation: %+v",
		p.next, p.m.stored, p.m.agreed, p.m.sealed, p.m.refused, p.l.validation.Counts())
}

// settle waits until every frame is sealed.
func (p *bench) settle() {
	p.b.Helper()
	for end := time.Now().Add(benchStuck); p.m.count(&p.m.sealed) < p.next; {
		select {
		case <-p.done:
			p.b.Fatalf("the services ended: %v", p.err)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(end) {
			p.b.Fatalf("not all is sealed after %v: %s", benchStuck, p.state())
		}
	}
}

func (p *bench) busy() (n uint64) {
	for _, v := range p.l.ingest.Counts().Busy {
		n += v
	}
	return n
}

// sealedIn returns the frames that were sealed in a time, whenever they were
// sent.
func (p *bench) sealedIn(s span) (out []*benchFrame) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	for i := range p.frames[:p.next] {
		if f := &p.frames[i]; f.sealed.After(s.began.at) && !f.sealed.After(s.until.at) {
			out = append(out, f)
		}
	}
	return out
}

func (p *bench) report(prefix string, s span) {
	p.b.Helper()
	frames := p.sealedIn(s)
	if len(frames) == 0 {
		p.b.Fatalf("nothing was sealed while measuring: %s", p.state())
	}
	readings := 0
	var agreed, sealed []time.Duration
	for _, f := range frames {
		readings += f.readings
		agreed = append(agreed, f.agreed.Sub(f.sent))
		sealed = append(sealed, f.sealed.Sub(f.sent))
	}
	n := float64(len(frames))
	p.b.ReportMetric(n/s.wall(), prefix+"frames/s")
	p.b.ReportMetric(float64(readings)/s.wall(), prefix+"readings/s")
	p.b.ReportMetric(quantileMS(agreed, .5), prefix+"agreed-p50-ms")
	p.b.ReportMetric(quantileMS(agreed, .99), prefix+"agreed-p99-ms")
	p.b.ReportMetric(quantileMS(sealed, .5), prefix+"sealed-p50-ms")
	p.b.ReportMetric(quantileMS(sealed, .99), prefix+"sealed-p99-ms")
	p.b.ReportMetric(1000*s.cpu()/n, prefix+"cpu-s/1000frames")
	p.b.ReportMetric(s.cpu()/s.wall(), prefix+"cores")
}

// benchFrames lets the city run and the units sign, each in its own tenth of a
// second, as nothing on a street makes them tick together.
func benchFrames(b *testing.B, l *local, w world, defs []*traffic.Junction, rules timing.Rules, seconds int) []benchFrame {
	b.Helper()
	units := make([]*roadside.Unit, len(defs))
	for i, j := range defs {
		cab, err := w.cabinet(j.ID)
		if err != nil {
			b.Fatal(err)
		}
		key, err := l.deviceKey(j.ID)
		if err != nil {
			b.Fatal(err)
		}
		units[i], err = roadside.New(w.Now(), roadside.Config{
			District: l.district.Genesis.District, Junction: j, Device: district.DeviceID(j.ID), Key: key, BootEpoch: 1,
			Commander: l.commander, Driver: cab, Rules: rules,
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	const steps = 10 // of 100 ms
	var out []benchFrame
	for range seconds {
		for step := range steps {
			if _, err := w.Step(); err != nil {
				b.Fatal(err)
			}
			now := w.Now()
			for i, u := range units {
				if i%steps != step {
					continue
				}
				if _, err := u.Tick(now); err != nil {
					b.Fatal(err)
				}
				e, f, err := u.Frame(now)
				if err != nil {
					b.Fatal(err)
				}
				out = append(out, benchFrame{at: now, device: f.Device, envelope: e, readings: len(f.Readings)})
			}
		}
	}
	return out
}

// meter notes when what becomes of the frames.
type meter struct {
	agreedMore chan struct{} // has room for one

	mu      sync.Mutex // guards what follows, and the frames' times
	commits map[ledger.Hash]*benchFrame
	early   map[ledger.Hash]place // agreed before we saw the receipt
	waiting []*benchFrame         // agreed and not sealed
	size    uint64                // sealed
	refused error

	sent, stored, agreed, sealed int
}

type place struct {
	at    time.Time
	index uint64
}

func newMeter(n int) *meter {
	return &meter{agreedMore: make(chan struct{}, 1), commits: make(map[ledger.Hash]*benchFrame, n), early: map[ledger.Hash]place{}}
}

// room waits until fewer than n frames are on their way.
func (m *meter) room(n int, most time.Duration) bool {
	for {
		m.mu.Lock()
		ok := m.sent-m.agreed < n
		m.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-m.agreedMore:
		case <-time.After(most):
			return false
		}
	}
}

func (m *meter) count(n *int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *n
}

func (m *meter) receipt(f *benchFrame, r *pb.Receipt, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.refused = err // and it is never sealed
		return
	}
	m.stored++
	c := ledger.Hash(r.Commitment)
	if p, ok := m.early[c]; ok {
		delete(m.early, c)
		m.found(f, p)
		return
	}
	m.commits[c] = f
}

// found is called with mu held.
func (m *meter) found(f *benchFrame, p place) {
	m.agreed++
	f.agreed, f.index = p.at, p.index
	if f.index < m.size {
		m.sealed++
		f.sealed = time.Now()
		return
	}
	m.waiting = append(m.waiting, f)
}

func (m *meter) block(b *decided.Block) {
	now := time.Now()
	m.mu.Lock()
	for i := range b.Records {
		r := &b.Records[i]
		if !r.Accepted {
			continue
		}
		if e, err := identity.ParseEnvelope(r.Raw); err != nil || e.Kind != identity.KindFrame {
			continue
		}
		c := b.Leaves[r.Index-b.Header.PrevSize].Commitment
		p := place{now, r.Index}
		if f, ok := m.commits[c]; ok {
			delete(m.commits, c)
			m.found(f, p)
		} else {
			m.early[c] = p
		}
	}
	m.mu.Unlock()
	select {
	case m.agreedMore <- struct{}{}:
	default:
	}
}

func (m *meter) seal(msg *nats.Msg) {
	var s pb.Seal
	if wire.Decode(identity.Protobuf, msg.Data, &s) != nil {
		return // never sealed, then
	}
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size = max(m.size, s.Size)
	m.waiting = slices.DeleteFunc(m.waiting, func(f *benchFrame) bool {
		if f.index >= m.size {
			return false
		}
		f.sealed = now
		m.sealed++
		return true
	})
}

// usage is a moment and the processor time that this process has used until
// then.
type usage struct {
	at  time.Time
	cpu time.Duration
}

func used() usage {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r) // cannot fail for ourselves
	return usage{time.Now(), time.Duration(r.Utime.Nano() + r.Stime.Nano())}
}

// verifyCost returns the processor seconds that checking one frame's signature
// takes in batches of 256.
func (p *bench) verifyCost() float64 {
	frames := p.frames[:min(p.next, 1<<13)]
	reg := p.l.street.state.Registry()
	v := identity.NewVerifier()
	check := func() {
		for part := range slices.Chunk(frames, 256) {
			for i := range part {
				e, err := identity.ParseEnvelope(part[i].envelope)
				if err != nil {
					p.b.Fatal(err)
				}
				h, _ := reg.Holder(e.Key)
				v.Add(h.Key, identity.SigningInput(e.Kind, e.ContentType, e.Payload), e.Signature)
			}
			for _, ok := range v.Flush() {
				if !ok {
					p.b.Fatal("a frame's signature is not valid")
				}
			}
		}
	}
	check() // fills the cache of keys
	begin := used()
	check()
	return (used().cpu - begin.cpu).Seconds() / float64(len(frames))
}

func quantileMS(d []time.Duration, q float64) float64 {
	slices.Sort(d)
	return float64(d[min(int(q*float64(len(d))), len(d)-1)].Microseconds()) / 1000
}

// benchLog shows what services warn of.
type benchLog struct{ b *testing.B }

func (l benchLog) Write(p []byte) (int, error) {
	l.b.Logf("%s", p)
	return len(p), nil
}
