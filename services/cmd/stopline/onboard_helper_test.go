package main

import (
	"context"
	"regexp"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// grpcStream opens a stream of records to a demo that takes them.
func (d *demoRun) grpcStream(ctx context.Context) pb.IngestService_SubmitClient {
	d.t.Helper()
	m := regexp.MustCompile(`  grpc (127\.0\.0\.1:[0-9]+)  `).FindStringSubmatch(d.err.String())
	if m == nil {
		d.t.Fatalf("no address for gRPC in %q", d.err)
	}
	conn, err := grpc.NewClient(m[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() }) // the demo may be gone already
	s, err := pb.NewIngestServiceClient(conn).Submit(ctx)
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}
