package bus

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Headers by which ingest keeps a sender's order though many of its records are
// on their way: they are numbered in a session, and ingest takes number n only
// after n-1, or where n is the base, before which everything has been answered.
// A record that does not come in its turn is answered busy, and sent again.
const (
	HeaderSession = "Stopline-Session" // random, new for each [Sender] and inbox
	HeaderNumber  = "Stopline-Number"  // from 1
	HeaderBase    = "Stopline-Base"    // lowest number not answered for good
	// HeaderSalt, 64 hex digits, is a salt that the sender has drawn: the gateway
	// gives receipts for readings before ingest has them.
	HeaderSalt = "Stopline-Salt"
)

// SenderConfig configures a [Sender].
type SenderConfig struct {
	Bus *Bus
	// Window bounds records on their way and unanswered, for each inbox; 0 means
	// 64. Order holds whatever it is.
	Window int
	// Queue bounds records waiting for the window or an answer, for each inbox; 0
	// means 4096.
	Queue int
	// Timeout is how long to wait for an answer before sending again; 0 means 2 s.
	Timeout time.Duration
	// Logger is optional.
	Logger *slog.Logger
}

// Sender sends records to ingest until each is answered for good: stored or
// refused. Busy, silence and a lost connection are not answers; the record is
// sent again. Records of one district, kind and source are stored in the order
// in which they were given to the Sender. Safe for concurrent use.
type Sender struct {
	SenderConfig
	inbox string
	sub   *nats.Subscription

	calls sync.WaitGroup // callbacks to come

	// Locks nest: lane.mu, then mu.
	mu     sync.Mutex
	closed bool
	lanes  map[string]*lane
	waits  map[uint64]*entry // by the id in the reply subject
	last   uint64
}

// lane is the queue to one inbox.
type lane struct {
	s       *Sender
	subject string
	session string

	mu       sync.Mutex
	queue    []*entry // in order; the head is the oldest without a final answer
	next     uint64   // number of the newest entry
	sent     int      // queue[:sent] have been sent in this round
	flying   int      // of which unanswered
	holding  bool     // a round has failed: send nothing until it is over
	backoff  time.Duration
	timer    *time.Timer
	armed    armed    // what timer waits for
	out      []func() // callbacks due
	draining bool     // somebody is calling them
}

// armed says what a lane's timer waits for.
type armed byte

const (
	armedNot     armed = iota
	armedTimeout       // answers
	armedPause         // the next round
)

type entry struct {
	lane *lane
	id   uint64
	n    uint64
	data []byte
	salt string // header, empty for none
	done func(*pb.Receipt, error)
	// Of the entry's ctx: whether it has ended, and what ends the watch on it.
	ended func() error
	stop  func() bool

	// Guarded by lane.mu.
	flying  bool
	try     int
	sentAt  time.Time
	final   bool
	receipt *pb.Receipt
	err     error
}

// NewSender returns a Sender over c.Bus. Close it before the bus.
func NewSender(c SenderConfig) (*Sender, error) {
	var errs []error
	if c.Bus == nil {
		errs = append(errs, errors.New("bus: Sender.Bus: must be given"))
	}
	if c.Window < 0 || c.Queue < 0 || c.Timeout < 0 {
		errs = append(errs, errors.New("bus: Sender.Window, Queue, Timeout: must not be negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if c.Window == 0 {
		c.Window = 64
	}
	if c.Queue == 0 {
		c.Queue = 4096
	}
	if c.Timeout == 0 {
		c.Timeout = 2 * time.Second
	}
	c.Logger = orDiscard(c.Logger)
	s := &Sender{SenderConfig: c, inbox: c.Bus.NC.NewInbox(), lanes: map[string]*lane{}, waits: map[uint64]*entry{}}
	var err error
	if s.sub, err = c.Bus.NC.Subscribe(s.inbox+".>", s.answered); err != nil {
		return nil, kind.Errorf(kindOf(err), "bus: sender: %w", err)
	}
	return s, nil
}

// Send sends one record and waits for its receipt, until ctx ends. The error is
// nil only if the record is stored; a refused one returns its receipt with an
// error of kind Invalid. An error of kind Unavailable that wraps [ErrUnknown]
// leaves open whether it was stored; sending the same bytes again is safe.
func (s *Sender) Send(ctx context.Context, district traffic.DistrictID, k identity.RecordKind, source string, envelope []byte) (*pb.Receipt, error) {
	type answer struct {
		r   *pb.Receipt
		err error
	}
	c := make(chan answer, 1)
	if err := s.SendAsync(ctx, district, k, source, envelope, func(r *pb.Receipt, err error) { c <- answer{r, err} }); err != nil {
		return nil, err
	}
	a := <-c
	return a.r, a.err
}

// SendAsync sends one record and calls done with what [Sender.Send] would
// return; for one inbox the calls come one after another, in order. It does not
// wait: an error, of kind Unavailable, says that the queue is full, the Sender
// closed or ctx at its end, and that done will not be called. envelope must not be changed before
// done is called.
func (s *Sender) SendAsync(ctx context.Context, district traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, done func(*pb.Receipt, error)) error {
	return s.sendAsync(ctx, district, k, source, envelope, "", done)
}

// SendSaltedAsync is [Sender.SendAsync] with a salt that the sender has drawn;
// ingest takes one for what the gateway signs. If the record was stored before,
// the receipt has the salt of then.
func (s *Sender) SendSaltedAsync(ctx context.Context, district traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, salt ledger.Salt, done func(*pb.Receipt, error)) error {
	return s.sendAsync(ctx, district, k, source, envelope, hex.EncodeToString(salt[:]), done)
}

func (s *Sender) sendAsync(ctx context.Context, district traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, salt string, done func(*pb.Receipt, error)) error {
	subject := topic.Inbox(district, string(k), source)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return kind.Errorf(kind.Unavailable, "bus: sending to %s: %w", subject, ErrClosed)
	}
	l := s.lanes[subject]
	if l == nil {
		l = &lane{s: s, subject: subject, session: nuid.Next()}
		s.lanes[subject] = l
	}
	s.mu.Unlock()

	l.mu.Lock()
	defer l.unlock()
	if len(l.queue) >= s.Queue {
		return kind.Errorf(kind.Unavailable, "bus: sending to %s: %d records wait already: %w", subject, len(l.queue), ErrFull)
	}
	// Those before it with the same ctx may be given up by now: to store this one
	// would be out of order.
	if ctx.Err() != nil {
		return kind.Errorf(kind.Unavailable, "bus: sending to %s: never sent: %w", subject, context.Cause(ctx))
	}
	l.next++
	e := &entry{lane: l, n: l.next, data: envelope, salt: salt, done: done, ended: ctx.Err}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return kind.Errorf(kind.Unavailable, "bus: sending to %s: %w", subject, ErrClosed)
	}
	s.last++
	e.id = s.last
	s.waits[e.id] = e
	s.calls.Add(1) // under mu and not closed: never after Wait
	s.mu.Unlock()
	l.queue = append(l.queue, e)
	e.stop = context.AfterFunc(ctx, func() { e.abandon(context.Cause(ctx)) })
	l.pump()
	return nil
}

// Close fails what is still unanswered, with [ErrClosed], and returns when all
// callbacks have returned. It must not be called by one.
func (s *Sender) Close() {
	s.mu.Lock()
	s.closed = true
	lanes := make([]*lane, 0, len(s.lanes))
	for _, l := range s.lanes {
		lanes = append(lanes, l)
	}
	s.mu.Unlock()
	if err := s.sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) && !errors.Is(err, nats.ErrBadSubscription) {
		s.Logger.Warn("bus: sender: cannot unsubscribe", "err", err)
	}
	for _, l := range lanes {
		l.mu.Lock()
		for _, e := range l.queue {
			l.finish(e, nil, l.lost(e, ErrClosed))
		}
		if l.timer != nil {
			l.timer.Stop()
		}
		l.pop()
		l.unlock()
	}
	s.calls.Wait()
}

// lost is the error of an entry that is given up.
func (l *lane) lost(e *entry, cause error) error {
	if e.try == 0 {
		return kind.Errorf(kind.Unavailable, "bus: sending to %s: never sent: %w", l.subject, cause)
	}
	return kind.Errorf(kind.Unavailable, "bus: sending to %s: %w after %d tries: %w", l.subject, ErrUnknown, e.try, cause)
}

func (e *entry) abandon(cause error) {
	l := e.lane
	l.mu.Lock()
	defer l.unlock()
	l.finish(e, nil, l.lost(e, cause))
	l.pump()
}

// finish gives an entry its final answer. Caller holds mu.
func (l *lane) finish(e *entry, r *pb.Receipt, err error) {
	if e.final {
		return
	}
	e.final, e.receipt, e.err = true, r, err
	if e.flying {
		e.flying = false
		l.flying--
	}
	if e.stop != nil {
		e.stop()
	}
	l.s.mu.Lock()
	delete(l.s.waits, e.id)
	l.s.mu.Unlock()
}

// pop takes what is answered off the head and notes the callbacks. Caller holds
// mu.
func (l *lane) pop() {
	i := 0
	for ; i < len(l.queue) && l.queue[i].final; i++ {
		e := l.queue[i]
		l.out = append(l.out, func() {
			defer l.s.calls.Done()
			e.done(e.receipt, e.err)
		})
		l.queue[i] = nil
	}
	l.queue = l.queue[i:]
	l.sent = max(l.sent-i, 0)
}

// unlock releases mu and calls the callbacks that are due, in order.
func (l *lane) unlock() {
	if l.draining {
		l.mu.Unlock()
		return
	}
	l.draining = true
	for len(l.out) > 0 {
		out := l.out
		l.out = nil
		l.mu.Unlock()
		for _, f := range out {
			f()
		}
		l.mu.Lock()
	}
	l.draining = false
	l.mu.Unlock()
}

// pump sends what the window allows, or ends a round that has failed. Caller
// holds mu.
func (l *lane) pump() {
	l.pop()
	if l.holding {
		if l.flying == 0 {
			l.arm(armedPause, l.pause()) // the round is over: begin the next one after a pause
		}
		return
	}
	window := l.s.Window
	if l.backoff > 0 {
		window = 1 // the last round failed: one asks whether it is over
	}
	for l.flying < window && l.sent < len(l.queue) {
		e := l.queue[l.sent]
		l.sent++
		if e.final || e.ended() != nil {
			continue // the latter is given up in a moment
		}
		if err := l.send(e); err != nil {
			if kind.Of(err) == kind.Invalid { // will never go
				l.finish(e, nil, err)
				l.pop()
				continue
			}
			l.s.Logger.Debug("bus: sender waits", "subject", l.subject, "err", err)
			l.hold()
			return
		}
	}
	if l.flying > 0 {
		l.arm(armedTimeout, l.s.Timeout)
	}
}

func (l *lane) send(e *entry) error {
	e.try++
	header := nats.Header{
		HeaderSession: {l.session},
		HeaderNumber:  {strconv.FormatUint(e.n, 10)},
		HeaderBase:    {strconv.FormatUint(l.queue[0].n, 10)},
	}
	if e.salt != "" {
		header[HeaderSalt] = []string{e.salt}
	}
	err := l.s.Bus.NC.PublishMsg(&nats.Msg{
		Subject: l.subject, Data: e.data, Header: header,
		Reply: l.s.inbox + "." + strconv.FormatUint(e.id, 10) + "." + strconv.Itoa(e.try),
	})
	if err != nil {
		return kind.Errorf(kindOf(err), "bus: sending to %s: %w", l.subject, err)
	}
	e.flying, e.sentAt = true, time.Now()
	l.flying++
	return nil
}

// hold ends the round: nothing is sent until all that is on its way has been
// answered or has timed out. Caller holds mu.
func (l *lane) hold() {
	if !l.holding {
		l.holding = true
		l.backoff = min(max(2*l.backoff, 5*time.Millisecond), 250*time.Millisecond)
	}
	if l.flying == 0 {
		l.arm(armedPause, l.pause())
	}
}

// pause is the wait before the next round: less up to a half, at random, so that
// those who lost the same server do not come back at once. Caller holds mu.
func (l *lane) pause() time.Duration { return l.backoff - rand.N(l.backoff/2+1) }

// arm sets the lane's timer, unless it waits for the same already: otherwise a
// steady sender would put the end off for ever. Caller holds mu.
func (l *lane) arm(what armed, d time.Duration) {
	if l.armed == what {
		return
	}
	l.armed = what
	if l.timer == nil {
		l.timer = time.AfterFunc(d, l.tick)
		return
	}
	l.timer.Reset(d)
}

// tick ends a wait for answers, or a pause between rounds. It may come late or
// twice and looks at what is the case.
func (l *lane) tick() {
	l.mu.Lock()
	defer l.unlock()
	l.armed = armedNot
	if l.flying > 0 {
		oldest := time.Duration(0)
		for _, e := range l.queue[:min(l.sent, len(l.queue))] {
			if e.flying {
				oldest = max(oldest, time.Since(e.sentAt))
			}
		}
		if oldest < l.s.Timeout {
			l.arm(armedTimeout, l.s.Timeout-oldest)
			return
		}
		l.s.Logger.Warn("bus: no receipt in time, sending again", "subject", l.subject, "count", l.flying, "elapsed", oldest)
		for _, e := range l.queue {
			e.flying = false
		}
		l.flying = 0
		l.hold()
		return
	}
	if l.holding {
		l.holding = false
		l.sent = 0
		l.pump()
	}
}

// answered takes a receipt.
func (s *Sender) answered(m *nats.Msg) {
	idText, tryText, _ := strings.Cut(strings.TrimPrefix(m.Subject, s.inbox+"."), ".")
	id, err1 := strconv.ParseUint(idText, 10, 64)
	try, err2 := strconv.Atoi(tryText)
	if err := errors.Join(err1, err2); err != nil {
		s.Logger.Warn("bus: sender: answer on an unknown subject", "subject", m.Subject, "err", err)
		return
	}
	s.mu.Lock()
	e := s.waits[id]
	s.mu.Unlock()
	if e == nil {
		return // answered before
	}
	var r pb.Receipt
	busy := m.Header.Get("Status") != "" // NATS says that nobody listens
	if !busy {
		if err := proto.Unmarshal(m.Data, &r); err != nil {
			s.Logger.Warn("bus: sender: receipt cannot be read, sending again", "subject", e.lane.subject, "err", err)
			busy = true
		}
	}
	l := e.lane
	l.mu.Lock()
	defer l.unlock()
	switch {
	case e.final:
	case !busy && r.Status == pb.Receipt_STATUS_STORED:
		l.backoff = 0
		l.finish(e, &r, nil)
	case !busy && r.Status == pb.Receipt_STATUS_REFUSED:
		l.backoff = 0
		l.finish(e, &r, kind.Errorf(kind.Invalid, "ingest refused the record: %s", r.Reason))
	case e.flying && e.try == try: // a late answer to an earlier try says nothing of this one
		e.flying = false
		l.flying--
		l.hold()
	}
	l.pump()
}
