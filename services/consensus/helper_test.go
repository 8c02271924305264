package consensus

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const harbour = traffic.DistrictID("harbour")

var keys sync.Map // by their names: making one takes as long as signing

// key returns the same key for the same name in every run.
func key(format string, args ...any) ed25519.PrivateKey {
	name := fmt.Sprintf(format, args...)
	if k, ok := keys.Load(name); ok {
		return k.(ed25519.PrivateKey)
	}
	seed := sha256.Sum256([]byte(name))
	k := ed25519.NewKeyFromSeed(seed[:])
	keys.Store(name, k)
	return k
}

func pub(k ed25519.PrivateKey) identity.PublicKey {
	return identity.PublicKey(k.Public().(ed25519.PublicKey))
}

func voteKey(n uint64) ed25519.PrivateKey   { return key("vote %d", n) }
func cosignKey(n uint64) ed25519.PrivateKey { return key("cosign %d", n) }

func junction(id traffic.JunctionID) *traffic.Junction {
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

// genesis holds junction j1 with so many devices d1, d2, …, the official
// registrar, and n validators.
func genesis(t testing.TB, n, devices int) []byte {
	t.Helper()
	g := identity.Genesis{District: harbour, Origin: ledger.Origin(harbour), CreatedUnixMS: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC).UnixMilli()}
	add := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Body: b})
	}
	add(identity.TypeJunction, "j1", junction("j1"))
	for i := 1; i <= devices; i++ {
		add(identity.TypeDevice, fmt.Sprintf("d%d", i), identity.Device{Junction: "j1", Key: pub(key("device d%d", i))})
	}
	add(identity.TypeOfficial, "registrar", identity.Official{Key: pub(key("registrar")), Department: "traffic", Roles: []string{identity.Registrar}})
	for i := uint64(1); i <= uint64(n); i++ {
		add(identity.TypeValidator, fmt.Sprint(i), identity.Validator{Number: i, Department: fmt.Sprintf("department %d", i), VoteKey: pub(voteKey(i)), CosignKey: pub(cosignKey(i))})
	}
	b, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// unit signs frames as a roadside unit does.
type unit struct {
	id   traffic.DeviceID
	key  ed25519.PrivateKey
	seq  uint64
	prev [32]byte
	// unsigned has frames carry something in a signature's place.
	unsigned bool
}

func newUnit(i int) *unit {
	return &unit{id: traffic.DeviceID(fmt.Sprintf("d%d", i)), key: key("device d%d", i)}
}

// frame returns the unit's next frame as a record.
func (u *unit) frame(at time.Time) *pb.Record {
	u.seq++
	p := wire.EncodeFrame(&traffic.Frame{
		District: harbour, Junction: "j1", FrameKey: traffic.FrameKey{Device: u.id, BootEpoch: 1, Seq: u.seq}, Prev: u.prev,
		Time: at.UTC(), Interval: time.Second, Readings: []traffic.Reading{{Detector: "stop", Count: 1, OccupancyPermille: 100, SpeedCMS: 900}},
		Signal: traffic.Signal{State: "Gr", Stage: 0, Mode: traffic.Local},
	})
	u.prev = sha256.Sum256(p)
	if u.unsigned {
		e := identity.Envelope{Kind: identity.KindFrame, ContentType: identity.Protobuf, Key: identity.IDOf(u.key.Public().(ed25519.PublicKey)), Payload: p}
		e.Signature = append(append(e.Signature, u.prev[:]...), u.prev[:]...)
		return record(e)
	}
	return record(identity.Sign(u.key, identity.KindFrame, identity.Protobuf, p))
}

func record(e identity.Envelope) *pb.Record {
	raw := e.Marshal()
	salt := sha256.Sum256(append([]byte("salt"), raw...))
	return &pb.Record{Envelope: raw, Salt: salt[:], ReceivedUnixNano: 1}
}

// change returns a registry record signed by the registrar.
func change(t testing.TB, nonce uint64, action string, typ identity.EntryType, id string, body any) *pb.Record {
	t.Helper()
	c := identity.Change{District: harbour, Action: action, Type: typ, ID: id, Nonce: nonce}
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		c.Body = b
	}
	p, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return record(identity.Sign(key("registrar"), identity.KindRegistry, identity.JSON, p))
}

// changeTo is a change to what an entry was; a nil base says nothing of that.
func changeTo(t testing.TB, nonce uint64, base identity.Digest, typ identity.EntryType, id string, body any) *pb.Record {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	p, err := json.Marshal(identity.Change{District: harbour, Action: identity.Put, Type: typ, ID: id, Nonce: nonce, Base: base, Body: raw})
	if err != nil {
		t.Fatal(err)
	}
	return record(identity.Sign(key("registrar"), identity.KindRegistry, identity.JSON, p))
}

func batch(rs ...*pb.Record) []byte { return wire.EncodeBatch(&pb.Batch{Records: rs}) }

// cluster is a district's validators around one server.
type cluster struct {
	t       testing.TB
	server  *bus.Server
	bus     *bus.Bus // the test's own
	genesis []byte
	dir     string
	timing  Timing
	now     func() time.Time
	tune    func(*Config) // optional: changes a validator's configuration
	nodes   []*node       // by number - 1
	// prepare, where set, is called with each validator before it runs.
	prepare func(n uint64, v *Validator)
}

type node struct {
	v    *Validator
	bus  *bus.Bus
	stop context.CancelFunc
	done chan error
}

func newCluster(t testing.TB, n int) *cluster {
	t.Helper()
	c := &cluster{t: t, server: servicetest.NATS(t), genesis: genesis(t, n, 8), dir: t.TempDir(), nodes: make([]*node, n)}
	c.bus = servicetest.Connect(t, c.server)
	d := Timing{}.withDefaults()
	c.timing = Timing{Heartbeat: d.Heartbeat * slower, Complain: d.Complain * slower, ViewChange: d.ViewChange * slower}
	if err := c.bus.Declare(context.Background(), topic.Streams(harbour)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for i := range c.nodes {
			c.stop(uint64(i + 1))
		}
	})
	return c
}

func (c *cluster) path(n uint64) string { return filepath.Join(c.dir, fmt.Sprint(n)) }

func (c *cluster) config(n uint64, b *bus.Bus) Config {
	cfg := Config{District: harbour, Number: n, VoteKey: voteKey(n), CosignKey: cosignKey(n), Genesis: c.genesis, Dir: c.path(n), Bus: b,
		Now: c.now, Logger: servicetest.Logger(c.t), Timing: c.timing, SnapshotEvery: 5}
	if c.tune != nil {
		c.tune(&cfg)
	}
	return cfg
}

// start starts validators and returns when they take part.
func (c *cluster) start(ns ...uint64) {
	c.t.Helper()
	for _, n := range ns {
		b, err := c.server.Connect(fmt.Sprint("validator ", n))
		if err != nil {
			c.t.Fatal(err)
		}
		v, err := New(c.config(n, b))
		if err != nil {
			c.t.Fatal(err)
		}
		if c.prepare != nil {
			c.prepare(n, v)
		}
		ctx, cancel := context.WithCancel(context.Background())
		nd := &node{v: v, bus: b, stop: cancel, done: make(chan error, 1)}
		c.nodes[n-1] = nd
		go func() { nd.done <- v.Run(ctx) }()
	}
	for _, n := range ns {
		nd := c.nodes[n-1]
		select {
		case <-nd.v.Ready():
		case err := <-nd.done:
			c.t.Fatalf("validator %d ended: %v", n, err)
		case <-time.After(atMost):
			c.t.Fatalf("validator %d does not take part after %v: %+v", n, atMost, nd.v.Stats())
		}
	}
}

func (c *cluster) all() []uint64 {
	out := make([]uint64, len(c.nodes))
	for i := range out {
		out[i] = uint64(i + 1)
	}
	return out
}

// stop ends validators and waits for them.
func (c *cluster) stop(ns ...uint64) {
	c.t.Helper()
	var wg sync.WaitGroup
	for _, n := range ns {
		nd := c.nodes[n-1]
		if nd == nil {
			continue
		}
		c.nodes[n-1] = nil
		nd.stop()
		wg.Go(func() {
			select {
			case err := <-nd.done:
				if err != nil && !errors.Is(err, context.Canceled) {
					c.t.Errorf("validator %d: %v", n, err)
				}
			case <-time.After(atMost):
				c.t.Errorf("validator %d does not stop", n)
			}
			nd.bus.Close()
		})
	}
	wg.Wait()
}

// submit stores a batch in ACCEPTED.
func (c *cluster) submit(b []byte) {
	c.t.Helper()
	id := ledger.RequestID(b)
	if err := c.bus.Publish(context.Background(), topic.Accepted(harbour), fmt.Sprintf("%x", id[:]), b); err != nil {
		c.t.Fatal(err)
	}
}

// atMost is for how long something that is bound to happen is waited for: it
// takes much less, but on a machine that has other things to do.
const atMost = (20 + 10*slower) * time.Second

// eventually waits until f says yes.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	end := time.Now().Add(atMost)
	for !f() {
		if time.Now().After(end) {
			t.Fatalf("did not happen in %v: %s", atMost, what)
		}
		time.Sleep(5 * time.Millisecond) // between looks
	}
}

// decided waits until the validators have decided the batch.
func (c *cluster) decided(b []byte, ns ...uint64) {
	c.t.Helper()
	id := ledger.RequestID(b)
	defer func() {
		if c.t.Failed() {
			for i, nd := range c.nodes {
				if nd != nil {
					c.t.Logf("validator %d: %+v", i+1, nd.v.Stats())
				}
			}
		}
	}()
	eventually(c.t, fmt.Sprintf("batch %x decided at %v", id[:4], ns), func() bool {
		for _, n := range ns {
			nd := c.nodes[n-1]
			select {
			case err := <-nd.done:
				c.t.Fatalf("validator %d ended: %v", n, err)
			default:
			}
			if !nd.v.core.isDecided(id) {
				return false
			}
		}
		return true
	})
}

// blocks asks a validator for all its blocks, as anyone may.
func (c *cluster) blocks(n uint64) []*pb.Block {
	c.t.Helper()
	nd := c.nodes[n-1]
	out, err := nd.v.core.blocks(context.Background(), 1, 1<<20, 1<<30, false)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// check verifies the chain of every running validator from genesis, and that no
// two differ in anything but votes. It returns the longest.
func (c *cluster) check() []*pb.Block {
	c.t.Helper()
	g, err := identity.ParseGenesis(c.genesis)
	if err != nil {
		c.t.Fatal(err)
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		c.t.Fatal(err)
	}
	first := reg.Validators()
	var longest []*pb.Block
	for i, nd := range c.nodes {
		if nd == nil {
			continue
		}
		var parent *ledger.Header
		tree := &ledger.Frontier{}
		validators := first
		if nd.v.core.store.first() > 1 {
			continue // see below
		}
		bs := c.blocks(uint64(i + 1))
		for h, m := range bs {
			b, err := wire.BlockFromProto(m)
			if err != nil {
				c.t.Fatalf("validator %d: %v", i+1, err)
			}
			if err := b.Check(sha256.Sum256(c.genesis), parent, tree, validators); err != nil {
				c.t.Fatalf("validator %d: %v", i+1, err)
			}
			parent = &b.Header
			validators = after(c.t, validators, m)
			if h < len(longest) && (!bytes.Equal(m.Header, longest[h].Header) || !bytes.Equal(m.Verdicts, longest[h].Verdicts)) {
				c.t.Fatalf("validator %d: block %d differs from another validator's", i+1, h+1)
			}
		}
		if len(bs) > len(longest) {
			longest = bs
		}
	}
	// Who began with a snapshot holds the same from there on.
	for i, nd := range c.nodes {
		if nd == nil || nd.v.core.store.first() == 1 {
			continue
		}
		st := nd.v.core.store
		for h := st.first(); h <= st.height() && int(h) <= len(longest); h++ {
			m, err := st.headed(h)
			if err != nil {
				c.t.Fatal(err)
			}
			if want := longest[h-1]; !bytes.Equal(m.Header, want.Header) || !bytes.Equal(m.Verdicts, want.Verdicts) || !bytes.Equal(m.Leaves, want.Leaves) {
				c.t.Fatalf("validator %d: block %d differs from another validator's", i+1, h)
			}
		}
	}
	return longest
}

// after returns the validators that decide what follows a block.
func after(t testing.TB, validators []identity.Validator, m *pb.Block) []identity.Validator {
	t.Helper()
	i := 0
	for _, raw := range m.Batches {
		b, err := wire.DecodeBatch(raw)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range b.Records {
			c := wire.Candidate(r.Envelope, r.Salt)
			if ledger.Verdicts(m.Verdicts).Accepted(i) && c.Change != nil && c.Change.Type == identity.TypeValidator {
				if validators, err = identity.ChangeMembers(validators, *c.Change); err != nil {
					t.Fatal(err)
				}
			}
			i++
		}
	}
	return validators
}

// where finds a batch: how often it was decided, and the verdicts on its
// records, from the last time.
func where(t testing.TB, blocks []*pb.Block, b []byte) (times int, height uint64, verdicts string) {
	t.Helper()
	for _, m := range blocks {
		i := 0
		for _, have := range m.Batches {
			pbm, err := wire.DecodeBatch(have)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(have, b) {
				times++
				h, err := ledger.ParseHeader(m.Header)
				if err != nil {
					t.Fatal(err)
				}
				height = uint64(h.Height)
				var s strings.Builder
				for k := range pbm.Records {
					if ledger.Verdicts(m.Verdicts).Accepted(i + k) {
						s.WriteByte('1')
					} else {
						s.WriteByte('0')
					}
				}
				verdicts = s.String()
			}
			i += len(pbm.Records)
		}
	}
	return times, height, verdicts
}
