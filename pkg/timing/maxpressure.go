package timing

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// The settings of max pressure, in thousandths of a vehicle where they are
// pressures. One set serves every network.
const (
	protectedWeight  = 1000
	permissiveWeight = 600 // the share of a green that a yielding movement can use
	busWeight        = 5000
	pedWeight        = 2000 // a pedestrian call, and as much again for each 15 s of wait
	pedWaitMS        = 15_000
	recallMS         = 6_000 // of red, for each vehicle that is taken to wait where a detector has failed
	downstreamShare  = 250   // of each vehicle on the exit
	fullPermille     = 850   // an exit as full as that takes hardly anybody
	blockedShare     = 100   // what a movement into a full exit counts, of its weight
	stayBonus        = 1000
	ordinaryMS       = 9000 // a green in use lasts that long, so that it pays for its change
	useGapMS         = 3000 // a green that nobody has used for so long is not in use
)

// maxPressure shows the stage with the greatest pressure: over its green
// movements, the vehicles on the approach, less a share of those on the exit.
// Stages come in any order. The one that is shown has a bonus, and while it is
// in use it lasts nine seconds, so that the green does not flicker between
// equals. A movement into a full exit hardly counts, since its green would fill
// the junction. When a stage ends at which somebody still stands who had to
// yield, a stage that protects him goes before the one that would cross his
// path: gridlock begins with turners who stand in the middle of the junction.
//
// Two things go before pressure: emergency vehicles, and whoever has waited so
// long that only a change now keeps the wait below the maximum red.
func maxPressure(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision) {
	m = m.observe(j, v)
	if !m.mayDecide(j, r, v) {
		return m.repeat()
	}
	at := v.Signal.Stage
	if at >= len(j.Stages) {
		at = -1
	}
	if k := emergency(j, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("max pressure: stage %d for an emergency vehicle", k))
	}
	if k, g := m.starving(j, r, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("max pressure: stage %d, group %d has waited %d s", k, g, m.RedMS[g]/1000))
	}
	// Where decisions are further apart than that, their interval does it.
	if at >= 0 && r.DecisionMS < ordinaryMS && v.Signal.SinceMS < ordinaryMS && m.inUse(j, at) {
		return m.decide(at, fmt.Sprintf("max pressure: stage %d is in use and has lasted %d s", at, v.Signal.SinceMS/1000))
	}
	p := m.pressures(j, v)
	best := 0
	for k := range p {
		if k == at {
			p[k] += stayBonus
		}
		if p[k] > p[best] || p[k] == p[best] && k == at {
			best = k
		}
	}
	if k := turnersFirst(j, v, at, best); k >= 0 {
		return m.decide(k, fmt.Sprintf("max pressure: stage %d before stage %d, for those who still yield in stage %d", k, best, at))
	}
	if second := runnerUp(p, best); second >= 0 {
		return m.decide(best, fmt.Sprintf("max pressure: stage %d has %s, stage %d has %s", best, tenths(p[best]), second, tenths(p[second])))
	}
	return m.decide(best, fmt.Sprintf("max pressure: stage %d is the only one", best))
}

// inUse reports whether somebody has just used a green of stage k.
func (m Memory) inUse(j *traffic.Junction, k int) bool {
	for g := range j.Groups {
		if j.Stages[k].State.At(g).Go() && m.GapMS[g] < useGapMS && has(j, g) {
			return true
		}
	}
	return false
}

// turnersFirst returns the stage that protects most of those who stand at a
// permissive green which the next stage would take from them, -1 where there is
// none. Whoever could not leave the junction is not helped by it.
func turnersFirst(j *traffic.Junction, v View, at, next int) int {
	if at < 0 || at == next {
		return -1
	}
	best, most := -1, 0
	for k := range j.Stages {
		n := 0
		for i := range j.Movements {
			g := j.Movements[i].Group
			if j.Stages[at].State.At(g) == traffic.Permissive && j.Stages[k].State.At(g) == traffic.Green &&
				!j.Stages[next].State.At(g).Go() && !full(&v.Movements[i]) {
				n += v.Movements[i].Halted
			}
		}
		if n > most {
			best, most = k, n
		}
	}
	return best
}

// pressures returns the pressure of each stage in thousandths of a vehicle.
func (m Memory) pressures(j *traffic.Junction, v View) []int {
	p := make([]int, len(j.Stages))
	for i := range j.Movements {
		mv := &v.Movements[i]
		load := 1000 * max(mv.Vehicles, m.Queue[i]) / max(mv.Shared, 1)
		if !mv.Known {
			load = 1000
		}
		if mv.Recall {
			load += int(1000 * (m.RedMS[j.Movements[i].Group] / recallMS))
		}
		if v.Priority[i] == traffic.Bus {
			load += busWeight
		}
		if load == 0 {
			continue
		}
		load -= downstreamShare * mv.ExitVehicles
		for k := range j.Stages {
			w := 0
			switch j.Stages[k].State.At(j.Movements[i].Group) {
			case traffic.Green:
				w = protectedWeight
			case traffic.Permissive:
				w = permissiveWeight
			}
			if full(mv) && load > 0 {
				w = w * blockedShare / 1000
			}
			p[k] += load * w / 1000
		}
	}
	for g := range j.Groups {
		if j.Groups[g].Kind != traffic.Pedestrians || !v.Calls[g] {
			continue
		}
		for k := range j.Stages {
			if j.Stages[k].State.At(g).Go() {
				p[k] += pedWeight * int(1+m.RedMS[g]/pedWaitMS)
			}
		}
	}
	return p
}

func full(mv *MovementView) bool {
	return mv.ExitCapacity > 0 && mv.ExitVehicles*1000 >= mv.ExitCapacity*fullPermille
}

// starving returns the stage and the group that must not wait any longer, or -1.
// The wait is cut short by the time that it takes to get there. A movement into
// a full exit could not go anyway, and is given twice the time.
func (m Memory) starving(j *traffic.Junction, r Rules, v View) (stage, group int) {
	lim := limitsOf(j, r)
	limit := maxRed(j, r)
	group = -1
	var worst int64
	for g := range j.Groups {
		if m.RedMS[g] == 0 {
			continue
		}
		bound := limit
		if blocked(j, v, g) {
			bound *= 2
		}
		var change int64
		for k := range j.Groups {
			change = max(change, lim.clear[k]+lim.allRed[k])
		}
		over := m.RedMS[g] - (bound - change - stageMinGreen(j, r, v.Signal.Stage) - max(r.DecisionMS, 0))
		if over >= 0 && (group < 0 || over > worst) {
			group, worst = g, over
		}
	}
	if group < 0 {
		return -1, -1
	}
	p := m.pressures(j, v)
	stage = -1
	for k := range j.Stages {
		if j.Stages[k].State.At(group).Go() && (stage < 0 || p[k] > p[stage]) {
			stage = k
		}
	}
	return stage, group
}

// blocked reports whether all of group g's movements that are wanted lead into
// full exits.
func blocked(j *traffic.Junction, v View, g int) bool {
	some := false
	for i := range j.Movements {
		if j.Movements[i].Group != g {
			continue
		}
		if mv := &v.Movements[i]; full(mv) {
			some = true
		} else if mv.Vehicles > 0 || mv.Present || !mv.Known {
			return false
		}
	}
	return some
}

func runnerUp(p []int, best int) int {
	second := -1
	for k := range p {
		if k != best && (second < 0 || p[k] > p[second]) {
			second = k
		}
	}
	return second
}

// tenths writes thousandths with one decimal.
func tenths(n int) string {
	sign := ""
	if n < 0 {
		sign, n = "-", -n
	}
	return fmt.Sprintf("%s%d.%d", sign, n/1000, n%1000/100)
}
