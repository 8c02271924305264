package identity

import (
	"strings"
	"testing"
	"time"
)

func TestFleets(t *testing.T) {
	g := testGenesis(t)
	g.Entries = append(g.Entries,
		entry(t, TypeFleet, "fire", Fleet{Vehicles: []Vehicle{{ID: "F-1", Class: VehicleEmergency}, {ID: "F-2", Class: VehicleEmergency, From: "22:00", Until: "06:30"}}}),
		entry(t, TypeAgency, "fire", Agency{Name: "Fire brigade", Key: testPub("fire")}))
	r, err := NewRegistry(g)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := ParseSnapshot(r.Snapshot()); err != nil || s.Hash() != r.Hash() {
		t.Errorf("from its snapshot: %v", err)
	}
	for _, tc := range []struct {
		agency, id, at string
		ok, duty       bool
	}{
		{"fire", "F-1", "12:00", true, true},
		{"fire", "F-2", "12:00", true, false},
		{"fire", "F-2", "22:00", true, true},
		{"fire", "F-2", "06:29", true, true},
		{"fire", "F-2", "06:30", true, false},
		{"fire", "F-3", "12:00", false, false},
		{"police", "F-1", "12:00", false, false},
	} {
		at, err := time.Parse("15:04", tc.at)
		if err != nil {
			t.Fatal(err)
		}
		v, ok := r.Vehicle(tc.agency, tc.id)
		if duty := ok && v.OnDuty(at); ok != tc.ok || duty != tc.duty {
			t.Errorf("%s %s at %s: got %v, on duty %v; want %v, %v", tc.agency, tc.id, tc.at, ok, duty, tc.ok, tc.duty)
		}
	}
	for name, tc := range map[string]struct {
		id   string
		v    []Vehicle
		want string
	}{
		"no agency": {"police", nil, "id:"},
		"no id":     {"fire", []Vehicle{{Class: VehicleTransit}}, "body.vehicles[0].id"},
		"twice":     {"fire", []Vehicle{{ID: "a", Class: VehicleTransit}, {ID: "a", Class: VehicleTransit}}, "body.vehicles[1].id"},
		"class":     {"fire", []Vehicle{{ID: "a", Class: "taxi"}}, "body.vehicles[0].class"},
		"half":      {"fire", []Vehicle{{ID: "a", Class: VehicleTransit, From: "06:00"}}, "belong together"},
		"no hour":   {"fire", []Vehicle{{ID: "a", Class: VehicleTransit, From: "25:00", Until: "06:00"}}, "hours of the day"},
		"no time":   {"fire", []Vehicle{{ID: "a", Class: VehicleTransit, From: "06:00", Until: "06:00"}}, "hours of the day"},
		"too many":  {"fire", make([]Vehicle, maxVehicles+1), "at most"},
	} {
		r.features = map[string]uint64{FeatureAccess: 1}
		if err := r.put(5, TypeFleet, tc.id, raw(t, Fleet{Vehicles: tc.v})); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q refused", name, err, tc.want)
		}
	}
	// It is replaced as a whole, and ends with its agency.
	if err := r.put(5, TypeFleet, "fire", raw(t, Fleet{})); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Vehicle("fire", "F-1"); ok {
		t.Error("F-1 is there after it was taken off the list")
	}
	if err := r.put(5, TypeFleet, "fire", raw(t, Fleet{Vehicles: []Vehicle{{ID: "F-1", Class: VehicleEmergency}}})); err != nil {
		t.Fatal(err)
	}
	if err := r.revoke(6, TypeAgency, "fire"); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Vehicle("fire", "F-1"); ok {
		t.Error("a revoked agency has a vehicle on duty")
	}
}
