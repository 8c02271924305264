package hires

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Measure names one table of performance measures. Where each is defined:
//
//   - Day et al., "Performance Measures for Traffic Signal Systems" (Purdue, 2014,
//     doi 10.5703/1288284315333), and FHWA-HOP-20-002 (2020): terminations,
//     arrivals on green, the coordination diagram, volumes, pedestrian delay.
//   - Freije et al., "Graphical Performance Measures for Practitioners to Triage
//     Split Failure Trouble Calls" (TRR 2439, 2014): split failures.
//   - Utah's and Oregon's open programs, where the papers leave a choice.
//
// What the papers leave open, all measures settle in the same way:
//
//   - A phase is green from event 1 until 8, or 7 where 8 is missing; yellow until
//     9 or 10, whichever comes first; in red clearance until 11; then red until
//     the next 1. Intervals have their begin and not their end, so that an arrival
//     at the stamp of begin of green is on green, and at that of yellow is not.
//   - A cycle that lacks one of its changes is left out and, where a table has a
//     column for it, counted as incomplete.
//   - The same event twice with one stamp is one event. Stamps are tenths of a
//     second, so the order of events with one stamp is not that of the file: the
//     phases' come before the detectors', a pedestrian's call before the walk. A
//     detector that goes off and on within one stamp is as it was before.
//   - Bins begin at multiples of their length since 1970 UTC. A bin without
//     events has no row.
type Measure string

// The measures. Those with a function need a detector configuration.
const (
	// MeasureTerminations counts why greens ended: events 4, 5 and 6.
	MeasureTerminations Measure = "terminations"
	// MeasureAOG is the share of the arrivals at Advance detectors that come on
	// green. Arrivals before the first change of a phase count as not on green.
	MeasureAOG Measure = "aog"
	// MeasureSplitFailures counts the cycles in which Presence detectors at the
	// stop line were occupied, any of a phase's, for at least
	// [MeterOptions.GreenOccupancy] of the green and at least
	// [MeterOptions.RedOccupancy] of the first [MeterOptions.RedTime] of red. Red
	// begins with red clearance. A red shorter than RedTime counts as unoccupied
	// for the rest. A bin's cycles are those whose green begins in it.
	//
	// Where an off is missing, between two ons, the detector counts as occupied
	// throughout if they are up to [MeterOptions.LostOff] apart, and for half of
	// the time if they are further apart. A second off is passed over. Before its
	// first on a detector counts as not occupied.
	MeasureSplitFailures Measure = "split-failures"
	// MeasureSplitCycles has the occupancies of each cycle.
	MeasureSplitCycles Measure = "split-cycles"
	// MeasureYellowRed counts the actuations of Yellow_Red detectors, which stand
	// at the stop line, during yellow, red clearance and red: those who may have
	// run the red. Severe are those at least [MeterOptions.SevereRed] after the
	// begin of red clearance; all of them are also counted under their colour.
	// Turns on red are among them where the detector's lane has them.
	MeasureYellowRed Measure = "yellow-red"
	// MeasurePedDelay is the time from the first call (45) since the walk before
	// to the walk (21). Calls lie in the bin in which they come, everything else
	// in the bin of the walk. A walk that nobody called is no sample.
	MeasurePedDelay Measure = "ped-delay"
	// MeasurePreempts has one row a pre-emption, see [PreemptRow].
	MeasurePreempts Measure = "preempts"
	// MeasurePriority has one row a request for priority, see [PriorityRow].
	MeasurePriority Measure = "priority"
	// MeasurePCD has the cycles of Purdue's coordination diagram: each begins with
	// red. Arrivals are those at Advance detectors, if they are configured.
	MeasurePCD Measure = "pcd"
	// MeasurePCDArrivals has the diagram's dots: each arrival at an Advance
	// detector, by its time since the begin of red.
	MeasurePCDArrivals Measure = "pcd-arrivals"
	// MeasureVolumes counts the actuations (82) of every detector channel.
	MeasureVolumes Measure = "volumes"
	// MeasurePhaseVolumes sums them by phase and function.
	MeasurePhaseVolumes Measure = "phase-volumes"
	// MeasureTurns sums them by phase and movement, where the configuration names
	// one.
	MeasureTurns Measure = "turns"
)

// measureTexts is the list of all measures, in the order of output.
var measureTexts = []struct {
	name     Measure
	function string // that a detector must have, normal; "*" for any, "movement" for one with a movement
	needs    string
	text     string
}{
	{MeasureTerminations, "", "", "why greens ended: gap-out, max-out, force-off"},
	{MeasureAOG, fnAdvance, "a detector with function Advance", "share of the arrivals that come on green"},
	{MeasureSplitFailures, fnPresence, "a detector with function Presence", "cycles whose green did not clear the queue"},
	{MeasureSplitCycles, fnPresence, "a detector with function Presence", "the same, each cycle"},
	{MeasureYellowRed, fnYellowRed, "a detector with function Yellow_Red", "actuations on yellow and red"},
	{MeasurePedDelay, "", "", "pedestrians' time from call to walk"},
	{MeasurePreempts, "", "", "each pre-emption with its times"},
	{MeasurePriority, "", "", "each request for priority with its times"},
	{MeasurePCD, "", "", "cycles of the coordination diagram"},
	{MeasurePCDArrivals, fnAdvance, "a detector with function Advance", "dots of the coordination diagram"},
	{MeasureVolumes, "", "", "actuations by detector"},
	{MeasurePhaseVolumes, fnAny, "a detector", "actuations by phase and function"},
	{MeasureTurns, fnMovement, "a detector with a movement", "actuations by phase and movement"},
}

// Measures returns all measures, in the order in which tables come.
func Measures() []Measure {
	all := make([]Measure, len(measureTexts))
	for i, m := range measureTexts {
		all[i] = m.name
	}
	return all
}

func measureIndex(m Measure) int {
	for i := range measureTexts {
		if measureTexts[i].name == m {
			return i
		}
	}
	return -1
}

// Text says in a few words what the measure is, and "" for one that is not.
func (m Measure) Text() string {
	if i := measureIndex(m); i >= 0 {
		return measureTexts[i].text
	}
	return ""
}

// Needs says what the detector configuration must have for the measure, and "" if
// the measure needs none.
func (m Measure) Needs() string {
	if i := measureIndex(m); i >= 0 {
		return measureTexts[i].needs
	}
	return ""
}

// MeterOptions say what a [Meter] measures; the zero value measures everything
// that needs no detector configuration.
type MeterOptions struct {
	// Measures are wanted. Empty is all that the configuration allows.
	Measures []Measure
	// Bin is the length of a bin, 1 s to 24 h. Default 15 min.
	Bin time.Duration
	// From and To bound the times of what is counted, nanoseconds since 1970 UTC.
	// Events outside still tell how the lights stood. 0 is without bound.
	From, To int64
	// Detectors is needed by some measures. Optional.
	Detectors *DetectorConfig
	// GreenOccupancy and RedOccupancy are the bounds of a split failure, more than
	// 0 and at most 1. Default 0.80, both.
	GreenOccupancy, RedOccupancy float64
	// RedTime is how much of red counts for it, 100 ms to 60 s. Default 5 s.
	RedTime time.Duration
	// LostOff is how far two ons of a detector without an off between them may lie
	// apart to be one occupation, up to 60 s. Default 2 s.
	LostOff time.Duration
	// SevereRed is how far into red an actuation is severe, up to 60 s. Default 5 s.
	SevereRed time.Duration
}

func (o MeterOptions) withDefaults() MeterOptions {
	o.Bin = cmp.Or(o.Bin, 15*time.Minute)
	o.GreenOccupancy = cmp.Or(o.GreenOccupancy, 0.80)
	o.RedOccupancy = cmp.Or(o.RedOccupancy, 0.80)
	o.RedTime = cmp.Or(o.RedTime, 5*time.Second)
	o.LostOff = cmp.Or(o.LostOff, 2*time.Second)
	o.SevereRed = cmp.Or(o.SevereRed, 5*time.Second)
	return o
}

// Validate names everything that is wrong.
func (o MeterOptions) Validate() error {
	o = o.withDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, kind.Errorf(kind.Invalid, format, args...)) }
	if o.Bin < time.Second || o.Bin > 24*time.Hour || o.Bin%time.Second != 0 {
		bad("bin %v: must be whole seconds, 1s to 24h", o.Bin)
	}
	if o.From < 0 || o.To < 0 || o.To != 0 && o.From >= o.To {
		bad("from, to: from must be before to")
	}
	for _, s := range []struct {
		name  string
		share float64
	}{{"green occupancy", o.GreenOccupancy}, {"red occupancy", o.RedOccupancy}} {
		if !(s.share > 0 && s.share <= 1) {
			bad("%s %v: must be more than 0 and at most 1", s.name, s.share)
		}
	}
	for _, s := range []struct {
		name string
		d    time.Duration
		low  time.Duration
	}{{"red time", o.RedTime, 100 * time.Millisecond}, {"lost off", o.LostOff, 0}, {"severe red", o.SevereRed, 0}} {
		if s.d < s.low || s.d > time.Minute {
			bad("%s %v: must be %v to 1m", s.name, s.d, s.low)
		}
	}
	seen := map[Measure]bool{}
	for _, m := range o.Measures {
		i := measureIndex(m)
		switch {
		case i < 0:
			bad("no measure %q; there are %s", m, strings.Trim(fmt.Sprint(Measures()), "[]"))
		case seen[m]:
			bad("measure %s is named twice", m)
		case !o.Detectors.allows(measureTexts[i].function):
			bad("measure %s needs %s in the detector configuration", m, measureTexts[i].needs)
		}
		seen[m] = true
	}
	return errors.Join(errs...)
}

// Meter computes measures from the events of any number of devices. It remembers
// the cycle in hand, not the events; what grows is the tables.
//
// Call [Meter.Add] with each event, those of one device in order of time, then
// [Meter.Finish]. Not safe for concurrent use.
type Meter struct {
	o       MeterOptions
	want    map[Measure]bool
	devices map[traffic.DeviceID]*meterDevice
	last    *meterDevice // of the event before, which is often also that of the next
	out     Measured
}

// Measured is what a [Meter] found: rows in order of time, then device, then the
// other columns. Tables that were not wanted are nil.
type Measured struct {
	// Measures that were computed, in the order of [Measures].
	Measures []Measure
	// Skipped measures lack something in the configuration, and Notes say what is
	// missing for which device.
	Skipped []Measure
	Notes   []string
	// Events is how many were added. Late are those of them that were earlier than
	// one of the same device before them: they count nowhere, so that with any of
	// them the tables are wrong. FirstLate is the first of them.
	Events    int
	Late      int
	FirstLate Event

	Terminations  []TerminationRow
	AOG           []AOGRow
	SplitFailures []SplitRow
	SplitCycles   []SplitCycleRow
	YellowRed     []YellowRedRow
	PedDelay      []PedDelayRow
	Preempts      []PreemptRow
	Priority      []PriorityRow
	PCD           []PCDRow
	PCDArrivals   []PCDArrivalRow
	Volumes       []VolumeRow
	PhaseVolumes  []PhaseVolumeRow
	Turns         []TurnRow
}

// NewMeter returns a meter without events.
func NewMeter(o MeterOptions) (*Meter, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	m := &Meter{o: o.withDefaults(), want: map[Measure]bool{}, devices: map[traffic.DeviceID]*meterDevice{}}
	for _, t := range measureTexts {
		switch {
		case len(o.Measures) > 0 && !slices.Contains(o.Measures, t.name):
		case o.Detectors.allows(t.function):
			m.want[t.name] = true
			m.out.Measures = append(m.out.Measures, t.name)
		default:
			m.out.Skipped = append(m.out.Skipped, t.name)
			m.out.Notes = append(m.out.Notes, fmt.Sprintf("%s: needs %s in the detector configuration", t.name, t.needs))
		}
	}
	return m, nil
}

// Add takes one event. Codes that no measure uses are passed over.
func (m *Meter) Add(e Event) {
	m.out.Events++
	d := m.last
	if d == nil || d.id != e.Device {
		if d = m.devices[e.Device]; d == nil {
			d = m.newDevice(e.Device)
			d.newest = e.At
			m.devices[e.Device] = d
		}
		m.last = d
	}
	if e.At < d.newest {
		if m.out.Late == 0 {
			m.out.FirstLate = e
		}
		m.out.Late++
		return
	}
	if e.At > d.newest {
		d.newest = e.At
		d.release(e.At - d.behind)
	}
	d.take(e)
}

// Finish settles what is open and returns the tables. The meter is done then.
func (m *Meter) Finish() *Measured {
	ids := make([]traffic.DeviceID, 0, len(m.devices))
	for id := range m.devices {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		m.devices[id].finish()
	}
	for _, t := range measureTexts {
		if !m.want[t.name] || t.function == "" {
			continue
		}
		for _, id := range ids {
			if !m.o.Detectors.has(id, t.function) {
				m.out.Notes = append(m.out.Notes, fmt.Sprintf("%s: nothing for device %s, which lacks %s in the detector configuration", t.name, id, t.needs))
			}
		}
	}
	m.out.sort()
	return &m.out
}

// in says whether something at time t is asked for.
func (m *Meter) in(t int64) bool { return t >= m.o.From && (m.o.To == 0 || t < m.o.To) }

// bin returns when the bin of time t begins.
func (m *Meter) bin(t int64) int64 {
	n := int64(m.o.Bin)
	return t - ((t%n)+n)%n
}

// since returns the time from a to b, unknown if either is.
func since(a, b int64) Seconds {
	if a == 0 || b == 0 {
		return Unknown
	}
	return Seconds(b - a)
}
