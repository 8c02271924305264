//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

// keeping is a whole district in this process whose holders look often at what
// they have to let go of.
type keeping struct {
	*local
	t    *testing.T
	dir  string
	seq  uint64
	done chan struct{}
}

func newKeeping(t *testing.T) *keeping {
	t.Helper()
	city, err := sim.New(sim.Config{Junctions: 2, Seed: 5, FlatDemand: true})
	if err != nil {
		t.Fatal(err)
	}
	rules, err := timing.RulesNamed("field")
	if err != nil {
		t.Fatal(err)
	}
	ctrl, err := timing.Named("fixed")
	if err != nil {
		t.Fatal(err)
	}
	k := &keeping{t: t, dir: t.TempDir(), done: make(chan struct{})}
	k.local, err = newLocal(t.Context(), localOptions{
		dir: k.dir, log: slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelInfo})),
		open: district.Options{ID: "keeping", Junctions: city.Junctions(), Created: time.Now(), PolicyName: "p",
			Policy: identity.Policy{Version: "1", Controller: ctrl.Name, Rules: rules.Name}},
		core:      signalcontrol.CoreConfig{District: "keeping", Policy: "p", PolicyVersion: "1", Controller: ctrl, Rules: rules},
		keepEvery: 200 * time.Millisecond, snapshotEvery: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.close)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		defer close(k.done)
		ended <- k.run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	ready, cancel := context.WithTimeout(t.Context(), readyWait)
	defer cancel()
	if err := k.ready(ready, k.done); err != nil {
		t.Fatal(err)
	}
	return k
}

// testLog writes a log into the test's, as long as the test runs.
type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	if l.t.Context().Err() == nil && bytes.Contains(b, []byte("sealing")) {
		l.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

func (k *keeping) key(name string) ed25519.PrivateKey {
	k.t.Helper()
	key, err := k.district.Key(name)
	if err != nil {
		k.t.Fatal(err)
	}
	return key
}

func (k *keeping) send(kd identity.RecordKind, source string, e []byte) {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), time.Minute)
	defer cancel()
	if _, err := k.street.sender.Send(ctx, "keeping", kd, source, e); err != nil {
		k.t.Fatal(err)
	}
}

// bring sends an import with some text in it, and returns its envelope.
func (k *keeping) bring(text string) []byte {
	k.t.Helper()
	k.seq++
	m := &traffic.Import{District: "keeping", Importer: district.ImporterKey, Run: 1, Seq: k.seq, Log: text, Device: traffic.DeviceID(text),
		Time: time.Now(), Interval: time.Second, Events: []traffic.Event{{OffsetMS: 1, Code: 1}}}
	e := identity.Sign(k.key(district.ImporterKey), identity.KindImport, identity.Protobuf, wire.EncodeImport(m)).Marshal()
	k.send(identity.KindImport, district.ImporterKey, e)
	return e
}

// change files a change of the registry, signed by two departments.
func (k *keeping) change(kd identity.RecordKind, action string, ty identity.EntryType, id string, body any) {
	k.t.Helper()
	c := identity.Change{District: "keeping", Action: action, Type: ty, ID: id, Nonce: uint64(time.Now().UnixNano())}
	reg := k.street.state.Registry()
	c.Base = reg.Base(ty, id)
	if body != nil {
		var err error
		if c.Body, err = json.Marshal(body); err != nil {
			k.t.Fatal(err)
		}
	}
	a, err := identity.Approve(k.key(district.PoliceOfficial), c)
	if err != nil {
		k.t.Fatal(err)
	}
	c.Approvals = []identity.Approval{a}
	b, err := c.Marshal()
	if err != nil {
		k.t.Fatal(err)
	}
	k.send(kd, "registrar", identity.Sign(k.key(district.RegistrarKey), kd, identity.JSON, b).Marshal())
	k.until("the change of "+id+" is in force", func() bool {
		e, ok := k.street.state.Registry().Entry(ty, id)
		return ok && !bytes.Equal(e.Hash(), c.Base)
	})
}

// until waits, for as long as the district runs.
func (k *keeping) until(what string, f func() bool) {
	k.t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(50 * time.Millisecond) {
		select {
		case <-k.done:
			k.t.Fatalf("the district ended before %s", what)
		default:
		}
		if time.Now().After(end) {
			k.t.Fatalf("not within a minute: %s", what)
		}
	}
}

// find returns the entry of an envelope in the payload store.
func (k *keeping) find(envelope []byte) (found *ledger.Payload) {
	k.t.Helper()
	d, err := payload.OpenReader(k.dir)
	if err != nil {
		k.t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	err = d.Scan(0, func(_ retention.Class, p *ledger.Payload) error {
		if bytes.Equal(p.Envelope, envelope) {
			found = p
		}
		return nil
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return found
}

// receipts returns who has given receipts for a leaf that the log holds.
func (k *keeping) receipts(leaf uint64) (holders []string) {
	k.t.Helper()
	d, err := payload.OpenReader(k.dir)
	if err != nil {
		k.t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	err = d.ScanClass(retention.Registry, func(p *ledger.Payload) error {
		e, err := identity.ParseEnvelope(p.Envelope)
		if err != nil || e.Kind != identity.KindDeletion {
			return err
		}
		r, err := retention.ParseReceipt(e.Payload)
		if err == nil && r.Covers(leaf) && !slices.Contains(holders, r.Holder) {
			holders = append(holders, r.Holder)
		}
		return err
	})
	if err != nil {
		k.t.Fatal(err)
	}
	slices.Sort(holders)
	return holders
}

// where returns the places below the data folder at which bytes can be read: in
// files as they are, and in every S2 block that a file may hold, as JetStream
// compresses with. Names of segments are left off.
func (k *keeping) where(what []byte) []string {
	k.t.Helper()
	var out []string
	err := filepath.WalkDir(k.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil //nolint:nilerr // files go while we look; those are not what is looked for
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		if !bytes.Contains(b, what) && !inS2(b, what) {
			return nil
		}
		name, err := filepath.Rel(k.dir, path)
		if err != nil {
			return err
		}
		dir := filepath.Dir(name)
		for _, s := range []string{"INGRESS", "ACCEPTED", "QUARANTINE", "DECISIONS", "DEADLETTER"} {
			if strings.Contains(name, s) {
				dir = s
			}
		}
		if !slices.Contains(out, dir) {
			out = append(out, dir)
		}
		return nil
	})
	if err != nil {
		k.t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// inS2 looks into S2 streams within bytes.
func inS2(b, what []byte) bool {
	magic := []byte("\xff\x06\x00\x00S2sTwO")
	for at := bytes.Index(b, magic); at >= 0; {
		var plain bytes.Buffer
		_, _ = plain.ReadFrom(s2.NewReader(bytes.NewReader(b[at:]))) // up to where it is a stream no more
		if bytes.Contains(plain.Bytes(), what) {
			return true
		}
		next := bytes.Index(b[at+1:], magic)
		if next < 0 {
			break
		}
		at += 1 + next
	}
	return false
}

// A record is redacted: before, its words are found at every holder; afterwards
// nowhere, and everything else is as it was.
func TestRedaction(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	k := newKeeping(t)
	const words = "the plate B-XY 4711 was seen here"
	before := k.bring("before")
	secret := k.bring(words)
	k.send(identity.KindImport, district.ImporterKey, secret) // a second time, with another salt
	after := k.bring("after")
	var p *ledger.Payload
	k.until("the record is in the log", func() bool { p = k.find(secret); return p != nil })
	holders := []string{"ACCEPTED", "DECISIONS", "INGRESS", "audit", "payload/readings",
		"validator-1/journal", "validator-1/payloads", "validator-2/payloads", "validator-3/payloads", "validator-4/payloads"}
	var found []string
	defer func() { t.Logf("the words were in %v", found) }()
	k.until("the words are at every holder", func() bool {
		found = k.where([]byte(words))
		return !slices.ContainsFunc(holders, func(h string) bool { return !slices.Contains(found, h) })
	})
	if got := k.where([]byte("words that nobody wrote")); len(got) > 0 {
		t.Errorf("what is nowhere: got %v", got)
	}
	leaf, err := leafAtLater(k, p.Index)
	if err != nil {
		t.Fatal(err)
	}
	k.change(identity.KindRedaction, identity.Put, identity.TypeRedaction, strconv.FormatUint(p.Index, 10),
		identity.Redaction{Commitment: leaf.Commitment[:], Basis: "erasure-request", Reference: "file 12/26"})
	// Time goes on: validators go on from newer snapshots, and their journals from
	// newer entries.
	want := []string{"sealing", "validator-1", "validator-2", "validator-3", "validator-4"}
	n := 0
	k.until("every holder has given its receipt", func() bool {
		n++
		k.bring(fmt.Sprint("later ", n))
		return slices.Equal(k.receipts(p.Index), want)
	})
	if got := slices.DeleteFunc(k.where([]byte(words)), func(d string) bool { return d == "audit" }); len(got) > 0 {
		t.Errorf("after every receipt the words are still in %v", got)
	}
	// The index of audit follows the log at its own pace.
	k.until("the words are out of the index of audit", func() bool { return len(k.where([]byte(words))) == 0 })
	if got := k.where(p.Salt[:]); len(got) > 0 {
		t.Errorf("after every receipt the salt is still in %v", got)
	}
	// Everybody else's records are where they were, and are proven as before.
	for name, e := range map[string][]byte{"before": before, "after": after} {
		if q := k.find(e); q == nil {
			t.Errorf("the record %s it is gone", name)
		} else if b, err := k.audit.Evidence(t.Context(), q.Index); err != nil {
			t.Errorf("evidence of the record %s it: %v", name, err)
		} else if r, err := verifyUnder(k, b); err != nil {
			t.Errorf("evidence of the record %s it: %v: %s", name, err, r)
		}
	}
	// What is left can be proven too, and says what it is.
	b, err := k.audit.Evidence(t.Context(), p.Index)
	if err != nil {
		t.Fatal(err)
	}
	if said, err := verifyUnder(k, b); err != nil || !strings.Contains(string(b), "let go") {
		t.Errorf("evidence of the tombstone: %v: %s", err, said)
	}
	absences, err := retention.NewAbsences(os.DirFS(k.dir))
	if err != nil {
		t.Fatal(err)
	}
	k.until("the folder can be checked as a whole", func() bool {
		r, err := ledger.Fsck(t.Context(), os.DirFS(k.dir), ledger.FsckOptions{Absences: absences})
		if err != nil {
			t.Fatal(err)
		}
		// The district goes on writing: what was not there yet when it was looked for
		// is none of ours.
		return !slices.ContainsFunc(r.Problems, func(p ledger.Problem) bool {
			return strings.Contains(p.Rule, "receipt") || strings.Contains(p.File, "payload/readings")
		})
	})
}

func leafAtLater(k *keeping, index uint64) (l ledger.Leaf, err error) {
	k.until("the leaf is sealed", func() bool {
		l, err = leafAt(k.dir, index)
		return err == nil
	})
	return l, err
}

func verifyUnder(k *keeping, bundle []byte) (string, error) {
	policy, err := ledger.ParsePolicy(k.district.Policy)
	if err != nil {
		return "", err
	}
	r, err := ledger.VerifyBundle(bundle, policy)
	return fmt.Sprint(r), err
}

// Payloads older than the registry's retention entry allows are let go of, but
// for what a hold keeps; receipts say so, and explain it to who checks the folder.
func TestRetention(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	k := newKeeping(t)
	wanted, held := k.bring("of no use any more"), k.bring("of the accident")
	var p, h *ledger.Payload
	k.until("the records are in the log", func() bool { p, h = k.find(wanted), k.find(held); return p != nil && h != nil })
	k.change(identity.KindRegistry, identity.Put, identity.TypeHold, "h1", identity.Hold{Case: "12/26", By: "the court", Leaves: []uint64{h.Index}})
	k.until("the hold is seen in the folder", func() bool {
		out := k.stopline("retention", "due", "--json", k.dir)
		if strings.Contains(out, "ceiling_s") {
			t.Errorf("before there is a retention entry: got %s", out)
		}
		return strings.Contains(out, `"case": "12/26"`)
	})
	k.change(identity.KindRegistry, identity.Put, identity.TypeRetention, identity.RetentionID,
		identity.Retention{Version: 1, Classes: []identity.ClassRetention{{Class: "readings", FloorS: 1, CeilingS: 1}}})
	n := 0
	k.until("the old record is gone and the held one is not", func() bool {
		n++
		k.bring(fmt.Sprint("later ", n))
		return k.find(wanted) == nil
	})
	if k.find(held) == nil {
		t.Fatal("the record of the case is gone")
	}
	if got := k.where(wanted[:len(wanted)-64]); slices.ContainsFunc(got, func(d string) bool { return strings.HasPrefix(d, "payload") }) {
		t.Errorf("what was let go of is in %v", got)
	}
	checked := func(absences ledger.Absences) (problems []string) {
		r, err := ledger.Fsck(t.Context(), os.DirFS(k.dir), ledger.FsckOptions{Absences: absences})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.Problems {
			if strings.HasPrefix(p.File, "payload/readings") {
				problems = append(problems, p.String())
			}
		}
		return problems
	}
	// Its receipt waits until the streams have let go, an hour later; until then the
	// folder itself says that it is on its way.
	a, err := retention.NewAbsences(os.DirFS(k.dir))
	if err != nil {
		t.Fatal(err)
	}
	if got := checked(a); len(got) > 0 {
		t.Errorf("fsck: got %v", got)
	}
	if got := checked(&retention.Absences{}); len(got) == 0 {
		t.Error("fsck without the deletions on their way: got no problem, want the missing payloads")
	}
	k.change(identity.KindRegistry, identity.Revoke, identity.TypeHold, "h1", nil)
	k.until("the release is seen in the folder", func() bool {
		out := k.stopline("retention", "show", k.dir)
		return strings.Contains(out, "deletion on its way") && !strings.Contains(out, "hold h1")
	})
}

// stopline runs a command in this process.
func (k *keeping) stopline(args ...string) string {
	k.t.Helper()
	r := inside(k.t, args...)
	if r.code != exitOK {
		k.t.Errorf("%v: got %v", args, r)
	}
	return r.out
}
