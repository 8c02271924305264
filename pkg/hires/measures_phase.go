package hires

// light is what a phase shows.
type light uint8

const (
	lightUnknown light = iota
	lightGreen
	lightYellow
	lightRedClear
	lightRed
)

// meterPhase follows the lights of one phase through its cycles:
//
//	red begins       green begins        yellow begins   red begins
//	redAt ───────────▶ greenAt ───────────▶ yellowAt ──────▶ redAt
//	      clearance, red         green             yellow
type meterPhase struct {
	d      *meterDevice
	number uint16
	light  light
	// Begins in the cycle in hand, 0 if not seen. For the coordination diagram it
	// runs from redAt to redAt, for split failures from greenAt to greenAt.
	redAt, greenAt, yellowAt int64
	termination              string // last of this green
	dots                     []PCDArrivalRow
	arrivals, onGreen        int // of the diagram's cycle

	calledAt int64 // first call of a pedestrian since the last walk, or 0

	passes bool // has a detector for yellow and red
	stops  []*occupation
	split  splitPhase

	bin phaseBin
}

// phaseBin is what a phase counts in a bin.
type phaseBin struct {
	at                                    int64
	terminations                          [3]int
	arrivals, onGreen                     int
	cycles, yellow, redClear, red, severe int
	calls, walks, samples                 int
	delay, maxDelay                       int64
}

// now returns the bin of time t, or nil if t is not asked for.
func (p *meterPhase) now(t int64) *phaseBin {
	if !p.d.m.in(t) {
		return nil
	}
	if at := p.d.m.bin(t); at != p.bin.at {
		p.flush()
		p.bin.at = at
	}
	return &p.bin
}

func (p *meterPhase) flush() {
	b, d, out := &p.bin, p.d, &p.d.m.out
	at := Stamp(b.at)
	if d.m.want[MeasureTerminations] {
		for i, kind := range [...]string{GapOut, MaxOut, ForceOff} {
			if b.terminations[i] > 0 {
				out.Terminations = append(out.Terminations, TerminationRow{at, d.id, p.number, kind, b.terminations[i]})
			}
		}
	}
	if d.m.want[MeasureAOG] && b.arrivals > 0 {
		out.AOG = append(out.AOG, AOGRow{at, d.id, p.number, b.arrivals, Share(b.onGreen) / Share(b.arrivals), b.onGreen})
	}
	if p.passes && b.cycles+b.yellow+b.redClear+b.red > 0 {
		out.YellowRed = append(out.YellowRed, YellowRedRow{at, d.id, p.number, b.cycles, b.yellow, b.redClear, b.red, b.severe})
	}
	if d.m.want[MeasurePedDelay] && b.calls+b.walks > 0 {
		r := PedDelayRow{at, d.id, p.number, b.calls, b.walks, b.samples, Unknown, Unknown}
		if b.samples > 0 {
			n := int64(b.samples)
			r.Mean = Seconds((b.delay/n + 500_000) / 1_000_000 * 1_000_000) // to the millisecond
			r.Max = Seconds(b.maxDelay)
		}
		out.PedDelay = append(out.PedDelay, r)
	}
	*b = phaseBin{at: b.at}
}

// happen takes an event of the phase.
func (p *meterPhase) happen(e *meterEvent) {
	t := e.at
	switch e.code {
	case PhaseBeginGreen:
		p.green(t)
	case PhaseGapOut, PhaseMaxOut, PhaseForceOff:
		p.termination = [...]string{GapOut, MaxOut, ForceOff}[e.code-PhaseGapOut]
		if b := p.now(t); b != nil {
			b.terminations[e.code-PhaseGapOut]++
		}
	case PhaseEndGreen, PhaseBeginYellow:
		p.yellow(t)
	case PhaseEndYellow, PhaseBeginRedClear:
		p.red(t)
	case PhaseEndRedClear, PhaseInactive:
		switch p.light {
		case lightRedClear:
			p.light = lightRed
		case lightGreen, lightYellow, lightUnknown:
			// The begin of red is missing: the cycle cannot be measured, nor the
			// one that would begin with this red.
			p.lose()
			p.light, p.redAt = lightRed, 0
		}
	case PedCallRegistered:
		if p.calledAt == 0 {
			p.calledAt = t
		}
		if b := p.now(t); b != nil {
			b.calls++
		}
	case PedBeginWalk:
		if b := p.now(t); b != nil {
			b.walks++
			if p.calledAt != 0 {
				b.samples++
				b.delay += t - p.calledAt
				b.maxDelay = max(b.maxDelay, t-p.calledAt)
			}
		}
		p.calledAt = 0
	}
}

func (p *meterPhase) green(t int64) {
	if p.light == lightGreen || p.light == lightYellow {
		p.lose()
		p.redAt = 0
	}
	p.split.begin(t)
	p.settle(t)
	p.light, p.greenAt, p.yellowAt, p.termination = lightGreen, t, 0, ""
}

func (p *meterPhase) yellow(t int64) {
	switch p.light {
	case lightGreen:
		p.yellowAt = t
	case lightUnknown:
	default:
		return
	}
	p.light = lightYellow
	if b := p.now(t); b != nil {
		b.cycles++
	}
}

func (p *meterPhase) red(t int64) {
	switch p.light {
	case lightRedClear, lightRed:
		return
	case lightGreen:
		p.lose()
	case lightYellow:
		if p.greenAt != 0 && p.yellowAt > p.greenAt {
			p.split.cycles = append(p.split.cycles, splitCycle{p.greenAt, p.yellowAt, t, t + int64(p.d.m.o.RedTime), p.termination})
			p.diagram(t)
		} else {
			p.lose()
		}
	}
	p.light, p.redAt, p.greenAt, p.yellowAt = lightRedClear, t, 0, 0
	p.dots, p.arrivals, p.onGreen = p.dots[:0], 0, 0
	p.settle(t)
}

// lose drops the cycle in hand, which lacks a change.
func (p *meterPhase) lose() {
	if len(p.stops) > 0 && p.greenAt != 0 && p.d.m.in(p.greenAt) {
		p.splitBin(p.greenAt).incomplete++
	}
	p.greenAt, p.yellowAt = 0, 0
	p.dots, p.arrivals, p.onGreen = p.dots[:0], 0, 0
}

// diagram ends a complete cycle of the coordination diagram.
func (p *meterPhase) diagram(t int64) {
	if p.redAt == 0 || !p.d.m.in(p.redAt) {
		return
	}
	out := &p.d.m.out
	if p.d.m.want[MeasurePCD] {
		out.PCD = append(out.PCD, PCDRow{Stamp(p.redAt), p.d.id, p.number, since(p.redAt, p.greenAt), since(p.redAt, p.yellowAt), since(p.redAt, t), p.arrivals, p.onGreen})
	}
	if p.d.m.want[MeasurePCDArrivals] {
		out.PCDArrivals = append(out.PCDArrivals, p.dots...)
	}
}

// happen takes an event of a detector for what the line of the configuration is
// for.
func (u *detectorUse) happen(e *meterEvent) {
	p := u.phase
	switch u.function {
	case fnAdvance:
		p.arrive(e)
	case fnYellowRed:
		p.pass(e.at)
	case fnPresence:
		p.occupy(u.stop, e)
	}
}

// arrive takes the arrival of a vehicle.
func (p *meterPhase) arrive(e *meterEvent) {
	if b := p.now(e.at); b != nil {
		b.arrivals++
		if p.light == lightGreen {
			b.onGreen++
		}
	}
	if p.redAt == 0 {
		return // in no cycle of the diagram
	}
	p.arrivals++
	if p.light == lightGreen {
		p.onGreen++
	}
	if p.d.m.want[MeasurePCDArrivals] {
		state := "red"
		switch p.light {
		case lightGreen:
			state = "green"
		case lightYellow:
			state = "yellow"
		}
		p.dots = append(p.dots, PCDArrivalRow{Stamp(e.at), p.d.id, p.number, e.param, since(p.redAt, e.at), state})
	}
}

// pass takes a vehicle that passes the stop line.
func (p *meterPhase) pass(t int64) {
	b := p.now(t)
	if b == nil {
		return
	}
	switch p.light {
	case lightYellow:
		b.yellow++
	case lightRedClear:
		b.redClear++
	case lightRed:
		b.red++
	default:
		return
	}
	if p.light != lightYellow && p.redAt != 0 && t-p.redAt >= int64(p.d.m.o.SevereRed) {
		b.severe++
	}
}

func (p *meterPhase) finish() {
	p.flush()
	p.finishSplits()
}
