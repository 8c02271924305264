package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
)

// A gateway brings frames of a device to a demo; they are agreed like any other.
func TestDemoTakesFramesByGRPC(t *testing.T) {
	processTest(t)
	d := startDemo(t, t.TempDir(), "--grpc", "127.0.0.1:0")
	m := regexp.MustCompile(`  grpc (127\.0\.0\.1:[0-9]+)  `).FindStringSubmatch(d.err.String())
	if m == nil {
		t.Fatalf("no address for gRPC in %q", d.err)
	}
	conn, err := grpc.NewClient(m[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := pb.NewIngestServiceClient(conn).Submit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	devices := []*device{d.enrol("h0101", "one"), d.enrol("h0102", "two")}
	var receipts []receipt
	for i := range 10 {
		e, err := identity.ParseEnvelope(devices[i%2].next())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&pb.SubmitRequest{Id: uint64(i), Envelope: &pb.Envelope{
			Kind: string(e.Kind), ContentType: e.ContentType, KeyId: string(e.Key), Payload: e.Payload, Signature: e.Signature,
		}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		r, err := stream.Recv()
		if err != nil || r.Id != uint64(i) || r.Receipt.Status != pb.Receipt_STATUS_STORED {
			t.Fatalf("got %v, %v, want %d stored", r, err, i)
		}
		receipts = append(receipts, receipt{Commitment: r.Receipt.Commitment, Salt: r.Receipt.Salt})
	}
	// And many at once by HTTP, of which one is refused.
	var lines []byte
	for _, x := range devices {
		var m pb.Envelope
		if err := proto.Unmarshal(x.next(), &m); err != nil {
			t.Fatal(err)
		}
		b, err := protojson.Marshal(&m)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(append(lines, b...), "\n{}\n"...)
	}
	res, err := httpClient.Post(d.url+"/v1/batch", "application/x-ndjson", bytes.NewReader(lines))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err := errors.Join(err, res.Body.Close()); err != nil {
		t.Fatal(err)
	}
	for i, line := range bytes.Split(bytes.TrimSpace(body), []byte("\n")) {
		var r struct {
			receipt
			Status string
		}
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%s %q: %v", res.Status, line, err)
		}
		if want := []string{"STATUS_STORED", "STATUS_REFUSED"}[i%2]; r.Status != want {
			t.Errorf("line %d: got %s, want %s", i, line, want)
		}
		if i%2 == 0 {
			receipts = append(receipts, r.receipt)
		}
	}
	if len(receipts) != 12 {
		t.Errorf("got %d receipts, want 12", len(receipts))
	}
	d.sealed(receipts...)
	// With the stream open: the end must not wait for it.
	if r := d.stop(); r.Frames.Quarantined != 0 {
		t.Errorf("got %+v, want none quarantined", r.Frames)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want unavailable", err)
	}
}

func TestGRPCOptions(t *testing.T) {
	r := inside(t, "demo", "--grpc-cert", "x")
	wantExit(t, r, exitUsage, "--grpc-cert, --grpc-key, --grpc-client-ca: must not be given without --grpc")
	if strings.Contains(r.out, "Stopline runs") {
		t.Error("it runs")
	}
}
