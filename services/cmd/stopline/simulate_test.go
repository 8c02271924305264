package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// shared returns the path of a shared scenario's configuration. It skips, or
// fails where the environment says so, as the tests of package traci do.
func shared(t *testing.T, name string) string {
	t.Helper()
	optional(t, "sumo", "STOPLINE_REQUIRE_SUMO")
	return sharedFile(t, "scenarios", name, name+".sumocfg")
}

// sharedFile returns the path of a file that lies beside the repository.
func sharedFile(t *testing.T, elem ...string) string {
	t.Helper()
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" {
		root, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		for ; filepath.Dir(root) != root; root = filepath.Dir(root) {
			if _, err := os.Stat(filepath.Join(root, "go.work")); err == nil {
				dir = filepath.Join(filepath.Dir(root), "shared")
				break
			}
		}
	}
	path := filepath.Join(append([]string{dir}, elem...)...)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if os.Getenv("STOPLINE_REQUIRE_SHARED") == "1" {
		t.Fatalf("%s is not there, and STOPLINE_REQUIRE_SHARED=1 says that it must be", path)
	}
	t.Skip("needs the shared data and scenarios (STOPLINE_SHARED, or ../shared beside the repository); STOPLINE_REQUIRE_SHARED=1 makes this a failure")
	return ""
}

// Neither needs SUMO: what is wrong is seen before it is started.
func TestSimulateRefuses(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken.sumocfg")
	if err := os.WriteFile(broken, []byte("<configuration>"), 0o644); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(dir, "none.sumocfg")
	plain := filepath.Join("testdata", "plain", "plain.sumocfg")
	for _, c := range []struct {
		name string
		code int
		text string
		args []string
	}{
		{"no configuration", exitUsage, "--config is needed", nil},
		{"that does not exist", exitFailed, "none.sumocfg: does not exist", []string{"--config", none}},
		{"without signals", exitFailed, "plain.net.xml: has no traffic lights", []string{"--config", plain}},
		{"not XML", exitFailed, "broken.sumocfg: XML syntax error", []string{"--config", broken}},
		{"controller", exitUsage, `--controller: controller "x": must be one of fixed, actuated, maxpressure`, []string{"--config", cityName, "--controller", "x"}},
		{"rules", exitUsage, `--rules: rules "x": must be one of free, resco, deployable, field`, []string{"--config", cityName, "--rules", "x"}},
		{"sensing", exitUsage, `--sensing "x": must be oracle or detectors`, []string{"--config", cityName, "--sensing", "x"}},
		{"seed", exitUsage, "--seed -1: must be 0 to 2147483647", []string{"--config", cityName, "--seed", "-1"}},
		{"unknown option", exitUsage, "stopline simulate -h", []string{"--config", cityName, "--fast"}},
		{"decisions nowhere", exitFailed, filepath.Join("nowhere", "file"), []string{"--config", cityName, "--for", "1s", "--decisions", filepath.Join(dir, "nowhere", "file")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := inside(t, append([]string{"simulate"}, c.args...)...)
			wantExit(t, r, c.code, c.text)
			if r.out != "" {
				t.Errorf("standard output: %q, want nothing", r.out)
			}
		})
	}
	for path, text := range map[string]string{none: "none.sumocfg: does not exist", plain: "plain.net.xml: has no traffic lights"} {
		data := filepath.Join(dir, "data")
		wantExit(t, inside(t, "demo", "--sumo", path, "--data", data, "--for", "1s"), exitFailed, text)
		if _, err := os.Stat(data); err == nil {
			t.Error("the demo left a data folder, want none for a scenario that it refused")
		}
	}
}

// simulateInto runs a simulation and returns its result and its decisions.
func simulateInto(t *testing.T, args ...string) (simulated, []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "decisions")
	r := stopline(t, append([]string{"simulate", "--json", "--decisions", file}, args...)...)
	wantExit(t, r, exitOK)
	var s simulated
	d := json.NewDecoder(strings.NewReader(r.out))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		t.Fatalf("%v in %s", err, r.out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return s, b
}

// lockstepTest wants the same decisions, byte for byte and so the same street,
// from the controller alone and from every service in lockstep.
func lockstepTest(t *testing.T, junctions, seconds int, args ...string) {
	alone, want := simulateInto(t, args...)
	whole, got := simulateInto(t, append(args, "--pipeline")...)
	if !bytes.Equal(got, want) {
		a, b := bytes.Split(want, []byte("\n")), bytes.Split(got, []byte("\n"))
		for i := range min(len(a), len(b)) {
			if !bytes.Equal(a[i], b[i]) {
				t.Fatalf("decision %d of %d: got %s with --pipeline, %s without", i, len(a), b[i], a[i])
			}
		}
		t.Fatalf("got %d decisions with --pipeline, %d without", len(b), len(a))
	}
	// The first interval ends, and is decided on, after a second.
	if n := bytes.Count(want, []byte("\n")); n != alone.Decisions || n != junctions*(seconds-1) {
		t.Errorf("%d decisions written, %d told; want %d junctions × %d s", n, alone.Decisions, junctions, seconds-1)
	}
	if alone.Pipeline || !whole.Pipeline || whole.StaleSteps != 0 || whole.InterlockTrips != 0 || whole.Refused != 0 {
		t.Errorf("got %+v with --pipeline, want nothing stale, tripped or refused", whole)
	}
	alone.Pipeline, alone.WallS, whole.WallS = true, 0, 0
	if alone != whole {
		t.Errorf("got %+v with --pipeline\nwant %+v", whole, alone)
	}
	if stages := strings.Count(string(want), `"stage":0`); stages == bytes.Count(want, []byte("\n")) {
		t.Errorf("all %d decisions are for stage 0: nothing was compared", stages)
	}
}

func TestLockstepCity(t *testing.T) {
	processTest(t)
	lockstepTest(t, 9, 40, "--config", cityName, "--for", "40s", "--seed", "3", "--controller", "maxpressure")
	lockstepTest(t, 9, 15, "--config", cityName, "--for", "15s", "--seed", "4", "--controller", "actuated", "--rules", "field")
	lockstepTest(t, 9, 20, "--config", cityName, "--for", "20s", "--seed", "5", "--controller", "adaptive")
}

func TestLockstepSUMO(t *testing.T) {
	config := shared(t, "ingolstadt1")
	processTest(t)
	lockstepTest(t, 1, 60, "--config", config, "--for", "60s", "--rules", "deployable")
	// Three signals that announce to one another what they let go.
	lockstepTest(t, 3, 40, "--config", shared(t, "cologne3"), "--for", "40s", "--controller", "adaptive", "--rules", "free", "--sensing", "oracle")
}

// The fixed plan's delay over the whole hour is the one that was measured with
// other software: so the driver and the measure are right.
func TestFixedIngolstadt(t *testing.T) {
	config := shared(t, "ingolstadt1")
	processTest(t)
	trips := filepath.Join(t.TempDir(), "trips.xml")
	s, _ := simulateInto(t, "--config", config, "--controller", "fixed", "--rules", "free", "--tripinfo", trips)
	const want, within = 40.7, 0.07
	if math.Abs(s.DelayS-want) > want*within {
		t.Errorf("delay of a trip: got %.1f s, want %.1f s within %.0f %%", s.DelayS, want, within*100)
	}
	if s.Trips == 0 || s.Finished == 0 || s.Finished > s.Trips || s.DurationS <= 0 || s.WaitingS <= 0 || s.WallS <= 0 {
		t.Errorf("got %+v, want trips with durations and waiting times", s)
	}
	if b, err := os.ReadFile(trips); err != nil || !bytes.Contains(b, []byte("<tripinfo ")) {
		t.Errorf("--tripinfo: %d bytes, %v; want SUMO's trips", len(b), err)
	}
	t.Logf("delay %.1f s a trip, %.1f s of wall time", s.DelayS, s.WallS)
}

// Seven real junctions through the whole pipeline in real time.
func TestDemoSUMO(t *testing.T) {
	config := shared(t, "ingolstadt7")
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"), "--sumo", config, "--for", "10s")
	b, err := d.get("/v1/state")
	if err != nil {
		t.Fatal(err)
	}
	var page struct {
		District  string
		Junctions []struct{ ID string }
	}
	if err := json.Unmarshal(b, &page); err != nil || page.District != "ingolstadt7" || len(page.Junctions) != 7 {
		t.Errorf("got district %q with %d junctions (%v), want ingolstadt7 with 7", page.District, len(page.Junctions), err)
	}
	r := d.report()
	if r.Frames.Accepted < 7*5 || r.Frames.Quarantined != 0 || r.Commands.Applied == 0 || r.Interlock.Trips != 0 || r.LogSize != r.SealedSize || !r.Evidence.Verified {
		t.Errorf("the demo ended with %s", lastLine(d.out.String()))
	}
	wantExit(t, stopline(t, "verify", "--policy", r.Evidence.Policy, r.Evidence.Path), exitOK, "PASS")
	wantExit(t, stopline(t, "fsck", d.data), exitOK, "OK: ")
	// The folder belongs to its district.
	wantExit(t, stopline(t, "demo", "--data", d.data, "--for", "1s", "--listen", "127.0.0.1:0"), exitFailed, `holds the district "ingolstadt7", not "harbour"`)
}
