package agreed

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

var errDone = errors.New("done")

// world is a district with its stream of decisions.
type world struct {
	t *testing.T
	*ledgertest.Chain
	bus *bus.Bus
}

func newWorld(t *testing.T) *world {
	d := ledgertest.New("agreed", 4)
	return &world{t, d.NewChain(), servicetest.District(t, d.ID)}
}

// publish makes the chain's newest blocks, from index from on, known.
func (w *world) publish(from int) {
	w.t.Helper()
	for _, b := range w.Blocks[from:] {
		raw := wire.EncodeBlock(wire.BlockToProto(&b.Block, b.Batches, b.Verdicts))
		if err := w.bus.Publish(w.t.Context(), topic.Decision(w.ID, 1), "", raw); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) config() decided.Config {
	return decided.Config{Bus: w.bus, District: w.ID, GenesisHash: w.GenesisHash, Validators: w.Validators,
		GapWait: 10 * time.Millisecond, Logger: servicetest.Logger(w.t)}
}

func (w *world) open(path string) *State {
	w.t.Helper()
	s, err := Open(path, &w.Genesis)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// seen is what a handler was given.
type seen struct {
	height ledger.Height
	hash   ledger.Hash
}

// run follows until the block at height to has been dealt with, and returns what
// the handler was given.
func (w *world) run(s *State, to ledger.Height) []seen {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	var out []seen
	err := s.Run(ctx, w.config(), func(_ context.Context, b *decided.Block, reg *identity.Registry) error {
		if b.Header.Height > to {
			return errDone // had arrived already; it is for the next run
		}
		out = append(out, seen{b.Header.Height, ledger.Hash(reg.Hash())})
		if b.Header.Height == to {
			cancel() // the block in hand is still finished
		}
		return nil
	})
	if err != nil && !errors.Is(err, errDone) {
		w.t.Fatalf("run: %v", err)
	}
	if n := len(out); n == 0 || out[n-1].height != to {
		w.t.Fatalf("got blocks %v, want the last to be %d", out, to)
	}
	return out
}

// file makes a registry record of exact bytes; ledgertest's own would be
// compacted and escaped by encoding/json.
func (w *world) file(nonce uint64, id, body string) ledgertest.Record {
	w.t.Helper()
	name, err := json.Marshal(id)
	if err != nil {
		w.t.Fatal(err)
	}
	return ledgertest.NewRecord(w.Registrar, identity.KindRegistry, identity.JSON,
		fmt.Appendf(nil, `{"district":%q,"action":"put","type":"software","id":%s,"nonce":%d,"body":%s}`, w.ID, name, nonce, body))
}

func (w *world) frame(seq uint64) ledgertest.Record {
	return w.Frame(seq, ledgertest.Start.Add(time.Duration(seq)*time.Second))
}

func has(reg *identity.Registry, id string) bool {
	_, ok := reg.Entry(identity.TypeSoftware, id)
	return ok
}

// TestFollows: a change takes effect for the block after the one that holds it,
// several in one block apply in their order, refused ones not at all.
func TestFollows(t *testing.T) {
	w := newWorld(t)
	refused := w.file(9, "never", `{}`)
	refused.Refused = true
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{w.frame(2), w.file(1, "one", `{"v":1}`), refused}, []ledgertest.Record{w.file(2, "two", `{}`)})
	w.Decide([]ledgertest.Record{w.Change(identity.Change{Action: "revoke", Type: identity.TypeDevice, ID: ledgertest.Device, Nonce: 3})})
	w.Decide()
	w.publish(0)
	s := w.open("")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := s.Run(ctx, w.config(), func(_ context.Context, b *decided.Block, reg *identity.Registry) error {
		h := b.Header.Height
		if got, want := reg.Hash(), w.Judged[h-1].Hash(); got != want {
			t.Errorf("block %d: got registry %x, want the one it was judged by, %x", h, got[:4], want[:4])
		}
		for _, id := range []string{"one", "two"} {
			if got, want := has(reg, id), h >= 3; got != want {
				t.Errorf("block %d: %s in the registry: got %v, want %v", h, id, got, want)
			}
		}
		if s.Registry() != reg {
			t.Errorf("block %d: the registry changed while the block was handled", h)
		}
		holder, _ := reg.Holder(identity.IDOf(w.DeviceKey.Public().(ed25519.PublicKey)))
		if got, want := holder.Status == identity.Active, h <= 3; got != want {
			t.Errorf("block %d: device active: got %v, want %v", h, got, want)
		}
		if h == 4 {
			return errDone
		}
		return nil
	})
	if !errors.Is(err, errDone) {
		t.Fatalf("got %v, want the handler's error", err)
	}
	if has(s.Registry(), "never") {
		t.Error("a refused record was carried out")
	}
	if got, want := s.Registry().Version(), w.Registry.Version(); got != want {
		t.Errorf("got version %d, want %d", got, want)
	}
}

// TestResume: what was dealt with is not handed out again, and the registry
// comes back with the same hash, whatever the bodies look like.
func TestResume(t *testing.T) {
	w := newWorld(t)
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{
		w.file(1, "<script>&amp; \u2028 ü", "{ \"note\" :\n\t\"<b>a & b</b> \u2028\u2029 \\u003c \\/ \", \"n\": 1.0e2 }"),
		w.file(2, "plain", ` [ 1 , 2 ] `),
	})
	w.Decide([]ledgertest.Record{w.frame(2)})
	w.publish(0)
	path := filepath.Join(t.TempDir(), "place")
	s := w.open(path)
	w.run(s, 3)
	want := s.Registry().Hash()
	if want != w.Registry.Hash() {
		t.Fatalf("got registry %x, want the chain's %x", want, w.Registry.Hash())
	}

	s = w.open(path)
	if got := s.Registry().Hash(); got != want {
		t.Errorf("after a restart: got registry %x, want %x", got, want)
	}
	if got, want := s.Registry().Snapshot(), w.Registry.Snapshot(); !bytes.Equal(got, want) {
		t.Errorf("after a restart: got snapshot\n%s\nwant\n%s", got, want)
	}
	if s.point == nil || s.point.Header.Height != 3 {
		t.Fatalf("after a restart: got point %+v, want block 3", s.point)
	}
	w.Decide([]ledgertest.Record{w.file(3, "later", `{}`)})
	w.Decide()
	w.publish(3)
	if got := w.run(s, 5); len(got) != 2 || got[0].height != 4 {
		t.Errorf("after a restart: got blocks %v, want 4 and 5", got)
	}
	// The nonces came back too: the chain's registry refuses one that was used, and
	// so must this one.
	if err := s.Registry().Clone().Apply(9, identity.IDOf(w.Registrar.Public().(ed25519.PublicKey)),
		identity.Change{District: w.ID, Action: "put", Type: identity.TypeSoftware, ID: "x", Body: []byte("{}"), Nonce: 1}); err == nil {
		t.Error("a nonce of before the restart is taken again")
	}
}

// TestRegistryFile: the registry is written when it has changed, and the file of
// the one before goes only when nothing names it any more.
func TestRegistryFile(t *testing.T) {
	w := newWorld(t)
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{w.frame(2)})
	w.Decide([]ledgertest.Record{w.file(1, "one", `{}`)})
	w.publish(0)
	dir := t.TempDir()
	for _, name := range []string{"place", "place-none", "place2-0123456789abcdef"} { // somebody else's
		if name != "place" {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	ours := func() (names []string) {
		t.Helper()
		all, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if n := filepath.Base(f); n != "place" {
				names = append(names, n)
			}
		}
		return names
	}
	path := filepath.Join(dir, "place")
	w.run(w.open(path), 1)
	first := ours()
	if len(first) != 3 {
		t.Fatalf("got files %q, want a registry besides two of somebody else", first)
	}
	was, err := os.Stat(filepath.Join(dir, first[0]))
	if err != nil {
		t.Fatal(err)
	}
	w.run(w.open(path), 2)
	if got := ours(); !slices.Equal(got, first) {
		t.Errorf("after a block without changes: got files %q, want %q", got, first)
	}
	if is, err := os.Stat(filepath.Join(dir, first[0])); err != nil || !os.SameFile(was, is) {
		t.Errorf("a registry that has not changed was written again (%v)", err)
	}
	w.run(w.open(path), 3)
	if got := ours(); len(got) != 3 || got[0] == first[0] {
		t.Errorf("after a change: got files %q, want another registry than %q, and only that", got, first[0])
	}
	if !has(w.open(path).Registry(), "one") {
		t.Error("after a change and a restart: the change is missing")
	}
}

// TestRunAgain: one State may be run again, and goes on behind what is done.
func TestRunAgain(t *testing.T) {
	w := newWorld(t)
	w.Fill(4)
	w.publish(0)
	s := w.open("")
	w.run(s, 2)
	if got := w.run(s, 4); len(got) != 2 || got[0].height != 3 {
		t.Errorf("got blocks %v, want 3 and 4", got)
	}
}

// TestHandlerError: the block comes again, and its changes are not in force.
func TestHandlerError(t *testing.T) {
	w := newWorld(t)
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{w.file(1, "one", `{}`)})
	w.Decide()
	w.publish(0)
	path := filepath.Join(t.TempDir(), "place")
	s := w.open(path)
	err := s.Run(t.Context(), w.config(), func(_ context.Context, b *decided.Block, _ *identity.Registry) error {
		if b.Header.Height == 2 {
			return errDone
		}
		return nil
	})
	if !errors.Is(err, errDone) {
		t.Fatalf("got %v, want the handler's error", err)
	}
	if has(s.Registry(), "one") {
		t.Error("a block that was not dealt with has changed the registry")
	}
	for name, s := range map[string]*State{"same state": s, "from the file": w.open(path)} {
		if got := w.run(s, 3); len(got) != 2 || got[0].height != 2 {
			t.Errorf("%s: got blocks %v, want 2 and 3", name, got)
		}
		if !has(s.Registry(), "one") {
			t.Errorf("%s: block 2's change is missing", name)
		}
	}
}

// TestNothingStored: without a path there is no file, and the next start is from
// genesis.
func TestNothingStored(t *testing.T) {
	t.Chdir(t.TempDir())
	w := newWorld(t)
	w.Fill(2)
	w.publish(0)
	w.run(w.open(""), 2)
	if files, err := os.ReadDir("."); err != nil || len(files) != 0 {
		t.Errorf("got files %v, %v, want none", files, err)
	}
	if got := w.run(w.open(""), 2); len(got) != 2 {
		t.Errorf("got blocks %v, want 1 and 2 again", got)
	}
}

// TestCannotSave: a folder that is gone costs time at the next start, no more.
func TestCannotSave(t *testing.T) {
	w := newWorld(t)
	w.Fill(2)
	w.publish(0)
	dir := filepath.Join(t.TempDir(), "gone")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := w.open(filepath.Join(dir, "place"))
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	w.run(s, 2)
	if _, err := Open(dir+"\x00", &w.Genesis); err == nil {
		t.Error("a path that cannot be read: got no error")
	}
}

// TestBeforeSave: what somebody stores with the place is never behind it, and
// without it the place is not written.
func TestBeforeSave(t *testing.T) {
	w := newWorld(t)
	w.Fill(4)
	w.publish(0)
	path := filepath.Join(t.TempDir(), "place")
	s := w.open(path)
	if s.Path() != path {
		t.Errorf("got path %s, want %s", s.Path(), path)
	}
	var heights []ledger.Height
	s.BeforeSave(func(h ledger.Height) error {
		heights = append(heights, h)
		if at := w.open(path).height; at >= h {
			t.Errorf("got the place at %d before what goes with it at %d", at, h)
		}
		return nil
	})
	w.run(s, 2)
	if n := len(heights); n == 0 || heights[n-1] != 2 {
		t.Errorf("got calls at %v, want the last at 2", heights)
	}
	s = w.open(path)
	s.BeforeSave(func(ledger.Height) error { return errDone })
	w.run(s, 4)
	if at := w.open(path).height; at != 2 {
		t.Errorf("got the place at %d, want it left at 2", at)
	}
}

// TestDamagedFile: every damage is an error that names the file.
func TestDamagedFile(t *testing.T) {
	w := newWorld(t)
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{w.file(1, "one", `{}`)})
	w.publish(0)
	path := filepath.Join(t.TempDir(), "the place")
	w.run(w.open(path), 2)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*file)) []byte {
		var v file
		if err := json.Unmarshal(good, &v); err != nil {
			t.Fatal(err)
		}
		f(&v)
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// put stores a snapshot beside, as save does.
	put := func(snapshot []byte) []byte {
		sum := sha256.Sum256(snapshot)
		if err := os.WriteFile(fmt.Sprintf("%s-%x", path, sum[:8]), snapshot, 0o644); err != nil {
			t.Fatal(err)
		}
		return sum[:]
	}
	other := ledgertest.New("agreed", 4)
	other.Genesis.District = "elsewhere"
	elsewhere, err := identity.NewRegistry(&other.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		file       []byte
	}{
		{"empty", "JSON", nil},
		{"half", "JSON", good[:len(good)/2]},
		{"more", "after top-level value", append(bytes.Clone(good), good...)},
		{"null", "header", []byte("null")},
		{"other document", "header", []byte(`{"a":1}`)},
		{"no header", "header", change(func(f *file) { f.Header = nil })},
		{"header's height", "header", change(func(f *file) { f.Header = f.Header[:len(f.Header)-1] })},
		{"tree", "frontier", change(func(f *file) { f.Tree = f.Tree[:len(f.Tree)-1] })},
		{"tree of another place", "do not fit", change(func(f *file) {
			var tree ledger.Frontier
			tree.Append(w.Blocks[0].Leaves)
			f.Tree = tree.Marshal()
		})},
		{"no registry", "registry", change(func(f *file) { f.Registry = nil })},
		{"registry that is not there", "registry: open ", change(func(f *file) { f.Registry[0] ^= 1 })},
		{"registry that is another", "is not what was stored", change(func(f *file) { f.Registry[31] ^= 1 })},
		{"registry of nothing", "registry snapshot", change(func(f *file) { f.Registry = put([]byte("{}")) })},
		{"other district", `registry: of district "elsewhere"`, change(func(f *file) { f.Registry = put(elsewhere.Snapshot()) })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(path, tc.file, 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := Open(path, &w.Genesis)
			checkDamaged(t, err, path, tc.want)
		})
	}
	// A registry that reads well but is not the one that was agreed shows with the
	// next block, before anybody is given it.
	genesis, err := identity.NewRegistry(&w.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	w.Decide()
	w.publish(2)
	t.Run("registry of before", func(t *testing.T) {
		if err := os.WriteFile(path, change(func(f *file) { f.Registry = put(genesis.Snapshot()) }), 0o644); err != nil {
			t.Fatal(err)
		}
		err := w.open(path).Run(t.Context(), w.config(), func(context.Context, *decided.Block, *identity.Registry) error {
			t.Error("a block was handed out with a registry that is not the quorum's")
			return nil
		})
		checkDamaged(t, err, path, "block 3: the registry here has hash")
	})
	t.Run("of another chain", func(t *testing.T) {
		if err := os.WriteFile(path, good, 0o644); err != nil {
			t.Fatal(err)
		}
		c := w.config()
		c.GenesisHash[0] ^= 1
		err := w.open(path).Run(t.Context(), c, func(context.Context, *decided.Block, *identity.Registry) error { return nil })
		checkDamaged(t, err, path, "genesis")
	})
	t.Run("good", func(t *testing.T) {
		if err := os.WriteFile(path, good, 0o644); err != nil {
			t.Fatal(err)
		}
		w.run(w.open(path), 3)
	})
}

func checkDamaged(t *testing.T, err error, path, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want an error that names %s and %q", err, path, want)
	}
}

// TestOtherRegistry: a quorum's header with another registry ends the service
// with the height, also where nothing is stored.
func TestOtherRegistry(t *testing.T) {
	w := newWorld(t)
	w.Fill(1)
	b := w.Blocks[0]
	b.Header.Registry[0] ^= 1
	w.Vote(b)
	w.publish(0)
	err := w.open("").Run(t.Context(), w.config(), func(context.Context, *decided.Block, *identity.Registry) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "block 1: the registry here has hash") {
		t.Errorf("got %v, want an error that names block 1", err)
	}
}

// TestReaders read the registry while it is replaced; the race detector judges.
func TestReaders(t *testing.T) {
	w := newWorld(t)
	for i := range uint64(20) {
		w.Decide([]ledgertest.Record{w.file(i+1, fmt.Sprint("s", i), `{}`)})
	}
	w.Decide()
	w.publish(0)
	s := w.open("")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			var last uint64
			for {
				select {
				case <-stop:
					return
				default:
				}
				r := s.Registry()
				if v := r.Version(); v < last {
					t.Errorf("got version %d after %d", v, last)
					return
				} else if v > last {
					last = v
					r.Hash()
					r.Snapshot()
					if _, err := r.Prove(identity.TypeSoftware, fmt.Sprint("s", v-1)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	w.run(s, 21)
	close(stop)
	wg.Wait()
	if got := s.Registry().Version(); got != 20 {
		t.Errorf("got version %d, want 20", got)
	}
}

func TestOpenBadGenesis(t *testing.T) {
	if _, err := Open("", &identity.Genesis{}); err == nil || !strings.Contains(err.Error(), "district") {
		t.Errorf("got %v, want an error about the district", err)
	}
}
