package decided

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Validators keep registry records for good, so a block without its payload has
// changed no registry. Where one did all the same, because nobody could be
// reached who has it whole, the header after it names the registry's hash with a
// quorum's votes, and whoever has that registry can be asked for it.

// blindError means that the records are missing that made the registry which a
// verified header names.
type blindError struct {
	height   ledger.Height
	registry ledger.Hash
}

func (e *blindError) Error() string {
	return fmt.Sprintf("block %d: registry_version: the block before has changed the registry, and its records were left out", e.height)
}

// maxRegistry bounds a registry, bytes.
const maxRegistry = 512 << 20

// take verifies a block as [Chain.Take] does, and fetches the registry where its
// records are missing.
func (fl *follower) take(ctx context.Context, m *pb.Block, purged bool) (*Block, error) {
	b, err := fl.chain.Take(m, purged)
	var blind *blindError
	if !errors.As(err, &blind) {
		return b, err
	}
	// The header is not verified yet, and would bring its own verifiers: an honest
	// one of those in force so far must have voted for it. Of these at most one is
	// not in the set that follows.
	if lb, perr := wire.BlockFromProto(m); perr != nil {
		return nil, perr
	} else if n := len(ledger.ValidVotes(lb.Header.Hash(), lb.Metadata, lb.Votes, fl.chain.validators)); n <= ledger.Faults(len(fl.chain.validators)) {
		return nil, fmt.Errorf("%w; %d of the validators before it have voted for this block", err, n)
	}
	reg, ferr := fl.registry(ctx, blind.registry)
	if ferr != nil {
		return nil, errors.Join(err, ferr)
	}
	before := fl.chain.validators
	fl.chain.validators, fl.chain.blind = reg.Validators(), false
	if b, err = fl.chain.Take(m, purged); err != nil {
		fl.chain.validators, fl.chain.blind = before, true
		return nil, err
	}
	fl.Logger.Warn("decided: registry records are gone; the registry came from a validator", "height", uint64(blind.height), "version", reg.Version())
	if b.Registry = reg; b.Validators == nil {
		b.Validators = fl.chain.validators // whoever counts them has missed a change
	}
	return b, nil
}

// registry asks one validator after another for the registry with a hash, until
// one gives it.
func (fl *follower) registry(ctx context.Context, hash ledger.Hash) (*identity.Registry, error) {
	var errs []error
	for _, v := range fl.chain.validators {
		reg, err := fl.registryFrom(ctx, v.Number, hash)
		if err == nil {
			return reg, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		errs = append(errs, fmt.Errorf("registry %x from validator %d: %w", hash[:8], v.Number, err))
	}
	return nil, errors.Join(errs...)
}

func (fl *follower) registryFrom(ctx context.Context, v uint64, hash ledger.Hash) (*identity.Registry, error) {
	var b []byte
	for size := uint64(1); uint64(len(b)) < size; {
		req, err := proto.Marshal(&pb.SyncRequest{Registry: hash[:], Offset: uint64(len(b))})
		if err != nil {
			return nil, err
		}
		rctx, cancel := context.WithTimeout(ctx, syncTimeout)
		data, err := fl.Bus.Request(rctx, topic.Sync(fl.District, v), req)
		cancel()
		if err != nil {
			return nil, err
		}
		var resp pb.SyncResponse
		if err := wire.Decode(identity.Protobuf, data, &resp); err != nil {
			return nil, err
		}
		switch {
		case len(resp.Part) == 0:
			return nil, kind.Errorf(kind.NotFound, "it is not there")
		case resp.Size > maxRegistry || uint64(len(b)+len(resp.Part)) > resp.Size:
			return nil, fmt.Errorf("size: %d bytes, must be at least the %d that came, and at most %d", resp.Size, len(b)+len(resp.Part), maxRegistry)
		}
		size = resp.Size
		b = append(b, resp.Part...)
	}
	reg, err := identity.ParseSnapshot(b)
	if err != nil {
		return nil, err
	}
	if got := reg.Hash(); !bytes.Equal(got[:], hash[:]) {
		return nil, fmt.Errorf("hash: %x", got[:8])
	}
	if reg.District() != fl.District {
		return nil, fmt.Errorf("district: %q", reg.District())
	}
	return reg, nil
}
