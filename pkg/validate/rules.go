package validate

// Rule names a rule; it is a token of a subject, a label in metrics and what a
// sender is told.
type Rule string

// The rules, in the order in which they are checked.
const (
	RuleSize           Rule = "size"
	RuleSchema         Rule = "schema"
	RuleUnknownKey     Rule = "unknown-device"
	RuleRevoked        Rule = "revoked-device"
	RuleMaySign        Rule = "may-not-sign"
	RuleKind           Rule = "kind"
	RuleSignature      Rule = "signature"
	RuleDistrict       Rule = "district"
	RuleDevice         Rule = "device"
	RuleJunction       Rule = "junction"
	RuleQuarantined    Rule = "device-quarantined"
	RuleDuplicate      Rule = "duplicate"
	RuleEquivocation   Rule = "equivocation"
	RuleReordered      Rule = "reordered"
	RuleReplay         Rule = "replay"
	RuleChain          Rule = "chain"
	RuleClockAhead     Rule = "clock-ahead"
	RuleClockBehind    Rule = "clock-behind"
	RuleClockBackwards Rule = "clock-backwards"
	RuleSignal         Rule = "signal"
	RuleDetector       Rule = "detector"
	RuleTwice          Rule = "detector-twice"
	RuleCount          Rule = "count"
	RuleOccupancy      Rule = "occupancy"
	RuleSpeed          Rule = "speed"
	RuleVehicles       Rule = "vehicles"
	RuleInconsistent   Rule = "inconsistent"
	RuleStage          Rule = "stage"
	RulePlan           Rule = "plan"
	RuleExpired        Rule = "expired"
	RuleRegistry       Rule = "registry"
	RuleInternal       Rule = "internal" // never by Judge, see [Failed]
)

var rules = [...]struct {
	rule Rule
	text string
}{
	{RuleSize, "A record, its payload and each list in it stay below a fixed size."},
	{RuleSchema, "The envelope and its payload can be decoded, hold no unknown field, and every field is in its range."},
	{RuleUnknownKey, "The signing key is in the registry."},
	{RuleRevoked, "The signing key's holder has not been revoked."},
	{RuleMaySign, "The signing key's holder may sign records of this kind."},
	{RuleKind, "The district takes records of this kind."},
	{RuleSignature, "The signature is the key's, over exactly these bytes."},
	{RuleDistrict, "The record is for this district."},
	{RuleDevice, "A frame names the device whose key signed it."},
	{RuleJunction, "The junction is in the registry, and a frame's is its device's."},
	{RuleQuarantined, "The device has not sent two different frames under one number before."},
	{RuleDuplicate, "The same body is recorded once."},
	{RuleEquivocation, "There is one body to a device, boot epoch and sequence number (to a junction and sequence number, for commands)."},
	{RuleReordered, "Boot epochs rise, and sequence numbers rise within one; a number that was passed over does not come later."},
	{RuleReplay, "A record from before those remembered of its sender does not come again."},
	{RuleChain, "A frame names the hash of the device's previous frame, and the first one after a boot names none."},
	{RuleClockAhead, "The record's time is not in the future, but for a small error of clocks."},
	{RuleClockBehind, "The record's time is not long past."},
	{RuleClockBackwards, "Time does not run backwards from one frame of a device to the next, within a boot epoch."},
	{RuleSignal, "The signal state has one known letter a signal group, a stage of the junction and a known mode."},
	{RuleDetector, "The detector belongs to the junction, and the device may speak for it."},
	{RuleTwice, "A frame has one reading a detector."},
	{RuleCount, "No more vehicles pass than a lane can discharge in the interval."},
	{RuleOccupancy, "Occupancy is 0 to 100 %."},
	{RuleSpeed, "Speed is one that a vehicle can have on the lane."},
	{RuleVehicles, "No more vehicles are present than fit under the detector."},
	{RuleInconsistent, "Count, occupancy, speed, vehicles and waiting time do not contradict each other."},
	{RuleStage, "A command names a stage of the junction."},
	{RulePlan, "A fall-back plan gives times to the filed sequence of stages, within the filed limits, and nothing else."},
	{RuleExpired, "A command expires after it was issued, soon, and has not expired long ago. A device comes before its claim ends."},
	{RuleRegistry, "A registry change has an action, a type and an id."},
	{RuleInternal, "Judging the record does not fail by a fault of the program."},
}

// Rules returns all rules in the order in which they are checked.
func Rules() []Rule {
	out := make([]Rule, len(rules))
	for i, r := range rules {
		out[i] = r.rule
	}
	return out
}

// Text says what the rule demands, in one sentence; empty for a name that is no
// rule.
func (r Rule) Text() string {
	for _, x := range rules {
		if x.rule == r {
			return x.text
		}
	}
	return ""
}
