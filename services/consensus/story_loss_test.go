package consensus

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// dice is a source of chance that several goroutines may use.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

func newDice(seed uint64) *dice { return &dice{r: rand.New(rand.NewPCG(seed, 0))} }

func (d *dice) below(p float64) bool { d.mu.Lock(); defer d.mu.Unlock(); return d.r.Float64() < p }
func (d *dice) n(n int) int          { d.mu.Lock(); defer d.mu.Unlock(); return d.r.IntN(n) }

// One in twenty messages is lost, and one validator is down. The others go on.
func TestStoryLossAndOneDown(t *testing.T) {
	long(t)
	s := district(t, 4)
	s.decide(s.all()...)
	d := newDice(1)
	s.say("4 is down, and of all messages one in twenty is lost")
	s.cluster.stop(4)
	for _, n := range []uint64{1, 2, 3} {
		s.goes(n, func(pc parcel, send func(parcel)) {
			if !d.below(.05) {
				send(pc)
			}
		})
	}
	const rounds = 40
	begin := time.Now()
	for range rounds {
		s.decide(1, 2, 3)
	}
	s.say("%d batches, one after the other, in %v", rounds, time.Since(begin).Round(time.Millisecond))
	s.say("1, the leader, is lost for good, 4 is back, and still one in twenty is lost")
	s.cluster.stop(1)
	s.start(4)
	s.goes(4, s.ways[2])
	for range 10 {
		s.decide(2, 3, 4)
	}
	s.agree()
}

// A schedule of faults follows from its seed: which validators are cut off,
// restarted or silenced when, and what the network does in between. What happens
// to each single message also depends on when it is sent, which no seed decides.
//
//	STOPLINE_SCHEDULE_SEED=17 go test ./consensus -run TestSchedules   one again
//	STOPLINE_SCHEDULE_TIME=10m go test ./consensus -run TestSchedules  many, from a new seed on
func TestSchedules(t *testing.T) {
	long(t)
	seed, one := uint64(1), false
	if v := os.Getenv("STOPLINE_SCHEDULE_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("STOPLINE_SCHEDULE_SEED: %v", err)
		}
		seed, one = n, true
	}
	limit := 8 * time.Second
	if slower > 1 {
		limit = 5 * time.Second
	}
	if v := os.Getenv("STOPLINE_SCHEDULE_TIME"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatalf("STOPLINE_SCHEDULE_TIME: %v", err)
		}
		limit = d
		if !one {
			seed = uint64(time.Now().UnixNano())
		}
	}
	for end := time.Now().Add(limit); ; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { schedule(t, seed) })
		if one || t.Failed() || !time.Now().Before(end) {
			return
		}
	}
}

// schedule runs one. At most f validators are out at a time; in the end all that
// was stored must be decided, once, the same everywhere.
func schedule(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1)) // of the schedule; the network has its own
	n := 4
	if seed%4 == 0 {
		n = 7
	}
	s := district(t, n)
	s.say("seed %d: %d validators", seed, n)
	d := newDice(seed)
	network := func(loss, double float64, delay time.Duration) {
		for _, v := range s.all() {
			s.goes(v, func(pc parcel, send func(parcel)) {
				if d.below(loss) {
					return
				}
				times := 1
				if d.below(double) {
					times = 2
				}
				for range times {
					if delay == 0 {
						send(pc)
						continue
					}
					// Each takes its own time, so that they overtake each other.
					time.AfterFunc(time.Duration(d.n(int(delay))), func() { send(pc) })
				}
			})
		}
	}
	var all [][]byte
	submit := func() {
		for range 1 + r.IntN(4) {
			b := s.batch()
			all = append(all, b)
			s.submit(b)
		}
	}
	f := (n - 1) / 3
	for range 8 {
		submit()
		some := s.all()
		r.Shuffle(n, func(i, k int) { some[i], some[k] = some[k], some[i] })
		some = some[:1+r.IntN(f)]
		calm := time.Duration(50+r.IntN(250)) * time.Millisecond
		switch r.IntN(7) {
		case 0:
			s.say("%v are cut off for %v", some, calm)
			s.cutOff(some...)
			pauseFor(calm)
			s.cutOff()
		case 1:
			s.say("%v restart", some)
			s.cluster.stop(some...)
			submit()
			s.start(some...)
		case 2:
			s.say("all restart")
			s.cluster.stop(s.all()...)
			s.start(s.all()...)
		case 3:
			s.say("one message in ten is lost")
			network(.1, 0, 0)
		case 4:
			s.say("messages take up to 20 ms, and some come twice")
			network(0, .1, 20*time.Millisecond)
		case 5:
			s.say("one message in thirty is lost, the others take up to 60 ms")
			network(.03, .05, 60*time.Millisecond)
		case 6:
			s.say("half are cut off from the others for %v", calm)
			s.cutOff(s.all()[:n/2]...)
			pauseFor(calm)
			s.cutOff()
		}
		if r.IntN(3) > 0 {
			s.decided(all[len(all)-1], s.all()...)
		}
	}
	s.say("the network is whole again")
	network(0, 0, 0)
	begin := time.Now()
	for _, b := range all {
		s.decided(b, s.all()...)
	}
	s.say("all %d batches are decided after %v", len(all), time.Since(begin).Round(time.Millisecond))
	blocks := s.agree()
	for i, b := range all {
		if times, _, v := where(t, blocks, b); times != 1 || strings.Contains(v, "0") {
			t.Errorf("batch %d: decided %d times with verdicts %s, want once, accepted", i, times, v)
		}
	}
	for _, v := range s.all() {
		if st := s.nodes[v-1].v.Stats(); st.Equivocations > 0 || st.Forks > 0 {
			t.Errorf("validator %d saw %d contradictions and %d forks, want none", v, st.Equivocations, st.Forks)
		}
	}
}

// pauseFor lets a fault last.
func pauseFor(d time.Duration) { time.Sleep(d) }
