// Package health says which detectors are not to be believed, and by which rule.
//
// One core judges a detector by what it said of intervals of time; a [Monitor]
// feeds it with the frames of a junction, a [Log] with the detector events of a
// controller's log. There is no clock in it: time is what frames and events say.
// All quantities are integers, so that the same input in the same order gives
// the same words everywhere.
//
// # The rules of one detector
//
// They are those of MnDOT's IRIS (docs/vehicle_detection.md and
// server/DetectorImpl.java of mnit-rtmc/iris), with its figures:
//
//   - [Chatter]: 38 or more counts within some 30 s. It ceases after 24 h without.
//   - [LockedOn]: occupied without a break for the time of its lane type. It
//     ceases 24 h after the last such moment, if the detector has counted since.
//   - [NoHits]: nothing counted for the time of its lane type. It ceases 30 s
//     after something was counted.
//
// All of these times are of observation: what nobody looked at is evidence of
// nothing. A gap (frames that are missing, a device that was off) neither adds to
// a silence nor ends it; one of more than a minute ends an occupation. What comes
// late is taken in its turn; what overlaps with an interval that is known already
// counts only as far as it is new.
//
// The sharpness is that of the intervals. A count is known to lie somewhere in
// its interval, so Chatter adds up intervals that lie wholly within 30 s; one that
// is longer is shared out as evenly as can be. Occupation and silence begin and
// end with whole intervals: the same street in longer intervals is found up to
// two intervals later, never earlier.
//
// IRIS has lane types for freeways. [LaneOf] says which of them a detector at a
// signal resembles: where vehicles stand, times are those of ramps with queues.
// An area is occupied for hours on a busy street, so LockedOn begins anew with
// each vehicle that it counts. A push button does not chatter; its count is of
// calls that wait. What an oracle says is true by definition.
//
// # The rules by cycles
//
// They are our own, and need what the lamps show: frames tell it, a log of detector
// events does not. Detectors at signals are found within three cycles by them where
// the rules above take half an hour and more.
//
//   - [StuckOn]: occupied without a break, and without a count, through two whole
//     greens. It ceases 10 min after the last such moment. A street that is blocked
//     for so long looks the same; its movement is then served as the plan has it.
//   - [StuckOff]: nothing at all through two whole greens, while another detector of
//     the lane counted 8 vehicles more than fit in between. Where there is no other, 40
//     must be missing by the rate of the half hour before: in real streets nobody
//     comes for minutes. It ceases 30 s after something was seen.
//
// # The rule between neighbours
//
// What passes one detector of a lane passes the next one, and what enters a
// junction leaves it. Every 15 minutes a monitor compares the counts in and out,
// once one of the detectors has made 100, over each pair of detectors of one lane and over
// the junction where every lane is counted. They may differ by
//
//	5·√(in+out) + max(in, out)/8 + storage
//
// The first term are five standard deviations of the difference of two
// independent Poisson counts: a false alarm in 1.7 million comparisons, for one
// pair one in 50 years. Counts of the same vehicles differ by much less. The
// second is for vehicles that change lanes between the two, and for the ordinary
// miscount of loops. Storage is how many vehicles fit in between, once for each
// stretch without gaps. So a dead detector is found after 100 vehicles, one that
// misses half of them where 300 pass in a window, one that misses a fifth never.
//
// [Implausible] is said of a detector that all comparisons that fail have in
// common, if no other can be meant: a detector is cleared by a comparison that
// holds and would not have, had the detector been wrong by as much. Where several
// remain, [Imbalance] is said of each of them. Both cease after two windows in a
// row that agree. Comparisons rest with a detector that breaks a rule of its own,
// or that was not observed for as long as the others.
package health
