package ingest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

const (
	// guardEvery is how often the guard looks, or four times in MaxBehind if that
	// is more often.
	guardEvery = 2 * time.Second
	// guardWait bounds one look.
	guardWait = 5 * time.Second
	// guardTrust is how long the last look is believed when no other succeeds.
	guardTrust = 30 * time.Second
)

// guard watches how long ago the oldest message was stored on which nothing has
// been decided yet. The streams keep messages for an hour only, and validators
// refuse records of long ago: a receipt given while they do not get on is a
// promise that may not be kept.
//
// All times here are of the wall clock and of the streams, never Config.Now.
type guard struct {
	s      *Service
	looked time.Time // when a look last succeeded
}

// loop looks until ctx ends.
func (g *guard) loop(ctx context.Context) {
	t := time.NewTicker(max(min(guardEvery, g.s.MaxBehind/4), time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			g.look(ctx)
		}
	}
}

// look says whether records are taken until the next look.
func (g *guard) look(ctx context.Context) {
	s := g.s
	ctx, cancel := context.WithTimeout(ctx, guardWait)
	defer cancel()
	text := ""
	for _, q := range []struct {
		who string
		age func(context.Context) (time.Duration, error)
	}{{"validation", g.validation}, {"the validators", g.validators}} {
		age, err := q.age(ctx)
		if err != nil {
			if time.Since(g.looked) < guardTrust {
				s.log.Debug("ingest: cannot see how far decisions are", "err", err)
				return // as before
			}
			// We cannot know. Where nothing can be stored, senders are told that.
			s.log.Warn("ingest: cannot see how far decisions are, records are taken", "err", err)
			text = ""
			break
		}
		if age > s.MaxBehind {
			text = fmt.Sprintf("decisions are behind: what waits for %s has waited %s, more than %s; send it again later", q.who, age.Round(time.Second/10), s.MaxBehind)
		}
	}
	g.looked = time.Now()
	s.mu.Lock()
	was := s.behind
	s.behind = text
	s.mu.Unlock()
	switch {
	case was == "" && text != "":
		s.log.Warn("ingest: takes no records", "reason", text)
	case was != "" && text == "":
		s.log.Info("ingest: takes records again, decisions are made")
	}
}

// validation returns how long the oldest message in INGRESS has waited.
func (g *guard) validation(ctx context.Context) (time.Duration, error) {
	c, err := g.s.Bus.JS.Consumer(ctx, topic.IngressStream, topic.ValidationDurable)
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrConsumerNotFound) {
		return 0, nil // nobody to wait for
	}
	if err != nil {
		return 0, err
	}
	st, err := g.s.Bus.JS.Stream(ctx, topic.IngressStream)
	if err != nil {
		return 0, err
	}
	return g.waited(ctx, st, topic.Ingress(g.s.District), due(c.CachedInfo()))
}

// validators returns how long the oldest message in ACCEPTED has waited that too
// few validators for a decision are done with.
func (g *guard) validators(ctx context.Context) (time.Duration, error) {
	st, err := g.s.Bus.JS.Stream(ctx, topic.AcceptedStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	prefix := strings.TrimSuffix(topic.ConsensusDurable(0), "0")
	var dues []uint64
	l := st.ListConsumers(ctx)
	for c := range l.Info() {
		if strings.HasPrefix(c.Name, prefix) {
			dues = append(dues, due(c))
		}
	}
	if err := l.Err(); err != nil {
		return 0, err
	}
	if len(dues) == 0 {
		return 0, nil
	}
	slices.Sort(dues)
	return g.waited(ctx, st, topic.Accepted(g.s.District), dues[len(dues)-ledger.Quorum(len(dues))])
}

const nothingDue = math.MaxUint64

// due returns the number from which on a consumer has not acknowledged all.
func due(c *jetstream.ConsumerInfo) uint64 {
	if c.NumPending == 0 && c.NumAckPending == 0 {
		return nothingDue
	}
	return c.AckFloor.Stream + 1
}

// waited returns how long ago the first message was stored that is still there,
// from a number on.
func (g *guard) waited(ctx context.Context, st jetstream.Stream, subject string, from uint64) (time.Duration, error) {
	if from == nothingDue {
		return 0, nil
	}
	m, err := st.GetMsg(ctx, from, jetstream.WithGetMsgSubject(subject))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return time.Since(m.Time), nil
}
