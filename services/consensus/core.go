package consensus

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// core is a validator without its network: state, stores, keys and rules.
type core struct {
	self    uint64
	keys    atomic.Pointer[keyring]   // in force
	former  atomic.Pointer[formerKey] // nil unless it was replaced
	genesis *identity.Genesis
	// genesisBytes is the document that genesis is.
	genesisBytes []byte
	now          func() time.Time
	log          *slog.Logger
	codec        codec
	journal      *journal
	store        *store
	every        ledger.Height
	count        *counters
	features     []string // that this build knows
	succession   *succession
	seals        func() [][]byte // signed checkpoints seen; nil: none

	// mu guards the state and what is computed on it. Blocks are executed with it
	// held: once each, as the next needs the result.
	mu       sync.Mutex
	state    *state
	inForce  inForce
	verifier verifier
	// outcomes of proposals on the current state, by their encoded header.
	outcomes map[string]*outcome
	// requests that were decoded, and mostly checked, before they were proposed.
	requests map[ledger.Hash]*request
	// ahead are requests that were proposed before they came by the stream, for as
	// long as outcomes.
	ahead map[ledger.Hash]*request
	ids   requestIDs
	// proposed is what we proposed last: never another in the same slot.
	proposed struct {
		at       slot
		metadata string
		proposal proposal
	}

	// lagging counts the proposals in a row that were behind the clock.
	lagging int

	// decided is called with each new block, in order, with mu held; it must not
	// block.
	decided func(b *pb.Block, o *outcome)
	// installed is called when the state has become that of a snapshot, without mu.
	installed func(ledger.Height)

	// newest is the last block applied, with its payload; guarded by mu.
	newest *pb.Block

	shelf     *shelf
	retention time.Duration
	snapshots sync.WaitGroup
	writing   sync.Mutex // one snapshot at a time; also guards purging
}

func openCore(c Config, cd codec, count *counters) (*core, error) {
	st, g, err := newState(c.Genesis)
	if err != nil {
		return nil, err
	}
	if g.District != c.District {
		return nil, fmt.Errorf("genesis: district %q, this is %q", g.District, c.District)
	}
	k := &core{
		self: c.Number, genesis: g, now: c.Now, log: c.Logger, codec: cd, genesisBytes: c.Genesis, count: count,
		every: ledger.Height(c.SnapshotEvery), state: st,
		verifier: newVerifier(), outcomes: map[string]*outcome{}, requests: map[ledger.Hash]*request{}, ahead: map[ledger.Hash]*request{},
		retention: c.Retention, features: c.Features,
	}
	if c.Features == nil {
		k.features = identity.Features()
	}
	if m := membersOf(st.registry); m.limit < MaxRequest+4 {
		return nil, fmt.Errorf("genesis: %d validators are too many: a view change would not fit a message", len(m.validators))
	}
	k.keys.Store(&keyring{c.VoteKey, c.CosignKey})
	o := seglog.Options{SegmentBytes: c.SegmentBytes}
	if k.store, err = openStore(c.Dir, o); err != nil {
		return nil, err
	}
	var damaged []error
	if k.shelf, damaged, err = openShelf(filepath.Join(c.Dir, "snapshots"), st.genesis, k.every); err != nil {
		return nil, errors.Join(err, k.store.close())
	}
	for _, err := range damaged {
		k.log.Warn("snapshot not used", "err", err)
	}
	if k.succession, err = k.openSuccession(c.Dir); err != nil {
		return nil, errors.Join(err, k.store.close())
	}
	// Where it was before there were several.
	if err := os.Remove(filepath.Join(c.Dir, "snapshot")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(err, k.store.close())
	}
	if err := k.recover(); err != nil {
		return nil, errors.Join(err, k.store.close())
	}
	if err := k.catchUpSuccession(); err != nil {
		return nil, errors.Join(err, k.store.close())
	}
	if k.journal, err = openJournal(filepath.Join(c.Dir, "journal"), seglog.Options{SegmentBytes: 16 << 20}, cd.votes); err != nil {
		return nil, errors.Join(err, k.store.close())
	}
	k.journal.settled(k.state.height())
	return k, nil
}

func (k *core) close() error {
	k.snapshots.Wait()
	return errors.Join(k.journal.close(), k.store.close())
}

// recover loads the newest good snapshot, and replays the blocks after it with
// the function that applies decided blocks. Where the payloads for that are
// gone, the state stays behind the blocks that are stored: see [core.whole].
func (k *core) recover() error {
	list := k.shelf.all()
	for i := len(list) - 1; i >= 0 && k.state.last == nil; i-- {
		if err := k.loadSnapshot(list[i].height); err != nil {
			// Everything in it can be computed again, or asked for.
			k.log.Warn("snapshot not used", "height", uint64(list[i].height), "err", err)
		}
	}
	from := k.state.height()
	if err := k.replay(); err != nil {
		return err
	}
	if h := k.state.height(); h > 0 {
		k.log.Info("state recovered", "height", uint64(h), "snapshot", uint64(from))
	}
	if !k.whole() {
		k.log.Warn("payloads to go on from are gone: a snapshot must come from peers", "height", uint64(k.state.height()), "blocks", uint64(k.store.height()))
	}
	return nil
}

// replay applies the blocks that are stored beyond the state, as far as their
// payloads are there.
func (k *core) replay() error {
	for h := k.height() + 1; h <= k.store.height(); h++ {
		m, err := k.store.block(h)
		if err != nil {
			return err
		}
		hd, err := ledger.ParseHeader(m.Header)
		if err != nil {
			return err
		}
		if purged(m, hd) {
			return nil
		}
		if _, err := k.applyBlock(m, false); err != nil {
			return fmt.Errorf("replaying: %w", err)
		}
	}
	return nil
}

func (k *core) loadSnapshot(h ledger.Height) error {
	b, err := k.shelf.load(h)
	if err != nil {
		return err
	}
	st, _, err := newState(k.genesisBytes)
	if err != nil {
		return err
	}
	if err := st.unmarshal(b); err != nil {
		return err
	}
	have, err := k.store.header(h)
	if err != nil {
		return err
	}
	if have.Hash() != st.hash() {
		return fmt.Errorf("snapshot: block %d is another in the store", h)
	}
	k.state = st
	return nil
}

// whole reports whether the state is that after the last block stored. If it is
// not, a snapshot is needed from peers, and this validator has no part in
// anything until it has one.
func (k *core) whole() bool { return k.height() == k.store.height() }

// snapshot writes the state down beside other work, and lets go of payloads that
// are not needed any more. It needs mu.
func (k *core) snapshot() {
	s := k.state.freeze() // of a large district encoding it takes longer than a block
	k.snapshots.Go(func() {
		k.writing.Lock()
		defer k.writing.Unlock()
		b, err := s.marshal()
		if err == nil {
			err = k.shelf.put(b, s.registryHash)
		}
		if err != nil {
			k.log.Error("snapshot failed", "err", err) // the blocks have it all
			return
		}
		gone, err := k.store.purge(k.shelf.oldest(), s.last.Time, retentionOf(k.retention, s.registry))
		if err != nil {
			k.log.Error("payloads not purged", "err", err)
			return
		}
		k.count.purged.Store(gone)
	})
}

// height returns that of the last block applied.
func (k *core) height() ledger.Height {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state.height()
}

// prepare decodes a request and checks its signatures ahead of the block, so
// that executing has less to do.
func (k *core) prepare(raw []byte, b *pb.Batch, v verifier) (*request, error) {
	r, err := newRequest(k.ids.of(raw), raw, b)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	reg := k.state.registry
	known := k.state.decided.has(r.id)
	if !known {
		_, known = k.requests[r.id]
	}
	if a, ok := k.ahead[r.id]; ok && !known {
		k.requests[r.id], known = a, true
	}
	k.mu.Unlock()
	if known {
		return r, nil
	}
	r.verify(v, reg)
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.state.decided.has(r.id) {
		k.requests[r.id] = r
	}
	return r, nil
}

// isDecided reports whether a request was decided.
func (k *core) isDecided(id ledger.Hash) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state.decided.has(id)
}

// request returns the decoded form of a request. It needs mu.
func (k *core) request(raw []byte) (*request, error) {
	if r, ok := k.requests[k.ids.of(raw)]; ok {
		return r, nil
	}
	return parseRequest(raw)
}

// A payload is the batches, each with its length before it as a big-endian
// uint32.

func encodePayload(batches [][]byte) []byte {
	n := 0
	for _, b := range batches {
		n += 4 + len(b)
	}
	out := make([]byte, 0, n)
	for _, b := range batches {
		out = binary.BigEndian.AppendUint32(out, uint32(len(b)))
		out = append(out, b...)
	}
	return out
}

func decodePayload(b []byte) ([][]byte, error) {
	var out [][]byte
	for len(b) > 0 {
		if len(b) < 4 || uint64(len(b)-4) < uint64(binary.BigEndian.Uint32(b)) {
			return nil, fmt.Errorf("payload: batches[%d]: truncated", len(out))
		}
		n := 4 + int(binary.BigEndian.Uint32(b))
		out = append(out, b[4:n:n])
		b = b[n:]
	}
	return out, nil
}

// assemble proposes the next block: the requests that are not decided yet, as
// many as fit.
func (k *core) assemble(at slot, metadata []byte, raws [][]byte) proposal {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p := k.proposed; p.at == at && p.metadata == string(metadata) {
		return p.proposal // asked twice, we say the same
	}
	var rs []*request
	records, size := 0, 0
	seen := map[ledger.Hash]bool{}
	for _, raw := range raws {
		r, err := k.request(raw)
		if err != nil || seen[r.id] || k.state.decided.has(r.id) {
			continue
		}
		if records+len(r.candidates) > MaxBlockRecords && len(rs) > 0 || size+4+len(raw) > k.set().limit {
			break
		}
		seen[r.id] = true
		rs = append(rs, r)
		records += len(r.candidates)
		size += 4 + len(raw)
	}
	// To the clock's reading, or to just after the parent where the clock has not
	// moved since.
	t := k.now().UTC().Round(0)
	if parent := k.state.time(); !t.After(parent) {
		t = parent.Add(time.Nanosecond)
	}
	o := k.state.execute(k.verifier, t, rs)
	header := o.header.Marshal()
	k.outcomes[string(header)] = o
	p := proposal{Header: header, Payload: encodePayload(o.batches), Metadata: metadata}
	k.proposed.at, k.proposed.metadata, k.proposed.proposal = at, string(metadata), p
	return p
}

// refusal is why a proposal is not voted for; its reason is a metric's label.
type refusal struct {
	reason string
	err    error
}

func (r *refusal) Error() string { return "proposal: " + r.reason + ": " + r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// The reasons for which a proposal is refused.
const (
	refusedForm     = "form"     // not decodable, or larger than allowed
	refusedPosition = "position" // not the next height, or metadata of another
	refusedParent   = "parent"
	refusedTime     = "time"
	refusedDecided  = "decided" // holds a request that was decided, or one twice
	refusedRequest  = "request" // holds a batch that is none
	refusedHeader   = "header"  // does not follow from the records
	refusedVote     = "vote"    // we voted otherwise in this slot
	refusedFeature  = "feature" // in force, and not known here
)

func refuse(reason, format string, args ...any) error {
	return &refusal{reason, fmt.Errorf(format, args...)}
}

// A leader must not make time stand still: records are judged by block time, and
// those of the present would be refused as coming from the future. One proposal
// may be late, having been on its way, or made before everybody restarted; so
// many in a row are not, however much there is to do.
const (
	mostBehind  = 1500 * time.Millisecond
	laggingMost = 4
)

// verify checks a proposal by everything that a vote for it says, from its own
// bytes and the state after its parent.
func (k *core) verify(at slot, d ledger.Hash, p proposal) ([]ledger.Hash, error) {
	ids, err := k.check(at, d, p)
	var r *refusal
	if errors.As(err, &r) {
		k.count.refuse(r.reason)
		k.log.Warn("proposal refused", "view", at.View, "height", uint64(at.Height), "reason", r.reason, "err", r.err)
	}
	return ids, err
}

func (k *core) check(at slot, d ledger.Hash, p proposal) ([]ledger.Hash, error) {
	if limit := k.members().limit; len(p.Payload) > limit {
		return nil, refuse(refusedForm, "payload: %d bytes, at most %d", len(p.Payload), limit)
	}
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		return nil, refuse(refusedForm, "%w", err)
	}
	if h.Height != at.Height {
		return nil, refuse(refusedPosition, "height: %d in a proposal for %d", h.Height, at.Height)
	}
	if err := k.journal.allows(vote{at, d}); err != nil {
		return nil, refuse(refusedVote, "%w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.knows(); err != nil {
		return nil, refuse(refusedFeature, "%w", err)
	}
	switch {
	case h.Height != k.state.height()+1:
		return nil, refuse(refusedPosition, "height: %d after %d", h.Height, k.state.height())
	case h.Parent != k.state.hash() || h.Genesis != k.state.genesis:
		return nil, refuse(refusedParent, "parent: is not the block before")
	case !h.Time.After(k.state.time()):
		return nil, refuse(refusedTime, "time: %v is not later than the parent's, %v", h.Time, k.state.time())
	}
	if now := k.now(); h.Time.After(now.Add(ledger.MaxAhead)) {
		return nil, refuse(refusedTime, "time: %v is more than %v ahead of the clock, %v", h.Time, ledger.MaxAhead, now.UTC())
	} else if behind := now.Sub(h.Time); behind <= mostBehind {
		k.lagging = 0
	} else if k.lagging++; k.lagging > laggingMost {
		return nil, refuse(refusedTime, "time: %v is %v behind the clock, as in the %d proposals before", h.Time, behind, laggingMost)
	}
	batches, err := decodePayload(p.Payload)
	if err != nil {
		return nil, refuse(refusedForm, "%w", err)
	}
	o, err := k.execute(h, p.Header, batches)
	if err != nil {
		return nil, err
	}
	return o.ids, nil
}

// execute returns the outcome of a proposal's batches on the current state,
// computing it if that was not done before. header is h encoded. It needs mu.
func (k *core) execute(h ledger.Header, header []byte, batches [][]byte) (*outcome, error) {
	ids := k.idsOf(batches)
	if ledger.RequestsDigest(ids) != h.Requests {
		return nil, refuse(refusedHeader, "requests: the payload is another")
	}
	if o, ok := k.outcomes[string(header)]; ok {
		return o, nil // the header commits to the payload
	}
	rs := make([]*request, len(batches))
	seen := make(map[ledger.Hash]bool, len(ids))
	records := 0
	for i, b := range batches {
		if k.state.decided.has(ids[i]) || seen[ids[i]] {
			return nil, refuse(refusedDecided, "batches[%d]: %x was decided before", i, ids[i][:8])
		}
		seen[ids[i]] = true
		r, ok := k.requests[ids[i]]
		if !ok {
			r, ok = k.ahead[ids[i]]
		}
		if !ok {
			var err error
			if r, err = parseRequest(b); err != nil {
				return nil, refuse(refusedRequest, "batches[%d]: %w", i, err)
			}
		}
		rs[i] = r
		records += len(r.candidates)
	}
	if records > MaxBlockRecords {
		return nil, refuse(refusedForm, "payload: %d records, at most %d", records, MaxBlockRecords)
	}
	o := k.state.execute(k.verifier, h.Time, rs)
	if o.header != h {
		return nil, refuse(refusedHeader, "%s", headerDifference(h, o.header))
	}
	if len(k.outcomes) >= 8 { // more than there are validators to propose honestly
		clear(k.outcomes)
		clear(k.ahead)
	}
	for _, r := range rs {
		if _, ok := k.requests[r.id]; !ok {
			k.ahead[r.id] = r
		}
	}
	k.outcomes[string(header)] = o
	return o, nil
}

// headerDifference names the first field in which a header is not what follows
// from the records.
func headerDifference(got, want ledger.Header) string {
	switch {
	case got.Registry != want.Registry:
		return fmt.Sprintf("registry: %x, the state after the parent is %x", got.Registry[:8], want.Registry[:8])
	case got.RegistryVersion != want.RegistryVersion:
		return fmt.Sprintf("registry_version: %d, want %d", got.RegistryVersion, want.RegistryVersion)
	case got.Verdicts != want.Verdicts:
		return "verdicts: do not follow from the records"
	case got.PrevSize != want.PrevSize || got.Size != want.Size:
		return fmt.Sprintf("size: %d after %d, want %d after %d", got.Size, got.PrevSize, want.Size, want.PrevSize)
	case got.Leaves != want.Leaves:
		return "leaves: do not follow from the records"
	case got.Root != want.Root:
		return "root: does not follow from the leaves"
	}
	return "the header does not follow from the records"
}

// signVote signs a proposal. It checks once more what does not depend on the
// clock: a proposal left over from an earlier view was never shown to verify.
func (k *core) signVote(at slot, d ledger.Hash, p proposal) ([]byte, error) {
	if err := k.journal.allows(vote{at, d}); err != nil {
		return nil, err
	}
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if h.Parent != k.state.hash() || h.Height != at.Height {
		return nil, fmt.Errorf("asked to vote for block %d on another parent", h.Height)
	}
	batches, err := decodePayload(p.Payload)
	if err != nil {
		return nil, err
	}
	if _, err := k.execute(h, p.Header, batches); err != nil {
		return nil, err
	}
	return ed25519.Sign(k.keys.Load().vote, ledger.VoteInput(h.Hash(), p.Metadata)), nil
}

// checkVote verifies a vote, and that the proposal's payload is the one that
// was voted for.
func (k *core) checkVote(p proposal, v ledger.Vote) error {
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		return err
	}
	ids := k.requestsOf(p)
	if ledger.RequestsDigest(ids) != h.Requests {
		return fmt.Errorf("block %d: requests: the payload is another", h.Height)
	}
	val, ok := k.members().validator(v.Validator)
	if !ok {
		return fmt.Errorf("block %d: no validator %d", h.Height, v.Validator)
	}
	if !identity.VerifyBytes([]byte(val.VoteKey), ledger.VoteInput(h.Hash(), p.Metadata), v.Signature) {
		return fmt.Errorf("block %d: vote of validator %d: signature is not valid", h.Height, v.Validator)
	}
	return nil
}

// requestsOf returns the ids of a proposal's requests; of a payload that is
// none, nothing, which no header but that of an empty block matches.
func (k *core) requestsOf(p proposal) []ledger.Hash {
	batches, err := decodePayload(p.Payload)
	if err != nil {
		return []ledger.Hash{{}}
	}
	return k.idsOf(batches)
}

func (k *core) idsOf(batches [][]byte) []ledger.Hash {
	ids := make([]ledger.Hash, len(batches))
	for i, b := range batches {
		ids[i] = k.ids.of(b)
	}
	return ids
}

const viewDomain = "stopline view data v1\n"

func (k *core) viewInput(b []byte) []byte {
	in := append([]byte(viewDomain), k.state.genesis[:]...) // genesis never changes
	return append(in, b...)
}

func (k *core) signView(b []byte) []byte { return ed25519.Sign(k.keys.Load().vote, k.viewInput(b)) }

func (k *core) checkView(from uint64, b, sig []byte) error {
	v, ok := k.members().validator(from)
	if !ok {
		return fmt.Errorf("view data: no validator %d", from)
	}
	if !identity.VerifyBytes([]byte(v.VoteKey), k.viewInput(b), sig) {
		return fmt.Errorf("view data of validator %d: signature is not valid", from)
	}
	return nil
}

// apply makes a decided proposal durable, then the state. An error means that
// this validator cannot go on: a quorum has decided otherwise than it computes,
// or its disk has failed.
func (k *core) apply(p proposal, votes []ledger.Vote) error {
	batches, err := decodePayload(p.Payload)
	if err != nil {
		return err
	}
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		return err
	}
	votes = slices.Clone(votes)
	slices.SortFunc(votes, func(a, b ledger.Vote) int { return int(a.Validator) - int(b.Validator) })
	m := wire.BlockToProto(&ledger.Block{Header: h, Metadata: p.Metadata, Votes: votes}, batches, nil)
	_, err = k.applyBlock(m, true)
	return err
}

// refusalsTold is how many refused records of a block are logged one by one.
const refusalsTold = 8

// errAhead means that a block is not the next.
var errAhead = errors.New("not the next block")

// fatalError is one after which this validator must not go on.
type fatalError struct{ error }

func (e fatalError) Unwrap() error { return e.error }

// applyBlock applies one block; see [core.applyBlocks].
func (k *core) applyBlock(m *pb.Block, storeIt bool) (*outcome, error) {
	var o *outcome
	_, err := k.applyBlocks([]*pb.Block{m}, storeIt, func(out *outcome) { o = out })
	return o, err
}

// applyBlocks executes decided blocks one after another on the state, checks
// each with its votes, stores them if asked to, and advances. It is the one way
// by which blocks change the state: on Deliver, on catching up and on replay. It
// returns how many were applied, and why not the next. A [fatalError] means that
// they could not be stored.
func (k *core) applyBlocks(ms []*pb.Block, storeIt bool, each func(*outcome)) (n int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var done []*appliedBlock
	for _, m := range ms {
		var a *appliedBlock
		if a, err = k.executeBlock(m); err != nil {
			break
		}
		done = append(done, a)
		if k.every > 0 && a.block.Header.Height%k.every == 0 {
			if err = k.settle(done, storeIt); err != nil {
				return n, err
			}
			n += len(done)
			done = nil
		}
		if each != nil {
			each(a.outcome)
		}
	}
	if err2 := k.settle(done, storeIt); err2 != nil {
		return n, err2
	}
	return n + len(done), err
}

// appliedBlock is a block that has changed the state in memory.
type appliedBlock struct {
	*outcome
	block   *ledger.Block
	changed bool // the registry
}

// executeBlock checks a block and advances the state by it. It needs mu, and
// nobody may see that state until [core.settle].
func (k *core) executeBlock(m *pb.Block) (*appliedBlock, error) {
	h, err := ledger.ParseHeader(m.Header)
	if err != nil {
		return nil, err
	}
	if h.Height != k.state.height()+1 {
		return nil, fmt.Errorf("block %d after %d: %w", h.Height, k.state.height(), errAhead)
	}
	if h.Parent != k.state.hash() {
		return nil, fmt.Errorf("block %d: parent: is not the block before", h.Height)
	}
	if purged(m, h) {
		return nil, fmt.Errorf("block %d: %w", h.Height, errPurged)
	}
	if err := k.knows(); err != nil {
		return nil, fatalError{err} // never a guess at a state
	}
	o, err := k.execute(h, m.Header, m.Batches)
	if err != nil {
		return nil, fmt.Errorf("block %d: %w", h.Height, err)
	}
	block := &ledger.Block{Header: h, Leaves: o.leaves, Metadata: m.Metadata}
	for _, v := range m.Votes {
		block.Votes = append(block.Votes, ledger.Vote{Validator: v.Validator, Signature: v.Signature})
	}
	// Of what [ledger.Block.Check] asks for, all that is not about time and votes is
	// in the header that executing on this state gave, and that is this one.
	if k.state.last != nil && !h.Time.After(k.state.last.Time) {
		return nil, fmt.Errorf("block %d: time: not later than its parent's", h.Height)
	}
	if err := ledger.CheckVotes(h.Hash(), m.Metadata, block.Votes, k.set().validators); err != nil {
		return nil, fmt.Errorf("block %d: %w", h.Height, err)
	}
	if len(m.Leaves) > 0 && string(m.Leaves) != string(ledger.MarshalLeaves(o.leaves)) {
		return nil, fmt.Errorf("block %d: leaves: do not follow from the records", h.Height)
	}
	changed := o.registry != k.state.registry
	before, validators := k.state.tree, k.set().validators
	if err := k.state.advance(o); err != nil {
		return nil, err
	}
	if changed && ledger.Height(o.registry.MembersSince()) == h.Height {
		k.succeed(block, &pb.Block{Batches: o.batches, Verdicts: o.verdicts}, before, validators)
	}
	if changed {
		k.foresee()
	}
	clear(k.outcomes)
	clear(k.ahead)
	for _, id := range o.ids {
		delete(k.requests, id)
	}
	return &appliedBlock{o, block, changed}, nil
}

// settle makes blocks durable that the state has advanced by, and tells of them.
// It needs mu.
func (k *core) settle(bs []*appliedBlock, storeIt bool) error {
	if len(bs) == 0 {
		return nil
	}
	var fresh []stored
	for _, a := range bs {
		if a.block.Header.Height > k.store.height() {
			fresh = append(fresh, stored{block: a.block, verdicts: a.verdicts, batches: a.batches, keep: a.changed})
		}
	}
	if storeIt {
		if err := k.store.append(fresh...); err != nil {
			return fatalError{err}
		}
	}
	for _, a := range bs {
		h := a.block.Header.Height
		if storeIt {
			k.journal.settled(h)
			for _, r := range a.refused[:min(len(a.refused), refusalsTold)] {
				k.log.Warn("record refused", "height", uint64(h), "rule", r.rule, "reason", r.reason, "commitment", fmt.Sprintf("%x", r.commitment))
			}
			if n := len(a.refused) - refusalsTold; n > 0 {
				k.log.Warn("more records refused", "height", uint64(h), "count", n)
			}
		}
		k.count.block(a.outcome)
		k.newest = wire.BlockToProto(a.block, a.batches, a.verdicts)
		if k.decided != nil {
			k.decided(k.newest, a.outcome)
		}
	}
	if h := k.state.height(); storeIt && k.every > 0 && h%k.every == 0 {
		k.snapshot()
	}
	return nil
}

// last returns the last decision in the engine's terms.
func (k *core) last() (decision, error) {
	k.mu.Lock()
	h, m := k.state.height(), k.newest
	k.mu.Unlock()
	if h == 0 {
		return decision{}, nil
	}
	if m == nil { // from a snapshot
		var err error
		if m, err = k.store.block(h); err != nil {
			return decision{}, err
		}
	}
	d := decision{Proposal: proposal{Header: m.Header, Payload: encodePayload(m.Batches), Metadata: m.Metadata}}
	for _, v := range m.Votes {
		d.Votes = append(d.Votes, ledger.Vote{Validator: v.Validator, Signature: v.Signature})
	}
	return d, nil
}

// blocks returns consecutive blocks from a height on, at least one if there is
// one, within the limits; where headers is set, without payloads that are not
// kept for good.
func (k *core) blocks(ctx context.Context, from ledger.Height, maxBlocks, maxBytes int, headers bool) ([]*pb.Block, error) {
	var out []*pb.Block
	size := 0
	for h := from; h >= k.store.first() && h <= k.store.height() && len(out) < maxBlocks && ctx.Err() == nil; h++ {
		read := k.store.block
		if headers {
			read = k.store.headers
		}
		m, err := read(h)
		if err != nil {
			return nil, err
		}
		if size += proto.Size(m) + 16; len(out) > 0 && size > maxBytes {
			break
		}
		out = append(out, m)
	}
	return out, nil
}
