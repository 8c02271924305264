package validate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Remembered is how many records are remembered of each source, to tell a
// duplicate from an equivocation and from a replay.
const Remembered = 16

// State is what has been accepted from each source. It changes by [State.Judge]
// only, so that validators that judge the same records in the same order hold
// the same state. Not safe for concurrent use.
type State struct {
	limits    Limits
	owner     *owner
	devices   table[source] // by device
	junctions table[source] // commands, by junction
	importers table[source] // imports, by importer
	healths   table[source] // words on detectors' health, by junction
	agents    table[source] // access, requests and overrides, by kind and signer
}

// NewState returns a state in which nothing has been accepted. Limits that are
// zero take the value of [Block].
func NewState(l Limits) *State {
	return &State{limits: l.withDefaults(), owner: new(owner)}
}

// Clone returns a copy that can be changed without changing s. It takes about a
// microsecond, whatever the number of sources: both share what neither changes.
func (s *State) Clone() *State {
	c := *s
	// From here on neither may change in place what both can see.
	s.owner, c.owner = new(owner), new(owner)
	return &c
}

// Limits returns the limits that the state judges by.
func (s *State) Limits() Limits { return s.limits }

// Quarantined reports whether a device's frames are refused for good, because
// it has signed two different ones under one number.
func (s *State) Quarantined(d traffic.DeviceID) bool {
	v := s.devices.get(string(d))
	return v != nil && v.quarantined
}

// Quarantine marks a device as one that has equivocated, for a state that is
// rebuilt from records filed earlier. Only evidence with a valid signature may
// lead here.
func (s *State) Quarantine(d traffic.DeviceID) {
	s.devices.edit(string(d), s.owner).quarantined = true
}

// Restore notes a record that was accepted before, without judging it, for a
// state that is rebuilt from the records themselves. Records older than the
// newest known of their source change nothing.
func (s *State) Restore(c *Candidate) {
	var src *source
	var e seen
	var at int64
	switch {
	case c.Err != nil:
		return
	case c.Frame != nil:
		e = frameEntry(c)
		src, at = s.devices.edit(string(c.Frame.Device), s.owner), c.Frame.Time.UnixNano()
	case c.Command != nil:
		e = commandEntry(c)
		src, at = s.junctions.edit(string(c.Command.Junction), s.owner), c.Command.Issued.UnixNano()
	case c.Import != nil:
		e = importEntry(c)
		src = s.importers.edit(c.Import.Importer, s.owner)
	case c.Health != nil:
		e = healthEntry(c)
		src, at = s.healths.edit(string(c.Health.Junction), s.owner), c.Health.Time.UnixNano()
	default:
		name, n, when, ok := turn(c)
		if !ok {
			return
		}
		e = n
		src, at = s.agents.edit(name, s.owner), when.UnixNano()
	}
	if src.n == 0 || e.after(*src.newest()) {
		src.push(e, at)
	}
}

// LastCommand returns the highest sequence number accepted of the commands to
// a junction, 0 where there was none.
func (s *State) LastCommand(j traffic.JunctionID) uint64 {
	v := s.junctions.get(string(j))
	if v == nil || v.n == 0 {
		return 0
	}
	return v.newest().seq
}

// LastFrame returns the key of the newest frame accepted of a device.
func (s *State) LastFrame(d traffic.DeviceID) (traffic.FrameKey, bool) {
	v := s.devices.get(string(d))
	if v == nil || v.n == 0 {
		return traffic.FrameKey{}, false
	}
	return traffic.FrameKey{Device: d, BootEpoch: v.newest().epoch, Seq: v.newest().seq}, true
}

// seen is one accepted record.
type seen struct {
	epoch, seq uint64
	hash       ledger.Hash // SHA-256 of the payload
}

func (a seen) after(b seen) bool { return a.epoch > b.epoch || a.epoch == b.epoch && a.seq > b.seq }

// source is what is remembered of one device, or of the commands to one junction.
type source struct {
	ring        [Remembered]seen // the first n, rising
	n           int
	time        int64 // of the newest, Unix nanoseconds
	quarantined bool
}

func (s *source) newest() *seen { return &s.ring[s.n-1] }

func (s *source) push(e seen, at int64) {
	if s.n == Remembered {
		copy(s.ring[:], s.ring[1:])
		s.n--
	}
	s.ring[s.n] = e
	s.n++
	s.time = at
}

// place returns the rule that e breaks by coming now, or "".
func (s *source) place(e seen) Rule {
	if s == nil || s.n == 0 || e.after(*s.newest()) {
		return ""
	}
	for i := range s.n {
		if have := &s.ring[i]; have.epoch == e.epoch && have.seq == e.seq {
			if have.hash == e.hash {
				return RuleDuplicate
			}
			return RuleEquivocation
		}
	}
	// What lies between records that are remembered was never accepted; what
	// lies before them all may have been, unless all there ever were are remembered.
	if s.n < Remembered || e.after(s.ring[0]) {
		return RuleReordered
	}
	return RuleReplay
}

const stateMagic = "stopline validation state v2\n"

// MarshalBinary returns the canonical encoding: the same bytes for the same
// state, however it came to be. It holds the magic line, then devices, junctions,
// importers, healths and, where there are any, agents. Each is a count and then,
// ordered by name, rows of name, time, quarantine flag and remembered records from
// old to new. Integers are big-endian. Limits are not part of it.
func (s *State) MarshalBinary() ([]byte, error) {
	b := []byte(stateMagic)
	for _, t := range []*table[source]{&s.devices, &s.junctions, &s.importers, &s.healths} {
		b = appendTable(b, t)
	}
	// Left out while empty: builds without it know the same state by the same bytes.
	if s.agents.n > 0 {
		b = appendTable(b, &s.agents)
	}
	return b, nil
}

func appendTable(b []byte, t *table[source]) []byte {
	type row struct {
		name string
		v    *source
	}
	rows := make([]row, 0, t.n)
	t.all(func(name string, v *source) { rows = append(rows, row{name, v}) })
	slices.SortFunc(rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
	b = binary.BigEndian.AppendUint32(b, uint32(len(rows)))
	for _, r := range rows {
		b = binary.BigEndian.AppendUint16(b, uint16(len(r.name)))
		b = append(b, r.name...)
		b = binary.BigEndian.AppendUint64(b, uint64(r.v.time))
		flag := byte(0)
		if r.v.quarantined {
			flag = 1
		}
		b = append(b, flag, byte(r.v.n))
		for _, e := range r.v.ring[:r.v.n] {
			b = binary.BigEndian.AppendUint64(b, e.epoch)
			b = binary.BigEndian.AppendUint64(b, e.seq)
			b = append(b, e.hash[:]...)
		}
	}
	return b
}

// UnmarshalBinary replaces what s remembers by what [State.MarshalBinary]
// wrote; its limits stay. Any other form is refused, and s is then as before.
func (s *State) UnmarshalBinary(b []byte) error {
	if !strings.HasPrefix(string(b[:min(len(b), len(stateMagic))]), stateMagic) {
		return errors.New("validation state: not in the form of stopline validation state v2")
	}
	n := State{limits: s.limits, owner: new(owner)}
	r := reader{b: b[len(stateMagic):]}
	r.table(&n.devices, n.owner, "devices")
	r.table(&n.junctions, n.owner, "junctions")
	r.table(&n.importers, n.owner, "importers")
	r.table(&n.healths, n.owner, "healths")
	if r.err == nil && len(r.b) != 0 {
		if r.table(&n.agents, n.owner, "agents"); r.err == nil && n.agents.n == 0 {
			r.err = errors.New("agents: must be left out where there are none")
		}
	}
	if r.err == nil && len(r.b) != 0 {
		r.err = fmt.Errorf("%d bytes after the end", len(r.b))
	}
	if r.err != nil {
		return fmt.Errorf("validation state: %w", r.err)
	}
	*s = n
	return nil
}

// reader takes fields off the front of b and stops at the first that is wrong.
type reader struct {
	b   []byte
	err error
}

func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err = errors.New("truncated")
	}
	if r.err != nil {
		return make([]byte, n) // at most 64 KiB, the largest that is asked for
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) u64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }

func (r *reader) table(t *table[source], o *owner, what string) {
	n := binary.BigEndian.Uint32(r.take(4))
	last := ""
	for i := uint32(0); i < n && r.err == nil; i++ {
		name := string(r.take(int(binary.BigEndian.Uint16(r.take(2)))))
		at := int64(r.u64())
		flags := r.take(2)
		switch {
		case r.err != nil:
			return
		case i > 0 && name <= last:
			r.err = fmt.Errorf("%s[%d] %.40q: names must rise", what, i, name)
			return
		case flags[0] > 1 || flags[1] > Remembered:
			r.err = fmt.Errorf("%s[%d] %.40q: flag %d, %d records remembered: at most 1 and %d", what, i, name, flags[0], flags[1], Remembered)
			return
		}
		last = name
		v := t.edit(name, o)
		v.time, v.quarantined, v.n = at, flags[0] == 1, int(flags[1])
		for k := range v.n {
			e := seen{epoch: r.u64(), seq: r.u64(), hash: ledger.Hash(r.take(32))}
			if r.err == nil && k > 0 && !e.after(v.ring[k-1]) {
				r.err = fmt.Errorf("%s[%d] %.40q: remembered records must rise", what, i, name)
			}
			v.ring[k] = e
		}
	}
}
