package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/traci"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

var simulateCommand = command{
	name:     "simulate",
	synopsis: "stopline simulate --config FILE.sumocfg|city [--controller NAME] [--rules NAME] [--sensing NAME] [--seed N] [--pipeline] [OPTIONS]",
	summary:  "run a scenario's whole time under one controller and measure delay",
	manual: `Runs a SUMO scenario, or the built-in city, from its begin to its end as fast as
it goes, with a roadside unit at every signal, and prints what it was worth.

Without --pipeline the controller is called directly. With it every reading
goes through ingest, validation, four validators and signal-control, and every
command through the unit's checks; all of them run on the simulated clock, and
the street advances only when each junction has its decision for the step, or
the step has been declared stale. Both ways decide the same from the same
input.

Controllers: fixed (the map's own plan), actuated, maxpressure.
Rules:       free        a decision every second, minimum green 5 s, yellow 3 s
             resco       a decision every 10 s of which 3 s are yellow
             deployable  as free, minimum green 7 s, all-red 1 s, maximum red 120 s
             field       the timing that is filed with each junction
Sensing:     detectors (loops and areas placed at each approach) or oracle
             (exact vehicles within 200 m); SUMO only.

delay_s is the mean over all trips of time lost plus time waited before
entering; a trip that never entered counts from its planned departure to the
end.
` + attackManual,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := simulateOptions{}
		fs.StringVar(&o.config, "config", "", "`FILE` .sumocfg, or city for the built-in one")
		fs.StringVar(&o.controller, "controller", "maxpressure", "`NAME` of the controller")
		fs.StringVar(&o.rules, "rules", "free", "`NAME` of the rules")
		fs.StringVar(&o.sensing, "sensing", "detectors", "`NAME` of what controllers may know")
		fs.Int64Var(&o.seed, "seed", 1, "random seed `N`")
		fs.StringVar(&o.tripinfo, "tripinfo", "", "keep SUMO's trip file as `FILE`")
		fs.BoolVar(&o.pipeline, "pipeline", false, "run through every service, in lockstep")
		fs.DurationVar(&o.length, "for", 0, "simulate at most this long, for instance 10m; 0: to the scenario's end\n(the city, which has none: 1h)")
		fs.StringVar(&o.decisions, "decisions", "", "write each decision as one JSON line to `FILE`")
		corridor := fs.String("corridor", "", "junctions with a green wave: `LIST` of ids with commas, or longest, for\nthe longest chain of signals")
		fs.BoolVar(&o.isolated, "isolated", false, "junctions do not plan with what their neighbours announce")
		fs.StringVar(&o.data, "data", "", "with --pipeline: keep the district in folder `DIR`, which must be new")
		fs.StringVar(&o.attack, "attack", "", "`NAME` of an attack on one junction")
		fs.StringVar(&o.attackAt, "attack-at", "", "junction `ID` that is attacked; the first by default")
		fs.DurationVar(&o.attackAfter, "attack-after", 5*time.Minute, "when the attack begins")
		asJSON := fs.Bool("json", false, "print one JSON object")
		quiet := fs.Bool("quiet", false, "no progress on standard error")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) > 0 || o.config == "" {
				return usageError("simulate: --config is needed, and no arguments")
			}
			for _, id := range strings.FieldsFunc(*corridor, func(r rune) bool { return r == ',' }) {
				o.corridor = append(o.corridor, traffic.JunctionID(id))
			}
			if !*quiet && isTerminal(s.err) {
				o.progress = s.err
			}
			r, err := simulate(ctx, o)
			if err != nil {
				return err
			}
			if *asJSON {
				return json.NewEncoder(s.out).Encode(r)
			}
			_, err = fmt.Fprintf(s.out, "delay     %8.1f s a trip\nduration  %8.1f s\nwaiting   %8.1f s\ntrips     %8d, %d finished, %d never entered\nwall time %8.1f s\n",
				r.DelayS, r.DurationS, r.WaitingS, r.Trips, r.Finished, r.NeverEntered, r.WallS)
			return err
		}
	},
}

type simulateOptions struct {
	config, controller, rules, sensing string
	seed                               int64
	tripinfo, decisions                string
	isolated                           bool
	corridor                           []traffic.JunctionID
	pipeline                           bool
	length                             time.Duration
	data                               string
	attack, attackAt                   string
	attackAfter                        time.Duration
	progress                           io.Writer
	// observe is told of every decision; tests compare two runs by it.
	observe func(decision)
	// frames is shown the frames of each step before they are decided on.
	frames func(now time.Time, frames []unitFrame)
}

// decision is what one junction was told at one step.
type decision struct {
	Time     time.Time          `json:"time"`
	Junction traffic.JunctionID `json:"junction"`
	Stage    int                `json:"stage"`
	Rule     string             `json:"rule"`
}

// simulated is the result, with what a reader needs to repeat the run.
type simulated struct {
	Config     string `json:"config"`
	Controller string `json:"controller"`
	Rules      string `json:"rules"`
	Sensing    string `json:"sensing"`
	Seed       int64  `json:"seed"`
	Pipeline   bool   `json:"pipeline"`
	traci.Result
	Steps     int `json:"steps"`
	Decisions int `json:"decisions"`
	// StaleSteps are junction-steps for which no decision came in time.
	StaleSteps     int    `json:"stale_steps"`
	InterlockTrips uint64 `json:"interlock_trips"`
	Refused        uint64 `json:"commands_refused"`
	// Attack on a junction; FlaggedS is after how many seconds a word on the health
	// of one of its detectors was said, and FlaggedRule which; the filed cycle is
	// the measure for it.
	Attack      string  `json:"attack,omitempty"`
	FlaggedS    float64 `json:"flagged_s,omitempty"`
	FlaggedRule string  `json:"flagged_rule,omitempty"`
	CycleS      float64 `json:"cycle_s,omitempty"`
	Fallbacks   uint64  `json:"fallbacks"`
}

// decider turns the frames of one step into commands that the units have taken.
type decider interface {
	// decide returns when every junction has its decision, or has been declared
	// stale; it returns the commands that came.
	decide(ctx context.Context, now time.Time, frames []unitFrame) ([]traffic.Command, error)
	// watch tells seen what is said of detectors, and lets the unit that is attacked
	// have its own clock. It is called before the first step.
	watch(a *attack, seen *flags)
	close() error
}

// unitFrame is one unit's frame of a step.
type unitFrame struct {
	unit     *roadside.Unit
	frame    *traffic.Frame
	envelope []byte
}

// frameEvery is the interval of periodic frames in simulated time.
const frameEvery = time.Second

func simulate(ctx context.Context, o simulateOptions) (_ simulated, err error) {
	ctrl, err := timing.Named(o.controller)
	if err != nil {
		return simulated{}, usageError("simulate: --controller: %v", err)
	}
	rules, err := timing.RulesNamed(o.rules)
	if err != nil {
		return simulated{}, usageError("simulate: --rules: %v", err)
	}
	if o.sensing != "oracle" && o.sensing != "detectors" {
		return simulated{}, usageError("simulate: --sensing %q: must be oracle or detectors", o.sensing)
	}
	if o.data != "" && !o.pipeline {
		return simulated{}, usageError("simulate: --data: only with --pipeline is there a log to keep")
	}
	if o.seed < 0 || o.seed > math.MaxInt32 {
		return simulated{}, usageError("simulate: --seed %d: must be 0 to %d", o.seed, math.MaxInt32)
	}
	began := time.Now()
	length := o.length
	if length == 0 && o.config == cityName {
		length = time.Hour
	}
	w, err := openWorld(ctx, worldOptions{config: o.config, rules: rules, sensing: o.sensing, seed: o.seed, tripinfo: o.tripinfo, length: length})
	if err != nil {
		return simulated{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()

	log := slog.New(slog.DiscardHandler)
	clock := newSimClock(w.Now())
	var defs []*traffic.Junction
	for _, j := range w.Junctions() {
		defs = append(defs, rules.Apply(j))
	}
	id := districtName(o.config)
	var d decider
	var key func(traffic.JunctionID) (ed25519.PrivateKey, error)
	var commander func(identity.KeyID) (ed25519.PublicKey, bool)
	if len(o.corridor) == 1 && o.corridor[0] == "longest" {
		o.corridor = longestCorridor(defs).ids
	}
	coreConfig := signalcontrol.CoreConfig{District: id, Policy: "simulate", PolicyVersion: "1", Controller: ctrl, Rules: rules, Isolated: o.isolated, Corridor: o.corridor}
	if o.pipeline {
		p, err := newPipeline(ctx, id, defs, clock, coreConfig, o.data, log)
		if err != nil {
			return simulated{}, err
		}
		d, key, commander = p, p.deviceKey, p.commander
	} else {
		p, err := newDirect(coreConfig, defs)
		if err != nil {
			return simulated{}, err
		}
		d, key, commander = p, p.deviceKey, p.commander
	}
	defer func() { err = errors.Join(err, d.close()) }()

	atk, err := newAttack(o.attack, traffic.JunctionID(o.attackAt), w.Now().Add(o.attackAfter), defs)
	if err != nil {
		return simulated{}, err
	}
	seen := &flags{a: atk}
	d.watch(atk, seen)
	units := make([]*roadside.Unit, len(defs))
	for i, j := range defs {
		cab, err := w.cabinet(j.ID)
		if err != nil {
			return simulated{}, err
		}
		k, err := key(j.ID)
		if err != nil {
			return simulated{}, err
		}
		units[i], err = roadside.New(w.Now(), roadside.Config{
			District: id, Junction: j, Device: district.DeviceID(j.ID), Key: k, BootEpoch: 1,
			Commander: commander, Driver: atk.on(j, cab, w.Now), Rules: rules, Logger: log,
		})
		if err != nil {
			return simulated{}, err
		}
	}
	if p, ok := d.(*pipeline); ok {
		if err := p.attach(units, defs); err != nil {
			return simulated{}, err
		}
	}
	res, err := lockstep(ctx, o, w, units, d, clock, length, func(i int, now time.Time) time.Time { return atk.clock(defs[i].ID, now) })
	if err != nil {
		return simulated{}, err
	}
	res.Config, res.Controller, res.Rules, res.Sensing, res.Seed, res.Pipeline = o.config, o.controller, o.rules, o.sensing, o.seed, o.pipeline
	for _, u := range units {
		c := u.Counters()
		res.InterlockTrips += c.Trips
		res.Refused += c.RefusedCommands()
		res.Fallbacks += c.Fallbacks
	}
	if atk != nil {
		res.Attack, res.CycleS = o.attack, atk.cycleOf(defs).Seconds()
		res.FlaggedRule, res.FlaggedS = seen.found()
	}
	switch w := w.(type) {
	case sumoWorld:
		if res.Result, err = w.Finish(); err != nil {
			return simulated{}, err
		}
	case cityWorld:
		res.Result = cityResult(w.City)
	}
	res.WallS = time.Since(began).Seconds()
	return res, nil
}

// lockstep drives the world: each step's frames are decided on before the next
// step is taken.
func lockstep(ctx context.Context, o simulateOptions, w world, units []*roadside.Unit, d decider, clock *simClock, length time.Duration, unitClock func(int, time.Time) time.Time) (res simulated, err error) {
	var lines *json.Encoder
	if o.decisions != "" {
		f, err := os.Create(o.decisions)
		if err != nil {
			return res, err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		lines = json.NewEncoder(f)
	}
	start := w.Now()
	lastFrame := start // the first interval ends one interval later
	lastShown := time.Now()
	frames := make([]unitFrame, 0, len(units))
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		now := w.Now()
		if length > 0 && now.Sub(start) >= length {
			break
		}
		clock.set(now)
		if now.Sub(lastFrame) >= frameEvery {
			lastFrame = now
			frames = frames[:0]
			for i, u := range units {
				e, f, err := u.Frame(unitClock(i, now))
				if err != nil {
					return res, err
				}
				frames = append(frames, unitFrame{u, f, e})
			}
			if o.frames != nil {
				o.frames(now, frames)
			}
			commands, err := d.decide(ctx, now, frames)
			if err != nil {
				return res, fmt.Errorf("at %v: %w", now.Sub(start), err)
			}
			res.Decisions += len(commands)
			res.StaleSteps += len(units) - len(commands)
			for _, c := range commands {
				dec := decision{now, c.Junction, c.Stage, c.Rule}
				if o.observe != nil {
					o.observe(dec)
				}
				if lines != nil {
					if err := lines.Encode(dec); err != nil {
						return res, err
					}
				}
			}
		}
		for i, u := range units {
			if _, err := u.Tick(unitClock(i, now)); err != nil {
				return res, err
			}
		}
		if more, err = w.Step(); err != nil {
			return res, err
		}
		res.Steps++
		if o.progress != nil && time.Since(lastShown) > time.Second {
			lastShown = time.Now()
			fmt.Fprintf(o.progress, "\r%v simulated, %d decisions ", w.Now().Sub(start).Round(time.Second), res.Decisions)
		}
	}
	if o.progress != nil {
		fmt.Fprintln(o.progress)
	}
	return res, nil
}

// direct calls the controllers without any network in between.
type direct struct {
	core *signalcontrol.Core
	defs map[traffic.JunctionID]*traffic.Junction
	key  ed25519.PrivateKey
	n    ledger.Height

	attack *attack
	seen   *flags
}

func newDirect(c signalcontrol.CoreConfig, defs []*traffic.Junction) (*direct, error) {
	// Nobody checks these signatures: the seed may be known to everyone.
	seed := sha256.Sum256([]byte("stopline simulate, a key that protects nothing"))
	d := &direct{defs: map[traffic.JunctionID]*traffic.Junction{}, key: ed25519.NewKeyFromSeed(seed[:])}
	for _, j := range defs {
		d.defs[j.ID] = j
	}
	c.Key = d.key
	var err error
	d.core, err = signalcontrol.NewCore(c)
	return d, err
}

func (d *direct) deviceKey(traffic.JunctionID) (ed25519.PrivateKey, error) { return d.key, nil }

func (d *direct) commander(identity.KeyID) (ed25519.PublicKey, bool) { return nil, false }

func (d *direct) decide(_ context.Context, now time.Time, frames []unitFrame) ([]traffic.Command, error) {
	d.n++
	fs := make([]*traffic.Frame, len(frames))
	for i, f := range frames {
		fs[i] = f.frame
	}
	commands, refused := d.core.Commands(now, d.n, fs, func(id traffic.JunctionID) (*traffic.Junction, bool) {
		j, ok := d.defs[id]
		return j, ok
	})
	// A unit with a wrong clock has no decision, and goes on alone.
	refused = slices.DeleteFunc(refused, func(r signalcontrol.Refusal) bool { return r.Stale && d.attack != nil && d.attack.shift != 0 })
	if len(refused) > 0 {
		return nil, kind.Errorf(kind.Internal, "junction %s: %s", refused[0].Junction, refused[0].Reason)
	}
	for _, h := range d.core.Health() {
		d.seen.see(&h)
	}
	at := 0
	for _, f := range frames {
		if at < len(commands) && commands[at].Junction == f.frame.Junction {
			f.unit.Obey(d.attack.clock(f.frame.Junction, now), commands[at])
			at++
		}
	}
	return commands, nil
}

func (d *direct) watch(a *attack, seen *flags) { d.attack, d.seen = a, seen }

func (d *direct) close() error { return nil }
