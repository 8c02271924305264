//go:build race

package interlock_test

const underRace = true
