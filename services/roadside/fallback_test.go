package roadside

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/plan"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// sealPlan signs a fall-back plan.
func sealPlan(t *testing.T, by string, k identity.RecordKind, p traffic.Fallback) []byte {
	t.Helper()
	b, err := wire.EncodeFallback(&p)
	if err != nil {
		t.Fatal(err)
	}
	return identity.Sign(keyOf(by), k, identity.JSON, b).Marshal()
}

// planFor is a plan for light traffic: a short cycle.
func planFor(t *testing.T, j *traffic.Junction, seq uint64) traffic.Fallback {
	t.Helper()
	p, _, err := plan.Webster(j, make([]int, len(j.Movements)), plan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p.Name = "webster"
	return traffic.Fallback{District: district, Junction: j.ID, Seq: seq, Plan: p}
}

func TestPlansRefused(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 2}, nil)
	u := s.units[0]
	j := u.cfg.Junction
	good := planFor(t, j, 7)
	with := func(change func(*traffic.Fallback)) []byte {
		p := good
		p.Plan.Steps = append([]traffic.PlanStep(nil), good.Plan.Steps...)
		change(&p)
		return sealPlan(t, "signal-control", identity.KindPlan, p)
	}
	nothing := func(*traffic.Fallback) {}
	damaged := with(nothing)
	damaged[len(damaged)/2] ^= 1
	for _, c := range []struct {
		name, want string
		envelope   []byte
	}{
		{"garbage", "envelope", []byte("plan")},
		{"too large", "at most", make([]byte, MaxCommand+1)},
		{"one changed byte", "", damaged},
		{"another's key", "may not command here", sealPlan(t, "somebody", identity.KindPlan, good)},
		{"the unit's own key", "may not command here", sealPlan(t, string(u.cfg.Device), identity.KindPlan, good)},
		{"signed as something else", `kind: "command"`, sealPlan(t, "signal-control", identity.KindCommand, good)},
		{"another district", "district", with(func(p *traffic.Fallback) { p.District = "airport" })},
		{"another junction", "junction", with(func(p *traffic.Fallback) { p.Junction = s.units[1].cfg.Junction.ID })},
		{"other stages", "only times may change", with(func(p *traffic.Fallback) { p.Plan.Steps[0].Stage = p.Plan.Steps[1].Stage })},
		{"short green", "minimum green", with(func(p *traffic.Fallback) { p.Plan.Steps[0].DurationMS = p.Plan.Steps[0].IntergreenMS + 1000 })},
		{"short clearance", "intergreen_ms", with(func(p *traffic.Fallback) { p.Plan.Steps[0].IntergreenMS = 0 })},
	} {
		if fresh, err := u.Plan(c.envelope); err == nil || fresh || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, %v; want it refused: %s", c.name, fresh, err, c.want)
		}
	}
	if got := u.Status(s.city.Now()).Fallback; got != 0 || u.Counters().PlansRefused != 11 {
		t.Errorf("got plan %d and %d refused, want none and 11", got, u.Counters().PlansRefused)
	}
	if fresh, err := u.Plan(with(nothing)); !fresh || err != nil {
		t.Fatalf("a good plan: got %v, %v", fresh, err)
	}
	if fresh, err := u.Plan(with(nothing)); fresh || err != nil {
		t.Errorf("said again: got %v, %v; want neither new nor refused", fresh, err)
	}
	if _, err := u.Plan(with(func(p *traffic.Fallback) { p.Seq = 6 })); err == nil || !strings.Contains(err.Error(), "seq: 6, the unit has 7") {
		t.Errorf("an older plan: got %v", err)
	}
}

// cycles counts how often a group has turned green in so long.
func cycles(s *street, u *Unit, d time.Duration) (n int) {
	was := true
	for end := s.city.Now().Add(d); s.city.Now().Before(end); {
		s.step(nil)
		is := u.Status(s.city.Now()).Signal.State.At(gAny).Go()
		if is && !was {
			n++
		}
		was = is
	}
	return n
}

const gAny = 4 // green in one stage of the city's junctions

// TestRunsItsFallbackPlan: a unit that gets no commands runs the plan that it was
// given, also after a restart while it is cut off, and the filed one without it.
func TestRunsItsFallbackPlan(t *testing.T) {
	const watched = 8 * time.Minute
	dir := t.TempDir()
	store, err := OpenStore(StoreConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	s := newStreet(t, sim.Config{Seed: 2, Junctions: 1}, nil)
	u := s.units[0]
	j := u.cfg.Junction
	p := planFor(t, j, 3)
	filed, short := j.Plan.CycleMS(), p.Plan.CycleMS()
	if short*5 > filed*4 {
		t.Fatalf("cycles of %d and %d ms are too much alike to tell", filed, short)
	}
	about := func(what string, n int, cycle int64) {
		t.Helper()
		if want := int(watched.Milliseconds() / cycle); n < want-1 || n > want+1 {
			t.Errorf("%s: got %d cycles, want %d", what, n, want)
		}
	}
	s.run(time.Minute, nil)
	about("filed", cycles(s, u, watched), filed)
	envelope := sealPlan(t, "signal-control", identity.KindPlan, p)
	if _, err := u.Plan(envelope); err != nil {
		t.Fatal(err)
	}
	if err := store.keepPlan(envelope); err != nil {
		t.Fatal(err)
	}
	s.run(time.Minute, nil)
	about("given", cycles(s, u, watched), short)

	// Restart, cut off: nobody says it again.
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if store, err = OpenStore(StoreConfig{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	restart := func(kept []byte, j *traffic.Junction) *Unit {
		c := u.cfg
		c.BootEpoch++
		c.Fallback, c.Junction = kept, j
		n, err := New(s.city.Now(), c)
		if err != nil {
			t.Fatal(err)
		}
		s.units[0] = n
		return n
	}
	u = restart(store.Fallback(), j)
	if got := u.Status(s.city.Now()).Fallback; got != 3 {
		t.Fatalf("after the restart got plan %d, want 3", got)
	}
	s.run(time.Minute, nil)
	about("after a restart", cycles(s, u, watched), short)

	// A damaged file, and a definition that has changed meanwhile.
	damaged := append([]byte(nil), envelope...)
	damaged[len(damaged)-1] ^= 1
	if u = restart(damaged, j); u.Status(s.city.Now()).Fallback != 0 {
		t.Error("a damaged plan was taken over")
	}
	stricter := *j
	stricter.Timing.AllRedMS += 2000
	stricter.Plan.Steps = append([]traffic.PlanStep(nil), j.Plan.Steps...)
	for i := range stricter.Plan.Steps {
		stricter.Plan.Steps[i].DurationMS += 5000
	}
	if u = restart(store.Fallback(), &stricter); u.Status(s.city.Now()).Fallback != 0 {
		t.Error("a plan that the new definition forbids was taken over")
	}
	if u.Counters().Trips != 0 {
		t.Errorf("got %d trips", u.Counters().Trips)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}

// A plan is written as a whole, or not at all.
func TestPlanIsKeptWhole(t *testing.T) {
	for _, op := range []string{"create", "write", "sync", "syncdir"} {
		dir := t.TempDir()
		s, err := OpenStore(StoreConfig{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.keepPlan([]byte("old")); err != nil {
			t.Fatal(err)
		}
		s.cfg.Hook = func(o, _ string) error {
			if o == op {
				return errors.New("disk full")
			}
			return nil
		}
		if s.keepPlan([]byte("new")) == nil || s.Stats().Errors == 0 {
			t.Errorf("%s: got no error", op)
		}
		s.cfg.Hook = nil
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err = OpenStore(StoreConfig{Dir: dir}); err != nil {
			t.Fatal(err)
		}
		if got := string(s.Fallback()); got != "old" && !(op == "syncdir" && got == "new") {
			t.Errorf("%s failed: got %q, want the old plan", op, got)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
