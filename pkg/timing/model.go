package timing

import (
	"math"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// A model is what the planner needs of a junction under given rules, worked out
// once: lanes and movements by number, what each stage and each change between
// two stages lets go, and how long a change takes. It is never changed after
// [modelOf] has made it, so copies of a [Memory] share it.
type model struct {
	junction *traffic.Junction
	rules    Rules

	lanes []laneModel
	moves []moveModel // first those of vehicles, in the definition's order, then one for each walk
	exits int
	// By exit: its lane, and one movement that leads there.
	exitIDs  []traffic.LaneID
	exitMove []int
	stages   []stageModel
	rows     []byte    // of all stages, then of all changes; see row
	rowLanes [][]int16 // by row: lanes of which it lets anybody go
	change   []int32   // from*stages+to: ms from the end of the first's green to the second's
	held     []int32   // from*stages+to: for how long of that vehicles still go, ms
	common   []bool    // from*stages+to: some movement is green through the change
	start    []int32   // how long from now the shown stage may stay before it ends, on the grid
	grid     int32     // ms, decisions fall on its multiples
}

type laneModel struct {
	speed int32 // cm/s
	moves []int16
	walk  bool
	calls bool // by a button, so that a call is somebody who waits
	// reach is how far before the stop line detectors see, cm; feeders among how
	// many lanes those on the lanes before it are divided.
	reach   int32
	length  int32 // cm
	id      traffic.LaneID
	from    traffic.JunctionID
	feeders int32
}

type moveModel struct {
	group, lane, exit int16   // exit is -1 where nothing is known of it
	yields            []int16 // movements that it waits for while permissive
	protected         int32   // headways in ms
	permissive        int32
}

type stageModel struct {
	minGreen    int32
	leastChange int32 // to whatever stage takes least
}

// What a movement may do in a row.
const (
	stop byte = iota
	goes
	gives // goes, and gives way
	ends  // yellow: who is on the move and arrives in time still goes
)

// Settings of the model. One set serves every network.
const (
	headwayMS      = 1850 // between vehicles that leave a queue at a protected green
	headwayPercent = 70
	leastHeadwayMS = 1000 // no queue is faster than that
	giveHeadwayMS  = 2800 // and at a permissive one
)

func modelOf(j *traffic.Junction, r Rules) *model {
	m := &model{junction: j, rules: r}
	lanes, exits := map[traffic.LaneID]int16{}, map[traffic.LaneID]int16{}
	meets := make([][]int16, len(j.Groups))
	for i, mv := range j.Movements {
		l, ok := lanes[mv.From]
		if !ok {
			l = int16(len(m.lanes))
			lanes[mv.From] = l
			lane, _ := j.Lane(mv.From)
			speed := int32(min(max(lane.SpeedCMS, 300), 4000))
			m.lanes = append(m.lanes, laneModel{speed: speed, id: mv.From, from: lane.From, length: int32(min(max(lane.LengthCM, 100), 1_000_000))})
		}
		e, ok := exits[mv.To]
		if !ok {
			e = int16(m.exits)
			exits[mv.To] = e
			m.exits++
			m.exitIDs, m.exitMove = append(m.exitIDs, mv.To), append(m.exitMove, i)
		}
		m.lanes[l].moves = append(m.lanes[l].moves, int16(i))
		m.moves = append(m.moves, moveModel{group: int16(mv.Group), lane: l, exit: e, protected: headwayOf(mv.SaturationPerHour), permissive: giveHeadwayMS})
		meets[mv.Group] = append(meets[mv.Group], int16(i))
	}
	for i := range m.moves {
		g := int(m.moves[i].group)
		if g < len(j.Yields) {
			for _, k := range j.Yields[g] {
				m.moves[i].yields = append(m.moves[i].yields, meets[k]...)
			}
		}
	}
	for l := range m.lanes {
		m.lanes[l].reach, m.lanes[l].feeders = 5_000, 1
	}
	for _, d := range j.Detectors {
		if d.Kind != traffic.Area && d.Kind != traffic.Advance && d.Kind != traffic.Oracle {
			continue
		}
		fed := map[int16]bool{}
		for _, k := range d.Movements {
			fed[m.moves[k].lane] = true
		}
		for l := range fed {
			lane := &m.lanes[l]
			lane.reach = max(lane.reach, int32(min(d.FromStopLineCM+d.LengthCM, 30_000)))
			if d.Kind == traffic.Area && d.Lane != j.Movements[lane.moves[0]].From {
				lane.feeders = max(lane.feeders, int32(len(fed)))
			}
		}
	}
	for g := range j.Groups {
		if j.Groups[g].Kind != traffic.Pedestrians {
			continue
		}
		i := int16(len(m.moves))
		m.moves = append(m.moves, moveModel{group: int16(g), lane: int16(len(m.lanes)), exit: -1})
		calls := slices.ContainsFunc(j.Detectors, func(d traffic.Detector) bool { return d.Kind == traffic.Button && d.Group == g })
		m.lanes = append(m.lanes, laneModel{walk: true, calls: calls, moves: []int16{i}})
	}

	n := len(j.Stages)
	lim := limitsOf(j, r)
	m.change, m.held, m.common = make([]int32, n*n), make([]int32, n*n), make([]bool, n*n)
	for k := range j.Stages {
		m.stages = append(m.stages, stageModel{minGreen: int32(min(stageMinGreen(j, r, k), 60_000))})
		for i := range m.moves {
			m.rows = append(m.rows, aspectByte(j.Stages[k].State.At(int(m.moves[i].group))))
		}
	}
	// For each change three rows: before yellow, while yellow is still used, and after.
	for a := range n {
		for b := range n {
			m.change[a*n+b] = int32(min(changeMS(j, lim, a, b), 120_000))
			m.held[a*n+b] = heldMS(j, lim, a, b)
			for i := range m.moves {
				x := m.rows[a*len(m.moves)+i]
				if m.lanes[m.moves[i].lane].walk && m.rows[b*len(m.moves)+i] == stop {
					x = stop
				}
				m.rows = append(m.rows, x)
			}
			for _, used := range []bool{true, false} {
				for i := range m.moves {
					x := m.rows[a*len(m.moves)+i]
					y := m.rows[b*len(m.moves)+i]
					switch {
					case x != stop && y != stop:
						m.common[a*n+b] = true
					case x == goes && used && !m.lanes[m.moves[i].lane].walk:
						x = ends
					default:
						x = stop
					}
					m.rows = append(m.rows, x)
				}
			}
		}
	}
	m.rowLanes = make([][]int16, len(m.rows)/max(len(m.moves), 1))
	for r := range m.rowLanes {
		row := m.row(r)
		for l := range m.lanes {
			if slices.ContainsFunc(m.lanes[l].moves, func(k int16) bool { return row[k] != stop }) {
				m.rowLanes[r] = append(m.rowLanes[r], int16(l))
			}
		}
	}
	for a := range n {
		least := int32(math.MaxInt32)
		for b := range n {
			if a != b {
				least = min(least, m.change[a*n+b])
			}
		}
		if least < math.MaxInt32 {
			m.stages[a].leastChange = least
		}
	}
	m.grid = int32(min(max(r.DecisionMS, 1000), 60_000))
	for _, s := range []int32{0, 1, 2, 3, 5, 7, 10, 14, 20, 28} {
		at := (s*1000 + m.grid - 1) / m.grid * m.grid
		if at < planMS && !slices.Contains(m.start, at) {
			m.start = append(m.start, at)
		}
	}
	return m
}

// headwayOf is the time between vehicles that leave a queue at green, by what is
// filed of how many can pass in an hour.
func headwayOf(perHour int) int32 {
	if perHour <= 0 {
		return headwayMS
	}
	return int32(min(max(3_600_000*headwayPercent/100/perHour, leastHeadwayMS), 6_000))
}

func aspectByte(a traffic.Aspect) byte {
	switch a {
	case traffic.Green:
		return goes
	case traffic.Permissive:
		return gives
	}
	return stop
}

// row is what each movement may do in row r; rows are numbered, that of a stage by
// the stage.
func (m *model) row(r int) []byte { return m.rows[r*len(m.moves) : (r+1)*len(m.moves)] }

// between are the rows of a change: before its yellow, in the first second of it,
// and for the rest.
func (m *model) between(a, b int) (keeps, first, rest int) {
	n := len(m.stages)
	r := n + 3*(a*n+b)
	return r, r + 1, r + 2
}

// heldMS is for how long after the beginning of a change vehicles stay green,
// because others, who walk, take longer to clear.
func heldMS(j *traffic.Junction, l limits, from, to int) int32 {
	a, b := j.Stages[from].State, j.Stages[to].State
	var longest, vehicles int64
	for i := range j.Groups {
		if a.At(i).Go() && !b.At(i).Go() {
			longest = max(longest, l.clear[i])
			if j.Groups[i].Kind != traffic.Pedestrians {
				vehicles = max(vehicles, l.clear[i])
			}
		}
	}
	if vehicles == 0 {
		return 0
	}
	return int32(min(longest-vehicles, 60_000))
}
