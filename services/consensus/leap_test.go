package consensus

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// leaping is a fetcher that may begin with a snapshot.
func (h *history) leaping(k *core) *fetcher {
	f := h.fetcher(k, 10)
	f.leaps = true
	return f
}

// generations is a history of several sets of validators, the last of them since
// block 124: 1, 4, 5, 6 and 7.
func generations(t testing.TB) *history {
	h := newHistory(t, 20, 50*time.Second)
	h.grow(100)
	for n := uint64(5); n <= 7; n++ {
		h.member(n, identity.Put)
		h.grow(6)
	}
	h.member(2, identity.Revoke)
	h.member(3, identity.Revoke)
	h.grow(400)
	return h
}

// A newcomer begins with the newest snapshot, however long the chain is and
// however often the members changed, without one header of before; it goes on
// with the others, starts again from what it has, and another can begin from it.
func TestNewcomerBeginsWithASnapshot(t *testing.T) {
	long(t)
	h := generations(t)
	c, k := h.newcomer()
	h.n = 0
	h.run(h.leaping(k))
	h.caughtUp(k)
	list := h.k.shelf.all()
	newest := list[len(list)-1].height
	s := k.count.stats()
	if k.store.first() != newest || s.Headers != 0 || s.Snapshots != 1 || s.Synced != uint64(h.k.height()-newest) {
		t.Errorf("begins with block %d, %d headers, %d snapshots, %d executed; want %d, none, 1, %d", k.store.first(), s.Headers, s.Snapshots, s.Synced, newest, h.k.height()-newest)
	}
	if h.n > 40 {
		t.Errorf("it took %d requests", h.n)
	}
	if sets, err := ledger.CheckSteps(h.c.Genesis, k.succession.whole()); err != nil || len(sets) != 6 {
		t.Errorf("the succession: got %d sets, %v, want 6", len(sets), err)
	}
	if bs, err := k.blocks(t.Context(), newest-1, 10, 1<<20, true); err != nil || len(bs) != 0 {
		t.Errorf("blocks of before: got %d, %v, want none", len(bs), err)
	}
	for range 2 {
		if err := k.close(); err != nil {
			t.Fatal(err)
		}
		k = openTest(t, c)
		h.caughtUp(k)
		h.grow(90)
		h.run(h.fetcher(k, -1))
		h.caughtUp(k)
	}
	if k.store.first() != newest {
		t.Errorf("begins with block %d now, want %d", k.store.first(), newest)
	}
	// What it lets go of by and by is as elsewhere.
	k.snapshots.Wait()
	if p := k.store.payloads.First(); p < uint64(newest) {
		t.Errorf("no payload since block %d was let go of", newest)
	}
	honest := h.k
	h.k = k // all that there is left
	_, next := h.newcomer()
	h.run(h.leaping(next))
	h.caughtUp(next)
	// From it alone nobody gets what it does not have.
	_, all := h.newcomer()
	f := h.leaping(all)
	f.leaps = false
	h.run(f)
	if all.height() != 0 || all.store.height() != 0 {
		t.Errorf("the whole history from who does not have it: got %d blocks", all.store.height())
	}
	h.k = honest
	f = h.fetcher(all, 10)
	h.run(f)
	h.caughtUp(all)
	if all.store.first() != 1 {
		t.Errorf("the whole history begins with block %d", all.store.first())
	}
}

// A crash between any two of the files that a beginning writes leaves a validator
// that begins again.
func TestCrashWhileBeginning(t *testing.T) {
	long(t)
	h := generations(t)
	_, k := h.newcomer()
	h.run(h.leaping(k))
	first := k.store.first()
	m, err := k.store.block(first)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := proto.Marshal(&pb.Block{Batches: m.Batches})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		files []string
		logs  func(blocks, payloads *seglog.Log) error
	}{
		{"succession", []string{"succession"}, nil},
		{"snapshot", []string{"succession", "snapshots"}, nil},
		{"base", []string{"succession", "snapshots", baseFile}, nil},
		{"payloads begun", []string{"succession", "snapshots", baseFile}, func(_, p *seglog.Log) error { return p.StartAt(uint64(first) - 1) }},
		{"both begun", []string{"succession", "snapshots", baseFile}, func(b, p *seglog.Log) error {
			if err := p.StartAt(uint64(first) - 1); err != nil {
				return err
			}
			return b.StartAt(uint64(first) - 1)
		}},
		{"payload written", []string{"succession", "snapshots", baseFile}, func(b, p *seglog.Log) error {
			if err := p.StartAt(uint64(first) - 1); err != nil {
				return err
			}
			if err := b.StartAt(uint64(first) - 1); err != nil {
				return err
			}
			_, err := p.Append(payload)
			return err
		}},
	} {
		c, n := h.newcomer()
		if err := n.close(); err != nil {
			t.Fatal(err)
		}
		for _, f := range tc.files {
			from := filepath.Join(filepath.Dir(k.succession.path), f)
			to := filepath.Join(c.Dir, f)
			if f == "snapshots" {
				copyDir(t, from, to)
				continue
			}
			b, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(to, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if tc.logs != nil {
			b, err := seglog.Open(filepath.Join(c.Dir, "blocks"), seglog.Options{})
			if err != nil {
				t.Fatal(err)
			}
			p, err := seglog.Open(filepath.Join(c.Dir, "payloads"), seglog.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := tc.logs(b, p); err != nil {
				t.Fatal(err)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
		}
		n = openTest(t, c)
		if n.height() != 0 || n.store.height() != 0 || !n.whole() {
			t.Errorf("%s: got height %d of %d, want nothing", tc.name, n.height(), n.store.height())
		}
		h.run(h.leaping(n))
		h.caughtUp(n)
		if n.store.first() == 1 {
			t.Errorf("%s: every header was fetched", tc.name)
		}
	}
	// A folder whose base is gone or another's is not guessed at.
	for name, b := range map[string][]byte{"gone": nil, "another": append([]byte{7: 9}, k.state.tree.Marshal()...), "short": {1}} {
		c := h.c
		c.Dir = t.TempDir()
		copyDir(t, filepath.Dir(k.succession.path), c.Dir)
		err := os.Remove(filepath.Join(c.Dir, baseFile))
		if b != nil {
			err = os.WriteFile(filepath.Join(c.Dir, baseFile), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openCore(c, smartCodec{}, &counters{}); err == nil || !strings.Contains(err.Error(), "base") {
			t.Errorf("base %s: got %v, want the file named", name, err)
		}
	}
}

// Whatever one peer of f says, a newcomer begins with the true state or goes the
// long way; and those who were revoked, however many, plant nothing.
func TestALiarPlantsNoBeginning(t *testing.T) {
	long(t)
	h := generations(t)
	forged := forgedState(t, h)
	digest := sha256.Sum256(forged)
	plant := func(p uint64) func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
		return func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
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
	steps := func(f func(s [][]byte) [][]byte) func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
		return func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
			if req.Steps {
				resp.Steps = f(resp.Steps)
			}
			return nil
		}
	}
	blocks := func(f func(m *pb.Block, first bool)) func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
		return func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
			for _, m := range resp.Blocks {
				f(m, !req.Headers)
			}
			return nil
		}
	}
	type lie = func(req *pb.SyncRequest, resp *pb.SyncResponse) error
	for _, tc := range []struct {
		name  string
		lies  map[uint64]lie
		false uint64 // answers, at least
	}{
		{"the old set's f+1, revoked", map[uint64]lie{2: plant(2), 3: plant(3)}, 0},
		{"another state", map[uint64]lie{4: plant(4)}, 0},
		{"an old succession", map[uint64]lie{4: steps(func(s [][]byte) [][]byte { return s[:1] })}, 0},
		{"no succession", map[uint64]lie{4: steps(func(s [][]byte) [][]byte { return nil })}, 0},
		{"a broken succession", map[uint64]lie{4: steps(func(s [][]byte) [][]byte { return s[1:] })}, 1},
		{"no succession at all", map[uint64]lie{4: steps(func(s [][]byte) [][]byte { return [][]byte{[]byte("junk")} })}, 1},
		{"a succession of its own", map[uint64]lie{4: steps(func(s [][]byte) [][]byte {
			var x ledger.Step
			if err := json.Unmarshal(s[0], &x); err != nil {
				t.Error(err)
			}
			x.Votes = x.Votes[:2]
			b, err := json.Marshal(x)
			if err != nil {
				t.Error(err)
			}
			return append([][]byte{b}, s[1:]...)
		})}, 1},
		{"a first block without votes", map[uint64]lie{4: blocks(func(m *pb.Block, first bool) { m.Votes = nil })}, 1},
		{"a first block with other leaves", map[uint64]lie{4: blocks(func(m *pb.Block, first bool) { m.Leaves[5] ^= 1 })}, 1},
		{"a first block with other verdicts", map[uint64]lie{4: blocks(func(m *pb.Block, first bool) { m.Verdicts = []byte{0} })}, 1},
		{"a first block with another payload", map[uint64]lie{4: blocks(func(m *pb.Block, first bool) {
			if first {
				m.Batches = [][]byte{[]byte("x")}
			}
		})}, 1},
		{"another second block", map[uint64]lie{4: blocks(func(m *pb.Block, first bool) {
			if !first {
				m.Votes = m.Votes[:1]
			}
		})}, 1},
		{"silence", map[uint64]lie{4: func(*pb.SyncRequest, *pb.SyncResponse) error { return errLost }}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := &history{t: t, c: h.c, k: h.k, lies: tc.lies}
			_, k := h.newcomer()
			h.run(h.leaping(k))
			h.caughtUp(k)
			if k.state.devices.Quarantined("d1") {
				t.Error("the forged state was taken")
			}
			if got := k.count.stats().FalseAnswers; got < tc.false || tc.false == 0 && got != 0 {
				t.Errorf("counted %d false answers, want %d", got, tc.false)
			}
			if k.store.first() == 1 {
				t.Error("went the long way, with all others honest")
			}
		})
	}
	// f+1 of those in force are more than may lie; even they cannot make others the
	// validators.
	t.Run("others as validators", func(t *testing.T) {
		list := h.k.shelf.all()
		raw, err := h.k.shelf.load(list[len(list)-1].height)
		if err != nil {
			t.Fatal(err)
		}
		st, _, err := newState(h.c.Genesis)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.unmarshal(raw); err != nil {
			t.Fatal(err)
		}
		st.registry, _, err = registryOfGenesis(h.c.Genesis)
		if err != nil {
			t.Fatal(err)
		}
		planted, err := st.marshal()
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(planted)
		h := &history{t: t, c: h.c, k: h.k, lies: map[uint64]lie{}}
		for _, p := range []uint64{4, 5, 6, 7} {
			h.lies[p] = func(req *pb.SyncRequest, resp *pb.SyncResponse) error {
				for _, o := range resp.Offers {
					o.Digest, o.Size = sum[:], uint64(len(planted))
					sign(o, voteKey(p))
				}
				if bytes.Equal(req.Snapshot, sum[:]) {
					resp.Part, resp.Size = planted[req.Offset:], uint64(len(planted))
				}
				return nil
			}
		}
		_, k := h.newcomer()
		if done, err := h.leaping(k).leap(t.Context()); done || err != nil || k.store.height() != 0 {
			t.Errorf("got %v, %v with %d blocks, want it refused", done, err, k.store.height())
		}
	})
}

func registryOfGenesis(genesis []byte) (*identity.Registry, *identity.Genesis, error) {
	g, err := identity.ParseGenesis(genesis)
	if err != nil {
		return nil, nil, err
	}
	r, err := identity.NewRegistry(g)
	return r, g, err
}
