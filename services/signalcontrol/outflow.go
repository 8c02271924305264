package signalcontrol

import (
	"slices"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// keep stores a junction's newest outflow beside the one before it.
func (c *Core) keep(o timing.Outflow) {
	was := c.announced[o.From]
	switch {
	case o.AtMS > was[0].AtMS:
		c.announced[o.From] = [2]timing.Outflow{o, was[0]}
	case o.AtMS == was[0].AtMS:
		c.announced[o.From] = [2]timing.Outflow{o, was[1]}
	}
}

// heard returns what the junctions upstream of j have announced.
func (c *Core) heard(j *traffic.Junction) []timing.Outflow {
	var out []timing.Outflow
	var asked [16]traffic.JunctionID
	from := asked[:0]
	for i := range j.Lanes {
		id := j.Lanes[i].From
		if id == "" || id == j.ID || slices.Contains(from, id) {
			continue
		}
		from = append(from, id)
		for _, o := range c.announced[id] {
			if len(o.Lanes) > 0 {
				out = append(out, o)
			}
		}
	}
	return out
}

// Hear takes what a junction announces that another signal-control decides for.
// Of a junction that this Core decides for itself nothing is taken: what that
// announces follows from agreed frames, and from nothing that somebody sends.
func (c *Core) Hear(o timing.Outflow) {
	if _, own := c.memory[o.From]; !own {
		c.keep(o)
	}
}
