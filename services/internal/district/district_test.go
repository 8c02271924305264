package district_test

import (
	"bytes"
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
