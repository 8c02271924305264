package consensus

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

func TestBucket(t *testing.T) {
	at := noon
	b := bucket{rate: 10, burst: 20}
	for i := range 20 {
		if !b.take(at, 1) {
			t.Fatalf("token %d of 20 at once is refused", i)
		}
	}
	if b.take(at, 1) {
		t.Error("a 21st token at once")
	}
	if got := b.wait(at); got != 100*time.Millisecond {
		t.Errorf("to wait: got %v, want 100 ms", got)
	}
	at = at.Add(150 * time.Millisecond)
	if !b.take(at, 50) { // overdrawn, once
		t.Error("with a token there, more may be taken at once")
	}
	if b.take(at.Add(4*time.Second), 1) || !b.take(at.Add(5*time.Second), 1) {
		t.Error("what was overdrawn must be made good, in 4.9 s")
	}
	b.fill(at.Add(time.Hour))
	if b.have != 20 {
		t.Errorf("after an hour: got %v tokens, want no more than 20", b.have)
	}
	b.fill(at) // a clock that goes back gives nothing, and takes nothing
	if b.have != 20 {
		t.Errorf("a clock that goes back: got %v tokens, want 20", b.have)
	}
}

// Who asks is known by signature, each request once, and else by inbox.
func TestAskersHaveShares(t *testing.T) {
	b := newBench(t)
	g := b.k.state.genesis
	at := noon
	s := newServing(1, g, 10, 1000, b.k.members)
	req := []byte("request")
	seq := uint64(0)
	signedBy := func(n, asked uint64, key ed25519.PrivateKey, seq uint64) *bus.Msg {
		sig := ed25519.Sign(key, askInput(g, asked, n, seq, req))
		return &bus.Msg{Data: req, Reply: "_INBOX.two.x", Header: nats.Header{askHeader: {fmt.Sprintf("%d %d %s", n, seq, base64.StdEncoding.EncodeToString(sig))}}}
	}
	signed := func(n uint64) *bus.Msg { seq++; return signedBy(n, 1, voteKey(n), seq) }
	from := func(inbox string) *bus.Msg { return &bus.Msg{Data: req, Reply: inbox} }
	admitted := func(m *bus.Msg) (ok bool) {
		who, wait, _ := s.admit(at, m)
		if wait == 0 {
			s.gave(at, who, 10)
		}
		return wait == 0
	}
	drain := func(f func() *bus.Msg) (n int) {
		for n < 1000 && admitted(f()) {
			n++
		}
		return n
	}
	if n := drain(func() *bus.Msg { return signed(2) }); n != 20 {
		t.Errorf("member 2 at once: got %d requests, want 20", n)
	}
	if n := drain(func() *bus.Msg { return signed(3) }); n != 20 {
		t.Errorf("member 3 after that: got %d requests, want 20", n)
	}
	n := 0
	if got := drain(func() *bus.Msg { n++; return from(fmt.Sprintf("_INBOX.a.%d", n)) }); got != 20 {
		t.Errorf("one inbox: got %d requests, want 20", got)
	}
	if got := drain(func() *bus.Msg { n++; return from(fmt.Sprintf("_INBOX.i%d.x", n)) }); got != 20 {
		t.Errorf("all other inboxes: got %d requests, want the 20 that are left of 40", got)
	}
	if !admitted(signed(4)) {
		t.Error("member 4 is put off because strangers ask too much")
	}
	// What is not signed as it should be is a stranger's, who have nothing left.
	old := signed(4)
	admitted(old)
	for name, m := range map[string]*bus.Msg{
		"played again":       old,
		"another's key":      signedBy(4, 1, voteKey(3), 1<<40),
		"to somebody else":   signedBy(4, 2, voteKey(4), 1<<40),
		"no member":          signedBy(9, 1, voteKey(9), 1<<40),
		"another request":    func() *bus.Msg { m := signedBy(4, 1, voteKey(4), 1<<40); m.Data = []byte("other"); return m }(),
		"no header":          {Data: req, Header: nats.Header{askHeader: {"x"}}},
		"no signature":       {Data: req, Header: nats.Header{askHeader: {"4 5 !"}}},
		"a very long header": {Data: req, Header: nats.Header{askHeader: {string(make([]byte, 1000))}}},
	} {
		if admitted(m) {
			t.Errorf("%s: is given member 4's share", name)
		}
	}
	if !admitted(signed(4)) {
		t.Error("member 4 pays for what others say in its name")
	}
	// Bytes count too, and are made good.
	who, _, _ := s.admit(at, signed(4))
	s.gave(at, who, 10_000)
	if _, wait, _ := s.admit(at, signed(4)); wait < 7*time.Second || wait > 9*time.Second {
		t.Errorf("after 10,000 bytes at 1,000 a second: got to wait %v, want about 8 s", wait)
	}
	if _, _, quiet := s.admit(at, signed(4)); !quiet {
		t.Error("told again at once")
	}
	at = at.Add(9 * time.Second)
	if !admitted(signed(4)) || !admitted(from("_INBOX.a.x")) {
		t.Error("nothing is given again later")
	}
	for i := range 3 * askersMost {
		s.admit(at, from(fmt.Sprintf("_INBOX.%d.x", i)))
	}
	if len(s.inboxes) > askersMost {
		t.Errorf("remembers %d inboxes, want at most %d", len(s.inboxes), askersMost)
	}
}

// A peer that asks all the time, in its own name and in nobody's, gets its share
// and no more; another, that has lost its disk, is given all blocks meanwhile, and
// the rest go on deciding.
func TestStoryAPeerAsksAllTheTime(t *testing.T) {
	long(t)
	const bytesPer = 256 << 10
	c := newCluster(t, 4)
	c.tune = func(cfg *Config) { cfg.ServeRequests, cfg.ServeBytes = 100, bytesPer }
	c.start(c.all()...)
	u := newUnit(1)
	decide := func(ns ...uint64) {
		t.Helper()
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, ns...)
	}
	for range 60 {
		decide(c.all()...)
	}
	// 3 loses its disk; 4 takes no part any more, and asks.
	liar := c.nodes[3].v
	c.stop(3)
	if err := os.RemoveAll(c.path(3)); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var once sync.Once
	end := func() { once.Do(func() { close(stop); wg.Wait() }) }
	defer end()
	var got, waits, asked atomic.Int64
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: 1})
	if err != nil {
		t.Fatal(err)
	}
	inbox := nats.NewInbox()
	sub, err := c.bus.NC.Subscribe(inbox, func(m *nats.Msg) {
		var resp pb.SyncResponse
		if proto.Unmarshal(m.Data, &resp) == nil && resp.WaitMs > 0 {
			waits.Add(1)
			return
		}
		got.Add(int64(len(m.Data)))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	begin := time.Now()
	flood := func(header func(to uint64) nats.Header) {
		wg.Go(func() {
			for {
				for to := uint64(1); to <= 2; to++ {
					m := &nats.Msg{Subject: topic.Sync(harbour, to), Reply: inbox, Data: req, Header: header(to)}
					for range 5 {
						if err := c.bus.NC.PublishMsg(m); err != nil {
							return
						}
						asked.Add(1)
					}
				}
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
			}
		})
	}
	g := sha256.Sum256(c.genesis)
	flood(func(uint64) nats.Header { return nil })
	flood(func(to uint64) nats.Header {
		seq := liar.asking.next()
		sig := ed25519.Sign(voteKey(4), askInput(g, to, 4, seq, req))
		return nats.Header{askHeader: {fmt.Sprintf("4 %d %s", seq, base64.StdEncoding.EncodeToString(sig))}}
	})
	eventually(t, "the flood is told to wait", func() bool { return waits.Load() > 10 })
	// An empty disk is an old one: 3 is silent until something was decided without it.
	wg.Go(func() {
		for {
			b := batch(u.frame(time.Now()))
			id := ledger.RequestID(b)
			if err := c.bus.Publish(t.Context(), topic.Accepted(harbour), fmt.Sprintf("%x", id[:]), b); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	c.start(3)
	eventually(t, "3 has all blocks", func() bool { return c.nodes[2].v.Stats().Height >= 60 })
	took := time.Since(begin).Seconds()
	// Two give: to one inbox its share, and to member 4 its own; two seconds' worth
	// at once, and one answer beyond each.
	most := int64(2 * 2 * (bytesPer*(took+burstSeconds) + topic.MaxMessage))
	if got.Load() > most || got.Load() == 0 {
		t.Errorf("the flood got %d bytes in %.1f s, want some, and at most %d", got.Load(), took, most)
	}
	for _, n := range []uint64{1, 2} {
		if s := c.nodes[n-1].v.Stats(); s.Limited == 0 {
			t.Errorf("validator %d: put nothing off", n)
		}
	}
	end()
	decide(c.all()...)
	t.Logf("%d requests in %.1f s: %d bytes given, %d times told to wait", asked.Load(), took, got.Load(), waits.Load())
	c.check()
}

// A peer that always says to wait is set aside, as one that does not answer is.
func TestWaitingHasAnEnd(t *testing.T) {
	h := newHistory(t, 20, -1)
	h.grow(50)
	_, k := h.newcomer()
	f := h.fetcher(k, -1)
	f.wait = 20 * time.Millisecond
	put := 0
	h.lies[2] = func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
		proto.Reset(resp)
		resp.WaitMs = 1
		return nil
	}
	h.lies[3] = func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
		if put++; put < 4 {
			proto.Reset(resp)
			resp.WaitMs = 5
		}
		return nil
	}
	h.lies[4] = func(_ *pb.SyncRequest, resp *pb.SyncResponse) error {
		proto.Reset(resp)
		resp.WaitMs = 1 << 30
		return nil
	}
	h.run(f)
	h.caughtUp(k)
	if n := k.count.stats().FalseAnswers; n != 0 {
		t.Errorf("counted %d false answers: to put something off is none", n)
	}
	if ledger.Height(50) != k.height() || !f.aside[2] || !f.aside[4] {
		t.Errorf("got height %d, set aside %v; want 50, and 2 and 4", k.height(), f.aside)
	}
}
