package consensus

import (
	"time"
)

// bucket hands out tokens: burst at once, and rate a second after that. It may be
// overdrawn by one taking; then there is nothing until that is made good.
type bucket struct {
	rate, burst float64
	have        float64
	at          time.Time
}

func (b *bucket) fill(now time.Time) {
	if b.at.IsZero() {
		b.have = b.burst
	} else if d := now.Sub(b.at); d > 0 {
		b.have = min(b.burst, b.have+b.rate*d.Seconds())
	}
	b.at = now
}

// take takes n tokens, if there is any.
func (b *bucket) take(now time.Time, n float64) bool {
	b.fill(now)
	if b.have <= 0 {
		return false
	}
	b.have -= n
	return true
}

// wait is how long it takes until there is a token again.
func (b *bucket) wait(now time.Time) time.Duration {
	b.fill(now)
	if b.have > 0 {
		return 0
	}
	return time.Duration((-b.have + 1) / b.rate * float64(time.Second))
}
