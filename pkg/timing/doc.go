// Package timing decides which stage a junction should show next, and turns
// such decisions into lamp states with lawful intergreens.
//
// It has two halves that only share [Rules]:
//
//   - Controllers ([Named]: fixed, actuated, maxpressure, adaptive) are pure functions
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
// # The adaptive controller
//
// adaptive plans fifty seconds ahead, anew at each decision, and does what the
// cheapest plan begins with. One set of settings serves every network; there is
// nothing in it that was trained.
//
// It first makes a list of who is, or will be, at each stop line. An oracle's
// frames name every vehicle. From the detectors of a city it keeps such a list for
// itself: areas and loops say who came and who left, exits where those turned who
// left, and the usual rate stands for those who are still out of sight at the edge
// of the network, or on lanes whose detectors have failed. Neighbours announce
// whom they have let go, and whom they are about to ([Announce], [Inflows]); without
// their word, or when it is older than [OutflowValidity], a junction plans alone.
// On a corridor (View.Corridor) a stop costs those more who come from the signal
// before: that makes a green wave where it pays.
//
// Then it searches: how long the shown stage stays, which stages follow, each until
// it has served who is there or one more platoon, up to three of them. Every plan is
// rolled out vehicle by vehicle: headways, start-up, yellow and pedestrians'
// clearance as the [Sequencer] makes them, gaps that permissive turners need, room
// on exits. What a plan costs is delay and stops, by weight: a bus weighs as eleven
// cars, the head of a queue more once it has waited for two and a half minutes, a
// queue that fills a lane between two signals more than one that does not. Branches
// that cannot beat the best plan any more are cut off by a bound. Before all this come
// emergency vehicles, and whoever would else wait beyond the maximum red.
//
// Headways in it are shorter than real ones (headwayPercent): with true ones it ended
// greens too early, and delay was 5 % more on cologne1 and 2 % on ingolstadt1.
//
// Against gridlock: nobody is planned into an exit that has no room; who stands at
// green and does not go is not waited for; and after a change the Sequencer keeps
// showing red to those whose path somebody still stands on, inside the junction, for
// up to Rules.BoxHoldMS ([Sequencer.Occupied]). What stands beyond the junctions that
// it drives, it cannot free.
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
