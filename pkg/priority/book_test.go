package priority

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// street is a line of junctions, A, B, C …, 300 m apart, each with a street across.
type street map[traffic.JunctionID]*traffic.Junction

func newStreet(n int) street {
	s := street{}
	id := func(i int) traffic.JunctionID {
		if i < 0 || i >= n {
			return ""
		}
		return traffic.JunctionID(rune('A' + i))
	}
	for i := range n {
		j := &traffic.Junction{ID: id(i), Name: "Junction " + string(id(i))}
		in, out, cross := traffic.LaneID(fmt.Sprintf("%s-%s", id(i-1), id(i))), traffic.LaneID(fmt.Sprintf("%s-%s", id(i), id(i+1))), traffic.LaneID("x"+string(id(i)))
		j.Lanes = []traffic.Lane{
			{ID: in, LengthCM: 30_000, SpeedCMS: 1389, Capacity: 40, From: id(i - 1), To: id(i)},
			{ID: out, LengthCM: 30_000, SpeedCMS: 1389, Capacity: 40, From: id(i), To: id(i + 1)},
			{ID: cross + ".in", LengthCM: 20_000, SpeedCMS: 1389, Capacity: 20, To: id(i)},
			{ID: cross + ".out", LengthCM: 20_000, SpeedCMS: 1389, Capacity: 20, From: id(i)},
		}
		j.Groups = []traffic.Group{{Name: "along", Kind: traffic.Vehicles}, {Name: "across", Kind: traffic.Vehicles}, {Name: "walk", Kind: traffic.Pedestrians, PedClearMS: 8000}, {Name: "dead", Kind: traffic.Vehicles}}
		j.Movements = []traffic.Movement{{From: in, To: out, Group: 0, SaturationPerHour: 1800}, {From: cross + ".in", To: cross + ".out", Group: 1, SaturationPerHour: 1800}}
		j.Stages = []traffic.Stage{{Name: "along", State: "Grrr"}, {Name: "across", State: "rGGr"}}
		j.Conflicts = [][]int{{1, 2}, {0}, {0}, {}}
		j.Detectors = []traffic.Detector{{ID: "s0", Kind: traffic.StopLine, Lane: in, Movements: []int{0}, Group: -1}, {ID: "s1", Kind: traffic.StopLine, Lane: cross + ".in", Movements: []int{1}, Group: -1}}
		j.Timing = traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 2000}
		j.Plan = traffic.Plan{Name: "day", Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 30_000, IntergreenMS: 5000}, {Stage: 1, DurationMS: 30_000, IntergreenMS: 10_000}}}
		s[j.ID] = j
	}
	return s
}

func (s street) Junction(id traffic.JunctionID) (*traffic.Junction, bool) {
	j, ok := s[id]
	return j, ok
}

func (s street) Vehicle(agency, id string) (identity.Vehicle, bool) {
	v := identity.Vehicle{ID: id, Class: identity.VehicleEmergency}
	switch {
	case agency == "fire" && strings.HasPrefix(id, "F-"):
	case agency == "ambulance" && strings.HasPrefix(id, "A-"):
	case agency == "transit" && strings.HasPrefix(id, "bus-"):
		v.Class = identity.VehicleTransit
		if id == "bus-night" {
			v.From, v.Until = "23:00", "05:00"
		}
	default:
		return identity.Vehicle{}, false
	}
	return v, true
}

func ask(id string, change func(*traffic.Request)) *traffic.Request {
	r := &traffic.Request{District: "harbour", Time: noon, ID: id, Revision: 1, By: traffic.Agent{Agency: "fire", Name: "fire-desk-1"}, Class: traffic.Emergency,
		Vehicle: "F-" + id, Expires: noon.Add(10 * time.Minute), Stops: []traffic.Stop{{Junction: "A", Group: "along", Arrival: noon.Add(60 * time.Second)}}}
	if change != nil {
		change(r)
	}
	return r
}

func bus(id string, late time.Duration, change func(*traffic.Request)) *traffic.Request {
	return ask(id, func(r *traffic.Request) {
		r.By, r.Class, r.Vehicle, r.Lateness = traffic.Agent{Agency: "transit", Name: "transit-desk-1"}, traffic.Bus, "bus-"+id, late
		if change != nil {
			change(r)
		}
	})
}

// run is a book with a street whose junctions do what they are asked, after a while.
type run struct {
	t     testing.TB
	s     street
	b     *Book
	now   time.Time
	h     uint64
	shown map[traffic.JunctionID]*lamps
}

type lamps struct {
	stage, to int
	since     time.Time
}

func start(t testing.TB, junctions int) *run {
	rules, err := timing.RulesNamed("field")
	if err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, s: newStreet(junctions), b: NewBook(Default(), rules), now: noon, shown: map[traffic.JunctionID]*lamps{}}
	for id, j := range r.s {
		if err := j.Check(); err != nil && !strings.Contains(err.Error(), "dead") {
			t.Log(err)
		}
		r.shown[id] = &lamps{stage: 1, to: 1, since: noon.Add(-time.Minute)}
	}
	r.block()
	for id := range r.s {
		r.frame(id, traffic.NoPriority)
	}
	return r
}

func (r *run) block() { r.h++; r.b.Block(r.h, r.now) }

func (r *run) ask(q *traffic.Request) *Entry {
	r.block()
	r.b.Request(r.s, r.h*10, q)
	e, ok := r.b.Entry(q.ID)
	if !ok {
		r.t.Fatalf("request %s is not in the book", q.ID)
	}
	return e
}

// frame lets a junction go on, and say what it shows; who stands before the stop
// line of the group along it has right to p.
func (r *run) frame(id traffic.JunctionID, p traffic.Priority) {
	l, j := r.shown[id], r.s[id]
	switch {
	case l.to != l.stage && r.now.Sub(l.since) >= 10*time.Second:
		l.stage, l.since = l.to, r.now
	case l.to == l.stage:
		if s, ok := r.b.Serve(j); ok && s.Stage != l.stage && r.now.Sub(l.since) >= 5*time.Second {
			l.to, l.since = s.Stage, r.now
		}
	}
	sig := traffic.Signal{Stage: l.stage, State: j.Stages[l.stage].State, SinceMS: r.now.Sub(l.since).Milliseconds(), Mode: traffic.Coordinated}
	if l.to != l.stage {
		sig.Stage, sig.State = -1, "yyrr"
	}
	r.b.Frame(r.s, &traffic.Frame{Junction: id, FrameKey: traffic.FrameKey{Device: "rsu", BootEpoch: 1, Seq: uint64(r.now.Unix())}, Time: r.now, Interval: time.Second, Signal: sig,
		Readings: []traffic.Reading{{Detector: "s0", Priority: p}, {Detector: "s1"}}})
}

// until goes on second by second.
func (r *run) until(after time.Duration, p func(traffic.JunctionID) traffic.Priority) {
	for end := noon.Add(after); r.now.Before(end); {
		r.now = r.now.Add(time.Second)
		r.block()
		for i := range len(r.s) {
			id := traffic.JunctionID(rune('A' + i))
			seen := traffic.NoPriority
			if p != nil {
				seen = p(id)
			}
			r.frame(id, seen)
		}
	}
}

func (r *run) want(id string, stop int, s State, rule string) Progress {
	r.t.Helper()
	e, ok := r.b.Entry(id)
	if !ok {
		r.t.Fatalf("request %s is not in the book", id)
	}
	p := e.Stops[stop]
	if p.State != s || !strings.HasPrefix(p.Rule, rule) {
		r.t.Errorf("%s: request %s at %s: got %v by %q, want %v by %q", r.now.Format(clock), id, p.Junction, p.State, p.Rule, s, rule)
	}
	return p
}

func TestACorridorIsServedJunctionByJunction(t *testing.T) {
	r := start(t, 3)
	q := ask("1", func(q *traffic.Request) {
		q.Stops = nil
		for i, at := range []time.Duration{60, 85, 110} {
			q.Stops = append(q.Stops, traffic.Stop{Junction: traffic.JunctionID(rune('A' + i)), Group: "along", Arrival: noon.Add(at * time.Second)})
		}
	})
	if e := r.ask(q); e.State != Queued || e.Index != 20 {
		t.Fatalf("got %v at leaf %d by %q, want it queued at 20", e.State, e.Index, e.Rule)
	}
	r.until(30*time.Second, nil)
	r.want("1", 0, Queued, RuleQueue)
	r.until(45*time.Second, nil)
	r.want("1", 0, Activated, RuleServe)
	r.want("1", 2, Queued, RuleQueue)
	if s, ok := r.b.Serve(r.s["A"]); !ok || s.ID != "1" || s.Stage != 0 || s.Class != traffic.Emergency {
		t.Errorf("junction A serves %+v, %v; want request 1 by stage 0", s, ok)
	}
	r.b.Command(&traffic.Command{Junction: "A", Seq: 77, Rule: CommandRule("1", traffic.Emergency, "stage 0")})
	r.b.Command(&traffic.Command{Junction: "A", Seq: 78, Rule: CommandRule("1", traffic.Emergency, "stage 0")})
	// It comes when it said, is seen before the stop line, and is gone.
	r.until(63*time.Second, func(id traffic.JunctionID) traffic.Priority {
		if id == "A" && r.now.Sub(noon) > 57*time.Second && r.now.Sub(noon) < 62*time.Second {
			return traffic.Emergency
		}
		return traffic.NoPriority
	})
	p := r.want("1", 0, Completed, RulePassed)
	if p.Observed != "Grrr" || p.GreenAt.IsZero() || p.GreenAt.After(p.Arrival) || p.Command != 77 {
		t.Errorf("got green at %v showing %q by command %d, want Grrr before %v by 77", p.GreenAt, p.Observed, p.Command, p.Arrival)
	}
	if e, _ := r.b.Entry("1"); e.State != Activated {
		t.Errorf("on its way: got %v, want activated", e.State)
	}
	if _, ok := r.b.Serve(r.s["A"]); ok {
		t.Error("junction A is still to serve somebody who has passed")
	}
	r.until(130*time.Second, nil)
	r.want("1", 1, Completed, RuleTime)
	r.want("1", 2, Completed, RuleTime)
	if e, _ := r.b.Entry("1"); e.State != Completed || e.Ended.IsZero() {
		t.Errorf("got %v, ended %v, want completed", e.State, e.Ended)
	}
}

func TestWhatIsRefused(t *testing.T) {
	two := func(group string, after time.Duration) func(*traffic.Request) {
		return func(r *traffic.Request) {
			r.Stops = append(r.Stops, traffic.Stop{Junction: "B", Group: group, Arrival: r.Stops[0].Arrival.Add(after)})
		}
	}
	for name, tc := range map[string]struct {
		q    *traffic.Request
		rule string
	}{
		"somebody else's vehicle": {ask("1", func(r *traffic.Request) { r.Vehicle = "A-1" }), RuleDuty},
		"another class":           {bus("1", time.Hour, func(r *traffic.Request) { r.Class = traffic.Emergency }), RuleClass},
		"not on duty":             {bus("night", time.Hour, nil), RuleDuty},
		"no class":                {ask("1", func(r *traffic.Request) { r.Class = 7 }), RuleClass},
		"too fast":                {ask("1", two("along", 5*time.Second)), RuleSpeed},
		"too slow":                {ask("1", two("along", time.Hour)), RuleSpeed},
		"another way":             {ask("1", two("across", 30*time.Second)), RuleRoute},
		"not next to each other": {ask("1", func(r *traffic.Request) {
			r.Stops = append(r.Stops, traffic.Stop{Junction: "C", Group: "along", Arrival: r.Stops[0].Arrival.Add(time.Minute)})
		}), RuleRoute},
		"backwards": {ask("1", func(r *traffic.Request) {
			r.Stops = []traffic.Stop{{Junction: "B", Group: "along", Arrival: noon}, {Junction: "A", Group: "along", Arrival: noon.Add(time.Minute)}}
		}), RuleRoute},
		"never green":     {ask("1", func(r *traffic.Request) { r.Stops[0].Group = "dead" }), RuleStage},
		"for pedestrians": {ask("1", func(r *traffic.Request) { r.Stops[0].Group = "walk" }), RuleUnknown},
		"nowhere":         {ask("1", func(r *traffic.Request) { r.Stops[0].Junction = "Z" }), RuleUnknown},
		"on time":         {bus("1", 10*time.Second, nil), RuleLateness},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, 3)
			if got := r.b.Check(r.s, r.now, tc.q); !strings.HasPrefix(got, tc.rule) {
				t.Errorf("before: got %q, want %s", got, tc.rule)
			}
			e := r.ask(tc.q)
			if e.State != Rejected || !strings.HasPrefix(e.Rule, tc.rule) {
				t.Errorf("got %v by %q, want rejected by %s", e.State, e.Rule, tc.rule)
			}
			r.until(90*time.Second, nil)
			if _, ok := r.b.Serve(r.s["A"]); ok || r.b.Busy("A") {
				t.Error("it is served all the same")
			}
		})
	}
	r := start(t, 3)
	if e := r.ask(ask("1", two("along", 25*time.Second))); e.State != Queued {
		t.Errorf("an honest one: got %v by %q, want it queued", e.State, e.Rule)
	}
}

func TestAnHourIsSoonUsedUp(t *testing.T) {
	r := start(t, 1)
	most, granted := Default().PerHour[traffic.Emergency], 0
	for i := range 200 {
		e := r.ask(ask(fmt.Sprint(i), nil))
		if e.State != Rejected {
			granted++
		} else if !strings.HasPrefix(e.Rule, RuleQuota) {
			t.Fatalf("request %d: refused by %q, want %s", i, e.Rule, RuleQuota)
		}
	}
	if granted != most {
		t.Errorf("%d let in within the hour, want %d", granted, most)
	}
	// Another agency has its own hour.
	if e := r.ask(ask("a", func(q *traffic.Request) { q.By.Agency, q.Vehicle = "ambulance", "A-1" })); e.State == Rejected {
		t.Errorf("the other agency's: %q", e.Rule)
	}
	r.now = noon.Add(time.Hour)
	if e := r.ask(ask("later", func(q *traffic.Request) { q.Stops[0].Arrival = r.now.Add(time.Minute) })); e.State == Rejected {
		t.Errorf("an hour later: %q", e.Rule)
	}
}

func TestOneRequestAVehicle(t *testing.T) {
	r := start(t, 1)
	r.ask(ask("1", nil))
	if e := r.ask(ask("2", func(q *traffic.Request) { q.Vehicle = "F-1" })); !strings.HasPrefix(e.Rule, RuleVehicle) {
		t.Errorf("got %q, want %s", e.Rule, RuleVehicle)
	}
	// The same again is one.
	if e := r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon })); !e.Stops[0].Arrival.Equal(noon.Add(time.Minute)) {
		t.Error("the same request again has changed it")
	}
}

func TestEmergencyOutranksTransit(t *testing.T) {
	r := start(t, 1)
	r.ask(bus("1", 5*time.Minute, func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(20 * time.Second) }))
	r.until(10*time.Second, nil)
	r.want("1", 0, Activated, RuleServe)
	r.ask(ask("2", func(q *traffic.Request) {
		q.Stops[0].Group, q.Stops[0].Arrival = "across", noon.Add(25*time.Second)
	}))
	r.want("1", 0, Queued, RuleOutranks)
	r.want("2", 0, Activated, RuleServe)
	if s, _ := r.b.Serve(r.s["A"]); s.ID != "2" || s.Stage != 1 {
		t.Errorf("served: %+v, want request 2 by stage 1", s)
	}
}

func TestOfTwoEmergenciesTheEarlierIsFirst(t *testing.T) {
	r := start(t, 1)
	r.ask(ask("late", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(30 * time.Second) }))
	r.ask(ask("soon", func(q *traffic.Request) {
		q.Stops[0].Group, q.Stops[0].Arrival = "across", noon.Add(22*time.Second)
	}))
	r.until(14*time.Second, nil)
	r.want("late", 0, Queued, RuleQueue) // it is due, and would take the other's green away
	r.until(16*time.Second, nil)
	r.want("soon", 0, Activated, RuleServe)
	r.want("late", 0, Queued, RuleQueue)
	r.until(38*time.Second, nil)
	r.want("soon", 0, Completed, "")
	r.want("late", 0, Activated, RuleServe)
	r.until(70*time.Second, nil)
	r.want("late", 0, Completed, "")
}

func TestTwoInOneStageAreServedTogether(t *testing.T) {
	r := start(t, 1)
	r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(20 * time.Second) }))
	r.ask(bus("2", time.Hour, func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(21 * time.Second) }))
	r.until(12*time.Second, nil)
	r.want("1", 0, Activated, RuleServe)
	r.want("2", 0, Activated, RuleShares)
	r.until(60*time.Second, nil)
	r.want("1", 0, Completed, "")
	r.want("2", 0, Completed, "")
}

func TestTransitCoolsDown(t *testing.T) {
	r := start(t, 1)
	r.ask(bus("1", time.Hour, func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(10 * time.Second) }))
	r.until(40*time.Second, nil)
	r.want("1", 0, Completed, RuleTime)
	if e := r.ask(bus("2", time.Hour, func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(60 * time.Second) })); e.State != Cooldown {
		t.Errorf("got %v by %q, want cooldown", e.State, e.Rule)
	}
	if e := r.ask(bus("3", time.Hour, func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(200 * time.Second) })); e.State != Queued {
		t.Errorf("much later: got %v by %q, want queued", e.State, e.Rule)
	}
	// Emergency does not.
	r.ask(ask("4", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(50 * time.Second) }))
	r.until(90*time.Second, nil)
	if e := r.ask(ask("5", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(100 * time.Second) })); e.State == Cooldown {
		t.Errorf("an ambulance cools down: %q", e.Rule)
	}
}

func TestArrivalsCancelAndExpiry(t *testing.T) {
	route := func(q *traffic.Request) {
		q.Stops = append(q.Stops, traffic.Stop{Junction: "B", Group: "along", Arrival: noon.Add(90 * time.Second)})
	}
	t.Run("later", func(t *testing.T) {
		r := start(t, 2)
		r.ask(ask("1", route))
		e := r.ask(ask("1", func(q *traffic.Request) {
			route(q)
			q.Revision, q.Stops[0].Arrival, q.Stops[1].Arrival = 2, noon.Add(100*time.Second), noon.Add(130*time.Second)
		}))
		if e.Rule != RuleIn || e.Request.Revision != 2 {
			t.Fatalf("got revision %d by %q", e.Request.Revision, e.Rule)
		}
		r.until(70*time.Second, nil)
		r.want("1", 0, Queued, "")
		r.until(125*time.Second, nil)
		r.want("1", 0, Completed, "")
	})
	t.Run("passed", func(t *testing.T) {
		r := start(t, 2)
		r.ask(ask("1", route))
		r.ask(ask("1", func(q *traffic.Request) { route(q); q.Revision, q.Stops = 2, q.Stops[1:] }))
		r.want("1", 0, Completed, RulePassed)
		r.want("1", 1, Queued, RuleQueue)
	})
	for name, change := range map[string]func(*traffic.Request){
		"another route":   func(q *traffic.Request) { q.Stops[0].Group = "across" },
		"another vehicle": func(q *traffic.Request) { q.Vehicle = "F-2" },
		"flies":           func(q *traffic.Request) { q.Stops[1].Arrival = q.Stops[0].Arrival.Add(time.Second) },
		"longer":          func(q *traffic.Request) { q.Expires = q.Expires.Add(time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, 2)
			r.ask(ask("1", route))
			e := r.ask(ask("1", func(q *traffic.Request) { route(q); q.Revision = 2; change(q) }))
			if e.Rule == RuleIn || e.State != Queued || !e.Stops[0].Arrival.Equal(noon.Add(time.Minute)) {
				t.Errorf("got %v by %q with arrival %v, want the change refused and the request as it was", e.State, e.Rule, e.Stops[0].Arrival)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		r := start(t, 2)
		r.ask(ask("1", route))
		r.until(50*time.Second, nil)
		r.want("1", 0, Activated, "")
		// Others cannot.
		if e := r.ask(ask("1", func(q *traffic.Request) { q.Revision, q.Cancelled, q.By.Agency = 2, true, "ambulance" })); e.State.Ended() {
			t.Errorf("another agency has cancelled it: %v", e.State)
		}
		if e := r.ask(ask("1", func(q *traffic.Request) { q.Revision, q.Cancelled = 2, true })); e.State != Cancelled {
			t.Errorf("got %v, want cancelled", e.State)
		}
		if _, ok := r.b.Serve(r.s["A"]); ok {
			t.Error("it is served still")
		}
	})
	t.Run("expired", func(t *testing.T) {
		r := start(t, 1)
		r.ask(ask("1", func(q *traffic.Request) { q.Expires = noon.Add(10 * time.Second) }))
		r.until(15*time.Second, nil)
		r.want("1", 0, Timeout, RuleExpired)
	})
	t.Run("the junction does not answer", func(t *testing.T) {
		r := start(t, 1)
		r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(5 * time.Second) }))
		r.now = noon.Add(20 * time.Minute)
		r.block()
		r.want("1", 0, Timeout, RuleNoReport)
	})
	t.Run("never green", func(t *testing.T) {
		r := start(t, 1)
		r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(5 * time.Second) }))
		for range 40 {
			r.now = r.now.Add(time.Second)
			r.block()
			r.b.Frame(r.s, &traffic.Frame{Junction: "A", Time: r.now, Interval: time.Second, Signal: traffic.Signal{Stage: 1, State: "rGGr", Mode: traffic.Tripped}})
		}
		r.want("1", 0, Timeout, RuleNever)
	})
	t.Run("stands before the line", func(t *testing.T) {
		r := start(t, 1)
		r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(20 * time.Second) }))
		stands := func(traffic.JunctionID) traffic.Priority { return traffic.Emergency }
		r.until(60*time.Second, stands)
		r.want("1", 0, Activated, "")
		r.until(90*time.Second, stands)
		r.want("1", 0, Stale, RuleSilent)
	})
}

// What a book knows is a function of what it was told, also after it was stored in
// between; and its promises hold at every step.
func TestBookProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, err := timing.RulesNamed("field")
		if err != nil {
			t.Fatal(err)
		}
		s := newStreet(3)
		a, again := NewBook(Default(), rules), NewBook(Default(), rules)
		now, seq := noon, 0
		revision := map[string]uint64{}
		ended := map[string]State{}
		steps := rapid.IntRange(1, 60).Draw(t, "steps")
		for step := range steps {
			now = now.Add(time.Duration(rapid.IntRange(100, 8000).Draw(t, "ms")) * time.Millisecond)
			var tell func(b *Book)
			h := uint64(step + 1)
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0, 1:
				id := fmt.Sprint(rapid.IntRange(0, 8).Draw(t, "id"))
				revision[id] += uint64(rapid.IntRange(0, 1).Draw(t, "newer"))
				first := rapid.IntRange(0, 2).Draw(t, "first")
				q := ask(id, func(q *traffic.Request) {
					q.Time, q.Expires, q.Revision, q.Stops = now, now.Add(3*time.Minute), revision[id]+1, nil
					q.Cancelled = rapid.IntRange(0, 6).Draw(t, "cancels") == 0
					at := now.Add(time.Duration(rapid.IntRange(-20, 60).Draw(t, "arrival")) * time.Second)
					for i := first; i < 3; i++ {
						q.Stops = append(q.Stops, traffic.Stop{Junction: traffic.JunctionID(rune('A' + i)), Group: "along", Arrival: at})
						at = at.Add(time.Duration(rapid.IntRange(15, 60).Draw(t, "way")) * time.Second)
						if rapid.Bool().Draw(t, "ends") {
							break
						}
					}
					if len(q.Stops) == 1 && rapid.Bool().Draw(t, "across") {
						q.Stops[0].Group = "across"
					}
				})
				if id[0]%2 == 0 {
					q.By.Agency, q.Class, q.Vehicle, q.Lateness = "transit", traffic.Bus, "bus-"+id, time.Hour
				}
				tell = func(b *Book) { b.Request(s, h*10, q) }
			default:
				seq++
				j := s[traffic.JunctionID(rune('A'+rapid.IntRange(0, 2).Draw(t, "junction")))]
				stage := rapid.IntRange(-1, 1).Draw(t, "stage")
				f := &traffic.Frame{Junction: j.ID, FrameKey: traffic.FrameKey{Device: "rsu", BootEpoch: 1, Seq: uint64(seq)}, Time: now, Interval: time.Second,
					Signal:   traffic.Signal{Stage: stage, State: "yyrr", SinceMS: int64(rapid.IntRange(0, 20_000).Draw(t, "since"))},
					Readings: []traffic.Reading{{Detector: "s0", Priority: traffic.Priority(rapid.IntRange(0, 2).Draw(t, "seen"))}}}
				if stage >= 0 {
					f.Signal.State = j.Stages[stage].State
				}
				tell = func(b *Book) { b.Frame(s, f) }
			}
			for _, b := range []*Book{a, again} {
				b.Block(h, now)
				tell(b)
			}
			if rapid.IntRange(0, 5).Draw(t, "stored") == 0 {
				stored, err := again.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				again = NewBook(Default(), rules)
				if err := again.Restore(stored); err != nil {
					t.Fatal(err)
				}
			}
			x, err := a.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if y, err := again.Marshal(); err != nil || !bytes.Equal(x, y) {
				t.Fatalf("after it was stored:\n%s, %v\nwant\n%s", y, err, x)
			}
			if y, _ := a.Clone().Marshal(); !bytes.Equal(x, y) {
				t.Fatalf("the clone:\n%s\nwant\n%s", y, x)
			}
			promises(t, a, s, ended)
		}
	})
}

type fataler interface{ Fatalf(string, ...any) }

func promises(t fataler, b *Book, s street, ended map[string]State) {
	for _, j := range s {
		stage, emergency := -1, false
		for _, e := range b.Entries {
			for _, p := range e.Stops {
				if p.Junction != j.ID || p.State != Activated {
					continue
				}
				if stage >= 0 && p.Stage != stage {
					t.Fatalf("junction %s is to show two stages, %d and %d", j.ID, stage, p.Stage)
				}
				if stage = p.Stage; !j.Stages[stage].State.At(group(j, p.Group)).Go() {
					t.Fatalf("junction %s: stage %d does not let group %s go", j.ID, stage, p.Group)
				}
				emergency = emergency || e.Request.Class == traffic.Emergency
			}
		}
		serving, ok := b.Serve(j)
		if ok != (stage >= 0) || ok && serving.Stage != stage || ok && emergency != (serving.Class == traffic.Emergency) {
			t.Fatalf("junction %s serves %+v, %v; activated is stage %d, emergency %v", j.ID, serving, ok, stage, emergency)
		}
	}
	in := map[string]int{}
	for id, e := range b.Entries {
		for i, p := range e.Stops {
			k := fmt.Sprint(id, "/", i)
			if was, over := ended[k]; over && was != p.State {
				t.Fatalf("request %s at %s: was %v, is %v", id, p.Junction, was, p.State)
			}
			if p.State.Ended() {
				ended[k] = p.State
			} else if e.State.Ended() {
				t.Fatalf("request %s has ended as %v and is %v at %s", id, e.State, p.State, p.Junction)
			}
		}
		if e.State != Rejected {
			in[e.Request.By.Agency+ClassName(e.Request.Class)]++
		}
	}
	for k, n := range in {
		if most := 240; n > most {
			t.Fatalf("%s: %d let in", k, n)
		}
	}
}

// The test above notices what it is for.
func TestPromisesCanBeBroken(t *testing.T) {
	r := start(t, 1)
	r.ask(ask("1", func(q *traffic.Request) { q.Stops[0].Arrival = noon.Add(5 * time.Second) }))
	r.b.Entries["1"].Stops[0].Stage = 1
	var c caught
	promises(&c, r.b, r.s, map[string]State{})
	if !strings.Contains(string(c), "does not let group along go") {
		t.Errorf("got %q", c)
	}
}

type caught string

func (c *caught) Fatalf(format string, a ...any) {
	if *c == "" {
		*c = caught(fmt.Sprintf(format, a...))
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	for _, s := range []string{"", "{", `{"Entries":{"a":null}}`, `{"Entries":{"a":{"Request":{"ID":"b"}}}}`, `{"Seen":{"A":null}}`, `{"Served":{"x":"2026-01-01T00:00:00Z"}}`} {
		if err := start(t, 1).b.Restore([]byte(s)); err == nil {
			t.Errorf("%s: taken", s)
		}
	}
}

func TestRequestOf(t *testing.T) {
	if id, ok := RequestOf(CommandRule("abc", traffic.Emergency, "stage 2")); !ok || id != "abc" {
		t.Errorf("got %q, %v", id, ok)
	}
	for _, s := range []string{"", "adaptive: stage 2 stays", "priority ", "priority  x", "priority abc"} {
		if id, ok := RequestOf(s); ok {
			t.Errorf("%q: got %q", s, id)
		}
	}
}

func TestStatesHaveRSMPsNames(t *testing.T) {
	var got []string
	for s := Received; s <= Cancelled+1; s++ {
		got = append(got, s.String())
	}
	if want := "received queued activated completed rejected cooldown timeout stale cancelled state 10"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}
