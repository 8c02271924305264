package signalcontrol

import (
	"context"
	"crypto/ed25519"
	"maps"
	"slices"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/plan"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// fallbackState counts flows, and has the newest plans. A plan is a function of
// the agreed frames since the service started; after a restart units keep what
// they have, and the first new plan comes with the first quarter of an hour.
type fallbackState struct {
	flows map[traffic.JunctionID]*flowsOf
	// said is the newest plan of each junction, signed.
	said   map[traffic.JunctionID][]byte
	saidAt time.Time
	maySay bool
}

type flowsOf struct {
	j     *traffic.Junction
	flows *plan.Flows
}

// sayEvery is how often units hear their plan again, by the district's clock:
// one that was away, or was exchanged, has it soon.
const sayEvery = time.Minute

// Fallbacks returns the fall-back plans that follow from the accepted frames of
// the block at height, for the junctions for which a quarter of an hour of flows
// has become complete. Blocks must come in order, each once.
func (c *Core) Fallbacks(height ledger.Height, frames []*traffic.Frame, junction func(traffic.JunctionID) (*traffic.Junction, bool)) ([]traffic.Fallback, []Refusal) {
	s := &c.health.fallback
	if s.flows == nil {
		s.flows = map[traffic.JunctionID]*flowsOf{}
	}
	var out []traffic.Fallback
	var refused []Refusal
	for _, f := range frames {
		j, ok := junction(f.Junction)
		if !ok || f.Interval <= 0 {
			continue
		}
		x := s.flows[j.ID]
		if x == nil || x.j != j {
			x = &flowsOf{j: j, flows: plan.NewFlows(j)}
			s.flows[j.ID] = x
		}
		if !x.flows.Observe(f, func(d traffic.DetectorID) bool { _, failed := c.Failed(j.ID, d); return failed }) {
			continue
		}
		perHour := x.flows.PerHour()
		p, made, err := plan.Webster(j, perHour, plan.Options{})
		b := traffic.Fallback{District: c.cfg.District, Junction: j.ID, Seq: uint64(height), Height: uint64(height), MadeMS: f.Time.UnixMilli(),
			Plan: p, PerHour: perHour, FlowPPM: made.FlowPPM, Over: made.Over}
		if err == nil {
			b.Plan.Name = "webster"
			err = b.Fits(j) // what a unit will ask
		}
		if err != nil {
			refused = append(refused, Refusal{Junction: j.ID, Frame: f.FrameKey, Reason: err.Error()})
			continue
		}
		out = append(out, b)
	}
	return out, refused
}

// plans makes, files and says fall-back plans.
func (s *Service) plans(ctx context.Context, height ledger.Height, frames []*traffic.Frame, reg *identity.Registry) {
	made, refused := s.core.Fallbacks(height, frames, reg.Junction)
	for _, r := range refused {
		s.log.Warn("no fall-back plan", "intersection", r.Junction, "reason", r.Reason)
	}
	f := &s.core.health.fallback
	if f.said == nil {
		f.said, f.maySay = map[traffic.JunctionID][]byte{}, true
	}
	if len(made) > 0 {
		holder, ok := reg.Holder(identity.IDOf(s.cfg.Key.Public().(ed25519.PublicKey)))
		if !ok || !holder.May(identity.KindPlan) {
			if f.maySay {
				s.log.Warn("no fall-back plans: signal-control may not sign them, by the registry")
			}
			f.maySay = false
			return
		}
	}
	for i := range made {
		p := &made[i]
		payload, err := wire.EncodeFallback(p)
		if err != nil {
			s.log.Error("fall-back plan not encoded", "intersection", p.Junction, "err", err)
			continue
		}
		e := identity.Sign(s.cfg.Key, identity.KindPlan, identity.JSON, payload).Marshal()
		// First the way into the log, then the unit, as with commands.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sealWait)
		err = s.cfg.Inbox.SendAsync(ctx, s.cfg.District, identity.KindPlan, string(p.Junction), e, func(_ *pb.Receipt, err error) {
			cancel()
			if err != nil {
				s.log.Error("fall-back plan was not stored for sealing", "intersection", p.Junction, "seq", p.Seq, "err", err)
				return
			}
			s.Counters.PlansSealed.Add(1)
		})
		if err != nil {
			cancel()
			s.log.Error("fall-back plan not said: no way to seal it", "intersection", p.Junction, "err", err)
			continue
		}
		s.Counters.Plans.Add(1)
		f.said[p.Junction] = e
		s.log.Info("fall-back plan", "intersection", p.Junction, "seq", p.Seq, "cycle", p.Plan.CycleMS(), "over", p.Over)
	}
	now := s.cfg.Now()
	if len(made) == 0 && now.Sub(f.saidAt) < sayEvery && !now.Before(f.saidAt) {
		return
	}
	f.saidAt = now
	for _, id := range slices.Sorted(maps.Keys(f.said)) {
		if err := s.cfg.Bus.Send(topic.Plan(s.cfg.District, id), f.said[id]); err != nil {
			s.log.Error("fall-back plan not sent", "intersection", id, "err", err)
		}
	}
}
