// Package interlock is the last word that Stopline has on what a junction's
// lamps show: the conflict monitor between whatever wants a lamp state and the
// driver that sets it.
//
// It knows only the junction's definition. It shares no code with the package
// that makes the wanted states, and its tests judge it by a brute-force checker
// that shares no code with either.
//
// # Invariants
//
// Let shown(t) be the sequence of states that [Monitor.Filter] returns. Whatever
// is wanted, at whatever times, for all groups a, b:
//
//	I1 conflict    If b is in Conflicts[a], a and b are never both let in.
//	               (Let in: green, permissive green, or red-yellow.)
//	I2 yield       If b is in Yields[a] and both are let in, then a is permissive,
//	               or a is in Yields[b] and b is permissive.
//	I3 clearance   A group that is let in, or goes from permissive to protected,
//	               finds each group that it meets (I1, I2) either let in as I2
//	               allows, or red for that group's all-red time and longer.
//	I4 yellow      Vehicles go from green to yellow, from yellow to red, and not
//	               before the group's yellow time has passed.
//	I5 pedestrians Pedestrians go from green to their clearance, from there to
//	               red, and not before the clearance time has passed. Where that
//	               time is 0 they go straight to red.
//	I6 minimum     A green lasts its group's minimum green, except on the way of a
//	               trip, or of an order, to flashing.
//	I7 whole       Flashing red is shown by all groups or by none, after all of
//	               them have been red for their all-red time; dark by none; and
//	               a state always has one aspect a group.
//	I8 start       At the start and after Reset or flashing, nobody is let in
//	               before everyone that he meets has been red for the clearance
//	               (yellow or pedestrian clearance) and the all-red time.
//	I9 latch       After a trip: greens go to yellow at once, then all red, then
//	               flashing red, until [Monitor.Reset].
//
// # What is refused
//
// A wanted state that would break an invariant is refused as a whole. What is
// shown instead is the state before it, in which clearances that have run their
// time go on to red. Refusals that last are a fault: when the wanted states have
// been refused without a break for more than 300 ms, the monitor trips. So
// nothing shorter than 200 ms trips it, and conflicting greens are off within
// 450 ms, given steps of 100 ms or less (the figures of NEMA TS 2's conflict
// monitor); with steps of one second the second refusal in a row trips it.
//
// Two wants are met another way, without a refusal. All groups flashing is an
// order that may come at any time: the monitor leads there itself, by I9's way;
// from there on all red is what may be wanted next. A clearance for a group that a
// refusal has already seen go to red is shown as red.
//
// The maximum red is watched, not enforced: a monitor does not know whether
// anyone waits. A group that has been red for longer than that while others had
// their greens is counted once a red; [Monitor.TripOnMaxRed] makes it a trip.
//
// # Time
//
// The times that callers give may jump: a receiver finds its satellites, an
// operator sets a clock. The monitor measures durations on a clock of its own.
// It counts a step back, or none, as nothing; it counts a step forward at most
// as long as the longest of the eight steps before it, and never longer than
// one second. With a steady caller a jump of any size either way is therefore
// worth at most one ordinary step, and two jumps within eight steps at most one
// second. Time that is not counted makes yellows, reds and greens longer, never
// shorter. Call it at least once a second.
package interlock
