package hires

import (
	"cmp"
	"math"
	"slices"
)

// occupation is whether a detector at the stop line has a vehicle on it.
type occupation struct {
	on bool
	at int64 // since when, if on
	// off is the stamp of an off that came while the detector was off; an on with
	// the same stamp came before it.
	off int64
}

type interval struct{ from, to int64 }

// splitCycle is a cycle whose occupation is to be measured: green, yellow and red
// begin, and red counts until end.
type splitCycle struct {
	green, yellow, red, end int64
	termination             string
}

// splitPhase measures the occupation of a phase's cycles. Whether a detector that
// is on was on throughout shows only at its next event, so that cycles wait for
// it.
type splitPhase struct {
	cycles []splitCycle
	// taken are the times that any detector is known to have been occupied, from
	// the first waiting cycle on, in no order.
	taken []interval
	bins  map[int64]*splitBin
	merge []interval // reused
}

type splitBin struct {
	cycles, incomplete, failures int
	green                        int64
	greenShare, redShare         float64
}

// maxWaiting is how many cycles wait for a detector that stays on. It is most of
// a day; then the oldest is measured as if it had been on throughout.
const maxWaiting = 1024

func (p *meterPhase) splitBin(t int64) *splitBin {
	at := p.d.m.bin(t)
	b := p.split.bins[at]
	if b == nil {
		b = &splitBin{}
		if p.split.bins == nil {
			p.split.bins = map[int64]*splitBin{}
		}
		p.split.bins[at] = b
	}
	return b
}

// occupy takes an on or off of a detector.
func (p *meterPhase) occupy(o *occupation, e *meterEvent) {
	t := e.at
	switch {
	case e.code == DetectorOff && o.on:
		p.take(o.at, t)
		o.on = false
	case e.code == DetectorOff:
		o.off = t
	case o.on: // an off is missing
		to := t
		if t-o.at > int64(p.d.m.o.LostOff) {
			to = o.at + (t-o.at)/2
		}
		p.take(o.at, to)
		o.at = t
	case o.off == t: // on and off within one stamp
	default:
		o.on, o.at = true, t
	}
	p.settle(t)
}

// take notes that the stop line was occupied.
func (p *meterPhase) take(from, to int64) {
	if oldest := p.oldest(); oldest != 0 && to > oldest {
		p.split.taken = append(p.split.taken, interval{max(from, oldest), to})
	}
}

// oldest returns from when on occupation matters: the green of the first cycle
// that is not yet measured, 0 if there is none.
func (p *meterPhase) oldest() int64 {
	if len(p.split.cycles) > 0 {
		return p.split.cycles[0].green
	}
	return p.greenAt
}

// begin begins a green. It ends the red that counts, if it comes that early.
func (s *splitPhase) begin(green int64) {
	n := len(s.cycles)
	if n == 0 {
		s.taken = s.taken[:0] // of cycles that were lost
		return
	}
	s.cycles[n-1].end = min(s.cycles[n-1].end, green)
}

// settle measures the waiting cycles of which everything is known at time t.
func (p *meterPhase) settle(t int64) {
	s := &p.split
	for len(s.cycles) > 0 {
		c := &s.cycles[0]
		if len(s.cycles) <= maxWaiting {
			if t < c.end {
				return
			}
			for _, o := range p.stops {
				if o.on && o.at < c.end {
					return
				}
			}
		}
		p.measure(c)
		s.cycles = slices.Delete(s.cycles, 0, 1)
		// What lies before the next cycle is done with.
		oldest := p.oldest()
		s.taken = slices.DeleteFunc(s.taken, func(i interval) bool { return oldest == 0 || i.to <= oldest })
	}
}

// measure judges a cycle by what is known, and takes detectors that are on as on
// until its end.
func (p *meterPhase) measure(c *splitCycle) {
	if len(p.stops) == 0 || !p.d.m.in(c.green) {
		return
	}
	s, o := &p.split, &p.d.m.o
	s.merge = append(s.merge[:0], s.taken...)
	for _, stop := range p.stops {
		if stop.on {
			s.merge = append(s.merge, interval{stop.at, c.end})
		}
	}
	slices.SortFunc(s.merge, func(a, b interval) int { return cmp.Compare(a.from, b.from) })
	green, red := c.yellow-c.green, int64(o.RedTime)
	greenShare := float64(covered(s.merge, c.green, c.yellow)) / float64(green)
	redShare := float64(covered(s.merge, c.red, c.end)) / float64(red)
	failure := greenShare >= o.GreenOccupancy && redShare >= o.RedOccupancy

	b := p.splitBin(c.green)
	b.cycles++
	b.green += green
	b.greenShare += greenShare
	b.redShare += redShare
	if failure {
		b.failures++
	}
	if p.d.m.want[MeasureSplitCycles] {
		p.d.m.out.SplitCycles = append(p.d.m.out.SplitCycles, SplitCycleRow{Stamp(c.green), p.d.id, p.number, Seconds(green), Share(greenShare), Share(redShare), c.termination, failure})
	}
}

// covered returns how much of the time lies in any of the intervals, which are in
// order of their begin.
func covered(in []interval, from, to int64) int64 {
	var sum int64
	for _, i := range in {
		if i.from >= to {
			break
		}
		a, b := max(i.from, from), min(i.to, to)
		if b > a {
			sum += b - a
			from = b
		}
	}
	return sum
}

// finishSplits measures what still waits at the end of the log. A cycle whose
// end the log does not reach is left out.
func (p *meterPhase) finishSplits() {
	s := &p.split
	for i := range s.cycles {
		if c := &s.cycles[i]; c.end <= p.d.newest {
			p.measure(c)
		}
	}
	if len(p.stops) == 0 || !p.d.m.want[MeasureSplitFailures] {
		return
	}
	for at, b := range s.bins {
		r := SplitRow{Time: Stamp(at), Device: p.d.id, Phase: p.number, Cycles: b.cycles, Incomplete: b.incomplete, Failures: b.failures,
			Green: Unknown, GreenOccupancy: Share(math.NaN()), RedOccupancy: Share(math.NaN())}
		if n := float64(b.cycles); n > 0 {
			r.Green = Seconds((b.green/int64(b.cycles) + 500_000) / 1_000_000 * 1_000_000) // to the millisecond
			r.GreenOccupancy, r.RedOccupancy = Share(b.greenShare/n), Share(b.redShare/n)
		}
		p.d.m.out.SplitFailures = append(p.d.m.out.SplitFailures, r)
	}
}
