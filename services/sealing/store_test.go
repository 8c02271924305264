package sealing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/torchwood"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// blocks returns a chain's blocks as decided hands them out.
func blocks(t testing.TB, c *ledgertest.Chain) []*decided.Block {
	t.Helper()
	ch := decided.NewChain(c.GenesisHash, c.Validators, nil)
	var out []*decided.Block
	for _, b := range c.Blocks {
		d, err := ch.Take(wire.BlockToProto(&b.Block, b.Batches, b.Verdicts), false)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}

// wide decides blocks of many records, so that tiles fill.
func wide(d *ledgertest.District, n, records int) *ledgertest.Chain {
	c := d.NewChain()
	for i := range n {
		var rs []ledgertest.Record
		for k := range records {
			rs = append(rs, d.Frame(uint64(i*records+k+1), ledgertest.Start))
		}
		c.Decide(rs)
	}
	return c
}

func options(d *ledgertest.District, dir string) StoreOptions {
	return StoreOptions{Dir: dir, GenesisJSON: d.GenesisJSON, Policy: d.Policy, SegmentBytes: 100 << 10}
}

func openStore(t testing.TB, o StoreOptions) *Store {
	t.Helper()
	s, err := OpenStore(o)
	if err != nil {
		t.Fatalf("opening the store: %v", err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// sealNow does what the service does for one checkpoint, with cosignatures of
// the chain's validators.
func sealNow(s *Store, c *ledgertest.Chain) error {
	p, ok := s.Snapshot()
	if !ok {
		return nil
	}
	if err := s.WriteTiles(p); err != nil {
		return err
	}
	return s.Seal(p, c.Seal(c.Blocks[p.Header.Height-1]))
}

// fill appends and seals all blocks after those that the store has, sealing each
// second block.
func fill(s *Store, c *ledgertest.Chain, bs []*decided.Block) error {
	for s.State().Height < ledger.Height(len(bs)) {
		h := s.State().Height
		if err := s.Append(bs[h]); err != nil {
			return err
		}
		if (h+1)%2 == 0 || int(h+1) == len(bs) {
			if err := sealNow(s, c); err != nil {
				return err
			}
		}
	}
	return sealNow(s, c)
}

// tree reads all files of a folder.
func tree(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		out[filepath.ToSlash(rel)], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// final leaves out what depends on when checkpoints were made: partial tiles of
// sizes before the last.
func final(files map[string][]byte, size uint64) map[string]string {
	out := map[string]string{}
	for name, b := range files {
		if strings.Contains(name, ".p/") {
			id, err := ledger.ParseTilePath(strings.TrimPrefix(name, "log/"))
			// Partial forms of what is full must be gone.
			keep := err != nil || size>>(ledger.TileHeight*(max(id.Level, 0)+1)) > id.N
			for _, id := range ledger.PartialTiles(size) {
				keep = keep || "log/"+id.Path() == name
			}
			if !keep {
				continue
			}
		}
		out[name] = string(b)
	}
	return out
}

func checkSame(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	for name, b := range want {
		if g, ok := got[name]; !ok || g != b {
			t.Fatalf("%s: %s: got %d bytes (there: %v), want %d, the same as without a crash", what, name, len(g), ok, len(b))
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Fatalf("%s: %s is left over", what, name)
		}
	}
}

// TestReadByOthers reads the log with clients that we did not write: torchwood
// over a folder and over HTTP, and proofs with transparency-dev/merkle.
func TestReadByOthers(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	c := wide(d, 9, 80)
	dir := t.TempDir()
	s := openStore(t, options(d, dir))
	if err := fill(s, c, blocks(t, c)); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(Handler(dir, nil))
	defer srv.Close()
	fetcher, err := torchwood.NewTileFetcher(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	folder, err := torchwood.NewTileFS(os.DirFS(filepath.Join(dir, "log")))
	if err != nil {
		t.Fatal(err)
	}
	policy, err := torchwood.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatalf("policy: torchwood: %v", err)
	}
	for name, r := range map[string]torchwood.TileReader{"http": fetcher, "folder": folder} {
		ctx := context.Background()
		signed, err := r.ReadEndpoint(ctx, "checkpoint")
		if err != nil {
			t.Fatalf("%s: checkpoint: %v", name, err)
		}
		cp, _, err := torchwood.VerifyCheckpoint(signed, policy)
		if err != nil {
			t.Fatalf("%s: checkpoint: %v", name, err)
		}
		last := c.Blocks[8].Header
		if uint64(cp.N) != last.Size || ledger.Hash(cp.Hash) != last.Root || cp.N != 9*81 {
			t.Fatalf("%s: got a log of %d, want %d", name, cp.N, last.Size)
		}
		client, err := torchwood.NewClient(r)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for i, e := range client.AllEntries(ctx, cp.Tree, 0) {
			l, err := ledger.ParseLeaf(e)
			if err != nil || int(i) != n || (l.Class == ledger.ClassHeader) != (n%81 == 0) {
				t.Fatalf("%s: entry %d: got %v, %v", name, i, l, err)
			}
			n++
		}
		if err := client.Err(); err != nil || n != 9*81 {
			t.Fatalf("%s: got %d entries, %v, want %d", name, n, err, 9*81)
		}
		hr := torchwood.TileHashReaderWithContext(ctx, cp.Tree, r)
		if _, err := tlog.ProveRecord(cp.N, 400, hr); err != nil {
			t.Fatalf("%s: sumdb/tlog proof: %v", name, err)
		}
	}
	// Our proofs, checked by others.
	size, root := uint64(9*81), c.Blocks[8].Header.Root
	signed, err := os.ReadFile(filepath.Join(dir, "log", "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []uint64{0, 1, 255, 256, 511, 512, 700, 728} {
		p, err := ledger.Prove(s, size, i)
		if err != nil {
			t.Fatal(err)
		}
		l, err := ledger.ReadLeaf(s, size, i)
		if err != nil {
			t.Fatal(err)
		}
		e := l.Marshal()
		hashes := make([][]byte, len(p))
		for k := range p {
			hashes[k] = p[k][:]
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, size, rfc6962.DefaultHasher.HashLeaf(e[:]), hashes, root[:]); err != nil {
			t.Errorf("leaf %d: transparency-dev/merkle: %v", i, err)
		}
		if err := torchwood.VerifyProof(policy, tlog.RecordHash(e[:]), ledger.FormatProof(i, p, signed)); err != nil {
			t.Errorf("leaf %d: tlog-proof: torchwood: %v", i, err)
		}
		hashes[0][0] ^= 1
		if proof.VerifyInclusion(rfc6962.DefaultHasher, i, size, rfc6962.DefaultHasher.HashLeaf(e[:]), hashes, root[:]) == nil {
			t.Errorf("leaf %d: a wrong proof passes", i)
		}
	}
	// Consistency between every two sealed checkpoints.
	tr := ledger.NewHashReader(s, size)
	for i := range c.Blocks {
		for k := i + 1; k < len(c.Blocks); k++ {
			a, b := c.Blocks[i].Header, c.Blocks[k].Header
			p, err := tlog.ProveTree(int64(b.Size), int64(a.Size), tr)
			if err != nil {
				t.Fatal(err)
			}
			hashes := make([][]byte, len(p))
			for x := range p {
				hashes[x] = p[x][:]
			}
			if err := proof.VerifyConsistency(rfc6962.DefaultHasher, a.Size, b.Size, hashes, a.Root[:], b.Root[:]); err != nil {
				t.Errorf("from %d to %d: %v", a.Size, b.Size, err)
			}
		}
	}
}

// TestPartialTiles: partial tiles stay until the full one is sealed.
func TestPartialTiles(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	c := wide(d, 4, 80)
	dir := t.TempDir()
	s := openStore(t, options(d, dir))
	bs := blocks(t, c)
	has := func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, "log", name))
		return err == nil
	}
	check := func(want bool, names ...string) {
		t.Helper()
		for _, n := range names {
			if has(n) != want {
				t.Errorf("at %d entries: %s: got there %v, want %v", s.State().SealedSize, n, has(n), want)
			}
		}
	}
	for i, b := range bs[:3] {
		if err := s.Append(b); err != nil {
			t.Fatal(err)
		}
		if err := sealNow(s, c); err != nil {
			t.Fatal(err)
		}
		w := 81 * (i + 1)
		check(true, fmt.Sprintf("tile/0/000.p/%d", w), fmt.Sprintf("tile/entries/000.p/%d", w))
	}
	// Clients of older checkpoints still find their tiles.
	check(true, "tile/0/000.p/81", "tile/0/000.p/162")
	check(false, "tile/0/000", "tile/1/000.p/1")
	if err := s.Append(bs[3]); err != nil {
		t.Fatal(err)
	}
	if err := sealNow(s, c); err != nil {
		t.Fatal(err)
	}
	check(true, "tile/0/000", "tile/entries/000", "tile/0/001.p/68", "tile/entries/001.p/68", "tile/1/000.p/1")
	check(false, "tile/0/000.p/243", "tile/entries/000.p/243", "tile/0/000.p")
}

// TestCrashAtEveryOperation stops the store before each operation on files,
// opens it again and goes on: the log is the same as without a crash, and at no
// time covers a checkpoint what is not there.
func TestCrashAtEveryOperation(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	c := wide(d, 5, 70) // 355 entries: a tile fills on the way
	bs := blocks(t, c)
	want := func() map[string]string {
		dir := t.TempDir()
		s := openStore(t, options(d, dir))
		if err := fill(s, c, bs); err != nil {
			t.Fatal(err)
		}
		return final(tree(t, dir), s.State().SealedSize)
	}()
	boom := errors.New("boom")
	step := 3
	if testing.Short() || raceOn {
		step = 29
	}
	for stop := 1; ; stop += step {
		dir := t.TempDir()
		o := options(d, dir)
		var mu sync.Mutex
		n := 0
		o.Hook = func(string, string) error {
			mu.Lock()
			defer mu.Unlock()
			if n++; n >= stop {
				return boom
			}
			return nil
		}
		s, err := OpenStore(o)
		if err == nil {
			err = fill(s, c, bs)
			_ = s.Close()
		}
		if err == nil {
			break
		}
		if !errors.Is(err, boom) {
			t.Fatalf("stopped at %d: got %v, want the hook's error", stop, err)
		}
		checkCovered(t, d, dir)
		o.Hook = nil
		s, err = OpenStore(o)
		if err != nil {
			t.Fatalf("stopped at %d: opening again: %v", stop, err)
		}
		checkCovered(t, d, dir)
		if err := fill(s, c, bs); err != nil {
			t.Fatalf("stopped at %d: going on: %v", stop, err)
		}
		_ = s.Close()
		got := final(tree(t, dir), c.Blocks[4].Header.Size)
		// The history may hold one checkpoint more or less; all else is the same.
		for name := range want {
			if strings.HasPrefix(name, "log/checkpoints/") {
				got[name] = want[name]
			}
		}
		checkSame(t, fmt.Sprintf("stopped at %d", stop), got, want)
	}
}

// checkCovered verifies that the checkpoint on disk, if there is one, is sealed
// and that all its entries and payloads can be read.
func checkCovered(t *testing.T, d *ledgertest.District, dir string) {
	t.Helper()
	if !checkSealed(t, d, dir) {
		return
	}
	p, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if rep, err := ledger.Fsck(t.Context(), os.DirFS(dir), ledger.FsckOptions{Policy: p}); err != nil || !rep.OK {
		t.Fatalf("fsck: %v\n%s", err, rep.Text())
	}
}

// checkSealed is checkCovered without fsck, for a folder that was not opened again:
// what a cut has left at the ends of journals is for the next start to put right.
func checkSealed(t *testing.T, d *ledgertest.District, dir string) (sealed bool) {
	t.Helper()
	signed, err := os.ReadFile(filepath.Join(dir, "log", "checkpoint"))
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	cp, err := p.Open(signed)
	if err != nil {
		t.Fatal(err)
	}
	r := ledger.TileReaderFunc(func(id ledger.TileID) ([]byte, error) {
		return os.ReadFile(filepath.Join(dir, "log", id.Path()))
	})
	for i := uint64(0); i < cp.Size; i += 5 {
		l, err := ledger.ReadLeaf(r, cp.Size, i)
		if err != nil {
			t.Fatalf("sealed at %d: leaf %d: %v", cp.Size, i, err)
		}
		if i%35 == 0 {
			pr, err := ledger.Prove(r, cp.Size, i)
			if err == nil {
				err = ledger.CheckInclusion(cp.Checkpoint, i, l, pr)
			}
			if err != nil {
				t.Fatalf("sealed at %d: leaf %d: %v", cp.Size, i, err)
			}
		}
	}
	return true
}

// TestStoreRefuses: what must not get into the log, or be taken for it.
func TestStoreRefuses(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	other := ledgertest.New("other", 4)
	c := wide(d, 3, 3)
	bs := blocks(t, c)
	dir := t.TempDir()
	s := openStore(t, options(d, dir))
	if err := s.Append(bs[1]); err == nil {
		t.Error("a block out of order: got no error")
	}
	if err := s.Append(bs[:2]...); err != nil {
		t.Fatal(err)
	}
	p, _ := s.Snapshot()
	if err := s.WriteTiles(p); err != nil {
		t.Fatal(err)
	}
	weak := *c
	weak.Voters = []int{0, 1}
	for name, note := range map[string][]byte{
		"of two validators": weak.Seal(c.Blocks[1]),
		"of another block":  c.Seal(c.Blocks[0]),
		"of another log":    other.NewChain().Fill(2).Seal(c.Blocks[1]),
		"of nobody":         []byte("junk"),
	} {
		if err := s.Seal(p, note); err == nil {
			t.Errorf("checkpoint %s: got no error", name)
		}
	}
	if s.State().SealedSize != 0 {
		t.Errorf("got a sealed size of %d, want 0", s.State().SealedSize)
	}
	if err := s.Seal(p, c.Seal(c.Blocks[1])); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	o := options(other, dir)
	if _, err := OpenStore(o); err == nil || !strings.Contains(err.Error(), "another district") {
		t.Errorf("folder of another district: got %v, want an error that says so", err)
	}
	// A tile at the right edge that was changed is found before anything is added.
	for _, name := range []string{"log/tile/0/000.p/8", "log/tile/entries/000.p/8"} {
		path := filepath.Join(dir, name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(b)
		bad[40] ^= 1
		if err := os.WriteFile(path, bad, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenStore(options(d, dir)); err == nil {
			t.Errorf("%s changed: got no error", name)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	openStore(t, options(d, dir))
}

// TestHandler: caching, origins, and that nothing but the log is served.
func TestHandler(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	c := wide(d, 4, 80)
	dir := t.TempDir()
	s := openStore(t, options(d, dir))
	if err := fill(s, c, blocks(t, c)); err != nil {
		t.Fatal(err)
	}
	h := Handler(dir, nil)
	for _, tc := range []struct {
		method, path string
		status       int
		cache        string
	}{
		{"GET", "/checkpoint", 200, "no-cache"},
		{"GET", "/tile/0/000", 200, "public, max-age=31536000, immutable"},
		{"HEAD", "/tile/0/001.p/68", 200, "public, max-age=31536000, immutable"},
		{"GET", "/tile/entries/000", 200, "public, max-age=31536000, immutable"},
		{"GET", "/tile/0/002", 404, "no-store"},
		{"GET", "/tile/0/1", 404, "no-store"},
		{"GET", "/tile/9/000", 404, "no-store"},
		{"GET", "/tile/0/000.p/256", 404, "no-store"},
		{"GET", "/tile/0/000.p/0", 404, "no-store"},
		{"GET", "/tile/../policy", 404, "no-store"},
		{"GET", "/blocks/00000000000000000000.seg", 404, "no-store"},
		{"GET", "/../payload/record/00000000000000000000.seg", 404, "no-store"},
		{"GET", "/", 404, "no-store"},
		{"POST", "/checkpoint", 405, "no-store"},
		{"OPTIONS", "/checkpoint", 204, ""},
	} {
		r := httptest.NewRequest(tc.method, "/", nil)
		r.URL.Path = tc.path
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tc.status || w.Header().Get("Cache-Control") != tc.cache || w.Header().Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s %s: got %d, cache %q, want %d, %q", tc.method, tc.path, w.Code, w.Header().Get("Cache-Control"), tc.status, tc.cache)
		}
	}
}

// TestCosignatureInterop: torchwood takes our cosignatures and we take theirs.
func TestCosignatureInterop(t *testing.T) {
	d := ledgertest.New("sealing", 4)
	cp := ledger.Checkpoint{Origin: d.Origin, Size: 7}
	name := ledger.CosignerName(d.Origin, 1)
	theirs, err := torchwood.NewCosignatureSigner(name, d.Cosign[0])
	if err != nil {
		t.Fatal(err)
	}
	ours, err := ledger.ParseCosigner(theirs.Verifier().String())
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: cp.Body()}, theirs)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.TrimPrefix(string(signed), cp.Body()+"\n")
	if _, err := ours.CheckCosignature(cp.Body(), line); err != nil {
		t.Errorf("their cosignature: %v", err)
	}
	if _, err := note.Open([]byte(cp.Body()+"\n"+d.Cosignature(0, cp.Body(), ledgertest.Start)), note.VerifierList(theirs.Verifier())); err != nil {
		t.Errorf("our cosignature: %v", err)
	}
	if ours.String() != theirs.Verifier().String() {
		t.Errorf("key: got %s, want %s", ours, theirs.Verifier())
	}
}
