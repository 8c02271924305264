package ingest

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// talk is a device's two topics, without MQTT around them.
type talk struct {
	t    testing.TB
	b    *bus.Bus
	id   traffic.DeviceID
	down *nats.Subscription
}

func talks(t testing.TB, b *bus.Bus, id traffic.DeviceID) *talk {
	t.Helper()
	d, err := b.NC.SubscribeSync(topic.DeviceDown(district, id))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Unsubscribe() }) // or closing waits for what nobody reads
	return &talk{t, b, id, d}
}

func (d *talk) say(record []byte) {
	d.t.Helper()
	if err := d.b.Send(topic.DeviceUp(district, d.id), record); err != nil {
		d.t.Fatal(err)
	}
}

// hear returns the next receipt, in the encoding that it must have.
func (d *talk) hear(isJSON bool) *pb.Receipt {
	d.t.Helper()
	m, err := d.down.NextMsgWithContext(within(d.t))
	if err != nil {
		d.t.Fatalf("no receipt: %v", err)
	}
	var r pb.Receipt
	if isJSON {
		err = protojson.Unmarshal(m.Data, &r)
	} else {
		err = proto.Unmarshal(m.Data, &r)
	}
	if err != nil {
		d.t.Fatalf("receipt %q: %v", m.Data, err)
	}
	return &r
}

// A device gets its receipt in the encoding of its record, and knows by the
// digest which record it is about; the same bytes again get the same receipt.
func TestDeviceReceipt(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	for _, id := range []traffic.DeviceID{"dev", "a.b c/>"} {
		d := talks(t, b, id)
		e := sign(frame(string(id), 1, 3))
		for _, tt := range []struct {
			sent   []byte
			isJSON bool
		}{{e.Marshal(), false}, {asJSON(e), true}, {reversed(e), false}} {
			for range 2 {
				d.say(tt.sent)
				r := d.hear(tt.isJSON)
				checkStored(t, b, e.Marshal(), r)
				if want := sha256.Sum256(tt.sent); !slices.Equal(r.Digest, want[:]) {
					t.Errorf("%s: digest %x, want %x, that of the bytes sent", id, r.Digest, want)
				}
			}
		}
	}
	if c := s.Counts(); c.Stored != 2 || c.Again != 10 || c.Doors[DoorMQTT] != (DoorCounts{Received: 12, Stored: 12}) {
		t.Errorf("got %+v, want 2 stored, 10 again, all by MQTT", c)
	}
}

// What is not a record is refused by the same rules as elsewhere, with a receipt
// in the encoding that it looked like.
func TestDeviceRefused(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	d := talks(t, b, "dev")
	good := sign(frame("dev", 1, 1))
	other := good
	other.Kind = "gossip"
	for _, tt := range []struct {
		sent           string
		isJSON         bool
		reason, detail string
	}{
		{"", false, ReasonEmpty, "must not be empty"},
		{"hello", false, ReasonEnvelope, ""},
		{"{}", true, ReasonEnvelope, "kind"},
		{"{", true, ReasonEnvelope, "body"},
		{`{"kind":"frame","extra":1}`, true, ReasonEnvelope, "extra"},
		{string(other.Marshal()), false, ReasonEnvelope, "kind"},
		{string(good.Marshal()[:20]), false, ReasonEnvelope, ""},
		{string(sign(make([]byte, identity.MaxEnvelope)).Marshal()), false, ReasonSize, "at most"},
		{"{" + strings.Repeat(" ", bus.MaxDeviceMessage), true, ReasonEnvelope, ""},
	} {
		before := s.Counts().Refused[tt.reason]
		d.say([]byte(tt.sent))
		r := d.hear(tt.isJSON)
		if r.Status != pb.Receipt_STATUS_REFUSED || !strings.Contains(r.Reason, tt.detail) || len(r.Commitment) > 0 {
			t.Errorf("%.30q: got %v, want refused with %q", tt.sent, r, tt.detail)
		}
		if want := sha256.Sum256([]byte(tt.sent)); !slices.Equal(r.Digest, want[:]) {
			t.Errorf("%.30q: digest %x, want %x", tt.sent, r.Digest, want)
		}
		if got := s.Counts().Refused[tt.reason]; got != before+1 {
			t.Errorf("%.30q: counted %d as %s, want 1; all: %v", tt.sent, got-before, tt.reason, s.Counts().Refused)
		}
	}
	d.say(good.Marshal())
	checkStored(t, b, good.Marshal(), d.hear(false))
}

// A device may bring its own records only, as far as the registry knows whose
// they are.
func TestDeviceSpeaksForAnother(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	_, officialKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, unknownKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	id := func(k ed25519.PrivateKey) identity.KeyID { return identity.IDOf(k.Public().(ed25519.PublicKey)) }
	s := running(t, b, func(c *Config) {
		c.Device = func(k identity.KeyID) (traffic.DeviceID, bool) {
			switch k {
			case id(deviceKey):
				return "dev.1", true
			case id(officialKey):
				return "", true
			}
			return "", false
		}
	})
	for _, tt := range []struct {
		topic  traffic.DeviceID
		key    ed25519.PrivateKey
		refuse string
	}{
		{"dev.1", deviceKey, ""},
		{"dev.2", deviceKey, `the registry has`},
		{"dev=2E1", deviceKey, `for "dev.1"`}, // its token is another
		{"dev.1", officialKey, "something that is no device"},
		{"dev.1", unknownKey, ""}, // validation finds out, and keeps it
	} {
		d := talks(t, b, tt.topic)
		before := s.Counts().Refused[ReasonDevice]
		raw := identity.Sign(tt.key, identity.KindFrame, identity.Protobuf, frame("dev.1", 1, 1)).Marshal()
		d.say(raw)
		r := d.hear(false)
		if tt.refuse == "" {
			checkStored(t, b, raw, r)
		} else if r.Status != pb.Receipt_STATUS_REFUSED || !strings.Contains(r.Reason, tt.refuse) {
			t.Errorf("topic of %s: got %v, want refused with %q", tt.topic, r, tt.refuse)
		}
		want := before
		if tt.refuse != "" {
			want++
		}
		if got := s.Counts().Refused[ReasonDevice]; got != want {
			t.Errorf("topic of %s: counted %d, want %d", tt.topic, got, want)
		}
	}
}

// A device that sends many at a time, and sends again in order what was told
// busy, finds its records stored in order: through a full stream, a store that is
// away, and a queue that is too small.
func TestDeviceOrderThroughFailures(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) {
		c.MaxBatch, c.MaxPending, c.StoreWait = 4, 12, 50*time.Millisecond
	})
	const n, window = 300, 32
	d := talks(t, b, "dev0")
	var records [][]byte
	for i := range n {
		records = append(records, sign(frame("dev0", uint64(i+1), 1)).Marshal())
	}
	stored := map[[32]byte]bool{}
	r := rand.New(rand.NewPCG(1, 2))
	for round, first := 0, 0; first < n; round++ {
		switch round % 4 {
		case 1:
			roomFor(t, b, int64(r.IntN(3)))
		case 2:
			roomFor(t, b, -1)
			storing(t, b, false)
		case 3:
			storing(t, b, true)
		}
		sent := 0
		for i := first; i < min(first+window, n); i++ {
			if !stored[sha256.Sum256(records[i])] {
				d.say(records[i])
				sent++
			}
		}
		for range sent {
			switch a := d.hear(false); a.Status {
			case pb.Receipt_STATUS_STORED:
				stored[[32]byte(a.Digest)] = true
			case pb.Receipt_STATUS_BUSY:
			default:
				t.Fatalf("got %v, want stored or busy", a)
			}
		}
		for first < n && stored[sha256.Sum256(records[first])] {
			first++
		}
	}
	roomFor(t, b, -1)
	checkOrder(t, b, 1, n, true)
	if c := s.Counts(); c.Busy[ReasonTurn] == 0 || c.Busy[ReasonStreamFull] == 0 || c.Busy[ReasonQueueFull] == 0 {
		t.Errorf("got busy %v, want of each kind: the test has tested nothing", c.Busy)
	}
}

// One device cannot fill the queue for all: beyond a bound it alone is told busy.
func TestDeviceHasABound(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.StoreWait = time.Second })
	storing(t, b, false) // so that nothing is answered for a second
	d := talks(t, b, "dev")
	for i := range laneMost + 50 {
		d.say(envelope(i + 1))
	}
	until(t, "busy answers", func() bool { return s.Counts().Busy[ReasonQueueFull] > 0 })
	c := s.Counts()
	if c.Busy[ReasonQueueFull] != 1 || c.Pending > laneMost {
		t.Errorf("got %+v, want 1 told that too many wait, and at most %d waiting", c, laneMost)
	}
	storing(t, b, true)
	for range laneMost + 50 {
		d.hear(false)
	}
}

// The lanes against a device that sends all without a final answer again, in
// order, and a store that answers as it likes but never stores behind a failure:
// what is stored is in order.
func TestLanesKeepOrder(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		var ls lanes
		now := time.Unix(0, 0)
		ls.swept = now.Add(time.Hour)
		type flight struct {
			i int
			n uint64
		}
		digest := func(i int) ledger.Hash { return ledger.Hash{byte(i), byte(i >> 8)} }
		const most = 40
		var queue []flight
		final, waiting := [most]bool{}, [most]bool{}
		last := -1
		for step := 0; last < most-1; step++ {
			if step > 100000 {
				t.Fatalf("seed %d: no end, at %d", seed, last)
			}
			now = now.Add(10 * time.Millisecond) // fast enough for what is sent
			switch r.IntN(3) {
			case 0: // the device sends a few of those that it has to send, in order
				k := 1 + r.IntN(6)
				for i := range most {
					if final[i] || waiting[i] {
						continue
					}
					// Never past one that it knows to be busy without sending that again.
					d := digest(i)
					if !ls.admit("dev", d[:], now) {
						t.Fatal("not admitted")
					}
					n, reason, _ := ls.enter("dev", d, now)
					if reason == "" {
						queue = append(queue, flight{i, n})
						waiting[i] = true
					}
					if k--; k == 0 {
						break
					}
				}
			case 1: // the oldest are stored
				for k := r.IntN(4); k > 0 && len(queue) > 0; k-- {
					f := queue[0]
					queue = queue[1:]
					if f.i < last {
						t.Fatalf("seed %d: record %d is stored behind %d", seed, f.i, last)
					}
					last, final[f.i], waiting[f.i] = f.i, true, false
					ls.leave("dev", f.n, digest(f.i), false, now)
				}
			case 2: // all in the queue fail, and the device may send in between
				if r.IntN(4) > 0 {
					break
				}
				failed := queue
				queue = nil
				for _, f := range failed {
					waiting[f.i] = false
					ls.leave("dev", f.n, digest(f.i), true, now)
				}
			}
		}
		if len(ls.m) > 0 && ls.m["dev"].blocked {
			t.Errorf("seed %d: blocked though all is stored", seed)
		}
	}
}

// A device that gives a record up is listened to again after a while, and what
// is remembered of devices that never come back goes too.
func TestLanesForget(t *testing.T) {
	var ls lanes
	now := time.Unix(0, 0)
	a, b := ledger.Hash{1}, ledger.Hash{2}
	enter := func(id string, digest ledger.Hash, now time.Time) (n uint64, reason string) {
		if !ls.admit(id, nil, now) {
			t.Fatal("not admitted")
		}
		n, reason, _ = ls.enter(id, digest, now)
		return n, reason
	}
	n, _ := enter("dev", a, now)
	ls.leave("dev", n, a, true, now)
	if _, reason := enter("dev", b, now.Add(laneWait-1)); reason != ReasonTurn {
		t.Errorf("behind a record that is to come again: got %q, want %q", reason, ReasonTurn)
	}
	n, reason := enter("dev", b, now.Add(laneWait))
	if reason != "" {
		t.Errorf("after %v: got %q, want in", laneWait, reason)
	}
	ls.leave("dev", n, b, false, now)
	for i := range 1000 {
		id := fmt.Sprint("gone", i)
		n, _ := enter(id, a, now)
		ls.leave(id, n, a, true, now)
	}
	enter("dev", a, now.Add(3*laneWait))
	if len(ls.m) != 1 {
		t.Errorf("%d lanes are remembered, want 1", len(ls.m))
	}
}

// What comes too fast is dropped, without making room for what is behind it.
func TestLanesRate(t *testing.T) {
	var ls lanes
	now := time.Unix(0, 0)
	for i := range laneBurst {
		if !ls.admit("dev", nil, now) {
			t.Fatalf("message %d of %d at once was dropped", i+1, laneBurst)
		}
	}
	late, later := []byte("late"), []byte("later")
	if ls.admit("dev", late, now) || ls.admit("dev", later, now) {
		t.Fatal("more than the burst were let through")
	}
	if !ls.admit("other", nil, now) {
		t.Fatal("another device was dropped")
	}
	now = now.Add(time.Second / 2)
	got := 0
	for range laneRate {
		if ls.admit("dev", later, now) {
			got++
		}
	}
	if got != laneRate/2 {
		t.Errorf("after half a second: got %d, want %d", got, laneRate/2)
	}
	if _, reason, _ := ls.enter("dev", sha256.Sum256(later), now); reason != ReasonTurn {
		t.Errorf("behind a dropped record: got %q, want %q", reason, ReasonTurn)
	}
	if _, reason, _ := ls.enter("dev", sha256.Sum256(late), now); reason != "" {
		t.Errorf("the dropped record itself: got %q, want in", reason)
	}
	if _, reason, _ := ls.enter("dev", sha256.Sum256(later), now); reason != "" {
		t.Errorf("then the one behind it: got %q, want in", reason)
	}
}

// A device that publishes as fast as it can and never reads holds little memory,
// and another is served all the while. The server throws it out after ten seconds
// in which it could write nothing; where little came through before, it only
// stops reading from it.
func TestDeviceThatNeverReads(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as the server waits for a reader; not with -short")
	}
	s, b := mqttDistrict(t, 10)
	sv := running(t, b, nil)
	deaf := connected(t, s, "deaf")
	good := connected(t, s, "good")
	if err := deaf.Conn.(*net.TCPConn).SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	// Refused receipts quote what was sent: the longest there are.
	junk := []byte(`{"` + base64.StdEncoding.EncodeToString(make([]byte, 300)) + `":1}`)
	ended := make(chan struct{})
	flood := time.Now().Add(time.Second)
	pace := time.NewTicker(600 * time.Microsecond) // each is answered: laneRate allows more
	defer pace.Stop()
	go func() {
		for {
			_, err := deaf.Publish(topic.MQTT(topic.DeviceUp(district, "deaf")), 1, junk)
			if time.Now().After(flood) {
				<-pace.C
				err = errors.Join(err, deaf.Flush())
			}
			if err != nil {
				close(ended)
				return
			}
		}
	}()
	most, n, slowest := int64(0), uint64(0), time.Duration(0)
	thrownOut := false
	for until := time.Now().Add(15 * time.Second); !thrownOut && time.Now().Before(until); {
		select {
		case <-ended:
			thrownOut = true
		default:
			n++
			began := time.Now()
			if err := exchange(good, "good", [][]byte{sign(frame("good", n, 1)).Marshal()}, 1); err != nil {
				t.Fatal(err)
			}
			slowest = max(slowest, time.Since(began))
			if n%100 == 0 {
				most = max(most, heap()-before)
			}
		}
	}
	if most > 64<<20 {
		t.Errorf("it held %d MB, want at most 64", most>>20)
	}
	k := sv.Counts()
	t.Logf("thrown out: %v; the heap grew by at most %d MB, the other had %d frames stored, one at a time, the slowest in %v; %+v", thrownOut, most>>20, n, slowest, k)
	if n < 20 || k.Refused[ReasonEnvelope] == 0 || k.Lost != 0 {
		t.Errorf("got %d frames of the other device, %v refused of the deaf one, %d lost; want many, many, none", n, k.Refused, k.Lost)
	}
}
