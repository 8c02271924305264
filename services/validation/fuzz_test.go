package validation

import (
	"crypto/sha256"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

func judgeRaw(t *testing.T, reg *identity.Registry, raw []byte) (validate.Verdict, validate.Candidate) {
	t.Helper()
	s := validate.NewState(validate.Edge())
	cs := []validate.Candidate{wire.Candidate(raw, make([]byte, 32))}
	wire.VerifySignatures(identity.NewVerifier(), reg, cs)
	v := s.Judge(reg, noon, &cs[0])
	if v.OK != (v.Rule == "") || v.OK != (v.Reason == "") {
		t.Errorf("got verdict %+v, want a rule and a reason if and only if it is refused", v)
	}
	if v.Rule != "" && v.Rule.Text() == "" {
		t.Errorf("got rule %q, which has no text", v.Rule)
	}
	if !utf8.ValidString(text(v.Reason)) {
		t.Errorf("got reason %q, which protobuf cannot carry", v.Reason)
	}
	return v, cs[0]
}

// FuzzRecord: whatever bytes come, there is a verdict, and nothing passes that
// its device has not signed.
func FuzzRecord(f *testing.F) {
	reg := newRegistry(f, 1)
	f.Add(newDevice(0).good())
	f.Add([]byte("hello"))
	f.Add(identity.Sign(key("control"), identity.KindCommand, identity.Protobuf, wire.EncodeCommand(&traffic.Command{
		District: district, Junction: "j0", Seq: 1, Issued: noon, Expires: noon.Add(time.Second)})).Marshal())
	f.Fuzz(func(t *testing.T, raw []byte) {
		v, c := judgeRaw(t, reg, raw)
		if v.OK && !c.Envelope.Verify(reg0(t, reg, c.Envelope.Key)) {
			t.Errorf("accepted a record that its signer did not sign: %x", raw)
		}
	})
}

func reg0(t *testing.T, reg *identity.Registry, id identity.KeyID) []byte {
	t.Helper()
	h, ok := reg.Holder(id)
	if !ok {
		t.Errorf("accepted a record of an unknown key %s", id)
	}
	return h.Key
}

// FuzzSigned: a device, a service and an official whose keys are good may sign
// what they like; what passes holds no value that is out of bounds.
func FuzzSigned(f *testing.F) {
	reg := newRegistry(f, 1)
	frame, _ := newDevice(0).next(nil)
	f.Add(uint8(0), true, wire.EncodeFrame(&frame))
	j, err := protojson.Marshal(wire.FrameToProto(&frame))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint8(0), false, j)
	f.Add(uint8(1), true, wire.EncodeCommand(&traffic.Command{District: district, Junction: "j0", Seq: 1, Issued: noon, Expires: noon.Add(time.Second)}))
	f.Add(uint8(2), false, []byte(`{"district":"harbour","action":"revoke","type":"device","id":"d0","nonce":3}`))
	f.Fuzz(func(t *testing.T, who uint8, protobuf bool, payload []byte) {
		ct := identity.JSON
		if protobuf {
			ct = identity.Protobuf
		}
		signer := []string{"d0", "control", "registrar"}[who%3]
		k := []identity.RecordKind{identity.KindFrame, identity.KindCommand, identity.KindRegistry}[who%3]
		v, c := judgeRaw(t, reg, identity.Sign(key(signer), k, ct, payload).Marshal())
		if !v.OK || c.Frame == nil {
			return
		}
		if c.Frame.Device != "d0" || c.Frame.Junction != "j0" || len(c.Frame.Signal.State) != 1 || len(c.Frame.Readings) > 24 {
			t.Errorf("accepted %+v", c.Frame)
		}
		for _, r := range c.Frame.Readings {
			if r.OccupancyPermille > 1000 || r.Halted > r.Vehicles || r.SpeedCMS > 8400 {
				t.Errorf("accepted reading %+v", r)
			}
		}
		// The chain is over the payload: decoding and encoding again is not it.
		if h := sha256.Sum256(payload); h != sha256.Sum256(c.Envelope.Payload) {
			t.Errorf("the payload changed on the way")
		}
	})
}
