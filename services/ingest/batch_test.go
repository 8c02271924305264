package ingest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// envelopes returns frames first to last of a device.
func envelopes(device string, first, last int) (out []identity.Envelope) {
	for i := first; i <= last; i++ {
		out = append(out, sign(frame(device, uint64(i), 1)))
	}
	return out
}

func jsonBatch(items ...string) []byte {
	return []byte(`{"envelopes":[` + strings.Join(items, ",\n") + "]}\n")
}

func jsonItems(es []identity.Envelope) (out []string) {
	for _, e := range es {
		out = append(out, string(asJSON(e)))
	}
	return out
}

func protoBatch(raws ...[]byte) []byte {
	var out []byte
	for _, raw := range raws {
		out = append(out, protoItem(raw)...)
	}
	return out
}

func protoItem(raw []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), raw)
}

// postMany posts to /v1/batch and returns the receipts of a 200.
func postMany(t *testing.T, h http.Handler, contentType, accept string, body []byte) (*httptest.ResponseRecorder, []*pb.Receipt) {
	t.Helper()
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, "/v1/batch", bytes.NewReader(body))
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		return w, nil
	}
	var out pb.SubmitBatchResponse
	var err error
	switch w.Header().Get("Content-Type") {
	case NDJSON:
		for line := range strings.Lines(w.Body.String()) {
			var r pb.Receipt
			if err := protojson.Unmarshal([]byte(line), &r); err != nil {
				t.Fatalf("line %q: %v", line, err)
			}
			out.Receipts = append(out.Receipts, &r)
		}
	case identity.JSON:
		err = protojson.Unmarshal(w.Body.Bytes(), &out)
	default:
		err = proto.Unmarshal(w.Body.Bytes(), &out)
	}
	if err != nil {
		t.Fatalf("receipts %q: %v", w.Body, err)
	}
	return w, out.Receipts
}

// In each of the forms, and by gRPC: what is good is stored in the order given,
// what is not has its own receipt.
func TestBatchItemByItem(t *testing.T) {
	t.Parallel()
	es := envelopes("dev0", 1, 3)
	raw := func(i int) []byte { return es[i].Marshal() }
	noSignature := es[1]
	noSignature.Signature = nil
	js := jsonItems(es)
	form := func(contentType, accept string, body []byte) func(*testing.T, *Service) []*pb.Receipt {
		return func(t *testing.T, s *Service) []*pb.Receipt {
			w, rs := postMany(t, s.Handler(), contentType, accept, body)
			if w.Code != http.StatusOK || w.Header().Get("Retry-After") != "" {
				t.Fatalf("got %d %q, Retry-After %q, want 200 without", w.Code, w.Body, w.Header().Get("Retry-After"))
			}
			return rs
		}
	}
	ok := "" // stored
	for _, x := range []struct {
		name string
		send func(*testing.T, *Service) []*pb.Receipt
		want []string
	}{
		{"JSON", form(identity.JSON, "", jsonBatch(js[0], `{"kind":"frame","colour":1}`, js[1], `17`, js[2], `{"payload":"!"}`, js[0])),
			[]string{ok, `body: Envelope: proto: (line 1:17): unknown field "colour"`, ok, "body: Envelope: proto: syntax error", ok, "body: Envelope: proto: (line 1:12): invalid value for bytes field payload", ok}},
		{"JSON, protobuf receipts", form(identity.JSON, identity.Protobuf, jsonBatch(js...)), []string{ok, ok, ok}},
		{"protobuf", form(identity.Protobuf, identity.Protobuf, protoBatch(raw(0), noSignature.Marshal(), raw(1), nil, append(raw(2), 0x32, 1, 'x'), raw(2))),
			[]string{ok, "signature: must be 64 bytes, has 0", ok, "body: must not be empty", "unknown field or type, tag 0x32", ok}},
		{"protobuf, JSON receipts", form(identity.Protobuf, "", protoBatch(raw(0), raw(1), raw(2))), []string{ok, ok, ok}},
		{"NDJSON", form(NDJSON+"; charset=utf-8", "", []byte("\n"+js[0]+"\r\n{\n\n"+js[1]+"\n"+js[2])), []string{ok, "body: Envelope: proto: unexpected EOF", ok, ok}},
		{"all refused", func(t *testing.T, s *Service) []*pb.Receipt {
			rs := form(identity.JSON, "", jsonBatch("{}", "[]"))(t, s)
			if _, more := postMany(t, s.Handler(), identity.JSON, "", jsonBatch(js...)); len(more) != 3 {
				t.Errorf("got %v, want 3 receipts", more)
			}
			return rs
		}, []string{`kind "": unknown`, "body: Envelope: proto: syntax error"}},
		{"gRPC", func(t *testing.T, s *Service) []*pb.Receipt {
			var m pb.SubmitBatchRequest
			for _, e := range []identity.Envelope{es[0], noSignature, es[1], {}, es[2]} {
				m.Envelopes = append(m.Envelopes, &pb.Envelope{Kind: string(e.Kind), ContentType: e.ContentType, KeyId: string(e.Key), Payload: e.Payload, Signature: e.Signature})
			}
			r, err := client(t, door(t, s, nil)).SubmitBatch(within(t), &m)
			if err != nil {
				t.Fatal(err)
			}
			return r.Receipts
		}, []string{ok, "signature: must be 64 bytes, has 0", ok, `kind "": unknown`, ok}},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			b := servicetest.District(t, district)
			s := running(t, b, nil)
			got := x.send(t, s)
			if len(got) != len(x.want) {
				t.Fatalf("got %d receipts, want %d: %v", len(got), len(x.want), got)
			}
			refused, stored := uint64(0), uint64(0)
			for i, r := range got {
				switch {
				case x.want[i] == ok && r.Status == pb.Receipt_STATUS_STORED && len(r.Commitment) == 32:
					stored++
				case x.want[i] != ok && r.Status == pb.Receipt_STATUS_REFUSED && strings.Contains(r.Reason, x.want[i]):
					refused++
				default:
					t.Errorf("receipt %d: got %v, want %q", i, r, x.want[i])
				}
			}
			checkOrder(t, b, 1, 3, false)
			if x.name == "all refused" {
				stored = 3
			}
			if c := s.Counts().Doors[DoorBatch]; c != (DoorCounts{Received: stored + refused, Stored: stored, Refused: refused}) {
				t.Errorf("got %+v, want %d stored, %d refused", c, stored, refused)
			}
		})
	}
}

func TestBatchAtFaultAsAWhole(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.Batch = BatchLimits{Records: 3, Bytes: 300_000} })
	js := jsonItems(envelopes("dev0", 1, 4))
	one := envelope(1)
	for _, x := range []struct {
		name, contentType   string
		body                []byte
		status              int
		rule, field, detail string
	}{
		{"too many, JSON", identity.JSON, jsonBatch(js...), 413, ReasonTooMany, "envelopes", "envelopes: more than 3"},
		{"too many, protobuf", identity.Protobuf, protoBatch(one, one, one, one), 413, ReasonTooMany, "envelopes", "more than 3"},
		{"too many, NDJSON", NDJSON, []byte(strings.Join(js, "\n")), 413, ReasonTooMany, "envelopes", "more than 3"},
		{"too large", identity.JSON, make([]byte, 300_001), 413, ReasonSize, "body", "body: more than 300000 bytes"},
		{"empty body", identity.JSON, nil, 400, ReasonEmpty, "body", "body: must not be empty"},
		{"no envelopes", identity.JSON, jsonBatch(), 400, ReasonEmpty, "envelopes", "envelopes: must not be empty"},
		{"empty lines", NDJSON, []byte("\n \r\n"), 400, ReasonEmpty, "envelopes", "envelopes: must not be empty"},
		{"no object", identity.JSON, []byte("[]"), 400, ReasonBatch, "body", `body: JSON: "[" at offset 1, want "{"`},
		{"other member", identity.JSON, []byte(`{"frames":[]}`), 400, ReasonBatch, "body", `body: JSON: "frames" at offset 9, want "envelopes"`},
		{"member twice", identity.JSON, []byte(`{"envelopes":[1],"envelopes":[2]}`), 400, ReasonBatch, "body", `"envelopes" at offset 28, want "}"`},
		{"null", identity.JSON, []byte(`{"envelopes":null}`), 400, ReasonBatch, "body", `want "["`},
		{"broken off", identity.JSON, []byte(`{"envelopes":[{}`), 400, ReasonBatch, "body", "unexpected EOF"},
		{"no JSON within", identity.JSON, []byte(`{"envelopes":[{},colour]}`), 400, ReasonBatch, "body", "body: JSON: envelope 1: invalid character"},
		{"something behind it", identity.JSON, append(jsonBatch(js[0]), '1'), 400, ReasonBatch, "body", "something follows the object"},
		{"other field", identity.Protobuf, []byte{2<<3 | 2, 1, 0}, 400, ReasonBatch, "body", "body: protobuf: offset 0: field 2 of wire type 2, must be 1"},
		{"truncated", identity.Protobuf, protoBatch(one)[:9], 400, ReasonBatch, "body", "body: protobuf: envelope 0, offset 0: unexpected EOF"},
		{"no protobuf", identity.Protobuf, []byte{0xff}, 400, ReasonBatch, "body", "body: protobuf: offset 0: unexpected EOF"},
		{"content type", "text/csv", one, 415, ReasonContentType, "Content-Type", `Content-Type: "text/csv", must be application/x-protobuf, application/json or application/x-ndjson`},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := s.Counts().Refused[x.rule]
			w, _ := postMany(t, s.Handler(), x.contentType, "", x.body)
			var p struct {
				Detail, Rule, Field string
				Status              int
			}
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
				t.Fatalf("got %q: %v", w.Body, err)
			}
			if w.Code != x.status || p.Status != x.status || p.Rule != x.rule || p.Field != x.field || !strings.Contains(p.Detail, x.detail) {
				t.Errorf("got %d %+v\nwant %d, rule %s, field %s, %s", w.Code, p, x.status, x.rule, x.field, x.detail)
			}
			if n := s.Counts().Refused[x.rule] - before; n != 1 {
				t.Errorf("got it counted %d times, want once", n)
			}
		})
	}
	r := httptest.NewRequestWithContext(within(t), http.MethodPost, "/v1/batch", struct{ io.Reader }{bytes.NewReader(make([]byte, 300_001))}) // of unknown length
	r.Header.Set("Content-Type", NDJSON)
	w := httptest.NewRecorder()
	if s.Handler().ServeHTTP(w, r); w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("too large, in pieces: got %d, want 413", w.Code)
	}
	c := client(t, door(t, s, nil))
	for n, want := range map[int]string{0: "EMPTY", 4: "TOO_MANY"} {
		_, err := c.SubmitBatch(within(t), &pb.SubmitBatchRequest{Envelopes: slices.Repeat([]*pb.Envelope{message(t, one)}, n)})
		if v := violation(err); status.Code(err) != codes.InvalidArgument || v.GetField() != "envelopes" || v.GetReason() != want {
			t.Errorf("%d by gRPC: got %v, %v, want invalid argument for envelopes, rule %s", n, err, v, want)
		}
	}
	if n := len(stream(t, b)); n != 0 {
		t.Errorf("got %d records stored, want none", n)
	}
}

// A stream that has room for some: these are stored and have receipts, the others
// are told so, and nothing behind the first of them is stored.
func TestBatchStoredInPart(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) {
		c.MaxBatch, c.StoreWait, c.Batch.Wait = 2, 20*time.Millisecond, 100*time.Millisecond
	})
	if _, rs := postMany(t, s.Handler(), identity.JSON, "", jsonBatch(jsonItems(envelopes("dev0", 1, 1))...)); len(rs) != 1 {
		t.Fatal("nothing stored")
	}
	roomFor(t, b, 2)
	body := jsonBatch(append(jsonItems(envelopes("dev0", 2, 9)), "{}")...)
	w, rs := postMany(t, s.Handler(), identity.JSON, "", body)
	if w.Code != http.StatusOK || w.Header().Get("Retry-After") != "1" || len(rs) != 9 {
		t.Fatalf("got %d %q, want 200 with Retry-After", w.Code, w.Body)
	}
	stored := 0
	for i, r := range rs[:8] {
		switch {
		case r.Status == pb.Receipt_STATUS_STORED && stored == i:
			stored++
		case r.Status == pb.Receipt_STATUS_BUSY && r.Reason != "":
		default:
			t.Errorf("receipt %d: got %v after %d stored, want them stored, then busy", i, r, stored)
		}
	}
	if rs[8].Status != pb.Receipt_STATUS_REFUSED {
		t.Errorf("got %v, want refused", rs[8])
	}
	if stored == 0 || stored == 8 {
		t.Fatalf("got %d stored, want some: the test has tested nothing", stored)
	}
	checkOrder(t, b, 1, 1+stored, false)
	roomFor(t, b, -1)
	_, again := postMany(t, s.Handler(), identity.JSON, "", body)
	for i, r := range again[:8] {
		if r.Status != pb.Receipt_STATUS_STORED || i < stored && !proto.Equal(r, rs[i]) {
			t.Errorf("again, receipt %d: got %v, want stored, and %v if it was stored before", i, r, rs[i])
		}
	}
	checkOrder(t, b, 1, 9, false)
}

// Several requests at once, each with its own device, through a small queue.
func TestBatchOrderThroughASmallQueue(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.MaxBatch, c.MaxPending = 5, 20 })
	c := client(t, door(t, s, nil))
	const devices, n = 4, 60
	done := make(chan struct{})
	for d := range devices {
		go func() {
			defer func() { done <- struct{}{} }()
			var m pb.SubmitBatchRequest
			for _, e := range envelopes(fmt.Sprint("dev", d), 1, n) {
				m.Envelopes = append(m.Envelopes, message(t, e.Marshal()))
			}
			r, err := c.SubmitBatch(within(t), &m)
			if err != nil {
				t.Error(err)
				return
			}
			for i, r := range r.Receipts {
				if r.Status != pb.Receipt_STATUS_STORED {
					t.Errorf("dev%d %d: got %v, want stored", d, i+1, r)
				}
			}
		}()
	}
	for range devices {
		<-done
	}
	checkOrder(t, b, devices, n, false)
	if k := s.Counts(); k.Busy[ReasonQueueFull] == 0 {
		t.Errorf("got %+v, want busy answers: the test has tested nothing", k)
	}
}

func TestBatchCancelInTheMiddle(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.StoreWait, c.Batch.Wait = 20*time.Millisecond, time.Minute })
	storing(t, b, false)
	ctx, cancel := context.WithCancel(within(t))
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/v1/batch", bytes.NewReader(jsonBatch(jsonItems(envelopes("dev0", 1, 5))...)))
	r.Header.Set("Content-Type", identity.JSON)
	done := make(chan struct{})
	w := httptest.NewRecorder()
	go func() {
		defer close(done)
		s.Handler().ServeHTTP(w, r)
	}()
	until(t, "busy answers", func() bool { return s.Counts().Doors[DoorBatch].Busy > 0 })
	cancel()
	<-done
	if w.Body.Len() != 0 {
		t.Errorf("got %q, want nothing said", w.Body)
	}
	until(t, "all answered", func() bool { return s.Counts().Pending == 0 })
	storing(t, b, true)
	if n := len(s.batches); n != 0 {
		t.Errorf("got %d requests in hand, want none", n)
	}
}

func TestTooManyBatches(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	s := running(t, b, func(c *Config) { c.Batch.Requests = 1 })
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	body, slow := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		r, err := http.Post(server.URL+"/v1/batch", identity.JSON, body)
		if err != nil {
			t.Error(err)
			return
		}
		if err := r.Body.Close(); err != nil {
			t.Error(err)
		}
		if r.StatusCode != http.StatusOK {
			t.Errorf("the slow one: got %s, want 200", r.Status)
		}
	}()
	until(t, "one in hand", func() bool { return len(s.batches) == 1 })
	w, _ := postMany(t, s.Handler(), identity.JSON, "", jsonBatch("{}"))
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), ReasonBatches) {
		t.Errorf("got %d %q, want 429", w.Code, w.Body)
	}
	if n := s.Counts().Busy[ReasonBatches]; n != 1 {
		t.Errorf("got %d counted, want 1", n)
	}
	if _, err := slow.Write(jsonBatch(jsonItems(envelopes("dev0", 1, 2))...)); err != nil {
		t.Error(err)
	}
	if err := slow.Close(); err != nil {
		t.Error(err)
	}
	<-done
	checkOrder(t, b, 1, 2, false)
}

func TestBatchLimits(t *testing.T) {
	t.Parallel()
	_, err := New(Config{District: district, Bus: &bus.Bus{}, Batch: BatchLimits{Records: -1, Bytes: 100, Requests: 1 << 20, Wait: time.Hour}})
	for _, want := range []string{"Batch.Records: -1, must be 1 to", "Batch.Bytes: 100, must be 262208 to", "Batch.Requests: 1048576", "Batch.Wait: 3600000000000"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %s", err, want)
		}
	}
}

// Whatever splits must split as the usual decoders do.
func FuzzSplit(f *testing.F) {
	f.Add(jsonBatch(jsonItems(envelopes("dev0", 1, 2))...))
	f.Add([]byte(`{"envelopes":[null, 1, "x", [{}]]} `))
	f.Add(protoItem(envelope(1)))
	f.Add([]byte{0x0a, 0, 0x0a, 0x80, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		const enough = 1000
		if raws, err := splitJSON(body, enough); err == nil && len(raws) < enough {
			var want struct {
				Envelopes []json.RawMessage `json:"envelopes"`
			}
			if err := json.Unmarshal(body, &want); err != nil {
				t.Fatalf("got %d items of what is no JSON: %v", len(raws), err)
			}
			if !slices.EqualFunc(raws, want.Envelopes, func(a []byte, b json.RawMessage) bool { return bytes.Equal(a, b) }) {
				t.Errorf("got %q, want %q", raws, want.Envelopes)
			}
		}
		raws, err := splitProto(body, enough)
		var want pb.SubmitBatchRequest
		if wantErr := proto.Unmarshal(body, &want); err == nil && wantErr == nil && len(raws) < enough && len(raws) != len(want.Envelopes) {
			t.Errorf("got %d items, want %d", len(raws), len(want.Envelopes))
		} else if wantErr == nil && err != nil && len(want.ProtoReflect().GetUnknown()) == 0 {
			t.Errorf("got %v of what can be decoded", err)
		}
	})
}
