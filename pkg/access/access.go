package access

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Object is one thing that a call touches.
type Object struct {
	// Type is District, Junction, Record, Request, Override, Device, Entry, Claim,
	// Proposal or Access.
	Type string
	ID   string
	// Agency whose object it is, Kind of a record, Junction that it is about; empty
	// where there is none, or where it is not known before the call.
	Agency, Kind, Junction string
}

// String returns the object as access records name it, such as junction:J3.
func (o Object) String() string { return strings.ToLower(o.Type) + ":" + o.ID }

// Principal is who asks.
type Principal struct {
	// ID of the client in the registry; empty is the public.
	ID string
	// Client is its entry; not looked at for the public.
	Client identity.Client
}

// Call is what is asked, why and when.
type Call struct {
	Principal Principal
	// Method's full name, such as /stopline.v1.EvidenceService/GetBundle.
	Method  string
	Objects []Object
	// Purpose, Case and LegalBasis as they were given.
	Purpose, Case, LegalBasis string
	// ApprovedBy is a second person, where there is one.
	ApprovedBy string
	// Time by the gateway's clock.
	Time time.Time
}

// Decision is the answer and its reasons.
type Decision struct {
	Granted bool
	// Policies that decided, by the id that their @id annotation gives, in order.
	Policies []string
	// Reason is for people: why not, or by what.
	Reason string
	// CovertDays is for how many days the purpose lets the reading stay out of
	// listings.
	CovertDays int
}

// Engine is a compiled access policy; it never changes and can be used by many.
type Engine struct {
	district traffic.DistrictID
	version  string
	purposes map[string]identity.AccessPurpose
	set      *cedar.PolicySet
	names    map[cedar.PolicyID]string
}

// Version of the policy.
func (e *Engine) Version() string { return e.version }

// Compile makes an engine of a policy. Every Cedar policy must have an @id, each
// another: access records name them.
func Compile(d traffic.DistrictID, p identity.AccessPolicy) (*Engine, error) {
	set, err := cedar.NewPolicySetFromBytes("access", []byte(p.Cedar))
	if err != nil {
		return nil, fmt.Errorf("access policy %s: %w", p.Version, err)
	}
	e := &Engine{district: d, version: p.Version, purposes: map[string]identity.AccessPurpose{}, set: set, names: map[cedar.PolicyID]string{}}
	for _, u := range p.Purposes {
		e.purposes[u.Code] = u
	}
	var errs []error
	seen := map[string]bool{}
	for id, policy := range set.All() {
		name := string(policy.Annotations()["id"])
		switch at := policy.Position(); {
		case name == "":
			errs = append(errs, fmt.Errorf("access policy %s: line %d: the policy needs an @id", p.Version, at.Line))
		case seen[name]:
			errs = append(errs, fmt.Errorf("access policy %s: line %d: @id(%q) is there twice", p.Version, at.Line, name))
		}
		seen[name] = true
		e.names[id] = name
	}
	slices.SortFunc(errs, func(a, b error) int { return cmp.Compare(a.Error(), b.Error()) })
	return e, errors.Join(errs...)
}

// Deny returns the decision against a call, with its reason.
func deny(format string, a ...any) Decision { return Decision{Reason: fmt.Sprintf(format, a...)} }

// Decide answers a call. It never fails: what cannot be decided is denied. A nil
// engine stands for no policy: it serves the public methods only.
func (e *Engine) Decide(c Call) Decision {
	m, ok := Methods[c.Method]
	if !ok {
		return deny("method: %.80q is not known", c.Method)
	}
	if m.Public {
		return Decision{Granted: true, Reason: "public"}
	}
	if e == nil {
		return deny("access policy: none is in force")
	}
	if c.Principal.ID == "" {
		return deny("client: nobody has proven who they are")
	}
	if until := c.Principal.Client.Expires(); !c.Time.Before(until) {
		return deny("client: %s ended at %s", c.Principal.ID, until.UTC().Format(time.RFC3339))
	}
	var days int
	if m.Purpose {
		u, ok := e.purposes[c.Purpose]
		switch {
		case c.Purpose == "":
			return deny("purpose: must be given, one of %s", strings.Join(e.Purposes(), ", "))
		case !ok:
			return deny("purpose: %.40q is not in the list, which is %s", c.Purpose, strings.Join(e.Purposes(), ", "))
		case u.Case && c.Case == "":
			return deny("case: purpose %s asks for a case number", u.Code)
		case len(u.LegalBases) > 0 && !slices.Contains(u.LegalBases, c.LegalBasis):
			return deny("legal basis: purpose %s asks for one of %s", u.Code, strings.Join(u.LegalBases, ", "))
		case len(u.LegalBases) == 0 && c.LegalBasis != "":
			return deny("legal basis: purpose %s knows none", u.Code)
		}
		days = u.CovertDays
	}
	objects := c.Objects
	if len(objects) == 0 {
		objects = []Object{{Type: "District", ID: string(e.district)}}
	}
	d := Decision{Granted: true, CovertDays: days}
	for _, o := range objects {
		one := e.decide(c, m, o)
		if !one.Granted {
			return one
		}
		d.Policies = append(d.Policies, one.Policies...)
	}
	slices.Sort(d.Policies)
	d.Policies = slices.Compact(d.Policies)
	d.Reason = "allowed by " + strings.Join(d.Policies, ", ")
	return d
}

// Purposes lists the codes of the policy, in order.
func (e *Engine) Purposes() []string {
	out := make([]string, 0, len(e.purposes))
	for c := range e.purposes {
		out = append(out, c)
	}
	slices.Sort(out)
	return out
}

func uid(t, id string) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(t), cedar.String(id))
}

// decide asks Cedar about one object.
func (e *Engine) decide(c Call, m Method, o Object) Decision {
	who, what, where := uid("Client", c.Principal.ID), uid("Action", path.Base(c.Method)), uid(o.Type, o.ID)
	district := uid("District", string(e.district))
	client := c.Principal.Client
	parents := []cedar.EntityUID{uid("Agency", client.Agency)}
	roles := make([]cedar.Value, 0, len(client.Roles))
	for _, r := range client.Roles {
		parents = append(parents, uid("Role", r))
		roles = append(roles, cedar.String(r))
	}
	entities := cedar.EntityMap{
		who: {UID: who, Parents: cedar.NewEntityUIDSet(parents...), Attributes: cedar.NewRecord(cedar.RecordMap{
			"agency": cedar.String(client.Agency), "roles": cedar.NewSet(roles...)})},
		what: {UID: what, Parents: cedar.NewEntityUIDSet(uid("Action", m.Group))},
	}
	thing := cedar.Entity{UID: where, Attributes: cedar.NewRecord(cedar.RecordMap{
		"agency": cedar.String(o.Agency), "kind": cedar.String(o.Kind), "junction": cedar.String(o.Junction)})}
	if where != district {
		thing.Parents = cedar.NewEntityUIDSet(district)
	}
	entities[where] = thing
	verdict, diag := cedar.Authorize(e.set, entities, cedar.Request{Principal: who, Action: what, Resource: where,
		Context: cedar.NewRecord(cedar.RecordMap{
			"purpose": cedar.String(c.Purpose), "case": cedar.String(c.Case), "legal_basis": cedar.String(c.LegalBasis),
			"approved_by": cedar.String(c.ApprovedBy), "time": cedar.NewDatetime(c.Time)})})
	d := Decision{Granted: verdict == cedar.Allow}
	for _, r := range diag.Reasons {
		d.Policies = append(d.Policies, e.names[r.PolicyID])
	}
	slices.Sort(d.Policies)
	if len(diag.Errors) > 0 {
		bad := diag.Errors[0]
		return deny("policy %s cannot be evaluated for %s: %s", e.names[bad.PolicyID], o, bad.Message)
	}
	switch {
	case d.Granted:
	case len(d.Policies) > 0:
		d.Reason = fmt.Sprintf("%s: forbidden by %s", o, strings.Join(d.Policies, ", "))
	default:
		d.Reason = fmt.Sprintf("%s: no policy allows %s to %s with roles %s for purpose %q", o, c.Principal.ID, path.Base(c.Method), strings.Join(client.Roles, ", "), c.Purpose)
	}
	return d
}
