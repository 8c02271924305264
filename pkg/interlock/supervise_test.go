package interlock_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// TestSuperviseTellsLawfulFromNot watches controllers that drive their lamps
// themselves. A lawful one is never tripped, however its lamps and the looks at
// them are out of step; wrong ones are, in time; glitches are not.
func TestSuperviseTellsLawfulFromNot(t *testing.T) {
	rounds := 200
	if testing.Short() {
		rounds = 8
	}
	wrongs := map[string]func(j *traffic.Junction, s traffic.State) traffic.State{
		"conflict": func(j *traffic.Junction, s traffic.State) traffic.State {
			for a := range j.Groups {
				if s.At(a).Go() && len(j.Conflicts[a]) > 0 {
					b := []byte(s)
					b[j.Conflicts[a][0]] = 'G'
					return traffic.State(b)
				}
			}
			return ""
		},
		"one dark": func(_ *traffic.Junction, s traffic.State) traffic.State { return "O" + s[1:] },
		"one flashing": func(_ *traffic.Junction, s traffic.State) traffic.State {
			return s[:len(s)-1] + "x"
		},
		"a lamp too few": func(_ *traffic.Junction, s traffic.State) traffic.State { return s[1:] },
		"from green to red": func(j *traffic.Junction, s traffic.State) traffic.State {
			for a, g := range j.Groups {
				if s.At(a).Go() && g.Kind != traffic.Pedestrians {
					return s[:a] + "r" + s[a+1:]
				}
			}
			return ""
		},
	}
	for name, wrong := range wrongs {
		t.Run(name, func(t *testing.T) {
			tried := 0
			for n := range uint64(rounds) {
				rng := rand.New(rand.NewPCG(n, 17))
				all := shapes()
				j := all[int(n)%len(all)]
				m, err := interlock.New(j, epoch)
				if err != nil {
					t.Fatal(err)
				}
				look := []time.Duration{50 * ms, 100 * ms}[rng.IntN(2)]
				seq := timing.NewSequencer(j, timing.Rules{}, epoch)
				var lamps traffic.State
				at := epoch
				see := func(d time.Duration, change func(traffic.State) traffic.State) *interlock.Trip {
					for end := at.Add(d); at.Before(end); {
						// The controller steps every 10 ms, whenever that is looked at.
						for next := at.Add(look); at.Before(next); at = at.Add(10 * ms) {
							if rng.IntN(400) == 0 {
								_ = seq.Target(rng.IntN(len(j.Stages)))
							}
							lamps = seq.Next(at)
						}
						if trip := m.Supervise(at, change(lamps)); trip != nil {
							return trip
						}
					}
					return nil
				}
				honest := func(s traffic.State) traffic.State { return s }
				for i := range 6 {
					if trip := see(time.Duration(10+rng.IntN(40))*time.Second, honest); trip != nil {
						t.Fatalf("round %d, part %d: a lawful controller trips: %v", n, i, trip)
					}
					if wrong(j, lamps) == "" {
						continue
					}
					// A glitch that is seen for less than 200 ms.
					bad := wrong(j, lamps)
					if trip := see(150*ms, func(traffic.State) traffic.State { return bad }); trip != nil {
						t.Fatalf("round %d, part %d: %q for 150 ms trips: %v", n, i, bad, trip)
					}
				}
				refused := func() (n uint64) {
					for _, v := range m.Counts().Refused {
						n += v
					}
					return n
				}
				for range 100 {
					before := refused()
					// What was seen last must not be one that is still in doubt.
					if see(2*time.Second, honest); refused() == before && wrong(j, lamps) != "" {
						break
					}
				}
				bad := wrong(j, lamps)
				if bad == "" {
					continue
				}
				tried++
				began := at
				if trip := see(450*ms, func(traffic.State) traffic.State { return bad }); trip == nil {
					t.Fatalf("round %d: got no trip, want one within 450 ms of %q", n, bad)
				} else if at.Sub(began) < 200*ms {
					t.Fatalf("round %d: tripped after %v, want no less than 200 ms: %v", n, at.Sub(began), trip)
				}
			}
			if tried < rounds/3 {
				t.Errorf("tried %d times, want at least %d", tried, rounds/3)
			}
		})
	}
}
