package traci

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Sensing says what a junction's detectors know.
type Sensing string

// The ways of sensing. Exits are watched by an ExitArea in both.
const (
	// SensingDetectors is what a city has: on every approach lane a loop at the
	// stop line, a loop about 50 m upstream, and areas over up to 100 m. An area
	// and the upstream loop go on over the lanes before the approach lane, as
	// long as everything on those must come to this signal.
	SensingDetectors Sensing = "detectors"
	// SensingOracle has one Oracle a movement, which knows every vehicle within
	// 200 m whose next signal and link it is.
	SensingOracle Sensing = "oracle"
)

func (s Sensing) check() error {
	if s != SensingDetectors && s != SensingOracle {
		return kind.Errorf(kind.Invalid, "sensing %q: must be %s or %s", s, SensingDetectors, SensingOracle)
	}
	return nil
}

// Where detectors are placed, in metres.
const (
	loopLength  = 2.0
	advanceAt   = 50.0
	areaReach   = 100.0
	exitReach   = 100.0
	oracleReach = 200.0

	// halted is the speed below which SUMO takes a vehicle as standing, m/s.
	halted = 0.1
	// boxSlow is the speed below which a vehicle within the junction counts as
	// halted there: it will not be out by itself in time.
	boxSlow = 4.0
)

// A stretch is a part of one lane before a signal.
type stretch struct {
	lane      int
	from      float64 // of its downstream end, to the stop line
	length    float64
	movements []int
}

// placeDetectors adds the detectors to a definition that has its movements.
func placeDetectors(n *network, j *traffic.Junction, sensing Sensing) {
	if sensing == SensingOracle {
		for i, m := range j.Movements {
			j.Detectors = append(j.Detectors, traffic.Detector{
				ID:   traffic.DetectorID(fmt.Sprintf("oracle:%d:%s>%s", m.Group, m.From, m.To)),
				Kind: traffic.Oracle, Lane: m.From, LengthCM: centi(oracleReach), Movements: []int{i}, Group: -1,
			})
		}
	} else {
		n.placeApproaches(j)
	}
	for _, l := range j.Lanes {
		var ms []int
		for i, m := range j.Movements {
			if m.To == l.ID {
				ms = append(ms, i)
			}
		}
		if len(ms) > 0 {
			j.Detectors = append(j.Detectors, traffic.Detector{
				ID: "exit:" + traffic.DetectorID(l.ID), Kind: traffic.ExitArea, Lane: l.ID,
				LengthCM: min(l.LengthCM, centi(exitReach)), Movements: ms, Group: -1,
			})
		}
	}
	n.placeBoxes(j, sensing)
}

// placeBoxes has the junction's inside watched: an oracle knows each vehicle's
// movement there, a city's camera which approach lane it came from.
func (n *network) placeBoxes(j *traffic.Junction, sensing Sensing) {
	for i, m := range j.Movements {
		id, ms := fmt.Sprintf("box:%d:%s>%s", m.Group, m.From, m.To), []int{i}
		if sensing == SensingDetectors {
			id, ms = fmt.Sprintf("box:%s", m.From), nil
			for k, o := range j.Movements {
				if o.From == m.From {
					ms = append(ms, k)
				}
			}
			if ms[0] != i {
				continue
			}
		}
		length := 0.0
		for _, k := range ms {
			own := 0.0
			for _, l := range n.inside(j.Movements[k]) {
				own += n.lanes[l].length
			}
			length = max(length, own)
		}
		if length > 0 {
			j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(id), Kind: traffic.Box, Lane: m.From, LengthCM: max(1, centi(length)), Movements: ms, Group: -1})
		}
	}
}

// inside lists the internal lanes of a movement's path, in order: one, or more
// where it may have to wait on its way.
func (n *network) inside(m traffic.Movement) []int {
	var out []int
	from, to := n.lane[string(m.From)], n.lane[string(m.To)]
	for _, i := range n.leaving[from] {
		if n.links[i].to != to {
			continue
		}
		for at := n.links[i].via; at >= 0 && !slices.Contains(out, at); {
			out = append(out, at)
			next := -1
			for _, k := range n.leaving[at] {
				if n.links[k].via >= 0 {
					next = n.links[k].via
					break
				}
			}
			at = next
		}
	}
	return out
}

func (n *network) placeApproaches(j *traffic.Junction) {
	stretches := n.approaches(j)
	add := func(prefix string, k traffic.DetectorKind, s stretch, from, length float64) {
		lane := n.lanes[s.lane].id
		j.Detectors = append(j.Detectors, traffic.Detector{
			ID: traffic.DetectorID(prefix + lane), Kind: k, Lane: traffic.LaneID(lane),
			FromStopLineCM: centi(from), LengthCM: max(1, centi(length)), Movements: s.movements, Group: -1,
		})
	}
	for _, s := range stretches {
		if s.from == 0 {
			add("stop:", traffic.StopLine, s, 0, min(loopLength, s.length))
		}
		// The upstream loop lies at 50 m, or as far as there is lane: at the far
		// end of a stretch that nothing goes on from.
		switch end := s.from + s.length; {
		case s.from <= advanceAt && advanceAt < end:
			length := min(loopLength, s.length)
			add("advance:", traffic.Advance, s, min(advanceAt, end-length), length)
		case end <= advanceAt && !goesOn(n, stretches, s):
			length := min(loopLength, s.length)
			add("advance:", traffic.Advance, s, end-length, length)
		}
		if s.from < areaReach {
			add("area:", traffic.Area, s, s.from, min(s.length, areaReach-s.from))
		}
	}
}

// goesOn reports whether another stretch lies upstream of s.
func goesOn(n *network, all []stretch, s stretch) bool {
	for _, i := range n.touching(s.lane, true) {
		for _, o := range all {
			if o.lane == n.links[i].from && o.from > s.from {
				return true
			}
		}
	}
	return false
}

// approaches lists the stretches before the stop lines of a junction up to the
// reach of an area, the nearest first. A lane upstream is taken where all links
// that leave it lead into lanes that were taken, and no signal holds them.
func (n *network) approaches(j *traffic.Junction) []stretch {
	var out []stretch
	at := map[int]int{}
	for i, m := range j.Movements {
		l := n.lane[string(m.From)]
		k, ok := at[l]
		if !ok {
			k = len(out)
			at[l] = k
			out = append(out, stretch{lane: l, length: n.lanes[l].length})
		}
		out[k].movements = append(out[k].movements, i)
	}
	for grew := true; grew; {
		grew = false
		for k := range out {
			s := out[k]
			end := s.from + s.length
			if end >= areaReach {
				continue
			}
			for _, i := range n.touching(s.lane, true) {
				up := n.links[i].from
				if _, taken := at[up]; taken || n.links[i].tls != "" {
					continue
				}
				next := stretch{lane: up, from: math.Inf(1), length: n.lanes[up].length}
				for _, o := range n.touching(up, false) {
					l := n.links[o]
					to, taken := at[l.to]
					if !taken || l.tls != "" {
						next.lane = -1
						break
					}
					gap := 0.0
					if l.via >= 0 {
						gap = n.lanes[l.via].length
					}
					next.from = min(next.from, out[to].from+out[to].length+gap)
					for _, m := range out[to].movements {
						if !slices.Contains(next.movements, m) {
							next.movements = append(next.movements, m)
						}
					}
				}
				if next.lane >= 0 && next.from < areaReach {
					slices.Sort(next.movements)
					at[up] = len(out)
					out = append(out, next)
					grew = true
				}
			}
		}
	}
	return out
}

// A field is what all detectors of a city see, and the vehicles that they see
// it of. It is pure: positions go in, readings come out.
type field struct {
	net     *network
	next    map[int][]int // lanes that follow a lane, internal ones included
	loops   map[int][]*sensor
	areas   map[int][]*sensor
	boxes   map[int][]*sensor
	oracles map[string]map[int][]oracle // by signal and link index
	sensors [][]*sensor                 // by junction, in the order of Detectors
	elapsed []float64                   // seconds since a junction was last read

	vehicles []*vehicle // in the order of departure, so that sums are the same in every run
	byID     map[string]*vehicle
	paths    map[[2]int][]int
}

// sensor is a detector at work.
type sensor struct {
	kind   traffic.DetectorKind
	id     traffic.DetectorID
	lane   int
	a, b   float64 // from the lane's start, a is the upstream end
	loop   bool
	count  uint32
	speeds float64 // sum over counted vehicles, m/s
	// occupied is, for a loop, for how many seconds something stood on it; for
	// an area the integral of the share of its length that was covered.
	occupied float64
	passed   traffic.Priority // of vehicles on a loop in the interval

	// At the end of the last step:
	vehicles, halted uint32
	covered          float64
	head             float64 // how far before the sensor's downstream end the first vehicle is
	headWait         time.Duration
	present          traffic.Priority
	ahead            []traffic.Approach // of an oracle
}

type oracle struct {
	lane   int
	sensor *sensor
}

// vehicle is what is known of one vehicle.
type vehicle struct {
	id       string
	length   float64
	priority traffic.Priority
	seen     uint64 // step in which SUMO last told of it

	placed bool
	lane   int
	pos    float64 // of its front, from the lane's start
	speed  float64
	wait   time.Duration
	// odometer is how far its front has come; trail the lanes that its body may
	// still touch, the present one last.
	odometer float64
	trail    []footprint

	ahead  nextSignal
	oracle *sensor
}

type footprint struct {
	lane  int
	start float64 // odometer at the lane's start
}

type nextSignal struct {
	tls  string // empty: none
	link int
	dist float64
}

// observation is what SUMO says of a vehicle after a step.
type observation struct {
	lane  int // -1: nowhere (waiting to be inserted again, or not told)
	pos   float64
	speed float64
	ahead nextSignal
}

func newField(n *network, js []*traffic.Junction) *field {
	f := &field{
		net: n, next: map[int][]int{}, loops: map[int][]*sensor{}, areas: map[int][]*sensor{}, boxes: map[int][]*sensor{},
		oracles: map[string]map[int][]oracle{}, elapsed: make([]float64, len(js)),
		byID: map[string]*vehicle{}, paths: map[[2]int][]int{},
	}
	for _, l := range n.links {
		to := l.to
		if l.via >= 0 {
			to = l.via
		}
		if !slices.Contains(f.next[l.from], to) {
			f.next[l.from] = append(f.next[l.from], to)
		}
	}
	for _, j := range js {
		own := make([]*sensor, len(j.Detectors))
		// Distances are counted from the stop line of the approach lane; this is
		// where each lane's end lies.
		ends := map[traffic.LaneID]float64{}
		for _, d := range j.Detectors {
			if d.Kind == traffic.Area {
				ends[d.Lane] = float64(d.FromStopLineCM) / 100
			}
		}
		for i, d := range j.Detectors {
			lane := n.lane[string(d.Lane)]
			s := &sensor{kind: d.Kind, id: d.ID, lane: lane}
			own[i] = s
			length := n.lanes[lane].length
			reach := float64(d.LengthCM) / 100
			switch d.Kind {
			case traffic.StopLine, traffic.Advance:
				s.loop = true
				s.b = length - (float64(d.FromStopLineCM)/100 - ends[d.Lane])
				s.a = max(0, s.b-reach)
				f.loops[lane] = append(f.loops[lane], s)
			case traffic.Area:
				s.b, s.a = length, max(0, length-reach)
				f.areas[lane] = append(f.areas[lane], s)
			case traffic.ExitArea:
				s.a, s.b = 0, min(length, reach)
				f.areas[lane] = append(f.areas[lane], s)
			case traffic.Box:
				s.loop = true // nothing of it is a share of a length
				for _, m := range d.Movements {
					for _, l := range n.inside(j.Movements[m]) {
						f.boxes[l] = append(f.boxes[l], s)
					}
				}
			case traffic.Oracle:
				m := j.Movements[d.Movements[0]]
				tls := string(j.ID)
				if f.oracles[tls] == nil {
					f.oracles[tls] = map[int][]oracle{}
				}
				f.oracles[tls][m.Group] = append(f.oracles[tls][m.Group], oracle{lane, s})
			}
		}
		f.sensors = append(f.sensors, own)
	}
	return f
}

// add makes a vehicle known.
func (f *field) add(id string) *vehicle {
	if v := f.byID[id]; v != nil {
		return v
	}
	v := &vehicle{id: id, length: 5}
	f.byID[id] = v
	f.vehicles = append(f.vehicles, v)
	return v
}

// end closes a step of dt seconds: vehicles that were not seen in it are gone,
// and what is present is counted.
func (f *field) end(step uint64, dt float64) {
	kept := f.vehicles[:0]
	for _, v := range f.vehicles {
		if v.seen == step {
			kept = append(kept, v)
		} else {
			delete(f.byID, v.id)
		}
	}
	clear(f.vehicles[len(kept):])
	f.vehicles = kept
	for i, own := range f.sensors {
		f.elapsed[i] += dt
		for _, s := range own {
			s.vehicles, s.halted, s.covered, s.present = 0, 0, 0, traffic.NoPriority
			s.head, s.headWait = math.Inf(1), 0
			s.ahead = s.ahead[:0]
		}
	}
	for _, v := range f.vehicles {
		if v.placed {
			f.stand(v)
		}
	}
	for _, own := range f.sensors {
		for _, s := range own {
			if !s.loop && s.b > s.a {
				s.occupied += min(1, s.covered/(s.b-s.a)) * dt
			}
		}
	}
}

// stand counts a vehicle where it is at the end of a step.
func (f *field) stand(v *vehicle) {
	for _, t := range v.trail {
		front, rear := v.odometer-t.start, v.odometer-t.start-v.length
		for _, s := range f.loops[t.lane] {
			if front > s.a && rear < s.b {
				s.see(v, s.b-front)
			}
		}
		for _, s := range f.areas[t.lane] {
			if over := min(front, s.b) - max(rear, s.a); over > 0 {
				s.covered += over
			}
			if t.lane == v.lane && front >= s.a && front <= s.b {
				s.see(v, s.b-front)
			}
		}
	}
	for _, s := range f.boxes[v.lane] {
		s.see(v, 0)
		if v.speed >= halted && v.speed < boxSlow {
			s.halted++
		}
	}
	if o := v.oracle; o != nil && v.ahead.dist <= oracleReach {
		o.see(v, v.ahead.dist)
		o.ahead = append(o.ahead, traffic.Approach{DistanceCM: uint32(centi(max(0, v.ahead.dist))), SpeedCMS: uint32(centi(v.speed))})
	}
}

func (s *sensor) see(v *vehicle, before float64) {
	s.vehicles++
	if v.speed < halted {
		s.halted++
	}
	if before < s.head {
		s.head, s.headWait = before, v.wait
	}
	s.present = max(s.present, v.priority)
}

func (s *sensor) pass(v *vehicle) {
	s.count++
	s.speeds += v.speed
}

// move takes a vehicle to where a step of dt seconds brought it.
func (f *field) move(v *vehicle, o observation, dt float64) {
	if o.lane < 0 {
		v.placed, v.trail, v.oracle, v.ahead = false, v.trail[:0], nil, nextSignal{}
		return
	}
	v.speed = o.speed
	if o.speed < halted {
		v.wait += time.Duration(math.Round(dt*1000)) * time.Millisecond
	} else {
		v.wait = 0
	}
	if !v.placed {
		v.placed, v.lane, v.pos = true, o.lane, o.pos
		v.odometer = o.pos
		v.trail = append(v.trail[:0], footprint{o.lane, 0})
		f.look(v, o, 0)
		return
	}
	was := v.odometer
	f.advance(v, o)
	for _, t := range v.trail {
		for _, s := range f.loops[t.lane] {
			line := t.start + s.b
			if was < line && v.odometer >= line {
				s.pass(v)
			}
			if share := overlap(was, v.odometer, t.start+s.a, line+v.length); share > 0 {
				s.occupied += share * dt
				s.passed = max(s.passed, v.priority)
			}
		}
		for _, s := range f.areas[t.lane] {
			if line := t.start + s.b; was < line && v.odometer >= line {
				s.pass(v)
			}
		}
	}
	f.look(v, o, v.odometer-was)
	// What the body has left behind cannot be touched again.
	gone := 0
	for gone < len(v.trail)-1 && v.trail[gone].start+f.net.lanes[v.trail[gone].lane].length < v.odometer-v.length {
		gone++
	}
	v.trail = slices.Delete(v.trail, 0, gone)
}

// overlap returns which share of the way from x0 to x1 lies within (a, b).
func overlap(x0, x1, a, b float64) float64 {
	if x1 <= x0 {
		if x0 > a && x0 < b {
			return 1
		}
		return 0
	}
	return max(0, min(x1, b)-max(x0, a)) / (x1 - x0)
}

// advance lengthens the trail to the observed place and sets the odometer.
func (f *field) advance(v *vehicle, o observation) {
	last := &v.trail[len(v.trail)-1]
	if f.net.lanes[o.lane].edge == f.net.lanes[v.lane].edge && o.pos >= v.pos-1 {
		// The same lane, or beside it: the whole body is taken to have changed.
		last.lane = o.lane
		v.odometer = max(v.odometer, last.start+o.pos)
	} else {
		path := f.path(v.lane, o.lane)
		last.lane = path[0]
		start := last.start
		for i, l := range path[1:] {
			start += f.net.lanes[path[i]].length
			v.trail = append(v.trail, footprint{l, start})
		}
		v.odometer = max(v.odometer, start+o.pos)
	}
	v.lane, v.pos = o.lane, o.pos
}

// path returns the lanes from one to another, both included. The first may be
// another lane of the same edge, where the vehicle must have changed lanes
// first. Where the network knows no short way the lanes are taken as adjacent.
func (f *field) path(from, to int) []int {
	key := [2]int{from, to}
	if p, ok := f.paths[key]; ok {
		return p
	}
	edges := f.net.edges
	var p []int
	for _, goal := range [][]int{{to}, edges[f.net.lanes[to].edge]} {
		for _, start := range append([]int{from}, edges[f.net.lanes[from].edge]...) {
			if p = f.search(start, goal); p != nil {
				break
			}
		}
		if p != nil {
			break
		}
	}
	if p == nil {
		p = []int{from, to}
	}
	p[len(p)-1] = to
	f.paths[key] = p
	return p
}

// search finds the way with the fewest lanes, of at most maxHops.
func (f *field) search(from int, goal []int) []int {
	const maxHops = 8
	came := map[int]int{from: -1}
	front := []int{from}
	for range maxHops {
		var next []int
		for _, l := range front {
			for _, n := range f.next[l] {
				if _, seen := came[n]; seen {
					continue
				}
				came[n] = l
				if slices.Contains(goal, n) {
					var p []int
					for at := n; at >= 0; at = came[at] {
						p = append(p, at)
					}
					slices.Reverse(p)
					return p
				}
				next = append(next, n)
			}
		}
		front = next
	}
	return nil
}

// look updates which oracle a vehicle belongs to, and counts it where it passed
// a stop line. moved is how far it came in the step.
func (f *field) look(v *vehicle, o observation, moved float64) {
	if len(f.oracles) == 0 {
		return
	}
	if v.oracle != nil {
		// Half a metre: SUMO measures the distance along the lanes that the
		// vehicle means to take, we along those that it took.
		changed := o.ahead.tls != v.ahead.tls
		again := o.ahead.link != v.ahead.link && v.ahead.dist <= moved+0.5
		if changed || again {
			v.oracle.pass(v)
		}
	}
	was := v.ahead
	v.ahead = o.ahead
	choices := f.oracles[o.ahead.tls][o.ahead.link]
	if len(choices) == 0 {
		v.oracle = nil
		return
	}
	same := was.tls == o.ahead.tls && was.link == o.ahead.link
	chosen := choices[0].sensor
	for _, c := range choices {
		// A link index may hold several lanes; on none of them yet, it keeps
		// the one that it was counted for.
		if c.lane == v.lane {
			chosen = c.sensor
			break
		}
		if same && c.sensor == v.oracle {
			chosen = c.sensor
		}
	}
	v.oracle = chosen
}

// read returns the readings of junction i for the interval that ends now, and
// begins the next.
func (f *field) read(i int) []traffic.Reading {
	out := make([]traffic.Reading, len(f.sensors[i]))
	for k, s := range f.sensors[i] {
		r := traffic.Reading{
			Detector: s.id, Count: s.count, Vehicles: s.vehicles, Halted: s.halted,
			HeadWaitMS: uint32(s.headWait.Milliseconds()), Priority: max(s.present, s.passed),
		}
		if s.count > 0 {
			r.SpeedCMS = uint32(min(math.MaxUint32, max(0, math.Round(s.speeds/float64(s.count)*100))))
		}
		if len(s.ahead) > 0 {
			r.Ahead = slices.Clone(s.ahead)
			slices.SortStableFunc(r.Ahead, func(a, b traffic.Approach) int { return cmp.Compare(a.DistanceCM, b.DistanceCM) })
		}
		switch s.kind {
		case traffic.Oracle:
		case traffic.Box:
			if r.Vehicles > 0 {
				r.OccupancyPermille = 1000
			}
		default:
			r.OccupancyPermille = permille(s.occupied, f.elapsed[i])
			if r.Vehicles > 0 {
				r.OccupancyPermille = max(r.OccupancyPermille, 1)
			}
		}
		out[k] = r
		s.count, s.speeds, s.occupied, s.passed = 0, 0, 0, traffic.NoPriority
	}
	f.elapsed[i] = 0
	return out
}

func permille(part, whole float64) uint32 {
	if whole <= 0 {
		return 0
	}
	return uint32(math.Round(1000 * max(0, min(1, part/whole))))
}
