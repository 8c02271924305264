package sealing

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Config of a [Service].
type Config struct {
	// Bus to follow blocks and ask validators on. Required.
	Bus *bus.Bus
	// Dir is the data folder. Required.
	Dir string
	// GenesisJSON is the district's genesis document, Policy its tlog-policy file.
	// Required.
	GenesisJSON, Policy []byte
	// LogKey is the log's signing key in the form of sumdb/note. Required.
	LogKey string
	// Interval is the least time between checkpoints. 100 ms.
	Interval time.Duration
	// Witnesses are asked to cosign besides those that the policy gives a URL.
	// Optional; each needs a URL.
	Witnesses []ledger.Witness
	// WitnessInterval is how often witnesses are asked. Where the policy needs them
	// it is the least time between checkpoints, too. 5 s.
	WitnessInterval time.Duration
	// WitnessTimeout is how long all of them together have to answer. 5 s.
	WitnessTimeout time.Duration
	// HTTPClient asks witnesses. Optional.
	HTTPClient *http.Client
	// CosignTimeout is how long validators are asked to cosign one checkpoint
	// before a newer one is tried. 2 s.
	CosignTimeout time.Duration
	// SegmentBytes is the size of segments on disk. 64 MiB.
	SegmentBytes int64
	// Key signs receipts of deletion, as the service "sealing" of the registry, and
	// Sender gives them to ingest. Optional, but without both nothing is ever let
	// go of.
	Key    ed25519.PrivateKey
	Sender *bus.Sender
	// Eraser is a connection that may delete messages of the streams that carry
	// payloads, which nobody else may: see [topic.EraserUser]. Bus where it is not
	// given.
	Eraser *bus.Bus
	// KeepEvery is how often to look for payloads that are due. 1 min.
	KeepEvery time.Duration
	// Now is the district's clock. time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong, joined.
func (c *Config) Validate() error {
	var errs []error
	if c.Bus == nil {
		errs = append(errs, errors.New("sealing: Bus: must be given"))
	}
	if c.Dir == "" {
		errs = append(errs, errors.New("sealing: Dir: must be given"))
	}
	g, err := identity.ParseGenesis(c.GenesisJSON)
	if err != nil {
		errs = append(errs, fmt.Errorf("sealing: GenesisJSON: %w", err))
	}
	if _, err := ledger.ParsePolicy(c.Policy); err != nil {
		errs = append(errs, fmt.Errorf("sealing: Policy: %w", err))
	}
	s, err := note.NewSigner(c.LogKey)
	if err != nil {
		errs = append(errs, fmt.Errorf("sealing: LogKey: %w", err))
	} else if g != nil && s.Name() != g.Origin {
		errs = append(errs, fmt.Errorf("sealing: LogKey: is named %s, the log %s", s.Name(), g.Origin))
	}
	if c.Interval < 0 || c.CosignTimeout < 0 || c.WitnessInterval < 0 || c.WitnessTimeout < 0 {
		errs = append(errs, errors.New("sealing: Interval, CosignTimeout, WitnessInterval, WitnessTimeout: must not be negative"))
	}
	for i, w := range c.Witnesses {
		if w.Cosigner == nil || !strings.HasPrefix(w.URL, "http://") && !strings.HasPrefix(w.URL, "https://") {
			errs = append(errs, fmt.Errorf("sealing: Witnesses[%d]: must have a key and a URL", i))
		}
	}
	if g != nil && c.Key != nil {
		if err := checkKey(g, c.Key); err != nil {
			errs = append(errs, fmt.Errorf("sealing: Key: %w", err))
		}
	}
	if c.KeepEvery < 0 {
		errs = append(errs, errors.New("sealing: KeepEvery: must not be negative"))
	}
	return errors.Join(errs...)
}

// Metrics is a snapshot of what a [Service] has done.
type Metrics struct {
	State
	Blocks      uint64 // journalled since start
	Checkpoints uint64 // sealed since start
	Refused     uint64 // cosign requests that a validator refused or answered wrongly
	Unanswered  uint64 // cosign requests without an answer
	Junk        uint64 // copies of blocks that were not valid
	Witnesses   WitnessMetrics
	// SealedP50 and SealedP99 are how long the last blocks (up to 1024) waited
	// from arriving here to being sealed.
	SealedP50, SealedP99 time.Duration
}

// Service is sealing.
type Service struct {
	c         Config
	log       *slog.Logger
	store     *Store
	signer    note.Signer
	genesis   *identity.Genesis
	stats     decided.Stats
	journaled chan struct{} // has room for one: a block was journalled
	handover  time.Duration // [handoverWait]; shorter in a test
	askers    []*asker      // of witnesses
	needed    bool          // the policy is not met without witnesses

	mu      sync.Mutex // guards what follows
	m       Metrics
	arrived map[ledger.Height]time.Time // wall clock; of blocks not sealed yet
	waits   []time.Duration             // ring
	next    int                         // in waits
}

type cosigner struct {
	number uint64
	*ledger.Cosigner
}

// New opens the data folder.
func New(c Config) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Interval == 0 {
		c.Interval = 100 * time.Millisecond
	}
	if c.CosignTimeout == 0 {
		c.CosignTimeout = 2 * time.Second
	}
	if c.WitnessInterval == 0 {
		c.WitnessInterval = 5 * time.Second
	}
	if c.WitnessTimeout == 0 {
		c.WitnessTimeout = 5 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	store, err := OpenStore(StoreOptions{Dir: c.Dir, GenesisJSON: c.GenesisJSON, Policy: c.Policy, SegmentBytes: c.SegmentBytes})
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	s := &Service{c: c, log: c.Logger, store: store, genesis: store.genesis,
		journaled: make(chan struct{}, 1), handover: handoverWait, arrived: map[ledger.Height]time.Time{}}
	if s.signer, err = note.NewSigner(c.LogKey); err != nil {
		return nil, errors.Join(err, store.Close())
	}
	first := store.Council(0)
	validators, err := s.cosigners(first)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	var keys []ed25519.PublicKey
	for _, v := range validators {
		keys = append(keys, v.Key())
	}
	s.askers, s.needed = c.askers(store.policy, store), !store.policy.MetBy(keys...)
	if s.needed {
		for _, a := range s.askers {
			keys = append(keys, a.Key())
		}
		if !store.policy.MetBy(keys...) {
			return nil, errors.Join(errors.New("sealing: Policy: needs witnesses whose URL nobody gives: nothing could ever be sealed"), store.Close())
		}
		s.c.Interval = max(s.c.Interval, s.c.WitnessInterval)
	}
	return s, nil
}

// cosigners are the validators of a set as cosigners.
func (s *Service) cosigners(c ledger.Council) ([]cosigner, error) {
	var out []cosigner
	for _, v := range c.Validators {
		k, err := ledger.NewCosigner(ledger.CosignerName(s.genesis.Origin, v.Number), ed25519.PublicKey(v.CosignKey))
		if err != nil {
			return nil, fmt.Errorf("validator %d: %w", v.Number, err)
		}
		out = append(out, cosigner{v.Number, k})
	}
	return out, nil
}

// Close closes the data folder. Run must have returned.
func (s *Service) Close() error { return s.store.Close() }

// Metrics returns a snapshot.
func (s *Service) Metrics() Metrics {
	st := s.store.State()
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.m
	m.State, m.Junk = st, s.stats.Junk.Load()
	if w := slices.Sorted(slices.Values(s.waits)); len(w) > 0 {
		m.SealedP50, m.SealedP99 = w[len(w)/2], w[len(w)*99/100]
	}
	return m
}

// Run follows and seals until ctx ends, which is not an error. A failing disk is
// one: what is durable is then not known, and starting again finds out.
func (s *Service) Run(ctx context.Context) error {
	blocks := make(chan *decided.Block, 256)
	return run.All(ctx,
		run.Actor{Name: "follow", Run: func(ctx context.Context) error {
			from, next := s.store.Resume(), ledger.Height(1)
			if from != nil {
				next = from.Header.Height + 1
			}
			return decided.Follow(ctx, decided.Config{
				Bus: s.c.Bus, District: s.genesis.District, GenesisHash: hashOf(s.c.GenesisJSON), Validators: s.store.Council(next).Validators,
				Resume: from, Stats: &s.stats, Logger: s.log,
			}, func(ctx context.Context, b *decided.Block) error {
				select {
				case blocks <- b:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		}},
		run.Actor{Name: "journal", Run: func(ctx context.Context) error { return s.journal(ctx, blocks) }},
		run.Actor{Name: "seal", Run: s.seal},
		run.Actor{Name: "keep", Run: s.keep},
		run.Actor{Name: "witness", Run: s.witness},
	)
}

// journal makes blocks durable, all that are waiting together.
func (s *Service) journal(ctx context.Context, blocks <-chan *decided.Block) error {
	for {
		var group []*decided.Block
		select {
		case <-ctx.Done():
			return nil
		case b := <-blocks:
			group = append(group, b)
		}
	more:
		for len(group) < cap(blocks) {
			select {
			case b := <-blocks:
				group = append(group, b)
			default:
				break more
			}
		}
		now := time.Now()
		s.mu.Lock()
		for _, b := range group {
			s.arrived[b.Header.Height] = now
		}
		s.mu.Unlock()
		if err := s.store.Append(group...); err != nil {
			return err
		}
		s.mu.Lock()
		s.m.Blocks += uint64(len(group))
		s.mu.Unlock()
		select {
		case s.journaled <- struct{}{}:
		default:
		}
	}
}

// seal makes checkpoints, one after another.
func (s *Service) seal(ctx context.Context) error {
	// The seal before a crash may not have been announced.
	if n, h, err := s.store.Last(); err != nil {
		return err
	} else if n != nil {
		sealed, err := s.store.Check(h, n)
		if err != nil {
			return err
		}
		s.announce(ctx, n, h, sealed.Size)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select { // not before Interval has passed
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		p, ok := s.store.Snapshot()
		for !ok {
			select {
			case <-ctx.Done():
				return nil
			case <-s.journaled:
			}
			p, ok = s.store.Snapshot()
		}
		timer.Reset(s.c.Interval)
		if err := s.checkpoint(ctx, p); err != nil {
			return err
		}
		// The validators of before may be gone for good; the log goes on.
		if p.Handover && s.store.State().SealedSize < p.Header.Size {
			if p.tried.IsZero() {
				p.tried = time.Now()
			} else if time.Since(p.tried) > s.handover {
				s.log.Error("sealing: block that changed the validators is not sealed by those before it: a verifier who pinned them must go by the votes", "height", p.Header.Height)
				s.store.Skip(p)
			}
		}
	}
}

const (
	// handoverWait is how long the validators of before are asked to seal the block
	// that changed them.
	handoverWait = 10 * time.Second
	// pinnedWait is how much longer cosignatures are gathered so that the
	// district's own policy, which others have pinned, is met too.
	pinnedWait = 50 * time.Millisecond
)

// checkpoint gets one point sealed, or gives up on it when validators do not
// cosign in time. Only errors of the disk come back.
func (s *Service) checkpoint(ctx context.Context, p *Point) error {
	cp := p.Header.Checkpoint(s.genesis.Origin)
	cctx, cancel := context.WithTimeout(ctx, s.c.CosignTimeout)
	defer cancel()
	tiles := make(chan error, 1)
	go func() { tiles <- s.store.WriteTiles(p) }() // validators look at their own log, not at our tiles
	signed, cerr := s.cosign(cctx, p.Header.Height, cp)
	if err := <-tiles; err != nil {
		return fmt.Errorf("tiles of block %d: %w", p.Header.Height, err)
	}
	if cerr != nil {
		if ctx.Err() == nil {
			s.log.Warn("sealing: no quorum of cosignatures", "height", p.Header.Height, "err", cerr)
		}
		return nil
	}
	if s.needed {
		policy := s.store.Council(p.Header.Height).Policy
		lines := s.gather(ctx, cp, signed, func(lines []string) bool {
			_, err := policy.Open(append(slices.Clone(signed), strings.Join(lines, "")...))
			return err == nil
		})
		signed = append(signed, strings.Join(lines, "")...)
		if _, err := policy.Open(signed); err != nil {
			if ctx.Err() == nil {
				s.log.Warn("sealing: not enough witnesses have cosigned", "height", p.Header.Height, "err", err)
			}
			return nil
		}
	}
	if err := s.store.Seal(p, signed); err != nil {
		return fmt.Errorf("sealing block %d: %w", p.Header.Height, err)
	}
	if s.needed {
		if err := s.store.Witnessed(p.Header.Height, signed); err != nil {
			return fmt.Errorf("sealing block %d: %w", p.Header.Height, err)
		}
	}
	now := time.Now()
	s.mu.Lock()
	s.m.Checkpoints++
	for h, at := range s.arrived {
		if h <= p.Header.Height {
			s.wait(now.Sub(at))
			delete(s.arrived, h)
		}
	}
	s.mu.Unlock()
	s.announce(ctx, signed, p.Header.Height, cp.Size)
	return nil
}

// keptWaits is over how many blocks the latency is taken.
const keptWaits = 1024

func (s *Service) wait(d time.Duration) {
	if len(s.waits) < keptWaits {
		s.waits = append(s.waits, d)
		return
	}
	s.waits[s.next] = d
	s.next = (s.next + 1) % keptWaits
}

// resend is how long to wait before asking a validator again, who may not have
// the block yet.
const resend = 20 * time.Millisecond

// cosign asks the validators who decided block h until a quorum of them has
// cosigned, and returns the signed checkpoint. Where these are others than those
// of genesis, a little longer, so that the district's policy is met too where it
// can be.
func (s *Service) cosign(ctx context.Context, h ledger.Height, cp ledger.Checkpoint) ([]byte, error) {
	body := cp.Body()
	req, err := proto.Marshal(&pb.CosignRequest{Height: uint64(h), Body: []byte(body)})
	if err != nil {
		return nil, err
	}
	council := s.store.Council(h)
	cosigners, err := s.cosigners(council)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	lines := make(chan string, len(cosigners))
	for _, c := range cosigners {
		wg.Go(func() {
			if line, ok := s.askOne(ctx, c, body, req); ok {
				lines <- line
			}
		})
	}
	var have []string
	var good []byte // enough for those in force
	var enough <-chan time.Time
	last := errors.New("no validator has answered")
	for {
		select {
		case <-enough:
			return good, nil
		case <-ctx.Done():
			if good != nil {
				return good, nil
			}
			return nil, fmt.Errorf("%d of %d validators cosigned: %w", len(have), len(cosigners), last)
		case line := <-lines:
			have = append(have, line)
			slices.Sort(have) // the same lines, the same note
			signed, err := ledger.Seal(cp, s.signer, have)
			if err != nil {
				return nil, err
			}
			if _, last = council.Quorum.Open(signed); last != nil {
				continue
			}
			if council.Since == 0 || len(have) == len(cosigners) {
				return signed, nil
			}
			if _, err := s.store.Council(0).Quorum.Open(signed); err == nil {
				return signed, nil
			}
			if good = signed; !s.store.pinnable(council) {
				return good, nil
			}
			if enough == nil {
				enough = time.After(pinnedWait)
			}
		}
	}
}

// askOne asks one validator until it cosigns.
func (s *Service) askOne(ctx context.Context, c cosigner, body string, req []byte) (line string, ok bool) {
	subject := topic.Cosign(s.genesis.District, c.number)
	for wait := resend; ; wait = min(2*wait, 500*time.Millisecond) {
		rctx, cancel := context.WithTimeout(ctx, time.Second)
		data, err := s.c.Bus.Request(rctx, subject, req)
		cancel()
		if err == nil {
			var resp pb.CosignResponse
			if err = wire.Decode(identity.Protobuf, data, &resp); err == nil {
				if len(resp.SignatureLine) == 0 {
					err = fmt.Errorf("refused: %.200s", resp.Refused)
				} else if _, err = c.CheckCosignature(body, string(resp.SignatureLine)); err == nil {
					return string(resp.SignatureLine), true
				}
			}
			s.count(&s.m.Refused)
			s.log.Debug("sealing: validator did not cosign", "validator", c.number, "err", err)
		} else if ctx.Err() == nil {
			s.count(&s.m.Unanswered)
		}
		select {
		case <-ctx.Done():
			return "", false
		case <-time.After(wait):
		}
	}
}

func (s *Service) count(n *uint64) {
	s.mu.Lock()
	*n++
	s.mu.Unlock()
}

// announce publishes a seal. It is durable on disk: whoever misses the message
// finds the checkpoint there, so a bus that is away is no reason to stop.
func (s *Service) announce(ctx context.Context, signed []byte, h ledger.Height, size uint64) {
	b, err := proto.Marshal(&pb.Seal{Height: uint64(h), Size: size, Checkpoint: signed, SealedUnixNano: s.c.Now().UnixNano()})
	if err == nil {
		pctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err = s.c.Bus.Publish(pctx, topic.Seal(s.genesis.District), fmt.Sprintf("seal-%d", size), b)
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("sealing: seal not announced", "height", h, "kind", kind.Of(err), "err", err)
	}
}
