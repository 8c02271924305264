package health

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/hires"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// The detector events of a controller's log.
const (
	eventOff = 81
	eventOn  = 82
)

// quietMS is how long a controller's log may say nothing at all before what
// follows counts as another log: signals change every few minutes.
const quietMS = 5 * 60_000

// Channel names a detector by the controller that it is wired to, and the number
// of its input there.
type Channel struct {
	Device traffic.DeviceID
	Number uint16
}

// Finding says that a detector channel has begun, or ceased, to break a rule.
type Finding struct {
	Channel
	Rule      Rule
	Failed    bool
	Reason    string
	Since, At time.Time // UTC
}

// Summary is what a log says of one channel.
type Summary struct {
	Channel
	// Counts is how often the detector came on, Most the most of it within 30 s.
	Counts, Most int64
	// Observed is how much of the log could be judged, Occupied the part of it with
	// something over the detector. Longest is the longest occupation and Silence
	// the longest time without a count.
	Observed, Occupied, Longest, Silence time.Duration
	// Broken are the rules that were broken at some time.
	Broken []Rule
}

// Log judges the detectors of controllers by the rules of one detector, from the
// events "detector on" (82) and "detector off" (81) of their logs. A log says
// nothing of where detectors lie, so neighbours are not compared; and it says
// nothing of a detector that never came on or went off. Not safe for concurrent
// use.
type Log struct {
	lane     func(Channel) LaneType
	devices  map[traffic.DeviceID]*device
	findings []Finding
}

type device struct {
	from, to int64 // of the present stretch, Unix ms
	channels map[uint16]*channel
}

type channel struct {
	limits limits
	track  track
	on     bool
	ons    []int64 // of the last 30 s
	sum    Summary
	broken [len(rules)]bool
}

// NewLog returns a Log of which nothing is known yet. lane says by which lane
// type a channel is to be judged; nil: by [Queue], as a detector at the stop line.
func NewLog(lane func(Channel) LaneType) *Log {
	if lane == nil {
		lane = func(Channel) LaneType { return Queue }
	}
	return &Log{lane: lane, devices: map[traffic.DeviceID]*device{}}
}

// Event judges by one more event, of any kind: all of them tell that the log goes
// on. Those of one device must come in the order of time; one that is older than
// the last is taken as of the last one's time. It returns what has changed.
func (l *Log) Event(e hires.Event) []Finding {
	at := floorMS(e.At)
	d := l.devices[e.Device]
	if d == nil {
		d = &device{from: at, to: at, channels: map[uint16]*channel{}}
		l.devices[e.Device] = d
	}
	if at = max(at, d.to); at-d.to > quietMS {
		l.close(e.Device, d)
		d.from = at
	}
	d.to = at
	l.findings = l.findings[:0]
	if e.Code == eventOn || e.Code == eventOff {
		c := d.channels[e.Param]
		if c == nil {
			ch := Channel{e.Device, e.Param}
			c = &channel{limits: limitsOf(l.lane(ch), false), sum: Summary{Channel: ch}}
			d.channels[e.Param] = c
		}
		if c.track.to < d.from {
			// The first word on it in this stretch. What goes off now was on.
			c.on = e.Code == eventOff
		}
		l.until(d, c, at)
		if e.Code == eventOn {
			l.judge(c, span{from: at, to: at, count: 1, hit: true}, 0)
		}
		c.on = e.Code == eventOn
	}
	return slices.Clone(l.findings)
}

// close tells every channel that the stretch of a device's log has ended.
func (l *Log) close(id traffic.DeviceID, d *device) {
	for _, n := range slices.Sorted(maps.Keys(d.channels)) {
		if c := d.channels[n]; c.track.to >= d.from {
			l.until(d, c, d.to)
		}
	}
}

// until judges a channel by its state up to at.
func (l *Log) until(d *device, c *channel, at int64) {
	from := max(c.track.to, d.from)
	gap := from - c.track.to
	if c.track.to == 0 {
		gap = 0
	}
	if at > from {
		l.judge(c, span{from: from, to: at, full: c.on}, gap)
	}
}

func (l *Log) judge(c *channel, s span, gap int64) {
	for _, ch := range c.track.observe(c.limits, s, gap, nil) {
		l.findings = append(l.findings, Finding{c.sum.Channel, rules[ch.rule], ch.failed, ch.reason, utc(min(ch.since, s.to)), utc(s.to)})
		c.broken[ch.rule] = c.broken[ch.rule] || ch.failed
	}
	dt := time.Duration(s.to-s.from) * time.Millisecond
	c.sum.Observed += dt
	if s.full {
		c.sum.Occupied += dt
	}
	c.sum.Counts += s.count
	if s.count > 0 {
		c.ons = append(c.ons, s.to)
		for c.ons[0] < s.to-chatterMS {
			c.ons = c.ons[1:]
		}
		c.sum.Most = max(c.sum.Most, int64(len(c.ons)))
	}
	c.sum.Longest = max(c.sum.Longest, time.Duration(c.track.locked)*time.Millisecond)
	c.sum.Silence = max(c.sum.Silence, time.Duration(c.track.silent)*time.Millisecond)
}

// End judges every channel up to the last event of its device, and returns what
// has changed by it, and a summary of each channel by device and number. More
// events may follow.
func (l *Log) End() ([]Finding, []Summary) {
	l.findings = l.findings[:0]
	var out []Summary
	for _, id := range slices.Sorted(maps.Keys(l.devices)) {
		d := l.devices[id]
		l.close(id, d)
		for _, n := range slices.Sorted(maps.Keys(d.channels)) {
			c := d.channels[n]
			s := c.sum
			for r, broken := range c.broken {
				if broken {
					s.Broken = append(s.Broken, rules[r])
				}
			}
			out = append(out, s)
		}
	}
	found := slices.Clone(l.findings)
	slices.SortStableFunc(found, func(a, b Finding) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Device, b.Device)) })
	return found, out
}

// floorMS turns Unix nanoseconds into milliseconds, downwards.
func floorMS(ns int64) int64 {
	ms := ns / 1_000_000
	if ns%1_000_000 < 0 {
		ms--
	}
	return ms
}
