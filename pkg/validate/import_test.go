package validate

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// importRegistry is [registry] with the services importer and other, which may
// sign imports, and doctor, which may sign words on health.
func importRegistry(t testing.TB) *identity.Registry {
	t.Helper()
	r := registry(t, 8)
	registrar := identity.IDOf([]byte(pub("registrar")))
	for i, s := range []struct {
		id   string
		kind identity.RecordKind
	}{{"importer", identity.KindImport}, {"other", identity.KindImport}, {"doctor", identity.KindHealth}} {
		body, err := json.Marshal(identity.Service{Key: pub(s.id), Signs: []identity.RecordKind{s.kind}})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Apply(2, registrar, identity.Change{District: "harbour", Action: "put", Type: identity.TypeService, ID: s.id, Body: body, Nonce: uint64(10 + i)}); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// importOf returns a good import; mod changes it.
func importOf(mod func(m *traffic.Import)) *traffic.Import {
	m := &traffic.Import{
		District: "harbour", Importer: "importer", Run: 4, Seq: 1, Log: "log.csv.gz", SHA256: [32]byte{1}, Device: "454",
		Time: noon.Add(-20 * 365 * 24 * time.Hour), Interval: time.Second, Events: []traffic.Event{{Code: 82, Param: 3, OffsetMS: 1}, {Code: 81, Param: 3, OffsetMS: 1000}},
	}
	if mod != nil {
		mod(m)
	}
	return m
}

func signImport(t testing.TB, signer string, m *traffic.Import) *Candidate {
	c := sign(t, signer, identity.KindImport, m)
	c.Import = m
	return c
}

// word returns a good word on health; mod changes it.
func word(mod func(h *traffic.Health)) *traffic.Health {
	h := &traffic.Health{
		District: "harbour", Junction: "j1", Seq: 7 << 16, Height: 7, RestsOn: traffic.FrameKey{Device: "d1", BootEpoch: 3, Seq: 9},
		Detector: "adv", Failed: true, Rule: "chatter", Reason: "41 counted within 30 s, at most 37", Time: noon, Since: noon.Add(-30 * time.Second),
	}
	if mod != nil {
		mod(h)
	}
	return h
}

func signWord(t testing.TB, signer string, h *traffic.Health) *Candidate {
	c := sign(t, signer, identity.KindHealth, h)
	c.Health = h
	return c
}

// TestImportRefused: each rule by a record that breaks just that one, and by one
// that just does not.
func TestImportRefused(t *testing.T) {
	reg := importRegistry(t)
	long := func(n int) string { return strings.Repeat("x", n) }
	events := func(n int) []traffic.Event {
		out := make([]traffic.Event, n)
		for i := range out {
			out[i].OffsetMS = 1
		}
		return out
	}
	for _, tc := range []struct {
		name   string
		mod    func(m *traffic.Import)
		rule   Rule // "" is good
		reason string
	}{
		{"good", nil, "", ""},
		{"another district", func(m *traffic.Import) { m.District = "hills" }, RuleDistrict, `district: "hills", this is "harbour"`},
		{"another importer", func(m *traffic.Import) { m.Importer = "other" }, RuleDevice, `importer: "other", the signer is service importer`},
		{"run 0", func(m *traffic.Import) { m.Run = 0 }, RuleSchema, "run: 0"},
		{"seq 0", func(m *traffic.Import) { m.Seq = 0 }, RuleSchema, "seq: 0"},
		{"log's name", func(m *traffic.Import) { m.Log = long(257) }, RuleSize, "log: 257 bytes, at most 256"},
		{"log's name, just", func(m *traffic.Import) { m.Log = long(256) }, "", ""},
		{"no device", func(m *traffic.Import) { m.Device = "" }, RuleSchema, "device: must not be empty"},
		{"device", func(m *traffic.Import) { m.Device = traffic.DeviceID(long(identity.MaxID + 1)) }, RuleSize, "device: "},
		{"device, just", func(m *traffic.Import) { m.Device = traffic.DeviceID(long(identity.MaxID)) }, "", ""},
		{"ahead", func(m *traffic.Import) { m.Time = noon.Add(2*time.Second + 1) }, RuleClockAhead, "time: 2.0 s ahead of the clock"},
		{"ahead, just not", func(m *traffic.Import) { m.Time = noon.Add(2 * time.Second) }, "", ""},
		{"no interval", func(m *traffic.Import) { m.Interval = 0 }, RuleSchema, "interval: 0 ms"},
		{"negative interval", func(m *traffic.Import) { m.Interval = -time.Second }, RuleSchema, "interval: -1000 ms"},
		{"interval", func(m *traffic.Import) { m.Interval = 15*time.Minute + 1 }, RuleSchema, "interval: 900000 ms"},
		{"interval, just", func(m *traffic.Import) { m.Interval = 15 * time.Minute }, "", ""},
		{"no events", func(m *traffic.Import) { m.Events = nil }, RuleSize, "events: 0"},
		{"events", func(m *traffic.Import) { m.Events = events(1025) }, RuleSize, "events: 1025, 1 to 1024"},
		{"events, just", func(m *traffic.Import) { m.Events = events(1024) }, "", ""},
		{"event at the end", func(m *traffic.Import) { m.Events[1].OffsetMS = 0 }, RuleSchema, "events[1].offset_ms: 0, 1 to 1000"},
		{"event before the beginning", func(m *traffic.Import) { m.Events[0].OffsetMS = 1001 }, RuleSchema, "events[0].offset_ms: 1001, 1 to 1000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := NewState(Limits{})
			c := signImport(t, "importer", importOf(tc.mod))
			if tc.rule == "" {
				mustAccept(t, s, reg, noon, c)
				return
			}
			if v := mustRefuse(t, s, reg, noon, c, tc.rule); !strings.Contains(v.Reason, tc.reason) {
				t.Errorf("got %q, want %q", v.Reason, tc.reason)
			}
		})
	}
}

// TestImportOrder: runs rise, numbers rise within a run; what comes twice is
// known, what is missing is counted.
func TestImportOrder(t *testing.T) {
	reg := importRegistry(t)
	s := NewState(Limits{})
	at := func(run, seq uint64, mod func(m *traffic.Import)) *Candidate {
		return signImport(t, "importer", importOf(func(m *traffic.Import) {
			m.Run, m.Seq = run, seq
			if mod != nil {
				mod(m)
			}
		}))
	}
	other := func(m *traffic.Import) { m.Device = "227" }
	for _, tc := range []struct {
		name     string
		run, seq uint64
		mod      func(m *traffic.Import)
		rule     Rule
		gap      uint64
	}{
		{"the first, not from its beginning", 4, 3, nil, "", 2},
		{"the next", 4, 4, nil, "", 0},
		{"again", 4, 4, nil, RuleDuplicate, 0},
		{"another in its place", 4, 4, other, RuleEquivocation, 0},
		{"one that was left out", 4, 2, nil, RuleReordered, 0},
		{"a gap", 4, 8, nil, "", 3},
		{"into the gap", 4, 6, nil, RuleReordered, 0},
		{"an earlier run", 3, 9, nil, RuleReordered, 0},
		{"another run", 9, 1, nil, "", 0},
		{"the run before", 4, 9, nil, RuleReordered, 0},
	} {
		c := at(tc.run, tc.seq, tc.mod)
		if tc.rule != "" {
			mustRefuse(t, s, reg, noon, c, tc.rule)
		} else if v := mustAccept(t, s, reg, noon, c); v.Gap != tc.gap {
			t.Errorf("%s: got a gap of %d, want %d", tc.name, v.Gap, tc.gap)
		}
	}
	for seq := uint64(2); seq < 2+Remembered; seq++ {
		mustAccept(t, s, reg, noon, at(9, seq, nil))
	}
	mustRefuse(t, s, reg, noon, at(9, 1, nil), RuleReplay)
	// Another importer has numbers of its own; and a body twice is refused also
	// when a second one was tried in its place: nobody is quarantined.
	mustAccept(t, s, reg, noon, signImport(t, "other", importOf(func(m *traffic.Import) { m.Importer = "other" })))
	mustAccept(t, s, reg, noon, at(9, 2+Remembered, nil))
}

// TestImportKind: only a service that may, and only what was decoded as one.
func TestImportKind(t *testing.T) {
	reg := importRegistry(t)
	s := NewState(Limits{})
	mustRefuse(t, s, reg, noon, signImport(t, "control", importOf(nil)), RuleMaySign)
	mustRefuse(t, s, reg, noon, signImport(t, "d1", importOf(nil)), RuleMaySign)
	mustRefuse(t, s, reg, noon, signImport(t, "nobody", importOf(nil)), RuleUnknownKey)
	forged := signImport(t, "importer", importOf(nil))
	forged.SignatureValid = false
	mustRefuse(t, s, reg, noon, forged, RuleSignature)
	empty := signImport(t, "importer", importOf(nil))
	empty.Import = nil
	mustRefuse(t, s, reg, noon, empty, RuleSchema)
	big := signImport(t, "importer", importOf(nil))
	big.Envelope.Payload = make([]byte, 64<<10+1)
	mustRefuse(t, s, reg, noon, big, RuleSize)
}

// TestHealthRefused: each rule by a word that breaks just that one, and by one
// that just does not.
func TestHealthRefused(t *testing.T) {
	reg := importRegistry(t)
	long := func(n int) string { return strings.Repeat("x", n) }
	for _, tc := range []struct {
		name   string
		mod    func(h *traffic.Health)
		rule   Rule
		reason string
	}{
		{"good", nil, "", ""},
		{"of long ago", func(h *traffic.Health) { h.Time, h.Since = noon.Add(-1000*time.Hour), noon.Add(-2000*time.Hour) }, "", ""},
		{"another district", func(h *traffic.Health) { h.District = "hills" }, RuleDistrict, `district: "hills"`},
		{"no such junction", func(h *traffic.Health) { h.Junction = "j9" }, RuleJunction, `junction: "j9" is not in the registry`},
		{"no such detector", func(h *traffic.Health) { h.Detector = "adv2" }, RuleDetector, `detector: "adv2" is not one of junction j1`},
		{"seq 0", func(h *traffic.Health) { h.Seq = 0 }, RuleSchema, "seq: 0"},
		{"no rule", func(h *traffic.Health) { h.Rule = "" }, RuleSchema, "rule: must not be empty"},
		{"rule", func(h *traffic.Health) { h.Rule = long(257) }, RuleSize, "rule: 257 bytes, at most 256"},
		{"rule, just", func(h *traffic.Health) { h.Rule = long(256) }, "", ""},
		{"reason", func(h *traffic.Health) { h.Reason = long(257) }, RuleSize, "reason: 257 bytes, at most 256"},
		{"reason, just", func(h *traffic.Health) { h.Reason = long(256) }, "", ""},
		{"device", func(h *traffic.Health) { h.RestsOn.Device = traffic.DeviceID(long(identity.MaxID + 1)) }, RuleSize, "rests_on.device: "},
		{"device, just", func(h *traffic.Health) { h.RestsOn.Device = traffic.DeviceID(long(identity.MaxID)) }, "", ""},
		{"ahead", func(h *traffic.Health) { h.Time = noon.Add(2*time.Second + 1) }, RuleClockAhead, "time: 2.0 s ahead of the clock"},
		{"ahead, just not", func(h *traffic.Health) { h.Time = noon.Add(2 * time.Second) }, "", ""},
		{"since after", func(h *traffic.Health) { h.Since = h.Time.Add(1) }, RuleInconsistent, "since: 0.0 s after time"},
		{"since, just", func(h *traffic.Health) { h.Since = h.Time }, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := NewState(Limits{})
			c := signWord(t, "doctor", word(tc.mod))
			if tc.rule == "" {
				mustAccept(t, s, reg, noon, c)
				return
			}
			if v := mustRefuse(t, s, reg, noon, c, tc.rule); !strings.Contains(v.Reason, tc.reason) {
				t.Errorf("got %q, want %q", v.Reason, tc.reason)
			}
		})
	}
	s := NewState(Limits{})
	mustRefuse(t, s, reg, noon, signWord(t, "control", word(nil)), RuleMaySign)
	empty := signWord(t, "doctor", word(nil))
	empty.Health = nil
	mustRefuse(t, s, reg, noon, empty, RuleSchema)
	big := signWord(t, "doctor", word(nil))
	big.Envelope.Payload = make([]byte, 4<<10+1)
	mustRefuse(t, s, reg, noon, big, RuleSize)
}

// TestHealthOrder: numbers rise with each word to a junction, and are those of
// that junction alone.
func TestHealthOrder(t *testing.T) {
	reg := importRegistry(t)
	s := NewState(Limits{})
	at := func(j traffic.JunctionID, seq uint64, reason string) *Candidate {
		return signWord(t, "doctor", word(func(h *traffic.Health) { h.Junction, h.Seq, h.Reason = j, seq, reason }))
	}
	mustAccept(t, s, reg, noon, at("j1", 100, "a"))
	mustRefuse(t, s, reg, noon, at("j1", 100, "a"), RuleDuplicate)
	mustRefuse(t, s, reg, noon, at("j1", 100, "b"), RuleEquivocation)
	mustRefuse(t, s, reg, noon, at("j1", 99, "a"), RuleReordered)
	// A second body quarantines nobody: without the service there is no word at all.
	mustAccept(t, s, reg, noon, at("j1", 101, "a"))
	mustAccept(t, s, reg, noon, at("j2", 5, "a"))
	for seq := uint64(1000); seq < 1000+Remembered; seq++ {
		mustAccept(t, s, reg, noon, at("j1", seq, "a"))
	}
	mustRefuse(t, s, reg, noon, at("j1", 101, "a"), RuleReplay)
	// And it survives being stored.
	n := NewState(Limits{})
	if err := n.UnmarshalBinary(encode(t, s)); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, n, reg, noon, at("j1", 1000+Remembered-1, "a"), RuleDuplicate)
	mustAccept(t, n, reg, noon, at("j2", 6, "a"))
}
