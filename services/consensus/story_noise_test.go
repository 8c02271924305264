package consensus

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Somebody wrote down all that was ever said to 1, and says it all again: at
// once, after a change of leader, and after 1 has restarted and remembers nothing
// of it.
func TestStoryEverythingAgain(t *testing.T) {
	long(t)
	s := district(t, 4)
	type heard struct {
		subject string
		data    []byte
	}
	var mu sync.Mutex
	var all []heard
	stop, err := s.bus.Listen(topic.BFTTo(harbour, 1), "", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, heard{m.Subject, slices.Clone(m.Data)})
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s.decide(s.all()...)
	}
	s.say("2, 3 and 4 want another leader than 1, which is silent for a while")
	s.goes(1, silent)
	s.resumes(1, 2, 3, 4)
	s.goes(1, nil)
	s.decide(s.all()...)
	stop()
	mu.Lock()
	defer mu.Unlock()
	again := func() {
		for _, m := range all {
			if err := s.bus.Send(m.subject, m.data); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.say("all %d messages to 1 are said again", len(all))
	again()
	s.resumes(0, s.all()...)
	before := s.nodes[0].v.Stats()
	if before.Replayed == 0 {
		t.Errorf("of %d messages none was found to be old: %+v", len(all), before)
	}
	s.say("1 restarts, and they are said once more")
	s.cluster.stop(1)
	s.start(1)
	again()
	s.resumes(1, s.all()...)
	s.agree()
}

// nonsense is what no engine says: each is signed by a validator all the same.
func nonsense() []*protos.Message {
	const most = math.MaxUint64
	d := strings.Repeat("00", 32)
	sig := &protos.Signature{Signer: 2, Value: make([]byte, 64)}
	junk := &protos.Proposal{Header: []byte("h"), Payload: []byte("p"), Metadata: []byte{0xff}}
	rawVD := func(vd *protos.ViewData) []byte {
		b, err := proto.Marshal(vd)
		if err != nil {
			panic(err)
		}
		return b
	}
	var out []*protos.Message
	for _, view := range []uint64{0, 1, 2, most} {
		for _, seq := range []uint64{0, 1, 2, 3, 4, most} {
			out = append(out,
				&protos.Message{Content: &protos.Message_PrePrepare{PrePrepare: &protos.PrePrepare{View: view, Seq: seq, Proposal: junk}}},
				&protos.Message{Content: &protos.Message_PrePrepare{PrePrepare: &protos.PrePrepare{View: view, Seq: seq, Proposal: &protos.Proposal{}}}},
				&protos.Message{Content: &protos.Message_Prepare{Prepare: &protos.Prepare{View: view, Seq: seq, Digest: d}}},
				&protos.Message{Content: &protos.Message_Commit{Commit: &protos.Commit{View: view, Seq: seq, Digest: d}}},
				&protos.Message{Content: &protos.Message_Commit{Commit: &protos.Commit{View: view, Seq: seq, Digest: d, Signature: sig}}},
				&protos.Message{Content: &protos.Message_HeartBeat{HeartBeat: &protos.HeartBeat{View: view, Seq: seq}}},
				&protos.Message{Content: &protos.Message_HeartBeatResponse{HeartBeatResponse: &protos.HeartBeatResponse{View: view}}},
				&protos.Message{Content: &protos.Message_StateTransferRequest{StateTransferRequest: &protos.StateTransferRequest{}}},
				&protos.Message{Content: &protos.Message_StateTransferResponse{StateTransferResponse: &protos.StateTransferResponse{ViewNum: view, Sequence: seq}}},
			)
		}
		out = append(out, &protos.Message{Content: &protos.Message_ViewChange{ViewChange: &protos.ViewChange{NextView: view}}})
		for _, raw := range [][]byte{nil, []byte("junk"), rawVD(&protos.ViewData{NextView: view}),
			rawVD(&protos.ViewData{NextView: view, LastDecision: junk, InFlightProposal: junk, InFlightPrepared: true}),
			rawVD(&protos.ViewData{NextView: view, LastDecision: &protos.Proposal{}, InFlightProposal: &protos.Proposal{}})} {
			svd := &protos.SignedViewData{RawViewData: raw, Signer: 4, Signature: make([]byte, 64)}
			out = append(out, &protos.Message{Content: &protos.Message_ViewData{ViewData: svd}},
				&protos.Message{Content: &protos.Message_NewView{NewView: &protos.NewView{SignedViewData: []*protos.SignedViewData{svd, svd, svd}}}})
		}
	}
	return append(out, &protos.Message{Content: &protos.Message_NewView{NewView: &protos.NewView{}}}, &protos.Message{})
}

// A validator says whatever can be said, first as a follower, then as leader,
// signed and in good form. Nobody falls over.
func TestStoryNonsense(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	all := nonsense()
	talk := func(n uint64, also bool) {
		var mu sync.Mutex
		next := map[uint64]int{} // by receiver
		s.goes(n, func(pc parcel, send func(parcel)) {
			if also {
				send(pc)
			}
			mu.Lock()
			from := next[pc.To]
			next[pc.To] += 8
			mu.Unlock()
			for i := from; i < from+8; i++ {
				b, err := proto.Marshal(all[i%len(all)])
				if err != nil {
					panic(err)
				}
				junk := pc
				junk.Kind, junk.Body = kindEngine, b
				if junk.Vote, err = voteOf(all[i%len(all)]); err != nil {
					junk.Vote = vote{}
				}
				send(junk)
			}
			junk := pc
			junk.Kind, junk.Vote, junk.Body = kindTold, vote{}, []byte("what somebody said")
			send(junk)
		})
	}
	s.say("4, a follower, talks nonsense besides what it has to say")
	talk(4, true)
	for range 8 {
		s.resumes(1, 1, 2, 3)
	}
	s.goes(4, nil)
	s.decide(1, 2, 3)
	_, leader := s.view(1, 2, 3)
	honest := without(s.all(), leader)
	s.say("%d, the leader, talks nothing but nonsense", leader)
	talk(leader, false)
	s.resumes(3, honest...)
	s.goes(leader, nil)
	s.decide(s.all()...)
	s.agree(4, leader)
}

// Messages of 8 MiB, which lead nowhere.
func TestStoryLargeMessages(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	s.say("4 sends 8 MiB with each of its next messages")
	body, err := proto.Marshal(&protos.Message{Content: &protos.Message_ViewData{ViewData: &protos.SignedViewData{
		RawViewData: make([]byte, 8<<20), Signer: 4, Signature: make([]byte, 64)}}})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	left := 12
	s.goes(4, func(pc parcel, send func(parcel)) {
		send(pc)
		mu.Lock()
		left--
		more := left >= 0
		mu.Unlock()
		if more {
			pc.Kind, pc.Vote, pc.Body = kindEngine, vote{}, body
			send(pc)
		}
	})
	for range 3 {
		s.resumes(0, 1, 2, 3)
	}
	s.agree()
}

// A validator floods another: with old messages, with new ones, and with starts,
// each of which would be made durable. What does not fit is dropped, and the
// others go on under the same leader.
func TestStoryFlood(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	g := sha256.Sum256(s.genesis)
	var flood [][]byte
	for i := range 600 {
		p := &parcel{Kind: kindMeet, From: 4, To: 1, Start: start{[16]byte{byte(i)}, 1000 + uint64(i)}, Seq: 1 + uint64(i)}
		if i%2 == 0 {
			p.Start = start{[16]byte{7}, 1000}
		}
		if i%3 == 0 { // votes in slots of every sort
			p.Kind, p.Vote = kindEngine, vote{slot{uint64(i), ledger.Height(i), phasePrepare}, ledger.Hash{byte(i)}}
			b, err := proto.Marshal(&protos.Message{Content: &protos.Message_Prepare{Prepare: &protos.Prepare{View: uint64(i), Seq: uint64(i), Digest: hexOf(p.Vote.Digest)}}})
			if err != nil {
				t.Fatal(err)
			}
			p.Body = b
		}
		flood = append(flood, p.seal(voteKey(4), g))
	}
	s.say("4 floods 1, the leader")
	s.cluster.stop(4) // in its place
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	sent := 0
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, b := range flood {
				if err := s.bus.Send(topic.BFT(harbour, 1, 4), b); err != nil {
					t.Error(err)
					return
				}
				sent++
			}
			time.Sleep(5 * slower * time.Millisecond) // a hundred thousand a second
		}
	})
	for range 20 {
		s.resumes(0, 1, 2, 3)
	}
	eventually(t, "messages dropped", func() bool { return s.nodes[0].v.Stats().Dropped > 1000 })
	cancel()
	wg.Wait()
	st := s.nodes[0].v.Stats()
	s.say("of %d messages %d were dropped unread, %d were old, %d of an old start", sent, st.Dropped, st.Replayed, st.Restored)
	if view, _ := s.view(1, 2, 3); view != 0 {
		s.late("view %d, want the first: a flood must not depose the leader", view)
	}
	s.agree()
}

// False blocks are on DECISIONS before the true ones. Whoever follows the stream
// gets the true ones, each once.
func TestStoryJunkOnDecisions(t *testing.T) {
	t.Parallel()
	s := district(t, 4)
	s.decide(s.all()...)
	true1 := s.blocks(1)[0]
	h, err := ledger.ParseHeader(true1.Header)
	if err != nil {
		t.Fatal(err)
	}
	h.Parent, h.Height, h.PrevSize = h.Hash(), 2, h.Size
	forge := func(f func(b *pb.Block)) []byte {
		b := proto.Clone(true1).(*pb.Block)
		b.Header = h.Marshal()
		f(b)
		return wire.EncodeBlock(b)
	}
	s.say("4 publishes junk as block 2 and the blocks after it, before anything is decided there")
	junk := [][]byte{[]byte("junk"), {}, forge(func(*pb.Block) {}), forge(func(b *pb.Block) { b.Votes = nil }),
		forge(func(b *pb.Block) { b.Batches = nil; b.Leaves = nil })}
	for i := range 40 { // far ahead, and near
		far := h
		far.Height = ledger.Height(3 + i*i)
		junk = append(junk, forge(func(b *pb.Block) { b.Header = far.Marshal(); b.Metadata = make([]byte, 100<<10) }))
	}
	for i, b := range junk {
		if err := s.bus.Publish(context.Background(), topic.Decision(harbour, 4), fmt.Sprint("junk", i), b); err != nil {
			t.Fatal(err)
		}
	}
	const more = 5
	for range more {
		s.decide(s.all()...)
	}
	g, err := identity.ParseGenesis(s.genesis)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	blocks := s.agree()
	done := errors.New("done")
	var got [][]byte
	var st decided.Stats
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err = decided.Follow(ctx, decided.Config{Bus: s.bus, District: harbour, GenesisHash: sha256.Sum256(s.genesis), Validators: reg.Validators(), Stats: &st},
		func(_ context.Context, b *decided.Block) error {
			got = append(got, b.Header.Marshal())
			if len(got) == len(blocks) {
				return done
			}
			return nil
		})
	if !errors.Is(err, done) {
		t.Fatalf("following: got %v after %d of %d blocks", err, len(got), len(blocks))
	}
	for i := range blocks {
		if string(got[i]) != string(blocks[i].Header) {
			t.Errorf("block %d: another was handed out", i+1)
		}
	}
	s.say("a follower has all %d blocks, and met %d false ones", len(got), st.Junk.Load())
	if st.Junk.Load() == 0 {
		t.Error("no junk was met: the story tells nothing")
	}
}
