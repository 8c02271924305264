package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/hires"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var measuresCommand = command{
	name:     "measures",
	synopsis: "stopline measures [--measure NAME,…|all] [--config FILE] [--bin 15m] [--format csv|json]\n    [--out DIR] [--from TIME] [--to TIME] FILE…",
	summary:  "compute signal performance measures from controllers' logs",
	manual: `Reads hi-res logs of traffic signal controllers and prints what signal engineers
judge a junction by. Files may be CSV (also gzip), or Econolite's .dat and .datZ;
the form is told from the content. - is standard input. Several files are one
log, in the order in which they are named.

MEASURES
` + measureList() + `
Bins begin at multiples of --bin since 1970 UTC; a bin without events has no row.
What a log does not tell is empty, or null. Times are UTC.

CONFIGURATION
Those marked * need --config, a CSV file that says what detectors are for:

    DeviceId,Phase,Parameter,Function,Offset_s,Movement
    227,2,3,Advance,,
    227,2,31,Presence,-0.5,TR

Parameter is the detector's channel. Function is Advance (arrivals), Presence
(split failures), Yellow_Red, or any other, for counting only; a channel may have
several lines. Offset_s, in seconds, is added to the detector's times: less than
0 for one that reports late, more for the way to the stop line. Movement is made
of L, T, R and U. The last two columns may be missing.

OUTPUT
CSV of one measure goes to standard output; of several, too, each after a line
with # and its name. With --out each goes to DIR/NAME.csv, or DIR/NAME.json; a
file of that name is overwritten.

A file that is cut off, or holds a line that cannot be read, is measured up to
there, and the command fails at the end. Events that are not in order of time are
an error, and nothing is printed: --sort keeps all events in memory, 32 bytes
each, and sorts them.

EXIT STATUS
    0  done
    1  a log cannot be read to its end, or is out of order
    2  wrong usage, or a file is not there`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := measuresOptions{}
		fs.StringVar(&o.measures, "measure", "all", "`NAMES` of measures, with commas; all is those that --config allows")
		fs.StringVar(&o.config, "config", "", "`FILE` that says what the detectors are for")
		fs.DurationVar(&o.meter.Bin, "bin", 15*time.Minute, "`LENGTH` of a bin, 1s to 24h")
		fs.StringVar(&o.format, "format", "csv", "`FORM` of the tables: csv or json")
		fs.StringVar(&o.time, "time", "rfc3339", "`FORM` of times in them: rfc3339, or an integer since 1970: ms, us, ns")
		fs.StringVar(&o.out, "out", "", "folder `DIR` for one file a measure; made if it is not there")
		fs.StringVar(&o.from, "from", "", "count from this `TIME` on, as 2024-05-13T15:00:00Z, or 2024-05-13 15:00 in --zone")
		fs.StringVar(&o.to, "to", "", "count until before this `TIME`")
		fs.StringVar(&o.zone, "zone", "UTC", "time `ZONE` of stamps that name none, for instance America/Denver")
		fs.StringVar(&o.device, "device", "", "`NAME` of the controller, for files that do not say")
		fs.Float64Var(&o.meter.GreenOccupancy, "green-occupancy", 0.8, "`SHARE` of green from which on a cycle may be a split failure")
		fs.Float64Var(&o.meter.RedOccupancy, "red-occupancy", 0.8, "`SHARE` of the begin of red from which on it is one")
		fs.DurationVar(&o.meter.RedTime, "red-time", 5*time.Second, "`LENGTH` of that begin of red")
		fs.DurationVar(&o.meter.SevereRed, "severe-red", 5*time.Second, "`TIME` into red from which on an actuation is severe")
		fs.BoolVar(&o.sort, "sort", false, "sort the events by time first")
		return func(ctx context.Context, args []string, s streams) error { return measures(ctx, o, args, s) }
	},
}

// measureList is the part of the manual page that explains each measure.
func measureList() string {
	var b strings.Builder
	for _, m := range hires.Measures() {
		mark := " "
		if m.Needs() != "" {
			mark = "*"
		}
		fmt.Fprintf(&b, "    %-14s %s %s\n", m, mark, m.Text())
	}
	return b.String()
}

type measuresOptions struct {
	measures, config, format, time, out, from, to, zone, device string
	meter                                                       hires.MeterOptions
	sort                                                        bool
}

// maxConfig is more than a detector configuration may be.
const maxConfig = 64 << 20

// check completes the options from what was typed.
func (o *measuresOptions) check(files []string) (read hires.Options, err error) {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("measures: "+format, args...))
	}
	if len(files) == 0 {
		bad("a log is needed; - is standard input")
	}
	if i := slices.Index(files, "-"); i >= 0 && slices.Contains(files[i+1:], "-") {
		bad("standard input is named twice")
	}
	if o.format != "csv" && o.format != "json" {
		bad("--format %q: must be csv or json", o.format)
	}
	if !slices.Contains(hires.StampFormats(), hires.StampFormat(o.time)) {
		bad("--time %q: must be rfc3339, ms, us or ns", o.time)
	}
	if read.Zone, err = time.LoadLocation(o.zone); err != nil {
		bad("--zone %q: %v", o.zone, err)
		read.Zone = time.UTC
	}
	read.Device = traffic.DeviceID(o.device)
	for _, f := range []struct {
		name, text string
		at         *int64
	}{{"from", o.from, &o.meter.From}, {"to", o.to, &o.meter.To}} {
		if f.text == "" {
			continue
		}
		t, err := parseMoment(f.text, read.Zone)
		if err != nil {
			bad("--%s %q: %v", f.name, f.text, err)
			continue
		}
		*f.at = t.UnixNano()
	}
	if o.meter.From != 0 && o.meter.To != 0 && o.meter.From >= o.meter.To {
		bad("--from %s: must be before --to %s", o.from, o.to)
	}
	// A zero would mean the default.
	for _, f := range []struct {
		name string
		zero bool
	}{{"bin", o.meter.Bin == 0}, {"green-occupancy", o.meter.GreenOccupancy == 0}, {"red-occupancy", o.meter.RedOccupancy == 0},
		{"red-time", o.meter.RedTime == 0}, {"severe-red", o.meter.SevereRed == 0}} {
		if f.zero {
			bad("--%s 0: must be more than 0", f.name)
		}
	}
	if o.measures != "all" {
		for m := range strings.SplitSeq(o.measures, ",") {
			o.meter.Measures = append(o.meter.Measures, hires.Measure(strings.TrimSpace(m)))
		}
	}
	if o.config != "" {
		if b, err := readAtMost(o.config, maxConfig); err != nil {
			bad("--config: %v", err)
		} else if o.meter.Detectors, err = hires.ParseDetectorConfig(bytes.NewReader(b)); err != nil {
			bad("--config %s: %v", o.config, err)
		}
	}
	if len(errs) == 0 {
		if err := o.meter.Validate(); err != nil {
			bad("%w", err)
			if o.config == "" && strings.Contains(err.Error(), "detector configuration") {
				bad("--config names that file")
			}
		}
	}
	if len(errs) > 0 {
		return read, usageError("%v", errors.Join(errs...))
	}
	return read, nil
}

// parseMoment reads a time as people type it.
func parseMoment(s string, zone *time.Location) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, inEra(t)
	}
	for _, layout := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, zone); err == nil {
			return t, inEra(t)
		}
	}
	return time.Time{}, errors.New("is not a time such as 2024-05-13T15:00:00Z or 2024-05-13 15:00")
}

// inEra refuses times that nanoseconds since 1970 cannot say.
func inEra(t time.Time) error {
	if y := t.UTC().Year(); y <= 1970 || y >= 2262 {
		return errors.New("must be from 1971 to 2261")
	}
	return nil
}

func measures(ctx context.Context, o measuresOptions, files []string, s streams) error {
	read, err := o.check(files)
	if err != nil {
		return err
	}
	meter, err := hires.NewMeter(o.meter)
	if err != nil {
		return err
	}
	in := make([]io.Reader, len(files))
	for i, name := range files {
		if name == "-" {
			in[i] = os.Stdin
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return usageError("measures: %v", err)
		}
		defer func() { _ = f.Close() }() // only read
		if st, err := f.Stat(); err != nil || st.IsDir() {
			return usageError("measures: %s: is a folder, not a log", name)
		}
		in[i] = f
	}

	var all []hires.Event
	var broken []error
	events := 0
	for i, r := range in {
		_, err := hires.Read(r, read, func(e hires.Event) error {
			if events++; events%65536 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			if o.sort {
				all = append(all, e)
			} else {
				meter.Add(e)
			}
			return nil
		})
		if ctx.Err() != nil {
			return fmt.Errorf("measures: %w", context.Cause(ctx))
		}
		if err != nil {
			broken = append(broken, fmt.Errorf("measures: %s: %w", files[i], err))
		}
	}
	slices.SortStableFunc(all, func(a, b hires.Event) int { return cmp.Compare(a.At, b.At) })
	for _, e := range all {
		meter.Add(e)
	}
	r := meter.Finish()
	if r.Late > 0 {
		at := time.Unix(0, r.FirstLate.At).UTC().Format(time.RFC3339Nano)
		return errors.Join(append(broken, fmt.Errorf("measures: %d of %d events are earlier than one before them, the first of device %s at %s: name the files in order of time, or use --sort",
			r.Late, r.Events, r.FirstLate.Device, at))...)
	}
	if len(broken) > 0 && r.Events == 0 {
		return errors.Join(broken...)
	}

	if o.meter.Detectors == nil {
		if len(r.Skipped) > 0 {
			fmt.Fprintf(s.err, "stopline: measures: without --config, left out: %s\n", strings.Trim(fmt.Sprint(r.Skipped), "[]"))
		}
	} else {
		for _, n := range r.Notes {
			fmt.Fprintf(s.err, "stopline: measures: %s\n", n)
		}
	}
	if err := o.write(r.Tables(), s.out); err != nil {
		return fmt.Errorf("measures: %w", err)
	}
	return errors.Join(broken...)
}

// write prints the tables, or writes them to files.
func (o *measuresOptions) write(tables []hires.Table, out io.Writer) error {
	stamps := hires.StampFormat(o.time)
	if o.out != "" {
		if err := os.MkdirAll(o.out, 0o755); err != nil {
			return err
		}
		for _, t := range tables {
			f, err := os.Create(filepath.Join(o.out, string(t.Measure)+"."+o.format))
			if err != nil {
				return err
			}
			if o.format == "json" {
				err = hires.WriteJSON(f, []hires.Table{t}, stamps)
			} else {
				err = t.WriteCSV(f, stamps)
			}
			if err = errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
		return nil
	}
	if o.format == "json" {
		return hires.WriteJSON(out, tables, stamps)
	}
	for _, t := range tables {
		if len(tables) > 1 {
			if _, err := fmt.Fprintf(out, "# %s\n", t.Measure); err != nil {
				return err
			}
		}
		if err := t.WriteCSV(out, stamps); err != nil {
			return err
		}
	}
	return nil
}
