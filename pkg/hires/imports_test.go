package hires

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"pgregory.net/rapid"
)

// TestGroupOregon brings in the whole of the Oregon data, and gets all of it back
// from the records alone.
func TestGroupOregon(t *testing.T) {
	in := map[traffic.DeviceID][]Event{}
	out := map[traffic.DeviceID][]Event{}
	var records []*traffic.Import
	sha := [32]byte{1}
	g, err := NewGroup(GroupOptions{District: "oregon", Importer: "importer", Run: 7, Log: "odot", SHA256: sha}, func(m *traffic.Import) error {
		records = append(records, m)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Read(shared(t, "hires-odot/odot_hires_test_data.csv.gz"), Options{}, func(e Event) error {
		in[e.Device] = append(in[e.Device], e)
		return g.Add(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Flush(); err != nil {
		t.Fatal(err)
	}
	for i, m := range records {
		if m.Seq != uint64(i+1) || m.Run != 7 || m.District != "oregon" || m.Importer != "importer" || m.Log != "odot" || m.SHA256 != sha {
			t.Fatalf("record %d: got %s %s run %d seq %d log %q", i, m.District, m.Importer, m.Run, m.Seq, m.Log)
		}
		out[m.Device] = append(out[m.Device], Events(m)...)
	}
	if want := (GroupStats{Events: 246413, Imports: 30623}); g.Stats() != want || len(records) != want.Imports {
		t.Errorf("got %d records, %+v, want %+v", len(records), g.Stats(), want)
	}
	if len(in) != 3 {
		t.Errorf("got %d devices, want 3", len(in))
	}
	for id := range in {
		if !slices.Equal(in[id], out[id]) {
			t.Errorf("device %s: the records give other events, or another order, than the file", id)
		}
	}
}

// group returns what a group makes of events, as text.
func group(t *testing.T, o GroupOptions, feed func(*Group) error) ([]string, GroupStats) {
	t.Helper()
	o.District, o.Importer, o.Run, o.SHA256 = "d", "i", 1, [32]byte{1}
	var got []string
	g, err := NewGroup(o, func(m *traffic.Import) error {
		s := fmt.Sprintf("%d %s %s:", m.Seq, m.Device, m.Time.Format("15:04:05.999999999"))
		for _, e := range m.Events {
			s += fmt.Sprintf(" %d/%d-%d", e.Code, e.Param, e.OffsetMS)
		}
		if m.Interval != time.Second || m.Time.Location() != time.UTC {
			t.Errorf("got interval %s, zone %s, want 1s in UTC", m.Interval, m.Time.Location())
		}
		got = append(got, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := feed(g); err != nil {
		t.Fatal(err)
	}
	if err := g.Flush(); err != nil {
		t.Fatal(err)
	}
	return got, g.Stats()
}

// noon is 2021-08-09 12:00:00 UTC.
const noon = 1628510400 * second

func at(ms int64, device traffic.DeviceID, param uint16) Event {
	return Event{At: noon + ms*milli, Device: device, Code: 82, Param: param}
}

func TestGroup(t *testing.T) {
	for _, tt := range []struct {
		name   string
		o      GroupOptions
		events []Event
		want   string
		stats  GroupStats
	}{
		{"none", GroupOptions{}, nil, "", GroupStats{}},
		{"ends of a second", GroupOptions{}, []Event{at(0, "a", 1), at(1, "a", 2), at(999, "a", 3), at(1000, "a", 4)},
			"1 a 12:00:01: 82/1-1000 82/2-999 82/3-1;2 a 12:00:02: 82/4-1000", GroupStats{Events: 4, Imports: 2}},
		{"two devices", GroupOptions{Seq: 5}, []Event{at(0, "a", 1), at(0, "b", 2), at(100, "a", 3), at(1000, "b", 4), at(1000, "a", 5)},
			"5 b 12:00:01: 82/2-1000;6 a 12:00:01: 82/1-1000 82/3-900;7 a 12:00:02: 82/5-1000;8 b 12:00:02: 82/4-1000", GroupStats{Events: 5, Imports: 4}},
		{"out of order within a second", GroupOptions{}, []Event{at(500, "a", 1), at(400, "a", 2)},
			"1 a 12:00:01: 82/1-500 82/2-600", GroupStats{Events: 2, Imports: 1}},
		{"out of order over a second", GroupOptions{}, []Event{at(900, "a", 1), at(1000, "a", 2), at(950, "a", 3), at(1100, "a", 4)},
			"1 a 12:00:01: 82/1-100;2 a 12:00:02: 82/2-1000;3 a 12:00:01: 82/3-50;4 a 12:00:02: 82/4-900", GroupStats{Events: 4, Imports: 4, Late: 2}},
		{"full", GroupOptions{MaxEvents: 2}, []Event{at(0, "a", 1), at(100, "a", 2), at(200, "a", 3), at(300, "a", 4), at(400, "a", 5)},
			"1 a 12:00:01: 82/1-1000 82/2-900;2 a 12:00:01: 82/3-800 82/4-700;3 a 12:00:01: 82/5-600", GroupStats{Events: 5, Imports: 3, Split: 2}},
		{"just not full", GroupOptions{MaxEvents: 2}, []Event{at(0, "a", 1), at(100, "a", 2), at(1000, "a", 3)},
			"1 a 12:00:01: 82/1-1000 82/2-900;2 a 12:00:02: 82/3-1000", GroupStats{Events: 3, Imports: 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, stats := group(t, tt.o, func(g *Group) error {
				for _, e := range tt.events {
					if err := g.Add(e); err != nil {
						return err
					}
				}
				return nil
			})
			want := strings.Split(tt.want, ";")
			if tt.want == "" {
				want = nil
			}
			if !slices.Equal(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			if stats != tt.stats {
				t.Errorf("got %+v, want %+v", stats, tt.stats)
			}
		})
	}
}

// TestGroupFlushBefore hands out what is over, while another second goes on.
func TestGroupFlushBefore(t *testing.T) {
	var after []int
	got, stats := group(t, GroupOptions{}, func(g *Group) error {
		for _, e := range []Event{at(0, "a", 1), at(100, "b", 2), at(1000, "b", 3)} {
			if err := g.Add(e); err != nil {
				return err
			}
		}
		for _, ms := range []int64{999, 1000, 1999} {
			if err := g.FlushBefore(noon + ms*milli); err != nil {
				return err
			}
			after = append(after, g.Stats().Imports)
		}
		if g.Seq() != 3 {
			t.Errorf("got sequence %d next, want 3", g.Seq())
		}
		return g.Add(at(1100, "b", 4))
	})
	if want := []string{"1 b 12:00:01: 82/2-900", "2 a 12:00:01: 82/1-1000", "3 b 12:00:02: 82/3-1000 82/4-900"}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if want := []int{1, 2, 2}; !slices.Equal(after, want) {
		t.Errorf("got %v records after each flush, want %v", after, want)
	}
	if want := (GroupStats{Events: 4, Imports: 3}); stats != want {
		t.Errorf("got %+v, want %+v", stats, want)
	}
}

// TestGroupBound opens a record on many devices: what is open is handed out
// before it is too much, and nothing is lost.
func TestGroupBound(t *testing.T) {
	const devices, each = 300, 1000
	got, stats := group(t, GroupOptions{}, func(g *Group) error {
		for i := range devices * each {
			if err := g.Add(at(int64(i/devices%1000), traffic.DeviceID(fmt.Sprint(i%devices)), 1)); err != nil {
				return err
			}
			if g.pending > maxOpenEvents {
				return fmt.Errorf("%d events are open", g.pending)
			}
		}
		return nil
	})
	if want := (GroupStats{Events: devices * each, Imports: 2 * devices, Split: devices}); stats != want || len(got) != want.Imports {
		t.Errorf("got %d records, %+v, want %+v", len(got), stats, want)
	}
}

func TestGroupErrors(t *testing.T) {
	good := GroupOptions{District: "d", Importer: "i", Run: 1, SHA256: [32]byte{1}}
	_, err := NewGroup(GroupOptions{Log: strings.Repeat("x", 257), MaxEvents: -1}, nil)
	want := "district: must not be empty\nimporter: must not be empty\nrun: 0, the first is 1\nlog: 257 bytes, at most 256\nsha256: must be that of the whole file\nmax_events: -1, must not be negative"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	g, err := NewGroup(good, func(*traffic.Import) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		e    Event
		want string
	}{
		{"finer than a millisecond", Event{At: noon + 1, Device: "a"}, "at: 1628510400000000001 ns is finer than a millisecond"},
		{"before", Event{At: 0, Device: "a"}, "at: 0 ns is not between 1973-03-03 and 2261-12-31"},
		{"after", Event{At: maxTime, Device: "a"}, "at: 9214646400000000000 ns is not between 1973-03-03 and 2261-12-31"},
		{"no device", Event{At: noon}, "device: must not be empty"},
		{"long device", Event{At: noon, Device: traffic.DeviceID(strings.Repeat("x", 513))}, "device: 513 bytes, at most 512"},
	} {
		if err := g.Add(tt.e); err == nil || err.Error() != tt.want || kind.Of(err) != kind.Invalid {
			t.Errorf("%s: got %v, want %s", tt.name, err, tt.want)
		}
	}
	if g.Stats() != (GroupStats{}) {
		t.Errorf("got %+v after nothing but errors", g.Stats())
	}
	for i := range maxDevices {
		if err := g.Add(at(0, traffic.DeviceID(fmt.Sprint(i)), 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err, want := g.Add(at(0, "x", 1)), `device: "x": more than 65536 devices in one log`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}

	full := errors.New("full")
	n := 0
	if g, err = NewGroup(good, func(*traffic.Import) error { n++; return full }); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(at(0, "a", 1)); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{g.Add(at(1000, "a", 2)), g.Add(at(1000, "b", 2)), g.Flush()} {
		if !errors.Is(err, full) {
			t.Errorf("got %v, want the function's error", err)
		}
	}
	if n != 1 || g.Stats().Imports != 0 {
		t.Errorf("got %d calls, %d records handed out, want 1 and 0", n, g.Stats().Imports)
	}
}

// TestGroupRange holds times at both ends of what is allowed.
func TestGroupRange(t *testing.T) {
	if got := time.Unix(0, maxTime).UTC(); !got.Equal(time.Date(2262, 1, 1, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("the end is %s", got)
	}
	if got := time.Unix(0, minTime).UTC().Format(time.DateOnly); got != "1973-03-03" {
		t.Errorf("the start is %s", got)
	}
	in := []Event{{At: minTime, Device: "a"}, {At: maxTime - milli, Device: "a"}}
	var out []Event
	g, err := NewGroup(GroupOptions{District: "d", Importer: "i", Run: 1, SHA256: [32]byte{1}}, func(m *traffic.Import) error {
		out = append(out, Events(m)...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range in {
		if err := g.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Flush(); err != nil || !slices.Equal(out, in) {
		t.Errorf("got %v, %v, want %v", out, err, in)
	}
}

// TestGroupLaws feeds any events: each device's come back in their order, records
// are numbered without gaps, and keep the bounds of an import.
func TestGroupLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 4).Draw(t, "max events")
		in, out := map[traffic.DeviceID][]Event{}, map[traffic.DeviceID][]Event{}
		seq := uint64(0)
		late := 0
		latest := map[traffic.DeviceID]time.Time{}
		g, err := NewGroup(GroupOptions{District: "d", Importer: "i", Run: 1, SHA256: [32]byte{1}, MaxEvents: limit}, func(m *traffic.Import) error {
			if seq++; m.Seq != seq {
				t.Fatalf("got sequence %d, want %d", m.Seq, seq)
			}
			if len(m.Events) == 0 || len(m.Events) > limit {
				t.Fatalf("got %d events, want 1 to %d", len(m.Events), limit)
			}
			for _, e := range m.Events {
				if e.OffsetMS < 1 || e.OffsetMS > 1000 {
					t.Fatalf("got offset %d, want 1 to 1000", e.OffsetMS)
				}
			}
			if m.Time.Before(latest[m.Device]) {
				late++
			} else {
				latest[m.Device] = m.Time
			}
			out[m.Device] = append(out[m.Device], Events(m)...)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(0, 50).Draw(t, "events") {
			e := at(rapid.Int64Range(0, 3000).Draw(t, "ms"), rapid.SampledFrom([]traffic.DeviceID{"a", "b"}).Draw(t, "device"), rapid.Uint16().Draw(t, "param"))
			in[e.Device] = append(in[e.Device], e)
			if err := g.Add(e); err != nil {
				t.Fatal(err)
			}
		}
		if err := g.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, id := range []traffic.DeviceID{"a", "b"} {
			if !slices.Equal(in[id], out[id]) {
				t.Fatalf("%s: got %v, want %v", id, out[id], in[id])
			}
		}
		if g.Stats().Late < late {
			t.Fatalf("got %d late, saw %d", g.Stats().Late, late)
		}
	})
}

// TestGroupLimits holds the bounds of a group to those of validation.
func TestGroupLimits(t *testing.T) {
	if got, want := defaultMaxEvents, validate.Block().MaxEvents; got > want {
		t.Errorf("a record may have %d events, validation takes %d", got, want)
	}
	if got, want := time.Duration(second), validate.Block().MaxInterval; got > want {
		t.Errorf("a record is of %s, validation takes %s", got, want)
	}
}

func BenchmarkGroup(b *testing.B) {
	var events []Event
	if _, err := Read(shared(b, "hires-odot/odot_hires_test_data.csv.gz"), Options{}, func(e Event) error {
		events = append(events, e)
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		g, err := NewGroup(GroupOptions{District: "d", Importer: "i", Run: 1, SHA256: [32]byte{1}}, func(*traffic.Import) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
		for _, e := range events {
			if err := g.Add(e); err != nil {
				b.Fatal(err)
			}
		}
		if err := g.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*float64(len(events))/b.Elapsed().Seconds(), "events/s")
}
