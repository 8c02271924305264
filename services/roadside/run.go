package roadside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

// Inbox takes signed envelopes on their way into the log. bus.Sender is one.
type Inbox interface {
	// SendAsync sends one envelope, and sends it again for as long as nobody has
	// answered for good. It does not wait. Envelopes of one source are stored in
	// the order in which they were given, though many are on their way.
	//
	// done is called once, at the latest when ctx has ended: with no error when
	// the envelope is stored, with one of kind Invalid when it was refused for
	// good; with any other, nobody knows, and it is safe to send it again: then the
	// inbox is closed, or ctx has ended, and what is given after it is not sent. An
	// error returned means that it was not sent and done will not be called.
	SendAsync(ctx context.Context, d traffic.DistrictID, k identity.RecordKind, source string, envelope []byte, done func(*pb.Receipt, error)) error
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
	// Store keeps the frames that have no receipt; the caller closes it. Optional:
	// one in memory.
	Store *Store
	// Window bounds the frames on their way. Default [Window].
	Window int
	// RetryFirst and RetryMost bound the wait after the inbox has given up, less
	// up to a half, at random. Default 50 ms and 1 s.
	RetryFirst, RetryMost time.Duration
	// Drain is how long, after the end, frames that wait may still be sent.
	// Default 2 s. Those left stay in the store.
	Drain time.Duration
}

// Window is how many frames of one unit may be on their way: usually there is
// one, and after the network was away thousands want to go. One batch of ingest
// takes as many. The sender's own window, for each inbox, should be no smaller.
const Window = 256

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
	if c.Window < 0 {
		errs = append(errs, fmt.Errorf("window: %d is negative", c.Window))
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	for _, d := range []struct {
		name  string
		v     *time.Duration
		other time.Duration
	}{{"tick", &c.Tick, 100 * time.Millisecond}, {"interval", &c.Interval, time.Second},
		{"retry_first", &c.RetryFirst, 50 * time.Millisecond}, {"retry_most", &c.RetryMost, time.Second}, {"drain", &c.Drain, 2 * time.Second}} {
		if *d.v < 0 {
			errs = append(errs, fmt.Errorf("%s: %v is negative", d.name, *d.v))
		}
		if *d.v == 0 {
			*d.v = d.other
		}
	}
	if c.Window == 0 {
		c.Window = Window
	}
	return errors.Join(errs...)
}

// Run ticks, sends frames and takes commands until ctx ends. What then waits
// for a receipt is still sent for at most Drain, and stays in the store
// otherwise. Frames that a run before left there are sent first.
func (u *Unit) Run(ctx context.Context, c RunConfig) error {
	if err := c.defaults(); err != nil {
		return fmt.Errorf("roadside unit %s: %w", u.cfg.Device, err)
	}
	if c.Store == nil {
		var err error
		if c.Store, err = OpenStore(StoreConfig{Logger: u.log}); err != nil {
			return err
		}
	}
	if k, ok := c.Store.newest(); ok && k.epoch >= u.cfg.BootEpoch {
		// The district would take the old frames for new ones, and the new for old.
		return fmt.Errorf("roadside unit %s: boot_epoch: %d, the store holds frame %s of another boot: must be higher", u.cfg.Device, u.cfg.BootEpoch, k)
	}
	u.mu.Lock()
	u.store = c.Store
	u.mu.Unlock()
	err := u.run(ctx, c)
	if err := c.Store.flush(); err != nil {
		u.log.Error("frames cannot be written", "intersection", u.cfg.Junction.ID, "err", err)
	}
	if n := c.Store.left(); n > 0 && c.Store.durable() {
		u.log.Warn("frames without a receipt are kept for the next start", "intersection", u.cfg.Junction.ID, "count", n)
	} else if n > 0 {
		c.Store.abandon()
		err = errors.Join(err, fmt.Errorf("roadside unit %s: %d frames were not receipted before the end", u.cfg.Device, n))
	}
	return err
}

func (u *Unit) run(ctx context.Context, c RunConfig) error {
	commands := make(chan []byte, commandQueue)
	ended := make(chan struct{}) // the loop has; no more frames come
	return run.All(ctx,
		run.Actor{Name: "ticks", Run: func(ctx context.Context) error {
			defer close(ended)
			return u.loop(ctx, c, commands)
		}},
		run.Actor{Name: "sender", Run: func(ctx context.Context) error { return u.send(ctx, c, ended) }},
		run.Actor{Name: "store", Run: c.Store.run},
		run.Actor{Name: "commands", Run: func(ctx context.Context) error {
			return u.listen(ctx, c, func(e []byte) {
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
func (u *Unit) loop(ctx context.Context, c RunConfig, commands <-chan []byte) error {
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
			if res.Applied {
				if err := c.Store.command.obeyed(res.Seq); err != nil {
					u.log.Error("command's sequence not written", "intersection", u.cfg.Junction.ID, "seq", res.Seq, "err", err)
				}
			}
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
			cl := plain
			if len(f.Events) > 0 {
				cl = event
			}
			c.Store.put(key{f.BootEpoch, f.Seq}, cl, envelope)
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

// answer is what came back for a frame.
type answer struct {
	flight
	receipt *pb.Receipt
	err     error
}

// send sends frames in their order, several at once: the district refuses a
// device's frames out of it. Where the inbox gives one up, nothing is sent until
// all that are on their way have been answered; then it begins again with the
// oldest, alone, and with the others when that is through.
func (u *Unit) send(ctx context.Context, c RunConfig, ended <-chan struct{}) error {
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
	var (
		answers = make(chan answer, c.Window)
		flying  int
		window  = c.Window
		after   key  // everything up to here has been sent in this round
		failed  bool // this round
		wait    = c.RetryFirst
	)
	for {
		for !failed && flying < window && work.Err() == nil {
			f, ok := c.Store.next(after)
			if !ok {
				break
			}
			after = f.key
			err := c.Inbox.SendAsync(work, u.cfg.District, identity.KindFrame, string(u.cfg.Device), f.envelope,
				func(r *pb.Receipt, err error) { answers <- answer{f, r, err} }) // never waits: there is room for all
			if err != nil {
				failed = !u.settle(c, answer{f, nil, err})
				continue
			}
			flying++
		}
		if flying == 0 {
			switch {
			case work.Err() != nil:
				return nil
			case failed:
				t := time.NewTimer(wait - rand.N(wait/2+1))
				select {
				case <-t.C:
				case <-work.Done():
				}
				t.Stop()
				u.tally(func(n *Counters) { n.SendRetries++ })
				wait = min(2*wait, c.RetryMost)
				failed, after, window = false, key{}, 1
				continue
			}
		}
		if ended == nil && flying == 0 && c.Store.left() == 0 {
			return nil // everything is sent
		}
		done := work.Done()
		if flying > 0 {
			done = nil // each answers, also then
		}
		select {
		case a := <-answers:
			flying--
			if u.settle(c, a) {
				window, wait = c.Window, c.RetryFirst
			} else {
				failed = true
			}
		case <-c.Store.wake:
		case <-ended:
			ended = nil
		case <-done:
		}
	}
}

// settle takes the answer for a frame and reports whether it was for good.
func (u *Unit) settle(c RunConfig, a answer) (settled bool) {
	defer func() { c.Store.answered(a.flight, settled) }()
	switch {
	case a.err != nil && kind.Of(a.err) == kind.Invalid:
		u.tally(func(n *Counters) { n.SendRefused++ })
		u.log.Error("frame refused", "intersection", u.cfg.Junction.ID, "seq", a.key.seq, "err", a.err)
		return true
	case a.err != nil:
		u.log.Warn("frame not sent yet", "intersection", u.cfg.Junction.ID, "seq", a.key.seq, "err", a.err)
		return false
	case len(a.receipt.GetSalt()) != len(ledger.Salt{}) || !bytes.Equal(a.receipt.GetCommitment(), commitment(a.receipt.GetSalt(), a.envelope)):
		u.tally(func(n *Counters) { n.BadReceipts++ })
		u.log.Error("receipt is not for the frame that was sent", "intersection", u.cfg.Junction.ID, "seq", a.key.seq)
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
