package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/audit"
)

// auditFolder writes a data folder in which junction J1 runs for some seconds.
func auditFolder(t *testing.T) string {
	t.Helper()
	d := ledgertest.New("audit command", 4)
	c := d.NewChain()
	at := func(n int) time.Time { return ledgertest.Start.Add(time.Duration(n) * time.Second) }
	before := d.FrameAfter(nil, 1, 1, at(1))
	c.Decide([]ledgertest.Record{before})
	for n := 1; n < 10; n++ {
		command := d.CommandOn(uint64(n), uint64(n), 1, uint64(n), at(n).Add(300*time.Millisecond))
		before = d.FrameWith(&before, 1, uint64(n+1), at(n+1), ledgertest.Showed("G", uint64(n), ""))
		c.Decide([]ledgertest.Record{command, before})
	}
	c.Decide()
	dir := t.TempDir()
	for name, b := range c.Folder(len(c.Blocks)) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestAuditCommand(t *testing.T) {
	dir := auditFolder(t)
	policy, chain, frames := filepath.Join(dir, "policy"), filepath.Join(t.TempDir(), "chain.zip"), filepath.Join(t.TempDir(), "frames.zip")
	data := []string{"--data", dir}
	for _, tc := range []struct {
		name string
		args []string
		code int
		want []string // in what it prints, or in its error
	}{
		{"query", []string{"query"}, 0, []string{"RECORD", "device rsu-J1", "stage 1; applied; extend green: vehicle present"}},
		{"a page", []string{"query", "--kind", "command", "--limit", "3"}, 0, []string{"there are more: --after "}},
		{"filters", []string{"query", "--junction", "J1", "--from", "08:00:03", "--to", "08:00:05"}, 0, []string{"2026-11-01 08:00:04.300"}},
		{"nothing found", []string{"query", "--case", "7"}, 0, []string{"RECORD"}},
		{"chain", []string{"chain", "--junction", "J1", "--at", "08:00:05.5", "--out", chain}, 0,
			[]string{"the newest command to J1 was number 5", "the junction applied it", "reading", "decision", "response", "service signal-control", "proof of all of it: " + chain}},
		{"RFC 3339", []string{"chain", "--junction", "J1", "--at", "2026-11-01T08:00:05.5Z"}, 0, []string{"number 5"}},
		{"bundle", []string{"bundle", "--out", frames, "--unbroken", "rsu-J1", "1", "13"}, 0, []string{"stopline verify"}},
		{"alarms", []string{"alarms"}, 0, []string{"nothing is wrong"}},
		{"rebuild", []string{"rebuild"}, 0, []string{"19 records of 11 blocks"}},
		{"no verb", nil, 2, []string{"query, chain"}},
		{"unknown verb", []string{"guess"}, 2, []string{"guess"}},
		{"bad filter", []string{"query", "--kind", "nonsense"}, 2, []string{"kind"}},
		{"bad time", []string{"query", "--from", "yesterday"}, 2, []string{"--from"}},
		{"chain without a time", []string{"chain", "--junction", "J1"}, 2, []string{"--at"}},
		{"chain of nobody", []string{"chain", "--junction", "J9", "--at", "08:00:05"}, 1, []string{"J9"}},
		{"bundle of nothing", []string{"bundle", "--out", frames}, 2, []string{"record"}},
		{"bundle of a word", []string{"bundle", "--out", frames, "x"}, 2, []string{"leaf"}},
		{"bundle of what is not there", []string{"bundle", "--out", frames, "9999"}, 1, []string{"9999"}},
		{"arguments", []string{"query", "x"}, 2, []string{"no arguments"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, errs strings.Builder
			code := Main(t.Context(), append(append([]string{"audit"}, tc.args...), data...), streams{&out, &errs})
			if code != tc.code {
				t.Fatalf("got exit %d, want %d\n%s%s", code, tc.code, out.String(), errs.String())
			}
			for _, want := range tc.want {
				if !strings.Contains(out.String()+errs.String(), want) {
					t.Errorf("%q is missing in\n%s%s", want, out.String(), errs.String())
				}
			}
		})
	}
	for file, want := range map[string]string{chain: "nothing that device \"rsu-J1\" signed between its frames 5 and 6", frames: "between its frames 1 and 5"} {
		var out, errs strings.Builder
		if code := Main(t.Context(), []string{"verify", "--policy", policy, file}, streams{&out, &errs}); code != 0 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: got exit %d, want 0 and %q\n%s%s", file, code, want, out.String(), errs.String())
		}
	}
	var out, errs strings.Builder
	if code := Main(t.Context(), append([]string{"audit", "chain", "--junction", "J1", "--at", "08:00:05.5", "--json"}, data...), streams{&out, &errs}); code != 0 {
		t.Fatalf("got exit %d\n%s", code, errs.String())
	}
	var c audit.Chain
	if err := json.Unmarshal([]byte(out.String()), &c); err != nil || len(c.Steps) != 3 || !c.Provable {
		t.Errorf("JSON: got %+v, %v, want three steps", c, err)
	}
	errs.Reset()
	if code := Main(t.Context(), []string{"audit", "query", "--data", t.TempDir()}, streams{&out, &errs}); code != 2 || !strings.Contains(errs.String(), "no data folder") {
		t.Errorf("an empty folder: got exit %d, %s, want 2", code, errs.String())
	}
}
