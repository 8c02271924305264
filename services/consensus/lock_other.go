//go:build !unix

package consensus

import (
	"os"
	"path/filepath"
)

// lock opens the file only: systems without flock must see to it themselves that
// a validator's folder is used once.
func lock(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
}
