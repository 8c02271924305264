package consensus

import (
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// Payloads are kept for [Config.Retention] of block time, and then let go of by
// whole segments. What stays for good: headers, leaves, votes, verdicts, and the
// batches of blocks that changed the registry. What stays in any case: the
// payloads after the oldest snapshot that is kept, and that of its own block,
// which whoever begins from it needs whole.

// purging is how far a store has let go. It is owned by whoever holds the core's
// writing lock.
type purging struct {
	// next is the first block that was not found old enough, 0: not looked yet.
	next ledger.Height
	// rolled is the block time at which the segment that is written was begun.
	rolled time.Time
	// unsafe says that a payload holds what is nowhere else.
	unsafe bool
}

// segmentsKept is into how many segments, at least, the payloads of the
// retention are cut: so much longer than asked for, at most, is one kept.
const segmentsKept = 8

// purge drops the payloads of blocks before a height that are older than the
// retention, counted back from the newest block's time, and returns how many
// payloads are gone in all.
func (s *store) purge(before ledger.Height, newest time.Time, retention time.Duration) (gone uint64, err error) {
	p := &s.purging
	if retention <= 0 || p.unsafe {
		return s.payloads.First(), nil
	}
	if p.next == 0 {
		p.next = ledger.Height(s.payloads.First()) + 1
	}
	if newest.Sub(p.rolled) >= retention/segmentsKept {
		if err := s.payloads.Roll(); err != nil {
			return 0, err
		}
		p.rolled = newest
	}
	for ; p.next < before; p.next++ {
		m, err := s.headed(p.next)
		if err != nil {
			return 0, err
		}
		h, err := ledger.ParseHeader(m.Header)
		if err != nil {
			return 0, err
		}
		if newest.Sub(h.Time) <= retention {
			break
		}
		if ledger.Verdicts(m.Verdicts).Digest() != h.Verdicts {
			p.unsafe = true
			return 0, fmt.Errorf("store %s: the verdicts on block %d are with its payload, in a layout of before: no payload is dropped; "+
				"to change that, stop the validator, empty its folder, and let it fetch everything from its peers", s.dir, p.next)
		}
	}
	if err := s.payloads.DropBefore(uint64(p.next) - 1); err != nil {
		return 0, err
	}
	return s.payloads.First(), nil
}
