package health

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Rule is a rule of detector health.
type Rule string

// The rules. A detector of which only Imbalance is said may be a good one.
const (
	Chatter     Rule = "chatter"
	LockedOn    Rule = "locked-on"
	NoHits      Rule = "no-hits"
	StuckOn     Rule = "stuck-on"
	StuckOff    Rule = "stuck-off"
	Implausible Rule = "implausible"
	Imbalance   Rule = "imbalance"
)

// rules in the order in which they are said.
var rules = [...]Rule{Chatter, LockedOn, NoHits, StuckOn, StuckOff, Implausible, Imbalance}

const (
	chatter = iota
	lockedOn
	noHits
	stuckOn
	stuckOff
	implausible
	imbalance
)

const (
	chatterMS    = 30_000
	chatterCount = 38 // one more than IRIS's MAX_VOLUME

	hour = int64(time.Hour / time.Millisecond)
	// clearMS is IRIS's CLEAR_THRESHOLD, hitClearMS its HIT_CLEAR_THRESHOLD.
	clearMS    = 24 * hour
	hitClearMS = 30_000

	// gapMS is how long nobody may have looked for an occupation to count as one.
	gapMS = 60_000
)

// LaneType is one of IRIS's lane types, or "" where there are no rules.
type LaneType string

// The lane types that detectors at signals resemble; [PushButton] is our own.
const (
	Mainline   LaneType = "mainline"
	Exit       LaneType = "exit"
	Merge      LaneType = "merge"
	Queue      LaneType = "queue"
	Omnibus    LaneType = "omnibus"
	PushButton LaneType = "push-button"
)

// LaneTypes lists them.
func LaneTypes() []LaneType {
	return []LaneType{Mainline, Exit, Merge, Queue, Omnibus, PushButton}
}

// Times returns how long a detector of a lane of type t must be occupied to be
// [LockedOn], and how long it must have no hit for [NoHits]. ok is false where
// there are no such rules.
func (t LaneType) Times() (lockedOn, noHits time.Duration, ok bool) {
	switch t {
	case Mainline:
		return 2 * time.Minute, 4 * time.Hour, true
	case Exit:
		return 30 * time.Minute, 8 * time.Hour, true
	case Merge, Queue:
		return 30 * time.Minute, 12 * time.Hour, true
	case Omnibus, PushButton:
		return 30 * time.Minute, 72 * time.Hour, true
	}
	return 0, 0, false
}

// LaneOf returns the lane type by which a detector of j is judged: queue where
// vehicles stand (stop line and area), exit where they may at times (an advance
// loop, as on a ramp that leads to a signal), merge where they leave the junction,
// mainline for a loop that no movement belongs to, omnibus where only buses go.
func LaneOf(j *traffic.Junction, d traffic.Detector) LaneType {
	switch d.Kind {
	case traffic.Button:
		return PushButton
	case traffic.StopLine, traffic.Area, traffic.Advance, traffic.ExitArea:
	default:
		return "" // an oracle
	}
	buses := len(d.Movements) > 0
	for _, m := range d.Movements {
		g := j.Movements[m].Group
		buses = buses && j.Groups[g].Kind == traffic.Buses
	}
	switch {
	case buses:
		return Omnibus
	case d.Kind == traffic.ExitArea:
		return Merge
	case d.Kind != traffic.Advance:
		return Queue
	case len(d.Movements) == 0:
		return Mainline
	}
	return Exit
}

// limits are the rules of one detector, in milliseconds.
type limits struct {
	chatters       bool
	locked, silent int64 // 0: no such rule
	// renews: a count begins an occupation anew.
	renews bool
}

func limitsOf(t LaneType, renews bool) limits {
	l, n, ok := t.Times()
	if !ok {
		return limits{}
	}
	return limits{chatters: t != PushButton, locked: l.Milliseconds(), silent: n.Milliseconds(), renews: renews}
}
