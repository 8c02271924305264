package timing

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// MovementView is what is known of one movement at the time of a frame.
type MovementView struct {
	// Vehicles are between the detectors' far end and the stop line, of which
	// Halted stand. On a lane that several movements share they are the lane's.
	Vehicles, Halted int
	// Arrived came into view during the interval, Departed passed the stop line.
	Arrived, Departed int
	// Shared is how many movements the counts are divided among: 1 where they
	// are of this movement alone.
	Shared int
	// HeadWaitMS is how long the first vehicle has been standing.
	HeadWaitMS int64
	// OccupancyPermille is the greatest of the movement's detectors.
	OccupancyPermille int
	// Present: somebody is at the stop line.
	Present bool
	// ExitVehicles are on the seen stretch of the exit lane, on which
	// ExitCapacity fit. ExitCapacity is 0 where nothing watches the exit.
	ExitVehicles, ExitCapacity int
	ExitHalted                 int // of ExitVehicles
	// ExitPassed left that stretch at its far end during the interval.
	ExitPassed int
	// Known: at least one detector that tells something of the movement
	// reported. Counted: Vehicles was counted, by an area detector or an oracle,
	// and is not merely 0 because loops cannot tell.
	Known, Counted bool
	// Recall: a detector has failed, and no other one sees the stop line. Nothing
	// is known then, whatever else is; the movement is served in each round, for as
	// long as the plan gives it.
	Recall bool
	// Upstream of Vehicles, and UpstreamHalted of Halted, are not on the
	// movement's own lane yet but on lanes before it, which other lanes may share.
	Upstream, UpstreamHalted int
	// Ahead are the single vehicles that an oracle sees, the nearest first. It is
	// the frame's own: not to be changed.
	Ahead  []traffic.Approach
	Oracle bool // an oracle reported, whether or not it sees anybody
	// InBox have passed the stop line and are still within the junction, of which
	// BoxSlow will not be out in time by themselves. Both are 0 where nothing
	// watches the box.
	InBox, BoxSlow int
}

// View is what a controller sees of one junction: one frame, by movement and
// group instead of by detector.
type View struct {
	Now       time.Time
	Movements []MovementView     // index = Junction.Movements
	Calls     []bool             // by group: pedestrians wait (a button says so, or there is no button)
	Priority  []traffic.Priority // by movement: the strongest right to priority that is present
	Signal    traffic.Signal
	// Inflow are vehicles that neighbours have announced, see [Inflows]. Optional.
	Inflow []Inflow
	// Corridor names the junctions of an arterial that is to have a green wave, this
	// one among them. Optional.
	Corridor []traffic.JunctionID
}

// vehicleCM is the length of street that one standing vehicle takes.
const vehicleCM = 750

// present is the occupancy, in thousandths, from which a loop at the stop line
// is taken to have a vehicle standing on it.
const present = 500

// Observe turns a frame into a view. Readings of detectors that the definition
// does not know are left out. Where a movement has an oracle, what other
// detectors say of it does not count, except for its exit. A nil frame gives a
// view in which nothing is known.
//
// An exit's capacity is what fits, standing, on the stretch that its detector
// covers, and at most what the lane holds.
func Observe(j *traffic.Junction, f *traffic.Frame) View { return ObserveWithout(j, f, nil) }

// ObserveWithout is [Observe] at a junction at which some detectors have failed:
// what they say is left out, as if they were not there. failed may be nil.
//
// A movement that one of them tells something about falls back to its other
// detectors. If none of those sees the stop line (an advance loop sees who comes,
// and not who waits) it is on [MovementView].Recall. Pedestrians without a button
// are taken to wait, as everywhere.
func ObserveWithout(j *traffic.Junction, f *traffic.Frame, failed func(traffic.DetectorID) bool) View {
	v := View{
		Movements: make([]MovementView, len(j.Movements)),
		Calls:     make([]bool, len(j.Groups)),
		Priority:  make([]traffic.Priority, len(j.Movements)),
		Signal:    traffic.Signal{Stage: -1},
	}
	button := make([]bool, len(j.Groups))
	oracle := make([]bool, len(j.Movements))
	var lost, sees []bool // by movement
	if f != nil {
		v.Now, v.Signal = f.Time, f.Signal
		readings := match(j, f)
		if failed != nil {
			lost, sees = make([]bool, len(j.Movements)), make([]bool, len(j.Movements))
			for i, d := range j.Detectors {
				out := failed(d.ID)
				if out {
					readings[i] = nil
				}
				for _, m := range d.Movements {
					switch d.Kind {
					case traffic.StopLine, traffic.Area, traffic.Oracle:
						sees[m] = sees[m] || readings[i] != nil
						lost[m] = lost[m] || out
					case traffic.Advance:
						lost[m] = lost[m] || out
					}
				}
			}
		}
		for i, d := range j.Detectors {
			if r := readings[i]; r != nil && d.Kind == traffic.Oracle {
				for _, m := range d.Movements {
					oracle[m] = true
				}
			}
		}
		for i, d := range j.Detectors {
			r := readings[i]
			if r == nil {
				continue
			}
			switch d.Kind {
			case traffic.Button:
				if d.Group >= 0 && d.Group < len(j.Groups) {
					button[d.Group] = true
					v.Calls[d.Group] = v.Calls[d.Group] || r.Count > 0
				}
			case traffic.ExitArea:
				v.exit(j, d, r)
			case traffic.Box:
				for _, m := range d.Movements {
					// Of several movements it is not known whose they are.
					v.Movements[m].InBox += int(r.Vehicles) / len(d.Movements)
					v.Movements[m].BoxSlow += int(r.Halted)
				}
			default:
				for _, m := range d.Movements {
					v.Priority[m] = max(v.Priority[m], r.Priority)
					if d.Kind == traffic.Oracle || !oracle[m] {
						v.Movements[m].add(d, r, d.Lane == j.Movements[m].From)
					}
				}
			}
		}
	}
	for m := range v.Movements {
		if lost != nil && lost[m] && !sees[m] {
			v.Movements[m].Known, v.Movements[m].Recall = false, true
		}
	}
	for g := range v.Calls {
		if j.Groups[g].Kind == traffic.Pedestrians && !button[g] {
			v.Calls[g] = true
		}
	}
	return v
}

// match finds the reading of each detector, nil where there is none. Frames
// carry readings in the order of the definition, so there is seldom a search.
func match(j *traffic.Junction, f *traffic.Frame) []*traffic.Reading {
	out := make([]*traffic.Reading, len(j.Detectors))
	var byID map[traffic.DetectorID]*traffic.Reading
	for i, d := range j.Detectors {
		if i < len(f.Readings) && f.Readings[i].Detector == d.ID {
			out[i] = &f.Readings[i]
			continue
		}
		if byID == nil {
			byID = make(map[traffic.DetectorID]*traffic.Reading, len(f.Readings))
			for k := range f.Readings {
				byID[f.Readings[k].Detector] = &f.Readings[k]
			}
		}
		out[i] = byID[d.ID]
	}
	return out
}

func (m *MovementView) add(d traffic.Detector, r *traffic.Reading, own bool) {
	m.Known = true
	m.Shared = max(m.Shared, len(d.Movements))
	m.OccupancyPermille = max(m.OccupancyPermille, int(r.OccupancyPermille))
	m.HeadWaitMS = max(m.HeadWaitMS, int64(r.HeadWaitMS))
	switch d.Kind {
	case traffic.Oracle, traffic.Area:
		// Two areas of one movement lie on different lanes or stretches.
		m.Counted = true
		m.Vehicles += int(r.Vehicles)
		m.Halted += int(r.Halted)
		if d.Kind == traffic.Area && !own {
			m.Upstream += int(r.Vehicles)
			m.UpstreamHalted += int(r.Halted)
		}
		m.Present = m.Present || r.Halted > 0 || r.HeadWaitMS > 0
		if d.Kind == traffic.Oracle {
			m.Departed += int(r.Count)
			m.Ahead, m.Oracle = r.Ahead, true
		}
	case traffic.StopLine:
		m.Departed += int(r.Count)
		m.Present = m.Present || r.Vehicles > 0 || r.OccupancyPermille >= present
	case traffic.Advance:
		m.Arrived += int(r.Count)
	}
}

func (v *View) exit(j *traffic.Junction, d traffic.Detector, r *traffic.Reading) {
	lane, ok := j.Lane(d.Lane)
	if !ok {
		return
	}
	room := lane.Capacity
	if fits := max(int(d.LengthCM/vehicleCM), 1); d.LengthCM > 0 && (room <= 0 || fits < room) {
		room = fits
	}
	for i, m := range j.Movements {
		if m.To == d.Lane {
			v.Movements[i].ExitVehicles += int(r.Vehicles)
			v.Movements[i].ExitHalted += int(r.Halted)
			v.Movements[i].ExitPassed += int(r.Count)
			v.Movements[i].ExitCapacity += room
		}
	}
}
