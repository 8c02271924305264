package ingest

import (
	"context"
	"fmt"
	"sync"
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
