package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/stopline-traffic/stopline/api/client"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// apiAt returns where a demo answers agencies.
func (d *demoRun) apiAt() string {
	d.t.Helper()
	m := regexp.MustCompile(`  api (127\.0\.0\.1:[0-9]+)`).FindStringSubmatch(d.err.String())
	if m == nil {
		d.t.Fatalf("no address of the API in %q", d.err)
	}
	return m[1]
}

// client asks the demo's gateway as one of the district's clients; "" is the
// public.
func (d *demoRun) client(name string) *client.Client {
	d.t.Helper()
	o := client.Options{Address: d.apiAt(), Insecure: true}
	if name != "" {
		key, err := client.KeyFile(filepath.Join(d.data, "keys", district.ClientKey(name)+".key"))
		if err != nil {
			d.t.Fatal(err)
		}
		o.Tokens = client.SelfSigned(string(d.district.Genesis.District), name, key)
		gateway, err := d.district.Key(district.GatewayKey)
		if err != nil {
			d.t.Fatal(err)
		}
		o.District, o.ReceiptKey = string(d.district.Genesis.District), gateway.Public().(ed25519.PublicKey)
	}
	c, err := client.New(o)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = c.Close() }) // the demo may be gone already
	return c
}

// revokedWithin is the bound of the design on revocation.
const revokedWithin = 30 * time.Second

// A device comes in by a claim, sends by MQTT and gRPC, changes its key, and is
// revoked: all over the doors that a city has.
func TestOnboard(t *testing.T) {
	processTest(t)
	dir := t.TempDir()
	d := startDemo(t, filepath.Join(dir, "district"), "--mqtt", "127.0.0.1:0", "--mqtt-ws", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
	tcp, _ := d.mqttDoors()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	technician, police := d.client("technician-1"), d.client("police-1")
	for_ := client.Purpose("maintenance")
	claim := func(device string, valid time.Duration) string {
		t.Helper()
		r, err := technician.Devices.CreateClaim(ctx, &pb.CreateClaimRequest{Device: device, Junction: "h0101", Valid: durationpb.New(valid)}, for_, client.MustReceipt())
		if err != nil {
			t.Fatal(err)
		}
		return r.Claim
	}
	onboard := func(folder string, more ...string) result {
		return stopline(t, append([]string{"onboard", "--gateway", "http://" + d.apiAt(), "--out", filepath.Join(dir, folder)}, more...)...)
	}

	// Who may not have claims made, and for what there are none.
	if _, err := police.Devices.CreateClaim(ctx, &pb.CreateClaimRequest{Device: "x", Junction: "h0101"}, for_); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a claim for the police: got %v, want it denied", err)
	}
	if _, err := technician.Devices.CreateClaim(ctx, &pb.CreateClaimRequest{Device: "x", Junction: "nowhere"}, for_); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "body.junction") {
		t.Errorf("a junction that is none: got %v, want junction refused", err)
	}

	first, short := claim("probe", 0), claim("late", time.Second)
	wantExit(t, onboard("probe", "--claim", "AAAAAAAAAAAAAAAAAAAAAAAAAA"), exitFailed, "claim: is none of this district's")
	written := strings.ToLower(first[:13]) + "-" + first[13:]
	wantExit(t, onboard("probe", "--claim", written), exitOK, "device probe of junction h0101", "is enrolled")
	wantExit(t, onboard("probe", "--claim", first), exitFailed, "holds device probe already")
	wantExit(t, onboard("second", "--claim", first), exitFailed, "claim: was used before")
	time.Sleep(time.Second) // the claim's life: nothing else says when it is over
	waitFor(t, "the end of a claim", soon, func() bool {
		r := onboard("late", "--claim", short)
		return r.code == exitFailed && strings.Contains(r.err, "claim: could be used until")
	})

	// It speaks: its frames are agreed and sealed.
	load := func() (onboarded, string, ed25519.PrivateKey) {
		t.Helper()
		var o onboarded
		b, err := os.ReadFile(filepath.Join(dir, "probe", deviceJSONFile))
		if err == nil {
			err = json.Unmarshal(b, &o)
		}
		if err != nil {
			t.Fatal(err)
		}
		token, err := os.ReadFile(filepath.Join(dir, "probe", deviceToken))
		if err != nil {
			t.Fatal(err)
		}
		key, err := district.ReadKey(filepath.Join(dir, "probe", deviceKeyFile))
		if err != nil {
			t.Fatal(err)
		}
		return o, strings.TrimSpace(string(token)), key
	}
	o, _, key := load()
	dev := &device{district: d.district.Genesis.District, id: o.Device, junction: d.junction(o.Junction), key: key, boot: 1}
	var receipts []receipt
	receipts = append(receipts, d.store("/v1/frames", dev.next()), d.store("/v1/frames", dev.next()))
	d.sealed(receipts...)

	// A new key: the old one is refused from then on, and the sequence goes on.
	old := *dev
	wantExit(t, onboard("probe", "--rotate"), exitOK, "has a new key")
	if _, err := os.Stat(filepath.Join(dir, "probe", nextKeyFile)); !os.IsNotExist(err) {
		t.Errorf("the next key is there still: %v", err)
	}
	var token string
	o, token, dev.key = load()
	if dev.key.Equal(key) || o.KeyID == identity.IDOf(key.Public().(ed25519.PublicKey)) {
		t.Fatal("the key is the same")
	}
	late := d.store("/v1/frames", old.next())
	receipts = append(receipts, d.store("/v1/frames", dev.next()))
	v := d.sealed(receipts...)
	once(t, v, receipts)
	if at := v.find(late.Commitment); len(at) > 0 {
		t.Errorf("a frame of the old key is in the log at %v", at)
	}
	// Without the old key nobody changes it.
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	in := identity.RotateInput(dev.id, stranger.Public().(ed25519.PublicKey))
	public := d.client("")
	for _, by := range []ed25519.PrivateKey{stranger, key} {
		_, err := public.Devices.RotateKey(ctx, &pb.RotateKeyRequest{Device: string(dev.id), NewKey: stranger.Public().(ed25519.PublicKey),
			OldProof: ed25519.Sign(by, in), NewProof: ed25519.Sign(stranger, in)})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("a change by another key: got %v, want it denied", err)
		}
	}
	list, err := technician.Devices.ListDevices(ctx, &pb.ListDevicesRequest{Junction: "h0101"}, for_)
	if err != nil || len(list.Devices) != 2 || list.Devices[0].Id != "probe" || list.Devices[0].LastReceipt == nil || list.Devices[0].Status != "active" ||
		list.Devices[0].ClockOffset.AsDuration().Abs() > time.Minute {
		t.Errorf("got %v, %v, want two devices, and when the first was heard", list, err)
	}

	// Live connections: MQTT, and the stream of a field gateway.
	live, err := servicetest.DialMQTT(tcp, o.ClientID, o.Username, token)
	if err != nil {
		t.Fatal(err)
	}
	other, err := servicetest.DialMQTT(tcp, "rsu-h0101", "rsu-h0101", d.token("rsu-h0101"))
	if err != nil {
		t.Fatal(err)
	}
	stream := d.grpcStream(ctx)
	send := func() {
		t.Helper()
		e, err := identity.ParseEnvelope(dev.next())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&pb.SubmitRequest{Envelope: &pb.Envelope{Kind: string(e.Kind), ContentType: e.ContentType, KeyId: string(e.Key), Payload: e.Payload, Signature: e.Signature}}); err != nil {
			t.Fatal(err)
		}
	}
	send()
	if r, err := stream.Recv(); err != nil || r.Receipt.Status != pb.Receipt_STATUS_STORED {
		t.Fatalf("got %v, %v, want stored", r, err)
	}
	at := time.Now()
	r, err := technician.Devices.RevokeDevice(ctx, &pb.RevokeDeviceRequest{Device: "probe", Reason: "stolen"}, for_)
	if err != nil || r.Device.Status != "revoked" {
		t.Fatalf("got %v, %v, want it revoked", r, err)
	}
	if err := live.Conn.SetReadDeadline(at.Add(revokedWithin)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := live.Read(); err == nil || os.IsTimeout(err) {
		t.Errorf("MQTT: got %v, want the connection ended within %v", err, revokedWithin)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("gRPC: got %v, want the stream ended", err)
	}
	if gone := time.Since(at); gone > revokedWithin {
		t.Errorf("the connections ended after %v, want %v at most", gone, revokedWithin)
	}
	if _, err := servicetest.DialMQTT(tcp, o.ClientID, o.Username, token); err == nil {
		t.Error("the revoked device was let in again")
	}
	if err := other.Conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := other.Read(); !os.IsTimeout(err) {
		t.Errorf("another device's connection: got %v, want it to be there still", err)
	}
	if _, err := technician.Devices.RevokeDevice(ctx, &pb.RevokeDeviceRequest{Device: "probe", Reason: "stolen"}, for_); status.Code(err) != codes.Aborted {
		t.Errorf("revoked twice: got %v, want a conflict", err)
	}
	wantExit(t, onboard("probe", "--rotate"), exitFailed, "old_proof")
	if end := d.stop(); end.Frames.ByRule[validate.RuleRevoked] != 1 || end.MQTT.Revoked != 1 {
		t.Errorf("got %+v and %+v, want the old key's frame refused and one connection ended", end.Frames, end.MQTT)
	}
	wantExit(t, stopline(t, "fsck", d.data), exitOK, "OK: ")
}

func TestOnboardOptions(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		args []string
		code int
		text string
	}{
		{nil, exitUsage, "--gateway, --out and either --claim or --rotate"},
		{[]string{"--gateway", "http://127.0.0.1:1", "--out", dir, "--claim", "x", "--rotate"}, exitUsage, "either --claim or --rotate"},
		{[]string{"--gateway", "http://gateway.example", "--out", dir, "--claim", "x"}, exitUsage, "must be https"},
		{[]string{"--gateway", "gateway:1", "--out", dir, "--claim", "x"}, exitUsage, "must be https://HOST:PORT"},
		{[]string{"--gateway", "https://gateway.example", "--out", dir, "--claim", "x", "--pin", "x"}, exitUsage, "Pins[0]"},
		{[]string{"--gateway", "http://127.0.0.1:1", "--out", filepath.Join(dir, "none"), "--rotate"}, exitFailed, "device.json"},
	} {
		wantExit(t, inside(t, append([]string{"onboard"}, tt.args...)...), tt.code, tt.text)
	}
}
