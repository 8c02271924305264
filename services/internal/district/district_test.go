package district_test

import (
	"bytes"
	"crypto/ed25519"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

func options() district.Options {
	j := &traffic.Junction{
		ID: "A1", Lanes: []traffic.Lane{{ID: "in"}, {ID: "out"}}, Groups: []traffic.Group{{Kind: traffic.Vehicles}},
		Movements: []traffic.Movement{{From: "in", To: "out"}}, Stages: []traffic.Stage{{State: "G"}}, Conflicts: [][]int{nil},
		Timing: traffic.Timing{MinGreenMS: 5000, YellowMS: 3000}, Plan: traffic.Plan{Steps: []traffic.PlanStep{{DurationMS: 30000, IntergreenMS: 3000}}},
	}
	return district.Options{ID: "harbour", Junctions: []*traffic.Junction{j}, Created: time.Unix(1000, 0),
		PolicyName: "p", Policy: identity.Policy{Version: "1", Controller: "actuated", Rules: "field"}}
}

func TestOpenMakesADistrictOnceAndFindsItAgain(t *testing.T) {
	dir := t.TempDir()
	one, err := district.Open(dir, options())
	if err != nil {
		t.Fatal(err)
	}
	two, err := district.Open(dir, options())
	if err != nil {
		t.Fatal(err)
	}
	if one.GenesisHash != two.GenesisHash || !bytes.Equal(one.Policy, two.Policy) || one.LogKey != two.LogKey {
		t.Error("the second Open made another district")
	}
	reg, err := identity.NewRegistry(&one.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	key, err := one.Key(string(district.DeviceID("A1")))
	if err != nil {
		t.Fatal(err)
	}
	e := identity.Sign(key, identity.KindFrame, identity.JSON, []byte("{}"))
	h, ok := reg.Holder(e.Key)
	if !ok || !e.Verify(h.Key) || !h.May(identity.KindFrame) || h.May(identity.KindCommand) {
		t.Errorf("device: got holder %+v %v, want one that may sign frames and nothing else", h, ok)
	}
	if n := len(reg.Validators()); n != 4 {
		t.Errorf("got %d validators, want 4", n)
	}
	if _, err := torchwood.ParsePolicy(one.Policy); err != nil {
		t.Errorf("policy is not a tlog-policy: %v\n%s", err, one.Policy)
	}
	if !strings.Contains(string(one.Policy), "group validators 3 ") {
		t.Errorf("policy does not ask for 3 of 4:\n%s", one.Policy)
	}
}

func TestKeysAreReadableByTheirOwnerOnly(t *testing.T) {
	dir := t.TempDir()
	if _, err := district.Open(dir, options()); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "keys", "*.key"))
	if err != nil || len(files) < 11 {
		t.Fatalf("got %d key files, %v, want at least 11", len(files), err)
	}
	for _, f := range files {
		if s, err := os.Stat(f); err != nil || s.Mode().Perm() != 0o600 {
			t.Errorf("%s: got mode %v, %v, want 0600", filepath.Base(f), s.Mode().Perm(), err)
		}
	}
}

func TestNextBootRisesAcrossOpens(t *testing.T) {
	dir := t.TempDir()
	for want := uint64(1); want <= 3; want++ {
		d, err := district.Open(dir, options())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := d.NextBoot(); err != nil || got != want {
			t.Errorf("got boot %d, %v, want %d", got, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "boot"), []byte("many\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := district.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := d.NextBoot(); err == nil {
		t.Errorf("got boot %d from a damaged counter, want an error: a reused epoch would accuse the device", n)
	}
}

func TestOpenRefusesABadDefinition(t *testing.T) {
	o := options()
	o.Junctions[0].Stages[0].State = "GG"
	_, err := district.Open(t.TempDir(), o)
	if err == nil || !strings.Contains(err.Error(), "stages[0].state") {
		t.Errorf("got %v, want the field of the definition that is wrong", err)
	}
}

// Whoever asks first makes the key; all get the same, also all at once and after
// a restart.
func TestTokenKeyIsOne(t *testing.T) {
	dir := t.TempDir()
	if _, err := district.Open(dir, options()); err != nil {
		t.Fatal(err)
	}
	type got struct {
		key []byte
		err error
	}
	c := make(chan got)
	for range 8 {
		go func() {
			d, err := district.Load(dir)
			if err != nil {
				c <- got{nil, err}
				return
			}
			k, err := d.TokenKey()
			c <- got{k, err}
		}()
	}
	var first []byte
	for range 8 {
		g := <-c
		if g.err != nil {
			t.Fatal(g.err)
		}
		if first == nil {
			first = g.key
		}
		if !bytes.Equal(g.key, first) {
			t.Error("two keys were handed out")
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, "keys", ".tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
	s, err := os.Stat(filepath.Join(dir, "keys", "device-tokens.key"))
	if err != nil || s.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want a file of mode 0600", s, err)
	}
}

// A new district asks for two departments wherever one person's word would be too
// little, and its folder has the keys to try it; one registrar still files
// devices.
func TestNewDistrictsAreGoverned(t *testing.T) {
	d, err := district.Open(t.TempDir(), options())
	if err != nil {
		t.Fatal(err)
	}
	reg, err := identity.NewRegistry(&d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	g, filed := reg.Governance()
	if !filed {
		t.Fatal("no governance entry in genesis")
	}
	one := func(role string) identity.Need { return identity.Need{Role: role, Officials: 1, Departments: 1} }
	for _, want := range []struct {
		typ    identity.EntryType
		action string
		need   identity.Need
	}{
		{identity.TypeDevice, identity.Put, one(identity.Registrar)}, {identity.TypeDevice, identity.Revoke, one(identity.Enroller)},
		{identity.TypeClaim, identity.Put, one(identity.Enroller)}, {identity.TypeClaim, identity.Revoke, one(identity.Enroller)},
	} {
		if n := g.Need(want.typ, want.action); n.String() != want.need.String() {
			t.Errorf("%s %s: got %v, want %v", want.action, want.typ, n, want.need)
		}
	}
	for _, typ := range []identity.EntryType{identity.TypeService, identity.TypeOfficial, identity.TypeValidator, identity.TypeJunction,
		identity.TypePolicy, identity.TypeSoftware, identity.TypeAgency, identity.TypeSharing, identity.TypeGovernance} {
		for _, action := range []string{identity.Put, identity.Revoke} {
			n := g.Need(typ, action)
			if n.Officials != 2 || n.Departments != 2 {
				t.Errorf("%s %s: got %v, want two departments", action, typ, n)
			}
		}
	}
	id := func(name string) identity.KeyID {
		k, err := d.Key(name)
		if err != nil {
			t.Fatal(err)
		}
		return identity.IDOf(k.Public().(ed25519.PublicKey))
	}
	c := identity.Change{District: "harbour", Action: identity.Put, Type: identity.TypePolicy, ID: "p", Nonce: 1,
		Body: []byte(`{"version":"2","controller":"fixed","rules":"field"}`), Base: reg.Base(identity.TypePolicy, "p")}
	for _, name := range []string{district.RegistrarKey, district.PoliceOfficial, district.AmbulanceOfficial} {
		if err := reg.Clone().Apply(1, id(name), c); err == nil || !strings.HasPrefix(err.Error(), "approvals: put of a policy needs 2 officials of 2 departments with role planner, has 1 of ") {
			t.Errorf("%s alone: got %v", name, err)
		}
	}
	k, err := d.Key(district.AmbulanceOfficial)
	if err != nil {
		t.Fatal(err)
	}
	a, err := identity.Approve(k, c)
	if err != nil {
		t.Fatal(err)
	}
	c.Approvals = []identity.Approval{a}
	if err := reg.Apply(1, id(district.PoliceOfficial), c); err != nil {
		t.Errorf("two departments: got %v", err)
	}
}
