// Package seglog is an append-only file of records that survives power cuts:
// one write and one fdatasync for everything appended together, durable on
// return.
//
// The format, and what is told apart as torn or damaged, is pkg/ledger/segment.
// A torn append at the very end is cut off when the log is opened for writing:
// its Append never returned. Damage anywhere else is an error that names file
// and offset; nothing is repaired by dropping it.
//
// One process writes; any number read with [OpenReader].
package seglog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// ErrTorn tells a torn tail from damage; see [segment.ErrTorn].
var ErrTorn = segment.ErrTorn

// ErrBroken is what a log answers after an append failed: what is on disk is
// not known. Open it again.
var ErrBroken = errors.New("seglog: an append failed before")

// Options are all optional.
type Options struct {
	// SegmentBytes is the size from which on a new segment is begun; 64 MiB.
	SegmentBytes int64
	// Hook, for tests, is called before each operation that changes a file:
	// create, write, sync, syncdir, truncate, remove. If it returns an error the
	// operation is not carried out and fails with it.
	Hook func(op, path string) error
}

// stride is how far apart the offsets are that are kept in memory.
const stride = 16

type seg struct {
	first   uint64
	file    *os.File
	offsets []int64 // of records first, first+stride, …
}

// Log is an open folder. Its methods may be called concurrently; appends take
// turns.
type Log struct {
	dir      string
	o        Options
	readOnly bool

	appending sync.Mutex // taken before mu; guards size, buf, broken
	size      int64      // of the last segment
	buf       []byte
	broken    error

	mu   sync.RWMutex // guards what follows
	segs []*seg
	next uint64
}

// Open opens a folder for appending and reading, and makes it if there is none.
// It checks every byte.
func Open(dir string, o Options) (*Log, error) {
	if o.SegmentBytes <= 0 {
		o.SegmentBytes = 64 << 20
	}
	l := &Log{dir: dir, o: o}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := l.hook("create", dir); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	// Also where it was there: a crash may have come before this.
	if err := l.syncDir(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	if err := l.load(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// OpenReader opens a folder that another Log, maybe in another process, appends
// to. A folder that does not exist yet is empty. What is appended later is seen
// after [Log.Refresh].
func OpenReader(dir string) (*Log, error) {
	l := &Log{dir: dir, readOnly: true}
	if err := l.Refresh(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Log) hook(op, path string) error {
	if l.o.Hook == nil {
		return nil
	}
	return l.o.Hook(op, path)
}

func (l *Log) load() error {
	firsts, err := segment.List(os.DirFS(l.dir), ".")
	if err != nil {
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	for i, first := range firsts {
		last := i == len(firsts)-1
		if i > 0 && first != l.next {
			return fmt.Errorf("seglog %s: %w", l.dir, &segment.Damage{File: segment.Name(first), Record: l.next,
				Rule: fmt.Sprintf("begins with record %d, record %d is due: a segment is missing or cut", first, l.next)})
		}
		end, err := l.add(first, last)
		var d *segment.Damage
		if last && errors.Is(err, ErrTorn) && errors.As(err, &d) {
			if d.Offset < int64(segment.HeaderSize) {
				// The segment was begun and never used.
				if err := l.remove(first); err != nil {
					return err
				}
				l.next = first
				return l.begin()
			}
			if err := l.truncate(first, d.Offset); err != nil {
				return err
			}
			end, err = d.Offset, nil
		}
		if err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
		l.size = end
	}
	if len(firsts) == 0 {
		return l.begin()
	}
	// What the last append before a crash wrote may not have been synced, and
	// from now on readers rely on it.
	return l.sync(l.segs[len(l.segs)-1].file)
}

// add opens a segment and indexes it up to its last whole append. With an error
// the segment stays open in l.segs if its header was right.
func (l *Log) add(first uint64, last bool) (end int64, err error) {
	path := filepath.Join(l.dir, segment.Name(first))
	flag := os.O_RDONLY
	if last && !l.readOnly {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return 0, err
	}
	s, err := segment.NewScanner(f, segment.Name(first), first)
	if err != nil {
		return 0, errors.Join(err, f.Close())
	}
	sg := &seg{first: first, file: f}
	l.segs = append(l.segs, sg)
	l.next = first
	return l.index(sg, s, last)
}

// index reads appends until the end of the file.
func (l *Log) index(sg *seg, s *segment.Scanner, last bool) (end int64, err error) {
	for {
		frames, err := s.Append()
		if errors.Is(err, io.EOF) {
			return s.Offset(), nil
		}
		var d *segment.Damage
		if errors.As(err, &d) {
			if !last {
				return s.Offset(), d
			}
			if l.readOnly && segment.Short(err) {
				// The writer may be in the middle of it, and have gone on since.
				c := *d
				c.Torn = true
				return s.Offset(), &c
			}
			st, err2 := sg.file.Stat()
			if err2 != nil {
				return s.Offset(), err2
			}
			tail := make([]byte, max(0, st.Size()-s.Offset()))
			if _, err := sg.file.ReadAt(tail, s.Offset()); err != nil && !errors.Is(err, io.EOF) {
				return s.Offset(), err
			}
			return s.Offset(), segment.Classify(s, err, tail)
		}
		if err != nil {
			return s.Offset(), err
		}
		for _, fr := range frames {
			if (fr.Record-sg.first)%stride == 0 {
				sg.offsets = append(sg.offsets, fr.Offset)
			}
		}
		l.next = s.Next()
	}
}

// begin starts a segment at l.next: header and name are durable before the
// first record goes in.
func (l *Log) begin() error {
	path := filepath.Join(l.dir, segment.Name(l.next))
	if err := l.hook("create", path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	h := segment.AppendHeader(nil, l.next)
	err = l.write(f, h, 0)
	if err == nil {
		err = l.sync(f)
	}
	if err == nil {
		err = l.syncDir(l.dir)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.size = int64(len(h))
	l.mu.Lock()
	l.segs = append(l.segs, &seg{first: l.next, file: f})
	l.mu.Unlock()
	return nil
}

func (l *Log) write(f *os.File, b []byte, at int64) error {
	if err := l.hook("write", f.Name()); err != nil {
		return err
	}
	_, err := f.WriteAt(b, at)
	return err
}

func (l *Log) sync(f *os.File) error {
	if err := l.hook("sync", f.Name()); err != nil {
		return err
	}
	return datasync(f)
}

func (l *Log) syncDir(dir string) error {
	if err := l.hook("syncdir", dir); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (l *Log) truncate(first uint64, size int64) error {
	f := l.segs[len(l.segs)-1].file
	if err := l.hook("truncate", f.Name()); err != nil {
		return err
	}
	return f.Truncate(size)
}

func (l *Log) remove(first uint64) error {
	path := filepath.Join(l.dir, segment.Name(first))
	if err := l.hook("remove", path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return l.syncDir(l.dir)
}

// Append writes the records as one append, all or nothing, and returns the
// number of the first. They are durable on return. After an error the log
// answers [ErrBroken] to further appends. Appending nothing does nothing.
func (l *Log) Append(records ...[]byte) (first uint64, err error) {
	l.appending.Lock()
	defer l.appending.Unlock()
	first = l.next // only changed with l.appending held
	switch {
	case l.readOnly:
		return 0, errors.New("seglog: opened for reading only")
	case l.broken != nil:
		return 0, fmt.Errorf("%w: %w", ErrBroken, l.broken)
	case len(records) == 0:
		return first, nil
	}
	for i, r := range records {
		if len(r) > segment.MaxRecord {
			return 0, fmt.Errorf("seglog: records[%d]: %d bytes, at most %d", i, len(r), segment.MaxRecord)
		}
	}
	if err := l.append(records); err != nil {
		l.broken = err
		return 0, fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	return first, nil
}

// keepBuffer bounds the memory that stays allocated between appends.
const keepBuffer = 4 << 20

func (l *Log) append(records [][]byte) error {
	if l.size >= l.o.SegmentBytes {
		if err := l.begin(); err != nil {
			return err
		}
	}
	l.buf = segment.AppendFrames(l.buf[:0], l.next, records...)
	sg := l.segs[len(l.segs)-1]
	if err := l.write(sg.file, l.buf, l.size); err != nil {
		return err
	}
	if err := l.sync(sg.file); err != nil {
		return err
	}
	at := l.size
	l.mu.Lock()
	for i, r := range records {
		if (l.next+uint64(i)-sg.first)%stride == 0 {
			sg.offsets = append(sg.offsets, at)
		}
		at += int64(len(r)) + segment.Overhead
	}
	l.next += uint64(len(records))
	l.mu.Unlock()
	l.size = at
	if cap(l.buf) > keepBuffer {
		l.buf = nil
	}
	return nil
}

// First returns the number of the oldest record that is kept.
func (l *Log) First() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if len(l.segs) == 0 {
		return 0
	}
	return l.segs[0].first
}

// Next returns the number that the next record will have.
func (l *Log) Next() uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.next
}

// ErrNotFound is returned for records that were dropped or do not exist yet.
var ErrNotFound = errors.New("seglog: no such record")

// Read returns one record, checked. Errors of the content are a
// [segment.Damage].
func (l *Log) Read(i uint64) ([]byte, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	rec, _, _, err := l.read(i)
	return rec, err
}

// segOf returns the segment that holds a record, nil if none does. It needs mu.
func (l *Log) segOf(i uint64) *seg {
	if i >= l.next {
		return nil
	}
	k := sort.Search(len(l.segs), func(k int) bool { return l.segs[k].first > i })
	if k == 0 {
		return nil
	}
	return l.segs[k-1]
}

// read needs mu. It also returns where the next record of the segment is.
func (l *Log) read(i uint64) (rec []byte, sg *seg, next int64, err error) {
	if sg = l.segOf(i); sg == nil {
		return nil, nil, 0, fmt.Errorf("%w: %d", ErrNotFound, i)
	}
	name := segment.Name(sg.first)
	at := (i - sg.first) / stride
	off, r := sg.offsets[at], sg.first+at*stride
	for ; r < i; r++ {
		if off, err = segment.SkipFrame(sg.file, name, off, r); err != nil {
			return nil, nil, 0, fmt.Errorf("seglog %s: %w", l.dir, err)
		}
	}
	rec, next, err = segment.ReadFrame(sg.file, name, off, i)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	return rec, sg, next, nil
}

// Scan calls f with each record from number from on, up to what was there when
// it began. It may run beside appends. It stops with f's error.
func (l *Log) Scan(from uint64, f func(i uint64, rec []byte) error) error {
	end := l.Next()
	var at int64
	var in *seg
	for i := from; i < end; i++ {
		var rec []byte
		var err error
		l.mu.RLock()
		// Within a segment each record tells where the next one is.
		if in != nil && l.segOf(i) == in {
			rec, at, err = segment.ReadFrame(in.file, segment.Name(in.first), at, i)
			if err != nil {
				err = fmt.Errorf("seglog %s: %w", l.dir, err)
			}
		} else {
			rec, in, at, err = l.read(i)
		}
		l.mu.RUnlock()
		if err != nil {
			return err
		}
		if err := f(i, rec); err != nil {
			return err
		}
	}
	return nil
}

// DropBefore removes whole segments that hold only records before i. The oldest
// go first, so that a crash leaves no hole.
func (l *Log) DropBefore(i uint64) error {
	l.appending.Lock()
	defer l.appending.Unlock()
	if l.readOnly {
		return errors.New("seglog: opened for reading only")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.segs) > 1 && l.segs[1].first <= i {
		sg := l.segs[0]
		if err := l.remove(sg.first); err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
		l.segs = l.segs[1:]
		if err := sg.file.Close(); err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
	}
	return nil
}

// Refresh, of a log that was opened with [OpenReader], takes in what has been
// appended since. An append that is not all there yet is left for later.
func (l *Log) Refresh() error {
	if !l.readOnly {
		return nil
	}
	l.appending.Lock()
	defer l.appending.Unlock()
	firsts, err := segment.List(os.DirFS(l.dir), ".")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.segs) > 0 && len(firsts) > 0 && l.segs[0].first < firsts[0] { // dropped by the writer
		if err := l.segs[0].file.Close(); err != nil {
			return err
		}
		l.segs = l.segs[1:]
	}
	for i, first := range firsts {
		last := i == len(firsts)-1
		var err error
		switch {
		case i < len(l.segs)-1:
			continue // read before, and complete since another follows
		case i == len(l.segs)-1:
			sg := l.segs[i]
			if _, err := sg.file.Seek(l.size, io.SeekStart); err != nil {
				return err
			}
			l.size, err = l.index(sg, segment.ResumeScanner(sg.file, segment.Name(first), l.size, l.next), last)
		default:
			if i > 0 && first != l.next {
				if l.segs[len(l.segs)-1].first == firsts[i-1] {
					err = &segment.Damage{File: segment.Name(first), Record: l.next,
						Rule: fmt.Sprintf("begins with record %d, record %d is due: a segment is missing or cut", first, l.next)}
					break
				}
			}
			var end int64
			if end, err = l.add(first, last); err == nil || errors.Is(err, ErrTorn) && end > 0 {
				l.size = end
			}
		}
		if err != nil && (!last || !errors.Is(err, ErrTorn)) {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
	}
	return nil
}

// Close closes the files. Everything appended is durable already.
func (l *Log) Close() error {
	l.appending.Lock()
	defer l.appending.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, s := range l.segs {
		errs = append(errs, s.file.Close())
	}
	l.segs = nil
	if l.broken == nil {
		l.broken = errors.New("closed")
	}
	return errors.Join(errs...)
}

// Check reads a folder offline, without changing anything, and calls f with
// every record. Its error is a [segment.Damage] that names file and offset; a
// torn tail can be told with errors.Is(err, [ErrTorn]).
func Check(dir string, f func(i uint64, rec []byte) error) error {
	_, err := segment.Walk(os.DirFS(dir), ".", 0, func(i uint64, rec []byte, _ string, _ int64) error { return f(i, rec) })
	return err
}
