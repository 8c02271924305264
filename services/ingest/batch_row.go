package ingest

import (
	"context"
	"sync"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// row stores records of one stream, or one request, in the order in which they
// were added, through busy answers: it is to a door of this process what
// bus.Sender is to a sender on NATS. Several records are on their way at once.
// When one is answered busy nothing is sent until all that is on its way is
// answered; what was not stored is then tried again after a pause, the oldest
// first. That none overtakes an earlier one meanwhile is ensured by the row's
// numbers, see turn. So whoever adds sees records stored or refused, or has to
// wait.
//
// One goroutine adds, one runs, and one takes the answers with next; or one does
// all, one after the other.
type row struct {
	s    *Service
	door string
	// patience is how long to go on without getting a record stored; 0 means for
	// ever. until is when to give up in any case, unless it is zero; and so it is
	// when halt is closed. Nobody gives up records that are on their way.
	patience time.Duration
	until    time.Time
	halt     <-chan struct{}

	session session       // guarded by s.mu
	work    chan struct{} // there is something for run
	news    chan struct{} // there is something for next

	mu     sync.Mutex
	items  []*item   // those that next has not returned, in order
	head   int       // items[:head] have their final answers
	sent   int       // items[:sent] have been sent in this round
	flying int       // on their way
	number uint64    // of the newest item that can be stored
	failed bool      // this round: one was answered busy,
	why    answer    // the newest such answer
	since  time.Time // of the first one since the last stored; zero if there is none
	pause  time.Duration
	closed bool // no more items come
	over   bool // run has returned
}

// item is one record of a row.
type item struct {
	id       uint64 // the sender's, see pb.SubmitRequest
	envelope []byte // nil once final
	number   uint64
	flying   bool
	final    bool
	answer   answer // if final
	// free gives back the room that the record takes; called once, when it is
	// final or given up. Optional.
	free func()
}

// Pauses between the rounds of a row, while records are answered busy.
const (
	minPause = 5 * time.Millisecond
	maxPause = 250 * time.Millisecond
)

func (s *Service) newRow(door string) *row {
	return &row{s: s, door: door, session: session{next: 1}, work: make(chan struct{}, 1), news: make(chan struct{}, 1)}
}

// item makes an item of what a decoder returned, and counts a refused one.
func (s *Service) item(door string, envelope []byte, ref *refusal) *item {
	if ref == nil {
		return &item{envelope: envelope}
	}
	it := &item{final: true}
	s.refuse(turn{door: door}, ref, func(a answer) { it.answer = a })
	return it
}

// wake leaves word in c, unless there is some already.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// add puts an item at the end. It reports false, and does not take it, if the
// row is closed or over.
func (r *row) add(it *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.over {
		return false
	}
	if !it.final {
		r.number++
		it.number = r.number
	}
	r.items = append(r.items, it)
	r.settle()
	return true
}

// close says that no more items come.
func (r *row) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.settle()
}

// settle moves the head behind what is final, and tells everybody. Caller holds
// mu.
func (r *row) settle() {
	for r.head < len(r.items) && r.items[r.head].final {
		r.head++
	}
	wake(r.work)
	wake(r.news)
}

// give gives back an item's room. Caller holds mu.
func (it *item) give() {
	if it.free != nil {
		it.free()
		it.free = nil
	}
}

// next waits for the final answer to the oldest item. It returns nil when there
// will be none: all are answered, or the row is over, or ctx has ended.
func (r *row) next(ctx context.Context) *item {
	for {
		r.mu.Lock()
		if r.head > 0 {
			it := r.items[0]
			r.items[0] = nil
			r.items = r.items[1:]
			r.head--
			r.sent = max(r.sent-1, 0)
			r.mu.Unlock()
			return it
		}
		end := r.closed && len(r.items) == 0 || r.over
		r.mu.Unlock()
		if end {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.news:
		}
	}
}

// rest returns how many items have no final answer, and the newest busy answer.
func (r *row) rest() (int, answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.items) - r.head, r.why
}

// What run is to do.
type step byte

const (
	stepSend  step = iota
	stepWait       // for work
	stepPause      // a round is over
	stepEnd
)

// run stores what is added until the row is closed and everything is answered,
// or it gives up, or ctx ends.
func (r *row) run(ctx context.Context) {
	defer r.end()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for ctx.Err() == nil {
		it, envelope, t, step := r.step()
		switch step {
		case stepEnd:
			return
		case stepSend:
			r.s.take(envelope, t, func(a answer) { r.answered(it, a) })
		case stepWait:
			select {
			case <-ctx.Done():
			case <-r.work:
			}
		case stepPause:
			pause, ok := r.again()
			if !ok {
				return
			}
			timer.Reset(pause)
			select {
			case <-ctx.Done():
			case <-r.halt:
				return
			case <-timer.C:
			}
		}
	}
}

func (r *row) step() (*item, []byte, turn, step) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.failed && r.flying == 0:
		return nil, nil, turn{}, stepPause
	case r.failed:
		return nil, nil, turn{}, stepWait
	}
	for r.sent < len(r.items) {
		it := r.items[r.sent]
		r.sent++
		if it.final {
			continue
		}
		it.flying = true
		r.flying++
		return it, it.envelope, turn{own: &r.session, number: it.number, base: r.items[r.head].number, door: r.door}, stepSend
	}
	if r.closed && r.head == len(r.items) {
		return nil, nil, turn{}, stepEnd
	}
	return nil, nil, turn{}, stepWait
}

// again begins the next round, after a pause; unless it is time to give up.
func (r *row) again() (time.Duration, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.patience > 0 && !r.since.IsZero() && now.Sub(r.since) > r.patience || !r.until.IsZero() && !now.Before(r.until) {
		return 0, false
	}
	r.failed, r.sent = false, 0
	r.pause = min(max(2*r.pause, minPause), maxPause)
	if r.until.IsZero() {
		return r.pause, true
	}
	return min(r.pause, max(r.until.Sub(now), 0)), true
}

// answered takes the answer to one try. It is called by whoever stores, and must
// not wait.
func (r *row) answered(it *item, a answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	it.flying = false
	r.flying--
	if a.status == pb.Receipt_STATUS_BUSY {
		if r.since.IsZero() {
			r.since = time.Now()
		}
		r.failed, r.why = true, a
		if r.over {
			it.give()
		}
	} else {
		it.final, it.answer, it.envelope = true, a, nil
		it.give()
		r.since, r.pause = time.Time{}, 0
	}
	r.settle()
}

// end gives up what has no answer and is not on its way.
func (r *row) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	for _, it := range r.items[r.head:] {
		if !it.flying {
			it.give()
		}
	}
	r.settle()
}
