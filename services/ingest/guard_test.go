package ingest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// durable makes a consumer that acknowledges nothing by itself.
func durable(t *testing.T, b *bus.Bus, stream, name string) jetstream.Consumer {
	t.Helper()
	c, err := b.JS.CreateConsumer(within(t), stream, jetstream.ConsumerConfig{Durable: name, AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ack acknowledges the next n messages of a consumer.
func ack(t *testing.T, c jetstream.Consumer, n int) {
	t.Helper()
	for range n {
		m, err := c.Next(jetstream.FetchMaxWait(20 * time.Second))
		if err == nil {
			err = m.DoubleAck(within(t))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// What counts is the quorum-th best of the validators, and the oldest message
// that is there.
func TestGuardSeesTheOldest(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s, err := New(Config{District: district, Bus: b})
	if err != nil {
		t.Fatal(err)
	}
	g := &guard{s: s}
	check := func(name, stream string, age func(context.Context) (time.Duration, error), seq uint64) {
		t.Helper()
		want := time.Time{}
		if seq > 0 {
			st, err := b.JS.Stream(within(t), stream)
			if err != nil {
				t.Fatal(err)
			}
			m, err := st.GetMsg(within(t), seq)
			if err != nil {
				t.Fatal(err)
			}
			want = m.Time
		}
		before := time.Now()
		got, err := age(within(t))
		after := time.Now()
		switch {
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case seq == 0 && got != 0:
			t.Errorf("%s: got %s, want nothing that waits", name, got)
		case seq > 0 && (got < before.Sub(want) || got > after.Sub(want)):
			t.Errorf("%s: got %s, want %s as message %d", name, got, before.Sub(want), seq)
		}
	}
	validators := func(name string, seq uint64) {
		t.Helper()
		check(name, topic.AcceptedStream, g.validators, seq)
	}
	for range 4 {
		for _, subject := range []string{topic.Accepted(district), topic.Ingress(district)} {
			if err := b.Publish(within(t), subject, "", []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	validators("no validators", 0)
	durable(t, b, topic.AcceptedStream, "archive")
	validators("a stranger", 0)
	var cs []jetstream.Consumer
	for n := range uint64(4) {
		cs = append(cs, durable(t, b, topic.AcceptedStream, topic.ConsensusDurable(n+1)))
	}
	validators("nobody has begun", 1)
	ack(t, cs[0], 4)
	ack(t, cs[1], 3)
	validators("two are ahead", 1)
	ack(t, cs[2], 2)
	validators("three have two", 3)
	st, err := b.JS.Stream(within(t), topic.AcceptedStream)
	if err == nil {
		err = st.DeleteMsg(within(t), 3)
	}
	if err != nil {
		t.Fatal(err)
	}
	validators("the third is gone", 4)
	ack(t, cs[1], 1)
	ack(t, cs[2], 1)
	validators("one is far behind", 0)

	validation := func(name string, seq uint64) {
		t.Helper()
		check(name, topic.IngressStream, g.validation, seq)
	}
	validation("no validation", 0)
	c := durable(t, b, topic.IngressStream, topic.ValidationDurable)
	validation("it has not begun", 1)
	ack(t, c, 3)
	validation("it has three", 4)
	ack(t, c, 1)
	validation("it has all", 0)
}

// While decisions are behind, no receipts are given for new records; what else
// is told stays as it is. The same record is taken when decisions are back.
func TestBehindIsTold(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, stream, subject, durable, text string }{
		{"validators", topic.AcceptedStream, topic.Accepted(district), topic.ConsensusDurable(3), "waits for the validators"},
		{"validation", topic.IngressStream, topic.Ingress(district), topic.ValidationDurable, "waits for validation"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := servicetest.District(t, district)
			s := running(t, b, func(c *Config) { c.MaxBehind = 100 * time.Millisecond })
			first := request(t, b, "frame", envelope(0))
			if first.Status != pb.Receipt_STATUS_STORED {
				t.Fatalf("got %v, want stored: nothing waits", first)
			}
			if c.stream != topic.IngressStream {
				if err := b.Publish(within(t), c.subject, "", []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			fake := durable(t, b, c.stream, c.durable)
			stored, r := 1, (*pb.Receipt)(nil)
			for n := 1; ; n++ { // until the guard has looked
				if r = request(t, b, "frame", envelope(n)); r.Status != pb.Receipt_STATUS_STORED {
					break
				}
				if stored++; within(t).Err() != nil {
					t.Fatal("never told busy")
				}
				time.Sleep(5 * time.Millisecond) // records in between need not be many
			}
			last := envelope(stored)
			if r.Status != pb.Receipt_STATUS_BUSY || !strings.HasPrefix(r.Reason, "decisions are behind: ") || !strings.Contains(r.Reason, c.text) {
				t.Errorf("got %v, want busy, decisions are behind: …%s…", r, c.text)
			}
			w, _ := post(t, s, "/v1/frames", identity.Protobuf, last)
			if w.Code != 503 || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), ReasonUndecided) {
				t.Errorf("got %d %s, want 503 %s", w.Code, w.Body, ReasonUndecided)
			}
			if again := request(t, b, "frame", envelope(0)); again.Status != pb.Receipt_STATUS_STORED || string(again.Salt) != string(first.Salt) {
				t.Errorf("got %v for a stored record, want its receipt", again)
			}
			if bad := request(t, b, "frame", []byte("no envelope")); bad.Status != pb.Receipt_STATUS_REFUSED {
				t.Errorf("got %v for no envelope, want refused", bad)
			}
			if got := s.Counts(); got.Busy[ReasonUndecided] != 2 || len(got.Busy) != 1 || got.Stored != uint64(stored) {
				t.Errorf("got %+v, want 2 busy by %s and %d stored", got, ReasonUndecided, stored)
			}
			if n := len(stream(t, b)); n != stored {
				t.Errorf("got %d records in the stream, want %d", n, stored)
			}

			info, err := fake.Info(within(t))
			if err != nil {
				t.Fatal(err)
			}
			ack(t, fake, int(info.NumPending))
			for {
				if r = request(t, b, "frame", last); r.Status == pb.Receipt_STATUS_STORED {
					break
				}
				if within(t).Err() != nil {
					t.Fatal("never taken again")
				}
				time.Sleep(5 * time.Millisecond)
			}
			checkStored(t, b, last, r)
		})
	}
}

// A restart does not forget that decisions are behind.
func TestBehindAtTheStart(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	durable(t, b, topic.AcceptedStream, topic.ConsensusDurable(1))
	if err := b.Publish(within(t), topic.Accepted(district), "", []byte("x")); err != nil {
		t.Fatal(err)
	}
	s := running(t, b, func(c *Config) { c.MaxBehind = time.Nanosecond })
	if r := request(t, b, "frame", envelope(1)); r.Status != pb.Receipt_STATUS_BUSY || s.Counts().Busy[ReasonUndecided] != 1 {
		t.Errorf("got %v, want busy by %s", r, ReasonUndecided)
	}
}

// What cannot be seen for a while is believed to be as it was, and then not to
// be behind.
func TestGuardCannotSee(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s, err := New(Config{District: district, Bus: b})
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	s.behind = "behind"
	g := &guard{s: s, looked: time.Now()}
	if g.look(ended); s.behind != "behind" {
		t.Errorf("got %q soon after a look, want it as it was", s.behind)
	}
	g.looked = time.Now().Add(-time.Hour)
	if g.look(ended); s.behind != "" {
		t.Errorf("got %q long after a look, want nothing", s.behind)
	}
}
