package plan

import (
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Against returns what is wrong with the file for the junction as it is filed,
// as [Problems]. The file must have passed Check.
func (f *File) Against(j *traffic.Junction) error {
	c := &checker{f: f}
	if f.Junction != j.ID {
		c.bad("junction", "%q: the definition is of %q", f.Junction, j.ID)
	}
	for g, x := range j.Groups {
		if groupNamed(j, x.Name) != g {
			c.bad("junction", "junction %s has two groups named %q: phases cannot tell them apart", j.ID, x.Name)
		}
	}
	served, known := make([]bool, len(j.Groups)), true
	for i := range f.Phases {
		p, at := &f.Phases[i], fmt.Sprintf("phases[%d]", i)
		for _, name := range append(slices.Clone(p.Groups), p.Permissive...) {
			g := groupNamed(j, name)
			if g < 0 {
				known = false
				c.bad(at+".groups", "%q is no group of junction %s", name, j.ID)
				continue
			}
			served[g] = true
			least := func(field string, has, needs int64) {
				if has < needs {
					c.bad(at+"."+field, "%s s: junction %s asks for %s s for %q", sec(has), j.ID, sec(needs), name)
				}
			}
			t := timesOf(j, g)
			least("all_red", p.AllRed, t.allRed)
			if j.Groups[g].Kind == traffic.Pedestrians {
				least("walk", p.WalkMS, t.minGreen)
				least("ped_clear", p.PedClearMS, t.clear)
				continue
			}
			least("min_green", p.MinGreenMS, t.minGreen)
			least("yellow", p.YellowMS, t.clear)
		}
	}
	for g, ok := range served {
		// A group that is never green in the filed plan need not be here.
		if !ok && slices.ContainsFunc(j.Plan.Steps, func(s traffic.PlanStep) bool { return j.Stages[s.Stage].State.At(g).Go() }) {
			c.bad("phases", "group %q has no phase, so that nobody would ever be let in", j.Groups[g].Name)
		}
	}
	if known {
		f.checkTogether(c, j)
	}
	if len(c.found) == 0 {
		for i := range f.Plans {
			f.compile(c, j, i)
		}
	}
	return c.found.err()
}

func groupNamed(j *traffic.Junction, name string) int {
	return slices.IndexFunc(j.Groups, func(g traffic.Group) bool { return g.Name == name })
}

// times are those of one group.
type times struct{ minGreen, clear, allRed int64 }

func timesOf(j *traffic.Junction, g int) times {
	or := func(own, common int64) int64 {
		if own != 0 {
			return own
		}
		return common
	}
	x := j.Groups[g]
	t := times{or(x.MinGreenMS, j.Timing.MinGreenMS), or(x.YellowMS, j.Timing.YellowMS), or(x.AllRedMS, j.Timing.AllRedMS)}
	if x.Kind == traffic.Pedestrians {
		t.clear = x.PedClearMS
	}
	return t
}

// state is what the groups show while these phases are green.
func (f *File) state(j *traffic.Junction, phases []int) traffic.State {
	b := []byte(traffic.AllOf(traffic.Red, len(j.Groups)))
	for _, n := range phases {
		p, _ := f.phase(n)
		for _, name := range p.Permissive {
			if g := groupNamed(j, name); b[g] != byte(traffic.Green) {
				b[g] = byte(traffic.Permissive)
			}
		}
		for _, name := range p.Groups {
			b[groupNamed(j, name)] = byte(traffic.Green)
		}
	}
	return traffic.State(b)
}

// checkTogether refuses what may be green at the same time and must not: the
// groups of one phase, and of phases of different rings between the same
// barriers, whatever the splits are.
func (f *File) checkTogether(c *checker, j *traffic.Junction) {
	conflict := func(s traffic.State) (a, b int, rule string) {
		for a := range j.Groups {
			for b := range j.Groups {
				if !s.At(a).Go() || !s.At(b).Go() {
					continue
				}
				if has(j.Conflicts, a, b) {
					return a, b, "conflict"
				}
				if has(j.Yields, a, b) && s.At(a) != traffic.Permissive && !(has(j.Yields, b, a) && s.At(b) == traffic.Permissive) {
					return a, b, "cross: the first must be permissive"
				}
			}
		}
		return -1, -1, ""
	}
	alone := map[int]bool{}
	for i, p := range f.Phases {
		if a, b, rule := conflict(f.state(j, []int{p.Number})); rule != "" {
			alone[p.Number] = true
			c.bad(fmt.Sprintf("phases[%d].groups", i), "%q and %q %s", j.Groups[a].Name, j.Groups[b].Name, rule)
		}
	}
	for r, ring := range f.Rings {
		for s, section := range ring {
			for q := r + 1; q < len(f.Rings); q++ {
				for _, n := range section {
					for _, m := range f.Rings[q][s] {
						if a, b, rule := conflict(f.state(j, []int{n, m})); rule != "" && !alone[n] && !alone[m] {
							c.bad(fmt.Sprintf("rings[%d][%d]", q, s), "phases %d and %d of both rings may be green together: %q and %q %s",
								n, m, j.Groups[a].Name, j.Groups[b].Name, rule)
						}
					}
				}
			}
		}
	}
}

func has(lists [][]int, a, b int) bool { return a < len(lists) && slices.Contains(lists[a], b) }

// interval is a part of the cycle in which the same phases are in their splits.
type interval struct {
	phases   []int // one a ring
	from, to int64
}

// intervals cuts one cycle wherever a ring changes its phase.
func (f *File) intervals(p *Timing) []interval {
	type change struct {
		at    int64
		phase int
	}
	rings := make([][]change, len(f.Rings))
	cuts := []int64{p.CycleMS}
	for r, ring := range f.Rings {
		at := int64(0)
		for _, section := range ring {
			for _, n := range section {
				rings[r] = append(rings[r], change{at, n})
				cuts = append(cuts, at)
				at += p.Splits[n]
			}
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var out []interval
	for i := 0; i+1 < len(cuts); i++ {
		x := interval{from: cuts[i], to: cuts[i+1]}
		for _, ring := range rings {
			for k := len(ring) - 1; k >= 0; k-- {
				if ring[k].at <= x.from {
					x.phases = append(x.phases, ring[k].phase)
					break
				}
			}
		}
		out = append(out, x)
	}
	return out
}

// compile makes stages and steps of one plan: those of j, and after them what
// they lack. Problems go to c.
func (f *File) compile(c *checker, j *traffic.Junction, which int) ([]traffic.Stage, traffic.Plan) {
	p := &f.Plans[which]
	at := fmt.Sprintf("plans[%d].splits", which)
	stages := slices.Clone(j.Stages)
	out := traffic.Plan{Name: p.Name, OffsetMS: p.OffsetMS}
	list := f.intervals(p)
	for i, x := range list {
		next := list[(i+1)%len(list)]
		s, to := f.state(j, x.phases), f.state(j, next.phases)
		k := slices.IndexFunc(stages, func(st traffic.Stage) bool { return st.State == s })
		if k < 0 {
			k = len(stages)
			stages = append(stages, traffic.Stage{Name: fmt.Sprintf("phases %v", x.phases), State: s})
		}
		// What ends here, for which somebody loses the green.
		var clear, red int64
		for g := range j.Groups {
			if !s.At(g).Go() || to.At(g).Go() {
				continue
			}
			for _, n := range x.phases {
				ph, _ := f.phase(n)
				if !slices.Contains(ph.Groups, j.Groups[g].Name) && !slices.Contains(ph.Permissive, j.Groups[g].Name) {
					continue
				}
				if red = max(red, ph.AllRed); j.Groups[g].Kind == traffic.Pedestrians {
					clear = max(clear, ph.PedClearMS)
				} else {
					clear = max(clear, ph.YellowMS)
				}
			}
		}
		step := traffic.PlanStep{Stage: k, DurationMS: x.to - x.from, IntergreenMS: clear + red}
		if green := step.DurationMS - step.IntergreenMS; green <= 0 || green < j.Timing.MinGreenMS {
			c.bad(at, "phases %v are together from second %s to %s, of which %s s are clearance: less than the minimum green of %s s is left; let the rings change together, or further apart",
				x.phases, sec(x.from), sec(x.to), sec(step.IntergreenMS), sec(j.Timing.MinGreenMS))
		}
		out.Steps = append(out.Steps, step)
	}
	return stages, out
}

// Compile returns the junction with the named plan as its fixed plan: the stages
// that it has, those that the plan needs besides, and the group times of the
// phases where they are longer than what is filed. An error is [Problems], or of
// kind NotFound where there is no such plan. j is not changed.
func (f *File) Compile(j *traffic.Junction, name string) (*traffic.Junction, error) {
	which := slices.IndexFunc(f.Plans, func(p Timing) bool { return p.Name == name })
	if which < 0 {
		return nil, kind.Errorf(kind.NotFound, "plan %q: not in the file of junction %s", name, f.Junction)
	}
	if err := f.Check(); err != nil {
		return nil, err
	}
	if err := f.Against(j); err != nil {
		return nil, err
	}
	c := *j
	c.Groups = slices.Clone(j.Groups)
	for _, p := range f.Phases {
		for _, name := range append(slices.Clone(p.Groups), p.Permissive...) {
			g := groupNamed(j, name)
			t, x := timesOf(j, g), &c.Groups[g]
			raise := func(to *int64, filed, ms int64) {
				if ms > filed {
					*to = max(*to, ms)
				}
			}
			raise(&x.AllRedMS, t.allRed, p.AllRed)
			if x.Kind == traffic.Pedestrians {
				raise(&x.MinGreenMS, t.minGreen, p.WalkMS)
				raise(&x.PedClearMS, t.clear, p.PedClearMS)
			} else {
				raise(&x.MinGreenMS, t.minGreen, p.MinGreenMS)
				raise(&x.YellowMS, t.clear, p.YellowMS)
			}
		}
	}
	// All plans' stages, in the order of the file, so that every plan of a file
	// gives a junction with the same stages.
	for i := range f.Plans {
		stages, steps := f.compile(&checker{f: f}, &c, i)
		if c.Stages = stages; i == which {
			c.Plan = steps
		}
	}
	if err := c.Check(); err != nil {
		return nil, kind.Errorf(kind.Invalid, "plan %q: %w", name, err)
	}
	return &c, nil
}

// Controller returns the junction as Compile makes it, and a controller that runs
// it by the schedule: the plan that is in force in the zone, from its own cycle's
// place in time.
func (f *File) Controller(j *traffic.Junction, zone *time.Location) (*traffic.Junction, timing.Controller, error) {
	if err := f.Check(); err != nil {
		return nil, timing.Controller{}, err
	}
	compiled := map[string]*traffic.Junction{}
	for _, p := range f.Plans {
		c, err := f.Compile(j, p.Name)
		if err != nil {
			return nil, timing.Controller{}, err
		}
		compiled[p.Name] = c
	}
	fixed, err := timing.Named("fixed")
	if err != nil {
		return nil, timing.Controller{}, err
	}
	return compiled[f.Plans[0].Name], timing.Controller{Name: "plan", Version: fixed.Version,
		Next: func(_ *traffic.Junction, r timing.Rules, m timing.Memory, v timing.View) (timing.Memory, timing.Decision) {
			return fixed.Next(compiled[f.At(v.Now.In(zone))], r, m, v)
		}}, nil
}

// Export makes a file of a junction's fixed plan: one phase for each step, in one
// ring, in force all week. What it cannot say without being unsafe is an error,
// as [Problems]. Intergreens that the plan has beyond the junction's own times
// become green, which is what the fixed controller makes of them.
func Export(j *traffic.Junction) (*File, error) {
	f := &File{Junction: j.ID, Name: j.Name}
	p := Timing{Name: j.Plan.Name, CycleMS: j.Plan.CycleMS(), Splits: map[int]int64{}}
	if p.Name == "" {
		p.Name = "filed"
	}
	if p.CycleMS > 0 {
		p.OffsetMS = (j.Plan.OffsetMS%p.CycleMS + p.CycleMS) % p.CycleMS
	}
	var section [][]int
	for i, s := range j.Plan.Steps {
		ph := Phase{Number: i + 1, Name: j.Stages[s.Stage].Name}
		for g, x := range j.Groups {
			a := j.Stages[s.Stage].State.At(g)
			if !a.Go() {
				continue
			}
			t := timesOf(j, g)
			if a == traffic.Permissive {
				ph.Permissive = append(ph.Permissive, x.Name)
			} else {
				ph.Groups = append(ph.Groups, x.Name)
			}
			ph.AllRed = max(ph.AllRed, t.allRed)
			if x.Kind == traffic.Pedestrians {
				ph.WalkMS, ph.PedClearMS = max(ph.WalkMS, t.minGreen), max(ph.PedClearMS, t.clear)
			} else {
				ph.MinGreenMS, ph.YellowMS = max(ph.MinGreenMS, t.minGreen), max(ph.YellowMS, t.clear)
			}
		}
		ph.MinGreenMS = max(ph.MinGreenMS, 1)
		f.Phases = append(f.Phases, ph)
		p.Splits[ph.Number] = s.DurationMS
		section = append(section, []int{ph.Number})
	}
	f.Rings = []Ring{section}
	f.Plans = []Timing{p}
	f.Schedule = []Period{{Days: dayWords[0].days, ToMinute: dayMinutes, Plan: p.Name}}
	if err := f.Check(); err != nil {
		return nil, err
	}
	return f, f.Against(j)
}
