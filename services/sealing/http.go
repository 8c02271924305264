package sealing

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

func hashOf(b []byte) ledger.Hash { return sha256.Sum256(b) }

// Handler serves the log read-only: /checkpoint and /tile/…, as C2SP tlog-tiles
// says, to anybody and any origin. See [Handler].
func (s *Service) Handler() http.Handler { return Handler(s.c.Dir, s.log) }

// What does not change may be kept for good, what does must be asked for again;
// that something is not there yet must not be kept at all.
const (
	cacheImmutable = "public, max-age=31536000, immutable"
	cacheAsk       = "no-cache"
	cacheNever     = "no-store"
)

// readers read what is served beside the tiles, each replaced whole, with its
// content type.
var readers = map[string]struct {
	contentType string
	read        func(dir string) ([]byte, error)
}{
	"checkpoint": {"text/plain; charset=utf-8", func(dir string) ([]byte, error) {
		return os.ReadFile(filepath.Join(dir, logDir, checkpointFile))
	}},
	"checkpoint.witnessed": {"text/plain; charset=utf-8", func(dir string) ([]byte, error) {
		return os.ReadFile(filepath.Join(dir, witnessedFile))
	}},
	"succession": {"application/json", readSuccession},
}

// readTile reads a tile.
func readTile(dir string, id ledger.TileID) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, logDir, filepath.FromSlash(id.Path())))
	if errors.Is(err, fs.ErrNotExist) && id.Width < ledger.TileWidth {
		return cutFromFull(dir, id)
	}
	return b, err
}

// Handler serves the log of a data folder; log is optional. Beside what C2SP
// tlog-tiles asks for there is
//
//	/checkpoint.witnessed  the newest checkpoint that witnesses have cosigned, with
//	                       their cosignatures; a little older than /checkpoint
//	/succession            who the validators were, see [ledger.SuccessionProof]
//
// A partial tile that is gone because the full one is there is cut from that one,
// so that who holds an older checkpoint need not know.
func Handler(dir string, log *slog.Logger) http.Handler {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("X-Content-Type-Options", "nosniff")
		fail := func(text string, status int) {
			h.Set("Cache-Control", cacheNever)
			http.Error(w, text, status)
		}
		switch r.Method {
		case http.MethodGet, http.MethodHead:
		case http.MethodOptions:
			h.Set("Access-Control-Allow-Methods", "GET, HEAD")
			h.Set("Access-Control-Allow-Headers", "If-None-Match, Range")
			h.Set("Access-Control-Max-Age", "86400")
			w.WriteHeader(http.StatusNoContent)
			return
		default:
			h.Set("Allow", "GET, HEAD, OPTIONS")
			fail("the log can only be read", http.StatusMethodNotAllowed)
			return
		}
		name := strings.TrimPrefix(r.URL.Path, "/")
		var b []byte
		var err error
		reader, named := readers[name]
		contentType, cache, shrinks := reader.contentType, cacheAsk, true
		if named {
			b, err = reader.read(dir)
		} else {
			// Only names of tiles pass: nothing else of the folder can be reached.
			id, perr := ledger.ParseTilePath(name)
			if perr != nil {
				fail("not found: /checkpoint and /tile/… are served", http.StatusNotFound)
				return
			}
			contentType, cache = "application/octet-stream", cacheImmutable
			shrinks = id.Level == ledger.EntriesLevel // hashes do not
			b, err = readTile(dir, id)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			fail("not found", http.StatusNotFound)
			return
		case err != nil:
			log.Error("sealing: reading the log", "path", name, "err", err)
			fail("cannot be read", http.StatusInternalServerError)
			return
		}
		sum := sha256.Sum256(b)
		tag := hex.EncodeToString(sum[:16])
		if shrinks {
			h.Set("Vary", "Accept-Encoding")
			if acceptsGzip(r.Header.Values("Accept-Encoding")) {
				b, tag = zipped(b), tag+"-gz"
				h.Set("Content-Encoding", "gzip")
				h.Set("Content-Length", strconv.Itoa(len(b)))
			}
		}
		h.Set("Content-Type", contentType)
		h.Set("Cache-Control", cache)
		h.Set("ETag", `"`+tag+`"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b)) // conditions, ranges, HEAD
	})
}

// cutFromFull makes a partial tile of the full one.
func cutFromFull(dir string, id ledger.TileID) ([]byte, error) {
	width := id.Width
	id.Width = ledger.TileWidth
	b, err := os.ReadFile(filepath.Join(dir, logDir, filepath.FromSlash(id.Path())))
	if err != nil {
		return nil, err
	}
	if id.Level != ledger.EntriesLevel {
		return b[:min(len(b), width*tlog.HashSize)], nil
	}
	es, err := ledger.ReadEntries(b)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, e := range es[:min(len(es), width)] {
		out = ledger.AppendEntry(out, e)
	}
	return out, nil
}

func zipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	// A Buffer takes everything.
	_, _ = z.Write(b)
	_ = z.Close()
	return out.Bytes()
}

// acceptsGzip reports whether a client takes gzip: RFC 9110 §12.5.3.
func acceptsGzip(values []string) bool {
	any := false
	for _, part := range strings.Split(strings.Join(values, ","), ",") {
		coding, params, _ := strings.Cut(part, ";")
		coding = strings.ToLower(strings.TrimSpace(coding))
		if coding != "gzip" && coding != "x-gzip" && coding != "*" {
			continue
		}
		ok := true
		if name, q, found := strings.Cut(strings.TrimSpace(params), "="); found && strings.EqualFold(strings.TrimSpace(name), "q") {
			weight, err := strconv.ParseFloat(strings.TrimSpace(q), 64)
			ok = err == nil && weight > 0
		}
		if coding != "*" {
			return ok
		}
		any = ok
	}
	return any
}
