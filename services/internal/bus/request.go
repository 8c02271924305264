package bus

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// requestWait bounds a request where ctx has no deadline.
const requestWait = 5 * time.Second

// Request sends data and returns the one answer. Errors have kind Unavailable,
// except that a message over the server's bound is Invalid.
func (b *Bus) Request(ctx context.Context, subject string, data []byte) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, requestWait)
		defer cancel()
	}
	m, err := b.NC.RequestMsgWithContext(ctx, &nats.Msg{Subject: subject, Data: data, Header: Inject(ctx, nil)})
	if err != nil {
		return nil, kind.Errorf(kindOf(err), "bus: request to %s: %w", subject, err)
	}
	return m.Data, nil
}

// Send publishes a core message: at most once, stored nowhere, and refused while
// the connection is away.
func (b *Bus) Send(subject string, data []byte) error {
	if err := b.NC.Publish(subject, data); err != nil {
		return kind.Errorf(kindOf(err), "bus: sending to %s: %w", subject, err)
	}
	return nil
}

// Pending bounds of a subscription. What comes beyond them is lost and reported
// in the log by the connection's error handler: handlers must be quick.
const (
	pendingMsgs  = 64 << 10
	pendingBytes = 256 << 20
)

// Listen calls f for each core message on subject, one after another, from when
// it returns until stop is called. Members of one queue group share the
// messages; queue may be empty. stop lets what has arrived be handled first and
// returns when f has returned for the last time.
func (b *Bus) Listen(subject, queue string, f func(m *nats.Msg)) (stop func(), err error) {
	fail := func(err error) (func(), error) {
		return nil, kind.Errorf(kindOf(err), "bus: listening on %s: %w", subject, err)
	}
	done := make(chan struct{})
	sub, err := b.NC.QueueSubscribe(subject, queue, f)
	if err != nil {
		return fail(err)
	}
	sub.SetClosedHandler(func(string) { close(done) })
	if err := sub.SetPendingLimits(pendingMsgs, pendingBytes); err != nil {
		return fail(err)
	}
	// Without this the server might not know of us yet when the caller's first
	// request arrives by another connection.
	if err := b.NC.FlushTimeout(requestWait); err != nil {
		_ = sub.Unsubscribe() // the flush says more
		return fail(fmt.Errorf("flush: %w", err))
	}
	return func() {
		if err := sub.Drain(); err != nil {
			return // the connection is closed, and with it the subscription
		}
		<-done
	}, nil
}

// Serve answers requests on subject until ctx ends, one after another. handle
// returns the answer; nil means none. Members of a queue group share requests.
func (b *Bus) Serve(ctx context.Context, subject, queue string, handle func(ctx context.Context, m *Msg) []byte) error {
	return b.subscribe(ctx, subject, queue, func(m *nats.Msg) {
		// Requests that have arrived are answered also after ctx has ended.
		rctx := Extract(context.WithoutCancel(ctx), m.Header)
		answer := handle(rctx, &Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, Reply: m.Reply})
		if answer == nil || m.Reply == "" {
			return
		}
		if err := m.RespondMsg(&nats.Msg{Data: answer, Header: Inject(rctx, nil)}); err != nil {
			b.log.Warn("bus: cannot answer", "subject", m.Subject, "err", err)
		}
	})
}

// Subscribe calls handle for each core message on subject until ctx ends, one
// after another.
func (b *Bus) Subscribe(ctx context.Context, subject string, handle func(subject string, data []byte)) error {
	return b.subscribe(ctx, subject, "", func(m *nats.Msg) { handle(m.Subject, m.Data) })
}

func (b *Bus) subscribe(ctx context.Context, subject, queue string, f func(m *nats.Msg)) error {
	var stop func()
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		var err error
		if stop, err = b.Listen(subject, queue, f); err == nil {
			break
		}
		if kind.Of(err) != kind.Unavailable || b.NC.IsClosed() {
			return err
		}
		b.log.Warn("bus: cannot subscribe yet", "subject", subject, "err", err)
		if !sleep(ctx, wait) {
			return nil
		}
	}
	select {
	case <-ctx.Done():
		stop()
		return nil
	case <-b.closed:
		return kind.Errorf(kind.Unavailable, "bus: listening on %s: connection closed", subject)
	}
}
