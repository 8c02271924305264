package seglog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// Span is one segment of a log: records First to Next−1.
type Span struct {
	First, Next uint64
	// Last is set for the segment that is appended to.
	Last bool
}

// Segments returns the segments, oldest first.
func (l *Log) Segments() []Span {
	l.mu.RLock()
	defer l.mu.RUnlock()
	out := make([]Span, len(l.segs))
	for i, s := range l.segs {
		out[i] = Span{First: s.first, Next: l.end(i), Last: i == len(l.segs)-1}
	}
	return out
}

// end is the number after the last record of segment i. It needs mu.
func (l *Log) end(i int) uint64 {
	if i+1 < len(l.segs) {
		return l.segs[i+1].first
	}
	return l.next
}

// What trash calls the files in it.
const (
	freshPrefix = "new-"
	wipedPrefix = "old-"
)

// Rewrite replaces a segment by one in which f has had a look at each record:
// what it returns takes the record's place. Records keep their numbers. Where f
// changes nothing, nothing is written. The segment that is appended to cannot be
// rewritten: [Log.Roll] ends it.
//
// The content before is overwritten before it is let go of. trash is a folder on
// the same file system for what is on its way in and out; after a crash, before
// the log is opened, [Sweep] ends what was begun. Whatever the moment, the
// segment is as it was or as it is to be.
//
// A [OpenReader] that has the segment open reads damage from then on, until its
// [Log.Renew]. Appends go on meanwhile; dropping and cutting must not, nor
// another Rewrite.
func (l *Log) Rewrite(first uint64, trash string, f func(i uint64, rec []byte) []byte) (changed int, err error) {
	if l.readOnly {
		return 0, errors.New("seglog: opened for reading only")
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("seglog %s: rewriting %s: %w", l.dir, segment.Name(first), err)
		}
	}()
	l.mu.RLock()
	at := slices.IndexFunc(l.segs, func(s *seg) bool { return s.first == first })
	var old *seg
	var end uint64
	if at >= 0 && at < len(l.segs)-1 {
		old, end = l.segs[at], l.end(at)
	}
	l.mu.RUnlock()
	if old == nil {
		return 0, errors.New("is no segment that is complete")
	}
	name := segment.Name(first)
	out, fresh := segment.AppendHeader(nil, first), &seg{first: first}
	off := int64(segment.HeaderSize)
	for i := first; i < end; i++ {
		rec, next, err := segment.ReadFrame(old.file, name, off, i)
		if err != nil {
			return 0, err
		}
		off = next
		if (i-first)%stride == 0 {
			fresh.offsets = append(fresh.offsets, int64(len(out)))
		}
		got := f(i, rec)
		if !slices.Equal(got, rec) {
			changed++
		}
		out = segment.AppendFrames(out, i, got)
	}
	if changed == 0 {
		return 0, nil
	}
	path := filepath.Join(l.dir, name)
	tag := filepath.Base(l.dir) + "-" + name
	tmp, doomed := filepath.Join(trash, freshPrefix+tag), filepath.Join(trash, wipedPrefix+tag)
	if err := l.hook("create", tmp); err != nil {
		return 0, err
	}
	file, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return 0, err
	}
	fresh.file = file
	err = l.write(file, out, 0)
	if err == nil {
		err = l.sync(file)
	}
	// The old content must not be lost sight of before it is overwritten.
	if err == nil {
		err = l.hook("link", doomed)
	}
	if err == nil {
		err = os.Link(path, doomed)
	}
	if err == nil {
		err = l.syncDir(trash)
	}
	if err == nil {
		err = l.hook("rename", path)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = l.syncDir(l.dir)
	}
	if err != nil {
		return 0, errors.Join(err, file.Close())
	}
	l.mu.Lock()
	if at >= len(l.segs) || l.segs[at] != old { // somebody has not kept to the rule
		l.mu.Unlock()
		return 0, errors.Join(errors.New("was dropped meanwhile"), file.Close())
	}
	l.segs[at] = fresh
	l.mu.Unlock()
	return changed, errors.Join(old.file.Close(), wipe(doomed, l.hook))
}

// WipeBefore is [Log.DropBefore], and overwrites what it drops.
func (l *Log) WipeBefore(i uint64, trash string) error {
	l.appending.Lock()
	defer l.appending.Unlock()
	if l.readOnly {
		return errors.New("seglog: opened for reading only")
	}
	for {
		l.mu.RLock()
		done := len(l.segs) < 2 || l.segs[1].first > i
		sg := l.segs[0]
		l.mu.RUnlock()
		if done {
			return nil
		}
		path := filepath.Join(l.dir, segment.Name(sg.first))
		doomed := filepath.Join(trash, wipedPrefix+filepath.Base(l.dir)+"-"+segment.Name(sg.first))
		err := l.hook("rename", doomed)
		if err == nil {
			err = os.Rename(path, doomed)
		}
		if err == nil {
			err = errors.Join(l.syncDir(trash), l.syncDir(l.dir))
		}
		if err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
		l.mu.Lock()
		l.segs = l.segs[1:]
		l.mu.Unlock()
		if err := errors.Join(sg.file.Close(), wipe(doomed, l.hook)); err != nil {
			return fmt.Errorf("seglog %s: %w", l.dir, err)
		}
	}
}

// wipe overwrites a file with zeros and removes it.
func wipe(path string, hook func(op, path string) error) (err error) {
	if err := hook("write", path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	zeros := make([]byte, 1<<20)
	for at := int64(0); err == nil && at < st.Size(); at += int64(len(zeros)) {
		_, err = f.WriteAt(zeros[:min(int64(len(zeros)), st.Size()-at)], at)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := hook("remove", path); err != nil {
		return err
	}
	return os.Remove(path)
}

// Sweep ends what a crash interrupted in a folder that was given to
// [Log.Rewrite] or [Log.WipeBefore] as trash. dirs are the logs that used it,
// none of them open. A folder that is not there is clean.
func Sweep(trash string, hook func(op, path string) error, dirs ...string) error {
	if hook == nil {
		hook = func(string, string) error { return nil }
	}
	es, err := os.ReadDir(trash)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range es {
		path := filepath.Join(trash, e.Name())
		tag, old := strings.CutPrefix(e.Name(), wipedPrefix)
		live := false
		for _, d := range dirs {
			name, mine := strings.CutPrefix(tag, filepath.Base(d)+"-")
			if !old || !mine {
				continue
			}
			a, err1 := os.Stat(path)
			b, err2 := os.Stat(filepath.Join(d, name))
			if errors.Is(err2, fs.ErrNotExist) {
				continue
			}
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			live = os.SameFile(a, b) // the new one has not taken its place
		}
		if !live { // a new one, too, has content that may be due by now
			if err := wipe(path, hook); err != nil {
				return err
			}
			continue
		}
		if err := hook("remove", path); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}

// Renew, of a log that was opened with [OpenReader], opens the segments again
// that the writer has rewritten since. [Log.Refresh] looks at new ones only.
func (l *Log) Renew() error {
	if !l.readOnly {
		return nil
	}
	l.appending.Lock()
	defer l.appending.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	end, size := l.next, l.size
	for k, sg := range l.segs {
		path := filepath.Join(l.dir, segment.Name(sg.first))
		now, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // dropped; Refresh finds out
		}
		if err != nil {
			return err
		}
		had, err := sg.file.Stat()
		if err != nil {
			return err
		}
		if os.SameFile(now, had) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		fresh := &seg{first: sg.first, file: f}
		s, err := segment.NewScanner(f, segment.Name(sg.first), sg.first)
		if err == nil {
			l.next = sg.first
			l.size, err = l.index(fresh, s, false)
		}
		last := k == len(l.segs)-1
		if !last {
			l.next, l.size = end, size
		}
		if err != nil {
			return errors.Join(fmt.Errorf("seglog %s: %w", l.dir, err), f.Close())
		}
		l.segs[k] = fresh
		if err := sg.file.Close(); err != nil {
			return err
		}
		if last {
			return nil
		}
	}
	return nil
}
