package sealing

import (
	"context"
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// validator answers cosign requests as validator i (from 0) does; mode may be
// changed by the test.
type validator struct {
	mode atomic.Value // "": cosigns, "refuse", "forge", "other", "junk", "silent"
}

func serveCosign(t testing.TB, b *bus.Bus, c *ledgertest.Chain, i int, mode string) *validator {
	t.Helper()
	v := &validator{}
	v.mode.Store(mode)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- b.Serve(ctx, topic.Cosign(c.ID, uint64(i+1)), "", func(_ context.Context, m *bus.Msg) []byte {
			var req pb.CosignRequest
			if err := proto.Unmarshal(m.Data, &req); err != nil {
				return nil
			}
			resp := &pb.CosignResponse{}
			at := ledgertest.Start.Add(time.Duration(req.Height) * time.Second)
			body := string(req.Body)
			switch v.mode.Load() {
			case "":
				resp.SignatureLine = []byte(c.Cosignature(i, body, at))
			case "refuse":
				resp.Refused = "not decided here"
			case "forge": // another validator's name with its own key
				k := append(ed25519.PrivateKey(nil), c.Cosign[i]...)
				line, err := ledger.Cosign(ledger.CosignerName(c.Origin, uint64((i+1)%4+1)), k, body, at)
				if err != nil {
					return nil
				}
				resp.SignatureLine = []byte(line)
			case "other":
				cp, err := ledger.ParseCheckpoint(body)
				if err != nil {
					return nil
				}
				cp.Root[0] ^= 1
				resp.SignatureLine = []byte(c.Cosignature(i, cp.Body(), at))
			case "junk":
				return []byte("junk")
			case "silent":
				return nil
			}
			out, err := proto.Marshal(resp)
			if err != nil {
				return nil
			}
			return out
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return v
}

// start runs a service until the returned function is called.
func start(t testing.TB, c Config) (*Service, func()) {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	return s, stop
}

// wait polls until the condition holds: what it waits for is in other goroutines.
func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func publish(t *testing.T, b *bus.Bus, c *ledgertest.Chain, from, to int) {
	t.Helper()
	for _, blk := range c.Blocks[from:to] {
		raw := wire.EncodeBlock(wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts))
		if err := b.Publish(t.Context(), topic.Decision(c.ID, 1), "", raw); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServiceSeals(t *testing.T) {
	d := ledgertest.New("service", 4)
	c := d.NewChain().Fill(8)
	b := servicetest.District(t, d.ID)
	// Three cosign, but one of them is not there at first; the fourth lies.
	serveCosign(t, b, c, 0, "")
	serveCosign(t, b, c, 1, "")
	third := serveCosign(t, b, c, 2, "refuse")
	fourth := serveCosign(t, b, c, 3, "forge")
	dir := t.TempDir()
	cfg := Config{Bus: b, Dir: dir, GenesisJSON: d.GenesisJSON, Policy: d.Policy, LogKey: d.LogKey,
		Interval: time.Millisecond, Logger: servicetest.Logger(t)}
	seals := make(chan *pb.Seal, 64)
	subscribed, err := b.Listen(topic.Seal(d.ID), "", func(m *nats.Msg) {
		var s pb.Seal
		if proto.Unmarshal(m.Data, &s) == nil {
			seals <- &s
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer subscribed()
	s, stop := start(t, cfg)
	publish(t, b, c, 0, 3)
	wait(t, "blocks are journalled", func() bool { return s.Metrics().Height == 3 })
	for _, mode := range []string{"forge", "other", "junk", "refuse"} {
		fourth.mode.Store(mode)
		before := s.Metrics().Refused
		wait(t, "refusals are counted: "+mode, func() bool { return s.Metrics().Refused > before+2 })
	}
	if m := s.Metrics(); m.SealedSize != 0 {
		t.Fatalf("with two of four cosignatures: got %d sealed, want 0", m.SealedSize)
	}
	if _, err := os.Stat(filepath.Join(dir, "log", "checkpoint")); err == nil {
		t.Fatal("with two of four cosignatures there is a checkpoint")
	}
	third.mode.Store("")
	wait(t, "sealed with the third", func() bool { m := s.Metrics(); return m.SealedHeight == 3 && m.Checkpoints > 0 })
	m := s.Metrics()
	if m.Blocks != 3 || m.SealedSize != c.Blocks[2].Header.Size || m.Checkpoints == 0 || m.SealedP99 == 0 {
		t.Errorf("metrics: got %+v, want 3 blocks, all sealed", m)
	}
	publish(t, b, c, 3, 5)
	wait(t, "more sealed", func() bool { return s.Metrics().SealedHeight == 5 })
	stop()
	checkCovered(t, d, dir)
	// A seal was announced with a checkpoint that verifies.
	p, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	seal := <-seals
	if sealed, err := p.Open(seal.Checkpoint); err != nil || sealed.Size != seal.Size || seal.Height == 0 || seal.SealedUnixNano == 0 {
		t.Errorf("announced: got %v, %v, want a sealed checkpoint", seal, err)
	}
	// It goes on where it was.
	s, stop = start(t, cfg)
	if st := s.Metrics().State; st.SealedHeight != 5 || st.Height != 5 {
		t.Errorf("after a restart: got %+v, want height 5", st)
	}
	publish(t, b, c, 5, 8)
	wait(t, "sealed after a restart", func() bool { return s.Metrics().SealedHeight == 8 })
	stop()
	checkCovered(t, d, dir)
}

// TestGivesUpOnAnOldCheckpoint: a validator that never answers does not keep
// newer blocks from being sealed, and one checkpoint covers many blocks.
func TestGivesUpOnAnOldCheckpoint(t *testing.T) {
	d := ledgertest.New("service", 4)
	c := d.NewChain().Fill(6)
	b := servicetest.District(t, d.ID)
	for i := range 3 {
		serveCosign(t, b, c, i, map[bool]string{true: "silent", false: ""}[i == 2])
	}
	cfg := Config{Bus: b, Dir: t.TempDir(), GenesisJSON: d.GenesisJSON, Policy: d.Policy, LogKey: d.LogKey,
		Interval: time.Millisecond, CosignTimeout: 50 * time.Millisecond, Logger: servicetest.Logger(t)}
	s, stop := start(t, cfg)
	defer func() { stop() }()
	publish(t, b, c, 0, 6)
	wait(t, "journalled", func() bool { return s.Metrics().Height == 6 })
	wait(t, "no answer is counted", func() bool { return s.Metrics().Unanswered > 2 })
	serveCosign(t, b, c, 3, "")
	wait(t, "sealed", func() bool { return s.Metrics().SealedHeight == 6 })
	if n := s.Metrics().Checkpoints; n > 2 {
		t.Errorf("got %d checkpoints for 6 blocks that waited, want one or two", n)
	}
}

func TestConfigValidate(t *testing.T) {
	d := ledgertest.New("service", 4)
	err := (&Config{GenesisJSON: []byte("{}x"), Policy: []byte("quorum none"), LogKey: "x", Interval: -1}).Validate()
	for _, want := range []string{"Bus", "Dir", "GenesisJSON", "Policy", "LogKey", "Interval"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a complaint about %s", err, want)
		}
	}
	good := Config{Bus: &bus.Bus{}, Dir: "x", GenesisJSON: d.GenesisJSON, Policy: d.Policy, LogKey: d.LogKey}
	if err := good.Validate(); err != nil {
		t.Errorf("got %v, want none", err)
	}
}
