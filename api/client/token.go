package client

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// TokenSource gives the token for a call. Safe for concurrent use.
type TokenSource interface {
	Token(ctx context.Context) (string, error)
}

// StaticToken is a token that somebody else renews, for instance an OIDC issuer.
type StaticToken string

// Token returns t.
func (t StaticToken) Token(context.Context) (string, error) { return string(t), nil }

// TokenFunc is a function that is a TokenSource.
type TokenFunc func(ctx context.Context) (string, error)

// Token calls f.
func (f TokenFunc) Token(ctx context.Context) (string, error) { return f(ctx) }

// selfSigned makes tokens with the client's own key.
type selfSigned struct {
	district, client string
	key              ed25519.PrivateKey
	life             time.Duration
	now              func() time.Time

	mu    sync.Mutex
	token string    // guarded by mu
	until time.Time // from when on a new one is made; guarded by mu
}

// tokenLife is how long a token is good. Gateways take 15 minutes at most.
const tokenLife = 5 * time.Minute

// SelfSigned makes the short-lived tokens of a client in the registry of a
// district, with the key that the registry has for it.
func SelfSigned(district, client string, key ed25519.PrivateKey) TokenSource {
	return &selfSigned{district: district, client: client, key: key, life: tokenLife, now: time.Now}
}

// Token returns a token that is good for a minute at least.
func (s *selfSigned) Token(context.Context) (string, error) {
	if len(s.key) != ed25519.PrivateKeySize || s.district == "" || s.client == "" {
		return "", errors.New("client: tokens: district, client and key are needed")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if now.Before(s.until) {
		return s.token, nil
	}
	claims, err := json.Marshal(map[string]any{
		"iss": s.client, "sub": s.client, "aud": "stopline/" + s.district, "iat": now.Unix(), "exp": now.Add(s.life).Unix(),
	})
	if err != nil {
		return "", fmt.Errorf("client: tokens: %w", err)
	}
	// RFC 7515, and RFC 8037 for the algorithm.
	b64 := base64.RawURLEncoding
	in := b64.EncodeToString([]byte(`{"alg":"EdDSA","typ":"JWT"}`)) + "." + b64.EncodeToString(claims)
	s.token, s.until = in+"."+b64.EncodeToString(ed25519.Sign(s.key, []byte(in))), now.Add(s.life-time.Minute)
	return s.token, nil
}

// KeyFile reads an Ed25519 private key: PEM (PKCS #8, as openssl genpkey writes
// it), or the 64 hex digits of its seed.
func KeyFile(path string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if p, _ := pem.Decode(b); p != nil {
		k, err := x509.ParsePKCS8PrivateKey(p.Bytes)
		if err != nil {
			return nil, fmt.Errorf("client: %s: %w", path, err)
		}
		e, ok := k.(ed25519.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("client: %s: is a %T, an Ed25519 key is needed", path, k)
		}
		return e, nil
	}
	seed, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("client: %s: must be PEM or %d hex digits", path, 2*ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}
