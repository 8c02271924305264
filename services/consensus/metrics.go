package consensus

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

type counterInt = atomic.Int64

// counters are written by every part of a validator.
type counters struct {
	blocks, records, accepted, synced, syncs                   atomic.Uint64
	sent, resent, received, dropped, invalid                   atomic.Uint64
	replayed, restored, equivocations, withheld                atomic.Uint64
	cosigned, cosignRefused, published, publishRetries, badReq atomic.Uint64
	gone                                                       atomic.Uint64
	elsewhere, strangers, forks                                atomic.Uint64
	limited, served, forkedSeals                               atomic.Uint64
	purged, headers, taken, falseAnswers, falseSnapshots       atomic.Uint64

	mu      sync.Mutex
	refused map[string]uint64
	rules   map[validate.Rule]uint64
}

func (c *counters) refuse(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refused == nil {
		c.refused = map[string]uint64{}
	}
	c.refused[reason]++
}

func (c *counters) block(o *outcome) {
	c.blocks.Add(1)
	c.records.Add(uint64(o.records))
	c.accepted.Add(uint64(o.accepted))
	if len(o.refused) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rules == nil {
		c.rules = map[validate.Rule]uint64{}
	}
	for _, r := range o.refused {
		c.rules[r.rule]++
	}
}

// Stats is what a validator has counted since its start, and where it is.
type Stats struct {
	Height ledger.Height
	// View and Leader are the engine's; 0 while it does not run.
	View, Leader uint64
	// Blocks, Records and Accepted count what was applied, replayed blocks
	// included; Synced the blocks that came from peers, Syncs the attempts.
	Blocks, Records, Accepted, Synced, Syncs uint64
	// RecordsRefused counts the records with a verdict against them, by rule.
	RecordsRefused map[validate.Rule]uint64
	// Refused counts proposals that were not voted for, by reason.
	Refused map[string]uint64
	// Messages between validators: sent, of them sent again, received, dropped
	// for want of room, and not valid by signature or form.
	Sent, Resent, Received, Dropped, Invalid uint64
	// Replayed and Restored count valid messages that came twice, and such from
	// an old start of a peer. Equivocations counts pairs of votes in one slot,
	// Withheld our own votes that were not sent because they would have been one.
	Replayed, Restored, Equivocations, Withheld uint64
	// Elsewhere counts valid messages meant for other members than those in force
	// here, Strangers messages in the name of who is no validator.
	Elsewhere, Strangers uint64
	// Forks counts the times that a peer had another decided block at a height
	// than this validator: more validators lie than may.
	Forks uint64
	// ForkedSeals counts the validators that were seen to cosign a checkpoint which
	// does not fit together with another that they cosigned.
	ForkedSeals uint64
	// Limited counts requests for blocks, snapshots and the like that were put off,
	// and seals not looked at, as there were too many; Served the bytes of the
	// requests that were answered.
	Limited, Served uint64
	// Members is the height of the block that made the validators what they are, 0
	// for genesis; Validators are their numbers.
	Members    ledger.Height
	Validators []uint64
	// Cosigned and CosignRefused count answers to sealing.
	Cosigned, CosignRefused uint64
	// Published is the height of the last decision in the stream, PublishRetries
	// how often storing one failed.
	Published, PublishRetries uint64
	// BadRequests counts messages of ACCEPTED that are no batch, Gone those that
	// left it before this validator had acknowledged them.
	BadRequests, Gone uint64
	// Headers counts the blocks that came from peers without being executed here,
	// Snapshots the states taken from peers. FalseAnswers counts answers with
	// blocks or parts of snapshots that are not what they should be,
	// FalseSnapshots validators that signed another state than f+1 others.
	Headers, Snapshots, FalseAnswers, FalseSnapshots uint64
	// Purged is how many payloads have been let go of, the first blocks'.
	Purged uint64
}

func (c *counters) stats() Stats {
	s := Stats{
		Blocks: c.blocks.Load(), Records: c.records.Load(), Accepted: c.accepted.Load(), Synced: c.synced.Load(), Syncs: c.syncs.Load(),
		Sent: c.sent.Load(), Resent: c.resent.Load(), Received: c.received.Load(), Dropped: c.dropped.Load(), Invalid: c.invalid.Load(),
		Replayed: c.replayed.Load(), Restored: c.restored.Load(), Equivocations: c.equivocations.Load(), Withheld: c.withheld.Load(),
		Cosigned: c.cosigned.Load(), CosignRefused: c.cosignRefused.Load(), Published: c.published.Load(),
		Elsewhere: c.elsewhere.Load(), Strangers: c.strangers.Load(), Forks: c.forks.Load(),
		PublishRetries: c.publishRetries.Load(), BadRequests: c.badReq.Load(), Gone: c.gone.Load(),
		Headers: c.headers.Load(), Snapshots: c.taken.Load(), FalseAnswers: c.falseAnswers.Load(), FalseSnapshots: c.falseSnapshots.Load(),
		Purged: c.purged.Load(), Limited: c.limited.Load(), Served: c.served.Load(), ForkedSeals: c.forkedSeals.Load(),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Refused = maps.Clone(c.refused)
	s.RecordsRefused = maps.Clone(c.rules)
	return s
}
