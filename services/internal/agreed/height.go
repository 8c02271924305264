package agreed

import "github.com/stopline-traffic/stopline/pkg/ledger"

// Height returns the block that [State.Registry] is after, or one before it.
func (s *State) Height() ledger.Height {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.height
}
