package consensus

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// store keeps the blocks that a validator has seen decided: in blocks/ header,
// leaves, metadata and votes, in payloads/ batches and verdicts, so that
// payloads can be let go of one day without touching a block. Record i of both
// is height i+1.
//
// The payload is written before the block: a block that is there has a payload,
// and a payload without its block is one whose Deliver never returned.
type store struct {
	blocks, payloads *seglog.Log
}

func openStore(dir string, o seglog.Options) (*store, error) {
	b, err := seglog.Open(filepath.Join(dir, "blocks"), o)
	if err != nil {
		return nil, err
	}
	p, err := seglog.Open(filepath.Join(dir, "payloads"), o)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	s := &store{b, p}
	if n := p.Next(); n < b.Next() || n > b.Next()+1 {
		return nil, errors.Join(fmt.Errorf("store %s: %d payloads for %d blocks", dir, n, b.Next()), s.close())
	}
	return s, nil
}

func (s *store) close() error { return errors.Join(s.blocks.Close(), s.payloads.Close()) }

// height is that of the last block stored.
func (s *store) height() ledger.Height { return ledger.Height(s.blocks.Next()) }

// append makes a block and its payload durable.
func (s *store) append(block *ledger.Block, batches [][]byte, verdicts ledger.Verdicts) error {
	i := uint64(block.Header.Height) - 1
	if i != s.blocks.Next() {
		return fmt.Errorf("store: block %d after %d", block.Header.Height, s.blocks.Next())
	}
	payload := wire.EncodeBlock(&pb.Block{Batches: batches, Verdicts: verdicts})
	if s.payloads.Next() == i+1 {
		// Left from a crash between the two appends. Agreement makes it the same.
		have, err := s.payloads.Read(i)
		if err != nil {
			return err
		}
		if !bytes.Equal(have, payload) {
			return fmt.Errorf("store: block %d: another payload was stored before", block.Header.Height)
		}
	} else if _, err := s.payloads.Append(payload); err != nil {
		return err
	}
	_, err := s.blocks.Append(wire.EncodeBlock(wire.BlockToProto(block, nil, nil)))
	return err
}

// block reads a block with its payload.
func (s *store) block(h ledger.Height) (*pb.Block, error) {
	if h == 0 || h > s.height() {
		return nil, fmt.Errorf("store: no block %d, the last is %d", h, s.height())
	}
	m, err := readBlock(s.blocks, uint64(h)-1)
	if err != nil {
		return nil, err
	}
	p, err := readBlock(s.payloads, uint64(h)-1)
	if err != nil {
		return nil, err
	}
	m.Batches, m.Verdicts = p.Batches, p.Verdicts
	return m, nil
}

// header reads the header of a block.
func (s *store) header(h ledger.Height) (ledger.Header, error) {
	if h == 0 || h > s.height() {
		return ledger.Header{}, fmt.Errorf("store: no block %d, the last is %d", h, s.height())
	}
	m, err := readBlock(s.blocks, uint64(h)-1)
	if err != nil {
		return ledger.Header{}, err
	}
	return ledger.ParseHeader(m.Header)
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

// readFile returns nil if there is no file.
func readFile(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}
