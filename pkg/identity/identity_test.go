package identity

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

func TestEnvelope(t *testing.T) {
	e := Sign(testKey("d1"), KindFrame, JSON, []byte(`{"seq":"1"}`))
	b := e.Marshal()
	got, err := ParseEnvelope(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Marshal(), b) || got.Kind != KindFrame || got.Key != testID("d1") {
		t.Errorf("got %+v, want %+v", got, e)
	}
	key := testPub("d1")
	if !got.Verify([]byte(key)) {
		t.Error("the envelope's own signature is not valid")
	}
	// Kind and content type are under the signature, as is every byte.
	for name, mod := range map[string]func(e *Envelope){
		"kind":         func(e *Envelope) { e.Kind = KindCommand },
		"content type": func(e *Envelope) { e.ContentType = Protobuf },
		"payload":      func(e *Envelope) { e.Payload = []byte(`{"seq":"2"}`) },
		"signature":    func(e *Envelope) { e.Signature = bytes.Repeat([]byte{1}, 64) },
		// The line ends keep one field from running into the next.
		"shifted": func(e *Envelope) { e.Kind, e.ContentType = "fram", "e\n"+JSON },
	} {
		c := got
		mod(&c)
		if c.Verify([]byte(key)) {
			t.Errorf("the signature is valid with another %s", name)
		}
	}
	if got.Verify(nil) || got.Verify([]byte(testPub("d2"))) {
		t.Error("the signature is valid for no key, or another's")
	}
}

// TestEnvelopeGolden pins the canonical bytes and the signature: what the log
// commits to must never change.
func TestEnvelopeGolden(t *testing.T) {
	const want = "0a05" + "6672616d65" + "1210" + "6170706c69636174696f6e2f6a736f6e" +
		"1a20" + "6335616438303834386563646533333864316463646461646362313232363938" + "2202" + "7b7d" +
		"2a40" + "cc6acd8d77825f5c296fbaad63050c059221bc0373be5a71bafe1000de2264b92689a01f26b6e84d0ede5bd52ef849389e40a0ef32583d2719530f4a01487102"
	got := hex.EncodeToString(Sign(testKey("d1"), KindFrame, JSON, []byte("{}")).Marshal())
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if in := string(SigningInput(KindFrame, JSON, []byte("{}"))); in != "stopline envelope v1\nframe\napplication/json\n{}" {
		t.Errorf("got signing input %q", in)
	}
}

func TestParseEnvelopeRefuses(t *testing.T) {
	good := Sign(testKey("d1"), KindFrame, JSON, []byte(`{"seq":"1"}`))
	kindField, rest := good.Marshal()[:7], good.Marshal()[7:]
	with := func(mod func(e *Envelope)) []byte { e := good; mod(&e); return e.Marshal() }
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"nothing", nil, `envelope: kind "": unknown`},
		{"too large", make([]byte, MaxEnvelope+1), "envelope: 262145 bytes, at most 262144 are taken"},
		{"field 6", append(good.Marshal(), 6<<3|2, 1, 0), "envelope: unknown field or type, tag 0x32"},
		{"varint", append([]byte{1 << 3, 1}, rest...), "envelope: unknown field or type, tag 0x8"},
		{"repeated", append(bytes.Clone(kindField), good.Marshal()...), "envelope: field 1 out of order or repeated"},
		{"out of order", append(bytes.Clone(rest), kindField...), "envelope: field 1 out of order or repeated"},
		{"long length", append([]byte{1<<3 | 2, 0x85, 0x00, 'f', 'r', 'a', 'm', 'e'}, rest...), "envelope: field 1: length is not in its shortest form"},
		{"length of 11 bytes", append([]byte{1<<3 | 2}, bytes.Repeat([]byte{0xff}, 11)...), "envelope: field 1: length is not in its shortest form"},
		{"no length", []byte{1<<3 | 2}, "envelope: field 1: length is not in its shortest form"},
		{"huge length", append([]byte{1<<3 | 2}, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01), "envelope: field 1: truncated, 0 bytes of 18446744073709551615"},
		{"truncated", good.Marshal()[:len(good.Marshal())-1], "envelope: field 5: truncated, 63 bytes of 64"},
		{"empty field", append(bytes.Clone(kindField), 2<<3|2, 0), "envelope: field 2: empty fields must be left out"},
		{"kind", with(func(e *Envelope) { e.Kind = "frames" }), `envelope: kind "frames": unknown`},
		{"content type", with(func(e *Envelope) { e.ContentType = "text/plain" }), `envelope: content_type "text/plain": must be application/x-protobuf or application/json`},
		{"key id", with(func(e *Envelope) { e.Key = "00" }), `envelope: key_id: "00", must be 32 lower-case hex digits`},
		{"key id in capitals", with(func(e *Envelope) { e.Key = KeyID(strings.Repeat("A", 32)) }), `envelope: key_id: "` + strings.Repeat("A", 32) + `", must be 32 lower-case hex digits`},
		{"no UTF-8 in the key id", with(func(e *Envelope) { e.Key = KeyID(strings.Repeat("0", 15) + "\xff\xfe" + strings.Repeat("0", 15)) }),
			`envelope: key_id: "000000000000000\xff\xfe000000000000000", must be 32 lower-case hex digits`},
		{"no payload", with(func(e *Envelope) { e.Payload = nil }), "envelope: payload: must not be empty"},
		{"no signature", with(func(e *Envelope) { e.Signature = nil }), "envelope: signature: must be 64 bytes, has 0"},
		{"long signature", with(func(e *Envelope) { e.Signature = make([]byte, 65) }), "envelope: signature: must be 64 bytes, has 65"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseEnvelope(tt.b)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if !errors.Is(err, ErrEnvelope) || kind.Of(err) != kind.Invalid {
				t.Errorf("got an error of kind %v, want one that is ErrEnvelope and invalid", kind.Of(err))
			}
		})
	}
	largest := with(func(e *Envelope) { e.Payload = make([]byte, MaxEnvelope-129) })
	if len(largest) != MaxEnvelope {
		t.Fatalf("got an envelope of %d bytes, want %d to test the bound", len(largest), MaxEnvelope)
	}
	if _, err := ParseEnvelope(largest); err != nil {
		t.Errorf("got %v for the largest envelope, want none", err)
	}
}

// FuzzEnvelope: one envelope has one encoding.
func FuzzEnvelope(f *testing.F) {
	for _, k := range []RecordKind{KindFrame, KindRegistry, KindRedaction} {
		f.Add(Sign(testKey("d1"), k, Protobuf, []byte("payload")).Marshal())
	}
	f.Add([]byte{1<<3 | 2, 0x85, 0x00, 'f', 'r', 'a', 'm', 'e'})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseEnvelope(b)
		if err != nil {
			return
		}
		if got := e.Marshal(); !bytes.Equal(got, b) {
			t.Errorf("got %x after a round trip, want %x", got, b)
		}
	})
}

func TestRecordKinds(t *testing.T) {
	for _, k := range []RecordKind{KindFrame, KindImport, KindRequest, KindCommand, KindOverride, KindRegistry, KindAccess, KindRedaction, KindAnchor} {
		if !k.Valid() {
			t.Errorf("kind %q is not valid", k)
		}
	}
	for _, k := range []RecordKind{"", "Frame", "frame ", "seal"} {
		if k.Valid() {
			t.Errorf("kind %q is valid", k)
		}
	}
}
