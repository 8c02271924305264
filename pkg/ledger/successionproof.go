package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// successionFormat names the form of a [SuccessionProof].
const successionFormat = "stopline succession v1"

// MaxSuccession is the largest [SuccessionProof], bytes.
const MaxSuccession = 64 << 20

// SuccessionProof shows who the validators of a district are now, to somebody who
// pinned the genesis document: a [Step] for each block that changed them, the
// oldest first. It is one JSON document with the fields format, which is
// "stopline succession v1", and steps.
type SuccessionProof struct {
	Steps []Step
}

// successionDoc is the stored form.
type successionDoc struct {
	Format string `json:"format"`
	Steps  []Step `json:"steps"`
}

// Marshal returns the document.
func (p *SuccessionProof) Marshal() ([]byte, error) {
	doc := successionDoc{successionFormat, p.Steps}
	if doc.Steps == nil {
		doc.Steps = []Step{}
	}
	b, err := json.MarshalIndent(doc, "", " ")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// ParseSuccessionProof decodes a document; it verifies nothing.
func ParseSuccessionProof(b []byte) (*SuccessionProof, error) {
	if len(b) > MaxSuccession {
		return nil, fmt.Errorf("succession: %d bytes, at most %d are taken", len(b), MaxSuccession)
	}
	var doc successionDoc
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&doc); err != nil {
		return nil, fmt.Errorf("succession: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("succession: must be one JSON document")
	}
	if doc.Format != successionFormat {
		return nil, fmt.Errorf("succession: format %.60q, must be %q", doc.Format, successionFormat)
	}
	return &SuccessionProof{doc.Steps}, nil
}

// Line is a [Succession] that was proven, with what it takes to say which set a
// checkpoint is of.
type Line struct {
	*Succession
	from []uint64 // size of the log from which on set i+1 decides
}

// Verify follows the validators from genesis on. policy is the district's for the
// first set, as the verifier trusts it.
//
// Whoever makes the proof can end it early: then it shows who the validators were
// some time ago, and only the age of what they have signed tells. Validators of
// long ago, of whom a quorum give their old keys away, can make another end; the
// witnesses that a policy needs besides them are against that. What [Step] does
// not show holds here too.
func (p *SuccessionProof) Verify(genesisJSON []byte, policy *Policy) (*Line, error) {
	g, err := identity.ParseGenesis(genesisJSON)
	if err != nil {
		return nil, err
	}
	s, err := NewSuccession(g, policy)
	if err != nil {
		return nil, err
	}
	l := &Line{Succession: s}
	genesis := sha256.Sum256(genesisJSON)
	size := uint64(0)
	for i := range p.Steps {
		h, next, err := p.Steps[i].check(genesis, l.sets[len(l.sets)-1])
		if err == nil && h.Size <= size {
			err = fmt.Errorf("block %d: size: does not come after the step before", h.Height)
		}
		if err == nil {
			size = h.Size
			err = l.Change(next.Since, next.Validators)
		}
		if err != nil {
			return nil, fmt.Errorf("succession: steps[%d]: %w", i, err)
		}
		l.from = append(l.from, size)
	}
	return l, nil
}

// OpenNewest verifies a signed checkpoint under the policy of the set that decided
// the last of its entries, and returns that set with it.
func (l *Line) OpenNewest(signed []byte) (*Sealed, Council, error) {
	text, _, ok := bytes.Cut(signed, []byte("\n\n"))
	if !ok || len(signed) > MaxNote {
		return nil, Council{}, errors.New("checkpoint: is no signed note")
	}
	c, err := ParseCheckpoint(string(text) + "\n")
	if err != nil {
		return nil, Council{}, err
	}
	set := l.sets[0]
	for i, from := range l.from {
		if c.Size > from {
			set = l.sets[i+1]
		}
	}
	sealed, err := set.Policy.Open(signed)
	return sealed, set, err
}
