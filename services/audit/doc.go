// Package audit answers what the log holds and proves it, and watches that nobody
// rewrites it. It reads the data folder that sealing writes (see there), and
// changes nothing in it but its own part:
//
//	DIR/audit/index.db       the index: a cache, made again whenever it is missing
//	DIR/audit/newest.json    the newest checkpoint that was verified
//	DIR/audit/seen/          checkpoints that others saw, with the verdict
//	DIR/audit/alarms/        every alarm, when it was raised and when it cleared
//	DIR/audit/evidence/      accusations, for `stopline verify`
//
// All but the index is the auditor's memory, which cannot be made again; it may be
// kept elsewhere ([Config].Memory).
//
// # Index
//
// The index ([Query], [Chain]) is a SQL database of what records say of themselves,
// of the block that holds them, and of what became of commands. It follows the
// folder in batches, each a transaction, and goes on from where it was; the same
// blocks give the same rows, whatever the batches were. What a redaction or a
// receipt of deletion in the log names is reduced to its place, and overwritten.
// Whoever writes the index can lie in it: it says where to look, and bundles are
// made from the log and verified before they are given away.
//
// # Watch
//
// Every new checkpoint of the history is verified: its signatures by the validators
// who decided its block, that the blocks up to it give its size and root, that the
// tiles are those of the blocks, and that all of it has grown out of the newest
// checkpoint that was kept. So is the checkpoint that is served, each that sealing
// announces, and each that somebody else has seen ([Service.Saw], topic.Seen).
// What must not be is an [Alarm]: told on topic.Alarm at once and every 10 s while
// it stands, counted (stopline.audit.alarms), kept, and served. What may be a hiccup
// becomes one after [Config].Patience, so that an alarm is raised within 60 s.
//
// What it cannot see: a fork that nobody shows it, and what was rewritten before
// it was first started, or together with its memory.
package audit
