package sealing

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

const benchBlocks, benchRecords = 80, 256

// sealAll journals and seals blocks, one checkpoint for each few, and returns how
// many entries a second that was. Cosignatures are there already: who makes them
// does so on machines of their own.
func sealAll(b *testing.B, c *ledgertest.Chain, bs []*decided.Block, each int) float64 {
	b.Helper()
	notes := make([][]byte, len(c.Blocks))
	for i := each - 1; i < len(bs); i += each {
		notes[i] = c.Seal(c.Blocks[i])
	}
	s := openStore(b, StoreOptions{Dir: b.TempDir(), GenesisJSON: c.GenesisJSON, Policy: c.Policy})
	began := time.Now()
	for i := 0; i < len(bs); i += each {
		last := min(i+each, len(bs))
		if err := s.Append(bs[i:last]...); err != nil {
			b.Fatal(err)
		}
		p, ok := s.Snapshot()
		if !ok {
			b.Fatal("nothing to seal")
		}
		if err := s.WriteTiles(p); err != nil {
			b.Fatal(err)
		}
		if err := s.Seal(p, notes[last-1]); err != nil {
			b.Fatal(err)
		}
	}
	took := time.Since(began)
	if got := s.State().SealedSize; got != c.Blocks[len(bs)-1].Header.Size {
		b.Fatalf("got %d sealed, want all", got)
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	return float64(len(bs)*benchRecords) / took.Seconds()
}

// BenchmarkSeal seals blocks of 256 records: payloads, journal, tiles, history,
// checkpoint, with their syncs. blocks is how many there are for one checkpoint.
func BenchmarkSeal(b *testing.B) {
	c := wide(ledgertest.New("bench", 4), benchBlocks, benchRecords)
	bs := blocks(b, c)
	for _, each := range []int{1, 8} {
		b.Run(fmt.Sprintf("blocks=%d", each), func(b *testing.B) {
			var best []float64
			for b.Loop() {
				best = append(best, sealAll(b, c, bs, each))
			}
			slices.Sort(best)
			b.ReportMetric(best[len(best)/2], "entries/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// tesseraAll adds as many entries of the size of a leaf to a log of Tessera on
// POSIX files, and waits until a checkpoint covers them.
func tesseraAll(b *testing.B, n int) float64 {
	b.Helper()
	skey, _, err := note.GenerateKey(nil, "log.example/tessera")
	if err != nil {
		b.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	driver, err := posix.New(ctx, posix.Config{Path: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	a, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().WithCheckpointSigner(signer).
		WithBatching(8*benchRecords, 100*time.Millisecond).WithPushback(uint(4*n)).WithCheckpointInterval(100*time.Millisecond))
	if err != nil {
		b.Fatal(err)
	}
	await := tessera.NewPublicationAwaiter(ctx, reader.ReadCheckpoint, 5*time.Millisecond)
	began := time.Now()
	futures := make([]tessera.IndexFuture, n)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := g; i < n; i += 4 {
				leaf := make([]byte, ledger.LeafSize)
				binary.BigEndian.PutUint64(leaf[2:], uint64(i))
				futures[i] = a.Add(ctx, tessera.NewEntry(leaf))
			}
		})
	}
	wg.Wait()
	for _, f := range futures {
		if _, err := f(); err != nil {
			b.Fatal(err)
		}
	}
	var last uint64
	at := futures[0]
	for _, f := range futures {
		if i, _ := f(); i.Index > last {
			last, at = i.Index, f
		}
	}
	if _, _, err := await.Await(ctx, at); err != nil {
		b.Fatal(err)
	}
	took := time.Since(began)
	if err := shutdown(ctx); err != nil {
		b.Fatal(err)
	}
	return float64(n) / took.Seconds()
}

// BenchmarkSealBesideTessera does the same work with Tessera's POSIX log in turn:
// entries, tiles, checkpoint. Ours keeps payloads and a journal besides.
func BenchmarkSealBesideTessera(b *testing.B) {
	c := wide(ledgertest.New("bench", 4), benchBlocks, benchRecords)
	bs := blocks(b, c)
	var ours, theirs []float64
	for b.Loop() {
		ours, theirs = append(ours, sealAll(b, c, bs, 8)), append(theirs, tesseraAll(b, benchBlocks*benchRecords))
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	o, t := ours[len(ours)/2], theirs[len(theirs)/2]
	b.ReportMetric(o, "ours-entries/s")
	b.ReportMetric(t, "tessera-entries/s")
	b.ReportMetric(o/t, "ours/tessera")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkSealedLatency publishes decided blocks at 2,000 entries a second and
// measures, for each, until the announcement of the checkpoint that seals it: by
// how many blocks come in a second, and by the least time between checkpoints,
// which a block that has just missed one waits for.
func BenchmarkSealedLatency(b *testing.B) {
	for _, tc := range []struct {
		rate     int
		interval time.Duration
	}{{8, 100 * time.Millisecond}, {20, 100 * time.Millisecond}, {50, 100 * time.Millisecond}, {50, 70 * time.Millisecond}} {
		rate := tc.rate
		b.Run(fmt.Sprintf("blocks=%d/interval=%v", rate, tc.interval), func(b *testing.B) {
			records, n := 2000/rate, 5*rate
			d := ledgertest.New(fmt.Sprint("latency ", rate), 4)
			c := wide(d, n, records)
			var raw [][]byte
			for _, blk := range c.Blocks {
				raw = append(raw, wire.EncodeBlock(wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts)))
			}
			var waits []time.Duration
			for b.Loop() {
				waits = append(waits, latency(b, d, c, raw, time.Second/time.Duration(rate), tc.interval)...)
			}
			slices.Sort(waits)
			ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
			b.ReportMetric(ms(waits[len(waits)/2]), "p50-ms")
			b.ReportMetric(ms(waits[len(waits)*99/100]), "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func latency(b *testing.B, d *ledgertest.District, c *ledgertest.Chain, raw [][]byte, every, interval time.Duration) []time.Duration {
	bu := servicetest.District(b, d.ID)
	for i := range 4 {
		serveCosign(b, bu, c, i, "")
	}
	published := make([]time.Time, len(raw))
	var mu sync.Mutex
	var waits []time.Duration
	done := make(chan struct{})
	stop, err := bu.Listen(topic.Seal(d.ID), "", func(m *nats.Msg) {
		now := time.Now()
		var s pb.Seal
		if proto.Unmarshal(m.Data, &s) != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for len(waits) < int(s.Height) {
			waits = append(waits, now.Sub(published[len(waits)]))
			if len(waits) == len(raw) {
				close(done)
			}
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	_, end := start(b, Config{Bus: bu, Dir: b.TempDir(), GenesisJSON: d.GenesisJSON, Policy: d.Policy, LogKey: d.LogKey, Interval: interval})
	defer end()
	next := time.Now()
	for i, r := range raw {
		time.Sleep(time.Until(next))
		next = next.Add(every)
		mu.Lock()
		published[i] = time.Now()
		mu.Unlock()
		if err := bu.Publish(b.Context(), topic.Decision(d.ID, 1), "", r); err != nil {
			b.Fatal(err)
		}
	}
	select {
	case <-done:
	case <-time.After(time.Minute):
		b.Fatal("not all is sealed")
	}
	return waits
}

// BenchmarkProof proves one of 10,000,000 entries from files.
func BenchmarkProof(b *testing.B) {
	const n, samples = 10_000_000, 400
	rng := rand.New(rand.NewPCG(1, 2))
	want := map[uint64]bool{}
	var at []uint64
	for range samples {
		i := rng.Uint64N(n)
		at, want[i/ledger.TileWidth] = append(at, i), true
	}
	// All hashes above the lowest tiles, and of those the ones that are asked for.
	root := b.TempDir()
	write := func(f ledger.TileFile) {
		if f.Level <= 0 && f.Width == ledger.TileWidth && !want[f.N] {
			return
		}
		path := filepath.Join(root, filepath.FromSlash(f.Path()))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(path, f.Data, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	leafAt := func(i uint64) (l ledger.Leaf) {
		l.Class = ledger.ClassRecord
		binary.BigEndian.PutUint64(l.Commitment[:], i)
		return l
	}
	var t ledger.Tiler
	leaves := make([]ledger.Leaf, 0, 1<<16)
	for i := uint64(0); i < n; i++ {
		if leaves = append(leaves, leafAt(i)); len(leaves) == cap(leaves) || i == n-1 {
			t.Append(leaves)
			for _, f := range t.Full() {
				write(f)
			}
			leaves = leaves[:0]
		}
	}
	for _, f := range t.Partial() {
		write(f)
	}
	cp := ledger.Checkpoint{Origin: "log.example", Size: n, Root: t.Root()}
	r := ledger.TileReaderFunc(func(id ledger.TileID) ([]byte, error) {
		return os.ReadFile(filepath.Join(root, filepath.FromSlash(id.Path())))
	})
	var took []time.Duration
	k := 0
	for b.Loop() {
		i := at[k%samples]
		k++
		began := time.Now()
		l, err := ledger.ReadLeaf(r, n, i)
		if err != nil {
			b.Fatal(err)
		}
		p, err := ledger.Prove(r, n, i)
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		if err := ledger.CheckInclusion(cp, i, l, p); err != nil || l != leafAt(i) {
			b.Fatalf("entry %d: %v", i, err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100])/float64(time.Millisecond), "p99-ms")
}
