package roadside

import (
	"crypto/ed25519"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// overriders lets the key of the gateway override, and no other.
func overriders(id identity.KeyID) (ed25519.PublicKey, bool) {
	if k := publicOf("gateway"); identity.IDOf(k) == id {
		return k, true
	}
	return nil, false
}

func overridable(c *Config) { c.Overrider = overriders }

func (s *street) override(j traffic.JunctionID, id string, a traffic.OverrideAction, d time.Duration) traffic.Override {
	s.seq++
	now := s.city.Now()
	return traffic.Override{District: district, Turn: traffic.Turn{Epoch: 1, Seq: s.seq}, Time: now, ID: id, Junction: j, Action: a, Stage: -1,
		Reason: "incident", By: traffic.Agent{Agency: "roads", Name: "operator-1"}, Expires: now.Add(d)}
}

func sealOverride(key string, o traffic.Override) []byte {
	return identity.Sign(keyOf(key), identity.KindOverride, identity.Protobuf, wire.EncodeOverride(&o)).Marshal()
}

func (s *street) mustOverride(u *Unit, o traffic.Override) {
	s.t.Helper()
	if res := u.Override(s.city.Now(), sealOverride("gateway", o)); !res.Applied || !res.Fresh || res.ID != o.ID {
		s.t.Fatalf("override %s: got %+v, want it applied", o.ID, res)
	}
}

func TestHoldStaysInItsStageAndEndsByItself(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, overridable)
	u := s.units[0]
	j := u.cfg.Junction
	s.run(10*time.Second, nil)
	const stage = 1
	o := s.override(j.ID, "o-1", traffic.OverrideHold, 40*time.Second)
	o.Stage = stage
	s.mustOverride(u, o)
	var seen int
	s.run(39*time.Second, func(u *Unit, f *traffic.Frame) {
		if f.Signal.Override != "o-1" || f.Signal.Mode != traffic.Overridden {
			t.Fatalf("frame says override %q in mode %q, want o-1 in override", f.Signal.Override, f.Signal.Mode)
		}
		if f.Signal.Stage == stage {
			seen++
		} else if seen > 0 {
			t.Fatalf("left stage %d for %d", stage, f.Signal.Stage)
		}
		// Commands are refused meanwhile, by the rule that says so.
		c := s.command(j.ID, 0)
		if res := u.Obey(s.city.Now(), c); res.Applied || !strings.HasPrefix(res.Reason, string(RuleOverride)) {
			t.Fatalf("command during an override: %+v", res)
		}
	})
	if seen < 15 {
		t.Errorf("stage %d seen in %d of 39 frames", stage, seen)
	}
	s.run(3*time.Second, nil)
	if st := u.Status(s.city.Now()); st.Signal.Override != "" || st.Signal.Mode != traffic.Local {
		t.Errorf("after its end: override %q, mode %s; want none, and local", st.Signal.Override, st.Signal.Mode)
	}
	if res := u.Obey(s.city.Now(), s.command(j.ID, 0)); !res.Applied {
		t.Errorf("a command after it: %+v, want it applied", res)
	}
	s.run(2*time.Second, nil)
	noTrips(t, u)
}

func noTrips(t *testing.T, u *Unit) {
	t.Helper()
	if c := u.Counters(); c.Trips > 0 || len(c.StatesRefused) > 0 || c.LampFaults > 0 {
		t.Errorf("trips %d, states refused %v, lamp faults %d; want none", c.Trips, c.StatesRefused, c.LampFaults)
	}
}

// To flashing and back: through yellow and all red there, through all red back.
func TestFlashAndBack(t *testing.T) {
	for name, release := range map[string]time.Duration{"after a while": 30 * time.Second, "on the way": 2 * time.Second, "by itself": 0} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, sim.Config{Junctions: 1}, overridable)
			u := s.units[0]
			j := u.cfg.Junction
			s.run(12*time.Second, nil)
			d := 25 * time.Second
			if release > 0 {
				d = time.Hour
			}
			s.mustOverride(u, s.override(j.ID, "o-1", traffic.OverrideFlash, d))
			flashed := traffic.AllOf(traffic.FlashRed, len(j.Groups))
			var states []traffic.State
			watch := func(_ *Unit, f *traffic.Frame) {
				if len(states) == 0 || states[len(states)-1] != f.Signal.State {
					states = append(states, f.Signal.State)
				}
			}
			s.run(max(release, d*b2d(release == 0)), watch)
			if release > 0 {
				r := s.override(j.ID, "o-2", traffic.OverrideRelease, 0)
				r.Releases = "o-1"
				s.mustOverride(u, r)
			}
			if seen := slices.Contains(states, flashed); seen != (release != 2*time.Second) {
				t.Errorf("flashing seen: %v in %q", seen, states)
			}
			s.run(60*time.Second, watch)
			if last := states[len(states)-1]; last == flashed {
				t.Errorf("it flashes still: %q", states)
			}
			if i := slices.Index(states, flashed); i >= 0 {
				if i+1 == len(states) || states[i+1] != traffic.AllOf(traffic.Red, len(j.Groups)) {
					t.Errorf("after flashing: %q, want all red first", states[i+1:])
				}
			}
			greens := 0
			for _, st := range states {
				if strings.ContainsAny(string(st), "Gg") {
					greens++
				}
			}
			if greens < 2 {
				t.Errorf("greens in %d states after it: %q", greens, states)
			}
			noTrips(t, u)
		})
	}
}

func b2d(b bool) time.Duration {
	if b {
		return 1
	}
	return 0
}

func TestOverrideRunsTheFiledPlan(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, overridable)
	u := s.units[0]
	j := u.cfg.Junction
	o := s.override(j.ID, "o-1", traffic.OverridePlan, 3*time.Minute)
	o.Plan = "nonsense"
	if res := u.Override(s.city.Now(), sealOverride("gateway", o)); res.Applied || !strings.HasPrefix(res.Reason, string(RulePlan)) {
		t.Errorf("an unknown plan: %+v", res)
	}
	o = s.override(j.ID, "o-2", traffic.OverridePlan, 3*time.Minute)
	o.Plan = j.Plan.Name
	s.mustOverride(u, o)
	stages := map[int]bool{}
	s.run(150*time.Second, func(_ *Unit, f *traffic.Frame) { stages[f.Signal.Stage] = true })
	for _, st := range j.Plan.Steps {
		if !stages[st.Stage] {
			t.Errorf("stage %d of the plan was not shown in 150 s: %v", st.Stage, stages)
		}
	}
	noTrips(t, u)
}

func TestOverridesRefused(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, overridable)
	u := s.units[0]
	j := u.cfg.Junction.ID
	s.run(10*time.Second, nil)
	first := s.override(j, "o-1", traffic.OverrideHold, time.Minute)
	valid := func(f func(*traffic.Override)) func() []byte {
		return func() []byte {
			o := s.override(j, "o-x", traffic.OverrideHold, time.Minute)
			if f != nil {
				f(&o)
			}
			return sealOverride("gateway", o)
		}
	}
	check := func(name string, e []byte, rule Rule) {
		t.Helper()
		before := u.Counters().Refused[rule]
		res := u.Override(s.city.Now(), e)
		if res.Applied || !strings.HasPrefix(res.Reason, string(rule)+": ") || u.Counters().Refused[rule] != before+1 {
			t.Errorf("%s: got %+v, counted %d; want it refused and counted by %s", name, res, u.Counters().Refused[rule]-before, rule)
		}
	}
	for _, tc := range []struct {
		name string
		e    func() []byte
		rule Rule
	}{
		{"oversized", func() []byte { return make([]byte, MaxCommand+1) }, RuleSize},
		{"noise", func() []byte { return []byte("x") }, RuleDecode},
		{"a command", func() []byte { return seal("signal-control", s.command(j, 0)) }, RuleKind},
		{"signal-control's key", func() []byte {
			return sealOverride("signal-control", s.override(j, "o", traffic.OverrideFlash, time.Minute))
		}, RuleKey},
		{"forged", func() []byte {
			e, err := identity.ParseEnvelope(sealOverride("gateway", s.override(j, "o", traffic.OverrideFlash, time.Minute)))
			if err != nil {
				t.Fatal(err)
			}
			e.Signature = slices.Clone(e.Signature)
			e.Signature[3] ^= 1
			return e.Marshal()
		}, RuleSignature},
		{"another district", valid(func(o *traffic.Override) { o.District = "uptown" }), RuleDistrict},
		{"another junction", valid(func(o *traffic.Override) { o.Junction = "Z" }), RuleJunction},
		{"from the future", valid(func(o *traffic.Override) { o.Time = o.Time.Add(time.Minute) }), RuleFuture},
		{"over", valid(func(o *traffic.Override) {
			o.Time, o.Expires = o.Time.Add(-time.Hour), o.Time.Add(-time.Minute)
		}), RuleExpired},
		{"for ever", valid(func(o *traffic.Override) { o.Expires = o.Time.Add(48 * time.Hour) }), RuleValidity},
		{"backwards", valid(func(o *traffic.Override) { o.Expires = o.Time.Add(-time.Second) }), RuleValidity},
		{"no such stage", valid(func(o *traffic.Override) { o.Stage = 99 }), RuleInterlock},
		{"nothing", valid(func(o *traffic.Override) { o.Action = "" }), RuleAction},
		{"release of nothing", valid(func(o *traffic.Override) { o.Action, o.Releases = traffic.OverrideRelease, "o-1" }), RuleOverride},
	} {
		check(tc.name, tc.e(), tc.rule)
	}
	if st := u.Status(s.city.Now()); st.Signal.Override != "" {
		t.Fatalf("something refused is in force: %q", st.Signal.Override)
	}
	second := s.override(j, "o-2", traffic.OverrideHold, time.Minute)
	s.mustOverride(u, second)
	check("an older one", sealOverride("gateway", first), RuleSeq)
	check("a second one", valid(nil)(), RuleOverride)
	// The same again is not another one.
	if res := u.Override(s.city.Now(), sealOverride("gateway", second)); !res.Applied || res.Fresh {
		t.Errorf("said again: %+v, want it known and applied", res)
	}
	release := s.override(j, "o-3", traffic.OverrideRelease, 0)
	release.Releases = "o-2"
	s.mustOverride(u, release)
	check("replayed after its release", sealOverride("gateway", second), RuleSeq)
	noOne := newStreet(t, sim.Config{Junctions: 1}, nil)
	if res := noOne.units[0].Override(noOne.city.Now(), sealOverride("gateway", noOne.override(j, "o", traffic.OverrideFlash, time.Minute))); res.Applied || !strings.HasPrefix(res.Reason, string(RuleKey)) {
		t.Errorf("a unit that nobody may override: %+v", res)
	}
	if c := u.Counters(); c.Overrides != 2 {
		t.Errorf("%d overrides counted, want 2: one and its release", c.Overrides)
	}
}

// An override outlives the unit's restart, and a release cannot be undone by it.
func TestOverrideSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	open := func() *Store {
		st, err := OpenStore(StoreConfig{Dir: dir, Logger: servicetest.Logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	s := newStreet(t, sim.Config{Junctions: 1}, overridable)
	u := s.units[0]
	j := u.cfg.Junction.ID
	s.run(10*time.Second, nil)
	o := s.override(j, "o-1", traffic.OverrideFlash, time.Hour)
	e := sealOverride("gateway", o)
	s.mustOverride(u, o)
	st := open()
	if st.Override() != nil {
		t.Error("a new store has an override")
	}
	if err := st.keepOverride(e); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	again := func(now time.Time) *Unit {
		t.Helper()
		st := open()
		cfg := u.cfg
		cfg.BootEpoch++
		cfg.Override = st.Override()
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		v, err := New(now, cfg)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	v := again(s.city.Now())
	if got := v.Status(s.city.Now()).Signal.Override; got != "o-1" {
		t.Fatalf("after a restart: override %q, want o-1", got)
	}
	if v := again(s.city.Now().Add(2 * time.Hour)); v.Status(s.city.Now()).Signal.Override != "" {
		t.Error("in force long after its end")
	}
	r := s.override(j, "o-2", traffic.OverrideRelease, 0)
	r.Releases = "o-1"
	s.mustOverride(v, r)
	st = open()
	if err := st.keepOverride(sealOverride("gateway", r)); err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	v = again(s.city.Now())
	if got := v.Status(s.city.Now()).Signal.Override; got != "" {
		t.Errorf("released, and after a restart in force: %q", got)
	}
	if res := v.Override(s.city.Now(), e); res.Applied || !strings.HasPrefix(res.Reason, string(RuleSeq)) {
		t.Errorf("replayed after a release and a restart: %+v", res)
	}
}

// Setting the clock back does not make it last longer.
func TestAnOverrideEndsWhateverTheClockSays(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, overridable)
	u := s.units[0]
	now := s.city.Now()
	o := s.override(u.cfg.Junction.ID, "o-1", traffic.OverrideFlash, 30*time.Second)
	s.mustOverride(u, o)
	for i := range 400 {
		if i == 100 {
			now = now.Add(-time.Hour)
		}
		now = now.Add(100 * time.Millisecond)
		if _, err := u.Tick(now); err != nil {
			t.Fatal(err)
		}
	}
	if got := u.Status(now).Signal.Override; got != "" {
		t.Errorf("after 40 s of ticks: %q in force, want none", got)
	}
}

// Whatever operators do, and whenever, nothing unsafe is asked for.
func TestRandomOverridesNeverTrip(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 7))
	s := newStreet(t, sim.Config{Junctions: 2, Seed: seed}, overridable)
	minutes := 20
	if testing.Short() || raceEnabled {
		minutes = 3
	}
	for n := range minutes * 12 {
		s.run(time.Duration(1+r.IntN(90))*100*time.Millisecond, func(u *Unit, f *traffic.Frame) {
			if r.IntN(3) > 0 {
				u.Obey(s.city.Now(), s.command(f.Junction, r.IntN(len(u.cfg.Junction.Stages))))
			}
		})
		u := s.units[r.IntN(len(s.units))]
		id := "o-" + strings.Repeat("x", n%7)
		o := s.override(u.cfg.Junction.ID, id, []traffic.OverrideAction{traffic.OverrideFlash, traffic.OverrideHold, traffic.OverridePlan, traffic.OverrideRelease}[r.IntN(4)], time.Duration(1+r.IntN(30))*time.Second)
		o.Plan, o.Releases = u.cfg.Junction.Plan.Name, u.Status(s.city.Now()).Signal.Override
		if r.IntN(2) == 0 {
			o.Stage = r.IntN(len(u.cfg.Junction.Stages))
		}
		u.Override(s.city.Now(), sealOverride("gateway", o))
	}
	for _, u := range s.units {
		noTrips(t, u)
	}
}
