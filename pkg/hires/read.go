package hires

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// ErrTruncated is in the chain of an error that says that a log ends too early:
// in the middle of a record, or before the end of its compression. All events
// before the end have been handed out; the caller decides whether they count.
var ErrTruncated = errors.New("the log is cut off")

// Options of [Read]; the zero value is good.
type Options struct {
	// Zone is that of stamps that do not name one. nil is UTC.
	Zone *time.Location
	// Device is for files that do not say whose events they hold: CSV without
	// such a column. Files that do say are believed. Optional.
	Device traffic.DeviceID
	// Round rounds stamps finer than a millisecond to the nearest one, and counts
	// them. Without it such a stamp is an error: controllers log tenths of a
	// second, and a record in the ledger has milliseconds.
	Round bool
}

// Formats of a log.
const (
	FormatCSV       = "csv"
	FormatEconolite = "econolite"
)

// Summary is what [Read] found.
type Summary struct {
	// Format is csv or econolite; Compression gzip, zlib or empty.
	Format      string
	Compression string
	// Events is how many were handed out.
	Events int
	// First and Last are the earliest and latest times, nanoseconds since 1970
	// UTC; 0 without events.
	First, Last int64
	// Devices in the order in which they come.
	Devices []traffic.DeviceID
	// Unknown counts the events with a code that the enumeration does not have,
	// by code. They are handed out like the others.
	Unknown map[uint16]int
	// OutOfOrder counts events that are earlier than one of the same device
	// before them in the file.
	OutOfOrder int
	// Rounded counts stamps that were finer than a millisecond.
	Rounded int
	// Negative counts parameters below zero, which some controllers log with codes
	// of their own. They are handed out as two's complement: -1 is 65535.
	Negative int
	// SHA256 is of the Size bytes that were read, before any decompression: the
	// whole file if there was no error, or if it was cut off.
	SHA256 [sha256.Size]byte
	Size   int64
}

// UnknownEvents is the sum of Unknown.
func (s *Summary) UnknownEvents() int {
	n := 0
	for _, c := range s.Unknown {
		n += c
	}
	return n
}

const (
	// maxLine is the longest line of text, bytes.
	maxLine = 4096
	// maxDevices bounds what a hostile file can make us remember.
	maxDevices = 1 << 16
	// minTime and maxTime bound all stamps: 1973-03-03, from which on the size of
	// an integer stamp tells its unit, and 2262-01-01, up to which nanoseconds fit.
	minTime, maxTime = int64(1e17), int64(9214646400e9)
)

// Read reads a controller's log and hands its events to f in the order of the
// file. It tells the format from the content:
//
//   - CSV of four fields: device, time, code and parameter, in any order with a
//     header line, and with device or time first without. See below.
//   - Econolite's .dat: lines of text that name the controller and its time of
//     begin, then 4 bytes an event.
//
// Both may be compressed with gzip or zlib (Econolite's .datZ is zlib). Nothing
// is kept but one line, one name a device and one count a code, whatever the size
// of the input.
//
// A header line of CSV is known by the names of its columns, which count without
// case, blanks and punctuation: DeviceId, Location Id, SignalID; Timestamp, Time;
// EventId, Event Code; Parameter, Event Parameter, EventParam. Columns with other
// names are passed over. A byte order mark is allowed, and so are blank lines and
// a last line without its end.
//
// A time is an integer since 1970 UTC or a text. The unit of an integer is told
// by its size, which is without doubt for times from 1973 to 2262: from 1e8
// seconds, from 1e11 milliseconds, from 1e14 microseconds, from 1e17 nanoseconds.
// A text is 2022-10-03 06:00:00.0000000 (also with T, and with Z or an offset
// such as -07:00 or +0000, which then wins over Options.Zone), or
// 4/17/2023 8:00:46.00 (month first; also with AM or PM). Where clocks are put
// back, an hour comes twice: the time nearest to the event before is taken, and
// the first where there is none. A time that clocks have skipped is an error.
//
// Read ends at the first error, after handing out all events before it. Errors
// of the input are of kind Invalid and name the line, or the byte offset after
// decompression, and the field; [ErrTruncated] is in the chain where the log is
// cut off. An error of f, or of r, comes back wrapped or as it is.
func Read(r io.Reader, o Options, f func(Event) error) (Summary, error) {
	d := &reader{o: o, f: f, devices: map[string]*device{}, raw: rawReader{r: r, h: sha256.New()}}
	d.sum.Unknown = map[uint16]int{}
	d.clock.zone = o.Zone
	if d.clock.zone == nil {
		d.clock.zone = time.UTC
	}
	err := d.read()
	for i := range d.order {
		d.sum.Devices = append(d.sum.Devices, d.order[i].id)
	}
	d.raw.h.Sum(d.sum.SHA256[:0])
	d.sum.Size = d.raw.n
	return d.sum, err
}

// rawReader hashes what it reads, and keeps an error of its reader apart from
// those of the decompression above it.
type rawReader struct {
	r   io.Reader
	h   hash.Hash
	n   int64
	err error
}

func (r *rawReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.h.Write(p[:n])
	r.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// device is what is remembered of one.
type device struct {
	id     traffic.DeviceID
	newest int64
}

type reader struct {
	o       Options
	f       func(Event) error
	raw     rawReader
	in      *bufio.Reader // after decompression
	sum     Summary
	devices map[string]*device
	order   []*device
	cur     *device // that of the event before
	offset  int64   // of what comes next, after decompression
	clock   clock
}

func invalid(format string, args ...any) error { return kind.Errorf(kind.Invalid, format, args...) }

func (d *reader) read() error {
	file := bufio.NewReaderSize(&d.raw, 64<<10)
	magic, err := file.Peek(2)
	if d.raw.err != nil {
		return fmt.Errorf("reading the log: %w", d.raw.err)
	}
	if len(magic) == 0 {
		return invalid("the log is empty: %w", ErrTruncated)
	}
	d.in = file
	switch {
	case err != nil: // one byte
	case magic[0] == 0x1f && magic[1] == 0x8b:
		d.sum.Compression = "gzip"
		z, err := gzip.NewReader(file)
		if err != nil {
			return d.broken(0, err)
		}
		d.in = bufio.NewReaderSize(z, 64<<10)
	case magic[0] == 0x78 && (uint(magic[0])<<8|uint(magic[1]))%31 == 0: // RFC 1950 §2.2
		d.sum.Compression = "zlib"
		z, err := zlib.NewReader(file)
		if err != nil {
			return d.broken(0, err)
		}
		d.in = bufio.NewReaderSize(z, 64<<10)
	}
	// An error after the first byte comes again when it is read.
	switch _, err := d.in.Peek(1); {
	case err == nil:
	case errors.Is(err, io.EOF):
		return invalid("the log is empty: %w", ErrTruncated)
	default:
		return d.broken(0, err)
	}
	if isEconolite(d.in) {
		d.sum.Format = FormatEconolite
		err = d.econolite()
	} else {
		d.sum.Format = FormatCSV
		err = d.csv()
	}
	if err != nil {
		return err
	}
	// gzip reads on until its input ends, zlib stops where its stream does.
	if d.sum.Compression == "zlib" {
		if _, err := file.ReadByte(); err == nil {
			return invalid("zlib: data after the end of the compressed log")
		}
	}
	if d.raw.err != nil {
		return fmt.Errorf("reading the log: %w", d.raw.err)
	}
	return nil
}

// broken makes an error of reading, at an offset of the log after decompression,
// one that says what happened: the source failed, the log is cut off, or its
// compression is damaged.
func (d *reader) broken(at int64, err error) error {
	switch {
	case d.raw.err != nil:
		return fmt.Errorf("reading the log: %w", d.raw.err)
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		return invalid("byte %d: %s ends too early: %w", at, d.sum.Compression, ErrTruncated)
	default:
		return invalid("byte %d: %w", at, err) // names the compression
	}
}

// device finds or adds one by its name in the file.
func (d *reader) device(name []byte) (*device, error) {
	if d.cur != nil && string(name) == string(d.cur.id) {
		return d.cur, nil
	}
	if v, ok := d.devices[string(name)]; ok {
		return v, nil
	}
	switch {
	case len(name) == 0:
		return nil, errors.New("is empty")
	case len(name) > identity.MaxID:
		return nil, fmt.Errorf("%d bytes, at most %d", len(name), identity.MaxID)
	case !utf8.Valid(name) || bytes.ContainsFunc(name, func(c rune) bool { return c < ' ' || c == 0x7f }):
		return nil, fmt.Errorf("%.40q is not text without control characters", name)
	case len(d.order) == maxDevices:
		return nil, fmt.Errorf("%.40q: more than %d devices in one log", name, maxDevices)
	}
	id := strings.Clone(string(name))
	v := &device{id: traffic.DeviceID(id)}
	d.devices[id] = v
	d.order = append(d.order, v)
	return v, nil
}

// emit counts an event and hands it out.
func (d *reader) emit(v *device, at int64, code, param uint16) error {
	if v.newest > at {
		d.sum.OutOfOrder++
	} else {
		v.newest = at
	}
	if d.sum.Events == 0 || at < d.sum.First {
		d.sum.First = at
	}
	if d.sum.Events == 0 || at > d.sum.Last {
		d.sum.Last = at
	}
	if !Known(code) {
		d.sum.Unknown[code]++
	}
	d.sum.Events++
	d.cur = v
	return d.f(Event{At: at, Device: v.id, Code: code, Param: param})
}

// stamp checks a time, and rounds it if it may.
func (d *reader) stamp(at int64) (int64, error) {
	if at < minTime || at >= maxTime-int64(time.Millisecond) {
		return 0, errors.New("is not between 1973-03-03 and 2261-12-31")
	}
	if ms := int64(time.Millisecond); at%ms != 0 {
		if !d.o.Round {
			return 0, errors.New("is finer than a millisecond")
		}
		d.sum.Rounded++
		at = (at + ms/2) / ms * ms
	}
	return at, nil
}

// clock turns the wall clock's times of a zone into time.
type clock struct {
	zone *time.Location
	// minute is a minute of the wall clock as if it were UTC, and offset, seconds,
	// what the zone is ahead of UTC in it.
	minute, offset int64
	cached         bool
}

// utc returns the time of a wall clock that is given as seconds since 1970 as if
// it were UTC. Of two the one that is nearer to near is taken, the first if near
// is 0.
func (c *clock) utc(wall, near int64) (int64, error) {
	if c.zone == time.UTC {
		return wall, nil
	}
	if c.cached && wall-wall%60 == c.minute {
		return wall - c.offset, nil
	}
	at := func(t int64) int64 {
		_, o := time.Unix(t, 0).In(c.zone).Zone()
		return int64(o)
	}
	// A zone changes its offset at most once within a day before and after.
	const day = 24 * 60 * 60
	found := make([]int64, 0, 2)
	for _, o := range [...]int64{at(wall - day), at(wall + day)} {
		if t := wall - o; at(t) == o && !slices.Contains(found, t) {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 0:
		return 0, fmt.Errorf("was skipped by the clocks of %s", c.zone)
	case 1:
		c.minute, c.offset, c.cached = wall-wall%60, wall-found[0], true
		return found[0], nil
	}
	first, second := min(found[0], found[1]), max(found[0], found[1])
	if near != 0 && second-near < near-first {
		return second, nil
	}
	return first, nil
}
