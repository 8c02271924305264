package topic

import (
	"slices"
	"strings"
	"testing"
)

func anyMatch(patterns []string, subject string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, subject) })
}

// Of each thing that says who said it there is one user who may say it.
func TestPermissionsAreOnesOwn(t *testing.T) {
	const d, n = "harbour", 12 // 1 is a prefix of 10, 11, 12
	users := map[string]Permissions{}
	for v := uint64(1); v <= n; v++ {
		users[ValidatorUser(v)] = ValidatorPermissions(d, v)
	}
	for _, name := range ServiceUsers() {
		p, err := ServicePermissions(d, name)
		if err != nil {
			t.Fatal(err)
		}
		users[name] = p
	}
	publishers := func(subject string) (out []string) {
		for name, p := range users {
			if anyMatch(p.Publish, subject) {
				out = append(out, name)
			}
		}
		slices.Sort(out)
		return out
	}
	listeners := func(subject string) (out []string) {
		for name, p := range users {
			if anyMatch(p.Subscribe, subject) {
				out = append(out, name)
			}
		}
		slices.Sort(out)
		return out
	}
	one := func(what, subject string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s %s: got %v, want %v", what, subject, got, want)
		}
	}
	for v := uint64(1); v <= n; v++ {
		self := ValidatorUser(v)
		one("publish", Decision(d, v), publishers(Decision(d, v)), self)
		one("subscribe", Sync(d, v), listeners(Sync(d, v)), self)
		one("publish", Cosign(d, v), publishers(Cosign(d, v)), SealingUser)
		one("subscribe", Cosign(d, v), listeners(Cosign(d, v)), self)
		for to := uint64(1); to <= n; to++ {
			one("publish", BFT(d, to, v), publishers(BFT(d, to, v)), self)
			one("subscribe", BFT(d, v, to), listeners(BFT(d, v, to)), self)
		}
		ack := "$JS.ACK." + AcceptedStream + "." + ConsensusDurable(v) + ".1.2.3.4.5"
		one("publish", ack, publishers(ack), self)
		next := "$JS.API.CONSUMER.MSG.NEXT." + AcceptedStream + "." + ConsensusDurable(v)
		if got := publishers(next); !slices.Contains(got, self) || slices.ContainsFunc(got, func(s string) bool { return s != self && strings.HasPrefix(s, "validator-") }) {
			t.Errorf("publish %s: got %v", next, got)
		}
	}
	one("publish", Ingress(d), publishers(Ingress(d)), IngestUser)
	one("publish", Accepted(d), publishers(Accepted(d)), ValidationUser)
	one("publish", Seal(d), publishers(Seal(d)), SealingUser)
	one("publish", Command(d, "j"), publishers(Command(d, "j")), SignalControlUser)
	one("publish", "$JS.API.STREAM.CREATE."+DecisionStream, publishers("$JS.API.STREAM.CREATE."+DecisionStream), AdminUser)
	for name, p := range users {
		for _, s := range p.Subscribe {
			if strings.HasPrefix(s, "_INBOX") && s != InboxPrefix(name)+".>" {
				t.Errorf("%s hears %s", name, s)
			}
		}
		for _, verb := range []string{"DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "RESTORE"} {
			for _, s := range Streams(d) {
				// Proposals are about the registry, whose payloads are never redacted.
				carries := s.Name != SealStream && s.Name != StatusStream && s.Name != ProposalStream
				eraser := name == EraserUser && verb == "MSG.DELETE" && carries
				if subject := "$JS.API.STREAM." + verb + "." + s.Name; anyMatch(p.Publish, subject) != eraser {
					t.Errorf("%s may %s: got %v, want %v", name, subject, !eraser, eraser)
				}
			}
		}
		for _, s := range append(slices.Clone(p.Publish), p.Subscribe...) {
			if s == ">" || s == "" || strings.HasPrefix(s, "*") {
				t.Errorf("%s: pattern %q", name, s)
			}
		}
	}
	if _, err := ServicePermissions(d, "fortune"); err == nil || !strings.Contains(err.Error(), `"fortune"`) {
		t.Errorf("an unknown service: got %v", err)
	}
}
