//go:build race

package sim

// The race detector makes the simulator some twenty times slower; it needs
// less simulated time to find what it looks for.
const raceEnabled = true
