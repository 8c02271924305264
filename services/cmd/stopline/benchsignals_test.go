package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// arterial makes the scenario of testdata/arterial and returns its configuration.
func arterial(t *testing.T) string {
	t.Helper()
	optional(t, "sumo", "STOPLINE_REQUIRE_SUMO")
	optional(t, "netgenerate", "STOPLINE_REQUIRE_SUMO")
	dir := filepath.Join(t.TempDir(), "arterial")
	if out, err := exec.Command("sh", filepath.Join("testdata", "arterial", "make.sh"), dir).CombinedOutput(); err != nil {
		t.Fatalf("make.sh: %v: %s", err, out)
	}
	return filepath.Join(dir, "arterial.sumocfg")
}

// stopsOf is the mean number of stops of trips whose id begins with prefix.
func stopsOf(t *testing.T, trips, prefix string) float64 {
	t.Helper()
	f, err := os.Open(trips)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	n, stops := 0, 0
	for d := xml.NewDecoder(f); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		e, ok := tok.(xml.StartElement)
		if !ok || e.Name.Local != "tripinfo" {
			continue
		}
		at := map[string]string{}
		for _, a := range e.Attr {
			at[a.Name.Local] = a.Value
		}
		if strings.HasPrefix(at["id"], prefix) {
			k, err := strconv.Atoi(at["waitingCount"])
			if err != nil {
				t.Fatal(err)
			}
			n, stops = n+1, stops+k
		}
	}
	if n == 0 {
		t.Fatalf("no trips %q in %s", prefix, trips)
	}
	return float64(stops) / float64(n)
}

// On the arterial a green wave spares three stops in ten, against junctions that
// plan each for itself, and costs nobody else more than it saves.
func TestGreenWave(t *testing.T) {
	if testing.Short() {
		t.Skip("two runs of half an hour")
	}
	config := arterial(t)
	run := func(args ...string) (stops, delay float64) {
		trips := filepath.Join(t.TempDir(), "trips.xml")
		s, _ := simulateInto(t, append([]string{"--config", config, "--controller", "adaptive", "--rules", "free", "--sensing", "detectors", "--for", "30m", "--tripinfo", trips}, args...)...)
		if s.InterlockTrips != 0 || s.StaleSteps != 0 {
			t.Errorf("%v: got %+v, want nothing tripped or stale", args, s)
		}
		return stopsOf(t, trips, "art."), s.DelayS
	}
	alone, aloneDelay := run("--isolated")
	wave, waveDelay := run("--corridor", "longest")
	t.Logf("stops of a trip along the arterial: %.2f alone, %.2f with the green wave; delay of all %.1f s and %.1f s", alone, wave, aloneDelay, waveDelay)
	if wave > 0.7*alone {
		t.Errorf("got %.2f stops, want at most 70 %% of the %.2f without", wave, alone)
	}
	if waveDelay > aloneDelay {
		t.Errorf("got %.1f s of delay, want at most the %.1f s without", waveDelay, aloneDelay)
	}
}

func TestBenchSignals(t *testing.T) {
	config := arterial(t)
	out := filepath.Join(t.TempDir(), "report")
	o := benchOptions{scenarios: filepath.Dir(filepath.Dir(config)), out: out, seeds: 1, workers: 2, controllers: []string{"fixed", "adaptive"},
		tracks: []benchTrack{benchTracks[0]}, plots: true, length: 90 * time.Second}
	var first, second bytes.Buffer
	if err := benchSignals(context.Background(), o, streams{io.Discard, &first}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"results.jsonl", "table.csv", "table.md", "delay-arterial.svg", "queues-arterial-free-oracle.svg", "corridor-arterial.png"} {
		if st, err := os.Stat(filepath.Join(out, name)); err != nil || st.Size() < 100 {
			t.Errorf("%s: got %v, want a file with something in it", name, err)
		}
	}
	if n := strings.Count(first.String(), "s delay in"); n != 2 || !strings.Contains(first.String(), "2 of 2 runs") {
		t.Errorf("got progress %q, want two runs", first.String())
	}
	// What was broken off in the middle of a line is made again, and nothing else.
	path := filepath.Join(out, "results.jsonl")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b[:len(b)-20], 0o644); err != nil {
		t.Fatal(err)
	}
	var table bytes.Buffer
	if err := benchSignals(context.Background(), o, streams{&table, &second}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(second.String(), "1 of 1 runs") {
		t.Errorf("got progress %q, want one run again", second.String())
	}
	if rows := strings.Count(table.String(), "| arterial |"); rows != 2 {
		t.Errorf("got table\n%s\nwant two rows", table.String())
	}
}

func TestBenchRefuses(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"bench"}, "what to measure"},
		{[]string{"bench", "signals"}, "--scenarios and --out"},
		{[]string{"bench", "signals", "--scenarios", "x", "--out", "y", "--seeds", "0", "-j", "0", "--controllers", "magic"}, "--seeds 0"},
		{[]string{"bench", "signals", "--scenarios", "x", "--out", "y", "--tracks", "fast"}, "free-oracle"},
		{[]string{"bench", "signals", "--scenarios", t.TempDir(), "--out", "y"}, "no .sumocfg"},
	} {
		var out, err bytes.Buffer
		if code := Main(context.Background(), c.args, streams{&out, &err}); code != exitUsage || !strings.Contains(err.String(), c.want) {
			t.Errorf("%v: got %d %q, want %d and %q", c.args, code, err.String(), exitUsage, c.want)
		}
	}
}

func TestLongestCorridor(t *testing.T) {
	j := func(id traffic.JunctionID, to map[traffic.JunctionID]int64) *traffic.Junction {
		j := &traffic.Junction{ID: id}
		for k, d := range to {
			j.Lanes = append(j.Lanes, traffic.Lane{ID: traffic.LaneID(string(id) + string(k)), From: id, To: k, AheadCM: d})
		}
		return j
	}
	c := longestCorridor([]*traffic.Junction{
		j("a", map[traffic.JunctionID]int64{"b": 10000}), j("b", map[traffic.JunctionID]int64{"a": 10000, "c": 30000, "d": 20000}),
		j("c", nil), j("d", map[traffic.JunctionID]int64{"b": 20000}), j("e", nil)})
	if len(c.ids) != 3 || c.ids[0] != "d" && c.ids[0] != "a" || c.ids[2] != "c" || c.at[2] != c.at[1]+300 {
		t.Errorf("got %v at %v, want a chain of three that ends in c", c.ids, c.at)
	}
}
