package health

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/hires"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// event is one of channel 1 of controller A, ms after the epoch.
func event(ms int64, code uint16) hires.Event {
	return hires.Event{At: epoch.Add(time.Duration(ms) * time.Millisecond).UnixNano(), Device: "A", Code: code, Param: 1}
}

// alive adds an event of a signal each minute, so that the log goes on.
func alive(from, to int64) (out []hires.Event) {
	for ms := from; ms < to; ms += 60_000 {
		out = append(out, event(ms, 1))
	}
	return out
}

// pulses has the detector come on n times, evenly, from one moment to another.
func pulses(n int, from, to int64) (out []hires.Event) {
	for i := range int64(n) {
		at := from
		if n > 1 {
			at += (to - from) * i / int64(n-1)
		}
		out = append(out, event(at, eventOn), event(at+10, eventOff))
	}
	return out
}

func judge(lane LaneType, events ...[]hires.Event) (said []string, sums []Summary) {
	l := NewLog(func(Channel) LaneType { return lane })
	note := func(fs []Finding) {
		for _, f := range fs {
			word := "ok"
			if f.Failed {
				word = "failed"
			}
			said = append(said, fmt.Sprintf("%s/%d %s %s @%v", f.Device, f.Number, f.Rule, word, f.At.Sub(epoch)))
		}
	}
	for _, e := range slices.Concat(events...) {
		note(l.Event(e))
	}
	end, sums := l.End()
	note(end)
	return said, sums
}

func TestLog(t *testing.T) {
	const h, min = 3_600_000, 60_000
	for _, tc := range []struct {
		name   string
		lane   LaneType
		events [][]hires.Event
		want   string
	}{
		{"37 in 30 s", Queue, [][]hires.Event{pulses(37, 0, 30_000)}, ""},
		{"38 in 30 s", Queue, [][]hires.Event{pulses(38, 0, 30_000)}, "A/1 chatter failed @30s"},
		{"38 in 30.1 s", Queue, [][]hires.Event{pulses(38, 0, 30_100)}, ""},
		{"locked on, just not", Queue, [][]hires.Event{{event(0, eventOn)}, alive(1, 30*min-1), {event(30*min-1, eventOff)}}, ""},
		{"locked on", Queue, [][]hires.Event{{event(0, eventOn)}, alive(1, 30*min), {event(30*min, eventOff)}}, "A/1 locked-on failed @30m0s"},
		{"locked on, mainline", Mainline, [][]hires.Event{{event(0, eventOn), event(2*min, eventOff)}}, "A/1 locked-on failed @2m0s"},
		{"locked on and never off", Mainline, [][]hires.Event{{event(0, eventOn)}, alive(1, 10*min)}, "A/1 locked-on failed @9m0.001s"},
		{"on since before the log", Mainline, [][]hires.Event{{event(0, 1), event(2*min, eventOff)}}, "A/1 locked-on failed @2m0s"},
		{"silent, just not", Mainline, [][]hires.Event{pulses(1, 0, 0), alive(min, 4*h), {event(4*h-1, 1)}}, ""},
		{"silent", Mainline, [][]hires.Event{pulses(1, 0, 0), alive(min, 4*h), {event(4*h, eventOn)}}, "A/1 no-hits failed @4h0m0s"},
		{"silent, the log too", Mainline, [][]hires.Event{pulses(1, 0, 0), alive(min, 2*h), alive(10*h, 12*h), {event(12*h, eventOn)}}, ""},
		{"no rules", "", [][]hires.Event{pulses(1000, 0, 30_000), alive(31_000, 100*h)}, ""},
		{"never heard of", Mainline, [][]hires.Event{alive(0, 100*h)}, ""},
	} {
		if got, _ := judge(tc.lane, tc.events...); strings.Join(got, ", ") != tc.want {
			t.Errorf("%s: got %v, want %s", tc.name, got, tc.want)
		}
	}
	_, sums := judge(Queue, pulses(40, 0, 29_000), alive(60_000, 200_000))
	want := Summary{Channel: Channel{"A", 1}, Counts: 40, Most: 40, Observed: 180 * time.Second, Occupied: 400 * time.Millisecond,
		Longest: 10 * time.Millisecond, Silence: 151 * time.Second, Broken: []Rule{Chatter}}
	if len(sums) != 1 || !reflect.DeepEqual(sums[0], want) {
		t.Errorf("got %+v, want %+v", sums, want)
	}
}

// TestLogDevices: how the events of several controllers are mixed does not matter.
func TestLogDevices(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var each [3][]hires.Event
	for d := range each {
		at := int64(0)
		for range 3000 {
			at += r.Int64N(int64(100 * (d + 1)))
			e := event(at, []uint16{eventOn, eventOff, 1}[r.IntN(3)])
			e.Device, e.Param = traffic.DeviceID([]string{"A", "B", "C"}[d]), uint16(r.IntN(3))
			each[d] = append(each[d], e)
		}
	}
	lane := func(c Channel) LaneType { return Mainline }
	byDevice := func(fs []Finding) map[traffic.DeviceID][]Finding {
		out := map[traffic.DeviceID][]Finding{}
		for _, f := range fs {
			out[f.Device] = append(out[f.Device], f)
		}
		return out
	}
	run := func(next func() (hires.Event, bool)) (map[traffic.DeviceID][]Finding, []Summary) {
		l := NewLog(lane)
		var all []Finding
		for e, ok := next(); ok; e, ok = next() {
			all = append(all, l.Event(e)...)
		}
		end, sums := l.End()
		return byDevice(append(all, end...)), sums
	}
	flat := slices.Concat(each[0], each[1], each[2])
	want, wantSums := run(func() (e hires.Event, ok bool) {
		if ok = len(flat) > 0; ok {
			e, flat = flat[0], flat[1:]
		}
		return
	})
	mixed := each
	got, gotSums := run(func() (e hires.Event, ok bool) {
		for range 100 {
			if d := r.IntN(3); len(mixed[d]) > 0 {
				e, mixed[d] = mixed[d][0], mixed[d][1:]
				return e, true
			}
		}
		for d := range mixed {
			if len(mixed[d]) > 0 {
				e, mixed[d] = mixed[d][0], mixed[d][1:]
				return e, true
			}
		}
		return
	})
	if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(gotSums, wantSums) || len(want) == 0 {
		t.Errorf("got %v, want %v, and something", got, want)
	}
}

// oregon calls f with each event of the three Oregon signals.
func oregon(t testing.TB, f func(hires.Event)) {
	t.Helper()
	const name = "data/hires-odot/odot_hires_test_data.csv.gz"
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared")
	}
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil && os.Getenv("STOPLINE_REQUIRE_SHARED") == "" {
		t.Skipf("needs %s in the shared data (STOPLINE_SHARED, or ../shared beside the repository): %v", name, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }() // only read
	z, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(z)
	lines.Scan()
	for lines.Scan() {
		p := strings.Split(lines.Text(), ",")
		if len(p) != 4 {
			t.Fatalf("line %q: got %d fields, want 4", lines.Text(), len(p))
		}
		var n [4]int64
		for _, i := range []int{0, 2, 3} {
			if n[i], err = strconv.ParseInt(p[i], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		f(hires.Event{At: n[0], Device: traffic.DeviceID(p[1]), Code: uint16(n[2]), Param: uint16(n[3])})
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}

// TestOregon finds what there is in three hours of three real signals, by each
// lane type's times. Run with -v for the table.
func TestOregon(t *testing.T) {
	faults := map[Channel]map[uint16]int{}
	var first, last int64
	byType := map[LaneType]*Log{Queue: NewLog(nil), Mainline: NewLog(func(Channel) LaneType { return Mainline })}
	said := map[LaneType][]Finding{}
	n := 0
	oregon(t, func(e hires.Event) {
		n++
		if first == 0 {
			first = e.At
		}
		last = e.At
		for k, l := range byType {
			said[k] = append(said[k], l.Event(e)...)
		}
		if e.Code >= 83 && e.Code <= 88 {
			c := Channel{e.Device, e.Param}
			if faults[c] == nil {
				faults[c] = map[uint16]int{}
			}
			faults[c][e.Code]++
		}
	})
	if n != 246_413 {
		t.Fatalf("got %d events, want 246413", n)
	}
	span := time.Duration(last - first)
	if _, silent, _ := Mainline.Times(); span >= silent {
		t.Errorf("the log is %v long, want too short for no-hits", span)
	}
	var sums []Summary
	got := map[LaneType]string{}
	for _, k := range []LaneType{Queue, Mainline} {
		end, s := byType[k].End()
		var words []string
		for _, f := range append(said[k], end...) {
			if f.Rule == NoHits {
				t.Errorf("%s: no-hits of %+v within %v: the log cannot say so", k, f.Channel, span)
			}
			words = append(words, fmt.Sprintf("%s/%d %s since %v: %s", f.Device, f.Number, f.Rule, f.Since.Format(time.TimeOnly), f.Reason))
		}
		var broken []string
		for _, x := range s {
			for _, r := range x.Broken {
				broken = append(broken, fmt.Sprintf("%s/%d:%s", x.Device, x.Number, r))
			}
		}
		got[k] = strings.Join(broken, " ")
		t.Logf("by the times of %s: %d of %d channels break a rule: %s\n%s", k, len(broken), len(s), got[k], strings.Join(words, "\n"))
		sums = s
	}
	// Two channels of one signal were on for an hour. By a freeway's two minutes
	// many more would be: whoever waits for a green stands that long.
	if want := "227/1:locked-on 227/2:locked-on"; got[Queue] != want {
		t.Errorf("by the times of a stop line: got %s, want %s", got[Queue], want)
	}
	if broken := strings.Fields(got[Mainline]); len(broken) != 30 {
		t.Errorf("by the times of a freeway: got %d channels, want 30", len(broken))
	}
	t.Logf("%-8s %7s %6s %9s %9s %9s %9s  %s", "channel", "counts", "most/30s", "occupied%", "longest", "silence", "observed", "controller's own fault events")
	for _, s := range sums {
		if len(s.Broken) > 0 || s.Silence > time.Hour || s.Counts == 0 || s.Most > 30 || len(faults[s.Channel]) > 0 {
			t.Logf("%s/%-4d %7d %6d %9.1f %9v %9v %9v  %v %v", s.Device, s.Number, s.Counts, s.Most, 100*s.Occupied.Seconds()/max(s.Observed.Seconds(), 1),
				s.Longest.Round(time.Second), s.Silence.Round(time.Second), s.Observed.Round(time.Second), s.Broken, faults[s.Channel])
		}
	}
}
