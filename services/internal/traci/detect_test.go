package traci

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// A street is the field of cross's alpha with vehicles that the test moves.
type street struct {
	t    *testing.T
	f    *field
	j    *traffic.Junction
	step uint64
}

func newStreet(t *testing.T, sensing Sensing) *street {
	s := cross(t)
	j := derive(t, s, "alpha", Limits{}, sensing).Junction
	return &street{t: t, f: newField(s.net, []*traffic.Junction{j}), j: j}
}

// place is where a vehicle is after a step.
type place struct {
	lane       string
	pos, speed float64
	ahead      nextSignal
}

// tick moves the named vehicles through one second; others are gone.
func (s *street) tick(to map[string]place) {
	s.t.Helper()
	s.step++
	for id, p := range to {
		lane, ok := s.f.net.lane[p.lane]
		if !ok {
			s.t.Fatalf("no lane %q", p.lane)
		}
		v := s.f.add(id)
		v.seen = s.step
		s.f.move(v, observation{lane, p.pos, p.speed, p.ahead}, 1)
	}
	s.f.end(s.step, 1)
}

// read returns the readings by detector.
func (s *street) read() map[traffic.DetectorID]traffic.Reading {
	out := map[traffic.DetectorID]traffic.Reading{}
	for i, r := range s.f.read(0) {
		if r.Detector != s.j.Detectors[i].ID {
			s.t.Errorf("reading %d is of %s, want %s", i, r.Detector, s.j.Detectors[i].ID)
		}
		out[r.Detector] = r
	}
	return out
}

func (s *street) check(got map[traffic.DetectorID]traffic.Reading, want ...traffic.Reading) {
	s.t.Helper()
	for _, w := range want {
		if !reflect.DeepEqual(got[w.Detector], w) {
			s.t.Errorf("got  %+v\nwant %+v", got[w.Detector], w)
		}
	}
}

func TestLoopsCountAndMeasureOccupancy(t *testing.T) {
	s := newStreet(t, SensingDetectors)
	// WA_1 is 142.8 m; the upstream loop lies from 90.8 to 92.8, the loop at the
	// stop line from 140.8. A vehicle of 5 m that goes 10 m in a second passes
	// the upstream loop and stands over it for 7 of those 10 m.
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 89, speed: 10}})
	s.read()
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 99, speed: 10}})
	s.check(s.read(),
		traffic.Reading{Detector: "advance:WA_1", Count: 1, OccupancyPermille: 700, SpeedCMS: 1000},
		traffic.Reading{Detector: "stop:WA_1"})
	// It comes to stand on the loop at the stop line and stays: from 139.8 to
	// 142.3 it is over the loop for 1.5 of 2.5 m, then all the time.
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 139.8, speed: 2.5}})
	s.read()
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 142.3, speed: 0}})
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 142.3, speed: 0}})
	s.check(s.read(), traffic.Reading{Detector: "stop:WA_1", OccupancyPermille: 800, Vehicles: 1, Halted: 1, HeadWaitMS: 2000})
	// Off over the junction: it passes now, and its rear leaves the loop 5.0 m
	// past the line, having come 0.5 m from there of 10 m: 5.5 of 10.
	s.tick(map[string]place{"a": {lane: ":A_10_0", pos: 9.5, speed: 10}})
	s.check(s.read(), traffic.Reading{Detector: "stop:WA_1", Count: 1, OccupancyPermille: 550, SpeedCMS: 1000})
	// Nothing is counted twice, and an empty loop says nothing.
	s.tick(map[string]place{"a": {lane: "AM_1", pos: 4, speed: 10}})
	s.check(s.read(), traffic.Reading{Detector: "stop:WA_1"}, traffic.Reading{Detector: "stop:WA_2"})
}

func TestLoopsSeeWhatSkipsLanesInOneStep(t *testing.T) {
	s := newStreet(t, SensingDetectors)
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 140, speed: 20}, "b": {lane: "WA_1", pos: 80, speed: 20}})
	s.read()
	// a comes over the internal lane in one step. b changes to the left lane and
	// passes both of that lane's loops within one step.
	s.tick(map[string]place{"a": {lane: "AM_1", pos: 2, speed: 20}, "b": {lane: ":A_11_0", pos: 1, speed: 20}})
	got := s.read()
	for id, want := range map[traffic.DetectorID]uint32{"stop:WA_1": 1, "advance:WA_1": 0, "stop:WA_2": 1, "advance:WA_2": 1} {
		if got[id].Count != want {
			t.Errorf("%s: counted %d, want %d", id, got[id].Count, want)
		}
	}
}

func TestAreasCountVehiclesAndHead(t *testing.T) {
	s := newStreet(t, SensingDetectors)
	s.f.add("bus").priority = traffic.Bus
	now := map[string]place{
		"head": {lane: "WA_1", pos: 142, speed: 0},
		"next": {lane: "WA_1", pos: 134.5, speed: 0.05},
		"bus":  {lane: "WA_1", pos: 100, speed: 8},
		"far":  {lane: "WA_1", pos: 30, speed: 8}, // the area begins at 42.8
		"gone": {lane: "AM_1", pos: 30, speed: 8},
	}
	s.tick(now)
	s.tick(now)
	got := s.read()
	// 3 × 5 m of 100 m are covered.
	s.check(got, traffic.Reading{Detector: "area:WA_1", OccupancyPermille: 150, Vehicles: 3, Halted: 2, HeadWaitMS: 2000, Priority: traffic.Bus},
		traffic.Reading{Detector: "exit:AM_1", OccupancyPermille: 50, Vehicles: 1},
		traffic.Reading{Detector: "area:WA_2"})
	// One that moves has stopped waiting.
	now["head"] = place{lane: "WA_1", pos: 142.5, speed: 0.5}
	s.tick(now)
	if r := s.read()["area:WA_1"]; r.Halted != 1 || r.HeadWaitMS != 0 {
		t.Errorf("got %+v, want one halted and a head that does not wait", r)
	}
	// What SUMO does not tell of any more is gone.
	s.tick(map[string]place{"far": now["far"]})
	s.check(s.read(), traffic.Reading{Detector: "area:WA_1"}, traffic.Reading{Detector: "exit:AM_1"})
	if len(s.f.vehicles) != 1 || len(s.f.byID) != 1 {
		t.Errorf("%d vehicles kept, want 1", len(s.f.vehicles))
	}
}

func TestReadWithoutAStepIsEmptyButPresent(t *testing.T) {
	s := newStreet(t, SensingDetectors)
	s.tick(map[string]place{"a": {lane: "WA_1", pos: 142, speed: 0}})
	s.read()
	s.check(s.read(), traffic.Reading{Detector: "stop:WA_1", OccupancyPermille: 1, Vehicles: 1, Halted: 1, HeadWaitMS: 1000})
}

func TestOracleKnowsTheMovement(t *testing.T) {
	s := newStreet(t, SensingOracle)
	to := func(link int, dist float64) nextSignal { return nextSignal{"alpha", link, dist} }
	s.f.add("amb").priority = traffic.Emergency
	s.tick(map[string]place{
		"amb":  {"WA_1", 142, 0, to(10, 0.8)},
		"next": {"WA_1", 130, 5, to(10, 12.8)},
		"left": {"WA_1", 120, 5, to(11, 22.8)}, // means to change lanes yet
		"far":  {"BA_1", 1, 5, to(4, 201)},
	})
	through, left, west := traffic.DetectorID("oracle:10:WA_1>AM_1"), traffic.DetectorID("oracle:11:WA_2>AN_1"), traffic.DetectorID("oracle:4:BA_1>AW_1")
	s.check(s.read(),
		traffic.Reading{Detector: through, Vehicles: 2, Halted: 1, HeadWaitMS: 1000, Priority: traffic.Emergency,
			Ahead: []traffic.Approach{{DistanceCM: 80}, {DistanceCM: 1280, SpeedCMS: 500}}},
		traffic.Reading{Detector: left, Vehicles: 1, Ahead: []traffic.Approach{{DistanceCM: 2280, SpeedCMS: 500}}},
		traffic.Reading{Detector: west})
	s.tick(map[string]place{
		"amb":  {":A_10_0", 7, 8, nextSignal{"beta", 4, 150}},
		"next": {"WA_1", 138, 5, to(10, 4.8)},
		"left": {"WA_2", 128, 5, to(11, 14.8)},
		"far":  {"BA_1", 6, 5, to(4, 196)},
	})
	s.check(s.read(),
		traffic.Reading{Detector: through, Count: 1, SpeedCMS: 800, Vehicles: 1, Ahead: []traffic.Approach{{DistanceCM: 480, SpeedCMS: 500}}},
		traffic.Reading{Detector: left, Vehicles: 1, Ahead: []traffic.Approach{{DistanceCM: 1480, SpeedCMS: 500}}},
		traffic.Reading{Detector: west, Vehicles: 1, Ahead: []traffic.Approach{{DistanceCM: 19600, SpeedCMS: 500}}},
		traffic.Reading{Detector: "box:10:WA_1>AM_1", Vehicles: 1, OccupancyPermille: 1000, Priority: traffic.Emergency})
	// The last signal of a way counts as well.
	s.tick(map[string]place{"left": {":A_16_0", 3, 6, nextSignal{}}})
	s.check(s.read(), traffic.Reading{Detector: left, Count: 1, SpeedCMS: 600}, traffic.Reading{Detector: through})
}

// totals sums what the detectors of all junctions counted in a run under the
// maps' own programs.
func totals(t *testing.T, s *Scenario, sensing Sensing) (map[traffic.DetectorID]uint32, map[traffic.DetectorID]float64) {
	t.Helper()
	w := open(t, s, Options{Seed: 5, Sensing: sensing})
	counts, occupied := map[traffic.DetectorID]uint32{}, map[traffic.DetectorID]float64{}
	steps := 0.0
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
				counts[r.Detector] += r.Count
				occupied[r.Detector] += float64(r.OccupancyPermille) / 10
			}
		}
	}
	for id := range occupied {
		occupied[id] /= steps
	}
	return counts, occupied
}

func TestOraclesAndLoopsCountTheSameVehicles(t *testing.T) {
	needSUMO(t)
	if testing.Short() {
		t.Skip("compares whole runs")
	}
	s := cross(t)
	loops, _ := totals(t, s, SensingDetectors)
	oracles, _ := totals(t, s, SensingOracle)
	byLane := map[traffic.DetectorID]uint32{}
	total := uint32(0)
	for id, n := range oracles {
		if rest, ok := strings.CutPrefix(string(id), "oracle:"); ok {
			_, way, _ := strings.Cut(rest, ":")
			from, _, _ := strings.Cut(way, ">")
			byLane["stop:"+traffic.DetectorID(from)] += n
			total += n
		}
	}
	for id, want := range byLane {
		if got := loops[id]; math.Abs(float64(got)-float64(want)) > 1 {
			t.Errorf("%s: counted %d, the oracles of its movements %d", id, got, want)
		}
	}
	if total < 300 {
		t.Errorf("the oracles counted %d vehicles, want some hundreds", total)
	}
}

// TestLoopsAgreeWithSUMOsOwn runs SUMO's induction loops and lane-area
// detectors at the places of ours, in the same run, and compares.
func TestLoopsAgreeWithSUMOsOwn(t *testing.T) {
	needSUMO(t)
	if testing.Short() {
		t.Skip("compares whole runs")
	}
	s := cross(t)
	dir := t.TempDir()
	var add strings.Builder
	add.WriteString("<additional>\n")
	type spot struct{ end float64 }
	spots := map[traffic.DetectorID]spot{}
	ds, err := s.Derive(Limits{}, SensingDetectors)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range ds {
		f := newField(s.net, []*traffic.Junction{d.Junction})
		for _, x := range f.sensors[0] {
			switch x.kind {
			case traffic.Advance:
				spots[x.id] = spot{x.b}
				fmt.Fprintf(&add, `<inductionLoop id=%q lane=%q pos="%.2f" freq="900" file="out.xml"/>`+"\n", x.id, s.net.lanes[x.lane].id, x.b)
			case traffic.Area, traffic.ExitArea:
				spots[x.id] = spot{x.b}
				fmt.Fprintf(&add, `<laneAreaDetector id=%q lane=%q pos="%.2f" endPos="%.2f" freq="900" file="out.xml"/>`+"\n", x.id, s.net.lanes[x.lane].id, x.a, x.b)
			}
		}
	}
	add.WriteString("</additional>\n")
	for name, text := range map[string]string{"loops.add.xml": add.String(),
		"run.sumocfg": `<configuration><input><net-file value="cross.net.xml"/><route-files value="cross.rou.xml"/>
			<additional-files value="loops.add.xml"/></input><time><begin value="100"/><end value="1000"/></time></configuration>`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"cross.net.xml", "cross.rou.xml"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = Load(filepath.Join(dir, "run.sumocfg")); err != nil {
		t.Fatal(err)
	}
	counts, occupied := totals(t, s, SensingDetectors)
	// SUMO writes the detectors' files when the interval ends, at the end.
	if _, err := s.alone(t.Context(), 5, s.End+time.Second); err != nil {
		t.Fatal(err)
	}
	seen := 0
	err = readXML(filepath.Join(dir, "out.xml"), func(in io.Reader) error {
		return elements(in, "detector", func(d *xml.Decoder, e xml.StartElement) error {
			id := traffic.DetectorID(attr(e, "id"))
			if _, ok := spots[id]; !ok || attr(e, "begin") != "100.00" {
				return d.Skip()
			}
			seen++
			number := func(name string) float64 {
				v, err := strconv.ParseFloat(attr(e, name), 64)
				if err != nil {
					t.Errorf("%s: %s: %v", id, name, err)
				}
				return v
			}
			if strings.HasPrefix(string(id), "advance:") {
				// SUMO counts when the rear has passed: one may be on it.
				if got, want := float64(counts[id]), number("nVehContrib"); math.Abs(got-want) > 1 {
					t.Errorf("%s: counted %g, SUMO's loop %g", id, got, want)
				}
				// Ours is 2 m long, SUMO's has no length: the share is greater
				// by 2 m of the vehicle's length and 2 m.
				if got, want := occupied[id], number("occupancy"); got < want-0.5 || got > 1.6*want+1 {
					t.Errorf("%s: occupied %.1f %%, SUMO's loop %.1f %%", id, got, want)
				}
			} else if got, want := occupied[id], number("meanOccupancy"); math.Abs(got-want) > 0.05*want+0.5 {
				t.Errorf("%s: occupied %.2f %%, SUMO's area %.2f %%", id, got, want)
			}
			return d.Skip()
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 10 {
		t.Errorf("compared %d detectors, want all %d", seen, len(spots))
	}
}
