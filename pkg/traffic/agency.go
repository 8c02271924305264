package traffic

import "time"

// Agent says who asked for something, as the gateway knows them.
type Agent struct {
	Agency string
	// Name is that of the client, for instance "fire-desk-1".
	Name string
}

// Turn numbers the records of one signer: Epoch rises with each start, Seq from 1
// within it, without gaps. One that is missing has been left out.
type Turn struct{ Epoch, Seq uint64 }

// Access says that somebody asked the gateway for something, and what it
// answered.
type Access struct {
	District DistrictID
	Turn     Turn
	Time     time.Time // UTC
	By       Agent
	// Method is the full name of the API's method, Objects what it was about, such
	// as junction:J3.
	Method  string
	Objects []string
	// Purpose, Case and LegalBasis as given; codes and a number, no free text.
	Purpose, Case, LegalBasis string
	Granted                   bool
	// Policies that decided, by their ids.
	Policies []string
	// Phase is unary, opened, minute, closed or counted.
	Phase string
	// Count is how many calls or messages the record stands for.
	Count uint64
	// Request is the SHA-256 of the request, serialised.
	Request [32]byte
	// CovertUntil is when it is listed first; zero is at once.
	CovertUntil time.Time
}

// The phases of an access record.
const (
	AccessUnary   = "unary"
	AccessOpened  = "opened"
	AccessMinute  = "minute"
	AccessClosed  = "closed"
	AccessCounted = "counted"
)

// Request is a priority request: what is asked, changed or cancelled.
type Request struct {
	District DistrictID
	Turn     Turn
	Time     time.Time // UTC
	ID       string
	// Revision rises with each record of one request, from 1.
	Revision uint64
	By       Agent
	// Class is Bus for transit, or Emergency, which outranks it.
	Class   Priority
	Vehicle string
	// Line and Lateness are of transit; positive is late.
	Line     string
	Lateness time.Duration
	// Stops of the route, in its order. Those passed are left out by a revision.
	Stops     []Stop
	Expires   time.Time
	Purpose   string
	Case      string
	Cancelled bool
	// Degraded says that signal-control served it alone while consensus stood
	// still, and had it sealed afterwards.
	Degraded bool
}

// Stop is one junction of a request's route.
type Stop struct {
	Junction JunctionID
	// Group is the name of the signal group by which the vehicle wants to cross.
	Group string
	// Arrival is when it will be at the stop line.
	Arrival time.Time
}

// MaxStops bounds the route of a request.
const MaxStops = 64

// OverrideAction is what an operator wants of a junction.
type OverrideAction string

// The actions of an override.
const (
	OverridePlan    OverrideAction = "plan"
	OverrideHold    OverrideAction = "hold"
	OverrideFlash   OverrideAction = "flash"
	OverrideRelease OverrideAction = "release"
)

// Override takes one junction in hand until it expires or is released.
type Override struct {
	District DistrictID
	Turn     Turn
	Time     time.Time // UTC
	ID       string
	Junction JunctionID
	Action   OverrideAction
	// Plan is the name of the plan to run; Stage the one to hold, -1 for the one
	// that is shown.
	Plan   string
	Stage  int
	Reason string
	By     Agent
	// Expires is when it ends by itself.
	Expires time.Time
	// Releases is the id of the override that a release ends.
	Releases string
}

// OverrideReasons lists why a junction may be taken in hand.
func OverrideReasons() []string {
	return []string{"incident", "works", "event", "fault", "test", "emergency"}
}

// MaxOverride is the longest time that an override may last.
const MaxOverride = 24 * time.Hour
