package validation

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const district = traffic.DistrictID("harbour")

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func key(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("test key " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func pub(name string) identity.PublicKey {
	return identity.PublicKey(key(name).Public().(ed25519.PublicKey))
}

// fixed is a registry that stays as it is.
type fixed struct{ r *identity.Registry }

func (f fixed) Registry() *identity.Registry { return f.r }

// newRegistry has junctions j0 … with devices d0 …, the device gone, which is
// revoked, and the service control, which signs commands.
func newRegistry(t testing.TB, devices int) *identity.Registry {
	t.Helper()
	g := &identity.Genesis{District: district}
	add := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Body: b})
	}
	for i := range devices {
		j := &traffic.Junction{
			ID:        traffic.JunctionID(fmt.Sprintf("j%d", i)),
			Lanes:     []traffic.Lane{{ID: "in", LengthCM: 9000, SpeedCMS: 1390, Capacity: 12}, {ID: "out", LengthCM: 9000, SpeedCMS: 1390, Capacity: 12}},
			Groups:    []traffic.Group{{Name: "a", Kind: traffic.Vehicles}},
			Movements: []traffic.Movement{{From: "in", To: "out", SaturationPerHour: 1800}},
			Conflicts: [][]int{{}},
			Stages:    []traffic.Stage{{Name: "a", State: "G"}},
			Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
			Plan:      traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{DurationMS: 20000, IntergreenMS: 4000}}},
		}
		for k := range 24 {
			j.Detectors = append(j.Detectors, traffic.Detector{ID: traffic.DetectorID(fmt.Sprintf("loop-%d", k)), Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1})
		}
		add(identity.TypeJunction, string(j.ID), j)
		id := fmt.Sprintf("d%d", i)
		add(identity.TypeDevice, id, identity.Device{Junction: j.ID, Key: pub(id)})
	}
	add(identity.TypeDevice, "gone", identity.Device{Junction: "j0", Key: pub("gone")})
	add(identity.TypeService, "control", identity.Service{Key: pub("control"), Signs: []identity.RecordKind{identity.KindCommand}})
	add(identity.TypeOfficial, "registrar", identity.Official{Key: pub("registrar"), Department: "traffic", Roles: []string{identity.Registrar}})
	r, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(1, identity.IDOf(ed25519.PublicKey(pub("registrar"))), identity.Change{District: district, Action: "revoke", Type: identity.TypeDevice, ID: "gone"}); err != nil {
		t.Fatal(err)
	}
	return r
}

// device makes the frames of d0, d1 …
type device struct {
	n    int
	last traffic.Frame
	prev [32]byte
}

func newDevice(n int) *device { return &device{n: n} }

// next returns the device's next frame, ten milliseconds after the last,
// and its envelope.
func (d *device) next(mod func(f *traffic.Frame)) (traffic.Frame, identity.Envelope) {
	f := traffic.Frame{
		District: district, Junction: traffic.JunctionID(fmt.Sprintf("j%d", d.n)),
		FrameKey: traffic.FrameKey{Device: traffic.DeviceID(fmt.Sprintf("d%d", d.n)), BootEpoch: 1, Seq: d.last.Seq + 1},
		Prev:     d.prev, Time: noon.Add(time.Duration(d.last.Seq) * 10 * time.Millisecond), Interval: time.Second,
		Signal: traffic.Signal{State: "G", Mode: traffic.Coordinated},
	}
	for k := range 24 {
		f.Readings = append(f.Readings, traffic.Reading{Detector: traffic.DetectorID(fmt.Sprintf("loop-%d", k)), Count: 1, OccupancyPermille: 300, SpeedCMS: 1000})
	}
	if mod != nil {
		mod(&f)
	}
	e := sealFrame(&f)
	d.last, d.prev = f, sha256.Sum256(e.Payload)
	return f, e
}

// good is next for those who need its bytes only.
func (d *device) good() []byte {
	_, e := d.next(nil)
	return e.Marshal()
}

// bad returns a frame that is not the device's next: the next good one does
// not know of it.
func (d *device) bad(mod func(f *traffic.Frame)) identity.Envelope {
	c := *d
	_, e := c.next(mod)
	return e
}

func sealFrame(f *traffic.Frame) identity.Envelope {
	return identity.Sign(key(string(f.Device)), identity.KindFrame, identity.Protobuf, wire.EncodeFrame(f))
}

// ingress writes records into INGRESS as ingest does.
type ingress struct {
	t    testing.TB
	bus  *bus.Bus
	salt uint64
	// sent maps the salt of each record that was put to the number of its message.
	sent map[[32]byte]uint64
}

func newIngress(t testing.TB, b *bus.Bus) *ingress {
	return &ingress{t: t, bus: b, sent: map[[32]byte]uint64{}}
}

// put stores one message with the given records, all received at the same time,
// and returns the salts.
func (in *ingress) put(at time.Time, raw ...[]byte) (salts [][32]byte) {
	in.t.Helper()
	b := &pb.Batch{}
	for _, r := range raw {
		in.salt++
		salt := sha256.Sum256(binary.BigEndian.AppendUint64([]byte("salt"), in.salt))
		salts = append(salts, salt)
		b.Records = append(b.Records, &pb.Record{Envelope: r, Salt: salt[:], ReceivedUnixNano: at.UnixNano()})
	}
	seq, err := in.bus.PublishMsg(context.Background(), bus.Msg{Subject: topic.Ingress(district), Data: wire.EncodeBatch(b)})
	if err != nil {
		in.t.Fatalf("storing in INGRESS: %v", err)
	}
	for _, s := range salts {
		in.sent[s] = seq
	}
	return salts
}

// outcome is what became of the records, by salt.
type outcome struct {
	accepted    map[[32]byte]int // how often
	order       [][32]byte       // of accepted ones
	quarantined map[[32]byte][]*pb.Quarantined
	batches     []*pb.Batch
	sizes       []int
}

// read returns everything that ACCEPTED and QUARANTINE hold.
func read(t testing.TB, b *bus.Bus) *outcome {
	t.Helper()
	o := &outcome{accepted: map[[32]byte]int{}, quarantined: map[[32]byte][]*pb.Quarantined{}}
	if _, err := b.Replay(context.Background(), topic.AcceptedStream, "", 0, func(m *bus.Msg) error {
		batch, err := wire.DecodeBatch(m.Data)
		if err != nil {
			return err
		}
		o.batches = append(o.batches, batch)
		o.sizes = append(o.sizes, len(m.Data))
		for _, r := range batch.Records {
			o.accepted[[32]byte(r.Salt)]++
			o.order = append(o.order, [32]byte(r.Salt))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Replay(context.Background(), topic.QuarantineStream, "", 0, func(m *bus.Msg) error {
		q, err := wire.DecodeQuarantined(m.Data)
		if err != nil {
			return err
		}
		if want := topic.Quarantine(district, q.Rule); m.Subject != want {
			t.Errorf("got a record refused by %s on %s, want %s", q.Rule, m.Subject, want)
		}
		o.quarantined[[32]byte(q.Salt)] = append(o.quarantined[[32]byte(q.Salt)], q)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return o
}

// checkOnce checks that every record that was put is in exactly one of the two
// streams, once.
func (o *outcome) checkOnce(t testing.TB, in *ingress) {
	t.Helper()
	for s := range in.sent {
		if n := o.accepted[s] + len(o.quarantined[s]); n != 1 {
			t.Errorf("record %x of message %d is stored %d times (accepted %d, quarantined %d), want once", s[:4], in.sent[s], n, o.accepted[s], len(o.quarantined[s]))
		}
	}
}

func newService(t testing.TB, b *bus.Bus, r *identity.Registry, kill func(string) error) *Service {
	t.Helper()
	s, err := New(Config{District: district, Bus: b, Registry: fixed{r}, Now: func() time.Time { return noon }, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	if kill != nil {
		s.kill = kill
	}
	return s
}

// start runs the service until the test ends, or stop is called.
func start(t testing.TB, s *Service) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	end := make(chan error, 1)
	go func() { end <- s.Run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-end
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("the service ended with %v", err)
		}
	})
	return stop
}

// await waits until the service has dealt with n records.
func await(t testing.TB, s *Service, n uint64) Counts {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		c := s.Counts()
		if c.Records >= n {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %d records dealt with, want %d: %+v", c.Records, n, c)
		}
		time.Sleep(2 * time.Millisecond) // polling a counter; nothing signals it
	}
}
