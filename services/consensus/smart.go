package consensus

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hyperledger-labs/SmartBFT/pkg/api"
	bft "github.com/hyperledger-labs/SmartBFT/pkg/consensus"
	"github.com/hyperledger-labs/SmartBFT/pkg/metrics"
	"github.com/hyperledger-labs/SmartBFT/pkg/metrics/disabled"
	"github.com/hyperledger-labs/SmartBFT/pkg/types"
	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// smart runs SmartBFT v1.0.1 behind [engine]. What was learned from its source
// and is worked around here is in DESIGN.md.
type smart struct {
	host    host
	nodes   []uint64
	self    uint64
	config  types.Configuration
	tick    time.Duration
	log     *slog.Logger
	entries [][]byte

	c       *bft.Consensus
	views   viewGauges
	tickers []*time.Ticker
	started atomic.Bool
	replay  atomic.Pointer[[][]byte]

	// deliverChan is the engine's own; see rescue. delivered counts what it may
	// be about to send on it.
	deliverChan chan struct{}
	inFlight    *inFlight
	delivered   atomic.Uint64
	stopRescue  chan struct{}
	rescuing    sync.WaitGroup

	// last message that was encoded: a broadcast comes as one call a peer.
	outMu sync.Mutex
	out   *protos.Message
	outM  message

	// digested is the last proposal that was hashed here.
	digestMu sync.Mutex
	digested types.Proposal
	digest   ledger.Hash

	// seen holds, for each peer, the next view of its last view data and new view
	// that was let through.
	seenMu       sync.Mutex
	seenViewData map[uint64]uint64
	seenNewView  map[uint64]uint64
}

// newSmart prepares an engine; entries are those of its log since the last
// truncation.
func newSmart(h host, self uint64, nodes []uint64, t Timing, maxPayload int, entries [][]byte, log *slog.Logger) *smart {
	c := types.DefaultConfig
	c.SelfID = self
	c.RequestBatchMaxCount = poolRequests
	c.RequestBatchMaxBytes = uint64(maxPayload)
	c.RequestBatchMaxInterval = t.BatchWait
	c.RequestMaxBytes = MaxRequest
	c.IncomingMessageBufferSize = 1024
	c.RequestPoolSize = 2 * poolRequests // intake bounds it more tightly
	c.RequestPoolSubmitTimeout = time.Second
	c.RequestForwardTimeout = t.Complain / 4 // the engine waits for both in turn
	c.RequestComplainTimeout = t.Complain - t.Complain/4
	c.RequestAutoRemoveTimeout = max(t.Complain, 365*24*time.Hour) // never: intake has it acknowledged when it is decided
	c.ViewChangeResendInterval = t.ViewChangeResend
	c.ViewChangeTimeout = t.ViewChange
	c.LeaderHeartbeatTimeout = t.Heartbeat
	c.LeaderHeartbeatCount = 10
	c.NumOfTicksBehindBeforeSyncing = uint64(max(1, t.Behind/t.Tick))
	c.CollectTimeout = t.Collect
	c.SyncOnStart = false // the validator catches up before it starts the engine
	c.LeaderRotation, c.DecisionsPerLeader = false, 0
	return &smart{
		host: h, nodes: nodes, self: self, config: c, tick: t.Tick, log: log, entries: entries,
		seenViewData: map[uint64]uint64{}, seenNewView: map[uint64]uint64{},
	}
}

func (s *smart) start(last decision) error {
	lp, ls := toSmart(last)
	md := &protos.ViewMetadata{}
	if err := proto.Unmarshal(lp.Metadata, md); err != nil {
		return fmt.Errorf("metadata of the last block: %w", err)
	}
	entries, restore, err := relevantEntries(s.entries, md.LatestSequence)
	if err != nil {
		return err
	}
	if restore != nil {
		s.replay.Store(&restore)
	}
	t1, t2 := time.NewTicker(s.tick), time.NewTicker(s.tick)
	s.tickers = []*time.Ticker{t1, t2}
	met := api.NewMetrics(&s.views)
	s.c = &bft.Consensus{
		Config: s.config, Application: s, Assembler: s, WAL: s, WALInitialContent: entries, Comm: s, Signer: s, Verifier: s,
		MembershipNotifier: s, RequestInspector: s, Synchronizer: s, Logger: smartLogger{s}, Metrics: met,
		Metadata: md, LastProposal: lp, LastSignatures: ls, Scheduler: t1.C, ViewChangerTicker: t2.C,
	}
	// Start runs in a goroutine of its own so that an engine that gives up while
	// starting takes down only that.
	done := make(chan error, 1)
	go func() {
		err := errors.New("the engine gave up while starting")
		defer func() { done <- err }()
		err = s.c.Start()
	}()
	if err := <-done; err != nil {
		return err
	}
	if s.deliverChan, err = deliverChanOf(s.c); err != nil {
		return err
	}
	if s.inFlight, err = inFlightOf(s.c); err != nil {
		return err
	}
	s.stopRescue = make(chan struct{})
	s.rescuing.Go(s.rescue)
	s.started.Store(true)
	return s.repropose(entries)
}

// deliverChanOf reaches into the engine, for [smart.rescue]. It is checked at
// every start that the field is what v1.0.1 has.
func deliverChanOf(c *bft.Consensus) (chan struct{}, error) {
	controller := reflect.ValueOf(c).Elem().FieldByName("controller")
	if controller.Kind() != reflect.Pointer || controller.IsNil() {
		return nil, errors.New("engine: no controller: is this SmartBFT v1.0.1?")
	}
	f := controller.Elem().FieldByName("deliverChan")
	if !f.IsValid() || f.Type() != reflect.TypeFor[chan struct{}]() {
		return nil, errors.New("engine: no deliverChan: is this SmartBFT v1.0.1?")
	}
	return *(*chan struct{})(unsafe.Pointer(f.UnsafeAddr())), nil
}

// rescueAfter is how long the engine may wait for a view that is gone.
const rescueAfter = 250 * time.Millisecond

// rescue frees the engine from waiting for ever. When a view is given up while
// its last decision is on the way, the view no longer waits for the delivery,
// and v1.0.1's controller, which then delivers, waits for the view: the
// validator would take part in nothing until it is restarted. A delivery that
// was over a while ago and still waits has nobody to wait for.
func (s *smart) rescue() {
	tick := time.NewTicker(rescueAfter)
	defer tick.Stop()
	seen := s.delivered.Load()
	trailed := false
	for {
		select {
		case <-s.stopRescue:
			return
		case <-tick.C:
		}
		if n := s.delivered.Load(); n != seen {
			seen, trailed = n, false
			continue
		}
		// It finds out that it is behind only by what the leader says. When that is
		// lost, or leaves this validator out, the others' word does as well; and a new
		// view needs validators in step. The engine is told as the leader would.
		if was := trailed; s.host.trails() {
			if trailed = true; was {
				_, leader := s.status()
				s.c.HandleMessage(leader, &protos.Message{Content: &protos.Message_HeartBeat{
					HeartBeat: &protos.HeartBeat{View: s.views.real.Load(), Seq: math.MaxUint64}}})
				trailed = false
			}
		}
		select {
		case <-s.deliverChan:
			s.log.Info("engine freed from waiting for a view that is gone")
		default:
		}
	}
}

// repropose sends a proposal that was made before a restart to the others: the
// engine says again only that it prepared it, which is of no use to who never
// got it.
func (s *smart) repropose(entries [][]byte) error {
	for _, e := range entries {
		m := &protos.SavedMessage{}
		if err := proto.Unmarshal(e, m); err != nil {
			return err
		}
		pp := m.GetProposedRecord().GetPrePrepare()
		if pp == nil || s.nodes[pp.View%uint64(len(s.nodes))] != s.self {
			continue
		}
		out := &protos.Message{Content: &protos.Message_PrePrepare{PrePrepare: pp}}
		for _, n := range s.nodes {
			if n != s.self {
				s.SendConsensus(n, out)
			}
		}
	}
	return nil
}

// relevantEntries drops what the engine would take for work in progress and is
// decided already: restoring a prepared proposal below the current height leaves
// v1.0.1 waiting in it for ever.
//
// It looks at the last entry only. If that says "changing views", the proposal
// before it, on which our commit may have left, would be forgotten, and our word
// to the next leader would be that there is none. restore, if not nil, is what
// the entries must become between its reading of the view and its reading of
// the proposal; see [smart.VerificationSequence].
func relevantEntries(entries [][]byte, decided uint64) (keep, restore [][]byte, err error) {
	var last *protos.SavedMessage
	for i, e := range entries {
		m := &protos.SavedMessage{}
		if err := proto.Unmarshal(e, m); err != nil {
			return nil, nil, fmt.Errorf("journal: engine's entry %d: %w", i, err)
		}
		if m.GetProposedRecord() != nil && m.GetProposedRecord().GetPrePrepare().GetSeq() <= decided {
			continue
		}
		if m.GetCommit() != nil && m.GetCommit().GetCommit().GetSeq() <= decided {
			continue
		}
		keep = append(keep, e)
		last = m
	}
	if last.GetViewChange() == nil {
		return keep, nil, nil
	}
	var open [][]byte
	for _, e := range keep {
		m := &protos.SavedMessage{}
		if err := proto.Unmarshal(e, m); err != nil {
			return nil, nil, err
		}
		switch {
		case m.GetProposedRecord() != nil:
			open = [][]byte{e}
		case m.GetCommit() != nil && len(open) == 1:
			open = append(open, e)
		case m.GetNewView() != nil:
			open = nil
		}
	}
	if len(open) == 0 {
		return keep, nil, nil
	}
	// The engine keeps the slice that it is given: same length, other content.
	restore = make([][]byte, 0, len(keep))
	for len(restore)+len(open) < len(keep) {
		restore = append(restore, open[0])
	}
	return slices.Clone(keep), append(restore, open...), nil
}

func (s *smart) stop() {
	if s.c != nil && s.started.Swap(false) {
		s.c.Stop()
		close(s.stopRescue) // not before: what stops may have to be freed
		s.rescuing.Wait()
	}
	for _, t := range s.tickers {
		t.Stop()
	}
}

func (s *smart) submit(raw []byte) error {
	err := s.c.SubmitRequest(raw)
	// The engine's own errors for these are not exported from its internal
	// package; both mean that there is nothing left to do.
	if err != nil && (err.Error() == "request already exists" || err.Error() == "request already processed") {
		return nil
	}
	// Blocks that were fetched are taken out of the pool by forget, and this one
	// may have come in behind it.
	if err == nil && s.host.decidedRequest(raw) {
		s.drop(raw)
	}
	return err
}

// drop takes a request out of the pool. Left there, it would be proposed, as
// nothing, for ever, and at a follower depose the leader.
func (s *smart) drop(raw []byte) {
	if err := s.c.Pool.RemoveRequest(s.RequestID(raw)); err != nil {
		s.log.Debug("request was not in the pool", "err", err)
	}
}

func (s *smart) forget() {
	if !s.started.Load() {
		return
	}
	s.c.Pool.Prune(func(raw []byte) error {
		if s.host.decidedRequest(raw) {
			return errors.New("decided")
		}
		return nil
	})
}

func (s *smart) status() (view, leader uint64) {
	if !s.started.Load() {
		return 0, 0
	}
	return s.views.real.Load(), s.c.GetLeaderID()
}

// receive passes on what cannot harm the engine.
func (s *smart) receive(from uint64, m message) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("engine panicked on a message", "from", from, "panic", p, "stack", string(debug.Stack()))
		}
	}()
	if msg, ok := m.parsed.(*protos.Message); ok && s.started.Load() && s.admit(from, msg) {
		if p := msg.GetPrePrepare().GetProposal(); p != nil { // hashed when it was parsed
			s.digestMu.Lock()
			s.digested, s.digest = fromProto(p), m.vote.Digest
			s.digestMu.Unlock()
		}
		s.c.HandleMessage(from, msg)
	}
}

// hold bounds how long a message for a view change waits for this validator to
// get as far as its sender: the engine drops what comes early, and its sender
// does not send it again.
const hold = 400 * time.Millisecond

// admit refuses messages that v1.0.1 takes amiss although an honest peer may
// send them, or the network deliver them late: a vote of an earlier view makes
// it complain of an innocent leader; a second new view for the view that it is
// in restarts it; and it counts unverified duplicates in a new view.
func (s *smart) admit(from uint64, m *protos.Message) bool {
	switch {
	case m.GetPrePrepare() != nil:
		// Votes for the block before come with a proposal only where leaders take
		// turns; each would be checked.
		return m.GetPrePrepare().View >= s.views.real.Load() && len(m.GetPrePrepare().PrevCommitSignatures) == 0
	case m.GetPrepare() != nil:
		return m.GetPrepare().View >= s.views.real.Load()
	case m.GetCommit() != nil:
		return m.GetCommit().View >= s.views.real.Load()
	case m.GetViewData() != nil:
		vd, err := s.checkViewData(from, m.GetViewData())
		if err != nil {
			s.log.Warn("view data refused", "from", from, "err", err)
			return false
		}
		return s.changing(vd.NextView) && s.first(s.seenViewData, from, vd.NextView)
	case m.GetNewView() != nil:
		next, err := s.checkNewView(m.GetNewView())
		if err != nil {
			s.log.Warn("new view refused", "from", from, "err", err)
			return false
		}
		return s.changing(next) && s.first(s.seenNewView, from, next)
	}
	return true
}

// changing waits until the engine is changing to the view, and reports whether
// it is.
func (s *smart) changing(view uint64) bool {
	for end := time.Now().Add(hold); s.views.current.Load() < view && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond) // the engine offers nothing to wait on but its gauges
	}
	return s.views.current.Load() == view && s.views.real.Load() < view
}

func (s *smart) first(seen map[uint64]uint64, from, view uint64) bool {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	if seen[from] >= view {
		return false
	}
	seen[from] = view
	return true
}

// checkViewData verifies what a validator says of its state. v1.0.1 puts it into
// the new view without looking at its size, and before the first decision
// without looking at its signature: one liar's would make all of it useless.
func (s *smart) checkViewData(from uint64, svd *protos.SignedViewData) (*protos.ViewData, error) {
	vd := &protos.ViewData{}
	most := 2 * (int(s.config.RequestBatchMaxBytes) + perProposal)
	switch {
	case svd.Signer != from:
		return nil, fmt.Errorf("signer: %d", svd.Signer)
	case len(svd.RawViewData) > most:
		return nil, fmt.Errorf("%d bytes, at most %d", len(svd.RawViewData), most)
	case len(svd.Signature) > 64:
		return nil, fmt.Errorf("signature: %d bytes", len(svd.Signature))
	case s.host.checkView(svd.Signer, svd.RawViewData, svd.Signature) != nil:
		return nil, errors.New("signature is not valid")
	}
	if err := proto.Unmarshal(svd.RawViewData, vd); err != nil {
		return nil, err
	}
	if vd.LastDecision == nil {
		return nil, errors.New("no last decision")
	}
	return vd, nil
}

// checkNewView verifies every part of a new view, which the engine does not:
// each signer once, with a valid signature, for one view.
func (s *smart) checkNewView(nv *protos.NewView) (next uint64, err error) {
	seen := map[uint64]bool{}
	for i, svd := range nv.SignedViewData {
		vd := &protos.ViewData{}
		switch {
		case seen[svd.Signer]:
			return 0, fmt.Errorf("signed_view_data[%d]: second of validator %d", i, svd.Signer)
		case s.host.checkView(svd.Signer, svd.RawViewData, svd.Signature) != nil:
			return 0, fmt.Errorf("signed_view_data[%d]: signature of validator %d is not valid", i, svd.Signer)
		case proto.Unmarshal(svd.RawViewData, vd) != nil || vd.LastDecision == nil:
			return 0, fmt.Errorf("signed_view_data[%d]: malformed", i)
		case i > 0 && vd.NextView != next:
			return 0, fmt.Errorf("signed_view_data[%d]: for view %d among those for %d", i, vd.NextView, next)
		}
		seen[svd.Signer] = true
		next = vd.NextView
	}
	if len(seen) < ledger.Quorum(len(s.nodes)) {
		return 0, fmt.Errorf("%d validators, fewer than a quorum", len(seen))
	}
	return next, nil
}

// smartCodec reads SmartBFT's formats.
type smartCodec struct{}

func (smartCodec) parse(body []byte) (message, error) {
	m := &protos.Message{}
	if err := proto.Unmarshal(body, m); err != nil {
		return message{}, err
	}
	v, err := voteOf(m)
	return message{body: body, vote: v, parsed: m}, err
}

func (smartCodec) votes(entry []byte) ([]vote, error) {
	m := &protos.SavedMessage{}
	if err := proto.Unmarshal(entry, m); err != nil {
		return nil, err
	}
	return votesOf(m)
}

func votesOf(m *protos.SavedMessage) ([]vote, error) {
	switch {
	case m.GetProposedRecord() != nil:
		p := m.GetProposedRecord().GetPrepare()
		d, err := digest(p.GetDigest())
		if err != nil {
			return nil, err
		}
		at := slot{View: p.GetView(), Height: ledger.Height(p.GetSeq())}
		propose, prepare := at, at
		// A follower never sends the proposal, so that this is the leader's word.
		propose.Phase, prepare.Phase = phasePropose, phasePrepare
		return []vote{{propose, d}, {prepare, d}}, nil
	case m.GetCommit() != nil:
		v, err := voteOf(m.GetCommit())
		return []vote{v}, err
	}
	return nil, nil
}

func (smartCodec) position(metadata []byte) (slot, error) {
	md := &protos.ViewMetadata{}
	if err := proto.Unmarshal(metadata, md); err != nil {
		return slot{}, fmt.Errorf("metadata: %w", err)
	}
	return slot{View: md.ViewId, Height: ledger.Height(md.LatestSequence)}, nil
}

// voteOf reads what a message votes for.
func voteOf(m *protos.Message) (vote, error) { return readVote(m, digestOf) }

// readVote is voteOf with a function that hashes a proposal.
func readVote(m *protos.Message, of func(types.Proposal) (ledger.Hash, error)) (vote, error) {
	var v vote
	var err error
	switch c := m.GetContent().(type) {
	case *protos.Message_PrePrepare:
		p := c.PrePrepare
		if p.GetProposal() == nil {
			return v, errors.New("pre_prepare: no proposal")
		}
		v.slot = slot{p.View, ledger.Height(p.Seq), phasePropose}
		v.Digest, err = of(fromProto(p.Proposal))
	case *protos.Message_Prepare:
		v.slot = slot{c.Prepare.GetView(), ledger.Height(c.Prepare.GetSeq()), phasePrepare}
		v.Digest, err = digest(c.Prepare.GetDigest())
	case *protos.Message_Commit:
		v.slot = slot{c.Commit.GetView(), ledger.Height(c.Commit.GetSeq()), phaseCommit}
		v.Digest, err = digest(c.Commit.GetDigest())
	case nil:
		err = errors.New("no content")
	}
	return v, err
}

func digest(s string) (ledger.Hash, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return ledger.Hash{}, fmt.Errorf("digest: %d digits, must be 64 hex digits", len(s))
	}
	return ledger.Hash(b), nil
}

func digestOf(p types.Proposal) (ledger.Hash, error) { return digest(p.Digest()) }

// digestOf is the package's, for a proposal that the engine holds: a megabyte
// that it shows at each step.
func (s *smart) digestOf(p types.Proposal) (ledger.Hash, error) {
	s.digestMu.Lock()
	defer s.digestMu.Unlock()
	same := len(p.Payload) > 0 && len(p.Payload) == len(s.digested.Payload) && &p.Payload[0] == &s.digested.Payload[0] &&
		bytes.Equal(p.Header, s.digested.Header) && bytes.Equal(p.Metadata, s.digested.Metadata) &&
		p.VerificationSequence == s.digested.VerificationSequence
	if same {
		return s.digest, nil
	}
	d, err := digestOf(p)
	if err == nil {
		s.digested, s.digest = p, d
	}
	return d, err
}

func fromProto(p *protos.Proposal) types.Proposal {
	return types.Proposal{Header: p.Header, Payload: p.Payload, Metadata: p.Metadata, VerificationSequence: int64(p.VerificationSequence)}
}

func toSmart(d decision) (types.Proposal, []types.Signature) {
	p := types.Proposal{Header: d.Proposal.Header, Payload: d.Proposal.Payload, Metadata: d.Proposal.Metadata}
	var sigs []types.Signature
	for _, v := range d.Votes {
		sigs = append(sigs, types.Signature{ID: v.Validator, Value: v.Signature})
	}
	return p, sigs
}

func ours(p types.Proposal) proposal {
	return proposal{Header: p.Header, Payload: p.Payload, Metadata: p.Metadata}
}

// What follows is what the engine asks for.

func (s *smart) position(metadata []byte) slot {
	at, err := smartCodec{}.position(metadata)
	if err != nil {
		s.host.fail(err)
		runtime.Goexit()
	}
	return at
}

// AssembleProposal implements the engine's Assembler.
func (s *smart) AssembleProposal(metadata []byte, requests [][]byte) types.Proposal {
	at := s.position(metadata)
	at.Phase = phasePropose
	for _, raw := range requests {
		if s.host.decidedRequest(raw) {
			s.drop(raw)
		}
	}
	p := s.host.assemble(at, metadata, requests)
	return types.Proposal{Header: p.Header, Payload: p.Payload, Metadata: p.Metadata}
}

// VerifyProposal implements the engine's Verifier.
func (s *smart) VerifyProposal(p types.Proposal) ([]types.RequestInfo, error) {
	at, err := smartCodec{}.position(p.Metadata)
	if err != nil {
		return nil, err
	}
	if err := checkMetadata(p.Metadata); err != nil {
		return nil, err
	}
	d, err := s.digestOf(p)
	if err != nil {
		return nil, err
	}
	at.Phase = phasePrepare
	ids, err := s.host.verify(at, d, ours(p))
	return infos(ids), err
}

// checkMetadata refuses metadata that hold more than they must: they are bounded
// by nothing else, and what a view change repeats must fit a message.
func checkMetadata(b []byte) error {
	md := &protos.ViewMetadata{}
	if err := proto.Unmarshal(b, md); err != nil {
		return fmt.Errorf("proposal: metadata: %w", err)
	}
	plain, err := proto.MarshalOptions{Deterministic: true}.Marshal(&protos.ViewMetadata{
		ViewId: md.ViewId, LatestSequence: md.LatestSequence, DecisionsInView: md.DecisionsInView})
	if err != nil {
		return err
	}
	if !bytes.Equal(plain, b) {
		return errors.New("proposal: metadata: hold more than view, sequence and decisions")
	}
	return nil
}

func infos(ids []ledger.Hash) []types.RequestInfo {
	out := make([]types.RequestInfo, len(ids))
	for i, id := range ids {
		out[i] = types.RequestInfo{ID: hex.EncodeToString(id[:])}
	}
	return out
}

// RequestID implements the engine's RequestInspector.
func (s *smart) RequestID(raw []byte) types.RequestInfo {
	return infos([]ledger.Hash{s.host.requestID(raw)})[0]
}

// RequestsFromProposal implements the engine's Verifier.
func (s *smart) RequestsFromProposal(p types.Proposal) []types.RequestInfo {
	return infos(s.host.requestsOf(ours(p)))
}

// VerifyRequest implements the engine's Verifier; it is asked about requests
// from peers, of which there are none.
func (s *smart) VerifyRequest(raw []byte) (types.RequestInfo, error) {
	if _, err := parseRequest(raw); err != nil {
		return types.RequestInfo{}, err
	}
	if s.host.decidedRequest(raw) {
		return types.RequestInfo{}, errors.New("decided before")
	}
	return s.RequestID(raw), nil
}

// VerifyConsenterSig implements the engine's Verifier.
func (s *smart) VerifyConsenterSig(sig types.Signature, p types.Proposal) ([]byte, error) {
	if len(sig.Msg) != 0 || p.VerificationSequence != 0 {
		return nil, errors.New("vote: carries what no vote covers")
	}
	return nil, s.host.checkVote(ours(p), ledger.Vote{Validator: sig.ID, Signature: sig.Value})
}

// VerifySignature implements the engine's Verifier.
func (s *smart) VerifySignature(sig types.Signature) error {
	return s.host.checkView(sig.ID, sig.Msg, sig.Value)
}

// VerificationSequence implements the engine's Verifier. The engine calls it
// while starting, after it read the view from its log and before it reads the
// proposal: the one moment to show it both; see relevantEntries.
func (s *smart) VerificationSequence() uint64 {
	if r := s.replay.Swap(nil); r != nil {
		copy(s.c.WALInitialContent, *r)
	}
	return 0
}

// AuxiliaryData implements the engine's Verifier; only leader rotation uses it.
func (s *smart) AuxiliaryData([]byte) []byte { return nil }

// Sign implements the engine's Signer; it signs view data.
func (s *smart) Sign(b []byte) []byte { return s.host.signView(b) }

// SignProposal implements the engine's Signer.
func (s *smart) SignProposal(p types.Proposal, _ []byte) *types.Signature {
	at := s.position(p.Metadata)
	at.Phase = phaseCommit
	d, err := s.digestOf(p)
	if err != nil {
		s.host.fail(err)
		runtime.Goexit()
	}
	return &types.Signature{ID: s.self, Value: s.host.sign(at, d, ours(p))}
}

// Deliver implements the engine's Application.
func (s *smart) Deliver(p types.Proposal, sigs []types.Signature) types.Reconfig {
	votes := make([]ledger.Vote, len(sigs))
	for i, sig := range sigs {
		votes[i] = ledger.Vote{Validator: sig.ID, Signature: sig.Value}
	}
	s.host.decide(ours(p), votes)
	s.delivered.Add(1)
	if s.host.over() {
		s.c.Pool.Close() // with nothing in it, nothing is proposed until it is stopped
		return types.Reconfig{}
	}
	// The engine counts each request's age from when it came, and complains of a
	// leader that is only busy. Here it counts from the last decision; but not
	// while views change, when the timers must rest.
	if s.started.Load() && s.views.current.Load() == s.views.real.Load() && s.host.patient() {
		s.c.Pool.RestartTimers()
	}
	return types.Reconfig{}
}

// Sync implements the engine's Synchronizer.
func (s *smart) Sync() types.SyncResponse {
	p, sigs := toSmart(s.host.catchUp())
	s.forget()
	if s.host.over() {
		s.c.Pool.Close()
	}
	s.delivered.Add(1)
	return types.SyncResponse{Latest: types.Decision{Proposal: p, Signatures: sigs}}
}

// MembershipChange implements the engine's MembershipNotifier.
func (s *smart) MembershipChange() bool { return false }

// Append implements the engine's WriteAheadLog.
func (s *smart) Append(entry []byte, truncate bool) error {
	m := &protos.SavedMessage{}
	if err := proto.Unmarshal(entry, m); err != nil {
		return err
	}
	if s.started.Load() && m.GetViewChange() != nil { // the view is given up
		s.forgetHopeless()
	}
	votes, err := votesOf(m)
	if err != nil {
		return err
	}
	return s.host.save(entry, truncate, votes)
}

// Nodes implements the engine's Comm.
func (s *smart) Nodes() []uint64 { return s.nodes }

// SendConsensus implements the engine's Comm.
func (s *smart) SendConsensus(to uint64, m *protos.Message) {
	s.outMu.Lock()
	defer s.outMu.Unlock()
	if s.out != m {
		body, err := proto.Marshal(m)
		if err != nil {
			s.host.fail(fmt.Errorf("encoding a message: %w", err))
			return
		}
		v, err := readVote(m, s.digestOf)
		if err != nil {
			s.host.fail(fmt.Errorf("reading our own message: %w", err))
			return
		}
		s.out, s.outM = m, message{body: body, vote: v, changesView: m.GetViewChange() != nil}
	}
	s.host.send(to, s.outM)
}

// SendTransaction implements the engine's Comm. Requests are not passed to the
// leader: it reads the same stream, in the stream's order, and a frame that
// overtakes its device's frame before would make that one a replay. A leader
// that does not get on with the stream is replaced.
func (s *smart) SendTransaction(uint64, []byte) {}

// viewGauges reads the engine's mind: the view that it is in, and the one that
// it is changing to, are nowhere else to be had.
type viewGauges struct {
	disabled.Provider
	// current is the view being changed to, or the one it is in; real is the last
	// that was entered. Both are set by the view changer.
	current, real atomic.Uint64
}

// NewGauge implements the engine's metrics.Provider.
func (g *viewGauges) NewGauge(o metrics.GaugeOpts) metrics.Gauge {
	switch o.Name {
	case "viewchange_current_view":
		return &gauge{v: &g.current}
	case "viewchange_real_view":
		return &gauge{v: &g.real}
	}
	return g.Provider.NewGauge(o)
}

type gauge struct{ v *atomic.Uint64 }

func (g *gauge) With(...string) metrics.Gauge { return g }
func (g *gauge) Add(float64)                  {}
func (g *gauge) Set(v float64)                { g.v.Store(uint64(math.Max(v, 0))) }

// smartLogger takes the engine's words for slog, a level lower than it finds
// them: to it, every decision is news.
type smartLogger struct{ s *smart }

func (l smartLogger) say(level slog.Level, format string, args ...any) {
	ctx := context.Background()
	if l.s.log.Enabled(ctx, level) {
		l.s.log.Log(ctx, level, "engine", "text", fmt.Sprintf(format, args...))
	}
}

// Debugf implements the engine's Logger.
func (l smartLogger) Debugf(f string, a ...any) { l.say(slog.LevelDebug-4, f, a...) }

// Infof implements the engine's Logger.
func (l smartLogger) Infof(f string, a ...any) { l.say(slog.LevelDebug-2, f, a...) }

// Warnf implements the engine's Logger.
func (l smartLogger) Warnf(f string, a ...any) { l.say(slog.LevelDebug, f, a...) }

// Errorf implements the engine's Logger.
func (l smartLogger) Errorf(f string, a ...any) { l.say(slog.LevelWarn, f, a...) }

// Panicf implements the engine's Logger. It ends the validator, and of the
// process only the goroutine: what the engine would do next relies on what just
// turned out to be false, but three other validators may live next door.
func (l smartLogger) Panicf(f string, a ...any) {
	l.s.host.fail(fmt.Errorf("engine: "+f, a...))
	runtime.Goexit()
}
