package identity

import (
	"encoding/json"
	"maps"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// The classes of vehicle, as [Vehicle] names them.
const (
	VehicleTransit   = "transit"
	VehicleEmergency = "emergency"
)

// Fleet is the body of a fleet's entry, whose id is that of an agency: for which
// vehicles the agency may ask signals for priority.
type Fleet struct {
	Vehicles []Vehicle `json:"vehicles"`
}

// Vehicle is a line of a fleet: one that may be given priority, in which class,
// and when it is on duty.
//
// Duty is by the hour of the day and not by the shift: who drives today is the
// agency's own business, and a change of the registry needs other departments. So
// what the list keeps out is a vehicle that the agency does not have, of a class
// that it is not, or at an hour at which it never drives.
type Vehicle struct {
	ID    string `json:"id"`
	Class string `json:"class"`
	// From and Until are hours of each day in UTC, such as 06:00 and 22:30; a duty
	// that ends before it begins goes past midnight. Both empty: always.
	From  string `json:"from,omitempty"`
	Until string `json:"until,omitempty"`
}

// maxVehicles bounds an agency's list.
const maxVehicles = 4096

// dayMinute reads an hour of the day.
func dayMinute(s string) (int, bool) {
	t, err := time.Parse("15:04", s)
	return t.Hour()*60 + t.Minute(), err == nil && len(s) == len("15:04")
}

// OnDuty reports whether the vehicle is on duty at a time.
func (v Vehicle) OnDuty(at time.Time) bool {
	if v.From == "" {
		return true
	}
	from, _ := dayMinute(v.From)
	until, _ := dayMinute(v.Until)
	at = at.UTC()
	m := at.Hour()*60 + at.Minute()
	if from <= until {
		return m >= from && m < until
	}
	return m >= from || m < until
}

// checkFleet checks an agency's list.
func (r *Registry) checkFleet(id string, body json.RawMessage) error {
	var f Fleet
	if err := parseBody(body, &f); err != nil {
		return err
	}
	if e, ok := r.entries[entryKey(TypeAgency, id)]; !ok || e.Status == Revoked && !r.loading {
		return kind.Errorf(kind.Invalid, "id: %.40q is no agency in force", id)
	}
	if len(f.Vehicles) > maxVehicles {
		return kind.Errorf(kind.Invalid, "body.vehicles: %d, at most %d", len(f.Vehicles), maxVehicles)
	}
	seen := make(map[string]bool, len(f.Vehicles))
	for i, v := range f.Vehicles {
		_, from := dayMinute(v.From)
		_, until := dayMinute(v.Until)
		switch {
		case v.ID == "" || len(v.ID) > 63:
			return kind.Errorf(kind.Invalid, "body.vehicles[%d].id: 1 to 63 bytes", i)
		case seen[v.ID]:
			return kind.Errorf(kind.Invalid, "body.vehicles[%d].id: %q is there twice", i, v.ID)
		case v.Class != VehicleTransit && v.Class != VehicleEmergency:
			return kind.Errorf(kind.Invalid, "body.vehicles[%d].class: %.20q: must be transit or emergency", i, v.Class)
		case (v.From == "") != (v.Until == ""):
			return kind.Errorf(kind.Invalid, "body.vehicles[%d]: from and until belong together", i)
		case v.From != "" && (!from || !until || v.From == v.Until):
			return kind.Errorf(kind.Invalid, "body.vehicles[%d]: from %.10q, until %.10q: must be two hours of the day, such as 06:00", i, v.From, v.Until)
		}
		seen[v.ID] = true
	}
	return nil
}

// Vehicle returns a vehicle of an agency, both in force.
func (r *Registry) Vehicle(agency, id string) (Vehicle, bool) {
	if e, ok := r.entries[entryKey(TypeAgency, agency)]; !ok || e.Status != Active {
		return Vehicle{}, false
	}
	if e, ok := r.entries[entryKey(TypeFleet, agency)]; !ok || e.Status != Active {
		return Vehicle{}, false
	}
	v, ok := r.fleets[agency][id]
	return v, ok
}

// setFleet keeps a fleet that is filed in a form in which it is quickly asked.
func (r *Registry) setFleet(e Entry) {
	var f Fleet
	if parseBody(e.Body, &f) != nil {
		return // unreachable: it was checked when it was filed
	}
	vs := make(map[string]Vehicle, len(f.Vehicles))
	for _, v := range f.Vehicles {
		vs[v.ID] = v
	}
	if r.fleets = maps.Clone(r.fleets); r.fleets == nil { // shared with clones
		r.fleets = map[string]map[string]Vehicle{}
	}
	r.fleets[e.ID] = vs
}
