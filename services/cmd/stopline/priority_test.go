package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/consensus"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/sim"
	"github.com/stopline-traffic/stopline/services/roadside"
	"github.com/stopline-traffic/stopline/services/signalcontrol"
)

// town is a whole district in real time, of which services can be ended one by
// one.
type town struct {
	*local
	t     testing.TB
	defs  []*traffic.Junction
	units []*roadside.Unit
	conn  *grpc.ClientConn

	mu   sync.Mutex
	stop map[string]func() // by actor; ends it and waits
}

func newTown(t testing.TB, junctions int) *town {
	t.Helper()
	city, err := sim.New(sim.Config{Junctions: junctions, Seed: 3, FlatDemand: true, AmbulanceEvery: -1, BusEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	w := cityWorld{city}
	rules, err := timing.RulesNamed("field")
	if err != nil {
		t.Fatal(err)
	}
	ctrl, err := timing.Named("actuated")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	policy := identity.Policy{Version: "1", Controller: ctrl.Name + " " + ctrl.Version, Rules: rules.Name}
	l, err := newLocal(t.Context(), localOptions{dir: t.TempDir(), log: log, api: apiOptions{listen: "127.0.0.1:0"},
		open: district.Options{ID: "harbour", Junctions: w.Junctions(), Created: time.Now(), PolicyName: "default", Policy: policy},
		core: signalcontrol.CoreConfig{District: "harbour", Policy: "default", PolicyVersion: policy.Version, Controller: ctrl, Rules: rules}})
	if err != nil {
		t.Fatal(err)
	}
	tn := &town{local: l, t: t, defs: w.Junctions(), stop: map[string]func(){}}
	t.Cleanup(tn.close)
	for _, a := range l.actors() {
		tn.start(a.Name, a.Run)
	}
	ready, cancel := context.WithTimeout(t.Context(), readyWait)
	defer cancel()
	if err := l.ready(ready, make(chan struct{})); err != nil {
		t.Fatal(err)
	}
	if tn.units, err = demoUnits(l, w, tn.defs, rules, roadside.StoreConfig{}, log); err != nil {
		t.Fatal(err)
	}
	tn.start("the street", func(ctx context.Context) error { return runStreet(ctx, 0, l, w, tn.units, make(chan struct{})) })
	if tn.conn, err = grpc.NewClient(l.gateway.API().Addr(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	for _, j := range tn.defs {
		tn.wait("an agreed frame of "+string(j.ID), 30*time.Second, func() bool { _, ok := l.gateway.Newest(district.DeviceID(j.ID)); return ok })
	}
	return tn
}

func (tn *town) start(name string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(ctx); err != nil {
			tn.t.Errorf("%s: %v", name, err)
		}
	}()
	tn.mu.Lock()
	defer tn.mu.Unlock()
	tn.stop[name] = func() { cancel(); <-done }
}

// kill ends a service and waits until it has.
func (tn *town) kill(name string) {
	tn.t.Helper()
	tn.mu.Lock()
	f := tn.stop[name]
	delete(tn.stop, name)
	tn.mu.Unlock()
	if f == nil {
		tn.t.Fatalf("%s does not run", name)
	}
	f()
}

func (tn *town) close() {
	if tn.conn != nil {
		_ = tn.conn.Close()
	}
	if tn.stop["the street"] != nil {
		tn.kill("the street")
	}
	tn.mu.Lock()
	var all []func()
	for _, f := range tn.stop {
		all = append(all, f)
	}
	tn.mu.Unlock()
	var g sync.WaitGroup
	for _, f := range all {
		g.Go(f)
	}
	g.Wait()
	tn.local.close()
}

// validator starts validator n again, on the folder that it has.
func (tn *town) validator(n uint64) {
	tn.t.Helper()
	b, err := tn.connect(topic.ValidatorUser(n))
	if err != nil {
		tn.t.Fatal(err)
	}
	vote, err := tn.district.Key(district.VoteKey(n))
	if err != nil {
		tn.t.Fatal(err)
	}
	cosign, err := tn.district.Key(district.CosignKey(n))
	if err != nil {
		tn.t.Fatal(err)
	}
	v, err := consensus.New(consensus.Config{District: tn.district.Genesis.District, Number: n, VoteKey: vote, CosignKey: cosign, Genesis: tn.district.GenesisJSON,
		Dir: filepath.Join(tn.district.Dir, fmt.Sprintf("validator-%d", n)), Bus: b, Logger: tn.log})
	if err != nil {
		tn.t.Fatal(err)
	}
	tn.start(fmt.Sprintf("validator %d", n), v.Run)
}

// newGateway ends the gateway and starts another one on what it left.
func (tn *town) newGateway() {
	tn.t.Helper()
	tn.kill("gateway")
	b, err := tn.connect("gateway")
	if err != nil {
		tn.t.Fatal(err)
	}
	state, err := agreed.Open(filepath.Join(tn.district.Dir, "gateway.place"), &tn.district.Genesis)
	if err != nil {
		tn.t.Fatal(err)
	}
	api, err := tn.apiConfig(apiOptions{listen: "127.0.0.1:0"})
	if err != nil {
		tn.t.Fatal(err)
	}
	tn.gateway, err = gateway.New(gateway.Config{Bus: b, District: tn.district.Genesis.District, State: state, Logger: tn.log, API: api,
		Follow: decided.Config{Bus: b, District: tn.district.Genesis.District, GenesisHash: tn.district.GenesisHash, Validators: state.Registry().Validators(), Logger: tn.log}})
	if err != nil {
		tn.t.Fatal(err)
	}
	tn.start("gateway", tn.gateway.Run)
	if err := tn.conn.Close(); err != nil {
		tn.t.Fatal(err)
	}
	if tn.conn, err = grpc.NewClient(tn.gateway.API().Addr(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		tn.t.Fatal(err)
	}
}

func (tn *town) wait(what string, most time.Duration, f func() bool) {
	tn.t.Helper()
	for end := time.Now().Add(most); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			tn.t.Fatalf("after %v: no %s", most, what)
		}
	}
}

// as is a context in which a client asks for a purpose.
func (tn *town) as(client, purpose string) context.Context {
	tn.t.Helper()
	token, err := clientToken(tn.district, client, 10*time.Minute, false)
	if err != nil {
		tn.t.Fatal(err)
	}
	return metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+token, "stopline-purpose", purpose)
}

func (tn *town) api() pb.PriorityServiceClient { return pb.NewPriorityServiceClient(tn.conn) }

// way finds two junctions that a vehicle can pass one after the other.
func (tn *town) way() []*pb.PriorityStop {
	tn.t.Helper()
	for _, a := range tn.defs {
		for _, m := range a.Movements {
			out, _ := a.Lane(m.To)
			for _, b := range tn.defs {
				if out.To != b.ID || out.To == "" {
					continue
				}
				for _, n := range b.Movements {
					if in, _ := b.Lane(n.From); in.From == a.ID && a.Groups[m.Group].Kind == traffic.Vehicles && b.Groups[n.Group].Kind == traffic.Vehicles {
						return []*pb.PriorityStop{{Junction: string(a.ID), Group: a.Groups[m.Group].Name}, {Junction: string(b.ID), Group: b.Groups[n.Group].Name}}
					}
				}
			}
		}
	}
	tn.t.Fatal("no junction leads to another")
	return nil
}

func emergency(vehicle string, stops []*pb.PriorityStop, in ...time.Duration) *pb.PriorityRequest {
	r := &pb.PriorityRequest{Class: pb.PriorityClass_PRIORITY_CLASS_EMERGENCY, Vehicle: vehicle}
	for i, d := range in {
		r.Stops = append(r.Stops, &pb.PriorityStop{Junction: stops[i].Junction, Group: stops[i].Group, Arrival: timestamppb.New(time.Now().Add(d))})
	}
	return r
}

func wantCode(t testing.TB, what string, err error, want codes.Code, part string) {
	t.Helper()
	if status.Code(err) != want || !strings.Contains(status.Convert(err).Message(), part) {
		t.Errorf("%s: got %v, want %v with %q", what, err, want, part)
	}
}

// watched collects the states of a request until it has ended.
func (tn *town) watched(ctx context.Context, id string) (states []string, last *pb.Priority) {
	tn.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	w, err := tn.api().WatchPriority(ctx, &pb.WatchPriorityRequest{Id: id})
	if err != nil {
		tn.t.Fatal(err)
	}
	for {
		m, err := w.Recv()
		if errors.Is(err, io.EOF) {
			return states, last
		}
		if err != nil {
			tn.t.Fatalf("watching: %v; so far %v, last %v", err, states, last)
		}
		last = m.Priority
		s := strings.TrimPrefix(last.State.String(), "PRIORITY_STATE_")
		if len(states) == 0 || states[len(states)-1] != s {
			states = append(states, s)
		}
	}
}

func TestACorridorIsWatchedToItsEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	t.Parallel() // most of it is waiting for lights
	tn := newTown(t, 4)
	way := tn.way()
	ctx := tn.as("ambulance-desk-1", "emergency-response")
	ask := &pb.RequestPriorityRequest{Request: emergency("A-7", way, 12*time.Second, 40*time.Second), IdempotencyKey: "corridor-1"}
	r, err := tn.api().RequestPriority(ctx, ask)
	if err != nil {
		t.Fatal(err)
	}
	id := r.Priority.Request.Id
	if len(id) != 26 || r.Priority.Request.Agency != "ambulance" || r.Priority.Request.Requester != "ambulance-desk-1" {
		t.Errorf("got request %v, want one of the ambulance's desk with 26 letters", r.Priority.Request)
	}
	// The same key is the same request; another content under it is refused.
	again, err := tn.api().RequestPriority(ctx, ask)
	if err != nil || again.Priority.Request.Id != id {
		t.Errorf("the same again: %v, %v; want %s", again, err, id)
	}
	other := &pb.RequestPriorityRequest{Request: emergency("A-8", way, 4*time.Second), IdempotencyKey: "corridor-1"}
	_, err = tn.api().RequestPriority(ctx, other)
	wantCode(t, "another under the same key", err, codes.Aborted, "idempotency_key")
	// The fire brigade's own key of that name is another request, and they see nothing
	// of the ambulance's.
	fire := tn.as("fire-desk-1", "emergency-response")
	_, err = tn.api().GetPriority(fire, &pb.GetPriorityRequest{Id: id})
	wantCode(t, "another agency looks", err, codes.PermissionDenied, "request:"+id)
	_, err = tn.api().CancelPriority(fire, &pb.CancelPriorityRequest{Id: id})
	wantCode(t, "another agency cancels", err, codes.PermissionDenied, "request:"+id)
	// What the rules refuse is rejected with the rule's name, and that is on record.
	bad, err := tn.api().RequestPriority(fire, &pb.RequestPriorityRequest{Request: emergency("A-7", way, 5*time.Second), IdempotencyKey: "corridor-1"})
	if err != nil || bad.Priority.State != pb.PriorityState_PRIORITY_STATE_REJECTED || !strings.HasPrefix(bad.Priority.Progress[0].Rule, "on-duty") {
		t.Errorf("somebody else's vehicle: got %v, %v; want it rejected by on-duty", bad, err)
	}
	_, err = tn.api().RequestPriority(fire, &pb.RequestPriorityRequest{Request: emergency("F-1", []*pb.PriorityStop{{Junction: "nowhere", Group: "g"}}, time.Second), IdempotencyKey: "nowhere-1"})
	wantCode(t, "nowhere", err, codes.InvalidArgument, "stops[0].junction")
	given := emergency("F-1", way, 5*time.Second)
	given.Agency = "ambulance"
	_, err = tn.api().RequestPriority(fire, &pb.RequestPriorityRequest{Request: given, IdempotencyKey: "as-another"})
	wantCode(t, "in another's name", err, codes.InvalidArgument, "request.agency")
	_, err = tn.api().RequestPriority(tn.as("operator-1", "operations"), &pb.RequestPriorityRequest{Request: emergency("A-1", way, time.Second), IdempotencyKey: "operator-1"})
	wantCode(t, "an operator", err, codes.PermissionDenied, "")

	tn.wait("green for it", 60*time.Second, func() bool {
		g, err := tn.api().GetPriority(ctx, &pb.GetPriorityRequest{Id: id})
		return err == nil && g.Priority.Progress[0].Command > 0 && g.Priority.Progress[0].Observed != ""
	})
	// It is past the first junction, and earlier at the second.
	up, err := tn.api().UpdateArrival(ctx, &pb.UpdateArrivalRequest{Id: id, Stops: []*pb.PriorityStop{{Junction: way[1].Junction, Group: way[1].Group, Arrival: timestamppb.New(time.Now().Add(3 * time.Second))}}})
	if err != nil || up.Priority.Progress[0].State != pb.PriorityState_PRIORITY_STATE_COMPLETED {
		t.Fatalf("past the first: %v, %v; want it completed there", up, err)
	}
	states, last := tn.watched(ctx, id)
	if !slices.Contains(states, "ACTIVATED") || states[len(states)-1] != "COMPLETED" {
		t.Errorf("states %v, want ACTIVATED … COMPLETED", states)
	}
	for _, p := range last.Progress {
		if p.Command == 0 || p.Rule == "" || !strings.Contains(p.Observed, "G") && !strings.Contains(p.Observed, "g") {
			t.Errorf("at %s: command %d by %q, observed %q; want all of them", p.Junction, p.Command, p.Rule, p.Observed)
		}
	}
	tn.wait("seal on its record", 10*time.Second, func() bool {
		g, err := tn.api().GetPriority(ctx, &pb.GetPriorityRequest{Id: id})
		return err == nil && g.Priority.Sealed && g.Priority.Index > 0
	})
	tn.proveChain(ctx, id)
	// Theirs only, and the ended ones when asked.
	for client, n := range map[string]int{"ambulance-desk-1": 1, "fire-desk-1": 1} {
		l, err := tn.api().ListPriorities(tn.as(client, "emergency-response"), &pb.ListPrioritiesRequest{Ended: true})
		if err != nil || len(l.Priorities) != n {
			t.Errorf("%s lists %v, %v; want %d", client, l, err, n)
		}
	}
	if l, err := tn.api().ListPriorities(ctx, &pb.ListPrioritiesRequest{}); err != nil || len(l.Priorities) != 0 {
		t.Errorf("under way: %v, %v; want none", l, err)
	}
	for _, u := range tn.units {
		if c := u.Counters(); c.Trips > 0 {
			t.Errorf("the interlock of %s has tripped", u.Status(time.Now()).Junction)
		}
	}
	// Every command follows from the log alone, those for the request too.
	tn.kill("the street")
	if err := tn.settle(tn.units, make(chan struct{})); err != nil {
		t.Fatal(err)
	}
	tn.newGateway()
	tn.wait("request after the gateway's restart", 20*time.Second, func() bool {
		g, err := tn.api().GetPriority(ctx, &pb.GetPriorityRequest{Id: id})
		return err == nil && g.Priority.State == pb.PriorityState_PRIORITY_STATE_COMPLETED
	})
	if again, err = tn.api().RequestPriority(ctx, ask); err != nil || again.Priority.Request.Id != id || again.Priority.State != pb.PriorityState_PRIORITY_STATE_COMPLETED {
		t.Errorf("the same key after a restart: %v, %v; want request %s, completed", again, err, id)
	}
	tn.kill("signal-control")
	rep, err := replayDecisions(tn.district.Dir, recordedPolicy, recordedPolicy)
	if err != nil || len(rep.Mismatches) > 0 || rep.Repeated == 0 {
		t.Errorf("replayed: %+v, %v; want every command repeated", rep, err)
	}
}

// proveChain wants one chain from the request to what the controllers showed, and
// one bundle that proves it.
func (tn *town) proveChain(ctx context.Context, id string) {
	t := tn.t
	t.Helper()
	g, err := tn.api().GetPriority(ctx, &pb.GetPriorityRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	evidence := pb.NewEvidenceServiceClient(tn.conn)
	var chain *pb.GetChainResponse
	wanted := map[string]int{"request": 2, "reading": 1, "command": 2, "response": 2}
	tn.wait("whole chain", 40*time.Second, func() bool {
		if chain, err = evidence.GetChain(ctx, &pb.GetChainRequest{Index: g.Priority.Index}); err != nil {
			return false
		}
		have := map[string]int{}
		for _, l := range chain.Links {
			have[l.Step]++
		}
		for step, n := range wanted {
			if have[step] < n {
				return false
			}
		}
		return true
	})
	for _, l := range chain.Links {
		if l.Step == "command" && !strings.HasPrefix(l.Record.Rule, "priority "+id+" emergency") {
			t.Errorf("a command of the chain is by %q, want it to name request %s", l.Record.Rule, id)
		}
		if l.Record.Height == 0 || l.Text == "" {
			t.Errorf("link %v: want its block and what it says", l)
		}
	}
	var zip []byte
	tn.wait("bundle of it", 20*time.Second, func() bool {
		b, err := evidence.GetBundle(ctx, &pb.GetBundleRequest{Index: g.Priority.Index, Chain: true}, grpc.MaxCallRecvMsgSize(64<<20))
		if err != nil {
			return false
		}
		zip = b.Data
		return true
	})
	v, err := evidence.VerifyBundle(context.Background(), &pb.VerifyBundleRequest{Bundle: zip})
	if err != nil || !v.Verified {
		t.Errorf("the chain's bundle: %v, %v; want it verified", v, err)
	}
	// Another agency's eyes are not for it.
	_, err = evidence.GetChain(tn.as("fire-desk-1", "emergency-response"), &pb.GetChainRequest{Index: g.Priority.Index})
	wantCode(t, "another agency's chain", err, codes.PermissionDenied, "")
}

func (tn *town) unit(j string) *roadside.Unit {
	for i, d := range tn.defs {
		if string(d.ID) == j {
			return tn.units[i]
		}
	}
	tn.t.Fatalf("no junction %s", j)
	return nil
}

func TestOperatorsTakeJunctionsInHand(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	t.Parallel() // most of it is waiting for lights
	tn := newTown(t, 2)
	op := tn.as("operator-1", "operations")
	j, k := string(tn.defs[0].ID), string(tn.defs[1].ID)
	hold := func(junction, key string, stage int32) *pb.OverrideRequest {
		return &pb.OverrideRequest{Junction: junction, Action: pb.OverrideAction_OVERRIDE_ACTION_HOLD, Stage: &stage, Reason: "incident", Duration: durationpb.New(time.Minute), IdempotencyKey: key}
	}
	_, err := tn.api().Override(tn.as("fire-desk-1", "emergency-response"), hold(j, "not-theirs", 0))
	wantCode(t, "the fire brigade", err, codes.PermissionDenied, "")
	noReason := hold(j, "no-reason", 0)
	noReason.Reason = "because"
	_, err = tn.api().Override(op, noReason)
	wantCode(t, "free text", err, codes.InvalidArgument, "reason")
	_, err = tn.api().Override(op, hold(j, "stage-99", 99))
	wantCode(t, "no such stage", err, codes.InvalidArgument, "stage")
	_, err = tn.api().Override(op, hold("nowhere", "nowhere-1", 0))
	wantCode(t, "nowhere", err, codes.NotFound, "junction")

	o, err := tn.api().Override(op, hold(j, "hold-first", 1))
	if err != nil || !o.Override.Active || o.Override.Record.Operator != "operator-1" {
		t.Fatalf("hold: got %v, %v; want it active", o, err)
	}
	id := o.Override.Record.Id
	if got := tn.unit(j).Status(time.Now()).Signal; got.Override != id || got.Mode != traffic.Overridden {
		t.Errorf("the unit says %+v, want override %s", got, id)
	}
	again, err := tn.api().Override(op, hold(j, "hold-first", 1))
	if err != nil || again.Override.Record.Id != id {
		t.Errorf("the same again: %v, %v; want %s", again, err, id)
	}
	_, err = tn.api().Override(op, hold(j, "hold-second", 0))
	wantCode(t, "a second one", err, codes.Aborted, id)
	traffics := pb.NewTrafficServiceClient(tn.conn)
	tn.wait("stage held in the agreed state", 30*time.Second, func() bool {
		s, err := traffics.GetJunctionState(op, &pb.GetJunctionStateRequest{Junction: j})
		return err == nil && s.State.OverrideId == id && s.State.Stage == 1 && s.State.Mode == "override"
	})
	tn.wait("leaf of its record", 10*time.Second, func() bool {
		l, err := tn.api().ListOverrides(op, &pb.ListOverridesRequest{Junction: j})
		return err == nil && len(l.Overrides) == 1 && l.Overrides[0].Index > 0 && l.Overrides[0].Sealed
	})
	rel, err := tn.api().ReleaseOverride(op, &pb.ReleaseOverrideRequest{Id: id})
	if err != nil || rel.Override.Active {
		t.Errorf("release: %v, %v; want it not active", rel, err)
	}
	tn.wait("commands again", 15*time.Second, func() bool { return tn.unit(j).Status(time.Now()).Signal.Mode == traffic.Coordinated })

	// Everything that could end it dies; it ends by itself. Consensus goes first, and
	// does not keep an operator from acting.
	for _, v := range []string{"validator 1", "validator 2"} {
		tn.kill(v)
	}
	tn.wait("stale decisions", 20*time.Second, tn.control.Stale)
	const lasts = 12 * time.Second
	began := time.Now()
	f, err := tn.api().Override(op, &pb.OverrideRequest{Junction: k, Action: pb.OverrideAction_OVERRIDE_ACTION_FLASH, Reason: "fault", Duration: durationpb.New(lasts), IdempotencyKey: "flash-it"})
	if err != nil || !f.Override.Active {
		t.Fatalf("flash without consensus: %v, %v; want it active", f, err)
	}
	for _, s := range []string{"signal-control", "gateway", "validation", "ingest"} {
		tn.kill(s)
	}
	flashing := traffic.AllOf(traffic.FlashRed, len(tn.defs[1].Groups))
	u := tn.unit(k)
	tn.wait("flashing", 20*time.Second, func() bool { return u.Status(time.Now()).Signal.State == flashing || time.Since(began) > lasts })
	if u.Status(time.Now()).Signal.State != flashing {
		t.Errorf("it does not flash: %q", u.Status(time.Now()).Signal.State)
	}
	tn.wait("end by itself", lasts+10*time.Second, func() bool { return u.Status(time.Now()).Signal.Override == "" })
	if d := time.Since(began); d < lasts-2*time.Second {
		t.Errorf("it ended after %v, want %v", d, lasts)
	}
	tn.wait("greens again", 40*time.Second, func() bool { return strings.ContainsAny(string(u.Status(time.Now()).Signal.State), "Gg") })
	if c := u.Counters(); c.Trips > 0 || len(c.StatesRefused) > 0 {
		t.Errorf("trips %d, states refused %v; want none", c.Trips, c.StatesRefused)
	}
}

// With consensus stalled an ambulance is served, by a record and commands that say
// so and are sealed afterwards; a bus waits.
func TestPriorityWhileNothingIsAgreed(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a whole district")
	}
	t.Parallel() // most of it is waiting for lights
	tn := newTown(t, 2)
	stop := tn.way()[:1]
	ctx := tn.as("ambulance-desk-1", "emergency-response")
	for _, v := range []string{"validator 3", "validator 4"} {
		tn.kill(v)
	}
	tn.wait("stale decisions", 20*time.Second, tn.control.Stale)
	busReq := emergency("bus-3", stop, 5*time.Second)
	busReq.Class, busReq.Lateness = pb.PriorityClass_PRIORITY_CLASS_TRANSIT, durationpb.New(10*time.Minute)
	b, err := tn.api().RequestPriority(tn.as("transit-desk-1", "transit-service"), &pb.RequestPriorityRequest{Request: busReq, IdempotencyKey: "a-bus-waits"})
	if err != nil || b.Priority.State != pb.PriorityState_PRIORITY_STATE_RECEIVED {
		t.Errorf("a bus: %v, %v; want received", b, err)
	}
	r, err := tn.api().RequestPriority(ctx, &pb.RequestPriorityRequest{Request: emergency("A-1", stop, 6*time.Second), IdempotencyKey: "in-a-stall"})
	if err != nil || !r.Priority.Request.Degraded || r.Priority.State != pb.PriorityState_PRIORITY_STATE_ACTIVATED {
		t.Fatalf("an ambulance: %v, %v; want it activated, degraded", r, err)
	}
	id := r.Priority.Request.Id
	u := tn.unit(stop[0].Junction)
	tn.wait("junction that obeys", 10*time.Second, func() bool { return u.Status(time.Now()).Signal.Mode == traffic.Coordinated })
	if n := tn.control.Counters.SentDegraded.Load(); n == 0 {
		t.Error("no degraded command was counted")
	}
	group := slices.IndexFunc(tn.defs[0].Groups, func(g traffic.Group) bool { return g.Name == stop[0].Group })
	for i, d := range tn.defs {
		if string(d.ID) == stop[0].Junction {
			group = slices.IndexFunc(tn.defs[i].Groups, func(g traffic.Group) bool { return g.Name == stop[0].Group })
		}
	}
	tn.wait("green for it", 40*time.Second, func() bool { return u.Status(time.Now()).Signal.State.At(group).Go() })
	for n := range uint64(2) {
		tn.validator(n + 3)
	}
	tn.wait("decisions again", 60*time.Second, func() bool { return !tn.control.Stale() })
	tn.wait("record and command in the log", 60*time.Second, func() bool {
		g, err := tn.api().GetPriority(ctx, &pb.GetPriorityRequest{Id: id})
		return err == nil && g.Priority.Index > 0 && g.Priority.Sealed && g.Priority.Request.Degraded && g.Priority.Progress[0].Command > 0
	})
	if c := u.Counters(); c.Trips > 0 {
		t.Error("the interlock has tripped")
	}
	for _, n := range []uint64{tn.control.Counters.Unsealed.Load()} {
		if n > 0 {
			t.Errorf("%d commands are not sealed", n)
		}
	}
}
