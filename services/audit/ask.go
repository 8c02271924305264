package audit

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// asksAtOnce is how many questions of other services are answered at once.
const asksAtOnce = 32

// maxAnswer bounds the payloads of one answer, bytes: with what is around them it
// fits into one message of the bus.
const maxAnswer = 6 << 20

// AskHandler answers other services of the district, over the bus: all of
// [Service.Handler], and
//
//	GET /record/{index}               one line of the index, JSON; with payload=1 its
//	                                  envelope and salt too
//	GET /payloads?…                   records with their envelopes and salts, the
//	                                  filters as in /v1/records; a page may be shorter
//	                                  than its limit and have a next one all the same
//	GET /checkpoint                   the newest sealed checkpoint, JSON
//	GET /inclusion?index=&size=       proof of a leaf; size 0: of the newest checkpoint
//	GET /consistency?from=&to=        proof that one size of the log began with another
//	GET /access-summary?month=2026-11 what was read, by agency and purpose
//
// Whoever reaches it reads everything: it belongs on a subject that only the
// gateway may ask on.
func (s *Service) AskHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", s.Handler())
	mux.HandleFunc("GET /record/{index}", func(w http.ResponseWriter, r *http.Request) {
		index, err := strconv.ParseUint(r.PathValue("index"), 10, 62)
		if err != nil {
			s.problem(w, kind.Errorf(kind.Invalid, "index: must be a leaf's number in the log"))
			return
		}
		rec, ok, err := s.index.one(r.Context(), s.sealedSize(), "record k WHERE k.idx = ?", "k.idx", int64(index))
		if err == nil && !ok {
			err = kind.Errorf(kind.NotFound, "index: the log has no record %d", index)
		}
		f := full{Record: rec}
		if err == nil && r.URL.Query().Get("payload") == "1" {
			f, err = s.withPayload(rec)
		}
		s.json(w, f, err)
	})
	mux.HandleFunc("GET /payloads", func(w http.ResponseWriter, r *http.Request) {
		p, err := s.withPayloads(r.Context(), r.URL.Query())
		s.json(w, p, err)
	})
	mux.HandleFunc("GET /checkpoint", func(w http.ResponseWriter, _ *http.Request) {
		sealed, note := s.newest()
		if sealed == nil {
			s.problem(w, kind.Errorf(kind.Unavailable, "nothing is sealed yet"))
			return
		}
		s.json(w, map[string]any{"note": string(note), "size": sealed.Size}, nil)
	})
	mux.HandleFunc("GET /inclusion", func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query()
		p, err := s.inclusion(v.Get("index"), v.Get("size"))
		s.json(w, p, err)
	})
	mux.HandleFunc("GET /consistency", func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query()
		p, err := s.consistency(v.Get("from"), v.Get("to"))
		s.json(w, p, err)
	})
	var sums summaries
	mux.HandleFunc("GET /access-summary", func(w http.ResponseWriter, r *http.Request) {
		c, err := sums.of(r.Context(), s, r.URL.Query().Get("month"))
		s.json(w, map[string]any{"counts": c}, err)
	})
	return mux
}

// full is a record with its payload.
type full struct {
	Record
	Envelope []byte `json:"envelope,omitempty"`
	Salt     []byte `json:"salt,omitempty"`
}

type fullPage struct {
	Records []full `json:"records"`
	Next    string `json:"next,omitempty"`
}

// withPayloads lists records with their payloads.
func (s *Service) withPayloads(ctx context.Context, v url.Values) (fullPage, error) {
	out := fullPage{Records: []full{}}
	q, err := ParseQuery(v)
	if err != nil {
		return out, err
	}
	p, err := s.Query(ctx, q)
	if err != nil {
		return out, err
	}
	out.Next = p.Next
	size := 0
	for i, r := range p.Records {
		f, err := s.withPayload(r)
		if err != nil {
			return out, err
		}
		if size += len(f.Envelope); size > maxAnswer && i > 0 {
			out.Next = mark{p.Records[i-1].Time.UnixNano(), p.Records[i-1].Boot, p.Records[i-1].Seq, p.Records[i-1].Index}.String()
			break
		}
		out.Records = append(out.Records, f)
	}
	return out, nil
}

// withPayload adds a record's payload, where it is held.
func (s *Service) withPayload(r Record) (full, error) {
	f := full{Record: r}
	if r.State != "" {
		return f, nil
	}
	s.files.RLock()
	defer s.files.RUnlock()
	if s.payloads == nil {
		return f, kind.Errorf(kind.Unavailable, "the data folder is being opened again; try again in a moment")
	}
	p, err := s.payloads.Get(r.Index)
	switch {
	case kind.Of(err) == kind.NotFound || err == nil && len(p.Envelope) == 0: // let go a moment ago
		f.State = Gone
	case err != nil:
		return f, err
	default:
		f.Envelope, f.Salt = p.Envelope, p.Salt[:]
	}
	return f, nil
}

// newest returns the newest sealed checkpoint, nil for none.
func (s *Service) newest() (*ledger.Sealed, []byte) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sealed, s.note
}

type logProof struct {
	Size   uint64   `json:"size"`
	Leaf   []byte   `json:"leaf_hash,omitempty"`
	Hashes [][]byte `json:"hashes"`
}

func hashes(p []tlog.Hash) [][]byte {
	out := make([][]byte, 0, len(p))
	for _, h := range p {
		out = append(out, h[:])
	}
	return out
}

// sized reads a size of the log; 0 or nothing is that of the newest checkpoint.
func (s *Service) sized(field, text string) (uint64, error) {
	sealed, _ := s.newest()
	if sealed == nil {
		return 0, kind.Errorf(kind.Unavailable, "nothing is sealed yet")
	}
	if text == "" || text == "0" {
		return sealed.Size, nil
	}
	n, err := strconv.ParseUint(text, 10, 62)
	if err != nil || n > sealed.Size {
		return 0, kind.Errorf(kind.Invalid, "%s: %.20s, the newest checkpoint is of %d", field, text, sealed.Size)
	}
	return n, nil
}

func (s *Service) inclusion(index, size string) (p logProof, err error) {
	if p.Size, err = s.sized("size", size); err != nil {
		return p, err
	}
	i, err := strconv.ParseUint(index, 10, 62)
	if err != nil || i >= p.Size {
		return p, kind.Errorf(kind.NotFound, "index: %.20s, the log has %d leaves at that size", index, p.Size)
	}
	leaf, err := ledger.ReadLeaf(wider{s}, p.Size, i)
	if err != nil {
		return p, err
	}
	raw := leaf.Marshal()
	h := tlog.RecordHash(raw[:])
	p.Leaf = h[:]
	proof, err := ledger.Prove(wider{s}, p.Size, i)
	p.Hashes = hashes(proof)
	return p, err
}

func (s *Service) consistency(from, to string) (p logProof, err error) {
	if p.Size, err = s.sized("to_size", to); err != nil {
		return p, err
	}
	n, err := strconv.ParseUint(from, 10, 62)
	if err != nil || n == 0 || n > p.Size {
		return p, kind.Errorf(kind.Invalid, "from_size: %.20s, must be 1 to %d", from, p.Size)
	}
	proof, err := tlog.ProveTree(int64(p.Size), int64(n), ledger.NewHashReader(wider{s}, p.Size))
	p.Hashes = hashes(proof)
	return p, err
}

// AccessCount is how often an agency read, or was denied, for a purpose.
type AccessCount struct {
	Agency  string `json:"agency"`
	Purpose string `json:"purpose"`
	Granted bool   `json:"granted"`
	Count   uint64 `json:"count"`
}

// summaries keeps a month's sums for a while: anybody may ask for them.
type summaries struct {
	mu   sync.Mutex // held while a month is summed: once is enough
	have map[string]summary
}

type summary struct {
	at     time.Time
	counts []AccessCount
}

// keepSummaries bounds the months that are kept.
const keepSummaries = 24

func (m *summaries) of(ctx context.Context, s *Service, month string) ([]AccessCount, error) {
	from, err := time.Parse("2006-01", month)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "month: %.20q, must be such as 2026-11", month)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if h, ok := m.have[month]; ok && time.Since(h.at) < 10*time.Second {
		return h.counts, nil
	}
	counts, err := s.sumAccess(ctx, from, from.AddDate(0, 1, 0))
	if err != nil {
		return nil, err
	}
	if m.have == nil || len(m.have) >= keepSummaries {
		m.have = map[string]summary{}
	}
	m.have[month] = summary{time.Now(), counts}
	return counts, nil
}

// sumAccess sums access records over a time.
func (s *Service) sumAccess(ctx context.Context, from, to time.Time) ([]AccessCount, error) {
	sums := map[AccessCount]uint64{}
	v := url.Values{"kind": {string(identity.KindAccess)}, "from": {from.Format(time.RFC3339)}, "to": {to.Format(time.RFC3339)}, "limit": {strconv.Itoa(MaxPage)}}
	for {
		p, err := s.withPayloads(ctx, v)
		if err != nil {
			return nil, err
		}
		for _, r := range p.Records {
			c := wire.Candidate(r.Envelope, r.Salt)
			if c.Access == nil {
				continue // its payload was let go
			}
			a := c.Access
			k := AccessCount{Agency: a.By.Agency, Purpose: a.Purpose, Granted: a.Granted}
			switch a.Phase {
			case traffic.AccessMinute, traffic.AccessClosed: // of a stream that was counted when it was opened
			case traffic.AccessOpened:
				sums[k]++
			default:
				sums[k] += a.Count
			}
		}
		if p.Next == "" {
			break
		}
		v.Set("after", p.Next)
	}
	out := make([]AccessCount, 0, len(sums))
	for k, n := range sums {
		k.Count = n
		out = append(out, k)
	}
	return out, nil
}

// serve answers other services until ctx ends.
func (s *Service) serve(ctx context.Context, subject string) error {
	if err := s.c.Bus.ServeHTTP(ctx, subject, "audit", asksAtOnce, s.AskHandler()); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}
