//go:build !unix

package witness

import "os"

// lock opens the file only: systems without flock must see to it themselves that
// a witness' folder is used once.
func lock(path string) (*os.File, error) { return os.OpenFile(path, os.O_RDWR, 0) }
