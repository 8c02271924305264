package interlock_test

import (
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/interlock/internal/oracle"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the random tests, 0 for the usual ones")

var epoch = time.Date(2026, 11, 22, 6, 0, 0, 0, time.UTC)

var stepLengths = []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second}

func seeds(t *testing.T, usual int) []uint64 {
	if *seedFlag != 0 {
		return []uint64{*seedFlag}
	}
	out := make([]uint64, usual)
	for i := range out {
		out[i] = uint64(i + 1)
	}
	t.Logf("seeds 1 to %d; -seed N runs one", usual)
	return out
}

// TestLawfulStatesPass: whatever stages are ordered, and when, the monitor
// shows what the sequencer wants, to the letter.
func TestLawfulStatesPass(t *testing.T) {
	steps := 20_000
	if testing.Short() {
		steps = 10_000 // a tenth of that each, 10 s at steps of 10 ms
	}
	rules := []timing.Rules{{}}
	for _, name := range []string{"free", "resco", "deployable", "field"} {
		r, err := timing.RulesNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	for _, seed := range seeds(t, 1) {
		for _, filed := range shapes() {
			for _, r := range rules {
				for _, apply := range []bool{false, true} {
					j := filed
					if apply {
						j = r.Apply(filed)
					}
					for _, step := range stepLengths {
						rng := rand.New(rand.NewPCG(seed, 11))
						m, err := interlock.New(j, epoch)
						if err != nil {
							t.Fatal(err)
						}
						judge := oracle.NewStreet(j)
						seq := timing.NewSequencer(j, r, epoch)
						greens := 0
						var truth, shift time.Duration
						for i := range steps / 10 {
							truth += step
							if i%20 == 19 && rng.IntN(5) == 0 {
								shift += time.Duration(rng.IntN(7)-3) * time.Hour / 2
							}
							now := epoch.Add(truth + shift)
							if rng.IntN(1+int(3*time.Second/step)) == 0 {
								k := rng.IntN(len(j.Stages))
								if err := m.Accept(k); err != nil {
									t.Fatal(err)
								}
								if err := seq.Target(k); err != nil {
									t.Fatal(err)
								}
							}
							want := seq.Next(now)
							show, trip := m.Filter(now, want)
							if show != want || trip != nil {
								t.Fatalf("%s %q step %v seed %d, step %d: got %q (%v, %v), want %q", j.ID, r.Name, step, seed, i, show, trip, m.Counts().Refused, want)
							}
							if what := judge.See(truth.Milliseconds(), string(show), false); what != "" {
								t.Fatalf("%s %q step %v seed %d, step %d: %s", j.ID, r.Name, step, seed, i, what)
							}
							if seq.Signal(now).Stage >= 0 {
								greens++
							}
						}
						if greens == 0 {
							t.Errorf("%s %q step %v: no stage was ever reached", j.ID, r.Name, step)
						}
					}
				}
			}
		}
	}
}

func FuzzFilter(f *testing.F) {
	f.Add([]byte("Gr rG yr rr rG"), uint8(0), uint16(100))
	f.Add([]byte("GrrGrGccyyxxOO"), uint8(2), uint16(1000))
	f.Add([]byte("GgGgrrryGyGrrr"), uint8(3), uint16(10))
	all := shapes()
	f.Fuzz(func(t *testing.T, wants []byte, which uint8, ms uint16) {
		j := all[int(which)%len(all)]
		m, err := interlock.New(j, epoch)
		if err != nil {
			t.Fatal(err)
		}
		judge := oracle.NewStreet(j)
		step := time.Duration(1+int(ms)%1000) * time.Millisecond
		truth, n := time.Duration(0), len(j.Groups)
		for len(wants) > n {
			// The byte before a state says for how many steps it is wanted.
			again := 1 + int(wants[0])%64
			want := traffic.State(wants[1 : n+1])
			wants = wants[n+1:]
			for range again {
				truth += step
				show, _ := m.Filter(epoch.Add(truth), want)
				if what := judge.See(truth.Milliseconds(), string(show), m.Tripped() != nil || want == traffic.AllOf(traffic.FlashRed, n)); what != "" {
					t.Fatal(what)
				}
			}
		}
	})
}
