package sealing

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// serveLog serves a log of 3,402 entries, whose newest block it holds back.
func serveLog(t *testing.T) (c *ledgertest.Chain, s *Store, dir, url string) {
	t.Helper()
	d := ledgertest.New("readers", 4)
	c = wide(d, 14, 242)
	dir = t.TempDir()
	s = openStore(t, options(d, dir))
	if err := fill(s, c, blocks(t, c)[:13]); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(Handler(dir, nil))
	t.Cleanup(srv.Close)
	return c, s, dir, srv.URL
}

func verifierOf(t *testing.T, d *ledgertest.District) note.Verifier {
	t.Helper()
	v, err := note.NewVerifier(d.Genesis.LogKey)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// httpTiles is the fetching half of a Go checksum database client; the rest is
// golang.org/x/mod's own.
type httpTiles struct {
	url   string
	saved int
}

func (h *httpTiles) Height() int { return ledger.TileHeight }

func (h *httpTiles) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var out [][]byte
	for _, tile := range tiles {
		path := strings.Replace(tile.Path(), fmt.Sprintf("tile/%d/", ledger.TileHeight), "tile/", 1) // C2SP leaves the height out
		resp, err := http.Get(h.url + "/" + path)
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("%s: %s", path, resp.Status)
		}
		out = append(out, b)
	}
	return out, nil
}

func (h *httpTiles) SaveTiles(tiles []tlog.Tile, _ [][]byte) { h.saved += len(tiles) }

// TestReadBySumDB reads over HTTP with the tile reader of the Go checksum
// database, which checks every tile against the signed root before it uses it.
func TestReadBySumDB(t *testing.T) {
	c, _, dir, url := serveLog(t)
	last := c.Blocks[12].Header
	n := int64(last.Size)
	tree := tlog.Tree{N: n, Hash: tlog.Hash(last.Root)}
	tiles := &httpTiles{url: url}
	hr := tlog.TileHashReader(tree, tiles)
	for i := int64(0); i < n; i += 101 {
		p, err := tlog.ProveRecord(n, i, hr)
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		h, err := hr.ReadHashes([]int64{tlog.StoredHashIndex(0, i)})
		if err != nil {
			t.Fatal(err)
		}
		if err := tlog.CheckRecord(p, n, tree.Hash, i, h[0]); err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
		hashes := make([][]byte, len(p))
		for k := range p {
			hashes[k] = p[k][:]
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(i), uint64(n), h[0][:], hashes, last.Root[:]); err != nil {
			t.Errorf("entry %d: transparency-dev/merkle: %v", i, err)
		}
	}
	for _, b := range c.Blocks[:12] {
		p, err := tlog.ProveTree(n, int64(b.Header.Size), hr)
		if err == nil {
			err = tlog.CheckTree(p, n, tree.Hash, int64(b.Header.Size), tlog.Hash(b.Header.Root))
		}
		if err != nil {
			t.Errorf("consistency from %d: %v", b.Header.Size, err)
		}
	}
	if tiles.saved == 0 {
		t.Error("no tile was authenticated")
	}
	// It refuses a tile that was changed: this is not a reader that takes anything.
	path := filepath.Join(dir, "log", "tile", "0", "003")
	flip(t, path, 77)
	if _, err := tlog.TileHashReader(tree, tiles).ReadHashes([]int64{tlog.StoredHashIndex(0, 800)}); err == nil {
		t.Error("a changed tile: got no error")
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// bundleHashes is what Tessera's fsck asks of the log's kind of entries.
func bundleHashes(b []byte) ([][]byte, error) {
	var e api.EntryBundle
	if err := e.UnmarshalText(b); err != nil {
		return nil, err
	}
	var out [][]byte
	for _, x := range e.Entries {
		out = append(out, rfc6962.DefaultHasher.HashLeaf(x))
	}
	return out, nil
}

// TestReadByTessera follows the log over HTTP with Tessera's client as it grows,
// and checks all of it with Tessera's fsck, which also finds damage.
func TestReadByTessera(t *testing.T) {
	c, s, dir, base := serveLog(t)
	ctx := t.Context()
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	f, err := client.NewHTTPFetcher(u, nil)
	if err != nil {
		t.Fatal(err)
	}
	v := verifierOf(t, c.District)
	tracker, err := client.NewLogStateTracker(ctx, f.ReadTile, nil, v, c.Origin, client.UnilateralConsensus(f.ReadCheckpoint))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := tracker.Latest().Size, c.Blocks[12].Header.Size; got != want {
		t.Fatalf("got a log of %d, want %d", got, want)
	}
	size := tracker.Latest().Size
	pb, err := client.NewProofBuilder(ctx, size, f.ReadTile)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := client.GetEntryBundle(ctx, f.ReadEntryBundle, 1, size)
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(256); i < 512; i += 51 {
		p, err := pb.InclusionProof(ctx, i)
		if err == nil {
			err = proof.VerifyInclusion(rfc6962.DefaultHasher, i, size, rfc6962.DefaultHasher.HashLeaf(bundle.Entries[i-256]), p, tracker.Latest().Hash)
		}
		if err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	if err := fill(s, c, blocks(t, c)); err != nil {
		t.Fatal(err)
	}
	old, p, _, err := tracker.Update(ctx) // proves consistency
	if err != nil || len(old) == 0 || len(p) == 0 || tracker.Latest().Size != c.Blocks[13].Header.Size {
		t.Fatalf("update: got a log of %d, %v, want %d", tracker.Latest().Size, err, c.Blocks[13].Header.Size)
	}
	check := func() error { return fsck.New(c.Origin, v, f, bundleHashes, fsck.Opts{N: 4}).Check(ctx) }
	if err := check(); err != nil {
		t.Fatalf("fsck: %v", err)
	}
	// Folder, too: this is what a web server would serve.
	if err := fsck.New(c.Origin, v, client.FileFetcher{Root: filepath.Join(dir, "log")}, bundleHashes, fsck.Opts{N: 4}).Check(ctx); err != nil {
		t.Fatalf("fsck of the folder: %v", err)
	}
	for _, name := range []string{"tile/entries/002", "tile/0/005", fmt.Sprintf("tile/1/000.p/%d", tracker.Latest().Size/256)} {
		path := filepath.Join(dir, "log", filepath.FromSlash(name))
		flip(t, path, 100)
		if err := check(); err == nil {
			t.Errorf("%s changed: got no error", name)
		}
		flip(t, path, 100)
	}
	if err := check(); err != nil {
		t.Fatalf("fsck: %v", err)
	}
}

// get asks over real HTTP, without the client's own decompression.
func get(t *testing.T, method, url string, header http.Header) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	if req.Header == nil {
		req.Header = http.Header{}
	}
	if req.Header.Get("Accept-Encoding") == "" {
		req.Header.Set("Accept-Encoding", "identity")
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return resp, b
}

// TestServedAsSpecified: what C2SP tlog-tiles says of types, caching, widths and
// compression, over HTTP.
func TestServedAsSpecified(t *testing.T) {
	_, s, dir, base := serveLog(t)
	size := s.State().SealedSize // 13 × 243 = 3159 = 12 × 256 + 87
	if size != 3159 {
		t.Fatalf("got %d entries, want 3159", size)
	}
	const immutable, text, binary = "public, max-age=31536000, immutable", "text/plain; charset=utf-8", "application/octet-stream"
	for _, tc := range []struct {
		path, contentType, cache string
		status, length           int
	}{
		{"/checkpoint", text, "no-cache", 200, -1},
		{"/tile/0/000", binary, immutable, 200, 256 * 32},
		{"/tile/0/012.p/87", binary, immutable, 200, 87 * 32},
		{"/tile/1/000.p/12", binary, immutable, 200, 12 * 32},
		{"/tile/entries/000", binary, immutable, 200, 256 * 36},
		{"/tile/entries/012.p/87", binary, immutable, 200, 87 * 36},
		// Partial ones of before, from the full one.
		{"/tile/0/000.p/243", binary, immutable, 200, 243 * 32},
		{"/tile/entries/000.p/243", binary, immutable, 200, 243 * 36},
		// What is not there yet must not be remembered.
		{"/tile/0/012", text, "no-store", 404, -1},
		{"/tile/0/012.p/88", text, "no-store", 404, -1},
		{"/tile/2/000", text, "no-store", 404, -1},
		{"/tile/2/000.p/1", text, "no-store", 404, -1},
		{"/tile/entries/012", text, "no-store", 404, -1},
		{"/succession.json", text, "no-store", 404, -1},
	} {
		resp, b := get(t, "GET", base+tc.path, nil)
		if resp.StatusCode != tc.status || resp.Header.Get("Content-Type") != tc.contentType || resp.Header.Get("Cache-Control") != tc.cache ||
			tc.length >= 0 && len(b) != tc.length || resp.Header.Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s: got %d, %d bytes, %v, want %d, %d bytes, %s, %s", tc.path, resp.StatusCode, len(b), resp.Header, tc.status, tc.length, tc.contentType, tc.cache)
		}
		if tc.status != 200 {
			continue
		}
		tag := resp.Header.Get("ETag")
		head, none := get(t, "HEAD", base+tc.path, nil)
		if head.StatusCode != 200 || len(none) != 0 || head.ContentLength != int64(len(b)) || head.Header.Get("ETag") != tag {
			t.Errorf("HEAD %s: got %d, %v, want the header of GET", tc.path, head.StatusCode, head.Header)
		}
		same, none := get(t, "GET", base+tc.path, http.Header{"If-None-Match": {tag}})
		if same.StatusCode != http.StatusNotModified || len(none) != 0 || same.Header.Get("Cache-Control") != tc.cache {
			t.Errorf("%s unchanged: got %d, want 304", tc.path, same.StatusCode)
		}
		if other, _ := get(t, "GET", base+tc.path, http.Header{"If-None-Match": {`"other"`}}); other.StatusCode != 200 {
			t.Errorf("%s changed: got %d, want 200", tc.path, other.StatusCode)
		}
	}
	// A cut tile is the prefix.
	_, full := get(t, "GET", base+"/tile/0/000", nil)
	if _, cut := get(t, "GET", base+"/tile/0/000.p/9", nil); !bytes.Equal(cut, full[:9*32]) {
		t.Error("partial tile: is not the beginning of the full one")
	}
	// Entries are compressed for who asks; hashes never are.
	plain, want := get(t, "GET", base+"/tile/entries/000", nil)
	for accept, zip := range map[string]bool{"gzip": true, "br, gzip;q=0.5": true, "*": true, "gzip;q=0": false, "*;q=0": false, "deflate": false, "gzip;q=0, *": false} {
		resp, b := get(t, "GET", base+"/tile/entries/000", http.Header{"Accept-Encoding": {accept}})
		if got := resp.Header.Get("Content-Encoding") == "gzip"; got != zip || resp.Header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("Accept-Encoding %q: got gzip %v, %v, want %v", accept, got, resp.Header, zip)
			continue
		}
		if zip {
			if resp.Header.Get("ETag") == plain.Header.Get("ETag") || len(b) >= len(want) {
				t.Errorf("gzip: got %d bytes and tag %s, want fewer than %d and another", len(b), resp.Header.Get("ETag"), len(want))
			}
			z, err := gzip.NewReader(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if b, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(b, want) {
			t.Errorf("Accept-Encoding %q: got other entries", accept)
		}
	}
	if resp, _ := get(t, "GET", base+"/tile/0/000", http.Header{"Accept-Encoding": {"gzip"}}); resp.Header.Get("Content-Encoding") != "" {
		t.Error("a hash tile is compressed")
	}
	// What cannot be read is no 404, which would say that the log is shorter.
	if err := os.Remove(filepath.Join(dir, "log", "tile", "0", "001")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "log", "tile", "0", "001"), 0o755); err != nil {
		t.Fatal(err)
	}
	if resp, _ := get(t, "GET", base+"/tile/0/001", nil); resp.StatusCode != 500 || resp.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("unreadable tile: got %d, want 500", resp.StatusCode)
	}
}
