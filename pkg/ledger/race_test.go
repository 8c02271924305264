//go:build race

package ledger_test

// sparse: with the race detector the tests that go through every byte take a
// sample; nothing in them runs at the same time as anything else.
const sparse = true
