//go:build !race

package signalcontrol

const raceEnabled = false
