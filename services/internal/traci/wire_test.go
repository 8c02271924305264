package traci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// answer builds what SUMO would send; the helpers mirror the ones that we write
// commands with.
func statusOf(m *message, command, result byte, text string) {
	m.u8(byte(7 + len(text)))
	m.u8(command)
	m.u8(result)
	m.str(text)
}

// subscriptionOf appends one subscription's answer, its variables by body.
func subscriptionOf(m *message, response byte, object string, n byte, body func(*message)) {
	m.command(response, func(m *message) {
		m.str(object)
		m.u8(n)
		body(m)
	})
}

func vehicleAnswer(m *message, id, lane string, pos, speed float64) {
	subscriptionOf(m, cmdSubVehicle+responseOffset, id, 4, func(m *message) {
		m.u8(varLane)
		m.u8(statusOK)
		m.u8(typeString)
		m.str(lane)
		m.u8(varLanePos)
		m.u8(statusOK)
		m.u8(typeDouble)
		m.f64(pos)
		m.u8(varSpeed)
		m.u8(statusOK)
		m.u8(typeDouble)
		m.f64(speed)
		m.u8(varNextTLS)
		m.u8(statusOK)
		m.u8(typeCompound)
		m.i32(5)
		m.u8(typeInt)
		m.i32(1)
		m.u8(typeString)
		m.str("alpha")
		m.u8(typeInt)
		m.i32(10)
		m.u8(typeDouble)
		m.f64(42)
		m.u8(typeByte)
		m.u8('G')
	})
}

func simulationAnswer(m *message, now float64, departed ...string) {
	subscriptionOf(m, cmdSubSim+responseOffset, "", 3, func(m *message) {
		m.u8(varTime)
		m.u8(statusOK)
		m.u8(typeDouble)
		m.f64(now)
		m.u8(varDeparted)
		m.u8(statusOK)
		m.u8(typeStringList)
		m.i32(len(departed))
		for _, id := range departed {
			m.str(id)
		}
		m.u8(varMinExpected)
		m.u8(statusOK)
		m.u8(typeInt)
		m.i32(3)
	})
}

// offline is a world without SUMO: what receives, without what sends.
func offline(t testing.TB) *World {
	s := cross(t)
	ds, err := s.Derive(Limits{}, SensingOracle)
	if err != nil {
		t.Fatal(err)
	}
	w := &World{scenario: s, derived: ds, index: map[traffic.JunctionID]int{}, oracle: true, observed: make([]string, len(ds))}
	for i, d := range ds {
		w.index[d.Junction.ID] = i
	}
	w.field = newField(s.net, w.Junctions())
	return w
}

// stepAnswer reads the subscriptions of one step's answer, as World.advance does.
func stepAnswer(w *World, r *reader) *CommandError {
	refused := r.status(cmdSimStep)
	if refused != nil {
		return refused
	}
	receive := w.receive(r)
	for range r.count(4) {
		refused = first(refused, r.subscription(receive))
	}
	return refused
}

func TestDecodeStep(t *testing.T) {
	w := offline(t)
	w.field.add("car")
	var m message
	statusOf(&m, cmdSimStep, statusOK, "")
	m.i32(3)
	simulationAnswer(&m, 101, "bus", "truck")
	vehicleAnswer(&m, "car", "WA_1", 12.5, 3)
	subscriptionOf(&m, cmdSubLight+responseOffset, "beta", 1, func(m *message) {
		m.u8(varState)
		m.u8(statusOK)
		m.u8(typeString)
		m.str("rrGGGg")
	})
	r := &reader{b: m.b}
	if refused := stepAnswer(w, r); refused != nil || r.err != nil {
		t.Fatal(refused, r.err)
	}
	if r.left() != 0 {
		t.Errorf("%d bytes left, want none", r.left())
	}
	if got, want := w.now, 101*time.Second; got != want {
		t.Errorf("now: got %s, want %s", got, want)
	}
	if got, want := strings.Join(w.fresh, " "), "bus truck"; got != want {
		t.Errorf("departed: got %q, want %q", got, want)
	}
	if got, want := w.observed[1], "rrGGGg"; got != want {
		t.Errorf("lamps of beta: got %q, want %q", got, want)
	}
	v := w.field.byID["car"]
	if v.pos != 12.5 || v.speed != 3 || w.field.net.lanes[v.lane].id != "WA_1" || v.ahead != (nextSignal{"alpha", 10, 42}) {
		t.Errorf("car: got %+v", v)
	}
}

func TestDecodeRefusals(t *testing.T) {
	var m message
	statusOf(&m, cmdSetLight, 0xFF, "Traffic light 'x' is not known")
	r := &reader{b: m.b}
	err := r.status(cmdSetLight)
	want := "sumo: command 0xc2 (set traffic light) refused: Traffic light 'x' is not known"
	if err == nil || err.Error() != want || r.err != nil {
		t.Errorf("got %v (%v), want %s", err, r.err, want)
	}

	// A variable that SUMO could not read.
	m.reset()
	subscriptionOf(&m, cmdSubVehicle+responseOffset, "car", 1, func(m *message) {
		m.u8(varLane)
		m.u8(0xFF)
		m.u8(typeString)
		m.str("Vehicle 'car' is not known")
	})
	r = &reader{b: m.b}
	err = r.subscription(func(byte, []byte, byte, *reader) { t.Error("visited a variable that was refused") })
	if err == nil || !strings.Contains(err.Error(), "subscribe vehicle") || !strings.Contains(err.Error(), "is not known") {
		t.Errorf("got %v, want the command and SUMO's words", err)
	}
}

func TestDecodeGarbage(t *testing.T) {
	for _, c := range []struct {
		name string
		read func(*reader)
		in   []byte
		want string
	}{
		{"empty", func(r *reader) { _ = r.status(cmdSimStep) }, nil, "ends too early"},
		{"another command", func(r *reader) { _ = r.status(cmdSimStep) }, []byte{7, cmdClose, 0, 0, 0, 0, 0}, "status of command 0x7f, want 0x02"},
		{"length beyond the end", func(r *reader) { _ = r.status(cmdSimStep) }, []byte{200, cmdSimStep, 0, 0, 0, 0, 0}, "cannot follow"},
		{"length that is not used up", func(r *reader) { _ = r.status(cmdSimStep) }, []byte{8, cmdSimStep, 0, 0, 0, 0, 0, 0}, "1 bytes too many"},
		{"negative string", func(r *reader) { r.str() }, []byte{0xFF, 0xFF, 0xFF, 0xFF}, "ends too early"},
		{"more items than bytes", func(r *reader) { r.count(4) }, []byte{0x7F, 0xFF, 0xFF, 0xFF, 0}, "items cannot follow"},
		{"unknown type", func(r *reader) { r.skip(0x55, 0) }, []byte{1}, "unknown type 0x55"},
		{"another type", func(r *reader) { r.typed(typeDouble) }, []byte{typeInt}, "type 0x09, want 0x0b"},
		{"nested without end", func(r *reader) { r.skip(typeCompound, 0) },
			bytes.Repeat([]byte{0, 0, 0, 1, typeCompound}, 40), "nest deeper"},
	} {
		r := &reader{b: c.in}
		c.read(r)
		if r.err == nil || !strings.Contains(r.err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, r.err, c.want)
		}
		before := r.err
		if r.u8(); !errors.Is(r.err, before) {
			t.Errorf("%s: a later read replaced the first error", c.name)
		}
	}
	if _, err := answerLength([4]byte{0, 0, 0, 3}); err == nil {
		t.Error("an answer shorter than its own length was taken")
	}
	if _, err := answerLength([4]byte{0x7F, 0, 0, 0}); err == nil {
		t.Error("an answer of 2 GB was taken")
	}
}

// FuzzAnswer gives the decoder any bytes as the answer to a step: it must
// neither panic nor take what is not a number.
func FuzzAnswer(f *testing.F) {
	var m message
	statusOf(&m, cmdSimStep, statusOK, "")
	m.i32(2)
	simulationAnswer(&m, 101, "bus")
	vehicleAnswer(&m, "car", "WA_1", 12.5, 3)
	f.Add(m.b)
	f.Add(m.b[:len(m.b)/2])
	var refused message
	statusOf(&refused, cmdSimStep, 0xFF, "no")
	f.Add(refused.b)
	broken := bytes.Clone(m.b)
	binary.BigEndian.PutUint32(broken[7:], 1<<30)
	f.Add(broken)
	w := offline(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		w.fresh, w.step = nil, w.step+1
		w.field.add("car").seen = w.step
		r := &reader{b: b}
		_ = stepAnswer(w, r)
		if r.off > len(b) || r.off < 0 {
			t.Errorf("reader at byte %d of %d", r.off, len(b))
		}
		w.field.end(w.step, 1)
		for i := range w.derived {
			for _, x := range w.field.read(i) {
				if x.OccupancyPermille > 1000 || x.Halted > x.Vehicles {
					t.Errorf("reading %+v", x)
				}
			}
		}
	})
}
