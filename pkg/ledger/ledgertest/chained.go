package ledgertest

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// FrameAfter returns a frame of the district's roadside unit that bears the hash
// of the one before, as units make them; none before the first after a start.
func (d *District) FrameAfter(before *Record, boot, seq uint64, at time.Time) Record {
	return d.FrameWith(before, boot, seq, at, nil)
}

// FrameWith is [District.FrameAfter] with further fields at its end, as protobuf.
func (d *District) FrameWith(before *Record, boot, seq uint64, at time.Time, more []byte) Record {
	b := field(nil, 1, string(d.ID))
	b = field(b, 2, Junction)
	b = field(b, 3, Device)
	b = field(b, 4, boot)
	b = field(b, 5, seq)
	if before != nil {
		e := must(identity.ParseEnvelope(before.Envelope))
		h := sha256.Sum256(e.Payload)
		b = field(b, 6, string(h[:]))
	}
	b = field(b, 7, uint64(at.UnixNano()))
	b = field(b, 8, uint64(1000))
	reading := field(field(nil, 1, "D1"), 2, uint64(1))
	b = field(b, 9, string(reading))
	return NewRecord(d.DeviceKey, identity.KindFrame, identity.Protobuf, append(b, more...))
}

// Showed returns the fields of a frame for its lamps, and for what became of a
// command: reason is why it was refused, "" where it was applied.
func Showed(state string, command uint64, reason string) []byte {
	signal := field(nil, 1, state)
	signal = field(signal, 4, string("coordinated"))
	b := field(nil, 11, string(signal))
	if command == 0 {
		return b
	}
	res := field(nil, 1, command)
	if reason == "" {
		res = field(res, 2, uint64(1))
	} else {
		res = field(res, 3, reason)
	}
	return field(b, 12, string(res))
}

// FrameJSON is [District.FrameAfter] as JSON.
func (d *District) FrameJSON(before *Record, boot, seq uint64, at time.Time) Record {
	m := map[string]any{"district": d.ID, "junction": Junction, "device": Device, "bootEpoch": boot, "seq": seq, "timeUnixNano": at.UnixNano(), "intervalMs": 1000,
		"readings": []any{map[string]any{"detector": "D1", "count": 1}}}
	if before != nil {
		e := must(identity.ParseEnvelope(before.Envelope))
		h := sha256.Sum256(e.Payload)
		m["prev"] = h[:]
	}
	return NewRecord(d.DeviceKey, identity.KindFrame, identity.JSON, must(json.Marshal(m)))
}

// CommandOn returns a command of signal-control that rests on a frame of a block.
func (d *District) CommandOn(seq, height, boot, frame uint64, at time.Time) Record {
	r := must(identity.ParseEnvelope(d.Command(seq, height, at).Envelope))
	key := field(field(field(nil, 1, Device), 2, boot), 3, frame)
	b := append(binary.AppendUvarint(nil, 5<<3|2), byte(len(key)))
	return NewRecord(d.ControlKey, identity.KindCommand, identity.Protobuf, append(append(b, key...), r.Payload...))
}

// Names of who [Chain.Keepers] files.
const (
	Police  = "official-police"
	Sealing = "sealing"
)

func (d *District) keeperKey(id string) ed25519.PrivateKey { return key(Rand(string(d.ID) + " " + id)) }

// Keepers returns the changes that file an official of another department than the
// registrar's, the service that gives receipts of deletion, and the governance by
// which redactions are possible from a height on.
func (d *District) Keepers(nonce, from uint64) []Record {
	official := identity.Official{Key: public(d.keeperKey(Police)), Department: "police", Roles: []string{identity.Registrar}}
	rules := identity.Governance{Version: 1, Default: identity.Need{Role: identity.Registrar, Officials: 1, Departments: 1},
		Rules: []identity.Rule{{Type: identity.TypeRedaction, Need: identity.Need{Role: identity.Registrar, Officials: 2, Departments: 2}}}}
	service := identity.Service{Key: public(d.keeperKey(Sealing)), Signs: []identity.RecordKind{identity.KindDeletion}}
	return []Record{
		d.Change(identity.Change{Action: identity.Put, Type: identity.TypeOfficial, ID: Police, Body: must(json.Marshal(official)), Nonce: nonce}),
		d.Change(identity.Change{Action: identity.Put, Type: identity.TypeService, ID: Sealing, Body: must(json.Marshal(service)), Nonce: nonce + 1}),
		d.Change(identity.Change{Action: identity.Put, Type: identity.TypeGovernance, ID: identity.GovernanceID, Body: must(json.Marshal(rules)), Nonce: nonce + 2}),
		d.Change(identity.Change{Action: identity.Put, Type: identity.TypeFeature, ID: identity.FeatureRetention, Body: must(json.Marshal(identity.Feature{From: from})), Nonce: nonce + 3}),
	}
}

// Redact returns a redaction of the leaf with an index by two officials; see
// [District.Keepers].
func (c *Chain) Redact(index uint64, leaf [32]byte, nonce uint64) Record {
	body := must(json.Marshal(identity.Redaction{Commitment: leaf[:], Basis: "court-order"}))
	ch := identity.Change{District: c.ID, Action: identity.Put, Type: identity.TypeRedaction, ID: fmt.Sprint(index), Body: body, Nonce: nonce}
	ch.Base = c.Registry.Base(ch.Type, ch.ID)
	ch.Approvals = []identity.Approval{must(identity.Approve(c.keeperKey(Police), ch))}
	return NewRecord(c.Registrar, identity.KindRedaction, identity.JSON, must(ch.Marshal()))
}

// Receipt returns a receipt of deletion, by the service of [District.Keepers].
func (d *District) Receipt(payload []byte) Record {
	return NewRecord(d.keeperKey(Sealing), identity.KindDeletion, identity.JSON, payload)
}
