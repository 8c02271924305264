package gateway

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestAlarmsAreShownUntilTheyClear(t *testing.T) {
	g := &Gateway{waiters: make(chan struct{})}
	now := time.Now()
	tell := func(format string, args ...any) error { return g.takeAlarm(fmt.Appendf(nil, format, args...), now) }
	for _, a := range []string{
		`{"id":"fork 9","rule":"fork","detail":"two histories","since":"2026-11-01T08:00:02Z"}`,
		`{"id":"missing 4","rule":"missing","detail":"a stretch","since":"2026-11-01T08:00:01Z"}`,
		`{"id":"fork 9","rule":"fork","detail":"two histories","since":"2026-11-01T08:00:02Z"}`, // told again
	} {
		if err := tell("%s", a); err != nil {
			t.Fatal(err)
		}
	}
	got := g.standing(now)
	if len(got) != 2 || got[0].Rule != "missing" || got[1].Rule != "fork" {
		t.Fatalf("got %+v, want the missing stretch and the fork, the older first", got)
	}
	b, err := json.Marshal(View{Alarms: got})
	if err != nil || !strings.Contains(string(b), `"alarms":[{"id":"missing 4","rule":"missing"`) {
		t.Errorf("got %s, %v", b, err)
	}
	if err := tell(`{"id":"missing 4","rule":"missing","cleared":"2026-11-01T08:00:05Z"}`); err != nil {
		t.Fatal(err)
	}
	if got := g.standing(now); len(got) != 1 || got[0].ID != "fork 9" {
		t.Errorf("after clearing: got %+v, want the fork", got)
	}
	if got := g.standing(now.Add(alarmsFor + time.Second)); len(got) != 0 {
		t.Errorf("told no more: got %+v, want none", got)
	}
	for _, bad := range []string{"", "{}", `{"id":"x"}`, `{"id":"x","rule":"` + strings.Repeat("x", maxAlarmLen) + `"}`} {
		if err := tell("%s", bad); err == nil {
			t.Errorf("%.40q: got no error", bad)
		}
	}
	for i := range 2 * maxAlarms {
		if err := tell(`{"id":"%d","rule":"fork"}`, i); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.standing(now); len(got) != maxAlarms {
		t.Errorf("got %d, want at most %d", len(got), maxAlarms)
	}
}
