// Package gateway shows a district to people: one page with junctions, live
// signal states and blocks, the same as JSON, and server-sent events.
//
// It follows decided blocks and seals like any outsider could and believes only
// what a quorum signed. What it holds is a view that is lost with the process
// and comes back from the subjects. Agencies' gRPC and REST access, with
// purposes and receipts, is built on top of this.
package gateway

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

//go:embed page
var pageFiles embed.FS

// Config says what the gateway shows.
type Config struct {
	Bus      *bus.Bus
	District traffic.DistrictID
	// State follows the registry; the gateway runs it.
	State *agreed.State
	// Follow says whose decided blocks to follow.
	Follow decided.Config
	// Now is the district's clock. Optional: time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
	// API is how agencies ask. Optional: without it there is only the page.
	API *APIConfig
}

// keepBlocks is how many of the newest blocks the page shows.
const keepBlocks = 12

// Gateway holds the live view.
type Gateway struct {
	cfg Config
	log *slog.Logger
	api *API // nil: none

	mu        sync.Mutex // guards all below
	councils  []council  // of validators, by since
	known     *identity.Registry
	junctions map[traffic.JunctionID]*JunctionView
	live      map[traffic.JunctionID]live
	devices   map[traffic.DeviceID]traffic.FrameKey // newest agreed frame
	// undecided holds the newest periodic frame of this run until a command that
	// rests on it is agreed.
	undecided map[traffic.JunctionID]traffic.FrameKey
	blocks    []BlockView
	sealed    SealView
	counts    Counts
	started   time.Time
	agreed    latencies
	sealing   latencies
	unsealed  []pending
	waiters   chan struct{} // closed and replaced at each change
	// quarantine counts refused records by rule since the gateway started, and at
	// its first start all that the stream still has; lastRefusal is the newest
	// one's reason.
	quarantine  map[string]uint64
	lastRefusal string
	refused     refusals // registry records
	alarms      []AlarmView
}

// pending is a frame that has been agreed and waits for its seal.
type pending struct {
	index uint64
	at    time.Time
}

// keepUnsealed bounds what waits for a seal, if sealing stands still; what comes
// on top is missing from the latencies.
const keepUnsealed = 1 << 18

// Counts of what went by since the gateway started.
type Counts struct {
	Frames   uint64 `json:"frames"`
	Readings uint64 `json:"readings"`
	Commands uint64 `json:"commands"`
	Applied  uint64 `json:"applied"`
	Refused  uint64 `json:"refused"`
	Blocks   uint64 `json:"blocks"`
	Trips    uint64 `json:"trips"`
	// Rejected records were in a decided block with a verdict against them.
	Rejected uint64 `json:"rejected"`
}

// BlockView is one decided block.
type BlockView struct {
	Height  uint64    `json:"height"`
	Time    time.Time `json:"time"`
	Records int       `json:"records"`
	Size    uint64    `json:"size"`
	Root    string    `json:"root"`
	Votes   []uint64  `json:"votes"`
}

// SealView is the newest sealed checkpoint.
type SealView struct {
	Height uint64    `json:"height"`
	Size   uint64    `json:"size"`
	Time   time.Time `json:"time"`
}

// JunctionView is one junction as its newest agreed frame says.
type JunctionView struct {
	ID       traffic.JunctionID `json:"id"`
	Name     string             `json:"name"`
	LatE6    int64              `json:"lat_e6"`
	LonE6    int64              `json:"lon_e6"`
	Signal   traffic.Signal     `json:"signal"`
	Stage    string             `json:"stage"`
	Groups   []string           `json:"groups"`
	Vehicles uint32             `json:"vehicles"`
	Halted   uint32             `json:"halted"`
	At       time.Time          `json:"at"`
	// Frame is the newest agreed frame.
	Frame traffic.FrameKey `json:"frame"`
	// Rule is the newest agreed command's reason.
	Rule string `json:"rule"`
	// Evidence is the leaf of the newest command that can be proven, 0 for none:
	// a seal covers the block after the command's, which holds its header.
	Evidence uint64 `json:"evidence"`
	// Failed are the detectors that break a rule of health, by what was agreed
	// since the gateway started, in the order of their ids.
	Failed []FailedDetector `json:"failed_detectors,omitempty"`

	proofs []proof // newer commands that cannot be proven yet, rising
}

// FailedDetector is a detector of which it was agreed that it breaks a rule.
type FailedDetector struct {
	Detector traffic.DetectorID `json:"detector"`
	Rule     string             `json:"rule"`
	Reason   string             `json:"reason"`
	Since    time.Time          `json:"since"`
	// Index is the record's leaf.
	Index uint64 `json:"index"`
}

// health takes a word on a detector. Views that were handed out keep the old
// list.
func (j *JunctionView) health(h *traffic.Health, index uint64) {
	failed := slices.DeleteFunc(slices.Clone(j.Failed), func(f FailedDetector) bool { return f.Detector == h.Detector && f.Rule == h.Rule })
	if h.Failed {
		failed = append(failed, FailedDetector{h.Detector, h.Rule, h.Reason, h.Since, index})
		slices.SortFunc(failed, func(a, b FailedDetector) int {
			return cmp.Or(cmp.Compare(a.Detector, b.Detector), cmp.Compare(a.Rule, b.Rule))
		})
	}
	j.Failed = failed
}

// Latency in milliseconds since the reading's own time.
type Latency struct {
	AgreedP50 float64 `json:"agreed_p50"`
	AgreedP99 float64 `json:"agreed_p99"`
	SealedP50 float64 `json:"sealed_p50"`
	SealedP99 float64 `json:"sealed_p99"`
}

// View is everything that the page shows.
type View struct {
	District  traffic.DistrictID `json:"district"`
	Time      time.Time          `json:"time"`
	Junctions []JunctionView     `json:"junctions"`
	Blocks    []BlockView        `json:"blocks"`
	Sealed    SealView           `json:"sealed"`
	Counts    Counts             `json:"counts"`
	LatencyMS Latency            `json:"latency_ms"`
	// Quarantine counts refused records by rule.
	Quarantine  map[string]uint64 `json:"quarantine,omitempty"`
	LastRefusal string            `json:"last_refusal,omitempty"`
	// Alarms of the auditor that stand, the oldest first.
	Alarms []AlarmView `json:"alarms,omitempty"`
}

// New returns a gateway that has seen nothing yet.
func New(c Config) (*Gateway, error) {
	if c.Bus == nil || c.State == nil || c.District == "" {
		return nil, fmt.Errorf("gateway: bus, state and district are needed")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	first := council{validators: c.Follow.Validators}
	if reg := c.State.Registry(); reg.MembersSince() > 0 {
		first = council{ledger.Height(reg.MembersSince()), reg.Validators(), nil}
	}
	if err := first.open(c.District); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	g := &Gateway{cfg: c, log: c.Logger, councils: []council{first}, junctions: map[traffic.JunctionID]*JunctionView{}, live: map[traffic.JunctionID]live{},
		devices: map[traffic.DeviceID]traffic.FrameKey{}, undecided: map[traffic.JunctionID]traffic.FrameKey{}, waiters: make(chan struct{}), started: c.Now()}
	g.define(c.State.Registry())
	if c.API != nil {
		var err error
		if g.api, err = newAPI(*c.API, g); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// API is what agencies call, nil where there is none.
func (g *Gateway) API() *API { return g.api }

// define takes over what the registry says of junctions. Caller holds mu.
func (g *Gateway) define(reg *identity.Registry) {
	for _, j := range reg.Junctions() {
		v := g.junctions[j.ID]
		if v == nil {
			v = &JunctionView{ID: j.ID, Signal: traffic.Signal{Stage: -1}}
			g.junctions[j.ID] = v
		}
		v.Name, v.LatE6, v.LonE6 = j.Name, j.LatE6, j.LonE6
		v.Groups = nil // views that were handed out share the old ones
		for _, g := range j.Groups {
			v.Groups = append(v.Groups, g.Name)
		}
	}
}

// Run follows decisions and seals, and serves the API, until ctx ends.
func (g *Gateway) Run(ctx context.Context) error {
	api := run.Actor{Name: "API", Run: func(ctx context.Context) error {
		<-ctx.Done()
		return nil
	}}
	if g.api != nil {
		api.Run = g.api.Run
	}
	return run.All(ctx, api,
		run.Actor{Name: "decisions", Run: func(ctx context.Context) error {
			return g.cfg.State.Run(ctx, g.cfg.Follow, g.block)
		}},
		run.Actor{Name: "events", Run: g.events},
		run.Actor{Name: "seals", Run: func(ctx context.Context) error {
			return g.cfg.Bus.Subscribe(ctx, topic.Seal(g.cfg.District), func(_ string, data []byte) { g.seal(data) })
		}},
		run.Actor{Name: "alarms", Run: func(ctx context.Context) error {
			return g.cfg.Bus.Subscribe(ctx, topic.Alarm(g.cfg.District), func(_ string, data []byte) { g.alarm(data) })
		}},
	)
}

func (g *Gateway) block(_ context.Context, b *decided.Block, reg *identity.Registry) error {
	accepted, err := g.take(b, reg)
	if err != nil || g.api == nil {
		return err
	}
	for i := range accepted {
		g.api.decided(b, accepted[i].r, &accepted[i].c)
	}
	return nil
}

// accepted is a record of a block that can be read.
type accepted struct {
	r *decided.Record
	c validate.Candidate
}

// take takes a block into the view, and returns its accepted records.
func (g *Gateway) take(b *decided.Block, reg *identity.Registry) ([]accepted, error) {
	var out []accepted
	now := g.cfg.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts.Blocks++
	v := BlockView{Height: uint64(b.Header.Height), Time: b.Header.Time, Size: b.Header.Size, Root: fmt.Sprintf("%x", b.Header.Root[:8])}
	for _, vote := range b.Votes {
		v.Votes = append(v.Votes, vote.Validator)
	}
	slices.Sort(v.Votes)
	if b.Validators != nil {
		next := council{b.Header.Height, b.Validators, nil}
		if err := next.open(g.cfg.District); err != nil {
			return nil, fmt.Errorf("block %d: %w", b.Header.Height, err)
		}
		g.councils = append(g.councils, next)
	}
	if reg != g.known { // a registry never changes: another one is another state
		g.known = reg
		g.define(reg)
	}
	g.explain(b, reg)
	for i := range b.Records {
		r := &b.Records[i]
		if !r.Accepted {
			g.counts.Rejected++
			continue
		}
		v.Records++
		c := wire.Candidate(r.Raw, r.Salt[:])
		if c.Err != nil {
			// A quorum accepted it and we cannot read it: we are the older software.
			g.log.Warn("accepted record cannot be decoded", "height", b.Header.Height, "err", c.Err)
			continue
		}
		out = append(out, accepted{r, c})
		switch {
		case c.Frame != nil:
			g.frame(reg, c.Frame, r.Index, now)
			g.note(reg, c.Frame, uint64(b.Header.Height), b.Header.Time, r.ReceivedAt, r.Index)
		case c.Health != nil:
			if j := g.junctions[c.Health.Junction]; j != nil {
				j.health(c.Health, r.Index)
			}
		case c.Command != nil:
			g.counts.Commands++
			if g.undecided[c.Command.Junction] == c.Command.RestsOn {
				delete(g.undecided, c.Command.Junction)
			}
			if j := g.junctions[c.Command.Junction]; j != nil {
				j.commanded(c.Command.Rule, proof{r.Index, b.Header.Size}, g.sealed.Size)
			}
			g.amend(c.Command.Junction, func(s *pb.JunctionState) { s.Rule = c.Command.Rule })
		}
	}
	g.blocks = append(g.blocks, v)
	if len(g.blocks) > keepBlocks {
		g.blocks = slices.Delete(g.blocks, 0, len(g.blocks)-keepBlocks)
	}
	g.changed()
	return out, nil
}

// frame is called with mu held.
func (g *Gateway) frame(reg *identity.Registry, f *traffic.Frame, index uint64, now time.Time) {
	g.counts.Frames++
	g.counts.Readings += uint64(len(f.Readings))
	g.devices[f.Device] = f.FrameKey // what is agreed of one device comes in its order
	for _, r := range f.Results {
		if r.Applied {
			g.counts.Applied++
		} else {
			g.counts.Refused++
		}
	}
	// Frames of before the start are replayed history and say nothing of speed.
	if f.Time.After(g.started) {
		g.agreed.add(now.Sub(f.Time))
		switch {
		case index < g.sealed.Size: // the seal was quicker than this follower
			g.sealing.add(now.Sub(f.Time))
		case len(g.unsealed) < keepUnsealed:
			g.unsealed = append(g.unsealed, pending{index, f.Time})
		}
		if f.Interval > 0 {
			g.undecided[f.Junction] = f.FrameKey
		}
	}
	j := g.junctions[f.Junction]
	if j == nil || f.Time.Before(j.At) {
		return
	}
	if f.Signal.Mode == traffic.Tripped && j.Signal.Mode != traffic.Tripped {
		g.counts.Trips++
	}
	j.At, j.Frame, j.Signal = f.Time, f.FrameKey, f.Signal
	if def, ok := reg.Junction(f.Junction); ok {
		j.Stage = ""
		if s := f.Signal.Stage; s >= 0 && s < len(def.Stages) {
			j.Stage = def.Stages[s].Name
		}
		if f.Interval > 0 {
			j.Vehicles, j.Halted = queues(def, f)
		}
	}
}

// queues sums what stands before the stop lines: by lane-area detectors, or by
// an oracle where there are none.
func queues(j *traffic.Junction, f *traffic.Frame) (vehicles, halted uint32) {
	for _, kind := range []traffic.DetectorKind{traffic.Area, traffic.Oracle} {
		found := false
		for _, r := range f.Readings {
			if d, ok := j.Detector(r.Detector); ok && d.Kind == kind {
				found = true
				vehicles += r.Vehicles
				halted += r.Halted
			}
		}
		if found {
			break
		}
	}
	return vehicles, halted
}

// changed wakes whoever waits for a new view; mu is held.
func (g *Gateway) changed() {
	close(g.waiters)
	g.waiters = make(chan struct{})
}

// View returns the state as it is now.
func (g *Gateway) View() View {
	v, agreed, sealing := g.snapshot()
	// Sorting tens of thousands of samples must not keep blocks waiting.
	slices.Sort(agreed)
	slices.Sort(sealing)
	v.LatencyMS = Latency{AgreedP50: quantile(agreed, 50), AgreedP99: quantile(agreed, 99),
		SealedP50: quantile(sealing, 50), SealedP99: quantile(sealing, 99)}
	return v
}

// snapshot copies everything that mu guards.
func (g *Gateway) snapshot() (v View, agreed, sealing []float64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	v = View{District: g.cfg.District, Time: g.cfg.Now().UTC(), Blocks: slices.Clone(g.blocks), Sealed: g.sealed, Counts: g.counts,
		Quarantine: maps.Clone(g.quarantine), LastRefusal: g.lastRefusal, Alarms: g.standing(time.Now())}
	for _, j := range g.junctions {
		c := *j
		c.proofs = nil
		v.Junctions = append(v.Junctions, c)
	}
	slices.SortFunc(v.Junctions, func(a, b JunctionView) int { return cmp.Compare(a.ID, b.ID) })
	return v, slices.Clone(g.agreed.ms), slices.Clone(g.sealing.ms)
}

// Unsealed returns how many agreed frames of this run still wait for a seal.
func (g *Gateway) Unsealed() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.unsealed)
}

// Newest returns the newest agreed frame of a device; a junction may have several
// devices.
func (g *Gateway) Newest(d traffic.DeviceID) (key traffic.FrameKey, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	key, ok = g.devices[d]
	return key, ok
}

// Undecided returns for how many junctions the command that rests on their newest
// periodic frame is not agreed yet. One may never come: signal-control makes none
// on a frame that is too old.
func (g *Gateway) Undecided() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.undecided)
}

// Handler serves the page and its data:
//
//	GET /                            the page
//	GET /v1/state                    the view, JSON
//	GET /v1/live                     the view whenever it changes, server-sent events
//	GET /v1/registry?type=TYPE       the registry in force, all of it or one type
//	GET /v1/registry/{type}/{id}     one entry of it
//	GET /v1/refusals/{commitment}    why a registry record was refused lately
//	/v1/…, /openapi.json, /docs/     the API, where there is one
func (g *Gateway) Handler() http.Handler {
	mux := http.NewServeMux()
	files, err := fs.Sub(pageFiles, "page")
	if err != nil {
		panic(err) // unreachable: the folder is embedded
	}
	page := http.FileServerFS(files)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { // without a method: /v1/ is the narrower one then
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		page.ServeHTTP(w, r)
	})
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, g.View()) })
	mux.HandleFunc("GET /v1/live", g.livePage)
	if g.api != nil { // what is left of /v1/ is the API's
		mux.Handle("/v1/", g.api.REST())
		for _, path := range []string{"GET /openapi.json", "GET /docs", "GET /docs/"} {
			mux.Handle(path, g.api.REST())
		}
	}
	g.registryRoutes(mux)
	return mux
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(v) // fails only when the client has gone
}

// liveEvery bounds how often one page is sent a new view.
const liveEvery = 250 * time.Millisecond

func (g *Gateway) livePage(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	out := http.NewResponseController(w)
	for {
		g.mu.Lock()
		next := g.waiters
		g.mu.Unlock()
		b, err := json.Marshal(g.View())
		if err != nil {
			g.log.Error("view cannot be encoded", "err", err)
			return
		}
		if _, err := fmt.Fprintf(w, "data: %s\n\n", b); err != nil {
			return
		}
		if err := out.Flush(); err != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(liveEvery):
		}
		select {
		case <-r.Context().Done():
			return
		case <-next:
		}
	}
}

// latencies keeps the newest samples, and so its quantiles follow what is now.
type latencies struct {
	ms   []float64
	next int
}

const keepLatencies = 1 << 16

func (l *latencies) add(d time.Duration) {
	v := float64(d) / float64(time.Millisecond)
	if len(l.ms) < keepLatencies {
		l.ms = append(l.ms, v)
		return
	}
	l.ms[l.next] = v
	l.next = (l.next + 1) % keepLatencies
}

// quantile returns the p-th percentile of sorted samples (nearest rank: the
// smallest that p % of them do not exceed), 0 without samples.
func quantile(sorted []float64, p int) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return sorted[max((p*n+99)/100-1, 0)]
}

// Height returns the newest block's height that the gateway has seen.
func (g *Gateway) Height() ledger.Height {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.blocks) == 0 {
		return 0
	}
	return ledger.Height(g.blocks[len(g.blocks)-1].Height)
}
