package erase

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

const place = "harbour"

// district is a server with the streams of a district.
type district struct {
	*bus.Bus
	t   *testing.T
	dir string
}

func newDistrict(t *testing.T, maxAge time.Duration) *district {
	t.Helper()
	d := &district{t: t, dir: t.TempDir()}
	s, err := bus.StartServer(bus.ServerOptions{Dir: d.dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	if d.Bus, err = s.Connect("erase"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	streams := topic.Streams(place)
	for i := range streams {
		if maxAge > 0 {
			streams[i].MaxAge, streams[i].Duplicates = maxAge, maxAge
		}
	}
	if err := d.Declare(t.Context(), streams); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *district) publish(subject string, m proto.Message) {
	d.t.Helper()
	b, err := proto.Marshal(m)
	if err == nil {
		_, err = d.JS.Publish(d.t.Context(), subject, b)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// where names the streams in whose files some bytes are.
func (d *district) where(what []byte) (out []string) {
	d.t.Helper()
	err := filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil //nolint:nilerr // the server removes files while we look
		}
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(b, what) {
			return nil //nolint:nilerr // as above
		}
		for _, s := range Streams() {
			if bytes.Contains([]byte(path), []byte(s)) && !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return nil
	})
	if err != nil {
		d.t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func batch(envelopes ...string) *pb.Batch {
	var b pb.Batch
	for i, e := range envelopes {
		b.Records = append(b.Records, &pb.Record{Envelope: []byte(e), Salt: bytes.Repeat([]byte{byte(i)}, 32)})
	}
	return &b
}

func raw(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What holds a record is taken out of every stream, and off the disk, once
// everybody has read it; and nothing else.
func TestFrom(t *testing.T) {
	d := newDistrict(t, 0)
	const secret, other = "the envelope of a secret", "another envelope"
	begin := time.Now().Add(-time.Second)
	fill := func(e string) {
		d.publish(topic.Ingress(place), batch(other+"1", e))
		d.publish(topic.Accepted(place), batch(e))
		d.publish(topic.Quarantine(place, "late"), &pb.Quarantined{Envelope: []byte(e), Rule: "late"})
		d.publish(topic.Decision(place, 1), &pb.Block{Header: []byte("h"), Batches: [][]byte{raw(t, batch(other)), raw(t, batch(e))}})
		d.publish(topic.Dead(place, "x"), batch(e))
		d.publish(topic.Dead(place, "y"), &pb.Quarantined{Envelope: []byte(e), Rule: "late"})
	}
	fill(other)
	fill(secret)
	d.publish(topic.Ingress(place), batch(other))
	d.publish(topic.Access(place, "gateway"), batch(other))
	d.publish(topic.Access(place, "gateway"), batch(secret))
	c, err := d.JS.CreateConsumer(t.Context(), topic.IngressStream, jetstream.ConsumerConfig{Durable: "validation", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Sorted(slices.Values(Streams()))
	if got := d.where([]byte(secret)); !slices.Equal(got, all) {
		t.Fatalf("before: got it in %v, want in %v", got, all)
	}
	want := map[Digest]bool{sha256.Sum256([]byte(secret)): true}
	r, err := From(t.Context(), d.Bus, begin, want)
	if err != nil || r != (Result{Erased: 6, Waiting: 1}) {
		t.Errorf("with a consumer that has not read: got %+v, %v, want 6 erased and 1 waiting", r, err)
	}
	if got := d.where([]byte(secret)); fmt.Sprint(got) != "[INGRESS]" {
		t.Errorf("with a consumer that has not read: got it in %v, want in INGRESS alone", got)
	}
	ms, err := c.Fetch(3)
	if err != nil {
		t.Fatal(err)
	}
	for m := range ms.Messages() {
		if err := m.DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := From(t.Context(), d.Bus, begin, want); err != nil || r != (Result{Erased: 1}) {
		t.Errorf("after it was read: got %+v, %v, want 1 erased", r, err)
	}
	if r, err := From(t.Context(), d.Bus, begin, want); err != nil || !r.Clean() {
		t.Errorf("again: got %+v, %v, want that it is nowhere", r, err)
	}
	if got := d.where([]byte(secret)); len(got) > 0 {
		t.Errorf("after: got it in %v, want it nowhere", got)
	}
	if got := d.where([]byte(other)); !slices.Equal(got, all) {
		t.Errorf("after: got the others in %v, want in %v", got, all)
	}
	// Messages from before are not looked at: nobody has put the record there.
	fill(secret)
	if r, err := From(t.Context(), d.Bus, time.Now().Add(time.Minute), want); err != nil || !r.Clean() {
		t.Errorf("of a time to come: got %+v, %v, want nothing looked at", r, err)
	}
}

// A district whose streams are not all there, or empty, has nothing to erase.
func TestFromNothing(t *testing.T) {
	d := newDistrict(t, 0)
	if err := d.JS.DeleteStream(t.Context(), topic.DeadStream); err != nil {
		t.Fatal(err)
	}
	if r, err := From(t.Context(), d.Bus, time.Time{}, map[Digest]bool{{}: true}); err != nil || !r.Clean() {
		t.Errorf("got %+v, %v, want nothing", r, err)
	}
	if ok, in, err := LetGo(t.Context(), d.Bus, time.Now()); !ok || err != nil {
		t.Errorf("let go: got %v, %s, %v, want that they have", ok, in, err)
	}
}

// Streams have let go of something when their first message is younger.
func TestLetGo(t *testing.T) {
	d := newDistrict(t, 300*time.Millisecond)
	d.publish(topic.Decision(place, 1), &pb.Block{Header: []byte("h")})
	at := time.Now()
	if ok, in, err := LetGo(t.Context(), d.Bus, at); ok || in != topic.DecisionStream || err != nil {
		t.Errorf("at once: got %v, %s, %v, want that %s holds it", ok, in, err, topic.DecisionStream)
	}
	if ok, _, err := LetGo(t.Context(), d.Bus, at.Add(-time.Minute)); !ok || err != nil {
		t.Errorf("of before: got %v, %v, want that they have", ok, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		ok, _, err := LetGo(ctx, d.Bus, at)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}
