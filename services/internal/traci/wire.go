package traci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The commands, variables and types that we use, from the TraCI protocol
// (https://sumo.dlr.de/docs/TraCI/Protocol.html).
const (
	cmdVersion  = 0x00
	cmdSimStep  = 0x02
	cmdClose    = 0x7F
	cmdSetLight = 0xC2

	cmdGetVehicle = 0xA4

	cmdSubLight   = 0xD2
	cmdSubVehicle = 0xD4
	cmdSubSim     = 0xDB
	cmdSubPerson  = 0xDE

	// A response to a get or to a subscription is the command plus this.
	responseOffset = 0x10

	varState         = 0x20 // traffic light: state as letters
	varSpeed         = 0x40
	varLength        = 0x44
	varClass         = 0x49
	varRoad          = 0x50
	varLane          = 0x51
	varLanePos       = 0x56
	varTime          = 0x66
	varNextTLS       = 0x70
	varDeparted      = 0x74
	varMinExpected   = 0x7D
	varDepartedWalks = 0x24 // persons that departed in the step
	varNextEdge      = 0xC1

	typeLonLat     = 0x00
	typePos2D      = 0x01
	typeLonLatAlt  = 0x02
	typePos3D      = 0x03
	typeRoadMap    = 0x04
	typePolygon    = 0x06
	typeUByte      = 0x07
	typeByte       = 0x08
	typeInt        = 0x09
	typeDouble     = 0x0B
	typeString     = 0x0C
	typeStringList = 0x0E
	typeCompound   = 0x0F
	typeDoubleList = 0x10
	typeColor      = 0x11

	statusOK             = 0x00
	statusNotImplemented = 0x01

	// always as begin and end of a subscription means: from now on, for good.
	always = -1073741824.0

	// maxMessage bounds what we are ready to receive in one piece. The largest
	// answer seen is a few hundred kilobytes.
	maxMessage = 64 << 20
	// maxDepth bounds compounds within compounds.
	maxDepth = 8
)

var errTruncated = errors.New("message ends too early")

// A message is several commands that go to SUMO in one piece and are answered
// in one piece.
type message struct{ b []byte }

func (m *message) reset()       { m.b = m.b[:0] }
func (m *message) u8(v byte)    { m.b = append(m.b, v) }
func (m *message) i32(v int)    { m.b = binary.BigEndian.AppendUint32(m.b, uint32(int32(v))) }
func (m *message) str(s string) { m.i32(len(s)); m.b = append(m.b, s...) }
func (m *message) f64(v float64) {
	m.b = binary.BigEndian.AppendUint64(m.b, math.Float64bits(v))
}

// command appends one command; body writes what follows its id.
func (m *message) command(id byte, body func(*message)) {
	// Always the long form of the length: 0, then four bytes that count themselves.
	at := len(m.b)
	m.u8(0)
	m.i32(0)
	m.u8(id)
	if body != nil {
		body(m)
	}
	binary.BigEndian.PutUint32(m.b[at+1:], uint32(len(m.b)-at))
}

func (m *message) subscribe(cmd byte, object string, vars ...byte) {
	m.command(cmd, func(m *message) {
		m.f64(always)
		m.f64(always)
		m.str(object)
		m.u8(byte(len(vars)))
		m.b = append(m.b, vars...)
	})
}

func (m *message) get(cmd, variable byte, object string) {
	m.command(cmd, func(m *message) {
		m.u8(variable)
		m.str(object)
	})
}

func (m *message) setLight(tls, letters string) {
	m.command(cmdSetLight, func(m *message) {
		m.u8(varState)
		m.str(tls)
		m.u8(typeString)
		m.str(letters)
	})
}

func (m *message) step() { m.command(cmdSimStep, func(m *message) { m.f64(0) }) }

// A reader takes values off a received message. The first thing wrong with it
// sticks: after it every read returns zero, so that callers check err once.
// Nothing that a reader is given makes it panic or allocate more than it was given.
type reader struct {
	b   []byte
	off int
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = fmt.Errorf("byte %d of %d: %w", r.off, len(r.b), err)
	}
}

func (r *reader) left() int { return len(r.b) - r.off }

func (r *reader) take(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > r.left() {
		r.fail(errTruncated)
		return nil
	}
	v := r.b[r.off : r.off+n]
	r.off += n
	return v
}

func (r *reader) u8() byte {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) i32() int {
	if v := r.take(4); v != nil {
		return int(int32(binary.BigEndian.Uint32(v)))
	}
	return 0
}

func (r *reader) f64() float64 {
	if v := r.take(8); v != nil {
		return math.Float64frombits(binary.BigEndian.Uint64(v))
	}
	return 0
}

// bytes returns a string without copying it; it is valid until the next message.
func (r *reader) bytes() []byte { return r.take(r.i32()) }

func (r *reader) str() string { return string(r.bytes()) }

// count reads how many items follow, each of at least size bytes.
func (r *reader) count(size int) int {
	n := r.i32()
	if n < 0 || n > r.left()/size {
		r.fail(fmt.Errorf("%d items cannot follow", n))
		return 0
	}
	return n
}

// typed reads a type byte and fails where it is not the one expected.
func (r *reader) typed(want byte) {
	if got := r.u8(); r.err == nil && got != want {
		r.fail(fmt.Errorf("value has type %#02x, want %#02x", got, want))
	}
}

// skip passes over a value of the given type.
func (r *reader) skip(typ byte, depth int) {
	if depth > maxDepth {
		r.fail(fmt.Errorf("compounds nest deeper than %d", maxDepth))
		return
	}
	switch typ {
	case typeUByte, typeByte:
		r.take(1)
	case typeInt, typeColor:
		r.take(4)
	case typeDouble:
		r.take(8)
	case typeLonLat, typePos2D:
		r.take(16)
	case typeLonLatAlt, typePos3D:
		r.take(24)
	case typeString:
		r.bytes()
	case typeStringList:
		for range r.count(4) {
			r.bytes()
		}
	case typeDoubleList:
		r.take(8 * r.count(8))
	case typeRoadMap:
		r.bytes()
		r.take(9)
	case typePolygon:
		n := int(r.u8())
		if n == 0 {
			n = r.count(16)
		}
		r.take(16 * n)
	case typeCompound:
		for range r.count(2) {
			r.skip(r.u8(), depth+1)
			if r.err != nil {
				return
			}
		}
	default:
		r.fail(fmt.Errorf("value has unknown type %#02x", typ))
	}
}

// length reads the length of a command or response and returns where it ends.
func (r *reader) length() (end int) {
	at := r.off
	n := int(r.u8())
	if n == 0 {
		n = r.i32()
	}
	if r.err == nil && (n < r.off-at || n > len(r.b)-at) {
		r.fail(fmt.Errorf("a response of %d bytes cannot follow", n))
	}
	return at + n
}

// A CommandError is SUMO's refusal of a command.
type CommandError struct {
	Command byte   // TraCI's number
	Status  byte   // TraCI's result
	Text    string // SUMO's words
}

func (e *CommandError) Error() string {
	what := "refused"
	if e.Status == statusNotImplemented {
		what = "not implemented"
	}
	return fmt.Sprintf("sumo: command %#02x (%s) %s: %s", e.Command, commandName(e.Command), what, e.Text)
}

func commandName(c byte) string {
	switch c {
	case cmdVersion:
		return "version"
	case cmdSimStep:
		return "simulation step"
	case cmdClose:
		return "close"
	case cmdSetLight:
		return "set traffic light"
	case cmdGetVehicle:
		return "get vehicle"
	case cmdSubLight:
		return "subscribe traffic light"
	case cmdSubVehicle:
		return "subscribe vehicle"
	case cmdSubSim:
		return "subscribe simulation"
	case cmdSubPerson:
		return "subscribe person"
	}
	return "unknown"
}

// status reads the status of command want. A refusal comes back as refused and
// leaves the reader usable; err is set where the bytes make no sense.
func (r *reader) status(want byte) (refused *CommandError) {
	end := r.length()
	id, result, text := r.u8(), r.u8(), r.bytes()
	switch {
	case r.err != nil:
	case id != want:
		r.fail(fmt.Errorf("status of command %#02x, want %#02x", id, want))
	case r.off != end:
		r.fail(fmt.Errorf("status of command %#02x has %d bytes too many", id, end-r.off))
	case result != statusOK:
		return &CommandError{Command: id, Status: result, Text: string(text)}
	}
	return nil
}

// subscription reads one subscription's answer. visit is called for each
// variable that SUMO could read, with the reader at its type byte; what it
// leaves unread is passed over.
func (r *reader) subscription(visit func(response byte, object []byte, variable byte, v *reader)) (refused *CommandError) {
	end := r.length()
	response := r.u8()
	object := r.bytes()
	n := int(r.u8())
	for range n {
		if r.err != nil {
			return nil
		}
		variable, status := r.u8(), r.u8()
		start := r.off
		r.skip(r.u8(), 0)
		if r.err != nil {
			return nil
		}
		value := reader{b: r.b[:r.off], off: start}
		if status != statusOK {
			value.typed(typeString)
			refused = &CommandError{Command: response - responseOffset, Status: status,
				Text: fmt.Sprintf("variable %#02x of %q: %s", variable, object, value.bytes())}
			continue
		}
		visit(response, object, variable, &value)
		if value.err != nil {
			r.fail(fmt.Errorf("variable %#02x of %q: %w", variable, object, value.err))
		}
	}
	if r.err == nil && r.off != end {
		r.fail(fmt.Errorf("subscription of %q ends at byte %d, its length says %d", object, r.off, end))
	}
	return refused
}

// value reads the answer to a get, and leaves the reader at its type byte.
func (r *reader) value(cmd, variable byte) {
	r.length()
	id, v := r.u8(), r.u8()
	r.bytes()
	if r.err == nil && (id != cmd+responseOffset || v != variable) {
		r.fail(fmt.Errorf("answer %#02x to variable %#02x, want %#02x to %#02x", id, v, cmd+responseOffset, variable))
	}
}
