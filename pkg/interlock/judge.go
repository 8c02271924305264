package interlock

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// problem is what is wrong with a wanted state.
type problem struct {
	rule   string
	groups []int
	detail string
}

func wrong(rule string, groups []int, format string, args ...any) *problem {
	return &problem{rule, groups, fmt.Sprintf(format, args...)}
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

func meet(w meeting, i int, a, b traffic.Aspect) *problem {
	pair := []int{min(i, w.with), max(i, w.with)}
	if w.conflict {
		return wrong(RuleConflict, pair, "groups %d and %d conflict and would show %s and %s", i, w.with, a, b)
	}
	return wrong(RuleYield, pair, "groups %d and %d would show %s and %s with nobody yielding", i, w.with, a, b)
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
		return wrong(RuleMalformed, nil, "%d aspects for %d groups", len(s), len(m.groups))
	}
	flashing := 0
	for i := range m.groups {
		a := s.At(i)
		switch {
		case !a.Valid():
			return wrong(RuleMalformed, []int{i}, "group %d would show the unknown aspect %q", i, a)
		case a == traffic.Dark && !m.is(faultDark):
			return wrong(RuleDark, []int{i}, "group %d would be dark", i)
		case a == traffic.FlashRed:
			flashing++
		}
	}
	if flashing > 0 && flashing < len(m.groups) && !m.is(faultPartialFlash) {
		return wrong(RuleFlash, nil, "%d of %d groups would flash", flashing, len(m.groups))
	}
	return nil
}

// suits judges whether the aspect is for that kind of group.
func (m *Monitor) suits(i int, a traffic.Aspect) *problem {
	ped := m.groups[i].ped
	if ped && (a == traffic.Yellow || a == traffic.RedYellow) || !ped && a == traffic.PedClear {
		return wrong(RuleSequence, []int{i}, "group %d would show %s, which is not for %s", i, a, m.j.Groups[i].Kind)
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
					return meet(w, i, a, b)
				}
				continue
			}
			if gains {
				if p := m.cleared(t, i, w, b); p != nil {
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
	name := m.j.Groups[i].Name
	switch was {
	case traffic.Green, traffic.Permissive:
		switch {
		case a.Go():
			return nil
		case age < g.minGreen && !m.is(faultNoMinGreen):
			return wrong(RuleMinGreen, []int{i}, "group %d %q green for %d ms, at least %d", i, name, age, g.minGreen)
		case g.ped && (a == traffic.PedClear || a == traffic.Red && (g.clear == 0 || m.is(faultSkipPedClear))):
			return nil
		case g.ped:
			return wrong(RulePedClear, []int{i}, "group %d %q from green to %s without clearance", i, name, a)
		case a == traffic.Yellow, a == traffic.Red && m.is(faultSkipYellow):
			return nil
		}
		return wrong(RuleYellow, []int{i}, "group %d %q from green to %s without yellow", i, name, a)
	case traffic.Yellow, traffic.PedClear:
		rule := RuleYellow
		if g.ped {
			rule = RulePedClear
		}
		switch {
		case a.Go() && m.is(faultTakeBack):
			return nil
		case a != traffic.Red:
			return wrong(rule, []int{i}, "group %d %q from %s to %s", i, name, was, a)
		case t.age[i]+t.slack[i] < m.clear(i):
			return wrong(rule, []int{i}, "group %d %q shows %s for %d ms, at least %d", i, name, was, age, g.clear)
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
	return wrong(RuleSequence, []int{i}, "group %d %q from %s to %s", i, name, was, a)
}

// cleared judges whether the group that i meets, which is to show b, has been
// gone for long enough for i to be let in.
func (m *Monitor) cleared(t *track, i int, w meeting, b traffic.Aspect) *problem {
	k := w.with
	g := &m.groups[k]
	pair := []int{min(i, k), max(i, k)}
	if !w.conflict && m.is(faultNoYieldClearance) {
		return nil
	}
	if b != traffic.Red && !late(t.show[k], b) {
		if m.is(faultIntoYellow) {
			return nil
		}
		return wrong(RuleClearance, pair, "group %d let in while group %d shows %s", i, k, b)
	}
	var age int64
	if t.show[k] == traffic.Red || m.is(faultAgesStay) {
		age = t.age[k] + t.slack[k]
	}
	if left := t.starting[k] + g.allRed - age; t.starting[k] > 0 && left > 0 {
		return wrong(RuleStart, pair, "group %d let in %d ms before group %d has been red for long enough after a start", i, left, k)
	}
	if age < g.allRed && !m.is(faultNoAllRed) {
		return wrong(RuleClearance, pair, "group %d let in when group %d has been red for %d ms, at least %d", i, k, age, g.allRed)
	}
	return nil
}
