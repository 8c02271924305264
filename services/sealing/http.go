package sealing

import (
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

func hashOf(b []byte) ledger.Hash { return sha256.Sum256(b) }

// Handler serves the log read-only: /checkpoint and /tile/…, as C2SP tlog-tiles
// says, to anybody and any origin.
func (s *Service) Handler() http.Handler { return Handler(s.c.Dir, s.log) }

// Handler serves the log of a data folder; see [Service.Handler].
func Handler(dir string, log *slog.Logger) http.Handler {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("X-Content-Type-Options", "nosniff")
		switch r.Method {
		case http.MethodGet, http.MethodHead:
		case http.MethodOptions:
			h.Set("Access-Control-Allow-Methods", "GET, HEAD")
			w.WriteHeader(http.StatusNoContent)
			return
		default:
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "the log can only be read", http.StatusMethodNotAllowed)
			return
		}
		name := strings.TrimPrefix(r.URL.Path, "/")
		contentType, cache := "text/plain; charset=utf-8", "no-store"
		if name != "checkpoint" {
			// Only names of tiles pass: nothing else of the folder can be reached.
			if _, err := ledger.ParseTilePath(name); err != nil {
				http.Error(w, "not found: /checkpoint and /tile/… are served", http.StatusNotFound)
				return
			}
			// A tile of a given width never changes.
			contentType, cache = "application/octet-stream", "public, max-age=31536000, immutable"
		}
		b, err := os.ReadFile(filepath.Join(dir, logDir, filepath.FromSlash(name)))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			http.Error(w, "not found", http.StatusNotFound)
			return
		case err != nil:
			log.Error("sealing: reading the log", "path", name, "err", err)
			http.Error(w, "cannot be read", http.StatusInternalServerError)
			return
		}
		h.Set("Content-Type", contentType)
		h.Set("Cache-Control", cache)
		h.Set("Content-Length", strconv.Itoa(len(b)))
		if _, err := w.Write(b); err != nil {
			log.Debug("sealing: client went away", "path", name, "err", err)
		}
	})
}
