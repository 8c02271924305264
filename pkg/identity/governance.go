package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// The actions of a change.
const (
	Put    = "put"
	Revoke = "revoke"
)

// GovernanceID is the id of the one governance entry.
const GovernanceID = "registry"

// Bounds of what a change and a rule may ask the validators to check.
const (
	// MaxApprovals is the most that one change may carry.
	MaxApprovals = 16
	// MaxRules is the most that a governance entry may hold.
	MaxRules = 64
)

// Governance is the body of the governance entry: whose signatures a change to
// the registry needs. A registry without the entry asks for one registrar for
// everything.
type Governance struct {
	// Version is that of this form: 1.
	Version int `json:"version"`
	// Rules, the most telling first: type and action, then type alone.
	Rules []Rule `json:"rules,omitempty"`
	// Default is what everything else needs.
	Default Need `json:"default"`
}

// Rule is what changes to one type of entry need.
type Rule struct {
	Type EntryType `json:"type"`
	// Action is put or revoke; empty is both.
	Action string `json:"action,omitempty"`
	Need
}

// Need is how many officials must have signed a change.
type Need struct {
	// Role that each of them must have.
	Role string `json:"role"`
	// Officials is how many, 1 to MaxApprovals+1: the sender of the record counts.
	Officials int `json:"officials"`
	// Departments is of how many different departments, 1 to Officials.
	Departments int `json:"departments"`
	// Named, where given, are the only officials that count, by id.
	Named []string `json:"named,omitempty"`
}

// String says what is needed, for people.
func (n Need) String() string {
	s := fmt.Sprintf("%s of %s with role %s", count(n.Officials, "official"), count(n.Departments, "department"), n.Role)
	if len(n.Named) > 0 {
		s += " among " + strings.Join(n.Named, ", ")
	}
	return s
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return strconv.Itoa(n) + " " + what
}

// Counts reports whether an active official's signature is one of those needed.
func (n Need) Counts(id string, o Official) bool {
	return slices.Contains(o.Roles, n.Role) && (len(n.Named) == 0 || slices.Contains(n.Named, id))
}

// met reports whether officials of these departments, one word an official, are
// enough.
func (n Need) met(departments []string) bool {
	return len(departments) >= n.Officials && len(distinct(departments)) >= n.Departments
}

// Progress says how far signatures of officials that count, one department an
// official, go towards what is needed, for people.
func (n Need) Progress(departments []string) string {
	return fmt.Sprintf("needs %v, %s", n, has(departments))
}

// has says who has signed, for people.
func has(departments []string) string {
	if len(departments) == 0 {
		return "has none"
	}
	return fmt.Sprintf("has %d of %s", len(departments), strings.Join(distinct(departments), ", "))
}

func distinct(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// oneRegistrar is what a registry without a governance entry asks for.
var oneRegistrar = Governance{Version: 1, Default: Need{Role: Registrar, Officials: 1, Departments: 1}}

// check returns the first thing that is wrong with the form.
func (g *Governance) check() error {
	bad := func(format string, args ...any) error { return kind.Errorf(kind.Invalid, "body."+format, args...) }
	if g.Version != 1 {
		return bad("version: %d, must be 1", g.Version)
	}
	if n := len(g.Rules); n > MaxRules {
		return bad("rules: %d, at most %d", n, MaxRules)
	}
	for i, r := range g.Rules {
		at := fmt.Sprintf("rules[%d]", i)
		if !known(r.Type) {
			return bad("%s.type: %.20q is unknown", at, string(r.Type))
		}
		if r.Action != "" && r.Action != Put && r.Action != Revoke {
			return bad("%s.action: %.20q: must be put, revoke or empty for both", at, r.Action)
		}
		for k := range i {
			if g.Rules[k].Type == r.Type && g.Rules[k].Action == r.Action {
				return bad("%s: is for the same type and action as rules[%d]", at, k)
			}
		}
		if err := r.Need.check(at); err != nil {
			return err
		}
	}
	return g.Default.check("default")
}

func (n Need) check(at string) error {
	switch {
	case n.Role == "":
		return kind.Errorf(kind.Invalid, "body.%s.role: must not be empty", at)
	case n.Officials < 1 || n.Officials > MaxApprovals+1:
		return kind.Errorf(kind.Invalid, "body.%s.officials: %d, must be 1 to %d", at, n.Officials, MaxApprovals+1)
	case n.Departments < 1 || n.Departments > n.Officials:
		return kind.Errorf(kind.Invalid, "body.%s.departments: %d, must be 1 to the %d officials", at, n.Departments, n.Officials)
	case len(distinct(n.Named)) != len(n.Named):
		return kind.Errorf(kind.Invalid, "body.%s.named: holds a name twice", at)
	}
	return nil
}

// Need returns what a change to a type of entry needs.
func (g *Governance) Need(t EntryType, action string) Need {
	for _, a := range []string{action, ""} {
		for _, r := range g.Rules {
			if r.Type == t && r.Action == a {
				return r.Need
			}
		}
	}
	return g.Default
}

// Governance returns what is in force; filed is false where there is no entry.
// Callers must not change it.
func (r *Registry) Governance() (g *Governance, filed bool) {
	if r.governance == nil {
		return &oneRegistrar, false
	}
	return r.governance, true
}

// official returns an active official.
func (r *Registry) official(id string) (Official, bool) {
	e, ok := r.entries[entryKey(TypeOfficial, id)]
	if !ok || e.Status != Active {
		return Official{}, false
	}
	var o Official
	return o, strict(e.Body, &o) == nil
}

// possible refuses a governance that, with the officials there are, would leave
// something that nobody could ever change. without is an official who is about to
// go.
func (r *Registry) possible(g *Governance, without string) error {
	officials := map[string]Official{}
	for _, e := range r.entries { // into a map again, so the order is no matter
		if e.Type == TypeOfficial && e.ID != without {
			if o, ok := r.official(e.ID); ok {
				officials[e.ID] = o
			}
		}
	}
	possible := func(at string, n Need) error {
		var departments []string
		for id, o := range officials { // only counted
			if n.Counts(id, o) {
				departments = append(departments, o.Department)
			}
		}
		if !n.met(departments) {
			return kind.Errorf(kind.Conflict, "governance: %s needs %v, and the registry %s", at, n, has(departments))
		}
		return nil
	}
	if err := possible("default", g.Default); err != nil {
		return err
	}
	for i, rule := range g.Rules {
		if err := possible(fmt.Sprintf("rules[%d]", i), rule.Need); err != nil {
			return err
		}
	}
	return nil
}

// Digest is a SHA-256, in JSON as 64 hex digits.
type Digest []byte

// MarshalText writes the digest as hex.
func (d Digest) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, d), nil }

// UnmarshalText reads 64 hex digits.
func (d *Digest) UnmarshalText(b []byte) error {
	return unhex((*[]byte)(d), b, sha256.Size, "digest")
}

// Signature is an Ed25519 signature, in JSON as 128 hex digits.
type Signature []byte

// MarshalText writes the signature as hex.
func (s Signature) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s), nil }

// UnmarshalText reads 128 hex digits.
func (s *Signature) UnmarshalText(b []byte) error {
	return unhex((*[]byte)(s), b, ed25519.SignatureSize, "signature")
}

func unhex(to *[]byte, b []byte, size int, what string) error {
	v, err := hex.DecodeString(string(b))
	if err != nil || len(v) != size {
		return fmt.Errorf("%s: must be %d hex digits", what, 2*size)
	}
	*to = v
	return nil
}

// Approval is an official's signature on a change that somebody else sends: see
// [ApprovalInput].
type Approval struct {
	Key       KeyID     `json:"key_id"`
	Signature Signature `json:"signature"`
}

const approvalDomain = "stopline registry approval v1\n"

// ApprovalInput returns the bytes under an approval, lines that end in "\n":
//
//	stopline registry approval v1
//	district
//	action
//	type
//	id
//	nonce, decimal
//	until, decimal
//	base, hex: see [Registry.Base]
//	SHA-256 of the body without insignificant white space, hex; of nothing
//	where there is no body
//
// None of them can hold a line feed in a change that is carried out. The base
// ties the approval to what it is to replace: after any other change to the same
// entry it is worth nothing. The nonce is used up for everybody who signed.
func ApprovalInput(c Change) ([]byte, error) {
	var body bytes.Buffer
	if len(c.Body) > 0 {
		if err := json.Compact(&body, c.Body); err != nil {
			return nil, kind.Errorf(kind.Invalid, "body: %w", err)
		}
	}
	if len(c.Base) != sha256.Size {
		return nil, kind.Errorf(kind.Invalid, "base: must be %d bytes, has %d: an approval is for what the entry was", sha256.Size, len(c.Base))
	}
	return fmt.Appendf(nil, "%s%s\n%s\n%s\n%s\n%d\n%d\n%x\n%x\n", approvalDomain,
		c.District, c.Action, c.Type, c.ID, c.Nonce, c.Until, []byte(c.Base), sha256.Sum256(body.Bytes())), nil
}

// Approve signs a change as it stands; its approvals are not covered.
func Approve(key ed25519.PrivateKey, c Change) (Approval, error) {
	in, err := ApprovalInput(c)
	if err != nil {
		return Approval{}, err
	}
	return Approval{Key: IDOf(key.Public().(ed25519.PublicKey)), Signature: ed25519.Sign(key, in)}, nil
}

// Hash returns the SHA-256 of [Entry.Marshal].
func (e Entry) Hash() Digest {
	h := sha256.Sum256(e.Marshal())
	return h[:]
}

// Base returns what a change to an entry must name as its base: the hash of the
// entry as it is, or zeros where there is none.
func (r *Registry) Base(t EntryType, id string) Digest {
	if e, ok := r.entries[entryKey(t, id)]; ok {
		return e.Hash()
	}
	return make(Digest, sha256.Size)
}

// approved checks who stands behind a change, and returns them all: its sender
// first. Every approval must be good, whether it is needed or not.
func (r *Registry) approved(height uint64, signer KeyID, sender Holder, c Change) ([]KeyID, error) {
	g, _ := r.Governance()
	need := g.Need(c.Type, c.Action)
	if !sender.May(KindRegistry) {
		return nil, kind.Errorf(kind.Denied, "key_id: %s %s may not change the registry: the role %q is needed", sender.Type, sender.ID, need.Role)
	}
	if r.Active(FeatureBaseRequired, height) && len(c.Base) == 0 {
		from, _ := r.FeatureFrom(FeatureBaseRequired)
		return nil, kind.Errorf(kind.Invalid, "base: must be given: feature %s is in force from block %d on", FeatureBaseRequired, from)
	}
	if c.Type == TypeRedaction && need.Departments < 2 {
		return nil, kind.Errorf(kind.Denied, "type: a redaction needs at least two departments, and the registry's governance asks for %v", need)
	}
	if n := len(c.Approvals); n > MaxApprovals {
		return nil, kind.Errorf(kind.Invalid, "approvals: %d, at most %d", n, MaxApprovals)
	}
	if base := r.Base(c.Type, c.ID); len(c.Base) > 0 && !bytes.Equal(c.Base, base) {
		return nil, kind.Errorf(kind.Stale, "base: the change is to %.8x, and %s %.40q is %.8x by now: propose it again", []byte(c.Base), c.Type, c.ID, []byte(base))
	}
	keys := []KeyID{signer}
	switch ok, err := r.vouched(height, c); {
	case err != nil:
		return nil, err
	case ok:
		return keys, nil
	}
	var departments []string
	if o, ok := r.official(sender.ID); ok && sender.Type == TypeOfficial && need.Counts(sender.ID, o) {
		departments = append(departments, o.Department)
	}
	if len(c.Approvals) > 0 {
		in, err := ApprovalInput(c)
		if err != nil {
			return nil, err
		}
		for i, a := range c.Approvals {
			o, err := r.approver(need, keys, a, c.Nonce)
			if err == nil && !VerifyBytes(ed25519.PublicKey(o.Key), in, a.Signature) {
				err = kind.Errorf(kind.Denied, "signature: is not that of %s over this change", a.Key)
			}
			if err != nil {
				return nil, kind.Errorf(kind.Of(err), "approvals[%d].%w", i, err)
			}
			keys, departments = append(keys, a.Key), append(departments, o.Department)
		}
	}
	if !need.met(departments) {
		return nil, kind.Errorf(kind.Denied, "approvals: %.20s of a %.20s %s", c.Action, string(c.Type), need.Progress(departments))
	}
	return keys, nil
}

// approver returns the official behind an approval, whose signature is still to
// be checked. had are those who signed already.
func (r *Registry) approver(need Need, had []KeyID, a Approval, nonce uint64) (Official, error) {
	h, ok := r.holders[a.Key]
	if !ok {
		return Official{}, kind.Errorf(kind.Denied, "key_id: %.32q is not in the registry", string(a.Key))
	}
	o, active := r.official(h.ID)
	switch {
	case h.Type != TypeOfficial:
		return o, kind.Errorf(kind.Denied, "key_id: %s %s is no official", h.Type, h.ID)
	case !active:
		return o, kind.Errorf(kind.Denied, "key_id: official %s is revoked", h.ID)
	case slices.Contains(had, a.Key):
		return o, kind.Errorf(kind.Conflict, "key_id: official %s has signed already", h.ID)
	case !need.Counts(h.ID, o):
		return o, kind.Errorf(kind.Denied, "key_id: official %s does not count: needed are %v", h.ID, need)
	case r.nonces[nonceKey{a.Key, nonce}]:
		return o, kind.Errorf(kind.Conflict, "key_id: official %s has used the nonce %d before", h.ID, nonce)
	}
	return o, nil
}
