package health

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

const version = 2

// MarshalBinary returns what the monitor remembers: the same bytes for the same
// memory. The definition is not part of it, only its digest is.
func (m *Monitor) MarshalBinary() ([]byte, error) {
	b := append([]byte{version}, m.sum[:]...)
	b = binary.AppendVarint(b, m.balance.until)
	for i := range m.tracks {
		t := &m.tracks[i]
		flags := byte(0)
		if t.alive {
			flags = 1
		}
		for r := range rules {
			if t.verdicts[r].failed {
				flags |= 2 << r
			}
		}
		b = append(b, flags)
		b = binary.AppendVarint(b, t.to)
		// Times are mostly near what is known last.
		for _, v := range [...]int64{t.to - t.silentFrom, t.silent, t.to - t.lockedFrom, t.locked, int64(len(t.counts))} {
			b = binary.AppendVarint(b, v)
		}
		for _, c := range t.counts {
			for _, v := range [...]int64{t.to - c.from, t.to - c.to, c.n} {
				b = binary.AppendVarint(b, v)
			}
		}
		for _, v := range t.cycles.fields() {
			b = binary.AppendVarint(b, *v)
		}
		for r := range rules {
			if v := &t.verdicts[r]; v.failed {
				b = binary.AppendVarint(b, v.good)
				b = binary.AppendVarint(b, v.since)
			}
		}
	}
	for k := range m.balance.eqs {
		e := &m.balance.eqs[k]
		b = append(b, byte(e.last.state))
		for _, v := range [...]int64{e.from, e.inN, e.outN, e.pieces, e.last.inN, e.last.outN, e.last.tol, e.last.from, e.last.at} {
			b = binary.AppendVarint(b, v)
		}
		for _, v := range e.seen {
			b = binary.AppendVarint(b, v)
		}
	}
	return b, nil
}

// ErrDefinition says that what was stored is of another definition of the
// junction: go on with a new monitor.
var ErrDefinition = errors.New("health: memory of another definition")

// Restore returns the monitor of j with the memory that [Monitor.MarshalBinary]
// wrote.
func Restore(j *traffic.Junction, b []byte) (*Monitor, error) {
	m := NewMonitor(j)
	if len(b) < 1+len(m.sum) {
		return nil, errors.New("health: memory: truncated")
	}
	if b[0] != version {
		return nil, fmt.Errorf("health: memory: version %d, must be %d", b[0], version)
	}
	if [len(m.sum)]byte(b[1:1+len(m.sum)]) != m.sum {
		return nil, ErrDefinition
	}
	r := reader{b: b[1+len(m.sum):]}
	m.balance.until = r.varint()
	for i := range m.tracks {
		t := &m.tracks[i]
		flags := r.byte()
		if int(flags) >= 2<<len(rules) {
			r.bad = true
		}
		t.alive = flags&1 != 0
		t.to = r.varint()
		t.silentFrom, t.silent = t.to-r.varint(), r.varint()
		t.lockedFrom, t.locked = t.to-r.varint(), r.varint()
		n := r.varint()
		if n < 0 || n > chatterCount {
			r.bad = true
		}
		for ; n > 0 && !r.bad; n-- {
			t.counts = append(t.counts, counted{t.to - r.varint(), t.to - r.varint(), r.varint()})
		}
		for _, v := range t.cycles.fields() {
			*v = r.varint()
		}
		for k := range rules {
			if flags&(2<<k) != 0 {
				t.verdicts[k] = verdict{failed: true, good: r.varint(), since: r.varint()}
			}
		}
	}
	for k := range m.balance.eqs {
		e := &m.balance.eqs[k]
		if e.last.state = int8(r.byte()); e.last.state < 0 || e.last.state > disagrees {
			r.bad = true
		}
		for _, v := range [...]*int64{&e.from, &e.inN, &e.outN, &e.pieces, &e.last.inN, &e.last.outN, &e.last.tol, &e.last.from, &e.last.at} {
			*v = r.varint()
		}
		for i := range e.seen {
			e.seen[i] = r.varint()
		}
	}
	if r.bad || len(r.b) != 0 {
		return nil, errors.New("health: memory: damaged")
	}
	m.count()
	return m, nil
}

// reader takes fields off the front of b; bad says that there were not enough.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if r.bad = r.bad || n <= 0; r.bad {
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if r.bad = r.bad || len(r.b) == 0; r.bad {
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}
