package hires

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// logStart is when the logs of these tests begin: 2024-05-13 15:00:00 UTC.
const logStart = int64(1715612400e9)

// logOf reads events "seconds code parameter", separated by semicolons or lines; #
// begins a comment.
func logOf(t testing.TB, text string) []Event {
	t.Helper()
	var events []Event
	var lines []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		lines = append(lines, strings.Split(line, ";")...)
	}
	for _, line := range lines {
		if strings.TrimSpace(line) == "" {
			continue
		}
		var at string
		e := Event{Device: "d"}
		if _, err := fmt.Sscan(line, &at, &e.Code, &e.Param); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		d, err := time.ParseDuration(at + "s")
		if err != nil {
			t.Fatal(err)
		}
		e.At = logStart + int64(d)
		events = append(events, e)
	}
	return events
}

func measure(t testing.TB, o MeterOptions, events []Event) *Measured {
	t.Helper()
	m, err := NewMeter(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		m.Add(e)
	}
	return m.Finish()
}

// rowsOf prints a table with times in seconds since logStart.
func rowsOf(t *testing.T, r *Measured, m Measure) []string {
	t.Helper()
	var lines []string
	for _, l := range csvLines(t, r, m, StampMillis, len(r.Tables()[slices.IndexFunc(r.Tables(), func(t Table) bool { return t.Measure == m })].Columns)) {
		at, rest, _ := strings.Cut(l, ",")
		ms, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%g,%s", float64(ms-logStart/1e6)/1000, rest))
	}
	return lines
}

func wantRows(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestTerminations(t *testing.T) {
	r := measure(t, MeterOptions{Measures: []Measure{MeasureTerminations}}, logOf(t, `
		10 4 2; 20 4 2; 30 5 2; 40 6 4
		40 6 4         # the same event again
		899.9 4 2      # still in the first bin
		900 4 2        # in the second
		2700 5 2       # two bins without any between`))
	wantRows(t, rowsOf(t, r, MeasureTerminations),
		"0,d,2,GapOut,3", "0,d,2,MaxOut,1", "0,d,4,ForceOff,1", "900,d,2,GapOut,1", "2700,d,2,MaxOut,1")
}

const advance = "DeviceId,Phase,Parameter,Function,Offset_s\nd,2,10,Advance,0\n"

func TestArrivalsOnGreen(t *testing.T) {
	events := `
		5 82 10                    # before the first change: not on green
		20 1 2; 20 82 10           # at the begin of green: on green
		30 82 10; 30 82 10         # on green, once
		30 82 11                   # another detector
		40 7 2; 40 8 2; 40 82 10   # at the begin of yellow: not
		42 82 10                   # yellow
		45 9 2; 45 10 2; 46 82 10  # red
		50 8 2; 51 82 10           # a yellow out of turn does not matter
		60 1 4; 61 82 10           # nor does another phase`
	r := measure(t, MeterOptions{Detectors: detectorConfig(t, advance), Measures: []Measure{MeasureAOG}}, logOf(t, events))
	wantRows(t, rowsOf(t, r, MeasureAOG), "0,d,2,8,0.25,2")

	// A detector that reports 15 s late: its arrivals of 35 to 54.9 were on green.
	late := strings.Replace(advance, "Advance,0", "Advance,-15", 1)
	r = measure(t, MeterOptions{Detectors: detectorConfig(t, late), Measures: []Measure{MeasureAOG}}, logOf(t, `
		20 1 2; 34.9 82 10; 35 82 10; 40 8 2; 44 9 2; 54.9 82 10; 55 82 10; 100 1 2`))
	wantRows(t, rowsOf(t, r, MeasureAOG), "0,d,2,4,0.5,2")

	// One 15 s before the stop line: those of 5 to 24.9; the last is beyond the log.
	early := strings.Replace(advance, "Advance,0", "Advance,15", 1)
	r = measure(t, MeterOptions{Detectors: detectorConfig(t, early), Measures: []Measure{MeasureAOG}}, logOf(t, `
		4.9 82 10; 5 82 10; 20 1 2; 24.9 82 10; 25 82 10; 40 8 2; 44 9 2; 90 82 10; 100 1 2`))
	wantRows(t, rowsOf(t, r, MeasureAOG), "0,d,2,4,0.5,2")

	// Without green in the log, without any event.
	r = measure(t, MeterOptions{Detectors: detectorConfig(t, advance), Measures: []Measure{MeasureAOG}}, logOf(t, "5 82 10"))
	wantRows(t, rowsOf(t, r, MeasureAOG), "0,d,2,1,0,0")
	r = measure(t, MeterOptions{Detectors: detectorConfig(t, advance), Measures: []Measure{MeasureAOG}}, nil)
	wantRows(t, rowsOf(t, r, MeasureAOG))
}

const presence = "DeviceId,Phase,Parameter,Function\nd,2,10,Presence\nd,2,11,presence\n"

// Green is 10 s from 100, yellow from 110, red from 114: 114 to 119 counts.
func TestSplitFailures(t *testing.T) {
	const cycle = "100 1 2; 110 8 2; 114 9 2; 114 10 2; 116 11 2; 150 1 2;"
	half := MeterOptions{GreenOccupancy: 0.5, RedOccupancy: 0.5}
	for _, c := range []struct {
		name, detector string
		o              MeterOptions
		want           string
	}{
		{"never occupied", "", MeterOptions{}, "100,d,2,10,0,0,,false"},
		{"occupied over both ends", "90 82 10; 140 81 10", MeterOptions{}, "100,d,2,10,1,1,,true"},
		{"exactly both bounds", "102 82 10; 118 81 10", MeterOptions{}, "100,d,2,10,0.8,0.8,,true"},
		{"green just under", "102.1 82 10; 118 81 10", MeterOptions{}, "100,d,2,10,0.79,0.8,,false"},
		{"red just under", "102 82 10; 117.9 81 10", MeterOptions{}, "100,d,2,10,0.8,0.78,,false"},
		{"green alone", "100 82 10; 110 81 10", MeterOptions{}, "100,d,2,10,1,0,,false"},
		{"red alone", "114 82 10; 119 81 10", MeterOptions{}, "100,d,2,10,0,1,,false"},
		{"yellow does not count", "110 82 10; 114 81 10", MeterOptions{}, "100,d,2,10,0,0,,false"},
		{"two detectors take turns", "100 82 10; 104 81 10; 103 82 11; 109 81 11; 114 82 10; 116 81 10; 116 82 11; 118 81 11", MeterOptions{}, "100,d,2,10,0.9,0.8,,true"},
		{"two detectors at once count once", "100 82 10; 100 82 11; 105 81 10; 105 81 11", MeterOptions{}, "100,d,2,10,0.5,0,,false"},
		{"other bounds", "105 82 10; 116.5 81 10", half, "100,d,2,10,0.5,0.5,,true"},
		{"a longer red", "102 82 10; 122 81 10", MeterOptions{RedTime: 10 * time.Second}, "100,d,2,10,0.8,0.8,,true"},
		{"an off is missing, 2 s", "100 82 10; 102 82 10; 103 81 10", MeterOptions{}, "100,d,2,10,0.3,0,,false"},
		{"an off is missing, 4 s: half of it", "100 82 10; 104 82 10; 105 81 10", MeterOptions{}, "100,d,2,10,0.3,0,,false"},
		{"an off is missing, 4 s, bound 4 s", "100 82 10; 104 82 10; 105 81 10", MeterOptions{LostOff: 4 * time.Second}, "100,d,2,10,0.5,0,,false"},
		// From 101 to 141 without an off: occupied to 121, in green and red.
		{"an off is missing over the end of the cycle", "101 82 10; 141 82 10; 142 81 10", MeterOptions{}, "100,d,2,10,0.9,1,,true"},
		{"an off is missing until the log ends", "101 82 10", MeterOptions{}, "100,d,2,10,0.9,1,,true"},
		{"an on is missing", "100 82 10; 101 81 10; 109 81 10", MeterOptions{}, "100,d,2,10,0.1,0,,false"},
		{"off before any on", "109 81 10", MeterOptions{}, "100,d,2,10,0,0,,false"},
		{"on and off at once, from off", "105 81 10; 105 82 10; 109 81 11", MeterOptions{}, "100,d,2,10,0,0,,false"},
		{"off and on at once, from on", "100 82 10; 105 82 10; 105 81 10; 110 81 10", MeterOptions{}, "100,d,2,10,1,0,,false"},
		{"termination", "107 4 2; 109 6 2", MeterOptions{}, "100,d,2,10,0,0,ForceOff,false"},
	} {
		t.Run(c.name, func(t *testing.T) {
			events := logOf(t, cycle+c.detector)
			slices.SortStableFunc(events, func(a, b Event) int { return int(a.At - b.At) })
			c.o.Detectors = detectorConfig(t, presence)
			r := measure(t, c.o, events)
			wantRows(t, rowsOf(t, r, MeasureSplitCycles), c.want)
			failures := "0"
			if strings.HasSuffix(c.want, "true") {
				failures = "1"
			}
			f := strings.Split(c.want, ",")
			wantRows(t, rowsOf(t, r, MeasureSplitFailures), "0,d,2,1,0,"+failures+",10,"+f[4]+","+f[5])
		})
	}
}

// Cycles that cannot be measured are left out, and counted where a green began.
func TestSplitFailuresIncomplete(t *testing.T) {
	for _, c := range []struct {
		name, log string
		cycles    int
		want      []string
	}{
		{"without yellow", "100 1 2; 114 10 2; 150 1 2", 0, []string{"0,d,2,0,1,0,,,"}},
		{"event 7 instead of 8", "100 1 2; 110 7 2; 114 10 2; 150 1 2", 1, []string{"0,d,2,1,0,0,10,0,0"}},
		{"event 9 instead of 10", "100 1 2; 110 8 2; 114 9 2; 150 1 2", 1, []string{"0,d,2,1,0,0,10,0,0"}},
		{"without red", "100 1 2; 110 8 2; 150 1 2; 160 8 2; 164 10 2; 200 1 2", 1, []string{"0,d,2,1,1,0,10,0,0"}},
		{"only the end of red clearance", "100 1 2; 110 8 2; 116 11 2; 150 1 2", 0, []string{"0,d,2,0,1,0,,,"}},
		{"without end of green at all", "100 1 2; 150 1 2; 160 8 2; 164 10 2; 200 1 2", 1, []string{"0,d,2,1,1,0,10,0,0"}},
		{"the log ends in the red that counts", "100 1 2; 110 8 2; 114 10 2; 118.9 1 4", 0, nil},
		{"the log ends right after it", "100 1 2; 110 8 2; 114 10 2; 119 1 4", 1, []string{"0,d,2,1,0,0,10,0,0"}},
		{"the log begins in green", "110 8 2; 114 10 2; 150 1 2", 0, nil},
		{"a green of no length", "100 1 2; 100 8 2; 104 10 2; 150 1 2", 0, []string{"0,d,2,0,1,0,,,"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := measure(t, MeterOptions{Detectors: detectorConfig(t, presence)}, logOf(t, c.log))
			if len(r.SplitCycles) != c.cycles {
				t.Errorf("got %d cycles, want %d", len(r.SplitCycles), c.cycles)
			}
			wantRows(t, rowsOf(t, r, MeasureSplitFailures), c.want...)
		})
	}
	// A red of 2 s: the other 3 s count as not occupied.
	r := measure(t, MeterOptions{Detectors: detectorConfig(t, presence)}, logOf(t, "90 82 10; 100 1 2; 110 8 2; 114 10 2; 116 1 2; 150 81 10; 160 1 4"))
	wantRows(t, rowsOf(t, r, MeasureSplitCycles), "100,d,2,10,1,0.4,,false")
}

// A detector that never goes off again must not make the meter remember
// everything.
func TestSplitFailuresStuck(t *testing.T) {
	m, err := NewMeter(MeterOptions{Detectors: detectorConfig(t, presence)})
	if err != nil {
		t.Fatal(err)
	}
	m.Add(Event{At: logStart, Device: "d", Code: DetectorOn, Param: 10})
	const n = 3 * maxWaiting
	for i := range int64(n) {
		for _, c := range []struct{ after, code int64 }{{1, 1}, {10, 8}, {14, 10}} {
			m.Add(Event{At: logStart + (i*60+c.after)*1e9, Device: "d", Code: uint16(c.code), Param: 2})
		}
		m.Add(Event{At: logStart + (i*60+5)*1e9, Device: "d", Code: DetectorOn, Param: 11})
		m.Add(Event{At: logStart + (i*60+6)*1e9, Device: "d", Code: DetectorOff, Param: 11})
	}
	if s := &m.devices["d"].phases[2].split; len(s.cycles) > maxWaiting+1 || len(s.taken) > maxWaiting+2 {
		t.Errorf("got %d waiting cycles and %d times, want at most %d", len(s.cycles), len(s.taken), maxWaiting+2)
	}
	m.Add(Event{At: logStart + n*60*1e9, Device: "d", Code: PhaseBeginGreen, Param: 4})
	r := m.Finish()
	if len(r.SplitCycles) != n {
		t.Errorf("got %d cycles, want %d", len(r.SplitCycles), n)
	}
	for _, c := range r.SplitCycles {
		if !c.Failure || c.GreenOccupancy != 1 || c.RedOccupancy != 1 {
			t.Fatalf("got %+v, want occupied throughout", c)
		}
	}
}

// The meter against the definition, written down naively: many random logs with
// everything that can be wrong in them, minute by minute.
func TestSplitFailuresAgainstDefinition(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var text strings.Builder
		type span struct{ from, to int }
		var occupied []span
		const cycles = 5
		for i := range cycles {
			fmt.Fprintf(&text, "%d 1 2; %d 8 2; %d 10 2;", i*60+5, i*60+25, i*60+29)
		}
		for _, det := range []int{10, 11} {
			for at := rnd.IntN(10); at < cycles*60; {
				n := 1 + rnd.IntN(25)
				fmt.Fprintf(&text, "%d 82 %d; %d 81 %d;", at, det, at+n, det)
				occupied = append(occupied, span{at, at + n})
				at += n + 1 + rnd.IntN(25)
			}
		}
		events := logOf(t, text.String()+"400 1 4")
		rnd.Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		slices.SortStableFunc(events, func(a, b Event) int { return int(a.At - b.At) }) // any order within a stamp
		r := measure(t, MeterOptions{Detectors: detectorConfig(t, presence)}, events)
		var want []string
		for i := range cycles {
			seconds := func(from, to int) (n int) {
				for s := from; s < to; s++ {
					if slices.ContainsFunc(occupied, func(o span) bool { return o.from <= s && s < o.to }) {
						n++
					}
				}
				return n
			}
			green, red := seconds(i*60+5, i*60+25), seconds(i*60+29, i*60+34)
			want = append(want, fmt.Sprintf("%d,d,2,20,%g,%g,,%v", i*60+5, float32(green)/20, float32(red)/5, green >= 16 && red >= 4))
		}
		if got := rowsOf(t, r, MeasureSplitCycles); !slices.Equal(got, want) {
			t.Fatalf("seed %d: got\n%s\nwant\n%s", seed, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func TestYellowRed(t *testing.T) {
	conf := detectorConfig(t, "DeviceId,Phase,Parameter,Function\nd,2,10,Yellow_Red\n")
	r := measure(t, MeterOptions{Detectors: conf, Measures: []Measure{MeasureYellowRed}}, logOf(t, `
		5 82 10                                # lights unknown
		20 1 2; 25 82 10                       # green
		40 8 2; 40 82 10; 43.9 82 10           # yellow, two
		44 9 2; 44 10 2; 44 82 10              # red clearance
		46 11 2; 46 82 10; 48.9 82 10          # red
		49 82 10; 60 82 10                     # 5 s and more after red began: severe
		80 1 2; 80 82 10; 90 8 2; 94 10 2      # a cycle without any
		905 12 2`))
	wantRows(t, rowsOf(t, r, MeasureYellowRed), "0,d,2,2,2,1,4,2")
	if r := measure(t, MeterOptions{Detectors: conf, Measures: []Measure{MeasureYellowRed}, SevereRed: time.Second}, logOf(t, "20 1 2; 40 8 2; 44 10 2; 44.9 82 10; 45 82 10; 50 1 2")); r.YellowRed[0].Severe != 1 {
		t.Errorf("severe from 1 s on: got %+v, want 1", r.YellowRed)
	}
}

func TestPedDelay(t *testing.T) {
	r := measure(t, MeterOptions{Measures: []Measure{MeasurePedDelay}}, logOf(t, `
		10 45 2; 15 45 2; 30 21 2; 40 22 2   # 20 s from the first of two calls
		50 21 2                              # nobody called
		60 21 4; 60 45 4                     # called and served at once
		880 45 2; 910.4 21 2                 # 30.4 s; a call of one bin, a sample of the next
		920 45 2                             # never served
		930 21 6`))
	wantRows(t, rowsOf(t, r, MeasurePedDelay),
		"0,d,2,3,2,1,20,20", "0,d,4,1,1,1,0,0", "900,d,2,1,1,1,30.4,30.4", "900,d,6,0,1,0,,")
	r = measure(t, MeterOptions{Measures: []Measure{MeasurePedDelay}}, logOf(t, "10 45 2; 20 21 2; 30 45 2; 50.5 21 2"))
	wantRows(t, rowsOf(t, r, MeasurePedDelay), "0,d,2,2,2,2,15.25,20.5")
}

func TestPreempts(t *testing.T) {
	for _, c := range []struct {
		name, log string
		want      []string
	}{
		{"all events", "1 102 3; 2 103 3; 4 105 3; 9 106 3; 19 107 3; 79 104 3; 80 110 3; 90 111 3",
			[]string{"1,d,3,1,true,3,1,5,10,71,78,79,89"}},
		{"not served", "1 102 3; 4 104 3; 50 102 3; 52 105 3; 60 107 3; 70 104 3; 71 111 3",
			[]string{"1,d,3,1,false,,,,,,3,,", "50,d,3,1,true,2,,8,,11,20,,21"}},
		{"call drops before the entry", "1 102 3; 4 104 3; 5 105 3; 8 107 3; 9 111 3",
			[]string{"1,d,3,1,true,4,,3,,1,3,,8"}},
		{"overridden: an exit without entry", "1 102 6; 2 102 5; 2.1 105 5; 9 106 5; 20 107 5; 90 104 5; 90.2 104 6; 90.2 111 6",
			[]string{"1,d,6,1,false,,,,,,89.2,,89.2", "2,d,5,1,true,0.1,,6.9,11,,88,,"}},
		{"called again during dwell", "1 102 3; 2 105 3; 9 107 3; 20 104 3; 22 102 3; 40 104 3; 41 111 3",
			[]string{"1,d,3,2,true,1,,7,,32,39,,40"}},
		{"entered again without an exit", "1 102 3; 1 105 3; 9 107 3; 20 104 3; 60 102 3; 61 105 3; 70 107 3; 80 104 3; 81 111 3",
			[]string{"1,d,3,1,true,0,,8,,,19,,", "60,d,3,1,true,1,,9,,11,20,,21"}},
		{"call over before it is entered again", "1 102 3; 1 105 3; 9 107 3; 20 104 3; 60 102 3; 60.5 104 3; 61 105 3; 70 107 3",
			[]string{"1,d,3,1,true,0,,8,,,19,,", "60,d,3,1,true,1,,9,,,0.5,,"}},
		{"twenty minutes of silence", "1 102 3; 1 105 3; 9 107 3; 1209 102 3; 1210 104 3",
			[]string{"1,d,3,1,true,0,,8,,,,,", "1209,d,3,1,false,,,,,,1,,"}},
		{"less than that", "1 102 3; 1 105 3; 9 107 3; 1208.9 102 3; 1210 104 3",
			[]string{"1,d,3,2,true,0,,8,,,1209,,"}},
		{"the call is missing", "5 105 3; 9 107 3; 20 111 3", []string{"5,d,3,0,true,,,4,,11,,,"}},
		{"pieces of others", "5 107 3; 9 104 3; 20 111 3; 30 103 3; 31 106 3; 32 110 3", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantRows(t, rowsOf(t, measure(t, MeterOptions{Measures: []Measure{MeasurePreempts}}, logOf(t, c.log)), MeasurePreempts), c.want...)
		})
	}
}

func TestPriority(t *testing.T) {
	r := measure(t, MeterOptions{Measures: []Measure{MeasurePriority}}, logOf(t, `
		1 113 1; 2 115 1                                  # of a request before the log
		10 112 1; 11 113 1; 12 113 1; 15 114 1            # adjusted thrice
		20 112 2; 30 115 1; 35 115 2                      # meanwhile another, not adjusted
		40 112 1; 50 112 1; 55 115 1                      # a check-out is missing
		60 112 2                                          # the log ends`))
	wantRows(t, rowsOf(t, r, MeasurePriority),
		"10,d,1,1,5,3,20", "20,d,2,,,0,15", "40,d,1,,,0,", "50,d,1,,,0,5", "60,d,2,,,0,")
}

func TestPCD(t *testing.T) {
	r := measure(t, MeterOptions{Detectors: detectorConfig(t, advance)}, logOf(t, `
		5 82 10                                           # in no cycle
		10 9 2; 10 10 2; 12 11 2; 20 82 10                # red, at 10 s
		30 1 2; 30 82 10; 44.5 82 10                      # green, at 20 s and 34.5 s
		50 8 2; 53 82 10                                  # yellow, at 43 s
		54 10 2; 60 82 10; 70 1 2; 75 82 10; 80 10 2      # a cycle without yellow
		90 1 2; 95 8 2; 99 10 2                           # the next
		110 82 10; 120 1 2                                # the log ends in a cycle`))
	wantRows(t, rowsOf(t, r, MeasurePCD), "10,d,2,20,40,44,4,2", "80,d,2,10,15,19,0,0")
	wantRows(t, rowsOf(t, r, MeasurePCDArrivals),
		"20,d,2,10,10,red", "30,d,2,10,20,green", "44.5,d,2,10,34.5,green", "53,d,2,10,43,yellow")
	// Without detectors there are cycles, and no arrivals.
	r = measure(t, MeterOptions{}, logOf(t, "10 10 2; 30 1 2; 50 8 2; 54 10 2"))
	wantRows(t, rowsOf(t, r, MeasurePCD), "10,d,2,20,40,44,0,0")
}

func TestVolumes(t *testing.T) {
	conf := detectorConfig(t, `DeviceId,Phase,Parameter,Function,Movement
d,2,10,Advance,
d,2,10,Count,rt
d,2,11,count,T
d,2,12,Count,TR
d,4,12,Count,L
`)
	events := logOf(t, `
		1 82 10; 1 82 10; 2 81 10; 3 82 10     # two
		4 82 11; 5 82 12; 6 82 12; 7 82 12     # one, three
		8 82 99                                # one that is not configured
		900 82 10`)
	r := measure(t, MeterOptions{Detectors: conf}, events)
	wantRows(t, rowsOf(t, r, MeasureVolumes), "0,d,10,2", "0,d,11,1", "0,d,12,3", "0,d,99,1", "900,d,10,1")
	wantRows(t, rowsOf(t, r, MeasurePhaseVolumes), "0,d,2,Advance,1,2", "0,d,2,Count,3,6", "0,d,4,Count,1,3", "900,d,2,Advance,1,1", "900,d,2,Count,3,1")
	wantRows(t, rowsOf(t, r, MeasureTurns), "0,d,2,T,1,1", "0,d,2,TR,2,5", "0,d,4,L,1,3", "900,d,2,TR,2,1")
	r = measure(t, MeterOptions{}, events)
	wantRows(t, rowsOf(t, r, MeasureVolumes), "0,d,10,2", "0,d,11,1", "0,d,12,3", "0,d,99,1", "900,d,10,1")
	if r.PhaseVolumes != nil || r.Turns != nil {
		t.Errorf("got %v and %v without a configuration, want nothing", r.PhaseVolumes, r.Turns)
	}
}

// From and To bound what is counted, and not what is known of the lights.
func TestFromTo(t *testing.T) {
	o := MeterOptions{Detectors: detectorConfig(t, advance), From: logStart + 25e9, To: logStart + 50e9, Bin: 10 * time.Second}
	r := measure(t, o, logOf(t, "10 1 2; 24.9 82 10; 25 82 10; 30 82 10; 40 8 2; 49.9 82 10; 50 82 10; 24 4 2; 60 12 2"))
	wantRows(t, rowsOf(t, r, MeasureAOG), "20,d,2,1,1,1", "30,d,2,1,1,1", "40,d,2,1,0,0")
	wantRows(t, rowsOf(t, r, MeasureVolumes), "20,d,10,1", "30,d,10,1", "40,d,10,1")
}

// Several devices, in any order among themselves, give one result; an event
// before its time is counted as late and nowhere else.
func TestDevicesAndLateEvents(t *testing.T) {
	a := logOf(t, "10 1 2; 20 82 10; 30 4 2; 30 8 2")
	b := logOf(t, "10 1 2; 20 82 10; 25 82 10; 30 4 2; 30 8 2")
	for i := range b {
		b[i].Device = "e"
	}
	o := MeterOptions{Detectors: detectorConfig(t, advance+"e,2,10,Advance,-3\n")}
	print := func(r *Measured) string {
		var out bytes.Buffer
		if err := WriteJSON(&out, r.Tables(), StampNanos); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	want := print(measure(t, o, append(slices.Clone(a), b...)))
	mixed := append(slices.Clone(b), a...)
	slices.SortStableFunc(mixed, func(a, b Event) int { return int(a.At - b.At) })
	if got := print(measure(t, o, mixed)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	late := append(slices.Clone(a), Event{At: logStart + 5e9, Device: "d", Code: 4, Param: 2})
	r := measure(t, o, append(late, b...))
	if got := print(r); got != want || r.Late != 1 || r.FirstLate != late[4] || r.Events != 10 {
		t.Errorf("got %d late, the first %+v, of %d events\n%s", r.Late, r.FirstLate, r.Events, got)
	}
}

func TestMeterOptions(t *testing.T) {
	for _, c := range []struct {
		o    MeterOptions
		want string
	}{
		{MeterOptions{Bin: 1500 * time.Millisecond}, "bin 1.5s: must be whole seconds"},
		{MeterOptions{Bin: 25 * time.Hour}, "bin 25h0m0s"},
		{MeterOptions{From: 2, To: 2}, "from must be before to"},
		{MeterOptions{GreenOccupancy: 1.1}, "green occupancy 1.1: must be more than 0"},
		{MeterOptions{RedOccupancy: -0.1}, "red occupancy -0.1"},
		{MeterOptions{RedTime: time.Hour}, "red time 1h0m0s"},
		{MeterOptions{LostOff: -1}, "lost off"},
		{MeterOptions{SevereRed: -1}, "severe red"},
		{MeterOptions{Measures: []Measure{"delay"}}, `no measure "delay"; there are terminations aog`},
		{MeterOptions{Measures: []Measure{MeasurePCD, MeasurePCD}}, "measure pcd is named twice"},
		{MeterOptions{Measures: []Measure{MeasureAOG}}, "measure aog needs a detector with function Advance in the detector configuration"},
		{MeterOptions{Measures: []Measure{MeasureTurns}, Detectors: detectorConfig(t, advance)}, "measure turns needs a detector with a movement"},
	} {
		if _, err := NewMeter(c.o); err == nil || !strings.Contains(err.Error(), c.want) || kind.Of(firstError(err)) != kind.Invalid {
			t.Errorf("%+v: got %v, want an error of kind invalid with %q", c.o, err, c.want)
		}
	}
	r := measure(t, MeterOptions{Detectors: detectorConfig(t, advance)}, []Event{{At: logStart, Device: "x", Code: 1, Param: 2}})
	if got := strings.Join(r.Notes, "\n"); !strings.Contains(got, "split-failures: needs a detector with function Presence") ||
		!strings.Contains(got, "aog: nothing for device x, which lacks a detector with function Advance") {
		t.Errorf("the notes do not say what is missing:\n%s", got)
	}
	for _, m := range Measures() {
		if m.Text() == "" || slices.Contains(r.Measures, m) == slices.Contains(r.Skipped, m) {
			t.Errorf("%s: text %q, measured %v, skipped %v", m, m.Text(), r.Measures, r.Skipped)
		}
	}
}

// firstError takes a joined error apart.
func firstError(err error) error {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		return j.Unwrap()[0]
	}
	return err
}

func TestTables(t *testing.T) {
	r := &Measured{Measures: []Measure{MeasureAOG, MeasurePreempts, MeasureSplitCycles, MeasureTurns},
		AOG:         []AOGRow{{Stamp(logStart + 100e6), `a,"b`, 2, 3, Share(float32(1) / 3), 1}},
		Preempts:    []PreemptRow{{Time: Stamp(logStart), Device: "d", Preempt: 1, Delay: Unknown, Dwell: -1500e6, Total: 61e9}},
		SplitCycles: []SplitCycleRow{{Termination: GapOut, Failure: true, RedOccupancy: 1}},
	}
	var out bytes.Buffer
	for _, table := range r.Tables() {
		if err := table.WriteCSV(&out, StampRFC3339); err != nil {
			t.Fatal(err)
		}
	}
	want := `time,device,phase,actuations,green_share,on_green
2024-05-13T15:00:00.1Z,"a,""b",2,3,0.33333334,1
call_on,device,preempt,calls,served,delay_s,gate_down_s,time_to_service_s,track_clear_s,dwell_s,input_s,max_presence_s,total_s
2024-05-13T15:00:00Z,d,1,0,false,,0,0,0,-1.5,0,0,61
green_start,device,phase,green_s,green_occupancy,red_occupancy,termination,failure
1970-01-01T00:00:00Z,,0,0,0,1,GapOut,true
time,device,phase,movement,detectors,actuations
`
	if got := out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, f := range StampFormats() {
		out.Reset()
		if err := WriteJSON(&out, r.Tables(), f); err != nil {
			t.Fatal(err)
		}
		var got map[string][]map[string]any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%v in\n%s", err, out.String())
		}
		at := map[StampFormat]any{StampRFC3339: "2024-05-13T15:00:00.1Z", StampMillis: 1715612400100.0, StampMicros: 1715612400100000.0, StampNanos: 1715612400100000000.0}[f]
		a, p := got["aog"][0], got["preempts"][0]
		if a["time"] != at || a["device"] != `a,"b` || a["green_share"] != 0.33333334 || p["delay_s"] != nil || p["dwell_s"] != -1.5 || len(got["turns"]) != 0 || len(got) != 4 {
			t.Errorf("%s: got %v", f, got)
		}
	}
	// Every type of row prints, with a column for each field.
	r = &Measured{Measures: Measures(), Terminations: make([]TerminationRow, 1), AOG: make([]AOGRow, 1), SplitFailures: make([]SplitRow, 1), SplitCycles: make([]SplitCycleRow, 1),
		YellowRed: make([]YellowRedRow, 1), PedDelay: make([]PedDelayRow, 1), Preempts: make([]PreemptRow, 1), Priority: make([]PriorityRow, 1), PCD: make([]PCDRow, 1),
		PCDArrivals: make([]PCDArrivalRow, 1), Volumes: make([]VolumeRow, 1), PhaseVolumes: make([]PhaseVolumeRow, 1), Turns: make([]TurnRow, 1)}
	for _, table := range r.Tables() {
		if table.Rows != 1 || slices.Contains(table.Columns, "") || table.WriteCSV(&out, StampMicros) != nil {
			t.Errorf("%s: got %d rows, columns %q", table.Measure, table.Rows, table.Columns)
		}
	}
}

func TestDetectorConfig(t *testing.T) {
	c := detectorConfig(t, "\ufeffparameter, phase ,Device Id,FUNCTION,movement,offset s\n10,2,d,Stop Bar Count,lt,-1.5\n\n9,2,d,Advance,,\n")
	want := []Detector{{Device: "d", Phase: 2, Channel: 9, Function: "Advance", function: "advance"},
		{Device: "d", Phase: 2, Channel: 10, Function: "Stop Bar Count", Offset: -1500 * time.Millisecond, Movement: "LT", function: "stopbarcount"}}
	if got := c.Detectors("d"); !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if c.Detectors("e") != nil || (*DetectorConfig)(nil).Detectors("d") != nil {
		t.Error("got detectors of a device that has none")
	}
	const head = "DeviceId,Phase,Parameter,Function,Offset_s,Movement\n"
	for _, c := range []struct{ text, want string }{
		{"", "is empty"},
		{head, "a header and no detector"},
		{"DeviceId,Phase,Function\n", "line 1: column Parameter is missing"},
		{"DeviceId,Phase,Parameter,Function,Colour\n", `line 1: no column is called "Colour"`},
		{"DeviceId,Phase,Parameter,Function,phase\n", "line 1: column Phase comes twice"},
		{head + "d,2,10,Advance\n", "line 2: 4 fields, want 6"},
		{head + ",2,10,Advance,,\n", `line 2: DeviceId: "" must name a device`},
		{head + "d,0,10,Advance,,\n", `line 2: Phase: "0" is not a number from 1 to 255`},
		{head + "d,2,ten,Advance,,\n", `line 2: Parameter: "ten" is not a number from 1 to 65535`},
		{head + "d,2,10,--,,\n", `line 2: Function: "--" is not a name`},
		{head + "d,2,10,Advance,61,\n", `line 2: Offset_s: "61" is not a number of seconds from -60 to 60`},
		{head + "d,2,10,Advance,1m1,\n", `line 2: Offset_s: "1m1" is not`},
		{head + "d,2,10,Advance,,X\n", `line 2: Movement: "X" is not made of L, T, R and U`},
		{head + "d,2,10,Advance,,TT\n", `line 2: Movement: "TT" is not`},
		{head + "d,2,10,Advance,,\n\nd,2,10,advance,,\n", "line 4: Function: advance of device d, phase 2, channel 10 is in line 2 already"},
		{head + "d,2,x,Advance,,\nd,x,10,Advance,,\n", "line 3: Phase"},
		{head + "d,2,\"10,Advance,,\n", "line 2"},
		{head + "d,2,1\"0,Advance,,\nd,2,x,A,,\n", "line 3: Parameter"},
		{head + strings.Repeat("d,2,x,Advance,,\n", 30), "line 21: Parameter"},
	} {
		_, err := ParseDetectorConfig(strings.NewReader(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) || kind.Of(firstError(err)) != kind.Invalid {
			t.Errorf("%q: got %v, want an error of kind invalid with %q", c.text, err, c.want)
		}
	}
}

func FuzzDetectorConfig(f *testing.F) {
	f.Add("DeviceId,Phase,Parameter,Function\n1136,8,25,Presence\n1136,6,20,stop bar count\n")
	f.Add(odotDetectors)
	f.Add("DeviceId,Phase,Parameter,Function,Offset_s,Movement\nd,2,10,A,-1.5,LT\nd,2,\"10")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseDetectorConfig(strings.NewReader(text))
		if (c == nil) == (err == nil) {
			t.Fatalf("got %v and %v", c, err)
		}
		if c == nil {
			return
		}
		for id, l := range c.devices {
			for _, d := range l {
				if id == "" || d.Phase < 1 || d.Phase > 255 || d.Channel < 1 || d.function == "" || d.Offset.Abs() > time.Minute {
					t.Errorf("got %+v", d)
				}
			}
		}
	})
}

// Whatever the events are, nothing breaks, and what counts adds up.
func FuzzMeter(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x05\x52\x0a\x05\x51\x0a\x05\x08\x02\x04\x0a\x02\x30\x01\x02"))
	f.Add([]byte("\x01\x66\x01\x01\x69\x01\x01\x6b\x01\x01\x68\x01\x01\x6f\x01\x01\x70\x01\x01\x73\x01"))
	conf := detectorConfig(f, "DeviceId,Phase,Parameter,Function,Offset_s\nd,2,10,Presence,-0.3\nd,2,10,Advance,2\nd,2,10,Yellow_Red,0\nd,2,11,Presence,1\n")
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := NewMeter(MeterOptions{Detectors: conf, Bin: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		at, ons := logStart, map[[2]int64]bool{}
		for ; len(b) >= 3; b = b[3:] {
			at += int64(b[0]) * 100e6
			m.Add(Event{At: at, Device: "d", Code: uint16(b[1]), Param: uint16(b[2])})
			if b[1] == DetectorOn {
				ons[[2]int64{at, int64(b[2])}] = true
			}
		}
		r := m.Finish()
		n := 0
		for _, v := range r.Volumes {
			n += v.Actuations
		}
		if n != len(ons) {
			t.Errorf("got %d actuations, want %d", n, len(ons))
		}
		for _, c := range r.SplitCycles {
			if !(c.Green > 0 && c.GreenOccupancy >= 0 && c.GreenOccupancy <= 1 && c.RedOccupancy >= 0 && c.RedOccupancy <= 1) {
				t.Errorf("got %+v", c)
			}
		}
		for _, p := range r.PCD {
			if p.Green < 0 || p.Green >= p.Yellow || p.Yellow > p.Cycle || p.OnGreen > p.Arrivals {
				t.Errorf("got %+v", p)
			}
		}
		for _, p := range r.Preempts {
			for _, s := range []Seconds{p.Delay, p.GateDown, p.TimeToService, p.TrackClear, p.Dwell, p.Input, p.MaxPresence, p.Total} {
				if s < 0 && s != Unknown {
					t.Errorf("got %+v", p)
				}
			}
		}
	})
}
