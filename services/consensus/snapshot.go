package consensus

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// A snapshot is [state.marshal] after a block whose height is a multiple of
// SnapshotEvery. Its bytes are the same at every validator that applied the same
// blocks.
//
// What is in it and how it can be trusted by somebody who did not execute the
// blocks himself:
//
//	header            its votes: a quorum's
//	log's frontier    size and root in the header
//	registry          its hash in the next header
//	devices' state,   in no header. Headers are what they are, so each validator
//	decided ids       signs the digest of its snapshots with its vote key; a digest
//	                  that f+1 validators have signed, one of whom is honest, is
//	                  that of the true state
//
// f+1 and not a quorum: a signature here says "this is what I computed", not
// "this is what was agreed", and one honest word for it is enough; a quorum
// might not be there when the one who asks is needed to form it. Whoever gets
// the bytes holds them against the digest, so it does not matter whose they are.
type snapshot struct {
	height ledger.Height
	header ledger.Hash
	// registry is the hash of the registry in it.
	registry ledger.Hash
	size     uint64
	digest   ledger.Hash
}

const snapshotDomain = "stopline snapshot v1\n"

// snapshotInput is what a validator signs of a snapshot.
func snapshotInput(genesis ledger.Hash, s snapshot) []byte {
	b := append([]byte(snapshotDomain), genesis[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(s.height))
	b = append(b, s.header[:]...)
	b = binary.BigEndian.AppendUint64(b, s.size)
	return append(b, s.digest[:]...)
}

// shelf keeps a validator's snapshots: the newest two, and the newest two at
// multiples of longEvery times the distance between them, so that who fetches a
// large one from several peers has the time for it.
type shelf struct {
	dir     string
	genesis ledger.Hash
	every   ledger.Height

	mu   sync.Mutex
	list []snapshot // by height
	// served is a registry that was asked for, encoded.
	served struct {
		hash  ledger.Hash
		bytes []byte
	}
}

const (
	longEvery     = 16
	snapshotsKept = 2 // of each sort
	// maxSnapshot bounds what is taken from peers, bytes: a million devices are
	// less than half of it.
	maxSnapshot = 1 << 30
)

func (s *shelf) path(h ledger.Height) string { return filepath.Join(s.dir, fmt.Sprintf("%020d", h)) }

// openShelf lists what is on disk. Snapshots that are damaged are removed:
// everything in them can be computed again or asked for.
func openShelf(dir string, genesis ledger.Hash, every ledger.Height) (s *shelf, damaged []error, err error) {
	s = &shelf{dir: dir, genesis: genesis, every: every}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range es {
		if e.Name() == incoming {
			continue
		}
		n, err := strconv.ParseUint(e.Name(), 10, 64)
		if err != nil || s.path(ledger.Height(n)) != filepath.Join(dir, e.Name()) {
			if filepath.Ext(e.Name()) == ".new" { // an interrupted [replaceFile]
				err = os.Remove(filepath.Join(dir, e.Name()))
			} else {
				err = fmt.Errorf("%s: is not the name of a snapshot", filepath.Join(dir, e.Name()))
			}
			if err != nil {
				return nil, nil, err
			}
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, nil, err
		}
		sn, err := s.describe(b, nil)
		if err == nil && sn.height != ledger.Height(n) {
			err = fmt.Errorf("snapshot: is of block %d", sn.height)
		}
		if err != nil {
			damaged = append(damaged, fmt.Errorf("%s: %w", e.Name(), err))
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, nil, err
			}
			continue
		}
		s.list = append(s.list, sn) // names sort by height
	}
	return s, damaged, nil
}

// describe reads what a snapshot is of. The registry's hash is
// computed if it is not known.
func (s *shelf) describe(b []byte, registry *ledger.Hash) (snapshot, error) {
	parts, err := snapshotParts(b)
	if err != nil {
		return snapshot{}, err
	}
	if !bytes.Equal(parts[0], s.genesis[:]) {
		return snapshot{}, errors.New("snapshot: belongs to another district")
	}
	h, err := ledger.ParseHeader(parts[1])
	if err != nil {
		return snapshot{}, fmt.Errorf("snapshot: %w", err)
	}
	if registry == nil {
		reg, err := identity.ParseSnapshot(parts[3])
		if err != nil {
			return snapshot{}, fmt.Errorf("snapshot: %w", err)
		}
		hash := ledger.Hash(reg.Hash())
		registry = &hash
	}
	return snapshot{height: h.Height, header: h.Hash(), registry: *registry, size: uint64(len(b)), digest: sha256.Sum256(b)}, nil
}

// put makes a snapshot durable and lets go of those that are not kept.
func (s *shelf) put(b []byte, registry ledger.Hash) error {
	sn, err := s.describe(b, &registry)
	if err != nil {
		return err
	}
	if err := replaceFile(s.path(sn.height), b); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = slices.DeleteFunc(s.list, func(o snapshot) bool { return o.height == sn.height })
	s.list = append(s.list, sn)
	slices.SortFunc(s.list, func(a, b snapshot) int { return int(int64(a.height) - int64(b.height)) })
	var errs []error
	short, long := 0, 0
	for i := len(s.list) - 1; i >= 0; i-- {
		h := s.list[i].height
		keep := short < snapshotsKept
		short++
		if s.every > 0 && h%(longEvery*s.every) == 0 {
			keep = keep || long < snapshotsKept
			long++
		}
		if !keep {
			errs = append(errs, os.Remove(s.path(h)))
			s.list = slices.Delete(s.list, i, i+1)
		}
	}
	return errors.Join(errs...)
}

// incoming is the file of a snapshot from peers that cannot be trusted yet: it is
// neither offered to others nor started from. A later attempt finds it there, and
// holds it against what is signed then.
const incoming = "incoming"

func (s *shelf) stage(b []byte) error    { return replaceFile(filepath.Join(s.dir, incoming), b) }
func (s *shelf) staged() ([]byte, error) { return os.ReadFile(filepath.Join(s.dir, incoming)) }
func (s *shelf) unstage() error          { return os.Remove(filepath.Join(s.dir, incoming)) }

// all returns the snapshots there are, the oldest first.
func (s *shelf) all() []snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.list)
}

// oldest is the height of the oldest snapshot, 0 if there is none.
func (s *shelf) oldest() ledger.Height {
	if l := s.all(); len(l) > 0 {
		return l[0].height
	}
	return 0
}

func (s *shelf) load(h ledger.Height) ([]byte, error) { return os.ReadFile(s.path(h)) }

// offers tells a peer what snapshots there are, signed with the vote key.
func (s *shelf) offers(key ed25519.PrivateKey) []*pb.SnapshotOffer {
	var out []*pb.SnapshotOffer
	for _, sn := range s.all() {
		out = append(out, &pb.SnapshotOffer{Height: uint64(sn.height), Header: sn.header[:], Size: sn.size, Digest: sn.digest[:],
			Signature: ed25519.Sign(key, snapshotInput(s.genesis, sn))})
	}
	return out
}

// part reads at most n bytes of the snapshot with a digest, from an offset on;
// nothing if it is not here.
func (s *shelf) part(digest []byte, offset uint64, n int) (part []byte, size uint64, err error) {
	for _, sn := range s.all() {
		if !bytes.Equal(sn.digest[:], digest) || offset >= sn.size {
			continue
		}
		f, err := os.Open(s.path(sn.height))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, 0, nil // let go of meanwhile
		}
		if err != nil {
			return nil, 0, err
		}
		part = make([]byte, min(uint64(n), sn.size-offset))
		_, err = f.ReadAt(part, int64(offset))
		if errors.Is(err, io.EOF) {
			err = nil // whoever asked sees by the digest whether it is whole
		}
		return part, sn.size, errors.Join(err, f.Close())
	}
	return nil, 0, nil
}

// registry reads at most n bytes of the registry with a hash, as
// [identity.Registry.Snapshot] writes it; current is that of now.
func (s *shelf) registry(hash []byte, offset uint64, n int, current func() (ledger.Hash, *identity.Registry)) (part []byte, size uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !bytes.Equal(s.served.hash[:], hash) || s.served.bytes == nil {
		b, err := s.encodedRegistry(hash, current)
		if err != nil || b == nil {
			return nil, 0, err
		}
		s.served.hash, s.served.bytes = ledger.Hash(hash), b
	}
	b := s.served.bytes
	if offset >= uint64(len(b)) {
		return nil, 0, nil
	}
	return b[offset:min(uint64(len(b)), offset+uint64(n))], uint64(len(b)), nil
}

// encodedRegistry needs mu.
func (s *shelf) encodedRegistry(hash []byte, current func() (ledger.Hash, *identity.Registry)) ([]byte, error) {
	if h, reg := current(); bytes.Equal(h[:], hash) {
		return reg.Snapshot(), nil
	}
	for _, sn := range s.list {
		if !bytes.Equal(sn.registry[:], hash) {
			continue
		}
		b, err := s.load(sn.height)
		if err != nil {
			return nil, err
		}
		parts, err := snapshotParts(b)
		if err != nil {
			return nil, err
		}
		return parts[3], nil
	}
	return nil, nil
}

// checkOffer verifies a validator's word on a snapshot.
func checkOffer(genesis ledger.Hash, v identity.Validator, o *pb.SnapshotOffer) (snapshot, error) {
	if len(o.Header) != 32 || len(o.Digest) != 32 {
		return snapshot{}, errors.New("snapshot offer: header, digest: must have 32 bytes")
	}
	sn := snapshot{height: ledger.Height(o.Height), header: ledger.Hash(o.Header), size: o.Size, digest: ledger.Hash(o.Digest)}
	if o.Size == 0 || o.Size > maxSnapshot {
		return snapshot{}, fmt.Errorf("snapshot offer: size: %d bytes, must be 1 to %d", o.Size, uint64(maxSnapshot))
	}
	if !identity.VerifyBytes([]byte(v.VoteKey), snapshotInput(genesis, sn), o.Signature) {
		return snapshot{}, fmt.Errorf("snapshot offer of validator %d: signature is not valid", v.Number)
	}
	return sn, nil
}

// vouched returns the newest snapshot above a height that at least f+1 of n
// validators have signed, with their numbers. offers are each validator's, and
// verified. liars are those who signed another for the same block.
func vouched(above ledger.Height, n int, offers map[uint64][]snapshot) (best snapshot, signers, liars []uint64) {
	type claim struct {
		height         ledger.Height
		header, digest ledger.Hash
		size           uint64
	}
	of := func(s snapshot) claim { return claim{s.height, s.header, s.digest, s.size} }
	by := map[claim][]uint64{}
	for v, list := range offers {
		for _, s := range list {
			if c := of(s); !slices.Contains(by[c], v) { // twice is once
				by[c] = append(by[c], v)
			}
		}
	}
	good := map[ledger.Height]int{}
	for c, vs := range by {
		if len(vs) > ledger.Faults(n) {
			good[c.height]++
		}
	}
	for c, vs := range by {
		// Two that are both vouched for mean more liars than there may be: neither.
		if c.height > above && c.height > best.height && len(vs) > ledger.Faults(n) && good[c.height] == 1 {
			best, signers = snapshot{height: c.height, header: c.header, digest: c.digest, size: c.size}, vs
		}
	}
	for c, vs := range by {
		if best.height != 0 && c.height == best.height && c != of(best) {
			liars = append(liars, vs...)
		}
	}
	slices.Sort(signers)
	slices.Sort(liars)
	return best, signers, liars
}
