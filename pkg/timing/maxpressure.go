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
	downstreamShare  = 250 // of each vehicle on the exit
	fullPermille     = 850 // an exit as full as that takes hardly anybody
	blockedShare     = 100 // what a movement into a full exit counts, of its weight
	stayBonus        = 1000
	stayShare        = 0 // thousandths
	haltedWeight     = 0
	useBonus         = 0
	useShare         = 0
	useGap           = 2000
	lossMS           = 0
	floorMS          = 5000
	movingShare      = 1000
)

// maxPressure shows the stage with the greatest pressure: over its green
// movements, the vehicles on the approach, less a share of those on the exit.
// Stages come in any order. The one that is shown has a bonus, so that the
// green does not flicker between equals. A movement into a full exit hardly
// counts, since its green would fill the junction.
//
// Two things go before pressure: emergency vehicles, and whoever has waited so
// long that only a change now keeps the wait below the maximum red.
func maxPressure(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision) {
	m = m.observe(j, v)
	if !m.mayDecide(j, r, v) {
		return m.repeat()
	}
	at := v.Signal.Stage
	if k := emergency(j, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("max pressure: stage %d for an emergency vehicle", k))
	}
	if k, g := m.starving(j, r, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("max pressure: stage %d, group %d has waited %d s", k, g, m.RedMS[g]/1000))
	}
	p := m.pressures(j, v)
	best := 0
	for k := range p {
		if k != at && lossMS > 0 && p[k] > 0 {
			longest := 0
			for i := range j.Movements {
				if j.Stages[k].State.At(j.Movements[i].Group).Go() {
					longest = max(longest, max(v.Movements[i].Vehicles, m.Queue[i]))
				}
			}
			T := min(max(2000*longest, floorMS), 30000)
			p[k] = p[k] * T / (T + lossMS)
		}
		if k == at {
			p[k] += stayBonus + max(p[k], 0)*stayShare/1000
			if m.inUse(j, k) {
				p[k] += useBonus + max(p[k], 0)*useShare/1000
			}
		}
		if p[k] > p[best] || p[k] == p[best] && k == at {
			best = k
		}
	}
	if second := runnerUp(p, best); second >= 0 {
		return m.decide(best, fmt.Sprintf("max pressure: stage %d has %s, stage %d has %s", best, tenths(p[best]), second, tenths(p[second])))
	}
	return m.decide(best, fmt.Sprintf("max pressure: stage %d is the only one", best))
}

// pressures returns the pressure of each stage in thousandths of a vehicle.
func (m Memory) pressures(j *traffic.Junction, v View) []int {
	p := make([]int, len(j.Stages))
	for i := range j.Movements {
		mv := &v.Movements[i]
		load := (movingShare*(max(mv.Vehicles, m.Queue[i])-mv.Halted) + (1000+haltedWeight)*mv.Halted) / max(mv.Shared, 1)
		if !mv.Known {
			load = 1000
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

// inUse reports whether somebody has just used a green of stage k.
func (m Memory) inUse(j *traffic.Junction, k int) bool {
	for g := range j.Groups {
		if j.Stages[k].State.At(g).Go() && m.GapMS[g] < int64(useGap) && has(j, g) {
			return true
		}
	}
	return false
}
