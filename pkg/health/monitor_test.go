package health

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func TestLaneOf(t *testing.T) {
	j := crossing()
	want := map[string]LaneType{"n.stop": Queue, "n.adv": Exit, "n.area": Queue, "e.stop": Queue, "e.adv": Exit, "b.area": Omnibus,
		"s.exit": Merge, "w.exit": Merge, "far.loop": Mainline, "button": PushButton, "oracle": ""}
	for _, d := range j.Detectors {
		if got := LaneOf(j, d); got != want[string(d.ID)] {
			t.Errorf("%s: got %q, want %q", d.ID, got, want[string(d.ID)])
		}
	}
}

// TestTimes holds the figures of IRIS's table, which two of ours are not in.
func TestTimes(t *testing.T) {
	want := "mainline 2m0s 4h0m0s, exit 30m0s 8h0m0s, merge 30m0s 12h0m0s, queue 30m0s 12h0m0s, omnibus 30m0s 72h0m0s, push-button 30m0s 72h0m0s"
	var got []string
	for _, l := range LaneTypes() {
		locked, silent, ok := l.Times()
		if !ok {
			t.Errorf("%s: got no rules", l)
		}
		got = append(got, fmt.Sprintf("%s %v %v", l, locked, silent))
	}
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("got %s, want %s", s, want)
	}
	if _, _, ok := LaneType("").Times(); ok {
		t.Error("got rules for no lane type")
	}
}

// TestChatter: 37 counts within 30 s are traffic, 38 are not; what lies further
// apart is not added up.
func TestChatter(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(f *feeder)
		want string
	}{
		{"37 in 30 s", func(f *feeder) {
			f.run(29*time.Second, time.Second, only("n.stop", passes(1)))
			f.run(time.Second, time.Second, only("n.stop", passes(8)))
			f.run(time.Hour, time.Second, only("n.stop", passes(0)))
		}, ""},
		{"38 in 30 s", func(f *feeder) {
			f.run(29*time.Second, time.Second, only("n.stop", passes(1)))
			f.run(time.Second, time.Second, only("n.stop", passes(9)))
		}, "chatter failed @30s"},
		{"38 in 31 s", func(f *feeder) {
			f.run(30*time.Second, time.Second, only("n.stop", passes(1)))
			f.run(time.Second, time.Second, only("n.stop", passes(8)))
		}, ""},
		{"74 a minute, evenly", func(f *feeder) { f.run(10*time.Minute, 30*time.Second, only("n.stop", passes(37))) }, ""},
		{"74 in one interval of a minute", func(f *feeder) { f.run(time.Hour, time.Minute, only("n.stop", passes(74))) }, ""},
		{"75 in one interval of a minute", func(f *feeder) { f.run(time.Minute, time.Minute, only("n.stop", passes(75))) }, "chatter failed @1m0s"},
		{"clears after a day", func(f *feeder) {
			f.run(time.Second, time.Second, only("n.stop", passes(38)))
			f.run(24*time.Hour-time.Second, time.Second, only("n.stop", passes(1)))
			if f.of("n.stop") != "chatter failed @1s" {
				f.t.Errorf("before the day is over: got %q", f.of("n.stop"))
			}
			f.run(time.Minute, time.Second, only("n.stop", passes(1)))
		}, "chatter failed @1s, chatter ok @24h0m30s"},
		{"a gap is no good time", func(f *feeder) {
			f.run(time.Second, time.Second, only("n.stop", passes(38)))
			f.now = f.now.Add(23 * time.Hour)
			f.run(2*time.Hour, time.Second, only("n.stop", passes(1)))
		}, "chatter failed @1s"},
		{"a button may", func(f *feeder) { f.run(time.Minute, time.Second, only("button", passes(20))) }, ""},
		{"an oracle may", func(f *feeder) { f.run(time.Minute, time.Second, only("oracle", passes(100))) }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := feed(t)
			tc.say(f)
			var got []string
			for _, s := range f.said {
				got = append(got, strings.SplitN(s, " ", 2)[1])
			}
			if s := strings.Join(got, ", "); s != tc.want {
				t.Errorf("got %q, want %q", s, tc.want)
			}
		})
	}
}

// TestLockedOn: each lane type just below and just at its time, what breaks an
// occupation and what does not.
func TestLockedOn(t *testing.T) {
	limit := map[string]time.Duration{"n.stop": 30 * time.Minute, "n.adv": 30 * time.Minute, "far.loop": 2 * time.Minute,
		"b.area": 30 * time.Minute, "s.exit": 30 * time.Minute, "button": 30 * time.Minute}
	for id, d := range limit {
		say := stands
		if id == "button" {
			say = passes(1)
		}
		f := feed(t)
		f.run(d-time.Second, time.Second, only(id, say))
		if f.of(id) != "" {
			t.Errorf("%s: a second below: got %q, want nothing", id, f.of(id))
		}
		f.run(time.Second, time.Second, only(id, say))
		if want := fmt.Sprintf("locked-on failed @%v", d); f.of(id) != want {
			t.Errorf("%s: got %q, want %q", id, f.of(id), want)
		}
		if r, failed := f.m.Failed(traffic.DetectorID(id)); !failed || r != LockedOn || f.m.Failing() != 1 {
			t.Errorf("%s: got %q, %v, %d failing", id, r, failed, f.m.Failing())
		}
	}
	for _, tc := range []struct {
		name string
		id   string
		say  func(f *feeder)
		want string
	}{
		{"999 permille is a break", "far.loop", func(f *feeder) {
			f.run(119*time.Second, time.Second, only("far.loop", stands))
			f.run(time.Second, time.Second, only("far.loop", func(r *traffic.Reading) { r.OccupancyPermille = 999 }))
			f.run(119*time.Second, time.Second, only("far.loop", stands))
		}, ""},
		{"a short gap is neither break nor evidence", "far.loop", func(f *feeder) {
			f.run(60*time.Second, time.Second, only("far.loop", stands))
			f.now = f.now.Add(60 * time.Second)
			f.run(59*time.Second, time.Second, only("far.loop", stands))
			f.run(time.Second, time.Second, only("far.loop", stands))
		}, "locked-on failed @3m0s"},
		{"a long gap ends it", "far.loop", func(f *feeder) {
			f.run(60*time.Second, time.Second, only("far.loop", stands))
			f.now = f.now.Add(61 * time.Second)
			f.run(119*time.Second, time.Second, only("far.loop", stands))
		}, ""},
		{"an area that counts is not", "n.area", func(f *feeder) {
			for range 100 {
				f.run(29*time.Minute, time.Minute, only("n.area", stands))
				f.run(time.Minute, time.Minute, only("n.area", func(r *traffic.Reading) { stands(r); r.Count = 1 }))
			}
		}, ""},
		{"an oracle may", "oracle", func(f *feeder) { f.run(100*time.Hour, 15*time.Minute, only("oracle", stands)) }, ""},
		{"clears after a day with counts", "far.loop", func(f *feeder) {
			f.run(3*time.Minute, time.Second, only("far.loop", stands))
			f.run(25*time.Hour, time.Minute, only("far.loop", passes(1)))
		}, "locked-on failed @2m0s, locked-on ok @24h3m0s"},
		{"dead is not good", "far.loop", func(f *feeder) {
			f.run(3*time.Minute, time.Second, only("far.loop", stands))
			f.run(25*time.Hour, time.Minute, only("far.loop", nil))
			f.run(time.Minute, time.Minute, only("far.loop", passes(1)))
		}, "locked-on failed @2m0s, no-hits failed @4h0m0s, no-hits ok @25h4m0s, locked-on ok @25h4m0s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := feed(t)
			tc.say(f)
			if got := f.of(tc.id); tc.name != "dead is not good" && got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			} else if tc.name == "dead is not good" && !reflect.DeepEqual(sorted(got), sorted(tc.want)) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func sorted(s string) map[string]bool {
	out := map[string]bool{}
	for _, p := range strings.Split(s, ", ") {
		out[p] = true
	}
	return out
}

// TestNoHits: each lane type just below and at its time; gaps are no evidence.
func TestNoHits(t *testing.T) {
	limit := map[string]time.Duration{"n.stop": 12 * time.Hour, "n.adv": 8 * time.Hour, "n.area": 12 * time.Hour, "far.loop": 4 * time.Hour,
		"b.area": 72 * time.Hour, "s.exit": 12 * time.Hour, "button": 72 * time.Hour}
	for id, d := range limit {
		f := feed(t)
		f.run(d-time.Minute, time.Minute, only(id, nil))
		if f.of(id) != "" {
			t.Errorf("%s: a minute below: got %q, want nothing", id, f.of(id))
		}
		f.run(time.Minute, time.Minute, only(id, nil))
		if want := fmt.Sprintf("no-hits failed @%v", d); f.of(id) != want {
			t.Errorf("%s: got %q, want %q", id, f.of(id), want)
		}
		f.run(time.Second, time.Second, only(id, passes(1)))
		f.run(28*time.Second, time.Second, only(id, nil))
		if _, failed := f.m.Failed(traffic.DetectorID(id)); !failed {
			t.Errorf("%s: 29 s after it counted again: got good, want failed", id)
		}
		f.run(time.Second, time.Second, only(id, nil))
		if _, failed := f.m.Failed(traffic.DetectorID(id)); failed {
			t.Errorf("%s: 30 s after it counted again: got failed, want good", id)
		}
	}
	gaps := func(name string, want bool, say func(f *feeder)) {
		f := feed(t)
		say(f)
		if _, failed := f.m.Failed("far.loop"); failed != want {
			t.Errorf("%s: got failed %v, want %v: %v", name, failed, want, f.said)
		}
	}
	gaps("one hit", false, func(f *feeder) {
		f.run(4*time.Hour-time.Minute, time.Minute, only("far.loop", nil))
		f.run(time.Minute, time.Minute, only("far.loop", passes(1)))
		f.run(4*time.Hour-time.Minute, time.Minute, only("far.loop", nil))
	})
	gaps("missing frames", false, func(f *feeder) {
		f.run(2*time.Hour, time.Minute, only("far.loop", nil))
		f.now = f.now.Add(100 * time.Hour)
		f.run(2*time.Hour-time.Minute, time.Minute, only("far.loop", nil))
	})
	gaps("frames without the detector", false, func(f *feeder) {
		f.run(2*time.Hour, time.Minute, only("far.loop", nil))
		f.run(100*time.Hour, time.Minute, only("n.stop", passes(1)))
		f.run(2*time.Hour-time.Minute, time.Minute, only("far.loop", nil))
	})
	gaps("a reboot", false, func(f *feeder) {
		f.run(4*time.Hour-time.Minute, time.Minute, only("far.loop", nil))
		f.now = f.now.Add(time.Hour)
		f.seq = 0
	})
	gaps("late frames", true, func(f *feeder) { // the silence is as long when it is told at once
		var kept []*traffic.Frame
		for range 240 {
			f.now = f.now.Add(time.Minute)
			kept = append(kept, f.frame(time.Minute, only("far.loop", nil)))
		}
		for _, fr := range kept {
			f.note(f.m.Observe(fr))
		}
	})
	gaps("told twice", false, func(f *feeder) {
		for range 239 {
			f.now = f.now.Add(time.Minute)
			fr := f.frame(time.Minute, only("far.loop", nil))
			f.note(f.m.Observe(fr))
			f.note(f.m.Observe(fr))
		}
	})
	gaps("two devices on one detector", false, func(f *feeder) {
		for range 239 * 2 {
			f.now = f.now.Add(30 * time.Second)
			f.note(f.m.Observe(f.frame(time.Minute, only("far.loop", nil))))
		}
	})
	gaps("event frames", false, func(f *feeder) {
		for range 10_000 {
			f.now = f.now.Add(time.Minute)
			f.note(f.m.Observe(f.frame(0, only("far.loop", nil))))
		}
	})
}

// TestFrames: whatever detectors a device speaks for, and in whatever order,
// nothing changes for the others; nor does it matter whose frames come first.
func TestFrames(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	a, b := feed(t), feed(t)
	for range 4 * 3600 {
		a.now = a.now.Add(time.Second)
		b.now = a.now
		what := map[string]says{}
		for _, d := range a.j.Detectors {
			what[string(d.ID)] = []says{nil, passes(1), passes(2), stands}[r.IntN(4)]
		}
		what["n.stop"], what["far.loop"] = passes(3), stands
		whole := a.frame(time.Second, what)
		one, two := *whole, *whole
		r.Shuffle(len(whole.Readings), func(i, k int) { whole.Readings[i], whole.Readings[k] = whole.Readings[k], whole.Readings[i] })
		n := r.IntN(len(one.Readings))
		one.Readings, two.Readings = append([]traffic.Reading(nil), whole.Readings[:n]...), append([]traffic.Reading(nil), whole.Readings[n:]...)
		if r.IntN(2) == 0 {
			one, two = two, one
		}
		a.note(a.m.Observe(whole))
		b.note(b.m.Observe(&one))
		b.note(b.m.Observe(&two))
	}
	// Neighbours are compared at the first frame after the window's end, which one
	// or both devices' counts are in: a difference of one interval.
	rules := func(said []string) map[string]bool {
		out := map[string]bool{}
		for _, s := range said {
			if !strings.Contains(s, "imbalance") && !strings.Contains(s, "implausible") {
				out[s] = true
			}
		}
		return out
	}
	if got, want := rules(b.said), rules(a.said); !reflect.DeepEqual(got, want) || len(want) < 2 {
		t.Errorf("got %v by two devices, want %v as by one, and more than one", got, want)
	}
}

// TestIntervals: the same street in intervals of 5 s instead of 1 s. What is
// found by the longer ones is found by the shorter ones, at most two of the
// longer earlier; and what lasts long enough by both.
func TestIntervals(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fine, coarse := feed(t), feed(t)
		// Runs of one behaviour each, long enough for the two minutes of the loop.
		var each []traffic.Reading
		for range rapid.IntRange(1, 12).Draw(rt, "runs") {
			n := rapid.IntRange(1, 200).Draw(rt, "seconds")
			k := rapid.SampledFrom([]string{"stands", "empty", "flow", "burst"}).Draw(rt, "what")
			for i := range n {
				r := traffic.Reading{Detector: "far.loop"}
				switch k {
				case "stands":
					stands(&r)
				case "flow":
					passes(uint32(i / 2 % 2))(&r)
				case "burst":
					passes(uint32(1 + i%2))(&r)
				}
				each = append(each, r)
			}
		}
		for len(each)%5 != 0 {
			each = append(each, traffic.Reading{Detector: "far.loop"})
		}
		first := func(f *feeder, rule Rule) (time.Duration, bool) {
			for _, c := range f.all {
				if c.Rule == rule && c.Failed {
					return c.At.Sub(epoch), true
				}
			}
			return 0, false
		}
		tell := func(f *feeder, interval time.Duration, r traffic.Reading) {
			f.now = f.now.Add(interval)
			f.note(f.m.Observe(f.frame(interval, only("far.loop", func(to *traffic.Reading) { *to = r }))))
		}
		for _, r := range each {
			tell(fine, time.Second, r)
		}
		for i := 0; i < len(each); i += 5 {
			sum := traffic.Reading{Detector: "far.loop"}
			for _, r := range each[i : i+5] {
				sum.Count += r.Count
				sum.OccupancyPermille += r.OccupancyPermille
			}
			sum.OccupancyPermille /= 5
			tell(coarse, 5*time.Second, sum)
		}
		for _, rule := range []Rule{Chatter, LockedOn} {
			af, inFine := first(fine, rule)
			ac, inCoarse := first(coarse, rule)
			if inCoarse && !inFine {
				rt.Fatalf("%s: found at %v in 5 s, not at all in 1 s", rule, ac)
			}
			if rule == LockedOn && inCoarse && (ac < af || ac >= af+10*time.Second) {
				rt.Fatalf("%s: found at %v in 5 s, at %v in 1 s", rule, ac, af)
			}
			if rule == Chatter && inCoarse && ac < af {
				rt.Fatalf("%s: found at %v in 5 s, before %v in 1 s", rule, ac, af)
			}
			if !inFine {
				continue
			}
			// Had it gone on for two intervals more, both would have found it.
			longer := each[:min(int(af/time.Second), len(each))]
			still := len(each) >= len(longer)+10
			for _, r := range each[len(longer):min(len(longer)+10, len(each))] {
				still = still && r.OccupancyPermille == 1000
			}
			if rule == LockedOn && still && !inCoarse {
				rt.Fatalf("%s: found at %v in 1 s and went on, not found in 5 s", rule, af)
			}
		}
	})
}

// TestRestore: memory that was stored and restored at any moment goes on as if
// nothing had happened; its form is canonical.
func TestRestore(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		a := feed(t)
		b := &feeder{t: t, m: NewMonitor(a.j), j: a.j, now: a.now}
		n := rapid.IntRange(200, 2500).Draw(rt, "frames")
		at := rapid.IntRange(0, n).Draw(rt, "restored at")
		interval := rapid.SampledFrom([]time.Duration{time.Second, 20 * time.Second, time.Minute}).Draw(rt, "interval")
		for i := range n {
			what := map[string]says{}
			for k, d := range a.j.Detectors {
				if r.IntN(300) == 0 {
					continue
				}
				what[string(d.ID)] = []says{passes(1), passes(2), stands, nil}[(i/(100*(k+1))+r.IntN(2))%4]
			}
			what["e.stop"] = nil
			a.now = a.now.Add(interval)
			fr := a.frame(interval, what)
			a.note(a.m.Observe(fr))
			b.note(b.m.Observe(fr))
			if i == at {
				raw, err := b.m.MarshalBinary()
				if err != nil {
					rt.Fatal(err)
				}
				if b.m, err = Restore(crossing(), raw); err != nil {
					rt.Fatal(err)
				}
			}
		}
		if !reflect.DeepEqual(a.said, b.said) {
			rt.Fatalf("got %v after a restart, want %v", b.said, a.said)
		}
		x, _ := a.m.MarshalBinary()
		y, _ := b.m.MarshalBinary()
		if !bytes.Equal(x, y) {
			rt.Fatal("the memory after a restart has other bytes")
		}
	})
}

func TestRestoreRefuses(t *testing.T) {
	f := feed(t)
	f.run(3*time.Minute, time.Second, lively(f.j))
	good, err := f.m.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	for n := range good {
		if _, err := Restore(f.j, good[:n]); err == nil {
			t.Fatalf("%d of %d bytes: got accepted", n, len(good))
		}
	}
	if _, err := Restore(f.j, append(bytes.Clone(good), 0)); err == nil {
		t.Error("a byte too many: got accepted")
	}
	other := crossing()
	other.Detectors[0].LengthCM++
	if _, err := Restore(other, good); !errors.Is(err, ErrDefinition) {
		t.Errorf("another definition: got %v, want ErrDefinition", err)
	}
	old := bytes.Clone(good)
	old[0] = 9
	if _, err := Restore(f.j, old); err == nil || !strings.Contains(err.Error(), "version 9") {
		t.Errorf("another version: got %v", err)
	}
}

func FuzzRestore(f *testing.F) {
	m := NewMonitor(crossing())
	good, err := m.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Restore(crossing(), b)
		if err != nil {
			return
		}
		if _, err := m.MarshalBinary(); err != nil {
			t.Fatal(err)
		}
		// Whatever was believed, it must bear the next frame.
		fr := &traffic.Frame{Time: epoch, Interval: time.Hour, Readings: []traffic.Reading{{Detector: "n.stop", Count: 1}}}
		m.Observe(fr)
	})
}

// TestRedefine: what is the same goes on, what is not begins anew and takes its
// word back.
func TestRedefine(t *testing.T) {
	f := feed(t)
	f.run(5*time.Minute, time.Second, map[string]says{"far.loop": stands, "n.stop": passes(3), "e.stop": passes(3)})
	same := crossing()
	if got := f.m.Redefine(same, f.now); got != nil {
		t.Errorf("the same definition: got %v", got)
	}
	if _, failed := f.m.Failed("far.loop"); !failed {
		t.Fatal("the loop was not locked on")
	}
	j := crossing()
	j.Detectors[3].LengthCM++ // e.stop
	j.Detectors = append(j.Detectors[1:], traffic.Detector{ID: "new", Kind: traffic.StopLine, Lane: "n", Movements: []int{0}, Group: -1})
	got := f.m.Redefine(j, f.now)
	if len(got) != 1 || got[0].Detector != "e.stop" || got[0].Failed || got[0].Rule != Chatter || !got[0].At.Equal(f.now) {
		t.Errorf("got %+v, want the word on e.stop taken back", got)
	}
	if r, failed := f.m.Failed("far.loop"); !failed || r != LockedOn || f.m.Failing() != 1 {
		t.Errorf("far.loop: got %q %v, want its verdict kept", r, failed)
	}
	if _, failed := f.m.Failed("n.stop"); failed {
		t.Error("a detector that is gone: got failed")
	}
}

func BenchmarkObserve(b *testing.B) {
	f := feed(b)
	what := lively(f.j)
	fr := f.frame(time.Second, what)
	b.ReportAllocs()
	for b.Loop() {
		fr.Time = fr.Time.Add(time.Second)
		f.m.Observe(fr)
	}
}
