package traci

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// needSUMO skips a test where SUMO is missing, and fails it where the caller
// says that it must not be.
func needSUMO(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("sumo"); err == nil {
		return
	}
	if os.Getenv("STOPLINE_REQUIRE_SUMO") == "1" {
		t.Fatal("sumo is not in PATH, and STOPLINE_REQUIRE_SUMO=1 says that it must be")
	}
	t.Skip("needs sumo in PATH (Debian: apt-get install sumo); STOPLINE_REQUIRE_SUMO=1 makes this a failure")
}

// sharedScenario loads one of the shared maps by name.
func sharedScenario(t testing.TB, name string) *Scenario {
	t.Helper()
	s, err := Load(filepath.Join(shared(t), "scenarios", name, name+".sumocfg"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// shared finds the folder with the shared material: STOPLINE_SHARED, or
// ../shared seen from the root of the repository.
func shared(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" {
		root, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := os.Stat(filepath.Join(root, "go.work")); err == nil {
				dir = filepath.Join(filepath.Dir(root), "shared")
				break
			}
			if filepath.Dir(root) == root {
				break
			}
			root = filepath.Dir(root)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "scenarios")); dir != "" && err == nil {
		return dir
	}
	if os.Getenv("STOPLINE_REQUIRE_SHARED") == "1" {
		t.Fatalf("no scenarios under %q, and STOPLINE_REQUIRE_SHARED=1 says that they must be there", dir)
	}
	t.Skip("needs the shared scenarios (STOPLINE_SHARED, or ../shared beside the repository); STOPLINE_REQUIRE_SHARED=1 makes this a failure")
	return ""
}
