// Package servicetest gives tests of services what they run on: a real NATS
// server in a folder of the test, and a log that goes to the test's output.
package servicetest

import (
	"context"
	"log/slog"
	"sync"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// NATS returns an embedded server that lives as long as the test.
func NATS(t testing.TB) *bus.Server {
	t.Helper()
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Logger: Logger(t)})
	if err != nil {
		t.Fatalf("starting NATS: %v", err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

// Connect returns a connection that is closed before the server stops.
func Connect(t testing.TB, s *bus.Server) *bus.Bus {
	t.Helper()
	b, err := s.Connect(t.Name())
	if err != nil {
		t.Fatalf("connecting to NATS: %v", err)
	}
	t.Cleanup(b.Close)
	return b
}

// District returns a connection to a new server that has the streams of d.
func District(t testing.TB, d traffic.DistrictID) *bus.Bus {
	t.Helper()
	b := Connect(t, NATS(t))
	if err := b.Declare(context.Background(), topic.Streams(d)); err != nil {
		t.Fatalf("declaring streams: %v", err)
	}
	return b
}

// Logger writes to the test's log for as long as the test runs: what background
// work says after that is dropped, as testing would panic.
func Logger(t testing.TB) *slog.Logger {
	w := &testWriter{t: t}
	t.Cleanup(w.close)
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: slog.LevelInfo,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{} // go test shows when it matters
			}
			return a
		},
	}))
}

type testWriter struct {
	mu sync.Mutex
	t  testing.TB // guarded by mu; nil once the test is over
}

func (w *testWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t != nil {
		w.t.Logf("%s", b[:max(len(b)-1, 0)]) // Logf ends the line itself
	}
	return len(b), nil
}

func (w *testWriter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t = nil
}
