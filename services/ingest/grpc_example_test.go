package ingest_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/ingest"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A gateway speaks for many devices on one stream. It keeps each record until it
// has its receipt: what has none when a stream ends goes again, first and in
// order, on the next.
type gateway struct {
	client pb.IngestServiceClient
	room   chan struct{} // bounds kept

	mu   sync.Mutex
	kept []*pb.SubmitRequest // without a receipt, oldest first
}

// send sends what is kept and then what comes, until there is no more and all of
// it has its receipt. It returns how many were stored and refused.
func (g *gateway) send(ctx context.Context, records <-chan *pb.SubmitRequest) (stored, refused int, err error) {
	ctx, cancel := context.WithCancel(ctx) // so that nothing is left of the stream
	defer cancel()
	stream, err := g.client.Submit(ctx)
	if err != nil {
		return 0, 0, err
	}
	// Reading must not wait for sending: Send waits while the district has no room.
	var sender sync.WaitGroup
	sender.Go(func() { g.feed(ctx, stream, records) })
	defer sender.Wait()
	defer cancel()
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stored, refused, nil
		}
		if err != nil {
			return stored, refused, err // try again in a while
		}
		g.mu.Lock()
		oldest := g.kept[0] // receipts come in the order of the records
		g.kept = g.kept[1:]
		g.mu.Unlock()
		<-g.room
		if oldest.Id != m.Id {
			return stored, refused, fmt.Errorf("receipt of %d, want of %d", m.Id, oldest.Id)
		}
		if m.Receipt.Status == pb.Receipt_STATUS_STORED {
			stored++
		} else {
			refused++
			fmt.Println("refused:", m.Receipt.Reason)
		}
	}
}

// feed is the sending half. Where it fails, reading says why.
func (g *gateway) feed(ctx context.Context, stream pb.IngestService_SubmitClient, records <-chan *pb.SubmitRequest) {
	g.mu.Lock()
	again := slices.Clone(g.kept)
	g.mu.Unlock()
	for _, r := range again {
		if stream.Send(r) != nil {
			return
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case g.room <- struct{}{}:
		}
		var r *pb.SubmitRequest
		select {
		case <-ctx.Done():
		case r = <-records: // nil when there are no more
		}
		if r == nil {
			<-g.room
			_ = stream.CloseSend()
			return
		}
		g.mu.Lock()
		g.kept = append(g.kept, r)
		g.mu.Unlock()
		if stream.Send(r) != nil {
			return
		}
	}
}

func ExampleGRPC() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	addr, stop, err := exampleDistrict(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stop()

	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = conn.Close() }()
	g := &gateway{client: pb.NewIngestServiceClient(conn), room: make(chan struct{}, 100)}

	records := make(chan *pb.SubmitRequest)
	go func() {
		defer close(records)
		// What devices sign is passed on as it is. Here the keys are at hand.
		_, key, err := ed25519.GenerateKey(nil)
		if err != nil {
			return
		}
		for seq := uint64(1); seq <= 10; seq++ {
			for device := range uint64(3) {
				e := identity.Sign(key, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&traffic.Frame{
					District: "example", Junction: "j1", FrameKey: traffic.FrameKey{Device: traffic.DeviceID(fmt.Sprint("d", device)), BootEpoch: 1, Seq: seq}, Time: time.Now(),
				}))
				records <- &pb.SubmitRequest{Id: seq*3 + device, Envelope: &pb.Envelope{
					Kind: string(e.Kind), ContentType: e.ContentType, KeyId: string(e.Key), Payload: e.Payload, Signature: e.Signature,
				}}
			}
		}
		records <- &pb.SubmitRequest{Id: 99, Envelope: &pb.Envelope{Kind: "frame", ContentType: identity.Protobuf, Payload: []byte("not signed")}}
	}()
	stored, refused, err := g.send(ctx, records)
	fmt.Println(stored, "stored,", refused, "refused,", len(g.kept), "kept,", err)
	// Output:
	// refused: key_id: "", must be 32 lower-case hex digits
	// 30 stored, 1 refused, 0 kept, <nil>
}

// exampleDistrict runs what a gateway talks to; `stopline demo --grpc ADDR` runs
// it with everything behind it.
func exampleDistrict(ctx context.Context) (addr string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		return "", nil, err
	}
	stops := []func(){func() { _ = os.RemoveAll(dir) }}
	stop = func() {
		for i := len(stops) - 1; i >= 0; i-- {
			stops[i]()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	server, err := bus.StartServer(bus.ServerOptions{Dir: dir})
	if err != nil {
		return "", nil, err
	}
	stops = append(stops, server.Shutdown)
	b, err := server.Connect("example")
	if err != nil {
		return "", nil, err
	}
	stops = append(stops, b.Close)
	if err := b.Declare(ctx, topic.Streams("example")); err != nil {
		return "", nil, err
	}
	s, err := ingest.New(ingest.Config{District: "example", Bus: b})
	if err != nil {
		return "", nil, err
	}
	g, err := ingest.NewGRPC(ingest.GRPCConfig{Ingest: s, Listen: "127.0.0.1:0"})
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 2)
	go func() { done <- s.Run(ctx) }()
	go func() { done <- g.Run(ctx) }()
	stops = append(stops, func() {
		cancel()
		for range cap(done) {
			if err := <-done; err != nil {
				fmt.Println(err)
			}
		}
	})
	return g.Addr().String(), stop, nil
}
