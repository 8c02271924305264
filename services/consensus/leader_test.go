package consensus

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// load stores batches in ACCEPTED without end, so that never more than so many
// records are stored and not decided.
type load struct {
	c      *cluster
	stored atomic.Int64 // records
	stop   func()
}

// press begins: batches of size records, at most ahead records undecided at the
// validators that run.
func press(c *cluster, size, ahead int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{c: c}
	var wg sync.WaitGroup
	l.stop = func() { cancel(); wg.Wait() }
	units := make([]*unit, 8)
	for i := range units {
		units[i] = newUnit(i + 1)
	}
	base := l.records()
	wg.Go(func() {
		for ctx.Err() == nil {
			if int(l.stored.Load())-(l.records()-base) > ahead {
				time.Sleep(time.Millisecond) // the validators count; they do not call
				continue
			}
			rs := make([]*pb.Record, size)
			now := time.Now()
			for i := range rs {
				rs[i] = units[i%len(units)].frame(now)
			}
			if err := c.bus.Publish(ctx, topic.Accepted(harbour), "", batch(rs...)); err != nil {
				if ctx.Err() == nil {
					c.t.Errorf("storing: %v", err)
				}
				return
			}
			l.stored.Add(int64(size))
		}
	})
	return l
}

// records is how many the furthest validator has decided.
func (l *load) records() int {
	most := 0
	for _, b := range running(l.c) {
		most = max(most, int(b.Stats().Accepted))
	}
	return most
}

var runningMu sync.Mutex // nodes change while a load looks at them

func running(c *cluster) []*Validator {
	runningMu.Lock()
	defer runningMu.Unlock()
	var out []*Validator
	for _, nd := range c.nodes {
		if nd != nil {
			out = append(out, nd.v)
		}
	}
	return out
}

// Much more is stored than can be decided, and other work wants the processors,
// too. The leader stays.
func TestOverloadDeposesNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	s := district(t, 4)
	s.decide(s.all()...)
	for range runtime.GOMAXPROCS(0) {
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for busy := true; busy; {
				select {
				case <-done:
					busy = false
				default:
				}
			}
		})
		t.Cleanup(func() { close(done); wg.Wait() })
	}
	s.slip.Store(0)
	l := press(s.cluster, 256, 20_000) // several times what a pool holds
	const run = 4 * time.Second
	before := l.records()
	time.Sleep(run) // the load's length
	decided := l.records() - before
	l.stop()
	view, leader := s.view(s.all()...)
	s.say("%d records decided, %d waiting, under leader %d of view %d; the machine was late by at most %v",
		decided, int(l.stored.Load())-decided, leader, view, time.Duration(s.slip.Load()).Round(time.Millisecond))
	if decided == 0 {
		t.Error("nothing was decided")
	}
	// Who gets no processor for so long cannot tell load from loss.
	if slip := time.Duration(s.slip.Load()); view != 0 && slip < s.timing.Heartbeat/2 {
		s.late("view %d: the leader was replaced, want it to stay", view)
	}
	s.check()
}

// BenchmarkLeaderLost measures for how long nothing is decided by the others when
// the leader dies, or stalls: lives and proposes nothing. Load goes on all the
// while, and settings are the defaults. It prints the distribution over as many as
// asked for, at least 3, and how many records a second four decide, and three
// without the leader. For a distribution worth the name:
//
//	go test ./consensus -run xxx -bench LeaderLost -benchtime 30x
func BenchmarkLeaderLost(b *testing.B) {
	for _, tc := range []struct {
		name string
		how  way
	}{
		{"dead", silent},
		{"stalled", func(pc parcel, send func(parcel)) {
			if engineMessage(pc).GetPrePrepare() == nil {
				send(pc)
			}
		}},
	} {
		b.Run(tc.name, func(b *testing.B) {
			leaderLost(b, max(b.N, 3), tc.how)
			b.ReportMetric(0, "ns/op")
		})
	}
}

func leaderLost(b *testing.B, times int, how way) {
	c := newCluster(b, 4)
	var mu sync.Mutex
	ways := map[uint64]way{}
	c.prepare = func(n uint64, v *Validator) {
		v.tap = func(pc parcel, send func(parcel)) {
			mu.Lock()
			w := ways[n]
			mu.Unlock()
			if w == nil {
				send(pc)
				return
			}
			w(pc, send)
		}
	}
	goes := func(n uint64, w way) { mu.Lock(); defer mu.Unlock(); ways[n] = w }
	c.start(c.all()...)
	l := press(c, 16, 256)
	defer l.stop()
	rate := func(d time.Duration) float64 {
		before, begin := l.records(), time.Now()
		time.Sleep(d)
		return float64(l.records()-before) / time.Since(begin).Seconds()
	}
	rate(time.Second) // warm
	four := rate(time.Second)
	var three []float64
	var took []time.Duration
	for i := range times {
		leader := uint64(0)
		eventually(b, "all follow one leader, in step", func() bool {
			var leaders []uint64
			heights := uint64(0)
			for _, nd := range c.nodes {
				st := nd.v.Stats()
				leaders = append(leaders, st.Leader)
				heights = max(heights, uint64(st.Height))
			}
			for _, nd := range c.nodes {
				if uint64(nd.v.Stats().Height)+3 < heights {
					return false
				}
			}
			leader = leaders[0]
			return !slices.ContainsFunc(leaders, func(n uint64) bool { return n != leader })
		})
		rest := without(c.all(), leader)
		begin := time.Now()
		goes(leader, how)
		first := c.nodes[rest[0]-1].v.Stats().View
		// Not the next block, which may have been on its way, but the first under
		// another leader.
		eventually(b, "decided under another leader", func() bool {
			st := c.nodes[rest[0]-1].v.Stats()
			if st.View <= first {
				return false
			}
			at := st.Blocks
			eventually(b, "a block", func() bool { return c.nodes[rest[0]-1].v.Stats().Blocks > at })
			return true
		})
		took = append(took, time.Since(begin))
		if i < 2 {
			three = append(three, rate(time.Second))
		}
		goes(leader, nil)
	}
	slices.Sort(took)
	slices.Sort(three)
	at := func(q float64) time.Duration { return took[min(len(took)-1, int(q*float64(len(took))))] }
	ms := func(d time.Duration) float64 { return float64(d.Milliseconds()) }
	b.ReportMetric(ms(at(.5)), "p50-ms")
	b.ReportMetric(ms(at(.9)), "p90-ms")
	b.ReportMetric(ms(at(.99)), "p99-ms")
	b.ReportMetric(ms(took[len(took)-1]), "max-ms")
	b.ReportMetric(four, "records/s-before")
	b.ReportMetric(three[len(three)/2], "records/s-after")
	d := Timing{}.withDefaults()
	b.Logf("%d times; heartbeat %v, complaint %v, change of leader %v, repeated after %v, tick %v; took %v", times, d.Heartbeat, d.Complain, d.ViewChange, d.ViewChangeResend, d.Tick, took)
	c.check()
}
