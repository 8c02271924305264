//go:build unix

package witness

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lock keeps a second process, or a second Witness of this one, out of a folder:
// two that check and write on their own would cosign two histories. The lock goes
// with the process, however it ends.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: another witness runs in this folder: %w", path, err), f.Close())
	}
	return f, nil
}
