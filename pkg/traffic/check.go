package traffic

import (
	"errors"
	"fmt"
)

// Check returns everything that is wrong with the definition, joined: each a
// [Problem] with the field and the rule that it breaks.
func (j *Junction) Check() error {
	var errs []error
	bad := func(rule, field string, args ...any) {
		errs = append(errs, Problem{Field: fmt.Sprintf("junction %s: ", j.ID) + fmt.Sprintf(field, args...), Rule: rule})
	}
	if j.ID == "" {
		bad("must not be empty", "id")
	}
	n := len(j.Groups)
	lanes := map[LaneID]bool{}
	for i, l := range j.Lanes {
		if l.ID == "" {
			bad("must not be empty", "lanes[%d].id", i)
		}
		if lanes[l.ID] {
			bad("must be unique", "lanes[%d].id %q", i, l.ID)
		}
		lanes[l.ID] = true
	}
	for i, g := range j.Groups {
		if g.Kind != Vehicles && g.Kind != Pedestrians && g.Kind != Buses {
			bad("must be vehicles, pedestrians or buses", "groups[%d].kind %q", i, g.Kind)
		}
		if g.MinGreenMS < 0 || g.YellowMS < 0 || g.AllRedMS < 0 || g.PedClearMS < 0 {
			bad("times must not be negative", "groups[%d]", i)
		}
	}
	for i, m := range j.Movements {
		if !lanes[m.From] {
			bad("names no lane of this junction", "movements[%d].from %q", i, m.From)
		}
		if !lanes[m.To] {
			bad("names no lane of this junction", "movements[%d].to %q", i, m.To)
		}
		if m.Group < 0 || m.Group >= n {
			bad("names no group", "movements[%d].group %d", i, m.Group)
		}
	}
	seen := map[DetectorID]bool{}
	for i, d := range j.Detectors {
		if d.ID == "" || seen[d.ID] {
			bad("must be unique and not empty", "detectors[%d].id %q", i, d.ID)
		}
		seen[d.ID] = true
		for _, m := range d.Movements {
			if m < 0 || m >= len(j.Movements) {
				bad("names no movement", "detectors[%d].movements %d", i, m)
			}
		}
	}
	if len(j.Conflicts) != n {
		bad("must have one entry a group", "conflicts: %d for %d groups", len(j.Conflicts), n)
	} else {
		for a, bs := range j.Conflicts {
			for _, b := range bs {
				if b < 0 || b >= n || b == a {
					bad("names no other group", "conflicts[%d] %d", a, b)
				} else if !contains(j.Conflicts[b], a) {
					bad("must be symmetric", "conflicts[%d] %d", a, b)
				}
			}
		}
	}
	for i, s := range j.Stages {
		if len(s.State) != n {
			bad("must have one aspect a group", "stages[%d].state %q", i, s.State)
			continue
		}
		for g := range n {
			if a := s.State.At(g); a != Red && !a.Go() {
				bad("only r, G and g are allowed in a stage", "stages[%d].state[%d] %q", i, g, a.String())
			}
		}
		if len(j.Conflicts) == n {
			for a, bs := range j.Conflicts {
				for _, b := range bs {
					if a < b && b < n && s.State.At(a).Go() && s.State.At(b).Go() {
						bad("conflicting groups must not be green together",
							"stages[%d] %q: groups %d and %d", i, s.Name, a, b)
					}
				}
			}
		}
	}
	if len(j.Stages) == 0 {
		bad("at least one is needed", "stages")
	}
	for i, s := range j.Plan.Steps {
		if s.Stage < 0 || s.Stage >= len(j.Stages) {
			bad("names no stage", "plan.steps[%d].stage %d", i, s.Stage)
		}
		if s.DurationMS <= 0 || s.IntergreenMS < 0 || s.IntergreenMS >= s.DurationMS {
			bad("duration must be positive and longer than its intergreen", "plan.steps[%d]", i)
		} else if green := s.DurationMS - s.IntergreenMS; green < j.Timing.MinGreenMS {
			bad(fmt.Sprintf("green of %d ms is below the minimum green of %d ms", green, j.Timing.MinGreenMS), "plan.steps[%d]", i)
		}
	}
	if len(j.Plan.Steps) == 0 {
		bad("at least one step is needed", "plan")
	}
	if j.Timing.YellowMS <= 0 || j.Timing.MinGreenMS < 0 || j.Timing.AllRedMS < 0 || j.Timing.MaxRedMS < 0 {
		bad("yellow must be positive, the others not negative", "timing")
	}
	return errors.Join(errs...)
}

func contains(s []int, v int) bool {
	for _, x := range s {
		if x == v {
			return true
		}
	}
	return false
}
