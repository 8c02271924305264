package seglog

import (
	"errors"
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// StartAt has a log in which there is nothing begin with record i. After a crash
// it may begin with record 0, as if it was never called.
func (l *Log) StartAt(i uint64) error {
	l.appending.Lock()
	defer l.appending.Unlock()
	switch {
	case l.readOnly:
		return errors.New("seglog: opened for reading only")
	case l.broken != nil:
		return fmt.Errorf("%w: %w", ErrBroken, l.broken)
	case len(l.segs) != 1 || l.next != l.segs[0].first || l.size > int64(segment.HeaderSize):
		return fmt.Errorf("seglog %s: cannot begin with record %d: there are records", l.dir, i)
	case l.next == i:
		return nil
	}
	err := l.remove(l.segs[0].first)
	if err == nil {
		err = l.segs[0].file.Close()
	}
	if err == nil {
		l.mu.Lock()
		l.segs, l.next = nil, i
		l.mu.Unlock()
		err = l.begin()
	}
	if err != nil {
		l.broken = err
		return fmt.Errorf("seglog %s: %w", l.dir, err)
	}
	return nil
}
