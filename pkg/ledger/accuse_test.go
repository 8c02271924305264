package ledger_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// said is the head of a message between validators, as doc of ledger.Message has
// it.
type said struct {
	from, to, config, seq, view, height uint64
	phase                               byte
	digest                              ledger.Hash
}

func (s said) sign(key ed25519.PrivateKey, genesis ledger.Hash) []byte {
	b := []byte{1, 1}
	u := func(vs ...uint64) {
		for _, v := range vs {
			b = binary.BigEndian.AppendUint64(b, v)
		}
	}
	u(s.from, s.to, s.config)
	b = append(b, make([]byte, 16)...)
	u(3, s.seq, s.height-1, s.view, s.height)
	b = append(b, s.phase)
	b = append(b, s.digest[:]...)
	b = append(b, make([]byte, 32)...)
	return append(b, ed25519.Sign(key, append(append([]byte("stopline validator message v1\n"), genesis[:]...), b...))...)
}

// metadata of the engine for a view and a height.
func metadata(view, height uint64) []byte {
	var b []byte
	if view > 0 {
		b = binary.AppendUvarint(append(b, 1<<3), view)
	}
	return binary.AppendUvarint(append(b, 2<<3), height)
}

// court is a district in which 3 and 4 of four validators collude: there are two
// of everything.
type court struct {
	*ledgertest.District
	trust, withPolicy ledger.Trust
	// one and two are histories that part at block 2; other is as two, decided in
	// a later view.
	one, two, other *ledgertest.Chain
}

func newCourt(t *testing.T) *court {
	c := &court{District: ledgertest.New("court", 4)}
	p, err := ledger.ParsePolicy(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	c.trust, c.withPolicy = ledger.Trust{Genesis: c.GenesisJSON}, ledger.Trust{Policy: p}
	history := func(voters []int, view uint64, shift time.Duration) *ledgertest.Chain {
		ch := c.NewChain()
		for h := uint64(1); h <= 3; h++ {
			at := ledgertest.Start.Add(time.Duration(h) * time.Second)
			if h > 1 {
				at = at.Add(shift)
			}
			b := ch.Decide([]ledgertest.Record{c.Frame(h, at)})
			ch.Voters = []int{0, 1, 2, 3}
			v := uint64(0)
			if h > 1 {
				ch.Voters, v = voters, view
			}
			b.Metadata = metadata(v, h)
			ch.Vote(b)
		}
		return ch
	}
	c.one = history([]int{0, 2, 3}, 0, 0)
	c.two = history([]int{1, 2, 3}, 0, time.Millisecond)
	c.other = history([]int{1, 2, 3}, 1, time.Millisecond)
	return c
}

func (c *court) vote(by int, s said) []byte {
	s.from = uint64(by + 1)
	return s.sign(c.Vote[by], c.GenesisHash)
}

// from says it as validator 3.
func (c *court) from(s said) said { s.from = 3; return s }

func (c *court) votes() *ledger.Accusation {
	return ledger.NewVoteAccusation(c.GenesisHash,
		c.vote(2, said{to: 1, seq: 9, view: 1, height: 5, phase: 2, digest: ledger.Hash{1}}),
		c.vote(2, said{to: 2, seq: 7, view: 1, height: 5, phase: 2, digest: ledger.Hash{2}}))
}

func (c *court) blocks(a, b *ledgertest.Chain) *ledger.Accusation {
	return ledger.NewBlockAccusation(&a.Blocks[1].Block, &b.Blocks[1].Block, c.Validators)
}

// apart accuses with checkpoints of different sizes.
func (c *court) apart(t *testing.T, at uint64) *ledger.Accusation {
	a := ledger.NewCheckpointAccusation(c.one.Seal(c.one.Blocks[1]), c.two.Seal(c.two.Blocks[2]))
	for i := range a.Checkpoints {
		cp := &a.Checkpoints[i]
		ch, b := c.one, c.one.Blocks[1]
		if strings.Contains(cp.Note, fmt.Sprintf("\n%d\n", c.two.Blocks[2].Header.Size)) {
			ch, b = c.two, c.two.Blocks[2]
		}
		var leaves []ledger.Leaf
		for _, b := range ch.Blocks {
			leaves = append(leaves, b.Leaves...)
		}
		e := leaves[at].Marshal()
		h := tlog.RecordHash(e[:])
		proof, err := ledger.Prove(ch, b.Header.Size, at)
		if err != nil {
			t.Fatal(err)
		}
		cp.Index, cp.Leaf = &at, h[:]
		for _, p := range proof {
			cp.Proof = append(cp.Proof, p[:])
		}
	}
	return a
}

func names(cs []ledger.Culprit) string {
	var out []string
	for _, c := range cs {
		out = append(out, c.Name)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// judge has the accusation judged as it would come to somebody else.
func judge(t *testing.T, a *ledger.Accusation, trust ledger.Trust) ledger.Judgement {
	t.Helper()
	b, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = ledger.ParseAccusation(b); err != nil {
		t.Fatal(err)
	}
	j, err := a.Judge(trust)
	if (err != nil) != (j.Outcome == ledger.Fail) {
		t.Errorf("outcome %s with error %v", j.Outcome, err)
	}
	return j
}

func TestAccusationsThatHold(t *testing.T) {
	c := newCourt(t)
	same := ledger.NewCheckpointAccusation(c.one.Seal(c.one.Blocks[1]), c.two.Seal(c.two.Blocks[1]))
	logName := "the log " + c.Origin
	for _, tc := range []struct {
		name         string
		a            *ledger.Accusation
		trust        ledger.Trust
		guilty, both string
	}{
		{"two votes", c.votes(), c.trust, "validator 3", ""},
		{"two blocks in one view", c.blocks(c.one, c.two), c.trust, "validator 3, validator 4", ""},
		{"two blocks in two views", c.blocks(c.one, c.other), c.trust, "", "validator 3, validator 4"},
		{"two checkpoints, by policy", same, c.withPolicy, "ambulance, audit, " + logName, ""},
		{"two checkpoints, by genesis", same, c.trust, logName + ", validator 3, validator 4", ""},
		{"two checkpoints of different sizes", c.apart(t, 3), c.trust, logName + ", validator 3, validator 4", ""},
	} {
		j := judge(t, tc.a, tc.trust)
		if j.Outcome != ledger.Pass || names(j.Guilty) != tc.guilty || names(j.SignedBoth) != tc.both {
			t.Errorf("%s: got %s, guilty %q, both %q, %s; want pass, %q, %q", tc.name, j.Outcome, names(j.Guilty), names(j.SignedBoth), j.Reason, tc.guilty, tc.both)
		}
		for _, g := range j.Guilty {
			if g.Name == "validator 3" && g.Department != ledgertest.Departments[2] {
				t.Errorf("%s: department: got %q, want %q", tc.name, g.Department, ledgertest.Departments[2])
			}
		}
		if text := j.Text(); !strings.HasPrefix(text, "PASS") || !strings.Contains(text, j.Finding) {
			t.Errorf("%s: got text %q", tc.name, text)
		}
	}
	for _, a := range []*ledger.Accusation{c.votes(), c.blocks(c.one, c.two), same} {
		j := judge(t, a, ledger.Trust{})
		if j.Outcome != ledger.Untrusted || j.ExitCode() != ledger.ExitUntrusted || len(j.Guilty) > 0 {
			t.Errorf("%s without keys: got %+v, want it untrusted and nobody guilty", a.Kind, j)
		}
	}
}

func TestAccusationsThatDoNotHold(t *testing.T) {
	c := newCourt(t)
	other := ledgertest.New("elsewhere", 4)
	first := said{to: 1, seq: 9, view: 1, height: 5, phase: 2, digest: ledger.Hash{1}}
	against := func(f func(*said)) *ledger.Accusation {
		second := first
		second.digest, second.seq = ledger.Hash{2}, 10
		f(&second)
		return ledger.NewVoteAccusation(c.GenesisHash, c.vote(2, first), c.vote(2, second))
	}
	blocks := func(f func(a *ledger.Accusation)) *ledger.Accusation {
		a := c.blocks(c.one, c.two)
		f(a)
		return a
	}
	later := ledger.NewBlockAccusation(&c.one.Blocks[1].Block, &c.two.Blocks[2].Block, c.Validators)
	sealed := func(ch *ledgertest.Chain, i int) []byte { return ch.Seal(ch.Blocks[i]) }
	foreign := other.NewChain().Fill(2)
	apart := func(f func(a *ledger.Accusation)) *ledger.Accusation { a := c.apart(t, 3); f(a); return a }
	for _, tc := range []struct {
		name, want string
		a          *ledger.Accusation
	}{
		{"votes of two views", "not in one slot", against(func(s *said) { s.view = 2 })},
		{"votes at two heights", "not in one slot", against(func(s *said) { s.height = 6 })},
		{"votes among other members", "not in one slot", against(func(s *said) { s.config = 3 })},
		{"votes of two phases", "not in one slot", against(func(s *said) { s.phase = 3 })},
		{"no votes at all", "not in one slot", ledger.NewVoteAccusation(c.GenesisHash, c.vote(2, said{height: 1}), c.vote(2, said{height: 1, digest: ledger.Hash{1}}))},
		{"one vote, sent twice", "for the same proposal", against(func(s *said) { s.digest = first.digest })},
		{"another's vote", "not signed by validator", ledger.NewVoteAccusation(c.GenesisHash, c.vote(2, first), c.vote(1, first))},
		{"a stranger", "no validator 9", ledger.NewVoteAccusation(c.GenesisHash, said{from: 9, height: 1}.sign(other.Vote[0], c.GenesisHash), said{from: 9, height: 1}.sign(other.Vote[0], c.GenesisHash))},
		{"a forged vote", "not signed by validator 3", ledger.NewVoteAccusation(c.GenesisHash, c.vote(2, first), said{from: 3, view: 1, height: 5, phase: 2}.sign(c.Vote[3], c.GenesisHash))},
		{"votes of another district", "not signed", ledger.NewVoteAccusation(c.GenesisHash, c.from(first).sign(c.Vote[2], other.GenesisHash), c.from(first).sign(c.Vote[2], other.GenesisHash))},
		{"another genesis", "the trusted document's is", ledger.NewVoteAccusation(other.GenesisHash, c.vote(2, first), c.vote(2, first))},
		{"unknown phase", "phase 4 is unknown", against(func(s *said) { s.phase = 4 })},
		{"cut", "bytes, want", ledger.NewVoteAccusation(c.GenesisHash, c.vote(2, first)[:10], c.vote(2, first))},
		{"wrong order", "order of their bytes", func() *ledger.Accusation { a := c.votes(); slices.Reverse(a.Votes); return a }()},

		{"one block twice", "the same", c.blocks(c.one, c.one)},
		{"blocks at two heights", "heights", later},
		{"block of too few", "1 valid of the 3 needed", blocks(func(a *ledger.Accusation) { a.Blocks[0].Votes = a.Blocks[0].Votes[:1] })},
		{"vote counted twice", "one of each", blocks(func(a *ledger.Accusation) { a.Blocks[0].Votes[1] = a.Blocks[0].Votes[0] })},
		{"other view claimed", "valid of the 3 needed", blocks(func(a *ledger.Accusation) { a.Blocks[0].Metadata = metadata(1, 2) })},
		{"metadata of another engine", "integers", blocks(func(a *ledger.Accusation) { a.Blocks[0].Metadata = []byte("view 0") })},
		{"no header", "header", blocks(func(a *ledger.Accusation) { a.Blocks[0].Header = []byte("junk") })},
		{"blocks in the wrong order", "order of their headers", blocks(func(a *ledger.Accusation) { slices.Reverse(a.Blocks) })},
		{"junk among the votes", "1 of 4 are not valid", blocks(func(a *ledger.Accusation) {
			a.Blocks[0].Votes = append(a.Blocks[0].Votes, ledger.AccusedVote{Validator: 9})
		})},

		{"one checkpoint twice", "the same", ledger.NewCheckpointAccusation(sealed(c.one, 1), sealed(c.one, 1))},
		{"nobody signed both", "nobody", ledger.NewCheckpointAccusation(noLog(onlyBy(c.one, 0)), noLog(onlyBy(c.two, 1)))},
		{"a later checkpoint", "index, leaf and proof are needed", ledger.NewCheckpointAccusation(sealed(c.one, 0), sealed(c.one, 1))},
		{"consistent checkpoints", "may be consistent", c.apart(t, 0)},
		{"proof of something else", "does not lead to the root", apart(func(a *ledger.Accusation) { a.Checkpoints[0].Leaf = slices.Clone(a.Checkpoints[1].Leaf) })},
		{"another index", "does not lead to the root", apart(func(a *ledger.Accusation) { i := uint64(2); a.Checkpoints[0].Index = &i })},
		{"index beyond", "not in a log", apart(func(a *ledger.Accusation) { i := uint64(99); a.Checkpoints[0].Index = &i })},
		{"cut hash", "must be 32 bytes", apart(func(a *ledger.Accusation) { a.Checkpoints[0].Proof[0] = a.Checkpoints[0].Proof[0][1:] })},
		{"superfluous index", "have no place", func() *ledger.Accusation {
			a := ledger.NewCheckpointAccusation(sealed(c.one, 1), sealed(c.two, 1))
			a.Checkpoints[0].Index = new(uint64)
			return a
		}()},
		{"checkpoint of another district", "", ledger.NewCheckpointAccusation(foreign.Seal(foreign.Blocks[0]), sealed(c.one, 0))},
	} {
		j := judge(t, tc.a, c.trust)
		if j.Outcome != ledger.Fail || !strings.Contains(j.Reason, tc.want) || len(j.Guilty)+len(j.SignedBoth) > 0 || j.ExitCode() != ledger.ExitFail {
			t.Errorf("%s: got %s, %q, guilty %q; want it to fail with %q and nobody accused", tc.name, j.Outcome, j.Reason, names(j.Guilty), tc.want)
		}
	}
}

// noLog leaves out the log's signature of a note.
func noLog(signed []byte) []byte {
	text, sigs, _ := bytes.Cut(signed, []byte("\n\n"))
	lines := bytes.SplitAfter(sigs, []byte("\n"))
	return append(append(text, "\n\n"...), bytes.Join(lines[1:], nil)...)
}

// onlyBy seals block 2 with validator i's cosignature alone.
func onlyBy(ch *ledgertest.Chain, i int) []byte {
	k := *ch
	k.Voters = []int{i}
	return k.Seal(ch.Blocks[1])
}

// No byte of an accusation can be changed.
func TestEveryByteOfAnAccusation(t *testing.T) {
	c := newCourt(t)
	for name, a := range map[string]*ledger.Accusation{
		"votes": c.votes(), "blocks": c.blocks(c.one, c.two), "checkpoints": c.apart(t, 3),
	} {
		good, err := a.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		for i := range good {
			flips := []byte{0x01}
			switch {
			case testing.Short() && i%5 != 0:
				continue
			case i%4 == 0:
				flips = append(flips, 0x20)
			}
			for _, flip := range flips {
				bad := slices.Clone(good)
				bad[i] ^= flip
				b, err := ledger.ParseAccusation(bad)
				if err != nil {
					continue
				}
				if j, err := b.Judge(c.trust); err == nil {
					t.Fatalf("%s: byte %d of %d, %q: changed by %#x it still comes to %s, %s", name, i, len(good), good[max(0, i-20):min(len(good), i+20)], flip, j.Outcome, j.Finding)
				}
			}
		}
		for _, bad := range [][]byte{good[:len(good)-1], append(slices.Clone(good), '\n'), append([]byte(" "), good...),
			bytes.Replace(good, []byte(`"kind"`), []byte(`"Kind"`), 1), bytes.Replace(good, []byte(`{`), []byte(`{"more":1,`), 1)} {
			if _, err := ledger.ParseAccusation(bad); err == nil {
				t.Errorf("%s: another form is taken: %.60q", name, bad)
			}
		}
	}
}

func FuzzAccusation(f *testing.F) {
	c := newCourt(&testing.T{})
	for _, a := range []*ledger.Accusation{c.votes(), c.blocks(c.one, c.two), c.blocks(c.one, c.other)} {
		b, err := a.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"format":"stopline accusation v1","kind":"votes"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ledger.ParseAccusation(b)
		if err != nil {
			return
		}
		if again, err := a.Marshal(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("encoded again it is another, %v", err)
		}
		for _, trust := range []ledger.Trust{{}, c.trust, c.withPolicy} {
			if _, err := a.Judge(trust); err != nil && err.Error() == "" {
				t.Error("an error that says nothing")
			}
		}
	})
}
