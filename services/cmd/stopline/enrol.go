package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	neturl "net/url"
	"os"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var enrolCommand = command{
	name:     "enrol",
	synopsis: "stopline enrol --data DIR --junction ID --device ID [--public-key FILE | --key FILE] [--url URL]\nstopline enrol --data DIR --device ID --revoke [--url URL]",
	summary:  "give a device key to a running demo's registry, or take it back",
	manual: `Files a device in the registry of the district in DIR, so that frames signed
with its key are accepted. The record is signed with the registrar's key of
that district, sent to the running demo, agreed by its validators, and in force
from the block after the one that holds it; enrol waits until then.

The device's key is made on the device and never leaves it: give its public
half with --public-key (PEM, as openssl pkey -pubout writes it, or 64 hex
digits). For trying things out, --key makes a key (or reads the one that is
there) and stores its seed in FILE as 64 hex digits.

--revoke retires the device. Its id is never used again.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		data := fs.String("data", "", "data folder `DIR` of the running demo; holds the registrar's key")
		url := fs.String("url", "http://127.0.0.1:8080", "address `URL` of the running demo")
		junction := fs.String("junction", "", "junction `ID` that the device is at")
		device := fs.String("device", "", "device `ID`, not used before")
		public := fs.String("public-key", "", "`FILE` with the device's public key, PEM or 64 hex digits")
		key := fs.String("key", "", "`FILE` with the device's private key; made if it is not there")
		revoke := fs.Bool("revoke", false, "retire the device instead")
		asJSON := fs.Bool("json", false, "print one JSON object")
		wait := fs.Duration("wait", 10*time.Second, "how long to wait until the record is in force")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) > 0 || *data == "" || *device == "" {
				return usageError("enrol: --data and --device are needed, and no arguments")
			}
			if !*revoke && (*junction == "" || (*public == "") == (*key == "")) {
				return usageError("enrol: --junction and either --public-key or --key are needed")
			}
			d, err := district.Load(*data)
			if err != nil {
				return err
			}
			c := identity.Change{District: d.Genesis.District, Action: "revoke", Type: identity.TypeDevice, ID: *device}
			var pub ed25519.PublicKey
			if !*revoke {
				if pub, err = deviceKey(*public, *key); err != nil {
					return err
				}
				c.Action = "put"
				if c.Body, err = json.Marshal(identity.Device{Junction: traffic.JunctionID(*junction), Key: identity.PublicKey(pub)}); err != nil {
					return err
				}
			}
			var nonce [8]byte
			if _, err := rand.Read(nonce[:]); err != nil {
				return err
			}
			// Below 2⁵³, so that JSON tools that know only doubles keep it whole.
			c.Nonce = binary.BigEndian.Uint64(nonce[:]) >> 11
			registrar, err := d.Key(district.RegistrarKey)
			if err != nil {
				return err
			}
			payload, err := json.Marshal(c)
			if err != nil {
				return err
			}
			e := identity.Sign(registrar, identity.KindRegistry, identity.JSON, payload)
			ctx, cancel := context.WithTimeout(ctx, *wait)
			defer cancel()
			if err := enrollable(ctx, *url, *junction, *device, *revoke); err != nil {
				return err
			}
			commitment, err := fileRecord(ctx, *url, e)
			if err != nil {
				return err
			}
			want := identity.Active
			if *revoke {
				want = identity.Revoked
			}
			if err := inForce(ctx, *url, *device, want, pub, commitment); err != nil {
				return err
			}
			out := map[string]any{"device": *device, "district": d.Genesis.District, "status": want}
			if pub != nil {
				out["key_id"], out["junction"] = identity.IDOf(pub), *junction
			}
			if *asJSON {
				return json.NewEncoder(s.out).Encode(out)
			}
			if *revoke {
				_, err = fmt.Fprintf(s.out, "device %s is revoked\n", *device)
			} else {
				_, err = fmt.Fprintf(s.out, "device %s of junction %s is in the registry\nkey id  %s\n", *device, *junction, identity.IDOf(pub))
			}
			return err
		}
	},
}

func deviceKey(public, private string) (ed25519.PublicKey, error) {
	if public != "" {
		b, err := os.ReadFile(public)
		if err != nil {
			return nil, err
		}
		return parsePublic(public, b)
	}
	k, err := district.ReadKey(private)
	if errors.Is(err, os.ErrNotExist) {
		if _, k, err = ed25519.GenerateKey(nil); err == nil {
			err = district.WriteKey(private, k)
		}
	}
	if err != nil {
		return nil, err
	}
	return k.Public().(ed25519.PublicKey), nil
}

func parsePublic(name string, b []byte) (ed25519.PublicKey, error) {
	if p, _ := pem.Decode(b); p != nil {
		k, err := x509.ParsePKIXPublicKey(p.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		e, ok := k.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%s: is a %T, an Ed25519 key is needed", name, k)
		}
		return e, nil
	}
	k, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(k) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%s: must be PEM or %d hex digits", name, 2*ed25519.PublicKeySize)
	}
	return k, nil
}

// fileRecord sends a registry record and returns its commitment, hex.
func fileRecord(ctx context.Context, url string, e identity.Envelope) (string, error) {
	b, err := post(ctx, url+"/v1/records", e.Marshal())
	if err != nil {
		return "", err
	}
	var receipt struct{ Commitment []byte }
	if err := json.Unmarshal(b, &receipt); err != nil || len(receipt.Commitment) != sha256.Size {
		return "", fmt.Errorf("%s answered without a commitment: %.200s", url, b)
	}
	return hex.EncodeToString(receipt.Commitment), nil
}

// refusal asks why a registry record was refused; nil where it was not, or not
// yet.
func refusal(ctx context.Context, url, commitment string) (*gateway.Refusal, error) {
	var f gateway.Refusal
	refused, err := getJSON(ctx, url+"/v1/refusals/"+commitment, &f)
	if err != nil || !refused {
		return nil, err
	}
	return &f, nil
}

// post sends an envelope and turns anything but a receipt into an error with
// the server's own words.
func post(ctx context.Context, url string, envelope []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(envelope))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", identity.Protobuf)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("is the demo running? %w", err)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s: %s", url, res.Status, bytes.TrimSpace(body))
	}
	return body, nil
}

// entry reads an entry of the registry in force; ok is false where there is none.
func entry(ctx context.Context, url string, t identity.EntryType, id string) (e identity.Entry, ok bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/v1/registry/"+string(t)+"/"+neturl.PathEscape(id), nil)
	if err != nil {
		return e, false, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return e, false, fmt.Errorf("is the demo running? %w", err)
	}
	defer func() { _ = res.Body.Close() }() // read, or given up
	switch res.StatusCode {
	case http.StatusOK:
		err = json.NewDecoder(io.LimitReader(res.Body, 16<<20)).Decode(&e)
		return e, err == nil, err
	case http.StatusNotFound:
		return e, false, nil
	}
	return e, false, fmt.Errorf("%s answered %s", req.URL, res.Status)
}

// enrollable says early, and in words, why the registry would refuse: what it
// refuses after the record was stored has no answer to its sender.
func enrollable(ctx context.Context, url, junction, device string, revoke bool) error {
	e, known, err := entry(ctx, url, identity.TypeDevice, device)
	switch {
	case err != nil:
		return err
	case revoke && !known:
		return fmt.Errorf("device %s is not in the registry", device)
	case revoke && e.Status != identity.Active:
		return fmt.Errorf("device %s is %s already", device, e.Status)
	case revoke:
		return nil
	case known:
		return fmt.Errorf("device %s is in the registry already and %s; an id is never used again", device, e.Status)
	}
	if _, known, err = entry(ctx, url, identity.TypeJunction, junction); err == nil && !known {
		err = fmt.Errorf("junction %s is not in the registry", junction)
	}
	return err
}

// inForce waits until the registry has the device, with the status and, where
// given, the key, or until the record with the commitment has been refused.
func inForce(ctx context.Context, url, device string, want identity.Status, key ed25519.PublicKey, commitment string) error {
	for {
		f, err := refusal(ctx, url, commitment)
		if f != nil {
			return fmt.Errorf("the record was stored, but it was refused by the validators (%s): %s", f.Rule, f.Reason)
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		e, ok, err := entry(ctx, url, identity.TypeDevice, device)
		if ok && e.Status == want {
			var d identity.Device
			if key == nil || json.Unmarshal(e.Body, &d) == nil && bytes.Equal(d.Key, key) {
				return nil
			}
			return fmt.Errorf("device %s was enrolled by somebody else meanwhile", device)
		}
		select {
		case <-ctx.Done():
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
			return fmt.Errorf("the record was stored, but device %s is not %s in the registry yet: it takes longer than --wait", device, want)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
