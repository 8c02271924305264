package traci

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Limits are what the caller wants filed as the junctions' own timing. A zero
// YellowMS or MinGreenMS is taken from each map's own plan: its shortest green
// and its shortest yellow.
type Limits struct {
	MinGreenMS, YellowMS, AllRedMS, MaxRedMS int64
}

// Derived is what the network file says about one signal.
type Derived struct {
	Junction *traffic.Junction
	// Declared are pairs of groups whose paths cross and that the map's own
	// program shows protected green together. The map's author says that they
	// may; they are in neither Conflicts nor Yields.
	Declared [][2]int
	// Warnings say what the model could not take over as it is.
	Warnings []string
}

// The lengths in this file are in metres, as SUMO has them.
const (
	vehicleSpace = 7.5 // of a standing car with its gap: what capacities are made of
	traceLength  = 1000.0
	walkingSpeed = 1.2 // m/s, for the clearance of a crossing
)

// Derive makes a checked definition of every signal in the network, in the
// order of the file. Left out are signals that hold no connection, and rail
// signals. What does not fit the model is an error of kind Invalid that names
// the file and the tlLogic.
func (s *Scenario) Derive(lim Limits, sensing Sensing) ([]Derived, error) {
	if err := sensing.check(); err != nil {
		return nil, err
	}
	if lim.MinGreenMS < 0 || lim.YellowMS < 0 || lim.AllRedMS < 0 || lim.MaxRedMS < 0 {
		return nil, kind.Errorf(kind.Invalid, "limits: times must not be negative: %+v", lim)
	}
	n := s.net
	links := map[string][]int{}
	for i, l := range n.links {
		if l.tls != "" {
			links[l.tls] = append(links[l.tls], i)
		}
	}
	var out []Derived
	var errs []error
	for i := range n.logics {
		g := &n.logics[i]
		if g.kind == "rail_signal" || g.kind == "rail_crossing" || len(links[g.id]) == 0 {
			continue
		}
		d, err := n.derive(g, links[g.id], lim, sensing)
		if err != nil {
			errs = append(errs, kind.Errorf(kind.Invalid, "%s: <tlLogic id=%q>: %w", n.file, g.id, err))
			continue
		}
		out = append(out, d)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, kind.Errorf(kind.Invalid, "%s: has no traffic lights (tlLogic) that hold a connection", n.file)
	}
	return out, nil
}

func (n *network) derive(g *logic, held []int, lim Limits, sensing Sensing) (Derived, error) {
	j := &traffic.Junction{ID: traffic.JunctionID(g.id), Name: g.id}
	d := Derived{Junction: j}
	warn := func(format string, args ...any) { d.Warnings = append(d.Warnings, fmt.Sprintf(format, args...)) }
	if len(g.phases) == 0 {
		return d, errors.New("program has no phases")
	}
	groups := len(g.phases[0].state)
	for _, i := range held {
		if x := n.links[i].index; x >= groups {
			return d, fmt.Errorf("<connection from=%q>: linkIndex %d is beyond the %d letters of the program's states", n.lanes[n.links[i].from].edge, x, groups)
		}
	}
	at := n.centre(held)
	lat, lon := n.location.place(at)
	j.LatE6, j.LonE6 = int64(math.Round(lat*1e6)), int64(math.Round(lon*1e6))

	walks := make([]bool, groups)
	for _, i := range held {
		walks[n.links[i].index] = n.lanes[n.links[i].to].function == "crossing"
	}
	plan, err := derivePlan(g, walks)
	if err != nil {
		return d, err
	}
	d.Warnings = append(d.Warnings, plan.warnings...)
	j.Stages, j.Plan = plan.stages, plan.plan

	n.addGroups(j, held)
	n.addMovements(j, held, plan)
	n.addConflicts(&d, held)
	if len(d.Declared) > 0 {
		warn("%d pairs of groups cross and are protected green together in the map's own program: %v", len(d.Declared), d.Declared)
	}
	d.Warnings = append(d.Warnings, fileTiming(j, g, lim)...)
	placeDetectors(n, j, sensing)
	if err := j.Check(); err != nil {
		return d, err
	}
	return d, nil
}

// centre is the mean of where the held lanes end, so that a signal over several
// nodes lies between them.
func (n *network) centre(held []int) point {
	var sum point
	for _, i := range held {
		e := n.lanes[n.links[i].from].end
		sum.x += e.x
		sum.y += e.y
	}
	return point{sum.x / float64(len(held)), sum.y / float64(len(held))}
}

func (n *network) addGroups(j *traffic.Junction, held []int) {
	names := make([][]string, len(j.Stages[0].State))
	peds := make([]float64, len(names)) // longest crossing of a group that walks, in metres
	kinds := make([]traffic.GroupKind, len(names))
	for _, i := range held {
		l := n.links[i]
		from, to := n.lanes[l.from], n.lanes[l.to]
		k := traffic.Vehicles
		name := from.edge + " " + l.dir
		switch {
		case to.function == "crossing" || from.function == "crossing":
			k = traffic.Pedestrians
			name = "crossing " + to.id
			peds[l.index] = max(peds[l.index], to.length)
		case busesOnly(from) || busesOnly(to):
			k = traffic.Buses
		}
		// A group that cars share with buses is the cars'.
		if kinds[l.index] != traffic.Vehicles {
			kinds[l.index] = k
		}
		if !slices.Contains(names[l.index], name) {
			names[l.index] = append(names[l.index], name)
		}
	}
	for i := range names {
		g := traffic.Group{Name: strings.Join(names[i], ", "), Kind: kinds[i]}
		if g.Kind == "" { // a letter of the program that holds nothing
			g.Kind, g.Name = traffic.Vehicles, "unused "+strconv.Itoa(i)
		}
		if g.Kind == traffic.Pedestrians {
			g.PedClearMS = int64(math.Ceil(peds[i]/walkingSpeed)) * 1000
		}
		j.Groups = append(j.Groups, g)
	}
}

func busesOnly(l netLane) bool {
	allowed := strings.Fields(l.allow)
	for _, c := range allowed {
		switch c {
		case "bus", "coach", "tram", "public_transport", "emergency", "taxi":
		default:
			return false
		}
	}
	return len(allowed) > 0
}

// clears reports whether all that the second state changes is that some groups
// that walk are not green any more.
func clears(before, after traffic.State, walks []bool) bool {
	if after == "" || before == after {
		return false
	}
	for i := range len(before) {
		a, b := before.At(i), after.At(i)
		if a != b && !(walks[i] && a.Go() && !b.Go()) {
			return false
		}
	}
	return true
}

// saturation is how many vehicles an hour a link can discharge: 1900 straight
// on under a protected green, less where it turns, and less again where it is
// never protected. The turning factors are the Highway Capacity Manual's.
func saturation(dir string, protected bool) int {
	per := 1900
	switch dir {
	case "l", "L":
		per = 1800
	case "r", "R":
		per = 1600
	case "t":
		per = 1300
	}
	if !protected {
		per = per * 2 / 3
	}
	return per
}

func (n *network) addMovements(j *traffic.Junction, held []int, plan derivedPlan) {
	protected := make([]bool, len(j.Groups))
	for _, s := range plan.stages {
		for g := range protected {
			protected[g] = protected[g] || s.State.At(g) == traffic.Green
		}
	}
	type role struct{ in, out bool }
	roles := map[int]role{}
	order := slices.Clone(held)
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(n.links[a].index, n.links[b].index) })
	for _, i := range order {
		l := n.links[i]
		if j.Groups[l.index].Kind == traffic.Pedestrians {
			continue // walks lead from no lane to no lane
		}
		j.Movements = append(j.Movements, traffic.Movement{
			From: traffic.LaneID(n.lanes[l.from].id), To: traffic.LaneID(n.lanes[l.to].id),
			Group: l.index, SaturationPerHour: saturation(l.dir, protected[l.index]),
		})
		in, out := roles[l.from], roles[l.to]
		in.in = true
		roles[l.from] = in
		if l.from == l.to {
			out = in
		}
		out.out = true
		roles[l.to] = out
	}
	used := make([]int, 0, len(roles))
	for l := range roles {
		used = append(used, l)
	}
	slices.Sort(used)
	for _, l := range used {
		lane := n.lanes[l]
		t := traffic.Lane{
			ID: traffic.LaneID(lane.id), LengthCM: centi(lane.length), SpeedCMS: centi(lane.speed),
			Capacity: max(1, int(lane.length/vehicleSpace)),
		}
		if r := roles[l]; r.in {
			t.To = j.ID
		} else {
			id, far := n.trace(l, false)
			t.To = traffic.JunctionID(id)
			if id != "" {
				t.AheadCM = centi(lane.length + far)
			}
		}
		if r := roles[l]; r.out {
			t.From = j.ID
		} else {
			id, _ := n.trace(l, true)
			t.From = traffic.JunctionID(id)
		}
		j.Lanes = append(j.Lanes, t)
	}
}

func centi(m float64) int64 { return int64(math.Round(m * 100)) }

// trace follows a lane to the nearest signal within a kilometre, upstream or
// downstream, and returns its id or nothing, and how long the lanes in between
// are that come after the first.
func (n *network) trace(lane int, upstream bool) (string, float64) {
	type stop struct {
		lane int
		far  float64
	}
	seen := map[int]bool{lane: true}
	queue := []stop{{lane, 0}}
	for len(queue) > 0 {
		// The nearest first; there are a few dozen at most.
		best := 0
		for i := range queue {
			if queue[i].far < queue[best].far {
				best = i
			}
		}
		at := queue[best]
		queue = slices.Delete(queue, best, best+1)
		for _, i := range n.touching(at.lane, upstream) {
			l := n.links[i]
			if l.tls != "" {
				return l.tls, at.far
			}
			next := l.to
			if upstream {
				next = l.from
			}
			far := at.far + n.lanes[next].length
			if !seen[next] && far < traceLength && n.lanes[next].function == "" {
				seen[next] = true
				queue = append(queue, stop{next, far})
			}
		}
	}
	return "", 0
}

// touching lists the links that lead away from a lane, or to it, and begin on
// the street, not within a junction.
func (n *network) touching(lane int, upstream bool) []int {
	links := n.leaving[lane]
	if upstream {
		links = n.reaching[lane]
	}
	out := make([]int, 0, len(links))
	for _, i := range links {
		if n.lanes[n.links[i].from].function == "" {
			out = append(out, i)
		}
	}
	return out
}

// addConflicts maps the right-of-way bits of the junctions under the signal to
// its groups. Paths of two different junctions never cross.
func (n *network) addConflicts(d *Derived, held []int) {
	j := d.Junction
	size := len(j.Groups)
	foes, yields := make([]bool, size*size), make([]bool, size*size)
	var nodes []int
	for _, i := range held {
		k, ok := n.node[n.lanes[n.links[i].from].id]
		if ok && !slices.Contains(nodes, k) {
			nodes = append(nodes, k)
		}
	}
	for _, k := range nodes {
		node := n.junctions[k]
		group, err := n.requestGroups(node, held)
		if err != nil {
			// Better a conflict too many: whatever the program never shows green
			// together is taken as one.
			d.Warnings = append(d.Warnings, err.Error()+": groups that its program never shows green together are taken as conflicting")
			for _, x := range held {
				for _, y := range held {
					a, b := n.links[x].index, n.links[y].index
					here := n.node[n.lanes[n.links[x].from].id] == k && n.node[n.lanes[n.links[y].from].id] == k
					if here && a != b && !slices.ContainsFunc(j.Stages, func(s traffic.Stage) bool { return s.State.At(a).Go() && s.State.At(b).Go() }) {
						foes[a*size+b], foes[b*size+a] = true, true
					}
				}
			}
			continue
		}
		for _, r := range node.requests {
			if r.index < 0 || r.index >= len(group) || group[r.index] < 0 {
				continue
			}
			a := group[r.index]
			for i, b := range group {
				if b < 0 || a == b {
					continue
				}
				if bit(r.foes, i) || bit(r.response, i) {
					foes[a*size+b], foes[b*size+a] = true, true
				}
				if bit(r.response, i) {
					yields[a*size+b] = true
				}
			}
		}
	}
	j.Conflicts, j.Yields = make([][]int, size), make([][]int, size)
	for a := range size {
		for b := a + 1; b < size; b++ {
			if !foes[a*size+b] {
				continue
			}
			together, declared, aGives, bGives := false, false, false, false
			for _, s := range j.Stages {
				x, y := s.State.At(a), s.State.At(b)
				if !x.Go() || !y.Go() {
					continue
				}
				together = true
				xGives := x == traffic.Permissive && yields[a*size+b]
				yGives := y == traffic.Permissive && yields[b*size+a]
				if !xGives && !yGives {
					// The file's bits do not say who waits; the lamps do.
					xGives, yGives = x == traffic.Permissive, y == traffic.Permissive
				}
				declared = declared || !xGives && !yGives
				aGives, bGives = aGives || xGives, bGives || yGives
			}
			switch {
			case !together:
				j.Conflicts[a] = append(j.Conflicts[a], b)
				j.Conflicts[b] = append(j.Conflicts[b], a)
			case declared:
				d.Declared = append(d.Declared, [2]int{a, b})
			default:
				if aGives {
					j.Yields[a] = append(j.Yields[a], b)
				}
				if bGives {
					j.Yields[b] = append(j.Yields[b], a)
				}
			}
		}
	}
	for i := range size {
		slices.Sort(j.Conflicts[i])
		slices.Sort(j.Yields[i])
	}
}

// requestGroups returns the signal group of each row of a junction's requests,
// -1 where this signal does not hold the link.
func (n *network) requestGroups(node netJunction, held []int) ([]int, error) {
	if len(node.requests) == 0 {
		return nil, fmt.Errorf("<junction id=%q>: has no requests: its conflicts are unknown", node.id)
	}
	group := make([]int, len(node.requests))
	for i := range group {
		group[i] = -1
	}
	row := map[int]int{} // internal lane → request
	for i, id := range node.internal {
		if l, ok := n.lane[id]; ok {
			row[l] = i
		}
	}
	if len(row) == 0 {
		// Without internal lanes the rows are in the order of the incoming lanes.
		i := 0
		for _, id := range node.incoming {
			for _, k := range n.leaving[n.lane[id]] {
				if i < len(group) && slices.Contains(held, k) {
					group[i] = n.links[k].index
				}
				i++
			}
		}
		if i != len(group) {
			return nil, fmt.Errorf("<junction id=%q>: has no internal lanes and %d links for %d requests: its conflicts are unknown", node.id, i, len(group))
		}
		return group, nil
	}
	for _, k := range held {
		l := n.links[k]
		// A link that waits within the junction goes on over further internal
		// lanes, and the junction lists the last of them. A crossing has no
		// internal lane but itself.
		at := l.via
		if at < 0 {
			at = l.to
		}
		for range 4 {
			if i, ok := row[at]; ok && i < len(group) {
				group[i] = l.index
				break
			}
			next := -1
			for _, m := range n.leaving[at] {
				if n.links[m].via >= 0 {
					next = n.links[m].via
					break
				}
			}
			if next < 0 {
				break
			}
			at = next
		}
	}
	return group, nil
}

// fileTiming fills in the junction's limits: the caller's, lowered where the
// map's own plan could not run under them.
func fileTiming(j *traffic.Junction, g *logic, lim Limits) (warnings []string) {
	shortest := int64(math.MaxInt64)
	for _, s := range j.Plan.Steps {
		shortest = min(shortest, s.DurationMS-s.IntergreenMS)
	}
	j.Timing = traffic.Timing{MinGreenMS: lim.MinGreenMS, YellowMS: lim.YellowMS, AllRedMS: lim.AllRedMS, MaxRedMS: lim.MaxRedMS}
	if lim.YellowMS == 0 {
		j.Timing.YellowMS = shortestYellow(g)
	}
	if lim.MinGreenMS == 0 {
		j.Timing.MinGreenMS = shortest
		return nil
	}
	if shortest < lim.MinGreenMS {
		j.Timing.MinGreenMS = shortest
		warnings = append(warnings, fmt.Sprintf("minimum green is %d ms instead of %d ms: the map's own plan has a stage that short", shortest, lim.MinGreenMS))
		// What is short is a stage; groups that the plan gives long enough
		// greens keep the caller's minimum.
		for i := range j.Groups {
			if own := shortestGreen(g, i); own >= lim.MinGreenMS {
				j.Groups[i].MinGreenMS = lim.MinGreenMS
			}
		}
	}
	if lim.MaxRedMS > 0 {
		for i := range j.Groups {
			if red := longestRed(g, i); red > j.Timing.MaxRedMS {
				j.Timing.MaxRedMS = red
				warnings = append(warnings, fmt.Sprintf("maximum red is %d ms instead of %d ms: the map's own plan keeps group %d red for that long", red, lim.MaxRedMS, i))
			}
		}
	}
	return warnings
}

// shortestYellow returns the shortest yellow that any group has in the program,
// and SUMO's default of three seconds where it has none.
func shortestYellow(g *logic) int64 {
	least := int64(math.MaxInt64)
	for i := range len(g.phases[0].state) {
		for _, r := range runs(g, func(p phase) bool { return p.state[i] == 'y' || p.state[i] == 'Y' }) {
			least = min(least, r)
		}
	}
	if least == math.MaxInt64 {
		return 3000
	}
	return least
}

// shortestGreen returns the shortest time for which a group is green without a
// break, 0 where it never is.
func shortestGreen(g *logic, group int) int64 {
	rs := runs(g, func(p phase) bool { return stageAspect(p.state[group]).Go() })
	if len(rs) == 0 {
		return 0
	}
	return slices.Min(rs)
}

func longestRed(g *logic, group int) int64 {
	if len(runs(g, func(p phase) bool { return stageAspect(p.state[group]).Go() })) == 0 {
		return 0 // never green: no plan can be broken by its waiting
	}
	rs := runs(g, func(p phase) bool { return !stageAspect(p.state[group]).Go() })
	if len(rs) == 0 {
		return 0
	}
	return slices.Max(rs)
}

// runs returns how long, in milliseconds, the program stays in phases that
// match, each time that it comes to them; the cycle is a ring.
func runs(g *logic, match func(phase) bool) []int64 {
	n := len(g.phases)
	start := slices.IndexFunc(g.phases, func(p phase) bool { return !match(p) })
	if start < 0 {
		var whole time.Duration
		for _, p := range g.phases {
			whole += p.duration
		}
		return []int64{whole.Milliseconds()}
	}
	var out []int64
	var run time.Duration
	for k := 1; k <= n; k++ {
		p := g.phases[(start+k)%n]
		if match(p) {
			run += p.duration
			continue
		}
		if run > 0 {
			out = append(out, run.Milliseconds())
		}
		run = 0
	}
	return out
}

// stageAspect is what a letter of a program means while no change is under way.
func stageAspect(letter byte) traffic.Aspect {
	switch letter {
	case 'G', 'O':
		return traffic.Green // unlit: the signs of the junction hold, which give this link way
	case 'g', 'o':
		return traffic.Permissive
	}
	return traffic.Red
}

type derivedPlan struct {
	stages   []traffic.Stage
	plan     traffic.Plan
	warnings []string
}

// derivePlan splits a program into stages and the intergreens between them. A
// phase is a stage where something is green and nothing is yellow; what is
// between two stages belongs to the first of them. A phase that only takes the
// green from groups that walk is their clearance, and no stage either.
func derivePlan(g *logic, walks []bool) (derivedPlan, error) {
	var out derivedPlan
	warned := map[byte]bool{}
	n := len(g.phases)
	state := make([]traffic.State, n) // empty for an intergreen phase
	for i, p := range g.phases {
		green, moving := false, false
		b := make([]byte, len(p.state))
		for k := range len(p.state) {
			c := p.state[k]
			switch c {
			case 'r', 'g', 'G':
			case 'y', 'Y', 'u':
				moving = true
			case 's', 'o', 'O':
				if !warned[c] {
					warned[c] = true
					out.warnings = append(out.warnings, fmt.Sprintf("letter '%c' of the program is taken as '%s' in stages", c, stageAspect(c)))
				}
			default:
				return out, fmt.Errorf("<phase> %d: state %q has the letter '%c', which is no signal state", i, p.state, c)
			}
			b[k] = byte(stageAspect(c))
			green = green || stageAspect(c).Go()
		}
		if green && !moving {
			state[i] = traffic.State(b)
		}
		if f := strings.Fields(p.next); len(f) > 1 || len(f) == 1 && f[0] != strconv.Itoa((i+1)%n) {
			out.warnings = append(out.warnings, fmt.Sprintf("phase %d names next %q: the plan takes the phases in the order of the file", i, p.next))
		}
	}
	for i := range n {
		if before := state[(i+n-1)%n]; before != "" && clears(before, state[i], walks) {
			state[i] = ""
		}
	}
	// Begin where a stage begins, so that a stage that goes on over the end of
	// the cycle is one step.
	first := -1
	for i := range n {
		if state[i] != "" && state[i] != state[(i+n-1)%n] {
			first = i
			break
		}
	}
	if first < 0 {
		first = slices.IndexFunc(state, func(s traffic.State) bool { return s != "" })
	}
	if first < 0 {
		return out, errors.New("program has no phase in which something is green and nothing yellow: there is no stage to show")
	}
	var before time.Duration
	for _, p := range g.phases[:first] {
		before += p.duration
	}
	out.plan.Name = "program " + g.program
	for k := range n {
		i := (first + k) % n
		ms := g.phases[i].duration.Milliseconds()
		steps := out.plan.Steps
		if state[i] == "" {
			steps[len(steps)-1].DurationMS += ms
			steps[len(steps)-1].IntergreenMS += ms
			continue
		}
		stage := slices.IndexFunc(out.stages, func(s traffic.Stage) bool { return s.State == state[i] })
		if stage < 0 {
			stage = len(out.stages)
			name := g.phases[i].name
			if name == "" {
				name = "stage " + strconv.Itoa(stage+1)
			}
			out.stages = append(out.stages, traffic.Stage{Name: name, State: state[i]})
		}
		if k > 0 && steps[len(steps)-1].Stage == stage && steps[len(steps)-1].IntergreenMS == 0 {
			steps[len(steps)-1].DurationMS += ms
			continue
		}
		out.plan.Steps = append(steps, traffic.PlanStep{Stage: stage, DurationMS: ms})
	}
	cycle := out.plan.CycleMS()
	out.plan.OffsetMS = ((g.offset+before).Milliseconds()%cycle + cycle) % cycle
	return out, nil
}
