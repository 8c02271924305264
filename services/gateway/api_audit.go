package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// auditor asks audit, which has the index, the payloads and the log: HTTP over
// requests on the bus. Who is behind a question is the gateway's to check.
type auditor struct{ c *http.Client }

func newAuditor(b *bus.Bus, d traffic.DistrictID) *auditor {
	return &auditor{&http.Client{Transport: b.RoundTripper(topic.Ask(d, topic.AuditUser, "http"))}}
}

// raw returns the body of an answer. Errors have the kind that audit gave them.
func (a *auditor) raw(ctx context.Context, path string, q url.Values) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://audit"+path+"?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	res, err := a.c.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, kind.Errorf(kind.Unavailable, "audit cannot be asked: %w", err)
	}
	defer func() { _ = res.Body.Close() }() // it is in memory
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "audit: %w", err)
	}
	if res.StatusCode == http.StatusOK {
		return b, nil
	}
	var p problem
	if json.Unmarshal(b, &p) != nil || p.Detail == "" {
		p.Detail = res.Status
	}
	k := kind.Internal
	switch res.StatusCode {
	case http.StatusBadRequest:
		k = kind.Invalid
	case http.StatusNotFound:
		k = kind.NotFound
	case http.StatusServiceUnavailable:
		k = kind.Unavailable
	}
	return nil, kind.Errorf(k, "%s", p.Detail)
}

func (a *auditor) get(ctx context.Context, path string, q url.Values, into any) error {
	b, err := a.raw(ctx, path, q)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("audit: answer to %s: %w", path, err)
	}
	return nil
}

// indexed is a line of audit's index.
type indexed struct {
	Index     uint64    `json:"index"`
	Height    uint64    `json:"height"`
	Kind      string    `json:"kind"`
	Junction  string    `json:"junction"`
	Device    string    `json:"device"`
	Seq       uint64    `json:"seq"`
	Time      time.Time `json:"time"`
	BlockTime time.Time `json:"block_time"`
	Signer    string    `json:"signer"`
	Rule      string    `json:"rule"`
	Requester string    `json:"requester"`
	Case      string    `json:"case"`
	State     string    `json:"state"`
	Provable  bool      `json:"provable"`
	Command   *struct {
		PolicyVersion string `json:"policy_version"`
		Outcome       string `json:"outcome"`
		Reason        string `json:"reason"`
	} `json:"command"`

	// With its payload, where it was asked for and is held.
	Envelope []byte `json:"envelope"`
	Salt     []byte `json:"salt"`
}

// commitment is that of a record with its payload.
func (r *indexed) commitment() ledger.Hash { return ledger.Commit(ledger.Salt(r.Salt), r.Envelope) }

// agency is that whose record it is, empty where it is nobody's.
func (r *indexed) agency() string {
	a, _, _ := strings.Cut(r.Requester, "/")
	return a
}

type indexPage struct {
	Records []indexed `json:"records"`
	Next    string    `json:"next"`
}

// record returns one line of the index.
func (a *auditor) record(ctx context.Context, index uint64) (r indexed, err error) {
	err = a.get(ctx, fmt.Sprintf("/record/%d", index), nil, &r)
	return r, err
}

// payloads returns records with their payloads, the filters as in /v1/records. A
// page may be shorter than its limit, and have a next one all the same.
func (a *auditor) payloads(ctx context.Context, q url.Values) (p indexPage, err error) {
	err = a.get(ctx, "/payloads", q, &p)
	return p, err
}

// search returns records, the filters as in /v1/records.
func (a *auditor) search(ctx context.Context, q url.Values) (p indexPage, err error) {
	err = a.get(ctx, "/v1/records", q, &p)
	return p, err
}

// set adds filters that are not empty.
func set(q url.Values, pairs ...string) url.Values {
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}

func rfc3339(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
