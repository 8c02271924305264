package interlock

import (
	"fmt"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// The names of the rules, as a [Trip] and [Counts] give them.
const (
	RuleConflict  = "conflict"      // conflicting groups let in together
	RuleYield     = "yield"         // protected green against a group that it must give way to
	RuleClearance = "clearance"     // let in before a group that it meets was red for long enough
	RuleYellow    = "yellow"        // yellow left out, cut short, or taken back
	RulePedClear  = "ped-clearance" // pedestrian clearance left out, cut short, or taken back
	RuleMinGreen  = "minimum-green" // green cut short
	RuleMaxRed    = "maximum-red"   // red for too long
	RuleSequence  = "sequence"      // an aspect that may not follow, or is not for this kind of group
	RuleDark      = "dark"          // a group unlit
	RuleFlash     = "partial-flash" // some groups flashing, others not
	RuleStart     = "start"         // let in before the red of a start has passed
	RuleMalformed = "malformed"     // not one valid aspect a group
	tripAfter     = 300             // ms of refusals without a break that are borne
)

// Trip says why a monitor has latched.
type Trip struct {
	At     time.Time // as the caller's clock had it
	Rule   string    // one of the Rule constants
	Groups []int     // the groups that the rule was broken with, in rising order
	Detail string    // in words, with times in milliseconds
}

func (t Trip) String() string { return t.Rule + ": " + t.Detail }

// Counts are what a monitor has seen since it was made.
type Counts struct {
	States  uint64 // wanted or observed states judged
	Trips   uint64
	Refused map[string]uint64 // states refused, by rule
	MaxRed  uint64            // reds that lasted longer than the maximum
}

// group is what is known of one signal group, times in milliseconds.
type group struct {
	ped                             bool
	minGreen, clear, allRed, maxRed int64
	meets                           []meeting
}

// meeting is one other group whose path is crossed.
type meeting struct {
	with int
	// conflict: never together. Otherwise weYield and theyYield say who gives
	// way while permissive.
	conflict, weYield, theyYield bool
}

// track is a sequence of lamp states, as shown or as seen.
type track struct {
	clock stopwatch
	show  []traffic.Aspect
	age   []int64 // how long each group has shown that, ms
	slack []int64 // how much longer it may have been so, seen from outside
	// starting[g] is how much red is still asked of g beyond its all-red, since
	// nobody knows what it showed before.
	starting []int64
	red      []int64 // how long g has been red while others had green
	overdue  []bool  // that was longer than the maximum, and is counted
	refused  int64   // how long states have been refused without a break
	refusing bool
	known    bool
	outside  bool // seen now and then, and not made here
	// text is show as a state; "" where that has changed.
	text traffic.State
}

// Monitor watches one junction. It has one owner; it does not lock.
type Monitor struct {
	j        *traffic.Junction
	groups   []group
	flashing traffic.State
	filters  bool  // Filter has been called
	out      track // what Filter shows
	seen     track // what Supervise was told
	trip     *Trip
	counts   Counts
	maxRed   bool
	found    problem                  // the newest, see wrong
	letters  []byte                   // scratch for a state
	before   []traffic.Aspect         // scratch for what was seen
	states   map[string]traffic.State // shown before, so that showing one again allocates nothing
	fault    fault                    // only tests set it: one check left out
}

// New returns a monitor that shows all red and takes it that every group was
// green until now. An error joins everything that is wrong with the definition.
func New(j *traffic.Junction, now time.Time) (*Monitor, error) {
	if err := j.Check(); err != nil {
		return nil, kind.Errorf(kind.Invalid, "interlock: %w", err)
	}
	return build(j, now, 0), nil
}

func build(j *traffic.Junction, now time.Time, f fault) *Monitor {
	n := len(j.Groups)
	m := &Monitor{j: j, groups: make([]group, n), flashing: traffic.AllOf(traffic.FlashRed, n), fault: f, counts: Counts{Refused: map[string]uint64{}},
		letters: make([]byte, n), before: make([]traffic.Aspect, n), states: map[string]traffic.State{}}
	orElse := func(own, common int64) int64 {
		if own > 0 {
			return own
		}
		return common
	}
	for i, g := range j.Groups {
		own := g
		if m.is(faultOverrideMinGreen) {
			own.MinGreenMS = 0
		}
		if m.is(faultOverrideYellow) {
			own.YellowMS = 0
		}
		if m.is(faultOverrideAllRed) {
			own.AllRedMS = 0
		}
		x := &m.groups[i]
		x.ped = g.Kind == traffic.Pedestrians
		x.minGreen = orElse(own.MinGreenMS, j.Timing.MinGreenMS)
		x.allRed = orElse(own.AllRedMS, j.Timing.AllRedMS)
		x.maxRed = j.Timing.MaxRedMS
		if x.ped {
			x.clear = g.PedClearMS
		} else {
			x.clear = orElse(own.YellowMS, j.Timing.YellowMS)
		}
	}
	for a := range n {
		for b := range n {
			if a == b {
				continue
			}
			w := meeting{
				with:      b,
				conflict:  lists(j.Conflicts, a, b) || lists(j.Conflicts, b, a),
				weYield:   lists(j.Yields, a, b),
				theyYield: lists(j.Yields, b, a),
			}
			if m.is(faultOneWayConflicts) {
				w.conflict = a < b && w.conflict
			}
			if m.is(faultNoConflicts) {
				w.conflict = false
			}
			if m.is(faultNoYields) {
				w.weYield, w.theyYield = false, false
			}
			if m.is(faultLastGroup) && (a == n-1 || b == n-1) {
				continue
			}
			if w.conflict || w.weYield || w.theyYield {
				m.groups[a].meets = append(m.groups[a].meets, w)
			}
		}
	}
	m.out, m.seen = m.allRed(now), m.allRed(now)
	m.out.known, m.seen.outside = true, true
	return m
}

func lists(of [][]int, a, b int) bool {
	if a >= len(of) {
		return false
	}
	for _, x := range of[a] {
		if x == b {
			return true
		}
	}
	return false
}

// allRed returns the track of a start with unknown history.
func (m *Monitor) allRed(now time.Time) track {
	n := len(m.groups)
	t := track{
		clock: stopwatch{last: now},
		show:  make([]traffic.Aspect, n), age: make([]int64, n), slack: make([]int64, n),
		starting: make([]int64, n), red: make([]int64, n), overdue: make([]bool, n),
	}
	for i := range t.show {
		t.show[i], t.starting[i] = traffic.Red, m.groups[i].clear
		if m.is(faultNoStart) {
			t.starting[i] = 0
		}
	}
	return t
}

// TripOnMaxRed says whether a red that lasts longer than the maximum trips the
// monitor. It does not unless told to: see the package comment.
func (m *Monitor) TripOnMaxRed(on bool) { m.maxRed = on }

// Counts returns a copy of the counters.
func (m *Monitor) Counts() Counts {
	c := m.counts
	c.Refused = make(map[string]uint64, len(m.counts.Refused))
	for k, v := range m.counts.Refused {
		c.Refused[k] = v
	}
	return c
}

// Shown returns the state that Filter showed last.
func (m *Monitor) Shown() traffic.State { return m.state(&m.out) }

// Tripped returns why the monitor has latched, nil while it has not.
func (m *Monitor) Tripped() *Trip {
	if m.trip == nil {
		return nil
	}
	t := *m.trip
	return &t
}

// Accept refuses, as a whole, a stage that the junction does not have (kind
// NotFound) or that lets in groups that must not be let in together (kind
// Invalid, naming them). While tripped it refuses every stage (kind Conflict).
func (m *Monitor) Accept(stage int) error {
	if m.trip != nil {
		return kind.Errorf(kind.Conflict, "stage %d: the interlock of junction %s has tripped: %s", stage, m.j.ID, m.trip)
	}
	if stage < 0 || stage >= len(m.j.Stages) {
		return kind.Errorf(kind.NotFound, "stage %d: junction %s has stages 0 to %d", stage, m.j.ID, len(m.j.Stages)-1)
	}
	s := m.j.Stages[stage]
	if len(s.State) != len(m.groups) {
		return kind.Errorf(kind.Invalid, "stage %d %q: %d aspects for %d groups", stage, s.Name, len(s.State), len(m.groups))
	}
	var wrong []string
	for i := range m.groups {
		if a := s.State.At(i); a != traffic.Red && !a.Go() {
			wrong = append(wrong, fmt.Sprintf("group %d shows %q", i, a))
		}
		for _, w := range m.groups[i].meets {
			if i < w.with && s.State.At(i).Go() && s.State.At(w.with).Go() && !w.allowed(s.State.At(i), s.State.At(w.with)) {
				rule := "conflict"
				if !w.conflict {
					rule = "need one of them to yield"
				}
				wrong = append(wrong, fmt.Sprintf("groups %d %q and %d %q %s", i, m.j.Groups[i].Name, w.with, m.j.Groups[w.with].Name, rule))
			}
		}
	}
	if len(wrong) > 0 {
		return kind.Errorf(kind.Invalid, "stage %d %q: %s", stage, s.Name, strings.Join(wrong, "; "))
	}
	return nil
}

// Resume tells the monitor what the lamps show when it takes over from somebody
// else, instead of the all red that it begins with. How long they have shown it
// is not known, so that every minimum begins now. A state that breaks I1, I2 or
// I7 is an error of kind Invalid and the monitor goes on as it was: show what
// Filter returns then. A tripped monitor does not resume (kind Conflict).
func (m *Monitor) Resume(now time.Time, observed traffic.State) error {
	if m.trip != nil {
		return kind.Errorf(kind.Conflict, "resume: the interlock of junction %s has tripped: %s", m.j.ID, m.trip)
	}
	t := m.allRed(now)
	if p := m.adopt(&t, observed); p != nil {
		return kind.Errorf(kind.Invalid, "resume from %q: %s: %s", observed, p.rule, m.detail(p))
	}
	t.known = true
	m.out = t
	return nil
}

// adopt makes t begin with the observed state.
func (m *Monitor) adopt(t *track, observed traffic.State) *problem {
	if p := m.form(observed); p != nil {
		return p
	}
	flash := observed.At(0) == traffic.FlashRed
	for i := range m.groups {
		a := observed.At(i)
		if p := m.suits(i, a); p != nil {
			return p
		}
		for _, w := range m.groups[i].meets {
			b := observed.At(w.with)
			if letIn(a) && letIn(b) && !w.allowed(a, b) {
				return m.meet(w, i, a, b)
			}
		}
	}
	for i := range m.groups {
		t.show[i], t.age[i], t.text = observed.At(i), 0, ""
		if !flash {
			t.starting[i] = 0
		}
	}
	t.known = true
	return nil
}

// Reset lets a tripped monitor go on, from all red, in the name of a person. It
// is an error of kind Conflict where nothing has tripped or flashing has not
// been reached, and of kind Invalid without a name.
func (m *Monitor) Reset(now time.Time, by string) error {
	switch {
	case strings.TrimSpace(by) == "" && !m.is(faultNamelessReset):
		return kind.Errorf(kind.Invalid, "reset of junction %s: needs the name of the person who resets", m.j.ID)
	case m.trip == nil:
		return kind.Errorf(kind.Conflict, "reset of junction %s: the interlock has not tripped", m.j.ID)
	case m.filters && m.state(&m.out) != m.flashing:
		return kind.Errorf(kind.Conflict, "reset of junction %s: still on its way to flashing", m.j.ID)
	}
	m.trip = nil
	m.out, m.seen = m.allRed(now), m.allRed(now)
	m.out.known, m.seen.outside = true, true
	if m.is(faultResetTrusts) {
		clear(m.out.starting)
	}
	return nil
}

// Filter takes every state on its way to the lamps and returns the one to show:
// the wanted one, or, where that would break an invariant, a safe one. The trip
// is returned by the call that trips, and only by that one; [Monitor.Tripped]
// keeps it.
func (m *Monitor) Filter(now time.Time, want traffic.State) (show traffic.State, trip *Trip) {
	m.counts.States++
	m.filters = true
	t := &m.out
	dt := t.tick(now, m.fault)
	if m.trip != nil && !(m.is(faultUnlatch) && m.judge(t, want) == nil) {
		m.flash(t)
		return m.state(t), nil
	}
	// Before anything new is shown: a green that came with the trip would turn
	// yellow without having been seen.
	if trip = m.watchRed(t, dt, now); trip != nil {
		m.flash(t)
		return m.state(t), trip
	}
	if m.wantsFlash(want) {
		t.refusing, t.refused = false, 0
		m.flash(t)
	} else if p := m.judge(t, want); p == nil {
		t.refusing = false
		if !m.is(faultGlitchesAdd) {
			t.refused = 0
		}
		m.take(t, want)
	} else {
		trip = m.refuse(t, p, dt, now)
		switch {
		case trip != nil:
			m.flash(t)
		case m.is(faultShowRefused) && len(want) == len(m.groups):
			m.take(t, want)
		default:
			m.hold(t, want)
		}
	}
	return m.state(t), trip
}

// Supervise judges what a controller that drives its own lamps was seen to
// show. It returns the trip in the call that trips; what to do then (ask the
// controller to flash) is the caller's, who cannot undo what was shown. Durations
// are given the benefit of the time between two observations. All groups
// flashing is always taken as a controller that has gone to safety by itself.
func (m *Monitor) Supervise(now time.Time, observed traffic.State) *Trip {
	m.counts.States++
	t := &m.seen
	dt := t.tick(now, m.fault)
	if m.trip != nil {
		return nil
	}
	if trip := m.watchRed(t, dt, now); trip != nil {
		return trip
	}
	if !t.known {
		p := m.adopt(t, observed)
		if p == nil {
			t.refusing, t.refused = false, 0
			return nil
		}
		return m.refuse(t, p, dt, now)
	}
	if m.wantsFlash(observed) {
		for i := range t.show {
			m.set(t, i, traffic.FlashRed)
		}
		t.refusing, t.refused = false, 0
		return nil
	}
	m.unseenRed(t, observed, dt)
	if p := m.judge(t, observed); p != nil {
		return m.refuse(t, p, dt, now)
	}
	t.refusing, t.refused = false, 0
	before := m.before
	copy(before, t.show)
	m.take(t, observed)
	for i, a := range t.show {
		if a != before[i] && !(a.Go() && before[i].Go()) {
			t.slack[i] = dt
		}
	}
	return nil
}

// unseenRed takes it that a group whose clearance is over, and that is let in
// again, was red for a moment between two looks.
func (m *Monitor) unseenRed(t *track, observed traffic.State, dt int64) {
	if len(observed) != len(t.show) {
		return
	}
	for i, a := range t.show {
		if (a == traffic.Yellow || a == traffic.PedClear) && letIn(observed.At(i)) &&
			t.age[i]+t.slack[i] >= m.clear(i) {
			m.set(t, i, traffic.Red)
			t.slack[i] = dt
		}
	}
}

// wantsFlash reports whether all groups are to flash.
func (m *Monitor) wantsFlash(s traffic.State) bool {
	return len(s) == len(m.groups) && s == m.flashing
}

// refuse counts a refusal and trips when they have lasted.
func (m *Monitor) refuse(t *track, p *problem, dt int64, now time.Time) *Trip {
	m.counts.Refused[p.rule]++
	if t.refusing {
		t.refused += dt
	}
	t.refusing = true
	limit := int64(tripAfter)
	switch {
	case m.is(faultHairTrigger):
		limit = 50
	case m.is(faultSlowTrip):
		limit = 600
	}
	if t.refused <= limit || m.is(faultNeverTrips) {
		return nil
	}
	return m.latch(now, p.rule, p.groups(), fmt.Sprintf("%s, for %d ms", m.detail(p), t.refused))
}

func (m *Monitor) latch(now time.Time, rule string, groups []int, detail string) *Trip {
	m.trip = &Trip{At: now, Rule: rule, Groups: groups, Detail: detail}
	m.counts.Trips++
	return m.Tripped()
}

// watchRed counts for how long groups have been red while others had green, up
// to now.
func (m *Monitor) watchRed(t *track, dt int64, now time.Time) (trip *Trip) {
	if !t.known {
		return nil
	}
	for i := range t.show {
		others := false
		for k, a := range t.show {
			others = others || k != i && a.Go()
		}
		if t.show[i] != traffic.Red {
			t.red[i], t.overdue[i] = 0, false
			continue
		}
		if others {
			t.red[i] += dt
		}
		if most := m.groups[i].maxRed; most > 0 && t.red[i] > most && !t.overdue[i] && !m.is(faultMaxRedBlind) {
			t.overdue[i] = true
			m.counts.MaxRed++
			if m.maxRed && m.trip == nil {
				trip = m.latch(now, RuleMaxRed, []int{i}, fmt.Sprintf("group %d %q red for %d ms, at most %d", i, m.j.Groups[i].Name, t.red[i], most))
			}
		}
	}
	return trip
}

// take shows the wanted state. It has been judged.
func (m *Monitor) take(t *track, want traffic.State) {
	for i := range t.show {
		a := want.At(i)
		if late(t.show[i], a) {
			a = traffic.Red
		}
		m.set(t, i, a)
	}
}

// hold shows what was shown, with clearances that are over gone to red.
func (m *Monitor) hold(t *track, want traffic.State) {
	for i, a := range t.show {
		if (a == traffic.Yellow || a == traffic.PedClear) && want.At(i) != a && t.age[i] >= m.clear(i) && !m.is(faultHoldsClearance) {
			m.set(t, i, traffic.Red)
		}
	}
}

// flash goes on with the way from a trip to flashing red.
func (m *Monitor) flash(t *track) {
	if m.is(faultStraightToFlash) {
		for i := range t.show {
			m.set(t, i, traffic.FlashRed)
		}
		return
	}
	cleared := true // before this step, so that the red is seen
	for i, a := range t.show {
		g := &m.groups[i]
		cleared = cleared && a == traffic.Red && (t.age[i] >= g.allRed || m.is(faultEarlyFlash))
		switch {
		case a.Go() && g.ped && g.clear > 0:
			m.set(t, i, traffic.PedClear)
		case a.Go() && g.ped, a == traffic.RedYellow, a.Go() && m.is(faultTripSkipsYellow):
			m.set(t, i, traffic.Red)
		case a.Go():
			m.set(t, i, traffic.Yellow)
		case (a == traffic.Yellow || a == traffic.PedClear) && t.age[i] >= m.clear(i):
			m.set(t, i, traffic.Red)
		}
	}
	if cleared {
		for i := range t.show {
			m.set(t, i, traffic.FlashRed)
		}
	}
}

// set makes group i show a from now on.
func (m *Monitor) set(t *track, i int, a traffic.Aspect) {
	was := t.show[i]
	if was == a {
		return
	}
	t.show[i], t.text = a, ""
	if was.Go() && a.Go() {
		return // one green, protected or not
	}
	switch {
	case was == traffic.FlashRed && !m.is(faultNoStart):
		t.starting[i] = m.groups[i].clear
	case letIn(a):
		t.starting[i] = 0
	}
	t.slack[i] = 0
	if !m.is(faultAgesStay) {
		t.age[i] = 0
	}
}

// mostStates bounds the states that are kept. A junction in order shows a few
// dozen.
const mostStates = 1024

// state returns what t shows.
func (m *Monitor) state(t *track) traffic.State {
	if t.text != "" || len(t.show) == 0 {
		return t.text
	}
	for i, a := range t.show {
		m.letters[i] = byte(a)
	}
	s, ok := m.states[string(m.letters)]
	if !ok {
		if len(m.states) >= mostStates {
			clear(m.states)
		}
		s = traffic.State(m.letters)
		m.states[string(s)] = s
	}
	t.text = s
	return s
}

// tick moves the track's clock on and returns what counts of the step, in
// milliseconds.
func (t *track) tick(now time.Time, f fault) int64 {
	dt := t.clock.step(now, f)
	for i := range t.age {
		t.age[i] += dt
	}
	return dt
}
