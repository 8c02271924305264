package consensus

import (
	"crypto/ed25519"
	"slices"
	"testing"
	"time"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

// The leader falls silent, but goes on listening. The others replace it.
func TestStorySilentLeader(t *testing.T) {
	t.Parallel()
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("1, the leader, sends nothing any more")
	s.goes(1, silent)
	s.resumes(1, 2, 3, 4)
	s.say("1 finds its voice again")
	s.goes(1, nil)
	s.decide(s.all()...)
	s.agree()
}

// Of seven, two are silent: the leader, and the one whose turn it is then.
func TestStoryTwoSilentOfSeven(t *testing.T) {
	long(t)
	s := district(t, 7)
	s.decide(s.all()...)
	s.say("1, the leader, and 2, the next, send nothing any more")
	s.goes(1, silent)
	s.goes(2, silent)
	s.resumes(2, 3, 4, 5, 6, 7)
	s.goes(1, nil)
	s.goes(2, nil)
	s.decide(s.all()...)
	s.agree()
}

// A follower is slow; nobody waits for it, and it keeps up.
func TestStorySlowFollower(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.say("every message of 4 takes 300 ms")
	s.goes(4, late(300*time.Millisecond))
	for range 10 {
		s.resumes(0, 1, 2, 3)
	}
	s.goes(4, nil)
	s.decide(s.all()...)
	s.agree()
}

// The leader is so slow that it might as well be silent; then it is not leader
// any more, and nobody minds.
func TestStorySlowLeader(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("every message of 1, the leader, takes two leader timeouts")
	s.goes(1, late(2*s.leaderTimeout()))
	s.resumes(1, 2, 3, 4)
	for range 5 {
		s.resumes(0, 2, 3, 4)
	}
	s.goes(1, nil)
	s.decide(s.all()...)
	s.agree()
}

// The leader says that it lives, and proposes nothing.
func TestStoryIdleLeader(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("1, the leader, keeps its proposals to itself")
	s.goes(1, func(pc parcel, send func(parcel)) {
		if engineMessage(pc).GetPrePrepare() == nil {
			send(pc)
		}
	})
	s.resumes(1, 2, 3, 4)
	s.agree()
}

// The leader leaves one follower out. It learns from the others what was decided.
func TestStoryOneLeftOut(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.say("1, the leader, sends 4 nothing but its heartbeat")
	s.goes(1, func(pc parcel, send func(parcel)) {
		if pc.To != 4 || pc.Vote.Phase == phaseNone {
			send(pc)
		}
	})
	for range 3 {
		s.resumes(0, 1, 2, 3)
	}
	s.decide(s.all()...)
	if st := s.nodes[3].v.Stats(); st.Synced == 0 {
		t.Errorf("validator 4 fetched no block: %+v", st)
	}
	s.agree()
}

// The leader proposes one thing to 2 and 3 and another to 4. Three is a quorum:
// the first is decided, 4 learns of it, and everybody can prove the lie, though
// nobody was told both.
func TestStoryTwoProposals(t *testing.T) {
	t.Parallel()
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("1, the leader, has another proposal for 4 than for 2 and 3, in one slot")
	liar := &twoFaced{number: 1, face: func(to uint64) int {
		if to == 4 {
			return 1
		}
		return 0
	}}
	s.goes(1, liar.way)
	s.resumes(1, 2, 3)
	s.accuse(1, 2, 3, 4)
	s.goes(1, nil)
	s.decide(s.all()...)
	s.agree(1)
}

// The leader has a proposal for each. No two followers prepare the same, and it
// is replaced.
func TestStoryThreeProposals(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("1, the leader, has three proposals in one slot, one for each of the others")
	s.goes(1, (&twoFaced{number: 1, face: func(to uint64) int { return int(to) - 2 }}).way)
	s.resumes(1, 2, 3, 4)
	s.accuse(1, 2, 3, 4)
	s.agree(1)
}

// Seven, of which the leader tells one half one thing and the other half
// another, with an accomplice who tells everybody what he wants to hear.
func TestStoryTwoLiarsOfSeven(t *testing.T) {
	long(t)
	s := district(t, 7)
	s.decide(s.all()...)
	half := func(to uint64) int { return int(to) % 2 }
	leader := &twoFaced{number: 1, face: half}
	s.say("1, the leader, proposes one thing to 3, 5 and 7 and another to 4 and 6; 2 votes for both")
	s.goes(1, leader.way)
	s.goes(2, leader.helped(2))
	s.resumes(2, 3, 4, 5, 6, 7)
	s.accuse(1, 3, 4, 5, 6, 7)
	s.agree(1, 2)
}

// One leader after the other tells another lie in its proposal, and is replaced
// at once: nobody has to wait for a timeout.
func TestStoryLyingProposals(t *testing.T) {
	t.Parallel()
	s := district(t, 4)
	s.decide(s.all()...)
	decided := s.decide(s.all()...)
	for _, lie := range []struct {
		what, reason string
		tell         func(h *ledger.Header, p *protos.Proposal)
	}{
		{"a time not after the parent's", refusedTime, func(h *ledger.Header, _ *protos.Proposal) { h.Time = time.Unix(0, 0) }},
		{"a time ten minutes ahead", refusedTime, func(h *ledger.Header, _ *protos.Proposal) { h.Time = h.Time.Add(10 * time.Minute) }},
		{"another registry", refusedHeader, func(h *ledger.Header, _ *protos.Proposal) { h.Registry[0] ^= 1 }},
		{"a false verdict", refusedHeader, func(h *ledger.Header, _ *protos.Proposal) { h.Verdicts[0] ^= 1 }},
		{"another parent", refusedParent, func(h *ledger.Header, _ *protos.Proposal) { h.Parent[0] ^= 1 }},
		{"a request that was decided", refusedDecided, func(h *ledger.Header, p *protos.Proposal) {
			p.Payload = encodePayload([][]byte{decided})
			h.Requests = ledger.RequestsDigest([]ledger.Hash{ledger.RequestID(decided)})
		}},
		{"half a payload", refusedForm, func(_ *ledger.Header, p *protos.Proposal) { p.Payload = p.Payload[:len(p.Payload)/2] }},
	} {
		if testing.Short() && lie.reason != refusedTime {
			continue
		}
		_, leader := s.view(s.all()...)
		honest := without(s.all(), leader)
		s.say("%d, the leader, proposes a block with %s", leader, lie.what)
		s.goes(leader, proposing(lie.tell))
		s.resumes(1, honest...)
		s.refused(lie.reason, honest...)
		s.goes(leader, nil)
		s.decide(s.all()...)
	}
	s.agree()
}

// Metadata are the engine's, and go into every certificate and every change of
// leader: what is no part of them is refused.
func TestStoryStuffedMetadata(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("1, the leader, hides 1 MiB in the metadata of its proposal")
	s.goes(1, proposing(func(_ *ledger.Header, p *protos.Proposal) {
		p.Metadata = append(slices.Clone(p.Metadata), append([]byte{4<<3 | 2, 0x80, 0x80, 0x40}, make([]byte, 1<<20)...)...)
	}))
	s.resumes(1, 2, 3, 4)
	for _, b := range s.agree() {
		if len(b.Metadata) > 64 {
			t.Errorf("a block with %d bytes of metadata", len(b.Metadata))
		}
	}
}

// The leader proposes a batch that was never in ACCEPTED, with forged frames and
// such of devices that nobody knows. It is decided; they have no effect.
func TestStoryForgedFrames(t *testing.T) {
	t.Parallel()
	s := district(t, 4)
	s.decide(s.all()...)
	now := time.Now()
	forged := newUnit(3)
	forged.key = key("the leader's own")
	mixed := batch(s.units[0].frame(now), forged.frame(now), newUnit(99).frame(now), s.units[1].frame(now),
		&pb.Record{Envelope: []byte("junk"), Salt: make([]byte, 32)}, s.units[4].frame(now.Add(time.Hour)), s.units[5].frame(now))
	own := encodePayload([][]byte{mixed})
	s.say("1, the leader, proposes forged frames, honestly judged, between real ones")
	_, leader := s.view(s.all()...)
	if err := engineOf(s.nodes[leader-1].v).submit(mixed); err != nil {
		t.Fatal(err)
	}
	s.decided(mixed, s.all()...)
	blocks := s.agree()
	if times, _, verdicts := where(t, blocks, mixed); times != 1 || verdicts != "1001001" {
		t.Errorf("decided %d times with verdicts %s, want once with 1001001", times, verdicts)
	}
	for _, n := range s.all() {
		if got := s.nodes[n-1].v.Stats().RecordsRefused; got[validate.RuleUnknownKey] != 2 {
			t.Errorf("validator %d: records refused: got %v, want two of unknown keys", n, got)
		}
	}
	if view, _ := s.view(s.all()...); view != 0 {
		s.late("view %d, want the first: bad records are no ground to replace a leader", view)
	}

	s.say("now it claims that the next forged one is good")
	liar := newUnit(2)
	liar.key, liar.seq = key("the leader's own"), 77
	own = encodePayload([][]byte{batch(liar.frame(now))})
	s.goes(leader, proposing(func(h *ledger.Header, p *protos.Proposal) {
		v := ledger.NewVerdicts(1)
		v.Accept(0)
		p.Payload = own
		h.Requests, h.Verdicts = ledger.RequestsDigest([]ledger.Hash{ledger.RequestID(own[4:])}), v.Digest()
	}))
	honest := without(s.all(), leader)
	s.resumes(1, honest...)
	s.refused(refusedHeader, honest...)
	s.agree()
}

// Time stands still under a leader that dates every block a nanosecond after its
// parent. Frames of the present would come from the future; it is replaced.
func TestStoryTimeStandsStill(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	then := time.Now().Add(-time.Minute)
	for _, n := range s.all() {
		s.nodes[n-1].v.core.mu.Lock()
		if last := s.nodes[n-1].v.core.state.time(); last.After(then) {
			then = last
		}
		s.nodes[n-1].v.core.mu.Unlock()
	}
	// Only the leader's clock has to stand still for this: its blocks are true to it.
	k := s.nodes[0].v.core
	k.mu.Lock()
	k.now = func() time.Time { return then }
	k.mu.Unlock()
	s.say("the clock of 1, the leader, stands still")
	eventually(t, "the clock is behind", func() bool { return time.Since(then) > mostBehind })
	s.refusedAfter(laggingMost)
	s.agree()
}

// refusedAfter decides batches until a proposal is refused for its time, and
// wants that after so many.
func (s *story) refusedAfter(most int) {
	s.t.Helper()
	for i := range most + 2 {
		s.decide(2, 3, 4)
		if view, _ := s.view(2, 3, 4); view > 0 {
			s.say("it is replaced after %d blocks", i)
			if i > most {
				s.t.Errorf("replaced after %d blocks that were late, want %d", i, most)
			}
			return
		}
	}
	s.t.Error("the leader was not replaced")
}

// A vote for the block before comes with a proposal only where leaders take
// turns. Here a leader adds a hundred thousand, each of which would be checked.
func TestStoryManyOldVotes(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	junk := make([]*protos.Signature, 100_000)
	for i := range junk {
		junk[i] = &protos.Signature{Signer: 2, Value: make([]byte, ed25519.SignatureSize)}
	}
	s.say("1, the leader, adds 100,000 votes for the last block to its proposal")
	s.goes(1, func(pc parcel, send func(parcel)) {
		if m := engineMessage(pc); m.GetPrePrepare() != nil {
			m.GetPrePrepare().PrevCommitSignatures = junk
			pc = carrying(pc, m)
		}
		send(pc)
	})
	s.resumes(1, 2, 3, 4)
	s.agree()
}

// The leader proposes one thing to 2 and 3, who prepare it with its help, and
// another to 4; then it is silent. Whoever leads next hears of two proposals, of
// which one may have been decided.
func TestStoryTwoProposalsAndSilence(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	liar := &twoFaced{number: 1, face: func(to uint64) int {
		if to == 4 {
			return 0
		}
		return 1
	}}
	s.say("1, the leader, has one proposal for 2 and 3 and another for 4, and is silent when it comes to commit")
	s.goes(1, func(pc parcel, send func(parcel)) {
		if p := pc.Vote.Phase; p == phasePropose || p == phasePrepare {
			liar.way(pc, send)
		}
	})
	s.resumes(2, 2, 3, 4)
	s.accuse(1, 2, 3, 4)
	s.agree(1)
}
