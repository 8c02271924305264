package ingest

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The gateway's records come with the salt that its receipts were made with, and
// keep it; nobody else may choose one.
func TestSaltsOfSenders(t *testing.T) {
	t.Parallel()
	b := servicetest.District(t, district)
	running(t, b, nil)
	salt := bytes.Repeat([]byte{9}, 32)
	reading := func(seq uint64) []byte {
		return identity.Sign(deviceKey, identity.KindAccess, identity.Protobuf, wire.EncodeAccess(&traffic.Access{District: district,
			Turn: traffic.Turn{Epoch: 1, Seq: seq}, Time: received, Method: "/x/Y", Phase: traffic.AccessUnary, Count: 1})).Marshal()
	}
	send := func(kind string, body []byte, salt string) *pb.Receipt {
		return requestMsg(t, b, &nats.Msg{Subject: topic.Inbox(district, kind, "gateway"), Data: body, Header: nats.Header{bus.HeaderSalt: {salt}}})
	}
	first := reading(1)
	r := send("access", first, hex.EncodeToString(salt))
	checkStored(t, b, first, r)
	if want := ledger.Commit(ledger.Salt(salt), first); !bytes.Equal(r.Salt, salt) || ledger.Hash(r.Commitment) != want {
		t.Errorf("got salt %x and commitment %x, want the sender's own %x and %x", r.Salt, r.Commitment, salt, want)
	}
	// The same again is the same, whatever salt it comes with now.
	if again := send("access", first, strings.Repeat("ab", 32)); !bytes.Equal(again.Commitment, r.Commitment) {
		t.Errorf("sent again: got %x, want the first commitment %x", again.Commitment, r.Commitment)
	}
	// Without one, ingest draws it.
	if drawn := send("access", reading(2), ""); drawn.Status != pb.Receipt_STATUS_STORED || bytes.Equal(drawn.Salt, salt) || len(drawn.Salt) != 32 {
		t.Errorf("without a salt: got %v, want one drawn", drawn)
	}
	for name, c := range map[string]struct {
		kind, salt, text string
		body             []byte
	}{
		"a frame":    {"frame", hex.EncodeToString(salt), "a frame may not bring its own", envelope(1)},
		"a command":  {"command", hex.EncodeToString(salt), "a command may not bring its own", identity.Sign(deviceKey, identity.KindCommand, identity.Protobuf, []byte{8, 1}).Marshal()},
		"registry":   {"registry", hex.EncodeToString(salt), "a registry may not bring its own", identity.Sign(deviceKey, identity.KindRegistry, identity.JSON, []byte("{}")).Marshal()},
		"short":      {"access", "abcd", "64 hex digits", reading(3)},
		"long":       {"access", strings.Repeat("ab", 33), "64 hex digits", reading(3)},
		"no hex":     {"access", strings.Repeat("zz", 32), "64 hex digits", reading(3)},
		"wrong kind": {"frame", hex.EncodeToString(salt), "the envelope says access", reading(3)},
	} {
		if r := send(c.kind, c.body, c.salt); r.Status != pb.Receipt_STATUS_REFUSED || !strings.Contains(r.Reason, c.text) {
			t.Errorf("%s: got %v, want refused with %q", name, r, c.text)
		}
	}
}
