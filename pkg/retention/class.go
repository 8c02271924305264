// Package retention says how long what is kept: which class a record belongs to,
// which records of a class are due, what a legal hold keeps from it, and what a
// receipt of deletion explains.
//
// Nothing here reads a disk or a clock. Holders of payloads ask it what to let go
// of, and say what they did in a [Receipt], which is sealed in the log; whoever
// checks a folder asks [Explained] whether what is missing may be missing.
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
