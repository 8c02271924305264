package consensus

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

func TestFourValidatorsAgree(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u1, u2 := newUnit(1), newUnit(2)
	var last []byte
	for range 10 {
		now := time.Now()
		last = batch(u1.frame(now), u2.frame(now))
		c.submit(last)
	}
	c.decided(last, c.all()...)
	blocks := c.check()
	if times, _, verdicts := where(t, blocks, last); times != 1 || verdicts != "11" {
		t.Errorf("last batch: decided %d times with verdicts %s, want once with 11", times, verdicts)
	}
	// Every validator's decisions are in the stream, in order, whole.
	for _, n := range c.all() {
		eventually(t, "decisions published", func() bool { return c.nodes[n-1].v.Stats().Published == uint64(len(blocks)) })
		got := c.published(n)
		if len(got) != len(blocks) {
			t.Fatalf("validator %d: %d decisions in the stream, want %d", n, len(got), len(blocks))
		}
		for i, m := range got {
			if string(m.Header) != string(blocks[i].Header) || len(m.Batches) != len(blocks[i].Batches) {
				t.Errorf("validator %d: decision %d is not block %d with its payload", n, i, i+1)
			}
		}
	}
	// Everything was acknowledged, so that nothing comes again.
	for _, n := range c.all() {
		eventually(t, "ACCEPTED acknowledged", func() bool { return c.pending(n) == 0 })
	}
}

// publishedAll waits until a validator has stored its decisions.
func (c *cluster) publishedAll(n uint64, blocks int) {
	c.t.Helper()
	defer func() {
		if c.t.Failed() {
			c.t.Logf("validator %d of %d blocks: %+v", n, blocks, c.nodes[n-1].v.Stats())
		}
	}()
	eventually(c.t, "decisions published", func() bool { return c.nodes[n-1].v.Stats().Published == uint64(blocks) })
}

// published reads a validator's decisions from the stream.
func (c *cluster) published(n uint64) []*pb.Block {
	c.t.Helper()
	var out []*pb.Block
	_, err := c.bus.Replay(context.Background(), topic.DecisionStream, topic.Decision(harbour, n), 1, func(m *bus.Msg) error {
		b, err := wire.DecodeBlock(m.Data)
		out = append(out, b)
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// pending is how much of ACCEPTED a validator has not acknowledged.
func (c *cluster) pending(n uint64) uint64 {
	c.t.Helper()
	cons, err := c.bus.JS.Consumer(context.Background(), topic.AcceptedStream, topic.ConsensusDurable(n))
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return 1
	}
	if err != nil {
		c.t.Fatal(err)
	}
	info, err := cons.Info(context.Background())
	if err != nil {
		c.t.Fatal(err)
	}
	return info.NumPending + uint64(info.NumAckPending)
}

func TestABadRecordDoesNotHarmItsNeighbours(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	now := time.Now()
	forged := newUnit(3)
	forged.key = key("somebody else")
	wrongKey := forged.frame(now)
	broken := newUnit(4).frame(now)
	broken.Envelope = append([]byte(nil), broken.Envelope...)
	broken.Envelope[len(broken.Envelope)-1] ^= 1 // the signature's last byte
	unknown := newUnit(99).frame(now)
	garbage := &pb.Record{Envelope: []byte("not an envelope"), Salt: make([]byte, 32)}
	future := newUnit(5).frame(now.Add(time.Hour))
	mixed := batch(newUnit(1).frame(now), wrongKey, broken, newUnit(2).frame(now), unknown, garbage, future, newUnit(6).frame(now))
	c.submit(mixed)
	junk := []byte("no batch at all") // and a message that is none at all
	c.submit(junk)
	after := newUnit(7)
	good := batch(after.frame(now))
	c.submit(good)
	c.decided(mixed, c.all()...)
	c.decided(good, c.all()...)
	blocks := c.check()
	if _, _, v := where(t, blocks, mixed); v != "10010001" {
		t.Errorf("verdicts: got %s, want 10010001", v)
	}
	if _, _, v := where(t, blocks, good); v != "1" {
		t.Errorf("verdict on the record after: got %s, want 1", v)
	}
	for i, nd := range c.nodes {
		if got := nd.v.Stats().BadRequests; got != 1 {
			t.Errorf("validator %d: BadRequests: got %d, want 1", i+1, got)
		}
	}
}

func TestABatchIsDecidedOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	b := batch(u.frame(time.Now()))
	for i := range 3 { // the stream's own window of duplicates is passed by
		if err := c.bus.Publish(context.Background(), topic.Accepted(harbour), fmt.Sprint("again ", i), b); err != nil {
			t.Fatal(err)
		}
	}
	c.decided(b, c.all()...)
	if err := c.bus.Publish(context.Background(), topic.Accepted(harbour), "much later", b); err != nil {
		t.Fatal(err)
	}
	last := batch(u.frame(time.Now()))
	c.submit(last)
	c.decided(last, c.all()...)
	for _, n := range c.all() {
		eventually(t, "all copies acknowledged", func() bool { return c.pending(n) == 0 })
	}
	if times, _, v := where(t, c.check(), b); times != 1 || v != "1" {
		t.Errorf("got decided %d times, verdict %s; want once, 1", times, v)
	}
}

// A request that is decided elsewhere while it waits must not be proposed as
// nothing for ever, nor depose the leader.
func TestADecidedRequestDoesNotStayInThePool(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	b := batch(u.frame(time.Now()))
	c.submit(b)
	c.decided(b, c.all()...)
	c.stop(c.all()...) // the engine's own memory of it goes
	c.start(c.all()...)
	for _, n := range c.all() {
		if err := c.nodes[n-1].v.place().engine.(*smart).c.SubmitRequest(b); err != nil { // past our own checks
			t.Fatal(err)
		}
	}
	for range 5 {
		m := batch(u.frame(time.Now()))
		c.submit(m)
		c.decided(m, c.all()...)
	}
	blocks := c.check()
	if empty := len(blocks) - 6; empty > 1 {
		t.Errorf("got %d blocks without a request, want at most one", empty)
	}
	if times, _, _ := where(t, blocks, b); times != 1 {
		t.Errorf("decided %d times, want once", times)
	}
	leader := c.nodes[0].v.Stats().Leader
	if n := c.nodes[leader-1].v.place().engine.(*smart).c.Pool.Size(); n != 0 {
		t.Errorf("requests in the leader's pool: got %d, want none", n)
	}
}

func TestALostLeaderIsReplaced(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	first := batch(u.frame(time.Now()))
	c.submit(first)
	c.decided(first, c.all()...)
	leader := c.nodes[0].v.Stats().Leader
	rest := without(c.all(), leader)
	c.stop(leader)
	begin := time.Now()
	var last []byte
	for range 5 {
		last = batch(u.frame(time.Now()))
		c.submit(last)
	}
	c.decided(last, rest...)
	t.Logf("decided again %v after the leader was lost", time.Since(begin).Round(time.Millisecond))
	for _, n := range rest {
		if s := c.nodes[n-1].v.Stats(); s.View == 0 || s.Leader == leader {
			t.Errorf("validator %d: view %d, leader %d; want a later view with another leader than %d", n, s.View, s.Leader, leader)
		}
	}
	// It comes back, catches up, and takes part under the new leader.
	c.start(leader)
	c.decided(last, leader)
	more := batch(u.frame(time.Now()))
	c.submit(more)
	c.decided(more, c.all()...)
	c.check()
}

func without(ns []uint64, x uint64) []uint64 {
	var out []uint64
	for _, n := range ns {
		if n != x {
			out = append(out, n)
		}
	}
	return out
}

func TestAValidatorThatWasAwayCatchesUp(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	follower := uint64(4)
	if c.nodes[0].v.Stats().Leader == follower {
		follower = 3
	}
	rest := without(c.all(), follower)
	c.stop(follower)
	var last []byte
	for range 12 {
		last = batch(u.frame(time.Now()))
		c.submit(last)
		c.decided(last, rest...)
	}
	c.start(follower)
	c.decided(last, follower)
	if s := c.nodes[follower-1].v.Stats(); s.Synced < 12 {
		t.Errorf("blocks fetched from peers: got %d, want at least 12", s.Synced)
	}
	// With another one gone it is needed for every quorum.
	c.stop(without(rest, c.nodes[0].v.Stats().Leader)[0])
	var here []uint64
	for i, nd := range c.nodes {
		if nd != nil {
			here = append(here, uint64(i+1))
		}
	}
	next := batch(u.frame(time.Now()))
	c.submit(next)
	c.decided(next, here...)
	eventually(t, "the stream holds what was fetched", func() bool { return len(c.published(follower)) == len(c.blocks(follower)) })
	c.check()
}

func TestAllRestartAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	var all [][]byte
	for round := range 3 {
		for range 7 { // beyond a snapshot, and not only up to one
			b := batch(u.frame(time.Now()))
			all = append(all, b)
			c.submit(b)
		}
		if round == 1 {
			c.decided(all[len(all)-1], c.all()...)
		}
		begin := time.Now()
		c.stop(c.all()...) // in the other rounds, in the middle of things
		stopped := time.Now()
		c.start(c.all()...)
		t.Logf("stopped in %v, started in %v", stopped.Sub(begin).Round(time.Millisecond), time.Since(stopped).Round(time.Millisecond))
	}
	begin := time.Now()
	for _, b := range all {
		c.decided(b, c.all()...)
	}
	t.Logf("all decided after %v", time.Since(begin).Round(time.Millisecond))
	blocks := c.check()
	for i, b := range all {
		if times, _, v := where(t, blocks, b); times != 1 || v != "1" {
			t.Errorf("batch %d: got decided %d times, verdict %s; want once, 1", i, times, v)
		}
	}
	for _, n := range c.all() {
		c.publishedAll(n, len(blocks))
		for i, m := range c.published(n) {
			if h, err := ledger.ParseHeader(m.Header); err != nil || h.Height != ledger.Height(i+1) {
				t.Fatalf("validator %d: decision %d in the stream has height %d, err %v: want each once, in order", n, i, h.Height, err)
			}
		}
	}
}

func TestARegistryChangeCountsFromTheNextBlock(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	fresh := newUnit(50)
	put := change(t, 1, "put", identity.TypeDevice, "d50", identity.Device{Junction: "j1", Key: pub(fresh.key)})
	again := change(t, 1, "put", identity.TypeDevice, "d51", identity.Device{Junction: "j1", Key: pub(key("d51"))}) // the same nonce
	early := fresh.frame(time.Now())
	enrol := batch(put, again, early)
	c.submit(enrol)
	c.decided(enrol, c.all()...)
	fresh = newUnit(50)
	late := batch(fresh.frame(time.Now().Add(time.Millisecond)))
	c.submit(late)
	c.decided(late, c.all()...)
	blocks := c.check()
	_, h1, v1 := where(t, blocks, enrol)
	if v1 != "100" {
		t.Errorf("enrolment, second use of its nonce, frame in the same block: got verdicts %s, want 100", v1)
	}
	_, h2, v2 := where(t, blocks, late)
	if v2 != "1" {
		t.Errorf("frame after the enrolment: got verdict %s, want 1", v2)
	}
	before, err := ledger.ParseHeader(blocks[h1-1].Header)
	if err != nil {
		t.Fatal(err)
	}
	after, err := ledger.ParseHeader(blocks[h2-1].Header)
	if err != nil {
		t.Fatal(err)
	}
	if before.RegistryVersion != 0 || after.RegistryVersion != 1 || before.Registry == after.Registry {
		t.Errorf("registry versions: got %d in the block of the change and %d after, want 0 and 1, with another hash", before.RegistryVersion, after.RegistryVersion)
	}
	// The state that the change made survives a restart.
	c.stop(c.all()...)
	c.start(c.all()...)
	more := batch(fresh.frame(time.Now()))
	c.submit(more)
	c.decided(more, c.all()...)
	if _, _, v := where(t, c.check(), more); v != "1" {
		t.Errorf("frame after a restart: got verdict %s, want 1", v)
	}
}

func TestALargeMessageIsDecidedInParts(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	now := time.Now()
	var rs []*pb.Record
	filler := make([]byte, 200<<10)
	for i := range 12 { // 2.4 MiB of records that parse as nothing, and good ones between
		filler[0] = byte(i)
		rs = append(rs, &pb.Record{Envelope: append([]byte(nil), filler...), Salt: make([]byte, 32)})
		if i%3 == 0 {
			rs = append(rs, newUnit(1+i/3).frame(now))
		}
	}
	whole := batch(rs...)
	parts, err := split(whole)
	if err != nil {
		t.Fatal(err)
	}
	if len(parts) < 3 {
		t.Fatalf("got %d parts, want several", len(parts))
	}
	c.submit(whole)
	accepted := 0
	for _, p := range parts {
		c.decided(p.raw, c.all()...)
	}
	blocks := c.check()
	for _, p := range parts {
		times, _, v := where(t, blocks, p.raw)
		if times != 1 {
			t.Errorf("a part was decided %d times, want once", times)
		}
		accepted += strings.Count(v, "1")
	}
	if accepted != 4 {
		t.Errorf("accepted records: got %d, want 4", accepted)
	}
	if got := c.nodes[0].v.Stats().RecordsRefused; len(got) != 1 || got[validate.RuleSchema] != 12 {
		t.Errorf("records refused: got %v, want the 12 that parse as nothing, by %s", got, validate.RuleSchema)
	}
	for _, n := range c.all() {
		eventually(t, "the message is acknowledged", func() bool { return c.pending(n) == 0 })
	}
}

// What left ACCEPTED while a validator was away is counted there, once, and
// comes to it with the others' blocks.
func TestGoneFromAccepted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	decide := func(ns ...uint64) {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, ns...)
	}
	const away = 4
	rest := without(c.all(), away)
	decide(c.all()...)
	eventually(t, "the message is acknowledged", func() bool { return c.pending(away) == 0 })
	c.stop(away)
	decide(rest...)
	decide(rest...)
	st, err := c.bus.JS.Stream(context.Background(), topic.AcceptedStream)
	if err != nil {
		t.Fatal(err)
	}
	usual := st.CachedInfo().Config
	short := usual
	short.MaxAge, short.Duplicates = 100*time.Millisecond, 100*time.Millisecond
	if _, err := c.bus.JS.UpdateStream(context.Background(), short); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream lets them go", func() bool {
		i, err := st.Info(context.Background())
		return err == nil && i.State.FirstSeq == 4
	})
	if _, err := c.bus.JS.UpdateStream(context.Background(), usual); err != nil {
		t.Fatal(err)
	}
	c.start(away)
	decide(c.all()...)
	for _, n := range c.all() {
		want := uint64(0)
		if n == away {
			want = 2
		}
		if got := c.nodes[n-1].v.Stats().Gone; got != want {
			t.Errorf("validator %d: got %d messages gone, want %d", n, got, want)
		}
	}
	c.check()
}

func TestAnOldDiskStaysSilent(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	decide := func(ns ...uint64) {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, ns...)
	}
	decide(c.all()...)
	const restored = 4
	rest := without(c.all(), restored)
	c.stop(restored)
	old := c.path(restored) + ".old"
	copyDir(t, c.path(restored), old)
	c.start(restored) // this start is the one that the copy does not know of
	decide(c.all()...)
	c.stop(restored)
	if err := os.RemoveAll(c.path(restored)); err != nil {
		t.Fatal(err)
	}
	copyDir(t, old, c.path(restored))

	b, err := c.server.Connect("restored")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	v, err := New(c.config(restored, b))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	eventually(t, "peers see the old start", func() bool { return c.nodes[0].v.Stats().Restored > 0 })
	eventually(t, "it catches up", func() bool { return v.Stats().Height == c.nodes[0].v.Stats().Height })
	select {
	case <-v.Ready():
		t.Fatal("it takes part although nothing was decided without it since its last vote")
	default:
	}
	decide(rest...)
	decide(rest...) // it may have been one height further than anybody saw
	select {
	case <-v.Ready():
	case <-time.After(20 * time.Second):
		t.Fatal("it does not take part again")
	}
	decide(rest...)
	eventually(t, "it decides again", func() bool { return v.Stats().Height == c.nodes[0].v.Stats().Height })
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func TestCosigning(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	for range 2 {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, c.all()...)
	}
	blocks := c.check()
	head := func(i int) ledger.Header {
		h, err := ledger.ParseHeader(blocks[i].Header)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	origin := ledger.Origin(harbour)
	first, second := head(0).Checkpoint(origin), head(1).Checkpoint(origin)
	ask := func(height uint64, cp ledger.Checkpoint) *pb.CosignResponse {
		t.Helper()
		req, err := proto.Marshal(&pb.CosignRequest{Height: height, Body: []byte(cp.Body())})
		if err != nil {
			t.Fatal(err)
		}
		data, err := c.bus.Request(context.Background(), topic.Cosign(harbour, 2), req)
		if err != nil {
			t.Fatal(err)
		}
		var resp pb.CosignResponse
		if err := proto.Unmarshal(data, &resp); err != nil {
			t.Fatal(err)
		}
		return &resp
	}
	signed := func(height uint64, cp ledger.Checkpoint) {
		t.Helper()
		resp := ask(height, cp)
		cosigner, err := ledger.NewCosigner(ledger.CosignerName(origin, 2), []byte(pub(cosignKey(2))))
		if err != nil {
			t.Fatal(err)
		}
		at, err := cosigner.CheckCosignature(cp.Body(), string(resp.SignatureLine))
		if err != nil || time.Since(at) > time.Minute {
			t.Errorf("height %d: cosignature %q refused %q: time %v, err %v", height, resp.SignatureLine, resp.Refused, at, err)
		}
	}
	refused := func(height uint64, cp ledger.Checkpoint, want string) {
		t.Helper()
		if resp := ask(height, cp); len(resp.SignatureLine) > 0 || !strings.Contains(resp.Refused, want) {
			t.Errorf("height %d: got %q refused %q, want refused with %q", height, resp.SignatureLine, resp.Refused, want)
		}
	}
	other := func(cp ledger.Checkpoint, f func(*ledger.Checkpoint)) ledger.Checkpoint { f(&cp); return cp }
	signed(1, first)
	refused(1, other(first, func(cp *ledger.Checkpoint) { cp.Root[0] ^= 1 }), "size, root: are not those after block 1")
	refused(2, first, "size, root: are not those after block 2")
	refused(2, other(second, func(cp *ledger.Checkpoint) { cp.Origin = "elsewhere.example/log" }), "origin")
	refused(99, second, "99 has not been decided here")
	signed(2, second)
	signed(2, second) // again, without harm
	refused(1, first, fmt.Sprintf("size: %d, %d was cosigned before", first.Size, second.Size))
	c.stop(2)
	c.start(2)
	refused(1, first, "was cosigned before")
	signed(2, second)
	if s := c.nodes[1].v.Stats(); s.Cosigned != 1 || s.CosignRefused != 1 {
		t.Errorf("since the restart: got %d cosigned, %d refused; want 1 and 1", s.Cosigned, s.CosignRefused)
	}
}
