// Package signalcontrol turns agreed state into signed commands.
//
// [Core] is pure: accepted frames of one decided block go in, commands come
// out. The same Core decides in the live service, in the pipeline that runs in
// lockstep with a simulator, and in a simulation without any pipeline; only who
// calls it differs. [Run] is the shell around it.
//
// Every periodic frame that reaches a decided block in time is answered by
// exactly one command, also where the stage stays the same: commands are at once
// the orders and the sign of life that keeps a roadside unit from falling back
// to its local plan.
//
// Requests for priority come before what the controller wants, and through the
// same commands: the Core keeps a [priority.Book] of them, which is a function of the
// agreed records too ([Core.Agreed]). A junction that is to serve somebody at once is
// commanded without waiting for its next frame. A junction in an operator's hand is
// not commanded. While decisions are stale, emergency vehicles are served without
// agreement, and each such command says so ([Direct]).
//
// The Core also judges the junctions' detectors by every periodic frame that was
// agreed, in the order of the blocks ([health]). What a detector says that has
// failed is left out of decisions; its movements fall back to other detectors, or
// to being served as the plan has it. Each begin and end of a failure is a signed
// record that is sealed. Since all that is known follows from the log, whoever
// goes through it again finds the same failures and the same decisions; the
// service stores what it knows beside its place in the chain and goes on from
// there.
package signalcontrol

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/health"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// MaxDecisionAge is how old a frame may be for a command to rest on it; beyond
// it decisions are stale, and roadside units run their own plans.
const MaxDecisionAge = 2 * time.Second

// Validity is how long a command may be obeyed. It is as long as a unit waits
// before it falls back, so that no order outlives the decision it came from.
const Validity = 2 * time.Second

// CoreConfig says what a Core decides by.
type CoreConfig struct {
	District traffic.DistrictID
	// Key signs commands; the registry must let it sign the kind command.
	Key ed25519.PrivateKey
	// Policy and its version as filed in the registry.
	Policy, PolicyVersion string
	Controller            timing.Controller
	Rules                 timing.Rules
	// Isolated: junctions do not plan with what their neighbours announce.
	Isolated bool
	// Corridor names the junctions of an arterial that is to have a green wave.
	// Optional.
	Corridor []traffic.JunctionID
}

// Validate reports everything that is wrong, each with its field.
func (c CoreConfig) Validate() error {
	var errs []error
	if c.District == "" {
		errs = append(errs, errors.New("district: must not be empty"))
	}
	if len(c.Key) != ed25519.PrivateKeySize {
		errs = append(errs, errors.New("key: an Ed25519 private key is needed"))
	}
	if c.Controller.Next == nil {
		errs = append(errs, errors.New("controller: must be set, see timing.Named"))
	}
	return errors.Join(errs...)
}

// Core decides for all junctions of a district. Not safe for concurrent use.
type Core struct {
	cfg    CoreConfig
	memory map[traffic.JunctionID]timing.Memory
	last   map[traffic.JunctionID]uint64 // newest command's seq
	health healthState
	// book holds the requests for priority, serving whom each junction's newest
	// command was for.
	book    *priority.Book
	serving map[traffic.JunctionID]serves
	// announced are each junction's newest outflow and the one before: neighbours
	// plan with the newest from before their own frame, whatever the order within
	// a block.
	announced map[traffic.JunctionID][2]timing.Outflow
	unsaid    []timing.Outflow // since the last Outflows
}

// NewCore returns a Core that remembers nothing.
func NewCore(c CoreConfig) (*Core, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("signal-control: %w", err)
	}
	return &Core{cfg: c, memory: map[traffic.JunctionID]timing.Memory{}, last: map[traffic.JunctionID]uint64{},
		announced: map[traffic.JunctionID][2]timing.Outflow{},
		book:      priority.NewBook(priority.Default(), c.Rules), serving: map[traffic.JunctionID]serves{},
		health: healthState{monitors: map[traffic.JunctionID]*health.Monitor{}, last: map[traffic.JunctionID]uint64{}}}, nil
}

// Order is one command with its signed envelope.
type Order struct {
	Command  traffic.Command
	Envelope []byte // canonical
}

// Refusal is a frame on which no command could rest.
type Refusal struct {
	Junction traffic.JunctionID
	Frame    traffic.FrameKey
	Stale    bool // older than MaxDecisionAge
	// Overridden: the junction is in an operator's hand and takes no command.
	Overridden bool
	Reason     string
}

// perBlock bounds how many commands to one junction may rest on one block, so
// that a command's sequence can be made from the height alone and rises across
// restarts without anything being stored.
const perBlock = 1 << 16

// Decide returns what [Core.Commands] does, each command signed.
func (c *Core) Decide(now time.Time, height ledger.Height, frames []*traffic.Frame,
	junction func(traffic.JunctionID) (*traffic.Junction, bool)) ([]Order, []Refusal) {
	commands, refused := c.Commands(now, height, frames, junction)
	orders := make([]Order, len(commands))
	for i := range commands {
		orders[i] = c.order(commands[i])
	}
	return orders, refused
}

// Commands returns the commands that follow from the accepted frames of the block
// at height, in the order of the frames. Of several periodic frames of one
// junction the newest counts, at equal times the later in the block; frames sent
// at events do not ask for a decision. What detectors say that have failed by what
// is known after the block is left out; see [Core.Health].
// junction returns the definition in force.
func (c *Core) Commands(now time.Time, height ledger.Height, frames []*traffic.Frame,
	junction func(traffic.JunctionID) (*traffic.Junction, bool)) ([]traffic.Command, []Refusal) {
	c.Observe(height, frames, junction)
	newest := make(map[traffic.JunctionID]*traffic.Frame, len(frames))
	for _, f := range frames {
		if f.Interval <= 0 {
			continue
		}
		if n := newest[f.Junction]; n == nil || !f.Time.Before(n.Time) {
			newest[f.Junction] = f
		}
	}
	var commands []traffic.Command
	var refused []Refusal
	for _, f := range frames {
		if newest[f.Junction] != f {
			continue
		}
		if age := now.Sub(f.Time); age > MaxDecisionAge {
			refused = append(refused, Refusal{Junction: f.Junction, Frame: f.FrameKey, Stale: true, Reason: fmt.Sprintf("decision is %v old, at most %v may a command rest on", age.Round(time.Millisecond), MaxDecisionAge)})
			continue
		}
		j, ok := junction(f.Junction)
		if !ok {
			refused = append(refused, Refusal{Junction: f.Junction, Frame: f.FrameKey, Reason: "junction is not in the registry"})
			continue
		}
		cmd, err := c.decide(now, height, j, f)
		if err != nil {
			refused = append(refused, Refusal{Junction: f.Junction, Frame: f.FrameKey, Reason: err.Error()})
			continue
		}
		if why := overridden(f); why != "" {
			refused = append(refused, Refusal{Junction: f.Junction, Frame: f.FrameKey, Overridden: true, Reason: why})
			continue
		}
		commands = append(commands, cmd)
	}
	return append(commands, c.urgent(now, height, commands, junction)...), refused
}

func (c *Core) decide(now time.Time, height ledger.Height, j *traffic.Junction, f *traffic.Frame) (traffic.Command, error) {
	v := c.view(j, f)
	if !c.cfg.Isolated {
		v.Corridor = c.cfg.Corridor
		v.Inflow = timing.Inflows(j, f.Time, c.heard(j))
	}
	m, d := c.cfg.Controller.Next(j, c.cfg.Rules, c.memory[j.ID], v)
	m, d = c.prioritise(j, m, d)
	c.memory[j.ID] = m
	if !c.cfg.Isolated {
		c.announce(timing.Announce(j, m))
	}
	if d.Stage < 0 || d.Stage >= len(j.Stages) {
		return traffic.Command{}, fmt.Errorf("controller %s wants stage %d of %d", c.cfg.Controller.Name, d.Stage, len(j.Stages))
	}
	return c.command(now, uint64(height), c.next(j.ID, uint64(height)*perBlock), j.ID, f.FrameKey, d), nil
}
