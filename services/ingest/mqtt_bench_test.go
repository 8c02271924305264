package ingest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

var districtTokenKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, ed25519.SeedSize))

// mqttDistrict is a district that lets devices in, and a connection to it.
func mqttDistrict(t testing.TB, connections int) (*bus.Server, *bus.Bus) {
	t.Helper()
	s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Logger: servicetest.Logger(t), Devices: &bus.DeviceOptions{
		MQTT: "127.0.0.1:0", Websocket: "127.0.0.1:0", District: district, TokenKey: districtTokenKey.Public().(ed25519.PublicKey), MaxConnections: connections,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	b := servicetest.Connect(t, s)
	if err := b.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	return s, b
}

func deviceToken(t testing.TB, d traffic.DeviceID) string {
	t.Helper()
	now := time.Now()
	s, err := bus.NewToken(districtTokenKey, district, d, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// connected returns a device that is subscribed to its receipts.
func connected(t testing.TB, s *bus.Server, d traffic.DeviceID) *servicetest.MQTT {
	t.Helper()
	c, err := servicetest.DialMQTT(s.MQTTAddr(), topic.Token(string(d)), string(d), deviceToken(t, d))
	if err == nil {
		err = c.Subscribe(topic.MQTT(topic.DeviceDown(district, d)), 0)
	}
	if err != nil {
		t.Fatalf("%s: %v", d, err)
	}
	t.Cleanup(func() { _ = c.Close() }) // what is left to read is of no interest
	return c
}

// exchange sends frames with QoS 1, at most window without receipt at a time,
// and returns when each has its PUBACK and a receipt that says stored.
func exchange(c *servicetest.MQTT, d traffic.DeviceID, frames [][]byte, window int) error {
	up := topic.MQTT(topic.DeviceUp(district, d))
	waiting := map[[32]byte]bool{}
	acks, sent := 0, 0
	for acks < len(frames) || len(waiting) > 0 || sent < len(frames) {
		if sent < len(frames) && len(waiting) <= window/2 {
			for ; sent < len(frames) && len(waiting) < window; sent++ {
				waiting[sha256.Sum256(frames[sent])] = true
				if _, err := c.Publish(up, 1, frames[sent]); err != nil {
					return err
				}
			}
			if err := c.Flush(); err != nil {
				return err
			}
		}
		kind, body, err := c.Read()
		switch {
		case err != nil:
			return fmt.Errorf("after %d of %d frames: %w", sent-len(waiting), len(frames), err)
		case kind == 0x40:
			acks++
		default:
			var r pb.Receipt
			if err := proto.Unmarshal(body, &r); err != nil {
				return err
			}
			if r.Status != pb.Receipt_STATUS_STORED || !waiting[[32]byte(r.Digest)] {
				return fmt.Errorf("receipt %v, want stored, of a frame that waits", &r)
			}
			delete(waiting, [32]byte(r.Digest))
		}
	}
	return nil
}

// BenchmarkMQTT: devices send signed frames with QoS 1 over TCP, each with up to
// four without a receipt, and every frame gets its PUBACK and its receipt, which
// means that it is on disk. Clients run in the same process.
func BenchmarkMQTT(b *testing.B) {
	for _, connections := range []int{500} {
		b.Run(fmt.Sprintf("connections=%d", connections), func(b *testing.B) {
			s, bb := mqttDistrict(b, connections)
			sv := running(b, bb, nil)
			var cs []*servicetest.MQTT
			var frames [][][]byte
			device := func(i int) traffic.DeviceID { return traffic.DeviceID(fmt.Sprintf("rsu-%d", i)) }
			// In a second or so per device: what is measured must be more than the start.
			each := max(b.N/connections, 1)
			for i := range connections {
				cs = append(cs, connected(b, s, device(i)))
				var fs [][]byte
				for n := range each {
					e := identity.Sign(deviceKey, identity.KindFrame, identity.Protobuf, frame(string(device(i)), uint64(n+1), 8))
					fs = append(fs, e.Marshal())
				}
				frames = append(frames, fs)
			}
			runtime.GC()
			b.ResetTimer()
			began := time.Now()
			var wg sync.WaitGroup
			errs := make(chan error, connections)
			for i, c := range cs {
				wg.Add(1)
				go func() {
					defer wg.Done()
					if err := exchange(c, device(i), frames[i], 4); err != nil {
						errs <- fmt.Errorf("%s: %w", device(i), err)
					}
				}()
			}
			wg.Wait()
			elapsed := time.Since(began)
			b.StopTimer()
			select {
			case err := <-errs:
				b.Fatal(err)
			default:
			}
			k := sv.Counts()
			if want := uint64(each * connections); k.Stored != want {
				b.Fatalf("got %d stored, want %d", k.Stored, want)
			}
			b.ReportMetric(float64(k.Stored)/elapsed.Seconds(), "frames/s")
			b.ReportMetric(float64(k.Stored)/float64(k.Batches), "frames/batch")
			b.ReportMetric(0, "ns/op")
		})
	}
}
