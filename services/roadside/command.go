package roadside

import (
	"crypto/ed25519"
	"fmt"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Rule names what a command was refused by: the key of [Counters] Refused.
type Rule string

// The rules for commands, in the order in which they are checked.
const (
	RuleSize      Rule = "size"      // more bytes than any command needs
	RuleDecode    Rule = "decode"    // not a canonical envelope, or one without a signature
	RuleKind      Rule = "kind"      // signed as something else than a command
	RuleKey       Rule = "key"       // no key that may command
	RuleSignature Rule = "signature" // not signed by that key
	RulePayload   Rule = "payload"   // the signed bytes are not a command
	RuleDistrict  Rule = "district"  // for another district
	RuleJunction  Rule = "junction"  // for another junction
	RuleSeq       Rule = "seq"       // replayed or reordered
	RuleBoot      Rule = "boot"      // rests on a frame of another boot of this unit
	RuleExpired   Rule = "expired"   // too late
	RuleFuture    Rule = "future"    // issued later than now, clocks differ
	RuleValidity  Rule = "validity"  // never in force, or in force for too long
	RuleInterlock Rule = "interlock" // the interlock has tripped, or refuses the stage
)

// Limits of commands.
const (
	// MaxCommand is the largest envelope of a command, bytes.
	MaxCommand = 8 << 10
	// MaxAhead is how far a command may be issued ahead of the unit's clock.
	MaxAhead = 500 * time.Millisecond
	// MaxValidity bounds a command's time from issue to expiry.
	MaxValidity = 10 * time.Second
)

// refusal is a broken rule with its reason, which names the field.
type refusal struct {
	rule   Rule
	reason string
}

func refuse(r Rule, format string, args ...any) *refusal {
	return &refusal{r, fmt.Sprintf(format, args...)}
}

// Command takes the bytes of an envelope that came as a command, and obeys it
// if no rule is broken. What it did is in the result, and in the next frame.
func (u *Unit) Command(now time.Time, envelope []byte) traffic.CommandResult {
	u.mu.Lock()
	defer u.mu.Unlock()
	c, r := u.open(envelope)
	if r != nil {
		// Nobody has signed this, so that it may not push what was signed out of
		// the next frame.
		return u.answer(&u.strays, traffic.CommandResult{}, r)
	}
	return u.obey(now, *c)
}

// Obey is [Unit.Command] after the envelope has been opened and its signature
// checked: for simulations without a pipeline, which run all other rules alike.
func (u *Unit) Obey(now time.Time, c traffic.Command) traffic.CommandResult {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.obey(now, c)
}

// open checks who signed an envelope, and returns the command in it.
func (u *Unit) open(envelope []byte) (*traffic.Command, *refusal) {
	if len(envelope) > MaxCommand {
		return nil, refuse(RuleSize, "envelope: %d bytes, at most %d", len(envelope), MaxCommand)
	}
	e, err := identity.ParseEnvelope(envelope)
	if err != nil {
		return nil, refuse(RuleDecode, "%v", err)
	}
	if e.Kind != identity.KindCommand {
		return nil, refuse(RuleKind, "kind: %q, must be %q", e.Kind, identity.KindCommand)
	}
	key, ok := u.cfg.Commander(e.Key)
	if !ok || len(key) != ed25519.PublicKeySize {
		return nil, refuse(RuleKey, "key_id: %.32q may not command here", e.Key)
	}
	if !e.Verify(key) {
		return nil, refuse(RuleSignature, "signature: not by key %s over this payload", e.Key)
	}
	c, err := wire.DecodeCommand(e.ContentType, e.Payload)
	if err != nil {
		return nil, refuse(RulePayload, "payload: %v", err)
	}
	return c, nil
}

func (u *Unit) obey(now time.Time, c traffic.Command) traffic.CommandResult {
	res := traffic.CommandResult{Seq: c.Seq}
	if r := u.judge(now, &c); r != nil {
		return u.answer(&u.results, res, r)
	}
	if err := u.sequencer.Target(c.Stage); err != nil {
		return u.answer(&u.results, res, refuse(RuleInterlock, "%v", err))
	}
	u.seq = c.Seq
	// The step to the next tick has already begun.
	u.inForce = min(u.cfg.StaleAfter, c.Expires.Sub(now)) + max(now.Sub(u.tickAt), 0)
	u.setMode(now, traffic.Coordinated)
	res.Applied = true
	return u.answer(&u.results, res, nil)
}

// judge checks a command that is known to be signed by whom it should be.
func (u *Unit) judge(now time.Time, c *traffic.Command) *refusal {
	if c.District != u.cfg.District {
		return refuse(RuleDistrict, "district: %.40q, this is %q", c.District, u.cfg.District)
	}
	if c.Junction != u.cfg.Junction.ID {
		return refuse(RuleJunction, "junction: %.40q, this is %q", c.Junction, u.cfg.Junction.ID)
	}
	if c.Seq <= u.seq {
		return refuse(RuleSeq, "seq: %d, must be above %d", c.Seq, u.seq)
	}
	// What was obeyed before a boot may not be in LastCommand.
	if r := c.RestsOn; r.Device == u.cfg.Device && r.BootEpoch != u.cfg.BootEpoch {
		return refuse(RuleBoot, "rests_on: frame %s, this is boot epoch %d", r, u.cfg.BootEpoch)
	}
	if !now.Before(c.Expires) {
		return refuse(RuleExpired, "expires: %v ago", now.Sub(c.Expires).Round(time.Millisecond))
	}
	if d := c.Issued.Sub(now); d > MaxAhead {
		return refuse(RuleFuture, "issued: %v ahead of the clock, at most %v", d.Round(time.Millisecond), MaxAhead)
	}
	if d := c.Expires.Sub(c.Issued); d <= 0 || d > MaxValidity {
		return refuse(RuleValidity, "expires: %v after issued, must be above 0 and at most %v", d.Round(time.Millisecond), MaxValidity)
	}
	if u.hand != nil {
		return refuse(RuleOverride, "%s is in force until %s", u.hand.o.ID, u.hand.o.Expires.UTC().Format(time.TimeOnly))
	}
	if err := u.monitor.Accept(c.Stage); err != nil {
		return refuse(RuleInterlock, "%v", err)
	}
	return nil
}

// Bounds of what one frame carries; pkg/validate takes 64 results and 1024
// events, each reason and trip of 256 bytes.
const (
	maxResults = 48
	maxStrays  = 16
	maxEvents  = 1024
	maxText    = 256
)

// answer counts a result and keeps it for the next frame.
func (u *Unit) answer(into *[]traffic.CommandResult, res traffic.CommandResult, r *refusal) traffic.CommandResult {
	if r == nil {
		u.counters.Applied++
	} else {
		res.Reason = cut(string(r.rule) + ": " + r.reason)
		u.counters.Refused[r.rule]++
		u.log.Warn("command refused", "intersection", u.cfg.Junction.ID, "seq", res.Seq, "rule", string(r.rule), "err", r.reason)
	}
	most := maxResults
	if into == &u.strays {
		most = maxStrays
	}
	if len(*into) >= most {
		u.counters.ResultsDropped++
		return res
	}
	*into = append(*into, res)
	return res
}

// cut makes text fit a frame: as short as it may be there, and valid UTF-8,
// because what a decoder quotes of its input may be anything.
func cut(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= maxText {
		return s
	}
	end := maxText
	for end > 0 && s[end]&0xc0 == 0x80 {
		end--
	}
	return s[:end]
}
