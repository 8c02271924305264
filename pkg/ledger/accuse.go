package ledger

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// AccusationFormat is the first field of an accusation's document.
const AccusationFormat = "stopline accusation v1"

// MaxAccusation is the largest document, bytes.
const MaxAccusation = 1 << 20

// AccusationKind says what an accusation shows.
type AccusationKind string

// The kinds.
const (
	// AccusedVotes: one validator signed two messages that vote differently at
	// one view, height and phase. An honest validator never does.
	AccusedVotes AccusationKind = "votes"
	// AccusedCheckpoints: somebody signed two checkpoints of one log of which
	// neither can have grown out of the other.
	AccusedCheckpoints AccusationKind = "checkpoints"
	// AccusedBlocks: a quorum voted for each of two blocks at one height.
	AccusedBlocks AccusationKind = "blocks"
)

// Accusation is proof that validators broke the protocol, as a JSON document
// that stands by itself but for the keys: those the verifier must have from
// somewhere that it trusts, see [Trust]. Of the three lists one is set, with two
// elements.
type Accusation struct {
	Format string         `json:"format"`
	Kind   AccusationKind `json:"kind"`
	// Genesis is the SHA-256, in hex, of the district's genesis document. Votes
	// cover it. Not in kind checkpoints, which name their log.
	Genesis string `json:"genesis,omitempty"`
	// Votes are heads of messages between validators, each with its signature:
	// see [Message].
	Votes [][]byte `json:"votes,omitempty"`
	// Checkpoints that do not fit together.
	Checkpoints []AccusedCheckpoint `json:"checkpoints,omitempty"`
	// Prefix, where the checkpoints are of different sizes, and do not say what
	// stands at one index.
	Prefix *AccusedPrefix `json:"prefix,omitempty"`
	// Blocks at one height, without leaves and payload.
	Blocks []AccusedBlock `json:"blocks,omitempty"`
	// Members shows who the validators were where they are not those of genesis:
	// how they changed, from genesis on, up to the set that is accused. See [Step].
	Members []Step `json:"members,omitempty"`
}

// AccusedPrefix is what the log of the larger of two checkpoints was when it had
// the size of the smaller: another root than that one's, and a consistency proof
// (RFC 6962) from it to the larger's root.
type AccusedPrefix struct {
	Root  []byte   `json:"root"`
	Proof [][]byte `json:"proof"`
}

// AccusedCheckpoint is a signed checkpoint. Where the two are of different
// sizes, both say what stands at one index.
type AccusedCheckpoint struct {
	// Note is the checkpoint with its signatures: a C2SP signed note.
	Note string `json:"note"`
	// Index of a leaf, its RFC 6962 leaf hash, and the hashes of the inclusion
	// proof, from the leaf up.
	Index *uint64  `json:"index,omitempty"`
	Leaf  []byte   `json:"leaf,omitempty"`
	Proof [][]byte `json:"proof,omitempty"`
}

// AccusedBlock is a header with the votes that decided it.
type AccusedBlock struct {
	// Header as [Header.Marshal] encodes it.
	Header []byte `json:"header"`
	// Metadata are the engine's; they hold the view, and the votes cover them.
	Metadata []byte `json:"metadata"`
	// Votes, by validator.
	Votes []AccusedVote `json:"votes"`
	// Registry shows all validators in the registry of the header, as
	// [BundleBlock.Registry] does, unless that is the registry of genesis.
	Registry []identity.Excerpt `json:"registry,omitempty"`
}

// AccusedVote is one vote for a block.
type AccusedVote struct {
	Validator uint64 `json:"validator"`
	Signature []byte `json:"signature"`
}

// NewVoteAccusation returns the document for two heads of messages with their
// signatures. It checks nothing.
func NewVoteAccusation(genesis Hash, first, second []byte) *Accusation {
	if bytes.Compare(first, second) > 0 { // found by whomever, in whatever order, it is one
		first, second = second, first
	}
	return &Accusation{Format: AccusationFormat, Kind: AccusedVotes, Genesis: hex.EncodeToString(genesis[:]), Votes: [][]byte{first, second}}
}

// NewBlockAccusation returns the document for two blocks. It checks nothing, but
// leaves out votes that are not valid, by the validators given.
func NewBlockAccusation(a, b *Block, validators []identity.Validator) *Accusation {
	out := &Accusation{Format: AccusationFormat, Kind: AccusedBlocks, Genesis: hex.EncodeToString(a.Header.Genesis[:])}
	for _, k := range []*Block{a, b} {
		ab := AccusedBlock{Header: k.Header.Marshal(), Metadata: k.Metadata}
		for _, v := range ValidVotes(k.Header.Hash(), k.Metadata, k.Votes, validators) {
			ab.Votes = append(ab.Votes, AccusedVote(v))
		}
		slices.SortFunc(ab.Votes, func(x, y AccusedVote) int { return cmpUint(x.Validator, y.Validator) })
		out.Blocks = append(out.Blocks, ab)
	}
	slices.SortFunc(out.Blocks, func(x, y AccusedBlock) int { return bytes.Compare(x.Header, y.Header) })
	return out
}

func cmpUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// NewCheckpointAccusation returns the document for two signed checkpoints of one
// size.
func NewCheckpointAccusation(first, second []byte) *Accusation {
	if bytes.Compare(first, second) > 0 {
		first, second = second, first
	}
	return &Accusation{Format: AccusationFormat, Kind: AccusedCheckpoints,
		Checkpoints: []AccusedCheckpoint{{Note: string(first)}, {Note: string(second)}}}
}

// Marshal returns the one form of the document: JSON, indented by one space, a
// newline at the end.
func (a *Accusation) Marshal() ([]byte, error) {
	b, err := json.MarshalIndent(a, "", " ")
	if err != nil {
		return nil, fmt.Errorf("accusation: %w", err)
	}
	return append(b, '\n'), nil
}

// ParseAccusation decodes what [Accusation.Marshal] wrote, and nothing else: a
// document has no place for anything that is not judged.
func ParseAccusation(b []byte) (*Accusation, error) {
	fail := func(format string, args ...any) (*Accusation, error) {
		return nil, fmt.Errorf("accusation: "+format, args...)
	}
	if len(b) > MaxAccusation {
		return fail("%d bytes, at most %d are taken", len(b), MaxAccusation)
	}
	var a Accusation
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		return fail("%w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fail("data after the end of the document")
	}
	if a.Format != AccusationFormat {
		return fail("format: %.60q is unknown", a.Format)
	}
	votes, checkpoints, blocks := len(a.Votes), len(a.Checkpoints), len(a.Blocks)
	want := map[AccusationKind][3]int{AccusedVotes: {2, 0, 0}, AccusedCheckpoints: {0, 2, 0}, AccusedBlocks: {0, 0, 2}}
	n, ok := want[a.Kind]
	switch {
	case !ok:
		return fail("kind: %.60q is unknown", a.Kind)
	case n != [3]int{votes, checkpoints, blocks}:
		return fail("%s: two are needed, and nothing else", a.Kind)
	case a.Kind == AccusedCheckpoints && a.Genesis != "":
		return fail("genesis: has no place in kind %s", a.Kind)
	case a.Kind != AccusedCheckpoints && a.Prefix != nil:
		return fail("prefix: has no place in kind %s", a.Kind)
	}
	if a.Kind != AccusedCheckpoints {
		if h, err := hex.DecodeString(a.Genesis); err != nil || len(h) != len(Hash{}) {
			return fail("genesis: must be 64 hex digits")
		}
	}
	if again, err := a.Marshal(); err != nil || !bytes.Equal(again, b) {
		return fail("not in canonical form")
	}
	return &a, nil
}

// Message is the head of a message between validators. Its encoding is fixed,
// integers big-endian:
//
//	version 01 ‖ kind, 8 bits each
//	from, to, configuration: 64 bits each
//	incarnation: 16 bytes
//	start counter, sequence, decided height, view, height: 64 bits each
//	phase, 8 bits: 0 no vote, 1 propose, 2 prepare, 3 commit
//	digest of what is voted for, SHA-256 of the body: 32 bytes each
//
// and the signature is Ed25519, checked by ZIP 215, with the sender's vote key
// over
//
//	"stopline validator message v1\n" ‖ genesis hash ‖ head
type Message struct {
	From   uint64
	Config uint64 // the members that it is for
	View   uint64
	Height Height
	Phase  uint8
	Digest Hash
}

const (
	messageDomain = "stopline validator message v1\n"
	messageHead   = 2 + 3*8 + 16 + 5*8 + 1 + 2*32
	// MessageSize is the length of a head with its signature.
	MessageSize = messageHead + ed25519.SignatureSize
)

var phases = [...]string{"none", "propose", "prepare", "commit"}

// ParseMessage decodes a head with its signature, and does not verify it.
func ParseMessage(b []byte) (Message, error) {
	if len(b) != MessageSize {
		return Message{}, fmt.Errorf("message: %d bytes, want %d", len(b), MessageSize)
	}
	if b[0] != 1 {
		return Message{}, fmt.Errorf("message: version %d is unknown", b[0])
	}
	p := b[2+3*8+16+3*8:]
	m := Message{
		From: binary.BigEndian.Uint64(b[2:]), Config: binary.BigEndian.Uint64(b[2+16:]), View: binary.BigEndian.Uint64(p), Height: Height(binary.BigEndian.Uint64(p[8:])),
		Phase: p[16], Digest: Hash(p[17:]),
	}
	if int(m.Phase) >= len(phases) {
		return Message{}, fmt.Errorf("message: phase %d is unknown", m.Phase)
	}
	return m, nil
}

// CheckMessage verifies the signature of a head.
func CheckMessage(b []byte, key identity.PublicKey, genesis Hash) bool {
	if len(b) != MessageSize {
		return false
	}
	in := append([]byte(messageDomain), genesis[:]...)
	return identity.VerifyBytes([]byte(key), append(in, b[:messageHead]...), b[messageHead:])
}

// CheckVotesDiffer verifies that two heads, each signed with the key, vote
// differently in one slot: among one set of members, at one view, height and
// phase. Votes of different
// views never are evidence: after a change of leader an honest validator may
// well vote for another proposal at the height.
func CheckVotesDiffer(validator uint64, key identity.PublicKey, genesis Hash, first, second []byte) error {
	var m [2]Message
	for i, b := range [][]byte{first, second} {
		var err error
		if m[i], err = ParseMessage(b); err != nil {
			return fmt.Errorf("votes[%d]: %w", i, err)
		}
		if m[i].From != validator || !CheckMessage(b, key, genesis) {
			return fmt.Errorf("votes[%d]: is not signed by validator %d", i, validator)
		}
	}
	if m[0].Phase == 0 || m[0].Config != m[1].Config || m[0].View != m[1].View || m[0].Height != m[1].Height || m[0].Phase != m[1].Phase {
		return errors.New("votes: are not in one slot")
	}
	if m[0].Digest == m[1].Digest {
		return errors.New("votes: are for the same proposal")
	}
	return nil
}

// viewOf reads the view from the engine's metadata: SmartBFT's ViewMetadata, a
// protobuf message in which it is field 1 and 0 where absent. Validators vote for
// metadata only of integers in one encoding each, so that anything else is an
// error.
func viewOf(metadata []byte) (view uint64, err error) {
	for b, last := metadata, uint64(0); len(b) > 0; {
		tag, n := binary.Uvarint(b)
		if n <= 0 || tag&7 != 0 || tag <= last {
			return 0, errors.New("metadata: must be integers in the order of their fields")
		}
		v, m := binary.Uvarint(b[n:])
		if m <= 0 {
			return 0, errors.New("metadata: truncated")
		}
		if tag>>3 == 1 {
			view = v
		}
		b, last = b[n+m:], tag
	}
	return view, nil
}

// Trust is what the verifier of an accusation has by ways of its own.
type Trust struct {
	// Genesis is the district's genesis document, the exact bytes. It holds the
	// vote keys, without which votes and blocks cannot be judged, and the
	// cosigning keys.
	Genesis []byte
	// Policy holds the keys of the log and of its cosigners.
	Policy *Policy
}

// Judgement is what an accusation comes to.
type Judgement struct {
	// Outcome is Pass where the accusation holds, Fail where it does not, and
	// Untrusted where the keys to tell were not given.
	Outcome Outcome        `json:"outcome"`
	Kind    AccusationKind `json:"kind,omitempty"`
	// Reason why the outcome is not Pass.
	Reason string `json:"reason,omitempty"`
	// Finding says what was shown.
	Finding string `json:"finding,omitempty"`
	// Guilty did what no honest validator does.
	Guilty []Culprit `json:"guilty,omitempty"`
	// SignedBoth voted for both blocks, in different views: a guilty one is
	// likely among them, but an honest one may be, too.
	SignedBoth []Culprit `json:"signed_both,omitempty"`
}

// Culprit is a signer by name and key.
type Culprit struct {
	Name        string `json:"name"`
	Department  string `json:"department,omitempty"`
	Fingerprint string `json:"key_fingerprint"`
}

// ExitCode returns the code that a command ends with.
func (j *Judgement) ExitCode() int { return (&Report{Outcome: j.Outcome}).ExitCode() }

// JSON returns the judgement as an indented document.
func (j *Judgement) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(j, "", " ")
	return append(b, '\n'), err
}

// Text returns the judgement for people.
func (j *Judgement) Text() string {
	var b strings.Builder
	switch j.Outcome {
	case Pass:
		b.WriteString("PASS: the accusation holds, under the keys that you trust.\n")
	case Untrusted:
		fmt.Fprintf(&b, "UNTRUSTED: nothing was proven. %s\n", j.Reason)
	default:
		fmt.Fprintf(&b, "FAIL: the accusation does not hold: %s\n", j.Reason)
	}
	if j.Outcome != Pass {
		return b.String()
	}
	fmt.Fprintf(&b, "\n%s\n", j.Finding)
	list := func(head string, cs []Culprit) {
		if len(cs) == 0 {
			return
		}
		fmt.Fprintf(&b, "\n%s\n", head)
		for _, c := range cs {
			fmt.Fprintf(&b, "  %s", c.Name)
			if c.Department != "" {
				fmt.Fprintf(&b, " (%s)", c.Department)
			}
			fmt.Fprintf(&b, ", key %s\n", c.Fingerprint)
		}
	}
	list("Guilty, or somebody else had the key:", j.Guilty)
	list("Voted for both, in different views, which an honest validator may have been led to do:", j.SignedBoth)
	return b.String()
}

var errUntrusted = errors.New("untrusted")

// Judge verifies an accusation against keys that are trusted. The error is nil
// unless the outcome is Fail.
func (a *Accusation) Judge(t Trust) (Judgement, error) {
	j := Judgement{Kind: a.Kind}
	var err error
	switch a.Kind {
	case AccusedVotes:
		err = j.votes(a, t)
	case AccusedCheckpoints:
		err = j.checkpoints(a, t)
	case AccusedBlocks:
		err = j.blocks(a, t)
	default:
		err = fmt.Errorf("kind: %.60q is unknown", a.Kind)
	}
	switch {
	case err == nil:
		j.Outcome = Pass
		return j, nil
	case errors.Is(err, errUntrusted):
		return Judgement{Kind: a.Kind, Outcome: Untrusted,
			Reason: strings.TrimSuffix(err.Error(), ": "+errUntrusted.Error()) + "."}, nil
	}
	return Judgement{Kind: a.Kind, Outcome: Fail, Reason: err.Error()}, err
}

// councilOf returns the last set of validators that the accusation's members lead
// to from the trusted genesis document, if that is the accusation's.
func (a *Accusation) councilOf(t Trust) (Hash, Council, error) {
	if t.Genesis == nil {
		return Hash{}, Council{}, fmt.Errorf("Vote keys are in the district's genesis document, and none was given: %w", errUntrusted)
	}
	h := sha256.Sum256(t.Genesis)
	if hex.EncodeToString(h[:]) != a.Genesis {
		return h, Council{}, fmt.Errorf("genesis: %.16s…, the trusted document's is %x…", a.Genesis, h[:8])
	}
	sets, err := CheckSteps(t.Genesis, a.Members)
	if err != nil {
		return h, Council{}, err
	}
	return h, sets[len(sets)-1], nil
}

func validatorsIn(genesis []byte) ([]identity.Validator, *identity.Genesis, error) {
	g, err := identity.ParseGenesis(genesis)
	if err != nil {
		return nil, nil, err
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, nil, err
	}
	return reg.Validators(), g, nil
}

func culprit(v identity.Validator, key identity.PublicKey) Culprit {
	return Culprit{Name: fmt.Sprintf("validator %d", v.Number), Department: v.Department, Fingerprint: Fingerprint(ed25519.PublicKey(key))}
}

func (j *Judgement) votes(a *Accusation, t Trust) error {
	m, err := ParseMessage(a.Votes[0])
	if err != nil {
		return fmt.Errorf("votes[0]: %w", err)
	}
	genesis, council, err := a.councilOf(t)
	if err != nil {
		return err
	}
	if m.Config != uint64(council.Since) {
		return fmt.Errorf("votes[0]: is for the validators since block %d, the members given are those since block %d", m.Config, council.Since)
	}
	validators := council.Validators
	i := slices.IndexFunc(validators, func(v identity.Validator) bool { return v.Number == m.From })
	if i < 0 {
		return fmt.Errorf("votes[0]: from: there is no validator %d among those since block %d, and what it says counts for nothing", m.From, council.Since)
	}
	if err := CheckVotesDiffer(m.From, validators[i].VoteKey, genesis, a.Votes[0], a.Votes[1]); err != nil {
		return err
	}
	if bytes.Compare(a.Votes[0], a.Votes[1]) > 0 {
		return errors.New("votes: must be in the order of their bytes")
	}
	j.Finding = fmt.Sprintf("Two different votes in one slot: view %d, height %d, phase %s.", m.View, m.Height, phases[m.Phase])
	j.Guilty = []Culprit{culprit(validators[i], validators[i].VoteKey)}
	return nil
}

func (j *Judgement) blocks(a *Accusation, t Trust) error {
	genesis, council, err := a.councilOf(t)
	if err != nil {
		return err
	}
	validators := council.Validators
	var hs [2]Header
	var views [2]uint64
	count := map[uint64]int{}
	for i, b := range a.Blocks {
		if hs[i], err = ParseHeader(b.Header); err != nil {
			return fmt.Errorf("blocks[%d]: %w", i, err)
		}
		if hs[i].Genesis != genesis {
			return fmt.Errorf("blocks[%d]: genesis: belongs to another district", i)
		}
		if hs[i].Height <= council.Since {
			return fmt.Errorf("blocks[%d]: height: %d, the members given are those since block %d", i, hs[i].Height, council.Since)
		}
		if views[i], err = viewOf(b.Metadata); err != nil {
			return fmt.Errorf("blocks[%d]: %w", i, err)
		}
		for _, v := range b.Votes {
			count[v.Validator]++
		}
		if err := checkAccusedVotes(hs[i], b.Metadata, b.Votes, validators); err != nil {
			return fmt.Errorf("blocks[%d]: %w", i, err)
		}
		if err := inRegistry(hs[i], b.Registry, validators); err != nil {
			return fmt.Errorf("blocks[%d]: %w", i, err)
		}
	}
	switch {
	case hs[0].Height != hs[1].Height:
		return fmt.Errorf("blocks: are at heights %d and %d", hs[0].Height, hs[1].Height)
	case hs[0] == hs[1]:
		return errors.New("blocks: are the same")
	case bytes.Compare(a.Blocks[0].Header, a.Blocks[1].Header) > 0:
		return errors.New("blocks: must be in the order of their headers")
	}
	n := len(validators)
	var both []Culprit
	for _, v := range validators {
		if count[v.Number] == 2 {
			both = append(both, culprit(v, v.VoteKey))
		}
	}
	j.Finding = fmt.Sprintf("Two blocks were decided at height %d, in views %d and %d. More than %d of %d validators broke the protocol.",
		hs[0].Height, views[0], views[1], Faults(n), n)
	if views[0] == views[1] {
		j.Guilty = both
	} else {
		j.SignedBoth = both
	}
	return nil
}

// keyring is the keys of a log and its cosigners, as a [note.Verifiers].
type keyring map[string]struct {
	note.Verifier
	culprit Culprit
}

func ringKey(name string, hash uint32) string { return fmt.Sprintf("%s+%08x", name, hash) }

// Verifier implements [note.Verifiers].
func (k keyring) Verifier(name string, hash uint32) (note.Verifier, error) {
	if v, ok := k[ringKey(name, hash)]; ok {
		return v.Verifier, nil
	}
	return nil, &note.UnknownVerifierError{Name: name, KeyHash: hash}
}

func (k keyring) add(v note.Verifier, c Culprit) {
	k[ringKey(v.Name(), v.KeyHash())] = struct {
		note.Verifier
		culprit Culprit
	}{v, c}
}

// ring collects the keys that t trusts to sign checkpoints. Members lead from the
// genesis document to further ones; without it they are passed over.
func (t Trust) ring(members []Step) (keyring, error) {
	k := keyring{}
	if t.Policy != nil {
		for _, l := range t.Policy.logs {
			k.add(l.verifier, Culprit{Name: "the log " + l.verifier.Name(), Fingerprint: Fingerprint(l.key)})
		}
		for _, w := range t.Policy.witnesses {
			k.add(w.Cosigner, Culprit{Name: w.Name, Fingerprint: Fingerprint(w.Key())})
		}
	}
	if t.Genesis != nil {
		_, g, err := validatorsIn(t.Genesis)
		if err != nil {
			return nil, err
		}
		sets, err := CheckSteps(t.Genesis, members)
		if err != nil {
			return nil, err
		}
		for _, set := range sets {
			for _, v := range set.Validators {
				c, err := NewCosigner(CosignerName(g.Origin, v.Number), ed25519.PublicKey(v.CosignKey))
				if err != nil {
					return nil, err
				}
				k.add(c, culprit(v, v.CosignKey))
			}
		}
		if g.LogKey != "" {
			v, key, err := parseLogKey(g.LogKey)
			if err != nil {
				return nil, fmt.Errorf("genesis: log_key: %w", err)
			}
			k.add(v, Culprit{Name: "the log " + v.Name(), Fingerprint: Fingerprint(key)})
		}
	}
	if len(k) == 0 {
		return nil, fmt.Errorf("the keys of the log and its cosigners are in its policy, and none was given: %w", errUntrusted)
	}
	return k, nil
}

func (j *Judgement) checkpoints(a *Accusation, t Trust) error {
	ring, err := t.ring(a.Members)
	if err != nil {
		return err
	}
	var cps [2]Checkpoint
	count := map[string]int{}
	for i, c := range a.Checkpoints {
		if len(c.Note) > MaxNote {
			return fmt.Errorf("checkpoints[%d]: note: %d bytes, at most %d are taken", i, len(c.Note), MaxNote)
		}
		n, err := note.Open([]byte(c.Note), ring)
		if err != nil {
			return fmt.Errorf("checkpoints[%d]: %w", i, err)
		}
		if len(n.UnverifiedSigs) > 0 {
			return fmt.Errorf("checkpoints[%d]: signed by %.80s, whose key is not among those that are trusted", i, n.UnverifiedSigs[0].Name)
		}
		if cps[i], err = ParseCheckpoint(n.Text); err != nil {
			return fmt.Errorf("checkpoints[%d]: %w", i, err)
		}
		seen := map[string]bool{}
		for _, s := range n.Sigs {
			k := ringKey(s.Name, s.Hash)
			if seen[k] {
				return fmt.Errorf("checkpoints[%d]: signed twice by %.80s", i, s.Name)
			}
			if _, err := base64.StdEncoding.Strict().DecodeString(s.Base64); err != nil {
				return fmt.Errorf("checkpoints[%d]: signature of %.80s: not in canonical form", i, s.Name)
			}
			seen[k] = true
			count[k]++
		}
	}
	one, two := cps[0], cps[1]
	switch {
	case one.Origin != two.Origin:
		return fmt.Errorf("checkpoints: are of two logs, %.80s and %.80s", one.Origin, two.Origin)
	case bytes.Compare([]byte(a.Checkpoints[0].Note), []byte(a.Checkpoints[1].Note)) > 0:
		return errors.New("checkpoints: must be in the order of their bytes")
	case one.Size == two.Size && one.Root == two.Root:
		return errors.New("checkpoints: are the same")
	case one.Size == two.Size:
		for i, c := range a.Checkpoints {
			if c.Index != nil || len(c.Leaf)+len(c.Proof) > 0 {
				return fmt.Errorf("checkpoints[%d]: index, leaf, proof: have no place where the sizes are the same", i)
			}
		}
		if a.Prefix != nil {
			return errors.New("prefix: has no place where the sizes are the same")
		}
		j.Finding = fmt.Sprintf("Two checkpoints of %s, of one size, %d, with different roots.", one.Origin, one.Size)
	case a.Prefix != nil:
		if err := a.Prefix.check(a.Checkpoints, cps); err != nil {
			return err
		}
		j.Finding = fmt.Sprintf("Two checkpoints of %s, of sizes %d and %d; with the entries of the first the log of the second had another root.",
			one.Origin, min(one.Size, two.Size), max(one.Size, two.Size))
	default:
		at, err := diverge(a.Checkpoints, cps)
		if err != nil {
			return err
		}
		j.Finding = fmt.Sprintf("Two checkpoints of %s, of sizes %d and %d, with different leaves at index %d.", one.Origin, one.Size, two.Size, at)
	}
	for _, k := range slices.Sorted(maps.Keys(count)) {
		if count[k] == 2 {
			j.Guilty = append(j.Guilty, ring[k].culprit)
		}
	}
	if len(j.Guilty) == 0 {
		return errors.New("checkpoints: nobody signed both")
	}
	return nil
}

// check verifies that the larger checkpoint's log did not begin with the
// smaller's.
func (p *AccusedPrefix) check(as []AccusedCheckpoint, cps [2]Checkpoint) error {
	for i, c := range as {
		if c.Index != nil || len(c.Leaf)+len(c.Proof) > 0 {
			return fmt.Errorf("checkpoints[%d]: index, leaf, proof: have no place beside a prefix", i)
		}
	}
	small, large := cps[0], cps[1]
	if small.Size > large.Size {
		small, large = large, small
	}
	if len(p.Root) != tlog.HashSize {
		return fmt.Errorf("prefix: root: must be %d bytes", tlog.HashSize)
	}
	if bytes.Equal(p.Root, small.Root[:]) {
		return errors.New("prefix: root: is that of the smaller checkpoint: the two are consistent")
	}
	proof, err := hashes(p.Proof)
	if err != nil {
		return fmt.Errorf("prefix: %w", err)
	}
	if small.Size == 0 || large.Size > math.MaxInt64/2 {
		return fmt.Errorf("prefix: sizes %d and %d: nothing can be shown of them", small.Size, large.Size)
	}
	if err := tlog.CheckTree(proof, int64(large.Size), tlog.Hash(large.Root), int64(small.Size), tlog.Hash(p.Root)); err != nil {
		return errors.New("prefix: proof: does not lead to the larger checkpoint's root")
	}
	return nil
}

// diverge verifies that two checkpoints have different leaves at one index.
func diverge(as []AccusedCheckpoint, cps [2]Checkpoint) (uint64, error) {
	for i, c := range as {
		if c.Index == nil || len(c.Leaf) != tlog.HashSize || len(c.Proof) > maxProof {
			return 0, fmt.Errorf("checkpoints[%d]: of different sizes: index, leaf and proof are needed", i)
		}
		var proof tlog.RecordProof
		for _, h := range c.Proof {
			if len(h) != tlog.HashSize {
				return 0, fmt.Errorf("checkpoints[%d]: proof: a hash must be %d bytes", i, tlog.HashSize)
			}
			proof = append(proof, tlog.Hash(h))
		}
		if *c.Index >= cps[i].Size || cps[i].Size > math.MaxInt64/2 {
			return 0, fmt.Errorf("checkpoints[%d]: index: %d, not in a log of %d", i, *c.Index, cps[i].Size)
		}
		if err := tlog.CheckRecord(proof, int64(cps[i].Size), tlog.Hash(cps[i].Root), int64(*c.Index), tlog.Hash(c.Leaf)); err != nil {
			return 0, fmt.Errorf("checkpoints[%d]: proof: does not lead to the root", i)
		}
	}
	if *as[0].Index != *as[1].Index {
		return 0, fmt.Errorf("checkpoints: index: %d and %d, must be one", *as[0].Index, *as[1].Index)
	}
	if bytes.Equal(as[0].Leaf, as[1].Leaf) {
		return 0, fmt.Errorf("checkpoints: leaf: is the same in both; they may be consistent")
	}
	return *as[0].Index, nil
}
