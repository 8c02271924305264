//go:build unix

package sealing

import (
	"crypto/ed25519"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	_ "modernc.org/sqlite"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// TestLitewitness has torchwood's litewitness, a witness of the public network,
// cosign our log. It is built from its own module, testdata/litewitness, which
// takes a while and a module proxy: with STOPLINE_INTEROP=1 only.
func TestLitewitness(t *testing.T) {
	if os.Getenv("STOPLINE_INTEROP") != "1" {
		t.Skip("builds another program: set STOPLINE_INTEROP=1")
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "litewitness")
	build := exec.Command("go", "build", "-o", bin, "filippo.io/torchwood/cmd/litewitness")
	build.Dir = filepath.Join("testdata", "litewitness")
	build.Env = append(os.Environ(), "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building litewitness: %v\n%s", err, out)
	}
	d := ledgertest.New("litewitness", 4)
	db, err := sql.Open("sqlite", filepath.Join(dir, "w.db"))
	if err != nil {
		t.Fatal(err)
	}
	empty := sha256.Sum256(nil)
	for _, q := range []string{
		"CREATE TABLE log (origin TEXT PRIMARY KEY, tree_size INTEGER NOT NULL, tree_hash TEXT NOT NULL)",
		"CREATE TABLE key (origin TEXT NOT NULL, key TEXT NOT NULL, FOREIGN KEY(origin) REFERENCES log(origin))",
		fmt.Sprintf("INSERT INTO log VALUES ('%s', 0, '%s')", d.Origin, ledger.Checkpoint{Root: empty}.Body()[3:47]),
		fmt.Sprintf("INSERT INTO key VALUES ('%s', '%s')", d.Origin, d.Genesis.LogKey),
	} {
		if _, err := db.Exec(q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	// Its key is in an SSH agent.
	seed := sha256.Sum256([]byte("litewitness"))
	key := ed25519.NewKeyFromSeed(seed[:])
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go func() { _ = agent.ServeAgent(ring, c) }() // ends with the witness
		}
	}()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-name", "lite.example/w", "-db", filepath.Join(dir, "w.db"), "-ssh-agent", socket, "-listen", addr, "-key", ssh.FingerprintSHA256(public))
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		err := errors.Join(cmd.Process.Kill(), cmd.Wait())
		if t.Failed() {
			t.Logf("litewitness: %v\n%s", err, log.String())
		}
	}()
	wait(t, "litewitness answers", func() bool {
		resp, err := http.Get("http://" + addr + "/")
		if err != nil {
			return false
		}
		_ = resp.Body.Close() // that it answers is enough
		return true
	})
	k, err := ledger.NewCosigner("lite.example/w", key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	c := wide(d, 5, 120)
	s := openStore(t, options(d, t.TempDir()))
	bs := blocks(t, c)
	a := &asker{Witness: ledger.Witness{Name: "lite", Cosigner: k, URL: "http://" + addr}, client: http.DefaultClient, tiles: s}
	ask := func(a *asker) error {
		signed, h, err := s.Last()
		if err != nil {
			t.Fatal(err)
		}
		cp := c.Blocks[h-1].Header.Checkpoint(c.Origin)
		line, err := a.ask(t.Context(), cp, signed)
		if err == nil {
			_, err = k.CheckCosignature(cp.Body(), line)
		}
		return err
	}
	for i, b := range bs { // from nothing, then with proofs
		if err := errors.Join(s.Append(b), sealNow(s, c)); err != nil {
			t.Fatal(err)
		}
		if err := ask(a); err != nil {
			t.Errorf("checkpoint %d: %v", i, err)
		}
	}
	if err := ask(a); err != nil {
		t.Errorf("the same again: %v", err)
	}
	fresh := *a
	fresh.size = 0 // as after a restart of ours: it tells its size
	if err := ask(&fresh); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	other := d.NewChain().Fill(1)
	line, err := fresh.ask(t.Context(), other.Blocks[0].Header.Checkpoint(d.Origin), other.Seal(other.Blocks[0]))
	if err == nil {
		t.Errorf("a log that has shrunk: got %q", line)
	}
}
