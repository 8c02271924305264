package gateway

import (
	"testing"

	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// A seal counts with a quorum of those who were validators at its block.
func TestSealsAcrossChanges(t *testing.T) {
	w := newWorld(t)
	w.show()
	change := w.show([]ledgertest.Record{w.Join(1)})
	w.Voters = []int{0, 1, 2, 3, 4}
	after := w.show()
	sealed := func(by ...int) uint64 {
		w.Voters = by
		w.sealed(after)
		return w.View().Sealed.Size
	}
	if got := sealed(0, 1, 2); got != 0 {
		t.Errorf("three of five: sealed at %d, want nothing", got)
	}
	w.Voters = []int{0, 1, 2}
	if w.sealed(change); w.View().Sealed.Size != change.Header.Size {
		t.Errorf("three of the four who decided the change: sealed at %d, want %d", w.View().Sealed.Size, change.Header.Size)
	}
	if got := sealed(1, 2, 3, 4); got != after.Header.Size {
		t.Errorf("four of five: sealed at %d, want %d", got, after.Header.Size)
	}
}
