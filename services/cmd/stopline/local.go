package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/audit"
	"github.com/stopline-traffic/stopline/services/consensus"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/ingest"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/sealing"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
	"github.com/stopline-traffic/stopline/services/validation"
)

// local is a whole district in this process: an embedded NATS server and every
// service with a connection of its own. No service shares memory with another.
type local struct {
	district *district.District
	server   *bus.Server // nil where NATS is elsewhere
	nats     natsOptions
	buses    []*bus.Bus
	senders  []*bus.Sender
	log      *slog.Logger
	now      func() time.Time
	boot     uint64 // epoch of the devices of this run
	stores   map[traffic.JunctionID]*roadside.Store

	ingest     *ingest.Service
	grpc       *ingest.GRPC // nil if it was not asked for
	edge       *edge        // nil where no devices come by MQTT
	validation *validation.Service
	validators []*consensus.Validator
	control    *signalcontrol.Service
	sealing    *sealing.Service
	audit      *audit.Service
	gateway    *gateway.Gateway
	street     street
}

// street is what all roadside units of this process share: a connection, a
// sender, and the registry, by which they know who may command.
type street struct {
	bus    *bus.Bus
	sender *bus.Sender
	state  *agreed.State
	follow decided.Config
	// onBlock hears of each block; benchmarks watch with it. Optional.
	onBlock func(*decided.Block)
}

func (s *street) run(ctx context.Context) error {
	return s.state.Run(ctx, s.follow, func(_ context.Context, b *decided.Block, _ *identity.Registry) error {
		if s.onBlock != nil {
			s.onBlock(b)
		}
		return nil
	})
}

// localOptions say which district to run.
type localOptions struct {
	dir  string
	open district.Options
	core signalcontrol.CoreConfig // but for the key
	now  func() time.Time         // nil: time.Now
	log  *slog.Logger
	nats natsOptions
	grpc grpcOptions
	mqtt mqttOptions
	api  apiOptions
	// external says that the validators run elsewhere.
	external bool
	// witnesses are asked to cosign, besides those of the policy.
	witnesses []ledger.Witness
	// keepEvery is how often holders look at what they have to let go of, and
	// snapshotEvery after how many blocks validators write their state down; 0 is
	// their default.
	keepEvery     time.Duration
	snapshotEvery int
}

// grpcOptions say where gateways come by gRPC, if at all, and with which TLS.
type grpcOptions struct{ listen, cert, key, clientCA string }

// natsOptions say where NATS is: an embedded server, or a cluster by URL.
type natsOptions struct {
	url, creds, ca string
	// users is a folder with the seed of each service's NATS user.
	users    string
	replicas int
}

// newLocal opens or makes the district in a folder and builds its services;
// nothing runs yet but the NATS server. Close it, also after Run.
func newLocal(ctx context.Context, o localOptions) (_ *local, err error) {
	if o.now == nil {
		o.now = time.Now
	}
	l := &local{log: o.log, now: o.now}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.district, err = district.Open(o.dir, o.open); err != nil {
		return nil, err
	}
	g := &l.district.Genesis
	if g.District != o.open.ID {
		return nil, fmt.Errorf("%s holds the district %q, not %q; give another data folder", o.dir, g.District, o.open.ID)
	}
	l.nats = o.nats
	devices, err := l.openEdge(o)
	if err != nil {
		return nil, err
	}
	if o.nats.url == "" {
		if l.server, err = bus.StartServer(bus.ServerOptions{Dir: filepath.Join(o.dir, "nats"), Devices: devices, Logger: o.log}); err != nil {
			return nil, err
		}
	}
	admin, err := l.connect("admin")
	if err != nil {
		return nil, err
	}
	declare, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	if err = admin.DeclareWith(declare, topic.Streams(g.District), bus.DeclareOptions{Replicas: o.nats.replicas}); err != nil {
		return nil, err
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, err
	}
	if err = filed(reg, o); err != nil {
		return nil, fmt.Errorf("%s: %w; give another data folder, or run it as it was made", o.dir, err)
	}
	validators := reg.Validators()

	// follow makes what a service needs to follow decisions on its own.
	follow := func(name string) (*bus.Bus, *agreed.State, decided.Config, error) {
		b, err := l.connect(name)
		if err != nil {
			return nil, nil, decided.Config{}, err
		}
		s, err := agreed.Open(filepath.Join(o.dir, name+".place"), g)
		if err != nil {
			return nil, nil, decided.Config{}, err
		}
		return b, s, decided.Config{Bus: b, District: g.District, GenesisHash: l.district.GenesisHash, Validators: validators, Logger: o.log.With("service", name)}, nil
	}
	if l.edge != nil {
		if l.edge.follow.Bus, err = l.connect("edge"); err != nil {
			return nil, err
		}
		l.edge.follow.Validators = validators
	}

	b, err := l.connect("ingest")
	if err != nil {
		return nil, err
	}
	if l.ingest, err = ingest.New(ingest.Config{District: g.District, Bus: b, Now: o.now, Device: l.edge.deviceOf(), Logger: o.log.With("service", "ingest")}); err != nil {
		return nil, err
	}
	if o.grpc != (grpcOptions{}) {
		if l.grpc, err = ingest.NewGRPC(ingest.GRPCConfig{
			Ingest: l.ingest, Listen: o.grpc.listen, CertFile: o.grpc.cert, KeyFile: o.grpc.key, ClientCAFile: o.grpc.clientCA, Revoked: l.edge.revoked, Logger: o.log.With("service", "ingest"),
		}); err != nil {
			return nil, err
		}
	}
	b, state, fc, err := follow("validation")
	if err != nil {
		return nil, err
	}
	if l.validation, err = validation.New(validation.Config{District: g.District, Bus: b, State: state, Follow: fc, Now: o.now, Logger: fc.Logger}); err != nil {
		return nil, err
	}
	for _, v := range validators {
		if o.external {
			break
		}
		b, err := l.connect(topic.ValidatorUser(v.Number))
		if err != nil {
			return nil, err
		}
		vote, err := l.district.Key(district.VoteKey(v.Number))
		if err != nil {
			return nil, err
		}
		cosign, err := l.district.Key(district.CosignKey(v.Number))
		if err != nil {
			return nil, err
		}
		n, err := consensus.New(consensus.Config{
			District: g.District, Number: v.Number, VoteKey: vote, CosignKey: cosign, Genesis: l.district.GenesisJSON,
			Dir: filepath.Join(o.dir, fmt.Sprintf("validator-%d", v.Number)), Bus: b, Now: o.now, Logger: o.log.With("service", "consensus"),
			KeepEvery: o.keepEvery, SnapshotEvery: o.snapshotEvery,
		})
		if err != nil {
			return nil, err
		}
		l.validators = append(l.validators, n)
	}
	if b, state, fc, err = follow("signal-control"); err != nil {
		return nil, err
	}
	if o.core.Key, err = l.district.Key(district.SignalControlKey); err != nil {
		return nil, err
	}
	s, err := l.sender(b)
	if err != nil {
		return nil, err
	}
	if l.control, err = signalcontrol.New(signalcontrol.Config{CoreConfig: o.core, Bus: b, Inbox: s, State: state, Follow: fc, Now: o.now, Logger: fc.Logger}); err != nil {
		return nil, err
	}
	if b, err = l.connect("sealing"); err != nil {
		return nil, err
	}
	// A district of before has no such key, and lets go of nothing.
	sealingKey, err := l.district.Key(district.SealingKey)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	sealingSender, err := l.sender(b)
	if err != nil {
		return nil, err
	}
	eraser, err := l.connect(topic.EraserUser)
	if err != nil {
		return nil, err
	}
	if l.sealing, err = sealing.New(sealing.Config{
		Key: sealingKey, Sender: sealingSender, KeepEvery: o.keepEvery, Eraser: eraser,
		Bus: b, Dir: o.dir, GenesisJSON: l.district.GenesisJSON, Policy: l.district.Policy, LogKey: l.district.LogKey, Now: o.now, Logger: o.log.With("service", "sealing"),
		Witnesses: o.witnesses,
	}); err != nil {
		return nil, err
	}
	if b, err = l.connect("audit"); err != nil {
		return nil, err
	}
	// After sealing, whose folder it reads.
	if l.audit, err = audit.New(audit.Config{Bus: b, Dir: o.dir, GenesisJSON: l.district.GenesisJSON, Policy: l.district.Policy, Logger: o.log.With("service", "audit")}); err != nil {
		return nil, err
	}
	if l.street.bus, l.street.state, l.street.follow, err = follow("street"); err != nil {
		return nil, err
	}
	if l.street.sender, err = l.sender(l.street.bus); err != nil {
		return nil, err
	}
	if b, state, fc, err = follow("gateway"); err != nil {
		return nil, err
	}
	api, err := l.apiConfig(o.api)
	if err != nil {
		return nil, err
	}
	l.gateway, err = gateway.New(gateway.Config{Bus: b, District: g.District, State: state, Follow: fc, Now: o.now, Logger: fc.Logger, API: api})
	return l, err
}

func (l *local) connect(name string) (*bus.Bus, error) {
	var b *bus.Bus
	var err error
	if l.server != nil {
		b, err = l.server.Connect(name)
	} else {
		c := bus.ConnectOptions{URL: l.nats.url, CredsFile: l.nats.creds, CAFile: l.nats.ca, Name: "stopline " + name, Logger: l.log}
		if l.nats.users != "" {
			c.User, c.NKeyFile = name, filepath.Join(l.nats.users, name+".nk")
		}
		b, err = bus.Connect(c)
	}
	if err != nil {
		return nil, err
	}
	l.buses = append(l.buses, b)
	return b, nil
}

func (l *local) sender(b *bus.Bus) (*bus.Sender, error) {
	// As many as fit into one batch of ingest: a unit that was cut off comes back
	// with thousands of frames.
	s, err := bus.NewSender(bus.SenderConfig{Bus: b, Window: roadside.Window, Logger: l.log})
	if err != nil {
		return nil, err
	}
	l.senders = append(l.senders, s)
	return s, nil
}

// run runs every service until ctx ends or one of them fails.
func (l *local) run(ctx context.Context) error { return run.All(ctx, l.actors()...) }

// actors are the services.
func (l *local) actors() []run.Actor {
	actors := []run.Actor{
		{Name: "ingest", Run: l.ingest.Run}, {Name: "validation", Run: l.validation.Run},
		{Name: "signal-control", Run: l.control.Run}, {Name: "sealing", Run: l.sealing.Run},
		{Name: "audit", Run: l.audit.Run}, {Name: "gateway", Run: l.gateway.Run},
		{Name: "street", Run: l.street.run},
	}
	for i, v := range l.validators {
		actors = append(actors, run.Actor{Name: fmt.Sprintf("validator %d", i+1), Run: func(ctx context.Context) error {
			err := v.Run(ctx)
			if err == nil { // it was revoked; the others go on
				<-ctx.Done()
			}
			return err
		}})
	}
	if l.grpc != nil {
		actors = append(actors, run.Actor{Name: "gRPC", Run: l.grpc.Run})
	}
	if l.edge != nil {
		actors = append(actors, run.Actor{Name: "edge", Run: l.edge.run})
	}
	return actors
}

// doors says where records can be brought beside the page, for people a line each
// and in short.
func (l *local) doors() (lines, short string) {
	if l.grpc != nil {
		lines += fmt.Sprintf("  gRPC         %s\n", l.grpc.Addr())
		short += fmt.Sprintf("  grpc %s", l.grpc.Addr())
	}
	if l.server != nil && l.server.MQTTAddr() != "" {
		lines += fmt.Sprintf("  MQTT         %s\n", l.server.MQTTAddr())
		short += fmt.Sprintf("  mqtt %s", l.server.MQTTAddr())
		if u := l.server.WebsocketURL(); u != "" {
			lines += fmt.Sprintf("  MQTT         %s\n", u)
			short += fmt.Sprintf("  mqtt %s", u)
		}
	}
	return lines, short
}

// ready waits until records are taken and all validators take part; where a
// service fails on the way, done is closed.
func (l *local) ready(ctx context.Context, done <-chan struct{}) error {
	wait := func(who string, ready <-chan struct{}) error {
		select {
		case <-ready:
			return nil
		case <-done:
			return errors.New("a service ended before the district was ready")
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", who, ctx.Err())
		}
	}
	for i, v := range l.validators {
		if err := wait(fmt.Sprintf("validator %d", i+1), v.Ready()); err != nil {
			return err
		}
	}
	return wait("ingest", l.ingest.Ready())
}

// close ends connections before the server, the server, and the files last.
func (l *local) close() {
	if l.grpc != nil {
		l.grpc.Close()
	}
	for _, s := range l.senders {
		s.Close()
	}
	for _, b := range l.buses {
		b.Close()
	}
	if l.server != nil {
		l.server.Shutdown()
	}
	var err error
	for _, s := range l.stores {
		err = errors.Join(err, s.Close())
	}
	if l.audit != nil {
		err = errors.Join(err, l.audit.Close())
	}
	if l.sealing != nil {
		err = errors.Join(err, l.sealing.Close())
	}
	if err != nil {
		l.log.Error("closing files", "err", err)
	}
}

// handler puts the services' own pages under one address.
func (l *local) handler() http.Handler {
	mux := http.NewServeMux()
	in, au := l.ingest.Handler(), l.audit.Handler()
	mux.Handle("POST /v1/frames", in)
	mux.Handle("POST /v1/records", in)
	mux.Handle("POST /v1/batch", in)
	mux.Handle("GET /v1/records", au)
	mux.Handle("GET /v1/evidence/", au)
	for _, path := range []string{"GET /v1/chain", "GET /v1/bundle", "GET /v1/alarms", "GET /v1/audit", "POST /v1/checkpoints"} {
		mux.Handle(path, au)
	}
	mux.Handle("GET /log/", http.StripPrefix("/log", l.sealing.Handler()))
	mux.HandleFunc("GET /v1/policy", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write(l.district.Policy) // the client may have gone
	})
	mux.HandleFunc("GET /v1/genesis", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(l.district.GenesisJSON) // as above
	})
	mux.Handle("/", l.gateway.Handler())
	return mux
}

// commander tells roadside units who may command by the registry in force.
func (l *local) commander(id identity.KeyID) (ed25519.PublicKey, bool) {
	h, ok := l.street.state.Registry().Holder(id)
	return h.Key, ok && h.Status == identity.Active && h.May(identity.KindCommand)
}

// overrider tells them who may take a junction in hand.
func (l *local) overrider(id identity.KeyID) (ed25519.PublicKey, bool) {
	h, ok := l.street.state.Registry().Holder(id)
	return h.Key, ok && h.Status == identity.Active && h.May(identity.KindOverride)
}

func (l *local) deviceKey(j traffic.JunctionID) (ed25519.PrivateKey, error) {
	return l.district.Key(string(district.DeviceID(j)))
}

// store opens what a junction's unit keeps its frames in. It is closed with l.
func (l *local) store(j traffic.JunctionID, c roadside.StoreConfig) (*roadside.Store, error) {
	// As district's key files: a junction's name may hold what a file's may not.
	c.Dir = filepath.Join(l.district.Dir, "roadside", strings.ReplaceAll(string(j), "/", "_"))
	c.Logger = l.log.With("service", "roadside", "intersection", j)
	s, err := roadside.OpenStore(c)
	if err != nil {
		return nil, err
	}
	if l.stores == nil {
		l.stores = map[traffic.JunctionID]*roadside.Store{}
	}
	l.stores[j] = s
	return s, nil
}

// freshDir returns the folder to use: the given one, made if need be, or a new
// temporary one.
func freshDir(dir, pattern string) (string, error) {
	if dir == "" {
		return os.MkdirTemp("", pattern)
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// bundleOf makes the bundle of the newest record of a kind that can be proven.
func (l *local) bundleOf(ctx context.Context, k identity.RecordKind) (index uint64, bundle []byte, err error) {
	if err := l.audit.Refresh(); err != nil {
		return 0, nil, err
	}
	for _, r := range l.audit.Find(k, "", 3*consensus.MaxBlockRecords) {
		if r.Provable {
			bundle, err = l.audit.Evidence(ctx, r.Index)
			return r.Index, bundle, err
		}
	}
	return 0, nil, fmt.Errorf("no %s is sealed yet", k)
}

// prove writes a bundle of the newest record of a kind that can be proven, and
// verifies it as `stopline verify --policy` would.
func (l *local) prove(k identity.RecordKind, path *string, verified *bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), finishWait)
	defer cancel()
	index, bundle, err := l.bundleOf(ctx, k)
	if err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	*path = filepath.Join(l.district.Dir, "evidence", fmt.Sprintf("%s-%d.zip", k, index))
	if err := os.MkdirAll(filepath.Dir(*path), 0o755); err != nil {
		return err
	}
	if err := district.WriteFile(*path, bundle, 0o644); err != nil {
		return err
	}
	policy, err := ledger.ParsePolicy(l.district.Policy)
	if err != nil {
		return err
	}
	rep, err := ledger.VerifyBundle(bundle, policy)
	if err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	*verified = rep.Outcome == ledger.Pass
	return nil
}

// filed reports whether what is to run is what the district's genesis says: a
// command names its policy and a frame its detectors, and neither may be other
// than what was agreed.
func filed(reg *identity.Registry, o localOptions) error {
	if name := o.open.PolicyName; name != "" {
		want, err := json.Marshal(o.open.Policy)
		if err != nil {
			return err
		}
		if e, ok := reg.Entry(identity.TypePolicy, name); !ok || !bytes.Equal(e.Body, want) {
			return fmt.Errorf("the district was made with the policy %s %s, not %s", name, e.Body, want)
		}
	}
	if n := len(reg.Junctions()); n != len(o.open.Junctions) {
		return fmt.Errorf("the district was made with %d junctions, not %d", n, len(o.open.Junctions))
	}
	for _, j := range o.open.Junctions {
		want, err := json.Marshal(j)
		if err != nil {
			return err
		}
		if e, ok := reg.Entry(identity.TypeJunction, string(j.ID)); !ok || !bytes.Equal(e.Body, want) {
			return fmt.Errorf("the district was made with another definition of junction %s: other streets, detectors or timing", j.ID)
		}
	}
	return nil
}
