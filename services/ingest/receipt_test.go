package ingest

import (
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// An answer that cannot be encoded would leave its sender asking for ever.
func TestReceiptCanAlwaysBeSent(t *testing.T) {
	a := answer{status: pb.Receipt_STATUS_REFUSED, text: "kind: \xff"}
	if _, err := proto.Marshal(&pb.Receipt{Reason: a.text}); err == nil {
		t.Fatal("protobuf takes bytes that are no text: this test shows nothing")
	}
	b, err := proto.Marshal(a.receipt())
	if err != nil {
		t.Fatalf("got %v, want a receipt that can be sent", err)
	}
	var r pb.Receipt
	if err := proto.Unmarshal(b, &r); err != nil || r.Reason != "kind: \uFFFD" {
		t.Errorf("got %q, %v, want the bytes replaced", r.Reason, err)
	}
}
