//go:build race

package sealing

// raceOn: everything takes many times as long, and tests that go through all
// states of one goroutine look at some.
const raceOn = true
