package main

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/sealing"
)

// runMain runs one command line.
func runMain(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(t.Context(), args, streams{&o, &e})
	return code, o.String(), e.String()
}

// fileOf puts bytes into a file of the test's.
func fileOf(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestWitnessCommand makes a witness, runs it, and has it cosign.
func TestWitnessCommand(t *testing.T) {
	_, vkey, err := note.GenerateKey(nil, "log.example/one")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "w")
	code, out, errs := runMain(t, "witness", "--write-config", dir, "--name", "fjord.example/witness", "--log", vkey, "--listen", "127.0.0.1:0")
	lines := strings.Split(out, "\n")
	if code != 0 || len(lines) != 3 || !strings.HasPrefix(lines[1], "witness NAME fjord.example/witness+") {
		t.Fatalf("got %d %s%s", code, out, errs)
	}
	file := filepath.Join(dir, "witness.yaml")
	if code, out, errs := runMain(t, "witness", "--config", file, "--check"); code != 0 || !strings.HasPrefix(out, "OK: witness fjord.example/witness of 1 logs") {
		t.Errorf("check: got %d %s%s", code, out, errs)
	}
	w, err := loadWitness(file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	said := &firstLine{line: make(chan string, 1)}
	done := make(chan error, 1)
	go func() { done <- w.run(ctx, said) }()
	var line string
	select {
	case line = <-said.line:
	case err := <-done:
		t.Fatalf("ended: %v", err)
	case <-time.After(20 * time.Second):
		t.Fatal("does not start")
	}
	_, rest, _ := strings.Cut(line, "url=")
	url, _, _ := strings.Cut(rest, " ")
	resp, err := http.Post(url+"add-checkpoint", "", strings.NewReader("old 0\n\nlog.example/two\n0\n\n"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close() // only the status counts
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("an unknown log: got %s, want 404", resp.Status)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("ended with %v", err)
	}
	for _, args := range [][]string{
		{"witness"}, {"witness", "x"}, {"witness", "--config", "a", "--write-config", "b"}, {"witness", "--write-config", dir + "2"},
		{"witness", "--config", file, "--log", vkey}, {"witness", "--write-config", dir + "2", "--name", "a b", "--log", vkey},
		{"witness", "--write-config", dir + "2", "--name", "a", "--log", "junk"},
	} {
		if code, _, errs := runMain(t, args...); code != exitUsage {
			t.Errorf("%q: got %d %s, want %d", args, code, errs, exitUsage)
		}
	}
	if code, _, _ := runMain(t, "witness", "--write-config", dir, "--name", "a", "--log", vkey); code != exitFailed {
		t.Errorf("made twice: got %d, want %d", code, exitFailed)
	}
	bad := fileOf(t, "bad.yaml", []byte("name: x\nlistn: 1\nlisten: nowhere\nlogs: [{origin: a}]\nlog_level: loud\n"))
	code, _, errs = runMain(t, "witness", "--config", bad)
	for _, want := range []string{"listn", "bad.yaml:3: listen", "key: must be given", "data: must be given", "log_level"} {
		if code != exitFailed || !strings.Contains(errs, want) {
			t.Errorf("bad configuration: got %d %s, want a complaint about %q", code, errs, want)
		}
	}
	for s, good := range map[string]bool{strings.Fields(lines[1])[2] + "@http://127.0.0.1:1/": true, vkey + "@http://x/": false, strings.Fields(lines[1])[2]: false, "x@ftp://y": false} {
		if _, err := parseWitness(s); (err == nil) != good {
			t.Errorf("--witness %s: got %v, want taken %v", s, err, good)
		}
	}
}

// firstLine hands out what was written first.
type firstLine struct{ line chan string }

func (f *firstLine) Write(b []byte) (int, error) {
	select {
	case f.line <- string(b):
	default:
	}
	return len(b), nil
}

// TestLogCheck checks a log over HTTP from genesis, across changes of the
// validators, and against what was seen before.
func TestLogCheck(t *testing.T) {
	c := ledgertest.New("log check", 4).NewChain().Fill(2)
	c.Decide([]ledgertest.Record{c.Join(1)})
	c.Voters = []int{0, 1, 2, 3, 4}
	c.Fill(2)
	genesis := fileOf(t, "genesis.json", c.GenesisJSON)
	policy := fileOf(t, "policy", c.Policy)
	seen := filepath.Join(t.TempDir(), "seen")
	dir := t.TempDir()
	srv := httptest.NewServer(sealing.Handler(dir, nil))
	defer srv.Close()
	check := func(want int, text string, args ...string) {
		t.Helper()
		code, out, errs := runMain(t, append([]string{"log", "check", srv.URL, "--genesis", genesis}, args...)...)
		if code != want || !strings.Contains(out+errs, text) {
			t.Errorf("%q: got %d %s%s, want %d and %q", args, code, out, errs, want, text)
		}
	}
	fill := func(c *ledgertest.Chain, dir string, from, to int) {
		t.Helper()
		s, err := sealing.OpenStore(sealing.StoreOptions{Dir: dir, GenesisJSON: c.GenesisJSON, Policy: c.Policy})
		if err != nil {
			t.Fatal(err)
		}
		bs := decidedBlocks(t, c)
		for i := from; i < to; i++ {
			if err := s.Append(bs[i]); err != nil {
				t.Fatal(err)
			}
			p, _ := s.Snapshot()
			c.Voters = c.Blocks[i].Voters
			if err := s.WriteTiles(p); err != nil {
				t.Fatal(err)
			}
			if err := s.Seal(p, c.Seal(c.Blocks[i])); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	check(exitFailed, "checkpoint")
	fill(c, dir, 0, 2)
	check(exitOK, "decided by 4 validators, in force since block 0")
	check(exitOK, "seen for the first time", "--seen", seen, "--policy", policy)
	check(exitOK, "as seen before", "--seen", seen)
	fill(c, dir, 2, 5)
	check(exitOK, "has only grown since 8", "--seen", seen)
	check(exitOK, "decided by 5 validators, in force since block 3")
	if b, err := os.ReadFile(seen); err != nil || !bytes.Contains(b, []byte("\n18\n")) {
		t.Errorf("remembered: got %s, %v, want 18 entries", b, err)
	}
	// Another district that says it is this one.
	other := ledgertest.New("other", 4).NewChain().Fill(1)
	check(exitFailed, "another district", "--genesis", fileOf(t, "genesis.json", other.GenesisJSON))
	// A log that forgets, and one that never was.
	forked := c.NewChain()
	forked.Voters = []int{0, 1, 2, 3}
	forked.Decide([]ledgertest.Record{c.Frame(70, ledgertest.Start)})
	fill(forked, t.TempDir(), 0, 1)
	for name, size := range map[string]uint64{"has shrunk": 400, "only grown": 7, "was forked": 18} {
		cp := ledger.Checkpoint{Origin: c.Origin, Size: size}
		check(exitFailed, name, "--seen", fileOf(t, "seen", []byte(cp.Body()+"\n— x AAAA\n")))
	}
	for _, args := range [][]string{{"log"}, {"log", "check"}, {"log", "check", srv.URL}, {"log", "show", srv.URL, "--genesis", genesis}, {"log", "check", "here", "--genesis", genesis},
		{"log", "check", srv.URL, "--genesis", "nowhere"}, {"log", "check", srv.URL, "--genesis", genesis, "--policy", genesis}} {
		if code, _, errs := runMain(t, args...); code != exitUsage {
			t.Errorf("%q: got %d %s, want %d", args, code, errs, exitUsage)
		}
	}
}
