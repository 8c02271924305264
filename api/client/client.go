package client

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// Options say which gateway, and who asks.
type Options struct {
	// Address is host:port. Required.
	Address string
	// Insecure speaks without TLS: to a demo on this machine, and nothing else.
	Insecure bool
	// Pins, where given, are the gateway's public keys: SHA-256 of a certificate's
	// SubjectPublicKeyInfo, hex. Its certificate must have one of them, and no
	// authority is asked.
	Pins []string
	// RootCAs are the authorities for the gateway's certificate; nil is the system's.
	RootCAs *x509.CertPool
	// Certificate is the client's own. Optional.
	Certificate *tls.Certificate
	// Tokens gives the token for each call. Optional: public methods need none.
	Tokens TokenSource
	// District and ReceiptKey, the key of the gateway's service in the registry,
	// verify receipts. Optional, both or none.
	District   string
	ReceiptKey ed25519.PublicKey
	// OnReceipt hears of every receipt, verified where there is a key, before the
	// call returns. Optional. It is called by the calling goroutine.
	OnReceipt func(method string, r *pb.AccessReceipt)
	// Attempts bounds how often a call is made; 0 is 5, 1 never again.
	Attempts int
	// MaxMessage bounds an answer, bytes; 0 is 64 MiB, as bundles can be large.
	MaxMessage int
	// Dial are further options of the connection. Optional.
	Dial []grpc.DialOption
}

// Validate reports everything that is wrong, joined.
func (o *Options) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("client: "+format, a...)) }
	if o.Address == "" {
		bad("Address: must be given")
	}
	if o.Insecure && (len(o.Pins) > 0 || o.RootCAs != nil || o.Certificate != nil) {
		bad("Insecure: leaves no place for Pins, RootCAs or Certificate")
	}
	for i, p := range o.Pins {
		if b, err := hex.DecodeString(p); err != nil || len(b) != sha256.Size {
			bad("Pins[%d]: must be %d hex digits", i, 2*sha256.Size)
		}
	}
	if (o.District == "") != (len(o.ReceiptKey) == 0) {
		bad("District, ReceiptKey: must be given both or not at all")
	}
	if len(o.ReceiptKey) != 0 && len(o.ReceiptKey) != ed25519.PublicKeySize {
		bad("ReceiptKey: has %d bytes, must have %d", len(o.ReceiptKey), ed25519.PublicKeySize)
	}
	if o.Attempts < 0 || o.MaxMessage < 0 {
		bad("Attempts, MaxMessage: must not be negative")
	}
	return errors.Join(errs...)
}

// Client holds a connection and the services over it. Safe for concurrent use.
type Client struct {
	Traffic  pb.TrafficServiceClient
	Priority pb.PriorityServiceClient
	Evidence pb.EvidenceServiceClient
	Registry pb.RegistryServiceClient
	Devices  pb.DeviceServiceClient
	Access   pb.AccessServiceClient
	Log      pb.LogServiceClient

	o    Options
	conn *grpc.ClientConn
}

// New returns a client; it connects with the first call. Close it.
func New(o Options) (*Client, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Attempts == 0 {
		o.Attempts = 5
	}
	if o.MaxMessage == 0 {
		o.MaxMessage = 64 << 20
	}
	c := &Client{o: o}
	creds := insecure.NewCredentials()
	if !o.Insecure {
		creds = credentials.NewTLS(o.tls())
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithChainUnaryInterceptor(c.unary), grpc.WithChainStreamInterceptor(c.stream),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(o.MaxMessage)),
		// Less than what gateways take for too often.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDisableServiceConfig(), // no retries but ours
		grpc.WithDisableRetry(),
	}
	if o.Tokens != nil {
		dial = append(dial, grpc.WithPerRPCCredentials(bearer{o.Tokens, !o.Insecure}))
	}
	conn, err := grpc.NewClient(o.Address, append(dial, o.Dial...)...)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	c.conn = conn
	c.Traffic, c.Priority, c.Evidence = pb.NewTrafficServiceClient(conn), pb.NewPriorityServiceClient(conn), pb.NewEvidenceServiceClient(conn)
	c.Registry, c.Devices = pb.NewRegistryServiceClient(conn), pb.NewDeviceServiceClient(conn)
	c.Access, c.Log = pb.NewAccessServiceClient(conn), pb.NewLogServiceClient(conn)
	return c, nil
}

// Close ends the connection, and every call on it.
func (c *Client) Close() error { return c.conn.Close() }

// tls is how the gateway is known.
func (o *Options) tls() *tls.Config {
	t := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: o.RootCAs}
	if o.Certificate != nil {
		t.Certificates = []tls.Certificate{*o.Certificate}
	}
	if len(o.Pins) == 0 {
		return t
	}
	pins := make([]string, len(o.Pins))
	for i, p := range o.Pins {
		pins[i] = strings.ToLower(p)
	}
	// The handshake shows that the other side has the key; that it is the right one
	// is said here, also for resumed connections.
	t.InsecureSkipVerify = true
	t.VerifyConnection = func(s tls.ConnectionState) error {
		if got := Pin(s.PeerCertificates[0]); !slices.Contains(pins, got) {
			return fmt.Errorf("client: the gateway's key %s is not one of the %d pinned", got, len(pins))
		}
		return nil
	}
	return t
}

// Pin returns a certificate's key in the form of [Options.Pins].
func Pin(c *x509.Certificate) string {
	h := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(h[:])
}

// bearer puts a token on every call.
type bearer struct {
	tokens TokenSource
	secure bool
}

func (b bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	t, err := b.tokens.Token(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + t}, nil
}

// RequireTransportSecurity keeps tokens off the wire without TLS.
func (b bearer) RequireTransportSecurity() bool { return b.secure }
