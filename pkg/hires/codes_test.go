package hires

import "testing"

func TestCodes(t *testing.T) {
	for _, tt := range []struct {
		code    uint16
		name    string
		param   ParamKind
		edition int
		about   string
	}{
		{PhaseOn, "phase on", ParamPhase, 2012, "phase on"},
		{PhaseForceOff, "phase force-off", ParamPhase, 2012, "phase force-off"},
		{PhaseSkipped, "phase skipped", ParamPhase, 2020, "phase skipped"},
		{27, "", ParamUnknown, 0, "reserved (active pedestrian)"},
		{BarrierTermination, "barrier termination", ParamBarrier, 2012, "barrier termination"},
		{OverlapDark, "overlap dark", ParamOverlap, 2012, "overlap dark"},
		{DetectorOn, "detector on", ParamDetector, 2012, "detector on"},
		{PedDetectorOn, "pedestrian detector on", ParamPedDetector, 2012, "pedestrian detector on"},
		{PreemptInputOn, "preempt input on", ParamPreempt, 2012, "preempt input on"},
		{PriorityServiceEnd, "priority service end", ParamPriority, 2020, "priority service end"},
		{120, "", ParamUnknown, 0, "reserved (pre-emption and priority)"},
		{PatternChange, "coordination pattern change", ParamPattern, 2012, "coordination pattern change"},
		{Split1Change, "split 1 change", ParamSeconds, 2012, "split 1 change"},
		{149, "split 16 change", ParamSeconds, 2012, "split 16 change"},
		{CycleStateChange, "coordination state change", ParamCycleState, 2012, "coordination state change"},
		{183, "", ParamUnknown, 0, "reserved (cabinet and system)"},
		{203, "split 17 change", ParamSeconds, 2020, "split 17 change"},
		{218, "split 32 change", ParamSeconds, 2020, "split 32 change"},
		{219, "", ParamUnknown, 0, "reserved (cabinet, system and coordination)"},
		{255, "", ParamUnknown, 0, "reserved (cabinet, system and coordination)"},
		{256, "", ParamUnknown, 0, "manufacturer's"},
		{65535, "", ParamUnknown, 0, "manufacturer's"},
	} {
		if n, p, e, a := Name(tt.code), Param(tt.code), Edition(tt.code), Describe(tt.code); n != tt.name || p != tt.param || e != tt.edition || a != tt.about {
			t.Errorf("code %d: got %q, %s, %d, %q, want %q, %s, %d, %q", tt.code, n, p, e, a, tt.name, tt.param, tt.edition, tt.about)
		}
		if Known(tt.code) != (tt.name != "") {
			t.Errorf("code %d: known: got %v", tt.code, Known(tt.code))
		}
	}
}

// TestCodesWhole counts the enumeration, and holds every entry to having a name
// of its own, a parameter and an edition.
func TestCodesWhole(t *testing.T) {
	count := map[int]int{}
	seen := map[string]uint16{}
	for c := range uint16(300) {
		if !Known(c) {
			continue
		}
		count[Edition(c)]++
		if other, twice := seen[Name(c)]; twice {
			t.Errorf("codes %d and %d are both %q", other, c, Name(c))
		}
		seen[Name(c)] = c
		if Param(c) == ParamUnknown || Param(c).String() == "unknown" {
			t.Errorf("code %d has no parameter", c)
		}
	}
	// By the enumeration's groups: phases 13, pedestrians 4, barriers 3, control 9,
	// overlaps 10, detectors 12, pre-emption 15, coordination 21, cabinet 14.
	if count[2012] != 101 {
		t.Errorf("got %d codes of 2012, want 101", count[2012])
	}
	// Phases 8, pedestrians 2, control 7, overlaps 2, detectors 2, priority 4,
	// coordination 5, alarms 3, splits 16.
	if count[2020] != 49 {
		t.Errorf("got %d codes of 2020, want 49", count[2020])
	}
	if len(count) != 2 {
		t.Errorf("got editions %v, want 2012 and 2020", count)
	}
	if got := ParamKind(200).String(); got != "parameter(200)" {
		t.Errorf("got %q", got)
	}
}
