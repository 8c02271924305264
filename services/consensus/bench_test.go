package consensus

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

// BenchmarkConsensus measures a district's validators with JetStream and every
// disk in one process, each sync for real: batches of frames of 200 bytes are
// stored in ACCEPTED, and count once the first validator has decided them. Beside
// it, in the same run, the bare engine gets the same batches: see [bareReplica].
// "of-bare" is our figure as a part, or a multiple, of its. The bare engine checks
// no signatures of records; "of-checking" is our figure as a part of what the
// machine would do if it only checked them, once for each validator.
//
// rate=400 stores so many records a second and measures from the store's call to
// the decision. saturated stores as many as will go. signed has every validator
// check every frame's signature, as always; in unsigned each validator's check of
// them is one that says yes, and all else is as always: decoding, judging,
// hashing, agreeing, storing, publishing.
func BenchmarkConsensus(b *testing.B) {
	for _, tc := range []benchCase{
		{nodes: 4, batch: 4, rate: 400, signed: true},
		{nodes: 4, batch: 64},
		{nodes: 4, batch: 256},
		{nodes: 7, batch: 256},
		{nodes: 4, batch: 64, signed: true},
		{nodes: 4, batch: 256, signed: true},
		{nodes: 7, batch: 256, signed: true},
	} {
		b.Run(tc.String(), func(b *testing.B) { tc.run(b) })
	}
}

type benchCase struct {
	nodes, batch, rate int // rate 0: saturated
	signed             bool
}

func (tc benchCase) String() string {
	load, check := "saturated", "unsigned"
	if tc.rate > 0 {
		load = fmt.Sprintf("rate=%d", tc.rate)
	}
	if tc.signed {
		check = "signed"
	}
	return fmt.Sprintf("nodes=%d/%s/%s/batch=%d", tc.nodes, load, check, tc.batch)
}

const (
	benchWarm = 400 * time.Millisecond
	benchRun  = 2500 * time.Millisecond // with the warming
	benchBare = time.Second             // with the warming, twice
)

func (tc benchCase) run(b *testing.B) {
	bare := tc.bare(b)
	own := tc.own(b)
	bare.add(tc.bare(b)) // before and after: a machine is not the same for long
	if tc.rate > 0 {
		b.ReportMetric(own.at(.5), "p50-ms")
		b.ReportMetric(own.at(.99), "p99-ms")
		b.ReportMetric(bare.at(.5), "bare-p50-ms")
		b.ReportMetric(bare.at(.99), "bare-p99-ms")
		b.ReportMetric(own.at(.5)/bare.at(.5), "p50-of-bare")
	} else {
		b.ReportMetric(own.rate(), "records/s")
		b.ReportMetric(bare.rate(), "bare-records/s")
		b.ReportMetric(own.rate()/bare.rate(), "of-bare")
		b.ReportMetric(own.cost(), "cpu-µs/record")
		b.ReportMetric(bare.cost(), "bare-cpu-µs/record")
		if tc.signed {
			b.ReportMetric(own.rate()/tc.checking(b), "of-checking")
		}
	}
	b.ReportMetric(0, "ns/op")
}

// meter sees batches go in and come out.
type meter struct {
	tc benchCase
	b  *testing.B

	mu      sync.Mutex
	sent    map[ledger.Hash]time.Time
	out     int // batches decided
	from    int // of them while it was warming
	begin   time.Time
	elapsed time.Duration // without the warming
	cpu     time.Duration // with it
	total   int           // batches, with those of warming
	lats    []time.Duration
	room    chan struct{} // a place for each batch that may be undecided
}

// benchAhead is how many records may be stored and not decided: enough that a
// validator's pool is full, no more than it may be behind.
const benchAhead = 3 * poolRecords

func newMeter(b *testing.B, tc benchCase) *meter {
	return &meter{tc: tc, b: b, sent: map[ledger.Hash]time.Time{}, room: make(chan struct{}, benchAhead/tc.batch)}
}

func (m *meter) decided(id ledger.Hash) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.sent[id]
	if !ok {
		return
	}
	delete(m.sent, id)
	m.out++
	if t.Sub(m.begin) > benchWarm {
		m.lats = append(m.lats, now.Sub(t))
	}
	<-m.room
}

// feed sends batches for so long, and waits until all are decided.
func (m *meter) feed(batches func(i int) []byte, d time.Duration, send func([]byte)) {
	m.begin = time.Now()
	cpu := cpuTime()
	warm := false
	var start time.Time
	for i := 0; time.Since(m.begin) < d; i++ {
		batch := batches(i)
		if batch == nil {
			m.b.Fatalf("there were batches for %v of %v: too few were made", time.Since(m.begin), d)
		}
		if m.tc.rate > 0 {
			time.Sleep(time.Until(m.begin.Add(time.Duration(i) * time.Second * time.Duration(m.tc.batch) / time.Duration(m.tc.rate))))
		}
		select {
		case m.room <- struct{}{}:
		case <-time.After(20 * time.Second):
			m.b.Fatal("nothing was decided for 20 s")
		}
		m.mu.Lock()
		if !warm && time.Since(m.begin) > benchWarm {
			warm, start, m.from = true, time.Now(), m.out
		}
		m.sent[ledger.RequestID(batch)] = time.Now()
		m.mu.Unlock()
		send(batch)
		m.total++
	}
	m.mu.Lock()
	m.elapsed, m.from = time.Since(start), m.out-m.from
	m.mu.Unlock()
	eventually(m.b, "all is decided", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.sent) == 0 })
	m.cpu = cpuTime() - cpu
	slices.Sort(m.lats)
}

// add makes one of two measurements.
func (m *meter) add(o *meter) {
	m.from, m.elapsed, m.cpu, m.total = m.from+o.from, m.elapsed+o.elapsed, m.cpu+o.cpu, m.total+o.total
	m.lats = append(m.lats, o.lats...)
	slices.Sort(m.lats)
}

// cost is the processors' time for a record, µs, at all validators together and
// with JetStream. Unlike the rate, it hardly depends on what else the machine does.
func (m *meter) cost() float64 {
	return float64(m.cpu.Microseconds()) / float64(m.total*m.tc.batch)
}

// rate is in records a second.
func (m *meter) rate() float64 { return float64(m.from*m.tc.batch) / m.elapsed.Seconds() }

func (m *meter) at(q float64) float64 {
	return float64(m.lats[int(q*float64(len(m.lats)-1))].Microseconds()) / 1000
}

func (tc benchCase) bare(b *testing.B) *meter {
	m := newMeter(b, tc)
	submit, stop := newBare(b, tc.nodes, func(id [32]byte) { m.decided(id) })
	// Nothing is read of them, so that a few do for any rate; each is sent once.
	pattern := benchBatches(tc.batch, 64, false)
	n := 0
	m.feed(func(i int) []byte {
		n++
		return append(fmt.Appendf(nil, "%08d", n), pattern[i%len(pattern)][8:]...)
	}, benchBare, submit)
	stop()
	return m
}

func (tc benchCase) own(b *testing.B) *meter {
	c := newCluster(b, tc.nodes)
	c.tune = func(cfg *Config) { cfg.SnapshotEvery = 0 } // the default
	c.prepare = func(_ uint64, v *Validator) {
		if !tc.signed {
			v.check = acceptAll
		}
	}
	// Made before the clock runs: more than can be decided.
	most := 25_000
	if tc.rate > 0 {
		most = tc.rate
	} else if !tc.signed {
		most = 80_000
	}
	batches := benchBatches(tc.batch, most*int(benchRun/time.Millisecond)/1000/tc.batch+benchAhead/tc.batch, tc.signed)
	c.start(c.all()...)
	m := newMeter(b, tc)
	first := c.nodes[0].v
	old := first.core.decided
	first.core.mu.Lock()
	first.core.decided = func(blk *pb.Block, o *outcome) {
		old(blk, o)
		for _, id := range o.ids {
			m.decided(id)
		}
	}
	first.core.mu.Unlock()
	used := 0
	var wg sync.WaitGroup
	m.feed(func(i int) []byte {
		if i >= len(batches) {
			return nil
		}
		used = i + 1
		return batches[i]
	}, benchRun, func(batch []byte) {
		// In order, acknowledged later: as validation stores its batches.
		f, err := c.bus.JS.PublishAsync(topic.Accepted(harbour), batch)
		if err != nil {
			b.Fatal(err)
		}
		wg.Go(func() {
			select {
			case <-f.Ok():
			case err := <-f.Err():
				b.Errorf("storing: %v", err)
			}
		})
	})
	wg.Wait()
	s := first.Stats()
	if got, want := s.Accepted, uint64(used*tc.batch); got != want {
		b.Errorf("accepted %d of %d records", got, want)
	}
	if s.View != 0 {
		b.Logf("the leader was replaced: view %d", s.View)
	}
	b.Logf("%d records in %d blocks", s.Accepted, s.Blocks)
	c.stop(c.all()...)
	return m
}

// checking is how many records a second this machine could check the signatures
// of, once for each validator, if it did nothing else.
func (tc benchCase) checking(b *testing.B) float64 {
	st, _, err := newState(genesis(b, tc.nodes, 8))
	if err != nil {
		b.Fatal(err)
	}
	batches := benchBatches(tc.batch, 16, true)
	var checked atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			v := newVerifier()
			var rs []*request
			for _, raw := range batches {
				r, err := parseRequest(raw)
				if err != nil {
					b.Error(err)
					return
				}
				rs = append(rs, r)
			}
			for i := 0; time.Since(begin) < 600*time.Millisecond; i++ {
				r := rs[i%len(rs)]
				v(st.registry, r.candidates)
				if !r.candidates[0].SignatureValid {
					b.Error("a signature is not valid")
					return
				}
				checked.Add(int64(tc.batch))
			}
		})
	}
	wg.Wait()
	return float64(checked.Load()) / time.Since(begin).Seconds() / float64(tc.nodes)
}

// acceptAll finds every signature of a registered signer good.
func acceptAll() verifier {
	return func(reg *identity.Registry, cs []validate.Candidate) {
		for i := range cs {
			_, ok := reg.Holder(cs[i].Envelope.Key)
			cs[i].SignatureValid = ok && len(cs[i].Envelope.Signature) > 0
		}
	}
}

var benchRecords struct {
	sync.Mutex
	made map[bool][]*pb.Record
	next map[bool][]*unit
}

// benchBatches makes n batches of frames of eight devices, each in its order.
// Records are kept for the next case, which begins with a new district.
func benchBatches(size, n int, sign bool) [][]byte {
	r := &benchRecords
	r.Lock()
	defer r.Unlock()
	if r.made == nil {
		r.made, r.next = map[bool][]*pb.Record{}, map[bool][]*unit{}
	}
	if r.next[sign] == nil {
		for i := range 8 {
			u := newUnit(i + 1)
			u.unsigned = !sign
			r.next[sign] = append(r.next[sign], u)
		}
	}
	now := time.Now()
	for k := len(r.made[sign]); k < size*n; k++ {
		r.made[sign] = append(r.made[sign], r.next[sign][k%8].frame(now))
	}
	out := make([][]byte, n)
	for i := range out {
		out[i] = batch(r.made[sign][i*size : (i+1)*size]...)
	}
	return out
}
