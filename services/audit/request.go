package audit

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The roles of the chain of what somebody asked for.
const (
	RoleRequest  Role = "request"  // what was asked, and each later word on it
	RoleOverride Role = "override" // by which the junction was in an operator's hand
	RoleGreen    Role = "green"    // the frame that first shows what was asked for
	RoleEnd      Role = "end"      // the first frame that does not show it any more
)

// Bounds of one chain of a request.
const (
	mostRevisions = 100
	mostFrames    = 400 // of a junction, to look for its green in
	// lookAfter is how long after its end something may still be served: a unit's
	// override outlives nobody, and frames may come late by their own time.
	lookAfter = 5 * time.Minute
)

// RequestChain answers what became of a request for priority, or of an override,
// by its record's leaf: the request with each later word on it; at each junction of
// its route the decision that first served it, with the reading that it rests on and
// the frame that says what the junction did; and the frame that first shows the
// green. Each step is a record in a block, so that one bundle proves them all. The
// error has kind Invalid where the record is neither.
func (s *Service) RequestChain(ctx context.Context, index uint64) (*Chain, error) {
	sealed := s.sealedSize()
	r, ok, err := s.index.one(ctx, sealed, "record k WHERE k.idx = ?", "k.idx", int64(index))
	switch {
	case err != nil:
		return nil, fmt.Errorf("chain: %w", err)
	case !ok:
		return nil, kind.Errorf(kind.NotFound, "chain: the log has no record %d", index)
	case r.Kind != identity.KindRequest && r.Kind != identity.KindOverride:
		return nil, kind.Errorf(kind.Invalid, "chain: record %d is of kind %s, must be request or override", index, r.Kind)
	}
	p, err := s.get(index)
	if err != nil {
		return nil, fmt.Errorf("chain: %w", err) // NotFound where it was let go
	}
	c := &Chain{Junction: r.Junction, At: r.Time, Provable: true}
	x := wire.Candidate(p.Envelope, p.Salt[:])
	switch {
	case x.Request != nil:
		err = s.requestChain(ctx, c, x.Request, sealed)
	case x.Override != nil:
		err = s.overrideChain(ctx, c, r, x.Override, sealed)
	default:
		err = fmt.Errorf("record %d cannot be read: %w", index, x.Err)
	}
	if err != nil {
		return nil, fmt.Errorf("chain: %w", err)
	}
	return c, s.finish(c)
}

// finish explains the steps and says whether they can be proven.
func (s *Service) finish(c *Chain) error {
	for i := range c.Steps {
		st := &c.Steps[i]
		st.Evidence = fmt.Sprintf("/v1/evidence/%d", st.Index)
		c.Provable = c.Provable && st.Provable
		if st.Says != "" {
			continue
		}
		if err := s.explain(st); err != nil {
			return fmt.Errorf("chain: %w", err)
		}
	}
	return nil
}

func (s *Service) requestChain(ctx context.Context, c *Chain, q *traffic.Request, sealed uint64) error {
	end := q.Expires.Add(lookAfter)
	first := *q
	// Records of one id of another agency are somebody else's words.
	err := s.index.each(ctx, "SELECT "+columns+" FROM (SELECT k.idx AS idx FROM record k WHERE k.kind = 'request' AND k.measured >= ? AND k.measured <= ? AND k.rule = ? ORDER BY k.measured, k.idx LIMIT ?) p JOIN record r ON r.idx = p.idx"+others+" ORDER BY p.idx",
		[]any{q.Time.Add(-2 * time.Hour).UnixNano(), max(end.UnixNano(), q.Time.UnixNano()), "request " + q.ID, mostRevisions}, sealed, func(r Record) {
			c.Steps = append(c.Steps, Step{Role: RoleRequest, Record: r})
		})
	if err != nil {
		return err
	}
	kept := c.Steps[:0]
	owner := "" // of the id: who used it first
	for _, st := range c.Steps {
		if p, err := s.get(st.Index); err == nil {
			if o := wire.Candidate(p.Envelope, p.Salt[:]).Request; o != nil {
				if owner == "" {
					owner = o.By.Agency
				}
				if o.By.Agency != q.By.Agency {
					continue
				}
				if o.Revision == 1 {
					first = *o
				}
				st.Says = saysRequest(o)
			}
		}
		kept = append(kept, st)
	}
	c.Steps = kept
	if first.Expires.After(q.Expires) {
		end = first.Expires.Add(lookAfter)
	}
	served := 0
	stops := first.Stops
	if owner != "" && owner != q.By.Agency {
		c.Missing = append(c.Missing, fmt.Sprintf("the id %s was %s's before: nothing was done for this request", q.ID, owner))
		stops = nil
	}
	for _, stop := range stops {
		f := found{}
		cmd, ok, err := s.serving(ctx, q.ID, stop.Junction, first.Time, end, sealed)
		if err != nil {
			return err
		}
		if !ok {
			c.Missing = append(c.Missing, fmt.Sprintf("no command to junction %s serves it", stop.Junction))
			continue
		}
		served++
		if err := s.index.around(ctx, &f, cmd, sealed); err != nil {
			return err
		}
		c.Missing = append(c.Missing, f.missing...)
		for _, st := range f.steps {
			c.add(st)
		}
		reg, err := s.registryAt(cmd.Height)
		if err != nil {
			return err
		}
		green, ok, err := s.firstFrame(ctx, stop.Junction, cmd.Time, end, sealed, func(f *traffic.Frame) bool { return green(reg, stop, f) })
		if err != nil {
			return err
		}
		if !ok {
			c.Missing = append(c.Missing, fmt.Sprintf("no frame shows junction %s green for group %s after the command", stop.Junction, stop.Group))
			continue
		}
		c.add(green)
	}
	c.Summary = fmt.Sprintf("Request %s of %s for vehicle %s, asked at %s: %d of %d junctions were commanded to serve it.", q.ID, q.By.Agency, q.Vehicle,
		first.Time.UTC().Format(clock), served, len(first.Stops))
	return nil
}

// add adds a step unless its record is there already.
func (c *Chain) add(st Step) {
	if !slices.ContainsFunc(c.Steps, func(o Step) bool { return o.Index == st.Index }) {
		c.Steps = append(c.Steps, st)
	}
}

func saysRequest(r *traffic.Request) string {
	what := "asks for"
	switch {
	case r.Cancelled:
		return fmt.Sprintf("%s of %s cancels request %s", r.By.Name, r.By.Agency, r.ID)
	case r.Degraded:
		what = "was served without agreement for"
	case r.Revision > 1:
		what = "brings new arrivals for"
	}
	s := fmt.Sprintf("%s of %s %s vehicle %s, request %s revision %d:", r.By.Name, r.By.Agency, what, r.Vehicle, r.ID, r.Revision)
	for _, st := range r.Stops {
		s += fmt.Sprintf(" %s by %s at %s", st.Junction, st.Group, st.Arrival.UTC().Format(clock))
	}
	return s
}

// serving finds the first command that serves a request at a junction: the first
// that was applied, or else the first of all.
func (s *Service) serving(ctx context.Context, id string, j traffic.JunctionID, from, to time.Time, sealed uint64) (cmd Record, ok bool, err error) {
	// All rules that begin with "priority ID ": a space's successor is an exclamation
	// mark.
	st := "SELECT " + columns + " FROM (SELECT k.idx AS idx FROM record k WHERE k.junction = ? AND k.kind = 'command' AND k.measured >= ? AND k.measured <= ?" +
		" AND k.rule >= ? AND k.rule < ? ORDER BY k.measured, k.idx LIMIT 20) p JOIN record r ON r.idx = p.idx" + others + " ORDER BY p.idx"
	err = s.index.each(ctx, st, []any{string(j), from.UnixNano(), to.UnixNano(), "priority " + id + " ", "priority " + id + "!"}, sealed, func(r Record) {
		applied := r.Command != nil && r.Command.Outcome == Applied
		if !ok || applied && (cmd.Command == nil || cmd.Command.Outcome != Applied) {
			cmd, ok = r, true
		}
	})
	return cmd, ok, err
}

// firstFrame finds the first frame of a junction in a time that shows something.
func (s *Service) firstFrame(ctx context.Context, j traffic.JunctionID, from, to time.Time, sealed uint64, shows func(*traffic.Frame) bool) (st Step, ok bool, err error) {
	var frames []Record
	q := "SELECT " + columns + " FROM (SELECT k.idx AS idx, k.measured AS t FROM record k WHERE k.junction = ? AND k.kind = 'frame' AND k.measured >= ? AND k.measured <= ? ORDER BY k.measured, k.idx LIMIT ?) p JOIN record r ON r.idx = p.idx" +
		others + " ORDER BY p.t, p.idx"
	if err := s.index.each(ctx, q, []any{string(j), from.UnixNano(), to.UnixNano(), mostFrames}, sealed, func(r Record) { frames = append(frames, r) }); err != nil {
		return st, false, err
	}
	for _, r := range frames {
		p, err := s.get(r.Index)
		if kind.Of(err) == kind.NotFound {
			continue // let go
		}
		if err != nil {
			return st, false, err
		}
		if f := wire.Candidate(p.Envelope, p.Salt[:]).Frame; f != nil && shows(f) {
			return Step{Role: RoleGreen, Record: r, Signal: &f.Signal}, true, nil
		}
	}
	return st, false, nil
}

// green reports whether a frame shows the group of a stop green, by a registry.
func green(reg *identity.Registry, stop traffic.Stop, f *traffic.Frame) bool {
	j, ok := reg.Junction(stop.Junction)
	if !ok {
		return false
	}
	g := slices.IndexFunc(j.Groups, func(g traffic.Group) bool { return g.Name == stop.Group })
	return g >= 0 && f.Signal.State.At(g).Go()
}

func (s *Service) overrideChain(ctx context.Context, c *Chain, r Record, o *traffic.Override, sealed uint64) error {
	id := o.ID
	if o.Action == traffic.OverrideRelease {
		id = o.Releases
	}
	to := o.Time.Add(traffic.MaxOverride)
	if o.Action != traffic.OverrideRelease {
		to = o.Expires.Add(lookAfter)
	}
	words, err := s.overrides(ctx, o.Junction, o.Time.Add(-traffic.MaxOverride), to, sealed, func(x *traffic.Override) bool { return x.ID == id || x.Releases == id })
	if err != nil {
		return err
	}
	c.Steps = append(c.Steps, words...)
	from := r.Time
	if len(words) > 0 {
		from = words[0].Time
	}
	shown, ok, err := s.firstFrame(ctx, o.Junction, from, to, sealed, func(f *traffic.Frame) bool { return f.Signal.Override == id })
	if err != nil {
		return err
	}
	if !ok {
		c.Missing = append(c.Missing, fmt.Sprintf("no frame of junction %s shows override %s in force", o.Junction, id))
		c.Summary = fmt.Sprintf("Override %s of junction %s was never in force, by what is in the log.", id, o.Junction)
		return nil
	}
	shown.Role = RoleResponse
	c.add(shown)
	c.Summary = fmt.Sprintf("Override %s of junction %s was in force from %s", id, o.Junction, shown.Time.Format(clock))
	// Where it lasted, its frames are too many to look through: the end is that of a
	// release, or its own.
	until := to
	for _, w := range words[min(1, len(words)):] {
		until = w.Time.Add(lookAfter)
		from = w.Time
	}
	if len(words) < 2 && o.Action != traffic.OverrideRelease {
		from = o.Expires.Add(-time.Second)
	}
	over, ok, err := s.firstFrame(ctx, o.Junction, from, until, sealed, func(f *traffic.Frame) bool { return f.Signal.Override != id && f.Time.After(shown.Time) })
	if err != nil {
		return err
	}
	if ok {
		over.Role = RoleEnd
		c.add(over)
		c.Summary += " until " + over.Time.Format(clock)
	}
	c.Summary += "."
	return nil
}

// overrides finds the records of overrides of a junction, the oldest first.
func (s *Service) overrides(ctx context.Context, j traffic.JunctionID, from, to time.Time, sealed uint64, which func(*traffic.Override) bool) (out []Step, err error) {
	var all []Record
	q := "SELECT " + columns + " FROM (SELECT k.idx AS idx FROM record k WHERE k.junction = ? AND k.kind = 'override' AND k.measured >= ? AND k.measured <= ? ORDER BY k.measured DESC, k.idx DESC LIMIT 1000) p JOIN record r ON r.idx = p.idx" +
		others + " ORDER BY p.idx"
	if err := s.index.each(ctx, q, []any{string(j), from.UnixNano(), to.UnixNano()}, sealed, func(r Record) { all = append(all, r) }); err != nil {
		return nil, err
	}
	for _, r := range all {
		p, err := s.get(r.Index)
		if kind.Of(err) == kind.NotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		if o := wire.Candidate(p.Envelope, p.Salt[:]).Override; o != nil && which(o) {
			out = append(out, Step{Role: RoleOverride, Record: r, Says: saysOverride(o)})
		}
	}
	return out, nil
}

func saysOverride(o *traffic.Override) string {
	s := fmt.Sprintf("%s of %s: %s junction %s, because of %s", o.By.Name, o.By.Agency, o.Action, o.Junction, o.Reason)
	switch o.Action {
	case traffic.OverridePlan:
		s += ", plan " + o.Plan
	case traffic.OverrideHold:
		s += fmt.Sprintf(", stage %d", o.Stage)
	case traffic.OverrideRelease:
		return s + ", ends override " + o.Releases
	}
	return s + ", until " + o.Expires.UTC().Format(clock)
}

// inHand adds to a junction's chain the override that its lamps were under.
func (s *Service) inHand(ctx context.Context, c *Chain, sealed uint64) error {
	id := ""
	for i := range c.Steps {
		if sig := c.Steps[i].Signal; sig != nil && sig.Override != "" && !c.Steps[i].Time.After(c.At) {
			id = sig.Override
		}
	}
	if id == "" {
		return nil
	}
	words, err := s.overrides(ctx, c.Junction, c.At.Add(-traffic.MaxOverride), c.At, sealed, func(o *traffic.Override) bool { return o.ID == id })
	if err != nil {
		return err
	}
	if len(words) == 0 {
		c.Missing = append(c.Missing, fmt.Sprintf("the record of override %s, by which the junction was in an operator's hand, is not in the log", id))
		return nil
	}
	w := words[0]
	w.Evidence = fmt.Sprintf("/v1/evidence/%d", w.Index)
	c.Provable = c.Provable && w.Provable
	c.Steps = append(c.Steps, w)
	c.Summary = fmt.Sprintf("At %s junction %s was in an operator's hand: %s. %s", c.At.Format(clock), c.Junction, w.Says, c.Summary)
	return nil
}
