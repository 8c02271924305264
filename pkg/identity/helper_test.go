package identity

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// testKey returns the same key for the same name in every run.
func testKey(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte("test key " + name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func testPub(name string) PublicKey {
	return PublicKey(testKey(name).Public().(ed25519.PublicKey))
}

func testID(name string) KeyID { return IDOf(ed25519.PublicKey(testPub(name))) }

func testJunction(id traffic.JunctionID, detectors ...traffic.DetectorID) *traffic.Junction {
	j := &traffic.Junction{
		ID:        id,
		Lanes:     []traffic.Lane{{ID: "in", LengthCM: 9000}, {ID: "out", LengthCM: 9000}},
		Groups:    []traffic.Group{{Name: "a", Kind: traffic.Vehicles}},
		Movements: []traffic.Movement{{From: "in", To: "out", SaturationPerHour: 1800}},
		Conflicts: [][]int{{}},
		Stages:    []traffic.Stage{{Name: "a", State: "G"}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000},
		Plan:      traffic.Plan{Name: "p", Steps: []traffic.PlanStep{{DurationMS: 20000, IntergreenMS: 4000}}},
	}
	for _, d := range detectors {
		j.Detectors = append(j.Detectors, traffic.Detector{ID: d, Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Group: -1})
	}
	return j
}

func raw(t testing.TB, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func entry(t testing.TB, typ EntryType, id string, body any) Entry {
	t.Helper()
	return Entry{Type: typ, ID: id, Status: Active, Body: raw(t, body)}
}

// testGenesis has every type of entry.
func testGenesis(t testing.TB) *Genesis {
	t.Helper()
	g := &Genesis{District: "harbour", Origin: "stopline.example/harbour", LogKey: "stopline.example/harbour+0+A", CreatedUnixMS: 1_790_000_000_000}
	for _, n := range []uint64{1, 2, 3, 4} {
		id := string(rune('0' + n))
		g.Entries = append(g.Entries, entry(t, TypeValidator, id, Validator{Number: n, Department: "dept " + id, VoteKey: testPub("vote " + id), CosignKey: testPub("cosign " + id)}))
	}
	g.Entries = append(g.Entries,
		entry(t, TypeDevice, "d1", Device{Junction: "j1", Key: testPub("d1")}),
		entry(t, TypeDevice, "d2", Device{Junction: "j1", Key: testPub("d2"), Detectors: []traffic.DetectorID{"x"}}),
		entry(t, TypeService, "control", Service{Key: testPub("control"), Signs: []RecordKind{KindCommand}}),
		entry(t, TypeOfficial, "registrar", Official{Key: testPub("registrar"), Department: "traffic", Roles: []string{Registrar}}),
		entry(t, TypeOfficial, "reader", Official{Key: testPub("reader"), Department: "audit"}),
		entry(t, TypeJunction, "j1", testJunction("j1", "x", "y")),
		entry(t, TypePolicy, "day", Policy{Version: "1", Controller: "fixed", Rules: "free"}),
		entry(t, TypeSoftware, "stopline", map[string]string{"sha256": "00"}),
	)
	return g
}

func testRegistry(t testing.TB) *Registry {
	t.Helper()
	r, err := NewRegistry(testGenesis(t))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
