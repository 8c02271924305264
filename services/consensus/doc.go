// Package consensus is one validator of a district. Validators, run by different
// departments, agree on the order and the content of the batches in ACCEPTED,
// judge every record themselves, keep the registry, and cosign checkpoints.
//
// # What can be relied on
//
// Two honest validators never store different blocks at one height, as long as
// fewer than a third are not honest. A block is on the validator's disk before
// its decision is published and before its batches are acknowledged. A vote is
// on disk before the message with it leaves, and there is never a second,
// different one for the same view, height and phase. Of one validator no two
// inconsistent cosignatures can be had.
//
// # The way of a batch
//
//	ACCEPTED → intake → engine: propose, prepare, commit → apply → publisher → DECISIONS
//	                                                        ↑
//	                                  fetch (what was missed), replay (at start)
//
// A request is one batch, its id the SHA-256 of its bytes. The leader proposes a
// header with everything that follows from the batches and the state after the
// parent; each validator executes them once and votes only for the header that
// it computes itself. [Validator.Run] has the order of starting and stopping.
//
// Why it is built so, and what was learned about the engine, is in DESIGN.md.
package consensus
