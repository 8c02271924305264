package consensus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// cosigner signs checkpoints of this validator's own log, and only such as end a
// block that it has decided. The last one is durable before the answer leaves,
// so that two inconsistent cosignatures cannot be had from it, however often it
// restarts.
type cosigner struct {
	v    *Validator
	log  *seglog.Log
	last cosigned
}

type cosigned struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"`
}

func openCosigner(v *Validator) (*cosigner, error) {
	l, err := seglog.Open(filepath.Join(v.c.Dir, "cosigned"), seglog.Options{SegmentBytes: 1 << 20})
	if err != nil {
		return nil, err
	}
	c := &cosigner{v: v, log: l}
	if l.Next() > l.First() {
		b, err := l.Read(l.Next() - 1)
		if err == nil {
			err = json.Unmarshal(b, &c.last)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("cosigned: %w", err), l.Close())
		}
	}
	return c, nil
}

func (c *cosigner) run(ctx context.Context) error {
	return c.v.c.Bus.Serve(ctx, topic.Cosign(c.v.c.District, c.v.c.Number), "", func(_ context.Context, m *bus.Msg) []byte {
		resp := &pb.CosignResponse{}
		line, err := c.cosign(m.Data)
		if err != nil {
			c.v.count.cosignRefused.Add(1)
			resp.Refused = err.Error()
		} else {
			c.v.count.cosigned.Add(1)
			resp.SignatureLine = []byte(line)
		}
		b, err := proto.Marshal(resp)
		if err != nil {
			c.v.log.Error("cannot answer sealing", "err", err)
			return nil
		}
		return b
	})
}

// cosign is called by one goroutine.
func (c *cosigner) cosign(data []byte) (string, error) {
	var req pb.CosignRequest
	if err := wire.Decode(identity.Protobuf, data, &req); err != nil {
		return "", err
	}
	cp, err := ledger.ParseCheckpoint(string(req.Body))
	if err != nil {
		return "", err
	}
	origin := c.v.core.genesis.Origin
	if cp.Origin != origin {
		return "", fmt.Errorf("checkpoint: origin: %.80q, this log is %q", cp.Origin, origin)
	}
	h, err := c.v.core.store.header(ledger.Height(req.Height))
	if err != nil {
		return "", fmt.Errorf("height: %d has not been decided here", req.Height)
	}
	if cp.Size != h.Size || cp.Root != h.Root {
		return "", fmt.Errorf("checkpoint: size, root: are not those after block %d", req.Height)
	}
	if cp.Size < c.last.Size {
		return "", fmt.Errorf("checkpoint: size: %d, %d was cosigned before", cp.Size, c.last.Size)
	}
	if cp.Size == c.last.Size && string(cp.Root[:]) != string(c.last.Root) {
		return "", fmt.Errorf("checkpoint: root: another was cosigned for size %d", cp.Size)
	}
	if cp.Size > c.last.Size {
		next := cosigned{cp.Size, cp.Root[:]}
		b, err := json.Marshal(next)
		if err != nil {
			return "", err
		}
		i, err := c.log.Append(b)
		if err != nil {
			return "", errors.New("not durable: try again after a restart")
		}
		if err := c.log.DropBefore(i); err != nil {
			c.v.log.Warn("old cosignatures not dropped", "err", err)
		}
		c.last = next
	}
	return ledger.Cosign(ledger.CosignerName(origin, c.v.c.Number), c.v.core.cosignKey(ledger.Height(req.Height)), string(req.Body), c.v.c.Now())
}
