package consensus

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hyperledger-labs/SmartBFT/pkg/api"
	bft "github.com/hyperledger-labs/SmartBFT/pkg/consensus"
	"github.com/hyperledger-labs/SmartBFT/pkg/metrics/disabled"
	"github.com/hyperledger-labs/SmartBFT/pkg/types"
	"github.com/hyperledger-labs/SmartBFT/pkg/wal"
	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

// bareReplica is SmartBFT v1.0.1 and nothing else that could be left out: what
// our validators are measured against. It has the engine's own log on disk, with
// its syncs, votes signed and verified with Ed25519, and messages encoded and
// passed through channels. It looks into no request, keeps no block, and nobody
// reads what it decides.
type bareReplica struct {
	id      uint64
	all     []*bareReplica
	in      chan bareMessage
	engine  *bft.Consensus
	log     *wal.WriteAheadLogFile
	tickers []*time.Ticker
	// delivered hears of each request. Optional.
	delivered func(id [32]byte)

	mu   sync.Mutex
	last types.Decision
}

type bareMessage struct {
	from uint64
	body []byte
}

// newBare starts replicas with the limits that our validators give the engine.
func newBare(b *testing.B, n int, delivered func(id [32]byte)) (submit func(batch []byte), stop func()) {
	b.Helper()
	all := make([]*bareReplica, n)
	for i := range all {
		all[i] = &bareReplica{id: uint64(i + 1), all: all, in: make(chan bareMessage, 4096)}
	}
	all[0].delivered = delivered
	tm := Timing{}.withDefaults()
	zl := zap.NewNop().Sugar()
	ends := make(chan struct{})
	var wg sync.WaitGroup
	for _, r := range all {
		var err error
		r.log, err = wal.Create(zl, filepath.Join(b.TempDir(), fmt.Sprint("wal", r.id)), &wal.Options{
			FileSizeBytes: 64 << 20, BufferSizeBytes: 4 << 20, Metrics: wal.NewMetrics(&disabled.Provider{})})
		if err != nil {
			b.Fatal(err)
		}
		t1, t2 := time.NewTicker(tm.Tick), time.NewTicker(tm.Tick)
		r.tickers = []*time.Ticker{t1, t2}
		c := newSmart(nil, r.id, nil, tm, maxPayload(n), nil, nil).config
		// No losses are measured here: a leader is never suspected.
		c.RequestForwardTimeout, c.RequestComplainTimeout, c.LeaderHeartbeatTimeout = time.Minute, time.Minute, time.Minute
		r.engine = &bft.Consensus{
			Config: c, Application: r, Assembler: r, WAL: r.log, Comm: r, Signer: r, Verifier: r, MembershipNotifier: r,
			RequestInspector: r, Synchronizer: r, Logger: zl, Metrics: api.NewMetrics(&disabled.Provider{}),
			Metadata: &protos.ViewMetadata{}, Scheduler: t1.C, ViewChangerTicker: t2.C,
		}
	}
	for _, r := range all {
		if err := r.engine.Start(); err != nil {
			b.Fatal(err)
		}
		wg.Go(func() {
			for {
				select {
				case <-ends:
					return
				case m := <-r.in:
					msg := &protos.Message{}
					if err := proto.Unmarshal(m.body, msg); err != nil {
						b.Error(err)
						return
					}
					r.engine.HandleMessage(m.from, msg)
				}
			}
		})
	}
	submit = func(batch []byte) {
		for _, r := range all {
			if err := r.engine.SubmitRequest(batch); err != nil && err.Error() != "request already processed" {
				b.Errorf("submitting to replica %d: %v", r.id, err)
			}
		}
	}
	stop = func() {
		for _, r := range all {
			r.engine.Stop()
			for _, t := range r.tickers {
				t.Stop()
			}
		}
		close(ends)
		wg.Wait()
		for _, r := range all {
			if err := r.log.Close(); err != nil {
				b.Error(err)
			}
		}
	}
	return submit, stop
}

func bareKey(n uint64) ed25519.PrivateKey { return voteKey(n) }

// bareDigest is what a vote signs.
func bareDigest(p types.Proposal) []byte {
	h := sha256.Sum256(append(bytes.Clone(p.Header), p.Metadata...))
	return h[:]
}

func (r *bareReplica) AssembleProposal(metadata []byte, requests [][]byte) types.Proposal {
	payload := encodePayload(requests)
	h := sha256.Sum256(payload)
	return types.Proposal{Header: h[:], Payload: payload, Metadata: metadata}
}

func (r *bareReplica) RequestID(raw []byte) types.RequestInfo {
	h := sha256.Sum256(raw)
	return types.RequestInfo{ID: hex.EncodeToString(h[:])}
}

func (r *bareReplica) RequestsFromProposal(p types.Proposal) []types.RequestInfo {
	batches, err := decodePayload(p.Payload)
	if err != nil {
		return nil
	}
	out := make([]types.RequestInfo, len(batches))
	for i, b := range batches {
		out[i] = r.RequestID(b)
	}
	return out
}

func (r *bareReplica) VerifyProposal(p types.Proposal) ([]types.RequestInfo, error) {
	if h := sha256.Sum256(p.Payload); !bytes.Equal(h[:], p.Header) {
		return nil, errors.New("payload: is another")
	}
	return r.RequestsFromProposal(p), nil
}

func (r *bareReplica) VerifyRequest(raw []byte) (types.RequestInfo, error) {
	return r.RequestID(raw), nil
}

func (r *bareReplica) VerifyConsenterSig(s types.Signature, p types.Proposal) ([]byte, error) {
	return nil, r.verify(s.ID, bareDigest(p), s.Value)
}

func (r *bareReplica) VerifySignature(s types.Signature) error { return r.verify(s.ID, s.Msg, s.Value) }

func (r *bareReplica) verify(id uint64, msg, sig []byte) error {
	if !ed25519.Verify(bareKey(id).Public().(ed25519.PublicKey), msg, sig) {
		return errors.New("signature is not valid")
	}
	return nil
}

func (r *bareReplica) VerificationSequence() uint64   { return 0 }
func (r *bareReplica) AuxiliaryData([]byte) []byte    { return nil }
func (r *bareReplica) Sign(b []byte) []byte           { return ed25519.Sign(bareKey(r.id), b) }
func (r *bareReplica) MembershipChange() bool         { return false }
func (r *bareReplica) SendTransaction(uint64, []byte) {}
func (r *bareReplica) SignProposal(p types.Proposal, _ []byte) *types.Signature {
	return &types.Signature{ID: r.id, Value: r.Sign(bareDigest(p))}
}

func (r *bareReplica) Nodes() []uint64 {
	out := make([]uint64, len(r.all))
	for i := range out {
		out[i] = uint64(i + 1)
	}
	return out
}

func (r *bareReplica) SendConsensus(to uint64, m *protos.Message) {
	body, err := proto.Marshal(m)
	if err != nil {
		panic(err) // of the engine's own message
	}
	select {
	case r.all[to-1].in <- bareMessage{r.id, body}:
	default: // a stopped replica's
	}
}

func (r *bareReplica) Deliver(p types.Proposal, sigs []types.Signature) types.Reconfig {
	r.mu.Lock()
	r.last = types.Decision{Proposal: p, Signatures: sigs}
	r.mu.Unlock()
	if r.delivered != nil {
		batches, err := decodePayload(p.Payload)
		if err != nil {
			panic(err) // verified before
		}
		for _, b := range batches {
			r.delivered(sha256.Sum256(b))
		}
	}
	return types.Reconfig{}
}

// Sync has nothing to fetch from: a replica that is behind stays so, and the
// other three go on.
func (r *bareReplica) Sync() types.SyncResponse {
	r.mu.Lock()
	defer r.mu.Unlock()
	return types.SyncResponse{Latest: r.last}
}
