package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// planners and governors: two of three departments; devices: one registrar.
var testRules = Governance{Version: 1, Rules: []Rule{
	{Type: TypeDevice, Need: Need{Role: Registrar, Officials: 1, Departments: 1}},
	{Type: TypeJunction, Action: Put, Need: Need{Role: Planner, Officials: 2, Departments: 2}},
	{Type: TypePolicy, Need: Need{Role: Planner, Officials: 2, Departments: 2, Named: []string{"ann", "bob"}}},
	{Type: TypeAgency, Action: Revoke, Need: Need{Role: Governor, Officials: 1, Departments: 1}},
}, Default: Need{Role: Governor, Officials: 2, Departments: 2}}

// governedGenesis is testGenesis with officials of three departments and rules.
func governedGenesis(t testing.TB) *Genesis {
	g := testGenesis(t)
	for _, o := range []struct {
		id, department string
		roles          []string
	}{
		{"ann", "traffic", []string{Registrar, Planner, Governor}},
		{"bob", "police", []string{Planner, Governor}},
		{"cem", "audit", []string{Planner, Governor}},
		{"dan", "traffic", []string{Planner}},
		{"eve", "police", []string{Planner}},
	} {
		g.Entries = append(g.Entries, entry(t, TypeOfficial, o.id, Official{Key: testPub(o.id), Department: o.department, Roles: o.roles}))
	}
	g.Entries = append(g.Entries, entry(t, TypeGovernance, GovernanceID, testRules))
	return g
}

func governed(t testing.TB) *Registry {
	t.Helper()
	r, err := NewRegistry(governedGenesis(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(1, testID("ann"), change(t, func(c *Change) {
		c.Type, c.ID, c.Nonce, c.Body = TypeDevice, "gone", 1000, raw(t, Device{Junction: "j1", Key: testPub("gone")})
	})); err != nil {
		t.Fatal(err)
	}
	quit := Change{District: "harbour", Action: Revoke, Type: TypeOfficial, ID: "eve", Nonce: 1001}
	if err := r.Apply(1, testID("ann"), approve(t, r, quit, "bob")); err != nil {
		t.Fatal(err)
	}
	return r
}

// approve gives a change the base that is in force and approvals.
func approve(t testing.TB, r *Registry, c Change, names ...string) Change {
	t.Helper()
	c.Base, c.Approvals = r.Base(c.Type, c.ID), nil
	for _, n := range names {
		a, err := Approve(testKey(n), c)
		if err != nil {
			t.Fatal(err)
		}
		c.Approvals = append(c.Approvals, a)
	}
	return c
}

// plan is a change to the plan of j1.
func plan(t testing.TB, nonce uint64) Change {
	j := testJunction("j1", "x", "y")
	j.Plan.Name, j.Plan.Steps[0].DurationMS = "evening <&>", 30_000
	return Change{District: "harbour", Action: Put, Type: TypeJunction, ID: "j1", Body: raw(t, j), Nonce: nonce}
}

func TestApprovals(t *testing.T) {
	base := governed(t)
	policy := Change{District: "harbour", Action: Put, Type: TypePolicy, ID: "day", Body: raw(t, Policy{Version: "2", Controller: "fixed"}), Nonce: 5}
	for _, tt := range []struct {
		name   string
		sender string
		c      Change
		by     []string
		spoil  func(r *Registry, c *Change)
		kind   kind.Kind
		want   string // "": carried out
	}{
		{name: "two departments", sender: "ann", by: []string{"bob"}},
		{name: "three, where two are enough", sender: "ann", by: []string{"cem", "bob"}},
		{name: "sent by one who does not count", sender: "registrar", by: []string{"cem", "bob"}},
		{name: "nobody but the sender", sender: "ann", kind: kind.Denied,
			want: "approvals: put of a junction needs 2 officials of 2 departments with role planner, has 1 of traffic"},
		{name: "nobody", sender: "registrar", kind: kind.Denied,
			want: "approvals: put of a junction needs 2 officials of 2 departments with role planner, has none"},
		{name: "one department", sender: "ann", by: []string{"dan"}, kind: kind.Denied,
			want: "approvals: put of a junction needs 2 officials of 2 departments with role planner, has 2 of traffic"},
		{name: "sender without a role", sender: "reader", by: []string{"ann", "bob"}, kind: kind.Denied,
			want: `key_id: official reader may not change the registry: the role "planner" is needed`},
		{name: "a device", sender: "d1", by: []string{"ann", "bob"}, kind: kind.Denied,
			want: `key_id: device d1 may not change the registry: the role "planner" is needed`},
		{name: "the sender's own approval", sender: "ann", by: []string{"ann"}, kind: kind.Conflict,
			want: "approvals[0].key_id: official ann has signed already"},
		{name: "one approval twice", sender: "ann", by: []string{"dan", "dan"}, kind: kind.Conflict,
			want: "approvals[1].key_id: official dan has signed already"},
		{name: "a stranger's", sender: "ann", by: []string{"stranger"}, kind: kind.Denied,
			want: fmt.Sprintf("approvals[0].key_id: %q is not in the registry", testID("stranger"))},
		{name: "a validator's", sender: "ann", by: []string{"vote 2"}, kind: kind.Denied, want: "approvals[0].key_id: validator 2 is no official"},
		{name: "a device's", sender: "ann", by: []string{"d1"}, kind: kind.Denied, want: "approvals[0].key_id: device d1 is no official"},
		{name: "a revoked official's", sender: "ann", by: []string{"eve"}, kind: kind.Denied, want: "approvals[0].key_id: official eve is revoked"},
		{name: "one's without the role", sender: "ann", by: []string{"bob", "registrar"}, kind: kind.Denied,
			want: "approvals[1].key_id: official registrar does not count: needed are 2 officials of 2 departments with role planner"},
		{name: "one's who is not named", sender: "ann", c: policy, by: []string{"cem"}, kind: kind.Denied,
			want: "approvals[0].key_id: official cem does not count: needed are 2 officials of 2 departments with role planner among ann, bob"},
		{name: "those who are named", sender: "bob", c: policy, by: []string{"ann"}},
		{name: "too many", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Approvals = make([]Approval, MaxApprovals+1) }, kind: kind.Invalid,
			want: "approvals: 17, at most 16"},
		{name: "no base", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Base = nil }, kind: kind.Invalid,
			want: "base: must be 32 bytes, has 0: an approval is for what the entry was"},
		{name: "another base", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Base = make(Digest, 32) }, kind: kind.Stale,
			want: fmt.Sprintf(`base: the change is to 0000000000000000, and junction "j1" is %.8x by now: propose it again`, []byte(base.Base(TypeJunction, "j1")))},
		{name: "base of one who needs none", sender: "ann", c: change(t, func(c *Change) { c.Base = bytes.Repeat([]byte{1}, 32) }),
			spoil: func(_ *Registry, c *Change) { c.Base = bytes.Repeat([]byte{1}, 32) }, kind: kind.Stale,
			want: `base: the change is to 0101010101010101, and device "d3" is 0000000000000000 by now: propose it again`},
		{name: "another body", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Body = raw(t, testJunction("j1")) }, kind: kind.Denied,
			want: fmt.Sprintf("approvals[0].signature: is not that of %s over this change", testID("bob"))},
		{name: "another nonce", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Nonce++ }, kind: kind.Denied,
			want: fmt.Sprintf("approvals[0].signature: is not that of %s over this change", testID("bob"))},
		{name: "another end", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Until = 99 }, kind: kind.Denied,
			want: fmt.Sprintf("approvals[0].signature: is not that of %s over this change", testID("bob"))},
		{name: "just in time", sender: "ann", by: []string{"bob"}, c: func() Change { c := plan(t, 5); c.Until = 7; return c }()},
		{name: "too late", sender: "ann", by: []string{"bob"}, c: func() Change { c := plan(t, 5); c.Until = 6; return c }(), kind: kind.Stale,
			want: "until: the change was to be carried out by block 6, this is 7"},
		{name: "another junction", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) {
			c.ID, c.Body, c.Base = "j2", raw(t, testJunction("j2")), make(Digest, 32)
		}, kind: kind.Denied, want: fmt.Sprintf("approvals[0].signature: is not that of %s over this change", testID("bob"))},
		{name: "short signature", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Approvals[0].Signature = Signature{1} }, kind: kind.Denied,
			want: fmt.Sprintf("approvals[0].signature: is not that of %s over this change", testID("bob"))},
		{name: "body that is none", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Body = json.RawMessage("{") }, kind: kind.Invalid,
			want: "body: unexpected end of JSON input"},
		{name: "white space in the body", sender: "ann", by: []string{"bob"}, spoil: func(_ *Registry, c *Change) { c.Body = append([]byte("\n "), c.Body...) }},
		{name: "approver's nonce", sender: "ann", by: []string{"bob"}, spoil: func(r *Registry, _ *Change) { r.nonces[nonceKey{testID("bob"), 5}] = true }, kind: kind.Conflict,
			want: "approvals[0].key_id: official bob has used the nonce 5 before"},
		{name: "a device by a planner", sender: "bob", c: change(t, nil), kind: kind.Denied,
			want: "approvals: put of a device needs 1 official of 1 department with role registrar, has none"},
		{name: "a device by a registrar", sender: "ann", c: change(t, nil)},
		{name: "a device by two", sender: "ann", c: change(t, nil), by: []string{"registrar"}},
		{name: "anything else by planners", sender: "dan", c: Change{District: "harbour", Action: Put, Type: TypeSoftware, ID: "v2", Body: json.RawMessage("{}"), Nonce: 5}, kind: kind.Denied,
			want: "approvals: put of a software needs 2 officials of 2 departments with role governor, has none"},
		{name: "anything else by governors", sender: "cem", by: []string{"bob"}, c: Change{District: "harbour", Action: Put, Type: TypeSoftware, ID: "v2", Body: json.RawMessage("{}"), Nonce: 5}},
		{name: "revoke by the default rule", sender: "ann", c: Change{District: "harbour", Action: Revoke, Type: TypeService, ID: "control", Nonce: 5}, kind: kind.Denied,
			want: "approvals: revoke of a service needs 2 officials of 2 departments with role governor, has 1 of traffic"},
		{name: "revoke by two", sender: "ann", by: []string{"cem"}, c: Change{District: "harbour", Action: Revoke, Type: TypeService, ID: "control", Nonce: 5}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := base.Clone()
			c := tt.c
			if c.District == "" {
				c = plan(t, 5)
			}
			if c.Nonce != 5 && c.Type != TypeDevice {
				t.Fatal("the table is wrong")
			}
			c = approve(t, r, c, tt.by...)
			if tt.spoil != nil {
				tt.spoil(r, &c)
			}
			before := r.Snapshot()
			err := r.Apply(7, testID(tt.sender), c)
			if tt.want == "" {
				if err != nil {
					t.Fatalf("got %v, want it carried out", err)
				}
				if r.Version() != base.Version()+1 {
					t.Errorf("got version %d after one change to %d", r.Version(), base.Version())
				}
				// Once is enough: neither the same record nor the same approvals in
				// somebody else's.
				for _, again := range []string{tt.sender, "registrar"} {
					if err := r.Apply(8, testID(again), c); err == nil {
						t.Errorf("carried out again, sent by %s", again)
					}
				}
				return
			}
			if err == nil || err.Error() != tt.want || kind.Of(err) != tt.kind {
				t.Errorf("got %v of kind %v\nwant %s of kind %v", err, kind.Of(err), tt.want, tt.kind)
			}
			if !bytes.Equal(r.Snapshot(), before) {
				t.Error("a change that was refused changed the registry")
			}
		})
	}
}

// An approval is for what an entry was, once: neither a change in between nor
// the way back to what it was brings it to life again, not even in one block.
func TestApprovalsAreNotReplayed(t *testing.T) {
	r := governed(t)
	old, _ := r.Entry(TypeJunction, "j1")
	there := approve(t, r, plan(t, 5), "bob", "cem")
	if err := r.Apply(7, testID("ann"), there); err != nil {
		t.Fatal(err)
	}
	after, _ := r.Entry(TypeJunction, "j1")
	back := approve(t, r, Change{District: "harbour", Action: Put, Type: TypeJunction, ID: "j1", Body: old.Body, Nonce: 6}, "bob")
	stale := approve(t, r, plan(t, 7), "bob")
	if err := r.Apply(7, testID("ann"), back); err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(7, testID("ann"), stale); kind.Of(err) != kind.Stale {
		t.Errorf("got %v for approvals of before another change, want them stale", err)
	}
	// From here there-and-back has led to the same entry once more.
	again := approve(t, r, plan(t, 8), "bob")
	if err := r.Apply(7, testID("ann"), again); err != nil {
		t.Fatal(err)
	}
	if e, _ := r.Entry(TypeJunction, "j1"); !bytes.Equal(e.Hash(), after.Hash()) {
		t.Fatal("the story is wrong: this is another entry")
	}
	if !bytes.Equal(r.Base(TypeJunction, "j1"), back.Base) {
		t.Fatal("the story is wrong: the base differs")
	}
	for _, sender := range []string{"ann", "cem", "dan", "registrar"} {
		before := r.Hash()
		if err := r.Apply(7, testID(sender), back); kind.Of(err) != kind.Conflict {
			t.Errorf("sent by %s: got %v, want the nonce refused", sender, err)
		}
		if r.Hash() != before {
			t.Errorf("sent by %s: it changed the registry", sender)
		}
	}
	// Who loads the snapshot knows, too.
	again2, err := ParseSnapshot(r.Snapshot())
	if err != nil {
		t.Fatal(err)
	}
	if err := again2.Apply(7, testID("dan"), back); kind.Of(err) != kind.Conflict {
		t.Errorf("got %v from a snapshot, want the nonce refused", err)
	}
}

func TestApprovalInput(t *testing.T) {
	c := Change{District: "harbour", Action: Put, Type: TypePolicy, ID: "day", Body: json.RawMessage(` {"a" : "<"} `), Nonce: 18446744073709551615, Until: 12, Base: bytes.Repeat([]byte{0xab}, 32)}
	got, err := ApprovalInput(c)
	want := "stopline registry approval v1\nharbour\nput\npolicy\nday\n18446744073709551615\n12\n" + strings.Repeat("ab", 32) + "\n" +
		hex.EncodeToString(sum([]byte(`{"a":"<"}`))) + "\n"
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
	c.Approvals = []Approval{{}}
	if again, err := ApprovalInput(c); err != nil || !bytes.Equal(again, got) {
		t.Errorf("approvals are under approvals: %q, %v", again, err)
	}
	c.Body = nil
	if got, err := ApprovalInput(c); err != nil || !strings.HasSuffix(string(got), "\n"+hex.EncodeToString(sum(nil))+"\n") {
		t.Errorf("got %q, %v without a body, want the digest of nothing", got, err)
	}
	c.Base = c.Base[1:]
	if _, err := ApprovalInput(c); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v for a short base", err)
	}
	if _, err := Approve(testKey("ann"), c); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v for approving a short base", err)
	}
}

func TestGovernanceRefuses(t *testing.T) {
	put := func(g any) Change {
		return Change{District: "harbour", Action: Put, Type: TypeGovernance, ID: GovernanceID, Body: raw(t, g), Nonce: 9}
	}
	with := func(mod func(g *Governance)) Change {
		g := testRules
		g.Rules = slices.Clone(g.Rules)
		mod(&g)
		return put(g)
	}
	for _, tt := range []struct {
		name string
		c    Change
		want string
	}{
		{"version", with(func(g *Governance) { g.Version = 2 }), "body.version: 2, must be 1"},
		{"rules", with(func(g *Governance) { g.Rules = make([]Rule, MaxRules+1) }), "body.rules: 65, at most 64"},
		{"type", with(func(g *Governance) { g.Rules[1].Type = "plan" }), `body.rules[1].type: "plan" is unknown`},
		{"action", with(func(g *Governance) { g.Rules[1].Action = "drop" }), `body.rules[1].action: "drop": must be put, revoke or empty for both`},
		{"twice", with(func(g *Governance) { g.Rules[2] = g.Rules[0] }), "body.rules[2]: is for the same type and action as rules[0]"},
		{"role", with(func(g *Governance) { g.Rules[0].Role = "" }), "body.rules[0].role: must not be empty"},
		{"default", with(func(g *Governance) { g.Default = Need{} }), "body.default.role: must not be empty"},
		{"nobody", with(func(g *Governance) { g.Default.Officials = 0 }), "body.default.officials: 0, must be 1 to 17"},
		{"too many", with(func(g *Governance) { g.Default.Officials = 18 }), "body.default.officials: 18, must be 1 to 17"},
		{"departments", with(func(g *Governance) { g.Default.Departments = 3 }), "body.default.departments: 3, must be 1 to the 2 officials"},
		{"no department", with(func(g *Governance) { g.Default.Departments = 0 }), "body.default.departments: 0, must be 1 to the 2 officials"},
		{"named twice", with(func(g *Governance) { g.Default.Named = []string{"ann", "bob", "ann"} }), "body.default.named: holds a name twice"},
		{"unknown field", put(map[string]any{"version": 1, "colour": 1}), `body: json: unknown field "colour"`},
		{"id", func() Change { c := put(testRules); c.ID = "other"; return c }(), `id: "other": the one governance entry is "registry"`},
		{"impossible", with(func(g *Governance) { g.Default = Need{Role: Governor, Officials: 4, Departments: 1} }),
			"governance: default needs 4 officials of 1 department with role governor, and the registry has 3 of audit, police, traffic"},
		{"impossible departments", with(func(g *Governance) { g.Rules[0].Need = Need{Role: Registrar, Officials: 2, Departments: 2} }),
			"governance: rules[0] needs 2 officials of 2 departments with role registrar, and the registry has 2 of traffic"},
		{"named and revoked", with(func(g *Governance) {
			g.Rules[2].Need = Need{Role: Planner, Officials: 2, Departments: 1, Named: []string{"ann", "eve"}}
		}), "governance: rules[2] needs 2 officials of 1 department with role planner among ann, eve, and the registry has 1 of traffic"},
		{"revoke", Change{District: "harbour", Action: Revoke, Type: TypeGovernance, ID: GovernanceID, Nonce: 9}, "type: a governance cannot be revoked"},
		{"sharing version", Change{District: "harbour", Action: Put, Type: TypeSharing, ID: "airport", Body: raw(t, Sharing{}), Nonce: 9}, "body.version: must not be empty"},
		{"sharing with oneself", Change{District: "harbour", Action: Put, Type: TypeSharing, ID: "harbour", Body: raw(t, Sharing{Version: "1"}), Nonce: 9}, `id: "harbour" is this district, not a neighbour`},
		{"sharing raw frames", Change{District: "harbour", Action: Put, Type: TypeSharing, ID: "airport", Body: raw(t, Sharing{Version: "1", Classes: []string{"checkpoint", "frame"}}), Nonce: 9},
			`body.classes[1]: "frame": must be of aggregate, checkpoint, commitment, corridor, in this order and once`},
		{"sharing twice", Change{District: "harbour", Action: Put, Type: TypeSharing, ID: "airport", Body: raw(t, Sharing{Version: "1", Classes: []string{"checkpoint", "checkpoint"}}), Nonce: 9},
			`body.classes[1]: "checkpoint": must be of aggregate, checkpoint, commitment, corridor, in this order and once`},
		{"sharing and more", Change{District: "harbour", Action: Put, Type: TypeSharing, ID: "airport", Body: json.RawMessage(`{"x":1}`), Nonce: 9}, `body: json: unknown field "x"`},
		{"agency's name", Change{District: "harbour", Action: Put, Type: TypeAgency, ID: "a", Body: raw(t, Agency{Key: testPub("a")}), Nonce: 9}, "body.name: must not be empty"},
		{"agency's key", Change{District: "harbour", Action: Put, Type: TypeAgency, ID: "a", Body: raw(t, Agency{Name: "A", Key: testPub("ann")}), Nonce: 9},
			fmt.Sprintf(`body.key: %s belongs to official "ann" already`, testID("ann"))},
		{"agency and more", Change{District: "harbour", Action: Put, Type: TypeAgency, ID: "a", Body: json.RawMessage(`{"x":1}`), Nonce: 9}, `body: json: unknown field "x"`},
		{"capacity", wide(t, `"capacity":0`, `"capacity":3000000000`), "body.lanes[0].capacity: 3000000000: must fit 32 bits"},
		{"saturation", wide(t, `"saturation_per_hour":1800`, `"saturation_per_hour":-3000000000`), "body.movements[0].saturation_per_hour: -3000000000: must fit 32 bits"},
		{"detector's group", wide(t, `"group":-1`, `"group":-3000000000`), "body.detectors[0].group: -3000000000: must fit 32 bits"},
		{"yields", wide(t, `"conflicts":[[]]`, `"conflicts":[[]],"yields":[[3000000000]]`), "body.yields[0]: 3000000000: must fit 32 bits"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasSuffix(tt.want, "must fit 32 bits") && ^uint(0)>>32 == 0 {
				tt.want = "body: " // no such number here; refused it must be all the same
			}
			r := governed(t)
			before := r.Snapshot()
			err := r.Apply(7, testID("ann"), approve(t, r, tt.c, "bob", "cem"))
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if !bytes.Equal(r.Snapshot(), before) {
				t.Error("a change that was refused changed the registry")
			}
		})
	}
}

// wide is a definition of j1 with one figure that only 64 bits hold.
func wide(t *testing.T, old, new string) Change {
	t.Helper()
	b := raw(t, testJunction("j1", "x"))
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("%s is not in %s", old, b)
	}
	return Change{District: "harbour", Action: Put, Type: TypeJunction, ID: "j1", Body: bytes.Replace(b, []byte(old), []byte(new), 1), Nonce: 9}
}

// A registry begins with one registrar's word for everything; that registrar can
// bind it, and cannot loosen it again alone.
func TestGovernanceComesIntoForce(t *testing.T) {
	g := testGenesis(t)
	g.Entries = append(g.Entries, entry(t, TypeOfficial, "bob", Official{Key: testPub("bob"), Department: "police", Roles: []string{Governor, Planner}}))
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	if g, filed := r.Governance(); filed || g.Need(TypeGovernance, Put).String() != "1 official of 1 department with role registrar" {
		t.Errorf("got %v, %v, want one registrar by default", g, filed)
	}
	apply := func(sender string, c Change, by ...string) error {
		return r.Apply(3, testID(sender), approve(t, r, c, by...))
	}
	if err := apply("bob", plan(t, 1)); kind.Of(err) != kind.Denied {
		t.Errorf("got %v for a planner where nothing says what that is", err)
	}
	if err := apply("registrar", Change{District: "harbour", Action: Put, Type: TypeOfficial, ID: "ann", Nonce: 2,
		Body: raw(t, Official{Key: testPub("ann"), Department: "traffic", Roles: []string{Registrar, Governor, Planner}})}); err != nil {
		t.Fatal(err)
	}
	rules := Governance{Version: 1, Default: Need{Role: Governor, Officials: 2, Departments: 2}}
	bind := Change{District: "harbour", Action: Put, Type: TypeGovernance, ID: GovernanceID, Body: raw(t, rules), Nonce: 3}
	if err := apply("registrar", bind); err != nil {
		t.Fatal(err)
	}
	loose := Change{District: "harbour", Action: Put, Type: TypeGovernance, ID: GovernanceID, Body: raw(t, oneRegistrar), Nonce: 4}
	if err := apply("registrar", loose); err == nil || !strings.HasSuffix(err.Error(), "needs 2 officials of 2 departments with role governor, has none") {
		t.Errorf("got %v for loosening the rules alone", err)
	}
	// Two governors are needed, and there are two: neither may go before another comes.
	gone := Change{District: "harbour", Action: Revoke, Type: TypeOfficial, ID: "bob", Nonce: 5}
	if err := apply("ann", gone, "bob"); err == nil ||
		err.Error() != `id: without official "bob": governance: default needs 2 officials of 2 departments with role governor, and the registry has 1 of traffic; appoint another first` {
		t.Errorf("got %v for locking everybody out", err)
	}
	if err := apply("ann", Change{District: "harbour", Action: Put, Type: TypeOfficial, ID: "cem", Nonce: 6,
		Body: raw(t, Official{Key: testPub("cem"), Department: "audit", Roles: []string{Governor}})}, "bob"); err != nil {
		t.Fatal(err)
	}
	if err := apply("ann", gone, "bob"); err != nil {
		t.Errorf("got %v with another governor there", err)
	}
	if err := apply("ann", loose, "bob"); err == nil || err.Error() != "approvals[0].key_id: official bob is revoked" {
		t.Errorf("got %v for one who was revoked", err)
	}
	if err := apply("ann", loose, "cem"); err != nil {
		t.Errorf("got %v for loosening the rules together", err)
	}
	if err := apply("registrar", Change{District: "harbour", Action: Revoke, Type: TypeOfficial, ID: "cem", Nonce: 7}); err != nil {
		t.Errorf("got %v under the loosened rules", err)
	}
	// The way back from a snapshot, with rules that nobody could meet any more.
	again, err := ParseSnapshot(r.Snapshot())
	if err != nil || again.Hash() != r.Hash() {
		t.Errorf("got %v from the snapshot", err)
	}
	if g, filed := again.Governance(); !filed || g.Default.Role != Registrar {
		t.Errorf("got %+v, %v from the snapshot, want what is in force", g, filed)
	}
}

func TestGovernanceInGenesis(t *testing.T) {
	g := governedGenesis(t)
	slices.Reverse(g.Entries) // rules before the officials who must be there
	if _, err := NewRegistry(g); err != nil {
		t.Errorf("got %v with the entries the other way round", err)
	}
	g.Entries = slices.DeleteFunc(g.Entries, func(e Entry) bool { return e.ID == "bob" || e.ID == "cem" })
	if _, err := NewRegistry(g); err == nil || !strings.Contains(err.Error(), "governance: default needs 2 officials") {
		t.Errorf("got %v for rules that nobody can meet", err)
	}
}

func TestAgenciesAndSharing(t *testing.T) {
	r := governed(t)
	for i, c := range []Change{
		{Type: TypeAgency, ID: "fire", Body: raw(t, Agency{Name: "Fire brigade", Key: testPub("fire")})},
		{Type: TypeSharing, ID: "airport", Body: raw(t, Sharing{Version: "1", Classes: []string{"checkpoint", "commitment"}})},
		{Type: TypeSharing, ID: "airport", Body: raw(t, Sharing{Version: "2", Classes: []string{}})},
	} {
		c.District, c.Action, c.Nonce = "harbour", Put, uint64(i)
		if err := r.Apply(3, testID("ann"), approve(t, r, c, "bob")); err != nil {
			t.Fatalf("%s %s: %v", c.Type, c.ID, err)
		}
	}
	h, ok := r.Holder(testID("fire"))
	if !ok || !h.May(KindRequest) || h.May(KindRegistry) || h.Type != TypeAgency {
		t.Errorf("got holder %+v, want one that may ask and do nothing else", h)
	}
	e, _ := r.Entry(TypeAgency, "fire")
	if keys, err := e.Keys(); err != nil || len(keys) != 1 {
		t.Errorf("got keys %v, %v", keys, err)
	}
	// One governor is enough to send an agency away, by the rule for its action.
	if err := r.Apply(4, testID("cem"), Change{District: "harbour", Action: Revoke, Type: TypeAgency, ID: "fire", Nonce: 9}); err != nil {
		t.Fatal(err)
	}
	if h, _ := r.Holder(testID("fire")); h.Status != Revoked {
		t.Errorf("got %+v, want it revoked", h)
	}
	var ids []string
	for _, e := range r.Entries(TypeOfficial) {
		ids = append(ids, e.ID)
	}
	if got := strings.Join(ids, " "); got != "ann bob cem dan eve reader registrar" {
		t.Errorf("got officials %s", got)
	}
	if got := len(r.Entries("")); got != len(r.entries) {
		t.Errorf("got %d entries, want all %d", got, len(r.entries))
	}
}

// No changes without the approvals that are needed alter the state, and the order
// of approvals is no matter. Who has approved is counted here by other means.
func TestNoChangeWithoutApprovals(t *testing.T) {
	start := governed(t)
	people := map[string]struct {
		department string
		planner    bool
		governor   bool
		registrar  bool
	}{
		"ann": {"traffic", true, true, true}, "bob": {"police", true, true, false}, "cem": {"audit", true, true, false},
		"dan": {"traffic", true, false, false}, "registrar": {"traffic", false, false, true},
		"eve": {}, "reader": {}, "stranger": {}, "d1": {}, "vote 1": {}, "control": {},
	}
	var names []string
	for n := range people {
		names = append(names, n)
	}
	slices.Sort(names)
	done, refused := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		r := start.Clone()
		for i := range rapid.IntRange(1, 6).Draw(t, "changes") {
			c := Change{District: "harbour", Action: Put, Nonce: rapid.Uint64Range(0, 8).Draw(t, "nonce"), Body: json.RawMessage(`{}`)}
			var counts func(n string) bool
			need := 2
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0:
				c.Type, c.ID = TypeJunction, "j1"
				b, _ := json.Marshal(testJunction("j1", "x", "y"))
				c.Body, counts = b, func(n string) bool { return people[n].planner }
			case 1:
				c.Type, c.ID, c.Body = TypePolicy, "day", json.RawMessage(fmt.Sprintf(`{"version":"%d","controller":"fixed","rules":""}`, i))
				counts = func(n string) bool { return n == "ann" || n == "bob" }
			case 2:
				c.Type, c.ID = TypeSoftware, fmt.Sprint("v", i)
				counts = func(n string) bool { return people[n].governor }
			case 3:
				c.Type, c.ID, c.Action, c.Body = TypeService, "control", Revoke, nil
				counts = func(n string) bool { return people[n].governor }
			case 4:
				c.Type, c.ID, c.Action, c.Body = TypeDevice, "d2", Revoke, nil
				counts, need = func(n string) bool { return people[n].registrar }, 1
			}
			sender := rapid.SampledFrom(names).Draw(t, "sender")
			of := names
			if rapid.Bool().Draw(t, "able") {
				of = []string{"ann", "bob", "cem", "dan"}
			}
			by := rapid.SliceOfNDistinct(rapid.SampledFrom(of), 0, 4, rapid.ID[string]).Draw(t, "by")
			c.Base = r.Base(c.Type, c.ID)
			forged := map[string]bool{}
			for _, n := range by {
				a, err := Approve(testKey(n), c)
				if err != nil {
					t.Fatal(err)
				}
				if rapid.IntRange(0, 9).Draw(t, "forge") == 0 {
					a.Signature[3] ^= 1
					forged[n] = true
				}
				c.Approvals = append(c.Approvals, a)
			}
			// By hand: who counts, once each, and of which departments.
			all, departments := map[string]bool{}, map[string]bool{}
			for _, n := range append(slices.Clone(by), sender) {
				if counts(n) && !forged[n] {
					all[n], departments[people[n].department] = true, true
				}
			}
			enough := len(all) >= need && len(departments) >= need
			before, other := r.Snapshot(), r.Clone()
			err := r.Apply(uint64(i+2), testID(sender), c)
			switch {
			case err == nil && (!enough || len(forged) > 0):
				t.Fatalf("%s %s of %s by %v (forged %v), sent by %s: carried out", c.Action, c.ID, c.Type, by, forged, sender)
			case err != nil && !bytes.Equal(r.Snapshot(), before):
				t.Fatalf("refused for %v, and changed the state", err)
			}
			if err == nil {
				done++
			} else {
				refused++
			}
			c.Approvals = slices.Clone(c.Approvals)
			slices.Reverse(c.Approvals)
			again := other.Apply(uint64(i+2), testID(sender), c)
			if (again == nil) != (err == nil) || !bytes.Equal(other.Snapshot(), r.Snapshot()) {
				t.Fatalf("with approvals the other way round: got %v, want %v, and the same state", again, err)
			}
		}
	})
	if t.Logf("%d changes carried out, %d refused", done, refused); done == 0 || refused == 0 {
		t.Error("the test shows nothing")
	}
}

// determined plays a long story of changes, good and bad, and returns everything
// that must be the same everywhere.
func determined(t *testing.T) string {
	r := governed(t)
	h := sha256.New()
	rnd := rand.New(rand.NewPCG(1, 2))
	people := []string{"ann", "bob", "cem", "dan", "eve", "registrar", "reader"}
	bodies := map[EntryType][]string{
		TypeDevice:     {`{"junction":"j1","key":"%s"}`, `{"junction":"j1","key":"%s","detectors":["x"]}`},
		TypeService:    {`{"key":"%s","signs":["command"]}`, `{"key":"%s","signs":["frame"]}`},
		TypeOfficial:   {`{"key":"%s","department":"fire","roles":["planner"]}`, `{"key":"%s","department":"courts","roles":["governor","planner"]}`},
		TypeAgency:     {`{"key":"%s","name":"A <&> B"}`},
		TypePolicy:     {`{"version":"%s","controller":"fixed","rules":""}`},
		TypeSoftware:   {`{"hash": "%s"}`, `[1e400, "%s"]`, `12345678901234567890123456789`},
		TypeSharing:    {`{"version":"%s","classes":["corridor"]}`, `{"version":"1","classes":["frame"]}`},
		TypeGovernance: {`{"version":1,"default":{"role":"governor","officials":1,"departments":1}}`, `{"version":1,"default":{"role":"governor","officials":4294967298,"departments":2}}`, `{"version":4294967297,"default":{"role":"governor","officials":2,"departments":2}}`},
		TypeJunction:   {string(raw(t, testJunction("j1", "x"))), strings.Replace(string(raw(t, testJunction("j1", "x"))), `"capacity":0`, `"capacity":4294967299`, 1), strings.Replace(string(raw(t, testJunction("j1"))), `"capacity":0`, `"capacity":2147483647`, 1)},
	}
	types := []EntryType{TypeDevice, TypeService, TypeOfficial, TypeAgency, TypePolicy, TypeSoftware, TypeSharing, TypeGovernance, TypeJunction, "lamp"}
	ok := 0
	for i := range 400 {
		typ := types[rnd.IntN(len(types))]
		c := Change{District: "harbour", Action: Put, Type: typ, ID: fmt.Sprint("n", rnd.IntN(30)), Nonce: uint64(rnd.IntN(1000))<<32 + 7}
		switch typ {
		case TypeGovernance:
			c.ID = GovernanceID
		case TypeJunction:
			c.ID = "j1"
		case TypePolicy:
			c.ID = "day"
		}
		if rnd.IntN(4) == 0 {
			c.Action = Revoke
		} else if b := bodies[typ]; len(b) > 0 {
			body := b[rnd.IntN(len(b))]
			if strings.Contains(body, "%s") {
				body = fmt.Sprintf(body, hex.EncodeToString(testPub(fmt.Sprint("key ", rnd.IntN(40)))))
			}
			c.Body = json.RawMessage(body)
		}
		at := rnd.Perm(len(people))
		by := []string{}
		for _, k := range at[1 : 1+rnd.IntN(4)] {
			by = append(by, people[k])
		}
		if rnd.IntN(8) != 0 {
			by = slices.DeleteFunc(by, func(n string) bool { return n == "reader" || n == "eve" || n == "registrar" || n == "dan" })
		}
		if rnd.IntN(6) == 0 {
			c.Until = uint64(rnd.IntN(200)) << rnd.IntN(40)
		}
		if len(by) > 0 {
			c = approve(t, r, c, by...)
		}
		err := r.Apply(uint64(i/3+2), testID(people[at[0]]), c)
		fmt.Fprintf(h, "%v\n", err == nil)
		if err == nil {
			ok++
		}
		state := r.Hash()
		h.Write(state[:])
		if i%50 == 49 { // who comes back from a snapshot goes on as the others
			if r, err = ParseSnapshot(r.Snapshot()); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.Write(r.Snapshot())
	return fmt.Sprintf("%d carried out, %x", ok, h.Sum(nil))
}

const goldenDeterminism = "84 carried out, 818d095d53f9afa822aa98c1ff95d56ee8f943ec714eb8e5666f7dc95077aaaf"

// The same records give the same state, whatever order maps are walked in.
func TestDeterminism(t *testing.T) {
	runs := 10
	if testing.Short() {
		runs = 3
	}
	for i := range runs {
		if got := determined(t); got != goldenDeterminism {
			t.Fatalf("run %d: got %s, want %s", i, got, goldenDeterminism)
		}
	}
}

// The same in another process, and where an int has 32 bits: the golden hash of
// TestDeterminism is the same for all.
func TestDeterminismElsewhere(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the test for another architecture; not with -short")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pass := func(cmd *exec.Cmd, dir string) {
		t.Helper()
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestDeterminism ") {
			t.Errorf("%v: got %v\n%s\nwant TestDeterminism to pass", cmd.Args, err, out)
		}
	}
	pass(exec.Command(exe, "-test.run=^TestDeterminism$", "-test.short", "-test.v"), "")
	if runtime.GOARCH != "amd64" || runtime.GOOS != "linux" {
		t.Skipf("%s/%s does not run programs for linux/386", runtime.GOOS, runtime.GOARCH)
	}
	gotool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs the go tool in PATH to build for 386")
	}
	bin := t.TempDir() + "/identity.386"
	build := exec.Command(gotool, "test", "-c", "-o", bin, ".")
	build.Env = append(os.Environ(), "GOARCH=386", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building for 386: %v\n%s", err, out)
	}
	pass(exec.Command(bin, "-test.run=^(TestDeterminism|TestGovernanceRefuses)$", "-test.short", "-test.v"), "")
}

func TestNeedIsOfTheMostTellingRule(t *testing.T) {
	need := func(role string) Need { return Need{Role: role, Officials: 1, Departments: 1} }
	g := Governance{Version: 1, Default: need("default"), Rules: []Rule{
		{Type: TypeDevice, Need: need("device")},
		{Type: TypeDevice, Action: Revoke, Need: need("revoke device")},
		{Type: TypePolicy, Action: Put, Need: need("put policy")},
	}}
	for _, tt := range []struct {
		typ          EntryType
		action, want string
	}{
		{TypeDevice, Put, "device"}, {TypeDevice, Revoke, "revoke device"}, {TypePolicy, Put, "put policy"}, {TypePolicy, Revoke, "default"}, {TypeService, Put, "default"}, {"lamp", "drop", "default"},
	} {
		if got := g.Need(tt.typ, tt.action).Role; got != tt.want {
			t.Errorf("%s of a %s: got the need of %s, want %s", tt.action, tt.typ, got, tt.want)
		}
	}
}

// FuzzGovernance: what is filed as governance can be met by the officials there
// are, and comes back from a snapshot as it was.
func FuzzGovernance(f *testing.F) {
	start := governed(f)
	f.Add([]byte(raw(f, testRules)))
	f.Add([]byte(raw(f, oneRegistrar)))
	f.Add([]byte(`{"version":1,"rules":[{"type":"device","role":"planner","officials":3,"departments":2,"named":["ann","bob","cem"]}],"default":{"role":"governor","officials":1,"departments":1}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := start.Clone()
		c := Change{District: "harbour", Action: Put, Type: TypeGovernance, ID: GovernanceID, Body: body, Nonce: 77, Base: r.Base(TypeGovernance, GovernanceID)}
		a, err := Approve(testKey("bob"), c)
		if err != nil {
			return
		}
		c.Approvals = []Approval{a}
		if err := r.Apply(9, testID("ann"), c); err != nil {
			if k := kind.Of(err); k != kind.Invalid && k != kind.Conflict {
				t.Errorf("got an error of kind %v: %v", k, err)
			}
			return
		}
		again, err := ParseSnapshot(r.Snapshot())
		if err != nil || again.Hash() != r.Hash() {
			t.Fatalf("got %v from the snapshot of %s", err, body)
		}
		g, _ := again.Governance()
		if err := again.possible(g, ""); err != nil {
			t.Errorf("%v: filed as %s", err, body)
		}
	})
}

// FuzzChange: a change reads the same after it was written again.
func FuzzChange(f *testing.F) {
	r := governed(f)
	for _, c := range []Change{approve(f, r, plan(f, 5), "bob", "cem"), change(f, nil)} {
		b, err := c.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseChange(b)
		if err != nil {
			if kind.Of(err) != kind.Invalid {
				t.Errorf("got an error of kind %v: %v", kind.Of(err), err)
			}
			return
		}
		in, err := ApprovalInput(c)
		if err != nil {
			return
		}
		out, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseChange(out)
		if err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		if got, err := ApprovalInput(again); err != nil || !bytes.Equal(got, in) {
			t.Errorf("got %q, %v after a round trip, want %q", got, err, in)
		}
	})
}

// The most that one record can ask of a validator.
func BenchmarkApprovals(b *testing.B) {
	for _, n := range []int{0, 1, MaxApprovals} {
		b.Run(fmt.Sprintf("approvals=%d", n), func(b *testing.B) {
			g := governedGenesis(b)
			var names []string
			for i := range n {
				names = append(names, fmt.Sprint("o", i))
				g.Entries = append(g.Entries, entry(b, TypeOfficial, names[i], Official{Key: testPub(names[i]), Department: names[i], Roles: []string{Planner, Registrar}}))
			}
			r, err := NewRegistry(g)
			if err != nil {
				b.Fatal(err)
			}
			c := change(b, nil)
			if n > 0 {
				c = approve(b, r, plan(b, 5), names...)
			}
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				r := r.Clone()
				b.StartTimer()
				if err := r.Apply(2, testID("ann"), c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
