package ingest

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const (
	// recallAge is how far back the stream is read: what is older, no validator
	// would accept from a second message either (validate.Block).
	recallAge = 15 * time.Minute
	// recallWait bounds the reading.
	recallWait = 10 * time.Second
	// recallRetry is the pause between tries while there is no server.
	recallRetry = 200 * time.Millisecond
	// recallFirst is how many messages are read at first, the newest; then each
	// time twice as many that come before those.
	recallFirst = 64
)

// recall learns from the stream which records earlier runs, or other instances,
// have stored. A sender whose receipt was lost with an earlier run, and who
// sends again, then gets that receipt. A new one would name a commitment that
// never comes into the log: validation takes the first of the two records.
//
// It waits for a server, because without one nobody can be given a receipt; but
// not for a stream that cannot be read. What was read until then is remembered.
func (s *Service) recall(ctx context.Context, closed <-chan nats.Status) {
	began := time.Now()
	for {
		try, cancel := context.WithTimeout(ctx, recallWait)
		rs, err := s.readBack(try)
		cancel()
		if err == nil || s.Bus.NC.IsConnected() || ctx.Err() != nil {
			n := 0
			s.mu.Lock()
			for _, r := range rs {
				if s.known[r.digest] == nil {
					s.remember(r)
					n++
				}
			}
			s.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				s.log.Warn("ingest: cannot read all of what was stored before; who sends it again may get a second receipt",
					"stream", topic.IngressStream, "count", n, "err", err)
			} else {
				s.log.Info("ingest: knows what was stored before", "stream", topic.IngressStream, "count", n, "elapsed", time.Since(began))
			}
			return
		}
		select {
		case <-ctx.Done():
		case <-closed:
			return // listening will say so
		case <-time.After(recallRetry):
		}
	}
}

// errEnough ends a replay.
var errEnough = errors.New("enough")

// readBack returns the newest stored records, oldest first. With an error they
// are those that could be read.
func (s *Service) readBack(ctx context.Context) (rs []*record, err error) {
	st, err := s.Bus.JS.Stream(ctx, topic.IngressStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	state := st.CachedInfo().State
	if state.Msgs == 0 {
		return nil, nil
	}
	// By the time of the server, which says when messages were stored.
	oldest := state.LastTime
	if now := time.Now(); now.After(oldest) {
		oldest = now
	}
	oldest = oldest.Add(-recallAge)
	newest := state.LastSeq
	if _, err := st.GetMsg(ctx, newest); errors.Is(err, jetstream.ErrMsgNotFound) {
		newest = 0 // deleted by hand
	} else if err != nil {
		return nil, err
	}
	end := state.LastSeq + 1 // all from here on is in rs
	for n := uint64(recallFirst); end > state.FirstSeq && len(rs) < rememberStored; {
		from := max(state.FirstSeq, end-min(n, end))
		var part []*record
		reached := false // messages too old
		top := uint64(0)
		_, err := s.Bus.Replay(ctx, topic.IngressStream, topic.Ingress(s.District), from, func(m *bus.Msg) error {
			top = m.Seq
			switch {
			case m.Seq >= end:
				return errEnough
			case m.Stored.Before(oldest):
				reached = true
				return nil
			}
			b, err := wire.DecodeBatch(m.Data)
			if err != nil {
				return nil // nobody has a receipt for it; validation reports it
			}
			for _, r := range b.Records {
				salt := ledger.Salt(r.Salt)
				part = append(part, &record{digest: sha256.Sum256(r.Envelope), salt: salt, commitment: ledger.Commit(salt, r.Envelope)})
			}
			return nil
		})
		if err == nil && top < min(end, newest) {
			// In a cluster another replica may be asked than the leader, which is not
			// as far yet.
			select {
			case <-ctx.Done():
				return rs, ctx.Err()
			case <-time.After(recallRetry):
			}
			continue
		}
		rs = append(part, rs...)
		if err != nil && !errors.Is(err, errEnough) {
			return rs, err
		}
		if reached {
			break
		}
		end = from
		n *= 2
	}
	return slices.Clone(rs[max(0, len(rs)-rememberStored):]), nil
}

// remember keeps what to answer to the bytes of a stored record. Caller holds
// mu.
func (s *Service) remember(r *record) {
	r.done, r.envelope = true, nil
	s.known[r.digest] = r
	if old, ok := s.stored.push(r.digest); ok {
		delete(s.known, old)
	}
}
