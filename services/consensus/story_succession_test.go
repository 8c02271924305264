package consensus

import (
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/proto"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// twice says one thing and right after it another in each prepare, while on.
func twice(on *atomic.Bool) way {
	return func(pc parcel, send func(parcel)) {
		send(pc)
		if m := engineMessage(pc); m.GetPrepare() != nil && on.Load() {
			m = proto.Clone(m).(*protos.Message)
			m.GetPrepare().Digest = strings.Repeat("ab", 32)
			send(carrying(pc, m))
		}
	}
}

// A validator that came later says two things in one slot, is found out, and is
// revoked. What the others wrote down convicts it before anybody who has only the
// genesis document, also after it has left; what is said in its name later is
// nobody's vote.
func TestStoryANewcomerLies(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 4)
	var lies atomic.Bool
	c.prepare = func(n uint64, v *Validator) {
		if n == 5 {
			v.tap = twice(&lies)
		}
	}
	c.sit(3, 1, 2, 3, 4)
	c.candidate(5, nil)
	c.add(1, 5)
	c.sit(4, 1, 2, 3, 4, 5)
	since := c.nodes[0].v.Stats().Members
	lies.Store(true)
	honest := []uint64{1, 2, 3, 4}
	for _, n := range honest {
		eventually(t, "the liar is accused", func() bool { return len(c.nodes[n-1].v.Evidence()) > 0 })
	}
	lies.Store(false)
	c.revoke(1, 5)
	c.sit(3, 1, 2, 3, 4)
	c.left(5)
	c.progress(1, 2, 3, 4)
	trust := ledger.Trust{Genesis: c.genesis}
	for _, n := range honest {
		files, err := filepath.Glob(filepath.Join(c.path(n), "evidence", "votes-5-*.json"))
		if err != nil || len(files) == 0 {
			t.Fatalf("validator %d keeps %v, %v; want files against 5", n, files, err)
		}
		for _, f := range files {
			raw, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			a, err := ledger.ParseAccusation(raw)
			if err != nil {
				t.Fatal(err)
			}
			j, err := a.Judge(trust)
			if err != nil || len(j.Guilty) != 1 || j.Guilty[0].Name != "validator 5" || j.Guilty[0].Department != "department 5" {
				t.Errorf("validator %d, %s: got %+v, %v; want 5 guilty", n, filepath.Base(f), j, err)
			}
			if len(a.Members) != 1 || a.Members[0].Height() != since {
				t.Errorf("validator %d: got %d steps, want one, to the members since %d", n, len(a.Members), since)
			}
			a.Members = nil
			if j, err := a.Judge(trust); err == nil {
				t.Errorf("validator %d: without the members it comes to %+v", n, j)
			}
		}
		for _, a := range c.nodes[n-1].v.Evidence() {
			if j, err := a.Judge(trust); err != nil || len(j.Guilty) != 1 || j.Guilty[0].Name != "validator 5" {
				t.Errorf("validator %d keeps more: %+v, %v", n, j, err)
			}
		}
	}
	// The same key, after it was revoked.
	v := c.nodes[0].v
	after := v.Stats().Members
	say := func(d byte) []byte {
		p := testParcel(5, 2)
		p.Config, p.Vote = uint64(after), vote{slot{1, after + 1, phaseCommit}, ledger.Hash{d}}
		return p.seal(voteKey(5), sha256.Sum256(c.genesis))[:parcelMin]
	}
	a := ledger.NewVoteAccusation(sha256.Sum256(c.genesis), say(1), say(2))
	a.Members = v.core.succession.whole()
	if j, err := a.Judge(trust); err == nil || !strings.Contains(j.Reason, "counts for nothing") {
		t.Errorf("two votes of who was revoked: got %+v, %v; want them to count for nothing", j, err)
	}
	c.quiet()
	c.check()
}

// However a validator came by its blocks, it can show how the members came to be;
// also after its file of it is lost or spoiled.
func TestSuccessionIsKept(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 20, -1)
	h.grow(30)
	h.member(5, "put")
	h.grow(40)
	h.member(6, "put")
	h.grow(30)
	h.member(2, "revoke")
	h.grow(30)
	want := []ledger.Height{0, 31, 72, 103}
	check := func(name string, k *core) {
		t.Helper()
		var got []ledger.Height
		sets, err := ledger.CheckSteps(h.c.Genesis, k.succession.whole())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, s := range sets {
			got = append(got, s.Since)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got sets since %v, want %v", name, got, want)
		}
		if got := k.succession.at(31).Since; got != 0 {
			t.Errorf("%s: block 31 decided by those since %d, want 0", name, got)
		}
		if got := k.succession.at(32).Since; got != 31 {
			t.Errorf("%s: block 32 decided by those since %d, want 31", name, got)
		}
	}
	check("executed", h.k)
	_, k := h.newcomer()
	h.run(h.fetcher(k, -1))
	check("fetched", k)
	c, k := h.newcomer()
	h.run(h.fetcher(k, 5))
	check("by headers and a snapshot", k)
	for name, spoil := range map[string]func(path string) error{
		"started again": func(string) error { return nil },
		"lost":          os.Remove,
		"spoiled":       func(path string) error { return os.WriteFile(path, []byte("[]x"), 0o600) },
		"cut short":     func(path string) error { return os.WriteFile(path, []byte("[]"), 0o600) },
	} {
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		if err := spoil(filepath.Join(c.Dir, "succession")); err != nil {
			t.Fatal(err)
		}
		k = openTest(t, c)
		check(name, k)
	}
	// A step of a block that was not stored any more, as after a crash.
	if err := k.succession.cut(80); err != nil {
		t.Fatal(err)
	}
	if got := k.succession.since(); got != 72 {
		t.Errorf("cut at 80: got the last change at %d, want 72", got)
	}
	// The registry of any block can be had, by its hash.
	for _, at := range []ledger.Height{1, 31, 32, 72, 73, 100, 130} {
		hd, err := k.store.header(at)
		if err != nil {
			t.Fatal(err)
		}
		reg, err := k.registryAt(at, hd.Registry)
		if err != nil || ledger.Hash(reg.Hash()) != hd.Registry {
			t.Errorf("registry at block %d: got %v", at, err)
		}
	}
	if _, err := k.registryAt(50, ledger.Hash{1}); err == nil {
		t.Error("a registry that never was is found")
	}
}
