package ingest

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// canonical returns the canonical encoding of a protobuf envelope and its
// content. Any encoding of the message is taken: the signature covers kind,
// content type and payload, and those are not touched. But each field may come
// only once, and none that the schema does not have.
func (s *Service) canonical(b []byte) ([]byte, identity.Envelope, *refusal) {
	none := identity.Envelope{}
	if len(b) == 0 {
		return nil, none, &refusal{ReasonEmpty, "body", "body: must not be empty"}
	}
	if len(b) > s.MaxRecord+slack {
		return nil, none, s.tooLarge(len(b))
	}
	e, err := identity.ParseEnvelope(b)
	if err == nil {
		return s.sized(b, e)
	}
	var m pb.Envelope
	if wire.Decode(identity.Protobuf, b, &m) != nil || once(b) != nil {
		return nil, none, refuse(ReasonEnvelope, err) // ours says more of where it broke off
	}
	return s.fromProto(&m)
}

// slack is how much longer than the canonical one another encoding may be,
// bytes: lengths may be written longer than they need be.
const slack = 64

// fromJSON returns the canonical encoding of an envelope in protojson.
func (s *Service) fromJSON(b []byte) ([]byte, identity.Envelope, *refusal) {
	if len(b) == 0 {
		return nil, identity.Envelope{}, &refusal{ReasonEmpty, "body", "body: must not be empty"}
	}
	var m pb.Envelope
	if err := wire.Decode(identity.JSON, b, &m); err != nil {
		// protojson writes a no-break space at random, so that nobody relies on its
		// texts.
		return nil, identity.Envelope{}, &refusal{ReasonEnvelope, "body", "body: " + strings.ReplaceAll(err.Error(), "\u00a0", " ")}
	}
	return s.fromProto(&m)
}

func (s *Service) fromProto(m *pb.Envelope) ([]byte, identity.Envelope, *refusal) {
	b := identity.Envelope{
		Kind: identity.RecordKind(m.Kind), ContentType: m.ContentType, Key: identity.KeyID(m.KeyId), Payload: m.Payload, Signature: m.Signature,
	}.Marshal()
	if len(b) > s.MaxRecord {
		return nil, identity.Envelope{}, s.tooLarge(len(b))
	}
	e, err := identity.ParseEnvelope(b)
	if err != nil {
		return nil, e, refuse(ReasonEnvelope, err)
	}
	return b, e, nil
}

func (s *Service) sized(b []byte, e identity.Envelope) ([]byte, identity.Envelope, *refusal) {
	if len(b) > s.MaxRecord {
		return nil, identity.Envelope{}, s.tooLarge(len(b))
	}
	return b, e, nil
}

func (s *Service) tooLarge(n int) *refusal {
	return &refusal{ReasonSize, "body", fmt.Sprintf("body: %d bytes, at most %d are taken", n, s.MaxRecord)}
}

var errTwice = errors.New("field more than once")

// once refuses a message that has a field twice: protobuf would take the last,
// and somebody else the first.
func once(b []byte) error {
	var seen [6]bool // fields 1 to 5; wire.Decode has refused all others
	for len(b) > 0 {
		n, _, l := protowire.ConsumeField(b)
		if l < 0 {
			return protowire.ParseError(l)
		}
		if n < 1 || int(n) >= len(seen) || seen[n] {
			return errTwice
		}
		seen[n] = true
		b = b[l:]
	}
	return nil
}
