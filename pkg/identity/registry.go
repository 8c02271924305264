package identity

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/merkle"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// EntryType says what a registry entry describes.
type EntryType string

// The types of entry.
const (
	TypeDevice    EntryType = "device"
	TypeService   EntryType = "service"
	TypeOfficial  EntryType = "official"
	TypeValidator EntryType = "validator"
	TypeJunction  EntryType = "junction"
	TypePolicy    EntryType = "policy"
	TypeSoftware  EntryType = "software"
	TypeAgency    EntryType = "agency"
	TypeSharing   EntryType = "sharing"
	// TypeGovernance has one entry, [GovernanceID].
	TypeGovernance EntryType = "governance"
	// TypeFeature is a rule of the state machine that begins at a height: see
	// [Feature].
	TypeFeature EntryType = "feature"
	// TypeRetention has one entry, [RetentionID]. Holds keep records for a case,
	// redactions are the tombstones of records.
	TypeRetention EntryType = "retention"
	TypeHold      EntryType = "hold"
	TypeRedaction EntryType = "redaction"
	// TypeAccess has one entry, [AccessID]: see [AccessPolicy]. A client acts for
	// an agency: see [Client].
	TypeAccess EntryType = "access"
	TypeClient EntryType = "client"
	// TypeFleet lists the vehicles of the agency of the same id: see [Fleet].
	TypeFleet EntryType = "fleet"
	// TypeClaim is the right to bring in one device: see [Claim]. A used one is
	// revoked.
	TypeClaim EntryType = "claim"
)

// A plan has no type: it is part of its junction's definition, which is checked
// as a whole.

// known reports whether t is one of the types above.
func known(t EntryType) bool {
	switch t {
	case TypeDevice, TypeService, TypeOfficial, TypeValidator, TypeJunction, TypePolicy, TypeSoftware, TypeAgency, TypeSharing, TypeGovernance, TypeFeature, TypeRetention, TypeHold, TypeRedaction, TypeAccess, TypeClient, TypeFleet, TypeClaim:
		return true
	}
	return false
}

// PublicKey is an Ed25519 public key, in JSON as 64 hex digits.
type PublicKey ed25519.PublicKey

// MarshalText writes the key as hex.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(k)), nil }

// UnmarshalText reads 64 hex digits.
func (k *PublicKey) UnmarshalText(b []byte) error {
	v, err := hex.DecodeString(string(b))
	if err != nil || len(v) != ed25519.PublicKeySize {
		return fmt.Errorf("public key: must be %d hex digits", 2*ed25519.PublicKeySize)
	}
	*k = v
	return nil
}

// Device is the body of a device entry: a roadside unit.
type Device struct {
	Junction traffic.JunctionID `json:"junction"`
	Key      PublicKey          `json:"key"`
	// Detectors that the device may speak for. Empty: all of its junction's.
	Detectors []traffic.DetectorID `json:"detectors,omitempty"`
	// Former are the keys that were replaced, the oldest first.
	Former []PublicKey `json:"former,omitempty"`
	// Enrolled is what brought the key in, where no official filed it.
	Enrolled *Enrolled `json:"enrolled,omitempty"`
}

// Service is the body of a service entry: a part of the district's own software.
type Service struct {
	Key PublicKey `json:"key"`
	// Signs lists the kinds of record that the service may sign.
	Signs []RecordKind `json:"signs"`
}

// Official is the body of an official's entry: a person with an office.
type Official struct {
	Key        PublicKey `json:"key"`
	Department string    `json:"department"`
	// Roles, for instance "registrar". Who has any may send changes to the
	// registry; which role a change needs says [Governance].
	Roles []string `json:"roles"`
}

// The roles of officials that new districts ask for: registrars file devices,
// enrollers claims by which devices come themselves, and retire devices, planners junctions with their plans and policies, governors everything else.
// A registry without governance knows registrars only.
const (
	Registrar = "registrar"
	Enroller  = "enroller"
	Planner   = "planner"
	Governor  = "governor"
)

// Validator is the body of a validator's entry. Voting and cosigning keys are
// different keys, so that neither can be made to sign for the other.
type Validator struct {
	Number     uint64    `json:"number"` // from 1; never used again
	Department string    `json:"department"`
	VoteKey    PublicKey `json:"vote_key"`
	CosignKey  PublicKey `json:"cosign_key"`
	// Former are the keys that were replaced, the oldest first.
	Former []PublicKey `json:"former,omitempty"`
}

// Policy is the body of a policy entry: what signal-control decides by.
type Policy struct {
	Version    string `json:"version"`
	Controller string `json:"controller"`
	Rules      string `json:"rules"`
}

// Agency is the body of an agency's entry: somebody outside the district's own
// departments who may ask for something.
type Agency struct {
	Name string    `json:"name"`
	Key  PublicKey `json:"key"`
}

// Sharing is the body of an entry that says what may cross to a neighbouring
// district, whose id is that of the entry.
type Sharing struct {
	Version string `json:"version"`
	// Classes, in rising order, of checkpoint, commitment, aggregate and corridor.
	// Raw frames and personal data are in none of them.
	Classes []string `json:"classes"`
}

// shareable are the classes that may ever cross a border.
var shareable = []string{"aggregate", "checkpoint", "commitment", "corridor"}

// Status of an entry.
type Status string

// The states of an entry. An id is never used again.
const (
	Active  Status = "active"
	Revoked Status = "revoked"
)

// Entry is one line of the registry.
type Entry struct {
	Type   EntryType `json:"type"`
	ID     string    `json:"id"`
	Status Status    `json:"status"`
	// Since is the height of the block whose record made the entry what it is;
	// 0 for genesis. It is in force from the block after.
	Since uint64 `json:"since"`
	// Body is JSON by type, as it was filed but for insignificant white space.
	Body json.RawMessage `json:"body"`
}

const entryDomain = "stopline registry entry v1\n"

// Marshal returns the encoding that the registry's hash is over: the domain
// line, then type, id, status and since on a line each, then the body.
func (e Entry) Marshal() []byte {
	return fmt.Appendf(nil, "%s%s\n%s\n%s\n%d\n%s", entryDomain, e.Type, e.ID, e.Status, e.Since, e.Body)
}

// ParseEntry decodes what [Entry.Marshal] wrote.
func ParseEntry(b []byte) (Entry, error) {
	p := strings.SplitN(string(b), "\n", 6)
	if len(p) != 6 || p[0]+"\n" != entryDomain {
		return Entry{}, errors.New("registry entry: not in the form of stopline registry entry v1")
	}
	since, err := strconv.ParseUint(p[4], 10, 64)
	if err != nil {
		return Entry{}, fmt.Errorf("registry entry: since: %w", err)
	}
	e := Entry{Type: EntryType(p[1]), ID: p[2], Status: Status(p[3]), Since: since, Body: json.RawMessage(p[5])}
	if !bytes.Equal(e.Marshal(), b) {
		return Entry{}, errors.New("registry entry: not in canonical form")
	}
	if e.Status != Active && e.Status != Revoked {
		return Entry{}, fmt.Errorf("registry entry: status %q: must be active or revoked", e.Status)
	}
	return e, nil
}

// Change is the payload of a registry record.
type Change struct {
	District traffic.DistrictID `json:"district"`
	Action   string             `json:"action"` // put or revoke
	Type     EntryType          `json:"type"`
	ID       string             `json:"id"`
	Body     json.RawMessage    `json:"body,omitempty"`
	// Nonce makes the record unlike every other of its signer, and of everybody
	// who approves it.
	Nonce uint64 `json:"nonce"`
	// Base is what the change was made to, see [Registry.Base]. It is checked
	// where it is given, and must be where there are approvals.
	Base Digest `json:"base,omitempty"`
	// Until is the last height at which the change may be carried out; 0 is any.
	// What was signed and then forgotten should not come to life years later.
	Until uint64 `json:"until,omitempty"`
	// Approvals of other officials than the record's signer, in any order.
	Approvals []Approval `json:"approvals,omitempty"`
}

// Genesis is the agreed beginning of a district: its hash is the parent of
// block 1.
type Genesis struct {
	District traffic.DistrictID `json:"district"`
	// Origin is the log's name in checkpoints, C2SP tlog-checkpoint.
	Origin string `json:"origin"`
	// LogKey is the log's verifier key in note form (sumdb/note).
	LogKey string `json:"log_key"`
	// CreatedUnixMS is when it was agreed; block 1 is later.
	CreatedUnixMS int64   `json:"created_unix_ms"`
	Entries       []Entry `json:"entries"`
}

// ParseGenesis decodes a genesis document, refusing unknown fields.
func ParseGenesis(b []byte) (*Genesis, error) {
	var g Genesis
	if err := strict(b, &g); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	return &g, nil
}

func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	// Not More: that takes a stray bracket for the end.
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the end of the document")
	}
	return nil
}

// Holder is who a key belongs to.
type Holder struct {
	Type   EntryType
	ID     string
	Status Status
	Key    ed25519.PublicKey
	// Kinds that the holder may sign.
	Kinds []RecordKind
}

// May reports whether the holder may sign records of kind k.
func (h Holder) May(k RecordKind) bool { return slices.Contains(h.Kinds, k) }

type nonceKey struct {
	key   KeyID
	nonce uint64
}

// Registry is the deterministic state that all validators hold alike. It is not
// safe for concurrent use while [Registry.Apply] runs; readers take
// [Registry.Clone] or their own lock.
type Registry struct {
	district   traffic.DistrictID
	version    uint64
	entries    map[string]Entry // by type, NUL, id
	holders    map[KeyID]Holder
	devices    map[traffic.DeviceID]Device
	junctions  map[traffic.JunctionID]*traffic.Junction
	validators map[uint64]Validator
	// membersSince is the newest Since of a validator's entry.
	membersSince uint64
	governance   *Governance       // nil without an entry
	features     map[string]uint64 // name to first height
	retention    *Retention        // nil without an entry
	holds        map[string]*Hold  // those in force; never changed in place
	// fleets are the vehicles of each agency, by id; never changed in place.
	fleets  map[string]map[string]Vehicle
	nonces  map[nonceKey]bool
	tree    *merkle.Tree // nil until asked for after a change
	loading bool         // a snapshot, whose entries were checked when they were filed
	order   []string
}

// NewRegistry returns the state that a genesis document describes.
func NewRegistry(g *Genesis) (*Registry, error) {
	r := &Registry{
		district: g.District, entries: map[string]Entry{}, holders: map[KeyID]Holder{},
		devices: map[traffic.DeviceID]Device{}, junctions: map[traffic.JunctionID]*traffic.Junction{},
		validators: map[uint64]Validator{}, nonces: map[nonceKey]bool{}, features: map[string]uint64{},
	}
	if g.District == "" {
		return nil, errors.New("genesis: district: must not be empty")
	}
	var errs []error
	// Junctions come first: a device names one. Governance comes last: it must be
	// possible with the officials there are.
	for pass := range passes {
		for i, e := range g.Entries {
			if passOf(e.Type) != pass {
				continue
			}
			if e.Status != Active && e.Status != "" || e.Since != 0 {
				errs = append(errs, fmt.Errorf("genesis: entries[%d]: status %q since %d: every entry begins active, at 0", i, e.Status, e.Since))
				continue
			}
			if err := r.put(0, e.Type, e.ID, e.Body); err != nil {
				errs = append(errs, fmt.Errorf("genesis: entries[%d]: %w", i, err))
			}
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return r, nil
}

const passes = 3

// passOf says in which order types are loaded.
func passOf(t EntryType) int {
	switch t {
	case TypeJunction:
		return 0
	case TypeGovernance, TypeClient, TypeFleet: // of officials, of agencies
		return 2
	}
	return 1
}

// Clone returns a copy that can be changed without changing r.
func (r *Registry) Clone() *Registry {
	c := *r
	c.entries, c.holders = maps.Clone(r.entries), maps.Clone(r.holders)
	c.devices, c.junctions = maps.Clone(r.devices), maps.Clone(r.junctions)
	c.validators, c.nonces = maps.Clone(r.validators), maps.Clone(r.nonces)
	c.features = maps.Clone(r.features)
	return &c
}

// District returns the district that the registry is of.
func (r *Registry) District() traffic.DistrictID { return r.district }

// Version counts the changes since genesis.
func (r *Registry) Version() uint64 { return r.version }

// Holder returns who a key belongs to, revoked holders included.
func (r *Registry) Holder(k KeyID) (Holder, bool) {
	h, ok := r.holders[k]
	return h, ok
}

// Device returns a device's entry; its status is with its [Holder].
func (r *Registry) Device(id traffic.DeviceID) (Device, bool) {
	d, ok := r.devices[id]
	return d, ok
}

// Junction returns the definition in force. Callers must not change it.
func (r *Registry) Junction(id traffic.JunctionID) (*traffic.Junction, bool) {
	j, ok := r.junctions[id]
	return j, ok
}

// Junctions returns all definitions, ordered by id.
func (r *Registry) Junctions() []*traffic.Junction {
	return slices.SortedFunc(maps.Values(r.junctions), func(a, b *traffic.Junction) int {
		return strings.Compare(string(a.ID), string(b.ID))
	})
}

// Validators returns the active validators, ordered by number.
func (r *Registry) Validators() []Validator {
	return slices.SortedFunc(maps.Values(r.validators), func(a, b Validator) int {
		return cmp.Compare(a.Number, b.Number) // not a difference: an int may have 32 bits
	})
}

// Entry returns one entry.
func (r *Registry) Entry(t EntryType, id string) (Entry, bool) {
	e, ok := r.entries[entryKey(t, id)]
	return e, ok
}

// Entries returns the entries of a type, ordered by id; of all types, ordered by
// type and id, where t is empty.
func (r *Registry) Entries(t EntryType) []Entry {
	r.build()
	var out []Entry
	for _, k := range r.order {
		if e := r.entries[k]; t == "" || e.Type == t {
			out = append(out, e)
		}
	}
	return out
}

// Apply checks a change against the state and, if every rule is met, carries it
// out; otherwise the state is as before. Who must have signed it says the
// governance in force, see [Governance]. signer must be the verified signer of
// the record, height the block that holds it.
func (r *Registry) Apply(height uint64, signer KeyID, c Change) error {
	h, ok := r.holders[signer]
	switch {
	case !ok:
		return kind.Errorf(kind.Denied, "key_id: %s is not in the registry", signer)
	case h.Status != Active:
		return kind.Errorf(kind.Denied, "key_id: %s %s is revoked", h.Type, h.ID)
	case c.District != r.district:
		return kind.Errorf(kind.Invalid, "district: %q, this is %q", c.District, r.district)
	case c.Until != 0 && height > c.Until:
		return kind.Errorf(kind.Stale, "until: the change was to be carried out by block %d, this is %d", c.Until, height)
	case r.nonces[nonceKey{signer, c.Nonce}]:
		return kind.Errorf(kind.Conflict, "nonce: %d was used by this signer before", c.Nonce)
	}
	signers, err := r.approved(height, signer, h, c)
	if err != nil {
		return err
	}
	switch c.Action {
	case Put:
		err = r.put(height, c.Type, c.ID, c.Body)
	case Revoke:
		err = r.revoke(height, c.Type, c.ID)
	default:
		err = kind.Errorf(kind.Invalid, "action: %.20q: must be put or revoke", c.Action)
	}
	if err != nil {
		return err
	}
	for _, k := range signers {
		r.nonces[nonceKey{k, c.Nonce}] = true
	}
	r.version++
	return nil
}

// MaxID is the longest id of an entry, bytes. Junctions that SUMO's importers
// have joined are named after all their parts.
const MaxID = 512

func entryKey(t EntryType, id string) string { return string(t) + "\x00" + id }

func (r *Registry) put(height uint64, t EntryType, id string, body json.RawMessage) error {
	if id == "" || len(id) > MaxID || strings.ContainsFunc(id, func(c rune) bool { return c < ' ' }) {
		return kind.Errorf(kind.Invalid, "id: %.40q: 1 to %d bytes without control characters", id, MaxID)
	}
	old, exists := r.entries[entryKey(t, id)]
	replace := t == TypeJunction || t == TypePolicy || t == TypeSharing || t == TypeGovernance || t == TypeValidator || t == TypeFeature || t == TypeRetention || t == TypeAccess || t == TypeClient || t == TypeFleet || t == TypeDevice && r.Active(FeatureEnrolment, height)
	if exists && (old.Status == Revoked || !replace) {
		return kind.Errorf(kind.Conflict, "id: %s %q was used before; ids are never used again", t, id)
	}
	var key PublicKey
	var fresh []newKey // of a validator or a device
	var kinds []RecordKind
	var done func()
	switch t {
	case TypeDevice:
		keys, set, err := r.putDevice(height, id, body)
		if err != nil {
			return err
		}
		fresh, done = keys, set
	case TypeService:
		var s Service
		if err := parseBody(body, &s); err != nil {
			return err
		}
		for i, k := range s.Signs {
			if !k.Valid() || k == KindFrame || k.ChangesRegistry() {
				return kind.Errorf(kind.Invalid, "body.signs[%d]: a service may not sign %.20q", i, string(k))
			}
		}
		key, kinds = s.Key, append([]RecordKind{}, s.Signs...) // not nil: the key is taken even if it signs nothing
	case TypeOfficial:
		var o Official
		if err := parseBody(body, &o); err != nil {
			return err
		}
		if o.Department == "" {
			return kind.Errorf(kind.Invalid, "body.department: must not be empty")
		}
		key, kinds = o.Key, []RecordKind{KindRequest}
		if len(o.Roles) > 0 {
			kinds = append(kinds, KindRegistry, KindRedaction)
		}
	case TypeValidator:
		_, keys, set, err := r.putValidator(height, id, body)
		if err != nil {
			return err
		}
		fresh, done = keys, set
	case TypeJunction:
		j, err := traffic.ParseJunction(body)
		if err != nil {
			return kind.Errorf(kind.Invalid, "body: %w", err)
		}
		if string(j.ID) != id {
			return kind.Errorf(kind.Invalid, "body.id: %q, the entry is %q", j.ID, id)
		}
		if err := portable(j); err != nil && !r.loading {
			return err
		}
		done = func() { r.junctions[j.ID] = j }
	case TypePolicy:
		var p Policy
		if err := parseBody(body, &p); err != nil {
			return err
		}
		if p.Version == "" || p.Controller == "" {
			return kind.Errorf(kind.Invalid, "body: version and controller must not be empty")
		}
	case TypeSoftware:
		if !json.Valid(body) {
			return kind.Errorf(kind.Invalid, "body: must be JSON")
		}
	case TypeAgency:
		var a Agency
		if err := parseBody(body, &a); err != nil {
			return err
		}
		if a.Name == "" {
			return kind.Errorf(kind.Invalid, "body.name: must not be empty")
		}
		key, kinds = a.Key, []RecordKind{KindRequest}
	case TypeSharing:
		var s Sharing
		if err := parseBody(body, &s); err != nil {
			return err
		}
		if err := s.check(r.district, id); err != nil {
			return err
		}
	case TypeGovernance:
		g := new(Governance)
		if err := parseBody(body, g); err != nil {
			return err
		}
		if id != GovernanceID {
			return kind.Errorf(kind.Invalid, "id: %.40q: the one governance entry is %q", id, GovernanceID)
		}
		if err := g.check(); err != nil {
			return err
		}
		if !r.loading {
			if err := r.possible(g, ""); err != nil {
				return err
			}
		}
		done = func() { r.governance = g }
	case TypeRetention, TypeHold, TypeRedaction:
		set, err := r.putKept(height, t, id, body)
		if err != nil {
			return err
		}
		done = set
	case TypeAccess, TypeClient, TypeFleet:
		if err := r.putAccess(height, t, id, body); err != nil {
			return err
		}
	case TypeClaim:
		if err := r.putClaim(height, id, body); err != nil {
			return err
		}
	case TypeFeature:
		set, err := r.putFeature(height, id, body)
		if err != nil {
			return err
		}
		done = set
	default:
		return kind.Errorf(kind.Invalid, "type: %.20q is unknown", string(t))
	}
	// From here on the state changes, and nothing may fail.
	var compact bytes.Buffer
	if err := json.Compact(&compact, body); err != nil {
		return kind.Errorf(kind.Invalid, "body: %w", err)
	}
	if kinds != nil {
		fresh = []newKey{{"body.key", key, Active}}
	}
	for i, k := range fresh {
		if err := r.free(k.field, k.key); err != nil {
			return err
		}
		for _, other := range fresh[:i] {
			if bytes.Equal(other.key, k.key) {
				return kind.Errorf(kind.Conflict, "%s: is the key in %s too", k.field, other.field)
			}
		}
	}
	for _, k := range fresh {
		if k.field == "body.vote_key" {
			kinds = []RecordKind{KindDeletion} // a validator keeps payloads too
		} else if t == TypeValidator {
			kinds = nil
		} else if t == TypeDevice {
			kinds = []RecordKind{KindFrame}
		}
		r.holders[IDOf(ed25519.PublicKey(k.key))] = Holder{Type: t, ID: id, Status: k.status, Key: ed25519.PublicKey(k.key), Kinds: kinds}
	}
	if done != nil {
		done()
	}
	r.set(Entry{Type: t, ID: id, Status: Active, Since: height, Body: compact.Bytes()})
	return nil
}

// free checks that a key can be trusted to be one, and belongs to nobody.
func (r *Registry) free(field string, key PublicKey) error {
	if len(key) != ed25519.PublicKeySize {
		return kind.Errorf(kind.Invalid, "%s: missing", field)
	}
	if !strongKey(ed25519.PublicKey(key)) {
		return kind.Errorf(kind.Invalid, "%s: is no point of the curve's prime-order group", field)
	}
	kid := IDOf(ed25519.PublicKey(key))
	if h, ok := r.holders[kid]; ok {
		return kind.Errorf(kind.Conflict, "%s: %s belongs to %s %q already", field, kid, h.Type, h.ID)
	}
	return nil
}

func (r *Registry) revoke(height uint64, t EntryType, id string) error {
	e, ok := r.entries[entryKey(t, id)]
	if !ok {
		return kind.Errorf(kind.NotFound, "id: no %s %.40q", t, id)
	}
	if e.Status == Revoked {
		return kind.Errorf(kind.Conflict, "id: %s %q is revoked already", t, id)
	}
	if t != TypeDevice && t != TypeService && t != TypeOfficial && t != TypeAgency && t != TypeValidator && t != TypeFeature && t != TypeHold && t != TypeClient && t != TypeFleet && t != TypeClaim {
		return kind.Errorf(kind.Invalid, "type: a %.20s cannot be revoked", string(t))
	}
	if t == TypeValidator {
		if err := r.mayLeave(height); err != nil {
			return err
		}
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			return err // unreachable: the entry was filed under its number
		}
		delete(r.validators, n)
	}
	if t == TypeHold {
		r.holds = maps.Clone(r.holds) // shared with clones
		delete(r.holds, id)
	}
	if t == TypeFeature {
		if err := r.pending(height, id); err != nil && !r.loading {
			return err
		}
		delete(r.features, id)
	}
	// Without governance the last registrar may go: so it was from the start.
	if g, filed := r.Governance(); filed && t == TypeOfficial && !r.loading {
		if err := r.possible(g, id); err != nil {
			return kind.Errorf(kind.Conflict, "id: without official %q: %w; appoint another first", id, err)
		}
	}
	for kid, h := range r.holders { // each on its own, so the order is no matter
		if h.Type == t && h.ID == id {
			h.Status = Revoked
			r.holders[kid] = h
		}
	}
	e.Status, e.Since = Revoked, height
	r.set(e)
	return nil
}

func (r *Registry) set(e Entry) {
	if e.Type == TypeValidator {
		r.membersSince = max(r.membersSince, e.Since)
	}
	if e.Type == TypeFleet {
		r.setFleet(e)
	}
	r.entries[entryKey(e.Type, e.ID)] = e
	r.tree, r.order = nil, nil
}

func (s Sharing) check(own traffic.DistrictID, id string) error {
	if s.Version == "" {
		return kind.Errorf(kind.Invalid, "body.version: must not be empty")
	}
	if id == string(own) {
		return kind.Errorf(kind.Invalid, "id: %q is this district, not a neighbour", id)
	}
	for i, c := range s.Classes {
		if !slices.Contains(shareable, c) || i > 0 && c <= s.Classes[i-1] {
			return kind.Errorf(kind.Invalid, "body.classes[%d]: %.20q: must be of %s, in this order and once", i, c, strings.Join(shareable, ", "))
		}
	}
	return nil
}

// portable refuses figures of a definition that only 64-bit validators could
// read: the others would refuse the change, and the registries differ.
func portable(j *traffic.Junction) error {
	small := func(v int) bool { return int64(v) >= math.MinInt32 && int64(v) <= math.MaxInt32 }
	bad := func(field string, i, v int) error {
		return kind.Errorf(kind.Invalid, "body."+field+": %d: must fit 32 bits", i, v)
	}
	for i, l := range j.Lanes {
		if !small(l.Capacity) {
			return bad("lanes[%d].capacity", i, l.Capacity)
		}
	}
	for i, m := range j.Movements {
		if !small(m.SaturationPerHour) {
			return bad("movements[%d].saturation_per_hour", i, m.SaturationPerHour)
		}
	}
	for i, d := range j.Detectors {
		if !small(d.Group) {
			return bad("detectors[%d].group", i, d.Group)
		}
	}
	for i, gs := range j.Yields {
		for _, g := range gs {
			if !small(g) {
				return bad("yields[%d]", i, g)
			}
		}
	}
	return nil
}

func parseBody(b json.RawMessage, v any) error {
	if err := strict(b, v); err != nil {
		return kind.Errorf(kind.Invalid, "body: %w", err)
	}
	return nil
}

func (r *Registry) build() {
	if r.tree != nil {
		return
	}
	order := make([]string, 0, len(r.entries))
	for k := range r.entries {
		order = append(order, k)
	}
	sort.Strings(order)
	leaves := make([][]byte, len(order))
	for i, k := range order {
		leaves[i] = r.entries[k].Marshal()
	}
	r.order, r.tree = order, merkle.New(leaves)
}

// Hash returns the state's hash: the RFC 6962 root over all entries, each in the
// form of [Entry.Marshal], ordered by type and id. It also covers what decides
// whether a later change is valid, but for used nonces, which every holder of
// the blocks can recompute.
func (r *Registry) Hash() merkle.Hash {
	r.build()
	return r.tree.Root()
}

// Excerpt is one entry with the proof that it is in a state with a given hash.
type Excerpt struct {
	Entry []byte        `json:"entry"`
	Index int64         `json:"index"`
	Size  int64         `json:"size"`
	Proof []merkle.Hash `json:"proof"`
}

// Prove returns the excerpt of one entry.
func (r *Registry) Prove(t EntryType, id string) (Excerpt, error) {
	r.build()
	k := entryKey(t, id)
	i, ok := slices.BinarySearch(r.order, k)
	if !ok {
		return Excerpt{}, kind.Errorf(kind.NotFound, "registry: no %s %q", t, id)
	}
	p, err := r.tree.Prove(int64(i))
	if err != nil {
		return Excerpt{}, err
	}
	return Excerpt{Entry: r.entries[k].Marshal(), Index: int64(i), Size: r.tree.Len(), Proof: p}, nil
}

// ProveAt returns the excerpt of the entry at an index in the registry's order:
// by type and id.
func (r *Registry) ProveAt(i int64) (Excerpt, error) {
	r.build()
	p, err := r.tree.Prove(i)
	if err != nil {
		return Excerpt{}, err
	}
	return Excerpt{Entry: r.entries[r.order[i]].Marshal(), Index: i, Size: r.tree.Len(), Proof: p}, nil
}

// Check verifies the excerpt against a registry hash and returns its entry.
func (x Excerpt) Check(hash merkle.Hash) (Entry, error) {
	if err := merkle.Check(x.Proof, x.Size, hash, x.Index, x.Entry); err != nil {
		return Entry{}, fmt.Errorf("registry excerpt: %w", err)
	}
	return ParseEntry(x.Entry)
}

// Keys returns the public keys that an entry holds: one for most, the vote key
// and the cosigning key for a validator, none for a junction.
func (e Entry) Keys() ([]ed25519.PublicKey, error) {
	var keys []PublicKey
	var err error
	switch e.Type {
	case TypeDevice:
		var d Device
		err = parseBody(e.Body, &d)
		keys = []PublicKey{d.Key}
	case TypeService:
		var s Service
		err = parseBody(e.Body, &s)
		keys = []PublicKey{s.Key}
	case TypeOfficial:
		var o Official
		err = parseBody(e.Body, &o)
		keys = []PublicKey{o.Key}
	case TypeAgency:
		var a Agency
		err = parseBody(e.Body, &a)
		keys = []PublicKey{a.Key}
	case TypeValidator:
		var v Validator
		err = parseBody(e.Body, &v)
		keys = []PublicKey{v.VoteKey, v.CosignKey}
	}
	if err != nil {
		return nil, err
	}
	out := make([]ed25519.PublicKey, len(keys))
	for i, k := range keys {
		out[i] = ed25519.PublicKey(k)
	}
	return out, nil
}

// ParseChange decodes a change from the JSON payload of a registry record.
func ParseChange(b []byte) (Change, error) {
	var c Change
	if err := strict(b, &c); err != nil {
		return Change{}, kind.Errorf(kind.Invalid, "registry change: %w", err)
	}
	return c, nil
}
