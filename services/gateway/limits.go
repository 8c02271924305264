package gateway

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/stopline-traffic/stopline/pkg/access"
)

// Limits bound what an agency can ask at once and over time. Priority requests
// have a lane of their own, so that no load keeps an ambulance waiting.
type Limits struct {
	// Rate and Burst of calls a second, for each agency and method.
	Rate  float64
	Burst int
	// Concurrent calls and streams, for each agency; PriorityConcurrent is the
	// lane's. Total bounds all but the lane.
	Concurrent, Streams, PriorityConcurrent, Total int

	mu     sync.Mutex
	rates  map[[2]string]*rate.Limiter
	inside map[[2]string]int // by agency and lane
	total  int
	swept  time.Time
}

// DefaultLimits are for two cores.
func DefaultLimits() *Limits {
	return &Limits{Rate: 4000, Burst: 4000, Concurrent: 512, Streams: 4000, PriorityConcurrent: 256, Total: 2048}
}

const (
	laneCalls    = "calls"
	laneStreams  = "streams"
	lanePriority = "priority"
)

// Enter takes a place on an agency's account; release gives it back. Where there
// is none, wait says when to come again.
func (l *Limits) Enter(agency, method string, m access.Method) (release func(), wait time.Duration, ok bool) {
	lane, most := laneCalls, l.Concurrent
	switch {
	case m.Priority:
		lane, most = lanePriority, l.PriorityConcurrent
	case m.Stream:
		lane, most = laneStreams, l.Streams
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rates == nil {
		l.rates, l.inside = map[[2]string]*rate.Limiter{}, map[[2]string]int{}
	}
	if now := time.Now(); now.Sub(l.swept) > time.Minute { // full buckets know nothing
		for k, r := range l.rates {
			if r.Tokens() >= float64(l.Burst) {
				delete(l.rates, k)
			}
		}
		l.swept = now
	}
	at := [2]string{agency, lane}
	if l.inside[at] >= most || lane == laneCalls && l.total >= l.Total {
		return nil, time.Second, false
	}
	k := [2]string{agency, method}
	r := l.rates[k]
	if r == nil {
		r = rate.NewLimiter(rate.Limit(l.Rate), l.Burst)
		l.rates[k] = r
	}
	if res := r.Reserve(); !res.OK() || res.Delay() > 0 {
		wait := time.Duration(math.Max(float64(res.Delay()), float64(time.Second)))
		res.Cancel()
		return nil, wait.Round(time.Second), false
	}
	l.inside[at]++
	if lane == laneCalls {
		l.total++
	}
	var once sync.Once
	return func() {
		once.Do(func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if l.inside[at]--; l.inside[at] == 0 {
				delete(l.inside, at)
			}
			if lane == laneCalls {
				l.total--
			}
		})
	}, 0, true
}

func retryIn(d time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(d)}
}
