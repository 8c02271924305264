package sim

// profile is the demand of each hour of the day in thousandths of the morning
// peak's; between full hours it is interpolated.
var profile = [24]int64{
	90, 60, 45, 40, 70, 180, 480, 850, 1000, 760, 640, 660,
	720, 700, 690, 760, 900, 1000, 860, 620, 450, 340, 240, 150,
}

// level returns the demand now, in thousandths.
func (c *City) level() int64 {
	if c.cfg.FlatDemand {
		return int64(c.cfg.DemandPermille)
	}
	t := c.now()
	h, m := t.Hour(), int64(t.Minute())
	p := (profile[h]*(60-m) + profile[(h+1)%24]*m) / 60
	return p * int64(c.cfg.DemandPermille) / 1000
}

// happens draws whether something that comes perHour times an hour, in
// thousandths, comes in this step. At most one a step: at these rates that is
// a Poisson process to within a percent.
func (c *City) happens(perHourPermille int64) bool {
	const stepsPerHour = 3_600_000 / stepMS
	return c.demand.Int64N(stepsPerHour*1000) < perHourPermille
}

// arrive draws this step's arrivals, always in the same order and whatever
// the lamps show, and lets vehicles in where there is room.
func (c *City) arrive() {
	level := c.level()
	for _, e := range c.entries {
		if c.happens(e.perHour * level) {
			c.want(e, Car, carMM)
		}
	}
	for _, b := range c.lines {
		if c.ms >= b.nextMS {
			b.nextMS += c.cfg.BusEvery.Milliseconds()
			b.number++
			if v := c.want(b.entry, Bus, busMM); v != nil {
				v.dueMS = c.ms + scheduleStop
			}
		}
	}
	if every := c.cfg.AmbulanceEvery.Milliseconds(); every > 0 && c.happens(3_600_000*1000/every) {
		c.want(c.entries[c.demand.IntN(len(c.entries))], Ambulance, ambulanceMM)
	}
	for _, s := range c.sites {
		for a := range s.crossings {
			if x := &s.crossings[a]; c.happens(x.perHour * level) {
				x.waiting = append(x.waiting, c.ms)
				c.stats.walkers++
			}
		}
	}
	for _, e := range c.entries {
		c.letIn(e)
	}
}

// want puts a vehicle that wants to enter in the queue outside; nil where that
// is full too and it turns away.
func (c *City) want(e *entry, class Class, length int64) *vehicle {
	seed := c.demand.Uint64() // drawn always, or demand would depend on the queues
	st := &c.stats.classes[class]
	st.wanted++
	if len(e.pending) >= maxPending {
		st.turnedAway++
		return nil
	}
	v := &vehicle{}
	if n := len(c.free); n > 0 {
		v, c.free = c.free[n-1], c.free[:n-1]
	}
	c.nextID++
	*v = vehicle{id: c.nextID, class: class, seed: seed, spacing: length + gapMM, bornMS: c.ms, haltMS: -1, moving: true}
	e.pending = append(e.pending, v)
	return v
}

func (c *City) letIn(e *entry) {
	if len(e.pending) == 0 || !e.trunk.room(e.pending[0].spacing) {
		return
	}
	v := e.pending[0]
	e.pending = append(e.pending[:0], e.pending[1:]...)
	v.v = e.trunk.speed
	if n := len(e.trunk.vs); n > 0 {
		v.v = min(v.v, e.trunk.vs[n-1].v)
	}
	e.trunk.push(v, e.trunk.begin)
	v.choose(e.trunk)
	c.stats.classes[v.class].entered++
}

func (c *City) finish(v *vehicle) {
	st := &c.stats.classes[v.class]
	st.finished++
	st.delayMS += c.delayOf(v)
	st.stops += v.stops
	c.free = append(c.free, v)
}

// delayOf is how much longer than unhindered v has been on its way, the wait
// outside included.
func (c *City) delayOf(v *vehicle) int64 { return max(c.ms-v.bornMS-v.freeUS/1000, 0) }
