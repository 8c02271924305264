package main

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// A district runs the same around a NATS server of its own as around the
// embedded one.
func TestDemoOnAnExternalServer(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	var out, errs bytes.Buffer
	code := Main(t.Context(), []string{"demo", "--nats", s.URL(), "--for", "4s", "--json", "--listen", "127.0.0.1:0", "--data", t.TempDir()}, streams{&out, &errs})
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	var r demoReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v in %s", err, out.String())
	}
	if r.Frames.Accepted == 0 || r.SealedSize != r.LogSize || !r.Evidence.Verified || r.Frames.Quarantined != 0 {
		t.Errorf("got %+v, want frames accepted, all sealed, evidence verified", r)
	}
}

func TestDemoSaysThatThereIsNoServer(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a server")
	}
	var out, errs bytes.Buffer
	code := Main(t.Context(), []string{"demo", "--nats", "nats://127.0.0.1:1", "--nats-creds", "no-such-file", "--for", "1s", "--data", t.TempDir()}, streams{&out, &errs})
	if code != exitFailed || !bytes.Contains(errs.Bytes(), []byte("no-such-file")) {
		t.Errorf("exit %d: %q, want a failure that names the credentials file", code, errs.String())
	}
}
