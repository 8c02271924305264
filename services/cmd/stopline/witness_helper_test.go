package main

import (
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// decidedBlocks returns a chain's blocks as decided hands them out.
func decidedBlocks(t *testing.T, c *ledgertest.Chain) []*decided.Block {
	t.Helper()
	ch := decided.NewChain(c.GenesisHash, c.District.Validators, nil)
	var out []*decided.Block
	for _, b := range c.Blocks {
		d, err := ch.Take(wire.BlockToProto(&b.Block, b.Batches, b.Verdicts), false)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}
