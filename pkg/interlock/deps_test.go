package interlock_test

import (
	"os/exec"
	"strings"
	"testing"
)

// What judges must not depend on what is judged, nor that on what it watches.
func TestSharesNoCode(t *testing.T) {
	const own = "github.com/stopline-traffic/stopline/pkg/"
	for pkg, allowed := range map[string]string{".": "traffic kind", "./internal/oracle": "traffic"} {
		out, err := exec.Command("go", "list", "-f", `{{join .Imports "\n"}}`, pkg).Output()
		if err != nil {
			t.Fatalf("go list %s: %v", pkg, err)
		}
		for _, p := range strings.Fields(string(out)) {
			if name, ours := strings.CutPrefix(p, own); ours && !strings.Contains(" "+allowed+" ", " "+name+" ") {
				t.Errorf("%s imports %s, want only %s of this module", pkg, name, allowed)
			}
		}
	}
}
