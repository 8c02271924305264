package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

const district = "d1"

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// consuming runs Consume until the test ends or stop is called.
func consuming(t *testing.T, b *bus.Bus, c bus.Consumer, handle func(context.Context, []*bus.Msg) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Consume(ctx, c, handle) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Consume: got %v, want nil", err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func publish(t *testing.T, b *bus.Bus, n int) {
	t.Helper()
	for i := range n {
		if err := b.Publish(within(t), topic.Accepted(district), fmt.Sprint("m", i), fmt.Appendf(nil, "%d", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// dead returns the dead letters of a consumer.
func dead(t *testing.T, b *bus.Bus) []*bus.Msg {
	t.Helper()
	var out []*bus.Msg
	if _, err := b.Replay(within(t), topic.DeadStream, "", 0, func(m *bus.Msg) error {
		out = append(out, m)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPublishOnce(t *testing.T) {
	b := servicetest.District(t, district)
	for range 2 {
		if err := b.Publish(within(t), topic.Ingress(district), "same", []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	last, err := b.Replay(within(t), topic.IngressStream, "", 0, func(m *bus.Msg) error {
		n++
		if m.ID != "same" || string(m.Data) != "x" || m.Seq != 1 {
			t.Errorf("got id %q, data %q, seq %d, want same, x, 1", m.ID, m.Data, m.Seq)
		}
		return nil
	})
	if err != nil || n != 1 || last != 1 {
		t.Errorf("got %d messages, last %d, error %v, want 1, 1, nil", n, last, err)
	}
}

func TestConsumeAll(t *testing.T) {
	b := servicetest.District(t, district)
	publish(t, b, 100)
	got := make(chan string, 200)
	stop := consuming(t, b, bus.Consumer{District: district, Stream: topic.AcceptedStream, Durable: "c", Batch: 16}, func(_ context.Context, ms []*bus.Msg) error {
		if len(ms) > 16 {
			t.Errorf("got a batch of %d, want at most 16", len(ms))
		}
		for _, m := range ms {
			got <- string(m.Data)
		}
		return nil
	})
	for i := range 100 {
		if d := <-got; d != fmt.Sprint(i) {
			t.Fatalf("got %q, want %d", d, i)
		}
	}
	stop()
	c, err := b.JS.Consumer(within(t), topic.AcceptedStream, "c")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := c.Info(within(t)); err != nil || info.NumPending != 0 || info.NumAckPending != 0 {
		t.Errorf("got %+v, %v, want nothing pending", info, err)
	}
}

var (
	_ = bytes.Equal
	_ = errors.Is
	_ = slices.Sort[[]int]
	_ = strings.Contains
	_ nats.Header
	_ jetstream.Msg
	_ kind.Kind
)
