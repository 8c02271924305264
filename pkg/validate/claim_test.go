package validate

import (
	"crypto/ed25519"
	"encoding/json"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

func TestAClaimEnds(t *testing.T) {
	until := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	pub := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	body, err := json.Marshal(identity.Claim{Device: "d9", Junction: "j1", Key: identity.PublicKey(pub), Until: until.Format(time.RFC3339)})
	if err != nil {
		t.Fatal(err)
	}
	where, err := json.Marshal(junction("j1", 1))
	if err != nil {
		t.Fatal(err)
	}
	claim := identity.IDOf(pub)
	g := &identity.Genesis{District: "harbour", Entries: []identity.Entry{
		{Type: identity.TypeFeature, ID: identity.FeatureEnrolment, Body: json.RawMessage(`{"from":1}`)},
		{Type: identity.TypeJunction, ID: "j1", Body: where},
		{Type: identity.TypeClaim, ID: string(claim), Body: body},
	}}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	device := func(claim identity.KeyID) *identity.Change {
		b, err := json.Marshal(identity.Device{Junction: "j1", Key: identity.PublicKey(pub), Enrolled: &identity.Enrolled{Claim: claim}})
		if err != nil {
			t.Fatal(err)
		}
		return &identity.Change{District: "harbour", Action: identity.Put, Type: identity.TypeDevice, ID: "d9", Body: b}
	}
	for _, tc := range []struct {
		name string
		at   time.Time
		c    *identity.Change
		want Rule
	}{
		{"in time", until.Add(-time.Nanosecond), device(claim), ""},
		{"at its end", until, device(claim), RuleExpired},
		{"long after", until.AddDate(1, 0, 0), device(claim), RuleExpired},
		{"a claim that is not there is the registry's matter", until, device("x"), ""},
	} {
		if v := change(reg, tc.at, tc.c); v.OK != (tc.want == "") || v.Rule != tc.want {
			t.Errorf("%s: got %+v, want rule %q", tc.name, v, tc.want)
		}
	}
}
