package bus

import (
	"crypto/ed25519"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// DeviceBooks returns how many messages each stream of the devices' account has.
func DeviceBooks(t *testing.T, s *Server) map[string]uint64 {
	t.Helper()
	z, err := s.s.Jsz(&server.JSzOptions{Account: devicesName, Streams: true})
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]uint64{}
	for _, a := range z.AccountDetails {
		for _, st := range a.Streams {
			m[st.Name] = st.State.Msgs
		}
	}
	return m
}

// Tests need not wait for it.
func init() { sweepEvery = 200 * time.Millisecond }

// CheckToken is checkToken by the key that signs.
func CheckToken(key ed25519.PublicKey, d traffic.DistrictID, device traffic.DeviceID, token string, now time.Time) (time.Time, error) {
	issuer, err := tokenIssuer(key)
	if err != nil {
		return time.Time{}, err
	}
	return checkToken(issuer, d, device, token, now)
}
