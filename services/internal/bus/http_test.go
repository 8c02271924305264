package bus_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

func TestHTTPOverNATS(t *testing.T) {
	srv := servicetest.NATS(t)
	b, err := srv.Connect("http")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ctx, cancel := context.WithCancel(t.Context())
	inside, held := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Query", r.URL.RawQuery)
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.Copy(w, r.Body)
	})
	mux.HandleFunc("GET /nothing", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("on purpose") })
	mux.HandleFunc("GET /large", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, b.NC.MaxPayload())) })
	mux.HandleFunc("GET /held", func(http.ResponseWriter, *http.Request) { close(inside); <-held })
	done := make(chan error, 1)
	go func() { done <- b.ServeHTTP(ctx, "ask.http", "q", 1, mux) }()
	c := &http.Client{Transport: b.RoundTripper("ask.http"), Timeout: 10 * time.Second}
	do := func(method, path, body string) (*http.Response, string) {
		t.Helper()
		for {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://any"+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			res, err := c.Do(req)
			if err != nil { // not subscribed yet
				time.Sleep(5 * time.Millisecond)
				continue
			}
			text, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			return res, string(text)
		}
	}
	if res, text := do("POST", "/echo?a=b&c", "hello"); res.StatusCode != http.StatusTeapot || text != "hello" || res.Header.Get("X-Query") != "a=b&c" {
		t.Errorf("got %d %q, query %q; want 418, hello, a=b&c", res.StatusCode, text, res.Header.Get("X-Query"))
	}
	for path, want := range map[string]int{"/nothing": 200, "/panic": 500, "/large": 500, "/elsewhere": 404} {
		if res, _ := do("GET", path, ""); res.StatusCode != want {
			t.Errorf("%s: got %d, want %d", path, res.StatusCode, want)
		}
	}
	first := make(chan int, 1)
	go func() { res, _ := do("GET", "/held", ""); first <- res.StatusCode }()
	<-inside // it has the one place
	if res, _ := do("GET", "/nothing", ""); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("one too many: got %d, want 503", res.StatusCode)
	}
	close(held)
	if got := <-first; got != 200 {
		t.Errorf("the one in hand: got %d, want 200", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serving ended with %v", err)
	}
}
