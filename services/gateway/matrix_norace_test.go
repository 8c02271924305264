//go:build !race

package gateway

// raced says that calls take several times as long.
const raced = false
