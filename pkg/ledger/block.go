package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Height numbers blocks, from 1.
type Height uint64

// Hash is a SHA-256.
type Hash = [32]byte

// Salt blinds a commitment, so that nobody who never held it can test a guess
// of the content.
type Salt [32]byte

const commitmentDomain = "stopline commitment v1\n"

// Commit returns SHA-256 of the domain line, the salt and the envelope's
// canonical bytes.
func Commit(salt Salt, envelope []byte) Hash {
	h := sha256.New()
	h.Write([]byte(commitmentDomain))
	h.Write(salt[:])
	h.Write(envelope)
	return Hash(h.Sum(nil))
}

// Class tells an outsider what a leaf is, and no more.
type Class byte

// The classes of leaf.
const (
	ClassHeader Class = 0 // commitment is the hash of the parent block's header
	ClassRecord Class = 1 // commitment is a salted [Commit]
)

// LeafSize is the length of an encoded leaf.
const LeafSize = 34

const leafVersion = 1

// Leaf is one entry of the log: 1 byte version, 1 byte class, 32 bytes
// commitment.
type Leaf struct {
	Class      Class
	Commitment Hash
}

// Marshal returns the entry's bytes.
func (l Leaf) Marshal() [LeafSize]byte {
	var b [LeafSize]byte
	b[0], b[1] = leafVersion, byte(l.Class)
	copy(b[2:], l.Commitment[:])
	return b
}

// ParseLeaf decodes an entry.
func ParseLeaf(b []byte) (Leaf, error) {
	if len(b) != LeafSize {
		return Leaf{}, fmt.Errorf("leaf: %d bytes, want %d", len(b), LeafSize)
	}
	if b[0] != leafVersion {
		return Leaf{}, fmt.Errorf("leaf: version %d is unknown", b[0])
	}
	if Class(b[1]) > ClassRecord {
		return Leaf{}, fmt.Errorf("leaf: class %d is unknown", b[1])
	}
	return Leaf{Class: Class(b[1]), Commitment: Hash(b[2:])}, nil
}

// Header is what validators sign of a block. Everything in it can be computed
// from the blocks before and this block's records, but for Time.
type Header struct {
	Height Height
	// Time is later than the parent's, and was at most [MaxAhead] ahead of the
	// clock of each validator that voted.
	Time time.Time
	// Genesis is the SHA-256 of the district's genesis document: headers of two
	// districts can never be taken for each other.
	Genesis Hash
	// Parent is [Header.Hash] of the block before, Genesis for block 1.
	Parent Hash
	// PrevSize and Size are the log's sizes before and after this block, Root
	// its RFC 6962 tree head after it.
	PrevSize, Size uint64
	Root           Hash
	// Leaves is SHA-256 over the block's encoded leaves, concatenated.
	Leaves Hash
	// Verdicts is SHA-256 over the verdict bitmap's bytes.
	Verdicts Hash
	// Requests is SHA-256 over the ids of the block's requests, concatenated;
	// an id is the SHA-256 of the batch's bytes.
	Requests Hash
	// RegistryVersion and Registry are the registry's version and hash after
	// the parent block: this block's records were judged by that state.
	RegistryVersion uint64
	Registry        Hash
}

// MaxAhead is how far a block's time may be ahead of a voter's clock.
const MaxAhead = 500 * time.Millisecond

const headerMagic = "stopline header v1\n"

// HeaderSize is the length of an encoded header.
const HeaderSize = len(headerMagic) + 5*8 + 7*32

// Marshal returns the encoding that is hashed and signed: the magic line, then
// Height, Time (Unix nanoseconds), PrevSize, Size and RegistryVersion as
// big-endian 64-bit integers, then Genesis, Parent, Root, Leaves, Verdicts,
// Requests and Registry.
func (h Header) Marshal() []byte {
	b := make([]byte, 0, HeaderSize)
	b = append(b, headerMagic...)
	for _, v := range []uint64{uint64(h.Height), uint64(h.Time.UnixNano()), h.PrevSize, h.Size, h.RegistryVersion} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	for _, v := range []Hash{h.Genesis, h.Parent, h.Root, h.Leaves, h.Verdicts, h.Requests, h.Registry} {
		b = append(b, v[:]...)
	}
	return b
}

// ParseHeader decodes what [Header.Marshal] wrote.
func ParseHeader(b []byte) (Header, error) {
	if len(b) != HeaderSize || string(b[:len(headerMagic)]) != headerMagic {
		return Header{}, errors.New("header: not in the form of stopline header v1")
	}
	p := b[len(headerMagic):]
	u := func() uint64 { v := binary.BigEndian.Uint64(p); p = p[8:]; return v }
	x := func() Hash { v := Hash(p[:32]); p = p[32:]; return v }
	h := Header{Height: Height(u()), Time: time.Unix(0, int64(u())).UTC(), PrevSize: u(), Size: u(), RegistryVersion: u()}
	h.Genesis, h.Parent, h.Root, h.Leaves, h.Verdicts, h.Requests, h.Registry = x(), x(), x(), x(), x(), x(), x()
	return h, nil
}

// Hash returns the SHA-256 of the encoding: the next block's Parent, and what
// its first leaf commits to.
func (h Header) Hash() Hash { return sha256.Sum256(h.Marshal()) }

// Vote is one validator's signature on a header.
type Vote struct {
	Validator uint64
	Signature []byte
}

const voteDomain = "stopline vote v1\n"

// VoteInput returns the bytes that a validator signs to commit to a block: the
// domain line, the header's hash, and the SHA-256 of the engine's metadata
// (view and sequence), which the certificate carries.
func VoteInput(header Hash, metadata []byte) []byte {
	m := sha256.Sum256(metadata)
	b := make([]byte, 0, len(voteDomain)+64)
	b = append(b, voteDomain...)
	b = append(b, header[:]...)
	return append(b, m[:]...)
}

// Faults returns f, how many of n validators may be Byzantine: ⌊(n−1)/3⌋.
func Faults(n int) int { return (n - 1) / 3 }

// Quorum returns how many of n validators must sign: ⌈(n+f+1)/2⌉.
func Quorum(n int) int { return (n + Faults(n) + 2) / 2 }

// ValidVotes returns the votes that are valid, one for each validator at most:
// votes of strangers and second votes of one validator count for nothing.
func ValidVotes(h Hash, metadata []byte, votes []Vote, validators []identity.Validator) []Vote {
	input := VoteInput(h, metadata)
	keys := make(map[uint64]identity.PublicKey, len(validators))
	for _, v := range validators {
		keys[v.Number] = v.VoteKey
	}
	var good []Vote
	for _, v := range votes {
		key, ok := keys[v.Validator]
		if ok && identity.VerifyBytes([]byte(key), input, v.Signature) {
			delete(keys, v.Validator)
			good = append(good, v)
		}
	}
	return good
}

// CheckVotes verifies that a quorum of the validators signed the header; see
// [ValidVotes].
func CheckVotes(h Hash, metadata []byte, votes []Vote, validators []identity.Validator) error {
	good := len(ValidVotes(h, metadata, votes, validators))
	if q := Quorum(len(validators)); good < q || len(validators) == 0 {
		return fmt.Errorf("block votes: %d valid of the %d needed from %d validators", good, q, len(validators))
	}
	return nil
}

// Block is a decided block without its payloads.
type Block struct {
	Header   Header
	Leaves   []Leaf
	Metadata []byte
	Votes    []Vote
}

// LeavesDigest returns what [Header.Leaves] must be.
func LeavesDigest(leaves []Leaf) Hash {
	h := sha256.New()
	for _, l := range leaves {
		b := l.Marshal()
		h.Write(b[:])
	}
	return Hash(h.Sum(nil))
}

// MarshalLeaves concatenates the encoded leaves.
func MarshalLeaves(leaves []Leaf) []byte {
	b := make([]byte, 0, len(leaves)*LeafSize)
	for _, l := range leaves {
		e := l.Marshal()
		b = append(b, e[:]...)
	}
	return b
}

// ParseLeaves decodes what [MarshalLeaves] wrote.
func ParseLeaves(b []byte) ([]Leaf, error) {
	if len(b)%LeafSize != 0 {
		return nil, fmt.Errorf("leaves: %d bytes is no multiple of %d", len(b), LeafSize)
	}
	out := make([]Leaf, len(b)/LeafSize)
	for i := range out {
		l, err := ParseLeaf(b[i*LeafSize : (i+1)*LeafSize])
		if err != nil {
			return nil, fmt.Errorf("leaves[%d]: %w", i, err)
		}
		out[i] = l
	}
	return out, nil
}

// Check verifies everything that a block without payloads lets one verify: its
// place after the parent (nil for block 1), leaves, tree and votes. tree is the
// state of the log before the block; it is advanced if the block is right.
func (b *Block) Check(genesis Hash, parent *Header, tree *Frontier, validators []identity.Validator) error {
	h := b.Header
	want := Header{Height: 0, Time: time.Time{}}
	parentHash := genesis
	if parent != nil {
		want, parentHash = *parent, parent.Hash()
	}
	switch {
	case h.Height != want.Height+1:
		return fmt.Errorf("block %d: height: must follow %d", h.Height, want.Height)
	case h.Genesis != genesis:
		return fmt.Errorf("block %d: genesis: belongs to another district", h.Height)
	case h.Parent != parentHash:
		return fmt.Errorf("block %d: parent: is not the block before", h.Height)
	case parent != nil && !h.Time.After(want.Time):
		return fmt.Errorf("block %d: time: not later than its parent's", h.Height)
	case h.PrevSize != tree.Size():
		return fmt.Errorf("block %d: prev_size: %d, the log has %d", h.Height, h.PrevSize, tree.Size())
	case h.Size != h.PrevSize+uint64(len(b.Leaves)):
		return fmt.Errorf("block %d: size: %d after %d leaves on %d", h.Height, h.Size, len(b.Leaves), h.PrevSize)
	case len(b.Leaves) == 0 || b.Leaves[0] != Leaf{ClassHeader, parentHash}:
		return fmt.Errorf("block %d: leaves[0]: does not commit to the parent's header", h.Height)
	case LeavesDigest(b.Leaves) != h.Leaves:
		return fmt.Errorf("block %d: leaves: do not match the header", h.Height)
	}
	for i, l := range b.Leaves[1:] {
		if l.Class != ClassRecord {
			return fmt.Errorf("block %d: leaves[%d]: class %d where a record is due", h.Height, i+1, l.Class)
		}
	}
	next := tree.Clone()
	next.Append(b.Leaves)
	if next.Root() != h.Root {
		return fmt.Errorf("block %d: root: does not follow from the leaves", h.Height)
	}
	if err := CheckVotes(h.Hash(), b.Metadata, b.Votes, validators); err != nil {
		return fmt.Errorf("block %d: %w", h.Height, err)
	}
	*tree = *next
	return nil
}

// Frontier is the right edge of an RFC 6962 tree: enough to append and to know
// the root, and no more than 64 hashes however long the log is.
type Frontier struct {
	size uint64
	// perfect[i] is the root of the full subtree for bit i of size, where set.
	perfect [64]tlog.Hash
}

// Size returns the number of leaves.
func (f *Frontier) Size() uint64 { return f.size }

// Clone returns an independent copy.
func (f *Frontier) Clone() *Frontier { c := *f; return &c }

// Append adds leaves.
func (f *Frontier) Append(leaves []Leaf) {
	for _, l := range leaves {
		e := l.Marshal()
		f.AppendHash(tlog.RecordHash(e[:]))
	}
}

// AppendHash adds one leaf by its RFC 6962 leaf hash.
func (f *Frontier) AppendHash(h tlog.Hash) {
	i := 0
	for ; f.size>>i&1 == 1; i++ {
		h = tlog.NodeHash(f.perfect[i], h)
	}
	f.perfect[i] = h
	f.size++
}

// Root returns the tree head; of no leaves it is SHA-256 of nothing.
func (f *Frontier) Root() Hash {
	if f.size == 0 {
		return sha256.Sum256(nil)
	}
	var acc tlog.Hash
	have := false
	for i := range 64 {
		if f.size>>i&1 == 0 {
			continue
		}
		if !have {
			acc, have = f.perfect[i], true
		} else {
			acc = tlog.NodeHash(f.perfect[i], acc)
		}
	}
	return Hash(acc)
}

// Marshal returns the size and the hashes of the frontier.
func (f *Frontier) Marshal() []byte {
	b := binary.BigEndian.AppendUint64(nil, f.size)
	for i := range 64 {
		if f.size>>i&1 == 1 {
			b = append(b, f.perfect[i][:]...)
		}
	}
	return b
}

// ParseFrontier decodes what [Frontier.Marshal] wrote.
func ParseFrontier(b []byte) (*Frontier, error) {
	if len(b) < 8 {
		return nil, errors.New("frontier: truncated")
	}
	f := &Frontier{size: binary.BigEndian.Uint64(b)}
	b = b[8:]
	for i := range 64 {
		if f.size>>i&1 == 1 {
			if len(b) < 32 {
				return nil, errors.New("frontier: truncated")
			}
			f.perfect[i] = tlog.Hash(b[:32])
			b = b[32:]
		}
	}
	if len(b) != 0 {
		return nil, errors.New("frontier: data after its end")
	}
	return f, nil
}

// Verdicts is a bitmap with one bit a record, 1 for accepted, least significant
// bit first.
type Verdicts []byte

// NewVerdicts returns a bitmap for n records, none accepted.
func NewVerdicts(n int) Verdicts { return make(Verdicts, (n+7)/8) }

// Accept sets bit i.
func (v Verdicts) Accept(i int) { v[i/8] |= 1 << (i % 8) }

// Accepted reports bit i.
func (v Verdicts) Accepted(i int) bool { return i/8 < len(v) && v[i/8]>>(i%8)&1 == 1 }

// Digest returns what [Header.Verdicts] must be.
func (v Verdicts) Digest() Hash { return sha256.Sum256(v) }

// RequestID returns the id of a request: the SHA-256 of the batch's bytes.
func RequestID(batch []byte) Hash { return sha256.Sum256(batch) }

// RequestsDigest returns what [Header.Requests] must be.
func RequestsDigest(ids []Hash) Hash {
	h := sha256.New()
	for _, id := range ids {
		h.Write(id[:])
	}
	return Hash(h.Sum(nil))
}

// Origin returns the log's name for a district without one of its own.
func Origin(d traffic.DistrictID) string { return "stopline.example/" + string(d) }
