package consensus

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/run"
)

// Validator is one member of a district's consensus.
type Validator struct {
	c     Config
	log   *slog.Logger
	count counters

	// What follows is made by Run.
	core      *core
	transport *transport
	intake    *intake
	publisher *publisher
	evidence  *evidenceLog
	seals     *sealBook
	asking    asking
	answers   chan metFrom
	running   atomic.Bool
	ctx       context.Context // of Run, for the engine's calls, which bring none
	cancel    context.CancelCauseFunc
	height    atomic.Uint64
	// Tests set these before Run: see transport.tap; and cut, which says from whom
	// nothing can be fetched.
	tap   func(pc parcel, send func(parcel))
	cut   func(peer uint64) bool
	check func() verifier // in newVerifier's stead, for measuring what the rest costs
	ready chan struct{}   // closed when the engine runs
	begun sync.Once       // closes ready

	// others are validators who are not known as such here: see discover.
	others atomic.Pointer[[]uint64]

	seatMu sync.Mutex
	seat   *seat         // nil while there is none
	moved  chan struct{} // closed and replaced with seat
}

type metFrom struct {
	peer uint64
	met  met
}

// New returns a validator; nothing is opened until [Validator.Run].
func New(c Config) (*Validator, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Bus == nil {
		return nil, errors.New("consensus: Bus: missing")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("validator", c.Number)
	c.Timing = c.Timing.withDefaults()
	if c.SnapshotEvery == 0 {
		c.SnapshotEvery = 200
	}
	if c.Retention == 0 {
		c.Retention = 7 * 24 * time.Hour
	}
	if c.SnapshotBeyond == 0 {
		c.SnapshotBeyond = 2000
	}
	if c.ServeRequests == 0 {
		c.ServeRequests = 200
	}
	if c.ServeBytes == 0 {
		c.ServeBytes = 32 << 20
	}
	return &Validator{c: c, log: c.Logger, ready: make(chan struct{}), moved: make(chan struct{})}, nil
}

// Ready is closed once the validator takes part in agreeing.
func (v *Validator) Ready() <-chan struct{} { return v.ready }

// Stats returns what has been counted. It may be called at any time.
func (v *Validator) Stats() Stats {
	s := v.count.stats()
	s.Height = ledger.Height(v.height.Load())
	if p := v.place(); p != nil {
		s.View, s.Leader = p.engine.status()
		s.Members, s.Validators = p.members.since, p.members.numbers()
	}
	return s
}

// Evidence returns the accusations that were kept, of this start and before. Each
// is a file in the folder evidence, too, for anybody to verify. Call it after
// [Validator.Ready].
func (v *Validator) Evidence() []*ledger.Accusation {
	select {
	case <-v.ready:
		return v.evidence.all()
	default:
		return nil
	}
}

// errFailed is the cause of an end by [Validator.fail].
var errFailed = errors.New("consensus: validator failed")

// stopWait bounds how long Run waits for the engine's goroutines, of which one
// that gave up may have left others waiting.
const stopWait = 10 * time.Second

// Run takes part in consensus until ctx ends or something happens after which
// going on could be wrong: a disk that fails, or a quorum that decides what this
// validator does not compute. A Validator runs once.
//
// In its order: the stores are opened and the state rebuilt; peers are asked
// whether they know a later start of this validator; blocks that they decided
// meanwhile are fetched; then it votes. On the way out the engine stops first
// and the stores close last.
func (v *Validator) Run(ctx context.Context) (err error) {
	if v.running.Swap(true) {
		return errors.New("consensus: a Validator runs once")
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("consensus: validator %d: %w", v.c.Number, err)
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	v.ctx, v.cancel = ctx, cancel

	locked, err := lock(v.c.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, locked.Close()) }()
	cd := smartCodec{}
	if v.core, err = openCore(v.c, cd, &v.count); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.core.close()) }()
	if v.evidence, err = openEvidence(filepath.Join(v.c.Dir, "evidence"), v.log); err != nil {
		return err
	}
	v.height.Store(uint64(v.core.height()))
	v.seals = newSealBook(v)
	v.core.seals = v.seals.recent

	v.intake = newIntake(v)
	v.publisher = newPublisher(v)
	if v.check != nil {
		v.core.verifier, v.intake.verifier = v.check(), v.check()
	}
	v.core.decided = v.onBlock
	v.core.installed = v.onState
	cosigner, err := openCosigner(v)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cosigner.log.Close()) }()

	v.answers = make(chan metFrom, 16)
	v.transport = &transport{
		self: v.c.Number, district: v.c.District, genesis: v.core.state.genesis, nc: v.c.Bus.NC, journal: v.core.journal,
		codec: cd, count: &v.count, log: v.log, resend: v.c.Timing.Resend,
		height:  func() ledger.Height { return ledger.Height(v.height.Load()) },
		receive: v.receive, witness: newWitness(), tap: v.tap,
		ahead: func(from, config uint64) {
			if s := v.place(); s != nil {
				s.hear(from, config)
			}
		},
	}
	w := v.transport.witness
	w.genesis, w.height, w.accuse, w.count, w.log = v.transport.genesis, v.transport.height, v.accuse, &v.count, v.log
	if err := v.begin(0); err != nil {
		return err
	}

	err = run.All(ctx,
		run.Actor{Name: "transport", Run: v.transport.run},
		run.Actor{Name: "blocks", Run: v.serveBlocks},
		run.Actor{Name: "cosign", Run: cosigner.run},
		run.Actor{Name: "publish", Run: v.publisher.run},
		run.Actor{Name: "intake", Run: v.intake.run},
		run.Actor{Name: "compare", Run: v.compare},
		run.Actor{Name: "seals", Run: v.seals.run},
		run.Actor{Name: "keep", Run: v.keep},
		run.Actor{Name: "engine", Run: v.runEngine},
	)
	if cause := context.Cause(ctx); errors.Is(cause, errFailed) {
		err = errors.Join(cause, err)
	}
	return err
}

// begin draws an incarnation and raises the start counter.
func (v *Validator) begin(above uint64) error {
	var inc [16]byte
	if _, err := rand.Read(inc[:]); err != nil {
		return err
	}
	s, err := v.core.journal.begin(inc, above)
	if err != nil {
		return err
	}
	v.transport.begin(s)
	return nil
}

// meetWait is how many times peers are asked before a starting validator fetches
// blocks, to see whether other peers are meant by now.
const meetWait = 20

// meet asks peers what they know of this validator's earlier starts, until as
// many have answered as are needed for a quorum with it: without them nothing
// can be decided anyway. If one proves a later start than the one on disk, the
// disk is an old copy, and votes that it does not know of may have been cast:
// then this validator stays silent until the others have decided, without it,
// every height at which it may have voted. It returns false where too few of the
// members answer.
func (v *Validator) meet(ctx context.Context, m *members) (bool, error) {
	need := ledger.Quorum(len(m.validators)) - 1
	met := map[uint64]bool{}
	var until ledger.Height
	var newest uint64
	tick := time.NewTicker(v.c.Timing.Meet)
	defer tick.Stop()
	v.transport.ask()
	for asked := 0; len(met) < need; {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-tick.C:
			if asked++; asked > meetWait {
				return false, nil
			}
			v.transport.ask()
		case a := <-v.answers:
			if _, ok := m.validator(a.peer); !ok || !v.transport.holds(a.met) {
				continue
			}
			met[a.peer] = true
			if a.met.Start != v.transport.current() || v.core.journal.forgot(a.met.Took) {
				until, newest = max(until, a.met.Vote), max(newest, a.met.Start.Counter, a.met.Took.Counter)
			}
		}
	}
	if newest == 0 {
		return true, nil
	}
	v.log.Error("peers know a later start of this validator: its disk is an old copy; silent until all it may have voted on is decided",
		"height", uint64(until), "start", newest)
	if err := v.begin(newest); err != nil {
		return false, err
	}
	for v.core.height() < until {
		if err := v.fetch(ctx); err != nil {
			return false, err
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-tick.C:
		}
	}
	return true, nil
}

// receive takes what the transport authenticated.
func (v *Validator) receive(from uint64, p *parcel, m message) {
	switch p.Kind {
	case kindEngine:
		if s := v.place(); s != nil && !s.over() && uint64(s.members.since) == p.Config {
			s.engine.receive(from, m)
		}
	case kindMeet:
		if asker, ok := v.transport.peer(from); !ok {
			return // no member any more
		} else if err := v.transport.answer(asker, p.Start); err != nil {
			v.log.Error("cannot answer a peer", "peer", from, "err", err)
		}
	case kindMet:
		var a met
		if json.Unmarshal(p.Body, &a) != nil {
			v.count.invalid.Add(1)
			return
		}
		select {
		case v.answers <- metFrom{from, a}:
		default: // asked again if it is needed
		}
	}
}

// onBlock hears of each block after it is durable, with the core's lock held.
func (v *Validator) onBlock(b *pb.Block, o *outcome) {
	v.height.Store(uint64(o.header.Height))
	v.intake.decided(o.ids)
	v.publisher.add(o.header.Height, b)
}

// onState hears that the state has become that of a snapshot: blocks up to it
// were stored without their requests being known.
func (v *Validator) onState(h ledger.Height) {
	v.height.Store(uint64(h))
	v.intake.recheck()
	v.publisher.look()
}

// What follows is of the engine's host what does not depend on the members: see
// [seat] for the rest.

func (v *Validator) checkVote(p proposal, vt ledger.Vote) error { return v.core.checkVote(p, vt) }
func (v *Validator) signView(b []byte) []byte                   { return v.core.signView(b) }
func (v *Validator) checkView(from uint64, b, sig []byte) error {
	return v.core.checkView(from, b, sig)
}

func (v *Validator) decidedRequest(raw []byte) bool {
	return v.core.isDecided(v.core.ids.of(raw))
}

func (v *Validator) requestID(raw []byte) ledger.Hash { return v.core.ids.of(raw) }

func (v *Validator) trails() bool {
	ahead, height := 0, ledger.Height(v.height.Load())
	peers := v.transport.all()
	for _, p := range peers {
		p.mu.Lock()
		if p.decided > height {
			ahead++
		}
		p.mu.Unlock()
	}
	return ahead > ledger.Faults(len(peers)+1)
}

func (v *Validator) outvoted(at slot, d ledger.Hash) bool {
	m := v.core.members()
	return v.transport.witness.outvoted(uint64(m.since), at, d, ledger.Quorum(len(m.validators)))
}

func (v *Validator) patient() bool { return v.intake.patient() }

func (v *Validator) requestsOf(p proposal) []ledger.Hash { return v.core.requestsOf(p) }

// fail ends Run with an error. The caller's goroutine must do no more.
func (v *Validator) fail(err error) { v.cancel(fmt.Errorf("%w: %w", errFailed, err)) }
