//go:build race

package consensus

// slower is how much longer things may take with the race detector on.
const slower = 5
