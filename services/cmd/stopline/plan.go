package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"text/tabwriter"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/plan"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/traci"
	"github.com/stopline-traffic/stopline/services/roadside"
)

var planCommand = command{
	name: "plan",
	synopsis: `stopline plan check FILE… [--junction FILE.json | --config FILE.sumocfg|city] [--json]
stopline plan diff A B [--json]
stopline plan export ID [--junction FILE.json | --config FILE.sumocfg|city]
stopline plan simulate FILE… [--config FILE.sumocfg|city] [--for DURATION] [--seed N] [--json]`,
	summary: "check, compare, make and try signal plans that are written as files",
	manual: `A plan file is YAML: phases with their groups and times, rings with barriers,
plans with cycle, offset and splits, and a schedule by day and time of day.

check     reads files and prints every rule that one breaks, with its line. With
          a junction's definition (a JSON file as in the registry, or all of a
          scenario) it also refuses what would be unsafe there: groups that
          conflict in one phase or in both rings, and times below those filed.
diff      prints what is different in B: phases by number, plans by name, the
          schedule by day. The exit status is 0 where nothing is, 1 otherwise.
export    writes the filed plan of a junction as a file.
simulate  runs a scenario in which the junctions of the files run them, by the
          schedule, and all others their filed plans; no services, no commands. It
          prints the delay of the whole network, and what the detectors saw of each
          movement at those junctions: vehicles, the mean and the longest queue, the
          delay and the stops of a vehicle. Queues are standing vehicles that are
          seen; where one detector watches several movements, each is given an equal
          part. In SUMO --sensing oracle sees 200 m exactly.

EXIT STATUS
    0  in order; no difference
    1  refused; different
    2  wrong usage`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := planOptions{}
		fs.StringVar(&o.junction, "junction", "", "definition of the junction: JSON `FILE`, as in the registry")
		fs.StringVar(&o.config, "config", "", "`FILE` .sumocfg, or city, whose junctions are meant")
		fs.StringVar(&o.sensing, "sensing", "detectors", "SUMO, simulate only: `NAME` of what is seen, detectors or oracle")
		fs.Int64Var(&o.seed, "seed", 1, "simulate only: random seed `N`")
		fs.DurationVar(&o.length, "for", 0, "simulate only: at most this long; 0: to the scenario's end (the city: 1h)")
		fs.BoolVar(&o.json, "json", false, "print one JSON document")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) < 2 {
				return usageError("plan: check, diff, export or simulate, and a file; `stopline plan -h` explains")
			}
			verb, args := args[0], args[1:]
			switch {
			case o.junction != "" && o.config != "":
				return usageError("plan: --junction or --config, not both")
			case verb == "check":
				return o.check(ctx, args, s)
			case verb == "diff" && len(args) == 2:
				return o.diff(args[0], args[1], s)
			case verb == "export" && len(args) == 1:
				return o.export(ctx, traffic.JunctionID(args[0]), s)
			case verb == "simulate":
				return o.simulate(ctx, args, s)
			}
			return usageError("plan: %q with %d arguments; `stopline plan -h` explains", verb, len(args))
		}
	},
}

type planOptions struct {
	junction, config, sensing string
	seed                      int64
	length                    time.Duration
	json                      bool
}

// readPlan reads a file. What is wrong with it names the file.
func readPlan(path string) (*plan.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, plan.MaxBytes+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return plan.Parse(b)
}

// definitions returns the junctions that are meant, nil where none are named.
func (o planOptions) definitions(ctx context.Context) (map[traffic.JunctionID]*traffic.Junction, error) {
	defs := map[traffic.JunctionID]*traffic.Junction{}
	switch {
	case o.junction != "":
		b, err := os.ReadFile(o.junction)
		if err != nil {
			return nil, err
		}
		j, err := traffic.ParseJunction(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.junction, err)
		}
		defs[j.ID] = j
	case o.config == cityName:
		w, err := openWorld(ctx, worldOptions{config: cityName})
		if err != nil {
			return nil, err
		}
		for _, j := range w.Junctions() {
			defs[j.ID] = j
		}
		return defs, w.Close()
	case o.config != "":
		s, err := traci.Load(o.config)
		if err != nil {
			return nil, err
		}
		all, err := s.Derive(traci.Limits{}, traci.Sensing(o.sensing))
		if err != nil {
			return nil, err
		}
		for i := range all {
			defs[all[i].Junction.ID] = all[i].Junction
		}
	default:
		return nil, nil
	}
	return defs, nil
}

// planChecked is what check says of one file.
type planChecked struct {
	File     string        `json:"file"`
	OK       bool          `json:"ok"`
	Against  bool          `json:"against_junction"` // and not only by itself
	Problems plan.Problems `json:"problems,omitempty"`
}

func (o planOptions) check(ctx context.Context, files []string, s streams) error {
	defs, err := o.definitions(ctx)
	if err != nil {
		return err
	}
	var all []planChecked
	bad := 0
	for _, path := range files {
		c := planChecked{File: path}
		f, err := readPlan(path)
		if err == nil && defs != nil {
			j := defs[f.Junction]
			if j == nil {
				err = plan.Problems{{Field: "junction", Rule: fmt.Sprintf("%q is none of those defined", f.Junction)}}
			} else {
				c.Against = true
				err = f.Against(j)
			}
		}
		if err != nil && !errors.As(err, &c.Problems) {
			return err
		}
		if c.OK = err == nil; !c.OK {
			bad++
		}
		all = append(all, c)
		if o.json {
			continue
		}
		for _, p := range c.Problems {
			fmt.Fprintf(s.out, "%s:%d: %s: %s\n", path, p.Line, p.Field, p.Rule)
		}
		if c.OK {
			what := "in order by itself; no junction was given"
			if c.Against {
				what = "in order for junction " + string(f.Junction)
			}
			fmt.Fprintf(s.out, "%s: %s\n", path, what)
		}
	}
	if o.json {
		if err := json.NewEncoder(s.out).Encode(all); err != nil {
			return err
		}
	}
	if bad > 0 {
		return exitError{exitFailed, fmt.Sprintf("plan check: %d of %d files refused", bad, len(files))}
	}
	return nil
}

func (o planOptions) diff(a, b string, s streams) error {
	f, err := readPlan(a)
	if err != nil {
		return fmt.Errorf("%s: %w", a, err)
	}
	g, err := readPlan(b)
	if err != nil {
		return fmt.Errorf("%s: %w", b, err)
	}
	changes := plan.Diff(f, g)
	if o.json {
		if changes == nil {
			changes = []plan.Change{}
		}
		if err := json.NewEncoder(s.out).Encode(changes); err != nil {
			return err
		}
	} else {
		for _, c := range changes {
			fmt.Fprintln(s.out, c)
		}
	}
	if len(changes) > 0 {
		return exitError{code: exitFailed}
	}
	return nil
}

func (o planOptions) export(ctx context.Context, id traffic.JunctionID, s streams) error {
	defs, err := o.definitions(ctx)
	if err != nil {
		return err
	}
	if defs == nil {
		return usageError("plan export: --junction or --config is needed")
	}
	j := defs[id]
	if j == nil {
		return fmt.Errorf("plan export: junction %q is none of those defined", id)
	}
	f, err := plan.Export(j)
	if err != nil {
		return fmt.Errorf("plan export: the filed plan of %s cannot be written as a file: %w", id, err)
	}
	_, err = s.out.Write(f.Format())
	return err
}

// planRun is what simulate prints.
type planRun struct {
	Config string `json:"config"`
	Seed   int64  `json:"seed"`
	traci.Result
	Trips     uint64         `json:"interlock_trips"`
	Junctions []planJunction `json:"junctions"`
}

type planJunction struct {
	Junction  traffic.JunctionID `json:"junction"`
	Movements []planMovement     `json:"movements"`
}

// planMovement is what detectors saw of one movement.
type planMovement struct {
	From     traffic.LaneID `json:"from"`
	To       traffic.LaneID `json:"to"`
	Group    string         `json:"group"`
	Vehicles int            `json:"vehicles"`
	// DelayS is the time that a vehicle stood, Stops how often it did.
	QueueMean float64 `json:"queue_mean"`
	QueueMax  int     `json:"queue_max"`
	DelayS    float64 `json:"delay_s"`
	Stops     float64 `json:"stops"`
}

func (o planOptions) simulate(ctx context.Context, files []string, s streams) (err error) {
	if o.junction != "" {
		return usageError("plan simulate: --config, not --junction: a street is needed")
	}
	if o.config == "" {
		o.config = cityName
	}
	if o.length == 0 && o.config == cityName {
		o.length = time.Hour
	}
	byJunction := map[traffic.JunctionID]*plan.File{}
	for _, path := range files {
		f, err := readPlan(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if byJunction[f.Junction] != nil {
			return usageError("plan simulate: two files for junction %s", f.Junction)
		}
		byJunction[f.Junction] = f
	}
	rules, err := timing.RulesNamed("field")
	if err != nil {
		return err
	}
	w, err := openWorld(ctx, worldOptions{config: o.config, rules: rules, sensing: o.sensing, seed: o.seed, length: o.length})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()

	// Nobody commands here, and nobody checks the units' signatures.
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	var units []*roadside.Unit
	watched := map[int]*planWatch{}
	for i, j := range w.Junctions() {
		c := roadside.Config{District: districtName(o.config), Junction: j, Device: district.DeviceID(j.ID), Key: key, BootEpoch: 1,
			Commander: func(identity.KeyID) (ed25519.PublicKey, bool) { return nil, false }, Rules: rules, Logger: slog.New(slog.DiscardHandler)}
		if f := byJunction[j.ID]; f != nil {
			delete(byJunction, j.ID)
			zone, err := time.LoadLocation(f.Zone)
			if err != nil {
				return fmt.Errorf("plan of %s: zone: %w", j.ID, err)
			}
			compiled, ctrl, err := f.Controller(j, zone)
			if err != nil {
				return fmt.Errorf("plan of %s: %w", j.ID, err)
			}
			c.Junction, c.Local = compiled, &ctrl
			watched[i] = newPlanWatch(compiled)
		}
		if c.Driver, err = w.cabinet(j.ID); err != nil {
			return err
		}
		u, err := roadside.New(w.Now(), c)
		if err != nil {
			return err
		}
		units = append(units, u)
	}
	for id := range byJunction {
		return fmt.Errorf("plan simulate: junction %q is not in %s", id, o.config)
	}
	start, lastFrame := w.Now(), w.Now()
	for more := true; more && (o.length == 0 || w.Now().Sub(start) < o.length); {
		if err := ctx.Err(); err != nil {
			return err
		}
		now := w.Now()
		frames := now.Sub(lastFrame) >= frameEvery
		if frames {
			lastFrame = now
		}
		for i, u := range units {
			if watch := watched[i]; frames && watch != nil {
				_, f, err := u.Frame(now)
				if err != nil {
					return err
				}
				watch.see(f)
			}
			if _, err := u.Tick(now); err != nil {
				return err
			}
		}
		if more, err = w.Step(); err != nil {
			return err
		}
	}
	r := planRun{Config: o.config, Seed: o.seed}
	for i, u := range units {
		r.Trips += u.Counters().Trips
		if watch := watched[i]; watch != nil {
			r.Junctions = append(r.Junctions, watch.result())
		}
	}
	switch w := w.(type) {
	case sumoWorld:
		if r.Result, err = w.Finish(); err != nil {
			return err
		}
	case cityWorld:
		r.Result = cityResult(w.City)
	}
	if o.json {
		return json.NewEncoder(s.out).Encode(r)
	}
	return r.print(s.out)
}

func (r planRun) print(w io.Writer) error {
	fmt.Fprintf(w, "delay %.1f s a trip, %d trips, %d finished\n", r.DelayS, r.Result.Trips, r.Finished)
	for _, j := range r.Junctions {
		fmt.Fprintf(w, "\njunction %s\n", j.Junction)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(t, "movement\tgroup\tvehicles\tqueue, mean\tmost\tdelay, s\tstops\t\n")
		for _, m := range j.Movements {
			fmt.Fprintf(t, "%s → %s\t%s\t%d\t%.1f\t%d\t%.1f\t%.2f\t\n", m.From, m.To, m.Group, m.Vehicles, m.QueueMean, m.QueueMax, m.DelayS, m.Stops)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// planWatch adds up what the frames of one junction say.
type planWatch struct {
	j       *traffic.Junction
	seconds float64
	sums    []planSum
}

type planSum struct {
	passed, halted, stops float64 // vehicles, vehicle seconds, vehicles
	most, before          int
}

func newPlanWatch(j *traffic.Junction) *planWatch {
	return &planWatch{j: j, sums: make([]planSum, len(j.Movements))}
}

func (p *planWatch) see(f *traffic.Frame) {
	dt := f.Interval.Seconds()
	p.seconds += dt
	v := timing.Observe(p.j, f)
	for i := range p.sums {
		m, s := &v.Movements[i], &p.sums[i]
		part := 1 / float64(max(m.Shared, 1))
		s.passed += float64(m.Departed) * part
		s.halted += float64(m.Halted) * dt * part
		s.most = max(s.most, m.Halted)
		// Who stands now and did not has stopped; so have those in whose place
		// others stand who went meanwhile, as far as that can be seen.
		s.stops += float64(max(m.Halted-s.before, 0)) * part
		s.before = m.Halted
	}
}

func (p *planWatch) result() planJunction {
	out := planJunction{Junction: p.j.ID}
	for i, m := range p.j.Movements {
		s := p.sums[i]
		n := max(s.passed, 1)
		out.Movements = append(out.Movements, planMovement{From: m.From, To: m.To, Group: p.j.Groups[m.Group].Name, Vehicles: int(s.passed + 0.5),
			QueueMean: s.halted / max(p.seconds, 1), QueueMax: s.most, DelayS: s.halted / n, Stops: s.stops / n})
	}
	return out
}
