package signalcontrol

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

var (
	testDistrict = ledgertest.New("signal-control", 4)
	testStart    = ledgertest.Start
)

// definitions returns n junctions alike, by id.
func definitions(t testing.TB, n int) map[traffic.JunctionID]*traffic.Junction {
	t.Helper()
	reg, err := identity.NewRegistry(&testDistrict.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	first, ok := reg.Junction(ledgertest.Junction)
	if !ok {
		t.Fatal("the test district has no junction")
	}
	out := map[traffic.JunctionID]*traffic.Junction{}
	for i := range n {
		j := *first
		j.ID = traffic.JunctionID(fmt.Sprintf("J%d", i+1))
		out[j.ID] = &j
	}
	return out
}

func lookup(defs map[traffic.JunctionID]*traffic.Junction) func(traffic.JunctionID) (*traffic.Junction, bool) {
	return func(id traffic.JunctionID) (*traffic.Junction, bool) {
		j, ok := defs[id]
		return j, ok
	}
}

func newCore(t testing.TB, controller string) *Core {
	t.Helper()
	ctrl, err := timing.Named(controller)
	if err != nil {
		t.Fatal(err)
	}
	return newCoreOf(t, ctrl)
}

func newCoreOf(t testing.TB, ctrl timing.Controller) *Core {
	t.Helper()
	rules, err := timing.RulesNamed("deployable")
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCore(CoreConfig{District: testDistrict.ID, Key: testDistrict.ControlKey, Policy: "day", PolicyVersion: "3", Controller: ctrl, Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// periodic returns a frame that asks for a decision.
func periodic(j traffic.JunctionID, seq uint64, at time.Time) *traffic.Frame {
	return &traffic.Frame{
		District: testDistrict.ID, Junction: j, FrameKey: traffic.FrameKey{Device: traffic.DeviceID("rsu-" + j), BootEpoch: 1, Seq: seq},
		Time: at, Interval: time.Second, Readings: []traffic.Reading{{Detector: "D1", Count: 1, OccupancyPermille: 400}},
		Signal: traffic.Signal{State: "G", Stage: 1, SinceMS: 8000, Mode: traffic.Coordinated},
	}
}

// event returns a frame that was sent because something happened.
func event(j traffic.JunctionID, seq uint64, at time.Time) *traffic.Frame {
	f := periodic(j, seq, at)
	f.Interval = 0
	return f
}

// restsOn lists the junctions and frames that commands rest on.
func restsOn(cs []traffic.Command) string {
	var out []string
	for _, c := range cs {
		out = append(out, c.RestsOn.String())
	}
	return strings.Join(out, " ")
}

func TestCommands(t *testing.T) {
	now := testStart.Add(10 * time.Second)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	other := periodic("J1", 9, ago(time.Second))
	other.Device = "second"
	for _, tc := range []struct {
		name    string
		frames  []*traffic.Frame
		want    string // frames that commands rest on, in order
		refused string // reasons, "; "
		stale   int
	}{
		{"none", nil, "", "", 0},
		{"one", []*traffic.Frame{periodic("J1", 1, ago(100*time.Millisecond))}, "rsu-J1/1/1", "", 0},
		{"events only", []*traffic.Frame{event("J1", 1, now), event("J2", 1, now)}, "", "", 0},
		{"event after periodic", []*traffic.Frame{periodic("J1", 1, ago(time.Second)), event("J1", 2, now)}, "rsu-J1/1/1", "", 0},
		{"newest of three", []*traffic.Frame{periodic("J1", 1, ago(1900*time.Millisecond)), periodic("J1", 3, ago(10*time.Millisecond)), periodic("J1", 2, ago(900*time.Millisecond))}, "rsu-J1/1/3", "", 0},
		{"newest, whatever the order", []*traffic.Frame{periodic("J1", 3, ago(0)), periodic("J1", 2, ago(time.Second))}, "rsu-J1/1/3", "", 0},
		{"same time, the later", []*traffic.Frame{periodic("J1", 1, now), periodic("J1", 2, now)}, "rsu-J1/1/2", "", 0},
		{"two devices of a junction", []*traffic.Frame{other, periodic("J1", 1, now), periodic("J2", 1, now)}, "rsu-J1/1/1 rsu-J2/1/1", "", 0},
		{"order of frames", []*traffic.Frame{periodic("J3", 1, now), periodic("J1", 1, now), periodic("J2", 1, now)}, "rsu-J3/1/1 rsu-J1/1/1 rsu-J2/1/1", "", 0},
		{"just in time", []*traffic.Frame{periodic("J1", 1, ago(MaxDecisionAge))}, "rsu-J1/1/1", "", 0},
		{"just too late", []*traffic.Frame{periodic("J1", 1, ago(MaxDecisionAge+1))}, "", "decision is 2s old, at most 2s may a command rest on", 1},
		{"stale among valid", []*traffic.Frame{periodic("J1", 1, ago(time.Minute)), periodic("J2", 1, now), periodic("J3", 1, ago(3*time.Second)), periodic("J4", 1, ago(time.Second))},
			"rsu-J2/1/1 rsu-J4/1/1", "decision is 1m0s old, at most 2s may a command rest on; decision is 3s old, at most 2s may a command rest on", 2},
		{"only the newest is called stale", []*traffic.Frame{periodic("J1", 1, ago(5*time.Second)), periodic("J1", 2, ago(4*time.Second))}, "", "decision is 4s old, at most 2s may a command rest on", 1},
		{"stale one before a fresh one", []*traffic.Frame{periodic("J1", 1, ago(5*time.Second)), periodic("J1", 2, ago(time.Second))}, "rsu-J1/1/2", "", 0},
		{"clock ahead", []*traffic.Frame{periodic("J1", 1, now.Add(time.Second))}, "rsu-J1/1/1", "", 0},
		{"unknown junction among valid", []*traffic.Frame{periodic("J1", 1, now), periodic("nowhere", 1, now), periodic("J2", 1, now)},
			"rsu-J1/1/1 rsu-J2/1/1", "junction is not in the registry", 0},
		{"nothing read", []*traffic.Frame{{Junction: "J1", FrameKey: traffic.FrameKey{Device: "x"}, Time: now, Interval: 1}}, "x/0/0", "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, name := range []string{"fixed", "actuated", "maxpressure"} {
				c := newCore(t, name)
				cs, refused := c.Commands(now, 7, tc.frames, lookup(definitions(t, 4)))
				if got := restsOn(cs); got != tc.want {
					t.Errorf("%s: got commands on %q, want %q", name, got, tc.want)
				}
				var reasons []string
				stale := 0
				for _, r := range refused {
					reasons = append(reasons, r.Reason)
					if r.Stale {
						stale++
					}
				}
				if got := strings.Join(reasons, "; "); got != tc.refused || stale != tc.stale {
					t.Errorf("%s: got refused %q, %d stale, want %q, %d", name, got, stale, tc.refused, tc.stale)
				}
				for _, cmd := range cs {
					want := traffic.Command{District: testDistrict.ID, Junction: cmd.Junction, Seq: cmd.Seq, Height: 7, RestsOn: cmd.RestsOn,
						Policy: "day", PolicyVersion: "3", Controller: name, ControllerVersion: "1",
						Issued: now, Expires: now.Add(Validity), Stage: cmd.Stage, Rule: cmd.Rule}
					if cmd != want || cmd.Seq == 0 || cmd.Rule == "" || cmd.Stage < 0 || cmd.Stage > 1 {
						t.Errorf("%s: got %+v, want %+v with a sequence, a stage and a rule", name, cmd, want)
					}
				}
			}
		})
	}
}

// TestSequenceRises: over heights, within a height, and with a new Core that
// remembers nothing.
func TestSequenceRises(t *testing.T) {
	defs := definitions(t, 2)
	c := newCore(t, "fixed")
	last := map[traffic.JunctionID]uint64{}
	frame := uint64(0)
	decide := func(h ledger.Height, what string) {
		t.Helper()
		frame++
		now := testStart.Add(time.Duration(frame) * time.Second)
		cs, refused := c.Commands(now, h, []*traffic.Frame{periodic("J1", frame, now), periodic("J2", frame, now)}, lookup(defs))
		if len(cs) != 2 || len(refused) != 0 {
			t.Fatalf("%s: got %d commands, %v refused, want two", what, len(cs), refused)
		}
		for _, cmd := range cs {
			if cmd.Seq <= last[cmd.Junction] {
				t.Fatalf("%s: %s: got seq %d after %d, want it to rise", what, cmd.Junction, cmd.Seq, last[cmd.Junction])
			}
			last[cmd.Junction] = cmd.Seq
		}
	}
	decide(1, "first block")
	decide(2, "next height")
	for i := range 100 {
		decide(2, fmt.Sprint("same height ", i))
	}
	decide(3, "height after many at one")
	c = newCore(t, "fixed")
	decide(4, "restart")
	decide(1000, "a jump")
	c = newCore(t, "fixed")
	decide(1001, "restart after a jump")
	// More than there is room for at one height goes on into the next one's, and
	// still rises there.
	c.last["J1"] = 1003*perBlock + 5
	last["J1"] = c.last["J1"]
	decide(1002, "room used up")
	decide(1003, "next height after that")
	decide(1<<40, "a height that is never reached")
}

// traffickedFrames returns the frames of one block: random readings, some
// junctions twice or at events only.
func traffickedFrames(r *rand.Rand, n int, h ledger.Height, now time.Time) []*traffic.Frame {
	var out []*traffic.Frame
	for i := range n {
		id := traffic.JunctionID(fmt.Sprintf("J%d", i+1))
		for k := range 1 + r.IntN(2) {
			f := periodic(id, uint64(h)*2+uint64(k), now.Add(-time.Duration(r.IntN(2500))*time.Millisecond-time.Duration(k)))
			if r.IntN(5) == 0 {
				f.Interval = 0
			}
			f.Readings[0].Count = r.Uint32N(3)
			f.Readings[0].OccupancyPermille = r.Uint32N(1001)
			f.Signal.SinceMS = r.Int64N(60_000)
			if f.Signal.Stage = r.IntN(3) - 1; f.Signal.Stage < 1 {
				f.Signal.State = "r"
			}
			out = append(out, f)
		}
	}
	return out
}

// TestDeterminism: the same blocks give the same bytes, in every process and
// whatever order maps have; and what is decided for a junction does not depend on
// where in the block its frames are.
func TestDeterminism(t *testing.T) {
	const junctions, blocks = 30, 20
	defs := definitions(t, junctions)
	for _, name := range []string{"fixed", "actuated", "maxpressure"} {
		t.Run(name, func(t *testing.T) {
			// decide runs over all blocks; shuffled changes the order of the frames.
			decide := func(shuffle *rand.Rand) (all [][]Order, refusals [][]Refusal) {
				r := rand.New(rand.NewPCG(1, 2))
				c := newCore(t, name)
				for h := range ledger.Height(blocks) {
					now := testStart.Add(time.Duration(h) * time.Second)
					frames := traffickedFrames(r, junctions, h, now)
					if shuffle != nil {
						shuffle.Shuffle(len(frames), func(i, k int) { frames[i], frames[k] = frames[k], frames[i] })
					}
					orders, refused := c.Decide(now, h+1, frames, lookup(defs))
					all, refusals = append(all, orders), append(refusals, refused)
				}
				return all, refusals
			}
			want, wantRefused := decide(nil)
			got, gotRefused := decide(nil)
			if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(gotRefused, wantRefused) {
				t.Error("the same blocks have given other commands the second time")
			}
			byJunction := func(all [][]Order) {
				for _, orders := range all {
					slices.SortFunc(orders, func(a, b Order) int { return strings.Compare(string(a.Command.Junction), string(b.Command.Junction)) })
				}
			}
			got, _ = decide(rand.New(rand.NewPCG(3, 4)))
			byJunction(got)
			byJunction(want)
			stages := map[int]int{}
			for h := range want {
				if !reflect.DeepEqual(got[h], want[h]) {
					t.Fatalf("block %d: frames in another order have given other commands", h+1)
				}
				for _, o := range want[h] {
					stages[o.Command.Stage]++
				}
			}
			if len(stages) < 2 {
				t.Errorf("got only stages %v: the test decides nothing", stages)
			}
		})
	}
}

// TestMemory: junctions do not share what is remembered of them, frames that are
// refused leave no trace in it.
func TestMemory(t *testing.T) {
	var calls []string
	ctrl := timing.Controller{Name: "counting", Version: "1", Next: func(j *traffic.Junction, _ timing.Rules, m timing.Memory, v timing.View) (timing.Memory, timing.Decision) {
		m.AtMS++
		calls = append(calls, fmt.Sprintf("%s=%d", j.ID, m.AtMS))
		return m, timing.Decision{Stage: 0, Rule: "counting"}
	}}
	c := newCoreOf(t, ctrl)
	defs := definitions(t, 2)
	now := testStart.Add(time.Minute)
	c.Commands(now, 1, []*traffic.Frame{periodic("J1", 1, now), periodic("J2", 1, now)}, lookup(defs))
	c.Commands(now, 2, []*traffic.Frame{periodic("J1", 2, now), periodic("J2", 2, now.Add(-time.Minute)), event("J2", 3, now)}, lookup(defs))
	c.Commands(now, 3, []*traffic.Frame{periodic("J2", 4, now)}, lookup(defs))
	if got, want := strings.Join(calls, " "), "J1=1 J2=1 J1=2 J2=2"; got != want {
		t.Errorf("got calls %s, want %s", got, want)
	}
}

// TestBadStage: a controller that wants what is not there is refused by name,
// and takes no other junction with it.
func TestBadStage(t *testing.T) {
	for _, bad := range []int{-1, 2, 1 << 20} {
		ctrl := timing.Controller{Name: "broken", Version: "1", Next: func(j *traffic.Junction, _ timing.Rules, m timing.Memory, _ timing.View) (timing.Memory, timing.Decision) {
			if j.ID == "J2" {
				return m, timing.Decision{Stage: bad}
			}
			return m, timing.Decision{Stage: 1, Rule: "good"}
		}}
		c := newCoreOf(t, ctrl)
		now := testStart
		cs, refused := c.Commands(now, 1, []*traffic.Frame{periodic("J1", 1, now), periodic("J2", 5, now), periodic("J3", 1, now)}, lookup(definitions(t, 3)))
		if got, want := restsOn(cs), "rsu-J1/1/1 rsu-J3/1/1"; got != want {
			t.Errorf("stage %d: got commands on %q, want %q", bad, got, want)
		}
		want := Refusal{Junction: "J2", Frame: traffic.FrameKey{Device: "rsu-J2", BootEpoch: 1, Seq: 5}, Reason: fmt.Sprintf("controller broken wants stage %d of 2", bad)}
		if len(refused) != 1 || refused[0] != want {
			t.Errorf("stage %d: got refused %+v, want %+v", bad, refused, want)
		}
		if c.last["J2"] != 0 {
			t.Errorf("stage %d: a refused command has used up sequence %d", bad, c.last["J2"])
		}
	}
}

// TestEnvelopes: what is sent verifies under the key, is of kind command and
// carries the command, and neither a changed byte nor another kind verifies.
func TestEnvelopes(t *testing.T) {
	c := newCore(t, "actuated")
	now := testStart.Add(123456789 * time.Nanosecond)
	orders, refused := c.Decide(now, 3, []*traffic.Frame{periodic("J1", 1, now), periodic("J2", 1, now.Add(-time.Minute)), periodic("J3", 1, now)}, lookup(definitions(t, 3)))
	if len(orders) != 2 || len(refused) != 1 {
		t.Fatalf("got %d orders, %d refused, want 2 and 1", len(orders), len(refused))
	}
	pub := testDistrict.ControlKey.Public().(ed25519.PublicKey)
	for _, o := range orders {
		e, err := identity.ParseEnvelope(o.Envelope)
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != identity.KindCommand || e.Key != identity.IDOf(pub) || !e.Verify(pub) {
			t.Errorf("got kind %q, key %s, verified %v, want a command under %s", e.Kind, e.Key, e.Verify(pub), identity.IDOf(pub))
		}
		if !bytes.Equal(e.Marshal(), o.Envelope) {
			t.Error("the envelope is not canonical")
		}
		cmd, err := wire.DecodeCommand(e.ContentType, e.Payload)
		if err != nil || *cmd != o.Command {
			t.Errorf("got command %+v, %v, want %+v", cmd, err, o.Command)
		}
		for _, k := range []identity.RecordKind{identity.KindFrame, identity.KindOverride, identity.KindRegistry} {
			wrong := e
			if wrong.Kind = k; wrong.Verify(pub) {
				t.Errorf("the command verifies as a %s", k)
			}
		}
		e.Payload = bytes.Clone(e.Payload)
		e.Payload[len(e.Payload)/2] ^= 1
		if e.Verify(pub) {
			t.Error("a changed command verifies")
		}
	}
}

func TestNewCoreRefuses(t *testing.T) {
	_, err := NewCore(CoreConfig{Key: make([]byte, 5)})
	for _, want := range []string{"signal-control", "district", "key", "controller"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a complaint about %s", err, want)
		}
	}
}
