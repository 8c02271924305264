package timing

import (
	"strings"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Memory is what a controller remembers of one junction between two frames. It
// is plain data that may be stored and sent; its zero value starts. A
// controller never changes the one it is given. Memory of another definition
// (other numbers of groups or movements) is forgotten.
type Memory struct {
	AtMS      int64  `json:"at_ms"`      // Unix time of the last view
	DecidedMS int64  `json:"decided_ms"` // Unix time of the last decision, 0 before the first
	Stage     int    `json:"stage"`      // what was decided
	Rule      string `json:"rule"`       // and why
	// RedMS is, by group, how long somebody has been waiting at red, and GapMS
	// how long nobody has used the green.
	RedMS []int64 `json:"red_ms,omitempty"`
	GapMS []int64 `json:"gap_ms,omitempty"`
	// Queue is, by movement, an estimate of the waiting vehicles from what loops
	// counted in and out, where nothing counts the vehicles themselves.
	Queue []int `json:"queue,omitempty"`
	// Lanes is what the adaptive controller knows of each approach lane.
	Lanes []LaneMemory `json:"lanes,omitempty"`
	// Shares is, by movement, how many thousandths of its lane's vehicles go that
	// way. Exits is, by exit, how many vehicles were on it.
	Shares []int64 `json:"shares,omitempty"`
	Exits  []int   `json:"exits,omitempty"`
	// Sent is, by exit, what is announced to those downstream.
	Sent []SentMemory `json:"sent,omitempty"`

	model *model // of the definition, made again where it is missing
}

// Decision is the stage that a controller wants, and in a few words why.
type Decision struct {
	Stage int    `json:"stage"`
	Rule  string `json:"rule"`
}

// Controller decides which stage a junction should show. Next is a pure
// function: the same definition, rules, memory and view give the same memory
// and decision. The definition must have passed [traffic.Junction.Check].
type Controller struct {
	Name string
	// Version names this behaviour; it changes when any input would lead to
	// another decision than before.
	Version string
	Next    func(j *traffic.Junction, r Rules, m Memory, v View) (Memory, Decision)
}

var controllers = []Controller{
	{Name: "fixed", Version: "1", Next: fixed},
	{Name: "actuated", Version: "1", Next: actuated},
	{Name: "maxpressure", Version: "1", Next: maxPressure},
	{Name: "adaptive", Version: "1", Next: adaptive},
}

// Named returns the controller with the given name: fixed, actuated or
// maxpressure. Any other name is an error of kind Invalid that lists the names.
func Named(name string) (Controller, error) {
	var all []string
	for _, c := range controllers {
		if c.Name == name {
			return c, nil
		}
		all = append(all, c.Name)
	}
	return Controller{}, kind.Errorf(kind.Invalid, "controller %q: must be one of %s", name, strings.Join(all, ", "))
}

const (
	// defaultMaxRedMS bounds a wait where neither rules nor definition do.
	defaultMaxRedMS = 120_000
	// maxFrameGapMS is the longest time that one view may stand for. After a
	// longer silence nobody knows who waited.
	maxFrameGapMS = 5_000
	// lostOrderMS is how long a junction may rest in another stage than the
	// decided one before the decision counts as lost, and another is made.
	lostOrderMS = 5_000
)

// observe returns the memory as of the view's time.
func (m Memory) observe(j *traffic.Junction, v View) Memory {
	now := v.Now.UnixMilli()
	if len(m.RedMS) != len(j.Groups) || len(m.GapMS) != len(j.Groups) || len(m.Queue) != len(j.Movements) {
		m = Memory{RedMS: make([]int64, len(j.Groups)), GapMS: make([]int64, len(j.Groups)), Queue: make([]int, len(j.Movements))}
	} else {
		m.RedMS = append([]int64(nil), m.RedMS...)
		m.GapMS = append([]int64(nil), m.GapMS...)
		m.Queue = append([]int(nil), m.Queue...)
	}
	var dt int64
	if m.AtMS != 0 {
		dt = min(max(now-m.AtMS, 0), maxFrameGapMS)
	}
	m.AtMS = now
	for i := range j.Movements {
		mv := &v.Movements[i]
		green := v.Signal.State.At(j.Movements[i].Group).Go()
		switch {
		case mv.Counted || !mv.Known:
			m.Queue[i] = 0
		default:
			m.Queue[i] = max(m.Queue[i]+mv.Arrived-mv.Departed, 0)
			if mv.Present {
				m.Queue[i] = max(m.Queue[i], 1)
			} else if !green {
				// Nobody at the stop line at red: what was counted in has
				// turned off, or was a miscount.
				m.Queue[i] = min(m.Queue[i], mv.Arrived)
			}
		}
	}
	for g := range j.Groups {
		switch {
		case v.Signal.State.At(g).Go():
			m.RedMS[g] = 0
			if used(j, v, g) {
				m.GapMS[g] = 0
			} else {
				m.GapMS[g] += dt
			}
		default:
			m.GapMS[g] = 0
			if m.demand(j, v, g) {
				m.RedMS[g] += dt
			} else {
				m.RedMS[g] = 0
			}
		}
	}
	return m
}

// demand reports whether somebody wants group g's green, or might: a movement
// of which nothing is known always does.
func (m Memory) demand(j *traffic.Junction, v View, g int) bool {
	if v.Calls[g] {
		return true
	}
	for i := range j.Movements {
		if j.Movements[i].Group != g {
			continue
		}
		mv := &v.Movements[i]
		if !mv.Known || mv.Vehicles > 0 || mv.Present || m.Queue[i] > 0 || v.Priority[i] > traffic.NoPriority {
			return true
		}
	}
	return false
}

// used reports whether somebody uses group g's green, or stands before it.
func used(j *traffic.Junction, v View, g int) bool {
	for i := range j.Movements {
		if j.Movements[i].Group != g {
			continue
		}
		mv := &v.Movements[i]
		if mv.Present || mv.Departed > 0 || mv.Arrived > 0 || v.Priority[i] > traffic.NoPriority {
			return true
		}
	}
	return false
}

// decide notes a decision.
func (m Memory) decide(stage int, rule string) (Memory, Decision) {
	m.DecidedMS, m.Stage, m.Rule = m.AtMS, stage, rule
	return m, Decision{stage, rule}
}

// repeat keeps the last decision.
func (m Memory) repeat() (Memory, Decision) { return m, Decision{m.Stage, m.Rule} }

// mayDecide reports whether a controller that is called each second is to
// decide now: the rules' interval has come round, no change is under way and
// the stage has had its minimum green.
func (m Memory) mayDecide(j *traffic.Junction, r Rules, v View) bool {
	if m.DecidedMS == 0 || m.Stage < 0 || m.Stage >= len(j.Stages) {
		return true
	}
	every := max(r.DecisionMS, 1)
	if floor(m.AtMS, every) == floor(m.DecidedMS, every) {
		return false
	}
	if v.Signal.Stage < 0 || v.Signal.Stage != m.Stage && m.AtMS-m.DecidedMS < lostOrderMS {
		return false // on its way to what was decided
	}
	return v.Signal.SinceMS >= stageMinGreen(j, r, v.Signal.Stage)
}

// floor is the number of the interval of length every that t falls into.
func floor(t, every int64) int64 {
	q := t / every
	if t%every < 0 {
		q--
	}
	return q
}

// emergency returns the stage to show for a vehicle in an emergency, -1 where
// there is none. A stage that protects its movement is better than one in which
// it has to yield, and one that is shown already better than any other.
func emergency(j *traffic.Junction, v View) int {
	best, score := -1, 0
	for k := range j.Stages {
		n := 0
		for i := range j.Movements {
			if v.Priority[i] < traffic.Emergency {
				continue
			}
			switch j.Stages[k].State.At(j.Movements[i].Group) {
			case traffic.Green:
				n += 4
			case traffic.Permissive:
				n += 2
			}
		}
		if n > 0 && k == v.Signal.Stage {
			n++
		}
		if n > score {
			best, score = k, n
		}
	}
	return best
}
