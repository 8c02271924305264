package ingest

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// writer stores batches. All of it is owned by its loop.
type writer struct {
	s       *Service
	flights []*flight // in the order in which they were sent
	last    string    // message id of the newest
	// single is for how many batches not to pipeline, because another instance
	// writes to the stream as well and breaks our conditions.
	single int
	// stop is closed when the service is to stop; nil once that has been seen.
	stop <-chan struct{}
	// stopBy is when to give up then; zero before.
	stopBy time.Time
}

// stopped notes that the service is to stop.
func (w *writer) stopped() {
	w.stop = nil
	w.stopBy = time.Now().Add(w.s.StoreWait)
}

// flight is one batch on its way to the stream.
type flight struct {
	records []*record
	id      string
	data    []byte
	sent    time.Time
	ack     jetstream.PubAckFuture // nil if it could not be sent
	failed  bool                   // an error has come instead of the acknowledgement:
	err     error
}

const (
	// ackWait is how long an acknowledgement may take before the batch is sent
	// again.
	ackWait = 2 * time.Second
	// singleRun is how long pipelining rests after another instance got between,
	// batches.
	singleRun = 64
)

// loop stores what is queued until stop is closed and everything is answered.
func (w *writer) loop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		depth := w.s.InFlight
		if w.single > 0 {
			depth = 1
		}
		wait := time.Duration(-1)
		for len(w.flights) < depth {
			var rs []*record
			if rs, wait = w.s.cut(!w.stopBy.IsZero()); rs == nil {
				break
			}
			w.launch(rs)
		}
		if !w.stopBy.IsZero() && len(w.flights) == 0 {
			return // cut has left nothing
		}
		var ok <-chan *jetstream.PubAck
		var bad <-chan error
		if len(w.flights) > 0 {
			head := w.flights[0]
			if head.ack == nil {
				w.settle()
				continue
			}
			ok, bad = head.ack.Ok(), head.ack.Err()
			if left := max(time.Until(head.sent.Add(ackWait)), 0); wait < 0 || left < wait {
				wait = left
			}
		}
		if wait < 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-ok:
			w.stored(w.flights[0])
			w.flights = w.flights[1:]
		case err := <-bad:
			w.flights[0].failed, w.flights[0].err = true, err
			w.settle()
		case <-timer.C:
			if len(w.flights) > 0 && time.Since(w.flights[0].sent) >= ackWait {
				w.settle()
			}
		case <-w.s.kick:
		case <-w.stop:
			w.stopped()
		}
	}
}

// cut takes the next batch off the queue if one is due, or all at the end.
// Otherwise it says how long that takes; negative if nothing waits.
func (s *Service) cut(all bool) ([]*record, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil, -1
	}
	if left := s.MaxDelay - time.Since(s.queue[0].arrived); !all && !s.full() && left > 0 {
		return nil, left
	}
	n, size := 0, 0
	for n < len(s.queue) && n < s.MaxBatch && (n == 0 || size+len(s.queue[n].envelope)+overhead <= s.MaxBatchBytes) {
		size += len(s.queue[n].envelope) + overhead
		n++
	}
	rs := s.queue[:n:n]
	s.queue = s.queue[n:]
	s.queued -= size
	return rs, 0
}

// launch sends a batch. If others are on their way it is stored only right
// behind the last of them.
func (w *writer) launch(rs []*record) {
	f := &flight{records: rs, sent: time.Now()}
	salts := make([]byte, len(rs)*len(ledger.Salt{}))
	if _, err := io.ReadFull(w.s.Rand, salts); err != nil {
		// Without salts nothing may be stored, and order wants what is behind to
		// wait as well. What is on its way is not touched by that.
		w.s.log.Error("ingest: no random bytes for salts", "err", err)
		w.s.fail(rs, ReasonUnavailable, "no random bytes for salts")
		w.s.failAll(nil)
		return
	}
	batch := &pb.Batch{Records: make([]*pb.Record, len(rs))}
	records := make([]pb.Record, len(rs))
	for i, r := range rs {
		if !r.salted {
			copy(r.salt[:], salts[i*len(r.salt):])
		}
		records[i].Envelope, records[i].Salt, records[i].ReceivedUnixNano = r.envelope, r.salt[:], r.received
		batch.Records[i] = &records[i]
	}
	f.data = wire.EncodeBatch(batch)
	id := ledger.RequestID(f.data)
	f.id = hex.EncodeToString(id[:])
	m := &nats.Msg{Subject: topic.Ingress(w.s.District), Data: f.data, Header: nats.Header{nats.MsgIdHdr: {f.id}}}
	if len(w.flights) > 0 {
		m.Header[nats.ExpectedLastMsgIdHdr] = []string{w.last}
	}
	ack, err := w.s.Bus.JS.PublishMsgAsync(m, jetstream.WithRetryAttempts(0))
	if err == nil {
		f.ack = ack
	} // else settle finds out what is wrong
	w.flights = append(w.flights, f)
	w.last = f.id
	if w.single > 0 {
		w.single--
	}
}

// settle brings everything on its way to an end after the first of it has
// failed. Batches behind one that was not stored were not stored either, by the
// condition that they carry; so all that are not acknowledged are sent again,
// one by one in order, under the same ids, without conditions.
func (w *writer) settle() {
	flights := w.flights
	w.flights = nil
	acked := make([]bool, len(flights))
	for i, f := range flights {
		acked[i] = f.wait()
	}
	if apiCode(flights[0].err) == wrongLastID {
		w.single = singleRun // all before it are stored: somebody else got between
	}
	for i, f := range flights {
		if acked[i] {
			w.stored(f)
			continue
		}
		reason, err := w.store(f, flights[i+1:])
		if err == nil {
			w.stored(f)
			continue
		}
		// Nothing behind it is stored: it would be out of order.
		text := fmt.Sprintf("cannot store now: %v", err)
		w.s.log.Warn("ingest: batch not stored, senders are told busy", "count", len(f.records), "reason", reason, "err", err)
		w.s.fail(f.records, reason, text)
		behind := flying(flights[i+1:])
		if reason == ReasonUnknown { // then they may be stored behind it
			w.s.fail(behind, reason, text)
			behind = nil
		}
		w.s.failAll(behind)
		return
	}
}

// wrongLastID is JetStream's error "wrong last msg ID".
const wrongLastID = 10070

func apiCode(err error) int {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return int(api.ErrorCode)
	}
	return 0
}

// wait waits for the acknowledgement, or the error, of the first sending.
func (f *flight) wait() (acked bool) {
	if f.ack == nil || f.failed {
		return false
	}
	t := time.NewTimer(max(time.Until(f.sent.Add(ackWait)), 0))
	defer t.Stop()
	select {
	case <-f.ack.Ok():
		return true
	case f.err = <-f.ack.Err():
		f.failed = true
	case <-t.C:
	}
	return false
}

func flying(fs []*flight) (rs []*record) {
	for _, f := range fs {
		rs = append(rs, f.records...)
	}
	return rs
}

// store sends one batch until it is stored or certainly not stored. While that
// is not known it goes on, because only then will the receipts that it gives to
// those who ask again be true. Senders are told every StoreWait: those of f and
// of the batches behind it that it is not known, all others that they wait in
// vain.
func (w *writer) store(f *flight, behind []*flight) (reason string, err error) {
	// The first sending may have stored it, unless it never left or the server
	// said no.
	unknown := f.ack != nil
	if f.failed && (apiCode(f.err) != 0 || errors.Is(f.err, nats.ErrNoResponders) || errors.Is(f.err, jetstream.ErrNoStreamResponse)) {
		unknown = false
	}
	told := false
	for {
		select {
		case <-w.stop: // this may go on until the service ends, or for ever
			w.stopped()
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), w.s.StoreWait)
		if !w.stopBy.IsZero() {
			ctx, cancel = context.WithDeadline(context.Background(), w.stopBy)
		}
		_, err := w.s.Bus.PublishMsg(ctx, bus.Msg{Subject: topic.Ingress(w.s.District), ID: f.id, Data: f.data})
		cancel()
		switch {
		case err == nil:
			return "", nil
		case errors.Is(err, bus.ErrFull):
			return ReasonStreamFull, err
		case apiCode(err) != 0:
			return ReasonUnavailable, err
		}
		unknown = unknown || errors.Is(err, bus.ErrUnknown)
		if !unknown {
			return ReasonUnavailable, err
		}
		if !w.stopBy.IsZero() || w.s.Bus.NC.IsClosed() {
			return ReasonUnknown, err
		}
		if !told {
			w.s.log.Warn("ingest: not known whether a batch was stored, trying on", "count", len(f.records), "err", err)
			told = true
		}
		w.s.tell(append(flying(behind), f.records...), ReasonUnknown, fmt.Sprintf("not known whether it was stored, send the same bytes again: %v", err))
		w.s.failAll(nil)
	}
}

// stored gives the receipts of a batch.
func (w *writer) stored(f *flight) {
	s := w.s
	for _, r := range f.records {
		r.commitment = ledger.Commit(r.salt, r.envelope)
	}
	waiters := make([][]waiter, len(f.records))
	s.mu.Lock()
	s.counts.Batches++
	s.counts.Bytes += uint64(len(f.data))
	for i, r := range f.records {
		s.release(r)
		waiters[i], r.waiters = r.waiters, nil
		for _, wt := range waiters[i] {
			if wt.first {
				s.counts.Stored++
			} else {
				s.counts.Again++
			}
			s.at(wt.door).Stored++
		}
		s.remember(r)
	}
	s.mu.Unlock()
	for i, r := range f.records {
		a := answer{status: pb.Receipt_STATUS_STORED, salt: r.salt, commitment: r.commitment}
		for _, wt := range waiters[i] {
			wt.answer(a)
		}
	}
}

// release gives back a record's room in the bounds. Caller holds mu.
func (s *Service) release(r *record) {
	s.held--
	s.heldSize -= len(r.envelope)
}

// tell answers busy to those who wait for records that stay with us.
func (s *Service) tell(rs []*record, reason, text string) {
	var ws []waiter
	s.mu.Lock()
	for _, r := range rs {
		ws = append(ws, s.back(r)...)
	}
	s.counts.Busy[reason] += uint64(len(ws))
	s.mu.Unlock()
	for _, wt := range ws {
		wt.answer(answer{status: pb.Receipt_STATUS_BUSY, reason: reason, text: text})
	}
}

// back takes all who wait for a record off it, to be told busy, and gives their
// numbers back to their sessions: the record must come again before what is
// behind it, in each of the rows in which it has come. Caller holds mu.
func (s *Service) back(r *record) (ws []waiter) {
	ws, r.waiters = r.waiters, nil
	for _, wt := range ws {
		if wt.session != nil {
			wt.session.next = min(wt.session.next, wt.number)
		}
		s.at(wt.door).Busy++
	}
	return ws
}

// forget drops records that were not stored. Caller holds mu.
func (s *Service) forget(rs []*record, reason string) (ws []waiter) {
	for _, r := range rs {
		s.release(r)
		delete(s.known, r.digest)
		ws = append(ws, s.back(r)...)
	}
	s.counts.Busy[reason] += uint64(len(ws))
	return ws
}

// fail answers busy for records that were not stored.
func (s *Service) fail(rs []*record, reason, text string) {
	s.mu.Lock()
	ws := s.forget(rs, reason)
	s.mu.Unlock()
	for _, wt := range ws {
		wt.answer(answer{status: pb.Receipt_STATUS_BUSY, reason: reason, text: text})
	}
}

// failAll answers busy for rs and for all that is queued behind them.
func (s *Service) failAll(rs []*record) {
	s.mu.Lock()
	ws := s.forget(rs, ReasonBehind)
	ws = append(ws, s.forget(s.queue, ReasonBehind)...)
	s.queue, s.queued = nil, 0
	s.mu.Unlock()
	for _, wt := range ws {
		wt.answer(answer{status: pb.Receipt_STATUS_BUSY, reason: ReasonBehind, text: "records before it could not be stored"})
	}
}
