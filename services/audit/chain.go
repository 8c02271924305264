package audit

import (
	"context"
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Role of a record in a chain.
type Role string

// The roles, in the order of a chain.
const (
	RoleReading  Role = "reading"  // on which the decision rests
	RoleDecision Role = "decision" // the command
	RoleResponse Role = "response" // the frame that first says what became of it
	RoleLamps    Role = "lamps"    // what was shown at the time asked for, where that is another frame
)

// Chain answers why a junction did what it did at a time.
type Chain struct {
	Junction traffic.JunctionID `json:"junction"`
	// At is the time that was asked for.
	At time.Time `json:"at"`
	// Summary is the answer in a sentence.
	Summary string `json:"summary"`
	Steps   []Step `json:"steps"`
	// Missing says which steps are not there, and why.
	Missing []string `json:"missing,omitempty"`
	// Provable: one bundle of all steps can be had now.
	Provable bool `json:"provable"`
	// Refused lists the commands between the decision and At that were refused or
	// not answered, newest first: they changed nothing.
	Refused []Record `json:"refused,omitempty"`
}

// Step is one record of a chain.
type Step struct {
	Role Role `json:"role"`
	Record
	// Says is what the record says, for people, empty where its payload was let go.
	Says string `json:"says,omitempty"`
	// Signal is what the lamps showed, of frames.
	Signal *traffic.Signal `json:"signal,omitempty"`
	// Evidence is where the record's bundle is, below audit's address.
	Evidence string `json:"evidence,omitempty"`
}

// Indexes returns the leaves of the chain's steps.
func (c *Chain) Indexes() []uint64 {
	var out []uint64
	for _, s := range c.Steps {
		out = append(out, s.Index)
	}
	return out
}

// maxRefused bounds how many commands a chain looks back over for one that was
// applied.
const maxRefused = 200

// found is a chain as the index knows it.
type found struct {
	steps   []Step
	missing []string
	refused []Record
}

// chain finds the command that was in force at a junction at a time, what it
// rested on and what became of it.
func (x *index) chain(ctx context.Context, j traffic.JunctionID, at time.Time, sealed uint64) (found, error) {
	var f found
	until := at.UnixNano()
	lamps, haveLamps, err := x.one(ctx, sealed, "record k WHERE k.junction = ? AND k.kind = 'frame' AND k.measured <= ?", "k.measured DESC, k.idx DESC", string(j), until)
	if err != nil {
		return f, err
	}
	var decision *Record
	st := "SELECT " + columns + " FROM (SELECT k.idx AS idx, k.measured AS t FROM record k WHERE k.junction = ? AND k.kind = 'command' AND k.measured <= ?" +
		" ORDER BY k.measured DESC, k.idx DESC LIMIT ?) p JOIN record r ON r.idx = p.idx" + others + " ORDER BY p.t DESC, p.idx DESC"
	// Nearly always the newest one was applied.
	for _, limit := range []int{2, maxRefused} {
		f.refused, decision = nil, nil
		n := 0
		if err := x.each(ctx, st, []any{string(j), until, limit}, sealed, func(r Record) {
			n++
			switch {
			case decision != nil:
			case r.Command != nil && r.Command.Outcome == Applied:
				decision = &r
			default:
				f.refused = append(f.refused, r)
			}
		}); err != nil {
			return f, err
		}
		if decision != nil || n < limit {
			break
		}
	}
	if decision == nil && len(f.refused) > 0 {
		// None was applied: the newest one tells why.
		decision, f.refused = &f.refused[0], f.refused[1:]
	}
	if decision == nil {
		f.missing = append(f.missing, "no command to the junction is in the log until then: it ran its own plan")
	} else if err := x.around(ctx, &f, *decision, sealed); err != nil {
		return f, err
	}
	switch {
	case !haveLamps:
		f.missing = append(f.missing, "no frame of the junction is in the log until then")
	default:
		for _, s := range f.steps {
			if s.Index == lamps.Index {
				return f, nil
			}
		}
		f.steps = append(f.steps, Step{Role: RoleLamps, Record: lamps})
	}
	return f, nil
}

// around adds a command with what it rests on and what reports it.
func (x *index) around(ctx context.Context, f *found, decision Record, sealed uint64) error {
	rests := decision.Command.RestsOn
	reading, ok, err := x.one(ctx, sealed, "record k WHERE k.device = ? AND k.boot = ? AND k.seq = ? AND k.kind = 'frame' AND k.idx < ?", "k.idx DESC",
		string(rests.Device), int64(rests.BootEpoch), int64(rests.Seq), int64(decision.Index))
	if err != nil {
		return err
	}
	if ok {
		f.steps = append(f.steps, Step{Role: RoleReading, Record: reading})
	} else {
		f.missing = append(f.missing, fmt.Sprintf("the reading that the command rests on, %s, is not in the log or its payload was let go", rests))
	}
	f.steps = append(f.steps, Step{Role: RoleDecision, Record: decision})
	by := decision.Command.ReportedBy
	if by == 0 {
		f.missing = append(f.missing, "no frame of the junction says what became of the command")
		return nil
	}
	response, ok, err := x.one(ctx, sealed, "record k WHERE k.idx = ?", "k.idx", int64(by))
	if err != nil {
		return err
	}
	if ok {
		f.steps = append(f.steps, Step{Role: RoleResponse, Record: response})
	}
	return nil
}

// Chain answers why a junction did what it did at a time, as one chain: the
// reading, the block that agreed on it, the decision with its rule and versions,
// and the frame in which the junction says what it did, with its lamps. The error
// has kind NotFound where the log says nothing of the junction until then.
func (s *Service) Chain(ctx context.Context, j traffic.JunctionID, at time.Time) (*Chain, error) {
	if j == "" || at.IsZero() {
		return nil, kind.Errorf(kind.Invalid, "chain: junction and time are needed")
	}
	f, err := s.index.chain(ctx, j, at, s.sealedSize())
	if err != nil {
		return nil, fmt.Errorf("chain: %w", err)
	}
	if len(f.steps) == 0 {
		return nil, kind.Errorf(kind.NotFound, "chain: the log has neither a frame of nor a command to junction %.60q until %s", string(j), at.UTC().Format(time.RFC3339Nano))
	}
	c := &Chain{Junction: j, At: at.UTC(), Steps: f.steps, Missing: f.missing, Refused: f.refused, Provable: true}
	for i := range c.Steps {
		st := &c.Steps[i]
		st.Evidence = fmt.Sprintf("/v1/evidence/%d", st.Index)
		if !st.Provable {
			c.Provable = false
		}
		if err := s.explain(st); err != nil {
			return nil, fmt.Errorf("chain: %w", err)
		}
	}
	c.Summary = c.summarise()
	if err := s.inHand(ctx, c, s.sealedSize()); err != nil {
		return nil, fmt.Errorf("chain: %w", err)
	}
	return c, nil
}

// explain reads what a step's record says.
func (s *Service) explain(st *Step) error {
	if st.State != "" {
		return nil
	}
	p, err := s.get(st.Index)
	if kind.Of(err) == kind.NotFound || kind.Of(err) == kind.Unavailable {
		return nil // let go since it was indexed; the index hears of it later
	}
	if err != nil {
		return err
	}
	e, err := identity.ParseEnvelope(p.Envelope)
	if err != nil {
		return fmt.Errorf("leaf %d: %w", st.Index, err)
	}
	st.Says = ledger.Describe(e).Summary
	if e.Kind == identity.KindFrame {
		if frame, err := wire.DecodeFrame(e.ContentType, e.Payload); err == nil { // else the validators read what we cannot
			st.Signal = &frame.Signal
		}
	}
	return nil
}

// get reads a payload.
func (s *Service) get(index uint64) (*ledger.Payload, error) {
	s.files.RLock()
	defer s.files.RUnlock()
	if s.payloads == nil {
		return nil, kind.Errorf(kind.Unavailable, "the data folder is being opened again")
	}
	return s.payloads.Get(index)
}

func (c *Chain) step(r Role) *Step {
	for i := range c.Steps {
		if c.Steps[i].Role == r {
			return &c.Steps[i]
		}
	}
	return nil
}

const clock = "15:04:05.000"

func (c *Chain) summarise() string {
	d := c.step(RoleDecision)
	if d == nil {
		return fmt.Sprintf("At %s no command to %s was in the log: the junction ran its own plan.", c.At.Format(clock), c.Junction)
	}
	i := d.Command
	s := fmt.Sprintf("At %s the newest command to %s was number %d of %s: stage %d, because %q (controller %s %s, policy %s %s), resting on block %d",
		c.At.Format(clock), c.Junction, d.Seq, d.Time.Format(clock), i.Stage, d.Rule, i.Controller, i.ControllerVersion, i.Policy, i.PolicyVersion, i.RestsHeight)
	switch i.Outcome {
	case Applied:
		s += "; the junction applied it"
	case Refused:
		s += fmt.Sprintf("; the junction refused it: %s", i.Reason)
	default:
		s += "; the junction has not said what became of it"
	}
	var shown *Step // the newest frame until then, or else the first after it
	for k := range c.Steps {
		st := &c.Steps[k]
		if st.Signal == nil {
			continue
		}
		early := !st.Time.After(c.At)
		if shown == nil || early && (shown.Time.After(c.At) || st.Time.After(shown.Time)) {
			shown = st
		}
	}
	if shown != nil {
		s += fmt.Sprintf(", and showed %s at %s", shown.Signal.State, shown.Time.Format(clock))
	}
	return s + "."
}
