// Package agreed keeps the registry in step with the decided blocks, and
// remembers on disk how far it got, so that a service that follows decisions
// starts where it stopped and not at genesis.
//
// What is on disk is a convenience: a quorum's header says after each block
// what the registry's hash must be, and a file that does not fit is an error
// that names it. The registry has a file of its own beside, named by its
// SHA-256 and written only when it has changed: a large district's is some tens
// of megabytes.
package agreed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// saveEvery is how often the place in the chain is written down, besides at the
// end of [State.Run]: what a restart after a crash goes through again is at most
// that much. Handlers must bear it.
const saveEvery = time.Second

// State is a registry that follows the chain.
type State struct {
	path     string
	point    *decided.Point // owned by Run
	saved    time.Time      // owned by Run
	registry atomic.Pointer[identity.Registry]

	mu     sync.Mutex
	height ledger.Height // guarded by mu; the registry is that after this block
	// moved is closed when height rises; guarded by mu.
	moved chan struct{}

	// stored is the registry that is on disk, storedSum its snapshot's SHA-256;
	// owned by Run.
	stored    *identity.Registry
	storedSum [sha256.Size]byte

	before func(ledger.Height) error // see BeforeSave
}

// file is the stored form.
type file struct {
	Header []byte `json:"header"`
	Tree   []byte `json:"tree"`
	// Registry is the SHA-256 of the registry's snapshot, which is in the file
	// that [State.snapshotPath] names.
	Registry []byte `json:"registry"`
}

// snapshotPath names the file of a registry's snapshot.
func (s *State) snapshotPath(sum []byte) string { return fmt.Sprintf("%s-%x", s.path, sum[:8]) }

// Open returns the state that the file at path holds, or genesis where there is
// none. With an empty path nothing is ever stored.
func Open(path string, g *identity.Genesis) (*State, error) {
	s := &State{path: path, moved: make(chan struct{})}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, err
	}
	if path != "" {
		b, err := os.ReadFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		default:
			if reg, err = s.load(b); err != nil {
				return nil, s.damaged(err)
			}
			if reg.District() != g.District {
				return nil, s.damaged(fmt.Errorf("registry: of district %q, this is %q", reg.District(), g.District))
			}
		}
	}
	s.publish(reg)
	if s.point != nil {
		s.height = s.point.Header.Height
	}
	return s, nil
}

// damaged names the file, where there is one, and what to do about it.
func (s *State) damaged(err error) error {
	if s.path == "" {
		return err
	}
	return fmt.Errorf("%s: %w; remove the file to start from genesis", s.path, err)
}

// load takes over what was stored.
func (s *State) load(b []byte) (*identity.Registry, error) {
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	h, err := ledger.ParseHeader(f.Header)
	if err != nil {
		return nil, err
	}
	t, err := ledger.ParseFrontier(f.Tree)
	if err != nil {
		return nil, err
	}
	if t.Size() != h.Size || t.Root() != h.Root {
		return nil, errors.New("tree and header do not fit each other")
	}
	if len(f.Registry) != sha256.Size {
		return nil, fmt.Errorf("registry: %d bytes, must be a SHA-256", len(f.Registry))
	}
	snapshot, err := os.ReadFile(s.snapshotPath(f.Registry))
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	sum := sha256.Sum256(snapshot)
	if !bytes.Equal(sum[:], f.Registry) {
		return nil, fmt.Errorf("registry: %s: is not what was stored", s.snapshotPath(f.Registry))
	}
	reg, err := identity.ParseSnapshot(snapshot)
	if err != nil {
		return nil, err
	}
	s.point, s.stored, s.storedSum = &decided.Point{Header: h, Tree: t}, reg, sum
	return reg, nil
}

// publish makes reg the one that readers see. It is never changed again; its
// hash is computed first, because that fills a cache.
func (s *State) publish(reg *identity.Registry) {
	reg.Hash()
	s.registry.Store(reg)
}

// Registry returns the state in force for the next block. It must not be
// changed; a later change makes another one. Safe for concurrent use.
func (s *State) Registry() *identity.Registry { return s.registry.Load() }

// Reach waits until the registry is that after block h, or a later one. Somebody
// must run [State.Run] meanwhile.
func (s *State) Reach(ctx context.Context, h ledger.Height) error {
	for {
		s.mu.Lock()
		height, moved := s.height, s.moved
		s.mu.Unlock()
		if height >= h {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("registry: is that after block %d, waiting for block %d: %w", height, h, ctx.Err())
		}
	}
}

// reached tells those who wait in [State.Reach].
func (s *State) reached(h ledger.Height) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.height = h
	close(s.moved)
	s.moved = make(chan struct{})
}

// Path names the file that the place in the chain is kept in, "" where it is not.
func (s *State) Path() string { return s.path }

// BeforeSave has f called each time before the place in the chain is written
// down, with the newest block's height and by the goroutine that calls the
// handler: what f stores is never behind the place. An error of f keeps the place
// from being written. To be called before [State.Run].
func (s *State) BeforeSave(f func(ledger.Height) error) { s.before = f }

// Handler is called for each block with the registry by which its records were
// judged.
type Handler func(ctx context.Context, b *decided.Block, reg *identity.Registry) error

// Run follows the decided blocks until ctx ends. An error of f ends it and
// leaves the block to be handed out again after a restart.
func (s *State) Run(ctx context.Context, c decided.Config, f Handler) error {
	c.Resume, c.Validators = s.point, s.Registry().Validators()
	tree := &ledger.Frontier{}
	if s.point != nil {
		// Without this check nothing would ever fit, and the follower wait for ever.
		if got := s.point.Header.Genesis; got != c.GenesisHash {
			return s.damaged(fmt.Errorf("header: of a chain with genesis %x, this district's is %x", got[:8], c.GenesisHash[:8]))
		}
		tree = s.point.Tree.Clone()
	}
	log := c.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dirty := false
	save := func() {
		// Not fatal: without it only the next start takes longer.
		if err := s.save(); err != nil {
			log.Error("place in the chain not saved", "path", s.path, "err", err)
		}
		s.saved, dirty = time.Now(), false
	}
	defer func() {
		if dirty { // a clean end leaves nothing to go through again
			save()
		}
	}()
	return decided.Follow(ctx, c, func(ctx context.Context, b *decided.Block) error {
		if b.Registry != nil {
			s.publish(b.Registry)
		}
		reg := s.Registry()
		if got := reg.Hash(); b.Header.Registry != ledger.Hash(got) {
			return s.damaged(fmt.Errorf("block %d: the registry here has hash %x, the quorum's %x: the state is damaged or this software is too old",
				b.Header.Height, got[:8], b.Header.Registry[:8]))
		}
		if err := f(ctx, b, reg); err != nil {
			return err
		}
		if err := s.apply(b, reg); err != nil {
			return err
		}
		tree.Append(b.Leaves)
		s.point = &decided.Point{Header: b.Header, Tree: tree.Clone()}
		s.reached(b.Header.Height)
		if dirty = s.path != ""; dirty && time.Since(s.saved) >= saveEvery {
			save()
		}
		return nil
	})
}

// apply carries out the block's registry records, as the validators did.
func (s *State) apply(b *decided.Block, reg *identity.Registry) error {
	var next *identity.Registry
	for i := range b.Records {
		r := &b.Records[i]
		if !r.Accepted {
			continue
		}
		e, err := identity.ParseEnvelope(r.Raw)
		if err != nil || !e.Kind.ChangesRegistry() {
			continue // anything else changes nothing here
		}
		c := wire.Candidate(r.Raw, r.Salt[:])
		if c.Err != nil {
			return fmt.Errorf("block %d: an agreed registry record cannot be decoded: %w", b.Header.Height, c.Err)
		}
		if next == nil {
			next = reg.Clone()
		}
		if err := next.Apply(uint64(b.Header.Height), e.Key, *c.Change); err != nil {
			return fmt.Errorf("block %d: an agreed registry record does not apply: %w", b.Header.Height, err)
		}
	}
	if next != nil {
		s.publish(next)
	}
	return nil
}

// save writes the registry, if it has changed, then the place that names it, and
// only then removes the registries of before: after a crash in between, the file
// that the place names is there.
func (s *State) save() error {
	if s.before != nil {
		if err := s.before(s.point.Header.Height); err != nil {
			return err
		}
	}
	reg := s.Registry()
	changed := s.stored != reg
	if changed {
		snapshot := reg.Snapshot()
		sum := sha256.Sum256(snapshot)
		if err := district.WriteFile(s.snapshotPath(sum[:]), snapshot, 0o644); err != nil {
			return err
		}
		s.stored, s.storedSum = reg, sum
	}
	b, err := json.Marshal(file{Header: s.point.Header.Marshal(), Tree: s.point.Tree.Marshal(), Registry: s.storedSum[:]})
	if err != nil {
		return err
	}
	if err := district.WriteFile(s.path, b, 0o644); err != nil {
		return err
	}
	if changed {
		return s.dropSnapshots()
	}
	return nil
}

// dropSnapshots removes registries that the place does not name.
func (s *State) dropSnapshots() error {
	dir, name := filepath.Split(s.path)
	entries, err := os.ReadDir(filepath.Clean(dir))
	if err != nil {
		return err
	}
	var errs []error
	keep := filepath.Base(s.snapshotPath(s.storedSum[:]))
	for _, e := range entries {
		hex, ours := strings.CutPrefix(e.Name(), name+"-")
		if ours && len(hex) == 16 && strings.Trim(hex, "0123456789abcdef") == "" && e.Name() != keep {
			errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
