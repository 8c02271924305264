package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

// cable is a TCP connection to a server that can be pulled out.
type cable struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	away  bool
	conns map[net.Conn]bool
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	n, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{listener: n, to: to, conns: map[net.Conn]bool{}}
	t.Cleanup(func() {
		_ = n.Close()
		c.pull(true)
	})
	go c.serve()
	return c
}

func (c *cable) serve() {
	for {
		near, err := c.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", c.to)
		if err != nil {
			_ = near.Close()
			continue
		}
		c.mu.Lock()
		if c.away {
			_, _ = near.Close(), far.Close()
		} else {
			c.conns[near], c.conns[far] = true, true
			for _, p := range [][2]net.Conn{{near, far}, {far, near}} {
				go func() {
					_, _ = io.Copy(p[0], p[1])
					_, _ = p[0].Close(), p[1].Close()
				}()
			}
		}
		c.mu.Unlock()
	}
}

// pull takes the cable out, or puts it back.
func (c *cable) pull(away bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = away
	for n := range c.conns {
		_ = n.Close()
	}
	clear(c.conns)
}

// lamps counts the greens and walks that began.
type lamps struct {
	roadside.Driver
	now    traffic.State
	greens int
}

func (l *lamps) Show(s traffic.State) error {
	for g := range len(s) {
		if s.At(g).Go() && (len(l.now) != len(s) || !l.now.At(g).Go()) {
			l.greens++
		}
	}
	l.now = s
	return l.Driver.Show(s)
}

// cabin is a unit of the test, with its store.
type cabin struct {
	lamps  *lamps
	cfg    roadside.Config
	keep   roadside.StoreConfig
	unit   *roadside.Unit
	store  *roadside.Store
	ticks  chan time.Time
	done   chan error
	before []roadside.Counters // of former boots
}

// outage is a district on the simulated clock whose units hang on a cable.
type outage struct {
	*local
	t      *testing.T
	city   *sim.City
	clock  *simClock
	cable  *cable
	bus    *bus.Bus
	sender *bus.Sender
	cabins []*cabin

	mu      sync.Mutex
	decided map[traffic.DeviceID][]*traffic.Frame // accepted, in the order of the log
}

func newOutage(t *testing.T, junctions int, keep func(i int) roadside.StoreConfig) *outage {
	t.Helper()
	city, err := sim.New(sim.Config{Junctions: junctions, Seed: 5, FlatDemand: true})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	clock := newSimClock(city.Now())
	rules, err := timing.RulesNamed("field")
	if err != nil {
		t.Fatal(err)
	}
	ctrl, err := timing.Named("actuated")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	server, err := bus.StartServer(bus.ServerOptions{Dir: filepath.Join(dir, "nats"), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	id := districtName(cityName)
	l, err := newLocal(t.Context(), localOptions{
		dir: dir, now: clock.now, log: log, nats: natsOptions{url: server.URL(), replicas: 1},
		open: district.Options{ID: id, Junctions: city.Junctions(), Created: clock.now().Add(-time.Second), PolicyName: "p",
			Policy: identity.Policy{Version: "1", Controller: ctrl.Name, Rules: rules.Name}},
		core: signalcontrol.CoreConfig{District: id, Policy: "p", PolicyVersion: "1", Controller: ctrl, Rules: rules},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	o := &outage{local: l, t: t, city: city, clock: clock, decided: map[traffic.DeviceID][]*traffic.Frame{}}
	l.street.onBlock = o.block
	run, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ended <- l.run(run)
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	ready, cancel := context.WithTimeout(t.Context(), readyWait)
	defer cancel()
	if err := l.ready(ready, done); err != nil {
		t.Fatal(err)
	}
	o.cable = newCable(t, server.URL()[len("nats://"):])
	if o.bus, err = bus.Connect(bus.ConnectOptions{URL: "nats://" + o.cable.listener.Addr().String(), Name: "units"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.bus.Close)
	if o.sender, err = bus.NewSender(bus.SenderConfig{Bus: o.bus, Window: roadside.Window}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.sender.Close)
	for i, j := range city.Junctions() {
		key, err := l.deviceKey(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		d, err := city.Driver(j.ID)
		if err != nil {
			t.Fatal(err)
		}
		shown, err := d.Observed()
		if err != nil {
			t.Fatal(err)
		}
		c := &cabin{keep: keep(i), lamps: &lamps{Driver: d, now: shown}}
		c.cfg = roadside.Config{District: id, Junction: j, Device: district.DeviceID(j.ID), Key: key,
			Commander: l.commander, Driver: c.lamps, Rules: rules}
		c.keep.Dir = filepath.Join(dir, "units", string(j.ID))
		o.cabins = append(o.cabins, c)
		o.boot(c)
	}
	t.Cleanup(func() {
		for _, c := range o.cabins {
			if c.ticks != nil {
				close(c.ticks)
				if err := <-c.done; err != nil {
					t.Errorf("unit: %v", err)
				}
			}
		}
	})
	return o
}

func (o *outage) block(b *decided.Block) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range b.Records {
		if !r.Accepted {
			continue
		}
		if c := wire.Candidate(r.Raw, r.Salt[:]); c.Frame != nil {
			o.decided[c.Frame.Device] = append(o.decided[c.Frame.Device], c.Frame)
		}
	}
}

// boot starts a unit, with the boot epoch after its last.
func (o *outage) boot(c *cabin) {
	o.t.Helper()
	var err error
	if c.store, err = roadside.OpenStore(c.keep); err != nil {
		o.t.Fatal(err)
	}
	c.cfg.BootEpoch++
	c.cfg.LastCommand = c.store.LastCommand()
	if c.unit, err = roadside.New(o.clock.now(), c.cfg); err != nil {
		o.t.Fatal(err)
	}
	c.ticks, c.done = make(chan time.Time), make(chan error, 1)
	go func() {
		c.done <- c.unit.Run(context.Background(), roadside.RunConfig{
			Inbox: o.sender, Line: roadside.OnBus(o.bus, c.cfg.District, c.cfg.Junction.ID), Now: o.clock.now, Ticks: c.ticks,
			Store: c.store, Drain: time.Millisecond,
		})
	}()
}

// end stops a unit.
func (o *outage) end(c *cabin) {
	o.t.Helper()
	close(c.ticks)
	if err := <-c.done; err != nil {
		o.t.Error(err)
	}
	c.ticks = nil
	if err := c.store.Close(); err != nil {
		o.t.Error(err)
	}
	c.before = append(c.before, c.unit.Counters())
}

// second takes the street one second on.
func (o *outage) second() {
	o.t.Helper()
	for range time.Second / o.city.StepLength() {
		now := o.city.Now()
		o.clock.set(now)
		for _, c := range o.cabins {
			c.ticks <- now
		}
		if _, err := o.city.Step(); err != nil {
			o.t.Fatal(err)
		}
	}
}

// live takes the street one second on and gives every unit up to a second of our
// time for its command.
func (o *outage) live() {
	o.t.Helper()
	var before []uint64
	for _, c := range o.cabins {
		before = append(before, c.unit.Counters().Applied)
	}
	o.second()
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if !slices.ContainsFunc(o.cabins, func(c *cabin) bool { return c.unit.Counters().Applied == before[slices.Index(o.cabins, c)] }) {
			return
		}
	}
}

func (o *outage) modes(m traffic.Mode) bool {
	for _, c := range o.cabins {
		if c.unit.Status(o.clock.now()).Signal.Mode != m {
			return false
		}
	}
	return true
}

// The network is away for an hour. Units run their own plans and keep their
// frames; one is restarted meanwhile, another has room for a third of them. When
// the network is back each frame that was kept is decided, once and in order, all
// with events among them; the gaps are those that the units have declared; and
// the junctions are coordinated again.
func TestOutage(t *testing.T) {
	processTest(t)
	const hour = outageSeconds
	small := roadside.StoreConfig{MaxFrames: hour / 3}
	o := newOutage(t, 2, func(i int) roadside.StoreConfig { return []roadside.StoreConfig{{}, small}[i] })
	for range 40 {
		if o.live(); o.modes(traffic.Coordinated) {
			break
		}
	}
	if !o.modes(traffic.Coordinated) {
		t.Fatal("the junctions are not coordinated at first")
	}

	o.cable.pull(true)
	for i := range hour {
		o.second()
		if i >= 60 && i%100 == 0 && !o.modes(traffic.Local) {
			t.Fatalf("after %d s without the network a junction is not on its local plan", i)
		}
		if i == hour/2 {
			o.end(o.cabins[0])
			if n := o.cabins[0].store.Stats().Waiting; n < hour/2 {
				t.Fatalf("%d frames are kept after half an hour, want more than one a second", n)
			}
			o.boot(o.cabins[0])
		}
	}
	var waiting int
	for i, c := range o.cabins {
		s := c.store.Stats()
		waiting += s.Waiting
		t.Logf("unit %d after the hour: %+v", i, s)
	}

	o.cable.pull(false)
	healed, seconds := time.Now(), 0
	for ; time.Since(healed) < 4*soon && !o.modes(traffic.Coordinated); seconds++ {
		o.live()
	}
	t.Logf("%d frames waited; coordinated %.2f s after the network was back, %d s of the street's time", waiting, time.Since(healed).Seconds(), seconds)
	if !o.modes(traffic.Coordinated) {
		t.Fatalf("the junctions are not coordinated again: %+v", o.cabins[0].unit.Status(o.clock.now()))
	}
	for range 3 {
		o.live()
	}
	for _, c := range o.cabins {
		waitFor(t, "all receipts", soon, func() bool { return c.store.Stats().Waiting == 0 })
		o.end(c)
	}
	o.account()
}

// account compares what the units have made with what was decided.
func (o *outage) account() {
	t := o.t
	t.Helper()
	var missing uint64
	for i, c := range o.cabins {
		var made, dropped, falls, returns uint64
		for _, n := range c.before {
			made += n.Frames + n.EventFrames
			dropped += n.SendDropped
			falls += n.Fallbacks
			returns += n.Returns
			if n.SendDroppedEvents != 0 || n.SendRefused != 0 || n.Trips != 0 || len(n.StatesRefused) != 0 || n.BadReceipts != 0 {
				t.Errorf("unit %d: got %+v, want no event dropped, nothing refused and no trip", i, n)
			}
		}
		if falls == 0 || returns < 2 {
			t.Errorf("unit %d: %d fallbacks and %d returns, want one and two at least", i, falls, returns)
		}
		if i == 1 != (dropped > 0) {
			t.Errorf("unit %d dropped %d frames, want some of the second only, whose store is small", i, dropped)
		}
		missing += dropped
		// The newest are on their way from the log to here.
		var got []*traffic.Frame
		waitFor(t, "the last frame", soon, func() bool {
			o.mu.Lock()
			defer o.mu.Unlock()
			got = slices.Clone(o.decided[c.cfg.Device])
			return uint64(len(got)) >= made-dropped
		})
		greens, withEvents := 0, 0
		for k, f := range got {
			if len(f.Events) > 0 {
				withEvents++
			}
			for _, e := range f.Events {
				if e.Code == 1 || e.Code == 21 { // a phase is green, a walk begins
					greens++
				}
			}
			if k == 0 {
				continue
			}
			if p := got[k-1]; f.BootEpoch < p.BootEpoch || f.BootEpoch == p.BootEpoch && f.Seq <= p.Seq {
				t.Fatalf("unit %d: frame %s was decided after %s", i, f.FrameKey, p.FrameKey)
			}
		}
		if uint64(len(got)) != made-dropped {
			t.Errorf("unit %d: %d frames are decided; want %d made less %d dropped", i, len(got), made, dropped)
		}
		if greens != c.lamps.greens || greens == 0 {
			t.Errorf("unit %d: the log has %d greens and walks that began, the lamps showed %d", i, greens, c.lamps.greens)
		}
		t.Logf("unit %d made %d frames, dropped %d, decided %d, %d with events, %d greens; %d boots", i, made, dropped, len(got), withEvents, greens, len(c.before))
	}
	v := o.validation.Counts()
	if v.Missing != missing {
		t.Errorf("validation has seen %d frames missing, the units have declared %d", v.Missing, missing)
	}
	for r, n := range v.ByRule {
		if r != validate.RuleDuplicate {
			t.Errorf("%d records quarantined by %s, want none but duplicates", n, r)
		}
	}
}
