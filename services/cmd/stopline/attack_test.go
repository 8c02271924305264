package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/roadside"
)

// attackTest are the attacks of the threat table that one device can make, with
// the bars for them.
var attackTests = []struct {
	name string
	// most is by how much the mean delay may rise.
	most float64
	// flagged says that a word on one of the detectors must come within so many
	// cycles of the filed plan.
	flagged float64
	// alone says that the unit cannot be heard, and runs its own plan.
	alone bool
	// short is for the test that runs with all others.
	short bool
}{
	{name: "late-arrival", most: 0.10},
	{name: "ghosts", most: 0.10, short: true},
	{name: "stuck-on", most: math.Inf(1), flagged: 3, short: true},
	{name: "stuck-off", most: math.Inf(1), flagged: 3},
	{name: "bias", most: math.Inf(1), flagged: 3, short: true},
	{name: "blind", most: math.Inf(1)},
	{name: "clock=1s", most: math.Inf(1), short: true},
	// Commands seem to come from the future, by more than a unit bears.
	{name: "clock=-1s", most: math.Inf(1), alone: true, short: true},
	{name: "clock=1h", most: math.Inf(1), alone: true},
	{name: "clock=-1h", most: math.Inf(1), alone: true},
	{name: "clock=8760h", most: math.Inf(1), alone: true},
	{name: "clock=-8760h", most: math.Inf(1), alone: true, short: true},
}

// TestAttacks runs some for a minute through every service: whatever a unit
// signs, nothing unsafe is shown, and who cannot be heard goes on alone.
func TestAttacks(t *testing.T) {
	config := shared(t, "ingolstadt1")
	processTest(t)
	for _, a := range attackTests {
		if !a.short {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			s, _ := simulateInto(t, "--config", config, "--rules", "deployable", "--for", "75s", "--attack", a.name, "--attack-after", "30s", "--pipeline")
			if s.InterlockTrips != 0 || s.Attack != a.name || s.Trips == 0 {
				t.Errorf("got %+v, want no trip of the interlock", s)
			}
			if a.alone != (s.Fallbacks > 0) || a.alone != (s.StaleSteps > 0) {
				t.Errorf("got %d fallbacks and %d stale steps, want some only where nobody can hear the unit", s.Fallbacks, s.StaleSteps)
			}
		})
	}
}

// TestAttacksInFull measures whole hours against the bars. `make attacks` runs
// it; STOPLINE_ATTACKS says with how many seeds.
func TestAttacksInFull(t *testing.T) {
	seeds, err := strconv.Atoi(os.Getenv("STOPLINE_ATTACKS"))
	if err != nil || seeds < 1 {
		t.Skip("takes an hour and more; make attacks, or STOPLINE_ATTACKS=N for N seeds")
	}
	controller := os.Getenv("STOPLINE_ATTACK_CONTROLLER")
	if controller == "" {
		controller = "maxpressure"
	}
	config := shared(t, "ingolstadt1")
	run := func(seed int, controller, attack string, pipeline bool) simulated {
		t.Helper()
		r, err := simulate(t.Context(), simulateOptions{config: config, controller: controller, rules: "deployable", sensing: "detectors",
			seed: int64(seed), attack: attack, attackAfter: 5 * time.Minute, pipeline: pipeline})
		if err != nil {
			t.Fatal(err)
		}
		if r.InterlockTrips != 0 {
			t.Errorf("%s, seed %d: %d trips", attack, seed, r.InterlockTrips)
		}
		return r
	}
	base, fixed := make([]float64, seeds), make([]float64, seeds)
	for i := range seeds {
		base[i] = run(i+1, controller, "", true).DelayS
		fixed[i] = run(i+1, "fixed", "", false).DelayS
	}
	for _, a := range attackTests {
		t.Run(a.name, func(t *testing.T) {
			ratios := make([]float64, seeds)
			var worst, mean, plain float64
			for i := range seeds {
				r := run(i+1, controller, a.name, true)
				ratios[i] = r.DelayS/base[i] - 1
				mean += r.DelayS / float64(seeds)
				plain += fixed[i] / float64(seeds)
				if a.flagged > 0 { // otherwise worst stays 0
					after := math.Inf(1)
					if r.FlaggedRule != "" {
						after = r.FlaggedS / r.CycleS
					}
					worst = max(worst, after)
				}
			}
			m, bound := meanBound(ratios)
			t.Logf("%s: delay %+.1f %%, at most %+.1f %% (95 %%); %.1f s, the fixed plan %.1f s; flagged within %.1f cycles", a.name, 100*m, 100*bound, mean, plain, worst)
			if bound > a.most {
				t.Errorf("delay rises by up to %.1f %%, want at most %.0f %%", 100*bound, 100*a.most)
			}
			if mean > 1.05*plain {
				t.Errorf("delay %.1f s, the fixed plan has %.1f s: more than 5 %% worse", mean, plain)
			}
			if worst > a.flagged {
				t.Errorf("flagged after %.1f cycles, want %.0f", worst, a.flagged)
			}
		})
	}
}

// student are the one-sided 95 % points of Student's distribution for 1 to 9
// degrees of freedom.
var student = []float64{6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833}

// meanBound returns the mean of paired differences and its upper 95 % bound.
func meanBound(x []float64) (mean, bound float64) {
	n := float64(len(x))
	for _, v := range x {
		mean += v / n
	}
	if len(x) < 2 {
		return mean, mean
	}
	var sum float64
	for _, v := range x {
		sum += (v - mean) * (v - mean)
	}
	return mean, mean + student[min(len(x)-2, len(student)-1)]*math.Sqrt(sum/(n-1)/n)
}

func TestMeanBound(t *testing.T) {
	m, b := meanBound([]float64{1, 2, 3})
	if math.Abs(m-2) > 1e-9 || math.Abs(b-(2+2.920/math.Sqrt(3))) > 1e-9 {
		t.Errorf("got %v, %v", m, b)
	}
}

func TestAttackRefused(t *testing.T) {
	for _, c := range [][2]string{
		{"earthquake", "must be one of late-arrival, ghosts, stuck-on, stuck-off, bias, blind, clock=SHIFT"},
		{"clock=", "must be shifted by a duration"}, {"clock=0s", "must be shifted by a duration"},
	} {
		wantExit(t, inside(t, "simulate", "--config", cityName, "--for", "1s", "--attack", c[0]), exitUsage, c[1])
	}
	wantExit(t, inside(t, "simulate", "--config", cityName, "--for", "1s", "--attack", "bias", "--attack-at", "h9999"), exitUsage, "no such junction")
}

// quiet is a cabinet whose detectors say the same each time.
type quiet struct {
	roadside.Driver
	r []traffic.Reading
}

func (q quiet) Sense() ([]traffic.Reading, error) { return q.r, nil }

// TestAttacksFalsify: each changes what it says it does, from its time on, and
// nothing else; what the driver gave is not written to.
func TestAttacksFalsify(t *testing.T) {
	w, err := openWorld(context.Background(), worldOptions{config: cityName})
	if err != nil {
		t.Fatal(err)
	}
	j := w.Junctions()[0]
	begins := time.Unix(1000, 0)
	for _, name := range attackNames {
		a, err := newAttack(name, j.ID, begins, []*traffic.Junction{j})
		if err != nil {
			t.Fatal(err)
		}
		q := quiet{}
		for _, d := range j.Detectors {
			r := traffic.Reading{Detector: d.ID, Count: 2, OccupancyPermille: 400, SpeedCMS: 900}
			if d.Kind == traffic.Area {
				r.Vehicles, r.Halted = 4, 4
			}
			q.r = append(q.r, r)
		}
		now := begins.Add(-time.Second)
		d := a.on(j, q, func() time.Time { return now })
		got, _ := d.Sense()
		if fmt.Sprint(got) != fmt.Sprint(q.r) {
			t.Errorf("%s: before its time got %v", name, got)
		}
		now = begins
		before := fmt.Sprint(q.r)
		changed := map[int]bool{}
		for range 20 {
			got, _ = d.Sense()
			for i := range got {
				if !reflect.DeepEqual(got[i], q.r[i]) {
					changed[i] = true
				}
			}
		}
		if fmt.Sprint(q.r) != before {
			t.Errorf("%s: wrote to what the driver gave", name)
		}
		targets := map[int]bool{}
		for _, i := range a.targets {
			targets[i] = true
		}
		for i := range changed {
			if !targets[i] {
				t.Errorf("%s: changed detector %d, its targets are %v", name, i, a.targets)
			}
		}
		if len(changed) == 0 || (len(targets) < 2) != (name == "bias" || name == "stuck-on" || name == "stuck-off") {
			t.Errorf("%s: changed %v of %v", name, changed, a.targets)
		}
		if other := a.on(&traffic.Junction{ID: "other"}, q, nil); fmt.Sprintf("%T", other) != "main.quiet" {
			t.Errorf("%s: another junction is attacked too", name)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}
