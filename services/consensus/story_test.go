package consensus

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// The stories in story_*_test.go tell what some of the validators do, and what
// the others must do all the same. All are real: a liar is one whose messages
// pass through the test, which holds its key, on their way out.

// way is what becomes of a validator's messages: it may call send with the
// message, another one, several, later, or not at all.
type way func(pc parcel, send func(parcel))

// story is a district whose validators' ways the test rules.
type story struct {
	*cluster
	began time.Time
	slip  atomic.Int64 // by how much the machine was late, at worst, nanoseconds

	mu    sync.Mutex
	ways  map[uint64]way
	apart func(a, b uint64) bool // between whom nothing passes
	units []*unit
	turn  int
}

// district starts n validators; devices d1 to d8 have frames to seal.
func district(t *testing.T, n int) *story {
	t.Helper()
	s := &story{cluster: newCluster(t, n), began: time.Now(), ways: map[uint64]way{}}
	for i := range 8 {
		s.units = append(s.units, newUnit(i+1))
	}
	s.prepare = func(n uint64, v *Validator) {
		v.tap = func(pc parcel, send func(parcel)) {
			s.mu.Lock()
			w, apart := s.ways[n], s.apart
			s.mu.Unlock()
			switch {
			case apart != nil && apart(pc.From, pc.To):
			case w == nil:
				send(pc)
			default:
				w(pc, send)
			}
		}
		v.cut = func(peer uint64) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.apart != nil && s.apart(n, peer)
		}
	}
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			begin := time.Now()
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			if late := int64(time.Since(begin) - 10*time.Millisecond); late > s.slip.Load() {
				s.slip.Store(late)
			}
		}
	})
	t.Cleanup(func() { close(stop); watch.Wait() })
	s.start(s.all()...)
	return s
}

// long leaves a story out of short runs: of each sort there are some that take no
// time. In others it goes on beside the next, as it mostly waits.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes a second or more")
	}
	t.Parallel()
}

// say writes a line of the story.
func (s *story) say(format string, args ...any) {
	s.t.Helper()
	s.t.Logf("%7.3f s  %s", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

// goes sets a validator's way from now on; nil is the honest one.
func (s *story) goes(n uint64, w way) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ways[n] = w
}

// cutOff lets nothing pass between the validators given and the rest; with none
// given, everything passes.
func (s *story) cutOff(ns ...uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apart = nil
	if len(ns) > 0 {
		s.apart = func(a, b uint64) bool { return slices.Contains(ns, a) != slices.Contains(ns, b) }
	}
}

// batch returns a batch with the next frame of some device.
func (s *story) batch() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn++
	return batch(s.units[s.turn%len(s.units)].frame(time.Now()))
}

// decide has one batch decided by the validators given.
func (s *story) decide(ns ...uint64) []byte {
	s.t.Helper()
	b := s.batch()
	s.submit(b)
	s.decided(b, ns...)
	return b
}

// view is the latest view of the validators given, with its leader.
func (s *story) view(ns ...uint64) (view, leader uint64) {
	for _, n := range ns {
		if st := s.nodes[n-1].v.Stats(); st.View >= view {
			view, leader = st.View, st.Leader
		}
	}
	return view, leader
}

// leaderTimeout is how long a leader may stall.
func (s *story) leaderTimeout() time.Duration { return s.timing.Complain }

// resumes has something decided by the validators given, and wants it within
// three leader timeouts of now and so many changes of leader, on a machine that
// is quiet.
func (s *story) resumes(changes int, ns ...uint64) {
	s.t.Helper()
	before, _ := s.view(ns...)
	begin := time.Now()
	s.slip.Store(0)
	s.decide(ns...)
	took := time.Since(begin)
	after, leader := s.view(ns...)
	s.say("%v decide again after %v, under leader %d of view %d", ns, took.Round(time.Millisecond), leader, after)
	if after > before+uint64(changes) {
		s.late("view %d after %d: want at most %d changes of leader", after, before, changes)
	}
	if slip := time.Duration(s.slip.Load()); took > 3*s.leaderTimeout() && slip < 100*time.Millisecond {
		s.late("nothing was decided for %v, want at most three leader timeouts of %v", took, s.leaderTimeout())
	}
}

// late reports what a machine that is slow, or whose disk is, may be the reason
// of. It is a failure where the environment says that this one is quiet.
func (s *story) late(format string, args ...any) {
	s.t.Helper()
	if os.Getenv("STOPLINE_REQUIRE_TIMES") == "1" {
		s.t.Errorf(format, args...)
		return
	}
	s.say("LATE: "+format, args...)
}

// agree checks that no two of the validators that run have different blocks, and
// that none of the honest ones was accused. It returns the blocks.
func (s *story) agree(liars ...uint64) []*pb.Block {
	s.t.Helper()
	blocks := s.check()
	for i, nd := range s.nodes {
		if nd == nil {
			continue
		}
		for _, a := range nd.v.Evidence() {
			j, err := a.Judge(ledger.Trust{Genesis: s.genesis})
			if err != nil {
				s.t.Errorf("validator %d keeps an accusation that does not hold: %v", i+1, err)
			}
			for _, g := range j.Guilty {
				if !slices.ContainsFunc(liars, func(n uint64) bool { return g.Name == fmt.Sprint("validator ", n) }) {
					s.t.Errorf("validator %d accuses %s, which is honest: %s", i+1, g.Name, j.Finding)
				}
			}
		}
	}
	return blocks
}

// accuse waits until each of the validators given has proof of the liar's guilt.
func (s *story) accuse(liar uint64, ns ...uint64) {
	s.t.Helper()
	for _, n := range ns {
		eventually(s.t, fmt.Sprintf("validator %d can accuse validator %d", n, liar), func() bool {
			for _, a := range s.nodes[n-1].v.Evidence() {
				if j, err := a.Judge(ledger.Trust{Genesis: s.genesis}); err == nil && strings.Contains(j.Text(), fmt.Sprintf("validator %d (department %d)", liar, liar)) {
					return true
				}
			}
			return false
		})
	}
	s.say("%v each hold proof that validator %d lied", ns, liar)
}

// refused waits until one of the validators has refused a proposal for a reason.
func (s *story) refused(reason string, ns ...uint64) {
	s.t.Helper()
	eventually(s.t, "a proposal refused as "+reason, func() bool {
		return slices.ContainsFunc(ns, func(n uint64) bool { return s.nodes[n-1].v.Stats().Refused[reason] > 0 })
	})
}

// What liars do.

// silent sends nothing.
func silent(parcel, func(parcel)) {}

// late sends everything so much later, in order.
func late(d time.Duration) way {
	return func(pc parcel, send func(parcel)) { time.AfterFunc(d, func() { send(pc) }) }
}

// engineMessage decodes what a parcel carries for the engine, nil if nothing.
func engineMessage(pc parcel) *protos.Message {
	if pc.Kind != kindEngine {
		return nil
	}
	m, err := smartCodec{}.parse(pc.Body)
	if err != nil {
		return nil
	}
	return m.parsed.(*protos.Message)
}

// carrying returns the parcel with another message for the engine.
func carrying(pc parcel, m *protos.Message) parcel {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	v, err := voteOf(m)
	if err != nil {
		panic(err)
	}
	pc.Body, pc.Vote = b, v
	return pc
}

// proposing changes every proposal on its way.
func proposing(change func(h *ledger.Header, p *protos.Proposal)) way {
	return func(pc parcel, send func(parcel)) {
		if m := engineMessage(pc); m.GetPrePrepare() != nil {
			pc = carrying(pc, altered(m, change))
		}
		send(pc)
	}
}

func altered(m *protos.Message, change func(h *ledger.Header, p *protos.Proposal)) *protos.Message {
	m = proto.Clone(m).(*protos.Message)
	p := m.GetPrePrepare().Proposal
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		panic(err)
	}
	change(&h, p)
	p.Header = h.Marshal()
	return m
}

// twoFaced is a validator that says one thing to some and another to the rest,
// in every phase: of each proposal there are as many as face returns numbers.
// Face 0 is the true one.
type twoFaced struct {
	number uint64
	face   func(to uint64) int

	mu    sync.Mutex
	truth map[slot]*protos.Message // proposals, by view and height
}

func (l *twoFaced) way(pc parcel, send func(parcel)) { l.say(l.number, pc, send) }

// helped is the way of an accomplice, who says the same to everybody.
func (l *twoFaced) helped(by uint64) way {
	return func(pc parcel, send func(parcel)) { l.say(by, pc, send) }
}

func (l *twoFaced) say(number uint64, pc parcel, send func(parcel)) {
	m, face := engineMessage(pc), l.face(pc.To)
	if m == nil || pc.Vote.Phase == phaseNone || face == 0 && m.GetPrePrepare() == nil {
		send(pc)
		return
	}
	at := slot{View: pc.Vote.View, Height: pc.Vote.Height}
	l.mu.Lock()
	if m.GetPrePrepare() != nil {
		if l.truth == nil {
			l.truth = map[slot]*protos.Message{}
		}
		l.truth[at] = m
	}
	truth := l.truth[at]
	l.mu.Unlock()
	if truth == nil || face == 0 {
		send(pc)
		return
	}
	lie := altered(truth, func(h *ledger.Header, _ *protos.Proposal) { h.Time = h.Time.Add(time.Duration(face)) })
	p := lie.GetPrePrepare().Proposal
	d := fromProto(p).Digest()
	switch m = proto.Clone(m).(*protos.Message); {
	case m.GetPrePrepare() != nil:
		m = lie
	case m.GetPrepare() != nil:
		m.GetPrepare().Digest = d
	case m.GetCommit() != nil:
		h, err := ledger.ParseHeader(p.Header)
		if err != nil {
			panic(err)
		}
		m.GetCommit().Digest = d
		m.GetCommit().Signature.Value = ed25519.Sign(voteKey(number), ledger.VoteInput(h.Hash(), p.Metadata))
	}
	send(carrying(pc, m))
}

func engineOf(v *Validator) engine { return v.place().engine }
