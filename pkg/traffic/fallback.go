package traffic

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// Fallback is the plan that a roadside unit runs alone, with what it was made
// from. It is a record of signal-control, one party: so it may set the times of
// the filed sequence of stages, within the filed limits, and nothing else. For
// anything else a junction is filed anew, which takes two departments.
type Fallback struct {
	District DistrictID `json:"district"`
	Junction JunctionID `json:"junction"`
	// Seq rises with each plan for a junction, Height is the block whose frames
	// were counted last.
	Seq    uint64 `json:"seq"`
	Height uint64 `json:"height"`
	// MadeMS is when it was made, Unix milliseconds.
	MadeMS int64 `json:"made_ms"`
	Plan   Plan  `json:"plan"`
	// PerHour are the flows that it was made from, in vehicles an hour by movement;
	// -1 where it was not known. FlowPPM is the sum of the critical flow ratios in
	// millionths, and Over says that it is too much for any cycle.
	PerHour []int `json:"per_hour"`
	FlowPPM int64 `json:"flow_ppm"`
	Over    bool  `json:"over_capacity,omitempty"`
}

// ParseFallback decodes JSON and refuses unknown fields.
func ParseFallback(b []byte) (*Fallback, error) {
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	var f Fallback
	if err := d.Decode(&f); err != nil {
		return nil, kind.Errorf(kind.Invalid, "fall-back plan: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, kind.Errorf(kind.Invalid, "fall-back plan: data after the end of the document")
	}
	return &f, nil
}

const longestStepMS = 3_600_000

// Fits returns nil if the plan only gives other times to the filed sequence of
// stages, within the filed limits; otherwise an error of kind Invalid that names
// the field and the rule.
func (b *Fallback) Fits(j *Junction) error {
	bad := func(field, rule string, args ...any) error {
		return kind.Errorf(kind.Invalid, "fall-back plan: "+field+": "+rule, args...)
	}
	p := b.Plan
	if b.Junction != j.ID {
		return bad("junction", "%.40q, this is %q", string(b.Junction), j.ID)
	}
	if len(p.Name) > 128 {
		return bad("plan.name", "%d bytes, at most 128", len(p.Name))
	}
	if len(p.Steps) != len(j.Plan.Steps) {
		return bad("plan.steps", "%d, the filed plan has %d: only times may change", len(p.Steps), len(j.Plan.Steps))
	}
	if len(b.PerHour) > len(j.Movements) {
		return bad("per_hour", "%d for %d movements", len(b.PerHour), len(j.Movements))
	}
	own := func(of, common int64) int64 {
		if of != 0 {
			return of
		}
		return common
	}
	for i, s := range p.Steps {
		at := fmt.Sprintf("plan.steps[%d]", i)
		if s.Stage != j.Plan.Steps[i].Stage {
			return bad(at+".stage", "%d, the filed plan has %d: only times may change", s.Stage, j.Plan.Steps[i].Stage)
		}
		if s.DurationMS > longestStepMS || s.IntergreenMS > longestStepMS {
			return bad(at+".duration_ms", "%d, at most %d", max(s.DurationMS, s.IntergreenMS), longestStepMS)
		}
		// What the groups need that end here.
		now, next := j.Stages[s.Stage].State, j.Stages[j.Plan.Steps[(i+1)%len(p.Steps)].Stage].State
		var clear, red int64
		for g, x := range j.Groups {
			if !now.At(g).Go() || next.At(g).Go() {
				continue
			}
			red = max(red, own(x.AllRedMS, j.Timing.AllRedMS))
			if x.Kind == Pedestrians {
				clear = max(clear, x.PedClearMS)
			} else {
				clear = max(clear, own(x.YellowMS, j.Timing.YellowMS))
			}
		}
		if s.IntergreenMS < clear+red {
			return bad(at+".intergreen_ms", "%d, the groups that end need %d", s.IntergreenMS, clear+red)
		}
	}
	c := *j
	c.Plan = p
	if err := c.Check(); err != nil {
		return kind.Errorf(kind.Invalid, "fall-back plan: %w", err)
	}
	if cycle := p.CycleMS(); p.OffsetMS < 0 || p.OffsetMS >= cycle {
		return bad("plan.offset_ms", "%d: must be 0 or more, and less than the cycle of %d", p.OffsetMS, cycle)
	}
	return nil
}
