package consensus

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// parcel is what travels between validators: a signed head, and a body that the
// head commits to.
//
// On the wire: the head, 64 bytes signature, the body. The signature is Ed25519
// by the sender's vote key over
//
//	"stopline validator message v1\n" ‖ genesis hash ‖ head
//
// The head is of fixed length and says everything that makes a lie provable, so
// that two heads are evidence without their bodies.
type parcel struct {
	Kind     parcelKind
	From, To uint64
	// Config says for which members the sender speaks: the height of the block
	// that made them so, 0 for those of genesis.
	Config uint64
	Start  start
	// Seq rises with each parcel of one start to one receiver: what was sent once
	// cannot be played again.
	Seq uint64
	// Decided is the height of the sender's last block.
	Decided ledger.Height
	// Vote is what the body votes for; its zero value, nothing.
	Vote vote
	Body []byte
}

type parcelKind uint8

const (
	kindEngine parcelKind = 1 + iota // the engine's own
	kindMeet
	kindMet
	kindTold // heads of others' votes, which do not agree
)

const (
	parcelDomain  = "stopline validator message v1\n"
	parcelVersion = 1
	headSize      = 2 + 3*8 + 16 + 8 + 8 + 8 + 8 + 8 + 1 + 32 + 32
	parcelMin     = headSize + ed25519.SignatureSize
)

// head encodes everything but the body: version, kind, then From, To, Config,
// incarnation, start counter, Seq, Decided, the vote's view, height and phase
// and its digest, and the SHA-256 of the body. Integers are big-endian.
func (p *parcel) head() []byte {
	b := make([]byte, 0, headSize)
	b = append(b, parcelVersion, byte(p.Kind))
	for _, v := range []uint64{p.From, p.To, p.Config} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = append(b, p.Start.Incarnation[:]...)
	for _, v := range []uint64{p.Start.Counter, p.Seq, uint64(p.Decided), p.Vote.View, uint64(p.Vote.Height)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	b = append(b, byte(p.Vote.Phase))
	b = append(b, p.Vote.Digest[:]...)
	sum := sha256.Sum256(p.Body)
	return append(b, sum[:]...)
}

func parcelInput(genesis ledger.Hash, head []byte) []byte {
	in := make([]byte, 0, len(parcelDomain)+32+len(head))
	in = append(in, parcelDomain...)
	in = append(in, genesis[:]...)
	return append(in, head...)
}

// seal signs the parcel and returns its bytes.
func (p *parcel) seal(key ed25519.PrivateKey, genesis ledger.Hash) []byte {
	head := p.head()
	out := make([]byte, 0, parcelMin+len(p.Body))
	out = append(out, head...)
	out = append(out, ed25519.Sign(key, parcelInput(genesis, head))...)
	return append(out, p.Body...)
}

// openParcel decodes a parcel and checks its form, not its signature.
func openParcel(b []byte) (*parcel, error) {
	if len(b) < parcelMin {
		return nil, fmt.Errorf("%d bytes, at least %d", len(b), parcelMin)
	}
	p, err := parseHead(b[:headSize])
	if err != nil {
		return nil, err
	}
	p.Body = b[parcelMin:]
	if sum := sha256.Sum256(p.Body); string(sum[:]) != string(b[headSize-32:headSize]) {
		return nil, errors.New("body: is not the one that was signed")
	}
	return p, nil
}

func parseHead(b []byte) (*parcel, error) {
	if len(b) != headSize || b[0] != parcelVersion {
		return nil, errors.New("not in the form of a validator message v1")
	}
	u := func() uint64 { v := binary.BigEndian.Uint64(b); b = b[8:]; return v }
	p := &parcel{Kind: parcelKind(b[1])}
	b = b[2:]
	p.From, p.To, p.Config = u(), u(), u()
	p.Start.Incarnation = [16]byte(b)
	b = b[16:]
	p.Start.Counter, p.Seq, p.Decided = u(), u(), ledger.Height(u())
	p.Vote.View, p.Vote.Height = u(), ledger.Height(u())
	p.Vote.Phase = phase(b[0])
	p.Vote.Digest = ledger.Hash(b[1:])
	if p.Kind < kindEngine || p.Kind > kindTold {
		return nil, fmt.Errorf("kind %d is unknown", p.Kind)
	}
	if p.Vote.Phase > phaseCommit {
		return nil, fmt.Errorf("phase %d is unknown", p.Vote.Phase)
	}
	return p, nil
}

// signed reports whether the bytes of a parcel carry the key's signature.
func signed(b []byte, key identity.PublicKey, genesis ledger.Hash) bool {
	return identity.VerifyBytes([]byte(key), parcelInput(genesis, b[:headSize]), b[headSize:parcelMin])
}
