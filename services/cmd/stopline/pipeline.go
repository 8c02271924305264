package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
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
	stops  []func()
}

// staleWait is how long of our own time a step waits for its decisions; then
// those missing are declared stale and the street goes on without them.
const staleWait = 10 * time.Second

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
		stop, err := p.street.bus.Listen(topic.Command(p.district.Genesis.District, j), "", func(m *nats.Msg) { p.command(u, m.Data) })
		if err != nil {
			return err
		}
		p.stops = append(p.stops, stop)
	}
	return nil
}

// command gives an envelope to its unit, whose checks are those of the live
// system, and tells the step that waits for it.
func (p *pipeline) command(u *roadside.Unit, envelope []byte) {
	if res := u.Command(p.clock.now(), envelope); !res.Applied {
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
	stale := time.NewTimer(staleWait)
	defer stale.Stop()
wait:
	for len(waiting) > 0 {
		select {
		case c := <-p.orders:
			if i, ok := waiting[c.RestsOn]; ok {
				commands[i], have[i] = c, true
				delete(waiting, c.RestsOn)
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
