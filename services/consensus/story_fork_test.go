package consensus

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// Two of four collude, which is more than may: each of them runs twice, once
// with one honest validator and once with the other, who do not reach each other.
// Both halves decide. When the honest two meet, each can show who did it, and to
// everybody; neither accuses the other.
func TestStoryFork(t *testing.T) {
	long(t)
	fork(t, [2]uint64{1, 2}, 3, 4, func(t *testing.T, j ledger.Judgement) {
		if len(j.Guilty) != 2 || j.Guilty[0].Name != "validator 1" || j.Guilty[1].Name != "validator 2" || len(j.SignedBoth) > 0 {
			t.Errorf("got %+v; want 1 and 2 guilty, and nobody else", j)
		}
	})
}

// The same, but that one half has another leader, in a later view. That there is
// a fork, and who voted on both sides, is plain. But an honest validator can be
// led to vote on both sides by others who lie about the view before, so that
// nobody is called guilty for it.
func TestStoryForkInTwoViews(t *testing.T) {
	long(t)
	fork(t, [2]uint64{3, 4}, 1, 2, func(t *testing.T, j ledger.Judgement) {
		if len(j.SignedBoth) != 2 || j.SignedBoth[0].Name != "validator 3" || j.SignedBoth[1].Name != "validator 4" || len(j.Guilty) > 0 {
			t.Errorf("got %+v; want 3 and 4 as those who signed both, and nobody guilty", j)
		}
	})
}

func fork(t *testing.T, liars [2]uint64, one, two uint64, check func(*testing.T, ledger.Judgement)) {
	here, there := newCluster(t, 4), newCluster(t, 4)
	standing := time.Now() // so that block 1 is the same on both sides
	for _, c := range []*cluster{here, there} {
		c.timing.Compare = 50 * time.Millisecond
		c.now = func() time.Time { return standing }
	}
	halves := [2][]uint64{{liars[0], liars[1], one}, {liars[0], liars[1], two}}
	here.start(halves[0]...)
	there.start(halves[1]...)
	t.Logf("%d and %d run twice: with %d, and, elsewhere, with %d", liars[0], liars[1], one, two)
	common := newUnit(1)
	first := batch(common.frame(standing))
	for i, c := range []*cluster{here, there} {
		ns := halves[i]
		c.submit(first)
		c.decided(first, ns...)
		u := newUnit(2 + i)
		for range 5 {
			b := batch(u.frame(standing))
			c.submit(b)
			c.decided(b, ns...)
		}
	}
	t.Log("both halves have decided several blocks; now the one there finds its way to the others")
	there.stop(halves[1]...)
	copyDir(t, there.path(two), here.path(two))
	b, err := here.server.Connect("from there")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	v, err := New(here.config(two, b))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	for _, n := range []uint64{one, two} {
		var files []string
		eventually(t, "the fork is found", func() bool {
			files, err = filepath.Glob(filepath.Join(here.path(n), "evidence", "blocks-*.json"))
			return err == nil && len(files) > 0
		})
		// The first block after the common one, not some later one.
		if want := []string{filepath.Join(here.path(n), "evidence", "blocks-2.json")}; !slices.Equal(files, want) {
			t.Errorf("validator %d: got %v, want %v", n, files, want)
		}
		raw, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		a, err := ledger.ParseAccusation(raw)
		if err != nil {
			t.Fatal(err)
		}
		j, err := a.Judge(ledger.Trust{Genesis: here.genesis})
		if err != nil {
			t.Fatalf("validator %d: the evidence does not hold: %v", n, err)
		}
		check(t, j)
		if n == one {
			t.Logf("%s, judged by anybody:\n%s", filepath.Base(files[0]), j.Text())
		}
	}
	if here.nodes[one-1].v.Stats().Forks == 0 {
		t.Errorf("validator %d counts no fork", one)
	}
}

// Evidence is kept within bounds, once of each sort, and a liar cannot take the
// room of others.
func TestEvidenceIsBounded(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	e, err := openEvidence(dir, b.c.Logger)
	if err != nil {
		t.Fatal(err)
	}
	accusation := func(of uint64, h ledger.Height) *ledger.Accusation {
		say := func(d byte) []byte {
			p := testParcel(of, 2)
			p.Vote = vote{slot{1, h, phaseCommit}, ledger.Hash{d}}
			return p.seal(voteKey(of), b.k.state.genesis)[:parcelMin]
		}
		return ledger.NewVoteAccusation(b.k.state.genesis, say(1), say(2))
	}
	kept := 0
	for of := uint64(1); of <= 10; of++ {
		for h := ledger.Height(1); h <= evidenceMostOne+3; h++ {
			for range 2 {
				news, err := e.add(accusation(of, h))
				if err != nil {
					t.Fatal(err)
				}
				if news {
					kept++
				}
			}
			if h > evidenceMostOne && len(e.all()) > int(of)*evidenceMostOne {
				t.Fatalf("%d against %d validators", len(e.all()), of)
			}
		}
	}
	if kept != evidenceMost || len(e.all()) != evidenceMost {
		t.Errorf("kept %d, listed %d, want %d", kept, len(e.all()), evidenceMost)
	}
	if err := os.WriteFile(filepath.Join(dir, "votes-9-9-9-9.json"), []byte("junk"), 0o644); err != nil {
		t.Fatal(err)
	}
	again, err := openEvidence(dir, b.c.Logger)
	if err != nil || len(again.all()) != evidenceMost {
		t.Errorf("opened again: got %d, %v; want %d, the junk left out", len(again.all()), err, evidenceMost)
	}
	for _, a := range again.all() {
		if _, err := a.Judge(ledger.Trust{Genesis: b.c.Genesis}); err != nil && a.Votes[0][9] <= 4 {
			t.Errorf("what was read again does not hold: %v", err)
		}
	}
}
