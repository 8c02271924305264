package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// changed writes the example with one thing changed.
func changed(t *testing.T, old, new string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "plans", "h0202.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(b), old) != 1 {
		t.Fatalf("%q is %d times in the example, want once", old, strings.Count(string(b), old))
	}
	path := filepath.Join(t.TempDir(), "changed.yaml")
	if err := os.WriteFile(path, []byte(strings.Replace(string(b), old, new, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPlanCommand(t *testing.T) {
	good := filepath.Join("testdata", "plans", "h0202.yaml")
	check := func(code int, text string, args ...string) result {
		t.Helper()
		r := inside(t, append([]string{"plan"}, args...)...)
		wantExit(t, r, code, "")
		if !strings.Contains(r.out+r.err, text) {
			t.Errorf("plan %v: got %q and %q, want %q", args, r.out, r.err, text)
		}
		return r
	}
	check(exitOK, "in order by itself; no junction was given", "check", good)
	check(exitOK, "in order for junction h0202", "check", good, "--config", cityName)
	short := changed(t, "ped_clear: 11", "ped_clear: 10.5")
	check(exitOK, "in order by itself", "check", short)
	check(exitFailed, short+`:30: phases[2].ped_clear: 10.5 s: junction h0202 asks for 11 s for "walk`, "check", short, "--config", cityName)
	check(exitFailed, ":40: plans[1].offset: 110 s: must be 0 or more, and less than the cycle of 110 s", "check", changed(t, "offset: 35.5", "offset: 110"))
	check(exitFailed, "there is no plan", "check", changed(t, "plan: peak}", "plan: rush}"))
	check(exitFailed, "is none of those defined", "check", changed(t, "junction: h0202", "junction: h9999"), "--config", cityName)
	r := check(exitFailed, "", "check", good, short, "--config", cityName, "--json")
	var checked []planChecked
	if err := json.Unmarshal([]byte(r.out), &checked); err != nil || len(checked) != 2 || !checked[0].OK || checked[1].OK || checked[1].Problems[0].Line != 30 {
		t.Errorf("got %s, %v", r.out, err)
	}

	other := changed(t, "cycle: 110", "cycle: 110.0")
	if r := check(exitOK, "", "diff", good, other); r.out != "" {
		t.Errorf("another way of writing: got %q, want no difference", r.out)
	}
	later := changed(t, "offset: 35.5", "offset: 36")
	check(exitFailed, "plans.peak.offset: 35.5 → 36\n", "diff", good, later)
	check(exitFailed, `[{"field":"plans.peak.offset","from":"35.5","to":"36"}]`, "diff", good, later, "--json")

	r = check(exitOK, "junction: h0101\n", "export", "h0101", "--config", cityName)
	path := filepath.Join(t.TempDir(), "out.yaml")
	if err := os.WriteFile(path, []byte(r.out), 0o644); err != nil {
		t.Fatal(err)
	}
	check(exitOK, "in order for junction h0101", "check", path, "--config", cityName)

	r = check(exitOK, "", "simulate", good, path, "--for", "5m", "--json")
	var run planRun
	if err := json.Unmarshal([]byte(r.out), &run); err != nil || len(run.Junctions) != 2 || run.Trips != 0 || run.DelayS <= 0 {
		t.Fatalf("got %s, %v", r.out, err)
	}
	vehicles := 0
	for _, m := range run.Junctions[0].Movements {
		vehicles += m.Vehicles
	}
	if vehicles < 20 {
		t.Errorf("got %d vehicles in five minutes, want some", vehicles)
	}
	check(exitOK, "junction h0202", "simulate", good, "--for", "20s")
	check(exitUsage, "", "check")
	check(exitUsage, "", "export", "h0101")
	check(exitUsage, "", "simulate", good, good)
	check(exitUsage, "", "mend", good)
	check(exitFailed, "is not in city", "simulate", changed(t, "junction: h0202", "junction: h9999"))
}
