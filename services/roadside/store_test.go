package roadside

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// letter is what a frame of a test holds: made of its key, so that a mix-up shows.
func letter(k key, size int) []byte {
	r := rand.New(rand.NewPCG(k.epoch, k.seq))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(r.UintN(256))
	}
	return b
}

// tb is what tests and rapid have in common.
type tb interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func openStore(t tb, c StoreConfig) *Store {
	t.Helper()
	s, err := OpenStore(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// alive returns the keys in a store by class.
func (s *Store) alive() (all []key, by [2][]key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.order {
		if !e.dead {
			all = append(all, e.key)
			by[e.class] = append(by[e.class], e.key)
		}
	}
	return all, by
}

// sizes returns how many bytes the files of frames in a folder have.
func sizes(dir string) (n int64, err error) {
	es, err := os.ReadDir(dir)
	for _, e := range es {
		if i, ierr := e.Info(); ierr == nil && e.Name() != "command" {
			n += i.Size()
		}
	}
	return n, err
}

// drain sends everything, in order, and returns the keys.
func drain(t tb, s *Store, size func(key) int) (out []key) {
	t.Helper()
	for {
		f, ok := s.next(key{})
		if !ok {
			return out
		}
		if !bytes.Equal(f.envelope, letter(f.key, size(f.key))) {
			t.Fatalf("frame %s is not what was put", f.key)
		}
		s.answered(f, true)
		out = append(out, f.key)
	}
}

// model is what a store must hold, the dumb way.
type model struct {
	class   map[key]class
	size    map[key]int
	durable map[key]bool // a flush since has had no error
	alive   []key
	flying  []flight
	dropped [2]uint64
}

// Whatever happens, in whatever order: the bounds hold, on disk too; frames are
// in order and unchanged; the oldest without events go first; each one put is
// sent, kept, or counted as dropped; and kill -9 takes only what was not flushed.
func TestStoreAgainstModel(t *testing.T) {
	for _, disk := range []bool{false, true} {
		t.Run(map[bool]string{false: "memory", true: "disk"}[disk], func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) { storeAgainstModel(t, disk) })
		})
	}
}

func storeAgainstModel(t *rapid.T, disk bool) {
	cfg := StoreConfig{MaxFrames: rapid.IntRange(1, 300).Draw(t, "frames"), MaxBytes: int64(rapid.IntRange(1000, 40_000).Draw(t, "bytes"))}
	if disk {
		dir, err := os.MkdirTemp("", "store-")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		cfg.Dir = dir
		cfg.Hook = func(op, path string) error { // also between any two operations
			n, err := sizes(dir)
			if err == nil && n > cfg.MaxBytes {
				err = fmt.Errorf("%s %s: %d bytes on disk, at most %d", op, path, n, cfg.MaxBytes)
			}
			return err
		}
	}
	s := openStore(t, cfg)
	m := model{class: map[key]class{}, size: map[key]int{}, durable: map[key]bool{}}
	last := key{1, 0}
	var before [2]uint64 // dropped in earlier lives of the store
	flush := func() {
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
	}
	// compare takes what is gone for dropped, and sees whether it might be.
	compare := func(added ...key) {
		all, by := s.alive()
		if !slices.IsSortedFunc(all, key.compare) {
			t.Fatalf("not in order: %v", all)
		}
		var gone [2][]key
		for _, k := range append(slices.Clone(m.alive), added...) {
			if _, there := slices.BinarySearchFunc(all, k, key.compare); !there {
				gone[m.class[k]] = append(gone[m.class[k]], k)
				if i := slices.IndexFunc(m.flying, func(f flight) bool { return f.key == k }); i < 0 {
					m.dropped[m.class[k]]++
				} // else its answer counts it
			}
		}
		if len(all) > len(m.alive)+len(added) {
			t.Fatalf("got %v, more than %v and %v", all, m.alive, added)
		}
		if len(gone[event]) > 0 && len(by[plain]) > 0 {
			t.Fatalf("dropped %v with events and kept %v without", gone[event], by[plain])
		}
		for c := range gone {
			if n := len(gone[c]); n > 0 && len(by[c]) > 0 && gone[c][n-1].compare(by[c][0]) > 0 {
				t.Fatalf("dropped %v and kept %v of %s", gone[c], by[c], classNames[c])
			}
		}
		m.alive = all
		st := s.Stats()
		if st.Waiting != len(all) || st.Events != len(by[event]) || st.Waiting > cfg.MaxFrames || st.Bytes > cfg.MaxBytes {
			t.Fatalf("got %+v with %d frames, %d with events, at most %d and %d bytes", st, len(all), len(by[event]), cfg.MaxFrames, cfg.MaxBytes)
		}
		if want := [2]uint64{m.dropped[plain] - before[plain], m.dropped[event] - before[event]}; st.Dropped != want[0]+want[1] || st.DroppedEvents != want[1] {
			t.Fatalf("got %d dropped, %d with events; want %v", st.Dropped, st.DroppedEvents, want)
		}
		if st.Damaged+st.Torn+st.Errors > 0 {
			t.Fatalf("got %+v", st)
		}
	}
	t.Repeat(map[string]func(*rapid.T){
		"put": func(t *rapid.T) {
			for range rapid.IntRange(1, 20).Draw(t, "n") {
				last.seq += uint64(rapid.IntRange(1, 2).Draw(t, "step"))
				c := class(rapid.IntRange(0, 1).Draw(t, "class"))
				m.class[last], m.size[last] = c, rapid.IntRange(0, 700).Draw(t, "size")
				s.put(last, c, letter(last, m.size[last]))
				compare(last)
			}
		},
		"flush": func(t *rapid.T) {
			flush()
			compare()
			if disk {
				for _, k := range m.alive {
					m.durable[k] = true
				}
				if n := s.inMem; n > 0 {
					t.Fatalf("%d frames in memory after a flush", n)
				}
				if n, err := sizes(cfg.Dir); err != nil || n != s.Stats().Bytes {
					t.Fatalf("%d bytes on disk, %v; counted %d", n, err, s.Stats().Bytes)
				}
			}
		},
		"send": func(t *rapid.T) {
			after := key{}
			if n := len(m.flying); n > 0 {
				after = m.flying[n-1].key
			}
			f, ok := s.next(after)
			i, found := slices.BinarySearchFunc(m.alive, after, key.compare)
			if found {
				i++
			}
			if ok != (i < len(m.alive)) || ok && f.key != m.alive[i] {
				t.Fatalf("after %s got %s, %v of %v", after, f.key, ok, m.alive)
			}
			if ok {
				if !bytes.Equal(f.envelope, letter(f.key, m.size[f.key])) {
					t.Fatalf("frame %s is not what was put", f.key)
				}
				m.flying = append(m.flying, f)
			}
		},
		"answer": func(t *rapid.T) {
			if len(m.flying) == 0 {
				t.Skip("nothing is on its way")
			}
			i := rapid.IntRange(0, len(m.flying)-1).Draw(t, "which")
			f, settled := m.flying[i], rapid.Bool().Draw(t, "settled")
			m.flying = slices.Delete(m.flying, i, i+1)
			s.answered(f, settled)
			if at, there := slices.BinarySearchFunc(m.alive, f.key, key.compare); there && settled {
				m.alive = slices.Delete(m.alive, at, at+1)
			} else if !there && !settled {
				m.dropped[m.class[f.key]]++
			}
			compare()
		},
		"kill": func(t *rapid.T) {
			if !disk {
				t.Skip("nothing would be left")
			}
			var want []key
			for _, k := range m.alive {
				if m.durable[k] {
					want = append(want, k)
				}
			}
			s = openStore(t, cfg)
			all, _ := s.alive()
			for _, k := range want {
				if _, there := slices.BinarySearchFunc(all, k, key.compare); !there {
					t.Fatalf("frame %s was kept and is gone: got %v", k, all)
				}
			}
			for _, k := range all {
				if !m.durable[k] {
					t.Fatalf("frame %s was never kept: %v", k, all)
				}
			}
			// What was settled, or dropped, may be back: the district takes it once.
			m.alive, m.flying, before = all, nil, m.dropped
			last = key{last.epoch + 1, 0}
			compare()
		},
	})
	compare()
	if got := drain(t, s, func(k key) int { return m.size[k] }); !slices.Equal(got, m.alive) {
		t.Fatalf("sent %v, want %v", got, m.alive)
	}
	flush()
	if st := s.Stats(); st.Waiting != 0 || st.Bytes != 0 {
		t.Fatalf("got %+v when everything is sent", st)
	}
}

// fill puts n frames from a sequence on, every third with events.
func fill(s *Store, epoch, from uint64, n int) {
	for i := range uint64(n) {
		k := key{epoch, from + i}
		c := plain
		if k.seq%3 == 0 {
			c = event
		}
		s.put(k, c, letter(k, 40))
	}
}

func fixed(key) int { return 40 }

// The process ends before each operation on files: what was kept is there, and
// nothing that was not put.
func TestStoreCrashAtEveryOperation(t *testing.T) {
	boom := errors.New("boom")
	for stop := 1; ; stop++ {
		dir := filepath.Join(t.TempDir(), "store")
		n := 0
		s := openStore(t, StoreConfig{Dir: dir, MaxFrames: 128, Hook: func(string, string) error {
			if n++; n >= stop {
				return boom
			}
			return nil
		}})
		kept, settled := map[key]bool{}, map[key]bool{}
		seq := uint64(1)
		var err error
		for round := 0; round < 6 && err == nil; round++ {
			fill(s, 1, seq, 5)
			seq += 5
			if err = s.flush(); err == nil {
				all, _ := s.alive()
				for _, k := range all {
					kept[k] = true
				}
			}
			if round%2 == 1 {
				for range 7 {
					f, ok := s.next(key{})
					if !ok {
						t.Fatal("nothing to send")
					}
					s.answered(f, true)
					settled[f.key] = true
				}
			}
		}
		if err != nil && !errors.Is(err, boom) {
			t.Fatalf("stopped at %d: got %v, want the hook's error", stop, err)
		}
		done := err == nil
		s = openStore(t, StoreConfig{Dir: dir})
		got := drain(t, s, fixed)
		if !slices.IsSortedFunc(got, key.compare) || len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Fatalf("stopped at %d: got %v, want each once, in order", stop, got)
		}
		for k := range kept {
			if !settled[k] && !slices.Contains(got, k) {
				t.Fatalf("stopped at %d: frame %s was kept and is gone", stop, k)
			}
		}
		for _, k := range got {
			if k.epoch != 1 || k.seq >= seq {
				t.Fatalf("stopped at %d: got frame %s, which was never put", stop, k)
			}
		}
		if st := s.Stats(); st.Damaged != 0 {
			t.Fatalf("stopped at %d: got %+v, want no damage", stop, st)
		}
		if done {
			return
		}
	}
}

// A file is cut at every byte: what is whole is there, and it is no damage. Every
// byte is changed: that is damage, and at most one frame is lost by it.
func TestStoreTornAndDamaged(t *testing.T) {
	src := t.TempDir()
	s := openStore(t, StoreConfig{Dir: src})
	fill(s, 7, 1, 12) // 8 without events
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	name := (&chunk{id: 2, class: plain}).name() // events are written first
	whole, err := os.ReadFile(filepath.Join(src, name))
	if err != nil {
		t.Fatal(err)
	}
	frame := segment.Overhead + keySize + 40
	if want := segment.HeaderSize + 8*frame; len(whole) != want {
		t.Fatalf("%s has %d bytes, want %d", name, len(whole), want)
	}
	try := func(what string, b []byte) (frames int, st StoreStats) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "store")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
		s := openStore(t, StoreConfig{Dir: dir})
		got := drain(t, s, fixed)
		if !slices.IsSortedFunc(got, key.compare) {
			t.Fatalf("%s: got %v, want them in order", what, got)
		}
		if len(b)%8 > 0 && len(b) < len(whole) {
			return len(got), s.Stats()
		}
		fill(s, 8, 1, 3)
		if err := s.Close(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got := drain(t, openStore(t, StoreConfig{Dir: dir}), fixed); len(got) != 3 || got[0] != (key{8, 1}) {
			t.Fatalf("%s: afterwards got %v, want the three of boot 8", what, got)
		}
		return len(got), s.Stats()
	}
	step := 1
	if testing.Short() {
		step = 41
	}
	for cut := 0; cut < len(whole); cut += step {
		n, st := try(fmt.Sprintf("cut at %d", cut), whole[:cut])
		want, torn := max(cut-segment.HeaderSize, 0)/frame, uint64(1)
		if cut >= segment.HeaderSize && (cut-segment.HeaderSize)%frame == 0 {
			torn = 0 // as after a write that was never begun
		}
		if n != want || st.Torn != torn || st.Damaged != 0 {
			t.Fatalf("cut at %d: got %d frames and %+v, want %d, torn %d", cut, n, st, want, torn)
		}
	}
	for i := 0; i < len(whole); i += step {
		b := bytes.Clone(whole)
		b[i] ^= 0x41
		n, st := try(fmt.Sprintf("byte %d changed", i), b)
		want := 7
		if i < segment.HeaderSize {
			want = 8
		}
		if n != want || st.Torn != 0 || st.Damaged != 1 {
			t.Fatalf("byte %d changed: got %d frames and %+v, want %d, damaged 1", i, n, st, want)
		}
	}
	if n, st := try("zeros", append(bytes.Clone(whole[:len(whole)-frame]), make([]byte, frame)...)); n != 7 || st.Torn != 1 || st.Damaged != 0 {
		t.Errorf("zeros at the end: got %d frames and %+v, want 7 and torn", n, st)
	}
	if n, st := try("not a segment", bytes.Repeat([]byte("stop "), 200)); n != 0 || st.Damaged != 1 {
		t.Errorf("not a segment: got %d frames and %+v, want damage", n, st)
	}
}

// Damage that comes while the store is open costs the frame that it is in.
func TestStoreReadsDamage(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, StoreConfig{Dir: dir})
	fill(s, 1, 1, 6)
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, (&chunk{id: 1, class: event}).name())
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-5] ^= 1 // in frame 6
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := drain(t, s, fixed); len(got) != 5 {
		t.Errorf("sent %v, want all but frame 6", got)
	}
	if st := s.Stats(); st.Damaged != 1 || st.Dropped != 1 || st.DroppedEvents != 1 || st.Waiting != 0 {
		t.Errorf("got %+v, want one damaged and dropped", st)
	}
}

// While the disk takes nothing frames wait in memory, bounded, and are sent from
// there; when it does again they are written.
func TestStoreWithoutDisk(t *testing.T) {
	dir := t.TempDir()
	var away error
	s := openStore(t, StoreConfig{Dir: dir, Hook: func(op, _ string) error {
		if op == "sync" {
			return away
		}
		return nil
	}})
	away = fs.ErrPermission
	fill(s, 1, 1, 9)
	for i := range 3 {
		if err := s.flush(); !errors.Is(err, fs.ErrPermission) {
			t.Fatalf("flush: got %v, want the disk's error", err)
		}
		if st := s.Stats(); st.Waiting != 9 || st.Kept != 0 || st.Errors != uint64(i+1) {
			t.Fatalf("got %+v, want nine waiting, none kept, %d errors", st, i+1)
		}
	}
	f, ok := s.next(key{})
	if !ok || f.key.seq != 1 {
		t.Fatalf("got %v, %v, want frame 1", f.key, ok)
	}
	s.answered(f, true)
	fill(s, 1, 10, memoryFrames+100)
	if st := s.Stats(); st.Waiting != memoryFrames || st.Dropped != 108 || st.DroppedEvents != 0 {
		t.Errorf("got %+v, want %d waiting and the rest dropped, none with events", st, memoryFrames)
	}
	away = nil
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.Kept != memoryFrames {
		t.Errorf("got %+v, want %d kept", st, memoryFrames)
	}
	again := openStore(t, StoreConfig{Dir: dir})
	if got := drain(t, again, fixed); len(got) != memoryFrames {
		t.Errorf("got %d frames after a restart, want %d", len(got), memoryFrames)
	}
}

// Lower bounds than before hold at once.
func TestStoreShrinks(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, StoreConfig{Dir: dir, MaxFrames: 640})
	fill(s, 1, 1, 600)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, StoreConfig{Dir: dir, MaxFrames: 300, MaxBytes: 20_000})
	n, err := sizes(dir)
	if st := s.Stats(); err != nil || n > 20_000 || st.Bytes != n || st.Waiting > 300 || st.Waiting+int(st.Dropped) != 600 || st.DroppedEvents != 0 || st.Events != 200 {
		t.Errorf("got %+v and %d bytes, %v; want at most 300 frames and 20000 bytes, the 200 with events among them", st, n, err)
	}
}

func TestStoreConfigErrors(t *testing.T) {
	_, err := OpenStore(StoreConfig{MaxFrames: -1, MaxBytes: -1, Flush: -1})
	for _, want := range []string{"max_frames: -1 is negative", "max_bytes: -1 is negative", "flush: -1ns is negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(StoreConfig{Dir: file}); err == nil {
		t.Error("a file as a folder: got no error")
	}
	s := openStore(t, StoreConfig{MaxBytes: 100})
	s.put(key{1, 1}, event, make([]byte, 100))
	if st := s.Stats(); st.Waiting != 0 || st.DroppedEvents != 1 {
		t.Errorf("a frame larger than the store: got %+v, want it dropped", st)
	}
}

// The highest command is there after a restart, and after one of its two places
// was torn at least the one before.
func TestStoreRemembersCommands(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "command")
	for want := range uint64(5) {
		s := openStore(t, StoreConfig{Dir: dir})
		if got := s.LastCommand(); got != want<<40 {
			t.Fatalf("got %d, want %d", got, want<<40)
		}
		for _, seq := range []uint64{(want+1)<<40 - 1, (want + 1) << 40, 3} { // never falls
			if err := s.command.obeyed(seq); err != nil {
				t.Fatal(err)
			}
		}
		// Not closed: as after kill -9.
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		if testing.Short() && i%20 != 3 {
			continue
		}
		b := bytes.Clone(whole)
		b[i] ^= 2
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		s := openStore(t, StoreConfig{Dir: dir})
		if got := s.LastCommand(); got != 5<<40 && got != 5<<40-1 {
			t.Fatalf("byte %d changed: got %d, want %d or one less", i, got, uint64(5)<<40)
		}
		if err := s.command.obeyed(6 << 40); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if got := openStore(t, StoreConfig{Dir: dir}).LastCommand(); got != 6<<40 {
			t.Fatalf("byte %d changed: then got %d, want %d", i, got, uint64(6)<<40)
		}
	}
}
