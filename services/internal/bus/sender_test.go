package bus_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

func newSender(t *testing.T, b *bus.Bus, change func(*bus.SenderConfig)) *bus.Sender {
	t.Helper()
	c := bus.SenderConfig{Bus: b, Window: 8, Timeout: 30 * time.Millisecond}
	if change != nil {
		change(&c)
	}
	s, err := bus.NewSender(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// receiver answers records as answer says; nil means not at all.
func receiver(t *testing.T, b *bus.Bus, answer func(m *nats.Msg) *pb.Receipt) {
	t.Helper()
	stop, err := b.Listen(topic.InboxAll(district), "", func(m *nats.Msg) {
		r := answer(m)
		if r == nil {
			return
		}
		d, err := proto.Marshal(r)
		if err == nil {
			err = m.Respond(d)
		}
		if err != nil {
			t.Errorf("answering: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
}

func say(s pb.Receipt_Status) *pb.Receipt { return &pb.Receipt{Status: s, Reason: "field: rule"} }

// A receiver that loses requests and answers, and is busy, gets every record in
// order, and each sender its receipts in order. It keeps the rule of ingest: a
// record is taken in its turn only.
func TestSenderKeepsOrder(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	rnd := rand.New(rand.NewPCG(1, 2))
	taken := map[string][]string{} // by subject; used by the receiver only, until the end
	next := map[string]int{}
	receiver(t, b, func(m *nats.Msg) *pb.Receipt {
		var n, base int
		if _, err := fmt.Sscan(m.Header.Get(bus.HeaderNumber)+" "+m.Header.Get(bus.HeaderBase), &n, &base); err != nil {
			t.Error(err)
		}
		if base > n || base > next[m.Subject]+1 {
			t.Errorf("got base %d with number %d when %d were taken", base, n, next[m.Subject])
		}
		switch dice := rnd.IntN(100); {
		case dice < 2:
			return nil // request lost
		case dice < 10 || n > next[m.Subject]+1:
			return say(pb.Receipt_STATUS_BUSY)
		}
		if n == next[m.Subject]+1 {
			next[m.Subject]++
			taken[m.Subject] = append(taken[m.Subject], string(m.Data))
		}
		if rnd.IntN(100) < 2 {
			return nil // answer lost
		}
		return say(pb.Receipt_STATUS_STORED)
	})
	s := newSender(t, b, nil)
	const n = 300
	var wg sync.WaitGroup
	for _, source := range []string{"a", "b", "c"} {
		last := -1
		for i := range n {
			wg.Add(1)
			if err := s.SendAsync(within(t), district, identity.KindFrame, source, fmt.Append(nil, i), func(r *pb.Receipt, err error) {
				defer wg.Done()
				if err != nil || i != last+1 {
					t.Errorf("%s: got the receipt of %d after that of %d, %v", source, i, last, err)
				}
				last = i
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	wg.Wait()
	for subject, got := range taken {
		if len(got) != n {
			t.Errorf("%s: got %d records, want %d", subject, len(got), n)
		}
		for i, d := range got {
			if d != fmt.Sprint(i) {
				t.Fatalf("%s: got record %s at %d", subject, d, i)
			}
		}
	}
}

func TestSenderIsRefused(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	receiver(t, b, func(m *nats.Msg) *pb.Receipt {
		if string(m.Data) == "bad" {
			return say(pb.Receipt_STATUS_REFUSED)
		}
		return say(pb.Receipt_STATUS_STORED)
	})
	s := newSender(t, b, nil)
	for _, d := range []string{"good", "bad", "good again"} {
		r, err := s.Send(within(t), district, identity.KindFrame, "x", []byte(d))
		if d == "bad" {
			if kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), "ingest refused the record: field: rule") || r.GetStatus() != pb.Receipt_STATUS_REFUSED {
				t.Errorf("got %v, %v, want refused", r, err)
			}
		} else if err != nil || r.GetStatus() != pb.Receipt_STATUS_STORED {
			t.Errorf("%s: got %v, %v, want stored", d, r, err)
		}
	}
	if _, err := s.Send(within(t), district, identity.KindFrame, "x", make([]byte, topic.MaxPayload+1)); kind.Of(err) != kind.Invalid {
		t.Errorf("too large for NATS: got %v, want invalid", err)
	}
	if _, err := s.Send(within(t), district, identity.KindFrame, "x", []byte("good")); err != nil {
		t.Errorf("after it: got %v, want nil", err)
	}
}

// Nobody listens at first; then somebody does.
func TestSenderWaitsForIngest(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	s := newSender(t, b, nil)
	done := make(chan error)
	go func() {
		_, err := s.Send(within(t), district, identity.KindFrame, "x", nil)
		done <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Send(ctx, district, identity.KindFrame, "y", nil)
	if kind.Of(err) != kind.Unavailable || !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, bus.ErrUnknown) {
		t.Errorf("got %v, want unavailable, unknown, deadline", err)
	}
	receiver(t, b, func(*nats.Msg) *pb.Receipt { return say(pb.Receipt_STATUS_STORED) })
	if err := <-done; err != nil {
		t.Errorf("got %v, want nil", err)
	}
}

func TestSenderIsBounded(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	receiver(t, b, func(*nats.Msg) *pb.Receipt { return nil })
	s := newSender(t, b, func(c *bus.SenderConfig) { c.Queue = 10; c.Timeout = time.Hour })
	ends := make(chan error, 10)
	send := func() error {
		return s.SendAsync(t.Context(), district, identity.KindFrame, "x", nil, func(_ *pb.Receipt, err error) { ends <- err })
	}
	for range 10 {
		if err := send(); err != nil {
			t.Fatal(err)
		}
	}
	if err := send(); !errors.Is(err, bus.ErrFull) || kind.Of(err) != kind.Unavailable || !strings.Contains(err.Error(), "10 records wait already") {
		t.Errorf("got %v, want full", err)
	}
	s.Close()
	for i, err := range got(t, ends, 10) {
		if !errors.Is(err, bus.ErrClosed) || errors.Is(err, bus.ErrUnknown) != (i < 8) { // the window is 8
			t.Errorf("record %d: got %v, want closed, and unknown only if it was sent", i, err)
		}
	}
	if err := send(); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("got %v, want closed", err)
	}
	if _, err := bus.NewSender(bus.SenderConfig{Window: -1}); err == nil || !strings.Contains(err.Error(), "Bus: must be given") || !strings.Contains(err.Error(), "must not be negative") {
		t.Errorf("got %v, want both problems", err)
	}
}

// While ingest is busy one record asks for all; when it is not, the others follow
// at once.
func TestSenderAsksWithOne(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	const window, busy = 8, 8 + 5
	var requests []string // used by the receiver only, until the end
	receiver(t, b, func(m *nats.Msg) *pb.Receipt {
		requests = append(requests, string(m.Data))
		if len(requests) <= busy {
			return say(pb.Receipt_STATUS_BUSY)
		}
		return say(pb.Receipt_STATUS_STORED)
	})
	s := newSender(t, b, func(c *bus.SenderConfig) { c.Window, c.Timeout = window, time.Minute })
	var all sync.WaitGroup
	for i := range window {
		all.Add(1)
		if err := s.SendAsync(within(t), district, identity.KindFrame, "x", fmt.Append(nil, i), func(_ *pb.Receipt, err error) {
			defer all.Done()
			if err != nil {
				t.Errorf("%d: got %v, want it stored", i, err)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	all.Wait()
	// The first round may have been cut short by the first answer.
	first := slices.Index(requests[1:], "0") + 1
	for i := first; i <= busy; i++ {
		if requests[i] != "0" {
			t.Fatalf("got requests %v, want %q alone until it is stored, from request %d on", requests, "0", first)
		}
	}
	if want := busy + window; len(requests) != want {
		t.Errorf("got %d requests, want %d: %v", len(requests), want, requests)
	}
}
