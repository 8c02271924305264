package consensus

import (
	"errors"
	"reflect"
	"sync"

	bft "github.com/hyperledger-labs/SmartBFT/pkg/consensus"
	"github.com/hyperledger-labs/SmartBFT/pkg/types"
	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// A leader that gives one proposal to some and another to the rest, helps the
// first to be prepared and then is silent, stops v1.0.1 for ever: those of the
// first say that it may have been decided, and those of the second, who only
// received theirs, count as speaking against it, so that no new view is possible
// with either.
//
// But once a quorum was seen to prepare the first, no other proposal can gather
// one in that slot: at most f of them vote twice, and two quorums have f+1 in
// common. Who holds the second then forgets it before it says what it has.
// Nothing is lost by that: it was not prepared, so it was not voted to be decided
// here, and a new view takes nothing up that was not prepared by somebody. That
// the others' votes are known to those who were told otherwise is the work of
// [witness].

// outvoted reports whether a quorum was seen to prepare another proposal than d
// in a slot, or to commit to it.
func (w *witness) outvoted(config uint64, at slot, d ledger.Hash, quorum int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	votes := map[ledger.Hash]int{}
	for _, mine := range w.said {
		here := map[ledger.Hash]bool{}
		for _, p := range []phase{phasePrepare, phaseCommit} {
			if s, ok := mine[spoken{slot{at.View, at.Height, p}, config}]; ok {
				here[s.digest] = true
				for _, also := range s.also {
					here[also] = true
				}
			}
		}
		for h := range here {
			if votes[h]++; h != d && votes[h] >= quorum {
				return true
			}
		}
	}
	return false
}

// inFlight is the engine's own memory of the proposal in hand, as v1.0.1 lays it
// out; [inFlightOf] makes sure.
type inFlight struct {
	lock sync.RWMutex
	v    *inFlightProposal
}

type inFlightProposal struct {
	proposal *types.Proposal
	prepared bool
}

func inFlightOf(c *bft.Consensus) (*inFlight, error) {
	f := reflect.ValueOf(c).Elem().FieldByName("inFlight")
	if !f.IsValid() || f.Kind() != reflect.Pointer || f.IsNil() || !sameLayout(f.Type().Elem(), reflect.TypeFor[inFlight]()) {
		return nil, errors.New("engine: no inFlight: is this SmartBFT v1.0.1?")
	}
	return (*inFlight)(f.UnsafePointer()), nil
}

// sameLayout compares two structs by their fields, and where these point to.
func sameLayout(a, b reflect.Type) bool {
	if a == b {
		return true
	}
	if a.Kind() == reflect.Pointer && b.Kind() == reflect.Pointer {
		return sameLayout(a.Elem(), b.Elem())
	}
	if a.Kind() != reflect.Struct || b.Kind() != reflect.Struct || a.NumField() != b.NumField() {
		return false
	}
	for i := range a.NumField() {
		if a.Field(i).Name != b.Field(i).Name || !sameLayout(a.Field(i).Type, b.Field(i).Type) {
			return false
		}
	}
	return true
}

// forgetHopeless drops the proposal in hand if it was outvoted. The engine is
// about to say what it has.
func (s *smart) forgetHopeless() {
	s.inFlight.lock.Lock()
	defer s.inFlight.lock.Unlock()
	v := s.inFlight.v
	if v == nil || v.prepared {
		return
	}
	at, err := smartCodec{}.position(v.proposal.Metadata)
	if err != nil {
		return
	}
	d, err := digest(v.proposal.Digest())
	if err != nil || !s.host.outvoted(at, d) {
		return
	}
	s.log.Warn("proposal in hand was outvoted; its leader made two", "view", at.View, "height", uint64(at.Height))
	if at.Height <= 1 {
		s.inFlight.v = nil
		return
	}
	// To the engine, what is not beyond the last decision is not in hand.
	md, err := proto.Marshal(&protos.ViewMetadata{ViewId: at.View, LatestSequence: uint64(at.Height) - 1})
	if err != nil {
		return
	}
	s.inFlight.v = &inFlightProposal{proposal: &types.Proposal{Metadata: md}}
}
