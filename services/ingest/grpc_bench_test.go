package ingest

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// BenchmarkGRPCStream sends frames of 24 readings of 256 devices to the receipt,
// and so to the disk, over TCP and gRPC, and the same number by bus.Sender over
// a connection in the process. It reports both rates, and their ratio, of one run.
func BenchmarkGRPCStream(b *testing.B) {
	const devices = 256
	// Signing is the sender's work; and so is it to have a message.
	frames := func(b *testing.B, run string) (raws [][]byte, names []string) {
		for i := range b.N {
			e := sign([]byte("x"))
			names = append(names, fmt.Sprint(run, i%devices))
			e.Payload = frame(names[i], uint64(i/devices+1), 24)
			raws = append(raws, e.Marshal())
		}
		return raws, names
	}
	for _, streams := range []int{1, 8} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			conn := servicetest.District(b, district)
			s := running(b, conn, nil)
			g := door(b, s, nil)
			bySender := sender(b, conn)

			raws, names := frames(b, "nats")
			b.SetBytes(int64(len(raws[0])))
			began := time.Now()
			var wg sync.WaitGroup
			room := make(chan struct{}, 4096)
			for i, raw := range raws {
				room <- struct{}{}
				wg.Add(1)
				if err := bySender.SendAsync(context.Background(), district, identity.KindFrame, names[i], raw, func(_ *pb.Receipt, err error) {
					if err != nil {
						b.Error(err)
					}
					<-room
					wg.Done()
				}); err != nil {
					b.Fatal(err)
				}
			}
			wg.Wait()
			direct := float64(b.N) / time.Since(began).Seconds()

			raws, _ = frames(b, "grpc")
			msgs := make([]*pb.SubmitRequest, b.N)
			for i, raw := range raws {
				msgs[i] = &pb.SubmitRequest{Id: uint64(i), Envelope: message(b, raw)}
			}
			c := client(b, g)
			b.ResetTimer()
			for k := range streams {
				st := submit(b, context.Background(), c)
				wg.Go(func() {
					for i := k; i < len(msgs); i += streams {
						if err := st.Send(msgs[i]); err != nil {
							b.Error(err)
							return
						}
					}
					if err := st.CloseSend(); err != nil {
						b.Error(err)
					}
				})
				wg.Go(func() {
					for i := k; i < len(msgs); i += streams {
						m, err := st.Recv()
						if err != nil || m.Receipt.Status != pb.Receipt_STATUS_STORED {
							b.Errorf("got %v, %v, want stored", m, err)
							return
						}
					}
				})
			}
			wg.Wait()
			rate := float64(b.N) / b.Elapsed().Seconds()
			b.ReportMetric(rate, "frames/s")
			b.ReportMetric(direct, "nats-frames/s")
			b.ReportMetric(rate/direct, "ratio")
		})
	}
}

// BenchmarkGRPCBesideLazyClients sends frames on one stream, while others send
// and never read. It reports what one of those costs, heap and all.
func BenchmarkGRPCBesideLazyClients(b *testing.B) {
	for _, lazy := range []int{0, 128} {
		b.Run(fmt.Sprintf("lazy=%d", lazy), func(b *testing.B) {
			conn := servicetest.District(b, district)
			s := running(b, conn, nil)
			g := door(b, s, func(c *GRPCConfig) { c.ReadWait = time.Hour })
			msgs := make([]*pb.SubmitRequest, b.N)
			for i := range msgs {
				e := sign([]byte("x"))
				e.Payload = frame(fmt.Sprint("dev", i%256), uint64(i/256+1), 24)
				msgs[i] = &pb.SubmitRequest{Id: uint64(i), Envelope: message(b, e.Marshal())}
			}
			heap := func() float64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				return float64(m.HeapInuse + m.StackInuse)
			}
			ctx, cancel := context.WithCancel(context.Background())
			var wg, lazies sync.WaitGroup
			var sent atomic.Int64
			var lazyMsgs [2048]*pb.Envelope // again and again
			for i := range lazyMsgs {
				e := sign([]byte("x"))
				e.Payload = frame("lazy", uint64(i+1), 24)
				lazyMsgs[i] = message(b, e.Marshal())
			}
			before := heap()
			for range lazy {
				st := submit(b, ctx, lazyClient(b, g))
				lazies.Go(func() {
					for i := 0; st.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: lazyMsgs[i%len(lazyMsgs)]}) == nil; i++ {
						sent.Add(1)
					}
				})
			}
			for last := int64(-1); last != sent.Load(); time.Sleep(300 * time.Millisecond) {
				last = sent.Load()
			}
			cost := (heap() - before) / 1024
			st := submit(b, ctx, client(b, g))
			b.ResetTimer()
			wg.Go(func() {
				for _, m := range msgs {
					if err := st.Send(m); err != nil {
						b.Error(err)
						return
					}
				}
			})
			for range msgs {
				if m, err := st.Recv(); err != nil || m.Receipt.Status != pb.Receipt_STATUS_STORED {
					b.Fatalf("got %v, %v, want stored", m, err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
			if lazy > 0 {
				b.ReportMetric(cost/float64(lazy), "KiB/lazy") // the client's half included
			}
			wg.Wait()
			cancel()
			lazies.Wait()
		})
	}
}
