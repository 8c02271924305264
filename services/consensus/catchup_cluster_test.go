package consensus

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/topic"
)

// TestALostDiskWherePayloadsArePurged: a validator whose disk is lost comes back
// with an empty one, to peers who have let go of the first payloads. Its own
// number was seen before, so it stays silent until what it may have voted on is
// decided; then it takes part, and the district can do without another.
func TestALostDiskWherePayloadsArePurged(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.tune = func(cfg *Config) {
		cfg.Retention, cfg.SegmentBytes, cfg.SnapshotEvery, cfg.SnapshotBeyond = 100*time.Millisecond, 8<<10, 5, -1
	}
	c.start(c.all()...)
	u := newUnit(1)
	decide := func(n int, at ...uint64) {
		t.Helper()
		for range n {
			m := batch(u.frame(time.Now()))
			c.submit(m)
			c.decided(m, at...)
		}
	}
	decide(3, c.all()...)
	c.stop(4)
	decide(40, 1, 2, 3)
	eventually(t, "payloads let go of", func() bool {
		for _, nd := range c.nodes[:3] {
			if nd.v.Stats().Purged < 10 {
				decide(1, 1, 2, 3)
				return false
			}
		}
		return true
	})
	if err := os.RemoveAll(c.path(4)); err != nil {
		t.Fatal(err)
	}
	// The others go on meanwhile: it may have voted for the block after their last.
	stop, stopped := make(chan struct{}), make(chan error)
	var last []byte
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			last = batch(u.frame(time.Now()))
			if err := c.bus.Publish(context.Background(), topic.Accepted(harbour), fmt.Sprint("meanwhile ", i), last); err != nil {
				stopped <- err
				return
			}
			select {
			case <-stop:
				stopped <- nil
				return
			case <-tick.C:
			}
		}
	}()
	c.start(4)
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	c.decided(last, c.all()...)
	s := c.nodes[3].v.Stats()
	if first := c.nodes[3].v.core.store.first(); s.Snapshots != 1 || s.Headers != 0 || first == 1 {
		t.Errorf("got %d snapshots, %d blocks by header, the first is %d: want 1, none, and a later one", s.Snapshots, s.Headers, first)
	}
	if got := c.nodes[3].v.core.journal.own.Counter; got < 2 {
		t.Errorf("start counter: got %d, want one above that of the lost disk", got)
	}
	decide(5, c.all()...)
	c.stop(2) // now its votes are needed
	decide(5, 1, 3, 4)
	c.check()
	// What was waiting in the stream was decided before the disk was lost, or
	// while it was: it is acknowledged and not decided again.
	eventually(t, "ACCEPTED acknowledged", func() bool { return c.pending(4) == 0 })
	// And all at once, from snapshots.
	c.stop(1, 3, 4)
	c.start(c.all()...)
	decide(3, c.all()...)
	c.check()
}
