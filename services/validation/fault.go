package validation

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// fault is a panic: a fault of the program that one record brings to light. It
// would do so again after a restart, for ever, with everything behind that
// record waiting.
type fault struct {
	value any
	stack string
}

func (f *fault) Error() string { return fmt.Sprintf("panic: %v", f.value) }

// try calls do and returns its panic, nil if there was none.
func try(do func()) (f *fault) {
	defer func() {
		if p := recover(); p != nil {
			f = &fault{p, string(debug.Stack())}
		}
	}()
	do()
	return nil
}

// decode decodes one record.
func (s *Service) decode(raw, salt []byte) (c validate.Candidate, f *fault) {
	f = try(func() {
		s.fault("decode", raw)
		c = wire.Candidate(raw, salt)
	})
	return c, f
}

// verdicts decodes and judges items in order. A record by which that panics is
// refused, see [validate.Failed]; to its neighbours it is as if it had not been
// there. Items with a mark have no verdict.
//
// No record is refused by a registry that is older than the newest decided
// block: its device may have been enrolled there, and its sender has a receipt.
// An error means that this could not be made sure of.
func (s *Service) verdicts(ctx context.Context, items []item) ([]validate.Candidate, []validate.Verdict, error) {
	reg, current := s.reg.Registry(), false
	cs := make([]validate.Candidate, len(items))
	out := make([]validate.Verdict, len(items))
	failed := map[int]bool{}
	fail := func(i int, f *fault) {
		s.log.Error("record quarantined: judging it failed by a fault of the program", "seq", items[i].seq, "kind", cs[i].Envelope.Kind,
			"size", len(items[i].record.Envelope), "err", f.value, "stack", f.stack)
		failed[i], out[i] = true, validate.Failed(f.value)
	}
	now := make([]time.Time, len(items))
	for i, it := range items {
		if now[i] = s.cfg.Now(); it.record.ReceivedUnixNano != 0 {
			now[i] = time.Unix(0, it.record.ReceivedUnixNano).UTC()
		}
		c, f := s.decode(it.record.Envelope, it.record.Salt)
		if cs[i] = c; f != nil {
			cs[i] = validate.Candidate{} // no signature to verify
			fail(i, f)
		}
	}
	s.verify(reg, cs, fail)

	// Judging changes the state, and a panic may leave it half changed. So it goes
	// on from a clone then: without the record, from the first item that is not
	// settled, which gives the items in between the same verdicts again.
	from, before := 0, s.state.Clone()
	for i := 0; i < len(items); i++ {
		switch {
		case items[i].mark != "":
			s.state.Quarantine(items[i].mark)
		case failed[i]:
			// Its verdict and all before it stand; they are not judged once more when
			// another fails.
			from, before = i+1, s.state.Clone()
		default:
			if f := try(func() {
				s.fault("judge", cs[i].Raw)
				out[i] = s.state.Judge(reg, now[i], &cs[i])
				s.fault("judged", cs[i].Raw)
			}); f != nil {
				fail(i, f)
				s.state = before.Clone()
				i = from - 1
			} else if !out[i].OK && !current && byRegistry(out[i].Rule) {
				if err := s.current(ctx); err != nil {
					return nil, nil, fmt.Errorf("no record is refused before the registry is current: %w", err)
				}
				current = true
				if now := s.reg.Registry(); now != reg {
					// A refusal has changed nothing: this one is judged again, with the rest.
					reg = now
					s.verify(reg, cs[i:], func(k int, f *fault) { fail(i+k, f) })
					i--
				}
			}
		}
	}
	return cs, out, nil
}

// byRegistry reports whether a refusal by the rule may depend on the registry.
// The others follow from what the signer has sent before, and from the clock.
func byRegistry(r validate.Rule) bool {
	switch r {
	case validate.RuleQuarantined, validate.RuleDuplicate, validate.RuleEquivocation, validate.RuleReordered, validate.RuleReplay,
		validate.RuleChain, validate.RuleClockAhead, validate.RuleClockBehind, validate.RuleClockBackwards:
		return false
	}
	return true
}

// verify verifies the signatures of all candidates at once, and one by one if
// that panics.
func (s *Service) verify(reg *identity.Registry, cs []validate.Candidate, fail func(int, *fault)) {
	do := func(cs []validate.Candidate) *fault {
		f := try(func() {
			for i := range cs {
				s.fault("verify", cs[i].Raw)
			}
			wire.VerifySignatures(s.verifier, reg, cs)
		})
		if f != nil {
			s.verifier = identity.NewVerifier() // the old one holds we know not what
		}
		return f
	}
	if do(cs) == nil {
		return
	}
	for i := range cs {
		if f := do(cs[i : i+1]); f != nil {
			fail(i, f)
		}
	}
}
