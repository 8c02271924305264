package hires

import "time"

// preemptSilence is how long a pre-emption without an exit may log nothing until
// the next call is another's. Utah's program uses the same.
const preemptSilence = int64(20 * time.Minute)

// preemption follows one pre-emption input, see [PreemptRow]. Times are 0 where
// they have not been seen.
type preemption struct {
	open                                    bool
	on, off, gate, entry, track, dwell, max int64
	calls                                   int
	last                                    int64 // event of any kind
	again                                   int64 // last call after the first
	offBefore                               int64 // off at the time of again
}

// preempt takes an event of a pre-emption.
func (d *meterDevice) preempt(e *meterEvent) {
	p := d.preempts[e.param]
	if p == nil {
		p = &preemption{}
		d.preempts[e.param] = p
	}
	t := e.at
	first := func(at *int64) {
		if p.open && *at == 0 {
			*at = t
		}
	}
	switch e.code {
	case PreemptInputOn:
		switch {
		case !p.open:
			*p = preemption{open: true, on: t, calls: 1}
		case p.entry == 0 && p.off != 0, t-p.last >= preemptSilence:
			d.endPreempt(e.param, p)
			*p = preemption{open: true, on: t, calls: 1}
		default:
			p.calls++
			if p.entry != 0 {
				p.again, p.offBefore = t, p.off
			}
		}
	case PreemptEntry:
		switch {
		case !p.open:
			*p = preemption{open: true, entry: t}
		case p.entry == 0:
			p.entry = t
		default:
			// Entered anew without an exit: the last call, if there was one, is the
			// new pre-emption's.
			next := preemption{open: true, entry: t}
			if p.again != 0 {
				next.on, next.calls = p.again, 1
				if p.off != p.offBefore {
					next.off, p.off = p.off, p.offBefore
				}
				p.calls--
			}
			d.endPreempt(e.param, p)
			*p = next
		}
	case PreemptInputOff:
		if p.open {
			p.off = t // the last counts
		}
	case PreemptGateDown:
		first(&p.gate)
	case PreemptBeginTrack:
		first(&p.track)
	case PreemptBeginDwell:
		first(&p.dwell)
	case PreemptMaxPresence:
		first(&p.max)
	case PreemptBeginExit:
		if p.open {
			d.preemptRow(e.param, p, t)
			*p = preemption{}
		}
	}
	p.last = t
}

// endPreempt ends a pre-emption of which no exit is known.
func (d *meterDevice) endPreempt(n uint16, p *preemption) { d.preemptRow(n, p, 0) }

func (d *meterDevice) preemptRow(n uint16, p *preemption, exit int64) {
	at := p.on
	if at == 0 {
		at = p.entry
	}
	if !d.m.in(at) {
		return
	}
	service := p.track
	if service == 0 {
		service = p.dwell
	}
	d.m.out.Preempts = append(d.m.out.Preempts, PreemptRow{
		Time: Stamp(at), Device: d.id, Preempt: n, Calls: p.calls, Served: p.entry != 0,
		Delay: since(p.on, p.entry), GateDown: since(p.on, p.gate), TimeToService: since(p.entry, service),
		TrackClear: since(p.track, p.dwell), Dwell: since(p.dwell, exit), Input: since(p.on, p.off),
		MaxPresence: since(p.on, p.max), Total: since(p.on, exit),
	})
}

// prioritise takes an event of a request for priority. Adjustments and check-outs
// without a check-in are passed over.
func (d *meterDevice) prioritise(e *meterEvent) {
	r := d.priority[e.param]
	end := func() {
		if r != nil {
			d.m.out.Priority = append(d.m.out.Priority, *r)
		}
		d.priority[e.param] = nil
	}
	if e.code == PriorityCheckIn {
		end()
		if d.m.in(e.at) {
			d.priority[e.param] = &PriorityRow{Time: Stamp(e.at), Device: d.id, Priority: e.param, EarlyGreen: Unknown, ExtendGreen: Unknown, CheckOut: Unknown}
		}
		return
	}
	if r == nil {
		return
	}
	after := Seconds(e.at - int64(r.Time))
	switch e.code {
	case PriorityEarlyGreen:
		r.Adjustments++
		if r.EarlyGreen == Unknown {
			r.EarlyGreen = after
		}
	case PriorityExtendGreen:
		r.Adjustments++
		if r.ExtendGreen == Unknown {
			r.ExtendGreen = after
		}
	case PriorityCheckOut:
		r.CheckOut = after
		end()
	}
}
