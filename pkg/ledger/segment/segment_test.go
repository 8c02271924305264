package segment_test

import (
	"bytes"
	"errors"
	"testing"
	"testing/fstest"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

func walk(b []byte) (recs [][]byte, err error) {
	fsys := fstest.MapFS{segment.Name(5): &fstest.MapFile{Data: b}}
	_, err = segment.Walk(fsys, ".", 0, func(_ uint64, rec []byte, _ string, _ int64) error {
		recs = append(recs, rec)
		return nil
	})
	return recs, err
}

func TestAppendsAreWhole(t *testing.T) {
	b := segment.AppendHeader(nil, 5)
	b = segment.AppendFrames(b, 5, []byte("one"), nil, []byte("three"))
	end := len(b)
	b = segment.AppendFrames(b, 8, []byte("four"), []byte("five"))
	if recs, err := walk(b); err != nil || len(recs) != 5 || string(recs[4]) != "five" {
		t.Fatalf("got %d records, %v, want 5", len(recs), err)
	}
	for cut := end + 1; cut < len(b); cut++ {
		if recs, err := walk(b[:cut]); !errors.Is(err, segment.ErrTorn) || len(recs) != 3 {
			t.Fatalf("cut at %d: got %d records, %v, want the first three and torn", cut, len(recs), err)
		}
	}
	// An append that another follows cannot be torn.
	hole := bytes.Clone(b)
	clear(hole[segment.HeaderSize : segment.HeaderSize+40])
	if _, err := walk(hole); err == nil || errors.Is(err, segment.ErrTorn) {
		t.Errorf("zeros before a later append: got %v, want damage", err)
	}
	// Nor is one that was moved.
	if _, err := walk(append(segment.AppendHeader(nil, 5), segment.AppendFrames(nil, 6, []byte("x"))...)); err == nil || errors.Is(err, segment.ErrTorn) {
		t.Errorf("frame of another record: got %v, want damage", err)
	}
}

func TestNames(t *testing.T) {
	for _, n := range []uint64{0, 1, 1 << 63} {
		if got, ok := segment.ParseName(segment.Name(n)); !ok || got != n {
			t.Errorf("%d: got %d, %v", n, got, ok)
		}
	}
	for _, bad := range []string{"", "1.seg", "0000000000000000000x.seg", "00000000000000000001", "+0000000000000000001.seg", "99999999999999999999.seg"} {
		if got, ok := segment.ParseName(bad); ok {
			t.Errorf("%q: got %d, want none", bad, got)
		}
	}
}

// FuzzWalk: whatever is in a file, what is read without an error is what was
// written.
func FuzzWalk(f *testing.F) {
	b := segment.AppendFrames(segment.AppendHeader(nil, 5), 5, []byte("one"), []byte("two"))
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add(append(bytes.Clone(b), make([]byte, 600)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		recs, err := walk(b)
		if err != nil {
			return
		}
		again, err := walk(segment.AppendFrames(segment.AppendHeader(nil, 5), 5, recs...))
		if err != nil || len(again) != len(recs) {
			t.Errorf("got %d records, %v, want %d", len(again), err, len(recs))
		}
	})
}
