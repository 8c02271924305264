package wire

import (
	"bytes"
	"math"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func fullFrame() *traffic.Frame {
	return &traffic.Frame{
		District: "harbour", Junction: "Ä1", FrameKey: traffic.FrameKey{Device: "rsu-Ä1", BootEpoch: math.MaxUint64, Seq: 1 << 40},
		Prev: [32]byte{1, 2, 3}, Time: time.Unix(1_700_000_000, 123).UTC(), Interval: time.Second,
		Readings: []traffic.Reading{{Detector: "d1", Count: math.MaxUint32, OccupancyPermille: 250, SpeedCMS: 1300, Vehicles: 4, Halted: 2,
			HeadWaitMS: 900, Priority: traffic.Bus}, {}, {Detector: "d2", Count: 1}},
		Events:  []traffic.Event{{Code: math.MaxUint16, Param: 2, OffsetMS: 300}, {Param: math.MaxUint16}},
		Signal:  traffic.Signal{State: "Gr", Stage: -1, SinceMS: 1200, Mode: traffic.Local, Trip: "x", Override: "o"},
		Results: []traffic.CommandResult{{Seq: 7, Applied: false, Reason: "expired"}, {Seq: 8, Applied: true}},
	}
}

// field appends one field with its tag.
func field(b []byte, n protowire.Number, v any) []byte {
	switch v := v.(type) {
	case uint64:
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
	case string:
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	panic("field: neither number nor text")
}

// TestFastFrame holds the fast way against the slow one: where it takes a frame
// it must mean the same, and plain frames it must take.
func TestFastFrame(t *testing.T) {
	good := EncodeFrame(fullFrame())
	with := func(n protowire.Number, v any) []byte { return field(bytes.Clone(good), n, v) }
	signal := string(field(field(nil, 2, uint64(9)), 4, "tripped"))
	for _, tc := range []struct {
		name    string
		payload []byte
		fast    bool
	}{
		{"full", good, true},
		{"nothing", nil, true},
		{"only a reading", field(nil, 9, ""), true},
		{"scalar twice", with(5, uint64(12)), true},
		{"explicit zeros", field(field(field(nil, 4, uint64(0)), 6, ""), 3, ""), true},
		{"signal in two parts", with(11, signal), true},
		{"empty signal", with(11, ""), true},
		{"fields in other order", append(field(nil, 11, signal), good...), true},
		{"prev taken back", with(6, ""), true},
		{"number cut to its type", with(8, uint64(1)<<32|500), true},
		{"count cut to its type", with(9, string(field(nil, 2, uint64(1)<<40|3))), true},
		{"stage cut to its type", with(11, string(field(nil, 2, uint64(1)<<40|3))), true},
		{"since beyond int64", with(11, string(field(nil, 3, uint64(math.MaxUint64)))), true},
		{"truth beyond one", with(12, string(field(nil, 2, uint64(77)))), true},
		{"time before 1970", with(7, uint64(math.MaxUint64)), true},
		{"long varint", append(bytes.Clone(good), 4<<3, 0x85, 0x80, 0x80, 0x00), true},
		{"long tag", append(bytes.Clone(good), 0xa0, 0x80, 0x00, 7), true},

		{"short prev", with(6, "abc"), false},
		{"unknown number", with(13, uint64(1)), false},
		{"unknown text", with(99, "x"), false},
		{"unknown in a reading", with(9, string(field(nil, 9, uint64(1)))), false},
		{"unknown in an event", with(10, string(field(nil, 4, uint64(1)))), false},
		{"unknown in the signal", with(11, string(field(nil, 7, "x"))), false},
		{"unknown in a result", with(12, string(field(nil, 4, "x"))), false},
		{"text as number", with(1, uint64(1)), false},
		{"number as text", with(4, "1"), false},
		{"reading as number", with(9, uint64(1)), false},
		{"signal as number", with(11, uint64(1)), false},
		{"fixed64", protowire.AppendFixed64(protowire.AppendTag(bytes.Clone(good), 4, protowire.Fixed64Type), 1), false},
		{"group", protowire.AppendTag(protowire.AppendTag(bytes.Clone(good), 9, protowire.StartGroupType), 9, protowire.EndGroupType), false},
		{"field 0", append(bytes.Clone(good), 0, 1), false},
		{"text is not UTF-8", with(2, "\xff"), false},
		{"detector is not UTF-8", with(9, string(field(nil, 1, "\xff"))), false},
		{"half a letter", with(9, string(field(nil, 1, "\xc3"))), false},
		{"reason is not UTF-8", with(12, string(field(nil, 3, "\xff"))), false},
		{"truncated", good[:len(good)-1], false},
		{"truncated tag", append(bytes.Clone(good), 0x80), false},
		{"varint of 11 bytes", append(append(bytes.Clone(good), 4<<3), bytes.Repeat([]byte{0x80}, 11)...), false},
		{"length beyond the end", append(bytes.Clone(good), 1<<3|2, 100), false},
		{"length of a reading beyond it", with(9, string([]byte{1<<3 | 2, 100})), false},
		{"event code", with(10, string(field(nil, 1, uint64(math.MaxUint16+1)))), false},
		{"event parameter", with(10, string(field(nil, 2, uint64(math.MaxUint16+1)))), false},
		{"priority", with(9, string(field(nil, 8, uint64(math.MaxUint8+1)))), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := compareFrame(t, tc.payload); got != tc.fast {
				t.Errorf("taken the fast way: got %v, want %v", got, tc.fast)
			}
			if _, err := slowFrame(identity.Protobuf, tc.payload); (err == nil) != tc.fast {
				t.Errorf("the slow way: got %v, want an error: %v", err, !tc.fast)
			}
		})
	}
	for n := range good {
		compareFrame(t, good[:n])
	}
}

// compareFrame reports whether the fast way takes a payload, and fails where
// the slow way does not agree.
func compareFrame(t *testing.T, payload []byte) bool {
	t.Helper()
	got, ok := fastFrame(payload)
	if !ok {
		return false
	}
	want, err := slowFrame(identity.Protobuf, payload)
	if err != nil {
		t.Fatalf("payload %x: taken the fast way, refused the slow way: %v", payload, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("payload %x: the fast way gives\n%+v\nthe slow way\n%+v", payload, got, want)
	}
	return true
}

// FuzzFastFrame looks for a payload that the two ways read differently.
func FuzzFastFrame(f *testing.F) {
	good := EncodeFrame(fullFrame())
	f.Add(good)
	f.Add(append(bytes.Clone(good), good...))
	f.Add(field(nil, 11, string(field(nil, 2, uint64(9)))))
	f.Fuzz(func(t *testing.T, b []byte) { compareFrame(t, b) })
}
