package retention

// Range is leaf indexes from First to Last, both included.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// Has reports whether an index is in the range.
func (r Range) Has(index uint64) bool { return r.First <= index && index <= r.Last }
