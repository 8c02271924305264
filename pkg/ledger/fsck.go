package ledger

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// FsckOptions say how a data folder is checked.
type FsckOptions struct {
	// Policy that checkpoints must satisfy. Optional: the folder's own, which
	// proves only that the folder fits together.
	Policy *Policy
	// Signatures adds the signature of every record, by the registry in force at
	// its block.
	Signatures bool
	// Known are signed checkpoints that somebody has seen: the log must hold what
	// they say, else it was rolled back or forked. Optional.
	Known [][]byte
	// Absences says which payloads may be gone. Optional: then entries that are
	// empty are taken as they are, and what has none is missing.
	Absences Absences
	// Progress is called now and then. Optional.
	Progress func(FsckProgress)
	// MaxProblems is after how many problems to stop. 100.
	MaxProblems int
}

// Absences knows what explains that a payload is gone: receipts of deletion and
// tombstones, which are in the log themselves.
type Absences interface {
	// Add is called with each record of the classes that are never purged, before
	// anything else is asked. Whether it is what its leaf commits to is checked
	// later.
	Add(p *Payload)
	// Explains reports whether the payload of a leaf may be gone. It is called
	// from several goroutines where the check is spread over them.
	Explains(leaf uint64) bool
}

// FsckProgress says how far a check has come.
type FsckProgress struct {
	Blocks, Leaves uint64 // checked
	Bytes, Total   uint64 // of journals and payloads
}

// Problem is one thing that is wrong in a data folder.
type Problem struct {
	File   string  `json:"file"`
	Offset *int64  `json:"offset,omitempty"`
	Record *uint64 `json:"record,omitempty"` // number within the file's journal
	Leaf   *uint64 `json:"leaf,omitempty"`   // index in the log
	Height *Height `json:"height,omitempty"` // of the block
	// Kind of the record, where it can still be read.
	Kind identity.RecordKind `json:"kind,omitempty"`
	Rule string              `json:"rule"`
	// Stray is set where a file does not belong, and nothing is missing without it.
	Stray bool `json:"-"`
	// Conflict is set where a checkpoint that can be read contradicts the blocks: one
	// of both may be of a fork.
	Conflict bool `json:"-"`
}

// where is the problem's place, without the rule.
func (p Problem) where() string {
	s := p.File
	if p.Offset != nil {
		s += fmt.Sprintf(", offset %d", *p.Offset)
	}
	return s
}

func (p Problem) String() string {
	s := p.where()
	if p.Record != nil {
		s += fmt.Sprintf(", record %d", *p.Record)
	}
	if p.Leaf != nil {
		s += fmt.Sprintf(", leaf %d", *p.Leaf)
	}
	if p.Height != nil && *p.Height > 0 {
		s += fmt.Sprintf(", block %d", *p.Height)
	}
	if p.Kind != "" {
		s += ", " + string(p.Kind)
	}
	return s + ": " + p.Rule
}

// FsckReport is what checking a data folder gave.
type FsckReport struct {
	OK       bool      `json:"ok"`
	Problems []Problem `json:"problems,omitempty"`
	// Notes are not problems: what an interrupted write left, for instance, which
	// the next start puts right.
	Notes       []string `json:"notes,omitempty"`
	Origin      string   `json:"origin,omitempty"`
	Blocks      uint64   `json:"blocks"`
	Leaves      uint64   `json:"leaves"`
	Checkpoints uint64   `json:"checkpoints"`
	Sealed      uint64   `json:"sealed_size"`
	Tiles       uint64   `json:"tiles"`
	Payloads    uint64   `json:"payloads"`
	// Gone counts payloads that were gone before they came here; their leaves are
	// checked all the same.
	Gone uint64 `json:"payloads_gone"`
	// Signatures counts records whose signatures were checked.
	Signatures uint64 `json:"signatures"`
	// Absent are the leaves whose payloads are missing, or not what the leaves
	// commit to, in rising order of their first.
	Absent []LeafRange `json:"-"`
	// Succession is the document succession.json as the blocks say, nil where they
	// do not say it all.
	Succession []byte `json:"-"`
	// Trusted is set where a policy was given and not taken from the folder.
	Trusted bool `json:"trusted_policy"`
}

// LeafRange is leaf indexes from First to Last, both included; not all of them
// need be of records.
type LeafRange struct{ First, Last uint64 }

// ExitCode returns the code that a command ends with.
func (r *FsckReport) ExitCode() int {
	if r.OK {
		return ExitPass
	}
	return ExitFail
}

// Text returns the report for people.
func (r *FsckReport) Text() string {
	var b strings.Builder
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "%s\n", p)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	fmt.Fprintf(&b, "log %s: %d blocks, %d leaves, %d of them sealed by %d checkpoints, %d tiles, %d payloads (%d gone)\n",
		r.Origin, r.Blocks, r.Leaves, r.Sealed, r.Checkpoints, r.Tiles, r.Payloads, r.Gone)
	if r.Signatures > 0 {
		fmt.Fprintf(&b, "signatures of %d records\n", r.Signatures)
	}
	switch {
	case !r.OK:
		fmt.Fprintf(&b, "DAMAGED: %d problems\n", len(r.Problems))
	case r.Trusted:
		b.WriteString("OK under the given policy\n")
	default:
		b.WriteString("OK: the folder fits together, by its own policy\n")
	}
	return b.String()
}

// JSON returns the report as an indented document.
func (r *FsckReport) JSON() []byte {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		panic(fmt.Sprintf("ledger: fsck report: %v", err)) // unreachable: plain data
	}
	return append(b, '\n')
}

// Fsck checks a data folder offline, without changing it: that every byte of the
// journals is as written, that blocks follow one another and have a quorum's
// votes, that tiles are made of their leaves, that every checkpoint is sealed
// and is the log after its block, and that payloads are what the leaves commit
// to. It names what is wrong, goes on where it can, and returns an error only
// where ctx ended or the folder cannot be read at all.
//
// It works piece by piece, in memory that does not grow with the log. A
// [Checker] lets others do the same on several cores.
func Fsck(ctx context.Context, dir fs.FS, o FsckOptions) (FsckReport, error) {
	c, err := NewChecker(dir, o)
	if err != nil {
		return FsckReport{}, fmt.Errorf("fsck: %w", err)
	}
	v := identity.NewVerifier()
	for {
		if err := ctx.Err(); err != nil {
			return c.r, err
		}
		p, err := c.Next()
		if err != nil {
			return c.r, fmt.Errorf("fsck: %w", err)
		}
		if p == nil {
			break
		}
		p.Hash(v)
		c.Take(p)
		p.Verify(v)
		if !c.Report(p) {
			break
		}
	}
	r, err := c.Finish()
	if err != nil {
		return r, fmt.Errorf("fsck: %w", err)
	}
	return r, nil
}

// ownPolicy checks that the folder's policy is the genesis document's: its log,
// and no quorum without enough of its validators.
func (c *Checker) ownPolicy(p *Policy) error {
	want, err := ParsePolicy([]byte("log " + c.genesis.LogKey + "\nquorum none\n"))
	if err != nil {
		return fmt.Errorf("genesis: log_key: %w", err)
	}
	if p.Fingerprints()[c.genesis.Origin] != want.Fingerprints()[c.genesis.Origin] {
		return fmt.Errorf("log: is not the genesis document's, %s", c.genesis.Origin)
	}
	// With any q−1 validators and everybody else the quorum must not be met.
	validators := c.reg.Validators()
	val := map[string]bool{}
	for _, v := range validators {
		val[string(v.CosignKey)] = true
	}
	signed := map[int]bool{}
	var ours []int
	for i, w := range p.witnesses {
		if val[string(w.key)] {
			ours = append(ours, i)
		} else {
			signed[i] = true
		}
	}
	q := Quorum(len(validators))
	if len(ours) < len(validators) {
		return fmt.Errorf("witness: %d of the %d validators are named", len(ours), len(validators))
	}
	for _, i := range ours[:q-1] {
		signed[i] = true
	}
	if p.quorum == nil || p.quorum.met(signed) {
		return fmt.Errorf("quorum: is met by fewer than %d of the %d validators", q, len(validators))
	}
	for _, i := range ours[:q] {
		signed[i] = true
	}
	if !p.quorum.met(signed) {
		return fmt.Errorf("quorum: is not met by %d of the %d validators", q, len(validators))
	}
	return nil
}

// unverified reads what a checkpoint says, whoever has signed it.
func unverified(signed []byte) (Checkpoint, error) {
	text, _, ok := bytes.Cut(signed, []byte("\n\n"))
	if !ok || len(signed) > MaxNote {
		return Checkpoint{}, errors.New("checkpoint: is no signed note")
	}
	return ParseCheckpoint(string(text) + "\n")
}

// readChange decodes the payload of a registry record, JSON or protobuf.
func readChange(e identity.Envelope) (identity.Change, error) {
	if e.ContentType == identity.JSON {
		return identity.ParseChange(e.Payload)
	}
	m, ok := readFields(e)
	if !ok {
		return identity.Change{}, errors.New("cannot be decoded")
	}
	c := identity.Change{Action: m.texts[2], Type: identity.EntryType(m.texts[3]), ID: m.texts[4], Nonce: m.numbers[6], Until: m.numbers[9]}
	c.District = traffic.DistrictID(m.texts[1])
	if b, ok := m.texts[5]; ok {
		c.Body = json.RawMessage(b)
	}
	if b, ok := m.texts[7]; ok {
		c.Base = identity.Digest(b)
	}
	for _, b := range m.many[8] {
		a, ok := readFields(identity.Envelope{ContentType: identity.Protobuf, Payload: []byte(b)})
		if !ok {
			return identity.Change{}, errors.New("approvals: cannot be decoded")
		}
		c.Approvals = append(c.Approvals, identity.Approval{Key: identity.KeyID(a.texts[1]), Signature: identity.Signature(a.texts[2])})
	}
	return c, nil
}
