package retention

import (
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Facts are what holds ask of a record. All but Index and Class are its signer's
// word.
type Facts struct {
	Index    uint64
	Class    Class
	Junction traffic.JunctionID
	Device   traffic.DeviceID
	// Time is the record's own, or else that of its block.
	Time time.Time
}

// Holds are the legal holds in force.
type Holds map[string]*identity.Hold

// By returns the holds that keep a record, by id, in order. A junction or device
// that the record does not name is not that of a hold.
func (hs Holds) By(f Facts) []string {
	var out []string
	for id, h := range hs {
		if covers(h, f) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// Keep reports whether any hold keeps a record.
func (hs Holds) Keep(f Facts) bool {
	for _, h := range hs {
		if covers(h, f) {
			return true
		}
	}
	return false
}

func covers(h *identity.Hold, f Facts) bool {
	if len(h.Leaves) > 0 {
		return slices.Contains(h.Leaves, f.Index)
	}
	ms := f.Time.UnixMilli()
	switch {
	case len(h.Classes) > 0 && !slices.Contains(h.Classes, string(f.Class)),
		len(h.Junctions) > 0 && !slices.Contains(h.Junctions, f.Junction),
		len(h.Devices) > 0 && !slices.Contains(h.Devices, f.Device),
		h.FromUnixMS != 0 && ms < h.FromUnixMS,
		h.ToUnixMS != 0 && ms > h.ToUnixMS:
		return false
	}
	return true
}

// Due is what a retention entry asks for of one class at a moment.
type Due struct {
	Class Class
	// Records of blocks up to MayBefore may be let go of, those up to MustBefore
	// must be: the class's floor and ceiling, counted back.
	MayBefore, MustBefore time.Time
}

// DueAt returns what a retention entry asks for at a block time, by class. What
// it does not name is kept.
func DueAt(p *identity.Retention, newest time.Time) []Due {
	var out []Due
	for _, c := range p.Classes {
		out = append(out, Due{
			Class:      Class(c.Class),
			MayBefore:  newest.Add(-seconds(c.FloorS)),
			MustBefore: newest.Add(-seconds(c.CeilingS)),
		})
	}
	return out
}

// SegmentSpan is how long one segment of a class should be written to, so that
// segments come due as a whole between floor and ceiling; 0 does not matter.
func SegmentSpan(p *identity.Retention, c Class) time.Duration {
	for _, r := range p.Classes {
		if Class(r.Class) == c {
			return max(seconds(r.CeilingS-r.FloorS)/2, seconds(r.CeilingS)/32)
		}
	}
	return 0
}

func seconds(s int64) time.Duration { return time.Duration(s) * time.Second } // at most MaxRetentionS
