package gateway

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/golang-jwt/jwt/v5"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Authenticator says who asks, by what the registry holds of clients: the public
// key of a TLS certificate, the issuer and subject of an OIDC token, or the key
// that signs the client's own tokens. It trusts no list of authorities: who is not
// in the registry is nobody.
type Authenticator struct {
	district traffic.DistrictID
	registry func() *identity.Registry
	now      func() time.Time
	http     *http.Client

	mu      sync.Mutex
	known   *identity.Registry // that the maps below are of
	clients map[string]identity.Client
	byCert  map[string]string
	byOIDC  map[[2]string]string
	issuers map[string]*issuer
	once    map[string]time.Time // ids of tokens for one call, until they end
}

// issuer of OIDC tokens, discovered when it is first needed.
type issuer struct {
	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
	tried    time.Time
	err      error
}

// Audience is what tokens for this district's gateway must name.
func Audience(d traffic.DistrictID) string { return "stopline/" + string(d) }

// MaxTokenLife bounds a client's own token: from issue to expiry.
const MaxTokenLife = 15 * time.Minute

// leeway for clocks that differ.
const leeway = 30 * time.Second

// NewAuthenticator returns an authenticator by the registry as it is at each
// call. hc reaches OIDC issuers; nil is a client that follows no redirects.
func NewAuthenticator(d traffic.DistrictID, registry func() *identity.Registry, now func() time.Time, hc *http.Client) *Authenticator {
	if hc == nil {
		hc = &http.Client{Timeout: 5 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	return &Authenticator{district: d, registry: registry, now: now, http: hc, issuers: map[string]*issuer{}, once: map[string]time.Time{}}
}

// errNobody says that a proof of identity does not hold.
var errNobody = errors.New("credentials")

func nobody(format string, a ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errNobody}, a...)...)
}

// refresh follows the registry. Caller holds mu.
func (a *Authenticator) refresh() {
	reg := a.registry()
	if reg == a.known {
		return
	}
	a.known, a.clients = reg, reg.Clients()
	a.byCert, a.byOIDC = map[string]string{}, map[[2]string]string{}
	for id, c := range a.clients {
		// Two clients with one certificate or subject would be one another: neither is
		// known by it.
		if k := c.Certificate; k != "" {
			if _, taken := a.byCert[k]; taken {
				id = ""
			}
			a.byCert[k] = id
		}
		if k := [2]string{c.Issuer, c.Subject}; k[0] != "" {
			if _, taken := a.byOIDC[k]; taken {
				id = ""
			}
			a.byOIDC[k] = id
		}
	}
}

// principal returns a client that is in the registry now.
func (a *Authenticator) principal(id string) (access.Principal, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refresh()
	c, ok := a.clients[id]
	return access.Principal{ID: id, Client: c}, ok && id != ""
}

// Still returns the client as the registry has it now: streams ask again.
func (a *Authenticator) Still(id string) (access.Principal, bool) { return a.principal(id) }

// CertificateID is how the registry names a certificate: by its key.
func CertificateID(c *x509.Certificate) string {
	h := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(h[:])
}

// Certificate says whose TLS certificate it is. The handshake has shown that the
// other side has its private key.
func (a *Authenticator) Certificate(c *x509.Certificate) (access.Principal, error) {
	if now := a.now(); now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return access.Principal{}, nobody("the certificate is not valid at this time")
	}
	return a.CertificateKey(CertificateID(c))
}

// CertificateKey is [Authenticator.Certificate] by the key's id.
func (a *Authenticator) CertificateKey(id string) (access.Principal, error) {
	a.mu.Lock()
	a.refresh()
	client := a.byCert[id]
	a.mu.Unlock()
	p, ok := a.principal(client)
	if !ok {
		return access.Principal{}, nobody("the certificate's key is not in the registry")
	}
	return p, nil
}

// Bearer says whose token it is.
func (a *Authenticator) Bearer(ctx context.Context, token string) (access.Principal, error) {
	if len(token) > 8<<10 {
		return access.Principal{}, nobody("the token is longer than 8 KiB")
	}
	// Who it says it is, to know whose key to check it with; believed only after.
	var claims jwt.RegisteredClaims
	if _, _, err := jwt.NewParser().ParseUnverified(token, &claims); err != nil {
		return access.Principal{}, nobody("the token is no JWT")
	}
	if p, ok := a.principal(claims.Issuer); ok && len(p.Client.TokenKey) > 0 {
		return p, a.own(token, p)
	}
	return a.oidc(ctx, token, claims.Issuer)
}

// own checks a token that a client has signed itself.
func (a *Authenticator) own(token string, p access.Principal) error {
	var claims struct {
		jwt.RegisteredClaims
		// Once lets the token be used for one call only.
		Once bool `json:"once,omitempty"`
	}
	_, err := jwt.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return ed25519.PublicKey(p.Client.TokenKey), nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}), jwt.WithAudience(Audience(a.district)), jwt.WithIssuer(p.ID),
		jwt.WithSubject(p.ID), jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithLeeway(leeway), jwt.WithTimeFunc(a.now))
	if err != nil {
		return nobody("%s", strings.TrimPrefix(err.Error(), "token has invalid claims: "))
	}
	if claims.IssuedAt == nil || claims.ExpiresAt.Sub(claims.IssuedAt.Time) > MaxTokenLife {
		return nobody("the token must say when it was issued, and last at most %s", MaxTokenLife)
	}
	if !claims.Once {
		return nil
	}
	if claims.ID == "" || len(claims.ID) > 64 {
		return nobody("a token for one call needs a jti of 1 to 64 bytes")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	for id, end := range a.once {
		if now.After(end) {
			delete(a.once, id)
		}
	}
	id := p.ID + "\x00" + claims.ID
	if _, used := a.once[id]; used {
		return nobody("the token was used before")
	}
	a.once[id] = claims.ExpiresAt.Add(leeway)
	return nil
}

// oidc checks a token of an issuer that the registry names. Nobody makes us ask
// an issuer that it does not.
func (a *Authenticator) oidc(ctx context.Context, token, iss string) (access.Principal, error) {
	a.mu.Lock()
	a.refresh()
	var named bool
	for k := range a.byOIDC {
		named = named || k[0] == iss
	}
	if !named {
		a.mu.Unlock()
		return access.Principal{}, nobody("the token's issuer is not in the registry")
	}
	is := a.issuers[iss]
	if is == nil {
		is = &issuer{}
		a.issuers[iss] = is
	}
	a.mu.Unlock()
	v, err := a.discover(ctx, is, iss)
	if err != nil {
		return access.Principal{}, err
	}
	t, err := v.Verify(oidc.ClientContext(ctx, a.http), token)
	if err != nil {
		return access.Principal{}, nobody("%v", err)
	}
	if t.IssuedAt.After(a.now().Add(leeway)) {
		return access.Principal{}, nobody("the token was issued in the future")
	}
	a.mu.Lock()
	client := a.byOIDC[[2]string{t.Issuer, t.Subject}]
	a.mu.Unlock()
	p, ok := a.principal(client)
	if !ok {
		return access.Principal{}, nobody("the token's subject is not in the registry")
	}
	return p, nil
}

// retryIssuer is how long an issuer that could not be reached is left alone.
const retryIssuer = 10 * time.Second

func (a *Authenticator) discover(ctx context.Context, is *issuer, iss string) (*oidc.IDTokenVerifier, error) {
	u, err := url.Parse(iss)
	if err != nil || u.Scheme != "https" && (u.Scheme != "http" || !loopback(u.Hostname())) {
		return nil, nobody("the issuer must be an https URL")
	}
	is.mu.Lock()
	defer is.mu.Unlock()
	if is.verifier != nil {
		return is.verifier, nil
	}
	if is.err != nil && time.Since(is.tried) < retryIssuer {
		return nil, is.err
	}
	is.tried = time.Now()
	// Keys are fetched later too: not within the bounds of this one call.
	p, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), a.http), iss)
	if err != nil {
		is.err = fmt.Errorf("the issuer cannot be reached: %w", err)
		return nil, is.err
	}
	is.err = nil
	is.verifier = p.Verifier(&oidc.Config{ClientID: Audience(a.district), Now: a.now,
		SupportedSigningAlgs: []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.ES256, oidc.ES384, oidc.EdDSA}})
	return is.verifier, nil
}

func loopback(host string) bool { return host == "127.0.0.1" || host == "::1" || host == "localhost" }

// NewToken makes a client's own token: a JWT under its key, for this district's
// gateway, for at most [MaxTokenLife].
func NewToken(d traffic.DistrictID, client string, key ed25519.PrivateKey, now time.Time, life time.Duration, once string) (string, error) {
	if life <= 0 || life > MaxTokenLife {
		return "", fmt.Errorf("a token lasts at most %s", MaxTokenLife)
	}
	claims := jwt.MapClaims{"iss": client, "sub": client, "aud": Audience(d), "iat": now.Unix(), "exp": now.Add(life).Unix()}
	if once != "" {
		claims["jti"], claims["once"] = once, true
	}
	return jwt.NewWithClaims(jwt.SigningMethodEdDSA, claims).SignedString(key)
}
