//go:build race

package signalcontrol

// The race detector makes signatures some ten times slower.
const raceEnabled = true
