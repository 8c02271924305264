package interlock

import "time"

// window is how many steps back the stopwatch looks to know what an ordinary
// step is.
const window = 8

// stopwatch counts time as the package comment says.
type stopwatch struct {
	last  time.Time
	steps [window]time.Duration
	at    int
	carry time.Duration
}

// step returns how many milliseconds count since the step before.
func (s *stopwatch) step(now time.Time, f fault) int64 {
	raw := now.Sub(s.last)
	s.last = now
	bounded := min(max(raw, 0), time.Second)
	ordinary := time.Duration(0)
	for _, d := range s.steps {
		ordinary = max(ordinary, d)
	}
	if f == faultShortMemory {
		ordinary = s.steps[(s.at+window-1)%window]
	}
	s.steps[s.at] = bounded
	s.at = (s.at + 1) % window
	counted := min(bounded, ordinary)
	switch {
	case f == faultJumpCounts && raw > 0:
		counted = raw
	case f == faultBackwards && raw < 0:
		counted = -raw
	}
	s.carry += counted
	ms := int64(s.carry / time.Millisecond)
	s.carry -= time.Duration(ms) * time.Millisecond
	return ms
}
