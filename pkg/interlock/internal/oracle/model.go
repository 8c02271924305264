package oracle

import (
	"strings"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Model says what an interlock that keeps its word shows. It follows the text
// of package interlock, not its code.
//
// Time is that of the text: a step forward counts as much as the longest of the
// eight before it, at most a second, and a step back nothing.
type Model struct {
	t       table
	maxRed  bool // a red that lasts too long trips
	given   int64
	clock   int64 // of the text
	history []int64

	show    string
	since   []int64 // when each colour began; green is one colour
	start   []int64 // when control of the group began; -1: it has been let in since
	waits   []int64 // how long each group has been red while others had green
	late    []bool  // that was too long, and is counted
	refused int64   // when the refusals began; -1: there are none
	tripped bool

	// Trips and MaxReds count.
	Trips, MaxReds uint64
}

// NewModel returns the model of a monitor made at the given time, in
// milliseconds.
func NewModel(j *traffic.Junction, now int64, tripOnMaxRed bool) *Model {
	m := &Model{t: tableOf(j), maxRed: tripOnMaxRed}
	m.begin(now)
	return m
}

func (m *Model) begin(now int64) {
	n := m.t.n
	m.given, m.clock, m.history = now, 0, make([]int64, 8)
	m.show, m.since, m.start = strings.Repeat("r", n), make([]int64, n), make([]int64, n)
	m.waits, m.late = make([]int64, n), make([]bool, n)
	m.refused, m.tripped = -1, false
}

// Reset is a person's.
func (m *Model) Reset(now int64) { m.begin(now) }

// Tripped reports whether the monitor must have latched.
func (m *Model) Tripped() bool { return m.tripped }

// Flashing reports whether it must have arrived there.
func (m *Model) Flashing() bool { return m.show[0] == 'x' }

// Want returns what must be shown, and whether this very call must trip.
func (m *Model) Want(now int64, want string) (show string, trips bool) {
	step := max(now-m.given, 0)
	m.given = now
	step = min(step, 1000)
	counts := int64(0)
	for _, h := range m.history {
		counts = max(counts, h)
	}
	counts = min(counts, step)
	copy(m.history, m.history[1:])
	m.history[7] = step
	m.clock += counts

	if m.tripped {
		m.toFlash()
		return m.show, false
	}
	if m.tooRed(counts) {
		m.tripped = true
		m.Trips++
		m.toFlash()
		return m.show, true
	}
	switch {
	case len(want) == m.t.n && strings.Count(want, "x") == m.t.n:
		m.refused = -1
		m.toFlash()
	case m.lawful(want):
		m.refused = -1
		m.become(m.asShown(want))
	default:
		if m.refused < 0 {
			m.refused = m.clock
		}
		if m.clock-m.refused > 300 {
			trips = true
			m.toFlash()
		} else {
			m.hold(want)
		}
	}
	if trips {
		m.tripped = true
		m.Trips++
	}
	return m.show, trips
}

// asShown puts red where a clearance is wanted for a group that is red.
func (m *Model) asShown(want string) string {
	if !strings.ContainsAny(want, "yc") {
		return want
	}
	b := []byte(want)
	for g := range b {
		if m.show[g] == 'r' && (b[g] == 'y' || b[g] == 'c') {
			b[g] = 'r'
		}
	}
	return string(b)
}

// lawful reports whether a state may follow now. Each group is judged alone,
// then each pair.
func (m *Model) lawful(want string) bool {
	n := m.t.n
	if len(want) != n {
		return false
	}
	for g := range n {
		was, is := m.show[g], want[g]
		walk, lasted := m.t.walk[g], m.clock-m.since[g]
		ok := false
		switch is {
		case 'G', 'g':
			ok = green(was) || was == 'r' || was == 'u'
		case 'u':
			ok = (was == 'r' || was == 'u') && !walk
		case 'y', 'c':
			ok = (is == 'c') == walk && (was == is || was == 'r' || green(was) && lasted >= m.t.least[g])
		case 'r':
			switch was {
			case 'r', 'u', 'x':
				ok = true
			case 'y', 'c':
				ok = lasted >= m.t.clear[g]
			case 'G', 'g':
				ok = walk && m.t.clear[g] == 0 && lasted >= m.t.least[g]
			}
		case 'x': // alone it is none of ours; all of them is an order
		}
		if !ok {
			return false
		}
	}
	for a := range n {
		if !enters(want[a]) {
			continue
		}
		comes := !enters(m.show[a]) || want[a] == 'G' && m.show[a] != 'G'
		for b := range n {
			r := m.t.cross[a*n+b]
			switch {
			case r == strangers:
			case enters(want[b]):
				if !r.mayShare(want[a], want[b]) {
					return false
				}
			case comes && !m.gone(b, want[b]):
				return false
			}
		}
	}
	return true
}

// gone reports whether nobody of group b, which is to show is, can be in the way.
func (m *Model) gone(b int, is byte) bool {
	if m.show[b] != 'r' {
		// Its red would begin with this state.
		return is == 'r' && m.t.red[b] == 0 && m.start[b] < 0
	}
	red := m.clock - m.since[b]
	if m.start[b] >= 0 && m.t.clear[b] > 0 && m.clock-m.start[b] < m.t.clear[b]+m.t.red[b] {
		return false
	}
	return red >= m.t.red[b]
}

func (m *Model) become(s string) {
	if s == m.show {
		return
	}
	for g := range m.t.n {
		was, is := m.show[g], s[g]
		if was == is || green(was) && green(is) {
			continue
		}
		m.since[g] = m.clock
		switch {
		case was == 'x':
			m.start[g] = m.clock
		case enters(is):
			m.start[g] = -1
		}
	}
	m.show = s
}

// hold keeps what is shown, but for clearances that are over and not wanted.
func (m *Model) hold(want string) {
	var b []byte
	for g := range m.t.n {
		c := m.show[g]
		if (c == 'y' || c == 'c') && !(g < len(want) && want[g] == c) && m.clock-m.since[g] >= m.t.clear[g] {
			if b == nil {
				b = []byte(m.show)
			}
			b[g] = 'r'
		}
	}
	if b != nil {
		m.become(string(b))
	}
}

// toFlash goes one step on: greens to clearances, those to red, and all reds
// that are old enough to flashing.
func (m *Model) toFlash() {
	if m.show[0] == 'x' {
		return
	}
	dark := true
	b := []byte(m.show)
	for g := range b {
		lasted := m.clock - m.since[g]
		dark = dark && b[g] == 'r' && lasted >= m.t.red[g]
		switch {
		case green(b[g]) && m.t.walk[g] && m.t.clear[g] == 0, b[g] == 'u':
			b[g] = 'r'
		case green(b[g]) && m.t.walk[g]:
			b[g] = 'c'
		case green(b[g]):
			b[g] = 'y'
		case (b[g] == 'y' || b[g] == 'c') && lasted >= m.t.clear[g]:
			b[g] = 'r'
		}
	}
	if dark {
		m.become(strings.Repeat("x", m.t.n))
		return
	}
	m.become(string(b))
}

// tooRed counts reds that have become too long by now, and reports whether one
// must trip.
func (m *Model) tooRed(counts int64) bool {
	greens := 0
	for g := range m.t.n {
		if green(m.show[g]) {
			greens++
		}
	}
	trips := false
	for g := range m.t.n {
		if m.show[g] != 'r' {
			m.waits[g], m.late[g] = 0, false
			continue
		}
		if greens > 0 {
			m.waits[g] += counts
		}
		if m.t.never[g] > 0 && m.waits[g] > m.t.never[g] && !m.late[g] {
			m.late[g] = true
			m.MaxReds++
			trips = trips || m.maxRed
		}
	}
	return trips
}
