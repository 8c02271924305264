//go:build !race

package main

const outageSeconds = 3600
