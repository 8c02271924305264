package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// A district's log is forked by three of its four validators and the log's
// operator; who holds both checkpoints or both blocks can show it to anybody.
func TestVerifyAnAccusation(t *testing.T) {
	d := ledgertest.New("accused", 4)
	fork := func(seq uint64) *ledgertest.Chain {
		c := d.NewChain()
		c.Voters = []int{0, 1, 2}
		b := c.Decide([]ledgertest.Record{d.Frame(seq, ledgertest.Start)})
		b.Metadata = []byte{2 << 3, 1} // view 0, height 1
		c.Vote(b)
		return c
	}
	one, two := fork(1), fork(2)
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	document := func(name string, a *ledger.Accusation) string {
		b, err := a.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return file(name, b)
	}
	genesis, policy := file("genesis.json", d.GenesisJSON), file("policy", d.Policy)
	elsewhere := file("elsewhere.json", ledgertest.New("elsewhere", 4).GenesisJSON)
	blocks := document("blocks.json", ledger.NewBlockAccusation(&one.Blocks[0].Block, &two.Blocks[0].Block, d.Validators))
	checkpoints := document("checkpoints.json", ledger.NewCheckpointAccusation(one.Seal(one.Blocks[0]), two.Seal(two.Blocks[0])))
	same := document("same.json", ledger.NewCheckpointAccusation(one.Seal(one.Blocks[0]), one.Seal(one.Blocks[0])))

	wantExit(t, inside(t, "verify", "--genesis", genesis, blocks), exitOK, "PASS", "Two blocks were decided at height 1, in views 0 and 0",
		"validator 1 (traffic), key", "validator 3 (ambulance), key", fmt.Sprintf("genesis %x", d.GenesisHash))
	wantExit(t, inside(t, "verify", "--json", "--genesis", genesis, blocks), exitOK, `"outcome": "pass"`, `"name": "validator 2"`)
	wantExit(t, inside(t, "verify", "--policy", policy, blocks), exitUntrusted, "UNTRUSTED", "Vote keys are in the district's genesis document")
	wantExit(t, inside(t, "verify", "--genesis", elsewhere, blocks), exitFailed, "FAIL", "genesis")
	wantExit(t, inside(t, "verify", "--policy", policy, checkpoints), exitOK, "PASS", "with different roots", "the log "+d.Origin, "ambulance, key")
	wantExit(t, inside(t, "verify", "--genesis", genesis, checkpoints), exitOK, "PASS", "validator 3 (ambulance), key")
	wantExit(t, inside(t, "verify", checkpoints), exitUntrusted, "UNTRUSTED")
	wantExit(t, inside(t, "verify", "--policy", policy, same), exitFailed, "FAIL", "are the same")

	good, err := os.ReadFile(blocks)
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(good); i += len(good) / 24 { // byte 0 makes it a bundle
		b := bytes.Clone(good)
		b[i] ^= 1
		wantExit(t, inside(t, "verify", "--genesis", genesis, file("bad.json", b)), exitFailed, "FAIL")
	}
	for _, args := range [][]string{{"--genesis", filepath.Join(dir, "none"), blocks}, {"--genesis", policy, blocks}, {"--genesis", genesis, file("bundle.zip", []byte("PK"))}} {
		wantExit(t, inside(t, append([]string{"verify"}, args...)...), exitUsage, "stopline: verify: --genesis")
	}
}
