package timing

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Sequencer leads one junction's lamps from stage to stage.
//
// A change goes like this. It begins when every group that loses its green has
// had its minimum green. Those groups then go to yellow, pedestrians to their
// clearance, such that all of them end together: the one that needs longest
// goes first, and the others stay green until it is their time. After the
// all-red times between groups that meet, all gaining groups turn green at
// once, and only then do groups that stay green go between protected and
// permissive. A group that is green in both stages stays green throughout.
//
// One change is made at a time. An order that comes during a change is followed
// once the change has ended and its minimum greens have passed.
//
// A Sequencer has one owner; it does not lock.
type Sequencer struct {
	j     *traffic.Junction
	lim   limits
	meets [][]int

	show []traffic.Aspect
	age  []int64 // how long each group has shown that, ms; negative: that much more is asked of it

	stage   int   // reached, -1 while changing or unknown
	to      int   // the stage that the change under way leads to, -1 when none is
	target  int   // latest order, -1 when none came
	since   int64 // how long the stage or the change has lasted, ms
	longest int64 // the longest clearance of the change under way

	cleared []bool // by group: its clearance has ended in this step

	box     []bool // by group: vehicles are still within the junction
	boxAge  int64  // ms since that was told
	boxHold int64  // at most so long
	ready   int64  // since, when the gaining groups could have turned green; -1 before

	clock counter
}

// NewSequencer returns a sequencer that shows all red and takes it that every
// group was green until now. It shows nothing else until there is a Target.
// The definition must have passed [traffic.Junction.Check].
func NewSequencer(j *traffic.Junction, r Rules, now time.Time) *Sequencer {
	s := &Sequencer{
		j: j, lim: limitsOf(j, r), meets: meetings(j),
		show: make([]traffic.Aspect, len(j.Groups)), age: make([]int64, len(j.Groups)),
		target: -1, boxHold: max(r.BoxHoldMS, 0), box: make([]bool, len(j.Groups)), cleared: make([]bool, len(j.Groups)),
	}
	s.restart(now)
	return s
}

func (s *Sequencer) restart(now time.Time) {
	s.clock = counter{last: now}
	s.stage, s.to, s.since = -1, -1, 0
	for i := range s.show {
		s.show[i], s.age[i] = traffic.Red, -s.lim.clear[i]
	}
}

// Resume makes the sequencer go on from lamps that somebody else has set. How
// long they have shown that is not known, so every time begins anew: greens get
// their minimum, yellows their length, reds their all-red. Orders given so far
// are forgotten. A state that no lawful controller shows (wrong length, dark or
// flashing lamps, two groups green against each other) has its greens led
// through yellow to red, and the rest goes to red at once.
func (s *Sequencer) Resume(state traffic.State, now time.Time) {
	s.restart(now)
	s.target = -1
	lawful := len(state) == len(s.show)
	for i := range s.show {
		switch a := state.At(i); a {
		case traffic.Red, traffic.Yellow, traffic.Green, traffic.Permissive, traffic.PedClear:
		default:
			lawful = false
		}
		for _, k := range s.j.Conflicts[i] {
			lawful = lawful && !(state.At(i).Go() && state.At(k).Go())
		}
		lawful = lawful && !s.unprotected(state, i)
	}
	for i := range s.show {
		a := state.At(i)
		ped := s.j.Groups[i].Kind == traffic.Pedestrians
		switch {
		case a.Go() && lawful:
			s.show[i], s.age[i] = a, 0
		case a.Go(), a == traffic.Yellow && !ped, a == traffic.PedClear && ped:
			s.show[i], s.age[i] = s.clearing(i), 0
		case lawful && a == traffic.Red:
			s.age[i] = 0
		}
	}
	if !lawful {
		return
	}
	for k, st := range s.j.Stages {
		if st.State == state {
			s.stage, s.target = k, k
			return
		}
	}
}

// unprotected reports whether group i shows protected green against a group
// that it would have to give way to.
func (s *Sequencer) unprotected(state traffic.State, i int) bool {
	if i >= len(s.j.Yields) || !state.At(i).Go() {
		return false
	}
	for _, k := range s.j.Yields[i] {
		if state.At(k).Go() && !s.givesWay(state, i, k) && !s.givesWay(state, k, i) {
			return true
		}
	}
	return false
}

func (s *Sequencer) givesWay(state traffic.State, a, b int) bool {
	if a >= len(s.j.Yields) || state.At(a) != traffic.Permissive {
		return false
	}
	for _, k := range s.j.Yields[a] {
		if k == b {
			return true
		}
	}
	return false
}

// clearing is what group i shows between green and red.
func (s *Sequencer) clearing(i int) traffic.Aspect {
	switch {
	case s.j.Groups[i].Kind != traffic.Pedestrians:
		return traffic.Yellow
	case s.lim.clear[i] > 0:
		return traffic.PedClear
	}
	return traffic.Red
}

// Target orders a stage; the latest order wins. A stage that the junction does
// not have is an error of kind Invalid and changes nothing.
func (s *Sequencer) Target(stage int) error {
	if stage < 0 || stage >= len(s.j.Stages) {
		return kind.Errorf(kind.Invalid, "stage %d: junction %s has stages 0 to %d", stage, s.j.ID, len(s.j.Stages)-1)
	}
	s.target = stage
	return nil
}

// Next returns what the lamps should show from now on.
func (s *Sequencer) Next(now time.Time) traffic.State {
	dt := s.clock.count(now)
	clear(s.cleared)
	s.since += dt
	s.boxAge = min(s.boxAge+dt, boxNewsMS)
	for i := range s.age {
		s.age[i] += dt
	}
	if s.to < 0 && s.target >= 0 && s.target != s.stage && s.mayLeave(s.target) {
		s.begin(s.target)
	}
	if s.to >= 0 {
		s.advance()
	} else {
		// After Resume a clearance may run without a change that it belongs to.
		s.finishClearances()
	}
	return s.state()
}

func (s *Sequencer) state() traffic.State {
	b := make([]byte, len(s.show))
	for i, a := range s.show {
		b[i] = byte(a)
	}
	return traffic.State(b)
}

// mayLeave reports whether every group that the stage takes the green from has
// had its minimum.
func (s *Sequencer) mayLeave(to int) bool {
	for i, a := range s.show {
		if a.Go() && !s.j.Stages[to].State.At(i).Go() && s.age[i] < s.lim.minGreen[i] {
			return false
		}
	}
	return true
}

func (s *Sequencer) begin(to int) {
	s.to, s.stage, s.since, s.longest, s.ready = to, -1, 0, 0, -1
	for i, a := range s.show {
		if a.Go() && !s.j.Stages[to].State.At(i).Go() {
			s.longest = max(s.longest, s.lim.clear[i])
		}
	}
}

func (s *Sequencer) finishClearances() (done bool) {
	done = true
	for i, a := range s.show {
		if a != traffic.Yellow && a != traffic.PedClear {
			continue
		}
		if s.age[i] >= s.lim.clear[i] {
			s.show[i], s.age[i], s.cleared[i] = traffic.Red, 0, true
		} else {
			done = false
		}
	}
	return done
}

func (s *Sequencer) advance() {
	want := s.j.Stages[s.to].State
	done := s.finishClearances()
	for i, a := range s.show {
		if !a.Go() || want.At(i).Go() {
			continue
		}
		if s.since < s.longest-s.lim.clear[i] {
			done = false
			continue
		}
		s.show[i], s.age[i] = s.clearing(i), 0
		done = done && s.show[i] == traffic.Red
	}
	if !done {
		return
	}
	for i, a := range s.show {
		if w := want.At(i); !w.Go() || a == w {
			continue
		}
		if s.cleared[i] {
			return // its own clearance has just ended: the red is shown, too
		}
		for _, k := range s.meets[i] {
			if !want.At(k).Go() && s.age[k] < s.lim.allRed[k] {
				return
			}
			// Where it is not known what k showed before, its red counts even
			// if both may be green together.
			if s.age[k] < 0 {
				return
			}
		}
	}
	if s.ready < 0 {
		s.ready = s.since
	}
	if s.boxAge < boxNewsMS && s.since-s.ready < s.boxHold && s.inTheWay(want) {
		return
	}
	for i, a := range s.show {
		w := want.At(i)
		if !w.Go() || a == w {
			continue
		}
		if !a.Go() {
			s.age[i] = 0
		}
		s.show[i] = w
	}
	s.stage, s.to, s.since = s.to, -1, 0
}

// boxNewsMS is for how long word of what is within the junction holds.
const boxNewsMS = 2_000

// Occupied tells, by group, whether vehicles that it let go are still within the
// junction. A change then goes on showing red to the groups whose paths they
// stand on, until they are out, but not for longer than the rules'
// BoxHoldMS: a detector that is stuck must not close the junction, and neither
// must a car that has broken down. Word that is older than two seconds, or not of
// the right length, counts as none. It can only prolong a red.
func (s *Sequencer) Occupied(groups []bool) {
	s.boxAge = boxNewsMS
	if len(groups) == len(s.box) {
		copy(s.box, groups)
		s.boxAge = 0
	}
}

// inTheWay reports whether vehicles of groups that are red now are on the path of
// one that is about to turn green.
func (s *Sequencer) inTheWay(want traffic.State) bool {
	for i, a := range s.show {
		if !want.At(i).Go() || a.Go() {
			continue
		}
		for _, k := range s.meets[i] {
			if s.box[k] && !want.At(k).Go() {
				return true
			}
		}
	}
	return false
}

// BoxOccupied reads from a frame's readings, in the order of the definition's
// detectors, which groups' vehicles are still within the junction, for
// [Sequencer.Occupied]. It is nil where nothing watches the junction's inside.
func BoxOccupied(j *traffic.Junction, readings []traffic.Reading) []bool {
	var out []bool
	for i, d := range j.Detectors {
		if d.Kind != traffic.Box || i >= len(readings) || readings[i].Detector != d.ID {
			continue
		}
		if out == nil {
			out = make([]bool, len(j.Groups))
		}
		if readings[i].Halted == 0 {
			continue
		}
		for _, m := range d.Movements {
			out[j.Movements[m].Group] = true
		}
	}
	return out
}

// Heading returns the stage that is shown, or that the change under way leads to;
// -1 where there is neither.
func (s *Sequencer) Heading() int {
	if s.to >= 0 {
		return s.to
	}
	return s.stage
}

// Signal returns what the lamps show as of the last Next, for a frame: Stage is
// -1 while a change is under way, SinceMS how long the stage, or the change, has
// lasted. Mode and Trip are the caller's to fill in.
func (s *Sequencer) Signal(now time.Time) traffic.Signal {
	ahead := s.clock
	return traffic.Signal{State: s.state(), Stage: s.stage, SinceMS: s.since + ahead.count(now)}
}

// counter counts milliseconds as the package comment says.
type counter struct {
	last  time.Time
	rest  time.Duration // counted, but less than a millisecond
	steps [8]time.Duration
	next  int
}

func (c *counter) count(now time.Time) int64 {
	step := min(max(now.Sub(c.last), 0), time.Second)
	c.last = now
	var longest time.Duration
	for _, s := range c.steps {
		longest = max(longest, s)
	}
	c.steps[c.next] = step
	c.next = (c.next + 1) % len(c.steps)
	c.rest += min(step, longest)
	ms := c.rest.Milliseconds()
	c.rest -= time.Duration(ms) * time.Millisecond
	return ms
}
