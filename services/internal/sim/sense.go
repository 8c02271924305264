package sim

import "github.com/stopline-traffic/stopline/pkg/traffic"

// probe is the running part of one detector: what it has seen since it was
// last read.
type probe struct {
	detector *traffic.Detector
	lane     *lane
	crossing *crossing

	count, speedSum, occupiedMS int64
	priority                    traffic.Priority
}

func (p *probe) passed(v *vehicle) {
	p.count++
	p.speedSum += v.v
	p.priority = max(p.priority, v.priority())
}

// priority is what the transponder of v asks for; a bus does not while its
// doors are open.
func (v *vehicle) priority() traffic.Priority {
	switch {
	case v.class == Ambulance:
		return traffic.Emergency
	case v.class == Bus && v.stopAt == 0:
		return traffic.Bus
	}
	return traffic.NoPriority
}

// watch notes that v has moved from was to where it is, past the loops of l.
func (l *lane) watch(v *vehicle, was int64) {
	if p := l.exit; p != nil && was < 0 && v.pos >= 0 {
		p.passed(v)
	}
	if p := l.area; p != nil {
		if at := l.length - areaMM; was < at && v.pos >= at {
			p.passed(v)
		}
	}
	if p := l.advance; p != nil {
		at := l.length - advanceMM
		if was < at && v.pos >= at {
			p.passed(v)
		}
		if v.pos >= at-loopMM && v.pos-(v.spacing-gapMM) < at {
			p.occupiedMS += stepMS
		}
	}
}

// occupy notes what stands on the detectors of l at the end of a step, given
// the first vehicle that is left in it.
func (l *lane) occupy(ms int64, head *vehicle) {
	if p := l.stopLine; p != nil && (ms < l.tailMS || head != nil && head.pos >= l.length-loopMM) {
		p.occupiedMS += stepMS
	}
	if head == nil {
		return
	}
	if p := l.area; p != nil && head.pos >= l.length-areaMM {
		p.occupiedMS += stepMS
	}
	if p := l.exit; p != nil && head.pos >= 0 {
		p.occupiedMS += stepMS
	}
}

// read returns what p saw in the last elapsed milliseconds and starts it anew.
func (p *probe) read(ms, elapsed int64) traffic.Reading {
	r := traffic.Reading{Detector: p.detector.ID}
	if x := p.crossing; x != nil {
		r.Count = uint32(len(x.waiting))
		if len(x.waiting) > 0 {
			r.HeadWaitMS = uint32(ms - x.waiting[0])
		}
		return r
	}
	r.Count = uint32(p.count)
	if p.count > 0 {
		// A vehicle that counts moves, if only just.
		r.SpeedCMS = uint32(max(p.speedSum/p.count/10, 1))
	}
	if elapsed > 0 {
		r.OccupancyPermille = uint32(min(p.occupiedMS*1000/elapsed, 1000))
	}
	r.Priority = p.priority
	p.count, p.speedSum, p.occupiedMS, p.priority = 0, 0, 0, traffic.NoPriority

	from, to := p.lane.length-p.detector.FromStopLineCM*10-p.detector.LengthCM*10, p.lane.length-p.detector.FromStopLineCM*10
	if p.detector.Kind == traffic.ExitArea {
		from, to = 0, p.detector.LengthCM*10
	}
	for i, v := range p.lane.vs {
		// Under a loop is who covers it, in an area who has its front there.
		if tail := v.pos - (v.spacing - gapMM); v.pos < from || p.detector.LengthCM*10 <= loopMM && tail >= to || p.detector.LengthCM*10 > loopMM && v.pos > to {
			continue
		}
		r.Vehicles++
		r.Priority = max(r.Priority, v.priority())
		if v.haltMS >= 0 {
			r.Halted++
			if r.HeadWaitMS == 0 && (i == 0 || r.Vehicles == 1) {
				r.HeadWaitMS = uint32(ms - v.haltMS)
			}
		}
	}
	return r
}
