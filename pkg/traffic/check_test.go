package traffic_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// crossing is a definition that breaks no rule: two streets and a button.
func crossing() *traffic.Junction {
	return &traffic.Junction{
		ID: "J1", Name: "Quay and Mill",
		Lanes: []traffic.Lane{
			{ID: "n", LengthCM: 10000, SpeedCMS: 1389, Capacity: 13}, {ID: "e", LengthCM: 10000, SpeedCMS: 1389, Capacity: 13},
			{ID: "s", LengthCM: 10000, SpeedCMS: 1389, Capacity: 13},
		},
		Groups: []traffic.Group{
			{Name: "north", Kind: traffic.Vehicles}, {Name: "east", Kind: traffic.Vehicles},
			{Name: "walk", Kind: traffic.Pedestrians, PedClearMS: 6000},
		},
		Movements: []traffic.Movement{{From: "n", To: "s", Group: 0}, {From: "e", To: "s", Group: 1}},
		Detectors: []traffic.Detector{
			{ID: "n1", Kind: traffic.StopLine, Lane: "n", Movements: []int{0}, Group: -1},
			{ID: "b1", Kind: traffic.Button, Group: 2},
		},
		Conflicts: [][]int{{1, 2}, {0}, {0}},
		Stages:    []traffic.Stage{{Name: "north", State: "Grr"}, {Name: "east", State: "rGG"}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000, MaxRedMS: 120000},
		Plan: traffic.Plan{Name: "day", Steps: []traffic.PlanStep{
			{Stage: 0, DurationMS: 30000, IntergreenMS: 4000}, {Stage: 1, DurationMS: 30000, IntergreenMS: 7000},
		}},
	}
}

// TestCheck breaks each rule once and wants to read which field broke which.
func TestCheck(t *testing.T) {
	if err := crossing().Check(); err != nil {
		t.Fatalf("got %v, want the definition accepted", err)
	}
	for _, c := range []struct {
		name  string
		spoil func(j *traffic.Junction)
		want  []string
	}{
		{"no id", func(j *traffic.Junction) { j.ID = "" }, []string{"junction : id: must not be empty"}},
		{"lane without id", func(j *traffic.Junction) { j.Lanes = append(j.Lanes, traffic.Lane{}) },
			[]string{"junction J1: lanes[3].id: must not be empty"}},
		{"lane twice", func(j *traffic.Junction) { j.Lanes = append(j.Lanes, traffic.Lane{ID: "e"}) },
			[]string{`junction J1: lanes[3].id "e": must be unique`}},
		{"group kind", func(j *traffic.Junction) { j.Groups[1].Kind = "trams" },
			[]string{`junction J1: groups[1].kind "trams": must be vehicles, pedestrians or buses`}},
		{"negative group time", func(j *traffic.Junction) { j.Groups[2].PedClearMS = -1 },
			[]string{"junction J1: groups[2]: times must not be negative"}},
		{"movement from nowhere", func(j *traffic.Junction) { j.Movements[0].From = "w" },
			[]string{`junction J1: movements[0].from "w": names no lane of this junction`}},
		{"movement to nowhere", func(j *traffic.Junction) { j.Movements[1].To = "w" },
			[]string{`junction J1: movements[1].to "w": names no lane of this junction`}},
		{"movement without group", func(j *traffic.Junction) { j.Movements[1].Group = 3 },
			[]string{"junction J1: movements[1].group 3: names no group"}},
		{"detector twice", func(j *traffic.Junction) { j.Detectors[1].ID = "n1" },
			[]string{`junction J1: detectors[1].id "n1": must be unique and not empty`}},
		{"detector of no movement", func(j *traffic.Junction) { j.Detectors[0].Movements = []int{2} },
			[]string{"junction J1: detectors[0].movements 2: names no movement"}},
		{"conflicts missing", func(j *traffic.Junction) { j.Conflicts = j.Conflicts[:2] },
			[]string{"junction J1: conflicts: 2 for 3 groups: must have one entry a group"}},
		{"conflict with itself", func(j *traffic.Junction) { j.Conflicts[1] = []int{0, 1} },
			[]string{"junction J1: conflicts[1] 1: names no other group"}},
		{"conflict one way", func(j *traffic.Junction) { j.Conflicts[2] = nil },
			[]string{"junction J1: conflicts[0] 2: must be symmetric"}},
		{"stage too short", func(j *traffic.Junction) { j.Stages[0].State = "Gr" },
			[]string{`junction J1: stages[0].state "Gr": must have one aspect a group`}},
		{"stage with yellow", func(j *traffic.Junction) { j.Stages[1].State = "rGy" },
			[]string{`junction J1: stages[1].state[2] "y": only r, G and g are allowed in a stage`}},
		{"conflicting phases in a plan", func(j *traffic.Junction) { j.Stages[1].State = "gGG" }, []string{
			`junction J1: stages[1] "east": groups 0 and 1: conflicting groups must not be green together`,
			`junction J1: stages[1] "east": groups 0 and 2: conflicting groups must not be green together`,
		}},
		{"no stages", func(j *traffic.Junction) { j.Stages = nil }, []string{
			"junction J1: stages: at least one is needed", "junction J1: plan.steps[1].stage 1: names no stage"}},
		{"plan of an unknown stage", func(j *traffic.Junction) { j.Plan.Steps[1].Stage = 2 },
			[]string{"junction J1: plan.steps[1].stage 2: names no stage"}},
		{"step all intergreen", func(j *traffic.Junction) { j.Plan.Steps[0].IntergreenMS = 30000 },
			[]string{"junction J1: plan.steps[0]: duration must be positive and longer than its intergreen"}},
		{"step below minimum green", func(j *traffic.Junction) { j.Plan.Steps[0].DurationMS = 8000 },
			[]string{"junction J1: plan.steps[0]: green of 4000 ms is below the minimum green of 5000 ms"}},
		{"no plan", func(j *traffic.Junction) { j.Plan.Steps = nil },
			[]string{"junction J1: plan: at least one step is needed"}},
		{"no yellow", func(j *traffic.Junction) { j.Timing.YellowMS = 0 },
			[]string{"junction J1: timing: yellow must be positive, the others not negative"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := crossing()
			c.spoil(j)
			err := j.Check()
			if err == nil {
				t.Fatal("got the definition accepted, want it refused")
			}
			var p traffic.Problem
			if !errors.As(err, &p) || p.Field == "" || p.Rule == "" {
				t.Errorf("got %#v, want a Problem with field and rule", err)
			}
			got := strings.Split(err.Error(), "\n")
			for _, w := range c.want {
				if !has(got, w) {
					t.Errorf("got %q, want a line %q", got, w)
				}
			}
			if len(c.want) == 1 && len(got) != 1 {
				t.Errorf("got %q, want only %q", got, c.want)
			}
		})
	}
}

func has(lines []string, want string) bool {
	for _, l := range lines {
		if l == want {
			return true
		}
	}
	return false
}

func TestParseJunction(t *testing.T) {
	b, err := json.Marshal(crossing())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := traffic.ParseJunction(b); err != nil {
		t.Errorf("got %v, want the definition back", err)
	}
	for name, c := range map[string]struct{ doc, want string }{
		"unknown field": {strings.Replace(string(b), `"name":`, `"nmae":`, 1), `unknown field "nmae"`},
		"cut short":     {string(b[:len(b)/2]), "junction definition:"},
		"two of them":   {string(b) + string(b), "data after the end of the document"},
		"stray bracket": {string(b) + "}", "data after the end of the document"},
		"breaks a rule": {strings.Replace(string(b), `"rGG"`, `"GGG"`, 1), "groups 0 and 1: conflicting groups"},
	} {
		if _, err := traffic.ParseJunction([]byte(c.doc)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}
