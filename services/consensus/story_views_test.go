package consensus

import (
	"crypto/sha256"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// An honest validator votes for two proposals at one height, as it must: the
// leader's first came to it alone, and was given up when the leader fell silent.
// Whoever shows the two votes shows nothing; nobody is accused.
func TestStoryTwoViewsTwoVotes(t *testing.T) {
	long(t)
	s := district(t, 4)
	var mu sync.Mutex
	var said [][]byte // by 2, to 3
	stop, err := s.bus.Listen(topic.BFTTo(harbour, 3), "", func(m *nats.Msg) {
		if strings.HasSuffix(m.Subject, ".2") && len(m.Data) >= parcelMin {
			mu.Lock()
			defer mu.Unlock()
			said = append(said, slices.Clone(m.Data[:parcelMin]))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	s.decide(s.all()...)
	s.say("1, the leader, proposes block 2 to 2 alone, and says nothing else")
	s.goes(1, func(pc parcel, send func(parcel)) {
		if pc.To == 2 && pc.Vote.Phase == phasePropose {
			send(pc)
		}
	})
	s.resumes(1, 2, 3, 4)
	mu.Lock()
	defer mu.Unlock()
	prepares := map[uint64][]byte{} // by view, at height 2
	digests := map[uint64]ledger.Hash{}
	for _, b := range said {
		m, err := ledger.ParseMessage(b)
		if err != nil {
			t.Fatal(err)
		}
		if m.Height == 2 && m.Phase == uint8(phasePrepare) {
			prepares[m.View], digests[m.View] = b, m.Digest
		}
	}
	if len(prepares) != 2 || digests[0] == digests[1] {
		t.Fatalf("2 prepared %x at height 2, by view: the story needs two different ones", digests)
	}
	one, two := digests[0], digests[1]
	s.say("2 prepared %x in view 0 and %x in view 1, at one height", one[:4], two[:4])
	genesis := sha256.Sum256(s.genesis)
	j, err := ledger.NewVoteAccusation(genesis, prepares[0], prepares[1]).Judge(ledger.Trust{Genesis: s.genesis})
	if err == nil || j.Outcome != ledger.Fail || len(j.Guilty) > 0 || !strings.Contains(j.Reason, "not in one slot") {
		t.Errorf("with both votes in hand, 2 was judged %s, %q, guilty %v; want no accusation to hold", j.Outcome, j.Reason, j.Guilty)
	}
	for _, n := range []uint64{2, 3, 4} {
		if st := s.nodes[n-1].v.Stats(); st.Equivocations != 0 || len(s.nodes[n-1].v.Evidence()) != 0 {
			t.Errorf("validator %d: %d contradictions, %d accusations; want none", n, st.Equivocations, len(s.nodes[n-1].v.Evidence()))
		}
	}
	s.agree()
}
