package hires

import (
	"cmp"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// meterEvent waits in a device's queue for its turn.
type meterEvent struct {
	at int64 // with the detector's offset
	// order within one stamp: rank, param, use
	rank  uint16
	param uint16
	code  uint16
	// use is the line of the configuration, plus one, that an event of a detector
	// is for, and 0 for the event itself.
	use int32
}

func (e *meterEvent) compare(f *meterEvent) int {
	if c := cmp.Compare(e.at, f.at); c != 0 {
		return c
	}
	if c := int(e.rank) - int(f.rank); c != 0 {
		return c
	}
	if c := int(e.param) - int(f.param); c != 0 {
		return c
	}
	return int(e.use - f.use)
}

// rank orders the events of one stamp; see [Measure].
func rank(code uint16) uint16 {
	switch code {
	case PhaseBeginGreen:
		return PhaseInactive + 1 // after the end of the cycle before
	case PedCallRegistered:
		return PedBeginWalk - 1
	}
	return code
}

// meterDevice is what a meter remembers of one device.
type meterDevice struct {
	m      *Meter
	id     traffic.DeviceID
	newest int64 // stamp of the last event
	// behind is by how much events of detectors can lie before those of the lights
	// that were logged at the same time.
	behind int64
	// queue is a heap, the earliest first.
	queue []meterEvent
	prev  meterEvent // the last that left the queue

	phases    map[uint16]*meterPhase
	channels  map[uint16]*meterChannel
	preempts  map[uint16]*preemption
	priority  map[uint16]*PriorityRow
	detectors []detectorUse
	sums      []*detectorSum
}

// detectorUse is a line of the configuration at work.
type detectorUse struct {
	*Detector
	phase *meterPhase
	// stop is the detector's occupation, nil if it is not at the stop line.
	stop *occupation
}

// meterChannel counts a detector's actuations.
type meterChannel struct {
	uses []int32 // indices of detectors
	sums []*detectorSum
	bin  int64
	n    int
}

// detectorSum counts the actuations of several detectors.
type detectorSum struct {
	phase     uint16
	function  string // or
	movement  string
	detectors int
	bin       int64
	n         int
}

func (m *Meter) newDevice(id traffic.DeviceID) *meterDevice {
	d := &meterDevice{m: m, id: id, phases: map[uint16]*meterPhase{}, channels: map[uint16]*meterChannel{},
		preempts: map[uint16]*preemption{}, priority: map[uint16]*PriorityRow{}}
	if m.o.Detectors == nil {
		return d
	}
	lines := m.o.Detectors.devices[id]
	type key struct {
		phase          uint16
		function, turn string
	}
	sums := map[key]*detectorSum{}
	sum := func(c *meterChannel, k key, s detectorSum) {
		if sums[k] == nil {
			sums[k] = &s
			d.sums = append(d.sums, &s)
		}
		if !slices.Contains(c.sums, sums[k]) {
			c.sums = append(c.sums, sums[k])
			sums[k].detectors++
		}
	}
	for i := range lines {
		l := &lines[i]
		c := d.channel(l.Channel)
		if m.want[MeasurePhaseVolumes] {
			sum(c, key{l.Phase, l.function, ""}, detectorSum{phase: l.Phase, function: l.Function})
		}
		if m.want[MeasureTurns] && l.Movement != "" {
			sum(c, key{l.Phase, "", l.Movement}, detectorSum{phase: l.Phase, movement: l.Movement})
		}
		u := detectorUse{Detector: l}
		switch l.function {
		case fnAdvance:
			if !m.want[MeasureAOG] && !m.want[MeasurePCD] && !m.want[MeasurePCDArrivals] {
				continue
			}
		case fnYellowRed:
			if !m.want[MeasureYellowRed] {
				continue
			}
		case fnPresence:
			if !m.want[MeasureSplitFailures] && !m.want[MeasureSplitCycles] {
				continue
			}
			u.stop = &occupation{}
		default:
			continue
		}
		u.phase = d.phase(l.Phase)
		u.phase.passes = u.phase.passes || l.function == fnYellowRed
		if u.stop != nil {
			u.phase.stops = append(u.phase.stops, u.stop)
		}
		d.behind = max(d.behind, -int64(l.Offset))
		c.uses = append(c.uses, int32(len(d.detectors)))
		d.detectors = append(d.detectors, u)
	}
	return d
}

func (d *meterDevice) phase(n uint16) *meterPhase {
	p := d.phases[n]
	if p == nil {
		p = &meterPhase{d: d, number: n}
		d.phases[n] = p
	}
	return p
}

func (d *meterDevice) channel(n uint16) *meterChannel {
	c := d.channels[n]
	if c == nil {
		c = &meterChannel{}
		d.channels[n] = c
	}
	return c
}

// take puts an event in the queue, once for each thing that it is used for.
func (d *meterDevice) take(e Event) {
	v := meterEvent{at: e.At, rank: rank(e.Code), param: e.Param, code: e.Code}
	switch e.Code {
	case DetectorOff, DetectorOn:
		c := d.channels[e.Param]
		if e.Code == DetectorOn {
			d.push(v)
		}
		if c == nil {
			return
		}
		for _, i := range c.uses {
			if e.Code == DetectorOff && d.detectors[i].stop == nil {
				continue
			}
			v.use, v.at = i+1, e.At+int64(d.detectors[i].Offset)
			d.push(v)
		}
	case PhaseBeginGreen, PhaseGapOut, PhaseMaxOut, PhaseForceOff, PhaseEndGreen, PhaseBeginYellow, PhaseEndYellow,
		PhaseBeginRedClear, PhaseEndRedClear, PhaseInactive, PedBeginWalk, PedCallRegistered,
		PreemptInputOn, PreemptGateDown, PreemptInputOff, PreemptEntry, PreemptBeginTrack, PreemptBeginDwell,
		PreemptMaxPresence, PreemptBeginExit,
		PriorityCheckIn, PriorityEarlyGreen, PriorityExtendGreen, PriorityCheckOut:
		d.push(v)
	}
}

func (d *meterDevice) push(e meterEvent) {
	q := append(d.queue, e)
	i := len(q) - 1
	for i > 0 {
		up := (i - 1) / 2
		if q[up].compare(&e) <= 0 {
			break
		}
		q[i] = q[up]
		i = up
	}
	q[i] = e
	d.queue = q
}

func (d *meterDevice) pop() meterEvent {
	q := d.queue
	first, last := q[0], q[len(q)-1]
	q = q[:len(q)-1]
	d.queue = q
	if len(q) == 0 {
		return first
	}
	i := 0
	for {
		down := 2*i + 1
		if down >= len(q) {
			break
		}
		if down+1 < len(q) && q[down+1].compare(&q[down]) < 0 {
			down++
		}
		if last.compare(&q[down]) <= 0 {
			break
		}
		q[i] = q[down]
		i = down
	}
	q[i] = last
	return first
}

// release lets the events before a time happen.
func (d *meterDevice) release(before int64) {
	for len(d.queue) > 0 && d.queue[0].at < before {
		e := d.pop()
		if e == d.prev {
			continue // logged twice
		}
		d.prev = e
		d.happen(&e)
	}
}

func (d *meterDevice) happen(e *meterEvent) {
	switch {
	case e.use > 0:
		// What would reach the stop line after the end of the log meets lights that
		// nobody knows.
		if u := &d.detectors[e.use-1]; e.at <= d.newest {
			u.happen(e)
		}
	case e.code == DetectorOn:
		d.count(e)
	case e.code <= PedCallRegistered:
		d.phase(e.param).happen(e)
	case e.code <= PreemptBeginExit:
		if d.m.want[MeasurePreempts] {
			d.preempt(e)
		}
	default:
		if d.m.want[MeasurePriority] {
			d.prioritise(e)
		}
	}
}

// count counts an actuation, whatever the lights show.
func (d *meterDevice) count(e *meterEvent) {
	if !d.m.in(e.at) {
		return
	}
	c := d.channel(e.param)
	bin := d.m.bin(e.at)
	if bin != c.bin {
		d.flushChannel(e.param, c)
		c.bin = bin
	}
	c.n++
	for _, s := range c.sums {
		if bin != s.bin {
			d.flushSum(s)
			s.bin = bin
		}
		s.n++
	}
}

func (d *meterDevice) flushChannel(n uint16, c *meterChannel) {
	if c.n > 0 && d.m.want[MeasureVolumes] {
		d.m.out.Volumes = append(d.m.out.Volumes, VolumeRow{Stamp(c.bin), d.id, n, c.n})
	}
	c.n = 0
}

func (d *meterDevice) flushSum(s *detectorSum) {
	switch {
	case s.n == 0:
	case s.movement != "":
		d.m.out.Turns = append(d.m.out.Turns, TurnRow{Stamp(s.bin), d.id, s.phase, s.movement, s.detectors, s.n})
	default:
		d.m.out.PhaseVolumes = append(d.m.out.PhaseVolumes, PhaseVolumeRow{Stamp(s.bin), d.id, s.phase, s.function, s.detectors, s.n})
	}
	s.n = 0
}

// finish ends the device's log. The order in which maps are walked does not show:
// all rows are sorted afterwards.
func (d *meterDevice) finish() {
	d.release(1<<63 - 1)
	for _, p := range d.phases {
		p.finish()
	}
	for n, c := range d.channels {
		d.flushChannel(n, c)
	}
	for _, s := range d.sums {
		d.flushSum(s)
	}
	for n, p := range d.preempts {
		if p.open {
			d.endPreempt(n, p)
		}
	}
	for _, r := range d.priority {
		if r != nil {
			d.m.out.Priority = append(d.m.out.Priority, *r)
		}
	}
}
