// Package services_test keeps the promise that services meet on subjects only.
package services_test

import (
	"os/exec"
	"strings"
	"testing"
)

const root = "github.com/stopline-traffic/stopline/services/"

// forbidden returns the lines "package: imports" of go list in which a package
// imports a service that it may not: only the program imports services, and a
// service itself.
func forbidden(lines []string) (bad []string) {
	for _, line := range lines {
		pkg, imports, _ := strings.Cut(line, ":")
		from, ok := strings.CutPrefix(pkg, root)
		if !ok || strings.HasPrefix(from, "cmd/") {
			continue
		}
		own, _, _ := strings.Cut(from, "/")
		for _, i := range strings.Fields(imports) {
			to, ok := strings.CutPrefix(i, root)
			if first, _, _ := strings.Cut(to, "/"); ok && first != own && first != "internal" {
				bad = append(bad, from+" imports "+to)
			}
		}
	}
	return bad
}

func TestServicesNeverImportEachOther(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{join .Imports " "}} {{join .TestImports " "}} {{join .XTestImports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) < 10 {
		t.Fatalf("go list names %d packages, want all services", len(lines))
	}
	for _, b := range forbidden(lines) {
		t.Error(b)
	}
}

func TestForbiddenFindsWhatItShould(t *testing.T) {
	got := forbidden([]string{
		root + "audit:" + root + "sealing fmt",
		root + "internal/bus:" + root + "ingest",
		root + "audit:" + root + "internal/bus " + root + "audit/x",
		root + "cmd/stopline:" + root + "audit",
	})
	if len(got) != 2 || got[0] != "audit imports sealing" || got[1] != "internal/bus imports ingest" {
		t.Errorf("got %q, want the two that break the rule", got)
	}
}
