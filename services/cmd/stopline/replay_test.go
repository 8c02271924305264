package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// logFile writes a log of two controllers over so many seconds, three events a
// second each, and returns how many events that are.
func logFile(t *testing.T, path string, seconds int) (events int) {
	t.Helper()
	var b bytes.Buffer
	b.WriteString("TimeStamp,DeviceId,EventId,Parameter\n")
	for s := range seconds {
		for _, tenth := range []int{0, 4, 9} {
			at := time.Date(2026, 11, 2, 8, 0, s, tenth*1e8, time.UTC).UnixNano()
			for _, device := range []int{7, 12} {
				fmt.Fprintf(&b, "%d,%d,%d,%d\n", at, device, 81+s%2, 1+tenth)
				events++
			}
		}
	}
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return events
}

func replayed(t *testing.T, r result) replayReport {
	t.Helper()
	var rep replayReport
	dec := json.NewDecoder(bytes.NewReader([]byte(lastLine(r.out))))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rep); err != nil {
		t.Fatalf("last line: %v\n%s", err, r)
	}
	return rep
}

// A log goes through the whole district, its events are all in the sealed log,
// and what proves them says that the controller did not.
func TestReplay(t *testing.T) {
	processTest(t)
	dir := t.TempDir()
	data, log := filepath.Join(dir, "district"), filepath.Join(dir, "log.csv")
	events := logFile(t, log, 60)
	r := stopline(t, "replay", "--hires", log, "--data", data, "--json")
	wantExit(t, r, exitOK)
	first := replayed(t, r)
	if first.Events != uint64(events) || first.EventsInLog != uint64(events) || first.Frames != 120 || first.Accepted != 120 || len(first.Quarantined) != 0 {
		t.Errorf("got %+v, want %d events, all of them in the log, in 120 records", first, events)
	}
	if first.LogSize != first.SealedSize || first.LogSize != 120+first.Blocks || !first.Evidence.Verified {
		t.Errorf("got log size %d, sealed %d, %d blocks, verified %v; want a leaf for each record and block, sealed and proven",
			first.LogSize, first.SealedSize, first.Blocks, first.Evidence.Verified)
	}
	wantExit(t, inside(t, "fsck", data), exitOK, "OK: ")
	wantExit(t, inside(t, "verify", "--policy", first.Evidence.Policy, first.Evidence.Path), exitOK,
		"PASS", "service importer", `the log "log.csv"`, "the controller did not sign them", "the controller did not\n")

	// The same log again is another run, on the same district.
	r = stopline(t, "replay", "--hires", log, "--hires", log, "--data", data, "--json")
	wantExit(t, r, exitOK)
	again := replayed(t, r)
	if again.Run <= first.Run || again.EventsInLog != 2*uint64(events) || again.Frames != 240 || again.LogSize <= first.LogSize+240 {
		t.Errorf("got %+v, want a later run with the log's events twice, behind those of the first", again)
	}
	wantExit(t, inside(t, "fsck", data), exitOK, "OK: ")

	// A log that is cut off is brought in up to there, and the command says so.
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil { // and no end
		t.Fatal(err)
	}
	cut := filepath.Join(dir, "cut.csv.gz")
	if err := os.WriteFile(cut, z.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	r = stopline(t, "replay", "--hires", cut, "--data", data, "--json")
	wantExit(t, r, exitFailed, "cut.csv.gz", "imported up to there")
	if rep := replayed(t, r); rep.EventsInLog != uint64(events) || rep.Logs[0].Error == "" {
		t.Errorf("got %+v, want all whole lines in the log and the error named", rep)
	}
}

func TestReplayPace(t *testing.T) {
	processTest(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "log.csv")
	logFile(t, log, 31)
	r := stopline(t, "replay", "--hires", log, "--data", filepath.Join(dir, "d"), "--speed", "10", "--json")
	wantExit(t, r, exitOK)
	if rep := replayed(t, r); rep.Seconds < 2.9 {
		t.Errorf("30 s of log at ten times its pace: took %.2f s, want 3 s at least", rep.Seconds)
	}
}

func TestReplayRefuses(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log.csv")
	logFile(t, log, 1)
	bad := filepath.Join(dir, "bad.csv")
	if err := os.WriteFile(bad, []byte("TimeStamp,DeviceId,EventId,Parameter\nyesterday,1,2,3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		args []string
		code int
		text string
	}{
		{"no log", nil, exitUsage, "--hires"},
		{"an argument", []string{"--hires", log, "more"}, exitUsage, "takes no arguments"},
		{"speed", []string{"--hires", log, "--speed", "fast"}, exitUsage, "--speed"},
		{"speed 0", []string{"--hires", log, "--speed", "0"}, exitUsage, "--speed"},
		{"zone", []string{"--hires", log, "--zone", "Nowhere/City"}, exitUsage, "--zone"},
		{"no such file", []string{"--hires", filepath.Join(dir, "none.csv")}, exitFailed, "none.csv"},
		{"nothing readable", []string{"--hires", bad}, exitFailed, "line 2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wantExit(t, inside(t, append([]string{"replay"}, tc.args...)...), tc.code, tc.text)
		})
	}
}

// The three Oregon signals: 246,413 events, all in the sealed log.
func TestReplayOregon(t *testing.T) {
	processTest(t)
	log := sharedFile(t, "data", "hires-odot", "odot_hires_test_data.csv.gz")
	r := stopline(t, "replay", "--hires", log, "--data", filepath.Join(t.TempDir(), "d"), "--json")
	wantExit(t, r, exitOK)
	rep := replayed(t, r)
	if rep.Events != 246_413 || rep.EventsInLog != rep.Events || rep.Frames != 30_623 || rep.Accepted != rep.Frames || len(rep.Quarantined) != 0 {
		t.Errorf("got %+v, want 246413 events in 30623 records, all accepted", rep)
	}
	t.Logf("%.0f records/s, %.0f events/s, %d MB", rep.FramesPerSecond, rep.EventsPerSecond, rep.PeakRSSMB)
}
