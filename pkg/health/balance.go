package health

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

const (
	windowMS  = 15 * 60_000
	fewest    = 100 // counts of one of them before they are compared
	sigmas    = 5
	clearing  = 3 // standard deviations by which a comparison must be able to clear
	shareOf   = 8
	vehicleCM = 750 // a standing vehicle
	// insideAll is how many vehicles stand inside a junction, for each of its exits.
	insideAll   = 4
	agreeing    = 2  // windows
	mostPieces  = 50 // stretches without gaps that one comparison may be put together of
	jitterMS    = 500
	mostNamed   = 8
	reasonBytes = 255
	// Members of a comparison may have been observed for times that differ by that
	// share and that much: frames of two devices do not end together.
	unseenShare = 64
	unseenMS    = 2000
)

// equation is a pair of sets of detectors that count the same vehicles.
type equation struct {
	what    string
	in, out []int // indices of detectors
	storage int64
	// group: equations of one lane are compared together, so that one may clear
	// what another one accuses.
	group int
	// junction: over the whole junction and not along a lane.
	junction bool

	from      int64 // when counting began, Unix ms
	inN, outN int64
	pieces    int64 // stretches without gaps, 0 before the first count
	// seen is for how long each member was observed: those of in, then of out.
	seen []int64
	last outcome
}

// outcome is that of the newest comparison.
type outcome struct {
	state     int8 // 0: none yet, 1: agrees, 2: does not
	inN, outN int64
	tol       int64
	from, at  int64 // Unix ms
}

func (o *outcome) diff() int64 { return max(o.inN-o.outN, o.outN-o.inN) }
func (o *outcome) sum() int64  { return o.inN + o.outN }

const (
	agrees    = 1
	disagrees = 2
)

func (e *equation) has(d int) bool { return slices.Contains(e.in, d) || slices.Contains(e.out, d) }

// balance compares what detectors of one junction count.
type balance struct {
	until  int64 // end of the window, Unix ms; 0: none has begun
	eqs    []equation
	groups int
	of     [][]int // by detector, the equations that it is in
}

// counts reports whether a detector counts each vehicle that passes it.
func counts(k traffic.DetectorKind) bool {
	return k == traffic.StopLine || k == traffic.Advance || k == traffic.Area
}

// reach returns between which distances from the stop line (or from the start of
// an exit lane) a detector counts. Where in its length an area does is not said.
func reach(d traffic.Detector) (near, far int64) {
	if d.Kind == traffic.Area || d.Kind == traffic.ExitArea {
		return d.FromStopLineCM, d.FromStopLineCM + d.LengthCM
	}
	return d.FromStopLineCM, d.FromStopLineCM
}

func far(j *traffic.Junction, d int) int64 {
	_, far := reach(j.Detectors[d])
	return far
}

func newBalance(j *traffic.Junction) balance {
	b := balance{of: make([][]int, len(j.Detectors))}
	entries, exits := map[traffic.LaneID]bool{}, map[traffic.LaneID]bool{}
	for _, m := range j.Movements {
		entries[m.From], exits[m.To] = true, true
	}
	whole := equation{what: "in and out of the junction", junction: true}
	covered := len(j.Movements) > 0
	for _, l := range j.Lanes { // in the order of the definition
		var at []int
		for i, d := range j.Detectors {
			if d.Lane == l.ID && counts(d.Kind) && !exits[l.ID] {
				at = append(at, i)
			}
		}
		slices.SortStableFunc(at, func(a, c int) int { return cmp.Compare(far(j, c), far(j, a)) })
		for x := range at {
			for y := x + 1; y < len(at); y++ {
				near, _ := reach(j.Detectors[at[y]])
				b.eqs = append(b.eqs, equation{what: "along lane " + string(l.ID), in: []int{at[x]}, out: []int{at[y]}, group: b.groups,
					storage: (far(j, at[x])-near)/vehicleCM + 2})
			}
		}
		b.groups++
		if entries[l.ID] {
			if len(at) == 0 {
				covered = false
				continue
			}
			last := at[len(at)-1]
			whole.in = append(whole.in, last)
			whole.storage += far(j, last)/vehicleCM + 1
		}
	}
	for _, l := range j.Lanes {
		if !exits[l.ID] {
			continue
		}
		var at []int
		for i, d := range j.Detectors {
			if d.Lane == l.ID && d.Kind == traffic.ExitArea {
				at = append(at, i)
				whole.storage += far(j, i)/vehicleCM + insideAll
			}
		}
		covered = covered && len(at) == 1 && !entries[l.ID]
		whole.out = append(whole.out, at...)
	}
	if covered {
		whole.group = b.groups
		b.groups++
		b.eqs = append(b.eqs, whole)
	}
	for e := range b.eqs {
		b.eqs[e].seen = make([]int64, len(b.eqs[e].in)+len(b.eqs[e].out))
		for _, d := range append(slices.Clone(b.eqs[e].in), b.eqs[e].out...) {
			b.of[d] = append(b.of[d], e)
		}
	}
	return b
}

// count adds what detector d has counted after a gap.
func (b *balance) count(d int, s span, gap int64) {
	for _, k := range b.of[d] {
		e := &b.eqs[k]
		if i := slices.Index(e.in, d); i >= 0 {
			e.inN += s.count
			e.seen[i] += s.to - s.from
		} else {
			e.outN += s.count
			e.seen[len(e.in)+slices.Index(e.out, d)] += s.to - s.from
		}
		if e.pieces == 0 {
			e.from = s.from
		}
		if e.pieces == 0 || gap > jitterMS {
			e.pieces++
		}
	}
}

func (e *equation) restart() {
	e.inN, e.outN, e.pieces = 0, 0, 0
	clear(e.seen)
}

// together reports whether all members were observed for as long as each other:
// what only one of them was there to see cannot be compared.
func (e *equation) together() bool {
	most := slices.Max(e.seen)
	return most-slices.Min(e.seen) <= most/unseenShare+unseenMS
}

// ceilSqrt returns the least r with r·r ≥ n, for n ≥ 0.
func ceilSqrt(n int64) int64 {
	if n <= 0 {
		return 0
	}
	r := int64(1) << ((bits.Len64(uint64(n)) + 1) / 2) // at least the root
	for {
		next := (r + n/r) / 2
		if next >= r {
			break
		}
		r = next
	}
	if r*r < n {
		r++
	}
	return r
}

// compare closes the window if it has ended, and returns what has changed.
func (m *Monitor) compare(now int64) []Change {
	b := &m.balance
	if len(b.eqs) == 0 {
		return nil
	}
	if b.until == 0 {
		b.until = now + windowMS
	}
	if now < b.until {
		return nil
	}
	b.until = now + windowMS
	due := make([]bool, b.groups)
	for k := range b.eqs {
		e := &b.eqs[k]
		due[e.group] = due[e.group] || max(e.inN, e.outN) >= fewest || e.pieces > mostPieces
	}
	fresh := make([]bool, len(m.tracks)) // something new is known of the detector
	for k := range b.eqs {
		e := &b.eqs[k]
		members := append(slices.Clone(e.in), e.out...)
		rests := slices.ContainsFunc(members, func(d int) bool { return m.tracks[d].broken() })
		if !rests && !due[e.group] {
			continue
		}
		o := outcome{inN: e.inN, outN: e.outN, from: e.from, at: now}
		if !rests && e.pieces <= mostPieces && e.together() && max(e.inN, e.outN) >= fewest {
			o.state = agrees
			o.tol = ceilSqrt(sigmas*sigmas*o.sum()) + max(e.inN, e.outN)/shareOf + e.storage*e.pieces
			if o.diff() > o.tol {
				o.state = disagrees
			}
			for _, d := range members {
				fresh[d] = true
			}
		}
		e.last = o
		e.restart()
	}
	return m.name(now, fresh)
}

// name says which detectors are at fault by the newest comparisons.
func (m *Monitor) name(now int64, fresh []bool) []Change {
	b := &m.balance
	blamed, suspect := make([]int, len(m.tracks)), make([]int, len(m.tracks)) // 1 + the equation that says so
	for _, c := range b.components() {
		who := b.candidates(c)
		lanes := slices.ContainsFunc(c, func(k int) bool { return !b.eqs[k].junction })
		for _, k := range c {
			e := &b.eqs[k]
			if e.junction && lanes {
				continue // what is wrong on a lane explains the junction's count too
			}
			for _, d := range append(slices.Clone(e.in), e.out...) {
				switch {
				case len(who) == 1 && who[0] == d && blamed[d] == 0:
					blamed[d] = 1 + k
				case len(who) != 1 && suspect[d] == 0:
					suspect[d] = 1 + k
				}
			}
		}
	}
	var out []Change
	for d := range m.tracks {
		for _, r := range [...]int{implausible, imbalance} {
			by := blamed[d]
			if r == imbalance {
				by = suspect[d]
			}
			v := &m.tracks[d].verdicts[r]
			step := int64(0)
			if fresh[d] {
				step = 1
			}
			if !v.update(by > 0, now, step, agreeing, true) {
				continue
			}
			ch := Change{Detector: m.j.Detectors[d].ID, Rule: rules[r], Failed: v.failed, Since: utc(now), At: utc(now)}
			if v.failed {
				ch.Reason = m.reason(&b.eqs[by-1])
			} else {
				ch.Reason = fmt.Sprintf("agrees with its neighbours in %d windows", agreeing)
			}
			out = append(out, ch)
		}
	}
	return out
}

// components returns the comparisons that fail, those together that share a
// detector.
func (b *balance) components() [][]int {
	var out [][]int
	seen := make([]bool, len(b.eqs))
	for k := range b.eqs {
		if b.eqs[k].last.state != disagrees || seen[k] {
			continue
		}
		c := []int{k}
		seen[k] = true
		for i := 0; i < len(c); i++ {
			e := &b.eqs[c[i]]
			for _, d := range append(slices.Clone(e.in), e.out...) {
				for _, n := range b.of[d] {
					if !seen[n] && b.eqs[n].last.state == disagrees {
						seen[n] = true
						c = append(c, n)
					}
				}
			}
		}
		slices.Sort(c)
		out = append(out, c)
	}
	return out
}

// candidates returns the detectors of which any one alone would explain why all
// comparisons in c fail, while those that hold do.
func (b *balance) candidates(c []int) []int {
	var out []int
	first := &b.eqs[c[0]]
	for _, d := range append(slices.Clone(first.in), first.out...) {
		all := true
		for _, k := range c {
			all = all && b.eqs[k].has(d)
		}
		if all && !b.cleared(d, c) {
			out = append(out, d)
		}
	}
	return out
}

// cleared reports whether a comparison with d holds that would not, had d been
// wrong by as much as the comparisons in c say.
func (b *balance) cleared(d int, c []int) bool {
	for _, k := range b.of[d] {
		e := &b.eqs[k]
		if e.last.state != agrees {
			continue
		}
		can := true
		for _, n := range c {
			f := &b.eqs[n]
			// It must have seen at least what the other one has.
			can = can && e.last.from <= f.last.from && e.last.at >= f.last.at &&
				f.last.diff()-f.storage-e.last.tol > ceilSqrt(clearing*clearing*(e.last.sum()+f.last.sum()))
		}
		if can {
			return true
		}
	}
	return false
}

// reason gives a comparison's figures and the detectors, as far as there is room.
func (m *Monitor) reason(e *equation) string {
	s := fmt.Sprintf("%s: %d counted in, %d out, %d may be between (", e.what, e.last.inN, e.last.outN, e.last.tol)
	var names []string
	for i, d := range append(slices.Clone(e.in), e.out...) {
		if i == mostNamed {
			names = append(names, fmt.Sprintf("%d more", len(e.in)+len(e.out)-i))
			break
		}
		names = append(names, string(m.j.Detectors[d].ID))
	}
	s += strings.Join(names, ", ") + ")"
	if len(s) > reasonBytes {
		s = strings.ToValidUTF8(s[:reasonBytes], "")
	}
	return s
}
