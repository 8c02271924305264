package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/hires"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

var replayCommand = command{
	name:     "replay",
	synopsis: "stopline replay --hires FILE [--hires FILE …] [--data DIR] [--speed 1|10|max] [--json]\nstopline replay --policy A --against B --data DIR [--json]",
	summary:  "bring controllers' logs into a sealed log; decide a recorded hour by another policy",
	manual: `Reads hi-res logs of traffic signal controllers and sends them through ingest,
validation, four validators and sealing, all in this process around an embedded
NATS server. Each second of each controller becomes one record of the kind
import, signed with the district's importer key: verification says that the
controller did not sign it.

Files may be CSV (also gzip), or Econolite's .dat and .datZ; the form is told
from the content. Stamps without a zone are read in --zone. A file that is cut
off, or holds a line that cannot be read, is imported up to there, and the
command fails at the end.

The data folder holds the district, as for demo; an existing one is gone on
with. Without --data a new temporary folder is made and kept. The same log
brought in twice is in the log twice, as two runs.

--speed max sends as fast as records are agreed; 1 at the pace of the log's own
time, 10 ten times that.

The last line of --json is one object. frames counts records, events those that
were read; events_in_log those in records that the validators accepted, so that
the two are equal where nothing was refused. quarantined counts records by the
rule that they broke. seconds is from the first record sent until all was sealed.` + policyManual,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := replayOptions{}
		fs.Func("hires", "log `FILE` to bring in; may be given several times, in the order of time", func(s string) error {
			o.files = append(o.files, s)
			return nil
		})
		fs.StringVar(&o.data, "data", "", "data folder `DIR`; made if it is not there")
		fs.StringVar(&o.speed, "speed", "max", "`PACE`: max, or how many times as fast as the log's own time")
		fs.StringVar(&o.zone, "zone", "UTC", "time `ZONE` of stamps that name none, for instance America/Denver")
		fs.StringVar(&o.device, "device", "", "`NAME` of the controller, for files that do not say")
		fs.StringVar(&o.policy, "policy", "", "decide the frames in the log of --data by policy `A` …")
		fs.StringVar(&o.against, "against", "", "… and by policy `B`, and print what differs")
		fs.BoolVar(&o.json, "json", false, "print, last, one JSON object")
		fs.BoolVar(&o.verbose, "verbose", false, "log to standard error what services do")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) > 0 {
				return usageError("replay: takes no arguments, got %q; logs are named with --hires", args)
			}
			if o.policy != "" || o.against != "" {
				return o.replayPolicy(ctx, s)
			}
			return replay(ctx, o, s)
		}
	},
}

type replayOptions struct {
	files                     []string
	data, speed, zone, device string
	policy, against           string
	json, verbose             bool
}

// replayReport is the JSON object that a replay ends with.
type replayReport struct {
	District traffic.DistrictID `json:"district"`
	Run      uint64             `json:"run"`
	Logs     []replayedLog      `json:"logs"`
	Events   uint64             `json:"events"`
	Frames   uint64             `json:"frames"`
	Accepted uint64             `json:"accepted"`
	// Quarantined counts records that validation or the validators refused.
	Quarantined map[validate.Rule]uint64 `json:"quarantined"`
	// EventsInLog are those of the accepted records, counted from the blocks.
	EventsInLog     uint64  `json:"events_in_log"`
	Blocks          uint64  `json:"blocks"`
	LogSize         uint64  `json:"log_size"`
	SealedSize      uint64  `json:"sealed_size"`
	Seconds         float64 `json:"seconds"`
	FramesPerSecond float64 `json:"frames_per_second"`
	EventsPerSecond float64 `json:"events_per_second"`
	Evidence        struct {
		Path     string `json:"path"`
		Policy   string `json:"policy"`
		Verified bool   `json:"verified"`
	} `json:"evidence"`
	Data      string `json:"data"`
	PeakRSSMB uint64 `json:"peak_rss_mb"`
}

// replayedLog is what was found in one file.
type replayedLog struct {
	Path   string `json:"path"`
	Format string `json:"format"`
	SHA256 string `json:"sha256"`
	Events int    `json:"events"`
	// UnknownCodes counts events whose code the enumeration does not name; they
	// are imported like the others.
	UnknownCodes int `json:"unknown_codes"`
	OutOfOrder   int `json:"out_of_order"`
	// Error says where reading ended too early.
	Error string `json:"error,omitempty"`
}

// replayWindow is how many records may be sent and not yet agreed: enough to
// keep the validators busy, and few enough that ingest never has to say so.
const replayWindow = 4000

func (o *replayOptions) check() (pace float64, read hires.Options, err error) {
	if len(o.files) == 0 {
		return 0, read, usageError("replay: --hires: name a log")
	}
	if o.speed != "max" {
		if pace, err = strconv.ParseFloat(o.speed, 64); err != nil || !(pace > 0) || math.IsInf(pace, 0) {
			return 0, read, usageError("replay: --speed %q: must be max or a number above 0", o.speed)
		}
	}
	if read.Zone, err = time.LoadLocation(o.zone); err != nil {
		return 0, read, usageError("replay: --zone %q: %v", o.zone, err)
	}
	read.Device = traffic.DeviceID(o.device)
	return pace, read, nil
}

func replay(ctx context.Context, o replayOptions, s streams) (err error) {
	pace, read, err := o.check()
	if err != nil {
		return err
	}
	level := slog.LevelError
	if o.verbose {
		level = slog.LevelInfo
	}
	r := &replayReport{Quarantined: map[validate.Rule]uint64{}}
	// First everything is read once: what cannot be read at all is told before a
	// district is made, and each record names the digest of the whole file.
	sums := make([]hires.Summary, len(o.files))
	var damage error
	for i, path := range o.files {
		sum, err := readHires(path, read, func(hires.Event) error { return nil })
		if err != nil && sum.Events == 0 {
			return fmt.Errorf("replay: %w", err)
		}
		l := replayedLog{Path: path, Format: sum.Format, SHA256: fmt.Sprintf("%x", sum.SHA256), Events: sum.Events,
			UnknownCodes: sum.UnknownEvents(), OutOfOrder: sum.OutOfOrder}
		if err != nil {
			l.Error = err.Error()
			damage = errors.Join(damage, err)
		}
		r.Logs = append(r.Logs, l)
		r.Events += uint64(sum.Events)
		sums[i] = sum
	}

	dir, err := freshDir(o.data, "stopline-replay-")
	if err != nil {
		return err
	}
	r.Data = dir
	l, key, err := replayDistrict(ctx, dir, slog.New(slog.NewTextHandler(s.err, &slog.HandlerOptions{Level: level})))
	if err != nil {
		return err
	}
	defer l.close()
	r.District = l.district.Genesis.District
	r.Run = uint64(time.Now().UnixMilli())
	im := &importing{local: l, report: r, key: key, changed: make(chan struct{}, 1)}
	l.street.onBlock = im.block

	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	im.ended = make(chan struct{})
	go func() {
		defer close(im.ended)
		im.err = l.run(run)
	}()
	finish := func() error {
		stop()
		<-im.ended
		return im.err
	}
	ready, cancel := context.WithTimeout(ctx, readyWait)
	err = l.ready(ready, im.ended)
	cancel()
	if err != nil {
		return errors.Join(err, finish())
	}
	total := r.Events
	progress := newProgress(s.err, func() string {
		im.mu.Lock()
		defer im.mu.Unlock()
		return fmt.Sprintf("%d of %d events sent, %d agreed", im.events, total, r.EventsInLog)
	})
	began := time.Now()
	err = im.send(ctx, o.files, sums, read, pace)
	if err == nil {
		err = im.settle(ctx)
	}
	r.Seconds = time.Since(began).Seconds()
	progress.end()
	if err != nil {
		return errors.Join(err, finish())
	}
	im.finish()
	r.Evidence.Policy = filepath.Join(dir, "policy")
	if r.Accepted > 1 { // see importing.send
		err = l.prove(identity.KindImport, &r.Evidence.Path, &r.Evidence.Verified)
	}
	if err := errors.Join(err, finish()); err != nil {
		return err
	}
	if err := r.print(s.out, o.json); err != nil {
		return err
	}
	switch {
	case damage != nil:
		return fmt.Errorf("replay: imported up to there: %w", damage)
	case r.EventsInLog != r.Events:
		return fmt.Errorf("replay: %d of %d events are in the log", r.EventsInLog, r.Events)
	}
	return nil
}

// readHires reads one file.
func readHires(path string, o hires.Options, f func(hires.Event) error) (sum hires.Summary, err error) {
	in, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	if sum, err = hires.Read(in, o, f); err != nil {
		return sum, fmt.Errorf("%s: %w", path, err)
	}
	return sum, nil
}

// replayDistrict opens the district of a folder, or makes one without junctions,
// and returns the importer's key.
func replayDistrict(ctx context.Context, dir string, log *slog.Logger) (*local, ed25519.PrivateKey, error) {
	id, defs := traffic.DistrictID("imports"), []*traffic.Junction(nil)
	d, err := district.Load(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, nil, err
	default:
		reg, err := identity.NewRegistry(&d.Genesis)
		if err != nil {
			return nil, nil, err
		}
		id, defs = d.Genesis.District, reg.Junctions()
	}
	ctrl, err := timing.Named("fixed")
	if err != nil {
		return nil, nil, err
	}
	rules, err := timing.RulesNamed("field")
	if err != nil {
		return nil, nil, err
	}
	l, err := newLocal(ctx, localOptions{
		dir: dir, log: log, open: district.Options{ID: id, Junctions: defs, Created: time.Now()},
		core: signalcontrol.CoreConfig{District: id, Policy: "none", PolicyVersion: "1", Controller: ctrl, Rules: rules},
	})
	if err != nil {
		return nil, nil, err
	}
	key, err := l.district.Key(district.ImporterKey)
	if err != nil {
		l.close()
		return nil, nil, fmt.Errorf("%s has no importer; it was made by an earlier version: %w", dir, err)
	}
	return l, key, nil
}

// importing is a run of imports on its way.
type importing struct {
	*local
	key     ed25519.PrivateKey
	changed chan struct{} // a token when something was decided
	ended   chan struct{} // closed when the services have ended
	err     error         // why; read after ended

	mu     sync.Mutex
	report *replayReport // guarded by mu until all is sealed
	events uint64        // sent
	failed error         // a record that was not stored
}

func (im *importing) wake() {
	select {
	case im.changed <- struct{}{}:
	default:
	}
}

// block counts what became of our records.
func (im *importing) block(b *decided.Block) {
	ours := identity.IDOf(im.key.Public().(ed25519.PublicKey))
	im.mu.Lock()
	defer im.mu.Unlock()
	defer im.wake()
	r := im.report
	for i := range b.Records {
		e, err := identity.ParseEnvelope(b.Records[i].Raw)
		if err != nil || e.Kind != identity.KindImport || e.Key != ours {
			continue
		}
		m, err := wire.DecodeImport(e.ContentType, e.Payload)
		if err != nil || m.Run != r.Run {
			continue
		}
		if !b.Records[i].Accepted {
			r.Quarantined["validators"]++
			continue
		}
		r.Accepted++
		r.EventsInLog += uint64(len(m.Events))
	}
	r.Blocks++
	r.LogSize = b.Header.Size
}

// settled is how many records have been judged. Caller holds mu.
func (im *importing) settled() uint64 {
	return im.report.Accepted + im.report.Quarantined["validators"] + im.validation.Counts().Quarantined
}

// wait waits until done, which is called with mu held.
func (im *importing) wait(ctx context.Context, done func() bool) error {
	var look *time.Timer
	for {
		im.mu.Lock()
		ok, failed := done(), im.failed
		im.mu.Unlock()
		switch {
		case failed != nil:
			return failed
		case ok:
			return nil
		}
		// What validation refuses comes in no block.
		const every = 20 * time.Millisecond
		if look == nil {
			look = time.NewTimer(every)
			defer look.Stop()
		} else {
			look.Reset(every)
		}
		select {
		case <-im.changed:
		case <-look.C:
		case <-im.ended:
			return errors.New("a service ended while records were on their way")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// send reads the files again and sends what is in them.
func (im *importing) send(ctx context.Context, files []string, sums []hires.Summary, o hires.Options, pace float64) error {
	sender, err := bus.NewSender(bus.SenderConfig{Bus: im.street.bus, Window: 1024, Queue: 2 * replayWindow, Logger: im.log})
	if err != nil {
		return err
	}
	im.senders = append(im.senders, sender)
	began, first := time.Now(), time.Time{}
	d := im.report.District
	sent := uint64(0)
	submit := func(m *traffic.Import) error {
		if first.IsZero() {
			first = m.Time
		}
		if pace > 0 {
			due := began.Add(time.Duration(float64(m.Time.Sub(first)) / pace))
			select {
			case <-time.After(time.Until(due)):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		// The first record is agreed before the others are sent, in a block of its
		// own: a block can be proven once there is another one.
		window := uint64(replayWindow)
		if sent == 1 {
			window = 1
		}
		if err := im.wait(ctx, func() bool { return sent-min(sent, im.settled()) < window }); err != nil {
			return err
		}
		sent++
		im.mu.Lock()
		im.report.Frames++
		im.events += uint64(len(m.Events))
		im.mu.Unlock()
		e := identity.Sign(im.key, identity.KindImport, identity.Protobuf, wire.EncodeImport(m)).Marshal()
		return sender.SendAsync(ctx, d, identity.KindImport, m.Importer, e, func(_ *pb.Receipt, err error) {
			if err != nil {
				im.mu.Lock()
				im.failed = errors.Join(im.failed, fmt.Errorf("record %d: %w", m.Seq, err))
				im.mu.Unlock()
				im.wake()
			}
		})
	}
	seq := uint64(1)
	for i, path := range files {
		g, err := hires.NewGroup(hires.GroupOptions{
			District: d, Importer: district.ImporterKey, Run: im.report.Run, Seq: seq, Log: filepath.Base(path), SHA256: sums[i].SHA256,
		}, submit)
		if err != nil {
			return err
		}
		left := sums[i].Events
		_, err = readHires(path, o, func(e hires.Event) error {
			if left == 0 {
				return fmt.Errorf("%s: has grown while it was read", path)
			}
			left--
			if pace > 0 { // a controller that is silent must not keep its last second to itself
				if err := g.FlushBefore(e.At); err != nil {
					return err
				}
			}
			return g.Add(e)
		})
		// A damaged file ends where it ended before.
		if err != nil && (left > 0 || im.report.Logs[i].Error == "") {
			return err
		}
		if err := g.Flush(); err != nil {
			return err
		}
		seq = g.Seq()
	}
	return nil
}

// settle waits until all records are judged and sealed.
func (im *importing) settle(ctx context.Context) error {
	if err := im.wait(ctx, func() bool { return im.settled() >= im.report.Frames }); err != nil {
		return err
	}
	return im.wait(ctx, func() bool {
		im.report.SealedSize = im.gateway.View().Sealed.Size
		return im.report.SealedSize >= im.report.LogSize
	})
}

// finish completes the report.
func (im *importing) finish() {
	im.mu.Lock()
	defer im.mu.Unlock()
	r := im.report
	for rule, n := range im.validation.Counts().ByRule {
		r.Quarantined[rule] += n
	}
	if n := r.Quarantined["validators"]; n > 0 {
		delete(r.Quarantined, "validators")
		for rule, n := range im.validators[0].Stats().RecordsRefused {
			r.Quarantined[rule] += n
		}
	}
	if r.Seconds > 0 {
		r.FramesPerSecond, r.EventsPerSecond = math.Round(float64(r.Frames)/r.Seconds), math.Round(float64(r.Events)/r.Seconds)
	}
	r.PeakRSSMB = peakRSSMB()
}

func (r *replayReport) print(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(r)
	}
	var refused []string
	for _, rule := range slices.Sorted(maps.Keys(r.Quarantined)) {
		refused = append(refused, fmt.Sprintf("%s %d", rule, r.Quarantined[rule]))
	}
	if refused == nil {
		refused = []string{"none"}
	}
	for _, l := range r.Logs {
		if _, err := fmt.Fprintf(w, "%s: %s, %d events, SHA-256 %s\n", l.Path, l.Format, l.Events, l.SHA256); err != nil {
			return err
		}
	}
	evidence := fmt.Sprintf("evidence %s: verified\n  stopline verify --policy %s %s\n", r.Evidence.Path, r.Evidence.Policy, r.Evidence.Path)
	switch {
	case r.Evidence.Path == "":
		evidence = "no evidence yet: a record can be proven once another block is sealed\n"
	case !r.Evidence.Verified:
		evidence = fmt.Sprintf("evidence %s: NOT VERIFIED\n", r.Evidence.Path)
	}
	_, err := fmt.Fprintf(w, "%d events in %d records, %d records with %d events accepted in %d blocks; quarantined: %s\nlog size %d, sealed %d, in %.1f s: %.0f records/s, %.0f events/s\n%s",
		r.Events, r.Frames, r.Accepted, r.EventsInLog, r.Blocks, strings.Join(refused, ", "), r.LogSize, r.SealedSize,
		r.Seconds, r.FramesPerSecond, r.EventsPerSecond, evidence)
	return err
}

// progress tells, on a terminal only, how far long work is.
type progress struct {
	stop, done chan struct{}
}

func newProgress(w io.Writer, text func() string) *progress {
	p := &progress{make(chan struct{}), make(chan struct{})}
	f, ok := w.(*os.File)
	if ok {
		st, err := f.Stat()
		ok = err == nil && st.Mode()&os.ModeCharDevice != 0
	}
	if !ok {
		close(p.done)
		return p
	}
	go func() {
		defer close(p.done)
		t := time.NewTicker(500 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				fmt.Fprintf(w, "\r%s\x1b[K", text())
			case <-p.stop:
				fmt.Fprint(w, "\r\x1b[K")
				return
			}
		}
	}()
	return p
}

func (p *progress) end() {
	close(p.stop)
	<-p.done
}
