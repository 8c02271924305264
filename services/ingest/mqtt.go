package ingest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// fromDevice takes one record from a device's own topic. NATS, or MQTT for it,
// has seen to it that the subject is the device's; see package bus.
func (s *Service) fromDevice(m *nats.Msg) {
	token, down, ok := topic.DeviceOf(s.District, m.Subject)
	if !ok { // cannot be: it is what we listen to
		s.log.Warn("ingest: a record on an unknown subject", "subject", m.Subject)
		return
	}
	if !s.lanes.admit(token, m.Data, time.Now()) {
		s.mu.Lock()
		s.tally(DoorMQTT, ReasonRate)
		s.mu.Unlock()
		return // an answer would be one more thing that somebody gets too much of
	}
	digest := sha256.Sum256(m.Data)
	isJSON := len(m.Data) > 0 && m.Data[0] == '{' // no protobuf envelope begins so
	send := func(a answer) {
		b, err := deviceReceipt(a, digest, isJSON)
		if err == nil {
			// Core NATS: nothing is kept for a device that is away or does not read. It
			// sends the same bytes again and gets the same receipt.
			err = s.Bus.NC.Publish(down, b)
		}
		if err != nil {
			s.log.Warn("ingest: cannot answer a device", "subject", down, "err", err)
		}
	}
	decode := s.canonical
	if isJSON {
		decode = s.fromJSON
	}
	envelope, e, ref := decode(m.Data)
	if ref == nil && s.Device != nil {
		if d, known := s.Device(e.Key); known && (d == "" || topic.Token(string(d)) != token) {
			ref = &refusal{reason: ReasonDevice, field: "key_id", text: fmt.Sprintf("key_id: the registry has %s for %s, not for the device whose topic this is", e.Key, holder(string(d)))}
		}
	}
	t := turn{door: DoorMQTT}
	if ref != nil {
		s.lanes.pass(token, digest)
		s.refuse(t, ref, send)
		return
	}
	n, reason, text := s.lanes.enter(token, digest, time.Now())
	if reason != "" {
		s.mu.Lock()
		s.tally(t.door, reason)
		s.mu.Unlock()
		send(answer{status: pb.Receipt_STATUS_BUSY, reason: reason, text: text})
		return
	}
	s.take(envelope, t, func(a answer) {
		s.lanes.leave(token, n, digest, a.status == pb.Receipt_STATUS_BUSY, time.Now())
		send(a)
	})
}

// tally counts a record that was told busy, or not even that. Caller holds mu.
func (s *Service) tally(door, reason string) {
	s.counts.Received++
	s.counts.Busy[reason]++
	s.at(door).Received++
	s.at(door).Busy++
}

func holder(device string) string {
	if device == "" {
		return "something that is no device"
	}
	return fmt.Sprintf("%.80q", device)
}

// deviceReceipt is the message that tells a device what became of a record.
func deviceReceipt(a answer, digest ledger.Hash, isJSON bool) ([]byte, error) {
	r := a.receipt()
	r.Digest = digest[:]
	if !isJSON {
		return proto.Marshal(r)
	}
	b, err := protojson.Marshal(r)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = json.Compact(&out, b) // protojson adds a space at random
	return out.Bytes(), err
}

const (
	// laneMost is how many records of one device may be without an answer: one
	// device cannot fill the queue for all.
	laneMost = 256
	// laneWait is how long the records of a device wait for one that was answered
	// busy to come again, and how long an idle device is remembered.
	laneWait = 10 * time.Second
	// laneRate is how many messages a device may send in a second, and laneBurst
	// how many at once after a pause. A hundred times what a junction has to say;
	// but a device that sends as fast as it can would leave no room for others.
	laneRate  = 2000
	laneBurst = 4000
)

// lanes keep devices from disturbing each other, and the order of each device's
// records when some are answered busy. MQTT 3.1.1 has no room for the numbers of
// bus.Sender, but the bytes of a record are the same when it comes again: until
// the oldest record that was told busy has come again, everything else of the
// device is told busy too.
type lanes struct {
	mu    sync.Mutex
	m     map[string]*lane // by token of the device
	swept time.Time
}

type lane struct {
	room    float64 // messages that may come now
	seen    time.Time
	last    uint64      // number of the newest record that came
	pending int         // records without an answer
	blocked bool        // the record with this digest must come first:
	first   ledger.Hash //
	number  uint64      // of that record
	since   time.Time
}

// admit reports whether a message of a device does not come too fast.
func (ls *lanes) admit(token string, data []byte, now time.Time) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if now.Sub(ls.swept) >= laneWait {
		ls.swept = now
		for t, l := range ls.m {
			if l.pending == 0 && now.Sub(l.seen) >= laneWait {
				delete(ls.m, t)
			}
		}
	}
	l := ls.m[token]
	if l == nil {
		l = &lane{room: laneBurst, seen: now}
		if ls.m == nil {
			ls.m = map[string]*lane{}
		}
		ls.m[token] = l
	}
	l.room = min(l.room+laneRate*now.Sub(l.seen).Seconds(), laneBurst)
	l.seen = now
	if l.room < 1 {
		if !l.blocked { // those behind it must not overtake it
			l.last++
			l.block(l.last, sha256.Sum256(data), now)
		}
		return false
	}
	l.room--
	return true
}

// enter gives an admitted record its number, or says why it is told busy.
func (ls *lanes) enter(token string, digest ledger.Hash, now time.Time) (n uint64, reason, text string) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.m[token] // admitted just now by the same goroutine, so it is there
	switch {
	case l.blocked && digest == l.first:
		// It keeps its place: those that came behind it may not be answered yet.
		l.blocked, n = false, l.number
	case l.blocked && now.Sub(l.since) < laneWait:
		return 0, ReasonTurn, "an earlier record was told to come again and has not yet: send those without a final answer again, in order"
	default:
		l.blocked = false
		l.last++
		n = l.last
	}
	if l.pending >= laneMost {
		l.block(n, digest, now)
		return 0, ReasonQueueFull, fmt.Sprintf("%d records of this device have no answer yet, no more are held", laneMost)
	}
	l.pending++
	return n, "", ""
}

// leave notes a record's answer.
func (ls *lanes) leave(token string, n uint64, digest ledger.Hash, busy bool, now time.Time) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	l := ls.m[token] // one with pending records stays
	l.pending--
	switch {
	case busy && (!l.blocked || n < l.number):
		l.block(n, digest, now)
	case !busy && l.blocked && digest == l.first:
		l.blocked = false
	}
}

// pass notes that a record has got its final answer without entering.
func (ls *lanes) pass(token string, digest ledger.Hash) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if l := ls.m[token]; l != nil && l.blocked && digest == l.first {
		l.blocked = false
	}
}

// block holds the lane for a record. Caller holds mu.
func (l *lane) block(n uint64, digest ledger.Hash, now time.Time) {
	l.blocked, l.first, l.number, l.since = true, digest, n, now
}
