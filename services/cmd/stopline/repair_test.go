package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// folderOn writes a data folder to disk, with some files changed.
func folderOn(t *testing.T, files map[string][]byte, change map[string]func([]byte) []byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		if f := change[name]; f != nil {
			if b = f(bytes.Clone(b)); b == nil {
				continue
			}
		}
		at := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFsckAndRepairCommands(t *testing.T) {
	d := ledgertest.New("repair", 4)
	c := d.NewChain().Fill(9)
	files := ledgertest.ByClass(c.Folder(9))
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	blocks, frames := "log/blocks/"+segment.Name(4), "payload/readings/"+segment.Name(4)
	change := map[string]func([]byte) []byte{blocks: flip, frames: flip, "log/tile/0/000.p/36": func([]byte) []byte { return nil }}
	whole := folderOn(t, files, nil)
	policy := filepath.Join(whole, "policy")
	newest := filepath.Join(whole, "log", "checkpoint")

	wantExit(t, inside(t, "fsck", "--signatures", "--policy", policy, "--checkpoint", newest, whole), exitOK, "signatures of 27 records", "OK under the given policy")
	dir := folderOn(t, files, change)
	bad := inside(t, "fsck", "--json", dir)
	wantExit(t, bad, exitFailed)
	var r ledger.FsckReport
	if err := json.Unmarshal([]byte(bad.out), &r); err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Problems {
		if strings.HasPrefix(p.File, "payload") && (p.Offset == nil || p.Record == nil || p.Leaf == nil || p.Height == nil || p.Kind != "frame") {
			t.Errorf("got %+v, want file, offset, record, leaf, block and kind", p)
		}
	}
	if len(r.Problems) != 3 {
		t.Errorf("got %d problems, want 3: %s", len(r.Problems), bad.out)
	}
	behind := folderOn(t, ledgertest.ByClass(d.NewChain().Fill(7).Folder(7)), nil)
	wantExit(t, inside(t, "fsck", behind), exitOK)
	wantExit(t, inside(t, "fsck", "--checkpoint", newest, behind), exitFailed, "rolled back")
	wantExit(t, inside(t, "fsck", "--checkpoint", policy, whole), exitFailed, "a checkpoint that is known")
	wantExit(t, inside(t, "fsck", "--checkpoint", filepath.Join(dir, "none"), whole), exitUsage, "--checkpoint")

	t.Run("from a folder", func(t *testing.T) {
		wantExit(t, inside(t, "repair", "--dry-run", "--from", whole, dir), exitOK, blocks+": would be replaced, from "+whole, frames)
		wantExit(t, inside(t, "fsck", dir), exitFailed)
		wantExit(t, inside(t, "repair", "--from", whole, "--policy", policy, dir), exitOK, blocks+": replaced, from "+whole, "originals: damaged-", "OK under the given policy")
		wantExit(t, inside(t, "fsck", "--signatures", dir), exitOK)
		wantExit(t, inside(t, "repair", "--json", dir), exitOK, `"ok": true`)
	})
	t.Run("from the web", func(t *testing.T) {
		srv := httptest.NewServer(http.FileServer(http.Dir(filepath.Join(whole, "log"))))
		defer srv.Close()
		dir := folderOn(t, files, change)
		wantExit(t, inside(t, "repair", "--from", srv.URL, dir), exitFailed, blocks, "DAMAGED")
	})
	t.Run("from validators", func(t *testing.T) {
		s, err := bus.StartServer(bus.ServerOptions{Dir: t.TempDir(), Listen: "127.0.0.1:0", Logger: servicetest.Logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Shutdown()
		b, err := s.Connect("validators")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan struct{})
		for n := range uint64(4) {
			go func() {
				defer func() { served <- struct{}{} }()
				if err := b.Serve(ctx, topic.Sync(d.ID, n+1), "", func(_ context.Context, m *bus.Msg) []byte { return answerSync(t, c, n, m.Data) }); err != nil && ctx.Err() == nil {
					t.Errorf("validator %d: %v", n+1, err)
				}
			}()
		}
		defer func() {
			cancel()
			for range 4 {
				<-served
			}
		}()
		for n := range uint64(4) { // they have subscribed
			waitFor(t, "a validator answers", 10*time.Second, func() bool {
				_, err := askBlocks(ctx, b, topic.Sync(d.ID, n+1), 1, 1)
				return err == nil
			})
		}
		dir := folderOn(t, files, change)
		r := inside(t, "repair", "--nats", s.URL(), dir)
		wantExit(t, r, exitOK, blocks+": replaced, from validator 2", "refused: validator 1: ", "OK: ")
		wantExit(t, inside(t, "fsck", "--signatures", dir), exitOK)
	})
	for _, args := range [][]string{{}, {dir, dir}, {filepath.Join(dir, "none")}, {"--from", filepath.Join(dir, "none"), dir}, {"--policy", newest, dir}} {
		wantExit(t, inside(t, append([]string{"repair"}, args...)...), exitUsage, "stopline: repair: ")
	}
}

// answerSync answers as validator n does; the first one lies.
func answerSync(t *testing.T, c *ledgertest.Chain, n uint64, data []byte) []byte {
	var req pb.SyncRequest
	if err := proto.Unmarshal(data, &req); err != nil {
		t.Error(err)
		return nil
	}
	resp := &pb.SyncResponse{LastHeight: uint64(len(c.Blocks))}
	for h := int(req.FromHeight); h >= 1 && h <= len(c.Blocks) && len(resp.Blocks) < int(req.MaxBlocks); h++ {
		blk := c.Blocks[h-1]
		m := wire.BlockToProto(&blk.Block, blk.Batches, blk.Verdicts)
		if n == 0 {
			m.Header = bytes.Clone(m.Header)
			m.Header[len(m.Header)-1] ^= 1
		}
		resp.Blocks = append(resp.Blocks, m)
	}
	out, err := proto.Marshal(resp)
	if err != nil {
		t.Error(err)
	}
	return out
}

// TestFsckProgress: one line, at most five times a second, and at the end.
func TestFsckProgress(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	show, done := fsckProgress(&out, func() time.Time { return now })
	for i := range uint64(101) {
		show(ledger.FsckProgress{Blocks: i, Leaves: 1000 * i, Bytes: i, Total: 100})
		now = now.Add(20 * time.Millisecond)
	}
	done()
	lines := strings.Split(out.String(), "\r")
	if len(lines) < 8 || len(lines) > 14 {
		t.Errorf("%d lines: %q", len(lines), out.String())
	}
	if got := strings.TrimSpace(lines[len(lines)-1]); got != "100 blocks, 100000 leaves, 50000 leaves/s, 100 %, 0s left" {
		t.Errorf("the last one: %q", got)
	}
	if !strings.Contains(out.String(), "50 %, 1s left") {
		t.Errorf("got %q, want how long it will still take", out.String())
	}
}
