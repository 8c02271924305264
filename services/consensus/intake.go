package consensus

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// intake brings batches from ACCEPTED to the engine, and acknowledges each when
// all of it is decided and durable here. Until then it says "in progress", so
// that a decision that takes long is not a redelivery.
type intake struct {
	v        *Validator
	verifier verifier // owned by the consumer's handler
	engine   engine   // that requests go to; owned by the consumer's handler

	mu      sync.Mutex
	waiting map[ledger.Hash]*waiting
	records int
	bytes   int
	done    []ledger.Hash // decided, not yet acknowledged
	wake    chan struct{}
	room    chan struct{} // a token when something was decided

	// owned by the consumer's handler
	next  uint64 // number in the stream of the message that is due; 0: any
	again context.CancelFunc
	// goneUntil is the newest message that was counted as gone.
	goneUntil uint64
}

// waiting is a request that is not decided yet.
type waiting struct {
	raw     []byte
	records int
	msgs    []*parts
	since   uint64 // height at which it was taken
}

// parts is a message of ACCEPTED, of which so many requests are not decided.
type parts struct {
	msg  *bus.Msg
	left int
}

const (
	ackWait    = 30 * time.Second
	inProgress = ackWait / 3
	// forget is when the consumer of a validator that is away ends: by then the
	// stream, which keeps an hour, has nothing left of what it had not acknowledged.
	// Nobody waits for ever for one who was revoked and did not come back.
	forget = decidedFor
)

func newIntake(v *Validator) *intake {
	return &intake{v: v, verifier: newVerifier(), waiting: map[ledger.Hash]*waiting{}, wake: make(chan struct{}, 1),
		room: make(chan struct{}, 1)}
}

func (in *intake) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { in.finish(ctx) })
	for ctx.Err() == nil {
		s, err := in.v.seated(ctx) // nothing to submit to before
		if err != nil {
			return err
		}
		if err := in.serve(ctx, s); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// serve consumes for the members of a seat, until there are others: what their
// engine was given is then given to the next, in the stream's order.
func (in *intake) serve(ctx context.Context, s *seat) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	wg.Go(func() {
		select {
		case <-s.left:
			cancel()
		case <-stop:
		}
	})
	in.engine = s.engine
	for ctx.Err() == nil {
		if err := in.consume(ctx); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// consume takes messages in the order of the stream, which is the order of each
// device's frames: one that comes late would make a replay of what it was
// overtaken by. So it begins after the last message up to which everything is
// acknowledged, whatever was handed out to an earlier run of this validator, and
// begins there again when one is missing.
func (in *intake) consume(ctx context.Context) error {
	name := topic.ConsensusDurable(in.v.c.Number)
	if err := in.rewind(ctx, name); err != nil {
		in.v.log.Warn("cannot go back in the stream of accepted batches yet", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
		return nil
	}
	in.next = 0
	ctx, in.again = context.WithCancel(ctx)
	defer in.again()
	return in.v.c.Bus.Consume(ctx, bus.Consumer{
		District: in.v.c.District, Stream: topic.AcceptedStream, Durable: name, Filter: topic.Accepted(in.v.c.District),
		Batch: 16, MaxAckPending: poolRequests, AckWait: ackWait,
		MaxDeliver: 1 << 30, // a message waits for its decision however often we restart
		Idle:       forget,
		Manual:     true,
	}, func(_ context.Context, msgs []*bus.Msg) error {
		for _, m := range msgs {
			if ctx.Err() != nil {
				break // it comes again
			}
			in.handle(ctx, m)
		}
		return nil
	})
}

func (in *intake) rewind(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	// Asked first: the server does not answer a reset of a consumer that is not
	// there.
	cons, err := in.v.c.Bus.JS.Consumer(ctx, topic.AcceptedStream, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil // the first start makes it
	}
	if err != nil {
		return err
	}
	st, err := in.v.c.Bus.JS.Stream(ctx, topic.AcceptedStream)
	if err != nil {
		return err
	}
	in.gone(cons.CachedInfo().AckFloor.Stream+1, st.CachedInfo().State.FirstSeq)
	_, err = in.v.c.Bus.JS.ResetConsumer(ctx, topic.AcceptedStream, name)
	return err
}

// gone tells, once, that messages from the one that is due to before the stream's
// first have left it, by age or by hand, and were not acknowledged. What this
// validator alone had of them is lost to it; the others may have decided them.
func (in *intake) gone(due, first uint64) {
	if due = max(due, in.goneUntil+1); due >= first {
		return
	}
	in.goneUntil = first - 1
	in.v.count.gone.Add(first - due)
	in.v.log.Error("accepted batches have left the stream before this validator had them decided", "seq", due, "last", first-1, "count", first-due)
}

// handle takes the message that is due. If it is another, or cannot be taken
// now, consuming begins again.
func (in *intake) handle(ctx context.Context, m *bus.Msg) {
	if in.next != 0 && m.Seq > in.next {
		in.v.log.Warn("a message is missing; going back", "seq", in.next, "got", m.Seq)
		in.again()
		return
	}
	err := in.take(ctx, m)
	switch {
	case err == nil:
	case kind.Of(err) == kind.Invalid:
		in.v.count.badReq.Add(1)
		m.Fail(err)
	default:
		in.v.log.Debug("a batch could not be taken; going back", "seq", m.Seq, "err", err)
		in.again()
		return
	}
	in.next = max(in.next, m.Seq+1)
}

// take submits the requests of one message.
func (in *intake) take(ctx context.Context, m *bus.Msg) error {
	requests, err := split(m.Data)
	if err != nil {
		return err
	}
	p := &parts{msg: m, left: len(requests)}
	for _, q := range requests {
		raw := q.raw
		r, err := in.v.core.prepare(raw, q.batch, in.verifier)
		if err != nil {
			return kind.Errorf(kind.Invalid, "consensus: %w", err)
		}
		if err := in.wait(ctx, r); err != nil {
			return err
		}
		in.mu.Lock()
		w, ok := in.waiting[r.id]
		if !ok {
			w = &waiting{raw: raw, records: len(r.candidates), since: in.v.height.Load()}
			in.waiting[r.id] = w
			in.records += w.records
			in.bytes += len(raw)
		}
		w.msgs = append(w.msgs, p)
		in.mu.Unlock()
		// Asked after it was put down: a decision in between is not missed.
		if in.v.core.isDecided(r.id) {
			in.decided([]ledger.Hash{r.id})
			continue
		}
		if err := in.engine.submit(raw); err != nil {
			return kind.Errorf(kind.Unavailable, "consensus: %w", err)
		}
	}
	return nil
}

// wait blocks while as much is undecided as should be: nothing more is pulled
// meanwhile.
func (in *intake) wait(ctx context.Context, r *request) error {
	for {
		in.mu.Lock()
		ok := len(in.waiting) == 0 || len(in.waiting) < poolRequests &&
			in.records+len(r.candidates) <= poolRecords && in.bytes+len(r.raw) <= poolBytes
		in.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-in.room:
		case <-ctx.Done():
			return kind.Errorf(kind.Unavailable, "consensus: no room: nothing was decided for long")
		}
	}
}

// patience is how many blocks may pass over a waiting request before the leader
// is suspected of leaving it out; a full pool is a few.
const patience = 16

// patient reports whether the leader decides what there is, in something like
// its order: then nobody should complain of it, however long the queue.
func (in *intake) patient() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	h := in.v.height.Load()
	for _, w := range in.waiting {
		if h > w.since+patience {
			return false
		}
	}
	return true
}

// recheck finds out which of the waiting requests were decided elsewhere.
func (in *intake) recheck() {
	in.mu.Lock()
	var ids []ledger.Hash
	for id := range in.waiting {
		ids = append(ids, id)
	}
	in.mu.Unlock()
	in.decided(slices.DeleteFunc(ids, func(id ledger.Hash) bool { return !in.v.core.isDecided(id) }))
}

// decided tells that requests are decided and durable. It does not block.
func (in *intake) decided(ids []ledger.Hash) {
	in.mu.Lock()
	in.done = append(in.done, ids...)
	in.mu.Unlock()
	for _, c := range []chan struct{}{in.wake, in.room} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// finish acknowledges, and keeps messages alive.
func (in *intake) finish(ctx context.Context) {
	alive := time.NewTicker(inProgress)
	defer alive.Stop()
	for {
		select {
		case <-ctx.Done():
			in.acknowledge() // what is decided is decided
			return
		case <-in.wake:
			in.acknowledge()
		case <-alive.C:
			for _, m := range in.messages() {
				if err := m.InProgress(); err != nil {
					in.v.log.Warn("cannot keep a message alive; it will come again", "seq", m.Seq, "err", err)
				}
			}
		}
	}
}

func (in *intake) acknowledge() {
	in.mu.Lock()
	ids := in.done
	in.done = nil
	var whole []*bus.Msg
	for _, id := range ids {
		w, ok := in.waiting[id]
		if !ok {
			continue
		}
		delete(in.waiting, id)
		in.records -= w.records
		in.bytes -= len(w.raw)
		for _, p := range w.msgs {
			if p.left--; p.left == 0 {
				whole = append(whole, p.msg)
			}
		}
	}
	in.mu.Unlock()
	select {
	case in.room <- struct{}{}:
	default:
	}
	for _, m := range whole {
		if err := m.Ack(); err != nil {
			in.v.log.Warn("cannot acknowledge; the message will come again", "seq", m.Seq, "err", err)
		}
	}
}

func (in *intake) messages() []*bus.Msg {
	in.mu.Lock()
	defer in.mu.Unlock()
	var out []*bus.Msg
	seen := map[*parts]bool{}
	for _, w := range in.waiting {
		for _, p := range w.msgs {
			if !seen[p] {
				seen[p] = true
				out = append(out, p.msg)
			}
		}
	}
	return out
}

// piece is a request with what its bytes say.
type piece struct {
	raw   []byte
	batch *pb.Batch
}

// split cuts a message of ACCEPTED into requests: itself, where it is not too
// large, else batches of its records in their order. Every validator cuts alike.
func split(data []byte) ([]piece, error) {
	b, err := wire.DecodeBatch(data)
	if err != nil {
		return nil, err
	}
	if len(b.Records) == 0 {
		return nil, kind.Errorf(kind.Invalid, "batch: records: must not be empty")
	}
	if len(data) <= MaxRequest && len(b.Records) <= MaxRequestRecords {
		return []piece{{data, b}}, nil
	}
	const overhead = 256 // of a record's and a batch's framing, generously
	var out []piece
	part := &pb.Batch{IngressFirst: b.IngressFirst, IngressLast: b.IngressLast}
	size := overhead
	flush := func() {
		out = append(out, piece{wire.EncodeBatch(part), part})
		part = &pb.Batch{IngressFirst: b.IngressFirst, IngressLast: b.IngressLast}
		size = overhead
	}
	for i, r := range b.Records {
		n := len(r.Envelope) + len(r.Salt) + overhead
		if n+overhead > MaxRequest {
			return nil, kind.Errorf(kind.Invalid, "batch: records[%d]: %d bytes, at most %d", i, len(r.Envelope), MaxRequest-2*overhead)
		}
		if size+n > MaxRequest || len(part.Records) == MaxRequestRecords {
			flush()
		}
		part.Records = append(part.Records, r)
		size += n
	}
	flush()
	return out, nil
}
