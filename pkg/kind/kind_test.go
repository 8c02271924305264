package kind

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestOf(t *testing.T) {
	inner := Errorf(Stale, "frame %d: %w", 7, io.EOF)
	for _, tt := range []struct {
		name string
		err  error
		want Kind
	}{
		{"none", nil, Internal},
		{"unclassified", io.EOF, Internal},
		{"classified", inner, Stale},
		{"wrapped", fmt.Errorf("reading: %w", inner), Stale},
		{"the outermost counts", Errorf(Unavailable, "bus: %w", inner), Unavailable},
		{"joined", errors.Join(io.EOF, inner), Stale},
	} {
		if got := Of(tt.err); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
	if got, want := inner.Error(), "frame 7: EOF"; got != want {
		t.Errorf("got text %q, want %q", got, want)
	}
	if !errors.Is(inner, io.EOF) {
		t.Error("the cause is lost")
	}
}

func TestString(t *testing.T) {
	seen := map[string]bool{}
	for k := Internal; k <= Denied; k++ {
		s := k.String()
		if s == "" || seen[s] {
			t.Errorf("kind %d has the name %q, want one of its own", uint8(k), s)
		}
		seen[s] = true
	}
	if got := Kind(200).String(); got != "kind(200)" {
		t.Errorf("got %q", got)
	}
}
