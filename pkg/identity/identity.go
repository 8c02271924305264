// Package identity says who signed what: keys, envelopes, and the registry of
// everything that may take part in a district.
//
// # Envelopes
//
// An [Envelope] is exact payload bytes with an Ed25519 signature over
//
//	"stopline envelope v1\n" kind "\n" content-type "\n" payload
//
// The bytes are made once by the signer and never re-encoded. The kind and the
// content type are under the signature, so that bytes signed as one thing can
// never be shown as another.
//
// The canonical encoding, to which the log commits, is also a valid encoding of
// the protobuf message stopline.v1.Envelope: fields 1 to 5 in ascending order,
// each length-delimited with the shortest length prefix, empty ones left out.
// [ParseEnvelope] refuses any other encoding of the same content, so that one
// envelope has one commitment.
//
// # Signatures
//
// A signature is valid if ZIP 215 accepts it. RFC 8032 leaves open what to do
// with low-order components; ZIP 215 closes that, and is the only published rule
// under which verifying one by one and verifying in batches always agree
// (https://zips.z.cash/zip-0215). Validators would split over anything else.
//
// # The registry
//
// A [Registry] is what all validators hold alike: entries, and what follows from
// them. It changes by [Change] records only, one after the other, through
// [Registry.Apply], which looks at nothing but the state and the record.
//
// Whose signatures a change needs says the [Governance] entry: a role, how many
// officials, of how many departments. The signer of the record is one of them;
// the others sign an [Approval], over bytes of their own domain, and give it to
// the sender, in a [Proposal] that goes round or by any other way. An approval is
// for one change to one state of one entry, and is used up with it: it names the
// hash of the entry that it replaces, a nonce that none of those who signed can
// use again, and the last block at which it may be carried out.
package identity

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// KeyID names a public key: hex of the first 16 bytes of its SHA-256.
type KeyID string

// IDOf returns the id of a public key.
func IDOf(k ed25519.PublicKey) KeyID {
	h := sha256.Sum256(k)
	return KeyID(hex.EncodeToString(h[:16]))
}

// RecordKind says what an envelope's payload is.
type RecordKind string

// The kinds of record, as in the design.
const (
	KindFrame     RecordKind = "frame"
	KindImport    RecordKind = "import"
	KindRequest   RecordKind = "request"
	KindCommand   RecordKind = "command"
	KindOverride  RecordKind = "override"
	KindRegistry  RecordKind = "registry"
	KindAccess    RecordKind = "access"
	KindRedaction RecordKind = "redaction"
	KindAnchor    RecordKind = "anchor"
	KindHealth    RecordKind = "health"
	// KindDeletion is a holder's receipt for what it has let go of: pkg/retention.
	KindDeletion RecordKind = "deletion"
	// KindPlan is the fall-back plan of a junction, by signal-control: it sets times
	// and nothing else, see [traffic.Fallback].
	KindPlan RecordKind = "plan"
)

// Valid reports whether k is one of the kinds above.
func (k RecordKind) Valid() bool {
	switch k {
	case KindFrame, KindImport, KindRequest, KindCommand, KindOverride, KindRegistry, KindAccess, KindRedaction, KindAnchor, KindHealth, KindDeletion, KindPlan:
		return true
	}
	return false
}

// The content types of payloads.
const (
	Protobuf = "application/x-protobuf"
	JSON     = "application/json"
)

// MaxEnvelope is the largest canonical envelope that any part of the system
// takes, bytes. It leaves room for a commitment to fit a C2SP log entry many
// times over and for 256 envelopes to fit one message of the bus.
const MaxEnvelope = 256 << 10

// Envelope is signed bytes with the names needed to check them.
type Envelope struct {
	Kind        RecordKind
	ContentType string
	Key         KeyID
	Payload     []byte
	Signature   []byte
}

const envelopeDomain = "stopline envelope v1\n"

// SigningInput returns the bytes under the signature.
func SigningInput(k RecordKind, contentType string, payload []byte) []byte {
	b := make([]byte, 0, len(envelopeDomain)+len(k)+len(contentType)+2+len(payload))
	b = append(b, envelopeDomain...)
	b = append(b, k...)
	b = append(b, '\n')
	b = append(b, contentType...)
	b = append(b, '\n')
	return append(b, payload...)
}

// Sign makes the envelope of a payload.
func Sign(key ed25519.PrivateKey, k RecordKind, contentType string, payload []byte) Envelope {
	return Envelope{
		Kind: k, ContentType: contentType, Payload: payload,
		Key:       IDOf(key.Public().(ed25519.PublicKey)),
		Signature: ed25519.Sign(key, SigningInput(k, contentType, payload)),
	}
}

// Marshal returns the canonical encoding.
func (e Envelope) Marshal() []byte {
	b := make([]byte, 0, len(e.Payload)+len(e.Signature)+len(e.ContentType)+len(e.Key)+len(e.Kind)+24)
	b = appendField(b, 1, string(e.Kind))
	b = appendField(b, 2, e.ContentType)
	b = appendField(b, 3, string(e.Key))
	b = appendField(b, 4, e.Payload)
	return appendField(b, 5, e.Signature)
}

func appendField[T ~string | ~[]byte](b []byte, n byte, v T) []byte {
	if len(v) == 0 {
		return b
	}
	b = append(b, n<<3|2)
	b = binary.AppendUvarint(b, uint64(len(v)))
	return append(b, v...)
}

// ErrEnvelope is what every refusal of [ParseEnvelope] wraps.
var ErrEnvelope = errors.New("envelope")

// ParseEnvelope decodes a canonical encoding; the result shares memory with b.
// It checks the form and the size, not the signature.
func ParseEnvelope(b []byte) (Envelope, error) {
	var e Envelope
	bad := func(format string, args ...any) (Envelope, error) {
		return Envelope{}, kind.Errorf(kind.Invalid, "%w: %s", ErrEnvelope, fmt.Sprintf(format, args...))
	}
	if len(b) > MaxEnvelope {
		return bad("%d bytes, at most %d are taken", len(b), MaxEnvelope)
	}
	last := byte(0)
	for p := b; len(p) > 0; {
		tag := p[0]
		n := tag >> 3
		if tag&7 != 2 || n < 1 || n > 5 {
			return bad("unknown field or type, tag %#x", tag)
		}
		if n <= last {
			return bad("field %d out of order or repeated", n)
		}
		last = n
		l, w := binary.Uvarint(p[1:])
		if w <= 0 || w > 1 && l>>(7*(w-1)) == 0 {
			return bad("field %d: length is not in its shortest form", n)
		}
		p = p[1+w:]
		if l > uint64(len(p)) {
			return bad("field %d: truncated, %d bytes of %d", n, len(p), l)
		}
		if l == 0 {
			return bad("field %d: empty fields must be left out", n)
		}
		v := p[:l]
		p = p[l:]
		switch n {
		case 1:
			e.Kind = RecordKind(v)
		case 2:
			e.ContentType = string(v)
		case 3:
			e.Key = KeyID(v)
		case 4:
			e.Payload = v
		case 5:
			e.Signature = v
		}
	}
	if !e.Kind.Valid() {
		return bad("kind %.40q: unknown", string(e.Kind))
	}
	if e.ContentType != Protobuf && e.ContentType != JSON {
		return bad("content_type %.60q: must be %s or %s", e.ContentType, Protobuf, JSON)
	}
	if len(e.Key) != 32 || strings.Trim(string(e.Key), "0123456789abcdef") != "" {
		return bad("key_id: %.40q, must be 32 lower-case hex digits", string(e.Key))
	}
	if len(e.Payload) == 0 {
		return bad("payload: must not be empty")
	}
	if len(e.Signature) != ed25519.SignatureSize {
		return bad("signature: must be %d bytes, has %d", ed25519.SignatureSize, len(e.Signature))
	}
	return e, nil
}
