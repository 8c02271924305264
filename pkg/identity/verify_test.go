package identity

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/oasisprotocol/curve25519-voi/curve"
)

type signed struct {
	key      ed25519.PublicKey
	msg, sig []byte
}

func someSigned(n int) []signed {
	out := make([]signed, n)
	for i := range out {
		k := testKey(fmt.Sprint(i % 7))
		msg := fmt.Appendf(nil, "message %d", i)
		out[i] = signed{k.Public().(ed25519.PublicKey), msg, ed25519.Sign(k, msg)}
	}
	return out
}

// agree checks that a batch says what single verification says.
func agree(t *testing.T, v *Verifier, ss []signed) {
	t.Helper()
	for i, s := range ss {
		if got := v.Add(s.key, s.msg, s.sig); got != i {
			t.Fatalf("got index %d for signature %d", got, i)
		}
	}
	ok := v.Flush()
	if len(ok) != len(ss) {
		t.Fatalf("got %d answers for %d signatures", len(ok), len(ss))
	}
	for i, s := range ss {
		if want := VerifyBytes(s.key, s.msg, s.sig); ok[i] != want {
			t.Errorf("signature %d of %d: got %v in a batch, want %v as alone", i, len(ss), ok[i], want)
		}
	}
}

// breaks are all the ways in which a signature is made bad here.
var breaks = []func(s *signed){
	func(s *signed) { s.sig = slices.Clone(s.sig); s.sig[3] ^= 1 },
	func(s *signed) { s.sig = slices.Clone(s.sig); s.sig[40] ^= 1 },
	func(s *signed) { s.sig = slices.Clone(s.sig); s.sig[63] |= 0xe0 }, // S out of range
	func(s *signed) { s.msg = []byte("another message") },
	func(s *signed) { s.key = ed25519.PublicKey(testPub("another")) },
	func(s *signed) { s.key = bytes.Repeat([]byte{0xff}, 32) },
	func(s *signed) { s.sig = s.sig[:63] },
	func(s *signed) { s.sig = nil },
	func(s *signed) { s.key = s.key[:31] },
	func(s *signed) { s.key = nil },
}

// TestBatchFindsTheBadOne puts one bad signature at every place of batches of
// several sizes.
func TestBatchFindsTheBadOne(t *testing.T) {
	v := NewVerifier()
	for _, n := range []int{1, 8, 9, 16, 33} {
		good := someSigned(n)
		agree(t, v, good)
		for i := range n {
			for _, b := range breaks[:1+i%len(breaks)] {
				ss := slices.Clone(good)
				b(&ss[i])
				agree(t, v, ss)
			}
		}
	}
	if got := v.Flush(); len(got) != 0 {
		t.Errorf("got %d answers from an empty queue", len(got))
	}
}

func TestBatchOfManyBad(t *testing.T) {
	v := NewVerifier()
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		ss := someSigned(1 + rnd.IntN(100))
		for i := range ss {
			if rnd.IntN(4) == 0 {
				breaks[rnd.IntN(len(breaks))](&ss[i])
			}
		}
		agree(t, v, ss)
	}
}

// lowOrder are encodings of points of small order, canonical or not; from the
// test vectors of "Taming the many EdDSAs" (Chalkias, Garillot, Nikolaenko 2020).
var lowOrder = []string{
	"0100000000000000000000000000000000000000000000000000000000000000", // the identity
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0000000000000000000000000000000000000000000000000000000000000080",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // not canonical
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"0100000000000000000000000000000000000000000000000000000000000080",
}

// TestZIP215 shows the rule at its edges, where other rules differ from each
// other, alone and in batches: a signature of zeros by a key of small order
// holds over any message. That is why such keys cannot be filed.
func TestZIP215(t *testing.T) {
	var ss []signed
	for _, a := range lowOrder {
		for _, r := range lowOrder {
			key, err := hex.DecodeString(a)
			if err != nil {
				t.Fatal(err)
			}
			sig, err := hex.DecodeString(r)
			if err != nil {
				t.Fatal(err)
			}
			ss = append(ss, signed{key, []byte("anything"), append(sig, make([]byte, 32)...)})
		}
	}
	for i, s := range ss {
		if !VerifyBytes(s.key, s.msg, s.sig) {
			t.Errorf("signature %d, key %x, R %x: refused, ZIP 215 accepts it", i, s.key, s.sig[:32])
		}
	}
	agree(t, NewVerifier(), ss)
	mixed := append(someSigned(20), ss[:20]...)
	breaks[0](&mixed[5])
	agree(t, NewVerifier(), mixed)
}

func TestStrongKey(t *testing.T) {
	for _, h := range lowOrder {
		k, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		if strongKey(k) {
			t.Errorf("%s is taken for a key, anybody can sign for it", h)
		}
	}
	// An honest key plus a point of order 8 has a subgroup component.
	for _, k := range []ed25519.PublicKey{nil, make([]byte, 31), bytes.Repeat([]byte{0xff}, 32), mixedOrder(t)} {
		if strongKey(k) {
			t.Errorf("%x is taken for a key", k)
		}
	}
	for i := range 50 {
		if !strongKey(ed25519.PublicKey(testPub(fmt.Sprint(i)))) {
			t.Errorf("honest key %d is refused", i)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	for _, batch := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			v := NewVerifier()
			ss := someSigned(batch)
			for b.Loop() {
				for _, s := range ss {
					v.Add(s.key, s.msg, s.sig)
				}
				if slices.Contains(v.Flush(), false) {
					b.Fatal("a good signature was refused")
				}
			}
			b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "signatures/s")
		})
	}
}

// mixedOrder returns an honest public key with a point of order 8 added.
func mixedOrder(t *testing.T) ed25519.PublicKey {
	t.Helper()
	point := func(b []byte) *curve.EdwardsPoint {
		c, err := curve.NewCompressedEdwardsYFromBytes(b)
		if err != nil {
			t.Fatal(err)
		}
		p, err := new(curve.EdwardsPoint).SetCompressedY(c)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	torsion, err := hex.DecodeString(lowOrder[4])
	if err != nil {
		t.Fatal(err)
	}
	sum := new(curve.EdwardsPoint).Add(point(testPub("d1")), point(torsion))
	var c curve.CompressedEdwardsY
	return c.SetEdwardsPoint(sum)[:]
}
