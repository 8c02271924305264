// Package fsck checks a data folder on all cores: it spreads the pieces of a
// [ledger.Checker] over goroutines and keeps them in order.
//
// Memory does not grow with the log. Of each worker at most four pieces are on
// their way, each of up to some 2 MiB of journal and payloads or one block,
// whichever is more, so that two cores take some 100 MB and mostly less.
package fsck

import (
	"context"
	"fmt"
	"io/fs"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// ahead is how many pieces may be under way for each worker.
const ahead = 4

// work is a piece with what its two stages wait for.
type work struct {
	*ledger.Piece
	hashed, verified chan struct{}
}

// Run checks a data folder as [ledger.Fsck] does, with the same outcome. dir must
// allow concurrent reading. workers is how many goroutines hash and verify; 0: as
// many as there are cores.
func Run(ctx context.Context, dir fs.FS, o ledger.FsckOptions, workers int) (ledger.FsckReport, error) {
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	c, err := ledger.NewChecker(dir, o)
	if err != nil {
		return ledger.FsckReport{}, fmt.Errorf("fsck: %w", err)
	}
	// Room for every piece under way, so that nobody waits in a circle.
	slots := make(chan struct{}, ahead*workers)
	order := make(chan *work, cap(slots))  // to Take
	report := make(chan *work, cap(slots)) // to Report
	toHash := make(chan *work, cap(slots))
	toVerify := make(chan *work, cap(slots))
	var once sync.Once
	enough := make(chan struct{}) // closed when there is no need to go on

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { // reads
		defer close(order)
		defer close(toHash)
		for {
			select {
			case slots <- struct{}{}:
			case <-enough:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
			p, err := c.Next()
			if err != nil || p == nil {
				return err
			}
			w := &work{p, make(chan struct{}), make(chan struct{})}
			toHash <- w
			order <- w
		}
	})
	g.Go(func() error { // takes, in order
		defer close(report)
		defer close(toVerify)
		for w := range order {
			if err := wait(ctx, w.hashed); err != nil {
				return err
			}
			c.Take(w.Piece)
			toVerify <- w
			report <- w
		}
		return nil
	})
	g.Go(func() error { // reports, in order
		for w := range report {
			if err := wait(ctx, w.verified); err != nil {
				return err
			}
			if !c.Report(w.Piece) {
				once.Do(func() { close(enough) })
			}
			<-slots
		}
		return nil
	})
	for range workers {
		g.Go(func() error { // hashes and verifies
			v := identity.NewVerifier()
			hash, verify := toHash, toVerify
			for hash != nil || verify != nil {
				select {
				case w, ok := <-verify:
					if !ok {
						verify = nil
						continue
					}
					w.Verify(v)
					close(w.verified)
				case w, ok := <-hash:
					if !ok {
						hash = nil
						continue
					}
					w.Hash(v)
					close(w.hashed)
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		r, _ := c.Finish() // the first error says why the check is not whole
		r.OK = false
		return r, fmt.Errorf("fsck: %w", err)
	}
	r, err := c.Finish()
	if err != nil {
		return r, fmt.Errorf("fsck: %w", err)
	}
	return r, nil
}

func wait(ctx context.Context, done chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
