package main

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	neturl "net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/status"

	"github.com/stopline-traffic/stopline/api/client"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var onboardCommand = command{
	name: "onboard",
	synopsis: `stopline onboard --gateway URL --claim TEXT --out DIR [--pin HEX]
stopline onboard --gateway URL --rotate --out DIR [--pin HEX]`,
	summary: "on a device: make its key, enrol it with a claim, or change its key",
	manual: `Runs on the device. The key is made here, in DIR, and never leaves it: the
gateway is given the public half, a proof that the device has the other, and the
claim that a technician has had made for this device (CreateClaim). A claim works
once and ends by itself.

DIR then holds
    device.key    the key's seed, 64 hex digits
    token         for MQTT, the password
    device.json   district, device, junction, topics, and from which block frames
                  are taken

If the answer is lost, run it again with the same DIR: the key is the same, and
the gateway answers the same.

--rotate makes a new key; the old one signs it. Both stay on record, and frames
signed with the old one are refused from the next block on: stop sending before,
and go on with the new one, the sequence as it was. The new key comes with a new
token; do it before the token ends. When it fails, run it again: a key that the
district has taken already is not made anew.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o onboarding
		fs.StringVar(&o.gateway, "gateway", "", "the gateway's `URL`, such as https://gateway.example:8443; http only on this machine")
		fs.StringVar(&o.claim, "claim", "", "the claim's `TEXT`, or - to read it from standard input")
		fs.StringVar(&o.out, "out", "", "folder `DIR` for key, token and configuration; made if it is not there")
		fs.StringVar(&o.pin, "pin", "", "SHA-256 of the gateway's public key in `HEX`; without it its certificate must be\nissued by an authority that this machine trusts")
		fs.BoolVar(&o.rotate, "rotate", false, "change the key of the device in DIR")
		asJSON := fs.Bool("json", false, "print device.json")
		wait := fs.Duration("wait", 30*time.Second, "how long to try")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) > 0 || o.gateway == "" || o.out == "" || o.rotate == (o.claim != "") {
				return usageError("onboard: --gateway, --out and either --claim or --rotate are needed, and no arguments")
			}
			if o.claim == "-" {
				b, err := io.ReadAll(io.LimitReader(os.Stdin, 256))
				if err != nil {
					return err
				}
				if o.claim = strings.TrimSpace(string(b)); o.claim == "" {
					return usageError("onboard: --claim -: there is no claim on standard input")
				}
			}
			ctx, cancel := context.WithTimeout(ctx, *wait)
			defer cancel()
			d, err := o.run(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return json.NewEncoder(s.out).Encode(d)
			}
			what := "is enrolled"
			if o.rotate {
				what = "has a new key"
			}
			_, err = fmt.Fprintf(s.out, "device %s of junction %s in district %s %s\nkey id  %s\nframes  are taken from block %d on\ntoken   ends %s\n",
				d.Device, d.Junction, d.District, what, d.KeyID, d.InForce, d.TokenExpires.Format(time.RFC3339))
			return err
		}
	},
}

// onboarding is what a device is asked to do.
type onboarding struct {
	gateway, claim, out, pin string
	rotate                   bool
}

// The files of a device.
const (
	deviceKeyFile  = "device.key"
	nextKeyFile    = "device.key.next" // asked for, and maybe taken
	deviceToken    = "token"
	deviceJSONFile = "device.json"
)

// onboarded is device.json.
type onboarded struct {
	Gateway  string             `json:"gateway"`
	District traffic.DistrictID `json:"district"`
	Device   traffic.DeviceID   `json:"device"`
	Junction traffic.JunctionID `json:"junction"`
	KeyID    identity.KeyID     `json:"key_id"`
	// InForce is the block from which frames of the key are taken.
	InForce uint64 `json:"in_force_height"`
	// What MQTT needs; the password is in the file token.
	ClientID     string    `json:"client_id"`
	Username     string    `json:"username"`
	Up           string    `json:"up"`
	Down         string    `json:"down"`
	TokenExpires time.Time `json:"token_expires"`
}

// dial makes a client for the gateway's URL.
func (o *onboarding) dial() (*client.Client, error) {
	u, err := neturl.Parse(o.gateway)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil {
		return nil, usageError("onboard: --gateway %q: must be https://HOST:PORT", o.gateway)
	}
	c := client.Options{Address: u.Host, Insecure: u.Scheme == "http"}
	if c.Insecure {
		// A claim is a secret.
		if ip := net.ParseIP(u.Hostname()); u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, usageError("onboard: --gateway %s: must be https, but for one on this machine", o.gateway)
		}
	}
	if u.Port() == "" {
		c.Address = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	}
	if o.pin != "" {
		c.Pins = []string{o.pin}
	}
	cl, err := client.New(c)
	if err != nil {
		return nil, usageError("onboard: %v", err)
	}
	return cl, nil
}

func (o *onboarding) run(ctx context.Context) (*onboarded, error) {
	c, err := o.dial()
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }() // nothing is on its way any more
	if err := os.MkdirAll(o.out, 0o700); err != nil {
		return nil, err
	}
	if o.rotate {
		return o.rotateKey(ctx, c)
	}
	return o.enrol(ctx, c)
}

func (o *onboarding) path(name string) string { return filepath.Join(o.out, name) }

// keyIn reads the key in a file, making it first if there is none.
func keyIn(path string) (ed25519.PrivateKey, error) {
	k, err := district.ReadKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, k, err = ed25519.GenerateKey(nil); err == nil {
			err = district.WriteKey(path, k)
		}
	}
	return k, err
}

// refusedBy words a gateway's refusal.
func refusedBy(err error) error {
	if st, ok := status.FromError(err); ok {
		return fmt.Errorf("the gateway refused it (%s): %s", st.Code(), st.Message())
	}
	return err
}

func (o *onboarding) enrol(ctx context.Context, c *client.Client) (*onboarded, error) {
	if b, err := os.ReadFile(o.path(deviceJSONFile)); err == nil {
		var d onboarded
		if json.Unmarshal(b, &d) == nil && d.Device != "" {
			return nil, fmt.Errorf("%s holds device %s already; give another folder", o.out, d.Device)
		}
	}
	key, err := keyIn(o.path(deviceKeyFile))
	if err != nil {
		return nil, err
	}
	r, err := c.Devices.Enrol(ctx, &pb.EnrolRequest{Claim: o.claim, Key: key.Public().(ed25519.PublicKey), Proof: ed25519.Sign(key, identity.EnrolInput(o.claim))})
	if err != nil {
		return nil, refusedBy(err)
	}
	d := &onboarded{District: traffic.DistrictID(r.District), Device: traffic.DeviceID(r.Device), Junction: traffic.JunctionID(r.Junction), InForce: r.InForceHeight}
	return d, o.keep(d, key, r.Token, r.TokenExpires.AsTime())
}

// keep writes down what the gateway has answered.
func (o *onboarding) keep(d *onboarded, key ed25519.PrivateKey, token string, end time.Time) error {
	d.Gateway, d.KeyID, d.TokenExpires = o.gateway, identity.IDOf(key.Public().(ed25519.PublicKey)), end
	d.ClientID, d.Username = topic.Token(string(d.Device)), string(d.Device)
	d.Up, d.Down = topic.MQTT(topic.DeviceUp(d.District, d.Device)), topic.MQTT(topic.DeviceDown(d.District, d.Device))
	if err := district.WriteFile(o.path(deviceToken), []byte(token+"\n"), 0o600); err != nil {
		return err
	}
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	return district.WriteFile(o.path(deviceJSONFile), append(b, '\n'), 0o644)
}

func (o *onboarding) rotateKey(ctx context.Context, c *client.Client) (*onboarded, error) {
	var d onboarded
	b, err := os.ReadFile(o.path(deviceJSONFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("%s: %w", o.path(deviceJSONFile), err)
	}
	old, err := district.ReadKey(o.path(deviceKeyFile))
	if err != nil {
		return nil, err
	}
	// On disk before it is asked for: else the district could have a key that nobody
	// has.
	next, err := keyIn(o.path(nextKeyFile))
	if err != nil {
		return nil, err
	}
	pub := next.Public().(ed25519.PublicKey)
	in := identity.RotateInput(d.Device, pub)
	r, err := c.Devices.RotateKey(ctx, &pb.RotateKeyRequest{Device: string(d.Device), NewKey: pub, OldProof: ed25519.Sign(old, in), NewProof: ed25519.Sign(next, in)})
	if err != nil {
		return nil, refusedBy(err)
	}
	if r.Device.GetKey() != hex.EncodeToString(pub) {
		return nil, fmt.Errorf("the gateway says that the key of %s is %.64q, which is not the new one", d.Device, r.Device.GetKey())
	}
	d.InForce = r.InForceHeight
	if err := o.keep(&d, next, r.Token, r.TokenExpires.AsTime()); err != nil {
		return nil, err
	}
	// The old one goes last.
	if err := os.Rename(o.path(nextKeyFile), o.path(deviceKeyFile)); err != nil {
		return nil, err
	}
	return &d, nil
}

// devicesConfig is how the gateway brings devices in; nil where the district was
// made without a desk.
func (l *local) devicesConfig() (*gateway.DevicesConfig, error) {
	desk, err := l.district.Key(district.DeskKey)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	tokens, err := l.district.TokenKey()
	if err != nil {
		return nil, err
	}
	return &gateway.DevicesConfig{Desk: desk, TokenKey: tokens}, nil
}
