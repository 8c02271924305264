package run_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/services/internal/run"
)

func TestAllStopsTheRestAndNamesWhoFailed(t *testing.T) {
	boom := errors.New("boom")
	waited := false
	err := run.All(context.Background(),
		run.Actor{Name: "waits", Run: func(ctx context.Context) error { <-ctx.Done(); waited = true; return ctx.Err() }},
		run.Actor{Name: "fails", Run: func(context.Context) error { return boom }},
	)
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "fails: boom") {
		t.Errorf("got %v, want fails: boom", err)
	}
	if strings.Contains(err.Error(), "waits") {
		t.Errorf("got %v, an actor that was only told to stop has not failed", err)
	}
	if !waited {
		t.Error("All returned before the other actor did")
	}
}

func TestAllTurnsAPanicIntoAnError(t *testing.T) {
	err := run.All(context.Background(), run.Actor{Name: "p", Run: func(context.Context) error { panic("oh") }})
	if err == nil || !strings.Contains(err.Error(), "p: panic: oh") {
		t.Errorf("got %v, want the panic with the actor's name", err)
	}
}

func TestAllEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := run.All(ctx, run.Actor{Name: "a", Run: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}); err != nil {
		t.Errorf("got %v, want nil", err)
	}
}
