package signalcontrol

import (
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

// net is definitions as the book asks them: every vehicle of fire is on duty.
type net map[traffic.JunctionID]*traffic.Junction

func (n net) Junction(id traffic.JunctionID) (*traffic.Junction, bool) { j, ok := n[id]; return j, ok }

func (n net) Vehicle(agency, id string) (identity.Vehicle, bool) {
	return identity.Vehicle{ID: id, Class: identity.VehicleEmergency}, agency == "fire"
}

func ambulance(id string, arrival time.Time) *traffic.Request {
	return &traffic.Request{District: testDistrict.ID, Time: arrival.Add(-10 * time.Second), ID: id, Revision: 1, By: traffic.Agent{Agency: "fire", Name: "desk"}, Class: traffic.Emergency,
		Vehicle: "F-" + id, Expires: arrival.Add(time.Minute), Stops: []traffic.Stop{{Junction: "J1", Group: "A", Arrival: arrival}}}
}

// agree tells the core of a block and returns its commands.
func (c *Core) agree(n net, h ledger.Height, now time.Time, frames []*traffic.Frame, requests ...*traffic.Request) ([]traffic.Command, []Refusal) {
	var records []Record
	for _, f := range frames {
		records = append(records, Record{uint64(h) * 10, &validate.Candidate{Frame: f}})
	}
	for _, r := range requests {
		records = append(records, Record{uint64(h)*10 + 5, &validate.Candidate{Request: r}})
	}
	c.Agreed(n, h, now, records)
	return c.Commands(now, h, frames, n.Junction)
}

// atRed is a frame of a junction that shows red.
func atRed(seq uint64, at time.Time) *traffic.Frame {
	f := periodic("J1", seq, at)
	f.Signal = traffic.Signal{State: "r", Stage: 0, SinceMS: 8000, Mode: traffic.Coordinated}
	return f
}

func TestARequestIsCommandedAtOnce(t *testing.T) {
	c, n := newCore(t, "fixed"), net(definitions(t, 2))
	now := testStart
	cs, _ := c.agree(n, 1, now, []*traffic.Frame{atRed(1, now)})
	if len(cs) != 1 || strings.HasPrefix(cs[0].Rule, "priority") {
		t.Fatalf("before: got %+v, want one ordinary command", cs)
	}
	// A block with nothing but the request: the junction does not wait for its next
	// frame.
	now = now.Add(200 * time.Millisecond)
	cs, _ = c.agree(n, 2, now, nil, ambulance("r1", now.Add(5*time.Second)))
	if len(cs) != 1 || cs[0].Junction != "J1" || cs[0].Stage != 1 || cs[0].RestsOn.Seq != 1 || cs[0].Height != 2 || !strings.HasPrefix(cs[0].Rule, "priority r1 emergency: ") {
		t.Fatalf("at once: got %+v, want stage 1 for r1, resting on frame 1", cs)
	}
	first := cs[0].Seq
	// Not said again but in answer to a frame.
	now = now.Add(200 * time.Millisecond)
	if cs, _ = c.agree(n, 3, now, nil); len(cs) != 0 {
		t.Errorf("again: got %+v, want nothing", cs)
	}
	now = testStart.Add(time.Second)
	cs, _ = c.agree(n, 4, now, []*traffic.Frame{atRed(2, now)})
	if len(cs) != 1 || cs[0].Seq <= first || !strings.HasPrefix(cs[0].Rule, "priority r1 ") {
		t.Errorf("to the next frame: got %+v, want one for r1 above %d", cs, first)
	}
	// When it is over the controller has the junction back.
	now = now.Add(30 * time.Second)
	for s := range 12 {
		f := periodic("J1", uint64(3+s), now.Add(time.Duration(s)*time.Second))
		cs, _ = c.agree(n, ledger.Height(5+s), f.Time, []*traffic.Frame{f})
	}
	if e, _ := c.Book().Entry("r1"); e.State != priority.Completed || len(cs) != 1 || strings.HasPrefix(cs[0].Rule, "priority") {
		t.Errorf("afterwards: %v, %+v; want it completed and the controller's command", e.State, cs)
	}
}

func TestNoUrgentCommandOnOldNews(t *testing.T) {
	c, n := newCore(t, "fixed"), net(definitions(t, 1))
	now := testStart
	c.agree(n, 1, now, []*traffic.Frame{atRed(1, now)})
	now = now.Add(MaxDecisionAge + time.Second)
	if cs, _ := c.agree(n, 2, now, nil, ambulance("r1", now.Add(5*time.Second))); len(cs) != 0 {
		t.Errorf("got %+v, want nothing: the newest frame is too old", cs)
	}
}

func TestJunctionsInHandAreLeftAlone(t *testing.T) {
	c, n := newCore(t, "fixed"), net(definitions(t, 2))
	now := testStart
	held := atRed(1, now)
	held.Signal.Mode, held.Signal.Override = traffic.Overridden, "o1"
	cs, refused := c.agree(n, 1, now, []*traffic.Frame{held, periodic("J2", 1, now)}, ambulance("r1", now.Add(5*time.Second)))
	if len(cs) != 1 || cs[0].Junction != "J2" {
		t.Errorf("got commands %+v, want one to J2 only", cs)
	}
	if len(refused) != 1 || !refused[0].Overridden || !strings.Contains(refused[0].Reason, "o1") {
		t.Errorf("got refusals %+v, want J1's for override o1", refused)
	}
}

// A block that is handed out again after a restart changes nothing.
func TestBlocksCountOnce(t *testing.T) {
	c, n := newCore(t, "fixed"), net(definitions(t, 1))
	now := testStart
	c.agree(n, 3, now, []*traffic.Frame{atRed(1, now)}, ambulance("r1", now.Add(time.Minute)))
	before, err := c.Book().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []ledger.Height{2, 3} {
		c.Agreed(n, h, now, []Record{{9, &validate.Candidate{Request: ambulance("r2", now.Add(time.Minute))}}})
	}
	if after, _ := c.Book().Marshal(); string(after) != string(before) {
		t.Errorf("got %s, want %s", after, before)
	}
}
