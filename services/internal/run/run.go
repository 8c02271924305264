// Package run starts the parts of a program together and ends them together.
package run

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
)

// Actor is a named part that runs until its context ends or it fails.
type Actor struct {
	Name string
	Run  func(ctx context.Context) error
}

// All runs the actors until the first of them returns, for whatever reason, or
// ctx ends. It then cancels the others, waits for every one, and returns their
// errors joined, each with its actor's name. An actor that only reports that
// its context ended has not failed. A panic in an actor is an error with its
// stack.
func All(ctx context.Context, actors ...Actor) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type end struct {
		i   int
		err error
	}
	ends := make(chan end, len(actors))
	for i, a := range actors {
		go func() {
			err := errors.New("did not return") // replaced, unless the goroutine exits
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
				}
				ends <- end{i, err}
			}()
			err = a.Run(ctx)
		}()
	}
	var errs []error
	for range actors {
		e := <-ends
		cancel()
		if e.err != nil && !errors.Is(e.err, context.Canceled) {
			errs = append(errs, fmt.Errorf("%s: %w", actors[e.i].Name, e.err))
		}
	}
	return errors.Join(errs...)
}
