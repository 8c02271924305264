package validate

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// offices returns a registry with the gateway, which signs for everybody, and
// two agencies of which fire signs for itself.
func offices(t testing.TB) *identity.Registry {
	t.Helper()
	r := registry(t, 6)
	g := &identity.Genesis{District: "harbour"}
	for _, typ := range []identity.EntryType{identity.TypeJunction, identity.TypeService, identity.TypeOfficial} {
		g.Entries = append(g.Entries, r.Entries(typ)...)
	}
	add := func(typ identity.EntryType, id string, body any) {
		g.Entries = append(g.Entries, filed(t, typ, id, body))
	}
	add(identity.TypeService, "gateway", identity.Service{Key: pub("gateway"), Signs: []identity.RecordKind{identity.KindAccess, identity.KindRequest, identity.KindOverride}})
	add(identity.TypeAgency, "fire", identity.Agency{Name: "Fire brigade", Key: pub("fire")})
	add(identity.TypeAgency, "bus", identity.Agency{Name: "Buses", Key: pub("bus")})
	out, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func aRequest(mod func(r *traffic.Request)) *traffic.Request {
	r := &traffic.Request{District: "harbour", Turn: traffic.Turn{Epoch: 1, Seq: 1}, Time: noon, ID: "r1", Revision: 1,
		By: traffic.Agent{Agency: "fire", Name: "fire-desk-1"}, Class: traffic.Emergency, Vehicle: "engine-3", Purpose: "emergency-response",
		Stops: []traffic.Stop{{Junction: "j1", Group: "a", Arrival: noon.Add(30 * time.Second)}, {Junction: "j2", Group: "b", Arrival: noon.Add(time.Minute)}}, Expires: noon.Add(5 * time.Minute)}
	if mod != nil {
		mod(r)
	}
	return r
}

func anOverride(mod func(o *traffic.Override)) *traffic.Override {
	o := &traffic.Override{District: "harbour", Turn: traffic.Turn{Epoch: 1, Seq: 1}, Time: noon, ID: "o1", Junction: "j1", Action: traffic.OverrideHold, Stage: -1,
		Reason: "incident", By: traffic.Agent{Agency: "roads", Name: "op-1"}, Expires: noon.Add(time.Minute)}
	if mod != nil {
		mod(o)
	}
	return o
}

func anAccess(mod func(a *traffic.Access)) *traffic.Access {
	a := &traffic.Access{District: "harbour", Turn: traffic.Turn{Epoch: 1, Seq: 1}, Time: noon, By: traffic.Agent{Agency: "fire", Name: "fire-desk-1"},
		Method: "/stopline.v1.TrafficService/GetJunctionState", Objects: []string{"junction:j1"}, Purpose: "operations", Granted: true, Phase: traffic.AccessUnary, Count: 1}
	if mod != nil {
		mod(a)
	}
	return a
}

func TestAgencyRecords(t *testing.T) {
	reg := offices(t)
	for _, tc := range []struct {
		name   string
		signer string
		body   any
		rule   Rule
		text   string
	}{
		{"request", "gateway", aRequest(nil), "", ""},
		{"request by the agency itself", "fire", aRequest(nil), "", ""},
		{"for another agency", "fire", aRequest(func(r *traffic.Request) { r.By.Agency = "bus" }), RuleDevice, "agency:"},
		{"for no agency", "gateway", aRequest(func(r *traffic.Request) { r.By.Agency = "pizza" }), RuleDevice, "agency:"},
		{"signer may not", "control", aRequest(nil), RuleMaySign, "kind:"},
		{"other district", "gateway", aRequest(func(r *traffic.Request) { r.District = "hills" }), RuleDistrict, "district:"},
		{"no id", "gateway", aRequest(func(r *traffic.Request) { r.ID = "" }), RuleSchema, "id:"},
		{"no revision", "gateway", aRequest(func(r *traffic.Request) { r.Revision = 0 }), RuleSchema, "revision:"},
		{"no class", "gateway", aRequest(func(r *traffic.Request) { r.Class = 0 }), RuleSchema, "class:"},
		{"no stops", "gateway", aRequest(func(r *traffic.Request) { r.Stops = nil }), RuleSchema, "stops:"},
		{"cancelled without stops", "gateway", aRequest(func(r *traffic.Request) { r.Stops, r.Cancelled = nil, true }), "", ""},
		{"too many stops", "gateway", aRequest(func(r *traffic.Request) { r.Stops = make([]traffic.Stop, traffic.MaxStops+1) }), RuleSize, "stops:"},
		{"ended before it began", "gateway", aRequest(func(r *traffic.Request) { r.Expires = noon }), RuleExpired, "expires:"},
		{"all day", "gateway", aRequest(func(r *traffic.Request) { r.Expires = noon.Add(24 * time.Hour) }), RuleExpired, "expires:"},
		{"unknown junction", "gateway", aRequest(func(r *traffic.Request) { r.Stops[1].Junction = "x" }), RuleJunction, "stops[1].junction"},
		{"in a circle", "gateway", aRequest(func(r *traffic.Request) { r.Stops[1].Junction = "j1" }), RuleInconsistent, "stops[1].junction"},
		{"unknown group", "gateway", aRequest(func(r *traffic.Request) { r.Stops[0].Group = "x" }), RuleInconsistent, "stops[0].group"},
		{"a crossing for people", "gateway", aRequest(func(r *traffic.Request) { r.Stops[0].Group = "w" }), RuleInconsistent, "stops[0].group"},
		{"backwards", "gateway", aRequest(func(r *traffic.Request) { r.Stops[1].Arrival = noon }), RuleInconsistent, "stops[1].arrival"},
		{"tomorrow", "gateway", aRequest(func(r *traffic.Request) { r.Stops[1].Arrival = noon.Add(24 * time.Hour) }), RuleClockAhead, "stops[1].arrival"},
		{"from the future", "gateway", aRequest(func(r *traffic.Request) { r.Time = noon.Add(time.Minute) }), RuleClockAhead, "time:"},
		{"long name", "gateway", aRequest(func(r *traffic.Request) { r.Vehicle = strings.Repeat("x", 257) }), RuleSize, "vehicle:"},
		{"no epoch", "gateway", aRequest(func(r *traffic.Request) { r.Turn.Epoch = 0 }), RuleSchema, "epoch:"},
		{"no seq", "gateway", aRequest(func(r *traffic.Request) { r.Turn.Seq = 0 }), RuleSchema, "seq:"},

		{"override", "gateway", anOverride(nil), "", ""},
		{"override by whom", "gateway", anOverride(func(o *traffic.Override) { o.By.Name = "" }), RuleSchema, "operator:"},
		{"override, free text", "gateway", anOverride(func(o *traffic.Override) { o.Reason = "I want to" }), RuleSchema, "reason:"},
		{"override for a week", "gateway", anOverride(func(o *traffic.Override) { o.Expires = noon.Add(7 * 24 * time.Hour) }), RuleExpired, "expires:"},
		{"override, stage", "gateway", anOverride(func(o *traffic.Override) { o.Stage = 2 }), RuleStage, "stage:"},
		{"override, junction", "gateway", anOverride(func(o *traffic.Override) { o.Junction = "x" }), RuleJunction, "junction:"},
		{"override, no plan", "gateway", anOverride(func(o *traffic.Override) { o.Action = traffic.OverridePlan }), RuleSchema, "plan:"},
		{"override, what", "gateway", anOverride(func(o *traffic.Override) { o.Action = "dance" }), RuleSchema, "action:"},
		{"release", "gateway", anOverride(func(o *traffic.Override) {
			o.Action, o.Releases, o.Expires = traffic.OverrideRelease, "o0", time.Time{}
		}), "", ""},
		{"release of nothing", "gateway", anOverride(func(o *traffic.Override) { o.Action = traffic.OverrideRelease }), RuleSchema, "releases:"},
		{"override by an agency", "fire", anOverride(nil), RuleMaySign, "kind:"},

		{"access", "gateway", anAccess(nil), "", ""},
		{"access, late", "gateway", anAccess(func(a *traffic.Access) { a.Time = noon.Add(-30 * 24 * time.Hour) }), "", ""},
		{"access, no method", "gateway", anAccess(func(a *traffic.Access) { a.Method = "" }), RuleSchema, "method:"},
		{"access, none", "gateway", anAccess(func(a *traffic.Access) { a.Count = 0 }), RuleSchema, "count:"},
		{"access, phase", "gateway", anAccess(func(a *traffic.Access) { a.Phase = "new moon" }), RuleSchema, "phase:"},
		{"access, too much", "gateway", anAccess(func(a *traffic.Access) { a.Objects = make([]string, maxObjects+1) }), RuleSize, "objects:"},
		{"access, district", "gateway", anAccess(func(a *traffic.Access) { a.District = "hills" }), RuleDistrict, "district:"},
		{"access, long purpose", "gateway", anAccess(func(a *traffic.Access) { a.Purpose = strings.Repeat("x", 257) }), RuleSize, "purpose:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := identity.KindRequest
			switch tc.body.(type) {
			case *traffic.Override:
				k = identity.KindOverride
			case *traffic.Access:
				k = identity.KindAccess
			}
			v := NewState(Block()).Judge(reg, noon, sign(t, tc.signer, k, tc.body))
			if v.Rule != tc.rule || !strings.Contains(v.Reason, tc.text) || v.OK != (tc.rule == "") {
				t.Errorf("got %+v, want rule %q with %q", v, tc.rule, tc.text)
			}
		})
	}
}

// Each signer numbers each kind by itself; what is left out shows as a gap, also
// in a state that comes from its bytes.
func TestAgencyRecordsComeInTurn(t *testing.T) {
	reg, s := offices(t), NewState(Block())
	judge := func(epoch, seq, count uint64) Verdict {
		t.Helper()
		b, err := s.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		s = NewState(Block())
		if err := s.UnmarshalBinary(b); err != nil {
			t.Fatal(err)
		}
		if again, _ := s.MarshalBinary(); !bytes.Equal(again, b) {
			t.Error("a state has other bytes after its bytes were read")
		}
		return s.Judge(reg, noon, sign(t, "gateway", identity.KindAccess, anAccess(func(a *traffic.Access) { a.Turn, a.Count = traffic.Turn{Epoch: epoch, Seq: seq}, count })))
	}
	for _, tc := range []struct {
		epoch, seq, count, gap uint64
		rule                   Rule
	}{
		{3, 1, 1, 0, ""}, {3, 2, 1, 0, ""}, {3, 2, 1, 0, RuleDuplicate}, {3, 2, 7, 0, RuleEquivocation}, {3, 5, 1, 2, ""},
		{3, 4, 1, 0, RuleReordered}, {2, 9, 1, 0, RuleReordered}, {4, 1, 1, 0, ""}, {5, 3, 1, 2, ""},
	} {
		if v := judge(tc.epoch, tc.seq, tc.count); v.Rule != tc.rule || v.Gap != tc.gap {
			t.Errorf("epoch %d seq %d: got %+v, want rule %q, gap %d", tc.epoch, tc.seq, v, tc.rule, tc.gap)
		}
	}
	if v := s.Judge(reg, noon, sign(t, "gateway", identity.KindRequest, aRequest(nil))); !v.OK {
		t.Errorf("the first request after many readings: %+v, want it accepted", v)
	}
}

// A state without such records has the bytes that older builds give it.
func TestNoAgencyRecordsNoBytes(t *testing.T) {
	b, err := NewState(Block()).MarshalBinary()
	if err != nil || len(b) != len(stateMagic)+4*4 {
		t.Errorf("an empty state has %d bytes, %v; want the magic line and four counts", len(b), err)
	}
	if err := NewState(Block()).UnmarshalBinary(append(b, 0, 0, 0, 0)); err == nil {
		t.Error("a second form of the same state is read")
	}
}
