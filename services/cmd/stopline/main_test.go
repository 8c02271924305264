package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// asProgram makes this test binary the program itself: what kill -9 hits in
// these tests is a real process with its own memory and open files.
const asProgram = "STOPLINE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) == "1" {
		main() // never returns
	}
	os.Exit(m.Run())
}

// Bounds of waits: reached only when something is broken.
const (
	startWithin = readyWait + 30*time.Second
	endWithin   = finishWait + 30*time.Second
	soon        = 30 * time.Second
)

// processTest marks a test that starts the program; those run two at a time.
func processTest(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts the whole program; not with -short")
	}
	t.Parallel()
}

// optional skips a test that needs a program which is not there, by name, or
// fails it where the environment says that it must be there.
func optional(t *testing.T, program, require string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv(require) == "1" {
		t.Fatalf("%s is not in PATH, and %s=1 says that it must be there", program, require)
	}
	t.Skipf("needs %s in PATH (Debian: apt-get install %s); %s=1 makes this a failure", program, program, require)
}

// output collects what a process writes and wakes those who wait for it.
type output struct {
	mu      sync.Mutex
	b       bytes.Buffer  // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced at each write
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.b.Write(p)
}

func (o *output) now() (string, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String(), o.changed
}

func (o *output) String() string { s, _ := o.now(); return s }

// process is a running stopline.
type process struct {
	t        testing.TB
	name     string
	cmd      *exec.Cmd
	out, err *output
	done     chan struct{} // closed when it has ended
}

// start runs a command line in a process of its own, which does not outlive the
// test.
func start(t testing.TB, args ...string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, name: "stopline " + strings.Join(args, " "), cmd: exec.Command(exe, args...), out: newOutput(), err: newOutput(), done: make(chan struct{})}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "STOPLINE_POLICY=") {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	// A program built with -race would sleep for a second before each exit.
	p.cmd.Env = append(p.cmd.Env, asProgram+"=1", "GORACE=atexit_sleep_ms=10 "+os.Getenv("GORACE"))
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // its exit code is in ProcessState
	}()
	t.Cleanup(p.kill)
	return p
}

// kill is kill -9; nothing happens if the process has ended already.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // "process already finished" is as good
	<-p.done
	if s := p.err.String(); strings.Contains(s, "DATA RACE") || strings.Contains(s, "panic:") {
		p.t.Errorf("%s wrote\n%s", p.name, s)
	}
}

// exit waits for the end of the process and returns its exit code.
func (p *process) exit(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		p.kill()
		p.t.Fatalf("%s did not end within %v; standard error:\n%s", p.name, within, p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// result is what a finished command line did.
type result struct {
	code     int
	out, err string
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstandard output:\n%s\nstandard error:\n%s", r.code, r.out, r.err)
}

// stopline runs a command line to its end.
func stopline(t testing.TB, args ...string) result {
	t.Helper()
	p := start(t, args...)
	code := p.exit(8 * time.Minute)
	return result{code, p.out.String(), p.err.String()}
}

// inside runs a command line in this process: for those that start nothing.
func inside(t testing.TB, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := Main(t.Context(), args, streams{&out, &errs})
	return result{code, out.String(), errs.String()}
}

// wantExit ends the test unless a command ended with code and said all of texts.
func wantExit(t testing.TB, r result, code int, texts ...string) {
	t.Helper()
	if r.code != code {
		t.Fatalf("got %v\nwant exit %d", r, code)
	}
	for _, text := range texts {
		if !strings.Contains(r.out+r.err, text) {
			t.Fatalf("got %v\nwant the text %q in it", r, text)
		}
	}
}

// waitFor asks until the answer is yes.
func waitFor(t testing.TB, what string, within time.Duration, yes func() bool) {
	t.Helper()
	deadline := time.After(within)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !yes() {
		select {
		case <-deadline:
			t.Fatalf("within %v: not %s", within, what)
		case <-tick.C:
		}
	}
}

// demoRun is a running demo.
type demoRun struct {
	*process
	data, url string
	district  *district.District
}

// startDemo returns when the demo's page can be reached.
func startDemo(t testing.TB, data string, more ...string) *demoRun {
	t.Helper()
	args := append([]string{"demo", "--json", "--listen", "127.0.0.1:0", "--data", data}, more...)
	d := &demoRun{process: start(t, args...), data: data}
	deadline := time.After(startWithin)
	for {
		text, changed := d.err.now()
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, "page "); ok && strings.HasSuffix(line, "\n") {
				d.url, _, _ = strings.Cut(rest, "/ ")
			}
		}
		if d.url != "" {
			break
		}
		select {
		case <-changed:
		case <-d.done:
			t.Fatalf("%s ended before its page was there, exit %d:\n%s", d.name, d.cmd.ProcessState.ExitCode(), d.err)
		case <-deadline:
			t.Fatalf("%s: no page within %v:\n%s", d.name, startWithin, d.err)
		}
	}
	var err error
	if d.district, err = district.Load(data); err != nil {
		t.Fatal(err)
	}
	return d
}

// stop is Ctrl-C; it returns the demo's last word.
func (d *demoRun) stop() demoReport {
	d.t.Helper()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		d.t.Fatal(err)
	}
	return d.report()
}

// report waits for the end and returns the JSON object that is the last line.
func (d *demoRun) report() demoReport {
	d.t.Helper()
	if code := d.exit(startWithin + endWithin); code != 0 {
		d.t.Fatalf("%s: exit %d, want 0; standard error:\n%s", d.name, code, d.err)
	}
	var r demoReport
	dec := json.NewDecoder(strings.NewReader(lastLine(d.out.String())))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		d.t.Fatalf("%s: last line of its output: %v\n%s", d.name, err, d.out)
	}
	return r
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return lines[len(lines)-1]
}

var httpClient = &http.Client{Timeout: 20 * time.Second}

// get returns what the demo serves under a path.
func (d *demoRun) get(path string) ([]byte, error) {
	res, err := httpClient.Get(d.url + path)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(res.Body)
	err = errors.Join(err, res.Body.Close())
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, res.Status, b)
	}
	return b, err
}

// receipt is the JSON form of a receipt, or of a problem (RFC 9457).
type receipt struct {
	Status     string `json:"-"` // STATUS_STORED; empty for a problem
	Commitment []byte `json:"commitment"`
	Salt       []byte `json:"salt"`

	HTTP   int    `json:"-"`
	Detail string `json:"detail"`
	Rule   string `json:"rule"`
	Field  string `json:"field"`
}

// post sends an envelope to path and returns the answer.
func (d *demoRun) post(path, contentType string, body []byte) (receipt, error) {
	res, err := httpClient.Post(d.url+path, contentType, bytes.NewReader(body))
	if err != nil {
		return receipt{}, err
	}
	b, err := io.ReadAll(res.Body)
	if err := errors.Join(err, res.Body.Close()); err != nil {
		return receipt{}, err
	}
	r := receipt{HTTP: res.StatusCode}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w: %s", res.Status, err, b)
	}
	if r.HTTP == http.StatusOK {
		var s struct{ Status string }
		if err := json.Unmarshal(b, &s); err != nil {
			return r, err
		}
		r.Status = s.Status
	}
	return r, nil
}

// store sends an envelope and wants a receipt that covers it.
func (d *demoRun) store(path string, envelope []byte) receipt {
	d.t.Helper()
	r, err := d.post(path, identity.Protobuf, envelope)
	if err != nil {
		d.t.Fatalf("POST %s: %v", path, err)
	}
	if r.HTTP != http.StatusOK || r.Status != "STATUS_STORED" {
		d.t.Fatalf("POST %s: got %+v, want 200 and STATUS_STORED", path, r)
	}
	if got, want := r.Commitment, commitment(r.Salt, envelope); !bytes.Equal(got, want) {
		d.t.Fatalf("POST %s: commitment %x, want %x of what was sent", path, got, want)
	}
	return r
}

// commitment repeats the formula of ledger's documentation.
func commitment(salt, envelope []byte) []byte {
	h := sha256.New()
	h.Write([]byte("stopline commitment v1\n"))
	h.Write(salt)
	h.Write(envelope)
	return h.Sum(nil)
}

// device is a roadside unit of the tests' own.
type device struct {
	district  traffic.DistrictID
	junction  *traffic.Junction
	id        traffic.DeviceID
	key       ed25519.PrivateKey
	boot, seq uint64   // of the newest frame
	prev      [32]byte // its hash
}

// enrol files a new device by the command line.
func (d *demoRun) enrol(junction traffic.JunctionID, id traffic.DeviceID) *device {
	d.t.Helper()
	keyFile := filepath.Join(d.t.TempDir(), "device.key")
	r := stopline(d.t, "enrol", "--data", d.data, "--url", d.url, "--junction", string(junction), "--device", string(id), "--key", keyFile)
	wantExit(d.t, r, exitOK, string(id))
	key, err := district.ReadKey(keyFile)
	if err != nil {
		d.t.Fatal(err)
	}
	return &device{district: d.district.Genesis.District, junction: d.junction(junction), id: id, key: key, boot: 1}
}

// junction returns a definition from the genesis document.
func (d *demoRun) junction(id traffic.JunctionID) *traffic.Junction {
	d.t.Helper()
	reg, err := identity.NewRegistry(&d.district.Genesis)
	if err != nil {
		d.t.Fatal(err)
	}
	j, ok := reg.Junction(id)
	if !ok {
		d.t.Fatalf("junction %s is not in the genesis document", id)
	}
	return j
}

// frame returns the device's next frame: one sent at an event, with nothing in
// it, so that no command rests on it.
func (d *device) frame() *traffic.Frame {
	return &traffic.Frame{
		District: d.district, Junction: d.junction.ID,
		FrameKey: traffic.FrameKey{Device: d.id, BootEpoch: d.boot, Seq: d.seq + 1}, Prev: d.prev,
		Time:   time.Now().UTC(),
		Signal: traffic.Signal{State: traffic.AllOf(traffic.Red, len(d.junction.Groups)), Stage: -1, Mode: traffic.Local},
	}
}

// sign returns the envelope of a frame and changes nothing.
func (d *device) sign(f *traffic.Frame) []byte {
	return identity.Sign(d.key, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(f)).Marshal()
}

// next returns the envelope of the next frame, which counts as sent.
func (d *device) next() []byte {
	f := d.frame()
	d.seq, d.prev = f.Seq, sha256.Sum256(wire.EncodeFrame(f))
	return d.sign(f)
}

// logView is a log as any outsider reads it: C2SP tlog-checkpoint and
// tlog-tiles, parsed here and not with the project's own code.
type logView struct {
	size    int
	root    []byte
	entries [][]byte
	places  map[string][]int // indices of each entry
}

// readLog reads the log with get, which takes paths below the log's own.
func readLog(get func(path string) ([]byte, error)) (*logView, error) {
	b, err := get("checkpoint")
	if err != nil {
		return nil, err
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 4 {
		return nil, fmt.Errorf("checkpoint of %d lines", len(lines))
	}
	v := &logView{places: map[string][]int{}}
	if v.size, err = strconv.Atoi(lines[1]); err != nil {
		return nil, err
	}
	if v.root, err = base64.StdEncoding.DecodeString(lines[2]); err != nil {
		return nil, err
	}
	const width = 256
	for n := 0; n*width < v.size; n++ {
		want := min(width, v.size-n*width)
		name := "tile/entries/" + tileNumber(n)
		b, err := get(name) // full, by now, or partial
		if want < width && err != nil {
			b, err = get(fmt.Sprintf("%s.p/%d", name, want))
		}
		if err != nil {
			return nil, err
		}
		for range want {
			if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
				return nil, fmt.Errorf("%s is cut off", name)
			}
			end := 2 + int(binary.BigEndian.Uint16(b))
			v.places[string(b[2:end])] = append(v.places[string(b[2:end])], len(v.entries))
			v.entries = append(v.entries, b[2:end])
			b = b[end:]
		}
	}
	return v, nil
}

// tileNumber writes n as tlog-tiles does: x001/234.
func tileNumber(n int) string {
	s := fmt.Sprintf("%03d", n%1000)
	for n /= 1000; n > 0; n /= 1000 {
		s = fmt.Sprintf("x%03d/%s", n%1000, s)
	}
	return s
}

// rootAt computes the RFC 6962 root of the first size entries.
func (v *logView) rootAt(t testing.TB, size int) []byte {
	t.Helper()
	if size > len(v.entries) {
		t.Fatalf("the log has %d entries, want %d or more", len(v.entries), size)
	}
	r := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	for _, e := range v.entries[:size] {
		if err := r.Append(rfc6962.DefaultHasher.HashLeaf(e), nil); err != nil {
			t.Fatal(err)
		}
	}
	root, err := r.GetRootHash(nil)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// check compares the checkpoint with the entries, and with an older view.
func (v *logView) check(t testing.TB, old *logView) {
	t.Helper()
	if got := v.rootAt(t, v.size); !bytes.Equal(got, v.root) {
		t.Fatalf("root of the %d entries is %x, the checkpoint says %x", v.size, got, v.root)
	}
	if old == nil {
		return
	}
	if v.size < old.size {
		t.Fatalf("the log has %d entries, it had %d before", v.size, old.size)
	}
	if got := v.rootAt(t, old.size); !bytes.Equal(got, old.root) {
		t.Fatalf("root of the first %d entries is %x, the checkpoint of then says %x", old.size, got, old.root)
	}
}

// find returns the places of a record's commitment.
func (v *logView) find(commitment []byte) []int {
	return v.places[string(append([]byte{1, 1}, commitment...))]
}

func (d *demoRun) log() *logView {
	d.t.Helper()
	v, err := readLog(func(path string) ([]byte, error) { return d.get("/log/" + path) })
	if err != nil {
		d.t.Fatal(err)
	}
	return v
}

// logOf reads the log of a folder.
func logOf(t testing.TB, data string) *logView {
	t.Helper()
	v, err := readLog(func(path string) ([]byte, error) {
		return os.ReadFile(filepath.Join(data, "log", filepath.FromSlash(path)))
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// sealed waits until the served log has every commitment.
func (d *demoRun) sealed(receipts ...receipt) *logView {
	d.t.Helper()
	var v *logView
	waitFor(d.t, "all receipted records in the served log", soon, func() bool {
		v = d.log()
		return !slices.ContainsFunc(receipts, func(r receipt) bool { return len(v.find(r.Commitment)) == 0 })
	})
	v.check(d.t, nil)
	once(d.t, v, receipts)
	return v
}

// obeyed waits until a unit has said, in this start of the demo, that it obeys
// signal-control.
func (d *demoRun) obeyed(boot uint64) {
	d.t.Helper()
	waitFor(d.t, "a junction that obeys", soon, func() bool {
		b, err := d.get("/v1/state")
		if err != nil {
			d.t.Fatal(err)
		}
		var v struct {
			Junctions []struct {
				Signal struct{ Mode traffic.Mode }
				Frame  struct {
					BootEpoch uint64 `json:"boot_epoch"`
				}
			}
		}
		if err := json.Unmarshal(b, &v); err != nil {
			d.t.Fatal(err)
		}
		for _, j := range v.Junctions {
			if j.Frame.BootEpoch == boot && j.Signal.Mode == traffic.Coordinated {
				return true
			}
		}
		return false
	})
}

// once wants every receipt's commitment in the log exactly once.
func once(t testing.TB, v *logView, receipts []receipt) {
	t.Helper()
	for i, r := range receipts {
		if at := v.find(r.Commitment); len(at) != 1 {
			t.Errorf("receipt %d of %d: its commitment %x is at %v in a log of %d, want one place", i, len(receipts), r.Commitment, at, v.size)
		}
	}
}

// tell runs a command that is not ours and wants it to succeed.
func tell(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	b, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, b)
	}
	return string(b)
}
