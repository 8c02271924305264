//go:build race

package bus_test

// The race detector makes the full suite take longer than it is worth.
const raceEnabled = true
