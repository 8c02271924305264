package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// parcel is the head of a message between validators, read here by its
// description and not with the project's own code: version, kind, then From, To,
// Config, incarnation, start counter, Seq, Decided, the vote's view, height and
// phase and its digest, and the SHA-256 of the body; then a signature.
type parcel struct {
	from, counter, decided uint64
	incarnation            [16]byte
	vote                   slotOf
	digest                 [32]byte
	proof                  []byte
}

// slotOf is where a validator votes once. Phase 0 is no vote, 3 a commit.
type slotOf struct {
	from, view, height uint64
	phase              byte
}

const commitPhase = 3

func readParcel(b []byte) (parcel, error) {
	const head = 2 + 3*8 + 16 + 5*8 + 1 + 32 + 32
	if len(b) < head+64 || b[0] != 1 {
		return parcel{}, fmt.Errorf("%d bytes, version %v: not a message between validators", len(b), b[:min(1, len(b))])
	}
	u := func(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }
	p := parcel{from: u(2), incarnation: [16]byte(b[26:]), counter: u(42), decided: u(58), proof: bytes.Clone(b[:head+64])}
	p.vote = slotOf{from: p.from, view: u(66), height: u(74), phase: b[82]}
	p.digest = [32]byte(b[83:])
	return p, nil
}

// eyes see everything that validators say to each other, and what they publish.
type eyes struct {
	genesis ledger.Hash
	keys    map[uint64]identity.PublicKey

	mu      sync.Mutex
	changed chan struct{}
	votes   map[slotOf]parcel
	blocks  map[ledger.Height]ledger.Hash
	// doubles are slots with two votes, forks heights with two blocks, lost
	// starts that had fewer blocks than the validator said before.
	doubles, forks, lost []string
	errs                 []error
	decided              map[uint64]uint64 // most that each validator said
	counter              map[uint64]uint64 // newest start of each
	incarnations         map[[16]byte]bool
	lastVote             map[uint64]uint64 // height of each, in any start
	committed            map[uint64]uint64 // height of each, in its newest start
	voted                map[uint64]int    // votes of each in its newest start
	parcels              int
}

func (e *eyes) wake() {
	close(e.changed)
	e.changed = make(chan struct{})
}

func (e *eyes) hear(m *nats.Msg) {
	p, err := readParcel(m.Data)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil || !strings.HasSuffix(m.Subject, fmt.Sprintf(".%d", p.from)) {
		e.errs = append(e.errs, fmt.Errorf("%s: %w", m.Subject, err))
		return
	}
	e.parcels++
	if !e.incarnations[p.incarnation] {
		e.incarnations[p.incarnation] = true
		if p.counter <= e.counter[p.from] {
			e.lost = append(e.lost, fmt.Sprintf("validator %d begins start %d after start %d", p.from, p.counter, e.counter[p.from]))
		}
		if p.decided < e.decided[p.from] {
			e.lost = append(e.lost, fmt.Sprintf("validator %d begins start %d at height %d, it had said %d before", p.from, p.counter, p.decided, e.decided[p.from]))
		}
		if p.counter > e.counter[p.from] {
			e.counter[p.from], e.committed[p.from], e.voted[p.from] = p.counter, 0, 0
		}
	}
	e.decided[p.from] = max(e.decided[p.from], p.decided)
	if p.vote.phase != 0 {
		e.lastVote[p.from] = max(e.lastVote[p.from], p.vote.height)
		if p.counter == e.counter[p.from] {
			e.voted[p.from]++
			if p.vote.phase == commitPhase {
				e.committed[p.from] = max(e.committed[p.from], p.vote.height)
			}
		}
		if have, ok := e.votes[p.vote]; !ok {
			e.votes[p.vote] = p
		} else if have.digest != p.digest {
			// By the rules for evidence, so that nobody is accused by mistake.
			if err := ledger.CheckVotesDiffer(p.from, e.keys[p.from], e.genesis, have.proof, p.proof); err != nil {
				e.errs = append(e.errs, err)
			}
			e.doubles = append(e.doubles, fmt.Sprintf("%+v: %x in start %d and %x in start %d", p.vote, have.digest[:4], have.counter, p.digest[:4], p.counter))
		}
	}
	e.wake()
}

func (e *eyes) block(m *nats.Msg) {
	b, err := wire.DecodeBlock(m.Data)
	var h ledger.Header
	if err == nil {
		h, err = ledger.ParseHeader(b.Header)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		e.errs = append(e.errs, fmt.Errorf("%s: %w", m.Subject, err))
		return
	}
	hash := h.Hash()
	if have, ok := e.blocks[h.Height]; ok && have != hash {
		e.forks = append(e.forks, fmt.Sprintf("height %d: %x and %x", h.Height, have[:4], hash[:4]))
	}
	e.blocks[h.Height] = hash
	e.wake()
}

// until waits until yes, which is called with mu held, and returns when it was.
func (e *eyes) until(t testing.TB, what string, within time.Duration, yes func() bool) {
	t.Helper()
	deadline := time.After(within)
	for {
		e.mu.Lock()
		ok, changed := yes(), e.changed
		e.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			e.mu.Lock()
			defer e.mu.Unlock()
			t.Fatalf("within %v: not %s; decided %v, committed %v, starts %v", within, what, e.decided, e.committed, e.counter)
		}
	}
}

// top is the highest height that anybody said to have decided.
func (e *eyes) top() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	var top uint64
	for _, h := range e.decided {
		top = max(top, h)
	}
	return top
}

func (e *eyes) start(n uint64) uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.counter[n]
}

// clean wants nothing seen that must not be.
func (e *eyes) clean(t testing.TB) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for what, seen := range map[string][]string{"two votes in one slot": e.doubles, "two blocks at one height": e.forks, "blocks lost": e.lost} {
		if len(seen) > 0 {
			t.Errorf("%s, %d times: %s", what, len(seen), strings.Join(seen[:min(len(seen), 5)], "\n"))
		}
	}
	if err := errors.Join(e.errs...); err != nil {
		t.Error(err)
	}
}

// consortium is a district whose validators are processes.
type consortium struct {
	t        testing.TB
	district *district.District
	dir      string // has validator-N
	data     string // the district's
	url      string
	users    string
	all      *bus.Bus // may do everything
	see      *eyes
	running  map[uint64]*process
	// stopServer ends one of a cluster's servers.
	stopServer func(i int)
	devices    []*device
	sent       [][]byte // batches in ACCEPTED
}

// crossing is a junction with one detector.
func crossing(id traffic.JunctionID) *traffic.Junction {
	return &traffic.Junction{
		ID: id,
		Lanes: []traffic.Lane{
			{ID: "in", LengthCM: 9000, SpeedCMS: 1390, Capacity: 12, To: id},
			{ID: "out", LengthCM: 12000, SpeedCMS: 1390, Capacity: 16, From: id},
		},
		Groups:    []traffic.Group{{Name: "a", Kind: traffic.Vehicles}, {Name: "b", Kind: traffic.Vehicles}},
		Movements: []traffic.Movement{{From: "in", To: "out", Group: 0, SaturationPerHour: 1800}, {From: "in", To: "out", Group: 1, SaturationPerHour: 1800}},
		Detectors: []traffic.Detector{{ID: "stop", Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1}},
		Conflicts: [][]int{{1}, {0}},
		Stages:    []traffic.Stage{{Name: "a", State: "Gr"}, {Name: "b", State: "rG"}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000},
		Plan:      traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{Stage: 0, DurationMS: 20000, IntergreenMS: 4000}, {Stage: 1, DurationMS: 20000, IntergreenMS: 4000}}},
	}
}

// newConsortium makes a district and its validators' folders as the manual page
// says, and runs the NATS server that they name; no validator runs yet.
func newConsortium(t testing.TB) *consortium {
	t.Helper()
	return newConsortiumOn(t, 1)
}

// newConsortiumOn is newConsortium on a cluster of three servers, or on one.
func newConsortiumOn(t testing.TB, servers int) *consortium {
	t.Helper()
	root := t.TempDir()
	c := &consortium{t: t, data: filepath.Join(root, "district"), dir: filepath.Join(root, "consortium"), running: map[uint64]*process{}}
	o := district.Options{ID: "harbour", Created: time.Now()}
	for i := range 4 {
		o.Junctions = append(o.Junctions, crossing(traffic.JunctionID(fmt.Sprintf("j%d", i+1))))
	}
	var err error
	if c.district, err = district.Open(c.data, o); err != nil {
		t.Fatal(err)
	}
	for _, j := range o.Junctions {
		key, err := c.district.Key(string(district.DeviceID(j.ID)))
		if err != nil {
			t.Fatal(err)
		}
		c.devices = append(c.devices, &device{district: o.ID, junction: j, id: district.DeviceID(j.ID), key: key, boot: 1})
	}
	c.configure(servers)
	c.see = &eyes{
		genesis: c.district.GenesisHash, keys: map[uint64]identity.PublicKey{}, changed: make(chan struct{}), votes: map[slotOf]parcel{},
		blocks: map[ledger.Height]ledger.Hash{}, decided: map[uint64]uint64{}, counter: map[uint64]uint64{}, incarnations: map[[16]byte]bool{},
		lastVote: map[uint64]uint64{}, committed: map[uint64]uint64{}, voted: map[uint64]int{},
	}
	for _, v := range c.validators() {
		c.see.keys[v.Number] = v.VoteKey
	}
	for subject, f := range map[string]func(*nats.Msg){"stopline.harbour.bft.>": c.see.hear, topic.DecisionAll("harbour"): c.see.block} {
		stop, err := c.all.Listen(subject, "", f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(stop)
	}
	if err := c.all.DeclareWith(t.Context(), topic.Streams("harbour"), bus.DeclareOptions{Replicas: servers}); err != nil {
		t.Fatal(err)
	}
	return c
}

// configure writes the configurations by the command line and starts a server
// by the one for NATS: on a free port, and with one more user, who may do all.
func (c *consortium) configure(servers int) {
	c.t.Helper()
	const url = "nats://127.0.0.1:4222"
	wantExit(c.t, inside(c.t, "consensus", "--write-config", c.dir, "--data", c.data, "--nats", url), exitOK,
		"stopline consensus --config "+filepath.Join(c.dir, "validator-4", "validator.yaml"), "nats-server --config")
	c.users = filepath.Join(c.dir, "users")
	public, seed, err := bus.NewNKey()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.users, "all.nk"), seed, 0o600); err != nil {
		c.t.Fatal(err)
	}
	edit := func(file string, pairs ...string) []byte {
		b, err := os.ReadFile(file)
		if err != nil {
			c.t.Fatal(err)
		}
		for i := 0; i < len(pairs); i += 2 {
			if !bytes.Contains(b, []byte(pairs[i])) {
				c.t.Fatalf("%s has no %q:\n%s", file, pairs[i], b)
			}
			b = bytes.Replace(b, []byte(pairs[i]), []byte(pairs[i+1]), 1)
		}
		return b
	}
	conf := edit(filepath.Join(c.dir, "nats.conf"), "127.0.0.1:4222", "127.0.0.1:-1", "users = [\n", "users = [\n { nkey: "+public+" }\n")
	if servers == 1 {
		c.url = servicetest.Configured(c.t, conf)
	} else {
		c.url, c.stopServer = servicetest.ConfiguredCluster(c.t, conf)
	}
	for _, v := range c.validators() {
		b := edit(c.file(v.Number), url, c.url, fmt.Sprintf("health: 127.0.0.1:%d", 9100+v.Number), "health: 127.0.0.1:0")
		if err := os.WriteFile(c.file(v.Number), b, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	if c.all, err = bus.Connect(bus.ConnectOptions{URL: c.url, NKeyFile: filepath.Join(c.users, "all.nk")}); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(c.all.Close)
}

func (c *consortium) validators() []identity.Validator {
	c.t.Helper()
	reg, err := identity.NewRegistry(&c.district.Genesis)
	if err != nil {
		c.t.Fatal(err)
	}
	return reg.Validators()
}

func (c *consortium) numbers() []uint64 {
	var out []uint64
	for _, v := range c.validators() {
		out = append(out, v.Number)
	}
	return out
}

func (c *consortium) folder(n uint64) string {
	return filepath.Join(c.dir, topic.ValidatorUser(n), "data")
}
func (c *consortium) file(n uint64) string {
	return filepath.Join(c.dir, topic.ValidatorUser(n), "validator.yaml")
}

// start starts validators; kill is kill -9 of them, at once.
func (c *consortium) start(ns ...uint64) {
	c.t.Helper()
	for _, n := range ns {
		c.running[n] = start(c.t, "consensus", "--config", c.file(n))
	}
}

func (c *consortium) kill(ns ...uint64) {
	c.t.Helper()
	for _, n := range ns {
		_ = c.running[n].cmd.Process.Kill() // all first, then wait
	}
	for _, n := range ns {
		c.running[n].kill()
		delete(c.running, n)
	}
}

// inStep waits until validators vote on blocks after height, in starts after
// those given.
func (c *consortium) inStep(within time.Duration, height uint64, since map[uint64]uint64) {
	c.t.Helper()
	for n, counter := range since {
		select {
		case <-c.running[n].done:
			c.t.Fatalf("validator %d ended by itself:\n%s", n, c.running[n].err)
		default:
		}
		defer func() {
			if c.t.Failed() {
				c.t.Logf("validator %d:\n%s", n, c.running[n].err)
			}
		}()
		c.see.until(c.t, fmt.Sprintf("validator %d in step after height %d", n, height), within, func() bool {
			return c.see.counter[n] > counter && c.see.committed[n] > height
		})
	}
}

// starts returns the newest start of validators.
func (c *consortium) starts(ns ...uint64) map[uint64]uint64 {
	out := map[uint64]uint64{}
	for _, n := range ns {
		out[n] = c.see.start(n)
	}
	return out
}

// submit puts one batch with a frame of each device into ACCEPTED, as validation
// would.
func (c *consortium) submit(ctx context.Context) error {
	var b pb.Batch
	for _, d := range c.devices {
		raw := d.next()
		salt := sha256.Sum256(raw)
		b.Records = append(b.Records, &pb.Record{Envelope: raw, Salt: salt[:], ReceivedUnixNano: time.Now().UnixNano()})
	}
	data := wire.EncodeBatch(&b)
	c.sent = append(c.sent, data)
	id := ledger.RequestID(data)
	return c.all.Publish(ctx, topic.Accepted("harbour"), fmt.Sprintf("%x", id[:]), data)
}

// load submits a batch every so often until stop is called.
func (c *consortium) load(every time.Duration) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			if err := c.submit(context.Background()); err != nil {
				c.t.Errorf("load: %v", err)
				return
			}
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	})
	var once sync.Once
	stop = func() { once.Do(func() { close(done); wg.Wait() }) }
	c.t.Cleanup(stop)
	return stop
}

// chain returns all blocks of a validator, asked for as anybody may, verified
// from genesis.
func (c *consortium) chain(n uint64) []*decided.Block {
	c.t.Helper()
	chain := decided.NewChain(c.district.GenesisHash, c.validators(), nil)
	var out []*decided.Block
	for {
		req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(chain.Next())})
		if err != nil {
			c.t.Fatal(err)
		}
		b, err := c.all.Request(c.t.Context(), topic.Sync("harbour", n), req)
		if err != nil {
			c.t.Fatal(err)
		}
		var resp pb.SyncResponse
		if err := proto.Unmarshal(b, &resp); err != nil {
			c.t.Fatal(err)
		}
		if len(resp.Blocks) == 0 {
			return out
		}
		for _, m := range resp.Blocks {
			block, err := chain.Take(m, false)
			if err != nil {
				c.t.Fatalf("validator %d: %v", n, err)
			}
			out = append(out, block)
		}
	}
}

// settle waits until all validators have decided everything that was sent, and
// checks that they hold one chain with each batch in it once, every record
// accepted, and that nothing was seen on the way that must not be.
func (c *consortium) settle() []*decided.Block {
	c.t.Helper()
	// After the last batch there is nothing to carry anybody further but fetching.
	want := len(c.sent)
	var first []*decided.Block
	for _, n := range c.numbers() {
		var blocks []*decided.Block
		waitFor(c.t, fmt.Sprintf("all %d batches decided at validator %d", want, n), soon, func() bool {
			blocks = c.chain(n)
			got := 0
			for _, b := range blocks {
				got += len(b.Batches)
			}
			return got >= want
		})
		if first == nil {
			first = blocks
		}
		for i := range min(len(blocks), len(first)) {
			if blocks[i].Header != first[i].Header {
				c.t.Errorf("block %d of validator %d is another than that of validator %d", i+1, n, c.numbers()[0])
			}
		}
	}
	times := map[ledger.Hash]int{}
	refused := 0
	for i, b := range first {
		for _, raw := range b.Batches {
			times[ledger.RequestID(raw)]++
		}
		for _, r := range b.Records {
			if !r.Accepted {
				refused++
			}
		}
		c.see.mu.Lock()
		if have, ok := c.see.blocks[ledger.Height(i+1)]; ok && have != b.Header.Hash() {
			c.t.Errorf("block %d is another than was published", i+1)
		}
		c.see.mu.Unlock()
	}
	for i, b := range c.sent {
		if n := times[ledger.RequestID(b)]; n != 1 {
			c.t.Errorf("batch %d of %d: decided %d times, want once", i, want, n)
		}
	}
	if refused > 0 {
		c.t.Errorf("%d records refused, want none", refused)
	}
	c.see.clean(c.t)
	return first
}

// health asks a validator's own page.
func (c *consortium) health(n uint64) (status int, h validatorHealth) {
	c.t.Helper()
	m := regexp.MustCompile(`url=(http://\S+/healthz)`).FindStringSubmatch(c.running[n].err.String())
	if m == nil {
		return 0, h
	}
	res, err := httpClient.Get(m[1])
	if err != nil {
		return 0, h
	}
	defer func() { _ = res.Body.Close() }()
	if err := json.NewDecoder(res.Body).Decode(&h); err != nil {
		c.t.Fatal(err)
	}
	return res.StatusCode, h
}

// takesPart waits for validators' own word.
func (c *consortium) takesPart(ns ...uint64) {
	c.t.Helper()
	for _, n := range ns {
		waitFor(c.t, fmt.Sprintf("validator %d taking part", n), startWithin, func() bool {
			status, h := c.health(n)
			return status == http.StatusOK && h.TakingPart && h.Connected && h.Validator == n
		})
	}
}

// refusedByServer wants no word of the NATS server against a process.
func refusedByServer(t testing.TB, ps ...*process) {
	t.Helper()
	for _, p := range ps {
		for line := range strings.Lines(p.err.String()) {
			if strings.Contains(strings.ToLower(line), "permissions violation") {
				t.Errorf("%s: %s", p.name, line)
			}
		}
	}
}

// Four processes with four NATS users behave as four validators in one process.
func TestValidatorsAsProcesses(t *testing.T) {
	processTest(t)
	c := newConsortium(t)
	c.start(c.numbers()...)
	c.takesPart(c.numbers()...)
	stop := c.load(20 * time.Millisecond)
	c.see.until(t, "so many blocks", soon, func() bool { return len(c.see.blocks) >= 20 })

	// A second process on the same folder is turned away and harms nobody.
	wantExit(t, stopline(t, "consensus", "--config", c.file(2)), exitFailed, "another validator runs in this folder")

	// SIGTERM ends one cleanly; without it health says nothing, the others go on.
	if err := c.running[3].cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := c.running[3].exit(endWithin); code != exitOK {
		t.Errorf("exit %d, want 0:\n%s", code, c.running[3].err)
	}
	top := c.see.top()
	c.see.until(t, "blocks without the third", soon, func() bool { return c.see.decided[1] > top+5 })
	since := c.starts(3)
	c.start(3)
	c.takesPart(3)
	c.inStep(soon, c.see.top(), since)
	stop()
	blocks := c.settle()
	for _, p := range c.running {
		refusedByServer(t, p)
	}
	_, h := c.health(1)
	if h.Height < ledger.Height(len(blocks)) || h.Leader == 0 || h.Counts["sent"] == 0 || h.Counts["records"] != uint64(4*len(c.sent)) {
		t.Errorf("health: got %+v for %d blocks with %d records", h, len(blocks), 4*len(c.sent))
	}
	t.Logf("%d blocks, %d records, %d messages between validators", len(blocks), 4*len(c.sent), c.see.parcels)
}

// They do on a cluster of three NATS servers, and go on when one of these ends.
func TestValidatorsOnACluster(t *testing.T) {
	processTest(t)
	c := newConsortiumOn(t, 3)
	c.start(c.numbers()...)
	c.takesPart(c.numbers()...)
	stop := c.load(50 * time.Millisecond)
	c.see.until(t, "so many blocks", soon, func() bool { return len(c.see.blocks) >= 20 })
	c.stopServer(2)
	top := c.see.top()
	for _, n := range c.numbers() {
		c.see.until(t, fmt.Sprintf("blocks at validator %d without one server", n), soon, func() bool { return c.see.decided[n] > top+20 })
	}
	stop()
	blocks := c.settle()
	for _, p := range c.running {
		refusedByServer(t, p)
	}
	t.Logf("%d blocks, %d batches", len(blocks), len(c.sent))
}

// seeded returns a source of chance that the environment can set, so that what
// happened can happen again.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("STOPLINE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("STOPLINE_SEED: %v", err)
		}
	}
	t.Logf("STOPLINE_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// kill -9 of any validator at any moment, under load: now and then again while it
// starts, now and then all at once. There are never two votes in one slot nor
// two blocks at one height, no block that a validator had is lost, and each time
// it is back in step soon.
func TestValidatorsSurviveKills(t *testing.T) {
	processTest(t)
	kills := 40
	if s := os.Getenv("STOPLINE_KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil {
			t.Fatalf("STOPLINE_KILLS: %v", err)
		}
	}
	rng := seeded(t)
	c := newConsortium(t)
	all := c.numbers()
	c.start(all...)
	c.takesPart(all...)
	stop := c.load(25 * time.Millisecond)
	c.see.until(t, "the first blocks", soon, func() bool { return len(c.see.blocks) >= 5 })

	var one, four []time.Duration
	for done := 0; done < kills; {
		victims := []uint64{all[rng.IntN(len(all))]}
		if rng.IntN(10) == 0 {
			victims = all
		}
		sleep(t, time.Duration(rng.Int64N(int64(150*time.Millisecond))))
		since := c.starts(victims...)
		c.kill(victims...)
		done += len(victims)
		for c.start(victims...); rng.IntN(5) == 0; c.start(victims...) {
			sleep(t, time.Duration(rng.Int64N(int64(400*time.Millisecond)))) // in the middle of starting
			since = c.starts(victims...)
			c.kill(victims...)
			done += len(victims)
		}
		began, top := time.Now(), c.see.top()
		c.inStep(soon, top, since)
		if took := time.Since(began); len(victims) == 1 {
			one = append(one, took)
		} else {
			four = append(four, took)
		}
		c.see.clean(t)
		if t.Failed() {
			return
		}
	}
	stop()
	blocks := c.settle()
	for what, ds := range map[string][]time.Duration{"one": one, "all four": four} {
		if len(ds) == 0 {
			continue
		}
		slices.Sort(ds)
		at := func(p int) time.Duration { return ds[(len(ds)-1)*p/100].Round(time.Millisecond) }
		t.Logf("back in step after kill -9 of %s, %d times: p50 %v, p90 %v, p99 %v, max %v", what, len(ds), at(50), at(90), at(99), at(100))
		if at(100) > backWithin && os.Getenv("STOPLINE_REQUIRE_TIMES") == "1" { // elsewhere the machine may be to blame
			t.Errorf("back in step after %v, want at most %v", at(100), backWithin)
		}
	}
	c.see.mu.Lock()
	defer c.see.mu.Unlock()
	t.Logf("%d kills, %d blocks, %d batches, %d votes seen in %d messages", kills, len(blocks), len(c.sent), len(c.see.votes), c.see.parcels)
}

// sleep is for moments of chance; nothing is waited for with it.
func sleep(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// The eyes of these tests are not blind: four validators that have forgotten how
// they voted vote again, otherwise, and are seen to.
func TestForgetfulValidatorsAreSeen(t *testing.T) {
	processTest(t)
	c := newConsortium(t)
	all := c.numbers()
	c.start(all...)
	c.takesPart(all...)
	stop := c.load(10 * time.Millisecond)
	defer stop()
	const most = 20
	for try := range most {
		// At a moment when somebody has voted on what nobody has decided.
		c.see.until(t, "a vote on an open height", soon, func() bool {
			var top, vote uint64
			for _, n := range all {
				top, vote = max(top, c.see.decided[n]), max(vote, c.see.lastVote[n])
			}
			return vote > top
		})
		c.kill(all...)
		for _, n := range all {
			if err := os.RemoveAll(filepath.Join(c.folder(n), "journal")); err != nil {
				t.Fatal(err)
			}
		}
		top := c.see.top()
		c.start(all...)
		c.takesPart(all...)
		c.see.until(t, "blocks again", soon, func() bool { return c.see.decided[1] > top+1 })
		c.see.mu.Lock()
		doubles := slices.Clone(c.see.doubles)
		c.see.mu.Unlock()
		if len(doubles) > 0 {
			t.Logf("seen at try %d: %s", try+1, doubles[0])
			return
		}
	}
	t.Fatalf("%d times all forgot their votes, and nothing was seen", most)
}

// A copy of a validator's disk from before is found out: by its peers' word it
// knows that it has forgotten votes, and stays silent, also through kill -9,
// until the others have decided without it all that it may have voted on.
func TestARestoredDiskStaysSilent(t *testing.T) {
	processTest(t)
	c := newConsortium(t)
	all := c.numbers()
	const restored = 4
	c.start(all...)
	c.takesPart(all...)
	stop := c.load(20 * time.Millisecond)
	c.see.until(t, "votes of all", soon, func() bool { return c.see.committed[restored] > 5 })
	c.kill(restored)
	old := c.folder(restored) + ".old"
	if err := os.CopyFS(old, os.DirFS(c.folder(restored))); err != nil {
		t.Fatal(err)
	}
	for range 2 { // starts that the copy does not know of
		since := c.starts(restored)
		c.start(restored)
		c.inStep(soon, c.see.top(), since)
		c.kill(restored)
	}
	stop()
	c.settleOthers(restored)
	c.see.mu.Lock()
	last := c.see.lastVote[restored]
	c.see.mu.Unlock()
	if err := os.RemoveAll(c.folder(restored)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(old, c.folder(restored)); err != nil {
		t.Fatal(err)
	}

	// More starts than were made since the copy, so that their count says nothing.
	silent := func() {
		t.Helper()
		c.start(restored)
		waitFor(t, "caught up, and silent", soon, func() bool {
			status, h := c.health(restored)
			return status == http.StatusServiceUnavailable && !h.TakingPart && uint64(h.Height) >= c.see.top() &&
				strings.Contains(c.running[restored].err.String(), "its disk is an old copy")
		})
	}
	for range 4 {
		silent()
		c.kill(restored)
	}
	silent()
	_, h := c.health(1)
	if h.Counts["restored"] == 0 {
		t.Error("its peers have not counted messages from an old start")
	}
	votes := func() (now uint64, any int) {
		c.see.mu.Lock()
		defer c.see.mu.Unlock()
		return c.see.lastVote[restored], c.see.voted[restored]
	}
	if now, any := votes(); now != last || any != 0 {
		t.Errorf("the restored validator votes: on height %d after %d, %d votes in this start", now, last, any)
	}

	// The others decide; then it votes again, above all that it may have forgotten.
	top := c.see.top()
	stop = c.load(20 * time.Millisecond)
	c.inStep(soon, max(top, last), map[uint64]uint64{restored: 0})
	stop()
	c.see.mu.Lock()
	least := uint64(1 << 62)
	for slot, p := range c.see.votes {
		if slot.from == restored && p.counter == c.see.counter[restored] {
			least = min(least, slot.height)
		}
	}
	// What the restored disk lost, it lost; nobody else may.
	lost := c.see.lost
	c.see.lost = nil
	c.see.mu.Unlock()
	if least <= last+1 {
		t.Errorf("its first vote is on height %d, want one above %d: a height above its last vote, %d, was to be decided without it", least, last+1, last)
	}
	if len(lost) == 0 {
		t.Error("the test did not see that blocks were lost with the disk: it would not see it elsewhere")
	}
	for _, l := range lost {
		if !strings.HasPrefix(l, fmt.Sprintf("validator %d ", restored)) {
			t.Error(l)
		}
	}
	c.settle()
}

// settleOthers waits until all validators but one have decided everything sent.
func (c *consortium) settleOthers(but uint64) {
	c.t.Helper()
	for _, n := range c.numbers() {
		if n == but {
			continue
		}
		waitFor(c.t, fmt.Sprintf("all batches decided at validator %d", n), soon, func() bool {
			got := 0
			for _, b := range c.chain(n) {
				got += len(b.Batches)
			}
			return got >= len(c.sent)
		})
	}
}

// A whole district around validators that are processes of their own, every
// service with a NATS user that may do what it must and no more.
func TestDemoWithValidatorsElsewhere(t *testing.T) {
	processTest(t)
	data := filepath.Join(t.TempDir(), "district")
	wantExit(t, stopline(t, "demo", "--for", "5s", "--json", "--listen", "127.0.0.1:0", "--data", data), exitOK)
	// The district has blocks already; its validators begin again from genesis,
	// so everything else does, too.
	keep := filepath.Join(t.TempDir(), "fresh")
	if err := os.Mkdir(keep, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"genesis.json", "policy", "keys"} {
		from := filepath.Join(data, name)
		if s, err := os.Stat(from); err != nil {
			t.Fatal(err)
		} else if s.IsDir() {
			if err := os.CopyFS(filepath.Join(keep, name), os.DirFS(from)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(keep, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d, err := district.Load(keep)
	if err != nil {
		t.Fatal(err)
	}
	c := &consortium{t: t, data: keep, district: d, dir: filepath.Join(t.TempDir(), "consortium"), running: map[uint64]*process{}}
	c.configure(1)
	c.start(c.numbers()...)
	p := start(t, "demo", "--external-validators", "--nats", c.url, "--nats-users", c.users, "--for", "6s", "--json", "--verbose", "--listen", "127.0.0.1:0", "--data", keep)
	if code := p.exit(startWithin + endWithin); code != exitOK {
		t.Fatalf("exit %d:\n%s", code, p.err)
	}
	var r demoReport
	if err := json.Unmarshal([]byte(lastLine(p.out.String())), &r); err != nil {
		t.Fatalf("%v in %s", err, p.out)
	}
	if r.Frames.Accepted == 0 || r.SealedSize != r.LogSize || !r.Evidence.Verified || r.Frames.Quarantined != 0 || r.Rejected != 0 || r.Commands.Applied == 0 {
		t.Errorf("got %s, want frames accepted, all sealed, commands applied, evidence verified", lastLine(p.out.String()))
	}
	c.takesPart(c.numbers()...)
	refusedByServer(t, p)
	for _, v := range c.running {
		refusedByServer(t, v)
	}
	t.Logf("%s", lastLine(p.out.String()))
}
