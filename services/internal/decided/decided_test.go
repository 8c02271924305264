package decided

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

func toProto(b *ledgertest.Block) *pb.Block {
	return wire.BlockToProto(&b.Block, b.Batches, b.Verdicts)
}

// clone returns a copy of the wire form that a test may spoil.
func clone(b *ledgertest.Block) *pb.Block { return proto.Clone(toProto(b)).(*pb.Block) }

func TestTake(t *testing.T) {
	d := ledgertest.New("decided", 4)
	c := d.NewChain().Fill(3)
	ch := NewChain(d.GenesisHash, d.Validators, nil)
	for i, lb := range c.Blocks {
		b, err := ch.Take(toProto(lb), false)
		if err != nil {
			t.Fatalf("block %d: %v", i+1, err)
		}
		var accepted []uint64
		for k, r := range b.Records {
			if r.Accepted == lb.Records[k].Refused {
				t.Errorf("block %d record %d: accepted %v, want the opposite", i+1, k, r.Accepted)
			}
			if r.Accepted {
				accepted = append(accepted, r.Index)
			}
		}
		p := lb.Header.PrevSize
		if got, want := fmt.Sprint(accepted), fmt.Sprint([]uint64{p + 1, p + 2, p + 3}); got != want {
			t.Errorf("block %d: got leaf indexes %s, want %s", i+1, got, want)
		}
	}
	if got := ch.Point(); got.Header.Height != 3 || got.Tree.Root() != c.Blocks[2].Header.Root {
		t.Errorf("point: got height %d, want 3 with its root", got.Header.Height)
	}
}

// TestTakeRefuses spoils a copy of block 2 in one way at a time.
func TestTakeRefuses(t *testing.T) {
	d := ledgertest.New("decided", 4)
	c := d.NewChain().Fill(3)
	first, second := c.Blocks[0], c.Blocks[1]
	other := ledgertest.New("other", 4).NewChain().Fill(2).Blocks[1]
	weak := d.NewChain()
	weak.Voters = []int{0, 1}
	weak.Fill(2)
	swapped := d.NewChain()
	swapped.Fill(2)
	for _, tc := range []struct {
		name, want string
		spoil      func(m *pb.Block)
	}{
		{"header of nothing", "header", func(m *pb.Block) { m.Header = nil }},
		{"height", "height", func(m *pb.Block) { *m = *clone(c.Blocks[2]) }},
		{"other district", "another district", func(m *pb.Block) { *m = *clone(other) }},
		{"leaf", "leaves", func(m *pb.Block) { m.Leaves[40] ^= 1 }},
		{"leaf left out", "size", func(m *pb.Block) { m.Leaves = m.Leaves[:len(m.Leaves)-ledger.LeafSize] }},
		{"vote", "votes", func(m *pb.Block) { m.Votes[0].Signature[0] ^= 1; m.Votes = m.Votes[:3] }},
		{"votes of one", "votes", func(m *pb.Block) { m.Votes[1], m.Votes[2], m.Votes[3] = m.Votes[0], m.Votes[0], m.Votes[0] }},
		{"two voters", "votes", func(m *pb.Block) { *m = *clone(weak.Blocks[1]) }},
		{"metadata", "votes", func(m *pb.Block) { m.Metadata = []byte("view 1") }},
		{"batch", "batches", func(m *pb.Block) { m.Batches[0][20] ^= 1 }},
		{"batch left out", "batches", func(m *pb.Block) { m.Batches = m.Batches[:1] }},
		{"batches in other order", "batches", func(m *pb.Block) { m.Batches[0], m.Batches[1] = m.Batches[1], m.Batches[0] }},
		{"verdicts", "verdicts", func(m *pb.Block) { m.Verdicts[0] ^= 1 }},
		{"no payload", "payload", func(m *pb.Block) { m.Batches = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ch := NewChain(d.GenesisHash, d.Validators, nil)
			if _, err := ch.Take(toProto(first), false); err != nil {
				t.Fatal(err)
			}
			m := clone(second)
			tc.spoil(m)
			if _, err := ch.Take(m, false); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error about %q", err, tc.want)
			}
			if _, err := ch.Take(toProto(second), false); err != nil {
				t.Errorf("the good copy after it: got %v, want none", err)
			}
		})
	}
	// What a quorum signed may still carry leaves that are not its records'; a
	// payload that does not fit is not handed out.
	bad := d.NewChain()
	bad.Fill(1)
	blk := bad.Blocks[0]
	blk.Leaves[1].Commitment[0] ^= 1
	var tree ledger.Frontier
	tree.Append(blk.Leaves)
	blk.Header.Leaves, blk.Header.Root = ledger.LeavesDigest(blk.Leaves), tree.Root()
	bad.Vote(blk)
	if _, err := NewChain(d.GenesisHash, d.Validators, nil).Take(toProto(blk), false); err == nil || !strings.Contains(err.Error(), "does not match leaf 1") {
		t.Errorf("leaf of another record: got %v, want an error that names the leaf", err)
	}
}

func publish(t *testing.T, b *bus.Bus, d *ledgertest.District, validator uint64, m *pb.Block) {
	t.Helper()
	raw := wire.EncodeBlock(m)
	if err := b.Publish(t.Context(), topic.Decision(d.ID, validator), "", raw); err != nil {
		t.Fatal(err)
	}
}

// follow collects heights until it has n blocks.
func follow(t *testing.T, c Config, n int) []*Block {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := errors.New("done")
	var out []*Block
	err := Follow(ctx, c, func(_ context.Context, b *Block) error {
		out = append(out, b)
		if len(out) == n {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatalf("follow: got %d blocks, %v, want %d", len(out), err, n)
	}
	return out
}

func checkHeights(t *testing.T, bs []*Block, from ledger.Height) {
	t.Helper()
	for i, b := range bs {
		if b.Header.Height != from+ledger.Height(i) {
			t.Fatalf("block %d: got height %d, want %d", i, b.Header.Height, from+ledger.Height(i))
		}
	}
}

func TestFollowTakesFirstValidCopy(t *testing.T) {
	d := ledgertest.New("decided", 4)
	c := d.NewChain().Fill(4)
	b := servicetest.District(t, d.ID)
	for i, blk := range c.Blocks {
		junk := clone(blk)
		junk.Batches[0][9] ^= 1
		publish(t, b, d, 1, junk) // validator 1 lies each time
		if i%2 == 0 {
			if err := b.Publish(t.Context(), topic.Decision(d.ID, 1), "", []byte("junk")); err != nil {
				t.Fatal(err)
			}
		}
		for v := uint64(2); v <= 4; v++ {
			publish(t, b, d, v, toProto(blk))
		}
	}
	var st Stats
	got := follow(t, Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators, Stats: &st, Logger: servicetest.Logger(t)}, 4)
	checkHeights(t, got, 1)
	if st.Junk.Load() != 6 || st.Synced.Load() != 0 {
		t.Errorf("got %d junk and %d synced, want 6 and 0", st.Junk.Load(), st.Synced.Load())
	}
}

// serveSync answers sync requests as a validator does.
func serveSync(t *testing.T, b *bus.Bus, d *ledgertest.District, v uint64, answer func(from uint64) *pb.SyncResponse) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- b.Serve(ctx, topic.Sync(d.ID, v), "", func(_ context.Context, m *bus.Msg) []byte {
			var req pb.SyncRequest
			if err := proto.Unmarshal(m.Data, &req); err != nil {
				return nil
			}
			out, err := proto.Marshal(answer(req.FromHeight))
			if err != nil {
				return nil
			}
			return out
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("answering: %v", err)
		}
	})
}

func TestFollowFillsGapsFromValidators(t *testing.T) {
	d := ledgertest.New("decided", 4)
	c := d.NewChain().Fill(8)
	b := servicetest.District(t, d.ID)
	answer := func(spoil func(m *pb.Block)) func(uint64) *pb.SyncResponse {
		return func(from uint64) *pb.SyncResponse {
			r := &pb.SyncResponse{LastHeight: 8}
			for _, blk := range c.Blocks {
				if uint64(blk.Header.Height) >= from && len(r.Blocks) < 3 {
					m := clone(blk)
					spoil(m)
					r.Blocks = append(r.Blocks, m)
				}
			}
			return r
		}
	}
	serveSync(t, b, d, 1, answer(func(m *pb.Block) { m.Leaves[3] ^= 1 })) // lies
	serveSync(t, b, d, 2, answer(func(m *pb.Block) { m.Batches = nil }))  // has purged
	serveSync(t, b, d, 4, answer(func(m *pb.Block) {}))                   // 3 does not answer
	publish(t, b, d, 3, toProto(c.Blocks[0]))
	publish(t, b, d, 3, toProto(c.Blocks[6]))
	var st Stats
	got := follow(t, Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators, Stats: &st, GapWait: 10 * time.Millisecond, Logger: servicetest.Logger(t)}, 7)
	checkHeights(t, got, 1)
	for _, blk := range got {
		if blk.Purged {
			t.Errorf("block %d: came without payload, validator 4 has it", blk.Header.Height)
		}
	}
	if st.Junk.Load() == 0 || st.Synced.Load() < 5 {
		t.Errorf("got %d junk and %d synced, want some and at least 5", st.Junk.Load(), st.Synced.Load())
	}
}

// TestFollowResumes begins after block 2 with a stream that holds nothing: the
// validators have all that follows, and the payload of block 4 is gone.
func TestFollowResumes(t *testing.T) {
	d := ledgertest.New("decided", 4)
	c := d.NewChain().Fill(5)
	b := servicetest.District(t, d.ID)
	for v := uint64(1); v <= 4; v++ {
		serveSync(t, b, d, v, func(from uint64) *pb.SyncResponse {
			r := &pb.SyncResponse{LastHeight: 5}
			for _, blk := range c.Blocks[from-1:] {
				m := toProto(blk)
				if blk.Header.Height == 4 {
					m.Batches = nil
				}
				r.Blocks = append(r.Blocks, m)
			}
			return r
		})
	}
	var tree ledger.Frontier
	tree.Append(c.Blocks[0].Leaves)
	tree.Append(c.Blocks[1].Leaves)
	got := follow(t, Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators,
		Resume: &Point{Header: c.Blocks[1].Header, Tree: &tree}, GapWait: 10 * time.Millisecond, Logger: servicetest.Logger(t)}, 3)
	checkHeights(t, got, 3)
	if got[0].Purged || !got[1].Purged || got[2].Purged {
		t.Errorf("got purged %v %v %v, want only block 4", got[0].Purged, got[1].Purged, got[2].Purged)
	}
}

// TestFollowEnds ends with its context, without an error, also while there is
// no stream.
func TestFollowEnds(t *testing.T) {
	d := ledgertest.New("decided", 4)
	b := servicetest.Connect(t, servicetest.NATS(t))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := Follow(ctx, Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators},
		func(context.Context, *Block) error { return nil })
	if err != nil {
		t.Errorf("got %v, want no error", err)
	}
}
