package signalcontrol

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/health"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Inbox puts a command on its way into the log.
type Inbox interface {
	// SendAsync takes an envelope and returns at once; an error means that there
	// is no room, and that done will not be called. It goes on offering the
	// envelope until it is stored, refused for good, or ctx ends, and then calls
	// done. Envelopes of one source are stored in the order in which they came.
	SendAsync(ctx context.Context, d traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, done func(*pb.Receipt, error)) error
}

// Config of the service.
type Config struct {
	CoreConfig
	Bus *bus.Bus
	// Inbox takes commands to be sealed.
	Inbox Inbox
	// State follows the registry; the service runs it.
	State *agreed.State
	// Follow says whose decided blocks to follow.
	Follow decided.Config
	// Now is the district's clock. Optional: time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
}

// Counters of the service.
type Counters struct {
	Blocks   atomic.Uint64
	Height   atomic.Uint64 // newest block that was dealt with
	Earlier  atomic.Uint64 // blocks of before the start, on which nothing is decided
	Sent     atomic.Uint64 // commands given to the street
	Sealed   atomic.Uint64 // commands that ingest has stored
	Unsealed atomic.Uint64 // commands that ingest refused, never answered or had no room for
	Stale    atomic.Uint64 // frames too old to decide on
	Refused  atomic.Uint64 // frames that no decision could be made on

	Health       atomic.Uint64 // words on detectors' health
	HealthSealed atomic.Uint64 // of them, those that ingest has stored
	HealthLost   atomic.Uint64 // of them, those that can never be sealed

	BadOutflows atomic.Uint64 // announcements that cannot be read, or are not where they belong

	Overridden    atomic.Uint64 // frames of junctions in an operator's hand
	Degraded      atomic.Uint64 // requests let in without agreement
	SentDegraded  atomic.Uint64 // commands for them
	DirectRefused atomic.Uint64 // requests that came directly and were not in order

	Plans       atomic.Uint64 // fall-back plans
	PlansSealed atomic.Uint64 // of them, those that ingest has stored
}

// Service is signal-control.
type Service struct {
	cfg      Config
	core     *Core
	log      *slog.Logger
	Counters Counters

	started      time.Time    // set by Run
	lastDecision atomic.Int64 // Unix nanoseconds of when the newest command was sent
	stale        atomic.Bool

	// coreMu guards core and what follows; it is taken before mu.
	coreMu     sync.Mutex
	stall      stall
	tellAt     time.Time
	bookStored bool

	maySay bool // that health may not be signed: once; owned by block

	unheard []timing.Outflow // from elsewhere, for the next block; guarded by mu

	mu      sync.Mutex
	pending []*waiting // words that are not sealed yet, the oldest first; guarded by mu
}

// waiting is a word on its way.
type waiting struct {
	word
	offered bool // ingest has it in hand
}

// maxPending bounds how many words wait for ingest. Beyond it the oldest are
// given up: a detector that changes its mind so often says nothing new.
const maxPending = 4096

// sealWait bounds how long one command is offered to ingest: past its expiry
// nobody obeys it, but that it was given is still to be sealed.
const sealWait = 30 * time.Second

// New returns the service, ready to run.
func New(c Config) (*Service, error) {
	core, err := NewCore(c.CoreConfig)
	if err != nil {
		return nil, err
	}
	if c.Bus == nil || c.Inbox == nil || c.State == nil {
		return nil, errors.New("signal-control: bus, inbox and state are needed")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{cfg: c, core: core, log: c.Logger, maySay: true,
		stall: stall{asked: map[string]*asking{}, told: map[traffic.JunctionID]*telling{}}}
	if err := errors.Join(s.recall(), s.recallBook()); err != nil {
		return nil, err
	}
	c.State.BeforeSave(s.remember)
	return s, nil
}

// healthPath names the file of what is known of detectors, beside that of the
// place in the chain; "" where nothing is stored.
func (s *Service) healthPath() string {
	if p := s.cfg.State.Path(); p != "" {
		return p + ".health"
	}
	return ""
}

// recall takes over what an earlier run knew of detectors. Without it silences
// and occupations are measured from now on: no reason not to start.
func (s *Service) recall() error {
	path := s.healthPath()
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("signal-control: %w", err)
	}
	pending, ok, err := s.core.restore(s.cfg.Follow.GenesisHash, b, s.cfg.State.Registry().Junction)
	if err != nil {
		s.log.Warn("what was known of detectors is lost, in part or whole", "path", path, "whole", !ok, "err", err)
	}
	for _, w := range pending {
		s.pending = append(s.pending, &waiting{word: w})
	}
	return nil
}

// remember stores what is known of detectors. It comes before the place in the
// chain, so that no block is missed after a restart.
func (s *Service) remember(ledger.Height) error {
	s.coreMu.Lock()
	defer s.coreMu.Unlock()
	if err := s.rememberBook(); err != nil {
		return err
	}
	path := s.healthPath()
	if path == "" {
		return nil
	}
	s.mu.Lock()
	pending := make([]word, len(s.pending))
	for i, w := range s.pending {
		pending[i] = w.word
	}
	s.mu.Unlock()
	b, err := s.core.store(s.cfg.Follow.GenesisHash, pending)
	if err != nil {
		return fmt.Errorf("health: %w", err)
	}
	return district.WriteFile(path, b, 0o644)
}

// Stale reports whether no decision has been made for [MaxDecisionAge].
func (s *Service) Stale() bool { return s.stale.Load() }

// Run decides until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	s.started = s.cfg.Now()
	s.lastDecision.Store(s.started.UnixNano())
	return run.All(ctx,
		run.Actor{Name: "decide", Run: func(ctx context.Context) error { return s.cfg.State.Run(ctx, s.cfg.Follow, s.block) }},
		run.Actor{Name: "watch", Run: s.watch},
		run.Actor{Name: "asked", Run: func(ctx context.Context) error { return s.answer(ctx, Direct) }},
		run.Actor{Name: "book", Run: func(ctx context.Context) error { return s.answer(ctx, Books) }},
		run.Actor{Name: "listen", Run: s.listen},
	)
}

func (s *Service) block(ctx context.Context, b *decided.Block, reg *identity.Registry) error {
	s.Counters.Blocks.Add(1)
	defer s.Counters.Height.Store(uint64(b.Header.Height))
	s.coreMu.Lock()
	defer s.coreMu.Unlock()
	frames := make([]*traffic.Frame, 0, len(b.Records))
	records := make([]Record, 0, len(b.Records))
	raw := map[uint64][]byte{}
	for i := range b.Records {
		r := &b.Records[i]
		if !r.Accepted {
			continue
		}
		c := wire.Candidate(r.Raw, r.Salt[:])
		if c.Err != nil {
			s.log.Warn("accepted record cannot be decoded", "height", b.Header.Height, "err", c.Err)
			continue
		}
		if c.Frame != nil {
			frames = append(frames, c.Frame)
		}
		if c.Override != nil {
			raw[r.Index] = r.Raw
		}
		records = append(records, Record{r.Index, &c})
	}
	s.agree(&b.Block, reg, records, func(i uint64) []byte { return raw[i] })
	if !b.Header.Time.After(s.started) {
		// An earlier run may have commanded on this block, and been killed before
		// it wrote down how far it was. A second command under the same number
		// would be obeyed and, as an equivocation, never be sealed.
		// What its frames say of detectors is not lost, and said again in the same
		// words.
		s.Counters.Earlier.Add(1)
		s.core.Observe(b.Header.Height, frames, reg.Junction)
		s.health(ctx, reg)
		return nil
	}
	now := s.cfg.Now()
	s.hear()
	orders, refused := s.core.Decide(now, b.Header.Height, frames, reg.Junction)
	for _, r := range refused {
		if r.Stale {
			s.Counters.Stale.Add(1)
			continue // watch tells people once, not once a frame
		}
		if r.Overridden {
			s.Counters.Overridden.Add(1)
			s.lastDecision.Store(now.UnixNano()) // there was one, and it was to leave the junction alone
			continue
		}
		s.Counters.Refused.Add(1)
		s.log.Warn("no decision", "intersection", r.Junction, "frame", r.Frame.String(), "reason", r.Reason)
	}
	for _, o := range orders {
		// What changes a light is sealed, or it does not change it: first the way
		// into the log, then the street.
		if err := s.seal(ctx, o); err != nil {
			s.Counters.Unsealed.Add(1)
			s.log.Error("command not sent: no way to seal it", "intersection", o.Command.Junction, "seq", o.Command.Seq, "err", err)
			continue
		}
		if err := s.cfg.Bus.Send(topic.Command(s.cfg.District, o.Command.Junction), o.Envelope); err != nil {
			s.log.Error("command not sent", "intersection", o.Command.Junction, "err", err)
			continue
		}
		s.Counters.Sent.Add(1)
		s.lastDecision.Store(now.UnixNano())
	}
	s.announce()
	s.health(ctx, reg) // after the commands: those are in a hurry
	s.plans(ctx, b.Header.Height, frames, reg)
	return nil
}

// health has what has become known of detectors sealed, and offers again what
// ingest had no room for.
func (s *Service) health(ctx context.Context, reg *identity.Registry) {
	words := s.core.Health()
	for i := range words {
		h := &words[i]
		s.Counters.Health.Add(1)
		level, what := slog.LevelInfo, "detector is well again"
		if h.Failed {
			level, what = slog.LevelWarn, "detector has failed"
			if h.Rule == string(health.Imbalance) {
				what = "detectors disagree, this is one of them"
			}
		}
		s.log.Log(ctx, level, what, "intersection", h.Junction, "detector", h.Detector, "rule", h.Rule, "reason", h.Reason, "since", h.Since)
	}
	if len(words) > 0 {
		if holder, ok := reg.Holder(identity.IDOf(s.cfg.Key.Public().(ed25519.PublicKey))); !ok || !holder.May(identity.KindHealth) {
			if s.maySay {
				s.log.Warn("words on detectors' health are not sealed: the registry does not let signal-control sign them")
			}
			s.maySay = false
			s.Counters.HealthLost.Add(uint64(len(words)))
			words = nil
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range words {
		s.pending = append(s.pending, &waiting{word: word{words[i].Junction, words[i].Seq, s.core.sign(&words[i])}})
	}
	if n := len(s.pending) - maxPending; n > 0 {
		s.log.Error("words on detectors' health given up: ingest does not take them", "count", n)
		s.Counters.HealthLost.Add(uint64(n))
		s.pending = slices.Delete(s.pending, 0, n)
	}
	// One at a time for each junction: their order must hold whatever happens.
	busy := map[traffic.JunctionID]bool{}
	for _, w := range s.pending {
		if !busy[w.junction] && !w.offered {
			w.offered = s.offer(ctx, w)
		}
		busy[w.junction] = true
	}
}

// offer gives a word to ingest, and reports whether that took it in hand. mu is
// held, and taken again when ingest has answered.
func (s *Service) offer(ctx context.Context, w *waiting) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sealWait)
	err := s.cfg.Inbox.SendAsync(ctx, s.cfg.District, identity.KindHealth, string(w.junction), w.envelope, func(_ *pb.Receipt, err error) {
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case err == nil:
			s.Counters.HealthSealed.Add(1)
		case kind.Of(err) == kind.Invalid:
			s.Counters.HealthLost.Add(1)
			s.log.Error("word on a detector's health refused", "intersection", w.junction, "seq", w.seq, "err", err)
		default:
			w.offered = false // again with the next block
			return
		}
		s.pending = slices.DeleteFunc(s.pending, func(p *waiting) bool { return p == w })
	})
	if err != nil {
		cancel()
		return false
	}
	return true
}

// seal gives a command to ingest. It does not wait: the log catches up with the
// street, in the order of each junction's commands.
func (s *Service) seal(ctx context.Context, o Order) error { return s.sealFor(ctx, o, sealWait) }

func (s *Service) sealFor(ctx context.Context, o Order, wait time.Duration) error {
	// Not the block's context: that ends before the receipt comes.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	err := s.cfg.Inbox.SendAsync(ctx, s.cfg.District, identity.KindCommand, string(o.Command.Junction), o.Envelope, func(_ *pb.Receipt, err error) {
		cancel()
		if err == nil {
			s.Counters.Sealed.Add(1)
			return
		}
		s.Counters.Unsealed.Add(1)
		s.log.Error("command was sent but could not be stored for sealing", "intersection", o.Command.Junction, "seq", o.Command.Seq, "err", err)
	})
	if err != nil {
		cancel()
	}
	return err
}

// watchEvery is how often the age of decisions is looked at.
const watchEvery = 100 * time.Millisecond

// watch says when decisions have become stale, and when they are back.
func (s *Service) watch(ctx context.Context) error {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		now := s.cfg.Now()
		s.urge(ctx, now)
		age := now.Sub(time.Unix(0, s.lastDecision.Load()))
		stale := age > MaxDecisionAge
		if s.stale.Swap(stale) == stale {
			continue
		}
		mode := "decisions-fresh"
		if stale {
			mode = "decisions-stale"
			s.log.Warn("decisions are stale, junctions run their local plans", "elapsed", age)
		} else {
			s.log.Info("decisions are back")
		}
		m := &pb.Status{District: string(s.cfg.District), Device: "signal-control", TimeUnixNano: now.UnixNano(), Signal: &pb.Signal{Stage: -1, Mode: mode}}
		if err := s.cfg.Bus.Send(topic.Status(s.cfg.District, "signal-control"), wire.EncodeStatus(m)); err != nil {
			s.log.Error("status not sent", "err", err)
		}
	}
}
