package consensus

import (
	"context"
	"sync"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
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
	verifier *identity.Verifier // owned by the consumer's handler

	mu       sync.Mutex
	waiting  map[ledger.Hash]*waiting
	records  int
	done     []ledger.Hash // decided, not yet acknowledged
	wake     chan struct{}
	room     chan struct{} // a token when something was decided
	resubmit time.Duration
}

// waiting is a request that is not decided yet.
type waiting struct {
	raw       []byte
	records   int
	msgs      []*parts
	submitted time.Time // zero: not yet
}

// parts is a message of ACCEPTED, of which so many requests are not decided.
type parts struct {
	msg  *bus.Msg
	left int
}

const (
	ackWait    = 30 * time.Second
	inProgress = ackWait / 3
)

func newIntake(v *Validator) *intake {
	return &intake{v: v, verifier: identity.NewVerifier(), waiting: map[ledger.Hash]*waiting{}, wake: make(chan struct{}, 1),
		room: make(chan struct{}, 1), resubmit: 2 * v.c.Timing.Forward}
}

func (in *intake) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { in.finish(ctx) })
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-in.v.ready: // nothing to submit to before
	}
	return in.v.c.Bus.Consume(ctx, bus.Consumer{
		District: in.v.c.District, Stream: topic.AcceptedStream, Durable: topic.ConsensusDurable(in.v.c.Number),
		Filter: topic.Accepted(in.v.c.District), Batch: 16, MaxAckPending: poolRequests, AckWait: ackWait,
		MaxDeliver: 1 << 30, // a message waits for its decision however often we restart
		Manual:     true,
	}, func(ctx context.Context, msgs []*bus.Msg) error {
		for _, m := range msgs {
			if err := in.take(ctx, m); err != nil {
				m.Fail(err)
			}
		}
		return nil
	})
}

// take submits the requests of one message.
func (in *intake) take(ctx context.Context, m *bus.Msg) error {
	raws, err := split(m.Data)
	if err != nil {
		in.v.count.badReq.Add(1)
		return err
	}
	p := &parts{msg: m, left: len(raws)}
	for _, raw := range raws {
		r, err := in.v.core.prepare(raw, in.verifier)
		if err != nil {
			in.v.count.badReq.Add(1)
			return kind.Errorf(kind.Invalid, "consensus: %w", err)
		}
		if err := in.wait(ctx, len(r.candidates)); err != nil {
			return err
		}
		in.mu.Lock()
		w, ok := in.waiting[r.id]
		if !ok {
			w = &waiting{raw: raw, records: len(r.candidates)}
			in.waiting[r.id] = w
			in.records += w.records
		}
		w.msgs = append(w.msgs, p)
		in.mu.Unlock()
		// Asked after it was put down: a decision in between is not missed.
		if in.v.core.isDecided(r.id) {
			in.decided([]ledger.Hash{r.id})
			continue
		}
		in.submit(r.id, raw)
	}
	return nil
}

// wait blocks while as much is undecided as should be: nothing more is pulled
// meanwhile.
func (in *intake) wait(ctx context.Context, records int) error {
	for {
		in.mu.Lock()
		ok := len(in.waiting) == 0 || len(in.waiting) < poolRequests && in.records+records <= poolRecords
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

// submit gives a request to the engine; what fails is tried again by finish.
func (in *intake) submit(id ledger.Hash, raw []byte) {
	err := in.v.engine.submit(raw)
	in.mu.Lock()
	defer in.mu.Unlock()
	if w, ok := in.waiting[id]; ok && err == nil {
		w.submitted = time.Now()
	}
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

// finish acknowledges, keeps messages alive, and submits again what the engine
// may have lost.
func (in *intake) finish(ctx context.Context) {
	alive := time.NewTicker(inProgress)
	defer alive.Stop()
	again := time.NewTicker(in.resubmit / 2)
	defer again.Stop()
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
		case now := <-again.C:
			for id, raw := range in.stale(now) {
				if ctx.Err() == nil {
					in.submit(id, raw)
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

func (in *intake) stale(now time.Time) map[ledger.Hash][]byte {
	in.mu.Lock()
	defer in.mu.Unlock()
	out := map[ledger.Hash][]byte{}
	for id, w := range in.waiting {
		if now.Sub(w.submitted) > in.resubmit {
			out[id] = w.raw
		}
	}
	return out
}

// split cuts a message of ACCEPTED into requests: itself, where it is not too
// large, else batches of its records in their order. Every validator cuts alike.
func split(data []byte) ([][]byte, error) {
	b, err := wire.DecodeBatch(data)
	if err != nil {
		return nil, err
	}
	if len(b.Records) == 0 {
		return nil, kind.Errorf(kind.Invalid, "batch: records: must not be empty")
	}
	if len(data) <= MaxRequest && len(b.Records) <= MaxRequestRecords {
		return [][]byte{data}, nil
	}
	const overhead = 256 // of a record's and a batch's framing, generously
	var out [][]byte
	part := &pb.Batch{IngressFirst: b.IngressFirst, IngressLast: b.IngressLast}
	size := overhead
	flush := func() {
		out = append(out, wire.EncodeBatch(part))
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
