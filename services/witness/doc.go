// Package witness cosigns other districts' checkpoints, or any log's: C2SP
// tlog-witness (https://c2sp.org/tlog-witness).
//
// A witness remembers the newest checkpoint of each log that it knows, and
// cosigns another one only where a consistency proof shows that the log has only
// grown since. So nobody can show two histories of a log, each with the
// cosignature of the same witness.
//
// Which logs it knows says its configuration, and nothing else. Who asks is not
// asked: what counts is the log's own signature on the checkpoint.
//
// # The data folder
//
//	DIR/witness            name and verifier key; made by [Create], never changed
//	DIR/state/<sha256>     the newest checkpoint of the log with this hash of its
//	                       origin, as the log signed it, with the witness' own
//	                       cosignature
//	DIR/forks/<origin hash>-<size>-<root>
//	                       accusations: two checkpoints of one size that a log has
//	                       signed, as `stopline verify` takes them
//
// A witness that forgets is none: a folder is made once, by [Create], and [New]
// refuses one that is not there. Losing it means another key. A copy of before
// that is put back is as bad, and cannot be noticed here.
//
// # Order of durability
//
// What is cosigned is on disk, file and name, before the answer goes out. Checking
// and writing are one step for each log: of two requests that go on from one size
// the second finds another size.
package witness
