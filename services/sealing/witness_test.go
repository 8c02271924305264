package sealing

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// fakeWitness answers add-checkpoint by the specification, made of torchwood's
// parts and none of ours, or misbehaves as a test says.
type fakeWitness struct {
	ledger.Witness
	signer *torchwood.CosignatureSigner
	logs   note.Verifiers

	mu       sync.Mutex
	size     int64
	hash     tlog.Hash
	requests int
	proofs   int // requests with a consistency proof that was right
	// odd answers in the place of the witness, if it is set.
	odd func(w http.ResponseWriter, body []byte) bool
}

func newFakeWitness(t *testing.T, d *ledgertest.District, i int) *fakeWitness {
	t.Helper()
	seed := sha256.Sum256(fmt.Appendf(nil, "witness %d", i))
	s, err := torchwood.NewCosignatureSigner(fmt.Sprintf("witness.example/w%d", i), ed25519.NewKeyFromSeed(seed[:]))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ledger.ParseCosigner(s.Verifier().String())
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeWitness{signer: s, logs: note.VerifierList(verifierOf(t, d))}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	f.Witness = ledger.Witness{Name: fmt.Sprintf("w%d", i), Cosigner: c, URL: srv.URL + "/prefix/"}
	return f
}

func (f *fakeWitness) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests++
	if f.odd != nil && f.odd(w, b) {
		return
	}
	head, signed, _ := strings.Cut(string(b), "\n\n")
	lines := strings.Split(head, "\n")
	old, err := strconv.ParseInt(strings.TrimPrefix(lines[0], "old "), 10, 64)
	if err != nil || r.Method != http.MethodPost || r.URL.Path != "/prefix/add-checkpoint" {
		http.Error(w, "bad", 400)
		return
	}
	n, err := note.Open([]byte(signed), f.logs)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	c, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	conflict := func() {
		w.Header().Set("Content-Type", "text/x.tlog.size")
		w.WriteHeader(409)
		_, _ = fmt.Fprintf(w, "%d\n", f.size)
	}
	switch {
	case old != f.size, c.N == f.size && c.Hash != f.hash:
		conflict()
		return
	case old > 0 && old < c.N:
		var p tlog.TreeProof
		for _, l := range lines[1:] {
			h, err := tlog.ParseHash(l)
			if err != nil {
				http.Error(w, err.Error(), 400)
				return
			}
			p = append(p, h)
		}
		if err := tlog.CheckTree(p, c.N, c.Hash, f.size, f.hash); err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		f.proofs++
	}
	f.size, f.hash = c.N, c.Hash
	out, err := note.Sign(&note.Note{Text: n.Text}, f.signer)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	// Beside a line of a key that nobody knows.
	_, _ = fmt.Fprintf(w, "— stranger AAAAAAAA\n%s", strings.SplitN(string(out), "\n\n", 2)[1])
}

// set changes the witness while it serves.
func (f *fakeWitness) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// TestAsk: what a witness may answer, and what comes of it.
func TestAsk(t *testing.T) {
	d := ledgertest.New("ask", 4)
	c := wide(d, 4, 100)
	s := openStore(t, options(d, t.TempDir()))
	if err := fill(s, c, blocks(t, c)); err != nil {
		t.Fatal(err)
	}
	signed, h, err := s.Last()
	if err != nil {
		t.Fatal(err)
	}
	cp := c.Blocks[h-1].Header.Checkpoint(c.Origin)
	at := func(block int) (int64, tlog.Hash) {
		x := c.Blocks[block].Header
		return int64(x.Size), tlog.Hash(x.Root)
	}
	answer := func(status int, contentType, body string) func(http.ResponseWriter, []byte) bool {
		return func(w http.ResponseWriter, _ []byte) bool {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
			return true
		}
	}
	const size = "text/x.tlog.size"
	for _, tc := range []struct {
		name     string
		setup    func(f *fakeWitness)
		known    uint64 // what we believe
		want     string // in the error; "": cosigned
		requests int
	}{
		{"new to it", func(*fakeWitness) {}, 0, "", 1},
		{"it knows more than we thought", func(f *fakeWitness) { f.size, f.hash = at(1) }, 0, "", 2},
		{"it knows less than we thought", func(f *fakeWitness) { f.size, f.hash = at(0) }, c.Blocks[2].Header.Size, "", 2},
		{"as we thought", func(f *fakeWitness) { f.size, f.hash = at(1) }, c.Blocks[1].Header.Size, "", 1},
		{"the same again", func(f *fakeWitness) { f.size, f.hash = at(3) }, c.Blocks[3].Header.Size, "", 1},
		{"it lost everything", func(*fakeWitness) {}, c.Blocks[1].Header.Size, "", 2},
		{"it has another history", func(f *fakeWitness) { f.size, f.hash = 7, tlog.Hash{1} }, 0, "422", 2},
		{"it has another root of this size", func(f *fakeWitness) { f.size, f.hash = int64(cp.Size), tlog.Hash{1} }, 0, "another root", 2},
		{"it is ahead", func(f *fakeWitness) { f.size, f.hash = int64(cp.Size)+1, tlog.Hash{1} }, 0, "this log has", 1},
		{"it does not know the log", func(f *fakeWitness) { f.odd = answer(404, "text/plain", "who?") }, 0, "404 Not Found", 1},
		{"it has another key of ours", func(f *fakeWitness) { f.logs = note.VerifierList() }, 0, "403", 1},
		{"it is busy", func(f *fakeWitness) { f.odd = answer(429, "text/plain", "later") }, 0, "429", 1},
		{"it fails", func(f *fakeWitness) { f.odd = answer(500, "text/plain", "no") }, 0, "500", 1},
		{"size of another type", func(f *fakeWitness) { f.odd = answer(409, "text/plain", "7\n") }, 0, "409", 1},
		{"size without an end", func(f *fakeWitness) { f.odd = answer(409, size, "7") }, 0, "409", 1},
		{"no size", func(f *fakeWitness) { f.odd = answer(409, size, "-7\n") }, 0, "409", 1},
		{"size that we asked with", func(f *fakeWitness) { f.odd = answer(409, size+"; charset=utf-8", "0\n") }, 0, "asked with", 1},
		{"never the same size", func(f *fakeWitness) {
			f.odd = func(w http.ResponseWriter, b []byte) bool {
				return answer(409, size, fmt.Sprintf("%d\n", f.requests))(w, b)
			}
		}, 0, "changes each time", 3},
		{"an empty answer", func(f *fakeWitness) { f.odd = answer(200, "text/plain", "") }, 0, "no line", 1},
		{"somebody else's line", func(f *fakeWitness) {
			f.odd = answer(200, "text/plain", d.Cosignature(0, cp.Body(), ledgertest.Start))
		}, 0, "no line", 1},
		{"a line over another checkpoint", func(f *fakeWitness) {
			other := cp
			other.Root[0] ^= 1
			out, err := note.Sign(&note.Note{Text: other.Body()}, f.signer)
			if err != nil {
				t.Fatal(err)
			}
			f.odd = answer(200, "text/plain", strings.SplitN(string(out), "\n\n", 2)[1])
		}, 0, "cosignature", 1},
		{"an endless answer", func(f *fakeWitness) { f.odd = answer(200, "text/plain", strings.Repeat("— x y\n", 100_000)) }, 0, "no line", 1},
	} {
		f := newFakeWitness(t, d, 0)
		tc.setup(f)
		a := &asker{Witness: f.Witness, client: http.DefaultClient, tiles: s, size: tc.known}
		line, err := a.ask(t.Context(), cp, signed)
		if tc.want == "" {
			if _, cerr := f.CheckCosignature(cp.Body(), line); err != nil || cerr != nil || a.size != cp.Size {
				t.Errorf("%s: got %q, %v, want a cosignature", tc.name, line, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error about %q", tc.name, err, tc.want)
		}
		if f.requests != tc.requests {
			t.Errorf("%s: got %d requests, want %d", tc.name, f.requests, tc.requests)
		}
	}
}

// witnessConfig is a district whose policy names witnesses, of whom some are
// needed, with its validators.
func witnessConfig(t *testing.T, seed string, need int, ws ...*fakeWitness) (func(d *ledgertest.District) Config, *ledgertest.Chain) {
	t.Helper()
	d := ledgertest.New(seed, 4)
	c := d.NewChain().Fill(8)
	b := servicetest.District(t, d.ID)
	for i := range 4 {
		serveCosign(t, b, c, i, "")
	}
	return func(d *ledgertest.District) Config {
		var others []ledger.Witness
		for _, w := range ws {
			others = append(others, w.Witness)
		}
		policy, err := ledger.DistrictPolicy(&d.Genesis, d.Validators, others, need)
		if err != nil {
			t.Fatal(err)
		}
		return Config{Bus: b, Dir: t.TempDir(), GenesisJSON: d.GenesisJSON, Policy: policy, LogKey: d.LogKey, Interval: time.Millisecond,
			WitnessInterval: 10 * time.Millisecond, Logger: servicetest.Logger(t)}
	}, c
}

// TestServiceWitnessed: witnesses cosign the newest checkpoint now and then; one
// that is down, or hangs, or lies, keeps nothing from being sealed.
func TestServiceWitnessed(t *testing.T) {
	d := ledgertest.New("witnessed", 4)
	good, down, liar := newFakeWitness(t, d, 0), newFakeWitness(t, d, 1), newFakeWitness(t, d, 2)
	extra := newFakeWitness(t, d, 3)
	hang := make(chan struct{})
	release := sync.OnceFunc(func() { close(hang) })
	defer release()
	down.odd = func(http.ResponseWriter, []byte) bool { <-hang; return true }
	liar.odd = func(w http.ResponseWriter, _ []byte) bool {
		_, _ = io.WriteString(w, "— "+liar.Cosigner.Name()+" AAAA\n")
		return true
	}
	config, c := witnessConfig(t, "witnessed", 0, good, down, liar)
	cfg := config(d)
	cfg.Witnesses, cfg.WitnessTimeout = []ledger.Witness{extra.Witness, good.Witness}, 700*time.Millisecond
	s, stop := start(t, cfg)
	publish(t, cfg.Bus, c, 0, 3)
	wait(t, "sealed without them", func() bool { return s.Metrics().SealedHeight == 3 })
	wait(t, "cosigned", func() bool { return s.Metrics().Witnesses.Size == c.Blocks[2].Header.Size })
	publish(t, cfg.Bus, c, 3, 8)
	wait(t, "all sealed", func() bool { return s.Metrics().SealedHeight == 8 })
	last := c.Blocks[7].Header.Size
	wait(t, "cosigned by both", func() bool {
		b, err := os.ReadFile(filepath.Join(cfg.Dir, witnessedFile))
		return err == nil && bytes.Contains(b, fmt.Appendf(nil, "\n%d\n", last)) && bytes.Contains(b, []byte(good.Cosigner.Name())) && bytes.Contains(b, []byte(extra.Cosigner.Name()))
	})
	stop()
	if m := s.Metrics().Witnesses; m.Cosigned < 2 || m.Failed == 0 || m.Forks != 0 {
		t.Errorf("got %+v, want cosignatures and failures", m)
	}
	good.set(func() {
		if good.proofs == 0 {
			t.Error("no consistency proof was asked for")
		}
	})
	// Somebody who asks for the good one's cosignature verifies it, with a reader
	// that is not ours.
	srv := httptest.NewServer(Handler(cfg.Dir, nil))
	defer srv.Close()
	resp, signed := get(t, "GET", srv.URL+"/checkpoint.witnessed", nil)
	if resp.StatusCode != 200 {
		t.Fatalf("got %s", resp.Status)
	}
	p, err := torchwood.ParsePolicy(fmt.Appendf(nil, "log %s\nwitness g %s\nquorum g\n", d.Genesis.LogKey, good.Cosigner))
	if err != nil {
		t.Fatal(err)
	}
	if cp, _, err := torchwood.VerifyCheckpoint(signed, p); err != nil || cp.N != int64(last) {
		t.Errorf("with a witness' cosignature: got %v, %v", cp, err)
	}
	// A witness is left alone for longer each time that it fails.
	release()
	down.set(func() {
		if down.requests > 12 {
			t.Errorf("a witness that hangs was asked %d times", down.requests)
		}
	})
}

// TestServiceNeedsWitnesses: where the policy wants neighbours, nothing is sealed
// without them.
func TestServiceNeedsWitnesses(t *testing.T) {
	d := ledgertest.New("needed", 4)
	one, two, three := newFakeWitness(t, d, 0), newFakeWitness(t, d, 1), newFakeWitness(t, d, 2)
	fail := func(w http.ResponseWriter, _ []byte) bool {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return true
	}
	two.odd, three.odd = fail, fail
	config, c := witnessConfig(t, "needed", 2, one, two, three)
	cfg := config(d)
	s, stop := start(t, cfg)
	publish(t, cfg.Bus, c, 0, 3)
	wait(t, "one has cosigned, and is not enough", func() bool { m := s.Metrics(); return m.Height == 3 && m.Witnesses.Cosigned > 2 })
	if m := s.Metrics(); m.SealedSize != 0 || m.Checkpoints != 0 {
		t.Fatalf("got %+v, want nothing sealed", m)
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, "log", "checkpoint")); err == nil {
		t.Fatal("there is a checkpoint")
	}
	three.set(func() { three.odd = nil })
	wait(t, "sealed with two", func() bool { return s.Metrics().SealedHeight == 3 })
	publish(t, cfg.Bus, c, 3, 8)
	wait(t, "all sealed", func() bool { return s.Metrics().SealedHeight == 8 })
	stop()
	signed, err := os.ReadFile(filepath.Join(cfg.Dir, "log", "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	policy, err := torchwood.ParsePolicy(cfg.Policy)
	if err != nil {
		t.Fatalf("torchwood: %v", err)
	}
	if cp, _, err := torchwood.VerifyCheckpoint(signed, policy); err != nil || uint64(cp.N) != c.Blocks[7].Header.Size {
		t.Errorf("the district's policy: got %v, %v", cp, err)
	}
	lines := strings.Split(string(signed), "\n")
	without := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.Contains(l, one.Cosigner.Name()) })
	if _, _, err := torchwood.VerifyCheckpoint([]byte(strings.Join(without, "\n")), policy); err == nil {
		t.Error("without one of the neighbours: got no error")
	}
	// A policy that nobody can meet is refused at once.
	cfg.Policy = []byte(strings.NewReplacer(" "+one.URL, "", " "+two.URL, "").Replace(string(cfg.Policy)))
	cfg.Dir = t.TempDir()
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "URL") {
		t.Errorf("a policy that needs witnesses without URLs: got %v", err)
	}
}

// TestServiceSeesFork: a witness that knows another history is shouted about.
func TestServiceSeesFork(t *testing.T) {
	d := ledgertest.New("fork", 4)
	w := newFakeWitness(t, d, 0)
	config, c := witnessConfig(t, "fork", 0, w)
	w.size, w.hash = int64(c.Blocks[4].Header.Size), tlog.Hash{7}
	cfg := config(d)
	s, stop := start(t, cfg)
	publish(t, cfg.Bus, c, 0, 5)
	wait(t, "the fork is counted", func() bool { return s.Metrics().Witnesses.Forks > 0 })
	stop()
}

// TestProvenSuccession: who pinned genesis checks the newest checkpoint after the
// validators have changed, with what is served.
func TestProvenSuccession(t *testing.T) {
	c := councils("proven")
	dir := t.TempDir()
	o := StoreOptions{Dir: dir, GenesisJSON: c.GenesisJSON, Policy: c.Policy}
	policy, err := ledger.ParsePolicy(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(Handler(dir, nil))
	defer srv.Close()
	check := func(sets int) {
		t.Helper()
		resp, b := get(t, "GET", srv.URL+"/succession", nil)
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("Cache-Control") != "no-cache" {
			t.Fatalf("got %s, %v", resp.Status, resp.Header)
		}
		p, err := ledger.ParseSuccessionProof(b)
		if err != nil {
			t.Fatal(err)
		}
		line, err := p.Verify(c.GenesisJSON, policy)
		if err != nil || len(line.Sets()) != sets {
			t.Fatalf("got %v, want %d sets", err, sets)
		}
		_, signed := get(t, "GET", srv.URL+"/checkpoint", nil)
		if _, _, err := line.OpenNewest(signed); err != nil {
			t.Errorf("newest checkpoint: %v", err)
		}
	}
	bs := blocks(t, c)
	s := openStore(t, o)
	seal := func(h int) {
		t.Helper()
		for {
			p, ok := s.Snapshot()
			if !ok {
				return
			}
			blk := c.Blocks[p.Header.Height-1]
			c.Voters = blk.Voters
			if err := errors.Join(s.WriteTiles(p), s.Seal(p, c.Seal(blk))); err != nil {
				t.Fatalf("at %d: %v", h, err)
			}
		}
	}
	step := func(from, to int) {
		t.Helper()
		if err := s.Append(bs[from:to]...); err != nil {
			t.Fatal(err)
		}
		seal(to)
	}
	step(0, 2)
	check(1)
	step(2, 5) // block 3 adds one; the others are in the same group
	check(2)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, o)
	step(5, 10) // block 7 revokes one
	check(3)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Without the record nothing can be shown, and nothing is pretended; the log
	// goes on.
	dir2 := t.TempDir()
	s = openStore(t, StoreOptions{Dir: dir2, GenesisJSON: c.GenesisJSON, Policy: c.Policy})
	for _, b := range bs {
		gone := *b
		if b.Header.Height == 3 {
			gone.Purged, gone.Records, gone.Batches = true, nil, nil
		}
		if err := s.Append(&gone); err != nil {
			t.Fatal(err)
		}
	}
	seal(10)
	w := httptest.NewRecorder()
	Handler(dir2, nil).ServeHTTP(w, httptest.NewRequestWithContext(context.Background(), "GET", "/succession", nil))
	if w.Code != 404 || len(s.succession.Sets()) != 3 {
		t.Errorf("without the record: got %d and %d sets, want 404 and 3", w.Code, len(s.succession.Sets()))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, StoreOptions{Dir: dir2, GenesisJSON: c.GenesisJSON, Policy: c.Policy})
	if len(s.succession.Sets()) != 3 {
		t.Errorf("without the record, opened again: got %d sets, want 3", len(s.succession.Sets()))
	}
	// A file that was changed is refused.
	path := filepath.Join(dir, successionFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte(`"envelope": "`)) + 40
	b[at] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(o); err == nil || !strings.Contains(err.Error(), successionFile) {
		t.Errorf("a changed proof: got %v", err)
	}
}
