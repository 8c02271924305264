package interlock_test

import (
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// shape is a junction drawn by hand: groups, who conflicts, who yields, stages.
type shape struct {
	name      string
	groups    []traffic.Group
	conflicts [][2]int
	yields    [][2]int // the first gives way to the second
	stages    []traffic.State
	timing    traffic.Timing
}

func veh(name string) traffic.Group { return traffic.Group{Name: name, Kind: traffic.Vehicles} }
func ped(name string, clear int64) traffic.Group {
	return traffic.Group{Name: name, Kind: traffic.Pedestrians, MinGreenMS: 4000, PedClearMS: clear}
}

// shapes are the junctions that the properties are tried on: two streets; a
// dual ring of eight phases; one with pedestrians, a bus group and overrides;
// and one as SUMO's maps have them, with permissive lefts and no all-red.
func shapes() []*traffic.Junction {
	var dual [][2]int
	// NEMA: 1..4 ring one, 5..8 ring two; barrier between 2|3 and 6|7. Index = phase−1.
	for a := range 8 {
		for b := a + 1; b < 8; b++ {
			sameRing := a/4 == b/4
			sameSide := (a%4 < 2) == (b%4 < 2)
			if sameRing || !sameSide {
				dual = append(dual, [2]int{a, b})
			}
		}
	}
	eight := make([]traffic.Group, 8)
	for i := range eight {
		eight[i] = veh([]string{"NL", "S", "WL", "E", "SL", "N", "EL", "W"}[i])
	}
	bus := traffic.Group{Name: "bus", Kind: traffic.Buses, YellowMS: 4000, AllRedMS: 2000, MinGreenMS: 3000}
	all := []shape{
		{
			name:      "cross",
			groups:    []traffic.Group{veh("NS"), veh("EW")},
			conflicts: [][2]int{{0, 1}},
			stages:    []traffic.State{"Gr", "rG"},
			timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 60000},
		},
		{
			name: "dual ring", groups: eight, conflicts: dual,
			stages: []traffic.State{"GrrrGrrr", "GrrrrGrr", "rGrrGrrr", "rGrrrGrr", "rrGrrrGr", "rrGrrrrG", "rrrGrrGr", "rrrGrrrG"},
			timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1500, MaxRedMS: 120000},
		},
		{
			name: "pedestrians and bus",
			groups: []traffic.Group{veh("NS"), {Name: "EW", Kind: traffic.Vehicles, MinGreenMS: 8000, YellowMS: 4000, AllRedMS: 1500},
				ped("across NS", 7000), ped("across EW", 5000), bus, ped("short", 0)},
			conflicts: [][2]int{{0, 1}, {0, 2}, {1, 3}, {4, 0}, {4, 1}, {4, 2}, {5, 4}},
			stages:    []traffic.State{"GrrGrG", "rGGrrG", "GrrrrG", "rrrrGr", "rrGGrG"},
			timing:    traffic.Timing{MinGreenMS: 6000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 90000},
		},
		{
			name:   "SUMO-like",
			groups: []traffic.Group{veh("N"), veh("NL"), veh("S"), veh("SL"), veh("E"), veh("EL"), ped("zebra", 3000)},
			conflicts: [][2]int{{0, 4}, {0, 5}, {1, 4}, {1, 5}, {2, 4}, {2, 5}, {3, 4}, {3, 5},
				{6, 4}},
			yields: [][2]int{{1, 2}, {3, 0}, {5, 6}},
			stages: []traffic.State{"GgGgrrr", "rGrGrrr", "rrrrGGr", "GgGgrrG", "rrrrrgG", "GGrrrrr"},
			timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
		},
	}
	out := make([]*traffic.Junction, len(all))
	for i, s := range all {
		out[i] = s.junction()
	}
	return out
}

func (s shape) junction() *traffic.Junction {
	n := len(s.groups)
	j := &traffic.Junction{ID: traffic.JunctionID(s.name), Groups: s.groups, Timing: s.timing,
		Conflicts: make([][]int, n), Yields: make([][]int, n)}
	for _, c := range s.conflicts {
		j.Conflicts[c[0]] = append(j.Conflicts[c[0]], c[1])
		j.Conflicts[c[1]] = append(j.Conflicts[c[1]], c[0])
	}
	for _, y := range s.yields {
		j.Yields[y[0]] = append(j.Yields[y[0]], y[1])
	}
	for k, st := range s.stages {
		j.Stages = append(j.Stages, traffic.Stage{Name: string(rune('A' + k)), State: st})
		j.Plan.Steps = append(j.Plan.Steps, traffic.PlanStep{Stage: k, DurationMS: 20000, IntergreenMS: 8000})
	}
	return j
}

func TestShapesAreWellFormed(t *testing.T) {
	for _, j := range shapes() {
		if err := j.Check(); err != nil {
			t.Error(err)
		}
	}
}
