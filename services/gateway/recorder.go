package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Recorder puts on record what agencies ask and read, before they are answered.
//
// A record is signed, salted and stored in the stream ACCESS, many in one message
// (group commit): from then on it is a promise, and the receipt names its
// commitment. A forwarder brings it to ingest, in order, and acknowledges it when
// ingest has it; after a crash it goes on where it was. So every receipt's
// commitment comes into the log, or its lack is the gateway's proven lie.
type Recorder struct {
	cfg RecorderConfig
	log *slog.Logger

	mu      sync.Mutex
	epoch   uint64
	turns   map[identity.RecordKind]uint64
	queue   []*recording
	lagging string // why nothing may be promised; empty: it may
	agreed  map[ledger.Hash]*awaiting
	counts  RecorderCounts
	// stored is the number of the newest message in the stream that is this
	// recorder's, handed that of the newest one that ingest has.
	stored, handed uint64

	kick  chan struct{}
	ready chan struct{}
}

// RecorderConfig configures a [Recorder].
type RecorderConfig struct {
	Bus      *bus.Bus
	District traffic.DistrictID
	// Name of this gateway, the id of its service in the registry; Key signs.
	Name string
	Key  ed25519.PrivateKey
	// Linger is how long a record waits for others; 2 ms.
	Linger time.Duration
	// MaxLag is how old the oldest record may be that ingest does not have yet
	// before nothing is promised any more; 20 minutes. The stream keeps an hour.
	MaxLag time.Duration
	// Now is the district's clock; time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// RecorderCounts count since the start.
type RecorderCounts struct {
	// Recorded are durable, Commits the messages that hold them, Forwarded those
	// that ingest has. Failed could not be made durable, and were not answered.
	Recorded, Commits, Forwarded, Failed uint64
	// Refused are those that ingest will never take: promises broken.
	Refused uint64
}

// maxCommit bounds the records of one message.
const maxCommit = 256

// recording is one record on its way to the disk.
type recording struct {
	kind     identity.RecordKind
	encode   func(traffic.Turn) []byte
	awaited  bool // somebody will call WaitAgreed
	done     chan struct{}
	envelope []byte
	salt     ledger.Salt
	promise  Promise
	err      error
}

// Promise is a record that is durable.
type Promise struct {
	Commitment ledger.Hash
	At         time.Time
}

// awaiting is for a record to be agreed.
type awaiting struct {
	done  chan struct{}
	index uint64
	at    time.Time // when somebody began to wait
}

// NewRecorder returns a recorder that has to be run.
func NewRecorder(c RecorderConfig) (*Recorder, error) {
	if c.Bus == nil || c.District == "" || c.Name == "" || len(c.Key) != ed25519.PrivateKeySize {
		return nil, errors.New("gateway: recorder: bus, district, name and key are needed")
	}
	if c.Linger == 0 {
		c.Linger = 2 * time.Millisecond
	}
	if c.MaxLag == 0 {
		c.MaxLag = 20 * time.Minute
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Recorder{cfg: c, log: c.Logger, turns: map[identity.RecordKind]uint64{}, agreed: map[ledger.Hash]*awaiting{},
		kick: make(chan struct{}, 1), ready: make(chan struct{})}, nil
}

// Counts returns the counts so far.
func (r *Recorder) Counts() RecorderCounts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}

// Ready is closed when records are taken.
func (r *Recorder) Ready() <-chan struct{} { return r.ready }

// Run commits and forwards until ctx ends.
func (r *Recorder) Run(ctx context.Context) error {
	sender, err := bus.NewSender(bus.SenderConfig{Bus: r.cfg.Bus, Window: 256, Logger: r.log})
	if err != nil {
		return err
	}
	defer sender.Close()
	// Without the stream nothing is promised, and so nothing answered: that ends
	// when it is there, and is no reason to end the gateway.
	for wait := time.Second; ; wait = min(2*wait, 10*time.Second) {
		err := r.begin(ctx)
		if err == nil {
			break
		}
		if ctx.Err() == nil {
			r.log.Error("gateway: readings cannot be put on record, and are not answered", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
	defer func() { // whoever comes later is told at once
		r.mu.Lock()
		r.epoch = 0
		r.mu.Unlock()
		r.fail(r.take(1<<30), kind.Errorf(kind.Unavailable, "recorder: stopped"))
	}()
	return run.All(ctx,
		run.Actor{Name: "commit", Run: r.commit},
		run.Actor{Name: "forward", Run: func(ctx context.Context) error { return r.forward(ctx, sender) }},
		run.Actor{Name: "lag", Run: r.watchLag},
	)
}

// begin draws an epoch above all that this gateway has used: above the clock,
// and above what its stream holds, should the clock have gone back.
func (r *Recorder) begin(ctx context.Context) error {
	epoch := uint64(max(r.cfg.Now().UnixMilli(), 1))
	s, err := r.cfg.Bus.JS.Stream(ctx, topic.AccessStream)
	if err != nil {
		return fmt.Errorf("gateway: stream %s: %w", topic.AccessStream, err)
	}
	var last uint64
	m, err := s.GetLastMsgForSubject(ctx, topic.Access(r.cfg.District, r.cfg.Name))
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
	case err != nil:
		return fmt.Errorf("gateway: stream %s: %w", topic.AccessStream, err)
	default:
		b, err := wire.DecodeBatch(m.Data)
		if err != nil {
			return fmt.Errorf("gateway: stream %s: %w", topic.AccessStream, err)
		}
		last = m.Sequence
		for _, rec := range b.Records {
			epoch = max(epoch, epochOf(wire.Candidate(rec.Envelope, rec.Salt))+1)
		}
	}
	handed := uint64(0)
	switch c, err := s.Consumer(ctx, topic.Token(r.cfg.Name)); {
	case errors.Is(err, jetstream.ErrConsumerNotFound): // the first start
	case err != nil:
		return fmt.Errorf("gateway: stream %s: %w", topic.AccessStream, err)
	default:
		i := c.CachedInfo()
		if handed = i.AckFloor.Stream; i.NumPending == 0 && i.NumAckPending == 0 {
			handed = last
		}
	}
	r.mu.Lock()
	r.epoch, r.stored, r.handed = epoch, last, handed
	r.mu.Unlock()
	close(r.ready)
	return nil
}

// Put makes a record durable. encode is called with its turn, in order. awaited
// says that [Recorder.WaitAgreed] will be called. An error of kind Unavailable means that there is no promise, and there must be no answer.
func (r *Recorder) Put(ctx context.Context, k identity.RecordKind, awaited bool, encode func(traffic.Turn) []byte) (Promise, error) {
	rec := &recording{kind: k, encode: encode, awaited: awaited, done: make(chan struct{})}
	r.mu.Lock()
	switch {
	case r.epoch == 0:
		r.mu.Unlock()
		return Promise{}, kind.Errorf(kind.Unavailable, "recorder: is not running")
	case r.lagging != "":
		r.mu.Unlock()
		return Promise{}, kind.Errorf(kind.Unavailable, "recorder: %s", r.lagging)
	case len(r.queue) >= 16*maxCommit:
		r.mu.Unlock()
		return Promise{}, kind.Errorf(kind.Unavailable, "recorder: %d records wait already", len(r.queue))
	}
	r.queue = append(r.queue, rec)
	full := len(r.queue) == 1 || len(r.queue) >= maxCommit
	r.mu.Unlock()
	if full {
		select {
		case r.kick <- struct{}{}:
		default:
		}
	}
	select {
	case <-rec.done:
		return rec.promise, rec.err
	case <-ctx.Done():
		// It may become durable all the same: then something is on record that was
		// not answered, which harms nobody.
		return Promise{}, kind.Errorf(kind.Unavailable, "recorder: %w", context.Cause(ctx))
	}
}

// commit stores what waits, one message at a time.
func (r *Recorder) commit(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			r.fail(r.take(1<<30), kind.Errorf(kind.Unavailable, "recorder: stopped"))
			return nil
		case <-r.kick:
		}
		for {
			if r.waiting() < maxCommit/4 { // few: others may come along
				select {
				case <-ctx.Done():
				case <-time.After(r.cfg.Linger):
				}
			}
			recs := r.take(maxCommit)
			if len(recs) == 0 {
				break
			}
			if err := r.store(ctx, recs); err != nil {
				r.log.Error("gateway: readings cannot be put on record; they are not answered", "records", len(recs), "err", err)
				r.fail(recs, kind.Errorf(kind.Unavailable, "recorder: %w", err))
			}
		}
	}
}

func (r *Recorder) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.queue)
}

// take returns up to n recordings, signed and salted in their turn.
func (r *Recorder) take(n int) []*recording {
	r.mu.Lock()
	defer r.mu.Unlock()
	n = min(n, len(r.queue))
	recs := append([]*recording(nil), r.queue[:n]...)
	r.queue = r.queue[n:]
	if len(r.queue) == 0 {
		r.queue = nil
	}
	for _, rec := range recs {
		r.turns[rec.kind]++
		payload := rec.encode(traffic.Turn{Epoch: r.epoch, Seq: r.turns[rec.kind]})
		rec.envelope = identity.Sign(r.cfg.Key, rec.kind, identity.Protobuf, payload).Marshal()
	}
	return recs
}

func (r *Recorder) fail(recs []*recording, err error) {
	r.mu.Lock()
	r.counts.Failed += uint64(len(recs))
	// Their numbers are used up; that shows as a gap. Nothing was promised.
	r.mu.Unlock()
	for _, rec := range recs {
		rec.err = err
		close(rec.done)
	}
}

func (r *Recorder) store(ctx context.Context, recs []*recording) error {
	b := &pb.Batch{}
	now := r.cfg.Now().UTC()
	for _, rec := range recs {
		if _, err := rand.Read(rec.salt[:]); err != nil {
			return err
		}
		rec.promise = Promise{Commitment: ledger.Commit(rec.salt, rec.envelope), At: now}
		if rec.awaited { // before it can be agreed
			r.expect(rec.promise.Commitment)
		}
		b.Records = append(b.Records, &pb.Record{Envelope: rec.envelope, Salt: rec.salt[:], ReceivedUnixNano: now.UnixNano()})
	}
	data := wire.EncodeBatch(b)
	id := ledger.RequestID(data)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	seq, err := r.cfg.Bus.PublishMsg(ctx, bus.Msg{Subject: topic.Access(r.cfg.District, r.cfg.Name), ID: hex.EncodeToString(id[:]), Data: data})
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.stored = max(r.stored, seq)
	r.counts.Recorded += uint64(len(recs))
	r.counts.Commits++
	r.mu.Unlock()
	for _, rec := range recs {
		close(rec.done)
	}
	return nil
}

// forward brings to ingest what is durable, in its order: a record that comes
// after a later one is refused for ever. So it begins after the last message up to
// which ingest has everything, whatever was handed out to an earlier run, and
// begins there again when one is missing.
func (r *Recorder) forward(ctx context.Context, sender *bus.Sender) error {
	for ctx.Err() == nil {
		if err := r.rewind(ctx); err != nil {
			if ctx.Err() == nil {
				r.log.Warn("gateway: cannot go back in the stream of readings yet", "err", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
			continue
		}
		if err := r.forwardOn(ctx, sender); err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// rewind has the consumer begin after what is acknowledged.
func (r *Recorder) rewind(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	name := topic.Token(r.cfg.Name)
	// Asked first: the server does not answer a reset of a consumer that is not
	// there.
	_, err := r.cfg.Bus.JS.Consumer(ctx, topic.AccessStream, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil // the first start makes it
	}
	if err == nil {
		_, err = r.cfg.Bus.JS.ResetConsumer(ctx, topic.AccessStream, name)
	}
	return err
}

// forwardOn forwards until ctx ends or a message is missing.
func (r *Recorder) forwardOn(ctx context.Context, sender *bus.Sender) error {
	ctx, again := context.WithCancel(ctx)
	defer again()
	last := uint64(0) // newest that was handed on
	c := bus.Consumer{District: r.cfg.District, Stream: topic.AccessStream, Durable: topic.Token(r.cfg.Name), Filter: topic.Access(r.cfg.District, r.cfg.Name),
		Batch: 16, AckWait: time.Minute, Manual: true}
	return r.cfg.Bus.Consume(ctx, c, func(work context.Context, msgs []*bus.Msg) error {
		for _, m := range msgs {
			if ctx.Err() != nil {
				return nil // it comes again
			}
			if r.skipped(ctx, last, m.Seq) {
				r.log.Warn("gateway: a message of readings is missing; going back", "after", last, "got", m.Seq)
				again()
				return nil
			}
			err := r.hand(ctx, sender, m)
			switch {
			case kind.Of(err) == kind.Invalid && err != nil:
				m.Fail(err)
			case err != nil:
				if ctx.Err() == nil {
					r.log.Warn("gateway: readings are not with ingest yet; going back", "seq", m.Seq, "err", err)
					select { // ingest says that it is busy
					case <-ctx.Done():
					case <-time.After(200 * time.Millisecond):
					}
				}
				again()
				return nil
			default:
				if err := m.Ack(); err != nil {
					again()
					return nil
				}
			}
			last = m.Seq
		}
		return nil
	})
}

// skipped reports whether a message of this gateway lies between two.
func (r *Recorder) skipped(ctx context.Context, last, got uint64) bool {
	if last == 0 || got <= last+1 {
		return false
	}
	// Other gateways' messages may lie between.
	s, err := r.cfg.Bus.JS.Stream(ctx, topic.AccessStream)
	if err != nil {
		return true
	}
	m, err := s.GetMsg(ctx, last+1, jetstream.WithGetMsgSubject(topic.Access(r.cfg.District, r.cfg.Name)))
	return err != nil || m.Sequence < got
}

// hand gives one message's records to ingest and waits for their receipts.
func (r *Recorder) hand(ctx context.Context, sender *bus.Sender, m *bus.Msg) error {
	b, err := wire.DecodeBatch(m.Data)
	if err != nil {
		return kind.Errorf(kind.Invalid, "gateway: access batch: %w", err) // to the dead letters
	}
	type answer struct {
		i   int
		r   *pb.Receipt
		err error
	}
	answers := make(chan answer, len(b.Records))
	for i, rec := range b.Records {
		e, err := identity.ParseEnvelope(rec.Envelope)
		if err != nil {
			return kind.Errorf(kind.Invalid, "gateway: access batch: records[%d]: %w", i, err)
		}
		err = sender.SendSaltedAsync(ctx, r.cfg.District, e.Kind, r.cfg.Name, rec.Envelope, ledger.Salt(rec.Salt), func(p *pb.Receipt, err error) { answers <- answer{i, p, err} })
		if err != nil {
			return kind.Errorf(kind.Unavailable, "gateway: forwarding: %w", err)
		}
	}
	var later error
	for range b.Records {
		var a answer
		select {
		case a = <-answers:
		case <-ctx.Done(): // they are sent again, and ingest knows those that it has
			return kind.Errorf(kind.Unavailable, "gateway: forwarding: %w", context.Cause(ctx))
		}
		switch {
		case a.err == nil:
			if want := ledger.Commit(ledger.Salt(b.Records[a.i].Salt), b.Records[a.i].Envelope); ledger.Hash(a.r.Commitment) != want {
				r.broken("ingest has the record under another commitment than was promised", want)
			}
		case a.r.GetStatus() == pb.Receipt_STATUS_REFUSED:
			r.broken(a.r.Reason, ledger.Commit(ledger.Salt(b.Records[a.i].Salt), b.Records[a.i].Envelope))
		default:
			later = kind.Errorf(kind.Unavailable, "gateway: forwarding: %w", a.err)
		}
	}
	if later != nil {
		return later // all again: ingest knows what it has
	}
	r.mu.Lock()
	r.counts.Forwarded += uint64(len(b.Records))
	r.handed = max(r.handed, m.Seq)
	r.mu.Unlock()
	return nil
}

// Flush waits until ingest has everything that is stored, or ctx ends.
func (r *Recorder) Flush(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		r.mu.Lock()
		done := r.handed >= r.stored || r.counts.Recorded == 0
		r.mu.Unlock()
		if done {
			return
		}
		select {
		case <-ctx.Done():
			r.log.Warn("gateway: what is on record is not with ingest yet; the next start brings it there")
			return
		case <-tick.C:
		}
	}
}

func (r *Recorder) broken(why string, commitment ledger.Hash) {
	r.log.Error("gateway: a promised record will not come into the log", "commitment", hex.EncodeToString(commitment[:]), "reason", why)
	r.mu.Lock()
	r.counts.Refused++
	r.mu.Unlock()
}

// watchLag stops promises while ingest does not take what was promised.
func (r *Recorder) watchLag(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	last, since := uint64(0), time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		r.mu.Lock()
		if r.handed >= r.stored || r.handed != last {
			since = time.Now()
		}
		lag := time.Since(since)
		last = r.handed
		if r.lagging = ""; lag > r.cfg.MaxLag {
			r.lagging = fmt.Sprintf("ingest has taken no reading for %s", lag.Round(time.Second))
		}
		for c, w := range r.agreed {
			if time.Since(w.at) > time.Hour {
				delete(r.agreed, c)
			}
		}
		r.mu.Unlock()
	}
}

// WaitAgreed waits until a promised record is in a decided block, and returns its
// leaf.
func (r *Recorder) WaitAgreed(ctx context.Context, p Promise) (uint64, error) {
	r.mu.Lock()
	w := r.agreed[p.Commitment]
	if w == nil {
		w = &awaiting{done: make(chan struct{}), at: time.Now()}
		r.agreed[p.Commitment] = w
	}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.agreed, p.Commitment)
		r.mu.Unlock()
	}()
	select {
	case <-w.done:
		return w.index, nil
	case <-ctx.Done():
		return 0, kind.Errorf(kind.Unavailable, "recorder: the record of this reading is not agreed yet, so it is not answered: %w", context.Cause(ctx))
	}
}

// expect has Decided note a record that somebody will wait for, should it be
// agreed before they do.
func (r *Recorder) expect(c ledger.Hash) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.agreed[c] == nil {
		r.agreed[c] = &awaiting{done: make(chan struct{}), at: time.Now()}
	}
}

// Decided is told of every accepted record of the gateway's kinds.
func (r *Recorder) Decided(commitment ledger.Hash, index uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.agreed[commitment]; w != nil {
		select {
		case <-w.done:
		default:
			w.index = index
			close(w.done)
		}
	}
}

// Receipt signs a promise: see AccessReceipt.
func (r *Recorder) Receipt(p Promise) *pb.AccessReceipt {
	return &pb.AccessReceipt{Commitment: p.Commitment[:], TimeUnixNano: p.At.UnixNano(), KeyId: string(identity.IDOf(r.cfg.Key.Public().(ed25519.PublicKey))),
		Signature: ed25519.Sign(r.cfg.Key, ReceiptInput(r.cfg.District, p))}
}

// ReceiptInput returns the bytes under an access receipt.
func ReceiptInput(d traffic.DistrictID, p Promise) []byte {
	b := append([]byte("stopline access receipt v1\n"+string(d)+"\n"), p.Commitment[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(p.At.UnixNano()))
}

// epochOf returns the epoch of one of the gateway's records.
func epochOf(c validate.Candidate) uint64 {
	switch {
	case c.Access != nil:
		return c.Access.Turn.Epoch
	case c.Request != nil:
		return c.Request.Turn.Epoch
	case c.Override != nil:
		return c.Override.Turn.Epoch
	}
	return 0
}
