package retention

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// PendingDir is the folder, in sealing's data folder, of deletions that were begun
// and whose receipts are not in the log yet, one file each.
const PendingDir = "deletions"

// PendingFormat is the first field of such a file.
const PendingFormat = "stopline pending deletion v1"

// The stages of a deletion.
const (
	// Begun: what is in the ranges may be there or gone.
	Begun = "begun"
	// Erased: it is gone from the holder's own files.
	Erased = "erased"
	// Sent: no stream has it any more, and the receipt is on its way into the log.
	Sent = "sent"
)

// Pending is a deletion on its way. It is on disk before anything is let go of.
type Pending struct {
	Format string `json:"format"`
	Stage  string `json:"stage"`
	// Receipt to be; AtUnixMS is set when it is sent.
	Receipt Receipt `json:"receipt"`
	// ErasedUnixMS is when the holder's own files had let go.
	ErasedUnixMS int64 `json:"erased_unix_ms,omitempty"`
	// ReceivedUnixMS is when the first of the records was taken in, and Envelopes
	// are their SHA-256, by which the streams are searched; of redactions only.
	ReceivedUnixMS int64             `json:"received_unix_ms,omitempty"`
	Envelopes      []identity.Digest `json:"envelopes,omitempty"`
	// Envelope is the signed receipt, once there is one.
	Envelope []byte `json:"envelope,omitempty"`
}

// Marshal returns the file's content.
func (p *Pending) Marshal() ([]byte, error) { return json.MarshalIndent(p, "", " ") }

// ParsePending decodes such a file.
func ParsePending(b []byte) (*Pending, error) {
	var p Pending
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return nil, fmt.Errorf("pending deletion: %w", err)
	}
	if p.Format != PendingFormat || !slices.Contains([]string{Begun, Erased, Sent}, p.Stage) {
		return nil, fmt.Errorf("pending deletion: format %.40q, stage %.20q: are not known", p.Format, p.Stage)
	}
	r := p.Receipt
	if r.AtUnixMS == 0 {
		r.AtUnixMS = 1 // is set when the receipt is sent
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("pending deletion: %w", err)
	}
	return &p, nil
}

// Absences is what explains to [ledger.Fsck] that payloads of a data folder are
// gone.
type Absences struct {
	Explained
	pending []*Pending
}

var _ ledger.Absences = (*Absences)(nil)

// NewAbsences reads the deletions of a data folder that have no receipt yet. What
// the log says is added by the check itself.
func NewAbsences(folder fs.FS) (*Absences, error) {
	a := &Absences{}
	es, err := fs.ReadDir(folder, PendingDir)
	if err != nil {
		return a, nil //nolint:nilerr // there are none
	}
	for _, e := range es {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue // being written
		}
		b, err := fs.ReadFile(folder, path.Join(PendingDir, e.Name()))
		if err != nil {
			return nil, err
		}
		p, err := ParsePending(b)
		if err != nil {
			return nil, fmt.Errorf("%s/%s: %w", PendingDir, e.Name(), err)
		}
		a.pending = append(a.pending, p)
	}
	return a, nil
}

// Add implements [ledger.Absences].
func (a *Absences) Add(p *ledger.Payload) {
	e, err := identity.ParseEnvelope(p.Envelope)
	if err != nil {
		return // what it should be is for the check to say
	}
	switch {
	case e.Kind == identity.KindDeletion && e.ContentType == identity.JSON:
		if r, err := ParseReceipt(e.Payload); err == nil {
			a.Receipt(p.Index, r)
		}
	case e.Kind == identity.KindRedaction && e.ContentType == identity.JSON:
		c, err := identity.ParseChange(e.Payload)
		if err != nil {
			return
		}
		t, err := identity.ParseTombstone(identity.Entry{Type: c.Type, ID: c.ID, Since: uint64(p.Height), Body: c.Body})
		if err == nil && t.Index < p.Index {
			a.Tombstone(t)
		}
	}
}

// Explains implements [ledger.Absences].
func (a *Absences) Explains(leaf uint64) bool {
	if _, ok := a.tombstones[leaf]; ok {
		return true
	}
	for _, r := range a.receipts {
		if r.Holder == SealingHolder && r.Covers(leaf) {
			return true
		}
	}
	return a.Unsealed(leaf)
}

// Unsealed reports whether a leaf's payload may be gone by a deletion whose
// receipt is still to come.
func (a *Absences) Unsealed(leaf uint64) bool {
	return slices.ContainsFunc(a.pending, func(p *Pending) bool { return p.Receipt.Covers(leaf) })
}
