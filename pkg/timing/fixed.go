package timing

import (
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// fixed follows the junction's plan by Unix time.
//
// A step's stage is followed by the next one's just early enough for the
// sequencer's change to end with the step: where the plan's intergreen is
// longer than the change needs, the green is given what is left. Where it is
// shorter, the green ends when the plan says so, and the next one is late.
func fixed(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision) {
	m = m.observe(j, v)
	p := j.Plan
	t := m.AtMS - p.OffsetMS
	t -= floor(t, p.CycleMS()) * p.CycleMS()
	into := t
	for i, s := range p.Steps {
		if into >= s.DurationMS {
			into -= s.DurationMS
			continue
		}
		next := (i + 1) % len(p.Steps)
		change := min(changeMS(j, limitsOf(j, r), s.Stage, p.Steps[next].Stage), s.IntergreenMS)
		if into >= s.DurationMS-change {
			i, s = next, p.Steps[next]
		}
		return m.decide(s.Stage, fmt.Sprintf("fixed plan %s: step %d, stage %d, second %d of %d",
			p.Name, i, s.Stage, t/1000, p.CycleMS()/1000))
	}
	return m.repeat() // not reached: t lies within the cycle
}
