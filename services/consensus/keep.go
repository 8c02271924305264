package consensus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A validator lets go of what was redacted, and says so: the whole payload of the
// block that holds the record, since the batches in it are named by the hash of
// all their bytes. Headers, leaves and votes stay. It waits until no snapshot of
// its own needs the block to go on from, and gives its receipt when the engine's
// journal, too, has let go.
//
// It also gives receipts for what it purged by the registry's retention entry:
// its payloads are of all classes together, so the shortest ceiling counts.

// kept is what a validator remembers of its deletions: DIR/deletions.
type kept struct {
	Redactions map[uint64]*keptRedaction `json:"redactions"` // by leaf
	// Purged is up to which block receipts have been given for what was purged by
	// retention.
	Purged ledger.Height `json:"purged"`
}

type keptRedaction struct {
	// Erased from the payload store; Journal is the first record of the journal that
	// was written after that.
	Erased  bool   `json:"erased"`
	Journal uint64 `json:"journal"`
	// Done: ingest has the receipt, or the redaction is void.
	Done bool `json:"done"`
}

const keptFile = "deletions"

func (k *core) loadKept(dir string) (*kept, error) {
	s := &kept{Redactions: map[uint64]*keptRedaction{}}
	b, err := os.ReadFile(filepath.Join(dir, keptFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s: %w", keptFile, err)
	}
	if s.Redactions == nil {
		s.Redactions = map[uint64]*keptRedaction{}
	}
	return s, nil
}

func (s *kept) save(dir string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, keptFile), b)
}

// trashDir is where segments of the store go that are rewritten.
func trashDir(dir string) string { return filepath.Join(dir, "tmp") }

// keepTick is how often a validator looks at what it has to let go of.
const keepTick = time.Minute

// keep looks at redactions and purges until ctx ends.
func (v *Validator) keep(ctx context.Context) error {
	s, err := v.core.loadKept(v.c.Dir)
	if err != nil {
		return err
	}
	every := v.c.KeepEvery
	if every == 0 {
		every = keepTick
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := v.keepRound(ctx, s); err != nil {
			return fmt.Errorf("letting go of payloads: %w", err)
		}
	}
}

// keepRound does what can be done now. Only errors of the disk come back.
func (v *Validator) keepRound(ctx context.Context, s *kept) error {
	k := v.core
	k.mu.Lock()
	reg, last := k.state.registry, k.state.last
	k.mu.Unlock()
	if last == nil || !k.whole() {
		return nil
	}
	for _, t := range reg.Tombstones(0) {
		r := s.Redactions[t.Index]
		if r == nil {
			r = &keptRedaction{}
		}
		if r.Done || t.Since >= uint64(last.Height) {
			continue
		}
		if err := v.redact(ctx, t, r); err != nil {
			return err
		}
		if s.Redactions[t.Index] != nil || *r != (keptRedaction{}) {
			s.Redactions[t.Index] = r
			if err := s.save(v.c.Dir); err != nil {
				return err
			}
		}
	}
	return v.receiptPurged(ctx, reg, s)
}

// redact takes a redaction as far as it can be taken now.
func (v *Validator) redact(ctx context.Context, t identity.Tombstone, r *keptRedaction) error {
	k := v.core
	if !r.Erased {
		h, leaf, ok, err := k.store.leaf(t.Index)
		if err != nil {
			return err
		}
		if ok { // else it is from before this validator's time, who never had it
			since, err := k.store.header(ledger.Height(t.Since))
			if err != nil {
				return err
			}
			if leaf.Class != ledger.ClassRecord || t.Void(leaf.Commitment[:], since.PrevSize) {
				r.Done = true
				return nil
			}
			if needed, err := k.store.needed(h, t.Index); err != nil {
				return err
			} else if needed {
				v.log.Warn("redaction is of a record that the registry needs, it stays", "index", t.Index)
				r.Done = true
				return nil
			}
			k.writing.Lock()
			erased, err := k.store.erase(h, k.shelf.oldest())
			k.writing.Unlock()
			if err != nil || !erased {
				return err
			}
		}
		if r.Journal, err = k.journal.roll(); err != nil {
			return err
		}
		r.Erased = true
		v.log.Info("redacted record erased", "index", t.Index, "height", uint64(h))
	}
	if !k.journal.without(r.Journal) {
		return nil
	}
	err := v.receipt(ctx, retention.Receipt{Reason: retention.ByRedaction, Policy: t.Entry.Hash(), Count: 1,
		Ranges: []retention.Range{{First: t.Index, Last: t.Index}}})
	if err != nil {
		v.log.Warn("receipt of deletion not taken, sending it again", "index", t.Index, "err", err)
		return nil
	}
	r.Done = true
	return nil
}

// receiptPurged gives the receipt for what was purged since the last one, where
// the registry says how long things are kept.
func (v *Validator) receiptPurged(ctx context.Context, reg *identity.Registry, s *kept) error {
	k := v.core
	_, entry, ok := reg.Retention()
	gone := ledger.Height(k.store.payloads.First())
	if !ok || gone <= max(s.Purged, k.store.first()-1) {
		return nil
	}
	from, err := k.store.header(max(s.Purged, k.store.first()-1) + 1)
	if err != nil {
		return err
	}
	to, err := k.store.header(gone)
	if err != nil {
		return err
	}
	if to.Size > from.PrevSize {
		err := v.receipt(ctx, retention.Receipt{Reason: retention.ByRetention, Policy: entry.Hash(),
			Ranges: []retention.Range{{First: from.PrevSize, Last: to.Size - 1}}})
		if err != nil {
			v.log.Warn("receipt of deletion not taken, sending it again", "err", err)
			return nil
		}
	}
	s.Purged = gone
	return s.save(v.c.Dir)
}

// receiptWait bounds one attempt to give a receipt to ingest.
const receiptWait = 30 * time.Second

// receipt signs a receipt and gives it to ingest.
func (v *Validator) receipt(ctx context.Context, r retention.Receipt) error {
	r.Format, r.District, r.Holder = retention.ReceiptFormat, v.c.District, identity.DeletionID(v.c.Number)
	r.AtUnixMS = v.c.Now().UnixMilli()
	b, err := r.Marshal()
	if err != nil {
		return err
	}
	e := identity.Sign(v.core.keys.Load().vote, identity.KindDeletion, identity.JSON, b)
	s, err := bus.NewSender(bus.SenderConfig{Bus: v.c.Bus, Logger: v.log})
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(ctx, receiptWait)
	defer cancel()
	_, err = s.Send(ctx, v.c.District, identity.KindDeletion, r.Holder, e.Marshal())
	return err
}

// retentionOf returns for how long payloads are kept: as configured, or shorter
// where the registry has a shorter ceiling.
func retentionOf(configured time.Duration, reg *identity.Registry) time.Duration {
	p, _, ok := reg.Retention()
	if !ok {
		return configured
	}
	for _, c := range p.Classes {
		if d := time.Duration(c.CeilingS) * time.Second; configured <= 0 || d < configured {
			configured = max(d, time.Nanosecond) // 0 would be for good
		}
	}
	return configured
}

// leaf finds a leaf and the block that it is in; ok is false where the store
// does not reach it.
func (s *store) leaf(index uint64) (h ledger.Height, l ledger.Leaf, ok bool, err error) {
	first, n := s.first(), int(s.height()-s.first()+1)
	at := sort.Search(n, func(i int) bool {
		hd, e := s.header(first + ledger.Height(i))
		if e != nil {
			err = e
			return true
		}
		return hd.Size > index
	})
	if err != nil || at == n {
		return 0, l, false, err
	}
	m, err := s.headers(first + ledger.Height(at))
	if err != nil {
		return 0, l, false, err
	}
	b, err := wire.BlockFromProto(m)
	if err != nil {
		return 0, l, false, err
	}
	if index < b.Header.PrevSize {
		return 0, l, false, nil
	}
	i := index - b.Header.PrevSize
	if i >= uint64(len(b.Leaves)) {
		return 0, l, false, fmt.Errorf("store: block %d has no leaf %d", b.Header.Height, index)
	}
	return b.Header.Height, b.Leaves[i], true, nil
}

// needed reports whether a leaf of a block, as far as its payload is here, is a
// record of the class that is never let go of.
func (s *store) needed(h ledger.Height, index uint64) (bool, error) {
	m, err := s.block(h)
	if err != nil {
		return false, err
	}
	hd, err := ledger.ParseHeader(m.Header)
	if err != nil {
		return false, err
	}
	leaf, rec := hd.PrevSize, -1
	for _, raw := range m.Batches {
		batch, err := wire.DecodeBatch(raw)
		if err != nil {
			return false, err
		}
		for _, r := range batch.Records {
			if rec++; !ledger.Verdicts(m.Verdicts).Accepted(rec) {
				continue
			}
			if leaf++; leaf == index {
				e, err := identity.ParseEnvelope(r.Envelope)
				return err == nil && retention.Of(e.Kind) == retention.Registry, err
			}
		}
	}
	for _, r := range m.Registry {
		if hd.PrevSize+uint64(r.Leaf) == index {
			return true, nil
		}
	}
	return false, nil
}

// erase lets go of the payload of a block that no snapshot from a height on
// needs; false where that is still to come.
func (s *store) erase(h, before ledger.Height) (bool, error) {
	if h >= before {
		return false, nil
	}
	m, err := s.headed(h)
	if err != nil {
		return false, err
	}
	if len(m.Batches) > 0 {
		// Its batches changed the registry: whoever begins from nothing needs that.
		if m.Registry, err = keptOf(m); err != nil {
			return false, err
		}
		m.Batches = nil
		if err := replaceRecord(s.dir, s.blocks, uint64(h)-1, wire.EncodeBlock(m)); err != nil {
			return false, err
		}
	}
	if n := uint64(h) - 1; n >= s.payloads.First() {
		return true, replaceRecord(s.dir, s.payloads, n, wire.EncodeBlock(&pb.Block{}))
	}
	return true, nil
}

// replaceRecord writes one record of a log anew, and its segment with it.
func replaceRecord(dir string, l *seglog.Log, n uint64, to []byte) error {
	for _, s := range l.Segments() {
		if n < s.First || n >= s.Next {
			continue
		}
		if s.Last {
			if err := l.Roll(); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(trashDir(dir), 0o700); err != nil {
			return err
		}
		_, err := l.Rewrite(s.First, trashDir(dir), func(i uint64, rec []byte) []byte {
			if i == n {
				return to
			}
			return rec
		})
		return err
	}
	return fmt.Errorf("store: no record %d to be replaced", n)
}

// roll has the journal go on in a new file, and returns the number of the first
// record in it.
func (j *journal) roll() (uint64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.log.Roll(); err != nil {
		return 0, err
	}
	return j.log.Next(), nil
}

// without reports whether the journal has dropped everything before a record.
func (j *journal) without(before uint64) bool { return j.log.First() >= before }
