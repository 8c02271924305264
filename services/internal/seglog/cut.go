package seglog

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// Roll has the next append begin a new segment, so that what is appended from
// then on can be dropped apart from what was before. A segment in which there is
// nothing yet stays.
func (l *Log) Roll() error {
	l.appending.Lock()
	defer l.appending.Unlock()
	switch {
	case l.readOnly:
		return errors.New("seglog: opened for reading only")
	case l.broken != nil:
		return fmt.Errorf("%w: %w", ErrBroken, l.broken)
	case l.size <= int64(segment.HeaderSize):
		return nil
	}
	if err := l.begin(); err != nil {
		l.broken = err
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	return nil
}

// CutFrom removes the records from number i on, for a log whose writer finds
// that they belong to what was never finished. i must be where an append began:
// appends are there as a whole or not at all. The newest segments go first, so
// that a crash leaves no hole.
func (l *Log) CutFrom(i uint64) error {
	l.appending.Lock()
	defer l.appending.Unlock()
	if l.readOnly {
		return errors.New("seglog: opened for reading only")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if i >= l.next {
		return nil
	}
	sg := l.segOf(i)
	if sg == nil {
		return fmt.Errorf("%w: %d", ErrNotFound, i)
	}
	off, err := l.offset(sg, i)
	if err != nil {
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	if _, err := segment.ResumeScanner(io.NewSectionReader(sg.file, off, math.MaxInt64-off), segment.Name(sg.first), off, i).Append(); err != nil {
		return fmt.Errorf("seglog %s: cutting from record %d: %w", l.dir, i, err)
	}
	for last := l.segs[len(l.segs)-1]; last != sg; last = l.segs[len(l.segs)-1] {
		if err := l.remove(last.first); err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
		l.segs = l.segs[:len(l.segs)-1]
		if err := last.file.Close(); err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
	}
	if err := l.truncate(sg.first, off); err != nil {
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	if err := l.sync(sg.file); err != nil {
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	sg.offsets = sg.offsets[:(i-sg.first+stride-1)/stride]
	l.next, l.size = i, off
	return nil
}

// offset finds where a record's frame begins. It needs mu.
func (l *Log) offset(sg *seg, i uint64) (off int64, err error) {
	at := (i - sg.first) / stride
	off = sg.offsets[at]
	for r := sg.first + at*stride; r < i; r++ {
		if off, err = segment.SkipFrame(sg.file, segment.Name(sg.first), off, r); err != nil {
			return 0, err
		}
	}
	return off, nil
}
