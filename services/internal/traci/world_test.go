package traci

import (
	"math"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// open starts a world that the test closes.
func open(t testing.TB, s *Scenario, o Options) *World {
	t.Helper()
	w, err := Open(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// programState is what the map's own program shows at a time: SUMO's rule.
func programState(g logic, at time.Duration) traffic.State {
	var cycle time.Duration
	for _, p := range g.phases {
		cycle += p.duration
	}
	in := ((at-g.offset)%cycle + cycle) % cycle
	for _, p := range g.phases {
		if in < p.duration {
			return traffic.State(p.state)
		}
		in -= p.duration
	}
	return ""
}

func TestProgramShownByTimeEqualsBaseline(t *testing.T) {
	needSUMO(t)
	s := sharedScenario(t, "ingolstadt1")
	const steps = 600
	w := open(t, s, Options{Seed: 3, Sensing: SensingOracle})
	program := map[traffic.JunctionID]logic{}
	for _, g := range s.net.logics {
		program[traffic.JunctionID(g.id)] = g
	}
	for range steps {
		for _, j := range w.Junctions() {
			d, err := w.Driver(j.ID)
			if err != nil {
				t.Fatal(err)
			}
			want := programState(program[j.ID], time.Duration(w.Now().UnixMilli())*time.Millisecond)
			if err := d.Show(want); err != nil {
				t.Fatal(err)
			}
		}
		more, err := w.Step()
		if err != nil || !more {
			t.Fatalf("step at %s: more %v, %v", w.Now(), more, err)
		}
		for i, j := range w.Junctions() {
			d := &Driver{w, i}
			got, err := d.Observed()
			if err != nil {
				t.Fatal(err)
			}
			want := programState(program[j.ID], time.Duration(w.Now().UnixMilli())*time.Millisecond-s.StepLength)
			if got != want {
				t.Fatalf("%s: lamps of %s show %q, want %q", w.Now(), j.ID, got, want)
			}
		}
	}
	got, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	want, err := s.alone(t.Context(), 3, s.Begin+steps*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("driven %+v, alone %+v", got, want)
	if got.Trips != want.Trips || math.Abs(got.DelayS-want.DelayS) > 0.02*want.DelayS {
		t.Errorf("driven by its own program: %+v\nSUMO alone:                %+v\nwant the same trips and delays within 2 %%", got, want)
	}
}
