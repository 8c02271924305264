package ingest

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// Far more connections at once than are let in: each is let in or told no, the
// services do not notice, and there is room again afterwards.
func TestManyDevicesAtOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("two thousand connections; not with -short")
	}
	const most, n = 100, 1000
	s, b := mqttDistrict(t, most)
	running(t, b, nil)
	for round := range 2 {
		in, refused := storm(t, s.MQTTAddr(), n)
		if len(in) > most || len(in) == 0 || len(in)+refused != n {
			t.Fatalf("round %d: %d connections let in and %d refused, want at most %d, and %d together", round, len(in), refused, most, n)
		}
		for _, c := range in[:3] {
			if err := c.frame(round); err != nil {
				t.Errorf("round %d: a device that was let in: %v", round, err)
			}
		}
		for _, c := range in {
			_ = c.Close() // not politely, too
		}
		until(t, "the server to see that they are gone", func() bool { return s.DeviceCounts().Connected == 0 })
	}
	if c := s.DeviceCounts(); c.Refused[bus.DeviceFull] == 0 {
		t.Errorf("got %+v, want some refused because of the bound", c)
	}
}

// loadDevice is one device of a load.
type loadDevice struct {
	*servicetest.MQTT
	id traffic.DeviceID
}

// frame sends one frame with QoS 1 and waits for its receipt.
func (d *loadDevice) frame(n int) error {
	raw := identity.Sign(deviceKey, identity.KindFrame, identity.Protobuf, frame(string(d.id), uint64(n+1), 1)).Marshal()
	want := sha256.Sum256(raw)
	if _, err := d.Publish(topic.MQTT(topic.DeviceUp(district, d.id)), 1, raw); err != nil {
		return err
	}
	if err := errors.Join(d.Conn.SetDeadline(time.Now().Add(time.Minute)), d.Flush()); err != nil {
		return err
	}
	for {
		kind, body, err := d.Read()
		if err != nil {
			return err
		}
		if kind != 0x30 {
			continue
		}
		var r pb.Receipt
		if err := proto.Unmarshal(body, &r); err != nil {
			return err
		}
		if [32]byte(r.Digest) == want && r.Status == pb.Receipt_STATUS_STORED {
			return nil
		}
	}
}

// storm connects n devices at once and returns those that were let in, subscribed.
func storm(t testing.TB, addr string, n int) (in []*loadDevice, refused int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		id := traffic.DeviceID("load-" + strconv.Itoa(i))
		token := deviceToken(t, id)
		wg.Add(1)
		go func() {
			defer wg.Done()
			c, err := servicetest.DialMQTT(addr, topic.Token(string(id)), string(id), token)
			if err == nil {
				if err = c.Subscribe(topic.MQTT(topic.DeviceDown(district, id)), 0); err != nil {
					_ = c.Close() // the first error counts
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				refused++
				return
			}
			in = append(in, &loadDevice{c, id})
		}()
	}
	wg.Wait()
	return in, refused
}

// Environment of the load test: it takes a minute, and the clients are another
// process, because one may not open so many files.
const (
	loadEnv       = "STOPLINE_LOAD"        // 1: run it
	loadClientEnv = "STOPLINE_LOAD_CLIENT" // set by the test itself: address and number
)

// Ten thousand devices connected and sending: memory rises with the first of
// their frames and is flat from then on. Then ten thousand more come to a house
// that is full.
func TestTenThousandDevices(t *testing.T) {
	if to := os.Getenv(loadClientEnv); to != "" {
		loadClient(t, to)
		return
	}
	if os.Getenv(loadEnv) != "1" {
		t.Skipf("%s=1 runs it; takes a minute and twice 20,000 open files", loadEnv)
	}
	const devices, rounds = 10000, 8
	s, b := mqttDistrict(t, devices)
	sv := running(t, b, nil)
	first := startLoad(t, s.MQTTAddr(), devices)
	if got := first.say(t, "connect"); got != fmt.Sprintf("%d in, 0 refused", devices) {
		t.Fatalf("got %q, want all in; %+v", got, s.DeviceCounts())
	}
	idle := residentMB(t)
	var resident []int
	for range rounds {
		began := time.Now()
		if got := first.say(t, "frame"); got != "ok" {
			t.Fatalf("got %q", got)
		}
		resident = append(resident, residentMB(t))
		t.Logf("%d frames with receipts in %v, resident memory %d MB", devices, time.Since(began).Round(time.Millisecond), resident[len(resident)-1])
	}
	t.Logf("resident memory with %d idle devices %d MB, after frames %v MB; %+v", devices, idle, resident, s.DeviceCounts())
	half := resident[rounds/2]
	if last := resident[rounds-1]; last > half+half/10 {
		t.Errorf("resident memory goes on rising, %v MB", resident)
	}
	second := startLoad(t, s.MQTTAddr(), devices)
	if got := second.say(t, "connect"); got != fmt.Sprintf("0 in, %d refused", devices) {
		t.Errorf("a full house: got %q, want all refused", got)
	}
	t.Logf("after %d refusals resident memory %d MB; %+v", devices, residentMB(t), s.DeviceCounts().Refused)
	if got := first.say(t, "frame"); got != "ok" {
		t.Errorf("after the refusals: got %q", got)
	}
	if c := sv.Counts(); c.Stored != (rounds+1)*devices {
		t.Errorf("got %d stored, want %d", c.Stored, (rounds+1)*devices)
	}
}

// residentMB is how much memory this process has, after what is garbage is gone.
func residentMB(t *testing.T) int {
	t.Helper()
	runtime.GC()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kb / 1024
		}
	}
	t.Skip("no VmRSS")
	return 0
}

// load is a process with devices, told what to do by lines.
type load struct {
	in  io.WriteCloser
	out *bufio.Scanner
}

func startLoad(t *testing.T, addr string, n int) *load {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestTenThousandDevices$", "-test.timeout=10m")
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", loadClientEnv, addr, n))
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(in.Close(), c.Wait()); err != nil {
			t.Errorf("the load's process: %v", err)
		}
	})
	return &load{in, bufio.NewScanner(out)}
}

// say tells the process to do something and returns what it says then.
func (l *load) say(t *testing.T, what string) string {
	t.Helper()
	if _, err := io.WriteString(l.in, what+"\n"); err != nil {
		t.Fatal(err)
	}
	for l.out.Scan() {
		if said, ok := strings.CutPrefix(l.out.Text(), "load: "); ok {
			return said
		}
	}
	t.Fatalf("the load's process has ended: %v", l.out.Err())
	return ""
}

func loadClient(t *testing.T, to string) {
	addr, count, _ := strings.Cut(to, " ")
	n, err := strconv.Atoi(count)
	if err != nil {
		t.Fatal(err)
	}
	var in []*loadDevice
	round := 0
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		said := "?"
		switch orders.Text() {
		case "connect":
			var refused int
			in, refused = storm(t, addr, n)
			said = fmt.Sprintf("%d in, %d refused", len(in), refused)
		case "frame":
			var failed atomic.Value
			var wg sync.WaitGroup
			for _, d := range in {
				wg.Add(1)
				go func() {
					defer wg.Done()
					if err := d.frame(round); err != nil {
						failed.Store(fmt.Sprintf("%s: %v", d.id, err))
					}
				}()
			}
			wg.Wait()
			round++
			said = "ok"
			if f := failed.Load(); f != nil {
				said = f.(string)
			}
		}
		fmt.Println("load: " + said)
	}
}
