// Package traffic holds the nouns of the street: junctions, lanes, movements,
// signal groups, stages, detectors, frames, commands and plans.
//
// Everything is plain data. Quantities are integers in the unit that the field
// name ends with, so that two machines never disagree about a rounding: lengths
// in centimetres (CM), speeds in centimetres a second (CMS), occupancy in
// thousandths (Permille), positions in microdegrees (E6), durations in
// milliseconds (MS).
package traffic

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

type (
	// DistrictID names a district, for instance "harbour".
	DistrictID string
	// JunctionID names a junction within its district.
	JunctionID string
	// DeviceID names a roadside unit within its district.
	DeviceID string
	// DetectorID names a detector within its junction.
	DetectorID string
	// LaneID names a lane within the network.
	LaneID string
)

// Aspect is what the lamps of one signal group show.
type Aspect byte

// The aspects, written as SUMO writes them where it has a letter for one.
const (
	Red        Aspect = 'r'
	Yellow     Aspect = 'y'
	Green      Aspect = 'G' // protected: nothing that conflicts is green
	Permissive Aspect = 'g' // green that yields to the movements it conflicts with
	PedClear   Aspect = 'c' // pedestrians finish, nobody starts
	RedYellow  Aspect = 'u'
	FlashRed   Aspect = 'x' // all-way stop, what a tripped monitor shows
	Dark       Aspect = 'O' // unlit: the group is out of control
)

// Go reports whether the aspect lets traffic of its group enter.
func (a Aspect) Go() bool { return a == Green || a == Permissive }

// Valid reports whether a is one of the aspects above.
func (a Aspect) Valid() bool { return strings.IndexByte("ryGgcuxO", byte(a)) >= 0 }

func (a Aspect) String() string { return string(rune(a)) }

// State is what all signal groups of a junction show, one [Aspect] a group.
type State string

// At returns what group i shows; beyond the end it is Dark.
func (s State) At(i int) Aspect {
	if i < 0 || i >= len(s) {
		return Dark
	}
	return Aspect(s[i])
}

// AllOf returns a state in which n groups show a.
func AllOf(a Aspect, n int) State { return State(strings.Repeat(string(rune(a)), n)) }

// Lane is one lane towards the stop line, or one that leads away from it.
type Lane struct {
	ID       LaneID `json:"id"`
	LengthCM int64  `json:"length_cm"`
	SpeedCMS int64  `json:"speed_cms"` // limit
	// Capacity is how many vehicles fit, standing.
	Capacity int `json:"capacity"`
	// From is the junction that feeds the lane, To the one that it leads to;
	// empty at the edge of the network.
	From JunctionID `json:"from,omitempty"`
	To   JunctionID `json:"to,omitempty"`
	// AheadCM is how far it is from the lane's start to To's stop line, also
	// where lanes lie in between. 0: not known.
	AheadCM int64 `json:"ahead_cm,omitempty"`
}

// GroupKind says whom a signal group is for.
type GroupKind string

// The kinds of signal group.
const (
	Vehicles    GroupKind = "vehicles"
	Pedestrians GroupKind = "pedestrians"
	Buses       GroupKind = "buses"
)

// Group is one signal group: lamps that always show the same.
type Group struct {
	Name string    `json:"name"`
	Kind GroupKind `json:"kind"`
	// MinGreenMS, YellowMS and AllRedMS override [Timing] where not zero.
	MinGreenMS int64 `json:"min_green_ms,omitempty"`
	YellowMS   int64 `json:"yellow_ms,omitempty"`
	AllRedMS   int64 `json:"all_red_ms,omitempty"`
	// PedClearMS is how long pedestrians need to finish crossing; pedestrian
	// groups only.
	PedClearMS int64 `json:"ped_clear_ms,omitempty"`
}

// Movement leads from one lane to another, held by one signal group.
type Movement struct {
	From  LaneID `json:"from"`
	To    LaneID `json:"to"`
	Group int    `json:"group"`
	// SaturationPerHour is the most vehicles an hour that can pass at green.
	SaturationPerHour int `json:"saturation_per_hour"`
}

// DetectorKind says what a detector measures.
type DetectorKind string

// The kinds of detector.
const (
	// StopLine is a loop at the stop line: count, occupancy, presence.
	StopLine DetectorKind = "stop-line"
	// Advance is a loop upstream of the stop line: count, occupancy, speed.
	Advance DetectorKind = "advance"
	// Area covers a stretch before the stop line: vehicles present and halted.
	Area DetectorKind = "area"
	// ExitArea covers the first stretch of a lane that leads away.
	ExitArea DetectorKind = "exit-area"
	// Box covers the paths of its movements within the junction: vehicles that
	// have passed the stop line and are not out yet.
	Box DetectorKind = "box"
	// Button is a pedestrian push button; its count is calls waiting.
	Button DetectorKind = "button"
	// Oracle is a simulator's exact knowledge of a movement, kept apart so that
	// nobody mistakes it for something that a city could install.
	Oracle DetectorKind = "oracle"
)

// Detector is one sensor of a junction.
type Detector struct {
	ID   DetectorID   `json:"id"`
	Kind DetectorKind `json:"kind"`
	Lane LaneID       `json:"lane,omitempty"`
	// FromStopLineCM is where the detector begins, seen from the stop line (or
	// from the start of an exit lane); LengthCM how far it reaches upstream.
	FromStopLineCM int64 `json:"from_stop_line_cm"`
	LengthCM       int64 `json:"length_cm"`
	// Movements are indices into [Junction.Movements] that the detector tells
	// something about. A detector on a shared lane names several.
	Movements []int `json:"movements,omitempty"`
	// Group is the pedestrian group of a Button, and -1 elsewhere.
	Group int `json:"group"`
}

// Stage is a set of groups that may be green together: one [Aspect] a group,
// of which only Red, Green and Permissive are allowed.
type Stage struct {
	Name  string `json:"name"`
	State State  `json:"state"`
}

// PlanStep shows a stage for a time. The intergreen that follows (yellow,
// all-red, pedestrian clearance) is part of DurationMS of the step it ends:
// the next step's green begins DurationMS after this one's.
type PlanStep struct {
	Stage      int   `json:"stage"`
	DurationMS int64 `json:"duration_ms"`
	// IntergreenMS is how much of DurationMS, at its end, is intergreen.
	IntergreenMS int64 `json:"intergreen_ms"`
}

// Plan is a fixed-time plan. A cycle begins whenever
// (Unix time − OffsetMS) is a multiple of the cycle's length.
type Plan struct {
	Name     string     `json:"name"`
	OffsetMS int64      `json:"offset_ms"`
	Steps    []PlanStep `json:"steps"`
}

// CycleMS returns the length of one cycle.
func (p Plan) CycleMS() int64 {
	var c int64
	for _, s := range p.Steps {
		c += s.DurationMS
	}
	return c
}

// Timing holds the limits that the interlock enforces, for groups that do not
// override them.
type Timing struct {
	MinGreenMS int64 `json:"min_green_ms"`
	YellowMS   int64 `json:"yellow_ms"`
	AllRedMS   int64 `json:"all_red_ms"`
	// MaxRedMS is the longest that a group with demand may stay red. 0: no limit.
	MaxRedMS int64 `json:"max_red_ms"`
}

// Junction is the definition of one signalised junction as it is filed in the
// registry.
type Junction struct {
	ID    JunctionID `json:"id"`
	Name  string     `json:"name"`
	LatE6 int64      `json:"lat_e6"` // microdegrees, WGS 84
	LonE6 int64      `json:"lon_e6"`

	Lanes     []Lane     `json:"lanes"` // approach and exit lanes
	Groups    []Group    `json:"groups"`
	Movements []Movement `json:"movements"`
	Detectors []Detector `json:"detectors"`
	Stages    []Stage    `json:"stages"`
	// Conflicts[i] lists groups that may never be let in together with group i.
	// Symmetric. Pairs that only meet under Permissive are in Yields instead.
	Conflicts [][]int `json:"conflicts"`
	// Yields[i] lists groups that group i gives way to while Permissive.
	Yields [][]int `json:"yields,omitempty"`
	Timing Timing  `json:"timing"`
	Plan   Plan    `json:"plan"`
}

// Lane returns the lane with the given id.
func (j *Junction) Lane(id LaneID) (Lane, bool) {
	for _, l := range j.Lanes {
		if l.ID == id {
			return l, true
		}
	}
	return Lane{}, false
}

// Detector returns the detector with the given id.
func (j *Junction) Detector(id DetectorID) (Detector, bool) {
	for _, d := range j.Detectors {
		if d.ID == id {
			return d, true
		}
	}
	return Detector{}, false
}

// Reading is what one detector says of one interval.
type Reading struct {
	Detector DetectorID `json:"detector"`
	// Count is how many vehicles passed in the interval; a Button's waiting calls.
	Count uint32 `json:"count"`
	// OccupancyPermille is the share of the interval in which something stood
	// over the detector, 0 to 1000.
	OccupancyPermille uint32 `json:"occupancy_permille"`
	// SpeedCMS is the mean speed of the counted vehicles, 0 where none was.
	SpeedCMS uint32 `json:"speed_cms"`
	// Vehicles are present at the end of the interval, of which Halted stand.
	Vehicles uint32 `json:"vehicles"`
	Halted   uint32 `json:"halted"`
	// HeadWaitMS is how long the first vehicle has been standing.
	HeadWaitMS uint32 `json:"head_wait_ms"`
	// Priority is set where a vehicle with right to priority is present.
	Priority Priority `json:"priority,omitempty"`
	// Ahead lists the vehicles that an Oracle sees, the nearest first. No other
	// detector has it.
	Ahead []Approach `json:"ahead,omitempty"`
}

// Approach is one vehicle on its way to a stop line.
type Approach struct {
	DistanceCM uint32 `json:"distance_cm"` // of its front, to the stop line
	SpeedCMS   uint32 `json:"speed_cms"`
}

// Priority classes a vehicle may ask for.
type Priority uint8

// The priority classes, the higher the stronger.
const (
	NoPriority Priority = iota
	Bus
	Emergency
)

// Event is a controller event in Purdue's hi-res enumeration (jtrpdata/4).
type Event struct {
	Code  uint16 `json:"code"`
	Param uint16 `json:"param"`
	// OffsetMS places the event before the frame's time.
	OffsetMS uint32 `json:"offset_ms"`
}

// Mode says who decides at a junction.
type Mode string

// The modes of a roadside unit.
const (
	Coordinated Mode = "coordinated" // obeys signal-control
	Local       Mode = "local"       // runs its own plan, commands are missing or stale
	Tripped     Mode = "tripped"     // the interlock has latched
	Overridden  Mode = "override"    // in an operator's hand
)

// CommandResult is what a roadside unit did with one command.
type CommandResult struct {
	Seq     uint64 `json:"seq"`
	Applied bool   `json:"applied"`
	Reason  string `json:"reason,omitempty"` // why not, naming the rule
}

// Signal is what the controller was seen to do at the time of a frame.
type Signal struct {
	State   State `json:"state"`
	Stage   int   `json:"stage"` // -1 between stages
	SinceMS int64 `json:"since_ms"`
	Mode    Mode  `json:"mode"`
	// Trip is the interlock's reason while Mode is Tripped.
	Trip string `json:"trip,omitempty"`
	// Override is the id of the override in force; empty for none.
	Override string `json:"override,omitempty"`
}

// FrameKey identifies a frame: (device, boot epoch, sequence).
type FrameKey struct {
	Device    DeviceID `json:"device"`
	BootEpoch uint64   `json:"boot_epoch"`
	Seq       uint64   `json:"seq"` // from 1, without gaps within a boot epoch
}

func (k FrameKey) String() string { return fmt.Sprintf("%s/%d/%d", k.Device, k.BootEpoch, k.Seq) }

// Frame is what a roadside unit publishes each interval and at each event.
type Frame struct {
	District DistrictID
	Junction JunctionID
	FrameKey
	// Prev is the SHA-256 of the payload of the device's previous frame, and
	// zero in the first one after a boot.
	Prev [32]byte
	// Time is the end of the interval, in UTC.
	Time     time.Time
	Interval time.Duration
	Readings []Reading
	Events   []Event
	Signal   Signal
	Results  []CommandResult
}

// Command tells a roadside unit which stage to show. It is an order of a
// purpose, not of lamp states: intergreens are made, and refused, at the
// junction.
type Command struct {
	District DistrictID
	Junction JunctionID
	// Seq rises with each command to a junction; a unit refuses one that does not.
	Seq uint64
	// Height is the block that the decision rests on, RestsOn the newest frame
	// of the junction in it.
	Height  uint64
	RestsOn FrameKey
	// Policy and Controller name what decided, with their filed versions.
	Policy            string
	PolicyVersion     string
	Controller        string
	ControllerVersion string
	Issued, Expires   time.Time
	Stage             int
	// Rule says in a few words why, for people.
	Rule string
}

// Problem is one thing wrong with a definition: the field, and the rule.
type Problem struct {
	Field string `json:"field"`
	Rule  string `json:"rule"`
}

func (p Problem) Error() string { return p.Field + ": " + p.Rule }

// ParseJunction decodes a filed definition and refuses unknown fields.
func ParseJunction(b []byte) (*Junction, error) {
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	var j Junction
	if err := d.Decode(&j); err != nil {
		return nil, fmt.Errorf("junction definition: %w", err)
	}
	// Not More: that takes a stray bracket for the end.
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("junction definition: data after the end of the document")
	}
	if err := j.Check(); err != nil {
		return nil, err
	}
	return &j, nil
}
