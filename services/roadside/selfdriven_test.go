package roadside

import (
	"errors"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/sim"
)

// field is a controller that drives its lamps itself, more slowly than it is
// asked to, and in the ways that its faults say.
type field struct {
	Driver
	now     func() time.Time
	seq     *timing.Sequencer
	j       *traffic.Junction
	lamps   traffic.State
	lies    traffic.State // shown instead of the lamps
	deaf    error         // Flash fails
	drives  bool
	asked   int // states that are a stage's
	flashes int
}

func newField(t *testing.T, c *Config, now func() time.Time) *field {
	t.Helper()
	slow := *c.Junction
	slow.Timing.MinGreenMS += 3000
	slow.Timing.YellowMS += 500
	f := &field{Driver: c.Driver, now: now, j: c.Junction, drives: true, seq: timing.NewSequencer(&slow, timing.Rules{}, now())}
	f.lamps = f.seq.Next(now())
	return f
}

func (f *field) DrivesLamps() bool { return f.drives }

func (f *field) Show(s traffic.State) error {
	for k, st := range f.j.Stages {
		if st.State == s {
			f.asked++
			if err := f.seq.Target(k); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *field) Flash() error {
	f.flashes++
	if f.deaf == nil {
		f.lamps, f.lies = traffic.AllOf(traffic.FlashRed, len(f.lamps)), ""
	}
	return f.deaf
}

func (f *field) Observed() (traffic.State, error) {
	if f.lamps.At(0) != traffic.FlashRed {
		f.lamps = f.seq.Next(f.now())
	}
	if f.lies != "" {
		return f.lies, nil
	}
	return f.lamps, f.Driver.Show(f.lamps)
}

func TestControllerDrivesItsLamps(t *testing.T) {
	var f *field
	start := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	var city func() time.Time
	now := func() time.Time {
		if city == nil {
			return start
		}
		return city()
	}
	s := newStreet(t, sim.Config{Seed: 5, Junctions: 1, Start: start}, func(c *Config) {
		f = newField(t, c, now)
		c.Driver = f
	})
	city = s.city.Now
	u := s.units[0]
	stages := map[int]bool{}
	s.run(4*time.Minute, func(_ *Unit, fr *traffic.Frame) {
		stages[fr.Signal.Stage] = true
		if fr.Signal.State != f.lamps {
			t.Fatalf("got frame with %q, the lamps show %q", fr.Signal.State, f.lamps)
		}
	})
	c := u.Counters()
	if c.Trips != 0 || c.LampFaults != 0 || f.flashes != 0 || f.asked == 0 {
		t.Errorf("a lawful controller: got %d trips, %d lamp faults, %d orders to flash, %d stages asked for", c.Trips, c.LampFaults, f.flashes, f.asked)
	}
	if len(stages) < 3 || !stages[-1] {
		t.Errorf("got stages %v in the frames, want several, and changes", stages)
	}

	// Two groups that conflict, green together: 190 ms of it are borne, half a
	// second is not.
	conflicting := func() traffic.State {
		for since := 0; ; since++ {
			s.step(nil)
			if u.Status(s.city.Now()).Signal.Stage < 0 {
				since = 0
			}
			for g := range f.j.Groups {
				if f.lamps.At(g).Go() && len(f.j.Conflicts[g]) > 0 && since > 1 && u.Status(s.city.Now()).Signal.SinceMS < 3000 {
					b := []byte(f.lamps)
					b[f.j.Conflicts[g][0]] = 'G'
					return traffic.State(b)
				}
			}
		}
	}
	f.lies = conflicting()
	s.step(nil)
	f.lies = ""
	s.run(200*time.Millisecond, nil)
	if c := u.Counters(); c.Trips != 0 {
		t.Fatalf("got %d trips after a glitch of 100 ms", c.Trips)
	}
	f.lies, f.deaf = conflicting(), errors.New("cable cut")
	began := s.city.Now()
	var trip *interlock.Trip
	for trip == nil && s.city.Now().Sub(began) < 5*time.Second {
		ticked, err := u.Tick(s.city.Now())
		trip = ticked.Trip
		if (err != nil) != (trip != nil) || err != nil && !errors.Is(err, f.deaf) {
			t.Errorf("got %v with trip %v, want the error of flashing with the trip, none before", err, trip)
		}
		if _, err := s.city.Step(); err != nil {
			t.Fatal(err)
		}
	}
	if trip == nil || trip.Rule != interlock.RuleConflict || s.city.Now().Sub(began) > 600*time.Millisecond {
		t.Fatalf("got trip %v after %v, want a conflict within 500 ms", trip, s.city.Now().Sub(began))
	}
	// It is asked again until it does.
	f.deaf = nil
	asked := f.asked
	s.run(3*time.Second, nil)
	sig := u.Status(s.city.Now()).Signal
	if sig.State != traffic.AllOf(traffic.FlashRed, len(f.lamps)) || sig.Mode != traffic.Tripped || sig.Stage != -1 || sig.Trip == "" || f.flashes < 2 {
		t.Errorf("got %+v after %d orders to flash, want flashing", sig, f.flashes)
	}
	if f.asked != asked || u.Counters().Trips != 1 {
		t.Errorf("got %d stages asked for while tripped and %d trips, want none and one", f.asked-asked, u.Counters().Trips)
	}
	s.run(20*time.Second, nil)
	if err := u.Reset(s.city.Now(), "A. Person"); err != nil {
		t.Fatal(err)
	}
	f.lamps, f.seq = traffic.AllOf(traffic.Red, len(f.lamps)), timing.NewSequencer(f.j, timing.Rules{}, s.city.Now())
	s.run(time.Minute, nil)
	if sig := u.Status(s.city.Now()).Signal; sig.Mode != traffic.Local || sig.Trip != "" || f.asked == asked {
		t.Errorf("after the reset got %+v and %d stages asked for", sig, f.asked-asked)
	}
}

// A driver that says it is like any other is.
func TestDriverThatDoesNotDrive(t *testing.T) {
	if selfDriver(&field{}) != nil || selfDriver(&field{drives: true}) == nil {
		t.Error("DrivesLamps does not decide")
	}
}
