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

// frameOf is the first frame after a boot of a device.
func frameOf(d *ledgertest.District, device traffic.DeviceID, boot uint64) []byte {
	f := traffic.Frame{
		District: d.ID, Junction: ledgertest.Junction, FrameKey: traffic.FrameKey{Device: device, BootEpoch: boot, Seq: 1},
		Time: noon, Interval: time.Second, Signal: traffic.Signal{State: "G", Stage: 1, Mode: traffic.Local},
	}
	k := key(string(device))
	if device == ledgertest.Device {
		k = d.DeviceKey
	}
	return identity.Sign(k, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(&f)).Marshal()
}

// enrolment files the device "new".
func enrolment(t *testing.T) identity.Change {
	t.Helper()
	body, err := json.Marshal(identity.Device{Junction: ledgertest.Junction, Key: pub("new")})
	if err != nil {
		t.Fatal(err)
	}
	return identity.Change{Action: "put", Type: identity.TypeDevice, ID: "new", Body: body, Nonce: 1}
}

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
	n := uint64(0)
	send := func(boot uint64, want validate.Rule) {
		t.Helper()
		salts := in.put(noon, frameOf(d, ledgertest.Device, boot), frameOf(d, "new", boot))
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
	decide(1, enrolment(t))
	send(2, "")
	decide(2, identity.Change{Action: "revoke", Type: identity.TypeDevice, ID: "new", Nonce: 2})
	send(3, validate.RuleRevoked)
}

// TestNobodyIsRefusedByAnOldRegistry: a device was enrolled, and its frame has a
// receipt; then validation starts again, and does not have the block yet that
// filed the device. It waits for it. Frames that need no other registry than it
// has do not wait, and a block that nobody voted for keeps nobody waiting.
func TestNobodyIsRefusedByAnOldRegistry(t *testing.T) {
	d := ledgertest.New("validation", 4)
	chain := d.NewChain()
	b := servicetest.District(t, d.ID)
	publish := func(validator uint64, blk *ledgertest.Block) {
		t.Helper()
		m := wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts)
		if err := b.Publish(context.Background(), topic.Decision(d.ID, validator), "", wire.EncodeBlock(m)); err != nil {
			t.Fatal(err)
		}
	}
	filed := chain.Decide([]ledgertest.Record{d.Change(enrolment(t))})
	after := chain.Decide()
	forged := *chain.Decide()
	forged.Votes = nil
	publish(1, after) // the block before is missing
	publish(2, &forged)

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
	old := in.put(noon, frameOf(d, ledgertest.Device, 1))
	await(t, s, 1)
	salts := in.put(noon, frameOf(d, ledgertest.Device, 2), frameOf(d, "new", 1), frameOf(d, "stranger", 1))
	time.Sleep(300 * time.Millisecond) // long enough to do the wrong thing
	if o := read(t, b); len(o.quarantined) != 0 || o.accepted[old[0]] != 1 {
		t.Fatalf("without the block that files the device: got %v quarantined and %v accepted, want the first frame of the old device accepted and nothing else dealt with", o.quarantined, o.accepted)
	}
	publish(3, filed)
	publish(4, after)
	await(t, s, 4)
	o := read(t, b)
	if o.accepted[salts[0]] != 1 || o.accepted[salts[1]] != 1 {
		t.Errorf("got %v accepted and %v quarantined, want the frames of both devices accepted", o.accepted, o.quarantined)
	}
	if q := o.quarantined[salts[2]]; len(q) != 1 || validate.Rule(q[0].Rule) != validate.RuleUnknownKey {
		t.Errorf("a stranger's frame: got %v, want it quarantined once as %s", q, validate.RuleUnknownKey)
	}
}
