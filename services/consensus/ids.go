package consensus

import (
	"sync"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// requestIDs hashes a request once for the same memory. The engine asks for the
// id of a request at each step that it takes with it, and a proposal is a
// megabyte. Nobody changes a request's bytes, or those of a proposal that they
// are a part of; memory that is remembered here is not used for anything else
// meanwhile.
type requestIDs struct {
	mu         sync.Mutex
	young, old map[*byte]requestID
	bytes      int // that young keeps alive, at least
}

type requestID struct {
	length int
	id     ledger.Hash
}

// What is remembered: that much, and as much of before.
const (
	requestIDsBytes = 8 << 20
	requestIDsMost  = 1024
)

func (r *requestIDs) of(raw []byte) ledger.Hash {
	if len(raw) == 0 {
		return ledger.RequestID(raw)
	}
	at := &raw[0]
	r.mu.Lock()
	have, ok := r.young[at]
	if !ok {
		have, ok = r.old[at]
	}
	r.mu.Unlock()
	if ok && have.length == len(raw) {
		return have.id
	}
	id := ledger.RequestID(raw)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.young == nil || r.bytes > requestIDsBytes || len(r.young) >= requestIDsMost {
		r.old, r.young, r.bytes = r.young, map[*byte]requestID{}, 0
	}
	r.young[at] = requestID{len(raw), id}
	r.bytes += len(raw)
	return id
}
