package identity

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"maps"
	"slices"
	"strconv"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// FeatureRetention has the registry take entries about what is kept: the types
// retention, hold and redaction, and validators records of the kinds redaction
// and deletion. Genesis may hold such entries without it.
const FeatureRetention = "retention"

// RetentionID is the id of the one retention entry.
const RetentionID = "retention"

// Retention is the body of the retention entry: how long payloads are kept. What
// it does not name is kept for good, and so is everything without an entry.
type Retention struct {
	// Version is that of this form: 1.
	Version int `json:"version"`
	// Classes by name, each once. The class registry cannot be named: it is never
	// purged.
	Classes []ClassRetention `json:"classes"`
}

// ClassRetention is how long payloads of one class are kept, counted in block
// time from the block that holds them.
type ClassRetention struct {
	Class string `json:"class"`
	// FloorS is the seconds for which every holder must keep them.
	FloorS int64 `json:"floor_s"`
	// CeilingS is the seconds after which nobody may have them any more, but for a
	// legal hold. At least FloorS.
	CeilingS int64 `json:"ceiling_s"`
}

// purgeable are the classes that a retention entry may name; pkg/retention says
// what is in them.
var purgeable = []string{"access", "control", "readings", "request"}

// MaxRetentionS bounds what a retention entry may ask for: a hundred years.
const MaxRetentionS = 100 * 366 * 24 * 3600

// Hold is the body of a hold's entry: records that must be kept for a case,
// whatever ceiling there is. It ends when its entry is revoked.
type Hold struct {
	// Case for which they are kept, and who asked for it.
	Case string `json:"case"`
	By   string `json:"by"`
	// Classes, Junctions and Devices that a record must be of, where given, by
	// what its signer says.
	Classes   []string             `json:"classes,omitempty"`
	Junctions []traffic.JunctionID `json:"junctions,omitempty"`
	Devices   []traffic.DeviceID   `json:"devices,omitempty"`
	// FromUnixMS and ToUnixMS bound the record's time, both included; 0 is open.
	FromUnixMS int64 `json:"from_unix_ms,omitempty"`
	ToUnixMS   int64 `json:"to_unix_ms,omitempty"`
	// Leaves are single records, by their index in the log. Where they are given
	// nothing else may be.
	Leaves []uint64 `json:"leaves,omitempty"`
}

// Redaction is the body of a redaction's entry, whose id is the leaf's index in
// decimal: the tombstone of a record. Whoever holds the record's envelope and
// salt must let go of them; where a hold keeps them, when it ends. It takes
// officials of at least two departments, whatever the governance says.
type Redaction struct {
	// Commitment is the leaf's. A redaction with another than the leaf at its index
	// has is void.
	Commitment Digest `json:"commitment"`
	// Basis is the legal basis, one of [Bases].
	Basis string `json:"basis"`
	// Reference names the decision, for instance a file number. Nothing of what is
	// redacted belongs here: it is public for good.
	Reference string `json:"reference,omitempty"`
}

// Basis is a legal basis for a redaction.
type Basis struct{ Code, Text string }

// Bases lists what a redaction may rest on.
func Bases() []Basis {
	return []Basis{
		{"court-order", "order of a court"},
		{"erasure-request", "a person's right to erasure, as GDPR article 17"},
		{"minor", "data on a child, collected without the consent that it needed"},
		{"not-necessary", "personal data that the purpose did not need, as GDPR article 5 (1) c"},
		{"statutory-ban", "a law that forbids to keep it"},
		{"unlawful-collection", "personal data that was collected without a legal basis"},
	}
}

// DeletionID is the signer's name in a receipt of deletion by a validator.
func DeletionID(validator uint64) string { return "validator-" + strconv.FormatUint(validator, 10) }

// ChangesRegistry reports whether records of the kind hold a [Change].
func (k RecordKind) ChangesRegistry() bool { return k == KindRegistry || k == KindRedaction }

const (
	maxWords = 256  // bytes of free text in an entry
	maxOf    = 1000 // members of a list in a hold
)

func (p *Retention) check(id string) error {
	bad := func(format string, args ...any) error { return kind.Errorf(kind.Invalid, format, args...) }
	if id != RetentionID {
		return bad("id: %.40q: the one retention entry is %q", id, RetentionID)
	}
	if p.Version != 1 {
		return bad("body.version: %d, must be 1", p.Version)
	}
	for i, c := range p.Classes {
		switch {
		case !slices.Contains(purgeable, c.Class):
			return bad("body.classes[%d].class: %.20q: must be of %v", i, c.Class, purgeable)
		case i > 0 && c.Class <= p.Classes[i-1].Class:
			return bad("body.classes[%d].class: %q: classes must be in order and once", i, c.Class)
		case c.FloorS < 0 || c.FloorS > MaxRetentionS:
			return bad("body.classes[%d].floor_s: %d, must be 0 to %d", i, c.FloorS, int64(MaxRetentionS))
		case c.CeilingS < c.FloorS || c.CeilingS > MaxRetentionS:
			return bad("body.classes[%d].ceiling_s: %d, must be the floor of %d to %d", i, c.CeilingS, c.FloorS, int64(MaxRetentionS))
		}
	}
	return nil
}

func (h *Hold) check() error {
	bad := func(format string, args ...any) error { return kind.Errorf(kind.Invalid, "body."+format, args...) }
	switch {
	case h.Case == "" || len(h.Case) > maxWords:
		return bad("case: %d bytes, must be 1 to %d", len(h.Case), maxWords)
	case h.By == "" || len(h.By) > maxWords:
		return bad("by: %d bytes, must be 1 to %d", len(h.By), maxWords)
	case max(len(h.Classes), len(h.Junctions), len(h.Devices), len(h.Leaves)) > maxOf:
		return bad("lists: at most %d each", maxOf)
	case h.FromUnixMS < 0 || h.ToUnixMS < 0 || h.ToUnixMS != 0 && h.ToUnixMS < h.FromUnixMS:
		return bad("to_unix_ms: %d, must not be before from_unix_ms, %d, nor negative", h.ToUnixMS, h.FromUnixMS)
	}
	others := len(h.Classes)+len(h.Junctions)+len(h.Devices) > 0 || h.FromUnixMS != 0 || h.ToUnixMS != 0
	if len(h.Leaves) > 0 && others {
		return bad("leaves: where they are given nothing else may be")
	}
	for i, c := range h.Classes {
		if !slices.Contains(purgeable, c) {
			return bad("classes[%d]: %.20q: must be of %v", i, c, purgeable)
		}
	}
	return nil
}

func (x *Redaction) check(id string) error {
	if n, err := strconv.ParseUint(id, 10, 64); err != nil || strconv.FormatUint(n, 10) != id {
		return kind.Errorf(kind.Invalid, "id: %.40q: must be the index of a leaf", id)
	}
	switch {
	case len(x.Commitment) != sha256.Size:
		return kind.Errorf(kind.Invalid, "body.commitment: must be given")
	case !slices.ContainsFunc(Bases(), func(b Basis) bool { return b.Code == x.Basis }):
		return kind.Errorf(kind.Invalid, "body.basis: %.40q is none; see the list of legal bases", x.Basis)
	case len(x.Reference) > maxWords:
		return kind.Errorf(kind.Invalid, "body.reference: %d bytes, at most %d", len(x.Reference), maxWords)
	}
	return nil
}

// putKept checks an entry about what is kept.
func (r *Registry) putKept(height uint64, t EntryType, id string, body json.RawMessage) (done func(), err error) {
	if height != 0 && !r.loading && !r.Active(FeatureRetention, height) {
		return nil, kind.Errorf(kind.Invalid, "type: %s: the feature %q is not in force", t, FeatureRetention)
	}
	switch t {
	case TypeRetention:
		p := new(Retention)
		if err := parseBody(body, p); err != nil {
			return nil, err
		}
		if err := p.check(id); err != nil {
			return nil, err
		}
		return func() { r.retention = p }, nil
	case TypeHold:
		h := new(Hold)
		if err := parseBody(body, h); err != nil {
			return nil, err
		}
		if err := h.check(); err != nil {
			return nil, err
		}
		return func() {
			r.holds = maps.Clone(r.holds) // shared with clones
			if r.holds == nil {
				r.holds = map[string]*Hold{}
			}
			r.holds[id] = h
		}, nil
	}
	x := new(Redaction)
	if err := parseBody(body, x); err != nil {
		return nil, err
	}
	return func() {}, x.check(id)
}

// Retention returns how long payloads are kept, with the entry that says so; ok
// is false where there is none. Callers must not change it.
func (r *Registry) Retention() (p *Retention, e Entry, ok bool) {
	if r.retention == nil {
		return nil, Entry{}, false
	}
	e, ok = r.Entry(TypeRetention, RetentionID)
	return r.retention, e, ok
}

// Holds returns the holds in force, by id. Callers must not change it.
func (r *Registry) Holds() map[string]*Hold { return r.holds }

// Tombstone is a redaction that was agreed.
type Tombstone struct {
	Index uint64
	Redaction
	// Since is the block that holds the redaction; Entry the registry's.
	Since uint64
	Entry Entry
}

// Tombstones returns the redactions that blocks after a height hold, by block
// and index.
func (r *Registry) Tombstones(after uint64) []Tombstone {
	var out []Tombstone
	for _, e := range r.entries { // sorted below
		if e.Type != TypeRedaction || e.Since <= after {
			continue
		}
		if t, err := ParseTombstone(e); err == nil { // was checked when it was filed
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Tombstone) int {
		return cmp.Or(cmp.Compare(a.Since, b.Since), cmp.Compare(a.Index, b.Index))
	})
	return out
}

// ParseTombstone decodes a redaction's entry.
func ParseTombstone(e Entry) (Tombstone, error) {
	t := Tombstone{Since: e.Since, Entry: e}
	if e.Type != TypeRedaction {
		return t, kind.Errorf(kind.Invalid, "registry entry: is a %.20s and no redaction", string(e.Type))
	}
	if err := parseBody(e.Body, &t.Redaction); err != nil {
		return t, err
	}
	if err := t.check(e.ID); err != nil {
		return t, err
	}
	var err error
	t.Index, err = strconv.ParseUint(e.ID, 10, 64)
	return t, err
}

// Void reports whether a redaction means nothing, given the commitment of the
// leaf at its index and the size of the log before the block that holds it.
func (t Tombstone) Void(commitment []byte, before uint64) bool {
	return t.Index >= before || !bytes.Equal(t.Commitment, commitment)
}
