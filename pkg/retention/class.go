// Package retention says how long what is kept: which class a record belongs to,
// which records of a class are due, what a legal hold keeps from it, and what a
// receipt of deletion explains.
//
// Nothing here reads a disk or a clock. Holders of payloads ask it what to let go
// of, and say what they did in a [Receipt], which is sealed in the log; whoever
// checks a folder asks [Explained] whether what is missing may be missing.
//
// # Receipt
//
// A receipt of deletion is a record of the kind deletion, in JSON:
//
//	format      "stopline deletion v1"
//	district    the district
//	holder      the signer: "sealing", or "validator-<number>" with its vote key
//	reason      "retention" or "redaction"
//	class       of the records; left out by who keeps all classes together
//	ranges      [{"first", "last"}…] leaf indexes, rising: every record of the class
//	            in them is gone at the holder
//	count       how many were let go of, where the holder counts
//	policy      hex of the SHA-256 of the registry's entry (package identity) that
//	            asked for it: of the retention entry, or of the redaction
//	at_unix_ms  when the last trace was gone
//
// It is the holder's word; who kept a copy kept it.
//
// # Tombstone
//
// A redaction is a record of the kind redaction: a change of the registry (see
// package identity) that puts an entry of type redaction, whose id is the leaf's
// index, with the leaf's commitment and the code of a legal basis, signed by
// officials of two departments at least. It means nothing where the commitment is
// not the leaf's, where the leaf comes after it, or where the record is one that
// the registry needs.
package retention

import (
	"slices"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Class of records that are kept equally long, and together: the name of a
// folder of the payload store.
type Class string

// The classes of records.
const (
	// Registry is what the log needs to be understood: changes of the registry,
	// redactions, receipts of deletion, other districts' checkpoints. It is never
	// purged.
	Registry Class = "registry"
	// Control is what was ordered: commands and overrides.
	Control Class = "control"
	// Readings are what was measured: frames, imports, words on detectors' health.
	Readings Class = "readings"
	// Access is who looked at what.
	Access Class = "access"
	// Request is what agencies asked for.
	Request Class = "request"
)

// Folders of the payload store that are no class.
const (
	// Gone holds the empty entries of records whose payload was gone before it
	// came here.
	Gone Class = "gone"
	// Mixed holds records of all classes, in the layout of before there were any.
	// It is read and emptied, and nothing is added to it.
	Mixed Class = "record"
)

// Classes returns the classes of records, in the order of their names.
func Classes() []Class { return []Class{Access, Control, Readings, Registry, Request} }

// Folders returns all folders of the payload store, in the order of their names.
func Folders() []Class {
	out := append(Classes(), Gone, Mixed)
	slices.Sort(out)
	return out
}

// Valid reports whether c is one of [Classes].
func (c Class) Valid() bool { return slices.Contains(Classes(), c) }

// Of returns the class of a kind of record. A kind that is not known here is
// kept for good, as Registry.
func Of(k identity.RecordKind) Class {
	switch k {
	case identity.KindFrame, identity.KindImport, identity.KindHealth:
		return Readings
	case identity.KindCommand, identity.KindOverride, identity.KindPlan:
		return Control
	case identity.KindAccess:
		return Access
	case identity.KindRequest:
		return Request
	}
	return Registry
}
