package validate

import (
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// A fall-back plan may set times within what is filed; anything else is not for
// one party to sign.
func TestPlanRefused(t *testing.T) {
	r := importRegistry(t)
	j, ok := r.Junction("j1")
	if !ok {
		t.Fatal("no junction j1")
	}
	for _, c := range []struct {
		name   string
		signer string
		change func(*traffic.Fallback)
		rule   Rule
	}{
		{"good", "control", func(*traffic.Fallback) {}, ""},
		{"longer", "control", func(p *traffic.Fallback) { p.Plan.Steps[0].DurationMS += 5000 }, ""},
		{"by a unit", "d1", func(*traffic.Fallback) {}, RuleMaySign},
		{"district", "control", func(p *traffic.Fallback) { p.District = "hills" }, RuleDistrict},
		{"junction", "control", func(p *traffic.Fallback) { p.Junction = "j9" }, RuleJunction},
		{"seq", "control", func(p *traffic.Fallback) { p.Seq = 0 }, RuleSchema},
		{"other stages", "control", func(p *traffic.Fallback) { p.Plan.Steps[0].Stage = 1 - p.Plan.Steps[0].Stage }, RulePlan},
		{"short green", "control", func(p *traffic.Fallback) {
			p.Plan.Steps[0].DurationMS = p.Plan.Steps[0].IntergreenMS + j.Timing.MinGreenMS - 1
		}, RulePlan},
		{"no clearance", "control", func(p *traffic.Fallback) { p.Plan.Steps[0].IntergreenMS = 1 }, RulePlan},
		{"ahead", "control", func(p *traffic.Fallback) { p.MadeMS = noon.Add(3 * time.Second).UnixMilli() }, RuleClockAhead},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &traffic.Fallback{District: "harbour", Junction: "j1", Seq: 1, MadeMS: noon.UnixMilli(), Plan: j.Plan}
			p.Plan.Steps = append([]traffic.PlanStep(nil), j.Plan.Steps...)
			c.change(p)
			x := sign(t, c.signer, identity.KindPlan, p)
			x.Plan = p
			if c.rule == "" {
				mustAccept(t, NewState(Edge()), r, noon, x)
				return
			}
			mustRefuse(t, NewState(Edge()), r, noon, x, c.rule)
			covered[c.rule] = true
		})
	}
}
