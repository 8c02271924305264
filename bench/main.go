// Command bench loads the gateway of a demo as agencies would, beside the rest of
// the demo on the same machine, and prints how long answers take:
//
//   - live state by gRPC (ghz) and by REST (vegeta) at a fixed rate of requests,
//     whether the gateway is ready for the next or not;
//   - server-sent events to many subscribers;
//   - what putting a reading on record adds to its answer: the same calls, of a
//     method that is recorded each time and of one that is counted by the minute.
//
// With STOPLINE_REQUIRE_TIMES=1 a figure beyond its bound ends it with an error.
// Figures of different machines, and of a machine that does something else at the
// time, cannot be compared.
package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"

	"github.com/stopline-traffic/stopline/api/client"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// load is what is asked.
type load struct {
	rate, subscribers int
	length            time.Duration
	district          string
	junction          string
	address, rest     string
	ghz               string
	key               ed25519.PrivateKey
	beyond            []string // figures that are beyond their bound
}

func run(ctx context.Context) (err error) {
	program := flag.String("program", "../bin/stopline", "stopline, as make build makes it")
	l := &load{}
	flag.IntVar(&l.rate, "rate", 2000, "requests a second")
	flag.IntVar(&l.subscribers, "subscribers", 2000, "subscribers to server-sent events")
	flag.DurationVar(&l.length, "for", 15*time.Second, "how long each part takes")
	flag.Parse()
	dir, err := os.MkdirTemp("", "stopline-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := l.install(ctx, dir); err != nil {
		return err
	}
	end, err := l.demo(ctx, *program, filepath.Join(dir, "district"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if l.key, err = client.KeyFile(filepath.Join(dir, "district", "keys", "client-operator-1.key")); err != nil {
		return err
	}
	if err := l.first(ctx); err != nil {
		return err
	}
	fmt.Printf("%-44s %10s %10s %10s %10s  %s\n", "", "rate/s", "p50", "p95", "p99", "")
	for _, part := range []func(context.Context) error{l.grpc, l.http, l.recorded, l.events} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	if len(l.beyond) > 0 && os.Getenv("STOPLINE_REQUIRE_TIMES") == "1" {
		return fmt.Errorf("beyond their bounds: %s", strings.Join(l.beyond, "; "))
	}
	return nil
}

// demo starts one, and returns what ends it.
func (l *load) demo(ctx context.Context, program, data string) (end func() error, err error) {
	cmd := exec.Command(program, "demo", "--json", "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0", "--data", data)
	said, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = io.Discard
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	end = func() error {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			return err
		}
		return cmd.Wait()
	}
	at := make(chan string, 1)
	go func() {
		defer close(at)
		lines := bufio.NewScanner(said)
		for lines.Scan() {
			if m := regexp.MustCompile(`  api (\S+)`).FindStringSubmatch(lines.Text()); m != nil {
				at <- m[1]
			}
		}
	}()
	select {
	case a, ok := <-at:
		if !ok {
			return nil, errors.Join(errors.New("the demo ended without an address for the API"), cmd.Wait())
		}
		l.address, l.rest = a, "http://"+a
		return end, nil
	case <-time.After(time.Minute):
	case <-ctx.Done():
	}
	return nil, errors.Join(errors.New("the demo has no API after a minute"), end())
}

func (l *load) token(ctx context.Context) (string, error) {
	return client.SelfSigned(l.district, "operator-1", l.key).Token(ctx)
}

// first waits until there are states to be asked for, and picks a junction.
func (l *load) first(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	public, err := client.New(client.Options{Address: l.address, Insecure: true})
	if err != nil {
		return err
	}
	defer func() { _ = public.Close() }() // nothing is on its way any more
	network, err := public.Traffic.GetNetwork(ctx, &pb.GetNetworkRequest{})
	if err != nil {
		return err
	}
	l.district = network.District
	c, err := client.New(client.Options{Address: l.address, Insecure: true, Tokens: client.SelfSigned(l.district, "operator-1", l.key)})
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	for {
		r, err := c.Traffic.ListJunctionStates(ctx, &pb.ListJunctionStatesRequest{}, client.Purpose("operations"))
		if err != nil {
			return err
		}
		if len(r.States) > 0 {
			l.junction = r.States[0].Junction
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("the demo has no states")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// row prints a figure, and notes where its p99 is beyond a bound; 0 is none.
func (l *load) row(what string, rate float64, p50, p95, p99, bound time.Duration, note string) {
	if bound > 0 {
		note = strings.TrimSpace(fmt.Sprintf("p99 ≤ %s %s", bound, note))
		if p99 > bound {
			note += "  BEYOND"
			l.beyond = append(l.beyond, what)
		}
	}
	r := func(d time.Duration) string { return d.Round(10 * time.Microsecond).String() }
	fmt.Printf("%-44s %10.0f %10s %10s %10s  %s\n", what, rate, r(p50), r(p95), r(p99), note)
}

// quantile of sorted durations.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[min(int(q*float64(len(d))), len(d)-1)]
}

// ghz is the version of the tool. Its packages need a gRPC of years ago, so it is a
// program of its own here.
const ghz = "github.com/bojand/ghz/cmd/ghz@v0.93.0"

// install builds ghz into a folder.
func (l *load) install(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "install", ghz)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOWORK=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go install %s: %w\n%s", ghz, err, out)
	}
	l.ghz = filepath.Join(dir, "ghz")
	return nil
}

// call loads one method by gRPC and returns how long answers took, sorted.
func (l *load) call(ctx context.Context, method string, data any, rate int, length time.Duration) ([]time.Duration, float64, error) {
	token, err := l.token(ctx)
	if err != nil {
		return nil, 0, err
	}
	ask, err := json.Marshal(data)
	if err != nil {
		return nil, 0, err
	}
	headers, err := json.Marshal(map[string]string{"authorization": "Bearer " + token, "stopline-purpose": "operations"})
	if err != nil {
		return nil, 0, err
	}
	// Asynchronous: the next call does not wait for the last one's answer.
	cmd := exec.CommandContext(ctx, l.ghz, "--insecure", "--async", "--call", method, "--data", string(ask), "--metadata", string(headers),
		"--rps", strconv.Itoa(rate), "--total", strconv.Itoa(int(float64(rate)*length.Seconds())), "--concurrency", "64", "--connections", "8",
		"--timeout", "20s", "--format", "json", l.address)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, 0, fmt.Errorf("ghz %s: %w", method, err)
	}
	var r struct {
		RPS     float64 `json:"rps"`
		Details []struct {
			Latency time.Duration `json:"latency"`
			Error   string        `json:"error"`
			Status  string        `json:"status"`
		} `json:"details"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, 0, fmt.Errorf("ghz %s: %w", method, err)
	}
	took := make([]time.Duration, 0, len(r.Details))
	for _, d := range r.Details {
		if d.Status != "OK" {
			return nil, 0, fmt.Errorf("ghz %s: an answer was %s: %s", method, d.Status, d.Error)
		}
		took = append(took, d.Latency)
	}
	slices.Sort(took)
	return took, r.RPS, nil
}

func (l *load) grpc(ctx context.Context) error {
	took, rate, err := l.call(ctx, "stopline.v1.TrafficService.GetJunctionState", map[string]any{"junction": l.junction}, l.rate, l.length)
	if err != nil {
		return err
	}
	l.row("live state by gRPC", rate, quantile(took, .5), quantile(took, .95), quantile(took, .99), 10*time.Millisecond, "")
	return nil
}

func (l *load) http(ctx context.Context) error {
	token, err := l.token(ctx)
	if err != nil {
		return err
	}
	target := vegeta.NewStaticTargeter(vegeta.Target{Method: http.MethodGet, URL: l.rest + "/v1/junctions/" + l.junction + "/state",
		Header: http.Header{"Authorization": {"Bearer " + token}, "Stopline-Purpose": {"operations"}}})
	a := vegeta.NewAttacker(vegeta.Connections(256), vegeta.Timeout(20*time.Second), vegeta.HTTP2(false))
	defer a.Stop()
	var m vegeta.Metrics
	for r := range a.Attack(target, vegeta.Rate{Freq: l.rate, Per: time.Second}, l.length, "REST") {
		m.Add(r)
	}
	m.Close()
	if m.Success < 1 {
		return fmt.Errorf("REST: only %.2f%% were answered: %v", 100*m.Success, m.Errors)
	}
	l.row("live state by REST", m.Throughput, m.Latencies.P50, m.Latencies.P95, m.Latencies.P99, 20*time.Millisecond, "")
	return nil
}

// recorded compares two methods that look something up: one is recorded each time.
func (l *load) recorded(ctx context.Context) error {
	var p50 [2]time.Duration
	for i, m := range []struct {
		what, method string
		data         any
	}{
		{"a reading that is counted by the minute", "stopline.v1.TrafficService.GetJunctionState", map[string]any{"junction": l.junction}},
		{"a reading that is recorded each time", "stopline.v1.RegistryService.GetEntry", map[string]any{"type": "junction", "id": l.junction}},
	} {
		took, rate, err := l.call(ctx, m.method, m.data, 100, l.length/2)
		if err != nil {
			return err
		}
		p50[i] = quantile(took, .5)
		l.row(m.what, rate, p50[i], quantile(took, .95), quantile(took, .99), 0, "")
	}
	adds, note := p50[1]-p50[0], "p50 ≤ 5ms"
	if adds > 5*time.Millisecond {
		note += "  BEYOND"
		l.beyond = append(l.beyond, "the access record adds")
	}
	fmt.Printf("%-44s %10s %10s %10s %10s  %s\n", "the access record adds", "", adds.Round(10*time.Microsecond), "", "", note)
	return nil
}

// events has many subscribers follow the states of all junctions.
func (l *load) events(ctx context.Context) error {
	token, err := l.token(ctx)
	if err != nil {
		return err
	}
	c := &http.Client{Transport: &http.Transport{MaxIdleConns: -1, DisableKeepAlives: true}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group sync.WaitGroup
	var mu sync.Mutex
	var gaps []time.Duration
	var opened, failed, counting, got atomic.Int64
	var why atomic.Value
	open := make(chan struct{}, 64) // as many knock at once
	for range l.subscribers {
		group.Go(func() {
			open <- struct{}{}
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.rest+"/v1/states:watch?interval=1s", nil)
			if err == nil {
				req.Header = http.Header{"Authorization": {"Bearer " + token}, "Stopline-Purpose": {"operations"}, "Accept": {"text/event-stream"}}
				var res *http.Response
				if res, err = c.Do(req); err == nil {
					defer func() { _ = res.Body.Close() }() // it is we who end it
					if res.StatusCode != http.StatusOK {
						err = errors.New(res.Status)
					} else {
						<-open
						opened.Add(1)
						lines := bufio.NewReaderSize(res.Body, 64<<10)
						var last time.Time
						var own []time.Duration
						for {
							line, err := lines.ReadSlice('\n')
							if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
								break
							}
							if !strings.HasPrefix(string(line), "data:") {
								continue
							}
							now := time.Now()
							if counting.Load() == 1 && !last.IsZero() {
								got.Add(1)
								own = append(own, now.Sub(last))
							}
							last = now
						}
						mu.Lock()
						gaps = append(gaps, own...)
						mu.Unlock()
						return
					}
				}
			}
			<-open
			failed.Add(1)
			why.Store(err.Error())
		})
	}
	for end := time.Now().Add(2 * time.Minute); opened.Load()+failed.Load() < int64(l.subscribers); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("of %d subscribers %d are there after two minutes", l.subscribers, opened.Load())
		}
	}
	if failed.Load() > 0 {
		return fmt.Errorf("%d of %d subscribers were refused: %v", failed.Load(), l.subscribers, why.Load())
	}
	counting.Store(1)
	start := time.Now()
	select {
	case <-time.After(l.length):
	case <-ctx.Done():
		return ctx.Err()
	}
	counting.Store(0)
	each := float64(got.Load()) / float64(l.subscribers) / time.Since(start).Seconds()
	cancel()
	group.Wait()
	slices.Sort(gaps)
	note := fmt.Sprintf("between events; %.2f events/s each, ≥ 0.9", each)
	if each < 0.9 {
		note += "  BEYOND"
		l.beyond = append(l.beyond, "server-sent events")
	}
	l.row(fmt.Sprintf("%d subscribers to events", l.subscribers), float64(got.Load())/l.length.Seconds(), quantile(gaps, .5), quantile(gaps, .95), quantile(gaps, .99), 0, note)
	return nil
}
