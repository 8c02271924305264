package identity

import (
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// keptDistrict has officials of two departments and the feature from block 1.
func keptDistrict(t *testing.T, need Need) (*Registry, []ed25519.PrivateKey) {
	t.Helper()
	var keys []ed25519.PrivateKey
	g := &Genesis{District: "d"}
	add := func(ty EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, Entry{Type: ty, ID: id, Body: b})
	}
	for i, dep := range []string{"traffic", "traffic", "police"} {
		k := ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune('a'+i)), 32)))
		keys = append(keys, k)
		add(TypeOfficial, []string{"ann", "bob", "cy"}[i], Official{Key: PublicKey(k.Public().(ed25519.PublicKey)), Department: dep, Roles: []string{Governor}})
	}
	add(TypeGovernance, GovernanceID, Governance{Version: 1, Default: Need{Role: Governor, Officials: 1, Departments: 1},
		Rules: []Rule{{Type: TypeRedaction, Need: need}}})
	add(TypeFeature, FeatureRetention, Feature{From: 1})
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	return r, keys
}

var nonce uint64

func changeOf(t *testing.T, r *Registry, ty EntryType, id string, body any) Change {
	t.Helper()
	nonce++
	c := Change{District: "d", Action: Put, Type: ty, ID: id, Nonce: nonce, Base: r.Base(ty, id)}
	if body == nil {
		c.Action = Revoke
		return c
	}
	var err error
	if c.Body, err = json.Marshal(body); err != nil {
		t.Fatal(err)
	}
	return c
}

func send(t *testing.T, r *Registry, height uint64, c Change, by ed25519.PrivateKey, approvers ...ed25519.PrivateKey) error {
	t.Helper()
	for _, k := range approvers {
		a, err := Approve(k, c)
		if err != nil {
			t.Fatal(err)
		}
		c.Approvals = append(c.Approvals, a)
	}
	return r.Apply(height, IDOf(by.Public().(ed25519.PublicKey)), c)
}

func TestRedactionNeedsTwoDepartments(t *testing.T) {
	r, keys := keptDistrict(t, Need{Role: Governor, Officials: 2, Departments: 2})
	body := Redaction{Commitment: make(Digest, 32), Basis: "court-order", Reference: "4 K 12/26"}
	if err := send(t, r, 5, changeOf(t, r, TypeRedaction, "17", body), keys[0]); kind.Of(err) != kind.Denied {
		t.Errorf("of one official: got %v, want denied", err)
	}
	if err := send(t, r, 5, changeOf(t, r, TypeRedaction, "17", body), keys[0], keys[1]); kind.Of(err) != kind.Denied {
		t.Errorf("of one department: got %v, want denied", err)
	}
	before := r.Clone()
	if err := send(t, r, 5, changeOf(t, r, TypeRedaction, "17", body), keys[0], keys[2]); err != nil {
		t.Fatal(err)
	}
	ts := r.Tombstones(0)
	if len(ts) != 1 || ts[0].Index != 17 || ts[0].Since != 5 || ts[0].Basis != "court-order" || len(before.Tombstones(0)) != 0 || len(r.Tombstones(5)) != 0 {
		t.Errorf("got %+v, want the tombstone of leaf 17 from block 5", ts)
	}
	if ts[0].Void(make([]byte, 32), 18) || !ts[0].Void(make([]byte, 32), 17) || !ts[0].Void([]byte(strings.Repeat("x", 32)), 18) {
		t.Error("void: want for a leaf to come and for another commitment only")
	}
	if err := send(t, r, 6, changeOf(t, r, TypeRedaction, "17", body), keys[0], keys[2]); kind.Of(err) != kind.Conflict {
		t.Errorf("twice: got %v, want a conflict", err)
	}
	if err := send(t, r, 6, changeOf(t, r, TypeRedaction, "17", nil), keys[0], keys[2]); kind.Of(err) != kind.Invalid {
		t.Errorf("revoked: got %v, want invalid: what is gone does not come back", err)
	}
	back, err := ParseSnapshot(r.Snapshot())
	if err != nil || back.Hash() != r.Hash() || len(back.Tombstones(0)) != 1 {
		t.Errorf("snapshot: got %v, %v, want the same", back.Tombstones(0), err)
	}
	// A governance that asks for less does not make less enough.
	weak, keys := keptDistrict(t, Need{Role: Governor, Officials: 2, Departments: 1})
	if err := send(t, weak, 5, changeOf(t, weak, TypeRedaction, "17", body), keys[0], keys[2]); err == nil || !strings.Contains(err.Error(), "at least two departments") {
		t.Errorf("under a governance of one department: got %v, want denied", err)
	}
}

func TestRetentionEntries(t *testing.T) {
	r, keys := keptDistrict(t, Need{Role: Governor, Officials: 2, Departments: 2})
	week := int64(7 * 86400)
	for _, tc := range []struct {
		name string
		t    EntryType
		id   string
		body any
		want string // "" is accepted
	}{
		{"retention", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"control", week, 2 * week}, {"readings", 0, week}}}, ""},
		{"another", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"readings", 0, 2 * week}}}, ""},
		{"other id", TypeRetention, "x", Retention{1, nil}, "the one retention entry"},
		{"version", TypeRetention, RetentionID, Retention{2, nil}, "body.version"},
		{"the registry", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"registry", 0, week}}}, "classes[0].class"},
		{"ceiling below floor", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"readings", week, week - 1}}}, "ceiling_s"},
		{"floor", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"readings", -1, week}}}, "floor_s"},
		{"order", TypeRetention, RetentionID, Retention{1, []ClassRetention{{"readings", 0, week}, {"access", 0, week}}}, "in order"},
		{"hold", TypeHold, "h1", Hold{Case: "12/26", By: "court", Junctions: []traffic.JunctionID{"h0101"}}, ""},
		{"hold again", TypeHold, "h1", Hold{Case: "12/26", By: "court"}, "used before"},
		{"hold without case", TypeHold, "h2", Hold{By: "court"}, "case"},
		{"hold of nobody", TypeHold, "h2", Hold{Case: "12/26"}, "body.by"},
		{"hold that ends first", TypeHold, "h2", Hold{Case: "a", By: "b", FromUnixMS: 2, ToUnixMS: 1}, "to_unix_ms"},
		{"hold of leaves and more", TypeHold, "h2", Hold{Case: "a", By: "b", Leaves: []uint64{1}, Classes: []string{"control"}}, "leaves"},
		{"hold of the registry", TypeHold, "h2", Hold{Case: "a", By: "b", Classes: []string{"registry"}}, "classes[0]"},
		{"redaction of no leaf", TypeRedaction, "07", Redaction{Commitment: make(Digest, 32), Basis: "minor"}, "index of a leaf"},
		{"redaction without commitment", TypeRedaction, "7", map[string]string{"basis": "minor"}, "commitment"},
		{"redaction without basis", TypeRedaction, "7", Redaction{Commitment: make(Digest, 32), Basis: "because"}, "basis"},
	} {
		c := changeOf(t, r, tc.t, tc.id, tc.body)
		err := send(t, r, 3, c, keys[0], keys[2])
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
	}
	p, e, ok := r.Retention()
	if !ok || len(p.Classes) != 1 || e.ID != RetentionID {
		t.Errorf("got %+v, %+v, want the second retention", p, e)
	}
	clone := r.Clone()
	if err := send(t, r, 4, changeOf(t, r, TypeHold, "h1", nil), keys[0]); err != nil {
		t.Fatal(err)
	}
	if len(r.Holds()) != 0 || len(clone.Holds()) != 1 {
		t.Errorf("got %d holds after the release, %d in the copy of before; want 0 and 1", len(r.Holds()), len(clone.Holds()))
	}
	back, err := ParseSnapshot(r.Snapshot())
	if err != nil || len(back.Holds()) != 0 {
		t.Errorf("snapshot: got %d holds, %v, want 0", len(back.Holds()), err)
	}
	if back, err = ParseSnapshot(clone.Snapshot()); err != nil || len(back.Holds()) != 1 {
		t.Errorf("snapshot: got %d holds, %v, want 1", len(back.Holds()), err)
	}
	// Without the feature nobody files such entries.
	delete(r.features, FeatureRetention)
	if err := send(t, r, 5, changeOf(t, r, TypeHold, "h3", Hold{Case: "a", By: "b"}), keys[0]); err == nil || !strings.Contains(err.Error(), "feature") {
		t.Errorf("without the feature: got %v, want refused", err)
	}
}
