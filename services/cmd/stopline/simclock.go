package main

import (
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/traci"
)

// simClock is the one clock of all services while they run in lockstep.
type simClock struct{ ns atomic.Int64 }

func newSimClock(t time.Time) *simClock {
	c := &simClock{}
	c.set(t)
	return c
}

func (c *simClock) set(t time.Time) { c.ns.Store(t.UnixNano()) }
func (c *simClock) now() time.Time  { return time.Unix(0, c.ns.Load()).UTC() }

// isTerminal reports whether w is a terminal, so that progress is not written
// into files and pipes.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	s, err := f.Stat()
	return err == nil && s.Mode()&os.ModeCharDevice != 0
}

// cityResult gives the city's measures in the terms of SUMO's.
func cityResult(c *sim.City) traci.Result {
	m := c.Measures().All()
	return traci.Result{
		DelayS: float64(m.MeanDelayMS) / 1000, Trips: int(m.Wanted), Finished: int(m.Finished),
		NeverEntered: int(m.Outside + m.TurnedAway),
	}
}
