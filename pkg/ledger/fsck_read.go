package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// rec is one record of a journal. data shares memory with what was read beside it.
type rec struct {
	n      uint64
	data   []byte
	file   string
	offset int64
}

func (r rec) problem(format string, args ...any) Problem {
	return Problem{File: r.file, Offset: &r.offset, Record: &r.n, Rule: fmt.Sprintf(format, args...)}
}

// hole is a stretch of records that a journal does not have.
type hole struct {
	from, to uint64 // records [from, to); to is MaxUint64 where nothing follows
	at       Problem
	// torn is set where an interrupted write explains it.
	torn bool
	told bool
	// data is what the first record's frame holds where only its checksum is wrong.
	data []byte
}

// chunk is how much of a journal is read at once, bytes.
const chunk = 1 << 20

// stream reads one journal from its beginning, record by record, and goes on
// behind whatever is damaged.
type stream struct {
	fsys   fs.FS
	dir    string
	firsts []uint64
	sizes  []int64
	at     int // segment that is open or next

	file  fs.File
	name  string
	begin int64  // offset in the file of buf[0]
	buf   []byte // what was read and not handed out
	eof   bool
	limit uint64 // first record of the segment after this one

	floor uint64 // first record, where those before may be gone on purpose
	next  uint64 // record that is due
	holes []*hole
	read  uint64 // bytes
	// strange are names that do not belong there.
	strange []Problem
}

// openStream lists the segments. floor says that records before the first segment
// may be gone on purpose.
func openStream(fsys fs.FS, dir string, floor bool) (*stream, error) {
	s := &stream{fsys: fsys, dir: dir}
	es, err := fs.ReadDir(fsys, dir)
	if errors.Is(err, fs.ErrNotExist) {
		s.lose(0, math.MaxUint64, Problem{File: dir, Rule: "is missing"})
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		first, ok := segment.ParseName(e.Name())
		if !ok || e.IsDir() {
			s.strange = append(s.strange, Problem{File: dir + "/" + e.Name(), Rule: "does not belong here: it is no segment", Stray: true})
			continue
		}
		size := int64(0)
		if i, err := e.Info(); err == nil {
			size = i.Size()
		}
		s.firsts, s.sizes = append(s.firsts, first), append(s.sizes, size)
	}
	switch {
	case len(s.firsts) == 0:
		s.lose(0, math.MaxUint64, Problem{File: dir, Rule: "has no segments"})
	case floor:
		s.next, s.floor = s.firsts[0], s.firsts[0]
	}
	return s, nil
}

func (s *stream) total() (n uint64) {
	for _, z := range s.sizes {
		n += uint64(z)
	}
	return n
}

// lose notes a hole.
func (s *stream) lose(from, to uint64, at Problem) *hole {
	at.Record = &from
	h := &hole{from: from, to: to, at: at}
	if to != math.MaxUint64 && to-from > 1 {
		h.at.Rule += fmt.Sprintf("; records %d to %d cannot be read", from, to-1)
	}
	s.holes = append(s.holes, h)
	return h
}

// record returns the next record that can be read, ok false at the end.
func (s *stream) record() (r rec, ok bool, err error) {
	for {
		if s.file == nil {
			if more, err := s.open(); !more || err != nil {
				return rec{}, false, err
			}
			continue
		}
		data, size, more, rule := segment.Split(s.buf, s.next)
		switch {
		case rule == "" && size > 0 && more == 0:
			r := rec{s.next, data, s.name, s.begin}
			s.buf, s.begin = s.buf[size:], s.begin+int64(size)
			s.next++
			return r, true, nil
		case rule == "" && !s.eof:
			if err := s.fill(more); err != nil {
				s.broken(fmt.Sprintf("cannot be read: %v", err), nil)
			}
		case rule == "" && len(s.buf) == 0:
			s.end()
		default:
			if rule == "" {
				rule = "the file ends within a record"
			}
			s.broken(rule, data)
		}
	}
}

// open begins the next segment.
func (s *stream) open() (more bool, err error) {
	if s.at == len(s.firsts) {
		return false, nil
	}
	first := s.firsts[s.at]
	s.name, s.limit = s.dir+"/"+segment.Name(first), math.MaxUint64
	if s.at+1 < len(s.firsts) {
		s.limit = s.firsts[s.at+1]
	}
	if first < s.next {
		at := int64(0)
		s.lose(first, first, Problem{File: s.name, Offset: &at, Rule: fmt.Sprintf("begins with record %d, which the segment before has; record %d is due", first, s.next)})
	}
	if first > s.next {
		s.lose(s.next, first, Problem{File: s.dir + "/" + segment.Name(s.next), Rule: "is missing"})
	}
	s.next, s.begin, s.buf, s.eof = first, 0, nil, false
	if s.file, err = s.fsys.Open(s.name); err != nil {
		s.lose(first, s.limit, Problem{File: s.name, Rule: fmt.Sprintf("cannot be read: %v", err)})
		s.next = s.limit
		s.at++
		return s.at < len(s.firsts), nil
	}
	for len(s.buf) < segment.HeaderSize && !s.eof {
		if err := s.fill(segment.HeaderSize); err != nil {
			s.broken(fmt.Sprintf("cannot be read: %v", err), nil)
			return true, nil
		}
	}
	want := segment.AppendHeader(nil, first)
	if len(s.buf) < len(want) || !slices.Equal(s.buf[:len(want)], want) {
		at := int64(0)
		if other, ok := segment.ParseHeader(s.buf); ok && other != first {
			s.lose(first, s.limit, Problem{File: s.name, Offset: &at, Rule: fmt.Sprintf("is the segment that begins with record %d, or one of another journal", other)})
			s.next = s.limit
			if s.limit == math.MaxUint64 {
				s.next = first
			}
			s.close()
			return true, nil
		}
		// Its frames say themselves which records they are.
		h := s.lose(first, first, Problem{File: s.name, Offset: &at, Rule: "segment header: is not that of this segment"})
		if len(s.buf) < len(want) {
			h.to = s.limit
			h.torn = s.torn(first)
			s.next = s.limit
			s.close()
			return true, nil
		}
	}
	s.buf, s.begin = s.buf[len(want):], int64(len(want))
	return true, nil
}

// fill reads on, so that at least n bytes are there, or the file has ended.
func (s *stream) fill(n int) error {
	// The bytes before may be in use: they are left as they are.
	b := make([]byte, len(s.buf), max(n, len(s.buf)+int(min(chunk, s.sizes[s.at]+1))))
	copy(b, s.buf)
	for len(b) < n {
		m, err := s.file.Read(b[len(b):cap(b)])
		b, s.read = b[:len(b)+m], s.read+uint64(m)
		if errors.Is(err, io.EOF) {
			s.eof = true
			break
		}
		if err != nil {
			s.buf = b
			return err
		}
	}
	s.buf = b
	return nil
}

func (s *stream) close() {
	// Nothing was written: there is nothing to lose in closing.
	_ = s.file.Close()
	s.file, s.buf = nil, nil
	s.at++
}

// end closes a segment that was read to its end.
func (s *stream) end() {
	if s.limit != math.MaxUint64 && s.next < s.limit {
		s.lose(s.next, s.limit, Problem{File: s.dir + "/" + segment.Name(s.next),
			Rule: fmt.Sprintf("is missing, or %s was cut at offset %d", s.name, s.begin)})
		s.next = s.limit
	}
	s.close()
}

// broken notes damage where the next frame should be, and finds the next one
// behind it.
func (s *stream) broken(rule string, data []byte) {
	at := s.begin
	h := s.lose(s.next, s.limit, Problem{File: s.name, Offset: &at, Rule: rule})
	h.data = data
	h.at.Rule = rule
	last := s.limit == math.MaxUint64
	for {
		skip := min(1, len(s.buf))
		i, n, ok := segment.Find(s.buf[skip:], s.next+1, s.limit)
		if !ok && !s.eof {
			if rule := s.fill(len(s.buf) + chunk); rule != nil {
				break // the rest cannot be read either
			}
			continue
		}
		if ok {
			s.begin += int64(skip + i)
			s.buf = s.buf[skip+i:]
			h.to, s.next = n, n
			if n-h.from > 1 {
				h.at.Rule += fmt.Sprintf("; records %d to %d cannot be read", h.from, n-1)
			}
			return
		}
		break
	}
	if last {
		h.torn = s.torn(s.firsts[s.at])
	} else if h.to-h.from > 1 {
		h.at.Rule += fmt.Sprintf("; records %d to %d cannot be read", h.from, h.to-1)
	}
	if last {
		s.next = h.from
	} else {
		s.next = s.limit
	}
	s.close()
}

// torn reports whether an interrupted append explains what is wrong at the end of
// the last segment.
func (s *stream) torn(first uint64) bool {
	if s.limit != math.MaxUint64 {
		return false
	}
	file, err := s.fsys.Open(s.name)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }() // only read from
	sc, err := segment.NewScanner(file, path.Base(s.name), first)
	for err == nil {
		_, err = sc.Append()
	}
	if errors.Is(err, io.EOF) {
		return false
	}
	if sc != nil {
		b, rerr := fs.ReadFile(s.fsys, s.name)
		if rerr != nil {
			return false
		}
		err = segment.Classify(sc, err, b[min(sc.Offset(), int64(len(b))):])
	}
	return errors.Is(err, segment.ErrTorn)
}

// place is where the record after the last one would be: there, or in a segment of
// its own that is missing.
func (s *stream) place() Problem {
	n := s.next
	p := Problem{File: s.dir, Record: &n}
	if s.name != "" {
		at := s.begin
		p.File, p.Offset = s.name, &at
	}
	p.Rule = fmt.Sprintf("it is cut here, or %s/%s is missing: ", s.dir, segment.Name(n))
	return p
}

// Salvage hands out what can be read of a journal, however damaged it is, with the
// file that each record is in, and returns the number of the record after the
// last. Nothing else is checked. It stops with f's error.
func Salvage(fsys fs.FS, dir string, f func(n uint64, rec []byte, file string) error) (next uint64, err error) {
	s, err := openStream(fsys, dir, true)
	if err != nil {
		return 0, err
	}
	for {
		r, ok, err := s.record()
		if ok {
			err = f(r.n, r.data, r.file)
		}
		if !ok || err != nil {
			if s.file != nil {
				s.close()
			}
			return s.next, err
		}
	}
}
