package consensus

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// A validator that cosigns a checkpoint of another history lies to whoever is
// shown that one. Sealing asks for cosignatures and would not notice: it compares
// them with what it asked for. So every validator hears the seals that are
// announced, and those that its peers have seen, and holds them against its own
// chain. Who has cosigned one that is no beginning or continuation of it, and one
// that is, has signed two that do not fit together.
//
// Somebody who has only cosigned another chain, and never this one, is not
// accused: there are two chains only where more lie than may, which is told by
// the blocks, and who is honest on the other side cosigns the other.

// sealBook is what a validator has seen cosigned.
type sealBook struct {
	v *Validator

	mu sync.Mutex
	// seen are the last notes, so that none is looked at twice.
	seen  map[ledger.Hash]bool
	order []ledger.Hash
	// good is the newest that each key has cosigned of our chain; open are those
	// that are not of our chain, or not yet.
	good map[string]*cosignature
	open []*cosignature
	// newest is the last note seen that is of our chain, proofs are the notes by
	// which somebody was accused: peers are shown them, and what is open.
	newest []byte
	proofs [][]byte
	// accused are the keys against which there is proof: no more is needed.
	accused map[string]bool
	tokens  bucket
	now     func() time.Time // [time.Now]; stands still in a test
	scanned time.Time        // when the log was last read for one note
}

// cosignature is what one validator's key has vouched for.
type cosignature struct {
	number uint64
	key    string // the public key's bytes
	cp     ledger.Checkpoint
	line   string
	note   []byte // whole, as it came
	other  bool   // known to be of another chain than ours
}

// alone is the checkpoint with this one signature: other signers may be honest.
func (c *cosignature) alone() []byte { return []byte(c.cp.Body() + "\n" + c.line) }

const (
	sealsSeen = 1024
	// sealsProofs is of how many keys the proof is shown to peers.
	sealsProofs = 16
	// sealsOpen bounds what is kept of checkpoints that cannot be placed,
	// sealsOpenOne those of one key: one is enough.
	sealsOpen    = 64
	sealsOpenOne = 4
	// sealsRate and sealsBurst are how many notes a second are looked at: ten
	// times what sealing makes. Signatures in them are checked one by one.
	sealsRate, sealsBurst = 100, 200
	// scanEvery is after how many times of Timing.Compare, at the earliest, the log
	// is read from its beginning again for a checkpoint that ends in the middle of a
	// block, as no honest one does.
	scanEvery = 5
)

func newSealBook(v *Validator) *sealBook {
	return &sealBook{v: v, seen: map[ledger.Hash]bool{}, good: map[string]*cosignature{}, accused: map[string]bool{}, now: time.Now,
		tokens: bucket{rate: sealsRate, burst: sealsBurst}}
}

// run hears seals until ctx ends.
func (s *sealBook) run(ctx context.Context) error {
	return s.v.c.Bus.Subscribe(ctx, topic.Seal(s.v.c.District), func(_ string, data []byte) {
		var m pb.Seal
		if len(data) > 2*ledger.MaxNote || wire.Decode(identity.Protobuf, data, &m) != nil {
			s.v.count.invalid.Add(1)
			return
		}
		s.take(m.Checkpoint)
	})
}

// exchange asks a peer for what it has seen.
func (s *sealBook) exchange(ctx context.Context, peer uint64) error {
	req, err := proto.Marshal(&pb.SyncRequest{Seals: true})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.v.c.Timing.Fetch)
	defer cancel()
	data, err := s.v.newFetcher().ask(ctx, peer, req)
	if err != nil {
		return err
	}
	var resp pb.SyncResponse
	if err := wire.Decode(identity.Protobuf, data, &resp); err != nil {
		return err
	}
	for _, n := range resp.Seals[:min(len(resp.Seals), sealsOpen+2*sealsProofs+1)] {
		s.take(n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.review() // the chain may have come to what was ahead of it
	return nil
}

// recent are the notes that peers are shown.
func (s *sealBook) recent() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.proofs)
	if s.newest != nil {
		out = append(out, s.newest)
	}
	for _, c := range s.open {
		if !slices.ContainsFunc(out, func(n []byte) bool { return bytes.Equal(n, c.note) }) {
			out = append(out, c.note)
		}
	}
	return out
}

// take looks at one signed checkpoint.
func (s *sealBook) take(note []byte) {
	if len(note) == 0 || len(note) > ledger.MaxNote {
		return
	}
	id := sha256.Sum256(note)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[id] {
		return
	}
	if !s.tokens.take(s.now(), 1) {
		s.v.count.limited.Add(1)
		return
	}
	s.seen[id] = true
	if s.order = append(s.order, id); len(s.order) > sealsSeen {
		delete(s.seen, s.order[0])
		s.order = s.order[1:]
	}
	for _, c := range s.cosignatures(note) {
		if !s.accused[c.key] {
			s.put(c)
		}
	}
	s.review()
}

// cosignatures returns the valid signatures of validators, of now or before, in a
// note. Others are passed over: they are no business of this district's
// validators.
func (s *sealBook) cosignatures(note []byte) []*cosignature {
	text, lines, ok := strings.Cut(string(note), "\n\n")
	if !ok {
		return nil
	}
	body := text + "\n"
	cp, err := ledger.ParseCheckpoint(body)
	origin := s.v.core.genesis.Origin
	if err != nil || cp.Origin != origin || cp.Size == 0 {
		return nil
	}
	var out []*cosignature
	have := map[string]bool{}
	for _, set := range s.v.core.succession.councils() {
		for _, val := range set.Validators {
			name := ledger.CosignerName(origin, val.Number)
			if have[string(val.CosignKey)] || !strings.Contains(lines, "— "+name+" ") {
				continue
			}
			c, err := ledger.NewCosigner(name, ed25519.PublicKey(val.CosignKey))
			if err != nil {
				continue
			}
			for line := range strings.SplitAfterSeq(lines, "\n") {
				if !strings.HasPrefix(line, "— "+name+" ") {
					continue
				}
				if _, err := c.CheckCosignature(body, line); err == nil {
					have[string(val.CosignKey)] = true
					out = append(out, &cosignature{number: val.Number, key: string(val.CosignKey), cp: cp, line: line, note: note})
					break
				}
			}
		}
	}
	return out
}

// put files a cosignature. It needs mu.
func (s *sealBook) put(c *cosignature) {
	switch ours, err := s.place(c.cp); {
	case err == nil && ours:
		if g := s.good[c.key]; g == nil || c.cp.Size > g.cp.Size {
			s.good[c.key] = c
			s.newest = c.note
		}
		return
	case err != nil && !errors.Is(err, errLater):
		s.v.log.Warn("checkpoint not compared with the log", "size", c.cp.Size, "validator", c.number, "err", err)
		return
	case err == nil:
		c.other = true // what is decided stays
	}
	n := 0
	for _, o := range s.open {
		if o.key == c.key {
			n++
		}
	}
	if n < sealsOpenOne && len(s.open) < sealsOpen {
		s.open = append(s.open, c)
	}
}

// review looks again at what could not be placed or proven before. It needs mu.
func (s *sealBook) review() {
	var rest []*cosignature
	for i, c := range s.open {
		if s.accused[c.key] {
			continue
		}
		if !c.other {
			ours, err := s.place(c.cp)
			if err == nil && ours {
				if g := s.good[c.key]; g == nil || c.cp.Size > g.cp.Size {
					s.good[c.key] = c
				}
				continue
			}
			c.other = err == nil
		}
		var against *cosignature
		if g := s.good[c.key]; c.other && g != nil && g.cp.Size >= c.cp.Size {
			against = g
		}
		// Two of one size need no log to compare with.
		for _, o := range s.open[:i] {
			if o.key == c.key && o.cp.Size == c.cp.Size && o.cp.Root != c.cp.Root {
				against = o
			}
		}
		if against == nil {
			rest = append(rest, c)
			continue
		}
		if err := s.accuse(c, against); err != nil {
			s.v.log.Error("two checkpoints of one validator that do not fit together: no proof made", "validator", c.number, "err", err)
			continue
		}
		s.accused[c.key] = true
		if len(s.proofs) < 2*sealsProofs {
			s.proofs = append(s.proofs, c.alone(), against.alone())
		}
	}
	s.open = slices.DeleteFunc(rest, func(c *cosignature) bool { return s.accused[c.key] })
}

// errLater means that a checkpoint cannot be placed yet: the chain is not so far.
var errLater = errors.New("not decided here yet")

// place says whether a checkpoint is of our chain.
func (s *sealBook) place(cp ledger.Checkpoint) (ours bool, err error) {
	st := s.v.core.store
	first, last := st.first(), st.height()
	if last < first {
		return false, errLater
	}
	var failed error
	header := func(h ledger.Height) (hd ledger.Header) {
		hd, err := st.header(h)
		if err != nil && failed == nil {
			failed = err
		}
		return hd
	}
	if header(last).Size < cp.Size {
		return false, errors.Join(failed, errLater)
	}
	if header(first).PrevSize >= cp.Size {
		return false, fmt.Errorf("of %d entries, the blocks here begin after %d", cp.Size, header(first).PrevSize)
	}
	n := sort.Search(int(last-first), func(i int) bool { return header(first+ledger.Height(i)).Size >= cp.Size })
	hd := header(first + ledger.Height(n))
	if failed != nil {
		return false, failed
	}
	if hd.Size == cp.Size {
		return hd.Root == cp.Root, nil
	}
	// In the middle of a block.
	now := time.Now()
	if now.Sub(s.scanned) < scanEvery*s.v.c.Timing.Compare {
		return false, errLater
	}
	s.scanned = now
	_, root, err := s.prefix(hd.Size, cp.Size)
	return err == nil && root == cp.Root, err
}

// prefix proves what the log of so many entries was with n of them.
func (s *sealBook) prefix(size, n uint64) ([][]byte, ledger.Hash, error) {
	base, from := s.v.core.store.base()
	proof, root, err := base.ProvePrefix(size, n, s.leaves(from))
	out := [][]byte{}
	for _, h := range proof {
		out = append(out, slices.Clone(h[:]))
	}
	return out, root, err
}

// leaves reads the log from a block on.
func (s *sealBook) leaves(from ledger.Height) iter.Seq2[ledger.Leaf, error] {
	return func(yield func(ledger.Leaf, error) bool) {
		st := s.v.core.store
		for h := from; h <= st.height(); h++ {
			m, err := st.headed(h)
			var leaves []ledger.Leaf
			if err == nil {
				leaves, err = ledger.ParseLeaves(m.Leaves)
			}
			if err != nil {
				yield(ledger.Leaf{}, err)
				return
			}
			for _, l := range leaves {
				if !yield(l, nil) {
					return
				}
			}
		}
	}
}

// accuse keeps the proof that one key has signed two checkpoints, of which good
// is not the smaller. It needs mu.
func (s *sealBook) accuse(bad, good *cosignature) error {
	a := ledger.NewCheckpointAccusation(bad.alone(), good.alone())
	if bad.cp.Size != good.cp.Size {
		proof, root, err := s.prefix(good.cp.Size, bad.cp.Size)
		if err != nil {
			return err
		}
		a.Prefix = &ledger.AccusedPrefix{Root: root[:], Proof: proof}
	}
	for _, set := range s.v.core.succession.councils() {
		if slices.ContainsFunc(set.Validators, func(v identity.Validator) bool { return string(v.CosignKey) == bad.key }) {
			a.Members, _ = s.v.core.succession.until(set.Since)
			break
		}
	}
	// Nobody is accused of what others would not find.
	if _, err := a.Judge(ledger.Trust{Genesis: s.v.c.Genesis}); err != nil {
		return err
	}
	s.v.count.forkedSeals.Add(1)
	news, err := s.v.evidence.add(a)
	if news {
		s.v.log.Error("a validator has cosigned two checkpoints that do not fit together", "validator", bad.number, "size", bad.cp.Size, "other", good.cp.Size)
	}
	return err
}
