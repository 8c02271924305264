package ledger_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

func mapFS(files map[string][]byte) fstest.MapFS {
	m := fstest.MapFS{}
	for name, b := range files {
		m[name] = &fstest.MapFile{Data: b}
	}
	return m
}

func check(t testing.TB, files map[string][]byte, o ledger.FsckOptions) ledger.FsckReport {
	t.Helper()
	r, err := ledger.Fsck(context.Background(), mapFS(files), o)
	if err != nil {
		t.Fatalf("fsck: %v", err)
	}
	return r
}

// found reports whether a problem, or at least a note, names a file.
func found(r ledger.FsckReport, file string) bool {
	return slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool {
		return p.File == file || strings.HasPrefix(file, p.File+"/") || strings.HasPrefix(p.File, file+"/")
	})
}

func TestFsckGood(t *testing.T) {
	d := ledgertest.New("fsck", 4)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.Frame(1, ledgertest.Start), d.Change(identity.Change{Action: "put", Type: identity.TypeSoftware, ID: "v1", Body: json.RawMessage(`{}`), Nonce: 1})})
	c.Fill(69)
	states := []int{70, 63, 1, 0}
	if testing.Short() || sparse {
		states = []int{63}
	}
	for _, sealed := range states {
		var calls, last uint64
		r := check(t, c.Folder(sealed), ledger.FsckOptions{Policy: policy(t, d.Policy), Progress: func(p ledger.FsckProgress) {
			calls, last = calls+1, p.Blocks
		}})
		if !r.OK || r.ExitCode() != 0 || len(r.Notes) != 0 {
			t.Fatalf("%d of 70 blocks sealed: %s", sealed, r.Text())
		}
		if r.Blocks != 70 || r.Leaves != 70+69*3+2 || r.Payloads != 69*3+2 || r.Checkpoints != uint64(sealed) || calls == 0 || last != 70 {
			t.Errorf("%d sealed: got %+v", sealed, r)
		}
		if !strings.Contains(r.Text(), "OK under the given policy") || !json.Valid(r.JSON()) {
			t.Errorf("text: %s", r.Text())
		}
	}
	if r := check(t, c.Folder(70), ledger.FsckOptions{}); !r.OK || r.Trusted || !strings.Contains(r.Text(), "own policy") {
		t.Errorf("without a policy: %s", r.Text())
	}
	if r := check(t, c.Folder(70), ledger.FsckOptions{Policy: policy(t, ledgertest.New("other", 4).Policy)}); r.OK || r.ExitCode() != 1 {
		t.Errorf("with another district's policy: %s", r.Text())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r, err := ledger.Fsck(ctx, mapFS(c.Folder(70)), ledger.FsckOptions{}); !errors.Is(err, context.Canceled) || r.OK {
		t.Errorf("ended context: got %v, ok %v, want an error", err, r.OK)
	}
}

// TestFsckFiles: files cut, removed, swapped, added and rolled back.
func TestFsckFiles(t *testing.T) {
	d := ledgertest.New("fsck", 4)
	long := func(n int) *ledgertest.Chain { // 13 leaves a block: the first tile is full after 20
		c := d.NewChain()
		for i := range n {
			var rs []ledgertest.Record
			for k := range 12 {
				rs = append(rs, d.Frame(uint64(12*i+k+1), ledgertest.Start))
			}
			c.Decide(rs)
		}
		return c
	}
	c := long(22)
	full := c.Folder(22)
	k := 0
	for _, name := range slices.Sorted(maps.Keys(full)) {
		// Partial tiles of sizes before the last need not be there.
		needed := !strings.Contains(name, ".p/")
		for _, id := range ledger.PartialTiles(c.Blocks[21].Header.Size) {
			needed = needed || name == "log/"+id.Path()
		}
		if !needed && !strings.Contains(name, ".p/4") {
			continue // a sample of the old partial tiles is enough
		}
		if k++; k%5 != 0 && (testing.Short() || sparse) {
			continue
		}
		files := maps.Clone(full)
		if needed {
			delete(files, name)
			if r := check(t, files, ledger.FsckOptions{}); r.OK {
				t.Errorf("%s removed: not found", name)
			}
		}
		cuts := []int{0, len(full[name]) - 1}
		if k%5 == 0 {
			cuts = []int{1, len(full[name]) / 2}
		}
		for _, n := range cuts {
			files[name] = full[name][:n]
			if name == "policy" && n == len(full[name])-1 {
				continue // the last line without its end means the same
			}
			if r := check(t, files, ledger.FsckOptions{}); r.OK {
				t.Errorf("%s cut to %d: not found", name, n)
			}
		}
	}
	for _, tc := range []struct {
		name, want string
		change     func(f map[string][]byte)
	}{
		{"tiles swapped", "log/tile/0/000", func(f map[string][]byte) {
			f["log/tile/0/000"], f["log/tile/1/000.p/1"] = f["log/tile/1/000.p/1"], f["log/tile/0/000"]
		}},
		{"partial tiles swapped", "log/tile/0/001.p/4", func(f map[string][]byte) {
			a, b := "log/tile/0/001.p/4", "log/tile/0/001.p/17"
			f[a], f[b] = f[b], f[a]
		}},
		{"segments swapped", "log/blocks", func(f map[string][]byte) {
			a, b := "log/blocks/"+segment.Name(4), "log/blocks/"+segment.Name(8)
			f[a], f[b] = f[b], f[a]
		}},
		{"tile of another log", "log/tile/0/007", func(f map[string][]byte) { f["log/tile/0/007"] = f["log/tile/0/000"] }},
		{"wider partial tile", "log/tile/0/001.p/200", func(f map[string][]byte) { f["log/tile/0/001.p/200"] = f["log/tile/0/000"][:200*32] }},
		{"file that is no tile", "log/tile/0/junk", func(f map[string][]byte) { f["log/tile/0/junk"] = nil }},
		{"file that is no segment", "log/blocks/junk", func(f map[string][]byte) { f["log/blocks/junk"] = nil }},
		{"checkpoint rolled back", "log/checkpoint", func(f map[string][]byte) { f["log/checkpoint"] = c.Seal(c.Blocks[12]) }},
		{"checkpoint of the future", "log/checkpoint", func(f map[string][]byte) {
			more := long(23)
			f["log/checkpoint"] = more.Seal(more.Blocks[22])
		}},
		{"log rolled back under its checkpoints", "log/blocks", func(f map[string][]byte) {
			for k := range f {
				if strings.HasPrefix(k, "log/blocks/") || strings.HasPrefix(k, "payload/") {
					delete(f, k)
				}
			}
			short := long(15).Folder(15)
			for k, v := range short {
				if strings.HasPrefix(k, "log/blocks/") || strings.HasPrefix(k, "payload/") {
					f[k] = v
				}
			}
		}},
		{"policy that needs fewer", "policy", func(f map[string][]byte) {
			f["policy"] = bytes.Replace(f["policy"], []byte("validators 3"), []byte("validators 2"), 1)
		}},
		{"policy that needs nobody", "policy", func(f map[string][]byte) {
			f["policy"] = bytes.Replace(f["policy"], []byte("quorum validators"), []byte("quorum none"), 1)
		}},
		{"policy of another district", "policy", func(f map[string][]byte) { f["policy"] = ledgertest.New("other", 4).Policy }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := maps.Clone(full)
			tc.change(f)
			if r := check(t, f, ledger.FsckOptions{}); r.OK || !found(r, tc.want) {
				t.Errorf("got %s\nwant a problem of %s", r.Text(), tc.want)
			}
		})
	}
}

// TestFsckForgeries rewrites journals, well-formed, with other content.
func TestFsckForgeries(t *testing.T) {
	d := ledgertest.New("fsck", 4)
	c := d.NewChain().Fill(6)
	files := c.Folder(6)
	rewrite := func(dir string, change func(n uint64, rec []byte) []byte) map[string][]byte {
		f := maps.Clone(files)
		var recs [][]byte
		if _, err := segment.Walk(mapFS(files), dir, 0, func(n uint64, rec []byte, _ string, _ int64) error {
			if rec = change(n, bytes.Clone(rec)); rec != nil {
				recs = append(recs, rec)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for k := range f {
			if strings.HasPrefix(k, dir+"/") {
				delete(f, k)
			}
		}
		f[dir+"/"+segment.Name(0)] = segment.AppendFrames(segment.AppendHeader(nil, 0), 0, recs...)
		return f
	}
	other := ledgertest.New("other", 4).NewChain().Fill(6)
	weak := d.NewChain()
	weak.Voters = []int{0, 1}
	weak.Fill(6)
	for _, tc := range []struct {
		name, want string
		files      map[string][]byte
	}{
		{"as it was", "", rewrite("log/blocks", func(_ uint64, r []byte) []byte { return r })},
		{"envelope changed", "record 7", rewrite("payload/record", func(n uint64, r []byte) []byte {
			if n == 7 {
				r[len(r)-1] ^= 1
			}
			return r
		})},
		{"salt changed", "record 7", rewrite("payload/record", func(n uint64, r []byte) []byte {
			if n == 7 {
				r[50] ^= 1
			}
			return r
		})},
		{"payload left out", "record 7", rewrite("payload/record", func(n uint64, r []byte) []byte {
			if n == 7 {
				return nil
			}
			return r
		})},
		{"payload twice", "payload/record", func() map[string][]byte {
			f := maps.Clone(files)
			name := "payload/record/" + segment.Name(12)
			f[name] = segment.AppendFrames(f[name], 18, c.Blocks[5].Payloads()[2].Marshal())
			return f
		}()},
		{"block of another district", "record 3", rewrite("log/blocks", func(n uint64, r []byte) []byte {
			if n == 3 {
				return other.Blocks[3].Decided().Marshal()
			}
			return r
		})},
		{"block without a quorum", "record 3", rewrite("log/blocks", func(n uint64, r []byte) []byte {
			if n == 3 {
				return weak.Blocks[3].Decided().Marshal()
			}
			return r
		})},
		{"block left out", "record 3", rewrite("log/blocks", func(n uint64, r []byte) []byte {
			if n == 3 {
				return nil
			}
			return r
		})},
		{"checkpoint without a quorum", "record 2", rewrite("log/checkpoints", func(n uint64, r []byte) []byte {
			if n == 2 {
				at := ledger.SealedAt{Height: 3, Note: weak.Seal(weak.Blocks[2])}
				return at.Marshal()
			}
			return r
		})},
		{"checkpoint of a fork", "record 2", rewrite("log/checkpoints", func(n uint64, r []byte) []byte {
			if n == 2 {
				fork := d.NewChain().Fill(2)
				blk := fork.Decide([]ledgertest.Record{d.Frame(77, ledgertest.Start), d.Frame(78, ledgertest.Start), d.Frame(79, ledgertest.Start)})
				at := ledger.SealedAt{Height: 3, Note: fork.Seal(blk)}
				return at.Marshal()
			}
			return r
		})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := check(t, tc.files, ledger.FsckOptions{})
			if r.OK != (tc.want == "") || !strings.Contains(r.Text(), tc.want) {
				t.Errorf("got %s\nwant a problem of %q", r.Text(), tc.want)
			}
		})
	}
}

// TestFsckAfterCrash: what an interrupted write leaves is a note.
func TestFsckAfterCrash(t *testing.T) {
	d := ledgertest.New("fsck", 4)
	c := d.NewChain().Fill(6)
	for _, tc := range []struct {
		name, want string
		change     func(f map[string][]byte)
	}{
		{"torn journal", "log/blocks", func(f map[string][]byte) {
			n := "log/blocks/" + segment.Name(4)
			f[n] = f[n][:len(f[n])-5]
		}},
		{"torn payloads of the next block", "payload/record", func(f map[string][]byte) {
			n := "payload/record/" + segment.Name(12)
			more := d.NewChain().Fill(7).Blocks[6].Payloads()[0].Marshal()
			f[n] = append(bytes.Clone(f[n]), segment.AppendFrames(nil, 18, more)[:99]...)
		}},
		{"checkpoint one behind", "log/checkpoint", func(f map[string][]byte) { f["log/checkpoint"] = c.Seal(c.Blocks[3]) }},
		{"file being written", "", func(f map[string][]byte) { f["log/tmp/3"] = []byte("x") }},
		{"tiles not sealed yet", "", func(f map[string][]byte) {
			for k, v := range c.Folder(6) {
				if strings.HasPrefix(k, "log/tile/") {
					f[k] = v
				}
			}
		}},
		{"payloads of the next block", "payload/record", func(f map[string][]byte) {
			n := "payload/record/" + segment.Name(12)
			var recs [][]byte
			for _, p := range d.NewChain().Fill(7).Blocks[6].Payloads() {
				recs = append(recs, p.Marshal())
			}
			f[n] = segment.AppendFrames(bytes.Clone(f[n]), 18, recs...)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := c.Folder(5)
			tc.change(f)
			r := check(t, f, ledger.FsckOptions{})
			if !r.OK || (tc.want != "") != (len(r.Notes) == 1) || !strings.Contains(fmt.Sprint(r.Notes), tc.want) {
				t.Errorf("got %s\nwant only a note of %q", r.Text(), tc.want)
			}
		})
	}
}

func BenchmarkFsck(b *testing.B) {
	d := ledgertest.New("fsck", 4)
	c := d.NewChain()
	for i := range 40 {
		var rs []ledgertest.Record
		for k := range 256 {
			rs = append(rs, d.Frame(uint64(i*256+k+1), ledgertest.Start))
		}
		c.Decide(rs)
	}
	fsys := mapFS(c.Folder(40))
	leaves := c.Blocks[39].Header.Size
	for b.Loop() {
		if r, err := ledger.Fsck(context.Background(), fsys, ledger.FsckOptions{}); err != nil || !r.OK {
			b.Fatal(err, r.Text())
		}
	}
	b.ReportMetric(float64(leaves)*float64(b.N)/b.Elapsed().Seconds(), "leaves/s")
}
