package ingest

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A sender that lost its receipt in a restart gets it from the next run, which
// shares no memory with the first.
func TestReceiptsSurviveARestart(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	first := running(t, b, func(c *Config) { c.MaxBatch = 2 })
	const n = 500 // more messages than are read in one go
	var a answers
	for i := range n {
		a.take(first, envelope(i))
	}
	a.wg.Wait()
	before := map[ledger.Hash]ledger.Salt{}
	for _, x := range a.got {
		before[x.commitment] = x.salt
	}
	if len(before) != n || len(stream(t, b)) != n {
		t.Fatalf("got %d receipts and %d records, want %d", len(before), len(stream(t, b)), n)
	}

	second := running(t, b, nil)
	for i := range n {
		r := request(t, b, "frame", envelope(i)) // either instance may answer
		c := ledger.Hash(r.Commitment)
		if salt, known := before[c]; !known || salt != ledger.Salt(r.Salt) {
			t.Fatalf("record %d: got receipt %v, want the one from before", i, r)
		}
	}
	var again answers
	for i := range n {
		again.take(second, envelope(i))
	}
	again.wg.Wait()
	for _, x := range again.got {
		if salt, known := before[x.commitment]; !known || salt != x.salt {
			t.Fatalf("got %+v, want a receipt from before", x)
		}
	}
	if c := second.Counts(); c.Stored != 0 || c.Again < n {
		t.Errorf("got %+v, want none stored and at least %d again", c, n)
	}
	if got := len(stream(t, b)); got != n {
		t.Errorf("got %d records in the stream, want %d", got, n)
	}
	checkStored(t, b, envelope(n), request(t, b, "frame", envelope(n)))
}

// Where a record is in the stream twice, the first is the one that validation
// takes. What is no batch is passed over.
func TestRecallsTheFirst(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	raw := envelope(1)
	put := func(data []byte) {
		if err := b.Publish(within(t), topic.Ingress(district), "", data); err != nil {
			t.Fatal(err)
		}
	}
	batch := func(salt byte) []byte {
		return wire.EncodeBatch(&pb.Batch{Records: []*pb.Record{{Envelope: raw, Salt: bytes.Repeat([]byte{salt}, 32), ReceivedUnixNano: 1}}})
	}
	put(batch(1))
	put([]byte("no batch"))
	put(batch(2))
	s := running(t, b, nil)
	r := request(t, b, "frame", raw)
	if want := bytes.Repeat([]byte{1}, 32); !bytes.Equal(r.Salt, want) {
		t.Errorf("got salt %x, want %x", r.Salt, want)
	}
	if c := s.Counts(); c.Again != 1 || c.Stored != 0 {
		t.Errorf("got %+v, want it answered again, not stored", c)
	}
}

// No stream, an emptied one, and one with holes are no obstacle.
func TestRecallWithoutAStream(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	s, err := New(Config{District: district, Bus: b})
	if err != nil {
		t.Fatal(err)
	}
	check := func(name string, want int) {
		t.Helper()
		if rs, err := s.readBack(within(t)); err != nil || len(rs) != want {
			t.Errorf("%s: got %d records and %v, want %d", name, len(rs), err, want)
		}
	}
	check("no stream", 0)
	if err := b.Declare(within(t), topic.Streams(district)[:1]); err != nil {
		t.Fatal(err)
	}
	check("empty", 0)
	for i := range 200 {
		data := wire.EncodeBatch(&pb.Batch{Records: []*pb.Record{{Envelope: envelope(i), Salt: make([]byte, 32)}}})
		if err := b.Publish(within(t), topic.Ingress(district), fmt.Sprint(i), data); err != nil {
			t.Fatal(err)
		}
	}
	check("full", 200)
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	for _, seq := range []uint64{1, 100, 137, 200} { // ends, the middle and where reading begins
		if err := st.DeleteMsg(within(t), seq); err != nil {
			t.Fatal(err)
		}
	}
	check("with holes", 196)
	if err := st.Purge(within(t)); err != nil {
		t.Fatal(err)
	}
	check("purged", 0)
}

// Run waits for a server, and reads back when there is one.
func TestRecallWaitsForAServer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server, err := bus.StartServer(bus.ServerOptions{Dir: dir, Listen: "127.0.0.1:0", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	url := server.URL()
	b, err := bus.Connect(bus.ConnectOptions{URL: url, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Declare(within(t), topic.Streams(district)[:1]); err != nil {
		t.Fatal(err)
	}
	salt := bytes.Repeat([]byte{3}, 32)
	data := wire.EncodeBatch(&pb.Batch{Records: []*pb.Record{{Envelope: envelope(1), Salt: salt}}})
	if err := b.Publish(within(t), topic.Ingress(district), "x", data); err != nil {
		t.Fatal(err)
	}
	server.Shutdown()
	for b.NC.IsConnected() {
		time.Sleep(time.Millisecond) // polling a state; nothing to wait for
	}

	s, err := New(Config{District: district, Bus: b, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: got %v, want nil", err)
		}
	}()
	if server, err = bus.StartServer(bus.ServerOptions{Dir: dir, Listen: url[len("nats://"):], Logger: servicetest.Logger(t)}); err != nil {
		t.Fatal(err)
	}
	defer server.Shutdown()
	for !s.Listening() {
		if within(t).Err() != nil {
			t.Fatal("does not listen")
		}
	}
	if r := request(t, b, "frame", envelope(1)); !bytes.Equal(r.Salt, salt) {
		t.Errorf("got %v, want the receipt from before", r)
	}
}
