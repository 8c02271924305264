package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Change is one difference between two files.
type Change struct {
	Field string `json:"field"`
	From  string `json:"from"` // "absent" where there was none
	To    string `json:"to"`
}

func (c Change) String() string { return c.Field + ": " + c.From + " → " + c.To }

const absent = "absent"

// Diff returns what is different in b, in the order of a file: by phase number,
// by name of the plan and by day, so that order and way of writing do not matter
// where they mean nothing.
func Diff(a, b *File) []Change {
	var out []Change
	tell := func(field, from, to string) {
		if from != to {
			out = append(out, Change{field, from, to})
		}
	}
	tell("junction", string(a.Junction), string(b.Junction))
	tell("name", a.Name, b.Name)
	tell("zone", a.Zone, b.Zone)
	var numbers []int
	for _, f := range []*File{a, b} {
		for _, p := range f.Phases {
			numbers = append(numbers, p.Number)
		}
	}
	slices.Sort(numbers)
	for _, n := range slices.Compact(numbers) {
		p, _ := a.phase(n)
		q, _ := b.phase(n)
		at := "phases." + strconv.Itoa(n)
		if p == nil || q == nil {
			tell(at, phaseText(p), phaseText(q))
			continue
		}
		tell(at+".name", p.Name, q.Name)
		tell(at+".groups", names(p.Groups), names(q.Groups))
		tell(at+".permissive", names(p.Permissive), names(q.Permissive))
		tell(at+".min_green", sec(p.MinGreenMS), sec(q.MinGreenMS))
		tell(at+".yellow", sec(p.YellowMS), sec(q.YellowMS))
		tell(at+".all_red", sec(p.AllRed), sec(q.AllRed))
		tell(at+".walk", sec(p.WalkMS), sec(q.WalkMS))
		tell(at+".ped_clear", sec(p.PedClearMS), sec(q.PedClearMS))
	}
	for r := range max(len(a.Rings), len(b.Rings)) {
		tell(fmt.Sprintf("rings.%d", r), ringText(a.Rings, r), ringText(b.Rings, r))
	}
	var plans []string
	for _, f := range []*File{a, b} {
		for _, p := range f.Plans {
			if !slices.Contains(plans, p.Name) {
				plans = append(plans, p.Name)
			}
		}
	}
	for _, name := range plans {
		p, q := a.plan(name), b.plan(name)
		at := "plans." + name
		if p == nil || q == nil {
			tell(at, planText(p), planText(q))
			continue
		}
		tell(at+".cycle", sec(p.CycleMS), sec(q.CycleMS))
		tell(at+".offset", sec(p.OffsetMS), sec(q.OffsetMS))
		var phases []int
		phases = append(append(phases, phasesOf(p.Splits)...), phasesOf(q.Splits)...)
		slices.Sort(phases)
		for _, n := range slices.Compact(phases) {
			tell(fmt.Sprintf("%s.splits.%d", at, n), splitText(p, n), splitText(q, n))
		}
	}
	for d := range 7 {
		d := time.Weekday((d + 1) % 7)
		tell("schedule."+strings.ToLower(d.String()), a.dayText(d), b.dayText(d))
	}
	return out
}

func names(l []string) string { return "[" + strings.Join(l, ", ") + "]" }

func phaseText(p *Phase) string {
	if p == nil {
		return absent
	}
	return "green for " + names(append(slices.Clone(p.Groups), p.Permissive...))
}

func ringText(rings []Ring, r int) string {
	if r >= len(rings) {
		return absent
	}
	return strings.ReplaceAll(fmt.Sprint(rings[r]), " ", ", ")
}

func planText(p *Timing) string {
	if p == nil {
		return absent
	}
	return "cycle " + sec(p.CycleMS) + " s"
}

func splitText(p *Timing, n int) string {
	if ms, ok := p.Splits[n]; ok {
		return sec(ms)
	}
	return absent
}

// dayText lists when a plan begins on a day.
func (f *File) dayText(d time.Weekday) string {
	var on []Period
	for _, p := range f.Schedule {
		if p.Days[d] {
			on = append(on, p)
		}
	}
	slices.SortFunc(on, func(a, b Period) int { return a.FromMinute - b.FromMinute })
	var out []string
	last := ""
	for _, p := range on {
		if p.Plan != last {
			out = append(out, clock(p.FromMinute)+" "+p.Plan)
		}
		last = p.Plan
	}
	return strings.Join(out, ", ")
}
