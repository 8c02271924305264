package traci

import (
	"compress/gzip"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// cross loads the network in testdata.
func cross(t testing.TB) *Scenario {
	t.Helper()
	s, err := Load(filepath.Join("testdata", "cross.sumocfg"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// derive returns the named junction of a scenario.
func derive(t testing.TB, s *Scenario, id string, lim Limits, sensing Sensing) Derived {
	t.Helper()
	ds, err := s.Derive(lim, sensing)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range ds {
		if string(d.Junction.ID) == id {
			return d
		}
	}
	t.Fatalf("no junction %q", id)
	return Derived{}
}

func TestStagesAndPlan(t *testing.T) {
	s := cross(t)
	a := derive(t, s, "alpha", Limits{}, SensingDetectors).Junction
	wantStages := []traffic.Stage{
		{Name: "north and south", State: "GGgrrrGGgrrrr"},
		{Name: "east and west", State: "rrrgGgrrrGGgG"},
		{Name: "left turns", State: "rrrrrGrrrrrGr"},
	}
	if !reflect.DeepEqual(a.Stages, wantStages) {
		t.Errorf("stages of alpha: got %v, want %v", a.Stages, wantStages)
	}
	// The program begins in the yellow of the left turns (3 s), so the cycle of
	// the plan begins 3 s later; the phase in which only the crossing loses its
	// green belongs to the intergreen.
	wantPlan := traffic.Plan{Name: "program 0", OffsetMS: 20_000, Steps: []traffic.PlanStep{
		{Stage: 0, DurationMS: 42_000, IntergreenMS: 5_000},
		{Stage: 1, DurationMS: 41_000, IntergreenMS: 8_000},
		{Stage: 2, DurationMS: 9_000, IntergreenMS: 3_000},
	}}
	if !reflect.DeepEqual(a.Plan, wantPlan) {
		t.Errorf("plan of alpha: got %+v, want %+v", a.Plan, wantPlan)
	}
	b := derive(t, s, "beta", Limits{}, SensingDetectors).Junction
	if got, want := b.Plan.OffsetMS, int64(82_000-5_000); got != want {
		t.Errorf("offset of beta: got %d ms, want %d: SUMO's -5 s within a cycle of 82 s", got, want)
	}
	if want := (traffic.Timing{MinGreenMS: 6000, YellowMS: 3000}); a.Timing != want {
		t.Errorf("timing from the map's own plan: got %+v, want %+v", a.Timing, want)
	}
}

func TestPlanIsInPhaseWithItsProgram(t *testing.T) {
	s := cross(t)
	for _, g := range s.net.logics {
		j := derive(t, s, g.id, Limits{}, SensingDetectors).Junction
		for at := time.Duration(0); at < 400*time.Second; at += time.Second {
			show := programState(g, at)
			into := ((at.Milliseconds()-j.Plan.OffsetMS)%j.Plan.CycleMS() + j.Plan.CycleMS()) % j.Plan.CycleMS()
			for _, step := range j.Plan.Steps {
				if into >= step.DurationMS {
					into -= step.DurationMS
					continue
				}
				if green := into < step.DurationMS-step.IntergreenMS; green && show != j.Stages[step.Stage].State {
					t.Fatalf("%s at %s: plan has %s, program shows %s", g.id, at, j.Stages[step.Stage].State, show)
				} else if !green && show == j.Stages[step.Stage].State {
					t.Fatalf("%s at %s: plan is between stages, program shows %s", g.id, at, show)
				}
				break
			}
		}
	}
}

func TestGroupsLanesAndMovements(t *testing.T) {
	j := derive(t, cross(t), "alpha", Limits{}, SensingDetectors).Junction
	if g := j.Groups[12]; g.Kind != traffic.Pedestrians || g.PedClearMS != 6000 {
		t.Errorf("group 12: got %+v, want pedestrians with 6000 ms for 6.4 m", g)
	}
	if g := j.Groups[7]; g.Kind != traffic.Buses {
		t.Errorf("group 7: got %+v, want buses: its lane allows nothing else", g)
	}
	if g := j.Groups[1]; g.Kind != traffic.Vehicles {
		t.Errorf("group 1: got %+v, want vehicles", g)
	}
	if got, want := len(j.Movements), 12; got != want {
		t.Errorf("movements: got %d, want %d (a walk is none)", got, want)
	}
	m := j.Movements[10]
	if want := (traffic.Movement{From: "WA_1", To: "AM_1", Group: 10, SaturationPerHour: 1900}); m != want {
		t.Errorf("movement 10: got %+v, want %+v", m, want)
	}
	if left, through := j.Movements[11].SaturationPerHour, m.SaturationPerHour; left >= through {
		t.Errorf("saturation of a left turn %d, want less than straight on %d", left, through)
	}
	for _, want := range []traffic.Lane{
		{ID: "WA_1", LengthCM: 14280, SpeedCMS: 1389, Capacity: 19, To: "alpha"},
		{ID: "AM_1", LengthCM: 11880, SpeedCMS: 1389, Capacity: 15, From: "alpha", To: "beta", AheadCM: 13760},
		{ID: "BA_1", LengthCM: 14560, SpeedCMS: 1389, Capacity: 19, From: "beta", To: "alpha"},
		{ID: "AW_1", LengthCM: 14280, SpeedCMS: 1389, Capacity: 19, From: "alpha"},
	} {
		if got, ok := j.Lane(want.ID); !ok || got != want {
			t.Errorf("lane: got %+v, want %+v", got, want)
		}
	}
	// Through the widening at M, which no signal holds.
	b := derive(t, cross(t), "beta", Limits{}, SensingDetectors).Junction
	if l, _ := b.Lane("MB_1"); l.From != "alpha" || l.To != "beta" {
		t.Errorf("lane MB_1: from %q to %q, want from alpha to beta", l.From, l.To)
	}
}

func TestConflictsComeFromTheRightOfWay(t *testing.T) {
	s := cross(t)
	d := derive(t, s, "alpha", Limits{}, SensingDetectors)
	j := d.Junction
	crosses := func(a, b int) bool { return slices.Contains(j.Conflicts[a], b) }
	gives := func(a, b int) bool { return slices.Contains(j.Yields[a], b) }
	// 1: north straight on, 4: west-bound straight on, 10: east-bound straight
	// on, 5 and 11: their left turns, 3: right turn over the crossing 12.
	for _, c := range []struct {
		a, b            int
		conflict, yield bool
	}{
		{1, 4, true, false},
		{1, 10, true, false},
		{4, 10, false, false},
		{5, 10, false, true},
		{11, 4, false, true},
		{4, 11, false, false},
		{3, 12, false, true},
		{0, 12, true, false},
		{2, 12, true, false},
		{7, 12, true, false},
		{10, 12, false, false},
	} {
		if crosses(c.a, c.b) != c.conflict || gives(c.a, c.b) != c.yield {
			t.Errorf("groups %d and %d: conflict %v, yields %v; want %v, %v", c.a, c.b, crosses(c.a, c.b), gives(c.a, c.b), c.conflict, c.yield)
		}
	}
	// netconvert takes opposing left turns as crossing, and gives both a
	// protected green all the same.
	if want := [][2]int{{5, 11}}; !reflect.DeepEqual(d.Declared, want) {
		t.Errorf("declared: got %v, want %v", d.Declared, want)
	}
	for a, bs := range j.Conflicts {
		for _, b := range bs {
			for _, st := range j.Stages {
				if st.State.At(a).Go() && st.State.At(b).Go() {
					t.Errorf("groups %d and %d conflict and are green in %s", a, b, st.State)
				}
			}
		}
	}
}

func TestConflictsWithoutInternalLanes(t *testing.T) {
	want := derive(t, cross(t), "beta", Limits{}, SensingOracle).Junction
	s := cross(t)
	var err error
	if s.net, err = readNetwork(filepath.Join("testdata", "bare.net.xml")); err != nil {
		t.Fatal(err)
	}
	d := derive(t, s, "beta", Limits{}, SensingOracle)
	if got := d.Junction; !reflect.DeepEqual(got.Conflicts, want.Conflicts) || !reflect.DeepEqual(got.Yields, want.Yields) {
		t.Errorf("conflicts %v, yields %v; with internal lanes %v, %v", got.Conflicts, got.Yields, want.Conflicts, want.Yields)
	}
	if len(d.Warnings) != 0 {
		t.Errorf("warnings: got %q, want none", d.Warnings)
	}
	// Without the rows nothing is known, and that is said.
	for i := range s.net.junctions {
		s.net.junctions[i].requests = s.net.junctions[i].requests[:len(s.net.junctions[i].requests)/2]
	}
	d = derive(t, s, "beta", Limits{}, SensingOracle)
	if !strings.Contains(strings.Join(d.Warnings, "\n"), "its conflicts are unknown") {
		t.Errorf("warnings: got %q, want one that conflicts are unknown", d.Warnings)
	}
	if got, want := d.Junction.Conflicts[0], []int{3, 4, 5}; !reflect.DeepEqual(got, want) {
		t.Errorf("conflicts of group 0: got %v, want %v, all that is never green with it", got, want)
	}
}

func TestCrossingGreensOfTheMapAreDeclared(t *testing.T) {
	s := cross(t)
	// The author of this program lets the left turn 11 and the opposing 4 run
	// protected at once.
	for i, g := range s.net.logics {
		for k, p := range g.phases {
			s.net.logics[i].phases[k].state = strings.Replace(p.state, "rrrgGgrrrGGgG", "rrrgGgrrrGGGG", 1)
		}
	}
	d := derive(t, s, "alpha", Limits{}, SensingDetectors)
	if !slices.Contains(d.Declared, [2]int{4, 11}) {
		t.Errorf("declared: got %v, want [4 11] among them", d.Declared)
	}
	if slices.Contains(d.Junction.Conflicts[4], 11) || slices.Contains(d.Junction.Yields[11], 4) {
		t.Error("a declared pair is in Conflicts or Yields as well")
	}
	if len(d.Warnings) == 0 || !strings.Contains(strings.Join(d.Warnings, "\n"), "protected green together") {
		t.Errorf("warnings: got %q, want one about the declared pair", d.Warnings)
	}
}

func TestLimitsGiveWayToTheMapsOwnPlan(t *testing.T) {
	d := derive(t, cross(t), "alpha", Limits{MinGreenMS: 7000, YellowMS: 4000, AllRedMS: 1000, MaxRedMS: 60_000}, SensingDetectors)
	j := d.Junction
	// 6 s is what the plan gives the left turns. The longest red in it is the
	// crossing's, 59 s of 92.
	if want := (traffic.Timing{MinGreenMS: 6000, YellowMS: 4000, AllRedMS: 1000, MaxRedMS: 60_000}); j.Timing != want {
		t.Errorf("timing: got %+v, want %+v", j.Timing, want)
	}
	if g := j.Groups[1]; g.MinGreenMS != 7000 {
		t.Errorf("group 1 has 37 s in the plan and a minimum of %d ms, want 7000", g.MinGreenMS)
	}
	if !strings.Contains(strings.Join(d.Warnings, "\n"), "minimum green is 6000 ms instead of 7000 ms") {
		t.Errorf("warnings: got %q, want one about the minimum green", d.Warnings)
	}
	d = derive(t, cross(t), "alpha", Limits{MinGreenMS: 7000, YellowMS: 4000, MaxRedMS: 30_000}, SensingDetectors)
	if got, want := d.Junction.Timing.MaxRedMS, int64(59_000); got != want {
		t.Errorf("maximum red: got %d ms, want %d, the longest in the plan", got, want)
	}
}

func TestDetectorsArePlaced(t *testing.T) {
	s := cross(t)
	b := derive(t, s, "beta", Limits{}, SensingDetectors).Junction
	// MB_1 and MB_2 are 18.8 m long and both come out of AM_1: the loop and the
	// area upstream lie there and tell of both movements. AM_1 begins behind
	// 8.4 m of internal lane.
	for _, want := range []traffic.Detector{
		{ID: "stop:MB_1", Kind: traffic.StopLine, Lane: "MB_1", LengthCM: 200, Movements: []int{4}, Group: -1},
		{ID: "area:MB_1", Kind: traffic.Area, Lane: "MB_1", LengthCM: 1880, Movements: []int{4}, Group: -1},
		{ID: "advance:AM_1", Kind: traffic.Advance, Lane: "AM_1", FromStopLineCM: 5000, LengthCM: 200, Movements: []int{4, 5}, Group: -1},
		{ID: "area:AM_1", Kind: traffic.Area, Lane: "AM_1", FromStopLineCM: 2720, LengthCM: 7280, Movements: []int{4, 5}, Group: -1},
		{ID: "advance:EB_1", Kind: traffic.Advance, Lane: "EB_1", FromStopLineCM: 5000, LengthCM: 200, Movements: []int{2, 3}, Group: -1},
		{ID: "exit:BE_1", Kind: traffic.ExitArea, Lane: "BE_1", LengthCM: 10000, Movements: []int{1, 4}, Group: -1},
	} {
		if got, ok := b.Detector(want.ID); !ok || !reflect.DeepEqual(got, want) {
			t.Errorf("detector %s: got %+v, want %+v", want.ID, got, want)
		}
	}
	if _, ok := b.Detector("advance:MB_1"); ok {
		t.Error("MB_1 has an upstream loop of its own, want it on AM_1 only")
	}
	o := derive(t, s, "beta", Limits{}, SensingOracle).Junction
	for i, d := range o.Detectors {
		if i < len(o.Movements) && (d.Kind != traffic.Oracle || !reflect.DeepEqual(d.Movements, []int{i})) {
			t.Errorf("detector %d: got %+v, want the oracle of movement %d", i, d, i)
		}
		if i >= len(o.Movements) && d.Kind != traffic.ExitArea && d.Kind != traffic.Box {
			t.Errorf("detector %d: got %s, want exit areas and boxes after the oracles", i, d.Kind)
		}
	}
}

func TestPlace(t *testing.T) {
	near := func(got, want float64) bool { return math.Abs(got-want) < 2e-7 }
	for _, c := range []struct {
		name     string
		l        location
		p        point
		lat, lon float64
	}{
		{"central meridian at the equator", location{0, 0, "+proj=utm +zone=32"}, point{500_000, 0}, 0, 9},
		// Snyder, Map Projections (USGS 1395), has the meridian's length; on
		// WGS 84 the distance from the equator to 45° N is 4 984 944.378 m.
		{"45 degrees north", location{0, 0, "+proj=utm +zone=32"}, point{500_000, 4_984_944.378 * 0.9996}, 45, 9},
		{"45 degrees south", location{0, 0, "+proj=utm +zone=32 +south"}, point{500_000, 10_000_000 - 4_984_944.378*0.9996}, -45, 9},
		{"offset", location{-500_000, -4_982_950.4, "+proj=utm +zone=33"}, point{0, 0}, 45, 15},
		{"degrees", location{0, 0, "+proj=longlat +datum=WGS84"}, point{11.5, 48.25}, 48.25, 11.5},
		{"nowhere", location{0, 0, ""}, point{111_320, 222_640}, 2, 1},
		{"unknown projection", location{5, 5, "+proj=merc"}, point{111_320, 0}, 0, 1},
	} {
		if lat, lon := c.l.place(c.p); !near(lat, c.lat) || !near(lon, c.lon) {
			t.Errorf("%s: got %.7f %.7f, want %.7f %.7f", c.name, lat, lon, c.lat, c.lon)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("dark.net.xml", `<net version="1.9"><edge id="a"><lane id="a_0" index="0" speed="10" length="50" shape="0,0 50,0"/></edge></net>`)
	write("broken.net.xml", `<net><edge id="a"><lane id="a_0" index="0" speed="10" length="fifty"/></edge></net>`)
	write("cut.net.xml", `<net><edge id="a">`)
	write("routes.rou.xml", `<routes/>`)
	write("nan.net.xml", `<net><edge id="a"><lane id="a_0" index="0" speed="10" length="NaN"/></edge></net>`)
	write("letters.net.xml", `<net><tlLogic id="x" offset="0"><phase duration="5" state="Gr"/><phase duration="5" state="G"/></tlLogic></net>`)
	cfg := func(name, net string) string {
		return write(name, `<configuration><input><net-file value="`+net+`"/></input></configuration>`)
	}
	for _, c := range []struct {
		path string
		kind kind.Kind
		want []string
	}{
		{filepath.Join(dir, "absent.sumocfg"), kind.NotFound, []string{"absent.sumocfg", "does not exist"}},
		{dir, kind.Invalid, []string{"is a folder"}},
		{write("empty.sumocfg", ""), kind.Invalid, []string{"empty.sumocfg", "no element"}},
		{write("text.sumocfg", "hello"), kind.Invalid, []string{"text.sumocfg"}},
		{write("routes.sumocfg", "<routes/>"), kind.Invalid, []string{"is not a SUMO configuration", "<routes>"}},
		{write("nonet.sumocfg", "<configuration><input/></configuration>"), kind.Invalid, []string{"nonet.sumocfg", "<net-file>"}},
		{cfg("gone.sumocfg", "gone.net.xml"), kind.NotFound, []string{"gone.net.xml", "does not exist"}},
		{cfg("dark.sumocfg", "dark.net.xml"), kind.Invalid, []string{"dark.net.xml", "has no traffic lights (tlLogic)"}},
		{cfg("broken.sumocfg", "broken.net.xml"), kind.Invalid, []string{"broken.net.xml", `<edge id="a">`, "fifty"}},
		{cfg("cut.sumocfg", "cut.net.xml"), kind.Invalid, []string{"cut.net.xml", `<edge id="a">`, "unexpected EOF"}},
		{cfg("nan.sumocfg", "nan.net.xml"), kind.Invalid, []string{"nan.net.xml", `<lane id="a_0">`, "length"}},
		{cfg("letters.sumocfg", "letters.net.xml"), kind.Invalid, []string{`<tlLogic id="x">`, "<phase> 1", "letters"}},
		{cfg("notnet.sumocfg", "routes.rou.xml"), kind.Invalid, []string{"routes.rou.xml", "<routes>, want <net>"}},
		{write("time.sumocfg", `<configuration><input><net-file value="dark.net.xml"/></input><time><begin value="soon"/></time></configuration>`),
			kind.Invalid, []string{"<begin>", "soon"}},
		{write("back.sumocfg", `<configuration><input><net-file value="dark.net.xml"/></input><time><begin value="50"/><end value="20"/></time></configuration>`),
			kind.Invalid, []string{"<end>", "later than begin"}},
		{write("noroute.sumocfg", `<configuration><input><net-file value="dark.net.xml"/><route-files value="a.rou.xml"/></input></configuration>`),
			kind.NotFound, []string{"a.rou.xml", "noroute.sumocfg"}},
	} {
		_, err := Load(c.path)
		if err == nil {
			t.Errorf("%s: loaded, want an error", filepath.Base(c.path))
			continue
		}
		if got := kind.Of(err); got != c.kind {
			t.Errorf("%s: error %q is %s, want %s", filepath.Base(c.path), err, got, c.kind)
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got error %q, want %q in it", filepath.Base(c.path), err, want)
			}
		}
	}
}

func TestDeriveRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(*logic)
		want   string
	}{
		{"no stage", func(g *logic) {
			for i := range g.phases {
				g.phases[i].state = strings.Repeat("r", 13)
			}
		}, "no stage to show"},
		{"no phases", func(g *logic) { g.phases = nil }, "no phases"},
		{"short states", func(g *logic) {
			for i := range g.phases {
				g.phases[i].state = g.phases[i].state[:4]
			}
		}, "beyond the 4 letters"},
		{"foreign letter", func(g *logic) { g.phases[1].state = "GGgrrrGGgrrrX" }, "'X'"},
	} {
		s := cross(t)
		c.damage(&s.net.logics[0])
		_, err := s.Derive(Limits{}, SensingDetectors)
		if err == nil || kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), `<tlLogic id="alpha">`) {
			t.Errorf("%s: got %v, want an invalid tlLogic alpha and %q", c.name, err, c.want)
		}
	}
	if _, err := cross(t).Derive(Limits{}, "guesses"); err == nil || !strings.Contains(err.Error(), `sensing "guesses"`) {
		t.Errorf("got %v, want the sensing refused by name", err)
	}
	if _, err := cross(t).Derive(Limits{YellowMS: -1}, SensingOracle); err == nil || kind.Of(err) != kind.Invalid {
		t.Errorf("got %v, want negative limits refused", err)
	}
}

func TestLoadGzipAndTextOptions(t *testing.T) {
	dir := t.TempDir()
	plain, err := os.ReadFile(filepath.Join("testdata", "cross.net.xml"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "cross.net.xml.gz"))
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	if _, err := z.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a.sumocfg")
	text := `<configuration><input><net-file value="cross.net.xml.gz"/><additional-files value="plans.add.xml"/></input>
		<time><begin v="0:10:00"/><end value="1:00:00:00"/><step-length value="0.5"/></time></configuration>`
	plans := `<additional><tlLogic id="beta" type="static" programID="night" offset="4">
		<phase duration="20" state="rrGGGg"/><phase duration="3" state="rryyyy"/><phase duration="20" state="GGGrrr"/><phase duration="3" state="yyyrrr"/>
		</tlLogic><vType id="x"/></additional>`
	for name, text := range map[string]string{path: text, filepath.Join(dir, "plans.add.xml"): plans} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if s.Begin != 10*time.Minute || s.End != 24*time.Hour || s.StepLength != 500*time.Millisecond {
		t.Errorf("got begin %s, end %s, step %s; want 10m, 24h, 500ms", s.Begin, s.End, s.StepLength)
	}
	j := derive(t, s, "beta", Limits{}, SensingDetectors).Junction
	if j.Plan.Name != "program night" || j.Plan.CycleMS() != 46_000 || j.Plan.OffsetMS != 4000 {
		t.Errorf("plan of beta: got %+v, want the additional file's, which comes last", j.Plan)
	}
}
