package consensus

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

// Two versions run side by side until the height from which one of them would
// compute otherwise. There it ends, saying why; the other three go on by the new
// rule, and the fourth is with them again once it has the new build.
func TestStoryTwoVersions(t *testing.T) {
	long(t)
	c := newCluster(t, 4)
	c.tune = func(cfg *Config) {
		if cfg.Number == 4 {
			cfg.Features = []string{"of-old"}
		}
	}
	c.start(c.all()...)
	u := newUnit(1)
	nonce := uint64(0)
	send := func(base identity.Digest, typ identity.EntryType, id string, body any, by ...uint64) (verdict string) {
		t.Helper()
		nonce++
		b := batch(changeTo(t, nonce, base, typ, id, body))
		c.submit(b)
		c.decided(b, by...)
		_, _, verdict = where(t, c.blocks(by[0]), b)
		return verdict
	}
	agency := func(n string) identity.Agency { return identity.Agency{Name: n, Key: pub(key("agency %s", n))} }
	from := uint64(c.nodes[0].v.Stats().Height) + 8
	if v := send(nil, identity.TypeFeature, identity.FeatureBaseRequired, identity.Feature{From: from}, 1, 2, 3, 4); v != "1" {
		t.Fatalf("the feature's entry: got verdict %s, want 1", v)
	}
	if v := send(nil, identity.TypeAgency, "before", agency("before"), 1, 2, 3, 4); v != "1" {
		t.Errorf("a change without a base, before: got verdict %s, want 1", v)
	}
	for uint64(c.nodes[0].v.Stats().Height) < from {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, 1, 2, 3)
	}
	old := c.nodes[3]
	var err error
	select {
	case err = <-old.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("the old build goes on: %+v", old.v.Stats())
	}
	var unknown *unknownFeatures
	if !errors.As(err, &unknown) || uint64(unknown.height) != from || !strings.Contains(err.Error(), fmt.Sprintf("block %d: features: base-required: in force and not known to this build", from)) {
		t.Errorf("the old build ended with %v; want it to name the feature and block %d", err, from)
	}
	if h := uint64(old.v.Stats().Height); h != from-1 {
		t.Errorf("the old build ended at height %d, want %d, the last that it can compute", h, from-1)
	}
	old.bus.Close()
	c.nodes[3] = nil
	if v := send(nil, identity.TypeAgency, "after", agency("after"), 1, 2, 3); v != "0" {
		t.Errorf("a change without a base, after: got verdict %s, want 0", v)
	}
	if n := c.nodes[0].v.Stats().RecordsRefused[validate.RuleRegistry]; n != 1 {
		t.Errorf("refused by rule %s: got %d, want 1", validate.RuleRegistry, n)
	}
	if v := send(make(identity.Digest, 32), identity.TypeAgency, "after", agency("after"), 1, 2, 3); v != "1" {
		t.Errorf("a change with a base: got verdict %s, want 1", v)
	}

	// Started again as it was, it does no more than say so again.
	b, err := c.server.Connect("validator 4")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	v, err := New(c.config(4, b))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Run(t.Context()); !errors.As(err, &unknown) || uint64(unknown.height) != from {
		t.Errorf("the old build, started again: got %v, want the same error", err)
	}
	c.tune = nil
	c.start(4)
	last := batch(u.frame(time.Now()))
	c.submit(last)
	c.decided(last, c.all()...)
	c.check()
}

// Nothing is voted for, and no block computed, by who does not know what is in
// force; nor is a state taken from others gone on from.
func TestUnknownFeatureIsNotGuessedAt(t *testing.T) {
	b := newBench(t)
	b.decide(b.propose(batch(changeTo(t, 1, nil, identity.TypeFeature, "new", identity.Feature{From: 3}))))
	p := b.propose(batch(newUnit(1).frame(b.now)))
	if err := b.verify(p); err != nil {
		t.Errorf("before its height: got %v", err)
	}
	b.decide(p)
	p = b.propose(batch(newUnit(2).frame(b.now)))
	var r *refusal
	if err := b.verify(p); !errors.As(err, &r) || r.reason != refusedFeature {
		t.Errorf("at its height: got %v, want it refused as %s", err, refusedFeature)
	}
	var fatal fatalError
	if err := b.k.apply(p, b.votes(p, 3)); !errors.As(err, &fatal) || b.k.height() != 2 {
		t.Errorf("decided by others: got %v at height %d, want it fatal, at 2", err, b.k.height())
	}
	b.c.Features = []string{"new"}
	b.reopen()
	if err := b.verify(p); err != nil {
		t.Errorf("a build that knows it: got %v", err)
	}
	b.decide(p)
}
