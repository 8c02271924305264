package identity

import (
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// enrolling is a registry with an enroller, a reader with a role, and claims.
type enrolling struct {
	*Registry
	t     *testing.T
	nonce uint64
}

func newEnrolling(t *testing.T) *enrolling {
	t.Helper()
	g := testGenesis(t)
	g.Entries = append(g.Entries,
		entry(t, TypeFeature, FeatureEnrolment, Feature{From: 1}),
		entry(t, TypeOfficial, "desk", Official{Key: testPub("desk"), Department: "traffic", Roles: []string{Enroller}}),
		entry(t, TypeGovernance, GovernanceID, Governance{Version: 1, Rules: []Rule{
			{Type: TypeClaim, Need: Need{Role: Enroller, Officials: 1, Departments: 1}},
			{Type: TypeDevice, Action: Revoke, Need: Need{Role: Enroller, Officials: 1, Departments: 1}},
		}, Default: Need{Role: Registrar, Officials: 1, Departments: 1}}))
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	return &enrolling{Registry: r, t: t}
}

func (e *enrolling) apply(by, action string, typ EntryType, id string, body any) error {
	e.t.Helper()
	e.nonce++
	c := Change{District: "harbour", Action: action, Type: typ, ID: id, Nonce: e.nonce}
	if body != nil {
		c.Body = raw(e.t, body)
	}
	return e.Apply(9+e.nonce, testID(by), c)
}

func testClaim(key, device string) (string, Claim) {
	return string(testID(key)), Claim{Device: traffic.DeviceID(device), Junction: "j1", Detectors: []traffic.DetectorID{"x"}, Key: testPub(key), Until: "2027-01-01T00:00:00Z", By: "technician-1"}
}

// byClaim is a device that comes with a claim.
func byClaim(claim, device, key string) Device {
	d := Device{Junction: "j1", Detectors: []traffic.DetectorID{"x"}, Key: testPub(key), Enrolled: &Enrolled{Claim: testID(claim)}}
	d.Enrolled.Proof = ed25519.Sign(testKey(claim), ClaimInput("harbour", testID(claim), traffic.DeviceID(device), ed25519.PublicKey(d.Key)))
	return d
}

// rotated is a device with its next key.
func rotated(device string, was Device, old, next string) Device {
	in := RotateInput(traffic.DeviceID(device), ed25519.PublicKey(testPub(next)))
	return Device{Junction: was.Junction, Detectors: was.Detectors, Key: testPub(next), Former: append(was.Former[:len(was.Former):len(was.Former)], was.Key),
		Enrolled: &Enrolled{OldProof: ed25519.Sign(testKey(old), in), NewProof: ed25519.Sign(testKey(next), in)}}
}

func (e *enrolling) same(why string) {
	e.t.Helper()
	s, err := ParseSnapshot(e.Snapshot())
	if err != nil || s.Hash() != e.Hash() {
		e.t.Fatalf("%s: from its snapshot: %v, want the same state", why, err)
	}
	for k, h := range e.holders {
		if got := s.holders[k]; got.Status != h.Status || got.ID != h.ID || len(got.Kinds) != len(h.Kinds) {
			e.t.Errorf("%s: from its snapshot key %s is %+v, want %+v", why, k, got, h)
		}
	}
}

func TestOneClaimIsOneDevice(t *testing.T) {
	e := newEnrolling(t)
	id, c := testClaim("claim", "d9")
	if err := e.apply("desk", Put, TypeClaim, id, c); err != nil {
		t.Fatal(err)
	}
	e.same("with a claim")
	for _, tc := range []struct {
		name string
		by   string
		body func(d *Device)
		kind kind.Kind
		want string
	}{
		{"a stranger carries it", "stranger", func(*Device) {}, kind.Denied, "is not in the registry"},
		{"a device carries it", "d1", func(*Device) {}, kind.Denied, "may not change the registry"},
		{"another's key behind the proof", "desk", func(d *Device) { d.Key = testPub("thief") }, kind.Denied, "body.enrolled.proof"},
		{"no proof", "desk", func(d *Device) { d.Enrolled.Proof = nil }, kind.Denied, "body.enrolled.proof"},
		{"more detectors", "desk", func(d *Device) { d.Detectors = nil }, kind.Denied, "body.enrolled.claim"},
		{"no such claim", "desk", func(d *Device) { d.Enrolled.Claim = testID("other") }, kind.NotFound, "body.enrolled.claim"},
		{"without the claim", "desk", func(d *Device) { d.Enrolled = nil }, kind.Denied, "approvals"},
		{"a past", "desk", func(d *Device) { d.Former = []PublicKey{testPub("x")} }, kind.Invalid, "body.former"},
	} {
		d := byClaim("claim", "d9", "d9")
		tc.body(&d)
		hash := e.Hash()
		err := e.apply(tc.by, Put, TypeDevice, "d9", d)
		if kind.Of(err) != tc.kind || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s: %s", tc.name, err, tc.kind, tc.want)
		}
		if e.Hash() != hash {
			t.Errorf("%s: the state has changed", tc.name)
		}
	}
	// For another device than the claim's.
	if err := e.apply("desk", Put, TypeDevice, "d10", byClaim("claim", "d10", "d10")); kind.Of(err) != kind.Denied {
		t.Errorf("another device: got %v, want it denied", err)
	}
	// Any official may carry it: the claim decides.
	if err := e.apply("registrar", Put, TypeDevice, "d9", byClaim("claim", "d9", "d9")); err != nil {
		t.Fatal(err)
	}
	if h, ok := e.Holder(testID("d9")); !ok || h.Status != Active || !h.May(KindFrame) {
		t.Errorf("got %+v, want the device to sign frames", h)
	}
	if _, x, _ := e.Claim(testID("claim")); x.Status != Revoked {
		t.Errorf("the claim is %s, want it used up", x.Status)
	}
	e.same("with a claim used up")
	// Nothing that begins with a used claim goes on.
	if err := e.apply("desk", Put, TypeDevice, "d9", byClaim("claim", "d9", "second")); kind.Of(err) != kind.Conflict {
		t.Errorf("used twice: got %v, want a conflict", err)
	}
	if err := e.apply("desk", Put, TypeClaim, id, c); kind.Of(err) != kind.Conflict {
		t.Errorf("filed again: got %v, want a conflict", err)
	}
	again, other := testClaim("claim 2", "d9")
	if err := e.apply("desk", Put, TypeClaim, again, other); kind.Of(err) != kind.Conflict {
		t.Errorf("a claim for a device that is there: got %v, want a conflict", err)
	}
	// A claim that was taken back.
	third, back := testClaim("claim 3", "d11")
	for _, err := range []error{e.apply("desk", Put, TypeClaim, third, back), e.apply("desk", Revoke, TypeClaim, third, nil)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := e.apply("desk", Put, TypeDevice, "d11", byClaim("claim 3", "d11", "d11")); kind.Of(err) != kind.Conflict {
		t.Errorf("a claim taken back: got %v, want a conflict", err)
	}
}

func TestClaimRefusals(t *testing.T) {
	e := newEnrolling(t)
	for _, tc := range []struct {
		name string
		by   string
		body func(id *string, c *Claim)
		want string
	}{
		{"by the wrong office", "registrar", func(*string, *Claim) {}, "approvals"},
		{"another id", "desk", func(id *string, _ *Claim) { *id = "x" }, "id:"},
		{"no key", "desk", func(_ *string, c *Claim) { c.Key = testPub("x"); c.Key[0] ^= 1; c.Key = make(PublicKey, 32) }, "body.key"},
		{"no end", "desk", func(_ *string, c *Claim) { c.Until = "soon" }, "body.until"},
		{"local time", "desk", func(_ *string, c *Claim) { c.Until = "2027-01-01T00:00:00+01:00" }, "body.until"},
		{"no such junction", "desk", func(_ *string, c *Claim) { c.Junction = "j9" }, "body.junction"},
		{"no such detector", "desk", func(_ *string, c *Claim) { c.Detectors = []traffic.DetectorID{"z"} }, "body.detectors[0]"},
		{"no device", "desk", func(_ *string, c *Claim) { c.Device = "" }, "body.device"},
		{"a device that is there", "desk", func(_ *string, c *Claim) { c.Device = "d1" }, "body.device"},
		{"a long name", "desk", func(_ *string, c *Claim) { c.By = strings.Repeat("x", MaxID+1) }, "body.by"},
	} {
		id, c := testClaim("claim", "d9")
		tc.body(&id, &c)
		if err := e.apply(tc.by, Put, TypeClaim, id, c); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", tc.name, err, tc.want)
		}
	}
	// Before the feature is in force there is none of this.
	e.features[FeatureEnrolment] = 1000
	id, c := testClaim("claim", "d9")
	if err := e.apply("desk", Put, TypeClaim, id, c); err == nil || !strings.Contains(err.Error(), FeatureEnrolment) {
		t.Errorf("before the feature: got %v, want it refused", err)
	}
	d, _ := e.Device("d1")
	if err := e.apply("desk", Put, TypeDevice, "d1", rotated("d1", d, "d1", "d1 next")); err == nil || !strings.Contains(err.Error(), FeatureEnrolment) {
		t.Errorf("a new key before the feature: got %v, want it refused", err)
	}
}

func TestADeviceChangesItsKey(t *testing.T) {
	e := newEnrolling(t)
	was, _ := e.Device("d2")
	for _, tc := range []struct {
		name string
		body func(d *Device)
		want string
	}{
		{"by another key", func(d *Device) {
			d.Enrolled.OldProof = ed25519.Sign(testKey("thief"), RotateInput("d2", ed25519.PublicKey(d.Key)))
		}, "old_proof"},
		{"for another device", func(d *Device) {
			d.Enrolled.OldProof = ed25519.Sign(testKey("d2"), RotateInput("d1", ed25519.PublicKey(d.Key)))
		}, "old_proof"},
		{"without the new key", func(d *Device) { d.Enrolled.NewProof = nil }, "new_proof"},
		{"elsewhere", func(d *Device) { d.Junction = "j2" }, "junction"},
		{"with more detectors", func(d *Device) { d.Detectors = nil }, "stays at junction"},
		{"without its past", func(d *Device) { d.Former = nil }, "body.former"},
		{"another's key", func(d *Device) { *d = rotated("d2", was, "d2", "d1") }, "belongs to device"},
		{"its own again", func(d *Device) { *d = rotated("d2", was, "d2", "d2") }, "belongs to device"},
		{"by an official alone", func(d *Device) { d.Enrolled = nil }, "approvals"},
	} {
		d := rotated("d2", was, "d2", "next")
		tc.body(&d)
		hash := e.Hash()
		if err := e.apply("desk", Put, TypeDevice, "d2", d); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", tc.name, err, tc.want)
		}
		if e.Hash() != hash {
			t.Errorf("%s: the state has changed", tc.name)
		}
	}
	// Not even the registrar may.
	d := rotated("d2", was, "d2", "next")
	d.Enrolled = nil
	if err := e.apply("registrar", Put, TypeDevice, "d2", d); kind.Of(err) != kind.Conflict {
		t.Errorf("by the registrar: got %v, want a conflict", err)
	}
	names := []string{"d2", "next", "third"}
	for i, next := range names[1:] {
		if err := e.apply("desk", Put, TypeDevice, "d2", rotated("d2", was, names[i], next)); err != nil {
			t.Fatal(err)
		}
		was, _ = e.Device("d2")
		e.same("after " + next)
	}
	for i, n := range names {
		want := Revoked
		if i == len(names)-1 {
			want = Active
		}
		if h, ok := e.Holder(testID(n)); !ok || h.Status != want || h.ID != "d2" {
			t.Errorf("key %s: %+v, want it on record and %s", n, h, want)
		}
	}
	// Back to an old key, with what was signed for it then.
	if err := e.apply("desk", Put, TypeDevice, "d2", rotated("d2", was, "third", "next")); kind.Of(err) != kind.Conflict {
		t.Errorf("back: got %v, want a conflict", err)
	}
	if err := e.apply("desk", Revoke, TypeDevice, "d2", nil); err != nil {
		t.Fatal(err)
	}
	e.same("revoked")
	if err := e.apply("desk", Put, TypeDevice, "d2", rotated("d2", was, "third", "fourth")); kind.Of(err) != kind.Conflict {
		t.Errorf("a revoked device's new key: got %v, want a conflict", err)
	}
}

func TestGenesisHasNoClaims(t *testing.T) {
	g := testGenesis(t)
	d := Device{Junction: "j1", Key: testPub("x"), Enrolled: &Enrolled{Claim: "x"}}
	g.Entries = append(g.Entries, entry(t, TypeDevice, "x", d))
	if _, err := NewRegistry(g); err == nil || !strings.Contains(err.Error(), "body.enrolled") {
		t.Errorf("got %v, want body.enrolled refused", err)
	}
	if b, err := json.Marshal(Device{Junction: "j1"}); err != nil || strings.Contains(string(b), "enrolled") || strings.Contains(string(b), "former") {
		t.Errorf("got %s, %v; what was filed before must stay as it was", b, err)
	}
}
