package signalcontrol

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// twoInARow are signals A and B; what A lets go eastwards comes to B after 200 m.
func twoInARow() (a, b *traffic.Junction) {
	make := func(id traffic.JunctionID) *traffic.Junction {
		j := &traffic.Junction{ID: id, Name: string(id),
			Groups:    []traffic.Group{{Name: "east", Kind: traffic.Vehicles}, {Name: "north", Kind: traffic.Vehicles}},
			Conflicts: [][]int{{1}, {0}},
			Stages:    []traffic.Stage{{Name: "east", State: "Gr"}, {Name: "north", State: "rG"}},
			Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
			Plan:      traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 30_000, IntergreenMS: 3000}, {Stage: 1, DurationMS: 30_000, IntergreenMS: 3000}}},
		}
		for i, d := range []string{"e", "n"} {
			in, out := traffic.LaneID(string(id)+d+"-in"), traffic.LaneID(string(id)+d+"-out")
			j.Lanes = append(j.Lanes, traffic.Lane{ID: in, LengthCM: 20000, SpeedCMS: 1389, Capacity: 26, To: id},
				traffic.Lane{ID: out, LengthCM: 20000, SpeedCMS: 1389, Capacity: 26, From: id})
			j.Movements = append(j.Movements, traffic.Movement{From: in, To: out, Group: i, SaturationPerHour: 1900})
			j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID("o" + d), Kind: traffic.Oracle, Lane: in, LengthCM: 20000, Movements: []int{i}, Group: -1},
				traffic.Detector{ID: traffic.DetectorID("x" + d), Kind: traffic.ExitArea, Lane: out, LengthCM: 10000, Movements: []int{i}, Group: -1})
		}
		return j
	}
	a, b = make("A"), make("B")
	a.Lanes[1].To, a.Lanes[1].AheadCM = "B", 40000 // by a lane in between
	b.Lanes[0].From = "A"
	return a, b
}

func outflowCore(t *testing.T, isolated bool) *Core {
	t.Helper()
	ctrl, err := timing.Named("adaptive")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := timing.RulesNamed("free")
	if err != nil {
		t.Fatal(err)
	}
	seed := sha256.Sum256([]byte("a key of a test"))
	c, err := NewCore(CoreConfig{District: "d", Key: ed25519.NewKeyFromSeed(seed[:]), Policy: "p", PolicyVersion: "1", Controller: ctrl, Rules: rules, Isolated: isolated})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// outflowFrame shows slow vehicles east and north, under stage 0.
func outflowFrame(j *traffic.Junction, at time.Time, seq uint64, east, north int) *traffic.Frame {
	f := &traffic.Frame{District: "d", Junction: j.ID, Time: at, Interval: time.Second, Signal: traffic.Signal{State: "Gr", Stage: 0, SinceMS: int64(20_000 + 1000*seq)}}
	f.Device, f.BootEpoch, f.Seq = traffic.DeviceID(j.ID), 1, seq
	for _, d := range j.Detectors {
		r := traffic.Reading{Detector: d.ID}
		n := 0
		switch d.ID {
		case "oe":
			n = east
		case "on":
			n = north
		}
		for i := range n {
			r.Ahead = append(r.Ahead, traffic.Approach{DistanceCM: uint32(100 + 750*i), SpeedCMS: 300})
		}
		r.Vehicles = uint32(n)
		f.Readings = append(f.Readings, r)
	}
	return f
}

// Within one Core a junction plans with what its neighbours announced of the
// second before, whatever the order in which the frames of a second come.
func TestOutflowsInOneCore(t *testing.T) {
	a, b := twoInARow()
	defs := map[traffic.JunctionID]*traffic.Junction{"A": a, "B": b}
	find := func(id traffic.JunctionID) (*traffic.Junction, bool) { j, ok := defs[id]; return j, ok }
	start := time.Date(2026, 11, 22, 16, 0, 0, 0, time.UTC)
	run := func(isolated, swapped bool) (heard int, said string) {
		c := outflowCore(t, isolated)
		for s := range 8 {
			at := start.Add(time.Duration(s) * time.Second)
			fs := []*traffic.Frame{outflowFrame(a, at, uint64(s+1), 6, 0), outflowFrame(b, at, uint64(s+1), 0, 2)}
			if swapped {
				slices.Reverse(fs)
			}
			commands, refused := c.Commands(at, 1, fs, find)
			if len(refused) > 0 {
				t.Fatal(refused)
			}
			heard = len(timing.Inflows(b, at.Add(time.Second), c.heard(b)))
			slices.SortFunc(commands, func(x, y traffic.Command) int { return strings.Compare(string(x.Junction), string(y.Junction)) })
			for _, cmd := range commands {
				said += fmt.Sprintf("%s %d %s\n", cmd.Junction, cmd.Stage, cmd.Rule)
			}
		}
		return heard, said
	}
	heard, said := run(false, false)
	if heard == 0 {
		t.Error("B hears of nobody, want the queue that A lets go")
	}
	if _, other := run(false, true); other != said {
		t.Errorf("got other decisions when B's frame comes first:\n%s\nwant\n%s", other, said)
	}
	if heard, _ := run(true, false); heard != 0 {
		t.Errorf("isolated: got %d announced vehicles, want none", heard)
	}
}

// Between two Cores outflows go as messages. When they stop, the second decides
// as if it had never heard any.
func TestOutflowsStop(t *testing.T) {
	a, b := twoInARow()
	start := time.Date(2026, 11, 22, 16, 0, 0, 0, time.UTC)
	only := func(j *traffic.Junction) func(traffic.JunctionID) (*traffic.Junction, bool) {
		return func(id traffic.JunctionID) (*traffic.Junction, bool) { return j, id == j.ID }
	}
	ca, cb, alone := outflowCore(t, false), outflowCore(t, false), outflowCore(t, true)
	for s := range 20 {
		at := start.Add(time.Duration(s) * time.Second)
		ca.Commands(at, 1, []*traffic.Frame{outflowFrame(a, at, uint64(s+1), 6, 0)}, only(a))
		for _, o := range ca.Outflows() {
			raw, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			back, err := parseOutflow(raw)
			if err != nil {
				t.Fatal(err)
			}
			if s < 10 { // then the network is cut
				cb.Hear(back)
			}
		}
		next := at.Add(time.Second)
		heard := len(timing.Inflows(b, next, cb.heard(b)))
		if s < 10 && heard == 0 {
			t.Fatalf("second %d: B hears of nobody", s)
		}
		if s > 13 && heard != 0 {
			t.Fatalf("second %d: B still plans with %d vehicles, three seconds after the last word", s, heard)
		}
		got, _ := cb.Commands(next, 1, []*traffic.Frame{outflowFrame(b, next, uint64(s+1), 0, 0)}, only(b))
		want, _ := alone.Commands(next, 1, []*traffic.Frame{outflowFrame(b, next, uint64(s+1), 0, 0)}, only(b))
		if s > 13 && (got[0].Stage != want[0].Stage || got[0].Rule != want[0].Rule) {
			t.Fatalf("second %d: got %q, want what is decided alone, %q", s, got[0].Rule, want[0].Rule)
		}
	}
	// Nobody speaks for a junction that the Core decides for itself.
	was := cb.announced["B"]
	cb.Hear(timing.Outflow{From: "B", AtMS: start.Add(time.Hour).UnixMilli()})
	if cb.announced["B"][0].AtMS != was[0].AtMS {
		t.Error("a message replaced what the Core's own junction announces")
	}
}

func TestParseOutflow(t *testing.T) {
	lanes := strings.Repeat(`{"lane":"x"},`, maxOutflowLanes) + `{}`
	for _, c := range []struct{ text, want string }{
		{`{"from":"A","at_ms":5}`, ""},
		{`{"at_ms":5}`, "must name its junction"},
		{`{"from":"A","lanes":[` + lanes + `]}`, "at most 64 lanes"},
		{`[`, "outflow"},
		{`"` + strings.Repeat("x", maxOutflow) + `"`, "bytes"},
	} {
		_, err := parseOutflow([]byte(c.text))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.40s: got %v, want %q", c.text, err, c.want)
		}
	}
	if got := topic.Outflow("d", "A"); !strings.HasSuffix(got, ".outflow.A") {
		t.Errorf("got subject %s", got)
	}
}
