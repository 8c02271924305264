package access

import "github.com/stopline-traffic/stopline/pkg/identity"

// Default is the policy that a new district begins with.
func Default() identity.AccessPolicy {
	return identity.AccessPolicy{Version: "1", Purposes: []identity.AccessPurpose{
		{Code: "operations", Text: "Running the district's signals"},
		{Code: "maintenance", Text: "Installing and mending devices"},
		{Code: "emergency-response", Text: "An emergency vehicle on its way"},
		{Code: "transit-service", Text: "Public transport keeping its schedule"},
		{Code: "planning", Text: "Traffic engineering and statistics"},
		{Code: "investigation", Text: "A crime or a collision is investigated", Case: true,
			LegalBases: []string{"court-order", "warrant", "prosecutor-order"}, CovertDays: 180},
		{Code: "litigation", Text: "Evidence for a court or an insurer", Case: true, LegalBases: []string{"court-order", "party-request"}},
		{Code: "audit", Text: "Checking what the district and its agencies do"},
		{Code: "governance", Text: "Deciding about the registry"},
	}, Cedar: defaultCedar}
}

const defaultCedar = `@id("live-operations")
permit (principal, action in Action::"live", resource)
when { principal.roles.containsAny(["operator", "engineer", "technician", "dispatcher", "transit-dispatcher", "auditor", "viewer"])
  && ["operations", "maintenance", "emergency-response", "transit-service", "planning", "audit", "governance"].contains(context.purpose) };

@id("emergency-corridor")
permit (principal in Role::"dispatcher", action in Action::"request", resource)
when { context.purpose == "emergency-response" && (resource.agency == "" || resource.agency == principal.agency) };

@id("transit-priority")
permit (principal in Role::"transit-dispatcher", action in Action::"request", resource)
when { context.purpose == "transit-service" && (resource.agency == "" || resource.agency == principal.agency) };

@id("requests-seen-by-operators")
permit (principal in Role::"operator", action in [Action::"GetPriority", Action::"ListPriorities", Action::"WatchPriority"], resource)
when { context.purpose == "operations" };

@id("operators-override")
permit (principal in Role::"operator", action in Action::"override", resource)
when { context.purpose == "operations" };

@id("investigators-read-by-case")
permit (principal in Role::"investigator", action in Action::"personal", resource)
when { ["investigation", "litigation"].contains(context.purpose) };

@id("operators-explain")
permit (principal in Role::"operator", action in [Action::"GetChain", Action::"GetBundle", Action::"SearchRecords"], resource)
when { context.purpose == "operations" && resource.kind != "access" };

@id("own-requests-proven")
permit (principal, action in [Action::"GetChain", Action::"GetBundle"], resource)
when { principal.roles.containsAny(["dispatcher", "transit-dispatcher"]) && resource.agency == principal.agency
  && ["emergency-response", "transit-service"].contains(context.purpose) };

@id("auditors-read")
permit (principal in Role::"auditor", action in Action::"personal", resource)
when { context.purpose == "audit" };

@id("own-access")
permit (principal, action == Action::"ListAccess", resource)
when { resource.agency == principal.agency };

@id("auditors-see-access")
permit (principal in Role::"auditor", action == Action::"ListAccess", resource)
when { context.purpose == "audit" };

@id("exports-approved")
permit (principal in Role::"investigator", action == Action::"ApproveExport", resource)
when { ["investigation", "litigation"].contains(context.purpose) };

@id("exports")
permit (principal in Role::"investigator", action == Action::"ExportRecords", resource)
when { ["investigation", "litigation"].contains(context.purpose) && context.approved_by != "" };

@id("technicians-enrol")
permit (principal in Role::"technician", action in Action::"enrol", resource)
when { context.purpose == "maintenance" };

@id("officials-govern")
permit (principal in Role::"official", action in Action::"govern", resource)
when { context.purpose == "governance" };
`
