package ingest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
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
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const district = "d1"

var (
	deviceKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	received  = time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
)

// frame returns the payload of the n-th frame of a device, with readings.
func frame(device string, n uint64, readings int) []byte {
	f := &traffic.Frame{
		District: district, Junction: "j1", FrameKey: traffic.FrameKey{Device: traffic.DeviceID(device), BootEpoch: 1, Seq: n},
		Time: received, Interval: time.Second, Signal: traffic.Signal{State: "rG", Mode: "coordinated"},
	}
	for i := range readings {
		f.Readings = append(f.Readings, traffic.Reading{Detector: traffic.DetectorID(fmt.Sprint("d", i)), Count: uint32(i), OccupancyPermille: 120, SpeedCMS: 1200})
	}
	return wire.EncodeFrame(f)
}

func sign(payload []byte) identity.Envelope {
	return identity.Sign(deviceKey, identity.KindFrame, identity.Protobuf, payload)
}

// envelope returns the canonical envelope of a small frame.
func envelope(n int) []byte { return sign(frame("dev", uint64(n), 1)).Marshal() }

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// running starts a service on b. When the test ends it must have answered
// everything, and counted it.
func running(t testing.TB, b *bus.Bus, change func(*Config)) *Service {
	t.Helper()
	c := Config{District: district, Bus: b, Now: func() time.Time { return received }, Logger: servicetest.Logger(t)}
	if change != nil {
		change(&c)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: got %v, want nil", err)
		}
		if c := s.Counts(); c.Pending != 0 {
			t.Errorf("got %d requests without an answer after Run, want 0: %+v", c.Pending, c)
		}
	})
	for !s.Listening() {
		if within(t).Err() != nil {
			t.Fatal("does not listen")
		}
	}
	return s
}

// post sends a body and returns status, problem or receipt.
func post(t *testing.T, s *Service, path, contentType string, body []byte) (*httptest.ResponseRecorder, *pb.Receipt) {
	t.Helper()
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, path, bytes.NewReader(body))
	r.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		return w, nil
	}
	var receipt pb.Receipt
	if err := protojson.Unmarshal(w.Body.Bytes(), &receipt); err != nil {
		t.Fatalf("receipt %q: %v", w.Body, err)
	}
	return w, &receipt
}

// checkStored fails unless r says stored and the record is in the stream now,
// with what r says.
func checkStored(t *testing.T, b *bus.Bus, raw []byte, r *pb.Receipt) {
	t.Helper()
	if r.GetStatus() != pb.Receipt_STATUS_STORED {
		t.Fatalf("got receipt %v, want stored", r)
	}
	if c := ledger.Commit(ledger.Salt(r.Salt), raw); !bytes.Equal(c[:], r.Commitment) {
		t.Errorf("got commitment %x, want %x", r.Commitment, c)
	}
	n := 0
	for _, rec := range stream(t, b) {
		if bytes.Equal(rec.Envelope, raw) {
			n++
			if !bytes.Equal(rec.Salt, r.Salt) {
				t.Errorf("got salt %x in the stream, want %x as in the receipt", rec.Salt, r.Salt)
			}
		}
	}
	if n != 1 {
		t.Errorf("got the record %d times in the stream, want once", n)
	}
}

// stream returns all records in INGRESS. A replay in a cluster may be read from
// a replica that is not as far as the leader; then it is repeated.
func stream(t testing.TB, b *bus.Bus) []*pb.Record {
	t.Helper()
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err != nil {
		t.Fatal(err)
	}
	for {
		var out []*pb.Record
		msgs := uint64(0)
		if _, err := b.Replay(within(t), topic.IngressStream, "", 0, func(m *bus.Msg) error {
			batch, err := wire.DecodeBatch(m.Data)
			if err != nil {
				return err
			}
			out = append(out, batch.Records...)
			msgs++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if want := st.CachedInfo().State.Msgs; msgs >= want {
			return out
		}
		time.Sleep(50 * time.Millisecond) // nothing tells when a replica has caught up
	}
}

func request(t *testing.T, b *bus.Bus, kind string, data []byte) *pb.Receipt {
	t.Helper()
	return requestMsg(t, b, &nats.Msg{Subject: topic.Inbox(district, kind, "dev"), Data: data})
}

func requestMsg(t *testing.T, b *bus.Bus, m *nats.Msg) *pb.Receipt {
	t.Helper()
	answer, err := b.NC.RequestMsgWithContext(within(t), m)
	if err != nil {
		t.Fatal(err)
	}
	var r pb.Receipt
	if err := proto.Unmarshal(answer.Data, &r); err != nil {
		t.Fatal(err)
	}
	return &r
}

func asJSON(e identity.Envelope) []byte {
	b, err := json.Marshal(map[string]string{
		"kind": string(e.Kind), "contentType": e.ContentType, "keyId": string(e.Key),
		"payload": base64.StdEncoding.EncodeToString(e.Payload), "signature": base64.StdEncoding.EncodeToString(e.Signature),
	})
	if err != nil {
		panic(err)
	}
	return b
}

func TestReceiptMeansStored(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	raw := envelope(1)
	checkStored(t, b, raw, request(t, b, "frame", raw))
	raw = envelope(2)
	_, r := post(t, s, "/v1/frames", identity.Protobuf, raw)
	checkStored(t, b, raw, r)
	e := sign(frame("dev", 3, 2))
	_, r = post(t, s, "/v1/records", identity.JSON+"; charset=utf-8", asJSON(e))
	checkStored(t, b, e.Marshal(), r)
	for _, rec := range stream(t, b) {
		if rec.ReceivedUnixNano != received.UnixNano() {
			t.Errorf("got received %d, want %d", rec.ReceivedUnixNano, received.UnixNano())
		}
	}
	if c := s.Counts(); c.Received != 3 || c.Stored != 3 || c.Batches == 0 || c.Bytes == 0 {
		t.Errorf("got %+v, want 3 received and stored", c)
	}
}

func TestReceiptAsProtobuf(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, "/v1/frames", bytes.NewReader(envelope(1)))
	r.Header.Set("Content-Type", identity.Protobuf)
	r.Header.Set("Accept", identity.Protobuf)
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	var receipt pb.Receipt
	if err := proto.Unmarshal(w.Body.Bytes(), &receipt); err != nil || w.Header().Get("Content-Type") != identity.Protobuf {
		t.Fatalf("got %s, %v, want a protobuf receipt", w.Header().Get("Content-Type"), err)
	}
	checkStored(t, b, envelope(1), &receipt)
}

// reversed encodes an envelope in another way than the canonical one.
func reversed(e identity.Envelope) []byte {
	var b []byte
	for _, f := range []struct {
		n byte
		v string
	}{{5, string(e.Signature)}, {4, string(e.Payload)}, {3, string(e.Key)}, {2, e.ContentType}, {1, string(e.Kind)}} {
		b = append(b, f.n<<3|2, byte(len(f.v))|0x80, byte(len(f.v)>>7)|0x80, 0) // length in three bytes
		b = append(b, f.v...)
	}
	return b
}

func TestOtherEncodingsBecomeCanonical(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	e := sign(frame("dev", 1, 1))
	if _, err := identity.ParseEnvelope(reversed(e)); err == nil {
		t.Fatal("the test's encoding is canonical")
	}
	_, r := post(t, s, "/v1/frames", identity.Protobuf, reversed(e))
	checkStored(t, b, e.Marshal(), r)
	if got, err := identity.ParseEnvelope(stream(t, b)[0].Envelope); err != nil || !bytes.Equal(got.Payload, e.Payload) || !got.Verify(deviceKey.Public().(ed25519.PublicKey)) {
		t.Errorf("got %v, %v, want the same payload and a valid signature", got, err)
	}
}

// badBodies are what HTTP must refuse. For those without a path it is
// /v1/frames.
var badBodies = []struct {
	name, path, contentType string
	body                    func() []byte
	status                  int
	rule, field, detail     string
}{
	{"oversized frame", "", identity.Protobuf, func() []byte { return sign(make([]byte, identity.MaxEnvelope)).Marshal() },
		413, ReasonSize, "body", "body: more than 262208 bytes; an envelope may have 262144"},
	{"slightly oversized frame", "", identity.Protobuf, func() []byte { return sign(make([]byte, identity.MaxEnvelope-130)).Marshal() },
		413, ReasonSize, "body", "at most 262144 are taken"},
	{"oversized JSON", "", identity.JSON, func() []byte { return asJSON(sign(make([]byte, identity.MaxEnvelope+4096))) },
		413, ReasonSize, "body", "an envelope may have 262144"},
	{"truncated protobuf", "", identity.Protobuf, func() []byte { e := envelope(1); return e[:len(e)-10] },
		400, ReasonEnvelope, "body", "field 5: truncated, 54 bytes of 64"},
	{"trailing bytes", "", identity.Protobuf, func() []byte { return append(envelope(1), 0x32, 1, 'x') },
		400, ReasonEnvelope, "body", "unknown field or type, tag 0x32"},
	{"field twice", "", identity.Protobuf, func() []byte { return append(envelope(1), 0x0a, 5, 'f', 'r', 'a', 'm', 'e') },
		400, ReasonEnvelope, "body", "field 1 out of order or repeated"},
	{"no signature", "", identity.Protobuf, func() []byte { e := sign(frame("dev", 1, 1)); e.Signature = nil; return e.Marshal() },
		400, ReasonEnvelope, "signature", "signature: must be 64 bytes, has 0"},
	{"no payload", "", identity.JSON, func() []byte { e := sign(frame("dev", 1, 1)); e.Payload = nil; return asJSON(e) },
		400, ReasonEnvelope, "payload", "payload: must not be empty"},
	{"unknown kind", "", identity.Protobuf, func() []byte { e := sign(frame("dev", 1, 1)); e.Kind = "gossip"; return e.Marshal() },
		400, ReasonEnvelope, "kind", `kind "gossip": unknown`},
	{"other kind", "", identity.Protobuf, func() []byte { e := sign(frame("dev", 1, 1)); e.Kind = "command"; return e.Marshal() },
		400, ReasonKind, "kind", "kind: command, must be frame here"},
	{"JSON with an unknown field", "", identity.JSON, func() []byte {
		return bytes.Replace(asJSON(sign(frame("dev", 1, 1))), []byte("{"), []byte(`{"colour":"red",`), 1)
	},
		400, ReasonEnvelope, "body", `unknown field "colour"`},
	{"JSON with a field twice", "", identity.JSON, func() []byte {
		return bytes.Replace(asJSON(sign(frame("dev", 1, 1))), []byte("{"), []byte(`{"kind":"frame",`), 1)
	},
		400, ReasonEnvelope, "body", `duplicate field "kind"`},
	{"JSON with something behind it", "", identity.JSON, func() []byte { return append(asJSON(sign(frame("dev", 1, 1))), "{}"...) },
		400, ReasonEnvelope, "body", "unexpected token {"},
	{"JSON that is not base64", "/v1/records", identity.JSON, func() []byte { return []byte(`{"payload":"!"}`) },
		400, ReasonEnvelope, "body", "invalid value for bytes field payload"},
	{"empty body", "", identity.Protobuf, func() []byte { return nil },
		400, ReasonEmpty, "body", "body: must not be empty"},
	{"empty JSON", "/v1/records", identity.JSON, func() []byte { return nil },
		400, ReasonEmpty, "body", "body: must not be empty"},
	{"wrong content type", "", "text/plain", func() []byte { return envelope(1) },
		415, ReasonContentType, "Content-Type", `Content-Type: "text/plain", must be application/x-protobuf or application/json`},
	{"no content type", "", "", func() []byte { return envelope(1) },
		415, ReasonContentType, "Content-Type", `Content-Type: "", must be application/x-protobuf`},
}

func TestRefusesByHTTP(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	want := map[string]uint64{}
	for i, c := range badBodies {
		t.Run(c.name, func(t *testing.T) {
			path := c.path
			if path == "" {
				path = "/v1/frames"
			}
			want[c.rule]++
			w, _ := post(t, s, path, c.contentType, c.body())
			var p struct {
				Type, Title, Detail, Rule, Field string
				Status                           int
			}
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || w.Header().Get("Content-Type") != "application/problem+json" {
				t.Fatalf("got %s %q, %v, want a problem", w.Header().Get("Content-Type"), w.Body, err)
			}
			if w.Code != c.status || p.Status != c.status || p.Rule != c.rule || p.Field != c.field || !strings.Contains(p.Detail, c.detail) {
				t.Errorf("got %d %+v, want %d, rule %s, field %s, detail with %q", w.Code, p, c.status, c.rule, c.field, c.detail)
			}
			if p.Type != "urn:stopline:problem:"+c.rule || p.Title != http.StatusText(c.status) {
				t.Errorf("got type %q, title %q", p.Type, p.Title)
			}
			raw := envelope(100 + i)
			_, r := post(t, s, "/v1/frames", identity.Protobuf, raw)
			checkStored(t, b, raw, r)
		})
	}
	c := s.Counts()
	for rule, n := range want {
		if c.Refused[rule] != n {
			t.Errorf("got %d counted as %s, want %d", c.Refused[rule], rule, n)
		}
	}
	if len(c.Refused) != len(want) || c.Stored != uint64(len(badBodies)) || len(c.Busy) != 0 {
		t.Errorf("got %+v, want %d stored and no other reasons than %v", c, len(badBodies), want)
	}
}

func TestRefusesContentEncoding(t *testing.T) {
	t.Parallel()
	s := running(t, servicetest.District(t, district), nil)
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, "/v1/frames", bytes.NewReader(envelope(1)))
	r.Header.Set("Content-Type", identity.Protobuf)
	r.Header.Set("Content-Encoding", "gzip")
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	if w.Code != 415 || !strings.Contains(w.Body.String(), "must not be used") {
		t.Errorf("got %d %s, want 415", w.Code, w.Body)
	}
}

type brokenBody struct{}

func (brokenBody) Read([]byte) (int, error) { return 0, errors.New("cable cut") }

func TestCountsBrokenBodies(t *testing.T) {
	t.Parallel()
	s := running(t, servicetest.District(t, district), nil)
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, "/v1/frames", brokenBody{})
	r.Header.Set("Content-Type", identity.Protobuf)
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "body: cable cut") || s.Counts().Refused[ReasonBody] != 1 {
		t.Errorf("got %d %s, %+v, want 400 and one counted", w.Code, w.Body, s.Counts())
	}
}

func TestRefusesByNATS(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, nil)
	want := map[string]uint64{}
	for i, c := range []struct {
		name, kind string
		header     nats.Header
		body       []byte
		rule, text string
	}{
		{"oversized frame", "frame", nil, sign(make([]byte, identity.MaxEnvelope)).Marshal(), ReasonSize, "at most 262144 are taken"},
		{"truncated protobuf", "frame", nil, envelope(1)[:40], ReasonEnvelope, "truncated"},
		{"empty", "frame", nil, nil, ReasonEmpty, "body: must not be empty"},
		{"kind that the subject does not have", "registry", nil, envelope(1), ReasonKind, "kind: the envelope says frame, the subject stopline.d1.in.registry.dev does not"},
		{"number that is none", "frame", nats.Header{bus.HeaderSession: {"s"}, bus.HeaderNumber: {"one"}}, envelope(1), ReasonHeader, "Stopline-Number, Stopline-Base: must be decimal numbers"},
		{"base above number", "frame", nats.Header{bus.HeaderSession: {"s"}, bus.HeaderNumber: {"1"}, bus.HeaderBase: {"2"}}, envelope(1), ReasonHeader, "not below"},
	} {
		t.Run(c.name, func(t *testing.T) {
			want[c.rule]++
			r := requestMsg(t, b, &nats.Msg{Subject: topic.Inbox(district, c.kind, "dev"), Data: c.body, Header: c.header})
			if r.Status != pb.Receipt_STATUS_REFUSED || !strings.Contains(r.Reason, c.text) {
				t.Errorf("got %v, want refused with %q", r, c.text)
			}
			raw := envelope(100 + i)
			checkStored(t, b, raw, request(t, b, "frame", raw))
		})
	}
	c := s.Counts()
	if fmt.Sprint(c.Refused) != fmt.Sprint(want) || c.Stored != 6 {
		t.Errorf("got %+v, want %v refused and 6 stored", c, want)
	}
}

// answers collects what senders are told.
type answers struct {
	mu  sync.Mutex
	got []answer
	wg  sync.WaitGroup
}

func (a *answers) take(s *Service, raw []byte) {
	a.wg.Add(1)
	s.take(raw, turn{}, func(x answer) {
		a.mu.Lock()
		a.got = append(a.got, x)
		a.mu.Unlock()
		a.wg.Done()
	})
}

func (a *answers) count(status pb.Receipt_Status, reason string) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.got {
		if x.status == status && x.reason == reason {
			n++
		}
	}
	return n
}

func TestFullQueueIsTold(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, text string
		change     func(*Config)
	}{
		{"records", "queue: 4 records wait, at most 4 are held", func(c *Config) { c.MaxPending = 4 }},
		{"bytes", "bytes are held", func(c *Config) { c.MaxPendingBytes = 4*len(envelope(1)) + 10 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Nothing is stored before the queue has been seen to be full: there are no
			// salts until then.
			full := make(chan struct{})
			b := servicetest.District(t, district)
			s := running(t, b, func(cfg *Config) { cfg.Rand = held{full}; c.change(cfg) })
			var a answers
			for i := range 4 {
				a.take(s, envelope(i))
			}
			w, _ := post(t, s, "/v1/frames", identity.Protobuf, envelope(4))
			if w.Code != 429 || w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), "queue: ") {
				t.Errorf("got %d, Retry-After %q, %s, want 429, 1, queue", w.Code, w.Header().Get("Retry-After"), w.Body)
			}
			if r := request(t, b, "frame", envelope(5)); r.Status != pb.Receipt_STATUS_BUSY {
				t.Errorf("got %v, want busy", r)
			}
			close(full)
			a.wg.Wait()
			if n := a.count(pb.Receipt_STATUS_STORED, ""); n != 4 {
				t.Errorf("got %d stored, want the 4 that were taken", n)
			}
			if n := s.Counts().Busy[ReasonQueueFull]; n != 2 {
				t.Errorf("got %d counted as %s, want 2", n, ReasonQueueFull)
			}
			// There is room again, and what was turned away comes in.
			if r := request(t, b, "frame", envelope(5)); r.Status != pb.Receipt_STATUS_STORED {
				t.Errorf("got %v, want stored", r)
			}
		})
	}
}

// One record sent again and again while it cannot be stored is held once, and
// only so many wait for it.
func TestWaitersAreBounded(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	full := make(chan struct{})
	s := running(t, b, func(c *Config) { c.Rand = held{full} })
	const most, more = 64, 10
	var a answers
	for range most + more {
		a.take(s, envelope(1))
	}
	if n := s.Counts().Busy[ReasonQueueFull]; n != more {
		t.Errorf("got %d told busy, want %d", n, more)
	}
	close(full)
	a.wg.Wait()
	if n, busy := a.count(pb.Receipt_STATUS_STORED, ""), a.count(pb.Receipt_STATUS_BUSY, ReasonQueueFull); n != most || busy != more {
		t.Errorf("got %d stored and %d busy, want %d and %d", n, busy, most, more)
	}
	if c := s.Counts(); c.Stored != 1 || c.Again != most-1 || c.Pending != 0 {
		t.Errorf("got %+v, want 1 stored, %d again, none pending", c, most-1)
	}
}

func TestFullStreamIsTold(t *testing.T) {
	t.Parallel()
	b := servicetest.Connect(t, servicetest.NATS(t))
	small := topic.Streams(district)[0]
	small.MaxBytes = 16 << 10
	if err := b.Declare(within(t), []topic.Stream{small}); err != nil {
		t.Fatal(err)
	}
	s := running(t, b, func(c *Config) { c.MaxBatch = 1 })
	stored, i := 0, 0
	for ; ; i++ {
		r := request(t, b, "frame", envelope(i))
		if r.Status == pb.Receipt_STATUS_BUSY {
			if !strings.Contains(r.Reason, "stream is full") {
				t.Errorf("got reason %q, want stream is full in it", r.Reason)
			}
			break
		}
		if stored++; stored > 1000 {
			t.Fatal("the stream is never full")
		}
	}
	w, _ := post(t, s, "/v1/frames", identity.Protobuf, envelope(i))
	if w.Code != 429 || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), ReasonStreamFull) {
		t.Errorf("got %d %s, want 429 stream-full", w.Code, w.Body)
	}
	if n := len(stream(t, b)); n != stored {
		t.Errorf("got %d records in the stream, want the %d with receipts", n, stored)
	}
	if c := s.Counts(); c.Busy[ReasonStreamFull] != 2 || c.Stored != uint64(stored) {
		t.Errorf("got %+v, want 2 busy by stream-full", c)
	}
	st, err := b.JS.Stream(within(t), topic.IngressStream)
	if err == nil {
		err = st.Purge(within(t))
	}
	if err != nil {
		t.Fatal(err)
	}
	checkStored(t, b, envelope(i), request(t, b, "frame", envelope(i)))
}

func TestSameBytesSameReceipt(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.MaxDelay = 50 * time.Millisecond })
	var a answers
	for range 10 { // before it is stored
		a.take(s, envelope(1))
	}
	a.wg.Wait()
	for range 10 { // and after
		a.take(s, envelope(1))
	}
	a.wg.Wait()
	if n := a.count(pb.Receipt_STATUS_STORED, ""); n != 20 {
		t.Fatalf("got %d stored, want 20", n)
	}
	for _, x := range a.got {
		if x.salt != a.got[0].salt || x.commitment != a.got[0].commitment {
			t.Errorf("got another receipt for the same bytes")
		}
	}
	if n := len(stream(t, b)); n != 1 {
		t.Errorf("got %d records stored, want 1", n)
	}
	if c := s.Counts(); c.Stored != 1 || c.Again != 19 {
		t.Errorf("got %+v, want 1 stored and 19 again", c)
	}
}

func TestNotRunningIsTold(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s, err := New(Config{District: district, Bus: b})
	if err != nil {
		t.Fatal(err)
	}
	w, _ := post(t, s, "/v1/frames", identity.Protobuf, envelope(1))
	if w.Code != 503 || !strings.Contains(w.Body.String(), ReasonStopped) || s.Counts().Busy[ReasonStopped] != 1 {
		t.Errorf("got %d %s, want 503, counted", w.Code, w.Body)
	}
}

func TestStopAnswersAll(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s, err := New(Config{District: district, Bus: b, MaxDelay: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	for !s.Listening() {
	}
	var a answers
	for i := range 600 {
		a.take(s, envelope(i))
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.wg.Wait()
	if n := a.count(pb.Receipt_STATUS_STORED, ""); n != 600 || len(stream(t, b)) != 600 {
		t.Errorf("got %d receipts, %d records, want 600", n, len(stream(t, b)))
	}
}

func TestNoSalts(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.Rand = io.LimitReader(neverEnding{}, 32) })
	if r := request(t, b, "frame", envelope(1)); r.Status != pb.Receipt_STATUS_STORED {
		t.Errorf("got %v, want stored", r)
	}
	if r := request(t, b, "frame", envelope(2)); r.Status != pb.Receipt_STATUS_BUSY || !strings.Contains(r.Reason, "salts") {
		t.Errorf("got %v, want busy", r)
	}
	if n := s.Counts().Busy[ReasonUnavailable]; n != 1 {
		t.Errorf("got %d counted, want 1", n)
	}
}

// held gives no bytes until its channel is closed.
type held struct{ until chan struct{} }

func (h held) Read(b []byte) (int, error) { <-h.until; return rand.Read(b) }

type neverEnding struct{}

func (neverEnding) Read(b []byte) (int, error) { return len(b), nil }

func TestConfig(t *testing.T) {
	t.Parallel()
	_, err := New(Config{MaxBatch: -1, MaxRecord: identity.MaxEnvelope + 1})
	for _, want := range []string{"District: must not be empty", "Bus: must be given", "MaxBatch: -1, must be 0 to", "MaxRecord: 262145, must be 0 to 262144"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

func FuzzBody(f *testing.F) {
	for _, c := range badBodies {
		if b := c.body(); len(b) < 4096 {
			f.Add(c.contentType == identity.JSON, b)
		}
	}
	e := sign(frame("dev", 1, 2))
	f.Add(false, e.Marshal())
	f.Add(false, reversed(e))
	f.Add(true, asJSON(e))
	s := &Service{Config: Config{MaxRecord: 8192}}
	f.Fuzz(func(t *testing.T, isJSON bool, b []byte) {
		mediaType := identity.Protobuf
		if isJSON {
			mediaType = identity.JSON
		}
		in := bytes.Clone(b)
		raw, e, ref := s.decode(mediaType, b)
		if !bytes.Equal(in, b) {
			t.Fatal("the body was changed")
		}
		if ref != nil {
			if ref.reason == "" || ref.field == "" || ref.text == "" {
				t.Errorf("got refusal %+v, want reason, field and text", ref)
			}
			return
		}
		if len(raw) > s.MaxRecord || !bytes.Equal(e.Marshal(), raw) {
			t.Errorf("got %d bytes that are not canonical or too many", len(raw))
		}
		again, _, ref := s.decode(identity.Protobuf, raw)
		if ref != nil || !bytes.Equal(again, raw) {
			t.Errorf("got %x, %v, want the canonical bytes to stay as they are", again, ref)
		}
		// The payload is what any other reader of the body sees.
		var m pb.Envelope
		if isJSON {
			if err := protojson.Unmarshal(b, &m); err != nil {
				t.Fatal(err)
			}
		} else if err := proto.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.Payload, e.Payload) || !bytes.Equal(m.Signature, e.Signature) || m.Kind != string(e.Kind) {
			t.Errorf("got payload %x, want %x", e.Payload, m.Payload)
		}
	})
}
