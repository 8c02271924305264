package witness

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

const name = "neighbour.example/witness"

func keyOf(seed string) ed25519.PrivateKey {
	h := sha256.Sum256([]byte(seed))
	return ed25519.NewKeyFromSeed(h[:])
}

func configOf(t testing.TB, dir string, d *ledgertest.District) Config {
	return Config{Name: name, Key: keyOf("witness"), Dir: dir, Logger: servicetest.Logger(t), Now: func() time.Time { return ledgertest.Start },
		Logs: []Log{{Origin: d.Origin, Keys: []string{d.Genesis.LogKey}}}}
}

// open makes the folder if there is none, and serves it.
func open(t testing.TB, c Config) (*Witness, string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(c.Dir, identityFile)); err != nil {
		if err := Create(c.Dir, c.Name, c.Key); err != nil {
			t.Fatal(err)
		}
	}
	w, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	s := httptest.NewServer(w.Handler())
	t.Cleanup(s.Close)
	return w, s.URL
}

// prove returns the consistency proof between the ends of two blocks, from 0; -1
// is the empty log.
func prove(t testing.TB, c *ledgertest.Chain, from, to int) []tlog.Hash {
	t.Helper()
	if from < 0 || from == to {
		return nil
	}
	n := c.Blocks[to].Header.Size
	p, err := tlog.ProveTree(int64(n), int64(c.Blocks[from].Header.Size), ledger.NewHashReader(c, n))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func size(c *ledgertest.Chain, block int) uint64 {
	if block < 0 {
		return 0
	}
	return c.Blocks[block].Header.Size
}

// request is the body of add-checkpoint.
func request(old uint64, proof []tlog.Hash, signed []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "old %d\n", old)
	for _, h := range proof {
		fmt.Fprintf(&b, "%s\n", base64.StdEncoding.EncodeToString(h[:]))
	}
	return b.String() + "\n" + string(signed)
}

func post(t testing.TB, url, body string) (status int, contentType, answer string) {
	t.Helper()
	resp, err := http.Post(url+"/add-checkpoint", "", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("Content-Type"), string(b)
}

// checkLine verifies an answer as somebody would who has the policy only.
func checkLine(t testing.TB, w *Witness, signed []byte, line string) {
	t.Helper()
	k, err := ledger.ParseCosigner(w.Key())
	if err != nil {
		t.Fatal(err)
	}
	body, _, _ := strings.Cut(string(signed), "\n\n")
	if at, err := k.CheckCosignature(body+"\n", line); err != nil || !at.Equal(ledgertest.Start) {
		t.Errorf("cosignature: got one of %v, %v, want %v", at, err, ledgertest.Start)
	}
}

// TestProtocol goes through what C2SP tlog-witness says of add-checkpoint.
func TestProtocol(t *testing.T) {
	d := ledgertest.New("witness", 4)
	c := d.NewChain().Fill(9)
	fork := d.NewChain().Fill(3) // goes another way from block 4 on
	fork.Decide([]ledgertest.Record{d.Frame(99, ledgertest.Start)})
	fork.Fill(5)
	stranger := ledgertest.New("stranger", 4)
	cfg := configOf(t, t.TempDir(), d)
	// A log whose checkpoints have extension lines, with two keys.
	skey, vkey, err := note.GenerateKey(bytes.NewReader(keyOf("other log").Seed()), "log.example/other")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Logs = append(cfg.Logs, Log{Origin: "log.example/other", Keys: []string{stranger.Genesis.LogKey, vkey}})
	w, url := open(t, cfg)
	seal := func(c *ledgertest.Chain, block int) []byte { return c.Seal(c.Blocks[block]) }
	other := func(size uint64, root ledger.Hash, extension string) []byte {
		b, err := note.Sign(&note.Note{Text: ledger.Checkpoint{Origin: "log.example/other", Size: size, Root: root}.Body() + extension}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	empty := sha256.Sum256(nil)
	many := make([]tlog.Hash, 64)
	mine, body := string(seal(c, 4)), c.Blocks[4].Header.Checkpoint(d.Origin).Body()
	forged, err := note.Sign(&note.Note{Text: c.Blocks[5].Header.Checkpoint(d.Origin).Body()}, stranger.LogSigner())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, body string
		status     int
		size       string
	}{
		{"first, from 0", request(0, nil, seal(c, 1)), 200, ""},
		{"from 0 again", request(0, nil, seal(c, 1)), 409, "8\n"},
		{"the same again", request(size(c, 1), nil, seal(c, 1)), 200, ""},
		{"the same with a proof", request(size(c, 1), prove(t, c, 0, 1), seal(c, 1)), 422, ""},
		{"from another size", request(size(c, 2), prove(t, c, 2, 4), seal(c, 4)), 409, "8\n"},
		{"grown", request(size(c, 1), prove(t, c, 1, 4), seal(c, 4)), 200, ""},
		{"smaller", request(size(c, 4), nil, seal(c, 1)), 400, ""},
		{"smaller, from there", request(size(c, 1), nil, seal(c, 1)), 409, "20\n"},
		{"no proof", request(size(c, 4), nil, seal(c, 5)), 422, ""},
		{"another proof", request(size(c, 4), prove(t, c, 3, 5), seal(c, 5)), 422, ""},
		{"fork, larger", request(size(c, 4), prove(t, fork, 5, 7), seal(fork, 7)), 422, ""},
		{"unknown log", request(0, nil, []byte(strings.Replace(mine, d.Origin, "elsewhere.example", 1))), 404, ""},
		{"signed by a stranger", request(size(c, 4), prove(t, c, 4, 5), forged), 403, ""},
		{"not signed", request(size(c, 4), nil, []byte(body+"\n")), 400, ""},
		{"signed by others only", request(size(c, 4), nil, []byte(body+"\n"+d.Cosignature(0, body, ledgertest.Start))), 403, ""},
		{"no old size", "\n\n" + mine, 400, ""},
		{"old size 05", "old 05\n\n" + mine, 400, ""},
		{"old size -1", "old -1\n\n" + mine, 400, ""},
		{"old size +1", "old +1\n\n" + mine, 400, ""},
		{"old size too large", "old 9223372036854775808\n\n" + mine, 400, ""},
		{"CR", "old 0\r\n\r\n" + mine, 400, ""},
		{"no empty line", "old 0\n" + strings.SplitN(mine, "\n\n", 2)[0], 400, ""},
		{"63 lines of proof", request(size(c, 4), many[:63], seal(c, 5)), 422, ""},
		{"64 lines of proof", request(size(c, 4), many, seal(c, 5)), 400, ""},
		{"proof of short hashes", "old 24\nAAAA\n\n" + mine, 400, ""},
		{"proof not in base64", "old 24\n" + strings.Repeat("!", 44) + "\n\n" + mine, 400, ""},
		{"nothing", "", 400, ""},
		{"too large", "old 0\n\n" + strings.Repeat("x", MaxRequest), 413, ""},
		{"still grows", request(size(c, 4), prove(t, c, 4, 8), seal(c, 8)), 200, ""},
		{"extension lines, empty log", request(0, nil, other(0, empty, "extension\n")), 200, ""},
		{"empty log with a root", request(0, nil, other(0, ledger.Hash{1}, "")), 409, "0\n"},
		{"extension lines", request(0, nil, other(3, ledger.Hash{1}, "more\n")), 200, ""},
		{"from 0 with a proof", request(0, many[:1], other(3, ledger.Hash{1}, "")), 409, "3\n"},
		{"other extension lines", request(3, nil, other(3, ledger.Hash{1}, "")), 200, ""},
		{"other root", request(3, nil, other(3, ledger.Hash{2}, "")), 409, "3\n"},
	} {
		status, contentType, answer := post(t, url, tc.body)
		if status != tc.status {
			t.Errorf("%s: got %d %q, want %d", tc.name, status, answer, tc.status)
			continue
		}
		switch status {
		case 200:
			_, signed, _ := strings.Cut(tc.body, "\n\n")
			checkLine(t, w, []byte(signed), answer)
		case 409:
			if answer != tc.size || contentType != "text/x.tlog.size" {
				t.Errorf("%s: got %q as %s, want %q as text/x.tlog.size", tc.name, answer, contentType, tc.size)
			}
		}
		if status != 200 && strings.Contains(answer, "—") {
			t.Errorf("%s: refused, and there is a signature: %q", tc.name, answer)
		}
	}
	if resp, err := http.Get(url + "/add-checkpoint"); err != nil || resp.StatusCode != 405 {
		t.Errorf("GET: got %v, %v, want 405", resp, err)
	} else {
		_ = resp.Body.Close()
	}
	resp, err := http.Get(url + "/")
	if err != nil {
		t.Fatal(err)
	}
	var s status
	if err := errors.Join(json.NewDecoder(resp.Body).Decode(&s), resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	if s.Name != name || s.Key != w.Key() || len(s.Logs) != 2 || s.Logs[0].Origin != d.Origin && s.Logs[1].Origin != d.Origin ||
		s.Counts.Cosigned != 7 || s.Counts.Grown != 5 || s.Counts.UnknownLog != 1 || s.Counts.NotSigned != 2 || s.Counts.Forks != 2 {
		t.Errorf("status: got %+v", s)
	}
}

// TestRemembers: what was cosigned holds after a restart; a folder that is not
// whole, of another or gone is refused.
func TestRemembers(t *testing.T) {
	d := ledgertest.New("witness", 4)
	c := d.NewChain().Fill(5)
	cfg := configOf(t, t.TempDir(), d)
	w, url := open(t, cfg)
	if status, _, answer := post(t, url, request(0, nil, c.Seal(c.Blocks[3]))); status != 200 {
		t.Fatalf("got %d %q", status, answer)
	}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "another witness runs") {
		t.Errorf("a second one in the folder: got %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w, url = open(t, cfg)
	if status, _, answer := post(t, url, request(0, nil, c.Seal(c.Blocks[4]))); status != 409 || answer != "16\n" {
		t.Errorf("after a restart: got %d %q, want 409 and 16", status, answer)
	}
	if status, _, _ := post(t, url, request(size(c, 3), prove(t, c, 3, 4), c.Seal(c.Blocks[4]))); status != 200 {
		t.Errorf("after a restart: got %d, want 200", status)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(cfg.Dir, stateDir, hexOf(d.Origin))
	good, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	// Any byte of the head or of its own signature, and an end torn off.
	for i := range good {
		if at := bytes.LastIndex(good[:len(good)-1], []byte("\n")); i > bytes.Index(good, []byte("\n\n")) && i <= at {
			continue // the log's own, which nothing here relies on
		}
		bad := bytes.Clone(good)
		bad[i] ^= 1
		refused(t, cfg, state, bad, fmt.Sprintf("byte %d changed", i))
	}
	for i := 0; i < len(good); i += 7 {
		refused(t, cfg, state, good[:i], fmt.Sprintf("cut at %d", i))
	}
	if err := os.WriteFile(state, good, 0o600); err != nil {
		t.Fatal(err)
	}
	other := cfg
	other.Key = keyOf("another")
	if _, err := New(other); err == nil || !strings.Contains(err.Error(), "is the folder of") {
		t.Errorf("another key: got %v", err)
	}
	if err := Create(cfg.Dir, name, cfg.Key); err == nil {
		t.Error("made twice: got no error")
	}
	other = cfg
	other.Dir = t.TempDir()
	if _, err := New(other); err == nil || !strings.Contains(err.Error(), "lost its folder") {
		t.Errorf("no folder: got %v", err)
	}
}

func refused(t *testing.T, c Config, path string, b []byte, what string) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := New(c)
	if err == nil {
		_ = w.Close()
		t.Errorf("state: %s: got no error", what)
	}
}

// TestStoredBeforeAnswered: nothing is answered before it is on disk, and nothing
// at all where the disk fails.
func TestStoredBeforeAnswered(t *testing.T) {
	d := ledgertest.New("witness", 4)
	c := d.NewChain().Fill(3)
	w, url := open(t, configOf(t, t.TempDir(), d))
	store := w.write
	w.write = func(string, []byte) error { return errors.New("disk is full") }
	if status, _, answer := post(t, url, request(0, nil, c.Seal(c.Blocks[0]))); status != 500 || strings.Contains(answer, "—") || strings.Contains(answer, "disk") {
		t.Errorf("disk failing: got %d %q, want 500 and nothing more", status, answer)
	}
	began, goOn := make(chan struct{}), make(chan struct{})
	w.write = func(path string, b []byte) error {
		close(began)
		<-goOn
		return store(path, b)
	}
	answered := make(chan int, 1)
	go func() {
		status, _, _ := post(t, url, request(0, nil, c.Seal(c.Blocks[1])))
		answered <- status
	}()
	<-began
	select {
	case s := <-answered:
		t.Errorf("answered %d before it was stored", s)
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	if s := <-answered; s != 200 {
		t.Errorf("got %d, want 200", s)
	}
	if m := w.Metrics(); m.Failed != 1 || m.Grown != 1 {
		t.Errorf("got %+v, want one failed and one grown", m)
	}
}

// TestRace: of many at a time, with two histories, one goes on from each size, and
// all that was cosigned is one history.
func TestRace(t *testing.T) {
	d := ledgertest.New("witness", 4)
	c := d.NewChain().Fill(12)
	fork := d.NewChain()
	fork.Decide([]ledgertest.Record{d.Frame(99, ledgertest.Start)})
	fork.Fill(11)
	w, url := open(t, configOf(t, t.TempDir(), d))
	var mu sync.Mutex
	roots := map[uint64]ledger.Hash{}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			chain := []*ledgertest.Chain{c, fork}[g%2]
			at := -1 // where we believe it is
			for to := range chain.Blocks {
				for range 3 {
					if at > to {
						break // another was faster
					}
					status, _, answer := post(t, url, request(size(chain, at), prove(t, chain, at, to), chain.Seal(chain.Blocks[to])))
					if status == 200 {
						mu.Lock()
						h := chain.Blocks[to].Header
						if r, ok := roots[h.Size]; ok && r != h.Root {
							t.Errorf("two roots of %d entries were cosigned", h.Size)
						}
						roots[h.Size] = h.Root
						mu.Unlock()
						at = to
						break
					}
					if status != 409 {
						break // another history
					}
					n, err := strconv.ParseUint(strings.TrimSpace(answer), 10, 64)
					if err != nil {
						t.Error(err)
					}
					for at = -1; at+1 < len(chain.Blocks) && size(chain, at+1) <= n; at++ {
					}
					if size(chain, at) != n {
						break
					}
				}
			}
		})
	}
	wg.Wait()
	if len(roots) == 0 {
		t.Fatal("nothing was cosigned")
	}
	for _, chain := range []*ledgertest.Chain{c, fork} {
		n := 0
		for _, b := range chain.Blocks {
			if r, ok := roots[b.Header.Size]; ok && r == b.Header.Root {
				n++
			}
		}
		if n != 0 && n != len(roots) {
			t.Errorf("%d of %d cosigned checkpoints are of one history, the others of another", n, len(roots))
		}
	}
	if m := w.Metrics(); m.Grown != uint64(len(roots)) {
		t.Errorf("got %d grown, want %d", m.Grown, len(roots))
	}
}

// TestFork: a log that signs two histories convicts itself.
func TestFork(t *testing.T) {
	d := ledgertest.New("witness", 4)
	c, fork := d.NewChain().Fill(2), d.NewChain()
	for i := range 2 {
		h, at := uint64(i+1), ledgertest.Start.Add(time.Hour)
		fork.Decide([]ledgertest.Record{d.Frame(2*h-1, at), d.Frame(2*h, at), d.Command(h, h, at)})
	}
	cfg := configOf(t, t.TempDir(), d)
	w, url := open(t, cfg)
	logOnly := func(c *ledgertest.Chain) []byte { // without validators, of whom the witness knows nothing
		b, err := ledger.Seal(c.Blocks[1].Header.Checkpoint(c.Origin), c.LogSigner(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if status, _, _ := post(t, url, request(0, nil, logOnly(c))); status != 200 {
		t.Fatalf("got %d, want 200", status)
	}
	for range 2 {
		if status, _, answer := post(t, url, request(size(c, 1), nil, fork.Seal(fork.Blocks[1]))); status != 409 {
			t.Fatalf("got %d %q, want 409", status, answer)
		}
	}
	files, err := filepath.Glob(filepath.Join(cfg.Dir, forksDir, "*"))
	if err != nil || len(files) != 1 || w.Metrics().Forks != 2 {
		t.Fatalf("got accusations %v, %v, want one", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	a, err := ledger.ParseAccusation(b)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	j, err := a.Judge(ledger.Trust{Policy: p})
	if err != nil || !strings.Contains(j.Text(), d.Origin) || j.ExitCode() != ledger.ExitPass {
		t.Errorf("judged: got %v, %s", err, j.Text())
	}
}

func TestConfigValidate(t *testing.T) {
	d := ledgertest.New("witness", 4)
	bad := Config{Name: "a b", Key: keyOf("x"), Logs: []Log{{}, {Origin: "a"}, {Origin: "a", Keys: []string{"junk"}}}}
	err := bad.Validate()
	for _, want := range []string{"Name", "Dir", "Logs[0]: origin", "Logs[1]: keys", "Logs[2]: keys[0]", "there twice"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a complaint about %s", err, want)
		}
	}
	if err := (&Config{}).Validate(); err == nil || !strings.Contains(err.Error(), "Logs") {
		t.Errorf("nothing given: got %v", err)
	}
	good := configOf(t, "x", d)
	if err := good.Validate(); err != nil {
		t.Errorf("got %v, want none", err)
	}
}

func FuzzParseRequest(f *testing.F) {
	c := ledgertest.New("witness", 4).NewChain().Fill(4)
	f.Add([]byte(request(0, nil, c.Seal(c.Blocks[0]))))
	f.Add([]byte(request(5, prove(f, c, 0, 3), c.Seal(c.Blocks[3]))))
	f.Add([]byte("old 1\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		old, proof, signed, err := ParseRequest(b)
		if err == nil && request(old, proof, signed) != string(b) {
			t.Errorf("%q: is not what it parses to", b)
		}
	})
}

// Environment of the process that [TestKilled] kills.
const killDir, killURL = "STOPLINE_TEST_WITNESS_DIR", "STOPLINE_TEST_WITNESS_LISTEN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(killDir); dir != "" {
		fmt.Fprintln(os.Stderr, victim(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// victim serves a witness until it is killed.
func victim(dir string) error {
	d := ledgertest.New("witness", 4)
	w, err := New(Config{Name: name, Key: keyOf("witness"), Dir: dir, Logs: []Log{{Origin: d.Origin, Keys: []string{d.Genesis.LogKey}}}})
	if err != nil {
		return err
	}
	s := httptest.NewServer(w.Handler())
	fmt.Println(s.URL)
	select {}
}

// TestKilled kills a witness with SIGKILL while it cosigns, again and again: it
// always remembers at least what it has answered.
func TestKilled(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 2
	}
	d := ledgertest.New("witness", 4)
	c := d.NewChain().Fill(400)
	dir := t.TempDir()
	if err := Create(dir, name, keyOf("witness")); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	answered, at := -1, -1
	for round := range rounds {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), killDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		url, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatalf("round %d: the witness does not start: %v", round, err)
		}
		url = strings.TrimSpace(url)
		// Killed while the answer to some request is under way.
		stop := answered + 3 + round*2
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for {
			to := min(at+1, len(c.Blocks)-1)
			if to == stop {
				wg.Go(func() {
					time.Sleep(time.Duration(round%6) * 300 * time.Microsecond)
					if err := cmd.Process.Kill(); err != nil {
						t.Error(err)
					}
				})
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/add-checkpoint", strings.NewReader(request(size(c, at), prove(t, c, at, to), c.Seal(c.Blocks[to]))))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				break // it is dead
			}
			b, rerr := io.ReadAll(resp.Body)
			_ = resp.Body.Close() // read
			if rerr != nil {
				break
			}
			switch resp.StatusCode {
			case 200:
				answered, at = to, to
			case 409:
				n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				for at = -1; at+1 < len(c.Blocks) && size(c, at+1) <= n; at++ {
				}
				if at < answered {
					t.Fatalf("round %d: it has forgotten: it is at block %d, block %d was answered", round, at, answered)
				}
			default:
				t.Fatalf("round %d: got %s %q", round, resp.Status, b)
			}
		}
		cancel()
		wg.Wait()
		_ = cmd.Wait()     // killed
		at = max(-1, at-1) // so that it must say where it is
		if files, err := filepath.Glob(filepath.Join(dir, stateDir, "*")); err != nil || len(files) > 2+rounds {
			t.Errorf("files left over: %v, %v", files, err)
		}
	}
	if answered < rounds {
		t.Errorf("answered up to block %d, want more", answered)
	}
}
