package access

import (
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func client(id, agency string, roles ...string) Principal {
	return Principal{ID: id, Client: identity.Client{Agency: agency, Roles: roles, Until: "2027-01-01T00:00:00Z"}}
}

func engine(t testing.TB) *Engine {
	t.Helper()
	e, err := Compile("harbour", Default())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

const (
	state  = prefix + "TrafficService/GetJunctionState"
	bundle = prefix + "EvidenceService/GetBundle"
	ask    = prefix + "PriorityService/RequestPriority"
	cancel = prefix + "PriorityService/CancelPriority"
	export = prefix + "EvidenceService/ExportRecords"
	list   = prefix + "AccessService/ListAccess"
)

func TestDefaultPolicy(t *testing.T) {
	e := engine(t)
	fire, police, operator := client("fire-1", "fire", "dispatcher"), client("police-1", "police", "investigator"), client("op-1", "roads", "operator")
	record := func(kind, agency string) []Object {
		return []Object{{Type: "Record", ID: "17", Kind: kind, Agency: agency}}
	}
	mine, theirs := []Object{{Type: "Request", ID: "a", Agency: "fire"}}, []Object{{Type: "Request", ID: "b", Agency: "bus"}}
	for _, tc := range []struct {
		name string
		call Call
		want string // the policy that allows, or a part of the reason against
		ok   bool
	}{
		{"operator looks", Call{Principal: operator, Method: state, Purpose: "operations"}, "live-operations", true},
		{"police looks without need", Call{Principal: police, Method: state, Purpose: "operations"}, "no policy allows", false},
		{"no purpose", Call{Principal: operator, Method: state}, "purpose: must be given", false},
		{"free text", Call{Principal: operator, Method: state, Purpose: "because"}, "not in the list", false},
		{"a basis where there is none", Call{Principal: operator, Method: state, Purpose: "operations", LegalBasis: "warrant"}, "knows none", false},
		{"corridor", Call{Principal: fire, Method: ask, Purpose: "emergency-response"}, "emergency-corridor", true},
		{"own request ended", Call{Principal: fire, Method: cancel, Purpose: "emergency-response", Objects: mine}, "emergency-corridor", true},
		{"another's request ended", Call{Principal: fire, Method: cancel, Purpose: "emergency-response", Objects: theirs}, "request:b: no policy", false},
		{"one of two is another's", Call{Principal: fire, Method: cancel, Purpose: "emergency-response", Objects: append(mine, theirs...)}, "request:b", false},
		{"operators do not ask for corridors", Call{Principal: operator, Method: ask, Purpose: "operations"}, "no policy", false},
		{"police by case", Call{Principal: police, Method: bundle, Purpose: "investigation", Case: "K-17/26", LegalBasis: "warrant", Objects: record("frame", "")}, "investigators-read-by-case", true},
		{"police without a case", Call{Principal: police, Method: bundle, Purpose: "investigation", LegalBasis: "warrant"}, "case: purpose investigation asks", false},
		{"police without a basis", Call{Principal: police, Method: bundle, Purpose: "investigation", Case: "K-17/26", LegalBasis: "hunch"}, "legal basis: purpose investigation asks", false},
		{"operator reads who read", Call{Principal: operator, Method: bundle, Purpose: "operations", Objects: record("access", "")}, "no policy", false},
		{"export alone", Call{Principal: police, Method: export, Purpose: "investigation", Case: "K", LegalBasis: "warrant"}, "no policy", false},
		{"export by two", Call{Principal: police, Method: export, Purpose: "investigation", Case: "K", LegalBasis: "warrant", ApprovedBy: "police-2"}, "exports", true},
		{"own access", Call{Principal: fire, Method: list, Purpose: "emergency-response", Objects: []Object{{Type: "Access", ID: "fire", Agency: "fire"}}}, "own-access", true},
		{"others' access", Call{Principal: fire, Method: list, Purpose: "emergency-response", Objects: []Object{{Type: "Access", ID: "police", Agency: "police"}}}, "no policy", false},
		{"nobody", Call{Method: state, Purpose: "operations"}, "nobody has proven", false},
		{"unknown method", Call{Principal: operator, Method: "/x/Y", Purpose: "operations"}, "is not known", false},
		{"public", Call{Method: prefix + "LogService/GetCheckpoint"}, "public", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.call.Time = noon
			d := e.Decide(tc.call)
			if d.Granted != tc.ok || !strings.Contains(d.Reason, tc.want) {
				t.Errorf("got %+v, want granted %v with %q", d, tc.ok, tc.want)
			}
		})
	}
}

func TestAClientWhoseTimeIsOver(t *testing.T) {
	e, c := engine(t), Call{Principal: client("op-1", "roads", "operator"), Method: state, Purpose: "operations"}
	end := c.Principal.Client.Expires()
	if c.Time = end.Add(-time.Nanosecond); !e.Decide(c).Granted {
		t.Errorf("just before the end: %+v, want it granted", e.Decide(c))
	}
	if c.Time = end; e.Decide(c).Granted {
		t.Error("at the end it is granted still")
	}
	c.Principal.Client.Until = "soon" // no registry lets it in
	if c.Time = noon; e.Decide(c).Granted {
		t.Error("without an end it is granted")
	}
}

// Cedar passes over a policy that it cannot evaluate, even one that forbids.
func TestAPolicyThatCannotBeEvaluatedDenies(t *testing.T) {
	p := Default()
	p.Cedar += `@id("broken") forbid (principal, action, resource) when { context.nothing == 1 };`
	e, err := Compile("harbour", p)
	if err != nil {
		t.Fatal(err)
	}
	d := e.Decide(Call{Principal: client("op-1", "roads", "operator"), Method: state, Purpose: "operations", Time: noon})
	if d.Granted || !strings.Contains(d.Reason, "broken cannot be evaluated") {
		t.Errorf("got %+v, want it denied for policy broken", d)
	}
}

func TestNoPolicyNoAccess(t *testing.T) {
	var e *Engine
	if d := e.Decide(Call{Principal: client("op-1", "roads", "operator"), Method: state, Purpose: "operations", Time: noon}); d.Granted {
		t.Error("granted without a policy")
	}
	if d := e.Decide(Call{Method: prefix + "LogService/GetCheckpoint", Time: noon}); !d.Granted {
		t.Errorf("the public log: %+v, want it granted", d)
	}
}

func TestCompileRefuses(t *testing.T) {
	for name, tc := range map[string][2]string{
		"no Cedar":  {"permit all", "access policy"},
		"no id":     {"permit (principal, action, resource);", "line 1: the policy needs an @id"},
		"id twice":  {`@id("a") permit (principal, action, resource); @id("a") forbid (principal, action, resource);`, `@id("a") is there twice`},
		"cut short": {`@id("a") permit (principal, action`, "access policy"},
	} {
		p := Default()
		p.Cedar = tc[0]
		if _, err := Compile("harbour", p); err == nil || !strings.Contains(err.Error(), tc[1]) {
			t.Errorf("%s: got %v, want an error with %q", name, err, tc[1])
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	e := engine(b)
	c := Call{Principal: client("op-1", "roads", "operator"), Method: state, Purpose: "operations", Time: noon, Objects: []Object{{Type: "Junction", ID: "J3"}}}
	b.ReportAllocs()
	for b.Loop() {
		if !e.Decide(c).Granted {
			b.Fatal("denied")
		}
	}
}
