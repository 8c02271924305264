package traci

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// open starts a world that the test closes.
func open(t testing.TB, s *Scenario, o Options) *World {
	t.Helper()
	w, err := Open(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// programState is what the map's own program shows at a time: SUMO's rule.
func programState(g logic, at time.Duration) traffic.State {
	var cycle time.Duration
	for _, p := range g.phases {
		cycle += p.duration
	}
	in := ((at-g.offset)%cycle + cycle) % cycle
	for _, p := range g.phases {
		if in < p.duration {
			return traffic.State(p.state)
		}
		in -= p.duration
	}
	return ""
}

func TestProgramShownByTimeEqualsBaseline(t *testing.T) {
	needSUMO(t)
	s := sharedScenario(t, "ingolstadt1")
	const steps = 600
	w := open(t, s, Options{Seed: 3, Sensing: SensingOracle})
	program := map[traffic.JunctionID]logic{}
	for _, g := range s.net.logics {
		program[traffic.JunctionID(g.id)] = g
	}
	for range steps {
		for _, j := range w.Junctions() {
			d, err := w.Driver(j.ID)
			if err != nil {
				t.Fatal(err)
			}
			want := programState(program[j.ID], time.Duration(w.Now().UnixMilli())*time.Millisecond)
			if err := d.Show(want); err != nil {
				t.Fatal(err)
			}
		}
		more, err := w.Step()
		if err != nil || !more {
			t.Fatalf("step at %s: more %v, %v", w.Now(), more, err)
		}
		for i, j := range w.Junctions() {
			d := &Driver{w, i}
			got, err := d.Observed()
			if err != nil {
				t.Fatal(err)
			}
			want := programState(program[j.ID], time.Duration(w.Now().UnixMilli())*time.Millisecond-s.StepLength)
			if got != want {
				t.Fatalf("%s: lamps of %s show %q, want %q", w.Now(), j.ID, got, want)
			}
		}
	}
	got, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	want, err := s.alone(t.Context(), 3, s.Begin+steps*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("driven %+v, alone %+v", got, want)
	if got.Trips != want.Trips || math.Abs(got.DelayS-want.DelayS) > 0.02*want.DelayS {
		t.Errorf("driven by its own program: %+v\nSUMO alone:                %+v\nwant the same trips and delays within 2 %%", got, want)
	}
}

func TestWorldRunsToItsEnd(t *testing.T) {
	needSUMO(t)
	s := cross(t)
	w := open(t, s, Options{Seed: 1})
	if got, want := w.Now(), time.Unix(100, 0).UTC(); !got.Equal(want) {
		t.Errorf("begins at %s, want %s", got, want)
	}
	if w.StepLength() != time.Second || !strings.Contains(w.Version(), "SUMO") {
		t.Errorf("step %s of %q, want 1 s of SUMO", w.StepLength(), w.Version())
	}
	priority := map[traffic.Priority]bool{}
	steps := 0
	for more := true; more; steps++ {
		var err error
		if more, err = w.Step(); err != nil {
			t.Fatal(err)
		}
		for i := range w.derived {
			rs, err := (&Driver{w, i}).Sense()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rs {
				priority[r.Priority] = true
			}
		}
	}
	if steps != 900 || w.Now().Unix() != 1000 {
		t.Errorf("%d steps until %s, want 900 until second 1000", steps, w.Now())
	}
	if more, err := w.Step(); more || err != nil || w.Now().Unix() != 1000 {
		t.Errorf("a step beyond the end: more %v, %v, now %s; want nothing", more, err, w.Now())
	}
	if !priority[traffic.Bus] || !priority[traffic.Emergency] {
		t.Errorf("priorities seen: %v, want buses and an ambulance", priority)
	}
	got, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	want, err := Baseline(t.Context(), s, 1)
	if err != nil {
		t.Fatal(err)
	}
	if got.WallS <= 0 || want.WallS <= 0 {
		t.Errorf("wall %g s and %g s, want more than none", got.WallS, want.WallS)
	}
	got.WallS, want.WallS = 0, 0
	if got != want || got.Trips == 0 {
		t.Errorf("without a Show: got %+v, want %+v as under the map's own programs", got, want)
	}
	if _, err := w.Finish(); kind.Of(err) != kind.Conflict {
		t.Errorf("second Finish: got %v, want a Conflict", err)
	}
}

// SUMO's own clock, offsets and cycles against ours, at a begin that is no
// multiple of a cycle.
func TestProgramsRunWhereTheirPlansSay(t *testing.T) {
	needSUMO(t)
	s := cross(t)
	w := open(t, s, Options{})
	for range 200 {
		at := time.Duration(w.Now().Unix()) * time.Second
		if _, err := w.Step(); err != nil {
			t.Fatal(err)
		}
		for i, g := range s.net.logics {
			if got, want := w.observed[i], string(programState(g, at)); got != want {
				t.Fatalf("%s at %s: SUMO shows %s, want %s", g.id, at, got, want)
			}
		}
	}
}

func TestShowAndObserved(t *testing.T) {
	needSUMO(t)
	w := open(t, cross(t), Options{})
	a, err := w.Driver("alpha")
	if err != nil {
		t.Fatal(err)
	}
	before := w.Now()
	for _, s := range []traffic.State{"GGgrrrGGgrrrr", "yyyurrGGgrrrc", "xxxxxxxxxxxxx", "OOOOOOOOOOOOO", "rrrrrrrrrrrrr"} {
		if err := a.Show(s); err != nil {
			t.Fatal(err)
		}
		for range 2 { // it stays without being shown again
			if _, err := w.Step(); err != nil {
				t.Fatal(err)
			}
			if got, err := a.Observed(); err != nil || got != s {
				t.Errorf("shown %s, observed %s, %v", s, got, err)
			}
		}
	}
	if got, want := w.Now().Sub(before), 10*time.Second; got != want {
		t.Errorf("ten steps took %s, want %s", got, want)
	}
	for _, c := range []struct {
		state traffic.State
		want  string
	}{{"GG", `junction alpha: state "GG" has 2 aspects, must have 13`}, {"GGgrrrGGgrrr?", `group 12 has aspect "?"`}} {
		if err := a.Show(c.state); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want an invalid state: %s", err, c.want)
		}
	}
	if _, err := w.Driver("gamma"); kind.Of(err) != kind.NotFound || !strings.Contains(err.Error(), `"gamma"`) {
		t.Errorf("got %v, want gamma not found", err)
	}
}

func TestAspectsOfForeignLetters(t *testing.T) {
	if got, want := aspects("rygGuOYos?", ""), traffic.State("rygGuOygxO"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// Only where SUMO shows what was sent does what was sent decide.
	if got, want := aspects("rrsG", "crxx"), traffic.State("crxG"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestTwoRunsAreTheSame(t *testing.T) {
	needSUMO(t)
	run := func() string {
		var b strings.Builder
		w := open(t, cross(t), Options{Seed: 9})
		for range 200 {
			if _, err := w.Step(); err != nil {
				t.Fatal(err)
			}
			for i := range w.derived {
				rs, err := (&Driver{w, i}).Sense()
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintln(&b, rs)
			}
		}
		return b.String()
	}
	if first, second := run(), run(); first != second {
		t.Error("the same scenario and seed gave other readings")
	}
}

func TestErrorsOfSUMOAreItsOwnWords(t *testing.T) {
	needSUMO(t)
	dir := t.TempDir()
	net, err := os.ReadFile(filepath.Join("testdata", "cross.net.xml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"cross.net.xml": string(net),
		"a.rou.xml":     `<routes><trip id="lost" depart="1" from="nowhere" to="AN"/></routes>`,
		"a.sumocfg":     `<configuration><input><net-file value="cross.net.xml"/><route-files value="a.rou.xml"/></input></configuration>`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Load(filepath.Join(dir, "a.sumocfg"))
	if err != nil {
		t.Fatal(err)
	}
	w, err := Open(t.Context(), s, Options{})
	for more := true; err == nil && more; {
		more, err = w.Step()
	}
	if w != nil {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("got %v, want SUMO's words about the edge that is not known", err)
	}
	if _, err := s.alone(t.Context(), 1, 10*time.Second); err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("baseline: got %v, want SUMO's words", err)
	}
}

func TestWorldWhoseSUMODies(t *testing.T) {
	needSUMO(t)
	w := open(t, cross(t), Options{})
	if _, err := w.Step(); err != nil {
		t.Fatal(err)
	}
	if err := w.client.proc.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, err := w.Step()
	if err == nil || !strings.Contains(err.Error(), "sumo has ended (signal: killed)") {
		t.Errorf("got %v, want how SUMO ended", err)
	}
	if _, again := w.Step(); again == nil || again.Error() != err.Error() {
		t.Errorf("second step: got %v, want %v again", again, err)
	}
	if _, err := w.Finish(); err == nil {
		t.Error("a dead world was finished")
	}
}

func TestWorldEndsWithItsContext(t *testing.T) {
	needSUMO(t)
	ctx, cancel := context.WithCancel(t.Context())
	w, err := Open(ctx, cross(t), Options{})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	cancel()
	<-w.client.proc.exited // fails the test by its deadline where the process stays
	if _, err := w.Step(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's end", err)
	}
	temp := w.temp
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(temp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder of tripinfo: %v, want it gone", err)
	}
}

func TestCloseEndsTheProcess(t *testing.T) {
	needSUMO(t)
	w := open(t, cross(t), Options{Tripinfo: filepath.Join(t.TempDir(), "trips.xml")})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-w.client.proc.exited:
	default:
		t.Error("sumo runs on after Close")
	}
	if err := w.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	d, err := w.Driver("alpha")
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{"Show": d.Show("GGgrrrGGgrrrr"), "Step": second(w.Step()), "Sense": second(d.Sense()), "Observed": second(d.Observed())} {
		if kind.Of(err) != kind.Conflict {
			t.Errorf("%s after Close: got %v, want a Conflict", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestSUMORefusesByName(t *testing.T) {
	needSUMO(t)
	w := open(t, cross(t), Options{})
	// What Show cannot let through, sent past it.
	w.derived[0].Junction.ID = "gone"
	w.want[0] = "GGgrrrGGgrrrr"
	_, err := w.Step()
	var refused *CommandError
	if !errors.As(err, &refused) || refused.Command != cmdSetLight || !strings.Contains(err.Error(), "set traffic light") || !strings.Contains(refused.Text, "gone") {
		t.Errorf("got %v, want SUMO's refusal of the command by name", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	s := cross(t)
	for _, c := range []struct {
		o    Options
		kind kind.Kind
		want []string
	}{
		{Options{Seed: -1, Sensing: "psychic", Limits: Limits{YellowMS: -1}, StartTimeout: -1}, kind.Invalid, []string{"seed -1", `sensing "psychic"`, "limits", "start timeout"}},
		{Options{Program: "no-such-sumo"}, kind.NotFound, []string{"no-such-sumo"}},
	} {
		_, err := Open(t.Context(), s, c.o)
		if err == nil || kind.Of(err) != c.kind {
			t.Errorf("%+v: got %v of kind %s, want %s", c.o, err, kind.Of(err), c.kind)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
		}
	}
}

// Drivers of different junctions may be used at once between steps; the race
// detector looks on.
func TestDriversMayBeUsedAtOnce(t *testing.T) {
	needSUMO(t)
	w := open(t, cross(t), Options{})
	for range 5 {
		var wait sync.WaitGroup
		for _, j := range w.Junctions() {
			wait.Go(func() {
				d, err := w.Driver(j.ID)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := d.Sense(); err != nil {
					t.Error(err)
				}
				if err := d.Show(j.Stages[0].State); err != nil {
					t.Error(err)
				}
				if _, err := d.Observed(); err != nil {
					t.Error(err)
				}
				w.Now()
			})
		}
		wait.Wait()
		if _, err := w.Step(); err != nil {
			t.Fatal(err)
		}
	}
}

// A step of a map in its hour, with all junctions sensed, under the map's own
// programs. Most of it is SUMO's own work.
func BenchmarkStep(b *testing.B) {
	needSUMO(b)
	for _, name := range []string{"ingolstadt1", "ingolstadt7"} {
		for _, sensing := range []Sensing{SensingDetectors, SensingOracle} {
			b.Run(fmt.Sprintf("map=%s/sensing=%s", name, sensing), func(b *testing.B) {
				s := sharedScenario(b, name)
				s.End = -1 // for as many steps as are asked for
				w := open(b, s, Options{Sensing: sensing})
				for range 900 { // until the streets have filled
					if _, err := w.Step(); err != nil {
						b.Fatal(err)
					}
				}
				for b.Loop() {
					for i := range w.derived {
						if _, err := (&Driver{w, i}).Sense(); err != nil {
							b.Fatal(err)
						}
					}
					if _, err := w.Step(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
