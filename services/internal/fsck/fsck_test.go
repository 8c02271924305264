package fsck_test

import (
	"context"
	"errors"
	"io/fs"
	"reflect"
	"testing"
	"testing/fstest"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/services/internal/fsck"
)

func mapFS(files map[string][]byte) fs.FS {
	m := fstest.MapFS{}
	for name, b := range files {
		m[name] = &fstest.MapFile{Data: b}
	}
	return m
}

// long is a folder of several pieces.
func long() map[string][]byte {
	d := ledgertest.New("fsck", 4)
	c := d.NewChain()
	var rs []ledgertest.Record
	for i := range 32 {
		rs = append(rs, d.Frame(uint64(i+1), ledgertest.Start))
	}
	for range 80 {
		c.Decide(rs) // nobody here minds that they come again
	}
	return c.Folder(60)
}

// TestSameAsAlone: the report is that of one worker, whatever is wrong.
func TestSameAsAlone(t *testing.T) {
	whole := long()
	name := "payload/record/" + segment.Name(4*32*4)
	if whole[name] == nil {
		t.Fatalf("no %s", name)
	}
	for _, tc := range []struct {
		what   string
		ok     bool
		change func(f map[string][]byte)
	}{
		{"nothing", true, func(map[string][]byte) {}},
		{"a payload", false, func(f map[string][]byte) { f[name][5000] ^= 1 }},
		{"a block and a tile", false, func(f map[string][]byte) {
			f["log/blocks/"+segment.Name(8)][5000] ^= 1
			f["log/tile/0/003"][99] ^= 1
		}},
		{"a segment of checkpoints", false, func(f map[string][]byte) { delete(f, "log/checkpoints/"+segment.Name(4)) }},
		{"genesis", false, func(f map[string][]byte) { f["genesis.json"][9] ^= 1 }},
		{"everything", false, func(f map[string][]byte) {
			for k, b := range f {
				if k != "genesis.json" && k != "policy" {
					b[len(b)/2] ^= 1
				}
			}
		}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			files := map[string][]byte{}
			for k, b := range whole {
				files[k] = append([]byte(nil), b...)
			}
			tc.change(files)
			o := ledger.FsckOptions{Signatures: tc.what == "a payload"}
			want, err := ledger.Fsck(t.Context(), mapFS(files), o)
			if err != nil {
				t.Fatal(err)
			}
			if want.OK != tc.ok {
				t.Fatalf("got %s, want ok %v", want.Text(), tc.ok)
			}
			calls := 0
			o.Progress = func(p ledger.FsckProgress) {
				if calls++; p.Bytes == 0 || p.Bytes > p.Total {
					t.Errorf("progress: got %+v", p)
				}
			}
			for _, workers := range []int{0, 3} {
				got, err := fsck.Run(t.Context(), mapFS(files), o, workers)
				if err != nil {
					t.Fatal(err)
				}
				// How much was counted before too many problems is left to chance.
				if len(want.Problems) == 100 {
					got.Tiles, got.Signatures, want.Tiles, want.Signatures = 0, 0, 0, 0
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%d workers: got %s\nwant %s", workers, got.Text(), want.Text())
				}
			}
			if calls == 0 && tc.what != "genesis" {
				t.Error("no progress was told")
			}
		})
	}
}

func TestEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	files := mapFS(long())
	r, err := fsck.Run(ctx, files, ledger.FsckOptions{Progress: func(ledger.FsckProgress) { cancel() }}, 2)
	if !errors.Is(err, context.Canceled) || r.OK {
		t.Errorf("cancelled on the way: got %v, ok %v", err, r.OK)
	}
}
