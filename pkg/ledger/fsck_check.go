package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// Checker checks a data folder piece by piece, so that a caller can spread the
// work over its cores. For each piece, in this order:
//
//	Next    in the log's order, by one caller at a time
//	Hash    anywhere
//	Take    in the log's order, by one caller at a time, beside Next
//	Verify  anywhere
//	Report  in the log's order, by one caller at a time, beside the others
//
// and at the end Finish. [Fsck] does it all in one place.
type Checker struct {
	o       FsckOptions
	dir     fs.FS
	genesis *identity.Genesis
	hash    Hash
	policy  *Policy
	// document is the genesis document.
	document []byte
	tiles    atomic.Uint64
	council  atomic.Pointer[Council] // who decides, as far as Take has come

	// Used by Next.
	end      bool
	blocks   *stream
	payloads []*head
	due      uint64 // size of the log so far
	gap      bool   // blocks before the next one could not be read
	run      *run
	told     map[string]bool // where payloads were told to be missing
	more     uint64          // payloads that are missing there, too
	total    uint64

	// Used by Take.
	reg        *identity.Registry
	sure       bool // reg is what the blocks so far have made
	succession *Succession
	tree       *edge // nil: not known
	parent     *Header
	parentHash Hash
	linked     bool // parentHash is of the block before
	height     Height
	size       uint64
	lost       map[uint64]rec // payloads of blocks that could not be read, by leaf
	history    *history
	file       *fileNote // the file checkpoint, nil if there is none
	fileAt     Height    // the block at whose end it is
	known      []knownNote
	taken      []Problem // of the piece in hand

	// Used by Report.
	r                        FsckReport
	full                     bool
	unsigned, unvoted, unmet uint64
}

// Names within a data folder; see services/sealing.
const (
	fsckGenesis    = "genesis.json"
	fsckPolicy     = "policy"
	fsckSuccession = "succession.json"
	fsckCheckpoint = "log/checkpoint"
	fsckBlocks     = "log/blocks"
	fsckHistory    = "log/checkpoints"
	fsckTiles      = "log/tile"
	fsckPayload    = "payload"
)

// logNames are what belongs in the folder log.
var logNames = []string{"checkpoint", "checkpoints", "blocks", "tile", "tmp"}

// knownNote is a checkpoint that somebody has seen.
type knownNote struct {
	note []byte
	cp   Checkpoint
	met  bool
}

// fileNote is the file checkpoint.
type fileNote struct {
	note []byte
	cp   Checkpoint
	err  error
}

// head is one store of payloads, with its next two records.
type head struct {
	*stream
	now, then *indexed
	before    uint64 // leaf of the record that was taken last
	any       bool   // that there was one
}

type indexed struct {
	rec
	leaf uint64
}

// run is a stretch of payloads that are missing.
type run struct {
	p           Problem
	first, last uint64
}

// NewChecker reads the documents of a data folder and the names of its journals.
// An error means that the folder cannot be read at all; where the documents are
// wrong, Next says at once that there is nothing more to check.
func NewChecker(dir fs.FS, o FsckOptions) (*Checker, error) {
	if o.MaxProblems <= 0 {
		o.MaxProblems = 100
	}
	c := &Checker{o: o, dir: dir, tree: &edge{}, linked: true, sure: true, lost: map[uint64]rec{}, told: map[string]bool{}}
	ok, err := c.documents()
	if err != nil {
		return nil, err
	}
	if !ok {
		c.end, c.tree = true, nil
		return c, nil
	}
	c.parentHash = c.hash
	if c.blocks, err = openStream(dir, fsckBlocks, false); err != nil {
		return nil, err
	}
	if c.history, err = c.openHistory(); err != nil {
		return nil, err
	}
	if err := c.openPayloads(); err != nil {
		return nil, err
	}
	if b, err := fs.ReadFile(dir, fsckCheckpoint); err == nil {
		cp, err := unverified(b)
		c.file = &fileNote{b, cp, err}
	} else if !errors.Is(err, fs.ErrNotExist) {
		c.file = &fileNote{err: err}
	}
	c.total = c.blocks.total()
	for _, h := range c.payloads {
		c.total += h.total()
	}
	for _, n := range o.Known {
		cp, err := unverified(n)
		if err != nil {
			return nil, fmt.Errorf("a checkpoint that is known: %w", err)
		}
		c.known = append(c.known, knownNote{note: n, cp: cp})
	}
	now := c.succession.At(1)
	c.council.Store(&now)
	return c, nil
}

// documents reads genesis and policy and holds them against each other.
func (c *Checker) documents() (ok bool, err error) {
	bad := func(file, format string, args ...any) (bool, error) {
		c.tell(Problem{File: file, Rule: fmt.Sprintf(format, args...)})
		return false, nil
	}
	g, err := fs.ReadFile(c.dir, fsckGenesis)
	if err != nil {
		return bad(fsckGenesis, "cannot be read: %v", err)
	}
	c.document, c.hash = g, sha256.Sum256(g)
	if c.genesis, err = identity.ParseGenesis(g); err == nil {
		c.reg, err = identity.NewRegistry(c.genesis)
	}
	if err != nil {
		return bad(fsckGenesis, "%v", err)
	}
	c.r.Origin = c.genesis.Origin
	// All headers hold the document's hash: where they agree on another, it is the
	// document that has changed.
	if h, err := c.firstHeader(); err == nil && h.Genesis != c.hash && h.Genesis == h.Parent {
		return bad(fsckGenesis, "is not the document that block 1 builds on, with SHA-256 %x", h.Genesis)
	}
	b, err := fs.ReadFile(c.dir, fsckPolicy)
	if err != nil {
		return bad(fsckPolicy, "cannot be read: %v", err)
	}
	own, err := ParsePolicy(b)
	if err == nil {
		err = c.ownPolicy(own)
	}
	if err == nil && !bytes.HasPrefix(b, []byte("log "+c.genesis.LogKey+"\n")) {
		err = errors.New("log: is not written as in the genesis document")
	}
	if err == nil && !plainPolicy(b) {
		err = errors.New("is not in the form that it is written in: fields with one space between, no comments")
	}
	if err != nil {
		return bad(fsckPolicy, "%v", err)
	}
	c.policy = own
	if c.o.Policy != nil {
		c.policy, c.r.Trusted = c.o.Policy, true
		if !slices.Equal(fingerprints(own), fingerprints(c.o.Policy)) {
			c.note("the folder's policy names other keys than the one given")
		}
	}
	c.succession, err = NewSuccession(c.genesis, c.policy)
	return err == nil, err
}

func fingerprints(p *Policy) []string {
	var out []string
	for name, f := range p.Fingerprints() {
		out = append(out, name+" "+f)
	}
	slices.Sort(out)
	return out
}

// plainPolicy reports whether a policy has nothing in it that could change without
// a change of its meaning.
func plainPolicy(b []byte) bool {
	if !bytes.HasSuffix(b, []byte("\n")) {
		return false
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line != strings.Join(strings.Fields(line), " ") || strings.ContainsAny(line, "#\t\r\v\f\u0085\u00a0") {
			return false
		}
	}
	return true
}

// firstHeader reads the header of block 1, unverified.
func (c *Checker) firstHeader() (Header, error) {
	s, err := openStream(c.dir, fsckBlocks, false)
	if err != nil {
		return Header{}, err
	}
	r, ok, err := s.record()
	if s.file != nil {
		s.close()
	}
	if err != nil || !ok || r.n != 0 {
		return Header{}, errors.New("no block 1")
	}
	return headerOf(r.data)
}

// headerOf decodes the header of a journalled block and no more.
func headerOf(b []byte) (Header, error) {
	n := len(journalMagic)
	if len(b) < n+HeaderSize || string(b[:n]) != journalMagic {
		return Header{}, errors.New("block: not in the form of stopline block v1")
	}
	return ParseHeader(b[n : n+HeaderSize])
}

// openPayloads opens the payload store of each class.
func (c *Checker) openPayloads() error {
	es, err := fs.ReadDir(c.dir, fsckPayload)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range es {
		name := fsckPayload + "/" + e.Name()
		if e.IsDir() && e.Name() == "tmp" {
			continue // what is being replaced; nothing of it counts
		}
		if !e.IsDir() {
			c.tell(Problem{File: name, Rule: "does not belong here", Stray: true})
			continue
		}
		kept := slices.Contains(neverPurged, e.Name())
		if kept && c.o.Absences != nil {
			if err := c.absences(name); err != nil {
				return err
			}
		}
		s, err := openStream(c.dir, name, !kept)
		if err != nil {
			return err
		}
		for _, p := range s.strange {
			c.tell(p)
		}
		c.payloads = append(c.payloads, &head{stream: s})
	}
	return nil
}

// neverPurged are the folders of payloads that begin with record 0 for ever; see
// pkg/retention and services/internal/payload.
var neverPurged = []string{"registry", "gone"}

// absences reads what may explain that other payloads are gone.
func (c *Checker) absences(dir string) error {
	s, err := openStream(c.dir, dir, false)
	if err != nil {
		return err
	}
	for {
		r, ok, err := s.record()
		if !ok || err != nil {
			return err
		}
		if pl, err := ParsePayload(r.data); err == nil {
			c.o.Absences.Add(pl)
		}
	}
}

// absent reports whether the payload of a leaf may be gone from a folder.
func (c *Checker) absent(leaf uint64) bool {
	return c.o.Absences != nil && c.o.Absences.Explains(leaf)
}

// Total returns how many bytes the journals have, to know how far a check has come.
func (c *Checker) Total() uint64 { return c.total }

// tell notes a problem outside of a piece.
func (c *Checker) tell(p ...Problem) {
	for _, p := range p {
		if len(c.r.Problems) >= c.o.MaxProblems {
			if !c.full {
				c.full = true
				c.note("stopped: too many problems")
			}
			return
		}
		c.r.Problems = append(c.r.Problems, p)
	}
}

func (c *Checker) note(format string, args ...any) {
	c.r.Notes = append(c.r.Notes, fmt.Sprintf(format, args...))
}

// Next reads the next piece of the log, nil at its end.
func (c *Checker) Next() (*Piece, error) {
	if c.end {
		return nil, nil
	}
	p := &Piece{c: c}
	for p.leaves < pieceLeaves && len(p.items) < pieceBlocks && p.bytes < pieceBytes {
		r, ok, err := c.blocks.record()
		if err != nil {
			return nil, err
		}
		if !ok {
			c.end = true
			break
		}
		for _, h := range c.blocks.holes {
			if !h.told && h.to <= r.n {
				c.hole(p, h)
			}
		}
		p.bytes += len(r.data)
		it := &item{r: r, council: *c.council.Load()}
		p.items = append(p.items, it)
		if it.err = c.place(it); it.err != nil {
			c.gap = true
			continue
		}
		for _, h := range c.payloads {
			strays, err := h.below(p, it.h.PrevSize+1)
			if err != nil {
				return nil, err
			}
			if c.gap {
				it.strays = append(it.strays, strays...)
				continue
			}
			for _, s := range strays {
				p.before = append(p.before, s.problem("is out of its place, or twice"))
			}
		}
		if err := c.slots(p, it); err != nil {
			return nil, err
		}
		c.due, c.gap = it.h.Size, false
		p.leaves += int(it.h.Size - it.h.PrevSize)
	}
	if c.end {
		c.flush(p)
	}
	p.read = c.read()
	return p, nil
}

// read is how many bytes of blocks and payloads were read.
func (c *Checker) read() uint64 {
	n := c.blocks.read
	for _, h := range c.payloads {
		n += h.read
	}
	return n
}

// hole tells of blocks that cannot be read.
func (c *Checker) hole(p *Piece, h *hole) {
	h.told = true
	height := Height(h.from + 1)
	h.at.Height = &height
	p.before = append(p.before, h.at)
	if h.to > h.from {
		c.gap = true
	}
}

// place decodes a block's header and says whether the block can be where it is.
func (c *Checker) place(it *item) (err error) {
	if it.h, err = headerOf(it.r.data); err != nil {
		return err
	}
	h := it.h
	switch {
	case uint64(h.Height) != it.r.n+1:
		return fmt.Errorf("block %d: is at the place of block %d", h.Height, it.r.n+1)
	case h.Genesis != c.hash:
		return fmt.Errorf("block %d: genesis: belongs to another district", h.Height)
	case h.Size <= h.PrevSize || h.Size-h.PrevSize > uint64(len(it.r.data)/LeafSize):
		return fmt.Errorf("block %d: size: %d on %d", h.Height, h.Size, h.PrevSize)
	case !c.gap && h.PrevSize != c.due, h.PrevSize < c.due:
		return fmt.Errorf("block %d: prev_size: %d, the log has %d", h.Height, h.PrevSize, c.due)
	}
	return nil
}

// slots takes the payloads of a block from the stores.
func (c *Checker) slots(p *Piece, it *item) error {
	it.slots = make([]slot, it.h.Size-it.h.PrevSize-1)
	for i := range it.slots {
		leaf := it.h.PrevSize + 1 + uint64(i)
		found := false
		for _, h := range c.payloads {
			if err := h.skip(p, leaf); err != nil {
				return err
			}
			if h.now != nil && h.now.leaf == leaf {
				found = true
				it.slots[i] = slot{r: h.now.rec, there: true}
				p.bytes += len(h.now.data)
				if err := h.advance(p); err != nil {
					return err
				}
				break
			}
		}
		switch {
		case found:
			c.flush(p)
		case c.absent(leaf):
			it.slots[i].gone = true
			c.flush(p)
		default:
			c.missing(p, it, leaf)
		}
	}
	return nil
}

// missing notes that there is no payload for a leaf.
func (c *Checker) missing(p *Piece, it *item, leaf uint64) {
	if n := len(p.absent); n > 0 && p.absent[n-1].Last+1 == leaf {
		p.absent[n-1].Last = leaf
	} else {
		p.absent = append(p.absent, LeafRange{leaf, leaf})
	}
	if c.run != nil && c.run.last+1 == leaf {
		c.run.last = leaf
		return
	}
	c.flush(p)
	where, at := c.whence()
	where.Leaf, where.Height = &leaf, &it.h.Height
	key := where.where()
	if at != nil {
		where.Kind, at.told = kindOf(at.data), true
	}
	if key != fsckPayload && c.told[key] {
		c.more++
		return
	}
	c.told[key] = true
	c.run = &run{where, leaf, leaf}
}

// whence says where the payload that is due should have been: in a hole of one of
// the stores; or behind the end of one; which, cannot be told in general.
func (c *Checker) whence() (where Problem, at *hole) {
	where = Problem{File: fsckPayload, Rule: "a payload is missing"}
	last, first := (*head)(nil), (*head)(nil)
	for _, h := range c.payloads {
		n := uint64(math.MaxUint64)
		if h.now != nil {
			n = h.now.n
		}
		for _, x := range h.holes {
			if x.to > x.from && (x.to == n || x.to == math.MaxUint64 && h.now == nil) {
				return x.at, x
			}
		}
		switch {
		case h.floor > 0 && !h.any:
			first = h
		case h.now == nil && (last == nil || h.before > last.before):
			last = h
		}
	}
	switch {
	case first != nil:
		where = Problem{File: first.dir + "/" + segment.Name(0), Rule: "is missing, and no receipt says why"}
	case last != nil:
		where = last.place()
		where.Rule += "a payload that should follow is not there"
	case len(c.payloads) == 1 && c.payloads[0].now != nil:
		r := c.payloads[0].now
		where = Problem{File: r.file, Offset: &r.offset, Record: &r.n, Rule: "a payload is missing that should be before"}
	}
	return where, nil
}

// flush tells of payloads that are missing.
func (c *Checker) flush(p *Piece) {
	r := c.run
	c.run = nil
	if r == nil {
		return
	}
	if r.last != r.first {
		r.p.Rule += fmt.Sprintf("; payloads of leaves %d to %d", r.first, r.last)
	}
	p.before = append(p.before, r.p)
}

// advance reads the record after the next one of a store.
func (h *head) advance(p *Piece) error {
	if h.now != nil {
		h.before, h.any = h.now.leaf, true
	}
	h.now, h.then = h.then, nil
	for {
		r, ok, err := h.record()
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		n := len(payloadMagic)
		if len(r.data) < n+24+32 || string(r.data[:n]) != payloadMagic {
			p.before = append(p.before, r.problem("payload: not in the form of stopline payload v1"))
			continue
		}
		x := &indexed{r, binary.BigEndian.Uint64(r.data[n:])}
		// Of two that are not in order, one is out of its place.
		if h.now != nil && x.leaf <= h.now.leaf {
			out := h.now
			if h.any && x.leaf <= h.before {
				out = x
			} else {
				h.now = x
			}
			p.before = append(p.before, out.at(out.leaf, 0).problem("is out of its place, or twice"))
			continue
		}
		if h.now == nil {
			h.now = x
			continue
		}
		h.then = x
		return nil
	}
}

// skip sees to it that the next record is there, and tells of those before leaf.
func (h *head) skip(p *Piece, leaf uint64) error {
	rs, err := h.below(p, leaf)
	for _, r := range rs {
		p.before = append(p.before, r.problem("is out of its place, or twice"))
	}
	return err
}

// below takes the records of leaves before leaf.
func (h *head) below(p *Piece, leaf uint64) (out []rec, err error) {
	if h.now == nil && h.then == nil {
		if err := h.advance(p); err != nil {
			return nil, err
		}
	}
	for h.now != nil && h.now.leaf < leaf {
		out = append(out, h.now.rec)
		if err := h.advance(p); err != nil {
			return out, err
		}
	}
	return out, nil
}

// bad notes a problem of the piece that Take has in hand.
func (c *Checker) bad(p Problem) { c.taken = append(c.taken, p) }

func (c *Checker) badBlock(it *item, format string, args ...any) {
	p := it.r.problem(format, args...)
	height := Height(it.r.n + 1)
	p.Height = &height
	c.bad(p)
	for i, s := range it.slots {
		if s.there {
			c.lost[it.h.PrevSize+1+uint64(i)] = s.r
		}
	}
	c.linked = false
}

// Take puts a piece after those before it: the chain of headers, the tree, the
// registry, the checkpoints.
func (c *Checker) Take(p *Piece) {
	for _, it := range p.items {
		c.take(p, it)
	}
	p.taken, c.taken = c.taken, nil
}

func (c *Checker) take(p *Piece, it *item) {
	if it.err != nil {
		c.badBlock(it, "%v", it.err)
		return
	}
	h := it.h
	for _, r := range it.strays {
		if pl, err := ParsePayload(r.data); err == nil {
			c.lost[pl.Index] = r
		}
	}
	quorum := func() bool {
		w := c.succession.At(h.Height)
		if w.Since != it.council.Since {
			it.votes, it.council = len(ValidVotes(it.hash, it.d.Metadata, it.d.Votes, w.Validators)), w
		}
		return it.votes >= Quorum(len(w.Validators))
	}
	if h.Height != c.height+1 {
		c.linked = false
	}
	voted := quorum()
	// Without a quorum of those who are thought to decide the block is believed
	// nothing, unless blocks are missing that may have changed them.
	if !voted && (c.linked && c.sure || h.RegistryVersion == c.reg.Version()) {
		c.badBlock(it, "block %d: votes: %d valid of the %d needed from %d validators", h.Height, it.votes, Quorum(len(it.council.Validators)), len(it.council.Validators))
		return
	}
	if c.linked {
		switch {
		case h.Parent != c.parentHash:
			c.badBlock(it, "block %d: parent: is not the block before", h.Height)
			return
		case c.parent != nil && !h.Time.After(c.parent.Time):
			c.badBlock(it, "block %d: time: not later than its parent's", h.Height)
			return
		}
	}
	if h.PrevSize < c.size {
		c.badBlock(it, "block %d: prev_size: %d, the log has %d", h.Height, h.PrevSize, c.size)
		return
	}
	filled := false
	if h.PrevSize > c.size || h.Height != c.height+1 {
		filled = c.fill(p, it)
		voted = voted || quorum()
	}
	clear(c.lost)
	switch {
	case h.Registry == Hash(c.reg.Hash()):
		c.sure = true
	case c.sure:
		c.badBlock(it, "block %d: registry: is not what the changes so far make of it", h.Height)
		c.sure = false
	}
	if !voted {
		if c.sure {
			c.badBlock(it, "block %d: votes: %d valid of the %d needed from %d validators", h.Height, it.votes, Quorum(len(it.council.Validators)), len(it.council.Validators))
			return
		}
		p.unvoted++
	}
	if c.tree != nil {
		c.push(p, it.leaves, it.hashes)
		if c.tree.root() != h.Root {
			if filled {
				c.bad(Problem{File: fsckTiles + "/entries", Height: &h.Height, Rule: fmt.Sprintf("entries up to %d, of blocks that cannot be read, do not lead to the root of block %d", h.PrevSize, h.Height)})
			} else {
				c.badBlock(it, "block %d: root: does not follow from the leaves", h.Height)
			}
			c.tree = nil
		}
	}
	c.parent, c.parentHash, c.linked, c.height, c.size = &h, it.hash, true, h.Height, h.Size
	c.taken = append(c.taken, it.bad...)
	for _, b := range it.bad {
		p.absent = append(p.absent, LeafRange{*b.Leaf, *b.Leaf})
	}
	c.records(p, it)
	c.checkpoints(p, h.Checkpoint(c.genesis.Origin), h.Height)
	p.height, p.size = h.Height, h.Size
}

// records counts a block's payloads and carries out its registry changes.
func (c *Checker) records(p *Piece, it *item) {
	if c.sure {
		it.reg = c.reg
	}
	mine := false
	for i := range it.slots {
		s := &it.slots[i]
		switch {
		case s.gone:
			p.gone++
			c.sure = false
		case !s.ok:
			c.sure = false
		default:
			p.payloadsOK++
			if isRegistry(s.salt.Envelope) {
				c.change(s.r.at(s.salt.Index, it.h.Height), s.salt, &mine)
			}
		}
	}
	c.members(it.h.Height)
}

// change carries out one registry record. mine is set once the registry is no
// other's, who may be reading it.
func (c *Checker) change(r leafRec, pl *Payload, mine *bool) {
	if !c.sure {
		return
	}
	if !*mine {
		c.reg, *mine = c.reg.Clone(), true
	}
	e, err := identity.ParseEnvelope(pl.Envelope)
	var ch identity.Change
	if err == nil {
		ch, err = readChange(e)
	}
	if err == nil {
		err = c.reg.Apply(uint64(pl.Height), e.Key, ch)
	}
	if err != nil {
		c.bad(r.problem("registry record: %v", err))
	}
}

// members goes along when a block has changed the validators.
func (c *Checker) members(h Height) {
	if c.reg.MembersSince() != uint64(h) {
		return
	}
	if err := c.succession.Change(h, c.reg.Validators()); err != nil {
		c.bad(Problem{File: fsckBlocks, Height: &h, Rule: err.Error()})
		return
	}
	now := c.succession.At(h + 1)
	c.council.Store(&now)
}

// fill takes what blocks were that cannot be read from the entries, up to a block
// that can. If its root is right with them, so were they.
func (c *Checker) fill(p *Piece, it *item) bool {
	if c.tree == nil {
		c.height, c.size = it.h.Height-1, it.h.PrevSize
		c.sure = false
		return false
	}
	missing, from := uint64(it.h.Height-1-c.height), c.size
	leaves, file, err := c.entries(c.size, it.h.PrevSize)
	heads := uint64(0)
	for i := 0; i < len(leaves); i += LeafSize {
		if Class(leaves[i+1]) == ClassHeader {
			heads++
		}
	}
	if err == nil && heads != missing {
		err = fmt.Errorf("are of %d blocks, %d are missing", heads, missing)
	}
	if err == nil && len(leaves) > 0 && (Class(leaves[1]) != ClassHeader || c.linked && Hash(leaves[2:LeafSize]) != c.parentHash) {
		err = errors.New("do not go on from the last block that can be read")
	}
	if err != nil {
		c.bad(Problem{File: file, Leaf: &from, Rule: fmt.Sprintf("entries up to %d, of blocks that cannot be read: %v", it.h.PrevSize, err)})
		c.tree, c.sure = nil, false
		c.height, c.size = it.h.Height-1, it.h.PrevSize
		return false
	}
	height, mine := c.height, false
	end := func() {
		c.members(height)
		c.checkpoints(p, Checkpoint{c.genesis.Origin, c.tree.size, c.tree.root()}, height)
	}
	for i := 0; i < len(leaves); i += LeafSize {
		leaf := leaves[i : i+LeafSize]
		if Class(leaf[1]) == ClassHeader {
			if i > 0 {
				end()
			}
			height++
		} else if r, ok := c.lost[c.tree.size]; !ok {
			c.sure = false
		} else {
			pl, err := ParsePayload(r.data)
			at := r.at(c.tree.size, height)
			switch {
			case err != nil:
				c.bad(at.problem("%v", err))
				c.sure = false
			case len(pl.Envelope) == 0:
				p.gone++
				c.sure = false
			case pl.Height != height:
				c.bad(at.problem("is of block %d", pl.Height))
				c.sure = false
			case p.commit(pl) != Hash(leaf[2:]):
				c.bad(at.problem("is not what the leaf commits to"))
				c.sure = false
			default:
				p.payloadsOK++
				if isRegistry(pl.Envelope) {
					c.change(at, pl, &mine)
				}
			}
		}
		c.push(p, leaf, []tlog.Hash{leafHash(leaf)})
	}
	if len(leaves) > 0 {
		end()
	}
	c.height, c.size, c.linked = it.h.Height-1, it.h.PrevSize, false
	return true
}

// entries reads the leaves [from, to) from the entry bundles, which must be what
// the hash tiles say. file is what cannot be read.
func (c *Checker) entries(from, to uint64) (leaves []byte, file string, err error) {
	for n := from / TileWidth; n*TileWidth < to; n++ {
		want := int(min(TileWidth, to-n*TileWidth))
		b, name, err := c.widest(EntriesLevel, n, want)
		if err != nil {
			return nil, name, err
		}
		hs, hname, err := c.widest(0, n, want)
		if err != nil {
			return nil, hname, err
		}
		const per = LeafSize + 2
		for k := range want {
			if len(b) < (k+1)*per || len(hs) < (k+1)*tlog.HashSize {
				return nil, name, fmt.Errorf("end before leaf %d", n*TileWidth+uint64(k))
			}
			e := b[k*per : (k+1)*per]
			leaf := e[2:]
			if _, err := ParseLeaf(leaf); err != nil || e[0] != 0 || e[1] != LeafSize || leafHash(leaf) != tlog.Hash(hs[k*tlog.HashSize:]) {
				return nil, name, fmt.Errorf("entry %d is not what %s says", n*TileWidth+uint64(k), hname)
			}
			if n*TileWidth+uint64(k) >= from {
				leaves = append(leaves, leaf...)
			}
		}
	}
	return leaves, "", nil
}

// widest reads a tile, or a partial form of it that is wide enough.
func (c *Checker) widest(level int, n uint64, want int) (b []byte, name string, err error) {
	name = "log/" + TileID{level, n, TileWidth}.Path()
	if b, err = fs.ReadFile(c.dir, name); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return b, name, err
	}
	es, derr := fs.ReadDir(c.dir, name+".p")
	if derr != nil {
		return nil, name, errors.New("are missing")
	}
	best := 0
	for _, e := range es {
		var w int
		if _, err := fmt.Sscanf(e.Name(), "%d", &w); err == nil && w >= want && w < TileWidth {
			best = max(best, w)
		}
	}
	if best == 0 {
		return nil, name, errors.New("are missing")
	}
	name = fmt.Sprintf("%s.p/%d", name, best)
	b, err = fs.ReadFile(c.dir, name)
	return b, name, err
}

// push adds leaves to the tree; tiles that they fill are compared later.
func (c *Checker) push(p *Piece, leaves []byte, hashes []tlog.Hash) {
	for i, h := range hashes {
		for _, t := range c.tree.push(leaves[i*LeafSize:(i+1)*LeafSize], h) {
			needed := c.history.size>>(TileHeight*(max(t.Level, 0)+1)) > t.N
			p.tiles = append(p.tiles, tileJob{t, needed})
		}
	}
}

// edge is the right edge of a growing log with its tiles.
type edge struct {
	Frontier
	entries []byte
	levels  [][]byte // hashes of the partial tile at each level
}

// push adds a leaf and returns the tiles that it fills.
func (e *edge) push(leaf []byte, h tlog.Hash) (full []TileFile) {
	e.entries = AppendEntry(e.entries, leaf)
	n := e.size
	if e.size++; e.size%TileWidth == 0 {
		full = append(full, TileFile{TileID{EntriesLevel, n / TileWidth, TileWidth}, e.entries})
		e.entries = make([]byte, 0, len(e.entries))
	}
	for i := 0; ; i++ {
		if i%TileHeight == 0 {
			level := i / TileHeight
			if level == len(e.levels) {
				e.levels = append(e.levels, make([]byte, 0, TileWidth*tlog.HashSize))
			}
			e.levels[level] = append(e.levels[level], h[:]...)
			if len(e.levels[level]) == TileWidth*tlog.HashSize {
				full = append(full, TileFile{TileID{level, e.size>>(TileHeight*(level+1)) - 1, TileWidth}, e.levels[level]})
				e.levels[level] = make([]byte, 0, TileWidth*tlog.HashSize)
			}
		}
		if n>>i&1 == 0 {
			e.perfect[i] = h
			return full
		}
		h = nodeHash(e.perfect[i], h)
	}
}

func (e *edge) root() Hash { return e.Root() }

// history reads the sealed checkpoints beside the blocks.
type history struct {
	*stream
	next *SealedAt // nil at the end
	r    rec
	// Of the one read last.
	before     Height
	beforeSize uint64
	// What the whole history ends with.
	size   uint64
	height Height
	last   []byte // note
	prev   []byte // note before it
	found  bool
}

// openHistory finds what the history ends with, and starts over at its beginning.
func (c *Checker) openHistory() (*history, error) {
	s, err := openStream(c.dir, fsckHistory, false)
	if err != nil {
		return nil, err
	}
	h := &history{stream: s}
	for k := len(s.firsts) - 1; k >= 0 && !h.found; k-- {
		// The last two: the one before may hold the last but one.
		tail := &stream{fsys: c.dir, dir: fsckHistory, firsts: s.firsts[max(0, k-1):], sizes: s.sizes[max(0, k-1):]}
		tail.next = tail.firsts[0]
		for {
			r, ok, err := tail.record()
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			at, err := ParseSealedAt(r.data)
			if err != nil {
				continue
			}
			if cp, err := unverified(at.Note); err == nil && at.Height > h.height && cp.Size > h.size {
				h.prev, h.last, h.size, h.height, h.found = h.last, at.Note, cp.Size, at.Height, true
			}
		}
	}
	return h, nil
}

// read reads the next checkpoint that is in order.
func (h *history) read(c *Checker) {
	h.next = nil
	for {
		r, ok, err := h.record()
		for _, x := range h.holes {
			if !x.told && (ok && x.to <= r.n || x.to != math.MaxUint64 && !ok) {
				x.told = true
				c.bad(x.at)
			}
		}
		if err != nil {
			c.bad(Problem{File: fsckHistory, Rule: err.Error()})
			return
		}
		if !ok {
			return
		}
		at, err := ParseSealedAt(r.data)
		var cp Checkpoint
		if err == nil {
			cp, err = unverified(at.Note)
		}
		switch {
		case err != nil:
		case cp.Origin != c.genesis.Origin:
			err = fmt.Errorf("is of the log %s", cp.Origin)
		case at.Height <= h.before || cp.Size <= h.beforeSize:
			err = errors.New("does not come after the checkpoint before")
		case at.Height > h.height || cp.Size > h.size:
			err = errors.New("is of a later block than the last of the history")
		default:
			h.next, h.r = at, r
			h.before, h.beforeSize = at.Height, cp.Size
			return
		}
		p := r.problem("%v", err)
		if at != nil {
			p.Height = &at.Height
		}
		c.bad(p)
	}
}

// checkpoints holds what is known of the log after a block against it.
func (c *Checker) checkpoints(p *Piece, at Checkpoint, height Height) {
	h := c.history
	if h.next == nil && h.before == 0 {
		h.read(c)
	}
	for h.next != nil && h.next.Height < height {
		p.unmet++ // of a block that cannot be read
		c.seal(p, h.next)
		h.read(c)
	}
	if h.next != nil && h.next.Height == height {
		if cp, err := unverified(h.next.Note); err != nil || cp != at {
			q := h.r.problem("is not the log after block %d", height)
			q.Height, q.Conflict = &height, true
			c.bad(q)
		} else {
			c.seal(p, h.next)
		}
		h.read(c)
	}
	for i := range c.known {
		k := &c.known[i]
		if k.cp.Size != at.Size {
			continue
		}
		k.met = true
		if k.cp != at {
			c.bad(Problem{File: fsckBlocks, Height: &height, Rule: fmt.Sprintf("the log of %d entries is another than in a checkpoint that is known: one of both is a fork", at.Size)})
		} else if _, err := c.succession.Open(height, k.note); err != nil {
			c.bad(Problem{File: fsckBlocks, Height: &height, Rule: fmt.Sprintf("a checkpoint that is known: %v", err)})
		}
	}
	if c.file != nil && c.file.cp == at {
		c.fileAt = height
	}
}

func (c *Checker) seal(p *Piece, at *SealedAt) {
	r := c.history.r
	p.notes = append(p.notes, noteJob{rec{r.n, nil, r.file, r.offset}, at.Note, c.succession.At(at.Height).Policy})
	p.checkpoints++
}

// Report takes down what was found of a piece, and says whether to go on.
func (c *Checker) Report(p *Piece) (more bool) {
	c.tell(p.before...)
	c.tell(p.taken...)
	c.tell(p.problems...)
	if p.height > 0 {
		c.r.Blocks, c.r.Leaves = uint64(p.height), p.size
	}
	c.r.Checkpoints += p.checkpoints
	c.r.Payloads += p.payloadsOK
	c.r.Gone += p.gone
	c.r.Signatures += p.signatures
	c.r.Absent = append(c.r.Absent, p.absent...)
	c.unsigned += p.unsigned
	c.unvoted += p.unvoted
	c.unmet += p.unmet
	if c.o.Progress != nil {
		c.o.Progress(FsckProgress{Blocks: c.r.Blocks, Leaves: c.r.Leaves, Bytes: p.read, Total: max(c.total, p.read)})
	}
	return !c.full
}

// Finish checks what is left once the log has ended, and returns the report.
func (c *Checker) Finish() (FsckReport, error) {
	if c.succession != nil && !c.full {
		if err := c.finish(); err != nil {
			return c.r, err
		}
	}
	if c.full {
		c.closeAll()
	}
	c.r.Tiles = c.tiles.Load()
	c.r.OK = len(c.r.Problems) == 0
	return c.r, nil
}

func (c *Checker) closeAll() {
	for _, s := range c.streams() {
		if s.file != nil {
			s.close()
		}
	}
}

func (c *Checker) streams() []*stream {
	var out []*stream
	if c.blocks != nil {
		out = append(out, c.blocks)
	}
	if c.history != nil {
		out = append(out, c.history.stream)
	}
	for _, h := range c.payloads {
		out = append(out, h.stream)
	}
	return out
}

func (c *Checker) finish() error {
	c.r.Sealed = c.history.size
	p := &Piece{c: c}
	c.endBlocks(p)
	if err := c.endPayloads(p); err != nil {
		return err
	}
	c.endHistory(p)
	c.endKnown(p)
	c.endTiles(p)
	p.Verify(identity.NewVerifier())
	p.taken, c.taken, p.read = append(p.taken, c.taken...), nil, c.read()
	if !c.Report(p) {
		return nil
	}
	if err := c.names(); err != nil {
		return err
	}
	c.endFile()
	c.endSuccession()
	if c.more > 0 {
		c.note("%d more payloads are missing in the same places", c.more)
	}
	if n := c.unsigned; n > 0 {
		c.note("%d records were not held against their signatures: the registry in force is not known, since registry records are missing", n)
	}
	if n := c.unvoted; n > 0 {
		c.note("%d blocks were not held against their votes: the validators in force are not known, since registry records are missing", n)
	}
	if n := c.unmet; n > 0 {
		c.note("%d checkpoints were not held against their blocks, which cannot be read", n)
	}
	if c.tree == nil {
		c.note("tiles were not all held against the leaves: of some leaves nothing can be read")
	}
	if sets := c.succession.Sets(); len(sets) > 1 {
		c.note("block %d changed the validators: later checkpoints were checked by those that the blocks name", sets[1].Since)
	}
	return nil
}

// endBlocks tells of blocks that the journal does not reach.
func (c *Checker) endBlocks(p *Piece) {
	short := c.history.height > c.height
	told := false
	for _, h := range c.blocks.holes {
		switch {
		case h.told:
		case h.torn && !short:
			c.note("%s: ends within a record: %s; the next start cuts it off", h.at.where(), h.at.Rule)
		case h.to == math.MaxUint64 && h.at.Offset == nil && c.history.height == 0 && len(c.blocks.strange) == 0 && h.at.Rule == "is missing":
			c.hole(p, h) // not even an empty journal
			told = true
		default:
			c.hole(p, h)
			told = told || h.to == math.MaxUint64
		}
	}
	p.before = append(p.before, c.blocks.strange...)
	if short && !told {
		at := c.blocks.place()
		at.Height, at.Rule = &c.history.height, at.Rule+fmt.Sprintf("the journal ends at block %d, block %d is sealed", c.height, c.history.height)
		p.before = append(p.before, at)
	}
}

// endKnown holds checkpoints that somebody has seen against where the log ends.
func (c *Checker) endKnown(p *Piece) {
	for _, k := range c.known {
		switch {
		case k.met && k.cp.Size > c.history.size:
			at := c.history.place()
			at.Rule += fmt.Sprintf("the history was rolled back: a checkpoint of %d entries is known, it goes to %d", k.cp.Size, c.history.size)
			p.before = append(p.before, at)
		case k.met:
		case k.cp.Origin != c.genesis.Origin:
			c.tell(Problem{File: fsckGenesis, Rule: fmt.Sprintf("a checkpoint that is known is of the log %s", k.cp.Origin)})
		case k.cp.Size > c.size:
			at := c.blocks.place()
			at.Rule = fmt.Sprintf("the log was rolled back: a checkpoint of %d entries is known, it has %d", k.cp.Size, c.size)
			p.before = append(p.before, at)
		default:
			c.tell(Problem{File: fsckBlocks, Rule: fmt.Sprintf("a checkpoint of %d entries is known, where no block ends", k.cp.Size)})
		}
	}
}

// endPayloads reads the stores to their ends.
func (c *Checker) endPayloads(p *Piece) error {
	cut := slices.ContainsFunc(c.blocks.holes, func(h *hole) bool { return h.to == math.MaxUint64 })
	for _, h := range c.payloads {
		rest := 0
		for {
			if h.now == nil {
				if err := h.advance(p); err != nil {
					return err
				}
			}
			if h.now == nil {
				break
			}
			if h.now.leaf < c.size && !c.gap {
				p.before = append(p.before, h.now.at(h.now.leaf, 0).problem("is out of its place, or twice"))
			} else {
				rest++
			}
			if err := h.advance(p); err != nil {
				return err
			}
		}
		for _, x := range h.holes {
			switch {
			case x.told:
			case x.torn:
				c.note("%s: ends within a record: %s; the next start cuts it off", x.at.where(), x.at.Rule)
			case x.to == math.MaxUint64 && x.at.Offset == nil:
				// A store that is not there is missed by the leaves.
			default:
				x.told = true
				p.before = append(p.before, x.at)
			}
		}
		if rest > 0 && !cut {
			c.note("%s: %d payloads are of blocks that are not in the journal", h.dir, rest)
		}
	}
	return nil
}

// endHistory reads the history to its end.
func (c *Checker) endHistory(p *Piece) {
	h := c.history
	if h.next == nil && h.before == 0 {
		h.read(c)
	}
	for h.next != nil {
		p.checkpoints++ // of blocks that are told to be missing
		h.read(c)
	}
	p.before = append(p.before, h.strange...)
	newer := c.file != nil && c.file.cp.Size > h.size
	for _, x := range h.holes {
		switch {
		case x.told:
		case x.torn && !newer:
			c.note("%s: ends within a record: %s; the next start cuts it off", x.at.where(), x.at.Rule)
		default:
			x.told = true
			p.before = append(p.before, x.at)
		}
	}
}

// endTiles compares the tiles at the right edge.
func (c *Checker) endTiles(p *Piece) {
	if c.tree == nil {
		return
	}
	for _, id := range PartialTiles(c.tree.size) {
		data := c.tree.entries
		if id.Level >= 0 {
			data = c.tree.levels[id.Level]
		}
		dir := path.Dir("log/" + id.Path())
		es, err := fs.ReadDir(c.dir, dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.before = append(p.before, Problem{File: dir, Rule: fmt.Sprintf("cannot be read: %v", err)})
		}
		for _, e := range es {
			t, err := ParseTilePath(strings.TrimPrefix(dir, "log/") + "/" + e.Name())
			if err == nil && t.Width <= id.Width {
				p.compare(TileFile{t, prefix(TileFile{id, data}, t.Width)})
			}
		}
	}
	if c.tree.size < c.history.size {
		return
	}
	for _, id := range PartialTiles(c.history.size) {
		full := id
		full.Width = TileWidth
		_, err := fs.Stat(c.dir, "log/"+id.Path())
		if _, ferr := fs.Stat(c.dir, "log/"+full.Path()); err != nil && ferr != nil {
			p.before = append(p.before, Problem{File: "log/" + id.Path(), Rule: "is missing"})
		}
	}
}

// names looks for files that do not belong in the log.
func (c *Checker) names() error {
	es, err := fs.ReadDir(c.dir, "log")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range es {
		if !slices.Contains(logNames, e.Name()) {
			c.tell(Problem{File: "log/" + e.Name(), Rule: "does not belong here", Stray: true})
		}
	}
	if c.tree == nil {
		return nil
	}
	return fs.WalkDir(c.dir, fsckTiles, func(name string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && name == fsckTiles:
			return fs.SkipAll
		case err != nil:
			c.tell(Problem{File: name, Rule: fmt.Sprintf("cannot be read: %v", err)})
			return fs.SkipDir
		case e.IsDir():
			return nil
		}
		id, err := ParseTilePath(strings.TrimPrefix(name, "log/"))
		switch {
		case err != nil:
			c.tell(Problem{File: name, Rule: "is not the name of a tile", Stray: true})
		case max(c.tree.size, c.history.size)>>(TileHeight*max(id.Level, 0)) < id.N*TileWidth+uint64(id.Width):
			c.tell(Problem{File: name, Rule: "is of a log that the block journal does not reach", Stray: true})
		}
		if c.full {
			return fs.SkipAll
		}
		return nil
	})
}

// endFile holds the file with the newest checkpoint against the history.
func (c *Checker) endFile() {
	f, h := c.file, c.history
	bad := func(format string, args ...any) {
		c.tell(Problem{File: fsckCheckpoint, Rule: fmt.Sprintf(format, args...)})
	}
	switch {
	case f == nil && h.last == nil:
	case f == nil:
		bad("is missing")
	case f.err != nil:
		bad("%v", f.err)
	case h.last != nil && bytes.Equal(f.note, h.last):
	case h.prev != nil && bytes.Equal(f.note, h.prev):
		// A crash may leave the one before the last, never another.
		c.note("%s: is one behind the history; the next start replaces it", fsckCheckpoint)
	case f.cp.Size > h.size && c.fileAt > 0:
		if _, err := c.succession.Open(c.fileAt, f.note); err != nil {
			bad("%v", err)
			break
		}
		at := h.place()
		at.Height, at.Rule = &c.fileAt, at.Rule+fmt.Sprintf("the history ends before the checkpoint of %d entries, which is in %s", f.cp.Size, fsckCheckpoint)
		if len(h.holes) == 0 {
			c.tell(at)
		}
	default:
		bad("is not the last of the history of checkpoints")
	}
}

// endSuccession holds the list of validator sets against what the blocks say.
func (c *Checker) endSuccession() {
	b, err := fs.ReadFile(c.dir, fsckSuccession)
	sets := c.succession.Sets()[1:]
	if errors.Is(err, fs.ErrNotExist) && len(sets) == 0 {
		return
	}
	if c.sure {
		c.r.Succession = MarshalSuccession(c.succession)
	}
	if err != nil {
		c.tell(Problem{File: fsckSuccession, Rule: fmt.Sprintf("cannot be read: %v", err)})
		return
	}
	if !c.sure {
		return
	}
	if proof, err := ParseSuccessionProof(b); err == nil {
		c.endProof(b, proof)
		return
	}
	var have []succeeded
	if err := json.Unmarshal(b, &have); err != nil {
		c.tell(Problem{File: fsckSuccession, Rule: err.Error()})
		return
	}
	// A crash may come between writing it and the block that it is of.
	if n := len(sets); len(have) > n && have[n].Since > c.height {
		have = have[:n]
		c.note("%s: is ahead of the journal", fsckSuccession)
		if got, want := marshalSets(have), MarshalSuccession(c.succession); bytes.Equal(got, want) {
			return
		}
	} else if bytes.Equal(b, MarshalSuccession(c.succession)) {
		return
	}
	c.tell(Problem{File: fsckSuccession, Rule: "is not what the blocks say"})
}

// endProof does the same for a list that shows its reasons.
func (c *Checker) endProof(b []byte, proof *SuccessionProof) {
	bad := func(err error) { c.tell(Problem{File: fsckSuccession, Rule: err.Error()}) }
	line, err := proof.Verify(c.document, c.policy)
	if err != nil {
		bad(err)
		return
	}
	have, want := line.Sets(), c.succession.Sets()
	if n := len(want); len(have) > n && have[n].Since > c.height {
		have = have[:n]
		c.note("%s: is ahead of the journal", fsckSuccession)
	}
	same := func(a, b Council) bool {
		x, y := marshalSets([]succeeded{{a.Since, a.Validators}}), marshalSets([]succeeded{{b.Since, b.Validators}})
		return bytes.Equal(x, y)
	}
	if again, err := proof.Marshal(); err != nil || !bytes.Equal(again, b) || !slices.EqualFunc(have, want, same) {
		bad(errors.New("is not what the blocks say"))
	}
}

// succeeded is one set of validators in the file succession.json.
type succeeded struct {
	Since      Height               `json:"since"`
	Validators []identity.Validator `json:"validators"`
}

// MarshalSuccession returns the document succession.json of a data folder: the
// sets of validators after that of genesis.
func MarshalSuccession(s *Succession) []byte {
	var list []succeeded
	for _, c := range s.Sets()[1:] {
		list = append(list, succeeded{c.Since, c.Validators})
	}
	return marshalSets(list)
}

func marshalSets(list []succeeded) []byte {
	if len(list) == 0 {
		list = nil
	}
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("ledger: succession: %v", err)) // unreachable: plain data
	}
	return append(b, '\n')
}
