package health

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var epoch = time.Date(2026, 11, 22, 6, 0, 0, 0, time.UTC)

// crossing has two lanes in, each with three detectors, two out, a bus lane, a
// button, an oracle and a loop that belongs to no movement.
func crossing() *traffic.Junction {
	j := &traffic.Junction{
		ID: "J1",
		Lanes: []traffic.Lane{{ID: "n", LengthCM: 20000, Capacity: 26}, {ID: "e", LengthCM: 20000, Capacity: 26}, {ID: "b", LengthCM: 20000, Capacity: 26},
			{ID: "s", LengthCM: 20000, Capacity: 26}, {ID: "w", LengthCM: 20000, Capacity: 26}, {ID: "far", LengthCM: 20000, Capacity: 26}},
		Groups: []traffic.Group{{Name: "n", Kind: traffic.Vehicles}, {Name: "e", Kind: traffic.Vehicles}, {Name: "walk", Kind: traffic.Pedestrians}, {Name: "bus", Kind: traffic.Buses}},
		Movements: []traffic.Movement{{From: "n", To: "s", Group: 0}, {From: "e", To: "w", Group: 1}, {From: "e", To: "s", Group: 1},
			{From: "b", To: "s", Group: 3}},
		Conflicts: [][]int{{1, 2}, {0}, {0}, {}},
		Stages:    []traffic.Stage{{Name: "n", State: "Grrr"}, {Name: "e", State: "rGGG"}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000},
		Plan: traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 30000, IntergreenMS: 4000},
			{Stage: 1, DurationMS: 30000, IntergreenMS: 4000}}},
	}
	add := func(id string, k traffic.DetectorKind, lane traffic.LaneID, from, length int64, group int, moves ...int) {
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(id), Kind: k, Lane: lane, FromStopLineCM: from, LengthCM: length, Movements: moves, Group: group})
	}
	add("n.stop", traffic.StopLine, "n", 0, 200, -1, 0)
	add("n.adv", traffic.Advance, "n", 6000, 200, -1, 0)
	add("n.area", traffic.Area, "n", 0, 8000, -1, 0)
	add("e.stop", traffic.StopLine, "e", 0, 200, -1, 1, 2)
	add("e.adv", traffic.Advance, "e", 6000, 200, -1, 1, 2)
	add("b.area", traffic.Area, "b", 0, 8000, -1, 3)
	add("s.exit", traffic.ExitArea, "s", 0, 1500, -1, 0, 2, 3)
	add("w.exit", traffic.ExitArea, "w", 0, 1500, -1, 1)
	add("far.loop", traffic.Advance, "far", 10000, 200, -1)
	add("button", traffic.Button, "", 0, 0, 2)
	add("oracle", traffic.Oracle, "n", 0, 20000, -1, 0)
	return j
}

// says is what one detector says in one interval.
type says func(r *traffic.Reading)

func passes(n uint32) says {
	return func(r *traffic.Reading) { r.Count, r.OccupancyPermille = n, min(999, 200*n) }
}

func stands(r *traffic.Reading) { r.OccupancyPermille, r.Vehicles, r.Halted = 1000, 1, 1 }

// feeder feeds a monitor with frames and keeps what it says.
type feeder struct {
	t    testing.TB
	m    *Monitor
	j    *traffic.Junction
	now  time.Time
	seq  uint64
	said []string
	all  []Change
}

func feed(t testing.TB) *feeder {
	j := crossing()
	if err := j.Check(); err != nil {
		t.Fatal(err)
	}
	return &feeder{t: t, m: NewMonitor(j), j: j, now: epoch}
}

// lively has all detectors count, so that none of them is silent.
func lively(j *traffic.Junction) map[string]says {
	out := map[string]says{}
	for _, d := range j.Detectors {
		out[string(d.ID)] = passes(1)
	}
	out["button"] = func(r *traffic.Reading) { r.Count = 0 }
	return out
}

// frame builds a frame whose interval ends at now.
func (f *feeder) frame(interval time.Duration, what map[string]says) *traffic.Frame {
	f.seq++
	fr := &traffic.Frame{Junction: f.j.ID, FrameKey: traffic.FrameKey{Device: "rsu", BootEpoch: 1, Seq: f.seq}, Time: f.now, Interval: interval}
	for _, d := range f.j.Detectors {
		say, ok := what[string(d.ID)]
		if !ok {
			continue
		}
		r := traffic.Reading{Detector: d.ID}
		if say != nil {
			say(&r)
		}
		fr.Readings = append(fr.Readings, r)
	}
	return fr
}

// run feeds frames for d.
func (f *feeder) run(d, interval time.Duration, what map[string]says) {
	for end := f.now.Add(d); f.now.Before(end); {
		f.now = f.now.Add(interval)
		f.note(f.m.Observe(f.frame(interval, what)))
	}
}

func (f *feeder) note(cs []Change) {
	for _, c := range cs {
		word := "ok"
		if c.Failed {
			word = "failed"
		}
		f.said = append(f.said, fmt.Sprintf("%s %s %s @%v", c.Detector, c.Rule, word, c.At.Sub(epoch)))
		f.all = append(f.all, c)
		if c.Since.After(c.At) || len(c.Reason) == 0 || len(c.Reason) > 256 {
			f.t.Errorf("got since %v after %v, or reason %q of %d bytes", c.Since, c.At, c.Reason, len(c.Reason))
		}
	}
}

// of returns what was said of one detector since the last call.
func (f *feeder) of(id string) string {
	var out []string
	for _, s := range f.said {
		if rest, ok := strings.CutPrefix(s, id+" "); ok {
			out = append(out, rest)
		}
	}
	return strings.Join(out, ", ")
}

func only(id string, s says) map[string]says { return map[string]says{id: s} }
