package health

import (
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// cycleRun feeds a monitor with seconds of a junction with one approach and a
// cycle of 90 s, 30 s of them green, and returns when each rule was said.
func cycleRun(t *testing.T, seconds int, reading func(i int, green bool, kind traffic.DetectorKind) traffic.Reading) (*Monitor, []Change) {
	t.Helper()
	j := &traffic.Junction{ID: "c", Lanes: []traffic.Lane{{ID: "in", LengthCM: 20_000, SpeedCMS: 1390, Capacity: 26}, {ID: "out"}},
		Groups: []traffic.Group{{Name: "a", Kind: traffic.Vehicles}}, Movements: []traffic.Movement{{From: "in", To: "out", SaturationPerHour: 1800}},
		Detectors: []traffic.Detector{{ID: "stop", Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1},
			{ID: "area", Kind: traffic.Area, Lane: "in", LengthCM: 8000, Movements: []int{0}, Group: -1}},
		Conflicts: [][]int{nil}, Stages: []traffic.Stage{{Name: "a", State: "G"}, {Name: "b", State: "r"}},
		Timing: traffic.Timing{YellowMS: 3000}, Plan: traffic.Plan{Steps: []traffic.PlanStep{{DurationMS: 30_000}}}}
	if err := j.Check(); err != nil {
		t.Fatal(err)
	}
	m := NewMonitor(j)
	var out []Change
	begin := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	for i := range seconds {
		green := i%90 < 30
		f := &traffic.Frame{Time: begin.Add(time.Duration(i+1) * time.Second), Interval: time.Second, Signal: traffic.Signal{State: "r"}}
		if green {
			f.Signal.State = "G"
		}
		for _, d := range j.Detectors {
			r := reading(i, green, d.Kind)
			r.Detector = d.ID
			f.Readings = append(f.Readings, r)
		}
		out = append(out, m.Observe(f)...)
		// What is stored is all that is known.
		if i%97 == 0 {
			b, err := m.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			if m, err = Restore(j, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	return m, out
}

// honest is 360 vehicles an hour: nine in each cycle, that queue at red.
func honest(i int, green bool, k traffic.DetectorKind) traffic.Reading {
	var r traffic.Reading
	in := i % 90
	switch k {
	case traffic.StopLine:
		if green && in%3 == 2 && in < 28 {
			r.Count, r.SpeedCMS = 1, 600
		}
		if !green && in >= 40 || green && in < 3 {
			r.OccupancyPermille, r.Vehicles = 1000, 1
		} else if r.Count > 0 {
			r.OccupancyPermille = 400
		}
	case traffic.Area:
		if in%10 == 0 {
			r.Count, r.SpeedCMS = 1, 900
		}
		if !green && in >= 40 || green && in < 27 {
			r.OccupancyPermille, r.Vehicles = 1000, 4
		}
	}
	return r
}

func TestStuckWithinThreeCycles(t *testing.T) {
	const healthy, cycle = 20 * 60, 90
	for _, c := range []struct {
		name string
		rule Rule
		from func(i int, green bool, k traffic.DetectorKind) traffic.Reading
	}{
		{"honest", "", honest},
		{"on", StuckOn, func(_ int, _ bool, k traffic.DetectorKind) traffic.Reading {
			return traffic.Reading{OccupancyPermille: 1000, Vehicles: 1}
		}},
		{"off", StuckOff, func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
			if k == traffic.Area {
				return honest(i, green, k)
			}
			return traffic.Reading{}
		}},
		// A street that is blocked for one green and then moves.
		{"blocked once", "", func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
			if i < healthy+cycle+60 {
				return traffic.Reading{OccupancyPermille: 1000, Vehicles: 1}
			}
			return honest(i, green, k)
		}},
		// Nobody comes for nearly three cycles.
		{"a pause", "", func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
			if i < healthy+260 {
				return traffic.Reading{}
			}
			return honest(i, green, k)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for phase := 0; phase < cycle; phase += 7 {
				m, changes := cycleRun(t, healthy+phase+4*cycle, func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
					if i < healthy+phase {
						return honest(i, green, k)
					}
					return c.from(i-phase, green, k)
				})
				if c.rule == "" {
					if len(changes) != 0 && phase == 0 {
						t.Errorf("got %v, want nothing said", changes)
					}
					continue
				}
				if want := map[Rule]int{StuckOn: 2, StuckOff: 1}[c.rule]; len(changes) != want {
					t.Fatalf("began %d s into a cycle: got %v, want %d detectors flagged", phase, changes, want)
				}
				for _, ch := range changes {
					after := ch.At.Sub(time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)) - (healthy+time.Duration(phase))*time.Second
					if ch.Rule != c.rule || !ch.Failed || after > 3*cycle*time.Second {
						t.Errorf("began %d s into a cycle: got %+v after %v, want %s within three cycles", phase, ch, after, c.rule)
					}
				}
				if r, ok := m.Failed("stop"); !ok || r != c.rule {
					t.Errorf("got %q, %v", r, ok)
				}
			}
		})
	}
}

// A detector that works again is believed again.
func TestStuckCeases(t *testing.T) {
	const healthy = 20 * 60
	for _, stuck := range []traffic.Reading{{}, {OccupancyPermille: 1000, Vehicles: 1}} {
		m, changes := cycleRun(t, healthy+8*90+30*60, func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
			if i >= healthy && i < healthy+8*90 && (k == traffic.StopLine || stuck.Vehicles > 0) {
				return stuck
			}
			return honest(i, green, k)
		})
		if n := 2 + 2*int(stuck.Vehicles); len(changes) != n || m.Failing() != 0 || changes[n-1].Failed {
			t.Errorf("stuck at %d ‰: got %v, %d failing; want each said and taken back", stuck.OccupancyPermille, changes, m.Failing())
		}
	}
}

// A lane without any word is found too, though later: 40 vehicles must be missing.
func TestSilentLane(t *testing.T) {
	const healthy = 20 * 60
	_, changes := cycleRun(t, healthy+15*60, func(i int, green bool, k traffic.DetectorKind) traffic.Reading {
		if i >= healthy {
			return traffic.Reading{}
		}
		return honest(i, green, k)
	})
	for _, c := range changes {
		if c.Rule != StuckOff || !c.Failed || c.At.Sub(c.Since) > 10*time.Minute {
			t.Errorf("got %+v", c)
		}
	}
	if len(changes) != 2 {
		t.Errorf("got %v, want both", changes)
	}
}
