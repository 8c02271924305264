// Package priority says what becomes of requests for priority: which are let in,
// whose turn it is at each junction, which stage serves it, and when it is over.
//
// A [Book] is a function of the agreed records: it is told of requests, frames and
// commands in the order of the log, and takes the time from them. Signal-control
// keeps one to decide by, the gateway another to tell people; whoever goes through
// the log again comes to the same, at every record.
//
// # States
//
// They are those of RSMP's status S0033 (traffic light controllers, 1.2.0), of a
// request at one junction and of the whole:
//
//	received   is on record, and not agreed yet
//	queued     waits for its time, or behind somebody else
//	activated  the junction is asked to show its stage, or held in it
//	completed  the vehicle was seen to pass, or said so, or its time is over and it
//	           had its green
//	rejected   by a rule, before anything was done
//	cooldown   the agency was served there just now
//	timeout    its time went by while it waited, or its green never came
//	stale      it was activated and nobody ever heard of it again
//	cancelled  by whoever asked
//
// # Rules
//
// A request is let in if its vehicle is in its agency's fleet, of that class and on
// duty ([identity.Fleet]); if its route is one: each stop is next to the one before
// by a lane of the network, and nobody would have to fly; if a stage lets its group
// go; if its agency has not used up its hour, its vehicle has no other request, and,
// of transit, if it is late enough. See the Rule constants.
//
// At a junction emergency comes before transit, and then the earlier arrival. Who
// is first is activated when a change of stage takes as long as there is time left,
// by the junction's own times and the vehicles that stand in the way. Others whose
// group is green in the same stage are served with it.
//
// What is asked for is a stage. Minimum greens, clearances, and the interlock are
// between it and the lamps.
package priority
