// Package traci lets Stopline drive the signals of any SUMO scenario.
//
// It has three parts, to be used in this order:
//
//   - [Load] reads a .sumocfg and the network that it names, [Scenario.Derive]
//     makes a [traffic.Junction] of every signal in it. Both are pure but for
//     reading files; no SUMO is needed.
//   - [Open] starts a sumo process of its own and speaks TraCI with it over a
//     loopback socket: [World]. Each [World.Step] is one message: the lamp states
//     that changed, the subscriptions of vehicles that just departed, and the step.
//   - [World.Finish] ends the run and computes its [Result]; [Baseline] does the
//     same for SUMO alone under the map's own programs.
//
// # Time
//
// Simulated second t is the instant t seconds after 1970-01-01T00:00:00Z. SUMO
// places a static program by (t − offset) modulo its cycle and [traffic.Plan] by
// (Unix time − OffsetMS) modulo its cycle, so a plan derived here runs in phase
// with the program that it came from. A state given to Driver.Show at time t is
// what the lamps show in the step from t to t + [World.StepLength].
//
// # Lamps
//
// One signal group is one link index of a tlLogic, one character of its states.
// Aspects go to SUMO as they are, except two that SUMO has no letter for:
// PedClear is sent as 'r' (SUMO lets those on a crossing finish, and lets nobody
// start), FlashRed as 's' (stop, then go when clear). Driver.Observed reads them
// back from SUMO; where SUMO's letter stands for two aspects it takes the one
// that was shown last. Until the first Show SUMO runs the map's own program.
//
// # What the detectors know
//
// [SensingDetectors] places loops and areas on the lanes and computes what they
// would report from the positions of vehicles, step by step, assuming that a
// vehicle's speed is even within a step. That was chosen over SUMO's own
// detectors, because it is several times faster (a hundred subscribed detectors
// cost more than the vehicles themselves) and gives occupancies that SUMO's
// lane-area detectors do not. Nothing of a vehicle's route is subscribed in this
// mode, so nothing of it can leak into a reading. [SensingOracle] reads each
// vehicle's next signal and link, which no city knows.
//
// A vehicle that departs in a step is subscribed with the next, so it is first
// seen one step after it entered. Detectors see no cyclists' or pedestrians'
// classes apart: whatever has a position on the lane counts.
//
// # Security
//
// SUMO's TraCI has no authentication and its listening socket is on all
// interfaces for the moment between its start and our connection, after which it
// takes no further client. It is a simulator on a workstation, never a part of
// a deployment that drives lamps.
package traci
