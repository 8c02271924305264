package signalcontrol

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
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

// announce keeps what one of this Core's own junctions says, for Outflows too
// where it says anything.
func (c *Core) announce(o timing.Outflow) {
	c.keep(o)
	if len(o.Lanes) > 0 {
		c.unsaid = append(c.unsaid, o)
	}
}

// Outflows returns what this Core's junctions have announced since the last call.
func (c *Core) Outflows() []timing.Outflow {
	out := c.unsaid
	c.unsaid = nil
	return out
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

// parseOutflow decodes what came on a subject.
func parseOutflow(data []byte) (timing.Outflow, error) {
	var o timing.Outflow
	if len(data) > maxOutflow {
		return o, kind.Errorf(kind.Invalid, "outflow: %d bytes, at most %d", len(data), maxOutflow)
	}
	if err := json.Unmarshal(data, &o); err != nil {
		return o, kind.Errorf(kind.Invalid, "outflow: %w", err)
	}
	if o.From == "" || len(o.Lanes) > maxOutflowLanes {
		return o, kind.Errorf(kind.Invalid, "outflow: from %q with %d lanes: must name its junction, and at most %d lanes", o.From, len(o.Lanes), maxOutflowLanes)
	}
	return o, nil
}

const (
	maxOutflow      = 256 << 10
	maxOutflowLanes = 64
	maxUnheard      = 1024 // outflows that wait for the next block
)

// announce publishes what junctions say to those downstream. It is worth three
// seconds: what does not get out is not sent again.
func (s *Service) announce() {
	for _, o := range s.core.Outflows() {
		b, err := json.Marshal(o)
		if err == nil {
			err = s.cfg.Bus.Send(topic.Outflow(s.cfg.District, o.From), b)
		}
		if err != nil {
			s.log.Warn("outflow not announced", "intersection", o.From, "err", err)
		}
	}
}

// listen takes what junctions announce that another signal-control decides for.
func (s *Service) listen(ctx context.Context) error {
	return s.cfg.Bus.Subscribe(ctx, topic.OutflowAll(s.cfg.District), func(subject string, data []byte) {
		o, err := parseOutflow(data)
		// One from the future would stand in the way of those that follow.
		if err != nil || topic.Outflow(s.cfg.District, o.From) != subject || o.AtMS > s.cfg.Now().Add(MaxDecisionAge).UnixMilli() {
			s.Counters.BadOutflows.Add(1)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.unheard) < maxUnheard {
			s.unheard = append(s.unheard, o)
		}
	})
}

// hear hands over to the core what was listened to.
func (s *Service) hear() {
	s.mu.Lock()
	heard := s.unheard
	s.unheard = nil
	s.mu.Unlock()
	for _, o := range heard {
		s.core.Hear(o)
	}
}
