package ledgertest

import (
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing/fstest"

	"github.com/stopline-traffic/stopline/pkg/identity"
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

// MapFS makes a file system of a folder.
func MapFS(files map[string][]byte) fs.FS {
	m := fstest.MapFS{}
	for name, b := range files {
		m[name] = &fstest.MapFile{Data: b}
	}
	return m
}

// ByClass returns a folder with its payloads in one store for each class, as
// sealing writes them.
func ByClass(files map[string][]byte) map[string][]byte {
	classes := map[identity.RecordKind]string{identity.KindFrame: "readings", identity.KindImport: "readings", identity.KindCommand: "control", identity.KindRegistry: "registry"}
	out := map[string][]byte{}
	next, name := map[string]uint64{}, map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasPrefix(k, "payload/") {
			out[k] = files[k]
		}
	}
	must(segment.Walk(MapFS(files), "payload/record", 0, func(_ uint64, b []byte, _ string, _ int64) error {
		e := must(identity.ParseEnvelope(must(ledger.ParsePayload(b)).Envelope))
		class := classes[e.Kind]
		n := next[class]
		if n%SegmentRecords == 0 {
			name[class] = "payload/" + class + "/" + segment.Name(n)
			out[name[class]] = segment.AppendHeader(nil, n)
		}
		out[name[class]] = segment.AppendFrames(out[name[class]], n, b)
		next[class]++
		return nil
	}))
	return out
}
