// Package sim is the built-in city: a small, honest simulator of the fictional
// Harbour district, which needs no download.
//
// # Model
//
// A street between two junctions is one trunk lane, which is the exit of the
// first junction, that fans out into short stop lanes before the next: a left
// lane and a lane for through and right on the main axis (and a bus lane on an
// arterial), one lane for everything on a side street. Every vehicle is kept, with its
// position and speed, in the queue of its lane. In a step of 100 ms a vehicle takes the
// largest speed that the limit, its acceleration and the gap to its leader
// allow: v ≤ gap/τ is Newell's car following, whose saturation headway is
// τ + spacing/speed, so τ is chosen for each movement such that a standing
// queue discharges at exactly the [traffic.Movement] SaturationPerHour, after a
// start-up loss that comes from reaction and acceleration.
//
//   - Nobody enters a lane that has no room, so a full exit holds its feeders at
//     their stop lines, and a full left lane holds the trunk behind it.
//   - Left turns on a permissive green wait for a gap in the opposing stream;
//     turning vehicles wait for pedestrians on the crossing they turn over.
//   - At yellow those pass who reach the stop line within its first two seconds,
//     and one permissive left-turner who has waited in front.
//   - Under flashing red or dark lamps a junction is an all-way stop.
//   - Cars arrive by a Poisson process whose rate follows the time of day; where
//     the entry is full they wait outside, and that wait counts as delay.
//   - A bus line runs along each arterial by a timetable and stops in its bus
//     lane; an ambulance comes now and then; pedestrians press buttons and
//     start at green only.
//
// Not modelled: lane changing, overtaking (an ambulance queues with the others
// unless it can take the bus lane), blocking of the junction's interior.
//
// # Determinism
//
// Two cities of one [Config], shown the same lamps at the same steps, are equal
// at every step on every machine: positions and speeds are integers. Demand
// does not depend on the lamps, so that controllers can be compared in pairs.
package sim
