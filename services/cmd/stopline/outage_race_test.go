//go:build race

package main

// The race detector makes everything some ten times slower: ten minutes.
const outageSeconds = 600
