package sealing

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// successionFile, below the data folder, holds the sets of validators after that of
// genesis: a [ledger.SuccessionProof], for ourselves and for others. Where nobody
// had the record any more that made one of them, it is a list without proofs. There
// is none before the first change. It can be made again from the blocks; with it,
// opening need not.
const successionFile = "succession.json"

type council struct {
	Since      ledger.Height        `json:"since"`
	Validators []identity.Validator `json:"validators"`
}

// loadSuccession is called once, by OpenStore.
func (s *Store) loadSuccession() error {
	path := filepath.Join(s.o.Dir, successionFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if p, err := ledger.ParseSuccessionProof(b); err == nil {
		line, err := p.Verify(s.o.GenesisJSON, s.policy)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		s.succession, s.steps = line.Succession, p.Steps
		return nil
	}
	var list []council
	if err := json.Unmarshal(b, &list); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range list {
		if err := s.succession.Change(c.Since, c.Validators); err != nil {
			return fmt.Errorf("%s: since %d: %w", path, c.Since, err)
		}
	}
	return nil
}

// succeed makes durable who the validators are after some blocks. A crash before
// the blocks are journalled leaves what they will say again.
func (s *Store) succeed(blocks []*decided.Block) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.ContainsFunc(blocks, func(b *decided.Block) bool { return b.Validators != nil }) {
		return nil
	}
	changed := false
	tree := s.tiler.Frontier()
	for _, b := range blocks {
		before := tree.Clone()
		tree.Append(b.Leaves)
		sets := s.succession.Sets()
		last := sets[len(sets)-1]
		if b.Validators == nil || last.Since >= b.Header.Height || slices.EqualFunc(b.Validators, last.Validators, sameValidator) {
			continue
		}
		if err := s.succession.Change(b.Header.Height, b.Validators); err != nil {
			return fmt.Errorf("block %d: %w", b.Header.Height, err)
		}
		step, err := stepOf(b, before, last.Validators)
		if err != nil {
			return fmt.Errorf("block %d: %w", b.Header.Height, err)
		}
		if step != nil && len(s.steps) == len(sets)-1 { // none before is missing
			s.steps = append(s.steps, *step)
		}
		changed = true
	}
	if !changed {
		return nil
	}
	out := ledger.MarshalSuccession(s.succession)
	if len(s.steps) == len(s.succession.Sets())-1 {
		var err error
		if out, err = (&ledger.SuccessionProof{Steps: s.steps}).Marshal(); err != nil {
			return err
		}
	}
	return s.files.write(filepath.Join(s.o.Dir, successionFile), out)
}

func sameValidator(a, b identity.Validator) bool {
	return a.Number == b.Number && bytes.Equal(a.VoteKey, b.VoteKey) && bytes.Equal(a.CosignKey, b.CosignKey)
}

// stepOf returns the proof that a block changed the validators, nil where its
// records are gone.
func stepOf(b *decided.Block, before *ledger.Frontier, validators []identity.Validator) (*ledger.Step, error) {
	for _, r := range b.Records {
		if !r.Accepted {
			continue
		}
		e, err := identity.ParseEnvelope(r.Raw)
		if err != nil || e.Kind != identity.KindRegistry {
			continue
		}
		c := wire.Candidate(r.Raw, r.Salt[:])
		if c.Err != nil || c.Change.Type != identity.TypeValidator {
			continue // decided has seen to it that agreed ones can be decoded
		}
		return ledger.NewStep(&b.Block, before, int(r.Index-b.Header.PrevSize), r.Salt, r.Raw, validators)
	}
	return nil, nil
}

// readSuccession returns the proof that a data folder has for others.
func readSuccession(dir string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, successionFile))
	if errors.Is(err, fs.ErrNotExist) {
		return (&ledger.SuccessionProof{}).Marshal()
	}
	if err != nil {
		return nil, err
	}
	if _, err := ledger.ParseSuccessionProof(b); err != nil {
		return nil, fmt.Errorf("there is no proof of all changes here: %w", fs.ErrNotExist)
	}
	return b, nil
}

// pinnable reports whether enough of the first validators are among those of a
// set, with the same keys, for the district's policy to be met.
func (s *Store) pinnable(c ledger.Council) bool {
	first := s.Council(0).Validators
	n := 0
	for _, v := range c.Validators {
		if slices.ContainsFunc(first, func(o identity.Validator) bool { return bytes.Equal(o.CosignKey, v.CosignKey) }) {
			n++
		}
	}
	return n >= ledger.Quorum(len(first))
}
