package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	rpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// apiWorld is an API on real NATS, with a district of its own, an ingest that
// takes everything and says at once that it is agreed, and an audit that the test
// writes.
type apiWorld struct {
	t   testing.TB
	d   *district.District
	bus *bus.Bus
	g   *Gateway
	api *API

	mu     sync.Mutex
	sealed []*traffic.Access // what ingest was brought, in order
	hashes map[ledger.Hash]bool
	refuse string // why ingest refuses; empty: it does not
	silent bool   // nothing is agreed
	end    func() error
}

// apiOptions changes a world before it runs.
type apiOptions struct {
	bus     *bus.Bus // nil: a new one with all streams
	entries map[string]identity.Client
	edit    func(*APIConfig)
	audit   http.Handler
	now     func() time.Time
	// quick tests run with -short too.
	quick bool
}

func newAPIWorld(t testing.TB, o apiOptions) *apiWorld {
	t.Helper()
	if testing.Short() && !o.quick {
		t.Skip("starts NATS and an API; with -short only two do")
	}
	first := ledgertest.New("gateway", 4)
	reg, err := identity.NewRegistry(&first.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	d, err := district.Open(t.TempDir(), district.Options{ID: "harbour", Junctions: reg.Junctions(), Created: time.Now(), PolicyName: "default",
		Policy: identity.Policy{Version: "1", Controller: "fixed 1", Rules: "field"}})
	if err != nil {
		t.Fatal(err)
	}
	genesis := d.Genesis
	genesis.Entries = append([]identity.Entry(nil), genesis.Entries...)
	for id, c := range o.entries {
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		genesis.Entries = append(genesis.Entries, identity.Entry{Type: identity.TypeClient, ID: id, Status: identity.Active, Body: b})
	}
	state, err := agreed.Open("", &genesis)
	if err != nil {
		t.Fatal(err)
	}
	w := &apiWorld{t: t, d: d, bus: o.bus, hashes: map[ledger.Hash]bool{}}
	if w.bus == nil {
		w.bus = servicetest.District(t, genesis.District)
	}
	key, err := d.Key(district.GatewayKey)
	if err != nil {
		t.Fatal(err)
	}
	c := APIConfig{Listen: "127.0.0.1:0", Insecure: true, Name: district.GatewayKey, Key: key, Policy: d.Policy, Drain: 3 * time.Second}
	if o.edit != nil {
		o.edit(&c)
	}
	w.g, err = New(Config{Bus: w.bus, District: genesis.District, State: state, Now: o.now, Logger: servicetest.Logger(t), API: &c,
		Follow: decided.Config{Bus: w.bus, District: genesis.District, GenesisHash: d.GenesisHash, Validators: reg.Validators()}})
	if err != nil {
		t.Fatal(err)
	}
	w.api = w.g.API()
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	stop, err := w.bus.Listen(topic.InboxAll(genesis.District), "", w.ingest)
	if err != nil {
		t.Fatal(err)
	}
	if o.audit != nil {
		group.Go(func() {
			if err := w.bus.ServeHTTP(ctx, topic.Ask(genesis.District, topic.AuditUser, "http"), "audit", 256, o.audit); err != nil {
				t.Error(err)
			}
		})
	}
	ended := make(chan error, 1)
	go func() { ended <- w.api.Run(ctx) }()
	w.end = sync.OnceValue(func() error {
		cancel()
		err := <-ended
		group.Wait()
		stop()
		return err
	})
	t.Cleanup(func() {
		if err := w.end(); err != nil {
			t.Errorf("the API ended: %v", err)
		}
	})
	return w
}

// ready waits until readings can be put on record.
func (w *apiWorld) ready() *apiWorld {
	w.t.Helper()
	select {
	case <-w.api.recorder.Ready():
	case <-time.After(20 * time.Second):
		w.t.Fatal("the recorder does not start")
	}
	return w
}

func (w *apiWorld) ingest(m *nats.Msg) {
	w.mu.Lock()
	defer w.mu.Unlock()
	salt, err := hex.DecodeString(m.Header.Get(bus.HeaderSalt))
	if err != nil || len(salt) != 32 {
		w.t.Errorf("ingest got the salt %q, want 64 hex digits", m.Header.Get(bus.HeaderSalt))
		return
	}
	h := ledger.Commit(ledger.Salt(salt), m.Data)
	r := &pb.Receipt{Status: pb.Receipt_STATUS_STORED, Commitment: h[:], Salt: salt}
	if w.refuse != "" {
		r = &pb.Receipt{Status: pb.Receipt_STATUS_REFUSED, Reason: w.refuse}
	} else if !w.hashes[h] {
		w.hashes[h] = true
		c := wire.Candidate(m.Data, salt)
		if c.Err != nil {
			w.t.Errorf("ingest got a record that cannot be read: %v", c.Err)
			return
		}
		if c.Access != nil { // not what somebody asks the street for
			w.sealed = append(w.sealed, c.Access)
		}
		if !w.silent {
			w.api.recorder.Decided(h, uint64(len(w.sealed)))
		}
	}
	b, err := proto.Marshal(r)
	if err != nil {
		w.t.Error(err)
		return
	}
	if err := m.Respond(b); err != nil {
		w.t.Error(err)
	}
}

// have returns what ingest has of a method, once it is so many.
func (w *apiWorld) have(method string, n int) []*traffic.Access {
	w.t.Helper()
	var out []*traffic.Access
	wait(w.t, fmt.Sprintf("%d records of %s", n, method), func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		out = nil
		for _, a := range w.sealed {
			if strings.HasSuffix(a.Method, "/"+method) {
				out = append(out, a)
			}
		}
		return len(out) >= n
	})
	return out
}

// token makes one of a client of the district.
func (w *apiWorld) token(client string) string {
	w.t.Helper()
	key, err := w.d.Key(district.ClientKey(client))
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := NewToken(w.d.Genesis.District, client, key, w.api.now(), time.Minute, "")
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// who is a call's metadata.
func (w *apiWorld) who(client, purpose string, more ...string) http.Header {
	h := http.Header{}
	if client != "" {
		h.Set("Authorization", "Bearer "+w.token(client))
	}
	if purpose != "" {
		h.Set(headerPurpose, purpose)
	}
	for i := 0; i+1 < len(more); i += 2 {
		h.Set(more[i], more[i+1])
	}
	return h
}

// rest calls by HTTP.
func (w *apiWorld) rest(method, path string, h http.Header, body string) (*http.Response, []byte) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, "http://"+w.api.Addr()+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header = h
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res, b
}

// problem calls by HTTP and wants a problem document of a status.
func (w *apiWorld) problem(want int, method, path string, h http.Header, body string) (problem, *http.Response) {
	w.t.Helper()
	res, b := w.rest(method, path, h, body)
	var p problem
	if err := json.Unmarshal(b, &p); err != nil || res.StatusCode != want || res.Header.Get("Content-Type") != "application/problem+json" {
		w.t.Fatalf("%s %s: got %s with %q and %s, want a problem document with status %d", method, path, res.Status, res.Header.Get("Content-Type"), b, want)
	}
	if p.Status != want || p.Type == "" || p.Title == "" || p.Detail == "" {
		w.t.Errorf("%s %s: got %+v, want type, title, detail and status %d", method, path, p, want)
	}
	return p, res
}

// conn is a gRPC connection to the API's address.
func (w *apiWorld) conn(creds credentials.TransportCredentials) *grpc.ClientConn {
	w.t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	c, err := grpc.NewClient(w.api.Addr(), grpc.WithTransportCredentials(creds))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// as adds a call's metadata.
func as(ctx context.Context, h http.Header) context.Context {
	for k, v := range h {
		ctx = metadata.AppendToOutgoingContext(ctx, strings.ToLower(k), v[0])
	}
	return ctx
}

// frame has the gateway see a frame of J1.
func (w *apiWorld) frame(seq uint64, state traffic.State) {
	w.t.Helper()
	g := w.g
	g.mu.Lock()
	defer g.mu.Unlock()
	now := w.api.now()
	g.note(g.cfg.State.Registry(), &traffic.Frame{District: "harbour", Junction: ledgertest.Junction, FrameKey: traffic.FrameKey{Device: "d", BootEpoch: 1, Seq: seq},
		Time: now, Interval: time.Second, Signal: traffic.Signal{State: state, Stage: -1, Mode: traffic.Local}}, seq, now, now, seq)
	g.changed()
}

// receiptOf reads a receipt and checks its signature.
func (w *apiWorld) receiptOf(text string) ledger.Hash {
	w.t.Helper()
	b, err := base64.StdEncoding.DecodeString(text)
	var r pb.AccessReceipt
	if err == nil {
		err = proto.Unmarshal(b, &r)
	}
	if err != nil || len(r.Commitment) != 32 {
		w.t.Fatalf("receipt %q: %v, want an AccessReceipt in base64", text, err)
	}
	p := Promise{Commitment: ledger.Hash(r.Commitment), At: time.Unix(0, r.TimeUnixNano)}
	h, ok := w.api.registry().Holder(identity.KeyID(r.KeyId))
	if !ok || h.ID != district.GatewayKey || !ed25519.Verify(h.Key, ReceiptInput("harbour", p), r.Signature) {
		w.t.Fatalf("receipt %v: is not signed by the gateway's key in the registry", &r)
	}
	p.At = p.At.Add(1)
	if ed25519.Verify(h.Key, ReceiptInput("harbour", p), r.Signature) {
		w.t.Fatal("the receipt's signature does not cover its time")
	}
	return p.Commitment
}

const statePath = "/v1/junctions/J1/state"

// An answered call has a receipt, and the receipt's commitment is what ingest was
// given; a call that was denied too. REST and gRPC are the same.
func TestAnswersAndTheirReceipts(t *testing.T) {
	w := newAPIWorld(t, apiOptions{quick: true}).ready()
	w.frame(1, "rrrr")
	res, b := w.rest("GET", statePath+"?readMask=junction,state", w.who("operator-1", "operations"), "")
	if res.StatusCode != http.StatusOK || !strings.Contains(string(b), `"state":"rrrr"`) || strings.Contains(string(b), "vehicles") {
		t.Errorf("got %s %s, want the junction and its state, and nothing else", res.Status, b)
	}
	granted := w.receiptOf(res.Header.Get(HeaderReceipt))
	p, res := w.problem(http.StatusForbidden, "GET", statePath, w.who("police-1", "operations"), "")
	denied := w.receiptOf(res.Header.Get(HeaderReceipt))
	if p.Type != "urn:stopline:problem:policy" || p.Instance != statePath {
		t.Errorf("got %+v, want a policy problem at %s", p, statePath)
	}
	var md metadata.MD
	c := pb.NewTrafficServiceClient(w.conn(nil))
	got, err := c.ListJunctionStates(as(t.Context(), w.who("operator-1", "operations")), &pb.ListJunctionStatesRequest{}, grpc.Header(&md))
	if err != nil || len(got.States) != 1 {
		t.Fatalf("gRPC: got %v, %v, want the state of one junction", got, err)
	}
	third := w.receiptOf(first(md, HeaderReceipt))
	wait(t, "all three are with ingest", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.hashes[granted] && w.hashes[denied] && w.hashes[third]
	})
	as := w.have("GetJunctionState", 2)
	for i, want := range []traffic.Access{
		{By: traffic.Agent{Agency: "roads", Name: "operator-1"}, Granted: true, Phase: traffic.AccessCounted},
		{By: traffic.Agent{Agency: "police", Name: "police-1"}, Phase: traffic.AccessUnary},
	} {
		if a := as[i]; a.By != want.By || a.Granted != want.Granted || a.Phase != want.Phase || a.Count != 1 || len(a.Objects) != 1 || a.Objects[0] != "junction:J1" || a.Purpose != "operations" {
			t.Errorf("record %d: got %+v, want %+v about junction:J1", i, a, want)
		}
	}
	if as[0].Turn.Seq+1 != as[1].Turn.Seq || as[0].Turn.Epoch != as[1].Turn.Epoch || as[0].Turn.Epoch == 0 {
		t.Errorf("turns %+v and %+v, want them to follow one another", as[0].Turn, as[1].Turn)
	}
}

// Problem documents name the field and the rule.
func TestProblems(t *testing.T) {
	w := newAPIWorld(t, apiOptions{quick: true}).ready()
	op := w.who("operator-1", "operations")
	for _, tc := range []struct {
		name, method, path, body string
		h                        http.Header
		status                   int
		field, rule              string
	}{
		{"rule of a field", "GET", "/v1/states?pageSize=5000", "", op, 400, "page_size", "int32.gte_lte"},
		{"unknown parameter", "GET", "/v1/states?size=5", "", op, 400, "size", "unknown"},
		{"no number", "GET", "/v1/states?pageSize=x", "", op, 400, "", ""},
		{"mask", "GET", statePath + "?readMask=secret", "", op, 400, "read_mask", "unknown"},
		{"token of another request", "GET", "/v1/states?pageToken=" + nextPage(&pb.ListEntriesRequest{}, "x"), "", op, 400, "page_token", "other-request"},
		{"token that is none", "GET", "/v1/states?pageToken=%21", "", op, 400, "page_token", "other-request"},
		{"time", "GET", "/v1/junctions/J1/history?startTime=2026-01-02T00:00:00Z&endTime=2026-01-01T00:00:00Z", "", op, 400, "end_time", "after"},
		{"span", "GET", "/v1/junctions/J1/history?startTime=2026-01-02T00:00:00Z&endTime=2026-02-01T00:00:00Z", "", op, 400, "end_time", "span"},
		{"required", "GET", "/v1/junctions/J1/history?endTime=2026-01-01T00:00:00Z", "", op, 400, "start_time", "required"},
		{"unknown field", "POST", "/v1/exports", `{"filter":{},"granted":true}`, w.who("police-1", "investigation"), 400, "granted", "unknown"},
		{"no JSON", "POST", "/v1/exports", `{`, w.who("police-1", "investigation"), 400, "", ""},
		{"covert days", "GET", "/v1/states", "", w.who("operator-1", "operations", headerCovert, "0"), 400, headerCovert, "range"},
		{"not there", "GET", "/v1/junctions/J9/state", "", op, 404, "", ""},
		{"no method", "GET", "/v1/nothing", "", op, 404, "", ""},
		{"other verb", "DELETE", "/v1/states", "", op, 405, "", ""},
		{"no POST for GET", "POST", "/v1/states", "pageSize=1", w.who("operator-1", "operations", "Content-Type", "application/x-www-form-urlencoded"), 405, "", ""},
		{"nobody", "GET", "/v1/states", "", nil, 401, "", ""},
		{"no purpose", "GET", "/v1/states", "", w.who("operator-1", ""), 403, "", ""},
		{"covert where it may not be", "GET", "/v1/states", "", w.who("operator-1", "operations", headerCovert, "1"), 403, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer func(was testing.TB) { w.t = was }(w.t)
			w.t = t
			p, res := w.problem(tc.status, tc.method, tc.path, tc.h, tc.body)
			if tc.field != "" && (len(p.Errors) != 1 || p.Errors[0].Field != tc.field || p.Errors[0].Rule != tc.rule || p.Errors[0].Detail == "") {
				t.Errorf("got the errors %+v, want field %q and rule %q", p.Errors, tc.field, tc.rule)
			}
			if tc.status == 401 && res.Header.Get("WWW-Authenticate") == "" {
				t.Error("401 without WWW-Authenticate")
			}
		})
	}
}

// What only the gateway may say is refused in a request, or overwritten.
func TestMassAssignment(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	for _, body := range []string{
		`{"filter":{}, "approval":"", "approvedBy":"police-2"}`, `{"filter":{"agency":"x"}}`, `{"filter":{},"covertUntilUnixNano":"1"}`,
	} {
		if p, _ := w.problem(400, "POST", "/v1/exports", w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant"), body); len(p.Errors) != 1 || p.Errors[0].Rule != "unknown" {
			t.Errorf("%s: got %+v, want the unknown field refused", body, p)
		}
	}
	// Headers that only our own REST door may send.
	for _, h := range []http.Header{
		{"Stopline-Inner": {"x"}, "Stopline-Inner-Certificate": {"00"}},
		{"Grpc-Metadata-Stopline-Inner": {w.api.guard.Inner}, "Grpc-Metadata-Stopline-Inner-Certificate": {"00"}},
	} {
		w.problem(401, "GET", "/v1/states", h, "")
	}
	// By gRPC they do reach the guard, and the secret is not known.
	ctx := metadata.AppendToOutgoingContext(t.Context(), headerInner, "guess", headerCert, "00")
	if _, err := pb.NewTrafficServiceClient(w.conn(nil)).ListJunctionStates(ctx, &pb.ListJunctionStatesRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a guessed inner secret: got %v, want Unauthenticated", err)
	}
}

func TestBodySize(t *testing.T) {
	w := newAPIWorld(t, apiOptions{edit: func(c *APIConfig) { c.MaxBody = 1000 }}).ready()
	big := `{"filter":{"device":"` + strings.Repeat("x", 2000) + `"}}`
	h := w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant")
	if p, _ := w.problem(413, "POST", "/v1/exports", h, big); p.Type != "urn:stopline:problem:too-large" {
		t.Errorf("got %+v, want too-large", p)
	}
	// Without a length, as a stream of chunks.
	req, err := http.NewRequest("POST", "http://"+w.api.Addr()+"/v1/exports", io.MultiReader(strings.NewReader(big)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = h
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != 413 {
		t.Errorf("chunks: got %s, want 413", res.Status)
	}
	_, err = pb.NewEvidenceServiceClient(w.conn(nil)).ApproveExport(as(t.Context(), h), &pb.ApproveExportRequest{Filter: &pb.RecordFilter{}, Requester: strings.Repeat("x", 2000)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("gRPC: got %v, want ResourceExhausted", err)
	}
	// A bundle may be larger.
	if res, b := w.rest("POST", verifyPath, nil, `{"bundle":"`+base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("x"), 5000))+`"}`); res.StatusCode != 200 || !strings.Contains(string(b), `"verified":false`) {
		t.Errorf("a bundle of 5000 bytes: got %s %s, want it looked at and not verified", res.Status, b)
	}
}

// stream reads lines of a stream until f is content.
func (w *apiWorld) stream(path string, h http.Header, f func(line string) bool) *http.Response {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+w.api.Addr()+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header = h
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	for s := bufio.NewScanner(res.Body); s.Scan(); {
		if f(s.Text()) {
			return res
		}
	}
	w.t.Fatalf("%s: %s, and the stream has ended before it said what it should", path, res.Status)
	return nil
}

// Streams are server-sent events or lines; they are on record when they open and
// when they close, with the number of their messages.
func TestStreams(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	w.frame(1, "rrrr")
	for accept, prefix := range map[string]string{"text/event-stream": "data: {", "application/json": "{"} {
		n := 0
		contentType := map[string]string{"data: {": "text/event-stream", "{": "application/x-ndjson"}[prefix]
		res := w.stream("/v1/states:watch?interval=0.05s", w.who("operator-1", "operations", "Accept", accept), func(line string) bool {
			if line == "" {
				return false
			}
			if !strings.HasPrefix(line, prefix) {
				t.Errorf("%s: got the line %q, want it to begin with %q", accept, line, prefix)
			}
			n++
			w.frame(uint64(n)+1, "GGGG")
			return n == 3
		})
		if got := res.Header.Get("Content-Type"); got != contentType || res.Header.Get(HeaderReceipt) == "" {
			t.Errorf("%s: got content type %q and receipt %q, want %s and one", accept, got, res.Header.Get(HeaderReceipt), contentType)
		}
	}
	as := w.have("WatchJunctionStates", 4)
	opened, closed := 0, 0
	for _, a := range as {
		switch a.Phase {
		case traffic.AccessOpened:
			opened++
		case traffic.AccessClosed:
			if closed++; a.Count < 3 {
				t.Errorf("closed after %d messages, want 3 or more", a.Count)
			}
		}
	}
	if opened != 2 || closed != 2 {
		t.Errorf("%d opened, %d closed, want two each", opened, closed)
	}
	// Refused before it begins: a problem, whatever the client would have streamed.
	for _, accept := range []string{"text/event-stream", "application/json"} {
		w.problem(403, "GET", "/v1/states:watch", w.who("police-1", "operations", "Accept", accept), "")
		w.problem(401, "GET", "/v1/states:watch", http.Header{"Accept": {accept}}, "")
		w.problem(404, "GET", "/v1/states:watch?junctions=J9", w.who("operator-1", "operations", "Accept", accept), "")
	}
}

// A stream that is open when the gateway ends is told why, and its end is on
// record before ingest goes.
func TestDrain(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	w.frame(1, "rrrr")
	c := pb.NewTrafficServiceClient(w.conn(nil))
	s, err := c.WatchJunctionStates(as(t.Context(), w.who("operator-1", "operations")), &pb.WatchJunctionStatesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ListJunctionStates(as(t.Context(), w.who("operator-1", "operations")), &pb.ListJunctionStatesRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ListJunctionStates(as(t.Context(), w.who("operator-1", "operations")), &pb.ListJunctionStatesRequest{}); err != nil {
		t.Fatal(err)
	}
	w.api.Drain()
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "come again") {
		t.Errorf("the stream ended with %v, want Unavailable, come again", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	phases := map[string]uint64{}
	for _, a := range w.sealed {
		phases[a.Phase] += a.Count
	}
	// Two counted calls: one by itself, and the count of the rest.
	if phases[traffic.AccessOpened] != 1 || phases[traffic.AccessClosed] == 0 || phases[traffic.AccessCounted] != 2 {
		t.Errorf("ingest has %v after the drain, want the stream opened and closed, and two counted calls", phases)
	}
}

// gRPC tells what it is, to anybody, and nothing else without credentials.
func TestReflection(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	s, err := rpb.NewServerReflectionClient(w.conn(nil)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&rpb.ServerReflectionRequest{MessageRequest: &rpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	names := ""
	for _, n := range r.GetListServicesResponse().GetService() {
		names += n.Name + " "
	}
	for _, want := range []string{"Traffic", "Priority", "Evidence", "Registry", "Device", "Access", "Log"} {
		if !strings.Contains(names, "stopline.v1."+want+"Service ") {
			t.Errorf("services are %s, want %sService among them", names, want)
		}
	}
}

func TestDocs(t *testing.T) {
	w := newAPIWorld(t, apiOptions{})
	for path, want := range map[string]string{"/openapi.json": `"/v1/states"`, "/docs/": "docs.js", "/docs/docs.js": "fetch(", "/docs/docs.css": "font"} {
		res, b := w.rest("GET", path, nil, "")
		if res.StatusCode != 200 || !strings.Contains(string(b), want) {
			t.Errorf("%s: got %s, want it with %s", path, res.Status, want)
		}
		if csp := res.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") {
			t.Errorf("%s: Content-Security-Policy %q, want nothing from elsewhere", path, csp)
		}
	}
	// Every method of the contract is one that the guard knows, and the page's
	// handler serves it beside its own.
	rec := httptest.NewRecorder()
	w.g.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/v1/states", nil))
	if rec.Code != 401 {
		t.Errorf("/v1/states at the page: got %d, want 401 of the API", rec.Code)
	}
	rec = httptest.NewRecorder()
	w.g.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/v1/state", nil))
	if rec.Code != 200 || !strings.Contains(rec.Body.String(), `"junctions"`) {
		t.Errorf("/v1/state at the page: got %d, want the page's view", rec.Code)
	}
}
