package audit

import (
	"context"
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
)

// reconcile takes out of the index what the log says was let go of: records that
// an agreed redaction names, whether or not the payload store has let go already,
// and those that a receipt of the payload store's holder covers. It is done again
// from where it was last finished, so that a crash between indexing and this
// leaves nothing behind. Caller holds refreshing.
func (s *Service) reconcile(ctx context.Context) error {
	if s.reconciled == s.at.height && s.at.height > 0 {
		return nil
	}
	after, err := s.index.reconciled(ctx)
	if err != nil {
		return err
	}
	if after > s.at.height {
		after = 0 // the index was begun anew
	}
	if s.reconciled > after && s.reconciled < s.at.height {
		after = s.reconciled // since then nothing had to be done, and so it was not written
	}
	s.mu.RLock()
	reg := s.versions[len(s.versions)-1].reg
	s.mu.RUnlock()
	done := false
	for _, t := range reg.Tombstones(uint64(after)) {
		ok, err := s.redacts(t)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		done = true
		if err := s.index.forget(ctx, Redacted, "", t.Index, t.Index); err != nil {
			return err
		}
	}
	receipts, err := s.index.receipts(ctx, after)
	if err != nil {
		return err
	}
	for _, r := range receipts {
		p, err := s.payloads.Get(r.Index)
		if err != nil {
			return err
		}
		e, err := identity.ParseEnvelope(p.Envelope)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", r.Index, err)
		}
		receipt, err := retention.ParseReceipt(e.Payload)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", r.Index, err)
		}
		// What is redacted has a tombstone, and other holders' payloads are not ours.
		if receipt.Holder != retention.SealingHolder || receipt.Reason != retention.ByRetention {
			continue
		}
		for _, g := range receipt.Ranges {
			done = true
			if err := s.index.forget(ctx, Gone, string(receipt.Class), g.First, g.Last); err != nil {
				return err
			}
		}
	}
	if done {
		if err := s.index.truncateLog(ctx); err != nil {
			return err
		}
		if err := s.index.setReconciled(ctx, s.at.height); err != nil {
			return err
		}
	}
	s.reconciled = s.at.height
	return nil
}

// redacts reports whether a tombstone means the leaf at its index; else it is
// void.
func (s *Service) redacts(t identity.Tombstone) (bool, error) {
	if t.Since == 0 || t.Since > uint64(s.at.height) {
		return false, nil
	}
	rec, err := s.blocks.Read(t.Since - 1)
	if err != nil {
		return false, err
	}
	d, err := ledger.ParseDecided(rec)
	if err != nil {
		return false, err
	}
	if t.Index >= d.Header.PrevSize {
		return false, nil
	}
	h, _, err := s.index.blockOf(context.Background(), t.Index)
	if err != nil {
		return false, err
	}
	if rec, err = s.blocks.Read(uint64(h - 1)); err != nil {
		return false, err
	}
	of, err := ledger.ParseDecided(rec)
	if err != nil {
		return false, err
	}
	leaf := of.Leaves[t.Index-of.Header.PrevSize]
	return leaf.Class == ledger.ClassRecord && !t.Void(leaf.Commitment[:], d.Header.PrevSize), nil
}
