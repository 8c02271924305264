package client_test

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"log"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/stopline-traffic/stopline/api/client"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// demo stands for a gateway; `stopline demo` runs a real one.
type demo struct {
	pb.UnimplementedTrafficServiceServer
}

func (demo) GetJunctionState(_ context.Context, r *pb.GetJunctionStateRequest) (*pb.GetJunctionStateResponse, error) {
	return &pb.GetJunctionStateResponse{State: &pb.JunctionState{Junction: r.Junction, StageName: "north-south", State: "GGrr"}}, nil
}

func (demo) WatchJunctionStates(_ *pb.WatchJunctionStatesRequest, s grpc.ServerStreamingServer[pb.WatchJunctionStatesResponse]) error {
	for _, state := range []string{"GGrr", "yyrr", "rrGG"} {
		if err := s.Send(&pb.WatchJunctionStatesResponse{States: []*pb.JunctionState{{Junction: "h0101", State: state}}}); err != nil {
			return err
		}
	}
	return nil
}

func gateway() (address string, key ed25519.PrivateKey, stop func()) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterTrafficServiceServer(s, demo{})
	go func() { _ = s.Serve(l) }() // ends with Stop
	return l.Addr().String(), ed25519.NewKeyFromSeed(make([]byte, 32)), s.Stop
}

// Ask for the state of a junction, with a token that the client signs itself.
func Example() {
	address, key, stop := gateway() // key: client.KeyFile("operator-1.key")
	defer stop()
	c, err := client.New(client.Options{
		Address:  address,
		Insecure: true, // a demo on this machine; else Pins or RootCAs
		Tokens:   client.SelfSigned("harbour", "operator-1", key),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r, err := c.Traffic.GetJunctionState(ctx, &pb.GetJunctionStateRequest{Junction: "h0101"}, client.Purpose("operations"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(r.State.Junction, r.State.StageName, r.State.State)
	// Output: h0101 north-south GGrr
}

// Watch states; the stream is opened again when the connection is lost.
func ExampleClient_WatchJunctionStates() {
	address, key, stop := gateway()
	defer stop()
	c, err := client.New(client.Options{Address: address, Insecure: true, Tokens: client.SelfSigned("harbour", "operator-1", key)})
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	err = c.WatchJunctionStates(context.Background(), &pb.WatchJunctionStatesRequest{Junctions: []string{"h0101"}}, func(m *pb.WatchJunctionStatesResponse) error {
		fmt.Println(m.States[0].State)
		return nil
	}, client.Purpose("operations"))
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// GGrr
	// yyrr
	// rrGG
}
