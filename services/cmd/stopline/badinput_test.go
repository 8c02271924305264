package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"maps"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Every kind of bad input over HTTP, with a valid frame after each one. What
// is malformed is refused at the door with a problem that names field and rule;
// what must be judged is stored, receipted, quarantined and counted by its rule;
// none of it is in the log; and all valid frames are.
func TestBadInput(t *testing.T) {
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"))
	good := d.enrol("h0101", "good") // sends the valid frames
	dev := d.enrol("h0102", "bad")   // sends the bad ones, which use up none of its numbers
	revoked := d.enrol("h0103", "revoked")
	liar := d.enrol("h0201", "liar")
	wantExit(t, stopline(t, "enrol", "--data", d.data, "--url", d.url, "--device", "revoked", "--revoke"), exitOK)
	_, strangersKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	commander, err := d.district.Key("signal-control")
	if err != nil {
		t.Fatal(err)
	}

	var receipts, refused []receipt
	valid := func() { receipts = append(receipts, d.store("/v1/frames", good.next())) }
	want := map[validate.Rule]uint64{}
	valid()

	// Stored and then quarantined by a rule.
	sent := [][]byte{dev.next(), dev.next()} // valid ones, to be sent again
	for _, e := range sent {
		receipts = append(receipts, d.store("/v1/frames", e))
	}
	dev.seq++ // a gap, into which a frame may come late
	late := dev.frame()
	late.Seq--
	receipts = append(receipts, d.store("/v1/frames", dev.next()))
	d.sealed(receipts...)
	frame := func(change func(f *traffic.Frame)) []byte {
		f := dev.frame()
		change(f)
		return dev.sign(f)
	}
	command := func(key ed25519.PrivateKey, change func(c *traffic.Command)) []byte {
		now := time.Now().UTC()
		c := &traffic.Command{District: "harbour", Junction: "h0102", Seq: 1 << 60, Height: 1, RestsOn: traffic.FrameKey{Device: "bad", BootEpoch: 1, Seq: 1},
			Policy: "default", PolicyVersion: "1", Controller: "actuated", ControllerVersion: "1", Issued: now, Expires: now.Add(2 * time.Second), Rule: "made up"}
		change(c)
		return identity.Sign(key, identity.KindCommand, identity.Protobuf, wire.EncodeCommand(c)).Marshal()
	}
	detector := dev.junction.Detectors[0]
	area := detector
	for _, x := range dev.junction.Detectors {
		if x.Kind == traffic.Area {
			area = x
		}
	}
	unsigned := func(e []byte) []byte {
		v, err := identity.ParseEnvelope(e)
		if err != nil {
			t.Fatal(err)
		}
		v.Signature = make([]byte, ed25519.SignatureSize)
		return v.Marshal()
	}
	whole := wire.EncodeFrame(dev.frame())
	unknownField := func() []byte {
		b, err := protojson.Marshal(wire.FrameToProto(dev.frame()))
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte(`{"colour":"green",`), b[1:]...)
	}
	hour := func(h time.Duration) []byte {
		return frame(func(f *traffic.Frame) { f.Time = f.Time.Add(h * time.Hour) })
	}
	other := *dev
	other.key = good.key
	stranger := *dev
	stranger.key, stranger.id = strangersKey, "stranger"

	for _, c := range []struct {
		name     string
		rule     validate.Rule
		envelope []byte
	}{
		{"wrong signature", validate.RuleSignature, unsigned(dev.sign(dev.frame()))},
		{"unknown device", validate.RuleUnknownKey, stranger.sign(stranger.frame())},
		{"another device's name", validate.RuleDevice, other.sign(other.frame())},
		{"revoked device", validate.RuleRevoked, revoked.next()},
		{"of an earlier boot", validate.RuleReordered, frame(func(f *traffic.Frame) { f.BootEpoch, f.Seq = 0, 9 })},
		{"reordered", validate.RuleReordered, dev.sign(late)},
		{"broken chain", validate.RuleChain, frame(func(f *traffic.Frame) { f.Prev[0] ^= 1 })},
		{"clock an hour ahead", validate.RuleClockAhead, hour(1)},
		{"clock an hour behind", validate.RuleClockBackwards, hour(-1)}, // it was right before
		{"clock eight days behind", validate.RuleClockBehind, hour(-8 * 24)},
		{"clock going back", validate.RuleClockBackwards, frame(func(f *traffic.Frame) { f.Time = f.Time.Add(-50 * time.Second) })},
		{"oversized payload", validate.RuleSize, frame(func(f *traffic.Frame) {
			f.Signal.Mode, f.Signal.Trip = traffic.Tripped, strings.Repeat("x", 65<<10)
		})},
		{"truncated protobuf", validate.RuleSchema, identity.Sign(dev.key, identity.KindFrame, identity.Protobuf, whole[:len(whole)-1]).Marshal()},
		{"JSON with an unknown field", validate.RuleSchema, identity.Sign(dev.key, identity.KindFrame, identity.JSON, unknownField()).Marshal()},
		{"protobuf under the name of JSON", validate.RuleSchema, identity.Sign(dev.key, identity.KindFrame, identity.JSON, whole).Marshal()},
		{"occupancy 140 %", validate.RuleOccupancy, frame(func(f *traffic.Frame) {
			f.Readings = []traffic.Reading{{Detector: detector.ID, OccupancyPermille: 1400}}
		})},
		{"more vehicles than fit", validate.RuleVehicles, frame(func(f *traffic.Frame) {
			f.Readings = []traffic.Reading{{Detector: area.ID, OccupancyPermille: 1000, Vehicles: 5000}}
		})},
		{"another junction's detector", validate.RuleDetector, frame(func(f *traffic.Frame) { f.Readings = []traffic.Reading{{Detector: "none"}} })},
		{"another district", validate.RuleDistrict, frame(func(f *traffic.Frame) { f.District = "elsewhere" })},
		{"another junction", validate.RuleJunction, frame(func(f *traffic.Frame) { f.Junction = "h0303" })},
		{"a lamp that there is not", validate.RuleSignal, frame(func(f *traffic.Frame) { f.Signal.State += "r" })},
	} {
		r := d.store("/v1/frames", c.envelope)
		refused = append(refused, r)
		want[c.rule]++
		valid()
	}
	for _, c := range []struct {
		name     string
		rule     validate.Rule
		envelope []byte
	}{
		{"command without a valid signature", validate.RuleSignature, unsigned(command(commander, func(*traffic.Command) {}))},
		{"command signed by a device", validate.RuleMaySign, command(dev.key, func(*traffic.Command) {})},
		{"command signed by a stranger", validate.RuleUnknownKey, command(strangersKey, func(*traffic.Command) {})},
		{"expired command", validate.RuleExpired, command(commander, func(c *traffic.Command) {
			c.Issued, c.Expires = c.Issued.Add(-time.Hour), c.Expires.Add(-time.Hour)
		})},
		{"command in force for a day", validate.RuleExpired, command(commander, func(c *traffic.Command) { c.Expires = c.Expires.Add(24 * time.Hour) })},
		{"command for a stage that there is not", validate.RuleStage, command(commander, func(c *traffic.Command) { c.Stage = 99 })},
	} {
		refused = append(refused, d.store("/v1/records", c.envelope))
		want[c.rule]++
		valid()
	}
	// Older than all that is remembered of its device.
	d.sealed(receipts...)
	f := good.frame()
	f.Seq, f.Prev = 1, [32]byte{}
	refused = append(refused, d.store("/v1/frames", good.sign(f)))
	want[validate.RuleReplay]++
	valid()
	// Two bodies under one number: the second is refused, and from then on the
	// device.
	receipts = append(receipts, d.store("/v1/frames", liar.next()))
	d.sealed(receipts...)
	f = liar.frame()
	f.Seq, f.Prev, f.Signal.SinceMS = 1, [32]byte{}, 1
	refused = append(refused, d.store("/v1/frames", liar.sign(f)), d.store("/v1/frames", liar.next()))
	want[validate.RuleEquivocation]++
	want[validate.RuleQuarantined]++
	valid()

	// Refused at the door.
	envelope := func() []byte { return dev.sign(dev.frame()) }
	asJSON := func(e []byte) map[string]any {
		v, err := identity.ParseEnvelope(e)
		if err != nil {
			t.Fatal(err)
		}
		b, err := protojson.Marshal(&pb.Envelope{Kind: string(v.Kind), ContentType: v.ContentType, KeyId: string(v.Key), Payload: v.Payload, Signature: v.Signature})
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]any{}
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	marshal := func(m map[string]any) []byte {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	withColour := asJSON(envelope())
	withColour["colour"] = "green"
	noSignature := asJSON(command(commander, func(*traffic.Command) {}))
	delete(noSignature, "signature")
	for _, c := range []struct {
		name, path, contentType string
		body                    []byte
		status                  int
		rule, field, detail     string
	}{
		{"oversized", "/v1/frames", identity.Protobuf, bytes.Repeat([]byte{0}, 300<<10), http.StatusRequestEntityTooLarge, "size", "body", "an envelope may have 262144"},
		{"oversized JSON", "/v1/frames", identity.JSON, bytes.Repeat([]byte{' '}, 600<<10), http.StatusRequestEntityTooLarge, "size", "body", "an envelope may have 262144"},
		{"truncated envelope", "/v1/frames", identity.Protobuf, envelope()[:100], http.StatusBadRequest, "envelope", "", "truncated"},
		{"unknown field in the envelope", "/v1/frames", identity.JSON, marshal(withColour), http.StatusBadRequest, "envelope", "body", `unknown field "colour"`},
		{"not JSON", "/v1/frames", identity.JSON, []byte("{"), http.StatusBadRequest, "envelope", "body", "body: "},
		{"empty", "/v1/frames", identity.Protobuf, nil, http.StatusBadRequest, "empty", "body", "must not be empty"},
		{"unsigned command", "/v1/records", identity.JSON, marshal(noSignature), http.StatusBadRequest, "envelope", "", "signature: must be 64 bytes, has 0"},
		{"command as a frame", "/v1/frames", identity.Protobuf, command(commander, func(*traffic.Command) {}), http.StatusBadRequest, "kind", "kind", "kind: command, must be frame here"},
		{"other content type", "/v1/frames", "text/plain", envelope(), http.StatusUnsupportedMediaType, "content-type", "Content-Type", "text/plain"},
	} {
		r, err := d.post(c.path, c.contentType, c.body)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if r.HTTP != c.status || r.Rule != c.rule || c.field != "" && r.Field != c.field || !strings.Contains(r.Detail, c.detail) {
			t.Errorf("%s: got %d rule %q field %q: %s\nwant %d rule %q field %q with %q", c.name, r.HTTP, r.Rule, r.Field, r.Detail, c.status, c.rule, c.field, c.detail)
		}
		valid()
	}
	// An envelope in JSON is as good as one in protobuf.
	e := dev.next()
	r, err := d.post("/v1/frames", identity.JSON, marshal(asJSON(e)))
	if err != nil || r.HTTP != http.StatusOK || !bytes.Equal(r.Commitment, commitment(r.Salt, e)) {
		t.Errorf("a valid frame in a JSON envelope: got %+v, %v", r, err)
	}
	receipts = append(receipts, r)
	// Replayed bytes are one record and have one receipt, whatever they come in.
	for i, e := range sent {
		again, err := d.post("/v1/frames", identity.JSON, marshal(asJSON(e)))
		if err != nil || !bytes.Equal(again.Commitment, receipts[1+i].Commitment) || !bytes.Equal(d.store("/v1/frames", e).Salt, receipts[1+i].Salt) {
			t.Errorf("frame %d of %s replayed: got %+v, %v; want the receipt of before, %+v", i+1, dev.id, again, err, receipts[1+i])
		}
		valid()
	}

	d.sealed(receipts...)
	d.obeyed(1)
	end := d.stop()
	if !maps.Equal(end.Frames.ByRule, want) {
		t.Errorf("quarantined by rule: got %v\nwant %v", end.Frames.ByRule, want)
	}
	if got, want := end.Frames.Quarantined, uint64(len(refused)); got != want || end.Frames.Received != end.Frames.Accepted+got {
		t.Errorf("frames: got %+v, want %d quarantined", end.Frames, want)
	}
	if end.Interlock.Trips != 0 || end.Commands.Applied == 0 {
		t.Errorf("the street noticed: %+v applied, %d trips", end.Commands, end.Interlock.Trips)
	}
	v := logOf(t, d.data)
	once(t, v, receipts)
	for i, r := range refused {
		if at := v.find(r.Commitment); len(at) > 0 {
			t.Errorf("refused record %d is in the log at %v", i, at)
		}
	}
	wantExit(t, stopline(t, "fsck", d.data), exitOK, "OK: ")
}
