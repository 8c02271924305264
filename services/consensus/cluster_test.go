package consensus

import (
	"testing"
	"time"
)

func TestFourValidatorsAgree(t *testing.T) {
	c := newCluster(t, 4)
	c.start(c.all()...)
	u1, u2 := newUnit(1), newUnit(2)
	var last []byte
	for range 10 {
		now := time.Now()
		last = batch(u1.frame(now), u2.frame(now))
		c.submit(last)
	}
	c.decided(last, c.all()...)
	blocks := c.check()
	if times, _, verdicts := where(t, blocks, last); times != 1 || verdicts != "11" {
		t.Errorf("last batch: decided %d times with verdicts %s, want once with 11", times, verdicts)
	}
}
