package interlock_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/interlock"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the random tests, 0 for the usual ones")

var epoch = time.Date(2026, 11, 22, 6, 0, 0, 0, time.UTC)

// story drives one monitor with hostile wants until steps are over, or the
// judge objects. It returns the objection.
//
// Wants come from moods that last a while: an honest sequencer with hostile
// targets, the honest state with some letters wrong, a state that only moves
// one group at a time in ways that look lawful, pure noise, a stage without
// intergreen, flashing, garbage of the wrong length. True time passes evenly, or in
// the step of the story; the clock that the monitor is given jumps now and then.
func story(m *interlock.Monitor, j *traffic.Junction, seed uint64, steps int, step time.Duration, jumps bool) error {
	rng := rand.New(rand.NewPCG(seed, 7))
	judge := newJudge(j)
	n := len(j.Groups)
	seq := timing.NewSequencer(j, timing.Rules{}, epoch)
	var truth, shift time.Duration
	letters := "rrryGGgcuxO"
	mood, left := 0, 0
	var want traffic.State
	shown := traffic.AllOf(traffic.Red, n)
	trippedAt := time.Duration(-1)
	sinceJump := 0
	var refusedSince time.Duration = -1
	calm := step
	for i := range steps {
		truth += step
		sinceJump++
		if jumps && sinceJump > 10 && rng.IntN(40) == 0 {
			sinceJump = 0
			sign := time.Duration(1 - 2*rng.IntN(2))
			shift += sign * []time.Duration{time.Second, time.Hour, 365 * 24 * time.Hour, 300 * time.Millisecond, 5 * time.Second}[rng.IntN(5)]
		}
		now := epoch.Add(truth + shift)
		if left == 0 {
			mood = rng.IntN(10)
			left = 1 + rng.IntN(int(20*time.Second/step))
			if rng.IntN(3) == 0 {
				left = 1 + rng.IntN(4)
			}
			if mood == 6 || mood == 7 {
				left = 1 + rng.IntN(2)
			}
			if err := seq.Target(rng.IntN(len(j.Stages))); err != nil {
				return err
			}
			if mood == 5 {
				want = j.Stages[rng.IntN(len(j.Stages))].State
			}
		}
		left--
		honest := seq.Next(now)
		switch mood {
		default:
			want = honest
			if honest != shown && rng.IntN(20) == 0 {
				seq.Resume(shown, now)
				_ = seq.Target(rng.IntN(len(j.Stages)))
			}
		case 3, 4: // one or two groups at a time
			b := []byte(shown)
			for range 1 + rng.IntN(2) {
				b[rng.IntN(n)] = letters[rng.IntN(len(letters)-2)]
			}
			want = traffic.State(b)
		case 5: // a stage at once, held
		case 6: // noise
			b := make([]byte, n)
			for g := range b {
				b[g] = letters[rng.IntN(len(letters))]
			}
			want = traffic.State(b)
		case 7: // garbage
			want = traffic.State(strings.Repeat("G", rng.IntN(2*n+2)))
			if rng.IntN(2) == 0 {
				want = honest + "G"
			}
		case 8:
			if rng.IntN(4) == 0 {
				want = traffic.AllOf(traffic.FlashRed, n)
				left = min(left, int(time.Second/step))
			} else {
				want = honest
			}
		case 9: // ends greens and yellows early, one step after the other
			b := []byte(shown)
			for g := range b {
				switch b[g] {
				case 'G', 'g':
					b[g] = "yc"[rng.IntN(2)]
				case 'y', 'c':
					b[g] = 'r'
				case 'r':
					b[g] = "rG"[rng.IntN(2)]
				}
			}
			if rng.IntN(3) == 0 {
				want = traffic.State(b)
			} else {
				want = shown
			}
		}
		show, trip := m.Filter(now, want)
		before := shown
		shown = show
		if trip != nil {
			trippedAt = truth
		}
		toFlash := trippedAt >= 0 || len(want) == n && want == traffic.AllOf(traffic.FlashRed, n)
		if what := judge.see(truth, show, toFlash); what != "" {
			return fmt.Errorf("seed %d step %d (%v): wanted %q: %s", seed, i, step, want, what)
		}
		// I9, and the time that it takes to trip.
		if trippedAt >= 0 {
			for g := range n {
				if show.At(g).Go() || show.At(g) == traffic.RedYellow {
					return fmt.Errorf("seed %d step %d: green %v after a trip: %q", seed, i, truth-trippedAt, show)
				}
			}
			if before.At(0) == traffic.FlashRed && show != before {
				return fmt.Errorf("seed %d step %d: left flashing without a reset", seed, i)
			}
			if m.Tripped() == nil {
				return fmt.Errorf("seed %d step %d: forgot its trip", seed, i)
			}
		}
		// What is wanted and cannot be shown for 450 ms must have led to a trip:
		// conflicting greens, and a partly dark junction, can never be lawful.
		if never(j, want) {
			if refusedSince < 0 {
				refusedSince = truth
			}
		} else {
			refusedSince = -1
		}
		if refusedSince >= 0 && truth-refusedSince > max(450*time.Millisecond, step) && sinceJump > 50 && trippedAt < 0 {
			return fmt.Errorf("seed %d step %d: %q for %v and no trip", seed, i, want, truth-refusedSince)
		}
		// Nothing that lasted less than 200 ms trips.
		if want == show && trip == nil {
			calm = truth + step // the first refusal that may follow
		}
		if trip != nil && truth-calm < 200*time.Millisecond {
			return fmt.Errorf("seed %d step %d: tripped after %v: %s", seed, i, truth-calm, trip)
		}
		if trippedAt >= 0 && show.At(0) == traffic.FlashRed && rng.IntN(int(5*time.Second/step)) == 0 {
			if m.Reset(now, " ") == nil {
				return fmt.Errorf("seed %d step %d: reset without a name", seed, i)
			}
			if err := m.Reset(now, "A. Person"); err != nil {
				return fmt.Errorf("seed %d step %d: %w", seed, i, err)
			}
			trippedAt = -1
			refusedSince, calm = -1, truth+step
			seq.Resume(show, now)
			mood, left = 0, int(15*time.Second/step)
			_ = seq.Target(rng.IntN(len(j.Stages)))
		}
	}
	return nil
}

// never reports whether a state can be lawful at no time.
func never(j *traffic.Junction, s traffic.State) bool {
	if len(s) != len(j.Groups) {
		return true
	}
	for a := range j.Groups {
		if s.At(a) == traffic.Dark {
			return true
		}
		for _, b := range j.Conflicts[a] {
			if s.At(a).Go() && s.At(b).Go() {
				return true
			}
		}
	}
	return false
}

var storySteps = []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second}

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

// TestNothingUnsafeIsShown is the claim: a million hostile wants, and the judge
// finds nothing.
func TestNothingUnsafeIsShown(t *testing.T) {
	steps := 32_000 // times 4 shapes, 4 step lengths, 2 seeds
	if testing.Short() {
		steps = 2_000
	}
	total, trips := 0, uint64(0)
	for _, seed := range seeds(t, 2) {
		for _, j := range shapes() {
			for _, step := range storySteps {
				m, err := interlock.New(j, epoch)
				if err != nil {
					t.Fatal(err)
				}
				if err := story(m, j, seed, steps, step, true); err != nil {
					t.Errorf("%s: %v", j.ID, err)
				}
				total += steps
				trips += m.Counts().Trips
			}
		}
	}
	t.Logf("%d states, %d trips", total, trips)
	if trips == 0 {
		t.Error("got no trips: the stories are not hostile")
	}
}

// TestSeededFaultsAreCaught leaves out one check after the other. The judge, or
// the claims about tripping, must notice each.
func TestSeededFaultsAreCaught(t *testing.T) {
	if interlock.Faults-1 < 20 {
		t.Errorf("got %d faults, want at least 20", interlock.Faults-1)
	}
	for f := 1; f < interlock.Faults; f++ {
		caught := error(nil)
		for seed := uint64(1); seed <= 12 && caught == nil; seed++ {
			for _, j := range shapes() {
				for _, step := range storySteps[1:] {
					if caught = story(interlock.Broken(j, epoch, f), j, seed, 4_000, step, true); caught != nil {
						break
					}
				}
				if caught != nil {
					break
				}
			}
		}
		if caught == nil {
			t.Errorf("%s: not caught", interlock.FaultName(f))
		} else {
			t.Logf("%s: %v", interlock.FaultName(f), caught)
		}
	}
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
					for _, step := range storySteps {
						rng := rand.New(rand.NewPCG(seed, 11))
						m, err := interlock.New(j, epoch)
						if err != nil {
							t.Fatal(err)
						}
						judge := newJudge(j)
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
							if what := judge.see(truth, show, false); what != "" {
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
		judge := newJudge(j)
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
				if what := judge.see(truth, show, m.Tripped() != nil || want == traffic.AllOf(traffic.FlashRed, n)); what != "" {
					t.Fatal(what)
				}
			}
		}
	})
}
