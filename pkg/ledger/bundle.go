package ledger

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Bounds of a bundle.
const (
	// MaxBundle is the largest bundle, bytes.
	MaxBundle = 64 << 20
	// MaxBundleRecords is how many records a bundle may hold.
	MaxBundleRecords = 4096

	maxBundleFiles = 5*MaxBundleRecords + 16
	maxExcerpt     = 4 << 20
)

// BundleFormat names the format in bundle.json.
const BundleFormat = "stopline evidence v1"

// Bundle is evidence for one or more records: everything that is needed to
// verify them but a policy that the verifier trusts. The format is in the
// package documentation.
type Bundle struct {
	// Checkpoint is the sealed checkpoint, a signed note, to which all proofs lead.
	Checkpoint []byte
	// Policy is whose signatures the maker thinks are needed: a hint.
	Policy []byte
	// Blocks that hold the records, by height; every one holds at least one.
	Blocks []BundleBlock
	// Succession leads from the first validators to those who cosigned Checkpoint;
	// nil where these are the same.
	Succession *BundleSuccession
	// Unbroken stretches of devices' frames that the bundle claims to hold whole, by
	// device, boot epoch and sequence, each once.
	Unbroken []Unbroken
	// Records by leaf index.
	Records []BundleRecord
}

// BundleSuccession lets somebody who pinned the policy of a district's first
// validators verify what later ones have cosigned.
type BundleSuccession struct {
	// Genesis is the genesis document.
	Genesis []byte
	// Steps is a [SuccessionProof], as [SuccessionProof.Marshal] writes it.
	Steps []byte
	// Anchor is a checkpoint that the first validators have cosigned, Proof that the
	// log's first leaf, under it, commits to the genesis document.
	Anchor []byte
	Proof  []tlog.Hash
}

// Unbroken is the claim that nothing which a device signed between two of its
// frames is left out: the bundle holds all frames of the stretch, and each but
// the first bears the hash of the one before. A device's chain begins anew when it
// starts, so that a stretch is within one boot epoch.
type Unbroken struct {
	Device    string `json:"device"`
	BootEpoch uint64 `json:"boot_epoch"`
	// From and To are the sequences of the first and the last frame.
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
}

// BundleBlock is a block of which a bundle holds records.
type BundleBlock struct {
	Header   Header
	Metadata []byte
	Votes    []Vote
	// Proof that the leaf at Header.Size, the first of the next block, commits to
	// this header.
	Proof []tlog.Hash
	// Registry holds the entries of the records' signers, of all validators, and
	// those beside the validators, by index: see [Excerpts].
	Registry []identity.Excerpt
}

// BundleRecord is one record, or what is left of one.
type BundleRecord struct {
	Index    uint64
	Salt     Salt
	Envelope []byte
	Proof    []tlog.Hash
	// Tombstone is the leaf of a record whose salt and envelope were let go: they
	// are empty then. It proves that there was a record, and nothing of it.
	Tombstone *Leaf
}

// manifest is bundle.json.
type manifest struct {
	Format string         `json:"format"`
	Files  []manifestFile `json:"files"`
}

type manifestFile struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

// files returns the bundle's files in their order, but for bundle.json.
func (b *Bundle) files() []zipFile {
	out := []zipFile{
		{"statement.txt", []byte(b.statement())},
		{"checkpoint", b.Checkpoint},
		{"policy", b.Policy},
	}
	add := func(name string, data []byte) { out = append(out, zipFile{name, data}) }
	if n := b.Succession; n != nil {
		add("succession/genesis", n.Genesis)
		add("succession/steps", n.Steps)
		add("succession/proof", FormatProof(0, n.Proof, n.Anchor))
	}
	if len(b.Unbroken) > 0 {
		j, err := json.MarshalIndent(b.Unbroken, "", " ")
		if err != nil {
			panic(fmt.Sprintf("ledger: unbroken.json: %v", err)) // unreachable: text and numbers
		}
		add("unbroken.json", append(j, '\n'))
	}
	for _, k := range b.Blocks {
		dir := fmt.Sprintf("blocks/%d/", k.Header.Height)
		add(dir+"header", k.Header.Marshal())
		add(dir+"votes", append(appendSized(nil, k.Metadata), MarshalVotes(k.Votes)...))
		add(dir+"proof", FormatProof(k.Header.Size, k.Proof, b.Checkpoint))
		for _, x := range k.Registry {
			j, err := json.Marshal(x)
			if err != nil {
				panic(fmt.Sprintf("ledger: registry excerpt: %v", err)) // unreachable: bytes and numbers
			}
			add(fmt.Sprintf("%sregistry/%d", dir, x.Index), j)
		}
	}
	for _, r := range b.Records {
		dir := fmt.Sprintf("records/%d/", r.Index)
		if r.Tombstone != nil {
			leaf := r.Tombstone.Marshal()
			add(dir+"tombstone", leaf[:])
		} else {
			add(dir+"envelope", r.Envelope)
			add(dir+"salt", r.Salt[:])
		}
		add(dir+"proof", FormatProof(r.Index, r.Proof, b.Checkpoint))
	}
	return out
}

// Marshal returns the bundle's bytes, the same for the same content. It does not
// verify anything.
func (b *Bundle) Marshal() []byte {
	files := b.files()
	return writeZip(append([]zipFile{{"bundle.json", manifestOf(files)}}, files...))
}

func manifestOf(files []zipFile) []byte {
	m := manifest{Format: BundleFormat}
	for _, f := range files {
		h := sha256.Sum256(f.data)
		m.Files = append(m.Files, manifestFile{f.name, hex.EncodeToString(h[:])})
	}
	j, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		panic(fmt.Sprintf("ledger: bundle.json: %v", err)) // unreachable: strings only
	}
	return append(j, '\n')
}

// Finding is one thing that is wrong.
type Finding struct {
	// File within the bundle, empty where it is the archive as a whole.
	File string `json:"file,omitempty"`
	// Record is the leaf index of the record that it concerns.
	Record *uint64 `json:"record,omitempty"`
	Reason string  `json:"reason"`
}

func (f *Finding) Error() string {
	s := f.Reason
	if f.File != "" {
		s = f.File + ": " + s
	}
	if f.Record != nil {
		s = fmt.Sprintf("record %d: %s", *f.Record, s)
	}
	return s
}

// ParseBundle decodes what [Bundle.Marshal] wrote, and nothing else: names,
// order, statement and digests must be what the content makes them. Errors are a
// *[Finding]. It does not verify signatures or proofs: see [VerifyBundle].
func ParseBundle(b []byte) (*Bundle, error) {
	if len(b) > MaxBundle {
		return nil, &Finding{Reason: fmt.Sprintf("archive: %d bytes, at most %d are taken", len(b), MaxBundle)}
	}
	files, bad := readZip(b, maxBundleFiles)
	if bad != nil {
		return nil, bad
	}
	if len(files) < 4 || files[0].name != "bundle.json" {
		return nil, &Finding{Reason: "archive: is no evidence bundle: bundle.json does not come first"}
	}
	fail := func(f zipFile, format string, args ...any) (*Bundle, error) {
		return nil, &Finding{File: f.name, Reason: fmt.Sprintf(format, args...)}
	}
	var m manifest
	if err := json.Unmarshal(files[0].data, &m); err != nil || m.Format != BundleFormat {
		return fail(files[0], "is not of format %q", BundleFormat)
	}
	if len(m.Files) != len(files)-1 {
		return fail(files[0], "names %d files, the archive has %d more", len(m.Files), len(files)-1)
	}
	for i, f := range files[1:] {
		h := sha256.Sum256(f.data)
		if m.Files[i].Name != f.name || m.Files[i].SHA256 != hex.EncodeToString(h[:]) {
			return fail(f, "is not the file that bundle.json names here")
		}
	}
	out := &Bundle{}
	for i, f := range files[1:] {
		if err := out.file(f); err != nil {
			return fail(files[i+1], "%v", err)
		}
	}
	// Whatever was read must be all there is, and in its only form.
	want := out.files()
	for i, f := range files[1:] {
		if i >= len(want) || want[i].name != f.name {
			return fail(f, "has no place in a bundle, or not here")
		}
		if !bytes.Equal(want[i].data, f.data) {
			return fail(f, "is not in the form that follows from the rest of the bundle")
		}
	}
	if len(want) != len(files)-1 {
		return nil, &Finding{File: want[len(files)-1].name, Reason: "is missing"}
	}
	if !bytes.Equal(manifestOf(want), files[0].data) {
		return fail(files[0], "is not in its canonical form")
	}
	return out, nil
}

// file takes one file in. Order and completeness are checked afterwards.
func (b *Bundle) file(f zipFile) error {
	switch f.name {
	case "statement.txt": // compared with what it must be
		return nil
	case "checkpoint":
		b.Checkpoint = f.data
		return nil
	case "policy":
		b.Policy = f.data
		return nil
	case "unbroken.json":
		return b.unbrokenFile(f.data)
	case "succession/genesis":
		b.Succession = &BundleSuccession{Genesis: f.data}
		return nil
	case "succession/steps", "succession/proof":
		if b.Succession == nil {
			return fmt.Errorf("the genesis document must come first")
		}
		if f.name == "succession/steps" {
			b.Succession.Steps = f.data
			return nil
		}
		var err error
		_, b.Succession.Proof, b.Succession.Anchor, err = ParseProof(f.data)
		return err
	}
	p := strings.Split(f.name, "/")
	if len(p) < 3 {
		return fmt.Errorf("has no place in a bundle")
	}
	n, err := strconv.ParseUint(p[1], 10, 63)
	if err != nil {
		return fmt.Errorf("has no place in a bundle")
	}
	switch p[0] {
	case "blocks":
		return b.blockFile(Height(n), p[2:], f.data)
	case "records":
		if len(p) != 3 {
			break
		}
		return b.recordFile(n, p[2], f.data)
	}
	return fmt.Errorf("has no place in a bundle")
}

func (b *Bundle) unbrokenFile(data []byte) error {
	if err := json.Unmarshal(data, &b.Unbroken); err != nil {
		return err
	}
	if len(b.Unbroken) == 0 {
		return fmt.Errorf("claims nothing")
	}
	for i, u := range b.Unbroken {
		if u.From >= u.To {
			return fmt.Errorf("stretch %d: from %d must be less than to %d", i, u.From, u.To)
		}
		if i > 0 && b.Unbroken[i-1].compare(u) >= 0 {
			return fmt.Errorf("stretches must come by device, boot epoch and sequence, each once")
		}
	}
	return nil
}

func (u Unbroken) compare(o Unbroken) int {
	return cmp.Or(cmp.Compare(u.Device, o.Device), cmp.Compare(u.BootEpoch, o.BootEpoch), cmp.Compare(u.From, o.From))
}

func (b *Bundle) blockFile(h Height, p []string, data []byte) (err error) {
	if p[0] == "header" {
		k := BundleBlock{}
		if k.Header, err = ParseHeader(data); err != nil {
			return err
		}
		if k.Header.Height != h {
			return fmt.Errorf("height: %d in the header, %d in the name", k.Header.Height, h)
		}
		if n := len(b.Blocks); n > 0 && b.Blocks[n-1].Header.Height >= h {
			return fmt.Errorf("blocks must come by height, each once")
		}
		b.Blocks = append(b.Blocks, k)
		return nil
	}
	if len(b.Blocks) == 0 || b.Blocks[len(b.Blocks)-1].Header.Height != h {
		return fmt.Errorf("the block's header must come first")
	}
	k := &b.Blocks[len(b.Blocks)-1]
	switch {
	case p[0] == "votes" && len(p) == 1:
		var rest []byte
		if k.Metadata, rest, err = cutSized(data); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
		k.Votes, err = ParseVotes(rest)
		return err
	case p[0] == "proof" && len(p) == 1:
		_, k.Proof, _, err = ParseProof(data)
		return err
	case p[0] == "registry" && len(p) == 2:
		if len(data) > maxExcerpt {
			return fmt.Errorf("%d bytes, at most %d are taken", len(data), maxExcerpt)
		}
		var x identity.Excerpt
		if err := json.Unmarshal(data, &x); err != nil {
			return err
		}
		if n := len(k.Registry); n > 0 && k.Registry[n-1].Index >= x.Index {
			return fmt.Errorf("registry entries must come by index, each once")
		}
		k.Registry = append(k.Registry, x)
		return nil
	}
	return fmt.Errorf("has no place in a bundle")
}

func (b *Bundle) recordFile(index uint64, name string, data []byte) (err error) {
	if name == "envelope" || name == "tombstone" {
		if n := len(b.Records); n == MaxBundleRecords {
			return fmt.Errorf("more than %d records", MaxBundleRecords)
		} else if n > 0 && b.Records[n-1].Index >= index {
			return fmt.Errorf("records must come by index, each once")
		}
		r := BundleRecord{Index: index}
		if name == "envelope" {
			r.Envelope = data
		} else {
			l, err := ParseLeaf(data)
			if err != nil {
				return err
			}
			if l.Class != ClassRecord {
				return fmt.Errorf("leaf: is no record's")
			}
			r.Tombstone = &l
		}
		b.Records = append(b.Records, r)
		return nil
	}
	if len(b.Records) == 0 || b.Records[len(b.Records)-1].Index != index {
		return fmt.Errorf("the record's envelope or tombstone must come first")
	}
	r := &b.Records[len(b.Records)-1]
	switch name {
	case "salt":
		if len(data) != len(r.Salt) {
			return fmt.Errorf("%d bytes, want %d", len(data), len(r.Salt))
		}
		r.Salt = Salt(data)
		return nil
	case "proof":
		_, r.Proof, _, err = ParseProof(data)
		return err
	}
	return fmt.Errorf("has no place in a bundle")
}

// Excerpts returns what [BundleBlock.Registry] must hold for records signed by
// the given holders: their entries, all validators, and the entries beside the
// validators in the registry's order, which show that none was left out.
func Excerpts(reg *identity.Registry, signers []identity.Holder) ([]identity.Excerpt, error) {
	byIndex := map[int64]identity.Excerpt{}
	for _, h := range signers {
		x, err := reg.Prove(h.Type, h.ID)
		if err != nil {
			return nil, err
		}
		byIndex[x.Index] = x
	}
	first, last, size := int64(-1), int64(-1), int64(0)
	for _, e := range reg.Entries(identity.TypeValidator) { // those that were revoked too
		x, err := reg.Prove(e.Type, e.ID)
		if err != nil {
			return nil, err
		}
		byIndex[x.Index] = x
		if first < 0 || x.Index < first {
			first = x.Index
		}
		last, size = max(last, x.Index), x.Size
	}
	for _, i := range []int64{first - 1, last + 1} {
		if i < 0 || i >= size {
			continue // the registry ends here
		}
		x, err := reg.ProveAt(i)
		if err != nil {
			return nil, err
		}
		byIndex[x.Index] = x
	}
	out := make([]identity.Excerpt, 0, len(byIndex))
	for _, x := range byIndex {
		out = append(out, x)
	}
	slices.SortFunc(out, func(a, b identity.Excerpt) int { return int(a.Index - b.Index) })
	return out, nil
}
