package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

const policyManual = `

OTHER POLICIES
With --policy A --against B no log is brought in: the frames in the log of the
data folder are decided on once more, and what B would have decided otherwise
than A is printed: junction, time, for how long, the stages and the rules.
A policy is CONTROLLER or CONTROLLER/RULES; without rules those that were in force
count. recorded is the one in force. Every frame is one that was seen while the
recorded policy ruled: the street's answer to another policy is not in the log, so
that the first difference at a junction is firm and later ones are what B would
have done in A's place at that moment. simulate shows where it would lead.

The recorded policy is decided anew in any case, and must give the commands in the
log; where it does not, and where a command is missing or names another version of
its controller, that is printed and the exit status is 1.`

// recordedPolicy is what --policy takes for the one in the log.
const recordedPolicy = "recorded"

// policyReplay is what a replay of decisions finds.
type policyReplay struct {
	District traffic.DistrictID `json:"district"`
	Policy   string             `json:"policy"`
	Against  string             `json:"against"`
	From     time.Time          `json:"from"`
	To       time.Time          `json:"to"`
	Blocks   int                `json:"blocks"`
	Frames   int                `json:"frames"`
	Gone     int                `json:"gone"` // records whose payloads were let go of
	// Commands are those in the log, Repeated those of them that the recorded
	// policy gives again; Mismatches tells of the others.
	Commands   int              `json:"commands"`
	Repeated   int              `json:"repeated"`
	Mismatches []policyMismatch `json:"mismatches"`
	// Decisions were made by both, Different ones are for another stage.
	Decisions   int                                      `json:"decisions"`
	Different   int                                      `json:"different"`
	ByJunction  map[traffic.JunctionID]policyCount       `json:"by_junction"`
	Differences []policyDifference                       `json:"differences"`
	open        map[traffic.JunctionID]*policyDifference // that goes on
	last        ledger.Height                            // with a command
}

type policyCount struct {
	Decisions int `json:"decisions"`
	Different int `json:"different"`
}

// policyMismatch is a command that cannot be repeated, or was not recorded.
type policyMismatch struct {
	Height   uint64             `json:"height"`
	Time     time.Time          `json:"time"`
	Junction traffic.JunctionID `json:"junction"`
	What     string             `json:"what"`
}

// policyDifference is a time in which both wanted other stages, the same two all
// along.
type policyDifference struct {
	Junction  traffic.JunctionID `json:"junction"`
	From      time.Time          `json:"from"`
	To        time.Time          `json:"to"` // of the last such decision
	Decisions int                `json:"decisions"`
	Stage     int                `json:"stage"`
	Rule      string             `json:"rule"`
	Against   int                `json:"against_stage"`
	Other     string             `json:"against_rule"`
}

// mostMismatches bounds the list; all are counted.
const mostMismatches = 1000

// decidedBlock is what the log has of one block.
type decidedBlock struct {
	height   ledger.Height
	at       time.Time
	frames   []*traffic.Frame
	commands []*traffic.Command
	changes  []signedChange
	// records are all of them in order, for what they say of requests for priority.
	records []signalcontrol.Record
}

type signedChange struct {
	signer identity.KeyID
	change identity.Change
}

// blockTimes reads when each block was decided.
func blockTimes(dir string) (_ map[ledger.Height]time.Time, err error) {
	log, err := seglog.OpenReader(filepath.Join(dir, "log/blocks"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	out := map[ledger.Height]time.Time{}
	err = log.Scan(log.First(), func(i uint64, rec []byte) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return fmt.Errorf("block journal: record %d: %w", i, err)
		}
		out[d.Header.Height] = d.Header.Time
		return nil
	})
	return out, err
}

// scanDecided calls f with each block of a data folder that has records, in order.
func scanDecided(dir string, gone *int, f func(*decidedBlock) error) (err error) {
	store, err := payload.OpenReader(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	times, err := blockTimes(dir)
	if err != nil {
		return err
	}
	var b *decidedBlock
	err = store.Scan(0, func(_ retention.Class, p *ledger.Payload) error {
		if len(p.Envelope) == 0 {
			*gone++
			return nil
		}
		if b == nil || b.height != p.Height {
			if b != nil {
				if err := f(b); err != nil {
					return err
				}
			}
			b = &decidedBlock{height: p.Height, at: times[p.Height]}
		}
		c := wire.Candidate(p.Envelope, p.Salt[:])
		if c.Err == nil {
			b.records = append(b.records, signalcontrol.Record{Index: p.Index, Candidate: &c})
		}
		switch {
		case c.Err != nil:
			return fmt.Errorf("record %d cannot be read: %w", p.Index, c.Err)
		case c.Frame != nil:
			b.frames = append(b.frames, c.Frame)
		case c.Command != nil:
			b.commands = append(b.commands, c.Command)
		case c.Change != nil:
			b.changes = append(b.changes, signedChange{c.Envelope.Key, *c.Change})
		}
		return nil
	})
	if err != nil || b == nil {
		return err
	}
	return f(b)
}

// policyOf reads CONTROLLER or CONTROLLER/RULES.
func policyOf(text, rules string) (timing.Controller, timing.Rules, error) {
	name, own, ok := strings.Cut(text, "/")
	if ok {
		rules = own
	}
	c, err := timing.Named(name)
	if err != nil {
		return timing.Controller{}, timing.Rules{}, err
	}
	r, err := timing.RulesNamed(rules)
	return c, r, err
}

func (o *replayOptions) replayPolicy(_ context.Context, s streams) error {
	if o.data == "" || o.policy == "" || o.against == "" || len(o.files) > 0 {
		return usageError("replay: --policy, --against and --data belong together, and no --hires")
	}
	for _, p := range []string{o.policy, o.against} {
		if p == recordedPolicy {
			continue
		}
		if _, _, err := policyOf(p, "field"); err != nil {
			return usageError("replay: %v", err)
		}
	}
	r, err := replayDecisions(o.data, o.policy, o.against)
	if err != nil {
		return err
	}
	if o.json {
		err = json.NewEncoder(s.out).Encode(r)
	} else {
		err = r.print(s.out)
	}
	switch {
	case err != nil:
		return err
	case r.Commands == 0:
		return errors.New("replay: there is no command in the log to begin from")
	case len(r.Mismatches) > 0:
		return fmt.Errorf("replay: %d of %d commands in the log are not what their policy gives", r.Commands-r.Repeated, r.Commands)
	}
	return nil
}

// cores are the three deciders of a replay: as it was recorded, A and B.
type cores struct {
	policy         string // that is in force
	recorded, a, b *signalcontrol.Core
}

func replayDecisions(dir, policy, against string) (*policyReplay, error) {
	d, err := district.Load(dir)
	if err != nil {
		return nil, err
	}
	reg, err := identity.NewRegistry(&d.Genesis)
	if err != nil {
		return nil, err
	}
	r := &policyReplay{District: d.Genesis.District, Policy: policy, Against: against, Mismatches: []policyMismatch{},
		Differences: []policyDifference{}, ByJunction: map[traffic.JunctionID]policyCount{}, open: map[traffic.JunctionID]*policyDifference{}}
	// A command is sealed a block or more after the one that it rests on.
	commands := map[ledger.Height][]*traffic.Command{}
	if err := scanDecided(dir, new(int), func(b *decidedBlock) error {
		for _, c := range b.commands {
			commands[ledger.Height(c.Height)] = append(commands[ledger.Height(c.Height)], c)
			r.Commands++
			r.last = max(r.last, ledger.Height(c.Height))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	var cs *cores
	err = scanDecided(dir, &r.Gone, func(b *decidedBlock) error {
		r.Blocks++
		r.Frames += len(b.frames)
		for _, f := range b.frames {
			if r.From.IsZero() || f.Time.Before(r.From) {
				r.From = f.Time
			}
			if f.Time.After(r.To) {
				r.To = f.Time
			}
		}
		if cmds := commands[b.height]; len(cmds) > 0 {
			c := cmds[0]
			if in := c.Policy + "\n" + c.PolicyVersion + "\n" + c.Controller; cs == nil || cs.policy != in {
				// Another policy is another run of signal-control, which remembers
				// nothing of the one before.
				if cs, err = newCores(reg, c, policy, against); err != nil {
					return err
				}
				cs.policy = in
			}
			r.block(cs, reg, b, cmds)
		} else if cs != nil {
			// Nothing was decided on this block, but what its frames say of
			// detectors counts.
			for _, core := range []*signalcontrol.Core{cs.recorded, cs.a, cs.b} {
				core.Agreed(reg, b.height, b.at, b.records)
				core.Observe(b.height, b.frames, reg.Junction)
			}
		}
		for _, c := range b.changes {
			if err := reg.Apply(uint64(b.height), c.signer, c.change); err != nil {
				return fmt.Errorf("block %d: a change that was accepted does not apply: %w", b.height, err)
			}
		}
		return nil
	})
	for _, id := range slices.Sorted(maps.Keys(r.open)) {
		r.end(id)
	}
	// What ends is noted when it does; people read by what begins.
	slices.SortStableFunc(r.Differences, func(a, b policyDifference) int { return a.From.Compare(b.From) })
	return r, err
}

func newCores(reg *identity.Registry, c *traffic.Command, policy, against string) (*cores, error) {
	e, ok := reg.Entry(identity.TypePolicy, c.Policy)
	if !ok {
		return nil, fmt.Errorf("block %d: policy %q of a command is not in the registry", c.Height, c.Policy)
	}
	var p identity.Policy
	if err := json.Unmarshal(e.Body, &p); err != nil {
		return nil, fmt.Errorf("policy %q: %w", c.Policy, err)
	}
	// Nothing is signed here.
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	core := func(text string) (*signalcontrol.Core, error) {
		if text == recordedPolicy {
			text = c.Controller
		}
		ctrl, rules, err := policyOf(text, p.Rules)
		if err != nil {
			return nil, err
		}
		return signalcontrol.NewCore(signalcontrol.CoreConfig{District: c.District, Key: key, Policy: c.Policy, PolicyVersion: c.PolicyVersion, Controller: ctrl, Rules: rules})
	}
	var out cores
	var err error
	for _, x := range []struct {
		to   **signalcontrol.Core
		text string
	}{{&out.recorded, recordedPolicy}, {&out.a, policy}, {&out.b, against}} {
		if *x.to, err = core(x.text); err != nil {
			return nil, err
		}
	}
	return &out, nil
}

// block decides on one block thrice.
func (r *policyReplay) block(cs *cores, reg *identity.Registry, b *decidedBlock, recorded []*traffic.Command) {
	now := recorded[0].Issued // of all commands on a block
	decide := func(c *signalcontrol.Core) map[traffic.JunctionID]traffic.Command {
		out := map[traffic.JunctionID]traffic.Command{}
		c.Agreed(reg, b.height, b.at, b.records)
		commands, _ := c.Commands(now, b.height, b.frames, reg.Junction)
		for _, x := range commands {
			out[x.Junction] = x
		}
		return out
	}
	again, as, bs := decide(cs.recorded), decide(cs.a), decide(cs.b)
	mismatch := func(id traffic.JunctionID, format string, args ...any) {
		if len(r.Mismatches) < mostMismatches {
			r.Mismatches = append(r.Mismatches, policyMismatch{uint64(b.height), now, id, fmt.Sprintf(format, args...)})
		}
	}
	for _, c := range recorded {
		x, ok := again[c.Junction]
		delete(again, c.Junction)
		switch {
		case !ok:
			mismatch(c.Junction, "command %d: no decision follows from the frames of its block", c.Seq)
		case x.RestsOn != c.RestsOn:
			mismatch(c.Junction, "command %d rests on frame %s, the newest of its block is %s", c.Seq, c.RestsOn, x.RestsOn)
		case x.Stage != c.Stage || x.Rule != c.Rule:
			mismatch(c.Junction, "command %d: stage %d by %q, its policy gives stage %d by %q", c.Seq, c.Stage, c.Rule, x.Stage, x.Rule)
		case x.ControllerVersion != c.ControllerVersion:
			mismatch(c.Junction, "command %d: by version %q of %s, this is %q; it gives the same", c.Seq, c.ControllerVersion, c.Controller, x.ControllerVersion)
		default:
			r.Repeated++
		}
	}
	for _, f := range b.frames { // in order, and not in that of a map
		// The commands of the last block may have been on their way when all ended.
		if x, ok := again[f.Junction]; ok && x.RestsOn == f.FrameKey && b.height != r.last {
			mismatch(f.Junction, "frame %s: stage %d follows from it, and no command is in the log", f.FrameKey, x.Stage)
		}
	}
	for _, f := range b.frames {
		x, ok := as[f.Junction]
		y, ok2 := bs[f.Junction]
		if !ok || !ok2 || x.RestsOn != f.FrameKey {
			continue
		}
		r.compare(f, x, y)
	}
}

// compare notes one pair of decisions.
func (r *policyReplay) compare(f *traffic.Frame, x, y traffic.Command) {
	n := r.ByJunction[f.Junction]
	n.Decisions++
	r.Decisions++
	d := r.open[f.Junction]
	if d != nil && (x.Stage == y.Stage || d.Stage != x.Stage || d.Against != y.Stage) {
		r.end(f.Junction)
		d = nil
	}
	if x.Stage != y.Stage {
		n.Different++
		r.Different++
		if d == nil {
			d = &policyDifference{Junction: f.Junction, From: f.Time, Stage: x.Stage, Rule: x.Rule, Against: y.Stage, Other: y.Rule}
			r.open[f.Junction] = d
		}
		d.To = f.Time
		d.Decisions++
	}
	r.ByJunction[f.Junction] = n
}

func (r *policyReplay) end(id traffic.JunctionID) {
	if d := r.open[id]; d != nil {
		r.Differences = append(r.Differences, *d)
		delete(r.open, id)
	}
}

func (r *policyReplay) print(w io.Writer) error {
	for _, m := range r.Mismatches {
		fmt.Fprintf(w, "NOT REPEATED  %s  block %d  %s: %s\n", m.Time.Format(time.DateTime), m.Height, m.Junction, m.What)
	}
	for _, d := range r.Differences {
		fmt.Fprintf(w, "%s  %-12s %4d s  stage %d, %s\n%48s, against stage %d, %s\n", d.From.Format(time.DateTime), d.Junction,
			int(d.To.Sub(d.From).Seconds())+1, d.Stage, d.Rule, "", d.Against, d.Other)
	}
	fmt.Fprintf(w, "%s to %s: %d blocks, %d frames", r.From.Format(time.DateTime), r.To.Format(time.DateTime), r.Blocks, r.Frames)
	if r.Gone > 0 {
		fmt.Fprintf(w, ", %d records were let go of", r.Gone)
	}
	_, err := fmt.Fprintf(w, "\n%d of %d commands in the log repeated\n%s against %s: %d of %d decisions differ\n", r.Repeated, r.Commands, r.Policy, r.Against, r.Different, r.Decisions)
	return err
}
