package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/consensus"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/roadside"
)

// file sends a change of the registry with the signatures of two departments, as
// any other record goes in.
func (o *outage) file(c identity.Change) {
	o.t.Helper()
	keys := map[string]ed25519.PrivateKey{}
	for _, name := range []string{district.RegistrarKey, district.PoliceOfficial} {
		k, err := o.district.Key(name)
		if err != nil {
			o.t.Fatal(err)
		}
		keys[name] = k
	}
	c.District, c.Base = o.district.Genesis.District, make(identity.Digest, sha256.Size)
	a, err := identity.Approve(keys[district.PoliceOfficial], c)
	if err != nil {
		o.t.Fatal(err)
	}
	c.Approvals = []identity.Approval{a}
	payload, err := c.Marshal()
	if err != nil {
		o.t.Fatal(err)
	}
	e := identity.Sign(keys[district.RegistrarKey], identity.KindRegistry, identity.JSON, payload)
	answer, err := o.bus.Request(o.t.Context(), topic.Inbox(c.District, string(identity.KindRegistry), "test"), e.Marshal())
	if err != nil {
		o.t.Fatal(err)
	}
	var r pb.Receipt
	if err := proto.Unmarshal(answer, &r); err != nil || r.Status != pb.Receipt_STATUS_STORED {
		o.t.Fatalf("filing a validator: got %v, %v", &r, err)
	}
}

// lives takes the street on until yes.
func (o *outage) lives(what string, yes func() bool) {
	o.t.Helper()
	for range 120 {
		if o.live(); yes() {
			return
		}
	}
	var stats []string
	for _, v := range o.validators {
		stats = append(stats, fmt.Sprintf("%+v", v.Stats()))
	}
	o.t.Fatalf("in 120 s on the street: not %s\nsealing %+v\n%v", what, o.sealing.Metrics(), stats)
}

// From four validators to five while junctions run: no frame is lost; sealing has
// each checkpoint cosigned by those in force at its block; evidence from before,
// in and after the change verifies under the policy that was pinned at genesis,
// and who pinned nothing but genesis is led to the five; and when the newcomer
// cosigns another history, the others write down what convicts it before anybody
// who has the genesis document.
func TestAFifthValidatorUnderLoad(t *testing.T) {
	processTest(t)
	o := newOutage(t, 2, func(int) roadside.StoreConfig { return roadside.StoreConfig{} })
	id, origin := o.district.Genesis.District, o.district.Genesis.Origin
	key := func(name string) ed25519.PrivateKey {
		seed := sha256.Sum256([]byte(name))
		return ed25519.NewKeyFromSeed(seed[:])
	}
	vote, cosign := key("fifth vote"), key("fifth cosign")
	public := func(k ed25519.PrivateKey) identity.PublicKey {
		return identity.PublicKey(k.Public().(ed25519.PublicKey))
	}
	o.lives("sealed by four", func() bool { return o.sealing.Metrics().SealedHeight > 5 })

	b, err := o.connect(topic.ValidatorUser(5))
	if err != nil {
		t.Fatal(err)
	}
	fifth, err := consensus.New(consensus.Config{District: id, Number: 5, VoteKey: vote, CosignKey: cosign, Genesis: o.district.GenesisJSON,
		Dir: filepath.Join(o.district.Dir, "validator-5"), Bus: b, Now: o.clock.now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- fifth.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	body, err := json.Marshal(identity.Validator{Number: 5, Department: "harbour board", VoteKey: public(vote), CosignKey: public(cosign)})
	if err != nil {
		t.Fatal(err)
	}
	o.file(identity.Change{Action: identity.Put, Type: identity.TypeValidator, ID: "5", Body: body, Nonce: 77})
	five := []uint64{1, 2, 3, 4, 5}
	o.lives("five validators", func() bool {
		return !slices.ContainsFunc(append([]*consensus.Validator{fifth}, o.validators...), func(v *consensus.Validator) bool {
			return !slices.Equal(v.Stats().Validators, five)
		})
	})
	since := fifth.Stats().Members
	name := ledger.CosignerName(origin, 5)
	// The log, opened as anybody would who has the genesis document and its policy.
	policy, err := ledger.ParsePolicy(o.district.Policy)
	if err != nil {
		t.Fatal(err)
	}
	line := func() *ledger.Line {
		raw, err := os.ReadFile(filepath.Join(o.district.Dir, "succession.json"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := ledger.ParseSuccessionProof(raw)
		if err != nil {
			t.Fatal(err)
		}
		l, err := p.Verify(o.district.GenesisJSON, policy)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	// sealed returns who cosigned the checkpoint after each block that has one.
	sealed := func() map[ledger.Height][]string {
		history, err := seglog.OpenReader(filepath.Join(o.district.Dir, "log", "checkpoints"))
		if err != nil {
			t.Fatal(err)
		}
		l, out := line(), map[ledger.Height][]string{}
		err = history.Scan(0, func(_ uint64, rec []byte) error {
			at, err := ledger.ParseSealedAt(rec)
			if err != nil {
				return err
			}
			s, set, err := l.OpenNewest(at.Note)
			if err != nil {
				return fmt.Errorf("block %d: %w", at.Height, err)
			}
			if want := map[bool]int{false: 4, true: 5}[at.Height > since]; len(set.Validators) != want {
				return fmt.Errorf("block %d: opened under %d validators, want %d", at.Height, len(set.Validators), want)
			}
			for _, c := range s.Cosignatures {
				out[at.Height] = append(out[at.Height], c.Witness.Cosigner.Name())
			}
			return nil
		})
		if err := errors.Join(err, history.Close()); err != nil {
			t.Fatal(err)
		}
		return out
	}
	o.lives("sealed with the fifth", func() bool {
		if o.sealing.Metrics().SealedHeight < since+5 {
			return false
		}
		for h, by := range sealed() {
			if h > since+1 && slices.Contains(by, name) {
				return true
			}
		}
		return false
	})
	all := sealed()
	if all[since] == nil {
		t.Errorf("block %d, which changed the validators, is not sealed by itself", since)
	}
	before, after := 0, 0
	for h, by := range all {
		quorum := 3
		if h > since {
			after++
			quorum = 4
		} else if before++; slices.Contains(by, name) {
			t.Errorf("checkpoint after block %d is cosigned by the fifth, who was no validator", h)
		}
		if len(by) < quorum {
			t.Errorf("checkpoint after block %d: cosigned by %v, want %d at least", h, by, quorum)
		}
	}
	if before == 0 || after == 0 {
		t.Errorf("got %d checkpoints before the change, %d after, want both", before, after)
	}

	// Evidence from before, in and after the change, in one bundle.
	if err := o.audit.Refresh(); err != nil {
		t.Fatal(err)
	}
	var indexes []uint64
	pick := func(what string, k identity.RecordKind, yes func(h ledger.Height) bool) {
		t.Helper()
		for _, r := range o.audit.Find(k, "", 5000) {
			if r.Provable && yes(r.Height) {
				indexes = append(indexes, r.Index)
				return
			}
		}
		t.Fatalf("no %s %s", k, what)
	}
	pick("before the change", identity.KindFrame, func(h ledger.Height) bool { return h < since })
	pick("that is the change", identity.KindRegistry, func(h ledger.Height) bool { return h == since })
	pick("after the change", identity.KindFrame, func(h ledger.Height) bool { return h > since+1 })
	bundle, err := o.audit.Bundle(t.Context(), indexes...)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put := func(name string, b []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	genesis, pinned := put("genesis.json", o.district.GenesisJSON), put("policy", o.district.Policy)
	wantExit(t, inside(t, "verify", "--policy", pinned, put("bundle.zip", bundle)), exitOK, "PASS",
		`registry change: "put" of "validator" "5"`, fmt.Sprintf("agreed in block %d", since))
	// And under that of the five, to which genesis leads.
	signed, err := os.ReadFile(filepath.Join(o.district.Dir, "log", "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	_, set, err := line().OpenNewest(signed)
	if err != nil || len(set.Validators) != 5 {
		t.Fatalf("the newest checkpoint, from genesis on: got %d validators, %v; want 5", len(set.Validators), err)
	}
	if _, err := ledger.VerifyBundle(bundle, set.Policy); err != nil {
		t.Errorf("under the policy of five: %v", err)
	}

	// The fifth cosigns another history, shorter than what all have sealed.
	forked := ledger.Checkpoint{Origin: origin, Size: 7, Root: ledger.Hash{7}}
	mark, err := ledger.Cosign(name, cosign, forked.Body(), o.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	msg, err := proto.Marshal(&pb.Seal{Height: 3, Size: forked.Size, Checkpoint: []byte(forked.Body() + "\n" + mark)})
	if err != nil {
		t.Fatal(err)
	}
	if err := o.bus.Send(topic.Seal(id), msg); err != nil {
		t.Fatal(err)
	}
	for n := range 4 {
		path := filepath.Join(o.district.Dir, fmt.Sprintf("validator-%d", n+1), "evidence", "checkpoints-5-7.json")
		o.lives("evidence against the fifth at "+path, func() bool { _, err := os.Stat(path); return err == nil })
		wantExit(t, inside(t, "verify", "--genesis", genesis, path), exitOK, "PASS", "validator 5 (harbour board)")
		if names, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*.json")); err != nil || len(names) != 1 {
			t.Errorf("validator %d accuses %v, %v; want the fifth, alone", n+1, names, err)
		}
		if n == 0 {
			wantExit(t, inside(t, "verify", path), exitUntrusted, "UNTRUSTED")
			// The policy of genesis knows nothing of the fifth.
			wantExit(t, inside(t, "verify", "--policy", pinned, path), exitFailed, "FAIL")
		}
	}

	// No frame was lost on the way.
	for range 3 {
		o.live()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	frames := 0
	for device, fs := range o.decided {
		for i, f := range fs {
			if i > 0 && f.Seq != fs[i-1].Seq+1 {
				t.Errorf("%s: frame %d after %d", device, f.Seq, fs[i-1].Seq)
			}
		}
		frames += len(fs)
	}
	if frames == 0 || len(o.decided) != 2 {
		t.Errorf("frames of %d devices, %d in all", len(o.decided), frames)
	}
	t.Logf("%d frames; changed by block %d; %d checkpoints before, %d after", frames, since, before, after)
}

// A feature of the validators is filed as everything else is, by officials of two
// departments, and is in force from its block on: here, changes that do not say
// what they were made to are refused.
func TestAFeatureIsProposed(t *testing.T) {
	processTest(t)
	o := newOutage(t, 1, func(int) roadside.StoreConfig { return roadside.StoreConfig{} })
	page := httptest.NewServer(o.handler())
	defer page.Close()
	dir := t.TempDir()
	proposal, body := filepath.Join(dir, "proposal.json"), filepath.Join(dir, "body.json")
	o.lives("blocks", func() bool { return o.validators[0].Stats().Height > 3 })
	from := uint64(o.validators[0].Stats().Height) + 40
	if err := os.WriteFile(body, fmt.Appendf(nil, `{"from": %d}`, from), 0o600); err != nil {
		t.Fatal(err)
	}
	key := func(name string) string { return filepath.Join(o.district.Dir, "keys", name+".key") }
	wantExit(t, inside(t, "registry", "propose", "--url", page.URL, "--type", "feature", "--id", identity.FeatureBaseRequired, "--file", body, "--out", proposal),
		exitOK, "put feature base-required", "needs 2 officials of 2 departments with role governor")
	wantExit(t, inside(t, "registry", "sign", "--key", key(district.PoliceOfficial), proposal), exitOK, "1 in all")
	done := make(chan result, 1)
	go func() {
		done <- inside(t, "registry", "submit", "--url", page.URL, "--wait", "60s", "--key", key(district.RegistrarKey), proposal)
	}()
	var r result
	o.lives("the feature filed", func() bool {
		select {
		case r = <-done:
			return true
		default:
			return false
		}
	})
	wantExit(t, r, exitOK, "in force: feature base-required is active since block")
	wantExit(t, inside(t, "registry", "show", "--url", page.URL, "feature"), exitOK, "base-required", fmt.Sprintf("from block %d on", from))
	o.lives("the feature in force", func() bool { return uint64(o.validators[0].Stats().Height) >= from })

	registrar, err := o.district.Key(district.RegistrarKey)
	if err != nil {
		t.Fatal(err)
	}
	refused := o.validators[0].Stats().RecordsRefused[validate.RuleRegistry]
	payload, err := identity.Change{District: o.district.Genesis.District, Action: identity.Revoke, Type: identity.TypeDevice, ID: string(district.DeviceID(o.city.Junctions()[0].ID)), Nonce: 1}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	e := identity.Sign(registrar, identity.KindRegistry, identity.JSON, payload)
	if _, err := o.bus.Request(t.Context(), topic.Inbox(o.district.Genesis.District, string(identity.KindRegistry), "test"), e.Marshal()); err != nil {
		t.Fatal(err)
	}
	o.lives("a change without a base refused", func() bool { return o.validators[0].Stats().RecordsRefused[validate.RuleRegistry] == refused+1 })
}
