package bus

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Consumer says what to consume and how.
type Consumer struct {
	// District in whose dead-letter subject messages end that cannot be handled.
	// Required.
	District traffic.DistrictID
	// Stream to read. Required.
	Stream string
	// Durable names the consumer, whose position survives restarts. Required.
	Durable string
	// Filter is the subject to read. Optional: the whole stream.
	Filter string
	// Batch is the most messages handed out at once; 0 means 64. A message never
	// waits for others, except for Linger.
	Batch int
	// Linger is how long a first message may wait for more; 0: not at all.
	Linger time.Duration
	// MaxAckPending bounds messages handed out and not acknowledged; 0 means
	// 4 × Batch.
	MaxAckPending int
	// AckWait is when the server hands out a message again that was not
	// acknowledged; 0 means 30 s. A handler's ctx ends after three quarters of it.
	AckWait time.Duration
	// MaxDeliver bounds tries of a message that fails with kind Internal or Stale;
	// 0 means 5.
	MaxDeliver int
	// Idle is after how long without anybody consuming the server forgets the
	// consumer. 0: never.
	Idle time.Duration
	// InOrder tries a message that failed again in place, holding up all others,
	// instead of putting it back behind them.
	InOrder bool
	// Manual leaves acknowledging to the handler, which may do so after it has
	// returned, with Msg.Ack or Msg.Nak; one that does neither within AckWait is
	// handed out again. What the handler returns as an error is treated as usual.
	Manual bool
	// Drain is how long the handler may go on with the batch in hand after ctx has
	// ended; 0 means 2 s.
	Drain time.Duration
}

func (c *Consumer) defaults() error {
	var errs []error
	for _, f := range []struct{ name, value string }{{"District", string(c.District)}, {"Stream", c.Stream}, {"Durable", c.Durable}} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("bus: Consumer.%s: must not be empty", f.name))
		}
	}
	for _, f := range []struct {
		name  string
		value int64
	}{{"Batch", int64(c.Batch)}, {"Linger", int64(c.Linger)}, {"MaxAckPending", int64(c.MaxAckPending)}, {"AckWait", int64(c.AckWait)},
		{"MaxDeliver", int64(c.MaxDeliver)}, {"Drain", int64(c.Drain)}} {
		if f.value < 0 {
			errs = append(errs, fmt.Errorf("bus: Consumer.%s: must not be negative", f.name))
		}
	}
	if c.Batch == 0 {
		c.Batch = 64
	}
	if c.MaxAckPending == 0 {
		c.MaxAckPending = 4 * c.Batch
	}
	if c.AckWait == 0 {
		c.AckWait = 30 * time.Second
	}
	if c.MaxDeliver == 0 {
		c.MaxDeliver = 5
	}
	if c.Drain == 0 {
		c.Drain = 2 * time.Second
	}
	return errors.Join(errs...)
}

// Ack says that the message is dealt with; for Consumer.Manual.
func (m *Msg) Ack() error { return m.js.Ack() }

// Nak gives the message back, to be handed out again after delay; for
// Consumer.Manual.
func (m *Msg) Nak(delay time.Duration) error {
	if delay <= 0 {
		return m.js.Nak()
	}
	return m.js.NakWithDelay(delay)
}

// InProgress starts the message's AckWait anew.
func (m *Msg) InProgress() error { return m.js.InProgress() }

// Fail decides the fate of this message alone, as if the handler had been given
// only it and had returned err. The handler then returns nil for the others.
func (m *Msg) Fail(err error) { m.failed = err }

// Consume hands out the messages of a stream in batches until ctx ends, which is
// not an error. See the package comment for what becomes of them by what handle
// returns. handle is never called twice at the same time.
//
// It waits, and says so in the log, for a server or a stream that is not there
// yet.
func (b *Bus) Consume(ctx context.Context, c Consumer, handle func(ctx context.Context, msgs []*Msg) error) error {
	if err := c.defaults(); err != nil {
		return err
	}
	l := consumeLoop{bus: b, Consumer: c, handle: handle}
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		began := time.Now()
		err := l.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if b.NC.IsClosed() {
			return kind.Errorf(kind.Unavailable, "bus: consuming %s as %s: connection closed", c.Stream, c.Durable)
		}
		if k := kindOf(err); k == kind.Internal || k == kind.Invalid {
			return kind.Errorf(k, "bus: consuming %s as %s: %w", c.Stream, c.Durable, err)
		}
		if time.Since(began) > retryMost {
			wait = retryFirst
		}
		b.log.Warn("bus: consumer stopped, starting it again", "stream", c.Stream, "consumer", c.Durable, "err", err)
		if !sleep(ctx, wait) {
			return nil
		}
	}
}

type consumeLoop struct {
	Consumer
	bus    *Bus
	handle func(ctx context.Context, msgs []*Msg) error
}

// run consumes until ctx ends or the consumer is gone.
func (l *consumeLoop) run(ctx context.Context) error {
	try, cancelTry := context.WithTimeout(ctx, publishTry)
	defer cancelTry()
	cons, err := l.bus.JS.CreateOrUpdateConsumer(try, l.Stream, jetstream.ConsumerConfig{
		Durable: l.Durable, FilterSubject: l.Filter, DeliverPolicy: jetstream.DeliverAllPolicy,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: l.AckWait, MaxAckPending: l.MaxAckPending,
		MaxDeliver:        -1, // we count: the server would drop silently
		InactiveThreshold: l.Idle,
	})
	if err != nil {
		return err
	}
	it, err := cons.Messages(jetstream.PullMaxMessages(l.Batch))
	if err != nil {
		return err
	}
	in := make(chan *Msg, l.Batch)
	var gone error // owned by the reader until in is closed
	go func() {
		defer close(in)
		for {
			jm, err := it.Next()
			switch {
			case err == nil:
				in <- received(jm) // run empties in before it returns
			case errors.Is(err, jetstream.ErrNoHeartbeat), errors.Is(err, jetstream.ErrConsumerLeadershipChanged):
				l.bus.log.Debug("bus: consumer waits", "stream", l.Stream, "consumer", l.Durable, "err", err)
			default:
				gone = err
				return
			}
		}
	}()
	// Drain, not Stop: what is buffered comes out and is given back at once, instead
	// of waiting for AckWait to pass.
	stop := context.AfterFunc(ctx, it.Drain)
	defer stop()

	// The batch in hand may be finished after ctx has ended.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(l.Drain, cancel) })()

	batch := make([]*Msg, 0, l.Batch)
	for m := range in {
		if ctx.Err() != nil {
			l.giveBack(m)
			continue
		}
		batch = l.fill(append(batch[:0], m), in)
		l.process(ctx, work, batch)
	}
	return gone
}

// fill adds what is there already, or comes within Linger.
func (l *consumeLoop) fill(batch []*Msg, in <-chan *Msg) []*Msg {
	var late <-chan time.Time
	if l.Linger > 0 {
		t := time.NewTimer(l.Linger)
		defer t.Stop()
		late = t.C
	}
	for len(batch) < l.Batch {
		select {
		case m, ok := <-in:
			if !ok {
				return batch
			}
			batch = append(batch, m)
			continue
		default:
		}
		if late == nil {
			return batch
		}
		select {
		case m, ok := <-in:
			if !ok {
				return batch
			}
			batch = append(batch, m)
		case <-late:
			return batch
		}
	}
	return batch
}

func received(jm jetstream.Msg) *Msg {
	m := &Msg{Subject: jm.Subject(), Data: jm.Data(), Header: jm.Headers(), js: jm}
	m.ID = m.Header.Get(nats.MsgIdHdr)
	if md, err := jm.Metadata(); err == nil {
		m.Seq, m.Stored, m.Delivered = md.Sequence.Stream, md.Timestamp, md.NumDelivered
	}
	return m
}

// process handles one batch to its end: every message is acknowledged, given
// back or dead-lettered, unless Manual.
func (l *consumeLoop) process(ctx, work context.Context, batch []*Msg) {
	links := make([]trace.Link, 0, len(batch))
	for _, m := range batch {
		if sc := trace.SpanContextFromContext(Extract(work, m.Header)); sc.IsValid() {
			links = append(links, trace.Link{SpanContext: sc})
		}
	}
	parent := work
	if len(batch) == 1 {
		parent = Extract(work, batch[0].Header)
	}
	parent, span := tracer().Start(parent, "process "+l.Stream, trace.WithSpanKind(trace.SpanKindConsumer), trace.WithLinks(links...),
		trace.WithAttributes(attribute.String("messaging.system", "nats"), attribute.String("messaging.consumer.group.name", l.Durable),
			attribute.Int("messaging.batch.message_count", len(batch))))
	defer span.End()

	err := l.call(ctx, parent, batch)
	if err != nil {
		span.RecordError(err)
	}
	if err != nil && len(batch) > 1 && ctx.Err() == nil {
		// One of them may be to blame: find out which.
		for _, m := range batch {
			if ctx.Err() != nil {
				l.giveBack(m)
				continue
			}
			m.failed = nil
			one := []*Msg{m}
			l.settle(ctx, parent, m, l.call(ctx, parent, one), one)
		}
		return
	}
	for _, m := range batch {
		e := err
		if e == nil {
			e = m.failed
		}
		l.settle(ctx, parent, m, e, []*Msg{m})
	}
}

// call runs the handler, again and again while it says Unavailable: whatever is
// missing is missing for the messages behind as well, and order is kept.
func (l *consumeLoop) call(ctx, work context.Context, batch []*Msg) error {
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := l.once(work, batch)
		if err == nil || kind.Of(err) != kind.Unavailable || ctx.Err() != nil {
			return err
		}
		l.bus.log.Warn("bus: handler cannot go on, trying again", "stream", l.Stream, "consumer", l.Durable,
			"seq", batch[0].Seq, "count", len(batch), "err", err)
		if !l.hold(ctx, batch, wait) {
			return err
		}
	}
}

// once calls the handler with a deadline. While it works, the server is told so.
func (l *consumeLoop) once(work context.Context, batch []*Msg) (err error) {
	for _, m := range batch {
		m.failed = nil
	}
	// A quarter of AckWait is left for settling.
	ctx, cancel := context.WithTimeout(work, l.AckWait*3/4)
	defer cancel()
	if time.Since(batch[0].Stored) > l.AckWait/4 {
		// They may have waited in our buffer for most of their time.
		l.progress(batch)
	}
	defer func() {
		if p := recover(); p != nil {
			err = kind.Errorf(kind.Internal, "handler panicked: %v\n%s", p, debug.Stack())
		}
	}()
	return l.handle(ctx, batch)
}

func (l *consumeLoop) progress(batch []*Msg) {
	for _, m := range batch {
		if err := m.js.InProgress(); err != nil {
			l.bus.log.Debug("bus: cannot prolong", "stream", l.Stream, "seq", m.Seq, "err", err)
		}
	}
}

// hold waits and keeps the batch ours meanwhile.
func (l *consumeLoop) hold(ctx context.Context, batch []*Msg, wait time.Duration) bool {
	l.progress(batch)
	return sleep(ctx, min(wait, l.AckWait/3))
}

// settle does with one message what err asks for. again is what to call the
// handler with for another try.
func (l *consumeLoop) settle(ctx, work context.Context, m *Msg, err error, again []*Msg) {
	for tries := uint64(1); ; tries++ {
		if err == nil {
			err = m.failed
		}
		if err == nil {
			if !l.Manual {
				l.did("acknowledge", m, m.js.Ack())
			}
			return
		}
		switch k := kind.Of(err); {
		case final(k):
			l.bury(ctx, m, k.String(), err)
			return
		case k == kind.Unavailable: // call gave up because ctx has ended
			l.giveBack(m)
			return
		default:
			if ctx.Err() != nil {
				l.giveBack(m)
				return
			}
			n := m.Delivered
			if l.InOrder {
				n = tries // deliveries count restarts too
			}
			if n >= uint64(l.MaxDeliver) {
				l.bury(ctx, m, "max-deliveries", err)
				return
			}
			delay := min(retryFirst<<min(n, 10), retryMost)
			l.bus.log.Warn("bus: handler failed, will try again", "stream", l.Stream, "consumer", l.Durable,
				"subject", m.Subject, "seq", m.Seq, "try", n, "err", err)
			if !l.InOrder {
				l.did("give back", m, m.js.NakWithDelay(delay))
				return
			}
			if !l.hold(ctx, again, delay) {
				l.giveBack(m)
				return
			}
			err = l.call(ctx, work, again)
		}
	}
}

func (l *consumeLoop) giveBack(m *Msg) { l.did("give back", m, m.js.Nak()) }

// did notes a failed answer to the server; the message then comes again.
func (l *consumeLoop) did(what string, m *Msg, err error) {
	if err != nil {
		l.bus.log.Warn("bus: cannot "+what+", the message will come again", "stream", l.Stream, "consumer", l.Durable, "seq", m.Seq, "err", err)
	}
}

// Headers of a dead letter say where it comes from and why.
const (
	HeaderDeadStream  = "Stopline-Dead-Stream"
	HeaderDeadSeq     = "Stopline-Dead-Seq"
	HeaderDeadSubject = "Stopline-Dead-Subject"
	HeaderDeadRule    = "Stopline-Dead-Rule" // a kind, or max-deliveries
	HeaderDeadReason  = "Stopline-Dead-Reason"
)

// bury copies a message to the dead letters and then ends its deliveries. If it
// cannot be copied it stays where it is.
func (l *consumeLoop) bury(ctx context.Context, m *Msg, rule string, cause error) {
	h := nats.Header{}
	for k, v := range m.Header {
		if k != nats.MsgIdHdr {
			h[k] = v
		}
	}
	h.Set(HeaderDeadStream, l.Stream)
	h.Set(HeaderDeadSeq, fmt.Sprint(m.Seq))
	h.Set(HeaderDeadSubject, m.Subject)
	h.Set(HeaderDeadRule, rule)
	h.Set(HeaderDeadReason, headerLine(cause.Error()))
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(publishTry, l.AckWait/4))
	defer cancel()
	id := fmt.Sprintf("%s/%s/%d", l.Stream, l.Durable, m.Seq)
	if _, err := l.bus.PublishMsg(work, Msg{Subject: topic.Dead(l.District, l.Durable), ID: id, Data: m.Data, Header: h}); err != nil {
		l.bus.log.Error("bus: cannot store a dead letter, the message stays", "stream", l.Stream, "consumer", l.Durable,
			"seq", m.Seq, "reason", cause, "err", err)
		l.did("give back", m, m.js.NakWithDelay(retryMost))
		return
	}
	l.bus.log.Error("bus: message put with the dead letters", "stream", l.Stream, "consumer", l.Durable,
		"subject", m.Subject, "seq", m.Seq, "rule", rule, "err", cause)
	l.did("terminate", m, m.js.TermWithReason(rule))
}

// headerLine makes s fit one header line.
func headerLine(s string) string {
	b := []byte(s[:min(len(s), 1024)])
	for i, c := range b {
		if c < ' ' {
			b[i] = ' '
		}
	}
	return string(b)
}

// Replay hands out, in order, what the stream holds now from sequence number
// from on, and returns the last number it has seen; then it is done. It
// acknowledges nothing and leaves no trace on the server. filter is optional.
// An error of f ends it.
func (b *Bus) Replay(ctx context.Context, stream, filter string, from uint64, f func(m *Msg) error) (last uint64, err error) {
	wrap := func(err error) error {
		return kind.Errorf(kindOf(err), "bus: replaying %s: %w", stream, err)
	}
	cfg := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	if from > 0 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, from
	}
	if filter != "" {
		cfg.FilterSubjects = []string{filter}
	}
	cons, err := b.JS.OrderedConsumer(ctx, stream, cfg)
	if err != nil {
		return 0, wrap(err)
	}
	info, err := cons.Info(ctx)
	if err != nil {
		return 0, wrap(err)
	}
	left := info.NumPending + info.Delivered.Consumer
	if left == 0 {
		return 0, nil
	}
	it, err := cons.Messages()
	if err != nil {
		return 0, wrap(err)
	}
	var once sync.Once
	stop := func() { once.Do(it.Stop) }
	defer stop()
	for ; left > 0; left-- {
		jm, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return last, wrap(err)
		}
		m := received(jm)
		if err := f(m); err != nil {
			return last, err
		}
		last = m.Seq
		if md, err := jm.Metadata(); err == nil && md.NumPending == 0 {
			break
		}
	}
	return last, nil
}
