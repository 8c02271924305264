package consensus

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"
)

// An old disk stays silent also where it is started so often, and killed while
// it is silent, that its count of starts is above all that its peers know.
func TestAnOldDiskStaysSilentHoweverOftenItStarts(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	decide := func(ns ...uint64) {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, ns...)
	}
	decide(c.all()...)
	const restored = 4
	rest := without(c.all(), restored)
	c.stop(restored)
	old := c.path(restored) + ".old"
	copyDir(t, c.path(restored), old)
	c.start(restored)
	decide(c.all()...)
	c.stop(restored)
	if err := os.RemoveAll(c.path(restored)); err != nil {
		t.Fatal(err)
	}
	copyDir(t, old, c.path(restored))

	b, err := c.server.Connect("restored")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	begin := func() (*Validator, func()) {
		v, err := New(c.config(restored, b))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- v.Run(ctx) }()
		var once sync.Once
		return v, func() {
			once.Do(func() {
				cancel()
				if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
	}
	var v *Validator
	for range 4 {
		var end func()
		v, end = begin()
		eventually(t, "it fetches what it lacks", func() bool { return v.Stats().Height == c.nodes[0].v.Stats().Height })
		select {
		case <-v.Ready():
			t.Error("it takes part although nothing was decided without it since its last vote")
		case <-time.After(10 * v.c.Timing.Meet): // nothing tells that nothing will happen
		}
		end()
	}
	v, end := begin()
	defer end()
	decide(rest...)
	decide(rest...)
	select {
	case <-v.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("it does not take part again")
	}
	decide(rest...)
	eventually(t, "it decides again", func() bool { return v.Stats().Height == c.nodes[0].v.Stats().Height })

	// From then on it is as good as any.
	end()
	v, end = begin()
	defer end()
	select {
	case <-v.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("after it was silent for long enough it is held for an old copy again")
	}
}
