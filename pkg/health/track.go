package health

import "fmt"

// span is what one detector said of the time between two moments, Unix ms.
type span struct {
	from, to int64
	count    int64
	full     bool // occupied from beginning to end
	hit      bool // there was something
	quiet    bool // there was nothing at all; only for the rules by cycles
}

// counted is a span that counted somebody.
type counted struct{ from, to, n int64 }

// verdict is whether a rule is broken.
type verdict struct {
	failed bool
	// good is for how long it has not been while failed: observed ms, or windows.
	good  int64
	since int64
}

// track is what is remembered of one detector.
type track struct {
	to int64 // what is known reaches so far; 0: nothing yet
	// counts are the latest spans with counts, within 30 s, at most as many as it
	// takes to break the rule.
	counts []counted
	// silent is the time without a hit that was seen since silentFrom, locked that
	// of the present occupation.
	silentFrom, silent int64
	lockedFrom, locked int64
	// alive: there was a hit since the detector was last locked on.
	alive    bool
	cycles   cycles
	verdicts [len(rules)]verdict
}

// change is a rule that begins, or ceases, to be broken.
type change struct {
	rule   int
	failed bool
	since  int64
	reason string
}

// update judges one rule and reports whether that has changed. step is what good
// grows by; clear is how far it must.
func (v *verdict) update(broken bool, since, step, clear int64, may bool) bool {
	if broken {
		v.good = 0
		if v.failed {
			return false
		}
		v.failed, v.since = true, since
		return true
	}
	if !v.failed {
		return false
	}
	v.good += step
	if v.good < clear || !may {
		return false
	}
	*v = verdict{}
	return true
}

// clip cuts off what was known before, and reports whether the span is new, and
// the length of the gap before it. Clocks that are adjusted make spans overlap a
// little; one that is known by half is another device's word on the same time.
func (t *track) clip(s *span) (ok bool, gap int64) {
	if s.to <= t.to || s.to <= s.from {
		return false, 0
	}
	if t.to == 0 {
		return true, 0
	}
	if 2*(t.to-s.from) >= s.to-s.from {
		return false, 0
	}
	s.from = max(s.from, t.to)
	return true, s.from - t.to
}

// observe judges the detector by one more span, which [track.clip] has let pass
// after a gap.
func (t *track) observe(l limits, s span, gap int64, out []change) []change {
	dt := s.to - s.from
	t.to = s.to
	if l.chatters {
		out = t.chatter(s, dt, out)
	}
	if l.silent > 0 {
		if s.hit {
			t.silent, t.silentFrom = 0, s.to
		} else {
			if t.silentFrom == 0 {
				t.silentFrom = s.from
			}
			t.silent += dt
		}
		v := &t.verdicts[noHits]
		// The span of the first hit is the first that is good.
		if v.update(t.silent >= l.silent, t.silentFrom, dt, hitClearMS, true) {
			out = append(out, change{noHits, v.failed, t.silentFrom, fmt.Sprintf("nothing counted in %s of observation, at most %s", clock(t.silent), clock(l.silent))})
			if !v.failed {
				out[len(out)-1].reason = fmt.Sprintf("has counted again for %s", clock(hitClearMS))
			}
		}
	}
	if l.locked > 0 {
		if !s.full || gap > gapMS || l.renews && s.count > 0 {
			t.locked, t.lockedFrom = 0, 0
		}
		if s.full && !(l.renews && s.count > 0) {
			if t.locked == 0 {
				t.lockedFrom = s.from
			}
			t.locked += dt
		}
		broken := t.locked >= l.locked
		t.alive = (t.alive || s.count > 0) && !broken
		v := &t.verdicts[lockedOn]
		if v.update(broken, t.lockedFrom, dt, clearMS, t.alive) {
			out = append(out, change{lockedOn, v.failed, t.lockedFrom, fmt.Sprintf("occupied without a break for %s, less than %s is allowed", clock(t.locked), clock(l.locked))})
			if !v.failed {
				out[len(out)-1].since, out[len(out)-1].reason = s.to, fmt.Sprintf("was not for %s, and counts", clock(clearMS))
			}
		}
	}
	return out
}

func (t *track) chatter(s span, dt int64, out []change) []change {
	var n, since int64
	if dt > chatterMS {
		// However they are spread, some 30 s have their share.
		parts := (dt + chatterMS - 1) / chatterMS
		n, since = (s.count+parts-1)/parts, s.from
		t.counts = t.counts[:0]
	} else {
		if s.count > 0 {
			t.counts = append(t.counts, counted{s.from, s.to, s.count})
		}
		drop := 0
		for drop < len(t.counts) && t.counts[drop].from < s.to-chatterMS {
			drop++
		}
		// One that counts ever on would fill the memory: the latest are enough.
		drop = max(drop, len(t.counts)-chatterCount)
		t.counts = append(t.counts[:0], t.counts[drop:]...)
		for _, c := range t.counts {
			n += c.n
		}
		if len(t.counts) > 0 {
			since = t.counts[0].from
		}
	}
	v := &t.verdicts[chatter]
	if v.update(n >= chatterCount, since, dt, clearMS, true) {
		if v.failed {
			return append(out, change{chatter, true, since, fmt.Sprintf("%d counted within 30 s, at most %d", n, chatterCount-1)})
		}
		return append(out, change{chatter, false, s.to, fmt.Sprintf("has not for %s", clock(clearMS))})
	}
	return out
}

// failed returns the first of the rules that the detector itself breaks, or -1.
func (t *track) failed() int {
	for r := chatter; r <= implausible; r++ {
		if t.verdicts[r].failed {
			return r
		}
	}
	return -1
}

// broken reports whether the detector breaks a rule that needs no neighbours.
func (t *track) broken() bool {
	return t.verdicts[chatter].failed || t.verdicts[lockedOn].failed || t.verdicts[noHits].failed ||
		t.verdicts[stuckOn].failed || t.verdicts[stuckOff].failed
}

// clock writes milliseconds for people.
func clock(ms int64) string {
	switch {
	case ms >= hour && ms%hour == 0:
		return fmt.Sprintf("%d h", ms/hour)
	case ms >= hour:
		return fmt.Sprintf("%d h %d min", ms/hour, ms%hour/60_000)
	case ms >= 60_000 && ms%60_000 == 0:
		return fmt.Sprintf("%d min", ms/60_000)
	}
	return fmt.Sprintf("%d.%d s", ms/1000, ms%1000/100)
}
