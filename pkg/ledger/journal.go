package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// Entry of the block journal: what [Decided.Marshal] writes. Its record number
// in the journal is the height less one.

// Decided is a block as sealing journals it: everything of it but payloads.
// Verdicts and Requests are empty where the payload was gone before the block
// came here; the header still says their digests.
type Decided struct {
	Block
	Verdicts Verdicts
	Requests []Hash // ids of the block's batches
}

const journalMagic = "stopline block v1\n"

// Marshal returns the encoding: magic line, header, then, each with a 32-bit
// big-endian length before it, leaves, metadata, verdicts and request ids, then
// the votes as in [MarshalVotes].
func (d *Decided) Marshal() []byte {
	b := append([]byte(journalMagic), d.Header.Marshal()...)
	ids := make([]byte, 0, 32*len(d.Requests))
	for _, id := range d.Requests {
		ids = append(ids, id[:]...)
	}
	for _, p := range [][]byte{MarshalLeaves(d.Leaves), d.Metadata, d.Verdicts, ids} {
		b = appendSized(b, p)
	}
	return append(b, MarshalVotes(d.Votes)...)
}

func appendSized(b, p []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(p))), p...)
}

func cutSized(b []byte) (p, rest []byte, err error) {
	if len(b) < 4 {
		return nil, nil, errors.New("truncated")
	}
	n := uint64(binary.BigEndian.Uint32(b))
	b = b[4:]
	if uint64(len(b)) < n {
		return nil, nil, errors.New("truncated")
	}
	return b[:n:n], b[n:], nil
}

// ParseDecided decodes what [Decided.Marshal] wrote. It checks the form, and
// verdicts and requests against the header; for the rest see [Block.Check].
func ParseDecided(b []byte) (*Decided, error) {
	n := len(journalMagic)
	if len(b) < n+HeaderSize || string(b[:n]) != journalMagic {
		return nil, errors.New("block: not in the form of stopline block v1")
	}
	var d Decided
	var err error
	if d.Header, err = ParseHeader(b[n : n+HeaderSize]); err != nil {
		return nil, err
	}
	rest := b[n+HeaderSize:]
	var parts [4][]byte
	for i := range parts {
		if parts[i], rest, err = cutSized(rest); err != nil {
			return nil, fmt.Errorf("block %d: %w", d.Header.Height, err)
		}
	}
	if d.Leaves, err = ParseLeaves(parts[0]); err != nil {
		return nil, fmt.Errorf("block %d: %w", d.Header.Height, err)
	}
	d.Metadata, d.Verdicts = parts[1], parts[2]
	if len(parts[3])%32 != 0 {
		return nil, fmt.Errorf("block %d: requests: %d bytes is no multiple of 32", d.Header.Height, len(parts[3]))
	}
	for ids := parts[3]; len(ids) > 0; ids = ids[32:] {
		d.Requests = append(d.Requests, Hash(ids[:32]))
	}
	if d.Votes, err = ParseVotes(rest); err != nil {
		return nil, fmt.Errorf("block %d: %w", d.Header.Height, err)
	}
	if len(d.Verdicts) > 0 && d.Verdicts.Digest() != d.Header.Verdicts {
		return nil, fmt.Errorf("block %d: verdicts: do not match the header", d.Header.Height)
	}
	if len(d.Requests) > 0 && RequestsDigest(d.Requests) != d.Header.Requests {
		return nil, fmt.Errorf("block %d: requests: do not match the header", d.Header.Height)
	}
	return &d, nil
}

// maxVotes bounds what is decoded.
const maxVotes = 1024

// MarshalVotes encodes votes: a 16-bit count, then for each the validator's
// number as 64 bits and the 64 bytes of its signature, all big-endian.
func MarshalVotes(votes []Vote) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(votes)))
	for _, v := range votes {
		b = binary.BigEndian.AppendUint64(b, v.Validator)
		b = append(b, make([]byte, 64)...)
		copy(b[len(b)-64:], v.Signature)
	}
	return b
}

// ParseVotes decodes what [MarshalVotes] wrote.
func ParseVotes(b []byte) ([]Vote, error) {
	if len(b) < 2 {
		return nil, errors.New("votes: truncated")
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if n > maxVotes || len(b) != n*72 {
		return nil, fmt.Errorf("votes: %d bytes for %d votes, want %d", len(b), n, n*72)
	}
	out := make([]Vote, n)
	for i := range out {
		out[i] = Vote{Validator: binary.BigEndian.Uint64(b), Signature: b[8:72:72]}
		b = b[72:]
	}
	return out, nil
}

// Payload is one entry of the payload store: what the record leaf at Index
// commits to. A leaf at index i of block h is entry i−h, as each block up to h
// has one leaf that has no payload.
type Payload struct {
	Index    uint64
	Height   Height
	Received time.Time // by ingest's clock; not sealed
	Salt     Salt
	// Envelope is empty where the payload was gone before it came here.
	Envelope []byte
}

const payloadMagic = "stopline payload v1\n"

// Marshal returns the encoding: magic line, index, height and time received
// (Unix nanoseconds) as big-endian 64-bit integers, salt, envelope.
func (p *Payload) Marshal() []byte {
	b := make([]byte, 0, len(payloadMagic)+24+32+len(p.Envelope))
	b = append(b, payloadMagic...)
	b = binary.BigEndian.AppendUint64(b, p.Index)
	b = binary.BigEndian.AppendUint64(b, uint64(p.Height))
	b = binary.BigEndian.AppendUint64(b, uint64(p.Received.UnixNano()))
	b = append(b, p.Salt[:]...)
	return append(b, p.Envelope...)
}

// ParsePayload decodes what [Payload.Marshal] wrote. The envelope shares memory
// with b.
func ParsePayload(b []byte) (*Payload, error) {
	n := len(payloadMagic)
	if len(b) < n+24+32 || string(b[:n]) != payloadMagic {
		return nil, errors.New("payload: not in the form of stopline payload v1")
	}
	b = b[n:]
	return &Payload{
		Index: binary.BigEndian.Uint64(b), Height: Height(binary.BigEndian.Uint64(b[8:])),
		Received: time.Unix(0, int64(binary.BigEndian.Uint64(b[16:]))).UTC(),
		Salt:     Salt(b[24:56]), Envelope: b[56:],
	}, nil
}

// Leaf returns the leaf that commits to the payload.
func (p *Payload) Leaf() Leaf { return Leaf{ClassRecord, Commit(p.Salt, p.Envelope)} }

// SealedAt is one entry of the history of sealed checkpoints.
type SealedAt struct {
	Height Height // the block whose end it is
	Note   []byte // the signed checkpoint
}

const sealedMagic = "stopline sealed v1\n"

// Marshal returns the encoding: magic line, height as a big-endian 64-bit
// integer, the note.
func (s *SealedAt) Marshal() []byte {
	b := binary.BigEndian.AppendUint64([]byte(sealedMagic), uint64(s.Height))
	return append(b, s.Note...)
}

// ParseSealedAt decodes what [SealedAt.Marshal] wrote.
func ParseSealedAt(b []byte) (*SealedAt, error) {
	n := len(sealedMagic)
	if len(b) < n+8 || string(b[:n]) != sealedMagic {
		return nil, errors.New("sealed checkpoint: not in the form of stopline sealed v1")
	}
	return &SealedAt{Height: Height(binary.BigEndian.Uint64(b[n:])), Note: b[n+8:]}, nil
}
