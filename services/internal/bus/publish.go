package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// Msg is one message, to publish or as it was received.
type Msg struct {
	Subject string
	// ID names the message within its stream; a stream stores an id once. Optional.
	ID   string
	Data []byte
	// Header is optional. It must not be changed once the message is published.
	Header nats.Header
	// Reply is, of a request that came in, where its answer goes.
	Reply string

	// Set on messages from a stream.

	// Seq is the message's number in its stream.
	Seq uint64
	// Stored is when the server stored it.
	Stored time.Time
	// Delivered counts how often this message has been handed out, from 1.
	Delivered uint64

	js     jetstream.Msg
	failed error
}

func (m Msg) nats(ctx context.Context) *nats.Msg {
	var h nats.Header
	if m.ID != "" || len(m.Header) > 0 {
		h = make(nats.Header, len(m.Header)+2)
		for k, v := range m.Header {
			h[k] = v
		}
		if m.ID != "" {
			h[nats.MsgIdHdr] = []string{m.ID}
		}
	}
	return &nats.Msg{Subject: m.Subject, Header: Inject(ctx, h), Data: m.Data}
}

const (
	// publishTry bounds the wait for one acknowledgement.
	publishTry = 5 * time.Second
	// publishWait bounds all tries together where ctx has no deadline.
	publishWait = 15 * time.Second
)

// Publish stores one message and returns when it is durable; a duplicate of a
// stored id is success. While no server answers it tries again until ctx ends,
// or for 15 s where ctx has no deadline.
//
// Errors have kind Unavailable, and wrap [ErrFull] or [ErrUnknown], or Invalid
// where the message is too large. Without an id a message is not sent a second
// time after a lost acknowledgement.
func (b *Bus) Publish(ctx context.Context, subject, msgID string, data []byte) error {
	_, err := b.PublishMsg(ctx, Msg{Subject: subject, ID: msgID, Data: data})
	return err
}

// PublishMsg is [Bus.Publish] for a message with headers. It returns the
// message's number in its stream.
func (b *Bus) PublishMsg(ctx context.Context, m Msg) (seq uint64, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, publishWait)
		defer cancel()
	}
	ctx, span := tracer().Start(ctx, "publish", trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(attribute.String("messaging.system", "nats"), attribute.String("messaging.destination.name", m.Subject)))
	defer span.End()
	nm := m.nats(ctx)
	unknown := false // after one try that may have stored it
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		try, cancel := context.WithTimeout(ctx, publishTry)
		ack, err := b.JS.PublishMsg(try, nm, jetstream.WithRetryAttempts(0))
		cancel()
		if err == nil {
			return ack.Sequence, nil
		}
		api := apiCode(err) != 0 // the stream itself answered, knowing every try before
		err = publishError(m.Subject, err)
		unknown = (unknown || errors.Is(err, ErrUnknown)) && !api
		if unknown && !errors.Is(err, ErrUnknown) {
			err = kind.Errorf(kind.Of(err), "%w: %w", ErrUnknown, err)
		}
		// A full stream empties by age, not within a retry: tell the caller.
		again := kind.Of(err) == kind.Unavailable && !errors.Is(err, ErrFull) &&
			(m.ID != "" || !errors.Is(err, ErrUnknown)) && !b.NC.IsClosed()
		if !again || !sleep(ctx, wait) {
			span.RecordError(err)
			return 0, err
		}
	}
}

// publishError says what a failed publish means.
func publishError(subject string, err error) error {
	k := kindOf(err)
	switch {
	case apiCode(err) == codeStoreFailed:
		return kind.Errorf(k, "bus: publishing to %s: %w: %w", subject, ErrFull, err)
	case apiCode(err) != 0 || errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrConnectionClosed) || k == kind.Invalid:
		return kind.Errorf(k, "bus: publishing to %s: %w", subject, err) // nothing was stored
	}
	return kind.Errorf(k, "bus: publishing to %s: %w: %w", subject, ErrUnknown, err)
}

// MaxAll is how many messages [Bus.PublishAll] takes: the server's bound on an
// atomic batch.
const MaxAll = 1000

// PublishAll stores all messages, which must belong to one stream, or none, and
// returns when they are durable. One sync pays for all of them.
//
// It uses JetStream's atomic batch (ADR-50 of nats-architecture-and-design).
// Where the server refuses that, because it cannot or because some ids are
// stored already, the messages are published one by one in order, which an
// error may leave half done; each then needs an id, so that the caller's retry
// completes it.
func (b *Bus) PublishAll(ctx context.Context, msgs []Msg) error {
	switch {
	case len(msgs) == 0:
		return nil
	case len(msgs) == 1:
		_, err := b.PublishMsg(ctx, msgs[0])
		return err
	case len(msgs) > MaxAll:
		return kind.Errorf(kind.Invalid, "bus: %d messages at once, at most %d are taken", len(msgs), MaxAll)
	}
	err := b.publishBatch(ctx, msgs)
	if err == nil {
		return nil
	}
	ids := true
	for i := range msgs {
		ids = ids && msgs[i].ID != ""
	}
	switch c := apiCode(err); {
	case c == codeBatchDisabled || c == codeBatchTooMany: // nothing was stored
	case c == codeBatchDuplicate && ids:
	case errors.Is(err, ErrUnknown) && ids:
	default:
		return err
	}
	for i := range msgs {
		if _, err := b.PublishMsg(ctx, msgs[i]); err != nil {
			return fmt.Errorf("bus: message %d of %d: %w", i+1, len(msgs), err)
		}
	}
	return nil
}

// Headers of an atomic batch, ADR-50.
const (
	hdrBatchID     = "Nats-Batch-Id"
	hdrBatchSeq    = "Nats-Batch-Sequence"
	hdrBatchCommit = "Nats-Batch-Commit"
)

// publishBatch sends an atomic batch. The server answers the first message, so
// that we know that it takes batches, and the last, with the acknowledgement.
func (b *Bus) publishBatch(ctx context.Context, msgs []Msg) error {
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	ctx, span := tracer().Start(ctx, "publish batch", trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(attribute.String("messaging.system", "nats"), attribute.Int("messaging.batch.message_count", len(msgs))))
	defer span.End()
	id := nuid.Next()
	for i := range msgs {
		nm := msgs[i].nats(ctx)
		if nm.Header == nil {
			nm.Header = nats.Header{}
		}
		nm.Header[hdrBatchID] = []string{id}
		nm.Header[hdrBatchSeq] = []string{strconv.Itoa(i + 1)}
		if i > 0 && i < len(msgs)-1 {
			if err := b.NC.PublishMsg(nm); err != nil {
				return publishError(nm.Subject, err) // never committed
			}
			continue
		}
		last := i > 0
		if last {
			nm.Header[hdrBatchCommit] = []string{"1"}
		}
		try, cancel := context.WithTimeout(ctx, publishTry)
		resp, err := b.NC.RequestMsgWithContext(try, nm)
		cancel()
		if err != nil {
			if errors.Is(err, nats.ErrNoResponders) {
				err = jetstream.ErrNoStreamResponse
			}
			err = publishError(nm.Subject, err)
			span.RecordError(err)
			return err
		}
		if !last && len(resp.Data) == 0 {
			continue
		}
		var ack struct {
			Error *jetstream.APIError `json:"error"`
			Batch string              `json:"batch"`
			Count int                 `json:"count"`
		}
		if err := json.Unmarshal(resp.Data, &ack); err != nil {
			return kind.Errorf(kind.Internal, "bus: publishing to %s: %w: answer to a batch: %w", nm.Subject, ErrUnknown, err)
		}
		if ack.Error != nil {
			err := publishError(nm.Subject, ack.Error)
			span.RecordError(err)
			return err
		}
		if !last || ack.Batch != id || ack.Count != len(msgs) {
			// A server that does not know batches stored the message as it stands.
			return kind.Errorf(kind.Internal, "bus: publishing to %s: the server took a batch of %d for something else", nm.Subject, len(msgs))
		}
	}
	return nil
}
