package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// publisher stores this validator's decisions in the stream DECISIONS, in their
// order, behind consensus: it may fail for as long as it likes without holding
// that up, and goes on from where the stream ends after a restart.
type publisher struct {
	v    *Validator
	wake chan struct{}

	mu     sync.Mutex
	recent map[ledger.Height][]byte // encoded, so that they need not be read back
}

const (
	recentBlocks = 64
	publishBytes = 4 << 20
	publishMost  = 32
)

func newPublisher(v *Validator) *publisher {
	return &publisher{v: v, wake: make(chan struct{}, 1), recent: map[ledger.Height][]byte{}}
}

// add takes a new block. It does not block.
func (p *publisher) add(h ledger.Height, b *pb.Block) {
	enc := wire.EncodeBlock(b)
	p.mu.Lock()
	p.recent[h] = enc
	delete(p.recent, h-recentBlocks)
	p.mu.Unlock()
	p.look()
}

// look has the publisher see what is stored. It does not block.
func (p *publisher) look() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// block returns nil for a block without its payload: others have published it.
func (p *publisher) block(h ledger.Height) ([]byte, error) {
	p.mu.Lock()
	enc, ok := p.recent[h]
	p.mu.Unlock()
	if ok {
		return enc, nil
	}
	b, err := p.v.core.store.block(h)
	if err != nil {
		return nil, err
	}
	if hd, err := ledger.ParseHeader(b.Header); err != nil || purged(b, hd) {
		return nil, err
	}
	return wire.EncodeBlock(b), nil
}

func (p *publisher) run(ctx context.Context) error {
	next, err := p.resume(ctx)
	if err != nil {
		return err
	}
	p.v.count.published.Store(uint64(next - 1))
	subject := topic.Decision(p.v.c.District, p.v.c.Number)
	for {
		var msgs []bus.Msg
		size := 0
		next = max(next, p.v.core.store.first()) // this validator may have begun with a snapshot
		for h := next; h <= p.v.core.store.height() && len(msgs) < publishMost && size < publishBytes; h++ {
			enc, err := p.block(h)
			if err != nil {
				return err
			}
			size += len(enc)
			msgs = append(msgs, bus.Msg{Subject: subject, ID: fmt.Sprintf("decision-%d-%d", p.v.c.Number, h), Data: enc})
		}
		if len(msgs) == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-p.wake:
			}
			continue
		}
		if err := p.v.c.Bus.PublishAll(ctx, msgs); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			p.v.count.publishRetries.Add(1)
			p.v.log.Warn("decisions not published yet", "height", uint64(next), "err", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Second):
			}
			continue
		}
		p.mu.Lock()
		for range msgs {
			delete(p.recent, next) // a block may be megabytes
			next++
		}
		p.mu.Unlock()
		p.v.count.published.Store(uint64(next - 1))
	}
}

// resume returns the height after the last that the stream has. Where it has
// none, what its age lets it keep is published again; consumers take a block
// twice without harm.
func (p *publisher) resume(ctx context.Context) (ledger.Height, error) {
	subject := topic.Decision(p.v.c.District, p.v.c.Number)
	for {
		h, err := p.lastPublished(ctx, subject)
		if err == nil {
			return h + 1, nil
		}
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return p.firstWorthPublishing()
		}
		p.v.log.Warn("cannot see where the stream of decisions ends", "err", err)
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (p *publisher) lastPublished(ctx context.Context, subject string) (ledger.Height, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := p.v.c.Bus.JS.Stream(ctx, topic.DecisionStream)
	if err != nil {
		return 0, err
	}
	m, err := s.GetLastMsgForSubject(ctx, subject)
	if err != nil {
		return 0, err
	}
	b, err := wire.DecodeBlock(m.Data)
	if err != nil {
		return 0, err
	}
	h, err := ledger.ParseHeader(b.Header)
	if err != nil {
		return 0, err
	}
	have, err := p.v.core.store.header(h.Height)
	if err != nil || have.Hash() != h.Hash() {
		// Somebody wrote on our subject, or our disk is an older one. Neither may
		// stop us; the ids keep what is there from being doubled.
		p.v.log.Error("the stream's last decision is not ours", "height", uint64(h.Height))
		return 0, jetstream.ErrMsgNotFound
	}
	return h.Height, nil
}

func (p *publisher) firstWorthPublishing() (ledger.Height, error) {
	var age time.Duration
	for _, s := range topic.Streams(p.v.c.District) {
		if s.Name == topic.DecisionStream {
			age = s.MaxAge
		}
	}
	h := p.v.core.store.height()
	if h == 0 {
		return 1, nil
	}
	newest, err := p.v.core.store.header(h)
	if err != nil {
		return 0, err
	}
	first := p.v.core.store.first()
	for ; h > first; h-- {
		b, err := p.v.core.store.header(h)
		if err != nil {
			return 0, err
		}
		if newest.Time.Sub(b.Time) > age {
			return h + 1, nil
		}
	}
	return first, nil
}
