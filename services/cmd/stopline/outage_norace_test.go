//go:build !race

package main

import "time"

const outageSeconds = 3600

// backWithin bounds how long a killed validator may take to be back in step.
const backWithin = 5 * time.Second
