package main

import (
	"bytes"
	"strings"
	"testing"
)

// A district runs on by what its genesis filed; another controller under the
// same policy's name would make every command say what is not so.
func TestDemoRefusesAnotherPolicyOnTheSameFolder(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	dir := t.TempDir()
	demo := func(controller string) (int, string) {
		var out, errs bytes.Buffer
		code := Main(t.Context(), []string{"demo", "--controller", controller, "--for", "3s", "--json", "--listen", "127.0.0.1:0", "--data", dir}, streams{&out, &errs})
		return code, errs.String()
	}
	if code, text := demo("actuated"); code != exitOK {
		t.Fatalf("first run: exit %d: %s", code, text)
	}
	if code, text := demo("maxpressure"); code != exitFailed || !strings.Contains(text, "was made with the policy default") {
		t.Errorf("another controller: exit %d: %q, want a refusal that names the policy", code, text)
	}
	if code, text := demo("actuated"); code != exitOK {
		t.Errorf("as it was made: exit %d: %s", code, text)
	}
}
