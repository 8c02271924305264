package gateway

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"

	"github.com/ThreeDotsLabs/watermill/message"
)

// Who sent a registry record can ask why it is not in force, whoever refused it.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	h := w.Handler()
	ask := func(r ledgertest.Record) (int, Refusal) {
		t.Helper()
		c := ledger.Commit(r.Salt, r.Envelope)
		res := get(t, h, "GET", "/v1/refusals/"+hex.EncodeToString(c[:]))
		var f Refusal
		if err := json.Unmarshal([]byte(body(t, res)), &f); err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, f
	}
	put := func(nonce uint64, id, body string) ledgertest.Record {
		return w.Change(identity.Change{Action: identity.Put, Type: identity.TypePolicy, ID: id, Nonce: nonce, Body: []byte(body)})
	}
	good := put(1, "p", `{"version":"1","controller":"fixed","rules":"<&>"}`)
	again := put(1, "q", `{"version":"1","controller":"fixed","rules":""}`) // its nonce was used right before
	empty := put(2, "r", `{"version":"1"}`)
	frame := ledgertest.NewRecord(w.DeviceKey, identity.KindRegistry, identity.JSON, []byte(`{"district":"harbour","action":"put","type":"policy","id":"x","body":{},"nonce":1}`))
	frame.Refused = true
	unread := ledgertest.NewRecord(w.Registrar, identity.KindRegistry, identity.JSON, []byte(`{"colour":1}`))
	unread.Refused = true
	agree := put(3, "s", `{"version":"1","controller":"fixed","rules":""}`)
	agree.Refused = true // by a quorum, for a reason that this software does not see
	w.show(records(good, again, empty, frame, unread, agree))
	for _, tt := range []struct {
		name   string
		r      ledgertest.Record
		status int
		want   Refusal
	}{
		{"carried out", good, 404, Refusal{}},
		{"nonce of one before it", again, 200, Refusal{Height: 1, Rule: "registry", Reason: "nonce: 1 was used by this signer before"}},
		{"body", empty, 200, Refusal{Height: 1, Rule: "registry", Reason: "body: version and controller must not be empty"}},
		{"device", frame, 200, Refusal{Height: 1, Rule: "may-not-sign", Reason: "kind: device rsu-J1 may not sign a registry"}},
		{"unreadable", unread, 200, Refusal{Height: 1, Rule: "schema", Reason: `registry change: json: unknown field "colour"`}},
		{"no reason", agree, 200, Refusal{Height: 1, Rule: "registry", Reason: "refused by the validators"}},
	} {
		status, got := ask(tt.r)
		got.Commitment = ""
		if status != tt.status || got != tt.want {
			t.Errorf("%s: got %d %+v, want %d %+v", tt.name, status, got, tt.status, tt.want)
		}
	}

	// What validation refuses never comes to a block.
	stray := put(9, "t", "{}")
	m := message.NewMessage("1", encode(t, &pb.Quarantined{Envelope: stray.Envelope, Salt: stray.Salt[:], Rule: "district", Reason: "district: wrong"}))
	if err := w.quarantined(m); err != nil {
		t.Fatal(err)
	}
	if status, got := ask(stray); status != 200 || got.Rule != "district" || got.Reason != "district: wrong" || got.Height != 0 {
		t.Errorf("got %d %+v of a quarantined record", status, got)
	}

	// No more are looked at in one block than costs little, nor kept than are bounded.
	var many []ledgertest.Record
	for i := range uint64(explainMost + 3) {
		many = append(many, put(100+i, "u", `{}`))
	}
	w.show(many)
	if status, _ := ask(many[explainMost-1]); status != 200 {
		t.Errorf("got %d for the last that is explained", status)
	}
	if status, _ := ask(many[explainMost]); status != 404 {
		t.Errorf("got %d for one too many", status)
	}
	var r refusals
	for i := range 3 * keepRefusals {
		r.add(Refusal{Commitment: fmt.Sprint(i / 2)})
	}
	if len(r.by) != keepRefusals || len(r.order) != keepRefusals {
		t.Errorf("got %d and %d refusals kept, want %d", len(r.by), len(r.order), keepRefusals)
	}
}

// What the gateway shows of the registry hashes to what headers say.
func TestRegistryView(t *testing.T) {
	w := newWorld(t)
	h := w.Handler()
	read := func(path string, v any) {
		t.Helper()
		res := get(t, h, "GET", path)
		if err := json.Unmarshal([]byte(body(t, res)), v); err != nil || res.StatusCode != 200 || res.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Fatalf("%s: got %d, %v", path, res.StatusCode, err)
		}
	}
	var all, devices, none RegistryView
	read("/v1/registry", &all)
	read("/v1/registry?type=device", &devices)
	read("/v1/registry?type=nothing", &none)
	if n := len(w.Genesis.Entries); len(all.Entries) != n || all.District != "harbour" || all.Version != 0 {
		t.Errorf("got %d entries of %s at version %d, want %d of harbour at 0", len(all.Entries), all.District, all.Version, n)
	}
	if len(devices.Entries) != 1 || devices.Entries[0].ID != ledgertest.Device || devices.Hash != all.Hash {
		t.Errorf("got %+v, want the one device", devices)
	}
	if none.Entries == nil || len(none.Entries) != 0 {
		t.Errorf("got %v of no type, want an empty list", none.Entries)
	}
	g := identity.Genesis{District: all.District}
	g.Entries = append(g.Entries, all.Entries...)
	reg, err := identity.NewRegistry(&g)
	if err != nil {
		t.Fatal(err)
	}
	if sum := reg.Hash(); hex.EncodeToString(sum[:]) != all.Hash {
		t.Errorf("got entries that hash to %x, want %s", sum, all.Hash)
	}
	var e identity.Entry
	read("/v1/registry/junction/"+ledgertest.Junction, &e)
	if want, _ := reg.Entry(identity.TypeJunction, ledgertest.Junction); e.Hash() == nil || string(e.Hash()) != string(want.Hash()) || strings.Contains(string(e.Body), "\n") {
		t.Errorf("got an entry of another hash: %s", e.Body)
	}
}
