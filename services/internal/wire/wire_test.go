package wire_test

import (
	"bytes"
	"crypto/ed25519"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

func frame() *traffic.Frame {
	return &traffic.Frame{
		District: "harbour", Junction: "A1", FrameKey: traffic.FrameKey{Device: "rsu-A1", BootEpoch: 3, Seq: 9},
		Prev: [32]byte{1, 2, 3}, Time: time.Unix(1_700_000_000, 123).UTC(), Interval: time.Second,
		Readings: []traffic.Reading{{Detector: "d1", Count: 1, OccupancyPermille: 250, SpeedCMS: 1300, Vehicles: 4, Halted: 2, HeadWaitMS: 900, Priority: traffic.Bus}},
		Events:   []traffic.Event{{Code: 1, Param: 2, OffsetMS: 300}},
		Signal:   traffic.Signal{State: "Gr", Stage: -1, SinceMS: 1200, Mode: traffic.Local, Trip: "x", Override: "o"},
		Results:  []traffic.CommandResult{{Seq: 7, Applied: false, Reason: "expired"}},
	}
}

func TestFrameComesBackAsItWas(t *testing.T) {
	want := frame()
	got, err := wire.DecodeFrame(identity.Protobuf, wire.EncodeFrame(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("protobuf: got %+v, %v, want %+v", got, err, want)
	}
	j, err := protojson.Marshal(wire.FrameToProto(want))
	if err != nil {
		t.Fatal(err)
	}
	got, err = wire.DecodeFrame(identity.JSON, j)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("JSON: got %+v, %v, want %+v", got, err, want)
	}
}

func TestCommandComesBackAsItWas(t *testing.T) {
	want := &traffic.Command{
		District: "harbour", Junction: "A1", Seq: 1 << 40, Height: 12, RestsOn: frame().FrameKey, Policy: "p", PolicyVersion: "2",
		Controller: "maxpressure", ControllerVersion: "1", Issued: time.Unix(10, 5).UTC(), Expires: time.Unix(12, 5).UTC(), Stage: 3, Rule: "why",
	}
	got, err := wire.DecodeCommand(identity.Protobuf, wire.EncodeCommand(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestDecodeRefusesWhatItDoesNotKnow(t *testing.T) {
	good := wire.EncodeFrame(frame())
	nested, err := proto.Marshal(&pb.Reading{Detector: "d1"})
	if err != nil {
		t.Fatal(err)
	}
	nested = append(nested, 0xf8, 0x01, 0x01) // field 31 of a reading
	withNested := append(append([]byte{}, good...), 9<<3|2, byte(len(nested)))
	withNested = append(withNested, nested...)
	for _, c := range []struct {
		name, contentType string
		payload           []byte
		want              string
	}{
		{"truncated protobuf", identity.Protobuf, good[:len(good)-3], "Frame:"},
		{"unknown protobuf field", identity.Protobuf, append(append([]byte{}, good...), 0xf8, 0x07, 0x01), "unknown fields"},
		{"unknown field in a reading", identity.Protobuf, withNested, "readings[1]: 3 bytes of unknown fields"},
		{"unknown JSON field", identity.JSON, []byte(`{"district":"harbour","colour":"red"}`), "colour"},
		{"truncated JSON", identity.JSON, []byte(`{"district":"harbour"`), "Frame:"},
		{"text after JSON", identity.JSON, []byte(`{"district":"harbour"} {}`), "Frame:"},
		{"other content type", "text/plain", good, "content_type"},
		{"short prev", identity.JSON, []byte(`{"prev":"AAAA"}`), "prev: 3 bytes, must be none or 32"},
		{"event code", identity.JSON, []byte(`{"events":[{"code":70000}]}`), "events[0].code: 70000"},
		{"priority", identity.JSON, []byte(`{"readings":[{"priority":300}]}`), "readings[0].priority: 300"},
		{"negative count", identity.JSON, []byte(`{"readings":[{"count":-1}]}`), "count"},
		{"count beyond its type", identity.JSON, []byte(`{"readings":[{"count":5000000000}]}`), "count"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := wire.DecodeFrame(c.contentType, c.payload)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
			if kind.Of(err) != kind.Invalid {
				t.Errorf("got kind %v, want invalid", kind.Of(err))
			}
		})
	}
}

// TestDecodeLooksEverywhere puts an unknown field into each message that any
// message of the schema holds, one at a time.
func TestDecodeLooksEverywhere(t *testing.T) {
	alien := protoreflect.RawFields{0xf8, 0x07, 0x01}
	ms := pb.File_stopline_v1_stopline_proto.Messages()
	if ms.Len() < 20 {
		t.Fatalf("got %d messages in the schema", ms.Len())
	}
	holders := 0
	for i := range ms.Len() {
		typ, err := protoregistry.GlobalTypes.FindMessageByName(ms.Get(i).FullName())
		if err != nil {
			t.Fatal(err)
		}
		check := func(m protoreflect.Message, want string) {
			t.Helper()
			b, err := proto.Marshal(m.Interface())
			if err != nil {
				t.Fatal(err)
			}
			err = wire.Decode(identity.Protobuf, b, typ.New().Interface())
			switch {
			case want == "" && err != nil:
				t.Errorf("%s: got %v, want no error", typ.Descriptor().Name(), err)
			case want != "" && (err == nil || !strings.Contains(err.Error(), want+"3 bytes of unknown fields")):
				t.Errorf("%s: got %v, want an error about unknown fields in %q", typ.Descriptor().Name(), err, want)
			}
		}
		m := typ.New()
		m.SetUnknown(alien)
		check(m, string(typ.Descriptor().Name())+": ")
		fs := typ.Descriptor().Fields()
		for k := range fs.Len() {
			f := fs.Get(k)
			if f.IsMap() {
				t.Fatalf("%s is a map, into which nobody looks", f.FullName())
			}
			if f.Message() == nil {
				continue
			}
			holders++
			m := typ.New()
			where := string(f.Name()) + ": "
			var inner protoreflect.Message
			if f.IsList() {
				m.Mutable(f).List().AppendMutable()
				inner, where = m.Mutable(f).List().AppendMutable().Message(), string(f.Name())+"[1]: "
			} else {
				inner = m.Mutable(f).Message()
			}
			check(m, "")
			inner.SetUnknown(alien)
			check(m, where)
		}
	}
	if holders < 8 {
		t.Errorf("got %d fields that hold messages", holders)
	}
}

// BenchmarkDecodeFrame decodes a frame of 24 readings.
func BenchmarkDecodeFrame(b *testing.B) {
	f := frame()
	for len(f.Readings) < 24 {
		f.Readings = append(f.Readings, f.Readings[0])
	}
	payload := wire.EncodeFrame(f)
	b.ReportAllocs()
	b.SetBytes(int64(len(payload)))
	for b.Loop() {
		if _, err := wire.DecodeFrame(identity.Protobuf, payload); err != nil {
			b.Fatal(err)
		}
	}
}

// The canonical envelope is documented to be protobuf that any client can read,
// and protobuf's own encoder, fed in field order, to make it.
func TestCanonicalEnvelopeIsProtobuf(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	e := identity.Sign(key, identity.KindFrame, identity.Protobuf, bytes.Repeat([]byte{7}, 300))
	var m pb.Envelope
	if err := wire.Decode(identity.Protobuf, e.Marshal(), &m); err != nil {
		t.Fatal(err)
	}
	if m.Kind != "frame" || m.KeyId != string(e.Key) || !bytes.Equal(m.Payload, e.Payload) || !bytes.Equal(m.Signature, e.Signature) {
		t.Errorf("protobuf reads %v, want what was signed", &m)
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(&m)
	if err != nil || !bytes.Equal(again, e.Marshal()) {
		t.Errorf("protobuf writes %x, %v, want %x", again, err, e.Marshal())
	}
}

func TestVerifySignaturesTellsEachApart(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	body := []byte(`{"key":"` + hexOf(pub) + `","department":"traffic","roles":["registrar"]}`)
	reg, err := identity.NewRegistry(&identity.Genesis{District: "harbour", Entries: []identity.Entry{{Type: identity.TypeOfficial, ID: "o", Body: body}}})
	if err != nil {
		t.Fatal(err)
	}
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	var b pb.Batch
	salt := make([]byte, 32)
	for i := range 40 {
		k := key
		if i%10 == 3 {
			k = stranger
		}
		e := identity.Sign(k, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(frame()))
		if i%10 == 7 {
			e.Signature[5] ^= 1
		}
		b.Records = append(b.Records, &pb.Record{Envelope: e.Marshal(), Salt: salt})
	}
	b.Records = append(b.Records, &pb.Record{Envelope: []byte("junk"), Salt: salt})
	again, err := wire.DecodeBatch(wire.EncodeBatch(&b))
	if err != nil {
		t.Fatal(err)
	}
	cs := wire.Candidates(again)
	wire.VerifySignatures(identity.NewVerifier(), reg, cs)
	for i := range cs {
		if want := i < 40 && i%10 != 3 && i%10 != 7; cs[i].SignatureValid != want {
			t.Errorf("record %d: got valid %v, want %v", i, cs[i].SignatureValid, want)
		}
	}
	if cs[40].Err == nil {
		t.Error("junk was decoded, want an error")
	}
}

func TestDecodeBatchRefusesAShortSalt(t *testing.T) {
	b := wire.EncodeBatch(&pb.Batch{Records: []*pb.Record{{Envelope: []byte("x"), Salt: make([]byte, 31)}}})
	if _, err := wire.DecodeBatch(b); err == nil || !strings.Contains(err.Error(), "records[0].salt: 31 bytes") {
		t.Errorf("got %v, want the field and its rule", err)
	}
}

func TestBlockComesBackAsItWas(t *testing.T) {
	want := &ledger.Block{
		Header: ledger.Header{Height: 2, Time: time.Unix(5, 6).UTC(), PrevSize: 1, Size: 3, Root: ledger.Hash{9}, RegistryVersion: 4},
		Leaves: []ledger.Leaf{{Class: ledger.ClassHeader}, {Class: ledger.ClassRecord, Commitment: ledger.Hash{1}}}, Metadata: []byte("m"),
		Votes: []ledger.Vote{{Validator: 3, Signature: []byte("s")}},
	}
	m, err := wire.DecodeBlock(wire.EncodeBlock(wire.BlockToProto(want, [][]byte{{1}}, ledger.Verdicts{1})))
	if err != nil {
		t.Fatal(err)
	}
	got, err := wire.BlockFromProto(m)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

// What is decoded and encoded again must decode to the same, and nothing may
// panic, whatever the bytes.
func FuzzDecodeFrame(f *testing.F) {
	f.Add(true, wire.EncodeFrame(frame()))
	f.Add(false, []byte(`{"district":"d","readings":[{"detector":"a","occupancyPermille":1400}]}`))
	f.Fuzz(func(t *testing.T, binary bool, b []byte) {
		ct := identity.JSON
		if binary {
			ct = identity.Protobuf
		}
		one, err := wire.DecodeFrame(ct, b)
		if err != nil {
			return
		}
		two, err := wire.DecodeFrame(identity.Protobuf, wire.EncodeFrame(one))
		if err != nil {
			t.Fatalf("what was decoded cannot be decoded again: %v", err)
		}
		if !bytes.Equal(wire.EncodeFrame(one), wire.EncodeFrame(two)) {
			t.Errorf("got %+v after a second time, want %+v", two, one)
		}
	})
}

func FuzzCandidate(f *testing.F) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(identity.Sign(key, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(frame())).Marshal())
	f.Add(identity.Sign(key, identity.KindRegistry, identity.JSON, []byte(`{"action":"put"}`)).Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		c := wire.Candidate(b, make([]byte, 32))
		if c.Err == nil && !bytes.Equal(c.Envelope.Marshal(), b) {
			t.Errorf("accepted an envelope with a second form: %x", b)
		}
	})
}

func hexOf(b []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, c := range b {
		s.WriteByte(digits[c>>4])
		s.WriteByte(digits[c&15])
	}
	return s.String()
}

// A reason quotes what somebody sent; that must never stop the encoder.
func TestEncodeQuarantinedTakesAnyReason(t *testing.T) {
	m := &pb.Quarantined{Salt: make([]byte, 32), Rule: "schema", Reason: "field \xff\xfe"}
	got, err := wire.DecodeQuarantined(wire.EncodeQuarantined(m))
	if err != nil || got.Reason != "field \uFFFD" {
		t.Errorf("got %q, %v, want the reason with the bytes replaced", got.GetReason(), err)
	}
}

// A change comes back from JSON and from protobuf as what its approvers signed.
func TestChangeComesBackAsItWas(t *testing.T) {
	want := identity.Change{District: "harbour", Action: identity.Put, Type: identity.TypePolicy, ID: "day", Body: []byte(`{"a":"<&>"}`), Nonce: 1 << 60, Until: 1 << 40,
		Base: bytes.Repeat([]byte{7}, 32), Approvals: []identity.Approval{
			{Key: "00112233445566778899aabbccddeeff", Signature: bytes.Repeat([]byte{1}, 64)}, {Key: "ff112233445566778899aabbccddeeff", Signature: bytes.Repeat([]byte{2}, 64)}}}
	got, err := wire.DecodeChange(identity.Protobuf, wire.EncodeChange(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("protobuf: got %+v, %v, want %+v", got, err, want)
	}
	payload, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err = wire.DecodeChange(identity.JSON, payload)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("JSON: got %+v, %v, want %+v", got, err, want)
	}
	bad, err := proto.Marshal(&pb.RegistryChange{Approvals: []*pb.Approval{{KeyId: "x"}}})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := wire.DecodeChange(identity.Protobuf, append(bad[:len(bad):len(bad)], 0x42, 3, 0x1a, 1, 0)); err == nil {
		t.Errorf("got %+v for an approval with a field that nobody knows", c)
	}
}
