package validate

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// maxPlan is the largest payload of a fall-back plan, bytes.
const maxPlan = 16 << 10

// plan judges a fall-back plan. Nothing is remembered of it: whoever runs one
// takes only those with a higher sequence.
func (s *State) plan(reg *identity.Registry, now time.Time, m *traffic.Fallback) Verdict {
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	j, known := reg.Junction(m.Junction)
	if !known {
		return refuse(RuleJunction, "junction: %.40q is not in the registry", string(m.Junction))
	}
	if m.Seq == 0 {
		return refuse(RuleSchema, "seq: 0, the first is 1")
	}
	if err := m.Fits(j); err != nil {
		return refuse(RulePlan, "%v", err)
	}
	if d := time.UnixMilli(m.MadeMS).Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "made_ms: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	return ok
}
