package ledger_test

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// TestFsckSignatures: what validators agreed on all the same is found by whose
// signature is wrong, by the registry in force at the block.
func TestFsckSignatures(t *testing.T) {
	d := ledgertest.New("signatures", 4)
	at := ledgertest.Start
	forged := func(r ledgertest.Record) ledgertest.Record {
		r.Envelope = bytes.Clone(r.Envelope)
		r.Envelope[len(r.Envelope)-1] ^= 1 // the signature is its last field
		return r
	}
	stranger := ledgertest.NewRecord(ed25519.NewKeyFromSeed(make([]byte, 32)), identity.KindFrame, identity.Protobuf, []byte("x"))
	device := ledgertest.NewRecord(d.DeviceKey, identity.KindCommand, identity.Protobuf, []byte("x"))
	revoke := d.Change(identity.Change{Action: identity.Revoke, Type: identity.TypeDevice, ID: ledgertest.Device, Nonce: 7})
	for _, tc := range []struct {
		name   string
		blocks [][]ledgertest.Record
		want   []string // leaf and rule; nothing: all is well
	}{
		{"good", [][]ledgertest.Record{{d.Frame(1, at), d.Command(1, 1, at)}, {d.Frame(2, at)}}, nil},
		{"one of many is forged", [][]ledgertest.Record{{d.Frame(1, at), forged(d.Frame(2, at)), d.Frame(3, at)}}, []string{"leaf 2, block 1, frame: signature: is not by device rsu-J1"}},
		{"a stranger", [][]ledgertest.Record{{d.Frame(1, at)}, {stranger}}, []string{"leaf 3, block 2, frame: signer: key"}},
		{"a device that orders", [][]ledgertest.Record{{device}}, []string{"leaf 1, block 1, command: signer: device rsu-J1 may not sign a command"}},
		{"revoked in the block: it counts from the next", [][]ledgertest.Record{{revoke, d.Frame(1, at)}}, nil},
		{"revoked", [][]ledgertest.Record{{revoke}, {d.Frame(1, at)}}, []string{"leaf 3, block 2, frame: signer: device rsu-J1 was revoked"}},
		{"filed in the block before", [][]ledgertest.Record{{d.FileImporter(1)}, {d.Import(ledgertest.Importer, 1, 1, at)}}, nil},
		{"filed in the same block", [][]ledgertest.Record{{d.FileImporter(1), d.Import(ledgertest.Importer, 1, 1, at)}}, []string{"leaf 2, block 1, import: signer: key"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := d.NewChain()
			for _, rs := range tc.blocks {
				c.Decide(rs)
			}
			files := c.Folder(len(tc.blocks))
			if r := check(t, files, ledger.FsckOptions{}); !r.OK || r.Signatures != 0 {
				t.Fatalf("without signatures: got %s", r.Text())
			}
			r := check(t, files, ledger.FsckOptions{Signatures: true})
			if r.OK != (len(tc.want) == 0) || len(r.Problems) != len(tc.want) {
				t.Fatalf("got %s\nwant %q", r.Text(), tc.want)
			}
			for i, w := range tc.want {
				if got := r.Problems[i].String(); !strings.Contains(got, w) || r.Problems[i].Record == nil || r.Problems[i].Offset == nil {
					t.Errorf("got %s, want %s", got, w)
				}
			}
			if r.OK && r.Signatures != r.Payloads {
				t.Errorf("got %d signatures of %d payloads", r.Signatures, r.Payloads)
			}
		})
	}
}

// TestFsckGoesOn: behind blocks that cannot be read everything is checked, with
// what the entries say of them.
func TestFsckGoesOn(t *testing.T) {
	d := ledgertest.New("on", 4)
	c := d.NewChain().Fill(3)
	c.Decide([]ledgertest.Record{d.Join(1), d.FileImporter(2)})
	c.Voters = []int{1, 2, 3, 4} // a change of validators, in a block that is lost
	c.Fill(1)
	c.Decide([]ledgertest.Record{d.Import(ledgertest.Importer, 1, 1, ledgertest.Start)})
	c.Fill(6)
	whole := ledgertest.ByClass(c.Folder(12))
	lost := func(names ...string) map[string][]byte {
		files := map[string][]byte{}
		for k, b := range whole {
			if !slices.Contains(names, k) {
				files[k] = bytes.Clone(b)
			}
		}
		return files
	}
	first, second, third := "log/blocks/"+segment.Name(0), "log/blocks/"+segment.Name(4), "log/blocks/"+segment.Name(8)
	o := ledger.FsckOptions{Signatures: true}
	for _, names := range [][]string{{first}, {second}, {first, second}, {third}} {
		files := lost(names...)
		r := check(t, files, o)
		if r.OK || len(r.Problems) > len(names) {
			t.Errorf("without %v: got %s", names, r.Text())
		}
		if names[0] == third {
			continue
		}
		if r.Blocks != 12 || r.Leaves != c.Blocks[11].Header.Size || r.Checkpoints != 12 || len(r.Notes) > 1 {
			t.Errorf("without %v: got %s", names, r.Text())
		}
		// What else is wrong is found beside it, and behind it.
		for _, name := range []string{"payload/readings/" + segment.Name(4), "log/tile/0/000.p/" + fmt.Sprint(r.Leaves), "log/checkpoints/" + segment.Name(8), "payload/control/" + segment.Name(0)} {
			if files[name] == nil {
				t.Fatalf("no %s", name)
			}
			files[name][300] ^= 1
			if r := check(t, files, o); !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool { return p.File == name || strings.Contains(p.Rule, name) }) {
				t.Errorf("without %v, %s damaged: got %s", names, name, r.Text())
			}
			files[name][300] ^= 1
		}
		// Entries that do not lead to the next block are not believed.
		name := fmt.Sprintf("log/tile/entries/000.p/%d", r.Leaves)
		files[name][36*5+9] ^= 1
		if r := check(t, files, o); !strings.Contains(r.Text(), "entries") {
			t.Errorf("without %v, an entry changed: got %s", names, r.Text())
		}
	}
}
