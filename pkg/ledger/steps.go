package ledger

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Step is proof that a block changed the validators: its header, with the votes
// of a quorum of those before, and the agreed record, which stands among the
// block's leaves. A chain of steps from genesis on shows who the validators were
// to whoever trusts the genesis document, without the blocks between.
//
// What it does not show is that none was left out. Whoever leaves one out needs
// for the next a quorum of validators of before on a header that they did not
// decide; and a set that was never in force convicts nobody of two votes who did
// not cast them.
type Step struct {
	// Header as [Header.Marshal] encodes it, with what its votes cover.
	Header   []byte        `json:"header"`
	Metadata []byte        `json:"metadata"`
	Votes    []AccusedVote `json:"votes"`
	// Salt and Envelope of the record.
	Salt     []byte `json:"salt"`
	Envelope []byte `json:"envelope"`
	// Index of its leaf in the log, and the inclusion proof to the header's root,
	// from the leaf up.
	Index uint64   `json:"index"`
	Proof [][]byte `json:"proof"`
}

// NewStep returns the step of a block whose leaf number leaf, from 0, is a change
// of the validators. before is the log before the block, validators are those
// who decided it.
func NewStep(b *Block, before *Frontier, leaf int, salt Salt, envelope []byte, validators []identity.Validator) (*Step, error) {
	if leaf < 1 || leaf >= len(b.Leaves) {
		return nil, fmt.Errorf("step: block %d has no record at leaf %d", b.Header.Height, leaf)
	}
	at := b.Header.PrevSize + uint64(leaf)
	proof, err := before.ProveRecord(b.Header.Size, at, leavesOf(b.Leaves))
	if err != nil {
		return nil, fmt.Errorf("step: block %d: %w", b.Header.Height, err)
	}
	s := &Step{Header: b.Header.Marshal(), Metadata: b.Metadata, Salt: salt[:], Envelope: envelope, Index: at, Proof: [][]byte{}}
	for _, h := range proof {
		s.Proof = append(s.Proof, slices.Clone(h[:]))
	}
	for _, v := range ValidVotes(b.Header.Hash(), b.Metadata, b.Votes, validators) {
		s.Votes = append(s.Votes, AccusedVote(v))
	}
	slices.SortFunc(s.Votes, func(x, y AccusedVote) int { return cmpUint(x.Validator, y.Validator) })
	_, _, err = s.check(b.Header.Genesis, Council{Validators: validators})
	return s, err
}

func leavesOf(leaves []Leaf) iter.Seq2[Leaf, error] {
	return func(yield func(Leaf, error) bool) {
		for _, l := range leaves {
			if !yield(l, nil) {
				return
			}
		}
	}
}

// Height returns that of the step's block, 0 if it has none.
func (s *Step) Height() Height {
	h, err := ParseHeader(s.Header)
	if err != nil {
		return 0
	}
	return h.Height
}

// check verifies that the step follows a set, and returns the set after it.
func (s *Step) check(genesis Hash, now Council) (Header, Council, error) {
	fail := func(format string, args ...any) (Header, Council, error) {
		return Header{}, Council{}, fmt.Errorf(format, args...)
	}
	h, err := ParseHeader(s.Header)
	if err != nil {
		return fail("%w", err)
	}
	switch {
	case h.Genesis != genesis:
		return fail("genesis: belongs to another district")
	case h.Height <= now.Since:
		return fail("block %d: does not follow the change at block %d", h.Height, now.Since)
	case len(s.Salt) != len(Salt{}) || len(s.Envelope) > identity.MaxEnvelope:
		return fail("block %d: salt must be 32 bytes, envelope at most %d", h.Height, identity.MaxEnvelope)
	case s.Index <= h.PrevSize || s.Index >= h.Size:
		return fail("block %d: index: %d, is no record of the block", h.Height, s.Index)
	}
	if err := checkAccusedVotes(h, s.Metadata, s.Votes, now.Validators); err != nil {
		return fail("block %d: %w", h.Height, err)
	}
	proof, err := hashes(s.Proof)
	if err != nil {
		return fail("block %d: %w", h.Height, err)
	}
	leaf := Leaf{ClassRecord, Commit(Salt(s.Salt), s.Envelope)}
	if err := CheckInclusion(Checkpoint{Size: h.Size, Root: h.Root}, s.Index, leaf, proof); err != nil {
		return fail("block %d: salt, envelope: are not what the block holds: %w", h.Height, err)
	}
	e, err := identity.ParseEnvelope(s.Envelope)
	if err != nil {
		return fail("block %d: %w", h.Height, err)
	}
	if e.Kind != identity.KindRegistry {
		return fail("block %d: envelope: is a %.20s, not a change of the registry", h.Height, e.Kind)
	}
	c, err := readChange(e)
	if err != nil {
		return fail("block %d: envelope: %w", h.Height, err)
	}
	if c.Type != identity.TypeValidator {
		return fail("block %d: envelope: changes a %.20s, not a validator", h.Height, string(c.Type))
	}
	next, err := identity.ChangeMembers(now.Validators, c)
	if err != nil {
		return fail("block %d: envelope: %w", h.Height, err)
	}
	return h, Council{Since: h.Height, Validators: next}, nil
}

// CheckSteps verifies a chain of steps from a genesis document on, and returns
// the sets of validators, that of genesis first, without policies.
func CheckSteps(genesis []byte, steps []Step) ([]Council, error) {
	first, _, err := validatorsIn(genesis)
	if err != nil {
		return nil, err
	}
	sets := []Council{{Validators: first}}
	hash := sha256.Sum256(genesis)
	for i := range steps {
		_, next, err := steps[i].check(hash, sets[i])
		if err != nil {
			return nil, fmt.Errorf("members[%d]: %w", i, err)
		}
		sets = append(sets, next)
	}
	return sets, nil
}

// checkAccusedVotes verifies votes as documents hold them: of a quorum, all valid,
// each validator's once, by number.
func checkAccusedVotes(h Header, metadata []byte, in []AccusedVote, validators []identity.Validator) error {
	votes := make([]Vote, len(in))
	for k, v := range in {
		if k > 0 && v.Validator <= in[k-1].Validator {
			return fmt.Errorf("votes[%d]: must be by validator, one of each", k)
		}
		votes[k] = Vote(v)
	}
	if err := CheckVotes(h.Hash(), metadata, votes, validators); err != nil {
		return err
	}
	if n := len(ValidVotes(h.Hash(), metadata, votes, validators)); n != len(votes) {
		return fmt.Errorf("votes: %d of %d are not valid", len(votes)-n, len(votes))
	}
	return nil
}

func hashes(proof [][]byte) ([]tlog.Hash, error) {
	if len(proof) > maxProof {
		return nil, fmt.Errorf("proof: %d hashes, at most %d", len(proof), maxProof)
	}
	out := make([]tlog.Hash, len(proof))
	for i, h := range proof {
		if len(h) != tlog.HashSize {
			return nil, fmt.Errorf("proof: a hash must be %d bytes", tlog.HashSize)
		}
		out[i] = tlog.Hash(h)
	}
	return out, nil
}

// ProveRecord returns the inclusion proof of the leaf at an index, which is not
// before the frontier, in a log of the given size that goes on from f with the
// leaves.
func (f *Frontier) ProveRecord(size, index uint64, leaves iter.Seq2[Leaf, error]) ([]tlog.Hash, error) {
	if index < f.size || index >= size || size > math.MaxInt64/2 {
		return nil, fmt.Errorf("proof: leaf %d of %d, the leaves here begin with %d", index, size, f.size)
	}
	p, err := tlog.ProveRecord(int64(size), int64(index), f.grow(size, leaves))
	return p, err
}

// ProvePrefix returns the proof that a log of the given size, which goes on from
// f with the leaves, has a log of n leaves as its beginning; and the root of
// that, n is not before the frontier.
func (f *Frontier) ProvePrefix(size, n uint64, leaves iter.Seq2[Leaf, error]) (proof []tlog.Hash, root Hash, err error) {
	if n < max(1, f.size) || n > size || size > math.MaxInt64/2 {
		return nil, Hash{}, fmt.Errorf("proof: %d of %d leaves, those here begin with %d", n, size, f.size)
	}
	at := f.Clone()
	watched := func(yield func(Leaf, error) bool) {
		for l, err := range leaves {
			if err == nil && at.size < n {
				at.Append([]Leaf{l})
			}
			if !yield(l, err) {
				return
			}
		}
	}
	if proof, err = tlog.ProveTree(int64(size), int64(n), f.grow(size, watched)); err != nil {
		return nil, Hash{}, err
	}
	if n == size { // nothing was asked for
		for l, err := range leaves {
			if err != nil {
				return nil, Hash{}, err
			}
			if at.size == n {
				break
			}
			at.Append([]Leaf{l})
		}
	}
	if at.size != n {
		return nil, Hash{}, fmt.Errorf("proof: the leaves end at %d, %d are due", at.size, n)
	}
	return proof, at.Root(), nil
}

// grow reads the hashes of full subtrees of the log that goes on from f.
func (f *Frontier) grow(size uint64, leaves iter.Seq2[Leaf, error]) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		type subtree struct {
			Frontier
			begin, end uint64
		}
		trees := make([]subtree, len(indexes))
		for i, x := range indexes {
			level, n := tlog.SplitStoredHashIndex(x)
			t := &trees[i]
			t.begin, t.end = uint64(n)<<level, uint64(n+1)<<level
			switch {
			case t.end <= f.size:
				// To the left of the frontier; of those only its own are known.
				if f.size>>level&1 == 0 || t.begin != f.size>>(level+1)<<(level+1) {
					return nil, fmt.Errorf("proof: leaves %d to %d are before the frontier", t.begin, t.end)
				}
				t.size, t.perfect[level] = 1<<level, f.perfect[level]
			case t.begin < f.size:
				t.size = f.size - t.begin // the low bits of f.size: begin is a multiple of 2^level
				copy(t.perfect[:level], f.perfect[:level])
			}
		}
		at := f.size
		for l, err := range leaves {
			if err != nil {
				return nil, err
			}
			if at == size {
				break
			}
			for i := range trees {
				if t := &trees[i]; t.begin <= at && at < t.end {
					t.Append([]Leaf{l})
				}
			}
			at++
		}
		out := make([]tlog.Hash, len(indexes))
		for i := range trees {
			t := &trees[i]
			if t.size != t.end-t.begin {
				return nil, fmt.Errorf("proof: the leaves end at %d, %d are due", at, t.end)
			}
			out[i] = tlog.Hash(t.Root())
		}
		return out, nil
	})
}

// errOthers means that a set of validators is not the one in a header's registry.
var errOthers = errors.New("registry: names other validators than the members given lead to")

// inRegistry verifies that a set is the one in the registry of a header, by
// excerpts that show all validators in it.
func inRegistry(h Header, excerpts []identity.Excerpt, validators []identity.Validator) error {
	if h.RegistryVersion == 0 {
		if len(excerpts) > 0 {
			return errors.New("registry: has no place where the registry is that of genesis")
		}
		return nil
	}
	_, have, finding := registryOf(&BundleBlock{Header: h, Registry: excerpts}, "")
	if finding != nil {
		return fmt.Errorf("registry: %s%s", finding.File, finding.Reason)
	}
	same := slices.EqualFunc(byNumber(have), byNumber(validators), func(a, b identity.Validator) bool {
		return a.Number == b.Number && bytes.Equal(a.VoteKey, b.VoteKey) && bytes.Equal(a.CosignKey, b.CosignKey)
	})
	if !same {
		return errOthers
	}
	return nil
}

func byNumber(vs []identity.Validator) []identity.Validator {
	vs = slices.Clone(vs)
	slices.SortFunc(vs, func(a, b identity.Validator) int { return cmpUint(a.Number, b.Number) })
	return vs
}
