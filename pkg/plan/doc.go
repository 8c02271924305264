// Package plan reads and writes signal plans as files, and makes plans.
//
// A file holds everything that a controller's data base has of one junction's
// fixed-time control:
//
//	version: 1
//	junction: h0202
//	zone: Europe/Berlin          # of the schedule
//	phases:
//	  - phase: 2
//	    name: main road
//	    groups: [west through, east through]
//	    permissive: [west left]  # green that gives way
//	    min_green: 7             # seconds, down to the millisecond
//	    yellow: 3
//	    all_red: 2
//	  - phase: 4
//	    groups: [north, south, walk east]
//	    min_green: 7
//	    yellow: 3
//	    all_red: 2
//	    walk: 7                  # pedestrians' green, at least
//	    ped_clear: 12
//	rings:                       # in each: the phases between two barriers
//	  - [[2], [4]]
//	plans:
//	  - name: day
//	    cycle: 70
//	    offset: 12
//	    splits: {2: 40, 4: 30}
//	schedule:
//	  - {days: all, from: "00:00", to: "24:00", plan: day}
//
// Of each ring one phase is shown at a time, in order; all rings cross each
// barrier together. A split is all that a phase has of the cycle: its green, its
// yellow (or the pedestrians' clearance, where that is longer) and its all-red.
// The first phase of a plan begins when (Unix time − offset) is a multiple of
// the cycle.
//
// [Parse] refuses what it does not know, and every rule that is broken is told
// with its line. [File.Against] holds a file to the definition of its junction:
// no plan may ask for less than the times that are filed there, nor for two
// groups that conflict. [File.Compile] turns a plan into stages and steps that
// [timing]'s fixed controller runs; [File.Controller] does so by the schedule.
//
// One junction's lamps are led from stage to stage, one change at a time. So
// where one ring changes its phase while another goes on, the next change must
// leave the stage between them its minimum green; otherwise the file is refused.
//
// # Plans from flows
//
// [Webster] makes a plan of a junction's filed stages from the flows that its
// detectors counted ([Flows]). It is what a roadside unit falls back to when it
// is cut off: see [traffic.Fallback].
package plan
