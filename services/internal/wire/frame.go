package wire

import (
	"math"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Every frame is decoded by validation, by each validator and by whoever acts
// on it. What follows reads a plain one, without the generated code's objects
// and reflection, several times faster. It gives up on anything out of the
// ordinary, which then goes the slow way and gets its error there: what it does
// accept means the same, and a fuzz test holds one against the other.

// fastFrame decodes a frame's protobuf payload, or reports that it cannot.
func fastFrame(payload []byte) (*traffic.Frame, bool) {
	// Texts are parts of one copy: a frame's own is about a kilobyte.
	r := reader{b: payload, text: string(payload)}
	f := &traffic.Frame{Time: time.Unix(0, 0).UTC()}
	readings := 0
	for c := r; c.next(); {
		if c.num == 9 {
			readings++
		}
	}
	f.Readings = make([]traffic.Reading, 0, readings)
	for r.next() {
		switch r.num {
		case 1:
			f.District = traffic.DistrictID(r.str())
		case 2:
			f.Junction = traffic.JunctionID(r.str())
		case 3:
			f.Device = traffic.DeviceID(r.str())
		case 4:
			f.BootEpoch = r.uint()
		case 5:
			f.Seq = r.uint()
		case 6:
			switch b := r.bytes(); len(b) {
			case 0:
				f.Prev = [32]byte{}
			case 32:
				f.Prev = [32]byte(b)
			default:
				return nil, false
			}
		case 7:
			f.Time = time.Unix(0, int64(r.uint())).UTC()
		case 8:
			f.Interval = time.Duration(uint32(r.uint())) * time.Millisecond
		case 9:
			f.Readings = append(f.Readings, fastReading(&r))
		case 10:
			f.Events = append(f.Events, fastEvent(&r))
		case 11:
			fastSignal(&r, &f.Signal) // a second one is merged into the first
		case 12:
			f.Results = append(f.Results, fastResult(&r))
		default:
			return nil, false
		}
		if r.bad {
			return nil, false
		}
	}
	return f, !r.bad
}

func fastReading(p *reader) traffic.Reading {
	var v traffic.Reading
	r := p.message()
	for r.next() {
		switch r.num {
		case 1:
			v.Detector = traffic.DetectorID(r.str())
		case 2:
			v.Count = uint32(r.uint())
		case 3:
			v.OccupancyPermille = uint32(r.uint())
		case 4:
			v.SpeedCMS = uint32(r.uint())
		case 5:
			v.Vehicles = uint32(r.uint())
		case 6:
			v.Halted = uint32(r.uint())
		case 7:
			v.HeadWaitMS = uint32(r.uint())
		case 8:
			v.Priority = traffic.Priority(r.max(math.MaxUint8))
		case 9:
			fastAhead(&r, &v)
		default:
			r.bad = true
		}
	}
	p.bad = p.bad || r.bad
	return v
}

// fastAhead reads the packed form, once; any other goes the slow way.
func fastAhead(p *reader, v *traffic.Reading) {
	if v.Ahead != nil {
		p.bad = true
		return
	}
	b := p.bytes()
	n := 0
	for _, c := range b {
		if c < 0x80 {
			n++
		}
	}
	if n == 0 || n%2 != 0 {
		p.bad = true
		return
	}
	v.Ahead = make([]traffic.Approach, n/2)
	for i := range n {
		x, size := protowire.ConsumeVarint(b)
		if size < 0 {
			p.bad = true
			return
		}
		b = b[size:]
		if a := &v.Ahead[i/2]; i%2 == 0 {
			a.DistanceCM = uint32(x)
		} else {
			a.SpeedCMS = uint32(x)
		}
	}
	p.bad = p.bad || len(b) > 0
}

func fastEvent(p *reader) traffic.Event {
	var v traffic.Event
	r := p.message()
	for r.next() {
		switch r.num {
		case 1:
			v.Code = uint16(r.max(math.MaxUint16))
		case 2:
			v.Param = uint16(r.max(math.MaxUint16))
		case 3:
			v.OffsetMS = uint32(r.uint())
		default:
			r.bad = true
		}
	}
	p.bad = p.bad || r.bad
	return v
}

func fastSignal(p *reader, v *traffic.Signal) {
	r := p.message()
	for r.next() {
		switch r.num {
		case 1:
			v.State = traffic.State(r.str())
		case 2:
			v.Stage = int(int32(protowire.DecodeZigZag(r.uint() & math.MaxUint32)))
		case 3:
			v.SinceMS = int64(min(r.uint(), math.MaxInt64))
		case 4:
			v.Mode = traffic.Mode(r.str())
		case 5:
			v.Trip = r.str()
		case 6:
			v.Override = r.str()
		default:
			r.bad = true
		}
	}
	p.bad = p.bad || r.bad
}

func fastResult(p *reader) traffic.CommandResult {
	var v traffic.CommandResult
	r := p.message()
	for r.next() {
		switch r.num {
		case 1:
			v.Seq = r.uint()
		case 2:
			v.Applied = r.uint() != 0
		case 3:
			v.Reason = r.str()
		default:
			r.bad = true
		}
	}
	p.bad = p.bad || r.bad
	return v
}

// reader goes through the fields of one message. text is b as a string.
type reader struct {
	b    []byte
	text string
	at   int
	bad  bool // something is not plain; what was read is worth nothing

	// Of the field that next found.
	num        protowire.Number
	typ        protowire.Type
	value      uint64 // of a varint
	begin, end int    // of bytes
}

// next finds the next field.
func (r *reader) next() bool {
	if r.bad || r.at >= len(r.b) {
		return false
	}
	num, typ, n := protowire.ConsumeTag(r.b[r.at:])
	if n < 0 {
		r.bad = true
		return false
	}
	r.num, r.typ = num, typ
	r.at += n
	switch typ {
	case protowire.VarintType:
		r.value, n = protowire.ConsumeVarint(r.b[r.at:])
	case protowire.BytesType:
		var v []byte
		v, n = protowire.ConsumeBytes(r.b[r.at:])
		r.end = r.at + n
		r.begin = r.end - len(v)
	default: // the schema has none
		n = -1
	}
	if n < 0 {
		r.bad = true
		return false
	}
	r.at += n
	return true
}

func (r *reader) is(t protowire.Type) bool {
	if r.typ != t {
		r.bad = true
	}
	return r.typ == t
}

func (r *reader) uint() uint64 {
	if !r.is(protowire.VarintType) {
		return 0
	}
	return r.value
}

// max reads a uint32 that must not be more than limit.
func (r *reader) max(limit uint32) uint32 {
	v := uint32(r.uint())
	if v > limit {
		r.bad = true
	}
	return v
}

func (r *reader) bytes() []byte {
	if !r.is(protowire.BytesType) {
		return nil
	}
	return r.b[r.begin:r.end]
}

func (r *reader) str() string {
	if !r.is(protowire.BytesType) {
		return ""
	}
	s := r.text[r.begin:r.end]
	if !utf8.ValidString(s) {
		r.bad = true
	}
	return s
}

func (r *reader) message() reader {
	if !r.is(protowire.BytesType) {
		return reader{bad: true}
	}
	return reader{b: r.b[r.begin:r.end], text: r.text[r.begin:r.end]}
}
