package signalcontrol

import (
	"reflect"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// TestFallbacks: with each quarter of an hour of agreed frames a junction gets a
// plan that its unit will take, and the same frames give the same plan.
func TestFallbacks(t *testing.T) {
	defs := definitions(t, 2)
	run := func() (out []traffic.Fallback) {
		c := newCore(t, "fixed")
		for i := range 46 * 60 {
			at := testStart.Add(time.Duration(i+1) * time.Second)
			made, refused := c.Fallbacks(ledger.Height(i+1), []*traffic.Frame{periodic("J1", uint64(i+1), at), periodic("J9", 1, at)}, lookup(defs))
			if len(refused) > 0 {
				t.Fatal(refused[0].Reason)
			}
			out = append(out, made...)
		}
		return out
	}
	got := run()
	if len(got) != 3 {
		t.Fatalf("got %d plans in 46 minutes, want one each quarter of an hour", len(got))
	}
	for i, p := range got {
		j := defs["J1"]
		if err := p.Fits(j); err != nil || p.Junction != "J1" || p.Plan.Name != "webster" || p.FlowPPM == 0 || len(p.PerHour) != len(j.Movements) {
			t.Errorf("got %+v, %v", p, err)
		}
		if i > 0 && p.Seq <= got[i-1].Seq {
			t.Errorf("plan %d has number %d after %d, want rising", i, p.Seq, got[i-1].Seq)
		}
	}
	if again := run(); !reflect.DeepEqual(again, got) {
		t.Errorf("the same frames gave %+v, then %+v", got, again)
	}
}
