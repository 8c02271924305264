// Package audit answers what the log holds and proves it: it reads the data
// folder that sealing writes (see there), without changing anything, and makes
// evidence bundles of pkg/ledger's form.
//
// What it keeps in memory is an index of the newest records and the registry's
// changes. Both are made from the folder when it starts, and follow it: on each
// announced seal, and by looking every second.
package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Config of a [Service].
type Config struct {
	// Bus on which seals are announced. Optional: without it new records are found
	// after Poll.
	Bus *bus.Bus
	// Dir is the data folder of sealing, which may be written at the same time.
	// Required.
	Dir string
	// GenesisJSON and Policy are the district's documents: the genesis document and
	// the tlog-policy file, which is also put into bundles as a hint. Required.
	GenesisJSON, Policy []byte
	// Poll is how often to look for new records without being told. 1 s.
	Poll time.Duration
	// MaxRecords is how many of the newest records can be found by kind and
	// junction; older ones still have evidence, by their index. 100,000.
	MaxRecords int
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
	if c.Poll < 0 || c.MaxRecords < 0 {
		errs = append(errs, errors.New("audit: Poll, MaxRecords: must not be negative"))
	}
	return errors.Join(errs...)
}

// Record is one line of the index. What it says beside Index, Height and Kind is
// the signer's word.
type Record struct {
	Index    uint64              `json:"index"`
	Height   ledger.Height       `json:"height"`
	Kind     identity.RecordKind `json:"kind"`
	Junction traffic.JunctionID  `json:"junction,omitempty"`
	Device   traffic.DeviceID    `json:"device,omitempty"`
	Seq      uint64              `json:"seq,omitempty"`
	Time     time.Time           `json:"time"` // of the record, or else of its block
	// Provable: a bundle can be had now.
	Provable bool `json:"provable"`
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
	hash    ledger.Hash
	// succession is who decided which blocks; guarded by mu.
	succession *ledger.Succession

	refreshing                sync.Mutex // one refresh at a time; taken before mu
	payloads, blocks, history *seglog.Log

	mu       sync.RWMutex // guards what follows
	sizes    []uint64     // log size after block i+1
	parent   ledger.Hash  // of the next block
	records  []Record     // by index; a ring from oldest on when full
	oldest   int
	changes  []change
	versions []version // by height; the first is genesis
	sealed   *ledger.Sealed
	sealers  ledger.Council // who cosigned note
	note     []byte
}

// New opens the folder and reads it once. A folder that sealing has not made yet
// is empty.
func New(c Config) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Poll == 0 {
		c.Poll = time.Second
	}
	if c.MaxRecords == 0 {
		c.MaxRecords = 100_000
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{c: c, log: c.Logger, hash: sha256.Sum256(c.GenesisJSON)}
	var err error
	if s.genesis, err = identity.ParseGenesis(c.GenesisJSON); err != nil {
		return nil, err
	}
	policy, err := ledger.ParsePolicy(c.Policy)
	if err != nil {
		return nil, err
	}
	if s.succession, err = ledger.NewSuccession(s.genesis, policy); err != nil {
		return nil, err
	}
	reg, err := identity.NewRegistry(s.genesis)
	if err != nil {
		return nil, err
	}
	reg.Hash()
	s.parent, s.versions = s.hash, []version{{0, reg}}
	for _, l := range []struct {
		log **seglog.Log
		dir string
	}{{&s.payloads, "payload/record"}, {&s.blocks, "log/blocks"}, {&s.history, "log/checkpoints"}} {
		if *l.log, err = seglog.OpenReader(filepath.Join(c.Dir, l.dir)); err != nil {
			return nil, errors.Join(fmt.Errorf("audit: %w", err), s.Close())
		}
	}
	if err := s.Refresh(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the files. Run must have returned.
func (s *Service) Close() error {
	var errs []error
	for _, l := range []*seglog.Log{s.payloads, s.blocks, s.history} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// Run follows the folder until ctx ends, which is not an error. Damage that it
// meets is.
func (s *Service) Run(ctx context.Context) error {
	told := make(chan struct{}, 1)
	if s.c.Bus != nil {
		stop, err := s.c.Bus.Listen(topic.Seal(s.genesis.District), "", func(*nats.Msg) {
			select {
			case told <- struct{}{}:
			default:
			}
		})
		if err != nil {
			return fmt.Errorf("audit: %w", err)
		}
		defer stop()
	}
	tick := time.NewTicker(s.c.Poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-told:
		case <-tick.C:
		}
		if err := s.Refresh(); err != nil {
			return err
		}
	}
}

// Refresh takes in what sealing has written since. Run calls it; so may who
// cannot wait.
func (s *Service) Refresh() error {
	s.refreshing.Lock()
	defer s.refreshing.Unlock()
	// The checkpoint first: what it covers has been written before it.
	for _, l := range []*seglog.Log{s.history, s.blocks, s.payloads} {
		if err := l.Refresh(); err != nil {
			return fmt.Errorf("audit: %w", err)
		}
	}
	s.mu.RLock()
	from := uint64(len(s.sizes))
	s.mu.RUnlock()
	err := s.blocks.Scan(from, func(i uint64, rec []byte) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return fmt.Errorf("audit: block journal: record %d: %w", i, err)
		}
		if err := s.block(d); err != nil {
			return fmt.Errorf("audit: block %d: %w", i+1, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	n := s.history.Next()
	if n == 0 {
		return nil
	}
	b, err := s.history.Read(n - 1)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	at, err := ledger.ParseSealedAt(b)
	if err != nil {
		return fmt.Errorf("audit: history of checkpoints: record %d: %w", n-1, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sealed, err := s.succession.Open(at.Height, at.Note)
	if err != nil {
		return fmt.Errorf("audit: history of checkpoints: record %d: %w", n-1, err)
	}
	s.sealed, s.note, s.sealers = sealed, at.Note, s.succession.At(at.Height)
	return nil
}

// block takes in one journalled block with its payloads.
func (s *Service) block(d *ledger.Decided) error {
	h := d.Header
	s.mu.RLock()
	next, parent := ledger.Height(len(s.sizes)+1), s.parent
	v := s.versions[len(s.versions)-1]
	s.mu.RUnlock()
	switch {
	case h.Height != next || h.Parent != parent || h.Genesis != s.hash:
		return fmt.Errorf("is not the block that follows %d", next-1)
	case h.Size != h.PrevSize+uint64(len(d.Leaves)):
		return fmt.Errorf("size: %d after %d leaves on %d", h.Size, len(d.Leaves), h.PrevSize)
	case h.Registry != ledger.Hash(v.reg.Hash()):
		return errors.New("registry: is not what the changes so far make of it")
	}
	var reg *identity.Registry
	var changes []change
	records := make([]Record, 0, len(d.Leaves))
	for i := 1; i < len(d.Leaves); i++ {
		index := h.PrevSize + uint64(i)
		p, err := s.payload(index, h.Height, d.Leaves[i])
		if kind.Of(err) == kind.NotFound {
			continue // let go; the leaf stays
		}
		if err != nil {
			return err
		}
		e, err := identity.ParseEnvelope(p.Envelope)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", index, err)
		}
		c := ledger.Describe(e)
		r := Record{Index: index, Height: h.Height, Kind: e.Kind, Junction: traffic.JunctionID(c.Junction), Device: traffic.DeviceID(c.Device), Seq: c.Seq, Time: h.Time}
		if c.Time != nil {
			r.Time = *c.Time
		}
		records = append(records, r)
		if e.Kind != identity.KindRegistry {
			continue
		}
		ch, err := wire.DecodeChange(e.ContentType, e.Payload)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", index, err)
		}
		if reg == nil {
			reg = v.reg.Clone()
		}
		if err := reg.Apply(uint64(h.Height), e.Key, ch); err != nil {
			return fmt.Errorf("leaf %d: an agreed registry record does not apply: %w", index, err)
		}
		changes = append(changes, change{h.Height, e.Key, ch})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sizes = append(s.sizes, h.Size)
	s.parent = h.Hash()
	for _, r := range records {
		if len(s.records) < s.c.MaxRecords {
			s.records = append(s.records, r)
			continue
		}
		s.records[s.oldest] = r
		s.oldest = (s.oldest + 1) % len(s.records)
	}
	if reg != nil {
		if reg.MembersSince() == uint64(h.Height) {
			if err := s.succession.Change(h.Height, reg.Validators()); err != nil {
				return err
			}
		}
		reg.Hash()
		s.changes = append(s.changes, changes...)
		if len(s.versions) >= keptVersions {
			s.versions = slices.Delete(s.versions, 1, 2) // genesis stays
		}
		s.versions = append(s.versions, version{h.Height, reg})
	}
	return nil
}

// payload reads what a leaf of a block commits to. Its error has kind NotFound
// where the payload was let go.
func (s *Service) payload(index uint64, h ledger.Height, leaf ledger.Leaf) (*ledger.Payload, error) {
	b, err := s.payloads.Read(index - uint64(h))
	if errors.Is(err, seglog.ErrNotFound) && index-uint64(h) < s.payloads.First() {
		return nil, kind.Errorf(kind.NotFound, "leaf %d: its payload was let go", index)
	}
	if err != nil {
		return nil, fmt.Errorf("leaf %d: %w", index, err)
	}
	p, err := ledger.ParsePayload(b)
	if err != nil {
		return nil, fmt.Errorf("leaf %d: %w", index, err)
	}
	if p.Index != index || p.Height != h {
		return nil, fmt.Errorf("leaf %d: the payload store has leaf %d of block %d in its place", index, p.Index, p.Height)
	}
	if len(p.Envelope) == 0 {
		return nil, kind.Errorf(kind.NotFound, "leaf %d: its payload was gone before it came here", index)
	}
	if p.Leaf() != leaf {
		return nil, fmt.Errorf("leaf %d: the payload is not what the leaf commits to", index)
	}
	return p, nil
}

// Find returns the newest records first, at most limit of them. An empty kind or
// junction matches all.
func (s *Service) Find(k identity.RecordKind, j traffic.JunctionID, limit int) []Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := []Record{}
	n := len(s.records)
	for i := range n {
		if len(out) >= limit {
			break
		}
		r := s.records[(s.oldest+n-1-i)%n]
		if (k == "" || r.Kind == k) && (j == "" || r.Junction == j) {
			r.Provable = s.sealed != nil && s.sizes[r.Height-1] < s.sealed.Size
			out = append(out, r)
		}
	}
	return out
}

// registryAt returns the registry after a block.
func (s *Service) registryAt(h ledger.Height) (*identity.Registry, error) {
	s.mu.RLock()
	versions, changes := slices.Clone(s.versions), s.changes
	s.mu.RUnlock()
	i := len(versions) - 1
	for versions[i].after > h {
		i--
	}
	reg := versions[i].reg
	cloned := false
	for _, c := range changes {
		if c.height <= versions[i].after || c.height > h {
			continue
		}
		if !cloned {
			reg, cloned = reg.Clone(), true
		}
		if err := reg.Apply(uint64(c.height), c.signer, c.change); err != nil {
			return nil, fmt.Errorf("registry at block %d: %w", h, err)
		}
	}
	return reg, nil
}

// readTile reads the log that sealing writes.
func (s *Service) readTile(t ledger.TileID) ([]byte, error) {
	return os.ReadFile(filepath.Join(s.c.Dir, "log", filepath.FromSlash(t.Path())))
}

// Evidence returns the bundle of one record, by its leaf index. Errors have kind
// NotFound where there is no such record or its payload was let go, Invalid for
// a leaf that is no record, and Unavailable where it is not sealed yet.
func (s *Service) Evidence(ctx context.Context, index uint64) ([]byte, error) {
	return s.Bundle(ctx, index)
}

// Bundle returns one bundle of several records. See [Service.Evidence].
func (s *Service) Bundle(ctx context.Context, indexes ...uint64) ([]byte, error) {
	indexes = slices.Compact(slices.Sorted(slices.Values(indexes)))
	if len(indexes) == 0 || len(indexes) > ledger.MaxBundleRecords {
		return nil, kind.Errorf(kind.Invalid, "evidence: %d records, must be 1 to %d", len(indexes), ledger.MaxBundleRecords)
	}
	if err := s.Refresh(); err != nil {
		return nil, err
	}
	s.mu.RLock()
	sizes, sealed, note, sealers := s.sizes, s.sealed, s.note, s.sealers
	s.mu.RUnlock()
	b := &ledger.Bundle{Checkpoint: note, Policy: s.c.Policy}
	if sealers.Since > 0 { // the hint is the policy that the checkpoint meets
		var err error
		if b.Policy, err = ledger.CouncilPolicy(s.genesis, sealers.Validators); err != nil {
			return nil, err
		}
	}
	var block *ledger.Decided
	var reg *identity.Registry
	var signers []identity.Holder
	// A block is done when the next record is not in it.
	done := func() error {
		if block == nil {
			return nil
		}
		var err error
		bb := ledger.BundleBlock{Header: block.Header, Metadata: block.Metadata}
		bb.Votes = ledger.ValidVotes(block.Header.Hash(), block.Metadata, block.Votes, reg.Validators())
		if bb.Registry, err = ledger.Excerpts(reg, signers); err != nil {
			return err
		}
		if bb.Proof, err = ledger.Prove(ledger.TileReaderFunc(s.readTile), sealed.Size, block.Header.Size); err != nil {
			return err
		}
		b.Blocks = append(b.Blocks, bb)
		block, signers = nil, nil
		return nil
	}
	for _, index := range indexes {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		at := sort.Search(len(sizes), func(i int) bool { return sizes[i] > index })
		if at == len(sizes) {
			return nil, kind.Errorf(kind.NotFound, "evidence: no leaf %d in the log", index)
		}
		h := ledger.Height(at + 1)
		if sealed == nil || sizes[at] >= sealed.Size {
			// The next block's first leaf shows that this block's header is in the log.
			return nil, kind.Errorf(kind.Unavailable, "evidence: leaf %d is in block %d, which is not sealed yet together with the block after it; try again in a moment", index, h)
		}
		if block == nil || block.Header.Height != h {
			if err := done(); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			rec, err := s.blocks.Read(uint64(at))
			if err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			if block, err = ledger.ParseDecided(rec); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
			if reg, err = s.registryAt(h - 1); err != nil {
				return nil, fmt.Errorf("evidence: %w", err)
			}
		}
		i := index - block.Header.PrevSize
		if i == 0 {
			return nil, kind.Errorf(kind.Invalid, "evidence: leaf %d is the header of block %d and no record", index, h-1)
		}
		p, err := s.payload(index, h, block.Leaves[i])
		if err != nil {
			return nil, wrap("evidence", err)
		}
		e, err := identity.ParseEnvelope(p.Envelope)
		if err != nil {
			return nil, fmt.Errorf("evidence: leaf %d: %w", index, err)
		}
		holder, ok := reg.Holder(e.Key)
		if !ok {
			return nil, fmt.Errorf("evidence: leaf %d: its signer is not in the registry of its block", index)
		}
		signers = append(signers, holder)
		proof, err := ledger.Prove(ledger.TileReaderFunc(s.readTile), sealed.Size, index)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		b.Records = append(b.Records, ledger.BundleRecord{Index: index, Salt: p.Salt, Envelope: p.Envelope, Proof: proof})
	}
	if err := done(); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	raw := b.Marshal()
	// What does not verify here must not leave the house as evidence.
	if _, err := ledger.VerifyBundle(raw, sealers.Policy); err != nil {
		return nil, fmt.Errorf("evidence: the folder's content does not verify: %w", err)
	}
	return raw, nil
}

// wrap adds a prefix and keeps the kind.
func wrap(prefix string, err error) error { return kind.Errorf(kind.Of(err), "%s: %w", prefix, err) }

// Metrics is a snapshot of how far audit has read.
type Metrics struct {
	Blocks  uint64
	Size    uint64
	Sealed  uint64
	Indexed int
}

// Metrics returns a snapshot.
func (s *Service) Metrics() Metrics {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m := Metrics{Blocks: uint64(len(s.sizes)), Indexed: len(s.records)}
	if len(s.sizes) > 0 {
		m.Size = s.sizes[len(s.sizes)-1]
	}
	if s.sealed != nil {
		m.Sealed = s.sealed.Size
	}
	return m
}
