package plan

import (
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Options bound what [Webster] makes. Times are milliseconds; 0 is the default.
type Options struct {
	// MinCycleMS and MaxCycleMS bound the cycle; 40 s and 120 s. A junction whose
	// minimums alone need more than the greatest cycle gets what they need.
	MinCycleMS, MaxCycleMS int64
	// StartLostMS is lost at the beginning of each green, and EndGainMS won from
	// the yellow; 2 s each.
	StartLostMS, EndGainMS int64
	// SaturationPerHour is that of movements for which none is filed; 1800.
	SaturationPerHour int
}

func (o Options) orDefault() Options {
	def := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.MinCycleMS, 40_000)
	def(&o.MaxCycleMS, 120_000)
	def(&o.StartLostMS, 2000)
	def(&o.EndGainMS, 2000)
	if o.SaturationPerHour <= 0 {
		o.SaturationPerHour = 1800
	}
	return o
}

// Made says how a plan came about.
type Made struct {
	// LostMS is lost in each cycle; FlowPPM the sum of the stages' critical flow
	// ratios, in millionths: at 1,000,000 and above no cycle is long enough.
	LostMS, FlowPPM int64
	// Degree is by step the degree of saturation of its critical lane, in
	// thousandths: demand over what its green can carry.
	Degree []int64
	// Over says that demand is above nine tenths of what any cycle carries: the
	// cycle is the longest, and green is shared out by demand.
	Over bool
}

const (
	ppm      = 1_000_000
	overPPM  = 900_000
	roundMS  = 1000
	shortest = 1000 // of any green
)

// Webster makes a fixed plan for the junction's filed sequence of stages from the
// flows of its movements in vehicles an hour; -1 where the flow is not known:
// then the lane keeps the share that it has in the filed plan.
//
// The cycle is Webster's, C = (1.5 L + 5 s) / (1 − Y), where L is what is lost in
// a cycle and Y the sum of the critical flow ratios (F. V. Webster, "Traffic
// Signal Settings", Road Research Technical Paper 39, 1958), within the bounds.
// Green is shared out in proportion to those ratios. A lane that has several
// stages needs only their sum. Permissive movements carry half. Every stage has
// at least the minimum greens of its groups, and its pedestrians their minimum
// green, clearance and all-red. No red that the sequence makes is longer than the
// junction's maximum, unless the minimums alone make it so.
//
// The result uses the stages and their order as filed, and only gives them other
// times. An error is of kind Invalid: flows do not fit, or a definition that does
// not pass Check.
func Webster(j *traffic.Junction, perHour []int, o Options) (traffic.Plan, Made, error) {
	if err := j.Check(); err != nil {
		return traffic.Plan{}, Made{}, kind.Errorf(kind.Invalid, "webster: %w", err)
	}
	if len(perHour) != len(j.Movements) {
		return traffic.Plan{}, Made{}, kind.Errorf(kind.Invalid, "webster: flows: %d for %d movements", len(perHour), len(j.Movements))
	}
	o = o.orDefault()
	steps := len(j.Plan.Steps)
	state := func(i int) traffic.State { return j.Stages[j.Plan.Steps[i%steps].Stage].State }

	// What each step needs besides green, and at least.
	inter, least := make([]int64, steps), make([]int64, steps)
	var lost, allInter int64
	for i := range steps {
		var yellow, clear, red int64
		least[i] = max(j.Timing.MinGreenMS, shortest)
		for g := range j.Groups {
			s, next := state(i), state(i+1)
			if !s.At(g).Go() {
				continue
			}
			t := timesOf(j, g)
			if next.At(g).Go() {
				continue // its green goes on; the step alone need not hold its minimum
			}
			red = max(red, t.allRed)
			if clear = max(clear, t.clear); j.Groups[g].Kind != traffic.Pedestrians {
				yellow = max(yellow, t.clear)
			}
			if !state(i + steps - 1).At(g).Go() {
				least[i] = max(least[i], t.minGreen)
			}
		}
		inter[i] = clear + red
		allInter += inter[i]
		// While pedestrians clear, vehicles go on until their own yellow.
		if inter[i] > 0 {
			lost += max(yellow+red+o.StartLostMS-o.EndGainMS, 0)
		}
	}
	made := Made{LostMS: lost, Degree: make([]int64, steps)}

	// Each lane's flow ratio, and the steps in which it has green.
	type lane struct {
		ratio int64 // ppm
		in    []int
	}
	var lanes []lane
	filed := j.Plan.CycleMS()
	byLane := map[traffic.LaneID][]int{}
	var order []traffic.LaneID
	for m, x := range j.Movements {
		if byLane[x.From] == nil {
			order = append(order, x.From)
		}
		byLane[x.From] = append(byLane[x.From], m)
	}
	for _, id := range order {
		var l lane
		known := true
		permissive := make([]bool, len(j.Groups))
		for i := range steps {
			served := false
			for _, m := range byLane[id] {
				g := j.Movements[m].Group
				served = served || state(i).At(g).Go()
				permissive[g] = permissive[g] || state(i).At(g) == traffic.Permissive
			}
			if served {
				l.in = append(l.in, i)
			}
		}
		for _, m := range byLane[id] {
			x := j.Movements[m]
			if perHour[m] < 0 {
				known = false
				continue
			}
			sat := int64(x.SaturationPerHour)
			if sat <= 0 {
				sat = int64(o.SaturationPerHour)
			}
			if permissive[x.Group] {
				sat = max(sat/2, 1)
			}
			l.ratio += min(int64(perHour[m]), 1_000_000) * ppm / sat
		}
		if len(l.in) == 0 {
			continue // no stage of the plan lets it go
		}
		if !known {
			var green int64
			for _, i := range l.in {
				green += j.Plan.Steps[i].DurationMS - j.Plan.Steps[i].IntergreenMS
			}
			l.ratio = max(l.ratio, green*ppm/filed*85/100)
		}
		lanes = append(lanes, l)
	}
	// Those with one step decide first, those with several about what is left.
	slices.SortStableFunc(lanes, func(a, b lane) int { return len(a.in) - len(b.in) })
	need := make([]int64, steps)
	for _, l := range lanes {
		var have int64
		for _, i := range l.in {
			have += need[i]
		}
		for n, i := range l.in {
			if left := l.ratio - have; left > 0 {
				part := left / int64(len(l.in)-n)
				need[i] += part
				have += part
			}
		}
	}
	for _, n := range need {
		made.FlowPPM += n
	}

	// The cycle.
	most := o.MaxCycleMS
	var minimum int64
	for i := range steps {
		minimum += least[i] + inter[i]
	}
	cycle := most
	if made.Over = made.FlowPPM >= overPPM; !made.Over {
		cycle = (lost*3/2 + 5000) * ppm / (ppm - made.FlowPPM)
	}
	cycle = min(max(cycle, o.MinCycleMS), most)
	if r := j.Timing.MaxRedMS; r > 0 {
		// A red is the cycle less the shortest green.
		cycle = min(cycle, r+slices.Min(least))
	}
	cycle = max(cycle, minimum)
	cycle = (cycle + roundMS - 1) / roundMS * roundMS
	green := share(cycle-allInter, need, least)

	out := traffic.Plan{Name: j.Plan.Name}
	for i, s := range j.Plan.Steps {
		out.Steps = append(out.Steps, traffic.PlanStep{Stage: s.Stage, DurationMS: green[i] + inter[i], IntergreenMS: inter[i]})
	}
	out.OffsetMS = (j.Plan.OffsetMS%cycle + cycle) % cycle
	for _, l := range lanes {
		var g int64
		for _, i := range l.in {
			g += green[i]
		}
		for _, i := range l.in {
			made.Degree[i] = max(made.Degree[i], l.ratio*cycle/max(g, 1)/1000)
		}
	}
	return out, made, nil
}

// share gives each its least and shares out the rest so that the whole is in
// proportion to need, as far as the least allows. All is whole milliseconds and
// sums to total; total is at least the sum of the least.
func share(total int64, need, least []int64) []int64 {
	out := slices.Clone(least)
	free := make([]bool, len(need))
	for i := range free {
		free[i] = true
	}
	for {
		left, sum := total, int64(0)
		for i := range need {
			if free[i] {
				sum += need[i]
			} else {
				left -= least[i]
			}
		}
		if sum == 0 { // nobody asks: what is left goes to all alike
			for i := range need {
				left -= least[i] * b2i(free[i])
			}
			each := left / int64(len(need))
			for i := range out {
				out[i] = least[i] + each
			}
			out[0] += left - each*int64(len(need))
			return out
		}
		again := false
		for i := range need {
			if free[i] && left*need[i]/sum < least[i] {
				free[i], again = false, true
			}
		}
		if again {
			continue
		}
		given, last := int64(0), 0
		for i := range need {
			if free[i] {
				out[i] = left * need[i] / sum
				given += out[i]
				last = i
			}
		}
		out[last] += left - given
		return out
	}
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// Flows are counted in so many windows.
const (
	flowWindow  = 15 * time.Minute
	flowWindows = 4
)

// Flows counts a junction's vehicles by movement over the last hour, in windows of
// a quarter. It is not safe for concurrent use.
type Flows struct {
	j       *traffic.Junction
	sources [][]int       // by movement: the detectors that count it, of one kind
	opened  time.Time     // of the window that is open
	current []int64       // counted in it, by detector
	seen    []int64       // for how long each was heard in it, ms
	closed  []flowsWindow // the newest last
}

type flowsWindow struct {
	counts []int64 // by detector
	seen   []int64 // ms
}

// NewFlows returns a count that begins with the next frame.
func NewFlows(j *traffic.Junction) *Flows {
	f := &Flows{j: j, sources: make([][]int, len(j.Movements))}
	// Of each movement's detectors those at the stop line count best who has gone,
	// and those upstream who has come; what an area counts has entered it.
	for m := range j.Movements {
		for _, k := range []traffic.DetectorKind{traffic.StopLine, traffic.Advance, traffic.Area, traffic.Oracle} {
			for i, d := range j.Detectors {
				if d.Kind == k && slices.Contains(d.Movements, m) {
					f.sources[m] = append(f.sources[m], i)
				}
			}
			if len(f.sources[m]) > 0 {
				break
			}
		}
	}
	f.clear()
	return f
}

func (f *Flows) clear() {
	f.current, f.seen = make([]int64, len(f.j.Detectors)), make([]int64, len(f.j.Detectors))
}

// Observe takes one more frame. What failed says of a detector's health counts
// from now on; it may be nil. closed reports whether a window has become
// complete with it.
func (f *Flows) Observe(fr *traffic.Frame, failed func(traffic.DetectorID) bool) (closed bool) {
	if fr.Interval <= 0 {
		return false
	}
	if f.opened.IsZero() || fr.Time.Before(f.opened) {
		f.opened = fr.Time.Add(-fr.Interval)
	}
	for i, d := range f.j.Detectors {
		if i < len(fr.Readings) && fr.Readings[i].Detector == d.ID && (failed == nil || !failed(d.ID)) {
			f.current[i] += int64(fr.Readings[i].Count)
			f.seen[i] += min(fr.Interval, flowWindow).Milliseconds()
		}
	}
	if fr.Time.Sub(f.opened) < flowWindow {
		return false
	}
	f.closed = append(f.closed, flowsWindow{f.current, f.seen})
	if len(f.closed) > flowWindows {
		f.closed = f.closed[1:]
	}
	f.clear()
	f.opened = fr.Time
	return true
}

// Windows returns how many quarters have been counted, at most four.
func (f *Flows) Windows() int { return len(f.closed) }

// PerHour returns the flow of each movement, -1 where none of its detectors was
// believed for at least half of the time. A detector of several movements counts
// for each of them in equal parts.
func (f *Flows) PerHour() []int {
	out := make([]int, len(f.j.Movements))
	for m := range out {
		out[m] = -1
		var count int64 // of all detectors: each sees its own lane
		need := int64(len(f.closed)) * flowWindow.Milliseconds() / 2
		ok := len(f.sources[m]) > 0 && need > 0
		for _, i := range f.sources[m] {
			var c, s int64
			for _, w := range f.closed {
				c += w.counts[i]
				s += w.seen[i]
			}
			if ok = ok && s >= need; !ok {
				break
			}
			share := int64(max(len(f.j.Detectors[i].Movements), 1))
			count += c * 3_600_000 / s / share
		}
		if ok {
			out[m] = int(count)
		}
	}
	return out
}
