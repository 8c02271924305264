package ledger

import "time"

// Erased returns the empty entry that takes the payload's place when it is let
// go of: index and height, and nothing else of it.
func (p *Payload) Erased() *Payload {
	return &Payload{Index: p.Index, Height: p.Height, Received: time.Unix(0, 0).UTC()}
}
