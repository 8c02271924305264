package timing_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var epoch = time.Date(2026, 11, 22, 16, 0, 0, 0, time.UTC)

const ms = time.Millisecond

// crossing is a signal as SUMO maps have them: through and permissive left on
// two streets, protected lefts, a walk across the east arm.
//
//	group  0 N  1 NL  2 E  3 EL  4 walk
func crossing() *traffic.Junction {
	j := &traffic.Junction{
		ID: "J", Name: "J",
		Groups: []traffic.Group{{Name: "N", Kind: traffic.Vehicles}, {Name: "NL", Kind: traffic.Vehicles},
			{Name: "E", Kind: traffic.Vehicles}, {Name: "EL", Kind: traffic.Vehicles},
			{Name: "walk", Kind: traffic.Pedestrians, PedClearMS: 7000}},
		Conflicts: [][]int{{2, 3}, {2, 3}, {0, 1, 4}, {0, 1}, {2}},
		Yields:    [][]int{nil, {0}, nil, {2}, nil},
		Stages: []traffic.Stage{{Name: "north", State: "Ggrrr"}, {Name: "north left", State: "rGrrr"},
			{Name: "east", State: "rrGgr"}, {Name: "walk", State: "Ggrrg"}},
		Timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
		Plan: traffic.Plan{Name: "p1", OffsetMS: 7000, Steps: []traffic.PlanStep{
			{Stage: 0, DurationMS: 33000, IntergreenMS: 3000}, {Stage: 1, DurationMS: 9000, IntergreenMS: 3000},
			{Stage: 2, DurationMS: 38000, IntergreenMS: 5000}}},
	}
	for i, from := range []traffic.LaneID{"n0", "n1", "e0", "e1"} {
		to := traffic.LaneID([]string{"s", "x", "w", "y"}[i])
		j.Lanes = append(j.Lanes, traffic.Lane{ID: from, LengthCM: 20000, Capacity: 26}, traffic.Lane{ID: to, LengthCM: 20000, Capacity: 26})
		j.Movements = append(j.Movements, traffic.Movement{From: from, To: to, Group: i, SaturationPerHour: 1800})
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID("o" + from), Kind: traffic.Oracle, Lane: from, LengthCM: 20000, Movements: []int{i}, Group: -1})
	}
	for _, to := range []traffic.LaneID{"s", "x", "w", "y"} {
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID("x" + to), Kind: traffic.ExitArea, Lane: to, LengthCM: 7500, Group: -1})
	}
	j.Detectors = append(j.Detectors, traffic.Detector{ID: "b", Kind: traffic.Button, Group: 4})
	return j
}

func TestCrossingIsWellFormed(t *testing.T) {
	if err := crossing().Check(); err != nil {
		t.Fatal(err)
	}
}

func rules(t testing.TB, name string) timing.Rules {
	t.Helper()
	r, err := timing.RulesNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func named(t testing.TB, name string) timing.Controller {
	t.Helper()
	c, err := timing.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNames(t *testing.T) {
	for _, name := range []string{"fixed", "actuated", "maxpressure", "adaptive"} {
		if c := named(t, name); c.Name != name || c.Version == "" {
			t.Errorf("got %q version %q, want %q with a version", c.Name, c.Version, name)
		}
	}
	if _, err := timing.Named("green wave"); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "fixed, actuated, maxpressure, adaptive") {
		t.Errorf("got %v, want the names", err)
	}
	if _, err := timing.RulesNamed("lax"); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "free, resco, deployable, field") {
		t.Errorf("got %v, want the names", err)
	}
}

func TestApply(t *testing.T) {
	j := crossing()
	j.Groups[0].YellowMS, j.Groups[4].MinGreenMS = 5000, 9000
	before, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	got := rules(t, "deployable").Apply(j)
	// The plan's protected left is 6 s long: the minimum of 7 s is cut to that.
	if want := (traffic.Timing{MinGreenMS: 6000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 120000}); got.Timing != want {
		t.Errorf("got %+v, want %+v", got.Timing, want)
	}
	if got.Groups[0].YellowMS != 0 || got.Groups[4].MinGreenMS != 9000 || got.Groups[4].PedClearMS != 7000 {
		t.Errorf("got %+v, want vehicles' own times dropped and pedestrians' kept", got.Groups)
	}
	if after, err := json.Marshal(j); err != nil || string(after) != string(before) {
		t.Errorf("got the filed definition changed to %s (%v), want %s", after, err, before)
	}
	if err := got.Check(); err != nil {
		t.Error(err)
	}
	if rules(t, "field").Apply(j) != j {
		t.Error("got another definition from field rules, want the filed one")
	}
}

// run asks a sequencer for d and returns what it showed, as "state×seconds" of
// each stretch.
func run(s *timing.Sequencer, now *time.Time, step, d time.Duration) (out []string) {
	var last traffic.State
	n := 0
	flush := func() {
		if n > 0 {
			out = append(out, fmt.Sprintf("%s %v", last, time.Duration(n)*step))
		}
	}
	for end := now.Add(d); now.Before(end); {
		*now = now.Add(step)
		if got := s.Next(*now); got != last {
			flush()
			last, n = got, 0
		}
		n++
	}
	flush()
	return out
}

func TestSequencer(t *testing.T) {
	for _, step := range []time.Duration{10 * ms, 100 * ms, 500 * ms, time.Second} {
		now := epoch
		s := timing.NewSequencer(crossing(), rules(t, "deployable"), now)
		s.Resume("Ggrrr", now)
		run(s, &now, step, 10*time.Second)
		for _, c := range []struct {
			to   int
			want []string
		}{
			// The left turn stays green through the yellow of the through lanes,
			// and is protected only when they have been red for 1 s.
			{1, []string{"ygrrr 3s", "rgrrr 1s", "rGrrr 16s"}},
			{0, []string{"Ggrrr 20s"}}, // nothing is lost: nothing to wait for
			{3, []string{"Ggrrg 20s"}},
			// Pedestrians need 7 s: cars keep their green for the first 4.
			{2, []string{"Ggrrc 4s", "yyrrc 3s", "rrrrr 1s", "rrGgr 12s"}},
			{1, []string{"rryyr 3s", "rrrrr 1s", "rGrrr 16s"}},
		} {
			if err := s.Target(c.to); err != nil {
				t.Fatal(err)
			}
			if got := run(s, &now, step, 20*time.Second); !reflect.DeepEqual(got, c.want) {
				t.Errorf("step %v to stage %d: got %q, want %q", step, c.to, got, c.want)
			}
			if sig := s.Signal(now); sig.Stage != c.to || sig.State != crossing().Stages[c.to].State {
				t.Errorf("step %v: got signal %+v, want stage %d", step, sig, c.to)
			}
		}
	}
}

func TestSequencerOrders(t *testing.T) {
	now := epoch
	s := timing.NewSequencer(crossing(), rules(t, "free"), now)
	if got, want := run(s, &now, time.Second, 5*time.Second), []string{"rrrrr 5s"}; !reflect.DeepEqual(got, want) {
		t.Errorf("before an order: got %q, want %q", got, want)
	}
	if err := s.Target(4); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "stages 0 to 3") {
		t.Errorf("got %v, want the stages", err)
	}
	order := func(k int) {
		t.Helper()
		if err := s.Target(k); err != nil {
			t.Fatal(err)
		}
	}
	order(0)
	run(s, &now, time.Second, 2*time.Second) // pedestrians' red of a start is 7 s, but they are not in the way
	if got := s.Signal(now); got.Stage != 0 || got.SinceMS != 1000 {
		t.Errorf("got %+v, want stage 0 for 1 s", got)
	}
	// Ordered at once: minimum green of 5 s first. An order within the change
	// waits for the change and for the new minimum.
	order(2)
	got := run(s, &now, time.Second, 5*time.Second)
	if sig := s.Signal(now); sig.Stage != -1 || sig.SinceMS != 1000 {
		t.Errorf("got %+v, want a change for 1 s", sig)
	}
	order(1)
	got = append(got, run(s, &now, time.Second, 12*time.Second)...)
	if want := []string{"Ggrrr 3s", "yyrrr 2s", "yyrrr 1s", "rrGgr 5s", "rryyr 3s", "rGrrr 3s"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestResume(t *testing.T) {
	for _, c := range []struct {
		seen traffic.State
		want []string
	}{
		{"Ggrrr", []string{"Ggrrr 5s", "yyrrr 3s", "rrGgr 12s"}},
		{"yyrrr", []string{"yyrrr 3s", "rrGgr 17s"}},
		{"rrrrc", []string{"rrrrc 7s", "rrGgr 13s"}},
		{"rrrrr", []string{"rrGgr 20s"}},
		{"GgGgr", []string{"yyyyr 3s", "rrrrr 4s", "rrGgr 13s"}}, // in conflict; 7 s since nobody knows of the walk
		{"xxxxx", []string{"rrrrr 7s", "rrGgr 13s"}},
		{"OO", []string{"rrrrr 7s", "rrGgr 13s"}},
		{"uurrr", []string{"rrrrr 7s", "rrGgr 13s"}},
	} {
		now := epoch
		s := timing.NewSequencer(crossing(), rules(t, "free"), now)
		s.Next(now.Add(time.Second)) // its clock learns the step
		now = now.Add(2 * time.Second)
		s.Resume(c.seen, now)
		if err := s.Target(2); err != nil {
			t.Fatal(err)
		}
		got := run(s, &now, 100*ms, 20*time.Second)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("from %q: got %q, want %q", c.seen, got, c.want)
		}
	}
}

// TestFixedShowsThePlan: through the sequencer, at each second of three cycles,
// the lamps show what the plan says: green when it begins, yellow when it ends.
// The last step's intergreen of 5 s is longer than the change: its green gets
// the rest.
func TestFixedShowsThePlan(t *testing.T) {
	j := crossing()
	c, r := named(t, "fixed"), rules(t, "free")
	for _, step := range []time.Duration{100 * ms, time.Second} {
		start := time.UnixMilli(j.Plan.OffsetMS + 80_000*1000)
		s := timing.NewSequencer(j, r, start)
		s.Resume("rryyr", start.Add(-3*time.Second))
		var m timing.Memory
		for now := start.Add(-3 * time.Second); now.Before(start.Add(240 * time.Second)); now = now.Add(step) {
			f := traffic.Frame{Time: now, Signal: s.Signal(now)}
			var d timing.Decision
			m, d = c.Next(j, r, m, timing.Observe(j, &f))
			if err := s.Target(d.Stage); err != nil {
				t.Fatal(err)
			}
			got := s.Next(now)
			into := now.Sub(start)
			if into < 10*time.Second {
				continue // the first seconds are the resumed clock's
			}
			var want traffic.State
			switch x := into % (80 * time.Second); {
			case x < 30*time.Second:
				want = "Ggrrr"
			case x < 33*time.Second:
				want = "ygrrr"
			case x < 39*time.Second:
				want = "rGrrr"
			case x < 42*time.Second:
				want = "ryrrr"
			case x < 77*time.Second:
				want = "rrGgr"
			default:
				want = "rryyr"
			}
			if got != want {
				t.Fatalf("step %v, %v into the plan: got %q (%s), want %q", step, into, got, d.Rule, want)
			}
		}
	}
}

func TestFixedWords(t *testing.T) {
	j := crossing()
	_, d := named(t, "fixed").Next(j, rules(t, "field"), timing.Memory{}, timing.Observe(j, &traffic.Frame{Time: time.UnixMilli(7000 + 40_000)}))
	if want := (timing.Decision{Stage: 2, Rule: "fixed plan p1: step 2, stage 2, second 40 of 80"}); d != want {
		t.Errorf("got %+v, want %+v", d, want)
	}
	_, d = named(t, "fixed").Next(j, rules(t, "field"), timing.Memory{}, timing.Observe(j, &traffic.Frame{Time: time.UnixMilli(-1)}))
	if d.Stage != 2 { // before 1970 and the offset: 7.001 s before the end of a cycle
		t.Errorf("got %+v, want stage 2", d)
	}
}

// frame makes a frame in which the stage has lasted since, with so many
// vehicles in each movement, all standing.
func frame(j *traffic.Junction, at time.Time, stage int, since time.Duration, vehicles ...int) *traffic.Frame {
	f := &traffic.Frame{Time: at, Interval: time.Second, Signal: traffic.Signal{Stage: stage, SinceMS: since.Milliseconds(), State: j.Stages[stage].State}}
	for i, n := range vehicles {
		f.Readings = append(f.Readings, traffic.Reading{Detector: j.Detectors[i].ID, Vehicles: uint32(n), Halted: uint32(n)})
	}
	return f
}

func button(f *traffic.Frame) *traffic.Frame {
	f.Readings = append(f.Readings, traffic.Reading{Detector: "b", Count: 1})
	return f
}

func noButton(f *traffic.Frame) *traffic.Frame {
	f.Readings = append(f.Readings, traffic.Reading{Detector: "b"})
	return f
}

func TestMaxPressure(t *testing.T) {
	j := crossing()
	exit := func(f *traffic.Frame, lane string, n uint32) *traffic.Frame {
		f.Readings = append(f.Readings, traffic.Reading{Detector: traffic.DetectorID("x" + lane), Vehicles: n})
		return f
	}
	prio := func(f *traffic.Frame, i int, p traffic.Priority) *traffic.Frame {
		f.Readings[i].Priority = p
		return f
	}
	at := func(n ...int) *traffic.Frame { return noButton(frame(j, epoch, 0, 20*time.Second, n...)) }
	for _, c := range []struct {
		name string
		f    *traffic.Frame
		want int
		rule string
	}{
		{"the longer queue", at(2, 0, 9, 0), 2, "max pressure: stage 2 has 9.0, stage"},
		{"no flicker between equals", at(5, 0, 5, 0), 0, ""},
		{"nobody at all", at(0, 0, 0, 0), 0, ""},
		{"protected left for left-turners", at(0, 9, 0, 0), 1, ""},
		{"not into a full exit", exit(at(3, 0, 20, 0), "w", 10), 0, ""},
		{"less for a busy exit", exit(at(6, 0, 8, 0), "w", 8), 0, ""},
		{"a bus", prio(at(3, 0, 1, 0), 2, traffic.Bus), 2, ""},
		{"an ambulance, whoever else waits", prio(at(20, 0, 1, 0), 2, traffic.Emergency), 2, "max pressure: stage 2 for an emergency vehicle"},
		{"an ambulance that turns left is protected", prio(at(20, 1, 20, 0), 1, traffic.Emergency), 1, "emergency"},
		{"a call", button(frame(j, epoch, 2, 20*time.Second, 0, 0, 0, 0)), 3, ""},
		{"left-turners who still yield, before the cross street", at(3, 2, 20, 0), 1, "max pressure: stage 1 before stage 2, for those who still yield in stage 0"},
		{"but not into a full exit", exit(at(3, 2, 20, 0), "x", 10), 2, ""},
		{"in use", noButton(frame(j, epoch, 0, 8*time.Second, 1, 0, 9, 0)), 0, "max pressure: stage 0 is in use and has lasted 8 s"},
		{"too early", noButton(frame(j, epoch, 0, 4*time.Second, 0, 0, 9, 0)), 0, "before"},
	} {
		m := timing.Memory{AtMS: epoch.UnixMilli() - 1000, DecidedMS: epoch.UnixMilli() - 1000, Stage: c.f.Signal.Stage, Rule: "before",
			RedMS: make([]int64, 5), GapMS: make([]int64, 5), Queue: make([]int, 4)}
		_, d := named(t, "maxpressure").Next(j, rules(t, "free"), m, timing.Observe(j, c.f))
		if d.Stage != c.want || !strings.Contains(d.Rule, c.rule) {
			t.Errorf("%s: got %+v, want stage %d, %q", c.name, d, c.want, c.rule)
		}
	}
}

func TestDecisionIntervals(t *testing.T) {
	j := crossing()
	var m timing.Memory
	var changes []time.Duration
	last := -1
	for s := range 40 {
		f := noButton(frame(j, epoch.Add(time.Duration(s)*time.Second+300*ms), max(last, 0), 20*time.Second, s%2*20, 0, (s+1)%2*20, 0))
		var d timing.Decision
		m, d = named(t, "maxpressure").Next(j, rules(t, "resco"), m, timing.Observe(j, f))
		if d.Stage != last {
			changes, last = append(changes, time.Duration(s)*time.Second), d.Stage
		}
	}
	for _, at := range changes {
		if at%(10*time.Second) != 0 {
			t.Errorf("got decisions at %v, want them on multiples of 10 s", changes)
		}
	}
	if len(changes) == 0 {
		t.Error("got no decisions")
	}
}

// street is a plain model of the crossing: vehicles arrive at given intervals
// and leave at one every two seconds of green. It is driven as the real thing is.
type street struct {
	j        *traffic.Junction
	waiting  []int
	since    []int // seconds that the head of each movement has waited
	worst    []int
	every    []int // one vehicle each so many seconds, 0 for none
	call     bool
	served   []int
	stages   []int
	sequence []int
}

func (w *street) run(t testing.TB, controller, rulesName string, seconds int) {
	t.Helper()
	r := rules(t, rulesName)
	j := r.Apply(w.j)
	c := named(t, controller)
	s := timing.NewSequencer(j, r, epoch)
	n := len(j.Movements)
	w.waiting, w.since, w.worst, w.served, w.stages = make([]int, n), make([]int, n), make([]int, n), make([]int, n), make([]int, len(j.Stages))
	var m timing.Memory
	walked := false
	for sec := range seconds {
		now := epoch.Add(time.Duration(sec) * time.Second)
		f := traffic.Frame{Time: now, Interval: time.Second, Signal: s.Signal(now)}
		state := f.Signal.State
		for i := range n {
			if w.every[i] > 0 && sec%w.every[i] == 0 {
				w.waiting[i]++
			}
			passed := uint32(0)
			if state.At(j.Movements[i].Group).Go() && sec%2 == 0 && w.waiting[i] > 0 {
				w.waiting[i]--
				w.served[i]++
				w.since[i], passed = 0, 1
			}
			if w.waiting[i] > 0 {
				w.since[i]++
				w.worst[i] = max(w.worst[i], w.since[i])
			} else {
				w.since[i] = 0
			}
			f.Readings = append(f.Readings, traffic.Reading{Detector: j.Detectors[i].ID, Count: passed, Vehicles: uint32(w.waiting[i]), Halted: uint32(w.waiting[i])})
		}
		if state.At(4).Go() {
			walked = true
		}
		b := traffic.Reading{Detector: "b"}
		if w.call && !walked {
			b.Count = 1
		}
		f.Readings = append(f.Readings, b)
		v := timing.Observe(j, &f)
		before, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		m2, d := c.Next(j, r, m, v)
		again, d2 := c.Next(j, r, m, v)
		if stored(t, m2) != stored(t, again) || d != d2 {
			t.Fatalf("%s: got %+v, then %+v from the same input", controller, d, d2)
		}
		if after, err := json.Marshal(m); err != nil || string(after) != string(before) {
			t.Fatalf("%s changed the memory that it was given", controller)
		}
		// Each decision goes on from memory that has been stored.
		var kept timing.Memory
		if err := json.Unmarshal([]byte(stored(t, m2)), &kept); err != nil || stored(t, kept) != stored(t, m2) {
			t.Fatalf("memory does not survive storage: %v", err)
		}
		m = kept
		if err := s.Target(d.Stage); err != nil {
			t.Fatal(err)
		}
		s.Next(now)
		if k := s.Signal(now).Stage; k >= 0 {
			w.stages[k]++
			if len(w.sequence) == 0 || w.sequence[len(w.sequence)-1] != k {
				w.sequence = append(w.sequence, k)
			}
		}
	}
	if w.call && !walked {
		t.Errorf("%s: the call was never served", controller)
	}
}

func stored(t testing.TB, m timing.Memory) string {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestNobodyStarves: a heavy stream against a trickle, under each set of rules.
func TestNobodyStarves(t *testing.T) {
	for _, c := range []string{"maxpressure", "adaptive"} {
		for _, r := range []string{"free", "resco", "deployable"} {
			w := &street{j: crossing(), every: []int{2, 400, 2, 0}, call: true}
			w.run(t, c, r, 1500)
			for i, worst := range w.worst {
				if worst > 120 {
					t.Errorf("%s, %s: movement %d waited for %d s, want at most 120", c, r, i, worst)
				}
			}
			if w.served[1] == 0 {
				t.Errorf("%s, %s: got nobody served of the trickle", c, r)
			}
		}
	}
}

func TestActuated(t *testing.T) {
	// Nobody turns left and nobody walks: those stages are skipped.
	w := &street{j: crossing(), every: []int{9, 0, 9, 0}}
	w.run(t, "actuated", "free", 600)
	if w.stages[3] != 0 || w.stages[0] == 0 || w.stages[2] == 0 || w.stages[1] != 0 {
		t.Errorf("got seconds by stage %v, want 0 and 2 only", w.stages)
	}
	if w.worst[0] > 30 || w.worst[2] > 30 {
		t.Errorf("got waits of up to %v s, want gap-outs", w.worst)
	}
	// Everybody, all the time: the order of the plan, by max-out.
	w = &street{j: crossing(), every: []int{2, 2, 2, 2}, call: true}
	w.run(t, "actuated", "free", 900)
	cycle := ""
	for _, k := range w.sequence {
		cycle += fmt.Sprint(k)
	}
	if !strings.HasPrefix(cycle, "012") || !strings.Contains(cycle, "20") || strings.Contains(cycle, "02") || strings.Contains(cycle, "10") {
		t.Errorf("got the sequence %s, want the plan's order", cycle)
	}
	// Nobody but the north: it rests there.
	w = &street{j: crossing(), every: []int{5, 0, 0, 0}}
	w.run(t, "actuated", "field", 300)
	if len(w.sequence) != 1 || w.sequence[0] != 0 {
		t.Errorf("got the sequence %v, want rest in stage 0", w.sequence)
	}
}

func TestObserve(t *testing.T) {
	j := crossing()
	j.Detectors = append(j.Detectors,
		traffic.Detector{ID: "a0", Kind: traffic.Area, Lane: "n0", LengthCM: 9000, Movements: []int{0}, Group: -1},
		traffic.Detector{ID: "s2", Kind: traffic.StopLine, Lane: "e0", Movements: []int{2, 3}, Group: -1},
		traffic.Detector{ID: "u2", Kind: traffic.Advance, Lane: "e0", Movements: []int{2, 3}, Group: -1})
	if err := j.Check(); err != nil {
		t.Fatal(err)
	}
	f := &traffic.Frame{Time: epoch, Readings: []traffic.Reading{
		{Detector: "nobody's", Vehicles: 99},
		{Detector: "on0", Vehicles: 7, Halted: 3, HeadWaitMS: 4000, Count: 1, Priority: traffic.Bus},
		{Detector: "a0", Vehicles: 50, Halted: 50, Priority: traffic.Emergency},
		{Detector: "s2", Count: 2, OccupancyPermille: 600}, {Detector: "u2", Count: 3},
		{Detector: "xs", Vehicles: 4}, {Detector: "b", Count: 2},
	}}
	v := timing.Observe(j, f)
	want := []timing.MovementView{
		{Vehicles: 7, Halted: 3, Departed: 1, Shared: 1, HeadWaitMS: 4000, Present: true, ExitVehicles: 4, ExitCapacity: 10, Known: true, Counted: true, Oracle: true},
		{},
		{Arrived: 3, Departed: 2, Shared: 2, OccupancyPermille: 600, Present: true, Known: true},
		{Arrived: 3, Departed: 2, Shared: 2, OccupancyPermille: 600, Present: true, Known: true},
	}
	if !reflect.DeepEqual(v.Movements, want) {
		t.Errorf("got %+v, want %+v", v.Movements, want)
	}
	if !v.Calls[4] || v.Calls[0] || v.Priority[0] != traffic.Emergency {
		t.Errorf("got calls %v and priorities %v, want a call and an emergency", v.Calls, v.Priority)
	}
	if v := timing.Observe(j, nil); v.Movements[0].Known || !v.Calls[4] {
		t.Errorf("got %+v from no frame, want nothing known and pedestrians served", v)
	}
}

// TestAnyView: whatever a view says, controllers name a stage that exists, and
// do not choke on memory of another definition.
func TestAnyView(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	j := crossing()
	for _, name := range []string{"fixed", "actuated", "maxpressure", "adaptive"} {
		c := named(t, name)
		m := timing.Memory{Stage: 17, DecidedMS: 5, RedMS: []int64{1}}
		for range 5000 {
			f := &traffic.Frame{Time: time.UnixMilli(rng.Int64N(1 << 41)), Signal: traffic.Signal{
				Stage: rng.IntN(8) - 2, SinceMS: rng.Int64N(100_000), State: []traffic.State{"", "GGGGG", "Ggrrr", "xx"}[rng.IntN(4)]}}
			for _, d := range j.Detectors {
				f.Readings = append(f.Readings, traffic.Reading{Detector: d.ID, Count: rng.Uint32() >> rng.IntN(32), Vehicles: rng.Uint32() >> rng.IntN(32),
					Halted: rng.Uint32() >> rng.IntN(32), Priority: traffic.Priority(rng.IntN(3))})
			}
			var d timing.Decision
			if m, d = c.Next(j, rules(t, "free"), m, timing.Observe(j, f)); d.Stage < 0 || d.Stage >= len(j.Stages) || d.Rule == "" {
				t.Fatalf("%s: got %+v", name, d)
			}
		}
	}
}

func BenchmarkNext(b *testing.B) {
	j := crossing()
	for _, name := range []string{"fixed", "actuated", "maxpressure", "adaptive"} {
		b.Run("controller="+name, func(b *testing.B) {
			c, r := named(b, name), rules(b, "free")
			f := noButton(frame(j, epoch, 0, 20*time.Second, 3, 1, 4, 1))
			var m timing.Memory
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				f.Time = epoch.Add(time.Duration(i) * time.Second)
				m, _ = c.Next(j, r, m, timing.Observe(j, f))
			}
		})
	}
}

func BenchmarkSequencer(b *testing.B) {
	s := timing.NewSequencer(crossing(), rules(b, "free"), epoch)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := s.Target(i / 100 % 4); err != nil {
			b.Fatal(err)
		}
		s.Next(epoch.Add(time.Duration(i) * 100 * ms))
	}
}

// TestObserveWithout: what a failed detector says is left out as if it were not
// there; without another one that sees the stop line the movement is on recall.
func TestObserveWithout(t *testing.T) {
	j := crossing()
	j.Detectors = []traffic.Detector{
		{ID: "s0", Kind: traffic.StopLine, Lane: j.Movements[0].From, Movements: []int{0}, Group: -1},
		{ID: "a0", Kind: traffic.Area, Lane: j.Movements[0].From, LengthCM: 9000, Movements: []int{0}, Group: -1},
		{ID: "s2", Kind: traffic.StopLine, Lane: j.Movements[2].From, Movements: []int{2}, Group: -1},
		{ID: "u2", Kind: traffic.Advance, Lane: j.Movements[2].From, Movements: []int{2}, Group: -1},
		{ID: "u3", Kind: traffic.Advance, Lane: j.Movements[3].From, Movements: []int{3}, Group: -1},
		{ID: "b", Kind: traffic.Button, Group: 4},
	}
	f := &traffic.Frame{Time: epoch}
	for _, d := range j.Detectors {
		f.Readings = append(f.Readings, traffic.Reading{Detector: d.ID, Count: 2, OccupancyPermille: 1000, Vehicles: 4, Halted: 3, HeadWaitMS: 9000})
	}
	f.Readings[5] = traffic.Reading{Detector: "b"}
	for _, tc := range []struct {
		failed string
		recall []int
	}{{"", nil}, {"s0", nil}, {"a0", nil}, {"s0 a0", []int{0}}, {"u2", nil}, {"s2", []int{2}}, {"s2 u2", []int{2}}, {"u3", []int{3}}, {"b", nil}} {
		failed := func(d traffic.DetectorID) bool { return slices.Contains(strings.Fields(tc.failed), string(d)) }
		got := timing.ObserveWithout(j, f, failed)
		rest := *j
		rest.Detectors = slices.DeleteFunc(slices.Clone(j.Detectors), func(d traffic.Detector) bool { return failed(d.ID) })
		want := timing.Observe(&rest, f)
		for i := range want.Movements {
			if slices.Contains(tc.recall, i) {
				want.Movements[i].Known, want.Movements[i].Recall = false, true
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("without %q: got %+v, want %+v", tc.failed, got, want)
		}
		if want := strings.Contains(tc.failed, "b"); got.Calls[4] != want {
			t.Errorf("without %q: got pedestrians waiting %v, want %v", tc.failed, got.Calls[4], want)
		}
	}
	if !reflect.DeepEqual(timing.ObserveWithout(j, f, nil), timing.Observe(j, f)) {
		t.Error("with nothing failed: got another view")
	}
}

// TestRecall: a movement on recall has the plan's green while others wait, no
// longer; and is served when others never end.
func TestRecall(t *testing.T) {
	j := crossing()
	plan := j.Plan.Steps[0].DurationMS - j.Plan.Steps[0].IntergreenMS
	at := func(since int64, stage int) timing.View {
		v := timing.View{Now: epoch.Add(time.Duration(since) * ms), Movements: make([]timing.MovementView, len(j.Movements)),
			Calls: make([]bool, len(j.Groups)), Priority: make([]traffic.Priority, len(j.Movements)),
			Signal: traffic.Signal{State: j.Stages[stage].State, Stage: stage, SinceMS: since}}
		for i := range v.Movements {
			v.Movements[i] = timing.MovementView{Known: true, Shared: 1, Present: true, Vehicles: 2, Counted: true}
			if j.Stages[0].State.At(j.Movements[i].Group).Go() {
				v.Movements[i] = timing.MovementView{Recall: true}
			}
		}
		return v
	}
	for _, tc := range []struct {
		since int64
		stay  bool
	}{{plan - 1000, true}, {plan, false}} {
		m, _ := named(t, "actuated").Next(j, rules(t, "free"), timing.Memory{}, at(tc.since-5000, 0))
		_, d := named(t, "actuated").Next(j, rules(t, "free"), m, at(tc.since, 0))
		if got := d.Stage == 0; got != tc.stay {
			t.Errorf("green for %d ms of %d: got stage %d, %s; want it to stay: %v", tc.since, plan, d.Stage, d.Rule, tc.stay)
		}
	}
	// Max pressure: two vehicles each wait elsewhere; who is on recall is taken to
	// be one more with each six seconds of red.
	var m timing.Memory
	first := int64(-1)
	for since := int64(10_000); since < 60_000 && first < 0; since += 1000 {
		var d timing.Decision
		if m, d = named(t, "maxpressure").Next(j, rules(t, "free"), m, at(since, 2)); d.Stage == 0 {
			first = since
		}
	}
	if first < 0 {
		t.Error("max pressure: got no green for those on recall within 50 s")
	}
}
