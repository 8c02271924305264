package hires

import "fmt"

// The events that this package works with, by the names of the enumeration's
// edition of 2020. They have no type so that they compare with [Event.Code].
const (
	PhaseOn              = 0
	PhaseBeginGreen      = 1
	PhaseCheck           = 2
	PhaseMinComplete     = 3
	PhaseGapOut          = 4
	PhaseMaxOut          = 5
	PhaseForceOff        = 6
	PhaseEndGreen        = 7
	PhaseBeginYellow     = 8
	PhaseEndYellow       = 9
	PhaseBeginRedClear   = 10
	PhaseEndRedClear     = 11
	PhaseInactive        = 12
	PhaseSkipped         = 14
	PedBeginWalk         = 21
	PedBeginClearance    = 22
	PedBeginDontWalk     = 23
	PedDark              = 24
	BarrierTermination   = 31
	FYABeginPermissive   = 32
	FYAEndPermissive     = 33
	PhaseCallRegistered  = 43
	PhaseCallDropped     = 44
	PedCallRegistered    = 45
	OverlapBeginGreen    = 61
	OverlapTrailingGreen = 62
	OverlapBeginYellow   = 63
	OverlapBeginRedClear = 64
	OverlapOff           = 65
	OverlapDark          = 66
	PedOverlapWalk       = 67
	PedOverlapClearance  = 68
	PedOverlapDontWalk   = 69
	DetectorOff          = 81
	DetectorOn           = 82
	DetectorRestored     = 83
	DetectorFaultOther   = 84
	DetectorFaultWatch   = 85
	DetectorFaultOpen    = 86
	DetectorFaultShort   = 87
	DetectorFaultChange  = 88
	PedDetectorOff       = 89
	PedDetectorOn        = 90
	PedDetectorFailed    = 91
	PedDetectorRestored  = 92
	PreemptAdvance       = 101
	PreemptInputOn       = 102
	PreemptGateDown      = 103
	PreemptInputOff      = 104
	PreemptEntry         = 105
	PreemptBeginTrack    = 106
	PreemptBeginDwell    = 107
	PreemptLinkOn        = 108
	PreemptLinkOff       = 109
	PreemptMaxPresence   = 110
	PreemptBeginExit     = 111
	PriorityCheckIn      = 112
	PriorityEarlyGreen   = 113
	PriorityExtendGreen  = 114
	PriorityCheckOut     = 115
	PriorityServiceStart = 118
	PriorityServiceEnd   = 119
	PatternChange        = 131
	CycleLengthChange    = 132
	OffsetLengthChange   = 133
	Split1Change         = 134
	CycleStateChange     = 150
	YieldPoint           = 151
	FlashStatusChange    = 173
	ClockUpdated         = 181
	PowerFailure         = 182
	PowerRestored        = 184
)

// ParamKind says what the parameter of an event is.
type ParamKind uint8

// The kinds of parameters.
const (
	// ParamUnknown is that of an event outside the enumeration.
	ParamUnknown     ParamKind = iota
	ParamPhase                 // number of a phase
	ParamBarrier               // number of a barrier
	ParamFYA                   // number of a flashing yellow arrow
	ParamOverlap               // number of an overlap, A = 1
	ParamDetector              // channel of a vehicle detector
	ParamPedDetector           // channel of a pedestrian detector
	ParamPreempt               // number of a pre-emption
	ParamPriority              // number of a priority strategy
	ParamPattern               // number of a coordination pattern
	ParamSeconds               // seconds
	ParamCycleState            // 0 free, 1 in step, 2 to 4 transition, 5 local zero, 6 begin pick-up
	ParamLogic                 // number of a logic statement
	ParamStatus                // a status of NTCIP 1202
	ParamInput                 // number of a test input
	ParamFunction              // number of a special function
	ParamSwitch                // 0 or 1
	ParamAlarm                 // number of an alarm
	ParamVendor                // as the manufacturer says
)

var paramNames = [...]string{"unknown", "phase", "barrier", "flashing yellow arrow", "overlap", "detector channel",
	"pedestrian detector channel", "preempt number", "priority number", "coordination pattern", "seconds", "coordination state",
	"logic statement", "NTCIP status", "test input", "special function", "off/on", "alarm", "manufacturer's"}

func (k ParamKind) String() string {
	if int(k) < len(paramNames) {
		return paramNames[k]
	}
	return fmt.Sprintf("parameter(%d)", uint8(k))
}

type codeInfo struct {
	name  string
	param ParamKind
	// since is the year of the first edition that has the code.
	since uint16
}

const (
	e2012 = 2012
	e2020 = 2020
)

// codes is the enumeration. Names are shortened; what they mean is the
// enumeration's.
//
// Programs that read the edition of 2020 disagree in one place: the start and end
// of service to priority is 118 and 119 in most, 120 and 121 in some. Here it is
// 118 and 119, and the others are reserved.
var codes = [256]codeInfo{
	0:  {"phase on", ParamPhase, e2012},
	1:  {"phase begin green", ParamPhase, e2012},
	2:  {"phase check", ParamPhase, e2012},
	3:  {"phase minimum complete", ParamPhase, e2012},
	4:  {"phase gap-out", ParamPhase, e2012},
	5:  {"phase max-out", ParamPhase, e2012},
	6:  {"phase force-off", ParamPhase, e2012},
	7:  {"phase green termination", ParamPhase, e2012},
	8:  {"phase begin yellow clearance", ParamPhase, e2012},
	9:  {"phase end yellow clearance", ParamPhase, e2012},
	10: {"phase begin red clearance", ParamPhase, e2012},
	11: {"phase end red clearance", ParamPhase, e2012},
	12: {"phase inactive", ParamPhase, e2012},
	13: {"extension timer gap-out", ParamPhase, e2020},
	14: {"phase skipped", ParamPhase, e2020},
	15: {"extension timer reduction start", ParamPhase, e2020},
	16: {"extension timer minimum achieved", ParamPhase, e2020},
	17: {"added initial complete", ParamPhase, e2020},
	18: {"next phase decision", ParamPhase, e2020},
	19: {"priority early force-off of phase", ParamPhase, e2020},
	20: {"pre-emption force-off of phase", ParamPhase, e2020},

	21: {"pedestrian begin walk", ParamPhase, e2012},
	22: {"pedestrian begin clearance", ParamPhase, e2012},
	23: {"pedestrian begin steady don't walk", ParamPhase, e2012},
	24: {"pedestrian dark", ParamPhase, e2012},
	25: {"extended pedestrian change interval", ParamPhase, e2020},
	26: {"oversized pedestrian served", ParamPhase, e2020},

	31: {"barrier termination", ParamBarrier, e2012},
	32: {"flashing yellow arrow begin permissive", ParamFYA, e2012},
	33: {"flashing yellow arrow end permissive", ParamFYA, e2012},

	41: {"phase hold active", ParamPhase, e2012},
	42: {"phase hold released", ParamPhase, e2012},
	43: {"phase call registered", ParamPhase, e2012},
	44: {"phase call dropped", ParamPhase, e2012},
	45: {"pedestrian call registered", ParamPhase, e2012},
	46: {"phase omit on", ParamPhase, e2012},
	47: {"phase omit off", ParamPhase, e2012},
	48: {"pedestrian omit on", ParamPhase, e2012},
	49: {"pedestrian omit off", ParamPhase, e2012},
	50: {"maximum 1 in effect", ParamPhase, e2020},
	51: {"maximum 2 in effect", ParamPhase, e2020},
	52: {"dynamic maximum in effect", ParamPhase, e2020},
	53: {"dynamic maximum step up", ParamPhase, e2020},
	54: {"dynamic maximum step down", ParamPhase, e2020},
	55: {"phase advance warning sign on", ParamPhase, e2020},
	56: {"phase advance warning sign off", ParamPhase, e2020},

	61: {"overlap begin green", ParamOverlap, e2012},
	62: {"overlap begin trailing green", ParamOverlap, e2012},
	63: {"overlap begin yellow", ParamOverlap, e2012},
	64: {"overlap begin red clearance", ParamOverlap, e2012},
	65: {"overlap off", ParamOverlap, e2012},
	66: {"overlap dark", ParamOverlap, e2012},
	67: {"pedestrian overlap begin walk", ParamOverlap, e2012},
	68: {"pedestrian overlap begin clearance", ParamOverlap, e2012},
	69: {"pedestrian overlap begin steady don't walk", ParamOverlap, e2012},
	70: {"pedestrian overlap dark", ParamOverlap, e2012},
	71: {"overlap advance warning sign on", ParamOverlap, e2020},
	72: {"overlap advance warning sign off", ParamOverlap, e2020},

	81: {"detector off", ParamDetector, e2012},
	82: {"detector on", ParamDetector, e2012},
	83: {"detector restored", ParamDetector, e2012},
	84: {"detector fault: other", ParamDetector, e2012},
	85: {"detector fault: watchdog", ParamDetector, e2012},
	86: {"detector fault: open loop", ParamDetector, e2012},
	87: {"detector fault: shorted loop", ParamDetector, e2012},
	88: {"detector fault: excessive change", ParamDetector, e2012},
	89: {"pedestrian detector off", ParamPedDetector, e2012},
	90: {"pedestrian detector on", ParamPedDetector, e2012},
	91: {"pedestrian detector failed", ParamPedDetector, e2012},
	92: {"pedestrian detector restored", ParamPedDetector, e2012},
	93: {"priority detector off", ParamPriority, e2020},
	94: {"priority detector on", ParamPriority, e2020},

	101: {"preempt advance warning input", ParamPreempt, e2012},
	102: {"preempt input on", ParamPreempt, e2012},
	103: {"preempt gate down input", ParamPreempt, e2012},
	104: {"preempt input off", ParamPreempt, e2012},
	105: {"preempt entry started", ParamPreempt, e2012},
	106: {"preempt begin track clearance", ParamPreempt, e2012},
	107: {"preempt begin dwell service", ParamPreempt, e2012},
	108: {"preempt link on", ParamPreempt, e2012},
	109: {"preempt link off", ParamPreempt, e2012},
	110: {"preempt maximum presence exceeded", ParamPreempt, e2012},
	111: {"preempt begin exit interval", ParamPreempt, e2012},
	112: {"priority check in", ParamPriority, e2012},
	113: {"priority early green", ParamPriority, e2012},
	114: {"priority extended green", ParamPriority, e2012},
	115: {"priority check out", ParamPriority, e2012},
	116: {"pre-emption force-off of cycle", ParamPreempt, e2020},
	117: {"priority early force-off of cycle", ParamPriority, e2020},
	118: {"priority service start", ParamPriority, e2020},
	119: {"priority service end", ParamPriority, e2020},

	131: {"coordination pattern change", ParamPattern, e2012},
	132: {"cycle length change", ParamSeconds, e2012},
	133: {"offset length change", ParamSeconds, e2012},
	// 134 to 149 are filled in below.
	150: {"coordination state change", ParamCycleState, e2012},
	151: {"coordinated phase yield point", ParamPhase, e2012},
	152: {"coordinated phase begin", ParamPhase, e2020},
	153: {"logic statement true", ParamLogic, e2020},
	154: {"logic statement false", ParamLogic, e2020},
	155: {"unit control status change", ParamStatus, e2020},
	156: {"additional cycle length change", ParamSeconds, e2020},

	171: {"test input on", ParamInput, e2012},
	172: {"test input off", ParamInput, e2012},
	173: {"unit flash status change", ParamStatus, e2012},
	174: {"unit alarm status 1 change", ParamStatus, e2012},
	175: {"alarm group state change", ParamStatus, e2012},
	176: {"special function output on", ParamFunction, e2012},
	177: {"special function output off", ParamFunction, e2012},
	178: {"manual control enable off/on", ParamSwitch, e2012},
	179: {"interval advance off/on", ParamSwitch, e2012},
	180: {"stop time input off/on", ParamSwitch, e2012},
	181: {"controller clock updated", ParamSeconds, e2012},
	182: {"power failure detected", ParamSwitch, e2012},
	184: {"power restored", ParamSwitch, e2012},
	185: {"manufacturer's alarm", ParamVendor, e2012},

	200: {"alarm on", ParamAlarm, e2020},
	201: {"alarm off", ParamAlarm, e2020},
	202: {"auxiliary switch off/on", ParamSwitch, e2020},
	// 203 to 218 are filled in below.
}

func init() {
	for i := range 16 {
		codes[Split1Change+i] = codeInfo{fmt.Sprintf("split %d change", i+1), ParamSeconds, e2012}
		codes[203+i] = codeInfo{fmt.Sprintf("split %d change", i+17), ParamSeconds, e2020}
	}
}

// Known says whether the enumeration, in its edition of 2020, has the code.
func Known(code uint16) bool { return int(code) < len(codes) && codes[code].name != "" }

// Name returns what the enumeration calls the code, shortened, and "" for a code
// that it does not have.
func Name(code uint16) string {
	if !Known(code) {
		return ""
	}
	return codes[code].name
}

// Param returns what the code's parameter is, and [ParamUnknown] for a code that
// the enumeration does not have.
func Param(code uint16) ParamKind {
	if !Known(code) {
		return ParamUnknown
	}
	return codes[code].param
}

// Edition returns the year of the first edition that has the code, 2012 or 2020,
// and 0 for a code that the enumeration does not have.
func Edition(code uint16) int {
	if !Known(code) {
		return 0
	}
	return int(codes[code].since)
}

// groups are the enumeration's ranges, by their last code.
var groups = [...]struct {
	last uint16
	name string
}{
	{20, "active phase"}, {30, "active pedestrian"}, {40, "barrier and ring"}, {60, "phase control"},
	{80, "overlap"}, {100, "detector"}, {130, "pre-emption and priority"}, {170, "coordination"}, {199, "cabinet and system"},
	{255, "cabinet, system and coordination"},
}

// Describe returns, for people, a code's name or, where it has none, why not: it
// is reserved in the enumeration, or beyond it and the manufacturer's own.
func Describe(code uint16) string {
	if n := Name(code); n != "" {
		return n
	}
	for _, g := range groups {
		if code <= g.last {
			return fmt.Sprintf("reserved (%s)", g.name)
		}
	}
	return "manufacturer's"
}
