package interlock_test

import (
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// judgeOfLamps is the brute-force checker. It is told the true time and what
// the lamps show, keeps when each group last changed and what it showed before,
// and compares every pair of groups at every step. It reads the definition's
// own fields and shares no code with the monitor.
type judgeOfLamps struct {
	j       *traffic.Junction
	now     time.Duration
	show    string
	began   []time.Duration // when the present colour began; green is one colour
	everGo  []bool          // let in since the start or since flashing
	restart time.Duration   // when the start, or the end of flashing, was
	slop    time.Duration   // by how much a time may be short: see the tests
}

func newJudge(j *traffic.Junction) *judgeOfLamps {
	n := len(j.Groups)
	o := &judgeOfLamps{j: j, began: make([]time.Duration, n), everGo: make([]bool, n)}
	for range n {
		o.show += "r"
	}
	return o
}

func in(list []int, x int) bool {
	for _, y := range list {
		if x == y {
			return true
		}
	}
	return false
}

func (o *judgeOfLamps) minGreen(g int) time.Duration {
	t := o.j.Timing.MinGreenMS
	if o.j.Groups[g].MinGreenMS != 0 {
		t = o.j.Groups[g].MinGreenMS
	}
	return time.Duration(t)*time.Millisecond - o.slop
}

func (o *judgeOfLamps) clearance(g int) time.Duration {
	t := o.j.Timing.YellowMS
	if o.j.Groups[g].YellowMS != 0 {
		t = o.j.Groups[g].YellowMS
	}
	if o.j.Groups[g].Kind == traffic.Pedestrians {
		t = o.j.Groups[g].PedClearMS
		if t == 0 {
			return 0
		}
	}
	return time.Duration(t)*time.Millisecond - o.slop
}

func (o *judgeOfLamps) allRed(g int) time.Duration {
	t := o.j.Timing.AllRedMS
	if o.j.Groups[g].AllRedMS != 0 {
		t = o.j.Groups[g].AllRedMS
	}
	if t == 0 {
		return 0
	}
	return time.Duration(t)*time.Millisecond - o.slop
}

// see returns what is wrong with showing s from the true time now on; "" is
// right. toFlash says that a trip or an order to flash is in force.
func (o *judgeOfLamps) see(now time.Duration, s traffic.State, toFlash bool) string {
	j, n := o.j, len(o.j.Groups)
	if len(s) != n {
		return fmt.Sprintf("%q has not %d aspects", s, n)
	}
	green := func(c byte) bool { return c == 'G' || c == 'g' }
	enters := func(c byte) bool { return c == 'G' || c == 'g' || c == 'u' }
	flash := 0
	for g := range n {
		if s[g] == 'x' {
			flash++
		}
	}
	if flash != 0 && flash != n {
		return fmt.Sprintf("%q: only some flash", s)
	}
	for g := range n {
		was, is := o.show[g], s[g]
		if was == is {
			continue
		}
		ped := j.Groups[g].Kind == traffic.Pedestrians
		lasted := now - o.began[g]
		what := fmt.Sprintf("group %d from %c to %c after %v", g, was, is, lasted)
		switch string([]byte{was, is}) {
		case "Gg", "gG":
		case "rG", "rg", "ru", "uG", "ug", "ur":
			if ped && (was == 'u' || is == 'u') {
				return what + ": not for pedestrians"
			}
		case "Gy", "gy":
			if ped {
				return what + ": not for pedestrians"
			}
			if lasted < o.minGreen(g) && !toFlash {
				return what + ": minimum green"
			}
		case "Gc", "gc":
			if !ped {
				return what + ": not for vehicles"
			}
			if lasted < o.minGreen(g) && !toFlash {
				return what + ": minimum green"
			}
		case "Gr", "gr":
			if !ped || j.Groups[g].PedClearMS != 0 {
				return what + ": clearance left out"
			}
			if lasted < o.minGreen(g) && !toFlash {
				return what + ": minimum green"
			}
		case "yr", "cr":
			if lasted < o.clearance(g) {
				return what + ": clearance too short"
			}
		case "rx":
			if !toFlash {
				return what + ": flashing without an order or a trip"
			}
			if lasted < o.allRed(g) {
				return what + ": flashing before all red"
			}
		case "xr":
		default:
			return what + ": no such change"
		}
	}
	// Every pair, both ways, in every step.
	for a := range n {
		for b := range n {
			if a == b {
				continue
			}
			conflict := in(j.Conflicts[a], b)
			aYields := a < len(j.Yields) && in(j.Yields[a], b)
			bYields := b < len(j.Yields) && in(j.Yields[b], a)
			if !conflict && !aYields && !bYields {
				continue
			}
			if !enters(s[a]) {
				continue
			}
			if enters(s[b]) {
				if conflict {
					return fmt.Sprintf("%q: %d and %d conflict", s, a, b)
				}
				if !(aYields && s[a] == 'g') && !(bYields && s[b] == 'g') {
					return fmt.Sprintf("%q: %d and %d, and nobody yields", s, a, b)
				}
				continue
			}
			if enters(o.show[a]) && !(s[a] == 'G' && o.show[a] != 'G') {
				continue // was there already, and is not protected anew
			}
			if s[b] != 'r' {
				return fmt.Sprintf("%q after %q: %d let in while %d clears", s, o.show, a, b)
			}
			var red time.Duration
			if o.show[b] == 'r' {
				red = now - o.began[b]
			}
			if red < o.allRed(b) {
				return fmt.Sprintf("%q after %q: %d let in when %d was red for %v", s, o.show, a, b, red)
			}
			if !o.everGo[b] && now-o.restart < o.clearance(b)+o.allRed(b) {
				return fmt.Sprintf("%q: %d let in %v after the start, before %d is known to be gone", s, a, now-o.restart, b)
			}
		}
	}
	for g := range n {
		if green(o.show[g]) != green(s[g]) || !green(s[g]) && o.show[g] != s[g] {
			o.began[g] = now
		}
		o.everGo[g] = o.everGo[g] || enters(s[g])
	}
	if o.show[0] == 'x' && s[0] != 'x' {
		o.restart = now
		for g := range n {
			o.everGo[g] = false
		}
	}
	o.show, o.now = string(s), now
	return ""
}
