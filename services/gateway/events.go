package gateway

import (
	"bytes"
	"context"
	"fmt"

	"github.com/ThreeDotsLabs/watermill/message"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// events follows what is not on the frame path, where a message at a time and a
// router's middleware (recovery, retry, dead letters) are worth more than speed.
func (g *Gateway) events(ctx context.Context) error {
	sub, err := bus.NewSubscriber(bus.SubscriberConfig{Bus: g.cfg.Bus, Group: "gateway", Logger: g.log})
	if err != nil {
		return err
	}
	r, err := bus.NewRouter(bus.RouterConfig{Bus: g.cfg.Bus, District: g.cfg.District, Consumer: "gateway", Logger: g.log})
	if err != nil {
		return err
	}
	r.AddConsumerHandler("quarantine", topic.QuarantineAll(g.cfg.District), sub, g.quarantined)
	if err := r.Run(ctx); err != nil {
		return fmt.Errorf("following the quarantine: %w", err)
	}
	return ctx.Err()
}

// quarantined shows people what was refused, by its rule. What it cannot decode
// is an error of kind Invalid: the router keeps it with the dead letters.
func (g *Gateway) quarantined(m *message.Message) error {
	var q pb.Quarantined
	if err := wire.Decode(identity.Protobuf, m.Payload, &q); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.quarantine == nil {
		g.quarantine = map[string]uint64{}
	}
	g.quarantine[q.Rule]++
	if bytes.HasPrefix(q.Envelope, registryRecord) && len(q.Salt) == len(ledger.Salt{}) {
		g.refused.add(Refusal{Commitment: commitment(ledger.Commit(ledger.Salt(q.Salt), q.Envelope)), Rule: q.Rule, Reason: q.Reason})
	}
	g.lastRefusal = q.Rule + ": " + q.Reason
	g.changed()
	return nil
}
