package consensus

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// Whoever may send a request may ask for blocks, and reading and sending them
// takes what deciding needs too. So what one asker gets is bounded, in requests
// and in bytes a second. Members sign what they ask, and each has its share
// whatever others do. Everybody else is known by the inbox that the answer goes
// to, which can be forged, and they have one more share together.
//
// Who asks for more is told so, and when to ask again; who goes on asking is not
// answered.

// askHeader is the header of a member's request: number, sequence, and in base64
// the Ed25519 signature by its vote key over
//
//	"stopline sync request v1\n" ‖ genesis hash ‖ asked ‖ asker ‖ sequence ‖ SHA-256 of the request
//
// with 64-bit big-endian integers. Sequences rise; one that does not is of a
// request that was signed before.
const (
	askHeader = "Stopline-Ask"
	askDomain = "stopline sync request v1\n"
)

func askInput(genesis ledger.Hash, asked, asker, seq uint64, req []byte) []byte {
	b := append([]byte(askDomain), genesis[:]...)
	for _, v := range []uint64{asked, asker, seq} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	h := sha256.Sum256(req)
	return append(b, h[:]...)
}

// asking signs requests.
type asking struct{ seq atomic.Uint64 }

// next is a number that was not used before, not by an earlier start either.
func (a *asking) next() uint64 {
	for {
		last := a.seq.Load()
		if now := max(uint64(time.Now().UnixNano()), last+1); a.seq.CompareAndSwap(last, now) {
			return now
		}
	}
}

// ask sends a signed request to a peer.
func (v *Validator) ask(ctx context.Context, subject string, peer uint64, req []byte) ([]byte, error) {
	seq := v.asking.next()
	sig := ed25519.Sign(v.core.keys.Load().vote, askInput(v.core.state.genesis, peer, v.c.Number, seq, req)) // genesis never changes
	h := nats.Header{askHeader: {fmt.Sprintf("%d %d %s", v.c.Number, seq, base64.StdEncoding.EncodeToString(sig))}}
	m, err := v.c.Bus.NC.RequestMsgWithContext(ctx, &nats.Msg{Subject: subject, Data: req, Header: bus.Inject(ctx, h)})
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "request to validator %d: %w", peer, err)
	}
	return m.Data, nil
}

const (
	// askers bounds how many inboxes are remembered.
	askersMost = 256
	// burstSeconds is how many seconds' worth one may have at once.
	burstSeconds = 2
	// strangersShares is how many shares those have together who are no members.
	strangersShares = 2
	// verifyRate is how many signatures of requests a second are checked; what
	// comes beyond is taken for a stranger's. It is a tenth of a processor.
	verifyRate = 2000
	// sayEvery is how often an asker is told that it asks too much.
	sayEvery = 5 * time.Millisecond
)

// serving says who may have how much.
type serving struct {
	self            uint64
	genesis         ledger.Hash
	requests, bytes float64 // a second, of one asker
	members         func() *members

	mu        sync.Mutex
	known     map[uint64]*share // members
	inboxes   map[string]*share
	strangers share // together
	verify    bucket
}

// share is one asker's.
type share struct {
	requests, bytes bucket
	seq             uint64 // of a member
	told            time.Time
}

func newServing(self uint64, genesis ledger.Hash, requests, bytes float64, members func() *members) *serving {
	s := &serving{self: self, genesis: genesis, requests: requests, bytes: bytes, members: members,
		known: map[uint64]*share{}, inboxes: map[string]*share{}, verify: bucket{rate: verifyRate, burst: verifyRate}}
	s.strangers = *s.share(strangersShares)
	return s
}

func (s *serving) share(n float64) *share {
	return &share{
		requests: bucket{rate: n * s.requests, burst: n * s.requests * burstSeconds},
		bytes:    bucket{rate: n * s.bytes, burst: n * s.bytes * burstSeconds},
	}
}

// asker is whoever sent a request: a member, or an inbox.
type asker struct {
	*share
	stranger bool
}

// of finds the asker. It needs mu.
func (s *serving) of(now time.Time, m *bus.Msg) asker {
	if n, ok := s.member(now, m); ok {
		sh := s.known[n]
		if sh == nil {
			sh = s.share(1)
			s.known[n] = sh
		}
		return asker{sh, false}
	}
	// The first two tokens: _INBOX and what is the connection's own.
	inbox := m.Reply
	if i := strings.IndexByte(inbox, '.'); i >= 0 {
		if j := strings.IndexByte(inbox[i+1:], '.'); j >= 0 {
			inbox = inbox[:i+1+j]
		}
	}
	sh := s.inboxes[inbox]
	if sh == nil {
		if len(s.inboxes) >= askersMost {
			clear(s.inboxes) // together they have no more all the same
		}
		sh = s.share(1)
		s.inboxes[inbox] = sh
	}
	return asker{sh, true}
}

// member verifies a member's signature. It needs mu.
func (s *serving) member(now time.Time, m *bus.Msg) (uint64, bool) {
	h := m.Header.Get(askHeader)
	if h == "" || len(h) > 256 {
		return 0, false
	}
	var n, seq uint64
	var sig64 string
	if _, err := fmt.Sscanf(h, "%d %d %s", &n, &seq, &sig64); err != nil {
		return 0, false
	}
	sig, err := base64.StdEncoding.Strict().DecodeString(sig64)
	if err != nil {
		return 0, false
	}
	val, ok := s.members().validator(n)
	if !ok {
		delete(s.known, n)
		return 0, false
	}
	if sh := s.known[n]; sh != nil && seq <= sh.seq {
		return 0, false // played again
	}
	if !s.verify.take(now, 1) || !identity.VerifyBytes([]byte(val.VoteKey), askInput(s.genesis, s.self, n, seq, m.Data), sig) {
		return 0, false
	}
	if s.known[n] == nil {
		s.known[n] = s.share(1)
	}
	s.known[n].seq = seq
	return n, true
}

// admit takes a request from its asker's share. Where there is nothing left, wait
// is after how long there will be; quiet says that it was told so just now.
func (s *serving) admit(now time.Time, m *bus.Msg) (who asker, wait time.Duration, quiet bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	who = s.of(now, m)
	shares := []*share{who.share}
	if who.stranger {
		shares = append(shares, &s.strangers)
	}
	for _, sh := range shares {
		wait = max(wait, sh.requests.wait(now), sh.bytes.wait(now))
	}
	if wait > 0 {
		quiet = now.Sub(who.told) < sayEvery
		if !quiet {
			who.told = now
		}
		return who, wait, quiet
	}
	for _, sh := range shares {
		sh.requests.take(now, 1)
	}
	return who, 0, false
}

// gave takes what was answered from the asker's share.
func (s *serving) gave(now time.Time, who asker, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	who.bytes.take(now, float64(n))
	if who.stranger {
		s.strangers.bytes.take(now, float64(n))
	}
}
