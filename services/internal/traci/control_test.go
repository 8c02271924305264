package traci

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// control runs a scenario to its end, or for at most limit steps where that is
// not 0, under one controller at every junction.
func control(t testing.TB, s *Scenario, controller string, r timing.Rules, o Options, limit int) Result {
	t.Helper()
	c, err := timing.Named(controller)
	if err != nil {
		t.Fatal(err)
	}
	w := open(t, s, o)
	type unit struct {
		j      *traffic.Junction
		d      *Driver
		seq    *timing.Sequencer
		memory timing.Memory
	}
	var units []*unit
	for _, j := range w.Junctions() {
		d, err := w.Driver(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		u := &unit{j: j, d: d, seq: timing.NewSequencer(j, r, w.Now())}
		seen, err := d.Observed()
		if err != nil {
			t.Fatal(err)
		}
		u.seq.Resume(seen, w.Now())
		units = append(units, u)
	}
	for step, more := 0, true; more && (limit == 0 || step < limit); step++ {
		now := w.Now()
		for _, u := range units {
			readings, err := u.d.Sense()
			if err != nil {
				t.Fatal(err)
			}
			f := traffic.Frame{Junction: u.j.ID, Time: now, Interval: w.StepLength(), Readings: readings, Signal: u.seq.Signal(now)}
			var decision timing.Decision
			u.memory, decision = c.Next(u.j, r, u.memory, timing.Observe(u.j, &f))
			if err := u.seq.Target(decision.Stage); err != nil {
				t.Fatal(err)
			}
			if err := u.d.Show(u.seq.Next(now)); err != nil {
				t.Fatal(err)
			}
		}
		if more, err = w.Step(); err != nil {
			t.Fatal(err)
		}
	}
	res, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func rules(t testing.TB, name string) timing.Rules {
	t.Helper()
	r, err := timing.RulesNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestExperiment prints results of the runs that STOPLINE_TRACI_RUNS names:
// map/controller/rules/sensing/seed, separated by blanks.
func TestExperiment(t *testing.T) {
	runs := strings.Fields(os.Getenv("STOPLINE_TRACI_RUNS"))
	if len(runs) == 0 {
		t.Skip("prints the runs that STOPLINE_TRACI_RUNS names, as in ingolstadt1/fixed/field/detectors/1")
	}
	needSUMO(t)
	for _, name := range runs {
		f := strings.Split(name, "/")
		if len(f) != 5 {
			t.Fatalf("%q: want map/controller/rules/sensing/seed", name)
		}
		s := sharedScenario(t, f[0])
		seed, err := strconv.ParseInt(f[4], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		var res Result
		if f[1] == "alone" {
			if res, err = Baseline(t.Context(), s, seed); err != nil {
				t.Fatal(err)
			}
		} else {
			r := rules(t, f[2])
			o := Options{Sensing: Sensing(f[3]), Seed: seed,
				Limits: Limits{r.MinGreenMS, r.YellowMS, r.AllRedMS, r.MaxRedMS}}
			res = control(t, s, f[1], r, o, 0)
		}
		b, err := json.Marshal(res)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f s delay, %.0f steps/s: %s", name, res.DelayS, (s.End-s.Begin).Seconds()/res.WallS, b)
	}
}

func TestFixedControllerIsNearTheMapsOwnProgram(t *testing.T) {
	needSUMO(t)
	limit := 0
	if testing.Short() {
		limit = 300
	}
	s := sharedScenario(t, "ingolstadt1")
	got := control(t, s, "fixed", rules(t, "field"), Options{Seed: 1}, limit)
	end := s.End
	if limit > 0 {
		end = s.Begin + time.Duration(limit)*s.StepLength
	}
	want, err := s.alone(t.Context(), 1, end)
	if err != nil {
		t.Fatal(err)
	}
	if d := got.DelayS / want.DelayS; d < 0.93 || d > 1.07 {
		t.Errorf("fixed controller: delay %.1f s, SUMO alone %.1f s: want them within 7 %%", got.DelayS, want.DelayS)
	}
}
