package timing

import (
	"fmt"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// LaneMemory is what the adaptive controller knows of one approach lane.
type LaneMemory struct {
	// StuckMS is for how long its first vehicle has been standing at green.
	StuckMS int64 `json:"stuck_ms,omitempty"`
}

// Settings of the adaptive controller. One set serves every network.
const (
	accelCMSS  = 260 // cm/s²
	stuckMS    = 3_000
	stuckMost  = 20_000
	softRedMS  = 150_000
	switchCost = 0
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
	if len(m.Lanes) != len(md.lanes) {
		m.Lanes = make([]LaneMemory, len(md.lanes))
	} else {
		m.Lanes = slices.Clone(m.Lanes)
	}
	p := scratches.Get().(*scratch)
	defer scratches.Put(p)
	p.begin(md)
	p.see(&m, v, dt)
	if !m.mayDecide(j, r, v) {
		return m.repeat()
	}
	at := v.Signal.Stage
	if at < 0 || at >= len(j.Stages) {
		at = j.Plan.Steps[0].Stage
		if k := emergency(j, v); k >= 0 {
			at = k
		}
		return m.decide(at, fmt.Sprintf("adaptive: start with stage %d", at))
	}
	if k := emergency(j, v); k >= 0 {
		return m.decide(k, fmt.Sprintf("adaptive: stage %d for an emergency vehicle", k))
	}
	if len(p.arr) == 0 {
		return m.decide(at, fmt.Sprintf("adaptive: rest in stage %d, nobody is there", at))
	}
	p.search(at, switchCost)
	best := at
	for k := range p.leave {
		if k != at && p.leave[k]+p.margin < p.stay && (best == at || p.leave[k] < p.leave[best]) {
			best = k
		}
	}
	if best == at {
		return m.decide(at, fmt.Sprintf("adaptive: stage %d stays", at))
	}
	return m.decide(best, fmt.Sprintf("adaptive: stage %d saves %d vehicle-seconds", best, (p.stay-p.leave[best])/(1000*unit)))
}

// see fills in who is there, or will be, by lane.
func (p *scratch) see(m *Memory, v View, dt int64) {
	md := p.m
	for l := range md.lanes {
		lane := &md.lanes[l]
		p.beg[l] = int32(len(p.arr))
		if lane.walk {
			g := int(md.moves[lane.moves[0]].group)
			if v.Calls[g] {
				p.add(0, unit, lane.moves[0], false)
			}
			p.end[l] = int32(len(p.arr))
			continue
		}
		p.seeOracle(m, v, l, dt)
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
				p.cap[e] = int32(max(mv.ExitCapacity-mv.ExitVehicles, 0)) * unit
				p.ref[e] = 450
				if mv.ExitHalted*4 >= mv.ExitVehicles*3 {
					p.ref[e] = 150
				}
			}
			p.cap[e] = max(p.cap[e]-int32(mv.InBox)*unit, 0)
		}
	}
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
			if a.SpeedCMS < 50 && a.DistanceCM < 2500 && !departed && v.Signal.State.At(int(md.moves[k].group)).Go() {
				m.Lanes[l].StuckMS += dt
			} else {
				m.Lanes[l].StuckMS = 0
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
