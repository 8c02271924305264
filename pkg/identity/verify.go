package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"

	"github.com/oasisprotocol/curve25519-voi/curve"
	voi "github.com/oasisprotocol/curve25519-voi/primitives/ed25519"
	"github.com/oasisprotocol/curve25519-voi/primitives/ed25519/extra/cache"
)

var zip215 = &voi.Options{Verify: voi.VerifyOptionsZIP_215}

// Verify checks one signature over an envelope's signing input.
func (e Envelope) Verify(key ed25519.PublicKey) bool {
	return VerifyBytes(key, SigningInput(e.Kind, e.ContentType, e.Payload), e.Signature)
}

// VerifyBytes checks one Ed25519 signature by the rule of this package.
func VerifyBytes(key ed25519.PublicKey, msg, sig []byte) bool {
	return len(key) == ed25519.PublicKeySize && len(sig) == ed25519.SignatureSize &&
		voi.VerifyWithOptions(voi.PublicKey(key), msg, sig, zip215)
}

// strongKey reports whether a public key is the canonical encoding of a point in
// the prime-order group, as every honest key is. ZIP 215 verifies with others,
// too: for a key of small order anyone can make signatures.
func strongKey(key ed25519.PublicKey) bool {
	c, err := curve.NewCompressedEdwardsYFromBytes(key)
	if err != nil {
		return false
	}
	p, err := new(curve.EdwardsPoint).SetCompressedY(c)
	if err != nil || p.IsSmallOrder() || !p.IsTorsionFree() {
		return false
	}
	var again curve.CompressedEdwardsY
	return bytes.Equal(again.SetEdwardsPoint(p)[:], key)
}

// Verifier checks signatures in batches. It caches expanded public keys, so
// keep one for as long as the keys stay the same. Not safe for concurrent use.
type Verifier struct {
	cached *cache.Verifier
	keys   []ed25519.PublicKey
	msgs   [][]byte
	sigs   [][]byte
}

// cachedKeys bounds the cache: a district's devices, several times over.
const cachedKeys = 16384

// NewVerifier returns a Verifier with an empty batch.
func NewVerifier() *Verifier {
	return &Verifier{cached: cache.NewVerifier(cache.NewLRUCache(cachedKeys))}
}

// Add queues one signature and returns its index in what [Verifier.Flush]
// returns. The memory is used until then.
func (v *Verifier) Add(key ed25519.PublicKey, msg, sig []byte) int {
	v.keys = append(v.keys, key)
	v.msgs = append(v.msgs, msg)
	v.sigs = append(v.sigs, sig)
	return len(v.keys) - 1
}

// Flush checks everything queued, says of each whether it is valid, and empties
// the queue. It gives the same answers as [VerifyBytes], one by one.
func (v *Verifier) Flush() []bool {
	ok := make([]bool, len(v.keys))
	v.check(0, len(v.keys), ok)
	clear(v.keys)
	clear(v.msgs)
	clear(v.sigs)
	v.keys, v.msgs, v.sigs = v.keys[:0], v.msgs[:0], v.sigs[:0]
	return ok
}

// check verifies [lo,hi) as one batch and splits it where it fails, so that one
// bad signature costs a few batches and not a check of each neighbour.
func (v *Verifier) check(lo, hi int, ok []bool) {
	if hi-lo <= 8 { // below this a batch is no faster
		for i := lo; i < hi; i++ {
			ok[i] = len(v.keys[i]) == ed25519.PublicKeySize && len(v.sigs[i]) == ed25519.SignatureSize &&
				v.cached.VerifyWithOptions(voi.PublicKey(v.keys[i]), v.msgs[i], v.sigs[i], zip215)
		}
		return
	}
	b := voi.NewBatchVerifierWithCapacity(hi - lo)
	for i := lo; i < hi; i++ {
		if len(v.keys[i]) != ed25519.PublicKeySize || len(v.sigs[i]) != ed25519.SignatureSize {
			v.split(lo, hi, ok)
			return
		}
		v.cached.AddWithOptions(b, voi.PublicKey(v.keys[i]), v.msgs[i], v.sigs[i], zip215)
	}
	// The random coefficients only defend against crafted batches: the answer
	// does not depend on them but with probability 2⁻¹²⁸.
	if b.VerifyBatchOnly(rand.Reader) {
		for i := lo; i < hi; i++ {
			ok[i] = true
		}
		return
	}
	v.split(lo, hi, ok)
}

func (v *Verifier) split(lo, hi int, ok []bool) {
	mid := lo + (hi-lo)/2
	v.check(lo, mid, ok)
	v.check(mid, hi, ok)
}
