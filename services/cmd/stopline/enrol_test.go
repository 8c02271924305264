package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// A device's life in the registry: enrolled, heard, refused under its id a
// second time, revoked, and from then on quarantined and counted.
func TestEnrol(t *testing.T) {
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"))
	enrol := func(args ...string) result {
		return stopline(t, append([]string{"enrol", "--data", d.data, "--url", d.url}, args...)...)
	}
	probe, other := d.enrol("h0101", "probe"), d.enrol("h0102", "other")
	receipts := []receipt{d.store("/v1/frames", probe.next()), d.store("/v1/frames", other.next()), d.store("/v1/frames", probe.next())}
	d.sealed(receipts...)

	key := filepath.Join(t.TempDir(), "key")
	for _, c := range []struct {
		name string
		code int
		text string
		args []string
	}{
		{"the same id", exitFailed, "device probe is in the registry already and active; an id is never used again", []string{"--junction", "h0101", "--device", "probe", "--key", key}},
		{"the demo's own id", exitFailed, "device rsu-h0101 is in the registry already", []string{"--junction", "h0101", "--device", "rsu-h0101", "--key", key}},
		{"unknown junction", exitFailed, "junction h9999 is not in the registry", []string{"--junction", "h9999", "--device", "new", "--key", key}},
		{"revoke an unknown device", exitFailed, "device nobody is not in the registry", []string{"--device", "nobody", "--revoke"}},
		{"somebody else's key", exitFailed, "it was refused by the validators (registry): body.key: ", []string{"--junction", "h0101", "--device", "new", "--key", filepath.Join(d.data, "keys", "rsu-h0101.key")}},
		{"no key", exitUsage, "either --public-key or --key", []string{"--junction", "h0101", "--device", "new"}},
		{"two keys", exitUsage, "either --public-key or --key", []string{"--junction", "h0101", "--device", "new", "--key", key, "--public-key", key}},
		{"no device", exitUsage, "--device", []string{"--junction", "h0101", "--key", key}},
		{"not a public key", exitFailed, "must be PEM or 64 hex digits", []string{"--junction", "h0101", "--device", "new", "--public-key", filepath.Join(d.data, "policy")}},
		{"no file", exitFailed, "no such file", []string{"--junction", "h0101", "--device", "new", "--public-key", filepath.Join(d.data, "none")}},
	} {
		t.Run(c.name, func(t *testing.T) { wantExit(t, enrol(c.args...), c.code, c.text) })
	}
	wantExit(t, stopline(t, "enrol", "--data", d.data, "--url", "http://127.0.0.1:1", "--junction", "h0101", "--device", "new", "--key", key), exitFailed, "is the demo running?")
	wantExit(t, stopline(t, "enrol", "--data", t.TempDir(), "--url", d.url, "--junction", "h0101", "--device", "new", "--key", key), exitFailed, "genesis.json")

	r := enrol("--json", "--device", "probe", "--revoke")
	wantExit(t, r, exitOK)
	var said struct{ Device, Status string }
	if err := json.Unmarshal([]byte(r.out), &said); err != nil || said.Device != "probe" || said.Status != "revoked" {
		t.Errorf("got %v (%v), want device probe revoked", r, err)
	}
	wantExit(t, enrol("--device", "probe", "--revoke"), exitFailed, "device probe is revoked already")
	wantExit(t, enrol("--junction", "h0101", "--device", "probe", "--key", key), exitFailed, "device probe is in the registry already and revoked")
	// A receipt still says that the frame is on disk: with its reason, in quarantine.
	late := []receipt{d.store("/v1/frames", probe.next()), d.store("/v1/frames", probe.next())}
	receipts = append(receipts, d.store("/v1/frames", other.next()))
	v := d.sealed(receipts...)
	once(t, v, receipts)
	end := d.stop()
	if n := end.Frames.ByRule[validate.RuleRevoked]; n != 2 || end.Frames.Quarantined != 2 {
		t.Errorf("quarantined %d: %v, want 2 by %s", end.Frames.Quarantined, end.Frames.ByRule, validate.RuleRevoked)
	}
	v = logOf(t, d.data)
	once(t, v, receipts)
	for _, r := range late {
		if at := v.find(r.Commitment); len(at) > 0 {
			t.Errorf("a revoked device's frame is in the log at %v", at)
		}
	}
	wantExit(t, stopline(t, "fsck", d.data), exitOK, "OK: ")
}

// Somebody with openssl and curl, and nothing of ours, is heard: the script in
// testdata is the one that README shows.
func TestEnrolOpenSSL(t *testing.T) {
	for _, p := range []string{"openssl", "curl", "sh"} {
		optional(t, p, "STOPLINE_REQUIRE_OPENSSL")
	}
	processTest(t)
	dir := t.TempDir()
	d := startDemo(t, filepath.Join(dir, "district"))
	tell(t, dir, "openssl", "genpkey", "-algorithm", "ed25519", "-out", "key.pem")
	tell(t, dir, "openssl", "pkey", "-in", "key.pem", "-pubout", "-out", "public.pem")
	wantExit(t, stopline(t, "enrol", "--data", d.data, "--url", d.url, "--junction", "h0202", "--device", "mine", "--public-key", filepath.Join(dir, "public.pem")),
		exitOK, "device mine of junction h0202 is in the registry", "key id")
	tell(t, dir, "openssl", "genpkey", "-algorithm", "ed25519", "-out", "stranger.pem")

	script, err := filepath.Abs(filepath.Join("testdata", "send-frame.sh"))
	if err != nil {
		t.Fatal(err)
	}
	said := tell(t, dir, "sh", script, d.url, filepath.Join(dir, "key.pem"), "mine", "h0202")
	first, second, _ := strings.Cut(said, "\n")
	var r receipt
	if err := json.Unmarshal([]byte(first), &r); err != nil || len(r.Commitment) != 32 || len(r.Salt) != 32 {
		t.Fatalf("the script said\n%s\nwant a receipt in its first line (%v)", said, err)
	}
	if !strings.HasPrefix(second, "sealed: ") {
		t.Errorf("the script said\n%s\nwant that it found the leaf", said)
	}
	v := d.sealed(r)

	// The bundle of the frame proves what the script had signed.
	var bundle []byte
	waitFor(t, "a bundle of the frame", soon, func() bool {
		var err error
		bundle, err = d.get("/v1/evidence/" + strconv.Itoa(v.find(r.Commitment)[0]))
		return err == nil
	})
	path := filepath.Join(dir, "mine.zip")
	if err := os.WriteFile(path, bundle, 0o644); err != nil {
		t.Fatal(err)
	}
	wantExit(t, stopline(t, "verify", "--policy", filepath.Join(d.data, "policy"), path), exitOK, "PASS", "signed by device mine")
	end := d.stop()
	if end.Frames.Quarantined != 0 {
		t.Errorf("quarantined %v, want nothing", end.Frames.ByRule)
	}
}

// What registrars do by hand in POST /v1/records is judged too: only their key
// may, and a junction whose stage lets conflicting groups in is never filed.
func TestRegistryRecords(t *testing.T) {
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"))
	probe := d.enrol("h0101", "probe")
	registrar, err := d.district.Key("registrar")
	if err != nil {
		t.Fatal(err)
	}
	police, err := d.district.Key(district.PoliceOfficial)
	if err != nil {
		t.Fatal(err)
	}
	j := *d.junction("h0101")
	j.ID = "h0901"
	change := func(id string, nonce uint64, body any) []byte {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		change := identity.Change{District: "harbour", Action: "put", Type: identity.TypeJunction, ID: id, Body: b, Nonce: nonce, Base: make([]byte, 32)}
		a, err := identity.Approve(police, change) // as junctions need
		if err != nil {
			t.Fatal(err)
		}
		change.Approvals = []identity.Approval{a}
		c, err := change.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	bad := j
	bad.Stages = slices.Clone(j.Stages)
	at := slices.IndexFunc(j.Conflicts, func(c []int) bool { return len(c) > 0 })
	state := []byte(bad.Stages[0].State)
	state[at], state[j.Conflicts[at][0]] = 'G', 'G'
	bad.Stages[0].State = traffic.State(state)
	bad.ID = "h0902"

	receipts := []receipt{d.store("/v1/frames", probe.next())}
	refused := []receipt{
		d.store("/v1/records", identity.Sign(probe.key, identity.KindRegistry, identity.JSON, change("h0900", 1, j)).Marshal()),
		d.store("/v1/records", identity.Sign(registrar, identity.KindRegistry, identity.JSON, change("h0902", 2, bad)).Marshal()),
		d.store("/v1/records", identity.Sign(registrar, identity.KindRegistry, identity.JSON, change("h0903", 3, j)).Marshal()), // id and body differ
	}
	receipts = append(receipts, d.store("/v1/frames", probe.next()),
		d.store("/v1/records", identity.Sign(registrar, identity.KindRegistry, identity.JSON, change("h0901", 4, j)).Marshal()))
	v := d.sealed(receipts...)
	waitFor(t, "junction h0901 in the registry", soon, func() bool { _, err := d.get("/v1/registry/junction/h0901"); return err == nil })
	for _, id := range []string{"h0900", "h0902", "h0903"} {
		if b, err := d.get("/v1/registry/junction/" + id); err == nil {
			t.Errorf("junction %s is in the registry: %s", id, b)
		}
	}
	for i, r := range refused {
		if at := v.find(r.Commitment); len(at) > 0 {
			t.Errorf("refused record %d is in the log at %v", i, at)
		}
	}
	// Refused by the validators themselves: counted as verdicts against a record.
	var page struct{ Counts struct{ Rejected uint64 } }
	b, err := d.get("/v1/state")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &page); err != nil || page.Counts.Rejected != 2 {
		t.Errorf("rejected: got %d (%v), want the 2 junctions", page.Counts.Rejected, err)
	}
	end := d.stop()
	if got, want := end.Frames.ByRule[validate.RuleMaySign], uint64(1); got != want {
		t.Errorf("%s: got %d, want %d", validate.RuleMaySign, got, want)
	}
}
