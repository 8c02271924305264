package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

const stepMS = 100

// Config says which city to build. The zero value is nine junctions on a
// weekday morning that never ends.
type Config struct {
	// Seed decides all that is random.
	Seed uint64
	// Start is the simulated time at the beginning. Default: 2026-03-02 07:30 UTC.
	Start time.Time
	// Duration ends the simulation: Step then says that there is no more.
	// Optional; 0 never ends.
	Duration time.Duration
	// Junctions to lay out in a grid. Default 9.
	Junctions int
	// DemandPermille scales all arrivals, in thousandths. Default 1000.
	DemandPermille int
	// FlatDemand keeps the demand of the morning peak whatever the hour.
	FlatDemand bool
	// BusEvery is the time between two buses of one direction. Default 6 min;
	// negative: none.
	BusEvery time.Duration
	// AmbulanceEvery is the mean time between two ambulances in the city.
	// Default 5 min; negative: none.
	AmbulanceEvery time.Duration
}

// MaxJunctions is the largest city.
const MaxJunctions = 4096

// Validate returns everything that is wrong with c, joined.
func (c Config) Validate() error {
	var errs []error
	if c.Junctions < 0 || c.Junctions > MaxJunctions {
		errs = append(errs, fmt.Errorf("junctions: %d is not between 0 and %d", c.Junctions, MaxJunctions))
	}
	if c.DemandPermille < 0 || c.DemandPermille > 10_000 {
		errs = append(errs, fmt.Errorf("demand_permille: %d is not between 0 and 10000", c.DemandPermille))
	}
	if c.Duration < 0 {
		errs = append(errs, fmt.Errorf("duration: %v is negative", c.Duration))
	}
	if c.BusEvery > 0 && c.BusEvery < 30*time.Second {
		errs = append(errs, fmt.Errorf("bus_every: %v is below the 30 s that a stop needs", c.BusEvery))
	}
	if c.AmbulanceEvery > 0 && c.AmbulanceEvery < time.Second {
		errs = append(errs, fmt.Errorf("ambulance_every: %v is below 1 s", c.AmbulanceEvery))
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.Start.IsZero() {
		c.Start = time.Date(2026, 3, 2, 7, 30, 0, 0, time.UTC)
	}
	if c.Junctions == 0 {
		c.Junctions = 9
	}
	if c.DemandPermille == 0 {
		c.DemandPermille = 1000
	}
	if c.BusEvery == 0 {
		c.BusEvery = 6 * time.Minute
	}
	if c.AmbulanceEvery == 0 {
		c.AmbulanceEvery = 5 * time.Minute
	}
	return c
}

// City is a running simulation. Its methods may be called concurrently; only
// one caller at a time should Step.
type City struct {
	cfg   Config
	grid  grid
	defs  []*traffic.Junction
	index map[traffic.JunctionID]int

	mu      sync.Mutex // guards everything below
	closed  bool
	ms      int64 // since Start
	demand  *rand.Rand
	sites   []*site
	lanes   []*lane // downstream order does not matter; fixed, for determinism
	trunks  map[traffic.LaneID]*lane
	entries []*entry
	lines   []*busLine
	free    []*vehicle
	nextID  uint64
	stats   stats
}

// site is the running part of a junction.
type site struct {
	def       *traffic.Junction
	lamps     traffic.State
	since     []int64 // per group: when it last changed between go and no go, or aspect
	approach  [4][]*lane
	crossings [4]crossing
	allWay    int64 // when somebody last entered under all-way stop
	senseFrom int64
	probes    []probe // one a detector
}

type crossing struct {
	group    int
	perHour  int64
	clearMS  int64
	waiting  []int64 // arrival times
	crossing []int64 // when each will be across
	busyMS   int64   // until when they hinder those who turn off
}

type lane struct {
	id       traffic.LaneID
	length   int64
	speed    int64
	begin    int64 // where vehicles appear: 0, or -boxMM behind a stop line
	vs       []*vehicle
	used     int64 // sum of the vehicles' spacing
	capacity int

	// Of a stop lane.
	site    int // -1 on trunks
	arm     arm
	bus     bool
	moves   [3]*movement
	opposes *lane // whose stream permissive left turns cross
	last    *vehicle
	lastID  uint64
	lastMS  int64
	lastTo  *lane
	lastMv  *movement
	tailMS  int64 // until when the last vehicle's tail is on the stop line

	// Of a trunk: the stop lane for each turn; all nil where it leads out.
	next    [3]*lane
	nextBus *lane

	stopLine, advance, area, exit *probe

	// For people's maps.
	lat0, lon0, lat1, lon1 int64
}

type movement struct {
	index     int
	to        *lane
	group     int
	turn      turn
	tauMS     int64
	speed     int64
	crossings [2]*crossing
	opposing  bool // yields to the opposing stream when permissive
}

type entry struct {
	trunk   *lane
	perHour int64
	pending []*vehicle
}

type busLine struct {
	entry  *entry
	nextMS int64
	number int
}

// maxPending bounds the vehicles that wait outside one entry; more are turned
// away, and counted.
const maxPending = 500

// New builds the city that cfg describes.
func New(cfg Config) (*City, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("city: %w", err)
	}
	cfg = cfg.withDefaults()
	g := newGrid(cfg.Junctions)
	c := &City{
		cfg: cfg, grid: g,
		index:  make(map[traffic.JunctionID]int, g.n),
		trunks: map[traffic.LaneID]*lane{},
		demand: rand.New(rand.NewPCG(cfg.Seed, 0x73746f706c696e65)),
	}
	for i := range g.n {
		def := define(g, i)
		// A green wave towards the east: one block takes about 20 s.
		def.Plan.OffsetMS = int64(i%g.cols) * 20_000 % def.Plan.CycleMS()
		if err := def.Check(); err != nil {
			return nil, fmt.Errorf("city: junction %s: %w", def.ID, err)
		}
		c.defs = append(c.defs, def)
		c.index[def.ID] = i
	}
	for i := range g.n {
		c.addSite(i)
	}
	for i := range g.n {
		c.connect(i)
	}
	for _, e := range c.entries {
		if c.cfg.BusEvery > 0 && e.trunk.nextBus != nil {
			first := int64(30_000)
			if e.trunk.arm == east {
				first += c.cfg.BusEvery.Milliseconds() / 2
			}
			c.lines = append(c.lines, &busLine{entry: e, nextMS: first})
		}
	}
	return c, nil
}

func (c *City) addTrunk(id traffic.LaneID, length, speed, begin int64, a arm) *lane {
	l := &lane{id: id, length: length, speed: speed, begin: begin, capacity: int(length / spacingMM), site: -1, arm: a}
	c.lanes = append(c.lanes, l)
	c.trunks[id] = l
	return l
}

func (c *City) addSite(i int) {
	def := c.defs[i]
	s := &site{def: def, lamps: traffic.AllOf(traffic.Red, len(def.Groups)), since: make([]int64, len(def.Groups)),
		probes: make([]probe, len(def.Detectors))}
	c.sites = append(c.sites, s)
	probes := map[traffic.LaneID]map[traffic.DetectorKind]*probe{}
	for d, det := range def.Detectors {
		p := &s.probes[d]
		p.detector = &def.Detectors[d]
		if det.Kind == traffic.Button {
			p.crossing = &s.crossings[det.Group-gWalkNorth]
			continue
		}
		if probes[det.Lane] == nil {
			probes[det.Lane] = map[traffic.DetectorKind]*probe{}
		}
		probes[det.Lane][det.Kind] = p
	}
	for a := north; a <= west; a++ {
		perHour := int64(60)
		if c.grid.arterial(i / c.grid.cols) {
			perHour = 100
		}
		s.crossings[a] = crossing{group: gWalkNorth + int(a), perHour: perHour, clearMS: crossingMS(a)}
		out, _ := def.Lane(exitLaneID(def.ID, a))
		l := c.addTrunk(out.ID, out.LengthCM*10, out.SpeedCMS*10, -boxMM, a.opposite())
		l.exit = probes[out.ID][traffic.ExitArea]
		l.exit.lane = l
		c.place(l, i, a, boxMM/2, boxMM/2+l.length)
	}
	arterial := c.grid.arterial(i / c.grid.cols)
	m := 0
	for a := north; a <= west; a++ {
		for _, spec := range stopLanes(a, arterial) {
			id := stopLaneID(def.ID, a, spec.what)
			l := &lane{id: id, length: stopLaneMM, speed: speedOf(a), capacity: stopLaneMM / spacingMM, site: i, arm: a, bus: spec.bus, lastMS: -1 << 40}
			for _, t := range spec.turns {
				l.moves[t] = c.movement(i, m, a, t, spec.bus)
				m++
			}
			p := probes[id]
			l.stopLine, l.advance, l.area = p[traffic.StopLine], p[traffic.Advance], p[traffic.Area]
			for _, q := range []*probe{l.stopLine, l.advance, l.area} {
				if q != nil {
					q.lane = l
				}
			}
			c.place(l, i, a, boxMM/2+stopLaneMM, boxMM/2)
			c.lanes = append(c.lanes, l)
			s.approach[a] = append(s.approach[a], l)
		}
	}
	// Side streets have one lane each, so that is the opposing one.
	s.approach[north][0].opposes = s.approach[south][0]
	s.approach[south][0].opposes = s.approach[north][0]
}

// place puts a lane on the map: from and to are distances from the junction's
// middle along arm a, and traffic keeps to the right.
func (c *City) place(l *lane, i int, a arm, from, to int64) {
	row, col := i/c.grid.cols, i%c.grid.cols
	south0, east0 := c.grid.metresSouth(row), c.grid.metresEast(col)
	const side = 3_500
	at := func(d int64) (int64, int64) {
		inbound := int64(1)
		if from < to {
			inbound = -1
		}
		switch a {
		case north:
			return latE6(south0 - d), lonE6(east0 - inbound*side)
		case south:
			return latE6(south0 + d), lonE6(east0 + inbound*side)
		case east:
			return latE6(south0 - inbound*side), lonE6(east0 + d)
		default:
			return latE6(south0 + inbound*side), lonE6(east0 - d)
		}
	}
	l.lat0, l.lon0 = at(from)
	l.lat1, l.lon1 = at(to)
}

func (c *City) movement(i, index int, a arm, t turn, bus bool) *movement {
	s := c.sites[i]
	def := s.def.Movements[index]
	m := &movement{index: index, to: c.trunks[def.To], group: def.Group, turn: t, speed: speedOf(a)}
	spacing := int64(spacingMM)
	switch {
	case bus:
		spacing = busMM + gapMM
	case t == left:
		m.speed = leftSpeed
	case t == right:
		m.speed = rightTurn
	}
	// Headway at saturation is τ + spacing/speed, less the step by which a
	// leader has moved when its follower looks.
	m.tauMS = 3_600_000/int64(def.SaturationPerHour) - spacing*1000/m.speed + stepMS
	m.crossings = [2]*crossing{&s.crossings[a], &s.crossings[a.exit(t)]}
	m.opposing = t == left && (a == north || a == south)
	return m
}

// connect joins the trunks of junction i to the stop lanes that they lead to,
// and adds entries at the edge of the city.
func (c *City) connect(i int) {
	g, def := c.grid, c.defs[i]
	for a := north; a <= west; a++ {
		var trunk *lane
		if n := g.neighbour(i, a); n >= 0 {
			trunk = c.trunks[exitLaneID(c.defs[n].ID, a.opposite())]
		} else {
			trunk = c.addTrunk(traffic.LaneID(fmt.Sprintf("%s.%s.in", def.ID, armLetters[a])), entryMM-stopLaneMM, speedOf(a), 0, a)
			c.place(trunk, i, a, boxMM/2+entryMM, boxMM/2+stopLaneMM)
			perHour := int64(145)
			switch {
			case (a == east || a == west) && g.arterial(i/g.cols):
				perHour = 390
			case a == east || a == west:
				perHour = 220
			}
			c.entries = append(c.entries, &entry{trunk: trunk, perHour: perHour})
		}
		for _, l := range c.sites[i].approach[a] {
			if l.bus {
				trunk.nextBus = l
				continue
			}
			for t, m := range l.moves {
				if m != nil {
					trunk.next[t] = l
				}
			}
		}
	}
}

// Junctions returns the definitions, which have passed
// [traffic.Junction.Check] and must not be changed.
func (c *City) Junctions() []*traffic.Junction { return append([]*traffic.Junction(nil), c.defs...) }

// Now returns the simulated time in UTC.
func (c *City) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now()
}

func (c *City) now() time.Time {
	return c.cfg.Start.UTC().Add(time.Duration(c.ms) * time.Millisecond)
}

// StepLength returns 100 ms.
func (c *City) StepLength() time.Duration { return stepMS * time.Millisecond }

// ErrClosed is returned by every use of a city after Close.
var ErrClosed = errors.New("the city is closed")

// Close ends the simulation. It may be called again.
func (c *City) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

// Step advances by 100 ms. It returns false when the configured end is reached.
func (c *City) Step() (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false, ErrClosed
	}
	if c.over() {
		return false, nil
	}
	c.ms += stepMS
	c.arrive()
	for _, s := range c.sites {
		c.walk(s)
	}
	for _, l := range c.lanes {
		c.move(l)
	}
	return !c.over(), nil
}

func (c *City) over() bool { return c.cfg.Duration > 0 && c.ms >= c.cfg.Duration.Milliseconds() }

// Driver is one junction of a [City], as its roadside unit meets it.
type Driver struct {
	city *City
	site *site
}

// Driver returns the cabinet of a junction.
func (c *City) Driver(id traffic.JunctionID) (*Driver, error) {
	i, ok := c.index[id]
	if !ok {
		return nil, fmt.Errorf("the city has no junction %q", id)
	}
	return &Driver{city: c, site: c.sites[i]}, nil
}

// Show puts s on the lamps from now on. A state of another length, or with an
// unknown aspect, is refused and nothing changes.
func (d *Driver) Show(s traffic.State) error {
	c := d.city
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	if len(s) != len(d.site.def.Groups) {
		return fmt.Errorf("junction %s: state %q has %d aspects for %d groups", d.site.def.ID, s, len(s), len(d.site.def.Groups))
	}
	for g := range len(s) {
		if !s.At(g).Valid() {
			return fmt.Errorf("junction %s: state %q: group %d has no aspect %q", d.site.def.ID, s, g, s.At(g))
		}
	}
	if s == d.site.lamps {
		return nil
	}
	for g := range len(s) {
		// From one green to the other nobody has to start again.
		if was, is := d.site.lamps.At(g), s.At(g); was != is && !(was.Go() && is.Go()) {
			d.site.since[g] = c.ms
		}
	}
	d.site.lamps = s
	for a, bs := range d.site.def.Conflicts {
		for _, b := range bs {
			if a < b && s.At(a).Go() && s.At(b).Go() {
				c.stats.unsafe++
			}
		}
	}
	return nil
}

// Observed returns what the lamps show.
func (d *Driver) Observed() (traffic.State, error) {
	d.city.mu.Lock()
	defer d.city.mu.Unlock()
	if d.city.closed {
		return "", ErrClosed
	}
	return d.site.lamps, nil
}

// Sense returns the readings of all detectors, in the order of the definition,
// for the time since the last call, and begins a new interval.
func (d *Driver) Sense() ([]traffic.Reading, error) {
	c := d.city
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	elapsed := c.ms - d.site.senseFrom
	d.site.senseFrom = c.ms
	out := make([]traffic.Reading, len(d.site.probes))
	for i := range d.site.probes {
		out[i] = d.site.probes[i].read(c.ms, elapsed)
	}
	return out, nil
}
