package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

// pipeline decides through every service of a district on the simulated clock.
type pipeline struct {
	*local
	dir    string
	keep   string // the same where it is to stay
	clock  *simClock
	stop   context.CancelFunc
	done   chan struct{} // closed when the services have ended
	err    error         // why; read after done
	units  map[traffic.JunctionID]*roadside.Unit
	orders chan traffic.Command
	attack *attack
	// silent are junctions that had no decision in their last step: nobody waits
	// long for them again until they have. Owned by decide.
	silent map[traffic.JunctionID]bool
	words  atomic.Pointer[flags]
	stops  []func()
}

// staleWait is how long of our own time a step waits for its decisions; then
// those missing are declared stale and the street goes on without them.
const staleWait = 10 * time.Second

// silentWait is how long for those that had none the last time either.
const silentWait = 20 * time.Millisecond

func newPipeline(ctx context.Context, id traffic.DistrictID, defs []*traffic.Junction, clock *simClock, core signalcontrol.CoreConfig, keep string, log *slog.Logger) (*pipeline, error) {
	if _, err := os.Stat(filepath.Join(keep, "genesis.json")); keep != "" && err == nil {
		return nil, usageError("simulate: --data %s: holds a district already; its time and devices would not fit", keep)
	}
	dir, err := freshDir(keep, "stopline-simulate-")
	if err != nil {
		return nil, err
	}
	l, err := newLocal(ctx, localOptions{
		dir: dir, now: clock.now, log: log, core: core,
		open: district.Options{ID: id, Junctions: defs, Created: clock.now().Add(-time.Second), PolicyName: core.Policy,
			Policy: identity.Policy{Version: core.PolicyVersion, Controller: core.Controller.Name, Rules: core.Rules.Name}},
	})
	if err != nil {
		return nil, errors.Join(err, dropDir(dir, keep))
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	p := &pipeline{local: l, dir: dir, keep: keep, clock: clock, stop: stop, done: make(chan struct{}),
		units: map[traffic.JunctionID]*roadside.Unit{}, orders: make(chan traffic.Command, 4*len(defs)+16)}
	l.street.onBlock = p.block
	go func() {
		defer close(p.done)
		p.err = l.run(run)
	}()
	ready, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	if err := l.ready(ready, p.done); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// attach lets the units take the commands that come for them.
func (p *pipeline) attach(units []*roadside.Unit, defs []*traffic.Junction) error {
	for i, u := range units {
		j := defs[i].ID
		p.units[j] = u
		stop, err := p.street.bus.Listen(topic.Command(p.district.Genesis.District, j), "", func(m *nats.Msg) { p.command(j, u, m.Data) })
		if err != nil {
			return err
		}
		p.stops = append(p.stops, stop)
	}
	return nil
}

// command gives an envelope to its unit, whose checks are those of the live
// system, and tells the step that waits for it.
func (p *pipeline) command(j traffic.JunctionID, u *roadside.Unit, envelope []byte) {
	if res := u.Command(p.attack.clock(j, p.clock.now()), envelope); !res.Applied {
		return // counted by the unit; the step becomes stale
	}
	var salt [32]byte
	if c := wire.Candidate(envelope, salt[:]); c.Command != nil {
		select {
		case p.orders <- *c.Command:
		case <-p.done:
		}
	}
}

func (p *pipeline) decide(ctx context.Context, now time.Time, frames []unitFrame) ([]traffic.Command, error) {
	refused := make(chan error, len(frames))
	waiting := make(map[traffic.FrameKey]int, len(frames))
	for i, f := range frames {
		waiting[f.frame.FrameKey] = i
		err := p.street.sender.SendAsync(ctx, p.district.Genesis.District, identity.KindFrame, string(f.frame.Device), f.envelope,
			func(_ *pb.Receipt, err error) {
				if err != nil {
					refused <- err
				}
			})
		if err != nil {
			return nil, err
		}
	}
	commands := make([]traffic.Command, len(frames))
	have := make([]bool, len(frames))
	patience := silentWait
	for _, f := range frames {
		if !p.silent[f.frame.Junction] {
			patience = staleWait
		}
	}
	stale := time.NewTimer(patience)
	defer stale.Stop()
wait:
	for len(waiting) > 0 {
		select {
		case c := <-p.orders:
			if i, ok := waiting[c.RestsOn]; ok {
				commands[i], have[i] = c, true
				delete(waiting, c.RestsOn)
				if patience == staleWait && p.onlySilent(waiting, frames) {
					patience = silentWait
					stale.Reset(silentWait)
				}
			}
		case err := <-refused:
			return nil, fmt.Errorf("a frame was not stored: %w", err)
		case <-stale.C:
			break wait
		case <-p.done:
			return nil, fmt.Errorf("the services have ended: %w", p.err)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for i, f := range frames {
		p.silent[f.frame.Junction] = !have[i]
	}
	// In the order of the frames, whatever the order they came in.
	n := 0
	for i := range commands {
		if have[i] {
			commands[n] = commands[i]
			n++
		}
	}
	return commands[:n], nil
}

// onlySilent reports whether nobody is waited for who had a decision last time.
func (p *pipeline) onlySilent(waiting map[traffic.FrameKey]int, frames []unitFrame) bool {
	for _, i := range waiting {
		if !p.silent[frames[i].frame.Junction] {
			return false
		}
	}
	return len(waiting) > 0
}

// block passes on what a block says of detectors' health.
func (p *pipeline) block(b *decided.Block) {
	seen := p.words.Load()
	if seen == nil {
		return
	}
	for i := range b.Records {
		if r := &b.Records[i]; r.Accepted {
			if c := wire.Candidate(r.Raw, r.Salt[:]); c.Health != nil {
				seen.see(c.Health)
			}
		}
	}
}

// watch hears what is sealed of detectors' health.
func (p *pipeline) watch(a *attack, seen *flags) {
	p.attack, p.silent = a, map[traffic.JunctionID]bool{}
	if a == nil {
		return
	}
	p.words.Store(seen)
}

func (p *pipeline) close() error {
	for _, stop := range p.stops {
		stop()
	}
	p.stop()
	<-p.done
	p.local.close()
	return errors.Join(p.err, dropDir(p.dir, p.keep))
}

// dropDir removes a folder, unless it is the one to keep.
func dropDir(dir, keep string) error {
	if keep != "" {
		return nil
	}
	return os.RemoveAll(dir)
}
