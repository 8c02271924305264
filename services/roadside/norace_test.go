//go:build !race

package roadside

const raceEnabled = false
