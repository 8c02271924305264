package ledger

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// MaxPolicy is the largest policy file, bytes.
const MaxPolicy = 64 << 10

// Policy says whose signatures a checkpoint needs: C2SP tlog-policy. See
// [ParsePolicy].
type Policy struct {
	logs       []logKey
	witnesses  []Witness
	components map[string]*component
	quorum     *component // nil: none needed
}

type logKey struct {
	verifier note.Verifier
	key      ed25519.PublicKey
}

// Witness is one cosigner that a policy names.
type Witness struct {
	Name string // in the policy
	*Cosigner
	// URL is the witness' submission prefix, C2SP tlog-witness; "" where the policy
	// does not say.
	URL string
}

// component is a witness or a group.
type component struct {
	name     string
	witness  int // index into Policy.witnesses, -1 for a group
	need     int
	children []*component
	used     bool // by a group or as the quorum
}

// ParsePolicy decodes a policy file: lines of fields separated by spaces or tabs;
// lines that begin with # are comments.
//
//	log <vkey> [url]
//	witness <name> <vkey> [url]
//	group <name> <all|any|number> <name>...
//	quorum <name|none>
//
// Beyond the specification we refuse a policy without a log, keys other than
// Ed25519, URLs that are not of HTTP, and one key as a log's and a witness'.
func ParsePolicy(b []byte) (*Policy, error) {
	if len(b) > MaxPolicy {
		return nil, fmt.Errorf("policy: %d bytes, at most %d are taken", len(b), MaxPolicy)
	}
	p := &Policy{components: map[string]*component{}}
	quorum := false
	keys := map[string]bool{}
	for i, line := range strings.Split(string(b), "\n") {
		for k := range len(line) {
			if c := line[k]; c < ' ' && c != '\t' || c == 0x7f {
				return nil, fmt.Errorf("policy: line %d: control character %#02x", i+1, c)
			}
		}
		f := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })
		if len(f) == 0 || f[0][0] == '#' {
			continue
		}
		if err := p.line(f, keys, &quorum); err != nil {
			return nil, fmt.Errorf("policy: line %d: %w", i+1, err)
		}
	}
	switch {
	case len(p.logs) == 0:
		return nil, errors.New("policy: log: at least one is needed")
	case !quorum:
		return nil, errors.New("policy: quorum: must be given")
	}
	return p, nil
}

func (p *Policy) line(f []string, keys map[string]bool, quorum *bool) error {
	add := func(c *component) error {
		if c.name == "none" || p.components[c.name] != nil {
			return fmt.Errorf("%s: name %.60q is taken", f[0], c.name)
		}
		p.components[c.name] = c
		return nil
	}
	url := func(at int) error {
		if len(f) > at+1 || len(f) == at+1 && !strings.HasPrefix(f[at], "http://") && !strings.HasPrefix(f[at], "https://") {
			return fmt.Errorf("%s: %.60q is more than a key and a URL", f[0], strings.Join(f[at:], " "))
		}
		return nil
	}
	switch {
	case f[0] == "log" && len(f) >= 2:
		v, k, err := parseLogKey(f[1])
		if err != nil {
			return fmt.Errorf("log: key %.80q: %w", f[1], err)
		}
		if keys[string(k)] {
			return fmt.Errorf("log: key of %s is used twice", v.Name())
		}
		keys[string(k)] = true
		p.logs = append(p.logs, logKey{v, k})
		return url(2)
	case f[0] == "witness" && len(f) >= 3:
		c, err := ParseCosigner(f[2])
		if err != nil {
			return fmt.Errorf("witness: %w", err)
		}
		if keys[string(c.key)] {
			return fmt.Errorf("witness: key of %s is used twice", f[1])
		}
		keys[string(c.key)] = true
		w := Witness{Name: f[1], Cosigner: c}
		if err := url(3); err != nil {
			return err
		}
		if len(f) > 3 {
			w.URL = f[3]
		}
		p.witnesses = append(p.witnesses, w)
		return add(&component{name: f[1], witness: len(p.witnesses) - 1, need: 1})
	case f[0] == "group" && len(f) >= 4:
		g := &component{name: f[1], witness: -1}
		for _, n := range f[3:] {
			c := p.components[n]
			if c == nil {
				return fmt.Errorf("group: %.60q is not defined before", n)
			}
			if c.used {
				return fmt.Errorf("group: %.60q is used twice", n)
			}
			c.used = true
			g.children = append(g.children, c)
		}
		switch n, err := strconv.Atoi(f[2]); {
		case f[2] == "any":
			g.need = 1
		case f[2] == "all":
			g.need = len(g.children)
		case err != nil || n < 1 || n > len(g.children) || strconv.Itoa(n) != f[2]:
			return fmt.Errorf("group: threshold %.20q: must be any, all or 1 to %d", f[2], len(g.children))
		default:
			g.need = n
		}
		return add(g)
	case f[0] == "quorum" && len(f) == 2:
		if *quorum {
			return errors.New("quorum: given twice")
		}
		*quorum = true
		if f[1] == "none" {
			return nil
		}
		c := p.components[f[1]]
		if c == nil {
			return fmt.Errorf("quorum: %.60q is not defined before", f[1])
		}
		p.quorum = c
		return nil
	}
	return fmt.Errorf("%.60q: unknown keyword or too few fields", strings.Join(f, " "))
}

// parseLogKey decodes a log's verifier key.
func parseLogKey(vkey string) (note.Verifier, ed25519.PublicKey, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, nil, err
	}
	_, rest, _ := strings.Cut(vkey, "+")
	_, k64, _ := strings.Cut(rest, "+")
	k, err := base64.StdEncoding.DecodeString(k64)
	if err != nil || len(k) != 1+ed25519.PublicKeySize {
		return nil, nil, errors.New("must be Ed25519")
	}
	return v, k[1:], nil
}

// met reports whether the witnesses that signed suffice.
func (c *component) met(signed map[int]bool) bool {
	if c.witness >= 0 {
		return signed[c.witness]
	}
	n := 0
	for _, k := range c.children {
		if k.met(signed) {
			n++
		}
	}
	return n >= c.need
}

// all collects the witnesses that count towards c.
func (c *component) all(out []int) []int {
	if c.witness >= 0 {
		return append(out, c.witness)
	}
	for _, k := range c.children {
		out = k.all(out)
	}
	return out
}

// Verifier makes a Policy a [note.Verifiers].
func (p *Policy) Verifier(name string, hash uint32) (note.Verifier, error) {
	for _, l := range p.logs {
		if l.verifier.Name() == name && l.verifier.KeyHash() == hash {
			return l.verifier, nil
		}
	}
	for _, w := range p.witnesses {
		if w.name == name && w.hash == hash {
			return w.Cosigner, nil
		}
	}
	return nil, &note.UnknownVerifierError{Name: name, KeyHash: hash}
}

// Witnesses returns the cosigners that count towards the quorum.
func (p *Policy) Witnesses() []Witness {
	if p.quorum == nil {
		return nil
	}
	idx := p.quorum.all(nil)
	slices.Sort(idx)
	out := make([]Witness, len(idx))
	for i, k := range idx {
		out[i] = p.witnesses[k]
	}
	return out
}

// AllWitnesses returns every cosigner that the policy names, also those that it
// does not need.
func (p *Policy) AllWitnesses() []Witness { return slices.Clone(p.witnesses) }

// MetBy reports whether cosignatures by these keys, and no others, are enough.
func (p *Policy) MetBy(keys ...ed25519.PublicKey) bool {
	signed := map[int]bool{}
	for i, w := range p.witnesses {
		signed[i] = slices.ContainsFunc(keys, func(k ed25519.PublicKey) bool { return k.Equal(w.key) })
	}
	return p.quorum == nil || p.quorum.met(signed)
}

// Origins returns the names of the logs.
func (p *Policy) Origins() []string {
	out := make([]string, len(p.logs))
	for i, l := range p.logs {
		out[i] = l.verifier.Name()
	}
	return out
}

// Fingerprint names a public key for people to compare: SHA-256 in hex.
func Fingerprint(key ed25519.PublicKey) string {
	h := sha256.Sum256(key)
	return hex.EncodeToString(h[:])
}

// Fingerprints returns the fingerprint of every key in the policy by the name
// that it signs with.
func (p *Policy) Fingerprints() map[string]string {
	out := map[string]string{}
	for _, l := range p.logs {
		out[l.verifier.Name()] = Fingerprint(l.key)
	}
	for _, w := range p.witnesses {
		out[w.name] = Fingerprint(w.key)
	}
	return out
}

// Cosignature is one valid cosignature by a witness of a policy.
type Cosignature struct {
	Witness Witness
	At      time.Time // whole seconds, UTC
	counts  bool      // towards the quorum
}

// Sealed is a checkpoint that satisfies a policy.
type Sealed struct {
	Checkpoint
	LogKey       ed25519.PublicKey
	Cosignatures []Cosignature // by time
}

// ExistedBy returns the time by which everything in the checkpoint existed: the
// (f+1)-th smallest time among the cosignatures that count towards the quorum,
// with f the faults that so many witnesses bear. At least one of these f+1 is by
// an honest witness, and none of the others makes it earlier. ok is false where
// too few signed to say.
func (s *Sealed) ExistedBy(p *Policy) (at time.Time, ok bool) {
	f := Faults(len(p.Witnesses()))
	for _, c := range s.Cosignatures {
		if !c.counts {
			continue
		}
		if f == 0 {
			return c.At, true
		}
		f--
	}
	return time.Time{}, false
}

// MaxNote is the largest signed checkpoint, bytes.
const MaxNote = 64 << 10

// Open verifies a signed checkpoint: a log of the policy signed it under its own
// name, and the quorum cosigned it. Signatures of keys that the policy does not
// name are ignored; a wrong signature of a key that it names is an error.
func (p *Policy) Open(signed []byte) (*Sealed, error) {
	if len(signed) > MaxNote {
		return nil, fmt.Errorf("checkpoint: %d bytes, at most %d are taken", len(signed), MaxNote)
	}
	n, err := note.Open(signed, p)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	c, err := ParseCheckpoint(n.Text)
	if err != nil {
		return nil, err
	}
	s := &Sealed{Checkpoint: c}
	signers := map[int]bool{}
	for _, sig := range n.Sigs {
		for _, l := range p.logs {
			if sig.Name == l.verifier.Name() && sig.Hash == l.verifier.KeyHash() && sig.Name == c.Origin {
				s.LogKey = l.key
			}
		}
		for i, w := range p.witnesses {
			if sig.Name != w.name || sig.Hash != w.hash {
				continue
			}
			at, err := cosignatureTime(sig)
			if err != nil {
				return nil, err
			}
			signers[i] = true
			s.Cosignatures = append(s.Cosignatures, Cosignature{Witness: w, At: at,
				counts: p.quorum != nil && slices.Contains(p.quorum.all(nil), i)})
		}
	}
	if s.LogKey == nil {
		return nil, fmt.Errorf("checkpoint: not signed by the log %s with a key of the policy", c.Origin)
	}
	if p.quorum != nil && !p.quorum.met(signers) {
		return nil, fmt.Errorf("checkpoint: cosigned by %d witnesses of the policy, which does not meet its quorum %q", len(signers), p.quorum.name)
	}
	slices.SortStableFunc(s.Cosignatures, func(a, b Cosignature) int { return a.At.Compare(b.At) })
	return s, nil
}
