//go:build race

package main

// The race detector makes everything some ten times slower: ten minutes.
const outageSeconds = 600

// backWithin bounds how long a killed validator may take to be back in step.
const backWithin = soon
