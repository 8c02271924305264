// Package access decides who may ask the gateway for what, for which purpose,
// and says why.
//
// The district's access policy is data, an entry of its registry
// ([identity.AccessPolicy]): a list of purposes, and policies in Cedar
// (https://www.cedarpolicy.com). [Compile] makes an [Engine] of it, [Engine.Decide]
// answers one call. Cedar is kept by others, has a specification and an analysed
// evaluator; a language of our own would have neither.
//
// # What a policy can speak of
//
//	principal   Client::"id", in Role::"dispatcher" … and in Agency::"fire";
//	            attributes agency (string), roles (set of strings). Who gives no
//	            proof of who they are is Client::"public", in Role::"public"
//	action      Action::"GetBundle", the method's name, in the group that
//	            [Methods] gives it: Action::"public", "live", "personal",
//	            "request", "override", "govern", "enrol", "export", "audit"
//	resource    District::"harbour"; Junction::"J3", Record::"17", Request::"…",
//	            Override::"…", Device::"…", Entry::"type/id", all in their
//	            District; attributes agency (whose request it is), kind, junction,
//	            where they are known
//	context     purpose, case, legal_basis (strings, empty where not given),
//	            time (datetime), approved_by (a second person, export only)
//
// # Rules that no policy can change
//
// A call that needs a purpose and has none from the list is denied, and so is one
// without the case number or legal basis that its purpose asks for. A client whose
// time is over has no roles. Where a call touches several objects each must be
// allowed. An error in evaluating any policy denies: Cedar passes over a policy
// that cannot be evaluated, and it might have forbidden. Without a policy nobody
// but the public gets anything.
package access
