package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// ProposalFormat is the first field of a proposal's document.
const ProposalFormat = "stopline registry proposal v1"

// Proposal is a change on its way round the officials who have to approve it: a
// JSON document that people can read. It holds what the change replaces, so that
// each of them can see the difference without asking anybody: the base, which
// every approval covers, is the hash of that.
type Proposal struct {
	Format string `json:"format"`
	// Replaces is the entry that the change was made to; nil where there is none.
	Replaces *Entry `json:"replaces,omitempty"`
	Change   Change `json:"change"`
}

// Propose returns the proposal of a change to what is in force, nil for nothing.
func Propose(c Change, inForce *Entry) (*Proposal, error) {
	c.Base, c.Approvals = make(Digest, sha256.Size), nil
	if inForce != nil {
		c.Base = inForce.Hash()
	}
	p := &Proposal{Format: ProposalFormat, Replaces: inForce, Change: c}
	return p, p.check()
}

// ParseProposal decodes a proposal and checks that it is one: that what it says
// to replace is what the approvals are for, and that its body means to every
// reader what it means to the validators. Whether the registry takes the change
// is not known here.
func ParseProposal(b []byte) (*Proposal, error) {
	if len(b) > 4*MaxEnvelope {
		return nil, kind.Errorf(kind.Invalid, "proposal: %d bytes, at most %d", len(b), 4*MaxEnvelope)
	}
	var p Proposal
	if err := strict(b, &p); err != nil {
		return nil, kind.Errorf(kind.Invalid, "proposal: %w", err)
	}
	// The document is indented; what is hashed and sent is not.
	for _, body := range []*json.RawMessage{&p.Change.Body, p.replacedBody()} {
		if body == nil || len(*body) == 0 {
			continue
		}
		var c bytes.Buffer
		if err := json.Compact(&c, *body); err != nil {
			return nil, kind.Errorf(kind.Invalid, "proposal: body: %w", err)
		}
		*body = c.Bytes()
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return &p, nil
}

func (p *Proposal) replacedBody() *json.RawMessage {
	if p.Replaces == nil {
		return nil
	}
	return &p.Replaces.Body
}

func (p *Proposal) check() error {
	bad := func(format string, args ...any) error { return kind.Errorf(kind.Invalid, "proposal: "+format, args...) }
	c := &p.Change
	switch {
	case p.Format != ProposalFormat:
		return bad("format: %.60q, must be %q", p.Format, ProposalFormat)
	case c.District == "":
		return bad("change.district: must not be empty")
	case c.Action != Put && c.Action != Revoke:
		return bad("change.action: %.20q: must be put or revoke", c.Action)
	case !known(c.Type):
		return bad("change.type: %.20q is unknown", string(c.Type))
	case c.ID == "" || len(c.ID) > MaxID || strings.ContainsFunc(c.ID, func(r rune) bool { return r < ' ' }):
		return bad("change.id: %.40q: 1 to %d bytes without control characters", c.ID, MaxID)
	case c.Action == Put && len(c.Body) == 0:
		return bad("change.body: must be given to put")
	case c.Action == Revoke && len(c.Body) > 0:
		return bad("change.body: must not be given to revoke")
	case len(c.Approvals) > MaxApprovals:
		return bad("change.approvals: %d, at most %d", len(c.Approvals), MaxApprovals)
	case p.Replaces != nil && (p.Replaces.Type != c.Type || p.Replaces.ID != c.ID):
		return bad("replaces: is %s %.40q, the change is to %s %.40q", p.Replaces.Type, p.Replaces.ID, c.Type, c.ID)
	}
	if len(c.Body) > 0 {
		if err := plain(c.Body); err != nil {
			return bad("change.body: %w", err)
		}
	}
	want := make(Digest, sha256.Size)
	if p.Replaces != nil {
		want = p.Replaces.Hash()
	}
	if !bytes.Equal(c.Base, want) {
		return bad("change.base: %.8x is not the hash of what it replaces, %.8x", []byte(c.Base), []byte(want))
	}
	for i, a := range c.Approvals {
		if slices.ContainsFunc(c.Approvals[:i], func(b Approval) bool { return b.Key == a.Key }) {
			return bad("change.approvals[%d]: %.32s has signed already", i, string(a.Key))
		}
	}
	return nil
}

// plain refuses documents that readers may take for different things: JSON says
// nothing of names that occur twice, and Go's decoder knows fields in any case.
func plain(doc []byte) error {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	type level struct {
		names map[string]bool // nil in a list
		value bool            // in an object: a value is next, not a name
	}
	var in []level
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if open, ok := t.(json.Delim); ok && (open == '}' || open == ']') {
			in = in[:len(in)-1]
			continue
		}
		if n := len(in); n > 0 && in[n-1].names != nil {
			if top := &in[n-1]; top.value {
				top.value = false
			} else {
				name, _ := t.(string) // the decoder allows nothing else here
				// By way of capitals, since some letters have the same and differ else.
				fold := strings.ToLower(strings.ToUpper(name))
				if top.names[fold] {
					return fmt.Errorf("the name %.40q occurs twice in one object", name)
				}
				top.names[fold], top.value = true, true
				continue
			}
		}
		if open, ok := t.(json.Delim); ok {
			l := level{}
			if open == '{' {
				l.names = map[string]bool{}
			}
			in = append(in, l)
		}
	}
}

// Marshal returns the document, indented.
func (p *Proposal) Marshal() ([]byte, error) { return unescaped(p, " ") }

// Marshal returns the change as the JSON payload of a registry record. It keeps
// the body's bytes, which approvals cover: [json.Marshal] writes some letters of
// it in another way.
func (c Change) Marshal() ([]byte, error) {
	b, err := unescaped(c, "")
	return bytes.TrimSuffix(b, []byte("\n")), err
}

func unescaped(v any, indent string) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	err := e.Encode(v)
	return b.Bytes(), err
}
