package roadside

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const district = traffic.DistrictID("harbour")

func keyOf(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func publicOf(name string) ed25519.PublicKey { return keyOf(name).Public().(ed25519.PublicKey) }

// commanders lets the key of signal-control command, and no other.
func commanders(id identity.KeyID) (ed25519.PublicKey, bool) {
	if k := publicOf("signal-control"); identity.IDOf(k) == id {
		return k, true
	}
	return nil, false
}

// street is a city with a unit at each junction, in lockstep.
type street struct {
	t     *testing.T
	city  *sim.City
	units []*Unit
	seq   uint64
	// judged: every frame is put to the district's own rules.
	state    *validate.State
	registry *identity.Registry
	verifier *identity.Verifier
	frames   int
}

func newStreet(t *testing.T, c sim.Config, change func(*Config)) *street {
	t.Helper()
	city, err := sim.New(c)
	if err != nil {
		t.Fatal(err)
	}
	s := &street{t: t, city: city, state: validate.NewState(validate.Edge()), verifier: identity.NewVerifier()}
	g := identity.Genesis{District: district}
	put := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Status: identity.Active, Body: b})
	}
	for _, j := range city.Junctions() {
		d, err := city.Driver(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		dev := "rsu-" + string(j.ID)
		cfg := Config{District: district, Junction: j, Device: traffic.DeviceID(dev), Key: keyOf(dev), BootEpoch: 1, Commander: commanders, Driver: d}
		if change != nil {
			change(&cfg)
		}
		u, err := New(city.Now(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		s.units = append(s.units, u)
		put(identity.TypeJunction, string(j.ID), j)
		put(identity.TypeDevice, dev, identity.Device{Junction: j.ID, Key: identity.PublicKey(publicOf(dev))})
	}
	if s.registry, err = identity.NewRegistry(&g); err != nil {
		t.Fatal(err)
	}
	return s
}

// judge puts an envelope to the rules of the district, all of which must pass.
func (s *street) judge(envelope []byte) *traffic.Frame {
	s.t.Helper()
	cs := []validate.Candidate{wire.Candidate(envelope, make([]byte, 32))}
	wire.VerifySignatures(s.verifier, s.registry, cs)
	if v := s.state.Judge(s.registry, s.city.Now(), &cs[0]); !v.OK || v.Gap != 0 {
		s.t.Fatalf("frame refused: %s: %s (gap %d)\n%+v", v.Rule, v.Reason, v.Gap, cs[0].Frame)
	}
	s.frames++
	return cs[0].Frame
}

// step ticks all units, steps the city and, each second, calls sensed with
// each unit's frame.
func (s *street) step(sensed func(u *Unit, f *traffic.Frame)) {
	s.t.Helper()
	now := s.city.Now()
	for _, u := range s.units {
		ticked, err := u.Tick(now)
		if err != nil {
			s.t.Fatal(err)
		}
		periodic := now.UnixMilli()%1000 == 0
		if !periodic && !ticked.Changed {
			continue
		}
		var e []byte
		var f *traffic.Frame
		if periodic {
			e, f, err = u.Frame(now)
		} else {
			e, f, err = u.EventFrame(now)
		}
		if err != nil {
			s.t.Fatal(err)
		}
		if got := s.judge(e); fmt.Sprintf("%+v", got.FrameKey) != fmt.Sprintf("%+v", f.FrameKey) || got.Interval != f.Interval || len(got.Readings) != len(f.Readings) {
			s.t.Fatalf("the envelope holds %+v, the frame is %+v", got, f)
		}
		if periodic && sensed != nil {
			sensed(u, f)
		}
	}
	if _, err := s.city.Step(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *street) run(d time.Duration, sensed func(u *Unit, f *traffic.Frame)) {
	s.t.Helper()
	for end := s.city.Now().Add(d); s.city.Now().Before(end); {
		s.step(sensed)
	}
}

func (s *street) command(j traffic.JunctionID, stage int) traffic.Command {
	s.seq++
	now := s.city.Now()
	return traffic.Command{District: district, Junction: j, Seq: s.seq, Height: 1, Policy: "test", Controller: "test",
		Issued: now, Expires: now.Add(2 * time.Second), Stage: stage, Rule: "test"}
}

func seal(key string, c traffic.Command) []byte {
	return identity.Sign(keyOf(key), identity.KindCommand, identity.Protobuf, wire.EncodeCommand(&c)).Marshal()
}

// Whatever is wrong with a command, it is refused by the rule that says so,
// counted, and told in the next frame; and every valid one between is obeyed.
func TestCommandsRefused(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	u := s.units[0]
	j := u.cfg.Junction.ID
	s.run(10*time.Second, nil)
	valid := func() []byte { return seal("signal-control", s.command(j, 0)) }
	changed := func(f func(*traffic.Command)) func() []byte {
		return func() []byte {
			c := s.command(j, 1)
			f(&c)
			return seal("signal-control", c)
		}
	}
	var obeyed []byte // the newest valid command
	for _, tc := range []struct {
		name   string
		make   func() []byte
		rule   Rule
		reason string
	}{
		{"oversized", func() []byte { return bytes.Repeat([]byte{1}, MaxCommand+1) }, RuleSize, "envelope: 8193 bytes, at most 8192"},
		{"oversized and signed", changed(func(c *traffic.Command) { c.Rule = strings.Repeat("x", MaxCommand) }), RuleSize, "at most 8192"},
		{"empty", func() []byte { return nil }, RuleDecode, "kind"},
		{"noise", func() []byte { return []byte("not an envelope") }, RuleDecode, "envelope: "},
		{"truncated", func() []byte { e := valid(); return e[:len(e)/2] }, RuleDecode, "truncated"},
		{"unsigned", func() []byte {
			e, err := identity.ParseEnvelope(valid())
			if err != nil {
				t.Fatal(err)
			}
			e.Signature = nil
			return e.Marshal()
		}, RuleDecode, "signature: must be 64 bytes, has 0"},
		{"frame", func() []byte {
			c := s.command(j, 1)
			return identity.Sign(keyOf("signal-control"), identity.KindFrame, identity.Protobuf, wire.EncodeCommand(&c)).Marshal()
		}, RuleKind, `kind: "frame", must be "command"`},
		{"wrong key", func() []byte { return seal("stranger", s.command(j, 1)) }, RuleKey, "may not command here"},
		{"the device's own key", func() []byte { return seal("rsu-"+string(j), s.command(j, 1)) }, RuleKey, "may not command here"},
		{"forged under the right key's name", func() []byte {
			c := s.command(j, 1)
			e := identity.Sign(keyOf("stranger"), identity.KindCommand, identity.Protobuf, wire.EncodeCommand(&c))
			e.Key = identity.IDOf(publicOf("signal-control"))
			return e.Marshal()
		}, RuleSignature, "signature: not by key"},
		{"changed after signing", func() []byte {
			e, err := identity.ParseEnvelope(valid())
			if err != nil {
				t.Fatal(err)
			}
			c := s.command(j, 1)
			e.Payload = wire.EncodeCommand(&c)
			return e.Marshal()
		}, RuleSignature, "signature: not by key"},
		{"signed nonsense", func() []byte {
			return identity.Sign(keyOf("signal-control"), identity.KindCommand, identity.Protobuf, []byte("nonsense")).Marshal()
		}, RulePayload, "payload: Command"},
		{"unknown JSON field", func() []byte {
			return identity.Sign(keyOf("signal-control"), identity.KindCommand, identity.JSON, []byte(`{"seq":"9","greeen":1}`)).Marshal()
		}, RulePayload, "greeen"},
		{"wrong district", changed(func(c *traffic.Command) { c.District = "airport" }), RuleDistrict, `district: "airport", this is "harbour"`},
		{"wrong junction", changed(func(c *traffic.Command) { c.Junction = "h0909" }), RuleJunction, `junction: "h0909", this is "h0101"`},
		{"replayed", func() []byte { return obeyed }, RuleSeq, "must be above"},
		{"reordered", changed(func(c *traffic.Command) { c.Seq = 1 }), RuleSeq, "seq: 1, must be above"},
		{"expired", changed(func(c *traffic.Command) {
			c.Issued, c.Expires = c.Issued.Add(-3*time.Second), c.Expires.Add(-3*time.Second)
		}), RuleExpired, "expires: 1s ago"},
		{"from before the boot", changed(func(c *traffic.Command) { c.RestsOn = traffic.FrameKey{Device: u.cfg.Device, Seq: 7} }), RuleBoot, "rests_on: frame rsu-h0101/0/7, this is boot epoch 1"},
		{"an hour old", changed(func(c *traffic.Command) { c.Issued, c.Expires = c.Issued.Add(-time.Hour), c.Expires.Add(-time.Hour) }), RuleExpired, "expires: 59m58s ago"},
		{"from the future", changed(func(c *traffic.Command) {
			c.Issued, c.Expires = c.Issued.Add(501*time.Millisecond), c.Expires.Add(time.Second)
		}), RuleFuture, "issued: 501ms ahead of the clock, at most 500ms"},
		{"in force for an hour", changed(func(c *traffic.Command) { c.Expires = c.Expires.Add(time.Hour) }), RuleValidity, "at most 10s"},
		{"stage that is not there", changed(func(c *traffic.Command) { c.Stage = 4 }), RuleInterlock, "stage 4: junction h0101 has stages 0 to 3"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			obeyed = valid()
			if r := u.Command(s.city.Now(), obeyed); !r.Applied || r.Seq != s.seq {
				t.Fatalf("valid command before: got %+v", r)
			}
			bad := tc.make()
			before := u.Counters()
			lamps := u.Status(s.city.Now()).Signal
			r := u.Command(s.city.Now(), bad)
			after := u.Counters()
			if r.Applied || !strings.HasPrefix(r.Reason, string(tc.rule)+": ") || !strings.Contains(r.Reason, tc.reason) {
				t.Errorf("got %+v, want it refused by %q with %q", r, tc.rule, tc.reason)
			}
			if after.Refused[tc.rule] != before.Refused[tc.rule]+1 || after.RefusedCommands() != before.RefusedCommands()+1 || after.Applied != before.Applied {
				t.Errorf("counted %v, then %v; want one more by %q and none applied", before.Refused, after.Refused, tc.rule)
			}
			if now := u.Status(s.city.Now()).Signal; now != lamps {
				t.Errorf("a refused command changed the signal from %+v to %+v", lamps, now)
			}
			good := s.command(j, 0)
			if r := u.Command(s.city.Now(), seal("signal-control", good)); !r.Applied {
				t.Errorf("valid command after: got %+v", r)
			}
			var told *traffic.Frame
			for told == nil {
				s.step(func(_ *Unit, f *traffic.Frame) { told = f })
			}
			refused, applied := 0, 0
			for _, x := range told.Results {
				if x.Applied {
					applied++
				} else if x == r {
					refused++
				}
			}
			if refused != 1 || applied != 2 {
				t.Errorf("the next frame tells of %+v, want 2 applied and %+v", told.Results, r)
			}
		})
	}
	c := u.Counters()
	t.Logf("applied %d, refused %v", c.Applied, c.Refused)
}

// A flood of what nobody signed does not push what was signed out of a frame,
// nor the frame out of its bounds.
func TestFloodOfForgeries(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	u := s.units[0]
	for i := range 1000 {
		u.Command(s.city.Now(), []byte(strings.Repeat("x", i)))
		if i%100 == 0 {
			if r := u.Command(s.city.Now(), seal("signal-control", s.command(u.cfg.Junction.ID, 0))); !r.Applied {
				t.Fatalf("valid command in the flood: %+v", r)
			}
		}
	}
	e, f, err := u.Frame(s.city.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.judge(e)
	if c := u.Counters(); len(f.Results) != 10+maxStrays || c.Refused[RuleDecode] != 1000 || c.ResultsDropped != 1000-maxStrays || c.Applied != 10 {
		t.Errorf("got %d results, %+v; want 10 applied and %d refused of 1000", len(f.Results), c, maxStrays)
	}
	if _, f, err = u.Frame(s.city.Now()); err != nil || len(f.Results) != 0 {
		t.Errorf("results were told twice: %v, %v", f.Results, err)
	}
}

// Commands stop: within 2 s, or as soon as the change under way has ended, the
// unit is on its own plan; they come back, and it obeys again. Nothing unsafe is
// shown or even wanted on the way.
func TestFallbackAndReturn(t *testing.T) {
	for _, cut := range []time.Duration{20 * time.Second, 21500 * time.Millisecond, 25 * time.Second, 33 * time.Second} {
		t.Run(cut.String(), func(t *testing.T) {
			s := newStreet(t, sim.Config{Seed: 3, Junctions: 1, FlatDemand: true}, nil)
			u := s.units[0]
			next := func(mode traffic.Mode, most time.Duration) time.Duration {
				for begin := s.city.Now(); s.city.Now().Sub(begin) <= most; s.step(nil) {
					if u.Status(s.city.Now()).Signal.Mode == mode {
						return s.city.Now().Sub(begin)
					}
				}
				t.Fatalf("not %s within %v: %+v", mode, most, u.Status(s.city.Now()))
				return 0
			}
			if m := u.Status(s.city.Now()).Signal.Mode; m != traffic.Local {
				t.Errorf("at the start got mode %s, want local", m)
			}
			order := 0
			obey := func(u *Unit, f *traffic.Frame) {
				if r := u.Obey(s.city.Now(), s.command(u.cfg.Junction.ID, order)); !r.Applied {
					t.Fatalf("got %+v", r)
				}
			}
			// Commands change the stage every 12 s, so that the cuts fall into
			// greens and into changes.
			for end := s.city.Now().Add(cut); s.city.Now().Before(end); {
				order = int(s.city.Now().Unix()/12) % 4
				s.step(obey)
			}
			if m := u.Status(s.city.Now()).Signal.Mode; m != traffic.Coordinated {
				t.Fatalf("with commands got mode %s, want coordinated", m)
			}
			changing := u.Status(s.city.Now()).Signal.Stage < 0
			took := next(traffic.Local, 20*time.Second)
			if !changing && u.Counters().Fallbacks == 1 && took > 2100*time.Millisecond && u.Status(s.city.Now()).Signal.SinceMS > 200 {
				t.Errorf("fell back after %v without a change of stage in the way, want 2 s", took)
			}
			t.Logf("fell back after %v (changing: %v)", took, changing)

			// Its own plan serves every group within a cycle or so.
			green := map[int]bool{}
			for end := s.city.Now().Add(3 * time.Minute); s.city.Now().Before(end); s.step(nil) {
				st := u.Status(s.city.Now()).Signal.State
				for g := range len(st) {
					green[g] = green[g] || st.At(g).Go()
				}
			}
			if len(green) != len(u.cfg.Junction.Groups) {
				t.Fatal("state of another length")
			}
			for g, ok := range green {
				if !ok {
					t.Errorf("the local plan never served %q", u.cfg.Junction.Groups[g].Name)
				}
			}
			order = 2
			s.run(time.Second, obey)
			if m := u.Status(s.city.Now()).Signal.Mode; m != traffic.Coordinated {
				t.Errorf("after a command got mode %s, want coordinated", m)
			}
			s.run(40*time.Second, obey)
			if got := u.Status(s.city.Now()).Signal; got.Stage != 2 {
				t.Errorf("got %+v, want stage 2 as ordered", got)
			}
			s.safe()
			if c := u.Counters(); c.Fallbacks != 1 || c.Returns != 2 {
				t.Errorf("counted %d fallbacks and %d returns, want 1 and 2", c.Fallbacks, c.Returns)
			}
		})
	}
}

// safe: no unsafe state was shown, none was even wanted, nothing tripped.
func (s *street) safe() {
	s.t.Helper()
	if n := s.city.Measures().UnsafeStates; n != 0 {
		s.t.Errorf("%d unsafe states were shown", n)
	}
	for _, u := range s.units {
		if c := u.Counters(); len(c.StatesRefused) != 0 || c.Trips != 0 || c.LampFaults != 0 {
			s.t.Errorf("%s: the interlock refused %v, tripped %d times, %d lamp faults", u.cfg.Junction.ID, c.StatesRefused, c.Trips, c.LampFaults)
		}
	}
}

// The whole city under each controller, every frame put to the district's
// rules: all are taken, nothing trips, and traffic flows.
func TestCityUnderControl(t *testing.T) {
	minutes := 12
	switch {
	case raceEnabled:
		minutes = 2
	case testing.Short():
		minutes = 2
	}
	rules, err := timing.RulesNamed("field")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fixed", "actuated", "maxpressure", "local"} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, sim.Config{Seed: 9, FlatDemand: true, AmbulanceEvery: time.Minute}, nil)
			memory := map[traffic.JunctionID]timing.Memory{}
			obey := func(u *Unit, f *traffic.Frame) {
				c, err := timing.Named(name)
				if err != nil {
					t.Fatal(err)
				}
				m, d := c.Next(u.cfg.Junction, rules, memory[f.Junction], timing.Observe(u.cfg.Junction, f))
				memory[f.Junction] = m
				if r := u.Obey(s.city.Now(), s.command(f.Junction, d.Stage)); !r.Applied {
					t.Fatalf("got %+v", r)
				}
			}
			if name == "local" {
				obey = nil
			}
			s.run(time.Duration(minutes)*time.Minute, obey)
			s.safe()
			m := s.city.Measures()
			t.Logf("%d frames; %+v", s.frames, m)
			if m.Crossed < int64(50*(minutes-1)) || m.Pedestrians.MaxWaitMS > 240_000 {
				t.Errorf("got %d over the stop lines and a walker's wait of %d ms", m.Crossed, m.Pedestrians.MaxWaitMS)
			}
			for _, u := range s.units {
				want := traffic.Coordinated
				if obey == nil {
					want = traffic.Local
				}
				if got := u.Status(s.city.Now()).Signal.Mode; got != want {
					t.Errorf("%s: got mode %s, want %s", u.cfg.Junction.ID, got, want)
				}
			}
		})
	}
}

// The chain of a thousand frames holds, periodic and at events, and shows what
// is left out.
func TestHashChain(t *testing.T) {
	s := newStreet(t, sim.Config{Seed: 4, Junctions: 1}, nil)
	u := s.units[0]
	var prev [32]byte
	events := 0
	for n := uint64(1); n <= 1000; n++ {
		if _, err := u.Tick(s.city.Now()); err != nil {
			t.Fatal(err)
		}
		if n%3 == 0 {
			e, _, err := u.EventFrame(s.city.Now())
			if err != nil {
				t.Fatal(err)
			}
			prev, n = sha256.Sum256(payloadOf(t, s, e, prev, n)), n+1
		}
		e, f, err := u.Frame(s.city.Now())
		if err != nil {
			t.Fatal(err)
		}
		prev = sha256.Sum256(payloadOf(t, s, e, prev, n))
		events += len(f.Events)
		for range 10 {
			if _, err := s.city.Step(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if events == 0 {
		t.Error("no event in a thousand frames")
	}
	// A frame that is left out breaks it, and the rules say so.
	if _, _, err := u.Frame(s.city.Now()); err != nil {
		t.Fatal(err)
	}
	e, _, err := u.Frame(s.city.Now())
	if err != nil {
		t.Fatal(err)
	}
	cs := []validate.Candidate{wire.Candidate(e, make([]byte, 32))}
	wire.VerifySignatures(s.verifier, s.registry, cs)
	if v := s.state.Judge(s.registry, s.city.Now(), &cs[0]); v.Gap != 1 {
		t.Errorf("one frame left out: got %+v, want a gap of 1", v)
	}
}

func payloadOf(t *testing.T, s *street, envelope []byte, prev [32]byte, seq uint64) []byte {
	t.Helper()
	e, err := identity.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	f := s.judge(envelope)
	if f.Prev != prev || f.Seq != seq {
		t.Fatalf("frame %d has prev %x, want %d and %x", f.Seq, f.Prev[:4], seq, prev[:4])
	}
	return e.Payload
}

func TestTripIsReportedAndReset(t *testing.T) {
	s := newStreet(t, sim.Config{Seed: 4, Junctions: 1}, nil)
	u := s.units[0]
	j := u.cfg.Junction.ID
	s.run(30*time.Second, nil)
	if err := u.Reset(s.city.Now(), "A. Person"); err == nil || !strings.Contains(err.Error(), "has not tripped") {
		t.Errorf("reset without a trip: got %v", err)
	}
	// A faulty sequencer: it believes in yellows of half a second.
	hasty := *u.cfg.Junction
	hasty.Timing.YellowMS, hasty.Timing.MinGreenMS = 500, 0
	was := u.Status(s.city.Now()).Signal
	u.sequencer = timing.NewSequencer(&hasty, u.rules, s.city.Now())
	u.sequencer.Resume(was.State, s.city.Now())
	var tripped *traffic.Frame
	for range 1200 {
		s.step(func(_ *Unit, f *traffic.Frame) {
			if f.Signal.Mode == traffic.Tripped && tripped == nil {
				tripped = f
			}
		})
		if tripped != nil {
			break
		}
	}
	if tripped == nil || tripped.Signal.Trip == "" || tripped.Signal.Stage != -1 {
		t.Fatalf("got frame %+v, want a trip in it", tripped)
	}
	t.Log(tripped.Signal.Trip)
	if c := u.Counters(); c.Trips != 1 {
		t.Errorf("got %d trips, want 1", c.Trips)
	}
	r := u.Command(s.city.Now(), seal("signal-control", s.command(j, 0)))
	if r.Applied || !strings.HasPrefix(r.Reason, "interlock: stage 0: the interlock of junction h0101 has tripped") {
		t.Errorf("command while tripped: got %+v", r)
	}
	s.run(20*time.Second, nil)
	if got, want := u.Status(s.city.Now()).Signal.State, traffic.AllOf(traffic.FlashRed, len(u.cfg.Junction.Groups)); got != want {
		t.Errorf("tripped lamps show %q, want %q", got, want)
	}
	if err := u.Reset(s.city.Now(), " "); err == nil || !strings.Contains(err.Error(), "needs the name of the person") {
		t.Errorf("nameless reset: got %v", err)
	}
	if err := u.Reset(s.city.Now(), "A. Person"); err != nil {
		t.Fatal(err)
	}
	reached := false
	for range 300 {
		s.step(nil)
		reached = reached || u.Status(s.city.Now()).Signal.Stage >= 0
	}
	if got := u.Status(s.city.Now()).Signal; got.Mode != traffic.Local || !reached || got.Trip != "" {
		t.Errorf("after the reset got %+v, want the local plan", got)
	}
	if r := u.Command(s.city.Now(), seal("signal-control", s.command(j, 0))); !r.Applied {
		t.Errorf("command after the reset: got %+v", r)
	}
	if n := s.city.Measures().UnsafeStates; n != 0 {
		t.Errorf("%d unsafe states were shown", n)
	}
}

// Events say when each group's lamps changed, to the step.
func TestEvents(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	u := s.units[0]
	counts := map[uint16]int{}
	open := map[uint16]time.Time{}
	s.run(5*time.Second, nil)
	for end := s.city.Now().Add(3 * time.Minute); s.city.Now().Before(end); {
		now := s.city.Now()
		if _, err := u.Tick(now); err != nil {
			t.Fatal(err)
		}
		if now.UnixMilli()%1000 == 0 {
			_, f, err := u.Frame(now)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range f.Events {
				at := f.Time.Add(-time.Duration(e.OffsetMS) * time.Millisecond)
				counts[e.Code]++
				switch e.Code {
				case 8:
					open[e.Param] = at
				case 10:
					if d := at.Sub(open[e.Param]); d != 3*time.Second {
						t.Errorf("group %d: red clearance %v after yellow, want 3 s", e.Param, d)
					}
				case 22:
					open[e.Param] = at
				case 23:
					if g := u.cfg.Junction.Groups[e.Param-1]; at.Sub(open[e.Param]) != time.Duration(g.PedClearMS)*time.Millisecond {
						t.Errorf("group %d: don't walk %v after the clearance began, want %d ms", e.Param, at.Sub(open[e.Param]), g.PedClearMS)
					}
				}
			}
		}
		if _, err := s.city.Step(); err != nil {
			t.Fatal(err)
		}
	}
	for _, code := range []uint16{1, 7, 8, 9, 10, 21, 22, 23} {
		if counts[code] == 0 {
			t.Errorf("no event %d in two cycles: %v", code, counts)
		}
	}
}

// faulty is a driver whose calls can be made to fail.
type faulty struct {
	Driver
	sense, show, observe error
	dark                 bool
}

func (f *faulty) Sense() ([]traffic.Reading, error) {
	if f.sense != nil {
		return nil, f.sense
	}
	return f.Driver.Sense()
}

func (f *faulty) Show(s traffic.State) error {
	if f.show != nil {
		return f.show
	}
	return f.Driver.Show(s)
}

func (f *faulty) Observed() (traffic.State, error) {
	if f.observe != nil {
		return "", f.observe
	}
	s, err := f.Driver.Observed()
	if f.dark {
		s = traffic.AllOf(traffic.Dark, len(s))
	}
	return s, err
}

func TestFaultyCabinet(t *testing.T) {
	var d *faulty
	s := newStreet(t, sim.Config{Junctions: 1}, func(c *Config) {
		d = &faulty{Driver: c.Driver}
		c.Driver = d
	})
	u := s.units[0]
	s.run(10*time.Second, nil)
	broken := errors.New("cable cut")

	d.sense = broken
	e, f, err := u.Frame(s.city.Now())
	if err != nil || len(f.Readings) != 0 || f.Interval != 0 || u.Counters().SenseErrors != 1 {
		t.Errorf("blind unit: got %+v, %v and %d counted, want a frame without readings or interval", f, err, u.Counters().SenseErrors)
	}
	s.judge(e)
	d.sense = nil

	d.dark = true
	if e, f, err = u.Frame(s.city.Now()); err != nil || f.Signal.State.At(0) != traffic.Dark || u.Counters().LampFaults != 1 {
		t.Errorf("dark lamps: got %+v, %v and %d counted", f.Signal, err, u.Counters().LampFaults)
	}
	s.judge(e)
	d.dark = false

	d.observe = broken
	if e, f, err = u.Frame(s.city.Now()); err != nil || f.Signal.State != u.shown || u.Counters().ObserveErrors != 1 {
		t.Errorf("unreadable lamps: got %+v, %v and %d counted", f.Signal, err, u.Counters().ObserveErrors)
	}
	s.judge(e)
	d.observe = nil

	d.show = broken
	if _, err := u.Tick(s.city.Now()); !errors.Is(err, broken) || u.Counters().ShowErrors != 1 {
		t.Errorf("lamps that cannot be set: got %v and %d counted", err, u.Counters().ShowErrors)
	}
}

// A driver that fails for a while, in whatever part of a change, leaves no step
// out: the lamps see every yellow and every red for as long as they must.
func TestLampsMissStates(t *testing.T) {
	broken := errors.New("cable cut")
	step := 1700 * time.Millisecond
	if testing.Short() || raceEnabled {
		step = 6100 * time.Millisecond
	}
	for _, blind := range []bool{false, true} {
		for _, outage := range []time.Duration{2 * time.Second, 6 * time.Second, 20 * time.Second} {
			for at := time.Duration(0); at < 40*time.Second; at += step {
				var d *faulty
				s := newStreet(t, sim.Config{Junctions: 1}, func(c *Config) {
					d = &faulty{Driver: c.Driver}
					c.Driver = d
				})
				u := s.units[0]
				judge, err := interlock.New(u.cfg.Junction, s.city.Now())
				if err != nil {
					t.Fatal(err)
				}
				begin := s.city.Now().Add(at)
				greens := map[traffic.State]bool{}
				for end := begin.Add(outage + 90*time.Second); s.city.Now().Before(end); {
					now := s.city.Now()
					d.show, d.observe = nil, nil
					if !now.Before(begin) && now.Before(begin.Add(outage)) {
						d.show = broken
						if blind {
							d.observe = broken
						}
					}
					if _, err := u.Tick(now); (err != nil) != (d.show != nil) {
						t.Fatalf("got %v", err)
					}
					lamps, err := d.Driver.Observed()
					if err != nil {
						t.Fatal(err)
					}
					before := judge.Counts().Refused
					judge.Supervise(now, lamps)
					if after := judge.Counts().Refused; len(after) > 0 {
						t.Fatalf("blind %v, %v from %v on: at %v the lamps show %q: %v after %v", blind, outage, at, now.Sub(begin), lamps, after, before)
					}
					if now.After(begin.Add(outage)) {
						greens[lamps] = true
					}
					if _, err := s.city.Step(); err != nil {
						t.Fatal(err)
					}
				}
				if u.Counters().Trips != 0 || len(greens) < 3 {
					t.Errorf("blind %v, %v from %v on: got %d trips and %d states afterwards, want the plan to go on", blind, outage, at, u.Counters().Trips, len(greens))
				}
			}
		}
	}
}

// A refusal quotes what it was given, and a frame takes valid UTF-8 only: a
// signed command of any bytes must not stop the unit.
func TestRefusalOfAnyBytes(t *testing.T) {
	s := newStreet(t, sim.Config{Junctions: 1}, nil)
	u := s.units[0]
	for _, payload := range []string{"{\xff", "\xff", "{\"seq\":\xff}", strings.Repeat("\xff", 1000)} {
		for _, content := range []string{identity.JSON, identity.Protobuf} {
			e := identity.Sign(keyOf("signal-control"), identity.KindCommand, content, []byte(payload))
			if res := u.Command(s.city.Now(), e.Marshal()); res.Applied || !utf8.ValidString(res.Reason) || len(res.Reason) > maxText {
				t.Errorf("%s %.20q: got applied %v, reason %q", content, payload, res.Applied, res.Reason)
			}
		}
	}
	envelope, _, err := u.Frame(s.city.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.judge(envelope)
}

// Setting the clock back prolongs no command, and frames do not go back in time.
func TestClockSteps(t *testing.T) {
	for _, step := range []time.Duration{-time.Hour, -1500 * time.Millisecond, -300 * time.Millisecond, time.Second, time.Hour} {
		t.Run(step.String(), func(t *testing.T) {
			s := newStreet(t, sim.Config{Junctions: 1}, nil)
			u := s.units[0]
			s.run(20*time.Second, func(u *Unit, f *traffic.Frame) { u.Obey(s.city.Now(), s.command(f.Junction, 0)) })
			if m := u.Status(s.city.Now()).Signal.Mode; m != traffic.Coordinated {
				t.Fatalf("got mode %s", m)
			}
			var last time.Time
			for i := range 40 {
				now := s.city.Now().Add(step)
				if _, err := u.Tick(now); err != nil {
					t.Fatal(err)
				}
				_, f, err := u.Frame(now)
				if err != nil {
					t.Fatal(err)
				}
				if i > 0 && f.Time.Before(last) {
					t.Errorf("frame of %v after one of %v", f.Time, last)
				}
				last = f.Time
				if f.Interval < 0 {
					t.Errorf("got interval %v", f.Interval)
				}
				if _, err := s.city.Step(); err != nil {
					t.Fatal(err)
				}
			}
			if m := u.Status(s.city.Now()).Signal.Mode; m != traffic.Local {
				t.Errorf("4 s after the last command got mode %s, want local", m)
			}
			if c := u.Counters(); c.Trips != 0 || (step < -time.Second) != (c.ClockSteps > 0) {
				t.Errorf("got %d trips, %d steps of the clock counted", c.Trips, c.ClockSteps)
			}
		})
	}
}

func TestConfigErrors(t *testing.T) {
	_, err := New(time.Now(), Config{StaleAfter: -1, Local: &timing.Controller{}, Junction: &traffic.Junction{}})
	for _, want := range []string{"district: must not be empty", "junction: ", "device: must not be empty", "key: 0 bytes", "boot_epoch: 0", "commander: must be set",
		"driver: must be set", "stale_after: -1ns is negative", "local: has no function"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
}

// Whatever bytes come as a command: no panic, no unlawful want, and only what
// signal-control has signed is obeyed.
func FuzzCommand(f *testing.F) {
	city, err := sim.New(sim.Config{Junctions: 1})
	if err != nil {
		f.Fatal(err)
	}
	j := city.Junctions()[0]
	d, err := city.Driver(j.ID)
	if err != nil {
		f.Fatal(err)
	}
	now := city.Now()
	c := traffic.Command{District: district, Junction: j.ID, Seq: 1, Issued: now, Expires: now.Add(time.Second)}
	valid := seal("signal-control", c)
	f.Add(valid)
	f.Add(seal("stranger", c))
	f.Add(valid[:len(valid)-1])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := New(now, Config{District: district, Junction: j, Device: "d", Key: keyOf("d"), BootEpoch: 1, Commander: commanders, Driver: d})
		if err != nil {
			t.Fatal(err)
		}
		if r := u.Command(now, b); r.Applied != bytes.Equal(b, valid) || !r.Applied && r.Reason == "" || len(r.Reason) > maxText {
			t.Errorf("got %+v for %x", r, b)
		}
	})
}

// What a frame of 24 readings costs the unit: sensing, encoding, signing.
func BenchmarkFrame(b *testing.B) {
	city, err := sim.New(sim.Config{FlatDemand: true})
	if err != nil {
		b.Fatal(err)
	}
	j := city.Junctions()[0]
	d, err := city.Driver(j.ID)
	if err != nil {
		b.Fatal(err)
	}
	u, err := New(city.Now(), Config{District: district, Junction: j, Device: "d", Key: keyOf("d"), BootEpoch: 1, Commander: commanders, Driver: d})
	if err != nil {
		b.Fatal(err)
	}
	n := 0
	for i := 0; b.Loop(); i++ {
		now := city.Now().Add(time.Duration(i) * time.Second)
		if _, err := u.Tick(now); err != nil {
			b.Fatal(err)
		}
		e, _, err := u.Frame(now)
		if err != nil {
			b.Fatal(err)
		}
		n = len(e)
	}
	b.ReportMetric(float64(n), "bytes")
}

// lagging is a cabinet whose lamps follow an order later: a simulator with long
// steps, or a relay.
type lagging struct {
	Driver
	lag   time.Duration
	now   func() time.Time
	shown []struct {
		at time.Time
		s  traffic.State
	}
}

func (l *lagging) Show(s traffic.State) error {
	l.shown = append(l.shown, struct {
		at time.Time
		s  traffic.State
	}{l.now(), s})
	return l.Driver.Show(s)
}

func (l *lagging) Observed() (traffic.State, error) {
	if len(l.shown) == 0 {
		return l.Driver.Observed()
	}
	s := l.shown[0].s
	for _, x := range l.shown {
		if l.now().Sub(x.at) >= l.lag {
			s = x.s
		}
	}
	return s, nil
}

// Lamps that follow within a second are no fault, and a frame says what they
// show; such that follow later are one.
func TestLampsMayFollowWithTheNextStep(t *testing.T) {
	for _, c := range []struct {
		lag    time.Duration
		faulty bool
	}{{time.Second, false}, {2500 * time.Millisecond, true}} {
		t.Run(c.lag.String(), func(t *testing.T) {
			var d *lagging
			s := newStreet(t, sim.Config{Junctions: 1}, func(cfg *Config) {
				d = &lagging{Driver: cfg.Driver, lag: c.lag}
				cfg.Driver = d
			})
			d.now = s.city.Now
			s.run(90*time.Second, nil)
			if got := s.units[0].Counters().LampFaults; (got != 0) != c.faulty {
				t.Errorf("counted %d lamp faults, want some: %v", got, c.faulty)
			}
		})
	}
}
