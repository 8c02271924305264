package sim

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Geometry and vehicles, in millimetres, milliseconds and millimetres a second.
const (
	boxMM       = 20_000 // from stop line to exit lane, every turn alike
	stopLaneMM  = 90_000
	entryMM     = 250_000 // street that leads in from, or out to, the edge
	areaMM      = 80_000
	advanceMM   = 60_000
	loopMM      = 2_000
	haltMM      = 500 // a queue stands this far before the stop line
	busStopMM   = 40_000
	gapMM       = 2_500 // between standing vehicles
	carMM       = 5_000
	busMM       = 12_000
	ambulanceMM = 6_000
	spacingMM   = carMM + gapMM // a lane's capacity is counted in these

	mainSpeed = 13_900
	sideSpeed = 11_100
	leftSpeed = 8_000
	rightTurn = 6_000
)

// Saturation flows in vehicles an hour.
const (
	satThrough     = 1800
	satLeft        = 1700
	satRight       = 1400
	satSideThrough = 1700
	satSideLeft    = 1500
	satBus         = 900
)

// arm is a side of a junction. Traffic that comes in by an arm leaves opposite.
type arm int

const (
	north arm = iota
	east
	south
	west
)

var armNames = [4]string{"north", "east", "south", "west"}
var armLetters = [4]string{"n", "e", "s", "w"}

func (a arm) opposite() arm { return (a + 2) % 4 }

type turn uint8

const (
	left turn = iota
	through
	right
)

// exit returns the arm by which a vehicle leaves that came in by a: one that
// comes in from the west heads east, has north on its left and south on its right.
func (a arm) exit(t turn) arm {
	switch t {
	case left:
		return (a + 1) % 4
	case right:
		return (a + 3) % 4
	default:
		return a.opposite()
	}
}

// Groups, in the order of every junction's definition.
const (
	gWestThrough = iota
	gWestLeft
	gEastThrough
	gEastLeft
	gNorth
	gSouth
	gWalkNorth
	gWalkEast
	gWalkSouth
	gWalkWest
	gBusEastbound
	gBusWestbound
)

var (
	rowNames = []string{"Customs Street", "Harbour Way", "Quay Road", "Ropewalk", "Fishmarket Street", "Mole Street",
		"Saltworks Road", "Drydock Road", "Pilot Street", "Granary Road", "Tidal Basin Road", "Beacon Street"}
	colNames = []string{"Anchor Street", "Lighthouse Lane", "Chandler Street", "Ferry Street", "Sailmakers Row", "Crane Street",
		"Admiral Street", "Herring Lane", "Compass Street", "Tallow Lane", "Warehouse Street", "Gull Lane"}
)

func streetName(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("%s %d", names[i%len(names)], i/len(names)+1)
}

// grid lays n junctions out in rows; only the last may be short.
type grid struct{ n, rows, cols int }

func newGrid(n int) grid {
	rows := 1
	for (rows+1)*(rows+1) <= n {
		rows++
	}
	cols := (n + rows - 1) / rows
	return grid{n: n, rows: (n + cols - 1) / cols, cols: cols}
}

func (g grid) index(row, col int) int {
	if i := row*g.cols + col; row >= 0 && col >= 0 && col < g.cols && i < g.n {
		return i
	}
	return -1
}

// neighbour returns the junction beyond an arm, or -1 at the edge.
func (g grid) neighbour(i int, a arm) int {
	row, col := i/g.cols, i%g.cols
	switch a {
	case north:
		row--
	case south:
		row++
	case east:
		col++
	default:
		col--
	}
	return g.index(row, col)
}

// arterial reports whether a row is one; every third is, and at least one.
func (g grid) arterial(row int) bool { return row%3 == min(1, g.rows-1) }

// Blocks differ a little in length, as in a town that grew.
func colSpacing(c int) int64 { return 260_000 + int64(c*37%5)*14_000 }
func rowSpacing(r int) int64 { return 240_000 + int64(r*29%4)*16_000 }

func (g grid) metresEast(col int) (mm int64) {
	for c := range col {
		mm += colSpacing(c)
	}
	return mm
}

func (g grid) metresSouth(row int) (mm int64) {
	for r := range row {
		mm += rowSpacing(r)
	}
	return mm
}

// The north-west corner of the district. One degree of latitude is 111,320 m
// and one of longitude 65,580 m at this latitude, to the precision of a map.
const (
	originLatE6 = 53_901_240
	originLonE6 = 9_137_520
)

func latE6(southMM int64) int64 { return originLatE6 - southMM*1000/111_320 }
func lonE6(eastMM int64) int64  { return originLonE6 + eastMM*1000/65_580 }

func junctionID(g grid, i int) traffic.JunctionID {
	return traffic.JunctionID(fmt.Sprintf("h%02d%02d", i/g.cols+1, i%g.cols+1))
}

// link length between the box of junction i and whatever lies beyond arm a.
func (g grid) linkMM(i int, a arm) int64 {
	if g.neighbour(i, a) < 0 {
		return entryMM
	}
	row, col := i/g.cols, i%g.cols
	switch a {
	case north:
		return rowSpacing(row-1) - boxMM
	case south:
		return rowSpacing(row) - boxMM
	case east:
		return colSpacing(col) - boxMM
	default:
		return colSpacing(col-1) - boxMM
	}
}

func exitLaneID(id traffic.JunctionID, a arm) traffic.LaneID {
	return traffic.LaneID(fmt.Sprintf("%s.%s.out", id, armLetters[a]))
}

func stopLaneID(id traffic.JunctionID, a arm, what string) traffic.LaneID {
	return traffic.LaneID(fmt.Sprintf("%s.%s.%s", id, armLetters[a], what))
}

func speedOf(a arm) int64 {
	if a == east || a == west {
		return mainSpeed
	}
	return sideSpeed
}

// stopLaneSpec is one lane before a stop line.
type stopLaneSpec struct {
	what  string
	turns []turn
	group int
	bus   bool
}

func stopLanes(a arm, arterial bool) []stopLaneSpec {
	var s []stopLaneSpec
	switch a {
	case west:
		s = []stopLaneSpec{{"left", []turn{left}, gWestLeft, false}, {"main", []turn{through, right}, gWestThrough, false}}
		if arterial {
			s = append(s, stopLaneSpec{"bus", []turn{through}, gBusEastbound, true})
		}
	case east:
		s = []stopLaneSpec{{"left", []turn{left}, gEastLeft, false}, {"main", []turn{through, right}, gEastThrough, false}}
		if arterial {
			s = append(s, stopLaneSpec{"bus", []turn{through}, gBusWestbound, true})
		}
	case north:
		s = []stopLaneSpec{{"all", []turn{through, right, left}, gNorth, false}}
	default:
		s = []stopLaneSpec{{"all", []turn{through, right, left}, gSouth, false}}
	}
	return s
}

func saturation(a arm, t turn, bus bool) int {
	side := a == north || a == south
	switch {
	case bus:
		return satBus
	case t == left && side:
		return satSideLeft
	case t == left:
		return satLeft
	case t == right:
		return satRight
	case side:
		return satSideThrough
	default:
		return satThrough
	}
}

// define writes the definition of junction i as it would be filed.
func define(g grid, i int) *traffic.Junction {
	row, col := i/g.cols, i%g.cols
	arterial := g.arterial(row)
	id := junctionID(g, i)
	j := &traffic.Junction{
		ID:     id,
		Name:   streetName(rowNames, row) + " / " + streetName(colNames, col),
		LatE6:  latE6(g.metresSouth(row)),
		LonE6:  lonE6(g.metresEast(col)),
		Timing: traffic.Timing{MinGreenMS: 7_000, YellowMS: 3_000, AllRedMS: 2_000, MaxRedMS: 120_000},
	}
	j.Groups = []traffic.Group{
		{Name: "west through", Kind: traffic.Vehicles}, {Name: "west left", Kind: traffic.Vehicles},
		{Name: "east through", Kind: traffic.Vehicles}, {Name: "east left", Kind: traffic.Vehicles},
		{Name: "north", Kind: traffic.Vehicles}, {Name: "south", Kind: traffic.Vehicles},
		// Crossing the narrow side arms takes less time than the wide main arms.
		{Name: "walk north", Kind: traffic.Pedestrians, PedClearMS: crossingMS(north)},
		{Name: "walk east", Kind: traffic.Pedestrians, PedClearMS: crossingMS(east)},
		{Name: "walk south", Kind: traffic.Pedestrians, PedClearMS: crossingMS(south)},
		{Name: "walk west", Kind: traffic.Pedestrians, PedClearMS: crossingMS(west)},
	}
	if arterial {
		j.Groups = append(j.Groups, traffic.Group{Name: "bus eastbound", Kind: traffic.Buses}, traffic.Group{Name: "bus westbound", Kind: traffic.Buses})
	}

	for a := north; a <= west; a++ {
		from := traffic.JunctionID("")
		if n := g.neighbour(i, a); n >= 0 {
			from = junctionID(g, n)
		}
		for _, s := range stopLanes(a, arterial) {
			lane := traffic.Lane{ID: stopLaneID(id, a, s.what), LengthCM: stopLaneMM / 10, SpeedCMS: speedOf(a) / 10,
				Capacity: stopLaneMM / spacingMM, From: from, To: id}
			j.Lanes = append(j.Lanes, lane)
			var moves []int
			for _, t := range s.turns {
				moves = append(moves, len(j.Movements))
				j.Movements = append(j.Movements, traffic.Movement{From: lane.ID, To: exitLaneID(id, a.exit(t)), Group: s.group,
					SaturationPerHour: saturation(a, t, s.bus)})
			}
			d := func(kind traffic.DetectorKind, from, length int64) {
				j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(fmt.Sprintf("%s.%s.%s", armLetters[a], s.what, kind)),
					Kind: kind, Lane: lane.ID, FromStopLineCM: from / 10, LengthCM: length / 10, Movements: moves, Group: -1})
			}
			if !s.bus {
				d(traffic.StopLine, 0, loopMM)
			}
			// The queue of a turning lane is watched by its area alone.
			if s.what == "main" || s.what == "all" {
				d(traffic.Advance, advanceMM, loopMM)
			}
			d(traffic.Area, 0, areaMM)
		}
	}
	for a := north; a <= west; a++ {
		to, length := traffic.JunctionID(""), g.linkMM(i, a)
		if n := g.neighbour(i, a); n >= 0 {
			to = junctionID(g, n)
			length -= stopLaneMM
		}
		lane := traffic.Lane{ID: exitLaneID(id, a), LengthCM: length / 10, SpeedCMS: speedOf(a) / 10,
			Capacity: int(length / spacingMM), From: id, To: to}
		if to != "" {
			lane.AheadCM = lane.LengthCM + stopLaneMM/10
		}
		j.Lanes = append(j.Lanes, lane)
		var moves []int
		for m, mv := range j.Movements {
			if mv.To == lane.ID {
				moves = append(moves, m)
			}
		}
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(armLetters[a] + ".out." + string(traffic.ExitArea)),
			Kind: traffic.ExitArea, Lane: lane.ID, LengthCM: lane.LengthCM, Movements: moves, Group: -1})
	}
	for a := north; a <= west; a++ {
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(armLetters[a] + ".walk." + string(traffic.Button)),
			Kind: traffic.Button, Group: gWalkNorth + int(a)})
	}

	rules(j, arterial)
	return j
}

// crossingMS is how long pedestrians take over an arm, at 1.2 m/s.
func crossingMS(a arm) int64 {
	if a == east || a == west {
		return 11_000
	}
	return 8_000
}

// rules fills in conflicts, yields, stages and the plan.
func rules(j *traffic.Junction, arterial bool) {
	n := len(j.Groups)
	j.Conflicts = make([][]int, n)
	j.Yields = make([][]int, n)
	conflict := func(a int, bs ...int) {
		for _, b := range bs {
			if a < n && b < n {
				j.Conflicts[a] = append(j.Conflicts[a], b)
				j.Conflicts[b] = append(j.Conflicts[b], a)
			}
		}
	}
	mains := []int{gWestThrough, gWestLeft, gEastThrough, gEastLeft, gBusEastbound, gBusWestbound}
	for _, m := range mains {
		conflict(m, gNorth, gSouth)
	}
	// Left turns on the main axis run protected only: they cross the opposing
	// stream and the bus lanes in the middle of the street.
	conflict(gWestLeft, gEastThrough, gBusEastbound, gBusWestbound)
	conflict(gEastLeft, gWestThrough, gBusEastbound, gBusWestbound)
	// A walk conflicts with whoever comes in by its arm or goes straight out by it.
	conflict(gWalkNorth, gNorth, gSouth, gWestLeft)
	conflict(gWalkSouth, gNorth, gSouth, gEastLeft)
	conflict(gWalkEast, gEastThrough, gEastLeft, gWestThrough, gBusEastbound, gBusWestbound)
	conflict(gWalkWest, gWestThrough, gWestLeft, gEastThrough, gBusEastbound, gBusWestbound)

	// Who turns off a lane shared with through traffic gives way.
	j.Yields[gNorth] = []int{gSouth, gWalkEast, gWalkWest}
	j.Yields[gSouth] = []int{gNorth, gWalkEast, gWalkWest}
	j.Yields[gWestThrough] = []int{gWalkSouth}
	j.Yields[gEastThrough] = []int{gWalkNorth}

	stage := func(name string, green map[int]traffic.Aspect) {
		s := []byte(traffic.AllOf(traffic.Red, n))
		for g, a := range green {
			if g < n {
				s[g] = byte(a)
			}
		}
		j.Stages = append(j.Stages, traffic.Stage{Name: name, State: traffic.State(s)})
	}
	stage("main", map[int]traffic.Aspect{gWestThrough: traffic.Permissive, gEastThrough: traffic.Permissive, gWalkNorth: traffic.Green,
		gWalkSouth: traffic.Green, gBusEastbound: traffic.Green, gBusWestbound: traffic.Green})
	stage("main left", map[int]traffic.Aspect{gWestLeft: traffic.Green, gEastLeft: traffic.Green})
	stage("side", map[int]traffic.Aspect{gNorth: traffic.Permissive, gSouth: traffic.Permissive, gWalkEast: traffic.Green, gWalkWest: traffic.Green})
	stage("from west", map[int]traffic.Aspect{gWestThrough: traffic.Green, gWestLeft: traffic.Green})

	// The walk of a stage ends with its intergreen, so that takes as long as
	// pedestrians need to finish, and the all-red.
	j.Plan = traffic.Plan{Name: "day", Steps: []traffic.PlanStep{
		{Stage: 0, DurationMS: 40_000, IntergreenMS: 10_000},
		{Stage: 1, DurationMS: 15_000, IntergreenMS: 5_000},
		{Stage: 2, DurationMS: 35_000, IntergreenMS: 13_000},
	}}
}
