package oracle

import (
	"fmt"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Street judges what lamps show by true time, in milliseconds from the start.
// It holds the lamps to the invariants I1 to I9 of package interlock, as far as
// they can be seen from the street.
type Street struct {
	t     table
	now   int64
	show  string
	began []int64 // of the present colour; green is one colour
	// known[g]: g has been let in since the start, so that its red is one that
	// followed a clearance that was seen.
	known []bool
	start int64 // of the control: the first moment, or the end of flashing
}

// NewStreet returns a judge of a junction that shows all red at time 0.
func NewStreet(j *traffic.Junction) *Street {
	t := tableOf(j)
	return &Street{t: t, show: strings.Repeat("r", t.n), began: make([]int64, t.n), known: make([]bool, t.n)}
}

// See returns what is wrong with showing s from now on; "" is right. toFlash
// says that a trip or an order to flash is in force.
func (o *Street) See(now int64, s string, toFlash bool) string {
	if s == o.show {
		o.now = now // everything has been judged when it began
		return ""
	}
	if len(s) != o.t.n {
		return fmt.Sprintf("%q has not %d aspects", s, o.t.n)
	}
	if n := strings.Count(s, "x"); n != 0 && n != o.t.n {
		return fmt.Sprintf("%q: only some flash", s)
	}
	for g := range o.t.n {
		if o.show[g] != s[g] {
			if what := o.change(g, o.show[g], s[g], now-o.began[g], toFlash); what != "" {
				return fmt.Sprintf("group %d from %c to %c after %d ms: %s", g, o.show[g], s[g], now-o.began[g], what)
			}
		}
	}
	for a := range o.t.n {
		for b := range o.t.n {
			if what := o.pair(a, b, now, s); what != "" {
				return fmt.Sprintf("%q after %q: groups %d and %d: %s", s, o.show, a, b, what)
			}
		}
	}
	restart := o.show[0] == 'x'
	for g := range o.t.n {
		if o.show[g] != s[g] && !(green(o.show[g]) && green(s[g])) {
			o.began[g] = now
		}
		o.known[g] = enters(s[g]) || o.known[g] && !restart
	}
	if restart {
		o.start = now
	}
	o.show, o.now = s, now
	return ""
}

// change judges one group alone.
func (o *Street) change(g int, was, is byte, lasted int64, toFlash bool) string {
	walk := o.t.walk[g]
	switch {
	case is != 'y' && is != 'u' && is != 'c' && is != 'r' && is != 'x' && !green(is):
		return "no such aspect here"
	case walk && (is == 'y' || is == 'u'):
		return "not for pedestrians"
	case !walk && is == 'c':
		return "not for vehicles"
	}
	switch {
	case green(was) && green(is):
	case green(was):
		if is != 'y' && is != 'c' && !(is == 'r' && walk && o.t.clear[g] == 0) {
			return "clearance left out"
		}
		if lasted < o.t.least[g] && !toFlash {
			return "minimum green"
		}
	case was == 'y' || was == 'c':
		if is != 'r' {
			return "clearance taken back"
		}
		if lasted < o.t.clear[g] {
			return "clearance too short"
		}
	case was == 'u':
		if is != 'r' && !green(is) {
			return "no such change"
		}
	case was == 'r':
		if is == 'x' {
			if !toFlash {
				return "flashing without an order or a trip"
			}
			if lasted < o.t.red[g] {
				return "flashing before all red"
			}
		} else if !enters(is) {
			return "no such change"
		}
	default: // flashing
		if is != 'r' {
			return "from flashing to anything but red"
		}
	}
	return ""
}

// pair judges a being let in while b shows what it shows.
func (o *Street) pair(a, b int, now int64, s string) string {
	r := o.t.cross[a*o.t.n+b]
	if r == strangers || !enters(s[a]) {
		return ""
	}
	if enters(s[b]) {
		if !r.mayShare(s[a], s[b]) {
			return "let in together"
		}
		return ""
	}
	if enters(o.show[a]) && !(s[a] == 'G' && o.show[a] != 'G') {
		return "" // was there already, and is no more protected than it was
	}
	red := int64(0)
	if o.show[b] == 'r' {
		red = now - o.began[b]
	}
	switch {
	case s[b] != 'r':
		return "one let in while the other clears"
	case red < o.t.red[b]:
		return fmt.Sprintf("one let in when the other was red for %d ms", red)
	case !o.known[b] && now-o.start < o.t.clear[b]+o.t.red[b]:
		return fmt.Sprintf("one let in %d ms after the start", now-o.start)
	}
	return ""
}
