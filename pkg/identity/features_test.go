package identity

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

func TestFeatures(t *testing.T) {
	r := testRegistry(t)
	nonce := uint64(100)
	try := func(height uint64, action, name, body string) error {
		nonce++
		return r.Apply(height, testID("registrar"), change(t, func(c *Change) {
			c.Action, c.Type, c.ID, c.Body, c.Nonce = action, TypeFeature, name, json.RawMessage(body), nonce
		}))
	}
	for _, tc := range []struct {
		name   string
		height uint64
		action string
		id     string
		body   string
		kind   kind.Kind
		want   string
	}{
		{"at once", 10, Put, "x", `{"from":10}`, kind.Invalid, "body.from: 10: must be later than block 10"},
		{"never", 10, Put, "x", `{}`, kind.Invalid, "body.from: 0: must be later"},
		{"another field", 10, Put, "x", `{"from":20,"to":30}`, kind.Invalid, "body"},
		{"too large", 10, Put, "x", `{"from":18446744073709551616}`, kind.Invalid, "body"},
		{"a name with a space", 10, Put, "a b", `{"from":20}`, kind.Invalid, "a feature's name"},
		{"a long name", 10, Put, strings.Repeat("x", MaxFeatureName+1), `{"from":20}`, kind.Invalid, "a feature's name"},
		{"none such to revoke", 10, Revoke, "x", ``, kind.NotFound, "no feature"},
	} {
		hash := r.Hash()
		err := try(tc.height, tc.action, tc.id, tc.body)
		if kind.Of(err) != tc.kind || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s: %s", tc.name, err, tc.kind, tc.want)
		}
		if r.Hash() != hash {
			t.Errorf("%s: the state has changed", tc.name)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(try(10, Put, "x", `{"from":20}`))
	must(try(11, Put, "y", `{"from":30}`))
	must(try(12, Put, "y", `{"from":25}`)) // earlier
	must(try(13, Put, "z", `{"from":30}`))
	must(try(28, Revoke, "z", ``))
	loaded, err := ParseSnapshot(r.Snapshot())
	must(err)
	if loaded.Hash() != r.Hash() || !bytes.Equal(loaded.Snapshot(), r.Snapshot()) {
		t.Error("the state from a snapshot is another")
	}
	for name, r := range map[string]*Registry{"the registry": r, "a clone": r.Clone(), "from a snapshot": loaded} {
		for _, tc := range []struct {
			feature string
			height  uint64
			want    bool
		}{{"x", 19, false}, {"x", 20, true}, {"x", 1 << 60, true}, {"y", 24, false}, {"y", 25, true}, {"z", 31, false}, {"w", 99, false}} {
			if got := r.Active(tc.feature, tc.height); got != tc.want {
				t.Errorf("%s: %s active at %d: got %v, want %v", name, tc.feature, tc.height, got, tc.want)
			}
		}
		for height, want := range map[uint64][]string{19: nil, 20: {"x"}, 25: {"x", "y"}} {
			if got := r.Unknown(Features(), height); !slices.Equal(got, want) {
				t.Errorf("%s: unknown at %d: got %v, want %v", name, height, got, want)
			}
		}
		if got := r.Unknown([]string{"x"}, 30); !slices.Equal(got, []string{"y"}) {
			t.Errorf("%s: unknown to who knows x: got %v, want y", name, got)
		}
	}
	// What is in force, or is from the next block on, stays.
	for _, height := range []uint64{19, 20, 40} {
		for _, action := range []string{Put, Revoke} {
			if err := try(height, action, "x", `{"from":50}`); kind.Of(err) != kind.Conflict || !strings.Contains(err.Error(), "in force from block 20") {
				t.Errorf("%s at %d: got %v, want a conflict", action, height, err)
			}
		}
	}
	// A clone's features are its own.
	c := r.Clone()
	must(c.Apply(40, testID("registrar"), change(t, func(c *Change) {
		c.Type, c.ID, c.Body, c.Nonce = TypeFeature, "w", json.RawMessage(`{"from":41}`), 99
	})))
	if r.Active("w", 41) || !c.Active("w", 41) {
		t.Error("a change to a clone shows in the original")
	}
}

// From its height on, a change must say what it was made to; before, as ever.
func TestFeatureBaseRequired(t *testing.T) {
	r := testRegistry(t)
	put := func(height, nonce uint64, base Digest) error {
		return r.Apply(height, testID("registrar"), change(t, func(c *Change) {
			c.Type, c.ID, c.Body, c.Nonce, c.Base = TypePolicy, "day", raw(t, Policy{Version: "2", Controller: "fixed"}), nonce, base
		}))
	}
	if err := r.Apply(5, testID("registrar"), change(t, func(c *Change) {
		c.Type, c.ID, c.Body, c.Nonce = TypeFeature, FeatureBaseRequired, json.RawMessage(`{"from":8}`), 1
	})); err != nil {
		t.Fatal(err)
	}
	if err := put(7, 2, nil); err != nil {
		t.Errorf("before its height: got %v", err)
	}
	if err := put(8, 3, nil); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "base: must be given: feature base-required is in force from block 8 on") {
		t.Errorf("at its height: got %v, want the base asked for", err)
	}
	if err := put(8, 4, r.Base(TypePolicy, "day")); err != nil {
		t.Errorf("with the base: got %v", err)
	}
}
