//go:build race

package validation

// underRace says that code runs some ten times slower.
const underRace = true
