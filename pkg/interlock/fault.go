package interlock

// fault leaves one check out, or breaks it. It exists so that the tests can
// show that they would notice; nothing outside them sets one.
type fault int

const (
	noFault fault = iota
	faultNoConflicts
	faultOneWayConflicts
	faultNoYields
	faultNoYieldClearance
	faultNoAllRed
	faultIntoYellow
	faultShortYellow
	faultSkipYellow
	faultTakeBack
	faultShortPedClear
	faultSkipPedClear
	faultNoMinGreen
	faultOverrideMinGreen
	faultOverrideYellow
	faultOverrideAllRed
	faultLastGroup
	faultRedYellowFree
	faultProtectFreely
	faultAgesStay
	faultNoStart
	faultBackwards
	faultJumpCounts
	faultShowRefused
	faultAnyLength
	faultDark
	faultPartialFlash
	faultEarlyFlash
	faultUnlatch
	faultStraightToFlash
	faultTripSkipsYellow
	faultHairTrigger
	faultSlowTrip
	faultNeverTrips
	faultNamelessReset
	faultGlitchesAdd
	faultMaxRedBlind
	faultHoldsClearance
	faultResetTrusts
	faultShortMemory
	faults // how many
)

func (m *Monitor) is(f fault) bool { return m.fault == f }
