// Package district makes and opens a district's folder: its keys, its genesis
// document and the policy by which outsiders check its log.
//
//	DIR/genesis.json   what all validators agree to begin from
//	DIR/policy         C2SP tlog-policy: give this to whoever is to verify
//	DIR/keys/NAME.key  private keys, one file each, 64 hex digits of the seed
//	                   of officials, too, one of whom is the registrar: on a
//	                   district's own machines each would keep theirs at home
//	DIR/keys/log.key   the log's key in the form of sumdb/note
//	DIR/keys/device-tokens.key  signs device tokens; made when first needed
//	DIR/boot           how often devices were started; written before it is used
//
// It is for districts that live in one folder, such as the demo's. Where
// departments run their own validators each of them makes its own keys, and
// nobody ever holds this folder.
package district

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Options say what a new district is to be.
type Options struct {
	ID         traffic.DistrictID
	Junctions  []*traffic.Junction
	Validators int // 3f+1 or more; 4 by default
	// Policy that signal-control decides by.
	Policy     identity.Policy
	PolicyName string
	Created    time.Time
	Rand       io.Reader // nil: crypto/rand
	// Witnesses cosign the log besides the validators; at least NeedWitnesses of
	// them must, or nothing is sealed.
	Witnesses     []ledger.Witness
	NeedWitnesses int
}

// District is an open folder. Its fields must not be changed.
type District struct {
	Dir         string
	Genesis     identity.Genesis
	GenesisJSON []byte
	GenesisHash ledger.Hash
	// Policy is the tlog-policy file's content.
	Policy []byte
	// LogKey is the log's signing key in note form.
	LogKey string
}

// Departments that run the validators of a demo district.
var departments = []string{"traffic", "police", "ambulance", "audit", "transit", "fire", "courts"}

// DeviceID returns the id of the roadside unit of a junction.
func DeviceID(j traffic.JunctionID) traffic.DeviceID { return traffic.DeviceID("rsu-" + string(j)) }

// Names of keys that every district has.
const (
	SignalControlKey = "signal-control"
	RegistrarKey     = "registrar"
	ImporterKey      = "importer" // brings in controllers' logs
	SealingKey       = "sealing"  // signs receipts of deletion
)

// The officials besides the registrar, each of another department.
const (
	PoliceOfficial    = "official-police"
	AmbulanceOfficial = "official-ambulance"
)

// DeskKey is the official whose key the gateway holds, so that technicians can
// have claims made and devices retired at any hour. It can do that and nothing
// else: a device comes in by its claim's key, not by the desk's. A district that
// trusts no key on a server with as much gives the rule for claims to officials
// who sign them beforehand.
const DeskKey = "enrolment-desk"

// Governance is what a new district begins with: one registrar files devices, one
// enroller files claims and retires devices, planners of two departments junctions
// and policies, governors of two departments everything else. There are three
// planners and governors, so that any one may be away, or dismissed by the others.
func Governance() identity.Governance {
	two := func(role string) identity.Need { return identity.Need{Role: role, Officials: 2, Departments: 2} }
	return identity.Governance{Version: 1, Rules: []identity.Rule{
		{Type: identity.TypeDevice, Need: identity.Need{Role: identity.Registrar, Officials: 1, Departments: 1}},
		{Type: identity.TypeDevice, Action: identity.Revoke, Need: identity.Need{Role: identity.Enroller, Officials: 1, Departments: 1}},
		{Type: identity.TypeClaim, Need: identity.Need{Role: identity.Enroller, Officials: 1, Departments: 1}},
		{Type: identity.TypeJunction, Need: two(identity.Planner)},
		{Type: identity.TypePolicy, Need: two(identity.Planner)},
	}, Default: two(identity.Governor)}
}

// VoteKey and CosignKey name the keys of validator n.
func VoteKey(n uint64) string   { return fmt.Sprintf("validator-%d-vote", n) }
func CosignKey(n uint64) string { return fmt.Sprintf("validator-%d-cosign", n) }

// Open opens the folder, making the district first if there is none yet. A
// folder that was half made is refused rather than repaired: its genesis was
// never agreed to.
func Open(dir string, o Options) (*District, error) {
	if _, err := os.Stat(filepath.Join(dir, "genesis.json")); errors.Is(err, fs.ErrNotExist) {
		if err := create(dir, o); err != nil {
			return nil, fmt.Errorf("making a district in %s: %w", dir, err)
		}
	}
	return Load(dir)
}

// Load opens a district that exists.
func Load(dir string) (*District, error) {
	d := &District{Dir: dir}
	var err error
	if d.GenesisJSON, err = os.ReadFile(filepath.Join(dir, "genesis.json")); err != nil {
		return nil, fmt.Errorf("district: %w", err)
	}
	g, err := identity.ParseGenesis(d.GenesisJSON)
	if err != nil {
		return nil, fmt.Errorf("district %s: %w", dir, err)
	}
	d.Genesis, d.GenesisHash = *g, sha256.Sum256(d.GenesisJSON)
	if d.Policy, err = os.ReadFile(filepath.Join(dir, "policy")); err != nil {
		return nil, fmt.Errorf("district: %w", err)
	}
	k, err := os.ReadFile(filepath.Join(dir, "keys", "log.key"))
	if err != nil {
		return nil, fmt.Errorf("district: %w", err)
	}
	d.LogKey = strings.TrimSpace(string(k))
	return d, nil
}

func create(dir string, o Options) error {
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Validators == 0 {
		o.Validators = 4
	}
	if o.ID == "" || o.Validators < 1 || o.Validators > len(departments) {
		return fmt.Errorf("id must be given and validators be 1 to %d, got %q and %d", len(departments), o.ID, o.Validators)
	}
	keys := filepath.Join(dir, "keys")
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return err
	}
	origin := ledger.Origin(o.ID)
	logKey, logVKey, err := note.GenerateKey(o.Rand, origin)
	if err != nil {
		return err
	}
	g := identity.Genesis{District: o.ID, Origin: origin, LogKey: logVKey, CreatedUnixMS: o.Created.UnixMilli()}
	entry := func(t identity.EntryType, id string, body any) error {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		g.Entries = append(g.Entries, identity.Entry{Type: t, ID: id, Status: identity.Active, Body: b})
		return nil
	}
	var policy bytes.Buffer
	fmt.Fprintf(&policy, "log %s\n", logVKey)
	var names []string
	for n := uint64(1); n <= uint64(o.Validators); n++ {
		vote, err := newKey(o.Rand, keys, VoteKey(n))
		if err != nil {
			return err
		}
		cosign, err := newKey(o.Rand, keys, CosignKey(n))
		if err != nil {
			return err
		}
		if err := entry(identity.TypeValidator, strconv.FormatUint(n, 10), identity.Validator{
			Number: n, Department: departments[n-1], VoteKey: public(vote), CosignKey: public(cosign)}); err != nil {
			return err
		}
		c, err := ledger.NewCosigner(ledger.CosignerName(origin, n), cosign.Public().(ed25519.PublicKey))
		if err != nil {
			return err
		}
		names = append(names, departments[n-1])
		fmt.Fprintf(&policy, "witness %s %s\n", departments[n-1], c)
	}
	fmt.Fprintf(&policy, "group validators %d %s\n", ledger.Quorum(o.Validators), strings.Join(names, " "))
	if err := witnesses(&policy, o.Witnesses, o.NeedWitnesses); err != nil {
		return err
	}
	both := []string{identity.Planner, identity.Governor}
	for _, official := range []struct {
		id, department string
		roles          []string
	}{
		{RegistrarKey, "traffic", append([]string{identity.Registrar, identity.Enroller}, both...)},
		{DeskKey, "traffic", []string{identity.Enroller}},
		{PoliceOfficial, "police", both},
		{AmbulanceOfficial, "ambulance", both},
	} {
		k, err := newKey(o.Rand, keys, official.id)
		if err != nil {
			return err
		}
		if err := entry(identity.TypeOfficial, official.id, identity.Official{
			Key: public(k), Department: official.department, Roles: official.roles}); err != nil {
			return err
		}
	}
	if err := entry(identity.TypeGovernance, identity.GovernanceID, Governance()); err != nil {
		return err
	}
	control, err := newKey(o.Rand, keys, SignalControlKey)
	if err != nil {
		return err
	}
	if err := entry(identity.TypeService, SignalControlKey, identity.Service{
		Key: public(control), Signs: []identity.RecordKind{identity.KindCommand, identity.KindHealth, identity.KindPlan}}); err != nil {
		return err
	}
	importer, err := newKey(o.Rand, keys, ImporterKey)
	if err != nil {
		return err
	}
	if err := entry(identity.TypeService, ImporterKey, identity.Service{
		Key: public(importer), Signs: []identity.RecordKind{identity.KindImport}}); err != nil {
		return err
	}
	if err := fileAccess(keys, o.Rand, o.Created, entry); err != nil {
		return err
	}
	if o.PolicyName != "" {
		if err := entry(identity.TypePolicy, o.PolicyName, o.Policy); err != nil {
			return err
		}
	}
	for _, j := range o.Junctions {
		if err := entry(identity.TypeJunction, string(j.ID), j); err != nil {
			return err
		}
		k, err := newKey(o.Rand, keys, string(DeviceID(j.ID)))
		if err != nil {
			return err
		}
		if err := entry(identity.TypeDevice, string(DeviceID(j.ID)), identity.Device{Junction: j.ID, Key: public(k)}); err != nil {
			return err
		}
	}
	sealing, err := newKey(o.Rand, keys, SealingKey)
	if err != nil {
		return err
	}
	if err := entry(identity.TypeService, SealingKey, identity.Service{
		Key: public(sealing), Signs: []identity.RecordKind{identity.KindDeletion}}); err != nil {
		return err
	}
	if err := entry(identity.TypeFeature, identity.FeatureRetention, identity.Feature{From: 1}); err != nil {
		return err
	}
	if _, err := identity.NewRegistry(&g); err != nil {
		return err
	}
	doc, err := json.MarshalIndent(g, "", " ")
	if err != nil {
		return err
	}
	if err := WriteFile(filepath.Join(keys, "log.key"), []byte(logKey+"\n"), 0o600); err != nil {
		return err
	}
	if err := WriteFile(filepath.Join(dir, "policy"), policy.Bytes(), 0o644); err != nil {
		return err
	}
	// Last: a folder with a genesis document is a district.
	return WriteFile(filepath.Join(dir, "genesis.json"), doc, 0o644)
}

// witnesses ends a policy: with the validators' group, or that and some of others.
func witnesses(policy *bytes.Buffer, others []ledger.Witness, need int) error {
	if need < 0 || need > len(others) {
		return fmt.Errorf("%d of %d witnesses cannot be needed", need, len(others))
	}
	var names []string
	for _, w := range others {
		names = append(names, w.Name)
		fmt.Fprintf(policy, "witness %s %s %s\n", w.Name, w.Cosigner, w.URL)
	}
	quorum := "validators"
	if need > 0 {
		quorum = "district"
		fmt.Fprintf(policy, "group neighbours %d %s\ngroup district all validators neighbours\n", need, strings.Join(names, " "))
	}
	fmt.Fprintf(policy, "quorum %s\n", quorum)
	_, err := ledger.ParsePolicy(policy.Bytes())
	return err
}

func public(k ed25519.PrivateKey) identity.PublicKey {
	return identity.PublicKey(k.Public().(ed25519.PublicKey))
}

func keyFile(name string) string { return strings.ReplaceAll(name, "/", "_") + ".key" }

func newKey(r io.Reader, dir, name string) (ed25519.PrivateKey, error) {
	_, k, err := ed25519.GenerateKey(r)
	if err != nil {
		return nil, err
	}
	return k, WriteKey(filepath.Join(dir, keyFile(name)), k)
}

// WriteKey stores a private key as hex of its seed, readable by its owner only.
func WriteKey(path string, k ed25519.PrivateKey) error {
	return WriteFile(path, []byte(hex.EncodeToString(k.Seed())+"\n"), 0o600)
}

// ReadKey reads a private key: 64 hex digits of the seed (RFC 8032).
func ReadKey(path string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	seed, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s: must hold %d hex digits", path, 2*ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// Key returns one of the district's private keys.
func (d *District) Key(name string) (ed25519.PrivateKey, error) {
	return ReadKey(filepath.Join(d.Dir, "keys", keyFile(name)))
}

// TokenKey returns the key that signs device tokens, making it first if there is
// none yet. It is in no genesis: whoever has it may let devices in, and nobody
// can be made to believe anything by it.
func (d *District) TokenKey() (ed25519.PrivateKey, error) {
	const name = "device-tokens"
	k, err := d.Key(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	// Two programs may do this at the same time, and must end with one key: the
	// one that links its file first.
	dir := filepath.Join(d.Dir, "keys")
	tmp, err := os.MkdirTemp(dir, ".tmp-*")
	if err != nil {
		return nil, err
	}
	_, err = newKey(rand.Reader, tmp, name)
	if err == nil {
		err = os.Link(filepath.Join(tmp, keyFile(name)), filepath.Join(dir, keyFile(name)))
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err = errors.Join(err, os.RemoveAll(tmp)); err != nil {
		return nil, err
	}
	return d.Key(name)
}

// NextBoot raises and returns the boot epoch. It is on disk before it is used: a
// device that reused one would accuse itself of equivocation.
func (d *District) NextBoot() (uint64, error) {
	path := filepath.Join(d.Dir, "boot")
	var n uint64
	switch b, err := os.ReadFile(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return 0, err
	default:
		if n, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	n++
	return n, WriteFile(path, fmt.Appendf(nil, "%d\n", n), 0o644)
}

// WriteFile replaces a file as a whole: after a crash there is the old content
// or the new, never a part.
func WriteFile(path string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
