package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The fuzzers ask a whole gateway: a panic anywhere ends the process, and with it
// the fuzzer. With -fuzz each worker has a gateway of its own.

// askers are the clients that fuzzers ask as, with a purpose that lets them in.
var askers = []struct {
	client string
	p      purpose
}{
	{"auditor-1", purpose{"audit", "", ""}}, {"fire-desk-1", purpose{"emergency-response", "", ""}}, {"police-1", purpose{"investigation", "K", "warrant"}},
	{"registrar-1", purpose{"governance", "", ""}}, {"technician-1", purpose{"maintenance", "", ""}}, {"engineer-1", purpose{"planning", "", ""}}, {"", purpose{}},
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) ([]byte, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("%T is no bytes", v)
	}
	return *b, nil
}
func (rawCodec) Unmarshal(b []byte, v any) error {
	to, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("%T is no bytes", v)
	}
	*to = append([]byte(nil), b...)
	return nil
}

// fuzzTB is a fuzzer as a test to the gateway: its own methods may not be called
// while inputs are tried.
type fuzzTB struct {
	testing.TB
	mu    sync.Mutex
	wrong []string // guarded by mu
}

func (f *fuzzTB) Log(...any)                { /* nobody reads what thousands of inputs log */ }
func (f *fuzzTB) Logf(string, ...any)       {}
func (f *fuzzTB) Context() context.Context  { return context.Background() }
func (f *fuzzTB) Error(a ...any)            { f.Errorf("%s", fmt.Sprint(a...)) }
func (f *fuzzTB) Errorf(s string, a ...any) { f.add(fmt.Sprintf(s, a...)) }
func (f *fuzzTB) add(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wrong = append(f.wrong, s)
}

// check reports what went wrong beside an answer.
func (f *fuzzTB) check(t *testing.T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.wrong {
		t.Error(w)
	}
	f.wrong = nil
}

// fuzzCall bounds one call.
const fuzzCall = time.Second

// FuzzGRPC gives bytes as the request of any method, as any role. Whatever comes,
// the answer is one that the API knows, and not that something went wrong inside.
func FuzzGRPC(f *testing.F) {
	tb := &fuzzTB{TB: f}
	m := newMatrix(tb)
	names := make([]string, 0, len(m.all))
	for n := range m.all {
		names = append(names, n)
	}
	slices.Sort(names)
	for i, n := range names {
		for k, r := range m.rows()[n] {
			b, err := proto.Marshal(r.req)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(uint8(i), uint8(i+k), b)
			if k == 0 {
				f.Add(uint8(i), uint8(i+1), append(b, 0xff))
			}
		}
	}
	f.Fuzz(func(t *testing.T, method, who uint8, b []byte) {
		defer tb.check(t)
		d := m.all[names[int(method)%len(names)]]
		a := askers[int(who)%len(askers)]
		ctx, cancel := context.WithTimeout(t.Context(), fuzzCall)
		defer cancel()
		ctx = as(ctx, m.headers(a.client, a.p))
		full := fmt.Sprintf("/%s/%s", d.Parent().FullName(), d.Name())
		var answer []byte
		s, err := m.conns.NewStream(ctx, &grpc.StreamDesc{ServerStreams: d.IsStreamingServer()}, full, grpc.ForceCodec(rawCodec{}))
		if err == nil {
			err = s.SendMsg(&b)
		}
		if err == nil {
			err = s.CloseSend()
		}
		if err == nil {
			err = s.RecvMsg(&answer)
		}
		switch status.Code(err) {
		case codes.Unknown, codes.DataLoss:
			t.Errorf("%s: got %v", full, err)
		case codes.Internal:
			// gRPC's own word for bytes that are no message of the schema.
			if !strings.Contains(err.Error(), "unmarshal") {
				t.Errorf("%s: got %v", full, err)
			}
		}
	})
}

// FuzzREST gives any path, query, headers and body. What is refused is refused
// with a problem document.
func FuzzREST(f *testing.F) {
	tb := &fuzzTB{TB: f}
	m := newMatrix(tb)
	for n, rs := range m.rows() {
		for k, r := range rs {
			reqs, err := restRequests(m.all[n], r.req)
			if err != nil {
				f.Fatal(err)
			}
			for _, h := range reqs {
				body, err := io.ReadAll(h.Body)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(h.Method, h.URL.Path, h.URL.RawQuery, string(body), uint8(k), "operations")
			}
		}
	}
	for _, s := range []struct{ method, path, query, body string }{
		{"GET", "/v1/states", "page_size=1&page_size=2", ""}, {"GET", "/v1/states", "readMask=state,,", ""}, {"GET", "/v1/states", "%zz", ""},
		{"GET", "/v1/junctions/%00/state", "", ""}, {"GET", "/v1/junctions//state", "", ""}, {"GET", "/v1/bundles/-1", "", ""},
		{"GET", "/v1/bundles/18446744073709551616", "", ""}, {"POST", "/v1/exports", "", `{"filter":`}, {"POST", "/v1/exports", "", "[]"},
		{"POST", "/v1/exports", "", `{"filter":{},"filter":{}}`}, {"POST", "/v1/claims", "", `{"valid":"1e400s"}`}, {"HEAD", "/v1/network", "", ""},
		{"POST", "/v1/claims", "", strings.Repeat(`{"a":`, 5000)}, {"GET", "/v1/search", "filter.startTime=9999999999999999-01-01T00:00:00Z", ""},
		{"GET", "/docs/../api.go", "", ""}, {"GET", "/docs/%2e%2e/%2e%2e/etc/passwd", "", ""}, {"POST", "/v1/devices:enrol", "", `{"claim":"x","key":"!!"}`},
	} {
		f.Add(s.method, s.path, s.query, s.body, uint8(0), "audit")
	}
	f.Fuzz(func(t *testing.T, method, path, query, body string, who uint8, header string) {
		defer tb.check(t)
		a := askers[int(who)%len(askers)]
		ctx, cancel := context.WithTimeout(t.Context(), fuzzCall)
		defer cancel()
		if !strings.HasPrefix(path, "/") {
			path = "/" + path
		}
		// What net/http itself lets through.
		r, err := http.NewRequestWithContext(ctx, method, "http://gateway/", strings.NewReader(body))
		if err != nil {
			return
		}
		r.URL = &url.URL{Scheme: "http", Host: "gateway", Path: path, RawQuery: query}
		if u, err := url.Parse(path); err == nil && u.Host == "" && u.Path != "" {
			r.URL.Path, r.URL.RawPath = u.Path, u.RawPath
		}
		r.RequestURI, r.RemoteAddr = r.URL.RequestURI(), "192.0.2.1:1234"
		r.Header = m.headers(a.client, a.p)
		if !strings.ContainsAny(header, "\r\n\x00") {
			r.Header.Set(headerCase, header)
			r.Header.Set("Accept", header)
		}
		w := httptest.NewRecorder()
		done := make(chan struct{})
		go func() { // a stream ends with its context
			defer close(done)
			m.api.REST().ServeHTTP(w, r)
		}()
		<-done
		if w.Code == http.StatusInternalServerError {
			t.Errorf("%s %q ? %q: got %d %s", method, path, query, w.Code, w.Body)
		}
		if w.Code >= 400 && method != http.MethodHead {
			var p problem
			if ct := w.Result().Header.Get("Content-Type"); ct == "application/problem+json" {
				if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != w.Code {
					t.Errorf("%s %q: %d with %q, want a problem document", method, path, w.Code, w.Body)
				}
			} else if strings.HasPrefix(path, "/v1/") && w.Code != http.StatusMethodNotAllowed && w.Code != http.StatusNotFound && w.Code != http.StatusBadRequest {
				t.Errorf("%s %q: %d with %s, want a problem document", method, path, w.Code, ct)
			}
		}
		if b := w.Body.String(); strings.Contains(b, "goroutine ") || strings.Contains(b, "runtime error") {
			t.Errorf("%s %q: the answer says how it is made: %.300s", method, path, b)
		}
	})
}
