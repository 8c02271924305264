package ingest

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

func sender(t testing.TB, b *bus.Bus) *bus.Sender {
	t.Helper()
	s, err := bus.NewSender(bus.SenderConfig{Bus: b, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// sendAll sends n frames of each device, without waiting, and waits until all
// are stored. Receipts must come in the order of the frames.
func sendAll(t *testing.T, s *bus.Sender, devices, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for d := range devices {
		device, next := fmt.Sprint("dev", d), 1 // next is used by the callbacks, one after another
		for i := 1; i <= n; i++ {
			wg.Add(1)
			err := s.SendAsync(within(t), district, identity.KindFrame, device, sign(frame(device, uint64(i), 1)).Marshal(), func(r *pb.Receipt, err error) {
				defer wg.Done()
				if err != nil || r.Status != pb.Receipt_STATUS_STORED {
					t.Errorf("%s %d: got %v, %v, want stored", device, i, r, err)
				}
				if i != next {
					t.Errorf("%s: got the receipt of %d, want of %d", device, i, next)
				}
				next = i + 1
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	wg.Wait()
}

// checkOrder fails unless the stream has each device's frames 1 to n in order.
// The same frame may be there twice only if again is true, and then the first
// ones are in order.
func checkOrder(t *testing.T, b *bus.Bus, devices, n int, again bool) {
	t.Helper()
	last := map[string]uint64{}
	for _, rec := range stream(t, b) {
		e, err := identity.ParseEnvelope(rec.Envelope)
		if err != nil {
			t.Fatal(err)
		}
		f, err := wire.DecodeFrame(e.ContentType, e.Payload)
		if err != nil {
			t.Fatal(err)
		}
		d := string(f.Device)
		switch {
		case f.Seq == last[d]+1:
			last[d] = f.Seq
		case again && f.Seq <= last[d]:
		default:
			t.Fatalf("%s: got frame %d after %d", d, f.Seq, last[d])
		}
	}
	for d := range devices {
		if got := last[fmt.Sprint("dev", d)]; got != uint64(n) {
			t.Errorf("dev%d: got frames up to %d, want %d", d, got, n)
		}
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	running(t, b, func(c *Config) { c.MaxBatch = 7 })
	sendAll(t, sender(t, b), 5, 200)
	checkOrder(t, b, 5, 200, false)
}

// Several records of each sender are on their way whenever the stream is taken
// away, and the queue is small: nothing must be lost, doubled or overtaken.
func TestOrderThroughFailures(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) {
		c.MaxBatch, c.MaxPending, c.StoreWait, c.MaxDelay = 3, 40, 20*time.Millisecond, time.Millisecond
	})
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := st.CachedInfo().Config
	away := func(is bool) {
		c := cfg
		if is {
			c.Subjects = []string{"elsewhere"}
		}
		if _, err := b.JS.UpdateStream(within(t), c); err != nil {
			t.Error(err)
		}
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			away(true)
			select {
			case <-time.After(40 * time.Millisecond):
			case <-stop:
			}
			away(false)
			select {
			case <-time.After(20 * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	n := 150
	if testing.Short() {
		n = 50
	}
	sendAll(t, sender(t, b), 4, n)
	close(stop)
	<-done
	checkOrder(t, b, 4, n, false)
	c := s.Counts()
	if c.Busy[ReasonUnavailable]+c.Busy[ReasonUnknown] == 0 || c.Busy[ReasonQueueFull] == 0 {
		t.Errorf("got %+v, want busy answers because of store and queue: the test has tested nothing", c)
	}
	if len(c.Refused) != 0 {
		t.Errorf("got %+v, want none refused", c)
	}
}

// Two instances share the inbox and write to one stream: each gets some of a
// sender's records, and in between the other's batches.
func TestOrderWithTwoInstances(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	one := running(t, b, func(c *Config) { c.MaxBatch, c.MaxDelay = 4, time.Millisecond })
	two := running(t, b, func(c *Config) { c.MaxBatch, c.MaxDelay = 4, time.Millisecond })
	n := 60
	if testing.Short() {
		n = 20
	}
	sendAll(t, sender(t, b), 6, n)
	checkOrder(t, b, 6, n, false)
	if one.Counts().Stored == 0 || two.Counts().Stored == 0 {
		t.Errorf("got %d and %d stored, want some by each", one.Counts().Stored, two.Counts().Stored)
	}
}

// The conditions that batches carry must be what keeps order: without the
// predecessor the server refuses.
func TestBatchBehindAMissingOneIsNotStored(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	w := &writer{s: s}
	rec := func(i int) []*record {
		raw := envelope(i)
		return []*record{{envelope: raw}}
	}
	w.launch(rec(1))
	if !w.flights[0].wait() {
		t.Fatalf("first batch: %v", w.flights[0].err)
	}
	w.last = "a batch that was never stored"
	w.launch(rec(2))
	if f := w.flights[1]; f.wait() || apiCode(f.err) != wrongLastID {
		t.Errorf("got %v, want error %d", f.err, wrongLastID)
	}
	if n := len(stream(t, b)); n != 1 {
		t.Errorf("got %d records, want 1", n)
	}
}

func TestReceiptsSurviveTheServer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server, err := bus.StartServer(bus.ServerOptions{Dir: dir, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	b, err := server.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{District: district, Bus: b, MaxBatch: 3, StoreWait: 20 * time.Millisecond, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	for !s.Listening() {
	}
	var a answers
	half := make(chan struct{})
	go func() {
		for i := range 1000 {
			a.take(s, envelope(i))
			if i == 500 {
				close(half)
			}
			if i%20 == 0 { // so that batches are on their way all the time
				for s.Counts().Pending > 30 {
					time.Sleep(time.Millisecond)
				}
			}
		}
		cancel()
	}()
	<-half
	server.Shutdown()
	if err := <-done; err != nil && kind.Of(err) != kind.Unavailable {
		t.Errorf("Run: got %v, want nil or unavailable", err)
	}
	a.wg.Wait()
	b.Close()
	if n := a.count(pb.Receipt_STATUS_REFUSED, ""); n != 0 {
		t.Errorf("got %d refused, want none", n)
	}
	c := s.Counts()
	if c.Stored < 400 || c.Stored == 1000 || c.Pending != 0 || c.Busy[ReasonUnavailable]+c.Busy[ReasonUnknown] == 0 {
		t.Errorf("got %+v, want some stored, the others told that it was unavailable", c)
	}

	if server, err = bus.StartServer(bus.ServerOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	if b, err = server.Connect("test"); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	salts := map[string]int{}
	for _, rec := range stream(t, b) {
		salts[string(rec.Salt)]++
	}
	for _, x := range a.got {
		if x.status == pb.Receipt_STATUS_STORED && salts[string(x.salt[:])] != 1 {
			t.Errorf("a record with a receipt is in the stream %d times, want once", salts[string(x.salt[:])])
		}
	}
}

// BenchmarkIngest sends frames of 24 readings, each with its signature, from
// requests on NATS to the receipt, and so to the disk.
func BenchmarkIngest(b *testing.B) {
	for _, devices := range []int{8, 256} {
		b.Run(fmt.Sprintf("devices=%d", devices), func(b *testing.B) {
			conn := servicetest.District(b, district)
			running(b, conn, nil)
			s := sender(b, conn)
			raws := make([][]byte, b.N) // signing is the sender's work
			for i := range raws {
				e := sign([]byte("x"))
				e.Payload = frame(fmt.Sprint("dev", i%devices), uint64(i/devices+1), 24)
				raws[i] = e.Marshal()
			}
			b.SetBytes(int64(len(raws[0])))
			var wg sync.WaitGroup
			room := make(chan struct{}, 4096)
			b.ResetTimer()
			for i, raw := range raws {
				room <- struct{}{}
				wg.Add(1)
				if err := s.SendAsync(context.Background(), district, identity.KindFrame, fmt.Sprint("dev", i%devices), raw, func(_ *pb.Receipt, err error) {
					if err != nil {
						b.Error(err)
					}
					<-room
					wg.Done()
				}); err != nil {
					b.Fatal(err)
				}
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
		})
	}
}

// On three replicated servers the conditions that batches carry hold as well.
func TestOrderInACluster(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("electing leaders takes seconds")
	}
	b, err := bus.Connect(bus.ConnectOptions{URL: servicetest.Cluster(t), Name: "test", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	if err := b.DeclareWith(within(t), topic.Streams(district)[:1], bus.DeclareOptions{Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	s := running(t, b, func(c *Config) { c.MaxBatch = 7 })
	sendAll(t, sender(t, b), 5, 200)
	checkOrder(t, b, 5, 200, false)
	t.Logf("%+v", s.Counts())
}
