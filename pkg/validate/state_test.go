package validate

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// story makes a stream of candidates of all kinds from a seed: mostly in order,
// with repeats, gaps, second bodies, forgeries and nonsense between.
func story(t testing.TB, seed uint64, n int) []*Candidate {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 1))
	var out []*Candidate
	last := map[traffic.DeviceID]*Candidate{}
	place := map[traffic.DeviceID]traffic.JunctionID{"d1": "j1", "d2": "j2"}
	seq := uint64(0)
	for range n {
		d := traffic.DeviceID([]string{"d1", "d2"}[rnd.IntN(2)])
		switch p := last[d]; rnd.IntN(20) {
		case 0: // a repeat, near or far
			if len(out) > 0 {
				out = append(out, out[rnd.IntN(len(out))])
			}
		case 1: // a second body
			if p != nil && rnd.IntN(8) == 0 {
				out = append(out, next(t, p, func(f *traffic.Frame) {
					f.Seq, f.Prev, f.Signal.SinceMS = p.Frame.Seq, p.Frame.Prev, int64(rnd.IntN(1000))
				}))
			}
		case 2: // somebody else's
			c := sign(t, "stranger", identity.KindFrame, frame(nil))
			c.SignatureValid = rnd.IntN(2) == 0
			out = append(out, c)
		case 3: // a command
			seq += uint64(rnd.IntN(3))
			out = append(out, sign(t, "control", identity.KindCommand, command(func(c *traffic.Command) { c.Seq, c.Stage = seq, rnd.IntN(3) })))
		case 4: // a boot
			if p != nil {
				c := next(t, p, func(f *traffic.Frame) {
					f.BootEpoch, f.Seq, f.Prev, f.Time = f.BootEpoch+1, 1, ledger.Hash{}, p.Frame.Time
				})
				last[d] = c
				out = append(out, c)
			}
		default:
			var c *Candidate
			if p == nil {
				c = sign(t, string(d), identity.KindFrame, frame(func(f *traffic.Frame) { f.Device, f.Junction = d, place[d] }))
			} else {
				c = next(t, p, func(f *traffic.Frame) {
					f.Time = p.Frame.Time.Add(time.Millisecond)
					f.Seq += uint64(rnd.IntN(2) * rnd.IntN(3)) // gaps
				})
			}
			last[d] = c
			if rnd.IntN(12) == 0 { // arrives late, behind its successor
				out = slices.Insert(out, max(0, len(out)-1), c)
			} else {
				out = append(out, c)
			}
		}
	}
	return out
}

// model is the order of a device's frames told plainly: it never forgets.
type model struct {
	bodies      map[traffic.FrameKey]ledger.Hash
	last        map[traffic.DeviceID]traffic.FrameKey
	quarantined map[traffic.DeviceID]bool
}

func (m *model) judge(c *Candidate) (refused bool) {
	k := c.Frame.FrameKey
	if m.quarantined[k.Device] {
		return true
	}
	if h, ok := m.bodies[k]; ok {
		if h != hashOf(c) {
			m.quarantined[k.Device] = true
		}
		return true
	}
	l, ok := m.last[k.Device]
	if ok && (k.BootEpoch < l.BootEpoch || k.BootEpoch == l.BootEpoch && k.Seq <= l.Seq) {
		return true
	}
	return false
}

// TestOrderAgreesWithModel compares what is remembered in sixteen places with a
// model that remembers everything.
func TestOrderAgreesWithModel(t *testing.T) {
	r := registry(t, 0)
	accepted := 0
	for seed := range seeds(20) {
		s := NewState(Edge())
		m := model{map[traffic.FrameKey]ledger.Hash{}, map[traffic.DeviceID]traffic.FrameKey{}, map[traffic.DeviceID]bool{}}
		for i, c := range story(t, seed, 300) {
			v := s.Judge(r, noon, c)
			if c.Frame == nil || c.Envelope.Key == identity.IDOf([]byte(pub("stranger"))) {
				continue
			}
			refused := m.judge(c)
			if refused && v.OK {
				t.Fatalf("seed %d, record %d: %s was accepted, the model refuses it", seed, i, c.Frame.FrameKey)
			}
			if !refused && !v.OK && v.Rule != RuleChain && v.Rule != RuleClockBackwards {
				t.Fatalf("seed %d, record %d: %s was refused by %s, the model accepts it", seed, i, c.Frame.FrameKey, v.Rule)
			}
			if v.OK {
				m.bodies[c.Frame.FrameKey], m.last[c.Frame.Device] = hashOf(c), c.Frame.FrameKey
				accepted++
			}
			// Second bodies of frames older than those remembered are refused as
			// replays; newer ones quarantine, in both.
			if s.Quarantined(c.Frame.Device) && !m.quarantined[c.Frame.Device] {
				t.Fatalf("seed %d, record %d: %s is quarantined, in the model it is not", seed, i, c.Frame.Device)
			}
		}
	}
	if accepted < 200 {
		t.Errorf("%d frames accepted in all: the stories test little", accepted)
	}
}

// TestClone judges every story by a state, by a clone that is taken before each
// record, and by a state that went through its encoding: all agree, and a clone
// never shows in its original.
func TestClone(t *testing.T) {
	r := registry(t, 0)
	for seed := range seeds(20) {
		s := NewState(Edge())
		for i, c := range story(t, seed, 200) {
			before := encode(t, s)
			clone := s.Clone()
			decoded := NewState(Edge())
			if err := decoded.UnmarshalBinary(before); err != nil {
				t.Fatal(err)
			}
			want := clone.Judge(r, noon, c)
			if !bytes.Equal(encode(t, s), before) {
				t.Fatalf("seed %d, record %d: judging on a clone changed the original", seed, i)
			}
			if got := decoded.Judge(r, noon, c); got != want {
				t.Fatalf("seed %d, record %d: got %v from a decoded state, want %v", seed, i, got, want)
			}
			if got := s.Judge(r, noon, c); got != want {
				t.Fatalf("seed %d, record %d: got %v from the original, want %v from its clone", seed, i, got, want)
			}
			a, b, d := encode(t, s), encode(t, clone), encode(t, decoded)
			if !bytes.Equal(a, b) || !bytes.Equal(a, d) {
				t.Fatalf("seed %d, record %d: original, clone and decoded state differ", seed, i)
			}
			if i%3 == 0 {
				s = clone // a proposal was decided
			}
		}
	}
}

// TestCloneOfMany checks copy on write in a table with many rows, both ways.
func TestCloneOfMany(t *testing.T) {
	const n = 3000
	s := NewState(Block())
	for i := range n {
		s.Quarantine(traffic.DeviceID(fmt.Sprintf("device-%d", i)))
	}
	c := s.Clone()
	for i := range n {
		id := traffic.DeviceID(fmt.Sprintf("device-%d", i))
		s.devices.edit(string(id), s.owner).time = 1
		c.devices.edit(string(id), c.owner).time = 2
	}
	s.Quarantine("only in s")
	for i := range n {
		id := fmt.Sprintf("device-%d", i)
		if a, b := s.devices.get(id).time, c.devices.get(id).time; a != 1 || b != 2 {
			t.Fatalf("%s: got times %d and %d in state and clone, want 1 and 2", id, a, b)
		}
	}
	if c.Quarantined("only in s") || !s.Quarantined("only in s") || s.devices.n != n+1 || c.devices.n != n {
		t.Errorf("got %d rows in the state, %d in its clone, want %d and %d", s.devices.n, c.devices.n, n+1, n)
	}
}

// TestRestore rebuilds a state from what was accepted: from there on it judges
// as the state that accepted it.
func TestRestore(t *testing.T) {
	r := registry(t, 0)
	for seed := range seeds(10) {
		s, rebuilt := NewState(Edge()), NewState(Edge())
		cs := story(t, seed, 200)
		for _, c := range cs {
			if s.Judge(r, noon, c).OK {
				rebuilt.Restore(c)
				rebuilt.Restore(c) // a second time changes nothing
			}
		}
		for _, d := range []traffic.DeviceID{"d1", "d2"} {
			if s.Quarantined(d) {
				rebuilt.Quarantine(d)
			}
		}
		if !bytes.Equal(encode(t, s), encode(t, rebuilt)) {
			t.Errorf("seed %d: the rebuilt state differs", seed)
		}
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	r := registry(t, 0)
	s := NewState(Edge())
	a := sign(t, "d1", identity.KindFrame, frame(nil))
	mustAccept(t, s, r, noon, a)
	mustAccept(t, s, r, noon, next(t, a, nil))
	mustAccept(t, s, r, noon, sign(t, "d2", identity.KindFrame, frame(func(f *traffic.Frame) { f.Device, f.Junction = "d2", "j2" })))
	good := encode(t, s)
	at := len(stateMagic)
	patch := func(i int, v byte) []byte { b := slices.Clone(good); b[i] = v; return b }
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"nothing", nil, "validation state: not in the form of stopline validation state v2"},
		{"another form", patch(0, 'S'), "validation state: not in the form of stopline validation state v2"},
		{"longer", append(slices.Clone(good), 0), "validation state: truncated"},
		{"many rows", patch(at, 255), "validation state: devices[2] \"\": names must rise"},
		{"truncated", good[:len(good)-1], "validation state: truncated"},
		{"names fall", patch(at+4+2+1, '3'), "validation state: devices[1] \"d2\": names must rise"},
		{"flag", patch(at+4+2+2+8, 2), "validation state: devices[0] \"d1\": flag 2, 2 records remembered: at most 1 and 16"},
		{"remembered", patch(at+4+2+2+9, 17), "validation state: devices[0] \"d1\": flag 0, 17 records remembered: at most 1 and 16"},
		{"falling", patch(at+4+2+2+10+15, 9), "validation state: devices[0] \"d1\": remembered records must rise"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState(Edge())
			if err := s.UnmarshalBinary(tt.b); err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if err := s.UnmarshalBinary(good); err != nil {
				t.Errorf("got %v for the good encoding", err)
			}
		})
	}
	for i := range good {
		if err := NewState(Edge()).UnmarshalBinary(good[:i]); err == nil {
			t.Fatalf("the first %d of %d bytes were taken for a state", i, len(good))
		}
	}
	// A refusal leaves what was there.
	if err := s.UnmarshalBinary(good[:len(good)-1]); err == nil || !bytes.Equal(encode(t, s), good) {
		t.Errorf("got %v, and the state changed: %v", err, !bytes.Equal(encode(t, s), good))
	}
}

// FuzzState: what can be decoded encodes to the same bytes.
func FuzzState(f *testing.F) {
	r := registry(f, 0)
	s := NewState(Edge())
	f.Add(encode(f, s))
	for _, c := range story(f, 1, 100) {
		s.Judge(r, noon, c)
	}
	f.Add(encode(f, s))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := NewState(Edge())
		if err := s.UnmarshalBinary(b); err != nil {
			return
		}
		if got := encode(t, s); !bytes.Equal(got, b) {
			t.Errorf("got %x after a round trip, want %x", got, b)
		}
	})
}

// FuzzJudge: no value of any field makes Judge panic, or accept what breaks the
// bounds that matter most.
func FuzzJudge(f *testing.F) {
	r := registry(f, 0)
	f.Add(uint64(3), uint64(1), int64(0), int64(1000), "Grr", 0, "coordinated", "stop", uint32(1), uint32(400), uint32(0), uint32(0), uint32(0), uint32(0), uint8(0))
	f.Add(uint64(1)<<63, uint64(1)<<63, int64(-1)<<63, int64(-1)<<63, "", -1<<31, "", "", uint32(1)<<31, uint32(1)<<31, uint32(1)<<31, uint32(1)<<31, uint32(1)<<31, uint32(1)<<31, uint8(255))
	f.Add(^uint64(0), ^uint64(0), int64(1)<<62, int64(1)<<62, "ccc", 9, "local", "area", ^uint32(0), uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), uint8(1))
	f.Fuzz(func(t *testing.T, epoch, seq uint64, nano, intervalMS int64, state string, stage int, mode, detector string,
		count, occupancy, speed, vehicles, halted, wait uint32, priority uint8) {
		s := NewState(Edge())
		first := sign(t, "d1", identity.KindFrame, frame(nil))
		s.Judge(r, noon, first)
		c := next(t, first, func(f *traffic.Frame) {
			f.BootEpoch, f.Seq = epoch, seq
			f.Time, f.Interval = time.Unix(0, nano).UTC(), time.Duration(intervalMS)*time.Millisecond
			f.Signal = traffic.Signal{State: traffic.State(state), Stage: stage, Mode: traffic.Mode(mode), SinceMS: nano}
			f.Readings = []traffic.Reading{{Detector: traffic.DetectorID(detector), Count: count, OccupancyPermille: occupancy,
				SpeedCMS: speed, Vehicles: vehicles, Halted: halted, HeadWaitMS: wait, Priority: traffic.Priority(priority)}}
		})
		v := s.Judge(r, noon, c)
		if v.OK != (v.Rule == "") || v.OK != (v.Reason == "") {
			t.Errorf("got verdict %+v, want a rule and a reason if and only if it is refused", v)
		}
		if v.OK && (occupancy > 1000 || halted > vehicles || len(state) != 3 || priority > 2 ||
			nano > noon.Add(2*time.Second).UnixNano() || nano < noon.Add(-time.Minute).UnixNano()) {
			t.Errorf("%+v was accepted", c.Frame)
		}
	})
}

func BenchmarkJudge(b *testing.B) {
	for _, readings := range []int{6, 24} {
		b.Run(fmt.Sprintf("readings=%d", readings), func(b *testing.B) {
			r := registry(b, readings)
			c := sign(b, "d1", identity.KindFrame, frame(func(f *traffic.Frame) {
				for i := len(f.Readings); i < readings; i++ {
					f.Readings = append(f.Readings, traffic.Reading{Detector: traffic.DetectorID(fmt.Sprintf("loop-%d", i)), Count: 1, OccupancyPermille: 300})
				}
			}))
			// About what protobuf makes of it; JSON, which the tests sign, is longer.
			c.Envelope.Payload = make([]byte, 130+readings*30)
			s := NewState(Edge())
			b.ReportAllocs()
			for b.Loop() {
				c.Frame.Seq++
				c.Frame.Prev = [32]byte{1}
				c.Frame.Seq++ // a gap, so that the chain need not be right
				if v := s.Judge(r, noon, c); !v.OK {
					b.Fatal(v)
				}
			}
		})
	}
}

// BenchmarkClone is a proposal: clone, judge a batch of one frame a device, and
// keep the clone.
func BenchmarkClone(b *testing.B) {
	for _, devices := range []int{100, 10000} {
		b.Run(fmt.Sprintf("devices=%d", devices), func(b *testing.B) {
			s := NewState(Block())
			ids := make([]string, devices)
			for i := range ids {
				ids[i] = fmt.Sprintf("device-%d", i)
				s.devices.edit(ids[i], s.owner)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				c := s.Clone()
				for range 100 {
					c.devices.edit(ids[i%devices], c.owner).time++
					i++
				}
				s = c
			}
		})
	}
}

// seeds is how many stories a test plays.
func seeds(n uint64) uint64 {
	if testing.Short() {
		return n/4 + 1
	}
	return n
}
