package validation

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const (
	// slack is how far times of receipt in ACCEPTED may be out of order.
	slack = 10 * time.Second
	// quarantinedMost bounds how many records of devices that were in quarantine
	// already are read again, should the record that put them there be gone.
	quarantinedMost = 20_000
)

// recover begins a session from what the streams hold, and removes the consumer
// of an earlier one.
func (s *Service) recover(ctx context.Context) error {
	began := time.Now()
	js := s.cfg.Bus.JS
	s.session = session{
		verifier: identity.NewVerifier(), state: validate.NewState(s.cfg.Limits), done: map[ledger.Salt]traffic.DeviceID{},
	}
	ingress, err := open(ctx, js, topic.IngressStream)
	if err != nil {
		return err
	}
	accepted, err := open(ctx, js, topic.AcceptedStream)
	if err != nil {
		return err
	}
	quarantine, err := open(ctx, js, topic.QuarantineStream)
	if err != nil {
		return err
	}

	resume, dealt := max(ingress.first, 1), uint64(0)
	for seq := accepted.last; seq >= accepted.first && seq > 0; seq-- {
		b, err := accepted.batch(ctx, seq)
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		// The last message that ACCEPTED knows of may be dealt with in part.
		if b.IngressLast <= ingress.last {
			resume, dealt = max(resume, b.IngressLast), b.IngressLast
		} else {
			s.log.Error("INGRESS is behind what was accepted from it: it must have been made anew", "seq", ingress.last, "accepted", b.IngressLast)
		}
		break
	}
	cons, err := js.Consumer(ctx, topic.IngressStream, topic.ValidationDurable)
	switch {
	case err == nil:
		floor := cons.CachedInfo().AckFloor.Stream
		resume, dealt = max(resume, floor+1), max(dealt, floor)
	case !errors.Is(err, jetstream.ErrConsumerNotFound):
		return fmt.Errorf("consumer %s: %w", topic.ValidationDurable, err)
	}

	if dealt > 0 { // else nothing is known of an earlier run
		s.gone(dealt+1, resume-1)
	}

	// Numbers of INGRESS rise in both streams, but where INGRESS was made anew.
	above := ingress.last
	for seq := accepted.last; seq >= accepted.first && seq > 0; seq-- {
		b, err := accepted.batch(ctx, seq)
		if err != nil {
			return err
		}
		if b == nil || b.IngressLast < resume || b.IngressLast > above {
			break
		}
		above = b.IngressLast
		for _, r := range b.Records {
			s.done[ledger.Salt(r.Salt)] = ""
		}
		s.doneUntil = max(s.doneUntil, b.IngressLast)
	}
	above = ingress.last
	for seq := quarantine.last; seq >= quarantine.first && seq > 0; seq-- {
		q, err := quarantine.quarantined(ctx, seq)
		if err != nil {
			return err
		}
		if q == nil || q.IngressSeq < resume || q.IngressSeq > above {
			break
		}
		above = q.IngressSeq
		s.done[ledger.Salt(q.Salt)] = ""
		s.doneUntil = max(s.doneUntil, q.IngressSeq)
	}

	restored, err := s.restore(ctx, ingress, accepted, resume)
	if err != nil {
		return err
	}
	if err := s.restoreQuarantined(ctx, quarantine, resume, ingress.last); err != nil {
		return err
	}

	if cons != nil {
		if err := js.DeleteConsumer(ctx, topic.IngressStream, topic.ValidationDurable); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return fmt.Errorf("removing consumer %s: %w", topic.ValidationDurable, err)
		}
	}
	s.last = resume - 1
	s.log.Info("validating", "district", s.cfg.District, "seq", resume, "restored", restored, "done", len(s.done), "elapsed", time.Since(began))
	return nil
}

// restore reads from ACCEPTED what a record that is still to come could repeat.
func (s *Service) restore(ctx context.Context, ingress, accepted *stream, resume uint64) (n int, err error) {
	if accepted.last < accepted.first || accepted.last == 0 {
		return 0, nil
	}
	// The next record may have been received long ago; its clock window lies
	// before that. A command's window ends with its validity.
	oldest := s.cfg.Now()
	if resume <= ingress.last {
		b, err := ingress.batch(ctx, max(resume, ingress.first))
		if err != nil {
			return 0, err
		}
		if b != nil && len(b.Records) > 0 {
			if at := time.Unix(0, b.Records[0].ReceivedUnixNano); at.Before(oldest) {
				oldest = at
			}
		}
	}
	l := s.state.Limits()
	from, err := accepted.search(ctx, oldest.Add(-l.ClockBehind-l.ClockAhead-l.CommandValidity-slack))
	if err != nil {
		return 0, err
	}
	_, err = s.cfg.Bus.Replay(ctx, topic.AcceptedStream, "", from, func(m *bus.Msg) error {
		b, err := wire.DecodeBatch(m.Data)
		if err != nil {
			// Only we write there; consensus cannot read it either.
			s.log.Error("message in ACCEPTED is no batch of records", "seq", m.Seq, "err", err)
			return nil
		}
		for _, r := range b.Records {
			c, f := s.decode(r.Envelope, r.Salt)
			if f != nil {
				s.log.Error("decoding a record in ACCEPTED failed by a fault of the program", "seq", m.Seq, "err", f.value, "stack", f.stack)
				continue
			}
			s.state.Restore(&c)
			n++
		}
		return nil
	})
	return n, err
}

// restoreQuarantined reads which devices have equivocated.
func (s *Service) restoreQuarantined(ctx context.Context, quarantine *stream, resume, newest uint64) error {
	if quarantine.last < quarantine.first || quarantine.last == 0 {
		return nil
	}
	for _, r := range []struct {
		rule validate.Rule
		from uint64
	}{
		{validate.RuleEquivocation, quarantine.first},
		// For as long as a device goes on sending, these outlive the evidence.
		{validate.RuleQuarantined, max(quarantine.first, quarantine.last-min(quarantine.last, quarantinedMost))},
	} {
		_, err := s.cfg.Bus.Replay(ctx, topic.QuarantineStream, topic.Quarantine(s.cfg.District, string(r.rule)), r.from, func(m *bus.Msg) error {
			q, err := wire.DecodeQuarantined(m.Data)
			if err != nil {
				s.log.Error("message in QUARANTINE cannot be decoded", "seq", m.Seq, "err", err)
				return nil
			}
			c, f := s.decode(q.Envelope, q.Salt)
			if f != nil {
				s.log.Error("decoding a record in QUARANTINE failed by a fault of the program", "seq", m.Seq, "err", f.value, "stack", f.stack)
				return nil
			}
			switch {
			case c.Frame == nil: // a command's second body; its sender goes on
			case q.IngressSeq < resume || q.IngressSeq > newest:
				s.state.Quarantine(c.Frame.Device)
			case r.rule == validate.RuleEquivocation:
				// Frames that came before it may still have to be judged.
				s.done[ledger.Salt(q.Salt)] = c.Frame.Device
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// stream reads single messages of a stream.
type stream struct {
	jetstream.Stream
	name        string
	first, last uint64 // sequence numbers; first > last where it is empty
}

func open(ctx context.Context, js jetstream.JetStream, name string) (*stream, error) {
	st, err := js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", name, err)
	}
	i := st.CachedInfo().State
	s := &stream{Stream: st, name: name, first: i.FirstSeq, last: i.LastSeq}
	if i.Msgs == 0 {
		s.first = s.last + 1
	}
	return s, nil
}

// get returns the data of one message, nil where it is gone.
func (s *stream) get(ctx context.Context, seq uint64) ([]byte, error) {
	if seq < s.first || seq > s.last {
		return nil, nil
	}
	m, err := s.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s message %d: %w", s.name, seq, err)
	}
	return m.Data, nil
}

// batch returns the batch in one message, nil where it is gone or is none.
func (s *stream) batch(ctx context.Context, seq uint64) (*pb.Batch, error) {
	data, err := s.get(ctx, seq)
	if err != nil || data == nil {
		return nil, err
	}
	b, err := wire.DecodeBatch(data)
	if err != nil {
		return nil, nil // reported where it is handled
	}
	return b, nil
}

// quarantined returns the record in one message, nil where it is gone.
func (s *stream) quarantined(ctx context.Context, seq uint64) (*pb.Quarantined, error) {
	data, err := s.get(ctx, seq)
	if err != nil || data == nil {
		return nil, err
	}
	return wire.DecodeQuarantined(data)
}

// search returns the first message with records received at or after t, by
// halving: times of receipt rise, but for [slack].
func (s *stream) search(ctx context.Context, t time.Time) (uint64, error) {
	lo, hi := s.first, s.last+1
	for lo < hi {
		mid := lo + (hi-lo)/2
		b, err := s.batch(ctx, mid)
		if err != nil {
			return 0, err
		}
		// With a message that cannot be read it is safe to begin earlier.
		if b != nil && len(b.Records) > 0 && b.Records[0].ReceivedUnixNano < t.UnixNano() {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, nil
}
