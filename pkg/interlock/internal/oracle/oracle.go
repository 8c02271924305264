// Package oracle judges an interlock from outside. Only tests use it.
//
// It shares nothing with the interlock, nor with what makes lamp states: it
// reads the junction's definition for itself, keeps moments where the interlock
// keeps ages, and compares every pair of groups by brute force. There are two
// judges in it:
//
//   - [Street] stands at the junction with a true clock and sees the lamps, and
//     nothing else. It knows the invariants that protect people.
//   - [Model] is told what the interlock is told, and says in advance what must
//     come out: which wants pass, what is held instead of the others, when it
//     trips. It knows the rest of the interlock's word: that nothing lawful is
//     refused, and that reaction takes the time that it should.
//
// Both speak of states as strings, one letter a group: r y G g c u x O.
package oracle

import "github.com/stopline-traffic/stopline/pkg/traffic"

// Times are milliseconds.
type table struct {
	n                        int
	walk                     []bool // for pedestrians
	least, clear, red, never []int64
	// cross[a*n+b] says what a and b are to each other.
	cross []relation
}

type relation uint8

const (
	strangers relation = iota
	enemies
	firstGives  // a gives way to b
	secondGives // b to a
	eitherGives
)

func tableOf(j *traffic.Junction) table {
	n := len(j.Groups)
	t := table{n: n, cross: make([]relation, n*n)}
	for _, g := range j.Groups {
		least, yellow, red := j.Timing.MinGreenMS, j.Timing.YellowMS, j.Timing.AllRedMS
		if g.MinGreenMS != 0 {
			least = g.MinGreenMS
		}
		if g.YellowMS != 0 {
			yellow = g.YellowMS
		}
		if g.AllRedMS != 0 {
			red = g.AllRedMS
		}
		walk := g.Kind == traffic.Pedestrians
		if walk {
			yellow = g.PedClearMS
		}
		t.walk = append(t.walk, walk)
		t.least, t.clear, t.red = append(t.least, least), append(t.clear, yellow), append(t.red, red)
		t.never = append(t.never, j.Timing.MaxRedMS)
	}
	named := func(lists [][]int, a, b int) bool {
		for i, l := range lists {
			for _, x := range l {
				if i == a && x == b {
					return true
				}
			}
		}
		return false
	}
	for a := range n {
		for b := range n {
			first, second := named(j.Yields, a, b), named(j.Yields, b, a)
			switch {
			case a == b:
			case named(j.Conflicts, a, b) || named(j.Conflicts, b, a):
				t.cross[a*n+b] = enemies
			case first && second:
				t.cross[a*n+b] = eitherGives
			case first:
				t.cross[a*n+b] = firstGives
			case second:
				t.cross[a*n+b] = secondGives
			}
		}
	}
	return t
}

func green(c byte) bool  { return c == 'G' || c == 'g' }
func enters(c byte) bool { return c == 'G' || c == 'g' || c == 'u' }

// mayShare reports whether two groups in that relation may be let in together.
func (r relation) mayShare(a, b byte) bool {
	switch r {
	case enemies:
		return false
	case firstGives:
		return a == 'g'
	case secondGives:
		return b == 'g'
	case eitherGives:
		return a == 'g' || b == 'g'
	}
	return true
}
