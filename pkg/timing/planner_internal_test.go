package timing

import (
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// readyToSearch is a scratch that is about to search: a crossing with three stages and
// some thirty vehicles.
func readyToSearch(tb testing.TB) *scratch {
	tb.Helper()
	j := &traffic.Junction{ID: "J", Conflicts: [][]int{{2, 3}, {2, 3}, {0, 1}, {0, 1}}, Yields: [][]int{nil, {0}, nil, {2}},
		Stages: []traffic.Stage{{State: "Ggrr"}, {State: "rGrr"}, {State: "rrGg"}},
		Timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
		Plan:   traffic.Plan{Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 30_000, IntergreenMS: 3000}}}}
	for i, id := range []traffic.LaneID{"n0", "n1", "e0", "e1"} {
		j.Groups = append(j.Groups, traffic.Group{Kind: traffic.Vehicles})
		j.Lanes = append(j.Lanes, traffic.Lane{ID: id, LengthCM: 20000, SpeedCMS: 1389}, traffic.Lane{ID: "to-" + id, LengthCM: 20000, SpeedCMS: 1389})
		j.Movements = append(j.Movements, traffic.Movement{From: id, To: "to-" + id, Group: i, SaturationPerHour: 1900})
	}
	r, err := RulesNamed("free")
	if err != nil {
		tb.Fatal(err)
	}
	p := new(scratch)
	p.begin(modelOf(j, r))
	for l := range p.m.lanes {
		p.beg[l] = int32(len(p.arr))
		for i := range 8 {
			p.add(arrival(int32(100+(750+400*l)*i), 0, 1389), unit, int16(l), i > 4)
		}
		p.end[l] = int32(len(p.arr))
	}
	return p
}

func TestSearchDoesNotAllocate(t *testing.T) {
	p := readyToSearch(t)
	p.search(0)
	if p.best <= 0 || p.nodes == 0 {
		t.Fatalf("got best %d after %d stages, want a plan", p.best, p.nodes)
	}
	if n := testing.AllocsPerRun(20, func() { p.search(0) }); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

// The bound is what pruning rests on: no plan may cost less.
func TestBoundIsBelowEveryPlan(t *testing.T) {
	p := readyToSearch(t)
	s := &p.states[0]
	p.initial(s)
	bound := p.bound(s, 0, nil, 0)
	p.search(0)
	if p.best < bound {
		t.Errorf("got a plan that costs %d, below the bound of %d", p.best, bound)
	}
	for k, c := range p.leave {
		if c < bound {
			t.Errorf("got a plan by stage %d that costs %d, below the bound of %d", k, c, bound)
		}
	}
}

func TestArrival(t *testing.T) {
	for _, c := range []struct{ dist, speed, want int32 }{
		{0, 0, 0},
		{1389, 1389, 1000},
		{20000, 1389, 14398},
		{130, 0, 1000}, // half a·t²
		{100_000, 0, 74664},
	} {
		if got := arrival(c.dist, c.speed, 1389); got < c.want-8 || got > c.want+8 {
			t.Errorf("%d cm at %d cm/s: got %d ms, want about %d", c.dist, c.speed, got, c.want)
		}
	}
	for n := int64(0); n < 100_000; n += 37 {
		if r := isqrt(n); r*r > n || (r+1)*(r+1) <= n {
			t.Fatalf("root of %d: got %d", n, r)
		}
	}
}

func BenchmarkSearch(b *testing.B) {
	p := readyToSearch(b)
	b.ReportAllocs()
	start := time.Now()
	n := 0
	for b.Loop() {
		p.search(0)
		n++
	}
	b.ReportMetric(float64(p.nodes), "stages/op")
	b.ReportMetric(float64(n)/time.Since(start).Seconds(), "junctions/s")
}
