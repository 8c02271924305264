package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// world is a gateway that is given blocks and seals by the test, without a
// network.
type world struct {
	t *testing.T
	*Gateway
	*ledgertest.Chain
	verified *decided.Chain
	clock    atomic.Int64
}

func newWorld(t *testing.T) *world { return newWorldOn(t, &bus.Bus{}) }

func newWorldOn(t *testing.T, b *bus.Bus) *world {
	t.Helper()
	d := ledgertest.New("gateway", 4)
	w := &world{t: t, Chain: d.NewChain(), verified: decided.NewChain(d.GenesisHash, d.Validators, nil)}
	w.clock.Store(ledgertest.Start.UnixNano())
	state, err := agreed.Open("", &d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	w.Gateway, err = New(Config{Bus: b, District: d.ID, State: state, Now: w.now, Logger: servicetest.Logger(t),
		Follow: decided.Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators, GapWait: 10 * time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) now() time.Time          { return time.Unix(0, w.clock.Load()).UTC() }
func (w *world) advance(d time.Duration) { w.clock.Add(int64(d)) }

// show gives the gateway the next block, as a follower would.
func (w *world) show(batches ...[]ledgertest.Record) *ledgertest.Block {
	w.t.Helper()
	b := w.Decide(batches...)
	w.give(b)
	return b
}

func (w *world) give(b *ledgertest.Block) {
	w.t.Helper()
	d, err := w.verified.Take(wire.BlockToProto(&b.Block, b.Batches, b.Verdicts), false)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.block(w.t.Context(), d, w.Judged[b.Header.Height-1]); err != nil {
		w.t.Fatal(err)
	}
}

// announce returns the message that says that the log is sealed up to b.
func (w *world) announce(b *ledgertest.Block) *pb.Seal {
	return &pb.Seal{Height: uint64(b.Header.Height), Size: b.Header.Size, Checkpoint: w.Chain.Seal(b), SealedUnixNano: w.clock.Load()}
}

func (w *world) sealed(b *ledgertest.Block) { w.seal(encode(w.t, w.announce(b))) }

func encode(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// junction returns the view of J1.
func (w *world) junction() JunctionView {
	w.t.Helper()
	for _, j := range w.View().Junctions {
		if j.ID == "J1" {
			return j
		}
	}
	w.t.Fatal("the view has no J1")
	return JunctionView{}
}

// frame signs a frame that says what f says; what it needs beside is filled in.
func (w *world) frame(f traffic.Frame) ledgertest.Record {
	f.District, f.BootEpoch = w.ID, 1
	if f.Junction == "" {
		f.Junction = ledgertest.Junction
	}
	if f.Device == "" {
		f.Device = ledgertest.Device
	}
	if f.Time.IsZero() {
		f.Time = w.now()
	}
	return ledgertest.NewRecord(w.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f))
}

func seq(n uint64) traffic.FrameKey { return traffic.FrameKey{Seq: n} }

func records(rs ...ledgertest.Record) []ledgertest.Record { return rs }

// TestView: everything in a block is counted once, refused records only as such.
func TestView(t *testing.T) {
	w := newWorld(t)
	if v := w.View(); len(v.Junctions) != 1 || v.Junctions[0].Signal.Stage != -1 || v.District != "harbour" || w.Height() != 0 {
		t.Errorf("before any block: got %+v, want J1 at no stage", v)
	}
	w.advance(10 * time.Second)
	refused := w.frame(traffic.Frame{FrameKey: seq(9), Readings: make([]traffic.Reading, 5)})
	refused.Refused = true
	strange := ledgertest.NewRecord(w.DeviceKey, identity.KindFrame, identity.Protobuf, []byte("\xff\xff"))
	w.show(records(
		w.frame(traffic.Frame{FrameKey: seq(1), Interval: time.Second, Readings: []traffic.Reading{{Detector: "D1"}, {Detector: "D1"}},
			Signal:  traffic.Signal{State: "G", Stage: 1, Mode: traffic.Coordinated},
			Results: []traffic.CommandResult{{Seq: 1, Applied: true}, {Seq: 2, Reason: "seq"}, {Seq: 3, Applied: true}}}),
		refused, strange,
	), records(w.Command(1, 1, w.now()), w.Change(identity.Change{Action: "put", Type: identity.TypeSoftware, ID: "v1", Body: []byte("{}"), Nonce: 1})))
	v := w.View()
	if got, want := v.Counts, (Counts{Frames: 1, Readings: 2, Commands: 1, Applied: 2, Refused: 1, Blocks: 1, Rejected: 1}); got != want {
		t.Errorf("got counts %+v, want %+v", got, want)
	}
	j := w.junction()
	if j.Stage != "A" || j.Signal.Mode != traffic.Coordinated || j.Name != "Quay Street" || !slices.Equal(j.Groups, []string{"A"}) ||
		j.Frame.String() != "rsu-J1/1/1" || !j.At.Equal(w.now()) || j.Rule != "extend green: vehicle present" || j.Evidence != 0 {
		t.Errorf("got %+v, want stage A of Quay Street by frame 1, without evidence yet", j)
	}
	b := v.Blocks[0]
	if b.Height != 1 || b.Records != 4 || b.Size != 5 || !slices.Equal(b.Votes, []uint64{1, 2, 3, 4}) || b.Root != fmt.Sprintf("%x", w.Blocks[0].Header.Root[:8]) {
		t.Errorf("got block %+v, want the first, of 4 records", b)
	}
	if k, ok := w.Newest(ledgertest.Device); !ok || k.Seq != 1 {
		t.Errorf("newest: got %v, %v, want 1", k, ok)
	}
	if _, ok := w.Newest("nobody"); ok {
		t.Error("newest: got a frame of nobody")
	}
	// Between stages, and at stages that the junction has not.
	for i, stage := range []int{-1, 2, 0} {
		w.advance(time.Second)
		w.show(records(w.frame(traffic.Frame{FrameKey: seq(uint64(i) + 2), Signal: traffic.Signal{Stage: stage}})))
		if got, want := w.junction().Stage, []string{"", "", "all red"}[i]; got != want {
			t.Errorf("stage %d: got %q, want %q", stage, got, want)
		}
	}
	for range 2 * keepBlocks {
		w.show()
	}
	v = w.View()
	if n := len(v.Blocks); n != keepBlocks || v.Blocks[n-1].Height != 4+2*keepBlocks || w.Height() != 4+2*keepBlocks {
		t.Errorf("got %d blocks up to %d, want the newest %d", n, v.Blocks[n-1].Height, keepBlocks)
	}
}

// TestNewerFramesStay: an older frame counts, and changes nothing that is shown.
func TestNewerFramesStay(t *testing.T) {
	w := newWorld(t)
	w.advance(time.Minute)
	at := w.now()
	show := func(n uint64, at time.Time, f traffic.Frame) {
		t.Helper()
		f.FrameKey, f.Time = seq(n), at
		w.show(records(w.frame(f)))
	}
	show(1, at, traffic.Frame{Signal: traffic.Signal{State: "G", Stage: 1, Mode: traffic.Coordinated}})
	show(2, at.Add(-time.Millisecond), traffic.Frame{Signal: traffic.Signal{State: "r", Stage: 0, Mode: traffic.Tripped, Trip: "old"}})
	if j := w.junction(); j.Stage != "A" || j.Signal.Mode != traffic.Coordinated || !j.At.Equal(at) || j.Frame.Seq != 1 {
		t.Errorf("got %+v, want frame 1 to stay", j)
	}
	if c := w.View().Counts; c.Frames != 2 || c.Trips != 0 {
		t.Errorf("got %+v, want two frames, no trip", c)
	}
	show(3, at, traffic.Frame{Signal: traffic.Signal{State: "r", Stage: 0, Mode: traffic.Local}})
	if j := w.junction(); j.Frame.Seq != 3 || j.Signal.Mode != traffic.Local {
		t.Errorf("got %+v, want the later of two frames with one time", j)
	}
	// A frame of a junction that is not in the registry is counted and shown nowhere.
	w.show(records(w.frame(traffic.Frame{FrameKey: seq(4), Junction: "nowhere"})))
	if v := w.View(); v.Counts.Frames != 4 || len(v.Junctions) != 1 {
		t.Errorf("got %d frames, %d junctions, want 4 and 1", v.Counts.Frames, len(v.Junctions))
	}
}

// TestTrips: a trip is counted when it comes, however many frames show it.
func TestTrips(t *testing.T) {
	w := newWorld(t)
	for i, tc := range []struct {
		mode  traffic.Mode
		trips uint64
	}{
		{traffic.Coordinated, 0}, {traffic.Tripped, 1}, {traffic.Tripped, 1}, {traffic.Tripped, 1}, {traffic.Local, 1},
		{traffic.Coordinated, 1}, {traffic.Tripped, 2}, {traffic.Tripped, 2},
	} {
		w.advance(time.Second)
		f := traffic.Frame{FrameKey: seq(uint64(i) + 1), Signal: traffic.Signal{Mode: tc.mode}}
		if i%2 == 0 {
			f.Interval = time.Second // else sent at an event
		}
		w.show(records(w.frame(f)))
		if got := w.View().Counts.Trips; got != tc.trips {
			t.Errorf("frame %d, %s: got %d trips, want %d", i+1, tc.mode, got, tc.trips)
		}
	}
}

func TestQueues(t *testing.T) {
	j := &traffic.Junction{Detectors: []traffic.Detector{{ID: "a1", Kind: traffic.Area}, {ID: "a2", Kind: traffic.Area},
		{ID: "o", Kind: traffic.Oracle}, {ID: "s", Kind: traffic.StopLine}, {ID: "x", Kind: traffic.ExitArea}}}
	r := func(id traffic.DetectorID, vehicles, halted uint32) traffic.Reading {
		return traffic.Reading{Detector: id, Vehicles: vehicles, Halted: halted}
	}
	for _, tc := range []struct {
		name             string
		readings         []traffic.Reading
		vehicles, halted uint32
	}{
		{"nothing", nil, 0, 0},
		{"areas are added", []traffic.Reading{r("a1", 3, 1), r("a2", 4, 2), r("s", 9, 9), r("x", 9, 9), r("?", 9, 9)}, 7, 3},
		{"an oracle does not count twice", []traffic.Reading{r("a1", 3, 1), r("o", 5, 5)}, 3, 1},
		{"an oracle alone", []traffic.Reading{r("o", 5, 4), r("s", 1, 1)}, 5, 4},
		{"empty areas are empty, whatever an oracle says", []traffic.Reading{r("a1", 0, 0), r("o", 5, 5)}, 0, 0},
	} {
		if v, h := queues(j, &traffic.Frame{Readings: tc.readings}); v != tc.vehicles || h != tc.halted {
			t.Errorf("%s: got %d, %d halted, want %d, %d", tc.name, v, h, tc.vehicles, tc.halted)
		}
	}
}

// TestEvidence: there is a link once a seal covers the block after the command's,
// also while every block brings another command.
func TestEvidence(t *testing.T) {
	w := newWorld(t)
	var blocks []*ledgertest.Block
	command := func(n uint64) *ledgertest.Block {
		w.advance(time.Second)
		b := w.Decide(records(w.Command(n, n, w.now())))
		blocks = append(blocks, b)
		return b
	}
	check := func(what string, block int) {
		t.Helper()
		want := uint64(0)
		if block > 0 {
			want = blocks[block-1].Header.PrevSize + 1
		}
		if got := w.junction().Evidence; got != want {
			t.Errorf("%s: got evidence for leaf %d, want %d, of block %d", what, got, want, block)
		}
	}
	w.give(command(1))
	check("unsealed", 0)
	w.sealed(blocks[0])
	check("its own block sealed", 0)
	// From here each seal comes when the next block is there already.
	w.give(command(2))
	check("the next block is not sealed", 0)
	w.give(command(3))
	w.sealed(blocks[1])
	check("block 2 sealed", 1)
	w.give(command(4))
	w.sealed(blocks[2])
	check("block 3 sealed", 2)
	w.sealed(blocks[1])
	check("an old seal again", 2)
	if got := w.View().Sealed; got.Height != 3 || got.Size != blocks[2].Header.Size {
		t.Errorf("an old seal again: got sealed %+v, want block 3's to stay", got)
	}
	// One seal for several blocks.
	w.give(command(5))
	w.give(command(6))
	w.sealed(blocks[5])
	check("block 6 sealed", 5)
	// The seal is quicker than the blocks.
	command(7)
	command(8)
	w.sealed(blocks[7])
	check("blocks to come are sealed", 6)
	w.give(blocks[6])
	check("block 7 comes after its seal", 7)
	w.give(blocks[7])
	check("block 8 comes after its seal", 7)
	// Sealing stands still for longer than anything is kept.
	for n := range uint64(keepProofs + 20) {
		w.give(command(9 + n))
	}
	if got := len(w.junctions["J1"].proofs); got != keepProofs {
		t.Errorf("got %d commands kept, want %d", got, keepProofs)
	}
	check("sealing stands still", 7)
	w.sealed(blocks[len(blocks)-1])
	check("sealing is back", len(blocks)-1)
	// What is linked can be had: a bundle of it verifies.
	bundle := w.Bundle(w.junction().Evidence)
	policy, err := ledger.ParsePolicy(w.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if report, err := ledger.VerifyBundle(bundle.Marshal(), policy); err != nil || report.Outcome != ledger.Pass {
		t.Errorf("the evidence: got %v, %v, want pass", report.Outcome, err)
	}
}

// TestSealRefused: nothing is taken for sealed that a quorum of validators has
// not cosigned.
func TestSealRefused(t *testing.T) {
	w := newWorld(t)
	w.show(records(w.Command(1, 1, w.now())))
	b := w.show()
	other := ledgertest.New("others", 4).NewChain().Fill(2).Blocks[1]
	line := w.Cosignature(0, b.Header.Checkpoint(w.Origin).Body(), w.now())
	with := func(cp ledger.Checkpoint, lines ...string) func(*pb.Seal) {
		return func(s *pb.Seal) {
			raw, err := ledger.Seal(cp, w.LogSigner(), lines)
			if err != nil {
				t.Fatal(err)
			}
			s.Checkpoint = raw
		}
	}
	elsewhere := b.Header.Checkpoint("elsewhere.example/log")
	var foreign []string
	for i := range 4 {
		foreign = append(foreign, w.Cosignature(i, elsewhere.Body(), w.now()))
	}
	for _, tc := range []struct {
		name  string
		spoil func(s *pb.Seal)
	}{
		{"no checkpoint", func(s *pb.Seal) { s.Checkpoint = nil }},
		{"junk", func(s *pb.Seal) { s.Checkpoint = []byte("junk") }},
		{"huge", func(s *pb.Seal) { s.Checkpoint = append(s.Checkpoint, make([]byte, ledger.MaxNote)...) }},
		{"announced as larger", func(s *pb.Seal) { s.Size = 1 << 60 }},
		{"changed", func(s *pb.Seal) { s.Checkpoint[len(w.Origin)+1]++ }},
		{"signed by the log alone", with(b.Header.Checkpoint(w.Origin))},
		{"one validator three times", with(b.Header.Checkpoint(w.Origin), line, line, line)},
		{"two validators", func(s *pb.Seal) {
			w.Voters = []int{1, 3}
			s.Checkpoint = w.Chain.Seal(b)
			w.Voters = []int{0, 1, 2, 3}
		}},
		{"another log", with(elsewhere, foreign...)},
		{"another district's validators", func(s *pb.Seal) {
			s.Checkpoint, s.Size = ledgertest.New("others", 4).NewChain().Fill(2).Seal(other), other.Header.Size
		}},
	} {
		s := w.announce(b)
		tc.spoil(s)
		w.seal(encode(t, s))
		if v := w.View(); v.Sealed.Size != 0 || v.Junctions[0].Evidence != 0 {
			t.Fatalf("%s: taken for sealed at %d", tc.name, v.Sealed.Size)
		}
	}
	w.seal([]byte("\xff\xff"))
	// The true one among them is taken; a quorum is enough.
	w.Voters = []int{0, 2, 3}
	w.sealed(b)
	if v := w.View(); v.Sealed.Size != b.Header.Size || v.Sealed.Height != 2 || !v.Sealed.Time.Equal(w.now()) || v.Junctions[0].Evidence == 0 {
		t.Errorf("got sealed %+v, want size %d", v.Sealed, b.Header.Size)
	}
}

// TestLatencies from readings to blocks and seals; history is left out.
func TestLatencies(t *testing.T) {
	w := newWorld(t)
	old := w.now()
	w.advance(time.Minute)
	at := w.now()
	var rs []ledgertest.Record
	for i := range 100 {
		rs = append(rs, w.frame(traffic.Frame{FrameKey: seq(uint64(i) + 1), Time: at.Add(-time.Duration(100-i) * time.Millisecond), Interval: time.Second}))
	}
	first := w.show(rs, records(w.frame(traffic.Frame{FrameKey: seq(101), Time: old, Interval: time.Second})))
	if got, want := w.View().LatencyMS, (Latency{AgreedP50: 50, AgreedP99: 99}); got != want {
		t.Errorf("agreed: got %+v, want %+v", got, want)
	}
	if got := w.Unsealed(); got != 100 {
		t.Errorf("got %d unsealed, want 100", got)
	}
	if got := w.Undecided(); got != 1 {
		t.Errorf("got %d undecided, want 1", got)
	}
	w.advance(time.Second)
	w.sealed(first)
	if got, want := w.View().LatencyMS, (Latency{AgreedP50: 50, AgreedP99: 99, SealedP50: 1050, SealedP99: 1099}); got != want {
		t.Errorf("sealed: got %+v, want %+v", got, want)
	}
	// A frame whose seal came first is not waited for.
	late := w.Decide(records(w.frame(traffic.Frame{FrameKey: seq(102)})))
	w.sealed(late)
	w.give(late)
	if got := w.Unsealed(); got != 0 {
		t.Errorf("the seal came first: got %d unsealed, want 0", got)
	}
}

// TestUndecided: a frame is decided by the command that rests on it, no other.
func TestUndecided(t *testing.T) {
	w := newWorld(t)
	command := func(n, rests uint64) ledgertest.Record {
		return ledgertest.NewRecord(w.ControlKey, identity.KindCommand, identity.Protobuf, wire.EncodeCommand(&traffic.Command{
			District: w.ID, Junction: "J1", Seq: n, RestsOn: traffic.FrameKey{Device: ledgertest.Device, BootEpoch: 1, Seq: rests}}))
	}
	for i, tc := range []struct {
		record ledgertest.Record
		want   int
	}{
		{w.frame(traffic.Frame{FrameKey: seq(1), Time: w.now().Add(1)}), 0}, // at an event
		{w.frame(traffic.Frame{FrameKey: seq(2), Time: w.now().Add(2), Interval: time.Second}), 1},
		{command(1, 1), 1},
		{w.frame(traffic.Frame{FrameKey: seq(3), Time: w.now().Add(3), Interval: time.Second}), 1},
		{command(2, 2), 1},
		{command(3, 3), 0},
		{command(4, 3), 0},
	} {
		w.show(records(tc.record))
		if got := w.Undecided(); got != tc.want {
			t.Errorf("record %d: got %d undecided, want %d", i+1, got, tc.want)
		}
	}
}

// TestQuantile against the definition, said otherwise: the smallest sample that
// at least p % of all do not exceed.
func TestQuantile(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 250 {
		s := make([]float64, n)
		for i := range s {
			s[i] = float64(r.IntN(1000))
		}
		slices.Sort(s)
		for _, p := range []int{0, 1, 50, 99, 100} {
			want := 0.0
			for i, v := range s {
				if want = v; (i+1)*100 >= p*n {
					break
				}
			}
			if got := quantile(s, p); got != want {
				t.Fatalf("%d samples, %d %%: got %v, want %v", n, p, got, want)
			}
		}
	}
	var l latencies
	for i := range keepLatencies + 10 {
		l.add(time.Duration(i) * time.Millisecond)
	}
	if len(l.ms) != keepLatencies || slices.Min(l.ms) != 10 || slices.Max(l.ms) != keepLatencies+9 {
		t.Errorf("got %d samples from %v to %v, want the newest %d", len(l.ms), slices.Min(l.ms), slices.Max(l.ms), keepLatencies)
	}
}

// TestDefinitions: a junction that is filed is shown from the next block on, with
// what that block says of it, and a definition that is replaced with its new text.
func TestDefinitions(t *testing.T) {
	w := newWorld(t)
	def, ok := w.Registry.Junction(ledgertest.Junction)
	if !ok {
		t.Fatal("no J1")
	}
	file := func(nonce uint64, id traffic.JunctionID, name, group string) ledgertest.Record {
		j := *def
		j.ID, j.Name, j.LatE6 = id, name, 1
		j.Groups = slices.Clone(j.Groups)
		j.Groups[0].Name = group
		body, err := json.Marshal(&j)
		if err != nil {
			t.Fatal(err)
		}
		return w.Change(identity.Change{Action: "put", Type: identity.TypeJunction, ID: string(id), Body: body, Nonce: nonce})
	}
	before := w.junction()
	w.show(records(file(1, "J0", "New Street", "N"), file(2, "J1", "Quay Lane", "B")))
	if got := len(w.Blocks[0].Records); got != 2 || w.Blocks[0].Records[0].Refused || w.Blocks[0].Records[1].Refused {
		t.Fatal("the test's changes were refused")
	}
	w.advance(time.Second)
	w.show(records(w.frame(traffic.Frame{FrameKey: seq(1), Junction: "J0", Signal: traffic.Signal{Stage: 1}})))
	v := w.View()
	if len(v.Junctions) != 2 || v.Junctions[0].Name != "New Street" || v.Junctions[0].Stage != "A" {
		t.Errorf("got %+v, want New Street at stage A, first", v.Junctions)
	}
	if j := w.junction(); j.Name != "Quay Lane" || j.LatE6 != 1 || !slices.Equal(j.Groups, []string{"B"}) {
		t.Errorf("got %+v, want Quay Lane with group B", j)
	}
	if !slices.Equal(before.Groups, []string{"A"}) {
		t.Errorf("a view that was handed out has changed: %v", before.Groups)
	}
}

func get(t *testing.T, h http.Handler, method, path string) *http.Response {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(method, path, nil))
	return rec.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestHandler(t *testing.T) {
	w := newWorld(t)
	w.advance(time.Second)
	w.show(records(w.frame(traffic.Frame{FrameKey: seq(1), Interval: time.Second}), w.Command(1, 1, w.now())))
	h := w.Handler()
	for _, tc := range []struct {
		path, kind, want string
	}{
		{"/", "text/html; charset=utf-8", "<!doctype html>"},
		{"/live.js", "text/javascript; charset=utf-8", "EventSource(\"/v1/live\")"},
		{"/v1/state", "application/json", `"frames":1,`},
		{"/v1/registry/junction/J1", "application/json", "Quay Street"},
		{"/v1/registry/device/rsu-J1", "application/json", `"status":"active"`},
	} {
		r := get(t, h, "GET", tc.path)
		if got := body(t, r); r.StatusCode != 200 || r.Header.Get("Content-Type") != tc.kind || !strings.Contains(got, tc.want) {
			t.Errorf("%s: got %d %s\n%.300s\nwant 200 %s with %q", tc.path, r.StatusCode, r.Header.Get("Content-Type"), got, tc.kind, tc.want)
		}
	}
	// The page's own links stay on the page or go to other services' paths.
	page := body(t, get(t, h, "GET", "/"))
	for _, link := range []string{`src="/live.js"`, `href="/log/checkpoint"`, `href="/v1/policy"`} {
		if !strings.Contains(page, link) {
			t.Errorf("the page has no %s", link)
		}
	}
	if strings.Contains(page, "//") && strings.Contains(page, "http") {
		t.Error("the page fetches from elsewhere")
	}
	for _, path := range []string{"/v1/registry/device/nobody", "/v1/registry/junction/" + strings.Repeat("x", 5000), "/v1/registry/nothing/J1",
		"/v1/registry/device/rsu-J1%00", "/v1/registry/device/%22%3Cscript%3E%0A", "/v1/registry/device%00rsu-J1/x"} {
		r := get(t, h, "GET", path)
		var problem struct {
			Title  string
			Status int
			Detail string
		}
		if err := json.Unmarshal([]byte(body(t, r)), &problem); err != nil {
			t.Errorf("%.60s: %v", path, err)
		}
		if r.StatusCode != 404 || r.Header.Get("Content-Type") != "application/problem+json" || problem.Status != 404 || problem.Title == "" ||
			!strings.Contains(problem.Detail, "the registry has no") || len(problem.Detail) > 400 {
			t.Errorf("%.60s: got %d %s %+v, want 404 as problem+json", path, r.StatusCode, r.Header.Get("Content-Type"), problem)
		}
	}
	for path, want := range map[string]int{"/nothing": 404, "/../gateway.go": 404, "/page/index.html": 404, "/v1/registry/junction": 404} {
		if r := get(t, h, "GET", path); r.StatusCode != want && r.StatusCode/100 != 3 {
			t.Errorf("%s: got %d, want %d", path, r.StatusCode, want)
		}
	}
	if r := get(t, h, "POST", "/v1/state"); r.StatusCode != 405 {
		t.Errorf("POST: got %d, want 405", r.StatusCode)
	}
	if r := get(t, h, "GET", "/debug/pprof/"); r.StatusCode != 404 {
		t.Errorf("pprof: got %d, want 404", r.StatusCode)
	}
}

// TestLive: a new view comes when something changed, and the handler ends when
// its client has gone.
func TestLive(t *testing.T) {
	w := newWorld(t)
	ended := make(chan struct{})
	h := w.Handler()
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		defer close(ended)
		h.ServeHTTP(rw, r)
	}))
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", server.URL+"/v1/live", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("got content type %q, want text/event-stream", got)
	}
	lines := bufio.NewReader(resp.Body)
	next := func() View {
		t.Helper()
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		empty, err := lines.ReadString('\n')
		if err != nil || empty != "\n" {
			t.Fatalf("got %q, %v, want an empty line after the data", empty, err)
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			t.Fatalf("got %.40q, want data", line)
		}
		var v View
		if err := json.Unmarshal([]byte(data), &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := next(); v.Counts.Blocks != 0 || v.District != "harbour" {
		t.Errorf("first: got %+v, want a view without blocks", v)
	}
	// Two changes while nothing may be sent are one view.
	w.show(records(w.Command(1, 1, w.now())))
	w.show()
	if v := next(); v.Counts.Blocks != 2 {
		t.Errorf("after two blocks: got %d blocks, want 2", v.Counts.Blocks)
	}
	w.sealed(w.Blocks[1])
	if v := next(); v.Sealed.Size != w.Blocks[1].Header.Size || v.Junctions[0].Evidence == 0 {
		t.Errorf("after the seal: got %+v, want it shown", v.Sealed)
	}
	select {
	case <-ended:
		t.Error("the stream ended by itself")
	default:
	}
	// By now it waits for a change that never comes. Were it slower it would have
	// to end all the same.
	time.Sleep(2 * liveEvery)
	cancel()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the handler is still there after its client has gone")
	}
}

// wait polls for what other goroutines do.
func wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// TestRun over real NATS: blocks, seals, and what was refused by its rule. A
// message that cannot be decoded goes to the dead letters and stops no other.
func TestRun(t *testing.T) {
	b := servicetest.District(t, "harbour")
	w := newWorldOn(t, b)
	type letter struct {
		data   []byte
		header nats.Header
	}
	dead := make(chan letter, 16)
	stop, err := b.Listen(topic.Dead(w.ID, "gateway"), "", func(m *nats.Msg) { dead <- letter{m.Data, m.Header} })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	publish := func(subject string, data []byte) {
		t.Helper()
		if err := b.Publish(t.Context(), subject, "", data); err != nil {
			t.Fatal(err)
		}
	}
	quarantine := func(rule, reason string) {
		t.Helper()
		publish(topic.Quarantine(w.ID, rule), wire.EncodeQuarantined(&pb.Quarantined{Envelope: []byte("e"), Salt: make([]byte, 32), Rule: rule, Reason: reason}))
	}
	// What was refused before the gateway's first start is shown too.
	quarantine("signature", "not by key 1")
	junk := []byte("\xff\xff junk")
	publish(topic.Quarantine(w.ID, "size"), junk)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	wait(t, "the first refusal", func() bool { return w.View().Quarantine["signature"] == 1 })
	select {
	case l := <-dead:
		if string(l.data) != string(junk) || l.header.Get(bus.HeaderDeadReason) == "" || l.header.Get(bus.HeaderDeadSubject) != topic.QuarantineAll(w.ID) {
			t.Errorf("got dead letter %q with %v, want the junk with reason and subject", l.data, l.header)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("no dead letter")
	}
	for i := range 5 {
		quarantine("replay", fmt.Sprint("frame ", i))
		publish(topic.Quarantine(w.ID, "replay"), []byte("\x0a"))
	}
	quarantine("clock-ahead", "1 h")
	wait(t, "all refusals", func() bool {
		return reflect.DeepEqual(w.View().Quarantine, map[string]uint64{"signature": 1, "replay": 5, "clock-ahead": 1})
	})
	for range 5 {
		select {
		case <-dead:
		case <-time.After(20 * time.Second):
			t.Fatal("a dead letter is missing")
		}
	}
	if v := w.View(); !slices.Contains([]string{"clock-ahead: 1 h", "replay: frame 4"}, v.LastRefusal) && !strings.HasPrefix(v.LastRefusal, "replay") {
		t.Errorf("got last refusal %q, want one of the last", v.LastRefusal)
	}

	// Blocks and their seal, with liars before them.
	publish(topic.Decision(w.ID, 2), junk)
	for _, blk := range []*ledgertest.Block{w.Decide(records(w.Command(1, 1, w.now()))), w.Decide()} {
		publish(topic.Decision(w.ID, 1), wire.EncodeBlock(wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts)))
	}
	wait(t, "two blocks", func() bool { return w.Height() == 2 })
	// Seals are core messages to the gateway: one that it misses is followed by
	// the next, which covers more.
	wait(t, "the seal", func() bool {
		publish(topic.Seal(w.ID), junk)
		publish(topic.Seal(w.ID), encode(t, w.announce(w.Blocks[1])))
		return w.View().Sealed.Height == 2
	})
	if got := w.junction().Evidence; got != 1 {
		t.Errorf("got evidence %d, want leaf 1", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
}

// TestReaders: everything public may be called while blocks come in; the race
// detector judges.
func TestReaders(t *testing.T) {
	w := newWorld(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	h := w.Handler()
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, j := range w.View().Junctions {
					_ = strings.Join(j.Groups, ",") + j.Rule
				}
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/v1/state", nil))
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/v1/registry/junction/J1", nil))
				w.Unsealed()
				w.Undecided()
				w.Newest(ledgertest.Device)
				w.Height()
			}
		})
	}
	for i := range uint64(50) {
		w.advance(time.Second)
		b := w.show(records(w.frame(traffic.Frame{FrameKey: seq(i + 1), Interval: time.Second}), w.Command(i+1, i+1, w.now()),
			w.Change(identity.Change{Action: "put", Type: identity.TypeSoftware, ID: fmt.Sprint("v", i), Body: []byte("{}"), Nonce: i + 1})))
		w.sealed(b)
	}
	close(stop)
	wg.Wait()
	if c := w.View().Counts; c.Frames != 50 || c.Commands != 50 {
		t.Errorf("got %+v, want 50 frames and commands", c)
	}
}

func TestNewRefuses(t *testing.T) {
	d := ledgertest.New("gateway", 4)
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "bus, state and district") {
		t.Errorf("got %v, want a complaint about bus, state and district", err)
	}
	state, err := agreed.Open("", &d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(d.Validators)
	bad[2].CosignKey = bad[2].CosignKey[:5]
	if _, err := New(Config{Bus: &bus.Bus{}, State: state, District: d.ID, Follow: decided.Config{Validators: bad}}); err == nil || !strings.Contains(err.Error(), "validator 3") {
		t.Errorf("got %v, want a complaint about validator 3", err)
	}
	// Without validators nothing can be sealed.
	g, err := New(Config{Bus: &bus.Bus{}, State: state, District: d.ID})
	if err != nil {
		t.Fatal(err)
	}
	b := d.NewChain().Fill(1).Blocks[0]
	g.seal(encode(t, &pb.Seal{Height: 1, Size: b.Header.Size, Checkpoint: d.NewChain().Fill(1).Seal(b)}))
	if got := g.View().Sealed.Size; got != 0 {
		t.Errorf("without validators: sealed at %d", got)
	}
}

// TestFailedDetectors: the view lists each detector with each rule that it
// breaks, from the word that it does until the word that it ceased.
func TestFailedDetectors(t *testing.T) {
	w := newWorld(t)
	word := func(seq uint64, detector traffic.DetectorID, rule string, failed bool) ledgertest.Record {
		return ledgertest.NewRecord(w.ControlKey, identity.KindHealth, identity.Protobuf, wire.EncodeHealth(&traffic.Health{
			District: w.ID, Junction: "J1", Seq: seq, Height: 1, Detector: detector, Rule: rule, Reason: "40 counts in 30 s", Failed: failed,
			Time: w.now(), Since: w.now().Add(-30 * time.Second),
		}))
	}
	want := func(names ...string) {
		t.Helper()
		var got []string
		for _, f := range w.junction().Failed {
			got = append(got, string(f.Detector)+" "+f.Rule)
		}
		if !slices.Equal(got, names) {
			t.Errorf("got %v, want %v", got, names)
		}
	}
	w.show(records(word(1, "D2", "chatter", true), word(2, "D1", "locked-on", true), word(3, "D1", "chatter", true)))
	before := w.junction()
	want("D1 chatter", "D1 locked-on", "D2 chatter")
	if f := before.Failed[0]; f.Reason != "40 counts in 30 s" || f.Index != 3 || !f.Since.Equal(w.now().Add(-30*time.Second)) {
		t.Errorf("got %+v, want its reason, leaf 3, and 30 s ago", f)
	}
	w.show(records(word(4, "D1", "chatter", false), word(5, "D2", "chatter", true)))
	want("D1 locked-on", "D2 chatter")
	if len(before.Failed) != 3 {
		t.Errorf("a view that was handed out has changed: %v", before.Failed)
	}
}
