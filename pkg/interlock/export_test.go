package interlock

import (
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Faults is how many faults there are, counting the one that is none.
const Faults = int(faults)

// Broken returns a monitor with one fault seeded.
func Broken(j *traffic.Junction, now time.Time, f int) *Monitor { return build(j, now, fault(f)) }

// FaultName names a fault for a test's output.
func FaultName(f int) string { return faultNames[fault(f)] }

// Unseen reports whether a fault shows nothing unsafe, so that only the model
// can notice it: something lawful is refused, or a trip comes at a wrong time.
func Unseen(f int) bool { return unseen[fault(f)] }

var unseen = map[fault]bool{
	faultMaxRedBlind:    true, // a long red endangers nobody
	faultHoldsClearance: true, // nor does a long yellow
	faultShortMemory:    true, // of the clock: only makes times longer
}

var faultNames = map[fault]string{
	faultNoConflicts:      "no conflicts",
	faultOneWayConflicts:  "one way conflicts",
	faultNoYields:         "no yields",
	faultNoYieldClearance: "no yield clearance",
	faultNoAllRed:         "no all red",
	faultIntoYellow:       "into yellow",
	faultShortYellow:      "short yellow",
	faultSkipYellow:       "skip yellow",
	faultTakeBack:         "take back",
	faultShortPedClear:    "short ped clear",
	faultSkipPedClear:     "skip ped clear",
	faultNoMinGreen:       "no min green",
	faultOverrideMinGreen: "override min green",
	faultOverrideYellow:   "override yellow",
	faultOverrideAllRed:   "override all red",
	faultLastGroup:        "last group",
	faultRedYellowFree:    "red yellow free",
	faultProtectFreely:    "protect freely",
	faultAgesStay:         "ages stay",
	faultNoStart:          "no start",
	faultBackwards:        "backwards",
	faultJumpCounts:       "jump counts",
	faultShowRefused:      "show refused",
	faultAnyLength:        "any length",
	faultDark:             "dark",
	faultPartialFlash:     "partial flash",
	faultEarlyFlash:       "early flash",
	faultUnlatch:          "unlatch",
	faultStraightToFlash:  "straight to flash",
	faultTripSkipsYellow:  "trip skips yellow",
	faultHairTrigger:      "hair trigger",
	faultSlowTrip:         "slow trip",
	faultNeverTrips:       "never trips",
	faultNamelessReset:    "nameless reset",
	faultGlitchesAdd:      "glitches add up",
	faultMaxRedBlind:      "maximum red blind",
	faultHoldsClearance:   "holds clearance",
	faultResetTrusts:      "reset trusts the reds",
	faultShortMemory:      "short memory of steps",
}
