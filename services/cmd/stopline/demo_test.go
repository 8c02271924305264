package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// The demo as the issue describes it, and what its folder and bundle are worth
// to somebody who was not there.
func TestDemo(t *testing.T) {
	processTest(t)
	data := filepath.Join(t.TempDir(), "district")
	d := startDemo(t, data, "--for", "6s")
	r := d.report()

	var fields map[string]any
	if err := json.Unmarshal([]byte(lastLine(d.out.String())), &fields); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		"frames.received", "frames.accepted", "frames.quarantined", "readings", "blocks", "log_size", "sealed_size",
		"latency_ms.agreed_p50", "latency_ms.agreed_p99", "latency_ms.sealed_p50", "latency_ms.sealed_p99",
		"commands.sent", "commands.applied", "commands.refused", "interlock.trips",
		"evidence.path", "evidence.policy", "evidence.verified",
	} {
		at := any(fields)
		for _, name := range strings.Split(path, ".") {
			m, _ := at.(map[string]any)
			at = m[name]
		}
		if at == nil {
			t.Errorf("the JSON object has no %s", path)
		}
	}
	if lines := strings.Count(d.out.String(), "\n"); lines != 1 {
		t.Errorf("standard output has %d lines, want the JSON object only:\n%s", lines, d.out)
	}
	// Nine junctions at 1 Hz, less a start's worth on a slow machine.
	if r.Frames.Accepted < 9*3 || r.Frames.Received != r.Frames.Accepted || r.Frames.Quarantined != 0 || r.Frames.ByRule != nil {
		t.Errorf("frames: got %+v, want 27 or more, all accepted", r.Frames)
	}
	if r.Readings < r.Frames.Accepted || r.Blocks == 0 {
		t.Errorf("got %d readings in %d blocks of %d frames, want more", r.Readings, r.Blocks, r.Frames.Accepted)
	}
	if r.LogSize != r.SealedSize || r.LogSize < r.Frames.Accepted+r.Blocks {
		t.Errorf("log size %d, sealed %d, want the same and %d or more", r.LogSize, r.SealedSize, r.Frames.Accepted+r.Blocks)
	}
	if r.Commands.Applied == 0 || r.Commands.Sent < r.Commands.Applied || r.Interlock.Trips != 0 {
		t.Errorf("commands %+v, %d trips; want some applied and no trip", r.Commands, r.Interlock.Trips)
	}
	l := r.LatencyMS
	if l.AgreedP50 <= 0 || l.AgreedP99 < l.AgreedP50 || l.SealedP50 < l.AgreedP50 || l.SealedP99 < l.SealedP50 {
		t.Errorf("latencies %+v are in no order", l)
	}
	if !r.Evidence.Verified || r.Data != data || r.PeakRSSMB == 0 {
		t.Errorf("got %+v, want verified evidence, data folder %s and its memory", r, data)
	}
	v := logOf(t, data)
	v.check(t, nil)
	if uint64(v.size) != r.SealedSize {
		t.Errorf("the checkpoint on disk is of %d entries, the demo said %d", v.size, r.SealedSize)
	}

	t.Run("verify", func(t *testing.T) { verifyEvidence(t, r.Evidence.Path, r.Evidence.Policy) })
	t.Run("fsck", func(t *testing.T) { fsckDamage(t, data) })
}

// verifyEvidence checks all exit codes of verify on a bundle.
func verifyEvidence(t *testing.T, bundle, policy string) {
	pass := stopline(t, "verify", "--policy", policy, bundle)
	wantExit(t, pass, exitOK, "PASS", "cosigner stopline.example/harbour/validator-", "existed no later than", "It does not prove:", "signed by service signal-control")
	wantExit(t, stopline(t, "verify", bundle, "--policy", policy, "--json"), exitOK, `"outcome": "pass"`)

	// No policy pinned: fingerprints of all keys, to compare by other means.
	untrusted := stopline(t, "verify", bundle)
	wantExit(t, untrusted, exitUntrusted, "UNTRUSTED", "fingerprints (SHA-256 of the public key)")
	pinned, err := os.ReadFile(policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ledger.ParsePolicy(pinned)
	if err != nil {
		t.Fatal(err)
	}
	for name, print := range p.Fingerprints() {
		if !strings.Contains(untrusted.out, print+" "+name) {
			t.Errorf("got %v\nwant the fingerprint %s of %s", untrusted, print, name)
		}
	}

	good, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "bad.zip")
	const positions = 24
	for i := range positions {
		at := i * (len(good) - 1) / (positions - 1) // the first and the last byte too
		b := bytes.Clone(good)
		b[at] ^= 1 << (i % 8)
		if err := os.WriteFile(bad, b, 0o644); err != nil {
			t.Fatal(err)
		}
		r := inside(t, "verify", "--policy", policy, bad)
		if r.code != exitFailed || !strings.Contains(r.out, "FAIL") {
			t.Errorf("byte %d of %d changed: got %v\nwant exit 1 and FAIL", at, len(good), r)
		}
	}
	for name, b := range map[string][]byte{"cut": good[:len(good)-1], "longer": append(bytes.Clone(good), 0), "empty": {}, "text": []byte("not a bundle")} {
		if err := os.WriteFile(bad, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if r := inside(t, "verify", "--policy", policy, bad); r.code != exitFailed || !strings.Contains(r.out, "FAIL") {
			t.Errorf("%s bundle: got %v\nwant exit 1 and FAIL", name, r)
		}
	}
	for _, args := range [][]string{
		{}, {bundle, bundle}, {"--no-such-option", bundle}, {filepath.Join(t.TempDir(), "none.zip")},
		{"--policy", filepath.Join(t.TempDir(), "none"), bundle}, {"--policy", bundle, bundle},
	} {
		wantExit(t, inside(t, append([]string{"verify"}, args...)...), exitUsage, "stopline: verify: ")
	}
	wantExit(t, stopline(t, "verify"), exitUsage, "one bundle is needed")
}

// fsckDamage changes a byte in every file of the log and of the payloads, one
// after the other, and wants each named.
func fsckDamage(t *testing.T, data string) {
	wantExit(t, stopline(t, "fsck", data), exitOK, "OK: ")
	wantExit(t, stopline(t, "fsck", "--json", "--policy", filepath.Join(data, "policy"), data), exitOK)
	wantExit(t, inside(t, "fsck"), exitUsage, "one data folder is needed")
	wantExit(t, inside(t, "fsck", t.TempDir()), exitUsage, "is no data folder")

	kinds := map[string]int{}
	for _, dir := range []string{"log", "payload"} {
		err := filepath.WalkDir(filepath.Join(data, dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			name, err := filepath.Rel(data, path)
			if err != nil {
				return err
			}
			name = filepath.ToSlash(name)
			good, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(good) == 0 {
				return fmt.Errorf("%s is empty", name)
			}
			b := bytes.Clone(good)
			b[len(b)/2] ^= 0x10
			if err := os.WriteFile(path, b, 0o644); err != nil {
				return err
			}
			if r := inside(t, "fsck", data); r.code != exitFailed || !strings.Contains(r.out, name) {
				t.Errorf("byte %d of %s changed: got %v\nwant exit 1 and the file's name", len(b)/2, name, r)
			}
			kinds[strings.Join(strings.SplitN(name, "/", 4)[:min(3, strings.Count(name, "/"))], "/")]++
			return os.WriteFile(path, good, 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{"log", "log/blocks", "log/checkpoints", "log/tile/0", "log/tile/entries", "payload/control", "payload/readings"} {
		if kinds[kind] == 0 {
			t.Errorf("no file under %s was damaged; got %v", kind, kinds)
		}
	}
	wantExit(t, inside(t, "fsck", data), exitOK, "OK: ")
}

// A forger makes everything anew: keys, genesis, log, policy, bundle, with the
// same names. Nothing of it passes under the policy that a verifier has pinned.
func TestForgedDistrict(t *testing.T) {
	processTest(t)
	dir := t.TempDir()
	// One after the other on purpose: two at once would need twice the machine.
	honest := startDemo(t, filepath.Join(dir, "honest"), "--for", "2s").report().Evidence
	forged := startDemo(t, filepath.Join(dir, "forged"), "--for", "2s", "--seed", "2").report().Evidence

	wantExit(t, stopline(t, "verify", "--policy", honest.Policy, honest.Path), exitOK, "PASS")
	wantExit(t, stopline(t, "verify", "--policy", forged.Policy, forged.Path), exitOK, "PASS")
	wantExit(t, stopline(t, "verify", forged.Path), exitUntrusted, "UNTRUSTED")
	wantExit(t, stopline(t, "verify", "--policy", honest.Policy, forged.Path), exitFailed, "FAIL")
	wantExit(t, stopline(t, "verify", "--policy", forged.Policy, honest.Path), exitFailed, "FAIL")
	wantExit(t, stopline(t, "fsck", "--policy", honest.Policy, filepath.Join(dir, "forged")), exitFailed)

	// The forger knows the honest district's public files as well.
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ours, err := ledger.ParseBundle(read(honest.Path))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		forge func(b *ledger.Bundle)
	}{
		{"the honest policy as the bundle's own", func(b *ledger.Bundle) { b.Policy = ours.Policy }},
		{"the honest checkpoint", func(b *ledger.Bundle) { b.Checkpoint = ours.Checkpoint }},
		{"the honest policy and checkpoint", func(b *ledger.Bundle) { b.Policy, b.Checkpoint = ours.Policy, ours.Checkpoint }},
		{"the honest policy, checkpoint and blocks", func(b *ledger.Bundle) {
			b.Policy, b.Checkpoint, b.Blocks = ours.Policy, ours.Checkpoint, ours.Blocks
		}},
		{"the forged records in the honest bundle", func(b *ledger.Bundle) {
			*b = ledger.Bundle{Policy: ours.Policy, Checkpoint: ours.Checkpoint, Blocks: ours.Blocks, Records: b.Records}
		}},
	} {
		b, err := ledger.ParseBundle(read(forged.Path))
		if err != nil {
			t.Fatal(err)
		}
		c.forge(b)
		path := filepath.Join(t.TempDir(), "forged.zip")
		if err := os.WriteFile(path, b.Marshal(), 0o644); err != nil {
			t.Fatal(err)
		}
		if r := inside(t, "verify", "--policy", honest.Policy, path); r.code != exitFailed || !strings.Contains(r.out, "FAIL") {
			t.Errorf("%s: got %v\nwant exit 1 and FAIL", c.name, r)
		}
	}
}
