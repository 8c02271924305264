package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/services/internal/repair"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// small is a chain with payloads of three classes, a change of the validators and
// several segments of each journal.
func small(blocks int) *ledgertest.Chain {
	d := ledgertest.New("repair", 1)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.Frame(1, ledgertest.Start), d.Join(1)})
	c.Voters = []int{0, 1}
	for i := range blocks - 1 {
		n := uint64(i)
		c.Decide([]ledgertest.Record{d.Frame(n+2, ledgertest.Start), d.Command(n+1, n+1, ledgertest.Start)})
	}
	return c
}

func write(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		at := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// read returns all files of a folder but those that were put aside.
func read(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if e.IsDir() {
			if strings.HasPrefix(rel, "damaged-") {
				return fs.SkipDir
			}
			return nil
		}
		out[filepath.ToSlash(rel)], err = os.ReadFile(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func run(t *testing.T, dir string, o repair.Options) repair.Report {
	t.Helper()
	o.Dir = dir
	r, err := repair.Run(t.Context(), o)
	if err != nil {
		t.Fatalf("repair: %v", err)
	}
	return r
}

// wantClean checks the folder by itself.
func wantClean(t *testing.T, dir string) {
	t.Helper()
	r, err := ledger.Fsck(t.Context(), os.DirFS(dir), ledger.FsckOptions{Signatures: true})
	if err != nil || !r.OK {
		t.Fatalf("after the repair: %v, %s", err, r.Text())
	}
	if _, err := os.Stat(filepath.Join(dir, "repair.tmp")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the stage is still there: %v", err)
	}
}

// content is all records of a folder, whatever segments they are in.
func content(t *testing.T, files map[string][]byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	for name, b := range files {
		if !strings.HasSuffix(name, ".seg") {
			out[name] = string(b)
		}
	}
	for _, dir := range []string{"log/blocks", "log/checkpoints", "payload/readings", "payload/control", "payload/registry"} {
		_, err := segment.Walk(ledgertest.MapFS(files), dir, 0, func(n uint64, rec []byte, _ string, _ int64) error {
			out[fmt.Sprintf("%s %d", dir, n)] = string(rec)
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
	}
	return out
}

// TestRepairEachFile does to each file what fsck's own test does, and repairs it
// from a copy: the content is as before, byte by byte.
func TestRepairEachFile(t *testing.T) {
	whole := ledgertest.ByClass(small(11).Folder(11))
	old := ledgertest.ByClass(small(7).Folder(7))
	want := content(t, whole)
	copied := repair.Folder("copy", ledgertest.MapFS(whole))
	damages := map[string]func(name string, b []byte) []byte{
		"flipped in the middle": func(_ string, b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"flipped at the start":  func(_ string, b []byte) []byte { b[3] ^= 4; return b },
		"flipped at the end":    func(_ string, b []byte) []byte { b[len(b)-1] ^= 4; return b },
		"cut":                   func(_ string, b []byte) []byte { return b[:len(b)/2] },
		"emptied":               func(string, []byte) []byte { return []byte{} },
		"removed":               func(string, []byte) []byte { return nil },
		"longer": func(_ string, b []byte) []byte {
			return append(b, "and more than was written there, longer than one header"...)
		},
		"rolled back": func(name string, b []byte) []byte { return old[name] },
		"of another place": func(name string, b []byte) []byte {
			for _, k := range slices.Sorted(maps.Keys(whole)) {
				if k != name && path.Dir(k) == path.Dir(name) {
					return bytes.Clone(whole[k])
				}
			}
			return nil
		},
	}
	i := 0
	for _, name := range slices.Sorted(maps.Keys(whole)) {
		if strings.Contains(name, ".p/") && !strings.HasSuffix(name, ".p/33") && !strings.HasSuffix(name, ".p/30") {
			continue // partial tiles are all alike
		}
		for _, what := range slices.Sorted(maps.Keys(damages)) {
			if i++; testing.Short() && i%9 != 0 {
				continue
			}
			t.Run(name+" "+what, func(t *testing.T) {
				t.Parallel()
				files := maps.Clone(whole)
				files[name] = damages[what](name, bytes.Clone(whole[name]))
				damaged := files[name]
				if damaged == nil {
					delete(files, name)
				}
				if r, err := ledger.Fsck(t.Context(), ledgertest.MapFS(files), ledger.FsckOptions{}); err != nil || r.OK {
					t.Skip("that is no damage")
				}
				dir := write(t, files)
				dry := run(t, dir, repair.Options{Sources: []repair.Source{copied}, DryRun: true})
				if got := read(t, dir); !maps.EqualFunc(got, files, bytes.Equal) {
					t.Fatal("a dry run has changed the folder")
				}
				r := run(t, dir, repair.Options{Sources: []repair.Source{copied}})
				wantClean(t, dir)
				if !r.After.OK || r.Before.OK || len(r.Actions) == 0 || len(r.Lost) > 0 {
					t.Errorf("got %+v", r)
				}
				if !slices.Equal(dry.Actions, r.Actions) {
					t.Errorf("a dry run says %v, done was %v", dry.Actions, r.Actions)
				}
				if got := content(t, read(t, dir)); !maps.Equal(got, want) {
					t.Errorf("the content is another than before: %s", r.Text())
				}
				// The original is beside it.
				if damaged != nil {
					b, err := os.ReadFile(filepath.Join(dir, r.Aside, filepath.FromSlash(name)))
					touched := slices.ContainsFunc(r.Actions, func(a repair.Action) bool { return a.File == name })
					if touched && (err != nil || !bytes.Equal(b, damaged)) {
						t.Errorf("original: %v, %d bytes, want %d", err, len(b), len(damaged))
					}
				}
				if again := run(t, dir, repair.Options{}); !again.Before.OK || len(again.Actions) > 0 {
					t.Errorf("again: got %s", again.Text())
				}
			})
		}
	}
}

// damage is a folder with something wrong in each kind of file.
func damage(whole map[string][]byte) map[string][]byte {
	files := map[string][]byte{}
	for k, b := range whole {
		files[k] = bytes.Clone(b)
	}
	files["log/blocks/"+segment.Name(4)][700] ^= 1
	delete(files, "log/blocks/"+segment.Name(8))
	files["payload/readings/"+segment.Name(0)][400] ^= 1
	files["payload/control/"+segment.Name(4)] = files["payload/control/"+segment.Name(4)][:300]
	delete(files, "log/tile/entries/000.p/33")
	files["log/tile/0/000.p/33"][40] ^= 1
	files["log/checkpoint"][40] ^= 1
	files["succession.json"][40] ^= 1
	files["policy"][40] ^= 1
	files["log/blocks/stray"] = []byte("x")
	return files
}

func TestRepairMuch(t *testing.T) {
	c := small(11)
	whole := ledgertest.ByClass(c.Folder(11))
	want := content(t, whole)
	t.Run("from a copy", func(t *testing.T) {
		files := damage(whole)
		files["genesis.json"][99] ^= 1
		dir := write(t, files)
		r := run(t, dir, repair.Options{Sources: []repair.Source{repair.Folder("copy", ledgertest.MapFS(whole))}})
		wantClean(t, dir)
		if got := content(t, read(t, dir)); !maps.Equal(got, want) {
			t.Errorf("the content is another than before: %s", r.Text())
		}
	})
	t.Run("from two copies that are damaged elsewhere", func(t *testing.T) {
		one, two := maps.Clone(whole), maps.Clone(whole)
		for k := range whole {
			if strings.HasPrefix(k, "payload/") {
				delete(one, k)
			} else if strings.HasPrefix(k, "log/") {
				delete(two, k)
			}
		}
		dir := write(t, damage(whole))
		r := run(t, dir, repair.Options{Sources: []repair.Source{repair.Folder("one", ledgertest.MapFS(one)), repair.Folder("two", ledgertest.MapFS(two))}})
		wantClean(t, dir)
		if got := content(t, read(t, dir)); !maps.Equal(got, want) {
			t.Errorf("the content is another than before: %s", r.Text())
		}
	})
	t.Run("from validators", func(t *testing.T) {
		files := damage(whole)
		files["policy"] = whole["policy"] // validators have none
		dir := write(t, files)
		r := run(t, dir, repair.Options{Sources: []repair.Source{validators(c, nil)}})
		wantClean(t, dir)
		if got := content(t, read(t, dir)); !maps.Equal(got, want) {
			t.Errorf("the content is another than before: %s", r.Text())
		}
	})
	t.Run("everything is gone", func(t *testing.T) {
		dir := write(t, map[string][]byte{"log/x": nil})
		r := run(t, dir, repair.Options{Sources: []repair.Source{repair.Folder("copy", ledgertest.MapFS(whole))}})
		if r.After.OK || len(r.Actions) > 0 || !strings.Contains(fmt.Sprint(r.Refused), "a trusted policy is needed") {
			t.Errorf("without anything to trust: got %s", r.Text())
		}
		p, err := ledger.ParsePolicy(whole["policy"])
		if err != nil {
			t.Fatal(err)
		}
		run(t, dir, repair.Options{Fsck: ledger.FsckOptions{Policy: p}, Sources: []repair.Source{repair.Folder("copy", ledgertest.MapFS(whole))}})
		wantClean(t, dir)
	})
	t.Run("tiles from the web", func(t *testing.T) {
		// Without its block nobody can make the entry again, but for who has it.
		files := maps.Clone(whole)
		files["log/blocks/"+segment.Name(4)] = bytes.Clone(whole["log/blocks/"+segment.Name(4)])
		files["log/blocks/"+segment.Name(4)][700] ^= 1
		files["log/tile/entries/000.p/33"] = files["log/tile/entries/000.p/33"][:36*14]
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, ok := whole["log"+r.URL.Path]
			if !ok {
				http.NotFound(w, r)
				return
			}
			_, _ = w.Write(b)
		}))
		defer srv.Close()
		dir := write(t, files)
		r := run(t, dir, repair.Options{Sources: []repair.Source{repair.HTTP(srv.URL, srv.Client())}})
		if r.After.OK || len(r.After.Problems) >= len(r.Before.Problems) {
			t.Errorf("the block is still damaged, and no more than it: got %s", r.Text())
		}
		if got := read(t, dir)["log/tile/entries/000.p/33"]; !bytes.Equal(got, whole["log/tile/entries/000.p/33"]) {
			t.Errorf("the tile is not repaired: %s", r.Text())
		}
		// What is left then comes from validators.
		run(t, dir, repair.Options{Sources: []repair.Source{validators(c, nil)}})
		wantClean(t, dir)
	})
	t.Run("checkpoints that nobody has", func(t *testing.T) {
		files := maps.Clone(whole)
		name := "log/checkpoints/" + segment.Name(4)
		files[name] = bytes.Clone(whole[name])
		files[name][len(files[name])/2] ^= 1
		delete(files, "log/checkpoints/"+segment.Name(8))
		dir := write(t, files)
		r := run(t, dir, repair.Options{})
		wantClean(t, dir)
		if len(r.Lost) == 0 || r.After.Checkpoints >= 11 || r.After.Sealed != 33 {
			t.Errorf("got %s, want it said that checkpoints are lost", r.Text())
		}
	})
	t.Run("nothing is wrong", func(t *testing.T) {
		dir := write(t, whole)
		if r := run(t, dir, repair.Options{}); len(r.Actions) > 0 || !r.After.OK {
			t.Errorf("got %s", r.Text())
		}
		if got := read(t, dir); !maps.EqualFunc(got, whole, bytes.Equal) {
			t.Error("the folder was changed")
		}
	})
}

// validators answers for blocks of a chain; change may make lies of them.
func validators(c *ledgertest.Chain, change func(*pb.Block)) repair.Source {
	return repair.Blocks("validators", func(_ context.Context, from ledger.Height, most int) (out []*pb.Block, err error) {
		for h := int(from); h <= len(c.Blocks) && len(out) < most; h++ {
			b := c.Blocks[h-1]
			m := wire.BlockToProto(&b.Block, b.Batches, b.Verdicts)
			if change != nil {
				change(m)
			}
			out = append(out, m)
		}
		return out, nil
	})
}

// TestRepairFromLiars: what a source makes up is refused, with the file named, and
// the folder stays as it is.
func TestRepairFromLiars(t *testing.T) {
	c := small(11)
	whole := ledgertest.ByClass(c.Folder(11))
	blocks4, readings := "log/blocks/"+segment.Name(4), "payload/readings/"+segment.Name(4)
	flip := func(name string, at int) map[string][]byte {
		files := maps.Clone(whole)
		files[name] = bytes.Clone(whole[name])
		files[name][at] ^= 1
		return files
	}
	// rewritten is a copy with a record changed, its frame right again.
	rewritten := func(name string, change func(n uint64, rec []byte) []byte) repair.Source {
		files := maps.Clone(whole)
		first, _ := segment.ParseName(path.Base(name))
		b := segment.AppendHeader(nil, first)
		_, err := segment.Walk(ledgertest.MapFS(whole), path.Dir(name), first, func(n uint64, rec []byte, file string, _ int64) error {
			if file == path.Base(name) {
				b = segment.AppendFrames(b, n, change(n, bytes.Clone(rec)))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		files[name] = b
		return repair.Folder("liar", ledgertest.MapFS(files))
	}
	fork := small(5)
	for range 6 {
		fork.Decide([]ledgertest.Record{fork.Frame(99, ledgertest.Start)})
	}
	weak := small(5)
	weak.Voters = []int{0}
	for range 6 {
		weak.Decide([]ledgertest.Record{weak.Frame(99, ledgertest.Start)})
	}
	other := ledgertest.New("other", 1).NewChain().Fill(11).Folder(11)
	gone := maps.Clone(whole)
	for k := range gone {
		if strings.HasPrefix(k, "log/blocks/") {
			delete(gone, k)
		}
	}
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		file  string // named
		from  repair.Source
	}{
		{"a payload with another content", flip(readings, 400), "payload/readings", rewritten(readings, func(_ uint64, rec []byte) []byte { rec[len(rec)-1] ^= 1; return rec })},
		{"a payload with another salt", flip(readings, 400), "payload/readings", rewritten(readings, func(_ uint64, rec []byte) []byte { rec[50] ^= 1; return rec })},
		{"a block that was changed", flip(blocks4, 700), blocks4, rewritten(blocks4, func(_ uint64, rec []byte) []byte { rec[400] ^= 1; return rec })},
		{"a block without its quorum", flip(blocks4, 700), blocks4, rewritten(blocks4, func(n uint64, rec []byte) []byte {
			d, err := ledger.ParseDecided(rec)
			if err != nil {
				t.Fatal(err)
			}
			d.Votes = d.Votes[:1]
			return d.Marshal()
		})},
		{"another end of the log", gone, "log/blocks", validators(fork, nil)},
		{"another end of the log, by few", gone, "log/blocks", validators(weak, nil)},
		{"blocks with other headers", flip(blocks4, 700), "block", validators(c, func(b *pb.Block) { b.Header[30] ^= 1 })},
		{"genesis of another district", flip("genesis.json", 99), "genesis.json", repair.Folder("liar", ledgertest.MapFS(other))},
		{"policy of another district", flip("policy", 20), "policy", repair.Folder("liar", ledgertest.MapFS(other))},
		{"checkpoints of another log", flip("log/checkpoints/"+segment.Name(4), 400), "log/checkpoints/" + segment.Name(4), repair.Folder("liar", ledgertest.MapFS(other))},
		{"a source that fails", flip(readings, 400), "validators", repair.Blocks("validators", func(context.Context, ledger.Height, int) ([]*pb.Block, error) {
			return nil, errors.New("not there")
		})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, tc.files)
			r := run(t, dir, repair.Options{Sources: []repair.Source{tc.from}})
			if !slices.ContainsFunc(r.Refused, func(s string) bool { return strings.Contains(s, tc.file) && strings.HasPrefix(s, tc.from.Name()) }) {
				t.Errorf("refused: got %q, want %s named", r.Refused, tc.file)
			}
			for _, a := range r.Actions {
				if a.From == tc.from.Name() {
					t.Errorf("%s was taken from it", a.File)
				}
			}
			if strings.HasPrefix(tc.name, "checkpoints") {
				wantClean(t, dir) // they are left out
			} else if got := read(t, dir); r.After.OK || !maps.EqualFunc(got, tc.files, bytes.Equal) {
				t.Errorf("the folder was changed: %s", r.Text())
			}
			// Somebody honest is asked next.
			run(t, dir, repair.Options{Sources: []repair.Source{tc.from, repair.Folder("copy", ledgertest.MapFS(whole))}})
			wantClean(t, dir)
		})
	}
}

// TestRepairCutShort stops a repair before each operation that changes the folder.
// No file is ever worse than it was, and doing it again ends it.
func TestRepairCutShort(t *testing.T) {
	whole := ledgertest.ByClass(small(11).Folder(11))
	files := damage(whole)
	want := content(t, whole)
	source := repair.Folder("copy", ledgertest.MapFS(whole))
	stop := errors.New("power cut")
	for at := 0; ; at++ {
		dir := write(t, files)
		n := 0
		_, err := repair.Run(t.Context(), repair.Options{Dir: dir, Sources: []repair.Source{source}, Hook: func(string, string) error {
			if n++; n > at {
				return stop
			}
			return nil
		}})
		if err == nil {
			if at < 10 {
				t.Fatalf("only %d operations", at)
			}
			break
		}
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if testing.Short() && at%4 != 0 {
			continue
		}
		for name, b := range read(t, dir) {
			if strings.HasPrefix(name, "repair.tmp") {
				continue
			}
			// Each file is as it was, or whole.
			if !bytes.Equal(b, files[name]) && !strings.HasSuffix(name, ".seg") && !bytes.Equal(b, whole[name]) {
				t.Errorf("stopped at %d: %s is neither as before nor as it should be", at, name)
			}
		}
		r := run(t, dir, repair.Options{Sources: []repair.Source{source}})
		wantClean(t, dir)
		if got := content(t, read(t, dir)); !maps.Equal(got, want) {
			t.Errorf("stopped at %d: the content is another than before: %s", at, r.Text())
		}
	}
}
