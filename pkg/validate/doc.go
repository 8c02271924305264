// Package validate holds the rules that a record must meet before it is agreed
// and sealed.
//
// The same [State.Judge] runs twice on every record: in the validation service,
// which keeps bad records away from consensus and files them with a reason, and
// in each validator, which trusts no other service and judges by the block's
// time. It is deterministic: integers only, no clock, no map order.
//
// # The order of the checks
//
// Cheap ones come before costly ones, and whatever is remembered of a sender
// is looked at, and changed, only once its signature was found valid. A frame
// that somebody else made up can therefore never use up a sequence number, nor
// get a device quarantined:
//
//	size → schema → signer known → not revoked → may sign this kind →
//	signature → district → device → junction → order → chain → clock →
//	signal → readings
//
// # What is remembered
//
// Of each device the last [Remembered] frames by (boot epoch, sequence) and
// payload hash, the newest frame's time, and whether it has been quarantined; of
// each junction the same of commands. Only signers in the registry are
// remembered, so memory is bounded by the registry.
//
// # The clock window
//
// A frame's time may be at most [Limits].ClockAhead later than now: what a
// clock without GPS may be off. How much earlier it may be depends on what now is.
// Validation judges by the time when ingest took the record ([Edge]: 60 s, room
// for a sender's retries over a bad link). Validators judge by block time
// ([Block]: 50 min), which is later by as long as the record waited: consensus
// without a quorum, or a district that was restarted, must not lose what it gave
// receipts for. Replays are stopped by the order of frames, not by the window.
package validate
