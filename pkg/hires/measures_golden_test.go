package hires

import (
	"bytes"
	"encoding/csv"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// odotDetectors is the configuration behind Oregon's golden arrivals on green.
// Theirs is not published as text: these are the only sets of channels whose
// actuations add up to every golden total, all twelve bins of all eight phases.
// The other functions are for trying the other measures on real events; nobody
// says that these channels have them.
const odotDetectors = `DeviceId,Phase,Parameter,Function,Offset_s,Movement
227,2,3,Advance,,
227,2,4,Advance,0,
227,4,8,Advance,,T
227,4,9,Advance,,TR
227,6,17,Advance,,
227,6,18,Advance,,
227,8,22,Advance,,
227,8,23,Advance,,
452,2,2,Advance,,
452,2,3,Advance,,
452,6,16,Advance,,
452,6,17,Advance,,
454,2,50,Advance,,
454,6,52,Advance,,
454,2,2,Presence,,
454,2,3,Presence,,
454,6,16,Presence,,
454,6,17,Yellow_Red,-1.5,
452,6,16,Presence,,
`

func detectorConfig(t testing.TB, text string) *DetectorConfig {
	t.Helper()
	c, err := ParseDetectorConfig(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// measureFile reads a file of the shared data into a meter.
func measureFile(t testing.TB, name string, o MeterOptions) *Measured {
	t.Helper()
	f := shared(t, name)
	m, err := NewMeter(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Read(f, Options{}, func(e Event) error { m.Add(e); return nil }); err != nil {
		t.Fatal(err)
	}
	r := m.Finish()
	if r.Late != 0 {
		t.Fatalf("got %d late events, the first %+v, want none", r.Late, r.FirstLate)
	}
	return r
}

func csvLines(t *testing.T, r *Measured, m Measure, f StampFormat, columns int) []string {
	t.Helper()
	i := slices.IndexFunc(r.Tables(), func(t Table) bool { return t.Measure == m })
	if i < 0 {
		t.Fatalf("no table %s", m)
	}
	var b bytes.Buffer
	if err := r.Tables()[i].WriteCSV(&b, f); err != nil {
		t.Fatal(err)
	}
	all, err := csv.NewReader(&b).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, rec := range all[1:] {
		lines = append(lines, strings.Join(rec[:columns], ","))
	}
	return lines
}

// Letter by letter: every line of the golden file, and no other.
func TestGolden(t *testing.T) {
	const log = "hires-odot/odot_hires_test_data.csv.gz"
	for _, c := range []struct {
		measure Measure
		golden  string
		columns int
		rows    int
	}{
		{MeasureTerminations, "hires-odot/odot_expected_terminations.csv", 5, 334},
		{MeasureAOG, "hires-odot/odot_expected_arrival_on_green.csv", 5, 96},
	} {
		t.Run(string(c.measure), func(t *testing.T) {
			b, err := io.ReadAll(shared(t, c.golden))
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Split(strings.ReplaceAll(strings.TrimSpace(string(b)), "\r", ""), "\n")[1:]
			if len(want) != c.rows {
				t.Fatalf("got %d golden rows, want %d", len(want), c.rows)
			}
			slices.Sort(want)
			r := measureFile(t, log, MeterOptions{Detectors: detectorConfig(t, odotDetectors), Measures: []Measure{c.measure}})
			got := csvLines(t, r, c.measure, StampMicros, c.columns)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				for _, l := range want {
					if !slices.Contains(got, l) {
						t.Errorf("golden, and not got: %s", l)
					}
				}
				for _, l := range got {
					if !slices.Contains(want, l) {
						t.Errorf("got, and not golden: %s", l)
					}
				}
			}
			if r.Events != 246413 {
				t.Errorf("got %d events, want 246413", r.Events)
			}
		})
	}
}

// The comparison is one that can fail: another detector, or an offset.
func TestGoldenCanFail(t *testing.T) {
	for _, c := range []struct{ name, from, to string }{
		{"another channel", "454,2,50,", "454,2,51,"},
		{"an offset of a second", "227,2,4,Advance,0,", "227,2,4,Advance,-1,"},
	} {
		golden, err := io.ReadAll(shared(t, "hires-odot/odot_expected_arrival_on_green.csv"))
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(odotDetectors, c.from, c.to, 1)
		r := measureFile(t, "hires-odot/odot_hires_test_data.csv.gz", MeterOptions{Detectors: detectorConfig(t, text), Measures: []Measure{MeasureAOG}})
		wrong := 0
		for _, l := range csvLines(t, r, MeasureAOG, StampMicros, 5) {
			if !bytes.Contains(golden, []byte(l+"\n")) && !bytes.HasSuffix(golden, []byte(l)) {
				wrong++
			}
		}
		if wrong < 6 {
			t.Errorf("%s: got %d wrong rows, want at least 6", c.name, wrong)
		}
	}
}

// Utah's sample of pre-emptions with an exit: 15 of input 1 at signal 7573. The
// figures of the first, third and last are taken from the file by hand; in all of
// them entry follows the call after 6.0 s, dwell the entry after 5.0 s, and the
// exit the end of the call after 6.2 s.
func TestPreemptDetails(t *testing.T) {
	r := measureFile(t, "hires-udot/PreemptDetaildata.csv", MeterOptions{Measures: []Measure{MeasurePreempts}})
	got := csvLines(t, r, MeasurePreempts, StampRFC3339, 13)
	if len(got) != 15 {
		t.Fatalf("got %d pre-emptions, want 15: %s", len(got), strings.Join(got, "\n"))
	}
	for i, want := range map[int]string{
		0:  "2023-04-17T12:02:14.5Z,7573,1,1,true,6,,5,,42,46.8,,53",
		2:  "2023-04-17T12:16:57.2Z,7573,1,1,true,6,,5,,41.9,46.7,,52.9",
		14: "2023-04-17T13:53:24.1Z,7573,1,1,true,6,,5,,53.7,58.5,,64.7",
	} {
		if got[i] != want {
			t.Errorf("pre-emption %d:\ngot  %s\nwant %s", i, got[i], want)
		}
	}
	for i, p := range r.Preempts {
		if p.Delay != 6e9 || p.TimeToService != 5e9 || p.Total-p.Input != 6.2e9 || p.TrackClear != Unknown {
			t.Errorf("pre-emption %d: got %+v", i, p)
		}
	}
}

// Utah's signal 7706 logs no exit: 25 pre-emptions of four events each, of which
// the
// input ends before dwell in 5.
func TestPreemptsWithoutExit(t *testing.T) {
	r := measureFile(t, "hires-udot/7706PreemptData.csv", MeterOptions{Measures: []Measure{MeasurePreempts}})
	got := csvLines(t, r, MeasurePreempts, StampRFC3339, 13)
	if len(got) != 25 {
		t.Fatalf("got %d pre-emptions, want 25: %s", len(got), strings.Join(got, "\n"))
	}
	for i, want := range map[int]string{
		0:  "2021-09-17T18:27:37.1Z,7706,4,1,true,0,,22.5,,,18.5,,", // off before dwell
		1:  "2022-06-05T18:59:34.7Z,7706,3,1,true,0,,6.2,,,35,,",    // dwell before off
		23: "2022-06-17T10:33:34.4Z,7706,4,1,true,0,,27.3,,,27.3,,", // at once, 39 s after the one before
		24: "2022-06-17T11:03:59Z,7706,5,1,true,0,,22.5,,,47.8,,",   // the last, ended by the log
	} {
		if got[i] != want {
			t.Errorf("pre-emption %d:\ngot  %s\nwant %s", i, got[i], want)
		}
	}
	early := 0
	for _, p := range r.Preempts {
		if p.Input < p.Delay+p.TimeToService {
			early++
		}
	}
	if early != 5 {
		t.Errorf("got %d inputs that end before dwell, want 5", early)
	}
}

// Utah's priority sample, by hand: an extension; an early green with an extension
// after it.
func TestPriorityDetails(t *testing.T) {
	r := measureFile(t, "hires-udot/7706PriorityData.csv", MeterOptions{Measures: []Measure{MeasurePriority}})
	got := csvLines(t, r, MeasurePriority, StampRFC3339, 7)
	for i, want := range []string{
		"2021-09-17T08:40:23.6Z,7706,4,,0.1,1,23.2",
		"2021-09-17T10:38:46.7Z,7706,4,,0.1,1,23.8",
		"2021-09-17T10:59:33.8Z,7706,3,0.1,27.4,2,47.4",
	} {
		if got[i] != want {
			t.Errorf("request %d:\ngot  %s\nwant %s", i, got[i], want)
		}
	}
	checkIns, rows := 0, len(got)
	if _, err := Read(shared(t, "hires-udot/7706PriorityData.csv"), Options{}, func(e Event) error {
		if e.Code == PriorityCheckIn {
			checkIns++
		}
		return nil
	}); err != nil || rows != checkIns {
		t.Errorf("got %d requests, want one for each of %d check-ins; %v", rows, checkIns, err)
	}
}

// Utah's sample of cycles of phase 2 has 1, 8 and 9 and no 10 and 11. By hand: red
// from 8:01:48.8, green at 8:03:11.7, yellow at 8:04:13.7, red at 8:04:18.8.
func TestCoordinationDiagram(t *testing.T) {
	r := measureFile(t, "hires-udot/CycleEvents.csv", MeterOptions{Measures: []Measure{MeasurePCD}})
	got := csvLines(t, r, MeasurePCD, StampRFC3339, 8)
	if len(got) != 23 || got[0] != "2023-04-17T08:01:48.8Z,7115,2,82.9,144.9,150,0,0" {
		t.Errorf("got %d cycles, want 23; the first\ngot  %s\nwant 2023-04-17T08:01:48.8Z,7115,2,82.9,144.9,150,0,0", len(got), got[0])
	}
}

// Oregon's own configuration, of another signal.
func TestSampleDetectorConfig(t *testing.T) {
	c, err := ParseDetectorConfig(shared(t, "hires-odot/odot_sample_config.csv"))
	if err != nil || len(c.Detectors("1136")) != 16 {
		t.Fatalf("got %d detectors, want 16; %v", len(c.Detectors("1136")), err)
	}
	r := measureFile(t, "hires-odot/odot_sample_raw_data.csv.gz", MeterOptions{Detectors: c, Measures: []Measure{MeasureSplitFailures}})
	for _, s := range r.SplitFailures {
		if s.Cycles == 0 || s.Failures > s.Cycles || !slices.Contains([]uint16{2, 5, 6, 8}, s.Phase) {
			t.Errorf("got %+v, want cycles of the phases with Presence detectors only", s)
		}
	}
	if len(r.SplitFailures) == 0 {
		t.Error("got no cycles")
	}
}

// What the real log must satisfy whatever its figures are.
func TestMeasuresAgree(t *testing.T) {
	r := measureFile(t, "hires-odot/odot_hires_test_data.csv.gz", MeterOptions{Detectors: detectorConfig(t, odotDetectors)})
	if len(r.Skipped) != 0 {
		t.Errorf("got %v skipped, want none", r.Skipped)
	}
	volumes := 0
	for _, v := range r.Volumes {
		volumes += v.Actuations
	}
	if volumes != 36620+22458+44285 { // lines with code 82, counted with awk; none of them twice
		t.Errorf("got %d actuations, want 103363", volumes)
	}
	var aog, dots, cycles int
	for _, a := range r.AOG {
		aog += a.Actuations
	}
	for _, p := range r.PCD {
		cycles += p.Arrivals
		if !(0 <= p.Green && p.Green < p.Yellow && p.Yellow < p.Cycle) {
			t.Errorf("cycle out of order: %+v", p)
		}
	}
	dots = len(r.PCDArrivals)
	if dots != cycles || dots > aog || dots < aog*95/100 {
		t.Errorf("got %d dots, %d arrivals in cycles, %d arrivals; want the first two equal, and most of the third", dots, cycles, aog)
	}
	if len(r.SplitFailures) == 0 || len(r.YellowRed) == 0 || len(r.PedDelay) == 0 || len(r.Preempts) == 0 {
		t.Errorf("an empty table: %d %d %d %d", len(r.SplitFailures), len(r.YellowRed), len(r.PedDelay), len(r.Preempts))
	}
	for _, table := range r.Tables() {
		t.Logf("%s: %d rows", table.Measure, table.Rows)
	}
}

// Reports events per second, and the most memory in use at any time, of reading
// and all measures together.
func BenchmarkMeasures(b *testing.B) {
	conf := detectorConfig(b, odotDetectors)
	raw, err := io.ReadAll(shared(b, "hires-odot/odot_hires_test_data.csv.gz"))
	if err != nil {
		b.Fatal(err)
	}
	events, peak := 0, uint64(0)
	var ms runtime.MemStats
	b.ReportAllocs()
	start := time.Now()
	for b.Loop() {
		m, err := NewMeter(MeterOptions{Detectors: conf})
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		if _, err := Read(bytes.NewReader(raw), Options{}, func(e Event) error {
			m.Add(e)
			if n++; n%50000 == 0 {
				runtime.ReadMemStats(&ms)
				peak = max(peak, ms.HeapAlloc)
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		events += n
		for _, t := range m.Finish().Tables() {
			if err := t.WriteCSV(io.Discard, StampRFC3339); err != nil {
				b.Fatal(err)
			}
		}
		runtime.ReadMemStats(&ms)
		peak = max(peak, ms.HeapAlloc)
	}
	b.ReportMetric(float64(events)/time.Since(start).Seconds(), "events/s")
	b.ReportMetric(float64(peak)/1e6, "peak-heap-MB")
}
