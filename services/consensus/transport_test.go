package consensus

import (
	"crypto/ed25519"
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

func testParcel(from, to uint64) *parcel {
	return &parcel{Kind: kindEngine, From: from, To: to, Start: start{[16]byte{1}, 3}, Seq: 7, Decided: 2,
		Vote: vote{slot{1, 3, phaseCommit}, ledger.Hash{9}}, Body: []byte("body")}
}

func TestParcelsComeOutAsTheyWentIn(t *testing.T) {
	g := ledger.Hash{5}
	p := testParcel(1, 2)
	b := p.seal(voteKey(1), g)
	got, err := openParcel(b)
	if err != nil {
		t.Fatal(err)
	}
	if string(got.head()) != string(p.head()) || string(got.Body) != "body" || got.Vote != p.Vote || got.Start != p.Start {
		t.Errorf("got %+v, want %+v", got, p)
	}
	if !signed(b, pub(voteKey(1)), g) {
		t.Error("the signature is not valid")
	}
	if signed(b, pub(voteKey(2)), g) || signed(b, pub(voteKey(1)), ledger.Hash{6}) {
		t.Error("the signature is valid for another validator or district")
	}
	for i := range b { // no byte of it can be changed
		bad := append([]byte(nil), b...)
		bad[i] ^= 1
		if _, err := openParcel(bad); err == nil && signed(bad, pub(voteKey(1)), g) {
			t.Fatalf("byte %d can be changed", i)
		}
	}
}

// A peer's word on a later start of ours counts only with what we signed in it:
// one liar must not be able to silence whoever restarts.
func TestLaterStartsAreProven(t *testing.T) {
	g := ledger.Hash{5}
	own, later := start{[16]byte{1}, 3}, start{[16]byte{2}, 4}
	j, err := openJournal(t.TempDir(), seglog.Options{}, smartCodec{}.votes)
	if err != nil {
		t.Fatal(err)
	}
	defer closeJournal(t, j)
	j.own = start{[16]byte{8}, 2} // the last in which it took part
	if err := j.takePart(); err != nil {
		t.Fatal(err)
	}
	tr := &transport{self: 1, key: voteKey(1), genesis: g, journal: j}
	tr.begin(own)
	took := func(s start, kind parcelKind) []byte {
		p := testParcel(1, 2)
		p.Start, p.Kind = s, kind
		return p.seal(voteKey(1), g)[:parcelMin]
	}
	proof := func(from uint64, key uint64, s start, g ledger.Hash) []byte {
		p := testParcel(from, 2)
		p.Start = s
		return p.seal(voteKey(key), g)[:parcelMin]
	}
	bad := proof(1, 1, later, g)
	bad[headSize] ^= 1
	for _, c := range []struct {
		name string
		met  met
		want bool
	}{
		{"this start", met{Start: own, Asker: own}, true},
		{"a later one", met{Start: later, Asker: own, Proof: proof(1, 1, later, g)}, true},
		{"as late", met{Start: start{[16]byte{9}, 3}, Asker: own, Proof: proof(1, 1, start{[16]byte{9}, 3}, g)}, true},
		{"answer to another start", met{Start: later, Asker: later, Proof: proof(1, 1, later, g)}, false},
		{"no proof", met{Start: later, Asker: own}, false},
		{"last there is", met{Start: start{[16]byte{2}, 1<<64 - 1}, Asker: own, Vote: 1 << 63}, false},
		{"proof of another start", met{Start: later, Asker: own, Proof: proof(1, 1, own, g)}, false},
		{"an earlier start", met{Start: start{[16]byte{8}, 2}, Asker: own, Proof: proof(1, 1, start{[16]byte{8}, 2}, g)}, false},
		{"signed by the liar", met{Start: later, Asker: own, Proof: proof(1, 2, later, g)}, false},
		{"the liar's own", met{Start: later, Asker: own, Proof: proof(2, 2, later, g)}, false},
		{"another district's", met{Start: later, Asker: own, Proof: proof(1, 1, later, ledger.Hash{6})}, false},
		{"damaged", met{Start: later, Asker: own, Proof: bad}, false},
		{"took part in what we know", met{Start: own, Asker: own, Took: j.took}, true},
		{"and before that", met{Start: own, Asker: own, Took: start{[16]byte{7}, 1}}, true},
		{"in what we do not know", met{Start: own, Asker: own, Took: own, TookProof: took(own, kindEngine)}, true},
		{"without proof", met{Start: own, Asker: own, Took: own}, false},
		{"proof of having asked only", met{Start: own, Asker: own, Took: own, TookProof: took(own, kindMeet)}, false},
		{"cut", met{Start: later, Asker: own, Proof: bad[:headSize]}, false},
	} {
		if got := tr.holds(c.met); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func FuzzParcel(f *testing.F) {
	f.Add(testParcel(1, 2).seal(voteKey(1), ledger.Hash{}))
	f.Add([]byte("junk"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := openParcel(b)
		if err != nil {
			return
		}
		if string(p.head()) != string(b[:headSize]) {
			t.Errorf("what was parsed is encoded otherwise")
		}
	})
}

// What validators sign is what anybody can judge by package ledger.
func TestParcelsAreJudged(t *testing.T) {
	genesis := genesis(t, 4, 1)
	g := sha256.Sum256(genesis)
	head := func(f func(*parcel)) []byte {
		p := testParcel(1, 2)
		f(p)
		return p.seal(voteKey(1), g)[:parcelMin]
	}
	a := head(func(*parcel) {})
	m, err := ledger.ParseMessage(a)
	if p := testParcel(1, 2); err != nil || m.From != 1 || m.View != p.Vote.View || m.Height != p.Vote.Height || m.Phase != uint8(p.Vote.Phase) || m.Digest != p.Vote.Digest {
		t.Errorf("read as %+v, %v; want what the parcel says", m, err)
	}
	if parcelMin != ledger.MessageSize {
		t.Errorf("a head with its signature has %d bytes, package ledger reads %d", parcelMin, ledger.MessageSize)
	}
	for name, tc := range map[string]struct {
		second []byte
		want   string
	}{
		"another vote":           {head(func(p *parcel) { p.Vote.Digest = ledger.Hash{8}; p.To = 3; p.Seq = 1 }), ""},
		"the same vote":          {head(func(p *parcel) { p.Seq = 99 }), "for the same proposal"},
		"a vote of another view": {head(func(p *parcel) { p.Vote.View = 2; p.Vote.Digest = ledger.Hash{8} }), "not in one slot"},
	} {
		j, err := ledger.NewVoteAccusation(g, a, tc.second).Judge(ledger.Trust{Genesis: genesis})
		if tc.want == "" && (err != nil || len(j.Guilty) != 1) || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %+v, %v; want %q", name, j, err, tc.want)
		}
	}
}

// Junk of every sort on a validator's subject is counted and harms nobody, while
// the validators go on deciding.
func TestJunkBetweenValidators(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	first := batch(u.frame(time.Now()))
	c.submit(first)
	c.decided(first, c.all()...)
	g := sha256.Sum256(c.genesis)
	victim := c.nodes[0].v
	to1 := func(from uint64, b []byte) {
		t.Helper()
		if err := c.bus.Send(topic.BFT(harbour, 1, from), b); err != nil {
			t.Fatal(err)
		}
	}
	before := victim.Stats()
	body := func(m *protos.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	vc := body(&protos.Message{Content: &protos.Message_ViewChange{ViewChange: &protos.ViewChange{NextView: 1}}})
	seal := func(from, to uint64, f func(*parcel)) []byte {
		p := &parcel{Kind: kindEngine, From: from, To: to, Start: start{[16]byte{1}, 1000}, Seq: 1, Body: vc}
		if f != nil {
			f(p)
		}
		return p.seal(voteKey(from), g)
	}
	invalid := [][2]any{
		{uint64(2), []byte("junk")},
		{uint64(2), make([]byte, 100_000)},
		{uint64(9), seal(2, 1, nil)},                                                                    // a stranger's subject
		{uint64(3), seal(2, 1, nil)},                                                                    // on another's subject
		{uint64(2), seal(2, 3, nil)},                                                                    // meant for another
		{uint64(2), seal(2, 1, func(p *parcel) { p.Config = 1 })},                                       // of another set of members
		{uint64(2), seal(2, 1, func(p *parcel) { p.Body = []byte{0xff, 0xff} })},                        // signed, but no message
		{uint64(2), seal(2, 1, func(p *parcel) { p.Vote = vote{slot{0, 2, phaseCommit}, g} })},          // says that it votes, and does not
		{uint64(2), seal(2, 1, func(p *parcel) { p.Kind = kindMet; p.Body = []byte("{") })},             // signed by 2 itself: counted further on
		{uint64(2), (&parcel{Kind: kindEngine, From: 2, To: 1, Body: vc}).seal(voteKey(3), g)},          // signed by another
		{uint64(2), (&parcel{Kind: kindEngine, From: 2, To: 1, Body: vc}).seal(voteKey(2), [32]byte{})}, // for another district
	}
	for _, m := range invalid {
		to1(m[0].(uint64), m[1].([]byte))
		b := batch(u.frame(time.Now())) // valid ones between
		c.submit(b)
		c.decided(b, 1)
	}
	eventually(t, "junk counted", func() bool {
		s := victim.Stats()
		return s.Invalid+s.Strangers+s.Elsewhere >= before.Invalid+uint64(len(invalid))-1 && s.Strangers == 1 && s.Elsewhere == 1
	})
	if s := victim.Stats(); s.View != before.View || s.Equivocations != 0 {
		t.Errorf("got view %d and %d equivocations, want view %d and none", s.View, s.Equivocations, before.View)
	}
	last := batch(u.frame(time.Now()))
	c.submit(last)
	c.decided(last, c.all()...)
	c.check()
}

// What was sent once cannot be sent again by somebody who listened.
func TestARecordedMessageIsNotPlayedAgain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	var recorded [][]byte
	got := make(chan []byte, 1024)
	stop, err := c.bus.Listen(topic.BFTTo(harbour, 1), "", func(m *nats.Msg) {
		if strings.HasSuffix(m.Subject, ".2") {
			select {
			case got <- append([]byte(nil), m.Data...):
			default:
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	c.start(c.all()...)
	u := newUnit(1)
	b := batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, c.all()...)
	for len(recorded) < 3 {
		recorded = append(recorded, <-got)
	}
	before := c.nodes[0].v.Stats()
	for _, m := range recorded {
		if err := c.bus.Send(topic.BFT(harbour, 1, 2), m); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "replays counted", func() bool { return c.nodes[0].v.Stats().Replayed >= before.Replayed+3 })
	b = batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, c.all()...)
}

// A validator that votes twice in one slot is found out before the engine sees
// the second vote, with a proof that outlives a restart.
func TestEquivocationIsProven(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(1, 2, 3) // 4 is played by the test
	g := sha256.Sum256(c.genesis)
	u := newUnit(1)
	b := batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, 1, 2, 3)
	for i, d := range []ledger.Hash{{1}, {1}, {2}} {
		v := vote{slot{0, 2, phasePrepare}, d}
		m, err := proto.Marshal(&protos.Message{Content: &protos.Message_Prepare{Prepare: &protos.Prepare{View: 0, Seq: 2, Digest: hexOf(d)}}})
		if err != nil {
			t.Fatal(err)
		}
		p := &parcel{Kind: kindEngine, From: 4, To: 1, Start: start{[16]byte{4}, 1}, Seq: uint64(i + 1), Vote: v, Body: m}
		if err := c.bus.Send(topic.BFT(harbour, 1, 4), p.seal(voteKey(4), g)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "equivocation counted", func() bool { return c.nodes[0].v.Stats().Equivocations == 1 })
	c.stop(1)
	c.start(1)
	ev := c.nodes[0].v.Evidence()
	if len(ev) != 1 {
		t.Fatalf("evidence: got %d accusations, want one", len(ev))
	}
	if j, err := ev[0].Judge(ledger.Trust{Genesis: c.genesis}); err != nil || len(j.Guilty) != 1 || j.Guilty[0].Name != "validator 4" {
		t.Errorf("the evidence comes to %+v, %v; want validator 4 guilty", j, err)
	}
	b = batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, 1, 2, 3)
}

// What the engine would take amiss does not reach it.
func TestANewViewIsCheckedWhole(t *testing.T) {
	b := newBench(t)
	v := &Validator{core: b.k}
	s := newSmart(&seat{Validator: v}, 1, []uint64{1, 2, 3, 4}, Timing{}.withDefaults(), b.k.members().limit, nil, b.c.Logger)
	vd := func(n, next uint64, f func(*protos.ViewData)) *protos.SignedViewData {
		d := &protos.ViewData{NextView: next, LastDecision: &protos.Proposal{}}
		if f != nil {
			f(d)
		}
		raw, err := proto.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return &protos.SignedViewData{RawViewData: raw, Signer: n, Signature: ed25519.Sign(voteKey(n), b.k.viewInput(raw))}
	}
	forged := vd(3, 1, nil)
	forged.Signature = vd(4, 1, nil).Signature
	for name, tc := range map[string]struct {
		parts []*protos.SignedViewData
		want  string
	}{
		"good":             {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, nil), vd(3, 1, nil)}, ""},
		"one twice":        {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, nil), vd(3, 1, nil), vd(3, 1, nil)}, "second of validator 3"},
		"forged":           {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, nil), forged}, "signature of validator 3"},
		"a stranger":       {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, nil), vd(9, 1, nil)}, "signature of validator 9"},
		"too few":          {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, nil)}, "fewer than a quorum"},
		"mixed views":      {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 2, nil), vd(3, 1, nil)}, "for view 2 among those for 1"},
		"no last decision": {[]*protos.SignedViewData{vd(1, 1, nil), vd(2, 1, func(d *protos.ViewData) { d.LastDecision = nil }), vd(3, 1, nil)}, "malformed"},
	} {
		next, err := s.checkNewView(&protos.NewView{SignedViewData: tc.parts})
		if tc.want == "" && (err != nil || next != 1) || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got view %d, %v; want %q", name, next, err, tc.want)
		}
	}

	// In view 2, changing to view 3.
	s.views.real.Store(2)
	s.views.current.Store(3)
	commit := func(view uint64) *protos.Message {
		return &protos.Message{Content: &protos.Message_Commit{Commit: &protos.Commit{View: view}}}
	}
	data := func(next uint64) *protos.Message {
		return &protos.Message{Content: &protos.Message_ViewData{ViewData: vd(2, next, nil)}}
	}
	for i, tc := range []struct {
		m    *protos.Message
		want bool
	}{
		{commit(1), false}, {commit(2), true}, {commit(3), true},
		{data(2), false}, {data(3), true}, {data(3), false},
		{&protos.Message{Content: &protos.Message_NewView{NewView: &protos.NewView{SignedViewData: []*protos.SignedViewData{vd(1, 3, nil), vd(2, 3, nil), vd(3, 3, nil)}}}}, true},
		{&protos.Message{Content: &protos.Message_NewView{NewView: &protos.NewView{SignedViewData: []*protos.SignedViewData{vd(1, 3, nil), vd(2, 3, nil), vd(3, 3, nil)}}}}, false},
		{&protos.Message{Content: &protos.Message_HeartBeat{HeartBeat: &protos.HeartBeat{View: 0}}}, true},
	} {
		if got := s.admit(2, tc.m); got != tc.want {
			t.Errorf("message %d: admitted %v, want %v", i, got, tc.want)
		}
	}
}

// An engine that delivers to a view that is gone is not left waiting.
func TestADeliveryToNobodyIsFreed(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	e := c.nodes[0].v.place().engine.(*smart)
	freed := make(chan struct{})
	go func() {
		e.deliverChan <- struct{}{} // as its controller does
		close(freed)
	}()
	select {
	case <-freed:
	case <-time.After(20 * time.Second):
		t.Fatal("still waiting after 20 s")
	}
	u := newUnit(1)
	b := batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, c.all()...)
}

// Queues are bounded: what does not fit is dropped and counted.
func TestQueuesAreBounded(t *testing.T) {
	var count counters
	tr := &transport{self: 1, count: &count, resend: time.Hour, journal: newBench(t).k.journal}
	tr.configure(newBench(t).k.members(), voteKey(1))
	p := tr.peers[2]
	for range queueMessages + 5 {
		tr.queue(p, &outgoing{kind: kindMeet})
	}
	if len(p.out) != queueMessages || count.dropped.Load() != 5 {
		t.Errorf("got %d queued and %d dropped, want %d and 5", len(p.out), count.dropped.Load(), queueMessages)
	}
	p = tr.peers[3]
	big := make([]byte, 16<<20)
	for range 6 {
		tr.queue(p, &outgoing{kind: kindEngine, m: message{body: big}})
	}
	if len(p.out) != queueBytes/len(big) || count.dropped.Load() != 7 {
		t.Errorf("got %d queued of 16 MiB and %d dropped, want %d and 7", len(p.out), count.dropped.Load(), queueBytes/len(big))
	}
}

// A vote is sent again until its receiver has moved on, and not for ever.
func TestVotesAreSentAgain(t *testing.T) {
	var count counters
	tr := &transport{self: 1, count: &count, resend: time.Nanosecond, journal: newBench(t).k.journal}
	tr.configure(newBench(t).k.members(), voteKey(1))
	commit := &outgoing{kind: kindEngine, m: message{vote: vote{slot{0, 5, phaseCommit}, ledger.Hash{1}}}}
	prepare := &outgoing{kind: kindEngine, m: message{vote: vote{slot{0, 5, phasePrepare}, ledger.Hash{1}}}}
	again := func(p *peer) int {
		n := len(p.out)
		time.Sleep(time.Millisecond) // well past when a try is due
		tr.again(p)
		return len(p.out) - n
	}
	p := tr.peers[2]
	tr.queue(p, commit)
	total := 0
	for range 3 * resendTries {
		total += again(p)
	}
	if total != resendTries {
		t.Errorf("sent again: got %d times, want %d", total, resendTries)
	}
	p = tr.peers[3]
	tr.queue(p, &outgoing{kind: kindEngine, m: prepare.m})
	tr.queue(p, &outgoing{kind: kindEngine, m: commit.m})
	p.voted = slot{0, 5, phaseCommit}
	if got := again(p); got != 1 {
		t.Errorf("to a peer that has committed: got %d sent again, want the commit only", got)
	}
	p.decided = 5
	if got := again(p); got != 0 || len(p.resends) != 0 {
		t.Errorf("to a peer that has decided: got %d sent again, want none", got)
	}
	p = tr.peers[4]
	tr.queue(p, &outgoing{kind: kindEngine, m: prepare.m})
	tr.queue(p, &outgoing{kind: kindEngine, m: message{changesView: true}})
	if got := again(p); got != 0 {
		t.Errorf("after giving the view up: got %d sent again, want none", got)
	}
}
