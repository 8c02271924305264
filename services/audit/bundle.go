package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// registryAt returns the registry after a block.
func (s *Service) registryAt(h ledger.Height) (*identity.Registry, error) {
	s.mu.RLock()
	versions, changes := slices.Clone(s.versions), s.changes
	s.mu.RUnlock()
	i := len(versions) - 1
	for versions[i].after > h {
		i--
	}
	reg := versions[i].reg
	cloned := false
	for _, c := range changes {
		if c.height <= versions[i].after || c.height > h {
			continue
		}
		if !cloned {
			reg, cloned = reg.Clone(), true
		}
		if err := reg.Apply(uint64(c.height), c.signer, c.change); err != nil {
			return nil, fmt.Errorf("registry at block %d: %w", h, err)
		}
	}
	return reg, nil
}

// payload reads what a leaf commits to. Its error has kind NotFound where it was
// let go.
func (s *Service) payload(index uint64, h ledger.Height, leaf ledger.Leaf) (*ledger.Payload, error) {
	p, err := s.payloads.Get(index)
	if err != nil {
		return nil, err
	}
	return p, payloadOf(index, h, leaf, p)
}

// readTile reads the log that sealing writes.
func (s *Service) readTile(t ledger.TileID) ([]byte, error) {
	return os.ReadFile(filepath.Join(s.c.Dir, "log", filepath.FromSlash(t.Path())))
}

// Evidence returns the bundle of one record, by its leaf index. Errors have kind
// NotFound where there is no such record, Invalid for a leaf that is no record,
// and Unavailable where it is not sealed yet. Of a record whose payload was let go
// the bundle has a tombstone.
func (s *Service) Evidence(ctx context.Context, index uint64) ([]byte, error) {
	return s.Bundle(ctx, index)
}

// Bundle returns one bundle of several records. See [Service.Evidence].
func (s *Service) Bundle(ctx context.Context, indexes ...uint64) ([]byte, error) {
	return s.bundle(ctx, nil, indexes)
}

// UnbrokenBundle returns a bundle of records with the claim that nothing that a
// device signed between the first and the last of its frames among them is left
// out: it adds all frames between. The error has kind Invalid where that cannot be
// claimed: the frames are of two starts of the device, or one is not in the log.
func (s *Service) UnbrokenBundle(ctx context.Context, d traffic.DeviceID, indexes ...uint64) ([]byte, error) {
	u, between, err := s.unbroken(ctx, d, indexes)
	if err != nil {
		return nil, wrap("evidence", err)
	}
	return s.bundle(ctx, []ledger.Unbroken{u}, append(slices.Clone(indexes), between...))
}

// unbroken finds the frames of a device between those among some records.
func (s *Service) unbroken(ctx context.Context, d traffic.DeviceID, indexes []uint64) (u ledger.Unbroken, between []uint64, err error) {
	u.Device = string(d)
	found := false
	for _, i := range indexes {
		r, ok, err := s.index.one(ctx, 0, "record k WHERE k.idx = ? AND k.device = ? AND k.kind = 'frame'", "k.idx", int64(i), string(d))
		if err != nil {
			return u, nil, err
		}
		switch {
		case !ok:
			continue
		case !found:
			u.BootEpoch, u.From, u.To, found = r.Boot, r.Seq, r.Seq, true
		case r.Boot != u.BootEpoch:
			return u, nil, kind.Errorf(kind.Invalid, "frames of device %.60q are of two starts: its chain begins anew with each", string(d))
		}
		u.From, u.To = min(u.From, r.Seq), max(u.To, r.Seq)
	}
	if u.From == u.To {
		return u, nil, kind.Errorf(kind.Invalid, "two frames of device %.60q are needed to claim that nothing between them is left out", string(d))
	}
	if u.To-u.From >= ledger.MaxBundleRecords {
		return u, nil, kind.Errorf(kind.Invalid, "%d frames lie between, a bundle holds at most %d records", u.To-u.From-1, ledger.MaxBundleRecords)
	}
	between, err = s.index.frames(ctx, d, u.BootEpoch, u.From, u.To)
	if err != nil {
		return u, nil, err
	}
	if uint64(len(between)) != u.To-u.From+1 {
		return u, nil, kind.Errorf(kind.Invalid, "of the frames %d to %d of device %.60q the index holds %d: the log has a gap, a frame twice, or their payloads were let go", u.From, u.To, string(d), len(between))
	}
	return u, between, nil
}

// lineage shows how the first validators were succeeded by others, as sealing has
// kept it; nil where that cannot be shown. The caller
// holds files.
func (s *Service) lineage(to ledger.Council) (*ledger.BundleSuccession, error) {
	s.mu.RLock()
	sets := s.succession.Sets()
	s.mu.RUnlock()
	n, err := s.watch.search(sets[1].Since + 1)
	if err != nil || n == s.history.First() {
		return nil, err
	}
	at, err := s.watch.sealedAt(n - 1)
	if err != nil {
		return nil, err
	}
	anchor, err := sets[0].Policy.Open(at.Note)
	if err != nil {
		// The policy wants witnesses besides, who have not cosigned this one.
		s.log.Warn("audit: bundles cannot show how the validators came to be", "err", err)
		return nil, nil
	}
	out := &ledger.BundleSuccession{Genesis: s.c.GenesisJSON, Anchor: at.Note}
	if out.Proof, err = ledger.Prove(ledger.TileReaderFunc(s.readTile), anchor.Size, 0); err != nil {
		// The partial tiles of that size are gone; wider ones have the same hashes.
		if out.Proof, err = ledger.Prove(wider{s}, anchor.Size, 0); err != nil {
			return nil, err
		}
	}
	doc, err := os.ReadFile(filepath.Join(s.c.Dir, "succession.json"))
	if err != nil {
		return nil, err
	}
	steps, err := ledger.ParseSuccessionProof(doc)
	if err != nil {
		// Where a record that made a set is gone, the file lists sets without proof.
		s.log.Warn("audit: bundles cannot show how the validators came to be", "err", err)
		return nil, nil
	}
	steps.Steps = slices.DeleteFunc(steps.Steps, func(st ledger.Step) bool { return st.Height() > to.Since })
	if out.Steps, err = steps.Marshal(); err != nil {
		return nil, err
	}
	return out, nil
}

// maxChainFrames bounds the stretch of frames in a chain's bundle.
const maxChainFrames = 600

// ChainBundle returns one bundle of all records of a chain. Where the reading and
// the response are frames of one start of one device, all its frames between are
// in it, with the claim that none is left out; where that cannot be claimed, the
// records alone are.
func (s *Service) ChainBundle(ctx context.Context, c *Chain) ([]byte, error) {
	indexes := c.Indexes()
	if r := c.step(RoleReading); r != nil {
		u, between, err := s.unbroken(ctx, r.Device, indexes)
		switch {
		case kind.Of(err) == kind.Invalid: // one frame, two starts, or a gap
		case err != nil:
			return nil, wrap("evidence", err)
		case len(between) <= maxChainFrames:
			return s.bundle(ctx, []ledger.Unbroken{u}, append(indexes, between...))
		}
	}
	return s.bundle(ctx, nil, indexes)
}

func (s *Service) bundle(ctx context.Context, unbroken []ledger.Unbroken, indexes []uint64) ([]byte, error) {
	// Of what was redacted the redaction itself is shown, too.
	for _, i := range indexes {
		by, ok, err := s.index.redactionOf(ctx, i)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		if _, size, err := s.index.blockOf(ctx, by); ok && err == nil && size < s.sealedSize() {
			indexes = append(slices.Clip(indexes), by)
		}
	}
	indexes = slices.Compact(slices.Sorted(slices.Values(indexes)))
	if len(indexes) == 0 || len(indexes) > ledger.MaxBundleRecords {
		return nil, kind.Errorf(kind.Invalid, "evidence: %d records, must be 1 to %d", len(indexes), ledger.MaxBundleRecords)
	}
	if err := s.Refresh(); err != nil {
		return nil, err
	}
	s.files.RLock()
	defer s.files.RUnlock()
	if s.blocks == nil {
		return nil, kind.Errorf(kind.Unavailable, "evidence: the data folder is being opened again; try again in a moment")
	}
	s.mu.RLock()
	sealed, note, sealers, first := s.sealed, s.note, s.sealers, s.succession.Sets()[0].Policy
	s.mu.RUnlock()
	b := &ledger.Bundle{Checkpoint: note, Policy: s.c.Policy, Unbroken: unbroken}
	if sealers.Since > 0 { // the hint is the policy that the checkpoint meets
		var err error
		if b.Policy, err = ledger.CouncilPolicy(s.genesis, sealers.Validators); err != nil {
			return nil, err
		}
		if b.Succession, err = s.lineage(sealers); err != nil {
			return nil, fmt.Errorf("evidence: succession: %w", err)
		}
	}
	var block *ledger.Decided
	var reg *identity.Registry
	var signers []identity.Holder
	// A block is done when the next record is not in it.
	done := func() error {
		if block == nil {
			return nil
		}
		var err error
		bb := ledger.BundleBlock{Header: block.Header, Metadata: block.Metadata}
		bb.Votes = ledger.ValidVotes(block.Header.Hash(), block.Metadata, block.Votes, reg.Validators())
		if bb.Registry, err = ledger.Excerpts(reg, signers); err != nil {
			return err
		}
		if bb.Proof, err = ledger.Prove(ledger.TileReaderFunc(s.readTile), sealed.Size, block.Header.Size); err != nil {
			return err
		}
		b.Blocks = append(b.Blocks, bb)
		block, signers = nil, nil
		return nil
	}
	for _, index := range indexes {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, size, err := s.index.blockOf(ctx, index)
		if err != nil {
			return nil, wrap("evidence", err)
		}
		if sealed == nil || size >= sealed.Size {
			// The next block's first leaf shows that this block's header is in the log.
			return nil, kind.Errorf(kind.Unavailable, "evidence: leaf %d is in block %d, which is not sealed yet together with the block after it; try again in a moment", index, h)
		}
		if block == nil || block.Header.Height != h {
			if err := done(); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			rec, err := s.blocks.Read(uint64(h - 1))
			if err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			if block, err = ledger.ParseDecided(rec); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			if reg, err = s.registryAt(h - 1); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
		}
		i := index - block.Header.PrevSize
		if i == 0 {
			return nil, kind.Errorf(kind.Invalid, "evidence: leaf %d is the header of block %d and no record", index, h-1)
		}
		p, err := s.payload(index, h, block.Leaves[i])
		if kind.Of(err) == kind.NotFound {
			proof, err := ledger.Prove(ledger.TileReaderFunc(s.readTile), sealed.Size, index)
			if err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			b.Records = append(b.Records, ledger.BundleRecord{Index: index, Tombstone: &block.Leaves[i], Proof: proof})
			continue
		}
		if err != nil {
			return nil, wrap("evidence", err)
		}
		e, err := identity.ParseEnvelope(p.Envelope)
		if err != nil {
			return nil, fmt.Errorf("evidence: leaf %d: %w", index, err)
		}
		holder, ok := reg.Holder(e.Key)
		if !ok {
			return nil, fmt.Errorf("evidence: leaf %d: its signer is not in the registry of its block", index)
		}
		signers = append(signers, holder)
		proof, err := ledger.Prove(ledger.TileReaderFunc(s.readTile), sealed.Size, index)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		b.Records = append(b.Records, ledger.BundleRecord{Index: index, Salt: p.Salt, Envelope: p.Envelope, Proof: proof})
	}
	if err := done(); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	raw := b.Marshal()
	// What does not verify here must not leave the house as evidence.
	if _, err := ledger.VerifyBundle(raw, sealers.Policy); err != nil {
		return nil, fmt.Errorf("evidence: the folder's content does not verify: %w", err)
	}
	if b.Succession != nil {
		if _, err := ledger.VerifyBundle(raw, first); err != nil {
			return nil, fmt.Errorf("evidence: the folder's content does not verify for those who pinned the first validators: %w", err)
		}
	}
	return raw, nil
}

// wrap adds a prefix and keeps the kind.
func wrap(prefix string, err error) error { return kind.Errorf(kind.Of(err), "%s: %w", prefix, err) }
