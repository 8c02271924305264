package ledgertest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
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
