package signalcontrol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/health"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// healthState is what a Core knows of detectors: a function of the agreed frames,
// so that it can be found again from the log.
type healthState struct {
	monitors map[traffic.JunctionID]*health.Monitor
	last     map[traffic.JunctionID]uint64 // newest word's seq
	words    []traffic.Health              // of the newest block
	// height is the newest block that was observed. Those up to it are not
	// observed again: a restart goes through some of them twice.
	height, restored ledger.Height
	// fallback rests on who has failed.
	fallback fallbackState
}

// Observe judges the detectors by the accepted frames of a block without deciding
// anything; [Core.Commands] does it too. Blocks must come in order.
func (c *Core) Observe(height ledger.Height, frames []*traffic.Frame, junction func(traffic.JunctionID) (*traffic.Junction, bool)) {
	h := &c.health
	h.words = nil
	if height <= h.restored {
		return
	}
	h.height = height
	for _, f := range frames {
		if f.Interval <= 0 {
			continue
		}
		j, ok := junction(f.Junction)
		if !ok {
			continue
		}
		m := h.monitors[j.ID]
		var changes []health.Change
		if m == nil {
			m = health.NewMonitor(j)
			h.monitors[j.ID] = m
		} else {
			changes = m.Redefine(j, f.Time)
		}
		for _, ch := range append(changes, m.Observe(f)...) {
			// As with commands: from the height alone, so that it rises across
			// restarts, and the same block gives the same word again.
			seq := max(uint64(height)*perBlock, h.last[j.ID]+1)
			h.last[j.ID] = seq
			since := ch.Since
			if since.After(f.Time) {
				since = f.Time
			}
			h.words = append(h.words, traffic.Health{
				District: c.cfg.District, Junction: j.ID, Seq: seq, Height: uint64(height), RestsOn: f.FrameKey,
				Detector: ch.Detector, Failed: ch.Failed, Rule: string(ch.Rule), Reason: ch.Reason, Time: f.Time, Since: since,
			})
		}
	}
}

// Health returns what the newest block that was observed has changed in what is
// known of detectors, in the order of its frames.
func (c *Core) Health() []traffic.Health { return c.health.words }

// Failed returns the rule by which a detector is not believed.
func (c *Core) Failed(j traffic.JunctionID, d traffic.DetectorID) (health.Rule, bool) {
	if m := c.health.monitors[j]; m != nil {
		return m.Failed(d)
	}
	return "", false
}

// view is what a controller is shown of a frame.
func (c *Core) view(j *traffic.Junction, f *traffic.Frame) timing.View {
	m := c.health.monitors[j.ID]
	if m == nil || m.Failing() == 0 {
		return timing.Observe(j, f)
	}
	return timing.ObserveWithout(j, f, func(d traffic.DetectorID) bool {
		_, failed := m.Failed(d)
		return failed
	})
}

// sign makes the record of a word.
func (c *Core) sign(h *traffic.Health) []byte {
	e := identity.Sign(c.cfg.Key, identity.KindHealth, identity.Protobuf, wire.EncodeHealth(h))
	return e.Marshal()
}

// word is one that ingest has not taken yet.
type word struct {
	junction traffic.JunctionID
	seq      uint64
	envelope []byte
}

const healthMagic = "stopline signal-control health v1\n"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// store returns what is known of detectors, and the words that are still to be
// sealed: magic line, genesis hash, height, monitors by junction, words, CRC-32C
// of all that.
func (c *Core) store(genesis ledger.Hash, pending []word) ([]byte, error) {
	b := append([]byte(healthMagic), genesis[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(max(c.health.height, c.health.restored)))
	b = binary.AppendUvarint(b, uint64(len(c.health.monitors)))
	for _, id := range slices.Sorted(maps.Keys(c.health.monitors)) {
		m, err := c.health.monitors[id].MarshalBinary()
		if err != nil {
			return nil, fmt.Errorf("junction %s: %w", id, err)
		}
		b = appendBytes(b, []byte(id))
		b = appendBytes(b, m)
	}
	b = binary.AppendUvarint(b, uint64(len(pending)))
	for _, w := range pending {
		b = appendBytes(b, []byte(w.junction))
		b = binary.AppendUvarint(b, w.seq)
		b = appendBytes(b, w.envelope)
	}
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

func appendBytes(b, v []byte) []byte { return append(binary.AppendUvarint(b, uint64(len(v))), v...) }

// restore takes over what [Core.store] returned. It reports each junction that
// begins anew, joined; where nothing at all could be read, ok is false.
func (c *Core) restore(genesis ledger.Hash, b []byte, junction func(traffic.JunctionID) (*traffic.Junction, bool)) (pending []word, ok bool, err error) {
	if len(b) < len(healthMagic)+len(genesis)+8+4 || string(b[:len(healthMagic)]) != healthMagic {
		return nil, false, errors.New("is not in the form of " + healthMagic[:len(healthMagic)-1])
	}
	body, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, false, errors.New("checksum does not fit: damaged")
	}
	r := fields{b: body[len(healthMagic):]}
	// Another chain's heights would have this one's blocks passed over.
	if got := ledger.Hash(r.take(len(genesis))); got != genesis {
		return nil, false, fmt.Errorf("is of a chain with genesis %x, this district's is %x", got[:8], genesis[:8])
	}
	height := ledger.Height(binary.BigEndian.Uint64(r.take(8)))
	monitors := map[traffic.JunctionID]*health.Monitor{}
	var errs []error
	for n := r.uvarint(); n > 0 && !r.bad; n-- {
		id, raw := traffic.JunctionID(r.bytes()), r.bytes()
		j, known := junction(id)
		if r.bad || !known {
			continue
		}
		m, err := health.Restore(j, raw)
		if err != nil {
			errs = append(errs, fmt.Errorf("junction %s begins anew: %w", id, err))
			continue
		}
		monitors[id] = m
	}
	for n := r.uvarint(); n > 0 && !r.bad; n-- {
		pending = append(pending, word{traffic.JunctionID(r.bytes()), r.uvarint(), slices.Clone(r.bytes())})
	}
	if r.bad || len(r.b) > 0 {
		return nil, false, errors.New("fields do not fit: damaged")
	}
	c.health.monitors, c.health.restored = monitors, height
	return pending, true, errors.Join(errs...)
}

// fields takes fields off the front of b; bad says that there were not enough.
type fields struct {
	b   []byte
	bad bool
}

func (r *fields) take(n int) []byte {
	if r.bad = r.bad || n < 0 || n > len(r.b); r.bad {
		return make([]byte, min(max(n, 0), 32))
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *fields) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.bad = r.bad || n <= 0; r.bad {
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *fields) bytes() []byte {
	n := r.uvarint()
	if r.bad = r.bad || n > uint64(len(r.b)); r.bad {
		return nil
	}
	return r.take(int(n))
}
