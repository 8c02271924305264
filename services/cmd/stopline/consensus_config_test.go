package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// written makes a district and its validators' configurations, and runs nothing.
func written(t *testing.T) (dir string) {
	t.Helper()
	root := t.TempDir()
	data := filepath.Join(root, "district")
	if _, err := district.Open(data, district.Options{ID: "harbour", Created: time.Now()}); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(root, "consortium")
	wantExit(t, inside(t, "consensus", "--write-config", dir, "--data", data, "--nats", "nats://127.0.0.1:4222"), exitOK)
	return dir
}

func TestValidatorConfig(t *testing.T) {
	dir := written(t)
	for n, department := range map[uint64]string{1: "traffic", 2: "police", 3: "ambulance", 4: "audit"} {
		r := inside(t, "consensus", "--check", "--config", filepath.Join(dir, topic.ValidatorUser(n), "validator.yaml"))
		wantExit(t, r, exitOK, fmt.Sprintf("OK: validator %d (%s) of harbour, one of 4 at its beginning, quorum 3\n", n, department))
	}
	// Secrets are their owner's.
	for _, f := range []string{"nats.conf", "validator-1/vote.key", "validator-1/cosign.key", "validator-1/nats.nk", "users/ingest.nk"} {
		if s, err := os.Stat(filepath.Join(dir, f)); err != nil || s.Mode().Perm() != 0o600 {
			t.Errorf("%s: got %v, %v, want mode 0600", f, s, err)
		}
	}
	own := filepath.Join(dir, "validator-1")
	good, err := os.ReadFile(filepath.Join(own, "validator.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(s string) string
		want   []string
	}{
		"unknown fields, with their lines, and everything else at once": {
			func(s string) string {
				return strings.Replace(s, "number: 1", "nmuber: 1\ncolour: red", 1) + "timing:\n    heartbeat: soon\n"
			},
			[]string{"validator.yaml:2: field nmuber not found", "validator.yaml:3: field colour not found", "`soon` into time.Duration", "number: must be given"},
		},
		"empty":         {func(string) string { return "" }, []string{"validator.yaml: is empty"}},
		"not YAML":      {func(string) string { return "a: [" }, []string{"validator.yaml: yaml: line 1"}},
		"two documents": {func(s string) string { return s + "---\ndistrict: x\n" }, []string{"must hold one document"}},
		"a field twice": {func(s string) string { return s + "number: 2\n" }, []string{"already defined"}},
		"nothing given": {
			func(string) string { return "log_level: info\n" },
			[]string{"district: must be given", "number: must be given", "genesis: must be given", "vote_key: must be given", "cosign_key: must be given", "data: must be given", "nats.url: must be given"},
		},
		"another's number": {func(s string) string { return strings.Replace(s, "number: 1", "number: 2", 1) },
			[]string{"validator.yaml:3: genesis: ", "validator 2 has another vote key", "validator 2 has another cosigning key"}},
		"another district": {func(s string) string { return strings.Replace(s, "harbour", "airport", 1) },
			[]string{`validator.yaml:1: district: "airport", the genesis document is that of "harbour"`}},
		"keys that are not there": {func(s string) string {
			return strings.ReplaceAll(s, "nats.nk", "gone.nk") + "next_vote_key: gone.key\n"
		},
			[]string{"nats.nkey: ", "gone.nk", "next_vote_key: ", "gone.key"}},
		"a key for both": {func(s string) string { return strings.Replace(s, "cosign.key", "vote.key", 1) }, []string{"another cosigning key"}},
		"level, address, times": {
			func(s string) string {
				return strings.Replace(strings.Replace(s, "log_level: info", "log_level: loud", 1), "127.0.0.1:9101", "9101", 1)
			},
			[]string{`log_level: "loud", must be debug, info, warn or error`, "health: "},
		},
		"times": {func(s string) string {
			return s + "timing: {heartbeat: -1s, view_change: 1s, view_change_resend: 2s}\n"
		},
			[]string{"Timing.Heartbeat: must not be negative", "Timing.ViewChangeResend"}},
		"two ways to be known": {func(s string) string {
			return strings.Replace(s, "nkey: nats.nk", "nkey: nats.nk\n    creds: nats.nk\n    cert: nats.nk", 1)
		},
			[]string{"nats.creds: must not be given beside nats.nkey", "nats.cert: nats.cert and nats.key must be given together"}},
	} {
		t.Run(name, func(t *testing.T) {
			bad := c.change(string(good))
			if bad == string(good) {
				t.Fatal("nothing was changed")
			}
			file := filepath.Join(own, "bad", "validator.yaml")
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"genesis.json", "vote.key", "cosign.key", "nats.nk"} { // paths are the file's own
				b, err := os.ReadFile(filepath.Join(own, f))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(own, "bad", f), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, check := range [][]string{{"--check"}, nil} { // and nothing is started with it
				wantExit(t, inside(t, append([]string{"consensus", "--config", file}, check...)...), exitFailed, c.want...)
			}
			if _, err := os.Stat(filepath.Join(own, "bad", "data")); err == nil {
				t.Error("a data folder was made")
			}
		})
	}
	wantExit(t, inside(t, "consensus", "--check", "--config", filepath.Join(own, "none.yaml")), exitFailed, "none.yaml")
	// What is there is not written over.
	wantExit(t, inside(t, "consensus", "--write-config", dir, "--data", filepath.Join(filepath.Dir(dir), "district"), "--nats", "nats://127.0.0.1:4222"), exitFailed, "exists")
	wantExit(t, inside(t, "consensus", "--write-config", dir+"2", "--data", filepath.Join(filepath.Dir(dir), "district"), "--nats", "nats://127.0.0.1"), exitFailed, "must name a host and a port")
}
