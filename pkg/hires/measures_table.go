package hires

import (
	"bufio"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Stamp is a time, nanoseconds since 1970 UTC.
type Stamp int64

// Seconds is a length of time in nanoseconds. Tables print it in seconds.
type Seconds int64

// Unknown is a length of time that the log does not tell; tables leave it out.
const Unknown Seconds = -1 << 63

// Share is a part of one. It has the precision of a float32, and prints as the
// shortest decimal that reads back as the same. NaN is not known; tables leave it
// out.
type Share float32

// The kinds of termination, as in the published tables of Oregon.
const (
	GapOut   = "GapOut"
	MaxOut   = "MaxOut"
	ForceOff = "ForceOff"
)

// Rows of tables. The tag is the name of the column. Time is the begin of the
// bin unless it says otherwise.
type (
	// TerminationRow is one of [MeasureTerminations].
	TerminationRow struct {
		Time        Stamp            `col:"time"`
		Device      traffic.DeviceID `col:"device"`
		Phase       uint16           `col:"phase"`
		Termination string           `col:"termination"` // [GapOut], [MaxOut] or [ForceOff]
		Total       int              `col:"total"`
	}
	// AOGRow is one of [MeasureAOG].
	AOGRow struct {
		Time       Stamp            `col:"time"`
		Device     traffic.DeviceID `col:"device"`
		Phase      uint16           `col:"phase"`
		Actuations int              `col:"actuations"`
		GreenShare Share            `col:"green_share"` // OnGreen / Actuations
		OnGreen    int              `col:"on_green"`
	}
	// SplitRow is one of [MeasureSplitFailures]. Green and the occupancies are
	// means over Cycles.
	SplitRow struct {
		Time           Stamp            `col:"time"`
		Device         traffic.DeviceID `col:"device"`
		Phase          uint16           `col:"phase"`
		Cycles         int              `col:"cycles"`
		Incomplete     int              `col:"incomplete"` // cycles left out
		Failures       int              `col:"failures"`
		Green          Seconds          `col:"green_s"`
		GreenOccupancy Share            `col:"green_occupancy"`
		RedOccupancy   Share            `col:"red_occupancy"`
	}
	// SplitCycleRow is one of [MeasureSplitCycles].
	SplitCycleRow struct {
		Time           Stamp            `col:"green_start"`
		Device         traffic.DeviceID `col:"device"`
		Phase          uint16           `col:"phase"`
		Green          Seconds          `col:"green_s"`
		GreenOccupancy Share            `col:"green_occupancy"`
		RedOccupancy   Share            `col:"red_occupancy"`
		Termination    string           `col:"termination"` // the last of the green, or empty
		Failure        bool             `col:"failure"`
	}
	// YellowRedRow is one of [MeasureYellowRed].
	YellowRedRow struct {
		Time         Stamp            `col:"time"`
		Device       traffic.DeviceID `col:"device"`
		Phase        uint16           `col:"phase"`
		Cycles       int              `col:"cycles"` // begins of yellow
		Yellow       int              `col:"yellow"`
		RedClearance int              `col:"red_clearance"`
		Red          int              `col:"red"`
		Severe       int              `col:"severe"`
	}
	// PedDelayRow is one of [MeasurePedDelay].
	PedDelayRow struct {
		Time    Stamp            `col:"time"`
		Device  traffic.DeviceID `col:"device"`
		Phase   uint16           `col:"phase"`
		Calls   int              `col:"calls"`
		Walks   int              `col:"walks"`
		Samples int              `col:"samples"` // walks that were called
		Mean    Seconds          `col:"mean_delay_s"`
		Max     Seconds          `col:"max_delay_s"`
	}
	// PreemptRow is one pre-emption. Times that are not in the log are [Unknown].
	//
	// It begins with the call (102), or the entry (105) where the call is missing,
	// and is over at the exit (111). Many controllers log no exit: then it is over
	// when the next entry begins, or the next call 20 minutes or more after its
	// last event. A call before that is the same pre-emption's. A pre-emption
	// whose input goes off (104) before any entry, and that no entry follows, was
	// not served.
	PreemptRow struct {
		Time          Stamp            `col:"call_on"`
		Device        traffic.DeviceID `col:"device"`
		Preempt       uint16           `col:"preempt"`
		Calls         int              `col:"calls"`
		Served        bool             `col:"served"`
		Delay         Seconds          `col:"delay_s"`           // 102 to 105
		GateDown      Seconds          `col:"gate_down_s"`       // 102 to 103
		TimeToService Seconds          `col:"time_to_service_s"` // 105 to 106, or 107 without track clearance
		TrackClear    Seconds          `col:"track_clear_s"`     // 106 to 107
		Dwell         Seconds          `col:"dwell_s"`           // 107 to 111
		Input         Seconds          `col:"input_s"`           // first 102 to last 104
		MaxPresence   Seconds          `col:"max_presence_s"`    // 102 to 110
		Total         Seconds          `col:"total_s"`           // 102 to 111
	}
	// PriorityRow is one request for priority, from its check-in (112). A second
	// check-in before the check-out begins another.
	PriorityRow struct {
		Time        Stamp            `col:"check_in"`
		Device      traffic.DeviceID `col:"device"`
		Priority    uint16           `col:"priority"`
		EarlyGreen  Seconds          `col:"early_green_s"`  // 112 to the first 113
		ExtendGreen Seconds          `col:"extend_green_s"` // 112 to the first 114
		Adjustments int              `col:"adjustments"`    // 113 and 114
		CheckOut    Seconds          `col:"check_out_s"`    // 112 to 115
	}
	// PCDRow is one cycle of [MeasurePCD]. Times in the cycle are since the begin of
	// its red.
	PCDRow struct {
		Time     Stamp            `col:"red_start"`
		Device   traffic.DeviceID `col:"device"`
		Phase    uint16           `col:"phase"`
		Green    Seconds          `col:"green_start_s"`
		Yellow   Seconds          `col:"yellow_start_s"`
		Cycle    Seconds          `col:"cycle_s"`
		Arrivals int              `col:"arrivals"`
		OnGreen  int              `col:"on_green"`
	}
	// PCDArrivalRow is one of [MeasurePCDArrivals]. Time has the detector's offset.
	PCDArrivalRow struct {
		Time     Stamp            `col:"time"`
		Device   traffic.DeviceID `col:"device"`
		Phase    uint16           `col:"phase"`
		Detector uint16           `col:"detector"`
		InCycle  Seconds          `col:"in_cycle_s"`
		State    string           `col:"state"` // red, green or yellow
	}
	// VolumeRow is one of [MeasureVolumes].
	VolumeRow struct {
		Time       Stamp            `col:"time"`
		Device     traffic.DeviceID `col:"device"`
		Detector   uint16           `col:"detector"`
		Actuations int              `col:"actuations"`
	}
	// PhaseVolumeRow is one of [MeasurePhaseVolumes].
	PhaseVolumeRow struct {
		Time       Stamp            `col:"time"`
		Device     traffic.DeviceID `col:"device"`
		Phase      uint16           `col:"phase"`
		Function   string           `col:"function"`
		Detectors  int              `col:"detectors"` // in the configuration
		Actuations int              `col:"actuations"`
	}
	// TurnRow is one of [MeasureTurns].
	TurnRow struct {
		Time       Stamp            `col:"time"`
		Device     traffic.DeviceID `col:"device"`
		Phase      uint16           `col:"phase"`
		Movement   string           `col:"movement"`
		Detectors  int              `col:"detectors"` // in the configuration
		Actuations int              `col:"actuations"`
	}
)

// inOrder sorts rows by time, device, the number after it, and rest.
func inOrder[R any](rows []R, key func(*R) (Stamp, traffic.DeviceID, uint16), rest func(a, b *R) int) {
	slices.SortStableFunc(rows, func(a, b R) int {
		at, ad, an := key(&a)
		bt, bd, bn := key(&b)
		if c := cmp.Or(cmp.Compare(at, bt), cmp.Compare(ad, bd), cmp.Compare(an, bn)); c != 0 || rest == nil {
			return c
		}
		return rest(&a, &b)
	})
}

func (r *Measured) sort() {
	kinds := []string{GapOut, MaxOut, ForceOff}
	inOrder(r.Terminations, func(r *TerminationRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase },
		func(a, b *TerminationRow) int {
			return slices.Index(kinds, a.Termination) - slices.Index(kinds, b.Termination)
		})
	inOrder(r.AOG, func(r *AOGRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.SplitFailures, func(r *SplitRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.SplitCycles, func(r *SplitCycleRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.YellowRed, func(r *YellowRedRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.PedDelay, func(r *PedDelayRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.Preempts, func(r *PreemptRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Preempt }, nil)
	inOrder(r.Priority, func(r *PriorityRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Priority }, nil)
	inOrder(r.PCD, func(r *PCDRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase }, nil)
	inOrder(r.PCDArrivals, func(r *PCDArrivalRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase },
		func(a, b *PCDArrivalRow) int { return cmp.Compare(a.Detector, b.Detector) })
	inOrder(r.Volumes, func(r *VolumeRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Detector }, nil)
	inOrder(r.PhaseVolumes, func(r *PhaseVolumeRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase },
		func(a, b *PhaseVolumeRow) int { return cmp.Compare(a.Function, b.Function) })
	inOrder(r.Turns, func(r *TurnRow) (Stamp, traffic.DeviceID, uint16) { return r.Time, r.Device, r.Phase },
		func(a, b *TurnRow) int { return cmp.Compare(a.Movement, b.Movement) })
}

// Table is one measure's rows, for printing.
type Table struct {
	Measure Measure
	Columns []string
	Rows    int
	rows    reflect.Value // a slice of one of the row types
}

// Tables returns the tables of the measures that were computed, in their order.
func (r *Measured) Tables() []Table {
	all := map[Measure]any{
		MeasureTerminations: r.Terminations, MeasureAOG: r.AOG, MeasureSplitFailures: r.SplitFailures, MeasureSplitCycles: r.SplitCycles,
		MeasureYellowRed: r.YellowRed, MeasurePedDelay: r.PedDelay, MeasurePreempts: r.Preempts, MeasurePriority: r.Priority,
		MeasurePCD: r.PCD, MeasurePCDArrivals: r.PCDArrivals, MeasureVolumes: r.Volumes, MeasurePhaseVolumes: r.PhaseVolumes, MeasureTurns: r.Turns,
	}
	var tables []Table
	for _, m := range r.Measures {
		t := Table{Measure: m, rows: reflect.ValueOf(all[m])}
		t.Rows = t.rows.Len()
		for f := range reflect.TypeOf(all[m]).Elem().Fields() {
			t.Columns = append(t.Columns, f.Tag.Get("col"))
		}
		tables = append(tables, t)
	}
	return tables
}

// StampFormat says how tables print times.
type StampFormat string

// The formats of times. Integers are since 1970 UTC.
const (
	StampRFC3339 StampFormat = "rfc3339" // 2024-05-13T15:00:00.1Z
	StampMillis  StampFormat = "ms"
	StampMicros  StampFormat = "us"
	StampNanos   StampFormat = "ns"
)

// StampFormats returns all of them.
func StampFormats() []StampFormat {
	return []StampFormat{StampRFC3339, StampMillis, StampMicros, StampNanos}
}

// cell appends a value as text; text is whether JSON must quote it, and an empty
// result without text is a value that is not known.
func cell(b []byte, v reflect.Value, f StampFormat) (cell []byte, text bool) {
	switch x := v.Interface().(type) {
	case Stamp:
		switch f {
		case StampMillis:
			return strconv.AppendInt(b, int64(x)/1e6, 10), false
		case StampMicros:
			return strconv.AppendInt(b, int64(x)/1e3, 10), false
		case StampNanos:
			return strconv.AppendInt(b, int64(x), 10), false
		}
		return time.Unix(0, int64(x)).UTC().AppendFormat(b, time.RFC3339Nano), true
	case Seconds:
		if x == Unknown {
			return b, false
		}
		if x < 0 {
			b, x = append(b, '-'), -x
		}
		b = strconv.AppendInt(b, int64(x)/1e9, 10)
		if frac := int64(x) % 1e9; frac != 0 {
			b = fmt.Appendf(b, ".%09d", frac)
			for b[len(b)-1] == '0' {
				b = b[:len(b)-1]
			}
		}
		return b, false
	case Share:
		if math.IsNaN(float64(x)) {
			return b, false
		}
		return strconv.AppendFloat(b, float64(x), 'f', -1, 32), false
	}
	switch v.Kind() {
	case reflect.String:
		return append(b, v.String()...), true
	case reflect.Bool:
		return strconv.AppendBool(b, v.Bool()), false
	case reflect.Uint16:
		return strconv.AppendUint(b, v.Uint(), 10), false
	default: // int: a test prints every type of row
		return strconv.AppendInt(b, v.Int(), 10), false
	}
}

// WriteCSV writes a header line and the rows. What is not known is empty.
func (t Table) WriteCSV(w io.Writer, f StampFormat) error {
	c := csv.NewWriter(w)
	rec := slices.Clone(t.Columns)
	if err := c.Write(rec); err != nil {
		return err
	}
	var b []byte
	for i := range t.rows.Len() {
		row := t.rows.Index(i)
		for j := range rec {
			b, _ = cell(b[:0], row.Field(j), f)
			rec[j] = string(b)
		}
		if err := c.Write(rec); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

// WriteJSON writes one object with an array of objects for each table, by the
// measure's name, one row a line. What is not known is null.
func WriteJSON(w io.Writer, tables []Table, f StampFormat) error {
	out := bufio.NewWriter(w)
	var b, text []byte
	b = append(b, '{')
	for i, t := range tables {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, "\n%q: [", t.Measure)
		for j := range t.rows.Len() {
			row := t.rows.Index(j)
			if j > 0 {
				b = append(b, ',')
			}
			b = append(b, '\n')
			for k, name := range t.Columns {
				separator := byte(',')
				if k == 0 {
					separator = '{'
				}
				b = append(strconv.AppendQuote(append(b, separator), name), ':')
				var quote bool
				text, quote = cell(text[:0], row.Field(k), f)
				switch {
				case quote:
					q, err := json.Marshal(string(text))
					if err != nil {
						return err
					}
					b = append(b, q...)
				case len(text) == 0:
					b = append(b, "null"...)
				default:
					b = append(b, text...)
				}
			}
			b = append(b, '}')
			if _, err := out.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		b = append(b, ']')
	}
	b = append(b, "\n}\n"...)
	if _, err := out.Write(b); err != nil {
		return err
	}
	return out.Flush()
}
