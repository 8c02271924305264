package ledger

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Outcome of verifying a bundle.
type Outcome string

// The outcomes.
const (
	// Pass: everything holds, under a policy that the verifier trusts.
	Pass Outcome = "pass"
	// Fail: something does not hold; see the findings.
	Fail Outcome = "fail"
	// Untrusted: everything fits together, and anybody could have made it: no
	// trusted policy was given.
	Untrusted Outcome = "untrusted"
)

// Report is what verifying a bundle gave. Where Outcome is Fail the rest is as
// far as verification came, and must not be relied on.
type Report struct {
	Outcome  Outcome    `json:"outcome"`
	Findings []*Finding `json:"findings,omitempty"`

	Origin  string         `json:"origin,omitempty"`
	Size    uint64         `json:"log_size,omitempty"`
	Root    string         `json:"root,omitempty"`
	Genesis string         `json:"genesis,omitempty"` // SHA-256 of the district's genesis document
	Records []RecordReport `json:"records,omitempty"`
	// Unbroken are the stretches of which the bundle holds every frame.
	Unbroken []Unbroken     `json:"unbroken,omitempty"`
	Signers  []SignerReport `json:"signers,omitempty"` // of the checkpoint
	// ExistedBy: everything in the bundle existed no later than this.
	ExistedBy *time.Time `json:"existed_no_later_than,omitempty"`
	// NotBefore: logged not before; only an anchor could say, and there is none.
	NotBefore *time.Time `json:"logged_not_before,omitempty"`
	// Fingerprints of the keys of the policy that was used, by name.
	Fingerprints map[string]string `json:"fingerprints,omitempty"`
	// Changes is how often the validators had changed, since those of the policy
	// that was used, until they cosigned the checkpoint.
	Changes int `json:"validator_changes,omitempty"`
	// HintDiffers is set where the policy in the bundle is not the trusted one.
	HintDiffers  bool     `json:"policy_hint_differs,omitempty"`
	Proves       []string `json:"proves,omitempty"`
	DoesNotProve []string `json:"does_not_prove,omitempty"`
}

// RecordReport is what was verified of one record.
type RecordReport struct {
	Index       uint64              `json:"index"`
	Height      Height              `json:"height"`
	BlockTime   time.Time           `json:"block_time"`
	Kind        identity.RecordKind `json:"kind"`
	ContentType string              `json:"content_type"`
	Signer      string              `json:"signer"` // type and id in the registry
	Key         identity.KeyID      `json:"key_id"`
	Payload     string              `json:"payload_sha256"`
	Claims      Claims              `json:"claims"`
	// LetGo is set of a tombstone: that there was a record is proven, and nothing
	// of what it said.
	LetGo bool `json:"let_go,omitempty"`
	// RedactedBy is the record in the bundle that redacted it, if it is there.
	RedactedBy *uint64 `json:"redacted_by,omitempty"`
}

// SignerReport is one signature on the checkpoint by a key of the policy.
type SignerReport struct {
	Name        string     `json:"name"`
	Role        string     `json:"role"`                 // log or cosigner
	Department  string     `json:"department,omitempty"` // by the district's registry
	Fingerprint string     `json:"fingerprint"`
	At          *time.Time `json:"at,omitempty"`
}

// Exit codes of stopline verify and stopline fsck.
const (
	ExitPass      = 0
	ExitFail      = 1
	ExitUsage     = 2
	ExitUntrusted = 3
)

// ExitCode returns the code that a command ends with.
func (r *Report) ExitCode() int {
	switch r.Outcome {
	case Pass:
		return ExitPass
	case Untrusted:
		return ExitUntrusted
	}
	return ExitFail
}

// VerifyBundle verifies a bundle by itself: that every record is the exact
// bytes that its signer signed, in a block that a quorum of the district's
// validators agreed on, in a log whose checkpoint the trusted policy accepts.
//
// With trusted nil the policy in the bundle is used and the best outcome is
// Untrusted. The error is the first finding, and nil unless the outcome is Fail.
func VerifyBundle(b []byte, trusted *Policy) (Report, error) {
	v := verifier{trusted: trusted}
	v.r.DoesNotProve = doesNotProve
	if err := v.run(b); err != nil {
		var f *Finding
		if !errors.As(err, &f) {
			f = &Finding{Reason: err.Error()}
		}
		v.r.Outcome, v.r.Findings = Fail, append(v.r.Findings, f)
		return v.r, f
	}
	v.r.Outcome = Pass
	v.r.Proves = append(slices.Clone(proves), claimed(v.r.Unbroken)...)
	if trusted == nil {
		v.r.Outcome = Untrusted
		v.r.Proves = nil
	}
	return v.r, nil
}

var proves = []string{
	"each record is the exact bytes that the holder of the named key signed",
	"a quorum of the district's validators agreed on each record, in the order of the log",
	"no record was changed, added or moved in the log up to the sealed checkpoint without breaking it",
	"everything here existed no later than the time given, unless more than f cosigners of the policy lie",
}

const leftOut = "that nothing was left out between these records, or that no other record speaks against them"

// notProven is doesNotProve for a bundle with such stretches.
func notProven(us []Unbroken) []string {
	if len(us) == 0 {
		return doesNotProve
	}
	out := slices.Clone(doesNotProve)
	out[slices.Index(out, leftOut)] = "that nothing was left out between these records but in the stretches named, or that no other record speaks against them"
	return out
}

var doesNotProve = []string{
	"that a detector measured what is true: it proves what the device said, not what happened in the street",
	"when a detector measured: times inside records are the signers' own claims",
	"not before which time a record was made: there is no earlier anchor in this bundle",
	leftOut,
	"who held a signing key: a stolen key signs as well as its owner",
}

type verifier struct {
	trusted *Policy
	policy  *Policy // trusted, or else the hint
	b       *Bundle
	sealed  *Sealed
	r       Report
}

func (v *verifier) run(raw []byte) error {
	var err error
	if v.b, err = ParseBundle(raw); err != nil {
		return err
	}
	hint, err := ParsePolicy(v.b.Policy)
	if err != nil {
		return &Finding{File: "policy", Reason: err.Error()}
	}
	v.policy = hint
	if v.trusted != nil {
		v.policy = v.trusted
		v.r.HintDiffers = !maps.Equal(hint.Fingerprints(), v.trusted.Fingerprints())
	}
	v.r.Fingerprints = v.policy.Fingerprints()
	v.sealed, err = v.policy.Open(v.b.Checkpoint)
	if n := v.b.Succession; err != nil && n != nil {
		if err := v.succeed(n); err != nil {
			return err
		}
	} else if err != nil {
		return &Finding{File: "checkpoint", Reason: err.Error()}
	}
	v.r.Origin, v.r.Size, v.r.Root = v.sealed.Origin, v.sealed.Size, hex.EncodeToString(v.sealed.Root[:])
	if at, ok := v.sealed.ExistedBy(v.policy); ok {
		v.r.ExistedBy = &at
	}
	if len(v.b.Records) == 0 {
		return &Finding{Reason: "archive: holds no record"}
	}
	for _, r := range v.b.Records {
		if !v.inBlock(r.Index) {
			return &Finding{Record: &r.Index, Reason: "is in none of the bundle's blocks"}
		}
	}
	departments := map[string]string{}
	used := 0
	for i := range v.b.Blocks {
		n, err := v.block(&v.b.Blocks[i], departments)
		if err != nil {
			return err
		}
		used += n
	}
	if used != len(v.b.Records) {
		return &Finding{Reason: "blocks: overlap"}
	}
	v.tombstones()
	if err := v.unbroken(); err != nil {
		return err
	}
	v.signers(departments)
	return nil
}

// succeed verifies the checkpoint under the policy of those validators who came
// after the ones of the policy that is trusted: the anchor, which these cosigned,
// says what genesis was, and from there each set names the next.
func (v *verifier) succeed(n *BundleSuccession) error {
	anchor, err := v.policy.Open(n.Anchor)
	if err != nil {
		return &Finding{File: "succession/proof", Reason: "neither this checkpoint nor the bundle's meets the policy: " + err.Error()}
	}
	genesis := sha256.Sum256(n.Genesis)
	if err := CheckInclusion(anchor.Checkpoint, 0, Leaf{ClassHeader, genesis}, n.Proof); err != nil {
		return &Finding{File: "succession/proof", Reason: "the genesis document is not the one that the log begins with: " + err.Error()}
	}
	steps, err := ParseSuccessionProof(n.Steps)
	if err != nil {
		return &Finding{File: "succession/steps", Reason: err.Error()}
	}
	line, err := steps.Verify(n.Genesis, v.policy)
	if err != nil {
		return &Finding{File: "succession/steps", Reason: err.Error()}
	}
	var now Council
	if v.sealed, now, err = line.OpenNewest(v.b.Checkpoint); err != nil {
		return &Finding{File: "checkpoint", Reason: err.Error()}
	}
	if v.sealed.Origin != anchor.Origin {
		return &Finding{File: "checkpoint", Reason: "is of another log than the one that the succession is of"}
	}
	v.policy = now.Policy
	v.r.Genesis, v.r.Changes = hex.EncodeToString(genesis[:]), len(steps.Steps)
	return nil
}

// inBlock reports whether one of the bundle's blocks says that it holds the leaf.
func (v *verifier) inBlock(index uint64) bool {
	for i := range v.b.Blocks {
		if h := v.b.Blocks[i].Header; index > h.PrevSize && index < h.Size {
			return true
		}
	}
	return false
}

// block verifies a block and the records in it, and returns how many these are.
func (v *verifier) block(k *BundleBlock, departments map[string]string) (records int, err error) {
	h := k.Header
	dir := fmt.Sprintf("blocks/%d/", h.Height)
	fail := func(file string, format string, args ...any) (int, error) {
		return 0, &Finding{File: dir + file, Reason: fmt.Sprintf(format, args...)}
	}
	// The next block's first leaf commits to this header: the header is in the log.
	if err := CheckInclusion(v.sealed.Checkpoint, h.Size, Leaf{ClassHeader, h.Hash()}, k.Proof); err != nil {
		return fail("proof", "the header is not in the log: %v", err)
	}
	if g := hex.EncodeToString(h.Genesis[:]); v.r.Genesis == "" {
		v.r.Genesis = g
	} else if v.r.Genesis != g {
		return fail("header", "genesis: is of another district than the block before")
	}
	entries, validators, finding := registryOf(k, dir)
	if finding != nil {
		return 0, finding
	}
	if err := CheckVotes(h.Hash(), k.Metadata, k.Votes, validators); err != nil {
		return fail("votes", "%v", err)
	}
	if n := len(ValidVotes(h.Hash(), k.Metadata, k.Votes, validators)); n != len(k.Votes) {
		return fail("votes", "%d of %d are not valid; a bundle holds only valid ones", len(k.Votes)-n, len(k.Votes))
	}
	for _, val := range validators {
		departments[string(val.CosignKey)] = val.Department
	}
	signers := map[int64]bool{}
	for i := range v.b.Records {
		r := &v.b.Records[i]
		if r.Index <= h.PrevSize || r.Index >= h.Size {
			continue
		}
		if r.Tombstone != nil {
			if err := CheckInclusion(v.sealed.Checkpoint, r.Index, *r.Tombstone, r.Proof); err != nil {
				return 0, &Finding{File: fmt.Sprintf("records/%d/", r.Index), Record: &r.Index, Reason: "tombstone: is not what the log holds: " + err.Error()}
			}
			v.r.Records = append(v.r.Records, RecordReport{Index: r.Index, Height: h.Height, BlockTime: h.Time, LetGo: true, Claims: Claims{Summary: tombstone}})
			v.doubt(lettingGo)
			records++
			continue
		}
		at, err := v.record(r, k, entries)
		if err != nil {
			return 0, &Finding{File: fmt.Sprintf("records/%d/", r.Index), Record: &r.Index, Reason: err.Error()}
		}
		signers[at] = true
		records++
	}
	if records == 0 {
		return fail("header", "the bundle holds no record of this block")
	}
	for at, e := range entries {
		if beside := entries[at-1].Type == identity.TypeValidator || entries[at+1].Type == identity.TypeValidator; e.Type != identity.TypeValidator && !signers[at] && !beside {
			return fail(fmt.Sprintf("registry/%d", at), "is not needed for any record")
		}
	}
	return records, nil
}

// registryOf verifies the block's registry excerpts and returns the entries by
// index, and all validators of the district.
func registryOf(k *BundleBlock, dir string) (map[int64]identity.Entry, []identity.Validator, *Finding) {
	entries := map[int64]identity.Entry{}
	var validators []identity.Validator
	var first, last, size int64 = -1, -1, -1
	for _, x := range k.Registry {
		fail := func(format string, args ...any) (map[int64]identity.Entry, []identity.Validator, *Finding) {
			return nil, nil, &Finding{File: fmt.Sprintf("%sregistry/%d", dir, x.Index), Reason: fmt.Sprintf(format, args...)}
		}
		if size >= 0 && x.Size != size || x.Index < 0 || x.Index >= x.Size || len(x.Proof) > maxProof {
			return fail("does not fit the registry's size")
		}
		size = x.Size
		e, err := x.Check(k.Header.Registry)
		if err != nil {
			return fail("%v", err)
		}
		entries[x.Index] = e
		if e.Type != identity.TypeValidator {
			continue
		}
		var val identity.Validator
		if err := json.Unmarshal(e.Body, &val); err != nil {
			return fail("validator: %v", err)
		}
		if first >= 0 && x.Index != last+1 {
			return fail("a validator between this one and the one before was left out")
		}
		if first < 0 {
			first = x.Index
		}
		last = x.Index
		if e.Status == identity.Active {
			validators = append(validators, val)
		}
	}
	// Entries are ordered by type: those beside the validators show that there
	// are no others.
	_, before := entries[first-1]
	_, after := entries[last+1]
	if first < 0 || !before && first > 0 || !after && last < size-1 {
		return nil, nil, &Finding{File: dir + "registry/", Reason: "does not show all validators"}
	}
	return entries, validators, nil
}

// record verifies one record and returns the registry index of its signer.
func (v *verifier) record(r *BundleRecord, k *BundleBlock, entries map[int64]identity.Entry) (int64, error) {
	leaf := Leaf{ClassRecord, Commit(r.Salt, r.Envelope)}
	if err := CheckInclusion(v.sealed.Checkpoint, r.Index, leaf, r.Proof); err != nil {
		return 0, fmt.Errorf("salt and envelope are not what the log holds: %w", err)
	}
	e, err := identity.ParseEnvelope(r.Envelope)
	if err != nil {
		return 0, err
	}
	at, entry, key, err := signer(entries, e)
	if err != nil {
		return 0, err
	}
	who := fmt.Sprintf("%s %s", entry.Type, entry.ID)
	switch {
	case entry.Status != identity.Active:
		return 0, fmt.Errorf("signer: %s was revoked at block %d", who, entry.Since)
	case !maySign(entry, e.Kind):
		return 0, fmt.Errorf("signer: %s may not sign a %s", who, e.Kind)
	case !e.Verify(key):
		return 0, fmt.Errorf("signature: is not by %s", who)
	}
	c := Describe(e)
	if e.Kind == identity.KindFrame && c.Device != entry.ID {
		return 0, fmt.Errorf("payload: names device %.60q, it is signed by %s", c.Device, who)
	}
	if by, ok := importer(e); ok && by != entry.ID {
		return 0, fmt.Errorf("payload: names importer %.60q, it is signed by %s", by, who)
	}
	for _, l := range unproven(e.Kind) {
		v.doubt(l)
	}
	h := sha256.Sum256(e.Payload)
	v.r.Records = append(v.r.Records, RecordReport{
		Index: r.Index, Height: k.Header.Height, BlockTime: k.Header.Time, Kind: e.Kind, ContentType: e.ContentType,
		Signer: who, Key: e.Key, Payload: hex.EncodeToString(h[:]), Claims: c,
	})
	return at, nil
}

// doubt adds a line to what the bundle does not prove.
func (v *verifier) doubt(line string) {
	if !slices.Contains(v.r.DoesNotProve, line) {
		v.r.DoesNotProve = append(slices.Clip(v.r.DoesNotProve), line)
	}
}

// tombstone is what is said of a record that was let go.
const tombstone = "a record whose content was let go; only its place in the log is left"

const lettingGo = "why a record's content was let go, unless a redaction or a receipt of deletion is among the records"

// tombstones says of records that were let go of why, where a redaction of them is
// among the records: it was verified like any other.
func (v *verifier) tombstones() {
	for i := range v.r.Records {
		t := &v.r.Records[i]
		if !t.LetGo {
			continue
		}
		of := slices.IndexFunc(v.b.Records, func(r BundleRecord) bool { return r.Index == t.Index })
		for k := range v.b.Records {
			r := &v.b.Records[k]
			if basis, ok := redaction(r, v.b.Records[of]); ok {
				t.Claims.Summary = fmt.Sprintf("a record that was redacted by record %d, legal basis %q; only its place in the log is left", r.Index, basis)
				t.RedactedBy = &r.Index
			}
		}
	}
}

// redaction reports whether a record redacts another, later than it, by index and
// commitment, and the legal basis that it names.
func redaction(r *BundleRecord, of BundleRecord) (basis string, ok bool) {
	e, err := identity.ParseEnvelope(r.Envelope)
	if err != nil || e.Kind != identity.KindRedaction || r.Index <= of.Index {
		return "", false
	}
	f, ok := readFields(e)
	if !ok || f.text(4, "id") != strconv.FormatUint(of.Index, 10) || f.text(2, "action") != string(identity.Put) {
		return "", false
	}
	body := []byte(f.text(5, "body"))
	if f.json != nil {
		body = f.raw("body") // of identity.Change: the document itself
	}
	var d identity.Redaction
	if json.Unmarshal(body, &d) != nil || !bytes.Equal(d.Commitment, of.Tombstone.Commitment[:]) {
		return "", false
	}
	return d.Basis, true
}

// claimed says what stretches prove.
func claimed(us []Unbroken) []string {
	var out []string
	for _, u := range us {
		out = append(out, fmt.Sprintf("nothing that device %q signed between its frames %d and %d (start %d) is left out: all are here, and each bears the hash of the one before",
			u.Device, u.From, u.To, u.BootEpoch))
	}
	return out
}

// unbroken verifies the claims that nothing was left out. Signatures were checked
// before: that a frame names its signer, too.
func (v *verifier) unbroken() error {
	if len(v.b.Unbroken) == 0 {
		return nil
	}
	const file = "unbroken.json"
	type key struct {
		device    string
		boot, seq uint64
	}
	type link struct {
		record *BundleRecord
		prev   []byte
		hash   Hash // of the payload
	}
	links := map[key]link{}
	for i := range v.b.Records {
		r := &v.b.Records[i]
		e, err := identity.ParseEnvelope(r.Envelope)
		if err != nil || e.Kind != identity.KindFrame {
			continue // tombstones and other kinds
		}
		f, ok := readFields(e)
		if !ok {
			continue
		}
		k := key{f.text(3, "device"), f.number(4, "bootEpoch"), f.number(5, "seq")}
		if other, ok := links[k]; ok {
			return &Finding{File: file, Record: &r.Index, Reason: fmt.Sprintf("device %q signed another frame %d of start %d, record %d", k.device, k.seq, k.boot, other.record.Index)}
		}
		links[k] = link{r, f.bytes(6, "prev"), sha256.Sum256(e.Payload)}
	}
	for _, u := range v.b.Unbroken {
		if u.To-u.From >= uint64(len(links)) {
			return &Finding{File: file, Reason: fmt.Sprintf("frames %d to %d of device %q are claimed; the bundle holds %d frames", u.From, u.To, u.Device, len(links))}
		}
		for seq := u.From; seq <= u.To; seq++ {
			l, ok := links[key{u.Device, u.BootEpoch, seq}]
			if !ok {
				return &Finding{File: file, Reason: fmt.Sprintf("frame %d of device %q, start %d, is left out", seq, u.Device, u.BootEpoch)}
			}
			if seq == u.From {
				continue
			}
			before := links[key{u.Device, u.BootEpoch, seq - 1}]
			if !bytes.Equal(l.prev, before.hash[:]) {
				return &Finding{File: file, Record: &l.record.Index, Reason: fmt.Sprintf("frame %d does not bear the hash of frame %d, record %d: the chain is broken between them", seq, seq-1, before.record.Index)}
			}
		}
	}
	v.r.Unbroken = v.b.Unbroken
	for i, l := range v.r.DoesNotProve {
		if l == leftOut {
			v.r.DoesNotProve = slices.Clone(v.r.DoesNotProve)
			v.r.DoesNotProve[i] = notProven(v.r.Unbroken)[slices.Index(doesNotProve, leftOut)]
		}
	}
	return nil
}

// importer returns the name that an import gives its signer.
func importer(e identity.Envelope) (string, bool) {
	if e.Kind != identity.KindImport {
		return "", false
	}
	f, ok := readFields(e)
	if !ok {
		return "", false
	}
	return f.text(2, "importer"), true
}

// unproven returns what records of a kind, besides all others, do not prove.
func unproven(k identity.RecordKind) []string {
	if k == identity.KindImport {
		return []string{"that a controller logged what an import says: whoever brought the log in signed it, the controller did not"}
	}
	return nil
}

// signer finds the entry that holds the key of an envelope.
func signer(entries map[int64]identity.Entry, of identity.Envelope) (int64, identity.Entry, ed25519.PublicKey, error) {
	id := of.Key
	for at, e := range entries {
		if e.Type == identity.TypeValidator && of.Kind != identity.KindDeletion {
			continue // of records, validators sign receipts alone
		}
		keys, err := e.Keys()
		if e.Type == identity.TypeValidator {
			var v identity.Validator
			err = json.Unmarshal(e.Body, &v)
			keys = []ed25519.PublicKey{ed25519.PublicKey(v.VoteKey)}
		}
		if err != nil {
			return 0, identity.Entry{}, nil, fmt.Errorf("registry entry %d: %w", at, err)
		}
		for _, k := range keys {
			if len(k) == ed25519.PublicKeySize && identity.IDOf(k) == id {
				return at, e, k, nil
			}
		}
	}
	return 0, identity.Entry{}, nil, fmt.Errorf("signer: the bundle's registry entries do not hold key %s", id)
}

// maySign reports whether an entry's holder may sign records of a kind, by the
// rules of package identity.
func maySign(e identity.Entry, k identity.RecordKind) bool {
	switch e.Type {
	case identity.TypeDevice:
		return k == identity.KindFrame
	case identity.TypeService:
		var s identity.Service
		return json.Unmarshal(e.Body, &s) == nil && slices.Contains(s.Signs, k)
	case identity.TypeOfficial:
		var o identity.Official
		return json.Unmarshal(e.Body, &o) == nil &&
			(k == identity.KindRequest || k.ChangesRegistry() && len(o.Roles) > 0)
	case identity.TypeAgency:
		return k == identity.KindRequest
	case identity.TypeValidator:
		return k == identity.KindDeletion
	}
	return false
}

func (v *verifier) signers(departments map[string]string) {
	v.r.Signers = append(v.r.Signers, SignerReport{Name: v.sealed.Origin, Role: "log", Fingerprint: Fingerprint(v.sealed.LogKey)})
	for _, c := range v.sealed.Cosignatures {
		at := c.At
		v.r.Signers = append(v.r.Signers, SignerReport{Name: c.Witness.Cosigner.Name(), Role: "cosigner",
			Department: departments[string(c.Witness.Key())], Fingerprint: Fingerprint(c.Witness.Key()), At: &at})
	}
}

const timeForm = "2006-01-02 15:04:05.000 UTC"

// Text returns the report for people.
func (r *Report) Text() string {
	var b strings.Builder
	switch r.Outcome {
	case Pass:
		b.WriteString("PASS: the records below are authentic under the policy that you trust.\n")
	case Untrusted:
		b.WriteString("UNTRUSTED: consistent, but signed by nobody that you trust. Anybody can make such a\n" +
			"bundle. Compare the fingerprints with the district's, and verify with --policy.\n")
	default:
		b.WriteString("FAIL: do not rely on this bundle.\n")
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "  %v\n", f)
		}
		if len(r.Fingerprints) > 0 {
			r.keys(&b)
		}
		return b.String()
	}
	for _, rec := range r.Records {
		if rec.LetGo {
			fmt.Fprintf(&b, "\nrecord %d: %s\n  agreed in block %d at %s (quorum's clock)\n", rec.Index, rec.Claims.Summary, rec.Height, rec.BlockTime.UTC().Format(timeForm))
			continue
		}
		fmt.Fprintf(&b, "\nrecord %d: %s\n  signed by %s, key %s\n  agreed in block %d at %s (quorum's clock)\n",
			rec.Index, rec.Claims.Summary, rec.Signer, rec.Key, rec.Height, rec.BlockTime.UTC().Format(timeForm))
		if rec.Claims.Time != nil {
			fmt.Fprintf(&b, "  says of itself that it is of %s\n", rec.Claims.Time.Format(timeForm))
		}
	}
	fmt.Fprintf(&b, "\nlog %s, %d entries, root %s\ngenesis %s\n", r.Origin, r.Size, r.Root, r.Genesis)
	for _, s := range r.Signers {
		fmt.Fprintf(&b, "  %s %s", s.Role, s.Name)
		if s.Department != "" {
			fmt.Fprintf(&b, " (%s)", s.Department)
		}
		if s.At != nil {
			fmt.Fprintf(&b, " at %s", s.At.Format("2006-01-02 15:04:05 UTC"))
		}
		b.WriteByte('\n')
	}
	if r.ExistedBy != nil {
		fmt.Fprintf(&b, "existed no later than %s\n", r.ExistedBy.Format("2006-01-02 15:04:05 UTC"))
	}
	b.WriteString("logged not before: nothing here says\n")
	if r.Changes > 0 {
		fmt.Fprintf(&b, "the validators have changed %d times since those of your policy; each set named the next\n", r.Changes)
	}
	if r.HintDiffers {
		b.WriteString("the policy in the bundle names other keys than yours; yours was used\n")
	}
	if r.Outcome == Untrusted {
		r.keys(&b)
	}
	for _, l := range []struct {
		head  string
		lines []string
	}{{"It proves", r.Proves}, {"It does not prove", r.DoesNotProve}} {
		if len(l.lines) > 0 {
			fmt.Fprintf(&b, "\n%s:\n  - %s\n", l.head, strings.Join(l.lines, "\n  - "))
		}
	}
	return b.String()
}

func (r *Report) keys(b *strings.Builder) {
	b.WriteString("\nfingerprints (SHA-256 of the public key):\n")
	for _, n := range slices.Sorted(maps.Keys(r.Fingerprints)) {
		fmt.Fprintf(b, "  %s %s\n", r.Fingerprints[n], n)
	}
}

// JSON returns the report as an indented document.
func (r *Report) JSON() []byte {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		panic(fmt.Sprintf("ledger: report: %v", err)) // unreachable: plain data
	}
	return append(b, '\n')
}

// statement is the bundle's statement.txt: it follows from the content alone, so
// that it cannot say anything else. It says what the content claims; whether
// that is true only verification can say.
func (b *Bundle) statement() string {
	var s strings.Builder
	s.WriteString("Evidence from a Stopline district\n\n" +
		"This text is made from the files beside it and proves nothing by itself. Check them with\n\n" +
		"    stopline verify --policy FILE THIS-BUNDLE\n\n" +
		"where FILE is the district's policy as you got it from someone you trust. The policy\n" +
		"inside the bundle is only a hint: whoever forges a bundle forges that, too.\n\nRecords:\n")
	for _, r := range b.Records {
		switch e, err := identity.ParseEnvelope(r.Envelope); {
		case r.Tombstone != nil:
			fmt.Fprintf(&s, "- %d: %s", r.Index, tombstone)
		case err != nil:
			fmt.Fprintf(&s, "- %d: not readable\n", r.Index)
			continue
		default:
			fmt.Fprintf(&s, "- %d: %s, signed with key %s", r.Index, Describe(e).Summary, e.Key)
		}
		for _, k := range b.Blocks {
			if r.Index > k.Header.PrevSize && r.Index < k.Header.Size {
				fmt.Fprintf(&s, ", in block %d of %s", k.Header.Height, k.Header.Time.Format(timeForm))
			}
		}
		s.WriteByte('\n')
	}
	text, sigs, _ := bytes.Cut(b.Checkpoint, []byte("\n\n"))
	if c, err := ParseCheckpoint(string(text) + "\n"); err == nil {
		fmt.Fprintf(&s, "\nSealed in the log %s at %d entries, with signatures that bear the names:\n", c.Origin, c.Size)
	}
	for _, l := range bytes.Split(sigs, []byte("\n")) {
		if f := strings.Fields(string(l)); len(f) == 3 {
			fmt.Fprintf(&s, "- %s\n", f[1])
		}
	}
	not := notProven(b.Unbroken)
	for _, r := range b.Records {
		if r.Tombstone != nil && !slices.Contains(not, lettingGo) {
			not = append(slices.Clip(not), lettingGo)
		}
		if e, err := identity.ParseEnvelope(r.Envelope); err == nil {
			for _, l := range unproven(e.Kind) {
				if !slices.Contains(not, l) {
					not = append(slices.Clip(not), l)
				}
			}
		}
	}
	fmt.Fprintf(&s, "\nIf it verifies, it proves:\n- %s\n\nIt does not prove:\n- %s\n",
		strings.Join(append(slices.Clone(proves), claimed(b.Unbroken)...), "\n- "), strings.Join(not, "\n- "))
	return s.String()
}

var _ note.Verifiers = (*Policy)(nil)
