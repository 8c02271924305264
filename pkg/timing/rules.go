package timing

import (
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Rules are the limits that a whole run is held to, on top of what each
// junction's own definition asks for. Times are in milliseconds; 0 adds nothing
// to the junction's own.
//
// Limits are raised, never lowered: a controller and a [Sequencer] take the
// greater of the rules' time and the filed one (for MaxRedMS the smaller of
// those that are set). The one exception is the junction's own plan: a minimum
// green of the rules that is longer than the shortest green of the plan is cut
// to that, so that rules never make a filed plan impossible.
//
// A benchmark's rules are meant to replace what is filed. For that, file the
// junction anew with [Rules.Apply] and give the result to Sequencer and
// interlock alike.
type Rules struct {
	Name string `json:"name"`
	// DecisionMS is how often a controller may decide. Decisions fall on
	// multiples of it in Unix time. The fixed controller ignores it: a plan is
	// one decision.
	DecisionMS int64 `json:"decision_ms"`
	MinGreenMS int64 `json:"min_green_ms"`
	YellowMS   int64 `json:"yellow_ms"`
	AllRedMS   int64 `json:"all_red_ms"`
	// MaxRedMS bounds how long a movement with demand waits for its green.
	MaxRedMS int64 `json:"max_red_ms"`
	// BoxHoldMS bounds for how long a green waits for vehicles that are still
	// within the junction, on paths that it would cross; see [Sequencer.Occupied].
	// 0: it does not wait.
	BoxHoldMS int64 `json:"box_hold_ms"`
}

// The named rules. In resco a decision every 10 s has its 3 s of yellow inside
// it, so that a green lasts 7 s or more without a minimum that says so; the
// minimum of 5 s is there for whoever orders stages apart from decisions.
var named = []Rules{
	{Name: "free", DecisionMS: 1000, MinGreenMS: 5000, YellowMS: 3000, BoxHoldMS: 20000},
	{Name: "resco", DecisionMS: 10000, MinGreenMS: 5000, YellowMS: 3000},
	{Name: "deployable", DecisionMS: 1000, MinGreenMS: 7000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 120000, BoxHoldMS: 20000},
	{Name: "field", DecisionMS: 1000, BoxHoldMS: 20000},
}

// RulesNamed returns the rules with the given name: free, resco, deployable, or
// field, which adds nothing to what each junction's definition says. Any other
// name is an error of kind Invalid that lists the names.
func RulesNamed(name string) (Rules, error) {
	var all []string
	for _, r := range named {
		if r.Name == name {
			return r, nil
		}
		all = append(all, r.Name)
	}
	return Rules{}, kind.Errorf(kind.Invalid, "rules %q: must be one of %s", name, strings.Join(all, ", "))
}

// Apply returns the junction as these rules want it filed: Timing replaced by
// the rules' own, and vehicle groups' overrides of it dropped. Pedestrians keep
// their times, since a benchmark's rules do not know how wide the street is.
// Rules without a yellow (field) return j as it is. j itself is not changed.
func (r Rules) Apply(j *traffic.Junction) *traffic.Junction {
	if r.YellowMS == 0 {
		return j
	}
	c := *j
	c.Timing = traffic.Timing{
		MinGreenMS: min(r.MinGreenMS, shortestPlannedGreen(j)),
		YellowMS:   r.YellowMS,
		AllRedMS:   r.AllRedMS,
		MaxRedMS:   r.MaxRedMS,
	}
	c.Groups = append([]traffic.Group(nil), j.Groups...)
	for i := range c.Groups {
		if g := &c.Groups[i]; g.Kind != traffic.Pedestrians {
			g.MinGreenMS, g.YellowMS, g.AllRedMS = 0, 0, 0
		}
	}
	return &c
}

const forever = int64(1) << 40 // ms, about 35 years: longer than any time here

func shortestPlannedGreen(j *traffic.Junction) int64 {
	least := forever
	for _, s := range j.Plan.Steps {
		least = min(least, s.DurationMS-s.IntergreenMS)
	}
	return max(least, 0)
}

// limits are the times of one junction under given rules, in milliseconds.
type limits struct {
	minGreen, clear, allRed []int64 // by group; clear is yellow, or the pedestrians' clearance
}

func limitsOf(j *traffic.Junction, r Rules) limits {
	n := len(j.Groups)
	l := limits{make([]int64, n), make([]int64, n), make([]int64, n)}
	ruleGreen := min(r.MinGreenMS, shortestPlannedGreen(j))
	for i, g := range j.Groups {
		l.minGreen[i] = max(either(g.MinGreenMS, j.Timing.MinGreenMS), ruleGreen)
		l.allRed[i] = max(either(g.AllRedMS, j.Timing.AllRedMS), r.AllRedMS)
		if g.Kind == traffic.Pedestrians {
			l.clear[i] = g.PedClearMS
		} else {
			l.clear[i] = max(either(g.YellowMS, j.Timing.YellowMS), r.YellowMS)
		}
	}
	return l
}

// either returns a group's own time, or the junction's where it has none.
func either(own, common int64) int64 {
	if own != 0 {
		return own
	}
	return common
}

// stageMinGreen is how long a controller leaves a stage alone.
func stageMinGreen(j *traffic.Junction, r Rules, stage int) int64 {
	least := max(r.MinGreenMS, j.Timing.MinGreenMS)
	if stage < 0 || stage >= len(j.Stages) {
		return least
	}
	for i, g := range j.Groups {
		if j.Stages[stage].State.At(i).Go() {
			least = max(least, g.MinGreenMS)
		}
	}
	return least
}

// maxRed is how long a movement with demand may wait, in milliseconds.
func maxRed(j *traffic.Junction, r Rules) int64 {
	switch a, b := r.MaxRedMS, j.Timing.MaxRedMS; {
	case a > 0 && b > 0:
		return min(a, b)
	case a > 0 || b > 0:
		return max(a, b)
	}
	return defaultMaxRedMS
}

// changeMS is how long a [Sequencer] takes from the end of the first stage's
// green to the beginning of the second's, when nothing else is under way.
func changeMS(j *traffic.Junction, l limits, from, to int) int64 {
	if from == to {
		return 0
	}
	a, b := j.Stages[from].State, j.Stages[to].State
	var clear int64
	for i := range j.Groups {
		if a.At(i).Go() && !b.At(i).Go() {
			clear = max(clear, l.clear[i])
		}
	}
	total := clear
	meets := meetings(j)
	for i := range j.Groups {
		if !a.At(i).Go() || b.At(i).Go() {
			continue
		}
		for _, k := range meets[i] {
			if b.At(k).Go() && b.At(k) != a.At(k) {
				total = max(total, clear+l.allRed[i])
			}
		}
	}
	return total
}

// meetings lists for each group those whose paths it crosses at all: under a
// conflict, or yielding one way or the other.
func meetings(j *traffic.Junction) [][]int {
	n := len(j.Groups)
	pair := make([]bool, n*n)
	mark := func(lists [][]int) {
		for a, bs := range lists {
			for _, b := range bs {
				if a < n && b >= 0 && b < n && a != b {
					pair[a*n+b], pair[b*n+a] = true, true
				}
			}
		}
	}
	mark(j.Conflicts)
	mark(j.Yields)
	out := make([][]int, n)
	for a := range n {
		for b := range n {
			if pair[a*n+b] {
				out[a] = append(out[a], b)
			}
		}
	}
	return out
}
