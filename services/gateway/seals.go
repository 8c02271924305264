package gateway

import (
	"crypto/ed25519"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// council is a set of validators: who cosigns checkpoints of the blocks after
// one.
type council struct {
	since      ledger.Height
	validators []identity.Validator
	cosigners  []note.Verifier
}

// open makes the cosigners.
func (c *council) open(d traffic.DistrictID) error {
	for _, v := range c.validators {
		k, err := ledger.NewCosigner(ledger.CosignerName(ledger.Origin(d), v.Number), ed25519.PublicKey(v.CosignKey))
		if err != nil {
			return fmt.Errorf("validator %d: %w", v.Number, err)
		}
		c.cosigners = append(c.cosigners, k)
	}
	return nil
}

// cosigners are those of the log after a block, as far as is known here.
func (g *Gateway) cosigners(h ledger.Height) []note.Verifier {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := len(g.councils) - 1
	for i > 0 && g.councils[i].since >= h {
		i--
	}
	return g.councils[i].cosigners
}

// openSeal decodes an announced seal and checks that a quorum of validators has
// cosigned its checkpoint. Its height and time are the sender's word.
func (g *Gateway) openSeal(data []byte) (*pb.Seal, error) {
	var s pb.Seal
	if err := wire.Decode(identity.Protobuf, data, &s); err != nil {
		return nil, err
	}
	if len(s.Checkpoint) > ledger.MaxNote {
		return nil, fmt.Errorf("checkpoint: %d bytes, at most %d are taken", len(s.Checkpoint), ledger.MaxNote)
	}
	cosigners := g.cosigners(ledger.Height(s.Height))
	n, err := note.Open(s.Checkpoint, note.VerifierList(cosigners...))
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	c, err := ledger.ParseCheckpoint(n.Text)
	if err != nil {
		return nil, err
	}
	if origin := ledger.Origin(g.cfg.District); c.Origin != origin || c.Size != s.Size {
		return nil, fmt.Errorf("checkpoint: of %s at %d, announced as %s at %d", c.Origin, c.Size, origin, s.Size)
	}
	// Open has left out signatures that name one key twice.
	if q := ledger.Quorum(len(cosigners)); len(n.Sigs) < q {
		return nil, fmt.Errorf("checkpoint: cosigned by %d validators, %d are needed", len(n.Sigs), q)
	}
	return &s, nil
}

func (g *Gateway) seal(data []byte) {
	s, err := g.openSeal(data)
	if err != nil {
		g.log.Warn("seal refused", "err", err)
		return
	}
	now := g.cfg.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if s.Size <= g.sealed.Size {
		return
	}
	g.sealed = SealView{Height: s.Height, Size: s.Size, Time: time.Unix(0, s.SealedUnixNano).UTC()}
	n := 0
	for _, p := range g.unsealed {
		if p.index < s.Size {
			g.sealing.add(now.Sub(p.at))
			continue
		}
		g.unsealed[n] = p
		n++
	}
	g.unsealed = g.unsealed[:n]
	for _, j := range g.junctions {
		j.prove(s.Size)
	}
	g.changed()
}

// proof is a command that waits for evidence: its leaf, and the log's size after
// its block. A larger sealed log has the next block's first leaf, the header.
type proof struct{ index, end uint64 }

// keepProofs bounds commands that wait for a seal at one junction, if sealing
// stands still; the oldest is forgotten first.
const keepProofs = 256

// commanded notes the newest command.
func (j *JunctionView) commanded(rule string, p proof, sealed uint64) {
	j.Rule = rule
	if len(j.proofs) == keepProofs {
		j.proofs = append(j.proofs[:0], j.proofs[1:]...)
	}
	j.proofs = append(j.proofs, p)
	j.prove(sealed) // the seal may have been the quicker one
}

// prove finds the newest command that a log sealed at a size can prove.
func (j *JunctionView) prove(sealed uint64) {
	for len(j.proofs) > 0 && j.proofs[0].end < sealed {
		j.Evidence = j.proofs[0].index
		j.proofs = j.proofs[1:]
	}
}
