package ledger_test

import (
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// small is a store with everything in it: payloads of three classes, a change of
// the validators, several segments of each journal.
func small(blocks int) *ledgertest.Chain {
	d := ledgertest.New("bytes", 1)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.Frame(1, ledgertest.Start), d.Join(1)})
	c.Voters = []int{0, 1}
	for i := range blocks - 1 {
		n := uint64(i)
		c.Decide([]ledgertest.Record{d.Frame(n+2, ledgertest.Start), d.Command(n+1, n+1, ledgertest.Start)})
	}
	return c
}

// frame is where one record of a journal is.
type frame struct {
	n        uint64
	from, to int64
	data     []byte
}

func frames(t *testing.T, files map[string][]byte, name string) (out []frame) {
	t.Helper()
	first, ok := segment.ParseName(path.Base(name))
	if !ok {
		t.Fatalf("%s is no segment", name)
	}
	s, err := segment.NewScanner(bytes.NewReader(files[name]), name, first)
	if err != nil {
		t.Fatal(err)
	}
	for {
		fs, err := s.Append()
		if err != nil {
			return out
		}
		for _, f := range fs {
			out = append(out, frame{f.Record, f.Offset, f.Offset + int64(len(f.Data)) + segment.Overhead, f.Data})
		}
	}
}

// located says what is wrong with how a change of one byte was located.
func located(r ledger.FsckReport, name string, at int, fr []frame) string {
	i := slices.IndexFunc(r.Problems, func(p ledger.Problem) bool { return p.File == name })
	if i < 0 {
		return "the file is not named"
	}
	p := r.Problems[i]
	if len(r.Problems) != 1 && strings.Contains(name, "/") {
		return "more than one problem"
	}
	switch {
	case strings.HasPrefix(name, "log/tile/"):
		if p.Offset == nil || *p.Offset != int64(at) || p.Leaf == nil {
			return "neither the byte nor the leaf is named"
		}
	case strings.HasSuffix(name, ".seg") && at < segment.HeaderSize:
		if p.Offset == nil || *p.Offset != 0 {
			return "offset is not that of the header"
		}
	case strings.HasSuffix(name, ".seg"):
		k := slices.IndexFunc(fr, func(f frame) bool { return int64(at) >= f.from && int64(at) < f.to })
		f := fr[k]
		if p.Offset == nil || *p.Offset != f.from || p.Record == nil || *p.Record != f.n {
			return fmt.Sprintf("want record %d at offset %d", f.n, f.from)
		}
		switch pl, err := ledger.ParsePayload(f.data); {
		case strings.HasPrefix(name, "log/blocks/"):
			if p.Height == nil || uint64(*p.Height) != f.n+1 {
				return "the block is not named"
			}
		case strings.HasPrefix(name, "payload/") && err == nil:
			if p.Leaf == nil || *p.Leaf != pl.Index || p.Height == nil || *p.Height != pl.Height {
				return fmt.Sprintf("want leaf %d of block %d", pl.Index, pl.Height)
			}
			// Behind the frame's header and the payload's, up to the signature, the
			// kind stands in clear words.
			if e, err := identity.ParseEnvelope(pl.Envelope); err != nil || int64(at) == f.to-2 && p.Kind != e.Kind {
				return fmt.Sprintf("want kind %s", e.Kind)
			}
		}
	}
	return ""
}

// TestFsckLocatesEveryByte changes each byte of each file of a small store, one
// at a time: each change is found, and located: the file, the byte in a tile, the
// record with its block, or its leaf, in a journal.
func TestFsckLocatesEveryByte(t *testing.T) {
	files := ledgertest.ByClass(small(3).Folder(3))
	if r := check(t, files, ledger.FsckOptions{}); !r.OK || len(r.Notes) != 1 {
		t.Fatalf("before: %s", r.Text())
	}
	for _, want := range []string{"genesis.json", "policy", "succession.json", "log/checkpoint", "log/blocks/", "log/checkpoints/", "log/tile/0/", "log/tile/entries/",
		"payload/readings/", "payload/control/", "payload/registry/"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(files)), func(k string) bool { return strings.HasPrefix(k, want) }) {
			t.Fatalf("no file %s in the store", want)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			files := maps.Clone(files)
			whole := files[name]
			var fr []frame
			if strings.HasSuffix(name, ".seg") {
				fr = frames(t, files, name)
			}
			step := 1
			if testing.Short() || sparse {
				step = 37
			}
			total := 0
			for i := 0; i < len(whole); i += step {
				values := []byte{whole[i] ^ 1<<(i%8)}
				if i%16 == 0 {
					values = append(values, ^whole[i])
				}
				if len(whole)-i < 40 && whole[i] != 0 {
					values = append(values, 0) // as a torn write would leave it
				}
				for _, v := range values {
					b := bytes.Clone(whole)
					b[i] = v
					files[name] = b
					r := check(t, files, ledger.FsckOptions{})
					if total++; r.OK {
						t.Fatalf("byte %d of %d, %#x for %#x: not found: %s", i, len(whole), v, whole[i], r.Text())
					}
					if wrong := located(r, name, i, fr); wrong != "" {
						t.Fatalf("byte %d of %d, %#x for %#x: %s:\n%s", i, len(whole), v, whole[i], wrong, r.Text())
					}
				}
			}
			t.Logf("%d bytes, %d changes", len(whole), total)
		})
	}
}

// TestFsckPolicyEveryBit: the policy is the one file that nothing else commits
// to. No bit of it, no digit and no space can change without being found.
func TestFsckPolicyEveryBit(t *testing.T) {
	files := ledgertest.New("bytes", 1).NewChain().Fill(1).Folder(0)
	whole := files["policy"]
	for i := range whole {
		values := []byte{' ', '\t', '\n', '\r', '#', '0', '2', '9'}
		for k := range 8 {
			values = append(values, whole[i]^1<<k)
		}
		if (testing.Short() || sparse) && i%7 != 0 {
			continue
		}
		for _, v := range values {
			if v == whole[i] {
				continue
			}
			b := bytes.Clone(whole)
			b[i] = v
			files["policy"] = b
			if r := check(t, files, ledger.FsckOptions{}); r.OK || r.Problems[0].File != "policy" {
				t.Fatalf("byte %d, %q for %q: %s", i, v, whole[i], r.Text())
			}
		}
	}
}

// TestFsckLocatesFiles does to each file of a store what can happen to a whole
// file: each time something is found, and the file is named first.
func TestFsckLocatesFiles(t *testing.T) {
	c := small(11)
	files := ledgertest.ByClass(c.Folder(11))
	old := ledgertest.ByClass(small(7).Folder(7)) // the same store, some blocks ago
	if r := check(t, files, ledger.FsckOptions{}); !r.OK {
		t.Fatalf("before: %s", r.Text())
	}
	names := slices.Sorted(maps.Keys(files))
	// Partial tiles of the sizes of earlier checkpoints may be there or not.
	optional := func(name string) bool {
		return strings.Contains(name, ".p/") && !slices.ContainsFunc(ledger.PartialTiles(c.Blocks[10].Header.Size), func(id ledger.TileID) bool { return name == "log/"+id.Path() })
	}
	want := func(t *testing.T, what, name string, f map[string][]byte) {
		t.Helper()
		r := check(t, f, ledger.FsckOptions{})
		if r.OK && strings.HasSuffix(what, "zeros behind") && slices.ContainsFunc(r.Notes, func(n string) bool { return strings.HasPrefix(n, name) }) {
			return // as an interrupted append leaves it; the next start cuts it off
		}
		// Between two segments one cannot tell whether one is cut or the next one is
		// missing: then both are named.
		if r.OK || !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool {
			return p.File == name || strings.Contains(p.Rule, name) || strings.HasPrefix(name, p.File+"/")
		}) {
			t.Errorf("%s %s: got %s", name, what, r.Text())
		}
		if len(r.Problems) > 3 {
			t.Errorf("%s %s: got %d problems, want few: %s", name, what, len(r.Problems), r.Text())
		}
	}
	for i, name := range names {
		if testing.Short() && i%4 != 0 {
			continue
		}
		whole := files[name]
		f := maps.Clone(files)
		if !optional(name) {
			delete(f, name)
			want(t, "removed", name, f)
		}
		for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 1} {
			f[name] = whole[:n]
			want(t, fmt.Sprintf("cut to %d", n), name, f)
		}
		for what, more := range map[string][]byte{"a byte": {7}, "zeros": make([]byte, 700), "text": []byte("something else, and a good deal longer than a header"), "itself": whole} {
			f[name] = append(bytes.Clone(whole), more...)
			want(t, "with "+what+" behind", name, f)
		}
		f[name] = nil
		for _, another := range names {
			if another <= name || bytes.Equal(files[another], whole) || path.Dir(another) != path.Dir(name) || path.Dir(name) == "." {
				continue
			}
			f[name], f[another] = files[another], whole
			want(t, "swapped with "+another, name, f)
			f[another] = files[another]
		}
		if b, ok := old[name]; ok && !bytes.Equal(b, whole) {
			f[name] = b
			want(t, "rolled back", name, f)
		}
	}
	for _, dir := range []string{"log", "log/blocks", "log/checkpoints", "log/tile", "log/tile/0", "log/tile/entries", "log/tile/0/000.p", "payload", "payload/readings"} {
		f := maps.Clone(files)
		f[dir+"/stray"] = []byte("x")
		want(t, "added", dir+"/stray", f)
	}

	// Several together, as a disk does that was put back in part.
	back := func(prefixes ...string) map[string][]byte {
		f := maps.Clone(files)
		for k := range f {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(k, p) }) {
				delete(f, k)
				if b, ok := old[k]; ok {
					f[k] = b
				}
			}
		}
		return f
	}
	for _, tc := range []struct {
		name string
		back []string
	}{
		{"log/blocks/" + segment.Name(4), []string{"log/blocks"}},
		{"log/blocks/" + segment.Name(4), []string{"log/blocks", "payload"}},
		{"log/blocks/" + segment.Name(4), []string{"log/blocks", "payload", "log/tile"}},
		{"log/checkpoints/" + segment.Name(4), []string{"log/checkpoints"}},
		{"log/checkpoints/" + segment.Name(4), []string{"log/checkpoints/", "log/tile"}},
		{"payload/control/" + segment.Name(4), []string{"payload"}},
		{"payload/control/" + segment.Name(4), []string{"payload/control"}},
		{"log/tile/0/000.p/33", []string{"log/tile"}},
	} {
		r := check(t, back(tc.back...), ledger.FsckOptions{})
		if r.OK || !strings.HasPrefix(r.Problems[0].File, tc.name) && !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool { return p.File == tc.name }) {
			t.Errorf("%v rolled back: got %s\nwant %s named", tc.back, r.Text(), tc.name)
		}
	}
	// A store that is rolled back as a whole was right once. Who has a newer
	// checkpoint finds it.
	all, seals := back("log/", "payload/"), back("log/checkpoint")
	if r := check(t, seals, ledger.FsckOptions{}); !r.OK {
		t.Errorf("all that was sealed rolled back: got %s, want what a log looks like that is not sealed yet", r.Text())
	}
	if r := check(t, seals, ledger.FsckOptions{Known: [][]byte{files["log/checkpoint"]}}); r.OK || r.Problems[0].File != "log/checkpoints/"+segment.Name(4) {
		t.Errorf("all that was sealed rolled back, with a newer checkpoint at hand: got %s", r.Text())
	}
	if r := check(t, all, ledger.FsckOptions{}); !r.OK {
		t.Errorf("rolled back as a whole: got %s, want nothing that shows it", r.Text())
	}
	newest := files["log/checkpoint"]
	if r := check(t, all, ledger.FsckOptions{Known: [][]byte{newest}}); r.OK || !strings.Contains(r.Text(), "rolled back") || r.Problems[0].File != "log/blocks/"+segment.Name(4) {
		t.Errorf("rolled back as a whole, with a newer checkpoint at hand: got %s", r.Text())
	}
	for what, known := range map[string][]byte{"newest": newest, "older": old["log/checkpoint"]} {
		if r := check(t, files, ledger.FsckOptions{Known: [][]byte{known}}); !r.OK {
			t.Errorf("with the %s checkpoint: got %s", what, r.Text())
		}
	}
	fork := small(10)
	fork.Decide([]ledgertest.Record{fork.Frame(999, ledgertest.Start), fork.Command(11, 11, ledgertest.Start)})
	if r := check(t, files, ledger.FsckOptions{Known: [][]byte{fork.Seal(fork.Blocks[10])}}); r.OK || !strings.Contains(r.Text(), "fork") {
		t.Errorf("with a checkpoint of a fork: got %s", r.Text())
	}
}

// TestFsckLocatesRecords rewrites journals with two records swapped, each frame
// right in itself.
func TestFsckLocatesRecords(t *testing.T) {
	files := ledgertest.ByClass(small(11).Folder(11))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasSuffix(name, ".seg") {
			continue
		}
		fr := frames(t, files, name)
		for i := 0; i+1 < len(fr); i++ {
			fr[i].data, fr[i+1].data = fr[i+1].data, fr[i].data
			first, _ := segment.ParseName(path.Base(name))
			b := segment.AppendHeader(nil, first)
			for _, f := range fr {
				b = segment.AppendFrames(b, f.n, f.data)
			}
			fr[i].data, fr[i+1].data = fr[i+1].data, fr[i].data
			f := maps.Clone(files)
			f[name] = b
			r := check(t, f, ledger.FsckOptions{})
			if r.OK || !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool {
				return p.File == name && p.Record != nil && (*p.Record == fr[i].n || *p.Record == fr[i+1].n)
			}) {
				t.Errorf("%s, records %d and %d swapped: got %s", name, fr[i].n, fr[i+1].n, r.Text())
			}
		}
	}
}
