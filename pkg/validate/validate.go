package validate

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Candidate is a record as it came, with what could be decoded of it.
type Candidate struct {
	// Raw is the envelope's canonical encoding, to which the log will commit.
	Raw  []byte
	Salt ledger.Salt
	// Envelope shares memory with Raw.
	Envelope identity.Envelope
	// One of these is set, by the envelope's kind.
	Frame   *traffic.Frame
	Command *traffic.Command
	Change  *identity.Change
	Import  *traffic.Import
	Health  *traffic.Health
	Plan    *traffic.Fallback
	// Deletion is a holder's receipt; Change is set for redactions too.
	Deletion *retention.Receipt
	Access   *traffic.Access
	Request  *traffic.Request
	Override *traffic.Override
	// Err says why the record could not be decoded.
	Err error
	// SignatureValid says that the signature is that of the key which the
	// envelope names, if the registry holds that key.
	SignatureValid bool
}

// Verdict is the answer to one candidate.
type Verdict struct {
	OK bool
	// Rule is the first rule that was broken, Reason the field, its value and
	// what is allowed. Both are empty where OK.
	Rule   Rule
	Reason string
	// Gap is how many of the device's frames are missing before an accepted one.
	Gap uint64
}

// Limits are the figures that some rules need. Zero fields take the value of
// [Block]. All validators of a district must use the same.
type Limits struct {
	// ClockAhead and ClockBehind bound how far a record's time may be from now.
	ClockAhead, ClockBehind time.Duration
	// LateFrames bounds how long after its time a frame may come: a roadside unit
	// that was cut off sends later what it kept. What is late is history; control
	// does not act on it. Sequence numbers keep it from being told twice.
	LateFrames time.Duration
	// MaxFrame, MaxCommand, MaxChange, MaxImport and MaxHealth bound payloads, bytes.
	MaxFrame, MaxCommand, MaxChange, MaxImport, MaxHealth int
	// MaxEvents and MaxResults bound the lists of a frame. Its readings are
	// bounded by the junction's detectors.
	MaxEvents, MaxResults int
	// MaxInterval bounds a frame's interval.
	MaxInterval time.Duration
	// CommandValidity bounds the time from issue to expiry of a command.
	CommandValidity time.Duration
}

// Block returns the limits for judging by block time. What was receipted and
// then had to wait for a quorum must not be refused for it, so the window is
// nearly as long as the streams keep a record that waits (an hour); a repeated
// record is known by its sequence and not by its age.
func Block() Limits {
	return Limits{
		ClockAhead: 2 * time.Second, ClockBehind: 50 * time.Minute, LateFrames: lateFrames + 50*time.Minute,
		MaxFrame: 64 << 10, MaxCommand: 4 << 10, MaxChange: identity.MaxEnvelope, MaxImport: 64 << 10, MaxHealth: 4 << 10,
		MaxEvents: 1024, MaxResults: 64, MaxInterval: 15 * time.Minute,
		CommandValidity: 10 * time.Second,
	}
}

// Edge returns the limits for judging by the time when ingest took the record.
func Edge() Limits {
	l := Block()
	l.ClockBehind, l.LateFrames = time.Minute, lateFrames
	return l
}

// lateFrames is how long a roadside unit may be cut off and still be heard of
// what happened meanwhile.
const lateFrames = 7 * 24 * time.Hour

func (l Limits) withDefaults() Limits {
	d := Block()
	for _, p := range []struct{ have, want *time.Duration }{
		{&l.ClockAhead, &d.ClockAhead}, {&l.ClockBehind, &d.ClockBehind}, {&l.LateFrames, &d.LateFrames},
		{&l.MaxInterval, &d.MaxInterval}, {&l.CommandValidity, &d.CommandValidity},
	} {
		if *p.have == 0 {
			*p.have = *p.want
		}
	}
	for _, p := range []struct{ have, want *int }{
		{&l.MaxFrame, &d.MaxFrame}, {&l.MaxCommand, &d.MaxCommand}, {&l.MaxChange, &d.MaxChange},
		{&l.MaxImport, &d.MaxImport}, {&l.MaxHealth, &d.MaxHealth},
		{&l.MaxEvents, &d.MaxEvents}, {&l.MaxResults, &d.MaxResults},
	} {
		if *p.have == 0 {
			*p.have = *p.want
		}
	}
	return l
}

// maxText bounds free text in a record, bytes.
const maxText = 256

func refuse(r Rule, format string, args ...any) Verdict {
	return Verdict{Rule: r, Reason: fmt.Sprintf(format, args...)}
}

var ok = Verdict{OK: true}

// Judge checks a candidate against every rule and, if all are met, remembers
// it. A refused one changes nothing, but for a second body under a device's
// number: that device is then quarantined. now is the time to judge by.
//
// A registry change is judged by its form and signer only; whether the registry
// takes it is for [identity.Registry.Apply].
func (s *State) Judge(reg *identity.Registry, now time.Time, c *Candidate) Verdict {
	if len(c.Raw) > identity.MaxEnvelope {
		return refuse(RuleSize, "envelope: %d bytes, at most %d", len(c.Raw), identity.MaxEnvelope)
	}
	e := &c.Envelope
	limit := 0
	switch e.Kind {
	case identity.KindFrame:
		limit = s.limits.MaxFrame
	case identity.KindCommand:
		limit = s.limits.MaxCommand
	case identity.KindDeletion:
		limit = maxDeletion
	case identity.KindAccess, identity.KindRequest, identity.KindOverride:
		limit = maxAgencyRecord
	case identity.KindRegistry, identity.KindRedaction:
		limit = s.limits.MaxChange
	case identity.KindImport:
		limit = s.limits.MaxImport
	case identity.KindHealth:
		limit = s.limits.MaxHealth
	case identity.KindPlan:
		limit = maxPlan
	}
	if limit > 0 && len(e.Payload) > limit {
		return refuse(RuleSize, "payload: %s of %d bytes, at most %d", e.Kind, len(e.Payload), limit)
	}
	if c.Err != nil {
		return refuse(RuleSchema, "%v", c.Err)
	}
	h, known := reg.Holder(e.Key)
	switch {
	case !known:
		return refuse(RuleUnknownKey, "key_id: %.32q is not in the registry", string(e.Key))
	case h.Status != identity.Active:
		return refuse(RuleRevoked, "key_id: %s %s has been revoked", h.Type, h.ID)
	case !h.May(e.Kind):
		return refuse(RuleMaySign, "kind: %s %s may not sign a %.20s", h.Type, h.ID, string(e.Kind))
	case limit == 0:
		return refuse(RuleKind, "kind: records of the kind %.20q are not taken", string(e.Kind))
	case !c.SignatureValid:
		return refuse(RuleSignature, "signature: is not that of %s %s over this %s", h.Type, h.ID, e.Kind)
	}
	switch {
	case e.Kind == identity.KindFrame && c.Frame != nil:
		return s.frame(reg, now, c, &h)
	case e.Kind == identity.KindCommand && c.Command != nil:
		return s.command(reg, now, c)
	case e.Kind.ChangesRegistry() && c.Change != nil:
		if redacts := c.Change.Type == identity.TypeRedaction; redacts != (e.Kind == identity.KindRedaction) {
			return refuse(RuleKind, "kind: a change of type %.20q in a record of the kind %s", string(c.Change.Type), e.Kind)
		}
		return change(reg, now, c.Change)
	case e.Kind == identity.KindDeletion && c.Deletion != nil:
		return deletion(reg, c.Deletion, &h)
	case e.Kind == identity.KindAccess && c.Access != nil, e.Kind == identity.KindRequest && c.Request != nil,
		e.Kind == identity.KindOverride && c.Override != nil:
		return s.agency(reg, now, c, &h)
	case e.Kind == identity.KindImport && c.Import != nil:
		return s.imported(reg, now, c, &h)
	case e.Kind == identity.KindHealth && c.Health != nil:
		return s.health(reg, now, c)
	case e.Kind == identity.KindPlan && c.Plan != nil:
		return s.plan(reg, now, c.Plan)
	}
	return refuse(RuleSchema, "payload: was not decoded as a %s", e.Kind)
}

// Failed returns the verdict on a record whose decoding or judging panicked with
// the value p: it is refused, so that it does not block those behind it. The
// state that was judging may be half changed; go on with a clone from before.
func Failed(p any) Verdict { return refuse(RuleInternal, "record: judging it failed: %v", p) }

func change(reg *identity.Registry, now time.Time, c *identity.Change) Verdict {
	switch {
	case c.District != reg.District():
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(c.District), string(reg.District()))
	case c.Action != "put" && c.Action != "revoke":
		return refuse(RuleRegistry, "action: %.20q, must be put or revoke", c.Action)
	case c.Type == "":
		return refuse(RuleRegistry, "type: must not be empty")
	case c.ID == "":
		return refuse(RuleRegistry, "id: must not be empty")
	case len(c.Approvals) > identity.MaxApprovals:
		return refuse(RuleRegistry, "approvals: %d, at most %d", len(c.Approvals), identity.MaxApprovals)
	case len(c.Approvals) > 0 && len(c.Base) == 0:
		return refuse(RuleRegistry, "base: must be given where there are approvals")
	}
	return claimed(reg, now, c)
}

// claimed refuses a device that comes with a claim whose time is over. The
// registry has no clock; everything else about claims it knows itself.
func claimed(reg *identity.Registry, now time.Time, c *identity.Change) Verdict {
	if c.Type != identity.TypeDevice || c.Action != identity.Put {
		return ok
	}
	var d identity.Device
	if err := json.Unmarshal(c.Body, &d); err != nil || d.Enrolled == nil || d.Enrolled.Claim == "" {
		return ok // the registry says what is wrong with it
	}
	if claim, _, filed := reg.Claim(d.Enrolled.Claim); filed && !now.Before(claim.Expires()) {
		return refuse(RuleExpired, "body.enrolled.claim: %.40q could be used until %s", string(d.Enrolled.Claim), claim.Until)
	}
	return ok
}

func payloadHash(c *Candidate) ledger.Hash { return sha256.Sum256(c.Envelope.Payload) }

func commandEntry(c *Candidate) seen { return seen{seq: c.Command.Seq, hash: payloadHash(c)} }

func (s *State) command(reg *identity.Registry, now time.Time, c *Candidate) Verdict {
	m := c.Command
	if m.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(m.District), string(reg.District()))
	}
	j, known := reg.Junction(m.Junction)
	if !known {
		return refuse(RuleJunction, "junction: %.40q is not in the registry", string(m.Junction))
	}
	if m.Seq == 0 {
		return refuse(RuleSchema, "seq: 0, the first is 1")
	}
	for _, t := range [...]struct{ field, v string }{
		{"policy", m.Policy}, {"policy_version", m.PolicyVersion}, {"controller", m.Controller},
		{"controller_version", m.ControllerVersion}, {"rule", m.Rule},
	} {
		if len(t.v) > maxText {
			return refuse(RuleSize, "%s: %d bytes, at most %d", t.field, len(t.v), maxText)
		}
	}
	if n := len(m.RestsOn.Device); n > identity.MaxID {
		return refuse(RuleSize, "rests_on.device: %d bytes, at most %d", n, identity.MaxID)
	}
	e := commandEntry(c)
	src := s.junctions.get(string(j.ID))
	// A second body under one number does not quarantine here: the sender is the
	// district's own service, which after a crash may not know its last number,
	// and without it there are no commands at all.
	switch r := src.place(e); r {
	case "":
	case RuleDuplicate:
		return refuse(r, "seq: this command %d to %s was accepted before", e.seq, j.ID)
	case RuleEquivocation:
		return refuse(r, "seq: another command %d to %s was accepted before", e.seq, j.ID)
	default:
		return refuse(r, "seq: %d to %s, the last was %d", e.seq, j.ID, src.newest().seq)
	}
	if m.Stage < 0 || m.Stage >= len(j.Stages) {
		return refuse(RuleStage, "stage: %d, junction %s has %d", m.Stage, j.ID, len(j.Stages))
	}
	valid := m.Expires.Sub(m.Issued)
	switch {
	case valid <= 0:
		return refuse(RuleExpired, "expires: %s, must be later than issued", seconds(valid, "after issued", "before issued"))
	case valid > s.limits.CommandValidity:
		return refuse(RuleExpired, "expires: %s, at most %s", seconds(valid, "after issued", ""), secs(s.limits.CommandValidity))
	}
	if d := m.Issued.Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "issued: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	// Not refused at its expiry: what a junction did obey must be sealed even if
	// agreeing on it took longer than it was in force.
	if d := now.Sub(m.Expires); d > s.limits.ClockBehind {
		return refuse(RuleExpired, "expires: %s, at most %s", seconds(d, "ago", ""), secs(s.limits.ClockBehind))
	}
	s.junctions.edit(string(j.ID), s.owner).push(e, m.Issued.UnixNano())
	return ok
}

// secs formats a duration as seconds with a decimal.
func secs(d time.Duration) string {
	ds := d.Milliseconds() / 100
	return fmt.Sprintf("%d.%d s", ds/10, ds%10)
}

// seconds formats a duration with what it means by its sign.
func seconds(d time.Duration, positive, negative string) string {
	if d < 0 {
		return secs(-d) + " " + negative
	}
	return secs(d) + " " + positive
}
