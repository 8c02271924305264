package retention

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Range is leaf indexes from First to Last, both included.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// Has reports whether an index is in the range.
func (r Range) Has(index uint64) bool { return r.First <= index && index <= r.Last }

// ReceiptFormat is the first field of a receipt.
const ReceiptFormat = "stopline deletion v1"

// SealingHolder is who keeps the payload store, in its receipts: the service of
// that id. A validator is [identity.DeletionID].
const SealingHolder = "sealing"

// The reasons for which a holder lets go of payloads.
const (
	// ByRetention: they were older than the registry's retention entry says.
	ByRetention = "retention"
	// ByRedaction: a redaction was agreed.
	ByRedaction = "redaction"
)

// MaxRanges is the most that one receipt may hold.
const MaxRanges = 1000

// Receipt is a holder's word that it does not hold records any more, in any file,
// stream or log of its own: the JSON payload of a record of the kind deletion,
// signed by the holder's key. It is sealed like every record, and never purged.
type Receipt struct {
	Format   string             `json:"format"`
	District traffic.DistrictID `json:"district"`
	// Holder is the signer's id: a service's, or validator-<number>.
	Holder string `json:"holder"`
	Reason string `json:"reason"`
	// Class of the records; empty where the holder keeps all classes together.
	Class Class `json:"class,omitempty"`
	// Ranges, in rising order: every record of the class in them is gone.
	Ranges []Range `json:"ranges"`
	// Count is how many records were let go of; 0 where the holder did not count.
	Count uint64 `json:"count,omitempty"`
	// Policy is the hash of the registry's entry that asked for it: of the retention
	// entry, or of the redaction.
	Policy identity.Digest `json:"policy"`
	// AtUnixMS is when the last trace was gone, by the holder's clock.
	AtUnixMS int64 `json:"at_unix_ms"`
}

// Marshal returns the receipt's payload.
func (r *Receipt) Marshal() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

// ParseReceipt decodes a receipt and checks its form.
func ParseReceipt(b []byte) (*Receipt, error) {
	var r Receipt
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, fmt.Errorf("receipt of deletion: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("receipt of deletion: data after the end of the document")
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return &r, nil
}

func (r *Receipt) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("receipt of deletion: "+format, args...)
	}
	switch {
	case r.Format != ReceiptFormat:
		return bad("format: %.40q, must be %q", r.Format, ReceiptFormat)
	case r.District == "":
		return bad("district: must not be empty")
	case r.Holder == "":
		return bad("holder: must not be empty")
	case r.Reason != ByRetention && r.Reason != ByRedaction:
		return bad("reason: %.20q, must be %s or %s", r.Reason, ByRetention, ByRedaction)
	case r.Class != "" && (!r.Class.Valid() || r.Class == Registry):
		return bad("class: %.20q: must be empty or one that can be purged", string(r.Class))
	case len(r.Ranges) == 0 || len(r.Ranges) > MaxRanges:
		return bad("ranges: %d, must be 1 to %d", len(r.Ranges), MaxRanges)
	case len(r.Policy) != 32:
		return bad("policy: must be given")
	case r.AtUnixMS <= 0:
		return bad("at_unix_ms: %d, must be positive", r.AtUnixMS)
	}
	for i, g := range r.Ranges {
		if g.Last < g.First || i > 0 && g.First <= r.Ranges[i-1].Last {
			return bad("ranges[%d]: %d to %d: must rise and not touch the one before", i, g.First, g.Last)
		}
	}
	if r.Reason == ByRedaction && slices.ContainsFunc(r.Ranges, func(g Range) bool { return g.First != g.Last }) {
		return bad("ranges: a redaction is of single records")
	}
	return nil
}

// Covers reports whether the receipt is for a leaf.
func (r *Receipt) Covers(index uint64) bool {
	i, ok := slices.BinarySearchFunc(r.Ranges, index, func(g Range, x uint64) int {
		switch {
		case g.Last < x:
			return -1
		case g.First > x:
			return 1
		}
		return 0
	})
	return ok && r.Ranges[i].Has(index)
}

// Explained is what the log says about payloads that are gone. Its zero value
// knows of nothing.
type Explained struct {
	receipts   []sealedReceipt
	tombstones map[uint64]identity.Tombstone
}

type sealedReceipt struct {
	*Receipt
	leaf uint64
}

// Receipt takes in a receipt from the log, by its leaf.
func (x *Explained) Receipt(leaf uint64, r *Receipt) {
	x.receipts = append(x.receipts, sealedReceipt{r, leaf})
}

// Tombstone takes in an agreed redaction.
func (x *Explained) Tombstone(t identity.Tombstone) {
	if x.tombstones == nil {
		x.tombstones = map[uint64]identity.Tombstone{}
	}
	x.tombstones[t.Index] = t
}

// Registry takes in all tombstones of a registry.
func (x *Explained) Registry(reg *identity.Registry) {
	for _, t := range reg.Tombstones(0) {
		x.Tombstone(t)
	}
}

// Why says, for people, why the holder of the payload store may not have a
// record any more, given its leaf's index and commitment; ok is false where
// nothing in the log explains it: then it is damage.
func (x *Explained) Why(index uint64, commitment [32]byte) (why string, ok bool) {
	if t, ok := x.tombstones[index]; ok && bytes.Equal(t.Commitment, commitment[:]) {
		return fmt.Sprintf("redacted by block %d, legal basis %s", t.Since, t.Basis), true
	}
	for _, r := range x.receipts {
		if r.Holder == SealingHolder && r.Covers(index) {
			return fmt.Sprintf("let go of by %s, receipt of deletion at leaf %d", r.Reason, r.leaf), true
		}
	}
	return "", false
}
