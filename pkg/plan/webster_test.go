package plan_test

import (
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/plan"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// two is two streets with two steps: yellow 3 s, all-red 1 s, minimum green 7 s,
// saturation 1800.
func two(t testing.TB) *traffic.Junction {
	t.Helper()
	j := &traffic.Junction{ID: "two", Timing: traffic.Timing{MinGreenMS: 7000, YellowMS: 3000, AllRedMS: 1000},
		Lanes:     []traffic.Lane{{ID: "n"}, {ID: "e"}, {ID: "out"}},
		Groups:    []traffic.Group{{Name: "NS", Kind: traffic.Vehicles}, {Name: "EW", Kind: traffic.Vehicles}},
		Movements: []traffic.Movement{{From: "n", To: "out", SaturationPerHour: 1800}, {From: "e", To: "out", Group: 1, SaturationPerHour: 1800}},
		Detectors: []traffic.Detector{{ID: "dn", Kind: traffic.StopLine, Lane: "n", Movements: []int{0}, Group: -1}, {ID: "de", Kind: traffic.StopLine, Lane: "e", Movements: []int{1}, Group: -1}},
		Conflicts: [][]int{{1}, {0}},
		Stages:    []traffic.Stage{{Name: "A", State: "Gr"}, {Name: "B", State: "rG"}},
		Plan: traffic.Plan{Name: "filed", OffsetMS: 70_000, Steps: []traffic.PlanStep{
			{Stage: 0, DurationMS: 40_000, IntergreenMS: 4000}, {Stage: 1, DurationMS: 40_000, IntergreenMS: 4000}}}}
	if err := j.Check(); err != nil {
		t.Fatal(err)
	}
	return j
}

// TestWebster compares with figures worked out by hand from the paper's formulas.
func TestWebster(t *testing.T) {
	for _, c := range []struct {
		name   string
		flows  []int
		change func(*traffic.Junction)
		cycle  int64
		greens []int64
		over   bool
	}{
		// L = 8 s, Y = 0.3 + 0.2: C = 17 / 0.5 = 34 s, raised to 40; greens share 32 s as 3 to 2.
		{"light", []int{540, 360}, nil, 40_000, []int64{19_200, 12_800}, false},
		// Y = 0.45 + 0.3 = 0.75: C = 68 s; 60 s of green as 3 to 2.
		{"ordinary", []int{810, 540}, nil, 68_000, []int64{36_000, 24_000}, false},
		// Y = 0.9: over; C = 120 s, 112 s of green as 2 to 1.
		{"nearly over", []int{1080, 540}, nil, 120_000, []int64{74_666, 37_334}, true},
		{"twice over", []int{1800, 1800}, nil, 120_000, []int64{56_000, 56_000}, true},
		{"nobody", []int{0, 0}, nil, 40_000, []int64{16_000, 16_000}, false},
		// 32 s as 20 to 1: the second keeps its minimum.
		{"lopsided", []int{720, 36}, nil, 40_000, []int64{25_000, 7000}, false},
		// The east's flow is not known: it keeps 36/80 of the cycle, at 85 %.
		{"unknown", []int{540, -1}, nil, 54_000, nil, false},
		{"maximum red", []int{1800, 1800}, func(j *traffic.Junction) { j.Timing.MaxRedMS = 60_000 }, 67_000, []int64{29_500, 29_500}, true},
		{"pedestrians", []int{360, 360}, func(j *traffic.Junction) {
			j.Groups = append(j.Groups, traffic.Group{Name: "walk", Kind: traffic.Pedestrians, MinGreenMS: 10_000, PedClearMS: 20_000})
			j.Conflicts = [][]int{{1}, {0, 2}, {1}}
			j.Stages[0].State, j.Stages[1].State = "GrG", "rGr"
			j.Plan.Steps[0].IntergreenMS = 21_000
		}, 42_000, []int64{10_000, 7000}, false}, // least 10+21 and 7+4
	} {
		t.Run(c.name, func(t *testing.T) {
			j := two(t)
			if c.change != nil {
				c.change(j)
			}
			p, made, err := plan.Webster(j, c.flows, plan.Options{})
			if err != nil {
				t.Fatal(err)
			}
			var greens []int64
			for _, s := range p.Steps {
				greens = append(greens, s.DurationMS-s.IntergreenMS)
			}
			if p.CycleMS() != c.cycle || c.greens != nil && !reflect.DeepEqual(greens, c.greens) || made.Over != c.over {
				t.Errorf("got cycle %d, greens %v, %+v; want %d, %v, over %v", p.CycleMS(), greens, made, c.cycle, c.greens, c.over)
			}
			if p.OffsetMS != 70_000%c.cycle {
				t.Errorf("got offset %d, want %d", p.OffsetMS, 70_000%c.cycle)
			}
		})
	}
	if _, _, err := plan.Webster(two(t), []int{1}, plan.Options{}); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v, want too few flows refused", err)
	}
}

// TestWebsterIsAlwaysSafe: whatever the flows, the plan is one that a unit takes.
func TestWebsterIsAlwaysSafe(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 2000 {
		j := two(t)
		j.Timing.MinGreenMS = int64(rng.IntN(12_000))
		j.Timing.YellowMS = int64(1 + rng.IntN(6000))
		j.Timing.AllRedMS = int64(rng.IntN(4000))
		j.Timing.MaxRedMS = int64(rng.IntN(2) * rng.IntN(200_000))
		j.Groups[1].MinGreenMS = int64(rng.IntN(20_000))
		for i := range j.Plan.Steps {
			j.Plan.Steps[i].DurationMS = 90_000
		}
		for i := range j.Movements {
			j.Movements[i].SaturationPerHour = rng.IntN(3000)
		}
		flows := []int{rng.IntN(5000) - 1, rng.IntN(5000) - 1}
		p, made, err := plan.Webster(j, flows, plan.Options{})
		if err != nil {
			t.Fatal(err)
		}
		b := traffic.Fallback{Junction: j.ID, Plan: p}
		if err := b.Fits(j); err != nil {
			t.Fatalf("%v of %+v, flows %v: %+v", err, j.Timing, flows, made)
		}
		for i, s := range p.Steps {
			if least := max(j.Timing.MinGreenMS, j.Groups[i].MinGreenMS); s.DurationMS-s.IntergreenMS < least {
				t.Fatalf("step %d: green %d, want at least %d", i, s.DurationMS-s.IntergreenMS, least)
			}
		}
		j.Plan = p
		if _, err := interlock.New(j, time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFits: a plan that does more than set times is refused.
func TestFits(t *testing.T) {
	j := two(t)
	for _, c := range []struct {
		want   string
		change func(*traffic.Fallback)
	}{
		{"", func(*traffic.Fallback) {}},
		{"junction", func(b *traffic.Fallback) { b.Junction = "other" }},
		{"only times may change", func(b *traffic.Fallback) { b.Plan.Steps = b.Plan.Steps[:1] }},
		{"plan.steps[0].stage: 1, the filed plan has 0", func(b *traffic.Fallback) { b.Plan.Steps[0].Stage = 1 }},
		{"intergreen_ms: 3999, the groups that end need 4000", func(b *traffic.Fallback) { b.Plan.Steps[1].IntergreenMS = 3999 }},
		{"below the minimum green", func(b *traffic.Fallback) { b.Plan.Steps[1].DurationMS = 10_000 }},
		{"at most 3600000", func(b *traffic.Fallback) { b.Plan.Steps[1].DurationMS = 1 << 60 }},
		{"offset_ms", func(b *traffic.Fallback) { b.Plan.OffsetMS = 80_000 }},
		{"offset_ms", func(b *traffic.Fallback) { b.Plan.OffsetMS = -1 }},
	} {
		b := &traffic.Fallback{Junction: j.ID, Plan: j.Plan}
		b.Plan.Steps = append([]traffic.PlanStep(nil), j.Plan.Steps...)
		c.change(b)
		switch err := b.Fits(j); {
		case c.want == "" && err != nil:
			t.Errorf("got %v, want the filed plan taken", err)
		case c.want != "" && (kind.Of(err) != kind.Invalid || err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

func TestFlows(t *testing.T) {
	j := two(t)
	f := plan.NewFlows(j)
	at := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	feed := func(d time.Duration, every int, failed func(traffic.DetectorID) bool) {
		for i := range int(d / time.Second) {
			at = at.Add(time.Second)
			fr := &traffic.Frame{Time: at, Interval: time.Second, Readings: []traffic.Reading{{Detector: "dn"}, {Detector: "de"}}}
			if i%every == 0 {
				fr.Readings[0].Count = 1
			}
			if i%(2*every) == 0 {
				fr.Readings[1].Count = 1
			}
			f.Observe(fr, failed)
		}
	}
	if got := f.PerHour(); !reflect.DeepEqual(got, []int{-1, -1}) {
		t.Errorf("before anything was counted got %v", got)
	}
	feed(15*time.Minute, 6, nil)
	if got := f.PerHour(); !reflect.DeepEqual(got, []int{600, 300}) || f.Windows() != 1 {
		t.Errorf("got %v of %d windows, want 600 and 300 of one", got, f.Windows())
	}
	feed(45*time.Minute, 3, nil)
	if got := f.PerHour(); !reflect.DeepEqual(got, []int{1050, 525}) {
		t.Errorf("got %v, want the mean of the hour, 1050 and 525", got)
	}
	// A detector that fails is not counted, and after half an hour not known.
	feed(45*time.Minute, 3, func(d traffic.DetectorID) bool { return d == "de" })
	if got := f.PerHour(); !reflect.DeepEqual(got, []int{1200, -1}) || f.Windows() != 4 {
		t.Errorf("got %v of %d windows, want the failed one unknown", got, f.Windows())
	}
}
