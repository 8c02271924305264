package consensus

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// BenchmarkConsensus stores signed frames in ACCEPTED, in batches, and measures
// from the store's acknowledgement until the first validator has decided them:
// four validators, JetStream and every disk in one process, each sync for real.
// rate=0 is as many as will go.
func BenchmarkConsensus(b *testing.B) {
	for _, tc := range []struct{ nodes, batch, rate int }{
		{4, 4, 400}, {4, 64, 0}, {4, 256, 0},
	} {
		b.Run(fmt.Sprintf("nodes=%d/batch=%d/rate=%d", tc.nodes, tc.batch, tc.rate), func(b *testing.B) { benchConsensus(b, tc.nodes, tc.batch, tc.rate) })
	}
}

func benchConsensus(b *testing.B, nodes, size, rate int) {
	const run = 6 * time.Second
	c := newCluster(b, nodes)
	c.start(c.all()...)
	// All frames are signed before the clock runs.
	total := 60_000
	if rate > 0 {
		total = rate * int(run/time.Second)
	}
	units := make([]*unit, 8)
	for i := range units {
		units[i] = newUnit(i + 1)
	}
	base := time.Now().Add(time.Second)
	var batches [][]byte
	for n := 0; n < total; n += size {
		var rs []*pb.Record
		for k := range size {
			rs = append(rs, units[k%len(units)].frame(base))
		}
		batches = append(batches, batch(rs...))
	}
	var mu sync.Mutex
	sent := map[ledger.Hash]time.Time{}
	var lats []time.Duration
	nd := c.nodes[0].v
	old := nd.core.decided
	nd.core.mu.Lock()
	nd.core.decided = func(m *pb.Block, o *outcome) {
		old(m, o)
		now := time.Now()
		mu.Lock()
		defer mu.Unlock()
		for _, id := range o.ids {
			if t, ok := sent[id]; ok {
				lats = append(lats, now.Sub(t))
			}
		}
	}
	nd.core.mu.Unlock()
	b.ResetTimer()
	before := nd.Stats()
	begin := time.Now()
	window := make(chan struct{}, 128)
	var wg sync.WaitGroup
	done := 0
	for i, m := range batches {
		if rate > 0 {
			time.Sleep(time.Until(begin.Add(time.Duration(i) * time.Second * time.Duration(size) / time.Duration(rate))))
		}
		if time.Since(begin) > run {
			break
		}
		done = i
		id := ledger.RequestID(m)
		// In order, acknowledged later: as validation stores its batches.
		mu.Lock()
		sent[id] = time.Now()
		mu.Unlock()
		f, err := c.bus.JS.PublishAsync(topic.Accepted(harbour), m)
		if err != nil {
			b.Fatal(err)
		}
		window <- struct{}{}
		wg.Go(func() {
			select {
			case <-f.Ok():
			case err := <-f.Err():
				b.Errorf("storing: %v", err)
			}
			<-window
		})
		if rate == 0 { // no more ahead than a validator may be behind
			for h := nd.Stats(); int(h.Records-before.Records) < (i-128)*size; h = nd.Stats() {
				time.Sleep(time.Millisecond)
			}
		}
	}
	wg.Wait()
	c.decided(batches[done], 1)
	elapsed := time.Since(begin).Seconds()
	b.StopTimer()
	after := nd.Stats()
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(lats)
	at := func(q float64) float64 { return float64(lats[int(q*float64(len(lats)-1))].Microseconds()) / 1000 }
	b.ReportMetric(float64(after.Blocks-before.Blocks)/elapsed, "decisions/s")
	b.ReportMetric(float64(after.Accepted-before.Accepted)/elapsed, "records/s")
	b.ReportMetric(at(.5), "p50-ms")
	b.ReportMetric(at(.99), "p99-ms")
	b.ReportMetric(0, "ns/op")
	if got, want := after.Accepted-before.Accepted, uint64((done+1)*size); got != want {
		b.Errorf("accepted %d of %d records", got, want)
	}
	if s := nd.Stats(); s.View != 0 {
		b.Logf("the leader was replaced: view %d", s.View)
	}
}
