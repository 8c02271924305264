package health

import "fmt"

// The rules by cycles need to know what the lamps show. They find within a few
// cycles what the other rules find within hours: who could not be believed for
// half an hour of a rush would have been acted on all that time.
const (
	// stuckGreens is how many whole greens a detector must be occupied without
	// counting anybody. Each must last for greenMS: in less nobody need have
	// started.
	stuckGreens = 2
	greenMS     = 5000
	// offSeen is how many vehicles another detector of the lane must have counted,
	// besides those that fit in between, while this one saw nothing through offGreens
	// whole greens.
	offSeen   = 8
	offGreens = 2
	// Where there is no other, or all are silent together, nobody may have come.
	// Real demand stops for minutes: offExpected vehicles must be missing then, by
	// the rate of before. Whether there was green does not matter: who seems to be
	// nobody may never get one.
	offExpected = 40
	// rateMost and rateLeast say what the rate rests on, in observed time.
	rateMostMS  = 30 * 60_000
	rateLeastMS = 5 * 60_000

	stuckClearMS = 10 * 60_000
)

// cycles is what is remembered of one detector by cycles. Times are ms.
type cycles struct {
	green, greenFor int64 // 1: the last span was green; for how long
	// Of the present occupation without a count: since when, whether all of the
	// present green was part of it, and how many whole greens were.
	onFrom, onWhole, onGreens int64
	// Of the present quiet: since when, for how long, through how many greens, and
	// what the other detectors of the lane counted meanwhile.
	offFrom, offMS, offGreens, offOthers int64
	// Counts, and the time they were made in, without the present quiet.
	rateN, rateMS int64
}

// fields are all of them, in the order in which they are stored.
func (c *cycles) fields() [11]*int64 {
	return [...]*int64{&c.green, &c.greenFor, &c.onFrom, &c.onWhole, &c.onGreens, &c.offFrom, &c.offMS, &c.offGreens, &c.offOthers, &c.rateN, &c.rateMS}
}

// cycle judges the detector by one more span, at whose end its movements had
// green or not; others is what another detector of the lane counted in it, and
// between how many vehicles fit between the two. track.observe has seen it.
func (t *track) cycle(s span, gap int64, green bool, others, between int64, out []change) []change {
	c := &t.cycles
	dt := s.to - s.from
	if gap > gapMS {
		// What happened meanwhile is not known.
		c.green, c.greenFor, c.onFrom, c.onWhole, c.onGreens = 0, 0, 0, 0, 0
		c.offFrom, c.offMS, c.offGreens, c.offOthers = 0, 0, 0, 0
	}
	ended := c.green == 1 && !green && c.greenFor >= greenMS
	began := c.green == 0 && green

	// Occupied, and nobody passes.
	stands := s.full && s.count == 0
	switch {
	case !stands:
		c.onFrom, c.onWhole, c.onGreens = 0, 0, 0
	default:
		if c.onFrom == 0 {
			c.onFrom = s.from
		}
		if ended {
			c.onGreens += c.onWhole
		}
		if began {
			c.onWhole = 1
		}
	}
	v := &t.verdicts[stuckOn]
	if v.update(c.onGreens >= stuckGreens, c.onFrom, dt, stuckClearMS, s.hit || !s.full) {
		ch := change{stuckOn, v.failed, c.onFrom, fmt.Sprintf("occupied without a break through %d whole greens, and nobody counted", c.onGreens)}
		if !v.failed {
			ch.since, ch.reason = s.to, fmt.Sprintf("was not for %s", clock(stuckClearMS))
		}
		out = append(out, ch)
	}

	// Nothing comes where much did.
	if s.quiet {
		if c.offFrom == 0 {
			c.offFrom = s.from
		}
		c.offMS += dt
		c.offOthers += others
		if ended && c.offMS > c.greenFor { // all of it
			c.offGreens++
		}
	} else {
		c.rateN += s.count
		c.rateMS += dt + c.offMS
		if t.verdicts[stuckOff].failed {
			c.rateMS -= c.offMS // nobody knows who came meanwhile
		}
		if c.rateMS > rateMostMS {
			c.rateN, c.rateMS = c.rateN/2, c.rateMS/2
		}
		c.offFrom, c.offMS, c.offGreens, c.offOthers = 0, 0, 0, 0
	}
	missing := int64(0)
	if c.rateMS >= rateLeastMS {
		missing = c.rateN * c.offMS / c.rateMS
	}
	v = &t.verdicts[stuckOff]
	passed := c.offOthers >= offSeen+between && c.offGreens >= offGreens
	if v.update(passed || missing >= offExpected, c.offFrom, dt, hitClearMS, !s.quiet) {
		ch := change{stuckOff, v.failed, c.offFrom, fmt.Sprintf("nothing for %s, when %d were to be expected", clock(c.offMS), missing)}
		if passed {
			ch.reason = fmt.Sprintf("nothing for %s, while another detector of the lane counted %d", clock(c.offMS), c.offOthers)
		}
		if !v.failed {
			ch.since, ch.reason = s.to, fmt.Sprintf("has seen something again for %s", clock(hitClearMS))
		}
		out = append(out, ch)
	}
	if c.green = 0; green {
		c.green = 1
		c.greenFor += dt
	} else {
		c.greenFor = 0
	}
	return out
}
