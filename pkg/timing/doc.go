// Package timing decides which stage a junction should show next, and turns
// such decisions into lamp states with lawful intergreens.
//
// It has two halves that only share [Rules]:
//
//   - Controllers ([Named]: fixed, actuated, maxpressure) are pure functions
//     from what a frame said ([Observe] makes a [View] of it) and what was
//     remembered ([Memory]) to a [Decision]. The same definition, rules, memory
//     and view always give the same answer, on every machine: there is no
//     clock, map order, randomness or floating point in them. So a sealed
//     decision can be computed again by anyone who holds its inputs.
//   - A [Sequencer] stands at the junction. It takes the stage that is wanted
//     and says, for each moment, what every lamp should show on the way there.
//
// The way of one decision:
//
//	frame ─▶ Observe ─▶ View ─▶ Controller.Next ─▶ Decision.Stage
//	                                                   │ (a signed command)
//	              interlock ◀─ Sequencer.Next ◀─ Sequencer.Target
//
// A controller is called with every periodic frame, whatever the rules'
// interval of decision is: between decisions it repeats the last one, and keeps
// count of who is waiting. Nothing here is trusted with safety: every state
// that a Sequencer wants still passes the interlock, with which this package
// shares no code.
//
// # Time
//
// Controllers take View.Now as it is (fixed plans follow Unix time). A
// Sequencer measures durations on a clock of its own which a wrong wall clock
// cannot push: a step back counts as nothing, and a step forward counts at most
// as much as the longest of the eight steps before it, and never more than one
// second. Time that is not counted makes an interval longer, never shorter. A
// Sequencer that is asked more seldom than once a second is slow, and safe.
package timing
