package hires

import (
	"os"
	"path/filepath"
	"testing"
)

// shared opens a file of the shared data, STOPLINE_SHARED or ../shared beside the
// repository, or skips.
func shared(t testing.TB, name string) *os.File {
	t.Helper()
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" { // from this package's folder
		dir = filepath.Join("..", "..", "..", "shared")
	}
	f, err := os.Open(filepath.Join(dir, "data", filepath.FromSlash(name)))
	if err == nil {
		t.Cleanup(func() { f.Close() })
		return f
	}
	if os.Getenv("STOPLINE_REQUIRE_SHARED") == "1" {
		t.Fatalf("%v, and STOPLINE_REQUIRE_SHARED=1 says that it must be there", err)
	}
	t.Skipf("needs %s in the shared data (STOPLINE_SHARED, or ../shared beside the repository); STOPLINE_REQUIRE_SHARED=1 makes this a failure", name)
	return nil
}

