package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/internal/traci"
	"github.com/stopline-traffic/stopline/services/roadside"
)

// world is a street network with signals that can be driven step by step: the
// built-in city, or SUMO.
type world interface {
	Junctions() []*traffic.Junction
	Now() time.Time
	Step() (more bool, err error)
	StepLength() time.Duration
	Close() error
	// cabinet returns the controller cabinet of a junction.
	cabinet(traffic.JunctionID) (roadside.Driver, error)
}

type cityWorld struct{ *sim.City }

func (w cityWorld) cabinet(id traffic.JunctionID) (roadside.Driver, error) { return w.Driver(id) }

type sumoWorld struct{ *traci.World }

func (w sumoWorld) cabinet(id traffic.JunctionID) (roadside.Driver, error) { return w.Driver(id) }

// cityName is what --config takes for the built-in city.
const cityName = "city"

// worldOptions say which world to open.
type worldOptions struct {
	config   string // a .sumocfg, or cityName
	rules    timing.Rules
	sensing  string
	seed     int64
	tripinfo string
	start    time.Time     // of the city; SUMO's is in its configuration
	length   time.Duration // of the city; 0: without end
	rushHour bool          // of the city: the morning peak's demand at any hour
	log      *slog.Logger
}

func openWorld(ctx context.Context, o worldOptions) (world, error) {
	if o.config == cityName {
		c, err := sim.New(sim.Config{Seed: uint64(o.seed), Start: o.start, Duration: o.length, FlatDemand: o.rushHour})
		if err != nil {
			return nil, err
		}
		return cityWorld{c}, nil
	}
	s, err := traci.Load(o.config)
	if err != nil {
		return nil, err
	}
	w, err := traci.Open(ctx, s, traci.Options{
		Limits:  traci.Limits{MinGreenMS: o.rules.MinGreenMS, YellowMS: o.rules.YellowMS, AllRedMS: o.rules.AllRedMS, MaxRedMS: o.rules.MaxRedMS},
		Sensing: traci.Sensing(o.sensing), Seed: o.seed, Tripinfo: o.tripinfo, Logger: o.log,
	})
	if err != nil {
		return nil, err
	}
	return sumoWorld{w}, nil
}

// districtName makes a district's id of a scenario's file name.
func districtName(config string) traffic.DistrictID {
	if config == cityName {
		return "harbour"
	}
	name := config[strings.LastIndexByte(config, '/')+1:]
	return traffic.DistrictID(strings.TrimSuffix(name, ".sumocfg"))
}
