package topic

import (
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func TestToken(t *testing.T) {
	for in, want := range map[string]string{
		"": "=", "rsu-h0101": "rsu-h0101", "a.b": "a=2Eb", "*": "=2A", ">": "=3E", "a b": "a=20b",
		"=": "=3D", "ä": "=C3=A4", "Kreuz_7": "Kreuz_7", "\x00\n": "=00=0A", "\xff": "=FF",
	} {
		if got := Token(in); got != want {
			t.Errorf("Token(%q): got %q, want %q", in, got, want)
		}
	}
}

// FuzzToken: any name is exactly one token, without wildcards, and no two names
// meet.
func FuzzToken(f *testing.F) {
	f.Add("a.b", "a=2Eb")
	f.Add("", "=")
	f.Add("\xff", "=FF")
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := Token(a), Token(b)
		if x == "" || strings.ContainsAny(x, ".*> \t\r\n\x00") {
			t.Errorf("Token(%q): got %q, which is no token", a, x)
		}
		if (a == b) != (x == y) {
			t.Errorf("got %q and %q for %q and %q", x, y, a, b)
		}
	})
}

// matches is NATS's rule for subjects and patterns, told plainly.
func matches(pattern, subject string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, x := range p {
		switch {
		case x == ">":
			return i < len(s)
		case i >= len(s) || x != "*" && x != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// all are the subjects of a district by the stream that keeps them; "" is none.
func all(d traffic.DistrictID) map[string]string {
	return map[string]string{
		Inbox(d, "frame", "rsu-1"): "", Inbox(d, "command", "a.b"): "",
		Ingress(d): IngressStream, Accepted(d): AcceptedStream,
		Quarantine(d, "signature"): QuarantineStream, Quarantine(d, "a.b"): QuarantineStream,
		BFT(d, 1, 2): "", Sync(d, 3): "", Cosign(d, 4): "",
		Decision(d, 1): DecisionStream, Decision(d, 18446744073709551615): DecisionStream,
		Seal(d): SealStream, Command(d, "j1"): "", Status(d, "j1"): StatusStream, Status(d, "j 1"): StatusStream,
		Dead(d, "validation"): DeadStream,
		DeviceUp(d, "rsu-1"):  "", DeviceDown(d, "a.b/c"): "",
	}
}

// TestStreams: each subject is kept by the stream that it is meant for and by no
// other, here and in no other district.
func TestStreams(t *testing.T) {
	for _, d := range []traffic.DistrictID{"harbour", "a.b", ">", ""} {
		for subject, want := range all(d) {
			if strings.ContainsAny(subject, "*> ") || !strings.HasPrefix(subject, "stopline."+Token(string(d))+".") {
				t.Errorf("%q is no subject of district %q", subject, d)
			}
			got := ""
			for _, s := range Streams(d) {
				for _, p := range s.Subjects {
					if matches(p, subject) {
						got += s.Name
					}
				}
			}
			if got != want {
				t.Errorf("%s is kept by %q, want %q", subject, got, want)
			}
			for _, s := range Streams("airport") {
				for _, p := range s.Subjects {
					if matches(p, subject) {
						t.Errorf("%s is kept by %s of another district", subject, s.Name)
					}
				}
			}
		}
	}
	names := map[string]bool{}
	for _, s := range Streams("harbour") {
		if names[s.Name] {
			t.Errorf("stream %s is declared twice", s.Name)
		}
		names[s.Name] = true
		if s.MaxAge <= 0 || s.MaxBytes <= 0 || s.MaxMsgSize <= 0 || s.MaxMsgSize > MaxPayload || s.Duplicates <= 0 {
			t.Errorf("stream %s is not bounded: %+v", s.Name, s)
		}
	}
	// What carries payloads on the way must never push out the oldest.
	for _, s := range Streams("harbour") {
		if (s.Name == IngressStream || s.Name == AcceptedStream) && s.DiscardOld {
			t.Errorf("stream %s drops records that nobody has seen yet", s.Name)
		}
	}
}

func TestPatterns(t *testing.T) {
	const d = traffic.DistrictID("harbour")
	for _, tt := range []struct {
		pattern string
		yes, no []string
	}{
		{InboxAll(d), []string{Inbox(d, "frame", "rsu-1"), Inbox(d, "x.y", "z")}, []string{Ingress(d), Inbox("airport", "frame", "rsu-1"), Command(d, "in")}},
		{BFTTo(d, 1), []string{BFT(d, 1, 2), BFT(d, 1, 4)}, []string{BFT(d, 2, 1), BFT(d, 11, 2)}},
		{DecisionAll(d), []string{Decision(d, 1), Decision(d, 99)}, []string{Decision("airport", 1), Sync(d, 1)}},
		{QuarantineAll(d), []string{Quarantine(d, "size")}, []string{Accepted(d)}},
		{StatusAll(d), []string{Status(d, "j1")}, []string{Command(d, "j1")}},
		{DeviceUpAll(d), []string{DeviceUp(d, "rsu-1"), DeviceUp(d, "a.b"), DeviceUp(d, "")}, []string{DeviceDown(d, "rsu-1"), DeviceUp("airport", "rsu-1"), Ingress(d)}},
		{DeviceDownAll(d), []string{DeviceDown(d, "rsu-1")}, []string{DeviceUp(d, "rsu-1"), DeviceDown("airport", "rsu-1"), Seal(d)}},
	} {
		for _, s := range tt.yes {
			if !matches(tt.pattern, s) {
				t.Errorf("%s does not match %s", tt.pattern, s)
			}
		}
		for _, s := range tt.no {
			if matches(tt.pattern, s) {
				t.Errorf("%s matches %s", tt.pattern, s)
			}
		}
	}
	if got, want := BFT(d, 1, 2), "stopline.harbour.bft.1.2"; got != want {
		t.Errorf("got %s, want %s: to, then from", got, want)
	}
}

func TestDevices(t *testing.T) {
	if got, want := MQTT(DeviceUp("harbour", "rsu-1")), "stopline/harbour/device/rsu-1/up"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for _, dev := range []traffic.DeviceID{"rsu-1", "a.b", "a/b", "#", "+", "", "ä >*", "$JS"} {
		up := DeviceUp("harbour", dev)
		if strings.ContainsAny(MQTT(up), "#+") || strings.Count(MQTT(up), "/") != 4 {
			t.Errorf("%q: %q is no MQTT topic of four levels", dev, MQTT(up))
		}
		token, down, ok := DeviceOf("harbour", up)
		if !ok || token != Token(string(dev)) || down != DeviceDown("harbour", dev) {
			t.Errorf("%q: got %q, %q, %v", dev, token, down, ok)
		}
	}
	for _, bad := range []string{DeviceUp("airport", "rsu-1"), DeviceDown("harbour", "rsu-1"), "stopline.harbour.device..up", "stopline.harbour.device.a.b.up", "stopline.harbour.device.up", Ingress("harbour"), ""} {
		if token, _, ok := DeviceOf("harbour", bad); ok {
			t.Errorf("%q: got device %q, want none", bad, token)
		}
	}
}

func TestDurables(t *testing.T) {
	names := map[string]bool{ValidationDurable: true, SealingDurable: true, AuditDurable: true}
	for v := range uint64(7) {
		n := ConsensusDurable(v)
		if names[n] || Token(n) != n {
			t.Errorf("validator %d: durable %q is taken or no token", v, n)
		}
		names[n] = true
	}
}
