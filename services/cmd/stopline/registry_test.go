package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// A junction's plan changes when two departments have signed for it, and not
// when one has: the change goes round as a file, the refusal's reason comes back
// to who sent it, and what is in force is what the next frames are judged by.
// Nobody can play it again.
func TestRegistryPlanChange(t *testing.T) {
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"))
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	key := func(name string) string { return filepath.Join(d.data, "keys", name+".key") }
	reg := func(args ...string) result {
		return stopline(t, append([]string{"registry", "--url", d.url}, args...)...)
	}
	write := func(name string, v any) string {
		var b bytes.Buffer
		if err := printJSON(&b, v); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file(name), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return file(name)
	}
	probe := d.enrol("h0101", "probe")
	// A frame of the probe with a reading of a detector that the new definition adds.
	reading := func() []byte {
		f := probe.frame()
		f.Readings = []traffic.Reading{{Detector: "new-loop"}}
		return probe.sign(f)
	}
	before := reading()
	d.store("/v1/frames", before)

	j := *d.junction("h0101")
	oldPlan := j.Plan.Name
	j.Plan.Steps = slices.Clone(j.Plan.Steps)
	j.Plan.Name = "evening <&>"
	j.Plan.Steps[0].DurationMS += 5000
	j.Detectors = append(slices.Clone(j.Detectors), traffic.Detector{ID: "new-loop", Kind: traffic.StopLine, Lane: j.Lanes[0].ID, LengthCM: 200, Group: -1})
	body, proposal := write("h0101.json", &j), file("plan.json")

	wantExit(t, reg("show"), exitOK, "TYPE", "junction", "h0101", "official-police", "police: planner, governor", "TO CHANGE",
		"put, revoke  2 officials of 2 departments with role planner", "anything else", "2 officials of 2 departments with role governor", "1 official of 1 department with role registrar")
	wantExit(t, reg("show", "governance", "registry"), exitOK, "governance registry is active since block 0", `"officials": 2`)
	wantExit(t, reg("show", "plan"), exitFailed, `no entry of the type "plan"`)
	wantExit(t, reg("show", "junction", "h9999"), exitFailed, `the registry has no junction "h9999"`)

	wantExit(t, reg("propose", "--type", "junction", "--id", "h0101", "--file", body, "--out", proposal), exitOK,
		"put junction h0101 in district harbour (active since block 0)", `~ plan.name: "`+oldPlan+`" -> "evening <&>"`, "~ plan.steps[0].duration_ms: ",
		`.id: "new-loop"`, "needs 2 officials of 2 departments with role planner", "written to")
	wantExit(t, reg("propose", "--type", "junction", "--id", "h0101", "--file", body, "--out", proposal), exitFailed, "file exists")

	// One party, as often as it likes: CVE-2024-38944.
	const missing = "refused by the validators (registry): approvals: put of a junction needs 2 officials of 2 departments with role planner, has 1 of traffic"
	wantExit(t, reg("submit", "--key", key(district.RegistrarKey), proposal), exitFailed, missing)
	wantExit(t, reg("sign", "--key", key(district.RegistrarKey), proposal), exitOK, "1 in all", "registrar of traffic", "needs 2 officials of 2 departments with role planner, has 1 of traffic")
	wantExit(t, reg("sign", "--key", key(district.RegistrarKey), proposal), exitFailed, "has signed this proposal already")
	wantExit(t, reg("submit", "--key", key(district.RegistrarKey), proposal), exitFailed, missing)
	// Nobody else's signature is one: not a device's, and not the log's own service's.
	wantExit(t, reg("submit", "--key", key("signal-control"), proposal), exitFailed, "may not sign a registry")
	for _, stranger := range []string{"rsu-h0101", "validator-1-vote"} {
		b, err := os.ReadFile(proposal)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file(stranger), b, 0o644); err != nil {
			t.Fatal(err)
		}
		wantExit(t, stopline(t, "registry", "sign", "--key", key(stranger), file(stranger)), exitOK)
		wantExit(t, reg("submit", "--key", key(district.RegistrarKey), file(stranger)), exitFailed, "refused by the validators (registry): approvals[", "is no official")
	}
	var e identity.Entry
	r := reg("show", "junction", "h0101", "--json")
	if err := json.Unmarshal([]byte(r.out), &e); err != nil || e.Since != 0 {
		t.Fatalf("got %v, %v, want the junction as it was at first", r, err)
	}

	// A second department. Signing needs no network.
	wantExit(t, stopline(t, "registry", "sign", "--key", key(district.PoliceOfficial), proposal), exitOK, `~ plan.name: "`+oldPlan+`" -> "evening <&>"`, "2 in all")
	wantExit(t, reg("submit", "--key", key(district.RegistrarKey), proposal), exitOK, "in force: junction h0101 is active since block ")
	r = reg("show", "junction", "h0101", "--json")
	if err := json.Unmarshal([]byte(r.out), &e); err != nil || e.Since == 0 || !strings.Contains(string(e.Body), "evening <&>") {
		t.Errorf("got %v, %v, want the new plan", r, err)
	}
	wantExit(t, reg("show", "junction"), exitOK, "plan evening <&>")

	// The next frames are judged by it: the same reading, refused before.
	f := probe.frame()
	f.Readings = []traffic.Reading{{Detector: "new-loop"}}
	after := d.store("/v1/frames", probe.sign(f))
	probe.seq++
	v := d.sealed(after)
	if len(v.find(after.Commitment)) != 1 {
		t.Error("a frame with the new detector's reading is not in the log")
	}

	// Neither the same change nor the same approvals under another sender work
	// twice, not even for those who do not ask first.
	p, err := readProposal(proposal)
	if err != nil {
		t.Fatal(err)
	}
	for sender, want := range map[string]string{
		district.RegistrarKey: "was used by this signer before", district.AmbulanceOfficial: "base: the change is to ", district.PoliceOfficial: "was used by this signer before",
	} {
		k, err := d.district.Key(sender)
		if err != nil {
			t.Fatal(err)
		}
		c := p.Change
		c.Approvals = slices.DeleteFunc(slices.Clone(c.Approvals), func(a identity.Approval) bool { return a.Key == identity.IDOf(k.Public().(ed25519.PublicKey)) })
		payload, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		// With a blank at its end, since ingest knows the very same record again.
		again := d.store("/v1/records", identity.Sign(k, identity.KindRegistry, identity.JSON, append(payload, ' ')).Marshal())
		var said []byte
		waitFor(t, "a refusal", soon, func() bool {
			said, err = d.get("/v1/refusals/" + hex.EncodeToString(again.Commitment))
			return err == nil
		})
		if !strings.Contains(string(said), want) {
			t.Errorf("sent again by %s: got %s, want %q", sender, said, want)
		}
	}
	wantExit(t, reg("submit", "--key", key(district.AmbulanceOfficial), proposal), exitFailed, "was changed at block", "propose it again")
	wantExit(t, reg("sign", "--key", key(district.AmbulanceOfficial), proposal), exitFailed, "was changed at block", "propose it again")

	// What was signed and forgotten does not come to life later.
	wantExit(t, reg("propose", "--type", "software", "--id", "v8", "--file", write("v8.json", map[string]string{}), "--out", file("v8"), "--blocks", "1"), exitOK, "stands until block ")
	wantExit(t, reg("sign", "--key", key(district.PoliceOfficial), file("v8")), exitOK, "stands until block ")
	p, err = readProposal(file("v8"))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a block after that", soon, func() bool {
		var v gateway.RegistryView
		b, err := d.get("/v1/registry?type=governance")
		return err == nil && json.Unmarshal(b, &v) == nil && v.Height > p.Change.Until
	})
	wantExit(t, reg("submit", "--key", key(district.RegistrarKey), file("v8")), exitFailed, "refused by the validators (registry): until: the change was to be carried out by block ")

	// An official is dismissed by the two others, and has no say from then on.
	wantExit(t, reg("propose", "--type", "official", "--id", district.PoliceOfficial, "--revoke", "--out", file("gone.json")), exitOK, "revoke official official-police")
	wantExit(t, reg("sign", "--key", key(district.AmbulanceOfficial), file("gone.json")), exitOK)
	// Two departments are all that would be left, and that is enough.
	wantExit(t, reg("submit", "--json", "--key", key(district.RegistrarKey), file("gone.json")), exitOK, `"status": "revoked"`)
	wantExit(t, reg("propose", "--type", "software", "--id", "v9", "--file", write("v9.json", map[string]string{"sha256": "00"}), "--out", file("v9")), exitOK, "(new)", `+ sha256: "00"`)
	wantExit(t, reg("sign", "--key", key(district.PoliceOfficial), file("v9")), exitOK, "official-police of police, revoked", "has none")
	wantExit(t, reg("sign", "--key", key("importer"), file("v9")), exitOK, "is no official")
	wantExit(t, reg("submit", "--key", key(district.RegistrarKey), file("v9")), exitFailed, "refused by the validators (registry): approvals[0].key_id: official official-police is revoked")
	wantExit(t, reg("submit", "--key", key(district.PoliceOfficial), file("v9")), exitFailed, "refused by the validators (revoked-device): key_id: official official-police has been revoked")

	end := d.stop()
	if n := end.Frames.ByRule[validate.RuleDetector]; n != 1 {
		t.Errorf("got %v, want the one reading of before the change refused by %s", end.Frames.ByRule, validate.RuleDetector)
	}
	wantExit(t, stopline(t, "fsck", d.data), exitOK, "OK: ")
}

// What needs no district running.
func TestRegistryFiles(t *testing.T) {
	dir := t.TempDir()
	c := identity.Change{District: "harbour", Action: identity.Put, Type: identity.TypeSoftware, ID: "v1\u009b", Body: []byte(`{"a":"\u001b[2J"}`), Nonce: 3}
	p, err := identity.Propose(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good, bad, keyFile := filepath.Join(dir, "good"), filepath.Join(dir, "bad"), filepath.Join(dir, "key")
	for path, b := range map[string][]byte{good: doc, bad: bytes.Replace(doc, []byte(`"nonce"`), []byte(`"once"`), 1), keyFile: []byte(strings.Repeat("07", 32))} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := inside(t, "registry", "sign", "--key", keyFile, good)
	wantExit(t, r, exitOK, `put software v1\u009b in district harbour (new)`, `+ a: "\x1b[2J"`, "signed by ")
	if strings.ContainsAny(r.out, "\x1b\u009b") {
		t.Errorf("a proposal can write to the terminal: %q", r.out)
	}
	again, err := readProposal(good)
	if err != nil || len(again.Change.Approvals) != 1 {
		t.Errorf("got %+v, %v, want one approval in the file", again, err)
	}
	wantExit(t, inside(t, "registry", "sign", "--key", keyFile, bad), exitFailed, bad+": proposal: json: unknown field \"once\"")
	wantExit(t, inside(t, "registry", "sign", "--key", good, good), exitFailed, "must hold 64 hex digits")
	wantExit(t, inside(t, "registry", "submit", "--key", keyFile, filepath.Join(dir, "none")), exitFailed, "no such file")
	for _, args := range [][]string{{"show"}, {"submit", "--key", keyFile, good}, {"propose", "--type", "software", "--id", "x", "--file", good, "--out", filepath.Join(dir, "new")}} {
		wantExit(t, inside(t, append([]string{"registry", "--url", "http://127.0.0.1:1"}, args...)...), exitFailed, "is the demo running?")
	}
	wantExit(t, inside(t, "registry", "propose", "--type", "software", "--id", "x", "--file", keyFile, "--out", filepath.Join(dir, "new")), exitFailed, "is not JSON")
	if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
		t.Error("a proposal that failed left a file")
	}
}

func TestDifference(t *testing.T) {
	for _, tt := range []struct {
		old, now string
		want     []string
	}{
		{``, `{"a":1,"b":[{"c":"x"},[]],"d":{}}`, []string{`+ a: 1`, `+ b[0].c: "x"`, `+ b[1]: []`, `+ d: {}`}},
		{`{"a":1,"b":[1,2,3],"same":{"x":[true,null]}}`, `{"b":[1,4],"same":{"x":[true,null]},"n":null}`, []string{`- a: 1`, `~ b[1]: 2 -> 4`, `- b[2]: 3`, `+ n: null`}},
		{`{"a":{"b":1}}`, `{"a":[1]}`, []string{`- a.b: 1`, `+ a[0]: 1`}},
		{`{"a":"1"}`, `{"a":1}`, []string{`~ a: "1" -> 1`}},
		{`{"a":1}`, `{"a":{"b":2}}`, []string{`- a: 1`, `+ a.b: 2`}},
		{`{"a":12345678901234567890}`, `{"a":12345678901234567891}`, []string{`~ a: 12345678901234567890 -> 12345678901234567891`}},
		{`{"a.b":1}`, `{"a":{"b":1}}`, []string{`+ a.b: 1`, `- "a.b": 1`}},
		{`1`, `2`, []string{`~ the document: 1 -> 2`}},
		{`{"a":1}`, `{ "a" : 1 }`, nil},
	} {
		got, err := difference([]byte(tt.old), []byte(tt.now))
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s to %s: got %q, %v\nwant %q", tt.old, tt.now, got, err, tt.want)
		}
	}
	for _, bad := range [][2]string{{"{", "{}"}, {"{}", ""}} {
		if got, err := difference([]byte(bad[0]), []byte(bad[1])); err == nil {
			t.Errorf("got %q of %q", got, bad)
		}
	}
}

// What a view holds can be shown whatever is in it.
func TestAbout(t *testing.T) {
	for _, tt := range []struct{ typ, body, want string }{
		{"device", `{"junction":"j1"}`, "at j1"},
		{"service", `{"signs":["command","health"]}`, "signs command, health"},
		{"validator", `{"department":"police"}`, "police"},
		{"junction", `{"name":"Quay","plan":{"name":"day"}}`, "Quay, plan day"},
		{"policy", `{"version":"2","controller":"fixed"}`, "fixed 2"},
		{"agency", `{"name":"Fire"}`, "Fire"},
		{"sharing", `{"version":"7"}`, "7"},
		{"software", `[1]`, ""},
	} {
		if got := about(identity.Entry{Type: identity.EntryType(tt.typ), Body: []byte(tt.body)}); got != tt.want {
			t.Errorf("%s %s: got %q, want %q", tt.typ, tt.body, got, tt.want)
		}
	}
	if got := rules(nil); len(got) != 1 || got[0].Role != identity.Registrar {
		t.Errorf("got %v without governance, want one registrar", got)
	}
}
