package timing

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

const (
	gapMS      = 3_000  // passage time: a green that nobody uses for so long has ended its use
	maxGreenMS = 50_000 // a green ends after so long when somebody else waits
)

// actuated shows stages in the order of the plan, skips those that nobody
// wants, ends a green when nobody has used it for three seconds (gap-out) or
// when it has lasted fifty and somebody else waits (max-out), and rests where it
// is when nobody does. Emergency vehicles go first.
func actuated(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision) {
	m = m.observe(j, v)
	if !m.mayDecide(j, r, v) {
		return m.repeat()
	}
	at := v.Signal.Stage
	if at < 0 || at >= len(j.Stages) {
		at = j.Plan.Steps[0].Stage
		if k := emergency(j, v); k >= 0 {
			at = k
		}
		return m.decide(at, fmt.Sprintf("actuated: start with stage %d", at))
	}
	if k := emergency(j, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("actuated: stage %d for an emergency vehicle", k))
	}
	next := -1
	for _, k := range orderAfter(j, at) {
		if m.wanted(j, v, at, k) {
			next = k
			break
		}
	}
	if next < 0 {
		return m.decide(at, fmt.Sprintf("actuated: rest in stage %d, nobody else waits", at))
	}
	longest := min(maxGreenMS, max(stageMinGreen(j, r, at), (maxRed(j, r)-cycleLost(j, r))/int64(max(len(j.Stages)-1, 1))))
	if v.Signal.SinceMS >= longest {
		return m.decide(next, fmt.Sprintf("actuated: max-out, stage %d has lasted %d s, stage %d is next", at, v.Signal.SinceMS/1000, next))
	}
	// Who is on recall has the plan's green: nobody sees whether it is used.
	if recalled(j, v, at, next) && v.Signal.SinceMS < planGreen(j, r, at) {
		return m.decide(at, fmt.Sprintf("actuated: stage %d has the plan's green, a detector has failed", at))
	}
	// Only greens that the next stage takes away can hold it back.
	for g := range j.Groups {
		if j.Groups[g].Kind != traffic.Pedestrians && j.Stages[at].State.At(g).Go() &&
			!j.Stages[next].State.At(g).Go() && m.GapMS[g] < gapMS && has(j, g) {
			return m.decide(at, fmt.Sprintf("actuated: stage %d is in use, group %d", at, g))
		}
	}
	return m.decide(next, fmt.Sprintf("actuated: gap-out of stage %d, stage %d is next", at, next))
}

// recalled reports whether a movement that stage at lets go, and stage next does
// not, is on recall.
func recalled(j *traffic.Junction, v View, at, next int) bool {
	for i := range j.Movements {
		g := j.Movements[i].Group
		if v.Movements[i].Recall && j.Stages[at].State.At(g).Go() && !j.Stages[next].State.At(g).Go() {
			return true
		}
	}
	return false
}

// planGreen is the green that the plan gives a stage, at its first step with it;
// the minimum where it has none.
func planGreen(j *traffic.Junction, r Rules, stage int) int64 {
	for _, s := range j.Plan.Steps {
		if s.Stage == stage {
			return max(s.DurationMS-s.IntergreenMS, stageMinGreen(j, r, stage))
		}
	}
	return stageMinGreen(j, r, stage)
}

// has reports whether any movement is held by group g.
func has(j *traffic.Junction, g int) bool {
	for i := range j.Movements {
		if j.Movements[i].Group == g {
			return true
		}
	}
	return false
}

// cycleLost is what the changes of one round through all stages take.
func cycleLost(j *traffic.Junction, r Rules) int64 {
	lim := limitsOf(j, r)
	var lost int64
	for k := range j.Stages {
		lost += changeMS(j, lim, k, (k+1)%len(j.Stages))
	}
	return lost
}

// wanted reports whether somebody waits for a green that stage k gives and
// stage at does not, or stands at a green at which he has to yield while k would
// protect him. A stage that the plan leaves out is only for those that no
// stage of the plan serves, such as a walk on demand.
func (m Memory) wanted(j *traffic.Junction, v View, at, k int) bool {
	for g := range j.Groups {
		now, then := j.Stages[at].State.At(g), j.Stages[k].State.At(g)
		if (then.Go() && !now.Go() && m.demand(j, v, g) || then == traffic.Green && now == traffic.Permissive && stands(j, v, g)) &&
			(planned(j, func(stage int) bool { return stage == k }) ||
				!planned(j, func(stage int) bool { return j.Stages[stage].State.At(g).Go() })) {
			return true
		}
	}
	return false
}

// stands reports whether somebody stands at the stop line of group g.
func stands(j *traffic.Junction, v View, g int) bool {
	for i := range j.Movements {
		if j.Movements[i].Group == g && v.Movements[i].Present {
			return true
		}
	}
	return false
}

// planned reports whether the plan has a stage of which is is true.
func planned(j *traffic.Junction, is func(stage int) bool) bool {
	for _, s := range j.Plan.Steps {
		if is(s.Stage) {
			return true
		}
	}
	return false
}

// orderAfter lists the other stages, in the order of the plan from stage at on,
// then those that the plan leaves out.
func orderAfter(j *traffic.Junction, at int) []int {
	var cycle []int
	add := func(k int) {
		for _, have := range cycle {
			if have == k {
				return
			}
		}
		cycle = append(cycle, k)
	}
	for _, s := range j.Plan.Steps {
		add(s.Stage)
	}
	for k := range j.Stages {
		add(k)
	}
	from := 0
	for i, k := range cycle {
		if k == at {
			from = i
		}
	}
	out := make([]int, 0, len(cycle)-1)
	for i := 1; i < len(cycle); i++ {
		out = append(out, cycle[(from+i)%len(cycle)])
	}
	return out
}
