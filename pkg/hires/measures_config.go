package hires

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// The functions that measures look for, without case and punctuation.
const (
	fnAdvance   = "advance"
	fnPresence  = "presence"
	fnYellowRed = "yellowred"
	fnAny       = "*"
	fnMovement  = "movement"
)

// Detector is a line of a [DetectorConfig]: what one channel of a controller
// does for one phase. A channel may have several lines.
type Detector struct {
	Device traffic.DeviceID
	// Phase that the detector's vehicles wait for, 1 to 255.
	Phase uint16
	// Channel is the parameter of the detector's events, 1 to 65535.
	Channel uint16
	// Function as it was written: Advance, Presence, Yellow_Red, or any other, for
	// counting only.
	Function string
	// Offset is added to the stamps of the events before they are compared with the
	// lights, -60 s to 60 s: less than zero for a detector that reports late, more
	// for the way from the detector to the stop line. Counts of volumes go by the
	// stamps as they are.
	Offset time.Duration
	// Movement is L, T, R or U, several of them (TR), or empty.
	Movement string

	function string // normal
}

// DetectorConfig says what the detectors are for. nil has none.
type DetectorConfig struct {
	// devices has the lines in order of channel, phase and function.
	devices map[traffic.DeviceID][]Detector
	lines   int
}

// maxDetectors bounds a configuration.
const maxDetectors = 1 << 20

const (
	colConfigDevice = iota
	colConfigPhase
	colConfigParameter
	colConfigFunction
	colConfigOffset
	colConfigMovement
	configColumns
)

var configColumnNames = [configColumns]string{"DeviceId", "Phase", "Parameter", "Function", "Offset_s", "Movement"}

// ParseDetectorConfig reads CSV with the columns DeviceId, Phase, Parameter (the
// channel) and Function, in any order; optional are Offset_s, in seconds, and
// Movement, see [Detector]. Names of columns and functions count without case,
// blanks and punctuation. Errors are of kind Invalid, name line and column, and
// come all at once, the first twenty of them.
func ParseDetectorConfig(r io.Reader) (*DetectorConfig, error) {
	c := csv.NewReader(r)
	c.FieldsPerRecord = -1
	c.ReuseRecord = true
	c.TrimLeadingSpace = true
	header, err := c.Read()
	switch {
	case errors.Is(err, io.EOF):
		return nil, invalid("the detector configuration is empty: want a header line with %s", strings.Join(configColumnNames[:colConfigOffset], ", "))
	case err != nil:
		return nil, invalid("%w", err)
	}
	header[0] = strings.TrimPrefix(header[0], "\ufeff")
	fields := len(header)
	var at [configColumns]int
	for i := range at {
		at[i] = -1
	}
	for i, h := range header {
		col := slices.IndexFunc(configColumnNames[:], func(n string) bool { return normal([]byte(n)) == normal([]byte(h)) })
		if col < 0 {
			return nil, invalid("line 1: no column is called %.40q; there are %s", h, strings.Join(configColumnNames[:], ", "))
		}
		if at[col] >= 0 {
			return nil, invalid("line 1: column %s comes twice", configColumnNames[col])
		}
		at[col] = i
	}
	for col := range colConfigOffset {
		if at[col] < 0 {
			return nil, invalid("line 1: column %s is missing", configColumnNames[col])
		}
	}

	conf := &DetectorConfig{devices: map[traffic.DeviceID][]Detector{}}
	type key struct {
		device         traffic.DeviceID
		channel, phase uint16
		function       string
	}
	seen := map[key]int{}
	var errs []error
	for len(errs) < 20 {
		rec, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			errs = append(errs, invalid("%w", err)) // names line and column itself
			if e := (*csv.ParseError)(nil); !errors.As(err, &e) {
				break // the reader's own error would come again and again
			}
			continue
		}
		line, _ := c.FieldPos(0)
		if len(rec) != fields {
			errs = append(errs, invalid("line %d: %d fields, want %d as in the header", line, len(rec), fields))
			continue
		}
		d, err := parseDetector(rec, at)
		if err != nil {
			errs = append(errs, invalid("line %d: %w", line, err))
			continue
		}
		k := key{d.Device, d.Channel, d.Phase, d.function}
		if first, twice := seen[k]; twice {
			errs = append(errs, invalid("line %d: Function: %s of device %s, phase %d, channel %d is in line %d already", line, d.Function, d.Device, d.Phase, d.Channel, first))
			continue
		}
		if conf.lines++; conf.lines > maxDetectors {
			errs = append(errs, invalid("line %d: more than %d detectors", line, maxDetectors))
			break
		}
		seen[k] = line
		conf.devices[d.Device] = append(conf.devices[d.Device], d)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	if conf.lines == 0 {
		return nil, invalid("the detector configuration has a header and no detector")
	}
	for _, l := range conf.devices {
		slices.SortFunc(l, func(a, b Detector) int {
			if a.Channel != b.Channel {
				return int(a.Channel) - int(b.Channel)
			}
			if a.Phase != b.Phase {
				return int(a.Phase) - int(b.Phase)
			}
			return strings.Compare(a.function, b.function)
		})
	}
	return conf, nil
}

func parseDetector(rec []string, at [configColumns]int) (d Detector, err error) {
	field := func(col int) string {
		if at[col] < 0 {
			return ""
		}
		return strings.TrimSpace(rec[at[col]])
	}
	wrong := func(col int, format string, args ...any) {
		if err == nil {
			err = fmt.Errorf("%s: %.40q %s", configColumnNames[col], field(col), fmt.Sprintf(format, args...))
		}
	}
	number := func(col int, high uint64) uint16 {
		u, e := strconv.ParseUint(field(col), 10, 16)
		if e != nil || u < 1 || u > high {
			wrong(col, "is not a number from 1 to %d", high)
		}
		return uint16(u)
	}
	d.Device = traffic.DeviceID(strings.Clone(field(colConfigDevice)))
	if d.Device == "" {
		wrong(colConfigDevice, "must name a device")
	}
	d.Phase = number(colConfigPhase, 255)
	d.Channel = number(colConfigParameter, 65535)
	d.Function = strings.Clone(field(colConfigFunction))
	if d.function = normal([]byte(d.Function)); d.function == "" || len(d.Function) > 64 {
		wrong(colConfigFunction, "is not a name of up to 64 letters")
	}
	if s := field(colConfigOffset); s != "" {
		offset, e := time.ParseDuration(s + "s")
		if e != nil || strings.TrimLeft(s, "+-.0123456789") != "" || offset < -time.Minute || offset > time.Minute {
			wrong(colConfigOffset, "is not a number of seconds from -60 to 60")
		}
		d.Offset = offset
	}
	if s := strings.ToUpper(field(colConfigMovement)); s != "" {
		if len(s) > 4 || strings.Trim(s, "LTRU") != "" || repeats(s) {
			wrong(colConfigMovement, "is not made of L, T, R and U, each at most once")
		}
		// One way to write it, in the order of the lanes.
		for _, letter := range "ULTR" {
			if strings.ContainsRune(s, letter) {
				d.Movement += string(letter)
			}
		}
	}
	return d, err
}

func repeats(s string) bool {
	b := []byte(s)
	slices.Sort(b)
	return len(slices.Compact(bytes.Clone(b))) != len(b)
}

// Detectors returns the lines of a device in order of channel, phase and
// function.
func (c *DetectorConfig) Detectors(id traffic.DeviceID) []Detector {
	if c == nil {
		return nil
	}
	return slices.Clone(c.devices[id])
}

// is says whether the detector is one that a measure with this need can use.
func (d *Detector) is(function string) bool {
	switch function {
	case fnAny:
		return true
	case fnMovement:
		return d.Movement != ""
	}
	return d.function == function
}

func (c *DetectorConfig) has(id traffic.DeviceID, function string) bool {
	return c != nil && slices.ContainsFunc(c.devices[id], func(d Detector) bool { return d.is(function) })
}

// allows says whether any device has what a measure needs.
func (c *DetectorConfig) allows(function string) bool {
	if function == "" {
		return true
	}
	if c == nil {
		return false
	}
	for id := range c.devices {
		if c.has(id, function) {
			return true
		}
	}
	return false
}
