//go:build race

package roadside

// The race detector makes the city some twenty times slower.
const raceEnabled = true
