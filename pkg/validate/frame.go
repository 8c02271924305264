package validate

import (
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func frameEntry(c *Candidate) seen {
	return seen{epoch: c.Frame.BootEpoch, seq: c.Frame.Seq, hash: payloadHash(c)}
}

func (s *State) frame(reg *identity.Registry, now time.Time, c *Candidate, h *identity.Holder) Verdict {
	f := c.Frame
	if f.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(f.District), string(reg.District()))
	}
	if h.Type != identity.TypeDevice || h.ID != string(f.Device) {
		return refuse(RuleDevice, "device: %.40q, the signer is %s %s", string(f.Device), h.Type, h.ID)
	}
	dev, known := reg.Device(f.Device)
	if !known {
		return refuse(RuleUnknownKey, "device: %.40q is not in the registry", string(f.Device))
	}
	if f.Junction != dev.Junction {
		return refuse(RuleJunction, "junction: %.40q, device %s is at %s", string(f.Junction), f.Device, dev.Junction)
	}
	j, known := reg.Junction(f.Junction)
	if !known {
		return refuse(RuleJunction, "junction: %.40q is not in the registry", string(f.Junction))
	}
	if f.Seq == 0 {
		return refuse(RuleSchema, "seq: 0, the first after a boot is 1")
	}

	e := frameEntry(c)
	src := s.devices.get(string(f.Device))
	if src != nil && src.quarantined {
		return refuse(RuleQuarantined, "device: %s has signed two frames under one number before", f.Device)
	}
	switch r := src.place(e); r {
	case "":
	case RuleDuplicate:
		return refuse(r, "seq: this frame %s was accepted before", f.FrameKey)
	case RuleEquivocation:
		s.devices.edit(string(f.Device), s.owner).quarantined = true
		return refuse(r, "seq: another frame %s was accepted before; %s is quarantined", f.FrameKey, f.Device)
	default:
		n := src.newest()
		return refuse(r, "seq: boot epoch %d sequence %d, the last was %d sequence %d", e.epoch, e.seq, n.epoch, n.seq)
	}
	v := ok
	if src != nil && src.n > 0 {
		if n := src.newest(); n.epoch == e.epoch {
			v.Gap = e.seq - n.seq - 1
			if v.Gap == 0 && f.Prev != n.hash {
				return refuse(RuleChain, "prev: %x…, the hash of frame %s/%d/%d is %x…", f.Prev[:4], f.Device, n.epoch, n.seq, n.hash[:4])
			}
		} else {
			v.Gap = e.seq - 1
		}
	}
	switch none := f.Prev == (ledger.Hash{}); {
	case none && e.seq > 1:
		return refuse(RuleChain, "prev: empty in frame %s, only the first after a boot has none", f.FrameKey)
	case !none && e.seq == 1:
		return refuse(RuleChain, "prev: %x… in frame %s, the first after a boot has none", f.Prev[:4], f.FrameKey)
	}

	// Sub saturates, and the negative of its least value is itself: each
	// direction has its own difference.
	if d := f.Time.Sub(now); d > s.limits.ClockAhead {
		return refuse(RuleClockAhead, "time: %s, at most %s", seconds(d, "ahead of the clock", ""), secs(s.limits.ClockAhead))
	}
	if d := now.Sub(f.Time); d > s.limits.LateFrames {
		return refuse(RuleClockBehind, "time: %s, at most %s", seconds(d, "behind the clock", ""), secs(s.limits.LateFrames))
	}
	if src != nil && src.n > 0 && src.newest().epoch == e.epoch {
		if d := time.Unix(0, src.time).Sub(f.Time); d > 0 {
			return refuse(RuleClockBackwards, "time: %s before that of frame %s/%d/%d", secs(d), f.Device, e.epoch, src.newest().seq)
		}
	}
	if f.Interval < 0 || f.Interval > s.limits.MaxInterval {
		return refuse(RuleSchema, "interval: %d ms, 0 to %d ms", f.Interval.Milliseconds(), s.limits.MaxInterval.Milliseconds())
	}
	if r := s.lists(f); !r.OK {
		return r
	}
	if r := signal(j, f.Signal); !r.OK {
		return r
	}
	if r := readings(j, &dev, f); !r.OK {
		return r
	}
	s.devices.edit(string(f.Device), s.owner).push(e, f.Time.UnixNano())
	return v
}

// lists checks the events and results of a frame.
func (s *State) lists(f *traffic.Frame) Verdict {
	if n := len(f.Events); n > s.limits.MaxEvents {
		return refuse(RuleSize, "events: %d, at most %d", n, s.limits.MaxEvents)
	}
	if n := len(f.Results); n > s.limits.MaxResults {
		return refuse(RuleSize, "results: %d, at most %d", n, s.limits.MaxResults)
	}
	for i := range f.Events {
		if ms := time.Duration(f.Events[i].OffsetMS) * time.Millisecond; ms > s.limits.MaxInterval {
			return refuse(RuleSchema, "events[%d].offset_ms: %d, at most %d", i, f.Events[i].OffsetMS, s.limits.MaxInterval.Milliseconds())
		}
	}
	for i := range f.Results {
		if n := len(f.Results[i].Reason); n > maxText {
			return refuse(RuleSize, "results[%d].reason: %d bytes, at most %d", i, n, maxText)
		}
	}
	return ok
}

func signal(j *traffic.Junction, s traffic.Signal) Verdict {
	if len(s.State) != len(j.Groups) {
		return refuse(RuleSignal, "signal.state: %d letters, junction %s has %d groups", len(s.State), j.ID, len(j.Groups))
	}
	for i := range len(s.State) {
		if !s.State.At(i).Valid() {
			return refuse(RuleSignal, "signal.state[%d]: %q, must be one of r y G g c u x O", i, s.State[i])
		}
	}
	if s.Stage < -1 || s.Stage >= len(j.Stages) {
		return refuse(RuleSignal, "signal.stage: %d, must be -1 or one of the %d of junction %s", s.Stage, len(j.Stages), j.ID)
	}
	if s.SinceMS < 0 {
		return refuse(RuleSignal, "signal.since_ms: %d, must not be negative", s.SinceMS)
	}
	switch s.Mode {
	case traffic.Coordinated, traffic.Local, traffic.Overridden, traffic.Tripped:
	default:
		return refuse(RuleSignal, "signal.mode: %.20q, must be coordinated, local, override or tripped", string(s.Mode))
	}
	if len(s.Override) > maxText {
		return refuse(RuleSize, "signal.override: %d bytes, at most %d", len(s.Override), maxText)
	}
	if len(s.Trip) > maxText {
		return refuse(RuleSize, "signal.trip: %d bytes, at most %d", len(s.Trip), maxText)
	}
	return ok
}

// The physical bounds. Each is well beyond what honest traffic does, in the
// built-in city, in SUMO and on a street: they are to limit what a lie can do,
// not to find every lie.
const (
	// Vehicles in one lane follow at 1.2 s at least where they are dense, on
	// the average of seconds; lanes with a higher saturation flow get half as much
	// again. Two more may fall into any interval by where it begins and ends.
	headwayMS   = 1200
	countSlack  = 2
	shortestMS  = 1000 // intervals are taken as no shorter
	areaSlack   = 4    // vehicles that change lanes into an area, in one interval
	spaceCM     = 200  // a bicycle takes this much of a queue
	spaceSlack  = 2
	oracleMost  = 2000 // vehicles that a simulator may know of in one movement
	walkersMost = 1000 // pedestrians waiting at one button
	speedFree   = 2500 // cm/s that may be driven anywhere
	speedFactor = 3    // times the limit, where that is more
	speedMost   = 8400 // cm/s, 302 km/h
	waitMostMS  = 24 * 60 * 60 * 1000
	// Vehicles that may count with no occupancy or speed to show for it: the one
	// that came as the interval ended, and the one that was leaving as it began.
	edgeCount = 2
)

// readings checks detectors and what they say.
func readings(j *traffic.Junction, dev *identity.Device, f *traffic.Frame) Verdict {
	n := len(j.Detectors)
	if len(f.Readings) > n {
		return refuse(RuleSize, "readings: %d, junction %s has %d detectors", len(f.Readings), j.ID, n)
	}
	var small [4]uint64
	had := small[:]
	if n > len(small)*64 {
		had = make([]uint64, (n+63)/64)
	}
	interval := max(f.Interval.Milliseconds(), shortestMS)
	next := 0 // readings mostly come in the order of the detectors
	for i := range f.Readings {
		r := &f.Readings[i]
		if next >= n || j.Detectors[next].ID != r.Detector {
			next = slices.IndexFunc(j.Detectors, func(d traffic.Detector) bool { return d.ID == r.Detector })
		}
		if next < 0 {
			return refuse(RuleDetector, "readings[%d].detector: %.40q is not one of junction %s", i, string(r.Detector), j.ID)
		}
		if len(dev.Detectors) > 0 && !slices.Contains(dev.Detectors, r.Detector) {
			return refuse(RuleDetector, "readings[%d].detector: device %s may not speak for %.40q", i, f.Device, string(r.Detector))
		}
		if had[next/64]>>(next%64)&1 == 1 {
			return refuse(RuleTwice, "readings[%d].detector: %.40q has a reading in this frame already", i, string(r.Detector))
		}
		had[next/64] |= 1 << (next % 64)
		if rule, what := reading(j, &j.Detectors[next], r, interval); rule != "" {
			return refuse(rule, "readings[%d] %s: %s", i, r.Detector, what)
		}
		next++
	}
	return ok
}

// reading returns the rule that a reading breaks and how, or nothing.
func reading(j *traffic.Junction, d *traffic.Detector, r *traffic.Reading, intervalMS int64) (Rule, string) {
	if r.OccupancyPermille > 1000 {
		return RuleOccupancy, fmt.Sprintf("occupancy %d.%d %%, at most 100 %%", r.OccupancyPermille/10, r.OccupancyPermille%10)
	}
	if r.Priority > traffic.Emergency {
		return RuleSchema, fmt.Sprintf("priority %d, at most %d", r.Priority, traffic.Emergency)
	}
	if r.HeadWaitMS > waitMostMS {
		return RuleInconsistent, fmt.Sprintf("head wait %s, at most a day", secs(time.Duration(r.HeadWaitMS)*time.Millisecond))
	}
	if r.Count > countSlack+1 { // less is always possible
		if most := mostCount(j, d, intervalMS); int64(r.Count) > most {
			return RuleCount, fmt.Sprintf("count %d in %s, at most %d", r.Count, secs(time.Duration(intervalMS)*time.Millisecond), most)
		}
	}
	if r.SpeedCMS > speedFree {
		if most := mostSpeed(j, d); int64(r.SpeedCMS) > most {
			return RuleSpeed, fmt.Sprintf("speed %s, at most %s", metres(int64(r.SpeedCMS)), metres(most))
		}
	}
	if r.Vehicles > spaceSlack {
		if most := mostVehicles(j, d); int64(r.Vehicles) > most {
			return RuleVehicles, fmt.Sprintf("vehicles %d, at most %d", r.Vehicles, most)
		}
	}
	if len(r.Ahead) > 0 && d.Kind != traffic.Oracle {
		return RuleInconsistent, fmt.Sprintf("single vehicles from a detector of kind %s, which cannot tell them apart", d.Kind)
	}
	if len(r.Ahead) > int(r.Vehicles) {
		return RuleInconsistent, fmt.Sprintf("%d single vehicles of %d", len(r.Ahead), r.Vehicles)
	}
	if r.Halted > r.Vehicles {
		return RuleInconsistent, fmt.Sprintf("halted %d of %d vehicles", r.Halted, r.Vehicles)
	}
	nothing := r.Count == 0 && r.OccupancyPermille == 0 && r.Vehicles == 0
	if nothing && r.HeadWaitMS > 0 {
		return RuleInconsistent, fmt.Sprintf("head wait %s where nothing was", secs(time.Duration(r.HeadWaitMS)*time.Millisecond))
	}
	switch d.Kind {
	case traffic.StopLine, traffic.Advance:
		if r.Count == 0 && r.SpeedCMS > 0 {
			return RuleInconsistent, fmt.Sprintf("speed %s of no vehicle", metres(int64(r.SpeedCMS)))
		}
		// One may have come over the loop and stopped right there. A stop-line
		// loop may know no speeds at all; an advance loop is there for them.
		if d.Kind == traffic.Advance && r.Count > edgeCount && r.SpeedCMS == 0 {
			return RuleInconsistent, fmt.Sprintf("count %d at speed 0", r.Count)
		}
		if r.Count > edgeCount && r.OccupancyPermille == 0 {
			return RuleInconsistent, fmt.Sprintf("count %d at occupancy 0 %%", r.Count)
		}
	case traffic.Area, traffic.ExitArea:
		if nothing && r.Priority != traffic.NoPriority {
			return RuleInconsistent, fmt.Sprintf("priority %d where nothing was", r.Priority)
		}
	case traffic.Button:
		if r.SpeedCMS > 0 || r.Vehicles > 0 || r.OccupancyPermille > 0 || r.Priority != traffic.NoPriority {
			return RuleInconsistent, "a button has a count and a waiting time only"
		}
	}
	return "", ""
}

// mostCount returns how many vehicles may pass a detector in an interval.
func mostCount(j *traffic.Junction, d *traffic.Detector, intervalMS int64) int64 {
	switch d.Kind {
	case traffic.Button:
		return walkersMost
	case traffic.Oracle:
		return oracleMost
	}
	perHour := int64(3_600_000 / headwayMS)
	for _, m := range d.Movements {
		perHour = max(perHour, int64(j.Movements[m].SaturationPerHour)*3/2)
	}
	most := (intervalMS*perHour+3_599_999)/3_600_000 + countSlack
	if d.Kind == traffic.Area || d.Kind == traffic.ExitArea {
		most += areaSlack
	}
	return most
}

// mostSpeed returns the highest speed that is believed of a lane, cm/s.
func mostSpeed(j *traffic.Junction, d *traffic.Detector) int64 {
	l, known := j.Lane(d.Lane)
	if !known {
		return speedMost
	}
	return min(max(l.SpeedCMS*speedFactor, speedFree), speedMost)
}

// mostVehicles returns how many vehicles fit under a detector.
func mostVehicles(j *traffic.Junction, d *traffic.Detector) int64 {
	switch d.Kind {
	case traffic.Button:
		return 0
	case traffic.Oracle:
		return oracleMost
	}
	most := d.LengthCM/spaceCM + spaceSlack
	if l, known := j.Lane(d.Lane); known && d.LengthCM >= l.LengthCM {
		most = max(most, int64(l.Capacity))
	}
	return most
}

func metres(cms int64) string { return fmt.Sprintf("%d.%d m/s", cms/100, cms%100/10) }
