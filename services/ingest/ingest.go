package ingest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// Config configures a [Service].
type Config struct {
	// District whose records are taken. Required.
	District traffic.DistrictID
	// Bus of the district, its streams declared. Required.
	Bus *bus.Bus
	// Now gives the time at which a record is said to have been received; nil
	// means time.Now. Delays and waits are by the wall clock whatever it says.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
	// MaxBatch is the most records in one message; 0 means 256.
	MaxBatch int
	// MaxBatchBytes is when a message is full by size; 0 means 1 MiB. A batch is a
	// request to consensus, which must move it in one piece.
	MaxBatchBytes int
	// MaxDelay is the longest that a record waits for others; 0 means 5 ms.
	MaxDelay time.Duration
	// MaxPending bounds the records taken and not yet answered; 0 means 8192.
	MaxPending int
	// MaxPendingBytes bounds their size; 0 means 64 MiB.
	MaxPendingBytes int
	// MaxRecord bounds one canonical envelope, bytes; 0 means, and it must not be
	// more than, identity.MaxEnvelope.
	MaxRecord int
	// InFlight is how many batches may be on their way to the stream; 0 means 4.
	InFlight int
	// StoreWait is how long a batch that cannot be stored is tried again before
	// its senders are told busy; 0 means 3 s.
	StoreWait time.Duration
	// MaxBehind is how long ago, by the wall clock, the oldest message may have been
	// stored that is not decided yet; when it is longer ago, senders are told busy.
	// 0 means 5 minutes. Validators refuse what is 50 minutes old.
	MaxBehind time.Duration
	// Rand gives salts; nil means crypto/rand.
	Rand io.Reader
	// Batch bounds requests that carry many records.
	Batch BatchLimits
	// Device returns whose device's a key is, by the registry; known is false where
	// the registry does not have the key, and the id empty where the key is nobody's
	// that is a device. What comes on a device's own topic must then be signed by
	// that device. It must be quick and safe for concurrent use. Optional: then
	// only validation finds out.
	Device func(identity.KeyID) (id traffic.DeviceID, known bool)
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.District == "" {
		errs = append(errs, errors.New("ingest: District: must not be empty"))
	}
	if c.Bus == nil {
		errs = append(errs, errors.New("ingest: Bus: must be given"))
	}
	for _, f := range []struct {
		name       string
		value, max int64
	}{
		{"MaxBatch", int64(c.MaxBatch), 4096}, {"MaxBatchBytes", int64(c.MaxBatchBytes), topic.MaxMessage - overhead - identity.MaxEnvelope},
		{"MaxDelay", int64(c.MaxDelay), int64(time.Second)}, {"MaxPending", int64(c.MaxPending), 1 << 24},
		{"MaxPendingBytes", int64(c.MaxPendingBytes), 1 << 40}, {"MaxRecord", int64(c.MaxRecord), identity.MaxEnvelope},
		{"InFlight", int64(c.InFlight), 256}, {"StoreWait", int64(c.StoreWait), int64(time.Hour)},
		{"MaxBehind", int64(c.MaxBehind), int64(time.Hour)},
	} {
		if f.value < 0 || f.value > f.max {
			errs = append(errs, fmt.Errorf("ingest: %s: %d, must be 0 to %d", f.name, f.value, f.max))
		}
	}
	return errors.Join(append(errs, c.Batch.validate(c.MaxRecord))...)
}

// overhead is more than a record adds to its envelope in a batch: salt, time,
// tags and lengths.
const overhead = 64

func or[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// Reasons why a record was not stored, as counted.
const (
	// Refused.
	ReasonSize        = "size"
	ReasonEmpty       = "empty"
	ReasonEnvelope    = "envelope"
	ReasonKind        = "kind"
	ReasonHeader      = "header"
	ReasonContentType = "content-type"
	ReasonBody        = "body" // could not be read to its end
	ReasonDevice      = "not-its-device"

	// Busy.
	ReasonQueueFull   = "queue-full"
	ReasonStreamFull  = "stream-full"
	ReasonTurn        = "out-of-turn"
	ReasonUnavailable = "store-unavailable"
	ReasonBehind      = "behind-a-failure"
	ReasonUnknown     = "not-known-whether-stored"
	ReasonStopped     = "not-running"
	ReasonUndecided   = "decisions-behind"
	ReasonRate        = "too-fast" // by MQTT; it is not even told
)

// Counts says what became of everything that was received since the start:
// Received is the sum of Stored, Again, Refused, Busy and Pending.
type Counts struct {
	Received uint64
	// Stored answers of stored, to the first request for a record.
	Stored uint64
	// Again are answers of stored to further requests with the same bytes.
	Again uint64
	// Refused and Busy answers, by reason.
	Refused, Busy map[string]uint64
	// Pending requests have no answer yet.
	Pending uint64
	// Doors says the same by where requests came in: one of the Door constants.
	Doors map[string]DoorCounts
	// Batches and Bytes stored in the stream.
	Batches, Bytes uint64
	// Lost requests were dropped by the NATS client because we were too slow; the
	// sender gets no answer and sends again. They are not in Received.
	Lost uint64
}

// Doors by which records come. Whoever holds records for a sender and tries them
// again while we are busy is counted for each try, as a sender on NATS is.
const (
	DoorNATS  = "nats"
	DoorHTTP  = "http"  // single records
	DoorBatch = "batch" // many in one request, by HTTP or gRPC
	DoorGRPC  = "grpc"  // streams
	DoorMQTT  = "mqtt"  // devices on their own topics
)

// DoorCounts counts requests with one record, and answers to them. What is
// neither has no answer yet.
type DoorCounts struct{ Received, Stored, Refused, Busy uint64 }

// at returns the counts of a door. Caller holds mu.
func (s *Service) at(door string) *DoorCounts {
	c := s.doors[door]
	if c == nil {
		c = &DoorCounts{}
		s.doors[door] = c
	}
	return c
}

// Service takes records. Make it with [New], run it with [Service.Run].
type Service struct {
	Config
	log *slog.Logger

	kick  chan struct{} // tells the writer that the queue has changed
	ready chan struct{} // closed when records are taken for the first time

	mu       sync.Mutex
	started  bool   // Run has been called and has not returned
	running  bool   // records are taken
	behind   string // why no new records are taken, by the guard; mostly empty
	counts   Counts // but for Pending and Doors
	doors    map[string]*DoorCounts
	queue    []*record
	queued   int                     // bytes in queue
	held     int                     // records queued or on their way
	heldSize int                     // their bytes
	known    map[ledger.Hash]*record // by SHA-256 of the envelope: pending, and the newest stored
	stored   ring[ledger.Hash]       // bounds the stored ones in known
	sessions map[string]*session     // by subject and session id
	sessAge  ring[string]            // bounds sessions
	sub      *nats.Subscription
	devSub   *nats.Subscription // of devices' own topics

	lanes   lanes         // a lock of its own, never held with mu
	batches chan struct{} // requests with many records that are in hand
}

const (
	rememberStored   = 1 << 16
	rememberSessions = 1 << 16
)

// record is one record on its way, and what is remembered of it afterwards.
type record struct {
	digest     ledger.Hash
	envelope   []byte // nil once stored
	salt       ledger.Salt
	salted     bool        // the sender has drawn the salt
	commitment ledger.Hash // set once stored
	done       bool
	waiters    []waiter
	arrived    time.Time // wall clock
	received   int64     // Config.Now, nanoseconds
}

// maxWaiters bounds the requests that wait for one record: the bounds of the
// queue do not count those that bring the same bytes again.
const maxWaiters = 64

// waiter is one request for a record.
type waiter struct {
	first   bool
	door    string
	session *session // nil if the request has no place in one
	number  uint64
	answer  func(answer)
}

// answer is what a sender is told.
type answer struct {
	status     pb.Receipt_Status
	reason     string // one of the Reason constants; empty if stored
	text       string
	salt       ledger.Salt
	commitment ledger.Hash
}

func (a answer) receipt() *pb.Receipt {
	// The text may quote what the sender wrote, and must be text to be sent.
	r := &pb.Receipt{Status: a.status, Reason: strings.ToValidUTF8(a.text, "\uFFFD")}
	if a.status == pb.Receipt_STATUS_STORED {
		r.Commitment, r.Salt = a.commitment[:], a.salt[:]
	}
	return r
}

// session is what is known of one numbered row of records, see bus.Sender.
type session struct{ next uint64 }

// turn is a record's place in a session; the zero value has none.
type turn struct {
	session      string   // of a sender elsewhere, or
	own          *session // of a row of this process
	number, base uint64
	door         string
	salt         *ledger.Salt // that the sender has drawn, or nil
}

// New returns a service that is not running yet.
func New(c Config) (*Service, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c.MaxBatch = or(c.MaxBatch, 256)
	c.MaxBatchBytes = or(c.MaxBatchBytes, 1<<20)
	c.MaxDelay = or(c.MaxDelay, 5*time.Millisecond)
	c.MaxPending = or(c.MaxPending, 8192)
	c.MaxPendingBytes = or(c.MaxPendingBytes, 64<<20)
	c.MaxRecord = or(c.MaxRecord, identity.MaxEnvelope)
	c.InFlight = or(c.InFlight, 4)
	c.StoreWait = or(c.StoreWait, 3*time.Second)
	c.MaxBehind = or(c.MaxBehind, 5*time.Minute)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Batch = c.Batch.orDefaults()
	return &Service{
		doors: map[string]*DoorCounts{}, batches: make(chan struct{}, c.Batch.Requests),
		Config: c, log: c.Logger, kick: make(chan struct{}, 1), ready: make(chan struct{}),
		counts:   Counts{Refused: map[string]uint64{}, Busy: map[string]uint64{}},
		known:    map[ledger.Hash]*record{},
		sessions: map[string]*session{},
		stored:   ring[ledger.Hash]{max: rememberStored}, sessAge: ring[string]{max: rememberSessions},
	}, nil
}

// Counts returns a snapshot.
func (s *Service) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts
	c.Refused, c.Busy = maps.Clone(c.Refused), maps.Clone(c.Busy)
	c.Doors = make(map[string]DoorCounts, len(s.doors))
	for d, n := range s.doors {
		c.Doors[d] = *n
	}
	c.Pending = c.Received - c.Stored - c.Again
	for _, m := range []map[string]uint64{c.Refused, c.Busy} {
		for _, n := range m {
			c.Pending -= n
		}
	}
	if s.sub != nil {
		n, err1 := s.sub.Dropped()
		m, err2 := s.devSub.Dropped()
		if err1 == nil && err2 == nil { // else they are closed
			s.counts.Lost = uint64(n + m)
		}
	}
	c.Lost = s.counts.Lost
	return c
}

// Run takes and stores records until ctx ends, after it has read back which are
// stored already. It then takes no more, stores what it has taken, and answers
// every sender before it returns. It fails only if the connection is closed for
// good.
func (s *Service) Run(ctx context.Context) error {
	nc := s.Bus.NC
	closed := nc.StatusChanged(nats.CLOSED)
	defer nc.RemoveStatusListener(closed)

	s.mu.Lock()
	if s.started {
		s.mu.Unlock()
		return kind.Errorf(kind.Conflict, "ingest: is running already")
	}
	s.started = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.started = false
		s.mu.Unlock()
	}()
	s.recall(ctx, closed)
	g := &guard{s: s, looked: time.Now()}
	g.look(ctx)
	watch, unwatch := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		g.loop(watch)
	}()
	defer func() {
		unwatch()
		<-watched
	}()
	s.mu.Lock()
	s.running = true
	s.mu.Unlock()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		(&writer{s: s, stop: stop}).loop()
	}()
	err := s.listen(ctx, closed)
	s.mu.Lock()
	s.running = false
	s.mu.Unlock()
	close(stop)
	<-done
	return err
}

// inboxBytes bounds what the NATS client holds for us.
const inboxBytes = 256 << 20

// listen takes records from NATS until ctx ends.
func (s *Service) listen(ctx context.Context, closed <-chan nats.Status) error {
	var subs []*nats.Subscription
	var drained []chan struct{}
	for _, from := range []struct {
		subject string
		f       nats.MsgHandler
	}{{topic.InboxAll(s.District), s.request}, {topic.DeviceUpAll(s.District), s.fromDevice}} {
		sub, err := s.Bus.NC.QueueSubscribe(from.subject, topic.InboxQueue, from.f)
		if err == nil {
			end := make(chan struct{})
			sub.SetClosedHandler(func(string) { close(end) })
			subs, drained = append(subs, sub), append(drained, end)
			err = sub.SetPendingLimits(4*s.MaxPending, inboxBytes)
		}
		if err != nil {
			return kind.Errorf(kind.Unavailable, "ingest: listening on %s: %w", from.subject, err)
		}
	}
	s.mu.Lock()
	first := s.sub == nil
	s.sub, s.devSub = subs[0], subs[1]
	s.mu.Unlock()
	if first {
		close(s.ready)
	}
	select {
	case <-ctx.Done():
	case <-closed:
		return kind.Errorf(kind.Unavailable, "ingest: listening on %s: %w", subs[0].Subject, nats.ErrConnectionClosed)
	}
	s.Counts() // notes what was lost, for the last time
	for _, sub := range subs {
		if err := sub.Drain(); err != nil { // no more requests come; those here are taken
			return kind.Errorf(kind.Unavailable, "ingest: listening on %s: %w", sub.Subject, err)
		}
	}
	late := time.After(s.StoreWait)
	for i, sub := range subs {
		select {
		case <-drained[i]:
		case <-late:
			s.log.Warn("ingest: inbox not drained in time", "subject", sub.Subject)
			return nil
		}
	}
	return nil
}

// Ready returns a channel that is closed when Run takes records, over HTTP and
// over NATS.
func (s *Service) Ready() <-chan struct{} { return s.ready }

// Listening reports whether the service takes requests from NATS, and the
// server knows it.
func (s *Service) Listening() bool {
	s.mu.Lock()
	sub, dev := s.sub, s.devSub
	s.mu.Unlock()
	return sub != nil && sub.IsValid() && dev.IsValid() && s.Bus.NC.FlushTimeout(s.StoreWait) == nil
}

// request takes one record from NATS.
func (s *Service) request(m *nats.Msg) {
	to, subject := m.Reply, m.Subject // not m, whose data would be held until the answer
	reply := func(a answer) {
		if to == "" {
			return
		}
		b, err := proto.Marshal(a.receipt())
		if err == nil {
			err = s.Bus.NC.Publish(to, b)
		}
		if err != nil {
			s.log.Warn("ingest: cannot answer a sender", "subject", subject, "err", err)
		}
	}
	t, ref := turnOf(m)
	t.door = DoorNATS
	var envelope []byte
	if ref == nil {
		var e identity.Envelope
		envelope, e, ref = s.canonical(m.Data)
		// NATS permissions say who may publish which kind: the envelope must not
		// say another.
		if want := topic.Inbox(s.District, string(e.Kind), ""); ref == nil && !strings.HasPrefix(m.Subject, want[:len(want)-1]) {
			ref = &refusal{reason: ReasonKind, field: "kind", text: fmt.Sprintf("kind: the envelope says %s, the subject %s does not", e.Kind, m.Subject)}
		}
		if ref == nil {
			t.salt, ref = saltOf(m, e.Kind)
		}
	}
	if ref != nil {
		s.refuse(t, ref, reply)
		return
	}
	s.take(envelope, t, reply)
}

// turnOf reads the headers of bus.Sender.
func turnOf(m *nats.Msg) (turn, *refusal) {
	id := m.Header.Get(bus.HeaderSession)
	if id == "" {
		return turn{}, nil
	}
	n, err1 := strconv.ParseUint(m.Header.Get(bus.HeaderNumber), 10, 64)
	base, err2 := strconv.ParseUint(m.Header.Get(bus.HeaderBase), 10, 64)
	if err1 != nil || err2 != nil || base > n || n == 0 || len(id) > 64 {
		return turn{}, &refusal{reason: ReasonHeader, field: bus.HeaderNumber, text: fmt.Sprintf(
			"%s, %s: must be decimal numbers from 1, the first not below the second, with a session of at most 64 bytes", bus.HeaderNumber, bus.HeaderBase)}
	}
	return turn{session: m.Subject + " " + id, number: n, base: base}, nil
}

// saltOf reads the salt that a sender has drawn, nil for none. Only the gateway's
// kinds may bring one: a receipt for a reading is given before ingest has it. A
// device that chose its salts could make one that others can guess.
func saltOf(m *nats.Msg, k identity.RecordKind) (*ledger.Salt, *refusal) {
	h := m.Header.Get(bus.HeaderSalt)
	if h == "" {
		return nil, nil
	}
	if k != identity.KindAccess && k != identity.KindRequest && k != identity.KindOverride {
		return nil, &refusal{reason: ReasonHeader, field: bus.HeaderSalt, text: fmt.Sprintf("%s: a %s may not bring its own", bus.HeaderSalt, k)}
	}
	b, err := hex.DecodeString(h)
	if err != nil || len(b) != len(ledger.Salt{}) {
		return nil, &refusal{reason: ReasonHeader, field: bus.HeaderSalt, text: bus.HeaderSalt + ": must be 64 hex digits"}
	}
	return (*ledger.Salt)(b), nil
}

// refusal says that a request can never be taken.
type refusal struct {
	reason, field, text string
}

// refuse makes a refusal of an error that begins with the field's name.
func refuse(reason string, err error) *refusal {
	text := strings.TrimPrefix(err.Error(), identity.ErrEnvelope.Error()+": ")
	field, _, _ := strings.Cut(text, " ")
	switch field = strings.TrimSuffix(field, ":"); field {
	case "kind", "content_type", "key_id", "payload", "signature":
	default:
		field = "body"
	}
	return &refusal{reason, field, text}
}

// refuse answers a request that will never be taken.
func (s *Service) refuse(t turn, r *refusal, reply func(answer)) {
	s.mu.Lock()
	s.counts.Received++
	s.counts.Refused[r.reason]++
	s.at(t.door).Received++
	s.at(t.door).Refused++
	// It was this record's turn, and it has been answered for good.
	if sess := s.sessions[t.session]; sess != nil && sess.next == t.number {
		sess.next++
	}
	s.mu.Unlock()
	reply(answer{status: pb.Receipt_STATUS_REFUSED, reason: r.reason, text: r.text})
}

// take queues a record, or answers at once. envelope is canonical and must not
// be changed any more.
func (s *Service) take(envelope []byte, t turn, reply func(answer)) {
	digest := sha256.Sum256(envelope)
	now := s.Now()
	s.mu.Lock()
	s.counts.Received++
	door := s.at(t.door)
	door.Received++
	busy := func(reason, format string, args ...any) {
		s.counts.Busy[reason]++
		door.Busy++
		s.mu.Unlock()
		reply(answer{status: pb.Receipt_STATUS_BUSY, reason: reason, text: fmt.Sprintf(format, args...)})
	}
	sess, inTurn := s.look(t)
	if r := s.known[digest]; r != nil {
		switch {
		case r.done:
			if inTurn {
				s.advance(sess, t)
			}
			s.counts.Again++
			door.Stored++
			s.mu.Unlock()
			reply(answer{status: pb.Receipt_STATUS_STORED, salt: r.salt, commitment: r.commitment})
		case len(r.waiters) >= maxWaiters:
			busy(ReasonQueueFull, "queue: %d requests wait for this record, no more are held", maxWaiters)
		default:
			w := waiter{door: t.door, number: t.number, answer: reply}
			if inTurn {
				w.session = s.advance(sess, t)
			}
			r.waiters = append(r.waiters, w)
			s.mu.Unlock()
		}
		return
	}
	switch {
	case !s.running:
		busy(ReasonStopped, "ingest is not running")
		return
	case s.behind != "":
		busy(ReasonUndecided, "%s", s.behind)
		return
	case !inTurn:
		busy(ReasonTurn, "record %d came before its turn", t.number)
		return
	case s.held >= s.MaxPending:
		busy(ReasonQueueFull, "queue: %d records wait, at most %d are held", s.held, s.MaxPending)
		return
	case s.heldSize+len(envelope) > s.MaxPendingBytes:
		busy(ReasonQueueFull, "queue: %d bytes wait, at most %d are held", s.heldSize, s.MaxPendingBytes)
		return
	}
	r := &record{
		digest: digest, envelope: envelope, arrived: time.Now(), received: now.UnixNano(),
		waiters: []waiter{{first: true, door: t.door, session: s.advance(sess, t), number: t.number, answer: reply}},
	}
	if t.salt != nil {
		r.salt, r.salted = *t.salt, true
	}
	s.known[digest] = r
	s.held++
	s.heldSize += len(envelope)
	s.queued += len(envelope) + overhead
	s.queue = append(s.queue, r)
	wake := len(s.queue) == 1 || s.full()
	s.mu.Unlock()
	if wake {
		select {
		case s.kick <- struct{}{}:
		default:
		}
	}
}

// look reports whether it is a record's turn. Caller holds mu.
func (s *Service) look(t turn) (*session, bool) {
	if t.own != nil {
		return t.own, t.number <= t.own.next || t.number == t.base
	}
	if t.session == "" {
		return nil, true
	}
	sess := s.sessions[t.session]
	if sess == nil {
		return nil, t.number == t.base // all before it has been answered, by an earlier run of ours or another instance
	}
	return sess, t.number <= sess.next || t.number == t.base
}

// advance notes that a record was taken in its turn. Caller holds mu.
func (s *Service) advance(sess *session, t turn) *session {
	if t.session == "" && t.own == nil {
		return nil
	}
	if sess == nil {
		sess = &session{}
		s.sessions[t.session] = sess
		if old, ok := s.sessAge.push(t.session); ok {
			delete(s.sessions, old)
		}
	}
	sess.next = max(sess.next, t.number+1)
	return sess
}

// full reports whether the queue fills a batch. Caller holds mu.
func (s *Service) full() bool {
	return len(s.queue) >= s.MaxBatch || s.queued >= s.MaxBatchBytes
}

// ring remembers the newest max values.
type ring[T any] struct {
	max  int
	v    []T
	next int
}

// push adds a value and returns the one that had to go.
func (r *ring[T]) push(v T) (old T, ok bool) {
	if len(r.v) < r.max {
		r.v = append(r.v, v)
		return old, false
	}
	old, r.v[r.next] = r.v[r.next], v
	r.next = (r.next + 1) % r.max
	return old, true
}
