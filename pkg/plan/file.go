package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// File is the content of a plan file. Times are milliseconds.
type File struct {
	Junction traffic.JunctionID
	Name     string
	// Zone is the time zone of the schedule, as in the IANA data base; "" is UTC.
	Zone     string
	Phases   []Phase
	Rings    []Ring
	Plans    []Timing
	Schedule []Period

	lines map[string]int // of fields, where the file was read
}

// Phase is a set of groups that are green together.
type Phase struct {
	Number int
	Name   string
	// Groups are green; those in Permissive too, and give way.
	Groups, Permissive           []string
	MinGreenMS, YellowMS, AllRed int64
	WalkMS, PedClearMS           int64 // 0 where the phase has no pedestrians
}

// Ring is, between each two barriers, the phases that follow each other.
type Ring [][]int

// Timing is one plan.
type Timing struct {
	Name              string
	CycleMS, OffsetMS int64
	Splits            map[int]int64 // by phase
}

// Period is a time of some days at which a plan is in force, in minutes of the
// day. ToMinute is not part of it.
type Period struct {
	Days                 [7]bool // by time.Weekday
	FromMinute, ToMinute int
	Plan                 string
}

// Problem is one rule that a file breaks.
type Problem struct {
	Line  int    `json:"line"` // 0 where the file was not read from text
	Field string `json:"field"`
	Rule  string `json:"rule"`
}

func (p Problem) Error() string {
	if p.Line == 0 {
		return p.Field + ": " + p.Rule
	}
	return fmt.Sprintf("line %d: %s: %s", p.Line, p.Field, p.Rule)
}

// Problems are all of one file, in the order of its lines.
type Problems []Problem

func (p Problems) Error() string {
	var s []string
	for _, x := range p {
		s = append(s, x.Error())
	}
	return strings.Join(s, "\n")
}

// err returns the problems as an error, nil if there are none.
func (p Problems) err() error {
	if len(p) == 0 {
		return nil
	}
	slices.SortStableFunc(p, func(a, b Problem) int { return a.Line - b.Line })
	return p
}

// checker collects problems.
type checker struct {
	f     *File
	found Problems
}

func (c *checker) bad(field, rule string, args ...any) {
	line := 0
	// The field itself, or the nearest around it that has a line.
	for at := field; ; {
		if n, ok := c.f.lines[at]; ok {
			line = n
			break
		}
		i := strings.LastIndexAny(at, ".[")
		if i < 0 {
			line = c.f.lines["file"]
			break
		}
		at = at[:i]
	}
	c.found = append(c.found, Problem{Line: line, Field: field, Rule: fmt.Sprintf(rule, args...)})
}

// sec writes milliseconds as seconds.
func sec(ms int64) string {
	sign := ""
	if ms < 0 {
		sign, ms = "-", -ms
	}
	s := fmt.Sprintf("%d.%03d", ms/1000, ms%1000)
	return sign + strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

func clock(minute int) string { return fmt.Sprintf("%02d:%02d", minute/60, minute%60) }

// Bounds of a file.
const (
	mostPhases  = 32
	mostRings   = 4
	mostPlans   = 64
	mostPeriods = 256
	mostGroups  = 64
	mostText    = 128
	mostTimeMS  = 3_600_000
)

func (f *File) phase(n int) (*Phase, int) {
	for i := range f.Phases {
		if f.Phases[i].Number == n {
			return &f.Phases[i], i
		}
	}
	return nil, -1
}

// leastMS is the shortest split of the phase.
func (p *Phase) leastMS() int64 {
	return max(p.MinGreenMS+p.YellowMS, p.WalkMS+p.PedClearMS) + p.AllRed
}

// Check returns what is wrong with the file by itself, as [Problems].
func (f *File) Check() error {
	c := &checker{f: f}
	f.checkPhases(c)
	f.checkRings(c)
	if len(c.found) == 0 { // the others rest on these
		f.checkPlans(c)
		f.checkSchedule(c)
	}
	return c.found.err()
}

func (f *File) checkPhases(c *checker) {
	if f.Junction == "" {
		c.bad("junction", "must not be empty")
	}
	if len(f.Phases) == 0 || len(f.Phases) > mostPhases {
		c.bad("phases", "there must be 1 to %d", mostPhases)
	}
	for i := range f.Phases {
		p, at := &f.Phases[i], fmt.Sprintf("phases[%d]", i)
		if p.Number < 1 || p.Number > mostPhases {
			c.bad(at+".phase", "%d: must be 1 to %d", p.Number, mostPhases)
		}
		if _, k := f.phase(p.Number); k != i {
			c.bad(at+".phase", "%d: there is another phase of this number", p.Number)
		}
		if len(p.Groups)+len(p.Permissive) == 0 {
			c.bad(at+".groups", "a phase needs a group")
		}
		if len(p.Groups)+len(p.Permissive) > mostGroups {
			c.bad(at+".groups", "more than %d groups", mostGroups)
		}
		seen := map[string]bool{}
		for _, g := range append(slices.Clone(p.Groups), p.Permissive...) {
			if seen[g] {
				c.bad(at+".groups", "%q is named twice", g)
			}
			seen[g] = true
		}
		for _, v := range []struct {
			name  string
			ms    int64
			least int64
		}{{"min_green", p.MinGreenMS, 1}, {"yellow", p.YellowMS, 0}, {"all_red", p.AllRed, 0}, {"walk", p.WalkMS, 0}, {"ped_clear", p.PedClearMS, 0}} {
			if v.ms < v.least || v.ms > mostTimeMS {
				c.bad(at+"."+v.name, "%s s: must be %s to %s s", sec(v.ms), sec(v.least), sec(mostTimeMS))
			}
		}
	}
}

func (f *File) checkRings(c *checker) {
	if len(f.Rings) == 0 || len(f.Rings) > mostRings {
		c.bad("rings", "there must be 1 to %d", mostRings)
		return
	}
	in := map[int]string{}
	for r, ring := range f.Rings {
		at := fmt.Sprintf("rings[%d]", r)
		if len(ring) != len(f.Rings[0]) {
			c.bad(at, "barrier mismatch: %d sections, ring 0 has %d", len(ring), len(f.Rings[0]))
		}
		if len(ring) == 0 {
			c.bad(at, "a ring needs a section")
		}
		for s, section := range ring {
			at := fmt.Sprintf("%s[%d]", at, s)
			if len(section) == 0 {
				c.bad(at, "a section needs a phase")
			}
			for _, n := range section {
				if _, i := f.phase(n); i < 0 {
					c.bad(at, "there is no phase %d", n)
				}
				if other, ok := in[n]; ok {
					c.bad(at, "phase %d is in %s already", n, other)
				}
				in[n] = at
			}
		}
	}
	for i, p := range f.Phases {
		if in[p.Number] == "" {
			c.bad(fmt.Sprintf("phases[%d]", i), "phase %d is in no ring", p.Number)
		}
	}
}

func (f *File) checkPlans(c *checker) {
	if len(f.Plans) == 0 || len(f.Plans) > mostPlans {
		c.bad("plans", "there must be 1 to %d", mostPlans)
	}
	names := map[string]bool{}
	for i := range f.Plans {
		p, at := &f.Plans[i], fmt.Sprintf("plans[%d]", i)
		if p.Name == "" || names[p.Name] {
			c.bad(at+".name", "%q: must be unique and not empty", p.Name)
		}
		names[p.Name] = true
		if p.CycleMS <= 0 || p.CycleMS > mostTimeMS {
			c.bad(at+".cycle", "%s s: must be above 0 and at most %s s", sec(p.CycleMS), sec(mostTimeMS))
			continue
		}
		if p.OffsetMS < 0 || p.OffsetMS >= p.CycleMS {
			c.bad(at+".offset", "%s s: must be 0 or more, and less than the cycle of %s s", sec(p.OffsetMS), sec(p.CycleMS))
		}
		for n := range p.Splits {
			if _, k := f.phase(n); k < 0 {
				c.bad(fmt.Sprintf("%s.splits.%d", at, n), "there is no phase %d", n)
			}
		}
		for k := range f.Phases {
			ph := &f.Phases[k]
			field := fmt.Sprintf("%s.splits.%d", at, ph.Number)
			split, ok := p.Splits[ph.Number]
			switch {
			case !ok:
				c.bad(at+".splits", "phase %d has none", ph.Number)
			case split > mostTimeMS:
				c.bad(field, "%s s: must be at most %s s", sec(split), sec(mostTimeMS))
			case split < ph.MinGreenMS+ph.YellowMS+ph.AllRed:
				c.bad(field, "%s s: less than minimum green, yellow and all-red, %s s", sec(split), sec(ph.MinGreenMS+ph.YellowMS+ph.AllRed))
			case split < ph.leastMS():
				c.bad(field, "%s s: less than walk, pedestrian clearance and all-red, %s s", sec(split), sec(ph.leastMS()))
			}
		}
		for r, ring := range f.Rings {
			total := int64(0)
			for s, section := range ring {
				var mine, first int64
				for _, n := range section {
					mine += p.Splits[n]
				}
				for _, n := range f.Rings[0][s] {
					first += p.Splits[n]
				}
				if mine != first {
					c.bad(at+".splits", "barrier mismatch: section %d of ring %d lasts %s s, of ring 0 %s s", s, r, sec(mine), sec(first))
				}
				total += mine
			}
			if total != p.CycleMS {
				c.bad(at+".splits", "ring %d sums to %s s, the cycle is %s s", r, sec(total), sec(p.CycleMS))
			}
		}
	}
}

const (
	dayMinutes  = 24 * 60
	weekMinutes = 7 * dayMinutes
)

func (f *File) checkSchedule(c *checker) {
	if len(f.Schedule) == 0 || len(f.Schedule) > mostPeriods {
		c.bad("schedule", "there must be 1 to %d periods", mostPeriods)
		return
	}
	week := make([]int, weekMinutes) // number of the period, from 1
	for i, p := range f.Schedule {
		at := fmt.Sprintf("schedule[%d]", i)
		if f.plan(p.Plan) == nil {
			c.bad(at+".plan", "there is no plan %q", p.Plan)
		}
		if p.Days == [7]bool{} {
			c.bad(at+".days", "names no day")
		}
		if p.FromMinute < 0 || p.ToMinute > dayMinutes || p.FromMinute >= p.ToMinute {
			c.bad(at+".from", "%s to %s: must be within a day, and not empty", clock(p.FromMinute), clock(p.ToMinute))
			continue
		}
		told := map[int]bool{}
		for d, on := range p.Days {
			for m := p.FromMinute; on && m < p.ToMinute; m++ {
				w := &week[d*dayMinutes+m]
				if *w != 0 && !told[*w] {
					told[*w] = true
					c.bad(at, "overlaps with schedule[%d] on %s at %s", *w-1, time.Weekday(d), clock(m))
				}
				*w = i + 1
			}
		}
	}
	for m := 0; m < weekMinutes; m++ {
		if week[m] != 0 {
			continue
		}
		end := m
		for end < weekMinutes && week[end] == 0 && end/dayMinutes == m/dayMinutes {
			end++
		}
		c.bad("schedule", "gap on %s from %s to %s", time.Weekday(m/dayMinutes), clock(m%dayMinutes), clock((end-1)%dayMinutes+1))
		m = end - 1
	}
}

func (f *File) plan(name string) *Timing {
	for i := range f.Plans {
		if f.Plans[i].Name == name {
			return &f.Plans[i]
		}
	}
	return nil
}

// At returns the name of the plan in force at t, by t's own clock and calendar:
// give it in the file's zone.
func (f *File) At(t time.Time) string {
	m := t.Hour()*60 + t.Minute()
	for _, p := range f.Schedule {
		if p.Days[t.Weekday()] && m >= p.FromMinute && m < p.ToMinute {
			return p.Plan
		}
	}
	return ""
}
