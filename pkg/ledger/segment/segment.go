// Package segment is the format of Stopline's append-only files: records in
// numbered frames with checksums, in files named after their first record.
//
// A folder holds segments NNNNNNNNNNNNNNNNNNNN.seg (20 digits: the number of
// the first record). A segment is a header and then frames, without gaps:
//
//	header  "stopline seg v1\n" | first record u64 | crc32c of the 24 bytes before u32
//	frame   marker f5 'r' 'e' 'c' | record u64 | position u32 | length u32 |
//	        crc32c of data u32 | crc32c of the 24 bytes before u32 | data | 5a
//
// Integers are big-endian, crc32c is CRC-32 with Castagnoli's polynomial.
// Records that were appended together form one append: position counts within
// it from 0, and the top bit of length marks its last record. An append is there
// as a whole or not at all.
//
// A power cut may tear the last append: the file ends within it, or sectors that
// never reached the disk read as zeros. Only that is called torn ([ErrTorn]).
// Any other difference from what was written is damage: it is reported with file
// and offset and never repaired by cutting.
package segment

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

const magic = "stopline seg v1\n"

// Sizes of the format, bytes.
const (
	HeaderSize = len(magic) + 8 + 4
	// Overhead is what a frame adds to its data.
	Overhead = frameHead + 1
	// MaxRecord is the largest record.
	MaxRecord = 256 << 20

	frameHead = 28
	sector    = 512
	lastFlag  = 1 << 31
	trailer   = 0x5a
)

var (
	marker     = [4]byte{0xf5, 'r', 'e', 'c'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// ErrTorn is wrapped by a [Damage] that a power cut during the last append
// explains. Nothing that was acknowledged is missing: cut the file at Offset.
var ErrTorn = errors.New("torn by an interrupted append")

// Damage says where a file differs from what was written.
type Damage struct {
	File   string // name within the folder that was read
	Offset int64  // where the frame or header begins that is wrong
	Record uint64 // number of the record that is due there
	Rule   string
	Torn   bool
}

func (d *Damage) Error() string {
	if d.Torn {
		return fmt.Sprintf("%s: offset %d, record %d: %v: %s", d.File, d.Offset, d.Record, ErrTorn, d.Rule)
	}
	return fmt.Sprintf("%s: offset %d, record %d: damaged: %s", d.File, d.Offset, d.Record, d.Rule)
}

// Is makes errors.Is(err, ErrTorn) tell the two cases apart.
func (d *Damage) Is(target error) bool { return target == ErrTorn && d.Torn }

// Name returns the file name of the segment that begins with a record.
func Name(first uint64) string { return fmt.Sprintf("%020d.seg", first) }

// ParseName is the reverse of [Name].
func ParseName(name string) (first uint64, ok bool) {
	d, found := strings.CutSuffix(name, ".seg")
	if !found || len(d) != 20 {
		return 0, false
	}
	first, err := strconv.ParseUint(d, 10, 64)
	return first, err == nil && Name(first) == name
}

// AppendHeader appends a segment's header.
func AppendHeader(b []byte, first uint64) []byte {
	at := len(b)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint64(b, first)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[at:], castagnoli))
}

// AppendFrames appends the frames of one append whose first record has number
// first. Records must be at most [MaxRecord] long.
func AppendFrames(b []byte, first uint64, records ...[]byte) []byte {
	for i, r := range records {
		n := uint32(len(r))
		if i == len(records)-1 {
			n |= lastFlag
		}
		at := len(b)
		b = append(b, marker[:]...)
		b = binary.BigEndian.AppendUint64(b, first+uint64(i))
		b = binary.BigEndian.AppendUint32(b, uint32(i))
		b = binary.BigEndian.AppendUint32(b, n)
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(r, castagnoli))
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b[at:], castagnoli))
		b = append(b, r...)
		b = append(b, trailer)
	}
	return b
}

// head is a frame's decoded header.
type head struct {
	record uint64
	pos    uint32
	length int
	last   bool
	crc    uint32
}

// start is the number of the append's first record.
func (h head) start() uint64 { return h.record - uint64(h.pos) }

func parseHead(b []byte) (head, bool) {
	if len(b) < frameHead || [4]byte(b) != marker || crc32.Checksum(b[:24], castagnoli) != binary.BigEndian.Uint32(b[24:]) {
		return head{}, false
	}
	n := binary.BigEndian.Uint32(b[16:])
	return head{
		record: binary.BigEndian.Uint64(b[4:]), pos: binary.BigEndian.Uint32(b[12:]),
		length: int(n &^ lastFlag), last: n&lastFlag != 0, crc: binary.BigEndian.Uint32(b[20:]),
	}, n&^lastFlag <= MaxRecord
}

// ReadFrame reads the frame of a record at an offset and returns its data and
// the offset after it. Errors are a [Damage], or the reader's own.
func ReadFrame(r io.ReaderAt, file string, offset int64, record uint64) (data []byte, next int64, err error) {
	bad := func(rule string) ([]byte, int64, error) {
		return nil, 0, &Damage{File: file, Offset: offset, Record: record, Rule: rule}
	}
	h, rule, err := readHead(r, offset, record)
	if err != nil {
		return nil, 0, err
	}
	if rule != "" {
		return bad(rule)
	}
	b := make([]byte, h.length+1)
	if _, err := r.ReadAt(b, offset+frameHead); errors.Is(err, io.EOF) {
		return bad("file ends within the data")
	} else if err != nil {
		return nil, 0, err
	}
	if rule := h.check(b); rule != "" {
		return bad(rule)
	}
	return b[:h.length:h.length], offset + int64(h.length) + Overhead, nil
}

// SkipFrame returns the offset after the frame of a record, without reading its
// data.
func SkipFrame(r io.ReaderAt, file string, offset int64, record uint64) (next int64, err error) {
	h, rule, err := readHead(r, offset, record)
	if err != nil {
		return 0, err
	}
	if rule != "" {
		return 0, &Damage{File: file, Offset: offset, Record: record, Rule: rule}
	}
	return offset + int64(h.length) + Overhead, nil
}

func readHead(r io.ReaderAt, offset int64, record uint64) (head, string, error) {
	var b [frameHead]byte
	if _, err := r.ReadAt(b[:], offset); errors.Is(err, io.EOF) {
		return head{}, "file ends within a frame's header", nil
	} else if err != nil {
		return head{}, "", err
	}
	h, ok := parseHead(b[:])
	if !ok {
		return head{}, "frame header: marker or checksum is wrong", nil
	}
	if h.record != record {
		return head{}, fmt.Sprintf("frame header: is of record %d", h.record), nil
	}
	return h, "", nil
}

// check compares data and trailer with the header.
func (h head) check(b []byte) string {
	switch {
	case b[h.length] != trailer:
		return "end mark is wrong"
	case crc32.Checksum(b[:h.length], castagnoli) != h.crc:
		return "data: checksum is wrong"
	}
	return ""
}

// Frame is one record of a segment.
type Frame struct {
	Record uint64
	Offset int64
	Data   []byte
}

// Scanner reads the frames of one segment in order.
type Scanner struct {
	r      *bufio.Reader
	file   string
	offset int64
	next   uint64
	start  uint64 // of the append that is being read
}

// NewScanner reads and checks the segment's header. first is the record that
// the segment's name promises.
func NewScanner(r io.Reader, file string, first uint64) (*Scanner, error) {
	s := &Scanner{r: bufio.NewReaderSize(r, 64<<10), file: file, next: first, start: first}
	var b [HeaderSize]byte
	switch n, err := io.ReadFull(s.r, b[:]); {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		d := s.damage("file ends within the segment's header")
		d.Torn = bytes.Equal(b[:n], AppendHeader(nil, first)[:n])
		return nil, d
	case err != nil:
		return nil, err
	}
	if !bytes.Equal(b[:], AppendHeader(nil, first)) {
		d := s.damage("segment header: is not that of this segment")
		d.Torn = b == [HeaderSize]byte{}
		return nil, d
	}
	s.offset = int64(HeaderSize)
	return s, nil
}

// ResumeScanner continues at an offset where an append with the given first
// record is due.
func ResumeScanner(r io.Reader, file string, offset int64, record uint64) *Scanner {
	return &Scanner{r: bufio.NewReaderSize(r, 64<<10), file: file, offset: offset, next: record, start: record}
}

// Offset is where the next append begins; Next the number of its first record.
func (s *Scanner) Offset() int64 { return s.offset }

// Next is the number of the next record.
func (s *Scanner) Next() uint64 { return s.next }

func (s *Scanner) damage(rule string) *Damage {
	return &Damage{File: s.file, Offset: s.offset, Record: s.next, Rule: rule}
}

// short marks a file that ends within an append.
type short struct{ *Damage }

func (s *short) Unwrap() error { return s.Damage }

// Short reports whether an error of [Scanner.Append] means that the file ends
// within an append, as it does while the append is being written.
func Short(err error) bool {
	var s *short
	return errors.As(err, &s)
}

// Append returns the records of the next append, or io.EOF at the end of the
// file. A [Damage] is not yet classified as torn: see [Classify]. After an error
// the scanner stays where the append begins.
func (s *Scanner) Append() ([]Frame, error) {
	var out []Frame
	offset, record := s.offset, s.next
	fail := func(rule string, ended bool) ([]Frame, error) {
		d := &Damage{File: s.file, Offset: offset, Record: record, Rule: rule}
		if ended {
			return nil, &short{d}
		}
		return nil, d
	}
	for {
		var b [frameHead]byte
		switch n, err := io.ReadFull(s.r, b[:]); {
		case errors.Is(err, io.EOF) && len(out) == 0:
			return nil, io.EOF
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			// A cut leaves a beginning of what was written.
			return fail("file ends within an append", bytes.HasPrefix(marker[:], b[:min(n, 4)]))
		case err != nil:
			return nil, err
		}
		h, ok := parseHead(b[:])
		switch {
		case !ok:
			return fail("frame header: marker or checksum is wrong", false)
		case h.record != record || h.pos != uint32(len(out)):
			return fail(fmt.Sprintf("frame header: is of record %d, position %d", h.record, h.pos), false)
		}
		data, ended, err := readData(s.r, h.length+1)
		if err != nil {
			return nil, err
		}
		if ended {
			return fail("file ends within the data", true)
		}
		if rule := h.check(data); rule != "" {
			return fail(rule, false)
		}
		out = append(out, Frame{Record: record, Offset: offset, Data: data[:h.length:h.length]})
		offset += int64(h.length) + Overhead
		record++
		if h.last {
			s.offset, s.next, s.start = offset, record, record
			return out, nil
		}
	}
}

// readData reads n bytes, allocating only as they come.
func readData(r io.Reader, n int) (b []byte, ended bool, err error) {
	const step = 1 << 20
	for len(b) < n {
		k := min(step, n-len(b))
		b = slices.Grow(b, k)
		m, err := io.ReadFull(r, b[len(b):len(b)+k])
		b = b[:len(b)+m]
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, true, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
	return b, false, nil
}

// Classify decides whether what [Scanner.Append] could not read in the last
// segment is torn. tail is the file from the scanner's Offset to its end. The
// result is the [Damage] with Torn set or not; other errors come back as they
// are.
func Classify(s *Scanner, err error, tail []byte) error {
	var d *Damage
	if !errors.As(err, &d) {
		return err
	}
	// A frame of a later append shows that this one had been finished.
	for at := 0; at+frameHead <= len(tail); at++ {
		i := bytes.Index(tail[at:], marker[:])
		if i < 0 {
			break
		}
		at += i
		if h, ok := parseHead(tail[at:]); ok && h.start() > s.start {
			return d
		}
	}
	torn := Short(err)
	// Sectors that did not reach the disk read as zeros. The first byte of each
	// frame and its last are not zero, so whole records cannot look like that;
	// 512 aligned zeros inside a record's data can.
	for lo := s.offset; !torn && lo < s.offset+int64(len(tail)); {
		hi := min((lo/sector+1)*sector, s.offset+int64(len(tail)))
		if hi > d.Offset {
			from := max(lo, d.Offset)
			torn = len(bytes.Trim(tail[from-s.offset:hi-s.offset], "\x00")) == 0
		}
		lo = hi
	}
	if !torn {
		return d
	}
	// The whole append goes, not only the frame that is broken.
	return &Damage{File: d.File, Offset: s.offset, Record: s.next, Rule: d.Rule, Torn: true}
}

// List returns the segments of a folder by their first record, ascending. Names
// that are none are an error: nothing else belongs there.
func List(fsys fs.FS, dir string) ([]uint64, error) {
	es, err := fs.ReadDir(fsys, dir)
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, e := range es {
		first, ok := ParseName(e.Name())
		if !ok || e.IsDir() {
			return nil, &Damage{File: e.Name(), Rule: "is not the name of a segment"}
		}
		out = append(out, first)
	}
	slices.Sort(out)
	return out, nil
}

// Walk reads all records of a folder from number from on and checks every byte
// of the segments that it reads. A torn tail of the last segment is reported by
// an error for which errors.Is(err, [ErrTorn]); all records before it have been
// handed out. file and offset say where a record stands. rec may be kept.
func Walk(fsys fs.FS, dir string, from uint64, f func(record uint64, rec []byte, file string, offset int64) error) (next uint64, err error) {
	firsts, err := List(fsys, dir)
	if err != nil {
		return 0, err
	}
	for i, first := range firsts {
		last := i == len(firsts)-1
		if i > 0 && first != next {
			return next, &Damage{File: Name(first), Record: next, Rule: fmt.Sprintf("begins with record %d, record %d is due: a segment is missing or cut", first, next)}
		}
		if !last && firsts[i+1] <= from {
			next = firsts[i+1] // nothing wanted of this one; its end is checked when it is read
			continue
		}
		if next, err = walkOne(fsys, dir, first, last, from, f); err != nil {
			return next, err
		}
	}
	return next, nil
}

func walkOne(fsys fs.FS, dir string, first uint64, last bool, from uint64, f func(uint64, []byte, string, int64) error) (next uint64, err error) {
	name := Name(first)
	file, err := fsys.Open(path.Join(dir, name))
	if err != nil {
		return first, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	s, err := NewScanner(file, name, first)
	if err != nil {
		return first, notTorn(err, last)
	}
	for {
		frames, err := s.Append()
		if errors.Is(err, io.EOF) {
			return s.Next(), nil
		}
		if err != nil {
			if last {
				b, rerr := fs.ReadFile(fsys, path.Join(dir, name))
				if rerr != nil {
					return s.Next(), rerr
				}
				err = Classify(s, err, b[min(s.Offset(), int64(len(b))):])
			}
			return s.Next(), notTorn(err, last)
		}
		for _, fr := range frames {
			if fr.Record < from {
				continue
			}
			if err := f(fr.Record, fr.Data, name, fr.Offset); err != nil {
				return fr.Record, err
			}
		}
	}
}

// notTorn makes plain damage of everything that is not in the last segment: the
// next segment is begun only when the one before is complete.
func notTorn(err error, last bool) error {
	var d *Damage
	if !errors.As(err, &d) {
		return err
	}
	c := *d
	c.Torn = d.Torn && last
	return &c
}
