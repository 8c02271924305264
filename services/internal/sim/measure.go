package sim

import "github.com/stopline-traffic/stopline/pkg/traffic"

type stats struct {
	classes                 [3]classStats
	crossed, unsafe         int64
	walkers, walked         int64
	walkWaitMS, walkWaitMax int64
	busStops, latenessMS    int64
}

type classStats struct {
	wanted, turnedAway, entered, finished int64
	delayMS, stops                        int64 // of the finished
}

// ClassMeasures are the measures of effectiveness of one class of vehicle.
// Wanted = TurnedAway + Outside + Inside + Finished, always.
type ClassMeasures struct {
	// Wanted vehicles have arrived at the edge, of which TurnedAway found
	// even the queue outside full.
	Wanted     int64 `json:"wanted"`
	TurnedAway int64 `json:"turned_away"`
	// Outside wait to enter, Inside are on the way, Finished have left.
	Outside  int64 `json:"outside"`
	Inside   int64 `json:"inside"`
	Finished int64 `json:"finished"`
	// MeanDelayMS is the time lost against an unhindered way, the wait outside
	// included, over all that were not turned away, finished or not.
	MeanDelayMS int64 `json:"mean_delay_ms"`
	// StopsPermille is stops a vehicle, in thousandths, over the same.
	StopsPermille int64 `json:"stops_permille"`
}

// PedestrianMeasures are those of people on foot.
type PedestrianMeasures struct {
	Arrived    int64 `json:"arrived"`
	Waiting    int64 `json:"waiting"`
	Started    int64 `json:"started"`
	MeanWaitMS int64 `json:"mean_wait_ms"` // of those who have started
	MaxWaitMS  int64 `json:"max_wait_ms"`  // of those, and of those who wait
}

// Measures are the measures of effectiveness since the start.
type Measures struct {
	ElapsedMS   int64              `json:"elapsed_ms"`
	Cars        ClassMeasures      `json:"cars"`
	Buses       ClassMeasures      `json:"buses"`
	Ambulances  ClassMeasures      `json:"ambulances"`
	Pedestrians PedestrianMeasures `json:"pedestrians"`
	// Crossed counts stop lines passed, FinishedPerHour vehicles that left.
	Crossed         int64 `json:"crossed"`
	FinishedPerHour int64 `json:"finished_per_hour"`
	// MeanLatenessMS of buses at their stops, negative where early.
	BusStops       int64 `json:"bus_stops"`
	MeanLatenessMS int64 `json:"mean_lateness_ms"`
	// UnsafeStates counts pairs of conflicting groups that were shown green
	// together. It must be 0; the city lets traffic obey even such lamps.
	UnsafeStates int64 `json:"unsafe_states"`
}

// All returns the sums over all classes, with the means weighted.
func (m Measures) All() ClassMeasures {
	var a ClassMeasures
	var n, delay, stops int64
	for _, c := range []ClassMeasures{m.Cars, m.Buses, m.Ambulances} {
		a.Wanted += c.Wanted
		a.TurnedAway += c.TurnedAway
		a.Outside += c.Outside
		a.Inside += c.Inside
		a.Finished += c.Finished
		k := c.Wanted - c.TurnedAway
		n += k
		delay += k * c.MeanDelayMS
		stops += k * c.StopsPermille
	}
	if n > 0 {
		a.MeanDelayMS, a.StopsPermille = delay/n, stops/n
	}
	return a
}

// Measures returns the measures of effectiveness since the start.
func (c *City) Measures() Measures {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := Measures{ElapsedMS: c.ms, Crossed: c.stats.crossed, UnsafeStates: c.stats.unsafe, BusStops: c.stats.busStops}
	classes := c.stats.classes
	var outside, inside [3]int64
	count := func(v *vehicle, where *[3]int64) {
		where[v.class]++
		classes[v.class].delayMS += c.delayOf(v)
		classes[v.class].stops += v.stops
	}
	for _, l := range c.lanes {
		for _, v := range l.vs {
			count(v, &inside)
		}
	}
	for _, e := range c.entries {
		for _, v := range e.pending {
			count(v, &outside)
		}
	}
	var finished int64
	for k, into := range []*ClassMeasures{&m.Cars, &m.Buses, &m.Ambulances} {
		s := classes[k]
		*into = ClassMeasures{Wanted: s.wanted, TurnedAway: s.turnedAway, Outside: outside[k], Inside: inside[k], Finished: s.finished}
		if n := s.wanted - s.turnedAway; n > 0 {
			into.MeanDelayMS, into.StopsPermille = s.delayMS/n, s.stops*1000/n
		}
		finished += s.finished
	}
	if c.ms > 0 {
		m.FinishedPerHour = finished * 3_600_000 / c.ms
	}
	if c.stats.busStops > 0 {
		m.MeanLatenessMS = c.stats.latenessMS / c.stats.busStops
	}
	p := &m.Pedestrians
	p.Arrived, p.Started, p.MaxWaitMS = c.stats.walkers, c.stats.walked, c.stats.walkWaitMax
	if p.Started > 0 {
		p.MeanWaitMS = c.stats.walkWaitMS / p.Started
	}
	for _, s := range c.sites {
		for a := range s.crossings {
			if w := s.crossings[a].waiting; len(w) > 0 {
				p.Waiting += int64(len(w))
				p.MaxWaitMS = max(p.MaxWaitMS, c.ms-w[0])
			}
		}
	}
	return m
}

// LaneSnapshot is one lane of a junction, approach or exit.
type LaneSnapshot struct {
	ID       traffic.LaneID `json:"id"`
	Vehicles int            `json:"vehicles"`
	Halted   int            `json:"halted"`
	Capacity int            `json:"capacity"`
}

// JunctionSnapshot is what a bystander sees of one junction.
type JunctionSnapshot struct {
	ID          traffic.JunctionID `json:"id"`
	Name        string             `json:"name"`
	LatE6       int64              `json:"lat_e6"`
	LonE6       int64              `json:"lon_e6"`
	State       traffic.State      `json:"state"`
	Vehicles    int                `json:"vehicles"` // on the approaches, before the stop lines
	Queue       int                `json:"queue"`    // of them, standing
	Pedestrians int                `json:"pedestrians"`
	Lanes       []LaneSnapshot     `json:"lanes"`
}

// VehicleSnapshot is one vehicle on the map.
type VehicleSnapshot struct {
	ID     uint64 `json:"id"`
	Class  string `json:"class"`
	LatE6  int64  `json:"lat_e6"`
	LonE6  int64  `json:"lon_e6"`
	Halted bool   `json:"halted,omitempty"`
}

// Snapshot is the whole city at one moment, for a map.
type Snapshot struct {
	TimeMS    int64              `json:"time_ms"` // Unix
	Junctions []JunctionSnapshot `json:"junctions"`
	Vehicles  []VehicleSnapshot  `json:"vehicles"`
}

// Snapshot returns the city as it is now. It shares nothing with the city.
func (c *City) Snapshot() Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := Snapshot{TimeMS: c.now().UnixMilli(), Vehicles: []VehicleSnapshot{}}
	for _, s := range c.sites {
		j := JunctionSnapshot{ID: s.def.ID, Name: s.def.Name, LatE6: s.def.LatE6, LonE6: s.def.LonE6, State: s.lamps}
		add := func(l *lane) LaneSnapshot {
			n := LaneSnapshot{ID: l.id, Vehicles: len(l.vs), Capacity: l.capacity}
			for _, v := range l.vs {
				if v.haltMS >= 0 {
					n.Halted++
				}
			}
			j.Lanes = append(j.Lanes, n)
			return n
		}
		for a := north; a <= west; a++ {
			for _, l := range s.approach[a] {
				n := add(l)
				j.Vehicles += n.Vehicles
				j.Queue += n.Halted
			}
			j.Pedestrians += len(s.crossings[a].waiting)
		}
		for a := north; a <= west; a++ {
			add(c.trunks[exitLaneID(s.def.ID, a)])
		}
		out.Junctions = append(out.Junctions, j)
	}
	for _, l := range c.lanes {
		for _, v := range l.vs {
			p := max(v.pos, 0)
			out.Vehicles = append(out.Vehicles, VehicleSnapshot{ID: v.id, Class: v.class.String(), Halted: v.haltMS >= 0,
				LatE6: l.lat0 + (l.lat1-l.lat0)*p/l.length, LonE6: l.lon0 + (l.lon1-l.lon0)*p/l.length})
		}
	}
	return out
}
