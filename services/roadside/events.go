package roadside

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Codes of Purdue's hi-res enumeration ("Indiana Traffic Signal Hi Resolution
// Data Logger Enumerations", 2012, and its 2020 edition, jtrpdata/4). The
// parameter of 1 to 23 is the phase, for us the number of the signal group from
// 1; that of 173 is NTCIP 1202's unitFlashStatus.
const (
	eventGreen        = 1
	eventGreenEnd     = 7
	eventYellow       = 8
	eventYellowEnd    = 9
	eventRedClearance = 10
	eventWalk         = 21
	eventWalkClear    = 22
	eventDontWalk     = 23
	eventFlash        = 173

	flashNot          = 2
	flashAutomatic    = 3
	flashFaultMonitor = 5
)

// maxOffsetMS is how far before its frame an event may lie: pkg/validate takes
// as much as the longest interval.
const maxOffsetMS = 15 * 60 * 1000

func (u *Unit) note(at time.Time, code, param uint16) {
	if len(u.events) >= maxEvents {
		u.counters.EventsDropped++
		return
	}
	u.events = append(u.events, stamped{at, traffic.Event{Code: code, Param: param}})
}

// changes notes what a change of the lamps means, group by group.
func (u *Unit) changes(at time.Time, was, is traffic.State) {
	for g, group := range u.cfg.Junction.Groups {
		a, b := was.At(g), is.At(g)
		phase := uint16(g + 1)
		if a == b || a.Go() && b.Go() {
			continue
		}
		if group.Kind == traffic.Pedestrians {
			switch {
			case b.Go():
				u.note(at, eventWalk, phase)
			case b == traffic.PedClear:
				u.note(at, eventWalkClear, phase)
			case a.Go() || a == traffic.PedClear:
				u.note(at, eventDontWalk, phase)
			}
			continue
		}
		if a.Go() {
			u.note(at, eventGreenEnd, phase)
		}
		switch {
		case b.Go():
			u.note(at, eventGreen, phase)
		case b == traffic.Yellow:
			u.note(at, eventYellow, phase)
		case a == traffic.Yellow:
			u.note(at, eventYellowEnd, phase)
			u.note(at, eventRedClearance, phase)
		}
	}
}
