package agreed

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// serve answers for a validator that has no payload of the first blocks. reg is
// what it answers for a registry; parts are small.
func (w *world) serve(v uint64, purged int, reg []byte) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() {
		done <- w.bus.Serve(ctx, topic.Sync(w.ID, v), "", func(_ context.Context, m *bus.Msg) []byte {
			var req pb.SyncRequest
			if err := proto.Unmarshal(m.Data, &req); err != nil {
				return nil
			}
			resp := &pb.SyncResponse{LastHeight: uint64(len(w.Blocks))}
			if len(req.Registry) > 0 {
				if req.Offset < uint64(len(reg)) {
					resp.Part, resp.Size = reg[req.Offset:min(uint64(len(reg)), req.Offset+100)], uint64(len(reg))
				}
			} else {
				for i := int(req.FromHeight) - 1; i < len(w.Blocks); i++ {
					b := w.Blocks[i]
					p := wire.BlockToProto(&b.Block, b.Batches, b.Verdicts)
					if i < purged {
						p.Batches = nil
					}
					resp.Blocks = append(resp.Blocks, p)
				}
			}
			out, err := proto.Marshal(resp)
			if err != nil {
				return nil
			}
			return out
		})
	}()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			w.t.Errorf("answering: %v", err)
		}
	})
}

// TestRegistryRecordsAreGone: a follower that begins at genesis, where the
// payloads of blocks that changed the registry are gone everywhere, gets the
// registry by the hash in the next header. Validators that give another, or none,
// are passed over.
func TestRegistryRecordsAreGone(t *testing.T) {
	w := newWorld(t)
	w.Decide([]ledgertest.Record{w.frame(1)})
	w.Decide([]ledgertest.Record{w.file(1, "a", `{}`)})
	w.Decide([]ledgertest.Record{w.frame(2)})
	w.Decide([]ledgertest.Record{w.file(2, "b", `{}`), w.frame(3)})
	w.Decide([]ledgertest.Record{w.frame(4)})
	w.serve(1, 2, nil)
	w.serve(2, 2, w.Judged[0].Snapshot()) // another than the one asked for
	w.serve(3, 2, []byte("no registry"))
	run := func() (map[ledger.Height]ledger.Hash, *State, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		s := w.open("")
		c := w.config()
		c.IdleWait = 20 * time.Millisecond
		got := map[ledger.Height]ledger.Hash{}
		err := s.Run(ctx, c, func(_ context.Context, b *decided.Block, reg *identity.Registry) error {
			got[b.Header.Height] = ledger.Hash(reg.Hash())
			if b.Header.Height == 5 {
				cancel()
			}
			return nil
		})
		return got, s, err
	}
	if got, _, err := run(); err != nil || len(got) != 2 {
		t.Errorf("without anybody who has the registry: got %d blocks, %v, want the 2 before it is needed", len(got), err)
	}
	w.serve(4, 2, w.Judged[2].Snapshot())
	got, s, err := run()
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range w.Blocks {
		if got[b.Header.Height] != b.Header.Registry {
			t.Errorf("block %d: judged by registry %x, want %x", i+1, got[b.Header.Height], b.Header.Registry)
		}
	}
	if !has(s.Registry(), "a") || !has(s.Registry(), "b") {
		t.Error("the registry is without what the records filed")
	}
}
