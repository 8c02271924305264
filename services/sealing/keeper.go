package sealing

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/erase"
	"github.com/stopline-traffic/stopline/services/internal/payload"
)

// Letting go of payloads, by the registry's retention entry and by redactions.
// What the order of duties is:
//
//	1. DIR/deletions/<name>.json says what is about to go: on disk before anything is
//	2. the payload store lets go
//	3. the streams let go: by age, or of single records at once
//	4. the receipt is signed, written into that file, and sent to ingest
//	5. once the receipt is in the log the file is removed
//
// A crash at any point is followed by the same steps from the one that the file
// names. Whoever checks the folder takes that file for a word that something is
// on its way, and the receipt for the reason.

// keeper lets go of payloads.
type keeper struct {
	s      *Service
	store  *Store
	dir    string // of pending deletions
	rolled map[retention.Class]time.Time
	// readOnly: only a look at what is there.
	readOnly bool
	// streams and send are those of the service; a test has its own.
	streams func(context.Context, *identity.Registry, *retention.Pending) (bool, error)
	send    func(ctx context.Context, envelope []byte) error
}

const (
	// keepTick is how often there is a look at what is due.
	keepTick = time.Minute
	// sendWait bounds one attempt to give a receipt to ingest.
	sendWait = 30 * time.Second
)

func (s *Service) newKeeper() *keeper {
	k := &keeper{s: s, store: s.store, dir: filepath.Join(s.c.Dir, retention.PendingDir), rolled: map[retention.Class]time.Time{}}
	k.streams, k.send = k.letGoStreams, k.give
	return k
}

// keep looks at what is due until ctx ends.
func (s *Service) keep(ctx context.Context) error {
	if s.c.Key == nil || s.c.Sender == nil {
		<-ctx.Done() // without a receipt nothing is let go of
		return nil
	}
	k := s.newKeeper()
	every := s.c.KeepEvery
	if every == 0 {
		every = keepTick
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		if err := k.round(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// round does everything once. Only errors of the disk come back.
func (k *keeper) round(ctx context.Context) error {
	reg, lost := k.store.agreed.registry()
	if lost != nil {
		k.s.log.Error("sealing: nothing is let go of: the registry is not known here", "err", lost)
		return nil
	}
	pending, err := k.pending()
	if err != nil {
		return err
	}
	for name, p := range pending {
		if err := k.goOn(ctx, reg, name, p); err != nil {
			return err
		}
	}
	if err := k.redactions(ctx, reg, pending); err != nil {
		return err
	}
	return k.purge(ctx, reg, pending)
}

// pending reads the deletions on their way, by file name.
func (k *keeper) pending() (map[string]*retention.Pending, error) {
	out := map[string]*retention.Pending{}
	es, err := os.ReadDir(k.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		path := filepath.Join(k.dir, e.Name())
		if !strings.HasSuffix(e.Name(), ".json") { // half written
			if k.readOnly {
				continue
			}
			if err := k.store.files.remove(path); err != nil {
				return nil, err
			}
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		p, err := retention.ParsePending(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out[e.Name()] = p
	}
	return out, nil
}

func (k *keeper) write(name string, p *retention.Pending) error {
	b, err := p.Marshal()
	if err != nil {
		return err
	}
	if err := k.store.files.mkdir(k.dir); err != nil {
		return err
	}
	return k.store.files.write(filepath.Join(k.dir, name), b)
}

// receipt begins a receipt.
func (k *keeper) receipt(reason string, c retention.Class, policy identity.Entry, ranges ...retention.Range) retention.Receipt {
	return retention.Receipt{Format: retention.ReceiptFormat, District: k.s.genesis.District, Holder: retention.SealingHolder,
		Reason: reason, Class: c, Policy: policy.Hash(), Ranges: ranges}
}

// goOn does the next steps of a deletion.
func (k *keeper) goOn(ctx context.Context, reg *identity.Registry, name string, p *retention.Pending) error {
	if p.Stage == retention.Begun {
		if err := k.letGo(p); err != nil {
			return err
		}
		p.Stage, p.ErasedUnixMS = retention.Erased, k.s.c.Now().UnixMilli()
		if err := k.write(name, p); err != nil {
			return err
		}
		k.s.log.Info("sealing: payloads let go of", "reason", p.Receipt.Reason, "class", p.Receipt.Class, "ranges", len(p.Receipt.Ranges), "records", p.Receipt.Count)
	}
	if p.Stage == retention.Erased {
		gone, err := k.streams(ctx, reg, p)
		if err != nil {
			if ctx.Err() == nil {
				k.s.log.Warn("sealing: streams not seen to have let go, looking again", "err", err)
			}
			return nil
		}
		if !gone {
			return nil
		}
		p.Receipt.AtUnixMS = k.s.c.Now().UnixMilli()
		b, err := p.Receipt.Marshal()
		if err != nil {
			return err
		}
		p.Envelope = identity.Sign(k.s.c.Key, identity.KindDeletion, identity.JSON, b).Marshal()
		p.Envelopes = nil // nobody needs to know them any more
		p.Stage = retention.Sent
		if err := k.write(name, p); err != nil {
			return err
		}
	}
	if k.store.agreed.has(&p.Receipt) {
		return k.store.files.remove(filepath.Join(k.dir, name))
	}
	if err := k.send(ctx, p.Envelope); err != nil && ctx.Err() == nil {
		k.s.log.Warn("sealing: receipt of deletion not taken, sending it again", "err", err)
	}
	return nil
}

// give sends a receipt to ingest.
func (k *keeper) give(ctx context.Context, envelope []byte) error {
	ctx, cancel := context.WithTimeout(ctx, sendWait)
	defer cancel()
	_, err := k.s.c.Sender.Send(ctx, k.s.genesis.District, identity.KindDeletion, retention.SealingHolder, envelope)
	return err
}

// letGo carries out a deletion in the payload store.
func (k *keeper) letGo(p *retention.Pending) error {
	if p.Receipt.Reason == retention.ByRedaction {
		var leaves []uint64
		for _, r := range p.Receipt.Ranges {
			leaves = append(leaves, r.First)
		}
		_, err := k.store.payloads.Erase(leaves...)
		return err
	}
	end := p.Receipt.Ranges[len(p.Receipt.Ranges)-1].Last + 1
	_, err := k.store.payloads.Drop(payload.Purge{Class: p.Receipt.Class, Floor: end, Ceiling: end,
		Held: func(r *ledger.Payload) bool { return !p.Receipt.Covers(r.Index) }})
	return err
}

// streamSlack is how much before its reception by ingest's clock a record may
// have reached a stream, and how much later than its block a copy.
const streamSlack = time.Minute

// eraser is the connection by which the streams are looked through.
func (s *Service) eraser() *bus.Bus {
	if s.c.Eraser != nil {
		return s.c.Eraser
	}
	return s.c.Bus
}

// letGoStreams reports whether the streams hold nothing of a deletion's records any
// more, and erases what was redacted.
func (k *keeper) letGoStreams(ctx context.Context, reg *identity.Registry, p *retention.Pending) (bool, error) {
	if p.Receipt.Reason == retention.ByRetention {
		_, last, err := k.blockOf(p.Receipt.Ranges[len(p.Receipt.Ranges)-1].Last)
		if err != nil {
			return false, err
		}
		ok, holds, err := erase.LetGo(ctx, k.s.eraser(), last.Header.Time.Add(streamSlack))
		if err == nil && !ok {
			k.s.log.Debug("sealing: stream still holds what was let go of", "stream", holds)
		}
		return ok, err
	}
	leaf := p.Receipt.Ranges[0].First
	aged, _, err := erase.LetGo(ctx, k.s.eraser(), time.UnixMilli(p.ErasedUnixMS))
	if err != nil {
		return false, err
	}
	want := map[erase.Digest]bool{}
	for _, d := range p.Envelopes {
		want[erase.Digest(d)] = true
	}
	if len(want) > 0 {
		since := time.UnixMilli(p.ReceivedUnixMS).Add(-streamSlack)
		if since.After(time.Now()) { // the district's clock is not that of the streams
			since = time.Time{}
		}
		r, err := erase.From(ctx, k.s.eraser(), since, want)
		if err != nil {
			return false, err
		}
		if !r.Clean() {
			k.s.log.Info("sealing: redacted record taken out of streams", "index", leaf, "erased", r.Erased, "waiting", r.Waiting)
			return false, nil // and look once more
		}
	}
	if aged {
		return true, nil
	}
	// A validator that has it may publish it again.
	for _, v := range reg.Validators() {
		if !k.store.agreed.receipted(p.Receipt.Policy, identity.DeletionID(v.Number), leaf) {
			return false, nil
		}
	}
	return true, nil
}

// redactions begins what redactions ask for.
func (k *keeper) redactions(ctx context.Context, reg *identity.Registry, pending map[string]*retention.Pending) error {
	holds := retention.Holds(reg.Holds())
	for _, t := range reg.Tombstones(0) {
		name := fmt.Sprintf("redaction-%d.json", t.Index)
		r := k.receipt(retention.ByRedaction, "", t.Entry, retention.Range{First: t.Index, Last: t.Index})
		if pending[name] != nil || k.store.agreed.has(&r) {
			continue
		}
		d, i, err := k.leafOf(t.Index)
		if err != nil {
			return err
		}
		since, err := k.store.header(ledger.Height(t.Since))
		if err != nil {
			return err
		}
		if d == nil || i == 0 || t.Void(d.Leaves[i].Commitment[:], since.PrevSize) {
			continue
		}
		p := &retention.Pending{Format: retention.PendingFormat, Stage: retention.Begun, Receipt: r, ReceivedUnixMS: d.Header.Time.UnixMilli()}
		switch have, err := k.store.payloads.Get(t.Index); {
		case errors.Is(err, payload.ErrGone):
		case err != nil:
			return err
		default:
			if c, err := payload.ClassOf(have); err != nil || c == retention.Registry {
				k.s.log.Warn("sealing: redaction is of a record that the registry needs, it stays", "index", t.Index)
				continue
			}
			if by := holds.By(factsOf(have, d.Header.Time)); len(by) > 0 {
				k.s.log.Warn("sealing: redaction waits for a legal hold to end", "index", t.Index, "holds", by)
				continue
			}
			sum := sha256.Sum256(have.Envelope)
			p.Receipt.Count, p.Envelopes = 1, []identity.Digest{sum[:]}
			p.ReceivedUnixMS = min(p.ReceivedUnixMS, have.Received.UnixMilli())
		}
		if err := k.write(name, p); err != nil {
			return err
		}
		if err := k.goOn(ctx, reg, name, p); err != nil {
			return err
		}
	}
	return nil
}

// purge begins what the retention entry asks for.
func (k *keeper) purge(ctx context.Context, reg *identity.Registry, pending map[string]*retention.Pending) error {
	rules, entry, ok := reg.Retention()
	k.store.mu.Lock()
	head := k.store.head
	k.store.mu.Unlock()
	if !ok || head == nil {
		return nil
	}
	for _, due := range retention.DueAt(rules, head.Time) {
		name := "retention-" + string(due.Class) + ".json"
		if pending[name] != nil {
			continue // one after another
		}
		if span := retention.SegmentSpan(rules, due.Class); head.Time.Sub(k.rolled[due.Class]) >= span {
			if err := k.store.payloads.Roll(due.Class); err != nil {
				return err
			}
			k.rolled[due.Class] = head.Time
		}
		plan, err := k.store.plan(due, reg)
		if err != nil {
			return err
		}
		plan.Dry = true
		got, err := k.store.payloads.Drop(plan)
		if err != nil {
			return err
		}
		if got.Count == 0 {
			continue
		}
		ranges := got.Ranges[:min(len(got.Ranges), retention.MaxRanges)] // the rest in the next round
		r := k.receipt(retention.ByRetention, due.Class, entry, ranges...)
		if len(ranges) == len(got.Ranges) {
			r.Count = got.Count
		}
		p := &retention.Pending{Format: retention.PendingFormat, Stage: retention.Begun, Receipt: r}
		if err := k.write(name, p); err != nil {
			return err
		}
		if err := k.goOn(ctx, reg, name, p); err != nil {
			return err
		}
	}
	return nil
}

// plan turns times into leaf indexes.
func (s *Store) plan(due retention.Due, reg *identity.Registry) (payload.Purge, error) {
	p := payload.Purge{Class: due.Class}
	var err error
	if p.Floor, err = s.firstAfter(due.MayBefore); err != nil {
		return p, err
	}
	if p.Ceiling, err = s.firstAfter(due.MustBefore); err != nil {
		return p, err
	}
	if holds := retention.Holds(reg.Holds()); len(holds) > 0 {
		var at *ledger.Header // of the last block asked for
		p.Held = func(r *ledger.Payload) bool {
			if at == nil || at.Height != r.Height {
				h, err := s.header(r.Height)
				if err != nil {
					return true
				}
				at = h
			}
			return holds.Keep(factsOf(r, at.Time))
		}
	}
	return p, nil
}

// factsOf are what holds ask of a record.
func factsOf(p *ledger.Payload, block time.Time) retention.Facts {
	f := retention.Facts{Index: p.Index, Time: block}
	e, err := identity.ParseEnvelope(p.Envelope)
	if err != nil {
		return f
	}
	f.Class = retention.Of(e.Kind)
	c := ledger.Describe(e)
	f.Junction, f.Device = traffic.JunctionID(c.Junction), traffic.DeviceID(c.Device)
	if c.Time != nil {
		f.Time = *c.Time
	}
	return f
}

// firstAfter returns the first leaf of the first block that is later than a time.
func (s *Store) firstAfter(t time.Time) (uint64, error) {
	n := int(s.blocks.Next())
	var err error
	h := sort.Search(n, func(i int) bool {
		hd, e := s.header(ledger.Height(i + 1))
		if e != nil {
			err = e
			return true
		}
		return hd.Time.After(t)
	})
	if err != nil || h == n {
		if err == nil && n > 0 {
			hd, e := s.header(ledger.Height(n))
			if e != nil {
				return 0, e
			}
			return hd.Size, nil
		}
		return 0, err
	}
	hd, err := s.header(ledger.Height(h + 1))
	if err != nil {
		return 0, err
	}
	return hd.PrevSize, nil
}

// blockOf returns the journalled block that a leaf is in, and its place there;
// nil where the log does not reach it.
func (k *keeper) blockOf(leaf uint64) (int, *ledger.Decided, error) {
	d, i, err := k.leafOf(leaf)
	if err == nil && d == nil {
		err = fmt.Errorf("leaf %d: is not in the log", leaf)
	}
	return i, d, err
}

func (k *keeper) leafOf(leaf uint64) (*ledger.Decided, int, error) {
	n := int(k.store.blocks.Next())
	var err error
	at := sort.Search(n, func(i int) bool {
		hd, e := k.store.header(ledger.Height(i + 1))
		if e != nil {
			err = e
			return true
		}
		return hd.Size > leaf
	})
	if err != nil || at == n {
		return nil, 0, err
	}
	rec, err := k.store.blocks.Read(uint64(at))
	if err != nil {
		return nil, 0, err
	}
	d, err := ledger.ParseDecided(rec)
	if err != nil {
		return nil, 0, err
	}
	return d, int(leaf - d.Header.PrevSize), nil
}

// checkKey says whether the key may sign receipts, by genesis.
func checkKey(g *identity.Genesis, key ed25519.PrivateKey) error {
	for _, e := range g.Entries {
		if e.Type != identity.TypeService || e.ID != retention.SealingHolder {
			continue
		}
		var s identity.Service
		if err := json.Unmarshal(e.Body, &s); err != nil {
			return err
		}
		if !bytes.Equal(s.Key, key.Public().(ed25519.PublicKey)) {
			return fmt.Errorf("is not the one of the service %s", retention.SealingHolder)
		}
		if !slices.Contains(s.Signs, identity.KindDeletion) {
			return fmt.Errorf("the service %s may not sign a %s", retention.SealingHolder, identity.KindDeletion)
		}
		return nil
	}
	return nil // filed later, or not yet
}
