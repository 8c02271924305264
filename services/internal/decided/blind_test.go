package decided

import (
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// After a block whose registry records are missing, a header may name a registry
// in which its own voters are validators. It is believed only with the vote of
// somebody honest who was one before; otherwise nobody is even asked for that
// registry.
func TestARegistryIsNotTakenFromItsOwnVoters(t *testing.T) {
	d := ledgertest.New("blind", 4)
	c := d.NewChain().Fill(1)
	c.Decide([]ledgertest.Record{d.Join(1)})
	c.Voters = []int{0, 4} // of those before only one, who may lie
	c.Fill(1)
	fl := &follower{chain: NewChain(d.GenesisHash, d.Validators, nil)} // without a bus to ask on
	if _, err := fl.take(t.Context(), toProto(c.Blocks[0]), true); err != nil {
		t.Fatal(err)
	}
	stripped := clone(c.Blocks[1])
	stripped.Batches = nil
	if b, err := fl.take(t.Context(), stripped, true); err != nil || !b.Purged {
		t.Fatalf("a block without its payload: got %v", err)
	}
	if _, err := fl.take(t.Context(), toProto(c.Blocks[2]), true); err == nil || !strings.Contains(err.Error(), "1 of the validators before it have voted") {
		t.Errorf("got %v, want it refused for want of votes", err)
	}
	if got := fl.chain.Next(); got != 3 {
		t.Errorf("next block: got %d, want 3", got)
	}
}

// Validators come and go along the chain, and nobody counts before or after.
func TestTakeAcrossChanges(t *testing.T) {
	d := ledgertest.New("changes", 4)
	c := d.NewChain().Fill(1)
	c.Decide([]ledgertest.Record{d.Join(1)})
	c.Voters = []int{1, 2, 3, 4}
	c.Fill(1)
	c.Decide([]ledgertest.Record{d.Leave(0, 2)})
	c.Voters = []int{1, 2, 4}
	c.Fill(1)
	ch := NewChain(d.GenesisHash, d.Validators, nil)
	for i, want := range []int{4, 5, 5, 4, 4} {
		lb := c.Blocks[i]
		if i == 2 || i == 4 { // a quorum with one who is no validator yet, or any more
			voters := c.Voters
			c.Voters = map[int][]int{2: {0, 1, 2}, 4: {0, 1, 2}}[i]
			weak := *lb
			c.Vote(&weak)
			c.Voters = voters
			if _, err := ch.Take(toProto(&weak), false); err == nil || !strings.Contains(err.Error(), "votes") {
				t.Errorf("block %d without a quorum of those in force: got %v", i+1, err)
			}
		}
		b, err := ch.Take(toProto(lb), false)
		if err != nil {
			t.Fatalf("block %d: %v", i+1, err)
		}
		if got := len(ch.Validators()); got != want || (b.Validators != nil) != (i == 1 || i == 3) {
			t.Errorf("after block %d: got %d validators, changed %v; want %d", i+1, got, b.Validators != nil, want)
		}
	}
}
