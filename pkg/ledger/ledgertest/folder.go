package ledgertest

import (
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// SegmentRecords is how many appends a segment of a [Chain.Folder] holds.
const SegmentRecords = 4

// Folder returns a data folder as sealing writes it, by path: the chain's blocks,
// with a checkpoint after each of the first sealed of them.
func (c *Chain) Folder(sealed int) map[string][]byte {
	out := map[string][]byte{"genesis.json": c.GenesisJSON, "policy": c.Policy}
	// Each call of append is one append of a journal.
	journal := func(dir string) func(records ...[]byte) {
		next, appends, name := uint64(0), 0, ""
		return func(records ...[]byte) {
			if appends%SegmentRecords == 0 {
				name = dir + "/" + segment.Name(next)
				out[name] = segment.AppendHeader(nil, next)
			}
			if len(records) == 0 {
				return
			}
			out[name] = segment.AppendFrames(out[name], next, records...)
			next += uint64(len(records))
			appends++
		}
	}
	blocks, history, payloads := journal("log/blocks"), journal("log/checkpoints"), journal("payload/record")
	blocks() // an empty journal has its first segment
	history()
	payloads()
	var t ledger.Tiler
	for i, b := range c.Blocks {
		var ps [][]byte
		for _, p := range b.Payloads() {
			ps = append(ps, p.Marshal())
		}
		payloads(ps...)
		blocks(b.Decided().Marshal())
		t.Append(b.Leaves)
		if i >= sealed {
			continue
		}
		for _, f := range append(t.Full(), t.Partial()...) {
			out["log/"+f.Path()] = f.Data
		}
		note := c.seal(b, b.Voters)
		at := ledger.SealedAt{Height: b.Header.Height, Note: note}
		history(at.Marshal())
		out["log/checkpoint"] = note
	}
	if b := c.succession(); b != nil {
		out["succession.json"] = b
	}
	return out
}

// succession returns the document that sealing writes when validators change, nil
// where they have not.
func (c *Chain) succession() []byte {
	s := must(ledger.NewSuccession(&c.Genesis, must(ledger.ParsePolicy(c.Policy))))
	for i, b := range c.Blocks {
		after := c.Registry
		if i+1 < len(c.Blocks) {
			after = c.Judged[i+1]
		}
		if after.MembersSince() == uint64(b.Header.Height) {
			if err := s.Change(b.Header.Height, after.Validators()); err != nil {
				panic(err)
			}
		}
	}
	if len(s.Sets()) == 1 {
		return nil
	}
	return ledger.MarshalSuccession(s)
}
