package ledger

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// How large a [Piece] grows: enough for signatures to be checked in large
// batches, little enough for several to be held.
const (
	pieceLeaves = 1024
	pieceBlocks = 128
	pieceBytes  = 2 << 20
)

// Piece is a stretch of the log with its payloads, on its way through a [Checker].
type Piece struct {
	c        *Checker
	items    []*item
	leaves   int
	bytes    int
	read     uint64    // of the journals, up to here
	before   []Problem // found while reading
	taken    []Problem // found by Take
	problems []Problem // found by Verify
	absent   []LeafRange
	// What is left to compare after Take.
	tiles []tileJob
	notes []noteJob

	// What was counted.
	signatures, unsigned, unvoted, unmet, gone, payloadsOK, checkpoints, size uint64
	height                                                                    Height
	buf                                                                       []byte
}

// item is one block.
type item struct {
	r      rec
	h      Header
	hash   Hash
	err    error // why the block cannot be right by itself
	leaves []byte
	hashes []tlog.Hash
	// votes are for those of council that are valid.
	d       *Decided
	council Council
	votes   int
	slots   []slot
	bad     []Problem // payloads that are not what the leaves commit to
	// strays are payloads of blocks before, which could not be read.
	strays []rec
	// reg is what the records were judged by, nil where it is not known.
	reg *identity.Registry
}

// slot is the payload of one record leaf.
type slot struct {
	r     rec
	there bool
	ok    bool
	gone  bool
	salt  *Payload
}

type tileJob struct {
	TileFile
	// needed: the sealed log is not whole without it.
	needed bool
}

type noteJob struct {
	r      rec
	note   []byte
	policy *Policy
}

func leafHash(leaf []byte) tlog.Hash {
	var b [1 + LeafSize]byte
	copy(b[1:], leaf)
	return sha256.Sum256(b[:])
}

func nodeHash(l, r tlog.Hash) tlog.Hash {
	var b [1 + 2*tlog.HashSize]byte
	b[0] = 1
	copy(b[1:], l[:])
	copy(b[1+tlog.HashSize:], r[:])
	return sha256.Sum256(b[:])
}

// Hash does what needs nothing but the piece itself: hashes, and votes by those
// who are thought to have decided it. It may run beside everything else.
func (p *Piece) Hash(v *identity.Verifier) {
	type ref struct{ item, validator int }
	var refs []ref
	for i, it := range p.items {
		if it.err == nil {
			it.err = it.hashBlock()
		}
		if it.err != nil {
			continue
		}
		p.payloads(it)
		input := VoteInput(it.hash, it.d.Metadata)
		for _, vote := range it.d.Votes {
			k := slices.IndexFunc(it.council.Validators, func(x identity.Validator) bool { return x.Number == vote.Validator })
			if k >= 0 {
				v.Add([]byte(it.council.Validators[k].VoteKey), input, vote.Signature)
				refs = append(refs, ref{i, k})
			}
		}
	}
	seen := map[ref]bool{}
	for i, ok := range v.Flush() {
		if ok && !seen[refs[i]] {
			seen[refs[i]] = true
			p.items[refs[i].item].votes++
		}
	}
}

// hashBlock decodes the block and holds its parts against its header.
func (it *item) hashBlock() error {
	d, err := ParseDecided(it.r.data)
	if err != nil {
		return err
	}
	it.d, it.hash = d, it.h.Hash()
	at := len(journalMagic) + HeaderSize + 4
	it.leaves = it.r.data[at : at+len(d.Leaves)*LeafSize]
	if sha256.Sum256(it.leaves) != it.h.Leaves {
		return fmt.Errorf("block %d: leaves: do not match the header", it.h.Height)
	}
	if len(d.Leaves) == 0 || d.Leaves[0] != (Leaf{ClassHeader, it.h.Parent}) {
		return fmt.Errorf("block %d: leaves[0]: does not commit to the parent's header", it.h.Height)
	}
	for i, l := range d.Leaves[1:] {
		if l.Class != ClassRecord {
			return fmt.Errorf("block %d: leaves[%d]: class %d where a record is due", it.h.Height, i+1, l.Class)
		}
	}
	it.hashes = make([]tlog.Hash, len(d.Leaves))
	for i := range it.hashes {
		it.hashes[i] = leafHash(it.leaves[i*LeafSize : (i+1)*LeafSize])
	}
	return nil
}

// payloads holds the payloads of a block against its leaves.
func (p *Piece) payloads(it *item) {
	for i := range it.slots {
		s := &it.slots[i]
		if !s.there {
			continue
		}
		index := it.h.PrevSize + uint64(i) + 1
		pl, err := ParsePayload(s.r.data)
		switch {
		case err != nil:
		case pl.Height != it.h.Height:
			err = fmt.Errorf("is of block %d", pl.Height)
		case len(pl.Envelope) == 0 && p.c.o.Absences != nil && !p.c.absent(index) && path.Dir(s.r.file) != fsckPayload+"/gone":
			err = errors.New("was let go of, and no receipt says why")
		case len(pl.Envelope) == 0:
			s.gone = true
		case p.commit(pl) != it.d.Leaves[i+1].Commitment:
			err = errors.New("is not what the leaf commits to")
		default:
			s.ok, s.salt = true, pl
		}
		if err != nil {
			it.bad = append(it.bad, s.r.at(index, it.h.Height).problem("%v", err))
		}
	}
}

// commit is [Commit], without memory of its own.
func (p *Piece) commit(pl *Payload) Hash {
	p.buf = append(append(append(p.buf[:0], commitmentDomain...), pl.Salt[:]...), pl.Envelope...)
	return sha256.Sum256(p.buf)
}

// leafRec is a record of the payload store with the leaf that it is for.
type leafRec struct {
	rec
	leaf   uint64
	height Height
}

func (r rec) at(leaf uint64, h Height) leafRec { return leafRec{r, leaf, h} }

func (r leafRec) problem(format string, args ...any) Problem {
	p := r.rec.problem(format, args...)
	p.Leaf, p.Height, p.Kind = &r.leaf, &r.height, kindOf(r.data)
	return p
}

// kindOf returns what kind of record a payload is, as far as it can be read.
func kindOf(b []byte) identity.RecordKind {
	pl, err := ParsePayload(b)
	if err != nil {
		return ""
	}
	e, err := identity.ParseEnvelope(pl.Envelope)
	if err != nil || !e.Kind.Valid() {
		return ""
	}
	return e.Kind
}

// isRegistry reports whether an envelope is of a record that changes the registry.
// Its first field is the kind.
func isRegistry(envelope []byte) bool {
	if len(envelope) < 2 || envelope[0] != 1<<3|2 || len(envelope) < 2+int(envelope[1]) {
		return false
	}
	return identity.RecordKind(envelope[2 : 2+int(envelope[1])]).ChangesRegistry()
}

// Verify does what was left: devices' signatures, checkpoints' and tiles. It may
// run beside everything but Hash of the same piece, after [Checker.Take].
func (p *Piece) Verify(v *identity.Verifier) {
	for _, n := range p.notes {
		if _, err := n.policy.Open(n.note); err != nil {
			p.problems = append(p.problems, n.r.problem("%v", err))
		}
	}
	for _, j := range p.tiles {
		p.tile(j)
	}
	if p.c.o.Signatures {
		p.verifyRecords(v)
	}
	// Payloads may be large, and what waits for its turn needs them no more.
	p.items, p.tiles, p.notes, p.buf = nil, nil, nil, nil
}

func (p *Piece) verifyRecords(v *identity.Verifier) {
	var at []leafRec
	var who []identity.Holder
	for _, it := range p.items {
		for i, s := range it.slots {
			if !s.ok {
				continue
			}
			r := s.r.at(it.h.PrevSize+uint64(i)+1, it.h.Height)
			if it.reg == nil {
				p.unsigned++
				continue
			}
			e, err := identity.ParseEnvelope(s.salt.Envelope)
			if err != nil {
				p.problems = append(p.problems, r.problem("%v", err))
				continue
			}
			h, known := it.reg.Holder(e.Key)
			switch {
			case !known:
				err = fmt.Errorf("signer: key %.40s is not in the registry", e.Key)
			case h.Status != identity.Active:
				err = fmt.Errorf("signer: %s %s was revoked", h.Type, h.ID)
			case !h.May(e.Kind):
				err = fmt.Errorf("signer: %s %s may not sign a %s", h.Type, h.ID, e.Kind)
			}
			if err != nil {
				p.problems = append(p.problems, r.problem("%v", err))
				continue
			}
			v.Add(h.Key, identity.SigningInput(e.Kind, e.ContentType, e.Payload), e.Signature)
			at, who = append(at, r), append(who, h)
		}
	}
	for i, ok := range v.Flush() {
		p.signatures++
		if !ok {
			p.problems = append(p.problems, at[i].problem("signature: is not by %s %s", who[i].Type, who[i].ID))
		}
	}
}

// tile holds a tile, and its partial forms where it is full, against what the
// leaves make.
func (p *Piece) tile(j tileJob) {
	if j.Width == TileWidth {
		dir := path.Dir("log/" + TileID{j.Level, j.N, 1}.Path())
		es, err := fs.ReadDir(p.c.dir, dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.problems = append(p.problems, Problem{File: dir, Rule: fmt.Sprintf("cannot be read: %v", err)})
		}
		for _, e := range es {
			if id, err := ParseTilePath("tile/" + levelName(j.Level) + "/" + tail(j.TileID) + ".p/" + e.Name()); err == nil {
				p.compare(TileFile{id, prefix(j.TileFile, id.Width)})
			}
		}
	}
	name := "log/" + j.Path()
	b, err := fs.ReadFile(p.c.dir, name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !j.needed:
	case errors.Is(err, fs.ErrNotExist):
		p.problems = append(p.problems, Problem{File: name, Rule: "is missing"})
	case err != nil:
		p.problems = append(p.problems, Problem{File: name, Rule: fmt.Sprintf("cannot be read: %v", err)})
	default:
		p.same(j.TileFile, b)
	}
}

func levelName(level int) string {
	if level == EntriesLevel {
		return "entries"
	}
	return fmt.Sprint(level)
}

// tail is the path of a full tile below its level.
func tail(t TileID) string {
	t.Width = TileWidth
	return t.Path()[len("tile/"+levelName(t.Level)+"/"):]
}

func (p *Piece) compare(t TileFile) {
	b, err := fs.ReadFile(p.c.dir, "log/"+t.Path())
	if err != nil {
		p.problems = append(p.problems, Problem{File: "log/" + t.Path(), Rule: fmt.Sprintf("cannot be read: %v", err)})
		return
	}
	p.same(t, b)
}

func (p *Piece) same(t TileFile, b []byte) {
	p.c.tiles.Add(1)
	if bytes.Equal(b, t.Data) {
		return
	}
	at := int64(0)
	for at < int64(len(b)) && at < int64(len(t.Data)) && b[at] == t.Data[at] {
		at++
	}
	q := Problem{File: "log/" + t.Path(), Offset: &at, Rule: "is not what the blocks' leaves make"}
	switch {
	case at == int64(len(b)):
		q.Rule = fmt.Sprintf("ends after %d of %d bytes", len(b), len(t.Data))
	case at == int64(len(t.Data)):
		q.Rule = fmt.Sprintf("goes on after its %d bytes", len(t.Data))
	}
	per, under := int64(tlog.HashSize), uint(0)
	if t.Level == EntriesLevel {
		per = LeafSize + 2
	} else {
		under = uint(TileHeight * t.Level)
	}
	leaf := (t.N*TileWidth + min(uint64(at/per), TileWidth-1)) << under
	q.Leaf = &leaf
	p.problems = append(p.problems, q)
}

// prefix returns the first w entries or hashes of a tile.
func prefix(t TileFile, w int) []byte {
	per := tlog.HashSize
	if t.Level == EntriesLevel {
		per = LeafSize + 2 // all our entries are leaves
	}
	return t.Data[:min(w*per, len(t.Data))]
}
