package ledger

import (
	"crypto/ed25519"
	"fmt"
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
	// Policy is met by its quorum.
	Policy *Policy
}

// NewSuccession returns one that begins with genesis. policy is the district's,
// which holds for the first set.
func NewSuccession(g *identity.Genesis, policy *Policy) (*Succession, error) {
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, err
	}
	return &Succession{g, []Council{{0, reg.Validators(), policy}}}, nil
}

// Change adds the set that a block has left. One that is known already is not
// added again.
func (s *Succession) Change(since Height, validators []identity.Validator) error {
	if last := s.sets[len(s.sets)-1]; last.Since >= since {
		return nil
	}
	b, err := CouncilPolicy(s.genesis, validators)
	if err != nil {
		return err
	}
	p, err := ParsePolicy(b)
	if err != nil {
		return err
	}
	s.sets = append(s.sets, Council{since, validators, p})
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
// and a quorum of validators: what whoever trusts them pins.
func CouncilPolicy(g *identity.Genesis, validators []identity.Validator) ([]byte, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "log %s\n", g.LogKey)
	var names []string
	for _, v := range validators {
		c, err := NewCosigner(CosignerName(g.Origin, v.Number), ed25519.PublicKey(v.CosignKey))
		if err != nil {
			return nil, fmt.Errorf("validator %d: %w", v.Number, err)
		}
		names = append(names, fmt.Sprintf("validator-%d", v.Number))
		fmt.Fprintf(&b, "witness validator-%d %s\n", v.Number, c)
	}
	fmt.Fprintf(&b, "group validators %d %s\nquorum validators\n", Quorum(len(validators)), strings.Join(names, " "))
	return []byte(b.String()), nil
}
