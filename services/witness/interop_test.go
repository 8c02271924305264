package witness

import (
	"context"
	"fmt"
	"net/url"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"

	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// TestServesTessera has a log of Tessera ask our witness for each checkpoint, and
// torchwood verify what it publishes under a policy that needs us: neither the
// client nor the verifier is ours.
func TestServesTessera(t *testing.T) {
	skey, vkey, err := note.GenerateKey(nil, "log.example/tessera")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	w, base := open(t, Config{Name: name, Key: keyOf("witness"), Dir: t.TempDir(), Logger: servicetest.Logger(t),
		Logs: []Log{{Origin: "log.example/tessera", Keys: []string{vkey}}}})
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := tessera.NewWitness(w.Key(), u)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	root := t.TempDir()
	driver, err := posix.New(ctx, posix.Config{Path: root})
	if err != nil {
		t.Fatal(err)
	}
	appender, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().WithCheckpointSigner(signer).
		WithBatching(64, 5*time.Millisecond).WithCheckpointInterval(100*time.Millisecond).
		WithWitnesses(tessera.NewWitnessGroup(1, theirs), &tessera.WitnessOptions{Timeout: 20 * time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	await := tessera.NewPublicationAwaiter(ctx, reader.ReadCheckpoint, 20*time.Millisecond)
	policy, err := torchwood.ParsePolicy(fmt.Appendf(nil, "log %s\nwitness w %s\nquorum w\n", vkey, w.Key()))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // each round grows the log: the second needs a consistency proof
		for k := range 40 {
			appender.Add(ctx, tessera.NewEntry(fmt.Appendf(nil, "entry %d of round %d", k, i)))
		}
		_, signed, err := await.Await(ctx, appender.Add(ctx, tessera.NewEntry(fmt.Appendf(nil, "last of round %d", i))))
		if err != nil {
			t.Fatal(err)
		}
		cp, _, err := torchwood.VerifyCheckpoint(signed, policy)
		if err != nil {
			t.Fatalf("round %d: %v\n%s", i, err, signed)
		}
		if cp.N < int64(41*(i+1)) {
			t.Errorf("round %d: got a log of %d, want %d or more", i, cp.N, 41*(i+1))
		}
	}
	if err := shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if m := w.Metrics(); m.Grown < 3 || m.Inconsistent+m.NotSigned+m.BadRequest > 0 {
		t.Errorf("got %+v, want three checkpoints or more, and none refused but for its size", m)
	}
	if _, _, _, err := client.FetchCheckpoint(t.Context(), client.FileFetcher{Root: root}.ReadCheckpoint, mustVerifier(t, vkey), "log.example/tessera"); err != nil {
		t.Error(err)
	}
}

func mustVerifier(t *testing.T, vkey string) note.Verifier {
	t.Helper()
	v, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
