package timing

import (
	"fmt"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Settings of the adaptive controller. One set serves every network.
const (
	accelCMSS = 260 // cm/s²
	stuckMS   = 3_000
	stuckMost = 50_000
	// A queue weighs more from where it fills so much of its lane, in thousandths,
	// and by so much more when it fills it all; a lane shorter than crowdedCM goes
	// on into others.
	crowdedFrom = 500
	crowdedMost = 2_000
	crowdedCM   = 12_000
	expectUnit  = 300    // weight of a vehicle that usually comes
	farReachCM  = 15_000 // who sees so far need not guess
	expectFrom  = 60     // an hour: less is nobody
	perhapsUnit = 300    // weight of a walk without a button
	waveStopMS  = 16_000 // what a stop costs on a corridor with a green wave
	busUnits    = 10     // vehicles that a bus weighs more than one
	softRedMS   = 150_000
	plannedUnit = 400 // weight of a vehicle that a neighbour is only about to let go
)

// adaptive plans some fifty seconds ahead, anew at each decision, and does what
// the cheapest plan begins with.
func adaptive(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision) {
	var dt int64
	if m.AtMS != 0 {
		dt = min(max(v.Now.UnixMilli()-m.AtMS, 0), maxFrameGapMS)
	}
	md := m.model
	if md == nil || md.junction != j || md.rules != r {
		md = modelOf(j, r)
	}
	m = m.observe(j, v)
	m.model = md
	m.own(md)
	m.estimate(md, v, dt)
	p := scratches.Get().(*scratch)
	defer scratches.Put(p)
	p.begin(md)
	p.see(&m, v, dt)
	at, next, leave := v.Signal.Stage, -1, int32(0)
	var d Decision
	switch {
	case !m.mayDecide(j, r, v):
		m, d = m.repeat()
	case at < 0 || at >= len(j.Stages):
		at = j.Plan.Steps[0].Stage
		if k := emergency(j, v); k >= 0 {
			at = k
		}
		m, d = m.decide(at, fmt.Sprintf("adaptive: start with stage %d", at))
	default:
		if k := emergency(j, v); k >= 0 {
			m, d = m.decide(k, fmt.Sprintf("adaptive: stage %d for an emergency vehicle", k))
			break
		}
		if k, g := m.starving(j, r, v); k >= 0 {
			m, d = m.decide(k, fmt.Sprintf("adaptive: stage %d, group %d has waited %d s", k, g, m.RedMS[g]/1000))
			break
		}
		if len(p.arr) == 0 {
			m, d = m.decide(at, fmt.Sprintf("adaptive: rest in stage %d, nobody is there", at))
			break
		}
		p.search(at)
		best := at
		for k := range p.leave {
			if k != at && p.leave[k]+p.margin < p.stay && (best == at || p.leave[k] < p.leave[best]) {
				best = k
			}
		}
		if best == at {
			next, leave = p.first, p.leaves
			m, d = m.decide(at, fmt.Sprintf("adaptive: stage %d stays", at))
			break
		}
		m, d = m.decide(best, fmt.Sprintf("adaptive: stage %d saves %d vehicle-seconds", best, (p.stay-p.leave[best])/(1000*unit)))
	}
	p.announce(&m, v, d.Stage, next, leave)
	return m, d
}

// announce rolls out what was decided, and notes who is let go by it. A stage
// that stays is followed by next, where that is another, after leave ms.
func (p *scratch) announce(m *Memory, v View, stage, next int, leave int32) {
	if stage < 0 || stage >= len(p.m.stages) || len(m.Sent) == 0 {
		return
	}
	s := &p.states[0]
	p.initial(s)
	p.sent, p.sentMS = m.Sent, m.AtMS
	for l := range p.m.lanes {
		if m.Lanes[l].StuckMS > stuckMS {
			s.nf[l] = outflowMS // promises nothing
		}
	}
	var t int32
	switch at := v.Signal.Stage; {
	case at < 0 || at >= len(p.m.stages):
		t = int32(min(max(4000-v.Signal.SinceMS, 0), 4000))
	case at != stage:
		t = p.transit(s, 0, at, stage)
	case next >= 0 && next != at && leave < outflowMS:
		p.serve(s, at, 0, leave, -1)
		t, stage = p.transit(s, leave, at, next), next
	}
	p.serve(s, stage, t, outflowMS, -1)
	p.sent = nil
	for i := range m.Sent {
		slices.Sort(m.Sent[i].Planned)
	}
}

// see fills in who is there, or will be, by lane.
func (p *scratch) see(m *Memory, v View, dt int64) {
	md := p.m
	p.assign(m, v)
	for l := range md.lanes {
		lane := &md.lanes[l]
		p.beg[l] = int32(len(p.arr))
		if lane.walk {
			g := int(md.moves[lane.moves[0]].group)
			if v.Calls[g] {
				w := int32(unit)
				if !lane.calls {
					w = perhapsUnit // somebody may wait there
				}
				p.add(0, w, lane.moves[0], false)
			}
			p.end[l] = int32(len(p.arr))
			continue
		}
		if exact(v, lane) {
			p.seeOracle(m, v, l, dt)
		} else {
			p.seeDetectors(m, v, l)
		}
		if lane.from != "" && slices.Contains(v.Corridor, lane.from) && slices.Contains(v.Corridor, md.junction.ID) {
			p.hlt[l] = waveStopMS
		}
		p.crowd(l)
		p.priority(v, l)
		p.seeInflow(m, v, l)
		p.expect(m, l)
		p.end[l] = int32(len(p.arr))
		if i := p.beg[l]; i < p.end[l] {
			g := int(md.moves[p.mv[i]].group)
			if over := m.RedMS[g] - softRedMS; over > 0 {
				p.w[i] += int32(min(over, 600_000))
			}
		}
	}
	for i := range v.Movements {
		mv := &v.Movements[i]
		e := md.moves[i].exit
		if e < 0 {
			continue
		}
		if mv.ExitCapacity > 0 && mv.ExitHalted > 0 {
			if p.ref[e] < 0 {
				p.cap[e] = int32(min(max(mv.ExitCapacity-mv.ExitVehicles, 0), 1000)) * unit
				p.ref[e] = 450
				if mv.ExitHalted*4 >= mv.ExitVehicles*3 {
					p.ref[e] = 150
				}
			}
			p.cap[e] = max(p.cap[e]-int32(min(max(mv.InBox, 0), 1000))*unit, 0)
		}
	}
}

// crowd makes a queue weigh more as it comes to fill its lane: what stands
// beyond it stands in somebody else's way. Only between signals: at the edge of
// the network nobody is known to be behind.
func (p *scratch) crowd(l int) {
	lane := &p.m.lanes[l]
	if lane.from == "" {
		return
	}
	var standing int32
	for i := p.beg[l]; i < int32(len(p.arr)); i++ {
		if !p.run[i] {
			standing++
		}
	}
	fill := min(standing*queueSpaceCM*1000/max(lane.length, crowdedCM), 1000) // thousandths
	if fill <= crowdedFrom {
		return
	}
	more := (fill - crowdedFrom) * crowdedMost / (1000 - crowdedFrom)
	for i := p.beg[l]; i < int32(len(p.arr)); i++ {
		p.w[i] += p.w[i] / 1000 * more
	}
}

// priority makes the first vehicle of each movement on which a bus is weigh as much
// as those who sit in it: which of them it is nobody tells, and the first must go
// for the bus to go.
func (p *scratch) priority(v View, l int) {
	for _, k := range p.m.lanes[l].moves {
		if v.Priority[k] < traffic.Bus {
			continue
		}
		for i := p.beg[l]; i < int32(len(p.arr)); i++ {
			if p.mv[i] == k {
				p.w[i] += busUnits * unit
				break
			}
		}
	}
}

// assign gives each announced vehicle that detectors do not see yet a lane: its
// own where that is known, else one of those that come from there, by how much
// they are used.
func (p *scratch) assign(m *Memory, v View) {
	p.inLane = grow(p.inLane, len(v.Inflow))
	p.owed = grow(p.owed, len(p.m.lanes))
	clear(p.owed)
	for x := range v.Inflow {
		in := &v.Inflow[x]
		p.inLane[x] = -1
		best, all := -1, int64(0)
		for l := range p.m.lanes {
			lane := &p.m.lanes[l]
			if lane.walk || in.Lane != lane.id && (in.Lane != "" || in.From == "" || lane.from != in.From) {
				continue
			}
			w := max(m.Lanes[l].Rate, 1)
			p.owed[l] += w
			all += w
			if best < 0 || p.owed[l] > p.owed[best] {
				best = l
			}
		}
		if best < 0 {
			continue
		}
		p.owed[best] -= all
		lane := &p.m.lanes[best]
		if in.AtMS > m.AtMS && in.AtMS < m.AtMS+planMS && (!in.Sent || in.AtMS > m.AtMS+int64(lane.reach)*1000/int64(lane.speed)) {
			p.inLane[x] = int16(best)
		}
	}
}

// seeInflow adds the announced vehicles of a lane.
func (p *scratch) seeInflow(m *Memory, v View, l int) {
	lane := &p.m.lanes[l]
	for x := range v.Inflow {
		if int(p.inLane[x]) != l {
			continue
		}
		k := lane.moves[0]
		if len(lane.moves) > 1 {
			// By the shares; what is owed is not remembered, these may never come.
			for _, o := range lane.moves {
				if p.given[o] += m.Shares[o]; p.given[o] > p.given[k] {
					k = o
				}
			}
			p.given[k] -= 1000
		}
		w := int32(plannedUnit)
		if v.Inflow[x].Sent {
			w = unit
		}
		p.add(max(int32(v.Inflow[x].AtMS-m.AtMS), 0), w, k, true)
	}
}

// expect adds those who will come after the last one that is known of, by the
// lane's usual rate. Without them it would always look well to let just one more
// go before a change: whom the change stops instead would be out of sight.
func (p *scratch) expect(m *Memory, l int) {
	lane := &p.m.lanes[l]
	rate := int32(min(m.Lanes[l].Rate, 2_000))
	if rate < expectFrom || lane.reach >= farReachCM || lane.from != "" {
		return
	}
	at := int32(int64(lane.reach) * 1000 / int64(lane.speed))
	if n := len(p.arr); n > int(p.beg[l]) {
		at = max(at, p.arr[n-1])
	}
	every := 3_600_000 / rate
	for at += every / 2; at < planMS; at += every {
		k := lane.moves[0]
		for _, o := range lane.moves {
			if p.given[o] += m.Shares[o]; p.given[o] > p.given[k] {
				k = o
			}
		}
		p.given[k] -= 1000
		p.add(at, expectUnit, k, true)
	}
}

// own makes what the planner remembers its own, and empties it where it is of
// another definition.
func (m *Memory) own(md *model) {
	moves := len(md.junction.Movements)
	if len(m.Lanes) != len(md.lanes) || len(m.Shares) != moves || len(m.Exits) != md.exits || len(m.Sent) != md.exits {
		m.Lanes, m.Shares, m.Exits, m.Sent = make([]LaneMemory, len(md.lanes)), make([]int64, moves), make([]int, md.exits), make([]SentMemory, md.exits)
		for _, l := range md.lanes {
			for _, k := range l.moves {
				if int(k) < moves {
					m.Shares[k] = 1000 / int64(len(l.moves))
				}
			}
		}
		return
	}
	m.Lanes, m.Shares, m.Exits, m.Sent = slices.Clone(m.Lanes), slices.Clone(m.Shares), slices.Clone(m.Exits), slices.Clone(m.Sent)
	for i := range m.Sent {
		m.Sent[i].Past, m.Sent[i].Planned = slices.Clone(m.Sent[i].Past), nil
	}
	for i := range m.Lanes {
		m.Lanes[i].Due, m.Lanes[i].Turn = slices.Clone(m.Lanes[i].Due), slices.Clone(m.Lanes[i].Turn)
		// Memory may have been stored, and belong to another definition.
		m.Lanes[i].Due = slices.DeleteFunc(m.Lanes[i].Due, func(e Expected) bool { return !slices.Contains(md.lanes[i].moves, e.Move) })
	}
}

// exact reports whether each vehicle of a lane is known, with its movement.
func exact(v View, lane *laneModel) bool {
	for _, k := range lane.moves {
		mv := &v.Movements[k]
		if !mv.Oracle || mv.Recall || len(mv.Ahead) == 0 && mv.Vehicles > 0 {
			return false
		}
	}
	return true
}

// laneView is what detectors say of a lane as a whole.
func laneView(v View, lane *laneModel) MovementView {
	sum := v.Movements[lane.moves[0]]
	for _, k := range lane.moves[1:] {
		mv := &v.Movements[k]
		sum.Known, sum.Recall = sum.Known && mv.Known, sum.Recall || mv.Recall
		sum.Present = sum.Present || mv.Present
		if mv.Shared <= 1 {
			// Counted for each movement by itself.
			sum.Vehicles += mv.Vehicles
			sum.Halted += mv.Halted
			sum.Departed += mv.Departed
		}
	}
	sum.Vehicles, sum.Halted, sum.Departed = min(max(sum.Vehicles, 0), 1000), min(max(sum.Halted, 0), 1000), min(max(sum.Departed, 0), 20)
	return sum
}

// seeOracle merges the vehicles of a lane's movements by their distance.
func (p *scratch) seeOracle(m *Memory, v View, l int, dt int64) {
	md := p.m
	lane := &md.lanes[l]
	head := true
	departed := false
	for _, k := range lane.moves {
		departed = departed || v.Movements[k].Departed > 0
	}
	var at [16]int
	for {
		best := -1
		var near uint32
		for x, k := range lane.moves {
			if x >= len(at) {
				break
			}
			if a := v.Movements[k].Ahead; at[x] < len(a) && (best < 0 || a[at[x]].DistanceCM < near) {
				best, near = x, a[at[x]].DistanceCM
			}
		}
		if best < 0 {
			break
		}
		k := lane.moves[best]
		a := v.Movements[k].Ahead[at[best]]
		at[best]++
		if head {
			head = false
			// Who does not move at green will not at the next one, as far as is
			// known: something is in the way, at the stop line or far before it.
			if a.SpeedCMS >= 50 || departed {
				m.Lanes[l].StuckMS = 0
			} else if v.Signal.State.At(int(md.moves[k].group)).Go() {
				m.Lanes[l].StuckMS += dt
			}
			p.nf[l] = int32(min(max(m.Lanes[l].StuckMS-stuckMS, 0), stuckMost))
		}
		p.add(arrival(int32(min(a.DistanceCM, 100_000)), int32(min(a.SpeedCMS, 5_000)), lane.speed), unit, k, a.SpeedCMS > 200)
	}
	if head {
		m.Lanes[l].StuckMS = 0
	}
}

// arrival is after how many ms a vehicle at a distance (cm) and speed comes to the
// stop line, when it accelerates freely to the limit (cm/s).
func arrival(dist, speed, limit int32) int32 {
	d, v, most := int64(dist), int64(speed), int64(limit)
	if v >= most {
		return int32(d * 1000 / v)
	}
	if needs := (most*most - v*v) / (2 * accelCMSS); d >= needs {
		return int32((most-v)*1000/accelCMSS + (d-needs)*1000/most)
	}
	return int32((isqrt(v*v+2*accelCMSS*d) - v) * 1000 / accelCMSS)
}

// isqrt is the integer square root.
func isqrt(n int64) int64 {
	if n < 2 {
		return max(n, 0)
	}
	x := int64(1) << ((bits(n) + 1) / 2)
	for {
		y := (x + n/x) / 2
		if y >= x {
			return x
		}
		x = y
	}
}

func bits(n int64) (b uint) {
	for ; n > 0; n >>= 1 {
		b++
	}
	return b
}
