package roadside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Inbox takes a signed envelope on its way into the log.
type Inbox interface {
	// Send returns nil when the envelope is stored. An error of kind Invalid
	// means that it was refused for good; any other, that nobody knows, and that
	// it is safe to send it again.
	Send(ctx context.Context, d traffic.DistrictID, k identity.RecordKind, source string, envelope []byte) (*pb.Receipt, error)
}

// Line is what else a unit needs from the district's network. [OnBus] makes one.
type Line interface {
	// Commands calls f for each envelope that comes as a command to the
	// junction, one after another, until ctx ends.
	Commands(ctx context.Context, f func(envelope []byte)) error
	// Status publishes what the unit says at once. It may be lost.
	Status(ctx context.Context, s *pb.Status) error
}

// RunConfig says how the shell of a unit runs. All times are by the wall clock.
type RunConfig struct {
	Inbox Inbox
	Line  Line
	// Now is the district's clock. Optional: time.Now.
	Now func() time.Time
	// Tick is the time between two ticks. Default 100 ms.
	Tick time.Duration
	// Ticks, if set, replaces the wall clock: the unit ticks once for each time
	// received, at that time. Run returns when it is closed.
	Ticks <-chan time.Time
	// Interval of periodic frames, by the district's clock. Default 1 s.
	Interval time.Duration
	// Queue bounds the frames that wait for a receipt. Default 600, ten minutes
	// of an idle junction. When it is full the oldest without events goes, and
	// is counted.
	Queue int
	// SendTimeout bounds the wait for one receipt. Default 2 s.
	SendTimeout time.Duration
	// RetryFirst and RetryMost bound the wait between two tries. Default 50 ms
	// and 1 s.
	RetryFirst, RetryMost time.Duration
	// Drain is how long, after the end, frames that wait may still be sent.
	// Default 2 s.
	Drain time.Duration
}

// commandQueue bounds the commands between the network and the unit: one a
// second is usual, so that more than these are an attack, and lost ones counted.
const commandQueue = 256

func (c *RunConfig) defaults() error {
	var errs []error
	if c.Inbox == nil {
		errs = append(errs, errors.New("inbox: must be set"))
	}
	if c.Line == nil {
		errs = append(errs, errors.New("line: must be set"))
	}
	if c.Queue < 0 {
		errs = append(errs, fmt.Errorf("queue: %d is negative", c.Queue))
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	for _, d := range []struct {
		name  string
		v     *time.Duration
		other time.Duration
	}{{"tick", &c.Tick, 100 * time.Millisecond}, {"interval", &c.Interval, time.Second}, {"send_timeout", &c.SendTimeout, 2 * time.Second},
		{"retry_first", &c.RetryFirst, 50 * time.Millisecond}, {"retry_most", &c.RetryMost, time.Second}, {"drain", &c.Drain, 2 * time.Second}} {
		if *d.v < 0 {
			errs = append(errs, fmt.Errorf("%s: %v is negative", d.name, *d.v))
		}
		if *d.v == 0 {
			*d.v = d.other
		}
	}
	if c.Queue == 0 {
		c.Queue = 600
	}
	return errors.Join(errs...)
}

// Run ticks, sends frames and takes commands until ctx ends. What then waits
// for a receipt is still sent for at most Drain.
func (u *Unit) Run(ctx context.Context, c RunConfig) error {
	if err := c.defaults(); err != nil {
		return fmt.Errorf("roadside unit %s: %w", u.cfg.Device, err)
	}
	q := newQueue(c.Queue)
	commands := make(chan []byte, commandQueue)
	return run.All(ctx,
		run.Actor{Name: "ticks", Run: func(ctx context.Context) error { return u.loop(ctx, c, q, commands) }},
		run.Actor{Name: "sender", Run: func(ctx context.Context) error { return u.send(ctx, c, q) }},
		run.Actor{Name: "commands", Run: func(ctx context.Context) error {
			return c.Line.Commands(ctx, func(e []byte) {
				select {
				case commands <- bytes.Clone(e):
				default:
					u.tally(func(n *Counters) { n.CommandsDropped++ })
				}
			})
		}},
	)
}

// loop owns the order of ticks, frames and commands.
func (u *Unit) loop(ctx context.Context, c RunConfig, q *queue, commands <-chan []byte) error {
	defer q.close()
	ticks := c.Ticks
	if ticks == nil {
		t := time.NewTicker(c.Tick)
		defer t.Stop()
		ticks = t.C
	}
	var lastFrame time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-commands:
			now := c.Now()
			res := u.Command(now, e)
			u.say(ctx, c, now, &res)
		case now, ok := <-ticks:
			if !ok {
				return nil
			}
			if c.Ticks == nil {
				now = c.Now()
			}
			t, err := u.Tick(now)
			if err != nil {
				// Counted; the next tick tries again, and the frame says what
				// the lamps really show.
				u.log.Error("tick", "intersection", u.cfg.Junction.ID, "err", err)
			}
			if t.Trip != nil || t.ModeChanged {
				u.say(ctx, c, now, nil)
			}
			var envelope []byte
			var f *traffic.Frame
			switch {
			// The clock may have been set back: then an interval begins anew.
			case now.Sub(lastFrame) >= c.Interval || now.Before(lastFrame):
				lastFrame = now.Truncate(c.Interval)
				envelope, f, err = u.Frame(now)
			case t.Changed || t.Trip != nil:
				envelope, f, err = u.EventFrame(now)
			default:
				continue
			}
			if err != nil {
				return fmt.Errorf("roadside unit %s: frame: %w", u.cfg.Device, err)
			}
			if lost := q.push(item{envelope, f.FrameKey, len(f.Events) > 0}); lost != nil {
				u.tally(func(n *Counters) { n.SendDropped++ })
				u.log.Warn("queue of frames is full, dropped one", "intersection", u.cfg.Junction.ID, "seq", lost.key.Seq)
			}
		}
	}
}

func (u *Unit) tally(f func(*Counters)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	f(&u.counters)
}

// say publishes the status, with what became of a command.
func (u *Unit) say(ctx context.Context, c RunConfig, now time.Time, res *traffic.CommandResult) {
	s := u.Status(now)
	m := &pb.Status{District: string(u.cfg.District), Junction: string(s.Junction), Device: string(s.Device),
		TimeUnixNano: now.UnixNano(), Signal: wire.SignalToProto(s.Signal)}
	if res != nil {
		m.Result = wire.ResultToProto(*res)
	}
	if err := c.Line.Status(ctx, m); err != nil {
		u.tally(func(n *Counters) { n.StatusErrors++ })
		u.log.Warn("status not published", "intersection", u.cfg.Junction.ID, "err", err)
	}
}

// send sends frames one after another: the district refuses a device's frames
// out of their order.
func (u *Unit) send(ctx context.Context, c RunConfig, q *queue) error {
	// The drain begins when ctx ends.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		t := time.NewTimer(c.Drain)
		defer t.Stop()
		select {
		case <-t.C:
			cancel()
		case <-work.Done():
		}
	})
	defer stop()
	for {
		it, ok := q.pop()
		if !ok {
			return nil // the loop has ended and everything is sent
		}
		for wait := c.RetryFirst; !u.deliver(work, c, it); wait = min(2*wait, c.RetryMost) {
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-work.Done():
				t.Stop()
				left := uint64(q.len() + 1)
				u.tally(func(n *Counters) { n.SendDropped += left })
				return fmt.Errorf("%d frames from %s on were not receipted before the end", left, it.key)
			}
			u.tally(func(n *Counters) { n.SendRetries++ })
		}
	}
}

// deliver sends one frame and reports whether that is settled.
func (u *Unit) deliver(ctx context.Context, c RunConfig, it item) bool {
	ctx, cancel := context.WithTimeout(ctx, c.SendTimeout)
	defer cancel()
	r, err := c.Inbox.Send(ctx, u.cfg.District, identity.KindFrame, string(u.cfg.Device), it.envelope)
	switch {
	case kind.Of(err) == kind.Invalid && err != nil:
		u.tally(func(n *Counters) { n.SendRefused++ })
		u.log.Error("frame refused", "intersection", u.cfg.Junction.ID, "seq", it.key.Seq, "err", err)
		return true
	case err != nil:
		u.log.Warn("frame not sent yet", "intersection", u.cfg.Junction.ID, "seq", it.key.Seq, "err", err)
		return false
	case len(r.GetSalt()) != len(ledger.Salt{}) || !bytes.Equal(r.GetCommitment(), commitment(r.GetSalt(), it.envelope)):
		u.tally(func(n *Counters) { n.BadReceipts++ })
		u.log.Error("receipt is not for the frame that was sent", "intersection", u.cfg.Junction.ID, "seq", it.key.Seq)
		return false
	}
	u.tally(func(n *Counters) { n.Stored++ })
	return true
}

func commitment(salt, envelope []byte) []byte {
	h := ledger.Commit(ledger.Salt(salt), envelope)
	return h[:]
}

type busLine struct {
	bus *bus.Bus
	d   traffic.DistrictID
	j   traffic.JunctionID
}

// OnBus returns the line of a junction's unit over the district's bus.
func OnBus(b *bus.Bus, d traffic.DistrictID, j traffic.JunctionID) Line { return busLine{b, d, j} }

func (l busLine) Commands(ctx context.Context, f func([]byte)) error {
	return l.bus.Subscribe(ctx, topic.Command(l.d, l.j), func(_ string, data []byte) { f(data) })
}

func (l busLine) Status(_ context.Context, s *pb.Status) error {
	return l.bus.Send(topic.Status(l.d, l.j), wire.EncodeStatus(s))
}
