package ingest

import (
	"crypto/ed25519"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

func init() { revokedEvery = 20 * time.Millisecond }

// The stream of a device ends when its key is revoked; that of a gateway with
// another device goes on.
func TestGRPCEndsTheStreamOfARevokedKey(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	var revoked atomic.Pointer[identity.KeyID]
	g := door(t, running(t, b, nil), func(c *GRPCConfig) {
		c.Revoked = func(k identity.KeyID) bool { r := revoked.Load(); return r != nil && *r == k }
	})
	seed := make([]byte, 32)
	seed[0] = 7
	other := ed25519.NewKeyFromSeed(seed)
	one, two := envelope(1), identity.Sign(other, identity.KindFrame, identity.JSON, []byte("{}")).Marshal()
	own, shared, silent := submit(t, within(t), client(t, g)), submit(t, within(t), client(t, g)), submit(t, within(t), client(t, g))
	for i, s := range []pb.IngestService_SubmitClient{own, shared} {
		if err := s.Send(&pb.SubmitRequest{Id: 1, Envelope: message(t, one)}); err != nil {
			t.Fatal(err)
		}
		if r := receipts(t, s, 1, 1)[0]; r.Status != pb.Receipt_STATUS_STORED {
			t.Fatalf("stream %d: got %v, want stored", i, r)
		}
	}
	if err := shared.Send(&pb.SubmitRequest{Id: 2, Envelope: message(t, two)}); err != nil {
		t.Fatal(err)
	}
	receipts(t, shared, 2, 1)
	e, err := identity.ParseEnvelope(one)
	if err != nil {
		t.Fatal(err)
	}
	revoked.Store(&e.Key)
	if _, err := own.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the revoked device's stream: got %v, want it ended with PERMISSION_DENIED", err)
	}
	for _, s := range []pb.IngestService_SubmitClient{shared, silent} {
		if err := s.Send(&pb.SubmitRequest{Id: 3, Envelope: message(t, two)}); err != nil {
			t.Fatal(err)
		}
		if r := receipts(t, s, 3, 1)[0]; r.Status != pb.Receipt_STATUS_STORED {
			t.Errorf("a stream with another device: got %v, want it to go on", r)
		}
	}
}
