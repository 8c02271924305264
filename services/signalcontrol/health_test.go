package signalcontrol

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/health"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

var testGenesis = testDistrict.GenesisHash

// cityOf returns a small city.
func cityOf(t testing.TB, junctions, demand int) *sim.City {
	t.Helper()
	c, err := sim.New(sim.Config{Seed: 11, Junctions: junctions, DemandPermille: demand, FlatDemand: true, AmbulanceEvery: -1, BusEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// without returns the junction without the detectors of which drop is true.
func without(j *traffic.Junction, drop func(traffic.Detector) bool) *traffic.Junction {
	out := *j
	out.Detectors = slices.DeleteFunc(slices.Clone(j.Detectors), drop)
	return &out
}

// lamps stands at one junction of the city.
type lamps struct {
	j      *traffic.Junction
	driver *sim.Driver
	seq    *timing.Sequencer
	core   []*Core // each decides; the first one is obeyed
	see    []func(*traffic.Frame) *traffic.Frame
	defs   []*traffic.Junction
	n      uint64
}

// tick shows the lamps, and each second has the cores decide. It returns what
// they decided.
func (l *lamps) tick(t testing.TB, now time.Time) []traffic.Command {
	t.Helper()
	if err := l.driver.Show(l.seq.Next(now)); err != nil {
		t.Fatal(err)
	}
	if now.Nanosecond() != 0 {
		return nil
	}
	readings, err := l.driver.Sense()
	if err != nil {
		t.Fatal(err)
	}
	state, err := l.driver.Observed()
	if err != nil {
		t.Fatal(err)
	}
	l.n++
	f := &traffic.Frame{District: testDistrict.ID, Junction: l.j.ID, FrameKey: traffic.FrameKey{Device: "rsu", BootEpoch: 1, Seq: l.n},
		Time: now, Interval: time.Second, Readings: readings, Signal: l.seq.Signal(now)}
	f.Signal.State, f.Signal.Mode = state, traffic.Coordinated
	var out []traffic.Command
	for i, c := range l.core {
		cs, refused := c.Commands(now, ledger.Height(1_000_000+l.n), []*traffic.Frame{l.see[i](f)}, lookup(map[traffic.JunctionID]*traffic.Junction{l.j.ID: l.defs[i]}))
		if len(cs) != 1 || len(refused) != 0 {
			t.Fatalf("got %d commands, %v refused, want one", len(cs), refused)
		}
		out = append(out, cs[0])
	}
	if err := l.seq.Target(out[0].Stage); err != nil {
		t.Fatal(err)
	}
	return out
}

// faults are what can be wrong with one detector, and how long that takes to be
// found out.
var faults = []struct {
	name string
	rule health.Rule
	for_ time.Duration
	say  func(r *traffic.Reading)
}{
	{"stuck on", health.LockedOn, 30 * time.Minute, func(r *traffic.Reading) {
		*r = traffic.Reading{Detector: r.Detector, OccupancyPermille: 1000, Vehicles: 1, Halted: 1, HeadWaitMS: 60_000}
	}},
	{"dead", health.NoHits, 12 * time.Hour, func(r *traffic.Reading) { *r = traffic.Reading{Detector: r.Detector} }},
	{"chattering", health.Chatter, time.Minute, func(r *traffic.Reading) {
		*r = traffic.Reading{Detector: r.Detector, Count: 3, OccupancyPermille: 600, SpeedCMS: 1000, Vehicles: 1}
	}},
}

// spoil returns f as it is with a fault at one detector.
func spoil(f *traffic.Frame, id traffic.DetectorID, say func(*traffic.Reading)) *traffic.Frame {
	g := *f
	g.Readings = slices.Clone(f.Readings)
	for i := range g.Readings {
		if g.Readings[i].Detector == id {
			say(&g.Readings[i])
		}
	}
	return &g
}

// age shows a core one detector with a fault for long enough, ending at now, and
// all others well.
func age(t testing.TB, c *Core, j *traffic.Junction, id traffic.DetectorID, d time.Duration, say func(*traffic.Reading), now time.Time) {
	t.Helper()
	step := min(d/60, 5*time.Minute)
	n := 0
	for at := now.Add(-d); !at.After(now); at = at.Add(step) {
		f := &traffic.Frame{Junction: j.ID, FrameKey: traffic.FrameKey{Device: "rsu", BootEpoch: 0, Seq: uint64(n + 1)}, Time: at, Interval: step}
		for _, det := range j.Detectors {
			r := traffic.Reading{Detector: det.ID, OccupancyPermille: 300}
			if n%5 == 0 {
				r.Count = 1
			}
			if det.Kind == traffic.Button {
				r = traffic.Reading{Detector: det.ID}
			}
			f.Readings = append(f.Readings, r)
		}
		n++
		c.Observe(ledger.Height(n), []*traffic.Frame{spoil(f, id, say)}, lookup(map[traffic.JunctionID]*traffic.Junction{j.ID: j}))
	}
}

// TestFailedDetector: with one detector stuck, dead or chattering in the city,
// what is decided is what would be decided if it were not there.
func TestFailedDetector(t *testing.T) {
	minutes := 10
	if testing.Short() {
		minutes = 3
	}
	for _, name := range []string{"actuated", "maxpressure"} {
		for _, fault := range faults {
			t.Run(name+"/"+fault.name, func(t *testing.T) {
				city := cityOf(t, 1, 1000)
				j := city.Junctions()[0]
				var bad traffic.DetectorID
				for _, d := range j.Detectors {
					if d.Kind == traffic.StopLine {
						bad = d.ID
						break
					}
				}
				driver, err := city.Driver(j.ID)
				if err != nil {
					t.Fatal(err)
				}
				rules, err := timing.RulesNamed("deployable")
				if err != nil {
					t.Fatal(err)
				}
				deaf := newCore(t, name) // believes what it is told: the test must be able to fail
				deaf.health.restored = 1 << 60
				isBad := func(d traffic.Detector) bool { return d.ID == bad }
				l := &lamps{j: j, driver: driver, seq: timing.NewSequencer(j, rules, city.Now()), core: []*Core{newCore(t, name), newCore(t, name), deaf},
					defs: []*traffic.Junction{j, without(j, isBad), j}, see: []func(*traffic.Frame) *traffic.Frame{
						func(f *traffic.Frame) *traffic.Frame { return spoil(f, bad, fault.say) },
						func(f *traffic.Frame) *traffic.Frame {
							g := *f
							g.Readings = slices.DeleteFunc(slices.Clone(f.Readings), func(r traffic.Reading) bool { return r.Detector == bad })
							return &g
						},
						func(f *traffic.Frame) *traffic.Frame { return spoil(f, bad, fault.say) },
					}}
				age(t, l.core[0], j, bad, fault.for_, fault.say, city.Now())
				if r, failed := l.core[0].Failed(j.ID, bad); !failed || r != fault.rule {
					t.Fatalf("got %q %v, want %s", r, failed, fault.rule)
				}
				differs := 0
				for int(l.n) < minutes*60 {
					if _, err := city.Step(); err != nil {
						t.Fatal(err)
					}
					got := l.tick(t, city.Now())
					if got == nil {
						continue
					}
					if got[0].Stage != got[1].Stage || got[0].Rule != got[1].Rule {
						t.Fatalf("second %d: got stage %d, %s; want as without the detector: stage %d, %s", l.n, got[0].Stage, got[0].Rule, got[1].Stage, got[1].Rule)
					}
					if got[0].Rule != got[2].Rule {
						differs++
					}
				}
				if differs == 0 && fault.rule != health.NoHits && !testing.Short() {
					t.Error("who believes the detector decides the same: the test shows nothing")
				}
				if f := l.core[0].health.monitors[j.ID].Failing(); f != 1 {
					t.Errorf("got %d failing, want 1: %v", f, l.core[0].Health())
				}
			})
		}
	}
}

// TestNobodyStarvesByAFault: where a lane has a stop line loop alone, or with an
// advance loop, and that loop has failed, every movement is served, and no green
// lasts for ever.
func TestNobodyStarvesByAFault(t *testing.T) {
	// The longest red: of a round in which all stages have their longest green, or
	// what max pressure allows. It is no longer than with a loop that works.
	worst := map[string]int{"actuated": 180, "maxpressure": 125}
	minutes := 15
	if testing.Short() {
		minutes = 8
	}
	for _, name := range []string{"actuated", "maxpressure"} {
		for _, kinds := range [][]traffic.DetectorKind{{traffic.StopLine}, {traffic.StopLine, traffic.Advance}} {
			for _, fault := range faults {
				t.Run(fmt.Sprintf("%s/%d detectors/%s", name, len(kinds), fault.name), func(t *testing.T) {
					city := cityOf(t, 1, 700)
					full := city.Junctions()[0]
					j := without(full, func(d traffic.Detector) bool {
						return d.Kind != traffic.Button && d.Kind != traffic.ExitArea && !slices.Contains(kinds, d.Kind)
					})
					at := slices.IndexFunc(j.Detectors, func(d traffic.Detector) bool { return d.Kind == traffic.StopLine })
					bad := j.Detectors[at]
					driver, err := city.Driver(j.ID)
					if err != nil {
						t.Fatal(err)
					}
					rules, err := timing.RulesNamed("deployable")
					if err != nil {
						t.Fatal(err)
					}
					have := map[traffic.DetectorID]bool{}
					for _, d := range j.Detectors {
						have[d.ID] = true
					}
					var last *traffic.Frame // as it was
					l := &lamps{j: j, driver: driver, seq: timing.NewSequencer(j, rules, city.Now()), core: []*Core{newCore(t, name)}, defs: []*traffic.Junction{j},
						see: []func(*traffic.Frame) *traffic.Frame{func(f *traffic.Frame) *traffic.Frame {
							g := *f
							g.Readings = slices.DeleteFunc(slices.Clone(f.Readings), func(r traffic.Reading) bool { return !have[r.Detector] })
							last = &g
							return spoil(&g, bad.ID, fault.say)
						}}}
					age(t, l.core[0], j, bad.ID, fault.for_, fault.say, city.Now())
					if _, failed := l.core[0].Failed(j.ID, bad.ID); !failed {
						t.Fatal("the fault was not found")
					}
					red, stood := make([]int, len(j.Groups)), make([]int, len(j.Detectors))
					worstRed, worstStood := 0, 0
					for int(l.n) < minutes*60 {
						if _, err := city.Step(); err != nil {
							t.Fatal(err)
						}
						if l.tick(t, city.Now()) == nil {
							continue
						}
						state, err := driver.Observed()
						if err != nil {
							t.Fatal(err)
						}
						for _, m := range bad.Movements {
							g := j.Movements[m].Group
							if red[g]++; state.At(g).Go() {
								red[g] = 0
							}
							worstRed = max(worstRed, red[g])
						}
						// Those who stand on a loop that works wait for its green.
						for i, d := range j.Detectors {
							if d.Kind != traffic.StopLine || d.ID == bad.ID {
								continue
							}
							stood[i]++
							if r := last.Readings[slices.IndexFunc(last.Readings, func(r traffic.Reading) bool { return r.Detector == d.ID })]; r.OccupancyPermille < 1000 {
								stood[i] = 0
							}
							worstStood = max(worstStood, stood[i])
						}
					}
					if worstRed == 0 || worstRed > worst[name] {
						t.Errorf("got reds of up to %d s for the movement without a detector, want at most %d", worstRed, worst[name])
					}
					if worstStood == 0 || worstStood > worst[name]+60 {
						t.Errorf("got a wait of %d s on another loop, want at most %d", worstStood, worst[name]+60)
					}
					t.Logf("reds of up to %d s, elsewhere waits of up to %d s", worstRed, worstStood)
				})
			}
		}
	}
}

// TestHealthyCity: in a city in which nothing is broken, nothing is found.
func TestHealthyCity(t *testing.T) {
	d := time.Hour
	if testing.Short() {
		d = 20 * time.Minute
	}
	city := cityOf(t, 4, 1300)
	rules, err := timing.RulesNamed("deployable")
	if err != nil {
		t.Fatal(err)
	}
	var all []*lamps
	core := newCore(t, "maxpressure")
	for _, j := range city.Junctions() {
		driver, err := city.Driver(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, &lamps{j: j, driver: driver, seq: timing.NewSequencer(j, rules, city.Now()), core: []*Core{core}, defs: []*traffic.Junction{j},
			see: []func(*traffic.Frame) *traffic.Frame{func(f *traffic.Frame) *traffic.Frame { return f }}})
	}
	for end := city.Now().Add(d); city.Now().Before(end); {
		if _, err := city.Step(); err != nil {
			t.Fatal(err)
		}
		for _, l := range all {
			l.tick(t, city.Now())
			for _, h := range core.Health() {
				t.Errorf("%v: got %s %s %v: %s", city.Now().Format(time.TimeOnly), h.Junction, h.Detector, h.Rule, h.Reason)
			}
		}
	}
}

// blocks returns the frames of n blocks, in which the detector D1 of each of two
// junctions goes through faults.
func blocks(n int) [][]*traffic.Frame {
	out := make([][]*traffic.Frame, n)
	for h := range out {
		for _, id := range []traffic.JunctionID{"J1", "J2"} {
			f := periodic(id, uint64(h+1), testStart.Add(time.Duration(h)*time.Minute))
			f.Interval = time.Minute
			f.Readings[0].Count = 0
			switch {
			case h < 40 || id == "J2" && h < 90:
				f.Readings[0].OccupancyPermille = 1000
			case h%200 == 0:
				f.Readings[0].Count = 80
			}
			out[h] = append(out[h], f)
		}
	}
	return out
}

// TestHealthAgain: a core that goes on from what another one stored says and
// decides what that one would have; blocks that come twice say nothing new; and a
// core that goes through the blocks again says the same words, byte for byte.
func TestHealthAgain(t *testing.T) {
	const n = 1500
	frames, defs := blocks(n), lookup(definitions(t, 2))
	run := func(c *Core, from, to int, out *[][]byte) {
		for h := from; h < to; h++ {
			now := testStart.Add(time.Duration(h) * time.Minute)
			c.Commands(now, ledger.Height(h+1), frames[h], defs)
			for _, w := range c.Health() {
				*out = append(*out, c.sign(&w))
			}
		}
	}
	whole := newCore(t, "actuated")
	var want, again [][]byte
	run(whole, 0, n, &want)
	run(newCore(t, "actuated"), 0, n, &again)
	if !reflect.DeepEqual(again, want) {
		t.Error("the same blocks give other words the second time")
	}
	last := map[traffic.JunctionID]uint64{}
	said := map[string]bool{}
	for _, raw := range want {
		e, err := identity.ParseEnvelope(raw)
		if err != nil {
			t.Fatal(err)
		}
		h, err := wire.DecodeHealth(e.ContentType, e.Payload)
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != identity.KindHealth || !e.Verify(testDistrict.ControlKey.Public().(ed25519.PublicKey)) {
			t.Errorf("got kind %s, want health signed by signal-control", e.Kind)
		}
		if h.Seq <= last[h.Junction] || h.Seq/perBlock != h.Height || h.Since.After(h.Time) || h.RestsOn.Seq != h.Height || h.District != testDistrict.ID {
			t.Errorf("got %+v after seq %d", h, last[h.Junction])
		}
		last[h.Junction] = h.Seq
		said[fmt.Sprintf("%s %s %v", h.Junction, h.Rule, h.Failed)] = true
	}
	for _, w := range []string{"J1 locked-on true", "J2 locked-on true", "J1 chatter true", "J1 locked-on false"} {
		if !said[w] {
			t.Errorf("nobody said %q: %v", w, said)
		}
	}
	for _, at := range []int{1, 29, 31, 201, 1441} {
		a, b := newCore(t, "actuated"), newCore(t, "actuated")
		var got [][]byte
		run(a, 0, at, &got)
		raw, err := a.store(testGenesis, []word{{"J1", 7, []byte("envelope")}})
		if err != nil {
			t.Fatal(err)
		}
		pending, ok, err := b.restore(testGenesis, raw, defs)
		if !ok || err != nil || len(pending) != 1 || pending[0].junction != "J1" || pending[0].seq != 7 || string(pending[0].envelope) != "envelope" {
			t.Fatalf("restore: got %v, %v, %v", pending, ok, err)
		}
		run(b, max(at-20, 0), at, &got) // the place in the chain was behind
		run(b, at, n, &got)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("restarted after block %d: got %d words, want the same %d", at, len(got), len(want))
		}
	}
}

// TestHealthDamage: what is damaged is not believed, and never breaks a core.
func TestHealthDamage(t *testing.T) {
	frames, defs := blocks(50), lookup(definitions(t, 2))
	c := newCore(t, "actuated")
	for h := range frames {
		c.Observe(ledger.Height(h+1), frames[h], defs)
	}
	good, err := c.store(testGenesis, []word{{"J1", 1, []byte("x")}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		n := newCore(t, "actuated")
		if _, ok, err := n.restore(testGenesis, bad, defs); ok || err == nil || len(n.health.monitors) != 0 || n.health.restored != 0 {
			t.Fatalf("byte %d changed: got %v, %v, want it refused as a whole", i, ok, err)
		}
		if _, ok, _ := n.restore(testGenesis, good[:i], defs); ok {
			t.Fatalf("%d bytes: got accepted", i)
		}
	}
	n := newCore(t, "actuated")
	if _, ok, err := n.restore(ledger.Hash{9}, good, defs); ok || err == nil || !strings.Contains(err.Error(), "genesis") {
		t.Errorf("another chain's: got %v, %v, want it refused", ok, err)
	}
	// A junction that is defined anew begins anew, the other one does not.
	other := definitions(t, 2)
	j := *other["J2"]
	j.Detectors = slices.Clone(j.Detectors)
	j.Detectors[0].LengthCM += 5
	other["J2"] = &j
	n = newCore(t, "actuated")
	if _, ok, err := n.restore(testGenesis, good, lookup(other)); !ok || err == nil || !strings.Contains(err.Error(), "junction J2 begins anew") {
		t.Errorf("got %v, %v, want J2 to begin anew", ok, err)
	}
	if _, failed := n.Failed("J1", "D1"); !failed || n.health.monitors["J2"] != nil {
		t.Error("J1 was forgotten, or J2 was not")
	}
}

func FuzzRestore(f *testing.F) {
	frames, defs := blocks(5), lookup(definitions(f, 2))
	c := newCore(f, "actuated")
	for h := range frames {
		c.Observe(ledger.Height(h+1), frames[h], defs)
	}
	good, err := c.store(testGenesis, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		n := newCore(t, "actuated")
		if _, ok, _ := n.restore(testGenesis, b, defs); !ok && len(n.health.monitors) != 0 {
			t.Error("refused, and yet believed")
		}
	})
}

// healthWorld is a service that stores what it knows in dir.
func healthWorld(t *testing.T, dir string, in Inbox, chain *ledgertest.Chain, key ed25519.PrivateKey, b *bus.Bus, logs io.Writer) (*Service, func()) {
	t.Helper()
	state, err := agreed.Open(filepath.Join(dir, "control.place"), &chain.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	ctrl, err := timing.Named("actuated")
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{
		CoreConfig: CoreConfig{District: chain.ID, Key: key, Policy: "day", PolicyVersion: "1", Controller: ctrl},
		Bus:        b, Inbox: in, State: state, Now: func() time.Time { return ledgertest.Start }, Logger: slog.New(slog.NewTextHandler(logs, nil)),
		Follow: decided.Config{Bus: b, District: chain.ID, GenesisHash: chain.GenesisHash, Validators: chain.Validators, GapWait: 10 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}
}

// safeBuffer is a log that may be read while it is written.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// until polls for what other goroutines do.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// healthFrame is one whose detector is stuck for the given interval.
func healthFrame(chain *ledgertest.Chain, seq uint64, at time.Time, interval time.Duration, occupancy uint32) ledgertest.Record {
	f := periodic("J1", seq, at)
	f.District, f.Device, f.Interval = chain.ID, ledgertest.Device, interval
	f.Readings = []traffic.Reading{{Detector: "D1", OccupancyPermille: occupancy}}
	return ledgertest.NewRecord(chain.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(f))
}

// TestServiceHealth: a detector that has failed is sealed as a word, in order,
// also over a restart in the middle and with an ingest that has no room; where
// signal-control may not sign such words it says so once and goes on.
func TestServiceHealth(t *testing.T) {
	d := ledgertest.New("signal-control", 4)
	chain := d.NewChain()
	b := servicetest.District(t, d.ID)
	dir := t.TempDir()
	logs := &safeBuffer{}
	var sent [][]byte
	var mu sync.Mutex
	full := true
	in := &inbox{room: func(int) error {
		mu.Lock()
		defer mu.Unlock()
		if full {
			return kind.Errorf(kind.Unavailable, "no room")
		}
		return nil
	}}
	words := func() []*traffic.Health {
		var out []*traffic.Health
		mu.Lock()
		defer mu.Unlock()
		sent = in.envelopes()
		for i, raw := range sent {
			e, err := identity.ParseEnvelope(raw)
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != identity.KindHealth {
				continue
			}
			h, err := wire.DecodeHealth(e.ContentType, e.Payload)
			if err != nil {
				t.Fatal(err)
			}
			if in.from[i] != "harbour/health/J1" {
				t.Errorf("got a word from %s, want harbour/health/J1", in.from[i])
			}
			out = append(out, h)
		}
		return out
	}
	s, stop := healthWorld(t, dir, in, chain, chain.ControlKey, b, logs)
	at, seq := ledgertest.Start, uint64(0)
	decide := func(records ...ledgertest.Record) {
		t.Helper()
		blk := chain.Decide(records)
		if err := b.Publish(t.Context(), topic.Decision(d.ID, 1), "", wire.EncodeBlock(toProto(blk))); err != nil {
			t.Fatal(err)
		}
		until(t, fmt.Sprint("block ", blk.Header.Height), func() bool { return s.Counters.Height.Load() >= uint64(blk.Header.Height) })
	}
	frame := func(interval time.Duration, occupancy uint32) ledgertest.Record {
		seq++
		at = at.Add(interval)
		return healthFrame(chain, seq, at, interval, occupancy)
	}
	// Not allowed to: 30 minutes of occupation, and a burst.
	decide(frame(15*time.Minute, 1000))
	decide(frame(15*time.Minute, 1000))
	if r, failed := s.core.Failed("J1", "D1"); !failed || r != health.LockedOn {
		t.Fatalf("got %q %v, want locked-on", r, failed)
	}
	if got := words(); len(got) != 0 || s.Counters.Health.Load() != 1 || s.Counters.HealthLost.Load() != 1 {
		t.Errorf("not allowed to sign: got %d words at ingest, counted %d, %d lost, want 0, 1, 1", len(got), s.Counters.Health.Load(), s.Counters.HealthLost.Load())
	}
	if n := strings.Count(logs.String(), "does not let signal-control sign"); n != 1 {
		t.Errorf("got %d complaints in the log, want 1:\n%s", n, logs)
	}
	// With a key that may. Ingest has no room for the word.
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	body, err := json.Marshal(identity.Service{Key: identity.PublicKey(key.Public().(ed25519.PublicKey)), Signs: []identity.RecordKind{identity.KindCommand, identity.KindHealth}})
	if err != nil {
		t.Fatal(err)
	}
	decide(chain.Change(identity.Change{Action: "put", Type: identity.TypeService, ID: "control-2", Body: body, Nonce: 5}))
	stop()
	s, stop = healthWorld(t, dir, in, chain, key, b, logs)
	for range 48 {
		decide(frame(15*time.Minute, 100)) // 12 hours
	}
	if got := s.Counters.Health.Load(); got != 1 {
		t.Fatalf("got %d words, want one: no-hits\n%s", got, logs)
	}
	if got := s.Counters.HealthLost.Load(); got != 0 {
		t.Fatalf("got %d words lost, want none", got)
	}
	stop()
	// A restart in the middle; the word is still there, and so is what is known.
	s, stop = healthWorld(t, dir, in, chain, key, b, logs)
	if _, failed := s.core.Failed("J1", "D1"); !failed || len(s.pending) != 1 {
		t.Fatalf("after a restart: got failed %v, %d words to be sealed, want 1; %s", failed, len(s.pending), logs)
	}
	mu.Lock()
	full = false
	in.sent, in.from = nil, nil
	mu.Unlock()
	decide(frame(time.Minute, 100))
	until(t, "the word is sealed", func() bool { return s.Counters.HealthSealed.Load() == 1 })
	f := periodic("J1", seq+1, at.Add(time.Minute))
	seq, at = seq+1, at.Add(time.Minute)
	f.District, f.Device, f.Interval = d.ID, ledgertest.Device, time.Minute
	decide(ledgertest.NewRecord(chain.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(f)))
	until(t, "the word that it counts again", func() bool { return s.Counters.HealthSealed.Load() == 2 })
	stop()
	got := words()
	if len(got) != 2 || got[0].Rule != "no-hits" || !got[0].Failed || got[1].Rule != "no-hits" || got[1].Failed || got[1].Seq <= got[0].Seq ||
		got[0].Time.Sub(got[0].Since) < 12*time.Hour {
		t.Errorf("got %+v, want no-hits to begin and to cease", got)
	}
	// Damage: said in the log, and started anew.
	path := filepath.Join(dir, "control.place.health")
	if err := os.WriteFile(path, []byte("damage"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, stop = healthWorld(t, dir, in, chain, key, b, logs)
	if _, failed := s.core.Failed("J1", "D1"); failed || !strings.Contains(logs.String(), "what was known of detectors is lost") {
		t.Errorf("damage: got failed %v, or nothing in the log", failed)
	}
	stop()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	state, err := agreed.Open(filepath.Join(dir, "control.place"), &chain.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{CoreConfig: s.cfg.CoreConfig, Bus: b, Inbox: in, State: state}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that cannot be read: got %v, want an error that names it", err)
	}
}
