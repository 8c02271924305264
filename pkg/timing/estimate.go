package timing

// LaneMemory is what the adaptive controller knows of one approach lane.
type LaneMemory struct {
	// StuckMS is for how long its first vehicle has been standing at green.
	StuckMS int64 `json:"stuck_ms,omitempty"`
	// Rate is how many vehicles an hour pass its stop line, over some minutes.
	Rate int64 `json:"rate,omitempty"`
	// Fluid is how many thousandths of vehicles would be waiting, by that rate and
	// by the lamps: what is gone by where nothing sees the lane.
	Fluid int64 `json:"fluid,omitempty"`
	// Due are the vehicles that are taken to be on the lane, the first first.
	Due []Expected `json:"due,omitempty"`
	// Left are vehicles, in thousandths, that passed the stop line and have not
	// been seen on an exit yet.
	Left int64 `json:"left,omitempty"`
	// Turn is, for the same movements as the lane's, how much of a vehicle each is
	// owed of those that come: it turns shares into whole vehicles.
	Turn []int64 `json:"turn,omitempty"`
}

// Expected is a vehicle that was seen to come onto a lane.
type Expected struct {
	AtMS int64 `json:"at_ms"` // Unix time at which it would be at the stop line, were there no signal
	Move int16 `json:"move"`  // where it is taken to turn
}

// Settings of the estimates. One set serves every network.
const (
	queueSpaceCM  = 750     // from one standing vehicle's front to the next one's
	rateTauMS     = 600_000 // memory of rates
	firstRate     = 200     // vehicles an hour, before anything is known
	shareStep     = 32      // a turning share moves by one part in so many with each vehicle
	leftMost      = 8_000   // thousandths
	expectedMost  = 100     // vehicles on one lane: more is a broken count
	unseenHeadway = headwayMS
)

// estimate brings what is known of lanes up to the view: who came, who left, and
// where those who left turned.
func (m *Memory) estimate(md *model, v View, dt int64) {
	now := m.AtMS
	for l := range md.lanes {
		lane := &md.lanes[l]
		if lane.walk {
			continue
		}
		e := &m.Lanes[l]
		all := laneView(v, lane)
		green, anyGreen := true, false
		for _, k := range lane.moves {
			g := v.Signal.State.At(int(md.moves[k].group)).Go()
			green, anyGreen = green && g, anyGreen || g
		}
		departed, known := all.Departed, all.Known && !all.Recall
		if known {
			if e.Rate == 0 {
				e.Rate = firstRate
			}
			if dt > 0 {
				e.Rate = max(e.Rate+(int64(departed)*3_600_000/dt-e.Rate)*dt/rateTauMS, 1)
			}
		}
		rate := max(e.Rate, 1)
		e.Fluid += rate * dt / 3600
		if anyGreen {
			e.Fluid -= dt * 1000 / unseenHeadway
		}
		e.Fluid = min(max(e.Fluid, 0), 30_000)
		if known {
			e.Fluid = min(e.Fluid, int64(all.Vehicles)*1000)
		}
		if exact(v, lane) {
			for _, k := range lane.moves {
				for range min(v.Movements[k].Departed, 10) {
					m.turned(lane, k)
				}
			}
			continue
		}
		if !known {
			e.Due, e.StuckMS = e.Due[:0], 0
			continue
		}
		e.Left = min(e.Left+int64(departed)*1000, leftMost)
		m.follow(md, &all, l, now)
		// Whoever stands at green first in line, and is taken to go where he may,
		// goes somewhere else.
		if len(e.Due) > 0 && all.Halted > 0 && all.Present && departed == 0 && anyGreen && e.Due[0].AtMS < now-2000 {
			e.StuckMS += dt
		} else {
			e.StuckMS = 0
		}
		if e.StuckMS >= stuckMS && !green && len(e.Due) > 0 {
			if k := e.Due[0].Move; v.Signal.State.At(int(md.moves[k].group)).Go() {
				for _, o := range lane.moves {
					if !v.Signal.State.At(int(md.moves[o].group)).Go() {
						e.Due[0].Move = o
						break
					}
				}
			}
		}
	}
	m.exitsSeen(md, v, now)
}

// follow keeps the list of who is on a lane in step with the counts.
func (m *Memory) follow(md *model, all *MovementView, l int, now int64) {
	lane := &md.lanes[l]
	e := &m.Lanes[l]
	due := e.Due[min(all.Departed, len(e.Due)):]
	n := min(laneCount(all, lane), expectedMost)
	if !all.Counted {
		n = min(max(m.Queue[lane.moves[0]], 0), expectedMost)
	}
	if all.Present {
		n = max(n, 1)
	}
	if len(due) > n {
		due = due[:n]
	}
	for len(due) < n {
		due = append(due, Expected{AtMS: now + int64(lane.reach)*1000/int64(lane.speed), Move: m.turn(md, l)})
	}
	e.Due = due
}

// laneCount is how many vehicles are on a lane and its part of the lanes before.
func laneCount(mv *MovementView, lane *laneModel) int {
	own := mv.Vehicles - mv.Upstream
	return max(own, 0) + (max(mv.Upstream, 0)+int(lane.feeders)-1)/max(int(lane.feeders), 1)
}

func laneHalted(mv *MovementView, lane *laneModel) int {
	own := mv.Halted - mv.UpstreamHalted
	return max(own, 0) + max(mv.UpstreamHalted, 0)/max(int(lane.feeders), 1)
}

// turn says where the next vehicle of a lane is taken to go, such that over time
// as many go each way as the shares say.
func (m *Memory) turn(md *model, l int) int16 {
	lane := &md.lanes[l]
	if len(lane.moves) == 1 {
		return lane.moves[0]
	}
	e := &m.Lanes[l]
	if len(e.Turn) != len(lane.moves) {
		e.Turn = make([]int64, len(lane.moves))
	}
	best := 0
	for x, k := range lane.moves {
		e.Turn[x] += m.Shares[k]
		if e.Turn[x] > e.Turn[best] {
			best = x
		}
	}
	e.Turn[best] -= 1000
	return lane.moves[best]
}

// exitsSeen takes note of who appears on exits, and learns from them where
// vehicles turn: each came from a lane that somebody has just left.
func (m *Memory) exitsSeen(md *model, v View, now int64) {
	for e := range md.exits {
		s := &m.Sent[e]
		old := 0
		for old < len(s.Past) && s.Past[old] < now-passedMS {
			old++
		}
		s.Past = s.Past[old:]
		i := md.exitMove[e]
		mv := &v.Movements[i]
		entered := min(max(mv.ExitVehicles-m.Exits[e]+mv.ExitPassed, 0), 10)
		m.Exits[e] = mv.ExitVehicles
		for range entered {
			if len(s.Past) < outflowMost {
				s.Past = append(s.Past, now)
			}
			best := -1
			for i := range v.Movements {
				l := md.moves[i].lane
				if int(md.moves[i].exit) != e || m.Lanes[l].Left < 1000 {
					continue
				}
				if best < 0 || m.Lanes[l].Left > m.Lanes[md.moves[best].lane].Left {
					best = i
				}
			}
			if best < 0 {
				continue
			}
			l := md.moves[best].lane
			m.Lanes[l].Left -= 1000
			m.turned(&md.lanes[l], int16(best))
		}
	}
}

// turned moves the shares of a lane towards one of its movements.
func (m *Memory) turned(lane *laneModel, to int16) {
	for _, k := range lane.moves {
		if k == to {
			m.Shares[k] += (1000 - m.Shares[k]) / shareStep
		} else {
			m.Shares[k] -= m.Shares[k] / shareStep
		}
	}
}

// seeDetectors fills in who is on a lane by what was followed.
func (p *scratch) seeDetectors(m *Memory, v View, l int) {
	md := p.m
	lane := &md.lanes[l]
	e := &m.Lanes[l]
	all := laneView(v, lane)
	if !all.Known || all.Recall {
		p.seeNothing(m, v, l)
		return
	}
	halted := laneHalted(&all, lane)
	p.nf[l] = int32(min(max(e.StuckMS-stuckMS, 0), stuckMost))
	for i := range e.Due {
		d := &e.Due[i]
		stands := arrival(int32(i)*queueSpaceCM+100, 0, lane.speed)
		due := int32(min(d.AtMS-m.AtMS, 100_000))
		switch {
		case i < halted:
			p.add(stands, unit, d.Move, false)
		case due <= stands/2:
			p.add(max(stands*2/3, 0), unit, d.Move, false)
		default:
			p.add(due, unit, d.Move, true)
		}
	}
}

// seeNothing fills in who is taken to be on a lane that nothing sees: as many as
// have gathered by the usual rate, one at least, and the movement that has waited
// longest first.
func (p *scratch) seeNothing(m *Memory, v View, l int) {
	md := p.m
	lane := &md.lanes[l]
	n := m.Lanes[l].Fluid / 1000
	for x := range int(min(n, 30)) + len(lane.moves) {
		k := lane.moves[x%len(lane.moves)]
		if x < len(lane.moves) && v.Signal.State.At(int(md.moves[k].group)).Go() && int64(x) >= n {
			continue
		}
		p.add(arrival(int32(x)*queueSpaceCM+100, 0, lane.speed), unit, k, false)
	}
}
