package validate

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

func importEntry(c *Candidate) seen {
	return seen{epoch: c.Import.Run, seq: c.Import.Seq, hash: payloadHash(c)}
}

// imported judges an import. Its time may be long past: a log is brought in when
// it is found. Runs and sequence numbers keep it from being told twice.
func (s *State) imported(reg *identity.Registry, now time.Time, c *Candidate, h *identity.Holder) Verdict {
	m := c.Import
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	if h.Type != identity.TypeService || h.ID != m.Importer {
		return refuse(RuleDevice, "importer: %.40q, the signer is %s %s", m.Importer, h.Type, h.ID)
	}
	switch {
	case m.Run == 0:
		return refuse(RuleSchema, "run: 0, the first is 1")
	case m.Seq == 0:
		return refuse(RuleSchema, "seq: 0, the first of a run is 1")
	case len(m.Log) > maxText:
		return refuse(RuleSize, "log: %d bytes, at most %d", len(m.Log), maxText)
	case m.Device == "":
		return refuse(RuleSchema, "device: must not be empty")
	case len(m.Device) > identity.MaxID:
		return refuse(RuleSize, "device: %d bytes, at most %d", len(m.Device), identity.MaxID)
	}
	e := importEntry(c)
	src := s.importers.get(m.Importer)
	switch r := src.place(e); r {
	case "":
	case RuleDuplicate:
		return refuse(r, "seq: record %d of run %d of %s was accepted before", e.seq, e.epoch, m.Importer)
	case RuleEquivocation:
		return refuse(r, "seq: another record %d of run %d of %s was accepted before", e.seq, e.epoch, m.Importer)
	default:
		n := src.newest()
		return refuse(r, "seq: run %d sequence %d of %s, the last was %d sequence %d", e.epoch, e.seq, m.Importer, n.epoch, n.seq)
	}
	v := ok
	if v.Gap = e.seq - 1; src != nil && src.n > 0 && src.newest().epoch == e.epoch {
		v.Gap = e.seq - src.newest().seq - 1
	}
	if d := m.Time.Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "time: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	if m.Interval <= 0 || m.Interval > s.limits.MaxInterval {
		return refuse(RuleSchema, "interval: %d ms, 1 to %d ms", m.Interval.Milliseconds(), s.limits.MaxInterval.Milliseconds())
	}
	if n := len(m.Events); n == 0 || n > s.limits.MaxEvents {
		return refuse(RuleSize, "events: %d, 1 to %d", n, s.limits.MaxEvents)
	}
	for i := range m.Events {
		if ms := int64(m.Events[i].OffsetMS); ms < 1 || ms > m.Interval.Milliseconds() {
			return refuse(RuleSchema, "events[%d].offset_ms: %d, 1 to %d", i, ms, m.Interval.Milliseconds())
		}
	}
	s.importers.edit(m.Importer, s.owner).push(e, now.UnixNano())
	return v
}

func healthEntry(c *Candidate) seen { return seen{seq: c.Health.Seq, hash: payloadHash(c)} }

// health judges a word on a detector's health.
func (s *State) health(reg *identity.Registry, now time.Time, c *Candidate) Verdict {
	m := c.Health
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	j, known := reg.Junction(m.Junction)
	if !known {
		return refuse(RuleJunction, "junction: %.40q is not in the registry", string(m.Junction))
	}
	if _, known := j.Detector(m.Detector); !known {
		return refuse(RuleDetector, "detector: %.40q is not one of junction %s", string(m.Detector), j.ID)
	}
	switch {
	case m.Seq == 0:
		return refuse(RuleSchema, "seq: 0, the first is 1")
	case m.Rule == "":
		return refuse(RuleSchema, "rule: must not be empty")
	case len(m.Rule) > maxText:
		return refuse(RuleSize, "rule: %d bytes, at most %d", len(m.Rule), maxText)
	case len(m.Reason) > maxText:
		return refuse(RuleSize, "reason: %d bytes, at most %d", len(m.Reason), maxText)
	case len(m.RestsOn.Device) > identity.MaxID:
		return refuse(RuleSize, "rests_on.device: %d bytes, at most %d", len(m.RestsOn.Device), identity.MaxID)
	}
	e := healthEntry(c)
	src := s.healths.get(string(j.ID))
	switch r := src.place(e); r {
	case "":
	case RuleDuplicate:
		return refuse(r, "seq: this word %d on %s was accepted before", e.seq, j.ID)
	case RuleEquivocation:
		return refuse(r, "seq: another word %d on %s was accepted before", e.seq, j.ID)
	default:
		return refuse(r, "seq: %d on %s, the last was %d", e.seq, j.ID, src.newest().seq)
	}
	if d := m.Time.Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "time: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	if d := m.Since.Sub(m.Time); d > 0 {
		return refuse(RuleInconsistent, "since: %s", seconds(d, "after time", ""))
	}
	s.healths.edit(string(j.ID), s.owner).push(e, m.Time.UnixNano())
	return ok
}
