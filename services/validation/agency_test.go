package validation

import (
	"crypto/ed25519"
	"encoding/json"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A number that an agency's records leave out is counted, as that of a frame is,
// and what comes after it goes on.
func TestGapInAgencyRecords(t *testing.T) {
	b := servicetest.District(t, district)
	r := newRegistry(t, 1)
	body, err := json.Marshal(identity.Service{Key: pub("gateway"), Signs: []identity.RecordKind{identity.KindAccess}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(2, identity.IDOf(ed25519.PublicKey(pub("registrar"))), identity.Change{District: district, Action: identity.Put, Type: identity.TypeService,
		ID: "gateway", Nonce: 7, Body: body}); err != nil {
		t.Fatal(err)
	}
	in := newIngress(t, b)
	s := newService(t, b, r, nil)
	start(t, s)
	reading := func(seq uint64) []byte {
		return identity.Sign(key("gateway"), identity.KindAccess, identity.Protobuf, wire.EncodeAccess(&traffic.Access{District: district,
			Turn: traffic.Turn{Epoch: 1, Seq: seq}, Time: noon, Method: "/x/Y", Phase: traffic.AccessUnary, Count: 1})).Marshal()
	}
	d := newDevice(0)
	in.put(noon, reading(1), reading(5), d.good(), reading(6))
	if c := await(t, s, 4); c.Accepted != 4 || c.Gaps != 1 || c.Missing != 3 || c.Quarantined != 0 {
		t.Errorf("got %+v, want four accepted and three missing in one gap", c)
	}
}
