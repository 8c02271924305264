package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	neturl "net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/consensus"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/run"
)

var consensusCommand = command{
	name:     "consensus",
	synopsis: "stopline consensus --config FILE [--check]\nstopline consensus --write-config DIR --data DIR --nats URL",
	summary:  "run one validator in a process of its own",
	manual: `Runs one of a district's validators: it agrees with the others, over NATS, on
what was recorded, keeps its own copy of all blocks, and cosigns checkpoints.
SIGTERM or Ctrl-C ends it cleanly; kill -9 at any moment does no harm. A second
process on the same data folder is refused: one validator must not vote twice.
Never run it on a copy of its folder either; it notices, mostly, and stays
silent until the others have decided, without it, what it may have voted on.

A validator that the registry does not know yet follows the blocks, and takes
part from the block after the one that files it. One that was revoked stays until
the others have all that it decided, and ends with status 0. To change its keys,
start it with the next ones beside the old, then file its entry with them.

The configuration is YAML; paths are relative to the file:

    district: harbour           # must be the genesis document's
    number: 2                   # of the validator in the registry
    genesis: genesis.json       # the district's genesis document
    vote_key: vote.key          # 64 hex digits of the seed; in the registry is
    cosign_key: cosign.key      #   the public half of each
    next_vote_key: vote2.key    # optional: take the place of the keys once the
    next_cosign_key: cosign2.key #  registry says so; later they are the keys
    data: data                  # folder of the validator's own; made if need be
    nats:
      url: nats://n1:4222,nats://n2:4222
      nkey: nats.nk             # the user's nkey seed, or
      creds: nats.creds         #   its JWT and seed
      ca: ca.pem                # optional: by what the servers are known
      cert: client.pem          # optional: the client's own certificate,
      key: client.key           #   and key
    health: 127.0.0.1:9101      # optional
    log_level: info             # optional: debug, info, warn or error
    snapshot_every: 200         # optional: blocks between two snapshots
    retention: 168h             # optional: how long payloads are kept; -1s: for good
    timing: {heartbeat: 700ms}  # optional: any of heartbeat, complain,
                                # view_change, view_change_resend, behind,
                                # collect, resend, fetch, meet, tick, batch_wait

health answers GET /healthz with a JSON object: whether the validator takes part,
its height, view, leader, and what it has counted; status 200 if it takes part
and is connected, else 503.

--write-config is for trying it out on one machine: for the district in the data
folder of a demo it writes DIR/validator-N for each validator, with its
configuration, its keys and a NATS user, and DIR/nats.conf for a NATS server that
holds each user to its own subjects; DIR/users has the other services' seeds.
Departments in earnest make their own keys.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		config := fs.String("config", "", "configuration `FILE`")
		check := fs.Bool("check", false, "check the configuration, keys and genesis document; start nothing")
		write := fs.String("write-config", "", "write configurations for all validators below `DIR`, which must not exist")
		data := fs.String("data", "", "with --write-config: data folder `DIR` of a district")
		nats := fs.String("nats", "", "with --write-config: `URL` of the NATS server")
		return func(ctx context.Context, args []string, s streams) error {
			switch {
			case len(args) > 0:
				return usageError("consensus: takes no arguments, got %q", args)
			case (*config == "") == (*write == ""):
				return usageError("consensus: either --config or --write-config is needed")
			case *write == "" && (*data != "" || *nats != ""):
				return usageError("consensus: --data, --nats: only with --write-config")
			case *write != "" && (*data == "" || *nats == "" || *check):
				return usageError("consensus: --write-config needs --data and --nats, and no --check")
			case *write != "":
				return writeValidators(*write, *data, *nats, s.out)
			}
			v, err := loadValidator(*config)
			if err != nil {
				return err
			}
			if *check {
				_, err := fmt.Fprintln(s.out, v)
				return err
			}
			return v.run(ctx, s.err)
		}
	},
}

// validatorConfig is the form of the configuration file.
type validatorConfig struct {
	District      traffic.DistrictID `yaml:"district"`
	Number        uint64             `yaml:"number"`
	Genesis       string             `yaml:"genesis"`
	VoteKey       string             `yaml:"vote_key"`
	CosignKey     string             `yaml:"cosign_key"`
	NextVoteKey   string             `yaml:"next_vote_key,omitempty"`
	NextCosignKey string             `yaml:"next_cosign_key,omitempty"`
	Data          string             `yaml:"data"`
	NATS          natsConfig         `yaml:"nats"`
	Health        string             `yaml:"health,omitempty"`
	LogLevel      string             `yaml:"log_level,omitempty"`
	SnapshotEvery int                `yaml:"snapshot_every,omitempty"`
	Retention     time.Duration      `yaml:"retention,omitempty"`
	Timing        timingConfig       `yaml:"timing,omitempty"`
}

type natsConfig struct {
	URL   string `yaml:"url"`
	NKey  string `yaml:"nkey,omitempty"`
	Creds string `yaml:"creds,omitempty"`
	CA    string `yaml:"ca,omitempty"`
	Cert  string `yaml:"cert,omitempty"`
	Key   string `yaml:"key,omitempty"`
}

// timingConfig is consensus.Timing field by field.
type timingConfig struct {
	Tick             time.Duration `yaml:"tick,omitempty"`
	BatchWait        time.Duration `yaml:"batch_wait,omitempty"`
	Heartbeat        time.Duration `yaml:"heartbeat,omitempty"`
	Complain         time.Duration `yaml:"complain,omitempty"`
	ViewChange       time.Duration `yaml:"view_change,omitempty"`
	ViewChangeResend time.Duration `yaml:"view_change_resend,omitempty"`
	Behind           time.Duration `yaml:"behind,omitempty"`
	Collect          time.Duration `yaml:"collect,omitempty"`
	Resend           time.Duration `yaml:"resend,omitempty"`
	Fetch            time.Duration `yaml:"fetch,omitempty"`
	Meet             time.Duration `yaml:"meet,omitempty"`
}

func (t timingConfig) timing() consensus.Timing {
	return consensus.Timing{
		Tick: t.Tick, BatchWait: t.BatchWait, Heartbeat: t.Heartbeat, Complain: t.Complain, ViewChange: t.ViewChange,
		ViewChangeResend: t.ViewChangeResend, Behind: t.Behind, Collect: t.Collect, Resend: t.Resend, Fetch: t.Fetch, Meet: t.Meet,
	}
}

// validatorFile is a configuration that has been checked, with what it names.
type validatorFile struct {
	validatorConfig
	config consensus.Config
	// replaced says that the keys may be others than those in genesis.
	replaced bool
	bus      bus.ConnectOptions
	level    slog.Level
	genesis  *identity.Genesis
	quorum   int
	of       int
	member   *identity.Validator // nil: not in the genesis document
}

func (v *validatorFile) String() string {
	who := "not in the genesis document; the registry must have it"
	if v.member != nil {
		who = v.member.Department
	}
	return fmt.Sprintf("OK: validator %d (%s) of %s, one of %d at its beginning, quorum %d", v.Number, who, v.District, v.of, v.quorum)
}

// problems collects what is wrong with a file, with its lines.
type problems struct {
	file  string
	lines map[string]int
	errs  []error
}

func (p *problems) add(field, format string, args ...any) {
	at := p.file
	if n := p.lines[field]; n > 0 {
		at = fmt.Sprintf("%s:%d", p.file, n)
	}
	p.errs = append(p.errs, fmt.Errorf("%s: %s: "+format, append([]any{at, field}, args...)...))
}

// maxValidatorConfig is more than a configuration may be, bytes.
const maxValidatorConfig = 1 << 20

// loadValidator reads a configuration and the files that it names, and tells
// everything that is wrong at once.
func loadValidator(file string) (*validatorFile, error) {
	raw, err := readAtMost(file, maxValidatorConfig)
	if err != nil {
		return nil, err
	}
	v := &validatorFile{}
	p := &problems{file: file, lines: map[string]int{}}
	if err := decodeYAML(raw, &v.validatorConfig, p); err != nil {
		return nil, err
	}
	rel := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(filepath.Dir(file), path)
	}
	needed := func(field, value string) bool {
		if value == "" {
			p.add(field, "must be given")
		}
		return value != ""
	}
	key := func(field, path string) ed25519.PrivateKey {
		if !needed(field, path) {
			return nil
		}
		k, err := district.ReadKey(rel(path))
		if err != nil {
			p.add(field, "%w", err)
		}
		return k
	}
	needed("district", string(v.District))
	if v.Number == 0 {
		p.add("number", "must be given, from 1")
	}
	vote, cosign := key("vote_key", v.VoteKey), key("cosign_key", v.CosignKey)
	var next [2]ed25519.PrivateKey
	for i, n := range []struct{ field, path string }{{"next_vote_key", v.NextVoteKey}, {"next_cosign_key", v.NextCosignKey}} {
		if n.path != "" {
			next[i] = key(n.field, n.path)
		}
	}
	needed("data", v.Data)
	// Keys may have been replaced since genesis: who has blocks asks them, and so
	// does who has other keys at hand.
	if _, err := os.Stat(filepath.Join(rel(v.Data), "blocks")); err == nil || next[0] != nil || next[1] != nil {
		v.replaced = true
	}
	needed("nats.url", v.NATS.URL)
	if (v.NATS.NKey != "") && (v.NATS.Creds != "") {
		p.add("nats.creds", "must not be given beside nats.nkey")
	}
	if (v.NATS.Cert == "") != (v.NATS.Key == "") {
		p.add("nats.cert", "nats.cert and nats.key must be given together")
	}
	for field, path := range map[string]string{"nats.nkey": v.NATS.NKey, "nats.creds": v.NATS.Creds, "nats.ca": v.NATS.CA, "nats.cert": v.NATS.Cert, "nats.key": v.NATS.Key} {
		if path == "" {
			continue
		}
		if f, err := os.Open(rel(path)); err != nil {
			p.add(field, "%w", err)
		} else {
			_ = f.Close() // nothing was written
		}
	}
	if v.Health != "" {
		if _, _, err := net.SplitHostPort(v.Health); err != nil {
			p.add("health", "%w", err)
		}
	}
	if v.LogLevel == "" {
		v.LogLevel = "info"
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, v.LogLevel) {
		p.add("log_level", "%q, must be debug, info, warn or error", v.LogLevel)
	} else if err := v.level.UnmarshalText([]byte(v.LogLevel)); err != nil {
		p.add("log_level", "%w", err)
	}
	var genesis []byte
	if needed("genesis", v.Genesis) {
		if genesis, err = readAtMost(rel(v.Genesis), maxBundle); err != nil {
			p.add("genesis", "%w", err)
		} else if err := v.openGenesis(genesis, vote, cosign); err != nil {
			p.add("genesis", "%w", err)
		}
	}
	if v.genesis != nil && v.District != "" && v.genesis.District != v.District {
		p.add("district", "%q, the genesis document is that of %q", v.District, v.genesis.District)
	}
	v.config = consensus.Config{
		District: v.District, Number: v.Number, VoteKey: vote, CosignKey: cosign, NextVoteKey: next[0], NextCosignKey: next[1], Genesis: genesis, Dir: rel(v.Data),
		SnapshotEvery: v.SnapshotEvery, Retention: v.Retention, Timing: v.Timing.timing(),
	}
	if len(p.errs) == 0 {
		if err := v.config.Validate(); err != nil { // what is left: sizes and times
			p.errs = append(p.errs, fmt.Errorf("%s: %w", file, err))
		}
	}
	v.bus = bus.ConnectOptions{
		URL: v.NATS.URL, Name: fmt.Sprintf("stopline validator %d of %s", v.Number, v.District), User: topic.ValidatorUser(v.Number),
		NKeyFile: rel(v.NATS.NKey), CredsFile: rel(v.NATS.Creds), CAFile: rel(v.NATS.CA), CertFile: rel(v.NATS.Cert), KeyFile: rel(v.NATS.Key),
	}
	return v, errors.Join(p.errs...)
}

// openGenesis finds the validator in the genesis document. It may be a later
// member; the validator itself finds out when it has the blocks.
func (v *validatorFile) openGenesis(doc []byte, vote, cosign ed25519.PrivateKey) error {
	g, err := identity.ParseGenesis(doc)
	if err != nil {
		return err
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return err
	}
	v.genesis = g
	all := reg.Validators()
	v.of, v.quorum = len(all), ledger.Quorum(len(all))
	i := slices.IndexFunc(all, func(m identity.Validator) bool { return m.Number == v.Number })
	if i < 0 {
		return nil
	}
	v.member = &all[i]
	if v.replaced {
		return nil
	}
	var errs []error
	if vote != nil && !ed25519.PublicKey(v.member.VoteKey).Equal(vote.Public()) {
		errs = append(errs, fmt.Errorf("validator %d has another vote key than vote_key", v.Number))
	}
	if cosign != nil && !ed25519.PublicKey(v.member.CosignKey).Equal(cosign.Public()) {
		errs = append(errs, fmt.Errorf("validator %d has another cosigning key than cosign_key", v.Number))
	}
	return errors.Join(errs...)
}

// decodeYAML fills out and refuses what it has no field for. Wrong fields go to
// p, so that the others are checked as well; a file that is no YAML ends it.
func decodeYAML(raw []byte, out any, p *problems) error {
	var root yaml.Node
	if err := yaml.Unmarshal(raw, &root); err != nil {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	findLines(&root, "", p.lines)
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	err := d.Decode(out)
	var types *yaml.TypeError
	switch {
	case errors.As(err, &types):
		for _, e := range types.Errors { // "line 3: field x not found in type …"
			line, text, ok := strings.Cut(strings.TrimPrefix(e, "line "), ": ")
			if !ok {
				line, text = "1", e
			}
			text, _, _ = strings.Cut(text, " in type ")
			p.errs = append(p.errs, fmt.Errorf("%s:%s: %s", p.file, line, text))
		}
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%s: is empty", p.file)
	case err != nil:
		return fmt.Errorf("%s: %w", p.file, err)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: must hold one document", p.file)
	}
	return nil
}

// findLines notes the line of each field, by its path with dots.
func findLines(n *yaml.Node, path string, lines map[string]int) {
	if n.Kind == yaml.DocumentNode {
		for _, c := range n.Content {
			findLines(c, path, lines)
		}
	}
	if n.Kind != yaml.MappingNode {
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name := n.Content[i].Value
		if path != "" {
			name = path + "." + name
		}
		lines[name] = n.Content[i].Line
		findLines(n.Content[i+1], name, lines)
	}
}

// run runs the validator until ctx ends.
func (v *validatorFile) run(ctx context.Context, errs io.Writer) (err error) {
	log := slog.New(slog.NewTextHandler(errs, &slog.HandlerOptions{Level: v.level})).With("district", v.District)
	v.config.Logger, v.bus.Logger = log.With("service", "consensus"), log
	b, err := bus.Connect(v.bus)
	if err != nil {
		return err
	}
	defer b.Close()
	v.config.Bus = b
	if err := os.MkdirAll(v.config.Dir, 0o700); err != nil {
		return err
	}
	validator, err := consensus.New(v.config)
	if err != nil {
		return err
	}
	actors := []run.Actor{{Name: "validator", Run: validator.Run}}
	if v.Health != "" {
		n, err := net.Listen("tcp", v.Health)
		if err != nil {
			return fmt.Errorf("health: %w", err)
		}
		log.Info("health", "url", fmt.Sprintf("http://%s/healthz", n.Addr()))
		mux := http.NewServeMux()
		mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { v.health(w, validator, b) })
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second}
		actors = append(actors, run.Actor{Name: "health", Run: func(ctx context.Context) error { return serveHTTP(ctx, server, n) }})
	}
	err = run.All(ctx, actors...)
	if ctx.Err() != nil && (err == nil || errors.Is(err, ctx.Err())) {
		return nil // asked to end
	}
	return err
}

// validatorHealth is the answer of /healthz.
type validatorHealth struct {
	District  traffic.DistrictID `json:"district"`
	Validator uint64             `json:"validator"`
	// TakingPart is false while the validator starts, catches up before it votes,
	// or stays silent because its disk is an old copy.
	TakingPart bool `json:"taking_part"`
	// Connected to NATS.
	Connected bool          `json:"connected"`
	Height    ledger.Height `json:"height"`
	View      uint64        `json:"view"`
	Leader    uint64        `json:"leader"`
	// Counts are those of consensus.Stats, by name.
	Counts map[string]uint64 `json:"counts"`
}

func (v *validatorFile) health(w http.ResponseWriter, c *consensus.Validator, b *bus.Bus) {
	s := c.Stats()
	h := validatorHealth{District: v.District, Validator: v.Number, Connected: b.NC.IsConnected(), Height: s.Height, View: s.View, Leader: s.Leader, Counts: map[string]uint64{}}
	select {
	case <-c.Ready():
		h.TakingPart = true
	default:
	}
	r := reflect.ValueOf(s)
	for i := range r.NumField() {
		if n, ok := r.Field(i).Interface().(uint64); ok {
			h.Counts[snake(r.Type().Field(i).Name)] = n
		}
	}
	body, err := json.Marshal(h)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !h.TakingPart || !h.Connected {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write(append(body, '\n')) // the client may have gone
}

// snake writes BadRequests as bad_requests.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if r >= 'A' && r <= 'Z' {
			if i > 0 {
				b.WriteByte('_')
			}
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// writeValidators makes the folders for all validators of a district, and the
// configuration of a NATS server.
func writeValidators(dir, data, url string, out io.Writer) error {
	d, err := district.Load(data)
	if err != nil {
		return err
	}
	reg, err := identity.NewRegistry(&d.Genesis)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	id := d.Genesis.District
	var users []bus.User
	user := func(name, seedFile string, p topic.Permissions) error {
		public, seed, err := bus.NewNKey()
		if err != nil {
			return err
		}
		users = append(users, bus.User{Name: name, NKey: public, Permissions: p})
		return district.WriteFile(seedFile, seed, 0o600)
	}
	for _, m := range reg.Validators() {
		name := topic.ValidatorUser(m.Number)
		own := filepath.Join(dir, name)
		if err := os.Mkdir(own, 0o700); err != nil {
			return err
		}
		if err := district.WriteFile(filepath.Join(own, "genesis.json"), d.GenesisJSON, 0o644); err != nil {
			return err
		}
		for file, key := range map[string]string{"vote.key": district.VoteKey(m.Number), "cosign.key": district.CosignKey(m.Number)} {
			k, err := d.Key(key)
			if err != nil {
				return err
			}
			if err := district.WriteKey(filepath.Join(own, file), k); err != nil {
				return err
			}
		}
		if err := user(name, filepath.Join(own, "nats.nk"), topic.ValidatorPermissions(id, m.Number)); err != nil {
			return err
		}
		c, err := yaml.Marshal(validatorConfig{
			District: id, Number: m.Number, Genesis: "genesis.json", VoteKey: "vote.key", CosignKey: "cosign.key", Data: "data",
			NATS: natsConfig{URL: url, NKey: "nats.nk"}, Health: fmt.Sprintf("127.0.0.1:%d", 9100+m.Number), LogLevel: "info",
		})
		if err != nil {
			return err
		}
		if err := district.WriteFile(filepath.Join(own, "validator.yaml"), c, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(out, "stopline consensus --config %s\n", filepath.Join(own, "validator.yaml"))
	}
	if err := os.Mkdir(filepath.Join(dir, "users"), 0o700); err != nil {
		return err
	}
	for _, name := range topic.ServiceUsers() {
		p, err := topic.ServicePermissions(id, name)
		if err != nil {
			return err
		}
		if err := user(name, filepath.Join(dir, "users", name+".nk"), p); err != nil {
			return err
		}
	}
	listen, err := listenOf(url)
	if err != nil {
		return err
	}
	conf, err := bus.ServerConfig(listen, filepath.Join(dir, "nats"), users)
	if err != nil {
		return err
	}
	if err := district.WriteFile(filepath.Join(dir, "nats.conf"), conf, 0o600); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "nats-server --config %s\nstopline demo --data %s --external-validators --nats %s --nats-users %s\n",
		filepath.Join(dir, "nats.conf"), data, url, filepath.Join(dir, "users"))
	return err
}

// listenOf returns where a server of a URL listens.
func listenOf(url string) (string, error) {
	u, err := neturl.Parse(url)
	if err != nil {
		return "", fmt.Errorf("--nats: %w", err)
	}
	if u.Host == "" || u.Port() == "" {
		return "", fmt.Errorf("--nats %s: must name a host and a port, as nats://127.0.0.1:4222 does", url)
	}
	return u.Host, nil
}
