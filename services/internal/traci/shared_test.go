package traci

import (
	"testing"
)

func TestSharedMapsDerive(t *testing.T) {
	for _, name := range sharedMaps {
		t.Run(name, func(t *testing.T) {
			s := sharedScenario(t, name)
			for _, sensing := range []Sensing{SensingDetectors, SensingOracle} {
				ds, err := s.Derive(Limits{MinGreenMS: 7000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 120000}, sensing)
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range ds {
					j := d.Junction
					t.Logf("%s %s: at %d,%d: %d lanes, %d groups, %d movements, %d detectors, %d stages, plan %+v timing %+v", sensing, j.ID, j.LatE6, j.LonE6, len(j.Lanes), len(j.Groups), len(j.Movements), len(j.Detectors), len(j.Stages), j.Plan, j.Timing)
					t.Logf("  conflicts %v yields %v declared %v warnings %q", j.Conflicts, j.Yields, d.Declared, d.Warnings)
				}
			}
		})
	}
}
