package consensus

import (
	"log/slog"
	"slices"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// A liar that tells two validators two things in one slot tells neither of them
// both. So every validator remembers the votes that it saw, with the bytes that
// prove them, and when it sees that two do not agree at one view and height,
// which among honest ones never happens, it passes on to all what it has of that
// view and height. Who then holds two votes of one validator in one slot holds an
// accusation.

// said is a vote of a peer with the bytes that prove it.
type said struct {
	digest ledger.Hash
	proof  []byte        // head of a parcel with its signature
	also   []ledger.Hash // what it said in contradiction, some of it
	told   bool          // passed on, or heard from somebody who did
}

// spoken is a slot among one set of members.
type spoken struct {
	slot
	config uint64
}

// witness is what a validator saw others vote.
type witness struct {
	genesis ledger.Hash
	height  func() ledger.Height
	// accuse keeps an accusation; it is durable on return. It reports whether it
	// is news.
	accuse func(*ledger.Accusation) (bool, error)
	count  *counters
	log    *slog.Logger

	mu   sync.Mutex
	said map[uint64]map[spoken]*said
}

func newWitness() *witness { return &witness{said: map[uint64]map[spoken]*said{}} }

const (
	// saidMost bounds the slots that are remembered of one validator: who fills
	// them with far heights only loses its own.
	saidMost = 256
	// alsoMost bounds what is remembered of contradictions in one slot.
	alsoMost = 4
	// toldMost bounds the votes in one parcel.
	toldMost = 16
)

// note remembers a vote, and returns what others should be told of now. The
// proof is not copied. A vote that contradicts an earlier one is accused, and
// takes part in nothing else.
func (w *witness) note(pc *parcel, proof []byte, told bool) (tell [][]byte) {
	from, v, at := pc.From, pc.Vote, spoken{pc.Vote.slot, pc.Config}
	w.mu.Lock()
	defer w.mu.Unlock()
	mine := w.said[from]
	if mine == nil {
		mine = map[spoken]*said{}
		w.said[from] = mine
	}
	if have, ok := mine[at]; ok {
		if have.digest != v.Digest {
			w.contradicts(from, v, have.proof, proof)
			if len(have.also) < alsoMost && !slices.Contains(have.also, v.Digest) {
				have.also = append(have.also, v.Digest)
			}
			// Whoever holds one of the two should hold the other.
			if !have.told {
				have.told = true
				tell = append(tell, have.proof)
			}
			if !told {
				tell = append(tell, proof)
			}
		}
		return tell
	}
	floor := w.height()
	if len(mine) >= saidMost {
		for s := range mine {
			if s.Height < floor || s.Height > floor+2 {
				delete(mine, s)
			}
		}
		if len(mine) >= saidMost {
			clear(mine)
		}
	}
	mine[at] = &said{digest: v.Digest, proof: slices.Clone(proof), told: told}
	if v.Height < floor || v.Height > floor+2 {
		return nil
	}
	return w.split(pc)
}

func (w *witness) contradicts(from uint64, v vote, first, second []byte) {
	w.count.equivocations.Add(1)
	news, err := w.accuse(ledger.NewVoteAccusation(w.genesis, first, second))
	switch {
	case err != nil:
		w.log.Error("evidence not kept", "peer", from, "err", err)
	case news:
		w.log.Error("two votes of one validator in one slot", "peer", from, "slot", v.slot.String())
	}
}

// split returns the votes at a vote's view and height that were not passed on
// yet, if they are not all for the same proposal. It needs mu.
func (w *witness) split(pc *parcel) (tell [][]byte) {
	v := pc.Vote
	var here []*said
	agree := true
	for _, votes := range w.said {
		for _, p := range []phase{phasePropose, phasePrepare, phaseCommit} {
			if s, ok := votes[spoken{slot{v.View, v.Height, p}, pc.Config}]; ok {
				here = append(here, s)
				agree = agree && s.digest == v.Digest
			}
		}
	}
	if agree {
		return nil
	}
	for _, s := range here {
		if !s.told {
			s.told = true
			tell = append(tell, s.proof)
		}
	}
	return tell
}

// hear takes votes that a peer passed on: it reports whether they were what they
// should be, and returns what others should be told of. keys are those of the
// other validators.
func (w *witness) hear(keys map[uint64]identity.PublicKey, body []byte) (tell [][]byte, ok bool) {
	if len(body) == 0 || len(body)%parcelMin != 0 || len(body) > toldMost*parcelMin {
		return nil, false
	}
	floor := w.height()
	for ; len(body) > 0; body = body[parcelMin:] {
		b := body[:parcelMin]
		p, err := parseHead(b[:headSize])
		if err != nil || p.Vote.Phase == phaseNone {
			return tell, false
		}
		key, ok := keys[p.From]
		if !ok || p.Vote.Height < floor || p.Vote.Height > floor+2 {
			continue // of ourselves, of somebody gone, or of no interest any more
		}
		if w.knows(p) {
			continue
		}
		if !signed(b, key, w.genesis) {
			return tell, false
		}
		tell = append(tell, w.note(p, b, true)...)
	}
	return tell, true
}

func (w *witness) knows(p *parcel) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.said[p.From][spoken{p.Vote.slot, p.Config}]
	return ok && s.digest == p.Vote.Digest
}
