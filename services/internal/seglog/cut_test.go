package seglog

import (
	"strings"
	"testing"
)

func TestRollBeginsASegment(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{})
	fill(t, l, 10)
	for range 3 { // an empty segment is not followed by another
		if err := l.Roll(); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, l, 20)
	if got := len(files(t, dir)); got != 2 {
		t.Errorf("got %d segments, want 2", got)
	}
	if err := l.DropBefore(10); err != nil {
		t.Fatal(err)
	}
	checkAll(t, l, 10, 20)
}

// TestCutFrom: wherever it is cut, the log goes on as if nothing more had been
// appended, also after it was opened again.
func TestCutFrom(t *testing.T) {
	const n = 60
	for at := 3; at < n; at += 6 { // appends of 1, 2, 3 begin at multiples of 6 and 1 and 3 after
		for _, o := range []Options{{}, {SegmentBytes: 300}} {
			dir := t.TempDir()
			l := open(t, dir, o)
			fill(t, l, n)
			if err := l.CutFrom(uint64(at)); err != nil {
				t.Fatal(err)
			}
			checkAll(t, l, 0, at)
			for i := at; i < n; i++ {
				mustAppend(t, l, uint64(i), rec(i, i%90))
			}
			checkAll(t, l, 0, n)
			if err := l.CutFrom(uint64(at)); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			checkAll(t, open(t, dir, o), 0, at)
		}
	}
	l := open(t, t.TempDir(), Options{})
	mustAppend(t, l, 0, rec(0, 0), rec(1, 1), rec(2, 2))
	if err := l.CutFrom(1); err == nil || !strings.Contains(err.Error(), "position 1") {
		t.Errorf("cutting within an append: got %v, want it refused", err)
	}
	checkAll(t, l, 0, 3)
	if err := l.CutFrom(3); err != nil {
		t.Errorf("cutting nothing: got %v", err)
	}
}
