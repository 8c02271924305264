package consensus

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
)

// Limits on what is decided at once. A message of ACCEPTED that is larger than a
// request may be is cut into several, the same at every validator.
const (
	// MaxRequest is the largest request, bytes.
	MaxRequest = 1 << 20
	// MaxRequestRecords is how many records a request may hold.
	MaxRequestRecords = 1024
	// MaxBlockRecords is how many records a block may hold: what four validators
	// on two cores check in a fraction of a second.
	MaxBlockRecords = 2048

	// poolRequests, poolRecords and poolBytes bound what a validator takes from ACCEPTED
	// before it is decided: about 300 ms of work, so that a request that waits
	// for longer says something about the leader and not about the load.
	poolRequests = 64
	poolRecords  = 2 * MaxBlockRecords
	poolBytes    = 4 << 20
)

// perProposal is more than headers, votes, signatures and framing take of a
// proposal in a message.
const perProposal = 8 << 10

// maxPayload bounds a proposal's payload so that the largest message between n
// validators fits topic.MaxPayload: a new view, in which a quorum of validators
// each repeat their last decision and the proposal in hand.
func maxPayload(n int) int {
	return min(2<<20, topic.MaxPayload/(2*ledger.Quorum(n))-perProposal)
}

// Timing says how long to wait for what, on the wall clock. The defaults suit
// validators on one machine or in one building.
type Timing struct {
	// Tick is how often timers are looked at. Default 20 ms.
	Tick time.Duration
	// BatchWait is how long the leader waits for more requests to propose
	// together. Default 5 ms.
	BatchWait time.Duration
	// Heartbeat is how long a leader may be silent. Default 700 ms.
	Heartbeat time.Duration
	// Complain is how long a leader may decide nothing, or leave a request out,
	// before it is held to be stalled. Default 1 s.
	Complain time.Duration
	// ViewChange is how long replacing a leader may take before the next is
	// tried, ViewChangeResend how often the call for it is repeated. Defaults 1.5 s,
	// 100 ms.
	ViewChange, ViewChangeResend time.Duration
	// Behind is how long a follower may be one block behind before it fetches it.
	// Default 200 ms.
	Behind time.Duration
	// Collect is how long to wait for peers' word on which view it is. Default
	// 200 ms.
	Collect time.Duration
	// Resend is when a vote is sent again to a peer that did not move on, first;
	// each next time takes twice as long. Default 100 ms.
	Resend time.Duration
	// Fetch is how long to wait for a peer's blocks. Default 500 ms.
	Fetch time.Duration
	// Meet is how often a starting validator asks its peers whether they know a
	// later start of its own. Default 50 ms.
	Meet time.Duration
	// Compare is how often a validator compares its chain with its peers'. Default
	// 2 s.
	Compare time.Duration
}

func (t Timing) withDefaults() Timing {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	or(&t.Tick, 20*time.Millisecond)
	or(&t.BatchWait, 5*time.Millisecond)
	or(&t.Heartbeat, 700*time.Millisecond)
	or(&t.Complain, time.Second)
	or(&t.ViewChange, 1500*time.Millisecond)
	or(&t.ViewChangeResend, 100*time.Millisecond)
	or(&t.Behind, 200*time.Millisecond)
	or(&t.Collect, 200*time.Millisecond)
	or(&t.Resend, 100*time.Millisecond)
	or(&t.Fetch, 500*time.Millisecond)
	or(&t.Meet, 50*time.Millisecond)
	or(&t.Compare, compareEvery)
	return t
}

// Config configures one validator.
type Config struct {
	// District that the validator agrees for. Must be the genesis document's.
	District traffic.DistrictID
	// Number of the validator in the registry, from 1.
	Number uint64
	// VoteKey signs votes and, under another domain line, messages to the other
	// validators. Its public half is in the registry.
	VoteKey ed25519.PrivateKey
	// CosignKey signs checkpoints. Its public half is in the registry.
	CosignKey ed25519.PrivateKey
	// NextVoteKey and NextCosignKey take the place of the keys once the registry
	// says so. Optional.
	NextVoteKey, NextCosignKey ed25519.PrivateKey
	// Genesis is the district's genesis document, the exact bytes.
	Genesis []byte
	// Dir is the validator's own folder: blocks, payloads, journal, snapshot.
	Dir string
	// Bus is the validator's own connection. The streams must be declared.
	Bus *bus.Bus
	// Now is the clock for block times and cosignatures. Optional: time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
	// Timing is optional.
	Timing Timing
	// SnapshotEvery is after how many blocks the state is written down, so that
	// a start has no more than that to replay. Validators with different values
	// have fewer snapshots in common to help each other with. Default 200.
	SnapshotEvery int
	// Retention is for how long payloads are kept, by block time, before they are
	// let go of; up to an eighth longer, and never so soon that a start or a peer
	// could not go on from the oldest snapshot. Services that follow decisions and
	// are away for longer find no payloads. Registry records, headers, leaves,
	// votes and verdicts are kept for good. Default 7 days; negative: for good.
	Retention time.Duration
	// KeepEvery is how often to look for redactions to carry out. Default 1 min.
	KeepEvery time.Duration
	// SnapshotBeyond is how many blocks a validator that is behind executes
	// itself; one that is further behind fetches headers and leaves, and takes a
	// snapshot of the state that f+1 others have signed. Default 2000; negative:
	// only where the payloads are gone.
	SnapshotBeyond int
	// WholeHistory has a validator with an empty folder fetch all headers from
	// genesis on, also where a snapshot would do to begin with, so that it can give
	// them to others. Have at least f+1 do so.
	WholeHistory bool
	// ServeRequests and ServeBytes are how many requests for blocks, snapshots and
	// the like, and how many bytes of answers, one asker is given a second; for two
	// seconds' worth at once. Each other member has so much to itself, and all who
	// are no members have twice that together. Defaults 200 and 32 MiB.
	ServeRequests int
	ServeBytes    int64
	// Features lists the features of the state machine that this build knows. Where
	// the registry has another one in force the validator ends. Optional:
	// [identity.Features]; a test may be a build of before.
	Features []string
	// SegmentBytes is the size of the files that blocks and payloads are stored
	// in. Default 64 MiB.
	SegmentBytes int64
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("consensus: "+format, args...)) }
	if c.District == "" {
		bad("District: must not be empty")
	}
	if c.Number == 0 {
		bad("Number: must be positive")
	}
	if len(c.VoteKey) != ed25519.PrivateKeySize {
		bad("VoteKey: missing")
	}
	if len(c.CosignKey) != ed25519.PrivateKeySize {
		bad("CosignKey: missing")
	}
	if len(c.VoteKey) == ed25519.PrivateKeySize && c.VoteKey.Equal(c.CosignKey) {
		bad("CosignKey: must not be the vote key")
	}
	for name, k := range map[string]ed25519.PrivateKey{"NextVoteKey": c.NextVoteKey, "NextCosignKey": c.NextCosignKey} {
		if k != nil && len(k) != ed25519.PrivateKeySize {
			bad("%s: has %d bytes", name, len(k))
		}
	}
	if len(c.Genesis) == 0 {
		bad("Genesis: missing")
	}
	if c.Dir == "" {
		bad("Dir: must not be empty")
	}
	if c.KeepEvery < 0 {
		bad("KeepEvery: must not be negative")
	}
	if c.SnapshotEvery < 0 {
		bad("SnapshotEvery: must not be negative")
	}
	if c.ServeRequests < 0 || c.ServeBytes < 0 {
		bad("ServeRequests, ServeBytes: must not be negative")
	}
	t := c.Timing.withDefaults()
	for name, d := range map[string]time.Duration{
		"Tick": t.Tick, "BatchWait": t.BatchWait, "Heartbeat": t.Heartbeat, "Complain": t.Complain,
		"ViewChange": t.ViewChange, "ViewChangeResend": t.ViewChangeResend, "Behind": t.Behind, "Collect": t.Collect,
		"Resend": t.Resend, "Fetch": t.Fetch, "Meet": t.Meet, "Compare": t.Compare,
	} {
		if d < 0 {
			bad("Timing.%s: must not be negative", name)
		}
	}
	if t.ViewChangeResend > t.ViewChange {
		bad("Timing.ViewChangeResend: %v is longer than ViewChange, %v", t.ViewChangeResend, t.ViewChange)
	}
	return errors.Join(errs...)
}
