package sealing

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// councils decides ten blocks: by four validators; from block 4 on by five; after
// block 7, which revokes the first, by the other four.
func councils(seed string) *ledgertest.Chain {
	c := ledgertest.New(seed, 4).NewChain().Fill(2)
	c.Decide([]ledgertest.Record{c.Join(1)})
	c.Voters = []int{0, 1, 2, 3, 4}
	c.Fill(3)
	c.Decide([]ledgertest.Record{c.Leave(0, 2)})
	c.Voters = []int{1, 2, 3, 4}
	return c.Fill(3)
}

// sealedBy returns the heights of the checkpoints with who cosigned each.
func sealedBy(t *testing.T, c *ledgertest.Chain, dir string) map[ledger.Height]map[string]bool {
	t.Helper()
	s := openStore(t, options(c.District, dir))
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	out := map[ledger.Height]map[string]bool{}
	err := s.history.Scan(0, func(_ uint64, rec []byte) error {
		at, err := ledger.ParseSealedAt(rec)
		if err != nil {
			return err
		}
		sealed, err := s.Check(at.Height, at.Note)
		if err != nil {
			return err
		}
		out[at.Height] = map[string]bool{}
		for _, x := range sealed.Cosignatures {
			out[at.Height][x.Witness.Cosigner.Name()] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Each block that changes the validators is sealed, and by those before it; what
// follows by those whom it leaves, also after a restart in between.
func TestServiceSealsAcrossChanges(t *testing.T) {
	c := councils("succession")
	b := servicetest.District(t, c.ID)
	for i := range 5 {
		serveCosign(t, b, c, i, "")
	}
	dir := t.TempDir()
	cfg := Config{Bus: b, Dir: dir, GenesisJSON: c.GenesisJSON, Policy: c.Policy, LogKey: c.LogKey, Interval: time.Millisecond, Logger: servicetest.Logger(t)}
	s, stop := start(t, cfg)
	publish(t, b, c, 0, 5)
	wait(t, "sealed by five", func() bool { return s.Metrics().SealedHeight == 5 })
	stop()
	s, stop = start(t, cfg)
	publish(t, b, c, 5, 10)
	wait(t, "sealed by four others", func() bool { return s.Metrics().SealedHeight == 10 })
	if j := s.Metrics().Junk; j != 0 {
		t.Errorf("junk: got %d, want none", j)
	}
	stop()
	by := sealedBy(t, c, dir)
	for _, h := range []ledger.Height{3, 7, 10} {
		if by[h] == nil {
			t.Errorf("there is no checkpoint after block %d: got %v", h, by)
		}
	}
	first, newcomer := ledger.CosignerName(c.Origin, 1), ledger.CosignerName(c.Origin, 5)
	if by[3][newcomer] || by[10][first] || len(by[10]) < 3 {
		t.Errorf("cosigned: got %v, want nobody before he is a validator or after", by)
	}
	r, err := ledger.Fsck(context.Background(), os.DirFS(dir), ledger.FsckOptions{})
	if err != nil || !r.OK || r.Blocks != 10 {
		t.Errorf("fsck: %v, %s", err, r.Text())
	}
}

// Validators who are gone for good do not keep the log from going on.
func TestServiceGivesUpOnThoseBefore(t *testing.T) {
	c := councils("gone")
	b := servicetest.District(t, c.ID)
	// Of the first four two answer, of the five that follow four must.
	serveCosign(t, b, c, 2, "")
	serveCosign(t, b, c, 3, "")
	serveCosign(t, b, c, 4, "")
	second := serveCosign(t, b, c, 1, "refuse")
	dir := t.TempDir()
	s, err := New(Config{Bus: b, Dir: dir, GenesisJSON: c.GenesisJSON, Policy: c.Policy, LogKey: c.LogKey, Interval: time.Millisecond,
		CosignTimeout: 20 * time.Millisecond, Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	s.handover = 100 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	publish(t, b, c, 0, 10)
	wait(t, "blocks 3 and 7 given up", func() bool {
		p, ok := s.store.Snapshot()
		return ok && !p.Handover && p.Header.Height == 10
	})
	// Three of the last four are enough.
	wait(t, "sealed", func() bool { return s.Metrics().SealedHeight == 10 })
	second.mode.Store("")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if by := sealedBy(t, c, dir); by[3] != nil || by[7] != nil || by[10] == nil {
		t.Errorf("checkpoints: got %v, want one after block 10 and none after 3 and 7", by)
	}
}
