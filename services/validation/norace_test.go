//go:build !race

package validation

const underRace = false
