package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/hires"
)

// One green of phase 2 that gaps out, one arrival on it, one after; channel 10.
const smallLog = `TimeStamp,DeviceId,EventId,Parameter
2024-05-13 15:00:00,7,10,2
2024-05-13 15:00:10,7,1,2
2024-05-13 15:00:20,7,82,10
2024-05-13 15:00:29,7,4,2
2024-05-13 15:00:30,7,8,2
2024-05-13 15:00:34,7,10,2
2024-05-13 15:16:40,7,82,10
`

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func wantOutput(t *testing.T, r result, want string) {
	t.Helper()
	if r.code != exitOK || r.out != want {
		t.Errorf("got %v\nwant\n%s", r, want)
	}
}

func TestMeasures(t *testing.T) {
	log, conf := file(t, "log.csv", smallLog), file(t, "conf.csv", "DeviceId,Phase,Parameter,Function\n7,2,10,Advance\n")

	wantOutput(t, inside(t, "measures", "--measure", "terminations", log), "time,device,phase,termination,total\n2024-05-13T15:00:00Z,7,2,GapOut,1\n")
	aog := inside(t, "measures", log, "--measure", "aog", "--config", conf, "--time", "us")
	wantOutput(t, aog, "time,device,phase,actuations,green_share,on_green\n1715612400000000,7,2,1,1,1\n1715613300000000,7,2,1,0,0\n")
	wantOutput(t, inside(t, "measures", "--measure", "volumes", "--bin", "1h", "--zone", "America/Denver", log),
		"time,device,detector,actuations\n2024-05-13T21:00:00Z,7,10,2\n")
	wantOutput(t, inside(t, "measures", "--measure", "volumes", "--from", "2024-05-13T15:00:20Z", "--to", "2024-05-13 15:16", log),
		"time,device,detector,actuations\n2024-05-13T15:00:00Z,7,10,1\n")
	wantOutput(t, inside(t, "measures", "--measure", "terminations, pcd", log),
		"# terminations\ntime,device,phase,termination,total\n2024-05-13T15:00:00Z,7,2,GapOut,1\n"+
			"# pcd\nred_start,device,phase,green_start_s,yellow_start_s,cycle_s,arrivals,on_green\n2024-05-13T15:00:00Z,7,2,10,30,34,0,0\n")

	// All of them: without a configuration those that need none, and one line
	// says which are missing.
	r := inside(t, "measures", log)
	wantExit(t, r, exitOK, "# terminations\n", "# pcd\n", "without --config, left out: aog split-failures")
	if strings.Contains(r.out, "# aog") {
		t.Errorf("got arrivals on green without a configuration: %s", r.out)
	}
	r = inside(t, "measures", "--config", conf, "--format", "json", log)
	wantExit(t, r, exitOK, "split-failures: needs a detector with function Presence")
	var got map[string][]map[string]any
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		t.Fatalf("%v in %s", err, r.out)
	}
	if len(got["aog"]) != 2 || got["aog"][0]["green_share"] != 1.0 || got["aog"][0]["time"] != "2024-05-13T15:00:00Z" || got["split-failures"] != nil {
		t.Errorf("got %v", got)
	}

	// One file a measure.
	dir := filepath.Join(t.TempDir(), "new", "out")
	for _, format := range []string{"csv", "json"} {
		if r := inside(t, "measures", "--config", conf, "--time", "us", "--format", format, "--out", dir, log); r.code != exitOK || r.out != "" {
			t.Errorf("got %v, want nothing on standard output", r)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "aog.csv"))
	if err != nil || string(b) != aog.out {
		t.Errorf("got %s, %v, want what standard output has", b, err)
	}
	if b, err = os.ReadFile(filepath.Join(dir, "aog.json")); err != nil || json.Unmarshal(b, &got) != nil {
		t.Errorf("got %s, %v", b, err)
	}
	if all, err := filepath.Glob(filepath.Join(dir, "*.csv")); err != nil || len(all) != len(hires.Measures())-4 {
		t.Errorf("got %v, %v, want all measures but four", all, err)
	}
}

// Several logs, from files and from standard input, are one.
func TestMeasuresOfSeveralFiles(t *testing.T) {
	lines := strings.SplitAfter(smallLog, "\n")
	first, second := file(t, "1.csv", strings.Join(lines[:5], "")), file(t, "2.csv", lines[0]+strings.Join(lines[5:], ""))
	want := inside(t, "measures", file(t, "log.csv", smallLog))
	wantOutput(t, inside(t, "measures", first, second), want.out)

	in, err := os.Open(first)
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdin
	os.Stdin = in
	wantOutput(t, inside(t, "measures", "-", second), want.out)
	os.Stdin = old
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}

	r := inside(t, "measures", second, first)
	wantExit(t, r, exitFailed, "4 of 7 events are earlier than one before them, the first of device 7 at 2024-05-13T15:00:00Z", "--sort")
	if r.out != "" {
		t.Errorf("got wrong tables: %s", r.out)
	}
	wantOutput(t, inside(t, "measures", "--sort", second, first), want.out)
}

func TestMeasuresRefuses(t *testing.T) {
	log, conf := file(t, "log.csv", smallLog), file(t, "conf.csv", "DeviceId,Phase,Parameter,Function\n7,2,10,Advance\n")
	for _, c := range []struct {
		args []string
		code int
		text string
	}{
		{nil, exitUsage, "a log is needed"},
		{[]string{"-", "-"}, exitUsage, "standard input is named twice"},
		{[]string{"none.csv"}, exitUsage, "none.csv"},
		{[]string{t.TempDir()}, exitUsage, "is a folder"},
		{[]string{"--format", "xml", "--time", "s", log}, exitUsage, `--time "s"`},
		{[]string{"--measure", "delay", log}, exitUsage, `no measure "delay"; there are terminations`},
		{[]string{"--measure", "aog", log}, exitUsage, "measure aog needs a detector with function Advance in the detector configuration\nmeasures: --config"},
		{[]string{"--measure", "turns", "--config", conf, log}, exitUsage, "measure turns needs a detector with a movement"},
		{[]string{"--config", "none.csv", log}, exitUsage, "--config: open none.csv"},
		{[]string{"--config", log, log}, exitUsage, `line 1: no column is called "TimeStamp"`},
		{[]string{"--bin", "1ms", log}, exitUsage, "bin 1ms"},
		{[]string{"--bin", "0", log}, exitUsage, "--bin 0: must be more than 0"},
		{[]string{"--red-occupancy", "2", log}, exitUsage, "red occupancy 2"},
		{[]string{"--from", "noon", log}, exitUsage, `--from "noon": is not a time`},
		{[]string{"--from", "1822-01-01", log}, exitUsage, "must be from 1971"},
		{[]string{"--from", "2024-05-14", "--to", "2024-05-13", log}, exitUsage, "must be before --to"},
		{[]string{"--zone", "Mars/Base", log}, exitUsage, "--zone"},
		{[]string{"--out", log, log}, exitFailed, log},
		{[]string{file(t, "bad.csv", "no log\nat all\n")}, exitFailed, "bad.csv"},
	} {
		r := inside(t, append([]string{"measures"}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.err, c.text) || r.out != "" {
			t.Errorf("measures %s: got %v\nwant exit %d and %q on standard error only", strings.Join(c.args, " "), r, c.code, c.text)
		}
	}
	// A log that breaks off is measured up to there.
	r := inside(t, "measures", "--measure", "terminations", file(t, "cut.csv", smallLog+"2024-05-13 15:17:00,7,eighty,2\n"))
	if r.code != exitFailed || !strings.Contains(r.err, "cut.csv: line 9: EventId") || !strings.Contains(r.out, "GapOut,1\n") {
		t.Errorf("got %v\nwant exit 1, the line, and the table up to there", r)
	}
}

// The command gives Oregon's golden terminations, line by line.
func TestMeasuresGolden(t *testing.T) {
	b, err := os.ReadFile(sharedFile(t, "data", "hires-odot", "odot_expected_terminations.csv"))
	if err != nil {
		t.Fatal(err)
	}
	r := inside(t, "measures", "--measure", "terminations", "--time", "us", sharedFile(t, "data", "hires-odot", "odot_hires_test_data.csv.gz"))
	wantExit(t, r, exitOK)
	sorted := func(s string) []string {
		l := strings.Split(strings.TrimSpace(strings.ReplaceAll(s, "\r", "")), "\n")[1:]
		slices.Sort(l)
		return l
	}
	if got, want := sorted(r.out), sorted(string(b)); !slices.Equal(got, want) || len(want) != 334 {
		t.Errorf("got %d rows, want the %d golden ones", len(got), len(want))
	}
}
