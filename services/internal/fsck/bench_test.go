//go:build unix

package fsck_test

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/services/internal/fsck"
)

// store writes a data folder as a district makes it that takes 2,000 records a
// second: ten blocks a second, each with its checkpoint. Frames are signed once
// and come again with other salts, which nobody here minds.
func store(tb testing.TB, leaves int) string {
	tb.Helper()
	const records = 200
	d := ledgertest.New("bench", 4)
	c := d.NewChain()
	frames := make([]ledgertest.Record, 2000)
	for i := range frames {
		frames[i] = d.Frame(uint64(i+1), ledgertest.Start)
	}
	dir := tb.TempDir()
	put := func(name string, b []byte) {
		at := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(at, b, 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	journal := func(dir string) (add func(recs ...[]byte), end func()) {
		var b []byte
		var next, first uint64
		end = func() {
			put(dir+"/"+segment.Name(first), b)
			b, first = segment.AppendHeader(nil, next), next
		}
		b = segment.AppendHeader(nil, 0)
		return func(recs ...[]byte) {
			b = segment.AppendFrames(b, next, recs...)
			if next += uint64(len(recs)); len(b) > 16<<20 {
				end()
			}
		}, end
	}
	blocks, endBlocks := journal("log/blocks")
	history, endHistory := journal("log/checkpoints")
	payloads, endPayloads := journal("payload/readings")
	var t ledger.Tiler
	var note []byte
	for k := 0; int(t.Size()) < leaves; k++ {
		rs := make([]ledgertest.Record, records)
		for i := range rs {
			rs[i] = frames[(k*records+i)%len(frames)]
			rs[i].Salt[0], rs[i].Salt[1] = byte(k), byte(k>>8)
		}
		b := c.Decide(rs)
		var ps [][]byte
		for _, p := range b.Payloads() {
			ps = append(ps, p.Marshal())
		}
		payloads(ps...)
		blocks(b.Decided().Marshal())
		t.Append(b.Leaves)
		for _, f := range t.Full() {
			put("log/"+f.Path(), f.Data)
		}
		note = c.Seal(b)
		at := ledger.SealedAt{Height: b.Header.Height, Note: note}
		history(at.Marshal())
		if k > 0 {
			*c.Blocks[k-1] = ledgertest.Block{Block: ledger.Block{Header: c.Blocks[k-1].Header}} // memory
		}
	}
	for _, f := range t.Partial() {
		put("log/"+f.Path(), f.Data)
	}
	endBlocks()
	endHistory()
	endPayloads()
	put("log/checkpoint", note)
	put("genesis.json", c.GenesisJSON)
	put("policy", c.Policy)
	return dir
}

// bare is how many signatures a second identity's verifier checks on all cores,
// with nothing beside, in batches as fsck's.
func bare(n int) float64 {
	d := ledgertest.New("bench", 4)
	var msgs, sigs [][]byte
	for i := range 1024 {
		e, err := identity.ParseEnvelope(d.Frame(uint64(i+1), ledgertest.Start).Envelope)
		if err != nil {
			panic(err)
		}
		msgs, sigs = append(msgs, identity.SigningInput(e.Kind, e.ContentType, e.Payload)), append(sigs, e.Signature)
	}
	key := d.DeviceKey.Public().(ed25519.PublicKey)
	workers := runtime.GOMAXPROCS(0)
	begin := time.Now()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			v := identity.NewVerifier()
			for done := 0; done < n/workers; done += len(msgs) {
				for i := range msgs {
					v.Add(key, msgs[i], sigs[i])
				}
				for _, ok := range v.Flush() {
					if !ok {
						panic("a signature is wrong")
					}
				}
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(begin).Seconds()
}

// BenchmarkFsck checks a store on disk, with and without the devices' signatures,
// beside the bare verifier, in turns in one run.
func BenchmarkFsck(b *testing.B) {
	const leaves = 200_000
	dir := store(b, leaves)
	var used time.Duration // of all cores, which says more on a machine that is shared
	check := func(o ledger.FsckOptions) float64 {
		begin, cpu := time.Now(), cpuTime(b)
		defer func() { used = cpuTime(b) - cpu }()
		r, err := fsck.Run(b.Context(), os.DirFS(dir), o, 0)
		if err != nil || !r.OK {
			b.Fatal(err, r.Text())
		}
		return float64(r.Leaves) / time.Since(begin).Seconds()
	}
	var plain, signed, limit float64
	var plainCPU time.Duration
	for b.Loop() {
		plain += check(ledger.FsckOptions{})
		plainCPU += used
		limit += bare(leaves / 4)
		signed += check(ledger.FsckOptions{Signatures: true})
		limit += bare(leaves / 4)
	}
	n := float64(b.N)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(plain/n, "leaves/s")
	b.ReportMetric(float64(plainCPU.Nanoseconds())/n/leaves, "cpu-ns/leaf")
	b.ReportMetric(signed/n, "signed-leaves/s")
	b.ReportMetric(limit/2/n, "bare-signatures/s")
	b.ReportMetric(signed/(limit/2), "of-bare")
	if os.Getenv("STOPLINE_REQUIRE_TIMES") == "1" {
		if plain/n < 300_000 {
			b.Errorf("got %.0f leaves/s, want 300,000", plain/n)
		}
		if signed/(limit/2) < 0.5 {
			b.Errorf("got %.2f of the bare verifier's signatures/s, want 0.5", signed/(limit/2))
		}
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkFsckMemory: the heap does not grow with the log.
func BenchmarkFsckMemory(b *testing.B) {
	for _, leaves := range []int{50_000, 400_000} {
		b.Run(fmt.Sprintf("leaves=%d", leaves), func(b *testing.B) {
			dir := store(b, leaves)
			for b.Loop() {
				debug.FreeOSMemory()
				peak := uint64(0)
				r, err := fsck.Run(b.Context(), os.DirFS(dir), ledger.FsckOptions{Progress: func(ledger.FsckProgress) {
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapInuse)
				}}, 0)
				if err != nil || !r.OK {
					b.Fatal(err, r.Text())
				}
				b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
			}
		})
	}
}
