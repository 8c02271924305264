// Package erase takes single records out of a district's streams before their
// time, overwriting them on the server's disk.
//
// Streams let go by age, and a file of theirs goes when the last message in it
// has. So the bytes of an expired message stay readable on disk until its file is
// full and everything in it has expired too, which on a quiet stream takes long
// beyond the age. What was redacted must not wait for that.
//
// A message is found by the SHA-256 of the envelopes in it, not by the record's
// place: a device that sends a record twice puts it there twice, with other
// salts. It is erased whole, with what else is in the batch; but never before
// every durable consumer of its stream has acknowledged it, so that nothing is
// lost on its way.
package erase

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// Streams lists the streams that carry payloads.
func Streams() []string {
	return []string{topic.IngressStream, topic.AcceptedStream, topic.QuarantineStream, topic.DecisionStream, topic.AccessStream, topic.DeadStream}
}

// Digest names an envelope.
type Digest = [sha256.Size]byte

// Result says what was found.
type Result struct {
	// Erased messages, and those that have to stay until a consumer has read them.
	Erased, Waiting int
}

// Clean reports whether the records were nowhere.
func (r Result) Clean() bool { return r.Erased == 0 && r.Waiting == 0 }

// From goes through all streams and erases the messages that hold one of the
// envelopes and came not before since. Call it again until the result is clean.
func From(ctx context.Context, b *bus.Bus, since time.Time, envelopes map[Digest]bool) (Result, error) {
	var sum Result
	for _, name := range Streams() {
		r, err := one(ctx, b, name, since, envelopes)
		if err != nil {
			return sum, fmt.Errorf("erasing from %s: %w", name, err)
		}
		sum.Erased, sum.Waiting = sum.Erased+r.Erased, sum.Waiting+r.Waiting
	}
	return sum, nil
}

// fetchWait bounds how long one step may take that the server should answer at
// once.
const fetchWait = 10 * time.Second

func one(ctx context.Context, b *bus.Bus, name string, since time.Time, envelopes map[Digest]bool) (Result, error) {
	var out Result
	s, err := b.JS.Stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	st := s.CachedInfo().State
	if st.Msgs == 0 || st.LastTime.Before(since) {
		return out, nil
	}
	read, err := readUpTo(ctx, s, st.LastSeq)
	if err != nil {
		return out, err
	}
	c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &since})
	if err != nil {
		return out, err
	}
	info, err := c.Info(ctx)
	if err != nil || info.NumPending == 0 {
		return out, err
	}
	it, err := c.Messages()
	if err != nil {
		return out, err
	}
	defer it.Stop()
	for more := true; more; {
		m, err := it.Next(jetstream.NextMaxWait(fetchWait))
		if err != nil {
			return out, err // also where the rest has expired meanwhile: look again
		}
		md, err := m.Metadata()
		if err != nil {
			return out, err
		}
		seq := md.Sequence.Stream
		if seq > st.LastSeq {
			break // came after the look at who has read what
		}
		more = md.NumPending > 0
		if !holds(name, m.Data(), envelopes) {
			continue
		}
		if seq > read {
			out.Waiting++
			continue
		}
		if err := s.SecureDeleteMsg(ctx, seq); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return out, err
		}
		out.Erased++
	}
	return out, nil
}

// readUpTo returns up to where every durable consumer has acknowledged.
func readUpTo(ctx context.Context, s jetstream.Stream, last uint64) (uint64, error) {
	l := s.ListConsumers(ctx)
	for c := range l.Info() {
		if c.Config.Durable != "" {
			last = min(last, c.AckFloor.Stream)
		}
	}
	return last, l.Err()
}

// holds reports whether a message of a stream holds one of the envelopes.
func holds(stream string, data []byte, envelopes map[Digest]bool) bool {
	switch stream {
	case topic.IngressStream, topic.AcceptedStream, topic.AccessStream:
		return inBatch(data, envelopes)
	case topic.DecisionStream:
		return inBlock(data, envelopes)
	case topic.QuarantineStream:
		return inQuarantined(data, envelopes)
	}
	return inBatch(data, envelopes) || inBlock(data, envelopes) || inQuarantined(data, envelopes)
}

func inBatch(data []byte, envelopes map[Digest]bool) bool {
	var m pb.Batch
	if proto.Unmarshal(data, &m) != nil {
		return false
	}
	for _, r := range m.Records {
		if envelopes[sha256.Sum256(r.Envelope)] {
			return true
		}
	}
	return false
}

func inBlock(data []byte, envelopes map[Digest]bool) bool {
	var m pb.Block
	if proto.Unmarshal(data, &m) != nil {
		return false
	}
	for _, b := range m.Batches {
		if inBatch(b, envelopes) {
			return true
		}
	}
	return false
}

func inQuarantined(data []byte, envelopes map[Digest]bool) bool {
	var m pb.Quarantined
	return proto.Unmarshal(data, &m) == nil && envelopes[sha256.Sum256(m.Envelope)]
}

// LetGo reports whether every stream has let go, by age, of all that came before
// a time; where not, which still holds something.
func LetGo(ctx context.Context, b *bus.Bus, before time.Time) (ok bool, holds string, err error) {
	for _, name := range Streams() {
		s, err := b.JS.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			continue
		}
		if err != nil {
			return false, "", fmt.Errorf("stream %s: %w", name, err)
		}
		if st := s.CachedInfo().State; st.Msgs > 0 && !st.FirstTime.After(before) {
			return false, name, nil
		}
	}
	return true, "", nil
}

// DigestOf names an envelope.
func DigestOf(p *ledger.Payload) Digest { return sha256.Sum256(p.Envelope) }
