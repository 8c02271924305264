package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/roadside"
)

const attackManual = `
Attacks (--attack NAME, at one junction): what its unit signs is false.
             late-arrival  one vehicle more, standing at the far end of an approach
             ghosts        an approach that is always full: 500 vehicles an hour that
                           are not there
             stuck-on      its loop at the stop line is always occupied
             stuck-off     that loop never sees anything
             bias          that loop counts 30 % more
             blind         none of its detectors ever sees anything
             clock=SHIFT   the unit's clock is wrong, for instance clock=-1h
The approach is one that has red while the longest step of the plan is green.
--attack-after says when it begins.`

// attack is what a simulation does to one unit.
type attack struct {
	name     string
	shift    time.Duration // of the unit's clock
	junction traffic.JunctionID
	begins   time.Time
	// targets are the detectors whose readings are false, by index.
	targets []int
	ids     []traffic.DetectorID
}

// attackNames are those without a parameter.
var attackNames = []string{"late-arrival", "ghosts", "stuck-on", "stuck-off", "bias", "blind"}

// newAttack reads a name; "" is none.
func newAttack(name string, at traffic.JunctionID, begins time.Time, defs []*traffic.Junction) (*attack, error) {
	if name == "" {
		return nil, nil
	}
	a := &attack{name: name, begins: begins}
	if d, ok := strings.CutPrefix(name, "clock="); ok {
		var err error
		if a.shift, err = time.ParseDuration(d); err != nil || a.shift == 0 {
			return nil, usageError("simulate: --attack %q: clock must be shifted by a duration, for instance -1h", name)
		}
	} else if !slices.Contains(attackNames, name) {
		return nil, usageError("simulate: --attack %q: must be one of %s, clock=SHIFT", name, strings.Join(attackNames, ", "))
	}
	k := 0
	if at != "" {
		if k = slices.IndexFunc(defs, func(j *traffic.Junction) bool { return j.ID == at }); k < 0 {
			return nil, usageError("simulate: --attack-at %q: no such junction", at)
		}
	}
	a.junction, a.targets = defs[k].ID, attacked(defs[k])
	if (name == "stuck-on" || name == "stuck-off" || name == "bias") && len(a.targets) > 1 {
		a.targets = a.targets[:1]
	}
	for _, i := range a.targets {
		a.ids = append(a.ids, defs[k].Detectors[i].ID)
	}
	if len(a.targets) == 0 && a.shift == 0 {
		return nil, fmt.Errorf("simulate: --attack: junction %s has no approach with detectors that is red in the longest step of its plan", a.junction)
	}
	return a, nil
}

// attacked returns the detectors of one approach lane that is red while the
// longest step of the plan is green: more green there costs most.
func attacked(j *traffic.Junction) (out []int) {
	longest := 0
	for i, s := range j.Plan.Steps {
		if s.DurationMS > j.Plan.Steps[longest].DurationMS {
			longest = i
		}
	}
	green := j.Stages[j.Plan.Steps[longest].Stage].State
	var lane traffic.LaneID
	for _, d := range j.Detectors {
		if d.Kind != traffic.Area || len(d.Movements) == 0 {
			continue
		}
		if !slices.ContainsFunc(d.Movements, func(m int) bool { return green.At(j.Movements[m].Group).Go() }) {
			lane = d.Lane
			break
		}
	}
	for i, d := range j.Detectors {
		if d.Lane == lane && (d.Kind == traffic.Area || d.Kind == traffic.StopLine || d.Kind == traffic.Advance) {
			out = append(out, i)
		}
	}
	// The one at the stop line comes first.
	slices.SortStableFunc(out, func(a, b int) int {
		order := []traffic.DetectorKind{traffic.StopLine, traffic.Advance, traffic.Area}
		return slices.Index(order, j.Detectors[a].Kind) - slices.Index(order, j.Detectors[b].Kind)
	})
	return out
}

// clock is the time that the unit of a junction takes it to be.
func (a *attack) clock(j traffic.JunctionID, now time.Time) time.Time {
	if a == nil || a.junction != j || now.Before(a.begins) {
		return now
	}
	return now.Add(a.shift)
}

// on puts the attack before a junction's cabinet.
func (a *attack) on(j *traffic.Junction, d roadside.Driver, now func() time.Time) roadside.Driver {
	if a == nil || a.junction != j.ID || len(a.targets) == 0 || a.shift != 0 {
		return d
	}
	return &attackedCabinet{Driver: d, a: a, j: j, now: now}
}

// attackedCabinet lies about what detectors say.
type attackedCabinet struct {
	roadside.Driver
	a    *attack
	j    *traffic.Junction
	now  func() time.Time
	n    int    // intervals since it began
	part uint32 // tenths of a vehicle that are still to be added
}

func (c *attackedCabinet) Sense() ([]traffic.Reading, error) {
	rs, err := c.Driver.Sense()
	if err != nil || c.now().Before(c.a.begins) {
		return rs, err
	}
	rs = slices.Clone(rs)
	c.n++
	for _, i := range c.a.targets {
		if i < len(rs) {
			c.falsify(&rs[i], c.j.Detectors[i])
		}
	}
	return rs, nil
}

func (c *attackedCabinet) falsify(r *traffic.Reading, d traffic.Detector) {
	lane, _ := c.j.Lane(d.Lane)
	fits := max(d.LengthCM/800, 1)
	if d.Kind == traffic.Area && lane.Capacity > 0 {
		fits = min(fits, int64(lane.Capacity))
	}
	switch c.a.name {
	case "late-arrival":
		if d.Kind == traffic.Area && int64(r.Vehicles) < fits {
			r.Vehicles++
			r.Halted++
			r.OccupancyPermille = max(r.OccupancyPermille, 1000)
		}
	case "ghosts":
		switch d.Kind {
		case traffic.Area:
			r.Vehicles, r.Halted, r.OccupancyPermille = uint32(max(fits, int64(r.Vehicles))), uint32(max(fits, int64(r.Vehicles))), 1000
			r.HeadWaitMS = max(r.HeadWaitMS, uint32(min(c.n, 300)*1000))
		case traffic.Advance:
			if c.n%7 == 0 && r.Count == 0 { // 500 an hour
				r.Count, r.OccupancyPermille, r.SpeedCMS = 1, max(r.OccupancyPermille, 300), uint32(max(lane.SpeedCMS/2, 1))
			}
		case traffic.StopLine:
			r.OccupancyPermille, r.Vehicles = 1000, max(r.Vehicles, 1)
		}
	case "stuck-on":
		r.Count, r.SpeedCMS, r.OccupancyPermille = 0, 0, 1000
		r.Vehicles = max(r.Vehicles, 1)
		if d.Kind == traffic.Area {
			r.Halted = r.Vehicles
			r.HeadWaitMS = uint32(min(c.n, 3600) * 1000)
		}
	case "stuck-off", "blind":
		*r = traffic.Reading{Detector: r.Detector}
	case "bias":
		c.part += 3 * r.Count
		for c.part >= 10 && r.Count > 0 {
			c.part -= 10
			r.Count++
		}
	}
}

// hits reports whether what a detector says is false.
func (a *attack) hits(d traffic.DetectorID) bool { return slices.Contains(a.ids, d) }

// flags watches whether the attacked detectors are found out.
type flags struct {
	a    *attack
	mu   sync.Mutex // guards what follows
	at   time.Time
	rule string
}

// see takes a word on a detector's health.
func (f *flags) see(h *traffic.Health) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.a == nil || !f.a.hits(h.Detector) || f.at != (time.Time{}) || h.Junction != f.a.junction || !h.Failed || h.Time.Before(f.a.begins) {
		return
	}
	f.at, f.rule = h.Time, h.Rule+" "+string(h.Detector)
}

// found returns the first word, and after how many seconds it was said; "" where
// none was.
func (f *flags) found() (rule string, afterS float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rule == "" {
		return "", 0
	}
	return f.rule, f.at.Sub(f.a.begins).Seconds()
}

// cycleOf is the length of the filed plan's cycle at the attacked junction.
func (a *attack) cycleOf(defs []*traffic.Junction) time.Duration {
	for _, j := range defs {
		if a != nil && j.ID == a.junction {
			return time.Duration(j.Plan.CycleMS()) * time.Millisecond
		}
	}
	return 0
}
