package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// redecided runs a replay of decisions.
func redecided(t *testing.T, code int, args ...string) policyReplay {
	t.Helper()
	r := inside(t, append([]string{"replay", "--json"}, args...)...)
	wantExit(t, r, code)
	var out policyReplay
	if err := json.Unmarshal([]byte(r.out), &out); err != nil {
		t.Fatalf("%v in %s", err, r.out)
	}
	return out
}

func TestReplayPolicy(t *testing.T) {
	processTest(t)
	dir := filepath.Join(t.TempDir(), "district")
	wantExit(t, inside(t, "simulate", "--config", cityName, "--for", "60s", "--controller", "maxpressure", "--pipeline", "--data", dir, "--quiet"), exitOK)

	r := redecided(t, exitOK, "--data", dir, "--policy", "recorded", "--against", "fixed/field")
	if r.Commands < 9*50 || r.Repeated != r.Commands || len(r.Mismatches) != 0 || r.Gone != 0 {
		t.Errorf("got %d of %d commands repeated, %v; want all of more than %d", r.Repeated, r.Commands, r.Mismatches, 9*50)
	}
	if r.Different == 0 || r.Different == r.Decisions || r.Decisions < r.Commands || len(r.ByJunction) != 9 {
		t.Errorf("got %d of %d decisions different at %d junctions, want some", r.Different, r.Decisions, len(r.ByJunction))
	}
	sum := 0
	for i, d := range r.Differences {
		sum += d.Decisions
		if d.Stage == d.Against || d.Rule == "" || !strings.HasPrefix(d.Other, "fixed plan") || d.To.Before(d.From) || i > 0 && d.From.Before(r.Differences[i-1].From) {
			t.Errorf("got difference %+v", d)
		}
	}
	if sum != r.Different {
		t.Errorf("the list has %d different decisions, the count %d", sum, r.Different)
	}
	if r := redecided(t, exitOK, "--data", dir, "--policy", "maxpressure", "--against", "recorded"); r.Different != 0 || r.Decisions == 0 || len(r.Differences) != 0 {
		t.Errorf("the recorded policy against itself: got %d of %d different", r.Different, r.Decisions)
	}
	text := inside(t, "replay", "--data", dir, "--policy", "recorded", "--against", "actuated")
	wantExit(t, text, exitOK)
	for _, want := range []string{"commands in the log repeated\n", "recorded against actuated: ", " against stage "} {
		if !strings.Contains(text.out, want) {
			t.Errorf("got %q, want %q in it", text.out, want)
		}
	}
	wantExit(t, inside(t, "replay", "--data", dir, "--policy", "recorded"), exitUsage, "belong together")
	wantExit(t, inside(t, "replay", "--data", dir, "--policy", "magic", "--against", "fixed"), exitUsage, `controller "magic"`)
	wantExit(t, inside(t, "replay", "--data", t.TempDir(), "--policy", "recorded", "--against", "fixed"), exitFailed)
	wantExit(t, inside(t, "simulate", "--config", cityName, "--for", "1s", "--pipeline", "--data", dir), exitUsage, "holds a district already")
	wantExit(t, inside(t, "simulate", "--config", cityName, "--for", "1s", "--data", dir), exitUsage, "only with --pipeline")

	// A command that its policy does not give is found, and said where.
	d, err := district.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := identity.NewRegistry(&d.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		want   string
		change func(*traffic.Command)
	}{
		{"", func(*traffic.Command) {}},
		{"its policy gives stage", func(c *traffic.Command) { c.Stage = (c.Stage + 1) % 3 }},
		{"its policy gives stage", func(c *traffic.Command) { c.Rule += "." }},
		{`by version "0" of maxpressure`, func(c *traffic.Command) { c.ControllerVersion = "0" }},
		{"the newest of its block is", func(c *traffic.Command) { c.RestsOn.Seq += 1000 }},
		{"no decision follows", func(c *traffic.Command) { c.Junction = "h9999" }},
	} {
		var first *decidedBlock
		var cmds []*traffic.Command
		if err := scanDecided(dir, new(int), func(b *decidedBlock) error {
			if len(cmds) == 0 {
				for _, x := range b.commands {
					copied := *x
					if len(cmds) == 0 || cmds[0].Height == x.Height {
						cmds = append(cmds, &copied)
					}
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := scanDecided(dir, new(int), func(b *decidedBlock) error {
			if b.height == ledger.Height(cmds[0].Height) {
				first = b
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		cs, err := newCores(reg, cmds[0], recordedPolicy, recordedPolicy)
		if err != nil {
			t.Fatal(err)
		}
		c.change(cmds[0])
		r := &policyReplay{ByJunction: map[traffic.JunctionID]policyCount{}, open: map[traffic.JunctionID]*policyDifference{}}
		r.block(cs, reg, first, cmds)
		switch {
		case c.want == "" && (len(r.Mismatches) != 0 || r.Repeated != len(cmds)):
			t.Errorf("got %v, want the commands repeated", r.Mismatches)
		case c.want != "" && (len(r.Mismatches) == 0 || !strings.Contains(r.Mismatches[0].What, c.want)):
			t.Errorf("got %v, want %q", r.Mismatches, c.want)
		}
	}
}
