package consensus

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The members are the validators in the registry. A block that changes them is
// decided by those before; all blocks after it by those that it leaves.
//
// The engine knows nothing of it. At the change every validator stops its engine
// and starts another from its own state, which all have alike: the block, whose
// metadata says the view, and the members. Nothing of the old engine matters any
// more, as no height is decided under two sets of members: its log is dropped,
// and what it still says is not sent. Parcels name the members that they are
// meant for, so that nothing of one engine reaches another.

// members are the validators that decide the blocks after one.
type members struct {
	// since is the height of the block that made them so, 0 for genesis.
	since      ledger.Height
	validators []identity.Validator // by number
	limit      int                  // of a proposal's payload, bytes
}

func membersOf(r *identity.Registry) *members {
	vs := r.Validators()
	return &members{since: ledger.Height(r.MembersSince()), validators: vs, limit: maxPayload(len(vs))}
}

// inForce remembers the members of a registry.
type inForce struct {
	registry *identity.Registry
	members  *members
}

// set returns the members in force. It needs mu.
func (k *core) set() *members {
	if f := &k.inForce; f.registry != k.state.registry {
		f.registry, f.members = k.state.registry, membersOf(k.state.registry)
	}
	return k.inForce.members
}

// members returns those who decide the next block.
func (k *core) members() *members {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.set()
}

func (m *members) validator(n uint64) (identity.Validator, bool) {
	for _, v := range m.validators {
		if v.Number == n {
			return v, true
		}
	}
	return identity.Validator{}, false
}

func (m *members) numbers() []uint64 {
	out := make([]uint64, len(m.validators))
	for i, v := range m.validators {
		out[i] = v.Number
	}
	return out
}

// keyring is a validator's pair of keys.
type keyring struct{ vote, cosign ed25519.PrivateKey }

// formerKey is the cosigning key that was in force until a block.
type formerKey struct {
	cosign ed25519.PrivateKey
	until  ledger.Height
}

// keysOf returns the keys that a validator's entry names. Either may be replaced
// alone.
func (c Config) keysOf(v identity.Validator) (*keyring, error) {
	pick := func(want identity.PublicKey, what string, have ...ed25519.PrivateKey) (ed25519.PrivateKey, error) {
		for _, k := range have {
			if k != nil && ed25519.PublicKey(want).Equal(k.Public()) {
				return k, nil
			}
		}
		return nil, fmt.Errorf("registry: validator %d: the %s key is another", v.Number, what)
	}
	vote, err := pick(v.VoteKey, "vote", c.VoteKey, c.NextVoteKey)
	if err != nil {
		return nil, err
	}
	cosign, err := pick(v.CosignKey, "cosigning", c.CosignKey, c.NextCosignKey)
	if err != nil {
		return nil, err
	}
	return &keyring{vote, cosign}, nil
}

// seat is this validator's place among one set of members: the engine that runs
// for them, and that engine's host.
type seat struct {
	*Validator
	members *members
	engine  engine
	// left is closed when the engine is to stop: the members have changed, here or
	// as far as peers say.
	left chan struct{}
	gone atomic.Bool

	mu    sync.Mutex
	ahead map[uint64]bool // peers that speak for later members
}

var _ host = (*seat)(nil)

// end lets nothing of the engine through any more, and has it stopped.
func (s *seat) end() {
	if !s.gone.Swap(true) {
		close(s.left)
	}
}

func (s *seat) over() bool { return s.gone.Load() }

// hear notes that a peer speaks for later members. When one of those who do must
// be honest, a block was decided that ends this seat, and no more will be here.
func (s *seat) hear(from uint64, config uint64) {
	if config <= uint64(s.members.since) {
		return
	}
	s.mu.Lock()
	s.ahead[from] = true
	n := len(s.ahead)
	s.mu.Unlock()
	if n > ledger.Faults(len(s.members.validators)) {
		s.end()
	}
}

// changed ends the seat if the last block has other members follow.
func (s *seat) changed() {
	if err := s.core.upToDate(); err != nil {
		s.fail(err)
		runtime.Goexit()
	}
	if s.core.members().since != s.members.since {
		s.end()
	}
}

func (s *seat) assemble(at slot, metadata []byte, requests [][]byte) proposal {
	if s.over() {
		return proposal{Metadata: metadata} // verify refuses it
	}
	return s.core.assemble(at, metadata, requests)
}

func (s *seat) verify(at slot, d ledger.Hash, p proposal) ([]ledger.Hash, error) {
	if s.over() {
		return nil, errors.New("proposal: for members of before")
	}
	return s.core.verify(at, d, p)
}

func (s *seat) sign(at slot, d ledger.Hash, p proposal) []byte {
	if s.over() {
		runtime.Goexit()
	}
	sig, err := s.core.signVote(at, d, p)
	if err != nil {
		s.fail(fmt.Errorf("asked to sign what must not be signed: %w", err))
		runtime.Goexit()
	}
	return sig
}

func (s *seat) decide(p proposal, votes []ledger.Vote) {
	if s.over() {
		runtime.Goexit() // it will be fetched
	}
	if err := s.core.apply(p, votes); err != nil {
		s.fail(fmt.Errorf("applying a decided block: %w", err))
		runtime.Goexit()
	}
	s.changed()
}

func (s *seat) catchUp() decision {
	if !s.over() {
		err := s.fetch(s.ctx)
		if err != nil && s.ctx.Err() != nil {
			runtime.Goexit() // stopping, maybe with a state that cannot go on
		}
		if err != nil {
			s.fail(err)
			runtime.Goexit()
		}
		s.changed()
	}
	d, err := s.core.last()
	if err != nil {
		s.fail(err)
		runtime.Goexit()
	}
	return d
}

func (s *seat) send(to uint64, m message) {
	if !s.over() {
		s.transport.send(uint64(s.members.since), to, m)
	}
}

func (s *seat) save(entry []byte, truncate bool, votes []vote) error {
	if s.over() {
		return nil // nothing of it will be read again
	}
	return s.core.journal.save(entry, truncate, votes)
}

// fail ends the validator, unless only an engine is concerned that is to stop
// anyway.
func (s *seat) fail(err error) {
	if s.over() {
		s.log.Debug("engine of members of before gave up", "err", err)
		return
	}
	s.Validator.fail(err)
}

// seated returns the seat in force, waiting for one.
func (v *Validator) seated(ctx context.Context) (*seat, error) {
	for {
		v.seatMu.Lock()
		s, moved := v.seat, v.moved
		v.seatMu.Unlock()
		if s != nil && !s.over() {
			return s, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-moved:
		}
	}
}

// place returns the seat in force, nil without one.
func (v *Validator) place() *seat {
	v.seatMu.Lock()
	defer v.seatMu.Unlock()
	return v.seat
}

func (v *Validator) sit(s *seat) {
	v.seatMu.Lock()
	defer v.seatMu.Unlock()
	v.seat = s
	close(v.moved)
	v.moved = make(chan struct{})
}

// How often a validator that is no member, or cannot become one yet, looks again.
const (
	waitPoll = 100 * time.Millisecond
	// discoverEvery is after how many looks in vain others than the known
	// validators are asked too.
	discoverEvery = 5
	// engineStop bounds how long the engine of members of before is waited for;
	// nothing that it does after that comes through.
	engineStop = 3 * time.Second
	// lingerLeast is how long a validator that was revoked stays at least: sealing
	// may want its cosignature for the last block that it decided.
	lingerLeast = time.Second
)

// runEngine takes part while this validator is a member: it waits until it is
// one, and returns nil when it is none any more.
func (v *Validator) runEngine(ctx context.Context) error {
	met, first := false, true
	for round := 0; ctx.Err() == nil; round++ {
		if round%discoverEvery == discoverEvery-1 {
			v.discover(ctx)
		}
		if !first || !v.core.whole() {
			if err := v.fetch(ctx); err != nil {
				return err
			}
		}
		if err := v.core.upToDate(); err != nil {
			return err
		}
		m := v.core.members()
		me, ok := m.validator(v.c.Number)
		switch {
		case !ok && v.core.revoked(v.c.Number):
			return v.leave(ctx, m)
		case !ok:
			if first {
				v.log.Info("is no validator yet; following the blocks until it is", "height", v.height.Load())
			}
			first = false
			if err := pause(ctx, waitPoll); err != nil {
				return err
			}
			continue
		}
		if _, err := v.c.keysOf(me); err != nil && first {
			first = false
			continue // peers may know of other keys
		}
		first = false
		if err := v.becomeMember(m, me); err != nil {
			return err
		}
		if !met {
			var err error
			if met, err = v.meet(ctx, m); err != nil {
				return err
			}
			if !met {
				continue // with the members that fetching may show
			}
			if err := v.fetch(ctx); err != nil {
				return err
			}
			if v.core.members().since != m.since {
				continue
			}
		}
		v.others.Store(nil)
		if err := v.serve(ctx, m); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// discover looks for validators who are not known here: those who are may have
// been revoked long ago, and be gone. Who publishes decisions is asked for blocks
// too; blocks prove themselves.
func (v *Validator) discover(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var found []uint64
	st, err := v.c.Bus.JS.Stream(ctx, topic.DecisionStream)
	if err == nil {
		var info *jetstream.StreamInfo
		if info, err = st.Info(ctx, jetstream.WithSubjectFilter(topic.DecisionAll(v.c.District))); err == nil {
			m := v.core.members()
			prefix := strings.TrimSuffix(topic.Decision(v.c.District, 0), "0")
			for subject := range info.State.Subjects {
				n, err := strconv.ParseUint(strings.TrimPrefix(subject, prefix), 10, 64)
				if _, known := m.validator(n); err == nil && !known && n != v.c.Number && len(found) < 2*identity.MaxValidators {
					found = append(found, n)
				}
			}
		}
	}
	if err != nil {
		v.log.Debug("cannot see who publishes decisions", "err", err)
		return
	}
	v.others.Store(&found)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// becomeMember sets keys, journal and transport to the members.
func (v *Validator) becomeMember(m *members, me identity.Validator) error {
	now := v.core.keys.Load()
	next, err := v.c.keysOf(me)
	if err != nil {
		return err
	}
	if !next.cosign.Equal(now.cosign) {
		v.core.former.Store(&formerKey{now.cosign, m.since})
	}
	if v.core.keys.Store(next); !next.vote.Equal(now.vote) {
		v.log.Info("votes with the next key", "since", uint64(m.since))
		// A start of its own: what peers can show of it is signed with this key.
		if err := v.begin(0); err != nil {
			return err
		}
	}
	if err := v.core.journal.configure(uint64(m.since)); err != nil {
		return err
	}
	v.transport.configure(m, v.core.keys.Load().vote)
	return nil
}

// serve runs an engine for the members until they change.
func (v *Validator) serve(ctx context.Context, m *members) error {
	last, err := v.core.last()
	if err != nil {
		return err
	}
	s := &seat{Validator: v, members: m, left: make(chan struct{}), ahead: map[uint64]bool{}}
	if err := v.core.journal.takePart(); err != nil {
		return err
	}
	s.engine = newSmart(s, v.c.Number, m.numbers(), v.c.Timing, m.limit, v.core.journal.initial(), v.log)
	if err := s.engine.start(last); err != nil {
		return err
	}
	v.sit(s)
	v.begun.Do(func() { close(v.ready) })
	v.log.Info("taking part", "height", v.height.Load(), "validators", len(m.validators), "quorum", ledger.Quorum(len(m.validators)), "since", uint64(m.since))
	wait := engineStop
	select {
	case <-ctx.Done():
		wait = stopWait
	case <-s.left:
	}
	v.sit(nil)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.engine.stop()
	}()
	select {
	case <-stopped:
	case <-time.After(wait):
		s.end()
		v.log.Error("engine does not stop; its goroutines are left behind", "elapsed", wait)
	}
	return ctx.Err()
}

// cosignKey is the key for the log after a block: the one that was in force for
// those who decided it.
func (k *core) cosignKey(h ledger.Height) ed25519.PrivateKey {
	if f := k.former.Load(); f != nil && h <= f.until {
		return f.cosign
	}
	return k.keys.Load().cosign
}

// revoked reports whether a number was a validator's once.
func (k *core) revoked(n uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	e, ok := k.state.registry.Entry(identity.TypeValidator, strconv.FormatUint(n, 10))
	return ok && e.Status == identity.Revoked
}

// leave is the end of a validator that was revoked. It stays until a quorum of
// those who remain has all that it has decided: they may need it for that. Its
// consumer of ACCEPTED is removed, so that nobody waits for it.
func (v *Validator) leave(ctx context.Context, m *members) error {
	h := v.core.height()
	v.log.Info("is no validator any more", "height", uint64(h), "since", uint64(m.since))
	dctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	if err := v.c.Bus.JS.DeleteConsumer(dctx, topic.AcceptedStream, topic.ConsensusDurable(v.c.Number)); err != nil {
		v.log.Warn("own consumer of accepted batches not removed", "err", err)
	}
	cancel()
	until := time.Now().Add(lingerLeast)
	for {
		if err := pause(ctx, waitPoll); err != nil {
			return err
		}
		if v.have(ctx, m, h) >= ledger.Quorum(len(m.validators)) && v.count.published.Load() >= uint64(h) && time.Now().After(until) {
			return nil
		}
	}
}

// have asks the members how many of them have a block.
func (v *Validator) have(ctx context.Context, m *members, h ledger.Height) int {
	ctx, cancel := context.WithTimeout(ctx, v.c.Timing.Fetch)
	defer cancel()
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(h) + 1, MaxBlocks: 1})
	if err != nil {
		return 0 // unreachable: there is nothing in it that cannot be encoded
	}
	var n atomic.Int64
	var wg sync.WaitGroup
	for _, val := range m.validators {
		wg.Go(func() {
			var resp pb.SyncResponse
			b, err := v.ask(ctx, topic.Sync(v.c.District, val.Number), val.Number, req)
			if err == nil && wire.Decode(identity.Protobuf, b, &resp) == nil && resp.LastHeight >= uint64(h) {
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return int(n.Load())
}
