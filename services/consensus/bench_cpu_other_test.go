//go:build !unix

package consensus

import "time"

// cpuTime is not known here; figures made of it are 0.
func cpuTime() time.Duration { return 0 }
