package audit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/payload"
)

// TestLettingGo: what is redacted, and what a receipt says is deleted, leaves the
// index; one that is made again, before and after the payloads are gone, is the
// same; the bundle is a tombstone that says by whom.
func TestLettingGo(t *testing.T) {
	d := ledgertest.New("letting go", 4)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.Frame(1, second(1)), d.Command(1, 1, second(1)), d.Frame(2, second(2)), d.Command(2, 1, second(2)), d.Frame(3, second(3))})
	c.Decide(d.Keepers(1, 4))
	frame := c.Blocks[0].Leaves[3] // number 2
	receipt := retention.Receipt{Format: retention.ReceiptFormat, District: d.ID, Holder: retention.SealingHolder, Reason: retention.ByRetention, Class: retention.Control,
		Ranges: []retention.Range{{First: 1, Last: 3}}, Policy: make(identity.Digest, 32), AtUnixMS: second(9).UnixMilli()}
	given, err := receipt.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c.Decide()
	write(t, dir, c, 3)
	s := service(t, config(d, dir))
	if p, err := s.Query(t.Context(), Query{Height: 1}); err != nil || len(p.Records) != 5 || p.Records[0].State != "" {
		t.Fatalf("before: got %+v, %v, want five records", p.Records, err)
	}
	wrong := frame.Commitment
	wrong[0] ^= 1
	c.Decide([]ledgertest.Record{c.Redact(3, frame.Commitment, 9), c.Redact(5, wrong, 10), d.Receipt(given)})
	if n := len(c.Blocks[3].Leaves); n != 4 {
		t.Fatalf("the chain has taken %d records, want 3", n-1)
	}
	c.Decide()
	write(t, dir, c, 5)
	if err := s.Refresh(); err != nil {
		t.Fatal(err)
	}
	p, err := s.Query(t.Context(), Query{Height: 1, Oldest: true, Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	states := map[uint64]string{}
	for _, r := range p.Records {
		states[r.Index] = r.State + string(r.Kind)
	}
	for i, want := range map[uint64]string{1: "frame", 2: Gone, 3: Redacted, 4: "command", 5: "frame"} {
		if states[i] != want {
			t.Errorf("record %d: got %q, want %q", i, states[i], want)
		}
	}
	want := dump(t, s)
	if strings.Count(want, "command idx=") != 1 {
		t.Errorf("what is known of the deleted command is still there:\n%s", want)
	}
	again := func(when string) {
		t.Helper()
		if err := s.Rebuild(t.Context()); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if got := dump(t, s); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", when, got, want)
		}
	}
	again("payloads still there")
	b, err := s.Evidence(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, d, b)

	store, err := payload.Open(dir, payload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Erase(2, 3); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	again("payloads gone")
	b, err = s.Evidence(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	r := verify(t, d, b)
	if len(r.Records) != 2 || !r.Records[0].LetGo || r.Records[0].RedactedBy == nil || !strings.Contains(r.Text(), `redacted by record 13, legal basis "court-order"`) {
		t.Errorf("got %+v, want a tombstone with its redaction\n%s", r.Records, r.Text())
	}
	if b, err = s.Evidence(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, d, b); len(r.Records) != 1 || !r.Records[0].LetGo || r.Records[0].RedactedBy != nil {
		t.Errorf("got %+v, want a tombstone alone", r.Records)
	}
	// A redaction that does not mean the leaf explains nothing.
	if b, err = s.Bundle(t.Context(), 5, 14); err != nil {
		t.Fatal(err)
	}
	policy, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ledger.VerifyBundle(b, policy); err != nil || r.Records[0].LetGo {
		t.Errorf("void redaction: got %v, %+v, want the record", err, r.Records)
	}
	for _, suffix := range []string{"", "-wal"} {
		raw, err := os.ReadFile(filepath.Join(dir, indexFile) + suffix)
		if err == nil && strings.Count(string(raw), "actuated") > 1 { // that of the other command
			t.Errorf("index.db%s still holds what was deleted", suffix)
		}
	}
}
