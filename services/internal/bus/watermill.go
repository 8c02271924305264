package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// HeaderUUID carries a Watermill message's UUID. The message id that the stream
// dedupes by is the subject and the UUID: one message may go to several
// subjects of one stream.
const HeaderUUID = "Stopline-Message-Uuid"

// ErrClosed is returned by a Publisher and a Subscriber after Close.
var ErrClosed = errors.New("closed")

// Publisher is a Watermill publisher. A Watermill topic is a NATS subject.
type Publisher struct {
	bus    *Bus
	mu     sync.RWMutex // held for reading while publishing, so that Close waits
	closed bool         // guarded by mu
}

// NewPublisher returns a publisher over b, which it does not close.
func NewPublisher(b *Bus) *Publisher { return &Publisher{bus: b} }

// Publish returns when all messages are durable. Up to [MaxAll] at a time are
// stored as a whole or not at all, see [Bus.PublishAll]. Metadata travels as
// headers, so keys and values must each fit one line.
func (p *Publisher) Publish(subject string, msgs ...*message.Message) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed {
		return kind.Errorf(kind.Unavailable, "bus: publishing to %s: %w", subject, ErrClosed)
	}
	out := make([]Msg, len(msgs))
	for i, m := range msgs {
		h := make(nats.Header, len(m.Metadata)+2)
		for k, v := range m.Metadata {
			if k == "" || strings.ContainsAny(k, ": \r\n") || strings.ContainsAny(v, "\r\n") {
				return kind.Errorf(kind.Invalid, "bus: publishing to %s: metadata %.40q: key and value must each fit one header line", subject, k)
			}
			h[k] = []string{v}
		}
		out[i] = Msg{Subject: subject, Data: m.Payload, Header: h}
		if m.UUID != "" {
			h[HeaderUUID] = []string{m.UUID}
			out[i].ID = subject + "/" + m.UUID
		}
		Inject(m.Context(), h)
	}
	for c := range slices.Chunk(out, MaxAll) {
		if err := p.bus.PublishAll(msgs[0].Context(), c); err != nil {
			return err
		}
	}
	return nil
}

// Close waits for calls of Publish and refuses further ones.
func (p *Publisher) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	return nil
}

// SubscriberConfig configures a [Subscriber].
type SubscriberConfig struct {
	Bus *Bus
	// Group of subscribers share a subject's messages and a durable position in
	// it; a new group begins with the oldest message. Required.
	Group string
	// InFlight bounds the messages handed out and not yet acknowledged; 0 means
	// 64. With 1, order holds through redelivery too, across the whole group.
	InFlight int
	// AckWait is when the server hands out an unacknowledged message again; 0
	// means 30 s.
	AckWait time.Duration
	// Drain is how long Close waits for messages in hand to be acknowledged; 0
	// means 500 ms.
	Drain time.Duration
	// Logger is optional.
	Logger *slog.Logger
}

// Subscriber is a Watermill subscriber: a durable pull consumer for each
// subject. The stream is found by the subject.
type Subscriber struct {
	SubscriberConfig
	closing chan struct{}

	mu     sync.Mutex
	closed bool           // guarded by mu
	wg     sync.WaitGroup // Add under mu, so that none follows Wait
}

// NewSubscriber returns a subscriber over c.Bus, which it does not close.
func NewSubscriber(c SubscriberConfig) (*Subscriber, error) {
	var errs []error
	if c.Bus == nil {
		errs = append(errs, errors.New("bus: Subscriber.Bus: must be given"))
	}
	if c.Group == "" {
		errs = append(errs, errors.New("bus: Subscriber.Group: must not be empty"))
	}
	if c.InFlight < 0 || c.AckWait < 0 || c.Drain < 0 {
		errs = append(errs, errors.New("bus: Subscriber.InFlight, AckWait, Drain: must not be negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if c.InFlight == 0 {
		c.InFlight = 64
	}
	if c.AckWait == 0 {
		c.AckWait = 30 * time.Second
	}
	if c.Drain == 0 {
		c.Drain = 500 * time.Millisecond
	}
	c.Logger = orDiscard(c.Logger)
	return &Subscriber{SubscriberConfig: c, closing: make(chan struct{})}, nil
}

func (s *Subscriber) consumer(ctx context.Context, subject string) (jetstream.Consumer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestWait)
	defer cancel()
	stream, err := s.Bus.JS.StreamNameBySubject(ctx, subject)
	if err != nil {
		return nil, kind.Errorf(kindOf(err), "bus: stream of %s: %w", subject, err)
	}
	pending := 1
	if s.InFlight > 1 {
		pending = max(1000, 4*s.InFlight) // for the whole group
	}
	c, err := s.Bus.JS.CreateOrUpdateConsumer(ctx, stream, jetstream.ConsumerConfig{
		Durable: topic.Token(s.Group) + "-" + topic.Token(subject), FilterSubject: subject,
		DeliverPolicy: jetstream.DeliverAllPolicy, AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: s.AckWait, MaxAckPending: pending, MaxDeliver: -1, // the router's poison queue bounds it
	})
	if err != nil {
		return nil, kind.Errorf(kindOf(err), "bus: consumer %s of %s: %w", s.Group, subject, err)
	}
	return c, nil
}

// SubscribeInitialize makes the group's durable position, from which messages
// are kept for it.
func (s *Subscriber) SubscribeInitialize(subject string) error {
	_, err := s.consumer(context.Background(), subject)
	return err
}

// Subscribe hands out messages until ctx ends or Close is called; the channel
// is closed then. A message's ctx ends when it has been acknowledged or refused;
// a refused one comes again, later each time up to 2 s.
func (s *Subscriber) Subscribe(ctx context.Context, subject string) (<-chan *message.Message, error) {
	fail := func(err error) (<-chan *message.Message, error) {
		return nil, kind.Errorf(kindOf(err), "bus: subscribing to %s: %w", subject, err)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fail(ErrClosed)
	}
	s.wg.Add(1)
	s.mu.Unlock()
	cons, err := s.consumer(ctx, subject)
	if err != nil {
		s.wg.Done()
		return fail(err)
	}
	it, err := cons.Messages(jetstream.PullMaxMessages(s.InFlight))
	if err != nil {
		s.wg.Done()
		return fail(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-ctx.Done():
		case <-s.closing:
		}
		cancel()
		it.Drain() // what is buffered comes out and is given back at once
	}()
	out := make(chan *message.Message)
	go func() {
		defer s.wg.Done()
		defer cancel()
		s.deliver(ctx, subject, it, out)
	}()
	return out, nil
}

func (s *Subscriber) deliver(ctx context.Context, subject string, it jetstream.MessagesContext, out chan<- *message.Message) {
	var hands sync.WaitGroup
	defer hands.Wait()
	defer close(out)
	slots := make(chan struct{}, s.InFlight)
	for {
		jm, err := it.Next()
		switch {
		case errors.Is(err, jetstream.ErrMsgIteratorClosed), errors.Is(err, jetstream.ErrConnectionClosed),
			errors.Is(err, jetstream.ErrConsumerDeleted):
			if ctx.Err() == nil {
				s.Logger.Error("bus: subscription ended", "subject", subject, "consumer", s.Group, "err", err)
			}
			return
		case err != nil: // the iterator goes on
			s.Logger.Debug("bus: subscription waits", "subject", subject, "consumer", s.Group, "err", err)
			continue
		}
		m := toWatermill(jm)
		mctx, cancel := context.WithCancel(Extract(ctx, jm.Headers()))
		m.SetContext(mctx)
		giveBack := func() {
			cancel()
			s.did(subject, "give back", jm.Nak())
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			giveBack()
			continue
		}
		if ctx.Err() != nil { // select picks at random where both are ready
			giveBack()
			continue
		}
		select {
		case out <- m:
		case <-ctx.Done():
			giveBack()
			continue
		}
		hands.Go(func() {
			defer func() { <-slots }()
			defer cancel()
			s.await(ctx, subject, m, jm)
		})
	}
}

// await answers the server for one message in hand.
func (s *Subscriber) await(ctx context.Context, subject string, m *message.Message, jm jetstream.Msg) {
	settled := func() bool {
		select {
		case <-m.Acked():
			s.did(subject, "acknowledge", jm.Ack())
		case <-m.Nacked():
			n := uint64(1)
			if md, err := jm.Metadata(); err == nil {
				n = md.NumDelivered
			}
			s.did(subject, "give back", jm.NakWithDelay(min(retryFirst<<min(n-1, 10), retryMost)))
		default:
			return false
		}
		return true
	}
	select {
	case <-m.Acked():
	case <-m.Nacked():
	case <-ctx.Done():
		// The message's ctx has ended with ctx, so a handler should end now.
		t := time.NewTimer(s.Drain)
		defer t.Stop()
		select {
		case <-m.Acked():
		case <-m.Nacked():
		case <-t.C:
		}
	}
	if !settled() {
		s.did(subject, "give back", jm.Nak())
	}
}

func (s *Subscriber) did(subject, what string, err error) {
	if err != nil {
		s.Logger.Warn("bus: cannot "+what+", the message will come again", "subject", subject, "consumer", s.Group, "err", err)
	}
}

// Close ends all subscriptions: it gives back what was not handed out yet, and
// waits up to Drain for the rest.
func (s *Subscriber) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// toWatermill makes a Watermill message. One that was not published by
// Watermill is named by its message id, or else by its place in the stream.
func toWatermill(jm jetstream.Msg) *message.Message {
	h := jm.Headers()
	id := h.Get(HeaderUUID)
	if id == "" {
		id = h.Get(nats.MsgIdHdr)
	}
	if id == "" {
		if md, err := jm.Metadata(); err == nil {
			id = fmt.Sprintf("%s/%d", md.Stream, md.Sequence.Stream)
		}
	}
	m := message.NewMessage(id, jm.Data())
	for k, v := range h {
		if k == HeaderUUID || strings.HasPrefix(k, "Nats-") || len(v) == 0 {
			continue // NATS's own would be refused, or mean something, if sent on
		}
		m.Metadata[k] = v[0]
	}
	return m
}
