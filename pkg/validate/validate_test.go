package validate

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// with changes one reading of a frame: 0 stop, 1 adv, 2 area, 3 exit,
// 4 button, 5 oracle.
func with(i int, mod func(r *traffic.Reading)) func(f *traffic.Frame) {
	return func(f *traffic.Frame) { mod(&f.Readings[i]) }
}

// TestFrameRules has for every rule about one frame an input that breaks only
// it, and its neighbour, which passes.
func TestFrameRules(t *testing.T) {
	type edit = func(f *traffic.Frame)
	longTrip := strings.Repeat("x", maxText+1)
	events := func(n int) []traffic.Event { return make([]traffic.Event, n) }
	results := func(n int) []traffic.CommandResult { return make([]traffic.CommandResult, n) }
	for _, tt := range []struct {
		name   string
		rule   Rule
		bad    edit
		reason string
		good   edit
	}{
		{"no sequence number", RuleSchema, func(f *traffic.Frame) { f.Seq = 0 }, "seq: 0, the first after a boot is 1", nil},
		{"another district", RuleDistrict, func(f *traffic.Frame) { f.District = "airport" }, `district: "airport", this is "harbour"`, nil},
		{"another device", RuleDevice, func(f *traffic.Frame) { f.Device = "d2" }, `device: "d2", the signer is device d1`, nil},
		{"another junction", RuleJunction, func(f *traffic.Frame) { f.Junction = "j2" }, `junction: "j2", device d1 is at j1`, nil},
		{"predecessor of the first", RuleChain, func(f *traffic.Frame) { f.Prev[0] = 9 }, "prev: 09000000… in frame d1/3/1, the first after a boot has none", nil},
		{"no predecessor", RuleChain, func(f *traffic.Frame) { f.Seq = 2 }, "prev: empty in frame d1/3/2, only the first after a boot has none",
			func(f *traffic.Frame) { f.Seq = 2; f.Prev[0] = 1 }},
		{"ahead", RuleClockAhead, func(f *traffic.Frame) { f.Time = noon.Add(2100 * time.Millisecond) }, "time: 2.1 s ahead of the clock, at most 2.0 s",
			func(f *traffic.Frame) { f.Time = noon.Add(2 * time.Second) }},
		{"an hour ahead", RuleClockAhead, func(f *traffic.Frame) { f.Time = noon.Add(time.Hour) }, "time: 3600.0 s ahead of the clock, at most 2.0 s", nil},
		{"behind", RuleClockBehind, func(f *traffic.Frame) { f.Time = noon.Add(-lateFrames - 100*time.Millisecond) }, "time: 604800.1 s behind the clock, at most 604800.0 s",
			func(f *traffic.Frame) { f.Time = noon.Add(-lateFrames) }},
		{"a month behind", RuleClockBehind, func(f *traffic.Frame) { f.Time = noon.Add(-30 * 24 * time.Hour) }, "time: 2592000.0 s behind the clock, at most 604800.0 s", nil},
		{"the year 1", RuleClockBehind, func(f *traffic.Frame) { f.Time = time.Time{} }, "time: 9223372036.8 s behind the clock, at most 604800.0 s", nil},
		{"interval", RuleSchema, func(f *traffic.Frame) { f.Interval = 15*time.Minute + time.Millisecond }, "interval: 900001 ms, 0 to 900000 ms",
			func(f *traffic.Frame) { f.Interval = 15 * time.Minute }},
		{"negative interval", RuleSchema, func(f *traffic.Frame) { f.Interval = -time.Second }, "interval: -1000 ms, 0 to 900000 ms",
			func(f *traffic.Frame) { f.Interval = 0 }},
		{"events", RuleSize, func(f *traffic.Frame) { f.Events = events(1025) }, "events: 1025, at most 1024",
			func(f *traffic.Frame) { f.Events = events(1024) }},
		{"event long ago", RuleSchema, func(f *traffic.Frame) { f.Events = []traffic.Event{{}, {Code: 1, OffsetMS: 900001}} }, "events[1].offset_ms: 900001, at most 900000",
			func(f *traffic.Frame) { f.Events = []traffic.Event{{}, {Code: 1, OffsetMS: 900000}} }},
		{"results", RuleSize, func(f *traffic.Frame) { f.Results = results(65) }, "results: 65, at most 64",
			func(f *traffic.Frame) { f.Results = results(64) }},
		{"result's text", RuleSize, func(f *traffic.Frame) { f.Results = []traffic.CommandResult{{Reason: longTrip}} }, "results[0].reason: 257 bytes, at most 256",
			func(f *traffic.Frame) { f.Results = []traffic.CommandResult{{Reason: longTrip[1:]}} }},
		{"letters", RuleSignal, func(f *traffic.Frame) { f.Signal.State = "Gr" }, "signal.state: 2 letters, junction j1 has 3 groups", nil},
		{"unknown letter", RuleSignal, func(f *traffic.Frame) { f.Signal.State = "GrZ" }, "signal.state[2]: 'Z', must be one of r y G g c u x O",
			func(f *traffic.Frame) { f.Signal.State = "yuc" }},
		{"stage", RuleSignal, func(f *traffic.Frame) { f.Signal.Stage = 2 }, "signal.stage: 2, must be -1 or one of the 2 of junction j1",
			func(f *traffic.Frame) { f.Signal.Stage = 1 }},
		{"negative stage", RuleSignal, func(f *traffic.Frame) { f.Signal.Stage = -2 }, "signal.stage: -2, must be -1 or one of the 2 of junction j1",
			func(f *traffic.Frame) { f.Signal.Stage = -1 }},
		{"negative since", RuleSignal, func(f *traffic.Frame) { f.Signal.SinceMS = -1 }, "signal.since_ms: -1, must not be negative",
			func(f *traffic.Frame) { f.Signal.SinceMS = 0 }},
		{"mode", RuleSignal, func(f *traffic.Frame) { f.Signal.Mode = "manual" }, `signal.mode: "manual", must be coordinated, local, override or tripped`,
			func(f *traffic.Frame) { f.Signal.Mode = traffic.Tripped; f.Signal.Trip = "conflict" }},
		{"trip's text", RuleSize, func(f *traffic.Frame) { f.Signal.Trip = longTrip }, "signal.trip: 257 bytes, at most 256",
			func(f *traffic.Frame) { f.Signal.Trip = longTrip[1:] }},
		{"too many readings", RuleSize, func(f *traffic.Frame) { f.Readings = append(f.Readings, f.Readings[0]) }, "readings: 7, junction j1 has 6 detectors",
			func(f *traffic.Frame) { f.Readings = nil }},
		{"detector", RuleDetector, with(2, func(r *traffic.Reading) { r.Detector = "loop-9" }), `readings[2].detector: "loop-9" is not one of junction j1`,
			func(f *traffic.Frame) { f.Readings[0], f.Readings[3] = f.Readings[3], f.Readings[0] }},
		{"detector twice", RuleTwice, func(f *traffic.Frame) { f.Readings[4] = f.Readings[0] }, `readings[4].detector: "stop" has a reading in this frame already`, nil},
		{"count", RuleCount, with(0, func(r *traffic.Reading) { r.Count = 4 }), "readings[0] stop: count 4 in 1.0 s, at most 3",
			with(0, func(r *traffic.Reading) { r.Count = 3 })},
		{"count in a minute", RuleCount, func(f *traffic.Frame) {
			f.Interval = time.Minute
			f.Readings[0].Count = 53
		}, "readings[0] stop: count 53 in 60.0 s, at most 52", func(f *traffic.Frame) {
			f.Interval = time.Minute
			f.Readings[0].Count = 52
		}},
		{"count where saturation is high", RuleCount, func(f *traffic.Frame) {
			f.Interval = time.Minute
			f.Readings[1].Count = 103
		}, "readings[1] adv: count 103 in 60.0 s, at most 102", func(f *traffic.Frame) {
			f.Interval = time.Minute
			f.Readings[1].Count = 102
		}},
		{"count in no interval", RuleCount, func(f *traffic.Frame) {
			f.Interval = 0
			f.Readings[0].Count = 4
		}, "readings[0] stop: count 4 in 1.0 s, at most 3", func(f *traffic.Frame) { f.Interval = 0 }},
		{"count into an area", RuleCount, with(2, func(r *traffic.Reading) { r.Count = 8 }), "readings[2] area: count 8 in 1.0 s, at most 7",
			with(2, func(r *traffic.Reading) { r.Count = 7 })},
		{"walkers", RuleCount, with(4, func(r *traffic.Reading) { r.Count = 1001 }), "readings[4] button: count 1001 in 1.0 s, at most 1000",
			with(4, func(r *traffic.Reading) { r.Count = 1000 })},
		{"oracle's count", RuleCount, with(5, func(r *traffic.Reading) { r.Count = 2001 }), "readings[5] oracle: count 2001 in 1.0 s, at most 2000",
			with(5, func(r *traffic.Reading) { r.Count = 2000 })},
		{"occupancy 140 %", RuleOccupancy, with(3, func(r *traffic.Reading) { r.OccupancyPermille = 1400 }), "readings[3] exit: occupancy 140.0 %, at most 100 %", nil},
		{"occupancy", RuleOccupancy, with(0, func(r *traffic.Reading) { r.OccupancyPermille = 1001 }), "readings[0] stop: occupancy 100.1 %, at most 100 %",
			with(0, func(r *traffic.Reading) { r.OccupancyPermille = 1000 })},
		{"speed", RuleSpeed, with(1, func(r *traffic.Reading) { r.SpeedCMS = 8341 }), "readings[1] adv: speed 83.4 m/s, at most 83.4 m/s",
			with(1, func(r *traffic.Reading) { r.SpeedCMS = 8340 })},
		{"speed in town", RuleSpeed, with(5, func(r *traffic.Reading) { r.SpeedCMS = 4200 }), "readings[5] oracle: speed 42.0 m/s, at most 41.7 m/s",
			with(5, func(r *traffic.Reading) { r.SpeedCMS = 4100 })},
		{"vehicles", RuleVehicles, with(2, func(r *traffic.Reading) { r.Vehicles = 43 }), "readings[2] area: vehicles 43, at most 42",
			with(2, func(r *traffic.Reading) { r.Vehicles = 42 })},
		{"vehicles on a loop", RuleVehicles, with(0, func(r *traffic.Reading) { r.Vehicles = 4 }), "readings[0] stop: vehicles 4, at most 3",
			with(0, func(r *traffic.Reading) { r.Vehicles = 3 })},
		{"oracle's vehicles", RuleVehicles, with(5, func(r *traffic.Reading) { r.Vehicles = 2001 }), "readings[5] oracle: vehicles 2001, at most 2000",
			with(5, func(r *traffic.Reading) { r.Vehicles = 2000 })},
		{"halted", RuleInconsistent, with(2, func(r *traffic.Reading) { r.Halted = 7 }), "readings[2] area: halted 7 of 6 vehicles",
			with(2, func(r *traffic.Reading) { r.Halted = 6 })},
		{"waiting a day", RuleInconsistent, with(2, func(r *traffic.Reading) { r.HeadWaitMS = waitMostMS + 1 }), "readings[2] area: head wait 86400.0 s, at most a day",
			with(2, func(r *traffic.Reading) { r.HeadWaitMS = waitMostMS })},
		{"nobody waits", RuleInconsistent, with(4, func(r *traffic.Reading) { r.Count = 0 }), "readings[4] button: head wait 20.0 s where nothing was",
			with(4, func(r *traffic.Reading) { r.Count = 0; r.HeadWaitMS = 0 })},
		{"nobody asks for priority", RuleInconsistent, with(3, func(r *traffic.Reading) {
			*r = traffic.Reading{Detector: "exit", Priority: traffic.Emergency}
		}), "readings[3] exit: priority 2 where nothing was", with(3, func(r *traffic.Reading) { r.Priority = traffic.Emergency })},
		{"priority", RuleSchema, with(2, func(r *traffic.Reading) { r.Priority = 3 }), "readings[2] area: priority 3, at most 2",
			with(2, func(r *traffic.Reading) { r.Priority = 2 })},
		{"speed of none", RuleInconsistent, with(0, func(r *traffic.Reading) { r.Count = 0; r.SpeedCMS = 900 }), "readings[0] stop: speed 9.0 m/s of no vehicle",
			with(0, func(r *traffic.Reading) { r.Count = 1; r.SpeedCMS = 900 })},
		{"speed 0", RuleInconsistent, with(1, func(r *traffic.Reading) { r.Count = 3; r.SpeedCMS = 0 }), "readings[1] adv: count 3 at speed 0",
			with(1, func(r *traffic.Reading) { r.Count = 2; r.SpeedCMS = 0 })},
		{"occupancy 0", RuleInconsistent, with(0, func(r *traffic.Reading) { r.Count = 3; r.OccupancyPermille = 0 }), "readings[0] stop: count 3 at occupancy 0 %",
			with(0, func(r *traffic.Reading) { r.Count = 2; r.OccupancyPermille = 0 })},
		{"button with a speed", RuleInconsistent, with(4, func(r *traffic.Reading) { r.SpeedCMS = 1 }), "readings[4] button: a button has a count and a waiting time only", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := registry(t, 0)
			s := NewState(Edge())
			v := mustRefuse(t, s, r, noon, sign(t, "d1", identity.KindFrame, frame(tt.bad)), tt.rule)
			if v.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", v.Reason, tt.reason)
			}
			covered[tt.rule] = true
			mustAccept(t, s, r, noon, sign(t, "d1", identity.KindFrame, frame(tt.good)))
		})
	}
}

// covered collects the rules that some test here showed to refuse.
var covered = map[Rule]bool{}

// TestSequenceRules plays stories: several frames of one device, of which one
// breaks a rule about order, and valid ones go on being accepted.
func TestSequenceRules(t *testing.T) {
	r := registry(t, 0)
	first := sign(t, "d1", identity.KindFrame, frame(nil))
	second := next(t, first, nil)
	third := next(t, second, nil)
	at := func(c *Candidate) time.Time { return c.Frame.Time }
	start := func(cs ...*Candidate) *State {
		s := NewState(Edge())
		for _, c := range cs {
			mustAccept(t, s, r, at(c), c)
		}
		return s
	}
	refuse := func(t *testing.T, s *State, c *Candidate, want Rule, reason string) {
		t.Helper()
		covered[want] = true
		if v := mustRefuse(t, s, r, at(c), c, want); v.Reason != reason {
			t.Errorf("got reason %q, want %q", v.Reason, reason)
		}
	}
	t.Run("duplicate", func(t *testing.T) {
		s := start(first, second)
		refuse(t, s, first, RuleDuplicate, "seq: this frame d1/3/1 was accepted before")
		refuse(t, s, second, RuleDuplicate, "seq: this frame d1/3/2 was accepted before")
		mustAccept(t, s, r, at(third), third)
	})
	t.Run("gap", func(t *testing.T) {
		s := start(first)
		if v := mustAccept(t, s, r, at(third), third); v.Gap != 1 {
			t.Errorf("got a gap of %d, want 1", v.Gap)
		}
		refuse(t, s, second, RuleReordered, "seq: boot epoch 3 sequence 2, the last was 3 sequence 3")
		if v := mustAccept(t, s, r, at(third), next(t, third, nil)); v.Gap != 0 {
			t.Errorf("got a gap of %d, want none", v.Gap)
		}
	})
	t.Run("boot", func(t *testing.T) {
		s := start(first, second)
		boot := next(t, second, func(f *traffic.Frame) { f.BootEpoch, f.Seq, f.Prev = 4, 1, [32]byte{} })
		late := next(t, second, func(f *traffic.Frame) { f.BootEpoch, f.Seq, f.Prev[0] = 4, 3, 1 })
		if v := mustAccept(t, s.Clone(), r, at(late), late); v.Gap != 2 {
			t.Errorf("got a gap of %d, want 2: the first two of the boot", v.Gap)
		}
		if v := mustAccept(t, s, r, at(boot), boot); v.Gap != 0 {
			t.Errorf("got a gap of %d, want none", v.Gap)
		}
		refuse(t, s, third, RuleReordered, "seq: boot epoch 3 sequence 3, the last was 4 sequence 1")
		refuse(t, s, second, RuleDuplicate, "seq: this frame d1/3/2 was accepted before")
		// A clock may be set at a start.
		back := next(t, boot, func(f *traffic.Frame) { f.BootEpoch, f.Seq, f.Prev, f.Time = 5, 1, [32]byte{}, noon.Add(-time.Second) })
		mustAccept(t, s, r, noon, back)
	})
	t.Run("replay", func(t *testing.T) {
		s := start(first)
		c := first
		for range Remembered {
			c = next(t, c, nil)
			mustAccept(t, s, r, at(c), c)
		}
		refuse(t, s, first, RuleReplay, fmt.Sprintf("seq: boot epoch 3 sequence 1, the last was 3 sequence %d", Remembered+1))
		refuse(t, s, second, RuleDuplicate, "seq: this frame d1/3/2 was accepted before")
	})
	t.Run("chain", func(t *testing.T) {
		s := start(first)
		broken := next(t, first, func(f *traffic.Frame) { f.Prev[0] ^= 1 })
		h, p := hashOf(first), broken.Frame.Prev
		refuse(t, s, broken, RuleChain, fmt.Sprintf("prev: %x…, the hash of frame d1/3/1 is %x…", p[:4], h[:4]))
		mustAccept(t, s, r, at(second), second)
	})
	t.Run("clock backwards", func(t *testing.T) {
		s := start(first)
		refuse(t, s, next(t, first, func(f *traffic.Frame) { f.Time = noon.Add(-time.Millisecond * 100) }), RuleClockBackwards,
			"time: 0.1 s before that of frame d1/3/1")
		mustAccept(t, s, r, noon, next(t, first, func(f *traffic.Frame) { f.Time = noon }))
	})
	t.Run("equivocation", func(t *testing.T) {
		s := start(first, second)
		other := next(t, first, func(f *traffic.Frame) { f.Readings = nil })
		refuse(t, s, other, RuleEquivocation, "seq: another frame d1/3/2 was accepted before; d1 is quarantined")
		if !s.Quarantined("d1") {
			t.Error("d1 is not quarantined after it signed two frames under one number")
		}
		refuse(t, s, third, RuleQuarantined, "device: d1 has signed two frames under one number before")
		refuse(t, s, next(t, third, func(f *traffic.Frame) { f.BootEpoch, f.Seq, f.Prev = 9, 1, [32]byte{} }), RuleQuarantined,
			"device: d1 has signed two frames under one number before")
		mustAccept(t, s, r, noon, sign(t, "d2", identity.KindFrame, frame(func(f *traffic.Frame) { f.Device, f.Junction = "d2", "j2" })))
	})
	t.Run("a broken rule is remembered of nobody", func(t *testing.T) {
		s := start(first)
		bad := next(t, first, with(0, func(r *traffic.Reading) { r.OccupancyPermille = 1400 }))
		refuse(t, s, bad, RuleOccupancy, "readings[0] stop: occupancy 140.0 %, at most 100 %")
		// What the device sends next rests on the frame that was refused.
		if v := mustAccept(t, s, r, at(third), next(t, bad, with(0, func(r *traffic.Reading) { r.OccupancyPermille = 400 }))); v.Gap != 1 {
			t.Errorf("got a gap of %d, want 1", v.Gap)
		}
	})
}

// TestForgeriesChangeNothing shows that without the key nobody can move a
// device's sequence, nor get it quarantined.
func TestForgeriesChangeNothing(t *testing.T) {
	r := registry(t, 0)
	s := NewState(Edge())
	first := sign(t, "d1", identity.KindFrame, frame(nil))
	mustAccept(t, s, r, noon, first)
	for name, mod := range map[string]func(f *traffic.Frame){
		"equivocation": func(f *traffic.Frame) { f.Seq = 1; f.Prev = [32]byte{}; f.Readings = nil },
		"next":         func(f *traffic.Frame) { f.Readings = nil },
		"far ahead":    func(f *traffic.Frame) { f.Seq = 1 << 63 },
		"new boot":     func(f *traffic.Frame) { f.BootEpoch, f.Seq, f.Prev = 1<<63, 1, [32]byte{} },
	} {
		t.Run(name, func(t *testing.T) {
			forged := next(t, first, mod)
			forged.SignatureValid = false
			mustRefuse(t, s, r, noon, forged, RuleSignature)
			// Signed rightly, but by another's key.
			f := *forged.Frame
			mustRefuse(t, s, r, noon, sign(t, "d2", identity.KindFrame, &f), RuleDevice)
			mustRefuse(t, s, r, noon, sign(t, "stranger", identity.KindFrame, &f), RuleUnknownKey)
			mustRefuse(t, s, r, noon, sign(t, "gone", identity.KindFrame, &f), RuleRevoked)
		})
	}
	if s.Quarantined("d1") {
		t.Error("forged frames got d1 quarantined")
	}
	mustAccept(t, s, r, noon.Add(time.Second), next(t, first, nil))
}

// TestEnvelopeRules has the rules that come before any payload is looked at.
func TestEnvelopeRules(t *testing.T) {
	r := registry(t, 0)
	good := func() *Candidate { return sign(t, "d1", identity.KindFrame, frame(nil)) }
	for _, tt := range []struct {
		name   string
		rule   Rule
		bad    func() *Candidate
		reason string
	}{
		{"envelope", RuleSize, func() *Candidate { c := good(); c.Raw = make([]byte, identity.MaxEnvelope+1); return c }, "envelope: 262145 bytes, at most 262144"},
		{"frame", RuleSize, func() *Candidate { c := good(); c.Envelope.Payload = make([]byte, 64<<10+1); return c }, "payload: frame of 65537 bytes, at most 65536"},
		{"command", RuleSize, func() *Candidate {
			c := sign(t, "control", identity.KindCommand, command(nil))
			c.Envelope.Payload = make([]byte, 4<<10+1)
			return c
		}, "payload: command of 4097 bytes, at most 4096"},
		{"schema", RuleSchema, func() *Candidate {
			return &Candidate{Raw: []byte("{"), Err: errors.New("frame: unexpected end of data")}
		}, "frame: unexpected end of data"},
		{"nothing decoded", RuleSchema, func() *Candidate { c := good(); c.Frame = nil; return c }, "payload: was not decoded as a frame"},
		{"empty", RuleUnknownKey, func() *Candidate { return &Candidate{} }, `key_id: "" is not in the registry`},
		{"unknown device", RuleUnknownKey, func() *Candidate { return sign(t, "stranger", identity.KindFrame, frame(nil)) },
			`key_id: "` + string(identity.IDOf([]byte(pub("stranger")))) + `" is not in the registry`},
		{"revoked device", RuleRevoked, func() *Candidate {
			return sign(t, "gone", identity.KindFrame, frame(func(f *traffic.Frame) { f.Device = "gone" }))
		}, "key_id: device gone has been revoked"},
		{"device signs a command", RuleMaySign, func() *Candidate { return sign(t, "d1", identity.KindCommand, command(nil)) }, "kind: device d1 may not sign a command"},
		{"service signs a frame", RuleMaySign, func() *Candidate { return sign(t, "control", identity.KindFrame, frame(nil)) }, "kind: service control may not sign a frame"},
		{"official signs a change", RuleMaySign, func() *Candidate {
			return sign(t, "reader", identity.KindRegistry, &identity.Change{District: "harbour", Action: "put", Type: "software", ID: "x"})
		}, "kind: official reader may not sign a registry"},
		{"kind", RuleKind, func() *Candidate { return sign(t, "clerk", identity.KindAnchor, "please") }, `kind: records of the kind "anchor" are not taken`},
		{"signature", RuleSignature, func() *Candidate { c := good(); c.SignatureValid = false; return c }, "signature: is not that of device d1 over this frame"},
		{"unsigned command", RuleSignature, func() *Candidate {
			c := sign(t, "control", identity.KindCommand, command(nil))
			c.SignatureValid = false
			return c
		}, "signature: is not that of service control over this command"},
		{"detector of another device", RuleDetector, func() *Candidate {
			return sign(t, "part", identity.KindFrame, frame(func(f *traffic.Frame) { f.Device = "part" }))
		}, `readings[1].detector: device part may not speak for "adv"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState(Edge())
			if v := mustRefuse(t, s, r, noon, tt.bad(), tt.rule); v.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", v.Reason, tt.reason)
			}
			covered[tt.rule] = true
			mustAccept(t, s, r, noon, good())
		})
	}
	t.Run("part may speak for its own", func(t *testing.T) {
		mustAccept(t, NewState(Edge()), r, noon, sign(t, "part", identity.KindFrame, frame(func(f *traffic.Frame) {
			f.Device, f.Readings = "part", f.Readings[:1]
		})))
	})
}

func TestCommandRules(t *testing.T) {
	type edit = func(c *traffic.Command)
	r := registry(t, 0)
	for _, tt := range []struct {
		name   string
		rule   Rule
		bad    edit
		reason string
		good   edit
	}{
		{"district", RuleDistrict, func(c *traffic.Command) { c.District = "airport" }, `district: "airport", this is "harbour"`, nil},
		{"junction", RuleJunction, func(c *traffic.Command) { c.Junction = "j9" }, `junction: "j9" is not in the registry`,
			func(c *traffic.Command) { c.Junction = "j2" }},
		{"no number", RuleSchema, func(c *traffic.Command) { c.Seq = 0 }, "seq: 0, the first is 1", nil},
		{"text", RuleSize, func(c *traffic.Command) { c.Rule = strings.Repeat("x", 257) }, "rule: 257 bytes, at most 256",
			func(c *traffic.Command) { c.Rule = strings.Repeat("x", 256) }},
		{"device's name", RuleSize, func(c *traffic.Command) { c.RestsOn.Device = traffic.DeviceID(strings.Repeat("x", 513)) }, "rests_on.device: 513 bytes, at most 512",
			func(c *traffic.Command) { c.RestsOn.Device = traffic.DeviceID(strings.Repeat("x", 512)) }},
		{"stage", RuleStage, func(c *traffic.Command) { c.Stage = 2 }, "stage: 2, junction j1 has 2", func(c *traffic.Command) { c.Stage = 0 }},
		{"negative stage", RuleStage, func(c *traffic.Command) { c.Stage = -1 }, "stage: -1, junction j1 has 2", nil},
		{"expires as it is issued", RuleExpired, func(c *traffic.Command) { c.Expires = noon }, "expires: 0.0 s after issued, must be later than issued",
			func(c *traffic.Command) { c.Expires = noon.Add(1) }},
		{"expires before", RuleExpired, func(c *traffic.Command) { c.Expires = noon.Add(-time.Second) }, "expires: 1.0 s before issued, must be later than issued", nil},
		{"valid too long", RuleExpired, func(c *traffic.Command) { c.Expires = noon.Add(10100 * time.Millisecond) }, "expires: 10.1 s after issued, at most 10.0 s",
			func(c *traffic.Command) { c.Expires = noon.Add(10 * time.Second) }},
		{"ahead", RuleClockAhead, func(c *traffic.Command) {
			c.Issued, c.Expires = noon.Add(3*time.Second), noon.Add(4*time.Second)
		}, "issued: 3.0 s ahead of the clock, at most 2.0 s", func(c *traffic.Command) {
			c.Issued, c.Expires = noon.Add(2*time.Second), noon.Add(4*time.Second)
		}},
		{"expired long ago", RuleExpired, func(c *traffic.Command) {
			c.Issued, c.Expires = noon.Add(-63*time.Second), noon.Add(-61*time.Second)
		}, "expires: 61.0 s ago, at most 60.0 s", func(c *traffic.Command) {
			c.Issued, c.Expires = noon.Add(-62*time.Second), noon.Add(-60*time.Second)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState(Edge())
			if v := mustRefuse(t, s, r, noon, sign(t, "control", identity.KindCommand, command(tt.bad)), tt.rule); v.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", v.Reason, tt.reason)
			}
			covered[tt.rule] = true
			mustAccept(t, s, r, noon, sign(t, "control", identity.KindCommand, command(tt.good)))
		})
	}
	t.Run("order", func(t *testing.T) {
		s := NewState(Edge())
		seq := func(n uint64, stage int) *Candidate {
			return sign(t, "control", identity.KindCommand, command(func(c *traffic.Command) { c.Seq, c.Stage = n, stage }))
		}
		mustAccept(t, s, r, noon, seq(1, 0))
		mustAccept(t, s, r, noon, seq(5, 0))
		for _, tt := range []struct {
			c      *Candidate
			rule   Rule
			reason string
		}{
			{seq(5, 0), RuleDuplicate, "seq: this command 5 to j1 was accepted before"},
			{seq(5, 1), RuleEquivocation, "seq: another command 5 to j1 was accepted before"},
			{seq(3, 1), RuleReordered, "seq: 3 to j1, the last was 5"},
		} {
			if v := mustRefuse(t, s, r, noon, tt.c, tt.rule); v.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", v.Reason, tt.reason)
			}
		}
		if got := s.LastCommand("j1"); got != 5 {
			t.Errorf("got last command %d, want 5", got)
		}
		// The service goes on, and other junctions have numbers of their own.
		mustAccept(t, s, r, noon, seq(6, 1))
		mustAccept(t, s, r, noon, sign(t, "control", identity.KindCommand, command(func(c *traffic.Command) { c.Junction = "j2" })))
	})
}

func TestRegistryRules(t *testing.T) {
	r := registry(t, 0)
	for _, tt := range []struct {
		name   string
		rule   Rule
		c      identity.Change
		reason string
	}{
		{"district", RuleDistrict, identity.Change{District: "airport", Action: "put", Type: "software", ID: "x"}, `district: "airport", this is "harbour"`},
		{"action", RuleRegistry, identity.Change{District: "harbour", Action: "drop", Type: "software", ID: "x"}, `action: "drop", must be put or revoke`},
		{"type", RuleRegistry, identity.Change{District: "harbour", Action: "put", ID: "x"}, "type: must not be empty"},
		{"id", RuleRegistry, identity.Change{District: "harbour", Action: "put", Type: "software"}, "id: must not be empty"},
		{"approvals", RuleRegistry, identity.Change{District: "harbour", Action: "put", Type: "software", ID: "x", Approvals: make([]identity.Approval, 17)}, "approvals: 17, at most 16"},
		{"base", RuleRegistry, identity.Change{District: "harbour", Action: "put", Type: "software", ID: "x", Approvals: make([]identity.Approval, 1)}, "base: must be given where there are approvals"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := NewState(Edge())
			if v := mustRefuse(t, s, r, noon, sign(t, "registrar", identity.KindRegistry, &tt.c), tt.rule); v.Reason != tt.reason {
				t.Errorf("got reason %q, want %q", v.Reason, tt.reason)
			}
			covered[tt.rule] = true
			mustAccept(t, s, r, noon, sign(t, "registrar", identity.KindRegistry,
				&identity.Change{District: "harbour", Action: "put", Type: "software", ID: "x"}))
		})
	}
}

// A fault of the program is a refusal with its own rule.
func TestFailed(t *testing.T) {
	covered[RuleInternal] = true
	want := Verdict{Rule: RuleInternal, Reason: "record: judging it failed: index out of range"}
	if got := Failed(errors.New("index out of range")); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestZEveryRule runs last: every rule has a text and was shown to refuse.
func TestZEveryRule(t *testing.T) {
	names := map[Rule]bool{}
	for _, r := range Rules() {
		if names[r] {
			t.Errorf("rule %s is listed twice", r)
		}
		names[r] = true
		if text := r.Text(); !strings.HasSuffix(text, ".") {
			t.Errorf("rule %s has the text %q, want a sentence", r, text)
		}
		if !covered[r] && !t.Failed() && len(covered) > 20 { // not when tests were picked with -run
			t.Errorf("no test shows that rule %s refuses anything", r)
		}
	}
	for r := range covered {
		if !names[r] {
			t.Errorf("rule %s refuses and is not listed", r)
		}
	}
	if got := Rule("nonsense").Text(); got != "" {
		t.Errorf("got text %q for a rule that is none", got)
	}
}
