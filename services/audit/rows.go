package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// rowOf makes the index's row of a record that the district agreed on. reg is the
// registry by which it was judged. What this version of the program cannot read
// still has a row, with what the envelope says.
func rowOf(p *ledger.Payload, class retention.Class, block time.Time, reg *identity.Registry) (row, identity.Envelope, error) {
	c := wire.Candidate(p.Envelope, p.Salt[:])
	e := c.Envelope
	r := row{index: p.Index, height: p.Height, state: Held, kind: e.Kind, class: string(class), signer: string(e.Key), measured: block}
	if e.Kind == "" {
		return r, e, fmt.Errorf("leaf %d: %w", p.Index, c.Err)
	}
	if h, ok := reg.Holder(e.Key); ok {
		r.signer = string(h.Type) + " " + h.ID
	}
	at := func(t time.Time) {
		if !t.IsZero() {
			r.measured = t
		}
	}
	switch {
	case c.Frame != nil:
		f := c.Frame
		r.junction, r.device, r.boot, r.seq = f.Junction, f.Device, f.BootEpoch, f.Seq
		r.results = f.Results
		at(f.Time)
	case c.Command != nil:
		r.command = c.Command
		r.junction, r.seq, r.rule = c.Command.Junction, c.Command.Seq, c.Command.Rule
		at(c.Command.Issued)
	case c.Import != nil:
		r.device, r.boot, r.seq = c.Import.Device, c.Import.Run, c.Import.Seq
		at(c.Import.Time)
	case c.Health != nil:
		r.junction, r.seq, r.rule = c.Health.Junction, c.Health.Seq, c.Health.Rule
		at(c.Health.Time)
	case c.Change != nil:
		r.rule = c.Change.Action + " " + string(c.Change.Type)
		switch c.Change.Type {
		case identity.TypeJunction:
			r.junction = traffic.JunctionID(c.Change.ID)
		case identity.TypeDevice:
			r.device = traffic.DeviceID(c.Change.ID)
		case identity.TypeRedaction: // by the number of what it redacts
			if n, err := strconv.ParseUint(c.Change.ID, 10, 63); err == nil {
				r.seq = n
			}
		case identity.TypeHold:
			var h identity.Hold
			if json.Unmarshal(c.Change.Body, &h) == nil { // one that is lifted has no body
				r.who, r.caseName = h.By, h.Case
			}
		}
	case c.Deletion != nil:
		r.rule = c.Deletion.Reason
		at(time.UnixMilli(c.Deletion.AtUnixMS).UTC())
	case c.Access != nil:
		a := c.Access
		r.boot, r.seq, r.rule = a.Turn.Epoch, a.Turn.Seq, a.Method
		r.who, r.caseName = agent(a.By), a.Case
		at(a.Time)
	case c.Request != nil:
		q := c.Request
		r.boot, r.seq, r.rule = q.Turn.Epoch, q.Turn.Seq, "request "+q.ID
		r.who, r.caseName = agent(q.By), q.Case
		if len(q.Stops) > 0 {
			r.junction = q.Stops[0].Junction
		}
		at(q.Time)
	case c.Override != nil:
		o := c.Override
		r.junction, r.boot, r.seq, r.rule = o.Junction, o.Turn.Epoch, o.Turn.Seq, string(o.Action)
		r.who = agent(o.By)
		at(o.Time)
	default:
		d := ledger.Describe(e)
		r.junction, r.device, r.seq = traffic.JunctionID(d.Junction), traffic.DeviceID(d.Device), d.Seq
		if d.Time != nil {
			at(*d.Time)
		}
		r.who, r.caseName = matterOf(e)
	}
	return r, e, nil
}

// agent is who asked, as the index has it.
func agent(a traffic.Agent) string {
	if a.Name == "" {
		return a.Agency
	}
	return a.Agency + "/" + a.Name
}

// matterOf reads who asked, and for which case, of records that people cause and
// that come as JSON.
func matterOf(e identity.Envelope) (requester, caseName string) {
	if e.ContentType != identity.JSON {
		return "", ""
	}
	var m struct {
		Requester  string `json:"requester"`
		Case       string `json:"case"`
		CaseNumber string `json:"case_number"`
	}
	if json.Unmarshal(e.Payload, &m) != nil {
		return "", "" // of another form: nothing to find it by
	}
	if m.Case == "" {
		m.Case = m.CaseNumber
	}
	return m.Requester, m.Case
}

// entry is what the payload store holds of a leaf.
type entry struct {
	class retention.Class
	p     *ledger.Payload
}

var errEnough = errors.New("enough")

// entries reads what the payload store has of leaf indexes from first to before
// end. What is not in the result was let go of with its whole segment.
func (s *Service) entries(blocks []*ledger.Decided) (map[uint64]entry, error) {
	first, end := blocks[0].Header.PrevSize, blocks[len(blocks)-1].Header.Size
	out := make(map[uint64]entry, end-first)
	err := s.payloads.Scan(first, func(c retention.Class, p *ledger.Payload) error {
		if p.Index >= end {
			return errEnough
		}
		out[p.Index] = entry{c, p}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, err
	}
	// The last one that is missing tells for all: segments go from the oldest on.
	for k := len(blocks) - 1; k >= 0; k-- {
		h := blocks[k].Header
		for i := h.Size - 1; i > h.PrevSize; i-- {
			if _, ok := out[i]; ok {
				continue
			}
			if _, err := s.payloads.Get(i); !errors.Is(err, payload.ErrGone) {
				return nil, fmt.Errorf("payload store: leaf %d has no entry between those that are there", i)
			}
			return out, nil
		}
	}
	return out, nil
}

// payloadOf checks that an entry is what a leaf commits to. Its error has kind
// NotFound where the payload was let go.
func payloadOf(index uint64, h ledger.Height, leaf ledger.Leaf, p *ledger.Payload) error {
	if p.Index != index || len(p.Envelope) > 0 && p.Height != h {
		return fmt.Errorf("leaf %d: the payload store has leaf %d of block %d in its place", index, p.Index, p.Height)
	}
	if len(p.Envelope) == 0 {
		return kind.Errorf(kind.NotFound, "leaf %d: its payload was let go", index)
	}
	if p.Leaf() != leaf {
		return fmt.Errorf("leaf %d: the payload is not what the leaf commits to", index)
	}
	return nil
}

// Bounds of what is read and indexed at once.
const (
	batchLeaves = 8192
	batchBlocks = 1024
)

// follow takes into the index what has been journalled since. Caller holds
// refreshing.
func (s *Service) follow(ctx context.Context) error {
	for {
		n, err := s.followSome(ctx)
		if errors.Is(err, errMoved) {
			// Another process writes the same index: go on from where it is.
			if err := s.resume(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil || n == 0 {
			return err
		}
	}
}

var errBatch = errors.New("batch is full")

// followSome indexes one batch of blocks, and says how many.
func (s *Service) followSome(ctx context.Context) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	var blocks []*ledger.Decided
	leaves := 0
	err := s.blocks.Scan(uint64(s.at.height), func(i uint64, rec []byte) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return fmt.Errorf("block journal: record %d: %w", i, err)
		}
		blocks = append(blocks, d)
		if leaves += len(d.Leaves); leaves >= batchLeaves || len(blocks) >= batchBlocks {
			return errBatch
		}
		return nil
	})
	if err != nil && !errors.Is(err, errBatch) {
		return 0, err
	}
	if len(blocks) == 0 {
		return 0, nil
	}
	have, err := s.entries(blocks)
	if err != nil {
		return 0, err
	}
	t := s.take()
	rows := make([]blockRows, 0, len(blocks))
	for _, d := range blocks {
		b, err := t.block(s.hash, d, have)
		if err != nil {
			return 0, fmt.Errorf("block %d: %w", d.Header.Height, err)
		}
		rows = append(rows, b)
	}
	if err := s.index.add(ctx, s.at, rows); err != nil {
		return 0, err
	}
	return len(blocks), s.taken(t)
}

// taking is the state in which blocks are taken in, apart from that of the
// service until they are in the index.
type taking struct {
	at      place
	reg     *identity.Registry // after the newest block; never changed
	changes []change
	fresh   []version
}

// block checks one journalled block against those before, and makes its rows.
func (t *taking) block(genesis ledger.Hash, d *ledger.Decided, have map[uint64]entry) (blockRows, error) {
	h := d.Header
	switch {
	case h.Genesis != genesis:
		return blockRows{}, fmt.Errorf("genesis: %w", errDistrict)
	case h.Height != t.at.height+1 || h.Parent != t.at.hash && t.at.height > 0 || h.PrevSize != t.at.size:
		return blockRows{}, fmt.Errorf("is not the block that follows %d", t.at.height)
	case h.Size != h.PrevSize+uint64(len(d.Leaves)):
		return blockRows{}, fmt.Errorf("size: %d after %d leaves on %d", h.Size, len(d.Leaves), h.PrevSize)
	case h.Registry != ledger.Hash(t.reg.Hash()):
		return blockRows{}, errors.New("registry: is not what the changes so far make of it")
	}
	b := blockRows{header: h, hash: h.Hash(), rows: make([]row, 0, len(d.Leaves))}
	var reg *identity.Registry
	for i := 1; i < len(d.Leaves); i++ {
		index := h.PrevSize + uint64(i)
		x, ok := have[index]
		err := kind.Errorf(kind.NotFound, "leaf %d", index)
		if ok {
			err = payloadOf(index, h.Height, d.Leaves[i], x.p)
		}
		if kind.Of(err) == kind.NotFound {
			b.rows = append(b.rows, row{index: index, height: h.Height, state: Gone, measured: h.Time})
			continue
		}
		if err != nil {
			return b, err
		}
		if x.class == retention.Mixed {
			if x.class, err = payload.ClassOf(x.p); err != nil {
				return b, err
			}
		}
		r, e, err := rowOf(x.p, x.class, h.Time, t.reg)
		if err != nil {
			return b, err
		}
		b.rows = append(b.rows, r)
		if !e.Kind.ChangesRegistry() {
			continue
		}
		ch, err := wire.DecodeChange(e.ContentType, e.Payload)
		if err != nil {
			return b, fmt.Errorf("leaf %d: %w", index, err)
		}
		if reg == nil {
			reg = t.reg.Clone()
		}
		if err := reg.Apply(uint64(h.Height), e.Key, ch); err != nil {
			return b, fmt.Errorf("leaf %d: an agreed registry record does not apply: %w", index, err)
		}
		t.changes = append(t.changes, change{h.Height, e.Key, ch})
	}
	if reg != nil {
		reg.Hash()
		t.reg = reg
		t.fresh = append(t.fresh, version{h.Height, reg})
	}
	t.at = place{h.Height, h.Size, b.hash}
	return b, nil
}
