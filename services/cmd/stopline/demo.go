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
	"math"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

var demoCommand = command{
	name:     "demo",
	synopsis: "stopline demo [--sumo FILE.sumocfg] [--for DURATION] [--data DIR] [--listen ADDR] [--grpc ADDR]\n              [--mqtt ADDR [--mqtt-ws ADDR]] [--api ADDR [--api-cert FILE --api-key FILE]] [--json]",
	summary:  "run a whole district in this process, with a page to look at",
	manual: `Runs the built-in city of nine junctions, or a SUMO scenario, in real time, with
every service around an embedded NATS server: roadside units with their own
keys, ingest, validation, four validators, signal-control, sealing, audit and
the gateway. It prints the address of a page that shows junctions, live signal
states, blocks, and links to evidence bundles. Ctrl-C, or the end of --for, ends
it cleanly: units stop first, what they sent is sealed, and a bundle of the last
command is written and verified.

The data folder holds the district: keys, log, payloads, validators' stores, and
the policy file that a verifier pins. A later run on the same folder goes on
where it ended, also after kill -9; frames that a unit could not send before are
sent first. Without --data a new temporary folder is
made and kept; its path is printed.

The last line of --json is one object. frames.received and frames.quarantined
count refused records of every kind, frames or not, as far as validation saw
them; refusals by the validators are in rejected_by_validators. Latencies are in
milliseconds from the reading's own time until a quorum's block with it was
received (agreed), and until a checkpoint that covers it was sealed (sealed).`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		o := demoOptions{}
		fs.StringVar(&o.sumo, "sumo", "", "drive the SUMO scenario `FILE` instead of the built-in city")
		fs.DurationVar(&o.length, "for", 0, "end after this long, for instance 20s; 0: run until Ctrl-C")
		fs.StringVar(&o.data, "data", "", "data folder `DIR`; made if it is not there")
		fs.StringVar(&o.listen, "listen", "127.0.0.1:8080", "address `ADDR` of the page")
		fs.StringVar(&o.controller, "controller", "actuated", "`NAME` of the controller: fixed, actuated or maxpressure")
		fs.StringVar(&o.sensing, "sensing", "detectors", "SUMO only: `NAME` of what detectors know, detectors or oracle")
		fs.Int64Var(&o.seed, "seed", 1, "random seed `N` of the traffic")
		fs.StringVar(&o.nats.url, "nats", "", "use the NATS cluster at `URL` (several with commas) instead of an embedded server;\nits streams must sync always, or a receipt would promise too much")
		fs.StringVar(&o.nats.creds, "nats-creds", "", "`FILE` with the NATS user's JWT and seed")
		fs.StringVar(&o.nats.users, "nats-users", "", "folder `DIR` with NAME.nk, an nkey seed, for each service's NATS user\n(see stopline consensus)")
		fs.BoolVar(&o.external, "external-validators", false, "run no validators: they are processes of their own (see stopline consensus)")
		fs.StringVar(&o.nats.ca, "nats-ca", "", "`FILE` with the PEM certificates by which the cluster is known")
		fs.IntVar(&o.nats.replicas, "nats-replicas", 1, "copies `N` of each stream in the cluster, 1 to 5")
		fs.IntVar(&o.store.MaxFrames, "store-frames", 0, "while the network is away, keep at most `N` frames a junction;\n0: 65536, nine hours of a busy one")
		fs.Int64Var(&o.store.MaxBytes, "store-bytes", 0, "and at most `N` bytes; 0: 64 MiB")
		fs.StringVar(&o.grpc.listen, "grpc", "", "take records by gRPC on address `ADDR`, for instance 127.0.0.1:0; without it there\nis no gRPC")
		fs.StringVar(&o.grpc.cert, "grpc-cert", "", "`FILE` with the PEM certificate for gRPC with TLS; needs --grpc-key")
		fs.StringVar(&o.grpc.key, "grpc-key", "", "`FILE` with its PEM key")
		fs.StringVar(&o.grpc.clientCA, "grpc-client-ca", "", "`FILE` with the PEM certificates by which gateways must be known")
		o.mqtt.flags(fs)
		o.api.flags(fs)
		fs.Func("witness", "have `WITNESS` cosign the log: its verifier key and its URL, joined by @;\nmay be given several times (see stopline witness)", func(s string) error {
			w, err := parseWitness(s)
			o.witnesses = append(o.witnesses, w)
			return err
		})
		fs.IntVar(&o.needWitnesses, "need-witnesses", 0, "for a new data folder: seal nothing without the cosignatures of `N` of them")
		fs.BoolVar(&o.json, "json", false, "print, last, one JSON object")
		fs.BoolVar(&o.verbose, "verbose", false, "log to standard error what services do")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) > 0 {
				return usageError("demo: takes no arguments, got %q", args)
			}
			fs.Visit(func(f *flag.Flag) { o.listenGiven = o.listenGiven || f.Name == "listen" })
			return demo(ctx, o, s)
		}
	},
}

type demoOptions struct {
	sumo, data, listen, controller, sensing string
	length                                  time.Duration
	seed                                    int64
	json, verbose, listenGiven, external    bool
	nats                                    natsOptions
	grpc                                    grpcOptions
	mqtt                                    mqttOptions
	api                                     apiOptions
	store                                   roadside.StoreConfig
	// witnesses cosign besides the validators, needWitnesses of whom must.
	witnesses     []ledger.Witness
	needWitnesses int
}

// demoReport is the JSON object that a demo ends with.
type demoReport struct {
	District traffic.DistrictID `json:"district"`
	Seconds  float64            `json:"seconds"`
	Frames   struct {
		Received    uint64                   `json:"received"`
		Accepted    uint64                   `json:"accepted"`
		Quarantined uint64                   `json:"quarantined"`
		ByRule      map[validate.Rule]uint64 `json:"quarantined_by_rule,omitempty"`
	} `json:"frames"`
	// Rejected records were in decided blocks with the validators' verdict
	// against them: registry changes that do not apply, for instance.
	Rejected   uint64          `json:"rejected_by_validators"`
	Readings   uint64          `json:"readings"`
	Blocks     uint64          `json:"blocks"`
	LogSize    uint64          `json:"log_size"`
	SealedSize uint64          `json:"sealed_size"`
	LatencyMS  gateway.Latency `json:"latency_ms"`
	Commands   struct {
		Sent    uint64 `json:"sent"`
		Applied uint64 `json:"applied"`
		Refused uint64 `json:"refused"`
	} `json:"commands"`
	Interlock struct {
		Trips uint64 `json:"trips"`
	} `json:"interlock"`
	Evidence struct {
		Path     string `json:"path"`
		Policy   string `json:"policy"`
		Verified bool   `json:"verified"`
	} `json:"evidence"`
	MQTT        *mqttReport `json:"mqtt,omitempty"`
	Data        string      `json:"data"`
	PeakRSSMB   uint64      `json:"peak_rss_mb"`
	FallbackRun uint64      `json:"fallbacks_to_local_plan"`
	// Store is of all units together: frames that waited for the network.
	Store roadside.StoreStats `json:"store"`
}

// Waits of a demo.
const (
	readyWait  = 60 * time.Second // for four validators on a loaded machine
	finishWait = 10 * time.Second // for the last frames to be sealed
)

func demo(ctx context.Context, o demoOptions, s streams) (err error) {
	ctrl, err := timing.Named(o.controller)
	if err != nil {
		return usageError("demo: --controller: %v", err)
	}
	if o.sensing != "oracle" && o.sensing != "detectors" {
		return usageError("demo: --sensing %q: must be oracle or detectors", o.sensing)
	}
	if o.seed < 0 || o.seed > math.MaxInt32 {
		return usageError("demo: --seed %d: must be 0 to %d", o.seed, math.MaxInt32)
	}
	if o.grpc.listen == "" && o.grpc != (grpcOptions{}) {
		return usageError("demo: --grpc-cert, --grpc-key, --grpc-client-ca: must not be given without --grpc")
	}
	if o.nats.url == "" && (o.external || o.nats.users != "") {
		name := "--external-validators"
		if !o.external {
			name = "--nats-users"
		}
		return usageError("demo: %s: needs --nats", name)
	}
	if err := errors.Join(o.mqtt.check(o.nats), o.api.check()); err != nil {
		return err
	}
	if o.needWitnesses < 0 || o.needWitnesses > len(o.witnesses) {
		return usageError("demo: --need-witnesses %d: there are %d of --witness", o.needWitnesses, len(o.witnesses))
	}
	if o.length < 0 {
		return usageError("demo: --for %v: must not be negative", o.length)
	}
	if err := o.store.Validate(); err != nil {
		return usageError("demo: --store-frames, --store-bytes: %v", err)
	}
	rulesName, config := "field", cityName
	if o.sumo != "" {
		rulesName, config = "deployable", o.sumo
	}
	rules, err := timing.RulesNamed(rulesName)
	if err != nil {
		return err
	}
	level := slog.LevelError
	if o.verbose {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(s.err, &slog.HandlerOptions{Level: level}))

	w, err := openWorld(ctx, worldOptions{config: config, rules: rules, sensing: o.sensing, seed: o.seed, start: time.Now().UTC().Add(-warmUpTime), rushHour: true, log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	dir, err := freshDir(o.data, "stopline-demo-")
	if err != nil {
		return err
	}
	var defs []*traffic.Junction
	for _, j := range w.Junctions() {
		defs = append(defs, rules.Apply(j))
	}
	if config == cityName {
		if err := warmUp(w, defs, rules); err != nil {
			return err
		}
	}
	policy := identity.Policy{Version: "1", Controller: ctrl.Name + " " + ctrl.Version, Rules: rules.Name}
	l, err := newLocal(ctx, localOptions{
		dir: dir, log: log, nats: o.nats, grpc: o.grpc, mqtt: o.mqtt, api: o.api, external: o.external,
		open: district.Options{ID: districtName(config), Junctions: defs, Created: time.Now(), PolicyName: "default", Policy: policy,
			Witnesses: o.witnesses, NeedWitnesses: o.needWitnesses},
		witnesses: o.witnesses,
		core:      signalcontrol.CoreConfig{District: districtName(config), Policy: "default", PolicyVersion: policy.Version, Controller: ctrl, Rules: rules},
	})
	if err != nil {
		return err
	}
	defer l.close()
	listener, err := listen(o)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: l.handler(), ReadHeaderTimeout: 5 * time.Second}

	units, err := demoUnits(l, w, defs, rules, o.store, log)
	if err != nil {
		return err
	}

	// Two groups, ended one after the other: what the street has sent must find
	// the services still there.
	serviceCtx, stopServices := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServices()
	serviceErr := make(chan error, 1)
	servicesDone := make(chan struct{})
	go func() {
		defer close(servicesDone)
		serviceErr <- run.All(serviceCtx,
			run.Actor{Name: "services", Run: l.run},
			run.Actor{Name: "page", Run: func(ctx context.Context) error { return serveHTTP(ctx, server, listener) }},
		)
	}()
	finish := func() error {
		stopServices()
		<-servicesDone
		return <-serviceErr
	}
	readyCtx, cancel := context.WithTimeout(ctx, readyWait)
	err = l.ready(readyCtx, servicesDone)
	cancel()
	if err != nil {
		return errors.Join(err, finish())
	}
	began := time.Now()
	doors, doorsShort := l.doors()
	apiLines, apiShort := l.apiDoor(dir)
	doors, doorsShort = doors+apiLines, doorsShort+apiShort
	if !o.json {
		fmt.Fprintf(s.out, "Stopline runs %d junctions of %s.\n\n  page         http://%s/\n%s  data folder  %s\n  policy       %s\n\nCtrl-C ends it.\n",
			len(defs), l.district.Genesis.District, listener.Addr(), doors, dir, filepath.Join(dir, "policy"))
	} else {
		fmt.Fprintf(s.err, "page http://%s/%s  data %s\n", listener.Addr(), doorsShort, dir)
	}
	streetErr := runStreet(ctx, o.length, l, w, units, servicesDone)
	seconds := time.Since(began).Seconds()
	l.drainAPI()
	r := demoReport{District: l.district.Genesis.District, Seconds: seconds, Data: dir}
	settleErr := l.settle(units, servicesDone)
	r.Evidence.Policy = filepath.Join(dir, "policy")
	evidenceErr := l.prove(identity.KindCommand, &r.Evidence.Path, &r.Evidence.Verified)
	l.report(&r, units)
	if err := errors.Join(streetErr, settleErr, evidenceErr, finish()); err != nil {
		return err
	}
	return printReport(s.out, o.json, &r)
}

// warmUpTime is how long the built-in city has been running, in its own time,
// when a demo begins: streets that are empty at first would show nothing.
const warmUpTime = 5 * time.Minute

// warmUp runs the world with every junction on its local plan, under throw-away
// keys. Nothing of it is a record.
func warmUp(w world, defs []*traffic.Junction, rules timing.Rules) error {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	units := make([]*roadside.Unit, len(defs))
	for i, j := range defs {
		cab, err := w.cabinet(j.ID)
		if err != nil {
			return err
		}
		units[i], err = roadside.New(w.Now(), roadside.Config{
			District: "warm-up", Junction: j, Device: "none", Key: key, BootEpoch: 1, Driver: cab, Rules: rules,
			Commander: func(identity.KeyID) (ed25519.PublicKey, bool) { return nil, false },
		})
		if err != nil {
			return err
		}
	}
	for end := w.Now().Add(warmUpTime); w.Now().Before(end); {
		for _, u := range units {
			if _, err := u.Tick(w.Now()); err != nil {
				return err
			}
		}
		if _, err := w.Step(); err != nil {
			return err
		}
	}
	for _, j := range defs {
		cab, err := w.cabinet(j.ID)
		if err != nil {
			return err
		}
		// The first true interval begins now: what the detectors counted until
		// here is nobody's reading.
		if _, err := cab.Sense(); err != nil {
			return err
		}
	}
	return nil
}

func listen(o demoOptions) (net.Listener, error) {
	n, err := net.Listen("tcp", o.listen)
	if err != nil && !o.listenGiven {
		// Somebody else has the usual port; nobody asked for this one.
		return net.Listen("tcp", "127.0.0.1:0")
	}
	return n, err
}

func serveHTTP(ctx context.Context, server *http.Server, n net.Listener) error {
	end := context.AfterFunc(ctx, func() { _ = server.Close() }) // streams to pages have no end of their own
	defer end()
	if err := server.Serve(n); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// demoUnits makes the roadside unit of every junction.
func demoUnits(l *local, w world, defs []*traffic.Junction, rules timing.Rules, store roadside.StoreConfig, log *slog.Logger) ([]*roadside.Unit, error) {
	var err error
	if l.boot, err = l.district.NextBoot(); err != nil {
		return nil, err
	}
	units := make([]*roadside.Unit, len(defs))
	for i, j := range defs {
		cab, err := w.cabinet(j.ID)
		if err != nil {
			return nil, err
		}
		key, err := l.deviceKey(j.ID)
		if err != nil {
			return nil, err
		}
		st, err := l.store(j.ID, store)
		if err != nil {
			return nil, err
		}
		units[i], err = roadside.New(time.Now(), roadside.Config{
			District: l.district.Genesis.District, Junction: j, Device: district.DeviceID(j.ID), Key: key, BootEpoch: l.boot,
			LastCommand: st.LastCommand(), Fallback: st.Fallback(), Override: st.Override(), Commander: l.commander, Overrider: l.overrider, Driver: cab, Rules: rules, Logger: log.With("service", "roadside"),
		})
		if err != nil {
			return nil, err
		}
	}
	return units, nil
}

// runStreet steps the world by the wall clock and lets every unit tick with it,
// until ctx ends, the time is over, the scenario ends or a service fails.
func runStreet(ctx context.Context, length time.Duration, l *local, w world, units []*roadside.Unit, servicesDone <-chan struct{}) error {
	if length > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, length)
		defer cancel()
	}
	ticks := make([]chan time.Time, len(units))
	actors := make([]run.Actor, 0, len(units)+1)
	for i, u := range units {
		ticks[i] = make(chan time.Time, 1)
		j := u.Status(time.Now()).Junction
		actors = append(actors, run.Actor{Name: "unit", Run: func(ctx context.Context) error {
			return u.Run(ctx, roadside.RunConfig{
				Inbox: l.street.sender, Line: roadside.OnBus(l.street.bus, l.district.Genesis.District, j), Store: l.stores[j], Ticks: ticks[i],
			})
		}})
	}
	actors = append(actors, run.Actor{Name: "street", Run: func(ctx context.Context) error {
		t := time.NewTicker(w.StepLength())
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-servicesDone:
				return nil // its error is told by whoever waits for it
			case <-t.C:
			}
			if more, err := w.Step(); err != nil || !more {
				return err
			}
			now := time.Now()
			for _, c := range ticks {
				select {
				case c <- now:
				default: // the unit is late; its next tick covers this one
				}
			}
		}
	}})
	return run.All(ctx, actors...)
}

// settle waits until the last frame of every unit is agreed and sealed, and the
// commands that rest on them too, if there are any.
func (l *local) settle(units []*roadside.Unit, servicesDone <-chan struct{}) error {
	// By device: others than the demo's own may be enrolled at a junction.
	last := map[traffic.DeviceID]uint64{}
	for _, u := range units {
		c := u.Counters()
		last[district.DeviceID(u.Status(time.Now()).Junction)] = c.Frames + c.EventFrames
	}
	began := time.Now()
	deadline := time.After(finishWait)
	for {
		waiting := 0
		for d, seq := range last {
			if k, _ := l.gateway.Newest(d); seq > 0 && (k.Seq < seq || k.BootEpoch < l.boot) {
				waiting++
			}
		}
		unsealed := l.gateway.Unsealed()
		v := l.gateway.View()
		decided := l.gateway.Undecided() == 0 || time.Since(began) > signalcontrol.Validity
		if waiting == 0 && unsealed == 0 && decided && (len(v.Blocks) == 0 || v.Blocks[len(v.Blocks)-1].Size <= v.Sealed.Size) {
			return nil
		}
		select {
		case <-servicesDone:
			return errors.New("a service ended while the last frames were on their way")
		case <-deadline:
			return fmt.Errorf("%v after the end %d units' last frames are not agreed and %d agreed frames not sealed", finishWait, waiting, unsealed)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (l *local) report(r *demoReport, units []*roadside.Unit) {
	v := l.gateway.View()
	c := l.validation.Counts()
	r.Frames.Received, r.Frames.Accepted, r.Frames.Quarantined = c.FramesAccepted+c.Quarantined, c.FramesAccepted, c.Quarantined
	r.Readings, r.Blocks = c.Readings, v.Counts.Blocks
	if len(c.ByRule) > 0 {
		r.Frames.ByRule = c.ByRule
	}
	if n := len(v.Blocks); n > 0 {
		r.LogSize = v.Blocks[n-1].Size
	}
	r.Rejected = v.Counts.Rejected
	r.SealedSize, r.LatencyMS = v.Sealed.Size, v.LatencyMS
	r.Commands.Sent = l.control.Counters.Sent.Load()
	for _, u := range units {
		c := u.Counters()
		r.Commands.Applied += c.Applied
		r.Commands.Refused += c.RefusedCommands()
		r.Interlock.Trips += c.Trips
		r.FallbackRun += c.Fallbacks
	}
	for _, s := range l.stores {
		r.Store.Add(s.Stats())
	}
	r.MQTT = l.mqttReport()
	r.PeakRSSMB = peakRSSMB()
}

func printReport(w io.Writer, asJSON bool, r *demoReport) error {
	if asJSON {
		return json.NewEncoder(w).Encode(r)
	}
	verified := "verified"
	if !r.Evidence.Verified {
		verified = "NOT VERIFIED"
	}
	_, err := fmt.Fprintf(w, "\n%d frames with %d readings agreed in %d blocks, %d quarantined\nlog size %d, sealed %d\nreading to agreed  p50 %.0f ms, p99 %.0f ms\nreading to sealed  p50 %.0f ms, p99 %.0f ms\n%d commands sent, %d applied, %d refused; %d interlock trips\nevidence %s: %s\n  stopline verify --policy %s %s\n",
		r.Frames.Accepted, r.Readings, r.Blocks, r.Frames.Quarantined, r.LogSize, r.SealedSize,
		r.LatencyMS.AgreedP50, r.LatencyMS.AgreedP99, r.LatencyMS.SealedP50, r.LatencyMS.SealedP99,
		r.Commands.Sent, r.Commands.Applied, r.Commands.Refused, r.Interlock.Trips, r.Evidence.Path, verified, r.Evidence.Policy, r.Evidence.Path)
	return err
}
