//go:build !linux

package main

func peakRSSMB() uint64 { return 0 }
