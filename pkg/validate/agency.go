package validate

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Bounds of what agencies ask.
const (
	maxAgencyRecord = 16 << 10 // payload, bytes
	maxObjects      = 1000
	maxRequest      = 2 * time.Hour // from now to its end
	maxRequestAhead = 2 * time.Hour // arrival at the last stop
)

// turn returns the number of a record of an agency's, and whose numbers it is in.
// Each signer numbers each kind by itself.
func turn(c *Candidate) (source string, e seen, at time.Time, ok bool) {
	var t traffic.Turn
	switch {
	case c.Access != nil:
		t, at = c.Access.Turn, c.Access.Time
	case c.Request != nil:
		t, at = c.Request.Turn, c.Request.Time
	case c.Override != nil:
		t, at = c.Override.Turn, c.Override.Time
	default:
		return "", seen{}, at, false
	}
	return string(c.Envelope.Kind) + "/" + string(c.Envelope.Key), seen{epoch: t.Epoch, seq: t.Seq, hash: payloadHash(c)}, at, true
}

// agency judges an access record, a request or an override.
func (s *State) agency(reg *identity.Registry, now time.Time, c *Candidate, h *identity.Holder) Verdict {
	name, e, at, _ := turn(c)
	switch {
	case e.epoch == 0:
		return refuse(RuleSchema, "epoch: 0, the first is 1")
	case e.seq == 0:
		return refuse(RuleSchema, "seq: 0, the first of an epoch is 1")
	}
	var v Verdict
	switch {
	case c.Access != nil:
		v = access(reg, c.Access)
	case c.Request != nil:
		v = request(reg, now, c.Request, h)
	default:
		v = override(reg, now, c.Override)
	}
	if !v.OK {
		return v
	}
	src := s.agents.get(name)
	switch r := src.place(e); r {
	case "":
	case RuleDuplicate:
		return refuse(r, "seq: this %s %d of %s %s was accepted before", c.Envelope.Kind, e.seq, h.Type, h.ID)
	case RuleEquivocation:
		return refuse(r, "seq: another %s %d of %s %s was accepted before", c.Envelope.Kind, e.seq, h.Type, h.ID)
	default:
		n := src.newest()
		return refuse(r, "seq: epoch %d sequence %d of %s %s, the last was %d sequence %d", e.epoch, e.seq, h.Type, h.ID, n.epoch, n.seq)
	}
	if d := at.Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "time: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	// However late it comes: a reading is on record, also after a long stall. What is
	// asked of signals has an end of its own.
	if v.Gap = e.seq - 1; src != nil && src.n > 0 && src.newest().epoch == e.epoch {
		v.Gap = e.seq - src.newest().seq - 1
	}
	s.agents.edit(name, s.owner).push(e, at.UnixNano())
	return v
}

// texts checks the lengths of fields.
func texts(fields ...struct{ name, v string }) (Verdict, bool) {
	for _, f := range fields {
		if len(f.v) > maxText {
			return refuse(RuleSize, "%s: %d bytes, at most %d", f.name, len(f.v), maxText), false
		}
	}
	return ok, true
}

type text = struct{ name, v string }

func access(reg *identity.Registry, m *traffic.Access) Verdict {
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	if v, ok := texts(text{"agency", m.By.Agency}, text{"subject", m.By.Name}, text{"method", m.Method},
		text{"purpose", m.Purpose}, text{"case_number", m.Case}, text{"legal_basis", m.LegalBasis}); !ok {
		return v
	}
	switch {
	case m.Method == "":
		return refuse(RuleSchema, "method: must not be empty")
	case m.Count == 0:
		return refuse(RuleSchema, "count: 0, at least 1")
	case len(m.Objects) > maxObjects:
		return refuse(RuleSize, "objects: %d, at most %d", len(m.Objects), maxObjects)
	}
	switch m.Phase {
	case traffic.AccessUnary, traffic.AccessOpened, traffic.AccessMinute, traffic.AccessClosed, traffic.AccessCounted:
	default:
		return refuse(RuleSchema, "phase: %.20q, must be unary, opened, minute, closed or counted", m.Phase)
	}
	return ok
}

// asked says which agency a signer may speak for.
func asked(reg *identity.Registry, by traffic.Agent, h *identity.Holder) Verdict {
	if h.Type == identity.TypeAgency && by.Agency != h.ID {
		return refuse(RuleDevice, "agency: %.40q, the signer is agency %s", by.Agency, h.ID)
	}
	if e, known := reg.Entry(identity.TypeAgency, by.Agency); !known || e.Status != identity.Active {
		return refuse(RuleDevice, "agency: %.40q is no agency in force", by.Agency)
	}
	return ok
}

func request(reg *identity.Registry, now time.Time, m *traffic.Request, h *identity.Holder) Verdict {
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	if v := asked(reg, m.By, h); !v.OK {
		return v
	}
	if v, ok := texts(text{"id", m.ID}, text{"requester", m.By.Name}, text{"vehicle", m.Vehicle}, text{"line", m.Line},
		text{"purpose", m.Purpose}, text{"case_number", m.Case}); !ok {
		return v
	}
	switch {
	case m.ID == "":
		return refuse(RuleSchema, "id: must not be empty")
	case m.Revision == 0:
		return refuse(RuleSchema, "revision: 0, the first is 1")
	case m.Class != traffic.Bus && m.Class != traffic.Emergency:
		return refuse(RuleSchema, "class: %d, must be 1 for transit or 2 for emergency", m.Class)
	case len(m.Stops) > traffic.MaxStops:
		return refuse(RuleSize, "stops: %d, at most %d", len(m.Stops), traffic.MaxStops)
	case len(m.Stops) == 0 && !m.Cancelled:
		return refuse(RuleSchema, "stops: none, at least 1")
	}
	if !m.Cancelled {
		switch d := m.Expires.Sub(m.Time); {
		case d <= 0:
			return refuse(RuleExpired, "expires: %s, must be later than time", seconds(d, "after time", "before time"))
		case d > maxRequest:
			return refuse(RuleExpired, "expires: %s, at most %s", seconds(d, "after time", ""), secs(maxRequest))
		}
	}
	passed := map[traffic.JunctionID]bool{}
	for i, st := range m.Stops {
		j, known := reg.Junction(st.Junction)
		if !known {
			return refuse(RuleJunction, "stops[%d].junction: %.40q is not in the registry", i, string(st.Junction))
		}
		if passed[st.Junction] {
			return refuse(RuleInconsistent, "stops[%d].junction: %q is there twice", i, string(st.Junction))
		}
		passed[st.Junction] = true
		if !hasGroup(j, st.Group) {
			return refuse(RuleInconsistent, "stops[%d].group: %.40q is no signal group for vehicles at junction %s", i, st.Group, j.ID)
		}
		if i > 0 && st.Arrival.Before(m.Stops[i-1].Arrival) {
			return refuse(RuleInconsistent, "stops[%d].arrival: before that at the stop before", i)
		}
		if d := st.Arrival.Sub(now); d > maxRequestAhead {
			return refuse(RuleClockAhead, "stops[%d].arrival: %s, at most %s", i, seconds(d, "ahead of the clock", ""), secs(maxRequestAhead))
		}
	}
	return ok
}

func hasGroup(j *traffic.Junction, name string) bool {
	for _, g := range j.Groups {
		if g.Name == name && g.Kind == traffic.Vehicles {
			return true
		}
	}
	return false
}

func override(reg *identity.Registry, now time.Time, m *traffic.Override) Verdict {
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	j, known := reg.Junction(m.Junction)
	if !known {
		return refuse(RuleJunction, "junction: %.40q is not in the registry", string(m.Junction))
	}
	if v, ok := texts(text{"id", m.ID}, text{"agency", m.By.Agency}, text{"operator", m.By.Name}, text{"plan", m.Plan}, text{"releases", m.Releases}); !ok {
		return v
	}
	if m.ID == "" {
		return refuse(RuleSchema, "id: must not be empty")
	}
	if m.By.Name == "" {
		return refuse(RuleSchema, "operator: must not be empty")
	}
	known = false
	for _, r := range traffic.OverrideReasons() {
		known = known || r == m.Reason
	}
	if !known {
		return refuse(RuleSchema, "reason: %.40q is not in the list", m.Reason)
	}
	if m.Action == traffic.OverrideRelease {
		if m.Releases == "" {
			return refuse(RuleSchema, "releases: must not be empty")
		}
		return ok
	}
	switch d := m.Expires.Sub(m.Time); {
	case d <= 0:
		return refuse(RuleExpired, "expires: %s, must be later than time", seconds(d, "after time", "before time"))
	case d > traffic.MaxOverride:
		return refuse(RuleExpired, "expires: %s, at most %s", seconds(d, "after time", ""), secs(traffic.MaxOverride))
	}
	switch m.Action {
	case traffic.OverrideHold:
		if m.Stage < -1 || m.Stage >= len(j.Stages) {
			return refuse(RuleStage, "stage: %d, junction %s has %d", m.Stage, j.ID, len(j.Stages))
		}
	case traffic.OverridePlan:
		if m.Plan == "" {
			return refuse(RuleSchema, "plan: must not be empty")
		}
	case traffic.OverrideFlash:
	default:
		return refuse(RuleSchema, "action: %.20q, must be plan, hold, flash or release", string(m.Action))
	}
	return ok
}
