package payload

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

var key = ed25519.NewKeyFromSeed(make([]byte, 32))

// secret is what every envelope's payload has in it.
func secret(index uint64) string { return fmt.Sprintf("secret of leaf %d.", index) }

func record(index uint64, k identity.RecordKind) *ledger.Payload {
	return &ledger.Payload{
		Index: index, Height: ledger.Height(1 + index/10), Received: time.Unix(int64(1000+index), 0).UTC(),
		Salt: ledger.Salt{1, byte(index)}, Envelope: identity.Sign(key, k, identity.JSON, []byte(secret(index))).Marshal(),
	}
}

// kinds of the records that the tests put, by index.
func kindOf(index uint64) identity.RecordKind {
	switch {
	case index%7 == 0:
		return identity.KindRegistry
	case index%3 == 0:
		return identity.KindCommand
	case index%11 == 0:
		return identity.KindAccess
	}
	return identity.KindFrame
}

// batch is records from to end−1, without the leaves of headers.
func batch(from, end uint64) (out []*ledger.Payload) {
	for i := from; i < end; i++ {
		if i%10 != 0 {
			out = append(out, record(i, kindOf(i)))
		}
	}
	return out
}

func open(t *testing.T, dir string, o Options) *Disk {
	t.Helper()
	d, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func put(t *testing.T, d *Disk, ps []*ledger.Payload) {
	t.Helper()
	for b := range slices.Chunk(ps, 5) {
		if err := d.Put(b...); err != nil {
			t.Fatal(err)
		}
	}
}

// check holds a store against what should be in it: gone says which are not.
func check(t *testing.T, d *Disk, want []*ledger.Payload, gone func(*ledger.Payload) bool) {
	t.Helper()
	left := []uint64{}
	for _, p := range want {
		got, err := d.Get(p.Index)
		if gone != nil && gone(p) {
			if !errors.Is(err, ErrGone) || kind.Of(err) != kind.NotFound {
				t.Errorf("leaf %d: got %v, %v, want that it was let go", p.Index, got, err)
			}
			continue
		}
		left = append(left, p.Index)
		if err != nil || !bytes.Equal(got.Marshal(), p.Marshal()) {
			t.Errorf("leaf %d: got %v, %v, want it as it was put", p.Index, got, err)
		}
	}
	scanned := []uint64{}
	err := d.Scan(0, func(_ retention.Class, p *ledger.Payload) error {
		if len(p.Envelope) > 0 {
			scanned = append(scanned, p.Index)
		}
		return nil
	})
	if err != nil || !slices.Equal(scanned, left) {
		t.Errorf("scan: got %v, %v\nwant %v", scanned, err, left)
	}
	last := want[len(want)-1]
	if n, err := d.Count(last.Index + 1); err != nil || n != uint64(len(want)) {
		t.Errorf("count: got %d, %v, want %d", n, err, len(want))
	}
}

// files returns the content of all files below a folder.
func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, dir+"/")] = b
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// whereIs names a file that a leaf's content is in.
func whereIs(t *testing.T, dir string, index uint64) string {
	t.Helper()
	for name, b := range files(t, dir) {
		if bytes.Contains(b, []byte(secret(index))) {
			return name
		}
	}
	return ""
}

func TestPut(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, Options{SegmentBytes: 2000})
	r, err := OpenReader(dir) // before there is anything
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	all := batch(0, 100)
	put(t, d, all[:60])
	put(t, d, all[40:]) // some again, as after a crash
	check(t, d, all, nil)
	if err := r.Refresh(); err != nil {
		t.Fatal(err)
	}
	check(t, r, all, nil)
	for i, want := range map[uint64]string{1: "readings", 3: "control", 7: "registry", 11: "access"} {
		if got := whereIs(t, dir, i); !strings.HasPrefix(got, "payload/"+want+"/") {
			t.Errorf("leaf %d is in %q, want folder %s", i, got, want)
		}
	}
	if _, err := d.Get(10); !errors.Is(err, ErrMissing) || kind.Of(err) == kind.NotFound {
		t.Errorf("a header's leaf: got %v, want that there is no entry", err)
	}
	if err := d.Put(all[3], all[2]); err == nil || !strings.Contains(err.Error(), "must rise") {
		t.Errorf("indexes that fall: got %v, want refused", err)
	}
	if err := d.Put(record(10, identity.KindFrame)); err == nil || !strings.Contains(err.Error(), "leaf 10 is missing") {
		t.Errorf("a record in between: got %v, want refused", err)
	}
	if err := r.Put(record(200, identity.KindFrame)); err == nil {
		t.Error("put by a reader: got none, want an error")
	}
	if err := d.Put(&ledger.Payload{Index: 200, Envelope: []byte("junk")}); err == nil {
		t.Error("junk: got none, want an error")
	}
	errMine := errors.New("mine")
	if err := d.Scan(50, func(_ retention.Class, p *ledger.Payload) error { return fmt.Errorf("%d: %w", p.Index, errMine) }); !errors.Is(err, errMine) || err.Error() != "51: mine" {
		t.Errorf("scan's error: got %v, want that of the function", err)
	}
	// What was gone before it came.
	if err := d.Put((&ledger.Payload{Index: 101, Height: 11}).Erased()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Get(101); !errors.Is(err, ErrGone) {
		t.Errorf("an empty entry: got %v, want gone", err)
	}
	if err := d.Put(record(101, identity.KindFrame)); err != nil { // too late
		t.Fatal(err)
	}
	if n, err := d.Count(102); err != nil || n != uint64(len(all)+1) {
		t.Errorf("got %d entries, %v, want %d: one for each record", n, err, len(all)+1)
	}
}

// TestMixed: the layout of before is read, gone on from, and purged.
func TestMixed(t *testing.T) {
	dir := t.TempDir()
	all := batch(0, 100)
	l, err := seglog.Open(filepath.Join(dir, Dir, "record"), seglog.Options{SegmentBytes: 2000})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all[:50] {
		if _, err := l.Append(p.Marshal()); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	d := open(t, dir, Options{SegmentBytes: 2000})
	put(t, d, all[45:])
	check(t, d, all, nil)
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	isFrame := func(p *ledger.Payload) bool { return kindOf(p.Index) == identity.KindFrame }
	got, err := d.Drop(Purge{Class: retention.Readings, Floor: 80, Ceiling: 80})
	if err != nil {
		t.Fatal(err)
	}
	gone := func(p *ledger.Payload) bool { return isFrame(p) && p.Index < 80 }
	n := uint64(0)
	for _, p := range all {
		if gone(p) {
			n++
		}
	}
	if got.Count != n {
		t.Errorf("got %d records dropped, want %d", got.Count, n)
	}
	check(t, d, all, gone)
	check(t, r, all, gone)
}

func TestDrop(t *testing.T) {
	all := batch(0, 200)
	frame := func(p *ledger.Payload) bool { return kindOf(p.Index) == identity.KindFrame }
	for _, tc := range []struct {
		name           string
		floor, ceiling uint64
		held           func(*ledger.Payload) bool
		gone           func(index uint64) bool
		ranges         string
	}{
		{"nothing is due", 0, 0, nil, func(uint64) bool { return false }, "[]"},
		{"past the floor, by whole segments", 100, 0, nil, func(i uint64) bool { return i <= 86 }, "[{1 86}]"},
		{"past the ceiling, at once", 100, 100, nil, func(i uint64) bool { return i < 100 }, "[{1 97}]"},
		{"everything", 1000, 1000, nil, func(uint64) bool { return true }, "[{1 199}]"},
		{"held", 100, 100, func(p *ledger.Payload) bool { return p.Index == 5 || p.Index == 46 },
			func(i uint64) bool { return i < 100 && i != 5 && i != 46 }, "[{1 4} {8 43} {47 97}]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir, Options{SegmentBytes: 5000})
			put(t, d, all)
			r, err := OpenReader(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = r.Close() }()
			gone := func(p *ledger.Payload) bool { return frame(p) && tc.gone(p.Index) }
			n := uint64(0)
			for _, p := range all {
				if gone(p) {
					n++
				}
			}
			p := Purge{Class: retention.Readings, Floor: tc.floor, Ceiling: tc.ceiling, Held: tc.held, Dry: true}
			dry, err := d.Drop(p)
			if err != nil {
				t.Fatal(err)
			}
			check(t, d, all, nil)
			p.Dry = false
			got, err := d.Drop(p)
			if err != nil {
				t.Fatal(err)
			}
			if s := fmt.Sprint(got.Ranges); got.Count != n || s != tc.ranges || fmt.Sprint(dry) != fmt.Sprint(got) {
				t.Errorf("got %+v\nwant %d records in %s; said before: %+v", got, n, tc.ranges, dry)
			}
			check(t, d, all, gone)
			check(t, r, all, gone)
			for _, p := range all {
				if at := whereIs(t, dir, p.Index); (at == "") != gone(p) {
					t.Errorf("leaf %d: its content is in %q, want that it is gone: %v", p.Index, at, gone(p))
				}
			}
			if again, err := d.Drop(p); err != nil || again.Count != 0 {
				t.Errorf("again: got %+v, %v, want nothing left to do", again, err)
			}
			more := batch(200, 220)
			put(t, d, more)
			check(t, d, slices.Concat(all, more), func(p *ledger.Payload) bool { return p.Index < 200 && gone(p) })
			if err := r.Refresh(); err != nil {
				t.Fatal(err)
			}
			check(t, r, slices.Concat(all, more), func(p *ledger.Payload) bool { return p.Index < 200 && gone(p) })
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			check(t, open(t, dir, Options{SegmentBytes: 5000}), slices.Concat(all, more), func(p *ledger.Payload) bool { return p.Index < 200 && gone(p) })
		})
	}
	d := open(t, t.TempDir(), Options{})
	for c, want := range map[retention.Class]string{retention.Registry: "never purged", retention.Gone: "no class", "": "no class"} {
		if _, err := d.Drop(Purge{Class: c}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("class %q: got %v, want an error with %q", c, err, want)
		}
	}
}

func TestErase(t *testing.T) {
	dir := t.TempDir()
	d := open(t, dir, Options{SegmentBytes: 5000})
	all := batch(0, 100)
	put(t, d, all)
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if _, err := d.Erase(1, 7); kind.Of(err) != kind.Denied {
		t.Errorf("of the registry: got %v, want denied", err)
	}
	check(t, d, all, nil)
	if whereIs(t, dir, 1) == "" {
		t.Error("content is not found although it is there")
	}
	got, err := d.Erase(97, 1, 3, 1, 500, 10) // in the last segment, the first, another class; header and nobody
	if err != nil || !slices.Equal(got, []uint64{1, 3, 97}) {
		t.Errorf("got %v, %v, want 1, 3, 97 erased", got, err)
	}
	gone := func(p *ledger.Payload) bool { return slices.Contains([]uint64{1, 3, 97}, p.Index) }
	check(t, d, all, gone)
	check(t, r, all, gone)
	for _, i := range got {
		if at := whereIs(t, dir, i); at != "" {
			t.Errorf("leaf %d is still in %s", i, at)
		}
	}
	if got, err := d.Erase(1); err != nil || len(got) != 0 {
		t.Errorf("again: got %v, %v, want nothing", got, err)
	}
}

// TestCrash stops a purge and an erasure at every operation on a file: what is
// found afterwards is each record as before or gone, and doing it again ends it.
func TestCrash(t *testing.T) {
	all := batch(0, 60)
	o := Options{SegmentBytes: 3000}
	work := func(d *Disk) error {
		if _, err := d.Erase(3, 58); err != nil {
			return err
		}
		_, err := d.Drop(Purge{Class: retention.Readings, Floor: 40, Ceiling: 40, Held: func(p *ledger.Payload) bool { return p.Index == 22 }})
		return err
	}
	due := func(p *ledger.Payload) bool {
		return p.Index == 3 || p.Index == 58 || kindOf(p.Index) == identity.KindFrame && p.Index < 40 && p.Index != 22
	}
	stopped := errors.New("stopped")
	for at := 0; ; at++ {
		dir := t.TempDir()
		d := open(t, dir, o)
		put(t, d, all)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		n, op := 0, ""
		d, err := Open(dir, Options{SegmentBytes: o.SegmentBytes, Hook: func(o, path string) error {
			if n++; n > at {
				op = o + " " + path
				return stopped
			}
			return nil
		}})
		if err == nil {
			err = work(d)
			_ = d.Close()
		}
		if err == nil {
			if at < 30 {
				t.Fatalf("done after %d operations, want more", at)
			}
			return
		}
		if !errors.Is(err, stopped) {
			t.Fatalf("operation %d, %s: got %v", at, op, err)
		}
		d = open(t, dir, o)
		for _, p := range all {
			if got, err := d.Get(p.Index); err != nil && (!errors.Is(err, ErrGone) || !due(p)) || err == nil && !bytes.Equal(got.Marshal(), p.Marshal()) {
				t.Errorf("stopped at %s: leaf %d: got %v, %v", op, p.Index, got, err)
			}
		}
		if es, err := os.ReadDir(d.trash()); err == nil && len(es) > 0 {
			t.Errorf("stopped at %s: left in tmp: %v", op, es)
		}
		if err := work(d); err != nil {
			t.Fatal(err)
		}
		check(t, d, all, due)
		for _, p := range all {
			if at := whereIs(t, dir, p.Index); (at == "") != due(p) {
				t.Errorf("stopped at %s: leaf %d is in %q, due %v", op, p.Index, at, due(p))
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	d, err := Open(b.TempDir(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	const n = 200_000
	p := record(1, identity.KindFrame)
	ps := make([]*ledger.Payload, 0, 1000)
	for i := uint64(1); i <= n; i++ {
		c := *p
		c.Index = i
		if ps = append(ps, &c); len(ps) == cap(ps) {
			if err := d.Put(ps...); err != nil {
				b.Fatal(err)
			}
			ps = ps[:0]
		}
	}
	i := uint64(0)
	for b.Loop() {
		i = i*6364136223846793005 + 1442695040888963407
		if _, err := d.Get(1 + i%n); err != nil {
			b.Fatal(err)
		}
	}
}
