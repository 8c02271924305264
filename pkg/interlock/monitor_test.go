package interlock_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func junction(t testing.TB, name string) *traffic.Junction {
	t.Helper()
	for _, j := range shapes() {
		if string(j.ID) == name {
			return j
		}
	}
	t.Fatalf("no shape %q", name)
	return nil
}

// bench is a monitor with a clock that the test moves.
type bench struct {
	t    testing.TB
	m    *interlock.Monitor
	now  time.Time
	step time.Duration
	trip *interlock.Trip
}

func newBench(t testing.TB, shape string, step time.Duration) *bench {
	t.Helper()
	m, err := interlock.New(junction(t, shape), epoch)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, m: m, now: epoch, step: step}
	return b
}

// want asks for a state for that long and checks what is shown in the end.
func (b *bench) want(s traffic.State, d time.Duration, shown traffic.State) *bench {
	b.t.Helper()
	b.pass(s, d)
	if got := b.m.Shown(); got != shown {
		b.t.Errorf("at %v wanted %q: got %q shown, want %q", b.now.Sub(epoch), s, got, shown)
	}
	return b
}

// pass asks for a state for that long.
func (b *bench) pass(s traffic.State, d time.Duration) *bench {
	b.t.Helper()
	for end := b.now.Add(d); b.now.Before(end); {
		b.now = b.now.Add(b.step)
		_, trip := b.m.Filter(b.now, s)
		if trip != nil {
			if b.trip != nil {
				b.t.Errorf("tripped a second time: %v", trip)
			}
			b.trip = trip
		}
	}
	return b
}

func (b *bench) tripped(rule string, groups ...int) {
	b.t.Helper()
	switch {
	case rule == "" && b.trip != nil:
		b.t.Errorf("got trip %v, want none", b.trip)
	case rule == "":
	case b.trip == nil:
		b.t.Errorf("got no trip, want %s (refused %v)", rule, b.m.Counts().Refused)
	case b.trip.Rule != rule || len(groups) > 0 && !reflect.DeepEqual(b.trip.Groups, groups):
		b.t.Errorf("got trip %s of groups %v (%s), want %s of %v", b.trip.Rule, b.trip.Groups, b.trip, rule, groups)
	}
}

const ms = time.Millisecond

// TestEachRule breaks each rule for long enough to trip.
func TestEachRule(t *testing.T) {
	rest := 10 * time.Second // long enough for any start
	for _, c := range []struct {
		rule, shape string
		groups      []int
		lead        []traffic.State // lawful, each for the rest
		wrong       traffic.State
	}{
		{interlock.RuleConflict, "cross", []int{0, 1}, []traffic.State{"rr", "Gr"}, "GG"},
		{interlock.RuleYield, "SUMO-like", []int{1, 2}, []traffic.State{"rrrrrrr", "GgGgrrr"}, "GGGgrrr"},
		{interlock.RuleClearance, "cross", []int{0, 1}, []traffic.State{"rr", "Gr"}, "yG"},
		{interlock.RuleYellow, "cross", []int{0}, []traffic.State{"rr", "Gr"}, "rr"},
		{interlock.RulePedClear, "pedestrians and bus", []int{2}, []traffic.State{"rrrrrr", "rrGrrr"}, "rrrrrr"},
		{interlock.RuleSequence, "pedestrians and bus", []int{2}, []traffic.State{"rrrrrr", "rrGrrr"}, "rryrrr"},
		{interlock.RuleSequence, "cross", []int{0}, []traffic.State{"rr"}, "cr"},
		{interlock.RuleDark, "cross", []int{1}, []traffic.State{"rr", "Gr"}, "GO"},
		{interlock.RuleFlash, "cross", nil, []traffic.State{"rr", "Gr"}, "Gx"},
		{interlock.RuleMalformed, "cross", nil, []traffic.State{"rr", "Gr"}, "G"},
		{interlock.RuleMalformed, "cross", []int{1}, []traffic.State{"rr", "Gr"}, "G?"},
	} {
		t.Run(fmt.Sprintf("%s %s", c.rule, c.wrong), func(t *testing.T) {
			b := newBench(t, c.shape, 10*ms)
			for _, s := range c.lead {
				b.want(s, rest, s)
			}
			b.tripped("")
			last := b.m.Shown()
			b.want(c.wrong, 190*ms, last).tripped("")
			b.pass(c.wrong, 260*ms).tripped(c.rule, c.groups...)
			if b.m.Tripped() == nil {
				t.Errorf("got no latched trip after 450 ms of %q", c.wrong)
			}
			for g := range len(b.m.Shown()) {
				if b.m.Shown().At(g).Go() {
					t.Errorf("got %q after the trip, want no green", b.m.Shown())
				}
			}
			b.want(c.lead[0], 20*time.Second, traffic.AllOf(traffic.FlashRed, len(last)))
			if n := b.m.Counts(); n.Trips != 1 || n.Refused[c.rule] < 30 {
				t.Errorf("got counts %+v, want one trip and its refusals", n)
			}
		})
	}
}

// TestTooSoon covers the rules about durations: the state is right, the time is
// not. It is held until it is right, and the wait is no fault while short.
func TestTooSoon(t *testing.T) {
	b := newBench(t, "cross", 10*ms)
	b.want("Gr", 200*ms, "rr").want("rr", 3900*ms, "rr").want("Gr", 10*ms, "Gr")
	b.want("Gr", 4800*ms, "Gr").want("yr", 180*ms, "Gr").want("yr", 20*ms, "yr")
	b.want("yr", 2850*ms, "yr").want("rr", 130*ms, "yr").want("rr", 20*ms, "rr")
	b.want("rr", 850*ms, "rr").want("rG", 130*ms, "rr").want("rG", 20*ms, "rG")
	b.tripped("")
	got := b.m.Counts().Refused
	for _, rule := range []string{interlock.RuleStart, interlock.RuleMinGreen, interlock.RuleYellow, interlock.RuleClearance} {
		if got[rule] == 0 {
			t.Errorf("got %v refusals, want some of %s", got, rule)
		}
	}
	b.want("ry", 450*ms, "ry").tripped(interlock.RuleMinGreen, 1)
}

func TestYellowTakenBack(t *testing.T) {
	b := newBench(t, "cross", 10*ms)
	b.want("rr", 6*time.Second, "rr").want("Gr", 6*time.Second, "Gr").want("yr", 500*ms, "yr")
	b.want("Gr", 190*ms, "yr").tripped("")
	b.want("Gr", 260*ms, "yr").tripped(interlock.RuleYellow, 0)
}

func TestOneSecondSteps(t *testing.T) {
	b := newBench(t, "cross", time.Second)
	b.want("rr", 6*time.Second, "rr").want("Gr", 6*time.Second, "Gr")
	b.want("GG", time.Second, "Gr").tripped("")
	b.want("Gr", time.Second, "Gr").tripped("")
	b.want("GG", time.Second, "Gr").tripped("")
	b.want("GG", time.Second, "yr").tripped(interlock.RuleConflict, 0, 1)
	if want := `conflict: groups 0 and 1 conflict and would show G and G, for 1000 ms`; b.trip.String() != want {
		t.Errorf("got %q, want %q", b.trip, want)
	}
}

func TestOrderedFlash(t *testing.T) {
	b := newBench(t, "cross", 100*ms)
	b.want("rr", 6*time.Second, "rr").want("Gr", 2*time.Second, "Gr")
	b.want("xx", 100*ms, "yr").want("xx", 3000*ms, "rr").want("xx", 1100*ms, "xx")
	b.want("rr", 100*ms, "rr").want("rr", 3700*ms, "rr").want("Gr", 200*ms, "rr").want("Gr", 200*ms, "Gr")
	b.tripped("")
}

func TestReset(t *testing.T) {
	b := newBench(t, "cross", 100*ms)
	fails := func(by string, k kind.Kind, text string) {
		t.Helper()
		err := b.m.Reset(b.now, by)
		if err == nil || kind.Of(err) != k || !strings.Contains(err.Error(), text) {
			t.Errorf("reset by %q: got %v, want %v saying %q", by, err, k, text)
		}
	}
	fails("A. Person", kind.Conflict, "has not tripped")
	b.want("GG", time.Second, "rr").tripped(interlock.RuleConflict)
	fails("", kind.Invalid, "needs the name")
	b.want("rr", 2*time.Second, "xx")
	if err := b.m.Accept(0); kind.Of(err) != kind.Conflict {
		t.Errorf("accept while tripped: got %v, want a conflict", err)
	}
	if err := b.m.Resume(b.now, "Gr"); kind.Of(err) != kind.Conflict {
		t.Errorf("resume while tripped: got %v, want a conflict", err)
	}
	if err := b.m.Reset(b.now, "A. Person"); err != nil {
		t.Fatal(err)
	}
	b.trip = nil
	b.want("rr", 3900*ms, "rr").want("Gr", 100*ms, "rr").want("Gr", 100*ms, "Gr").tripped("")

	b.want("GG", 500*ms, "yr")
	fails("A. Person", kind.Conflict, "on its way to flashing")
}

func TestResume(t *testing.T) {
	b := newBench(t, "cross", 100*ms)
	if err := b.m.Resume(epoch, "GG"); kind.Of(err) != kind.Invalid || err == nil || !strings.Contains(err.Error(), "groups 0 and 1 conflict") {
		t.Errorf("got %v, want the conflict", err)
	}
	if err := b.m.Resume(epoch, "yr"); err != nil {
		t.Fatal(err)
	}
	if got := b.m.Shown(); got != "yr" {
		t.Errorf("got %q shown, want yr", got)
	}
	b.want("yr", 3000*ms, "yr").want("rr", 200*ms, "rr").want("rr", 900*ms, "rr").want("rG", 200*ms, "rG").tripped("")
}

func TestAccept(t *testing.T) {
	j := junction(t, "SUMO-like")
	m, err := interlock.New(j, epoch)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Accept(6); kind.Of(err) != kind.NotFound || !strings.Contains(err.Error(), "stages 0 to 5") {
		t.Errorf("got %v, want not found", err)
	}
	// A definition is checked when it is filed; one changed afterwards is not.
	j.Stages[0].State, j.Stages[1].State = "GGGgrrr", "GgGgGrr"
	for k, want := range []string{`groups 1 "NL" and 2 "S" need one of them to yield`, `groups 0 "N" and 4 "E" conflict; groups 1 "NL" and 4 "E" conflict`} {
		if err := m.Accept(k); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("stage %d: got %v, want %q", k, err, want)
		}
	}
	if err := m.Accept(2); err != nil {
		t.Errorf("got %v, want stage 2 accepted", err)
	}
	if _, err := interlock.New(j, epoch); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "conflicting groups must not be green together") {
		t.Errorf("got %v, want the definition refused", err)
	}
}

func TestMaxRed(t *testing.T) {
	for _, trips := range []bool{false, true} {
		b := newBench(t, "cross", time.Second)
		b.m.TripOnMaxRed(trips)
		b.want("rr", 6*time.Second, "rr").want("Gr", 61*time.Second, "Gr").tripped("")
		if !trips {
			b.want("Gr", 100*time.Second, "Gr").tripped("")
		} else {
			b.want("Gr", time.Second, "yr").tripped(interlock.RuleMaxRed, 1)
		}
		if got := b.m.Counts().MaxRed; got != 1 {
			t.Errorf("got %d reds counted, want 1", got)
		}
	}
}

// TestClockJumps: the clock jumps in the middle of a yellow, and of an all-red.
// Neither ends before its true time, nor does the monitor trip.
func TestClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{-time.Second, time.Second, -time.Hour, time.Hour, -8760 * time.Hour, 8760 * time.Hour, 999 * ms} {
		for _, step := range []time.Duration{10 * ms, 100 * ms, time.Second} {
			b := newBench(t, "cross", step)
			b.want("rr", 6*time.Second, "rr").want("Gr", 6*time.Second, "Gr").want("yr", time.Second, "yr")
			b.now = b.now.Add(jump)
			b.want("yr", 2*time.Second-step, "yr")
			b.want("rr", step, "yr") // three seconds of yellow would end with the next step
			b.tripped("")
			if jump < 0 {
				b.want("yr", step, "yr") // the step with the jump back did not count
			}
			b.want("rr", step, "rr").tripped("")
		}
	}
}

func TestClockStandsStillOrRunsBack(t *testing.T) {
	for _, dt := range []time.Duration{0, -time.Second} {
		b := newBench(t, "cross", 100*ms)
		b.want("rr", 6*time.Second, "rr").want("Gr", 6*time.Second, "Gr").want("yr", 100*ms, "yr")
		for range 1000 {
			b.now = b.now.Add(dt)
			if show, trip := b.m.Filter(b.now, "rG"); show != "yr" || trip != nil {
				t.Fatalf("got %q, %v, want the yellow held", show, trip)
			}
		}
	}
}

func TestSupervise(t *testing.T) {
	type seen struct {
		s traffic.State
		n int
	}
	for _, c := range []struct {
		name string
		step time.Duration
		seen []seen
		rule string
	}{
		// A yellow of 3 s is seen twice or three times at one look a second.
		{"lawful", time.Second, []seen{{"rr", 3}, {"Gr", 8}, {"yr", 2}, {"rr", 1}, {"rG", 5}}, ""},
		{"conflict", 100 * ms, []seen{{"Gr", 90}, {"GG", 5}}, interlock.RuleConflict},
		{"glitch", 10 * ms, []seen{{"Gr", 900}, {"GG", 19}, {"Gr", 10}, {"OO", 19}, {"Gr", 10}}, ""},
		{"no yellow", 100 * ms, []seen{{"Gr", 90}, {"rr", 5}}, interlock.RuleYellow},
		{"short yellow", 100 * ms, []seen{{"Gr", 90}, {"yr", 20}, {"rr", 5}}, interlock.RuleYellow},
		{"no all-red", 100 * ms, []seen{{"Gr", 90}, {"yr", 31}, {"rG", 5}}, interlock.RuleClearance},
		{"flashing by itself", 100 * ms, []seen{{"Gr", 10}, {"xx", 100}}, ""},
		{"from flashing to green", 100 * ms, []seen{{"xx", 100}, {"Gr", 5}}, interlock.RuleSequence},
		{"begins in conflict", 100 * ms, []seen{{"GG", 6}}, interlock.RuleConflict},
		{"dark", 100 * ms, []seen{{"Gr", 10}, {"GO", 5}}, interlock.RuleDark},
	} {
		b := newBench(t, "cross", c.step)
		for _, s := range c.seen {
			for range s.n {
				b.now = b.now.Add(b.step)
				if trip := b.m.Supervise(b.now, s.s); trip != nil {
					b.trip = trip
				}
			}
		}
		t.Run(c.name, func(t *testing.T) {
			b.t = t
			b.tripped(c.rule)
			if b.trip != nil {
				if err := b.m.Reset(b.now, "A. Person"); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func BenchmarkFilter(b *testing.B) {
	for _, j := range shapes() {
		b.Run("shape="+strings.ReplaceAll(string(j.ID), " ", "-"), func(b *testing.B) {
			m, err := interlock.New(j, epoch)
			if err != nil {
				b.Fatal(err)
			}
			seq := timing.NewSequencer(j, timing.Rules{}, epoch)
			wants := make([]traffic.State, 4000)
			for i := range wants {
				if err := seq.Target(i / 150 % len(j.Stages)); err != nil {
					b.Fatal(err)
				}
				wants[i] = seq.Next(epoch.Add(time.Duration(i) * 100 * ms))
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				m.Filter(epoch.Add(time.Duration(i)*100*ms), wants[i%len(wants)])
			}
		})
	}
}
