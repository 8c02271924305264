package main

import (
	"bufio"
	"bytes"
	"os"
	"strconv"
)

// peakRSSMB returns the most memory that this process has had resident, in MB
// (VmHWM of proc_pid_status(5)), 0 where the kernel does not say.
func peakRSSMB() uint64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := bytes.Fields(s.Bytes())
		if len(f) == 3 && string(f[0]) == "VmHWM:" {
			kb, err := strconv.ParseUint(string(f[1]), 10, 64)
			if err != nil {
				return 0
			}
			return kb * 1024 / 1_000_000
		}
	}
	return 0
}
