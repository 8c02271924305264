//go:build !race

package sealing

const raceOn = false
