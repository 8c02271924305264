package gateway

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
)

// DevicesConfig lets devices be brought in, changed and retired through the
// gateway.
//
// The gateway carries registry records and decides nothing: a device comes in by
// its claim's key, which the registry knows from a record that officials made
// before, and changes its key by the one it has. What a stolen Desk key can do is
// file claims and retire devices, each on record under the desk's name, where the
// governance in force lets the desk do that; it cannot bring in a device, change
// a key, or stand for any other change. A district can take even that away, by
// giving the rule for claims to officials who sign them with stopline registry.
type DevicesConfig struct {
	// Desk is the key of an official, who sends the records. Required.
	Desk ed25519.PrivateKey
	// TokenKey signs devices' tokens for MQTT. Required.
	TokenKey ed25519.PrivateKey
	// TokenLife is how long tokens are good; 0 is bus.MaxTokenLife. A device has a
	// new one with each new key. Revocation does not wait for it.
	TokenLife time.Duration
	// Wait bounds how long a call waits until its record is in force; 0 is 15 s.
	Wait time.Duration
}

// Validate reports everything that is wrong, joined.
func (c *DevicesConfig) Validate() error {
	var errs []error
	for _, k := range []struct {
		name string
		key  ed25519.PrivateKey
	}{{"Desk", c.Desk}, {"TokenKey", c.TokenKey}} {
		if len(k.key) != ed25519.PrivateKeySize {
			errs = append(errs, fmt.Errorf("gateway: Devices.%s: must be given", k.name))
		}
	}
	if c.TokenLife < 0 || c.TokenLife > bus.MaxTokenLife {
		errs = append(errs, fmt.Errorf("gateway: Devices.TokenLife: %s, must be 0 to %s", c.TokenLife, bus.MaxTokenLife))
	}
	if c.Wait < 0 {
		errs = append(errs, errors.New("gateway: Devices.Wait: must not be negative"))
	}
	return errors.Join(errs...)
}

// claimValid is how long a claim is good where nobody says, and the least.
const (
	claimValid = 24 * time.Hour
	claimLeast = time.Second
)

// deskHost is what the devices' part has of the gateway.
type deskHost interface {
	district() traffic.DistrictID
	// registry is the one in force; its entries are never changed.
	registry() *identity.Registry
	now() time.Time
	bus() *bus.Bus
	log() *slog.Logger
	// refusal is why a registry record was refused.
	refusal(commitment string) (Refusal, bool)
}

// devicesPart is DeviceService.
type devicesPart struct {
	pb.UnimplementedDeviceServiceServer
	a    deskHost
	cfg  *DevicesConfig // nil: devices cannot be changed here, only listed
	name string         // of the gateway, at ingest's inbox

	mu     sync.Mutex
	sender *bus.Sender // nil while the part does not run; guarded by mu
	heard  map[traffic.DeviceID]*heard
}

// heard is when a device was last heard, and how its clock goes.
type heard struct {
	at      time.Time
	offsets [8]time.Duration
	n       int
}

// offset is how far the device's clock is ahead. A frame is agreed some time after
// it was made, and a kept one much later: the least late of the last few says
// most.
func (h *heard) offset() time.Duration { return slices.Max(h.offsets[:min(h.n, len(h.offsets))]) }

// newDevicesPart needs a valid config, or none.
func newDevicesPart(a deskHost, name string, c *DevicesConfig) *devicesPart {
	p := &devicesPart{a: a, name: name, heard: map[traffic.DeviceID]*heard{}}
	if c == nil {
		return p
	}
	own := *c
	if own.TokenLife == 0 {
		own.TokenLife = bus.MaxTokenLife
	}
	if own.Wait == 0 {
		own.Wait = 15 * time.Second
	}
	p.cfg = &own
	return p
}

// refusal is why a registry record was refused.
func (a *API) refusal(commitment string) (Refusal, bool) {
	a.g.mu.Lock()
	defer a.g.mu.Unlock()
	f, ok := a.g.refused.by[commitment]
	return f, ok
}

func (p *devicesPart) register(s *grpc.Server) { pb.RegisterDeviceServiceServer(s, p) }

func (p *devicesPart) objects(_ context.Context, _ string, req proto.Message) ([]access.Object, error) {
	device := func(id, junction string) []access.Object {
		return []access.Object{{Type: "Device", ID: id, Junction: junction}}
	}
	switch r := req.(type) {
	case *pb.CreateClaimRequest:
		return device(r.Device, r.Junction), nil
	case *pb.RevokeDeviceRequest:
		d, _ := p.a.registry().Device(traffic.DeviceID(r.Device))
		return device(r.Device, string(d.Junction)), nil
	case *pb.RotateKeyRequest:
		return device(r.Device, ""), nil
	case *pb.ListDevicesRequest:
		if r.Junction != "" {
			return []access.Object{{Type: "Junction", ID: r.Junction, Junction: r.Junction}}, nil
		}
	}
	return nil, nil
}

// run sends records until ctx ends.
func (p *devicesPart) run(ctx context.Context) error {
	s, err := bus.NewSender(bus.SenderConfig{Bus: p.a.bus(), Logger: p.a.log()})
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.sender = s
	p.mu.Unlock()
	<-ctx.Done()
	p.mu.Lock()
	p.sender = nil
	p.mu.Unlock()
	s.Close()
	return nil
}

// accepted notes when devices were heard.
func (p *devicesPart) accepted(b *decided.Block, r *decided.Record, c *validate.Candidate) {
	if c.Frame == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.heard[c.Frame.Device]
	if h == nil {
		h = &heard{}
		p.heard[c.Frame.Device] = h
	}
	h.at = r.ReceivedAt
	h.offsets[h.n%len(h.offsets)] = c.Frame.Time.Sub(b.Header.Time)
	if h.n++; h.n >= 2*len(h.offsets) {
		h.n -= len(h.offsets)
	}
}

// errNoDesk says that this gateway has no desk.
var errNoDesk = kind.Errorf(kind.Stale, "devices: this gateway carries no changes of devices; use stopline enrol")

// file sends a change and waits until it is in force: until is asked of each
// registry. The base is that of the entry now, so that two who change one entry at
// once are not both right.
func (p *devicesPart) file(ctx context.Context, c identity.Change, body any, until func(*identity.Registry) bool) error {
	reg := p.a.registry()
	p.mu.Lock()
	sender := p.sender
	p.mu.Unlock()
	if sender == nil {
		return kind.Errorf(kind.Unavailable, "devices: the gateway is starting or ending")
	}
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	var nonce [8]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	// Below 2⁵³, so that JSON tools that know only doubles keep it whole.
	c.District, c.Body, c.Nonce, c.Base = p.a.district(), b, binary.BigEndian.Uint64(nonce[:])>>11, reg.Base(c.Type, c.ID)
	desk := identity.IDOf(p.cfg.Desk.Public().(ed25519.PublicKey))
	// What the registry would refuse is better said before it is on record. At the
	// newest height, since all features that matter here stay.
	if err := reg.Clone().Apply(1<<62, desk, c); err != nil {
		return err
	}
	payload, err := c.Marshal()
	if err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Wait)
	defer cancel()
	receipt, err := sender.Send(ctx, p.a.district(), identity.KindRegistry, p.name, identity.Sign(p.cfg.Desk, identity.KindRegistry, identity.JSON, payload).Marshal())
	if err != nil {
		return fmt.Errorf("devices: the record was not stored: %w", err)
	}
	commitment := hex.EncodeToString(receipt.Commitment)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if until(p.a.registry()) {
			return nil
		}
		if f, ok := p.a.refusal(commitment); ok {
			return kind.Errorf(kind.Conflict, "devices: the validators refused it (%s): %s", f.Rule, f.Reason)
		}
		select {
		case <-ctx.Done():
			return kind.Errorf(kind.Unavailable, "devices: the record is stored but not agreed yet; ask again: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// CreateClaim files a claim.
func (p *devicesPart) CreateClaim(ctx context.Context, r *pb.CreateClaimRequest) (*pb.CreateClaimResponse, error) {
	if p.cfg == nil {
		return nil, errNoDesk
	}
	valid := claimValid
	if v := r.Valid.AsDuration(); v != 0 {
		if valid = v; valid < claimLeast {
			return nil, kind.Errorf(kind.Invalid, "valid: %s, must be 0 for a day, or %s or longer", v, claimLeast)
		}
	}
	text := rand.Text()
	key := identity.ClaimKey(text).Public().(ed25519.PublicKey)
	until := p.a.now().UTC().Add(valid).Truncate(time.Second)
	c := identity.Claim{Device: traffic.DeviceID(r.Device), Junction: traffic.JunctionID(r.Junction), Key: identity.PublicKey(key), Until: until.Format(time.RFC3339),
		By: caller(ctx).by.ID}
	for _, d := range r.Detectors {
		c.Detectors = append(c.Detectors, traffic.DetectorID(d))
	}
	id := identity.IDOf(key)
	err := p.file(ctx, identity.Change{Action: identity.Put, Type: identity.TypeClaim, ID: string(id)}, c, func(reg *identity.Registry) bool {
		_, _, ok := reg.Claim(id)
		return ok
	})
	if err != nil {
		return nil, err
	}
	return &pb.CreateClaimResponse{Claim: text, Expires: timestamp(until)}, nil
}

// hasKey reports whether a device is in force with a key.
func hasKey(reg *identity.Registry, device traffic.DeviceID, key []byte) (identity.Entry, identity.Device, bool) {
	e, ok := reg.Entry(identity.TypeDevice, string(device))
	if !ok || e.Status != identity.Active {
		return e, identity.Device{}, false
	}
	d, ok := reg.Device(device)
	return e, d, ok && bytes.Equal(d.Key, key)
}

// Enrol takes a device in. Who asks again with the same claim and key, because the
// answer was lost, gets it again.
func (p *devicesPart) Enrol(ctx context.Context, r *pb.EnrolRequest) (*pb.EnrolResponse, error) {
	if p.cfg == nil {
		return nil, errNoDesk
	}
	// As people write it down.
	text := strings.ToUpper(strings.Join(strings.Fields(strings.ReplaceAll(r.Claim, "-", "")), ""))
	secret := identity.ClaimKey(text)
	id := identity.IDOf(secret.Public().(ed25519.PublicKey))
	claim, filed, ok := p.a.registry().Claim(id)
	if !ok {
		return nil, kind.Errorf(kind.Denied, "claim: is none of this district's")
	}
	// Over what was sent: the device need not know how it is read.
	if !identity.VerifyBytes(r.Key, identity.EnrolInput(r.Claim), r.Proof) {
		return nil, kind.Errorf(kind.Denied, "proof: is not by the key over %q, the claim and a line feed", "stopline enrol v1\n")
	}
	e, d, in := hasKey(p.a.registry(), claim.Device, r.Key)
	if again := in && d.Enrolled != nil && d.Enrolled.Claim == id; !again {
		switch {
		case filed.Status != identity.Active:
			return nil, kind.Errorf(kind.Conflict, "claim: was used before, or taken back")
		case !p.a.now().Before(claim.Expires()):
			return nil, kind.Errorf(kind.Stale, "claim: could be used until %s", claim.Until)
		}
		d = identity.Device{Junction: claim.Junction, Detectors: claim.Detectors, Key: r.Key, Enrolled: &identity.Enrolled{
			Claim: id, Proof: ed25519.Sign(secret, identity.ClaimInput(p.a.district(), id, claim.Device, r.Key))}}
		err := p.file(ctx, identity.Change{Action: identity.Put, Type: identity.TypeDevice, ID: string(claim.Device)}, d, func(reg *identity.Registry) bool {
			e, _, in = hasKey(reg, claim.Device, r.Key)
			return in
		})
		if err != nil {
			return nil, err
		}
	}
	token, until, err := p.token(claim.Device)
	if err != nil {
		return nil, err
	}
	return &pb.EnrolResponse{District: string(p.a.district()), Device: string(claim.Device), Junction: string(claim.Junction), Token: token,
		TokenExpires: timestamp(until), InForceHeight: e.Since + 1}, nil
}

// token makes a device's token, by the clock that the door for MQTT has.
func (p *devicesPart) token(d traffic.DeviceID) (string, time.Time, error) {
	now := time.Now().UTC().Truncate(time.Second)
	until := now.Add(p.cfg.TokenLife)
	t, err := bus.NewToken(p.cfg.TokenKey, p.a.district(), d, now, until)
	return t, until, err
}

// RotateKey replaces a device's key.
func (p *devicesPart) RotateKey(ctx context.Context, r *pb.RotateKeyRequest) (*pb.RotateKeyResponse, error) {
	if p.cfg == nil {
		return nil, errNoDesk
	}
	id := traffic.DeviceID(r.Device)
	e, was, in := hasKey(p.a.registry(), id, r.NewKey)
	in = in && was.Enrolled != nil && bytes.Equal(was.Enrolled.OldProof, r.OldProof) && bytes.Equal(was.Enrolled.NewProof, r.NewProof)
	if !in { // else the answer was lost
		if e.Status != identity.Active {
			// As to who has no right: which devices there are is not for the public.
			return nil, kind.Errorf(kind.Denied, "old_proof: is not by the key in force of a device in force")
		}
		was, _ = p.a.registry().Device(id)
		if !identity.VerifyBytes(ed25519.PublicKey(was.Key), identity.RotateInput(id, r.NewKey), r.OldProof) {
			return nil, kind.Errorf(kind.Denied, "old_proof: is not by the key in force of a device in force")
		}
		d := identity.Device{Junction: was.Junction, Detectors: was.Detectors, Key: r.NewKey, Former: append(slices.Clone(was.Former), was.Key),
			Enrolled: &identity.Enrolled{OldProof: r.OldProof, NewProof: r.NewProof}}
		err := p.file(ctx, identity.Change{Action: identity.Put, Type: identity.TypeDevice, ID: r.Device}, d, func(reg *identity.Registry) bool {
			e, _, in = hasKey(reg, id, r.NewKey)
			return in
		})
		if err != nil {
			return nil, err
		}
	}
	token, until, err := p.token(id)
	if err != nil {
		return nil, err
	}
	return &pb.RotateKeyResponse{Device: p.info(e), Token: token, TokenExpires: timestamp(until), InForceHeight: e.Since + 1}, nil
}

// revocation is what the record of a device's end says beside its name.
type revocation struct {
	Reason string `json:"reason"`
	By     string `json:"by"`
}

// RevokeDevice retires a device.
func (p *devicesPart) RevokeDevice(ctx context.Context, r *pb.RevokeDeviceRequest) (*pb.RevokeDeviceResponse, error) {
	if p.cfg == nil {
		return nil, errNoDesk
	}
	var e identity.Entry
	err := p.file(ctx, identity.Change{Action: identity.Revoke, Type: identity.TypeDevice, ID: r.Device}, revocation{r.Reason, caller(ctx).by.ID}, func(reg *identity.Registry) bool {
		e, _ = reg.Entry(identity.TypeDevice, r.Device)
		return e.Status == identity.Revoked
	})
	if err != nil {
		return nil, err
	}
	return &pb.RevokeDeviceResponse{Device: p.info(e)}, nil
}

// ListDevices lists devices by id.
func (p *devicesPart) ListDevices(_ context.Context, r *pb.ListDevicesRequest) (*pb.ListDevicesResponse, error) {
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	out := &pb.ListDevicesResponse{}
	for _, e := range p.a.registry().Entries(identity.TypeDevice) {
		if e.ID <= after {
			continue
		}
		info := p.info(e)
		if r.Junction != "" && info.Junction != r.Junction {
			continue
		}
		if len(out.Devices) == pageSize(r.PageSize) {
			out.NextPageToken = nextPage(r, out.Devices[len(out.Devices)-1].Id)
			break
		}
		out.Devices = append(out.Devices, info)
	}
	return out, nil
}

// info is a device as the registry and its newest frame show it.
func (p *devicesPart) info(e identity.Entry) *pb.DeviceInfo {
	i := &pb.DeviceInfo{Id: e.ID, Status: string(e.Status)}
	var d identity.Device
	if json.Unmarshal(e.Body, &d) == nil { // it was checked when it was filed
		i.Junction, i.Key = string(d.Junction), hex.EncodeToString(d.Key)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if h := p.heard[traffic.DeviceID(e.ID)]; h != nil {
		i.ClockOffset, i.LastReceipt = durationpb.New(h.offset()), timestamp(h.at)
	}
	return i
}
