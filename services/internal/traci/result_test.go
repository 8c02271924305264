package traci

import (
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

func TestStrictCount(t *testing.T) {
	const trips = `<tripinfos>
		<tripinfo id="a" depart="10.00" departDelay="2.00" arrival="60.00" duration="50.00" waitingTime="8.00" timeLoss="20.00"/>
		<personinfo id="p" depart="1.00"/>
		<tripinfo id="b" depart="30.00" departDelay="10.00" arrival="-1.00" duration="70.00" waitingTime="30.00" timeLoss="40.00"><emissions/></tripinfo>
		<tripinfo id="c" depart="-1" departDelay="0.00" arrival="-1.00" duration="0.00" waitingTime="0.00" timeLoss="0.00"/>
		</tripinfos>`
	planned := map[string]time.Duration{"a": 8 * time.Second, "b": 20 * time.Second, "c": 40 * time.Second, "d": 90 * time.Second}
	got, err := strict(strings.NewReader(trips), planned, 100*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	// a lost 22 s, b 50 s so far; c and d never entered: 60 s and 10 s.
	want := Result{DelayS: 142.0 / 4, DurationS: 60, WaitingS: 19, Trips: 4, Finished: 1, NeverEntered: 2}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := strict(strings.NewReader(`<tripinfos><tripinfo id="x" depart="1"/></tripinfos>`), nil, 0); err == nil || !strings.Contains(err.Error(), `<tripinfo id="x">: arrival`) {
		t.Errorf("got %v, want the trip and the attribute named", err)
	}
	if got, err := strict(strings.NewReader(`<tripinfos/>`), nil, 0); err != nil || got != (Result{}) {
		t.Errorf("no trips: got %+v, %v, want nothing", got, err)
	}
}

func TestPlannedDepartures(t *testing.T) {
	const routes = `<routes>
		<vType id="t"/>
		<trip id="early" depart="99.5"/><trip id="first" depart="100"/>
		<vehicle id="clock" depart="0:02:00"><route edges="a b"/></vehicle>
		<trip id="last" depart="199.99"/><trip id="late" depart="200"/>
		<trip id="ride" depart="triggered"/>
		<flow id="n" begin="100" end="200" number="4"/>
		<flow id="p" begin="90" end="120" period="15"/>
		<flow id="h" begin="180" vehsPerHour="360"/>
		<person id="walker" depart="110"/>
		</routes>`
	got := map[string]time.Duration{}
	if err := departures(strings.NewReader(routes), 100*time.Second, 200*time.Second, got); err != nil {
		t.Fatal(err)
	}
	want := map[string]time.Duration{
		"first": 100 * time.Second, "clock": 120 * time.Second, "last": 199990 * time.Millisecond,
		"n.0": 100 * time.Second, "n.1": 125 * time.Second, "n.2": 150 * time.Second, "n.3": 175 * time.Second,
		"p.1": 105 * time.Second, "h.0": 180 * time.Second, "h.1": 190 * time.Second,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for text, want := range map[string]string{
		`<trip id="x" depart="soon"/>`:                           `<trip id="x">: depart: "soon"`,
		`<flow id="x" begin="0" probability="0.1"/>`:             `<flow id="x">: departs at random`,
		`<flow id="x" begin="0"/>`:                               "none of number, vehsPerHour, period",
		`<flow id="x" begin="0" vehsPerHour="-3"/>`:              `vehsPerHour "-3"`,
		`<flow id="x" begin="0" period="0"/>`:                    `period "0"`,
		`<flow id="x" begin="never" period="3"/>`:                `begin: "never"`,
		`<flow id="x" begin="0" number="many" vehsPerHour="1"/>`: `number "many"`,
	} {
		err := departures(strings.NewReader("<routes>"+text+"</routes>"), 0, time.Hour, map[string]time.Duration{})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}

func TestParseTime(t *testing.T) {
	for in, want := range map[string]time.Duration{"0": 0, "12.5": 12500 * time.Millisecond, "01:00:01": 3601 * time.Second, "1:0:0:0": 24 * time.Hour, "-5": -5 * time.Second} {
		if got, err := parseTime(in); err != nil || got != want {
			t.Errorf("%q: got %s, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "1:2", "NaN", "Inf", "1e300", "1:2:3:4:5"} {
		if got, err := parseTime(in); err == nil {
			t.Errorf("%q: got %s, want an error", in, got)
		}
	}
}

func TestBaselineCountsWhatNeverEntered(t *testing.T) {
	needSUMO(t)
	dir := t.TempDir()
	b, err := os.ReadFile(filepath.Join("testdata", "cross.net.xml"))
	if err != nil {
		t.Fatal(err)
	}
	// A bus stands at the light for good, so that of those behind it most never
	// get in: the road holds a dozen.
	text := strings.ReplaceAll(string(b), `"GGgrrrGGgrrrr"`, `"rGgrrrrrrrrrr"`)
	text = strings.ReplaceAll(text, `"yyyrrryyyrrrr"`, `"ryyrrrrrrrrrr"`)
	for name, text := range map[string]string{
		"cross.net.xml": text,
		"a.rou.xml":     `<routes><vType id="bus" vClass="bus"/><flow id="s" type="bus" begin="0" end="100" number="50" from="SA" to="AN"/></routes>`,
		"a.sumocfg": `<configuration><input><net-file value="cross.net.xml"/><route-files value="a.rou.xml"/></input>
			<time><begin value="0"/><end value="200"/></time></configuration>`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Load(filepath.Join(dir, "a.sumocfg"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Baseline(t.Context(), s, 1)
	if err != nil {
		t.Fatal(err)
	}
	if got.Trips != 50 || got.Finished != 0 || got.NeverEntered < 30 || got.NeverEntered > 48 {
		t.Errorf("got %+v, want 50 trips, none finished, most never entered", got)
	}
	// Planned every 2 s from 0; on average each waits about 150 s, and who drove
	// lost nearly all of it.
	if math.Abs(got.DelayS-150) > 15 {
		t.Errorf("delay %.1f s, want about 150", got.DelayS)
	}
}

func TestBaselineNeedsAnEnd(t *testing.T) {
	s := cross(t)
	s.End = -1
	if _, err := Baseline(t.Context(), s, 1); kind.Of(err) != kind.Invalid {
		t.Errorf("got %v, want an Invalid error", err)
	}
	if _, err := Baseline(t.Context(), cross(t), -3); err == nil || !strings.Contains(err.Error(), "seed -3") {
		t.Errorf("got %v, want the seed refused", err)
	}
}
