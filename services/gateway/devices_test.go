package gateway

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// deskWorld is the devices' part on real NATS, with an ingest that decides each
// record at once.
type deskWorld struct {
	*devicesPart
	t *testing.T
	b *bus.Bus
	d *district.District

	mu      sync.Mutex // guards all below
	reg     *identity.Registry
	height  uint64
	refused map[string]Refusal
	held    bool // stored and not decided
	at      time.Time
}

func (w *deskWorld) district() traffic.DistrictID { return w.d.Genesis.District }
func (w *deskWorld) bus() *bus.Bus                { return w.b }
func (w *deskWorld) log() *slog.Logger            { return servicetest.Logger(w.t) }
func (w *deskWorld) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}
func (w *deskWorld) registry() *identity.Registry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reg
}
func (w *deskWorld) refusal(c string) (Refusal, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f, ok := w.refused[c]
	return f, ok
}

func newDeskWorld(t *testing.T, edit func(*DevicesConfig)) *deskWorld {
	t.Helper()
	first := ledgertest.New("gateway", 4)
	reg, err := identity.NewRegistry(&first.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	w := &deskWorld{t: t, refused: map[string]Refusal{}, height: 10, at: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	if w.d, err = district.Open(t.TempDir(), district.Options{ID: "harbour", Junctions: reg.Junctions(), Created: w.at}); err != nil {
		t.Fatal(err)
	}
	if w.reg, err = identity.NewRegistry(&w.d.Genesis); err != nil {
		t.Fatal(err)
	}
	w.reg.Hash() // built: it is only read from here on
	desk, err := w.d.Key(district.DeskKey)
	if err != nil {
		t.Fatal(err)
	}
	token, err := w.d.TokenKey()
	if err != nil {
		t.Fatal(err)
	}
	w.b = servicetest.District(t, w.d.Genesis.District)
	c := &DevicesConfig{Desk: desk, TokenKey: token}
	if edit != nil {
		edit(c)
	}
	w.devicesPart = newDevicesPart(w, district.GatewayKey, c)
	stop, err := w.b.Listen(topic.Inbox("harbour", string(identity.KindRegistry), district.GatewayKey), "", w.ingest)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		stop()
	})
	wait(t, "the desk", func() bool {
		w.devicesPart.mu.Lock()
		defer w.devicesPart.mu.Unlock()
		return w.sender != nil
	})
	return w
}

// ingest decides a record, as validators would.
func (w *deskWorld) ingest(m *nats.Msg) {
	w.mu.Lock()
	defer w.mu.Unlock()
	salt := make([]byte, 32)
	h := ledger.Commit(ledger.Salt(salt), m.Data)
	b, err := proto.Marshal(&pb.Receipt{Status: pb.Receipt_STATUS_STORED, Commitment: h[:], Salt: salt})
	if err == nil {
		err = m.Respond(b)
	}
	if err != nil {
		w.t.Error(err)
	}
	if w.held {
		return
	}
	one := []validate.Candidate{wire.Candidate(m.Data, salt)}
	wire.VerifySignatures(identity.NewVerifier(), w.reg, one)
	w.height++
	next := w.reg.Clone()
	v := validate.NewState(validate.Limits{}).Judge(w.reg, w.at, &one[0])
	if v.OK {
		if err := next.Apply(w.height, one[0].Envelope.Key, *one[0].Change); err != nil {
			v = validate.Verdict{Rule: validate.RuleRegistry, Reason: err.Error()}
		}
	}
	if !v.OK {
		w.refused[hex.EncodeToString(h[:])] = Refusal{Rule: string(v.Rule), Reason: v.Reason}
		return
	}
	next.Hash()
	w.reg = next
}

func (w *deskWorld) claim(device string, valid time.Duration) string {
	w.t.Helper()
	r, err := w.CreateClaim(w.t.Context(), &pb.CreateClaimRequest{Device: device, Junction: ledgertest.Junction, Valid: durationpb.New(valid)})
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Claim
}

func deviceKeyOf(name string) ed25519.PrivateKey {
	seed := make([]byte, 32)
	copy(seed, name)
	return ed25519.NewKeyFromSeed(seed)
}

func enrolment(claim string, key ed25519.PrivateKey) *pb.EnrolRequest {
	return &pb.EnrolRequest{Claim: claim, Key: key.Public().(ed25519.PublicKey), Proof: ed25519.Sign(key, identity.EnrolInput(claim))}
}

func rotation(device string, old, next ed25519.PrivateKey) *pb.RotateKeyRequest {
	pub := next.Public().(ed25519.PublicKey)
	in := identity.RotateInput(traffic.DeviceID(device), pub)
	return &pb.RotateKeyRequest{Device: device, NewKey: pub, OldProof: ed25519.Sign(old, in), NewProof: ed25519.Sign(next, in)}
}

// want checks an error's kind and words.
func want(t *testing.T, name string, err error, k kind.Kind, text string) {
	t.Helper()
	if kind.Of(err) != k || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("%s: got %v, want %s: %s", name, err, k, text)
	}
}

func TestEnrolRefusals(t *testing.T) {
	w := newDeskWorld(t, nil)
	ctx := t.Context()
	claim, key := w.claim("d9", time.Hour), deviceKeyOf("d9")
	// The claim is kept as a key, not as itself.
	if b := w.registry().Snapshot(); strings.Contains(string(b), claim) {
		t.Error("the registry holds the claim in the clear")
	}
	for _, tc := range []struct {
		name string
		edit func(*pb.EnrolRequest)
		k    kind.Kind
		text string
	}{
		{"another claim", func(r *pb.EnrolRequest) { *r = *enrolment("AAAAAAAAAAAAAAAAAAAAAAAAAA", key) }, kind.Denied, "claim: is none"},
		{"a proof by another key", func(r *pb.EnrolRequest) { r.Proof = enrolment(claim, deviceKeyOf("thief")).Proof }, kind.Denied, "proof:"},
		{"another key", func(r *pb.EnrolRequest) { r.Key = enrolment(claim, deviceKeyOf("thief")).Key }, kind.Denied, "proof:"},
		{"a proof for another claim", func(r *pb.EnrolRequest) { r.Proof = enrolment("x"+claim, key).Proof }, kind.Denied, "proof:"},
		{"a key of low order", func(r *pb.EnrolRequest) {
			r.Key = make([]byte, 32)
			r.Key[0], r.Proof = 1, append(append([]byte{1}, make([]byte, 31)...), make([]byte, 32)...)
		}, kind.Invalid, "body.key"},
	} {
		r := enrolment(claim, key)
		tc.edit(r)
		_, err := w.Enrol(ctx, r)
		want(t, tc.name, err, tc.k, tc.text)
	}
	// Nothing of that used it up, and the answer can be had twice, with that key.
	one, err := w.Enrol(ctx, enrolment(claim, key))
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.Enrol(ctx, enrolment(claim, key))
	if err != nil || one.Device != "d9" || again.Device != "d9" || one.InForceHeight != again.InForceHeight || one.Token == "" {
		t.Errorf("got %v, then %v, %v; want the same device", one, again, err)
	}
	_, err = w.Enrol(ctx, enrolment(claim, deviceKeyOf("second")))
	want(t, "used twice", err, kind.Conflict, "claim: was used before")

	old := w.claim("d10", time.Minute)
	w.mu.Lock()
	w.at = w.at.Add(time.Minute)
	w.mu.Unlock()
	_, err = w.Enrol(ctx, enrolment(old, deviceKeyOf("d10")))
	want(t, "too late", err, kind.Stale, "claim: could be used until")

	_, err = w.CreateClaim(ctx, &pb.CreateClaimRequest{Device: "d9", Junction: ledgertest.Junction})
	want(t, "a claim for a device that is there", err, kind.Conflict, "body.device")
	_, err = w.CreateClaim(ctx, &pb.CreateClaimRequest{Device: "d11", Junction: ledgertest.Junction, Valid: durationpb.New(time.Millisecond)})
	want(t, "a claim for nothing", err, kind.Invalid, "valid:")
}

// Whoever calls at once with one claim and keys of their own: one is in.
func TestOneClaimManyDevices(t *testing.T) {
	w := newDeskWorld(t, nil)
	claim := w.claim("d9", time.Hour)
	const n = 8
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { _, errs[i] = w.Enrol(t.Context(), enrolment(claim, deviceKeyOf(fmt.Sprint("device ", i)))) })
	}
	group.Wait()
	in := 0
	for i, err := range errs {
		if err == nil {
			in++
		} else if k := kind.Of(err); k != kind.Conflict && k != kind.Stale {
			t.Errorf("device %d: got %v, want a conflict", i, err)
		}
	}
	if in != 1 {
		t.Errorf("%d devices came in by one claim, want 1: %v", in, errs)
	}
}

func TestRotateAndRevoke(t *testing.T) {
	w := newDeskWorld(t, nil)
	ctx := t.Context()
	one, two, three := deviceKeyOf("one"), deviceKeyOf("two"), deviceKeyOf("three")
	if _, err := w.Enrol(ctx, enrolment(w.claim("d9", time.Hour), one)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*pb.RotateKeyRequest{rotation("d9", two, three), rotation("nobody", one, two), rotation("rsu-J1", one, two)} {
		_, err := w.RotateKey(ctx, r)
		want(t, "a stranger's change of "+r.Device, err, kind.Denied, "old_proof: is not by the key in force of a device in force")
	}
	half := rotation("d9", one, two)
	half.NewProof = half.OldProof
	_, err := w.RotateKey(ctx, half)
	want(t, "without the new key", err, kind.Denied, "new_proof")
	first, err := w.RotateKey(ctx, rotation("d9", one, two))
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.RotateKey(ctx, rotation("d9", one, two))
	if err != nil || again.InForceHeight != first.InForceHeight || again.Device.Key != hex.EncodeToString(two.Public().(ed25519.PublicKey)) {
		t.Errorf("asked again: got %v, %v, want the same as %v", again, err, first)
	}
	_, err = w.RotateKey(ctx, rotation("d9", one, three))
	want(t, "by the key of before", err, kind.Denied, "old_proof")
	for key, status := range map[string]identity.Status{"one": identity.Revoked, "two": identity.Active} {
		h, ok := w.registry().Holder(identity.IDOf(deviceKeyOf(key).Public().(ed25519.PublicKey)))
		if !ok || h.ID != "d9" || h.Status != status {
			t.Errorf("key %s: got %+v, want it on record for d9 and %s", key, h, status)
		}
	}
	// A claim's answer must not bring back a key that is gone.
	r, err := w.RevokeDevice(context.WithValue(ctx, callKey{}, call{by: access.Principal{ID: "technician-1"}}), &pb.RevokeDeviceRequest{Device: "d9", Reason: "stolen"})
	if err != nil || r.Device.Status != "revoked" {
		t.Fatalf("got %v, %v, want it revoked", r, err)
	}
	_, err = w.RotateKey(ctx, rotation("d9", two, three))
	want(t, "a revoked device's change", err, kind.Denied, "old_proof")
	_, err = w.RevokeDevice(ctx, &pb.RevokeDeviceRequest{Device: "d9", Reason: "stolen"})
	want(t, "revoked twice", err, kind.Conflict, "revoked already")
	_, err = w.RevokeDevice(ctx, &pb.RevokeDeviceRequest{Device: "nobody", Reason: "stolen"})
	want(t, "nobody", err, kind.NotFound, "no device")
}

// A desk whose official may not is refused before anything is on record; a record
// that is not agreed is not said to be in force.
func TestTheDeskDecidesNothing(t *testing.T) {
	w := newDeskWorld(t, func(c *DevicesConfig) { c.Wait = 200 * time.Millisecond })
	w.mu.Lock()
	w.held = true
	w.mu.Unlock()
	_, err := w.CreateClaim(t.Context(), &pb.CreateClaimRequest{Device: "d9", Junction: ledgertest.Junction})
	want(t, "nothing is agreed", err, kind.Unavailable, "stored but not agreed yet")

	stranger := newDevicesPart(w, district.GatewayKey, &DevicesConfig{Desk: deviceKeyOf("stranger"), TokenKey: deviceKeyOf("tokens")})
	stranger.sender = w.sender
	_, err = stranger.CreateClaim(t.Context(), &pb.CreateClaimRequest{Device: "d9", Junction: ledgertest.Junction})
	want(t, "a desk that is nobody", err, kind.Denied, "is not in the registry")

	none := newDevicesPart(w, district.GatewayKey, nil)
	for name, f := range map[string]func() error{
		"claim":  func() error { _, err := none.CreateClaim(t.Context(), &pb.CreateClaimRequest{}); return err },
		"enrol":  func() error { _, err := none.Enrol(t.Context(), &pb.EnrolRequest{}); return err },
		"rotate": func() error { _, err := none.RotateKey(t.Context(), &pb.RotateKeyRequest{}); return err },
		"revoke": func() error { _, err := none.RevokeDevice(t.Context(), &pb.RevokeDeviceRequest{}); return err },
	} {
		want(t, name+" without a desk", f(), kind.Stale, "stopline enrol")
	}
	if err := (&DevicesConfig{TokenLife: -1, Wait: -1}).Validate(); err == nil || strings.Count(err.Error(), "gateway: Devices.") != 4 {
		t.Errorf("got %v, want four problems", err)
	}
}

func TestListDevices(t *testing.T) {
	w := newDeskWorld(t, nil)
	for _, d := range []string{"a", "b", "c"} {
		if _, err := w.Enrol(t.Context(), enrolment(w.claim(d, time.Hour), deviceKeyOf(d))); err != nil {
			t.Fatal(err)
		}
	}
	at := w.now()
	hear := func(offset time.Duration) {
		w.accepted(&decided.Block{Block: ledger.Block{Header: ledger.Header{Time: at}}}, &decided.Record{ReceivedAt: at}, &validate.Candidate{
			Frame: &traffic.Frame{FrameKey: traffic.FrameKey{Device: "b"}, Time: at.Add(offset)}})
	}
	hear(5 * time.Second)
	for range 20 {
		hear(-100 * time.Millisecond) // the time that it takes to agree
	}
	hear(-time.Hour) // kept while it was cut off
	var got []*pb.DeviceInfo
	r := &pb.ListDevicesRequest{PageSize: 2}
	for {
		page, err := w.ListDevices(t.Context(), r)
		if err != nil || len(page.Devices) > 2 {
			t.Fatalf("got %v, %v", page, err)
		}
		got = append(got, page.Devices...)
		if r.PageToken = page.NextPageToken; r.PageToken == "" {
			break
		}
	}
	if len(got) != 4 || got[0].Id != "a" || got[1].Id != "b" || got[2].Id != "c" || got[0].LastReceipt != nil {
		t.Fatalf("got %v, want three devices and the unit of the junction", got)
	}
	if b := got[1]; b.ClockOffset.AsDuration() != -100*time.Millisecond || !b.LastReceipt.AsTime().Equal(at) || b.Junction != ledgertest.Junction {
		t.Errorf("got %v, want it 100 ms behind and heard at %v", b, at)
	}
	if none, err := w.ListDevices(t.Context(), &pb.ListDevicesRequest{Junction: "elsewhere"}); err != nil || len(none.Devices) != 0 {
		t.Errorf("got %v, %v, want none elsewhere", none, err)
	}
}
