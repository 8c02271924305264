package merkle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/mod/sumdb/tlog"
)

func leaves(n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = fmt.Appendf(nil, "leaf %d", i)
	}
	return out
}

// root is the Merkle tree hash as RFC 6962 §2.1 defines it.
func root(d [][]byte) Hash {
	switch n := len(d); n {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return sha256.Sum256(append([]byte{0}, d[0]...))
	default:
		k := 1
		for 2*k < n {
			k *= 2
		}
		l, r := root(d[:k]), root(d[k:])
		return sha256.Sum256(slices.Concat([]byte{1}, l[:], r[:]))
	}
}

func TestTree(t *testing.T) {
	for n := range 70 {
		d := leaves(n)
		tree := New(d)
		if got, want := tree.Root(), root(d); got != want || tree.Len() != int64(n) {
			t.Fatalf("%d leaves: got root %v of %d, want %v", n, got, tree.Len(), want)
		}
		for i := range int64(n) {
			p, err := tree.Prove(i)
			if err != nil {
				t.Fatal(err)
			}
			if err := Check(p, int64(n), tree.Root(), i, d[i]); err != nil {
				t.Errorf("leaf %d of %d: %v", i, n, err)
			}
			if err := Check(p, int64(n), tree.Root(), i, []byte("another")); err == nil {
				t.Errorf("leaf %d of %d: the proof proves other data", i, n)
			}
			if other := (i + 1) % int64(n); other != i {
				if err := Check(p, int64(n), tree.Root(), other, d[i]); err == nil {
					t.Errorf("leaf %d of %d: the proof proves it at place %d", i, n, other)
				}
			}
			if len(p) > 0 {
				p[len(p)-1][0] ^= 1
				if err := Check(p, int64(n), tree.Root(), i, d[i]); err == nil {
					t.Errorf("leaf %d of %d: a changed proof proves it", i, n)
				}
			}
		}
		for _, i := range []int64{-1, int64(n), 1 << 40} {
			if _, err := tree.Prove(i); err == nil {
				t.Errorf("got a proof of leaf %d of %d", i, n)
			}
		}
	}
}

// TestVectors has the roots of the reference implementation of RFC 6962,
// github.com/google/certificate-transparency, cpp/merkletree/merkle_tree_test.cc.
func TestVectors(t *testing.T) {
	var d [][]byte
	for _, h := range []string{"", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"} {
		b, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		d = append(d, b)
	}
	for n, want := range []string{
		"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		"fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		"aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		"d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
		"4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
		"76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
		"ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		"5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	} {
		h := New(d[:n]).Root()
		if got := hex.EncodeToString(h[:]); got != want {
			t.Errorf("%d leaves: got root %s, want %s", n, got, want)
		}
	}
}

func TestAppendGrows(t *testing.T) {
	tree := New(nil)
	d := leaves(40)
	for i, l := range d {
		tree.Append(tlog.RecordHash(l))
		if got, want := tree.Root(), root(d[:i+1]); got != want {
			t.Fatalf("got root %v after %d leaves, want %v", got, i+1, want)
		}
	}
}

func TestReadHashes(t *testing.T) {
	tree := New(leaves(3)) // four nodes are stored
	hs, err := tree.ReadHashes([]int64{0, 3})
	if h := tlog.RecordHash([]byte("leaf 0")); err != nil || !bytes.Equal(hs[0][:], h[:]) {
		t.Errorf("got %v, %v", hs, err)
	}
	for _, i := range []int64{-1, 4} {
		if _, err := tree.ReadHashes([]int64{0, i}); err == nil || err.Error() != fmt.Sprintf("merkle: no stored hash %d of 4", i) {
			t.Errorf("got %v for node %d", err, i)
		}
	}
}
