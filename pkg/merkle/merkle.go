// Package merkle makes RFC 6962 trees over short lists held in memory, such as
// the registry or the leaves of one block. The district's log, which is long,
// is in package ledger.
package merkle

import (
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// Hash is a node of the tree.
type Hash = tlog.Hash

// Tree holds every node of a tree over a list.
type Tree struct {
	n      int64
	hashes []tlog.Hash
}

// ReadHashes makes a Tree a [tlog.HashReader].
func (t *Tree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		if x < 0 || x >= int64(len(t.hashes)) {
			return nil, fmt.Errorf("merkle: no stored hash %d of %d", x, len(t.hashes))
		}
		out[i] = t.hashes[x]
	}
	return out, nil
}

// New returns the tree over the given leaf data.
func New(leaves [][]byte) *Tree {
	t := &Tree{hashes: make([]tlog.Hash, 0, 2*len(leaves)+1)}
	for _, l := range leaves {
		t.Append(tlog.RecordHash(l))
	}
	return t
}

// Append adds a leaf by its RFC 6962 leaf hash.
func (t *Tree) Append(leaf tlog.Hash) {
	hs, err := tlog.StoredHashesForRecordHash(t.n, leaf, t)
	if err != nil {
		panic(err) // unreachable: all the nodes before are in memory
	}
	t.hashes = append(t.hashes, hs...)
	t.n++
}

// Len returns the number of leaves.
func (t *Tree) Len() int64 { return t.n }

// Root returns the tree's head; of no leaves, it is SHA-256 of nothing
// (RFC 6962 §2.1).
func (t *Tree) Root() tlog.Hash {
	h, err := tlog.TreeHash(t.n, t)
	if err != nil {
		panic(err) // unreachable, as above
	}
	return h
}

// Prove returns the inclusion proof of leaf i, RFC 6962 §2.1.1.
func (t *Tree) Prove(i int64) ([]tlog.Hash, error) {
	if i < 0 || i >= t.n {
		return nil, fmt.Errorf("merkle: leaf %d of %d", i, t.n)
	}
	return tlog.ProveRecord(t.n, i, t)
}

// Check verifies that data is leaf i of the tree of n leaves with the root.
func Check(proof []tlog.Hash, n int64, root tlog.Hash, i int64, data []byte) error {
	return tlog.CheckRecord(proof, n, root, i, tlog.RecordHash(data))
}
