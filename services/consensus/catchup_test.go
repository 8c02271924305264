package consensus

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// history is a chain of blocks in the store of one validator, number 2, made
// without an engine: one block a second of block time, each with a frame, some
// with a registry record. It answers for validators 2, 3 and 4, each with its
// own key, as they hold the same.
type history struct {
	t     testing.TB
	c     Config
	k     *core
	units []*unit
	nonce uint64
	next  []*pb.Record // goes into the next block
	// lies changes a peer's answer, or loses it.
	mu   sync.Mutex
	lies map[uint64]func(req *pb.SyncRequest, resp *pb.SyncResponse) error
	n    int // requests
}

// registryEvery is how often a block of a history changes the registry: never
// where a snapshot is made.
const registryEvery = 97

func newHistory(t testing.TB, every int, retention time.Duration) *history {
	t.Helper()
	h := &history{t: t, lies: map[uint64]func(*pb.SyncRequest, *pb.SyncResponse) error{}}
	for i := range 8 {
		h.units = append(h.units, newUnit(i+1))
	}
	h.c = Config{District: harbour, Number: 2, VoteKey: voteKey(2), CosignKey: cosignKey(2), Genesis: genesis(t, 4, 8), Dir: t.TempDir(),
		Now: time.Now, Logger: slog.New(slog.DiscardHandler), SnapshotEvery: every, SegmentBytes: 64 << 10, Retention: retention}
	h.k = openTest(t, h.c)
	return h
}

func openTest(t testing.TB, c Config) *core {
	t.Helper()
	k, err := openCore(c, smartCodec{}, &counters{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.close() }) // also closed by tests that open again
	return k
}

// grow decides so many more blocks.
func (h *history) grow(n int) {
	h.t.Helper()
	k := h.k
	for n > 0 {
		k.mu.Lock()
		var done []*appliedBlock
		for range min(n, 256) {
			height := k.state.height() + 1
			at := k.state.time().Add(time.Second)
			rs := append([]*pb.Record{h.units[int(height)%len(h.units)].frame(at)}, h.next...)
			h.next = nil
			if height%registryEvery == 0 {
				h.nonce++
				id := fmt.Sprintf("x%d", h.nonce)
				rs = append(rs, change(h.t, h.nonce, "put", identity.TypeDevice, id, identity.Device{Junction: "j1", Key: pub(key("device %s", id))}))
			}
			r, err := parseRequest(batch(rs...))
			if err != nil {
				h.t.Fatal(err)
			}
			o := k.state.execute(k.verifier, at, []*request{r})
			if o.accepted != len(rs) {
				h.t.Fatalf("block %d: %d of %d records accepted: %v", height, o.accepted, len(rs), o.refused)
			}
			header := o.header.Marshal()
			k.outcomes[string(header)] = o
			m := &pb.Block{Header: header, Metadata: metadata(h.t, 0, height), Batches: o.batches, Verdicts: o.verdicts}
			hash := o.header.Hash()
			members := k.set().validators
			for _, v := range members[:ledger.Quorum(len(members))] {
				i := v.Number
				m.Votes = append(m.Votes, &pb.VoteSignature{Validator: i, Signature: ed25519.Sign(voteKey(i), ledger.VoteInput(hash, m.Metadata))})
			}
			a, err := k.executeBlock(m)
			if err != nil {
				h.t.Fatal(err)
			}
			done = append(done, a)
			n--
			if height%k.every == 0 {
				break
			}
		}
		err := k.settle(done, true)
		k.mu.Unlock()
		if err != nil {
			h.t.Fatal(err)
		}
		k.snapshots.Wait()
	}
}

// member decides a block that adds a validator, or revokes one.
func (h *history) member(n uint64, action string) {
	h.t.Helper()
	h.nonce++
	var body any
	if action == identity.Put {
		body = identity.Validator{Number: n, Department: fmt.Sprintf("department %d", n), VoteKey: pub(voteKey(n)), CosignKey: pub(cosignKey(n))}
	}
	h.next = []*pb.Record{change(h.t, h.nonce, action, identity.TypeValidator, fmt.Sprint(n), body)}
	h.grow(1)
}

// marshalled is the encoded state.
func marshalled(t testing.TB, k *core) []byte {
	t.Helper()
	b, err := k.state.marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ask is a network that loses nothing, with peers that may lie.
func (h *history) ask(ctx context.Context, peer uint64, data []byte) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h.n++
	var req pb.SyncRequest
	if err := proto.Unmarshal(data, &req); err != nil {
		return nil, err
	}
	resp, err := h.k.serve(ctx, &req)
	if err != nil {
		return nil, err
	}
	for _, o := range resp.Offers {
		sign(o, voteKey(peer))
	}
	if lie := h.lies[peer]; lie != nil {
		if err := lie(&req, resp); err != nil {
			return nil, err
		}
	}
	return proto.Marshal(resp)
}

func sign(o *pb.SnapshotOffer, key ed25519.PrivateKey) {
	o.Signature = ed25519.Sign(key, snapshotInput(sha256.Sum256(*genesisOf4.Load()), snapshot{height: ledger.Height(o.Height), header: ledger.Hash(o.Header), size: o.Size, digest: ledger.Hash(o.Digest)}))
}

var genesisOf4 atomic.Pointer[[]byte] // of all histories the same

// newcomer is validator 1 with an empty disk.
func (h *history) newcomer() (Config, *core) {
	h.t.Helper()
	genesisOf4.Store(&h.c.Genesis)
	c := h.c
	c.Number, c.VoteKey, c.CosignKey, c.Dir = 1, voteKey(1), cosignKey(1), h.t.TempDir()
	return c, openTest(h.t, c)
}

func (h *history) fetcher(k *core, beyond int) *fetcher {
	return &fetcher{core: k, self: 1, wait: 10 * time.Second, beyond: beyond, ask: h.ask, aside: map[uint64]bool{}}
}

// caughtUp checks that a validator holds what the peers hold.
func (h *history) caughtUp(k *core) {
	h.t.Helper()
	if got, want := k.height(), h.k.height(); got != want || !k.whole() {
		h.t.Fatalf("got height %d of %d blocks stored, want %d", got, k.store.height(), want)
	}
	if !bytes.Equal(marshalled(h.t, k), marshalled(h.t, h.k)) {
		h.t.Fatal("the state is another than the peers'")
	}
	for height := max(k.store.first(), h.k.store.first()); height <= k.height(); height += 13 {
		got, err := k.store.headers(height)
		if err != nil {
			h.t.Fatal(err)
		}
		want, err := h.k.store.headers(height)
		if err != nil {
			h.t.Fatal(err)
		}
		if !bytes.Equal(got.Header, want.Header) || !bytes.Equal(got.Leaves, want.Leaves) || !bytes.Equal(got.Verdicts, want.Verdicts) || len(got.Votes) < 3 {
			h.t.Fatalf("block %d: stored another than the peers have", height)
		}
	}
	if last, err := k.last(); err != nil || len(last.Proposal.Payload) == 0 {
		h.t.Fatalf("last decision for the engine: %d bytes of payload, %v: want it whole", len(last.Proposal.Payload), err)
	}
}

func (h *history) run(f *fetcher) {
	h.t.Helper()
	if err := f.run(context.Background()); err != nil {
		h.t.Fatal(err)
	}
}

// TestTenThousandBlocksBehind: a validator with nothing comes to the peers'
// state, by executing everything where the payloads are there, and where they
// are gone, by headers and a snapshot.
func TestTenThousandBlocksBehind(t *testing.T) {
	t.Parallel()
	blocks := 10_000
	if testing.Short() || slower > 1 {
		blocks = 1_000
	}
	h := newHistory(t, 200, -1)
	h.grow(blocks + 37)
	_, k := h.newcomer()
	begin := time.Now()
	h.run(h.fetcher(k, -1))
	t.Logf("executed %d blocks in %v", k.height(), time.Since(begin))
	h.caughtUp(k)
	if s := k.count.stats(); s.Snapshots != 0 || s.Synced != uint64(blocks+37) {
		t.Errorf("got %d snapshots, %d blocks executed, want 0 and %d", s.Snapshots, s.Synced, blocks+37)
	}

	_, k = h.newcomer()
	begin = time.Now()
	h.run(h.fetcher(k, 500))
	t.Logf("by snapshot %d blocks in %v", k.height(), time.Since(begin))
	h.caughtUp(k)
	s := k.count.stats()
	if want := uint64((blocks + 37) / 200 * 200); s.Snapshots != 1 || s.Headers != want || s.Synced != uint64(blocks+37)-want {
		t.Errorf("got %d snapshots, %d blocks by header, %d executed; want 1, %d, %d", s.Snapshots, s.Headers, s.Synced, want, uint64(blocks+37)-want)
	}
}

func TestBehindWherePayloadsArePurged(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 50, 100*time.Second)
	h.grow(120)
	// One that was there until block 120, and one that never was.
	c, old := h.newcomer()
	h.run(h.fetcher(old, -1))
	h.grow(900)
	first := h.k.store.payloads.First()
	if first < 500 {
		t.Fatalf("only %d payloads were let go of", first)
	}
	_, empty := h.newcomer()
	for name, k := range map[string]*core{"behind": old, "empty": empty} {
		h.run(h.fetcher(k, -1))
		h.caughtUp(k)
		if got := k.count.stats().Snapshots; got != 1 {
			t.Errorf("%s: got %d snapshots taken, want 1", name, got)
		}
	}
	// It starts again, and goes on, from what it has.
	if err := old.close(); err != nil {
		t.Fatal(err)
	}
	old = openTest(t, c)
	h.caughtUp(old)
	h.grow(30)
	h.run(h.fetcher(old, -1))
	h.caughtUp(old)
	// And others can catch up from it.
	h.k = old
	_, k := h.newcomer()
	h.run(h.fetcher(k, -1))
	h.caughtUp(k)
}

// errLost is a message that the network lost.
var errLost = errors.New("lost")

// TestALiarPlantsNothing: validator 2 lies in each way, the other two are
// honest, and the result is the true state; where the liar is alone, there is
// none.
func TestALiarPlantsNothing(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 50, 100*time.Second)
	h.grow(430)
	forged := forgedState(t, h)
	offer := func(o *pb.SnapshotOffer) {
		sum := sha256.Sum256(forged)
		o.Digest, o.Size = sum[:], uint64(len(forged))
		sign(o, voteKey(2))
	}
	for i, tc := range []struct {
		name string
		lie  func(req *pb.SyncRequest, resp *pb.SyncResponse) error
		// answers, snapshots: what is counted against the liar.
		answers, snapshots uint64
	}{
		{"another state", func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				offer(o)
			}
			if sum := sha256.Sum256(forged); bytes.Equal(req.Snapshot, sum[:]) {
				resp.Part, resp.Size = forged[req.Offset:], uint64(len(forged))
			}
			return nil
		}, 0, 1},
		{"another state, offered many times", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for i := range resp.Offers {
				offer(resp.Offers[i])
				resp.Offers = append(resp.Offers, resp.Offers[i])
			}
			return nil
		}, 0, 1},
		{"a state of the future", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				o.Height += 10_000
				sign(o, voteKey(2))
			}
			return nil
		}, 0, 0},
		{"offers that others should have signed", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				sign(o, voteKey(9))
			}
			return nil
		}, 1, 0},
		{"offers without a digest", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				o.Digest = nil
			}
			return nil
		}, 1, 0},
		{"an offer larger than any state", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				o.Size = maxSnapshot + 1
				sign(o, voteKey(2))
			}
			return nil
		}, 1, 0},
		{"stale offers", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			resp.Offers = resp.Offers[:min(1, len(resp.Offers))]
			return nil
		}, 0, 0},
		{"other bytes of a snapshot", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			if len(resp.Part) > 0 {
				resp.Part[len(resp.Part)/2] ^= 1
			}
			return nil
		}, 1, 0},
		{"a snapshot without end", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			if len(resp.Part) > 0 {
				resp.Part = append(resp.Part, 0)
			}
			return nil
		}, 1, 0},
		{"an answer without end", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			if len(resp.Blocks) > 0 {
				resp.Part = make([]byte, 5<<20)
			}
			return nil
		}, 1, 0},
		{"blocks without registry records", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, m := range resp.Blocks {
				m.Batches = nil
			}
			return nil
		}, 1, 0},
		{"blocks with other verdicts", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, m := range resp.Blocks {
				m.Verdicts = []byte{0}
			}
			return nil
		}, 1, 0},
		{"blocks with other leaves", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for i, m := range resp.Blocks {
				if i > 5 {
					m.Leaves[len(m.Leaves)-1] ^= 1
				}
			}
			return nil
		}, 1, 0},
		{"blocks with too few votes", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for i, m := range resp.Blocks {
				if i > 5 {
					m.Votes = append(m.Votes[:2], m.Votes[1])
				}
			}
			return nil
		}, 1, 0},
		{"blocks out of their order", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			slices.Reverse(resp.Blocks)
			return nil
		}, 1, 0},
		{"the same blocks again and again", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			resp.Blocks = append(resp.Blocks, resp.Blocks...)
			return nil
		}, 1, 0},
		{"truncated blocks", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, m := range resp.Blocks {
				m.Header = m.Header[:len(m.Header)-1]
			}
			return nil
		}, 1, 0},
		{"one block at a time", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			resp.Blocks = resp.Blocks[:min(1, len(resp.Blocks))]
			return nil
		}, 0, 0},
		{"nothing, and claims to have much", func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
			proto.Reset(resp)
			resp.LastHeight = 1 << 60
			return nil
		}, 0, 0},
		{"silence", func(*pb.SyncRequest, *pb.SyncResponse) error { return errLost }, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := &history{t: t, c: h.c, k: h.k, lies: map[uint64]func(*pb.SyncRequest, *pb.SyncResponse) error{}}
			for _, beyond := range []int{-1, 10} {
				if (testing.Short() || slower > 1 && i%2 == 0) && beyond > 0 {
					continue
				}
				_, k := h.newcomer()
				h.lies[2] = tc.lie
				f := h.fetcher(k, beyond)
				// The liar goes first wherever that is left to chance.
				f.useful = 2
				h.n = 0
				h.run(f)
				h.caughtUp(k)
				s := k.count.stats()
				if s.FalseAnswers < tc.answers || tc.answers == 0 && s.FalseAnswers != 0 || s.FalseSnapshots < tc.snapshots {
					t.Errorf("counted %d false answers, %d false snapshots, want %d and %d", s.FalseAnswers, s.FalseSnapshots, tc.answers, tc.snapshots)
				}
				if h.n > 200 {
					t.Errorf("it took %d requests", h.n)
				}
			}
			// Alone, it brings nobody anywhere.
			_, k := h.newcomer()
			h.lies[3] = func(*pb.SyncRequest, *pb.SyncResponse) error { return errLost }
			h.lies[4] = h.lies[3]
			h.run(h.fetcher(k, -1))
			if k.height() != 0 || k.count.stats().Snapshots != 0 {
				t.Errorf("one validator's word was enough for a state after block %d", k.height())
			}
		})
	}
}

// forgedState is the peers' newest snapshot but for one device, of which more is
// known than was ever decided: its true frames would be refused.
func forgedState(t *testing.T, h *history) []byte {
	t.Helper()
	list := h.k.shelf.all()
	b, err := h.k.shelf.load(list[len(list)-1].height)
	if err != nil {
		t.Fatal(err)
	}
	st, _, err := newState(h.c.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.unmarshal(b); err != nil {
		t.Fatal(err)
	}
	st.devices.Quarantine("d1")
	if b, err = st.marshal(); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBehindAcrossAChangeOfMembers: who may vouch for a state are those who were
// members when its block was decided. The keys of f+1 validators of before, who
// were revoked, plant nothing; not on the disk either.
func TestBehindAcrossAChangeOfMembers(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 20, 50*time.Second)
	h.grow(110)
	for n := uint64(5); n <= 7; n++ {
		h.member(n, identity.Put)
		h.grow(7)
	}
	h.member(2, identity.Revoke)
	h.member(3, identity.Revoke)
	h.grow(200)
	forged := forgedState(t, h)
	digest := sha256.Sum256(forged)
	for _, p := range []uint64{2, 3} {
		h.lies[p] = func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, o := range resp.Offers {
				o.Digest, o.Size = digest[:], uint64(len(forged))
				sign(o, voteKey(p))
			}
			if bytes.Equal(req.Snapshot, digest[:]) {
				resp.Part, resp.Size = forged[req.Offset:], uint64(len(forged))
			}
			return nil
		}
	}
	c, k := h.newcomer()
	f := h.fetcher(k, -1)
	for range 2 {
		if _, err := f.once(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, s := range k.shelf.all() {
			if s.digest == digest {
				t.Fatal("the forged state is on the shelf, and would be offered to others")
			}
		}
		// It starts again: what is on disk is not believed either.
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		k = openTest(t, c)
		if k.state.devices.Quarantined("d1") {
			t.Fatal("the forged state was started from")
		}
		f = h.fetcher(k, -1)
	}
	h.run(h.fetcher(k, -1))
	h.caughtUp(k)
	if k.state.devices.Quarantined("d1") {
		t.Error("the forged state was taken")
	}
	if _, err := k.shelf.staged(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the staged snapshot is still there: %v", err)
	}
}

// TestNoSnapshotInCommon: where there is no state to be had, and every payload,
// blocks are executed however many; also by a validator that has stored more
// headers than it has a state for.
func TestNoSnapshotInCommon(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 1000, -1)
	h.grow(300)
	_, k := h.newcomer()
	h.run(h.fetcher(k, 10))
	h.caughtUp(k)
	_, k = h.newcomer()
	at, err := k.follow()
	if err != nil {
		t.Fatal(err)
	}
	if at, err = h.fetcher(k, -1).headers(t.Context(), at, 200); err != nil || at.height() != 200 || k.whole() {
		t.Fatalf("headers: got to %d, %v, want 200 without a state", at.height(), err)
	}
	h.run(h.fetcher(k, -1))
	h.caughtUp(k)
}

// TestKilledWhileFetching: wherever it ends, what is on disk is good to go on
// from.
func TestKilledWhileFetching(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 20, 50*time.Second)
	h.grow(215)
	for at := 1; ; at++ {
		c, k := h.newcomer()
		left := at
		h.n = 0
		// A request each of few blocks, so that there is much to be interrupted.
		small := func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
			if left--; left < 0 {
				return errLost
			}
			resp.Blocks = resp.Blocks[:min(len(resp.Blocks), 17)]
			return nil
		}
		for _, p := range []uint64{2, 3, 4} {
			h.lies[p] = small
		}
		h.run(h.fetcher(k, -1))
		done := left >= 0
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		clear(h.lies)
		k = openTest(t, c)
		if k.height() > k.store.height() {
			t.Fatalf("after %d requests: state of block %d, %d are stored", at, k.height(), k.store.height())
		}
		h.run(h.fetcher(k, -1))
		h.caughtUp(k)
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		if done {
			if at < 10 {
				t.Errorf("interrupted at %d places only", at)
			}
			return
		}
	}
}

// TestSnapshotsAreTheSameEverywhere: the bytes depend on the blocks only, not on
// when a validator started or how it came by the blocks.
func TestSnapshotsAreTheSameEverywhere(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 20, -1)
	h.grow(50)
	c, k := h.newcomer()
	h.run(h.fetcher(k, -1)) // executed
	_, s := h.newcomer()
	h.run(h.fetcher(s, 5)) // by a snapshot
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	k = openTest(t, c) // recovered
	h.grow(30)
	h.run(h.fetcher(k, -1))
	h.run(h.fetcher(s, -1))
	k.snapshots.Wait()
	s.snapshots.Wait()
	want := h.k.shelf.all()
	if n := len(want); n < 2 || want[n-1].height != 80 {
		t.Fatalf("got snapshots %v, want at least two, the last at 80", want)
	}
	for name, k := range map[string]*core{"executed and recovered": k, "by snapshot": s} {
		got := k.shelf.all()
		if g, w := got[len(got)-1], want[len(want)-1]; g != w {
			t.Errorf("%s: got snapshot %+v, want %+v", name, g, w)
		}
	}
}

// TestSnapshotsKept: the newest two, and two that stay for longer.
func TestSnapshotsKept(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 2, -1)
	for n, want := range map[int][]ledger.Height{4: {2, 4}, 6: {4, 6}, 32: {30, 32}, 36: {32, 34, 36}, 100: {64, 96, 98, 100}} {
		h := newHistory(t, 2, -1)
		h.grow(n)
		var got []ledger.Height
		for _, s := range h.k.shelf.all() {
			got = append(got, s.height)
		}
		if !slices.Equal(got, want) {
			t.Errorf("after %d blocks: got snapshots %v, want %v", n, got, want)
		}
	}
	// A name that does not belong there is not passed over.
	if err := h.k.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.c.Dir, "snapshots", "7"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openCore(h.c, smartCodec{}, &counters{}); err == nil || !strings.Contains(err.Error(), "is not the name of a snapshot") {
		t.Errorf("got %v, want the strange file named", err)
	}
}

// TestDamagedSnapshots: an older one serves, and where all are damaged and the
// payloads gone, the peers'.
func TestDamagedSnapshots(t *testing.T) {
	h := newHistory(t, 20, 50*time.Second)
	h.grow(210)
	c, k := h.newcomer()
	h.run(h.fetcher(k, -1))
	h.grow(60)
	h.run(h.fetcher(k, -1))
	k.snapshots.Wait()
	list := k.shelf.all()
	for i := len(list) - 1; i >= 0; i-- {
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		path := k.shelf.path(list[i].height)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/3] ^= 4
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		k = openTest(t, c)
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the damaged snapshot is still there: %v", err)
		}
		if i > 0 {
			h.caughtUp(k)
		}
	}
	if k.whole() {
		t.Fatal("without a snapshot and without payloads the state is there all the same")
	}
	h.run(h.fetcher(k, -1))
	h.caughtUp(k)
}

func TestVouched(t *testing.T) {
	s := func(h ledger.Height, d byte) snapshot { return snapshot{height: h, digest: ledger.Hash{d}, size: 1} }
	for _, tc := range []struct {
		name    string
		n       int
		above   ledger.Height
		offers  map[uint64][]snapshot
		height  ledger.Height
		signers []uint64
		liars   []uint64
	}{
		{"nobody", 4, 0, nil, 0, nil, nil},
		{"one of four", 4, 0, map[uint64][]snapshot{2: {s(5, 1)}}, 0, nil, nil},
		{"one, twice", 4, 0, map[uint64][]snapshot{2: {s(5, 1), s(5, 1)}}, 0, nil, nil},
		{"two of four", 4, 0, map[uint64][]snapshot{2: {s(5, 1)}, 3: {s(5, 1)}}, 5, []uint64{2, 3}, nil},
		{"two of seven", 7, 0, map[uint64][]snapshot{2: {s(5, 1)}, 3: {s(5, 1)}}, 0, nil, nil},
		{"three of seven", 7, 0, map[uint64][]snapshot{2: {s(5, 1)}, 3: {s(5, 1)}, 7: {s(5, 1)}}, 5, []uint64{2, 3, 7}, nil},
		{"the newest in common", 4, 0, map[uint64][]snapshot{2: {s(5, 1), s(10, 2)}, 3: {s(5, 1)}, 4: {s(5, 1), s(15, 3)}}, 5, []uint64{2, 3, 4}, nil},
		{"old ones", 4, 5, map[uint64][]snapshot{2: {s(5, 1)}, 3: {s(5, 1)}}, 0, nil, nil},
		{"a liar", 4, 0, map[uint64][]snapshot{2: {s(5, 9)}, 3: {s(5, 1)}, 4: {s(5, 1)}}, 5, []uint64{3, 4}, []uint64{2}},
		{"two states, each vouched for", 4, 0, map[uint64][]snapshot{1: {s(5, 9), s(3, 1)}, 2: {s(5, 9)}, 3: {s(5, 1), s(3, 1)}, 4: {s(5, 1)}}, 3, []uint64{1, 3}, nil},
	} {
		best, signers, liars := vouched(tc.above, tc.n, tc.offers)
		if best.height != tc.height || !slices.Equal(signers, tc.signers) || !slices.Equal(liars, tc.liars) {
			t.Errorf("%s: got block %d by %v, liars %v; want %d by %v, %v", tc.name, best.height, signers, liars, tc.height, tc.signers, tc.liars)
		}
	}
}

func TestPurge(t *testing.T) {
	t.Parallel()
	h := newHistory(t, 20, 64*time.Second)
	h.grow(400)
	k := h.k
	check := func() {
		t.Helper()
		kept := 0
		for height := ledger.Height(1); height <= 400; height++ {
			m, err := k.store.block(height)
			if err != nil {
				t.Fatal(err)
			}
			hd, err := ledger.ParseHeader(m.Header)
			if err != nil {
				t.Fatal(err)
			}
			if ledger.Verdicts(m.Verdicts).Digest() != hd.Verdicts || len(m.Leaves) == 0 || len(m.Votes) != 3 {
				t.Fatalf("block %d: verdicts, leaves or votes are gone", height)
			}
			switch gone := purged(m, hd); {
			case gone && height%registryEvery == 0:
				t.Errorf("block %d: its registry record is gone", height)
			case gone && height > 400-64:
				t.Errorf("block %d: its payload is gone too early", height)
			case gone && height >= k.shelf.oldest():
				t.Errorf("block %d: its payload is gone, and the oldest snapshot is of %d", height, k.shelf.oldest())
			case !gone && height%registryEvery != 0:
				kept++
			}
		}
		// The retention, an eighth of it, what the snapshots need, and one segment.
		if most := 64 + 64/8 + 80; kept > most {
			t.Errorf("payloads kept: got %d, want at most %d", kept, most)
		}
	}
	check()
	if got, want := k.count.stats().Purged, k.store.payloads.First(); got != want || got == 0 {
		t.Errorf("counted %d payloads purged, want %d", got, want)
	}
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	k = openTest(t, h.c)
	check()
}

// TestPayloadsKeptForGood: without a retention nothing goes.
func TestPayloadsKeptForGood(t *testing.T) {
	h := newHistory(t, 20, -1)
	h.grow(100)
	if got := h.k.store.payloads.First(); got != 0 {
		t.Errorf("%d payloads are gone", got)
	}
}

// TestLayoutOfBefore: verdicts with the payload are found, and such a payload is
// never let go of.
func TestLayoutOfBefore(t *testing.T) {
	h := newHistory(t, 1000, 10*time.Second)
	h.grow(60)
	c, k := h.newcomer()
	for height := ledger.Height(1); height <= 60; height++ {
		m, err := h.k.store.block(height)
		if err != nil {
			t.Fatal(err)
		}
		payload := wire.EncodeBlock(&pb.Block{Batches: m.Batches, Verdicts: m.Verdicts})
		if _, err := k.store.payloads.Append(payload); err != nil {
			t.Fatal(err)
		}
		m.Batches, m.Verdicts = nil, nil
		if _, err := k.store.blocks.Append(wire.EncodeBlock(m)); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	k = openTest(t, c)
	h.caughtUp(k)
	if err := k.store.payloads.Roll(); err != nil {
		t.Fatal(err)
	}
	if _, err := k.store.purge(60, k.state.time(), time.Second); err == nil || !strings.Contains(err.Error(), "in a layout of before") {
		t.Errorf("purging: got %v, want it refused", err)
	}
	if got := k.store.payloads.First(); got != 0 {
		t.Errorf("%d payloads are gone, with their verdicts", got)
	}
	if _, err := k.store.purge(60, k.state.time(), time.Second); err != nil {
		t.Errorf("the second time: got %v, want it said once", err)
	}
}

// TestRegistryForWhoAsks: by its hash, of now or of a snapshot.
func TestRegistryForWhoAsks(t *testing.T) {
	h := newHistory(t, 20, -1)
	h.grow(registryEvery - 1)
	before := h.k.state.registryHash
	h.grow(5)
	for name, want := range map[string]ledger.Hash{"now": h.k.state.registryHash, "of a snapshot": before} {
		resp, err := h.k.serve(t.Context(), &pb.SyncRequest{Registry: want[:]})
		if err != nil {
			t.Fatal(err)
		}
		reg, err := identity.ParseSnapshot(resp.Part)
		if err != nil {
			t.Fatal(err)
		}
		if got := ledger.Hash(reg.Hash()); got != want || resp.Size != uint64(len(resp.Part)) {
			t.Errorf("%s: got registry %x, want %x", name, got[:8], want[:8])
		}
	}
	for _, req := range []*pb.SyncRequest{{Registry: make([]byte, 32)}, {Registry: before[:], Offset: 1 << 40}, {Snapshot: make([]byte, 32)}, {Snapshot: []byte{1}}} {
		if resp, err := h.k.serve(t.Context(), req); err != nil || len(resp.Part) != 0 {
			t.Errorf("%v: got %d bytes, %v, want none", req, len(resp.Part), err)
		}
	}
}

// FuzzSnapshot: what is taken is what it would be written as.
func FuzzSnapshot(f *testing.F) {
	h := newHistory(f, 5, -1)
	h.grow(7)
	b, err := h.k.shelf.load(5)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-32])
	f.Add([]byte(snapshotMagic))
	f.Add(binary.BigEndian.AppendUint32([]byte(snapshotMagic), 1<<31))
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		st, _, err := newState(h.c.Genesis)
		if err != nil {
			t.Fatal(err)
		}
		if st.unmarshal(append(bytes.Clone(body), sum[:]...)) != nil {
			return
		}
		if _, err := st.marshal(); err != nil {
			t.Errorf("taken, and cannot be written: %v", err)
		}
	})
}

// BenchmarkCatchUp is how fast a validator with nothing catches up with peers in
// memory: one frame in a block, every sync real.
func BenchmarkCatchUp(b *testing.B) {
	const blocks = 10_000
	h := newHistory(b, 200, -1)
	h.grow(blocks)
	for _, tc := range []struct {
		name   string
		beyond int
	}{{"executed", -1}, {"snapshot", 500}} {
		b.Run(tc.name, func(b *testing.B) {
			n := 0
			for b.Loop() {
				b.StopTimer()
				_, k := h.newcomer()
				b.StartTimer()
				h.run(h.fetcher(k, tc.beyond))
				n += int(k.height())
			}
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "blocks/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}
