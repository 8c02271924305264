package district

import (
	"crypto/ed25519"
	"fmt"
	"io"
	"time"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
)

// GatewayKey is the service that signs what agencies ask and read.
const GatewayKey = "gateway"

// clientsFor is how long the clients of a new district last: long enough to try
// everything, and they end.
const clientsFor = 90 * 24 * time.Hour

// Clients are who may ask a new district's gateway for something, by id. Each
// has a key of its own that signs its short-lived tokens.
var Clients = []struct {
	ID, Agency string
	Roles      []string
}{
	{"operator-1", "roads", []string{"operator"}},
	{"engineer-1", "roads", []string{"engineer", "viewer"}},
	{"technician-1", "roads", []string{"technician"}},
	{"ambulance-desk-1", "ambulance", []string{"dispatcher"}},
	{"fire-desk-1", "fire", []string{"dispatcher"}},
	{"transit-desk-1", "transit", []string{"transit-dispatcher"}},
	{"police-1", "police", []string{"investigator"}},
	{"police-2", "police", []string{"investigator"}},
	{"auditor-1", "audit-office", []string{"auditor"}},
	{"registrar-1", "roads", []string{"official"}},
}

// agencies names what the clients act for.
var agencies = map[string]string{
	"roads": "Roads department", "ambulance": "Ambulance service", "fire": "Fire brigade",
	"transit": "Transit operator", "police": "Police", "audit-office": "Audit office",
}

// fleets are the vehicles of the agencies that may ask signals for priority.
var fleets = map[string]identity.Fleet{
	"ambulance": fleet("A", identity.VehicleEmergency),
	"fire":      fleet("F", identity.VehicleEmergency),
	"police":    fleet("P", identity.VehicleEmergency),
	"transit":   fleet("bus", identity.VehicleTransit),
}

// fleet is nineteen vehicles, such as A-1.
func fleet(prefix, class string) (f identity.Fleet) {
	for n := 1; n < 20; n++ {
		f.Vehicles = append(f.Vehicles, identity.Vehicle{ID: fmt.Sprintf("%s-%d", prefix, n), Class: class})
	}
	return f
}

// ClientKey names the key that signs a client's tokens, AgencyKey that of an
// agency.
func ClientKey(id string) string { return "client-" + id }
func AgencyKey(id string) string { return "agency-" + id }

// fileAccess files features, gateway, access policy, agencies and clients.
func fileAccess(keys string, r io.Reader, created time.Time, entry func(t identity.EntryType, id string, body any) error) error {
	for _, f := range []string{identity.FeatureAccess, identity.FeatureEnrolment, identity.FeatureRetention} {
		if err := entry(identity.TypeFeature, f, identity.Feature{From: 1}); err != nil {
			return err
		}
	}
	gateway, err := newKey(r, keys, GatewayKey)
	if err != nil {
		return err
	}
	if err := entry(identity.TypeService, GatewayKey, identity.Service{Key: public(gateway),
		Signs: []identity.RecordKind{identity.KindAccess, identity.KindRequest, identity.KindOverride}}); err != nil {
		return err
	}
	if err := entry(identity.TypeAccess, identity.AccessID, access.Default()); err != nil {
		return err
	}
	filed := map[string]bool{}
	for _, c := range Clients {
		if !filed[c.Agency] {
			filed[c.Agency] = true
			k, err := newKey(r, keys, AgencyKey(c.Agency))
			if err != nil {
				return err
			}
			if err := entry(identity.TypeAgency, c.Agency, identity.Agency{Name: agencies[c.Agency], Key: public(k)}); err != nil {
				return err
			}
			if f, ok := fleets[c.Agency]; ok {
				if err := entry(identity.TypeFleet, c.Agency, f); err != nil {
					return err
				}
			}
		}
		k, err := newKey(r, keys, ClientKey(c.ID))
		if err != nil {
			return err
		}
		if err := entry(identity.TypeClient, c.ID, identity.Client{Agency: c.Agency, TokenKey: identity.PublicKey(k.Public().(ed25519.PublicKey)),
			Roles: c.Roles, Until: created.UTC().Add(clientsFor).Truncate(time.Second).Format(time.RFC3339)}); err != nil {
			return err
		}
	}
	return nil
}
