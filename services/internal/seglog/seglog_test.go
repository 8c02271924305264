package seglog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// rec returns a record that is different for each i, with zeros in it.
func rec(i, size int) []byte {
	r := rand.New(rand.NewPCG(uint64(i), 7))
	b := make([]byte, size)
	for k := range b {
		b[k] = byte(r.UintN(200))
	}
	return b
}

func open(t *testing.T, dir string, o Options) *Log {
	t.Helper()
	l, err := Open(dir, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func mustAppend(t *testing.T, l *Log, want uint64, recs ...[]byte) {
	t.Helper()
	first, err := l.Append(recs...)
	if err != nil || first != want {
		t.Fatalf("append: got first %d, %v, want %d", first, err, want)
	}
}

// fill appends 1, 2, 3, 1, 2, 3 … records at a time until there are n.
func fill(t *testing.T, l *Log, n int) {
	t.Helper()
	for k := 0; int(l.Next()) < n; k++ {
		var rs [][]byte
		for i := int(l.Next()); i < n && len(rs) < k%3+1; i++ {
			rs = append(rs, rec(i, i%90))
		}
		mustAppend(t, l, l.Next(), rs...)
	}
}

func checkAll(t *testing.T, l *Log, from, n int) {
	t.Helper()
	if int(l.First()) > from || int(l.Next()) != n {
		t.Fatalf("got records %d to %d, want %d to %d", l.First(), l.Next(), from, n)
	}
	i := from
	err := l.Scan(uint64(from), func(k uint64, b []byte) error {
		if int(k) != i || !bytes.Equal(b, rec(i, i%90)) {
			return fmt.Errorf("scan: record %d is not what was appended as %d", k, i)
		}
		i++
		return nil
	})
	if err != nil || i != n {
		t.Fatalf("scan: got to %d, %v, want %d", i, err, n)
	}
	for _, k := range rand.New(rand.NewPCG(1, 2)).Perm(n - from) {
		b, err := l.Read(uint64(from + k))
		if err != nil || !bytes.Equal(b, rec(from+k, (from+k)%90)) {
			t.Fatalf("read %d: got %d bytes, %v, want what was appended", from+k, len(b), err)
		}
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	m, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAppendReadReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := open(t, dir, Options{SegmentBytes: 1500})
	fill(t, l, 200)
	checkAll(t, l, 0, 200)
	if got := len(files(t, dir)); got < 5 {
		t.Fatalf("got %d segments, want several", got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir, Options{SegmentBytes: 1500})
	checkAll(t, l, 0, 200)
	fill(t, l, 230)
	checkAll(t, l, 0, 230)
	if _, err := l.Read(230); !errors.Is(err, ErrNotFound) {
		t.Errorf("read of a record that is not there: got %v, want ErrNotFound", err)
	}
	if err := l.DropBefore(100); err != nil {
		t.Fatal(err)
	}
	if l.First() == 0 || l.First() > 100 {
		t.Errorf("after DropBefore(100) the first is %d, want 1 to 100", l.First())
	}
	checkAll(t, l, 100, 230)
	if err := Check(dir, func(uint64, []byte) error { return nil }); err != nil {
		t.Errorf("check: %v", err)
	}
}

func TestReaderFollowsWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	r, err := OpenReader(dir)
	if err != nil || r.Next() != 0 {
		t.Fatalf("reader of nothing: got next %d, %v, want 0", r.Next(), err)
	}
	defer func() { _ = r.Close() }()
	l := open(t, dir, Options{SegmentBytes: 900})
	for n := 10; n <= 100; n += 10 {
		fill(t, l, n)
		if n == 50 {
			if err := l.DropBefore(40); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Refresh(); err != nil {
			t.Fatal(err)
		}
		checkAll(t, r, int(r.First()), n)
	}
	if _, err := r.Append([]byte("x")); err == nil {
		t.Error("append to a reader: got no error")
	}
	// Half of an append is in the file: the reader waits for the rest.
	last := files(t, dir)
	f, err := os.OpenFile(last[len(last)-1], os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	frame := segment.AppendFrames(nil, 100, rec(100, 10))
	for _, part := range [][]byte{frame[:30], frame[30:]} {
		if err := r.Refresh(); err != nil || r.Next() != 100 {
			t.Fatalf("with part of an append: next %d, %v, want 100", r.Next(), err)
		}
		if _, err := f.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Refresh(); err != nil || r.Next() != 101 {
		t.Fatalf("with the rest of it: next %d, %v, want 101", r.Next(), err)
	}
	_ = f.Close()
}

// TestTornTail cuts the file at every byte of the last append, and also lets
// everything from there read as zeros, as after a power cut.
func TestTornTail(t *testing.T) {
	base := t.TempDir()
	src := filepath.Join(base, "src")
	l := open(t, src, Options{})
	fill(t, l, 30)
	start := l.size
	mustAppend(t, l, 30, rec(30, 30), rec(31, 0), rec(32, 530))
	end := l.size
	_ = l.Close()
	name := filepath.Base(files(t, src)[0])
	whole, err := os.ReadFile(filepath.Join(src, name))
	if err != nil || int64(len(whole)) != end {
		t.Fatalf("got %d bytes, %v, want %d", len(whole), err, end)
	}
	try := func(what string, b []byte, want int) {
		t.Helper()
		dir := filepath.Join(base, "t")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
		if want == 30 && int64(len(b)) != start {
			n := 0
			err := Check(dir, func(uint64, []byte) error { n++; return nil })
			if !errors.Is(err, ErrTorn) || n != 30 {
				t.Fatalf("%s: check: got %d records, %v, want 30 and torn", what, n, err)
			}
		}
		l, err := Open(dir, Options{})
		if err != nil {
			t.Fatalf("%s: open: %v", what, err)
		}
		if int(l.Next()) != want {
			t.Fatalf("%s: got %d records, want %d", what, l.Next(), want)
		}
		if want == 30 && len(b)%8 == 0 {
			checkAll(t, l, 0, 30)
			fill(t, l, 33)
			checkAll(t, l, 0, 33)
			if err := Check(dir, func(uint64, []byte) error { return nil }); err != nil {
				t.Fatalf("%s: check after recovery: %v", what, err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	step := int64(1)
	if testing.Short() {
		step = 13
	}
	for cut := start; cut < end; cut += step {
		try(fmt.Sprintf("cut at %d", cut), whole[:cut], 30)
	}
	try("whole", whole, 33)
	for at := start; at < end; at += 1 {
		if at != start && at%512 != 0 {
			continue
		}
		b := bytes.Clone(whole)
		clear(b[at:])
		try(fmt.Sprintf("zeros from %d", at), b, 30)
		b = bytes.Clone(whole)
		clear(b[at:min(int64(len(b)), (at/512+1)*512)])
		try(fmt.Sprintf("one sector of zeros at %d", at), b, 30)
	}
}

// TestTornHeader cuts a segment that was just begun.
func TestTornHeader(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{SegmentBytes: 300})
	for len(files(t, dir)) < 2 {
		fill(t, l, int(l.Next())+1)
	}
	n := int(l.Next()) - 1 // the last record is the second segment's only one
	_ = l.Close()
	name := files(t, dir)[1]
	whole, _ := os.ReadFile(name)
	for cut := 0; cut < segment.HeaderSize+1; cut++ {
		b := whole[:cut]
		if cut == segment.HeaderSize {
			b = make([]byte, segment.HeaderSize)
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, Options{SegmentBytes: 300})
		if err != nil {
			t.Fatalf("header cut to %d: %v", cut, err)
		}
		checkAll(t, l, 0, n)
		fill(t, l, n+1)
		checkAll(t, l, 0, n+1)
		_ = l.Close()
	}
}

// TestEveryByte flips each byte of each file: it must be found, named with file
// and offset, and neither Check nor Open may take it for a torn tail.
func TestEveryByte(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{SegmentBytes: 500})
	fill(t, l, 24)
	_ = l.Close()
	for _, name := range files(t, dir) {
		whole, _ := os.ReadFile(name)
		for i := range whole {
			for _, mask := range []byte{0x01, 0x80, 0xff} {
				if testing.Short() && i%16 != 3 {
					continue
				}
				b := bytes.Clone(whole)
				b[i] ^= mask
				if err := os.WriteFile(name, b, 0o644); err != nil {
					t.Fatal(err)
				}
				err := Check(dir, func(uint64, []byte) error { return nil })
				var d *segment.Damage
				if !errors.As(err, &d) || errors.Is(err, ErrTorn) {
					t.Fatalf("%s byte %d ^ %#x: check: got %v, want damage", filepath.Base(name), i, mask, err)
				}
				if d.File != filepath.Base(name) || d.Offset > int64(i) || int64(i) > d.Offset+90+segment.Overhead {
					t.Fatalf("%s byte %d: located in %s at %d", filepath.Base(name), i, d.File, d.Offset)
				}
				if i%4 != 0 {
					continue
				}
				if l, err := Open(dir, Options{}); err == nil || errors.Is(err, ErrTorn) || !strings.Contains(err.Error(), d.File) {
					t.Fatalf("%s byte %d: open: got %v, %v, want an error that names the file", filepath.Base(name), i, l, err)
				}
			}
		}
		if err := os.WriteFile(name, whole, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	checkAll(t, open(t, dir, Options{SegmentBytes: 700}), 0, 24)
}

func TestMissingSegment(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, Options{SegmentBytes: 700})
	fill(t, l, 60)
	_ = l.Close()
	fs := files(t, dir)
	if err := os.Remove(fs[1]); err != nil {
		t.Fatal(err)
	}
	err := Check(dir, func(uint64, []byte) error { return nil })
	if err == nil || !strings.Contains(err.Error(), filepath.Base(fs[2])) || errors.Is(err, ErrTorn) {
		t.Errorf("check: got %v, want damage at %s", err, filepath.Base(fs[2]))
	}
	if _, err := Open(dir, Options{}); err == nil {
		t.Error("open: got no error with a segment missing")
	}
}

// TestCrashAtEveryOperation stops the log before each operation on files, opens
// it again and goes on: everything acknowledged is there.
func TestCrashAtEveryOperation(t *testing.T) {
	boom := errors.New("boom")
	for stop := 1; ; stop++ {
		dir := filepath.Join(t.TempDir(), "log")
		n := 0
		o := Options{SegmentBytes: 300, Hook: func(string, string) error {
			if n++; n >= stop {
				return boom
			}
			return nil
		}}
		acked := 0
		l, err := Open(dir, o)
		for err == nil && acked < 25 {
			if _, err = l.Append(rec(acked, acked%90), rec(acked+1, (acked+1)%90)); err == nil {
				acked += 2
			}
		}
		if err != nil && !errors.Is(err, boom) {
			t.Fatalf("stopped at %d: got %v, want the hook's error", stop, err)
		}
		if l != nil {
			if err != nil {
				if _, err := l.Append([]byte("x")); !errors.Is(err, ErrBroken) {
					t.Fatalf("append after a failure: got %v, want ErrBroken", err)
				}
			}
			_ = l.Close()
		}
		done := err == nil
		l = open(t, dir, Options{SegmentBytes: 300})
		if int(l.Next()) < acked || int(l.Next()) > acked+2 {
			t.Fatalf("stopped at %d: got %d records, %d were acknowledged", stop, l.Next(), acked)
		}
		fill(t, l, 40)
		checkAll(t, l, 0, 40)
		if done {
			break
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, batch := range []int{1, 256} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			l, err := Open(b.TempDir(), Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			rs := make([][]byte, batch)
			for i := range rs {
				rs[i] = rec(i, 1000)
			}
			b.SetBytes(int64(batch * 1000))
			for b.Loop() {
				if _, err := l.Append(rs...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
