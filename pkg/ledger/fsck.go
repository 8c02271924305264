package ledger

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// FsckOptions say how a data folder is checked.
type FsckOptions struct {
	// Policy that checkpoints must satisfy. Optional: the folder's own, which
	// proves only that the folder fits together.
	Policy *Policy
	// Progress is called now and then with how many blocks are checked, of how
	// many. Optional.
	Progress func(done, total uint64)
	// MaxProblems is after how many problems to stop. 100.
	MaxProblems int
}

// Problem is one thing that is wrong in a data folder.
type Problem struct {
	File   string  `json:"file"`
	Offset *int64  `json:"offset,omitempty"`
	Record *uint64 `json:"record,omitempty"` // number within the file's journal
	Leaf   *uint64 `json:"leaf,omitempty"`   // index in the log
	Rule   string  `json:"rule"`
}

func (p Problem) String() string {
	s := p.File
	if p.Offset != nil {
		s += fmt.Sprintf(", offset %d", *p.Offset)
	}
	if p.Record != nil {
		s += fmt.Sprintf(", record %d", *p.Record)
	}
	if p.Leaf != nil {
		s += fmt.Sprintf(", leaf %d", *p.Leaf)
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
	// Trusted is set where a policy was given and not taken from the folder.
	Trusted bool `json:"trusted_policy"`
}

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

// Names within a data folder; see services/sealing.
const (
	fsckGenesis    = "genesis.json"
	fsckPolicy     = "policy"
	fsckCheckpoint = "log/checkpoint"
	fsckBlocks     = "log/blocks"
	fsckHistory    = "log/checkpoints"
	fsckPayloads   = "payload/record"
)

// errEnough ends a check that has found enough problems.
var errEnough = errors.New("too many problems")

// fsck is one check.
type fsck struct {
	ctx        context.Context //nolint:containedctx // one call of Fsck, not kept
	o          FsckOptions
	dir        fs.FS
	r          FsckReport
	genesis    *identity.Genesis
	hash       Hash
	policy     *Policy
	succession *Succession
	later      []laterNote
	reg        *identity.Registry
	tiles      map[TileID]bool   // there, and whether checked
	partial    map[TileID][]int  // widths by the full tile's id
	sealed     map[Height]sealed // by height
	last       *SealedAt
	blocks     uint64 // as the journal's names and the history make expect
}

type sealed struct {
	record uint64
	cp     Checkpoint
}

// laterNote is a checkpoint that the policy does not verify: maybe other
// validators have cosigned it, whom the blocks will name.
type laterNote struct {
	at     rec
	height Height
	err    error
}

// Fsck checks a data folder offline, without changing it: that every byte of the
// journals is as written, that blocks follow one another and have a quorum's
// votes, that tiles are made of their leaves, that every checkpoint is sealed
// and is the log after its block, and that payloads are what the leaves commit
// to. It names what is wrong, goes on where it can, and returns an error only
// where ctx ended or the folder cannot be read at all.
func Fsck(ctx context.Context, dir fs.FS, o FsckOptions) (FsckReport, error) {
	if o.MaxProblems <= 0 {
		o.MaxProblems = 100
	}
	f := &fsck{ctx: ctx, o: o, dir: dir, tiles: map[TileID]bool{}, partial: map[TileID][]int{}, sealed: map[Height]sealed{}}
	err := f.run()
	if errors.Is(err, errEnough) {
		f.r.Notes = append(f.r.Notes, "stopped: too many problems")
		err = nil
	}
	if err != nil && ctx.Err() == nil {
		return f.r, fmt.Errorf("fsck: %w", err)
	}
	f.r.OK = len(f.r.Problems) == 0 && err == nil
	return f.r, err
}

// bad notes a problem.
func (f *fsck) bad(p Problem) error {
	f.r.Problems = append(f.r.Problems, p)
	if len(f.r.Problems) >= f.o.MaxProblems {
		return errEnough
	}
	return nil
}

func (f *fsck) badFile(file, format string, args ...any) error {
	return f.bad(Problem{File: file, Rule: fmt.Sprintf(format, args...)})
}

// badRecord notes a problem of a record of a journal.
func (f *fsck) badRecord(r rec, format string, args ...any) error {
	return f.bad(Problem{File: r.file, Offset: &r.offset, Record: &r.n, Rule: fmt.Sprintf(format, args...)})
}

// damaged turns what reading a journal gave into a problem, or a note where a
// crash explains it.
func (f *fsck) damaged(dir string, err error) error {
	var d *segment.Damage
	switch {
	case errors.As(err, &d) && d.Torn:
		f.r.Notes = append(f.r.Notes, fmt.Sprintf("%s/%v; the next start cuts it off", dir, d))
		return nil
	case errors.As(err, &d):
		return f.bad(Problem{File: dir + "/" + d.File, Offset: &d.Offset, Record: &d.Record, Rule: d.Rule})
	case errors.Is(err, fs.ErrNotExist):
		return f.badFile(dir, "is missing")
	}
	return err
}

// rec is one record of a journal.
type rec struct {
	n      uint64
	data   []byte
	file   string
	offset int64
}

// journal reads a journal record by record; err, if set afterwards, ended it.
func (f *fsck) journal(dir string, err *error) iter.Seq[rec] {
	stop := errors.New("stop")
	return func(yield func(rec) bool) {
		_, e := segment.Walk(f.dir, dir, 0, func(n uint64, data []byte, file string, offset int64) error {
			if !yield(rec{n, data, dir + "/" + file, offset}) {
				return stop
			}
			return nil
		})
		if !errors.Is(e, stop) {
			*err = e
		}
	}
}

func (f *fsck) run() error {
	ok, err := f.documents()
	if !ok || err != nil {
		return err // nothing can be checked without them
	}
	if err := f.list(); err != nil {
		return err
	}
	if err := f.history(); err != nil {
		return err
	}
	tiler, err := f.chain()
	if err != nil {
		return err
	}
	if err := f.cosigned(); err != nil {
		return err
	}
	return f.edge(tiler)
}

// documents reads genesis and policy and holds them against each other.
func (f *fsck) documents() (ok bool, err error) {
	g, err := fs.ReadFile(f.dir, fsckGenesis)
	if err != nil {
		return false, f.badFile(fsckGenesis, "cannot be read: %v", err)
	}
	f.hash = sha256.Sum256(g)
	if f.genesis, err = identity.ParseGenesis(g); err == nil {
		f.reg, err = identity.NewRegistry(f.genesis)
	}
	if err != nil {
		return false, f.badFile(fsckGenesis, "%v", err)
	}
	f.r.Origin = f.genesis.Origin
	b, err := fs.ReadFile(f.dir, fsckPolicy)
	if err != nil {
		return false, f.badFile(fsckPolicy, "cannot be read: %v", err)
	}
	own, err := ParsePolicy(b)
	if err != nil {
		return false, f.badFile(fsckPolicy, "%v", err)
	}
	if err := f.ownPolicy(own); err != nil {
		return false, f.badFile(fsckPolicy, "%v", err)
	}
	f.policy = own
	if f.o.Policy != nil {
		f.policy, f.r.Trusted = f.o.Policy, true
	}
	f.succession, err = NewSuccession(f.genesis, f.policy)
	return err == nil, err
}

// ownPolicy checks that the folder's policy is the genesis document's: its log,
// and no quorum without enough of its validators.
func (f *fsck) ownPolicy(p *Policy) error {
	want, err := ParsePolicy([]byte("log " + f.genesis.LogKey + "\nquorum none\n"))
	if err != nil {
		return fmt.Errorf("genesis: log_key: %w", err)
	}
	if p.Fingerprints()[f.genesis.Origin] != want.Fingerprints()[f.genesis.Origin] {
		return fmt.Errorf("log: is not the genesis document's, %s", f.genesis.Origin)
	}
	// With any q−1 validators and everybody else the quorum must not be met.
	validators := f.reg.Validators()
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

// list reads the names of all tiles.
func (f *fsck) list() error {
	err := fs.WalkDir(f.dir, "log/tile", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path == "log/tile" {
			return fs.SkipAll
		}
		if err != nil || e.IsDir() {
			return err
		}
		id, perr := ParseTilePath(strings.TrimPrefix(path, "log/"))
		if perr != nil {
			return f.badFile(path, "is not the name of a tile")
		}
		f.tiles[id] = false
		if id.Width < TileWidth {
			full := id
			full.Width = TileWidth
			f.partial[full] = append(f.partial[full], id.Width)
		}
		return nil
	})
	return err
}

// history reads all sealed checkpoints and verifies their signatures.
func (f *fsck) history() error {
	var jerr error
	var before SealedAt
	var size uint64
	if firsts, err := segment.List(f.dir, fsckHistory); err == nil && len(firsts) > 0 && firsts[0] != 0 {
		if err := f.badFile(fsckHistory, "begins with record %d: a segment is missing", firsts[0]); err != nil {
			return err
		}
	}
	for r := range f.journal(fsckHistory, &jerr) {
		if err := f.ctx.Err(); err != nil {
			return err
		}
		at, err := ParseSealedAt(r.data)
		if err != nil {
			if err := f.badRecord(r, "%v", err); err != nil {
				return err
			}
			continue
		}
		s, err := f.policy.Open(at.Note)
		if err != nil {
			if c, perr := unverified(at.Note); perr == nil {
				f.later = append(f.later, laterNote{rec{r.n, nil, r.file, r.offset}, at.Height, err})
				s, err = &Sealed{Checkpoint: c}, nil
			}
		}
		switch {
		case err != nil:
			err = f.badRecord(r, "%v", err)
		case s.Origin != f.genesis.Origin:
			err = f.badRecord(r, "is of the log %s", s.Origin)
		case at.Height <= before.Height || s.Size <= size:
			err = f.badRecord(r, "does not come after the checkpoint before")
		default:
			f.sealed[at.Height] = sealed{r.n, s.Checkpoint}
			f.r.Checkpoints++
			f.r.Sealed, size = s.Size, s.Size
			before, f.last = *at, at
		}
		if err != nil {
			return err
		}
	}
	if jerr != nil {
		if err := f.damaged(fsckHistory, jerr); err != nil {
			return err
		}
	}
	b, err := fs.ReadFile(f.dir, fsckCheckpoint)
	switch {
	case errors.Is(err, fs.ErrNotExist) && f.last == nil:
		return nil
	case err != nil:
		return f.badFile(fsckCheckpoint, "cannot be read: %v", err)
	case f.last != nil && bytes.Equal(b, f.last.Note):
		return nil
	}
	// A crash may leave the checkpoint before the last one, never another.
	if f.r.Checkpoints >= 2 {
		var prev []byte
		for r := range f.journal(fsckHistory, new(error)) {
			if at, err := ParseSealedAt(r.data); err == nil && at.Height < f.last.Height {
				prev = at.Note
			}
		}
		if bytes.Equal(b, prev) {
			f.r.Notes = append(f.r.Notes, fsckCheckpoint+": is one behind the history; the next start replaces it")
			return nil
		}
	}
	return f.badFile(fsckCheckpoint, "is not the last of the history of checkpoints")
}

// unverified reads what a checkpoint says, whoever has signed it.
func unverified(signed []byte) (Checkpoint, error) {
	text, _, ok := bytes.Cut(signed, []byte("\n\n"))
	if !ok || len(signed) > MaxNote {
		return Checkpoint{}, errors.New("checkpoint: is no signed note")
	}
	return ParseCheckpoint(string(text) + "\n")
}

// cosigned holds the checkpoints against the validators who decided their
// blocks, where these are not those of genesis.
func (f *fsck) cosigned() error {
	first := Height(math.MaxUint64)
	if sets := f.succession.Sets(); len(sets) > 1 {
		first = sets[1].Since
	}
	for _, l := range f.later {
		if l.height <= first {
			if err := f.badRecord(l.at, "%v", l.err); err != nil {
				return err
			}
		}
	}
	if first == math.MaxUint64 {
		return nil
	}
	for r := range f.journal(fsckHistory, new(error)) { // damage was told of before
		if err := f.ctx.Err(); err != nil {
			return err
		}
		at, err := ParseSealedAt(r.data)
		if err != nil || at.Height <= first {
			continue
		}
		if _, err := f.succession.Open(at.Height, at.Note); err != nil {
			if err := f.badRecord(r, "%v", err); err != nil {
				return err
			}
		}
	}
	f.r.Notes = append(f.r.Notes, fmt.Sprintf("block %d changed the validators: later checkpoints were checked by those that the blocks name", first))
	return nil
}

// chain goes through the blocks with their tiles and payloads.
func (f *fsck) chain() (*Tiler, error) {
	if firsts, err := segment.List(f.dir, fsckBlocks); err == nil && len(firsts) > 0 {
		f.blocks = firsts[len(firsts)-1]
	}
	if f.last != nil {
		f.blocks = max(f.blocks, uint64(f.last.Height))
	}
	var perr error
	next, stop := iter.Pull(f.journal(fsckPayloads, &perr))
	defer stop()
	pay := &payloads{f: f, next: next}
	if r, ok := next(); ok {
		pay.ahead = &r
	}
	var t Tiler
	var parent *Header
	var tree Frontier
	var jerr error
	for r := range f.journal(fsckBlocks, &jerr) {
		if err := f.ctx.Err(); err != nil {
			return nil, err
		}
		d, err := ParseDecided(r.data)
		if err == nil && uint64(d.Header.Height) != r.n+1 {
			err = fmt.Errorf("block %d: is at the place of block %d", d.Header.Height, r.n+1)
		}
		if err == nil {
			err = d.Check(f.hash, parent, &tree, f.succession.At(d.Header.Height).Validators)
		}
		if err == nil && d.Header.Registry != Hash(f.reg.Hash()) && !pay.lost {
			err = fmt.Errorf("block %d: registry: is not what the changes so far make of it", d.Header.Height)
		}
		if err != nil {
			// What follows builds on this block.
			return nil, f.badRecord(r, "%v", err)
		}
		h := d.Header
		parent = &h
		f.r.Blocks, f.r.Leaves = uint64(h.Height), h.Size
		t.Append(d.Leaves)
		for _, tile := range t.Full() {
			if err := f.tile(tile); err != nil {
				return nil, err
			}
		}
		if s, ok := f.sealed[h.Height]; ok {
			if s.cp != h.Checkpoint(f.genesis.Origin) {
				n := s.record
				if err := f.bad(Problem{File: fsckHistory, Record: &n, Rule: fmt.Sprintf("is not the log after block %d", h.Height)}); err != nil {
					return nil, err
				}
			}
			delete(f.sealed, h.Height)
		}
		if err := pay.block(d); err != nil {
			return nil, err
		}
		if f.reg.MembersSince() == uint64(h.Height) {
			if err := f.succession.Change(h.Height, f.reg.Validators()); err != nil {
				return nil, err
			}
		}
		if f.o.Progress != nil && h.Height%256 == 0 {
			f.o.Progress(uint64(h.Height), max(f.blocks, uint64(h.Height)))
		}
	}
	if jerr != nil {
		if err := f.damaged(fsckBlocks, jerr); err != nil {
			return nil, err
		}
	}
	for _, h := range slices.Sorted(maps.Keys(f.sealed)) {
		if err := f.badFile(fsckBlocks, "block %d is missing, checkpoint %d of the history covers it", h, f.sealed[h].record); err != nil {
			return nil, err
		}
	}
	// Payloads of blocks that a crash kept from the journal may be left.
	for pay.ahead != nil {
		if p, err := ParsePayload(pay.ahead.data); err != nil {
			if err := f.badRecord(*pay.ahead, "%v", err); err != nil {
				return nil, err
			}
		} else if uint64(p.Height) <= f.r.Blocks {
			if err := f.badRecord(*pay.ahead, "is of leaf %d, which has no place for it", p.Index); err != nil {
				return nil, err
			}
		}
		pay.advance()
	}
	if perr != nil {
		if err := f.damaged(fsckPayloads, perr); err != nil {
			return nil, err
		}
	}
	if f.o.Progress != nil {
		f.o.Progress(f.r.Blocks, f.r.Blocks)
	}
	return &t, nil
}

// payloads walks the payload store beside the blocks.
type payloads struct {
	f     *fsck
	next  func() (rec, bool)
	ahead *rec // the next record, nil at the end
	lost  bool // payloads are missing, so that the registry is not known
}

func (p *payloads) advance() {
	p.ahead = nil
	if r, ok := p.next(); ok {
		p.ahead = &r
	}
}

// block holds the payloads of a block against its leaves, and applies its
// registry changes.
func (p *payloads) block(d *Decided) error {
	f, h := p.f, d.Header
	reported := false
	for i := 1; i < len(d.Leaves); i++ {
		index := h.PrevSize + uint64(i)
		due := index - uint64(h.Height)
		if p.ahead == nil || p.ahead.n > due {
			p.lost = true
			if !reported {
				reported = true
				if err := f.bad(Problem{File: fsckPayloads, Record: &due, Leaf: &index, Rule: "is missing"}); err != nil {
					return err
				}
			}
			continue
		}
		r := *p.ahead
		p.advance()
		bad := func(format string, args ...any) error {
			p.lost = true
			return f.bad(Problem{File: r.file, Offset: &r.offset, Record: &r.n, Leaf: &index, Rule: fmt.Sprintf(format, args...)})
		}
		pl, err := ParsePayload(r.data)
		switch {
		case err != nil:
			err = bad("%v", err)
		case pl.Index != index || pl.Height != h.Height || r.n != due:
			err = bad("is of leaf %d of block %d", pl.Index, pl.Height)
		case len(pl.Envelope) == 0:
			f.r.Gone++
			p.lost = true
		case pl.Leaf() != d.Leaves[i]:
			err = bad("is not what the leaf commits to")
		default:
			f.r.Payloads++
			err = p.apply(pl, bad)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// apply carries out a registry record, so that the next headers can be checked.
func (p *payloads) apply(pl *Payload, bad func(string, ...any) error) error {
	e, err := identity.ParseEnvelope(pl.Envelope)
	if err != nil {
		return bad("%v", err)
	}
	if e.Kind != identity.KindRegistry || p.lost {
		return nil
	}
	c, err := readChange(e)
	if err == nil {
		err = p.f.reg.Apply(uint64(pl.Height), e.Key, c)
	}
	if err != nil {
		return bad("registry record: %v", err)
	}
	return nil
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

// tile compares a full tile and its partial forms with what the leaves make.
func (f *fsck) tile(t TileFile) error {
	for _, w := range f.partial[t.TileID] {
		if err := f.compare(TileFile{TileID{t.Level, t.N, w}, prefix(t, w)}); err != nil {
			return err
		}
	}
	if _, there := f.tiles[t.TileID]; !there {
		if f.r.Sealed>>(TileHeight*(max(t.Level, 0)+1)) > t.N {
			return f.badFile("log/"+t.Path(), "is missing")
		}
		return nil // not sealed yet, so not needed
	}
	return f.compare(t)
}

// prefix returns the first w entries or hashes of a tile.
func prefix(t TileFile, w int) []byte {
	if t.Level != EntriesLevel {
		return t.Data[:min(w*32, len(t.Data))]
	}
	es, err := ReadEntries(t.Data)
	if err != nil || len(es) < w {
		return nil
	}
	n := 0
	for _, e := range es[:w] {
		n += 2 + len(e)
	}
	return t.Data[:n]
}

func (f *fsck) compare(t TileFile) error {
	f.tiles[t.TileID] = true
	f.r.Tiles++
	b, err := fs.ReadFile(f.dir, "log/"+t.Path())
	if err != nil {
		return f.badFile("log/"+t.Path(), "cannot be read: %v", err)
	}
	if bytes.Equal(b, t.Data) {
		return nil
	}
	at := int64(0)
	for at < int64(len(b)) && at < int64(len(t.Data)) && b[at] == t.Data[at] {
		at++
	}
	p := Problem{File: "log/" + t.Path(), Offset: &at, Rule: "is not what the blocks' leaves make"}
	if t.Level <= 0 {
		per := int64(32)
		if t.Level == EntriesLevel {
			per = LeafSize + 2
		}
		leaf := t.N*TileWidth + uint64(at/per)
		p.Leaf = &leaf
	}
	return f.bad(p)
}

// edge checks the tiles at the right edge, and that nothing is left over.
func (f *fsck) edge(t *Tiler) error {
	if t == nil {
		return nil // a block was wrong; what depends on it cannot be judged
	}
	edge := map[TileID]TileFile{}
	for _, p := range t.Partial() {
		full := p.TileID
		full.Width = TileWidth
		edge[full] = p
	}
	for full, p := range edge {
		for _, w := range f.partial[full] {
			if w > p.Width {
				if err := f.badFile("log/"+TileID{full.Level, full.N, w}.Path(), "is of a log that the block journal does not reach"); err != nil {
					return err
				}
				f.tiles[TileID{full.Level, full.N, w}] = true
				continue
			}
			if err := f.compare(TileFile{TileID{full.Level, full.N, w}, prefix(p, w)}); err != nil {
				return err
			}
		}
	}
	if f.r.Leaves >= f.r.Sealed {
		for _, id := range PartialTiles(f.r.Sealed) {
			full := id
			full.Width = TileWidth
			_, there := f.tiles[id]
			if _, whole := f.tiles[full]; !there && !whole {
				if err := f.badFile("log/"+id.Path(), "is missing"); err != nil {
					return err
				}
			}
		}
	}
	var left []string
	for id, checked := range f.tiles {
		if !checked {
			left = append(left, "log/"+id.Path())
		}
	}
	slices.Sort(left)
	for _, name := range left {
		if err := f.badFile(name, "is not a tile of this log"); err != nil {
			return err
		}
	}
	return nil
}
