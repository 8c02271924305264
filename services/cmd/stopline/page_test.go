package main

import (
	"context"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// dom returns the page as a real browser shows it: after its scripts have run.
func dom(t *testing.T, profile, url string) string {
	t.Helper()
	// The page's stream of events never ends, and virtual time would wait for it:
	// so the browser's own timeout ends the loading, and ours a browser that hangs.
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	c := exec.CommandContext(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--user-data-dir="+profile, "--timeout=4000", "--dump-dom", url)
	c.WaitDelay = 5 * time.Second // its helpers may hold on to the pipe
	var errs strings.Builder
	c.Stderr = &errs
	b, err := c.Output()
	if err != nil {
		t.Fatalf("chromium: %v\n%s", err, errs.String())
	}
	return html.UnescapeString(string(b))
}

// The page in Chromium: every junction by its name with its lamps, blocks with
// who voted, and links to evidence that a verifier accepts.
func TestPage(t *testing.T) {
	optional(t, "chromium", "STOPLINE_REQUIRE_BROWSER")
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"))
	reg, err := identity.NewRegistry(&d.district.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	junctions := reg.Junctions()
	if len(junctions) != 9 {
		t.Fatalf("the city has %d junctions, want 9", len(junctions))
	}
	link := regexp.MustCompile(`href="(/v1/evidence/[0-9]+)"`)
	profile, err := os.MkdirTemp("", "stopline-browser-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Helpers of the browser end, and stop writing there, a little after it.
		waitFor(t, "the browser's folder removed", soon, func() bool { return os.RemoveAll(profile) == nil })
	})
	var page string
	waitFor(t, "links to evidence of all junctions on the page", time.Minute, func() bool {
		page = dom(t, profile, d.url+"/")
		return len(link.FindAllString(page, -1)) == len(junctions)
	})
	for _, want := range []string{`<span id="district">harbour</span>`, `>live</span>`, "Interlock trips", "nothing was refused", `<circle `, `class="mode coordinated"`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %s", want)
		}
	}
	table := func(id string) string {
		_, rest, _ := strings.Cut(page, `<tbody id="`+id+`">`)
		body, _, _ := strings.Cut(rest, "</tbody>")
		return body
	}
	for _, j := range junctions {
		if !strings.Contains(table("junctions"), "<td>"+j.Name+"</td>") {
			t.Errorf("the table has no junction %q", j.Name)
		}
		if g := j.Groups[0].Name; !strings.Contains(table("junctions"), `title="`+g+": ") {
			t.Errorf("no lamp is for group %q of %s", g, j.ID)
		}
	}
	// Height, time, records, size, root, and three or four who voted.
	block := regexp.MustCompile(`<tr><td>[0-9]+</td><td>[0-9:.]{12}</td><td>[0-9]+</td><td>[0-9]+</td><td>[0-9a-f]{16}</td><td>[1-4]( [1-4]){2,3}</td></tr>`)
	if n := len(block.FindAllString(table("blocks"), -1)); n < 3 {
		t.Errorf("%d rows of blocks, want 3 or more: %s", n, table("blocks"))
	}
	for _, path := range []string{"/log/checkpoint", "/v1/policy"} {
		if !strings.Contains(page, `href="`+path+`"`) {
			t.Errorf("the page has no link to %s", path)
		}
	}
	b, err := d.get(link.FindStringSubmatch(page)[1])
	if err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(t.TempDir(), "bundle.zip")
	if err := os.WriteFile(bundle, b, 0o644); err != nil {
		t.Fatal(err)
	}
	wantExit(t, stopline(t, "verify", "--policy", filepath.Join(d.data, "policy"), bundle), exitOK, "PASS", "command ")
	served, err := d.get("/v1/policy")
	if err != nil {
		t.Fatal(err)
	}
	if string(served) != string(d.district.Policy) {
		t.Errorf("the page serves the policy\n%s\nwant\n%s", served, d.district.Policy)
	}
	if r := d.stop(); r.Frames.Quarantined != 0 || r.Interlock.Trips != 0 {
		t.Errorf("the demo ended with %+v", r)
	}
}
