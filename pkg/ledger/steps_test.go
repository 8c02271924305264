package ledger_test

import (
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// stepsOf returns the proof of each change of the validators in a chain.
func stepsOf(t testing.TB, c *ledgertest.Chain) []ledger.Step {
	t.Helper()
	var out []ledger.Step
	tree := &ledger.Frontier{}
	for i, b := range c.Blocks {
		after := c.Registry
		if i+1 < len(c.Judged) {
			after = c.Judged[i+1]
		}
		if after.MembersSince() == uint64(b.Header.Height) {
			leaf := 0
			for _, r := range b.Records {
				if r.Refused {
					continue
				}
				leaf++
				e, err := identity.ParseEnvelope(r.Envelope)
				if err != nil {
					t.Fatal(err)
				}
				if e.Kind != identity.KindRegistry {
					continue
				}
				s, err := ledger.NewStep(&b.Block, tree, leaf, r.Salt, r.Envelope, c.Judged[i].Validators())
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, *s)
			}
		}
		tree.Append(b.Leaves)
	}
	return out
}

func TestSteps(t *testing.T) {
	c := councils("steps")
	steps := stepsOf(t, c)
	sets, err := ledger.CheckSteps(c.GenesisJSON, steps)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range sets {
		var ns []uint64
		for _, v := range s.Validators {
			ns = append(ns, v.Number)
		}
		got = append(got, fmt.Sprint(s.Since, ns))
	}
	if want := []string{"0 [1 2 3 4]", "3 [1 2 3 4 5]", "6 [2 3 4 5]"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if sets, err := ledger.CheckSteps(c.GenesisJSON, nil); err != nil || len(sets) != 1 || len(sets[0].Validators) != 4 {
		t.Errorf("without steps: got %v, %v, want the validators of genesis", sets, err)
	}
	other := stepsOf(t, councils("elsewhere"))
	for name, tt := range map[string]struct {
		want string
		f    func(s []ledger.Step) []ledger.Step
	}{
		"another district":   {"belongs to another district", func(s []ledger.Step) []ledger.Step { return other }},
		"the first left out": {"members[0]", func(s []ledger.Step) []ledger.Step { return s[1:] }},
		"twice":              {"does not follow", func(s []ledger.Step) []ledger.Step { return append(s[:1], s[0]) }},
		"out of order":       {"members[0]", func(s []ledger.Step) []ledger.Step { slices.Reverse(s); return s }},
		"too few votes":      {"2 valid of the 3 needed", func(s []ledger.Step) []ledger.Step { s[0].Votes = s[0].Votes[:2]; return s }},
		"a vote twice":       {"one of each", func(s []ledger.Step) []ledger.Step { s[0].Votes[1] = s[0].Votes[0]; return s }},
		"a stranger's vote": {"1 of 5 are not valid", func(s []ledger.Step) []ledger.Step {
			s[0].Votes = append(s[0].Votes, ledger.AccusedVote{Validator: 9})
			return s
		}},
		"other metadata":  {"votes: 0 valid", func(s []ledger.Step) []ledger.Step { s[0].Metadata = []byte("view 1"); return s }},
		"another record":  {"are not what the block holds", func(s []ledger.Step) []ledger.Step { s[0].Envelope, s[0].Salt = s[1].Envelope, s[1].Salt; return s }},
		"another salt":    {"are not what the block holds", func(s []ledger.Step) []ledger.Step { s[0].Salt[3] ^= 1; return s }},
		"a short salt":    {"salt must be 32 bytes", func(s []ledger.Step) []ledger.Step { s[0].Salt = s[0].Salt[1:]; return s }},
		"another proof":   {"are not what the block holds", func(s []ledger.Step) []ledger.Step { s[1].Proof[0][0] ^= 1; return s }},
		"a record before": {"no record of the block", func(s []ledger.Step) []ledger.Step { s[0].Index = 1; return s }},
		"index beyond":    {"no record of the block", func(s []ledger.Step) []ledger.Step { s[0].Index = 1 << 60; return s }},
		"no header":       {"header", func(s []ledger.Step) []ledger.Step { s[0].Header = nil; return s }},
		"a short hash":    {"must be 32 bytes", func(s []ledger.Step) []ledger.Step { s[0].Proof[0] = s[0].Proof[0][1:]; return s }},
		"a long proof":    {"at most", func(s []ledger.Step) []ledger.Step { s[0].Proof = make([][]byte, 64); return s }},
	} {
		if _, err := ledger.CheckSteps(c.GenesisJSON, tt.f(stepsOf(t, c))); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}
	// A frame, or a change of something else, is no step, though it was agreed.
	d := ledgertest.New("no step", 4).NewChain().Fill(1)
	change := d.Change(identity.Change{Action: identity.Put, Type: identity.TypeSoftware, ID: "x", Body: []byte(`{}`), Nonce: 1})
	d.Decide([]ledgertest.Record{d.Frame(9, ledgertest.Start.Add(2*time.Second)), change})
	tree := &ledger.Frontier{}
	tree.Append(d.Blocks[0].Leaves)
	b := d.Blocks[1]
	for leaf, want := range map[int]string{1: "is a frame, not a change", 2: "changes a software, not a validator", 0: "no record at leaf 0", 3: "no record at leaf 3"} {
		r := b.Records[max(0, min(leaf-1, 1))]
		if _, err := ledger.NewStep(&b.Block, tree, leaf, r.Salt, r.Envelope, d.Validators); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("leaf %d: got %v, want %q", leaf, err, want)
		}
	}
}

// Validators who came later are accused as the first ones are, and who has left
// only of what it did while it was one.
func TestAccusationsOfLaterMembers(t *testing.T) {
	c := councils("later")
	steps := stepsOf(t, c)
	trust := ledger.Trust{Genesis: c.GenesisJSON}
	votes := func(by int, config uint64, members []ledger.Step) *ledger.Accusation {
		s := said{from: uint64(by + 1), to: 2, config: config, seq: 4, view: 1, height: config + 1, phase: 3, digest: ledger.Hash{1}}
		first := s.sign(c.District.Vote[by], c.GenesisHash)
		s.digest[0] = 2
		a := ledger.NewVoteAccusation(c.GenesisHash, first, s.sign(c.District.Vote[by], c.GenesisHash))
		a.Members = members
		return a
	}
	fork := func(members []ledger.Step) *ledger.Accusation { return forkAfterChange(t, c, members) }
	checkpoints := func(members []ledger.Step) *ledger.Accusation {
		b := c.Blocks[7].Header
		one := b.Checkpoint(c.Origin)
		two := one
		two.Root[0] ^= 1
		c.Voters = []int{4}
		a, err := ledger.Seal(one, c.LogSigner(), []string{c.Cosignature(4, one.Body(), b.Time)})
		if err != nil {
			t.Fatal(err)
		}
		other, err := ledger.Seal(two, c.LogSigner(), []string{c.Cosignature(4, two.Body(), b.Time)})
		if err != nil {
			t.Fatal(err)
		}
		acc := ledger.NewCheckpointAccusation(a, other)
		acc.Members = members
		return acc
	}
	for _, tc := range []struct {
		name    string
		a       *ledger.Accusation
		outcome ledger.Outcome
		want    string // who is guilty, or why not
	}{
		{"a newcomer's votes", votes(4, 3, steps[:1]), ledger.Pass, "validator 5"},
		{"a newcomer's votes later", votes(4, 6, steps), ledger.Pass, "validator 5"},
		{"one of the first, later", votes(1, 6, steps), ledger.Pass, "validator 2"},
		{"one who has left, before", votes(0, 3, steps[:1]), ledger.Pass, "validator 1"},
		{"one who has left, at first", votes(0, 0, nil), ledger.Pass, "validator 1"},
		{"one who has left, after", votes(0, 6, steps), ledger.Fail, "there is no validator 1 among those since block 6, and what it says counts for nothing"},
		{"a newcomer before its time", votes(4, 0, nil), ledger.Fail, "there is no validator 5 among those since block 0"},
		{"members left out", votes(4, 3, nil), ledger.Fail, "for the validators since block 3, the members given are those since block 0"},
		{"members of later", votes(4, 3, steps), ledger.Fail, "for the validators since block 3, the members given are those since block 6"},
		{"members that never were", votes(4, 5, steps[:1]), ledger.Fail, "for the validators since block 5"},
		{"two blocks", fork(steps), ledger.Pass, "validator 4, validator 5"},
		{"two blocks, a step left out", fork(steps[:1]), ledger.Fail, "of the 4 needed from 5"},
		{"two checkpoints", checkpoints(steps[:1]), ledger.Pass, "the log " + c.Origin + ", validator 5"},
		{"two checkpoints, members left out", checkpoints(nil), ledger.Fail, "whose key is not among those that are trusted"},
	} {
		j := judge(t, tc.a, trust)
		got := names(j.Guilty)
		if tc.outcome == ledger.Fail {
			got = j.Reason
		}
		if j.Outcome != tc.outcome || !strings.Contains(got, tc.want) || tc.outcome == ledger.Pass && got != tc.want {
			t.Errorf("%s: got %s, %q %s; want %s, %q", tc.name, j.Outcome, got, j.Reason, tc.outcome, tc.want)
		}
	}
	// Who pins another genesis, or only the policy, is not led anywhere by members.
	other := ledgertest.New("elsewhere", 4)
	if j := judge(t, votes(4, 3, steps[:1]), ledger.Trust{Genesis: other.GenesisJSON}); j.Outcome != ledger.Fail || !strings.Contains(j.Reason, "the trusted document's is") {
		t.Errorf("another genesis: got %s, %s", j.Outcome, j.Reason)
	}
	if j := judge(t, votes(4, 3, steps[:1]), ledger.Trust{Policy: policy(t, c.Policy)}); j.Outcome != ledger.Untrusted {
		t.Errorf("only a policy: got %s, %s; want it untrusted", j.Outcome, j.Reason)
	}
	// Every set that could be shown without a step is not the registry's.
	a := fork(steps)
	a.Blocks[0].Registry = nil
	if j := judge(t, a, trust); j.Outcome != ledger.Fail || !strings.Contains(j.Reason, "does not show all validators") {
		t.Errorf("without the registry: got %s, %s", j.Outcome, j.Reason)
	}
	a = fork(steps)
	first := c.Blocks[0].Header
	x, err := ledger.Excerpts(c.Judged[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	if first.RegistryVersion != 0 {
		t.Fatalf("block 1: registry version %d", first.RegistryVersion)
	}
	a.Blocks[1].Registry = x
	if j := judge(t, a, trust); j.Outcome != ledger.Fail || !strings.Contains(j.Reason, "registry") {
		t.Errorf("with the registry of genesis: got %s, %s", j.Outcome, j.Reason)
	}
}

// forkAfterChange has validators 4 and 5 vote, in one view, for two blocks after
// the newest.
func forkAfterChange(t *testing.T, c *ledgertest.Chain, members []ledger.Step) *ledger.Accusation {
	t.Helper()
	validators := c.Registry.Validators()
	x, err := ledger.Excerpts(c.Registry, nil)
	if err != nil {
		t.Fatal(err)
	}
	last := c.Blocks[len(c.Blocks)-1].Header
	block := func(shift time.Duration, by ...int) *ledger.Block {
		h := last
		h.Height, h.Parent, h.Time = last.Height+1, last.Hash(), last.Time.Add(time.Second+shift)
		h.RegistryVersion, h.Registry = c.Registry.Version(), ledger.Hash(c.Registry.Hash())
		b := &ledgertest.Block{Block: ledger.Block{Header: h, Metadata: metadata(1, uint64(h.Height))}}
		voters := c.Voters
		c.Voters = by
		c.Vote(b)
		c.Voters = voters
		return &b.Block
	}
	a := ledger.NewBlockAccusation(block(0, 1, 3, 4), block(1, 2, 3, 4), validators)
	for i := range a.Blocks {
		a.Blocks[i].Registry = x
	}
	a.Members = members
	return a
}

// No byte of the proof of who the members were can be changed.
func TestEveryByteOfMembers(t *testing.T) {
	c := councils("bytes")
	trust := ledger.Trust{Genesis: c.GenesisJSON}
	a := forkAfterChange(t, c, stepsOf(t, c))
	if j := judge(t, a, trust); j.Outcome != ledger.Pass {
		t.Fatalf("got %s, %s", j.Outcome, j.Reason)
	}
	good, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	step := 7
	if testing.Short() {
		step = 61
	}
	for i := 0; i < len(good); i += step {
		bad := slices.Clone(good)
		bad[i] ^= 1
		b, err := ledger.ParseAccusation(bad)
		if err != nil {
			continue
		}
		if j, err := b.Judge(trust); err == nil {
			t.Fatalf("byte %d of %d, %q: changed it still comes to %s, %s", i, len(good), good[max(0, i-20):min(len(good), i+20)], j.Outcome, j.Finding)
		}
	}
}

// Checkpoints of different sizes, shown by what the larger's log was before.
func TestAccusationByPrefix(t *testing.T) {
	c := newCourt(t)
	// 3 and 4 cosigned block 2 of one history and block 3 of the other.
	prefix := func(small, large *ledgertest.Chain) *ledger.Accusation {
		var leaves []ledger.Leaf
		for _, b := range large.Blocks {
			leaves = append(leaves, b.Leaves...)
		}
		n, size := small.Blocks[1].Header.Size, large.Blocks[2].Header.Size
		proof, root, err := (&ledger.Frontier{}).ProvePrefix(size, n, sequence(leaves))
		if err != nil {
			t.Fatal(err)
		}
		a := ledger.NewCheckpointAccusation(small.Seal(small.Blocks[1]), large.Seal(large.Blocks[2]))
		a.Prefix = &ledger.AccusedPrefix{Root: root[:], Proof: [][]byte{}}
		for _, h := range proof {
			a.Prefix.Proof = append(a.Prefix.Proof, slices.Clone(h[:]))
		}
		return a
	}
	j := judge(t, prefix(c.one, c.two), c.trust)
	if want := "the log " + c.Origin + ", validator 3, validator 4"; j.Outcome != ledger.Pass || names(j.Guilty) != want || !strings.Contains(j.Finding, "another root") {
		t.Errorf("got %s, %s, guilty %q; want %q", j.Outcome, j.Reason, names(j.Guilty), want)
	}
	spoiled := func(f func(a *ledger.Accusation)) *ledger.Accusation { a := prefix(c.one, c.two); f(a); return a }
	same := ledger.NewCheckpointAccusation(c.one.Seal(c.one.Blocks[1]), c.two.Seal(c.two.Blocks[1]))
	same.Prefix = &ledger.AccusedPrefix{}
	for _, tc := range []struct {
		name, want string
		a          *ledger.Accusation
	}{
		{"an honest log that grew", "the two are consistent", prefix(c.two, c.two)},
		{"a root that it never had", "does not lead to the larger", spoiled(func(a *ledger.Accusation) { a.Prefix.Root[3] ^= 1 })},
		{"no root", "must be 32 bytes", spoiled(func(a *ledger.Accusation) { a.Prefix.Root = nil })},
		{"a short hash", "must be 32 bytes", spoiled(func(a *ledger.Accusation) { a.Prefix.Proof[0] = a.Prefix.Proof[0][1:] })},
		{"a hash left out", "does not lead", spoiled(func(a *ledger.Accusation) { a.Prefix.Proof = a.Prefix.Proof[1:] })},
		{"an index besides", "have no place beside a prefix", spoiled(func(a *ledger.Accusation) { a.Checkpoints[1].Index = new(uint64) })},
		{"of one size", "prefix: has no place where the sizes are the same", spoiled(func(a *ledger.Accusation) { a.Checkpoints = same.Checkpoints })},
	} {
		j := judge(t, tc.a, c.trust)
		if j.Outcome != ledger.Fail || !strings.Contains(j.Reason, tc.want) || len(j.Guilty) > 0 {
			t.Errorf("%s: got %s, %q, guilty %q; want it to fail with %q", tc.name, j.Outcome, j.Reason, names(j.Guilty), tc.want)
		}
	}
	v := c.votes()
	v.Prefix = &ledger.AccusedPrefix{}
	b, err := v.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.ParseAccusation(b); err == nil || !strings.Contains(err.Error(), "prefix: has no place in kind votes") {
		t.Errorf("votes with a prefix: got %v", err)
	}
}

func sequence(leaves []ledger.Leaf) iter.Seq2[ledger.Leaf, error] {
	return func(yield func(ledger.Leaf, error) bool) {
		for _, l := range leaves {
			if !yield(l, nil) {
				return
			}
		}
	}
}

// What is proven from a frontier on is what the whole tree proves.
func TestProofsFromAFrontier(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	rounds := 400
	if testing.Short() {
		rounds = 60
	}
	for range rounds {
		size := 1 + rnd.IntN(300)
		from := rnd.IntN(size)
		leaves := make([]ledger.Leaf, size)
		whole, part := &ledger.Frontier{}, &ledger.Frontier{}
		roots := []ledger.Hash{whole.Root()}
		for i := range leaves {
			leaves[i] = ledger.Leaf{Class: ledger.ClassRecord, Commitment: ledger.Hash{byte(i), byte(i >> 8), byte(size)}}
			whole.Append(leaves[i : i+1])
			roots = append(roots, whole.Root())
		}
		part.Append(leaves[:from])
		index := from + rnd.IntN(size-from)
		p, err := part.ProveRecord(uint64(size), uint64(index), sequence(leaves[from:]))
		if err != nil {
			t.Fatalf("leaf %d of %d from %d: %v", index, size, from, err)
		}
		if err := ledger.CheckInclusion(ledger.Checkpoint{Size: uint64(size), Root: roots[size]}, uint64(index), leaves[index], p); err != nil {
			t.Fatalf("leaf %d of %d from %d: %v", index, size, from, err)
		}
		n := max(1, from) + rnd.IntN(size-max(1, from)+1)
		cp, root, err := part.ProvePrefix(uint64(size), uint64(n), sequence(leaves[from:]))
		if err != nil {
			t.Fatalf("%d of %d from %d: %v", n, size, from, err)
		}
		if root != roots[n] {
			t.Fatalf("%d of %d from %d: another root", n, size, from)
		}
		if err := tlog.CheckTree(cp, int64(size), tlog.Hash(roots[size]), int64(n), tlog.Hash(root)); err != nil {
			t.Fatalf("%d of %d from %d: %v", n, size, from, err)
		}
	}
	f := &ledger.Frontier{}
	some := []ledger.Leaf{{Class: ledger.ClassRecord}, {Class: ledger.ClassRecord}, {Class: ledger.ClassRecord}}
	f.Append(some)
	if _, err := f.ProveRecord(6, 2, sequence(some)); err == nil {
		t.Error("a leaf before the frontier is proven")
	}
	if _, err := f.ProveRecord(9, 4, sequence(some)); err == nil || !strings.Contains(err.Error(), "the leaves end at 6") {
		t.Errorf("too few leaves: got %v", err)
	}
	if _, _, err := f.ProvePrefix(6, 2, sequence(some)); err == nil {
		t.Error("a log before the frontier is proven")
	}
	if _, _, err := f.ProvePrefix(9, 9, sequence(some)); err == nil {
		t.Error("a log that has not grown so far is proven")
	}
	lost := errors.New("lost")
	if _, _, err := f.ProvePrefix(6, 4, func(yield func(ledger.Leaf, error) bool) { yield(ledger.Leaf{}, lost) }); !errors.Is(err, lost) {
		t.Errorf("got %v, want %v", err, lost)
	}
}
