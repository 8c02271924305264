package repair

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Source is another holder of the same district's log, or of a part of it. What it
// gives is not trusted. Of what it does not have it gives nothing.
type Source interface {
	Name() string
	// File returns a file of the data folder that has no records: a document, the
	// file checkpoint, a tile. An error that wraps [fs.ErrNotExist] says that it has
	// none such.
	File(ctx context.Context, name string) ([]byte, error)
	// Records calls f with records of a journal by number, from from on and below
	// to, as far as it has them.
	Records(ctx context.Context, dir string, from, to uint64, f func(n uint64, rec []byte) error) error
	// Payloads calls f with payloads, and the folder of the store that each is kept
	// in.
	Payloads(ctx context.Context, wants []Want, f func(class string, p *ledger.Payload) error) error
}

// Want is some payloads of one block.
type Want struct {
	Header ledger.Header
	Leaves []uint64 // indexes, rising
}

// Folder is a copy of the data folder.
func Folder(name string, dir fs.FS) Source { return &folder{name, dir} }

type folder struct {
	name string
	dir  fs.FS
}

func (s *folder) Name() string { return s.name }

func (s *folder) File(_ context.Context, name string) ([]byte, error) {
	return fs.ReadFile(s.dir, name)
}

func (s *folder) Records(ctx context.Context, dir string, from, to uint64, f func(uint64, []byte) error) error {
	enough := errors.New("enough")
	_, err := ledger.Salvage(s.dir, dir, func(n uint64, rec []byte, _ string) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case n < from:
			return nil
		case n >= to:
			return enough
		}
		return f(n, rec)
	})
	if errors.Is(err, enough) {
		return nil
	}
	return err
}

func (s *folder) Payloads(ctx context.Context, wants []Want, f func(string, *ledger.Payload) error) error {
	es, err := fs.ReadDir(s.dir, "payload")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range es {
		if !e.IsDir() || e.Name() == "tmp" {
			continue
		}
		_, err := ledger.Salvage(s.dir, path.Join("payload", e.Name()), func(_ uint64, rec []byte, _ string) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			p, err := ledger.ParsePayload(rec)
			if err != nil || !wanted(wants, p.Index) {
				return nil //nolint:nilerr // the copy may be damaged, too
			}
			return f(e.Name(), p)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func wanted(wants []Want, leaf uint64) bool {
	i, _ := slices.BinarySearchFunc(wants, leaf, func(w Want, leaf uint64) int {
		if w.Header.Size <= leaf {
			return -1
		}
		return 1
	})
	if i == len(wants) {
		return false
	}
	_, ok := slices.BinarySearch(wants[i].Leaves, leaf)
	return ok
}

// HTTP is a log as sealing, or any web server, shows it: C2SP tlog-tiles. It has
// tiles and the newest checkpoint, and no payloads.
func HTTP(url string, client *http.Client) Source {
	if client == nil {
		client = &http.Client{Timeout: 30 * time.Second}
	}
	return &web{strings.TrimSuffix(url, "/"), client}
}

type web struct {
	url    string
	client *http.Client
}

// maxWeb bounds one answer: entry bundles of the largest entries there could be.
const maxWeb = ledger.TileWidth * (2 + 64<<10)

func (s *web) Name() string { return s.url }

func (s *web) File(ctx context.Context, name string) ([]byte, error) {
	rest, ok := strings.CutPrefix(name, "log/")
	if !ok || rest != "checkpoint" && !strings.HasPrefix(rest, "tile/") {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/"+rest, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxWeb+1))
	err = errors.Join(err, resp.Body.Close())
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: answer %s", name, resp.Status)
	case len(b) > maxWeb:
		return nil, fmt.Errorf("%s: more than %d bytes", name, maxWeb)
	}
	return b, nil
}

func (s *web) Records(context.Context, string, uint64, uint64, func(uint64, []byte) error) error {
	return nil
}

func (s *web) Payloads(context.Context, []Want, func(string, *ledger.Payload) error) error {
	return nil
}

// Blocks is what validators have stored: ask returns blocks that follow one
// another from a height on, at most so many, or none.
func Blocks(name string, ask func(ctx context.Context, from ledger.Height, most int) ([]*pb.Block, error)) Source {
	return &blocks{name, ask}
}

type blocks struct {
	name string
	ask  func(ctx context.Context, from ledger.Height, most int) ([]*pb.Block, error)
}

func (s *blocks) Name() string { return s.name }

func (s *blocks) File(_ context.Context, name string) ([]byte, error) {
	return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

// askBlocks is how many blocks are asked for at once.
const askBlocks = 64

func (s *blocks) Records(ctx context.Context, dir string, from, to uint64, f func(uint64, []byte) error) error {
	if dir != "log/blocks" {
		return nil
	}
	for n := from; n < to; {
		bs, err := s.ask(ctx, ledger.Height(n+1), int(min(askBlocks, to-n)))
		if err != nil || len(bs) == 0 {
			return err
		}
		for _, m := range bs {
			b, err := wire.BlockFromProto(m)
			if err != nil {
				return err
			}
			if uint64(b.Header.Height) != n+1 || n >= to {
				return fmt.Errorf("block %d was asked for, block %d came", n+1, b.Header.Height)
			}
			d := ledger.Decided{Block: *b, Verdicts: m.Verdicts}
			for _, raw := range m.Batches {
				d.Requests = append(d.Requests, ledger.RequestID(raw))
			}
			if len(m.Batches) == 0 {
				d.Verdicts = nil // as sealing keeps a block without its payloads
			}
			if err := f(n, d.Marshal()); err != nil {
				return err
			}
			n++
		}
	}
	return nil
}

func (s *blocks) Payloads(ctx context.Context, wants []Want, f func(string, *ledger.Payload) error) error {
	for _, w := range wants {
		bs, err := s.ask(ctx, w.Header.Height, 1)
		if err != nil {
			return err
		}
		if len(bs) == 0 {
			continue
		}
		b, err := wire.BlockFromProto(bs[0])
		if err != nil {
			return err
		}
		if b.Header.Hash() != w.Header.Hash() {
			return fmt.Errorf("block %d: is another than the one here", w.Header.Height)
		}
		leaf, k := w.Header.PrevSize+1, 0
		for _, raw := range bs[0].Batches {
			batch, err := wire.DecodeBatch(raw)
			if err != nil {
				return fmt.Errorf("block %d: %w", w.Header.Height, err)
			}
			for _, r := range batch.Records {
				accepted := ledger.Verdicts(bs[0].Verdicts).Accepted(k)
				if k++; !accepted {
					continue
				}
				if _, want := slices.BinarySearch(w.Leaves, leaf); want {
					if len(r.Salt) != len(ledger.Salt{}) {
						return fmt.Errorf("block %d: leaf %d: salt: %d bytes", w.Header.Height, leaf, len(r.Salt))
					}
					e, err := identity.ParseEnvelope(r.Envelope)
					if err != nil {
						return fmt.Errorf("block %d: leaf %d: %w", w.Header.Height, leaf, err)
					}
					p := &ledger.Payload{Index: leaf, Height: w.Header.Height, Received: time.Unix(0, r.ReceivedUnixNano).UTC(), Salt: ledger.Salt(r.Salt), Envelope: r.Envelope}
					if err := f(string(retention.Of(e.Kind)), p); err != nil {
						return err
					}
				}
				leaf++
			}
		}
	}
	return nil
}
