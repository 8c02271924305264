package validation

import (
	"maps"
	"math"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/validate"
)

// Counts is what the service has dealt with since it started: what it read, and
// stored the outcome of. What it passed over because an earlier run had dealt
// with it is not in it.
type Counts struct {
	Messages uint64 `json:"messages"` // of INGRESS
	Dead     uint64 `json:"dead"`     // of which were no batches of records
	// Gone counts messages of INGRESS that left it, by its age limit or by hand,
	// before they were known to be dealt with: records with receipts may be lost.
	Gone uint64 `json:"gone"`
	// Records of all kinds; each is accepted or quarantined.
	Records     uint64 `json:"records"`
	Accepted    uint64 `json:"accepted"`
	Quarantined uint64 `json:"quarantined"`
	// Frames among them, as far as they could be decoded.
	Frames            uint64 `json:"frames"`
	FramesAccepted    uint64 `json:"frames_accepted"`
	FramesQuarantined uint64 `json:"frames_quarantined"`
	// Readings in accepted frames.
	Readings uint64 `json:"readings"`
	// Gaps in the sequences of devices, and how many frames are missing in them.
	Gaps    uint64 `json:"gaps"`
	Missing uint64 `json:"missing"`
	// ByRule counts quarantined records.
	ByRule map[validate.Rule]uint64 `json:"by_rule"`
}

func saturate(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

// addTo adds c to sum.
func (c *Counts) addTo(sum *Counts) {
	sum.Messages += c.Messages
	sum.Dead += c.Dead
	sum.Records += c.Records
	sum.Accepted += c.Accepted
	sum.Quarantined += c.Quarantined
	sum.Frames += c.Frames
	sum.FramesAccepted += c.FramesAccepted
	sum.FramesQuarantined += c.FramesQuarantined
	sum.Readings += c.Readings
	sum.Gaps += c.Gaps
	sum.Missing = saturate(sum.Missing, c.Missing)
	for r, n := range c.ByRule {
		sum.ByRule[r] += n
	}
}

type counters struct {
	mu sync.Mutex
	c  Counts // guarded by mu
}

func (c *counters) add(f func(*Counts)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.c.ByRule == nil {
		c.c.ByRule = map[validate.Rule]uint64{}
	}
	f(&c.c)
}

// Counts returns a copy of the counters. Safe for concurrent use.
func (s *Service) Counts() Counts {
	s.counters.mu.Lock()
	defer s.counters.mu.Unlock()
	c := s.counters.c
	c.ByRule = maps.Clone(c.ByRule)
	return c
}
