package consensus

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Bounds of the queues, one of each for every peer. What does not fit is dropped
// and counted: votes are sent again, and for the rest the engine has timeouts.
const (
	queueMessages = 1024
	queueBytes    = 64 << 20
	// arrivalsMost bounds what is taken from one peer in arrivalsPer, many times
	// what an honest one sends: checking signatures of a flood costs time.
	arrivalsMost = 250
	arrivalsPer  = 100 * time.Millisecond
	// startEvery bounds how often a peer may say that it has started again.
	startEvery = 50 * time.Millisecond
	// answerEvery bounds how often a peer's question to meet is answered.
	answerEvery = 10 * time.Millisecond
)

// transport carries messages between validators: signed, counted, and until a
// peer has moved on, again.
type transport struct {
	self     uint64
	district traffic.DistrictID
	genesis  ledger.Hash
	nc       *nats.Conn
	journal  *journal
	codec    codec
	count    *counters
	log      *slog.Logger
	resend   time.Duration
	height   func() ledger.Height
	// receive takes what was authenticated, one call at a time for each peer.
	receive func(from uint64, p *parcel, m message)
	// ahead hears of a peer that speaks for later members. Optional.
	ahead   func(from, config uint64)
	witness *witness
	// tap, where set, is given every parcel before it is signed, and sends it, or
	// others, once, twice, late or not at all: so tests make liars and networks.
	tap func(pc parcel, send func(parcel))

	mu     sync.Mutex
	start  start
	key    ed25519.PrivateKey
	config uint64           // the members that all of it is for
	peers  map[uint64]*peer // replaced as a whole
	carry  func(*peer)      // starts carrying a peer's messages; nil while not running
}

// begin sets the start that is in every message from now on.
func (t *transport) begin(s start) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.start = s
}

func (t *transport) current() start {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.start
}

// peer is one other validator, as this one sees it.
type peer struct {
	number uint64
	in     chan []byte
	gone   chan struct{} // closed when it is no member any more
	inSize counterInt

	mu      sync.Mutex
	key     identity.PublicKey
	config  uint64
	wake    chan struct{}
	out     []*outgoing
	outSize int
	// resends holds our newest message for each phase until the peer is beyond.
	resends map[phase]*outgoing
	seq     uint64
	// decided and voted are how far the peer has shown to be.
	decided ledger.Height
	voted   slot
	// owned by the peer's receiving goroutine
	inSeq    uint64
	heard    start
	took     start // newest start in which it took part
	maxVote  ledger.Height
	started  time.Time // when heard was last set
	answered time.Time // when a question to meet was last answered
	// owned by the subscription's goroutine
	arrivals int
	since    time.Time
}

type outgoing struct {
	kind   parcelKind
	config uint64 // of an engine's message
	m      message
	tries  int
	due    time.Time
}

// configure sets members and key from now on. What waits to be sent is dropped:
// it was for members of before, who have no use for it any more.
func (t *transport) configure(m *members, key ed25519.PrivateKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.key, t.config = key, uint64(m.since)
	next := make(map[uint64]*peer, len(m.validators))
	for _, v := range m.validators {
		if v.Number == t.self {
			continue
		}
		p, ok := t.peers[v.Number]
		if !ok {
			p = &peer{number: v.Number, in: make(chan []byte, queueMessages), gone: make(chan struct{}), wake: make(chan struct{}, 1),
				resends: map[phase]*outgoing{}}
			known := t.journal.peer(v.Number)
			p.heard, p.took = known.start, known.Took
		}
		p.mu.Lock()
		p.key, p.config = v.VoteKey, t.config
		p.out, p.outSize = nil, 0
		clear(p.resends)
		p.mu.Unlock()
		if !ok && t.carry != nil {
			t.carry(p)
		}
		next[v.Number] = p
	}
	for n, p := range t.peers {
		if next[n] == nil {
			close(p.gone)
		}
	}
	t.peers = next
}

func (t *transport) peer(n uint64) (*peer, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.peers[n]
	return p, ok
}

func (t *transport) all() map[uint64]*peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers
}

// sender is who speaks: start and key.
func (t *transport) sender() (start, ed25519.PrivateKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.start, t.key
}

// run carries messages until ctx ends.
func (t *transport) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	t.mu.Lock()
	t.carry = func(p *peer) {
		wg.Go(func() { t.sendLoop(ctx, p) })
		wg.Go(func() { t.receiveLoop(ctx, p) })
	}
	for _, p := range t.peers {
		t.carry(p)
	}
	t.mu.Unlock()
	defer wg.Wait()
	defer func() {
		cancel()
		t.mu.Lock()
		defer t.mu.Unlock()
		t.carry = nil
	}()
	sub, err := t.nc.Subscribe(topic.BFTTo(t.district, t.self), t.arrived)
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, 2*queueBytes); err != nil {
		return err
	}
	<-ctx.Done()
	if err := sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		return err
	}
	return ctx.Err()
}

// arrived sorts what comes by its claimed sender; nothing is believed yet, but
// that one sender's junk fills only its own queue, as the subject is in the
// sender's NATS permissions.
func (t *transport) arrived(m *nats.Msg) {
	from, ok := t.senderOf(m.Subject)
	if !ok {
		t.count.strangers.Add(1)
		return
	}
	if len(m.Data) < parcelMin || len(m.Data) > topic.MaxPayload {
		t.count.invalid.Add(1)
		return
	}
	if now := time.Now(); now.Sub(from.since) > arrivalsPer {
		from.since, from.arrivals = now, 0
	}
	if from.arrivals++; from.arrivals > arrivalsMost {
		t.count.dropped.Add(1)
		return
	}
	if from.inSize.Add(int64(len(m.Data))) > queueBytes {
		from.inSize.Add(-int64(len(m.Data)))
		t.count.dropped.Add(1)
		return
	}
	select {
	case from.in <- m.Data:
	default:
		from.inSize.Add(-int64(len(m.Data)))
		t.count.dropped.Add(1)
	}
}

func (t *transport) senderOf(subject string) (*peer, bool) {
	n, err := strconv.ParseUint(subject[strings.LastIndexByte(subject, '.')+1:], 10, 64)
	if err != nil || subject != topic.BFT(t.district, t.self, n) {
		return nil, false
	}
	return t.peer(n)
}

func (t *transport) receiveLoop(ctx context.Context, p *peer) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.gone:
			return
		case b := <-p.in:
			p.inSize.Add(-int64(len(b)))
			t.open(p, b)
		}
	}
}

// open authenticates one message and hands it on.
func (t *transport) open(p *peer, b []byte) {
	p.mu.Lock()
	key, config := p.key, p.config
	p.mu.Unlock()
	pc, err := openParcel(b)
	if err != nil || pc.From != p.number || pc.To != t.self || !signed(b, key, t.genesis) {
		t.count.invalid.Add(1)
		return
	}
	if pc.Config != config && pc.Kind == kindEngine { // starts are the same for all members
		t.count.elsewhere.Add(1)
		if t.ahead != nil {
			t.ahead(p.number, pc.Config)
		}
		return
	}
	m := message{body: pc.Body}
	if pc.Kind == kindEngine {
		m, err = t.codec.parse(pc.Body)
		if err != nil || m.vote != pc.Vote {
			t.count.invalid.Add(1)
			return
		}
	} else if pc.Vote != (vote{}) {
		t.count.invalid.Add(1)
		return
	}
	if !t.fresh(p, pc, b[:parcelMin]) {
		return
	}
	t.count.received.Add(1)
	t.note(p, pc, b)
	if pc.Kind == kindTold {
		t.told(pc.Body)
		return
	}
	p.mu.Lock()
	p.decided = max(p.decided, pc.Decided)
	if v := pc.Vote.slot; v.Phase != phaseNone && later(v, p.voted) {
		p.voted = v
	}
	p.mu.Unlock()
	t.receive(p.number, pc, m)
}

func later(a, b slot) bool {
	if a.Height != b.Height {
		return a.Height > b.Height
	}
	if a.View != b.View {
		return a.View > b.View
	}
	return a.Phase > b.Phase
}

// fresh refuses what was sent before, and what comes from a start that is not
// the newest: a disk that was restored, or an old message played again. A
// question to meet is answered even then, with what is known: the sender should
// learn it.
func (t *transport) fresh(p *peer, pc *parcel, head []byte) bool {
	switch {
	case pc.Start == p.heard:
		if pc.Seq <= p.inSeq {
			t.count.replayed.Add(1)
			return false
		}
	case pc.Start.Counter > p.heard.Counter:
		// Each is made durable. Nobody starts so often but to keep our disk busy.
		now := time.Now()
		if now.Sub(p.started) < startEvery {
			t.count.dropped.Add(1)
			return false
		}
		p.started = now
	default:
		t.count.restored.Add(1)
		return pc.Kind == kindMeet
	}
	if takesPart := pc.Kind == kindEngine && pc.Start != p.took; takesPart || pc.Start != p.heard {
		if err := t.journal.sawPeer(p.number, pc.Start, append([]byte(nil), head...), takesPart); err != nil {
			t.log.Error("peer's start not noted", "peer", p.number, "err", err)
			return false
		}
		if p.heard = pc.Start; takesPart {
			p.took = pc.Start
		}
	}
	p.inSeq = pc.Seq
	return true
}

// note remembers a peer's vote, before the engine sees it, and passes on what
// shows that somebody lies.
func (t *transport) note(p *peer, pc *parcel, b []byte) {
	if pc.Vote.Phase == phaseNone {
		return
	}
	p.maxVote = max(p.maxVote, pc.Vote.Height)
	t.tell(t.witness.note(pc, b[:parcelMin], false))
}

// tell passes votes on to all.
func (t *transport) tell(votes [][]byte) {
	for part := range slices.Chunk(votes, toldMost) {
		o := &outgoing{kind: kindTold, m: message{body: bytes.Join(part, nil)}}
		for _, q := range t.all() {
			t.queue(q, o)
		}
	}
}

// told takes what a peer passed on.
func (t *transport) told(body []byte) {
	keys := map[uint64]identity.PublicKey{}
	for n, p := range t.all() {
		p.mu.Lock()
		keys[n] = p.key
		p.mu.Unlock()
	}
	tell, ok := t.witness.hear(keys, body)
	if !ok {
		t.count.invalid.Add(1)
	}
	t.tell(tell)
}

// send queues a message of the engine for some members. A vote is made durable
// first, and dropped if it must not be made.
func (t *transport) send(config, to uint64, m message) {
	p, ok := t.peer(to)
	if !ok {
		return
	}
	if m.vote.Phase != phaseNone {
		if err := t.journal.permit(m.vote); err != nil {
			if errors.Is(err, errTwoVotes) {
				t.count.withheld.Add(1)
				t.log.Error("vote withheld", "err", err)
			} else {
				t.count.dropped.Add(1)
			}
			return
		}
	}
	t.queue(p, &outgoing{kind: kindEngine, config: config, m: m})
}

// queue adds to what a peer's goroutine sends.
func (t *transport) queue(p *peer, o *outgoing) {
	p.mu.Lock()
	if o.kind == kindEngine && o.config != p.config {
		p.mu.Unlock() // of an engine that is gone
		return
	}
	if len(p.out) >= queueMessages || p.outSize+len(o.m.body) > queueBytes {
		p.mu.Unlock()
		t.count.dropped.Add(1)
		return
	}
	p.out = append(p.out, o)
	p.outSize += len(o.m.body)
	if ph := o.m.vote.Phase; ph != phaseNone {
		o.due = time.Now().Add(t.patience(o))
		p.resends[ph] = o
	}
	if o.m.changesView {
		delete(p.resends, phasePropose)
		delete(p.resends, phasePrepare)
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

const resendTries = 6

// patience is how long a message may take before it is sent again. What is large
// takes longer, and would make a slow network slower.
func (t *transport) patience(o *outgoing) time.Duration {
	return t.resend * time.Duration(1+len(o.m.body)>>17) << o.tries
}

func (t *transport) sendLoop(ctx context.Context, p *peer) {
	tick := time.NewTicker(max(t.resend/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.gone:
			return
		case <-p.wake:
		case <-tick.C:
			t.again(p)
		}
		for {
			p.mu.Lock()
			if len(p.out) == 0 {
				p.mu.Unlock()
				break
			}
			o := p.out[0]
			p.out = p.out[1:]
			p.outSize -= len(o.m.body)
			config := p.config
			p.mu.Unlock()
			start, _ := t.sender()
			pc := parcel{Kind: o.kind, From: t.self, To: p.number, Config: config, Start: start, Decided: t.height(), Vote: o.m.vote, Body: o.m.body}
			if t.tap != nil {
				t.tap(pc, t.publish)
				continue
			}
			t.publish(pc)
		}
	}
}

// publish numbers a parcel, signs it and lets it go.
func (t *transport) publish(pc parcel) {
	p, ok := t.peer(pc.To)
	if !ok {
		return // no member any more
	}
	p.mu.Lock()
	p.seq++
	pc.Seq = p.seq
	p.mu.Unlock()
	_, key := t.sender()
	if err := t.nc.Publish(topic.BFT(t.district, p.number, t.self), pc.seal(key, t.genesis)); err != nil {
		t.count.dropped.Add(1)
		return
	}
	t.count.sent.Add(1)
}

// again queues the votes that the peer has not moved on from.
func (t *transport) again(p *peer) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for ph, o := range p.resends {
		// A peer that has decided the height, or is a phase further in it, has no
		// use for the vote.
		beyond := p.decided >= o.m.vote.Height || later(p.voted, o.m.vote.slot) && p.voted.Phase > ph
		if beyond || o.tries >= resendTries {
			delete(p.resends, ph)
			continue
		}
		if now.Before(o.due) || len(p.out) >= queueMessages || p.outSize+len(o.m.body) > queueBytes {
			continue
		}
		o.tries++
		o.due = now.Add(t.patience(o))
		p.out = append(p.out, o)
		p.outSize += len(o.m.body)
		t.count.resent.Add(1)
	}
}

// met is the answer to a validator that starts: what is known of it.
type met struct {
	// Start is the newest start of the asker that is known, and Proof what the
	// asker signed in it: a liar could silence whoever restarts otherwise.
	Start start  `json:"start"`
	Proof []byte `json:"proof"`
	// Took is the newest start in which the asker took part, with TookProof: one
	// that dies while it is silent has starts that say nothing of its votes.
	Took      start  `json:"took"`
	TookProof []byte `json:"took_proof"`
	// Vote is the highest height at which it may have voted.
	Vote ledger.Height `json:"vote"`
	// Asker repeats the start that asks, so that an old answer is no answer.
	Asker start `json:"asker"`
}

// holds reports whether an answer is one to the start in hand, and what it says
// of another start is true: this validator has signed in it, and it is no earlier
// one.
func (t *transport) holds(a met) bool {
	own, key := t.sender()
	if a.Asker != own {
		return false
	}
	proves := func(s start, proof []byte, kind parcelKind) bool {
		if len(proof) != parcelMin {
			return false
		}
		pc, err := parseHead(proof[:headSize])
		return err == nil && pc.From == t.self && pc.Start == s && (kind == 0 || pc.Kind == kind) &&
			signed(proof, identity.PublicKey(key.Public().(ed25519.PublicKey)), t.genesis)
	}
	return (a.Start == own || a.Start.Counter >= own.Counter && proves(a.Start, a.Proof, 0)) &&
		(!t.journal.forgot(a.Took) || proves(a.Took, a.TookProof, kindEngine))
}

// ask sends the question to meet to every peer.
func (t *transport) ask() {
	for _, p := range t.all() {
		t.queue(p, &outgoing{kind: kindMeet})
	}
}

// answer tells a starting peer what is known of it. It is called from the
// peer's receiving goroutine.
func (t *transport) answer(p *peer, asker start) error {
	now := time.Now()
	if now.Sub(p.answered) < answerEvery {
		t.count.dropped.Add(1)
		return nil // it asks again
	}
	p.answered = now
	// It may have decided one height more than what we decided or saw it vote on,
	// and voted on the next, without our seeing.
	known := t.journal.peer(p.number)
	b, err := json.Marshal(met{
		Start: known.start, Proof: known.Proof, Took: known.Took, TookProof: known.TookProof,
		Vote: max(p.maxVote, t.height()+1) + 1, Asker: asker,
	})
	if err != nil {
		return err
	}
	t.queue(p, &outgoing{kind: kindMet, m: message{body: b}})
	return nil
}
