package consensus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Where more than f validators lie, two blocks can be decided at one height, and
// the chains on both sides go on from there. Nobody can prevent that; but as soon
// as one honest validator of each side can reach another, both know, and have it
// in writing. So each compares its chain with those of its peers, now and then:
// two chains that ever parted differ at every height after.

// compare runs until ctx ends.
func (v *Validator) compare(ctx context.Context) error {
	for {
		if err := pause(ctx, v.c.Timing.Compare); err != nil {
			return err
		}
		m := v.core.members()
		for _, peer := range m.numbers() {
			if peer == v.c.Number {
				continue
			}
			if err := v.compareWith(ctx, peer); err != nil && ctx.Err() == nil {
				v.log.Debug("chain not compared", "peer", peer, "err", err)
			}
			if err := v.seals.exchange(ctx, peer); err != nil && ctx.Err() == nil {
				v.log.Debug("seals not compared", "peer", peer, "err", err)
			}
		}
	}
}

// compareWith looks for the first height at which a peer can show another
// decided block, and accuses whoever voted for both.
func (v *Validator) compareWith(ctx context.Context, peer uint64) error {
	top := v.core.store.height()
	if top == 0 {
		return nil
	}
	theirs, last, err := v.blockOf(ctx, peer, top)
	if err != nil {
		return err
	}
	if theirs == nil { // it is behind
		if top = min(last, top); top == 0 {
			return nil
		}
		if theirs, _, err = v.blockOf(ctx, peer, top); err != nil || theirs == nil {
			return err
		}
	}
	ours, same, err := v.sameAs(theirs)
	if err != nil || same {
		return err
	}
	// They differ at top, and are the same at low: at genesis, or where this
	// validator began, as a quorum had decided that.
	for low := v.core.store.first() - 1; top-low > 1; {
		mid := low + (top-low)/2
		b, _, err := v.blockOf(ctx, peer, mid)
		if err != nil {
			return err
		}
		if b == nil {
			return fmt.Errorf("block %d: it has later ones", mid)
		}
		o, same, err := v.sameAs(b)
		switch {
		case err != nil:
			return err
		case same:
			low = mid
		default:
			top, theirs, ours = mid, b, o
		}
	}
	v.count.forks.Add(1)
	news, err := v.accuseBlocks(ours, theirs)
	if news {
		v.log.Error("two blocks were decided at one height: more validators lie than may", "height", uint64(top), "peer", peer)
	}
	return err
}

// sameAs compares a block with ours of its height.
func (v *Validator) sameAs(b *ledger.Block) (ours *ledger.Block, same bool, err error) {
	own, err := v.core.store.headers(b.Header.Height)
	if err != nil {
		return nil, false, err
	}
	if ours, err = wire.BlockFromProto(own); err != nil {
		return nil, false, err
	}
	return ours, ours.Header == b.Header, nil
}

// blockOf asks a peer for one block, without payload, and verifies its votes by
// the members who decide that height here. It returns nil where the peer has none yet, and the
// height that it is at.
func (v *Validator) blockOf(ctx context.Context, peer uint64, h ledger.Height) (*ledger.Block, ledger.Height, error) {
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(h), MaxBlocks: 1, Headers: true})
	if err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, v.c.Timing.Fetch)
	defer cancel()
	data, err := v.newFetcher().ask(ctx, peer, req)
	if err != nil {
		return nil, 0, err
	}
	var resp pb.SyncResponse
	if err := wire.Decode(identity.Protobuf, data, &resp); err != nil {
		return nil, 0, err
	}
	if len(resp.Blocks) == 0 {
		return nil, ledger.Height(resp.LastHeight), nil
	}
	b, err := wire.BlockFromProto(resp.Blocks[0])
	if err != nil {
		return nil, 0, err
	}
	if b.Header.Height != h || b.Header.Genesis != v.core.state.genesis {
		return nil, 0, errors.New("not the block that was asked for")
	}
	if err := ledger.CheckVotes(b.Header.Hash(), b.Metadata, b.Votes, v.core.succession.at(h).Validators); err != nil {
		// Decided by other members, or not at all.
		return nil, 0, err
	}
	return b, ledger.Height(resp.LastHeight), nil
}

// compareEvery is how often, unless configured.
const compareEvery = 2 * time.Second
