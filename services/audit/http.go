package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// maxFind bounds one answer of /v1/records.
const maxFind = 1000

// maxMaking is how many bundles are made at once.
const maxMaking = 4

// limit lets so many go on at once.
type limit chan struct{}

func newLimit(n int) limit { return make(limit, n) }

// begin takes a place, to be given back with done; ok is false where none is free.
func (l limit) begin() (done func(), ok bool) {
	select {
	case l <- struct{}{}:
		return func() { <-l }, true
	default:
		return nil, false
	}
}

// Handler serves
//
//	GET /v1/evidence/{index}                   a bundle, application/zip
//	GET /v1/records?kind=&junction=&limit=     the newest records, JSON
//
// A bundle is built and verified for each request, so that only a few at once are
// made: further requests are told to come again. Errors are problem documents, RFC 9457. It asks nobody who they are: that is
// for whoever puts it on a network.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	making := newLimit(maxMaking)
	mux.HandleFunc("GET /v1/evidence/{index}", func(w http.ResponseWriter, r *http.Request) {
		index, err := strconv.ParseUint(r.PathValue("index"), 10, 62)
		if err != nil {
			s.problem(w, kind.Errorf(kind.Invalid, "index: must be a leaf's number in the log"))
			return
		}
		done, ok := making.begin()
		if !ok {
			s.problem(w, kind.Errorf(kind.Unavailable, "%d bundles are being made already, try again", maxMaking))
			return
		}
		defer done()
		b, err := s.Evidence(r.Context(), index)
		if err != nil {
			s.problem(w, err)
			return
		}
		w.Header().Set("Content-Disposition", fmt.Sprintf(`attachment; filename="evidence-%d.zip"`, index))
		s.write(w, "application/zip", b)
	})
	mux.HandleFunc("GET /v1/records", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		k := identity.RecordKind(q.Get("kind"))
		if k != "" && !k.Valid() {
			s.problem(w, kind.Errorf(kind.Invalid, "kind: %.40q is unknown", string(k)))
			return
		}
		limit := 100
		if v := q.Get("limit"); v != "" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 1 || n > maxFind {
				s.problem(w, kind.Errorf(kind.Invalid, "limit: must be 1 to %d", maxFind))
				return
			}
			limit = n
		}
		b, err := json.Marshal(struct {
			Records []Record `json:"records"`
		}{s.Find(k, traffic.JunctionID(q.Get("junction")), limit)})
		if err != nil {
			s.problem(w, err)
			return
		}
		s.write(w, "application/json", b)
	})
	return mux
}

func (s *Service) write(w http.ResponseWriter, contentType string, b []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if _, err := w.Write(b); err != nil {
		s.log.Debug("audit: client went away", "err", err)
	}
}

func (s *Service) problem(w http.ResponseWriter, err error) {
	k := kind.Of(err)
	status, detail := http.StatusInternalServerError, err.Error()
	switch k {
	case kind.Invalid:
		status = http.StatusBadRequest
	case kind.NotFound:
		status = http.StatusNotFound
	case kind.Unavailable:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	default:
		// What is wrong with our disk is for our log.
		s.log.Error("audit: request failed", "err", err)
		detail = "the request could not be answered; it has been logged"
	}
	b, merr := json.Marshal(map[string]any{"title": k.String(), "status": status, "detail": detail})
	if merr != nil {
		s.log.Error("audit: problem document", "err", errors.Join(err, merr))
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if _, err := w.Write(b); err != nil {
		s.log.Debug("audit: client went away", "err", err)
	}
}
