package roadside

import (
	"bytes"
	"context"
	"crypto/ed25519"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// PlanLine is a [Line] that also brings fall-back plans.
type PlanLine interface {
	// Plans calls f for each envelope that comes as a fall-back plan for the
	// junction, until ctx ends.
	Plans(ctx context.Context, f func(envelope []byte)) error
}

// Plan takes the bytes of an envelope that came as a fall-back plan, and keeps
// it if it is in order: signed by who may command here, for this junction, newer
// than the one that the unit has, and within what is filed. fresh reports whether
// it was new. Without commands the unit runs it from its next decision on.
func (u *Unit) Plan(envelope []byte) (fresh bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	had := u.fallback
	if err := u.keep(envelope); err != nil {
		u.counters.PlansRefused++
		u.log.Warn("fall-back plan refused", "intersection", u.cfg.Junction.ID, "err", err)
		return false, err
	}
	if fresh = u.fallback != had; fresh {
		u.counters.Plans++
		u.log.Info("fall-back plan", "intersection", u.cfg.Junction.ID, "seq", u.fallback.Seq, "cycle", u.fallback.Plan.CycleMS())
	}
	return fresh, nil
}

// keep is Plan with mu held.
func (u *Unit) keep(envelope []byte) error {
	if len(envelope) > MaxCommand {
		return kind.Errorf(kind.Invalid, "envelope: %d bytes, at most %d", len(envelope), MaxCommand)
	}
	e, err := identity.ParseEnvelope(envelope)
	if err != nil {
		return err
	}
	if e.Kind != identity.KindPlan {
		return kind.Errorf(kind.Invalid, "kind: %q, must be %q", e.Kind, identity.KindPlan)
	}
	key, ok := u.cfg.Commander(e.Key)
	if !ok || len(key) != ed25519.PublicKeySize {
		return kind.Errorf(kind.Denied, "key_id: %.32q may not command here", e.Key)
	}
	if !e.Verify(key) {
		return kind.Errorf(kind.Denied, "signature: not by key %s over this payload", e.Key)
	}
	p, err := wire.DecodeFallback(e.ContentType, e.Payload)
	if err != nil {
		return err
	}
	if p.District != u.cfg.District {
		return kind.Errorf(kind.Invalid, "district: %.40q, this is %q", p.District, u.cfg.District)
	}
	if err := p.Fits(u.cfg.Junction); err != nil {
		return err
	}
	if u.fallback != nil {
		if p.Seq == u.fallback.Seq {
			return nil // said again
		}
		if p.Seq < u.fallback.Seq {
			return kind.Errorf(kind.Stale, "seq: %d, the unit has %d", p.Seq, u.fallback.Seq)
		}
	}
	alone := *u.cfg.Junction
	alone.Plan = p.Plan
	u.fallback, u.alone = p, &alone
	return nil
}

// listen takes commands, and plans where the line brings them, until ctx ends.
func (u *Unit) listen(ctx context.Context, c RunConfig, command func([]byte)) error {
	actors := []run.Actor{{Name: "orders", Run: func(ctx context.Context) error { return c.Line.Commands(ctx, command) }}}
	if l, ok := c.Line.(PlanLine); ok {
		actors = append(actors, run.Actor{Name: "plans", Run: func(ctx context.Context) error {
			return l.Plans(ctx, func(e []byte) {
				fresh, err := u.Plan(e)
				if err != nil || !fresh {
					return // counted
				}
				if err := c.Store.keepPlan(bytes.Clone(e)); err != nil {
					u.log.Error("fall-back plan not written", "intersection", u.cfg.Junction.ID, "err", err)
				}
			})
		}})
	}
	if l, ok := c.Line.(OverrideLine); ok {
		actors = append(actors, run.Actor{Name: "overrides", Run: func(ctx context.Context) error { return u.overrides(ctx, c, l) }})
	}
	return run.All(ctx, actors...)
}

func (l busLine) Plans(ctx context.Context, f func([]byte)) error {
	return l.bus.Subscribe(ctx, topic.Plan(l.d, l.j), func(_ string, data []byte) { f(data) })
}
