package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var benchCommand = command{
	name:     "bench",
	synopsis: "stopline bench signals --scenarios DIR --out DIR [--seeds N] [-j N] [--controllers LIST] [--tracks LIST]",
	summary:  "run every scenario under every controller and report delay",
	manual: `Runs every .sumocfg below DIR under each controller and track with each seed, and
writes into the output folder

  results.jsonl     one line for each run, as simulate --json prints it
  table.csv         mean, spread and worst seed of each scenario, track, controller
  table.md          the same to read
  delay-*.svg       delay by controller: each seed a point, the mean a bar
  queues-*.svg      standing vehicles over the hour, by controller (first seed)
  corridor-*.png    vehicles along the longest chain of signals against time, with
                    what the signals showed (first seed, first 15 minutes)

A run that results.jsonl has already is not made again, unless its controller has
another version since. So a bench that was broken off goes on where it was, and
--seeds may be raised.

Tracks:      free-oracle           rules free, sensing oracle
             resco-oracle          rules resco, sensing oracle
             deployable-detectors  rules deployable, sensing detectors
Controllers: fixed, actuated, maxpressure, adaptive, and adaptive-isolated, which
             plans without what neighbours announce.

Delay is the strict one, see stopline simulate -h.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := benchOptions{}
		fs.StringVar(&o.scenarios, "scenarios", "", "`DIR` below which the .sumocfg files are")
		fs.StringVar(&o.out, "out", "", "`DIR` for the report")
		fs.IntVar(&o.seeds, "seeds", 10, "seeds 1 to `N`")
		fs.IntVar(&o.workers, "j", max(1, runtime.NumCPU()/2), "`N` simulations at a time; each keeps about two cores busy")
		controllers := fs.String("controllers", strings.Join(benchControllers, ","), "`LIST` of controllers, with commas")
		tracks := fs.String("tracks", trackNames(), "`LIST` of tracks, with commas")
		plots := fs.Bool("plots", true, "draw plots")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) != 1 || args[0] != "signals" {
				return usageError("bench: what to measure is needed: stopline bench signals")
			}
			o.controllers, o.plots = strings.Split(*controllers, ","), *plots
			for _, name := range strings.Split(*tracks, ",") {
				i := slices.IndexFunc(benchTracks, func(t benchTrack) bool { return t.name == name })
				if i < 0 {
					return usageError("bench: --tracks %q: must be of %s", name, trackNames())
				}
				o.tracks = append(o.tracks, benchTracks[i])
			}
			return benchSignals(ctx, o, s)
		}
	},
}

type benchOptions struct {
	scenarios, out string
	seeds, workers int
	controllers    []string
	tracks         []benchTrack
	plots          bool
	// length cuts runs short; tests do.
	length time.Duration
}

func (o benchOptions) validate() error {
	var errs []error
	if o.scenarios == "" || o.out == "" {
		errs = append(errs, errors.New("--scenarios and --out are needed"))
	}
	if o.seeds < 1 || o.seeds > 10_000 {
		errs = append(errs, fmt.Errorf("--seeds %d: must be 1 to 10000", o.seeds))
	}
	if o.workers < 1 {
		errs = append(errs, fmt.Errorf("-j %d: must be at least 1", o.workers))
	}
	for _, c := range o.controllers {
		if !slices.Contains(benchControllers, c) {
			errs = append(errs, fmt.Errorf("--controllers %q: must be of %s", c, strings.Join(benchControllers, ",")))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return usageError("bench: %v", err)
	}
	return nil
}

// A benchTrack is a set of limits with what controllers may know.
type benchTrack struct{ name, rules, sensing string }

var benchTracks = []benchTrack{
	{"free-oracle", "free", "oracle"},
	{"resco-oracle", "resco", "oracle"},
	{"deployable-detectors", "deployable", "detectors"},
}

func trackNames() string {
	var out []string
	for _, t := range benchTracks {
		out = append(out, t.name)
	}
	return strings.Join(out, ",")
}

// isolatedSuffix makes a controller of the same name that hears no neighbours.
const isolatedSuffix = "-isolated"

var benchControllers = []string{"fixed", "actuated", "maxpressure", "adaptive", "adaptive" + isolatedSuffix}

// benchResult is one line of results.jsonl.
type benchResult struct {
	Scenario string `json:"scenario"` // the path below --scenarios, without .sumocfg
	Track    string `json:"track"`
	// Controller is the bench's name of it, Version of what it decided by.
	Controller string `json:"bench_controller"`
	Version    string `json:"controller_version"`
	LengthS    int64  `json:"length_s,omitempty"` // where the run was cut short
	simulated
	// Series is there for the first seed: what happened over time.
	Series *benchSeries `json:"series,omitempty"`
}

// benchSeries is what the plots over time show.
type benchSeries struct {
	StartS   int64 `json:"start_s"`
	Standing []int `json:"standing"` // vehicles, every queueEvery
}

const queueEvery = 10 * time.Second

type benchKey struct {
	scenario, track, controller, version string
	seed, length                         int64
}

func (r benchResult) key() benchKey {
	return benchKey{r.Scenario, r.Track, r.Controller, r.Version, r.Seed, r.LengthS}
}

type benchJob struct {
	benchKey
	config string
	track  benchTrack
}

func benchSignals(ctx context.Context, o benchOptions, s streams) error {
	if err := o.validate(); err != nil {
		return err
	}
	configs, err := findScenarios(o.scenarios)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	path := filepath.Join(o.out, "results.jsonl")
	done, err := readResults(path)
	if err != nil {
		return err
	}
	var jobs []benchJob
	wanted := map[benchKey]bool{}
	for seed := int64(1); seed <= int64(o.seeds); seed++ {
		for _, c := range configs {
			for _, t := range o.tracks {
				for _, name := range o.controllers {
					ctrl, err := timing.Named(strings.TrimSuffix(name, isolatedSuffix))
					if err != nil {
						return err
					}
					k := benchKey{c.name, t.name, name, ctrl.Version, seed, int64(o.length / time.Second)}
					wanted[k] = true
					if _, have := done[k]; !have {
						jobs = append(jobs, benchJob{k, c.path, t})
					}
				}
			}
		}
	}
	failed := runJobs(ctx, o, jobs, done, path, s.err)
	if ctx.Err() != nil {
		return fmt.Errorf("bench: stopped; the same command goes on from here: %w", ctx.Err())
	}
	var results []benchResult
	for k, r := range done {
		if wanted[k] {
			results = append(results, r)
		}
	}
	rows := tabulate(results)
	if err := writeTables(o.out, rows); err != nil {
		return errors.Join(err, failed)
	}
	if o.plots {
		if err := drawPlots(ctx, o, configs, results); err != nil {
			return errors.Join(err, failed)
		}
	}
	if err := writeMarkdown(s.out, rows); err != nil {
		return errors.Join(err, failed)
	}
	return failed
}

// A scenarioFile is one .sumocfg and its name in the report.
type scenarioFile struct{ name, path string }

func findScenarios(dir string) ([]scenarioFile, error) {
	var out []scenarioFile
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && strings.HasSuffix(path, ".sumocfg") {
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			name := strings.TrimSuffix(filepath.ToSlash(rel), ".sumocfg")
			// DIR/x/x.sumocfg is x: the usual layout.
			if a, b, ok := strings.Cut(name, "/"); ok && a == b {
				name = a
			}
			out = append(out, scenarioFile{name, path})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("bench: --scenarios: %w", err)
	}
	if len(out) == 0 {
		return nil, usageError("bench: --scenarios %s: no .sumocfg is below it", dir)
	}
	return out, nil
}

// readResults reads what earlier runs left. A last line that was not finished is
// left out, and will be made again.
func readResults(path string) (map[benchKey]benchResult, error) {
	done := map[benchKey]benchResult{}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return done, nil
	}
	if err != nil {
		return nil, err
	}
	whole := strings.LastIndexByte(string(b), '\n') + 1
	if whole < len(b) {
		if err := os.Truncate(path, int64(whole)); err != nil {
			return nil, err
		}
	}
	line := 0
	for text := range strings.Lines(string(b[:whole])) {
		line++
		var r benchResult
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			return nil, fmt.Errorf("%s: line %d: %w", path, line, err)
		}
		done[r.key()] = r
	}
	return done, nil
}

// runJobs makes the runs, writes each down as it ends, and returns what went
// wrong with those that failed.
func runJobs(ctx context.Context, o benchOptions, jobs []benchJob, done map[benchKey]benchResult, path string, progress io.Writer) error {
	if len(jobs) == 0 {
		return nil
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	var mu sync.Mutex // guards all below
	var errs []error
	next, ended := 0, 0
	began := time.Now()
	worker := func(ctx context.Context) error {
		for {
			mu.Lock()
			if next >= len(jobs) || ctx.Err() != nil {
				mu.Unlock()
				return nil
			}
			j := jobs[next]
			next++
			mu.Unlock()
			r, err := runJob(ctx, o, j)
			mu.Lock()
			ended++
			if err == nil {
				err = appendResult(f, r)
			}
			if err != nil {
				if ctx.Err() == nil {
					errs = append(errs, fmt.Errorf("%s %s %s seed %d: %w", j.scenario, j.benchKey.track, j.controller, j.seed, err))
				}
			} else {
				done[j.benchKey] = r
			}
			left := time.Since(began) / time.Duration(ended) * time.Duration(len(jobs)-ended)
			fmt.Fprintf(progress, "%d of %d runs, about %v left: %s %s %s seed %d: ", ended, len(jobs), left.Round(time.Second), j.scenario, j.benchKey.track, j.controller, j.seed)
			if err != nil {
				fmt.Fprintf(progress, "failed: %v\n", err)
			} else {
				fmt.Fprintf(progress, "%.1f s delay in %.1f s\n", r.DelayS, r.WallS)
			}
			mu.Unlock()
		}
	}
	// Not run.All, which ends all with the first: each worker ends when nothing
	// is left, and the others go on.
	var wg sync.WaitGroup
	for range min(o.workers, len(jobs)) {
		wg.Go(func() {
			if err := worker(ctx); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, f.Close())...)
}

func appendResult(f *os.File, r benchResult) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	return err
}

func runJob(ctx context.Context, o benchOptions, j benchJob) (benchResult, error) {
	r := benchResult{Scenario: j.scenario, Track: j.benchKey.track, Controller: j.controller, Version: j.version, LengthS: j.length}
	so := simulateOptions{
		config: j.config, controller: strings.TrimSuffix(j.controller, isolatedSuffix), isolated: strings.HasSuffix(j.controller, isolatedSuffix),
		rules: j.track.rules, sensing: j.track.sensing, seed: j.seed, length: o.length,
	}
	if j.seed == 1 {
		r.Series = &benchSeries{}
		so.frames = r.Series.add
	}
	var err error
	r.simulated, err = simulate(ctx, so)
	r.Config = j.scenario // paths differ from machine to machine
	return r, err
}

// add takes a step's frames into the series.
func (s *benchSeries) add(now time.Time, frames []unitFrame) {
	if s.StartS == 0 {
		s.StartS = now.Unix()
	}
	if (now.Unix()-s.StartS)%int64(queueEvery/time.Second) != 0 {
		return
	}
	standing := 0
	for _, f := range frames {
		standing += standingOf(f)
	}
	s.Standing = append(s.Standing, standing)
}

// A tableRow is one scenario, track and controller over all seeds.
type tableRow struct {
	Scenario, Track, Controller string
	Seeds                       int
	Mean, SD, Best, Worst       float64
	Finished, NeverEntered      float64 // means
	WallS                       float64 // mean
	Trips, Refused, Stale       uint64  // sums, of interlock trips, commands refused, junction-steps without a decision
}

func tabulate(results []benchResult) []tableRow {
	type key struct{ s, t, c string }
	groups := map[key][]benchResult{}
	for _, r := range results {
		k := key{r.Scenario, r.Track, r.Controller}
		groups[k] = append(groups[k], r)
	}
	var rows []tableRow
	for k, rs := range groups {
		slices.SortFunc(rs, func(a, b benchResult) int { return cmp.Compare(a.Seed, b.Seed) })
		row := tableRow{Scenario: k.s, Track: k.t, Controller: k.c, Seeds: len(rs), Best: math.Inf(1)}
		n := float64(len(rs))
		for _, r := range rs {
			row.Mean += r.DelayS / n
			row.Best, row.Worst = min(row.Best, r.DelayS), max(row.Worst, r.DelayS)
			row.Finished += float64(r.Finished) / n
			row.NeverEntered += float64(r.NeverEntered) / n
			row.WallS += r.WallS / n
			row.Trips += r.InterlockTrips
			row.Refused += r.Refused
			row.Stale += uint64(r.StaleSteps)
		}
		for _, r := range rs {
			row.SD += (r.DelayS - row.Mean) * (r.DelayS - row.Mean)
		}
		if len(rs) > 1 {
			row.SD = math.Sqrt(row.SD / (n - 1))
		}
		rows = append(rows, row)
	}
	order := func(c string) int { return slices.Index(benchControllers, c) }
	track := func(t string) int {
		return slices.IndexFunc(benchTracks, func(b benchTrack) bool { return b.name == t })
	}
	slices.SortFunc(rows, func(a, b tableRow) int {
		return cmp.Or(cmp.Compare(a.Scenario, b.Scenario), cmp.Compare(track(a.Track), track(b.Track)), cmp.Compare(order(a.Controller), order(b.Controller)))
	})
	return rows
}

func writeTables(dir string, rows []tableRow) error {
	csvFile := func(w io.Writer) error {
		c := csv.NewWriter(w)
		if err := c.Write([]string{"scenario", "track", "controller", "seeds", "delay_mean_s", "delay_sd_s", "delay_best_s", "delay_worst_s", "worst_over_mean", "finished_mean", "never_entered_mean", "wall_mean_s", "interlock_trips", "commands_refused", "stale_steps"}); err != nil {
			return err
		}
		f := func(x float64) string { return strconv.FormatFloat(x, 'f', 2, 64) }
		for _, r := range rows {
			err := c.Write([]string{r.Scenario, r.Track, r.Controller, strconv.Itoa(r.Seeds), f(r.Mean), f(r.SD), f(r.Best), f(r.Worst), f(r.Worst / r.Mean), f(r.Finished), f(r.NeverEntered), f(r.WallS),
				strconv.FormatUint(r.Trips, 10), strconv.FormatUint(r.Refused, 10), strconv.FormatUint(r.Stale, 10)})
			if err != nil {
				return err
			}
		}
		c.Flush()
		return c.Error()
	}
	return errors.Join(
		writeText(filepath.Join(dir, "table.csv"), csvFile),
		writeText(filepath.Join(dir, "table.md"), func(w io.Writer) error { return writeMarkdown(w, rows) }),
	)
}

func writeMarkdown(w io.Writer, rows []tableRow) error {
	var b strings.Builder
	b.WriteString("| scenario | track | controller | seeds | delay, s | ± | best | worst | worst / mean | never entered | wall, s |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %.1f | %.1f | %.1f | %.1f | %.2f | %.1f | %.1f |\n", r.Scenario, r.Track, r.Controller, r.Seeds, r.Mean, r.SD, r.Best, r.Worst, r.Worst/r.Mean, r.NeverEntered, r.WallS)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeText writes a file as a whole, or not at all.
func writeText(path string, write func(io.Writer) error) error {
	var b strings.Builder
	w := bufio.NewWriter(&b)
	if err := errors.Join(write(w), w.Flush()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return district.WriteFile(path, []byte(b.String()), 0o644)
}
