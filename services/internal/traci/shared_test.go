package traci

import (
	"slices"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Every shared map derives under every rule's limits; Derive checks each
// definition with Junction.Check.
func TestSharedMapsDerive(t *testing.T) {
	for _, c := range []struct {
		name     string
		signals  int
		declared int // crossing greens that the maps' own programs show
		lat, lon int64
	}{
		{"cologne1", 1, 0, 50, 6},
		{"cologne3", 3, 0, 50, 6},
		{"ingolstadt1", 1, 0, 48, 11},
		{"ingolstadt7", 7, 2, 48, 11},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := sharedScenario(t, c.name)
			for _, lim := range []Limits{{}, {MinGreenMS: 5000, YellowMS: 3000}, {MinGreenMS: 7000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 120_000}} {
				for _, sensing := range []Sensing{SensingDetectors, SensingOracle} {
					ds, err := s.Derive(lim, sensing)
					if err != nil {
						t.Fatalf("%+v %s: %v", lim, sensing, err)
					}
					if len(ds) != c.signals {
						t.Errorf("%d signals, want %d", len(ds), c.signals)
					}
					declared := 0
					for _, d := range ds {
						declared += len(d.Declared)
						checkDerived(t, s, d, c.lat, c.lon)
					}
					if declared != c.declared {
						t.Errorf("declared pairs: got %d, want %d", declared, c.declared)
					}
				}
			}
		})
	}
}

// checkDerived checks what must hold on any map.
func checkDerived(t *testing.T, s *Scenario, d Derived, lat, lon int64) {
	t.Helper()
	j := d.Junction
	if j.LatE6/1e6 != lat || j.LonE6/1e6 != lon {
		t.Errorf("%s is at %d, %d; want %d° N %d° E", j.ID, j.LatE6, j.LonE6, lat, lon)
	}
	if got, want := j.Plan.CycleMS(), int64(90_000); got != want {
		t.Errorf("%s: cycle of %d ms, want %d", j.ID, got, want)
	}
	for i, m := range j.Movements {
		tells := slices.ContainsFunc(j.Detectors, func(x traffic.Detector) bool {
			return x.Kind != traffic.ExitArea && slices.Contains(x.Movements, i)
		})
		if !tells {
			t.Errorf("%s: no detector tells of movement %s>%s", j.ID, m.From, m.To)
		}
		green := slices.ContainsFunc(j.Stages, func(x traffic.Stage) bool { return x.State.At(m.Group).Go() })
		if !green {
			t.Errorf("%s: group %d is green in no stage", j.ID, m.Group)
		}
	}
	// Whatever the map's program shows at any moment is free of conflicts.
	for _, g := range s.net.logics {
		if g.id != string(j.ID) {
			continue
		}
		for _, p := range g.phases {
			for a, bs := range j.Conflicts {
				for _, b := range bs {
					if stageAspect(p.state[a]).Go() && stageAspect(p.state[b]).Go() {
						t.Errorf("%s: program shows %s, groups %d and %d conflict", j.ID, p.state, a, b)
					}
				}
			}
		}
	}
}
