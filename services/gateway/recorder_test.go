package gateway

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// Without a place to put readings on record nothing is answered; with one again
// it is, without a restart. What is public is answered all the same.
func TestNoRecordNoAnswer(t *testing.T) {
	b := servicetest.Connect(t, servicetest.NATS(t)) // without streams
	w := newAPIWorld(t, apiOptions{bus: b})
	w.frame(1, "rrrr")
	op := w.who("operator-1", "operations")
	p, res := w.problem(503, "GET", statePath, op, "")
	if p.Type != "urn:stopline:problem:not-on-record" || res.Header.Get("Retry-After") == "" || res.Header.Get(HeaderReceipt) != "" {
		t.Errorf("got %+v, Retry-After %q and receipt %q, want no record, a time to come again, no receipt", p, res.Header.Get("Retry-After"), res.Header.Get(HeaderReceipt))
	}
	c := pb.NewTrafficServiceClient(w.conn(nil))
	if _, err := c.ListJunctionStates(as(t.Context(), op), &pb.ListJunctionStatesRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("gRPC: got %v, want Unavailable", err)
	}
	s, err := c.WatchJunctionStates(as(t.Context(), op), &pb.WatchJunctionStatesRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a stream: got %v, want Unavailable", err)
	}
	// A denial tells nothing, and is no answer either.
	w.problem(503, "GET", statePath, w.who("police-1", "operations"), "")
	if res, _ := w.rest("GET", "/v1/network", nil, ""); res.StatusCode != 200 {
		t.Errorf("what is public: got %s, want 200", res.Status)
	}
	if n := w.api.guard.Counts(); n.Unrecorded != 4 {
		t.Errorf("%d unrecorded, want 4", n.Unrecorded)
	}
	if err := b.Declare(t.Context(), topic.Streams("harbour")); err != nil {
		t.Fatal(err)
	}
	w.ready()
	if res, body := w.rest("GET", statePath, op, ""); res.StatusCode != 200 {
		t.Errorf("with the stream: got %s %s, want 200", res.Status, body)
	}
}

// A stream that goes while the gateway runs: no answers from then on.
func TestRecordsFailLater(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	w.frame(1, "rrrr")
	if res, b := w.rest("GET", "/v1/entries", w.who("operator-1", "operations"), ""); res.StatusCode != 200 {
		t.Fatalf("got %s %s, want 200", res.Status, b)
	}
	if err := w.bus.JS.DeleteStream(t.Context(), topic.AccessStream); err != nil {
		t.Fatal(err)
	}
	w.problem(503, "GET", "/v1/entries", w.who("operator-1", "operations"), "")
	if n := w.api.recorder.Counts(); n.Failed != 1 || n.Recorded == 0 {
		t.Errorf("got %+v, want one failed", n)
	}
}

// Evidence waits until the record of its reading is agreed.
func TestEvidenceWaits(t *testing.T) {
	asked := make(chan struct{}, 8)
	audit := http.NewServeMux()
	audit.HandleFunc("GET /record/{index}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"index":17,"kind":"frame","junction":"J1"}`))
	})
	audit.HandleFunc("GET /v1/bundle", func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		_, _ = w.Write([]byte("zip"))
	})
	w := newAPIWorld(t, apiOptions{audit: audit, edit: func(c *APIConfig) { c.Timeout = 1500 * time.Millisecond }}).ready()
	h := w.who("police-1", "investigation", headerCase, "K-1", headerBasis, "warrant")
	w.mu.Lock()
	w.silent = true
	w.mu.Unlock()
	p, res := w.problem(503, "GET", "/v1/bundles/17", h, "")
	if p.Type != "urn:stopline:problem:not-on-record" || !strings.Contains(p.Detail, "not agreed") {
		t.Errorf("got %+v, want that it is not agreed", p)
	}
	// It is on record though, and that is promised.
	if got := w.have("GetBundle", 1); !got[0].Granted || got[0].Case != "K-1" || got[0].Objects[0] != "record:17" {
		t.Errorf("on record is %+v, want a granted reading of record:17 for K-1", got[0])
	}
	_ = res
	if len(asked) != 0 {
		t.Error("audit was asked for the evidence before the reading was agreed")
	}
	w.mu.Lock()
	w.silent = false
	w.mu.Unlock()
	res, b := w.rest("GET", "/v1/bundles/17", h, "")
	if res.StatusCode != 200 || string(b) != "zip" || res.Header.Get("Content-Type") != "application/zip" || res.Header.Get("Content-Disposition") != `attachment; filename="evidence-17.zip"` {
		t.Errorf("agreed: got %s %q %v, want the bundle as a file", res.Status, b, res.Header)
	}
	w.receiptOf(res.Header.Get(HeaderReceipt))
	// Nobody waits for what nobody will answer: a denial is at once.
	w.mu.Lock()
	w.silent = true
	w.mu.Unlock()
	w.problem(403, "GET", "/v1/bundles/17", w.who("transit-desk-1", "operations"), "")
}

// Calls that are counted leave one record at once and one with the number of the
// rest.
func TestCountedCalls(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	w.frame(1, "rrrr")
	op, viewer := w.who("operator-1", "operations"), w.who("engineer-1", "planning")
	for range 7 {
		if res, b := w.rest("GET", statePath, op, ""); res.StatusCode != 200 {
			t.Fatalf("got %s %s", res.Status, b)
		}
	}
	w.rest("GET", statePath, viewer, "")
	for range 3 { // a denial is never summed
		w.problem(403, "GET", statePath, w.who("police-1", "operations"), "")
	}
	w.api.Drain()
	by := map[string][]uint64{}
	for _, a := range w.have("GetJunctionState", 6) {
		by[a.By.Name+" "+a.Phase] = append(by[a.By.Name+" "+a.Phase], a.Count)
	}
	want := map[string][]uint64{"operator-1 counted": {1, 6}, "engineer-1 counted": {1}, "police-1 unary": {1, 1, 1}}
	for k, v := range want {
		if len(by[k]) != len(v) || by[k][len(v)-1] != v[len(v)-1] {
			t.Errorf("%s: got the counts %v, want %v", k, by[k], v)
		}
	}
	if len(by) != len(want) {
		t.Errorf("got %v, want %v", by, want)
	}
}

// recorderOn is a recorder by itself.
func recorderOn(t *testing.T, b *bus.Bus, w *apiWorld) *Recorder {
	t.Helper()
	r, err := NewRecorder(RecorderConfig{Bus: b, District: "harbour", Name: "gateway", Key: w.api.key(), Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func record(t *testing.T, r *Recorder, n int) (out []ledger.Hash) {
	t.Helper()
	for range n {
		p, err := r.Put(t.Context(), identity.KindAccess, false, encodeAccess(traffic.Access{District: "harbour", Method: "/x/Y", Count: 1, Phase: traffic.AccessUnary}))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p.Commitment)
	}
	return out
}

// What was promised while ingest was away comes to it after a restart, in order
// and once, and the next start's numbers are above all before.
func TestPromisesOutliveTheirProcess(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready() // only for its keys, and its ingest
	b := servicetest.District(t, "harbour")   // where nobody takes anything
	r := recorderOn(t, b, w)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	<-r.Ready()
	promised := record(t, r, 20)
	// They have been handed out, and nobody has acknowledged them.
	wait(t, "the forwarder has them in hand", func() bool {
		c, err := b.JS.Consumer(t.Context(), topic.AccessStream, "gateway")
		return err == nil && c.CachedInfo().NumAckPending > 0 && c.CachedInfo().NumPending == 0
	})
	first := r.epoch
	cancel() // as a crash would: nothing is flushed
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := r.Counts(); n.Recorded != 20 || n.Forwarded != 0 {
		t.Fatalf("got %+v, want 20 on record and none with ingest", n)
	}
	if _, err := r.Put(t.Context(), identity.KindAccess, false, encodeAccess(traffic.Access{})); kind.Of(err) != kind.Unavailable {
		t.Errorf("after the end: got %v, want Unavailable", err)
	}

	stop, err := b.Listen(topic.InboxAll("harbour"), "", w.ingest)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	next := recorderOn(t, b, w)
	ctx2, cancel2 := context.WithCancel(t.Context())
	defer cancel2()
	go func() { done <- next.Run(ctx2) }()
	<-next.Ready()
	if next.epoch <= first {
		t.Errorf("epoch %d after %d, want it to rise", next.epoch, first)
	}
	promised = append(promised, record(t, next, 5)...)
	flush, done2 := context.WithTimeout(t.Context(), 20*time.Second)
	defer done2()
	next.Flush(flush)
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, h := range promised {
		if !w.hashes[h] {
			t.Errorf("promise %d did not come to ingest", i)
		}
	}
	last := traffic.Turn{}
	for _, a := range w.sealed {
		if a.Turn.Epoch < last.Epoch || a.Turn.Epoch == last.Epoch && a.Turn.Seq != last.Seq+1 {
			t.Errorf("turn %+v after %+v", a.Turn, last)
		}
		last = a.Turn
	}
	if len(w.sealed) != 25 {
		t.Errorf("ingest has %d records, want 25", len(w.sealed))
	}
	cancel2()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A record that ingest refuses for good is a broken promise: it is counted, and
// holds up nothing behind it.
func TestBrokenPromise(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	w.mu.Lock()
	w.refuse = "too-large"
	w.mu.Unlock()
	if res, _ := w.rest("GET", "/v1/entries", w.who("operator-1", "operations"), ""); res.StatusCode != 200 {
		t.Fatalf("got %s, want 200", res.Status)
	}
	wait(t, "the refusal counted", func() bool { return w.api.recorder.Counts().Refused == 1 })
	w.mu.Lock()
	w.refuse = ""
	w.mu.Unlock()
	w.rest("GET", "/v1/entries", w.who("operator-1", "operations"), "")
	w.have("ListEntries", 1)
}

// While ingest has taken nothing for too long no more is promised.
func TestLaggingRecorderPromisesNothing(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	r := recorderOn(t, servicetest.District(t, "harbour"), w)
	r.epoch = 1
	r.lagging = "ingest has taken no reading for 21m0s"
	if _, err := r.Put(t.Context(), identity.KindAccess, false, encodeAccess(traffic.Access{})); kind.Of(err) != kind.Unavailable || !strings.Contains(err.Error(), "21m") {
		t.Errorf("got %v, want Unavailable because of the lag", err)
	}
	r.lagging = ""
	r.queue = make([]*recording, 16*maxCommit)
	if _, err := r.Put(t.Context(), identity.KindAccess, false, encodeAccess(traffic.Access{})); kind.Of(err) != kind.Unavailable {
		t.Errorf("with a full queue: got %v, want Unavailable", err)
	}
}

// Many at once share a message, and so a sync of the disk.
func TestGroupCommit(t *testing.T) {
	w := newAPIWorld(t, apiOptions{}).ready()
	const n = 400
	errs := make(chan error, n)
	for range n {
		go func() {
			_, err := w.api.recorder.Put(t.Context(), identity.KindAccess, false, encodeAccess(traffic.Access{District: "harbour", Method: "/x/Y", Count: 1, Phase: traffic.AccessUnary}))
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if c := w.api.recorder.Counts(); c.Recorded != n || c.Commits > n/2 {
		t.Errorf("got %+v, want %d records in far fewer messages", c, n)
	}
}

// The lanes: what fills one leaves the other free, and refusals say when to come
// again.
func TestLimits(t *testing.T) {
	l := &Limits{Rate: 1e-9, Burst: 3, Concurrent: 2, Streams: 1, PriorityConcurrent: 1, Total: 3}
	enter := func(agency, method string, m access.Method) (func(), bool) {
		release, wait, ok := l.Enter(agency, method, m)
		if !ok && wait < time.Second {
			t.Errorf("%s %s: wait %s, want a second or more", agency, method, wait)
		}
		return release, ok
	}
	must := func(what string, want, got bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	a1, ok := enter("a", "m1", access.Method{})
	must("first", true, ok)
	_, ok = enter("a", "m2", access.Method{})
	must("second", true, ok)
	_, ok = enter("a", "m3", access.Method{})
	must("third of one agency", false, ok)
	_, ok = enter("b", "m1", access.Method{})
	must("another agency", true, ok)
	_, ok = enter("c", "m1", access.Method{})
	must("more than in all", false, ok)
	p, ok := enter("a", "p", access.Method{Priority: true})
	must("priority beside full lanes", true, ok)
	_, ok = enter("a", "p", access.Method{Priority: true})
	must("a second priority call", false, ok)
	p()
	p() // once counts
	_, ok = enter("a", "p", access.Method{Priority: true})
	must("priority after the first", true, ok)
	_, ok = enter("a", "s", access.Method{Stream: true})
	must("a stream", true, ok)
	_, ok = enter("a", "s", access.Method{Stream: true})
	must("a second stream", false, ok)
	a1()
	r, ok := enter("a", "m1", access.Method{})
	must("after a release", true, ok)
	r()
	r, ok = enter("a", "m1", access.Method{})
	must("the third by rate", true, ok)
	r()
	_, ok = enter("a", "m1", access.Method{})
	must("the fourth by rate", false, ok)
	r, ok = enter("a", "m4", access.Method{})
	must("another method", true, ok)
	r()
}

// Who asks too often is told when to come again, by HTTP and gRPC.
func TestTooManyCalls(t *testing.T) {
	w := newAPIWorld(t, apiOptions{edit: func(c *APIConfig) {
		c.Limits = DefaultLimits()
		c.Limits.Rate, c.Limits.Burst = 1e-9, 2
	}}).ready()
	w.frame(1, "rrrr")
	op := w.who("operator-1", "operations")
	for range 2 {
		w.rest("GET", statePath, op, "")
	}
	p, res := w.problem(429, "GET", statePath, op, "")
	if p.Type != "urn:stopline:problem:limit" || res.Header.Get("Retry-After") == "" {
		t.Errorf("got %+v and Retry-After %q, want a limit and when to come again", p, res.Header.Get("Retry-After"))
	}
	_, err := pb.NewTrafficServiceClient(w.conn(nil)).GetJunctionState(as(t.Context(), op), &pb.GetJunctionStateRequest{Junction: "J1"})
	if status.Code(err) != codes.ResourceExhausted || len(status.Convert(err).Details()) == 0 {
		t.Errorf("gRPC: got %v, want ResourceExhausted with when to come again", err)
	}
	// Another agency, and another method, are not in its way.
	if res, b := w.rest("GET", statePath, w.who("auditor-1", "audit"), ""); res.StatusCode != 200 {
		t.Errorf("another agency: got %s %s, want 200", res.Status, b)
	}
	if res, b := w.rest("GET", "/v1/states", op, ""); res.StatusCode != 200 {
		t.Errorf("another method: got %s %s, want 200", res.Status, b)
	}
	if n := w.api.guard.Counts().Limited; n != 2 {
		t.Errorf("%d limited, want 2", n)
	}
	// The public is counted by where it comes from, not all together.
	for _, from := range []string{"192.0.2.1", "192.0.2.2"} {
		c := call{source: from}
		if _, _, ok := w.api.cfg.Limits.Enter(c.account(), "/public", access.Method{Public: true}); !ok {
			t.Errorf("%s was turned away", from)
		}
	}
}

// A stream ends when its client's right has ended.
func TestStreamOfAClientWhoseTimeIsOver(t *testing.T) {
	key, pub := clientKey(t)
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	var late atomic.Bool
	now := func() time.Time {
		if late.Load() {
			return end
		}
		return time.Now()
	}
	w := newAPIWorld(t, apiOptions{now: now, entries: map[string]identity.Client{
		"guest": {Agency: "roads", Roles: []string{"viewer"}, Until: end.Format(time.RFC3339), TokenKey: pub}}}).ready()
	w.frame(1, "rrrr")
	token, err := NewToken("harbour", "guest", key, time.Now(), time.Minute, "")
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{"Authorization": {"Bearer " + token}, headerPurpose: {"planning"}}
	s, err := pb.NewTrafficServiceClient(w.conn(nil)).WatchJunctionStates(as(t.Context(), h), &pb.WatchJunctionStatesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	late.Store(true)
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "ended at") {
		t.Errorf("got %v, want PermissionDenied as the client has ended", err)
	}
}
