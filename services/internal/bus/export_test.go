package bus

import (
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
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
