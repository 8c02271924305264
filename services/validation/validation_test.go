package validation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// TestBadInput sends every bad input with valid frames mixed in: all valid ones
// are accepted, and each bad one is kept with its rule and reason, and counted.
func TestBadInput(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 3)
	s := newService(t, b, r, nil)
	start(t, s)
	in := newIngress(t, b)
	d0, d1, d2 := newDevice(0), newDevice(1), newDevice(2)
	command := func(signer string, mod func(c *traffic.Command)) identity.Envelope {
		c := &traffic.Command{District: district, Junction: "j0", Seq: 1, Issued: noon, Expires: noon.Add(2 * time.Second)}
		if mod != nil {
			mod(c)
		}
		return identity.Sign(key(signer), identity.KindCommand, identity.Protobuf, wire.EncodeCommand(c))
	}
	// What comes before: d0 has sent twenty frames.
	f1, e1 := d0.next(nil)
	valid := 1
	in.put(noon, e1.Marshal())
	var second, skipped identity.Envelope
	for i := range 19 {
		_, e := d0.next(nil)
		switch i {
		case 10:
			second = e
		case 16:
			skipped = e
			continue // stays on its way
		}
		valid++
		in.put(noon, e.Marshal())
	}

	type bad struct {
		name   string
		raw    func() []byte
		rule   validate.Rule
		reason string // part of it
	}
	resign := func(e identity.Envelope, mod func(e *identity.Envelope)) []byte { mod(&e); return e.Marshal() }
	bads := []bad{
		{"wrong signature", func() []byte { return resign(d0.bad(nil), func(e *identity.Envelope) { e.Signature[7] ^= 1 }) }, validate.RuleSignature,
			"signature: is not that of device d0 over this frame"},
		{"changed payload", func() []byte {
			return resign(d0.bad(nil), func(e *identity.Envelope) { e.Payload = slices.Clone(e.Payload); e.Payload[len(e.Payload)-1] ^= 1 })
		}, validate.RuleSignature,
			"signature: is not that of device d0 over this frame"},
		{"unknown device", func() []byte {
			return identity.Sign(key("stranger"), identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f1)).Marshal()
		}, validate.RuleUnknownKey,
			"is not in the registry"},
		{"revoked device", func() []byte {
			return identity.Sign(key("gone"), identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f1)).Marshal()
		}, validate.RuleRevoked,
			"key_id: device gone has been revoked"},
		{"another's frame", func() []byte {
			return identity.Sign(key("d1"), identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f1)).Marshal()
		}, validate.RuleDevice,
			`device: "d0", the signer is device d1`},
		{"the same again", func() []byte { return second.Marshal() }, validate.RuleDuplicate, "seq: this frame d0/1/12 was accepted before"},
		{"replay", func() []byte { return e1.Marshal() }, validate.RuleReplay, "seq: boot epoch 1 sequence 1, the last was 1 sequence 2"},
		{"reordered", func() []byte { return skipped.Marshal() }, validate.RuleReordered, "seq: boot epoch 1 sequence 18, the last was 1 sequence 2"},
		{"an hour ahead", func() []byte { return d0.bad(func(f *traffic.Frame) { f.Time = noon.Add(time.Hour) }).Marshal() }, validate.RuleClockAhead,
			"time: 3600.0 s ahead of the clock, at most 2.0 s"},
		{"a month behind", func() []byte {
			return d1.bad(func(f *traffic.Frame) { f.Time = noon.Add(-30 * 24 * time.Hour) }).Marshal()
		}, validate.RuleClockBehind,
			"time: 2592000.0 s behind the clock, at most 604800.0 s"},
		{"a broken chain", func() []byte { return d0.bad(func(f *traffic.Frame) { f.Prev[0] ^= 1 }).Marshal() }, validate.RuleChain, "the hash of frame d0/1/"},
		{"oversized frame", func() []byte {
			return d0.bad(func(f *traffic.Frame) { f.Signal.Trip = strings.Repeat("x", 65<<10) }).Marshal()
		}, validate.RuleSize,
			"payload: frame of 6"},
		{"oversized envelope", func() []byte { return make([]byte, identity.MaxEnvelope+1) }, validate.RuleSize, "envelope: 262145 bytes, at most 262144"},
		{"not an envelope", func() []byte { return []byte("hello") }, validate.RuleSchema, "envelope: unknown field or type"},
		{"truncated envelope", func() []byte { return e1.Marshal()[:100] }, validate.RuleSchema, "truncated"},
		{"truncated payload", func() []byte {
			return identity.Sign(key("d0"), identity.KindFrame, identity.Protobuf, e1.Payload[:len(e1.Payload)-3]).Marshal()
		}, validate.RuleSchema, "Frame: proto:"},
		{"unknown JSON field", func() []byte {
			return identity.Sign(key("d0"), identity.KindFrame, identity.JSON, []byte(`{"district":"harbour","colour":"red"}`)).Marshal()
		}, validate.RuleSchema,
			`unknown field "colour"`},
		{"no JSON", func() []byte {
			return identity.Sign(key("d0"), identity.KindFrame, identity.JSON, []byte("\xff\xfe{")).Marshal()
		}, validate.RuleSchema, "Frame: proto:"},
		{"occupancy 140 %", func() []byte {
			return d0.bad(func(f *traffic.Frame) { f.Readings[3].OccupancyPermille = 1400 }).Marshal()
		}, validate.RuleOccupancy,
			"readings[3] loop-3: occupancy 140.0 %, at most 100 %"},
		{"another district", func() []byte { return d0.bad(func(f *traffic.Frame) { f.District = "airport" }).Marshal() }, validate.RuleDistrict, `district: "airport", this is "harbour"`},
		{"another junction", func() []byte { return d0.bad(func(f *traffic.Frame) { f.Junction = "j1" }).Marshal() }, validate.RuleJunction, `junction: "j1", device d0 is at j0`},
		{"another's detector", func() []byte { return d0.bad(func(f *traffic.Frame) { f.Readings[0].Detector = "loop-99" }).Marshal() }, validate.RuleDetector,
			`readings[0].detector: "loop-99" is not one of junction j0`},
		{"more than the lane lets through", func() []byte { return d0.bad(func(f *traffic.Frame) { f.Readings[0].Count = 9 }).Marshal() }, validate.RuleCount, "readings[0] loop-0: count 9 in 1.0 s, at most 3"},
		{"unsigned command", func() []byte {
			return resign(command("control", nil), func(e *identity.Envelope) { e.Signature = make([]byte, 64) })
		}, validate.RuleSignature,
			"signature: is not that of service control over this command"},
		{"command without a signature", func() []byte {
			return resign(command("control", nil), func(e *identity.Envelope) { e.Signature = nil })
		}, validate.RuleSchema,
			"signature: must be 64 bytes, has 0"},
		{"command by a device", func() []byte { return command("d0", nil).Marshal() }, validate.RuleMaySign, "kind: device d0 may not sign a command"},
		{"expired command", func() []byte {
			return command("control", func(c *traffic.Command) {
				c.Issued, c.Expires = noon.Add(-time.Hour), noon.Add(2*time.Second-time.Hour)
			}).Marshal()
		}, validate.RuleExpired,
			"expires: 3598.0 s ago, at most 60.0 s"},
		{"command to no stage", func() []byte { return command("control", func(c *traffic.Command) { c.Stage = 7 }).Marshal() }, validate.RuleStage, "stage: 7, junction j0 has 1"},
	}
	sent := make([][]byte, len(bads))
	salts := map[[32]byte]int{}
	wantRules := map[validate.Rule]uint64{}
	for i, x := range bads {
		// Each bad one stands between good ones of the same message.
		good := d0.good()
		sent[i] = x.raw()
		s := in.put(noon, good, sent[i], d1.good())
		valid += 2
		if i%5 == 0 {
			in.put(noon, d2.good())
			valid++
		}
		salts[s[1]] = i
		wantRules[x.rule]++
	}
	in.put(noon, command("control", nil).Marshal())
	valid++
	c := await(t, s, uint64(len(in.sent)))
	o := read(t, b)
	o.checkOnce(t, in)
	for salt, i := range salts {
		x, q := bads[i], o.quarantined[salt]
		if len(q) != 1 {
			t.Errorf("%s: got %d records in QUARANTINE, want 1", x.name, len(q))
			continue
		}
		// protobuf-go puts non-breaking spaces into its errors on purpose.
		reason := strings.ReplaceAll(q[0].Reason, "\u00a0", " ")
		if q[0].Rule != string(x.rule) || !strings.Contains(reason, x.reason) {
			t.Errorf("%s: got %s: %s, want %s: …%s…", x.name, q[0].Rule, reason, x.rule, x.reason)
		}
		if string(q[0].Envelope) != string(sent[i]) || q[0].IngressSeq != in.sent[salt] {
			t.Errorf("%s: got another record in QUARANTINE, of message %d, want that of %d", x.name, q[0].IngressSeq, in.sent[salt])
		}
	}
	if len(o.order) != valid {
		t.Errorf("got %d records accepted, want all %d valid ones", len(o.order), valid)
		for _, qs := range o.quarantined {
			if _, bad := salts[[32]byte(qs[0].Salt)]; !bad {
				t.Errorf("a valid record was refused by %s: %s", qs[0].Rule, qs[0].Reason)
			}
		}
	}
	for _, rule := range validate.Rules() {
		if c.ByRule[rule] != wantRules[rule] {
			t.Errorf("got %d counted under %s, want %d", c.ByRule[rule], rule, wantRules[rule])
		}
	}
	if c.Accepted != uint64(valid) || c.Quarantined != uint64(len(bads)) || c.Records != c.Accepted+c.Quarantined {
		t.Errorf("got counts %+v, want %d accepted and %d quarantined", c, valid, len(bads))
	}
	if c.Gaps != 1 || c.Missing != 1 {
		t.Errorf("got %d gaps with %d frames missing, want 1 and 1", c.Gaps, c.Missing)
	}
	if c.Readings != 24*c.FramesAccepted {
		t.Errorf("got %d readings in %d frames, want 24 each", c.Readings, c.FramesAccepted)
	}
}

// TestEquivocation: a second body under one number puts the device, and no
// other, in quarantine; forged ones do not. Both bodies are kept, and a restart
// remembers, also for frames that came before but were judged after it.
func TestEquivocation(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 2)
	in := newIngress(t, b)
	d0, d1 := newDevice(0), newDevice(1)
	first := d0.good()
	forged := newDevice(0).bad(func(f *traffic.Frame) { f.Signal.SinceMS = 5 })
	forged.Signature[0] ^= 1
	second := newDevice(0).bad(func(f *traffic.Frame) { f.Signal.SinceMS = 7 })

	s := newService(t, b, r, nil)
	stop := start(t, s)
	salt := in.put(noon, first, forged.Marshal(), d0.good(), second.Marshal(), d0.good(), d1.good())
	await(t, s, 6)
	want := []validate.Rule{"", validate.RuleSignature, "", validate.RuleEquivocation, validate.RuleQuarantined, ""}
	check := func(from int) {
		t.Helper()
		o := read(t, b)
		o.checkOnce(t, in)
		for i := from; i < len(want); i++ {
			got := validate.Rule("")
			if q := o.quarantined[salt[i]]; len(q) > 0 {
				got = validate.Rule(q[0].Rule)
			}
			if got != want[i] {
				t.Errorf("record %d: got refused by %q, want %q", i, got, want[i])
			}
		}
	}
	check(0)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s = newService(t, b, r, nil)
	start(t, s)
	salt = append(salt, in.put(noon, d0.good(), d1.good())...)
	want = append(want, validate.RuleQuarantined, "")
	await(t, s, 2)
	check(6)
	c := s.Counts()
	if c.ByRule[validate.RuleQuarantined] != 1 || c.Accepted != 1 {
		t.Errorf("got counts %+v after the restart, want one refused as device-quarantined and one accepted", c)
	}
}

// TestKill ends the service between its steps, as kill -9 would, and starts it
// again on the same streams: nothing is lost, doubled or put out of order. The
// ids by which NATS knows a repeat do not help: the window is shut before each
// restart.
func TestKill(t *testing.T) {
	for _, point := range []string{"quarantined", "accepted"} {
		t.Run(point, func(t *testing.T) {
			if testing.Short() && point != "accepted" {
				t.Skip("takes seconds")
			}
			b := servicetest.District(t, district)
			forgetIDs(t, b)
			r := newRegistry(t, 3)
			in := newIngress(t, b)
			devices := []*device{newDevice(0), newDevice(1), newDevice(2)}
			messages := 0
			for i := range 30 {
				d := devices[i%3]
				var first []byte
				if i%7 != 3 && i != 20 {
					first = d.good()
				}
				bad := d.bad(func(f *traffic.Frame) { f.Readings[0].OccupancyPermille = 1001 + uint32(i) })
				switch {
				case i%7 == 3:
					in.put(noon, bad.Marshal()) // a message of which nothing is accepted
				case i == 20: // from here on d2 is in quarantine
					in.put(noon, devices[2].good(), newDevice(2).bad(func(f *traffic.Frame) { f.Signal.SinceMS = 9 }).Marshal(), devices[2].good())
				default:
					in.put(noon, first, bad.Marshal(), d.good())
				}
				messages++
			}
			// Killed over and over, each time after a few steps more.
			kills, slow := 0, 1
			if testing.Short() {
				slow = 3 // fewer kills
			}
			for ; ; kills++ {
				steps := 0
				s := newService(t, b, r, func(p string) error {
					if steps++; p == point && steps > kills/2*slow {
						return &killedError{p}
					}
					return nil
				})
				s.maxGroup = 3
				ctx, cancel := context.WithCancel(context.Background())
				end := make(chan error, 1)
				go func() { end <- s.Run(ctx) }()
				err := awaitAll(t, b, len(in.sent), end)
				cancel()
				if err == nil {
					err = <-end
				}
				var k *killedError
				if err == nil {
					break
				}
				if !errors.As(err, &k) {
					t.Fatalf("the service ended with %v", err)
				}
				if kills > 200 {
					t.Fatal("never came to an end")
				}
				time.Sleep(idWindow) // until NATS has forgotten; it tells nobody when
			}
			if kills < 3 {
				t.Errorf("killed %d times: this test tests little", kills)
			}
			o := read(t, b)
			o.checkOnce(t, in)
			checkOrder(t, o)
			// The same as a service that nobody kills makes of it.
			b2 := servicetest.District(t, district)
			in2 := newIngress(t, b2)
			copyIngress(t, b, in2)
			s := newService(t, b2, r, nil)
			start(t, s)
			await(t, s, uint64(len(in.sent)))
			calm := read(t, b2)
			if !slices.Equal(o.order, calm.order) {
				t.Errorf("got %d records accepted, want the same %d in the same order as without kills", len(o.order), len(calm.order))
			}
			for salt, q := range calm.quarantined {
				if got := o.quarantined[salt]; len(got) != 1 || !proto.Equal(got[0], q[0]) {
					t.Errorf("record %x: got %v in QUARANTINE, want %v", salt[:4], got, q)
				}
			}
		})
	}
}

// awaitAll waits until n records are stored, or the service ends, whose error it
// returns.
func awaitAll(t *testing.T, b *bus.Bus, n int, end <-chan error) error {
	t.Helper()
	deadline := time.After(15 * time.Second)
	for {
		select {
		case err := <-end:
			if err == nil {
				t.Fatal("the service ended by itself")
			}
			return err
		case <-deadline:
			o := read(t, b)
			t.Fatalf("got %d records accepted and %d in quarantine, want %d in all", len(o.order), len(o.quarantined), n)
		case <-time.After(20 * time.Millisecond): // nothing signals what others store
			if o := read(t, b); len(o.order)+len(o.quarantined) >= n {
				return nil
			}
		}
	}
}

// idWindow is for how long NATS knows message ids at least.
const idWindow = 100 * time.Millisecond

// forgetIDs shuts the window in which NATS knows message ids, as far as it lets
// us.
func forgetIDs(t *testing.T, b *bus.Bus) {
	t.Helper()
	streams := topic.Streams(district)
	for i := range streams {
		streams[i].Duplicates = idWindow
	}
	if err := b.Declare(context.Background(), streams); err != nil {
		t.Fatal(err)
	}
}

func copyIngress(t *testing.T, from *bus.Bus, to *ingress) {
	t.Helper()
	if _, err := from.Replay(context.Background(), topic.IngressStream, "", 0, func(m *bus.Msg) error {
		return to.bus.Publish(context.Background(), m.Subject, "", m.Data)
	}); err != nil {
		t.Fatal(err)
	}
}

// checkOrder checks that frames of a device are accepted in rising order.
func checkOrder(t *testing.T, o *outcome) {
	t.Helper()
	last := map[traffic.DeviceID]uint64{}
	for _, b := range o.batches {
		for _, r := range b.Records {
			c := wire.Candidate(r.Envelope, r.Salt)
			if c.Frame == nil {
				continue
			}
			if c.Frame.Seq <= last[c.Frame.Device] {
				t.Errorf("%s was accepted after sequence %d", c.Frame.FrameKey, last[c.Frame.Device])
			}
			last[c.Frame.Device] = c.Frame.Seq
		}
	}
}

// TestLostConsumer: the position comes from the streams, also where the
// consumer's is gone.
func TestLostConsumer(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	d := newDevice(0)
	s := newService(t, b, r, nil)
	stop := start(t, s)
	in.put(noon, d.good(), d.good())
	in.put(noon, []byte("hello"))
	await(t, s, 3)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.JS.DeleteConsumer(context.Background(), topic.IngressStream, topic.ValidationDurable); err != nil {
		t.Fatal(err)
	}
	in.put(noon, d.good())
	s = newService(t, b, r, nil)
	start(t, s)
	if c := await(t, s, 1); c.Accepted != 1 || c.Quarantined != 0 {
		t.Errorf("got counts %+v, want one accepted", c)
	}
	o := read(t, b)
	o.checkOnce(t, in)
	checkOrder(t, o)
}

// TestGone: what left INGRESS before it was dealt with, while the service ran or
// while it did not, is counted once.
func TestGone(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	d := newDevice(0)
	st, err := b.JS.Stream(context.Background(), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		in.put(noon, d.good())
	}
	if err := st.DeleteMsg(context.Background(), 3); err != nil {
		t.Fatal(err)
	}
	s := newService(t, b, r, nil)
	stop := start(t, s)
	if c := await(t, s, 4); c.Gone != 1 || c.Accepted != 4 || c.Missing != 1 {
		t.Errorf("got %+v, want one message gone, with one frame", c)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		in.put(noon, d.good())
	}
	// They grow old, and the stream lets them go.
	usual := st.CachedInfo().Config
	short := usual
	short.MaxAge, short.Duplicates = 100*time.Millisecond, 100*time.Millisecond
	for _, cfg := range []jetstream.StreamConfig{short, usual} {
		if _, err := b.JS.UpdateStream(context.Background(), cfg); err != nil {
			t.Fatal(err)
		}
		for i, err := st.Info(context.Background()); err != nil || i.State.FirstSeq <= 8; i, err = st.Info(context.Background()) {
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond) // polling; nothing signals it
		}
	}
	s = newService(t, b, r, nil)
	stop = start(t, s)
	in.put(noon, d.good())
	if c := await(t, s, 1); c.Gone != 3 || c.Accepted != 1 {
		t.Errorf("got %+v, want three messages gone", c)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s = newService(t, b, r, nil)
	start(t, s)
	in.put(noon, d.good())
	if c := await(t, s, 1); c.Gone != 0 || c.Accepted != 1 {
		t.Errorf("got %+v, want none gone", c)
	}
}

// TestReplayAfterRestart: what was accepted lately is known after a restart,
// however many messages lie between. What was accepted longer ago goes on to the
// validators, who know it.
func TestReplayAfterRestart(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 2)
	in := newIngress(t, b)
	d0, d1 := newDevice(0), newDevice(1)
	s := newService(t, b, r, nil)
	stop := start(t, s)
	n := uint64(0)
	// d1 sends long before, d0 lately.
	for range 5 {
		_, e := d1.next(nil)
		in.put(noon, e.Marshal())
		n++
		await(t, s, n) // each in a message of its own
	}
	late := noon.Add(10 * time.Minute)
	var recent []identity.Envelope
	for range 20 {
		_, e := d0.next(func(f *traffic.Frame) { f.Time = late })
		recent = append(recent, e)
		in.put(late, e.Marshal())
		n++
		await(t, s, n)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{District: district, Bus: b, Registry: fixed{r}, Now: func() time.Time { return late }, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	start(t, s)
	old := newDevice(1)
	salts := in.put(late, recent[0].Marshal(), recent[19].Marshal(), old.good())
	_, next := d0.next(func(f *traffic.Frame) { f.Time = late })
	in.put(late, next.Marshal())
	c := await(t, s, 4)
	o := read(t, b)
	for i, want := range []validate.Rule{validate.RuleReplay, validate.RuleDuplicate} {
		if q := o.quarantined[salts[i]]; len(q) != 1 || q[0].Rule != string(want) {
			t.Errorf("repeated frame %d: got %v, want a refusal by %s", i, q, want)
		}
	}
	if o.accepted[salts[2]] != 1 || c.Accepted != 2 || c.Gaps != 0 {
		t.Errorf("got counts %+v, want the oldest and the next frame accepted without a gap", c)
	}
}

// TestLargeGroups: an INGRESS message with more than a request of consensus may
// hold is cut, and nothing is lost when the service is killed in between.
func TestLargeGroups(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	d := newDevice(0)
	long := func(n int) []byte {
		_, e := d.next(func(f *traffic.Frame) {
			f.Events = make([]traffic.Event, 1024)
			for i := range f.Events {
				f.Events[i] = traffic.Event{Code: 60000, Param: 60000, OffsetMS: uint32(n)}
			}
		})
		return e.Marshal()
	}
	var raws [][]byte
	total := 0
	for i := range 200 {
		raws = append(raws, long(i))
		total += len(raws[i])
	}
	if total < 2*MaxBatchBytes {
		t.Fatalf("%d bytes in all: this test tests nothing", total)
	}
	in.put(noon.Add(20*time.Second), raws...)
	s := newService(t, b, r, nil)
	start(t, s)
	await(t, s, 200)
	o := read(t, b)
	o.checkOnce(t, in)
	checkOrder(t, o)
	if len(o.batches) < 3 {
		t.Errorf("got %d messages in ACCEPTED, want at least 3", len(o.batches))
	}
	for i, n := range o.sizes {
		if n > MaxBatchBytes || len(o.batches[i].Records) > MaxBatchRecords {
			t.Errorf("message %d of ACCEPTED has %d bytes and %d records, want at most %d and %d", i, n, len(o.batches[i].Records), MaxBatchBytes, MaxBatchRecords)
		}
	}
}

// TestHalfPublished: ACCEPTED has only a part of what a message of INGRESS held,
// as after a crash between two of its parts.
func TestHalfPublished(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	d := newDevice(0)
	in.put(noon, d.good())
	two, three := d.good(), d.good()
	bad := d.bad(func(f *traffic.Frame) { f.Readings[0].OccupancyPermille = 1400 }).Marshal()
	in.put(noon, two, three, bad, d.good())
	// The first two records of the second message were published, and nothing else.
	half := newService(t, b, r, nil)
	var msgs []*bus.Msg
	if _, err := b.Replay(context.Background(), topic.IngressStream, "", 0, func(m *bus.Msg) error { msgs = append(msgs, m); return nil }); err != nil {
		t.Fatal(err)
	}
	var items []item
	for i, m := range msgs {
		batch, err := wire.DecodeBatch(m.Data)
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range batch.Records[:1+i] {
			items = append(items, item{record: rec, seq: m.Seq})
		}
	}
	if err := half.accept(context.Background(), items, 1, 2); err != nil {
		t.Fatal(err)
	}
	s := newService(t, b, r, nil)
	start(t, s)
	c := await(t, s, 2)
	if c.Accepted != 1 || c.ByRule[validate.RuleOccupancy] != 1 {
		t.Errorf("got counts %+v, want one accepted and one refused by occupancy", c)
	}
	o := read(t, b)
	o.checkOnce(t, in)
	checkOrder(t, o)
}

// TestDeadLetter: a message that is no batch is kept with the dead letters and
// holds nobody up.
func TestDeadLetter(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	d := newDevice(0)
	s := newService(t, b, r, nil)
	start(t, s)
	in.put(noon, d.good())
	if err := b.Publish(context.Background(), topic.Ingress(district), "", []byte("no batch")); err != nil {
		t.Fatal(err)
	}
	in.put(noon, d.good())
	c := await(t, s, 2)
	if c.Dead != 1 || c.Accepted != 2 {
		t.Errorf("got counts %+v, want one dead and two accepted", c)
	}
	n := 0
	if _, err := b.Replay(context.Background(), topic.DeadStream, "", 0, func(m *bus.Msg) error {
		n++
		if string(m.Data) != "no batch" || m.Header.Get(bus.HeaderDeadSeq) != "2" || m.Header.Get(bus.HeaderDeadReason) == "" {
			t.Errorf("got dead letter %q with %v, want the message with its number and reason", m.Data, m.Header)
		}
		return nil
	}); err != nil || n != 1 {
		t.Errorf("got %d dead letters and %v, want 1", n, err)
	}
}

// TestJSON: a frame that was signed as JSON is judged and kept as the bytes that
// came.
func TestJSON(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	in := newIngress(t, b)
	s := newService(t, b, r, nil)
	start(t, s)
	f, _ := newDevice(0).next(nil)
	payload, err := protojson.Marshal(wire.FrameToProto(&f))
	if err != nil {
		t.Fatal(err)
	}
	raw := identity.Sign(key("d0"), identity.KindFrame, identity.JSON, payload).Marshal()
	in.put(time.Unix(0, 0), raw) // no time of receipt: judged by the clock, which is noon
	await(t, s, 1)
	o := read(t, b)
	if len(o.batches) != 1 || string(o.batches[0].Records[0].Envelope) != string(raw) {
		t.Errorf("got %v in ACCEPTED, want the frame as it was signed", o.batches)
	}
}

func TestConfig(t *testing.T) {
	_, err := New(Config{})
	want := "validation: District: must not be empty\nvalidation: Bus: must be given\nvalidation: State or Registry: one must be given"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func BenchmarkService(b *testing.B) {
	for _, batch := range []int{16, 256} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			nats := servicetest.District(b, district)
			r := newRegistry(b, 64)
			in := newIngress(b, nats)
			devices := make([]*device, 64)
			for i := range devices {
				devices[i] = newDevice(i)
			}
			records := 0
			var raws [][]byte
			for records < b.N {
				raws = raws[:0]
				for range batch {
					d := devices[records%len(devices)]
					_, e := d.next(func(f *traffic.Frame) { f.Time = noon })
					raws = append(raws, e.Marshal())
					records++
				}
				in.put(noon, raws...)
			}
			s, err := New(Config{District: district, Bus: nats, Registry: fixed{r}, Now: func() time.Time { return noon }})
			if err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			start(b, s)
			c := await(b, s, uint64(records))
			b.StopTimer()
			if c.Accepted != uint64(records) {
				b.Fatalf("got %d of %d accepted: %v", c.Accepted, records, c.ByRule)
			}
			b.ReportMetric(float64(records)/b.Elapsed().Seconds(), "records/s")
		})
	}
}
