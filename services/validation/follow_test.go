package validation

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// TestRegistryIsFollowed: a device may send from the block on that files it,
// until the one that revokes it; others are not touched by that.
func TestRegistryIsFollowed(t *testing.T) {
	d := ledgertest.New("validation", 4)
	chain := d.NewChain()
	b := servicetest.District(t, d.ID)
	state, err := agreed.Open("", &d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{District: d.ID, Bus: b, State: state,
		Follow: decided.Config{Bus: b, District: d.ID, GenesisHash: d.GenesisHash, Validators: d.Validators},
		Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	start(t, s)
	in := newIngress(t, b)
	frame := func(device traffic.DeviceID, seq uint64) []byte {
		f := traffic.Frame{
			District: d.ID, Junction: ledgertest.Junction, FrameKey: traffic.FrameKey{Device: device, BootEpoch: seq, Seq: 1},
			Time: noon, Interval: time.Second, Signal: traffic.Signal{State: "G", Stage: 1, Mode: traffic.Local},
		}
		k := key(string(device))
		if device == ledgertest.Device {
			k = d.DeviceKey
		}
		return identity.Sign(k, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f)).Marshal()
	}
	n := uint64(0)
	send := func(boot uint64, want validate.Rule) {
		t.Helper()
		salts := in.put(noon, frame(ledgertest.Device, boot), frame("new", boot))
		n += 2
		await(t, s, n)
		o := read(t, b)
		if o.accepted[salts[0]] != 1 {
			t.Errorf("boot %d: a frame of the old device was not accepted: %v", boot, o.quarantined[salts[0]])
		}
		got := validate.Rule("")
		if q := o.quarantined[salts[1]]; len(q) > 0 {
			got = validate.Rule(q[0].Rule)
		}
		if got != want {
			t.Errorf("boot %d: got a frame of the new device refused by %q, want %q", boot, got, want)
		}
	}
	decide := func(version uint64, c identity.Change) {
		t.Helper()
		blk := chain.Decide([]ledgertest.Record{d.Change(c)})
		m := wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts)
		if err := b.Publish(context.Background(), topic.Decision(d.ID, 1), "", wire.EncodeBlock(m)); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); state.Registry().Version() < version; {
			if time.Now().After(deadline) {
				t.Fatalf("got registry version %d, want %d", state.Registry().Version(), version)
			}
			time.Sleep(2 * time.Millisecond) // polling; nothing signals it
		}
	}
	send(1, validate.RuleUnknownKey)
	body, err := json.Marshal(identity.Device{Junction: ledgertest.Junction, Key: pub("new")})
	if err != nil {
		t.Fatal(err)
	}
	decide(1, identity.Change{Action: "put", Type: identity.TypeDevice, ID: "new", Body: body, Nonce: 1})
	send(2, "")
	decide(2, identity.Change{Action: "revoke", Type: identity.TypeDevice, ID: "new", Nonce: 2})
	send(3, validate.RuleRevoked)
}
