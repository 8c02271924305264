package payload

import (
	"errors"
	"fmt"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// Purge says what to let go of.
type Purge struct {
	// Class that the records must have.
	Class retention.Class
	// Floor is the first leaf index that must be kept.
	Floor uint64
	// Ceiling is the first leaf index that may be kept longer than its floor, for
	// the sake of dropping whole segments. What is below must go now.
	Ceiling uint64
	// Held reports whether a record is to be kept in any case. Optional.
	Held func(*ledger.Payload) bool
	// Dry changes nothing, and says what would have been dropped.
	Dry bool
}

// Dropped says what a [Purge] did.
type Dropped struct {
	// Ranges of leaf indexes: every record of the class in them is gone.
	Ranges []retention.Range
	// Count is how many records were let go of now, Held how many were kept
	// because they are held.
	Count, Held uint64
	// Heights of the blocks of the first and the last record that were let go of.
	First, Last ledger.Height
	// Segments is how many were dropped as a whole, Rewritten how many were
	// written anew.
	Segments, Rewritten int
}

// add notes one record that is let go of. joined says that no record of the class
// that stays is between it and the one before.
func (d *Dropped) add(p *ledger.Payload, joined bool) {
	d.Count++
	if d.First == 0 || p.Height < d.First {
		d.First = p.Height
	}
	d.Last = max(d.Last, p.Height)
	if n := len(d.Ranges); joined && n > 0 && d.Ranges[n-1].Last < p.Index {
		d.Ranges[n-1].Last = p.Index
		return
	}
	d.Ranges = append(d.Ranges, retention.Range{First: p.Index, Last: p.Index})
}

// Drop implements [Store]: it lets go of every record of a class with an index
// below the floor that is in a segment which is due as a whole, or in one of
// which some are below the ceiling; but for those that are held.
func (d *Disk) Drop(p Purge) (Dropped, error) {
	d.dropping.Lock()
	defer d.dropping.Unlock()
	var out Dropped
	switch {
	case d.readOnly && !p.Dry:
		return out, errors.New("payload store: opened for reading only")
	case !p.Class.Valid():
		return out, kind.Errorf(kind.Invalid, "payload store: %.20q is no class of records", string(p.Class))
	case p.Class == retention.Registry:
		return out, kind.Errorf(kind.Denied, "payload store: what the registry needs is never purged")
	}
	d.mu.RLock()
	mixed, own := d.folders[retention.Mixed], d.folders[p.Class]
	d.mu.RUnlock()
	for _, l := range []*seglog.Log{mixed, own} { // the older first
		if l == nil {
			continue
		}
		if err := d.drop(l, p, l == mixed, &out); err != nil {
			return out, fmt.Errorf("payload store: purging %s: %w", p.Class, err)
		}
	}
	return out, nil
}

func (d *Disk) drop(l *seglog.Log, p Purge, mixed bool, out *Dropped) error {
	leading := true // everything before this segment is dropped
	dropTo := l.First()
	joined := false
	for _, seg := range l.Segments() {
		if seg.First == seg.Next {
			break
		}
		first, err := parse(l, seg.First)
		if err != nil {
			return err
		}
		last, err := parse(l, seg.Next-1)
		if err != nil {
			return err
		}
		if first.Index >= p.Floor {
			break
		}
		if last.Index >= p.Floor && first.Index >= p.Ceiling {
			break // it will be due as a whole, in time
		}
		gone := map[uint64]bool{} // by leaf index
		kept := 0
		for i := seg.First; i < seg.Next; i++ {
			r, err := parse(l, i)
			if err != nil {
				return err
			}
			if len(r.Envelope) == 0 {
				continue
			}
			mine := true
			if mixed {
				c, err := ClassOf(r)
				if err != nil {
					return err
				}
				mine = c == p.Class
			}
			switch {
			case !mine:
				kept++
			case r.Index >= p.Floor:
				kept++
				joined = false
			case p.Held != nil && p.Held(r):
				kept++
				out.Held++
				joined = false
			default:
				gone[r.Index] = true
				out.add(r, joined)
				joined = true
			}
		}
		if leading && kept == 0 {
			dropTo = seg.Next
			out.Segments++
		} else {
			leading = false
			if len(gone) > 0 {
				out.Rewritten++
			}
		}
		if p.Dry {
			continue
		}
		if seg.Last && (len(gone) > 0 || dropTo == seg.Next) {
			if err := l.Roll(); err != nil {
				return err
			}
		}
		if dropTo != seg.Next && len(gone) > 0 {
			if err := d.rewrite(l, seg.First, gone); err != nil {
				return err
			}
		}
	}
	if p.Dry || dropTo == l.First() {
		return nil
	}
	if err := d.mkdir(d.trash()); err != nil {
		return err
	}
	return l.WipeBefore(dropTo, d.trash())
}

// rewrite empties the entries of some leaves in a segment.
func (d *Disk) rewrite(l *seglog.Log, first uint64, gone map[uint64]bool) error {
	if err := d.mkdir(d.trash()); err != nil {
		return err
	}
	var bad error
	_, err := l.Rewrite(first, d.trash(), func(_ uint64, rec []byte) []byte {
		p, err := ledger.ParsePayload(rec)
		if err != nil {
			bad = errors.Join(bad, err)
			return rec
		}
		if !gone[p.Index] {
			return rec
		}
		return p.Erased().Marshal()
	})
	return errors.Join(bad, err)
}

// Erase implements [Store]. What the registry needs is refused, with kind Denied,
// before anything is done. Records that are not there, or gone already, are left
// out of what it returns.
func (d *Disk) Erase(indexes ...uint64) (erased []uint64, err error) {
	d.dropping.Lock()
	defer d.dropping.Unlock()
	if d.readOnly {
		return nil, errors.New("payload store: opened for reading only")
	}
	in := map[retention.Class]map[uint64]bool{}
	for _, i := range slices.Compact(slices.Sorted(slices.Values(indexes))) {
		folder, p, ok, err := d.find(i)
		if err != nil {
			return nil, err
		}
		if !ok || len(p.Envelope) == 0 {
			continue
		}
		if c, err := ClassOf(p); err != nil || c == retention.Registry {
			return nil, errors.Join(kind.Errorf(kind.Denied, "payload store: leaf %d: what the registry needs is not erased", i), err)
		}
		if in[folder] == nil {
			in[folder] = map[uint64]bool{}
		}
		in[folder][i] = true
		erased = append(erased, i)
	}
	for folder, gone := range in {
		l, err := d.folder(folder)
		if err != nil {
			return nil, err
		}
		if err := d.erase(l, gone); err != nil {
			return nil, fmt.Errorf("payload store: erasing from %s: %w", folder, err)
		}
	}
	return erased, nil
}

func (d *Disk) erase(l *seglog.Log, gone map[uint64]bool) error {
	segs := map[uint64]bool{}
	for i := range gone {
		n, err := search(l, i)
		if err != nil {
			return err
		}
		for _, s := range l.Segments() {
			if n < s.First || n >= s.Next {
				continue
			}
			segs[s.First] = true
			if s.Last {
				if err := l.Roll(); err != nil {
					return err
				}
			}
		}
	}
	for first := range segs {
		if err := d.rewrite(l, first, gone); err != nil {
			return err
		}
	}
	return nil
}

// Roll has the next records of a class begin a new segment, so that what was put
// until now can be dropped apart from them.
func (d *Disk) Roll(c retention.Class) error {
	d.mu.RLock()
	l := d.folders[c]
	d.mu.RUnlock()
	if l == nil {
		return nil
	}
	return l.Roll()
}
