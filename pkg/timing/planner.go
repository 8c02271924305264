package timing

import (
	"math"
	"sync"
)

// Settings of the planner. One set serves every network.
const (
	planMS     = 50_000 // how far ahead it looks
	startupMS  = 1_200  // lost by the first of a queue when its light turns green
	stopCostMS = 4_000  // what a stop costs beside its wait: braking and starting again
	yellowMS   = 1_000  // of yellow in which who is on the move still goes
	gapAheadMS = 4_500  // a permissive movement leaves that before somebody who comes
	gapAfterMS = 1_500  // and that after him
	restMS     = 2_000  // a stage that has served nobody for so long is over
	longestMS  = 40_000 // and one that has lasted so long
	chain      = 3      // how many stages follow one another in a plan
	waves      = 1      // how many more platoons a stage of a plan may wait for
	nodesMost  = 4_000  // stages tried in one decision
	unit       = 1_000  // weight of one vehicle
	hysteresis = 500 * unit
)

// scratch is the planner's working memory. It holds nothing between decisions.
type scratch struct {
	m   *model
	arr []int32 // ms from now, by vehicle; lanes one after the other
	w   []int32
	mv  []int16
	run []bool  // on the move: a stop costs
	beg []int32 // by lane
	end []int32
	hlt []int64 // by lane: what a stop costs, ms
	nf  []int32 // by lane: when its head may go, at the earliest
	cap []int32 // by exit, thousandths of a vehicle
	ref []int32 // by exit, thousandths a second; negative: not limited

	states []state
	cand   []int32 // by lane, in serve
	active []int16

	best   int64
	first  int // stage of the best plan that switches now, or the shown one
	stay   int64
	leave  []int64 // by stage: best plan that goes there now
	nodes  int
	cur    int
	margin int64
	at     int32 // after how many ms the plans in hand leave the shown stage
	leaves int32 // ms after which the best plan leaves the shown stage

	inLane []int16 // by announced vehicle
	owed   []int64 // by lane
	given  []int64 // by movement

	// Where services are noted, in announce.
	sent   []SentMemory
	sentMS int64
}

type state struct {
	all  []int32 // what the slices below are parts of, so that it is copied at once
	head []int32
	nf   []int32
	used []int32 // by exit
	last []int32 // by movement
	cost int64
}

func (s *state) copyFrom(o *state) {
	copy(s.all, o.all)
	s.cost = o.cost
}

func (s *state) fit(lanes, exits, moves int) {
	s.all = grow(s.all, 2*lanes+exits+moves)
	rest := s.all
	part := func(n int) []int32 {
		p := rest[:n:n]
		rest = rest[n:]
		return p
	}
	s.head, s.nf, s.used, s.last = part(lanes), part(lanes), part(exits), part(moves)
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func grow[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n, n+n/2+8)
	}
	return s[:n]
}

// begin makes the scratch fit the model and empties it.
func (p *scratch) begin(m *model) {
	p.m = m
	p.arr, p.w, p.mv, p.run = p.arr[:0], p.w[:0], p.mv[:0], p.run[:0]
	n := len(m.lanes)
	p.beg, p.end, p.nf = grow(p.beg, n), grow(p.end, n), grow(p.nf, n)
	p.hlt = grow(p.hlt, n)
	p.cand, p.active = grow(p.cand, n), grow(p.active, n)
	p.cap, p.ref = grow(p.cap, m.exits), grow(p.ref, m.exits)
	p.leave = grow(p.leave, len(m.stages))
	p.states = grow(p.states, chain+4)
	for i := range p.states {
		p.states[i].fit(n, m.exits, len(m.moves))
	}
	p.given = grow(p.given, len(m.moves))
	clear(p.given)
	for l := range p.hlt {
		p.hlt[l] = stopCostMS
	}
	clear(p.nf)
	for i := range p.cap {
		p.cap[i], p.ref[i] = 0, -1
	}
}

func (p *scratch) add(arr, w int32, mv int16, run bool) {
	p.arr, p.w, p.mv, p.run = append(p.arr, arr), append(p.w, w), append(p.mv, mv), append(p.run, run)
}

// search looks for the plan that costs least, and fills in stay and leave.
func (p *scratch) search(cur int) {
	p.cur, p.best, p.stay, p.nodes = cur, math.MaxInt64/2, math.MaxInt64/2, 0
	for k := range p.leave {
		p.leave[k] = math.MaxInt64 / 2
	}
	p.margin, p.at, p.leaves, p.first = hysteresis, 0, 0, cur
	s := &p.states[0]
	p.initial(s)

	t := &p.states[1]
	t.copyFrom(s)
	p.serve(t, cur, 0, planMS, -1)
	p.leaf(t, cur, true)

	// Until it has served who is there: often the best, and so a good measure for
	// what follows.
	t.copyFrom(s)
	p.run1(1, 0, cur, chain, cur, true)

	var at int32
	for _, d := range p.m.start {
		p.at = d
		if d > at {
			p.serve(s, cur, at, d, -1)
			at = d
		}
		if p.bound(s, at, nil, 0) >= p.best+p.margin {
			break
		}
		for b := range p.m.stages {
			if b == cur || !p.useful(s, b) {
				continue
			}
			p.branch(s, 1, at, cur, b, chain, b, d > 0)
		}
	}
}

func (p *scratch) initial(s *state) {
	copy(s.head, p.beg)
	copy(s.nf, p.nf)
	clear(s.used)
	for i := range s.last {
		s.last[i] = -1_000_000
	}
	s.cost = 0
}

// useful reports whether the stage lets the head of any lane go.
func (p *scratch) useful(s *state, k int) bool {
	row := p.m.row(k)
	for _, l := range p.m.rowLanes[k] {
		if s.head[l] < p.end[l] && row[p.mv[s.head[l]]] != stop {
			return true
		}
	}
	return false
}

func (p *scratch) done(s *state) bool {
	for l := range p.m.lanes {
		if s.head[l] < p.end[l] {
			return false
		}
	}
	return true
}

// run1 runs stage k in states[at] from t until it has served who is there, then
// tries every stage after it; and again after whoever comes next.
func (p *scratch) run1(at int, t int32, k, depth, first int, stays bool) {
	p.nodes++
	s := &p.states[at]
	least := p.m.stages[k].minGreen
	for turn := 0; ; turn++ {
		t = p.serve(s, k, t, planMS, least)
		if t >= planMS || depth <= 0 || p.done(s) || turn > waves || p.nodes > nodesMost {
			if t < planMS {
				p.serve(s, k, t, planMS, -1)
			}
			p.leaf(s, first, stays)
			return
		}
		if p.bound(s, t, nil, 0) >= p.best+p.margin {
			return
		}
		if at == 1 && k == p.cur {
			p.at = t
		}
		for b := range p.m.stages {
			if b == k || !p.useful(s, b) {
				continue
			}
			p.branch(s, at+1, t, k, b, depth-1, first, stays)
		}
		// Until the next one comes for whom the stage is green.
		next := p.next(s, k, t)
		if next >= planMS {
			p.leaf(s, first, stays)
			return
		}
		least = next - t
	}
}

// next is when somebody may go in stage k, at t at the earliest.
func (p *scratch) next(s *state, k int, t int32) int32 {
	next, row := int32(planMS), p.m.row(k)
	for _, l := range p.m.rowLanes[k] {
		i := s.head[l]
		if i >= p.end[l] || row[p.mv[i]] == stop {
			continue
		}
		next = min(next, p.room(s, p.mv[i], max(s.nf[l], p.arr[i], t)))
	}
	return next
}

func (p *scratch) leaf(s *state, first int, stays bool) {
	c := p.final(s)
	if stays {
		p.stay = min(p.stay, c)
	} else {
		p.leave[first] = min(p.leave[first], c)
	}
	if c < p.best {
		p.best, p.first, p.leaves = c, first, p.at
	}
}

// final adds what those cost who are still there at the end.
func (p *scratch) final(s *state) int64 {
	c := s.cost
	for l := range p.m.lanes {
		var q int64
		for i := s.head[l]; i < p.end[l]; i++ {
			q++
			d := int64(planMS - p.arr[i])
			if d <= 0 {
				continue
			}
			d += q * headwayMS / 2
			if p.run[i] {
				d += p.hlt[l]
			}
			c += int64(p.w[i]) * d
		}
	}
	return c
}

// bound is less than any plan from here can cost: every lane served from t on as
// if it had the junction to itself, and those that the row, if there is one, does
// not let go not before late.
func (p *scratch) bound(s *state, t int32, row []byte, late int32) int64 {
	c := s.cost
	for l := range p.m.lanes {
		i := s.head[l]
		if i >= p.end[l] {
			continue
		}
		at := max(s.nf[l], t)
		if row != nil && row[p.mv[i]] == stop {
			at = max(at, late)
		}
		var step int32 = leastHeadwayMS
		if p.m.lanes[l].walk {
			step = 0
		}
		for ; i < p.end[l]; i++ {
			arr := p.arr[i]
			if arr >= planMS {
				break
			}
			at = max(at, arr)
			c += int64(p.w[i]) * int64(min(at, planMS)-arr)
			at += step
		}
	}
	return c
}

// branch tries stage b after stage a, from s at t, with the plan's last states.
func (p *scratch) branch(s *state, at int, t int32, a, b, depth, first int, stays bool) {
	n := &p.states[at]
	n.copyFrom(s)
	t = p.transit(n, t, a, b)
	late := t + p.m.stages[b].minGreen + p.m.stages[b].leastChange
	if p.bound(n, t, p.m.row(b), late) >= p.best+p.margin {
		return
	}
	p.run1(at, t, b, depth, first, stays)
}

// transit leads s from stage a to stage b and returns when b begins.
func (p *scratch) transit(s *state, t int32, a, b int) int32 {
	m := p.m
	n := len(m.stages)
	d := m.change[a*n+b]
	from, to := m.row(a), m.row(b)
	if d > 0 {
		keeps, first, last := m.between(a, b)
		rest := m.row(last)
		// Where pedestrians need longest to clear, vehicles go on meanwhile.
		if h := min(m.held[a*n+b], d); h > 0 {
			p.serve(s, keeps, t, t+h, -1)
			t, d = t+h, d-h
		}
		// Of those who give way, the first of each lane stands in the junction
		// already and leaves it with the yellow.
		for _, l := range m.rowLanes[a] {
			i := s.head[l]
			if i >= p.end[l] || s.nf[l] > t+1000 || p.arr[i] >= t {
				continue
			}
			k := p.mv[i]
			if from[k] != gives || rest[k] != stop || m.lanes[l].walk || p.room(s, k, t+1000) > t+1000 {
				continue
			}
			s.cost += int64(p.w[i]) * int64(t+1000-p.arr[i])
			s.head[l]++
			s.nf[l] = t + 2000
			if e := m.moves[k].exit; e >= 0 {
				s.used[e] += unit
			}
		}
		mid := min(t+yellowMS, t+d)
		p.serve(s, first, t, mid, -1)
		if m.common[a*n+b] {
			p.serve(s, last, mid, t+d, -1)
		}
		t += d
	}
	for _, l := range m.rowLanes[b] {
		i := s.head[l]
		if i >= p.end[l] || m.lanes[l].walk {
			continue
		}
		k := p.mv[i]
		if from[k] == stop && to[k] != stop && (!p.run[i] || p.arr[i] < t-1000) {
			s.nf[l] = max(s.nf[l], t+startupMS)
		}
	}
	return t
}

// room returns when movement k's exit can take one more, at t at the earliest.
func (p *scratch) room(s *state, k int16, t int32) int32 {
	e := p.m.moves[k].exit
	if e < 0 || p.ref[e] < 0 {
		return t
	}
	// thousandths of a vehicle: cap + ref·t − used ≥ 1000
	need := unit + s.used[e] - p.cap[e]
	if need <= 0 {
		return t
	}
	if p.ref[e] == 0 {
		return math.MaxInt32
	}
	return max(t, int32((int64(need)*1000+int64(p.ref[e])-1)/int64(p.ref[e])))
}

// serve lets go who may under the row, from t to until. Where minGreen is not
// negative, it ends early: when the stage has had that and there is nobody to serve for
// a while, and returns the moment, on the grid of decisions, right after the last
// one who was served.
func (p *scratch) serve(s *state, r int, t, until, minGreen int32) int32 {
	m, early, row := p.m, minGreen >= 0, p.m.row(r)
	active := p.active[:0]
	for _, l := range m.rowLanes[r] {
		i := s.head[l]
		if i >= p.end[l] {
			continue
		}
		k := p.mv[i]
		if row[k] == stop || row[k] == ends && !p.run[i] {
			continue
		}
		p.cand[l] = p.room(s, k, max(s.nf[l], p.arr[i], t))
		if p.cand[l] < until {
			active = append(active, l)
		}
	}
	end := until
	if early {
		end = p.onGrid(t + minGreen)
	}
	limit := min(until, t+longestMS)
	for len(active) > 0 {
		// The next one.
		at := 0
		for x := 1; x < len(active); x++ {
			if p.cand[active[x]] < p.cand[active[at]] {
				at = x
			}
		}
		l := active[at]
		c := p.cand[l]
		if c >= until || early && (c >= end+restMS || c >= limit && end >= limit) {
			break
		}
		i := s.head[l]
		k := p.mv[i]
		if row[k] == gives {
			if wait := p.givesWay(s, row, k, c, active); wait > c {
				p.cand[l] = wait
				if wait >= until {
					active[at] = active[len(active)-1]
					active = active[:len(active)-1]
				}
				continue
			}
		}
		// Served.
		d := c - p.arr[i]
		cost := int64(d)
		if p.run[i] && d > 1500 {
			cost += p.hlt[l] * int64(min(d, 3000)) / 3000
		}
		s.cost += int64(p.w[i]) * cost
		s.head[l]++
		s.last[k] = c
		if m.lanes[l].walk {
			s.nf[l] = c
		} else if row[k] == gives {
			s.nf[l] = c + m.moves[k].permissive
		} else {
			s.nf[l] = c + m.moves[k].protected
		}
		if e := m.moves[k].exit; e >= 0 {
			s.used[e] += unit
			if p.sent != nil && len(p.sent[e].Planned) < outflowMost {
				p.sent[e].Planned = append(p.sent[e].Planned, p.sentMS+int64(c))
			}
		}
		if early {
			end = max(end, p.onGrid(c+1))
		}
		// The lane's next, and others who wanted the same exit.
		gone := true
		if i++; i < p.end[l] {
			if k := p.mv[i]; row[k] != stop && (row[k] != ends || p.run[i]) {
				if p.cand[l] = p.room(s, k, max(s.nf[l], p.arr[i], t)); p.cand[l] < until {
					gone = false
				}
			}
		}
		if gone {
			active[at] = active[len(active)-1]
			active = active[:len(active)-1]
		}
		if e := m.moves[k].exit; e >= 0 && p.ref[e] >= 0 {
			for _, o := range active {
				if h := p.mv[s.head[o]]; m.moves[h].exit == e {
					p.cand[o] = p.room(s, h, p.cand[o])
				}
			}
		}
	}
	if early {
		return min(end, until)
	}
	return until
}

// onGrid is the first moment for a decision at or after t.
func (p *scratch) onGrid(t int32) int32 {
	g := p.m.grid
	return (t + g - 1) / g * g
}

// givesWay returns when a permissive movement that is ready at c may go as far
// as is known now: c if nobody is in its way.
func (p *scratch) givesWay(s *state, row []byte, k int16, c int32, active []int16) int32 {
	m := p.m
	for _, o := range m.moves[k].yields {
		if s.last[o] > c-gapAfterMS {
			return s.last[o] + gapAfterMS
		}
		if row[o] == stop {
			continue
		}
		l := m.moves[o].lane
		i := s.head[l]
		if i >= p.end[l] || p.mv[i] != o {
			continue
		}
		for _, a := range active {
			if a != l {
				continue
			}
			x := p.cand[l]
			if row[o] == gives && x >= c {
				break // whoever is there first goes
			}
			if x < c+gapAheadMS {
				return max(x, c) + 1
			}
		}
	}
	return c
}
