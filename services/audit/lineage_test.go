package audit

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// TestEvidenceForThoseWhoPinnedTheFirst: the policy of the first validators is
// enough for what later ones cosigned; a succession that was tampered with is not.
func TestEvidenceForThoseWhoPinnedTheFirst(t *testing.T) {
	d := ledgertest.New("lineage", 4)
	pinned := bytes.Clone(d.Policy)
	c := d.NewChain().Fill(3)
	c.Decide([]ledgertest.Record{d.Join(1)})
	c.Voters = append(c.Voters, 4)
	c.Fill(3)
	c.Decide([]ledgertest.Record{d.Leave(0, 2)})
	c.Voters = []int{1, 2, 3, 4}
	c.Voters = []int{2, 3, 4}
	c.Fill(4)
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	// The file that sealing keeps.
	var kept ledger.SuccessionProof
	var log ledger.Frontier
	set := d.Validators
	for i, blk := range c.Blocks {
		before := log.Clone()
		log.Append(blk.Leaves)
		after := c.Registry.Validators()
		if i+1 < len(c.Judged) {
			after = c.Judged[i+1].Validators()
		}
		if len(after) != len(set) {
			p := blk.Payloads()[0]
			step, err := ledger.NewStep(&blk.Block, before, 1, p.Salt, p.Envelope, set)
			if err != nil {
				t.Fatal(err)
			}
			kept.Steps = append(kept.Steps, *step)
		}
		set = after
	}
	doc, err := kept.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "succession.json"), doc, 0o644); err != nil {
		t.Fatal(err)
	}
	s := service(t, config(d, dir))
	policy, err := ledger.ParsePolicy(pinned)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Evidence(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ledger.ParseBundle(b)
	if err != nil || parsed.Succession == nil {
		t.Fatalf("got %v and succession %v, want one", err, parsed.Succession)
	}
	if _, err := policy.Open(parsed.Checkpoint); err == nil {
		t.Fatal("the checkpoint meets the pinned policy by itself: this shows nothing")
	}
	r, err := ledger.VerifyBundle(b, policy)
	if err != nil || r.Outcome != ledger.Pass || r.Changes != 2 || !strings.Contains(r.Text(), "changed 2 times") {
		t.Fatalf("got %s, %v, %d changes, want pass and 2\n%s", r.Outcome, err, r.Changes, r.Text())
	}
	other := ledgertest.New("forger", 4).NewChain().Fill(3)
	steps, err := ledger.ParseSuccessionProof(parsed.Succession.Steps)
	if err != nil {
		t.Fatal(err)
	}
	fewer := *steps
	fewer.Steps = fewer.Steps[:1]
	short, err := fewer.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, file string
		lie        func(n *ledger.BundleSuccession)
	}{
		{"another genesis", "succession/proof", func(n *ledger.BundleSuccession) { n.Genesis = other.GenesisJSON }},
		{"another anchor", "succession/proof", func(n *ledger.BundleSuccession) { n.Anchor = other.Seal(other.Blocks[2]) }},
		{"an anchor of later validators", "succession/proof", func(n *ledger.BundleSuccession) { n.Anchor = parsed.Checkpoint }},
		{"a step left out at the end", "checkpoint", func(n *ledger.BundleSuccession) { n.Steps = short }},
		{"no steps", "succession/steps", func(n *ledger.BundleSuccession) { n.Steps = nil }},
		{"a wrong proof", "succession/proof", func(n *ledger.BundleSuccession) { n.Proof = n.Proof[1:] }},
	} {
		x := *parsed
		n := *parsed.Succession
		x.Succession = &n
		tc.lie(&n)
		r, err := ledger.VerifyBundle(x.Marshal(), policy)
		if err == nil || r.Outcome != ledger.Fail || r.Findings[0].File != tc.file {
			t.Errorf("%s: got %s, %v, want a finding in %s", tc.name, r.Outcome, err, tc.file)
		}
	}
	x := *parsed
	x.Succession = nil
	if _, err := ledger.VerifyBundle(x.Marshal(), policy); err == nil {
		t.Error("without the succession: got pass")
	}
}
