package consensus

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// holdsIn reports whether bytes are in any file below a folder.
func holdsIn(t *testing.T, dir string, what []byte) (in string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, what) {
			in = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// What is redacted goes with its block's payload, also where that changed the
// registry: then the change stays, and whoever follows by headers gets there.
func TestErase(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	u := newUnit(1)
	plain, mixed, late := u.frame(b.now), u.frame(b.now), (*pb.Record)(nil)
	filed := change(t, 1, identity.Put, identity.TypeSoftware, "build", map[string]string{"a": "b"})
	b.decide(b.propose(batch(plain)))
	b.decide(b.propose(batch(mixed, filed)))
	for range 3 {
		late = u.frame(b.now)
		b.now = b.now.Add(time.Second)
		b.decide(b.propose(batch(late)))
	}
	s := b.k.store
	for _, r := range []*pb.Record{plain, mixed, late} {
		if holdsIn(t, b.c.Dir, r.Envelope) == "" {
			t.Error("a record is not found although it is there")
		}
	}
	h, leaf, ok, err := s.leaf(3) // 0 header, 1 plain, 2 header, 3 mixed, 4 filed
	if err != nil || !ok || h != 2 || leaf.Commitment != ledger.Commit(ledger.Salt(mixed.Salt), mixed.Envelope) {
		t.Errorf("leaf 3: got block %d, %x, %v, %v, want the record of block 2", h, leaf.Commitment, ok, err)
	}
	if _, _, ok, err := s.leaf(100); ok || err != nil {
		t.Errorf("leaf 100: got %v, %v, want none", ok, err)
	}
	for index, want := range map[uint64]bool{1: false, 3: false, 4: true} {
		h, _, _, err := s.leaf(index)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.needed(h, index); err != nil || got != want {
			t.Errorf("leaf %d is needed by the registry: got %v, %v, want %v", index, got, err, want)
		}
	}
	if done, err := s.erase(5, 5); done || err != nil {
		t.Errorf("a block that a snapshot needs: got %v, %v, want that it waits", done, err)
	}
	for _, h := range []ledger.Height{1, 2, 2} { // again changes nothing
		if done, err := s.erase(h, 4); !done || err != nil {
			t.Fatalf("block %d: got %v, %v", h, done, err)
		}
	}
	for name, r := range map[string]*pb.Record{"plain": plain, "mixed": mixed} {
		for _, what := range [][]byte{r.Envelope, r.Salt} {
			if in := holdsIn(t, filepath.Join(b.c.Dir), what); in != "" {
				t.Errorf("%s: is still in %s", name, in)
			}
		}
	}
	if holdsIn(t, b.c.Dir, filed.Envelope) == "" || holdsIn(t, b.c.Dir, late.Envelope) == "" {
		t.Error("what was not redacted is gone")
	}
	want := b.k.state.registryHash
	b.reopen()
	if b.k.height() != 5 || b.k.state.registryHash != want {
		t.Fatalf("reopened: got height %d, registry %x, want 5, %x", b.k.height(), b.k.state.registryHash, want)
	}
	// Somebody who begins from nothing.
	ms, err := b.k.blocks(t.Context(), 1, 10, 1<<20, true)
	if err != nil {
		t.Fatal(err)
	}
	if !purged(ms[1], headerOf(t, ms[1])) || len(ms[1].Registry) != 1 {
		t.Fatalf("block 2: got %d batches and %d records, want its change alone", len(ms[1].Batches), len(ms[1].Registry))
	}
	n := newBench(t)
	n.c.Number = 2
	f, err := n.k.follow()
	if err != nil {
		t.Fatal(err)
	}
	f, took, err := n.k.takeHeaders(f, ms[:4], 5)
	if err != nil || took < 3 {
		t.Fatalf("following by headers: got %d, %v", took, err)
	}
	if f.registryHash != want {
		t.Errorf("following by headers: got registry %x, want %x", f.registryHash, want)
	}
	again, err := n.k.store.headers(2)
	if err != nil || len(again.Registry) != 1 {
		t.Errorf("the follower has kept %d records of block 2, %v, want 1", len(again.Registry), err)
	}
	// A record that the leaf does not commit to is refused, and so is none at all.
	for name, change := range map[string]func(m *pb.Block){
		"another record": func(m *pb.Block) { m.Registry[0].Record.Envelope = plain.Envelope },
		"another place":  func(m *pb.Block) { m.Registry[0].Leaf = 1 },
		"the header":     func(m *pb.Block) { m.Registry[0].Leaf = 0 },
		"beyond":         func(m *pb.Block) { m.Registry[0].Leaf = 9 },
		"no salt":        func(m *pb.Block) { m.Registry[0].Record.Salt = nil },
		"no record":      func(m *pb.Block) { m.Registry[0].Record = nil },
		"left out":       func(m *pb.Block) { m.Registry = nil },
	} {
		x := newBench(t)
		f, err := x.k.follow()
		if err != nil {
			t.Fatal(err)
		}
		bad := make([]*pb.Block, 4)
		for i := range bad {
			if bad[i], err = wire.DecodeBlock(wire.EncodeBlock(ms[i])); err != nil {
				t.Fatal(err)
			}
		}
		change(bad[1])
		if _, took, err := x.k.takeHeaders(f, bad, 5); err == nil || took > 1 {
			t.Errorf("%s: got %d blocks taken, %v, want an error at the second", name, took, err)
		}
	}
}

func headerOf(t *testing.T, m *pb.Block) ledger.Header {
	t.Helper()
	h, err := ledger.ParseHeader(m.Header)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// The journal lets go of what it held before, once the engine has gone on.
func TestJournalLetsGo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	j := b.k.journal
	if err := j.save([]byte("a proposal with a record in it"), true, nil); err != nil {
		t.Fatal(err)
	}
	at, err := j.roll()
	if err != nil {
		t.Fatal(err)
	}
	if j.without(at) || holdsIn(t, b.c.Dir, []byte("record in it")) == "" {
		t.Error("before the engine goes on: want that it is there")
	}
	if err := j.save([]byte("the next"), true, nil); err != nil {
		t.Fatal(err)
	}
	if !j.without(at) || holdsIn(t, b.c.Dir, []byte("record in it")) != "" {
		t.Error("after the engine went on: want that it is gone")
	}
}

func TestRetentionOf(t *testing.T) {
	t.Parallel()
	_, g, err := newState(genesis(t, 4, 1))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		body       string
		configured time.Duration
		want       time.Duration
	}{
		{"", time.Hour, time.Hour},
		{"", -1, -1},
		{`{"version":1,"classes":[{"class":"control","floor_s":0,"ceiling_s":600},{"class":"readings","floor_s":0,"ceiling_s":7200}]}`, time.Hour, 10 * time.Minute},
		{`{"version":1,"classes":[{"class":"control","floor_s":0,"ceiling_s":600}]}`, -1, 10 * time.Minute},
		{`{"version":1,"classes":[{"class":"control","floor_s":0,"ceiling_s":600}]}`, time.Minute, time.Minute},
		{`{"version":1,"classes":[{"class":"control","floor_s":0,"ceiling_s":0}]}`, time.Minute, 1},
	} {
		doc := *g
		if tc.body != "" {
			doc.Entries = append(doc.Entries[:len(doc.Entries):len(doc.Entries)], identity.Entry{Type: identity.TypeRetention, ID: identity.RetentionID, Body: []byte(tc.body)})
		}
		reg, err := identity.NewRegistry(&doc)
		if err != nil {
			t.Fatal(err)
		}
		if got := retentionOf(tc.configured, reg); got != tc.want {
			t.Errorf("%v with %s: got %v, want %v", tc.configured, tc.body, got, tc.want)
		}
	}
}

// Kinds of record that a district does not know yet are refused until the feature
// is in force.
func TestRetentionIsAFeature(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := record(identity.Sign(key("registrar"), identity.KindRedaction, identity.JSON, []byte(`{"district":"harbour","action":"put","type":"redaction","id":"1","body":{"commitment":"`+
		"0000000000000000000000000000000000000000000000000000000000000000"+`","basis":"minor"},"nonce":1}`)))
	p := b.propose(batch(r))
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		t.Fatal(err)
	}
	if h.Size != 1 {
		t.Errorf("got %d leaves, want the header's alone", h.Size)
	}
	if err := b.verify(p); err != nil && !errors.Is(err, errAhead) {
		t.Errorf("got %v", err)
	}
}
