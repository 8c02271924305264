package seglog

import (
	"os"
	"syscall"
)

// datasync makes what was written durable, and the file's length with it;
// times of access are not worth waiting for (fdatasync(2)).
func datasync(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = c.Control(func(fd uintptr) {
		for {
			if serr = syscall.Fdatasync(int(fd)); serr != syscall.EINTR {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return serr
}
