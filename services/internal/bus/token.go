package bus

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// MaxTokenLife is the longest that a device token may be good for.
const MaxTokenLife = 31 * 24 * time.Hour

// NewToken returns a token by which a device may connect with MQTT from one time
// until another, and speak on its own two topics. It is a NATS user JWT, a bearer
// token, signed by key as an account's signing key: a NATS cluster that knows
// the key in its own account can take the same tokens.
func NewToken(key ed25519.PrivateKey, d traffic.DistrictID, device traffic.DeviceID, from, until time.Time) (string, error) {
	switch life := until.Sub(from); {
	case d == "" || device == "":
		return "", kind.Errorf(kind.Invalid, "token: district and device must not be empty")
	case life < time.Second || life > MaxTokenLife:
		return "", kind.Errorf(kind.Invalid, "token: good for %v, must be 1 s to %v", life, MaxTokenLife)
	}
	signer, err := tokenSigner(key)
	if err != nil {
		return "", err
	}
	// A bearer token needs no key of its own; the form wants one.
	user, err := nkeys.CreateUser()
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	subject, err := user.PublicKey()
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	c := jwt.NewUserClaims(subject)
	c.Name = string(device)
	c.BearerToken = true
	c.AllowedConnectionTypes = jwt.StringList{jwt.ConnectionTypeMqtt, jwt.ConnectionTypeMqttWS}
	c.Pub.Allow = jwt.StringList{topic.DeviceUp(d, device)}
	c.Sub.Allow = jwt.StringList{topic.DeviceDown(d, device)}
	c.NotBefore, c.Expires = from.Unix(), until.Unix()
	t, err := c.Encode(signer)
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	return t, nil
}

func tokenSigner(key ed25519.PrivateKey) (nkeys.KeyPair, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, kind.Errorf(kind.Invalid, "token: key has %d bytes, must have %d", len(key), ed25519.PrivateKeySize)
	}
	return nkeys.FromRawSeed(nkeys.PrefixByteAccount, key.Seed())
}

// tokenIssuer is the name that tokens signed by the key have as issuer.
func tokenIssuer(key ed25519.PublicKey) (string, error) {
	b, err := nkeys.Encode(nkeys.PrefixByteAccount, key)
	return string(b), err
}

// Why a token was not good enough, as errors of [checkToken] and as counted.
var (
	errTokenForm   = errors.New("token")
	errTokenOther  = errors.New("other-device")
	errTokenEarly  = errors.New("not-yet")
	errTokenLapsed = errors.New("expired")
)

// checkToken returns until when a token is good for a device of a district. Its
// errors wrap one of the errors above.
func checkToken(issuer string, d traffic.DistrictID, device traffic.DeviceID, token string, now time.Time) (time.Time, error) {
	none := time.Time{}
	if token == "" {
		return none, fmt.Errorf("%w: there is none in the password", errTokenForm)
	}
	c, err := jwt.DecodeUserClaims(token)
	switch {
	case err != nil:
		return none, fmt.Errorf("%w: %w", errTokenForm, err)
	case c.Issuer != issuer:
		return none, fmt.Errorf("%w: signed by another key than the district's", errTokenForm)
	case !c.BearerToken || !c.AllowedConnectionTypes.Contains(jwt.ConnectionTypeMqtt):
		return none, fmt.Errorf("%w: not for MQTT", errTokenForm)
	case c.Name != string(device),
		!slices.Equal(c.Pub.Allow, jwt.StringList{topic.DeviceUp(d, device)}),
		!slices.Equal(c.Sub.Allow, jwt.StringList{topic.DeviceDown(d, device)}):
		return none, fmt.Errorf("%w: the token is of device %.80q and allows %.200q, the user name says %.80q of district %s", errTokenOther, c.Name, c.Pub.Allow, device, d)
	}
	expires := time.Unix(c.Expires, 0)
	switch {
	case c.Expires == 0 || c.NotBefore == 0 || c.Expires-c.NotBefore > int64(MaxTokenLife/time.Second):
		return none, fmt.Errorf("%w: good for longer than %v", errTokenForm, MaxTokenLife)
	case !now.Before(expires):
		return none, fmt.Errorf("%w: the token was good until %s", errTokenLapsed, expires.UTC().Format(time.RFC3339))
	case now.Before(time.Unix(c.NotBefore, 0).Add(-tokenSkew)):
		return none, fmt.Errorf("%w: the token is good from %s on", errTokenEarly, time.Unix(c.NotBefore, 0).UTC().Format(time.RFC3339))
	}
	return expires, nil
}

// tokenSkew is how far the clock of who made a token may be ahead of ours.
const tokenSkew = time.Minute
