package validation

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Bounds of one message of ACCEPTED: it is one request of consensus, which must
// fit a proposal.
const (
	MaxBatchBytes   = 1 << 20
	MaxBatchRecords = 1024
)

// Registry tells who may sign what. The value that it returns is not changed
// any more.
type Registry interface {
	Registry() *identity.Registry
}

// Config of the service.
type Config struct {
	// District whose records to validate. Required.
	District traffic.DistrictID
	// Bus has the district's streams. Required.
	Bus *bus.Bus
	// State follows the registry through the decided blocks; the service runs it
	// with Follow. Required, unless Registry is given.
	State  *agreed.State
	Follow decided.Config
	// Registry is asked instead of State, which then is not run. Optional.
	Registry Registry
	// Limits for judging. Optional: [validate.Edge].
	Limits validate.Limits
	// Now is the district's clock, for records that carry no time of receipt.
	// Optional: time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong with the configuration.
func (c *Config) Validate() error {
	var errs []error
	if c.District == "" {
		errs = append(errs, errors.New("validation: District: must not be empty"))
	}
	if c.Bus == nil {
		errs = append(errs, errors.New("validation: Bus: must be given"))
	}
	if c.State == nil && c.Registry == nil {
		errs = append(errs, errors.New("validation: State or Registry: one must be given"))
	}
	return errors.Join(errs...)
}

// Service is the validation of one district.
type Service struct {
	cfg      Config
	reg      Registry
	log      *slog.Logger
	counters counters

	// current waits until the registry is that after the newest decided block.
	current func(context.Context) error

	// kill, in tests, ends a session at a named point, as kill -9 would.
	kill func(point string) error
	// fault, in tests, panics where a fault of the program would.
	fault func(step string, raw []byte)
	// maxGroup is the most messages handled together.
	maxGroup int

	// Owned by Run.
	session
	// goneUntil is the newest INGRESS message counted as gone.
	goneUntil uint64
}

// session is what the service knows between two recoveries.
type session struct {
	verifier *identity.Verifier
	state    *validate.State
	// last is the newest INGRESS message that is dealt with.
	last uint64
	// done are the records after last that an earlier session has published, the
	// last of them in INGRESS message doneUntil. The value is the device that was
	// quarantined because of the record, and mostly empty.
	done      map[ledger.Salt]traffic.DeviceID
	doneUntil uint64
}

// New returns the service, ready to run.
func New(c Config) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Limits == (validate.Limits{}) {
		c.Limits = validate.Edge()
	}
	s := &Service{cfg: c, reg: c.Registry, log: c.Logger, kill: func(string) error { return nil }, fault: func(string, []byte) {}, maxGroup: maxGroup}
	s.current = func(context.Context) error { return nil }
	if s.reg == nil {
		s.reg, s.current = c.State, s.reachNewest
	}
	return s, nil
}

// Run validates until ctx ends, which is not an error. It waits for streams that
// are not there yet.
func (s *Service) Run(ctx context.Context) error {
	if s.cfg.Registry != nil {
		return s.validate(ctx)
	}
	return run.All(ctx,
		run.Actor{Name: "validate", Run: s.validate},
		run.Actor{Name: "follow the registry", Run: func(ctx context.Context) error {
			return s.cfg.State.Run(ctx, s.cfg.Follow, func(context.Context, *decided.Block, *identity.Registry) error { return nil })
		}})
}

// currentWait is how long to wait for the registry before saying so.
const currentWait = 5 * time.Second

// reachNewest waits until the registry is that after the newest block that was
// decided by now. What was decided by validators who are not in the registry yet
// is waited for as well, but not for long: it may be nobody's.
func (s *Service) reachNewest(ctx context.Context) error {
	c := s.cfg.Follow
	c.Validators = s.cfg.State.Registry().Validators()
	h, claimed, err := decided.Newest(ctx, c)
	if err != nil {
		return err
	}
	for {
		try, cancel := context.WithTimeout(ctx, currentWait)
		err := s.cfg.State.Reach(try, h)
		if err == nil && claimed > h {
			if err := s.cfg.State.Reach(try, claimed); err != nil && ctx.Err() == nil {
				s.log.Warn("blocks say that they are newer, and cannot be verified", "height", uint64(claimed))
			}
		}
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		s.log.Warn("waiting for the registry: records would be refused that it allows", "height", uint64(h), "err", err)
	}
}

// Waits between sessions.
const (
	retryFirst = 50 * time.Millisecond
	retryMost  = 2 * time.Second
)

// validate runs sessions, each of which begins with a recovery.
func (s *Service) validate(ctx context.Context) error {
	wait := retryFirst
	for {
		began := time.Now()
		err := s.runSession(ctx)
		var killed *killedError
		switch {
		case errors.As(err, &killed):
			return err
		case ctx.Err() != nil:
			return nil
		case s.cfg.Bus.NC.IsClosed():
			return fmt.Errorf("validation: connection closed: %w", err)
		}
		// What could not be published, or read, is still in INGRESS.
		s.log.Warn("validation interrupted, recovering", "err", err)
		if time.Since(began) > retryMost {
			wait = retryFirst
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
}

// killedError ends Run at once; tests make it.
type killedError struct{ point string }

func (e *killedError) Error() string { return "killed at " + e.point }

// Figures of the consumer of INGRESS.
const (
	maxGroup   = 256 // messages handled together
	maxPending = 1024
	ackWait    = 30 * time.Second
	// drain is how long the group in hand may take after ctx has ended.
	drain = 2 * time.Second
)

func (s *Service) runSession(ctx context.Context) error {
	if err := s.recover(ctx); err != nil {
		return fmt.Errorf("recovering: %w", err)
	}
	cons, err := s.cfg.Bus.JS.CreateConsumer(ctx, topic.IngressStream, jetstream.ConsumerConfig{
		Durable: topic.ValidationDurable, FilterSubject: topic.Ingress(s.cfg.District),
		// Not where the acknowledgements ended: what is unacknowledged would come
		// after newer messages then, and order matters.
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: s.last + 1,
		AckPolicy: jetstream.AckAllPolicy, AckWait: ackWait, MaxAckPending: maxPending, MaxDeliver: -1,
	})
	if err != nil {
		return err
	}
	it, err := cons.Messages(jetstream.PullMaxMessages(maxGroup))
	if err != nil {
		return err
	}
	msgs := make(chan jetstream.Msg, maxGroup)
	return run.All(ctx,
		run.Actor{Name: "read", Run: func(ctx context.Context) error {
			defer close(msgs)
			defer it.Stop()
			for {
				m, err := it.Next(jetstream.NextContext(ctx))
				if err != nil {
					return err
				}
				select {
				case msgs <- m:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}},
		run.Actor{Name: "judge", Run: func(context.Context) error {
			// The outer ctx: when reading ends, what was read is still dealt with.
			return s.loop(ctx, msgs)
		}})
}

// loop handles what has arrived, in groups as large as the last one let them
// become, until msgs is closed.
func (s *Service) loop(ctx context.Context, msgs <-chan jetstream.Msg) error {
	for m := range msgs {
		if ctx.Err() != nil {
			return nil
		}
		group := []jetstream.Msg{m}
		size := len(m.Data())
	more:
		for len(group) < s.maxGroup && size < MaxBatchBytes/2 {
			select {
			case m, open := <-msgs:
				if !open {
					break more
				}
				group = append(group, m)
				size += len(m.Data())
			default:
				break more
			}
		}
		work, cancel := context.WithCancel(context.WithoutCancel(ctx))
		stop := context.AfterFunc(ctx, func() { time.AfterFunc(drain, cancel) })
		err := s.group(work, group)
		stop()
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}

// item is one record on its way through.
type item struct {
	record *pb.Record
	seq    uint64 // of its INGRESS message
	// mark is the device that this record had quarantined when an earlier session
	// dealt with it; there is nothing else to do then.
	mark traffic.DeviceID
}

// group judges the records of some INGRESS messages and publishes the outcome.
// On an error nobody knows how much of it is stored.
func (s *Service) group(ctx context.Context, msgs []jetstream.Msg) error {
	var items []item
	first, last := uint64(0), s.last
	for _, m := range msgs {
		md, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("message without a place in %s: %w", topic.IngressStream, err)
		}
		seq := md.Sequence.Stream
		if seq <= last {
			continue // handed out again, because something took longer than ackWait
		}
		s.gone(last+1, seq-1)
		last = seq
		if first == 0 {
			first = seq
		}
		var batch *pb.Batch
		if f := try(func() { batch, err = wire.DecodeBatch(m.Data()) }); f != nil {
			s.log.Error("decoding a message failed by a fault of the program", "seq", seq, "err", f.value, "stack", f.stack)
			err = f
		}
		if err != nil {
			if err := s.bury(ctx, seq, m, err); err != nil {
				return err
			}
			continue
		}
		s.counters.add(func(c *Counts) { c.Messages++ })
		for _, r := range batch.Records {
			if d, done := s.done[ledger.Salt(r.Salt)]; done {
				if d != "" {
					items = append(items, item{record: r, seq: seq, mark: d})
				}
				continue
			}
			items = append(items, item{record: r, seq: seq})
		}
	}
	accepted, refused, delta, err := s.judge(ctx, items)
	if err != nil {
		return err
	}
	if err := s.quarantine(ctx, refused); err != nil {
		return err
	}
	if err := s.kill("quarantined"); err != nil {
		return err
	}
	if err := s.accept(ctx, accepted, first, last); err != nil {
		return err
	}
	if err := s.kill("accepted"); err != nil {
		return err
	}
	s.counters.add(delta)
	s.last = last
	if s.last >= s.doneUntil {
		s.done = nil
	}
	// Acknowledges everything before, too. If it is lost, the recovery knows better.
	if err := msgs[len(msgs)-1].Ack(); err != nil {
		s.log.Debug("group not acknowledged", "seq", last, "err", err)
	}
	return nil
}

// gone tells, once, that messages of INGRESS from one number to another left it
// before they were dealt with.
func (s *Service) gone(from, to uint64) {
	from = max(from, s.goneUntil+1)
	if from > to {
		return
	}
	s.goneUntil = to
	s.counters.add(func(c *Counts) { c.Gone += to - from + 1 })
	s.log.Error("messages have left INGRESS before they were known to be dealt with; records with receipts may be lost",
		"seq", from, "last", to, "count", to-from+1)
}

// verdict is an item that was refused.
type verdict struct {
	item
	validate.Verdict
}

// judge applies the rules to each record in order, and returns what to count
// once the outcome is stored.
func (s *Service) judge(ctx context.Context, items []item) (accepted []item, refused []verdict, delta func(*Counts), err error) {
	cs, verdicts, err := s.verdicts(ctx, items)
	if err != nil {
		return nil, nil, nil, err
	}
	var n Counts
	n.ByRule = map[validate.Rule]uint64{}
	for i, it := range items {
		if it.mark != "" {
			continue
		}
		c, v := &cs[i], verdicts[i]
		n.Records++
		if c.Frame != nil {
			n.Frames++
		}
		if !v.OK {
			n.Quarantined++
			n.ByRule[v.Rule]++
			if c.Frame != nil {
				n.FramesQuarantined++
			}
			if v.Rule == validate.RuleEquivocation && c.Frame != nil {
				s.log.Error("device quarantined: two frames under one number", "device", c.Frame.Device, "seq", c.Frame.Seq)
			}
			s.log.Debug("record quarantined", "rule", v.Rule, "reason", text(v.Reason), "seq", it.seq)
			refused = append(refused, verdict{it, v})
			continue
		}
		n.Accepted++
		if c.Frame != nil {
			n.FramesAccepted++
			n.Readings += uint64(len(c.Frame.Readings))
		}
		if v.Gap > 0 {
			n.Gaps++
			n.Missing = saturate(n.Missing, v.Gap)
			// Not of frames only: imports and agencies' records are numbered too.
			s.log.Debug("records are missing", "kind", c.Envelope.Kind, "signer", c.Envelope.Key, "seq", it.seq, "missing", v.Gap)
		}
		accepted = append(accepted, it)
	}
	return accepted, refused, n.addTo, nil
}

// accept publishes accepted records in as many messages as their size asks for.
func (s *Service) accept(ctx context.Context, items []item, first, last uint64) error {
	var msgs []bus.Msg
	for len(items) > 0 {
		b := &pb.Batch{IngressFirst: first, IngressLast: last}
		size := 0
		for len(items) > 0 && len(b.Records) < MaxBatchRecords {
			// Tags, lengths, salt and time take less than 80 bytes.
			if size += len(items[0].record.Envelope) + 80; size > MaxBatchBytes-80 && len(b.Records) > 0 {
				break
			}
			b.Records = append(b.Records, items[0].record)
			b.IngressLast = items[0].seq
			items = items[1:]
		}
		if len(items) == 0 {
			b.IngressLast = last
		}
		// The first record is in the id because a later session may publish what
		// is left of the same messages.
		id := fmt.Sprintf("a-%d-%d-%s", b.IngressFirst, b.IngressLast, hex.EncodeToString(b.Records[0].Salt[:8]))
		msgs = append(msgs, bus.Msg{Subject: topic.Accepted(s.cfg.District), ID: id, Data: wire.EncodeBatch(b)})
		first = b.IngressLast
	}
	return s.publish(ctx, msgs)
}

// quarantine publishes refused records, each with its rule and reason.
func (s *Service) quarantine(ctx context.Context, refused []verdict) error {
	msgs := make([]bus.Msg, len(refused))
	for i, v := range refused {
		q := &pb.Quarantined{
			Envelope: v.record.Envelope, Salt: v.record.Salt, ReceivedUnixNano: v.record.ReceivedUnixNano,
			Rule: string(v.Rule), Reason: text(v.Reason), IngressSeq: v.seq,
		}
		msgs[i] = bus.Msg{Subject: topic.Quarantine(s.cfg.District, string(v.Rule)), ID: "q-" + hex.EncodeToString(v.record.Salt), Data: wire.EncodeQuarantined(q)}
	}
	return s.publish(ctx, msgs)
}

// text makes a reason fit a protobuf string: what a decoder quotes of its input
// may be anything.
func text(s string) string {
	const most = 512
	if len(s) > most {
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "?")
}

// publishFor is how long publishing is tried within a session: well below the
// time for which NATS knows message ids, so that a repeat is never stored twice.
const publishFor = time.Minute

// publish stores all messages. It waits while a stream is full: that is
// consensus being behind, and everything is safe in INGRESS.
func (s *Service) publish(ctx context.Context, msgs []bus.Msg) error {
	began, told := time.Now(), false
	for wait := retryFirst; len(msgs) > 0; {
		n := min(len(msgs), bus.MaxAll)
		err := s.cfg.Bus.PublishAll(ctx, msgs[:n])
		if err == nil {
			msgs, wait, began = msgs[n:], retryFirst, time.Now()
			continue
		}
		full := errors.Is(err, bus.ErrFull)
		if kind.Of(err) != kind.Unavailable || !full && time.Since(began) > publishFor {
			return err
		}
		if full && len(msgs[:n]) == 1 {
			began = time.Now() // certainly not stored
		}
		if !told {
			told = true
			s.log.Warn("outcome not stored yet, trying again", "subject", msgs[0].Subject, "err", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
	return nil
}

// bury puts a message that is no batch with the dead letters.
func (s *Service) bury(ctx context.Context, seq uint64, m jetstream.Msg, cause error) error {
	s.log.Error("message in INGRESS is no batch of records", "seq", seq, "err", cause)
	h := map[string][]string{
		bus.HeaderDeadStream: {topic.IngressStream}, bus.HeaderDeadSeq: {fmt.Sprint(seq)},
		bus.HeaderDeadSubject: {m.Subject()}, bus.HeaderDeadRule: {string(validate.RuleSchema)},
		bus.HeaderDeadReason: {fmt.Sprintf("%q", text(cause.Error()))},
	}
	err := s.publish(ctx, []bus.Msg{{
		Subject: topic.Dead(s.cfg.District, topic.ValidationDurable),
		ID:      fmt.Sprintf("%s/%s/%d", topic.IngressStream, topic.ValidationDurable, seq), Data: m.Data(), Header: h,
	}})
	if err == nil {
		s.counters.add(func(c *Counts) { c.Dead++ })
	}
	return err
}
