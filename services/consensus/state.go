package consensus

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// request is one batch on its way to be decided, decoded once.
type request struct {
	id         ledger.Hash
	raw        []byte
	candidates []validate.Candidate
	// verified says under which registry the signatures were checked: they hold
	// for as long as that registry is in force, and no longer.
	verified *identity.Registry
}

// parseRequest decodes a batch and checks what can be checked without state.
func parseRequest(raw []byte) (*request, error) {
	if len(raw) > MaxRequest {
		return nil, fmt.Errorf("request: %d bytes, at most %d", len(raw), MaxRequest)
	}
	batch, err := wire.DecodeBatch(raw)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	return newRequest(ledger.RequestID(raw), raw, batch)
}

// newRequest is parseRequest where raw was hashed and decoded before.
func newRequest(id ledger.Hash, raw []byte, batch *pb.Batch) (*request, error) {
	if len(raw) > MaxRequest {
		return nil, fmt.Errorf("request: %d bytes, at most %d", len(raw), MaxRequest)
	}
	if n := len(batch.Records); n == 0 || n > MaxRequestRecords {
		return nil, fmt.Errorf("request: %d records, must be 1 to %d", n, MaxRequestRecords)
	}
	return &request{id: id, raw: raw, candidates: wire.Candidates(batch)}, nil
}

// verifier fills SignatureValid of candidates. Not safe for concurrent use.
type verifier func(*identity.Registry, []validate.Candidate)

func newVerifier() verifier {
	v := identity.NewVerifier()
	return func(reg *identity.Registry, cs []validate.Candidate) { wire.VerifySignatures(v, reg, cs) }
}

// verify checks the signatures of all records, if that was not done under the
// same registry before.
func (r *request) verify(v verifier, reg *identity.Registry) {
	if r.verified == reg {
		return
	}
	for i := range r.candidates {
		r.candidates[i].SignatureValid = false
	}
	v(reg, r.candidates)
	r.verified = reg
}

// state is everything that a validator's verdicts depend on; two validators
// that applied the same blocks hold the same. The registry and the devices'
// state are never changed in place: each block puts others in their stead, so
// that readers may go on with what they have.
type state struct {
	genesis ledger.Hash
	created time.Time
	last    *ledger.Header // nil before block 1
	tree    *ledger.Frontier
	// registry is in force for the block after last; registryHash is its hash.
	registry     *identity.Registry
	registryHash ledger.Hash
	devices      *validate.State
	decided      *decidedIDs
}

func newState(genesis []byte) (*state, *identity.Genesis, error) {
	g, err := identity.ParseGenesis(genesis)
	if err != nil {
		return nil, nil, err
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, nil, err
	}
	return &state{
		genesis: sha256.Sum256(genesis), created: time.UnixMilli(g.CreatedUnixMS).UTC(), tree: &ledger.Frontier{},
		registry: reg, registryHash: ledger.Hash(reg.Hash()),
		devices: validate.NewState(validate.Limits{}), decided: newDecidedIDs(),
	}, g, nil
}

// height is that of the last block, 0 before the first.
func (s *state) height() ledger.Height {
	if s.last == nil {
		return 0
	}
	return s.last.Height
}

// time is that of the last block, and the district's beginning before the
// first.
func (s *state) time() time.Time {
	if s.last == nil {
		return s.created
	}
	return s.last.Time
}

func (s *state) hash() ledger.Hash {
	if s.last == nil {
		return s.genesis
	}
	return s.last.Hash()
}

// outcome is what executing a block's records on a state gives. Nothing has
// changed until [state.advance].
type outcome struct {
	header   ledger.Header
	leaves   []ledger.Leaf
	verdicts ledger.Verdicts
	ids      []ledger.Hash
	batches  [][]byte
	records  int
	accepted int
	// refused are the records with a verdict against them.
	refused []refusedRecord

	parent       ledger.Hash
	tree         *ledger.Frontier
	registry     *identity.Registry
	registryHash ledger.Hash
	devices      *validate.State
}

// refusedRecord is why a record has no leaf. It is not part of the block: anyone
// who replays the block finds the same.
type refusedRecord struct {
	commitment ledger.Hash
	rule       validate.Rule
	reason     string
}

// execute judges every record of the requests in their order, at block time at,
// and computes the block that follows. It depends on nothing but s, at and the
// requests' bytes.
func (s *state) execute(v verifier, at time.Time, requests []*request) *outcome {
	n := 0
	for _, r := range requests {
		n += len(r.candidates)
	}
	height := s.height() + 1
	o := &outcome{
		leaves: make([]ledger.Leaf, 1, n+1), verdicts: ledger.NewVerdicts(n), records: n,
		parent: s.hash(), tree: s.tree.Clone(), registry: s.registry, registryHash: s.registryHash, devices: s.devices.Clone(),
	}
	o.leaves[0] = ledger.Leaf{Class: ledger.ClassHeader, Commitment: o.parent}
	i := 0
	for _, r := range requests {
		r.verify(v, s.registry)
		o.ids = append(o.ids, r.id)
		o.batches = append(o.batches, r.raw)
		for k := range r.candidates {
			c := &r.candidates[k]
			if rule, reason := s.judge(o, height, at, c); rule == "" {
				o.verdicts.Accept(i)
				o.leaves = append(o.leaves, ledger.Leaf{Class: ledger.ClassRecord, Commitment: ledger.Commit(c.Salt, c.Raw)})
			} else {
				o.refused = append(o.refused, refusedRecord{ledger.Commit(c.Salt, c.Raw), rule, reason})
			}
			i++
		}
	}
	o.accepted = len(o.leaves) - 1
	o.tree.Append(o.leaves)
	if o.registry != s.registry {
		o.registryHash = ledger.Hash(o.registry.Hash())
	}
	o.header = ledger.Header{
		Height: height, Time: at, Genesis: s.genesis, Parent: o.parent,
		PrevSize: s.tree.Size(), Size: o.tree.Size(), Root: o.tree.Root(),
		Leaves: ledger.LeavesDigest(o.leaves), Verdicts: o.verdicts.Digest(), Requests: ledger.RequestsDigest(o.ids),
		RegistryVersion: s.registry.Version(), Registry: s.registryHash,
	}
	return o
}

// featureOf names the feature by which records of a kind are taken, "" for none.
func featureOf(k identity.RecordKind) string {
	switch k {
	case identity.KindRedaction, identity.KindDeletion:
		return identity.FeatureRetention
	case identity.KindAccess, identity.KindRequest, identity.KindOverride:
		return identity.FeatureAccess
	}
	return ""
}

// judge gives the verdict on one record: the rule that it breaks and the reason,
// or neither. Who may sign what is decided by the registry after the parent
// block; changes to it are tried in their order on a copy that comes into force
// with the next block.
func (s *state) judge(o *outcome, height ledger.Height, at time.Time, c *validate.Candidate) (validate.Rule, string) {
	if f := featureOf(c.Envelope.Kind); f != "" && !s.registry.Active(f, uint64(height)) {
		return validate.RuleKind, fmt.Sprintf("kind: %s: the feature %q is not in force", c.Envelope.Kind, f)
	}
	if v := o.devices.Judge(s.registry, at, c); !v.OK {
		return v.Rule, v.Reason
	}
	if c.Change == nil {
		return "", ""
	}
	if o.registry == s.registry {
		o.registry = s.registry.Clone()
	}
	if err := o.registry.Apply(uint64(height), c.Envelope.Key, *c.Change); err != nil {
		return validate.RuleRegistry, err.Error()
	}
	return "", ""
}

// advance makes the outcome of executing on s the new state.
func (s *state) advance(o *outcome) error {
	if o.parent != s.hash() {
		return fmt.Errorf("block %d: executed on another parent", o.header.Height)
	}
	h := o.header
	s.last, s.tree, s.registry, s.registryHash, s.devices = &h, o.tree, o.registry, o.registryHash, o.devices
	s.decided.add(h.Time, o.ids)
	return nil
}

// Ids of decided requests are kept for longer than ACCEPTED keeps messages, so
// that no message of the stream is ever decided twice, and at most so many. A
// request older than that can only come from a validator that kept it; its
// records are refused one by one, as replays and by the clock window.
const (
	decidedFor = 65 * time.Minute
	decidedMax = 1 << 18
)

// decidedIDs holds the ids of decided requests, forgetting by block time and
// number only: the same at every validator.
type decidedIDs struct {
	ids    map[ledger.Hash]struct{}
	blocks []decidedBlock // oldest first
}

type decidedBlock struct {
	time time.Time
	ids  []ledger.Hash
}

func newDecidedIDs() *decidedIDs { return &decidedIDs{ids: map[ledger.Hash]struct{}{}} }

func (d *decidedIDs) has(id ledger.Hash) bool { _, ok := d.ids[id]; return ok }

func (d *decidedIDs) add(at time.Time, ids []ledger.Hash) {
	if len(ids) > 0 {
		d.blocks = append(d.blocks, decidedBlock{at, ids})
		for _, id := range ids {
			d.ids[id] = struct{}{}
		}
	}
	for len(d.blocks) > 1 && (len(d.ids) > decidedMax || at.Sub(d.blocks[0].time) > decidedFor) {
		for _, id := range d.blocks[0].ids {
			delete(d.ids, id)
		}
		d.blocks[0].ids = nil // let go now, not when the slice grows
		d.blocks = d.blocks[1:]
	}
}

// freeze returns s as it is now, to be read while blocks go on changing s. The
// registry and the devices' state are never changed in place.
func (s *state) freeze() *state {
	c := *s
	c.tree = s.tree.Clone()
	c.devices = s.devices.Clone()
	c.decided = &decidedIDs{blocks: slices.Clone(s.decided.blocks)} // enough for marshal
	return &c
}

const snapshotMagic = "stopline validator state v1\n"

// marshal encodes the state for a snapshot: the magic line, then sections with
// their length as big-endian uint32, then the SHA-256 of everything before.
func (s *state) marshal() ([]byte, error) {
	devices, err := s.devices.MarshalBinary()
	if err != nil {
		return nil, err
	}
	var header []byte
	if s.last != nil {
		header = s.last.Marshal()
	}
	var decided []byte
	for _, b := range s.decided.blocks {
		decided = binary.BigEndian.AppendUint64(decided, uint64(b.time.UnixNano()))
		decided = binary.BigEndian.AppendUint32(decided, uint32(len(b.ids)))
		for _, id := range b.ids {
			decided = append(decided, id[:]...)
		}
	}
	b := []byte(snapshotMagic)
	for _, p := range [][]byte{s.genesis[:], header, s.tree.Marshal(), s.registry.Snapshot(), devices, decided} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// unmarshal sets s, a fresh state of the same genesis, to what was encoded.
func (s *state) unmarshal(b []byte) error {
	parts, err := snapshotParts(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(parts[0], s.genesis[:]) {
		return errors.New("snapshot: belongs to another district")
	}
	if len(parts[1]) > 0 {
		h, err := ledger.ParseHeader(parts[1])
		if err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
		s.last = &h
	}
	if s.tree, err = ledger.ParseFrontier(parts[2]); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if s.last != nil && (s.tree.Root() != s.last.Root || s.tree.Size() != s.last.Size) {
		return errors.New("snapshot: frontier: does not belong to the header")
	}
	if s.registry, err = identity.ParseSnapshot(parts[3]); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	s.registryHash = ledger.Hash(s.registry.Hash())
	if err := s.devices.UnmarshalBinary(parts[4]); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	for p := parts[5]; len(p) > 0; {
		if len(p) < 12 {
			return errors.New("snapshot: decided: truncated")
		}
		at := time.Unix(0, int64(binary.BigEndian.Uint64(p))).UTC()
		n := int(binary.BigEndian.Uint32(p[8:]))
		p = p[12:]
		if len(p)/32 < n {
			return errors.New("snapshot: decided: truncated")
		}
		ids := make([]ledger.Hash, n)
		for i := range ids {
			ids[i] = ledger.Hash(p[i*32:])
		}
		p = p[n*32:]
		s.decided.add(at, ids)
	}
	return nil
}

// snapshotParts checks a snapshot's form and digest and returns its sections:
// genesis hash, header, frontier, registry, devices, decided ids.
func snapshotParts(b []byte) ([][]byte, error) {
	if len(b) < len(snapshotMagic)+32 || !bytes.HasPrefix(b, []byte(snapshotMagic)) {
		return nil, errors.New("snapshot: not in the form of stopline validator state v1")
	}
	body, sum := b[:len(b)-32], b[len(b)-32:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return nil, errors.New("snapshot: damaged: its digest does not match")
	}
	parts, err := splitSections(body[len(snapshotMagic):], 6)
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	return parts, nil
}

func splitSections(b []byte, n int) ([][]byte, error) {
	out := make([][]byte, n)
	for i := range out {
		if len(b) < 4 {
			return nil, fmt.Errorf("section %d: truncated", i)
		}
		l := binary.BigEndian.Uint32(b)
		b = b[4:]
		if uint64(len(b)) < uint64(l) {
			return nil, fmt.Errorf("section %d: truncated", i)
		}
		out[i], b = b[:l], b[l:]
	}
	if len(b) != 0 {
		return nil, errors.New("data after the last section")
	}
	return out, nil
}
