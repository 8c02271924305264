package timing

import (
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Outflow is what one junction announces to those downstream: the vehicles that
// it has let go, and those that it is about to let go. It rests on one frame, as
// the decision of that second does.
//
// An outflow is a forecast and nobody's order. Whoever hears none, or only old
// ones, plans by its own detectors; see [Outflow.Fresh].
type Outflow struct {
	From  traffic.JunctionID `json:"from"`
	AtMS  int64              `json:"at_ms"` // Unix time of the frame
	Lanes []LaneOutflow      `json:"lanes,omitempty"`
}

// LaneOutflow are the vehicles onto one exit lane.
type LaneOutflow struct {
	Lane     traffic.LaneID     `json:"lane"`
	To       traffic.JunctionID `json:"to"`        // the next signal on its way
	TravelMS int64              `json:"travel_ms"` // from there to To's stop line, undisturbed
	// Past are those that were seen to enter the lane, Planned those that are
	// expected to: Unix times in ms, rising.
	Past    []int64 `json:"past,omitempty"`
	Planned []int64 `json:"planned,omitempty"`
}

// OutflowValidity is how old an outflow may be to be planned with.
const OutflowValidity = 3 * time.Second

// Fresh reports whether the outflow may be planned with at now: it is from before
// now, and not older than [OutflowValidity].
func (o Outflow) Fresh(now time.Time) bool {
	age := now.UnixMilli() - o.AtMS
	return age > 0 && age <= OutflowValidity.Milliseconds()
}

// Inflow is a vehicle that a neighbour has announced.
type Inflow struct {
	From traffic.JunctionID `json:"from"`
	// Lane is the approach lane that it will come by, empty where only the
	// neighbour is known.
	Lane traffic.LaneID `json:"lane,omitempty"`
	AtMS int64          `json:"at_ms"` // Unix time at the stop line, were there no signal and no queue
	// Sent: it is on its way. Otherwise it is expected to be let go.
	Sent bool `json:"sent,omitempty"`
}

// SentMemory are the vehicles that entered an exit, or are about to, by Unix time
// in ms.
type SentMemory struct {
	Past    []int64 `json:"past,omitempty"`
	Planned []int64 `json:"planned,omitempty"`
}

const (
	outflowMS   = 25_000 // how far ahead departures are announced
	passedMS    = 90_000 // for how long those that have left are
	outflowMost = 120    // vehicles on one lane
)

// Announce returns what the adaptive controller's memory, as of its last view,
// has to say to junctions downstream. Other controllers' memories say nothing.
func Announce(j *traffic.Junction, m Memory) Outflow {
	o := Outflow{From: j.ID, AtMS: m.AtMS}
	if m.model == nil || m.model.junction != j || len(m.Sent) != m.model.exits {
		return o
	}
	for e, id := range m.model.exitIDs {
		lane, _ := j.Lane(id)
		s := &m.Sent[e]
		if lane.To == "" || lane.To == j.ID || lane.AheadCM <= 0 || len(s.Past)+len(s.Planned) == 0 {
			continue
		}
		o.Lanes = append(o.Lanes, LaneOutflow{Lane: id, To: lane.To, TravelMS: lane.AheadCM * 1000 / min(max(lane.SpeedCMS, 300), 4000), Past: slices.Clone(s.Past), Planned: slices.Clone(s.Planned)})
	}
	return o
}

// Inflows returns what outflows say of vehicles on their way to j, in the order
// of their arrival, for [View.Inflow]. Those that are not fresh are left out, and
// so is what leads elsewhere. Of two outflows of one junction the newer counts.
func Inflows(j *traffic.Junction, now time.Time, heard []Outflow) []Inflow {
	var out []Inflow
	for x, o := range heard {
		if !o.Fresh(now) || slices.ContainsFunc(heard, func(p Outflow) bool { return p.From == o.From && p.AtMS > o.AtMS && p.Fresh(now) }) ||
			slices.ContainsFunc(heard[:x], func(p Outflow) bool { return p.From == o.From && p.AtMS == o.AtMS }) {
			continue
		}
		for _, l := range o.Lanes {
			if l.To != j.ID {
				continue
			}
			in := Inflow{From: o.From}
			if lane, ok := j.Lane(l.Lane); ok && lane.To == j.ID {
				in.Lane = l.Lane
			}
			travel := min(max(l.TravelMS, 0), 300_000)
			for x, times := range [][]int64{l.Past, l.Planned} {
				in.Sent = x == 0
				for _, t := range times[:min(len(times), outflowMost)] {
					in.AtMS = t + travel
					out = append(out, in)
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Inflow) int {
		switch {
		case a.AtMS < b.AtMS:
			return -1
		case a.AtMS > b.AtMS:
			return 1
		}
		return 0
	})
	return out
}
