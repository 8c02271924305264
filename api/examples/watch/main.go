// Command watch shows junctions as they change, and says for each answer whether
// its reading is on record.
//
//	stopline demo --api 127.0.0.1:8443 --data demo &
//	go run ./examples/watch -address 127.0.0.1:8443 -insecure -district harbour \
//	    -client operator-1 -key demo/keys/client-operator-1.key
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stopline-traffic/stopline/api/client"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "watch:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	address := flag.String("address", "127.0.0.1:8443", "host:port of the gateway")
	insecure := flag.Bool("insecure", false, "without TLS: a demo on this machine")
	pin := flag.String("pin", "", "SHA-256 of the gateway's public key, hex")
	district := flag.String("district", "harbour", "district of the gateway")
	name := flag.String("client", "operator-1", "the client's id in the registry")
	keyFile := flag.String("key", "", "file with the client's key")
	purpose := flag.String("purpose", "operations", "what for")
	flag.Parse()
	if *keyFile == "" {
		return errors.New("-key must be given")
	}
	key, err := client.KeyFile(*keyFile)
	if err != nil {
		return err
	}
	o := client.Options{Address: *address, Insecure: *insecure, Tokens: client.SelfSigned(*district, *name, key),
		OnReceipt: func(method string, r *pb.AccessReceipt) {
			fmt.Printf("on record as %x: %s\n", r.Commitment, method)
		}}
	if *pin != "" {
		o.Pins = []string{*pin}
	}
	c, err := client.New(o)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	err = c.WatchJunctionStates(ctx, &pb.WatchJunctionStatesRequest{Junctions: flag.Args()}, func(m *pb.WatchJunctionStatesResponse) error {
		for _, s := range m.States {
			fmt.Printf("%d\t%s\t%s\t%s\t%d vehicles, %d standing\n", m.Height, s.Junction, s.State, s.StageName, s.Vehicles, s.Halted)
		}
		return nil
	}, client.Purpose(*purpose))
	if status.Code(err) == codes.PermissionDenied {
		return fmt.Errorf("the district's policy says no: %s", status.Convert(err).Message())
	}
	return err
}
