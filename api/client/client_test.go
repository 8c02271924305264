package client

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// gate is a gateway that answers what a test wants.
type gate struct {
	pb.UnimplementedTrafficServiceServer
	pb.UnimplementedPriorityServiceServer
	pb.UnimplementedDeviceServiceServer
	key ed25519.PrivateKey

	mu       sync.Mutex
	errs     []error // of the next calls; guarded by mu, like all below
	seen     []metadata.MD
	receipt  func(*pb.AccessReceipt) *pb.AccessReceipt // nil: none is sent
	messages int                                       // of a stream before its error
}

func (g *gate) call(ctx context.Context, set func(metadata.MD) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	md, _ := metadata.FromIncomingContext(ctx)
	g.seen = append(g.seen, md)
	if g.receipt != nil {
		b, err := proto.Marshal(g.receipt(sign(g.key, "harbour")))
		if err != nil {
			return err
		}
		if err := set(metadata.Pairs("stopline-access-receipt", base64.StdEncoding.EncodeToString(b))); err != nil {
			return err
		}
	}
	if len(g.errs) == 0 {
		return nil
	}
	err := g.errs[0]
	g.errs = g.errs[1:]
	return err
}

func (g *gate) fail(errs ...error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.errs, g.seen = errs, nil
}

func (g *gate) calls() []metadata.MD {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]metadata.MD(nil), g.seen...)
}

func sign(key ed25519.PrivateKey, district string) *pb.AccessReceipt {
	pub := key.Public().(ed25519.PublicKey)
	h, c := sha256.Sum256(pub), sha256.Sum256([]byte("record"))
	r := &pb.AccessReceipt{Commitment: c[:], TimeUnixNano: 7, KeyId: hex.EncodeToString(h[:16])}
	r.Signature = ed25519.Sign(key, binary.BigEndian.AppendUint64(append([]byte("stopline access receipt v1\n"+district+"\n"), c[:]...), 7))
	return r
}

func (g *gate) GetJunctionState(ctx context.Context, r *pb.GetJunctionStateRequest) (*pb.GetJunctionStateResponse, error) {
	if err := g.call(ctx, func(m metadata.MD) error { return grpc.SetHeader(ctx, m) }); err != nil {
		return nil, err
	}
	return &pb.GetJunctionStateResponse{State: &pb.JunctionState{Junction: r.Junction}}, nil
}

func (g *gate) RequestPriority(ctx context.Context, _ *pb.RequestPriorityRequest) (*pb.RequestPriorityResponse, error) {
	return &pb.RequestPriorityResponse{}, g.call(ctx, func(m metadata.MD) error { return grpc.SetHeader(ctx, m) })
}

func (g *gate) Enrol(ctx context.Context, _ *pb.EnrolRequest) (*pb.EnrolResponse, error) {
	return &pb.EnrolResponse{}, g.call(ctx, func(m metadata.MD) error { return grpc.SetHeader(ctx, m) })
}

func (g *gate) CreateClaim(ctx context.Context, _ *pb.CreateClaimRequest) (*pb.CreateClaimResponse, error) {
	return &pb.CreateClaimResponse{}, g.call(ctx, func(m metadata.MD) error { return grpc.SetHeader(ctx, m) })
}

func (g *gate) WatchJunctionStates(_ *pb.WatchJunctionStatesRequest, s grpc.ServerStreamingServer[pb.WatchJunctionStatesResponse]) error {
	err := g.call(s.Context(), s.SetHeader)
	g.mu.Lock()
	n := g.messages
	g.mu.Unlock()
	for i := range n {
		if err := s.Send(&pb.WatchJunctionStatesResponse{Height: uint64(i + 1)}); err != nil {
			return err
		}
	}
	return err
}

func serve(t *testing.T, g *gate, o ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(o...)
	pb.RegisterTrafficServiceServer(s, g)
	pb.RegisterPriorityServiceServer(s, g)
	pb.RegisterDeviceServiceServer(s, g)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func open(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func newGate() *gate {
	return &gate{key: ed25519.NewKeyFromSeed(make([]byte, 32))}
}

func testKey(b byte) ed25519.PrivateKey {
	seed := make([]byte, 32)
	seed[0] = b
	return ed25519.NewKeyFromSeed(seed)
}

func refusal(t *testing.T, c codes.Code, reason string, wait time.Duration) error {
	t.Helper()
	st, err := status.New(c, "no").WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "stopline"})
	if err == nil && wait > 0 {
		st, err = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(wait)})
	}
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var state = &pb.GetJunctionStateRequest{Junction: "J1"}

func TestWhatACallCarries(t *testing.T) {
	g := newGate()
	c := open(t, Options{Address: serve(t, g), Insecure: true, Tokens: SelfSigned("harbour", "police-1", testKey(1))})
	if _, err := c.Traffic.GetJunctionState(within(t), state, Purpose("investigation"), Case("K-17/26"), LegalBasis("warrant"), Covert(30)); err != nil {
		t.Fatal(err)
	}
	md := g.calls()[0]
	for k, want := range map[string]string{"stopline-purpose": "investigation", "stopline-case": "K-17/26", "stopline-legal-basis": "warrant", "stopline-covert-days": "30"} {
		if got := md.Get(k); len(got) != 1 || got[0] != want {
			t.Errorf("%s: got %q, want %q", k, got, want)
		}
	}
	token, ok := strings.CutPrefix(md.Get("authorization")[0], "Bearer ")
	parts := strings.Split(token, ".")
	if !ok || len(parts) != 3 {
		t.Fatalf("authorization: got %q, want a Bearer JWT", md.Get("authorization"))
	}
	sig, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil || !ed25519.Verify(testKey(1).Public().(ed25519.PublicKey), []byte(parts[0]+"."+parts[1]), sig) {
		t.Errorf("the token is not signed with the client's key: %v", err)
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Iss, Sub, Aud string
		Iat, Exp      int64
	}
	if err := json.Unmarshal(body, &claims); err != nil || claims.Iss != "police-1" || claims.Sub != "police-1" || claims.Aud != "stopline/harbour" || claims.Exp-claims.Iat != 300 {
		t.Errorf("got claims %s, %v", body, err)
	}
}

func TestTokensAreRenewed(t *testing.T) {
	s := SelfSigned("harbour", "police-1", testKey(1)).(*selfSigned)
	now := time.Unix(1_800_000_000, 0)
	s.now = func() time.Time { return now }
	take := func() string {
		t.Helper()
		tok, err := s.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return tok
	}
	one := take()
	if now = now.Add(3*time.Minute + 59*time.Second); take() != one {
		t.Error("a new token while the old one is good for a minute")
	}
	if now = now.Add(time.Second); take() == one {
		t.Error("no new token a minute before the end")
	}
	if _, err := SelfSigned("harbour", "", testKey(1)).Token(t.Context()); err == nil {
		t.Error("a token for nobody")
	}
}

func TestAgain(t *testing.T) {
	g := newGate()
	c := open(t, Options{Address: serve(t, g), Insecure: true})
	lost, limit := status.Error(codes.Unavailable, "lost"), refusal(t, codes.ResourceExhausted, "LIMIT", time.Millisecond)
	large, denied := status.Error(codes.ResourceExhausted, "grpc: message too large"), refusal(t, codes.PermissionDenied, "POLICY", 0)
	read := func(ctx context.Context) error { _, err := c.Traffic.GetJunctionState(ctx, state); return err }
	write := func(key string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.Priority.RequestPriority(ctx, &pb.RequestPriorityRequest{IdempotencyKey: key})
			return err
		}
	}
	for _, tc := range []struct {
		name  string
		call  func(context.Context) error
		errs  []error
		calls int
		code  codes.Code
	}{
		{"a reading", read, []error{lost}, 2, codes.OK},
		{"too often", read, []error{limit, limit, limit}, 4, codes.OK},
		{"too often for too long", read, []error{limit, limit, limit, limit, limit, limit}, 5, codes.ResourceExhausted},
		{"too large", read, []error{large}, 1, codes.ResourceExhausted},
		{"denied", read, []error{denied}, 1, codes.PermissionDenied},
		{"a write with a key", write("k"), []error{lost}, 2, codes.OK},
		{"a write without a key, which may have been done", write(""), []error{lost}, 1, codes.Unavailable},
		{"a write without a key, not done", write(""), []error{refusal(t, codes.Unavailable, "DRAINING", time.Millisecond)}, 2, codes.OK},
		{"enrolment", func(ctx context.Context) error { _, err := c.Devices.Enrol(ctx, &pb.EnrolRequest{}); return err }, []error{lost}, 2, codes.OK},
		{"a claim", func(ctx context.Context) error {
			_, err := c.Devices.CreateClaim(ctx, &pb.CreateClaimRequest{})
			return err
		}, []error{lost}, 1, codes.Unavailable},
	} {
		g.fail(tc.errs...)
		err := tc.call(within(t))
		if n := len(g.calls()); n != tc.calls || status.Code(err) != tc.code {
			t.Errorf("%s: got %d calls and %v, want %d and %s", tc.name, n, err, tc.calls, tc.code)
		}
	}
	// What cannot be waited for is not waited for.
	g.fail(refusal(t, codes.ResourceExhausted, "LIMIT", time.Hour))
	if err := read(within(t)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("an hour's wait: got %v, want the refusal at once", err)
	}
}

func TestReceipts(t *testing.T) {
	g := newGate()
	pub := g.key.Public().(ed25519.PublicKey)
	var heard []string
	c := open(t, Options{Address: serve(t, g), Insecure: true, District: "harbour", ReceiptKey: pub, OnReceipt: func(m string, _ *pb.AccessReceipt) { heard = append(heard, m) }})
	same := func(r *pb.AccessReceipt) *pb.AccessReceipt { return r }
	for _, tc := range []struct {
		name   string
		change func(*pb.AccessReceipt) *pb.AccessReceipt
		want   string
	}{
		{"good", same, ""},
		{"none", nil, "has none"},
		{"of another time", func(r *pb.AccessReceipt) *pb.AccessReceipt { r.TimeUnixNano++; return r }, "signature"},
		{"of another record", func(r *pb.AccessReceipt) *pb.AccessReceipt { r.Commitment[0] ^= 1; return r }, "signature"},
		{"of another district", func(*pb.AccessReceipt) *pb.AccessReceipt { return sign(g.key, "airport") }, "signature"},
		{"by another key", func(*pb.AccessReceipt) *pb.AccessReceipt { return sign(testKey(9), "harbour") }, "key_id"},
		{"cut short", func(r *pb.AccessReceipt) *pb.AccessReceipt { r.Commitment = r.Commitment[1:]; return r }, "commitment"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g.mu.Lock()
			g.receipt, g.messages = tc.change, 1
			g.mu.Unlock()
			heard = nil
			r := &pb.AccessReceipt{}
			_, err := c.Traffic.GetJunctionState(within(t), state, Receipt(r), MustReceipt())
			serr := c.WatchJunctionStates(within(t), &pb.WatchJunctionStatesRequest{}, func(*pb.WatchJunctionStatesResponse) error { return nil }, MustReceipt())
			for _, err := range []error{err, serr} {
				if tc.want == "" && err != nil || tc.want != "" && (!errors.Is(err, ErrReceipt) || !strings.Contains(err.Error(), tc.want)) {
					t.Errorf("got %v, want %q", err, tc.want)
				}
			}
			if good := tc.want == ""; good != (len(heard) == 2) || good != (len(r.Commitment) == 32) {
				t.Errorf("heard of %d receipts, got %v", len(heard), r)
			}
		})
	}
	// Without the option a missing one is no error: most readings are counted.
	g.mu.Lock()
	g.receipt = nil
	g.mu.Unlock()
	if _, err := c.Traffic.GetJunctionState(within(t), state); err != nil {
		t.Error(err)
	}
}

func TestStreamsResume(t *testing.T) {
	g := newGate()
	c := open(t, Options{Address: serve(t, g), Insecure: true})
	g.messages = 2
	lost := refusal(t, codes.Unavailable, "DRAINING", time.Millisecond)
	g.fail(lost, lost, lost, lost, lost, lost, lost)
	n := 0
	if err := c.WatchJunctionStates(within(t), &pb.WatchJunctionStatesRequest{}, func(*pb.WatchJunctionStatesResponse) error { n++; return nil }, Purpose("operations")); err != nil {
		t.Fatal(err)
	}
	if calls := g.calls(); n != 16 || len(calls) != 8 || calls[7].Get("stopline-purpose")[0] != "operations" {
		t.Errorf("got %d messages in %d streams, want 16 in 8, each with its purpose", n, len(calls))
	}
	g.fail(lost, refusal(t, codes.PermissionDenied, "POLICY", 0))
	if err := c.WatchJunctionStates(within(t), &pb.WatchJunctionStatesRequest{}, func(*pb.WatchJunctionStatesResponse) error { return nil }); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, want the denial", err)
	}
	g.fail(lost)
	enough := errors.New("enough")
	if err := c.WatchJunctionStates(within(t), &pb.WatchJunctionStatesRequest{}, func(*pb.WatchJunctionStatesResponse) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("got %v, want what the handler returned", err)
	}
}

// certify makes a certificate of its own for a key of its own.
func certify(t *testing.T) tls.Certificate {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gateway"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func TestPins(t *testing.T) {
	cert, other := certify(t), certify(t)
	g := newGate()
	addr := serve(t, g, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})))
	call := func(o Options) error {
		o.Address, o.Attempts = addr, 1
		_, err := open(t, o).Traffic.GetJunctionState(within(t), state)
		return err
	}
	if err := call(Options{Pins: []string{Pin(other.Leaf), strings.ToUpper(Pin(cert.Leaf))}, Tokens: StaticToken("t")}); err != nil {
		t.Error(err)
	}
	if err := call(Options{Pins: []string{Pin(other.Leaf)}, Tokens: StaticToken("t")}); err == nil || !strings.Contains(err.Error(), "not one of the 1 pinned") {
		t.Errorf("another key: got %v, want it refused", err)
	}
	if err := call(Options{}); err == nil || !strings.Contains(err.Error(), "x509") {
		t.Errorf("no pins, and no authority knows it: got %v, want it refused", err)
	}
	if n := len(g.calls()); n != 1 {
		t.Errorf("the gateway got %d calls, want 1", n)
	}
}

func TestOptions(t *testing.T) {
	_, err := New(Options{Insecure: true, Pins: []string{"x"}, District: "d", Attempts: -1})
	for _, want := range []string{"Address:", "Insecure:", "Pins[0]:", "District, ReceiptKey:", "Attempts, MaxMessage:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a problem with %q", err, want)
		}
	}
}

func TestKeyFile(t *testing.T) {
	want := testKey(3)
	der, err := x509.MarshalPKCS8PrivateKey(want)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"hex": hex.EncodeToString(want.Seed()) + "\n", "pem": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"bad": "00", "not a key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
	} {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := KeyFile(path)
		if good := name == "hex" || name == "pem"; good != (err == nil) || good && !k.Equal(want) {
			t.Errorf("%s: got %v, %v", name, k, err)
		}
	}
}
