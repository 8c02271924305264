package ledger

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Succession is who decided which blocks of a chain, from genesis on. A block
// that changes the validators is decided, and its checkpoint cosigned, by those
// before it; all after it by those that it leaves. So each set names the next
// under its own signatures.
//
// A policy that somebody pinned names one set. It verifies the checkpoints of
// that set, and a later one only where enough of the same keys have cosigned it
// too.
type Succession struct {
	genesis *identity.Genesis
	sets    []Council // by Since
}

// Council is one set of validators.
type Council struct {
	// Since is the height of the block that made it, 0 for genesis: it decided the
	// blocks after that.
	Since      Height
	Validators []identity.Validator
	// Policy is the district's, with these validators in the place of the first.
	Policy *Policy
	// Quorum is met by enough of the validators alone: what they owe before
	// witnesses are asked.
	Quorum *Policy
}

// NewSuccession returns one that begins with genesis. policy is the district's,
// which holds for the first set; where it names witnesses besides the validators,
// these must be one group of it, whose place later sets take.
func NewSuccession(g *identity.Genesis, policy *Policy) (*Succession, error) {
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, err
	}
	s := &Succession{genesis: g}
	first := reg.Validators()
	quorum, err := quorumOf(g, first)
	if err != nil {
		return nil, err
	}
	s.sets = []Council{{0, first, policy, quorum}}
	return s, nil
}

func quorumOf(g *identity.Genesis, validators []identity.Validator) (*Policy, error) {
	b, err := CouncilPolicy(g, validators)
	if err != nil {
		return nil, err
	}
	return ParsePolicy(b)
}

// Change adds the set that a block has left. One that is known already is not
// added again.
func (s *Succession) Change(since Height, validators []identity.Validator) error {
	if last := s.sets[len(s.sets)-1]; last.Since >= since {
		return nil
	}
	quorum, err := quorumOf(s.genesis, validators)
	if err != nil {
		return err
	}
	b, err := s.sets[0].Policy.succeed(s.genesis, s.sets[0].Validators, validators)
	if err != nil {
		return err
	}
	p, err := ParsePolicy(b)
	if err != nil {
		return err
	}
	s.sets = append(s.sets, Council{since, validators, p, quorum})
	return nil
}

// At returns the set that decides block h.
func (s *Succession) At(h Height) Council {
	i := len(s.sets) - 1
	for s.sets[i].Since >= h && i > 0 {
		i--
	}
	return s.sets[i]
}

// Sets returns all sets, the first one first. Callers must not change it.
func (s *Succession) Sets() []Council { return s.sets }

// Open verifies the signed checkpoint of the log after block h under the policy
// of the set that decided it.
func (s *Succession) Open(h Height, signed []byte) (*Sealed, error) {
	return s.At(h).Policy.Open(signed)
}

// CouncilPolicy returns the policy file, C2SP tlog-policy, of a district's log
// and a quorum of validators: what whoever trusts them, and nobody else, pins.
func CouncilPolicy(g *identity.Genesis, validators []identity.Validator) ([]byte, error) {
	return DistrictPolicy(g, validators, nil, 0)
}

// DistrictPolicy returns the policy file of a district's log that needs a quorum
// of validators and at least need of other witnesses, such as neighbouring
// districts. The others are named also where none is needed: their URLs say where
// cosignatures can be had.
func DistrictPolicy(g *identity.Genesis, validators []identity.Validator, others []Witness, need int) ([]byte, error) {
	if need < 0 || need > len(others) {
		return nil, fmt.Errorf("policy: %d of %d witnesses cannot be needed", need, len(others))
	}
	w := policyWriter{}
	fmt.Fprintf(&w, "log %s\n", g.LogKey)
	if err := w.validators(g, "validators", validators); err != nil {
		return nil, err
	}
	var names []string
	for _, o := range others {
		w.witness(o)
		names = append(names, o.Name)
	}
	if need > 0 {
		fmt.Fprintf(&w, "group neighbours %d %s\ngroup district all validators neighbours\nquorum district\n", need, strings.Join(names, " "))
	} else {
		w.WriteString("quorum validators\n")
	}
	if _, err := ParsePolicy([]byte(w.String())); err != nil {
		return nil, err
	}
	return []byte(w.String()), nil
}

type policyWriter struct{ strings.Builder }

func (w *policyWriter) witness(o Witness) {
	fmt.Fprintf(w, "witness %s %s", o.Name, o.Cosigner)
	if o.URL != "" {
		w.WriteString(" " + o.URL)
	}
	w.WriteByte('\n')
}

// validators writes the validators and the group of their quorum.
func (w *policyWriter) validators(g *identity.Genesis, group string, validators []identity.Validator) error {
	var names []string
	for _, v := range validators {
		c, err := NewCosigner(CosignerName(g.Origin, v.Number), ed25519.PublicKey(v.CosignKey))
		if err != nil {
			return fmt.Errorf("validator %d: %w", v.Number, err)
		}
		name := fmt.Sprintf("validator-%d", v.Number)
		names = append(names, name)
		w.witness(Witness{Name: name, Cosigner: c})
	}
	fmt.Fprintf(w, "group %s %d %s\n", group, Quorum(len(validators)), strings.Join(names, " "))
	return nil
}

// succeed returns the policy with other validators in the place of those that it
// was made with. What it says of anybody else stays.
func (p *Policy) succeed(g *identity.Genesis, from, to []identity.Validator) ([]byte, error) {
	first := map[int]bool{}
	for i, w := range p.witnesses {
		first[i] = slices.ContainsFunc(from, func(v identity.Validator) bool { return w.key.Equal(ed25519.PublicKey(v.CosignKey)) })
	}
	w := policyWriter{}
	fmt.Fprintf(&w, "log %s\n", g.LogKey)
	for i, o := range p.witnesses {
		if !first[i] {
			w.witness(o)
		}
	}
	if p.quorum == nil || !slices.ContainsFunc(p.quorum.all(nil), func(i int) bool { return !first[i] }) {
		if err := w.validators(g, "validators", to); err != nil { // nobody else is needed
			return nil, err
		}
		w.WriteString("quorum validators\n")
		return []byte(w.String()), nil
	}
	placed := false
	var write func(c *component) error
	write = func(c *component) error {
		switch all := c.all(nil); {
		case !slices.ContainsFunc(all, func(i int) bool { return first[i] }):
			if c.witness >= 0 {
				return nil // written above
			}
		case !slices.ContainsFunc(all, func(i int) bool { return !first[i] }):
			if placed || len(all) != len(from) {
				return errors.New("policy: the validators are not one group: no others can take their place")
			}
			placed = true
			return w.validators(g, c.name, to)
		}
		names := make([]string, len(c.children))
		for i, k := range c.children {
			if err := write(k); err != nil {
				return err
			}
			names[i] = k.name
		}
		fmt.Fprintf(&w, "group %s %d %s\n", c.name, c.need, strings.Join(names, " "))
		return nil
	}
	if err := write(p.quorum); err != nil {
		return nil, err
	}
	fmt.Fprintf(&w, "quorum %s\n", p.quorum.name)
	return []byte(w.String()), nil
}
