package consensus

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A validator with nothing need not go along the whole chain. It begins with the
// newest state that f+1 of the members have signed, and has shown to it:
//
//	who the members are    the succession from genesis, each step decided by a quorum
//	                       of those before
//	that they still are    the header after the state's block, which a quorum of them
//	                       has signed, names the registry in the state; and in that
//	                       they are the validators
//	the block              its header's votes, and the log's frontier by its root
//	devices, decided ids   the digest that f+1 of them have signed
//
// Headers from genesis on would show no more: who can forge what is asked for here
// has a quorum of some set of members, or f+1 of those in force, and could as well
// forge a chain. What is lost is the beginning: a validator that began so cannot
// give those blocks to others. So whoever relies on validators for the whole
// history has f+1 of them run with Config.WholeHistory; sealing has it in any
// case.

// leap begins with a snapshot, if this validator has nothing yet. It reports
// whether it did; where it cannot, there are the headers.
func (f *fetcher) leap(ctx context.Context) (bool, error) {
	k := f.core
	if !f.leaps || k.store.height() > 0 || k.height() > 0 {
		return false, nil
	}
	steps, sets, err := f.successions(ctx)
	if err != nil {
		k.log.Error("the validators' succession is not clear: every header is fetched", "err", err)
		return false, nil
	}
	now := sets[len(sets)-1]
	m := &members{since: now.Since, validators: now.Validators, limit: maxPayload(len(now.Validators))}
	offered := map[uint64][]*pb.SnapshotOffer{}
	for _, a := range f.askAll(ctx, f.peers(m), &pb.SyncRequest{Offers: true}) {
		offered[a.from] = a.resp.Offers[:min(len(a.resp.Offers), 4*snapshotsKept)]
	}
	best, signers := f.agree(m, offered)
	if best.height <= now.Since { // decided by those before
		return false, nil
	}
	st, b := f.download(ctx, best, signers)
	if st == nil {
		return false, nil
	}
	if err := inState(st, now); err != nil {
		k.log.Error("f+1 validators have signed a state in which others are the validators", "height", uint64(best.height), "err", err)
		return false, nil
	}
	for _, peer := range f.peers(m) {
		first, err := f.firstBlock(ctx, peer, st, best.header, now)
		if err != nil {
			f.refuse(peer, err)
			continue
		}
		if first == nil {
			f.drop(peer) // has not both blocks, or not whole
			continue
		}
		if err := k.begin(st, b, steps, *first); err != nil {
			return false, fatalError{err}
		}
		k.log.Info("begins with a snapshot; what was before is not here", "height", uint64(best.height), "changes", len(steps))
		return true, nil
	}
	return false, nil
}

// successions asks peers how the validators changed, and those whom it learns of
// too. It returns the longest chain, of which all others must be the beginning.
func (f *fetcher) successions(ctx context.Context) (steps []ledger.Step, sets []ledger.Council, err error) {
	if sets, err = ledger.CheckSteps(f.core.genesisBytes, nil); err != nil {
		return nil, nil, err
	}
	asked := map[uint64]bool{}
	for {
		now := sets[len(sets)-1]
		peers := slices.DeleteFunc(f.peers(&members{validators: now.Validators}), func(n uint64) bool { return asked[n] })
		if len(peers) == 0 {
			return steps, sets, nil
		}
		for _, n := range peers {
			asked[n] = true
		}
		for _, a := range f.askAll(ctx, peers, &pb.SyncRequest{Steps: true}) {
			theirs, err := parseSteps(a.resp.Steps)
			var theirSets []ledger.Council
			if err == nil {
				theirSets, err = ledger.CheckSteps(f.core.genesisBytes, theirs)
			}
			if err != nil {
				f.refuse(a.from, err)
				continue
			}
			for i := range min(len(steps), len(theirs)) {
				// Votes may differ, and by whom they are.
				if !bytes.Equal(steps[i].Header, theirs[i].Header) || !bytes.Equal(steps[i].Envelope, theirs[i].Envelope) {
					return nil, nil, fmt.Errorf("two changes of the validators are shown after the one at block %d: more of them lied than may", sets[i].Since)
				}
			}
			if len(theirs) > len(steps) {
				steps, sets = theirs, theirSets
			}
		}
	}
}

func parseSteps(in [][]byte) ([]ledger.Step, error) {
	out := []ledger.Step{}
	for i, b := range in {
		var s ledger.Step
		if err := json.Unmarshal(b, &s); err != nil {
			return nil, fmt.Errorf("steps[%d]: %w", i, err)
		}
		out = append(out, s)
	}
	return out, nil
}

// inState checks that a state's registry names a set of validators.
func inState(st *state, set ledger.Council) error {
	if got := ledger.Height(st.registry.MembersSince()); got != set.Since {
		return fmt.Errorf("registry: the validators are those since block %d, shown are those since %d", got, set.Since)
	}
	same := slices.EqualFunc(st.registry.Validators(), set.Validators, func(a, b identity.Validator) bool {
		return a.Number == b.Number && bytes.Equal(a.VoteKey, b.VoteKey) && bytes.Equal(a.CosignKey, b.CosignKey)
	})
	if !same {
		return errors.New("registry: the validators are others than those shown")
	}
	return nil
}

// firstBlock asks a peer for the block of a state and the one after it, and
// checks both. It returns nil where the peer does not have them whole.
func (f *fetcher) firstBlock(ctx context.Context, peer uint64, st *state, want ledger.Hash, set ledger.Council) (*stored, error) {
	at := st.height()
	var ms [2]*pb.Block
	for i := range ms {
		resp := f.request(ctx, peer, &pb.SyncRequest{FromHeight: uint64(at) + uint64(i), MaxBlocks: 1, Headers: i == 1})
		if resp == nil || len(resp.Blocks) == 0 {
			return nil, nil
		}
		ms[i] = resp.Blocks[0]
	}
	b, err := wire.BlockFromProto(ms[0])
	if err != nil {
		return nil, err
	}
	h := b.Header
	switch {
	case h.Height != at || h.Hash() != want:
		return nil, fmt.Errorf("block %d: is not the one of the state", at)
	case h.Size != h.PrevSize+uint64(len(b.Leaves)) || ledger.LeavesDigest(b.Leaves) != h.Leaves:
		return nil, fmt.Errorf("block %d: leaves: do not match the header", at)
	case ledger.Verdicts(ms[0].Verdicts).Digest() != h.Verdicts:
		return nil, fmt.Errorf("block %d: verdicts: are not those that the header names", at)
	case purged(ms[0], h):
		return nil, nil
	}
	if err := ledger.CheckVotes(h.Hash(), b.Metadata, b.Votes, set.Validators); err != nil {
		return nil, fmt.Errorf("block %d: %w", at, err)
	}
	if err := checkPayload(b, ms[0]); err != nil {
		return nil, fmt.Errorf("block %d: %w", at, err)
	}
	next, err := wire.BlockFromProto(ms[1])
	if err != nil {
		return nil, err
	}
	switch n := next.Header; {
	case n.Height != at+1 || n.Parent != h.Hash() || n.Genesis != h.Genesis:
		return nil, fmt.Errorf("block %d: does not follow", at+1)
	case n.Registry != st.registryHash:
		return nil, fmt.Errorf("block %d: registry: is another than the state's", at+1)
	}
	if err := ledger.CheckVotes(next.Header.Hash(), next.Metadata, next.Votes, set.Validators); err != nil {
		return nil, fmt.Errorf("block %d: %w", at+1, err)
	}
	// Whether it changed the registry would take the state before it: kept in case.
	return &stored{block: b, verdicts: ms[0].Verdicts, batches: ms[0].Batches, keep: true}, nil
}

// begin makes this validator's what it begins with. Until the block is stored, a
// crash leaves it with nothing; from then on it has everything.
func (k *core) begin(st *state, snapshot []byte, steps []ledger.Step, first stored) error {
	if err := k.succession.replace(steps); err != nil {
		return err
	}
	if err := k.shelf.put(snapshot, st.registryHash); err != nil {
		return err
	}
	if err := k.store.begin(st.tree, first); err != nil {
		return err
	}
	return k.install(st)
}

// baseFile, in a validator's folder, holds where the store begins unless that is
// genesis: the height of its first block, 64 bits big-endian, and the log's
// frontier after it.
const baseFile = "base"

// begin has an empty store begin with a block; tree is the log after it.
func (s *store) begin(tree *ledger.Frontier, first stored) error {
	h := first.block.Header.Height
	base := append(binary.BigEndian.AppendUint64(nil, uint64(h)), tree.Marshal()...)
	if err := replaceFile(filepath.Join(s.dir, baseFile), base); err != nil {
		return err
	}
	s.from = tree.Clone()
	for _, l := range []*seglog.Log{s.payloads, s.blocks} {
		if err := l.StartAt(uint64(h) - 1); err != nil {
			return err
		}
	}
	return s.append(first)
}

// openBase brings a store that was interrupted while it began back to nothing,
// and reads where one that did begins.
func (s *store) openBase() error {
	if s.blocks.First() == s.blocks.Next() {
		// Nothing is in blocks/; in payloads/ may be what belongs to it.
		if err := s.blocks.StartAt(0); err != nil {
			return err
		}
		if first := s.payloads.First(); first > 0 {
			if err := s.payloads.CutFrom(first); err != nil {
				return err
			}
			return s.payloads.StartAt(0)
		}
		return nil
	}
	if s.first() == 1 {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(s.dir, baseFile))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("begins with block %d, and the file %s is not there", s.first(), baseFile)
	}
	if err != nil {
		return err
	}
	if len(b) < 8 || binary.BigEndian.Uint64(b) != uint64(s.first()) {
		return fmt.Errorf("%s: is not of block %d, with which the blocks begin", baseFile, s.first())
	}
	if s.from, err = ledger.ParseFrontier(b[8:]); err != nil {
		return fmt.Errorf("%s: %w", baseFile, err)
	}
	h, err := s.header(s.first())
	if err != nil {
		return err
	}
	if h.Size != s.from.Size() || h.Root != s.from.Root() {
		return fmt.Errorf("%s: is not the log after block %d", baseFile, s.first())
	}
	return nil
}

// base returns the log at the place from which on all leaves are here, and the
// height of the block after it.
func (s *store) base() (*ledger.Frontier, ledger.Height) {
	if s.from == nil {
		return &ledger.Frontier{}, 1
	}
	return s.from.Clone(), s.first() + 1
}
