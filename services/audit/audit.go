package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Config of a [Service].
type Config struct {
	// Bus on which seals and other parties' checkpoints are heard, and alarms are
	// told. Optional: without it new records are found after Poll.
	Bus *bus.Bus
	// Dir is the data folder of sealing, which may be written at the same time.
	// Required.
	Dir string
	// GenesisJSON and Policy are the district's documents: the genesis document and
	// the tlog-policy file, which is also put into bundles as a hint. Required.
	GenesisJSON, Policy []byte
	// Memory is the folder in which the auditor keeps what it has seen of the log.
	// Where somebody may set Dir back, it should be elsewhere. One process writes
	// it. Dir/audit.
	Memory string
	// Quiet only answers questions: nothing is verified again or remembered,
	// because another process does. Evidence is verified all the same.
	Quiet bool
	// Poll is how often to look for new records without being told. 1 s.
	Poll time.Duration
	// Patience is how long what a checkpoint covers may be missing here before
	// that is an alarm. 20 s; at most 50 s.
	Patience time.Duration
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong, joined.
func (c *Config) Validate() error {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("audit: Dir: must be given"))
	}
	if _, err := identity.ParseGenesis(c.GenesisJSON); err != nil {
		errs = append(errs, fmt.Errorf("audit: GenesisJSON: %w", err))
	}
	if _, err := ledger.ParsePolicy(c.Policy); err != nil {
		errs = append(errs, fmt.Errorf("audit: Policy: %w", err))
	}
	if c.Poll < 0 || c.Poll > maxPatience {
		errs = append(errs, fmt.Errorf("audit: Poll: %v, must be 0 to %v", c.Poll, maxPatience))
	}
	if c.Patience < 0 || c.Patience > maxPatience {
		errs = append(errs, fmt.Errorf("audit: Patience: %v, must be 0 to %v", c.Patience, maxPatience))
	}
	return errors.Join(errs...)
}

// change is one registry change that was agreed.
type change struct {
	height ledger.Height
	signer identity.KeyID
	change identity.Change
}

// version is the registry after a block.
type version struct {
	after ledger.Height
	reg   *identity.Registry // never changed; its hash is computed
}

// keptVersions bounds the registries in memory; older ones are made again from
// genesis and the changes.
const keptVersions = 32

// Service is audit. Its methods may be called concurrently.
type Service struct {
	c       Config
	log     *slog.Logger
	genesis *identity.Genesis
	policy  *ledger.Policy
	hash    ledger.Hash
	index   *index
	watch   *watch

	refreshing sync.Mutex    // one refresh at a time; taken before files and mu
	at         place         // up to where the index has come; guarded by refreshing
	reconciled ledger.Height // up to which what was let go of is out of it; guarded by refreshing

	files           sync.RWMutex // guards what is open, not what is in it; taken before mu
	payloads        *payload.Disk
	blocks, history *seglog.Log

	mu         sync.RWMutex // guards what follows
	now        place        // a copy of at
	changes    []change
	versions   []version // by height; the first is genesis
	succession *ledger.Succession
	sealed     *ledger.Sealed
	sealers    ledger.Council // who cosigned note
	note       []byte
}

// errDistrict says that the folder belongs to another district.
var errDistrict = errors.New("the data folder is another district's")

// New opens the folder and reads what is new since the index was last written. A
// folder that sealing has not made yet is empty. One that is damaged is no error:
// it is an alarm, see [Service.Alarms].
func New(c Config) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Poll == 0 {
		c.Poll = time.Second
	}
	if c.Patience == 0 {
		c.Patience = 20 * time.Second
	}
	if c.Memory == "" {
		c.Memory = filepath.Join(c.Dir, "audit")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{c: c, log: c.Logger, hash: sha256.Sum256(c.GenesisJSON)}
	var err error
	if s.genesis, err = identity.ParseGenesis(c.GenesisJSON); err != nil {
		return nil, err
	}
	if s.policy, err = ledger.ParsePolicy(c.Policy); err != nil {
		return nil, err
	}
	if b, err := os.ReadFile(filepath.Join(c.Dir, "genesis.json")); err == nil && sha256.Sum256(b) != s.hash {
		return nil, fmt.Errorf("audit: %w", errDistrict)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("audit: %w", err)
	}
	ctx := context.Background()
	var fresh bool
	if s.index, fresh, err = openIndex(ctx, filepath.Join(c.Dir, indexFile)); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	if fresh {
		s.log.Info("audit: the index is made from log and payloads")
	}
	if err := s.reset(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if s.watch, err = newWatch(s); err != nil {
		return nil, errors.Join(fmt.Errorf("audit: %w", err), s.Close())
	}
	if err := s.Refresh(); errors.Is(err, errDistrict) {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// reset forgets what was read into memory.
func (s *Service) reset() error {
	reg, err := identity.NewRegistry(s.genesis)
	if err != nil {
		return err
	}
	reg.Hash()
	succession, err := ledger.NewSuccession(s.genesis, s.policy)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes, s.versions, s.succession, s.now = nil, []version{{0, reg}}, succession, place{}
	return nil
}

// Close closes the files. Run must have returned.
func (s *Service) Close() error {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	errs := []error{s.shut()}
	if s.watch != nil {
		errs = append(errs, s.watch.close())
	}
	if s.index != nil {
		errs = append(errs, s.index.close())
	}
	return errors.Join(errs...)
}

// open opens what sealing writes, where it is not open. Caller holds refreshing.
func (s *Service) open() (err error) {
	s.files.Lock()
	defer s.files.Unlock()
	if s.payloads == nil {
		if s.payloads, err = payload.OpenReader(s.c.Dir); err != nil {
			return err
		}
	}
	for _, l := range []struct {
		log **seglog.Log
		dir string
	}{{&s.blocks, "log/blocks"}, {&s.history, "log/checkpoints"}} {
		if *l.log == nil {
			if *l.log, err = seglog.OpenReader(filepath.Join(s.c.Dir, l.dir)); err != nil {
				*l.log = nil
				return err
			}
		}
	}
	return nil
}

// shut closes them.
func (s *Service) shut() error {
	s.files.Lock()
	defer s.files.Unlock()
	var errs []error
	if s.payloads != nil {
		errs = append(errs, s.payloads.Close())
	}
	for _, l := range []*seglog.Log{s.blocks, s.history} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	s.payloads, s.blocks, s.history = nil, nil, nil
	return errors.Join(errs...)
}

// Run follows the folder until ctx ends, which is not an error. Nor is anything
// that is wrong with the folder: that is an alarm, and it looks again.
func (s *Service) Run(ctx context.Context) error {
	told := make(chan struct{}, 1)
	wake := func() {
		select {
		case told <- struct{}{}:
		default:
		}
	}
	if b := s.c.Bus; b != nil {
		for subject, hear := range map[string]nats.MsgHandler{
			topic.Seal(s.genesis.District): func(m *nats.Msg) {
				s.hearSeal(m.Data)
				wake()
			},
			topic.SeenAll(s.genesis.District): func(m *nats.Msg) {
				if _, err := s.Saw(m.Subject, m.Data); err != nil {
					s.log.Warn("audit: a checkpoint that somebody has seen is not taken", "subject", m.Subject, "err", err)
				}
			},
		} {
			stop, err := b.Listen(subject, "", hear)
			if err != nil {
				return fmt.Errorf("audit: %w", err)
			}
			defer stop()
		}
		var asked sync.WaitGroup
		defer asked.Wait()
		asking, stop := context.WithCancel(ctx)
		defer stop()
		asked.Go(func() {
			if err := s.serve(asking, topic.Ask(s.genesis.District, topic.AuditUser, "http")); err != nil {
				s.log.Error("audit: the gateway cannot ask", "err", err)
			}
		})
	}
	tick := time.NewTicker(s.c.Poll)
	defer tick.Stop()
	for {
		if err := s.Refresh(); err != nil {
			s.log.Error("audit: reading the data folder", "err", err) // and an alarm
		}
		s.tell()
		select {
		case <-ctx.Done():
			return nil
		case <-told:
		case <-tick.C:
		}
	}
}

// Refresh takes in what sealing has written since, and checks it. Run calls it;
// so may who cannot wait. Its error is an alarm as well.
func (s *Service) Refresh() error {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	err := s.refresh(context.Background())
	if err != nil {
		err = fmt.Errorf("audit: %w", err)
	}
	s.watch.look(err)
	return err
}

func (s *Service) refresh(ctx context.Context) error {
	if err := s.open(); err != nil {
		return err
	}
	// The checkpoint first: what it covers has been written before it.
	for _, l := range []interface{ Refresh() error }{s.history, s.blocks, s.payloads} {
		if err := l.Refresh(); err != nil {
			// A file that was replaced is opened again by the next look.
			return errors.Join(err, s.shut())
		}
	}
	if s.at == (place{}) {
		if err := s.resume(ctx); err != nil {
			return err
		}
	}
	if err := s.follow(ctx); err != nil {
		return err
	}
	if err := s.reconcile(ctx); err != nil {
		return err
	}
	n := s.history.Next()
	if n == 0 {
		return nil
	}
	b, err := s.history.Read(n - 1)
	if err != nil {
		return err
	}
	at, err := ledger.ParseSealedAt(b)
	if err != nil {
		return fmt.Errorf("history of checkpoints: record %d: %w", n-1, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.succession.At(at.Height)
	if _, err := set.Quorum.Open(at.Note); err != nil {
		return fmt.Errorf("history of checkpoints: record %d: %w", n-1, err)
	}
	if sealed, err := set.Policy.Open(at.Note); err == nil {
		s.sealed, s.note, s.sealers = sealed, at.Note, set
		return nil
	}
	// The district's policy wants witnesses besides: evidence is of the newest
	// checkpoint that they have cosigned.
	return s.witnessed()
}

// witnessed takes the newest checkpoint that meets the whole policy. Caller holds
// mu.
func (s *Service) witnessed() error {
	b, err := os.ReadFile(filepath.Join(s.c.Dir, "log/checkpoint.witnessed"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // none yet
	}
	if err != nil {
		return err
	}
	sets := s.succession.Sets()
	for i := len(sets) - 1; i >= 0; i-- {
		if sealed, err := sets[i].Policy.Open(b); err == nil {
			s.sealed, s.note, s.sealers = sealed, b, sets[i]
			return nil
		}
	}
	return errors.New("log/checkpoint.witnessed does not meet the policy of any set of validators")
}

// resume goes on from what the index holds.
func (s *Service) resume(ctx context.Context) error {
	at, err := s.index.place(ctx)
	if err != nil {
		return err
	}
	if err := s.reset(); err != nil {
		return err
	}
	t := s.take()
	t.at = at
	records, err := s.index.registryRecords(ctx)
	if err != nil {
		return err
	}
	for i := 0; i < len(records); {
		reg := t.reg.Clone()
		h := records[i].Height
		for ; i < len(records) && records[i].Height == h; i++ {
			p, err := s.payloads.Get(records[i].Index)
			if err != nil {
				return err
			}
			e, err := identity.ParseEnvelope(p.Envelope)
			if err != nil {
				return fmt.Errorf("leaf %d: %w", p.Index, err)
			}
			ch, err := wire.DecodeChange(e.ContentType, e.Payload)
			if err == nil {
				err = reg.Apply(uint64(h), e.Key, ch)
			}
			if err != nil {
				return fmt.Errorf("leaf %d: %w", p.Index, err)
			}
			t.changes = append(t.changes, change{h, e.Key, ch})
		}
		t.reg = reg
		t.fresh = append(t.fresh, version{h, reg})
	}
	t.reg.Hash()
	return s.taken(t)
}

// take begins to take blocks in.
func (s *Service) take() *taking {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return &taking{at: s.at, reg: s.versions[len(s.versions)-1].reg}
}

// taken makes what was taken in the service's own.
func (s *Service) taken(t *taking) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range t.fresh {
		if v.reg.MembersSince() == uint64(v.after) {
			if err := s.succession.Change(v.after, v.reg.Validators()); err != nil {
				return err
			}
		}
		v.reg.Hash()
		if len(s.versions) >= keptVersions {
			s.versions = slices.Delete(s.versions, 1, 2) // genesis stays
		}
		s.versions = append(s.versions, v)
	}
	s.changes = append(s.changes, t.changes...)
	s.at, s.now = t.at, t.at
	return nil
}

// Metrics is a snapshot of how far audit has come, and what it has met.
type Metrics struct {
	Blocks  uint64 // in the index
	Size    uint64 // of the log that is in the index
	Sealed  uint64 // size of the newest sealed log here
	Indexed int    // records in the index
	// Verified is the size of the newest checkpoint that was verified and kept.
	Verified uint64
	// Alarms counts alarms that were raised, Standing those that still stand.
	Alarms, Standing uint64
	// Seen counts checkpoints of others that were taken, Strange those that were
	// not, because too few of those who must had signed them.
	Seen, Strange uint64
}

// Metrics returns a snapshot.
func (s *Service) Metrics() Metrics {
	m := s.watch.metrics()
	s.mu.RLock()
	defer s.mu.RUnlock()
	// Each block has one leaf that is no record.
	m.Blocks, m.Size, m.Indexed = uint64(s.now.height), s.now.size, int(s.now.size)-int(s.now.height)
	if s.sealed != nil {
		m.Sealed = s.sealed.Size
	}
	return m
}

// Rebuild empties the index and makes it again from log and payloads. Queries
// meanwhile find what there is so far.
func (s *Service) Rebuild(ctx context.Context) error {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	if err := s.index.empty(ctx); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	s.at, s.reconciled = place{}, 0
	if err := s.reset(); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if err := s.refresh(ctx); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}
