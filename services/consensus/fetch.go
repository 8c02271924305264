package consensus

import (
	"context"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Bounds of one answer with blocks.
const (
	syncBlocks = 256
	syncBytes  = topic.MaxMessage - (64 << 10)
)

// serveBlocks answers anyone who asks for decided blocks: they prove themselves.
func (v *Validator) serveBlocks(ctx context.Context) error {
	return v.c.Bus.Serve(ctx, topic.Sync(v.c.District, v.c.Number), "", func(ctx context.Context, m *bus.Msg) []byte {
		var req pb.SyncRequest
		if err := wire.Decode(identity.Protobuf, m.Data, &req); err != nil {
			v.count.invalid.Add(1)
			return nil
		}
		most, bytes := syncBlocks, syncBytes
		if n := int(req.MaxBlocks); n > 0 {
			most = min(most, n)
		}
		if n := int(req.MaxBytes); n > 0 {
			bytes = min(bytes, n)
		}
		blocks, err := v.core.blocks(ctx, ledger.Height(req.FromHeight), most, bytes)
		if err != nil {
			v.log.Error("cannot read blocks for a peer", "height", req.FromHeight, "err", err)
			return nil
		}
		b, err := proto.Marshal(&pb.SyncResponse{Blocks: blocks, LastHeight: uint64(v.core.store.height())})
		if err != nil {
			v.log.Error("cannot answer a peer", "err", err)
			return nil
		}
		return b
	})
}

// fetch gets from peers what they have decided beyond this validator, checks it
// and applies it, until every peer that answers has no more. False blocks are
// left out: each is checked with its votes and executed.
//
// It is called by the engine, which never decides beside it, and before the
// engine starts.
func (v *Validator) fetch(ctx context.Context) {
	v.count.syncs.Add(1)
	from := v.core.height()
	for ctx.Err() == nil && v.fetchOnce(ctx) {
	}
	if h := v.core.height(); h > from {
		v.log.Info("caught up", "height", uint64(h), "blocks", uint64(h-from))
	}
}

// fetchOnce asks every peer once, and reports whether there was progress.
func (v *Validator) fetchOnce(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, v.c.Timing.Fetch)
	defer cancel()
	next := v.core.height() + 1
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(next)})
	if err != nil {
		return false // unreachable: there is nothing in it that cannot be encoded
	}
	type answer struct {
		from uint64
		resp *pb.SyncResponse
	}
	answers := make(chan answer, len(v.core.validators))
	asked := 0
	for _, val := range v.core.validators {
		if val.Number == v.c.Number || v.cut != nil && v.cut(val.Number) {
			continue
		}
		asked++
		go func() {
			var resp pb.SyncResponse
			b, err := v.c.Bus.Request(ctx, topic.Sync(v.c.District, val.Number), req)
			if err == nil {
				err = wire.Decode(identity.Protobuf, b, &resp)
			}
			if err != nil {
				answers <- answer{val.Number, nil}
				return
			}
			answers <- answer{val.Number, &resp}
		}()
	}
	for range asked {
		a := <-answers
		if a.resp == nil {
			continue
		}
		n := 0
		for _, m := range a.resp.Blocks {
			if _, err := v.core.applyBlock(m, true); err != nil {
				v.log.Warn("a peer's block was refused", "peer", a.from, "err", err)
				break
			}
			n++
		}
		if n > 0 {
			v.count.synced.Add(uint64(n))
			return true // ask for more at once; the other answers are for the same
		}
	}
	return false
}
