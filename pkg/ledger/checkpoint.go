package ledger

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// Checkpoint is a tree head as it is signed: three lines, C2SP tlog-checkpoint.
// We make no extension lines and take none.
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   Hash
}

// Body returns the text under the signatures.
func (c Checkpoint) Body() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// ParseCheckpoint decodes what [Checkpoint.Body] wrote, and nothing else.
func ParseCheckpoint(body string) (Checkpoint, error) {
	l := strings.Split(body, "\n")
	if len(l) != 4 || l[3] != "" {
		return Checkpoint{}, errors.New("checkpoint: must be three lines")
	}
	size, err := strconv.ParseUint(l[1], 10, 63)
	if err != nil {
		return Checkpoint{}, errors.New("checkpoint: size: must be a decimal number")
	}
	root, err := base64.StdEncoding.DecodeString(l[2])
	if err != nil || len(root) != len(Hash{}) {
		return Checkpoint{}, errors.New("checkpoint: root: must be 32 bytes in base64")
	}
	c := Checkpoint{Origin: l[0], Size: size, Root: Hash(root)}
	if l[0] == "" || c.Body() != body {
		return Checkpoint{}, errors.New("checkpoint: not in canonical form")
	}
	return c, nil
}

// ParseForeign decodes the head of any log, C2SP tlog-checkpoint: extension lines
// are taken, and left to the log.
func ParseForeign(body string) (Checkpoint, error) {
	l := strings.Split(body, "\n")
	if len(l) < 4 || l[len(l)-1] != "" {
		return Checkpoint{}, errors.New("checkpoint: must be three lines or more, the last one ended")
	}
	for _, extension := range l[3 : len(l)-1] {
		if extension == "" {
			return Checkpoint{}, errors.New("checkpoint: an extension line must not be empty")
		}
	}
	return ParseCheckpoint(strings.Join(l[:3], "\n") + "\n")
}

// Checkpoint returns the head of the log after the block.
func (h Header) Checkpoint(origin string) Checkpoint {
	return Checkpoint{Origin: origin, Size: h.Size, Root: h.Root}
}

// CosignerName is the key name of a validator's cosignatures on its own log.
func CosignerName(origin string, validator uint64) string {
	return fmt.Sprintf("%s/validator-%d", origin, validator)
}

// The signature type of a timestamped Ed25519 checkpoint cosignature, C2SP
// signed-note.
const algCosignature = 4

// cosignatureSize is 4 bytes key hash, 8 bytes time, 64 bytes signature.
const cosignatureSize = 4 + 8 + ed25519.SignatureSize

// Cosigner is a key that makes or checks cosignature/v1 (C2SP tlog-cosignature).
// It is a [note.Verifier].
type Cosigner struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

// NewCosigner returns the cosigner of a public key. The name must not be empty
// nor hold spaces or a plus sign.
func NewCosigner(name string, key ed25519.PublicKey) (*Cosigner, error) {
	if name == "" || strings.ContainsAny(name, "+ \t\r\n") {
		return nil, fmt.Errorf("cosigner %.60q: name must not be empty nor hold spaces or +", name)
	}
	if len(key) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("cosigner %s: key: %d bytes, want %d", name, len(key), ed25519.PublicKeySize)
	}
	h := sha256.New()
	h.Write([]byte(name + "\n"))
	h.Write([]byte{algCosignature})
	h.Write(key)
	return &Cosigner{name: name, hash: binary.BigEndian.Uint32(h.Sum(nil)), key: key}, nil
}

// ParseCosigner decodes a verifier key: name+hash+base64, C2SP signed-note.
func ParseCosigner(vkey string) (*Cosigner, error) {
	name, rest, _ := strings.Cut(vkey, "+")
	_, key64, _ := strings.Cut(rest, "+")
	key, err := base64.StdEncoding.DecodeString(key64)
	if err != nil || len(key) != 1+ed25519.PublicKeySize || key[0] != algCosignature {
		return nil, fmt.Errorf("cosigner key %.80q: must be of type cosignature/v1, Ed25519", vkey)
	}
	c, err := NewCosigner(name, ed25519.PublicKey(key[1:]))
	if err != nil {
		return nil, err
	}
	if c.String() != vkey {
		return nil, fmt.Errorf("cosigner key %.80q: the hash does not fit name and key", vkey)
	}
	return c, nil
}

// String returns the verifier key.
func (c *Cosigner) String() string {
	return fmt.Sprintf("%s+%08x+%s", c.name, c.hash, base64.StdEncoding.EncodeToString(append([]byte{algCosignature}, c.key...)))
}

// Name returns the key's name.
func (c *Cosigner) Name() string { return c.name }

// KeyHash returns the key's short hash.
func (c *Cosigner) KeyHash() uint32 { return c.hash }

// Key returns the public key.
func (c *Cosigner) Key() ed25519.PublicKey { return c.key }

// CosignatureInput returns the bytes that are signed.
func CosignatureInput(body string, at time.Time) []byte {
	return fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", at.Unix(), body)
}

// Verify checks a cosignature as it stands in a note, after the key hash. The note
// may be any log's: see [ParseForeign].
func (c *Cosigner) Verify(msg, sig []byte) bool {
	if len(sig) != cosignatureSize-4 || binary.BigEndian.Uint64(sig) > math.MaxInt64 {
		return false
	}
	if _, err := ParseForeign(string(msg)); err != nil {
		return false
	}
	at := time.Unix(int64(binary.BigEndian.Uint64(sig)), 0)
	return ed25519.Verify(c.key, CosignatureInput(string(msg), at), sig[8:])
}

// Cosign returns the signature line by which a cosigner vouches for a
// checkpoint's body, with the newline at its end. Whoever calls it must have
// made sure that the body is consistent with every one that it cosigned before.
func Cosign(name string, key ed25519.PrivateKey, body string, at time.Time) (string, error) {
	if _, err := ParseCheckpoint(body); err != nil {
		return "", err
	}
	return CosignForeign(name, key, body, at)
}

// CosignForeign is [Cosign] for the checkpoint of any log: of what its extension
// lines say a cosigner says nothing.
func CosignForeign(name string, key ed25519.PrivateKey, body string, at time.Time) (string, error) {
	if _, err := ParseForeign(body); err != nil {
		return "", err
	}
	c, err := NewCosigner(name, key.Public().(ed25519.PublicKey))
	if err != nil {
		return "", err
	}
	if at.Unix() < 0 {
		return "", errors.New("cosignature: time: before 1970")
	}
	b := binary.BigEndian.AppendUint32(nil, c.hash)
	b = binary.BigEndian.AppendUint64(b, uint64(at.Unix()))
	b = append(b, ed25519.Sign(key, CosignatureInput(body, at))...)
	return fmt.Sprintf("— %s %s\n", name, base64.StdEncoding.EncodeToString(b)), nil
}

// CheckCosignature verifies one signature line of a cosigner over a body, and
// returns the time that it bears.
func (c *Cosigner) CheckCosignature(body, line string) (time.Time, error) {
	if strings.Count(line, "\n") != 1 || !strings.HasSuffix(line, "\n") {
		return time.Time{}, fmt.Errorf("cosignature of %s: must be one line", c.name)
	}
	n, err := note.Open([]byte(body+"\n"+line), note.VerifierList(c))
	if err != nil {
		return time.Time{}, fmt.Errorf("cosignature of %s: %w", c.name, err)
	}
	if len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 0 {
		return time.Time{}, fmt.Errorf("cosignature of %s: must be one line", c.name)
	}
	return cosignatureTime(n.Sigs[0])
}

func cosignatureTime(s note.Signature) (time.Time, error) {
	b, err := base64.StdEncoding.DecodeString(s.Base64)
	if err != nil || len(b) != cosignatureSize || binary.BigEndian.Uint64(b[4:]) > math.MaxInt64 {
		return time.Time{}, fmt.Errorf("cosignature of %s: malformed", s.Name)
	}
	return time.Unix(int64(binary.BigEndian.Uint64(b[4:])), 0).UTC(), nil
}

// Seal returns the signed note of a checkpoint: the log's signature, then the
// cosigners' lines. Check the lines first: [Cosigner.CheckCosignature].
func Seal(c Checkpoint, log note.Signer, cosignatures []string) ([]byte, error) {
	b, err := note.Sign(&note.Note{Text: c.Body()}, log)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	for _, l := range cosignatures {
		b = append(b, l...)
	}
	return b, nil
}
