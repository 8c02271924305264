package gateway

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// override is one with what is known of it.
type override struct {
	o traffic.Override
	// index is the leaf of its record, 0 where that is not agreed.
	index    uint64
	active   bool
	over     bool // it was active, or was refused or released, and is not any more
	observed traffic.State
	refused  string
	// envelope is what the unit is told until it has answered, or tell is over; release
	// that of the one that ends it.
	envelope, release []byte
	tell              time.Time
}

const (
	// overrideWait is how long an override waits for the unit's word before it is
	// answered without.
	overrideWait = 1500 * time.Millisecond
	// tellEvery and tellFor say how often, and for how long, a unit is told that does
	// not answer.
	tellEvery = 300 * time.Millisecond
	tellFor   = 30 * time.Second
	// overridesMost bounds those that are remembered.
	overridesMost = 10_000
	// overrideWord begins what a unit's status says of one.
	overrideWord = "override "
)

// ended reports whether one does nothing any more.
func (o *override) ended(now time.Time) bool {
	return o.over || o.refused != "" || !o.active && !o.o.Expires.IsZero() && !now.Before(o.o.Expires)
}

// agreedOverride takes one that was agreed; mu is held.
func (p *priorityPart) agreedOverride(o *traffic.Override, index uint64) {
	if o.Action == traffic.OverrideRelease {
		return // what becomes of it is seen
	}
	x := p.overrides[o.ID]
	if x == nil {
		x = &override{}
		p.remember(o.ID, x)
	}
	x.o, x.index = *o, index
	p.wake()
}

// remember adds an override; mu is held.
func (p *priorityPart) remember(id string, x *override) {
	if len(p.overrides) >= overridesMost {
		now := p.a.now()
		oldest := ""
		for k, o := range p.overrides {
			if o.ended(now) && (oldest == "" || o.o.Time.Before(p.overrides[oldest].o.Time)) {
				oldest = k
			}
		}
		delete(p.overrides, oldest)
	}
	p.overrides[id] = x
}

// showOverride takes what a frame says of overrides; mu is held.
func (p *priorityPart) showOverride(f *traffic.Frame) {
	for id, x := range p.overrides {
		if x.o.Junction == f.Junction && x.active && id != f.Signal.Override && f.Time.After(x.o.Time) {
			x.active, x.over = false, true
			x.envelope, x.release = nil, nil
			p.wake()
		}
	}
	id := f.Signal.Override
	if id == "" {
		return
	}
	x := p.overrides[id]
	if x == nil { // of before this gateway's start: who it was says the log
		x = &override{o: traffic.Override{District: f.District, ID: id, Junction: f.Junction}}
		p.remember(id, x)
	}
	if x.observed != f.Signal.State || !x.active {
		x.active, x.over, x.observed, x.envelope = true, false, f.Signal.State, nil
		p.wake()
	}
}

// hearUnits takes what units say at once.
func (p *priorityPart) hearUnits(ctx context.Context) error {
	return p.a.bus().Subscribe(ctx, topic.StatusAll(p.a.district()), func(subject string, data []byte) {
		var m pb.Status
		if err := proto.Unmarshal(data, &m); err != nil || m.Junction == "" || topic.Status(p.a.district(), traffic.JunctionID(m.Junction)) != subject {
			return // not a unit's word
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if id := m.GetSignal().GetOverride(); id != "" {
			if x := p.overrides[id]; x != nil && string(x.o.Junction) == m.Junction {
				x.active, x.over, x.refused, x.observed, x.envelope = true, false, "", traffic.State(m.Signal.State), nil
				p.wake()
			}
		}
		word, ok := strings.CutPrefix(m.GetResult().GetReason(), overrideWord)
		if !ok {
			return
		}
		id, why, _ := strings.Cut(word, ": ")
		for own, x := range p.overrides {
			switch {
			case string(x.o.Junction) != m.Junction:
			case own == id && !m.Result.Applied && !x.active:
				x.refused, x.envelope = why, nil
				p.wake()
			case releaseID(own) == id && m.Result.Applied:
				x.active, x.over, x.release = false, true, nil
				p.wake()
			case releaseID(own) == id:
				x.release = nil // there was nothing to end
				if m.GetSignal().GetOverride() != own {
					x.active, x.over = false, true
				}
				p.wake()
			}
		}
	})
}

// tellUnits says to units what they have not answered.
func (p *priorityPart) tellUnits(ctx context.Context) error {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		p.mu.Lock()
		for _, id := range slices.Sorted(maps.Keys(p.overrides)) {
			x := p.overrides[id]
			if time.Now().After(x.tell) {
				x.envelope, x.release = nil, nil
			}
			for _, e := range [][]byte{x.envelope, x.release} {
				if e != nil {
					p.send(x.o.Junction, e)
				}
			}
		}
		p.mu.Unlock()
	}
}

func (p *priorityPart) send(j traffic.JunctionID, envelope []byte) {
	if err := p.a.bus().Send(topic.Override(p.a.district(), j), envelope); err != nil {
		p.a.log().Error("gateway: override not sent", "intersection", j, "err", err)
	}
}

func (p *priorityPart) statusOf(id string) *pb.OverrideStatus {
	p.a.g.mu.Lock()
	sealed := p.a.g.sealed.Size
	p.a.g.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.overrides[id]
	if x == nil {
		return nil
	}
	o := &x.o
	m := &pb.OverrideStatus{Active: x.active, Observed: string(x.observed), Index: x.index, Sealed: x.index > 0 && x.index < sealed, Refused: x.refused,
		Record: &pb.OverrideInfo{District: string(o.District), Id: id, Junction: string(o.Junction), Plan: o.Plan, Stage: int32(o.Stage), Reason: o.Reason,
			Operator: o.By.Name, Issued: timestamp(o.Time), Expires: timestamp(o.Expires)}}
	for a, n := range map[traffic.OverrideAction]pb.OverrideAction{traffic.OverridePlan: pb.OverrideAction_OVERRIDE_ACTION_PLAN,
		traffic.OverrideHold: pb.OverrideAction_OVERRIDE_ACTION_HOLD, traffic.OverrideFlash: pb.OverrideAction_OVERRIDE_ACTION_FLASH} {
		if a == o.Action {
			m.Record.Action = n
		}
	}
	return m
}

// putOverride puts one on record and tells its unit.
func (p *priorityPart) putOverride(ctx context.Context, o *traffic.Override) ([]byte, error) {
	if err := p.judge(identity.KindOverride, wire.EncodeOverride(o)); err != nil {
		return nil, err
	}
	var payload []byte
	if _, err := p.a.recorder.Put(ctx, identity.KindOverride, false, func(t traffic.Turn) []byte {
		o.Turn = t
		payload = wire.EncodeOverride(o)
		return payload
	}); err != nil {
		return nil, err
	}
	e := identity.Sign(p.a.key(), identity.KindOverride, identity.Protobuf, payload).Marshal()
	p.send(o.Junction, e)
	return e, nil
}

// waitFor waits until done, which is called with mu held, or for overrideWait.
func (p *priorityPart) waitFor(ctx context.Context, done func() bool) {
	deadline := time.NewTimer(overrideWait)
	defer deadline.Stop()
	for {
		p.mu.Lock()
		ok, next := done(), p.changed
		p.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		case <-deadline.C:
			return
		}
	}
}

func (p *priorityPart) Override(ctx context.Context, in *pb.OverrideRequest) (*pb.OverrideResponse, error) {
	by, now := caller(ctx), p.a.now().UTC()
	o := &traffic.Override{District: p.a.district(), Time: now, ID: derivedID("override", by.by.Client.Agency, in.IdempotencyKey), Junction: traffic.JunctionID(in.Junction),
		Plan: in.Plan, Stage: -1, Reason: in.Reason, By: traffic.Agent{Agency: by.by.Client.Agency, Name: by.by.ID}, Expires: now.Add(in.Duration.AsDuration())}
	switch in.Action {
	case pb.OverrideAction_OVERRIDE_ACTION_PLAN:
		o.Action = traffic.OverridePlan
	case pb.OverrideAction_OVERRIDE_ACTION_HOLD:
		o.Action = traffic.OverrideHold
	case pb.OverrideAction_OVERRIDE_ACTION_FLASH:
		o.Action = traffic.OverrideFlash
	}
	if (o.Action == traffic.OverridePlan) != (in.Plan != "") {
		return nil, invalidField("plan", "action", "goes with the action PLAN, and only with it")
	}
	if in.Stage != nil {
		if o.Action != traffic.OverrideHold {
			return nil, invalidField("stage", "action", "goes with the action HOLD only")
		}
		o.Stage = int(*in.Stage)
	}
	if _, ok := p.a.registry().Junction(o.Junction); !ok {
		return nil, kind.Errorf(kind.NotFound, "junction: the registry has no %.63q", in.Junction)
	}
	p.mu.Lock()
	known := p.overrides[o.ID]
	var other *override
	for _, x := range p.overrides {
		if x != known && x.o.Junction == o.Junction && !x.ended(now) && (other == nil || x.o.Time.After(other.o.Time)) {
			other = x
		}
	}
	switch {
	case known != nil && !known.o.Expires.IsZero() && (known.o.Junction != o.Junction || known.o.Action != o.Action || known.o.Plan != o.Plan):
		p.mu.Unlock()
		return nil, kind.Errorf(kind.Conflict, "idempotency_key: was used for another override, of junction %s", known.o.Junction)
	case known == nil && other != nil:
		p.mu.Unlock()
		return nil, kind.Errorf(kind.Conflict, "junction: %s is in the hand of %s by override %s until %s: release that first", o.Junction, other.o.By.Name, other.o.ID,
			other.o.Expires.UTC().Format(time.RFC3339))
	case known == nil:
		p.remember(o.ID, &override{o: *o}) // before it is on record: two at once are one
	}
	p.mu.Unlock()
	if known == nil {
		e, err := p.putOverride(ctx, o)
		p.mu.Lock()
		if err != nil {
			delete(p.overrides, o.ID)
			p.mu.Unlock()
			return nil, err
		}
		if x := p.overrides[o.ID]; x != nil {
			x.o = *o
			if !x.active && x.refused == "" {
				x.envelope, x.tell = e, time.Now().Add(tellFor)
			}
		}
		p.mu.Unlock()
	}
	p.waitFor(ctx, func() bool {
		x := p.overrides[o.ID]
		return x == nil || x.active || x.refused != "" || x.over
	})
	return &pb.OverrideResponse{Override: p.statusOf(o.ID)}, nil
}

// releaseID is the id of the record that ends an override: there is one.
func releaseID(id string) string { return derivedID("release", "", id) }

func (p *priorityPart) ReleaseOverride(ctx context.Context, in *pb.ReleaseOverrideRequest) (*pb.ReleaseOverrideResponse, error) {
	by, now := caller(ctx), p.a.now().UTC()
	p.mu.Lock()
	x := p.overrides[in.Id]
	if x == nil {
		p.mu.Unlock()
		return nil, kind.Errorf(kind.NotFound, "id: there is no override %.26q", in.Id)
	}
	done, o := x.ended(now), x.o
	p.mu.Unlock()
	if !done {
		reason := o.Reason
		if reason == "" {
			reason = "incident" // of an override of before this gateway's start
		}
		e, err := p.putOverride(ctx, &traffic.Override{District: p.a.district(), Time: now, ID: releaseID(in.Id), Junction: o.Junction, Action: traffic.OverrideRelease, Stage: -1,
			Reason: reason, By: traffic.Agent{Agency: by.by.Client.Agency, Name: by.by.ID}, Releases: in.Id})
		if err != nil {
			return nil, err
		}
		p.mu.Lock()
		if x := p.overrides[in.Id]; x != nil && !x.ended(now) {
			x.envelope, x.release, x.tell = nil, e, time.Now().Add(tellFor)
		}
		p.mu.Unlock()
		p.waitFor(ctx, func() bool {
			x := p.overrides[in.Id]
			return x == nil || x.ended(now)
		})
	}
	return &pb.ReleaseOverrideResponse{Override: p.statusOf(in.Id)}, nil
}

func (p *priorityPart) ListOverrides(_ context.Context, in *pb.ListOverridesRequest) (*pb.ListOverridesResponse, error) {
	now := p.a.now()
	p.mu.Lock()
	var ids []string
	for id, x := range p.overrides {
		if (in.Junction == "" || string(x.o.Junction) == in.Junction) && (in.Ended || !x.ended(now)) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(p.overrides[a].o.Time.Compare(p.overrides[b].o.Time), strings.Compare(a, b))
	})
	p.mu.Unlock()
	out := &pb.ListOverridesResponse{}
	for _, id := range ids {
		if m := p.statusOf(id); m != nil {
			out.Overrides = append(out.Overrides, m)
		}
	}
	return out, nil
}
