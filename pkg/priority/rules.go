package priority

import (
	"fmt"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// State of a request, with the numbers of the API's PriorityState.
type State uint8

// The states; see the package comment.
const (
	Received State = 1 + iota
	Queued
	Activated
	Completed
	Rejected
	Cooldown
	Timeout
	Stale
	Cancelled
)

var stateNames = [...]string{"", "received", "queued", "activated", "completed", "rejected", "cooldown", "timeout", "stale", "cancelled"}

func (s State) String() string {
	if int(s) >= len(stateNames) {
		return fmt.Sprintf("state %d", uint8(s))
	}
	return stateNames[s]
}

// Ended reports whether nothing more becomes of it.
func (s State) Ended() bool { return s > Activated }

// The rules by which requests are refused or ended, as they begin the text that a
// [Progress] has.
const (
	RuleDuty     = "on-duty"      // the vehicle is not in the agency's fleet, or not on duty
	RuleClass    = "class"        // it is, in another class
	RuleRoute    = "route"        // two stops are not next to each other
	RuleSpeed    = "speed"        // nobody drives so fast, or so slowly
	RuleStage    = "stage"        // no stage lets the group go
	RuleQuota    = "quota"        // the agency has used up its hour
	RuleVehicle  = "vehicle"      // it has another request
	RuleLateness = "lateness"     // transit that is not late enough
	RuleCooldown = "cooldown"     // the agency was served there just now
	RuleExpired  = "expired"      // the request's end
	RulePassed   = "passed"       // the vehicle was seen, or said, to be through
	RuleTime     = "arrival"      // its arrival is over
	RuleTurn     = "turn"         // somebody else was first
	RuleRevision = "revision"     // a change that the request does not allow
	RuleUnknown  = "not-in-force" // the junction or its group is no longer what it was
	RuleServe    = "serve"        // why a stage is asked for
	RuleCancel   = "cancelled"    // by whoever asked
	RuleShares   = "shares-stage" // green in the stage of somebody else's
	RuleOutranks = "outranked"    // somebody stronger, or earlier, has come
	RuleNever    = "never-green"  // the controller did not show its green
	RuleSilent   = "no-word"      // nobody heard of the vehicle any more
	RuleQueue    = "queue"        // waits
	RuleNoReport = "no-frames"    // the junction does not say what it does
	RuleIn       = "let-in"       // by the rules above
)

// byClass holds a value for each class, index [traffic.Priority].
type byClass[T any] [3]T

// Policy are the numbers of the rules. [Default] is in force; another one would be
// another version.
type Policy struct {
	// PerHour is how many requests an agency may have let in within an hour.
	PerHour byClass[int]
	// Cooldown is for how long after one of an agency's vehicles was served at a
	// junction the next one is not.
	Cooldown byClass[time.Duration]
	// MinLate is how late transit must be.
	MinLate time.Duration
	// Ahead is how long before its arrival the group should be green.
	Ahead byClass[time.Duration]
	// After is how long after its arrival the green is held where no detector has
	// seen the vehicle.
	After byClass[time.Duration]
	// Patience is how long after its arrival one that never had its green is given
	// up, and Hold how long one that had it is held at most.
	Patience, Hold time.Duration
	// MostLead bounds how long before its arrival anybody is activated.
	MostLead time.Duration
	// SpeedPermille is how fast a vehicle may drive, of the lanes' limit, and
	// SpeedCMS the most that anybody does.
	SpeedPermille byClass[int64]
	SpeedCMS      byClass[int64]
	// Slowest is the longest time between two stops that are next to each other.
	Slowest time.Duration
}

// Version of the rules and their numbers. It changes when any request would come
// out another way than before.
const Version = "1"

// Default are the numbers of [Version].
func Default() Policy {
	return Policy{
		PerHour:       byClass[int]{traffic.Bus: 240, traffic.Emergency: 60},
		Cooldown:      byClass[time.Duration]{traffic.Bus: 90 * time.Second},
		MinLate:       time.Minute,
		Ahead:         byClass[time.Duration]{traffic.Bus: time.Second, traffic.Emergency: 6 * time.Second},
		After:         byClass[time.Duration]{traffic.Bus: 6 * time.Second, traffic.Emergency: 10 * time.Second},
		Patience:      30 * time.Second,
		Hold:          time.Minute,
		MostLead:      90 * time.Second,
		SpeedPermille: byClass[int64]{traffic.Bus: 1200, traffic.Emergency: 2000},
		SpeedCMS:      byClass[int64]{traffic.Bus: 3000, traffic.Emergency: 4500},
		Slowest:       15 * time.Minute,
	}
}

// ClassName names a class as fleets do.
func ClassName(c traffic.Priority) string {
	switch c {
	case traffic.Bus:
		return identity.VehicleTransit
	case traffic.Emergency:
		return identity.VehicleEmergency
	}
	return "none"
}

// CommandRule is the text of a command that serves a request.
func CommandRule(id string, c traffic.Priority, why string) string {
	return "priority " + id + " " + ClassName(c) + ": " + why
}

// RequestOf returns the id of the request that a command serves, by its rule.
func RequestOf(rule string) (id string, ok bool) {
	rest, ok := strings.CutPrefix(rule, "priority ")
	if !ok {
		return "", false
	}
	id, _, ok = strings.Cut(rest, " ")
	return id, ok && id != ""
}

// refusal is a rule that is broken, with its reason.
type refusal struct{ text string }

func refuse(rule, format string, a ...any) *refusal {
	return &refusal{rule + ": " + fmt.Sprintf(format, a...)}
}

// Network is what of the registry the rules ask; [identity.Registry] is one.
type Network interface {
	Junction(traffic.JunctionID) (*traffic.Junction, bool)
	Vehicle(agency, id string) (identity.Vehicle, bool)
}

// onDuty checks the vehicle.
func (p *Policy) onDuty(n Network, at time.Time, r *traffic.Request) *refusal {
	v, ok := n.Vehicle(r.By.Agency, r.Vehicle)
	switch {
	case !ok:
		return refuse(RuleDuty, "vehicle %.40q is not in the fleet of %s", r.Vehicle, r.By.Agency)
	case v.Class != ClassName(r.Class):
		return refuse(RuleClass, "vehicle %s is filed as %s, this asks as %s", v.ID, v.Class, ClassName(r.Class))
	case !v.OnDuty(at):
		return refuse(RuleDuty, "vehicle %s is on duty from %s to %s UTC", v.ID, v.From, v.Until)
	}
	return nil
}

// route checks that the stops are a way that somebody could drive: from is when the
// request was made, for a vehicle that cannot be where it is not.
func (p *Policy) route(n Network, r *traffic.Request) *refusal {
	for i, s := range r.Stops {
		j, ok := n.Junction(s.Junction)
		if !ok {
			return refuse(RuleUnknown, "stops[%d]: junction %s is not in the registry", i, s.Junction)
		}
		g := group(j, s.Group)
		if g < 0 {
			return refuse(RuleUnknown, "stops[%d]: junction %s has no group %.40q", i, s.Junction, s.Group)
		}
		if len(stages(j, g)) == 0 {
			return refuse(RuleStage, "stops[%d]: no stage of junction %s lets group %s go", i, s.Junction, s.Group)
		}
		if i+1 == len(r.Stops) {
			break
		}
		next := r.Stops[i+1]
		to, ok := n.Junction(next.Junction)
		if !ok {
			return refuse(RuleUnknown, "stops[%d]: junction %s is not in the registry", i+1, next.Junction)
		}
		length, speed, ok := link(j, g, to, next.Group)
		if !ok {
			return refuse(RuleRoute, "stops[%d]: by group %s of junction %s nobody comes to group %.40q of junction %s", i+1, s.Group, s.Junction, next.Group, next.Junction)
		}
		took := next.Arrival.Sub(s.Arrival)
		fastest := min(speed*p.SpeedPermille[r.Class]/1000, p.SpeedCMS[r.Class])
		// In milliseconds; a lane without a length says nothing.
		if fastest > 0 && took.Milliseconds()*fastest < length*1000 {
			return refuse(RuleSpeed, "stops[%d]: %d m from junction %s in %s, at most %d km/h", i+1, length/100, s.Junction, took.Round(100*time.Millisecond), fastest*36/1000)
		}
		if took > p.Slowest {
			return refuse(RuleSpeed, "stops[%d]: %s from junction %s, at most %s", i+1, took.Round(time.Second), s.Junction, p.Slowest)
		}
	}
	return nil
}

// link returns the shortest way from a group of one junction to a group of the
// next: its length and the limit on it.
func link(from *traffic.Junction, g int, to *traffic.Junction, name string) (length, speed int64, ok bool) {
	comes := false
	h := group(to, name)
	for _, m := range to.Movements {
		if l, known := to.Lane(m.From); known && m.Group == h && (l.From == from.ID || l.From == "" && leads(from, g, m.From)) {
			comes = true
		}
	}
	if !comes {
		return 0, 0, false
	}
	for _, m := range from.Movements {
		l, known := from.Lane(m.To)
		if m.Group != g || !known || l.To != to.ID {
			continue
		}
		way := l.LengthCM
		if l.AheadCM > 0 {
			way = l.AheadCM
		}
		if !ok || way < length {
			length = way
		}
		speed, ok = max(speed, l.SpeedCMS), true
	}
	return length, speed, ok
}

// leads reports whether a group lets vehicles into a lane.
func leads(j *traffic.Junction, g int, lane traffic.LaneID) bool {
	for _, m := range j.Movements {
		if m.Group == g && m.To == lane {
			return true
		}
	}
	return false
}

// group finds a vehicles' group by its name, -1 where there is none.
func group(j *traffic.Junction, name string) int {
	for i, g := range j.Groups {
		if g.Name == name && g.Kind != traffic.Pedestrians {
			return i
		}
	}
	return -1
}

// stages lists those that let a group go: only those that protect it, where there
// are any.
func stages(j *traffic.Junction, g int) []int {
	var green, permissive []int
	for k, s := range j.Stages {
		switch s.State.At(g) {
		case traffic.Green:
			green = append(green, k)
		case traffic.Permissive:
			permissive = append(permissive, k)
		}
	}
	if len(green) > 0 {
		return green
	}
	return permissive
}
