package health

import (
	"math/big"
	"math/rand/v2"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// streets has vehicles pass the crossing: each from its lane's far detector to
// the exit. sees says which share of them, in thousandths, a detector counts.
type streets struct {
	*feeder
	r     *rand.Rand
	perKs map[string]int // vehicles in 1000 s, by lane
	sees  map[string]int
	on    []vehicle
}

type vehicle struct {
	lane, exit string
	left       int // seconds to the exit
}

func drive(t testing.TB, perKs map[string]int, sees map[string]int) *streets {
	return &streets{feeder: feed(t), r: rand.New(rand.NewPCG(7, 7)), perKs: perKs, sees: sees}
}

func (s *streets) second() {
	s.now = s.now.Add(time.Second)
	counts := map[string]uint32{}
	pass := func(id string) {
		share, ok := s.sees[id]
		if !ok {
			share = 1000
		}
		for ; share > 0; share -= 1000 {
			if s.r.IntN(1000) < share {
				counts[id]++
			}
		}
	}
	for _, lane := range []string{"n", "e", "b"} {
		if s.r.IntN(1000) < s.perKs[lane] {
			exit := "s"
			if lane == "e" && s.r.IntN(2) == 0 {
				exit = "w"
			}
			s.on = append(s.on, vehicle{lane, exit, 40 + s.r.IntN(40)})
			pass(lane + ".area")
		}
	}
	kept := s.on[:0]
	for _, v := range s.on {
		switch v.left--; v.left {
		case 30:
			pass(v.lane + ".adv")
		case 5:
			pass(v.lane + ".stop")
		case 0:
			pass(v.exit + ".exit")
			continue
		}
		kept = append(kept, v)
	}
	s.on = kept
	what := map[string]says{}
	for _, d := range s.j.Detectors {
		n := counts[string(d.ID)]
		if d.ID == "far.loop" || d.Kind == traffic.Button && s.seq%7000 == 0 {
			n = 1 // not of this story
		}
		what[string(d.ID)] = func(r *traffic.Reading) { r.Count = n; r.Vehicles = n; r.OccupancyPermille = min(300*n, 900) }
	}
	s.note(s.m.Observe(s.frame(time.Second, what)))
}

func (s *streets) drive(d time.Duration) {
	for range int(d / time.Second) {
		s.second()
	}
}

// names lists who breaks a rule now.
func (s *streets) names(r int) string {
	var out []string
	for i, d := range s.j.Detectors {
		if s.m.tracks[i].verdicts[r].failed {
			out = append(out, string(d.ID))
		}
	}
	sort.Strings(out)
	return strings.Join(out, " ")
}

func TestNeighbours(t *testing.T) {
	busy := map[string]int{"n": 300, "e": 300, "b": 5}
	for _, tc := range []struct {
		name            string
		perKs           map[string]int
		sees            map[string]int
		after           time.Duration
		blamed, suspect string
	}{
		{"all well", busy, nil, 24 * time.Hour, "", ""},
		{"hardly anybody", map[string]int{"n": 3, "e": 2, "b": 1}, nil, 24 * time.Hour, "", ""},
		{"ordinary miscounts", busy, map[string]int{"n.stop": 950, "n.adv": 1030, "e.stop": 940, "s.exit": 960}, 24 * time.Hour, "", ""},
		{"one of three dead", busy, map[string]int{"n.stop": 0}, 17 * time.Minute, "n.stop", ""},
		{"the middle of three dead", busy, map[string]int{"n.adv": 0}, 17 * time.Minute, "n.adv", ""},
		{"misses more than half", busy, map[string]int{"n.area": 400}, 17 * time.Minute, "n.area", ""},
		{"counts everybody twice", busy, map[string]int{"n.stop": 2000}, 17 * time.Minute, "n.stop", ""},
		{"quiet street, one of three dead", map[string]int{"n": 20, "e": 100}, map[string]int{"n.stop": 0}, 2 * time.Hour, "n.stop", ""},
		{"misses a tenth", busy, map[string]int{"n.stop": 900}, 24 * time.Hour, "", ""},
		{"an exit is dead", map[string]int{"n": 300, "e": 300}, map[string]int{"s.exit": 0}, 17 * time.Minute, "", "b.area e.stop n.stop s.exit w.exit"},
		{"two of three dead", busy, map[string]int{"n.stop": 0, "n.adv": 0}, 17 * time.Minute, "", "n.adv n.area n.stop"},
		// Which of the two it is nobody can tell: the junction is counted too
		// roughly to clear one of them.
		{"one of two dead", busy, map[string]int{"e.adv": 0}, 17 * time.Minute, "", "e.adv e.stop"},
		// All of the traffic is on this lane: here the junction's count tells.
		{"one of two dead, no others", map[string]int{"e": 700}, map[string]int{"e.adv": 0}, 17 * time.Minute, "e.adv", ""},
		{"the other one dead, no others", map[string]int{"e": 700}, map[string]int{"e.stop": 0}, 17 * time.Minute, "e.stop", ""},
		{"two lanes, one each", map[string]int{"n": 300, "e": 600}, map[string]int{"n.adv": 0, "e.adv": 0}, 17 * time.Minute, "e.adv n.adv", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if testing.Short() && tc.after > 3*time.Hour {
				tc.after = 3 * time.Hour
			}
			s := drive(t, tc.perKs, tc.sees)
			s.drive(tc.after)
			if got := s.names(implausible); got != tc.blamed {
				t.Errorf("implausible: got %q, want %q; %v", got, tc.blamed, s.all)
			}
			if got := s.names(imbalance); got != tc.suspect {
				t.Errorf("imbalance: got %q, want %q; %v", got, tc.suspect, s.all)
			}
			if tc.blamed == "" && s.m.Failing() != 0 {
				t.Errorf("got %d failing, want none", s.m.Failing())
			}
		})
	}
}

// TestNeighboursAgree: once repaired, two windows that agree end it, not one; and
// a gap in all that is told does not begin it.
func TestNeighboursAgree(t *testing.T) {
	s := drive(t, map[string]int{"n": 300, "e": 300}, map[string]int{"n.stop": 0})
	s.drive(16 * time.Minute)
	if r, failed := s.m.Failed("n.stop"); !failed || r != Implausible {
		t.Fatalf("got %q %v, want implausible", r, failed)
	}
	last := s.all[len(s.all)-1]
	if !strings.Contains(last.Reason, "counted in, 0 out") {
		t.Errorf("got reason %q", last.Reason)
	}
	delete(s.sees, "n.stop")
	s.drive(15 * time.Minute)
	if _, failed := s.m.Failed("n.stop"); !failed {
		t.Error("after one window that agrees: got good, want failed")
	}
	s.drive(15 * time.Minute)
	if _, failed := s.m.Failed("n.stop"); failed {
		t.Error("after two windows that agree: got failed, want good")
	}
	for range 12 {
		s.drive(5 * time.Minute)
		s.now = s.now.Add(10 * time.Minute)
	}
	if got := s.names(implausible) + s.names(imbalance); got != "" {
		t.Errorf("gaps: got %q, want nobody", got)
	}
}

// TestNeighboursRest: a detector that fails by itself accuses nobody.
func TestNeighboursRest(t *testing.T) {
	s := drive(t, map[string]int{"n": 300, "e": 300}, map[string]int{"n.stop": 0})
	s.m.tracks[0].verdicts[noHits], s.m.tracks[0].silent = verdict{failed: true}, 12*hour
	s.drive(2 * time.Hour)
	if got := s.names(implausible) + s.names(imbalance); got != "" {
		t.Errorf("got %q, want nobody", got)
	}
}

// TestOneDeviceSilent: what only one of two devices was there to see is not
// compared.
func TestOneDeviceSilent(t *testing.T) {
	f := feed(t)
	f.run(2*time.Hour, time.Second, map[string]says{"n.area": passes(1)})
	f.run(10*time.Minute, time.Second, map[string]says{"n.area": passes(1), "n.stop": passes(1), "n.adv": passes(1)})
	f.run(10*time.Minute, time.Second, map[string]says{"n.area": passes(1)})
	if len(f.said) > 0 {
		t.Errorf("got %v, want nothing", f.said)
	}
}

// TestTolerance holds the bound against one made with other means, just below
// and just above.
func TestTolerance(t *testing.T) {
	for n := int64(0); n < 3000; n++ {
		want := new(big.Int).Sqrt(big.NewInt(n))
		if new(big.Int).Mul(want, want).Int64() != n {
			want.Add(want, big.NewInt(1))
		}
		if got := ceilSqrt(n); got != want.Int64() {
			t.Fatalf("root of %d: got %d, want %v", n, got, want)
		}
	}
	if got := ceilSqrt(1 << 60); got != 1<<30 {
		t.Errorf("root of 2^60: got %d", got)
	}
	// Along lane e 8 + 2 vehicles fit in between. Of 200 in 81 out are 119 less,
	// and 5·√281 + 200/8 + 10 is 119; with 80 it is 119 too.
	for _, tc := range []struct {
		out  uint32
		want string
	}{{81, ""}, {80, "e.adv e.stop"}} {
		s := drive(t, nil, nil)
		tell := func(in, out uint32) {
			s.now = s.now.Add(time.Minute)
			s.note(s.m.Observe(s.frame(time.Minute, map[string]says{"e.adv": passes(in), "e.stop": passes(out)})))
		}
		for i := range uint32(10) {
			tell(20, (tc.out+i)/10)
		}
		for range 6 {
			tell(0, 0)
		}
		e := &s.m.balance.eqs[s.m.balance.of[4][0]]
		t.Logf("out %d: differ by %d, tolerance %d", tc.out, e.last.diff(), e.last.tol)
		if got := s.names(imbalance); got != tc.want {
			t.Errorf("%d out of 200: got %q, want %q", tc.out, got, tc.want)
		}
	}
}
