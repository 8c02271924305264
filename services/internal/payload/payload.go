// Package payload keeps envelopes and salts, apart from the log, so that they
// can be let go of: the log holds commitments only, and stays whole without them.
//
// # Layout
//
//	DIR/payload/<class>/   one folder for each class of pkg/retention: access,
//	                       control, readings, registry, request
//	DIR/payload/gone/      empty entries of records that were gone everywhere before
//	                       they came here
//	DIR/payload/record/    all classes together, in the layout of before: its
//	                       segments are read and emptied, and never added to
//	DIR/payload/tmp/       what is being replaced or overwritten
//
// A folder is made when its first record comes. Each is in the form of
// pkg/ledger/segment, its records in that of [ledger.Payload], in rising order of
// the leaf index. Which class a record is in follows from its kind alone:
// [retention.Of].
//
// Every record leaf of the journalled blocks has exactly one entry in one of the
// folders. To let go of a record is to put an empty entry in its place, without
// envelope, salt and time ([ledger.Payload.Erased]), or to drop the oldest
// segments of a class. So a folder's first segment need not begin with record 0,
// and that is how one sees how many were dropped. Why something is gone is not
// said here but in the log: by receipts of deletion and tombstones, see
// pkg/retention.
//
// Segments are written once. One with something to be erased is written anew
// beside, takes the other's place in one step, and the other is overwritten
// before its file is let go of. That reaches what a file system that writes in
// place holds; snapshots and copies of it are another holder's business.
package payload

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// ErrGone is wrapped by the error of [Store.Get] for a record that was there, or
// whose empty entry says that it was gone before. It has kind NotFound.
var ErrGone = errors.New("its payload was let go")

// ErrMissing is wrapped by the error of [Store.Get] for an index that the store
// has no entry for and never had: a header's leaf, one that is still to come, or
// damage. It has no kind.
var ErrMissing = errors.New("the payload store has no entry for it")

// Store is where payloads are kept.
type Store interface {
	// Put makes payloads durable, all of them when it returns nil. Indexes rise;
	// what is there already is left as it is. After an error the store must be
	// opened again.
	Put(batch ...*ledger.Payload) error
	// Get returns the payload of a leaf. See [ErrGone], [ErrMissing].
	Get(index uint64) (*ledger.Payload, error)
	// Scan calls f with all entries from an index on, in the order of their
	// indexes, the empty ones too. It stops with f's error.
	Scan(from uint64, f func(retention.Class, *ledger.Payload) error) error
	// Erase lets go of single records, and says which of them were there.
	Erase(indexes ...uint64) (erased []uint64, err error)
	// Drop lets go of records of a class: see [Purge].
	Drop(p Purge) (Dropped, error)
}

// Options are all optional.
type Options struct {
	// SegmentBytes is the size from which on a new segment is begun; 64 MiB.
	SegmentBytes int64
	// Hook, for tests, is called before each operation that changes a file: see
	// [seglog.Options]; also link and rename.
	Hook func(op, path string) error
}

// Disk is a [Store] in a folder. Its methods may be called concurrently.
type Disk struct {
	root     string // DIR/payload
	o        Options
	readOnly bool

	dropping sync.Mutex // one Drop or Erase at a time; taken before mu
	writing  sync.Mutex // one Put at a time, also beside these; taken before mu

	mu      sync.RWMutex // guards the map; folders lock themselves
	folders map[retention.Class]*seglog.Log
}

var _ Store = (*Disk)(nil)

// Dir is the payload store's folder in a data folder.
const Dir = "payload"

// Open opens the store below a data folder, for reading and writing, ends what a
// crash interrupted, and checks every byte.
func Open(dir string, o Options) (*Disk, error) {
	d := &Disk{root: filepath.Join(dir, Dir), o: o, folders: map[retention.Class]*seglog.Log{}}
	var dirs []string
	for _, c := range retention.Folders() {
		dirs = append(dirs, d.path(c))
	}
	if err := seglog.Sweep(d.trash(), o.Hook, dirs...); err != nil {
		return nil, fmt.Errorf("payload store: %w", err)
	}
	for _, c := range retention.Folders() {
		if _, err := os.Stat(d.path(c)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if _, err := d.folder(c); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return d, nil
}

// OpenReader opens a store that another Disk, maybe in another process, writes.
// What is put later is seen after [Disk.Refresh].
func OpenReader(dir string) (*Disk, error) {
	d := &Disk{root: filepath.Join(dir, Dir), readOnly: true, folders: map[retention.Class]*seglog.Log{}}
	for _, c := range retention.Folders() {
		l, err := seglog.OpenReader(d.path(c))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("payload store: %w", err), d.Close())
		}
		d.folders[c] = l
	}
	return d, nil
}

func (d *Disk) path(c retention.Class) string { return filepath.Join(d.root, string(c)) }
func (d *Disk) trash() string                 { return filepath.Join(d.root, "tmp") }

// folder returns the log of a class, and makes it where there is none.
func (d *Disk) folder(c retention.Class) (*seglog.Log, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.folders[c]; l != nil {
		return l, nil
	}
	if err := d.mkdir(d.root); err != nil {
		return nil, fmt.Errorf("payload store: %w", err)
	}
	l, err := seglog.Open(d.path(c), seglog.Options{SegmentBytes: d.o.SegmentBytes, Hook: d.o.Hook})
	if err != nil {
		return nil, fmt.Errorf("payload store: %w", err)
	}
	d.folders[c] = l
	return l, nil
}

// mkdir makes one folder, durably: also where it is there, as a crash may have come
// before its name was synced.
func (d *Disk) mkdir(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if d.o.Hook != nil {
			if err := d.o.Hook("create", dir); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	parent := filepath.Dir(dir)
	if d.o.Hook != nil {
		if err := d.o.Hook("syncdir", parent); err != nil {
			return err
		}
	}
	f, err := os.Open(parent)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// open returns the folders that there are, in the order of their names.
func (d *Disk) open() (cs []retention.Class, logs []*seglog.Log) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, c := range retention.Folders() {
		if l := d.folders[c]; l != nil {
			cs, logs = append(cs, c), append(logs, l)
		}
	}
	return cs, logs
}

// ClassOf returns the folder that a payload belongs in.
func ClassOf(p *ledger.Payload) (retention.Class, error) {
	if len(p.Envelope) == 0 {
		return retention.Gone, nil
	}
	e, err := identity.ParseEnvelope(p.Envelope)
	if err != nil {
		return "", fmt.Errorf("leaf %d: %w", p.Index, err)
	}
	return retention.Of(e.Kind), nil
}

// Put implements [Store], with one sync for each class that has something new.
func (d *Disk) Put(batch ...*ledger.Payload) error {
	d.writing.Lock()
	defer d.writing.Unlock()
	if d.readOnly {
		return errors.New("payload store: opened for reading only")
	}
	end, err := d.end()
	if err != nil {
		return err
	}
	new := map[retention.Class][][]byte{}
	for i, p := range batch {
		if i > 0 && p.Index <= batch[i-1].Index {
			return fmt.Errorf("payload store: leaf %d after leaf %d: indexes must rise", p.Index, batch[i-1].Index)
		}
		c, err := ClassOf(p)
		if err != nil {
			return fmt.Errorf("payload store: %w", err)
		}
		if p.Index < end {
			// A crash may have left some classes of what was never journalled.
			if _, _, ok, err := d.find(p.Index); err != nil {
				return err
			} else if ok {
				continue
			}
			if l, err := d.folder(c); err != nil {
				return err
			} else if last, ok, err := lastIndex(l); err != nil {
				return err
			} else if ok && last >= p.Index {
				return fmt.Errorf("payload store: leaf %d is missing in %s, which goes on to leaf %d", p.Index, c, last)
			}
		}
		new[c] = append(new[c], p.Marshal())
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	for c, recs := range new {
		l, err := d.folder(c)
		if err != nil {
			errs = append(errs, err)
			break
		}
		wg.Go(func() { // the syncs of several folders at once
			if _, err := l.Append(recs...); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("payload store: %w", err)
	}
	return nil
}

// parse decodes record i of a folder.
func parse(l *seglog.Log, i uint64) (*ledger.Payload, error) {
	rec, err := l.Read(i)
	if err != nil {
		return nil, err
	}
	return ledger.ParsePayload(rec)
}

// search returns the first record of a folder at or after a leaf index; Next
// where there is none.
func search(l *seglog.Log, index uint64) (uint64, error) {
	lo, hi := l.First(), l.Next()
	var err error
	n := sort.Search(int(hi-lo), func(k int) bool {
		if err != nil {
			return true
		}
		var p *ledger.Payload
		if p, err = parse(l, lo+uint64(k)); err != nil {
			return true
		}
		return p.Index >= index
	})
	return lo + uint64(n), err
}

func lastIndex(l *seglog.Log) (index uint64, ok bool, err error) {
	if l.Next() == l.First() {
		return 0, false, nil
	}
	p, err := parse(l, l.Next()-1)
	if err != nil {
		return 0, false, err
	}
	return p.Index, true, nil
}

// end is one more than the largest index that is there.
func (d *Disk) end() (uint64, error) {
	_, logs := d.open()
	end := uint64(0)
	for _, l := range logs {
		last, ok, err := lastIndex(l)
		if err != nil {
			return 0, fmt.Errorf("payload store: %w", err)
		}
		if ok {
			end = max(end, last+1)
		}
	}
	return end, nil
}

// find looks for the entry of a leaf in all folders.
func (d *Disk) find(index uint64) (retention.Class, *ledger.Payload, bool, error) {
	cs, logs := d.open()
	for k, l := range logs {
		i, err := search(l, index)
		if err != nil {
			return "", nil, false, fmt.Errorf("payload store: leaf %d: %w", index, err)
		}
		if i == l.Next() {
			continue
		}
		p, err := parse(l, i)
		if err != nil {
			return "", nil, false, fmt.Errorf("payload store: leaf %d: %w", index, err)
		}
		if p.Index == index {
			return cs[k], p, true, nil
		}
	}
	return "", nil, false, nil
}

// attempts is how often a reader looks again when the writer has changed what it
// was reading.
const attempts = 4

// again runs a reader's operation again after it met what the writer has
// replaced or dropped in the meantime.
func (d *Disk) again(f func() error) error {
	for n := 1; ; n++ {
		err := f()
		var damage *segment.Damage
		changed := errors.As(err, &damage) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, seglog.ErrNotFound) || errors.Is(err, os.ErrClosed)
		if err == nil || !changed || !d.readOnly && n > 1 || n == attempts {
			return err
		}
		_, logs := d.open()
		for _, l := range logs {
			if err2 := errors.Join(l.Renew(), l.Refresh()); err2 != nil && n == attempts-1 {
				return errors.Join(err, err2)
			}
		}
	}
}

// Get implements [Store].
func (d *Disk) Get(index uint64) (*ledger.Payload, error) {
	var p *ledger.Payload
	err := d.again(func() error {
		var ok bool
		var err error
		if _, p, ok, err = d.find(index); err != nil || ok {
			return err
		}
		dropped, err := d.dropped(index)
		if err != nil {
			return err
		}
		if dropped {
			return kind.Errorf(kind.NotFound, "leaf %d: %w", index, ErrGone)
		}
		return fmt.Errorf("leaf %d: %w", index, ErrMissing)
	})
	if err != nil {
		return nil, err
	}
	if len(p.Envelope) == 0 {
		return nil, kind.Errorf(kind.NotFound, "leaf %d: %w", index, ErrGone)
	}
	return p, nil
}

// dropped reports whether an entry that is not there may have been in a segment
// that was dropped.
func (d *Disk) dropped(index uint64) (bool, error) {
	_, logs := d.open()
	for _, l := range logs {
		if l.First() == 0 {
			continue
		}
		if l.First() == l.Next() {
			return true, nil
		}
		p, err := parse(l, l.First())
		if err != nil {
			return false, fmt.Errorf("payload store: %w", err)
		}
		if index < p.Index {
			return true, nil
		}
	}
	return false, nil
}

// entry is one record of a folder on its way through [Disk.Scan].
type entry struct {
	class retention.Class
	p     *ledger.Payload
	err   error
}

// Scan implements [Store]. It may run beside Put; what was put after it began
// may be missing.
func (d *Disk) Scan(from uint64, f func(retention.Class, *ledger.Payload) error) error {
	next := from
	var told error // by f; whatever it is, it says nothing about the files
	err := d.again(func() error {
		err := d.scan(next, func(c retention.Class, p *ledger.Payload) error {
			next = p.Index + 1
			told = f(c, p)
			return told
		})
		if told != nil {
			return nil
		}
		return err
	})
	if told != nil {
		return told
	}
	return err
}

func (d *Disk) scan(from uint64, f func(retention.Class, *ledger.Payload) error) error {
	cs, logs := d.open()
	var nexts []func() (entry, bool)
	var heads []entry
	for k, l := range logs {
		i, err := search(l, from)
		if err != nil {
			return fmt.Errorf("payload store: %w", err)
		}
		next, stop := iter.Pull(func(yield func(entry) bool) {
			err := l.Scan(i, func(_ uint64, rec []byte) error {
				p, err := ledger.ParsePayload(rec)
				if err != nil {
					return err
				}
				if !yield(entry{cs[k], p, nil}) {
					return errStop
				}
				return nil
			})
			if err != nil && !errors.Is(err, errStop) {
				yield(entry{err: fmt.Errorf("payload store: %s: %w", cs[k], err)})
			}
		})
		defer stop()
		if e, ok := next(); ok {
			heads, nexts = append(heads, e), append(nexts, next)
		}
	}
	for len(heads) > 0 {
		at := 0
		for k, e := range heads {
			if e.err != nil {
				return e.err
			}
			if e.p.Index < heads[at].p.Index {
				at = k
			}
		}
		if err := f(heads[at].class, heads[at].p); err != nil {
			return err
		}
		var ok bool
		if heads[at], ok = nexts[at](); !ok {
			heads, nexts = slices.Delete(heads, at, at+1), slices.Delete(nexts, at, at+1)
		}
	}
	return nil
}

var errStop = errors.New("stop")

// Count returns how many entries with an index below end there are or were: what
// was dropped counts.
func (d *Disk) Count(end uint64) (uint64, error) {
	_, logs := d.open()
	n := uint64(0)
	for _, l := range logs {
		i, err := search(l, end)
		if err != nil {
			return 0, fmt.Errorf("payload store: %w", err)
		}
		n += i
	}
	return n, nil
}

// Refresh, of a store that was opened with [OpenReader], takes in what has been
// put since.
func (d *Disk) Refresh() error {
	if !d.readOnly {
		return nil
	}
	_, logs := d.open()
	return d.again(func() error {
		for _, l := range logs {
			if err := l.Refresh(); err != nil {
				return fmt.Errorf("payload store: %w", err)
			}
		}
		return nil
	})
}

// Close closes the files. Everything put is durable already.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, l := range d.folders {
		errs = append(errs, l.Close())
	}
	clear(d.folders)
	return errors.Join(errs...)
}
