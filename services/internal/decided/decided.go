// Package decided hands out the blocks that consensus decided, in order, each
// once, and each verified from the signatures of a quorum: place in the chain,
// leaves, tree, votes, and that the payload is what the header and the leaves
// say.
//
// Who the validators are changes by records in the blocks. The follower goes
// along: a block is held against the votes of those in force for it.
//
// Blocks come from DECISIONS, where every validator publishes its own copy; the
// first valid one is taken, and copies that are not valid are counted and
// passed over. What is missing there, because the stream keeps an hour only or
// a validator lied, is asked for from the validators' own stores.
package decided

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Point is a place in the chain: after a block.
type Point struct {
	Header ledger.Header
	Tree   *ledger.Frontier // the log after that block
}

// Config says whose blocks to follow, and from where.
type Config struct {
	Bus      *bus.Bus
	District traffic.DistrictID
	// GenesisHash is the SHA-256 of the genesis document.
	GenesisHash ledger.Hash
	// Validators whose quorum the first block needs: those in force after Resume,
	// or of genesis.
	Validators []identity.Validator
	// Resume is the point after which to begin. Optional: from genesis.
	Resume *Point
	// GapWait is how long to wait for a missing block on the stream before asking
	// the validators, and the first of growing waits between asking. 100 ms.
	GapWait time.Duration
	// IdleWait is after how long without any block to ask the validators whether
	// there is one. 5 s.
	IdleWait time.Duration
	// Stats are counted into. Optional.
	Stats *Stats
	// Logger is optional.
	Logger *slog.Logger
}

// Stats count what a follower saw since it started.
type Stats struct {
	Blocks atomic.Uint64 // handed out
	Synced atomic.Uint64 // of which came from a validator's store
	Junk   atomic.Uint64 // copies that were not valid
	Height atomic.Uint64 // of the last block handed out
}

// Record is one record of a block with its payload.
type Record struct {
	Raw        []byte // canonical envelope
	Salt       ledger.Salt
	ReceivedAt time.Time // by ingest's clock
	// Index is the record's leaf in the log; only accepted records have one.
	Index    uint64
	Accepted bool
}

// Block is a decided block with its payload.
type Block struct {
	ledger.Block
	// Records of all batches in their order, refused ones included.
	Records  []Record
	Batches  [][]byte
	Verdicts ledger.Verdicts
	// Purged is set where no validator has the payload any more: Records and
	// Batches are empty, the block itself is verified all the same.
	Purged bool
	// Validators are those who decide the blocks after this one, set where it has
	// changed them.
	Validators []identity.Validator
	// Registry is the one that the block's records were judged by, set where it
	// does not follow from the records handed out before: some are gone.
	Registry *identity.Registry
}

// Chain verifies blocks one after another. It is the core of [Follow], without
// a network.
type Chain struct {
	genesis    ledger.Hash
	validators []identity.Validator
	parent     *ledger.Header
	tree       *ledger.Frontier
	// blind is set after a block without its records: if the next header names
	// another registry, they are needed.
	blind bool
}

// NewChain returns a Chain that takes the block after p next; nil: block 1.
func NewChain(genesis ledger.Hash, validators []identity.Validator, p *Point) *Chain {
	c := &Chain{genesis: genesis, validators: validators, tree: &ledger.Frontier{}}
	if p != nil {
		h := p.Header
		c.parent, c.tree = &h, p.Tree.Clone()
	}
	return c
}

// Next is the height that is due.
func (c *Chain) Next() ledger.Height {
	if c.parent == nil {
		return 1
	}
	return c.parent.Height + 1
}

// Validators are those who decide the block that is due.
func (c *Chain) Validators() []identity.Validator { return c.validators }

// Take verifies a block with its payload and, if everything is right, advances.
// A block without payload is taken only where purged is set.
func (c *Chain) Take(m *pb.Block, purged bool) (*Block, error) {
	lb, err := wire.BlockFromProto(m)
	if err != nil {
		return nil, err
	}
	// Before the votes: who may vote is just what is not known.
	if h := lb.Header; c.blind && h.RegistryVersion != c.parent.RegistryVersion {
		return nil, &blindError{h.Height, h.Registry}
	}
	tree := c.tree.Clone()
	if err := lb.Check(c.genesis, c.parent, tree, c.validators); err != nil {
		return nil, err
	}
	b := &Block{Block: *lb, Batches: m.Batches, Verdicts: m.Verdicts}
	h := lb.Header
	if len(m.Batches) == 0 && h.Requests != ledger.RequestsDigest(nil) {
		if !purged {
			return nil, fmt.Errorf("block %d: %w", h.Height, errPurged)
		}
		b.Purged = true
	} else if err := b.payload(); err != nil {
		return nil, fmt.Errorf("block %d: %w", h.Height, err)
	}
	if err := b.members(c.validators); err != nil {
		return nil, fmt.Errorf("block %d: %w", h.Height, err)
	}
	if b.Validators != nil {
		c.validators = b.Validators
	}
	c.parent, c.tree, c.blind = &h, tree, b.Purged
	return b, nil
}

// Point returns the place after the last block taken, nil before block 1.
func (c *Chain) Point() *Point {
	if c.parent == nil {
		return nil
	}
	return &Point{Header: *c.parent, Tree: c.tree.Clone()}
}

// members finds what the block changes of the validators. Whether a change is one
// that the registry allows was decided by those who accepted its record.
func (b *Block) members(now []identity.Validator) error {
	for _, r := range b.Records {
		if !r.Accepted {
			continue
		}
		e, err := identity.ParseEnvelope(r.Raw)
		if err != nil || e.Kind != identity.KindRegistry {
			continue
		}
		c := wire.Candidate(r.Raw, r.Salt[:])
		if c.Err != nil {
			return fmt.Errorf("an agreed registry record cannot be decoded: %w", c.Err)
		}
		if c.Change.Type != identity.TypeValidator {
			continue
		}
		if now, err = identity.ChangeMembers(now, *c.Change); err != nil {
			return fmt.Errorf("an agreed change of the validators cannot be carried out: %w", err)
		}
		b.Validators = now
	}
	return nil
}

var errPurged = errors.New("payload: is gone from this copy")

// payload decodes the batches and holds them against header and leaves.
func (b *Block) payload() error {
	ids := make([]ledger.Hash, len(b.Batches))
	for i, raw := range b.Batches {
		ids[i] = ledger.RequestID(raw)
	}
	if ledger.RequestsDigest(ids) != b.Header.Requests {
		return errors.New("batches: are not those that the header names")
	}
	if b.Verdicts.Digest() != b.Header.Verdicts {
		return errors.New("verdicts: are not those that the header names")
	}
	leaf := 1 // the first is the parent's header
	for i, raw := range b.Batches {
		batch, err := wire.DecodeBatch(raw)
		if err != nil {
			return fmt.Errorf("batches[%d]: %w", i, err)
		}
		for k, r := range batch.Records {
			rec := Record{Raw: r.Envelope, Salt: ledger.Salt(r.Salt), ReceivedAt: time.Unix(0, r.ReceivedUnixNano).UTC()}
			if rec.Accepted = b.Verdicts.Accepted(len(b.Records)); rec.Accepted {
				if leaf >= len(b.Leaves) || b.Leaves[leaf].Commitment != ledger.Commit(rec.Salt, rec.Raw) {
					return fmt.Errorf("batches[%d].records[%d]: does not match leaf %d", i, k, leaf)
				}
				rec.Index = b.Header.PrevSize + uint64(leaf)
				leaf++
			}
			b.Records = append(b.Records, rec)
		}
	}
	if leaf != len(b.Leaves) {
		return fmt.Errorf("leaves: %d, but %d records are accepted", len(b.Leaves), leaf-1)
	}
	if want := len(ledger.NewVerdicts(len(b.Records))); len(b.Verdicts) != want {
		return fmt.Errorf("verdicts: %d bytes for %d records, want %d", len(b.Verdicts), len(b.Records), want)
	}
	return nil
}

// Bounds on what is held for later and asked for at once.
const (
	maxPending   = 512
	maxPendBytes = 64 << 20
	syncBlocks   = 256
	syncBytes    = 8 << 20
	syncTimeout  = 2 * time.Second
	maxWait      = 5 * time.Second
)

// Follow calls f with each block, in order, until ctx ends, which is not an
// error, or f fails, whose error it returns. A block counts as handed out when
// f has returned nil.
func Follow(ctx context.Context, c Config, f func(ctx context.Context, b *Block) error) error {
	if c.Bus == nil || c.District == "" || len(c.Validators) == 0 {
		return errors.New("decided: Bus, District and Validators must be given")
	}
	if c.GapWait <= 0 {
		c.GapWait = 100 * time.Millisecond
	}
	if c.IdleWait <= 0 {
		c.IdleWait = 5 * time.Second
	}
	if c.Stats == nil {
		c.Stats = &Stats{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	fl := &follower{Config: c, chain: NewChain(c.GenesisHash, c.Validators, c.Resume), f: f, pending: map[pendKey][]byte{}}
	ctx, cancel := context.WithCancel(ctx)
	msgs := make(chan message, 8)
	var wg sync.WaitGroup
	wg.Go(func() { fl.read(ctx, msgs) })
	err := fl.loop(ctx, msgs)
	cancel()
	wg.Wait()
	return err
}

// Newest returns the height of the newest block that the stream DECISIONS holds
// with a quorum's votes, 0 where it holds none. One honest copy is enough.
// claimed is that of the newest copy which says of itself that it is one: votes
// of validators whom c does not know yet, or nothing.
func Newest(ctx context.Context, c Config) (newest, claimed ledger.Height, err error) {
	st, err := c.Bus.JS.Stream(ctx, topic.DecisionStream)
	if err != nil {
		return 0, 0, fmt.Errorf("stream %s: %w", topic.DecisionStream, err)
	}
	for _, v := range c.Validators {
		subject := topic.Decision(c.District, v.Number)
		m, err := st.GetLastMsgForSubject(ctx, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return 0, 0, fmt.Errorf("last message of %s: %w", subject, err)
		}
		h0, ok := height(m.Data)
		if !ok {
			continue
		}
		if claimed = max(claimed, h0); h0 <= newest {
			continue
		}
		h, err := certified(m.Data, c.GenesisHash, c.Validators)
		if err != nil {
			continue // whoever follows counts it as junk
		}
		newest = max(newest, h.Height)
	}
	return newest, claimed, nil
}

// certified returns the header of an encoded block if a quorum has voted for it.
func certified(data []byte, genesis ledger.Hash, validators []identity.Validator) (ledger.Header, error) {
	m, err := wire.DecodeBlock(data)
	if err != nil {
		return ledger.Header{}, err
	}
	b, err := wire.BlockFromProto(m)
	if err != nil {
		return ledger.Header{}, err
	}
	if b.Header.Genesis != genesis {
		return ledger.Header{}, fmt.Errorf("block %d: genesis: belongs to another district", b.Header.Height)
	}
	return b.Header, ledger.CheckVotes(b.Header.Hash(), b.Metadata, b.Votes, validators)
}

type message struct {
	subject string
	data    []byte
}

type pendKey struct {
	height  ledger.Height
	subject string
}

// follower is owned by the loop, but for read.
type follower struct {
	Config
	chain   *Chain
	f       func(context.Context, *Block) error
	pending map[pendKey][]byte // copies of blocks further ahead
	bytes   int                // in pending
	ask     int                // validator to ask next
}

// read passes on what the stream has, and starts over where it breaks off.
func (fl *follower) read(ctx context.Context, out chan<- message) {
	cfg := jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{topic.DecisionAll(fl.District)}, DeliverPolicy: jetstream.DeliverAllPolicy,
	}
	if fl.Resume != nil {
		// What is older was dealt with before. Block times may be simulated ones: a
		// time that says nothing about the stream is not used. What is left out by
		// mistake is asked for from the validators.
		if age := time.Since(fl.Resume.Header.Time); age > 0 && age < 2*time.Hour {
			at := fl.Resume.Header.Time.Add(-10 * time.Second)
			cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &at
		}
	}
	for wait := fl.GapWait; ctx.Err() == nil; wait = min(2*wait, maxWait) {
		err := func() error {
			cons, err := fl.Bus.JS.OrderedConsumer(ctx, topic.DecisionStream, cfg)
			if err != nil {
				return err
			}
			it, err := cons.Messages(jetstream.PullMaxMessages(32))
			if err != nil {
				return err
			}
			defer it.Stop()
			for {
				m, err := it.Next(jetstream.NextContext(ctx))
				if err != nil {
					return err
				}
				wait = fl.GapWait
				select {
				case out <- message{m.Subject(), m.Data()}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}()
		if ctx.Err() != nil {
			return
		}
		fl.Logger.Warn("decided: reading the stream broke off, starting over", "stream", topic.DecisionStream, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

func (fl *follower) loop(ctx context.Context, msgs <-chan message) error {
	wait := fl.GapWait
	timer := time.NewTimer(fl.IdleWait)
	if fl.Resume != nil {
		timer.Reset(fl.GapWait) // the stream may begin behind us, or be empty
	}
	defer timer.Stop()
	gap := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-msgs:
			before := fl.chain.Next()
			if err := fl.message(ctx, m); err != nil {
				return ended(ctx, err)
			}
			switch {
			case len(fl.pending) > 0 && (!gap || fl.chain.Next() != before):
				gap, wait = true, fl.GapWait
				timer.Reset(wait)
			case len(fl.pending) == 0:
				gap = false
				timer.Reset(fl.IdleWait)
			}
		case <-timer.C:
			progress, err := fl.sync(ctx)
			if err != nil {
				return ended(ctx, err)
			}
			if !progress {
				// Nobody has what pending blocks build on: they are not decided, or we
				// ask again when the next one comes.
				clear(fl.pending)
				fl.bytes = 0
			}
			if gap = len(fl.pending) > 0; gap || progress {
				wait = fl.GapWait
			} else {
				wait = min(2*wait, fl.IdleWait)
			}
			timer.Reset(wait)
		}
	}
}

// ended hides errors that only say that ctx has ended.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

// height returns the height of an encoded block without decoding the rest, so
// that copies of blocks we have cost next to nothing.
func height(data []byte) (ledger.Height, bool) {
	const magic = ledger.HeaderSize - 5*8 - 7*32
	if len(data) > 0 && data[0] == 1<<3|2 {
		if n, w := binary.Uvarint(data[1:]); w > 0 && n == uint64(ledger.HeaderSize) && len(data) > 1+w+ledger.HeaderSize {
			return ledger.Height(binary.BigEndian.Uint64(data[1+w+magic:])), true
		}
	}
	m, err := wire.DecodeBlock(data)
	if err != nil {
		return 0, false
	}
	h, err := ledger.ParseHeader(m.Header)
	return h.Height, err == nil
}

func (fl *follower) message(ctx context.Context, m message) error {
	h, ok := height(m.data)
	if !ok {
		fl.junk(m.subject, errors.New("cannot be decoded"))
		return nil
	}
	switch next := fl.chain.Next(); {
	case h < next:
		return nil
	case h > next:
		k := pendKey{h, m.subject}
		if _, have := fl.pending[k]; !have && len(fl.pending) < maxPending && fl.bytes+len(m.data) <= maxPendBytes {
			fl.pending[k] = bytes.Clone(m.data)
			fl.bytes += len(m.data)
		}
		return nil
	}
	if err := fl.try(ctx, m.subject, m.data); err != nil {
		return err
	}
	return fl.drain(ctx)
}

// drain hands out blocks that had been waiting, and forgets what is past.
func (fl *follower) drain(ctx context.Context) error {
	for again := true; again; {
		again = false
		next := fl.chain.Next()
		for k, data := range fl.pending {
			if k.height > next {
				continue
			}
			delete(fl.pending, k)
			fl.bytes -= len(data)
			if k.height == next && fl.chain.Next() == next {
				if err := fl.try(ctx, k.subject, data); err != nil {
					return err
				}
			}
			again = true
		}
	}
	return nil
}

// try hands out a block if it is valid. Only errors of f come back.
func (fl *follower) try(ctx context.Context, from string, data []byte) error {
	m, err := wire.DecodeBlock(data)
	if err == nil {
		var b *Block
		if b, err = fl.take(ctx, m, false); err == nil {
			return fl.hand(ctx, b)
		}
	}
	fl.junk(from, err)
	return nil
}

func (fl *follower) hand(ctx context.Context, b *Block) error {
	if err := fl.f(ctx, b); err != nil {
		return err
	}
	fl.Stats.Blocks.Add(1)
	fl.Stats.Height.Store(uint64(b.Header.Height))
	return nil
}

func (fl *follower) junk(from string, err error) {
	n := fl.Stats.Junk.Add(1)
	if n&(n-1) == 0 { // 1, 2, 4, 8 …: a liar must not fill the log
		fl.Logger.Warn("decided: copy of a block is not valid", "subject", from, "height", fl.chain.Next(), "count", n, "err", err)
	}
}

// sync asks the validators, one after another, for the block that is due and
// those after it, until one has helped.
func (fl *follower) sync(ctx context.Context) (progress bool, err error) {
	for _, purged := range []bool{false, true} {
		gone := false
		for range fl.chain.validators {
			v := fl.chain.validators[fl.ask%len(fl.chain.validators)]
			n, err := fl.syncFrom(ctx, v.Number, purged)
			if n > 0 {
				progress = true
			}
			var fe *handErr
			switch {
			case errors.As(err, &fe):
				return progress, fe.err
			case ctx.Err() != nil:
				return progress, ctx.Err()
			case errors.Is(err, errPurged):
				gone = true
			case err != nil:
				fl.Logger.Debug("decided: asking a validator for blocks", "validator", v.Number, "err", err)
			}
			if progress {
				return true, fl.drain(ctx)
			}
			fl.ask++
		}
		// A copy without payload is taken only when nobody has a better one.
		if !gone {
			break
		}
	}
	return false, nil
}

// handErr marks an error of f.
type handErr struct{ err error }

func (e *handErr) Error() string { return e.err.Error() }

func (fl *follower) syncFrom(ctx context.Context, v uint64, purged bool) (n int, err error) {
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(fl.chain.Next()), MaxBlocks: syncBlocks, MaxBytes: syncBytes})
	if err != nil {
		return 0, err
	}
	rctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	subject := topic.Sync(fl.District, v)
	data, err := fl.Bus.Request(rctx, subject, req)
	if err != nil {
		return 0, err
	}
	var resp pb.SyncResponse
	if err := wire.Decode(identity.Protobuf, data, &resp); err != nil {
		fl.junk(subject, err)
		return 0, err
	}
	for _, m := range resp.Blocks {
		b, err := fl.take(ctx, m, purged)
		if errors.Is(err, errPurged) {
			return n, err
		}
		if err != nil {
			fl.junk(subject, err)
			return n, err
		}
		if err := fl.hand(ctx, b); err != nil {
			return n, &handErr{err}
		}
		fl.Stats.Synced.Add(1)
		n++
	}
	return n, nil
}
