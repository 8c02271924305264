package traci

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Options say how a scenario is run.
type Options struct {
	// Limits are filed with every junction; see [Limits] for what zero means.
	Limits
	// Sensing chooses the detectors. Optional; [SensingDetectors].
	Sensing Sensing
	// Seed is SUMO's --seed, 0 to 2147483647.
	Seed int64
	// Tripinfo is where SUMO writes its trips. Optional; else they go to a
	// temporary file that Close removes.
	Tripinfo string
	// Program is the sumo executable. Optional; "sumo" in PATH.
	Program string
	// StartTimeout bounds how long SUMO may take to load. Optional; 60 s.
	StartTimeout time.Duration
	// Logger hears warnings about what the network file says. Optional.
	Logger *slog.Logger
}

// Validate returns everything that is wrong with the options, joined, of kind
// Invalid.
func (o Options) Validate() error {
	var errs []error
	if o.Sensing != "" {
		errs = append(errs, o.Sensing.check())
	}
	if o.Seed < 0 || o.Seed > math.MaxInt32 {
		errs = append(errs, kind.Errorf(kind.Invalid, "seed %d: must be 0 to %d", o.Seed, math.MaxInt32))
	}
	if o.MinGreenMS < 0 || o.YellowMS < 0 || o.AllRedMS < 0 || o.MaxRedMS < 0 {
		errs = append(errs, kind.Errorf(kind.Invalid, "limits: times must not be negative: %+v", o.Limits))
	}
	if o.StartTimeout < 0 {
		errs = append(errs, kind.Errorf(kind.Invalid, "start timeout %s: must not be negative", o.StartTimeout))
	}
	if err := errors.Join(errs...); err != nil {
		return kind.Errorf(kind.Invalid, "traci options: %w", err)
	}
	return nil
}

// World is a running simulation. Step, Finish and Close belong to one caller;
// what its drivers do may be called concurrently between steps.
type World struct {
	scenario *Scenario
	derived  []Derived
	index    map[traffic.JunctionID]int
	started  time.Time
	trips    string // tripinfo file
	temp     string // folder to remove, empty where there is none

	mu       sync.Mutex // guards all below
	client   *client
	field    *field
	oracle   bool
	now      time.Duration
	step     uint64
	more     bool
	want     []traffic.State // by junction: what to send with the next step, empty: nothing new
	shown    []traffic.State // by junction: what was last sent
	observed []string        // by junction: SUMO's letters
	fresh    []string        // vehicles that departed and are not subscribed yet
	out      message
	failed   error // why the connection is of no use any more
	ended    bool
}

// Open derives the junctions, starts SUMO and connects to it. The process ends
// with Close, Finish, or ctx.
func Open(ctx context.Context, s *Scenario, o Options) (*World, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Sensing == "" {
		o.Sensing = SensingDetectors
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = time.Minute
	}
	derived, err := s.Derive(o.Limits, o.Sensing)
	if err != nil {
		return nil, err
	}
	w := &World{
		scenario: s, derived: derived, index: map[traffic.JunctionID]int{}, started: time.Now(),
		oracle: o.Sensing == SensingOracle, now: s.Begin, more: true,
		want: make([]traffic.State, len(derived)), shown: make([]traffic.State, len(derived)), observed: make([]string, len(derived)),
	}
	for i, d := range derived {
		w.index[d.Junction.ID] = i
		for _, text := range d.Warnings {
			o.Logger.Warn("network does not say all", "intersection", string(d.Junction.ID), "warning", text)
		}
	}
	w.field = newField(s.net, w.Junctions())
	if w.trips = o.Tripinfo; w.trips == "" {
		if w.temp, err = os.MkdirTemp("", "stopline-sumo-"); err != nil {
			return nil, fmt.Errorf("folder for tripinfo: %w", err)
		}
		w.trips = filepath.Join(w.temp, "tripinfo.xml")
	}
	w.client, err = dialSUMO(ctx, program(o.Program), s.arguments(o.Seed, w.trips), o.StartTimeout)
	if err == nil {
		if err = w.subscribe(); err != nil {
			w.client.kill()
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", s.Path, err), w.removeTemp())
	}
	return w, nil
}

func program(name string) string {
	if name == "" {
		return "sumo"
	}
	return name
}

// arguments are what both a driven run and a [Baseline] start SUMO with.
func (s *Scenario) arguments(seed int64, tripinfo string) []string {
	return []string{
		"--configuration-file", s.Path,
		"--seed", strconv.FormatInt(seed, 10),
		"--xml-validation", "never",
		"--no-step-log", "--no-warnings",
		"--duration-log.disable",
		"--time-to-teleport", "-1",
		"--tripinfo-output", tripinfo, "--tripinfo-output.write-unfinished",
	}
}

// subscribe asks once for what every step brings.
func (w *World) subscribe() error {
	m := &w.out
	m.reset()
	m.subscribe(cmdSubSim, "", varTime, varDeparted, varMinExpected)
	for _, d := range w.derived {
		m.subscribe(cmdSubLight, string(d.Junction.ID), varState)
	}
	r, err := w.client.do(m)
	if err != nil {
		return err
	}
	refused := r.status(cmdSubSim)
	refused = first(refused, r.subscription(w.receive(r)))
	for range w.derived {
		if refused = first(refused, r.status(cmdSubLight)); refused != nil {
			break
		}
		refused = first(refused, r.subscription(w.receive(r)))
	}
	switch {
	case refused != nil:
		return refused
	case r.err != nil:
		return fmt.Errorf("sumo: answer to subscriptions: %w", r.err)
	}
	return nil
}

func first(a, b *CommandError) *CommandError {
	if a != nil {
		return a
	}
	return b
}

// Junctions returns the definitions, checked, in the order of the network file.
func (w *World) Junctions() []*traffic.Junction {
	out := make([]*traffic.Junction, len(w.derived))
	for i, d := range w.derived {
		out[i] = d.Junction
	}
	return out
}

// Derived returns the definitions with what had to be assumed to make them.
func (w *World) Derived() []Derived { return w.derived }

// Driver returns the controller cabinet of a junction. A junction that the
// network does not have is an error of kind NotFound.
func (w *World) Driver(id traffic.JunctionID) (*Driver, error) {
	i, ok := w.index[id]
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "junction %q: %s has no such signal", id, w.scenario.NetFile)
	}
	return &Driver{w, i}, nil
}

// Now returns the simulated time, see the package comment.
func (w *World) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Unix(0, int64(w.now)).UTC()
}

// StepLength returns how much simulated time a step takes.
func (w *World) StepLength() time.Duration { return w.scenario.StepLength }

// Version returns what SUMO calls itself.
func (w *World) Version() string { return w.client.version }

// Step advances by one step, in one round trip to SUMO. more is false when the
// configured end is reached; further calls then do nothing. After an error the
// world is only good for Close.
func (w *World) Step() (more bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return false, err
	}
	if !w.more {
		return false, nil
	}
	if err := w.advance(); err != nil {
		w.failed = fmt.Errorf("step at %s: %w", w.now, err)
		return false, w.failed
	}
	return w.more, nil
}

func (w *World) usable() error {
	if w.failed != nil {
		return w.failed
	}
	if w.ended {
		return kind.Errorf(kind.Conflict, "%s: the simulation has been closed", w.scenario.Path)
	}
	return nil
}

func (w *World) advance() error {
	m := &w.out
	m.reset()
	lights := 0
	for i, s := range w.want {
		if s != "" {
			m.setLight(string(w.derived[i].Junction.ID), letters(s))
			w.shown[i], w.want[i] = s, ""
			lights++
		}
	}
	vars := []byte{varLane, varLanePos, varSpeed}
	if w.oracle {
		vars = append(vars, varNextTLS)
	}
	for _, id := range w.fresh {
		m.get(cmdGetVehicle, varLength, id)
		m.get(cmdGetVehicle, varClass, id)
		m.subscribe(cmdSubVehicle, id, vars...)
	}
	m.step()
	r, err := w.client.do(m)
	if err != nil {
		return err
	}
	for range lights {
		if refused := r.status(cmdSetLight); refused != nil {
			return refused
		}
	}
	for _, id := range w.fresh {
		w.meet(id, r)
	}
	w.fresh = w.fresh[:0]
	if refused := r.status(cmdSimStep); refused != nil {
		return refused
	}
	w.step++
	receive := w.receive(r)
	var lost *CommandError
	for range r.count(4) {
		lost = first(lost, r.subscription(receive))
	}
	if r.err != nil {
		return fmt.Errorf("sumo: answer to step: %w", r.err)
	}
	if lost != nil {
		return lost
	}
	w.field.end(w.step, w.scenario.StepLength.Seconds())
	if w.scenario.End >= 0 {
		w.more = w.now < w.scenario.End
	}
	return nil
}

// meet reads the answers about a vehicle that has just departed. One that has
// left again within the step is unknown to SUMO, and to us from then on.
func (w *World) meet(id string, r *reader) {
	v := w.field.add(id)
	if r.status(cmdGetVehicle) == nil {
		r.value(cmdGetVehicle, varLength)
		r.typed(typeDouble)
		if l := r.f64(); l > 0 && l < 100 {
			v.length = l
		}
	}
	if r.status(cmdGetVehicle) == nil {
		r.value(cmdGetVehicle, varClass)
		r.typed(typeString)
		switch string(r.bytes()) {
		case "bus", "coach", "tram":
			v.priority = traffic.Bus
		case "emergency":
			v.priority = traffic.Emergency
		}
	}
	if r.status(cmdSubVehicle) == nil {
		// A vehicle that is gone again has nothing to say; what cannot be decoded
		// is in r.err.
		_ = r.subscription(w.receive(r))
	}
}

// receive returns the visitor of subscriptions: it gathers a vehicle's
// variables, and moves the vehicle when the last of them is there.
func (w *World) receive(r *reader) func(byte, []byte, byte, *reader) {
	var o observation
	var got int
	need := 3
	if w.oracle {
		need = 4
	}
	return func(response byte, object []byte, variable byte, v *reader) {
		switch response {
		case cmdSubSim + responseOffset:
			w.simulation(variable, v)
		case cmdSubLight + responseOffset:
			if i, ok := w.index[traffic.JunctionID(object)]; ok && variable == varState {
				v.typed(typeString)
				// Compared first: a light seldom changes, and a string costs.
				if s := v.bytes(); string(s) != w.observed[i] {
					w.observed[i] = string(s)
				}
			}
		case cmdSubVehicle + responseOffset:
			switch variable {
			case varLane:
				v.typed(typeString)
				lane, ok := w.field.net.lane[string(v.bytes())]
				if !ok {
					lane = -1
				}
				o.lane = lane
			case varLanePos:
				v.typed(typeDouble)
				o.pos = finite(v, "position")
			case varSpeed:
				v.typed(typeDouble)
				o.speed = finite(v, "speed")
				if o.speed < 0 {
					o.speed = 0 // SUMO's "not on the road"
				}
			case varNextTLS:
				o.ahead = w.nextSignal(v)
			default:
				return
			}
			if got++; got < need {
				return
			}
			if vehicle := w.field.byID[string(object)]; vehicle != nil && v.err == nil {
				vehicle.seen = w.step
				w.field.move(vehicle, o, w.scenario.StepLength.Seconds())
			}
			o, got = observation{}, 0
		}
	}
}

func finite(v *reader, what string) float64 {
	x := v.f64()
	if v.err == nil && (math.IsNaN(x) || math.IsInf(x, 0)) {
		v.fail(fmt.Errorf("%s %g is no number", what, x))
		return 0
	}
	return x
}

func (w *World) simulation(variable byte, v *reader) {
	switch variable {
	case varTime:
		v.typed(typeDouble)
		if t := finite(v, "time"); math.Abs(t) < 1e10 {
			w.now = time.Duration(math.Round(t*1000)) * time.Millisecond
		}
	case varDeparted:
		v.typed(typeStringList)
		for range v.count(4) {
			w.fresh = append(w.fresh, v.str())
		}
	case varMinExpected:
		v.typed(typeInt)
		if n := v.i32(); w.scenario.End < 0 {
			w.more = n > 0
		}
	}
}

// nextSignal reads the first of the signals ahead of a vehicle. Further ones
// are not taken: it cannot come to them before it has passed the first.
func (w *World) nextSignal(v *reader) nextSignal {
	v.typed(typeCompound)
	v.count(2)
	v.typed(typeInt)
	if v.i32() <= 0 || v.err != nil {
		return nextSignal{}
	}
	v.typed(typeString)
	id := v.bytes()
	v.typed(typeInt)
	link := v.i32()
	v.typed(typeDouble)
	dist := finite(v, "distance")
	i, ok := w.index[traffic.JunctionID(id)]
	if !ok {
		// A signal that we do not drive: a rail crossing, say.
		return nextSignal{}
	}
	// The definition's string, so that none is made for every vehicle and step.
	return nextSignal{string(w.derived[i].Junction.ID), link, dist}
}

// Close ends the simulation without a result. It may be called again, and
// after Finish.
func (w *World) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.ended = true
		w.client.kill()
	}
	return w.removeTemp()
}

func (w *World) removeTemp() error {
	if w.temp == "" {
		return nil
	}
	err := os.RemoveAll(w.temp)
	w.temp = ""
	if err != nil {
		return fmt.Errorf("folder of tripinfo: %w", err)
	}
	return nil
}

// endTimeout is how long SUMO may take to write its outputs.
const endTimeout = 30 * time.Second

// Finish ends the simulation where it is and returns the result of its trips up
// to now. A world can be finished once.
func (w *World) Finish() (Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return Result{}, err
	}
	w.ended = true
	if err := w.client.end(endTimeout); err != nil {
		return Result{}, errors.Join(fmt.Errorf("ending %s: %w", w.scenario.Path, err), w.removeTemp())
	}
	wall := time.Since(w.started)
	res, err := w.scenario.measure(w.trips, w.now)
	res.WallS = wall.Seconds()
	return res, errors.Join(err, w.removeTemp())
}

// Driver is one junction's controller cabinet in SUMO. Its methods may be
// called concurrently with those of other drivers, between steps.
type Driver struct {
	w *World
	i int
}

// Sense returns the readings of all detectors, in the order of
// Junction.Detectors, for the interval that ends now, and begins the next.
func (d *Driver) Sense() ([]traffic.Reading, error) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if err := d.w.usable(); err != nil {
		return nil, err
	}
	return d.w.field.read(d.i), nil
}

// Show puts the state on the lamps from now on: it goes to SUMO with the next
// Step. A state of the wrong length or with an unknown aspect is an error of
// kind Invalid and changes nothing.
func (d *Driver) Show(s traffic.State) error {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if err := d.w.usable(); err != nil {
		return err
	}
	j := d.w.derived[d.i].Junction
	if len(s) != len(j.Groups) {
		return kind.Errorf(kind.Invalid, "junction %s: state %q has %d aspects, must have %d", j.ID, s, len(s), len(j.Groups))
	}
	for g := range len(s) {
		if !s.At(g).Valid() {
			return kind.Errorf(kind.Invalid, "junction %s: state %q: group %d has aspect %q, which is none", j.ID, s, g, s.At(g).String())
		}
	}
	if s == d.w.shown[d.i] {
		// SUMO holds a state that was set until another is.
		d.w.want[d.i] = ""
	} else {
		d.w.want[d.i] = s
	}
	return nil
}

// Observed returns what the lamps showed at the end of the last step, as SUMO
// reports it.
func (d *Driver) Observed() (traffic.State, error) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if err := d.w.usable(); err != nil {
		return "", err
	}
	return aspects(d.w.observed[d.i], d.w.shown[d.i]), nil
}

// letter is SUMO's letter for an aspect.
func letter(a traffic.Aspect) byte {
	switch a {
	case traffic.PedClear:
		return 'r'
	case traffic.FlashRed:
		return 's'
	}
	return byte(a)
}

func letters(s traffic.State) string {
	b := make([]byte, len(s))
	for i := range b {
		b[i] = letter(s.At(i))
	}
	return string(b)
}

// aspects reads SUMO's letters back; shown resolves those that stand for two.
func aspects(seen string, shown traffic.State) traffic.State {
	b := make([]byte, len(seen))
	for i := range len(seen) {
		if i < len(shown) && letter(shown.At(i)) == seen[i] {
			b[i] = shown[i]
			continue
		}
		switch c := seen[i]; c {
		case 'r', 'y', 'u', 'g', 'G', 'O':
			b[i] = c
		case 'Y':
			b[i] = byte(traffic.Yellow)
		case 'o':
			b[i] = byte(traffic.Permissive) // flashing yellow: go, giving way
		case 's':
			b[i] = byte(traffic.FlashRed) // stop, then go
		default:
			b[i] = byte(traffic.Dark)
		}
	}
	return traffic.State(b)
}

// Warnings returns the warnings of all junctions, each with its id in front.
func (w *World) Warnings() []string {
	var out []string
	for _, d := range w.derived {
		for _, t := range d.Warnings {
			out = append(out, string(d.Junction.ID)+": "+t)
		}
	}
	return slices.Clip(out)
}
