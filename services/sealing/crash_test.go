//go:build unix

package sealing

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/decided"
)

// platter knows, of a folder that is written to, what a power cut would leave.
// Its hook is called before each operation, and by then the one before is done.
//
// A file's content is on the platter as it was at the last sync of the file, a
// name as it was at the last sync of its folder. What lies between may be there
// or not.
type platter struct {
	t    *testing.T
	root string
	// each is called with every state that a cut before an operation may leave.
	each func(what string, files map[string][]byte)

	mu       sync.Mutex
	n        int
	op, path string                      // the operation before
	live     map[uint64]*inode           // by number; of what is there now
	names    map[string]map[string]entry // as synced, by folder
}

// sector is what a disk writes as a whole, bytes.
const sector = 512

// inode is a file, whatever its names.
type inode struct {
	now, synced, before []byte
}

type entry struct {
	file *inode // nil: a folder
}

func newPlatter(t *testing.T, root string) *platter {
	return &platter{t: t, root: root, live: map[uint64]*inode{}, names: map[string]map[string]entry{}}
}

func (p *platter) hook(op, path string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.look(op, path)
	return nil
}

// look takes in what the operation before has done, and hands out what a cut now
// would leave.
func (p *platter) look(op, path string) {
	files := map[string]*inode{}
	dirs := map[string]map[string]entry{}
	seen := map[uint64]*inode{}
	err := filepath.WalkDir(p.root, func(at string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			dirs[at] = map[string]entry{}
		}
		if at == p.root {
			return nil
		}
		d := dirs[filepath.Dir(at)]
		if e.IsDir() {
			d[e.Name()] = entry{}
			return nil
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(at)
		if err != nil {
			return err
		}
		n := info.Sys().(*syscall.Stat_t).Ino
		f := p.live[n]
		if f == nil {
			f = &inode{}
		}
		f.before, f.now = f.now, b
		seen[n], files[at], d[e.Name()] = f, f, entry{f}
		return nil
	})
	if err != nil {
		p.t.Errorf("operation %d: %v", p.n, err)
	}
	p.live = seen
	switch p.op {
	case "sync":
		if f := files[p.path]; f != nil {
			f.synced = f.now
		}
	case "syncdir":
		p.names[p.path] = dirs[p.path]
	}
	what := fmt.Sprintf("cut after %d operations, before %s %s", p.n, op, strings.TrimPrefix(path, p.root))
	all := func(content func(*inode) []byte) map[string][]byte {
		out := map[string][]byte{}
		for at, f := range files {
			out[at[len(p.root)+1:]] = content(f)
		}
		return out
	}
	now := func(f *inode) []byte { return f.now }
	synced := func(f *inode) []byte { return f.synced }
	p.each(what+", all there", all(now))
	p.each(what+", names there, contents as synced", all(synced))
	p.each(what+", as synced", p.named(synced))
	p.each(what+", contents there, names as synced", p.named(now))
	if p.op == "write" {
		p.each(what+", half written", all(func(f *inode) []byte {
			if f != files[p.path] || len(f.now) <= len(f.before) {
				return f.now
			}
			return f.now[:(len(f.before)+len(f.now))/2]
		}))
		p.each(what+", length there, sectors of half of the bytes not", all(func(f *inode) []byte {
			if f != files[p.path] || len(f.now) <= len(f.before) {
				return f.now
			}
			b := bytes.Clone(f.now)
			clear(b[max(len(f.before), (len(f.before)+len(f.now))/2/sector*sector):])
			return b
		}))
	}
	p.op, p.path = op, path
	p.n++
}

// named is the tree of the names that are synced.
func (p *platter) named(content func(*inode) []byte) map[string][]byte {
	out := map[string][]byte{}
	var walk func(dir string)
	walk = func(dir string) {
		for name, e := range p.names[dir] {
			at := filepath.Join(dir, name)
			if e.file == nil {
				out[at[len(p.root)+1:]+"/"] = nil
				walk(at)
				continue
			}
			out[at[len(p.root)+1:]] = content(e.file)
		}
	}
	walk(p.root)
	return out
}

// lay writes a state into a folder.
func lay(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// inMemory returns a folder where syncs cost nothing, if there is such: what they
// are good for, [platter] knows.
func inMemory(t *testing.T) string {
	t.Helper()
	if dir, err := os.MkdirTemp("/dev/shm", "stopline-"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func stateID(files map[string][]byte) [32]byte {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(files)) {
		fmt.Fprintf(h, "%s %d\n", name, len(files[name]))
		h.Write(files[name])
	}
	return [32]byte(h.Sum(nil))
}

// fillAll appends the blocks that the store has not, one by one, and seals each.
func fillAll(s *Store, c *ledgertest.Chain, bs []*decided.Block) error {
	for {
		for {
			p, ok := s.Snapshot()
			if !ok {
				break
			}
			blk := c.Blocks[p.Header.Height-1]
			at := *c
			at.Voters = blk.Voters
			if err := errors.Join(s.WriteTiles(p), s.Seal(p, at.Seal(blk))); err != nil {
				return err
			}
		}
		h := s.State().Height
		if h == ledger.Height(len(bs)) {
			return nil
		}
		if err := s.Append(bs[h]); err != nil {
			return err
		}
	}
}

// TestPowerCut cuts the power before every operation on files: what was synced is
// there, what was not may be, or half of it, and names or contents without each
// other. From every such state the log goes on to the same bytes, and at no time
// does a checkpoint cover what is not there. So too when the power is cut once
// more while it starts.
func TestPowerCut(t *testing.T) {
	d := ledgertest.New("power", 4)
	c := d.NewChain()
	frames := func(n int) (rs []ledgertest.Record) {
		for range n {
			rs = append(rs, d.Frame(uint64(len(rs)+1+1000*len(c.Blocks)), ledgertest.Start))
		}
		return rs
	}
	c.Decide(frames(120))
	c.Decide(frames(60), []ledgertest.Record{c.Join(1)}) // the validators change
	c.Voters = []int{0, 1, 2, 3, 4}
	c.Decide(frames(90)) // a tile fills
	bs := blocks(t, c)
	size := c.Blocks[2].Header.Size
	o := options(d, "")
	o.SegmentBytes = 12 << 10 // segments, too, are begun on the way

	var want map[string]string
	checked, restarts := map[[32]byte]bool{}, 0
	budget := 1 << 30
	few := testing.Short() || raceOn
	if few {
		budget = 40
	}
	check := func(what string, files map[string][]byte) {
		if id := stateID(files); checked[id] || budget == 0 || t.Failed() {
			return
		} else {
			checked[id] = true
		}
		if few && len(checked)%17 != 0 {
			return
		}
		budget--
		dir := inMemory(t)
		defer func() { _ = os.RemoveAll(dir) }()
		lay(t, dir, files)
		checkSealed(t, d, dir)
		o := o
		o.Dir = dir
		// Every seventh is stopped once more on its way up.
		if len(checked)%7 == 0 {
			n, stop := 0, len(checked)/7%9+1
			o.Hook = func(string, string) error {
				if n++; n >= stop {
					return errors.New("boom")
				}
				return nil
			}
			if s, err := OpenStore(o); err == nil {
				_ = s.Close()
			}
			o.Hook = nil
			restarts++
		}
		s, err := OpenStore(o)
		if err != nil {
			t.Errorf("%s: opening: %v", what, err)
			return
		}
		checkCovered(t, d, dir)
		if err := fillAll(s, c, bs); err != nil {
			t.Errorf("%s: going on: %v", what, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		got := final(tree(t, dir), size)
		for name := range want { // there may be a checkpoint more or less
			if strings.HasPrefix(name, "log/checkpoints/") {
				got[name] = want[name]
			}
		}
		for name := range got {
			if strings.HasPrefix(name, "log/checkpoints/") && want[name] == "" {
				delete(got, name)
			}
		}
		checkSame(t, what, got, want)
	}
	build := func(hook func(op, path string) error) string {
		o := o
		o.Dir, o.Hook = t.TempDir(), hook
		s, err := OpenStore(o)
		if err != nil {
			t.Fatal(err)
		}
		s.files.inTurn = true
		if err := fillAll(s, c, bs); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return o.Dir
	}
	want = final(tree(t, build(nil)), size)
	type state struct {
		what  string
		files map[string][]byte
	}
	var states []state
	var p *platter
	o2 := o
	o2.Dir = t.TempDir()
	p = newPlatter(t, o2.Dir)
	p.each = func(what string, files map[string][]byte) { states = append(states, state{what, files}) }
	o2.Hook = p.hook
	s, err := OpenStore(o2)
	if err != nil {
		t.Fatal(err)
	}
	s.files.inTurn = true
	if err := fillAll(s, c, bs); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	p.look("the end", "")
	for _, st := range states {
		check(st.what, st.files)
	}
	t.Logf("%d operations, %d states, %d of them stopped again", p.n, len(checked), restarts)
	if p.n < 100 || len(checked) < p.n {
		t.Errorf("got %d operations and %d states, want more of each", p.n, len(checked))
	}
}
