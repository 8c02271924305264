// Package interlock is the last word that Stopline has on what a junction's
// lamps show: the conflict monitor between whatever wants a lamp state and the
// driver that sets it.
//
// It knows only the junction's definition. It shares no code with the package
// that makes the wanted states.
//
// # Invariants
//
// Steps are numbered: in step i a caller gives a time and wants a state, and
// shown(i) is what [Monitor.Filter] returns. A state is one aspect for each group
// of the junction. With a for a group, shown(i)[a] is
//
//	let in     green, permissive green, or red-yellow
//	clearing   yellow, or pedestrian clearance
//	out        red, flashing red
//
// T(i) is time as counted below, in milliseconds, and age(i, a) is T(i) − T(k)
// for the first step k since which a has shown the same; green and permissive
// green are the same here. With minGreen, clear, allRed of a group, its own or the
// junction's (clear is the yellow, or the pedestrians' clearance), whatever is
// wanted, at whatever times, for all steps i and all groups a ≠ b:
//
//	I1 conflict    If b is in Conflicts[a], a and b are never both let in.
//	I2 yield       If b is in Yields[a] and both are let in, then a is permissive,
//	               or a is in Yields[b] and b is permissive.
//	I3 clearance   If a is let in at i and was not at i−1, or is green at i and was
//	               not at i−1, then each b that a meets (I1, I2) is let in at i as
//	               I2 allows, or red at i for age(i, b) ≥ allRed(b).
//	I4 yellow      Vehicles go from green to yellow, from yellow to red, and that
//	               only with age ≥ clear. There is no other way out of either.
//	I5 pedestrians Pedestrians go from green to their clearance, from there to
//	               red, and that only with age ≥ clear. Where clear is 0 they go
//	               straight to red.
//	I6 minimum     A green ends with age ≥ minGreen, except on the way of a trip, or
//	               of an order, to flashing.
//	I7 whole       Flashing red is shown by all groups or by none, and begins when
//	               all have been red with age ≥ allRed; dark by none; and a state
//	               always has one aspect a group.
//	I8 start       Let s be the start, the newest Reset or the newest end of
//	               flashing. Until b has been let in after s, I3 asks for
//	               age(i, b) ≥ clear(b) + allRed(b): nobody knows what b showed.
//	I9 latch       From a trip on: greens go to yellow in the same step, then all
//	               red, then flashing red, until [Monitor.Reset].
//	I10 no veto    A wanted state that breaks none of I1 to I8 is shown in its own
//	               step, to the letter.
//	I11 reaction   While wants are refused without a break, the trip comes in the
//	               first step k with T(k) − T(first refusal) > 300, and in no
//	               earlier one.
//
// I1 to I9 are safety, I10 and I11 liveness: a monitor that shows nothing but red
// keeps the first nine.
//
// # What is refused
//
// A wanted state that would break an invariant is refused as a whole. What is
// shown instead is the state before it, in which clearances that have run their
// time go on to red. So conflicting greens are never shown at all.
//
// Refusals that last are a fault (I11): nothing that lasts less than 200 ms trips,
// and what is wrong is on its way to red within 450 ms, given steps of 100 ms or
// less (the figures of NEMA TS 2's conflict monitor). In steps of s the trip comes
// with refusal number ⌊300/s⌋+2 in a row, whatever else the machine is doing: at
// 100 ms with the fifth, at one second with the second.
//
// Two wants are met another way, without a refusal. All groups flashing is an
// order that may come at any time: the monitor leads there itself, by I9's way;
// from there on all red is what may be wanted next. A clearance wanted for a group
// that is red is shown as red.
//
// The maximum red is watched, not enforced: a monitor does not know whether
// anyone waits. A group that has been red for longer than that while others had
// their greens is counted once a red; [Monitor.TripOnMaxRed] makes it a trip.
//
// # Controllers that drive their lamps themselves
//
// [Monitor.Supervise] holds what it is shown to I1 to I7, counts as I11 says, and
// then can only say so. It sees states now and then: each may have begun up to
// one look earlier, and a red that nobody asked to last may have gone unseen.
//
// # How this is tested
//
// Package oracle, next to this one, holds two judges that share no code with it:
// one sees only lamps, by the true time, and knows I1 to I9; the other says in
// advance what each step must show, I10 and I11 included. Random and hostile
// stories run against both (`make interlock`: 100,000,000 steps), and the same
// stories notice each of the faults that can be seeded here.
//
// # Time
//
// The times that callers give may jump: a receiver finds its satellites, an
// operator sets a clock. The monitor measures durations on a clock of its own.
// It counts a step back, or none, as nothing; it counts a step forward at most
// as long as the longest of the eight steps before it, and never longer than
// one second. With a steady caller a jump of any size either way is therefore
// worth at most one ordinary step, and two jumps within eight steps at most one
// second. With irregular steps a jump is worth at most the longest of them. Time that is not counted makes yellows, reds and greens longer, never
// shorter. Call it at least once a second.
package interlock
