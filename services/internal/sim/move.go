package sim

import (
	"math"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Class is a kind of road user in the measures.
type Class uint8

// The classes.
const (
	Car Class = iota
	Bus
	Ambulance
)

var classNames = [...]string{"car", "bus", "ambulance"}

func (c Class) String() string { return classNames[c] }

type vehicle struct {
	id      uint64
	class   Class
	seed    uint64 // its turns follow from it, whatever the lamps do
	links   uint64 // streets so far
	turn    turn   // at the end of this street
	move    *movement
	useBus  bool
	pos     int64 // front, from the beginning of the lane
	v       int64
	spacing int64
	box     int64 // speed through the junction it is in

	bornMS  int64 // when it wanted to enter
	freeUS  int64 // what its way so far takes unhindered
	moving  bool
	stops   int64
	haltMS  int64 // since when it stands, -1 while it does not
	stopAt  int64 // bus stop ahead in this lane, 0: none
	dwellMS int64 // end of the stop, 0: not begun
	dueMS   int64 // timetable: when it should leave the next stop
	granted bool  // its turn at an all-way stop
}

const (
	accelMMS2   = 2_500
	brakeMMS2   = 3_000
	haltedMMS   = 500
	movingMMS   = 3_000
	reactionMS  = 2_000
	dilemmaMS   = 2_000
	gapAcceptMS = 4_500
	clearBoxMS  = 1_500
	allWayMS    = 2_500
	turnedOffMS = 4_000 // a walker hinders those who turn off for so long
	sinkTauMS   = 1_400
	forever     = int64(math.MaxInt64 / 4)
)

// bus timetable.
const (
	dwellBaseMS  = 15_000
	dwellSpread  = 10_000
	scheduleStop = 75_000 // from one stop to the next
)

// splitmix is Steele, Lea and Flood's SplitMix64: it turns a vehicle's seed and
// a counter into its choices.
func splitmix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// choose picks the turn at the end of trunk l.
func (v *vehicle) choose(l *lane) {
	v.links++
	v.move, v.useBus = nil, false
	if l.next[through] == nil {
		return
	}
	roll := int64(splitmix(v.seed+v.links) % 1000)
	lefts, rights := int64(120), int64(130)
	if l.arm == north || l.arm == south {
		lefts, rights = 120, 220
	}
	if v.class == Ambulance {
		lefts, rights = 80, 80
	}
	switch {
	case v.class == Bus:
		v.turn = through
	case roll < lefts:
		v.turn = left
	case roll < lefts+rights:
		v.turn = right
	default:
		v.turn = through
	}
	v.useBus = v.turn == through && l.nextBus != nil && v.class != Car
	v.move = v.stopLane(l).moves[v.turn]
}

func (v *vehicle) stopLane(trunk *lane) *lane {
	if v.useBus {
		return trunk.nextBus
	}
	return trunk.next[v.turn]
}

func (l *lane) speedFor(v *vehicle) int64 {
	if v.class == Ambulance {
		return l.speed * 6 / 5
	}
	return l.speed
}

// fits reports whether l has the length for one more vehicle, standing.
func (l *lane) fits(spacing int64) bool {
	return l.used+spacing <= l.length && len(l.vs) < l.capacity
}

// room reports whether a vehicle that takes spacing may be added to l now.
func (l *lane) room(spacing int64) bool {
	if !l.fits(spacing) {
		return false
	}
	if n := len(l.vs); n > 0 {
		last := l.vs[n-1]
		return last.pos-last.spacing >= l.begin
	}
	return true
}

// push adds v at the end of l, which must have room, at pos or behind the last.
func (l *lane) push(v *vehicle, pos int64) {
	v.pos = pos
	if n := len(l.vs); n > 0 {
		v.pos = min(v.pos, l.vs[n-1].pos-l.vs[n-1].spacing)
	}
	l.vs = append(l.vs, v)
	l.used += v.spacing
}

func (l *lane) pop() {
	v := l.vs[0]
	l.used -= v.spacing
	// Slide instead of reslicing, so that the array is used again.
	copy(l.vs, l.vs[1:])
	l.vs = l.vs[:len(l.vs)-1]
}

// move advances the vehicles of one lane, first to last.
func (c *City) move(l *lane) {
	if len(l.vs) == 0 {
		l.occupy(c.ms, nil)
		return
	}
	for i := 0; i < len(l.vs); i++ {
		v := l.vs[i]
		var gap, leadV int64
		var to *lane
		if i > 0 {
			lead := l.vs[i-1]
			gap, leadV = lead.pos-lead.spacing-v.pos, lead.v
		} else {
			to, gap, leadV = c.ahead(l, v)
		}
		if v.stopAt > 0 {
			c.callAtStop(v)
			if v.stopAt > 0 && v.stopAt-v.pos < gap {
				gap, leadV = v.stopAt-v.pos, 0
			}
		}
		limit := l.speedFor(v)
		switch {
		case v.pos < 0:
			limit = min(limit, v.box)
		case l.site >= 0 && v.move.speed < limit:
			limit = min(limit, brakeTo(v.move.speed, l.length-v.pos))
		}
		tau := int64(sinkTauMS)
		if v.move != nil {
			tau = v.move.tauMS
		}
		speed := min(limit, v.v+accelMMS2*stepMS/1000)
		if gap < 60_000 {
			gap = max(gap, 0)
			speed = min(speed, gap*1000/tau, brakeTo(leadV, gap))
		}
		was := v.pos
		v.v = speed
		dx := speed * stepMS / 1000
		v.pos += dx
		v.freeUS += dx * 1_000_000 / l.speedFor(v)
		c.watchStops(v)
		l.watch(v, was)

		if v.pos >= l.length && i == 0 {
			if c.leave(l, v, to) {
				i--
			}
		}
	}
	var head *vehicle
	if len(l.vs) > 0 {
		head = l.vs[0]
	}
	l.occupy(c.ms, head)
}

// brakeTo is the speed from which v can still be reached within gap.
func brakeTo(v, gap int64) int64 {
	// Exact: the argument is a sum of squares far below 2^53.
	return int64(math.Sqrt(float64(v*v + 2*brakeMMS2*gap)))
}

func (c *City) watchStops(v *vehicle) {
	switch {
	case v.v < haltedMMS:
		if v.haltMS < 0 {
			v.haltMS = c.ms
		}
		if v.moving {
			v.moving = false
			if v.stopAt == 0 || v.stopAt-v.pos > 2_000 {
				v.stops++
			}
		}
	default:
		v.haltMS = -1
		if v.v > movingMMS {
			v.moving = true
		}
	}
}

// callAtStop lets a bus dwell at the stop in its lane.
func (c *City) callAtStop(v *vehicle) {
	switch {
	case v.dwellMS == 0 && v.stopAt-v.pos < 1_000 && v.v < haltedMMS:
		dwell := dwellBaseMS + int64(splitmix(v.seed^v.links)%dwellSpread)
		v.dwellMS = c.ms + dwell
		v.freeUS += dwell * 1000 // standing at a stop is no delay
	case v.dwellMS > 0 && c.ms >= v.dwellMS:
		c.stats.busStops++
		c.stats.latenessMS += c.ms - v.dueMS
		v.dueMS += scheduleStop
		v.stopAt, v.dwellMS = 0, 0
	}
}

// ahead returns where the first vehicle of l goes next, with the gap to what
// is in front of it there, or to the line at which it must stop.
func (c *City) ahead(l *lane, v *vehicle) (to *lane, gap, leadV int64) {
	rest := l.length - v.pos
	wall := func() (*lane, int64, int64) { return nil, max(rest-haltMM, 0), 0 }
	if v.move == nil { // leads out of the city
		return nil, forever, 0
	}
	gap = forever
	if l.site < 0 {
		to = v.stopLane(l)
		if !to.fits(v.spacing) {
			return wall()
		}
	} else {
		to = v.move.to
		if rest < 60_000 && !c.mayPass(l, v, rest) {
			return wall()
		}
		// The one that has just gone is still in front in the junction, even if
		// it turns elsewhere.
		if l.last != nil && l.last.id == l.lastID && l.lastTo != nil {
			if p := l.last.pos; p < 60_000 && contains(l.lastTo, l.last) {
				gap, leadV = rest+p+boxMM-l.last.spacing, l.last.v
			} else {
				l.last = nil
			}
		}
	}
	if n := len(to.vs); n > 0 {
		lead := to.vs[n-1]
		if g := rest + lead.pos - to.begin - lead.spacing; g < gap {
			gap, leadV = g, lead.v
		}
	}
	return to, gap, leadV
}

func contains(l *lane, v *vehicle) bool {
	for i := len(l.vs) - 1; i >= 0; i-- {
		if l.vs[i] == v {
			return true
		}
	}
	return false
}

// mayPass decides whether the first vehicle of a stop lane may enter the
// junction in this step, with rest to the stop line.
func (c *City) mayPass(l *lane, v *vehicle, rest int64) bool {
	s, m := c.sites[l.site], v.move
	if !m.to.fits(v.spacing) {
		return false
	}
	// Whoever goes straight waits until a crossing is empty, who turns off it
	// until the walkers are past the exit.
	if len(m.crossings[0].crossing) > 0 || m.turn == through && len(m.crossings[1].crossing) > 0 || c.ms < m.crossings[1].busyMS {
		return false
	}
	shown := c.ms - s.since[m.group]
	switch a := s.lamps.At(m.group); a {
	case traffic.Green, traffic.Permissive:
		if shown < reactionMS && v.haltMS >= 0 {
			return false
		}
		return a == traffic.Green || !m.opposing || c.gapIn(s, l.opposes)
	case traffic.Yellow:
		if m.opposing {
			// One sneaker: it has waited inside, and the others are stopping.
			return rest <= 2*haltMM && shown >= 1_000 && shown < 2_500 && c.gapIn(s, l.opposes)
		}
		return rest*1000 <= v.v*max(dilemmaMS-shown, 0)
	case traffic.FlashRed, traffic.Dark:
		if !v.granted && v.haltMS >= 0 && c.ms-v.haltMS >= reactionMS && rest <= 2*haltMM && c.ms-s.allWay >= allWayMS {
			v.granted = true // its turn has come, nobody else starts meanwhile
			s.allWay = c.ms
		}
		return v.granted
	default:
		return false
	}
}

// gapIn reports whether a left turn fits between the vehicles of stream o.
func (c *City) gapIn(s *site, o *lane) bool {
	if c.ms-o.lastMS < clearBoxMS && o.lastMv != nil && o.lastMv.turn != left {
		return false
	}
	if len(o.vs) == 0 {
		return true
	}
	first := o.vs[0]
	if first.move.turn == left {
		return true // it waits in front of all others there
	}
	a := s.lamps.At(first.move.group)
	if !a.Go() && a != traffic.Yellow {
		return true
	}
	rest := o.length - first.pos
	if a == traffic.Yellow {
		return rest*1000 > first.v*dilemmaMS
	}
	return rest-5_000 > max(first.v, 3_000)*gapAcceptMS/1000
}

// leave takes the first vehicle of l over its end.
func (c *City) leave(l *lane, v *vehicle, to *lane) bool {
	over := v.pos - l.length
	if v.move == nil {
		l.pop()
		c.finish(v)
		return true
	}
	// Somebody from another lane may have come first in this very step.
	if to == nil || !to.room(v.spacing) {
		v.pos, v.v = l.length, 0
		return false
	}
	l.pop()
	if l.site >= 0 {
		m := v.move
		s := c.sites[l.site]
		if l.stopLine != nil {
			l.stopLine.passed(v)
		}
		l.last, l.lastID, l.lastMS, l.lastTo, l.lastMv = v, v.id, c.ms, to, m
		l.tailMS = c.ms + (v.spacing-gapMM)*1000/max(v.v, 1_000)
		s.allWay = c.ms
		c.stats.crossed++
		v.box, v.granted = m.speed, false
		v.stopAt = 0
		to.push(v, to.begin+over)
		v.choose(to)
		return true
	}
	to.push(v, to.begin+over)
	if to.bus && v.class == Bus {
		v.stopAt, v.dwellMS = stopLaneMM-busStopMM, 0
	}
	return true
}

// walk lets pedestrians of a junction start and arrive on the other side.
func (c *City) walk(s *site) {
	for a := range s.crossings {
		x := &s.crossings[a]
		for len(x.crossing) > 0 && x.crossing[0] <= c.ms {
			x.crossing = append(x.crossing[:0], x.crossing[1:]...)
		}
		if len(x.waiting) > 0 && s.lamps.At(x.group).Go() {
			for _, t := range x.waiting {
				c.stats.walked++
				c.stats.walkWaitMS += c.ms - t
				c.stats.walkWaitMax = max(c.stats.walkWaitMax, c.ms-t)
				x.crossing = append(x.crossing, c.ms+x.clearMS)
			}
			x.busyMS = c.ms + turnedOffMS
			x.waiting = x.waiting[:0]
		}
	}
}
