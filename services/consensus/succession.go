package consensus

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// succession is how the validators changed since genesis, with the proof of each
// change: what an accusation of a later one needs, and what a newcomer begins
// from. It is a file of its own, as the blocks that prove it may be few among
// millions; where it is lost it is made again from them.
type succession struct {
	path    string
	genesis []byte

	mu    sync.Mutex
	steps []ledger.Step
	sets  []ledger.Council // one more
}

// openSuccession reads the file. One that cannot be read is as good as none.
func openSuccession(dir string, genesis []byte) (s *succession, damaged, err error) {
	s = &succession{path: filepath.Join(dir, "succession"), genesis: genesis}
	b, err := os.ReadFile(s.path)
	if err == nil {
		if damaged = json.Unmarshal(b, &s.steps); damaged == nil {
			s.sets, damaged = ledger.CheckSteps(genesis, s.steps)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if s.sets == nil {
		s.steps = nil
		s.sets, err = ledger.CheckSteps(genesis, nil)
		return s, damaged, err
	}
	return s, nil, nil
}

// since is the height of the last change, 0 for genesis.
func (s *succession) since() ledger.Height {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sets[len(s.sets)-1].Since
}

// councils returns the sets, that of genesis first.
func (s *succession) councils() []ledger.Council {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sets)
}

// until returns the steps that lead to the set since a block.
func (s *succession) until(since ledger.Height) ([]ledger.Step, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.sets, func(c ledger.Council) bool { return c.Since == since })
	if i < 0 {
		return nil, false
	}
	return slices.Clone(s.steps[:i]), true
}

// whole returns all steps.
func (s *succession) whole() []ledger.Step {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.steps)
}

// add keeps a step that follows the last one, durable on return. One that is
// known is not added again.
func (s *succession) add(step *ledger.Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if step.Height() <= s.sets[len(s.sets)-1].Since {
		return nil
	}
	return s.keep(append(slices.Clone(s.steps), *step))
}

// cut drops the steps of blocks after a height.
func (s *succession) cut(height ledger.Height) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.steps)
	for n > 0 && s.sets[n].Since > height {
		n--
	}
	if n == len(s.steps) {
		return nil
	}
	return s.keep(slices.Clone(s.steps[:n]))
}

// at returns the validators who decide a block.
func (s *succession) at(h ledger.Height) ledger.Council {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := len(s.sets) - 1
	for i > 0 && s.sets[i].Since >= h {
		i--
	}
	return s.sets[i]
}

// replace keeps other steps instead, durable on return.
func (s *succession) replace(steps []ledger.Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keep(steps)
}

// keep needs mu.
func (s *succession) keep(steps []ledger.Step) error {
	sets, err := ledger.CheckSteps(s.genesis, steps)
	if err != nil {
		return fmt.Errorf("succession: %w", err)
	}
	b, err := json.Marshal(steps)
	if err != nil {
		return fmt.Errorf("succession: %w", err)
	}
	if err := replaceFile(s.path, b); err != nil {
		return err
	}
	s.steps, s.sets = steps, sets
	return nil
}

// openSuccession opens the file in a validator's folder.
func (k *core) openSuccession(dir string) (*succession, error) {
	s, damaged, err := openSuccession(dir, k.genesisBytes)
	if damaged != nil {
		k.log.Warn("succession of the validators not used", "err", damaged)
	}
	return s, err
}

// succeed keeps the step of a block. It is about what others may have to be shown
// some day: without it this validator goes on all the same.
func (k *core) succeed(b *ledger.Block, m *pb.Block, before *ledger.Frontier, validators []identity.Validator) {
	s, err := stepOf(b, m, before, validators)
	if err == nil {
		err = k.succession.add(s)
	}
	if err != nil {
		k.log.Error("change of the validators not noted", "height", uint64(b.Header.Height), "err", err)
	}
}

// stepOf makes the step of a block that changed the validators; before is the log
// before it, validators are those who decided it.
func stepOf(b *ledger.Block, m *pb.Block, before *ledger.Frontier, validators []identity.Validator) (*ledger.Step, error) {
	kept := m.Registry
	if len(m.Batches) > 0 {
		var err error
		if kept, err = keptOf(m); err != nil {
			return nil, err
		}
	}
	for _, k := range kept {
		r := k.Record
		if c := wire.Candidate(r.Envelope, r.Salt); c.Change == nil || c.Change.Type != identity.TypeValidator {
			continue
		}
		return ledger.NewStep(b, before, int(k.Leaf), ledger.Salt(r.Salt), r.Envelope, validators)
	}
	return nil, fmt.Errorf("block %d: holds no change of the validators", b.Header.Height)
}

// catchUpSuccession brings the succession to where the blocks are: a crash may
// have left a step of a block that is not stored, and a folder of before has no
// file of it.
func (k *core) catchUpSuccession() error {
	if err := k.succession.cut(k.store.height()); err != nil {
		return err
	}
	have, want := k.succession.since(), ledger.Height(k.state.registry.MembersSince())
	if have == want || have > want && have <= k.store.height() {
		return nil
	}
	if k.store.first() > 1 {
		k.log.Error("how the validators came to be is not known: accusations of later ones cannot be proven here", "since", uint64(want))
		return nil
	}
	st, _, err := newState(k.genesisBytes)
	if err != nil {
		return err
	}
	steps := []ledger.Step{}
	f := &follower{nil, st.tree, st.registry, st.registryHash}
	for h := ledger.Height(1); h <= k.store.height(); h++ {
		m, err := k.store.headers(h)
		if err != nil {
			return err
		}
		b, err := wire.BlockFromProto(m)
		if err != nil {
			return fmt.Errorf("store: block %d: %w", h, err)
		}
		before, validators := f.tree.Clone(), f.registry.Validators()
		f.tree.Append(b.Leaves)
		if err := f.advance(b, m); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if ledger.Height(f.registry.MembersSince()) == h {
			s, err := stepOf(b, m, before, validators)
			if err != nil {
				return fmt.Errorf("store: %w", err)
			}
			steps = append(steps, *s)
		}
	}
	k.log.Info("succession of the validators made again from the blocks", "changes", len(steps))
	return k.succession.replace(steps)
}

// registryAt returns the registry with a hash, which is that in the header of a
// block stored here.
func (k *core) registryAt(h ledger.Height, hash ledger.Hash) (*identity.Registry, error) {
	b, _, err := k.shelf.registry(hash[:], 0, maxSnapshot, func() (ledger.Hash, *identity.Registry) {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.state.registryHash, k.state.registry
	})
	if err != nil {
		return nil, err
	}
	if b != nil {
		return identity.ParseSnapshot(b)
	}
	if k.store.first() > 1 {
		return nil, fmt.Errorf("registry at block %d: is not kept, and the blocks since genesis are not here", h)
	}
	st, _, err := newState(k.genesisBytes)
	if err != nil {
		return nil, err
	}
	reg := st.registry
	for at := ledger.Height(1); at < h; at++ {
		m, err := k.store.headers(at)
		if err != nil {
			return nil, err
		}
		if reg, err = registryAfter(reg, at, m); err != nil {
			return nil, err
		}
	}
	if got := ledger.Hash(reg.Hash()); got != hash {
		return nil, fmt.Errorf("registry at block %d: is %x here, %x is asked for", h, got[:8], hash[:8])
	}
	return reg, nil
}

// accuse keeps an accusation with what shows who the members were. It is durable
// on return; news says that there was none like it.
func (v *Validator) accuse(a *ledger.Accusation) (news bool, err error) {
	if a.Kind == ledger.AccusedVotes {
		m, err := ledger.ParseMessage(a.Votes[0])
		if err != nil {
			return false, err
		}
		steps, ok := v.core.succession.until(ledger.Height(m.Config))
		if !ok {
			return false, fmt.Errorf("votes for the validators since block %d: there are none such", m.Config)
		}
		a.Members = steps
	}
	return v.evidence.add(a)
}

// accuseBlocks keeps an accusation of those who decided two blocks at one height.
func (v *Validator) accuseBlocks(ours, theirs *ledger.Block) (news bool, err error) {
	set := v.core.succession.at(ours.Header.Height)
	a := ledger.NewBlockAccusation(ours, theirs, set.Validators)
	if a.Members, _ = v.core.succession.until(set.Since); ours.Header.RegistryVersion > 0 {
		reg, err := v.core.registryAt(ours.Header.Height, ours.Header.Registry)
		if err != nil {
			return false, err
		}
		x, err := ledger.Excerpts(reg, nil)
		if err != nil {
			return false, err
		}
		for k := range a.Blocks {
			a.Blocks[k].Registry = x // of one parent, and so the same
		}
	}
	return v.evidence.add(a)
}
