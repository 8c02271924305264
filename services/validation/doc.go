// Package validation reads what ingest has stored, in order, and keeps what
// breaks a rule away from consensus: records go on to ACCEPTED in batches, or to
// QUARANTINE with the rule and the reason. Nothing is dropped, and everything is
// counted.
//
// The rules are those of pkg/validate, judged by the time when ingest took the
// record: a record that had to wait here is not late because of it.
//
// What was enrolled in a block that this service does not have yet is no
// stranger: a refusal that may depend on the registry is given only when the
// registry is that after the newest block that a quorum has decided.
//
// # Neither lost nor doubled
//
// For each group of INGRESS messages, refused records are published first, then
// the accepted ones, and only then is the group acknowledged. All the service
// knows can be computed from what it has published, so a restart at any moment
// recovers from the streams and from nothing else:
//
//   - It resumes at the last INGRESS message that ACCEPTED has a record of (or
//     after the last that was acknowledged, where that is later), and passes over
//     the records of it and of later ones that are in ACCEPTED or QUARANTINE
//     already. A record is known by its salt.
//   - What was accepted of each device is read from ACCEPTED, as far back as a
//     record that came in time could have been accepted before. A frame that is
//     repeated after longer than that goes on to the validators, whose memory has
//     no end: they refuse it.
//   - Devices that had signed two frames under one number are read from
//     QUARANTINE.
//
// The same happens after any failure that leaves open what was stored. Message
// ids also protect against repeats, but only for the two minutes that NATS
// remembers them.
//
// One instance may run at a time: order and duplicates are judged across the
// whole stream.
package validation
