package timing

import "github.com/stopline-traffic/stopline/pkg/traffic"

// UntilGreen returns at most how long it takes a [Sequencer] that has just shown
// the signal to show a stage, if it is ordered now and nothing stands in the box:
// minimum greens that are still running, clearances and all-red times. 0 where the
// stage is shown already.
func UntilGreen(j *traffic.Junction, r Rules, s traffic.Signal, stage int) int64 {
	if stage < 0 || stage >= len(j.Stages) || s.Stage == stage {
		return 0
	}
	l := limitsOf(j, r)
	to := j.Stages[stage].State
	var green, clear, red int64
	for i := range j.Groups {
		red = max(red, l.allRed[i])
		switch a := s.State.At(i); {
		case a.Go() && !to.At(i).Go():
			left := l.minGreen[i]
			if s.Stage >= 0 { // it has been green for as long as the stage is shown
				left = max(left-s.SinceMS, 0)
			}
			green, clear = max(green, left), max(clear, l.clear[i])
		case a == traffic.Yellow || a == traffic.PedClear:
			clear = max(clear, l.clear[i])
		}
	}
	if s.Stage < 0 {
		// Another change is under way: it is finished first, and what it lets in has
		// its minimum green.
		var others int64
		for i := range j.Groups {
			if !to.At(i).Go() {
				others = max(others, l.minGreen[i]+l.clear[i])
			}
		}
		return clear + red + others + red
	}
	return green + clear + red
}
