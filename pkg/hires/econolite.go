package hires

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"time"
)

// Econolite's log begins with lines of text:
//
//	2-21-2024 11:15:00.0,Version #:,3
//	2-21-2024 11:15:00.0,ECON_10.210.8.179_2024_02_21_1115.dat
//	2-21-2024 11:15:00.0,Intersection #:,10.210.8.179
//	2-21-2024 11:15:00.0,IP Address:,10.210.8.179
//	2-21-2024 11:15:00.0,MAC Address:,00:04:81:02:80:5c
//	2-21-2024 11:15:00.0,Controller Data Log Beginning:,2/21/2024,11:15:00.0
//	2-21-2024 11:15:00.0,Phases in use:,1,2,3,4,5,6,7,8
//
// The last is followed by 4 bytes an event: code, parameter, and tenths of a
// second since the beginning as a big-endian number. Sixteen bits of tenths are
// 109 minutes; logs are closed each quarter of an hour, or sooner, and the
// readers that we know take no turn of the number into account (some take it as
// signed, which is wrong from 55 minutes on). Here a step back by more than half
// of the range is a turn: the log went on. A smaller step back is an event out of
// order, which keeps its time; so is what comes up to a minute late over a turn.
const (
	econoliteStart = "12-31-2024 11:15:00.0," // the longest start of the first line
	econoliteLines = 64                       // most lines of text
	econoliteEnd   = "Phases in use:"
	turn           = 1 << 16 // tenths of a second
	late           = 600     // tenths of a second
)

// econoliteTime reads the stamp that each line begins with, up to its comma.
func econoliteTime(line []byte) (wall int64, nanos int, rest []byte, ok bool) {
	s := scanner{s: line}
	month := s.digits(1, 2)
	s.want("-")
	day := s.digits(1, 2)
	s.want("-")
	year := s.digits(4, 4)
	s.want(" ")
	wall, nanos = s.clock(year, month, day)
	s.want(",")
	return wall, nanos, s.s, !s.bad
}

func isEconolite(in *bufio.Reader) bool {
	line, _ := in.Peek(len(econoliteStart)) // an error comes again when it is read
	_, _, _, ok := econoliteTime(line)
	return ok
}

// econolite reads a .dat.
func (d *reader) econolite() error {
	begin, v, err := d.econoliteHeader()
	if err != nil {
		return err
	}
	const tenth = int64(100 * time.Millisecond)
	var rec [4]byte
	tenths := int64(0) // of the event before, with all turns
	for {
		n, err := io.ReadFull(d.in, rec[:])
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && n == 0:
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF) && d.raw.err == nil && d.atEnd():
			return invalid("byte %d: record: %d bytes of 4: %w", d.offset, n, ErrTruncated)
		default:
			return d.broken(d.offset, err)
		}
		t := tenths&^(turn-1) | int64(binary.BigEndian.Uint16(rec[2:]))
		switch {
		case t-tenths < -turn/2:
			t += turn
		case t-tenths >= turn-late && t >= turn:
			t -= turn
		}
		at := begin + t*tenth
		if at >= maxTime {
			return invalid("byte %d: time: is not between 1973-03-03 and 2261-12-31", d.offset)
		}
		tenths = t
		d.offset += 4
		if err := d.emit(v, at, uint16(rec[0]), uint16(rec[1])); err != nil {
			return err
		}
	}
}

// atEnd says whether the input has ended well: a read after the end of a
// compressed stream that was cut off gives its error again.
func (d *reader) atEnd() bool {
	_, err := d.in.ReadByte()
	return errors.Is(err, io.EOF)
}

// econoliteHeader reads the lines of text, and returns when the log begins and
// whose it is.
func (d *reader) econoliteHeader() (begin int64, v *device, err error) {
	var id, ip []byte
	var start []byte // date and time of the beginning
	first := int64(0)
	for n := 1; ; n++ {
		line, open, err := d.line(n)
		switch {
		case errors.Is(err, io.EOF):
			return 0, nil, invalid("line %d: the log ends before the line %q: %w", n, econoliteEnd, ErrTruncated)
		case err != nil:
			return 0, nil, err
		case open:
			return 0, nil, invalid("line %d: the log ends before the end of the line: %w", n, ErrTruncated)
		}
		if n > econoliteLines {
			return 0, nil, invalid("line %d: no line %q among the first %d", n, econoliteEnd, econoliteLines)
		}
		wall, nanos, rest, ok := econoliteTime(line)
		if !ok {
			return 0, nil, invalid("line %d: %.40q does not begin with a time such as 2-21-2024 11:15:00.0", n, line)
		}
		if n == 1 {
			if first, err = d.clock.at(wall, int64(nanos), 0, false, 0); err == nil {
				first, err = d.stamp(first)
			}
			if err != nil {
				return 0, nil, invalid("line %d: time: %q %w", n, line[:len(line)-len(rest)-1], err)
			}
		}
		key, value, _ := bytes.Cut(rest, []byte(","))
		value = bytes.TrimSpace(value)
		switch string(bytes.TrimSpace(key)) {
		case "Intersection #:":
			id = bytes.Clone(value)
		case "IP Address:":
			ip = bytes.Clone(value)
		case "Controller Data Log Beginning:":
			start = bytes.Replace(bytes.Clone(value), []byte(","), []byte(" "), 1)
			begin, err = d.clock.text(start, 0)
			if err == nil {
				begin, err = d.stamp(begin)
			}
			if err != nil {
				return 0, nil, invalid("line %d: Controller Data Log Beginning: %.40q %w", n, value, err)
			}
		case econoliteEnd:
			if start == nil {
				begin = first
			}
			field := "Intersection #"
			if len(id) == 0 {
				field, id = "IP Address", ip
			}
			if len(id) == 0 {
				field, id = "device", []byte(d.o.Device)
			}
			if len(id) == 0 {
				return 0, nil, invalid("line %d: neither Intersection # nor IP Address, and no device was named for the file", n)
			}
			if v, err = d.device(id); err != nil {
				return 0, nil, invalid("%s: %w", field, err)
			}
			return begin, v, nil
		}
	}
}
