package audit

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// asked is a chain in which an ambulance is served and an operator holds the
// junction afterwards.
func asked(t testing.TB) (*ledgertest.District, *ledgertest.Chain) {
	t.Helper()
	d := ledgertest.New("asked", 4)
	c := d.NewChain()
	record := func(k identity.RecordKind, payload []byte) ledgertest.Record {
		return ledgertest.NewRecord(d.ControlKey, k, identity.Protobuf, payload) // who signs is not what this is about
	}
	request := func(seq uint64, edit func(*traffic.Request)) ledgertest.Record {
		r := &traffic.Request{District: d.ID, Turn: traffic.Turn{Epoch: 1, Seq: seq}, Time: second(2), ID: "r1", Revision: 1, By: traffic.Agent{Agency: "ambulance", Name: "desk"},
			Class: traffic.Emergency, Vehicle: "A-1", Expires: second(60), Stops: []traffic.Stop{{Junction: ledgertest.Junction, Group: "A", Arrival: second(6)}}}
		if edit != nil {
			edit(r)
		}
		return record(identity.KindRequest, wire.EncodeRequest(r))
	}
	command := func(n int, rule string) ledgertest.Record {
		return record(identity.KindCommand, wire.EncodeCommand(&traffic.Command{District: d.ID, Junction: ledgertest.Junction, Seq: uint64(n), Height: uint64(n),
			RestsOn: traffic.FrameKey{Device: ledgertest.Device, BootEpoch: 1, Seq: uint64(n)}, Issued: second(n).Add(300 * time.Millisecond), Expires: second(n + 2), Stage: 1, Rule: rule}))
	}
	override := func(seq uint64, at int, edit func(*traffic.Override)) ledgertest.Record {
		o := &traffic.Override{District: d.ID, Turn: traffic.Turn{Epoch: 1, Seq: seq}, Time: second(at), ID: "o1", Junction: ledgertest.Junction, Action: traffic.OverrideHold, Stage: 1,
			Reason: "incident", By: traffic.Agent{Agency: "roads", Name: "operator-1"}, Expires: second(60)}
		if edit != nil {
			edit(o)
		}
		return record(identity.KindOverride, wire.EncodeOverride(o))
	}
	for n := 1; n <= 14; n++ {
		f := &traffic.Frame{District: d.ID, Junction: ledgertest.Junction, FrameKey: traffic.FrameKey{Device: ledgertest.Device, BootEpoch: 1, Seq: uint64(n)}, Time: second(n),
			Interval: time.Second, Signal: traffic.Signal{State: "r", Stage: 0, Mode: traffic.Coordinated}}
		if n >= 6 {
			f.Signal.State, f.Signal.Stage = "G", 1
		}
		if n >= 9 && n < 12 {
			f.Signal.Mode, f.Signal.Override = traffic.Overridden, "o1"
		}
		if n > 1 && n < 9 {
			f.Results = []traffic.CommandResult{{Seq: uint64(n - 1), Applied: true}}
		}
		block := []ledgertest.Record{ledgertest.NewRecord(d.DeviceKey, identity.KindFrame, identity.Protobuf, wire.EncodeFrame(f))}
		switch {
		case n == 2:
			block = append(block, request(1, nil), request(2, func(r *traffic.Request) { r.By.Agency = "fire" }), command(n, "extend green"))
		case n == 7:
			block = append(block, request(3, func(r *traffic.Request) { r.Revision, r.Cancelled, r.Time = 2, true, second(7) }), command(n, "extend green"))
		case n == 8:
			block = append(block, override(1, 8, nil))
		case n == 11:
			block = append(block, override(2, 11, func(o *traffic.Override) {
				o.ID, o.Action, o.Releases, o.Expires = "o2", traffic.OverrideRelease, "o1", time.Time{}
			}))
		case n > 2 && n < 7:
			block = append(block, command(n, priority.CommandRule("r1", traffic.Emergency, "stage 1")))
		case n < 9:
			block = append(block, command(n, "extend green"))
		}
		c.Decide(block)
	}
	c.Decide()
	return d, c
}

func (s *Service) only(t testing.TB, k identity.RecordKind, nth int) uint64 {
	t.Helper()
	p, err := s.Query(t.Context(), Query{Kind: k, Oldest: true})
	if err != nil || len(p.Records) <= nth {
		t.Fatalf("%s number %d: %v in %d", k, nth, err, len(p.Records))
	}
	return p.Records[nth].Index
}

func TestRequestChain(t *testing.T) {
	d, c := asked(t)
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	s := service(t, config(d, dir))
	for name, tc := range map[string]struct {
		kind  identity.RecordKind
		nth   int
		steps string
		says  string
		lacks int
	}{
		"request":             {identity.KindRequest, 0, "request request 1, request request 3, reading frame 3, decision command 3, response frame 4, green frame 6", "1 of 1 junctions", 0},
		"its later word":      {identity.KindRequest, 2, "request request 1, request request 3, reading frame 3, decision command 3, response frame 4, green frame 6", "1 of 1 junctions", 0},
		"another's of the id": {identity.KindRequest, 1, "request request 2", "0 of 1", 1},
		"override":            {identity.KindOverride, 0, "override override 1, override override 2, response frame 9, end frame 12", "in force from 08:00:09.000 until 08:00:12.000", 0},
		"its release":         {identity.KindOverride, 1, "override override 1, override override 2, response frame 9, end frame 12", "in force from", 0},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := s.RequestChain(t.Context(), s.only(t, tc.kind, tc.nth))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, st := range c.Steps {
				got = append(got, fmt.Sprintf("%s %s %d", st.Role, st.Kind, st.Seq))
				if st.Says == "" || st.Height == 0 || st.Evidence == "" {
					t.Errorf("step %+v lacks what it says, or where it is", st)
				}
			}
			if strings.Join(got, ", ") != tc.steps || !strings.Contains(c.Summary, tc.says) || len(c.Missing) != tc.lacks || !c.Provable {
				t.Errorf("got %q, %q, missing %q, provable %v; want %q with %q", strings.Join(got, ", "), c.Summary, c.Missing, c.Provable, tc.steps, tc.says)
			}
		})
	}
	if _, err := s.RequestChain(t.Context(), s.only(t, identity.KindCommand, 0)); kind.Of(err) != kind.Invalid {
		t.Errorf("of a command: %v, want it refused as invalid", err)
	}
	if _, err := s.RequestChain(t.Context(), 1<<40); kind.Of(err) != kind.NotFound {
		t.Errorf("of nothing: %v, want not found", err)
	}
	// The junction's own chain says whose hand it was in.
	at, err := s.Chain(t.Context(), ledgertest.Junction, second(10).Add(time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	if st := at.step(RoleOverride); st == nil || !strings.Contains(st.Says, "operator-1 of roads: hold") || !strings.Contains(at.Summary, "in an operator's hand") {
		t.Errorf("the junction's chain during the override: %+v, %q; want it named", st, at.Summary)
	}
	if at, err = s.Chain(t.Context(), ledgertest.Junction, second(13)); err != nil || at.step(RoleOverride) != nil {
		t.Errorf("after it: %+v, %v; want no override", at, err)
	}
}
