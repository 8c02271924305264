package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func newCity(t testing.TB, cfg Config) *City {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// planState is what a plain fixed-time controller shows at ms: green, yellow
// for 3 s or pedestrian clearance, red. It is written for these tests alone
// and shares nothing with pkg/timing.
func planState(j *traffic.Junction, ms int64) traffic.State {
	at := (ms - j.Plan.OffsetMS) % j.Plan.CycleMS()
	if at < 0 {
		at += j.Plan.CycleMS()
	}
	for _, step := range j.Plan.Steps {
		if at >= step.DurationMS {
			at -= step.DurationMS
			continue
		}
		s := []byte(j.Stages[step.Stage].State)
		green := step.DurationMS - step.IntergreenMS
		for g := range s {
			if !traffic.Aspect(s[g]).Go() || at < green {
				continue
			}
			switch {
			case j.Groups[g].Kind == traffic.Pedestrians && at < green+j.Groups[g].PedClearMS:
				s[g] = byte(traffic.PedClear)
			case j.Groups[g].Kind != traffic.Pedestrians && at < green+j.Timing.YellowMS:
				s[g] = byte(traffic.Yellow)
			default:
				s[g] = byte(traffic.Red)
			}
		}
		return traffic.State(s)
	}
	panic("unreachable")
}

type crew struct {
	city    *City
	drivers []*Driver
	show    func(j *traffic.Junction, ms int64) traffic.State
}

func drive(t testing.TB, c *City, show func(j *traffic.Junction, ms int64) traffic.State) *crew {
	t.Helper()
	w := &crew{city: c, show: show}
	for _, j := range c.Junctions() {
		d, err := c.Driver(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		w.drivers = append(w.drivers, d)
	}
	return w
}

func (w *crew) step(t testing.TB) {
	for i, d := range w.drivers {
		if err := d.Show(w.show(w.city.defs[i], w.city.ms)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.city.Step(); err != nil {
		t.Fatal(err)
	}
}

func (w *crew) run(t testing.TB, d time.Duration) {
	for range int(d / w.city.StepLength()) {
		w.step(t)
	}
}

// brief chooses how much to simulate: as a rule, with -short, and under the
// race detector.
func brief(usual, short, race int) int {
	switch {
	case raceEnabled:
		return race
	case testing.Short():
		return short
	}
	return usual
}

func stage(n int) func(*traffic.Junction, int64) traffic.State {
	return func(j *traffic.Junction, _ int64) traffic.State { return j.Stages[n].State }
}

func TestDefinitions(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 7, 9, 13, 64, 100} {
		c := newCity(t, Config{Junctions: n})
		js := c.Junctions()
		if len(js) != n {
			t.Fatalf("city of %d: got %d junctions", n, len(js))
		}
		ids, places := map[traffic.JunctionID]bool{}, map[string]bool{}
		for _, j := range js {
			if err := j.Check(); err != nil {
				t.Errorf("city of %d: %v", n, err)
			}
			ids[j.ID] = true
			places[fmt.Sprint(j.LatE6, j.LonE6)] = true
			if k := len(j.Detectors); k < 20 || k > 26 {
				t.Errorf("%s: got %d detectors, want 20 to 26", j.ID, k)
			}
			// What a filed definition is parsed from is the same definition.
			b, err := json.Marshal(j)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := traffic.ParseJunction(b); err != nil {
				t.Errorf("%s as JSON: %v", j.ID, err)
			}
			// Each group is green in some stage of the plan, or would starve.
			for g := range j.Groups {
				served := false
				for _, s := range j.Plan.Steps {
					served = served || j.Stages[s.Stage].State.At(g).Go()
				}
				if !served {
					t.Errorf("%s: the plan never serves group %q", j.ID, j.Groups[g].Name)
				}
			}
		}
		if len(ids) != n || len(places) != n {
			t.Errorf("city of %d: got %d ids at %d places", n, len(ids), len(places))
		}
		for _, j := range js {
			for _, l := range j.Lanes {
				if l.From != "" && !ids[l.From] || l.To != "" && !ids[l.To] {
					t.Errorf("lane %s joins %q and %q, which are not both in the city", l.ID, l.From, l.To)
				}
			}
		}
	}
}

// The conflicts are written down once by hand; here they follow from geometry:
// put the arms on a circle, and two ways conflict where their chords cross or
// they end at one arm.
func TestConflictsFollowFromGeometry(t *testing.T) {
	c := newCity(t, Config{})
	for _, j := range c.Junctions() {
		arms := func(m traffic.Movement) (arm, arm) {
			var from, to arm
			for a := north; a <= west; a++ {
				if strings.Contains(string(m.From), "."+armLetters[a]+".") {
					from = a
				}
				if strings.Contains(string(m.To), "."+armLetters[a]+".") {
					to = a
				}
			}
			return from, to
		}
		cross := func(a, b traffic.Movement) bool {
			af, at := arms(a)
			bf, bt := arms(b)
			if af == bf { // bus lanes lie left of the left-turners
				return strings.HasSuffix(string(a.From), "bus") != strings.HasSuffix(string(b.From), "bus") && (af.exit(left) == at || bf.exit(left) == bt)
			}
			if at == bt {
				return true
			}
			// Traffic keeps right: an arm's entry lies just before its exit, clockwise.
			in := func(x arm) int { return int(x) * 2 }
			out := func(x arm) int { return int(x)*2 + 1 }
			between := func(x, lo, hi int) bool {
				if lo > hi {
					lo, hi = hi, lo
				}
				return lo < x && x < hi
			}
			return between(in(bf), in(af), out(at)) != between(out(bt), in(af), out(at))
		}
		listed := func(lists [][]int, a, b int) bool { return contains2(lists[a], b) || contains2(lists[b], a) }
		for a := range j.Movements {
			for b := range a {
				ga, gb := j.Movements[a].Group, j.Movements[b].Group
				if ga != gb && cross(j.Movements[a], j.Movements[b]) && !listed(j.Conflicts, ga, gb) && !listed(j.Yields, ga, gb) {
					t.Errorf("%s: %v and %v cross, and groups %q and %q neither conflict nor yield", j.ID, j.Movements[a], j.Movements[b], j.Groups[ga].Name, j.Groups[gb].Name)
				}
			}
			for w := north; w <= west; w++ {
				from, to := arms(j.Movements[a])
				if g := j.Movements[a].Group; (from == w || to == w) && !listed(j.Conflicts, g, gWalkNorth+int(w)) && !listed(j.Yields, g, gWalkNorth+int(w)) {
					t.Errorf("%s: %v runs over the %s crossing unhindered", j.ID, j.Movements[a], armNames[w])
				}
			}
		}
		for i, s := range j.Stages {
			for a, ys := range j.Yields {
				for _, b := range ys {
					if s.State.At(a) == traffic.Green && s.State.At(b).Go() {
						t.Errorf("%s: stage %d gives %q, which yields to %q, a protected green", j.ID, i, j.Groups[a].Name, j.Groups[b].Name)
					}
				}
			}
		}
	}
}

func contains2(s []int, v int) bool {
	for _, x := range s {
		if x == v {
			return true
		}
	}
	return false
}

func TestConfigErrors(t *testing.T) {
	_, err := New(Config{Junctions: -1, DemandPermille: 99_999, Duration: -1, BusEvery: 1, AmbulanceEvery: 1})
	for _, want := range []string{"junctions: -1 is not", "demand_permille: 99999 is not", "duration: -1ns is negative", "bus_every: 1ns is below", "ambulance_every: 1ns is below"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}

func TestEverySecondHolds(t *testing.T) {
	minutes := brief(60, 6, 4)
	for _, tc := range []struct {
		name   string
		demand int
		show   func(*traffic.Junction, int64) traffic.State
	}{
		{"plan", 1000, planState},
		{"overload", 3000, planState},
		{"one stage for ever", 1500, stage(0)},
		{"dark", 700, func(j *traffic.Junction, _ int64) traffic.State { return traffic.AllOf(traffic.Dark, len(j.Groups)) }},
		{"all red", 1000, func(j *traffic.Junction, _ int64) traffic.State { return traffic.AllOf(traffic.Red, len(j.Groups)) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCity(t, Config{Seed: 7, DemandPermille: tc.demand, FlatDemand: true})
			w := drive(t, c, tc.show)
			for i := range minutes * 600 {
				w.step(t)
				checkLanes(t, c)
				if i%100 == 99 {
					checkConserved(t, c)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			m := c.Measures()
			t.Logf("%+v", m)
			switch tc.name {
			case "plan", "dark":
				if m.Cars.Finished == 0 || m.Buses.Finished == 0 && minutes > 10 || m.Pedestrians.Started == 0 && tc.name == "plan" {
					t.Errorf("nobody got through: %+v", m)
				}
			case "all red":
				if m.Crossed != 0 || m.All().Finished != 0 {
					t.Errorf("got %d over a red stop line, %d finished; want none", m.Crossed, m.All().Finished)
				}
			}
		})
	}
}

// checkLanes: nobody overlaps, nobody is beyond its lane, and no lane holds
// more than its capacity.
func checkLanes(t *testing.T, c *City) {
	for _, l := range c.lanes {
		if len(l.vs) > l.capacity || l.used > l.length {
			t.Errorf("lane %s holds %d of %d vehicles, %d of %d mm", l.id, len(l.vs), l.capacity, l.used, l.length)
		}
		for i, v := range l.vs {
			if v.pos > l.length || v.pos < l.begin || v.v < 0 {
				t.Errorf("lane %s: vehicle %d at %d mm of %d with %d mm/s", l.id, v.id, v.pos, l.length, v.v)
			}
			if i > 0 && l.vs[i-1].pos-l.vs[i-1].spacing < v.pos {
				t.Errorf("lane %s: vehicle %d at %d mm overlaps %d at %d", l.id, v.id, v.pos, l.vs[i-1].id, l.vs[i-1].pos)
			}
		}
	}
}

func checkConserved(t *testing.T, c *City) {
	m := c.Measures()
	for name, k := range map[string]ClassMeasures{"cars": m.Cars, "buses": m.Buses, "ambulances": m.Ambulances} {
		if k.Wanted != k.TurnedAway+k.Outside+k.Inside+k.Finished {
			t.Errorf("%s: %d wanted, and %d+%d+%d+%d are accounted for", name, k.Wanted, k.TurnedAway, k.Outside, k.Inside, k.Finished)
		}
	}
	if p := m.Pedestrians; p.Arrived != p.Waiting+p.Started {
		t.Errorf("pedestrians: %d arrived, %d wait, %d started", p.Arrived, p.Waiting, p.Started)
	}
}

// fill puts a standing queue of cars with one turn into a stop lane.
func fill(l *lane, t turn, n int) {
	for i := range n {
		l.push(&vehicle{id: uint64(1e6) + uint64(i), seed: uint64(i), spacing: spacingMM, turn: t, move: l.moves[t], haltMS: 0}, l.length-haltMM-int64(i)*spacingMM)
	}
}

// A queue that never ends discharges at exactly the filed saturation flow,
// after a start-up loss.
func TestSaturationFlow(t *testing.T) {
	for _, tc := range []struct {
		name  string
		stage int
		arm   arm
		lane  int
		turn  turn
	}{
		{"main through", 0, west, 1, through}, {"main right", 3, west, 1, right}, {"main left", 1, west, 0, left}, {"side through", 2, north, 0, through},
		{"side right", 2, north, 0, right},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCity(t, Config{Junctions: 1, BusEvery: -1, AmbulanceEvery: -1, DemandPermille: 1})
			c.entries, c.sites[0].crossings = nil, [4]crossing{{group: gWalkNorth}, {group: gWalkEast}, {group: gWalkSouth}, {group: gWalkWest}}
			l := c.sites[0].approach[tc.arm][tc.lane]
			l.length, l.capacity = 3_000_000, 400 // a queue of 3 km
			fill(l, tc.turn, 390)
			w := drive(t, c, stage(tc.stage))
			var at []int64
			crossings := brief(300, 300, 60)
			for len(at) < crossings && c.ms < 900_000 {
				before := c.stats.crossed
				w.step(t)
				if c.stats.crossed > before {
					at = append(at, c.ms)
				}
				checkLanes(t, c)
			}
			if len(at) < crossings {
				t.Fatalf("got %d over the stop line in 15 min, want %d", len(at), crossings)
			}
			flow := float64(len(at)-11) / float64(at[len(at)-1]-at[10]) * 3_600_000
			want := float64(c.defs[0].Movements[l.moves[tc.turn].index].SaturationPerHour)
			if flow > want*1.01 || flow < want*0.95 {
				t.Errorf("got %.0f vehicles/h at saturation, want %.0f", flow, want)
			}
			loss := at[9] - int64(10*3_600_000/want)
			t.Logf("%.0f vehicles/h, filed %.0f; the tenth crosses %d ms later than at saturation from the start", flow, want, loss)
			if loss < 200 || loss > 4_000 {
				t.Errorf("got a start-up loss of %d ms, want 200 to 4000", loss)
			}
		})
	}
}

// No stop line ever lets through more than it can: checked on what the
// detectors say, over every junction and second of an overloaded hour.
func TestCountsStayWithinWhatALaneDischarges(t *testing.T) {
	c := newCity(t, Config{Seed: 3, DemandPermille: 2500, FlatDemand: true})
	w := drive(t, c, planState)
	const window = 60
	recent := map[traffic.LaneID][]uint32{}
	for sec := range brief(3600, 600, 120) {
		w.run(t, time.Second)
		for i, d := range w.drivers {
			rs, err := d.Sense()
			if err != nil {
				t.Fatal(err)
			}
			for k, r := range rs {
				det := c.defs[i].Detectors[k]
				checkReading(t, c.defs[i], det, r, sec)
				if det.Kind != traffic.StopLine {
					continue
				}
				best := 0
				for _, m := range det.Movements {
					best = max(best, c.defs[i].Movements[m].SaturationPerHour)
				}
				q := append(recent[det.Lane], r.Count)
				if len(q) > window {
					q = q[1:]
				}
				recent[det.Lane] = q
				sum := 0
				for _, n := range q {
					sum += int(n)
				}
				if most := best*len(q)/3600 + 2; sum > most {
					t.Fatalf("%s: %d passed in %d s, at most %d can", det.ID, sum, len(q), most)
				}
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
}

func checkReading(t *testing.T, j *traffic.Junction, d traffic.Detector, r traffic.Reading, sec int) {
	bad := func(rule string) { t.Errorf("second %d, %s %s: %s: %+v", sec, j.ID, d.ID, rule, r) }
	if r.Detector != d.ID {
		bad("out of order")
	}
	if d.Kind == traffic.Button {
		if r.HeadWaitMS > 0 && r.Count == 0 {
			bad("somebody waits and nobody calls")
		}
		return
	}
	lane, _ := j.Lane(d.Lane)
	if r.OccupancyPermille > 1000 {
		bad("occupancy above 1000")
	}
	if r.Count > 0 && (r.OccupancyPermille == 0 || r.SpeedCMS == 0) {
		bad("counted without occupancy or speed")
	}
	if r.Count == 0 && r.SpeedCMS != 0 {
		bad("speed of nobody")
	}
	if int64(r.SpeedCMS) > lane.SpeedCMS*5/4 {
		bad("faster than an ambulance")
	}
	if r.Halted > r.Vehicles || int(r.Vehicles) > lane.Capacity {
		bad("more than there can be")
	}
	if r.Halted == 0 && r.HeadWaitMS > 0 {
		bad("nobody stands, and the head has waited")
	}
	if r.Count > 1 && d.Kind != traffic.ExitArea {
		bad("two within a second")
	}
}

// A full exit holds its feeders at the stop line although they have green, and
// the queue grows back through the junction before.
func TestSpillBack(t *testing.T) {
	c := newCity(t, Config{Seed: 1, Junctions: 3, FlatDemand: true, AmbulanceEvery: -1})
	// The middle junction never gives green to its west arm.
	closed := true
	w := drive(t, c, func(j *traffic.Junction, ms int64) traffic.State {
		s := []byte(planState(j, ms))
		if j.ID == "h0102" && closed {
			for _, g := range []int{gWestThrough, gWestLeft, gBusEastbound} {
				s[g] = byte(traffic.Red)
			}
		}
		return traffic.State(s)
	})
	w.run(t, 15*time.Minute)
	exit := c.trunks["h0101.e.out"]
	if exit.fits(spacingMM) {
		t.Fatalf("exit %s holds %d of %d and is not full", exit.id, len(exit.vs), exit.capacity)
	}
	// From now on nobody may enter it, and its feeder stands at its own green.
	n, greens := len(exit.vs), 0
	feeder := c.sites[0].approach[west][1]
	for range 1800 {
		w.step(t)
		if len(exit.vs) > n {
			t.Fatalf("a vehicle entered the full exit: %d, then %d", n, len(exit.vs))
		}
		n = len(exit.vs)
		if c.sites[0].lamps.At(gWestThrough).Go() && len(feeder.vs) > 0 && feeder.vs[0].turn == through && feeder.vs[0].haltMS >= 0 {
			greens++
		}
	}
	if greens < 100 {
		t.Errorf("the feeder stood %d tenths of a second at green, want at least 100", greens)
	}
	inside := feeder.used
	closed = false
	before := c.Measures().All().Finished
	w.run(t, 10*time.Minute)
	if got := c.Measures().All().Finished - before; got < 100 {
		t.Errorf("after the exit opened %d finished in 10 min (feeder held %d mm), want at least 100", got, inside)
	}
}

func TestGreenOneWayQueuesTheOther(t *testing.T) {
	c := newCity(t, Config{Seed: 5, Junctions: 1, FlatDemand: true})
	w := drive(t, c, stage(0))
	w.run(t, 10*time.Minute)
	var main, side LaneSnapshot
	for _, l := range c.Snapshot().Junctions[0].Lanes {
		switch l.ID {
		case "h0101.w.main":
			main = l
		case "h0101.n.all":
			side = l
		}
	}
	if side.Halted < side.Capacity*3/4 || main.Halted > 3 {
		t.Errorf("got %d standing on the side street of %d, %d on the main; want it full, and free", side.Halted, side.Capacity, main.Halted)
	}
	p := c.Measures().Pedestrians
	if p.MaxWaitMS < 5*60_000 {
		t.Errorf("got a longest pedestrian wait of %d ms over the main street, want over 5 min", p.MaxWaitMS)
	}
}

// Side street left turns wait for the opposing stream and get through in its
// gaps: the more comes against them, the fewer do.
func TestPermissiveLeftYields(t *testing.T) {
	flow := func(against int) int64 {
		c := newCity(t, Config{Junctions: 1, BusEvery: -1, AmbulanceEvery: -1, DemandPermille: 1})
		c.entries = nil
		for a := range c.sites[0].crossings {
			c.sites[0].crossings[a].perHour = 0
		}
		l, o := c.sites[0].approach[north][0], c.sites[0].approach[south][0]
		w := drive(t, c, stage(2))
		fill(l, left, 12)
		done := int64(0)
		for i := range 6000 {
			if against > 0 && i%(36000/against) == 0 && o.room(spacingMM) {
				c.nextID++
				o.push(&vehicle{id: c.nextID, spacing: spacingMM, turn: through, move: o.moves[through], haltMS: -1, v: sideSpeed}, 0)
			}
			before := len(l.vs)
			w.step(t)
			if len(l.vs) < before {
				done++
				if c.ms-o.lastMS < clearBoxMS {
					t.Fatalf("a left turn %d ms after opposing traffic", c.ms-o.lastMS)
				}
				c.nextID++
				n := len(l.vs)
				if l.room(spacingMM) {
					l.push(&vehicle{id: c.nextID, spacing: spacingMM, turn: left, move: l.moves[left], haltMS: 0}, l.vs[n-1].pos-spacingMM)
				}
			}
		}
		return done * 6 // an hour
	}
	free, some, dense := flow(0), flow(400), flow(1500)
	t.Logf("left turns an hour: %d freely, %d against 400/h, %d against 1500/h", free, some, dense)
	if free < 1200 || some >= free || dense >= some/2 {
		t.Errorf("got %d freely, %d against 400/h, %d against 1500/h; want each far below the one before", free, some, dense)
	}
}

func TestNobodyCrossesLaterThanTwoSecondsIntoYellow(t *testing.T) {
	c := newCity(t, Config{Seed: 11, FlatDemand: true, DemandPermille: 1300})
	w := drive(t, c, planState)
	last := make([]int64, len(c.lanes))
	yellow := 0
	for range brief(36000, 6000, 3000) {
		w.step(t)
		for i, l := range c.lanes {
			if l.site < 0 || l.lastMS == last[i] || l.lastMv == nil {
				continue
			}
			last[i] = l.lastMS
			s := c.sites[l.site]
			shown := c.ms - stepMS - s.since[l.lastMv.group]
			switch a := s.lamps.At(l.lastMv.group); {
			case a.Go():
			case a == traffic.Yellow && (shown <= dilemmaMS || l.lastMv.opposing && shown < 2_500):
				yellow++
			default:
				t.Fatalf("%s: a vehicle crossed %d ms into %v", l.id, shown, a)
			}
		}
	}
	if yellow == 0 {
		t.Error("nobody crossed at yellow, so the rule was not tried")
	}
}

func TestSameSeedSameCity(t *testing.T) {
	run := func(seed uint64) string {
		c := newCity(t, Config{Seed: seed, FlatDemand: true, AmbulanceEvery: time.Minute})
		w := drive(t, c, planState)
		var all []any
		for range brief(20, 20, 4) {
			w.run(t, 30*time.Second)
			for _, d := range w.drivers {
				r, err := d.Sense()
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, r)
			}
		}
		all = append(all, c.Snapshot(), c.Measures())
		b, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	a, b, other := run(42), run(42), run(43)
	if a != b {
		t.Error("two cities of seed 42 differ")
	}
	if a == other {
		t.Error("cities of seeds 42 and 43 are equal")
	}
}

// Demand is the same whatever the lamps do, so that controllers can be
// compared in pairs.
func TestDemandDoesNotDependOnTheLamps(t *testing.T) {
	run := func(show func(*traffic.Junction, int64) traffic.State) Measures {
		c := newCity(t, Config{Seed: 42, FlatDemand: true, DemandPermille: 2000})
		drive(t, c, show).run(t, time.Duration(brief(40, 10, 5))*time.Minute)
		return c.Measures()
	}
	a, b := run(planState), run(stage(1))
	if a.Cars.Wanted != b.Cars.Wanted || a.Buses.Wanted != b.Buses.Wanted || a.Ambulances.Wanted != b.Ambulances.Wanted || a.Pedestrians.Arrived != b.Pedestrians.Arrived {
		t.Errorf("demand differs: %+v and %+v", a, b)
	}
	if !raceEnabled && !testing.Short() && a.Cars.MeanDelayMS*2 > b.Cars.MeanDelayMS {
		t.Errorf("a plan gives %d ms of delay, left turns for ever %d; want far less", a.Cars.MeanDelayMS, b.Cars.MeanDelayMS)
	}
}

func TestArrivalsFollowTheHour(t *testing.T) {
	if raceEnabled {
		t.Skip("simulates two hours of demand; nothing here runs concurrently")
	}
	wanted := func(hour int) int64 {
		c := newCity(t, Config{Seed: 2, Start: time.Date(2026, 3, 2, hour, 0, 0, 0, time.UTC)})
		drive(t, c, planState).run(t, time.Hour)
		return c.Measures().Cars.Wanted
	}
	night, peak := wanted(3), wanted(8)
	if night*5 > peak || peak < 2000 {
		t.Errorf("got %d cars at night and %d in the peak hour", night, peak)
	}
}

func TestBusesKeepTheirLine(t *testing.T) {
	if raceEnabled {
		t.Skip("simulates an hour; nothing here runs concurrently")
	}
	c := newCity(t, Config{Seed: 2, FlatDemand: true})
	w := drive(t, c, planState)
	bus := false
	for range 3600 {
		w.run(t, time.Second)
		for i, d := range w.drivers {
			rs, err := d.Sense()
			if err != nil {
				t.Fatal(err)
			}
			for k, r := range rs {
				if r.Priority == traffic.Bus && strings.HasSuffix(string(c.defs[i].Detectors[k].Lane), ".bus") {
					bus = true
				}
			}
		}
	}
	m := c.Measures()
	if m.Buses.Wanted != 20 || m.Buses.Finished < 15 || m.BusStops < 45 || m.MeanLatenessMS > 120_000 || m.MeanLatenessMS < -60_000 {
		t.Errorf("got %+v and %d stops, %d ms late on average; want 20 buses at 3 stops each, on time within 2 min", m.Buses, m.BusStops, m.MeanLatenessMS)
	}
	if !bus {
		t.Error("no bus asked for priority in an hour")
	}
}

func TestAmbulancesAreSeen(t *testing.T) {
	c := newCity(t, Config{Seed: 2, FlatDemand: true, AmbulanceEvery: time.Minute})
	w := drive(t, c, planState)
	seen := 0
	for range brief(1200, 1200, 300) {
		w.run(t, time.Second)
		for _, d := range w.drivers {
			rs, err := d.Sense()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rs {
				if r.Priority == traffic.Emergency {
					seen++
				}
			}
		}
	}
	if m := c.Measures(); seen == 0 || m.Ambulances.Finished == 0 {
		t.Errorf("got %d readings with an ambulance, %+v", seen, m.Ambulances)
	}
}

func TestDriverRefuses(t *testing.T) {
	c := newCity(t, Config{Duration: time.Second})
	if _, err := c.Driver("h9999"); err == nil || !strings.Contains(err.Error(), `no junction "h9999"`) {
		t.Errorf("unknown junction: got %v", err)
	}
	d, err := c.Driver("h0101")
	if err != nil {
		t.Fatal(err)
	}
	was, err := d.Observed()
	if err != nil {
		t.Fatal(err)
	}
	for state, want := range map[traffic.State]string{"rrr": "3 aspects for 10 groups", "rrrrrrrrrZ": `group 9 has no aspect "Z"`} {
		if err := d.Show(state); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Show(%q): got %v, want %q", state, err, want)
		}
	}
	if now, err := d.Observed(); err != nil || now != was {
		t.Errorf("after refused states: got %q, %v; want %q", now, err, was)
	}
	// Conflicting greens are shown, for the lamps are not the interlock, and counted.
	if err := d.Show("GrrrGrrrrr"); err != nil || c.Measures().UnsafeStates != 1 {
		t.Errorf("conflicting greens: got %v and %d counted, want 1", err, c.Measures().UnsafeStates)
	}
	steps := 0
	for more := true; more; steps++ {
		if more, err = c.Step(); err != nil {
			t.Fatal(err)
		}
	}
	if steps != 10 || c.Now().Sub(c.cfg.Start) != time.Second {
		t.Errorf("got %d steps to %v, want 10 and 1 s", steps, c.Now().Sub(c.cfg.Start))
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Step(); !errors.Is(err, ErrClosed) {
		t.Errorf("Step after Close: got %v", err)
	}
	if _, err := d.Sense(); !errors.Is(err, ErrClosed) {
		t.Errorf("Sense after Close: got %v", err)
	}
	if err := d.Show(was); !errors.Is(err, ErrClosed) {
		t.Errorf("Show after Close: got %v", err)
	}
}

func BenchmarkStep(b *testing.B) {
	for _, n := range []int{9, 64, 256} {
		b.Run(fmt.Sprintf("junctions=%d", n), func(b *testing.B) {
			c := newCity(b, Config{Seed: 1, Junctions: n, FlatDemand: true})
			w := drive(b, c, planState)
			w.run(b, 10*time.Minute)
			start := c.Now()
			for i := 0; b.Loop(); i++ {
				w.step(b)
				if i%10 == 0 {
					for _, d := range w.drivers {
						if _, err := d.Sense(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			b.ReportMetric(c.Now().Sub(start).Seconds()/b.Elapsed().Seconds(), "x_real_time")
		})
	}
}

// Between two steps, roadside units work side by side, and a page looks on.
func TestDriversMayBeUsedConcurrently(t *testing.T) {
	c := newCity(t, Config{Seed: 1, FlatDemand: true})
	w := drive(t, c, planState)
	for range 50 {
		var all sync.WaitGroup
		for i, d := range w.drivers {
			all.Add(1)
			go func() {
				defer all.Done()
				if err := d.Show(planState(c.defs[i], c.Now().UnixMilli())); err != nil {
					t.Error(err)
				}
				if _, err := d.Sense(); err != nil {
					t.Error(err)
				}
				if _, err := d.Observed(); err != nil {
					t.Error(err)
				}
				c.Snapshot()
				c.Measures()
			}()
		}
		all.Wait()
		if _, err := c.Step(); err != nil {
			t.Fatal(err)
		}
	}
}
