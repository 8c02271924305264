package consensus

import (
	"bytes"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Whatever is remembered, an id is the hash of the bytes: of parts of one memory,
// of equal bytes elsewhere, and after more than is remembered.
func TestRequestIDs(t *testing.T) {
	var r requestIDs
	whole := bytes.Repeat([]byte("payload "), 1000)
	parts := [][]byte{whole, whole[:10], whole[:11], whole[:10], whole[8:], whole[8:16], bytes.Clone(whole), nil, {}}
	for i, p := range parts {
		for range 2 {
			if got, want := r.of(p), ledger.RequestID(p); got != want {
				t.Fatalf("part %d: got %x, want %x", i, got, want)
			}
		}
	}
	large := make([]byte, requestIDsBytes/4)
	for i := range 3 * requestIDsMost {
		p := []byte{byte(i), byte(i >> 8)}
		if i%100 == 0 {
			p = append(bytes.Clone(large), p...)
		}
		if got, want := r.of(p), ledger.RequestID(p); got != want {
			t.Fatalf("request %d: got %x, want %x", i, got, want)
		}
		if n := len(r.young) + len(r.old); n > 2*requestIDsMost {
			t.Fatalf("%d are remembered, want at most %d", n, 2*requestIDsMost)
		}
		if r.bytes > requestIDsBytes+len(large)+2 {
			t.Fatalf("%d bytes are kept alive", r.bytes)
		}
	}
}

// A validator checks the signatures of a request once, whether it comes by the
// stream, by a proposal, or again; and once more under another registry.
func TestSignaturesAreCheckedOnce(t *testing.T) {
	b := newBench(t)
	checked := 0
	count := func(reg *identity.Registry, cs []validate.Candidate) {
		checked += len(cs)
		newVerifier()(reg, cs)
	}
	b.k.verifier = count
	u := newUnit(1)
	raw := batch(u.frame(b.now), u.frame(b.now))
	take := func() {
		t.Helper()
		m, err := wire.DecodeBatch(raw)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.k.prepare(bytes.Clone(raw), m, count); err != nil {
			t.Fatal(err)
		}
	}
	take()
	take()
	if checked != 2 {
		t.Errorf("taken twice: %d signatures checked, want 2", checked)
	}
	b.decide(b.propose(raw))
	take()
	if checked != 2 {
		t.Errorf("proposed, decided and taken again: %d signatures checked, want 2", checked)
	}
	// Another leader's proposal may be here before the stream is.
	raw = batch(u.frame(b.now))
	other := newBench(t)
	other.decide(other.propose(b.k.newest.Batches[0]))
	p := other.propose(raw)
	if err := b.verify(p); err != nil {
		t.Fatal(err)
	}
	take()
	b.decide(p)
	if checked != 3 {
		t.Errorf("proposed before it was taken: %d signatures checked, want 3", checked)
	}
	if got := b.n.stats().Accepted; got != 3 {
		t.Errorf("accepted %d records, want 3", got)
	}
	// What was good under one registry is looked at again under the next.
	raw = batch(u.frame(b.now))
	take()
	b.decide(b.propose(batch(change(t, 1, "put", identity.TypeDevice, "d77", identity.Device{Junction: "j1", Key: pub(key("77"))}))))
	checked = 0
	b.decide(b.propose(raw))
	if checked != 1 {
		t.Errorf("under another registry: %d signatures checked, want 1", checked)
	}
}
