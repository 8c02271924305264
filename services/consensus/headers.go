package consensus

import (
	"errors"
	"fmt"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// follower goes along the chain without executing it: by headers, leaves and
// votes, and by the records that change the registry, which are always there.
// It knows at every block who may vote and what the registry must be, and
// nothing of devices.
type follower struct {
	last         *ledger.Header
	tree         *ledger.Frontier
	registry     *identity.Registry
	registryHash ledger.Hash
}

func (f *follower) height() ledger.Height {
	if f.last == nil {
		return 0
	}
	return f.last.Height
}

// members are those who decide the next block.
func (f *follower) members() *members { return membersOf(f.registry) }

// errStripped means that a block came without the registry records that it had.
var errStripped = errors.New("payload: registry records were left out")

// follow returns a follower at the last block stored.
func (k *core) follow() (*follower, error) {
	k.mu.Lock()
	f := &follower{k.state.last, k.state.tree.Clone(), k.state.registry, k.state.registryHash}
	k.mu.Unlock()
	for h := f.height() + 1; h <= k.store.height(); h++ {
		m, err := k.store.headers(h)
		if err != nil {
			return nil, err
		}
		b, err := wire.BlockFromProto(m)
		if err != nil {
			return nil, fmt.Errorf("store: block %d: %w", h, err)
		}
		// Checked when it was stored.
		if b.Header.Registry != f.registryHash {
			return nil, fmt.Errorf("store: block %d: the registry here has hash %x, the block's %x", h, f.registryHash[:8], b.Header.Registry[:8])
		}
		f.tree.Append(b.Leaves)
		if err := f.advance(b, m); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	return f, nil
}

// advance goes on to a block whose leaves are in the tree.
func (f *follower) advance(b *ledger.Block, m *pb.Block) error {
	reg, err := registryAfter(f.registry, b.Header.Height, m)
	if err != nil {
		return err
	}
	if reg != f.registry {
		f.registry, f.registryHash = reg, ledger.Hash(reg.Hash())
	}
	h := b.Header
	f.last = &h
	return nil
}

// checkHeaders verifies a block and returns the follower after it. The payload
// is held against header and leaves if it is there.
func (k *core) checkHeaders(f *follower, m *pb.Block) (*follower, stored, error) {
	b, err := wire.BlockFromProto(m)
	if err != nil {
		return nil, stored{}, err
	}
	h := b.Header
	tree := f.tree.Clone()
	if err := b.Check(k.state.genesis, f.last, tree, f.members().validators); err != nil { // genesis never changes
		return nil, stored{}, err
	}
	if h.Registry != f.registryHash {
		// A quorum has voted for the header.
		return nil, stored{}, fmt.Errorf("block %d: registry: %x here, %x in the header: %w", h.Height, f.registryHash[:8], h.Registry[:8], errStripped)
	}
	s := stored{block: b, verdicts: m.Verdicts, batches: m.Batches}
	if s.verdicts.Digest() != h.Verdicts {
		return nil, stored{}, fmt.Errorf("block %d: verdicts: are not those that the header names", h.Height)
	}
	if !purged(m, h) {
		err = checkPayload(b, m)
	} else if err = checkKept(b, m); err == nil {
		s.registry = m.Registry
	}
	if err != nil {
		return nil, stored{}, fmt.Errorf("block %d: %w", h.Height, err)
	}
	next := &follower{f.last, tree, f.registry, f.registryHash}
	if err := next.advance(b, m); err != nil {
		return nil, stored{}, err
	}
	if s.keep = next.registry != f.registry; s.keep && ledger.Height(next.registry.MembersSince()) == h.Height {
		if s.step, err = stepOf(b, m, f.tree, f.registry.Validators()); err != nil {
			return nil, stored{}, err
		}
	}
	return next, s, nil
}

// takeHeaders verifies blocks that follow f and stores them, up to height to at
// most. It returns the follower after the last one stored.
//
// Whether a block without payload changed the registry is told by the header
// after it; so the last of them is not stored unless it is whole.
func (k *core) takeHeaders(f *follower, ms []*pb.Block, to ledger.Height) (*follower, int, error) {
	var good []stored
	var bad error
	at := []*follower{f}
	for _, m := range ms {
		next, s, err := k.checkHeaders(at[len(at)-1], m)
		if errors.Is(err, errStripped) && len(good) > 0 && gone(good[len(good)-1]) {
			good, at = good[:len(good)-1], at[:len(at)-1]
		}
		if err != nil {
			bad = err
			break
		}
		if next.height() > to {
			break
		}
		good, at = append(good, s), append(at, next)
	}
	if n := len(good); n > 0 && gone(good[n-1]) {
		good, at = good[:n-1], at[:n]
	}
	for _, s := range good {
		if s.step == nil {
			continue
		}
		if err := k.succession.add(s.step); err != nil {
			return f, 0, fatalError{err}
		}
	}
	if err := k.store.append(good...); err != nil {
		return f, 0, fatalError{err}
	}
	k.count.headers.Add(uint64(len(good)))
	return at[len(at)-1], len(good), bad
}

func gone(s stored) bool {
	return len(s.batches) == 0 && s.block.Header.Requests != ledger.RequestsDigest(nil)
}

// checkPayload holds a block's batches against its header, verdicts and leaves.
func checkPayload(b *ledger.Block, m *pb.Block) error {
	ids := make([]ledger.Hash, len(m.Batches))
	for i, raw := range m.Batches {
		ids[i] = ledger.RequestID(raw)
	}
	if ledger.RequestsDigest(ids) != b.Header.Requests {
		return errors.New("batches: are not those that the header names")
	}
	leaf, rec := 1, 0 // the first leaf is the parent's header
	for i, raw := range m.Batches {
		batch, err := wire.DecodeBatch(raw)
		if err != nil {
			return fmt.Errorf("batches[%d]: %w", i, err)
		}
		for k, r := range batch.Records {
			if ledger.Verdicts(m.Verdicts).Accepted(rec) {
				if leaf >= len(b.Leaves) || b.Leaves[leaf].Commitment != ledger.Commit(ledger.Salt(r.Salt), r.Envelope) {
					return fmt.Errorf("batches[%d].records[%d]: does not match leaf %d", i, k, leaf)
				}
				leaf++
			}
			rec++
		}
	}
	if leaf != len(b.Leaves) {
		return fmt.Errorf("leaves: %d, but %d records are accepted", len(b.Leaves), leaf-1)
	}
	return nil
}

// checkKept holds the records that were kept of a block against its leaves.
func checkKept(b *ledger.Block, m *pb.Block) error {
	last := uint32(0)
	for i, r := range m.Registry {
		switch {
		case r.Record == nil || len(r.Record.Salt) != len(ledger.Salt{}) || r.Leaf <= last || int64(r.Leaf) >= int64(len(b.Leaves)):
			return fmt.Errorf("registry[%d]: is not a record in the order of the leaves", i)
		case b.Leaves[r.Leaf].Commitment != ledger.Commit(ledger.Salt(r.Record.Salt), r.Record.Envelope):
			return fmt.Errorf("registry[%d]: does not match leaf %d", i, r.Leaf)
		}
		last = r.Leaf
	}
	return nil
}

// keptOf returns the records of a block that changed the registry.
func keptOf(m *pb.Block) (out []*pb.KeptRecord, err error) {
	leaf, rec := uint32(0), -1
	for i, raw := range m.Batches {
		batch, err := wire.DecodeBatch(raw)
		if err != nil {
			return nil, fmt.Errorf("batches[%d]: %w", i, err)
		}
		for _, r := range batch.Records {
			if rec++; !ledger.Verdicts(m.Verdicts).Accepted(rec) {
				continue
			}
			leaf++
			if e, err := identity.ParseEnvelope(r.Envelope); err == nil && e.Kind.ChangesRegistry() {
				out = append(out, &pb.KeptRecord{Leaf: leaf, Record: r})
			}
		}
	}
	return out, nil
}

// registryAfter carries out a block's agreed registry records, as [state.judge]
// did. Without such the registry itself comes back.
func registryAfter(reg *identity.Registry, h ledger.Height, m *pb.Block) (*identity.Registry, error) {
	kept := m.Registry
	if len(m.Batches) > 0 {
		var err error
		if kept, err = keptOf(m); err != nil {
			return nil, fmt.Errorf("block %d: %w", h, err)
		}
	}
	next := reg
	for _, k := range kept {
		c := wire.Candidate(k.Record.Envelope, k.Record.Salt)
		if c.Err != nil || c.Change == nil {
			return nil, fmt.Errorf("block %d: leaf %d: an agreed registry record cannot be decoded: %w", h, k.Leaf, c.Err)
		}
		if next == reg {
			next = reg.Clone()
		}
		if err := next.Apply(uint64(h), c.Envelope.Key, *c.Change); err != nil {
			return nil, fmt.Errorf("block %d: leaf %d: an agreed registry record does not apply: %w", h, k.Leaf, err)
		}
	}
	return next, nil
}
