package gateway

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// RegistryView is the registry in force, or its entries of one type.
type RegistryView struct {
	District traffic.DistrictID `json:"district"`
	// Version counts the changes since genesis.
	Version uint64 `json:"version"`
	// Hash is that of the whole state, as headers have it.
	Hash string `json:"hash"`
	// Height is that of the newest block whose records are in it.
	Height  uint64           `json:"height"`
	Entries []identity.Entry `json:"entries"`
}

// Refusal is why a registry record is not in force. Validators keep no reasons
// in blocks, because whoever replays a block finds the same: so does the gateway.
type Refusal struct {
	// Commitment is that of the sender's receipt, hex.
	Commitment string `json:"commitment"`
	// Height of the block with the verdict; 0 where validation refused it before.
	Height uint64 `json:"height,omitempty"`
	Rule   string `json:"rule"`
	Reason string `json:"reason"`
}

// keepRefusals is how many of the newest refusals can be asked for, and
// explainMost of how many in one block the reason is looked for: each takes a
// copy of the registry, and only officials' keys can make one.
const (
	keepRefusals = 256
	explainMost  = 32
)

// refusals holds the newest ones, by commitment.
type refusals struct {
	by    map[string]Refusal
	order []string // oldest first
}

func (r *refusals) add(f Refusal) {
	if r.by == nil {
		r.by = map[string]Refusal{}
	}
	if _, ok := r.by[f.Commitment]; !ok {
		r.order = append(r.order, f.Commitment)
	}
	r.by[f.Commitment] = f
	for len(r.order) > keepRefusals {
		delete(r.by, r.order[0])
		r.order = r.order[1:]
	}
}

// registryRecord and redactionRecord are what envelopes of the kinds begin with,
// in their one encoding.
var (
	registryRecord  = identity.Envelope{Kind: identity.KindRegistry}.Marshal()
	redactionRecord = identity.Envelope{Kind: identity.KindRedaction}.Marshal()
)

// explain finds out why registry records of a block were refused, by the
// validators' own rules: each is tried on the state after those before it. mu is
// held.
func (g *Gateway) explain(b *decided.Block, reg *identity.Registry) {
	next, left := reg, explainMost
	for i := range b.Records {
		r := &b.Records[i]
		if !bytes.HasPrefix(r.Raw, registryRecord) && !bytes.HasPrefix(r.Raw, redactionRecord) {
			continue
		}
		c := wire.Candidate(r.Raw, r.Salt[:])
		if r.Accepted {
			if next == reg {
				next = reg.Clone()
			}
			if c.Change != nil {
				if err := next.Apply(uint64(b.Header.Height), c.Envelope.Key, *c.Change); err != nil {
					g.log.Warn("accepted registry record does not apply", "height", b.Header.Height, "err", err)
				}
			}
			continue
		}
		if left--; left < 0 {
			continue
		}
		f := Refusal{Height: uint64(b.Header.Height), Rule: string(validate.RuleRegistry), Reason: "refused by the validators"}
		f.Commitment = commitment(ledger.Commit(r.Salt, r.Raw))
		one := []validate.Candidate{c}
		wire.VerifySignatures(identity.NewVerifier(), reg, one)
		if v := validate.NewState(validate.Limits{}).Judge(reg, b.Header.Time, &one[0]); !v.OK {
			f.Rule, f.Reason = string(v.Rule), v.Reason
		} else if c.Change != nil {
			if err := next.Clone().Apply(uint64(b.Header.Height), c.Envelope.Key, *c.Change); err != nil {
				f.Reason = err.Error()
			}
		}
		g.refused.add(f)
	}
}

func commitment(h ledger.Hash) string { return hex.EncodeToString(h[:]) }

// registryRoutes serves the registry in force.
func (g *Gateway) registryRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/registry", func(w http.ResponseWriter, r *http.Request) {
		height := g.cfg.State.Height() // before the registry: no more than what is in it
		reg := g.cfg.State.Registry()
		h := reg.Hash()
		v := RegistryView{District: reg.District(), Height: uint64(height), Version: reg.Version(), Hash: hex.EncodeToString(h[:]),
			Entries: reg.Entries(identity.EntryType(r.URL.Query().Get("type")))}
		if v.Entries == nil {
			v.Entries = []identity.Entry{}
		}
		writeExact(w, v)
	})
	mux.HandleFunc("GET /v1/registry/{type}/{id}", func(w http.ResponseWriter, r *http.Request) {
		e, ok := g.cfg.State.Registry().Entry(identity.EntryType(r.PathValue("type")), r.PathValue("id"))
		if !ok {
			notFound(w, fmt.Sprintf("the registry has no %.20s %.128q", r.PathValue("type"), r.PathValue("id")))
			return
		}
		writeExact(w, e)
	})
	mux.HandleFunc("GET /v1/refusals/{commitment}", func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		f, ok := g.refused.by[r.PathValue("commitment")]
		g.mu.Unlock()
		if !ok {
			notFound(w, fmt.Sprintf("no registry record with the commitment %.64q was refused lately", r.PathValue("commitment")))
			return
		}
		writeJSON(w, f)
	})
}

// writeExact writes JSON with the very bytes of entries' bodies, which hashes are
// over: without escaping what matters only inside a page, and so not as a page.
func writeExact(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // fails only when the client has gone
}

func notFound(w http.ResponseWriter, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(http.StatusNotFound)
	_ = json.NewEncoder(w).Encode(map[string]any{"title": "not found", "status": 404, "detail": detail})
}
