package validation

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/traci"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The rules must never refuse what an honest device reads. These tests drive
// simulated traffic under a controller and judge every frame of it, at several
// intervals.

type world interface {
	Junctions() []*traffic.Junction
	Now() time.Time
	Step() (bool, error)
	StepLength() time.Duration
	Close() error
}

type driver interface {
	Sense() ([]traffic.Reading, error)
	Show(traffic.State) error
	Observed() (traffic.State, error)
}

// judgeWorld runs a world for so many steps and judges a frame a junction every
// few steps, the number of which changes, and one without readings now and then.
func judgeWorld(t *testing.T, w world, drive func(traffic.JunctionID) (driver, error), steps int) {
	t.Helper()
	rules, err := timing.RulesNamed("deployable")
	if err != nil {
		t.Fatal(err)
	}
	control, err := timing.Named("maxpressure")
	if err != nil {
		t.Fatal(err)
	}
	g := &identity.Genesis{District: district}
	type unit struct {
		j      *traffic.Junction
		d      driver
		seq    *timing.Sequencer
		memory timing.Memory
		key    ed25519.PrivateKey
		frame  traffic.Frame
		prev   [32]byte
		sensed time.Time
	}
	var units []*unit
	for _, j := range w.Junctions() {
		d, err := drive(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		u := &unit{j: j, d: d, seq: timing.NewSequencer(j, rules, w.Now()), key: key(string(j.ID)), sensed: w.Now()}
		seen, err := d.Observed()
		if err != nil {
			t.Fatal(err)
		}
		u.seq.Resume(seen, w.Now())
		units = append(units, u)
		for _, e := range []struct {
			typ  identity.EntryType
			id   string
			body any
		}{{identity.TypeJunction, string(j.ID), j}, {identity.TypeDevice, "rsu-" + string(j.ID), identity.Device{Junction: j.ID, Key: pub(string(j.ID))}}} {
			b, err := json.Marshal(e.body)
			if err != nil {
				t.Fatal(err)
			}
			g.Entries = append(g.Entries, identity.Entry{Type: e.typ, ID: e.id, Body: b})
		}
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	state := validate.NewState(validate.Edge())
	second := max(1, int(time.Second/w.StepLength()))
	left := second
	frames, busy, refused := 0, 0, 0
	for step, more := 0, true; more && step < steps; step++ {
		if left--; left < 0 {
			// Mostly each second; each step for a while; each ten seconds for a while.
			every := []int{second, second, 1, second, 10 * second}[step/(20*second)%5]
			left = every - 1
		}
		now := w.Now()
		for _, u := range units {
			f := traffic.Frame{District: district, Junction: u.j.ID, Time: now, Prev: u.prev,
				FrameKey: traffic.FrameKey{Device: traffic.DeviceID("rsu-" + string(u.j.ID)), BootEpoch: 1, Seq: u.frame.Seq + 1}}
			f.Signal = u.seq.Signal(now)
			if f.Signal.State, err = u.d.Observed(); err != nil {
				t.Fatal(err)
			}
			f.Signal.Mode = traffic.Coordinated
			switch {
			case left == 0:
				if f.Readings, err = u.d.Sense(); err != nil {
					t.Fatal(err)
				}
				f.Interval = now.Sub(u.sensed)
				u.sensed = now
			case step%7 != 0:
				continue
			}
			e := identity.Sign(u.key, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f))
			u.frame, u.prev = f, sha256.Sum256(e.Payload)
			c := wire.Candidate(e.Marshal(), make([]byte, 32))
			c.SignatureValid = true
			frames++
			if v := state.Judge(reg, now, &c); !v.OK {
				if refused++; refused < 20 {
					t.Errorf("step %d, %s: refused by %s: %s", step, u.j.ID, v.Rule, v.Reason)
				}
			}
			for _, r := range f.Readings {
				if r.Count > 1 || r.Halted > 5 {
					busy++
				}
			}
			if left == 0 {
				var next timing.Decision
				u.memory, next = control.Next(u.j, rules, u.memory, timing.Observe(u.j, &f))
				if err := u.seq.Target(next.Stage); err != nil {
					t.Fatal(err)
				}
			}
			if err := u.d.Show(u.seq.Next(now)); err != nil {
				t.Fatal(err)
			}
		}
		if more, err = w.Step(); err != nil {
			t.Fatal(err)
		}
	}
	if busy < frames/100 {
		t.Errorf("%d of %d frames come from busy detectors: this test tests little", busy, frames)
	}
	t.Logf("%d frames judged, %d readings from busy detectors", frames, busy)
}

func TestHonestCity(t *testing.T) {
	for _, demand := range []int{700, 1500, 4000} {
		t.Run(fmt.Sprintf("demand=%d", demand), func(t *testing.T) {
			steps := 10 * 60 * 4
			if testing.Short() || underRace { // the city is one goroutine
				steps = 10 * 60
			}
			c, err := sim.New(sim.Config{Seed: uint64(demand), Junctions: 8, DemandPermille: demand, FlatDemand: true, AmbulanceEvery: 30 * time.Second, BusEvery: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}()
			judgeWorld(t, c, func(id traffic.JunctionID) (driver, error) { return c.Driver(id) }, steps)
		})
	}
}

// TestHonestSUMO uses the network of package traci's own tests, and all maps in
// the folder STOPLINE_SHARED/scenarios where that is set.
func TestHonestSUMO(t *testing.T) {
	if testing.Short() {
		t.Skip("SUMO takes seconds")
	}
	if _, err := exec.LookPath("sumo"); err != nil {
		if os.Getenv("STOPLINE_REQUIRE_SUMO") == "1" {
			t.Fatal("sumo is not in PATH, and STOPLINE_REQUIRE_SUMO=1 says that it must be")
		}
		t.Skip("needs sumo in PATH (Debian: apt-get install sumo); STOPLINE_REQUIRE_SUMO=1 makes this a failure")
	}
	maps := []string{filepath.Join("..", "internal", "traci", "testdata", "cross.sumocfg")}
	if dir := os.Getenv("STOPLINE_SHARED"); dir != "" {
		more, err := filepath.Glob(filepath.Join(dir, "scenarios", "*", "*.sumocfg"))
		if err != nil {
			t.Fatal(err)
		}
		maps = append(maps, more...)
	}
	for _, path := range maps {
		for _, sensing := range []traci.Sensing{traci.SensingDetectors, traci.SensingOracle} {
			t.Run(filepath.Base(path)+"/"+string(sensing), func(t *testing.T) {
				s, err := traci.Load(path)
				if err != nil {
					t.Fatal(err)
				}
				w, err := traci.Open(t.Context(), s, traci.Options{Sensing: sensing, Seed: 1})
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := w.Close(); err != nil {
						t.Error(err)
					}
				}()
				seconds := 600
				if os.Getenv("STOPLINE_SHARED") != "" {
					seconds = 3600
				}
				judgeWorld(t, w, func(id traffic.JunctionID) (driver, error) { return w.Driver(id) }, seconds)
			})
		}
	}
}
