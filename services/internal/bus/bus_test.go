package bus_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

const district = "d1"

func within(t testing.TB) context.Context {
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

// stored returns what a stream holds.
func stored(t *testing.T, b *bus.Bus, stream string) []*bus.Msg {
	t.Helper()
	var out []*bus.Msg
	if _, err := b.Replay(within(t), stream, "", 0, func(m *bus.Msg) error {
		out = append(out, m)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func dead(t *testing.T, b *bus.Bus) []*bus.Msg { return stored(t, b, topic.DeadStream) }

// checkPending fails unless the consumer comes to have nothing left.
func checkPending(t *testing.T, b *bus.Bus, durable string) {
	t.Helper()
	ctx := within(t)
	c, err := b.JS.Consumer(ctx, topic.AcceptedStream, durable)
	if err != nil {
		t.Fatal(err)
	}
	for {
		info, err := c.Info(ctx)
		if err != nil {
			t.Fatalf("consumer %s still has messages: %v", durable, err)
		}
		if info.NumPending == 0 && info.NumAckPending == 0 {
			return
		}
	}
}

// got waits for n values.
func got[T any](t *testing.T, c <-chan T, n int) []T {
	t.Helper()
	ctx := within(t)
	out := make([]T, 0, n)
	for len(out) < n {
		select {
		case v := <-c:
			out = append(out, v)
		case <-ctx.Done():
			t.Fatalf("got %d values %v, want %d", len(out), out, n)
		}
	}
	return out
}

func TestPublishOnce(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	for range 2 {
		if err := b.Publish(within(t), topic.Ingress(district), "same", []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	ms := stored(t, b, topic.IngressStream)
	if len(ms) != 1 || ms[0].ID != "same" || string(ms[0].Data) != "x" || ms[0].Seq != 1 {
		t.Errorf("got %+v, want one message, id same, data x, seq 1", ms)
	}
}

func TestPublishFails(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	s := topic.Streams(district)[0]
	s.MaxBytes, s.MaxMsgSize = 4096, 1024
	if err := b.Declare(within(t), []topic.Stream{s}); err != nil {
		t.Fatal(err)
	}
	if err := b.Publish(within(t), topic.Ingress(district), "large", make([]byte, 2000)); kind.Of(err) != kind.Invalid {
		t.Errorf("too large: got %v (%v), want invalid", err, kind.Of(err))
	}
	var err error
	for i := 0; err == nil && i < 100; i++ {
		err = b.Publish(within(t), topic.Ingress(district), fmt.Sprint(i), make([]byte, 900))
	}
	if !errors.Is(err, bus.ErrFull) || kind.Of(err) != kind.Unavailable || errors.Is(err, bus.ErrUnknown) {
		t.Errorf("full: got %v, want ErrFull, unavailable", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Millisecond)
	defer cancel()
	if err := b.Publish(ctx, topic.Accepted(district), "nobody", nil); kind.Of(err) != kind.Unavailable || !strings.Contains(err.Error(), "no response from stream") {
		t.Errorf("no stream: got %v, want unavailable", err)
	}
}

// A stream that appears while we try takes the message.
func TestPublishWaitsForTheStream(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	done := make(chan error)
	go func() { done <- b.Publish(within(t), topic.Ingress(district), "x", nil) }()
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func batch(n int, id string) []bus.Msg {
	ms := make([]bus.Msg, n)
	for i := range ms {
		ms[i] = bus.Msg{Subject: topic.Quarantine(district, fmt.Sprint("r", i%3)), ID: fmt.Sprint(id, i), Data: fmt.Append(nil, i), Header: nats.Header{"K": {"v"}}}
	}
	return ms
}

func TestPublishAll(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	for _, n := range []int{0, 1, 2, 3, bus.MaxAll} {
		t.Run(fmt.Sprint("n=", n), func(t *testing.T) {
			before := len(stored(t, b, topic.QuarantineStream))
			ms := batch(n, fmt.Sprint(n, "-"))
			for range 2 { // a retry changes nothing
				if err := b.PublishAll(within(t), ms); err != nil {
					t.Fatal(err)
				}
			}
			got := stored(t, b, topic.QuarantineStream)[before:]
			if len(got) != n {
				t.Fatalf("got %d messages, want %d", len(got), n)
			}
			for i, m := range got {
				if m.ID != ms[i].ID || m.Subject != ms[i].Subject || m.Header.Get("K") != "v" {
					t.Errorf("got %s on %s, want %s on %s", m.ID, m.Subject, ms[i].ID, ms[i].Subject)
				}
			}
		})
	}
	if err := b.PublishAll(within(t), batch(bus.MaxAll+1, "x")); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v, want invalid", err)
	}
}

func TestPublishAllOrNone(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	ms := batch(10, "a")
	ms[7].ID = "" // so that it cannot be done one by one
	ms[8].ID = ms[2].ID
	if err := b.PublishAll(within(t), ms); err == nil {
		t.Error("got nil, want the same id twice refused")
	}
	if n := len(stored(t, b, topic.QuarantineStream)); n != 0 {
		t.Errorf("got %d messages, want none", n)
	}
}

func TestPublishAllWithoutAtomicBatches(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s, err := b.JS.Stream(within(t), topic.QuarantineStream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.AllowAtomicPublish = false
	if _, err := b.JS.UpdateStream(within(t), cfg); err != nil {
		t.Fatal(err)
	}
	if err := b.PublishAll(within(t), batch(5, "a")); err != nil {
		t.Fatal(err)
	}
	if n := len(stored(t, b, topic.QuarantineStream)); n != 5 {
		t.Errorf("got %d messages, want 5", n)
	}
}

func consumer() bus.Consumer {
	return bus.Consumer{District: district, Stream: topic.AcceptedStream, Durable: "c", Batch: 16, MaxDeliver: 3}
}

func TestConsumeAll(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	publish(t, b, 100)
	c := make(chan string, 200)
	consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		if len(ms) > 16 {
			t.Errorf("got a batch of %d, want at most 16", len(ms))
		}
		for _, m := range ms {
			c <- string(m.Data)
		}
		return nil
	})
	for i, d := range got(t, c, 100) {
		if d != fmt.Sprint(i) {
			t.Fatalf("got %q, want %d", d, i)
		}
	}
	checkPending(t, b, "c")
	// A message does not wait for others.
	publish := time.Now()
	if err := b.Publish(within(t), topic.Accepted(district), "late", []byte("late")); err != nil {
		t.Fatal(err)
	}
	if d := got(t, c, 1); d[0] != "late" {
		t.Errorf("got %q, want late", d)
	}
	t.Logf("a single message took %v", time.Since(publish))
}

func TestConsumeLingers(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	c := make(chan int, 100)
	cons := consumer()
	cons.Linger = 10 * time.Second // ended by the full batch
	consuming(t, b, cons, func(_ context.Context, ms []*bus.Msg) error {
		c <- len(ms)
		return nil
	})
	publish(t, b, 32)
	if n := got(t, c, 2); n[0] != 16 || n[1] != 16 {
		t.Errorf("got batches of %v, want full ones", n)
	}
}

// TestConsumeErrors gives the handler a message in the middle that fails, and
// wants all others handled.
func TestConsumeErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		fail  func() error
		order bool
		alone int // times that the bad one is handed out on its own
		rule  string
	}{
		{"invalid", func() error { return kind.Errorf(kind.Invalid, "stage: unknown") }, false, 1, "invalid"},
		{"conflict", func() error { return kind.Errorf(kind.Conflict, "stage: unknown") }, false, 1, "conflict"},
		{"not found", func() error { return kind.Errorf(kind.NotFound, "stage: unknown") }, true, 1, "not-found"},
		{"denied", func() error { return kind.Errorf(kind.Denied, "stage: unknown") }, false, 1, "denied"},
		{"internal", func() error { return errors.New("stage: unknown\nor not") }, false, 3, "max-deliveries"},
		{"internal in order", func() error { return errors.New("stage: unknown") }, true, 3, "max-deliveries"},
		{"stale", func() error { return kind.Errorf(kind.Stale, "stage: unknown") }, true, 3, "max-deliveries"},
		{"panic", func() error { panic("stage: unknown") }, false, 3, "max-deliveries"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := servicetest.District(t, district)
			publish(t, b, 10)
			good := make(chan string, 100)
			alone := 0
			cons := consumer()
			cons.InOrder = c.order
			cons.Linger = 5 * time.Millisecond
			stop := consuming(t, b, cons, func(_ context.Context, ms []*bus.Msg) error {
				for _, m := range ms {
					if string(m.Data) == "4" {
						if len(ms) == 1 {
							alone++
						}
						return c.fail()
					}
				}
				for _, m := range ms {
					good <- string(m.Data)
				}
				return nil
			})
			seen := map[string]bool{}
			for _, d := range got(t, good, 9) {
				seen[d] = true
			}
			if len(seen) != 9 || seen["4"] {
				t.Errorf("got %v handled, want all but 4", seen)
			}
			letter := firstDead(t, b)
			checkPending(t, b, "c")
			stop()
			if alone != c.alone {
				t.Errorf("got %d tries, want %d", alone, c.alone)
			}
			h := letter.Header
			if string(letter.Data) != "4" || letter.Subject != topic.Dead(district, "c") || h.Get(bus.HeaderDeadRule) != c.rule ||
				!strings.Contains(h.Get(bus.HeaderDeadReason), "stage: unknown") || h.Get(bus.HeaderDeadSubject) != topic.Accepted(district) ||
				h.Get(bus.HeaderDeadStream) != topic.AcceptedStream || h.Get(bus.HeaderDeadSeq) != "5" {
				t.Errorf("got dead letter %q on %s with %v, want 4 by rule %s", letter.Data, letter.Subject, h, c.rule)
			}
			if n := len(dead(t, b)); n != 1 {
				t.Errorf("got %d dead letters, want 1", n)
			}
		})
	}
}

func TestConsumeFailsOne(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	publish(t, b, 5)
	c := make(chan string, 10)
	consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			if string(m.Data) == "2" {
				m.Fail(kind.Errorf(kind.Invalid, "no"))
			}
			c <- string(m.Data)
		}
		return nil
	})
	got(t, c, 5)
	if d := firstDead(t, b); string(d.Data) != "2" {
		t.Errorf("got %q dead, want 2", d.Data)
	}
	checkPending(t, b, "c")
	if len(c) != 0 {
		t.Errorf("got messages again, want each once")
	}
}

// What is unavailable stays in place: order holds and nothing dies.
func TestConsumeWaitsWhileUnavailable(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	publish(t, b, 5)
	c := make(chan string, 10)
	tries := 0
	consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		if tries++; tries < 5 { // more than MaxDeliver
			return kind.Errorf(kind.Unavailable, "downstream is away")
		}
		for _, m := range ms {
			c <- string(m.Data)
		}
		return nil
	})
	if d := got(t, c, 5); strings.Join(d, "") != "01234" {
		t.Errorf("got %v, want 0 to 4 in order", d)
	}
	checkPending(t, b, "c")
	if d := dead(t, b); len(d) != 0 {
		t.Errorf("got %d dead letters, want none", len(d))
	}
}

// A message whose dead letter cannot be stored stays in its stream.
func TestConsumeKeepsWhatCannotBeBuried(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	if err := b.Declare(within(t), topic.Streams(district)[:2]); err != nil { // no DEADLETTER
		t.Fatal(err)
	}
	publish(t, b, 1)
	c := make(chan uint64, 100)
	cons := consumer()
	cons.AckWait = 400 * time.Millisecond
	consuming(t, b, cons, func(_ context.Context, ms []*bus.Msg) error {
		c <- ms[0].Delivered
		return kind.Errorf(kind.Invalid, "no")
	})
	got(t, c, 1)
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	if d := firstDead(t, b); string(d.Data) != "0" {
		t.Errorf("got %q dead, want 0", d.Data)
	}
}

func TestConsumeManually(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	publish(t, b, 2)
	c := make(chan *bus.Msg, 10)
	cons := consumer()
	cons.Manual = true
	consuming(t, b, cons, func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			c <- m
		}
		return nil
	})
	ms := got(t, c, 2)
	if err := errors.Join(ms[0].InProgress(), ms[0].Nak(time.Millisecond), ms[1].Ack()); err != nil {
		t.Fatal(err)
	}
	again := got(t, c, 1)[0]
	if again.Seq != ms[0].Seq || again.Delivered != 2 {
		t.Errorf("got seq %d, delivery %d, want %d, 2", again.Seq, again.Delivered, ms[0].Seq)
	}
	if err := again.Nak(0); err != nil {
		t.Fatal(err)
	}
	if err := got(t, c, 1)[0].Ack(); err != nil {
		t.Fatal(err)
	}
	checkPending(t, b, "c")
}

// Ending a consumer finishes the batch in hand, gives back the rest at once, and
// the next one goes on from there.
func TestConsumeEnds(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	publish(t, b, 40)
	began, release := make(chan struct{}), make(chan struct{})
	cons := consumer()
	cons.Batch, cons.MaxAckPending = 8, 100
	var first []string
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- b.Consume(ctx, cons, func(ctx context.Context, ms []*bus.Msg) error {
			close(began)
			<-release
			if ctx.Err() != nil {
				t.Error("the batch in hand has lost its context")
			}
			for _, m := range ms {
				first = append(first, string(m.Data))
			}
			return nil
		})
	}()
	<-began
	cancel()
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	c := make(chan string, 100)
	consuming(t, b, cons, func(_ context.Context, ms []*bus.Msg) error { // well before AckWait
		for _, m := range ms {
			c <- string(m.Data)
		}
		return nil
	})
	seen := map[string]int{}
	for _, d := range append(got(t, c, 40-len(first)), first...) {
		seen[d]++
	}
	if len(seen) != 40 {
		t.Errorf("got %d messages, want 40, each once: %v", len(seen), seen)
	}
}

func TestConsumeWaitsForTheStream(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	c := make(chan string, 1)
	consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		c <- string(ms[0].Data)
		return nil
	})
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	publish(t, b, 1)
	got(t, c, 1)
}

func TestConsumerIsChecked(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	err := b.Consume(within(t), bus.Consumer{Batch: -1}, nil)
	for _, want := range []string{"District: must not be empty", "Stream: must not be empty", "Durable: must not be empty", "Batch: must not be negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
	c := consumer()
	c.Durable = "a.b"
	if err := b.Consume(within(t), c, nil); err == nil {
		t.Error("got nil, want a consumer with an impossible name refused")
	}
}

func TestReplayFrom(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	if last, err := b.Replay(within(t), topic.AcceptedStream, "", 0, nil); last != 0 || err != nil {
		t.Errorf("empty: got %d, %v, want 0, nil", last, err)
	}
	publish(t, b, 10)
	n := 0
	last, err := b.Replay(within(t), topic.AcceptedStream, topic.Accepted(district), 4, func(m *bus.Msg) error {
		if n++; m.Seq != uint64(n+3) {
			t.Errorf("got seq %d, want %d", m.Seq, n+3)
		}
		return nil
	})
	if n != 7 || last != 10 || err != nil {
		t.Errorf("got %d messages, last %d, %v, want 7, 10, nil", n, last, err)
	}
	stop := errors.New("enough")
	if last, err := b.Replay(within(t), topic.AcceptedStream, "", 0, func(m *bus.Msg) error {
		if m.Seq == 3 {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) || last != 2 {
		t.Errorf("got %d, %v, want 2, enough", last, err)
	}
	if _, err := b.Replay(within(t), "NONE", "", 0, nil); kind.Of(err) != kind.NotFound {
		t.Errorf("got %v, want not found", err)
	}
}

func TestRequests(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	if _, err := b.Request(within(t), "nobody", nil); kind.Of(err) != kind.Unavailable {
		t.Errorf("got %v, want unavailable", err)
	}
	if _, err := b.Request(within(t), "large", make([]byte, topic.MaxPayload+1)); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v, want invalid", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served, heard := make(chan error), make(chan string, 1)
	go func() {
		served <- b.Serve(ctx, "double.*", "q", func(_ context.Context, m *bus.Msg) []byte { return append(m.Data, m.Data...) })
	}()
	go func() {
		served <- b.Subscribe(ctx, "heard.*", func(subject string, data []byte) {
			select {
			case heard <- subject + " " + string(data):
			default:
			}
		})
	}()
	for { // until Serve listens
		r, err := b.Request(within(t), "double.x", []byte("ab"))
		if err == nil {
			if string(r) != "abab" {
				t.Errorf("got %q, want abab", r)
			}
			break
		}
		if within(t).Err() != nil {
			t.Fatal(err)
		}
	}
	for len(heard) == 0 {
		if err := b.Send("heard.x", []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := b.NC.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if h := <-heard; h != "heard.x hello" {
		t.Errorf("got %q, want heard.x hello", h)
	}
	cancel()
	for range 2 {
		if err := <-served; err != nil {
			t.Errorf("got %v, want nil", err)
		}
	}
}

func TestServerOverTCPAndRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := bus.StartServer(bus.ServerOptions{Dir: dir, Listen: "127.0.0.1:0", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	url := s.URL()
	b, err := bus.Connect(bus.ConnectOptions{URL: url, Name: "test", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	publish(t, b, 3)
	c := make(chan string, 100)
	stop := consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			c <- string(m.Data)
		}
		return nil
	})
	got(t, c, 3)
	s.Shutdown()
	if err := b.Send("x", nil); err == nil {
		// the client may not have noticed yet; then it must soon
		for ctx := within(t); b.Send("x", nil) == nil; {
			if ctx.Err() != nil {
				t.Fatal("sending without a server succeeds")
			}
		}
	}
	// The same address again: the connection comes back by itself, the consumer
	// goes on, and what was published meanwhile arrives.
	if s, err = bus.StartServer(bus.ServerOptions{Dir: dir, Listen: strings.TrimPrefix(url, "nats://")}); err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	if err := b.Publish(within(t), topic.Accepted(district), "after", []byte("after")); err != nil {
		t.Fatal(err)
	}
	for got(t, c, 1)[0] != "after" {
	}
	stop()
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	_, err := bus.StartServer(bus.ServerOptions{Listen: "nowhere", MaxPayload: -1, MaxStore: -1})
	for _, want := range []string{"Dir: must not be empty", "Listen: ", "MaxPayload: -1, must not be negative", "MaxStore"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
	if _, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Listen: "localhost:99999"}); err == nil || !strings.Contains(err.Error(), "port must be 0 to 65535") {
		t.Errorf("got %v, want the port refused", err)
	}
	_, err = bus.Connect(bus.ConnectOptions{CertFile: "x"})
	for _, want := range []string{"URL: must not be empty", "CertFile, KeyFile: give both or neither"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
	if _, err := bus.Connect(bus.ConnectOptions{URL: "nats://127.0.0.1:1", CAFile: filepath.Join(t.TempDir(), "none.pem")}); err == nil {
		t.Error("got nil, want a missing CA file refused")
	}
}

// A trace goes through a stream, through a request, and through Watermill.
func TestTraces(t *testing.T) {
	rec := tracetest.NewSpanRecorder()
	old := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(rec)))
	defer otel.SetTracerProvider(old)
	b := servicetest.District(t, district)
	ctx, span := otel.Tracer("test").Start(within(t), "root")
	defer span.End()
	want := span.SpanContext().TraceID()
	if err := b.Publish(ctx, topic.Accepted(district), "x", nil); err != nil {
		t.Fatal(err)
	}
	if err := b.PublishAll(ctx, []bus.Msg{{Subject: topic.Accepted(district)}, {Subject: topic.Accepted(district)}}); err != nil {
		t.Fatal(err)
	}
	var handled atomic.Int64
	c := make(chan struct{}, 10)
	cons := consumer()
	cons.Batch = 1
	stop := consuming(t, b, cons, func(ctx context.Context, _ []*bus.Msg) error {
		if id := trace.SpanContextFromContext(ctx).TraceID(); id != want {
			t.Errorf("got trace %s in the handler, want %s", id, want)
		}
		handled.Add(1)
		c <- struct{}{}
		return nil
	})
	got(t, c, 3)
	stop()
	links := 0
	for _, s := range rec.Ended() {
		if s.Name() == "process "+topic.AcceptedStream {
			links += len(s.Links())
		}
	}
	if links != 3 {
		t.Errorf("got %d links, want one for each message", links)
	}
	if h := bus.Inject(t.Context(), nil); h != nil {
		t.Errorf("got headers %v without a trace, want none", h)
	}
}
