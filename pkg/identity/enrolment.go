package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// FeatureEnrolment has the registry take claims, devices that are filed by one,
// and devices' changes of their own keys.
//
// Nobody who has an official's key need be there when a device comes: the
// officials have decided before, by filing a claim for one device at one junction.
// What the claim's key signs is the device's key; the registry takes it once, and
// the claim is used up in the same step. So whoever carries the change, however
// many carry it at once, and whatever became of their keys: one claim is one
// device. That the carrier must be an official keeps strangers from making the
// validators check signatures, and decides nothing.
const FeatureEnrolment = "enrolment"

// Claim is the body of a claim's entry: the right to bring in one device, once.
// Its id is the [KeyID] of its key, and its secret is that key's seed.
type Claim struct {
	Device   traffic.DeviceID   `json:"device"`
	Junction traffic.JunctionID `json:"junction"`
	// Detectors that the device will speak for; empty for all of its junction's.
	Detectors []traffic.DetectorID `json:"detectors,omitempty"`
	Key       PublicKey            `json:"key"`
	// Until is when the claim ends by block time, RFC 3339 in UTC.
	Until string `json:"until"`
	// By is who asked for it, for people.
	By string `json:"by,omitempty"`
}

// Expires returns when the claim ends.
func (c *Claim) Expires() time.Time {
	t, err := time.Parse(time.RFC3339, c.Until)
	if err != nil {
		return time.Time{} // ended long ago; check lets no such entry in
	}
	return t
}

// maxFormer is how many keys a device may have had.
const maxFormer = 256

// Enrolled is how a device's key came into its entry, where no official filed it:
// by a claim, or by the key before it.
type Enrolled struct {
	// Claim is the claim's id; Proof is by its key over [ClaimInput].
	Claim KeyID     `json:"claim,omitempty"`
	Proof Signature `json:"proof,omitempty"`
	// OldProof and NewProof are by the key before and by the key itself, over
	// [RotateInput].
	OldProof Signature `json:"old_proof,omitempty"`
	NewProof Signature `json:"new_proof,omitempty"`
}

// ClaimInput returns the bytes that a claim's key signs for a device's key.
func ClaimInput(d traffic.DistrictID, claim KeyID, device traffic.DeviceID, key ed25519.PublicKey) []byte {
	return fmt.Appendf(nil, "stopline claim v1\n%s\n%s\n%s\n%x\n", d, claim, device, []byte(key))
}

// EnrolInput returns the bytes that a device signs with its new key, for whoever
// takes its claim: it has the key.
func EnrolInput(claim string) []byte { return fmt.Appendf(nil, "stopline enrol v1\n%s\n", claim) }

// RotateInput returns the bytes that a device signs with its old key and with the
// new one.
func RotateInput(device traffic.DeviceID, key ed25519.PublicKey) []byte {
	return append(fmt.Appendf(nil, "stopline rotate v1\n%s\n", device), key...)
}

// Claim returns a claim's entry, used or not.
func (r *Registry) Claim(id KeyID) (Claim, Entry, bool) {
	e, ok := r.entries[entryKey(TypeClaim, string(id))]
	if !ok {
		return Claim{}, e, false
	}
	var c Claim
	return c, e, parseBody(e.Body, &c) == nil
}

// putClaim checks a claim.
func (r *Registry) putClaim(height uint64, id string, body json.RawMessage) error {
	if height != 0 && !r.loading && !r.Active(FeatureEnrolment, height) {
		return kind.Errorf(kind.Invalid, "type: %s: the feature %q is not in force", TypeClaim, FeatureEnrolment)
	}
	var c Claim
	if err := parseBody(body, &c); err != nil {
		return err
	}
	if len(c.Key) != ed25519.PublicKeySize || !strongKey(ed25519.PublicKey(c.Key)) {
		return kind.Errorf(kind.Invalid, "body.key: is no Ed25519 public key of prime order")
	}
	if want := string(IDOf(ed25519.PublicKey(c.Key))); id != want {
		return kind.Errorf(kind.Invalid, "id: %.40q, the claim's key is %s", id, want)
	}
	if t, err := time.Parse(time.RFC3339, c.Until); err != nil || t.Location() != time.UTC {
		return kind.Errorf(kind.Invalid, "body.until: %.40q: must be a time in UTC, such as 2027-01-31T00:00:00Z", c.Until)
	}
	if len(c.By) > MaxID {
		return kind.Errorf(kind.Invalid, "body.by: %d bytes, at most %d", len(c.By), MaxID)
	}
	if r.loading {
		return nil // the device may be there by now, and the junction be another
	}
	if c.Device == "" || len(c.Device) > MaxID {
		return kind.Errorf(kind.Invalid, "body.device: 1 to %d bytes", MaxID)
	}
	if _, taken := r.entries[entryKey(TypeDevice, string(c.Device))]; taken {
		return kind.Errorf(kind.Conflict, "body.device: %q was used before; ids are never used again", c.Device)
	}
	return r.place(c.Junction, c.Detectors)
}

// place checks where a device is and what it may speak for.
func (r *Registry) place(at traffic.JunctionID, detectors []traffic.DetectorID) error {
	j, ok := r.junctions[at]
	if !ok {
		return kind.Errorf(kind.Invalid, "body.junction: %q is not in the registry", at)
	}
	for i, id := range detectors {
		// In a snapshot the junction may have lost the detector since.
		if _, ok := j.Detector(id); !ok && !r.loading {
			return kind.Errorf(kind.Invalid, "body.detectors[%d]: %q is not a detector of junction %s", i, id, at)
		}
	}
	return nil
}

// vouched reports whether a change needs no official's word, because a claim that
// officials have filed stands behind it, or the device's own key. An error says
// that it means to be such a change and is none.
func (r *Registry) vouched(height uint64, c Change) (bool, error) {
	if c.Action != Put || c.Type != TypeDevice {
		return false, nil
	}
	var d Device
	if parseBody(c.Body, &d) != nil || d.Enrolled == nil {
		return false, nil // put says what is wrong
	}
	if !r.Active(FeatureEnrolment, height) {
		return false, kind.Errorf(kind.Invalid, "body.enrolled: the feature %q is not in force", FeatureEnrolment)
	}
	if len(c.Approvals) > 0 {
		return false, kind.Errorf(kind.Invalid, "approvals: a device that proves its key needs none")
	}
	id, x := traffic.DeviceID(c.ID), d.Enrolled
	if x.Claim == "" {
		old, ok := r.devices[id]
		if !ok {
			return false, kind.Errorf(kind.NotFound, "id: no device %.40q", c.ID)
		}
		in := RotateInput(id, ed25519.PublicKey(d.Key))
		switch {
		case !VerifyBytes(ed25519.PublicKey(old.Key), in, x.OldProof):
			return false, kind.Errorf(kind.Denied, "body.enrolled.old_proof: is not by the key in force of device %.40q", c.ID)
		case len(d.Key) != ed25519.PublicKeySize || !VerifyBytes(ed25519.PublicKey(d.Key), in, x.NewProof):
			return false, kind.Errorf(kind.Denied, "body.enrolled.new_proof: is not by the new key")
		}
		return true, nil
	}
	claim, e, ok := r.Claim(x.Claim)
	switch {
	case !ok:
		return false, kind.Errorf(kind.NotFound, "body.enrolled.claim: %.40q is not in the registry", string(x.Claim))
	case e.Status != Active:
		return false, kind.Errorf(kind.Conflict, "body.enrolled.claim: %s was used before, or taken back", x.Claim)
	case claim.Device != id || claim.Junction != d.Junction || !slices.Equal(claim.Detectors, d.Detectors):
		return false, kind.Errorf(kind.Denied, "body.enrolled.claim: %s is for device %q at junction %s and its detectors", x.Claim, claim.Device, claim.Junction)
	case !VerifyBytes(ed25519.PublicKey(claim.Key), ClaimInput(r.district, x.Claim, id, ed25519.PublicKey(d.Key)), x.Proof):
		return false, kind.Errorf(kind.Denied, "body.enrolled.proof: is not by the claim's key over this device's")
	}
	return true, nil
}

// putDevice checks a device's entry: a new one, or the same device with another
// key, which only the key before it can bring. Which keys it had stays in its
// entry: none is used again.
func (r *Registry) putDevice(height uint64, id string, body json.RawMessage) (fresh []newKey, done func(), err error) {
	var d Device
	if err := parseBody(body, &d); err != nil {
		return nil, nil, err
	}
	if err := r.place(d.Junction, d.Detectors); err != nil {
		return nil, nil, err
	}
	device := traffic.DeviceID(id)
	old, rotates := r.devices[device]
	var former []PublicKey
	if rotates {
		switch {
		case d.Enrolled == nil || d.Enrolled.Claim != "" || height == 0:
			return nil, nil, kind.Errorf(kind.Conflict, "id: device %q was used before; ids are never used again", id)
		case d.Junction != old.Junction || !slices.Equal(d.Detectors, old.Detectors):
			return nil, nil, kind.Errorf(kind.Denied, "body: a device that changes its key stays at junction %s with its detectors", old.Junction)
		case len(old.Former) >= maxFormer:
			return nil, nil, kind.Errorf(kind.Conflict, "body.former: the device has had %d keys, which is all it may: enrol it under another id", maxFormer+1)
		}
		former = append(slices.Clone(old.Former), old.Key)
	}
	if !r.loading && !slices.EqualFunc(d.Former, former, func(a, b PublicKey) bool { return bytes.Equal(a, b) }) {
		return nil, nil, kind.Errorf(kind.Invalid, "body.former: must be the %d keys that the device had before, the oldest first", len(former))
	}
	if height == 0 && !r.loading && d.Enrolled != nil {
		return nil, nil, kind.Errorf(kind.Invalid, "body.enrolled: not in genesis")
	}
	fresh = []newKey{{"body.key", d.Key, Active}}
	if r.loading {
		for _, k := range d.Former {
			fresh = append(fresh, newKey{"body.former", k, Revoked})
		}
	}
	return fresh, func() {
		if rotates {
			k := IDOf(ed25519.PublicKey(old.Key))
			h := r.holders[k]
			h.Status = Revoked
			r.holders[k] = h
		}
		if d.Enrolled != nil && d.Enrolled.Claim != "" && !r.loading {
			e := r.entries[entryKey(TypeClaim, string(d.Enrolled.Claim))]
			e.Status, e.Since = Revoked, height
			r.set(e)
		}
		r.devices[device] = d
	}, nil
}

// ClaimKey returns the key of a claim's secret, as people carry it to the device.
// The text must have 128 random bits or more: then nobody finds it from the key,
// which everybody knows, and one hash is enough.
func ClaimKey(text string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("stopline claim key v1\n" + text))
	return ed25519.NewKeyFromSeed(seed[:])
}
