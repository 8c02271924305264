package hires

import (
	"errors"
	"fmt"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// GroupOptions say what all imports of one log have in common.
type GroupOptions struct {
	District traffic.DistrictID
	// Importer is the service whose key will sign.
	Importer string
	// Run is that of this import, from 1; see [traffic.Import].
	Run uint64
	// Seq is that of the first record; 0 means 1.
	Seq uint64
	// Log names where the events come from, SHA256 is of the whole file. Each
	// record carries it, so that the file is read for its digest before it is read
	// for its events.
	Log    string
	SHA256 [32]byte
	// MaxEvents splits a second with more events; 0 means 1024, which is the most
	// that pkg/validate accepts.
	MaxEvents int
}

// Validate reports all that is wrong.
func (o *GroupOptions) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.District == "" {
		bad("district: must not be empty")
	}
	if o.Importer == "" {
		bad("importer: must not be empty")
	}
	if o.Run == 0 {
		bad("run: 0, the first is 1")
	}
	if len(o.Log) > maxLog {
		bad("log: %d bytes, at most %d", len(o.Log), maxLog)
	}
	if o.SHA256 == [32]byte{} {
		bad("sha256: must be that of the whole file")
	}
	if o.MaxEvents < 0 {
		bad("max_events: %d, must not be negative", o.MaxEvents)
	}
	return errors.Join(errs...)
}

// GroupStats count what a [Group] has done.
type GroupStats struct {
	// Events that were added, Imports that were handed out.
	Events, Imports int
	// Late counts records of a second that is not later than one of the same
	// device that was handed out before: events out of order.
	Late int
	// Split counts records that were closed before their second was over, since
	// they were full, or since too much was open.
	Split int
}

// Bounds of what a [Group] holds open.
const (
	defaultMaxEvents = 1024
	maxLog           = 256 // what pkg/validate accepts
	maxOpenEvents    = 1 << 18
	second           = int64(time.Second)
	milli            = int64(time.Millisecond)
)

// open is what a group knows of a device.
type open struct {
	id traffic.DeviceID
	// end is the end of the second that events are of, nanoseconds.
	end    int64
	events []traffic.Event
	// closed is the latest end that has been handed out, 0 for none.
	closed int64
	// split says that the record before was closed before its second was over.
	split bool
}

// Group turns the events of a log into import records: one a device and second,
// whose events keep the order of the file. Records of all devices are numbered in
// the order in which they are handed out, without gaps.
//
// A record is handed out when an event of another second of its device comes, so
// that a device has at most one open, and its records one after the other hold
// its events in the order of the file, also where that is not the order of time.
// An event of a second that was handed out already begins another record, which
// counts as late. Not safe for concurrent use.
type Group struct {
	o       GroupOptions
	f       func(*traffic.Import) error
	seq     uint64
	devices map[traffic.DeviceID]*open
	order   []*open // devices as they came
	cur     *open
	pending int // events in open records
	stats   GroupStats
	err     error
}

// NewGroup returns a group that hands its records to f, which may keep them.
func NewGroup(o GroupOptions, f func(*traffic.Import) error) (*Group, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.MaxEvents == 0 {
		o.MaxEvents = defaultMaxEvents
	}
	if o.Seq == 0 {
		o.Seq = 1
	}
	return &Group{o: o, f: f, seq: o.Seq, devices: map[traffic.DeviceID]*open{}}, nil
}

// Stats returns the counts so far.
func (g *Group) Stats() GroupStats { return g.stats }

// Seq is that of the next record.
func (g *Group) Seq() uint64 { return g.seq }

// Add takes the next event of the log. A stamp finer than a millisecond is
// refused, since a record could not give it back; see [Options.Round]. After an
// error of f the group refuses all.
func (g *Group) Add(e Event) error {
	if g.err != nil {
		return g.err
	}
	switch {
	case e.Device == "":
		return invalid("device: must not be empty")
	case len(e.Device) > identity.MaxID:
		return invalid("device: %d bytes, at most %d", len(e.Device), identity.MaxID)
	case e.At < minTime || e.At >= maxTime:
		return invalid("at: %d ns is not between 1973-03-03 and 2261-12-31", e.At)
	case e.At%milli != 0:
		return invalid("at: %d ns is finer than a millisecond", e.At)
	}
	d := g.cur
	if d == nil || d.id != e.Device {
		if d = g.devices[e.Device]; d == nil {
			if len(g.order) == maxDevices {
				return invalid("device: %.40q: more than %d devices in one log", e.Device, maxDevices)
			}
			d = &open{id: e.Device}
			g.devices[e.Device] = d
			g.order = append(g.order, d)
		}
		g.cur = d
	}
	end := e.At - e.At%second + second
	switch {
	case len(d.events) == 0:
	case d.end != end:
		if err := g.close(d, false); err != nil {
			return err
		}
	case len(d.events) == g.o.MaxEvents:
		if err := g.close(d, true); err != nil {
			return err
		}
	}
	if g.pending >= maxOpenEvents {
		if err := g.closeAll(maxTime+second, true); err != nil {
			return err
		}
	}
	d.end = end
	d.events = append(d.events, traffic.Event{Code: e.Code, Param: e.Param, OffsetMS: uint32((end - e.At) / milli)})
	g.pending++
	g.stats.Events++
	return nil
}

// Flush hands out all open records. It is called after the last event; called
// earlier, it may make records late.
func (g *Group) Flush() error { return g.FlushBefore(maxTime + second) }

// FlushBefore hands out the open records whose second ends at or before a time in
// nanoseconds: for a log that is played at the pace of its time, in which a
// device may be silent for long.
func (g *Group) FlushBefore(at int64) error {
	if g.err != nil {
		return g.err
	}
	return g.closeAll(at, false)
}

func (g *Group) closeAll(at int64, early bool) error {
	for _, d := range g.order {
		if len(d.events) > 0 && d.end <= at {
			if err := g.close(d, early); err != nil {
				return err
			}
		}
	}
	return nil
}

// close hands out the record of a device; early says that its second is not over.
func (g *Group) close(d *open, early bool) error {
	if early {
		g.stats.Split++
	}
	if d.end < d.closed || d.end == d.closed && !d.split {
		g.stats.Late++
	}
	m := &traffic.Import{
		District: g.o.District, Importer: g.o.Importer, Run: g.o.Run, Seq: g.seq, Log: g.o.Log, SHA256: g.o.SHA256,
		Device: d.id, Time: time.Unix(0, d.end).UTC(), Interval: time.Duration(second), Events: d.events,
	}
	g.pending -= len(d.events)
	d.events, d.closed, d.split = nil, max(d.closed, d.end), early
	if err := g.f(m); err != nil {
		g.err = err
		return err
	}
	g.seq++
	g.stats.Imports++
	return nil
}

// Events returns the events of an import as they were in its log.
func Events(m *traffic.Import) []Event {
	events := make([]Event, len(m.Events))
	end := m.Time.UnixNano()
	for i, e := range m.Events {
		events[i] = Event{At: end - int64(e.OffsetMS)*milli, Device: m.Device, Code: e.Code, Param: e.Param}
	}
	return events
}
