package priority

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Progress is how a request stands at one junction.
type Progress struct {
	traffic.Stop
	State State
	// Rule begins with one of the Rule constants, and says in words what was decided.
	Rule  string
	Since time.Time
	// Command is the number of the first command that serves it, 0 for none yet.
	Command uint64
	// Stage that is asked for, -1 for none.
	Stage int
	// GreenAt is when its group was first seen green while it was activated, Observed
	// what all lamps showed then.
	GreenAt  time.Time
	Observed traffic.State
	// SeenAt is when a detector at the stop line saw a vehicle of its class last.
	SeenAt time.Time
}

// Entry is a request with what has become of it.
type Entry struct {
	// Request is the newest revision.
	Request traffic.Request
	// Height of the block that held the first one, and Order its place among all.
	Height, Order uint64
	// Index is the leaf of the first revision's record.
	Index uint64
	State State
	// Rule is why the whole was refused, or the newest change of it; else empty.
	Rule  string
	Since time.Time
	Stops []Progress
	// Agreed is the time of that block.
	Agreed time.Time
	// Ended is when nothing more could become of it, by the block's time.
	Ended time.Time
}

func (e *Entry) clone() *Entry {
	c := *e
	c.Stops, c.Request.Stops = slices.Clone(e.Stops), slices.Clone(e.Request.Stops)
	return &c
}

// seen is what is known of a junction.
type seen struct {
	Signal traffic.Signal
	At     time.Time
	// Waiting is, by group, how many vehicles stand before its stop line.
	Waiting []int
	Frame   traffic.FrameKey
}

// served says when an agency's vehicle was served at a junction last.
type served struct {
	Junction traffic.JunctionID
	Agency   string
	Class    traffic.Priority
}

func (s served) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%d %s\x00%s", s.Class, s.Junction, s.Agency), nil
}

func (s *served) UnmarshalText(b []byte) error {
	var rest string
	if _, err := fmt.Sscanf(string(b), "%d", &s.Class); err != nil {
		return err
	}
	_, rest, _ = cut(string(b), ' ')
	j, a, ok := cut(rest, 0)
	if !ok {
		return fmt.Errorf("%.40q: is no agency at a junction", b)
	}
	s.Junction, s.Agency = traffic.JunctionID(j), a
	return nil
}

func cut(s string, sep byte) (before, after string, ok bool) {
	for i := range len(s) {
		if s[i] == sep {
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// let is when a request was let in, for the quota.
type let struct {
	Class traffic.Priority
	At    time.Time
}

// state is what a book holds, in the form in which it is stored.
type state struct {
	Height  uint64
	Time    time.Time // of that block
	Order   uint64
	Pruned  time.Time // when what has ended was looked through
	Entries map[string]*Entry
	Seen    map[traffic.JunctionID]*seen
	Served  map[served]time.Time
	Let     map[string][]let // by agency, the oldest first
}

// Book holds the requests of a district. It has one owner; it does not lock.
type Book struct {
	policy Policy
	rules  timing.Rules
	state
	// at lists, for each junction, who has not ended there; it follows from Entries.
	at      map[traffic.JunctionID][]string
	changed map[string]bool
}

// NewBook returns an empty one. rules are those of the district's control: they say
// how long a change of stage takes.
func NewBook(p Policy, rules timing.Rules) *Book {
	b := &Book{policy: p, rules: rules, state: state{Entries: map[string]*Entry{}, Seen: map[traffic.JunctionID]*seen{},
		Served: map[served]time.Time{}, Let: map[string][]let{}}}
	b.index()
	return b
}

func (b *Book) index() {
	b.at, b.changed = map[traffic.JunctionID][]string{}, map[string]bool{}
	for _, e := range b.byOrder() {
		for _, s := range e.Stops {
			if !s.State.Ended() {
				b.at[s.Junction] = append(b.at[s.Junction], e.Request.ID)
			}
		}
	}
}

func (b *Book) byOrder() []*Entry {
	return slices.SortedFunc(maps.Values(b.Entries), func(x, y *Entry) int { return cmp.Compare(x.Order, y.Order) })
}

// Marshal returns the book's content, for [Book.Restore].
func (b *Book) Marshal() ([]byte, error) { return json.Marshal(&b.state) }

// Restore takes over what [Book.Marshal] returned.
func (b *Book) Restore(data []byte) error {
	s := state{}
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("priority book: %w", err)
	}
	for id, e := range s.Entries {
		if e == nil || id != e.Request.ID || len(e.Stops) > traffic.MaxStops {
			return fmt.Errorf("priority book: entry %.40q: damaged", id)
		}
	}
	for id, x := range s.Seen {
		if x == nil {
			return fmt.Errorf("priority book: junction %.40q: damaged", string(id))
		}
	}
	if s.Entries == nil {
		s.Entries = map[string]*Entry{}
	}
	if s.Seen == nil {
		s.Seen = map[traffic.JunctionID]*seen{}
	}
	if s.Served == nil {
		s.Served = map[served]time.Time{}
	}
	if s.Let == nil {
		s.Let = map[string][]let{}
	}
	b.state = s
	b.index()
	return nil
}

// Clone returns a book that shares nothing with this one.
func (b *Book) Clone() *Book {
	c := NewBook(b.policy, b.rules)
	c.Height, c.Time, c.Order, c.Pruned = b.Height, b.Time, b.Order, b.Pruned
	for id, e := range b.Entries {
		c.Entries[id] = e.clone()
	}
	for id, s := range b.Seen {
		x := *s
		x.Waiting = slices.Clone(s.Waiting)
		c.Seen[id] = &x
	}
	c.Served = maps.Clone(b.Served)
	for a, l := range b.Let {
		c.Let[a] = slices.Clone(l)
	}
	c.index()
	return c
}

// Known returns the newest block that the book has heard of.
func (b *Book) Known() uint64 { return b.Height }

// At returns that block's time.
func (b *Book) At() time.Time { return b.Time }

// Entry returns a copy of a request's entry.
func (b *Book) Entry(id string) (*Entry, bool) {
	e, ok := b.Entries[id]
	if !ok {
		return nil, false
	}
	return e.clone(), true
}

// All returns copies of all entries, in the order in which they were let in or
// refused.
func (b *Book) All() []*Entry {
	out := b.byOrder()
	for i, e := range out {
		out[i] = e.clone()
	}
	return out
}

// Changed returns, in order, the ids of the requests that have changed since it was
// called last.
func (b *Book) Changed() []string {
	if len(b.changed) == 0 {
		return nil
	}
	out := slices.SortedFunc(maps.Keys(b.changed), func(x, y string) int {
		var ox, oy uint64
		if e := b.Entries[x]; e != nil {
			ox = e.Order
		}
		if e := b.Entries[y]; e != nil {
			oy = e.Order
		}
		return cmp.Or(cmp.Compare(ox, oy), cmp.Compare(x, y))
	})
	clear(b.changed)
	return out
}

// Bounds of what a book keeps.
const (
	keepEnded    = 2 * time.Hour // after its end, by the blocks' time
	keepRejected = 10 * time.Minute
	pruneEvery   = time.Minute
	mostEntries  = 10_000
	// forgiven is how far the blocks' time may be past a stop's last moment before
	// it ends without a frame of its junction: frames may come late.
	forgiven = 5 * time.Minute
)

// Block tells that what comes next is of the block at a height, decided at a time.
// Blocks must come in order; one that came before changes nothing, and neither
// must what is in it be told again: [Book.Known].
func (b *Book) Block(height uint64, at time.Time) {
	if height <= b.Height && b.Height != 0 {
		return
	}
	b.Height, b.Time = height, at
	for _, e := range b.live() {
		for i := range e.Stops {
			s := &e.Stops[i]
			if !s.State.Ended() && at.Sub(b.last(e, s)) > forgiven {
				b.end(e, s, at, Timeout, refuse(RuleNoReport, "junction %s has not said what it does since", s.Junction).text)
			}
		}
		b.settle(e, at)
	}
	if at.Sub(b.Pruned) < pruneEvery && len(b.Entries) <= mostEntries {
		return
	}
	b.Pruned = at
	for _, e := range b.byOrder() {
		keep := keepEnded
		if e.State == Rejected {
			keep = keepRejected
		}
		// Where there are too many a tenth goes at once, so that it is seldom done.
		if e.State.Ended() && (at.Sub(e.Ended) > keep || len(b.Entries) > mostEntries-mostEntries/10) {
			delete(b.Entries, e.Request.ID)
		}
	}
	for k, t := range b.Served {
		if at.Sub(t) > keepEnded {
			delete(b.Served, k)
		}
	}
	for a, l := range b.Let {
		if at.Sub(l[len(l)-1].At) >= time.Hour {
			delete(b.Let, a)
		}
	}
}

// live are the entries that have not ended, in order.
func (b *Book) live() []*Entry {
	var out []*Entry
	for _, ids := range b.at {
		for _, id := range ids {
			if e := b.Entries[id]; !slices.Contains(out, e) {
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, func(x, y *Entry) int { return cmp.Compare(x.Order, y.Order) })
	return out
}

// last is the last moment at which a stop can be served. What was agreed late, after
// a stall, has its frames in the blocks that come then.
func (b *Book) last(e *Entry, s *Progress) time.Time {
	t := s.Arrival.Add(b.policy.Patience + b.policy.Hold)
	if e.Request.Expires.Before(t) {
		t = e.Request.Expires
	}
	if t.Before(e.Agreed) {
		t = e.Agreed
	}
	return t
}

// set moves a stop into a state.
func (b *Book) set(e *Entry, s *Progress, at time.Time, st State, rule string) {
	if s.State == st {
		s.Rule = rule
		return
	}
	s.State, s.Rule, s.Since = st, rule, at
	b.changed[e.Request.ID] = true
	if st.Ended() {
		b.at[s.Junction] = slices.DeleteFunc(b.at[s.Junction], func(id string) bool { return id == e.Request.ID })
		if len(b.at[s.Junction]) == 0 {
			delete(b.at, s.Junction)
		}
	}
}

// end ends a stop; who had the green is not to have it again at once.
func (b *Book) end(e *Entry, s *Progress, at time.Time, st State, rule string) {
	if s.State == Activated && b.policy.Cooldown[e.Request.Class] > 0 {
		b.Served[served{s.Junction, e.Request.By.Agency, e.Request.Class}] = at
	}
	b.set(e, s, at, st, rule)
}

// settle makes the state of the whole from those of the stops.
func (b *Book) settle(e *Entry, at time.Time) {
	if e.State.Ended() {
		return
	}
	var count [Cancelled + 1]int
	for i := range e.Stops {
		count[e.Stops[i].State]++
	}
	now := Queued
	switch {
	case count[Activated] > 0:
		now = Activated
	case count[Queued] > 0 && count[Completed] > 0:
		now = Activated // on its way
	case count[Queued] > 0:
	default:
		for _, s := range []State{Completed, Stale, Timeout, Cooldown, Cancelled, Rejected} {
			if count[s] > 0 {
				now = s
				break
			}
		}
	}
	if now == e.State {
		return
	}
	e.State, e.Since = now, at
	b.changed[e.Request.ID] = true
	if now.Ended() {
		e.Ended = b.Time
		if e.Ended.Before(at) {
			e.Ended = at
		}
	}
}

// Check says by which rule a request would be refused now; empty if by none. It is
// what [Book.Request] will say unless something comes in between.
func (b *Book) Check(n Network, at time.Time, r *traffic.Request) string {
	if x := b.check(n, at, r); x != nil {
		return x.text
	}
	return ""
}

func (b *Book) check(n Network, at time.Time, r *traffic.Request) *refusal {
	if int(r.Class) >= len(b.policy.PerHour) || r.Class == traffic.NoPriority || len(r.Stops) == 0 || len(r.Stops) > traffic.MaxStops {
		return refuse(RuleClass, "class %d with %d stops", r.Class, len(r.Stops))
	}
	if x := b.policy.onDuty(n, at, r); x != nil {
		return x
	}
	if x := b.policy.route(n, r); x != nil {
		return x
	}
	if r.Class == traffic.Bus && r.Lateness < b.policy.MinLate {
		return refuse(RuleLateness, "the vehicle is %s late, priority is from %s on", r.Lateness.Round(time.Second), b.policy.MinLate)
	}
	for _, o := range b.at {
		for _, id := range o {
			if q := &b.Entries[id].Request; q.By.Agency == r.By.Agency && q.Vehicle == r.Vehicle && id != r.ID {
				return refuse(RuleVehicle, "vehicle %s has another request under way", r.Vehicle)
			}
		}
	}
	used := 0
	for _, l := range b.Let[r.By.Agency] {
		if l.Class == r.Class && at.Sub(l.At) < time.Hour {
			used++
		}
	}
	if most := b.policy.PerHour[r.Class]; used >= most {
		return refuse(RuleQuota, "%s has had %d requests as %s let in within the hour, at most %d", r.By.Agency, used, ClassName(r.Class), most)
	}
	return nil
}

// Request takes a request's record of the newest block: what it asks, changes or
// cancels. index is its leaf.
func (b *Book) Request(n Network, index uint64, r *traffic.Request) {
	if e := b.Entries[r.ID]; e != nil {
		b.revise(n, e, r)
		return
	}
	if r.Cancelled && len(r.Stops) == 0 {
		return // of one that nobody knows
	}
	at := b.Time
	b.Order++
	e := &Entry{Request: *r, Height: b.Height, Order: b.Order, Index: index, State: Queued, Since: at, Agreed: at}
	e.Request.Stops = slices.Clone(r.Stops)
	b.Entries[r.ID], b.changed[r.ID] = e, true
	for _, s := range r.Stops {
		e.Stops = append(e.Stops, Progress{Stop: s, State: Queued, Rule: RuleQueue + ": waits for its time", Since: at, Stage: -1})
	}
	x := b.check(n, at, r)
	if x == nil && r.Cancelled {
		x = refuse(RuleCancel, "before it was let in")
	}
	if x != nil {
		e.State, e.Rule, e.Ended = Rejected, x.text, at
		for i := range e.Stops {
			e.Stops[i].State, e.Stops[i].Rule = Rejected, x.text
		}
		return
	}
	l := slices.DeleteFunc(b.Let[r.By.Agency], func(l let) bool { return at.Sub(l.At) >= time.Hour })
	b.Let[r.By.Agency] = append(l, let{r.Class, at})
	e.Rule = RuleIn
	for i := range e.Stops {
		s := &e.Stops[i]
		if cool := b.policy.Cooldown[r.Class]; cool > 0 {
			if last, ok := b.Served[served{s.Junction, r.By.Agency, r.Class}]; ok && s.Arrival.Sub(last) < cool {
				s.State = Cooldown
				s.Rule = refuse(RuleCooldown, "%s was served at junction %s %s before, priority is again after %s", r.By.Agency, s.Junction, s.Arrival.Sub(last).Round(time.Second), cool).text
				continue
			}
		}
		b.at[s.Junction] = append(b.at[s.Junction], r.ID)
	}
	b.settle(e, at)
	for i := range e.Stops {
		b.look(n, e.Stops[i].Junction)
	}
}

// revise takes a later record of a request.
func (b *Book) revise(n Network, e *Entry, r *traffic.Request) {
	if r.By.Agency != e.Request.By.Agency || r.Revision <= e.Request.Revision {
		return // another's, or one that came before
	}
	at := b.Time
	if r.Degraded && !e.Request.Degraded {
		e.Request.Degraded, b.changed[r.ID] = true, true
	}
	if e.State.Ended() {
		e.Request.Revision = r.Revision
		return
	}
	if r.Cancelled {
		e.Request.Revision, e.Request.Cancelled = r.Revision, true
		for i := range e.Stops {
			if s := &e.Stops[i]; !s.State.Ended() {
				b.end(e, s, at, Cancelled, RuleCancel+": by "+r.By.Name)
			}
		}
		b.settle(e, at)
		b.lookAll(n, e)
		return
	}
	if x := b.revision(n, e, r); x != nil {
		e.Request.Revision = r.Revision
		e.Rule, b.changed[r.ID] = x.text, true
		return
	}
	e.Request.Revision, e.Request.Stops = r.Revision, slices.Clone(r.Stops)
	e.Rule, b.changed[r.ID] = RuleIn, true
	for i := range e.Stops {
		s := &e.Stops[i]
		k := slices.IndexFunc(r.Stops, func(o traffic.Stop) bool { return o.Junction == s.Junction })
		switch {
		case s.State.Ended():
		case k < 0:
			b.end(e, s, at, Completed, RulePassed+": by the agency's word")
		default:
			s.Arrival = r.Stops[k].Arrival
		}
	}
	b.settle(e, at)
	b.lookAll(n, e)
}

// revision checks a change of arrivals.
func (b *Book) revision(n Network, e *Entry, r *traffic.Request) *refusal {
	switch {
	case r.Class != e.Request.Class || r.Vehicle != e.Request.Vehicle:
		return refuse(RuleRevision, "class and vehicle of a request cannot change")
	case len(r.Stops) == 0:
		return refuse(RuleRevision, "no stops")
	case r.Expires.After(e.Request.Expires):
		return refuse(RuleRevision, "the request ends at %s, and not later", e.Request.Expires.UTC().Format(time.RFC3339))
	}
	last := -1
	for i, s := range r.Stops {
		k := slices.IndexFunc(e.Stops, func(o Progress) bool { return o.Junction == s.Junction })
		if k <= last || e.Stops[k].Group != s.Group {
			return refuse(RuleRevision, "stops[%d]: junction %s is not on the rest of the route, by that group", i, s.Junction)
		}
		last = k
	}
	return b.policy.route(n, r)
}

func (b *Book) lookAll(n Network, e *Entry) {
	for i := range e.Stops {
		b.look(n, e.Stops[i].Junction)
	}
}

// Frame takes an accepted frame: what the junction shows, and who is seen there.
func (b *Book) Frame(n Network, f *traffic.Frame) {
	j, ok := n.Junction(f.Junction)
	if !ok {
		return
	}
	x := b.Seen[f.Junction]
	if x == nil {
		x = &seen{}
		b.Seen[f.Junction] = x
	}
	if f.Time.Before(x.At) {
		return // of another device, or of before
	}
	x.Signal, x.At = f.Signal, f.Time
	if f.Interval > 0 {
		x.Frame = f.FrameKey
		x.Waiting = x.Waiting[:0]
	}
	if len(b.at[f.Junction]) == 0 {
		return
	}
	if f.Interval > 0 {
		v := timing.Observe(j, f)
		x.Waiting = make([]int, len(j.Groups))
		for i, m := range j.Movements {
			if q := v.Movements[i].Halted; m.Group < len(x.Waiting) && q > x.Waiting[m.Group] {
				x.Waiting[m.Group] = q
			}
		}
	}
	for _, id := range slices.Clone(b.at[f.Junction]) {
		e := b.Entries[id]
		for i := range e.Stops {
			if s := &e.Stops[i]; s.Junction == f.Junction && !s.State.Ended() {
				b.observe(j, e, s, f)
			}
		}
		b.settle(e, f.Time)
	}
	b.look(n, f.Junction)
}

const (
	// present is how long nobody must have been seen for a vehicle to have passed.
	present = 1500 * time.Millisecond
	// early is how long before its arrival one that passes is taken for it.
	early = 20 * time.Second
	// forgotten is how long ago a detector's word says nothing any more.
	forgotten = 5 * time.Second
)

// observe takes what a frame says of one stop.
func (b *Book) observe(j *traffic.Junction, e *Entry, s *Progress, f *traffic.Frame) {
	g := group(j, s.Group)
	if g < 0 {
		b.end(e, s, f.Time, Rejected, refuse(RuleUnknown, "junction %s has no group %s any more", j.ID, s.Group).text)
		return
	}
	green := f.Signal.State.At(g).Go()
	if s.State == Activated && green && s.GreenAt.IsZero() {
		s.GreenAt, s.Observed = f.Time, f.Signal.State
		b.changed[e.Request.ID] = true
	}
	if at(j, g, e.Request.Class, f) {
		s.SeenAt = f.Time
	}
	class := e.Request.Class
	gone := f.Time.Sub(s.SeenAt)
	late := f.Time.Sub(s.Arrival)
	switch {
	case f.Time.After(e.Request.Expires) && s.State == Activated && !s.GreenAt.IsZero():
		b.end(e, s, f.Time, Stale, RuleExpired+": the request ended while it was served")
	case f.Time.After(e.Request.Expires):
		b.end(e, s, f.Time, Timeout, RuleExpired+": the request ended before its turn came")
	case s.State == Activated && !s.GreenAt.IsZero() && s.SeenAt.After(s.GreenAt.Add(-present)) && gone >= present && f.Interval > 0 && late > -early:
		b.end(e, s, f.Time, Completed, fmt.Sprintf("%s: last seen before the stop line at %s", RulePassed, s.SeenAt.UTC().Format(clock)))
	case s.State == Activated && !s.GreenAt.IsZero() && late > b.policy.Hold:
		b.end(e, s, f.Time, Stale, fmt.Sprintf("%s: %s past its arrival", RuleSilent, late.Round(time.Second)))
	case s.State == Activated && !s.GreenAt.IsZero() && gone > forgotten && late > b.policy.After[class] && f.Time.Sub(s.GreenAt) > b.policy.After[class]/2:
		b.end(e, s, f.Time, Completed, fmt.Sprintf("%s: no detector sees the vehicle; it had its green until %s past its arrival", RuleTime, late.Round(time.Second)))
	case s.State == Activated && s.GreenAt.IsZero() && late > b.policy.Patience:
		b.end(e, s, f.Time, Timeout, fmt.Sprintf("%s: %s past its arrival its group is red still", RuleNever, late.Round(time.Second)))
	case s.State == Queued && late > b.policy.Patience:
		b.end(e, s, f.Time, Timeout, fmt.Sprintf("%s: %s past its arrival others are first", RuleTurn, late.Round(time.Second)))
	}
}

const clock = "15:04:05.0"

// at reports whether a vehicle of a class or above is before the stop line of a
// group.
func at(j *traffic.Junction, g int, c traffic.Priority, f *traffic.Frame) bool {
	for k := range f.Readings {
		if f.Readings[k].Priority < c {
			continue
		}
		d, ok := j.Detector(f.Readings[k].Detector)
		if !ok || d.Kind != traffic.StopLine && d.Kind != traffic.Area && d.Kind != traffic.Oracle {
			continue
		}
		for _, m := range d.Movements {
			if j.Movements[m].Group == g {
				return true
			}
		}
	}
	return false
}

// look decides whose turn it is at a junction, by what it was seen to show last.
func (b *Book) look(n Network, id traffic.JunctionID) {
	x, ids := b.Seen[id], b.at[id]
	j, ok := n.Junction(id)
	if x == nil || len(ids) == 0 || !ok {
		return
	}
	now := x.At
	type one struct {
		e *Entry
		s *Progress
		g int
	}
	var all []one
	for _, id := range ids {
		e := b.Entries[id]
		for i := range e.Stops {
			if s := &e.Stops[i]; s.Junction == j.ID && !s.State.Ended() {
				all = append(all, one{e, s, group(j, s.Group)})
			}
		}
	}
	slices.SortFunc(all, func(x, y one) int {
		return cmp.Or(-cmp.Compare(x.e.Request.Class, y.e.Request.Class), x.s.Arrival.Compare(y.s.Arrival), cmp.Compare(x.e.Order, y.e.Order))
	})
	stage := -1
	var head *one
	var kept time.Time // from when on the junction is somebody's who is stronger, or earlier
	for i := range all {
		o := &all[i]
		if o.g < 0 {
			b.end(o.e, o.s, now, Rejected, refuse(RuleUnknown, "junction %s has no group %s any more", j.ID, o.s.Group).text)
			b.settle(o.e, now)
			continue
		}
		k, need := b.best(j, x, o.e.Request.Class, o.g)
		if k < 0 {
			b.end(o.e, o.s, now, Rejected, refuse(RuleStage, "no stage of junction %s lets group %s go any more", j.ID, o.s.Group).text)
			b.settle(o.e, now)
			continue
		}
		left := o.s.Arrival.Sub(now)
		due := left <= need || o.s.State == Activated
		if head == nil && due && o.s.State != Activated && !kept.IsZero() && o.s.Arrival.Add(b.policy.After[o.e.Request.Class]).After(kept) {
			// It would take away a green that is to be there soon.
			o.s.Rule = RuleQueue + ": somebody stronger, or earlier, comes first"
			continue
		}
		switch {
		case head == nil && due && o.s.State != Activated && b.cooling(o.e, o.s):
			b.end(o.e, o.s, now, Cooldown, fmt.Sprintf("%s: %s was served here just now", RuleCooldown, o.e.Request.By.Agency))
		case head == nil && due:
			head, stage = o, k
			if o.s.State != Activated {
				b.set(o.e, o.s, now, Activated, fmt.Sprintf("%s: arrives in %s, its stage takes up to %s", RuleServe, left.Round(time.Second), need.Round(time.Second)))
			}
			o.s.Stage = k
		case head != nil && due && j.Stages[stage].State.At(o.g).Go():
			b.set(o.e, o.s, now, Activated, RuleShares+": green in the stage of request "+head.e.Request.ID)
			o.s.Stage = stage
		case o.s.State == Activated:
			b.set(o.e, o.s, now, Queued, RuleOutranks+": by request "+head.e.Request.ID)
			o.s.Stage = -1
		case head != nil:
			o.s.Rule = RuleQueue + ": behind request " + head.e.Request.ID
		default:
			if from := o.s.Arrival.Add(-need); kept.IsZero() || from.Before(kept) {
				kept = from
			}
		}
		b.settle(o.e, now)
	}
}

func (b *Book) cooling(e *Entry, s *Progress) bool {
	last, ok := b.Served[served{s.Junction, e.Request.By.Agency, e.Request.Class}]
	return ok && s.Arrival.Sub(last) < b.policy.Cooldown[e.Request.Class]
}

// frameAge is how much later than what it shows a frame is acted upon.
const frameAge = 1500 * time.Millisecond

// best returns the stage by which a group is served soonest, -1 for none, and how
// long before its arrival it must be asked for.
func (b *Book) best(j *traffic.Junction, x *seen, c traffic.Priority, g int) (stage int, need time.Duration) {
	stage = -1
	var soonest int64
	for _, k := range stages(j, g) {
		t := timing.UntilGreen(j, b.rules, x.Signal, k)
		if stage < 0 || t < soonest {
			stage, soonest = k, t
		}
	}
	need = time.Duration(soonest)*time.Millisecond + b.policy.Ahead[c] + frameAge
	if g < len(x.Waiting) {
		need += time.Duration(x.Waiting[g]) * 2 * time.Second // they go first
	}
	return stage, min(need, b.policy.MostLead)
}

// Serving is who is served at a junction.
type Serving struct {
	ID    string
	Class traffic.Priority
	Stage int
	// Why is for the command's rule.
	Why string
}

// Serve returns whom a junction is to serve now: the first of those that are
// activated there.
func (b *Book) Serve(j *traffic.Junction) (Serving, bool) {
	var best *Entry
	var at *Progress
	for _, id := range b.at[j.ID] {
		e := b.Entries[id]
		for i := range e.Stops {
			s := &e.Stops[i]
			if s.Junction != j.ID || s.State != Activated || s.Stage < 0 || s.Stage >= len(j.Stages) {
				continue
			}
			if best == nil || e.Request.Class > best.Request.Class || e.Request.Class == best.Request.Class &&
				(s.Arrival.Before(at.Arrival) || s.Arrival.Equal(at.Arrival) && e.Order < best.Order) {
				best, at = e, s
			}
		}
	}
	if best == nil {
		return Serving{}, false
	}
	return Serving{best.Request.ID, best.Request.Class, at.Stage, fmt.Sprintf("stage %d for group %s", at.Stage, at.Group)}, true
}

// Busy reports whether anybody waits or is served at a junction.
func (b *Book) Busy(id traffic.JunctionID) bool { return len(b.at[id]) > 0 }

// Newest returns what a junction was seen to show last, by its newest periodic
// frame.
func (b *Book) Newest(id traffic.JunctionID) (s traffic.Signal, frame traffic.FrameKey, at time.Time, ok bool) {
	x := b.Seen[id]
	if x == nil {
		return traffic.Signal{}, traffic.FrameKey{}, time.Time{}, false
	}
	return x.Signal, x.Frame, x.At, x.Frame != traffic.FrameKey{}
}

// Command takes an accepted command.
func (b *Book) Command(c *traffic.Command) {
	id, ok := RequestOf(c.Rule)
	if !ok {
		return
	}
	e := b.Entries[id]
	if e == nil {
		return
	}
	for i := range e.Stops {
		s := &e.Stops[i]
		if s.Junction != c.Junction || s.Command != 0 {
			continue
		}
		s.Command = c.Seq
		b.changed[id] = true
	}
}

// Waiting lists, in order, the junctions at which anybody waits or is served.
func (b *Book) Waiting() []traffic.JunctionID { return slices.Sorted(maps.Keys(b.at)) }

// Empty reports whether nothing is kept of any request.
func (b *Book) Empty() bool { return len(b.Entries) == 0 && len(b.Let) == 0 && len(b.Served) == 0 }

// Blind goes on without frames, while nobody agrees on any: what a junction shows
// is not known, so that its stage is asked for as early as it could ever be needed,
// and time alone says who has passed. For a clone; it is not what the log says.
func (b *Book) Blind(n Network, now time.Time) {
	for _, id := range b.Waiting() {
		x := b.Seen[id]
		if x == nil {
			x = &seen{}
			b.Seen[id] = x
		}
		x.At, x.Signal.Stage = now, -1
		for _, r := range slices.Clone(b.at[id]) {
			e := b.Entries[r]
			for i := range e.Stops {
				s := &e.Stops[i]
				if s.Junction != id || s.State.Ended() {
					continue
				}
				switch late := now.Sub(s.Arrival); {
				case now.After(e.Request.Expires):
					b.end(e, s, now, Timeout, RuleExpired+": the request ended")
				case s.State == Activated && late > b.policy.After[e.Request.Class]:
					b.end(e, s, now, Completed, RuleTime+": nobody could see it; decisions are stale")
				case s.State == Queued && late > b.policy.Patience:
					b.end(e, s, now, Timeout, RuleTurn+": its time went by")
				}
			}
			b.settle(e, now)
		}
		b.look(n, id)
	}
}
