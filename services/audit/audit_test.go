package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// write puts a data folder on disk as sealing writes it.
func write(t testing.TB, dir string, c *ledgertest.Chain, sealed int) {
	t.Helper()
	lay(t, dir, c.Folder(sealed))
}

// lay puts files on disk.
func lay(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func service(t testing.TB, c Config) *Service {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func config(d *ledgertest.District, dir string) Config {
	return Config{Dir: dir, GenesisJSON: d.GenesisJSON, Policy: d.Policy}
}

func verify(t testing.TB, d *ledgertest.District, b []byte) ledger.Report {
	t.Helper()
	p, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	r, err := ledger.VerifyBundle(b, p)
	if err != nil || r.Outcome != ledger.Pass {
		t.Fatalf("bundle: got %s, %v, want pass", r.Outcome, err)
	}
	return r
}

func TestEvidenceOfEveryRecord(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(70) // 280 leaves: more than a tile
	dir := t.TempDir()
	write(t, dir, c, 70)
	s := service(t, config(d, dir))
	n := 0
	for _, blk := range c.Blocks[:69] {
		for _, p := range blk.Payloads() {
			if p.Index%5 > 1 || testing.Short() && blk.Header.Height%8 > 0 {
				continue
			}
			b, err := s.Evidence(t.Context(), p.Index)
			if err != nil {
				t.Fatalf("leaf %d: %v", p.Index, err)
			}
			if r := verify(t, d, b); len(r.Records) != 1 || r.Records[0].Index != p.Index || r.Records[0].Height != blk.Header.Height {
				t.Fatalf("leaf %d: got %+v", p.Index, r.Records)
			}
			n++
		}
	}
	if n < 50 && !testing.Short() {
		t.Fatalf("got %d bundles, want many", n)
	}
	b, err := s.Bundle(t.Context(), 9, 1, 2, 9)
	if err != nil {
		t.Fatal(err)
	}
	if r := verify(t, d, b); len(r.Records) != 3 || r.Records[2].Height != 3 {
		t.Errorf("bundle of three: got %+v", r.Records)
	}
}

func TestEvidenceRefusals(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(5)
	dir := t.TempDir()
	write(t, dir, c, 3)
	s := service(t, config(d, dir))
	first := func(h int) uint64 { return c.Blocks[h-1].Header.PrevSize + 1 }
	for _, tc := range []struct {
		name  string
		index uint64
		kind  kind.Kind
		want  string
	}{
		{"block header", first(2) - 1, kind.Invalid, "header of block 1"},
		{"beyond the log", c.Blocks[4].Header.Size, kind.NotFound, "no leaf"},
		{"sealed, but not the block after", first(3), kind.Unavailable, "not sealed yet"},
		{"not sealed", first(5), kind.Unavailable, "not sealed yet"},
	} {
		_, err := s.Evidence(t.Context(), tc.index)
		if kind.Of(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got kind %v, %v, want %v and %q", tc.name, kind.Of(err), err, tc.kind, tc.want)
		}
	}
	if _, err := s.Evidence(t.Context(), first(2)); err != nil {
		t.Errorf("sealed with the block after: got %v, want a bundle", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Evidence(ctx, first(2)); err == nil {
		t.Error("with an ended context: got no error")
	}
	// When the next checkpoint is there, so is the bundle.
	write(t, dir, c, 5)
	if _, err := s.Evidence(t.Context(), first(3)); err != nil {
		t.Errorf("sealed meanwhile: got %v, want a bundle", err)
	}
}

// TestRegistryVersions: a bundle's registry is the one after the parent block,
// also where it is made again from the changes.
func TestRegistryVersions(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain()
	for i := range uint64(3 * keptVersions) {
		c.Decide([]ledgertest.Record{d.Frame(i+1, ledgertest.Start), d.Change(identity.Change{Action: "put", Type: identity.TypeSoftware,
			ID: fmt.Sprintf("v%d", i), Body: json.RawMessage(`{}`), Nonce: i})})
	}
	c.Decide()
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	s := service(t, config(d, dir))
	for _, blk := range c.Blocks[:3*keptVersions] {
		if blk.Header.Height%7 == 1 {
			b, err := s.Bundle(t.Context(), blk.Header.PrevSize+1, blk.Header.PrevSize+2)
			if err != nil {
				t.Fatalf("block %d: %v", blk.Header.Height, err)
			}
			verify(t, d, b)
		}
	}
}

func TestFind(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(10)
	dir := t.TempDir()
	write(t, dir, c, 9)
	s := service(t, config(d, dir))
	all := s.Find("", "", 11)
	if len(all) != 11 {
		t.Fatalf("got %d records of 30, want the newest 11", len(all))
	}
	for i, r := range all {
		if i > 0 && r.Index >= all[i-1].Index {
			t.Errorf("record %d: index %d after %d, want the newest first", i, r.Index, all[i-1].Index)
		}
		if want := r.Height < 9; r.Provable != want {
			t.Errorf("record of block %d: got provable %v, want %v", r.Height, r.Provable, want)
		}
	}
	cs := s.Find(identity.KindCommand, ledgertest.Junction, 2)
	if len(cs) != 2 || cs[0].Height != 10 || cs[1].Height != 9 || cs[0].Seq != 10 || cs[0].Device != "" {
		t.Errorf("commands: got %+v, want those of blocks 10 and 9", cs)
	}
	if got := s.Find(identity.KindFrame, "nowhere", 9); len(got) != 0 {
		t.Errorf("junction that is not there: got %d, want none", len(got))
	}
}

func TestFollowsSeals(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(6)
	b := servicetest.District(t, d.ID)
	cfg := config(d, t.TempDir()) // nothing there yet
	cfg.Bus, cfg.Poll, cfg.Logger = b, maxPatience, servicetest.Logger(t)
	s := service(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for _, n := range []int{2, 5} {
		write(t, cfg.Dir, c, n)
		for end := time.Now().Add(20 * time.Second); s.Metrics().Sealed != c.Blocks[n-1].Header.Size; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("waited in vain for %d sealed blocks: %+v", n, s.Metrics())
			}
			if err := b.Publish(t.Context(), topic.Seal(d.ID), "", []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if m := s.Metrics(); m.Blocks != 6 || m.Indexed != 18 {
		t.Errorf("got %+v, want 6 blocks and 18 records", m)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestDamage: what is wrong on disk is an error that names it, not evidence.
func TestDamage(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(6)
	for _, tc := range []struct{ file, want string }{
		{"log/tile/0/000.p/24", "does not verify"},
		{"payload/record/00000000000000000000.seg", "00000000000000000000.seg"},
		{"log/blocks/00000000000000000000.seg", "00000000000000000000.seg"},
	} {
		dir := t.TempDir()
		write(t, dir, c, 6)
		path := filepath.Join(dir, tc.file)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		s, err := New(config(d, dir))
		if err == nil {
			_, err = s.Evidence(t.Context(), 1)
			if err == nil {
				_, err = s.Evidence(t.Context(), 10)
			}
			_ = s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error about %q", tc.file, err, tc.want)
		}
	}
	other := ledgertest.New("other", 4)
	dir := t.TempDir()
	write(t, dir, c, 6)
	if _, err := New(config(other, dir)); err == nil {
		t.Error("folder of another district: got no error")
	}
}

func TestHandler(t *testing.T) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(5)
	dir := t.TempDir()
	write(t, dir, c, 4)
	s := service(t, config(d, dir))
	get := func(path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w
	}
	for _, tc := range []struct {
		path        string
		status      int
		contentType string
		want        string
	}{
		{"/v1/evidence/1", 200, "application/zip", "PK"},
		{"/v1/evidence/0", 400, "application/problem+json", "no record"},
		{"/v1/evidence/x", 400, "application/problem+json", "index"},
		{"/v1/evidence/-1", 400, "application/problem+json", "index"},
		{"/v1/evidence/999", 404, "application/problem+json", "no leaf"},
		{"/v1/evidence/17", 503, "application/problem+json", "not sealed yet"},
		{"/v1/records?kind=command&junction=J1&limit=1", 200, "application/json", `"index":19,"height":5,"kind":"command","junction":"J1"`},
		{"/v1/records?kind=nonsense", 400, "application/problem+json", "kind"},
		{"/v1/records?limit=0", 400, "application/problem+json", "limit"},
		{"/v1/records?limit=100000", 400, "application/problem+json", "limit"},
	} {
		w := get(tc.path)
		if w.Code != tc.status || w.Header().Get("Content-Type") != tc.contentType || !strings.Contains(w.Body.String(), tc.want) {
			t.Errorf("%s: got %d %s %.200s, want %d %s with %q", tc.path, w.Code, w.Header().Get("Content-Type"), w.Body, tc.status, tc.contentType, tc.want)
		}
	}
	verify(t, d, get("/v1/evidence/3").Body.Bytes())
}

func TestConfigValidate(t *testing.T) {
	err := (&Config{GenesisJSON: []byte("x"), Policy: []byte("x"), Poll: -1, Patience: time.Hour}).Validate()
	for _, want := range []string{"Dir", "GenesisJSON", "Policy", "Poll", "Patience"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a complaint about %s", err, want)
		}
	}
}

func BenchmarkEvidence(b *testing.B) {
	d := ledgertest.New("audit", 4)
	c := d.NewChain().Fill(200)
	dir := b.TempDir()
	write(b, dir, c, 200)
	s := service(b, config(d, dir))
	for b.Loop() {
		if _, err := s.Evidence(b.Context(), 101); err != nil {
			b.Fatal(err)
		}
	}
}
