package validate

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// key returns the same key for the same name in every run.
func key(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("test key " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func pub(name string) identity.PublicKey {
	return identity.PublicKey(key(name).Public().(ed25519.PublicKey))
}

// junction has a detector of every kind: 0 stop-line, 1 advance, 2 area,
// 3 exit-area, 4 button, 5 oracle, and then loops up to n.
func junction(id traffic.JunctionID, n int) *traffic.Junction {
	j := &traffic.Junction{
		ID: id,
		Lanes: []traffic.Lane{
			{ID: "in", LengthCM: 9000, SpeedCMS: 1390, Capacity: 12, To: id},
			{ID: "fast", LengthCM: 20000, SpeedCMS: 2780, Capacity: 26, To: id},
			{ID: "out", LengthCM: 12000, SpeedCMS: 1390, Capacity: 16, From: id},
		},
		Groups: []traffic.Group{{Name: "a", Kind: traffic.Vehicles}, {Name: "b", Kind: traffic.Vehicles}, {Name: "w", Kind: traffic.Pedestrians}},
		Movements: []traffic.Movement{
			{From: "in", To: "out", Group: 0, SaturationPerHour: 1800},
			{From: "fast", To: "out", Group: 1, SaturationPerHour: 4000},
		},
		Detectors: []traffic.Detector{
			{ID: "stop", Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1},
			{ID: "adv", Kind: traffic.Advance, Lane: "fast", FromStopLineCM: 6000, LengthCM: 200, Movements: []int{1}, Group: -1},
			{ID: "area", Kind: traffic.Area, Lane: "in", LengthCM: 8000, Movements: []int{0}, Group: -1},
			{ID: "exit", Kind: traffic.ExitArea, Lane: "out", LengthCM: 12000, Movements: []int{0, 1}, Group: -1},
			{ID: "button", Kind: traffic.Button, Group: 2},
			{ID: "oracle", Kind: traffic.Oracle, Lane: "in", LengthCM: 20000, Movements: []int{0}, Group: -1},
		},
		Conflicts: [][]int{{1}, {0}, {}},
		Stages:    []traffic.Stage{{Name: "a", State: "Grr"}, {Name: "b", State: "rGG"}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000},
		Plan:      traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 20000, IntergreenMS: 4000}, {Stage: 1, DurationMS: 20000, IntergreenMS: 4000}}},
	}
	for i := len(j.Detectors); i < n; i++ {
		j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(fmt.Sprintf("loop-%d", i)), Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1})
	}
	return j
}

// registry holds junctions j1 and j2; devices d1 (j1), d2 (j2), part (j1, one
// detector only) and gone (j1, revoked); the service control that signs commands,
// the service clerk that signs requests, the registrar, and the official reader.
func registry(t testing.TB, detectors int) *identity.Registry {
	t.Helper()
	g := &identity.Genesis{District: "harbour"}
	add := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Body: b})
	}
	add(identity.TypeJunction, "j1", junction("j1", detectors))
	add(identity.TypeJunction, "j2", junction("j2", detectors))
	add(identity.TypeDevice, "d1", identity.Device{Junction: "j1", Key: pub("d1")})
	add(identity.TypeDevice, "d2", identity.Device{Junction: "j2", Key: pub("d2")})
	add(identity.TypeDevice, "part", identity.Device{Junction: "j1", Key: pub("part"), Detectors: []traffic.DetectorID{"stop"}})
	add(identity.TypeDevice, "gone", identity.Device{Junction: "j1", Key: pub("gone")})
	add(identity.TypeService, "control", identity.Service{Key: pub("control"), Signs: []identity.RecordKind{identity.KindCommand, identity.KindPlan}})
	add(identity.TypeService, "clerk", identity.Service{Key: pub("clerk"), Signs: []identity.RecordKind{identity.KindAnchor}})
	add(identity.TypeOfficial, "registrar", identity.Official{Key: pub("registrar"), Department: "traffic", Roles: []string{identity.Registrar}})
	add(identity.TypeOfficial, "reader", identity.Official{Key: pub("reader"), Department: "audit"})
	r, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(1, identity.IDOf(key("registrar").Public().(ed25519.PublicKey)),
		identity.Change{District: "harbour", Action: "revoke", Type: identity.TypeDevice, ID: "gone"}); err != nil {
		t.Fatal(err)
	}
	return r
}

// sign makes the candidate that decoding would make of a signed payload. The
// payload here is JSON of the record; the rules do not care.
func sign(t testing.TB, signer string, k identity.RecordKind, v any) *Candidate {
	t.Helper()
	payload, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	// Signatures are checked before Judge; only SignatureValid counts here.
	e := identity.Envelope{Kind: k, ContentType: identity.JSON, Key: identity.IDOf([]byte(pub(signer))), Payload: payload, Signature: make([]byte, 64)}
	c := &Candidate{Raw: e.Marshal(), Envelope: e, SignatureValid: true}
	switch v := v.(type) {
	case *traffic.Frame:
		c.Frame = v
	case *traffic.Command:
		c.Command = v
	case *identity.Change:
		c.Change = v
	case *traffic.Access:
		c.Access = v
	case *traffic.Request:
		c.Request = v
	case *traffic.Override:
		c.Override = v
	}
	return c
}

func filed(t testing.TB, typ identity.EntryType, id string, body any) identity.Entry {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return identity.Entry{Type: typ, ID: id, Status: identity.Active, Body: b}
}

// frame returns a good frame, the first of d1 since it started; mod changes it.
func frame(mod func(f *traffic.Frame)) *traffic.Frame {
	f := &traffic.Frame{
		District: "harbour", Junction: "j1", FrameKey: traffic.FrameKey{Device: "d1", BootEpoch: 3, Seq: 1},
		Time: noon, Interval: time.Second,
		Readings: []traffic.Reading{
			{Detector: "stop", Count: 1, OccupancyPermille: 400},
			{Detector: "adv", Count: 1, OccupancyPermille: 150, SpeedCMS: 1300},
			{Detector: "area", Count: 1, OccupancyPermille: 1000, Vehicles: 6, Halted: 5, HeadWaitMS: 12000},
			{Detector: "exit", OccupancyPermille: 300, Vehicles: 2},
			{Detector: "button", Count: 3, HeadWaitMS: 20000},
			{Detector: "oracle", Count: 1, Vehicles: 7, Halted: 5, HeadWaitMS: 12000, SpeedCMS: 900},
		},
		Signal: traffic.Signal{State: "Grr", Stage: 0, SinceMS: 4000, Mode: traffic.Coordinated},
	}
	if mod != nil {
		mod(f)
	}
	return f
}

// next returns the good frame that follows c by a second.
func next(t testing.TB, c *Candidate, mod func(f *traffic.Frame)) *Candidate {
	t.Helper()
	f := *c.Frame
	f.Seq++
	f.Time = f.Time.Add(time.Second)
	f.Prev = sha256.Sum256(c.Envelope.Payload)
	f.Readings = slices.Clone(f.Readings)
	if mod != nil {
		mod(&f)
	}
	return sign(t, string(c.Frame.Device), identity.KindFrame, &f)
}

// command returns a good command to j1.
func command(mod func(c *traffic.Command)) *traffic.Command {
	c := &traffic.Command{
		District: "harbour", Junction: "j1", Seq: 1, Height: 7, RestsOn: traffic.FrameKey{Device: "d1", BootEpoch: 3, Seq: 1},
		Policy: "day", PolicyVersion: "1", Controller: "maxpressure", ControllerVersion: "1",
		Issued: noon, Expires: noon.Add(2 * time.Second), Stage: 1, Rule: "pressure 4 over 1",
	}
	if mod != nil {
		mod(c)
	}
	return c
}

func hashOf(c *Candidate) ledger.Hash { return sha256.Sum256(c.Envelope.Payload) }

func encode(t testing.TB, s *State) []byte {
	t.Helper()
	b, err := s.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// mustAccept judges a candidate that is good.
func mustAccept(t testing.TB, s *State, r *identity.Registry, now time.Time, c *Candidate) Verdict {
	t.Helper()
	v := s.Judge(r, now, c)
	if !v.OK {
		t.Fatalf("a good record was refused by %s: %s", v.Rule, v.Reason)
	}
	return v
}

// mustRefuse judges a candidate that breaks a rule, and checks that nothing but
// a quarantine is remembered of it.
func mustRefuse(t testing.TB, s *State, r *identity.Registry, now time.Time, c *Candidate, want Rule) Verdict {
	t.Helper()
	before := encode(t, s)
	v := s.Judge(r, now, c)
	if v.OK || v.Rule != want {
		t.Fatalf("got %v %s %q, want a refusal by %s", v.OK, v.Rule, v.Reason, want)
	}
	if after := encode(t, s); want != RuleEquivocation && string(before) != string(after) {
		t.Fatalf("a record refused by %s changed the state", v.Rule)
	}
	return v
}
