package health

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Change says that a detector has begun, or ceased, to break a rule.
type Change struct {
	Detector traffic.DetectorID
	Rule     Rule
	Failed   bool
	// Reason gives the figures, for people, in less than 256 bytes.
	Reason string
	// Since is when what is wrong began, or ended, in UTC; not after At, the end of
	// the interval that decided.
	Since, At time.Time
}

// Monitor judges the detectors of one junction. Not safe for concurrent use.
type Monitor struct {
	j       *traffic.Junction
	sum     [sha256.Size]byte // of what of j the rules need
	limits  []limits
	tracks  []track
	balance balance
	failing int // how many tracks have failed
}

// NewMonitor returns a monitor that has seen nothing yet. j must have passed
// [traffic.Junction.Check] and must not be changed.
func NewMonitor(j *traffic.Junction) *Monitor {
	m := &Monitor{}
	m.define(j)
	m.tracks = make([]track, len(j.Detectors))
	return m
}

func (m *Monitor) define(j *traffic.Junction) {
	m.j, m.sum = j, digest(j)
	m.limits = make([]limits, len(j.Detectors))
	for i, d := range j.Detectors {
		m.limits[i] = limitsOf(LaneOf(j, d), d.Kind == traffic.Area || d.Kind == traffic.ExitArea)
	}
	m.balance = newBalance(j)
}

// digest is of what the rules need of a definition.
func digest(j *traffic.Junction) [sha256.Size]byte {
	kinds := make([]traffic.GroupKind, len(j.Groups))
	for i := range j.Groups {
		kinds[i] = j.Groups[i].Kind
	}
	b, err := json.Marshal([]any{j.Detectors, j.Lanes, j.Movements, kinds})
	if err != nil {
		panic(fmt.Sprintf("health: plain data does not encode: %v", err)) // not reached
	}
	return sha256.Sum256(b)
}

// Redefine goes on with another definition of the junction. What is known of
// detectors that are the same in both stays. Of those that are not, the word that
// they break a rule is taken back, if they still exist.
func (m *Monitor) Redefine(j *traffic.Junction, at time.Time) []Change {
	if j == m.j {
		return nil
	}
	if digest(j) == m.sum {
		m.j = j
		return nil
	}
	old := *m
	m.define(j)
	m.tracks = make([]track, len(j.Detectors))
	var out []Change
	for i, d := range j.Detectors {
		k := slices.IndexFunc(old.j.Detectors, func(o traffic.Detector) bool { return o.ID == d.ID })
		if k < 0 {
			continue
		}
		same := old.limits[k] == m.limits[i] && sameDetector(old.j.Detectors[k], d)
		if same {
			m.tracks[i] = old.tracks[k]
		}
		for r := range rules {
			// Comparisons begin anew in any case: neighbours may have changed.
			if v := &old.tracks[k].verdicts[r]; v.failed && (!same || r >= implausible) {
				m.tracks[i].verdicts[r] = verdict{}
				out = append(out, Change{Detector: d.ID, Rule: rules[r], Reason: "the junction's definition has changed", Since: at, At: at})
			}
		}
	}
	m.count()
	return out
}

func sameDetector(a, b traffic.Detector) bool {
	movements := slices.Equal(a.Movements, b.Movements)
	a.Movements, b.Movements = nil, nil
	return movements && a.ID == b.ID && a.Kind == b.Kind && a.Lane == b.Lane && a.FromStopLineCM == b.FromStopLineCM &&
		a.LengthCM == b.LengthCM && a.Group == b.Group
}

// Observe judges by one more frame of the junction, and returns what has changed,
// in the order of the detectors and of the rules. Frames without an interval say
// nothing.
func (m *Monitor) Observe(f *traffic.Frame) []Change {
	if f.Interval < time.Millisecond {
		return nil
	}
	s := span{to: f.Time.UnixMilli()}
	s.from = s.to - f.Interval.Milliseconds()
	var out []Change
	var scratch [4]change
	for i := range m.j.Detectors {
		r := m.reading(f, i)
		if r == nil {
			continue
		}
		t, d := &m.tracks[i], &m.j.Detectors[i]
		s := s
		ok, gap := t.clip(&s)
		if !ok {
			continue
		}
		s.count = int64(r.Count)
		s.full, s.hit = r.OccupancyPermille >= 1000, r.Count > 0
		switch d.Kind {
		case traffic.Button:
			s.full = s.hit
		case traffic.Area, traffic.ExitArea:
			// It may look only: not each of them can count.
			s.hit = s.hit || r.Vehicles > 0 || r.OccupancyPermille > 0
		}
		for _, c := range t.observe(m.limits[i], s, gap, scratch[:0]) {
			out = append(out, Change{Detector: d.ID, Rule: rules[c.rule], Failed: c.failed, Reason: c.reason, Since: utc(min(c.since, s.to)), At: utc(s.to)})
		}
		if d.Kind != traffic.Button && m.limits[i].locked > 0 && len(f.Signal.State) == len(m.j.Groups) && len(d.Movements) > 0 {
			s.quiet = r.Count == 0 && r.OccupancyPermille == 0 && r.Vehicles == 0
			others, between := m.others(f, i)
			for _, c := range t.cycle(s, gap, m.green(f.Signal.State, d), others, between, scratch[:0]) {
				out = append(out, Change{Detector: d.ID, Rule: rules[c.rule], Failed: c.failed, Reason: c.reason, Since: utc(min(c.since, s.to)), At: utc(s.to)})
			}
		}
		m.balance.count(i, s, gap)
	}
	out = append(out, m.compare(s.to)...)
	if len(out) > 0 {
		m.count()
	}
	return out
}

// others returns the count of another detector of the lane, that of most, and how
// many vehicles fit between the two.
func (m *Monitor) others(f *traffic.Frame, i int) (count, between int64) {
	d := &m.j.Detectors[i]
	for k := range m.j.Detectors {
		o := &m.j.Detectors[k]
		if k == i || o.Lane != d.Lane || !counts(o.Kind) || !counts(d.Kind) || m.tracks[k].broken() {
			continue
		}
		far := max(d.FromStopLineCM+d.LengthCM, o.FromStopLineCM+o.LengthCM) - min(d.FromStopLineCM, o.FromStopLineCM)
		if between == 0 || far/vehicleCM < between {
			between = far / vehicleCM
		}
		if r := m.reading(f, k); r != nil {
			count = max(count, int64(r.Count))
		}
	}
	return count, between
}

// green reports whether one of the detector's movements may go.
func (m *Monitor) green(s traffic.State, d *traffic.Detector) bool {
	for _, k := range d.Movements {
		if s.At(m.j.Movements[k].Group).Go() {
			return true
		}
	}
	return false
}

func utc(ms int64) time.Time { return time.UnixMilli(ms).UTC() }

func (m *Monitor) count() {
	m.failing = 0
	for i := range m.tracks {
		if m.tracks[i].failed() >= 0 {
			m.failing++
		}
	}
}

// reading finds what f says of detector i. Frames carry readings in the order of
// the definition, so there is seldom a search.
func (m *Monitor) reading(f *traffic.Frame, i int) *traffic.Reading {
	id := m.j.Detectors[i].ID
	if i < len(f.Readings) && f.Readings[i].Detector == id {
		return &f.Readings[i]
	}
	for k := range f.Readings {
		if f.Readings[k].Detector == id {
			return &f.Readings[k]
		}
	}
	return nil
}

// Failed returns the rule by which a detector is not to be believed.
func (m *Monitor) Failed(id traffic.DetectorID) (Rule, bool) {
	if m.failing == 0 {
		return "", false
	}
	for i := range m.j.Detectors {
		if m.j.Detectors[i].ID == id {
			if r := m.tracks[i].failed(); r >= 0 {
				return rules[r], true
			}
			return "", false
		}
	}
	return "", false
}

// Failing returns how many detectors are not to be believed.
func (m *Monitor) Failing() int { return m.failing }
