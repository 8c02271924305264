package validate

import (
	"crypto/ed25519"
	"encoding/json"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
)

// Receipts are judged by who gives them; redactions are registry changes of their
// own kind.
func TestDeletionAndRedaction(t *testing.T) {
	keys := map[string]ed25519.PrivateKey{}
	pub := func(name string) identity.PublicKey {
		seed := make([]byte, 32)
		copy(seed, name)
		keys[name] = ed25519.NewKeyFromSeed(seed)
		return identity.PublicKey(keys[name].Public().(ed25519.PublicKey))
	}
	g := &identity.Genesis{District: "d"}
	add := func(ty identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: ty, ID: id, Body: b})
	}
	add(identity.TypeService, "sealing", identity.Service{Key: pub("sealing"), Signs: []identity.RecordKind{identity.KindDeletion}})
	add(identity.TypeService, "mute", identity.Service{Key: pub("mute")})
	add(identity.TypeOfficial, "ann", identity.Official{Key: pub("ann"), Department: "traffic", Roles: []string{identity.Governor}})
	add(identity.TypeValidator, "3", identity.Validator{Number: 3, VoteKey: pub("vote"), CosignKey: pub("cosign")})
	reg, err := identity.NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	receipt := func(holder string) retention.Receipt {
		return retention.Receipt{Format: retention.ReceiptFormat, District: "d", Holder: holder, Reason: retention.ByRetention, Class: retention.Readings,
			Ranges: []retention.Range{{First: 1, Last: 2}}, Policy: make(identity.Digest, 32), AtUnixMS: 1}
	}
	elsewhere := receipt("sealing")
	elsewhere.District = "e"
	change := func(ty identity.EntryType) identity.Change {
		return identity.Change{District: "d", Action: identity.Put, Type: ty, ID: "7", Nonce: 1}
	}
	for _, tc := range []struct {
		name string
		kind identity.RecordKind
		by   string
		body any
		want Rule
	}{
		{"sealing's", identity.KindDeletion, "sealing", receipt("sealing"), ""},
		{"a validator's", identity.KindDeletion, "vote", receipt("validator-3"), ""},
		{"a validator's, with the cosigning key", identity.KindDeletion, "cosign", receipt("validator-3"), RuleMaySign},
		{"a validator's for another", identity.KindDeletion, "vote", receipt("validator-4"), RuleDevice},
		{"a validator's for sealing", identity.KindDeletion, "vote", receipt("sealing"), RuleDevice},
		{"of another district", identity.KindDeletion, "sealing", elsewhere, RuleDistrict},
		{"of a service that may not", identity.KindDeletion, "mute", receipt("mute"), RuleMaySign},
		{"an official's", identity.KindDeletion, "ann", receipt("ann"), RuleMaySign},
		{"redaction", identity.KindRedaction, "ann", change(identity.TypeRedaction), ""},
		{"redaction as any change", identity.KindRegistry, "ann", change(identity.TypeRedaction), RuleKind},
		{"any change as a redaction", identity.KindRedaction, "ann", change(identity.TypeHold), RuleKind},
		{"redaction by sealing", identity.KindRedaction, "sealing", change(identity.TypeRedaction), RuleMaySign},
	} {
		payload, err := json.Marshal(tc.body)
		if err != nil {
			t.Fatal(err)
		}
		e := identity.Sign(keys[tc.by], tc.kind, identity.JSON, payload)
		c := Candidate{Raw: e.Marshal(), Salt: ledger.Salt{}, Envelope: e, SignatureValid: true}
		switch b := tc.body.(type) {
		case retention.Receipt:
			c.Deletion = &b
		case identity.Change:
			c.Change = &b
		}
		if v := NewState(Limits{}).Judge(reg, time.Now(), &c); v.Rule != tc.want || v.OK != (tc.want == "") {
			t.Errorf("%s: got %+v, want rule %q", tc.name, v, tc.want)
		}
	}
}
