// Package roadside is the unit that lives at one junction.
//
// A [Unit] reads the detectors through a [Driver], signs what it saw with the
// device's own key and sends it off; it obeys signed commands through the
// interlock, and runs its own plan when commands stop. It trusts nobody but the
// keys it was given.
//
// # The core
//
// [Unit.Tick], [Unit.Frame], [Unit.EventFrame], [Unit.Command] and [Unit.Obey]
// do all the work, with the time as an argument; no goroutine, network or clock
// is in sight. In lockstep with a simulator they are called directly, in this
// order for each step of the world:
//
//	Tick(now)                  sequencer → interlock → lamps
//	EventFrame(now)            where Tick says that something changed, or
//	Frame(now)                 where an interval has ended
//	Command / Obey             what came back
//
// [Unit.Run] is the shell that does the same by the clock. Frames wait for their
// receipts in a [Store], on disk and bounded: while the network is away they are
// kept, and sent in their order when it is back. The order is strict, so that
// new frames wait until the old ones have their receipts.
//
// # Who decides
//
// A command is in force until it expires, and at most [Config.StaleAfter] after
// it was taken. Without one the unit goes to its local plan as soon as no change
// of stage is under way, and back to coordinated with the next valid command;
// both are orders to the sequencer, which makes every intergreen whoever
// decides. Between the sequencer and the lamps is always the interlock. When
// that has tripped, commands are refused until a person has reset it.
//
// A unit that cannot read its detectors says so by frames without an interval,
// on which nobody decides: it then runs its own plan.
package roadside

import "github.com/stopline-traffic/stopline/pkg/traffic"

// Driver is one junction's controller cabinet as the unit sees it. Its methods
// are not called concurrently by one unit; drivers of different junctions may be.
type Driver interface {
	// Sense returns the readings of all detectors, in the order of
	// Junction.Detectors, for the interval that ends now, and resets the
	// interval.
	Sense() ([]traffic.Reading, error)
	// Show puts the state on the lamps from now on. After an error it is not
	// known what they show; the unit asks, and goes on from there, at its next
	// tick.
	Show(s traffic.State) error
	// Observed returns what the lamps show.
	Observed() (traffic.State, error)
}
