package identity

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

func testAccess() AccessPolicy {
	return AccessPolicy{Version: "1", Cedar: "permit (principal, action, resource);", Purposes: []AccessPurpose{
		{Code: "operations", Text: "Running the signals"},
		{Code: "investigation", Text: "A crime is investigated", Case: true, LegalBases: []string{"warrant"}, CovertDays: 90},
	}}
}

func testClient() Client {
	return Client{Agency: "fire", Certificate: strings.Repeat("ab", 32), Roles: []string{"dispatcher"}, Until: "2027-01-01T00:00:00Z"}
}

func TestAccessAndClients(t *testing.T) {
	g := testGenesis(t)
	g.Entries = append(g.Entries,
		entry(t, TypeClient, "fire-desk-1", testClient()), // before its agency: order in a document means nothing
		entry(t, TypeAgency, "fire", Agency{Name: "Fire brigade", Key: testPub("fire")}),
		entry(t, TypeAccess, AccessID, testAccess()))
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := r.Access()
	if !ok || len(p.Purposes) != 2 || !p.Purposes[1].Case {
		t.Errorf("got %+v, %v, want the policy of genesis", p, ok)
	}
	c := r.Clients()["fire-desk-1"]
	if c.Agency != "fire" || c.Expires().Year() != 2027 {
		t.Errorf("got %+v, want the client of genesis until 2027", c)
	}
	s, err := ParseSnapshot(r.Snapshot())
	if err != nil || s.Hash() != r.Hash() {
		t.Errorf("from its snapshot: %x, %v; want %x", s.Hash(), err, r.Hash())
	}
	// An agency that is gone takes its clients with it, also through a snapshot.
	if err := r.revoke(7, TypeAgency, "fire"); err != nil {
		t.Fatal(err)
	}
	if got := r.Clients(); len(got) != 0 {
		t.Errorf("clients of a revoked agency: %v, want none", got)
	}
	if s, err = ParseSnapshot(r.Snapshot()); err != nil || len(s.Clients()) != 0 {
		t.Errorf("from its snapshot: %v, %v; want none", s, err)
	}
	if err := r.put(8, TypeClient, "fire-desk-2", raw(t, testClient())); kind.Of(err) != kind.Invalid {
		t.Errorf("a client before the feature is in force: %v, want it refused", err)
	}
	r.features = map[string]uint64{FeatureAccess: 8}
	if err := r.put(8, TypeClient, "fire-desk-2", raw(t, testClient())); err == nil || !strings.Contains(err.Error(), "body.agency") {
		t.Errorf("a client of a revoked agency: %v, want body.agency refused", err)
	}
}

func TestAccessRefusals(t *testing.T) {
	r, err := NewRegistry(testGenesis(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.put(0, TypeAgency, "fire", raw(t, Agency{Name: "Fire", Key: testPub("fire")})); err != nil {
		t.Fatal(err)
	}
	policy := func(f func(p *AccessPolicy)) json.RawMessage { p := testAccess(); f(&p); return raw(t, p) }
	client := func(f func(c *Client)) json.RawMessage { c := testClient(); f(&c); return raw(t, c) }
	for _, tc := range []struct {
		name string
		typ  EntryType
		id   string
		body json.RawMessage
		want string
	}{
		{"other id", TypeAccess, "x", policy(func(*AccessPolicy) {}), "id:"},
		{"no version", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Version = "" }), "body.version"},
		{"no text", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Cedar = "" }), "body.cedar"},
		{"long text", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Cedar = strings.Repeat(" ", maxCedar+1) }), "body.cedar"},
		{"no purposes", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes = nil }), "body.purposes"},
		{"free text", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes[0].Code = "Because I ask" }), "body.purposes[0].code"},
		{"twice", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes[1].Code = "operations" }), "there twice"},
		{"no words", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes[0].Text = "" }), "body.purposes[0].text"},
		{"basis", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes[1].LegalBases = []string{"§ 12"} }), "body.purposes[1].legal_bases[0]"},
		{"covert for ever", TypeAccess, AccessID, policy(func(p *AccessPolicy) { p.Purposes[1].CovertDays = 367 }), "body.purposes[1].covert_days"},
		{"unknown field", TypeAccess, AccessID, json.RawMessage(`{"x":1}`), "unknown field"},
		{"no agency", TypeClient, "c", client(func(c *Client) { c.Agency = "x" }), "body.agency"},
		{"certificate", TypeClient, "c", client(func(c *Client) { c.Certificate = "AB" }), "body.certificate"},
		{"nothing to know them by", TypeClient, "c", client(func(c *Client) { c.Certificate = "" }), "one of certificate"},
		{"issuer alone", TypeClient, "c", client(func(c *Client) { c.Issuer = "https://id.example" }), "issuer and subject"},
		{"weak key", TypeClient, "c", client(func(c *Client) { c.TokenKey = make(PublicKey, 32) }), "body.token_key"},
		{"no roles", TypeClient, "c", client(func(c *Client) { c.Roles = nil }), "body.roles"},
		{"role", TypeClient, "c", client(func(c *Client) { c.Roles = []string{"Chief!"} }), "body.roles[0]"},
		{"for ever", TypeClient, "c", client(func(c *Client) { c.Until = "" }), "body.until"},
		{"local time", TypeClient, "c", client(func(c *Client) { c.Until = "2027-01-01T00:00:00+02:00" }), "body.until"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := r.put(0, tc.typ, tc.id, tc.body); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}
