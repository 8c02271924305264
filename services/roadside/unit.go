package roadside

import (
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Config of a unit.
type Config struct {
	District traffic.DistrictID
	// Junction as filed. It must pass Check and must not be changed.
	Junction *traffic.Junction
	// Device is the unit's own id in the registry, and Key its key.
	Device traffic.DeviceID
	Key    ed25519.PrivateKey
	// BootEpoch must be higher than in any run before: on disk before it is used.
	BootEpoch uint64
	// Commander returns the public key with the given id if it may command.
	Commander func(identity.KeyID) (ed25519.PublicKey, bool)
	Driver    Driver
	// Overrider returns the public key with the given id if it may take junctions in
	// hand. Optional: nobody may.
	Overrider func(identity.KeyID) (ed25519.PublicKey, bool)
	// Override is the newest override or release that the unit took before this boot,
	// see [Store.Override]: one that is not over goes on. Optional.
	Override []byte
	// Rules of timing for sequencer and local plan. A benchmark's rules are
	// applied to Junction first: see [timing.Rules.Apply]. Optional: field.
	Rules timing.Rules
	// Local decides while there is no command in force. Optional: the junction's
	// fixed plan.
	Local *timing.Controller
	// StaleAfter is how long after it was taken a command is in force. Default 2 s.
	StaleAfter time.Duration
	// LastCommand is the highest sequence of a command that was obeyed before
	// this boot, see [Store.LastCommand]. Without it, what was obeyed just before
	// the boot could be replayed until it expires, if it rests on the frame of
	// another device: [RuleBoot] refuses the rest.
	LastCommand uint64
	// Fallback is the signed fall-back plan that the unit was given before this
	// boot, see [Store.Fallback]. One that is no longer in order is left aside, with
	// a word in the log: the filed plan is run then. Optional.
	Fallback []byte
	// TripOnMaxRed makes the interlock trip, and not only count, when a group is
	// red for longer than its maximum.
	TripOnMaxRed bool
	// Logger is optional.
	Logger *slog.Logger
}

// Validate returns everything that is wrong with c, joined, each with its field.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.District == "" {
		bad("district: must not be empty")
	}
	if c.Junction == nil {
		bad("junction: must be set")
	} else if err := c.Junction.Check(); err != nil {
		bad("junction: %w", err)
	}
	if c.Device == "" {
		bad("device: must not be empty")
	}
	if len(c.Key) != ed25519.PrivateKeySize {
		bad("key: %d bytes, an Ed25519 private key has %d", len(c.Key), ed25519.PrivateKeySize)
	}
	if c.BootEpoch == 0 {
		bad("boot_epoch: 0, the first is 1")
	}
	if c.Commander == nil {
		bad("commander: must be set")
	}
	if c.Driver == nil {
		bad("driver: must be set")
	}
	if c.StaleAfter < 0 {
		bad("stale_after: %v is negative", c.StaleAfter)
	}
	if c.Local != nil && c.Local.Next == nil {
		bad("local: has no function")
	}
	return errors.Join(errs...)
}

// Counters of a unit since it was made.
type Counters struct {
	Ticks       uint64          `json:"ticks"`
	Frames      uint64          `json:"frames"`       // periodic
	EventFrames uint64          `json:"event_frames"` // at events
	Applied     uint64          `json:"applied"`      // commands
	Refused     map[Rule]uint64 `json:"refused"`      // commands, by rule
	Trips       uint64          `json:"trips"`
	// StatesRefused counts states that the interlock did not let through.
	StatesRefused map[string]uint64 `json:"states_refused"`
	MaxRed        uint64            `json:"max_red"` // reds longer than the maximum
	// Fallbacks to the local plan, Returns to commands.
	Fallbacks uint64 `json:"fallbacks"`
	Returns   uint64 `json:"returns"`
	// SenseErrors, ShowErrors and ObserveErrors are calls to the driver that
	// failed, LampFaults the frames in which the lamps did not show what they
	// were told to.
	SenseErrors    uint64 `json:"sense_errors"`
	ShowErrors     uint64 `json:"show_errors"`
	ObserveErrors  uint64 `json:"observe_errors"`
	LampFaults     uint64 `json:"lamp_faults"`
	ClockSteps     uint64 `json:"clock_steps"`     // frames at which the clock had gone back
	ResultsDropped uint64 `json:"results_dropped"` // more commands than a frame carries
	EventsDropped  uint64 `json:"events_dropped"`

	// Of the shell: frames stored by ingest, and refused by it; how often sending
	// began again; frames dropped from a full store, and those of them with
	// events; receipts that did not fit what was sent; status messages that could
	// not be published; commands that came faster than the unit could take them.
	Stored            uint64 `json:"stored"`
	SendRefused       uint64 `json:"send_refused"`
	SendRetries       uint64 `json:"send_retries"`
	SendDropped       uint64 `json:"send_dropped"`
	SendDroppedEvents uint64 `json:"send_dropped_events"`
	BadReceipts       uint64 `json:"bad_receipts"`
	StatusErrors      uint64 `json:"status_errors"`
	CommandsDropped   uint64 `json:"commands_dropped"`
	// Overrides and releases that were taken.
	Overrides uint64 `json:"overrides"`
	// Plans are fall-back plans that were taken, PlansRefused those that were not;
	// one that comes again is neither.
	Plans        uint64 `json:"plans"`
	PlansRefused uint64 `json:"plans_refused"`
}

// Unit is one junction's roadside unit. It may be used concurrently.
type Unit struct {
	cfg   Config
	log   *slog.Logger
	rules timing.Rules
	local timing.Controller
	self  SelfDriver // nil where the unit drives the lamps

	mu        sync.Mutex // guards everything below, and the driver
	sequencer *timing.Sequencer
	monitor   *interlock.Monitor
	memory    timing.Memory     // of the local controller
	fallback  *traffic.Fallback // nil: the filed plan
	alone     *traffic.Junction // the junction with the plan that it runs alone
	hand      *hand             // nil: nobody's
	word      word
	mode      traffic.Mode
	boundary  bool   // the local plan decides, no change of stage was under way
	seq       uint64 // of the newest command obeyed
	// inForce is how much longer the command is obeyed. It runs down by the
	// steps between ticks, so that setting the clock back prolongs nothing.
	inForce time.Duration
	tickAt  time.Time
	shown   traffic.State // what the driver took last
	before  traffic.State // what was shown before
	shownAt time.Time
	missed  bool // the driver has not taken the newest state

	frameSeq uint64
	prev     [32]byte
	frameAt  time.Time // of the newest frame
	sensedAt time.Time // end of the last interval
	results  []traffic.CommandResult
	strays   []traffic.CommandResult // of what nobody signed
	events   []stamped
	store    *Store // once it runs; its lock is taken after mu
	counters Counters
}

// smallStep is how far ahead of the district's clock a frame is still taken.
const smallStep = 2 * time.Second

type stamped struct {
	at time.Time
	e  traffic.Event
}

// New returns a unit that takes over the lamps as they are: lawful greens go
// on, anything else is led to red first.
func New(now time.Time, c Config) (*Unit, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("roadside unit %s: %w", c.Device, err)
	}
	if c.StaleAfter == 0 {
		c.StaleAfter = 2 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Rules.Name == "" {
		c.Rules, _ = timing.RulesNamed("field") // a constant name
	}
	u := &Unit{
		cfg: c, log: c.Logger, rules: c.Rules, mode: traffic.Local, seq: c.LastCommand,
		inForce: c.StaleAfter, tickAt: now, sensedAt: now, self: selfDriver(c.Driver), shownAt: now,
		counters: Counters{Refused: map[Rule]uint64{}},
	}
	if c.Local != nil {
		u.local = *c.Local
	} else {
		var err error
		if u.local, err = timing.Named("fixed"); err != nil {
			return nil, err
		}
	}
	observed, err := c.Driver.Observed()
	if err != nil {
		return nil, fmt.Errorf("roadside unit %s: reading the lamps: %w", c.Device, err)
	}
	if u.monitor, err = interlock.New(c.Junction, now); err != nil {
		return nil, fmt.Errorf("roadside unit %s: %w", c.Device, err)
	}
	u.monitor.TripOnMaxRed(c.TripOnMaxRed)
	u.alone = c.Junction
	if len(c.Fallback) > 0 {
		if err := u.keep(c.Fallback); err != nil {
			u.log.Warn("the fall-back plan that was kept is not in order, running the filed one", "intersection", c.Junction.ID, "err", err)
		}
	}
	u.sequencer = timing.NewSequencer(c.Junction, c.Rules, now)
	u.shown = u.monitor.Shown()
	if err := u.monitor.Resume(now, observed); err == nil {
		u.sequencer.Resume(observed, now)
		u.shown = observed
	} else {
		u.log.Warn("the lamps showed what cannot be taken over, starting from all red", "intersection", c.Junction.ID, "err", err)
	}
	if len(c.Override) > 0 {
		if err := u.resumeOverride(now, c.Override); err != nil {
			u.log.Warn("the override that was kept is not in force any more", "intersection", c.Junction.ID, "err", err)
		}
	}
	return u, nil
}

// Ticked is what a tick did.
type Ticked struct {
	// Shown is what the lamps were told to show.
	Shown traffic.State
	// Changed says that this is new, so that an event frame is due.
	Changed bool
	// Trip is set in the tick in which the interlock trips.
	Trip *interlock.Trip
	// ModeChanged says that somebody else decides now.
	ModeChanged bool
}

// Tick makes the lamps show what is due at now. Call it at every step of the
// world and at least once a second. An error means that the driver did not take
// the state; the next tick goes on from what the lamps show then.
func (u *Unit) Tick(now time.Time) (Ticked, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.counters.Ticks++
	step := max(now.Sub(u.tickAt), 0)
	u.inForce = max(u.inForce-step, 0)
	u.tickAt = now
	was := u.mode
	if u.missed {
		u.retake(now)
	}
	if !u.overridden(now, step) {
		u.decide(now)
	}
	show, trip := u.monitor.Filter(now, u.wanted(now))
	if trip != nil {
		u.tripped(now, trip)
	}
	if u.self != nil {
		t, err := u.supervise(now, show, trip)
		t.ModeChanged = u.mode != was
		return t, err
	}
	t := Ticked{Shown: show, Trip: trip, ModeChanged: u.mode != was}
	err := u.cfg.Driver.Show(show)
	if u.missed = err != nil; u.missed {
		u.counters.ShowErrors++
		return t, fmt.Errorf("junction %s: showing %q: %w", u.cfg.Junction.ID, show, err)
	}
	if t.Changed = show != u.shown; t.Changed {
		u.changes(now, u.shown, show)
		u.before, u.shownAt, u.shown = u.shown, now, show
	}
	return t, nil
}

func (u *Unit) tripped(now time.Time, trip *interlock.Trip) {
	u.counters.Trips++
	u.setMode(now, traffic.Tripped)
	u.note(now, eventFlash, flashFaultMonitor)
	u.log.Error("the interlock has tripped", "intersection", u.cfg.Junction.ID, "rule", trip.Rule, "err", trip.Detail)
}

// retake begins again from what the lamps show, after they did not take what
// they were told to: sequencer and interlock count the time of a yellow or a red
// that may never have been seen. On its way to flashing a tripped unit goes on.
func (u *Unit) retake(now time.Time) {
	if u.monitor.Tripped() != nil {
		return
	}
	seen, err := u.cfg.Driver.Observed()
	if err != nil {
		u.counters.ObserveErrors++
		u.log.Error("lamps cannot be read", "intersection", u.cfg.Junction.ID, "err", err)
		seen = u.shown // the driver took that
	}
	if err := u.monitor.Resume(now, seen); err != nil {
		// The interlock refuses to go from there to red, and trips.
		u.log.Error("the lamps show what cannot be taken over", "intersection", u.cfg.Junction.ID, "err", err)
		u.sequencer = timing.NewSequencer(u.cfg.Junction, u.rules, now)
		return
	}
	u.sequencer.Resume(seen, now)
	if seen != u.shown {
		u.changes(now, u.shown, seen)
		u.before, u.shownAt, u.shown = u.shown, now, seen
	}
}

// decide gives the sequencer the local plan's stage where no command is in force.
func (u *Unit) decide(now time.Time) {
	if u.mode == traffic.Tripped || u.inForce > 0 {
		return
	}
	signal := u.sequencer.Signal(now)
	if !u.boundary {
		// A change under way is finished first; Stage is -1 also at a start.
		if signal.Stage < 0 && u.mode == traffic.Coordinated {
			return
		}
		u.boundary = true
		if u.mode == traffic.Coordinated {
			u.setMode(now, traffic.Local)
		}
	}
	v := timing.Observe(u.cfg.Junction, nil)
	v.Now, v.Signal = now, signal
	m, d := u.local.Next(u.alone, u.rules, u.memory, v)
	u.memory = m
	if err := u.monitor.Accept(d.Stage); err != nil {
		u.counters.Refused[RuleInterlock]++
		u.log.Error("local plan refused", "intersection", u.cfg.Junction.ID, "err", err)
		return
	}
	if err := u.sequencer.Target(d.Stage); err != nil {
		u.log.Error("local plan refused", "intersection", u.cfg.Junction.ID, "err", err)
	}
}

func (u *Unit) setMode(now time.Time, m traffic.Mode) {
	if m == traffic.Coordinated {
		u.boundary = false
	}
	if u.mode == m {
		return
	}
	switch {
	case m == traffic.Coordinated:
		u.counters.Returns++
	case m == traffic.Local && u.mode == traffic.Coordinated:
		u.counters.Fallbacks++
	}
	u.log.Info("mode", "intersection", u.cfg.Junction.ID, "from", string(u.mode), "to", string(m), "at", now)
	u.mode = m
}

// Reset lets a tripped unit go on, in the name of a person at the junction; see
// [interlock.Monitor.Reset]. It starts from all red, in Local.
func (u *Unit) Reset(now time.Time, by string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.monitor.Reset(now, by); err != nil {
		return err
	}
	u.sequencer = timing.NewSequencer(u.cfg.Junction, u.rules, now)
	u.inForce = 0
	u.setMode(now, traffic.Local)
	u.note(now, eventFlash, flashNot)
	u.log.Warn("the interlock was reset", "intersection", u.cfg.Junction.ID, "by", by)
	return nil
}

// Frame senses and returns the signed envelope of the frame for the interval
// that ends now, with its content. The caller sends envelopes in their order.
// Where the detectors cannot be read the frame has neither readings nor an
// interval.
func (u *Unit) Frame(now time.Time) ([]byte, *traffic.Frame, error) {
	return u.frame(now, true)
}

// EventFrame returns the signed envelope of a frame without readings, for
// events that should not wait for the interval's end.
func (u *Unit) EventFrame(now time.Time) ([]byte, *traffic.Frame, error) {
	return u.frame(now, false)
}

func (u *Unit) frame(now time.Time, periodic bool) ([]byte, *traffic.Frame, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now = now.UTC()
	if back := u.frameAt.Sub(now); back > 0 {
		u.counters.ClockSteps++
		// The district takes no frame that is older than the one before. After a
		// small step it has the newer one; after a large one it will have
		// refused that as ahead of its clock.
		if back < smallStep {
			now = u.frameAt
		}
	}
	f := &traffic.Frame{District: u.cfg.District, Junction: u.cfg.Junction.ID, Time: now, Prev: u.prev,
		FrameKey: traffic.FrameKey{Device: u.cfg.Device, BootEpoch: u.cfg.BootEpoch, Seq: u.frameSeq + 1}}
	if periodic {
		u.counters.Frames++
		readings, err := u.cfg.Driver.Sense()
		if err != nil {
			u.counters.SenseErrors++
			u.log.Error("detectors cannot be read", "intersection", u.cfg.Junction.ID, "err", err)
		} else {
			f.Readings, f.Interval = readings, max(now.Sub(u.sensedAt), 0).Truncate(time.Millisecond)
			u.sensedAt = now
			u.sequencer.Occupied(timing.BoxOccupied(u.cfg.Junction, readings))
		}
	} else {
		u.counters.EventFrames++
	}
	f.Signal = u.marked(u.signal(now))
	for _, e := range u.events {
		e.e.OffsetMS = uint32(min(max(now.Sub(e.at).Milliseconds(), 0), maxOffsetMS))
		f.Events = append(f.Events, e.e)
	}
	f.Results = append(append(f.Results, u.results...), u.strays...)
	u.events, u.results, u.strays = u.events[:0], u.results[:0], u.strays[:0]

	payload := wire.EncodeFrame(f)
	u.frameSeq, u.prev, u.frameAt = f.Seq, sha256.Sum256(payload), now
	return identity.Sign(u.cfg.Key, identity.KindFrame, identity.Protobuf, payload).Marshal(), f, nil
}

// lampsFollow is how long lamps may take to show what they were told to: a
// simulator with steps of a second shows it with its next step.
const lampsFollow = 1500 * time.Millisecond

// signal is what the lamps were seen to show, or were told to where they cannot
// be seen.
func (u *Unit) signal(now time.Time) traffic.Signal {
	if u.self != nil {
		s := u.seenSignal(now)
		if t := u.monitor.Tripped(); t != nil {
			s.Stage, s.Trip = -1, cut(t.String())
		}
		return s
	}
	s := u.sequencer.Signal(now)
	s.State, s.Mode = u.shown, u.mode
	switch seen, err := u.cfg.Driver.Observed(); {
	case err != nil:
		u.counters.ObserveErrors++
		u.log.Error("lamps cannot be read", "intersection", u.cfg.Junction.ID, "err", err)
	case seen == u.before && now.Sub(u.shownAt) < lampsFollow && now.Sub(u.shownAt) >= 0:
		s.State = seen // on its way
	case seen != u.shown:
		u.counters.LampFaults++
		u.log.Error("lamps do not show what they were told to", "intersection", u.cfg.Junction.ID, "want", string(u.shown), "got", string(seen))
		if len(seen) == len(u.shown) {
			s.State = seen
		}
	}
	if t := u.monitor.Tripped(); t != nil {
		s.Stage, s.Trip = -1, cut(t.String())
	}
	return s
}

// Status is a unit at one moment, for people.
type Status struct {
	Junction traffic.JunctionID `json:"junction"`
	Device   traffic.DeviceID   `json:"device"`
	Signal   traffic.Signal     `json:"signal"`
	LastSeq  uint64             `json:"last_seq"` // newest command obeyed
	// Fallback is the number of the plan that it would run alone, 0: the filed one.
	Fallback uint64   `json:"fallback"`
	Counters Counters `json:"counters"`
	// Store has what waits to be sent; empty while the unit does not run.
	Store StoreStats `json:"store"`
}

// Status returns the unit as it is at now; it shares nothing with the unit.
func (u *Unit) Status(now time.Time) Status {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.sequencer.Signal(now)
	s.State, s.Mode = u.shown, u.mode
	if u.self != nil {
		s = u.seenSignal(now)
	}
	if t := u.monitor.Tripped(); t != nil {
		s.Stage, s.Trip = -1, cut(t.String())
	}
	st := Status{Junction: u.cfg.Junction.ID, Device: u.cfg.Device, Signal: u.marked(s), LastSeq: u.seq, Counters: u.count()}
	if u.store != nil {
		st.Store = u.store.Stats()
	}
	if u.fallback != nil {
		st.Fallback = u.fallback.Seq
	}
	return st
}

// Counters returns a copy of the counters.
func (u *Unit) Counters() Counters {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.count()
}

func (u *Unit) count() Counters {
	c := u.counters
	c.Refused = make(map[Rule]uint64, len(u.counters.Refused))
	for k, v := range u.counters.Refused {
		c.Refused[k] = v
	}
	m := u.monitor.Counts()
	c.StatesRefused, c.MaxRed = m.Refused, m.MaxRed
	if u.store != nil {
		st := u.store.Stats()
		c.SendDropped, c.SendDroppedEvents = st.Dropped, st.DroppedEvents
	}
	return c
}

// RefusedCommands is the sum over all rules.
func (c Counters) RefusedCommands() (n uint64) {
	for _, v := range c.Refused {
		n += v
	}
	return n
}
