package roadside

import (
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// SelfDriver is a [Driver] before a controller that drives its lamps itself, as
// controllers in the field do: Show asks for a state, and the controller goes
// there in its own time, by its own intergreens. It may be asked for the same
// state again at each tick.
//
// What such a controller shows cannot be filtered. The unit looks at it at each
// tick and has the interlock supervise it; where that trips, the unit asks for
// flashing at each tick until a person has reset it, and asks for nothing else.
type SelfDriver interface {
	Driver
	// DrivesLamps reports whether the controller is one of those; where it says
	// false it is a driver like any other. It must always say the same.
	DrivesLamps() bool
	// Flash asks the controller to flash red for all.
	Flash() error
}

func selfDriver(d Driver) SelfDriver {
	if s, ok := d.(SelfDriver); ok && s.DrivesLamps() {
		return s
	}
	return nil
}

// supervise is the second half of a tick of a unit whose controller drives the
// lamps: asked is what the unit would show if it could, trip that of asking.
func (u *Unit) supervise(now time.Time, asked traffic.State, trip *interlock.Trip) (Ticked, error) {
	seen, err := u.cfg.Driver.Observed()
	if err != nil {
		// What cannot be seen is not judged; the next look gives no more than a
		// second of benefit.
		u.counters.ObserveErrors++
		err = fmt.Errorf("junction %s: reading the lamps: %w", u.cfg.Junction.ID, err)
	} else if t := u.monitor.Supervise(now, seen); t != nil && trip == nil {
		trip = t
		u.tripped(now, t)
	}
	t := Ticked{Shown: u.shown, Trip: trip}
	if u.monitor.Tripped() != nil || u.flashing() {
		if e := u.self.Flash(); e != nil {
			u.counters.ShowErrors++
			return t, fmt.Errorf("junction %s: asking for flashing: %w", u.cfg.Junction.ID, e)
		}
	} else if e := u.cfg.Driver.Show(asked); e != nil {
		u.counters.ShowErrors++
		return t, fmt.Errorf("junction %s: asking for %q: %w", u.cfg.Junction.ID, asked, e)
	}
	if err != nil {
		return t, err
	}
	if t.Shown, t.Changed = seen, seen != u.shown; t.Changed {
		u.changes(now, u.shown, seen)
		u.before, u.shownAt, u.shown = u.shown, now, seen
	}
	return t, nil
}

// seenSignal is what a controller that drives its lamps is doing: the stage that
// they show, wherever the sequencer has got to.
func (u *Unit) seenSignal(now time.Time) traffic.Signal {
	s := traffic.Signal{State: u.shown, Stage: -1, SinceMS: max(now.Sub(u.shownAt), 0).Milliseconds(), Mode: u.mode}
	for k, st := range u.cfg.Junction.Stages {
		if st.State == u.shown {
			s.Stage = k
			break
		}
	}
	return s
}
