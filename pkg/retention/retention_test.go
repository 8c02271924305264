package retention

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func TestClasses(t *testing.T) {
	for k, want := range map[identity.RecordKind]Class{
		identity.KindFrame: Readings, identity.KindImport: Readings, identity.KindHealth: Readings,
		identity.KindCommand: Control, identity.KindOverride: Control, identity.KindAccess: Access, identity.KindRequest: Request,
		identity.KindRegistry: Registry, identity.KindRedaction: Registry, identity.KindDeletion: Registry, identity.KindAnchor: Registry,
		"of tomorrow": Registry,
	} {
		if got := Of(k); got != want {
			t.Errorf("%s: got %s, want %s", k, got, want)
		}
	}
	if fs := Folders(); !slices.IsSorted(fs) || len(fs) != len(Classes())+2 {
		t.Errorf("got folders %v", fs)
	}
	// The registry takes a retention entry for every class but its own.
	var p identity.Retention
	for _, c := range Classes() {
		if c != Registry {
			p.Classes = append(p.Classes, identity.ClassRetention{Class: string(c), FloorS: 1, CeilingS: 1})
		}
	}
	p.Version = 1
	body, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.NewRegistry(&identity.Genesis{District: "d", Entries: []identity.Entry{{Type: identity.TypeRetention, ID: identity.RetentionID, Body: body}}}); err != nil {
		t.Errorf("every class: got %v", err)
	}
}

func TestHolds(t *testing.T) {
	at := time.Date(2026, 11, 22, 8, 14, 0, 0, time.UTC)
	f := Facts{Index: 9, Class: Readings, Junction: "a", Device: "a/unit", Time: at}
	for _, tc := range []struct {
		name string
		h    identity.Hold
		want bool
	}{
		{"everything", identity.Hold{}, true},
		{"junction", identity.Hold{Junctions: []traffic.JunctionID{"b", "a"}}, true},
		{"another junction", identity.Hold{Junctions: []traffic.JunctionID{"b"}}, false},
		{"device", identity.Hold{Devices: []traffic.DeviceID{"a/unit"}}, true},
		{"another device", identity.Hold{Devices: []traffic.DeviceID{"x"}}, false},
		{"class", identity.Hold{Classes: []string{"readings"}}, true},
		{"another class", identity.Hold{Classes: []string{"control"}}, false},
		{"time", identity.Hold{FromUnixMS: at.UnixMilli(), ToUnixMS: at.UnixMilli()}, true},
		{"later", identity.Hold{FromUnixMS: at.UnixMilli() + 1}, false},
		{"earlier", identity.Hold{ToUnixMS: at.UnixMilli() - 1}, false},
		{"leaf", identity.Hold{Leaves: []uint64{1, 9}}, true},
		{"another leaf", identity.Hold{Leaves: []uint64{1}}, false},
		{"junction, but later", identity.Hold{Junctions: []traffic.JunctionID{"a"}, FromUnixMS: at.UnixMilli() + 1}, false},
	} {
		hs := Holds{"h": &tc.h, "other": {Leaves: []uint64{1 << 40}}}
		if got := hs.Keep(f); got != tc.want || len(hs.By(f)) == 1 != tc.want {
			t.Errorf("%s: got %v, %v, want %v", tc.name, got, hs.By(f), tc.want)
		}
	}
}

func TestDue(t *testing.T) {
	now := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	p := &identity.Retention{Version: 1, Classes: []identity.ClassRetention{{Class: "readings", FloorS: 60, CeilingS: 3600}}}
	got := DueAt(p, now)
	if len(got) != 1 || got[0].Class != Readings || !got[0].MayBefore.Equal(now.Add(-time.Minute)) || !got[0].MustBefore.Equal(now.Add(-time.Hour)) {
		t.Errorf("got %+v, want from a minute to an hour back", got)
	}
	if a, b := SegmentSpan(p, Readings), SegmentSpan(p, Control); a != 1770*time.Second || b != 0 {
		t.Errorf("got spans %v, %v, want half of what is between, and none", a, b)
	}
}

func receipt() *Receipt {
	return &Receipt{Format: ReceiptFormat, District: "d", Holder: SealingHolder, Reason: ByRetention, Class: Readings,
		Ranges: []Range{{1, 4}, {8, 8}, {20, 30}}, Count: 9, Policy: make(identity.Digest, 32), AtUnixMS: 1}
}

func TestReceipt(t *testing.T) {
	r := receipt()
	b, err := r.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseReceipt(b)
	if err != nil || fmt.Sprint(back) != fmt.Sprint(r) {
		t.Errorf("got %+v, %v, want %+v", back, err, r)
	}
	var covered []uint64
	for i := range uint64(40) {
		if r.Covers(i) {
			covered = append(covered, i)
		}
	}
	if got, want := fmt.Sprint(covered), "[1 2 3 4 8 20 21 22 23 24 25 26 27 28 29 30]"; got != want {
		t.Errorf("covers: got %v, want %v", got, want)
	}
	for want, change := range map[string]func(*Receipt){
		"format":     func(r *Receipt) { r.Format = "v2" },
		"district":   func(r *Receipt) { r.District = "" },
		"holder":     func(r *Receipt) { r.Holder = "" },
		"reason":     func(r *Receipt) { r.Reason = "because" },
		"class":      func(r *Receipt) { r.Class = Registry },
		"ranges: 0":  func(r *Receipt) { r.Ranges = nil },
		"ranges[1]":  func(r *Receipt) { r.Ranges[1].First = 4 },
		"ranges[2]":  func(r *Receipt) { r.Ranges[2].Last = 19 },
		"single":     func(r *Receipt) { r.Reason = ByRedaction },
		"policy":     func(r *Receipt) { r.Policy = nil },
		"at_unix_ms": func(r *Receipt) { r.AtUnixMS = 0 },
	} {
		bad := receipt()
		change(bad)
		if _, err := bad.Marshal(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error that names it", want, err)
		}
	}
	for _, junk := range []string{"", "{}", string(b) + "{}", strings.Replace(string(b), `"count"`, `"number"`, 1)} {
		if _, err := ParseReceipt([]byte(junk)); err == nil {
			t.Errorf("%.40q: got no error", junk)
		}
	}
}

func FuzzParseReceipt(f *testing.F) {
	b, err := receipt().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseReceipt(b)
		if err != nil {
			return
		}
		again, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseReceipt(again); err != nil || fmt.Sprint(back) != fmt.Sprint(r) {
			t.Errorf("got %+v, %v, want %+v", back, err, r)
		}
	})
}

func TestExplained(t *testing.T) {
	var x Explained
	if why, ok := x.Why(3, [32]byte{}); ok {
		t.Errorf("without a word in the log: got %q", why)
	}
	x.Receipt(50, receipt())
	other := receipt()
	other.Holder, other.Ranges = identity.DeletionID(1), []Range{{40, 40}}
	x.Receipt(51, other)
	x.Tombstone(identity.Tombstone{Index: 33, Since: 7, Redaction: identity.Redaction{Commitment: make(identity.Digest, 32), Basis: "minor"}})
	for _, tc := range []struct {
		index  uint64
		commit byte
		want   string
	}{
		{3, 0, "leaf 50"}, {5, 0, ""}, {33, 0, "redacted by block 7, legal basis minor"}, {33, 1, ""},
		{40, 0, ""}, // a validator's word says nothing of the payload store
	} {
		why, ok := x.Why(tc.index, [32]byte{tc.commit})
		if ok != (tc.want != "") || !strings.Contains(why, tc.want) {
			t.Errorf("leaf %d: got %q, %v, want %q", tc.index, why, ok, tc.want)
		}
	}
}
