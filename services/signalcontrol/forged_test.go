package signalcontrol

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// emitters is a district before which somebody stands with a transmitter.
type emitters struct {
	t        testing.TB
	reg      *identity.Registry
	verifier *identity.Verifier
	state    *validate.State
	core     *Core
	height   ledger.Height
	index    uint64
	now      time.Time
	stop     traffic.Stop
}

func seedKey(name string) ed25519.PrivateKey {
	h := sha256.Sum256([]byte(name))
	return ed25519.NewKeyFromSeed(h[:])
}

func newEmitters(t testing.TB) *emitters {
	t.Helper()
	city, err := sim.New(sim.Config{Junctions: 4})
	if err != nil {
		t.Fatal(err)
	}
	g := identity.Genesis{District: "harbour"}
	file := func(typ identity.EntryType, id string, body any) {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		g.Entries = append(g.Entries, identity.Entry{Type: typ, ID: id, Status: identity.Active, Body: b})
	}
	key := func(name string) identity.PublicKey {
		return identity.PublicKey(seedKey(name).Public().(ed25519.PublicKey))
	}
	for _, j := range city.Junctions() {
		file(identity.TypeJunction, string(j.ID), j)
	}
	j := city.Junctions()[0]
	file(identity.TypeDevice, "rsu", identity.Device{Junction: j.ID, Key: key("rsu")})
	file(identity.TypeService, "gateway", identity.Service{Key: key("gateway"), Signs: []identity.RecordKind{identity.KindRequest, identity.KindOverride}})
	file(identity.TypeService, "signal-control", identity.Service{Key: key("signal-control"), Signs: []identity.RecordKind{identity.KindCommand}})
	for _, a := range []string{"ambulance", "fire", "gone"} {
		file(identity.TypeAgency, a, identity.Agency{Name: a, Key: key(a)})
		var f identity.Fleet
		for n := range 500 {
			f.Vehicles = append(f.Vehicles, identity.Vehicle{ID: fmt.Sprintf("%s-%d", a, n), Class: identity.VehicleEmergency})
		}
		file(identity.TypeFleet, a, f)
	}
	file(identity.TypeOfficial, "registrar", identity.Official{Key: key("registrar"), Department: "traffic", Roles: []string{identity.Registrar}})
	reg, err := identity.NewRegistry(&g)
	if err != nil {
		t.Fatal(err)
	}
	ctrl, err := timing.Named("fixed")
	if err != nil {
		t.Fatal(err)
	}
	core, err := NewCore(CoreConfig{District: "harbour", Key: seedKey("signal-control"), Controller: ctrl})
	if err != nil {
		t.Fatal(err)
	}
	e := &emitters{t: t, reg: reg, verifier: identity.NewVerifier(), state: validate.NewState(validate.Edge()), core: core, now: testStart}
	for _, gr := range j.Groups {
		if gr.Kind == traffic.Vehicles {
			e.stop = traffic.Stop{Junction: j.ID, Group: gr.Name}
			break
		}
	}
	e.revoke("gone")
	return e
}

func (e *emitters) revoke(agency string) {
	e.t.Helper()
	next := e.reg.Clone()
	if err := next.Apply(1, identity.IDOf(seedKey("registrar").Public().(ed25519.PublicKey)), identity.Change{District: "harbour", Action: identity.Revoke, Type: identity.TypeAgency, ID: agency, Nonce: next.Version() + 1}); err != nil {
		e.t.Fatal(err)
	}
	e.reg = next
}

// ask is a request that is in order but for what edit does.
func (e *emitters) ask(agency string, n uint64, edit func(*traffic.Request)) *traffic.Request {
	s := e.stop
	s.Arrival = e.now.Add(30 * time.Second)
	r := &traffic.Request{District: "harbour", Turn: traffic.Turn{Epoch: 1, Seq: n}, Time: e.now, ID: fmt.Sprintf("%s-%d", agency, n), Revision: 1,
		By: traffic.Agent{Agency: agency, Name: "desk"}, Class: traffic.Emergency, Vehicle: fmt.Sprintf("%s-%d", agency, n%500), Expires: e.now.Add(50 * time.Second), Stops: []traffic.Stop{s}}
	if edit != nil {
		edit(r)
	}
	return r
}

func signed(key string, r *traffic.Request) []byte {
	return identity.Sign(seedKey(key), identity.KindRequest, identity.Protobuf, wire.EncodeRequest(r)).Marshal()
}

// block has envelopes judged as validation and validators judge them, and returns
// how many of them were let in by the book.
func (e *emitters) block(raw [][]byte) int {
	e.height++
	cs := make([]validate.Candidate, len(raw))
	for i := range raw {
		cs[i] = wire.Candidate(raw[i], make([]byte, 32))
	}
	wire.VerifySignatures(e.verifier, e.reg, cs)
	var records []Record
	for i := range cs {
		e.index++
		if e.state.Judge(e.reg, e.now, &cs[i]).OK {
			records = append(records, Record{e.index, &cs[i]})
		}
	}
	e.core.Agreed(e.reg, e.height, e.now, records)
	in := map[string]bool{}
	for _, r := range records {
		if r.Request == nil || in[r.Request.ID] {
			continue
		}
		if x, ok := e.core.Book().Entry(r.Request.ID); ok && x.Height == uint64(e.height) && x.State != priority.Rejected {
			in[r.Request.ID] = true
		}
	}
	return len(in)
}

// A transmitter for $300 is worth nothing: of 100,000 forged, altered, replayed and
// misdirected requests none is let in, and every honest one between them is.
func TestForgedRequests(t *testing.T) {
	total := 100_000
	if testing.Short() || raceEnabled {
		total = 3_000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, %d forged requests", seed, total)
	r := rand.New(rand.NewPCG(seed, 1))
	e := newEmitters(t)
	honest := signed("ambulance", e.ask("ambulance", 1, nil))
	if n := e.block([][]byte{honest}); n != 1 {
		t.Fatalf("an honest request: %d let in, want it", n)
	}
	base, err := identity.ParseEnvelope(honest)
	if err != nil {
		t.Fatal(err)
	}
	forge := []func(n uint64) []byte{
		func(n uint64) []byte { // anybody's signature under the agency's name
			x := base
			x.Payload = wire.EncodeRequest(e.ask("ambulance", n, nil))
			x.Signature = make([]byte, ed25519.SignatureSize)
			for i := range x.Signature {
				x.Signature[i] = byte(r.Uint32())
			}
			return x.Marshal()
		},
		func(n uint64) []byte { // the honest signature over something else
			x := base
			x.Payload = wire.EncodeRequest(e.ask("ambulance", n, nil))
			return x.Marshal()
		},
		func(n uint64) []byte { return signed(fmt.Sprint("stranger ", n%50), e.ask("ambulance", n, nil)) },
		func(n uint64) []byte { return signed("rsu", e.ask("ambulance", n, nil)) },
		func(n uint64) []byte { return signed("signal-control", e.ask("ambulance", n, nil)) },
		func(n uint64) []byte { return signed("fire", e.ask("ambulance", n, nil)) }, // in another agency's name
		func(n uint64) []byte { return signed("gone", e.ask("gone", n, nil)) },      // revoked
		func(n uint64) []byte { // another district's
			return signed("ambulance", e.ask("ambulance", n, func(q *traffic.Request) { q.District = "uptown" }))
		},
		func(uint64) []byte { return honest }, // replayed
		func(n uint64) []byte { // signed as something else
			return identity.Sign(seedKey("ambulance"), identity.KindAccess, identity.Protobuf, wire.EncodeRequest(e.ask("ambulance", n, nil))).Marshal()
		},
		func(uint64) []byte {
			b := append([]byte(nil), honest...)
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			return b
		},
		func(n uint64) []byte { // somebody else's vehicle
			return signed("fire", e.ask("fire", 1<<40+n, func(q *traffic.Request) { q.Vehicle = "ambulance-1" }))
		},
	}
	granted, honestly, asked := 0, 0, 0
	for done, n := 0, uint64(2); done < total; {
		var batch [][]byte
		for range min(250, total-done) {
			n++
			batch = append(batch, forge[r.IntN(len(forge))](n))
			done++
		}
		granted += e.block(batch)
		if done%1000 == 0 {
			e.now = e.now.Add(2 * time.Minute) // sixty an hour are allowed
			asked++
			n++
			honestly += e.block([][]byte{signed("gateway", e.ask("ambulance", n, nil))})
		}
	}
	if granted != 0 || honestly != asked || asked == 0 {
		t.Errorf("of %d forged requests %d let in, of %d honest ones %d; want none and all (at 95 %% the rate is below %.1e)", total, granted, asked, honestly, 3/float64(total))
	}
}

// A stolen key is worth an hour's quota, and nothing once it is revoked.
func TestStolenKey(t *testing.T) {
	total := 20_000
	if testing.Short() || raceEnabled {
		total = 1_000
	}
	e := newEmitters(t)
	granted := 0
	for n := uint64(1); n <= uint64(total); {
		var batch [][]byte
		for range 250 {
			batch = append(batch, signed("fire", e.ask("fire", n, nil)))
			n++
		}
		e.now = e.now.Add(time.Second)
		granted += e.block(batch)
	}
	if most := priority.Default().PerHour[traffic.Emergency]; granted != most {
		t.Errorf("%d of %d let in within minutes, want the quota of %d", granted, total, most)
	}
	e.revoke("fire")
	e.now = e.now.Add(2 * time.Hour)
	if n := e.block([][]byte{signed("fire", e.ask("fire", 1<<20, nil)), signed("gateway", e.ask("fire", 1<<20+1, nil))}); n != 0 {
		t.Errorf("after it was revoked %d let in, want none", n)
	}
}

// The direct way to signal-control is no way around.
func TestForgedDirectRequests(t *testing.T) {
	e := newEmitters(t)
	if _, err := openRequest(e.reg, e.now, signed("gateway", e.ask("ambulance", 1, nil))); err != nil {
		t.Errorf("the gateway's: %v, want it taken", err)
	}
	for name, raw := range map[string][]byte{
		"nothing":    nil,
		"noise":      []byte("x"),
		"a stranger": signed("stranger", e.ask("ambulance", 1, nil)),
		"a device":   signed("rsu", e.ask("ambulance", 1, nil)),
		"revoked":    signed("gone", e.ask("gone", 1, nil)),
		"another":    signed("fire", e.ask("ambulance", 1, nil)),
		"of before":  signed("gateway", e.ask("ambulance", 1, func(q *traffic.Request) { q.Time = q.Time.Add(-time.Minute) })),
		"a command":  identity.Sign(seedKey("signal-control"), identity.KindCommand, identity.Protobuf, nil).Marshal(),
	} {
		if r, err := openRequest(e.reg, e.now, raw); err == nil {
			t.Errorf("%s: taken as %+v", name, r)
		}
	}
}
