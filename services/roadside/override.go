package roadside

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The rules for overrides that commands do not have.
const (
	RuleOverride Rule = "override" // the junction is in an operator's hand
	RulePlan     Rule = "plan"     // no such plan
	RuleAction   Rule = "action"   // nothing that can be done here
)

// OverrideLine is a [Line] that also brings overrides.
type OverrideLine interface {
	// Overrides calls f for each envelope that comes as an override for the junction,
	// until ctx ends.
	Overrides(ctx context.Context, f func(envelope []byte)) error
}

// overrideAhead is how far an override may be issued ahead of the unit's clock: it
// comes from a person's desk, and must not be lost to a clock that is off a little.
const overrideAhead = 5 * time.Second

// hand is an override in force.
type hand struct {
	o traffic.Override
	// left is how much longer it lasts. It runs down by the steps between ticks, so
	// that setting the clock back prolongs nothing; the clock ends it too.
	left   time.Duration
	plan   *traffic.Junction // with the plan that is run
	memory timing.Memory
}

// word is the newest override or release that was taken, by the numbers of who
// signed it. Older ones are replays.
type word struct {
	by   identity.KeyID
	turn traffic.Turn
	at   time.Time
}

// OverrideResult is what a unit did with an override.
type OverrideResult struct {
	ID      string
	Applied bool
	// Fresh: it was not known already.
	Fresh bool
	// Reason begins with the rule that it was refused by.
	Reason string
}

// Override takes the bytes of an envelope that came as an override, and obeys it
// if it is in order: signed by who may take junctions in hand, for this one, newer
// than what came before, and not over. It goes through sequencer and interlock like
// everything else, and ends by itself, whoever else has died meanwhile. While it is
// in force commands are refused.
func (u *Unit) Override(now time.Time, envelope []byte) OverrideResult {
	u.mu.Lock()
	defer u.mu.Unlock()
	o, by, r := u.openOverride(envelope)
	if r != nil {
		u.answer(&u.strays, traffic.CommandResult{}, r)
		return OverrideResult{Reason: cut(string(r.rule) + ": " + r.reason)}
	}
	res := OverrideResult{ID: o.ID}
	if u.word.by == by && u.word.turn == o.Turn {
		res.Applied = u.hand != nil && u.hand.o.ID == o.ID || o.Action == traffic.OverrideRelease
		return res // said again
	}
	res.Fresh = true
	h, r := u.judgeOverride(now, o, by)
	if r != nil {
		res.Reason = cut(string(r.rule) + ": " + r.reason)
		u.answer(&u.results, traffic.CommandResult{}, refuse(r.rule, "override %s: %s", o.ID, r.reason))
		return res
	}
	u.word = word{by, o.Turn, o.Time}
	if h == nil {
		u.log.Warn("override released", "intersection", u.cfg.Junction.ID, "override", u.hand.o.ID, "by", o.By.Name)
		u.letGo(now)
	} else {
		u.log.Warn("override", "intersection", u.cfg.Junction.ID, "override", o.ID, "action", string(o.Action), "by", o.By.Name, "until", o.Expires)
		u.take(now, h)
	}
	res.Applied = true
	u.counters.Overrides++
	return res
}

// openOverride checks who signed an envelope, and returns the override in it.
func (u *Unit) openOverride(envelope []byte) (*traffic.Override, identity.KeyID, *refusal) {
	if len(envelope) > MaxCommand {
		return nil, "", refuse(RuleSize, "envelope: %d bytes, at most %d", len(envelope), MaxCommand)
	}
	e, err := identity.ParseEnvelope(envelope)
	if err != nil {
		return nil, "", refuse(RuleDecode, "%v", err)
	}
	if e.Kind != identity.KindOverride {
		return nil, "", refuse(RuleKind, "kind: %q, must be %q", e.Kind, identity.KindOverride)
	}
	if u.cfg.Overrider == nil {
		return nil, "", refuse(RuleKey, "key_id: nobody may override here")
	}
	key, ok := u.cfg.Overrider(e.Key)
	if !ok || len(key) != ed25519.PublicKeySize {
		return nil, "", refuse(RuleKey, "key_id: %.32q may not override here", e.Key)
	}
	if !e.Verify(key) {
		return nil, "", refuse(RuleSignature, "signature: not by key %s over this payload", e.Key)
	}
	o, err := wire.DecodeOverride(e.ContentType, e.Payload)
	if err != nil {
		return nil, "", refuse(RulePayload, "payload: %v", err)
	}
	return o, e.Key, nil
}

// judgeOverride checks an override that is known to be signed by whom it should
// be; a release gives no hand.
func (u *Unit) judgeOverride(now time.Time, o *traffic.Override, by identity.KeyID) (*hand, *refusal) {
	if o.District != u.cfg.District {
		return nil, refuse(RuleDistrict, "district: %.40q, this is %q", o.District, u.cfg.District)
	}
	if o.Junction != u.cfg.Junction.ID {
		return nil, refuse(RuleJunction, "junction: %.40q, this is %q", o.Junction, u.cfg.Junction.ID)
	}
	if w := u.word; w.by == by && (o.Turn.Epoch < w.turn.Epoch || o.Turn.Epoch == w.turn.Epoch && o.Turn.Seq < w.turn.Seq) || w.by != by && o.Time.Before(w.at) {
		return nil, refuse(RuleSeq, "seq: epoch %d number %d is older than what was taken before", o.Turn.Epoch, o.Turn.Seq)
	}
	if d := o.Time.Sub(now); d > overrideAhead {
		return nil, refuse(RuleFuture, "time: %v ahead of the clock, at most %v", d.Round(time.Millisecond), overrideAhead)
	}
	if o.Action == traffic.OverrideRelease {
		if u.hand == nil || u.hand.o.ID != o.Releases {
			return nil, refuse(RuleOverride, "releases: %.40q is not in force", o.Releases)
		}
		return nil, nil
	}
	if d := o.Expires.Sub(o.Time); d <= 0 || d > traffic.MaxOverride {
		return nil, refuse(RuleValidity, "expires: %v after time, must be above 0 and at most %v", d, traffic.MaxOverride)
	}
	left := o.Expires.Sub(now)
	if left <= 0 {
		return nil, refuse(RuleExpired, "expires: %v ago", -left.Round(time.Millisecond))
	}
	if u.hand != nil {
		return nil, refuse(RuleOverride, "%s is in force until %s: release it first", u.hand.o.ID, u.hand.o.Expires.UTC().Format(time.TimeOnly))
	}
	if t := u.monitor.Tripped(); t != nil {
		return nil, refuse(RuleInterlock, "the interlock has tripped: %s", t)
	}
	h := &hand{o: *o, left: min(left, traffic.MaxOverride)}
	switch o.Action {
	case traffic.OverrideFlash:
	case traffic.OverrideHold:
		if o.Stage == -1 {
			h.o.Stage = u.sequencer.Heading()
		}
		if h.o.Stage < 0 {
			return nil, refuse(RuleAction, "stage: none is shown that could be held")
		}
		if err := u.monitor.Accept(h.o.Stage); err != nil {
			return nil, refuse(RuleInterlock, "%v", err)
		}
	case traffic.OverridePlan:
		switch {
		case o.Plan == u.cfg.Junction.Plan.Name:
			h.plan = u.cfg.Junction
		case u.fallback != nil && o.Plan == u.fallback.Plan.Name:
			h.plan = u.alone
		default:
			return nil, refuse(RulePlan, "plan: %.40q is not here; there are %s", o.Plan, u.planNames())
		}
	default:
		return nil, refuse(RuleAction, "action: %.20q is not known", string(o.Action))
	}
	return h, nil
}

func (u *Unit) planNames() string {
	s := fmt.Sprintf("%q", u.cfg.Junction.Plan.Name)
	if u.fallback != nil {
		s += fmt.Sprintf(" and %q", u.fallback.Plan.Name)
	}
	return s
}

// take puts an override in force.
func (u *Unit) take(now time.Time, h *hand) {
	h.left += max(now.Sub(u.tickAt), 0) // the step to the next tick has begun
	u.hand = h
	u.setMode(now, traffic.Overridden)
	if h.o.Action == traffic.OverrideFlash {
		u.note(now, eventFlash, flashAutomatic)
	}
}

// letGo ends an override. What comes next is an ordinary change: from flashing by
// all red, as after a start.
func (u *Unit) letGo(now time.Time) {
	h := u.hand
	u.hand = nil
	u.inForce = 0
	if h.o.Action == traffic.OverrideFlash {
		shown := u.shown
		if u.self == nil {
			shown = u.monitor.Shown()
		}
		u.sequencer.Resume(shown, now)
		u.note(now, eventFlash, flashNot)
	}
	if u.mode == traffic.Overridden { // not where the interlock has tripped
		u.setMode(now, traffic.Local)
	}
}

// overridden does what an override asks for at now, and reports whether one is in
// force.
func (u *Unit) overridden(now time.Time, step time.Duration) bool {
	h := u.hand
	if h == nil {
		return false
	}
	h.left -= step
	if h.left <= 0 || !now.Before(h.o.Expires) {
		u.log.Warn("override has ended by itself", "intersection", u.cfg.Junction.ID, "override", h.o.ID)
		u.letGo(now)
		return false
	}
	if u.mode == traffic.Tripped {
		return true
	}
	u.setMode(now, traffic.Overridden)
	stage := h.o.Stage
	switch h.o.Action {
	case traffic.OverrideFlash:
		return true
	case traffic.OverridePlan:
		v := timing.Observe(u.cfg.Junction, nil)
		v.Now, v.Signal = now, u.sequencer.Signal(now)
		fixed, err := timing.Named("fixed")
		if err != nil {
			u.log.Error("override's plan not followed", "intersection", u.cfg.Junction.ID, "err", err)
			return true
		}
		m, d := fixed.Next(h.plan, u.rules, h.memory, v)
		h.memory, stage = m, d.Stage
	}
	err := u.monitor.Accept(stage)
	if err == nil {
		err = u.sequencer.Target(stage)
	}
	if err != nil {
		u.counters.Refused[RuleInterlock]++
		u.log.Error("override not followed", "intersection", u.cfg.Junction.ID, "override", h.o.ID, "err", err)
	}
	return true
}

// flashing reports whether an override wants all to flash.
func (u *Unit) flashing() bool {
	return u.hand != nil && u.hand.o.Action == traffic.OverrideFlash && u.mode != traffic.Tripped
}

// wanted is what the lamps are to show.
func (u *Unit) wanted(now time.Time) traffic.State {
	s := u.sequencer.Next(now)
	if u.flashing() {
		return traffic.AllOf(traffic.FlashRed, len(u.cfg.Junction.Groups))
	}
	return s
}

// marked adds the override to what a frame says of the lamps.
func (u *Unit) marked(s traffic.Signal) traffic.Signal {
	if u.hand != nil {
		s.Override = u.hand.o.ID
		if u.flashing() {
			s.Stage = -1
		}
	}
	return s
}

// resumeOverride takes over what was in force before this boot.
func (u *Unit) resumeOverride(now time.Time, envelope []byte) error {
	o, by, r := u.openOverride(envelope)
	if r != nil {
		return fmt.Errorf("%s: %s", r.rule, r.reason)
	}
	if o.Action == traffic.OverrideRelease || !now.Before(o.Expires) {
		u.word = word{by, o.Turn, o.Time} // over; and not to be replayed
		return nil
	}
	h, r := u.judgeOverride(now, o, by)
	u.word = word{by, o.Turn, o.Time}
	if r != nil {
		return fmt.Errorf("%s: %s", r.rule, r.reason)
	}
	u.take(now, h)
	return nil
}

// overrides hears overrides until ctx ends. One that is taken is on disk before
// the answer leaves.
func (u *Unit) overrides(ctx context.Context, c RunConfig, l OverrideLine) error {
	return l.Overrides(ctx, func(e []byte) {
		now := c.Now()
		res := u.Override(now, e)
		if res.Applied && res.Fresh {
			if err := c.Store.keepOverride(bytes.Clone(e)); err != nil {
				u.log.Error("override not written", "intersection", u.cfg.Junction.ID, "override", res.ID, "err", err)
			}
		}
		if res.ID != "" {
			u.sayOverride(ctx, c, now, res)
		}
	})
}

// OverrideWord begins what a unit's status says of an override; its id follows,
// and after a colon why it was refused.
const OverrideWord = "override "

// sayOverride tells at once what became of an override.
func (u *Unit) sayOverride(ctx context.Context, c RunConfig, now time.Time, res OverrideResult) {
	s := u.Status(now)
	m := &pb.Status{District: string(u.cfg.District), Junction: string(s.Junction), Device: string(s.Device), TimeUnixNano: now.UnixNano(),
		Signal: wire.SignalToProto(s.Signal), Result: &pb.CommandResult{Applied: res.Applied, Reason: OverrideWord + res.ID}}
	if res.Reason != "" {
		m.Result.Reason = cut(m.Result.Reason + ": " + res.Reason)
	}
	if err := c.Line.Status(ctx, m); err != nil {
		u.tally(func(n *Counters) { n.StatusErrors++ })
		u.log.Warn("status not published", "intersection", u.cfg.Junction.ID, "err", err)
	}
}

func (l busLine) Overrides(ctx context.Context, f func([]byte)) error {
	return l.bus.Subscribe(ctx, topic.Override(l.d, l.j), func(_ string, data []byte) { f(data) })
}
