// Package sealing writes the district's log and gets it sealed.
//
// It follows the decided blocks, makes each durable, and at most ten times a
// second asks the validators to cosign the log as it is after the newest block.
// With the cosignatures that the district's policy wants it signs with the log's
// key: then everything up to there is sealed, and anyone can check it.
//
// # The data folder
//
//	DIR/genesis.json       what the district began from; never changes
//	DIR/policy             whose signatures a checkpoint needs (C2SP tlog-policy)
//	DIR/succession.json    who the validators were after genesis, with the proof:
//	                       [ledger.SuccessionProof]; none before the first change
//	DIR/checkpoint.witnessed  the newest sealed checkpoint that witnesses, too, have
//	                       cosigned
//	DIR/log/checkpoint     the newest sealed checkpoint (C2SP tlog-checkpoint)
//	DIR/log/tile/…         tiles and entry bundles (C2SP tlog-tiles)
//	DIR/log/blocks/        journal: every block without payloads, record = height − 1
//	DIR/log/checkpoints/   every sealed checkpoint with its height
//	DIR/log/tmp/           files being written
//	DIR/payload/<class>/   envelopes and salts, apart, so that they can be let go:
//	                       see services/internal/payload
//	DIR/deletions/         deletions whose receipts are not in the log yet
//
// Journals and payloads are in the form of pkg/ledger/segment, their records in
// that of [ledger.Decided], [ledger.SealedAt] and [ledger.Payload].
//
// The log can be served from DIR/log by any web server, or by [Handler].
//
// # Order of durability
//
// Payloads, journal, tiles, history, checkpoint: each is on disk before the next
// is begun, and each can be made again from those before. Starting up runs the
// same functions as going on, so that a crash at any point leads to the same
// bytes. A checkpoint never covers what is not on disk.
//
// # Letting go
//
// Payloads are let go of by the registry's retention entry and by redactions, in
// steps that a crash may stop anywhere; keeper.go has their order. Each ends with
// a receipt, signed by the service "sealing", in the log. It is given when the
// streams, too, have let go: by age where a class was purged, and of single
// records at once, off the server's disk, where one was redacted; then also every
// validator has given its own receipt first, or the streams have let go by age of
// all that a validator could have published before the record was erased here.
package sealing
