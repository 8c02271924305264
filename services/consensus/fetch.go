package consensus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Bounds of one answer.
const (
	syncBlocks  = 256
	syncHeaders = 2048
	syncBytes   = topic.MaxMessage - (64 << 10)
	syncPart    = 2 << 20
)

// serveBlocks answers anyone who asks for decided blocks: they prove themselves;
// and for snapshots and registries, which others must vouch for. How much of it,
// see [serving].
func (v *Validator) serveBlocks(ctx context.Context) error {
	s := newServing(v.c.Number, v.core.state.genesis, float64(v.c.ServeRequests), float64(v.c.ServeBytes), v.core.members)
	return v.c.Bus.Serve(ctx, topic.Sync(v.c.District, v.c.Number), "", func(ctx context.Context, m *bus.Msg) []byte {
		who, wait, quiet := s.admit(time.Now(), m)
		if wait > 0 {
			v.count.limited.Add(1)
			if quiet {
				return nil
			}
			b, err := proto.Marshal(&pb.SyncResponse{LastHeight: uint64(v.core.store.height()), WaitMs: uint32(min(wait.Milliseconds()+1, 60_000))})
			if err != nil {
				v.log.Error("cannot answer a peer", "err", err)
			}
			return b
		}
		var req pb.SyncRequest
		if err := wire.Decode(identity.Protobuf, m.Data, &req); err != nil {
			v.count.invalid.Add(1)
			return nil
		}
		resp, err := v.core.serve(ctx, &req)
		if err != nil {
			v.log.Error("cannot read for a peer", "height", req.FromHeight, "err", err)
			return nil
		}
		b, err := proto.Marshal(resp)
		if err != nil {
			v.log.Error("cannot answer a peer", "err", err)
			return nil
		}
		s.gave(time.Now(), who, len(b))
		v.count.served.Add(uint64(len(b)))
		return b
	})
}

// serve answers one request.
func (k *core) serve(ctx context.Context, req *pb.SyncRequest) (resp *pb.SyncResponse, err error) {
	resp = &pb.SyncResponse{LastHeight: uint64(k.store.height())}
	switch {
	case req.Steps:
		for _, step := range k.succession.whole() {
			b, err := json.Marshal(step)
			if err != nil {
				return nil, err
			}
			resp.Steps = append(resp.Steps, b)
		}
	case req.Seals:
		if k.seals != nil {
			resp.Seals = k.seals()
		}
	case req.Offers:
		resp.Offers = k.shelf.offers(k.keys.Load().vote)
	case len(req.Snapshot) > 0:
		resp.Part, resp.Size, err = k.shelf.part(req.Snapshot, req.Offset, syncPart)
	case len(req.Registry) == 32:
		resp.Part, resp.Size, err = k.shelf.registry(req.Registry, req.Offset, syncPart, func() (ledger.Hash, *identity.Registry) {
			k.mu.Lock()
			defer k.mu.Unlock()
			return k.state.registryHash, k.state.registry
		})
	default:
		most, bytes := syncBlocks, syncBytes
		if req.Headers {
			most = syncHeaders
		}
		if n := int(req.MaxBlocks); n > 0 {
			most = min(most, n)
		}
		if n := int(req.MaxBytes); n > 0 {
			bytes = min(bytes, n)
		}
		resp.Blocks, err = k.blocks(ctx, ledger.Height(req.FromHeight), most, bytes, req.Headers)
	}
	return resp, err
}

// fetcher is one attempt at catching up with the peers. Everything that it takes
// from them is checked; a peer whose answer was false, late or too large is not
// asked again in it. Of each peer it holds one answer of at most
// [topic.MaxMessage] at a time.
type fetcher struct {
	core   *core
	self   uint64
	others []uint64      // asked beside the members: see [Validator.discover]
	wait   time.Duration // for an answer
	beyond int           // see Config.SnapshotBeyond; negative: only where payloads are gone
	leaps  bool          // may begin with a snapshot: see Config.WholeHistory
	// ask sends a request and waits for the answer.
	ask func(ctx context.Context, peer uint64, req []byte) ([]byte, error)
	// aside are the peers that are not asked any more.
	aside map[uint64]bool
	// useful is the peer whose answer was good last, 0: none.
	useful uint64
}

func (v *Validator) newFetcher() *fetcher {
	var others []uint64
	if o := v.others.Load(); o != nil {
		others = *o
	}
	return &fetcher{core: v.core, self: v.c.Number, others: others, wait: v.c.Timing.Fetch, beyond: v.c.SnapshotBeyond, leaps: !v.c.WholeHistory, aside: map[uint64]bool{},
		ask: func(ctx context.Context, peer uint64, req []byte) ([]byte, error) {
			if v.cut != nil && v.cut(peer) {
				return nil, errors.New("cut off")
			}
			return v.ask(ctx, topic.Sync(v.c.District, peer), peer, req)
		}}
}

// peers are the members who may have more, and are not set aside.
func (f *fetcher) peers(m *members) []uint64 {
	all := m.numbers()
	for _, n := range f.others {
		if !slices.Contains(all, n) {
			all = append(all, n)
		}
	}
	return slices.DeleteFunc(all, func(n uint64) bool { return n == f.self || f.aside[n] })
}

// fetch gets from peers what they have decided beyond this validator, checks it
// and applies it, until every peer that answers has no more.
//
// It is called by the engine, which never decides beside it, and before the
// engine starts. It does not return before the state is that after the last
// block stored, or ctx ends: without it this validator can neither vote nor
// propose. An error means that it cannot go on at all.
func (v *Validator) fetch(ctx context.Context) error {
	v.count.syncs.Add(1)
	from := v.core.height()
	for ctx.Err() == nil {
		if err := v.newFetcher().run(ctx); err != nil {
			return fmt.Errorf("catching up: %w", err)
		}
		if v.core.whole() {
			break
		}
		v.log.Warn("a snapshot is needed, and f+1 peers have none in common yet", "height", uint64(v.core.height()), "blocks", uint64(v.core.store.height()))
		select {
		case <-ctx.Done():
		case <-time.After(v.c.Timing.Fetch):
		}
	}
	if h := v.core.height(); h > from {
		v.log.Info("caught up", "height", uint64(h), "blocks", uint64(h-from))
	}
	return ctx.Err()
}

func (f *fetcher) run(ctx context.Context) error {
	for ctx.Err() == nil {
		progress, err := f.once(ctx)
		if err != nil || !progress {
			return err
		}
	}
	return nil
}

type answer struct {
	from uint64
	resp *pb.SyncResponse
}

// waitsMost bounds how often a peer may put one request off, waitMost for how
// long in all, in times of [fetcher.wait].
const (
	waitsMost = 20
	waitMost  = 8
)

// request asks one peer, again where it says that it will answer later. It
// returns nil where there is no use in asking it again.
func (f *fetcher) request(ctx context.Context, peer uint64, req *pb.SyncRequest) *pb.SyncResponse {
	b, err := proto.Marshal(req)
	if err != nil {
		return nil // unreachable: there is nothing in it that cannot be encoded
	}
	for waits, left := 0, waitMost*f.wait; ; waits++ {
		resp := f.requestOnce(ctx, peer, b)
		if resp == nil || resp.WaitMs == 0 {
			return resp
		}
		wait := max(time.Duration(resp.WaitMs)*time.Millisecond, time.Millisecond)
		if left -= wait; left < 0 || waits >= waitsMost {
			return nil
		}
		if pause(ctx, wait) != nil {
			return nil
		}
	}
}

func (f *fetcher) requestOnce(ctx context.Context, peer uint64, b []byte) *pb.SyncResponse {
	ctx, cancel := context.WithTimeout(ctx, f.wait)
	defer cancel()
	var resp pb.SyncResponse
	data, err := f.ask(ctx, peer, b)
	if err != nil {
		return nil // not there
	}
	if len(data) > topic.MaxMessage {
		err = fmt.Errorf("answer: %d bytes, at most %d", len(data), topic.MaxMessage)
	} else {
		err = wire.Decode(identity.Protobuf, data, &resp)
	}
	if err != nil {
		f.refuse(peer, err)
		return nil
	}
	return &resp
}

// refuse counts a false answer and sets its peer aside.
func (f *fetcher) refuse(peer uint64, err error) {
	f.core.count.falseAnswers.Add(1)
	f.core.log.Warn("a peer's answer was refused", "peer", peer, "err", err)
	f.drop(peer)
}

func (f *fetcher) drop(peer uint64) {
	f.aside[peer] = true
	if f.useful == peer {
		f.useful = 0
	}
}

// askAll asks peers at once. Those that do not answer in time are set aside.
func (f *fetcher) askAll(ctx context.Context, peers []uint64, req *pb.SyncRequest) []answer {
	answers := make(chan answer, len(peers))
	for _, p := range peers {
		// The request decodes and counts beside others; aside is touched here only.
		probe := *f
		probe.aside = map[uint64]bool{}
		go func() { answers <- answer{p, probe.request(ctx, p, req)} }()
	}
	var out []answer
	for range peers {
		a := <-answers
		if a.resp == nil {
			f.drop(a.from)
			continue
		}
		out = append(out, a)
	}
	return out
}

// once asks for what is next and applies it, and reports whether there was
// progress. While one peer gives as much as fits, the others are left in peace;
// a peer that gives little has to compete with them.
func (f *fetcher) once(ctx context.Context) (progress bool, err error) {
	whole := f.core.whole()
	if !whole {
		if done, err := f.bySnapshot(ctx, true); err != nil || done {
			return done, err
		}
	}
	req := &pb.SyncRequest{FromHeight: uint64(f.core.height() + 1)}
	if f.useful != 0 {
		resp := f.request(ctx, f.useful, req)
		if resp == nil {
			f.drop(f.useful)
			return true, nil // the others are asked
		}
		n, err := f.apply(answer{f.useful, resp})
		if n < syncBlocks/2 {
			f.useful = 0
		}
		return true, err
	}
	members := f.core.members()
	answers := f.askAll(ctx, f.peers(members), req)
	slices.SortStableFunc(answers, func(a, b answer) int { return len(b.resp.Blocks) - len(a.resp.Blocks) })
	if whole && f.far(members, answers) {
		if done, err := f.bySnapshot(ctx, false); err != nil || done {
			return done, err
		}
	}
	gone := false
	for _, a := range answers {
		n, err := f.apply(a)
		if err != nil {
			return false, err
		}
		if n > 0 {
			if n >= syncBlocks/2 {
				f.useful = a.from
			}
			return true, nil // the other answers are for the same
		}
		gone = gone || len(a.resp.Blocks) > 0
	}
	if whole && gone {
		return f.bySnapshot(ctx, true)
	}
	return false, nil
}

// far reports whether at least one honest peer is further ahead than should be
// executed here: f+1 say so.
func (f *fetcher) far(m *members, answers []answer) bool {
	if f.beyond < 0 {
		return false
	}
	var heights []uint64
	for _, a := range answers {
		heights = append(heights, a.resp.LastHeight)
	}
	slices.Sort(heights)
	i := len(heights) - 1 - ledger.Faults(len(m.validators))
	return i >= 0 && heights[i] > uint64(f.core.height())+uint64(f.beyond)
}

// apply executes the blocks of an answer, up to the first that is false or
// without its payload.
func (f *fetcher) apply(a answer) (n int, err error) {
	blocks := a.resp.Blocks
	for i, m := range blocks {
		h, err := ledger.ParseHeader(m.Header)
		if err == nil && purged(m, h) {
			blocks = blocks[:i]
			break
		}
	}
	n, err = f.core.applyBlocks(blocks, true, nil)
	f.core.count.synced.Add(uint64(n))
	var fatal fatalError
	if errors.As(err, &fatal) {
		return n, err
	}
	if err != nil {
		f.refuse(a.from, err)
	}
	return n, nil
}

// bySnapshot goes on to a state that f+1 members have signed: headers and leaves
// up to its block are fetched and stored, then the state takes the place of
// this one. It reports whether there was progress. Where it stops on the way,
// what was stored stays, and so does the snapshot on disk.
//
// Those who sign must be members when the state's block is decided: what
// validators say who were revoked before, and whose keys may be anybody's, counts
// for nothing. If that cannot be told yet, headers are fetched until it can;
// must says that there is no other way to go on, so that they may be stored
// before there is a state to go with them.
func (f *fetcher) bySnapshot(ctx context.Context, must bool) (bool, error) {
	if done, err := f.leap(ctx); err != nil || done {
		return done, err
	}
	k := f.core
	at, err := k.follow()
	if err != nil {
		return false, err
	}
	members := at.members()
	var reach []uint64 // how far each says that it has blocks
	offered := map[uint64][]*pb.SnapshotOffer{}
	for _, a := range f.askAll(ctx, f.peers(members), &pb.SyncRequest{Offers: true}) {
		offered[a.from] = a.resp.Offers[:min(len(a.resp.Offers), 4*snapshotsKept)]
		reach = append(reach, a.resp.LastHeight)
	}
	best, signers := f.agree(members, offered)
	if best.height == 0 {
		if !must {
			return false, nil
		}
		// The members may be others by now.
		slices.Sort(reach)
		i := len(reach) - 1 - ledger.Faults(len(members.validators))
		if i < 0 || ledger.Height(reach[i]) <= at.height()+1 {
			return false, nil
		}
		next, err := f.headers(ctx, at, ledger.Height(reach[i]))
		return next.members().since != members.since, err
	}
	st, b := f.download(ctx, best, signers)
	if st == nil {
		return false, nil
	}
	if err := k.shelf.stage(b); err != nil {
		return false, fatalError{err}
	}
	if at, err = f.headers(ctx, at, best.height); err != nil || at.height() < best.height {
		return false, err
	}
	if at.members().since != members.since {
		if now, _ := f.agree(at.members(), offered); now != best {
			return true, nil // the members there now are asked
		}
	}
	have, err := k.store.header(best.height)
	switch {
	case err != nil:
		return false, err
	case have.Hash() != st.hash():
		return false, fmt.Errorf("f+1 validators have signed a state after block %d that is not the block that a quorum decided", best.height)
	case at.height() == best.height && at.registryHash != st.registryHash:
		return false, fmt.Errorf("f+1 validators have signed a state after block %d whose registry is not what was decided", best.height)
	}
	if err := k.shelf.put(b, st.registryHash); err != nil {
		return false, fatalError{err}
	}
	if err := k.install(st); err != nil {
		return false, err
	}
	if err := k.shelf.unstage(); err != nil {
		return false, err
	}
	// What was stored further than the snapshot, where its payload is here.
	return true, k.replay()
}

// agree returns the newest snapshot that f+1 of the members have signed, and who
// did.
func (f *fetcher) agree(m *members, offered map[uint64][]*pb.SnapshotOffer) (best snapshot, signers []uint64) {
	k := f.core
	good := map[uint64][]snapshot{}
	for from, offers := range offered {
		val, ok := m.validator(from)
		if !ok {
			continue
		}
		for _, o := range offers {
			s, err := checkOffer(k.state.genesis, val, o) // genesis never changes
			if err != nil {
				f.refuse(from, err)
				delete(good, from)
				break
			}
			good[from] = append(good[from], s)
		}
	}
	best, signers, liars := vouched(k.height(), len(m.validators), good)
	for _, l := range liars {
		k.count.falseSnapshots.Add(1)
		k.log.Error("a validator signs another state than f+1 others", "peer", l, "height", uint64(best.height))
		f.drop(l)
	}
	return best, signers
}

// download gets the bytes of a snapshot from one who has signed its digest.
func (f *fetcher) download(ctx context.Context, want snapshot, signers []uint64) (*state, []byte) {
	k := f.core
	if b, err := k.shelf.staged(); err == nil { // from an attempt before
		if st, err := k.openSnapshot(b, want); err == nil {
			return st, b
		}
	}
	for _, peer := range signers {
		var b []byte
		for !f.aside[peer] && ctx.Err() == nil && uint64(len(b)) < want.size {
			resp := f.request(ctx, peer, &pb.SyncRequest{Snapshot: want.digest[:], Offset: uint64(len(b))})
			switch {
			case resp == nil:
				f.drop(peer)
			case len(resp.Part) == 0: // it has let go of it
				f.drop(peer)
			case uint64(len(b)+len(resp.Part)) > want.size:
				f.refuse(peer, fmt.Errorf("snapshot of block %d: more than its %d bytes", want.height, want.size))
			default:
				b = append(b, resp.Part...)
			}
		}
		if uint64(len(b)) != want.size || f.aside[peer] {
			continue
		}
		st, err := k.openSnapshot(b, want)
		if err == nil {
			return st, b
		}
		f.refuse(peer, err)
	}
	return nil, nil
}

// headers fetches and stores what is missing up to a block, and that block
// whole: the engine shows its last block to others. It returns the follower at
// the last block stored, which is an earlier one if the peers that are left do
// not give more.
func (f *fetcher) headers(ctx context.Context, at *follower, to ledger.Height) (*follower, error) {
	// One after another, so that each is asked for about as much.
	for turn := 0; at.height() < to && ctx.Err() == nil; turn++ {
		peers := f.peers(at.members())
		if len(peers) == 0 {
			break
		}
		peer := peers[turn%len(peers)]
		req := &pb.SyncRequest{FromHeight: uint64(at.height() + 1), Headers: true, MaxBlocks: uint32(min(syncHeaders, to-at.height()))}
		if at.height()+1 == to {
			req.Headers, req.MaxBlocks = false, 1
		}
		resp := f.request(ctx, peer, req)
		if resp == nil {
			f.drop(peer)
			continue
		}
		next, n, err := f.core.takeHeaders(at, resp.Blocks, to)
		var fatal fatalError
		switch {
		case errors.As(err, &fatal):
			return at, err
		case err != nil:
			f.refuse(peer, err)
		case n == 0: // has no more, or not whole
			f.drop(peer)
		}
		at = next
	}
	return at, nil
}

// openSnapshot checks bytes against what f+1 validators have signed.
func (k *core) openSnapshot(b []byte, want snapshot) (*state, error) {
	sn, err := k.shelf.describe(b, &ledger.Hash{})
	if err != nil {
		return nil, err
	}
	if sn.digest != want.digest || sn.height != want.height || sn.header != want.header {
		return nil, fmt.Errorf("snapshot of block %d: is not the one that was signed", want.height)
	}
	st, _, err := newState(k.genesisBytes)
	if err != nil {
		return nil, err
	}
	if err := st.unmarshal(b); err != nil {
		return nil, err
	}
	return st, nil
}

// install makes a state that peers have vouched for this validator's. Its block
// is stored.
func (k *core) install(st *state) error {
	k.mu.Lock()
	if st.height() <= k.state.height() {
		k.mu.Unlock()
		return fmt.Errorf("snapshot of block %d: the state is that after %d", st.height(), k.state.height())
	}
	k.state, k.newest = st, nil
	clear(k.outcomes)
	for id := range k.requests {
		if st.decided.has(id) {
			delete(k.requests, id)
		}
	}
	k.journal.settled(st.height())
	k.count.taken.Add(1)
	k.mu.Unlock()
	k.log.Info("state taken from peers", "height", uint64(st.height()), "registry", st.registry.Version())
	if k.installed != nil {
		k.installed(st.height())
	}
	return nil
}
