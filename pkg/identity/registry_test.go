package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/merkle"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func TestRegistryLookups(t *testing.T) {
	r := testRegistry(t)
	if r.District() != "harbour" || r.Version() != 0 {
		t.Errorf("got district %q, version %d", r.District(), r.Version())
	}
	for _, tt := range []struct {
		name string
		typ  EntryType
		may  []RecordKind
	}{
		{"d1", TypeDevice, []RecordKind{KindFrame}},
		{"control", TypeService, []RecordKind{KindCommand}},
		{"registrar", TypeOfficial, []RecordKind{KindRequest, KindRegistry}},
		{"reader", TypeOfficial, []RecordKind{KindRequest}},
		{"vote 1", TypeValidator, nil},
		{"cosign 1", TypeValidator, nil},
	} {
		h, ok := r.Holder(testID(tt.name))
		if !ok || h.Type != tt.typ || h.Status != Active {
			t.Errorf("%s: got holder %+v, %v", tt.name, h, ok)
		}
		for _, k := range []RecordKind{KindFrame, KindRequest, KindCommand, KindRegistry, KindOverride} {
			if got, want := h.May(k), slices.Contains(tt.may, k); got != want {
				t.Errorf("%s may sign a %s: got %v, want %v", tt.name, k, got, want)
			}
		}
	}
	if _, ok := r.Holder(testID("stranger")); ok {
		t.Error("a stranger's key has a holder")
	}
	if d, ok := r.Device("d2"); !ok || d.Junction != "j1" || len(d.Detectors) != 1 {
		t.Errorf("got device %+v, %v", d, ok)
	}
	if j, ok := r.Junction("j1"); !ok || len(j.Detectors) != 2 || len(r.Junctions()) != 1 {
		t.Errorf("got junction %+v, %v", j, ok)
	}
	vs := r.Validators()
	for i, v := range vs {
		if v.Number != uint64(i+1) {
			t.Errorf("got validator %d at place %d", v.Number, i)
		}
	}
	if len(vs) != 4 {
		t.Errorf("got %d validators, want 4", len(vs))
	}
}

// change is a good change to the test registry; mod spoils it.
func change(t testing.TB, mod func(c *Change)) Change {
	t.Helper()
	c := Change{District: "harbour", Action: "put", Type: TypeDevice, ID: "d3", Nonce: 1,
		Body: raw(t, Device{Junction: "j1", Key: testPub("d3"), Detectors: []traffic.DetectorID{"x"}})}
	if mod != nil {
		mod(&c)
	}
	return c
}

// TestApplyRefuses has every refusal, with a good change right after it that is
// carried out, and shows that the refused one changed nothing.
func TestApplyRefuses(t *testing.T) {
	r := testRegistry(t)
	registrar := testID("registrar")
	if err := r.Apply(1, registrar, change(t, func(c *Change) { c.Action, c.ID, c.Body, c.Nonce = "revoke", "d1", nil, 9 })); err != nil {
		t.Fatal(err)
	}
	device := func(d Device) func(c *Change) { return func(c *Change) { c.Body = raw(t, d) } }
	put := func(typ EntryType, id, body string) func(c *Change) {
		return func(c *Change) { c.Type, c.ID, c.Body = typ, id, json.RawMessage(body) }
	}
	putBody := func(typ EntryType, id string, body any) func(c *Change) {
		return func(c *Change) { c.Type, c.ID, c.Body = typ, id, raw(t, body) }
	}
	lowKey, err := hex.DecodeString(lowOrder[4])
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		signer KeyID
		mod    func(c *Change)
		kind   kind.Kind
		want   string
	}{
		{"stranger", testID("stranger"), nil, kind.Denied, "key_id: " + string(testID("stranger")) + " is not in the registry"},
		{"revoked signer", testID("d1"), nil, kind.Denied, "key_id: device d1 is revoked"},
		{"reader", testID("reader"), nil, kind.Denied, `key_id: official reader may not change the registry: the role "registrar" is needed`},
		{"validator", testID("cosign 1"), nil, kind.Denied, `key_id: validator 1 may not change the registry: the role "registrar" is needed`},
		{"district", registrar, func(c *Change) { c.District = "airport" }, kind.Invalid, `district: "airport", this is "harbour"`},
		{"nonce", registrar, func(c *Change) { c.Nonce = 9 }, kind.Conflict, "nonce: 9 was used by this signer before"},
		{"action", registrar, func(c *Change) { c.Action = "drop" }, kind.Invalid, `action: "drop": must be put or revoke`},
		{"type", registrar, func(c *Change) { c.Type = "lamp" }, kind.Invalid, `type: "lamp" is unknown`},
		{"no id", registrar, func(c *Change) { c.ID = "" }, kind.Invalid, `id: "": 1 to 512 bytes without control characters`},
		{"long id", registrar, func(c *Change) { c.ID = strings.Repeat("x", MaxID+1) }, kind.Invalid, `id: "` + strings.Repeat("x", 40) + `": 1 to 512 bytes without control characters`},
		{"line in the id", registrar, func(c *Change) { c.ID = "a\nb" }, kind.Invalid, `id: "a\nb": 1 to 512 bytes without control characters`},
		{"id in use", registrar, func(c *Change) { c.ID = "d2" }, kind.Conflict, `id: device "d2" was used before; ids are never used again`},
		{"id once used", registrar, func(c *Change) { c.ID = "d1" }, kind.Conflict, `id: device "d1" was used before; ids are never used again`},
		{"body", registrar, func(c *Change) { c.Body = json.RawMessage(`{"colour":1}`) }, kind.Invalid, `body: json: unknown field "colour"`},
		{"no body", registrar, func(c *Change) { c.Body = nil }, kind.Invalid, "body: EOF"},
		{"two bodies", registrar, func(c *Change) { c.Body = append(c.Body, '}') }, kind.Invalid, "body: data after the end of the document"},
		{"device's junction", registrar, device(Device{Junction: "j9", Key: testPub("d3")}), kind.Invalid, `body.junction: "j9" is not in the registry`},
		{"device's detector", registrar, device(Device{Junction: "j1", Key: testPub("d3"), Detectors: []traffic.DetectorID{"x", "z"}}), kind.Invalid,
			`body.detectors[1]: "z" is not a detector of junction j1`},
		{"no key", registrar, device(Device{Junction: "j1"}), kind.Invalid, "body: public key: must be 64 hex digits"},
		{"key missing", registrar, put(TypeDevice, "d3", `{"junction":"j1"}`), kind.Invalid, "body.key: missing"},
		{"short key", registrar, put(TypeDevice, "d3", `{"junction":"j1","key":"00"}`), kind.Invalid, "body: public key: must be 64 hex digits"},
		{"key that anybody can sign for", registrar, device(Device{Junction: "j1", Key: lowKey}), kind.Invalid, "body.key: is no point of the curve's prime-order group"},
		{"another's key", registrar, device(Device{Junction: "j1", Key: testPub("control")}), kind.Conflict,
			fmt.Sprintf(`body.key: %s belongs to service "control" already`, testID("control"))},
		{"revoked one's key", registrar, device(Device{Junction: "j1", Key: testPub("d1")}), kind.Conflict,
			fmt.Sprintf(`body.key: %s belongs to device "d1" already`, testID("d1"))},
		{"validator's cosigning key", registrar, device(Device{Junction: "j1", Key: testPub("cosign 2")}), kind.Conflict,
			fmt.Sprintf(`body.key: %s belongs to validator "2" already`, testID("cosign 2"))},
		{"service signs frames", registrar, putBody(TypeService, "s", Service{Key: testPub("d3"), Signs: []RecordKind{KindCommand, KindFrame}}), kind.Invalid,
			`body.signs[1]: a service may not sign "frame"`},
		{"service changes the registry", registrar, putBody(TypeService, "s", Service{Key: testPub("d3"), Signs: []RecordKind{KindRegistry}}), kind.Invalid,
			`body.signs[0]: a service may not sign "registry"`},
		{"service signs nonsense", registrar, putBody(TypeService, "s", Service{Key: testPub("d3"), Signs: []RecordKind{"x"}}), kind.Invalid,
			`body.signs[0]: a service may not sign "x"`},
		{"official without a department", registrar, putBody(TypeOfficial, "o", Official{Key: testPub("d3")}), kind.Invalid, "body.department: must not be empty"},
		{"validator's number", registrar, putBody(TypeValidator, "6", Validator{Number: 5, VoteKey: testPub("v"), CosignKey: testPub("c")}), kind.Invalid,
			`body.number: must be positive and equal to the id "6"`},
		{"junction", registrar, put(TypeJunction, "j2", `{"id":"j2"}`), kind.Invalid, "body: junction j2: stages: at least one is needed"},
		{"junction's id", registrar, putBody(TypeJunction, "j2", testJunction("j3")), kind.Invalid, `body.id: "j3", the entry is "j2"`},
		{"junction and more", registrar, put(TypeJunction, "j2", string(raw(t, testJunction("j2")))+"}"), kind.Invalid,
			"body: junction definition: data after the end of the document"},
		{"junction replaced and more", registrar, put(TypeJunction, "j1", string(raw(t, testJunction("j1")))+" {}"), kind.Invalid,
			"body: junction definition: data after the end of the document"},
		{"service without kinds or a key", registrar, put(TypeService, "s", "{}"), kind.Invalid, "body.key: missing"},
		{"service without kinds and another's key", registrar, putBody(TypeService, "s", Service{Key: testPub("control")}), kind.Conflict,
			fmt.Sprintf(`body.key: %s belongs to service "control" already`, testID("control"))},
		{"policy", registrar, putBody(TypePolicy, "p", Policy{Version: "1"}), kind.Invalid, "body: version and controller must not be empty"},
		{"software", registrar, put(TypeSoftware, "s", "{"), kind.Invalid, "body: must be JSON"},
		{"revoke nobody", registrar, func(c *Change) { c.Action, c.ID = "revoke", "d9" }, kind.NotFound, `id: no device "d9"`},
		{"revoke again", registrar, func(c *Change) { c.Action, c.ID = "revoke", "d1" }, kind.Conflict, `id: device "d1" is revoked already`},
		{"revoke a junction", registrar, func(c *Change) { c.Action, c.Type, c.ID = "revoke", TypeJunction, "j1" }, kind.Invalid, "type: a junction cannot be revoked"},
		{"revoke a validator", registrar, func(c *Change) { c.Action, c.Type, c.ID = "revoke", TypeValidator, "1" }, kind.Conflict,
			"id: there are 4 validators, and 4 must remain: add another first"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := r.Clone()
			before := r.Snapshot()
			err := r.Apply(7, tt.signer, change(t, tt.mod))
			if err == nil || firstLine(err) != tt.want || kind.Of(err) != tt.kind {
				t.Errorf("got %v of kind %v, want %s of kind %v", err, kind.Of(err), tt.want, tt.kind)
			}
			if !bytes.Equal(r.Snapshot(), before) {
				t.Error("a change that was refused changed the registry")
			}
			// Nor what is looked up in it: who restarts from a snapshot must judge
			// like who does not.
			again, err := ParseSnapshot(before)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(r.junctions, again.junctions) || !reflect.DeepEqual(r.devices, again.devices) || !reflect.DeepEqual(r.holders, again.holders) {
				t.Error("a change that was refused changed what is looked up")
			}
			if err := r.Apply(7, registrar, change(t, nil)); err != nil {
				t.Errorf("got %v for a good change, want none", err)
			}
			if r.Version() != 2 {
				t.Errorf("got version %d, want 2", r.Version())
			}
		})
	}
}

func firstLine(err error) string { return strings.SplitN(err.Error(), "\n", 2)[0] }

func TestLongestID(t *testing.T) {
	r := testRegistry(t)
	id := strings.Repeat("x", MaxID)
	if err := r.Apply(1, testID("registrar"), change(t, func(c *Change) { c.ID = id })); err != nil {
		t.Fatal(err)
	}
	if h, ok := r.Holder(testID("d3")); !ok || h.ID != id {
		t.Errorf("got holder %v, %v", h, ok)
	}
}

func TestRevokeAndReplace(t *testing.T) {
	r := testRegistry(t)
	do := func(mod func(c *Change)) {
		t.Helper()
		if err := r.Apply(12, testID("registrar"), change(t, mod)); err != nil {
			t.Fatal(err)
		}
	}
	do(nil)
	do(func(c *Change) { c.Action, c.Body, c.Nonce = "revoke", nil, 2 })
	if h, ok := r.Holder(testID("d3")); !ok || h.Status != Revoked {
		t.Errorf("got holder %+v, %v, want a revoked one: its old records must still be told apart", h, ok)
	}
	e, ok := r.Entry(TypeDevice, "d3")
	if !ok || e.Status != Revoked || e.Since != 12 {
		t.Errorf("got entry %+v, %v, want it revoked since 12", e, ok)
	}
	// Junctions and policies are replaced under their id.
	do(func(c *Change) {
		c.Type, c.ID, c.Body, c.Nonce = TypeJunction, "j1", raw(t, testJunction("j1", "y")), 3
	})
	if j, _ := r.Junction("j1"); len(j.Detectors) != 1 {
		t.Errorf("got %d detectors, want the 1 of the new definition", len(j.Detectors))
	}
	do(func(c *Change) {
		c.Type, c.ID, c.Body, c.Nonce = TypePolicy, "day", raw(t, Policy{Version: "2", Controller: "actuated"}), 4
	})
	// A device that spoke for a detector that is gone does not make the state
	// unreadable.
	if _, err := ParseSnapshot(r.Snapshot()); err != nil {
		t.Errorf("got %v for a snapshot of a good state", err)
	}
	// A registrar who has been revoked has no say, not even once more.
	do(func(c *Change) { c.Action, c.Type, c.ID, c.Nonce = "revoke", TypeOfficial, "registrar", 5 })
	if err := r.Apply(13, testID("registrar"), change(t, func(c *Change) { c.ID, c.Nonce = "d4", 6 })); kind.Of(err) != kind.Denied {
		t.Errorf("got %v, want the revoked registrar denied", err)
	}
}

func TestClone(t *testing.T) {
	r := testRegistry(t)
	before, hash := r.Snapshot(), r.Hash()
	c := r.Clone()
	for i, mod := range []func(c *Change){
		nil,
		func(c *Change) { c.Action, c.ID = "revoke", "d1" },
		func(c *Change) { c.Type, c.ID, c.Body = TypeJunction, "j1", raw(t, testJunction("j1")) },
		func(c *Change) { c.Type, c.ID, c.Body = TypeSoftware, "new", json.RawMessage("{}") },
	} {
		if err := c.Apply(1, testID("registrar"), change(t, func(ch *Change) {
			ch.Nonce = uint64(i)
			if mod != nil {
				mod(ch)
			}
		})); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(r.Snapshot(), before) || r.Hash() != hash {
		t.Error("changes to a clone show in the original")
	}
	if h, _ := r.Holder(testID("d1")); h.Status != Active {
		t.Error("a holder revoked in a clone is revoked in the original")
	}
	if c.Hash() == hash {
		t.Error("a changed registry has the hash of the original")
	}
}

// TestHashOfOrder: the hash does not depend on the order in which entries came.
func TestHashOfOrder(t *testing.T) {
	g := testGenesis(t)
	want := testRegistry(t).Hash()
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		rnd.Shuffle(len(g.Entries), func(i, k int) { g.Entries[i], g.Entries[k] = g.Entries[k], g.Entries[i] })
		r, err := NewRegistry(g)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Hash(); got != want {
			t.Fatalf("seed %d: got hash %v, want %v", seed, got, want)
		}
	}
	// Every entry, and everything in it, is under the hash.
	for i := range g.Entries {
		g := testGenesis(t)
		g.Entries = slices.Delete(g.Entries, i, i+1)
		if r, err := NewRegistry(g); err == nil && r.Hash() == want {
			t.Errorf("the hash does not cover %s %s", testGenesis(t).Entries[i].Type, testGenesis(t).Entries[i].ID)
		}
	}
}

// TestGolden pins what other parties compute from the same documents.
func TestGolden(t *testing.T) {
	e := Entry{Type: TypeDevice, ID: "d1", Status: Active, Since: 7, Body: json.RawMessage(`{"junction":"j1"}`)}
	if got, want := string(e.Marshal()), "stopline registry entry v1\ndevice\nd1\nactive\n7\n{\"junction\":\"j1\"}"; got != want {
		t.Errorf("got entry %q, want %q", got, want)
	}
	doc, err := json.Marshal(testGenesis(t))
	if err != nil {
		t.Fatal(err)
	}
	g, err := ParseGenesis(doc)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	h := r.Hash()
	for name, pair := range map[string][2]string{
		"genesis document": {hex.EncodeToString(sum(doc)), goldenGenesis},
		"registry":         {hex.EncodeToString(h[:]), goldenRegistry},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: got hash %s, want %s", name, pair[0], pair[1])
		}
	}
	// The same root by hand, over the sorted entries: RFC 6962 §2.1.
	leaves := make([][]byte, 0, len(g.Entries))
	slices.SortFunc(g.Entries, func(a, b Entry) int {
		return strings.Compare(string(a.Type)+"\x00"+a.ID, string(b.Type)+"\x00"+b.ID)
	})
	for _, e := range g.Entries {
		leaves = append(leaves, e.Marshal())
	}
	if got := rfc6962(leaves); !bytes.Equal(got, h[:]) {
		t.Errorf("got root %x by hand, %x from the registry", got, h)
	}
}

const (
	goldenGenesis  = "25ee6196f23ca1805385eef99c3a3e62d0d38e965afe4c38c4eee62a97a96f06"
	goldenRegistry = "612c54a311c125b1f4ab1eca44a4fdd4b3fb1ef039853676d4a6a470199e6955"
)

func sum(b []byte) []byte { h := sha256.Sum256(b); return h[:] }

// rfc6962 is the Merkle tree hash as RFC 6962 §2.1 defines it.
func rfc6962(leaves [][]byte) []byte {
	switch n := len(leaves); n {
	case 0:
		return sum(nil)
	case 1:
		return sum(append([]byte{0}, leaves[0]...))
	default:
		k := 1
		for 2*k < n {
			k *= 2
		}
		return sum(slices.Concat([]byte{1}, rfc6962(leaves[:k]), rfc6962(leaves[k:])))
	}
}

func TestExcerpts(t *testing.T) {
	r := testRegistry(t)
	hash := r.Hash()
	n := int64(len(testGenesis(t).Entries))
	for i := range n {
		x, err := r.ProveAt(i)
		if err != nil {
			t.Fatal(err)
		}
		e, err := x.Check(hash)
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		same, err := r.Prove(e.Type, e.ID)
		if err != nil || same.Index != i || !bytes.Equal(same.Entry, x.Entry) {
			t.Errorf("entry %d: got %+v, %v by its name, want the same excerpt", i, same, err)
		}
		// Forgeries: another hash, entry, place or proof.
		for name, forge := range map[string]func(x *Excerpt, h *merkle.Hash){
			"hash": func(_ *Excerpt, h *merkle.Hash) { h[0] ^= 1 },
			"entry": func(x *Excerpt, _ *merkle.Hash) {
				x.Entry = bytes.Replace(x.Entry, []byte("active"), []byte("revoked"), 1)
			},
			"place":    func(x *Excerpt, _ *merkle.Hash) { x.Index = (x.Index + 1) % x.Size },
			"size":     func(x *Excerpt, _ *merkle.Hash) { x.Size *= 2 },
			"proof":    func(x *Excerpt, _ *merkle.Hash) { x.Proof = slices.Clone(x.Proof); x.Proof[0][5] ^= 1 },
			"short":    func(x *Excerpt, _ *merkle.Hash) { x.Proof = x.Proof[1:] },
			"negative": func(x *Excerpt, _ *merkle.Hash) { x.Index = -1 },
			"nothing":  func(x *Excerpt, _ *merkle.Hash) { *x = Excerpt{} },
		} {
			f, h := x, hash
			forge(&f, &h)
			if e, err := f.Check(h); err == nil {
				t.Errorf("entry %d: an excerpt with a forged %s proves %+v", i, name, e)
			}
		}
	}
	if _, err := r.Prove(TypeDevice, "d9"); kind.Of(err) != kind.NotFound {
		t.Errorf("got %v for an entry that is not there", err)
	}
	for _, i := range []int64{-1, n} {
		if x, err := r.ProveAt(i); err == nil {
			t.Errorf("got %+v for entry %d of %d", x, i, n)
		}
	}
}

func TestParseEntryRefuses(t *testing.T) {
	const good = "stopline registry entry v1\ndevice\nd1\nactive\n7\n{}"
	for _, tt := range []struct{ in, want string }{
		{"", "registry entry: not in the form of stopline registry entry v1"},
		{"stopline registry entry v2\ndevice\nd1\nactive\n7\n{}", "registry entry: not in the form of stopline registry entry v1"},
		{"stopline registry entry v1\ndevice\nd1\nactive\n{}", "registry entry: not in the form of stopline registry entry v1"},
		{strings.Replace(good, "7", "-7", 1), `registry entry: since: strconv.ParseUint: parsing "-7": invalid syntax`},
		{strings.Replace(good, "7", "07", 1), "registry entry: not in canonical form"},
		{strings.Replace(good, "active", "asleep", 1), `registry entry: status "asleep": must be active or revoked`},
	} {
		if _, err := ParseEntry([]byte(tt.in)); err == nil || err.Error() != tt.want {
			t.Errorf("%q: got %v, want %s", tt.in, err, tt.want)
		}
	}
	if e, err := ParseEntry([]byte(good)); err != nil || string(e.Marshal()) != good {
		t.Errorf("got %+v, %v", e, err)
	}
}

// FuzzEntry: what can be decoded encodes to the same bytes.
func FuzzEntry(f *testing.F) {
	for _, e := range testGenesis(f).Entries {
		f.Add(e.Marshal())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseEntry(b)
		if err != nil {
			return
		}
		if got := e.Marshal(); !bytes.Equal(got, b) {
			t.Errorf("got %q after a round trip, want %q", got, b)
		}
		if _, err := e.Keys(); err != nil && kind.Of(err) != kind.Invalid {
			t.Errorf("got an error of kind %v: %v", kind.Of(err), err)
		}
	})
}

func TestKeys(t *testing.T) {
	for _, e := range testGenesis(t).Entries {
		keys, err := e.Keys()
		want := map[EntryType]int{TypeDevice: 1, TypeService: 1, TypeOfficial: 1, TypeValidator: 2}[e.Type]
		if err != nil || len(keys) != want {
			t.Errorf("%s %s: got %d keys, %v, want %d", e.Type, e.ID, len(keys), err, want)
		}
	}
	if keys, err := (Entry{Type: TypeDevice, Body: json.RawMessage("{")}).Keys(); err == nil {
		t.Errorf("got keys %v of a broken entry", keys)
	}
}

func TestGenesisRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		mod  func(g *Genesis)
		want string
	}{
		{"district", func(g *Genesis) { g.District = "" }, "genesis: district: must not be empty"},
		{"revoked from the start", func(g *Genesis) { g.Entries[4].Status = Revoked }, `genesis: entries[4]: status "revoked" since 0: every entry begins active, at 0`},
		{"since later", func(g *Genesis) { g.Entries[4].Since = 3 }, `genesis: entries[4]: status "active" since 3: every entry begins active, at 0`},
		{"twice", func(g *Genesis) { g.Entries[5].ID = "d1" }, `genesis: entries[5]: id: device "d1" was used before; ids are never used again`},
		{"one key for two", func(g *Genesis) { g.Entries[5].Body = raw(t, Device{Junction: "j1", Key: testPub("d1")}) },
			fmt.Sprintf(`genesis: entries[5]: body.key: %s belongs to device "d1" already`, testID("d1"))},
		{"one cosigning key for two", func(g *Genesis) {
			g.Entries[1].Body = raw(t, Validator{Number: 2, VoteKey: testPub("vote 2"), CosignKey: testPub("cosign 1")})
		}, fmt.Sprintf(`genesis: entries[1]: body.cosign_key: %s belongs to validator "1" already`, testID("cosign 1"))},
		{"one vote key for two", func(g *Genesis) {
			g.Entries[1].Body = raw(t, Validator{Number: 2, VoteKey: testPub("vote 1"), CosignKey: testPub("cosign 2")})
		}, fmt.Sprintf(`genesis: entries[1]: body.vote_key: %s belongs to validator "1" already`, testID("vote 1"))},
		{"one key to vote and cosign", func(g *Genesis) {
			g.Entries[1].Body = raw(t, Validator{Number: 2, VoteKey: testPub("vote 2"), CosignKey: testPub("vote 2")})
		}, "genesis: entries[1]: body.cosign_key: must be a key, and not the vote key"},
		{"no vote key", func(g *Genesis) {
			g.Entries[1].Body = json.RawMessage(`{"number":2,"department":"x","cosign_key":"` + hex.EncodeToString(testPub("cosign 2")) + `"}`)
		}, "genesis: entries[1]: body.vote_key: missing"},
		{"validator 0", func(g *Genesis) { g.Entries[1].ID = "0" }, `genesis: entries[1]: body.number: must be positive and equal to the id "0"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := testGenesis(t)
			tt.mod(g)
			if _, err := NewRegistry(g); err == nil || firstLine(err) != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	for _, tt := range []struct{ in, want string }{
		{`{"district":"x","colour":1}`, `genesis: json: unknown field "colour"`},
		{`{"district":"x"}}`, "genesis: data after the end of the document"},
		{`{"district":"x"} {}`, "genesis: data after the end of the document"},
		{``, "genesis: EOF"},
	} {
		if _, err := ParseGenesis([]byte(tt.in)); err == nil || err.Error() != tt.want {
			t.Errorf("%q: got %v, want %s", tt.in, err, tt.want)
		}
	}
	if _, err := ParseChange([]byte(`{"district":"x"}]`)); err == nil || kind.Of(err) != kind.Invalid {
		t.Errorf("got %v for a change with something after it", err)
	}
	if g, err := ParseGenesis([]byte(" {\"district\":\"x\"}\n")); err != nil || g.District != "x" {
		t.Errorf("got %v, %v, want space around the document to be taken", g, err)
	}
}

// TestSnapshot plays random changes: after each one, the snapshot's registry
// answers as the original does, and goes on as it does.
func TestSnapshot(t *testing.T) {
	for seed := range uint64(10) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		r := testRegistry(t)
		for i := range 30 {
			id := fmt.Sprint("x", rnd.IntN(6))
			c := change(t, func(c *Change) {
				c.Nonce = uint64(rnd.IntN(40))
				switch rnd.IntN(5) {
				case 0:
					c.ID, c.Body = id, raw(t, Device{Junction: "j1", Key: testPub(id)})
				case 1:
					c.Action, c.ID = "revoke", id
				case 2:
					c.Type, c.ID, c.Body = TypeJunction, id, raw(t, testJunction(traffic.JunctionID(id), "x"))
				case 3:
					c.Type, c.ID, c.Body = TypeJunction, "j1", raw(t, testJunction("j1", []traffic.DetectorID{"x", "y", "z"}[:rnd.IntN(4)]...))
				case 4:
					c.Type, c.ID, c.Body = TypeService, id, raw(t, Service{Key: testPub(id), Signs: []RecordKind{KindCommand}})
				}
			})
			back, err := ParseSnapshot(r.Snapshot())
			if err != nil {
				t.Fatalf("seed %d, change %d: %v", seed, i, err)
			}
			want, got := r.Apply(uint64(i+1), testID("registrar"), c), back.Apply(uint64(i+1), testID("registrar"), c)
			if fmt.Sprint(want) != fmt.Sprint(got) {
				t.Fatalf("seed %d, change %d: got %v from the snapshot, want %v", seed, i, got, want)
			}
			if r.Hash() != back.Hash() || r.Version() != back.Version() || !bytes.Equal(r.Snapshot(), back.Snapshot()) {
				t.Fatalf("seed %d, change %d: the snapshot's registry differs", seed, i)
			}
			for _, k := range []string{id, "d1", "cosign 1"} {
				a, aok := r.Holder(testID(k))
				b, bok := back.Holder(testID(k))
				if aok != bok || fmt.Sprint(a) != fmt.Sprint(b) {
					t.Fatalf("seed %d, change %d: got holder %v from the snapshot, want %v", seed, i, b, a)
				}
			}
		}
	}
	for _, bad := range []string{"", "{}", `{"district":"x","entries":[{"type":"device","id":"d","body":{}}]}`, `{"district":"x"}]`} {
		if _, err := ParseSnapshot([]byte(bad)); err == nil || !strings.HasPrefix(err.Error(), "registry snapshot: ") {
			t.Errorf("%q: got %v, want a refusal", bad, err)
		}
	}
}
