package hires

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

// Columns of a line of CSV.
const (
	colDevice = iota
	colTime
	colCode
	colParam
	columns
)

// What the columns may be called, without case, blanks and punctuation. The first
// is what errors call a column of a file without a header.
var columnNames = [columns][]string{
	colDevice: {"DeviceId", "deviceid", "device", "locationid", "locationidentifier", "location", "signalid", "signal", "intersectionid"},
	colTime:   {"TimeStamp", "timestamp", "time", "datetime", "eventtime"},
	colCode:   {"EventId", "eventid", "eventcode", "code", "event", "eventtype"},
	colParam:  {"Parameter", "parameter", "eventparameter", "eventparam", "param"},
}

// maxFields is the most fields of a line.
const maxFields = 64

// layout says in which field of a line each column is, -1 for none, and what the
// file calls it.
type layout struct {
	at     [columns]int
	names  [columns]string
	fields int
}

// plain returns the layout of a file without a header.
func plain(cols ...int) *layout {
	l := &layout{at: [columns]int{-1, -1, -1, -1}, fields: len(cols)}
	for i, c := range cols {
		l.at[c] = i
		l.names[c] = columnNames[c][0]
	}
	return l
}

// line reads line n without its end. The bytes are good until the next call.
// open says that its end is missing because the input is over; io.EOF means that
// there is no line.
func (d *reader) line(n int) (line []byte, open bool, err error) {
	line, err = d.in.ReadSlice('\n')
	switch {
	case err == nil:
	case errors.Is(err, io.EOF) && len(line) > 0:
		open = true
	case errors.Is(err, io.EOF):
		return nil, false, io.EOF
	case errors.Is(err, bufio.ErrBufferFull):
	case d.raw.err != nil:
		return nil, false, d.broken(d.offset, err)
	default:
		return nil, false, fmt.Errorf("line %d: %w", n, d.broken(d.offset, err))
	}
	d.offset += int64(len(line))
	line = bytes.TrimSuffix(line, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) > maxLine {
		return nil, false, invalid("line %d: longer than %d bytes", n, maxLine)
	}
	return line, open, nil
}

// split cuts a line into its fields. A field may be quoted, with "" for a quote
// in it.
func split(line []byte, fields [][]byte) ([][]byte, error) {
	fields = fields[:0]
	for {
		if len(fields) == maxFields {
			return nil, fmt.Errorf("more than %d fields", maxFields)
		}
		if len(line) > 0 && line[0] == '"' {
			field, rest, err := quoted(line)
			if err != nil {
				return nil, fmt.Errorf("field %d: %w", len(fields)+1, err)
			}
			fields = append(fields, field)
			if len(rest) == 0 {
				return fields, nil
			}
			line = rest[1:]
			continue
		}
		i := bytes.IndexByte(line, ',')
		if i < 0 {
			return append(fields, bytes.TrimSpace(line)), nil
		}
		fields = append(fields, bytes.TrimSpace(line[:i]))
		line = line[i+1:]
	}
}

// quoted takes a quoted field off a line. What is left begins with a comma or is
// empty.
func quoted(line []byte) (field, rest []byte, err error) {
	for i := 1; i < len(line); i++ {
		switch {
		case line[i] != '"':
			field = append(field, line[i])
		case i+1 < len(line) && line[i+1] == '"':
			field = append(field, '"')
			i++
		case i+1 == len(line) || line[i+1] == ',':
			return field, line[i+1:], nil
		default:
			return nil, nil, errors.New("text after the closing quote")
		}
	}
	return nil, nil, errors.New("the closing quote is missing")
}

// csv reads CSV.
func (d *reader) csv() error {
	var l *layout
	var fields [][]byte
	for n := 1; ; n++ {
		line, open, err := d.line(n)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if n == 1 {
			line = bytes.TrimPrefix(line, []byte("\xef\xbb\xbf"))
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		// What a line says wrong that is the last and not ended may be what is
		// left of a good one.
		wrong := func(err error) error {
			if open {
				return invalid("line %d: %w, and the line does not end: %w", n, err, ErrTruncated)
			}
			return invalid("line %d: %w", n, err)
		}
		if fields, err = split(line, fields); err != nil {
			return wrong(err)
		}
		if l == nil {
			header := false
			if l, header, err = d.layout(fields); err != nil {
				return wrong(err)
			}
			if header {
				continue
			}
		}
		v, e, err := d.csvEvent(l, fields)
		if err != nil {
			return wrong(err)
		}
		if err := d.emit(v, e.At, e.Code, e.Param); err != nil {
			return err
		}
	}
}

// layout tells the columns from the first line.
func (d *reader) layout(fields [][]byte) (l *layout, header bool, err error) {
	named := &layout{at: [columns]int{-1, -1, -1, -1}, fields: len(fields)}
	for i, f := range fields {
		name := normal(f)
		for c := range columns {
			for _, n := range columnNames[c][1:] {
				if n != name {
					continue
				}
				if named.at[c] >= 0 {
					return nil, false, fmt.Errorf("header: %.40q and %.40q are the same column", named.names[c], f)
				}
				named.at[c], named.names[c] = i, string(f)
				header = true
			}
		}
	}
	if header {
		for c, at := range named.at {
			switch {
			case at >= 0:
			case c != colDevice:
				return nil, false, fmt.Errorf("header: no column %s: this is not a log of events", columnNames[c][0])
			case d.o.Device == "":
				return nil, false, errors.New("header: no column DeviceId, and no device was named for the file")
			}
		}
		return named, true, nil
	}
	isTime := func(i int) bool { _, err := d.parseTime(fields[i]); return err == nil }
	switch {
	case len(fields) == 4 && isTime(0) && isTime(1):
		return nil, false, errors.New("no header, and the first two fields could both be the time")
	case len(fields) == 4 && isTime(0):
		return plain(colTime, colDevice, colCode, colParam), false, nil
	case len(fields) == 4 && isTime(1):
		return plain(colDevice, colTime, colCode, colParam), false, nil
	case len(fields) == 3 && isTime(0) && d.o.Device != "":
		return plain(colTime, colCode, colParam), false, nil
	case len(fields) == 3 && isTime(0):
		return nil, false, errors.New("no field for the device, and none was named for the file")
	}
	return nil, false, errors.New("neither a header nor an event: this is not a log that we know")
}

// normal returns the name of a column without case, blanks and punctuation.
func normal(f []byte) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= 'A' && c <= 'Z':
			return c + 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			return c
		}
		return -1
	}, string(f))
}

// csvEvent reads an event from the fields of a line.
func (d *reader) csvEvent(l *layout, fields [][]byte) (v *device, e Event, err error) {
	if len(fields) != l.fields {
		return nil, e, fmt.Errorf("%d fields, want %d", len(fields), l.fields)
	}
	name := []byte(d.o.Device)
	if l.at[colDevice] >= 0 {
		name = fields[l.at[colDevice]]
	}
	if v, err = d.device(name); err != nil {
		return nil, e, fmt.Errorf("%s: %w", or(l.names[colDevice], "device"), err)
	}
	f := fields[l.at[colTime]]
	if e.At, err = d.parseTime(f); err == nil {
		e.At, err = d.stamp(e.At)
	}
	if err != nil {
		return nil, e, fmt.Errorf("%s: %.40q %w", l.names[colTime], f, err)
	}
	f = fields[l.at[colCode]]
	u, ok := number(f)
	if !ok || u > math.MaxUint16 {
		return nil, e, fmt.Errorf("%s: %.40q is not a number from 0 to %d", l.names[colCode], f, math.MaxUint16)
	}
	e.Code = uint16(u)
	f = fields[l.at[colParam]]
	digits, negative := bytes.CutPrefix(f, []byte("-"))
	u, ok = number(digits)
	switch {
	case ok && !negative && u <= math.MaxUint16:
		e.Param = uint16(u)
	case ok && negative && u > 0 && u <= -math.MinInt16:
		e.Param = uint16(-u)
		d.sum.Negative++
	default:
		return nil, e, fmt.Errorf("%s: %.40q is not a number from %d to %d", l.names[colParam], f, math.MinInt16, math.MaxUint16)
	}
	return v, e, nil
}

func or(s, t string) string {
	if s == "" {
		return t
	}
	return s
}

// number reads digits that fit an int64.
func number(f []byte) (int64, bool) {
	if len(f) == 0 || len(f) > 19 {
		return 0, false
	}
	var u uint64 // nineteen nines fit
	for _, c := range f {
		if c < '0' || c > '9' {
			return 0, false
		}
		u = u*10 + uint64(c-'0')
	}
	return int64(u), int64(u) >= 0
}

var errTime = errors.New("is not a time")

// parseTime reads a stamp, see [Read].
func (d *reader) parseTime(f []byte) (int64, error) {
	if u, ok := number(f); ok {
		switch {
		case u >= 1e17:
			return u, nil
		case u >= 1e14:
			return u * 1e3, nil
		case u >= 1e11:
			return u * 1e6, nil
		case u >= 1e8:
			return u * 1e9, nil
		}
		return 0, errors.New("is not a time: less than 1e8, which is 1973 in seconds")
	}
	near := int64(0)
	if d.cur != nil {
		near = d.cur.newest / int64(time.Second)
	}
	return d.clock.text(f, near)
}

// scanner takes a stamp apart.
type scanner struct {
	s   []byte
	bad bool
}

// digits takes from low to high digits.
func (s *scanner) digits(low, high int) int {
	n, v := 0, 0
	for n < len(s.s) && n < high && s.s[n] >= '0' && s.s[n] <= '9' {
		v = v*10 + int(s.s[n]-'0')
		n++
	}
	s.bad = s.bad || n < low
	s.s = s.s[n:]
	return v
}

// take takes one of the characters if it comes next.
func (s *scanner) take(chars string) bool {
	if len(s.s) > 0 && strings.IndexByte(chars, s.s[0]) >= 0 {
		s.s = s.s[1:]
		return true
	}
	return false
}

// want takes one of the characters, which must come next.
func (s *scanner) want(chars string) {
	if !s.take(chars) {
		s.bad = true
	}
}

// nanos takes an optional fraction of a second. Digits beyond nanoseconds must
// be zero.
func (s *scanner) nanos() int {
	if !s.take(".") {
		return 0
	}
	v, n := 0, 0
	for ; n < len(s.s) && s.s[n] >= '0' && s.s[n] <= '9'; n++ {
		if n < 9 {
			v = v*10 + int(s.s[n]-'0')
		} else if s.s[n] != '0' {
			s.bad = true
		}
	}
	s.bad = s.bad || n == 0
	s.s = s.s[n:]
	for ; n < 9; n++ {
		v *= 10
	}
	return v
}

// text reads a stamp that is a text, see [Read].
func (c *clock) text(f []byte, near int64) (int64, error) {
	s := scanner{s: f}
	var year, month, day int
	iso := bytes.IndexByte(f, '/') < 0
	if iso {
		year = s.digits(4, 4)
		s.want("-")
		month = s.digits(1, 2)
		s.want("-")
		day = s.digits(1, 2)
		s.want(" T")
	} else {
		month = s.digits(1, 2)
		s.want("/")
		day = s.digits(1, 2)
		s.want("/")
		year = s.digits(4, 4)
		s.want(" ")
	}
	wall, nanos := s.clock(year, month, day)
	ahead, fixed := 0, false
	if s.take(" ") && !iso {
		pm := s.take("Pp")
		if !pm {
			s.want("Aa")
		}
		s.want("Mm")
		hour := wall % 86400 / 3600
		s.bad = s.bad || hour < 1 || hour > 12
		if hour == 12 {
			wall -= 12 * 3600
		}
		if pm {
			wall += 12 * 3600
		}
	} else if s.take("Zz") {
		fixed = true
	} else if neg := s.take("-"); neg || s.take("+") {
		fixed = true
		h := s.digits(2, 2)
		s.take(":")
		m := s.digits(2, 2)
		s.bad = s.bad || h > 23 || m > 59
		ahead = h*3600 + m*60
		if neg {
			ahead = -ahead
		}
	}
	if s.bad || len(s.s) > 0 {
		return 0, errTime
	}
	return c.at(wall, int64(nanos), int64(ahead), fixed, near)
}

// clock takes a time of day, and returns it with a date as seconds since 1970, as
// if it were UTC, and nanoseconds.
func (s *scanner) clock(year, month, day int) (wall int64, nanos int) {
	hour := s.digits(1, 2)
	s.want(":")
	minute := s.digits(1, 2)
	s.want(":")
	second := s.digits(1, 2)
	nanos = s.nanos()
	t := time.Date(year, time.Month(month), day, 0, 0, 0, 0, time.UTC)
	if y, m, d := t.Date(); y != year || int(m) != month || d != day || hour > 23 || minute > 59 || second > 59 {
		s.bad = true
	}
	return t.Unix() + int64(hour*3600+minute*60+second), nanos
}

// at returns nanoseconds since 1970 of a wall clock.
func (c *clock) at(wall, nanos, ahead int64, fixed bool, near int64) (int64, error) {
	const day = 86400
	if wall < minTime/1e9-day || wall > maxTime/1e9+day {
		return 0, errors.New("is not between 1973-03-03 and 2261-12-31")
	}
	t := wall - ahead
	if !fixed {
		var err error
		if t, err = c.utc(wall, near); err != nil {
			return 0, err
		}
	}
	return t*1e9 + nanos, nil
}
