package roadside

import (
	"slices"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

type item struct {
	envelope []byte
	key      traffic.FrameKey
	events   bool
}

// queue is a bounded queue. When it is full the oldest item without events
// goes; where all have events, the oldest.
type queue struct {
	mu     sync.Mutex
	some   sync.Cond // signalled when items or closed change
	items  []item
	closed bool
	most   int
}

func newQueue(most int) *queue {
	q := &queue{most: most}
	q.some.L = &q.mu
	return q
}

// push adds an item and returns the one that had to go for it, if any.
func (q *queue) push(it item) (lost *item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) >= q.most {
		i := max(slices.IndexFunc(q.items, func(x item) bool { return !x.events }), 0)
		old := q.items[i]
		lost = &old
		q.items = slices.Delete(q.items, i, i+1)
	}
	q.items = append(q.items, it)
	q.some.Signal()
	return lost
}

// pop waits for an item; false means that the queue is closed and empty.
func (q *queue) pop() (item, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 && !q.closed {
		q.some.Wait()
	}
	if len(q.items) == 0 {
		return item{}, false
	}
	it := q.items[0]
	q.items = slices.Delete(q.items, 0, 1)
	return it, true
}

// close lets pop return when the queue is empty. Nobody pushes afterwards.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.some.Broadcast()
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items)
}
