package traci

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// Result is what a run was worth, by the strict count: every trip that was
// planned to depart between the run's begin and end counts, also one that never
// entered because the road was full.
type Result struct {
	// DelayS is the mean over Trips, in seconds, of time lost on the way plus
	// time lost before entering; for a trip that never entered, of the run's
	// end minus its planned departure.
	DelayS float64 `json:"delay_s"`
	// DurationS and WaitingS are means over the trips that entered: seconds
	// from entering to arrival (or to the run's end), and seconds standing.
	DurationS float64 `json:"duration_s"`
	WaitingS  float64 `json:"waiting_s"`
	// Trips were planned; Finished of them arrived, NeverEntered did not depart.
	Trips        int `json:"trips"`
	Finished     int `json:"finished"`
	NeverEntered int `json:"never_entered"`
	// WallS is how long the run took, in seconds of our time.
	WallS float64 `json:"wall_s"`
}

// measure computes the result of a run that ended at end from SUMO's tripinfo
// and the planned departures in the route files.
func (s *Scenario) measure(tripinfo string, end time.Duration) (Result, error) {
	planned := map[string]time.Duration{}
	for _, f := range s.RouteFiles {
		if err := readXML(f, func(in io.Reader) error { return departures(in, s.Begin, end, planned) }); err != nil {
			return Result{}, err
		}
	}
	for _, f := range s.AdditionalFiles {
		if err := readXML(f, func(in io.Reader) error { return departures(in, s.Begin, end, planned) }); err != nil {
			return Result{}, err
		}
	}
	var res Result
	err := readXML(tripinfo, func(in io.Reader) (err error) {
		res, err = strict(in, planned, end)
		return err
	})
	return res, err
}

// strict computes the figures from a tripinfo stream. It empties planned.
func strict(in io.Reader, planned map[string]time.Duration, end time.Duration) (Result, error) {
	var res Result
	var lost, duration, waiting float64
	entered := 0
	err := elements(in, "tripinfos", func(d *xml.Decoder, e xml.StartElement) error {
		if e.Name.Local != "tripinfo" {
			return d.Skip()
		}
		id := attr(e, "id")
		value := func(name string) (float64, error) {
			v, err := strconv.ParseFloat(attr(e, name), 64)
			if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
				return 0, fmt.Errorf("<tripinfo id=%q>: %s %q is no number", id, name, attr(e, name))
			}
			return v, nil
		}
		var v [6]float64
		for i, name := range []string{"depart", "arrival", "departDelay", "timeLoss", "duration", "waitingTime"} {
			var err error
			if v[i], err = value(name); err != nil {
				return err
			}
		}
		if v[0] < 0 {
			return d.Skip() // never departed: the plan counts it
		}
		entered++
		delete(planned, id)
		lost += v[2] + v[3]
		duration += v[4]
		waiting += v[5]
		if v[1] >= 0 {
			res.Finished++
		}
		return d.Skip()
	})
	if err != nil {
		return Result{}, err
	}
	// Whole milliseconds, so that the order of the map makes no difference.
	var outside time.Duration
	for _, depart := range planned {
		outside += end - depart
	}
	res.NeverEntered = len(planned)
	res.Trips = entered + res.NeverEntered
	if res.Trips > 0 {
		res.DelayS = (lost + outside.Seconds()) / float64(res.Trips)
	}
	if entered > 0 {
		res.DurationS, res.WaitingS = duration/float64(entered), waiting/float64(entered)
	}
	return res, nil
}

// departures adds the planned departures from begin until before end. SUMO
// leaves out what departs earlier, and what departs later is not of this run.
func departures(in io.Reader, begin, end time.Duration, planned map[string]time.Duration) error {
	return elements(in, "", func(d *xml.Decoder, e xml.StartElement) error {
		var err error
		switch e.Name.Local {
		case "vehicle", "trip":
			err = departure(e, begin, end, planned)
		case "flow":
			err = flow(e, begin, end, planned)
		}
		if err != nil {
			return fmt.Errorf("<%s id=%q>: %w", e.Name.Local, attr(e, "id"), err)
		}
		return d.Skip()
	})
}

func departure(e xml.StartElement, begin, end time.Duration, planned map[string]time.Duration) error {
	id, depart := attr(e, "id"), attr(e, "depart")
	switch depart {
	case "triggered", "containerTriggered", "split":
		return nil // departs when somebody else comes: there is no planned time
	case "now", "begin":
		planned[id] = begin
		return nil
	}
	at, err := parseTime(depart)
	if err != nil {
		return fmt.Errorf("depart: %w", err)
	}
	if at >= begin && at < end {
		planned[id] = at
	}
	return nil
}

// maxFlow bounds what one flow may plan: more is a mistake in the file.
const maxFlow = 1_000_000

// flow adds the vehicles of a flow, evenly spaced as SUMO has them.
func flow(e xml.StartElement, begin, end time.Duration, planned map[string]time.Duration) error {
	from, to := begin, end
	var err error
	if b := attr(e, "begin"); b != "" {
		if from, err = parseTime(b); err != nil {
			return fmt.Errorf("begin: %w", err)
		}
	}
	if t := attr(e, "end"); t != "" {
		if to, err = parseTime(t); err != nil {
			return fmt.Errorf("end: %w", err)
		}
	}
	number := math.Inf(1)
	if s := attr(e, "number"); s != "" {
		if number, err = strconv.ParseFloat(s, 64); err != nil || !(number >= 0) {
			return fmt.Errorf("number %q is no number from 0", s)
		}
	}
	period := 0.0 // seconds
	switch {
	case attr(e, "probability") != "" || strings.HasPrefix(attr(e, "period"), "exp"):
		return kind.Errorf(kind.Invalid, "departs at random: what should have entered, and did not, cannot be counted from the file")
	case attr(e, "vehsPerHour") != "" || attr(e, "perHour") != "":
		per, err := strconv.ParseFloat(attr(e, "vehsPerHour")+attr(e, "perHour"), 64)
		if err != nil || !(per > 0) {
			return fmt.Errorf("vehsPerHour %q is no positive number", attr(e, "vehsPerHour")+attr(e, "perHour"))
		}
		period = 3600 / per
	case attr(e, "period") != "":
		if period, err = strconv.ParseFloat(attr(e, "period"), 64); err != nil || !(period > 0) {
			return fmt.Errorf("period %q is no positive number", attr(e, "period"))
		}
	case !math.IsInf(number, 1) && number > 0:
		period = (to - from).Seconds() / number
	default:
		return errors.New("has none of number, vehsPerHour, period")
	}
	if last := min(to, end); (last-from).Seconds()/max(period, 1e-3) > maxFlow && number > maxFlow {
		return fmt.Errorf("plans more than %d vehicles", maxFlow)
	}
	for k := 0; float64(k) < number && k < maxFlow; k++ {
		at := from + time.Duration(math.Round(float64(k)*period*1000))*time.Millisecond
		if at >= to || at >= end {
			break
		}
		if at >= begin {
			planned[attr(e, "id")+"."+strconv.Itoa(k)] = at
		}
	}
	return nil
}

// Baseline runs SUMO alone, without TraCI, under the map's own programs, from
// the configured begin to the configured end.
func Baseline(ctx context.Context, s *Scenario, seed int64) (Result, error) {
	if err := (Options{Seed: seed}).Validate(); err != nil {
		return Result{}, err
	}
	if s.End < 0 {
		return Result{}, kind.Errorf(kind.Invalid, "%s: <time> has no <end>: a baseline needs one", s.Path)
	}
	return s.alone(ctx, seed, s.End)
}

// alone runs SUMO without TraCI until end.
func (s *Scenario) alone(ctx context.Context, seed int64, end time.Duration) (res Result, err error) {
	dir, err := os.MkdirTemp("", "stopline-sumo-")
	if err != nil {
		return Result{}, fmt.Errorf("folder for tripinfo: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	trips := filepath.Join(dir, "tripinfo.xml")
	started := time.Now()
	args := append(s.arguments(seed, trips), "--end", strconv.FormatFloat(end.Seconds(), 'f', 3, 64))
	p, err := startSUMO(ctx, program(""), args)
	if err != nil {
		return Result{}, err
	}
	<-p.exited
	defer p.cancel()
	if ctx.Err() != nil {
		return Result{}, fmt.Errorf("%s: sumo was stopped: %w", s.Path, ctx.Err())
	}
	if p.err != nil {
		return Result{}, fmt.Errorf("%s: %w", s.Path, p.died())
	}
	wall := time.Since(started)
	res, err = s.measure(trips, end)
	res.WallS = wall.Seconds()
	return res, err
}
