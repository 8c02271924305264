package gateway

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// noon is the district's time in these tests.
var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// newAuth returns an authenticator of a registry with these clients.
func newAuth(t *testing.T, clients map[string]identity.Client, hc *http.Client) *Authenticator {
	t.Helper()
	g := ledgertest.New("authn", 4).Genesis
	g.Entries = append([]identity.Entry(nil), g.Entries...)
	add := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Status: identity.Active, Body: b})
	}
	add(identity.TypeFeature, identity.FeatureAccess, identity.Feature{From: 1})
	_, agency, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	add(identity.TypeAgency, "fire", identity.Agency{Name: "Fire", Key: identity.PublicKey(agency.Public().(ed25519.PublicKey))})
	for id, c := range clients {
		c.Agency, c.Roles, c.Until = "fire", []string{"dispatcher"}, "2027-01-01T00:00:00Z"
		add(identity.TypeClient, id, c)
	}
	reg, err := identity.NewRegistry(&g)
	if err != nil {
		t.Fatal(err)
	}
	return NewAuthenticator("harbour", func() *identity.Registry { return reg }, func() time.Time { return noon }, hc)
}

func clientKey(t *testing.T) (ed25519.PrivateKey, identity.PublicKey) {
	t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return k, identity.PublicKey(k.Public().(ed25519.PublicKey))
}

func signed(t *testing.T, m jwt.SigningMethod, key any, c jwt.MapClaims) string {
	t.Helper()
	s, err := jwt.NewWithClaims(m, c).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A client's own token holds only as it was made: by its key, for this district,
// now, and for a short time.
func TestOwnTokens(t *testing.T) {
	key, pub := clientKey(t)
	other, _ := clientKey(t)
	a := newAuth(t, map[string]identity.Client{"fire-1": {TokenKey: pub}, "fire-2": {Certificate: strings.Repeat("ab", 32)}}, nil)
	good := func(change func(jwt.MapClaims)) jwt.MapClaims {
		c := jwt.MapClaims{"iss": "fire-1", "sub": "fire-1", "aud": "stopline/harbour", "iat": noon.Unix(), "exp": noon.Add(time.Minute).Unix()}
		if change != nil {
			change(c)
		}
		return c
	}
	made, err := NewToken("harbour", "fire-1", key, noon, MaxTokenLife, "")
	if err != nil {
		t.Fatal(err)
	}
	alg := func(name string) string { // the header says name, whatever the signature is
		parts := strings.Split(made, ".")
		parts[0] = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"` + name + `","typ":"JWT"}`))
		return strings.Join(parts, ".")
	}
	for _, tc := range []struct {
		name, token string
		ok          bool
	}{
		{"as it is made", made, true},
		{"good", signed(t, jwt.SigningMethodEdDSA, key, good(nil)), true},
		{"within the leeway", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) {
			c["exp"] = noon.Add(-20 * time.Second).Unix()
			c["iat"] = noon.Add(-time.Minute).Unix()
		})), true},
		{"expired", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) {
			c["exp"] = noon.Add(-time.Minute).Unix()
			c["iat"] = noon.Add(-2 * time.Minute).Unix()
		})), false},
		{"without an end", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { delete(c, "exp") })), false},
		{"without a beginning", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { delete(c, "iat") })), false},
		{"for too long", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["exp"] = noon.Add(MaxTokenLife + time.Second).Unix() })), false},
		{"of the future", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) {
			c["iat"] = noon.Add(time.Hour).Unix()
			c["exp"] = noon.Add(time.Hour + time.Minute).Unix()
		})), false},
		{"not yet", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["nbf"] = noon.Add(time.Hour).Unix() })), false},
		{"for another district", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["aud"] = "stopline/hills" })), false},
		{"for nobody", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { delete(c, "aud") })), false},
		{"about another", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["sub"] = "fire-2" })), false},
		{"of a client without a token key", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["iss"], c["sub"] = "fire-2", "fire-2" })), false},
		{"of a stranger", signed(t, jwt.SigningMethodEdDSA, key, good(func(c jwt.MapClaims) { c["iss"], c["sub"] = "x", "x" })), false},
		{"by another key", signed(t, jwt.SigningMethodEdDSA, other, good(nil)), false},
		{"by nobody", signed(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, good(nil)), false},
		{"by the public key as a secret", signed(t, jwt.SigningMethodHS256, []byte(pub), good(nil)), false},
		{"alg none", alg("none"), false},
		{"alg HS256", alg("HS256"), false},
		{"cut short", made[:len(made)-4], false},
		{"no JWT", "hello", false},
		{"nothing", "", false},
		{"huge", strings.Repeat("x", 9<<10), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := a.Bearer(t.Context(), tc.token)
			switch {
			case tc.ok && (err != nil || p.ID != "fire-1"):
				t.Errorf("got %+v, %v, want fire-1", p.ID, err)
			case !tc.ok && (err == nil || !errors.Is(err, errNobody)):
				t.Errorf("got %+v, %v, want it refused as credentials", p.ID, err)
			}
		})
	}
	if _, err := NewToken("harbour", "fire-1", key, noon, MaxTokenLife+time.Second, ""); err == nil {
		t.Error("a token for longer than may be was made")
	}
}

// A token for one call is good for one.
func TestTokensForOneCall(t *testing.T) {
	key, pub := clientKey(t)
	a := newAuth(t, map[string]identity.Client{"fire-1": {TokenKey: pub}}, nil)
	for _, id := range []string{"a", "b"} {
		token, err := NewToken("harbour", "fire-1", key, noon, time.Minute, id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Bearer(t.Context(), token); err != nil {
			t.Errorf("%s: %v, want it taken the first time", id, err)
		}
		if _, err := a.Bearer(t.Context(), token); err == nil || !strings.Contains(err.Error(), "used before") {
			t.Errorf("%s the second time: got %v, want used before", id, err)
		}
	}
	for _, c := range []jwt.MapClaims{{"once": true}, {"once": true, "jti": strings.Repeat("x", 65)}} {
		for k, v := range (jwt.MapClaims{"iss": "fire-1", "sub": "fire-1", "aud": "stopline/harbour", "iat": noon.Unix(), "exp": noon.Add(time.Minute).Unix()}) {
			c[k] = v
		}
		if _, err := a.Bearer(t.Context(), signed(t, jwt.SigningMethodEdDSA, key, c)); err == nil {
			t.Errorf("%v: taken, want a jti asked for", c)
		}
	}
}

// testIssuer is an OIDC issuer on this machine.
type testIssuer struct {
	*httptest.Server
	key   *rsa.PrivateKey
	asked atomic.Int64
}

func newTestIssuer(t *testing.T) *testIssuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	is := &testIssuer{key: key}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		is.asked.Add(1)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"issuer": is.URL, "jwks_uri": is.URL + "/keys", "authorization_endpoint": is.URL, "token_endpoint": is.URL,
			"id_token_signing_alg_values_supported": []string{"RS256"}})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := big.NewInt(int64(key.E)).Bytes()
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": []any{map[string]string{"kty": "RSA", "kid": "k1", "alg": "RS256", "use": "sig",
			"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()), "e": base64.RawURLEncoding.EncodeToString(e)}}})
	})
	is.Server = httptest.NewServer(mux)
	t.Cleanup(is.Close)
	return is
}

func (is *testIssuer) token(t *testing.T, m jwt.SigningMethod, key any, change func(jwt.MapClaims)) string {
	t.Helper()
	c := jwt.MapClaims{"iss": is.URL, "sub": "u1", "aud": "stopline/harbour", "iat": noon.Unix(), "exp": noon.Add(time.Minute).Unix()}
	if change != nil {
		change(c)
	}
	tok := jwt.NewWithClaims(m, c)
	tok.Header["kid"] = "k1"
	s, err := tok.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOIDC(t *testing.T) {
	is := newTestIssuer(t)
	a := newAuth(t, map[string]identity.Client{"fire-1": {Issuer: is.URL, Subject: "u1"}}, nil)
	otherKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&is.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	rs := jwt.SigningMethodRS256
	for _, tc := range []struct {
		name, token string
		ok          bool
	}{
		{"good", is.token(t, rs, is.key, nil), true},
		{"another subject", is.token(t, rs, is.key, func(c jwt.MapClaims) { c["sub"] = "u2" }), false},
		{"another audience", is.token(t, rs, is.key, func(c jwt.MapClaims) { c["aud"] = "elsewhere" }), false},
		{"expired", is.token(t, rs, is.key, func(c jwt.MapClaims) { c["exp"] = noon.Add(-time.Hour).Unix() }), false},
		{"of the future", is.token(t, rs, is.key, func(c jwt.MapClaims) {
			c["iat"] = noon.Add(time.Hour).Unix()
			c["exp"] = noon.Add(2 * time.Hour).Unix()
		}), false},
		{"another key", is.token(t, rs, otherKey, nil), false},
		{"HS256 by the public key", is.token(t, jwt.SigningMethodHS256, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), nil), false},
		{"none", is.token(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil), false},
	} {
		p, err := a.Bearer(t.Context(), tc.token)
		if tc.ok && (err != nil || p.ID != "fire-1") || !tc.ok && err == nil {
			t.Errorf("%s: got %q, %v, want ok %v", tc.name, p.ID, err, tc.ok)
		}
	}
	if n := is.asked.Load(); n != 1 {
		t.Errorf("the issuer was discovered %d times, want once", n)
	}
}

// counting counts requests, and lets none out.
type counting struct{ n atomic.Int64 }

func (c *counting) RoundTrip(r *http.Request) (*http.Response, error) {
	c.n.Add(1)
	return nil, errors.New("no way out to " + r.URL.String())
}

// A token makes us ask nobody whom the registry does not name, nor anybody
// without TLS but on this machine.
func TestForeignIssuers(t *testing.T) {
	key, _ := clientKey(t)
	out := &counting{}
	a := newAuth(t, map[string]identity.Client{
		"fire-1": {Issuer: "https://login.example", Subject: "u1"}, "fire-2": {Issuer: "http://login.example", Subject: "u1"}, "fire-3": {Issuer: "file:///etc", Subject: "u1"},
	}, &http.Client{Transport: out})
	for iss, asks := range map[string]int64{
		"https://evil.example": 0, "http://169.254.169.254/latest": 0, "http://127.0.0.1:9": 0, "https://login.example/": 0, "https://login.example.evil": 0,
		"HTTPS://LOGIN.EXAMPLE": 0, "": 0, "http://login.example": 0, "file:///etc": 0, "https://login.example": 1,
	} {
		before := out.n.Load()
		_, err := a.Bearer(t.Context(), signed(t, jwt.SigningMethodEdDSA, key, jwt.MapClaims{"iss": iss, "sub": "u1", "aud": "stopline/harbour", "exp": noon.Add(time.Minute).Unix()}))
		if err == nil || out.n.Load()-before != asks {
			t.Errorf("issuer %q: %v after %d requests, want an error after %d", iss, err, out.n.Load()-before, asks)
		}
	}
	// One that cannot be reached is left alone for a while.
	before := out.n.Load()
	if _, err := a.Bearer(t.Context(), signed(t, jwt.SigningMethodEdDSA, key, jwt.MapClaims{"iss": "https://login.example"})); err == nil || errors.Is(err, errNobody) || out.n.Load() != before {
		t.Errorf("again: %v after %d requests, want it to be out of reach without one", err, out.n.Load()-before)
	}
}

// certificateFor makes a self-signed certificate: no authority matters here.
func certificateFor(t *testing.T, dir, name string, from, to time.Time) (tls.Certificate, *x509.Certificate, string, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: to,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IsCA: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), crypto.Signer(key))
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, keyPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	for f, b := range map[string][]byte{certFile: certPEM, keyFile: keyPEM} {
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return pair, c, certFile, keyFile
}

// By TLS a client is known by its key, in gRPC and REST; TLS is 1.3.
func TestMutualTLS(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	_, serverCert, certFile, keyFile := certificateFor(t, dir, "server", now.Add(-time.Hour), now.Add(time.Hour))
	mine, mineCert, _, _ := certificateFor(t, dir, "mine", now.Add(-time.Hour), now.Add(time.Hour))
	old, oldCert, _, _ := certificateFor(t, dir, "old", now.Add(-time.Hour), now.Add(-time.Minute))
	strange, _, _, _ := certificateFor(t, dir, "strange", now.Add(-time.Hour), now.Add(time.Hour))
	client := func(c *x509.Certificate) identity.Client {
		return identity.Client{Agency: "roads", Roles: []string{"operator"}, Until: "2100-01-01T00:00:00Z", Certificate: CertificateID(c)}
	}
	w := newAPIWorld(t, apiOptions{entries: map[string]identity.Client{"desk-1": client(mineCert), "desk-2": client(oldCert)},
		edit: func(c *APIConfig) { c.Insecure, c.CertFile, c.KeyFile = false, certFile, keyFile }}).ready()
	w.frame(1, "rrrr")
	roots := x509.NewCertPool()
	roots.AddCert(serverCert)
	h := w.who("", "operations")
	for _, tc := range []struct {
		name string
		cert *tls.Certificate
		code codes.Code
		http int
	}{
		{"pinned", &mine, codes.OK, 200}, {"expired", &old, codes.Unauthenticated, 401},
		{"strange", &strange, codes.Unauthenticated, 401}, {"none", nil, codes.Unauthenticated, 401},
	} {
		tc2 := &tls.Config{RootCAs: roots}
		if tc.cert != nil {
			tc2.Certificates = []tls.Certificate{*tc.cert}
		}
		_, err := pb.NewTrafficServiceClient(w.conn(credentials.NewTLS(tc2.Clone()))).ListJunctionStates(as(t.Context(), h), &pb.ListJunctionStatesRequest{})
		if status.Code(err) != tc.code {
			t.Errorf("gRPC, %s: got %v, want %v", tc.name, err, tc.code)
		}
		tr := &http.Transport{TLSClientConfig: tc2.Clone(), ForceAttemptHTTP2: true}
		req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+w.api.Addr()+statePath, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = h
		res, err := (&http.Client{Transport: tr}).Do(req)
		if err != nil {
			t.Fatalf("REST, %s: %v", tc.name, err)
		}
		_ = res.Body.Close()
		if res.StatusCode != tc.http || res.TLS.Version != tls.VersionTLS13 {
			t.Errorf("REST, %s: got %s by TLS %x, want %d by TLS 1.3", tc.name, res.Status, res.TLS.Version, tc.http)
		}
		tr.CloseIdleConnections()
	}
	if c, err := tls.Dial("tcp", w.api.Addr(), &tls.Config{RootCAs: roots, MaxVersion: tls.VersionTLS12}); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 was taken")
	}
	// Without TLS nobody is answered.
	if res, err := http.Get("http://" + w.api.Addr() + statePath); err == nil {
		_ = res.Body.Close()
		t.Errorf("plain HTTP: got %s, want no answer", res.Status)
	}
}

func TestAPIConfigRefuses(t *testing.T) {
	key, _ := clientKey(t)
	good := APIConfig{Listen: "127.0.0.1:0", Insecure: true, Name: "gateway", Key: key, Policy: ledgertest.New("authn", 4).Policy}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*APIConfig){
		"Listen": func(c *APIConfig) { c.Listen = "" }, "Key": func(c *APIConfig) { c.Key = nil }, "Policy": func(c *APIConfig) { c.Policy = []byte("x") },
		"Insecure": func(c *APIConfig) { c.Insecure = false }, "CertFile": func(c *APIConfig) { c.CertFile = "x" }, "Timeout": func(c *APIConfig) { c.Timeout = -1 },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v, want an error that names it", name, err)
		}
	}
}
