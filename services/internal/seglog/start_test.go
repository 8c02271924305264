package seglog

import (
	"errors"
	"strings"
	"testing"
)

func TestStartAt(t *testing.T) {
	dir := t.TempDir()
	open := func(o Options) *Log {
		t.Helper()
		l, err := Open(dir, o)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	closed := func(l *Log) {
		t.Helper()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	l := open(Options{})
	if err := l.StartAt(41); err != nil {
		t.Fatal(err)
	}
	if l.First() != 41 || l.Next() != 41 {
		t.Errorf("got records %d to %d, want none from 41 on", l.First(), l.Next())
	}
	closed(l)
	l = open(Options{})
	if n, err := l.Append([]byte("a"), []byte("b")); err != nil || n != 41 {
		t.Errorf("first append: got %d, %v, want 41", n, err)
	}
	if err := l.StartAt(50); err == nil || !strings.Contains(err.Error(), "there are records") {
		t.Errorf("with records in it: got %v", err)
	}
	closed(l)
	l = open(Options{})
	if b, err := l.Read(42); err != nil || string(b) != "b" || l.First() != 41 || l.Next() != 43 {
		t.Errorf("opened again: got %q, %v of %d to %d, want b of 41 to 43", b, err, l.First(), l.Next())
	}
	if _, err := l.Read(40); !errors.Is(err, ErrNotFound) {
		t.Errorf("before the first: got %v", err)
	}
	// What is cut to nothing may begin anew.
	if err := l.CutFrom(41); err != nil {
		t.Fatal(err)
	}
	if err := l.StartAt(0); err != nil || l.Next() != 0 {
		t.Errorf("back at 0: got %d, %v", l.Next(), err)
	}
	closed(l)

	// Whatever the operation at which it stops, it begins with 0 or with 7.
	stop := errors.New("stop")
	for at := 0; ; at++ {
		dir = t.TempDir()
		closed(open(Options{}))
		n := -1
		l, err := Open(dir, Options{Hook: func(string, string) error {
			if n >= 0 {
				if n == at {
					return stop
				}
				n++
			}
			return nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		n = 0
		err = l.StartAt(7)
		if err != nil {
			if _, err := l.Append([]byte("x")); !errors.Is(err, ErrBroken) {
				t.Errorf("after operation %d failed: append gives %v, want it broken", at, err)
			}
		}
		_ = l.Close() // maybe broken
		l = open(Options{})
		if f := l.First(); f != l.Next() || f != 0 && f != 7 {
			t.Errorf("stopped at operation %d: got %d to %d, want nothing from 0 or 7 on", at, f, l.Next())
		}
		closed(l)
		if err == nil {
			if at < 4 {
				t.Errorf("only %d operations", at)
			}
			return
		}
	}
}
