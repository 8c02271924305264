package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// chainFor answers what a chain's query asks.
func (s *Service) chainFor(ctx context.Context, v url.Values) (*Chain, error) {
	if v.Has("index") {
		index, err := strconv.ParseUint(v.Get("index"), 10, 62)
		if err != nil || v.Has("junction") || v.Has("at") {
			return nil, kind.Errorf(kind.Invalid, "index: must be a leaf's number in the log, without junction and at")
		}
		return s.RequestChain(ctx, index)
	}
	at, err := time.Parse(time.RFC3339Nano, v.Get("at"))
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "at: must be a time as in RFC 3339")
	}
	return s.Chain(ctx, traffic.JunctionID(v.Get("junction")), at)
}

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
//	GET /v1/evidence/{index}      a bundle, application/zip
//	GET /v1/records?…             records of the index, newest first, JSON; filters:
//	                              kind class junction device signer requester agency
//	                              case height seq policy policy_version controller rule
//	                              outcome state from to (RFC 3339); order=oldest,
//	                              limit, after (the next of the page before)
//	GET /v1/chain?junction=&at=   why the junction did what it did then, JSON; with
//	                              format=zip the bundle of all its records
//	GET /v1/chain?index=          the same of a request for priority, or of an
//	                              override: what became of it
//	GET /v1/bundle?records=1,2,…  one bundle of several records; unbroken=DEVICE adds
//	                              the claim that nothing of the device is missing
//	                              between the first and the last
//	GET /v1/alarms                what stands, JSON; all=1: everything that ever was
//	GET /v1/audit                 how far audit has come, JSON
//	POST /v1/checkpoints?from=    a signed checkpoint of this log that somebody else
//	                              has seen; answered by a verdict, JSON
//
// A bundle is built and verified for each request, so that only a few at once are
// made: further requests are told to come again. Errors are problem documents,
// RFC 9457. It asks nobody who they are: that is for whoever puts it on a network.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	making := newLimit(maxMaking)
	bundle := func(w http.ResponseWriter, name string, make func() ([]byte, error)) {
		done, ok := making.begin()
		if !ok {
			s.problem(w, kind.Errorf(kind.Unavailable, "%d bundles are being made already, try again", maxMaking))
			return
		}
		defer done()
		b, err := make()
		if err != nil {
			s.problem(w, err)
			return
		}
		w.Header().Set("Content-Disposition", fmt.Sprintf(`attachment; filename="%s.zip"`, name))
		s.write(w, "application/zip", b)
	}
	mux.HandleFunc("GET /v1/evidence/{index}", func(w http.ResponseWriter, r *http.Request) {
		index, err := strconv.ParseUint(r.PathValue("index"), 10, 62)
		if err != nil {
			s.problem(w, kind.Errorf(kind.Invalid, "index: must be a leaf's number in the log"))
			return
		}
		bundle(w, fmt.Sprintf("evidence-%d", index), func() ([]byte, error) { return s.Evidence(r.Context(), index) })
	})
	mux.HandleFunc("GET /v1/records", func(w http.ResponseWriter, r *http.Request) {
		q, err := ParseQuery(r.URL.Query())
		if err != nil {
			s.problem(w, err)
			return
		}
		p, err := s.Query(r.Context(), q)
		s.json(w, p, err)
	})
	mux.HandleFunc("GET /v1/chain", func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query()
		c, err := s.chainFor(r.Context(), v)
		switch {
		case err != nil || v.Get("format") == "" || v.Get("format") == "json":
			s.json(w, c, err)
		case v.Get("format") == "zip":
			bundle(w, "chain", func() ([]byte, error) { return s.ChainBundle(r.Context(), c) })
		default:
			s.problem(w, kind.Errorf(kind.Invalid, "format: must be json or zip"))
		}
	})
	mux.HandleFunc("GET /v1/bundle", func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query()
		var indexes []uint64
		for _, f := range strings.Split(v.Get("records"), ",") {
			i, err := strconv.ParseUint(f, 10, 62)
			if err != nil {
				s.problem(w, kind.Errorf(kind.Invalid, "records: must be leaves' numbers with commas between them"))
				return
			}
			indexes = append(indexes, i)
		}
		bundle(w, "evidence", func() ([]byte, error) {
			if d := v.Get("unbroken"); d != "" {
				return s.UnbrokenBundle(r.Context(), traffic.DeviceID(d), indexes...)
			}
			return s.Bundle(r.Context(), indexes...)
		})
	})
	mux.HandleFunc("GET /v1/alarms", func(w http.ResponseWriter, r *http.Request) {
		alarms, err := s.Alarms(), error(nil)
		if r.URL.Query().Get("all") == "1" {
			alarms, err = s.AlarmHistory()
		}
		s.json(w, map[string]any{"alarms": alarms}, err)
	})
	mux.HandleFunc("GET /v1/audit", func(w http.ResponseWriter, _ *http.Request) {
		m := s.Metrics()
		s.json(w, map[string]any{"blocks": m.Blocks, "records": m.Indexed, "log_size": m.Size, "sealed_size": m.Sealed, "verified_size": m.Verified,
			"alarms_raised": m.Alarms, "alarms_standing": m.Standing, "checkpoints_seen": m.Seen, "checkpoints_refused": m.Strange}, nil)
	})
	mux.HandleFunc("POST /v1/checkpoints", func(w http.ResponseWriter, r *http.Request) {
		note, err := io.ReadAll(http.MaxBytesReader(w, r.Body, ledger.MaxNote))
		if err != nil {
			s.problem(w, kind.Errorf(kind.Invalid, "body: must be a signed checkpoint of at most %d bytes", ledger.MaxNote))
			return
		}
		from := r.URL.Query().Get("from")
		if from == "" || len(from) > 200 {
			s.problem(w, kind.Errorf(kind.Invalid, "from: must say who has seen it, in at most 200 bytes"))
			return
		}
		verdict, err := s.Saw(from, note)
		s.json(w, map[string]any{"verdict": verdict}, err)
	})
	return mux
}

// ParseQuery reads the filters of /v1/records. Errors have kind Invalid.
func ParseQuery(v url.Values) (Query, error) {
	q := Query{Kind: identity.RecordKind(v.Get("kind")), Class: v.Get("class"), Junction: traffic.JunctionID(v.Get("junction")), Device: traffic.DeviceID(v.Get("device")),
		Signer: v.Get("signer"), Requester: v.Get("requester"), Agency: v.Get("agency"), Case: v.Get("case"), Policy: v.Get("policy"), PolicyVersion: v.Get("policy_version"),
		Controller: v.Get("controller"), Rule: v.Get("rule"), Outcome: v.Get("outcome"), State: v.Get("state"), After: v.Get("after")}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for name := range v {
		if !slices.Contains(queryNames, name) {
			bad("%.40q: no such filter", name)
		}
	}
	for name, into := range map[string]*time.Time{"from": &q.From, "to": &q.To} {
		if s := v.Get(name); s != "" {
			t, err := time.Parse(time.RFC3339Nano, s)
			if err != nil {
				bad("%s: must be a time as in RFC 3339", name)
			}
			*into = t
		}
	}
	number := func(name string) (uint64, bool) {
		s := v.Get(name)
		if s == "" {
			return 0, false
		}
		n, err := strconv.ParseUint(s, 10, 62)
		if err != nil {
			bad("%s: must be a number", name)
		}
		return n, err == nil
	}
	if n, ok := number("height"); ok {
		q.Height = ledger.Height(n)
	}
	if n, ok := number("seq"); ok {
		q.Seq = &n
	}
	if n, ok := number("limit"); ok {
		if q.Limit = int(n); n < 1 || n > MaxPage {
			bad("limit: must be 1 to %d", MaxPage)
		}
	}
	switch order := v.Get("order"); order {
	case "", "newest":
	case "oldest":
		q.Oldest = true
	default:
		bad("order: must be newest or oldest")
	}
	if err := errors.Join(errs...); err != nil {
		return q, kind.Errorf(kind.Invalid, "%w", err)
	}
	return q, q.Validate()
}

var queryNames = []string{"kind", "class", "junction", "device", "signer", "requester", "agency", "case", "height", "seq", "policy", "policy_version", "controller",
	"rule", "outcome", "state", "from", "to", "order", "limit", "after"}

// json answers with a value, or with what went wrong.
func (s *Service) json(w http.ResponseWriter, v any, err error) {
	var b []byte
	if err == nil {
		b, err = json.Marshal(v)
	}
	if err != nil {
		s.problem(w, err)
		return
	}
	s.write(w, "application/json", b)
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
