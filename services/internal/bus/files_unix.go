//go:build unix

package bus

import "syscall"

// openFiles returns how many files this process may have open; 0 if that is not
// known. The Go runtime has raised it as far as it may.
func openFiles() uint64 {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0
	}
	return uint64(l.Cur) //nolint:unconvert // an int64 on FreeBSD
}
