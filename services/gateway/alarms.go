package gateway

import (
	"cmp"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"
)

// AlarmView is something that the auditor has found to be wrong with the log.
type AlarmView struct {
	ID     string    `json:"id"`
	Rule   string    `json:"rule"`
	Detail string    `json:"detail"`
	Since  time.Time `json:"since"`

	heard time.Time // by the wall clock
}

const (
	// alarmsFor is how long an alarm is shown that the auditor tells no more, and
	// has not cleared either: it tells every 10 s while it runs.
	alarmsFor = 5 * time.Minute
	// maxAlarms bounds what is shown.
	maxAlarms   = 64
	maxAlarmLen = 4 << 10
)

// alarm takes what the auditor tells. Nothing signs it: it is for people, who
// then look at the proof.
func (g *Gateway) alarm(data []byte) {
	if err := g.takeAlarm(data, time.Now()); err != nil {
		g.log.Warn("alarm refused", "err", err)
	}
}

func (g *Gateway) takeAlarm(data []byte, now time.Time) error {
	var a struct {
		AlarmView
		Cleared *time.Time `json:"cleared"`
	}
	if len(data) > maxAlarmLen {
		return errors.New("alarm: too long")
	}
	if err := json.Unmarshal(data, &a); err != nil {
		return err
	}
	if a.ID == "" || a.Rule == "" {
		return errors.New("alarm: id and rule must be given")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.alarms = slices.DeleteFunc(g.alarms, func(o AlarmView) bool { return o.ID == a.ID })
	if a.Cleared == nil && len(g.alarms) < maxAlarms {
		a.heard = now
		g.alarms = append(g.alarms, a.AlarmView)
	}
	g.changed()
	return nil
}

// standing returns the alarms to show. Caller holds mu.
func (g *Gateway) standing(now time.Time) []AlarmView {
	out := slices.Clone(g.alarms)
	out = slices.DeleteFunc(out, func(a AlarmView) bool { return now.Sub(a.heard) > alarmsFor })
	slices.SortFunc(out, func(a, b AlarmView) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID)) })
	return out
}
