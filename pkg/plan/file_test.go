package plan_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/plan"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// crossing is the junction of testdata/eight.yaml as it is filed.
func crossing(t testing.TB) *traffic.Junction {
	t.Helper()
	j := &traffic.Junction{ID: "crossing", Timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000}}
	for _, n := range []string{"NL", "S", "WL", "E", "SL", "N", "EL", "W"} {
		j.Groups = append(j.Groups, traffic.Group{Name: n, Kind: traffic.Vehicles})
	}
	j.Groups = append(j.Groups, traffic.Group{Name: "across W", Kind: traffic.Pedestrians, PedClearMS: 9000})
	j.Conflicts = make([][]int, 9)
	meet := func(a, b int) {
		j.Conflicts[a] = append(j.Conflicts[a], b)
		j.Conflicts[b] = append(j.Conflicts[b], a)
	}
	for a := range 8 {
		for b := a + 1; b < 8; b++ {
			if a/4 == b/4 || (a%4 < 2) != (b%4 < 2) {
				meet(a, b)
			}
		}
	}
	for _, g := range []int{2, 3, 6, 7} {
		meet(8, g) // crosses the western arm
	}
	for i, s := range []traffic.State{"GrrrGrrrr", "rGrrrGrrG", "rrGrrrGrr", "rrrGrrrGr"} {
		j.Stages = append(j.Stages, traffic.Stage{Name: string(rune('A' + i)), State: s})
		ig := int64(4000)
		if i == 1 {
			ig = 10000
		}
		j.Plan.Steps = append(j.Plan.Steps, traffic.PlanStep{Stage: i, DurationMS: 22_000, IntergreenMS: ig})
	}
	j.Plan.Name = "filed"
	if err := j.Check(); err != nil {
		t.Fatal(err)
	}
	return j
}

func eight(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/eight.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func parse(t testing.TB, text string) *plan.File {
	t.Helper()
	f, err := plan.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestUnsafeFilesAreRefused changes one thing after the other in a good file, and
// wants the line and the rule.
func TestUnsafeFilesAreRefused(t *testing.T) {
	good := eight(t)
	if err := parse(t, good).Against(crossing(t)); err != nil {
		t.Fatalf("the good file: %v", err)
	}
	for _, c := range []struct{ name, old, new, want string }{
		{"unknown key", "    walk: 7\n", "    walks: 7\n", "line 14: phases[1].walks: is unknown here; known are phase, name, groups"},
		{"unknown top key", "version: 1\n", "version: 1\nauthor: me\n", "line 3: author: is unknown here"},
		{"key twice", "    cycle: 90\n", "    cycle: 90\n    cycle: 91\n", "line 28: plans[0].cycle: is given twice"},
		{"missing", "junction: crossing\n", "", "line 2: junction: must be given"},
		{"version", "version: 1\n", "version: 2\n", "line 2: version: 2: must be 1"},
		{"not a number", "cycle: 90", "cycle: 9e1", `line 27: plans[0].cycle: "9e1": must be seconds`},
		{"four decimals", "offset: 12.5", "offset: 12.5001", `line 28: plans[0].offset: "12.5001": must be seconds`},
		{"negative", "offset: 12.5", "offset: -1", `line 28: plans[0].offset: "-1": must be seconds`},
		{"alias", "name: Quay Road / Ferry Street", "name: &a x", "line 4: name: anchors and aliases are not allowed"},
		{"two documents", "version: 1\n", "version: 1\n---\nversion: 1\n", "there must be one document"},
		{"not YAML", "rings:\n", "rings: [\n", "file: is not YAML"},

		{"conflict in a phase", "groups: [S, across W]", "groups: [S, across W, W]", `line 10: phases[1].groups: "S" and "W" conflict`},
		{"conflict over rings", "groups: [SL]", "groups: [E]", `line 24: rings[1][0]: phases 1 and 5 of both rings may be green together: "NL" and "E" conflict`},
		{"phase in both rings", "[[5, 6], [7, 8]]", "[[5, 2], [7, 8]]", "line 24: rings[1][0]: phase 2 is in rings[0][0] already"},
		{"phase in no ring", "[[5, 6], [7, 8]]", "[[5], [7, 8]]", "line 19: phases[5]: phase 6 is in no ring"},
		{"unknown phase", "[[5, 6], [7, 8]]", "[[5, 6], [7, 9]]", "line 24: rings[1][1]: there is no phase 9"},
		{"barriers", "[[5, 6], [7, 8]]", "[[5, 6, 7, 8]]", "line 24: rings[1]: barrier mismatch: 1 sections, ring 0 has 2"},

		{"minimum green", "groups: [NL], min_green: 5", "groups: [NL], min_green: 4.9", `line 7: phases[0].min_green: 4.9 s: junction crossing asks for 5 s for "NL"`},
		{"yellow", "groups: [WL], min_green: 5, yellow: 3", "groups: [WL], min_green: 5, yellow: 2.999", `line 16: phases[2].yellow: 2.999 s: junction crossing asks for 3 s for "WL"`},
		{"all-red", "groups: [E], min_green: 7, yellow: 3, all_red: 1.5", "groups: [E], min_green: 7, yellow: 3, all_red: 0.5", `line 17: phases[3].all_red: 0.5 s: junction crossing asks for 1 s for "E"`},
		{"pedestrian clearance", "ped_clear: 9", "ped_clear: 8.5", `line 15: phases[1].ped_clear: 8.5 s: junction crossing asks for 9 s for "across W"`},
		{"no pedestrian clearance", "    ped_clear: 9\n", "", `line 8: phases[1].ped_clear: 0 s: junction crossing asks for 9 s for "across W"`},
		{"walk", "walk: 7", "walk: 4", `line 14: phases[1].walk: 4 s: junction crossing asks for 5 s for "across W"`},
		{"group unknown", "groups: [N]", "groups: [North]", `line 19: phases[5].groups: "North" is no group of junction crossing`},
		{"group never served", "groups: [S, across W]", "groups: [S]", `phases: group "across W" has no phase`},
		{"another junction", "junction: crossing", "junction: other", `line 3: junction: "other": the definition is of "crossing"`},

		{"splits and cycle", "cycle: 90", "cycle: 91", "line 29: plans[0].splits: ring 0 sums to 90 s, the cycle is 91 s"},
		{"barrier in splits", "5: 15, 6: 35, 7: 15, 8: 25", "5: 15, 6: 34, 7: 16, 8: 25", "line 29: plans[0].splits: barrier mismatch: section 0 of ring 1 lasts 49 s, of ring 0 50 s"},
		{"split below minimum", "splits: {1: 15, 2: 35, 3: 15", "splits: {1: 9.4, 2: 40.6, 3: 15", "line 29: plans[0].splits.1: 9.4 s: less than minimum green, yellow and all-red, 9.5 s"},
		{"split below walk", "splits: {1: 15, 2: 35, 3: 15, 4: 25, 5: 15, 6: 35", "splits: {1: 33, 2: 17, 3: 15, 4: 25, 5: 33, 6: 17", "line 29: plans[0].splits.2: 17 s: less than walk, pedestrian clearance and all-red, 17.5 s"},
		{"split missing", "7: 15, 8: 25}", "7: 40}", "line 29: plans[0].splits: phase 8 has none"},
		{"split of nothing", "{1: 15, 2: 35, 3", "{9: 1, 1: 15, 2: 35, 3", "line 29: plans[0].splits.9: there is no phase 9"},
		{"split twice", "{1: 15, 2: 35, 3", "{1: 15, 1: 15, 2: 35, 3", "line 29: plans[0].splits.1: is given twice"},
		{"offset", "offset: 12.5", "offset: 90", "line 28: plans[0].offset: 90 s: must be 0 or more, and less than the cycle of 90 s"},
		{"rings too close", "5: 30, 6: 40", "5: 20, 6: 50", "line 33: plans[1].splits: phases [2 5] are together from second 15 to 20, of which 4.5 s are clearance: less than the minimum green of 5 s is left"},

		{"overlap", `to: "07:00"`, `to: "07:01"`, "line 36: schedule[1]: overlaps with schedule[0] on Monday at 07:00"},
		{"gap", `from: "09:30"`, `from: "09:31"`, "line 35: schedule: gap on Monday from 09:30 to 09:31"},
		{"no weekend", `  - {days: weekend, from: "00:00", to: "24:00", plan: day}`, "", "line 35: schedule: gap on Sunday from 00:00 to 24:00"},
		{"no such plan", "plan: peak}", "plan: evening}", `line 36: schedule[1].plan: there is no plan "evening"`},
		{"no such day", "days: weekend", "days: [sat, Sunday]", `line 38: schedule[3].days[1]: "Sunday": must be one of sun, mon`},
		{"no such time", `to: "24:00", plan: day}` + "\n  - {days: weekend", `to: "24:01", plan: day}` + "\n  - {days: weekend", `line 37: schedule[2].to: "24:01": must be a time of day`},
		{"empty period", `from: "07:00", to: "09:30"`, `from: "09:30", to: "07:00"`, "line 36: schedule[1].from: 09:30 to 07:00: must be within a day"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if strings.Count(good, c.old) != 1 {
				t.Fatalf("%q is %d times in the good file, want once", c.old, strings.Count(good, c.old))
			}
			f, err := plan.Parse([]byte(strings.Replace(good, c.old, c.new, 1)))
			if err == nil {
				err = f.Against(crossing(t))
			}
			var p plan.Problems
			if !errors.As(err, &p) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestProblemsAreToldAllAtOnce(t *testing.T) {
	s := strings.Replace(eight(t), "offset: 12.5", "offset: 90", 1)
	s = strings.Replace(s, "cycle: 120", "cycle: 121", 1)
	s = strings.Replace(s, "plan: peak}", "plan: none}", 1)
	_, err := plan.Parse([]byte(s))
	var p plan.Problems
	if !errors.As(err, &p) || len(p) != 4 || p[0].Line != 28 || p[3].Line != 36 {
		t.Errorf("got %v, want four problems in the order of their lines", err)
	}
}

func TestRoundTrip(t *testing.T) {
	f := parse(t, eight(t))
	text := f.Format()
	again := parse(t, string(text))
	if !bytes.Equal(again.Format(), text) {
		t.Errorf("got\n%s\nwant\n%s", again.Format(), text)
	}
	for _, p := range []string{"day", "peak"} {
		a, err := f.Compile(crossing(t), p)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := again.Compile(crossing(t), p); err != nil || !reflect.DeepEqual(a, b) {
			t.Errorf("%s: compiles to something else after a round trip: %v", p, err)
		}
	}
	if _, err := f.Compile(crossing(t), "night"); kind.Of(err) != kind.NotFound {
		t.Errorf("got %v, want not found", err)
	}
}

func TestCompile(t *testing.T) {
	j := crossing(t)
	f := parse(t, eight(t))
	c, err := f.Compile(j, "peak")
	if err != nil {
		t.Fatal(err)
	}
	want := []traffic.PlanStep{
		{Stage: 0, DurationMS: 15000, IntergreenMS: 4500},  // 1+5, 1 ends
		{Stage: 4, DurationMS: 15000, IntergreenMS: 4500},  // 2+5, 5 ends
		{Stage: 1, DurationMS: 40000, IntergreenMS: 10500}, // 2+6, with pedestrians
		{Stage: 2, DurationMS: 20000, IntergreenMS: 4500},
		{Stage: 3, DurationMS: 30000, IntergreenMS: 4500},
	}
	if !reflect.DeepEqual(c.Plan.Steps, want) {
		t.Errorf("got steps %+v\nwant %+v", c.Plan.Steps, want)
	}
	if got := c.Stages[4].State; got != "rGrrGrrrG" || len(c.Stages) != 5 || len(j.Stages) != 4 {
		t.Errorf("got stages %v", c.Stages)
	}
	if g := c.Groups[1]; g.YellowMS != 3500 || g.AllRedMS != 1500 || g.MinGreenMS != 7000 {
		t.Errorf("got group %+v, want the longer times of its phase", g)
	}
	if g := c.Groups[8]; g.MinGreenMS != 7000 || g.PedClearMS != 9000 {
		t.Errorf("got group %+v, want the walk of its phase", g)
	}
}

// TestPlanRuns lets the fixed controller run a file by its schedule, through the
// sequencer and the interlock, and measures every green.
func TestPlanRuns(t *testing.T) {
	f := parse(t, eight(t))
	zone := time.FixedZone("summer", 2*3600)
	j, ctrl, err := f.Controller(crossing(t), zone)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 23, 6, 50, 0, 0, zone).UTC() // a Monday; at 7:00 the peak's plan begins
	m, err := interlock.New(j, now)
	if err != nil {
		t.Fatal(err)
	}
	seq := timing.NewSequencer(j, timing.Rules{}, now)
	var mem timing.Memory
	greens := map[int]map[int64]int{} // by hour of local time: how often southbound was green for so long
	var since time.Time
	was := false
	for range 30 * 60 * 10 {
		now = now.Add(100 * time.Millisecond)
		v := timing.Observe(j, nil)
		v.Now, v.Signal = now, seq.Signal(now)
		var d timing.Decision
		if mem, d = ctrl.Next(j, timing.Rules{}, mem, v); m.Accept(d.Stage) != nil {
			t.Fatalf("stage %d refused: %v", d.Stage, m.Accept(d.Stage))
		}
		if err := seq.Target(d.Stage); err != nil {
			t.Fatal(err)
		}
		want := seq.Next(now)
		show, trip := m.Filter(now, want)
		if show != want || trip != nil {
			t.Fatalf("the interlock shows %q instead of %q: %v", show, want, trip)
		}
		if is := show.At(1).Go(); is != was {
			if was {
				h := since.In(zone).Hour()
				if greens[h] == nil {
					greens[h] = map[int64]int{}
				}
				greens[h][now.Sub(since).Milliseconds()/1000]++
			}
			since, was = now, is
		}
	}
	// Green of phase 2: its split less yellow and all-red.
	if greens[6][30] < 4 || greens[7][50] < 7 {
		t.Errorf("got greens %v, want 30 s before seven and 50 s from then on", greens)
	}
}

func TestAt(t *testing.T) {
	f := parse(t, eight(t))
	for at, want := range map[string]string{"2026-11-23T06:59:59Z": "day", "2026-11-23T07:00:00Z": "peak", "2026-11-23T09:30:00Z": "day",
		"2026-11-22T08:00:00Z": "day", "2026-11-28T08:00:00Z": "day", "2026-11-27T09:29:59Z": "peak"} {
		tm, err := time.Parse(time.RFC3339, at)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.At(tm); got != want {
			t.Errorf("at %s: got %q, want %q", at, got, want)
		}
	}
}

// TestExport: what is filed, as a file, is the same plan again.
func TestExport(t *testing.T) {
	j := crossing(t)
	j.Plan.OffsetMS = -3000
	f, err := plan.Export(j)
	if err != nil {
		t.Fatal(err)
	}
	again := parse(t, string(f.Format()))
	c, err := again.Compile(j, "filed")
	if err != nil {
		t.Fatal(err)
	}
	j.Plan.OffsetMS = 85_000 // the same place in a cycle of 88 s
	if !reflect.DeepEqual(c, j) {
		t.Errorf("got %+v\nwant %+v", c, j)
	}
	j.Plan.Steps[1].DurationMS = 14_000
	if _, err := plan.Export(j); err == nil || !strings.Contains(err.Error(), "less than walk, pedestrian clearance and all-red") {
		t.Errorf("got %v, want a filed plan with too little for pedestrians refused", err)
	}
}

func TestDiff(t *testing.T) {
	a, b := parse(t, eight(t)), parse(t, eight(t))
	if d := plan.Diff(a, b); len(d) != 0 {
		t.Errorf("got %v, want no difference", d)
	}
	b.Plans[0].Splits[1], b.Plans[0].Splits[2] = 20_000, 30_000
	b.Plans[0].OffsetMS = 0
	b.Phases[0].YellowMS = 4000
	b.Phases[1].Groups = []string{"S"}
	b.Plans = append(b.Plans, plan.Timing{Name: "night", CycleMS: 60_000})
	b.Schedule[1].ToMinute, b.Schedule[2].FromMinute = 600, 600
	b.Rings[1] = plan.Ring{{6, 5}, {7, 8}}
	var got []string
	for _, c := range plan.Diff(a, b) {
		got = append(got, c.String())
	}
	want := []string{
		"phases.1.yellow: 3 → 4",
		`phases.2.groups: [S, across W] → [S]`,
		"rings.1: [[5, 6], [7, 8]] → [[6, 5], [7, 8]]",
		"plans.day.offset: 12.5 → 0",
		"plans.day.splits.1: 15 → 20",
		"plans.day.splits.2: 35 → 30",
		"plans.night: absent → cycle 60 s",
		"schedule.monday: 00:00 day, 07:00 peak, 09:30 day → 00:00 day, 07:00 peak, 10:00 day",
	}
	if len(got) < len(want) {
		t.Fatalf("got %q", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %q, want %q", got[i], want[i])
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(eight(f)))
	f.Add([]byte("version: 1\nphases: [*a]\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("---\n--- x"))
	f.Add([]byte("version: 1\njunction: \"a\\u0085\"\nplans: [{splits: {1: 1, ? [2] : 3}}]"))
	j := crossing(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := plan.Parse(b)
		if err != nil {
			var p plan.Problems
			if !errors.As(err, &p) || p[0].Line < 1 {
				t.Fatalf("got %v, want problems with lines", err)
			}
			return
		}
		text := file.Format()
		again, err := plan.Parse(text)
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, text)
		}
		if !bytes.Equal(again.Format(), text) || len(plan.Diff(file, again)) != 0 {
			t.Fatalf("not stable:\n%s\n%s\n%v", text, again.Format(), plan.Diff(file, again))
		}
		if file.Against(j) != nil {
			return
		}
		for _, p := range file.Plans {
			c, err := file.Compile(j, p.Name)
			if err != nil {
				t.Fatalf("passes every check and does not compile: %v", err)
			}
			if c.Plan.CycleMS() != p.CycleMS {
				t.Fatalf("got a cycle of %d ms, want %d", c.Plan.CycleMS(), p.CycleMS)
			}
			if _, err := interlock.New(c, time.Unix(0, 0)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func ExampleFile_Against() {
	f := &plan.File{Junction: "x", Phases: []plan.Phase{{Number: 1, Groups: []string{"NS", "EW"}, MinGreenMS: 5000, YellowMS: 3000}}}
	j := &traffic.Junction{ID: "x", Groups: []traffic.Group{{Name: "NS", Kind: traffic.Vehicles}, {Name: "EW", Kind: traffic.Vehicles}}, Conflicts: [][]int{{1}, {0}}}
	fmt.Println(f.Against(j))
	// Output: phases[0].groups: "NS" and "EW" conflict
}
