package consensus

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// cosigned asks validators to cosign a block's checkpoint, as sealing does, and
// returns the note.
func (c *cluster) cosigned(h ledger.Height, ns ...uint64) (ledger.Checkpoint, []byte) {
	c.t.Helper()
	hd := header(c.t, c.blocks(ns[0])[h-1])
	cp := hd.Checkpoint(ledger.Origin(harbour))
	req, err := proto.Marshal(&pb.CosignRequest{Height: uint64(h), Body: []byte(cp.Body())})
	if err != nil {
		c.t.Fatal(err)
	}
	note := cp.Body() + "\n— somebody/else AAAAAAAA\n"
	for _, n := range ns {
		eventually(c.t, fmt.Sprintf("validator %d cosigns block %d", n, h), func() bool {
			b, err := c.bus.Request(context.Background(), topic.Cosign(harbour, n), req)
			var resp pb.CosignResponse
			if err != nil || proto.Unmarshal(b, &resp) != nil || len(resp.SignatureLine) == 0 {
				return false
			}
			note += string(resp.SignatureLine)
			return true
		})
	}
	return cp, []byte(note)
}

// alsoCosigns is what a liar signs without looking at any block.
func alsoCosigns(t testing.TB, n uint64, cp ledger.Checkpoint) []byte {
	t.Helper()
	line, err := ledger.Cosign(ledger.CosignerName(cp.Origin, n), cosignKey(n), cp.Body(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return []byte(cp.Body() + "\n" + line)
}

func (c *cluster) announce(cp ledger.Checkpoint, note []byte) {
	c.t.Helper()
	b, err := proto.Marshal(&pb.Seal{Height: 1, Size: cp.Size, Checkpoint: note})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.bus.Send(topic.Seal(harbour), b); err != nil {
		c.t.Fatal(err)
	}
}

// checkpointFiles returns what a validator wrote down about checkpoints.
func (c *cluster) checkpointFiles(n uint64) []string {
	c.t.Helper()
	files, err := filepath.Glob(filepath.Join(c.path(n), "evidence", "checkpoints-*.json"))
	if err != nil {
		c.t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(f))
	}
	return names
}

// convicts checks that a file convicts one validator and nobody else, by the
// genesis document alone.
func (c *cluster) convicts(by, liar uint64, name string) {
	c.t.Helper()
	raw, err := os.ReadFile(filepath.Join(c.path(by), "evidence", name))
	if err != nil {
		c.t.Fatal(err)
	}
	a, err := ledger.ParseAccusation(raw)
	if err != nil {
		c.t.Fatal(err)
	}
	j, err := a.Judge(ledger.Trust{Genesis: c.genesis})
	if err != nil || len(j.Guilty) != 1 || j.Guilty[0].Name != fmt.Sprint("validator ", liar) {
		c.t.Errorf("%s of validator %d: got %+v, %v; want validator %d guilty, alone", name, by, j, err, liar)
	}
}

// Validator 4 cosigns the log as everybody does, and then, for somebody else,
// another history. However that one is long, and to whomever it is shown, all
// write down what convicts 4.
func TestStoryAForkIsCosigned(t *testing.T) {
	long(t)
	for _, tc := range []struct {
		name string
		// size of the forked checkpoint, by the sizes after blocks 2, 4 and 6
		size func(after map[ledger.Height]uint64) uint64
		// before says that it is shown before the true one is sealed.
		before bool
	}{
		{"of the same size", func(s map[ledger.Height]uint64) uint64 { return s[4] }, false},
		{"shorter", func(s map[ledger.Height]uint64) uint64 { return s[2] }, false},
		{"longer", func(s map[ledger.Height]uint64) uint64 { return s[6] }, false},
		{"in the middle of a block", func(s map[ledger.Height]uint64) uint64 { return s[4] - 1 }, false},
		{"shown first", func(s map[ledger.Height]uint64) uint64 { return s[4] }, true},
		{"longer, shown first", func(s map[ledger.Height]uint64) uint64 { return s[6] }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCluster(t, 4)
			c.timing.Compare = 50 * time.Millisecond
			c.start(c.all()...)
			u := newUnit(1)
			grow := func(to ledger.Height) {
				for c.nodes[0].v.Stats().Height < to {
					b := batch(u.frame(time.Now()))
					c.submit(b)
					c.decided(b, c.all()...)
				}
			}
			grow(4)
			sizes := map[ledger.Height]uint64{}
			for h, m := range c.blocks(1) {
				sizes[ledger.Height(h+1)] = header(t, m).Size
			}
			sizes[6] = sizes[4] + 4
			forked := ledger.Checkpoint{Origin: ledger.Origin(harbour), Size: tc.size(sizes), Root: ledger.Hash{6, 6, 6}}
			lie := func() { c.announce(forked, alsoCosigns(t, 4, forked)) }
			if tc.before {
				lie()
			}
			cp, note := c.cosigned(4, 1, 2, 3, 4)
			c.announce(cp, note)
			if !tc.before {
				lie()
			}
			grow(7)
			cp, note = c.cosigned(7, 1, 2, 3, 4)
			c.announce(cp, note)
			want := []string{fmt.Sprintf("checkpoints-4-%d.json", min(forked.Size, cp.Size))}
			for _, n := range []uint64{1, 2, 3} {
				eventually(t, "evidence against validator 4", func() bool { return len(c.checkpointFiles(n)) > 0 })
				if got := c.checkpointFiles(n); !slices.Equal(got, want) {
					t.Errorf("validator %d keeps %v, want %v", n, got, want)
				}
				for _, f := range c.checkpointFiles(n) {
					c.convicts(n, 4, f)
				}
				if n := c.nodes[n-1].v.Stats().ForkedSeals; n != 1 {
					t.Errorf("counted %d validators that cosigned a fork, want 1", n)
				}
			}
			c.check()
		})
	}
}

// What one validator alone was shown reaches the others, who ask each other.
func TestStoryAForkIsPassedOn(t *testing.T) {
	long(t)
	c := newCluster(t, 4)
	c.timing.Compare = 50 * time.Millisecond
	c.start(c.all()...)
	u := newUnit(1)
	for range 3 {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, c.all()...)
	}
	_, note := c.cosigned(3, 1, 2, 3, 4)
	forked := ledger.Checkpoint{Origin: ledger.Origin(harbour), Size: header(t, c.blocks(1)[1]).Size, Root: ledger.Hash{6}}
	// Validator 2 knows the lie, validator 3 the truth; nothing is announced.
	c.nodes[1].v.seals.take(alsoCosigns(t, 4, forked))
	c.nodes[2].v.seals.take(note)
	for _, n := range []uint64{1, 2, 3} {
		eventually(t, fmt.Sprintf("validator %d has evidence", n), func() bool { return len(c.checkpointFiles(n)) > 0 })
		for _, f := range c.checkpointFiles(n) {
			c.convicts(n, 4, f)
		}
	}
}

// Nobody is accused who did nothing wrong, whatever is announced: signatures that
// are not theirs, checkpoints of before and after, of another log, in notes with
// liars, with the keys of before; and the book has bounds.
func TestHonestCosignersAreNotAccused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 4)
	c.start(c.all()...)
	u := newUnit(1)
	for range 4 {
		b := batch(u.frame(time.Now()))
		c.submit(b)
		c.decided(b, c.all()...)
	}
	v := c.nodes[0].v
	s := v.seals
	last := v.Stats().Height
	cp2, note2 := c.cosigned(last-1, 1, 2, 3, 4)
	cp4, note4 := c.cosigned(last, 1, 2, 3, 4)
	lines := func(note []byte) string { _, l, _ := strings.Cut(string(note), "\n\n"); return l }
	with := func(cp ledger.Checkpoint, lines ...string) []byte {
		return []byte(cp.Body() + "\n" + strings.Join(lines, ""))
	}
	fork := cp4
	fork.Root[0] ^= 1
	elsewhere := fork
	elsewhere.Origin = "stopline.example/elsewhere"
	middle := cp4
	middle.Size-- // in the middle of the last block, with its true root
	_, root, err := s.prefix(cp4.Size, middle.Size)
	if err != nil {
		t.Fatal(err)
	}
	middle.Root = root
	future := ledger.Checkpoint{Origin: cp4.Origin, Size: cp4.Size + 100, Root: ledger.Hash{1}}
	for name, note := range map[string][]byte{
		"the older one":                       note2,
		"the newer one":                       note4,
		"another root under their signatures": with(fork, lines(note4)),
		"the other one's signatures":          with(cp2, lines(note4)),
		"another log":                         alsoCosigns(t, 2, elsewhere),
		"the middle of a block":               alsoCosigns(t, 2, middle),
		"ahead of the chain":                  alsoCosigns(t, 2, future),
		"nothing":                             nil,
		"no note":                             []byte("junk"),
		"no signatures":                       with(fork),
		"a line without a name":               with(fork, "— \n", "—\n"),
		"too long":                            with(fork, strings.Repeat("— x y\n", ledger.MaxNote)),
	} {
		s.take(note)
		if got := c.checkpointFiles(1); len(got) > 0 {
			t.Fatalf("%s: somebody is accused: %v", name, got)
		}
	}
	if n := v.Stats().ForkedSeals; n != 0 {
		t.Errorf("counted %d, want none", n)
	}
	// Of one who has only signed another history, once, nothing can be shown.
	s.take(alsoCosigns(t, 3, ledger.Checkpoint{Origin: cp4.Origin, Size: cp4.Size + 1, Root: ledger.Hash{3}}))
	if got := c.checkpointFiles(1); len(got) > 0 {
		t.Errorf("accused for one signature: %v", got)
	}
	// A liar leaves a bounded heap behind, and no room is taken from others.
	for i := range uint64(3 * sealsOpenOne) {
		s.take(alsoCosigns(t, 4, ledger.Checkpoint{Origin: cp4.Origin, Size: cp4.Size + 200 + i, Root: ledger.Hash{4}}))
	}
	s.mu.Lock()
	n := 0
	for _, o := range s.open {
		if o.number == 4 {
			n++
		}
	}
	s.mu.Unlock()
	if n != sealsOpenOne {
		t.Errorf("kept %d checkpoints of validator 4, want %d", n, sealsOpenOne)
	}
	standing := time.Now()
	s.mu.Lock()
	s.now = func() time.Time { return standing }
	s.mu.Unlock()
	before := v.Stats().Limited
	for i := range uint64(sealsBurst + 50) {
		s.take(fmt.Appendf(nil, "junk %d", i))
	}
	if v.Stats().Limited == before {
		t.Error("a flood of seals is looked at in full")
	}
}
