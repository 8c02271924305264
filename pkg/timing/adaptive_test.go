package timing_test

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// A scene is one moment at the crossing, as an oracle sees it.
type scene struct {
	stage    int
	since    time.Duration
	vehicles map[int][]traffic.Approach // by movement, the nearest first
	full     map[traffic.LaneID]bool    // exits that stand
	bus      int                        // movement with a bus, -1
	call     bool
}

// queue is n standing vehicles.
func queue(n int) (out []traffic.Approach) {
	for i := range n {
		out = append(out, traffic.Approach{DistanceCM: uint32(100 + 750*i)})
	}
	return out
}

// coming are vehicles at 50 km/h, at the given seconds from the stop line.
func coming(seconds ...int) (out []traffic.Approach) {
	for _, s := range seconds {
		out = append(out, traffic.Approach{DistanceCM: uint32(1389 * s), SpeedCMS: 1389})
	}
	return out
}

// street50 is the crossing with a limit of 50 km/h.
func street50() *traffic.Junction {
	j := crossing()
	for i := range j.Lanes {
		j.Lanes[i].SpeedCMS = 1389
	}
	return j
}

func (sc scene) view(j *traffic.Junction, now time.Time) timing.View {
	f := &traffic.Frame{Time: now, Interval: time.Second}
	f.Signal = traffic.Signal{Stage: sc.stage, SinceMS: sc.since.Milliseconds(), State: j.Stages[sc.stage].State}
	for _, d := range j.Detectors {
		r := traffic.Reading{Detector: d.ID}
		switch d.Kind {
		case traffic.Oracle:
			r.Ahead = sc.vehicles[d.Movements[0]]
			r.Vehicles = uint32(len(r.Ahead))
			for _, a := range r.Ahead {
				if a.SpeedCMS == 0 {
					r.Halted++
				}
			}
			if sc.bus == d.Movements[0] {
				r.Priority = traffic.Bus
			}
		case traffic.ExitArea:
			if sc.full[d.Lane] {
				r.Vehicles, r.Halted = 10, 10
			}
		case traffic.Button:
			if sc.call {
				r.Count = 1
			}
		}
		f.Readings = append(f.Readings, r)
	}
	return timing.Observe(j, f)
}

// decide shows the same scene for some seconds and returns the last decision.
func decide(t *testing.T, rulesName string, sc scene, seconds int) timing.Decision {
	t.Helper()
	r := rules(t, rulesName)
	j := r.Apply(street50())
	c := named(t, "adaptive")
	var m timing.Memory
	var d timing.Decision
	// It starts before anybody is there.
	m, _ = c.Next(j, r, m, scene{stage: sc.stage, since: sc.since, bus: -1}.view(j, epoch.Add(-time.Second)))
	for i := range seconds {
		v := sc.view(j, epoch.Add(time.Duration(i)*time.Second))
		m, d = c.Next(j, r, m, v)
		if d.Stage != sc.stage {
			break
		}
	}
	return d
}

func TestAdaptive(t *testing.T) {
	type vs = map[int][]traffic.Approach
	const old = 20 * time.Second // of a green: long enough to end
	for _, c := range []struct {
		name string
		sc   scene
		want int
	}{
		{"a lone car is served", scene{stage: 0, since: old, vehicles: vs{2: queue(1)}, bus: -1}, 2},
		{"nobody is there", scene{stage: 0, since: old, bus: -1}, 0},
		{"a platoon is let through before a lone car", scene{stage: 0, since: old, vehicles: vs{0: coming(1, 3, 5, 7, 9), 2: queue(1)}, bus: -1}, 0},
		{"a lone car is not kept for a platoon that is far", scene{stage: 0, since: old, vehicles: vs{0: coming(13, 14), 2: queue(2)}, bus: -1}, 2},
		{"a queue is served before a car", scene{stage: 0, since: old, vehicles: vs{0: queue(8), 2: queue(1)}, bus: -1}, 0},
		{"no green into a full exit", scene{stage: 0, since: old, vehicles: vs{0: queue(8), 2: queue(2)}, full: map[traffic.LaneID]bool{"s": true}, bus: -1}, 2},
		{"a bus weighs more than cars", scene{stage: 1, since: old, vehicles: vs{0: queue(3), 2: queue(1)}, bus: 2}, 2},
		{"and cars more than a car", scene{stage: 1, since: old, vehicles: vs{0: queue(3), 2: queue(1)}, bus: -1}, 0},
		{"a pedestrian is let across", scene{stage: 2, since: old, call: true, bus: -1}, 3},
		{"the minimum green is kept", scene{stage: 0, since: 3 * time.Second, vehicles: vs{2: queue(9)}, bus: -1}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decide(t, "free", c.sc, 1); got.Stage != c.want {
				t.Errorf("got %+v, want stage %d", got, c.want)
			}
		})
	}
}

// Who stands at green and does not go is not waited for: something is in the way
// that no green removes. So a ring of junctions that block one another does not
// keep what could still move from moving.
func TestAdaptiveTurnsFromWhatIsStuck(t *testing.T) {
	sc := scene{stage: 2, since: 20 * time.Second, vehicles: map[int][]traffic.Approach{2: queue(12), 1: queue(2)}, bus: -1}
	if got := decide(t, "free", sc, 1); got.Stage != 2 {
		t.Fatalf("got %+v at first, want the longer queue to keep its green", got)
	}
	if got := decide(t, "free", sc, 25); got.Stage == 2 {
		t.Errorf("got %+v after 25 s in which nobody moved at green, want a stage for those who can", got)
	}
}

func TestAdaptiveKeepsDecisionIntervals(t *testing.T) {
	r := rules(t, "resco")
	j := r.Apply(street50())
	c := named(t, "adaptive")
	sc := scene{stage: 0, since: 20 * time.Second, vehicles: map[int][]traffic.Approach{2: queue(5)}, bus: -1}
	var m timing.Memory
	var d timing.Decision
	m, _ = c.Next(j, r, m, scene{stage: 0, since: 20 * time.Second, bus: -1}.view(j, epoch.Add(time.Second)))
	for s := 2; s < 10; s++ {
		if m, d = c.Next(j, r, m, sc.view(j, epoch.Add(time.Duration(s)*time.Second))); d.Stage != 0 {
			t.Fatalf("got stage %d at second %d, want decisions at multiples of 10 s", d.Stage, s)
		}
	}
	if _, d = c.Next(j, r, m, sc.view(j, epoch.Add(10*time.Second))); d.Stage != 2 {
		t.Errorf("got %+v at second 10, want stage 2", d)
	}
}

// Announced vehicles are planned with, and forgotten when no word of them comes.
func TestAdaptiveHearsItsNeighbours(t *testing.T) {
	r := rules(t, "free")
	j := r.Apply(street50())
	for i := range j.Lanes {
		if j.Lanes[i].ID == "n0" {
			j.Lanes[i].From, j.Lanes[i].To = "up", j.ID
		}
	}
	c := named(t, "adaptive")
	sc := scene{stage: 0, since: 20 * time.Second, vehicles: map[int][]traffic.Approach{2: queue(2), 0: coming(2, 5, 8, 11)}, bus: -1}
	at := func(second int) time.Time { return epoch.Add(time.Duration(second) * time.Second) }
	word := timing.Outflow{From: "up", AtMS: at(1).UnixMilli(), Lanes: []timing.LaneOutflow{{Lane: "n0", To: j.ID, TravelMS: 14_400}}}
	for i := range 8 {
		word.Lanes[0].Past = append(word.Lanes[0].Past, at(1).UnixMilli()-int64(8-i)*50)
	}
	if got := timing.Inflows(j, at(2), []timing.Outflow{word}); len(got) != 8 || got[0].Lane != "n0" || !got[0].Sent || got[0].AtMS <= at(2).UnixMilli() {
		t.Fatalf("got %+v, want eight vehicles on n0 that are still to come", got)
	}
	for _, c := range []struct {
		why  string
		now  time.Time
		word timing.Outflow
	}{
		{"at the moment of its own frame", at(1), word},
		{"when it is old", at(5), word},
		{"when it is for somebody else", at(2), timing.Outflow{From: "up", AtMS: word.AtMS, Lanes: []timing.LaneOutflow{{Lane: "n0", To: "other", Past: word.Lanes[0].Past}}}},
	} {
		if got := timing.Inflows(j, c.now, []timing.Outflow{c.word}); len(got) != 0 {
			t.Errorf("%s: got %+v, want nothing", c.why, got)
		}
	}
	newer := timing.Outflow{From: "up", AtMS: word.AtMS + 500}
	if got := timing.Inflows(j, at(2), []timing.Outflow{word, newer}); len(got) != 0 {
		t.Errorf("got %+v, want the newer word to count, which names nobody", got)
	}
	start, _ := c.Next(j, r, timing.Memory{}, scene{stage: 0, since: 19 * time.Second, bus: -1}.view(j, at(1)))
	plan := func(heard ...timing.Outflow) (timing.Memory, timing.Decision) {
		v := sc.view(j, at(2))
		v.Inflow = timing.Inflows(j, at(2), heard)
		return c.Next(j, r, start, v)
	}
	alone, without := plan()
	_, stale := plan(timing.Outflow{From: "up", AtMS: at(-4).UnixMilli(), Lanes: word.Lanes})
	if stale != without {
		t.Errorf("got %+v with old word, want what is decided without: %+v", stale, without)
	}
	// What it lets go it announces: the four that come, now that it is green.
	if len(j.Lanes) == 0 {
		t.Fatal("no lanes")
	}
	for i := range j.Lanes {
		if j.Lanes[i].ID == "s" {
			j.Lanes[i].From, j.Lanes[i].To, j.Lanes[i].AheadCM = j.ID, "down", 20000
		}
	}
	if without.Stage == 0 {
		o := timing.Announce(j, alone)
		if len(o.Lanes) != 1 || o.Lanes[0].To != "down" || len(o.Lanes[0].Planned) != 4 || o.Lanes[0].TravelMS != 14_398 {
			t.Errorf("got %+v, want four vehicles for the next signal", o)
		}
	}
	if o := timing.Announce(j, timing.Memory{AtMS: 5}); len(o.Lanes) != 0 || o.From != j.ID {
		t.Errorf("got %+v of a controller that plans nothing, want no vehicles", o)
	}
}

// TestAdaptiveAnyView: whatever views say and memory holds, the same stage of the
// definition comes out of the same input, and no stage ends before its minimum.
func TestAdaptiveAnyView(t *testing.T) {
	c := named(t, "adaptive")
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"free", "resco", "deployable", "field"}).Draw(t, "rules")
		r, err := timing.RulesNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		j := r.Apply(street50())
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		var m timing.Memory
		stage, since := 0, 0
		for s := range 60 {
			n := func() []traffic.Approach {
				var out []traffic.Approach
				for range rng.IntN(20) {
					out = append(out, traffic.Approach{DistanceCM: rng.Uint32() >> rng.IntN(32), SpeedCMS: rng.Uint32() >> rng.IntN(32)})
				}
				return out
			}
			sc := scene{stage: stage, since: time.Duration(since) * time.Second, vehicles: map[int][]traffic.Approach{0: n(), 1: n(), 2: n(), 3: n()},
				full: map[traffic.LaneID]bool{"s": rng.IntN(2) == 0, "w": rng.IntN(2) == 0}, bus: rng.IntN(6) - 1, call: rng.IntN(2) == 0}
			v := sc.view(j, epoch.Add(time.Duration(s)*time.Second))
			if rng.IntN(3) == 0 {
				for i := range v.Movements {
					v.Movements[i].Ahead, v.Movements[i].Oracle = nil, false
					v.Movements[i].Recall = rng.IntN(4) == 0
					v.Movements[i].Vehicles = int(rng.Int64()>>rng.IntN(64)) - 3
				}
			}
			v.Inflow = []timing.Inflow{{From: "x", Lane: "n0", AtMS: v.Now.UnixMilli() + rng.Int64N(60_000)}, {From: "nobody", AtMS: rng.Int64()}}
			m2, d := c.Next(j, r, m, v)
			again, d2 := c.Next(j, r, m, v)
			if d != d2 || kept(t, m2) != kept(t, again) {
				t.Fatalf("got %+v, then %+v from the same input", d, d2)
			}
			if d.Stage < 0 || d.Stage >= len(j.Stages) || d.Rule == "" {
				t.Fatalf("got %+v of %d stages", d, len(j.Stages))
			}
			if least := j.Timing.MinGreenMS; s > 0 && d.Stage != stage && int64(since)*1000 < least && !strings.Contains(d.Rule, "emergency") {
				t.Fatalf("got %+v after %d s, want at least %d ms of green", d, since, least)
			}
			if m = m2; d.Stage != stage {
				stage, since = d.Stage, 0
			}
			since++
			if rng.IntN(10) == 0 { // from the disk
				var back timing.Memory
				if err := json.Unmarshal([]byte(kept(t, m)), &back); err != nil {
					t.Fatal(err)
				}
				m = back
			}
		}
	})
}

func kept(t *rapid.T, m timing.Memory) string {
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A lane whose detectors have failed is served by what is usual there.
func TestAdaptiveWithoutDetectors(t *testing.T) {
	r := rules(t, "free")
	j := r.Apply(street50())
	c := named(t, "adaptive")
	s := timing.NewSequencer(j, r, epoch)
	var m timing.Memory
	greens := 0
	was := false
	for sec := range 600 {
		now := epoch.Add(time.Duration(sec) * time.Second)
		sig := s.Signal(now)
		sc := scene{stage: 0, vehicles: map[int][]traffic.Approach{0: queue(3)}, bus: -1}
		v := sc.view(j, now)
		v.Signal = sig
		for _, i := range []int{2, 3} {
			v.Movements[i] = timing.MovementView{Recall: true}
		}
		var d timing.Decision
		m, d = c.Next(j, r, m, v)
		if err := s.Target(d.Stage); err != nil {
			t.Fatal(err)
		}
		green := s.Next(now).At(2).Go()
		if green && !was {
			greens++
		}
		was = green
	}
	if greens < 5 {
		t.Errorf("got %d greens in ten minutes for movements that nobody sees, want at least 5", greens)
	}
}

func TestBoxHold(t *testing.T) {
	r := rules(t, "free")
	j := r.Apply(crossing())
	change := func(hold int) (red int) {
		s := timing.NewSequencer(j, r, epoch)
		s.Resume("Ggrrr", epoch)
		if err := s.Target(2); err != nil {
			t.Fatal(err)
		}
		now := epoch
		for sec := 1; sec < 60; sec++ {
			now = now.Add(time.Second)
			if sec < hold {
				s.Occupied([]bool{false, true, false, false, false}) // a left turner from the north
			}
			if st := s.Next(now); st == "rrrrr" {
				red++
			} else if st.At(2).Go() {
				return red
			}
		}
		t.Fatalf("hold %d: the change never ended", hold)
		return 0
	}
	// A sequencer's first step counts as nothing. Then 5 s of minimum green and 3 s
	// of yellow, then red for as long as he stands.
	if got := change(0); got != 0 {
		t.Errorf("got %d s of red with an empty junction, want none", got)
	}
	if got := change(12); got != 3 {
		t.Errorf("got %d s of red with somebody inside until second 11, want 3", got)
	}
	if got := change(1000); got != 20 {
		t.Errorf("got %d s of red with a detector that is stuck, want at most the 20 s of the rules", got)
	}
}

func TestBoxOccupied(t *testing.T) {
	j := crossing()
	if got := timing.BoxOccupied(j, nil); got != nil {
		t.Errorf("got %v without a detector, want nothing known", got)
	}
	j.Detectors = []traffic.Detector{{ID: "box", Kind: traffic.Box, Movements: []int{1, 2}, Group: -1}}
	if got := timing.BoxOccupied(j, []traffic.Reading{{Detector: "box", Vehicles: 2, Halted: 1}}); !got[1] || !got[2] || got[0] {
		t.Errorf("got %v, want the groups of the movements under the detector", got)
	}
	if got := timing.BoxOccupied(j, []traffic.Reading{{Detector: "box", Vehicles: 2}}); got[1] {
		t.Error("got occupied, want those on the move not to count")
	}
}

func BenchmarkAdaptive(b *testing.B) {
	r := rules(b, "free")
	j := r.Apply(street50())
	c := named(b, "adaptive")
	for _, n := range []struct {
		name string
		vs   map[int][]traffic.Approach
	}{
		{"vehicles=6", map[int][]traffic.Approach{0: queue(2), 2: queue(2), 3: coming(3, 8)}},
		{"vehicles=40", map[int][]traffic.Approach{0: append(queue(8), coming(9, 10, 12)...), 1: queue(5), 2: append(queue(8), coming(8, 10, 13)...), 3: queue(13)}},
	} {
		b.Run(n.name, func(b *testing.B) {
			b.ReportAllocs()
			sc := scene{stage: 0, since: 9 * time.Second, vehicles: n.vs, bus: -1}
			v := sc.view(j, epoch.Add(2*time.Second))
			m, _ := c.Next(j, r, timing.Memory{}, sc.view(j, epoch.Add(time.Second)))
			for b.Loop() {
				c.Next(j, r, m, v)
			}
		})
	}
}

// What the street has, the planner takes: a signal with one stage, one for walkers
// only, lanes of no length, groups that hold nothing.
func TestAdaptiveAtOddJunctions(t *testing.T) {
	plan := traffic.Plan{Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 20_000, IntergreenMS: 3000}}}
	timings := traffic.Timing{MinGreenMS: 5000, YellowMS: 3000}
	single := &traffic.Junction{ID: "single", Groups: []traffic.Group{{Kind: traffic.Vehicles}, {Kind: traffic.Vehicles}}, Conflicts: [][]int{nil, nil},
		Lanes:     []traffic.Lane{{ID: "in"}, {ID: "out", LengthCM: 10}},
		Movements: []traffic.Movement{{From: "in", To: "out", Group: 0}},
		Detectors: []traffic.Detector{{ID: "o", Kind: traffic.Oracle, Lane: "in", Movements: []int{0}, Group: -1}},
		Stages:    []traffic.Stage{{State: "Gr"}}, Timing: timings, Plan: plan}
	walkers := &traffic.Junction{ID: "walkers", Groups: []traffic.Group{{Kind: traffic.Pedestrians, PedClearMS: 5000}, {Kind: traffic.Pedestrians}}, Conflicts: [][]int{{1}, {0}},
		Stages: []traffic.Stage{{State: "Gr"}, {State: "rG"}}, Timing: timings, Plan: plan}
	blind := street50()
	blind.Detectors = nil
	loop := street50() // a lane that leads back into itself
	loop.Lanes[0].From, loop.Lanes[0].To, loop.Lanes[0].AheadCM = loop.ID, loop.ID, 5000
	for _, j := range []*traffic.Junction{single, walkers, blind, loop} {
		if err := j.Check(); err != nil {
			t.Fatal(err)
		}
		c := named(t, "adaptive")
		for _, name := range []string{"free", "resco", "deployable", "field"} {
			r := rules(t, name)
			own := r.Apply(j)
			s := timing.NewSequencer(own, r, epoch)
			var m timing.Memory
			green := map[int]bool{}
			for sec := range 400 {
				now := epoch.Add(time.Duration(sec) * time.Second)
				f := &traffic.Frame{Time: now, Interval: time.Second, Signal: s.Signal(now)}
				for _, d := range own.Detectors {
					f.Readings = append(f.Readings, traffic.Reading{Detector: d.ID, Vehicles: 2, Halted: 2, Ahead: queue(2)})
				}
				var d timing.Decision
				m, d = c.Next(own, r, m, timing.Observe(own, f))
				if err := s.Target(d.Stage); err != nil {
					t.Fatalf("%s, %s: %v", j.ID, name, err)
				}
				st := s.Next(now)
				for g := range own.Groups {
					green[g] = green[g] || st.At(g).Go()
				}
				timing.Announce(own, m)
			}
			for g := range own.Groups {
				if !green[g] && (j != single || g == 0) && j != loop {
					t.Errorf("%s, %s: group %d was never green in 400 s", j.ID, name, g)
				}
			}
		}
	}
}
