package ledger_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// councils decides eight blocks: by four validators, from the fourth block on by
// five, and after the sixth, which revokes the first of them, by the other four.
func councils(seed string) *ledgertest.Chain {
	c := ledgertest.New(seed, 4).NewChain().Fill(2)
	c.Decide([]ledgertest.Record{c.Join(1)})
	c.Voters = []int{0, 1, 2, 3, 4}
	c.Fill(2)
	c.Decide([]ledgertest.Record{c.Leave(0, 2)})
	c.Voters = []int{1, 2, 3, 4}
	return c.Fill(2)
}

func TestSuccession(t *testing.T) {
	c := councils("succession")
	s, err := ledger.NewSuccession(&c.Genesis, policy(t, c.Policy))
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range c.Blocks {
		if since := c.Judged[i].MembersSince(); since > 0 {
			if err := s.Change(ledger.Height(since), c.Judged[i].Validators()); err != nil {
				t.Fatal(err)
			}
		}
		if err := ledger.CheckVotes(b.Header.Hash(), b.Metadata, b.Votes, s.At(b.Header.Height).Validators); err != nil {
			t.Errorf("block %d: %v", i+1, err)
		}
	}
	for h, want := range map[ledger.Height]int{0: 4, 1: 4, 3: 4, 4: 5, 6: 5, 7: 4, 100: 4} {
		if got := len(s.At(h).Validators); got != want {
			t.Errorf("block %d: got %d validators, want %d", h, got, want)
		}
	}
	if got := s.At(7).Since; got != 6 || len(s.Sets()) != 3 {
		t.Errorf("got a set since %d of %d, want 6 of 3", got, len(s.Sets()))
	}
	last := c.Blocks[7]
	open := func(h ledger.Height, by ...int) error {
		c.Voters = by
		_, err := s.Open(h, c.Seal(last))
		return err
	}
	if err := open(8, 1, 2, 4); err != nil {
		t.Errorf("a quorum of those in force: got %v", err)
	}
	if err := open(8, 0, 1, 2); err == nil {
		t.Error("one who was revoked counts towards the quorum")
	}
	// Who pinned the first set can still verify what three of it cosigned, and
	// nothing else.
	first := policy(t, c.Policy)
	for _, tt := range []struct {
		by   []int
		want bool
	}{{[]int{1, 2, 3}, true}, {[]int{1, 2, 3, 4}, true}, {[]int{1, 2, 4}, false}} {
		c.Voters = tt.by
		if _, err := first.Open(c.Seal(last)); (err == nil) != tt.want {
			t.Errorf("the pinned policy on cosignatures of %v: got %v", tt.by, err)
		}
	}
}

// A folder is whole across changes of the validators, whoever was pinned.
func TestFsckAcrossChanges(t *testing.T) {
	c := councils("fsck")
	c.Blocks[7].Voters = []int{1, 2, 4} // two of the four that were pinned
	for name, o := range map[string]ledger.FsckOptions{"own": {}, "pinned": {Policy: policy(t, c.Policy)}} {
		r := check(t, c.Folder(8), o)
		if !r.OK || r.Blocks != 8 || r.Checkpoints != 8 || !strings.Contains(r.Text(), "block 3 changed the validators") {
			t.Errorf("%s policy: got %s", name, r.Text())
		}
	}
	for name, tt := range map[string]struct {
		want  string
		spoil func(c *ledgertest.Chain)
	}{
		"a checkpoint by one who was revoked": {"checkpoint: cosigned by 2 witnesses", func(c *ledgertest.Chain) { c.Blocks[6].Voters = []int{0, 1, 2} }},
		"a checkpoint by too few of five":     {"checkpoint: cosigned by 3 witnesses", func(c *ledgertest.Chain) { c.Blocks[3].Voters = []int{0, 1, 2} }},
		"a checkpoint by who is none yet":     {"checkpoint: cosigned by 2 witnesses", func(c *ledgertest.Chain) { c.Blocks[2].Voters = []int{0, 1, 4} }},
		"votes of one who was revoked": {"votes: 2 valid of the 3 needed from 4", func(c *ledgertest.Chain) {
			c.Voters = []int{0, 1, 2}
			c.Vote(c.Blocks[7])
			c.Blocks[7].Voters = []int{1, 2, 3}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := councils(name)
			tt.spoil(c)
			r := check(t, c.Folder(8), ledger.FsckOptions{})
			if r.OK || !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool { return strings.Contains(p.Rule, tt.want) }) {
				t.Errorf("got %s, want %q", r.Text(), tt.want)
			}
		})
	}
}

// Evidence from blocks before, between and after changes.
func TestBundleAcrossChanges(t *testing.T) {
	c := councils("bundle")
	text, err := ledger.CouncilPolicy(&c.Genesis, c.Registry.Validators())
	if err != nil {
		t.Fatal(err)
	}
	var indexes []uint64
	for _, b := range []int{0, 3, 6} { // the header of each is in the block after it
		indexes = append(indexes, c.Blocks[b].Header.PrevSize+1)
	}
	raw := c.Bundle(indexes...).Marshal()
	for name, p := range map[string][]byte{"first": c.Policy, "now": text} {
		if _, err := ledger.VerifyBundle(raw, policy(t, p)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	c.Voters = []int{1, 2, 4}
	raw = c.Bundle(indexes...).Marshal()
	if _, err := ledger.VerifyBundle(raw, policy(t, text)); err != nil {
		t.Errorf("now: %v", err)
	}
	if _, err := ledger.VerifyBundle(raw, policy(t, c.Policy)); err == nil {
		t.Error("two of the validators that were pinned are enough")
	}
}
