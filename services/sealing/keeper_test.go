package sealing

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/decided"
)

var receiptKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte("k"), 32))

// keptChain is a district in which frames are kept for three seconds, one of them
// for a case, and one was redacted. Blocks are a second apart.
type keptChain struct {
	*ledgertest.District
	*ledgertest.Chain
	t      *testing.T
	police ed25519.PrivateKey
	nonce  uint64
	frames uint64
}

func newKeptChain(t *testing.T) *keptChain {
	t.Helper()
	d := ledgertest.New("sealing", 4)
	k := &keptChain{District: d, Chain: d.NewChain(), t: t, police: ed25519.NewKeyFromSeed(bytes.Repeat([]byte("p"), 32))}
	k.Decide([]ledgertest.Record{
		k.change(identity.TypeFeature, identity.FeatureRetention, identity.Feature{From: 2}),
		k.change(identity.TypeOfficial, "police", identity.Official{Key: identity.PublicKey(k.police.Public().(ed25519.PublicKey)), Department: "police", Roles: []string{identity.Registrar}}),
	})
	for range 4 { // blocks 2 to 5: leaves 4 to 15 without headers' 3, 6, 9, 12
		k.more()
	}
	return k
}

// more decides a block of two frames.
func (k *keptChain) more(rs ...ledgertest.Record) {
	for range 2 {
		k.frames++
		rs = append(rs, k.Frame(k.frames, ledgertest.Start))
	}
	k.Decide(rs)
}

func (k *keptChain) change(ty identity.EntryType, id string, body any) ledgertest.Record {
	k.t.Helper()
	k.nonce++
	c := identity.Change{District: k.District.ID, Action: identity.Put, Type: ty, ID: id, Nonce: k.nonce}
	kd := identity.KindRegistry
	if body == nil {
		c.Action = identity.Revoke
	} else {
		b, err := json.Marshal(body)
		if err != nil {
			k.t.Fatal(err)
		}
		c.Body = b
	}
	if ty == identity.TypeRedaction {
		kd = identity.KindRedaction
		c.Base = k.Registry.Base(ty, id)
		a, err := identity.Approve(k.police, c)
		if err != nil {
			k.t.Fatal(err)
		}
		c.Approvals = []identity.Approval{a}
	}
	payload, err := c.Marshal()
	if err != nil {
		k.t.Fatal(err)
	}
	return ledgertest.NewRecord(k.Registrar, kd, identity.JSON, payload)
}

// rules files the retention entry, a hold on one leaf, and the redaction of
// another, and of one under hold; the governance that redactions need comes first.
func (k *keptChain) rules(held, redacted uint64) {
	need := identity.Need{Role: identity.Registrar, Officials: 2, Departments: 2}
	k.more(k.change(identity.TypeGovernance, identity.GovernanceID, identity.Governance{Version: 1,
		Default: identity.Need{Role: identity.Registrar, Officials: 1, Departments: 1},
		Rules:   []identity.Rule{{Type: identity.TypeRedaction, Need: need}}}))
	wrong := k.leaf(redacted)
	wrong[0] ^= 1
	k.more(
		k.change(identity.TypeRetention, identity.RetentionID, identity.Retention{Version: 1, Classes: []identity.ClassRetention{{Class: "readings", FloorS: 3, CeilingS: 3}}}),
		k.change(identity.TypeHold, "h", identity.Hold{Case: "12/26", By: "court", Leaves: []uint64{held}}),
		k.change(identity.TypeRedaction, fmt.Sprint(redacted), identity.Redaction{Commitment: k.leaf(redacted), Basis: "minor"}),
		k.change(identity.TypeRedaction, fmt.Sprint(held), identity.Redaction{Commitment: k.leaf(held), Basis: "minor"}),
		k.change(identity.TypeRedaction, fmt.Sprint(redacted+1), identity.Redaction{Commitment: wrong, Basis: "minor"}), // void
		k.change(identity.TypeRedaction, "1", identity.Redaction{Commitment: k.leaf(1), Basis: "minor"}),                // of the registry's
	)
}

func (k *keptChain) leaf(index uint64) identity.Digest {
	k.t.Helper()
	for _, b := range k.Blocks {
		if index >= b.Header.PrevSize && index < b.Header.Size {
			return slices.Clone(b.Leaves[index-b.Header.PrevSize].Commitment[:])
		}
	}
	k.t.Fatalf("no leaf %d", index)
	return nil
}

// keeperOf opens a data folder with a keeper whose streams let go when told to,
// and whose receipts are caught.
type keeperOf struct {
	*keeper
	t    *testing.T
	gone bool
	sent [][]byte
}

func newKeeper(t *testing.T, k *keptChain, dir string, hook func(op, path string) error) (*keeperOf, error) {
	t.Helper()
	o := options(k.District, dir)
	o.SegmentBytes, o.Hook = 2000, hook
	store, err := OpenStore(o)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = store.Close() })
	s := &Service{c: Config{Dir: dir, Key: receiptKey, Now: func() time.Time { return ledgertest.Start }}, log: slog.New(slog.DiscardHandler), store: store, genesis: store.genesis}
	out := &keeperOf{keeper: s.newKeeper(), t: t}
	out.streams = func(context.Context, *identity.Registry, *retention.Pending) (bool, error) { return out.gone, nil }
	out.send = func(_ context.Context, e []byte) error {
		out.sent = append(out.sent, e)
		return nil
	}
	return out, nil
}

func (k *keeperOf) has(leaves ...uint64) (there []uint64) {
	k.t.Helper()
	for _, i := range leaves {
		if _, err := k.store.payloads.Get(i); err == nil {
			there = append(there, i)
		}
	}
	return there
}

func (k *keeperOf) mustRound() {
	k.t.Helper()
	if err := k.round(k.t.Context()); err != nil {
		k.t.Fatal(err)
	}
}

func pendingNames(t *testing.T, dir string) (out []string) {
	t.Helper()
	es, err := os.ReadDir(filepath.Join(dir, retention.PendingDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out
}

// frames of blocks 2 to 5.
var keptFrames = []uint64{4, 5, 7, 8, 10, 11, 13, 14}

func TestKeeper(t *testing.T) {
	c := newKeptChain(t)
	c.rules(5, 13)
	dir := t.TempDir()
	bs := blocks(t, c.Chain)
	k, err := newKeeper(t, c, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.store.Append(bs[:5]...); err != nil {
		t.Fatal(err)
	}
	k.mustRound()
	if got := k.has(keptFrames...); len(got) != len(keptFrames) {
		t.Errorf("without a retention entry: got %v, want all of %v", got, keptFrames)
	}
	if err := k.store.Append(bs[5:]...); err != nil {
		t.Fatal(err)
	}
	k.mustRound()
	// The last block is 7: those of blocks 1 to 4 are three seconds old.
	if got := k.has(keptFrames...); !slices.Equal(got, []uint64{5, 14}) {
		t.Errorf("got %v, want the one of the case, and what is young and not redacted: 5, 14", got)
	}
	if got := k.has(1, 2); len(got) != 2 {
		t.Errorf("of the registry: got %v, want all, redacted or not", got)
	}
	if got := pendingNames(t, dir); fmt.Sprint(got) != "[redaction-13.json retention-readings.json]" || len(k.sent) > 0 {
		t.Errorf("while streams hold it: got %v pending and %d receipts, want both on their way and none sent", got, len(k.sent))
	}
	absences, err := retention.NewAbsences(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ledger.Fsck(t.Context(), os.DirFS(dir), ledger.FsckOptions{Absences: absences}); err != nil || !r.OK {
		t.Errorf("fsck: %v\n%s", err, r.Text())
	}
	k.gone = true
	k.mustRound()
	if len(k.sent) != 2 {
		t.Fatalf("got %d receipts sent, want 2", len(k.sent))
	}
	var receipts []ledgertest.Record
	for _, raw := range k.sent {
		e, err := identity.ParseEnvelope(raw)
		if err != nil {
			t.Fatal(err)
		}
		r, err := retention.ParseReceipt(e.Payload)
		if err != nil || e.Kind != identity.KindDeletion || !identity.VerifyBytes(receiptKey.Public().(ed25519.PublicKey), identity.SigningInput(e.Kind, e.ContentType, e.Payload), e.Signature) {
			t.Fatalf("receipt: %v, %+v", err, r)
		}
		want := "[{13 13}]"
		if r.Reason == retention.ByRetention {
			want = "[{4 4} {7 11}]"
		}
		if fmt.Sprint(r.Ranges) != want || r.Holder != "sealing" {
			t.Errorf("receipt because of %s: got %v by %s, want %s by sealing", r.Reason, r.Ranges, r.Holder, want)
		}
		receipts = append(receipts, ledgertest.NewRecord(receiptKey, identity.KindDeletion, identity.JSON, e.Payload))
	}
	k.mustRound()
	if len(k.sent) != 4 {
		t.Errorf("while the log does not have them: got %d receipts sent, want both again", len(k.sent))
	}
	// In the log, the files go; the hold is released, and its record with it.
	c.Decide(append(receipts, c.change(identity.TypeHold, "h", nil)))
	if err := k.store.Append(blocks(t, c.Chain)[7:]...); err != nil {
		t.Fatal(err)
	}
	k.gone = false
	k.mustRound()
	if got := pendingNames(t, dir); fmt.Sprint(got) != "[redaction-5.json retention-readings.json]" && fmt.Sprint(got) != "[redaction-5.json]" {
		t.Errorf("after the receipts are in the log: got %v pending, want those of what followed", got)
	}
	if got := k.has(5); len(got) > 0 {
		t.Error("after the release: the record of the case is still there")
	}
	if absences, err = retention.NewAbsences(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if r, err := ledger.Fsck(t.Context(), os.DirFS(dir), ledger.FsckOptions{Absences: absences}); err != nil || !r.OK {
		t.Errorf("fsck: %v\n%s", err, r.Text())
	}
	survey, err := SurveyFolder(dir)
	if err != nil || len(survey.Holds) != 0 || len(survey.Tombstones) != 4 || survey.Height != 8 {
		t.Errorf("survey: got %+v, %v", survey, err)
	}
}

// TestKeeperCrash stops the keeper at every operation on a file. Whatever the
// moment: the folder passes a check that takes no absence without a reason, and
// once the keeper runs on, what was due is gone and the rest is there.
func TestKeeperCrash(t *testing.T) {
	c := newKeptChain(t)
	c.rules(5, 13)
	bs := blocks(t, c.Chain)
	stopped := errors.New("stopped")
	step := 3
	if testing.Short() {
		step = 11
	}
	for at := 0; ; at += step {
		dir := t.TempDir()
		k, err := newKeeper(t, c, dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.store.Append(bs...); err != nil {
			t.Fatal(err)
		}
		if err := k.store.Close(); err != nil {
			t.Fatal(err)
		}
		n, op := 0, ""
		k, err = newKeeper(t, c, dir, func(o, path string) error {
			if n++; n > at {
				op = o + " " + filepath.Base(path)
				return stopped
			}
			return nil
		})
		if err == nil {
			k.gone = true
			err = k.round(t.Context())
			_ = k.store.Close()
		}
		if err != nil && !errors.Is(err, stopped) {
			t.Fatalf("operation %d, %s: got %v", at, op, err)
		}
		done := err == nil
		absences, err := retention.NewAbsences(os.DirFS(dir))
		if err != nil {
			t.Fatal(err)
		}
		if r, err := ledger.Fsck(t.Context(), os.DirFS(dir), ledger.FsckOptions{Absences: absences}); err != nil || !r.OK {
			t.Errorf("stopped at %s: fsck: %v\n%s", op, err, r.Text())
		}
		if k, err = newKeeper(t, c, dir, nil); err != nil {
			t.Fatalf("stopped at %s: %v", op, err)
		}
		k.gone = true
		k.mustRound()
		k.mustRound()
		if got := k.has(keptFrames...); !slices.Equal(got, []uint64{5, 14}) {
			t.Errorf("stopped at %s: got %v, want 5 and 14 left", op, got)
		}
		var reasons []string
		for _, e := range k.sent {
			for _, r := range []string{retention.ByRetention, retention.ByRedaction} {
				if strings.Contains(string(e), `"reason":"`+r) && !slices.Contains(reasons, r) {
					reasons = append(reasons, r)
				}
			}
		}
		if len(reasons) != 2 {
			t.Errorf("stopped at %s: got receipts because of %v, want both", op, reasons)
		}
		if err := k.store.Close(); err != nil {
			t.Fatal(err)
		}
		if done {
			if at < 30 {
				t.Errorf("done after %d operations, want more", at)
			}
			return
		}
	}
}

// A folder whose registry cannot be known lets go of nothing.
func TestKeeperNeedsTheRegistry(t *testing.T) {
	c := newKeptChain(t)
	c.rules(5, 13)
	bs := blocks(t, c.Chain)
	bs[0] = &decided.Block{Block: bs[0].Block, Purged: true}
	k, err := newKeeper(t, c, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.store.Append(bs...); err != nil {
		t.Fatal(err)
	}
	if _, err := k.store.agreed.registry(); err == nil {
		t.Error("got a registry, want to be told that it is not known")
	}
	k.mustRound()
	if got := k.has(keptFrames...); len(got) != len(keptFrames) {
		t.Errorf("got %v, want everything there", got)
	}
}

func TestKeyOfReceipts(t *testing.T) {
	body := func(signs ...identity.RecordKind) json.RawMessage {
		b, err := json.Marshal(identity.Service{Key: identity.PublicKey(receiptKey.Public().(ed25519.PublicKey)), Signs: signs})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte("o"), 32))
	for _, tc := range []struct {
		name string
		body json.RawMessage
		key  ed25519.PrivateKey
		want string
	}{
		{"good", body(identity.KindDeletion), receiptKey, ""},
		{"another key", body(identity.KindDeletion), other, "is not the one"},
		{"may not sign", body(identity.KindHealth), receiptKey, "may not sign"},
	} {
		g := &identity.Genesis{Entries: []identity.Entry{{Type: identity.TypeService, ID: "sealing", Body: tc.body}}}
		err := checkKey(g, tc.key)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
	}
}
