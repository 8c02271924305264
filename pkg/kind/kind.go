// Package kind is the one taxonomy of errors that services branch on.
//
// A handler returns an error; the bus turns its kind into ack, delayed nak or
// terminate-and-dead-letter, and the HTTP edge turns it into a status code. No
// other code should switch on kinds.
package kind

import (
	"errors"
	"fmt"
)

// Kind says what the caller should do about an error.
type Kind uint8

const (
	// Internal means that we do not know better: retry, then look.
	Internal Kind = iota
	// Invalid means that the input breaks a rule; the same input will never pass.
	Invalid
	// NotFound means that what was named does not exist here.
	NotFound
	// Conflict means that the input contradicts something already decided.
	Conflict
	// Stale means that the input was right once, and is too old now.
	Stale
	// Unavailable means that the same input may pass later: back off and retry.
	Unavailable
	// Denied means that the caller is known and is not allowed to do this.
	Denied
)

var names = [...]string{"internal", "invalid", "not-found", "conflict", "stale", "unavailable", "denied"}

func (k Kind) String() string {
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

type classified struct {
	kind Kind
	err  error
}

func (e *classified) Error() string { return e.err.Error() }
func (e *classified) Unwrap() error { return e.err }

// Errorf formats an error as [fmt.Errorf] does and gives it kind k.
func Errorf(k Kind, format string, args ...any) error {
	return &classified{k, fmt.Errorf(format, args...)}
}

// Of returns the kind that is outermost in err's chain, and Internal where
// there is none.
func Of(err error) Kind {
	var c *classified
	if errors.As(err, &c) {
		return c.kind
	}
	return Internal
}
