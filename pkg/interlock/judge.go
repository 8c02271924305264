package interlock

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// problem is what is wrong with a wanted state. It is put into words only where
// somebody reads them: a monitor refuses far more often than it trips.
type problem struct {
	rule string
	text complaint
	i, k int // groups, -1 where there is none
	a, b traffic.Aspect
	n, m int64
}

// complaint is a form of words.
type complaint uint8

const (
	sayTogether complaint = iota // i and k conflict, as a and b
	sayNobodyYields
	sayLength  // n aspects for m groups
	sayUnknown // i shows a
	sayDark
	sayPartial // n of m flash
	sayUnfit   // a is not for i
	sayGreenShort
	sayNoPedClear
	sayNoYellow
	sayFromTo // i goes from a to b
	sayClearShort
	sayIntoClearance // i let in, k shows a
	sayStart         // i let in, n ms before k is known to be gone
	sayNoAllRed      // i let in, k red for n of m ms
)

// wrong keeps a problem in the monitor, so that nothing is allocated: there is
// one at a time.
func (m *Monitor) wrong(rule string, text complaint, p problem) *problem {
	p.rule, p.text = rule, text
	m.found = p
	return &m.found
}

// groups returns the groups of p in rising order.
func (p *problem) groups() []int {
	switch {
	case p.i < 0:
		return nil
	case p.k < 0:
		return []int{p.i}
	}
	return []int{min(p.i, p.k), max(p.i, p.k)}
}

// detail puts p into words.
func (m *Monitor) detail(p *problem) string {
	name := ""
	if p.i >= 0 {
		name = m.j.Groups[p.i].Name
	}
	switch p.text {
	case sayTogether:
		return fmt.Sprintf("groups %d and %d conflict and would show %s and %s", p.i, p.k, p.a, p.b)
	case sayNobodyYields:
		return fmt.Sprintf("groups %d and %d would show %s and %s with nobody yielding", p.i, p.k, p.a, p.b)
	case sayLength:
		return fmt.Sprintf("%d aspects for %d groups", p.n, p.m)
	case sayUnknown:
		return fmt.Sprintf("group %d would show the unknown aspect %q", p.i, p.a)
	case sayDark:
		return fmt.Sprintf("group %d would be dark", p.i)
	case sayPartial:
		return fmt.Sprintf("%d of %d groups would flash", p.n, p.m)
	case sayUnfit:
		return fmt.Sprintf("group %d would show %s, which is not for %s", p.i, p.a, m.j.Groups[p.i].Kind)
	case sayGreenShort:
		return fmt.Sprintf("group %d %q green for %d ms, at least %d", p.i, name, p.n, p.m)
	case sayNoPedClear:
		return fmt.Sprintf("group %d %q from green to %s without clearance", p.i, name, p.b)
	case sayNoYellow:
		return fmt.Sprintf("group %d %q from green to %s without yellow", p.i, name, p.b)
	case sayClearShort:
		return fmt.Sprintf("group %d %q shows %s for %d ms, at least %d", p.i, name, p.a, p.n, p.m)
	case sayIntoClearance:
		return fmt.Sprintf("group %d let in while group %d shows %s", p.i, p.k, p.a)
	case sayStart:
		return fmt.Sprintf("group %d let in %d ms before group %d has been red for long enough after a start", p.i, p.n, p.k)
	case sayNoAllRed:
		return fmt.Sprintf("group %d let in when group %d has been red for %d ms, at least %d", p.i, p.k, p.n, p.m)
	}
	return fmt.Sprintf("group %d %q from %s to %s", p.i, name, p.a, p.b) // sayFromTo
}

// letIn reports whether the aspect lets a group in, or is about to.
func letIn(a traffic.Aspect) bool { return a.Go() || a == traffic.RedYellow }

// late reports whether a clearance is wanted for a group that is red already,
// because the monitor took it there during a refusal. Red is safe instead.
func late(shown, want traffic.Aspect) bool {
	return shown == traffic.Red && (want == traffic.Yellow || want == traffic.PedClear)
}

// allowed reports whether two groups that meet may be let in as a and b.
func (w meeting) allowed(a, b traffic.Aspect) bool {
	if w.conflict {
		return false
	}
	return w.weYield && a == traffic.Permissive || w.theyYield && b == traffic.Permissive
}

func (m *Monitor) meet(w meeting, i int, a, b traffic.Aspect) *problem {
	p := problem{i: i, k: w.with, a: a, b: b}
	if w.conflict {
		return m.wrong(RuleConflict, sayTogether, p)
	}
	return m.wrong(RuleYield, sayNobodyYields, p)
}

func (m *Monitor) clear(i int) int64 {
	if m.is(faultShortYellow) && !m.groups[i].ped {
		return m.groups[i].clear / 2
	}
	if m.is(faultShortPedClear) && m.groups[i].ped {
		return m.groups[i].clear / 2
	}
	return m.groups[i].clear
}

// form judges a state without its history.
func (m *Monitor) form(s traffic.State) *problem {
	if len(s) != len(m.groups) && !(m.is(faultAnyLength) && len(s) > len(m.groups)) {
		return m.wrong(RuleMalformed, sayLength, problem{i: -1, k: -1, n: int64(len(s)), m: int64(len(m.groups))})
	}
	flashing := 0
	for i := range m.groups {
		a := s.At(i)
		switch {
		case !a.Valid():
			return m.wrong(RuleMalformed, sayUnknown, problem{i: i, k: -1, a: a})
		case a == traffic.Dark && !m.is(faultDark):
			return m.wrong(RuleDark, sayDark, problem{i: i, k: -1})
		case a == traffic.FlashRed:
			flashing++
		}
	}
	if flashing > 0 && flashing < len(m.groups) && !m.is(faultPartialFlash) {
		return m.wrong(RuleFlash, sayPartial, problem{i: -1, k: -1, n: int64(flashing), m: int64(len(m.groups))})
	}
	return nil
}

// suits judges whether the aspect is for that kind of group.
func (m *Monitor) suits(i int, a traffic.Aspect) *problem {
	ped := m.groups[i].ped
	if ped && (a == traffic.Yellow || a == traffic.RedYellow) || !ped && a == traffic.PedClear {
		return m.wrong(RuleSequence, sayUnfit, problem{i: i, k: -1, a: a})
	}
	return nil
}

// judge returns the first invariant that showing want, after what t shows,
// would break; nil where it breaks none.
func (m *Monitor) judge(t *track, want traffic.State) *problem {
	if p := m.form(want); p != nil {
		return p
	}
	for i := range m.groups {
		if p := m.follows(t, i, want.At(i)); p != nil {
			return p
		}
	}
	for i := range m.groups {
		a := want.At(i)
		if !letIn(a) || m.is(faultRedYellowFree) && a == traffic.RedYellow {
			continue
		}
		// Who was let in already, and is no more protected than before, has the
		// right to be there; the other one has to wait.
		gains := !letIn(t.show[i]) || a == traffic.Green && t.show[i] != traffic.Green
		if m.is(faultProtectFreely) && t.show[i] == traffic.Permissive {
			gains = false
		}
		for _, w := range m.groups[i].meets {
			b := want.At(w.with)
			if m.is(faultRedYellowFree) && b == traffic.RedYellow {
				continue
			}
			if letIn(b) {
				if !w.allowed(a, b) {
					return m.meet(w, i, a, b)
				}
				continue
			}
			if gains {
				if p := m.cleared(t, i, w, a, b); p != nil {
					return p
				}
			}
		}
	}
	return nil
}

// follows judges whether group i may show a next.
func (m *Monitor) follows(t *track, i int, a traffic.Aspect) *problem {
	if p := m.suits(i, a); p != nil {
		return p
	}
	was, age, g := t.show[i], t.age[i]+t.slack[i], &m.groups[i]
	if a == was || late(was, a) {
		return nil
	}
	switch was {
	case traffic.Green, traffic.Permissive:
		switch {
		case a.Go():
			return nil
		case age < g.minGreen && !m.is(faultNoMinGreen):
			return m.wrong(RuleMinGreen, sayGreenShort, problem{i: i, k: -1, n: age, m: g.minGreen})
		case g.ped && (a == traffic.PedClear || a == traffic.Red && (g.clear == 0 || m.is(faultSkipPedClear))):
			return nil
		case g.ped:
			return m.wrong(RulePedClear, sayNoPedClear, problem{i: i, k: -1, b: a})
		case a == traffic.Yellow, a == traffic.Red && m.is(faultSkipYellow):
			return nil
		}
		return m.wrong(RuleYellow, sayNoYellow, problem{i: i, k: -1, b: a})
	case traffic.Yellow, traffic.PedClear:
		rule := RuleYellow
		if g.ped {
			rule = RulePedClear
		}
		switch {
		case a.Go() && m.is(faultTakeBack):
			return nil
		case a != traffic.Red:
			return m.wrong(rule, sayFromTo, problem{i: i, k: -1, a: was, b: a})
		case t.age[i]+t.slack[i] < m.clear(i):
			return m.wrong(rule, sayClearShort, problem{i: i, k: -1, a: was, n: age, m: g.clear})
		}
		return nil
	case traffic.RedYellow:
		if a == traffic.Red || a.Go() {
			return nil
		}
	case traffic.FlashRed:
		if a == traffic.Red {
			return nil
		}
	case traffic.Red:
		if letIn(a) {
			return nil
		}
	}
	if m.is(faultDark) || m.is(faultPartialFlash) {
		return nil
	}
	return m.wrong(RuleSequence, sayFromTo, problem{i: i, k: -1, a: was, b: a})
}

// cleared judges whether the group that i meets, which is to show b, has been
// gone for long enough for i to be let in as a.
func (m *Monitor) cleared(t *track, i int, w meeting, a, b traffic.Aspect) *problem {
	k := w.with
	g := &m.groups[k]
	if !w.conflict && m.is(faultNoYieldClearance) {
		return nil
	}
	if b != traffic.Red && !late(t.show[k], b) {
		if t.outside && t.show[k].Go() && w.allowed(a, traffic.Permissive) {
			return nil // both were green for a moment between two looks
		}
		if m.is(faultIntoYellow) {
			return nil
		}
		return m.wrong(RuleClearance, sayIntoClearance, problem{i: i, k: k, a: b})
	}
	var age int64
	if t.show[k] == traffic.Red || m.is(faultAgesStay) {
		age = t.age[k] + t.slack[k]
	}
	if left := t.starting[k] + g.allRed - age; t.starting[k] > 0 && left > 0 {
		return m.wrong(RuleStart, sayStart, problem{i: i, k: k, n: left})
	}
	if age < g.allRed && !m.is(faultNoAllRed) {
		return m.wrong(RuleClearance, sayNoAllRed, problem{i: i, k: k, n: age, m: g.allRed})
	}
	return nil
}
