package sealing

import (
	"fmt"
	"slices"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// agreed is what the journalled blocks say about what is kept: the registry, and
// who has given which receipt. It is made from the payload store, whose class
// registry is never purged.
type agreed struct {
	mu  sync.Mutex // guards what follows
	reg *identity.Registry
	// lost says why the registry is not known: then nothing is let go of.
	lost error
	// receipts by the hash of the entry that asked for it.
	receipts map[string][]*retention.Receipt
}

// loadAgreed goes through the records of the class registry up to the last
// journalled block.
func (s *Store) loadAgreed() (*agreed, error) {
	reg, err := identity.NewRegistry(s.genesis)
	if err != nil {
		return nil, err
	}
	a := &agreed{reg: reg, receipts: map[string][]*retention.Receipt{}}
	if s.head == nil {
		return a, nil
	}
	parent := false // whether everything up to the last block's parent was taken in
	check := func() {
		if parent = true; a.lost == nil && ledger.Hash(a.reg.Hash()) != s.head.Registry {
			a.lost = fmt.Errorf("registry: the payload store does not lead to that of block %d: changes of it are gone", s.head.Height)
		}
	}
	err = s.payloads.ScanClass(retention.Registry, func(p *ledger.Payload) error {
		if p.Index >= s.head.Size {
			return nil // of a block that was never journalled
		}
		if p.Height == s.head.Height && !parent {
			check()
		}
		a.take(p.Height, p.Envelope, p.Salt)
		return nil
	})
	if err == nil && !parent {
		check()
	}
	return a, err
}

// take takes in one agreed record.
func (a *agreed) take(h ledger.Height, raw []byte, salt ledger.Salt) {
	e, err := identity.ParseEnvelope(raw)
	if err != nil || !e.Kind.ChangesRegistry() && e.Kind != identity.KindDeletion {
		return
	}
	c := wire.Candidate(raw, salt[:])
	switch {
	case c.Err != nil:
		err = c.Err
	case c.Change != nil:
		err = a.reg.Apply(uint64(h), e.Key, *c.Change)
	case c.Deletion != nil:
		a.receipts[string(c.Deletion.Policy)] = append(a.receipts[string(c.Deletion.Policy)], c.Deletion)
	}
	if err != nil && a.lost == nil {
		a.lost = fmt.Errorf("registry: block %d: an agreed record does not apply: %w", h, err)
	}
}

// add takes in blocks that were journalled.
func (a *agreed) add(bs []*decided.Block) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, b := range bs {
		if a.lost == nil && ledger.Hash(a.reg.Hash()) != b.Header.Registry {
			a.lost = fmt.Errorf("registry: is not that of block %d: changes of it were gone before they came here", b.Header.Height)
		}
		fresh := false
		for _, r := range b.Records {
			if !r.Accepted {
				continue
			}
			if e, err := identity.ParseEnvelope(r.Raw); err == nil && e.Kind.ChangesRegistry() && !fresh {
				a.reg, fresh = a.reg.Clone(), true // readers go on with what they have
			}
			a.take(b.Header.Height, r.Raw, r.Salt)
		}
	}
}

// registry returns the registry, which is never changed, or why it is not known.
func (a *agreed) registry() (*identity.Registry, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reg, a.lost
}

// receipted reports whether a holder's receipt for an entry covers a leaf.
func (a *agreed) receipted(policy identity.Digest, holder string, leaf uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.receipts[string(policy)], func(r *retention.Receipt) bool { return r.Holder == holder && r.Covers(leaf) })
}

// has reports whether a receipt is in the log, word for word but for its time.
func (a *agreed) has(want *retention.Receipt) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.receipts[string(want.Policy)], func(r *retention.Receipt) bool {
		return r.Holder == want.Holder && r.Reason == want.Reason && r.Class == want.Class && slices.Equal(r.Ranges, want.Ranges)
	})
}
