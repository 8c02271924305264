package access

// Method is what the gateway must do around one method of its API.
type Method struct {
	// Group of Cedar's actions that the method is in.
	Group string
	// Purpose says that the call must have one.
	Purpose bool
	// Agreed says that the answer waits until the access record has been agreed:
	// evidence, exports, anything personal. Else it waits until it is durable.
	Agreed bool
	// Counted calls of one client are recorded once a minute, with their number.
	Counted bool
	// Stream is recorded when it opens, once a minute, and when it closes.
	Stream bool
	// Public needs no proof of who asks, and leaves no access record.
	Public bool
	// Priority has a lane of its own where there is too much to do.
	Priority bool
	// Write changes something.
	Write bool
}

const prefix = "/stopline.v1."

// Methods of the API by full name. What is not here is refused.
var Methods = map[string]Method{
	prefix + "TrafficService/GetNetwork":          {Group: "public", Public: true},
	prefix + "TrafficService/GetJunctionState":    {Group: "live", Purpose: true, Counted: true},
	prefix + "TrafficService/ListJunctionStates":  {Group: "live", Purpose: true, Counted: true},
	prefix + "TrafficService/WatchJunctionStates": {Group: "live", Purpose: true, Stream: true},
	prefix + "TrafficService/ListJunctionHistory": {Group: "live", Purpose: true},
	prefix + "TrafficService/GetPerformance":      {Group: "live", Purpose: true, Counted: true},

	prefix + "PriorityService/RequestPriority": {Group: "request", Purpose: true, Priority: true, Write: true},
	prefix + "PriorityService/UpdateArrival":   {Group: "request", Purpose: true, Priority: true, Write: true},
	prefix + "PriorityService/CancelPriority":  {Group: "request", Purpose: true, Priority: true, Write: true},
	prefix + "PriorityService/GetPriority":     {Group: "request", Purpose: true, Priority: true},
	prefix + "PriorityService/ListPriorities":  {Group: "request", Purpose: true},
	prefix + "PriorityService/WatchPriority":   {Group: "request", Purpose: true, Priority: true, Stream: true},
	prefix + "PriorityService/Override":        {Group: "override", Purpose: true, Priority: true, Write: true},
	prefix + "PriorityService/ReleaseOverride": {Group: "override", Purpose: true, Priority: true, Write: true},
	prefix + "PriorityService/ListOverrides":   {Group: "live", Purpose: true},

	prefix + "EvidenceService/SearchRecords": {Group: "personal", Purpose: true, Agreed: true},
	prefix + "EvidenceService/GetChain":      {Group: "personal", Purpose: true, Agreed: true},
	prefix + "EvidenceService/GetBundle":     {Group: "personal", Purpose: true, Agreed: true},
	prefix + "EvidenceService/VerifyBundle":  {Group: "public", Public: true},
	prefix + "EvidenceService/ExportRecords": {Group: "export", Purpose: true, Agreed: true, Stream: true},
	prefix + "EvidenceService/ApproveExport": {Group: "export", Purpose: true, Agreed: true, Write: true},

	prefix + "RegistryService/ListEntries":    {Group: "live", Purpose: true},
	prefix + "RegistryService/GetEntry":       {Group: "live", Purpose: true},
	prefix + "RegistryService/ListProposals":  {Group: "govern", Purpose: true},
	prefix + "RegistryService/GetProposal":    {Group: "govern", Purpose: true},
	prefix + "RegistryService/ProposeChange":  {Group: "govern", Purpose: true, Write: true},
	prefix + "RegistryService/SignProposal":   {Group: "govern", Purpose: true, Write: true},
	prefix + "RegistryService/SubmitProposal": {Group: "govern", Purpose: true, Write: true},

	prefix + "DeviceService/CreateClaim": {Group: "enrol", Purpose: true, Write: true},
	// The claim is the authority, and enrolment itself is a record.
	prefix + "DeviceService/Enrol":        {Group: "public", Public: true, Write: true},
	prefix + "DeviceService/RotateKey":    {Group: "public", Public: true, Write: true},
	prefix + "DeviceService/RevokeDevice": {Group: "enrol", Purpose: true, Write: true},
	prefix + "DeviceService/ListDevices":  {Group: "enrol", Purpose: true},

	prefix + "AccessService/ListAccess":       {Group: "audit", Purpose: true, Agreed: true},
	prefix + "AccessService/GetAccessSummary": {Group: "public", Public: true},

	prefix + "LogService/GetCheckpoint":       {Group: "public", Public: true},
	prefix + "LogService/GetInclusionProof":   {Group: "public", Public: true},
	prefix + "LogService/GetConsistencyProof": {Group: "public", Public: true},
}
