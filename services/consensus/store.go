package consensus

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// store keeps the blocks that a validator has seen decided. Record i of both its
// logs is height i+1:
//
//	blocks/    header, leaves, metadata, votes, verdicts; and the batches of blocks
//	           that changed the registry, which are kept for good, or of these
//	           batches, where a record in them was redacted, the changes alone
//	payloads/  the batches; an empty record where this validator never had them
//
// so that payloads can be let go of, by whole segments, without touching a
// block. Payloads are written before their blocks: a block that is there has its
// payload, or never had it, and payloads without a block belong to an append
// that never returned.
//
// Folders from before payloads were purged have the verdicts in payloads/. They
// are read as they are, and no payload of theirs is ever dropped.
type store struct {
	dir              string
	blocks, payloads *seglog.Log
	purging          purging // see purge.go
	// from is the log after the first block here, nil where that is block 1: see
	// store.begin.
	from *ledger.Frontier
}

// stored is a block on its way into the store.
type stored struct {
	block    *ledger.Block
	verdicts ledger.Verdicts
	batches  [][]byte
	// keep says that the batches must never be let go of.
	keep bool
	// registry is what was kept of batches in which something was redacted.
	registry []*pb.KeptRecord
	// step is of a block that changed the validators, where it is not known yet.
	step *ledger.Step
}

func openStore(dir string, o seglog.Options) (*store, error) {
	if err := seglog.Sweep(trashDir(dir), nil, filepath.Join(dir, "blocks"), filepath.Join(dir, "payloads")); err != nil {
		return nil, err
	}
	b, err := seglog.Open(filepath.Join(dir, "blocks"), o)
	if err != nil {
		return nil, err
	}
	p, err := seglog.Open(filepath.Join(dir, "payloads"), o)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	s := &store{dir: dir, blocks: b, payloads: p}
	if err := s.openBase(); err != nil {
		return nil, errors.Join(fmt.Errorf("store %s: %w", dir, err), s.close())
	}
	if n := p.Next(); n < b.Next() {
		return nil, errors.Join(fmt.Errorf("store %s: %d payloads for %d blocks", dir, n, b.Next()), s.close())
	}
	if err := p.CutFrom(b.Next()); err != nil {
		return nil, errors.Join(fmt.Errorf("store: %w", err), s.close())
	}
	return s, nil
}

func (s *store) close() error { return errors.Join(s.blocks.Close(), s.payloads.Close()) }

// height is that of the last block stored.
func (s *store) height() ledger.Height { return ledger.Height(s.blocks.Next()) }

// first is the height of the oldest block that is here: 1, but where this
// validator began with a snapshot.
func (s *store) first() ledger.Height { return ledger.Height(s.blocks.First()) + 1 }

// append makes blocks, which follow each other, durable with their payloads.
func (s *store) append(bs ...stored) error {
	if len(bs) == 0 {
		return nil
	}
	blocks, payloads := make([][]byte, len(bs)), make([][]byte, len(bs))
	for i, b := range bs {
		if want := s.blocks.Next() + uint64(i) + 1; uint64(b.block.Header.Height) != want {
			return fmt.Errorf("store: block %d where %d is due", b.block.Header.Height, want)
		}
		payloads[i] = wire.EncodeBlock(&pb.Block{Batches: b.batches})
		kept := b.batches
		if !b.keep {
			kept = nil
		}
		m := wire.BlockToProto(b.block, kept, b.verdicts)
		m.Registry = b.registry
		blocks[i] = wire.EncodeBlock(m)
	}
	if _, err := s.payloads.Append(payloads...); err != nil {
		return err
	}
	_, err := s.blocks.Append(blocks...)
	return err
}

// block reads a block with its payload, or without where that is gone: see
// [purged].
func (s *store) block(h ledger.Height) (*pb.Block, error) {
	m, err := s.headed(h)
	if err != nil || len(m.Batches) > 0 {
		return m, err
	}
	p, err := readBlock(s.payloads, uint64(h)-1)
	if errors.Is(err, seglog.ErrNotFound) {
		return m, nil
	}
	if err != nil {
		return nil, err
	}
	m.Batches = p.Batches
	if len(p.Verdicts) > 0 {
		m.Verdicts = p.Verdicts
	}
	return m, nil
}

// headed reads a block as it is for good: without its payload, unless that
// changed the registry.
func (s *store) headed(h ledger.Height) (*pb.Block, error) {
	if h < s.first() || h > s.height() {
		return nil, fmt.Errorf("store: no block %d, there are %d to %d", h, s.first(), s.height())
	}
	return readBlock(s.blocks, uint64(h)-1)
}

// headers reads a block as [store.headed], and whole where that is not enough:
// in a layout of before.
func (s *store) headers(h ledger.Height) (*pb.Block, error) {
	m, err := s.headed(h)
	if err != nil || len(m.Verdicts) > 0 {
		return m, err
	}
	return s.block(h)
}

// header reads the header of a block.
func (s *store) header(h ledger.Height) (ledger.Header, error) {
	m, err := s.headed(h)
	if err != nil {
		return ledger.Header{}, err
	}
	return ledger.ParseHeader(m.Header)
}

// errPurged means that a block is without its payload.
var errPurged = errors.New("payload: is gone from this copy")

// purged reports whether a block is without its payload.
func purged(m *pb.Block, h ledger.Header) bool {
	return len(m.Batches) == 0 && h.Requests != ledger.RequestsDigest(nil)
}

func readBlock(l *seglog.Log, i uint64) (*pb.Block, error) {
	rec, err := l.Read(i)
	if err != nil {
		return nil, err
	}
	return wire.DecodeBlock(rec)
}

// replaceFile writes a file so that after a crash there is the old one or the
// new one, whole.
func replaceFile(path string, data []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
