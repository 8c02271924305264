package sealing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// StoreOptions say whose log a [Store] holds.
type StoreOptions struct {
	// Dir is the data folder. Required.
	Dir string
	// GenesisJSON and Policy are the district's documents. Where the folder holds
	// others already, opening it is refused. Required.
	GenesisJSON, Policy []byte
	// SegmentBytes is the size of segments of payloads and journals; 64 MiB.
	SegmentBytes int64
	// Hook, for tests, is called before each operation that changes a file: see
	// [seglog.Options].
	Hook func(op, path string) error
}

// Store is the log on disk. Append and Seal may run at the same time.
//
// The order of duties: payloads, then the block's journal entry, are durable
// when Append returns; from then on the block is ours and never asked for again.
// Tiles are made of journalled blocks, and are durable before Seal writes the
// history of checkpoints, from which at last the file checkpoint is made. Each
// step can be done again from the one before, and opening does just that.
type Store struct {
	o       StoreOptions
	genesis *identity.Genesis
	policy  *ledger.Policy
	files   *files

	payloads        *payload.Disk
	agreed          *agreed
	blocks, history *seglog.Log

	mu    sync.Mutex // guards what follows
	tiler *ledger.Tiler
	head  *ledger.Header // of the last journalled block
	full  []ledger.TileFile
	// succession is who decided which blocks; it is on disk before the block that
	// changes them is journalled.
	succession *ledger.Succession
	steps      []ledger.Step // as on disk
	// handovers are the ends of blocks that changed the validators and are not
	// sealed: those who were validators until then should seal them.
	handovers []*Point

	sealing sync.Mutex // taken before mu; guards what follows
	sealed  *ledger.Sealed
	height  ledger.Height   // of the sealed block
	edge    []ledger.TileID // partial tiles of the sealed size
}

// Paths below the data folder.
const (
	logDir     = "log"
	blocksDir  = "log/blocks"
	historyDir = "log/checkpoints"
)

// Files that are replaced whole: the first below logDir, the other beside it.
const (
	checkpointFile = "checkpoint"
	witnessedFile  = "checkpoint.witnessed"
)

// OpenStore opens the folder, makes it if there is none, and brings it to where
// it was when the last operation returned.
func OpenStore(o StoreOptions) (_ *Store, err error) {
	s := &Store{o: o, files: newFiles(filepath.Join(o.Dir, logDir), o.Hook)}
	if s.genesis, err = identity.ParseGenesis(o.GenesisJSON); err != nil {
		return nil, err
	}
	if s.policy, err = ledger.ParsePolicy(o.Policy); err != nil {
		return nil, err
	}
	if s.succession, err = ledger.NewSuccession(s.genesis, s.policy); err != nil {
		return nil, err
	}
	if err := s.files.start(); err != nil {
		return nil, err
	}
	for name, b := range map[string][]byte{"genesis.json": o.GenesisJSON, "policy": o.Policy} {
		if err := s.document(name, b); err != nil {
			return nil, err
		}
	}
	if err := s.loadSuccession(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.payloads, err = payload.Open(o.Dir, payload.Options{SegmentBytes: o.SegmentBytes, Hook: o.Hook}); err != nil {
		return nil, err
	}
	so := seglog.Options{SegmentBytes: o.SegmentBytes, Hook: o.Hook}
	for _, l := range []struct {
		log **seglog.Log
		dir string
	}{{&s.blocks, blocksDir}, {&s.history, historyDir}} {
		if *l.log, err = seglog.Open(filepath.Join(o.Dir, l.dir), so); err != nil {
			return nil, err
		}
	}
	if err = s.recover(); err != nil {
		return s, err
	}
	s.agreed, err = s.loadAgreed()
	return s, err
}

// document writes a file that never changes, or compares it.
func (s *Store) document(name string, b []byte) error {
	path := filepath.Join(s.o.Dir, name)
	switch have, err := os.ReadFile(path); {
	case errors.Is(err, fs.ErrNotExist):
		return s.files.write(path, b)
	case err != nil:
		return err
	case !slices.Equal(have, b):
		return fmt.Errorf("%s: is of another district than the one configured", path)
	}
	return nil
}

// recover takes the last checkpoint from the history, loads the log's right edge
// as it was then, and goes through the journalled blocks since.
func (s *Store) recover() error {
	s.tiler = &ledger.Tiler{}
	if n := s.history.Next(); n > 0 {
		b, err := s.history.Read(n - 1)
		if err != nil {
			return err
		}
		at, err := ledger.ParseSealedAt(b)
		if err != nil {
			return err
		}
		if s.sealed, err = s.succession.Open(at.Height, at.Note); err != nil {
			return fmt.Errorf("history of checkpoints: record %d: %w", n-1, err)
		}
		s.height, s.edge = at.Height, ledger.PartialTiles(s.sealed.Size)
		if s.tiler, err = ledger.LoadTiler(s, s.sealed.Size, s.sealed.Root); err != nil {
			return fmt.Errorf("log at the last checkpoint: %w", err)
		}
		if s.head, err = s.header(s.height); err != nil {
			return err
		}
		if s.head.Size != s.sealed.Size || s.head.Root != s.sealed.Root {
			return fmt.Errorf("history of checkpoints: record %d: is not the log after block %d", n-1, s.height)
		}
		if err := s.publish(at.Note); err != nil {
			return err
		}
		if err := s.dropPartial(nil); err != nil {
			return err
		}
	}
	if s.blocks.Next() < uint64(s.height) {
		return fmt.Errorf("block journal: ends at block %d, block %d is sealed", s.blocks.Next(), s.height)
	}
	err := s.blocks.Scan(uint64(s.height), func(i uint64, rec []byte) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return fmt.Errorf("block journal: record %d: %w", i, err)
		}
		return s.take(&d.Block)
	})
	if err != nil {
		return err
	}
	if s.head != nil {
		have, err := s.payloads.Count(s.head.Size)
		if err != nil {
			return err
		}
		if want := s.head.Size - uint64(s.head.Height); have != want {
			return fmt.Errorf("payload store: has had %d records up to block %d, the journal %d", have, s.head.Height, want)
		}
	}
	return nil
}

// take advances the tree by a journalled block, after checking that it follows.
func (s *Store) take(b *ledger.Block) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := ledger.Height(1)
	if s.head != nil {
		next = s.head.Height + 1
	}
	if b.Header.Height != next || b.Header.PrevSize != s.tiler.Size() {
		return fmt.Errorf("block %d on a log of %d entries: block %d on %d is due", b.Header.Height, b.Header.PrevSize, next, s.tiler.Size())
	}
	s.tiler.Append(b.Leaves)
	s.full = append(s.full, s.tiler.Full()...)
	if s.tiler.Root() != b.Header.Root {
		return fmt.Errorf("block %d: its leaves do not give its root", b.Header.Height)
	}
	h := b.Header
	s.head = &h
	if sets := s.succession.Sets(); slices.ContainsFunc(sets, func(c ledger.Council) bool { return c.Since == h.Height }) {
		s.handovers = append(s.handovers, &Point{Header: h, full: slices.Clone(s.full), partial: s.tiler.Partial(), Handover: true})
	}
	return nil
}

func (s *Store) header(h ledger.Height) (*ledger.Header, error) {
	rec, err := s.blocks.Read(uint64(h) - 1)
	if err != nil {
		return nil, fmt.Errorf("block journal: block %d: %w", h, err)
	}
	d, err := ledger.ParseDecided(rec)
	if err != nil {
		return nil, fmt.Errorf("block journal: block %d: %w", h, err)
	}
	return &d.Header, nil
}

// Resume returns the place after the last journalled block, nil before block 1.
func (s *Store) Resume() *decided.Point {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.head == nil {
		return nil
	}
	return &decided.Point{Header: *s.head, Tree: s.tiler.Frontier()}
}

// Append makes verified blocks durable that follow the last one, with one sync
// of the payload store and one of the journal.
func (s *Store) Append(blocks ...*decided.Block) error {
	if len(blocks) == 0 {
		return nil
	}
	next, size := ledger.Height(1), uint64(0)
	if last := s.Resume(); last != nil {
		next, size = last.Header.Height+1, last.Header.Size
	}
	for _, b := range blocks { // before anything is written
		if h := b.Header; h.Height != next || h.PrevSize != size {
			return fmt.Errorf("block %d on a log of %d entries: block %d on %d is due", h.Height, h.PrevSize, next, size)
		}
		next, size = next+1, b.Header.Size
	}
	var payloads []*ledger.Payload
	var journal [][]byte
	if err := s.succeed(blocks); err != nil {
		return err
	}
	for _, b := range blocks {
		d := ledger.Decided{Block: b.Block, Verdicts: b.Verdicts}
		if b.Purged { // nobody has the payloads any more: their places stay empty
			for i := range b.Leaves[1:] {
				p := ledger.Payload{Index: b.Header.PrevSize + 1 + uint64(i), Height: b.Header.Height}
				payloads = append(payloads, p.Erased())
			}
			d.Verdicts = nil
		}
		for _, raw := range b.Batches {
			d.Requests = append(d.Requests, ledger.RequestID(raw))
		}
		journal = append(journal, d.Marshal())
		for _, r := range b.Records {
			if !r.Accepted {
				continue // it has no leaf
			}
			payloads = append(payloads, &ledger.Payload{Index: r.Index, Height: b.Header.Height, Received: r.ReceivedAt, Salt: r.Salt, Envelope: r.Raw})
		}
	}
	// A crash between the two appends leaves payloads of blocks that are not
	// journalled; the same blocks come again, and the store knows its own.
	first := blocks[0].Header
	if err := s.payloads.Put(payloads...); err != nil {
		return err
	}
	if at, err := s.blocks.Append(journal...); err != nil {
		return err
	} else if at != uint64(first.Height)-1 {
		return fmt.Errorf("block journal: block %d at record %d", first.Height, at)
	}
	for _, b := range blocks {
		if err := s.take(&b.Block); err != nil {
			return err
		}
	}
	s.agreed.add(blocks)
	return nil
}

// Point is a state of the log that is to be sealed.
type Point struct {
	Header ledger.Header
	// Handover is set at the end of a block that changed the validators.
	Handover bool
	full     []ledger.TileFile
	partial  []ledger.TileFile
	tried    time.Time // when sealing a Handover has failed first
}

// Snapshot returns what is to be sealed next, if there is anything: the end of
// the last journalled block, but not beyond a change of the validators.
func (s *Store) Snapshot() (*Point, bool) {
	s.sealing.Lock()
	defer s.sealing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.handovers) > 0 {
		p := s.handovers[0]
		if s.sealed == nil || p.Header.Size > s.sealed.Size {
			return p, true
		}
		s.handovers = s.handovers[1:]
	}
	if s.head == nil || s.sealed != nil && s.head.Size == s.sealed.Size {
		return nil, false
	}
	return &Point{Header: *s.head, full: slices.Clone(s.full), partial: s.tiler.Partial()}, true
}

// WriteTiles makes the tiles of a point durable.
func (s *Store) WriteTiles(p *Point) error {
	s.sealing.Lock()
	defer s.sealing.Unlock()
	var out []ledger.TileFile
	for _, f := range append(slices.Clone(p.full), p.partial...) {
		if !slices.Contains(s.edge, f.TileID) { // as sealed; it has not changed
			out = append(out, f)
		}
	}
	if err := s.files.writeTiles(out); err != nil {
		return err
	}
	written := map[ledger.TileID]bool{}
	for _, f := range p.full {
		written[f.TileID] = true
	}
	s.mu.Lock()
	s.full = slices.DeleteFunc(slices.Clone(s.full), func(f ledger.TileFile) bool { return written[f.TileID] })
	for _, o := range s.handovers { // they may have been taken before
		if o != p {
			o.full = slices.DeleteFunc(o.full, func(f ledger.TileFile) bool { return written[f.TileID] })
		}
	}
	s.mu.Unlock()
	p.full = nil
	return nil
}

// Skip gives up on sealing a point at which the validators changed: those before
// are not there any more. Their votes on the block stay.
func (s *Store) Skip(p *Point) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handovers = slices.DeleteFunc(s.handovers, func(o *Point) bool { return o == p })
}

// Council returns the validators who decide block h.
func (s *Store) Council(h ledger.Height) ledger.Council {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.succession.At(h)
}

// Check verifies the signed checkpoint of the log after block h, under the policy
// of those who decided it.
func (s *Store) Check(h ledger.Height, note []byte) (*ledger.Sealed, error) {
	return s.Council(h).Policy.Open(note)
}

// Seal makes the checkpoint of a point durable and public. The point's tiles
// must have been written.
func (s *Store) Seal(p *Point, note []byte) error {
	sealed, err := s.Check(p.Header.Height, note)
	if err != nil {
		return err
	}
	if sealed.Checkpoint != p.Header.Checkpoint(s.genesis.Origin) {
		return errors.New("checkpoint: is not the one of this point")
	}
	s.sealing.Lock()
	defer s.sealing.Unlock()
	if s.sealed != nil && s.sealed.Size >= sealed.Size {
		return fmt.Errorf("checkpoint of %d entries: %d are sealed", sealed.Size, s.sealed.Size)
	}
	at := ledger.SealedAt{Height: p.Header.Height, Note: note}
	if _, err := s.history.Append(at.Marshal()); err != nil {
		return err
	}
	old := s.edge
	s.sealed, s.height, s.edge = sealed, p.Header.Height, ledger.PartialTiles(sealed.Size)
	if err := s.publish(note); err != nil {
		return err
	}
	return s.dropPartial(old)
}

// publish makes the file checkpoint what the history ends with.
func (s *Store) publish(note []byte) error {
	path := filepath.Join(s.o.Dir, logDir, checkpointFile)
	if have, err := os.ReadFile(path); err == nil && slices.Equal(have, note) {
		return nil
	}
	return s.files.write(path, note)
}

// Witnessed makes public a sealed checkpoint with cosignatures of witnesses, in a
// file of its own: by the time they have answered there is a newer checkpoint.
func (s *Store) Witnessed(h ledger.Height, note []byte) error {
	if _, err := s.Check(h, note); err != nil {
		return err
	}
	return s.files.write(filepath.Join(s.o.Dir, witnessedFile), note)
}

// dropPartial removes the partial forms of tiles that are full in the sealed
// log. Not before: clients that read the checkpoint before ask for them. old
// are the right edges that may have become full; nil: those next to the edge,
// after a crash may have kept us from it.
func (s *Store) dropPartial(old []ledger.TileID) error {
	if old == nil {
		size := s.sealed.Size
		for level := range 8 {
			size /= ledger.TileWidth
			for k := uint64(1); k <= min(size, recentTiles); k++ {
				old = append(old, ledger.TileID{Level: level, N: size - k, Width: 1})
				if level == 0 {
					old = append(old, ledger.TileID{Level: ledger.EntriesLevel, N: size - k, Width: 1})
				}
			}
		}
	}
	for _, id := range old {
		if s.sealed.Size>>(ledger.TileHeight*(max(id.Level, 0)+1)) <= id.N {
			continue // not full yet
		}
		if err := s.files.dropPartial(id); err != nil {
			return err
		}
	}
	return nil
}

// recentTiles is how far back leftovers of a crash are looked for.
const recentTiles = 16

// ReadTile makes the Store a [ledger.TileReader].
func (s *Store) ReadTile(t ledger.TileID) ([]byte, error) {
	return os.ReadFile(filepath.Join(s.o.Dir, logDir, filepath.FromSlash(t.Path())))
}

// State says how far the log is.
type State struct {
	Height, SealedHeight ledger.Height
	Size, SealedSize     uint64
}

// State returns how far the log is.
func (s *Store) State() State {
	s.sealing.Lock()
	defer s.sealing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := State{Size: s.tiler.Size(), SealedHeight: s.height}
	if s.head != nil {
		st.Height = s.head.Height
	}
	if s.sealed != nil {
		st.SealedSize = s.sealed.Size
	}
	return st
}

// Last returns the last sealed checkpoint and its block, nil before the first.
func (s *Store) Last() (note []byte, h ledger.Height, err error) {
	n := s.history.Next()
	if n == 0 {
		return nil, 0, nil
	}
	b, err := s.history.Read(n - 1)
	if err != nil {
		return nil, 0, err
	}
	at, err := ledger.ParseSealedAt(b)
	if err != nil {
		return nil, 0, err
	}
	return at.Note, at.Height, nil
}

// Close closes the files. Everything is durable already.
func (s *Store) Close() error {
	var errs []error
	if s.payloads != nil {
		errs = append(errs, s.payloads.Close())
	}
	for _, l := range []*seglog.Log{s.blocks, s.history} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}
