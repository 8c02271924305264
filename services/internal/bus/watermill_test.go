package bus_test

import (
	"context"
	"errors"
	"io"
	"log"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// TestWatermillSuite runs Watermill's own suite. Each subscription of the first
// run has many messages in flight, and so no order under redelivery; of the
// second run one, and order.
//
// It runs alone: its timeouts are by the wall clock.
func TestWatermillSuite(t *testing.T) {
	log.SetOutput(io.Discard) // the suite says a line for each read
	t.Cleanup(func() { log.SetOutput(log.Default().Writer()) })
	b := servicetest.Connect(t, servicetest.NATS(t))
	if err := b.Declare(within(t), []topic.Stream{{Name: "WM", Subjects: []string{"wm.>"}, MaxMsgSize: 1 << 20, MaxBytes: 1 << 30, Duplicates: time.Minute}}); err != nil {
		t.Fatal(err)
	}
	subjects := func(tctx tests.TestContext) string { return "wm." + string(tctx.TestID) }
	pubsub := func(inFlight int) tests.ConsumerGroupPubSubConstructor {
		return func(t *testing.T, group string) (message.Publisher, message.Subscriber) {
			s, err := bus.NewSubscriber(bus.SubscriberConfig{Bus: b, Group: group, InFlight: inFlight})
			if err != nil {
				t.Fatal(err)
			}
			return bus.NewPublisher(b), s
		}
	}
	t.Run("in flight=64", func(t *testing.T) {
		tests.TestPubSub(t, tests.Features{
			ConsumerGroups: true, Persistent: true, GenerateTopicFunc: subjects, ForceShort: testing.Short() || raceEnabled,
		}, func(t *testing.T) (message.Publisher, message.Subscriber) { return pubsub(64)(t, "shared") }, pubsub(64))
	})
	t.Run("in flight=1", func(t *testing.T) {
		if testing.Short() || raceEnabled {
			t.Skip("one after another takes seconds, and the suite's own timeouts are by the wall clock")
		}
		var n atomic.Int64
		tests.TestPubSub(t, tests.Features{
			ConsumerGroups: true, Persistent: true, GuaranteedOrder: true, GenerateTopicFunc: subjects, ForceShort: true,
		}, func(t *testing.T) (message.Publisher, message.Subscriber) { return pubsub(1)(t, "single") }, pubsub(1))
		// A group of its own for each subscriber: every one reads from the oldest.
		t.Run("NewGroupReceivesOldMessages", func(t *testing.T) {
			tests.TestNewSubscriberReceivesOldMessages(t, tests.TestContext{
				TestID: tests.NewTestID(), Features: tests.Features{Persistent: true, NewSubscriberReceivesOldMessages: true, GenerateTopicFunc: subjects},
			}, func(t *testing.T) (message.Publisher, message.Subscriber) {
				return pubsub(1)(t, "own-"+string(rune('a'+n.Add(1))))
			})
		})
	})
}

// routed runs a router with one handler on the accepted batches and returns
// when it runs.
func routed(t *testing.T, b *bus.Bus, h message.HandlerFunc) {
	t.Helper()
	r, err := bus.NewRouter(bus.RouterConfig{Bus: b, District: district, Consumer: "router", Retries: 2, Wait: time.Millisecond, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := bus.NewSubscriber(bus.SubscriberConfig{Bus: b, Group: "router", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	r.AddHandler("handler", topic.Accepted(district), s, topic.Seal(district), bus.NewPublisher(b), h)
	done := make(chan error, 1)
	go func() { done <- r.Run(t.Context()) }()
	<-r.Running()
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), <-done); err != nil {
			t.Errorf("router: %v", err)
		}
	})
}

// seals waits until the router's handler has published want, in any order.
func seals(t *testing.T, b *bus.Bus, want ...string) {
	t.Helper()
	got := map[string]bool{}
	stop := make(chan struct{})
	n := 0
	consuming(t, b, bus.Consumer{District: district, Stream: topic.SealStream, Durable: "seals"}, func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			got[string(m.Data)] = true
			if n++; n == len(want) {
				close(stop)
			}
		}
		return nil
	})
	select {
	case <-stop:
	case <-within(t).Done():
		t.Fatalf("router published %d messages, want %q", n, want)
	}
	for _, w := range want {
		if !got[w] {
			t.Errorf("router published %v, want %q among it", got, w)
		}
	}
}

func copyOf(m *message.Message) []*message.Message {
	return []*message.Message{message.NewMessage(watermill.NewUUID(), m.Payload)}
}

func TestRouterRetries(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	var tries atomic.Int64
	publish(t, b, 3)
	routed(t, b, func(m *message.Message) ([]*message.Message, error) {
		if string(m.Payload) == "1" && tries.Add(1) < 3 {
			return nil, errors.New("not yet")
		}
		return copyOf(m), nil
	})
	seals(t, b, "0", "1", "2")
	if n := tries.Load(); n != 3 {
		t.Errorf("got %d tries, want 3", n)
	}
	if d := dead(t, b); len(d) != 0 {
		t.Errorf("got %d dead letters, want none", len(d))
	}
}

func TestRouterRecoversAndPoisons(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		fail   func() error
		tries  int64
		reason string
	}{
		{"panic", func() error { panic("wrong turn") }, 3, "wrong turn"},
		{"error", func() error { return errors.New("no use") }, 3, "no use"},
		{"invalid is not retried", func() error { return kind.Errorf(kind.Invalid, "stage: must be known") }, 1, "stage: must be known"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := servicetest.District(t, district)
			var tries atomic.Int64
			publish(t, b, 3)
			routed(t, b, func(m *message.Message) ([]*message.Message, error) {
				if string(m.Payload) == "1" {
					tries.Add(1)
					return nil, c.fail()
				}
				return copyOf(m), nil
			})
			seals(t, b, "0", "2")
			letter := firstDead(t, b)
			if n := tries.Load(); n != c.tries {
				t.Errorf("got %d tries, want %d", n, c.tries)
			}
			if string(letter.Data) != "1" || letter.Subject != topic.Dead(district, "router") {
				t.Errorf("got dead letter %q on %s, want 1 on %s", letter.Data, letter.Subject, topic.Dead(district, "router"))
			}
			if r := letter.Header.Get(bus.HeaderDeadReason); !strings.Contains(r, c.reason) {
				t.Errorf("got reason %q, want %q in it", r, c.reason)
			}
			if s := letter.Header.Get(bus.HeaderDeadSubject); s != topic.Accepted(district) {
				t.Errorf("got subject %q, want %q", s, topic.Accepted(district))
			}
		})
	}
}

// firstDead waits for the first dead letter.
func firstDead(t *testing.T, b *bus.Bus) *bus.Msg {
	t.Helper()
	letters := make(chan *bus.Msg, 16)
	consuming(t, b, bus.Consumer{District: district, Stream: topic.DeadStream, Durable: "reader"}, func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			letters <- m
		}
		return nil
	})
	select {
	case m := <-letters:
		return m
	case <-within(t).Done():
		t.Fatal("no dead letter")
		return nil
	}
}

func TestRouterKeepsWhatIsUnavailable(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	var tries atomic.Int64
	publish(t, b, 1)
	routed(t, b, func(m *message.Message) ([]*message.Message, error) {
		if tries.Add(1) < 6 { // more than one delivery's tries
			return nil, kind.Errorf(kind.Unavailable, "later")
		}
		return copyOf(m), nil
	})
	seals(t, b, "0")
	if d := dead(t, b); len(d) != 0 {
		t.Errorf("got %d dead letters, want none", len(d))
	}
}

func TestRouterCorrelates(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	routed(t, b, func(m *message.Message) ([]*message.Message, error) { return copyOf(m), nil })
	m := message.NewMessage(watermill.NewUUID(), []byte("x"))
	middleware.SetCorrelationID("corr-1", m)
	if err := bus.NewPublisher(b).Publish(topic.Accepted(district), m); err != nil {
		t.Fatal(err)
	}
	seals(t, b, "x")
	if _, err := b.Replay(within(t), topic.SealStream, "", 0, func(m *bus.Msg) error {
		if got := m.Header.Get(middleware.CorrelationIDMetadataKey); got != "corr-1" {
			t.Errorf("got correlation id %q, want corr-1", got)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestPublisherRefuses(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	p := bus.NewPublisher(b)
	m := message.NewMessage("id", nil)
	m.Metadata.Set("reason", "two\nlines")
	if err := p.Publish(topic.Seal(district), m); kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), `metadata "reason": key and value must each fit one header line`) {
		t.Errorf("got %v, want metadata refused", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(topic.Seal(district), message.NewMessage("id", nil)); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	s, err := bus.NewSubscriber(bus.SubscriberConfig{Bus: b, Group: "g"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Subscribe(t.Context(), topic.Seal(district)); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}
