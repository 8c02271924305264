package gateway

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// trafficPart answers what the network is and does: what is now from the
// gateway's own view, what was from audit.
type trafficPart struct {
	pb.UnimplementedTrafficServiceServer
	a *API
}

func newTrafficPart(a *API) *trafficPart { return &trafficPart{a: a} }

func (p *trafficPart) register(s *grpc.Server) { pb.RegisterTrafficServiceServer(s, p) }

func junctionObject(id string) access.Object {
	return access.Object{Type: "Junction", ID: id, Junction: id}
}

func (p *trafficPart) objects(_ context.Context, _ string, req proto.Message) ([]access.Object, error) {
	var ids []string
	switch r := req.(type) {
	case *pb.ListJunctionStatesRequest:
		ids = r.Junctions
	case *pb.WatchJunctionStatesRequest:
		ids = r.Junctions
	case interface{ GetJunction() string }:
		ids = []string{r.GetJunction()}
	}
	var out []access.Object
	for _, id := range ids {
		out = append(out, junctionObject(id))
	}
	return out, nil
}

func (p *trafficPart) GetNetwork(_ context.Context, r *pb.GetNetworkRequest) (*pb.GetNetworkResponse, error) {
	if err := checkMask(r.ReadMask, (*pb.JunctionInfo)(nil)); err != nil {
		return nil, err
	}
	height := p.a.g.cfg.State.Height() // before the registry: no more than what is in it
	reg := p.a.registry()
	out := &pb.GetNetworkResponse{District: string(reg.District()), Height: uint64(height)}
	failed := p.a.g.failed()
	for _, j := range reg.Junctions() {
		info := &pb.JunctionInfo{Id: string(j.ID), Name: j.Name, LatE6: j.LatE6, LonE6: j.LonE6}
		if e, ok := reg.Entry(identity.TypeJunction, string(j.ID)); ok {
			info.SinceHeight = e.Since
		}
		for _, g := range j.Groups {
			info.Groups = append(info.Groups, g.Name)
		}
		for _, s := range j.Stages {
			info.Stages = append(info.Stages, s.Name)
		}
		for _, d := range j.Detectors {
			di := &pb.DetectorInfo{Id: string(d.ID), Kind: string(d.Kind)}
			for _, f := range failed[j.ID] {
				if f.Detector == d.ID {
					di.FailedRule, di.FailedSince = f.Rule, timestamp(f.Since)
				}
			}
			info.Detectors = append(info.Detectors, di)
		}
		out.Junctions = append(out.Junctions, masked(info, r.ReadMask))
	}
	return out, nil
}

func (p *trafficPart) GetJunctionState(_ context.Context, r *pb.GetJunctionStateRequest) (*pb.GetJunctionStateResponse, error) {
	if err := checkMask(r.ReadMask, (*pb.JunctionState)(nil)); err != nil {
		return nil, err
	}
	s, err := p.a.g.stateOf(traffic.JunctionID(r.Junction))
	if err != nil {
		return nil, err
	}
	return &pb.GetJunctionStateResponse{State: masked(s, r.ReadMask)}, nil
}

func (p *trafficPart) ListJunctionStates(_ context.Context, r *pb.ListJunctionStatesRequest) (*pb.ListJunctionStatesResponse, error) {
	if err := checkMask(r.ReadMask, (*pb.JunctionState)(nil)); err != nil {
		return nil, err
	}
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	states, _, err := p.a.g.states(r.Junctions)
	if err != nil {
		return nil, err
	}
	out := &pb.ListJunctionStatesResponse{}
	for _, s := range states {
		if s.Junction <= after && after != "" {
			continue
		}
		if len(out.States) == pageSize(r.PageSize) {
			out.NextPageToken = nextPage(r, out.States[len(out.States)-1].Junction)
			break
		}
		out.States = append(out.States, s)
	}
	for i, s := range out.States {
		out.States[i] = masked(s, r.ReadMask)
	}
	return out, nil
}

func (p *trafficPart) WatchJunctionStates(r *pb.WatchJunctionStatesRequest, out grpc.ServerStreamingServer[pb.WatchJunctionStatesResponse]) error {
	interval := r.Interval.AsDuration()
	if interval <= 0 {
		interval = time.Second
	}
	interval = max(interval, 50*time.Millisecond)
	ctx := out.Context()
	sent := map[string]*pb.JunctionState{}
	wait := time.NewTimer(0)
	defer wait.Stop()
	for first := true; ; first = false {
		next := p.a.g.changes() // before looking: what comes after is not missed
		states, height, err := p.a.g.states(r.Junctions)
		if err != nil {
			return err
		}
		m := &pb.WatchJunctionStatesResponse{Height: height}
		for _, s := range states {
			if sent[s.Junction] != s { // a state never changes: another one is another
				sent[s.Junction] = s
				m.States = append(m.States, s)
			}
		}
		if first || len(m.States) > 0 {
			if err := out.Send(m); err != nil {
				return err
			}
		}
		wait.Reset(interval)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-wait.C:
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-next:
		}
	}
}

// maxSpan bounds the time that one question about the past covers.
const maxSpan = 24 * time.Hour

// span reads the time of a question about the past.
func span(r interface {
	GetStartTime() *timestamppb.Timestamp
	GetEndTime() *timestamppb.Timestamp
}) (from, to time.Time, err error) {
	if from, err = asTime("start_time", r.GetStartTime()); err != nil {
		return
	}
	if to, err = asTime("end_time", r.GetEndTime()); err != nil {
		return
	}
	switch d := to.Sub(from); {
	case d <= 0:
		err = invalidField("end_time", "after", "must be later than start_time")
	case d > maxSpan:
		err = invalidField("end_time", "span", "at most 24 h after start_time")
	}
	return
}

// known refuses junctions that the registry does not have.
func (p *trafficPart) known(id string) error {
	if _, ok := p.a.registry().Junction(traffic.JunctionID(id)); !ok {
		return kind.Errorf(kind.NotFound, "junction: the registry has no %.63q", id)
	}
	return nil
}

func (p *trafficPart) ListJunctionHistory(ctx context.Context, r *pb.ListJunctionHistoryRequest) (*pb.ListJunctionHistoryResponse, error) {
	if err := checkMask(r.ReadMask, (*pb.JunctionState)(nil)); err != nil {
		return nil, err
	}
	if err := p.known(r.Junction); err != nil {
		return nil, err
	}
	from, to, err := span(r)
	if err != nil {
		return nil, err
	}
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	reg := p.a.registry()
	out := &pb.ListJunctionHistoryResponse{}
	page, err := p.a.audit.payloads(ctx, set(historyQuery(r.Junction, from, to, pageSize(r.PageSize)), "after", after))
	if err != nil {
		return nil, err
	}
	for i := range page.Records {
		if f := frameOf(&page.Records[i]); f != nil {
			s := stateOf(reg, f)
			s.Height, s.Index = page.Records[i].Height, page.Records[i].Index
			out.States = append(out.States, masked(s, r.ReadMask))
		}
	}
	out.NextPageToken = nextPage(r, page.Next)
	return out, nil
}

func historyQuery(junction string, from, to time.Time, limit int) map[string][]string {
	return map[string][]string{"kind": {string(identity.KindFrame)}, "junction": {junction}, "from": {rfc3339(from)}, "to": {rfc3339(to)},
		"order": {"oldest"}, "limit": {strconv.Itoa(limit)}}
}

// frameOf decodes a frame, nil where its payload was let go.
func frameOf(r *indexed) *traffic.Frame {
	if len(r.Envelope) == 0 {
		return nil
	}
	return wire.Candidate(r.Envelope, r.Salt).Frame
}

// stateOf is what a frame says of its junction.
func stateOf(reg *identity.Registry, f *traffic.Frame) *pb.JunctionState {
	s := &pb.JunctionState{Junction: string(f.Junction), Time: timestamp(f.Time), State: string(f.Signal.State), Stage: int32(f.Signal.Stage),
		Mode: string(f.Signal.Mode), Trip: f.Signal.Trip}
	if j, ok := reg.Junction(f.Junction); ok {
		if n := f.Signal.Stage; n >= 0 && n < len(j.Stages) {
			s.StageName = j.Stages[n].Name
		}
		s.Vehicles, s.Halted = queues(j, f)
	}
	return s
}

// maxBins bounds one answer of GetPerformance.
const maxBins = 1440

func (p *trafficPart) GetPerformance(ctx context.Context, r *pb.GetPerformanceRequest) (*pb.GetPerformanceResponse, error) {
	from, to, err := span(r)
	if err != nil {
		return nil, err
	}
	if err := p.known(r.Junction); err != nil {
		return nil, err
	}
	bin := r.Bin.AsDuration()
	switch {
	case bin == 0:
		bin = 15 * time.Minute
	case bin < 10*time.Second:
		return nil, invalidField("bin", "min", "at least 10 s")
	}
	if to.Sub(from) > maxBins*bin {
		return nil, invalidField("bin", "max_bins", "makes more than "+strconv.Itoa(maxBins)+" bins")
	}
	j, _ := p.a.registry().Junction(traffic.JunctionID(r.Junction))
	m := newMeasure(j, from, to, bin)
	q := historyQuery(r.Junction, from, to, 1000)
	for {
		page, err := p.a.audit.payloads(ctx, q)
		if err != nil {
			return nil, err
		}
		for i := range page.Records {
			if f := frameOf(&page.Records[i]); f != nil {
				m.add(f)
			}
		}
		if page.Next == "" {
			return &pb.GetPerformanceResponse{Bins: m.result()}, nil
		}
		q["after"] = []string{page.Next}
	}
}

// measure sums frames of a junction into bins of time. A periodic frame stands
// for its interval, which ends at its time.
type measure struct {
	j    *traffic.Junction
	from time.Time
	bin  time.Duration
	bins []binSum
	last int // stage of the frame before, -2 for none
}

type binSum struct {
	vehicles, frames, halted uint64
	maxHalted                uint32
	count                    []uint32
	green                    []time.Duration
	covered, degraded        time.Duration
}

func newMeasure(j *traffic.Junction, from, to time.Time, bin time.Duration) *measure {
	return &measure{j: j, from: from, bin: bin, bins: make([]binSum, int((to.Sub(from)+bin-1)/bin)), last: -2}
}

func (m *measure) add(f *traffic.Frame) {
	i := int(f.Time.Sub(m.from) / m.bin)
	if f.Time.Before(m.from) || i >= len(m.bins) {
		return
	}
	b := &m.bins[i]
	if b.count == nil {
		b.count, b.green = make([]uint32, len(m.j.Stages)), make([]time.Duration, len(m.j.Stages))
	}
	stage := f.Signal.Stage
	if stage >= 0 && stage < len(b.count) {
		if stage != m.last {
			b.count[stage]++
		}
		b.green[stage] += f.Interval
	}
	m.last = stage
	if f.Interval == 0 { // an event between
		return
	}
	b.covered += f.Interval
	if f.Signal.Mode != traffic.Coordinated {
		b.degraded += f.Interval
	}
	b.vehicles += crossed(m.j, f)
	_, halted := queues(m.j, f)
	b.frames++
	b.halted += uint64(halted)
	b.maxHalted = max(b.maxHalted, halted)
}

// crossed counts vehicles over the stop lines: by loops there, or by an oracle
// where there are none.
func crossed(j *traffic.Junction, f *traffic.Frame) (n uint64) {
	for _, kind := range []traffic.DetectorKind{traffic.StopLine, traffic.Oracle} {
		found := false
		for _, r := range f.Readings {
			if d, ok := j.Detector(r.Detector); ok && d.Kind == kind {
				found = true
				n += uint64(r.Count)
			}
		}
		if found {
			break
		}
	}
	return n
}

func (m *measure) result() []*pb.PerformanceBin {
	out := make([]*pb.PerformanceBin, 0, len(m.bins))
	for i, b := range m.bins {
		x := &pb.PerformanceBin{StartTime: timestamp(m.from.Add(time.Duration(i) * m.bin)), Vehicles: b.vehicles, MaxHalted: b.maxHalted, StageCount: b.count}
		if b.frames > 0 {
			x.MeanHalted = float64(b.halted) / float64(b.frames)
		}
		if b.covered > 0 {
			x.DegradedShare = float64(b.degraded) / float64(b.covered)
		}
		for _, g := range b.green {
			x.StageGreen = append(x.StageGreen, durationpb.New(g))
		}
		out = append(out, x)
	}
	return out
}

// The gateway's view, for the API. A state that was handed out never changes.

// live is what the API tells of one junction now.
type live struct {
	state *pb.JunctionState
	at    time.Time
}

// note takes a frame into what the API tells. Caller holds mu.
func (g *Gateway) note(reg *identity.Registry, f *traffic.Frame, height uint64, block, received time.Time, index uint64) {
	was := g.live[f.Junction]
	if f.Time.Before(was.at) {
		return
	}
	s := stateOf(reg, f)
	s.Height, s.Index = height, index
	s.ClockOffset = durationpb.New(f.Time.Sub(block))
	s.LastReceipt = timestamp(received)
	s.OverrideId = f.Signal.Override
	if was.state != nil {
		s.Rule = was.state.Rule
		if f.Interval == 0 { // an event says nothing of queues
			s.Vehicles, s.Halted = was.state.Vehicles, was.state.Halted
		}
	}
	g.live[f.Junction] = live{s, f.Time}
}

// amend changes the state of a junction, by a copy. Caller holds mu.
func (g *Gateway) amend(j traffic.JunctionID, f func(s *pb.JunctionState)) {
	was := g.live[j]
	if was.state == nil {
		return
	}
	s := proto.Clone(was.state).(*pb.JunctionState)
	f(s)
	g.live[j] = live{s, was.at}
}

// stateOf returns the newest agreed state of a junction.
func (g *Gateway) stateOf(j traffic.JunctionID) (*pb.JunctionState, error) {
	g.mu.Lock()
	l, ok := g.live[j]
	_, known := g.junctions[j]
	g.mu.Unlock()
	switch {
	case ok:
		return l.state, nil
	case known:
		return nil, kind.Errorf(kind.Unavailable, "junction: nothing of %.63q is agreed since the gateway started", string(j))
	}
	return nil, kind.Errorf(kind.NotFound, "junction: the registry has no %.63q", string(j))
}

// states returns those of some junctions, of all where none are named, in the
// order of their ids, and the height of the newest block.
func (g *Gateway) states(ids []string) ([]*pb.JunctionState, uint64, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var height uint64
	if n := len(g.blocks); n > 0 {
		height = g.blocks[n-1].Height
	}
	if len(ids) == 0 {
		out := make([]*pb.JunctionState, 0, len(g.live))
		for _, id := range slices.Sorted(maps.Keys(g.live)) {
			out = append(out, g.live[id].state)
		}
		return out, height, nil
	}
	out := make([]*pb.JunctionState, 0, len(ids))
	for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
		l, ok := g.live[traffic.JunctionID(id)]
		if _, known := g.junctions[traffic.JunctionID(id)]; !ok && !known {
			return nil, 0, kind.Errorf(kind.NotFound, "junctions: the registry has no %.63q", id)
		}
		if ok {
			out = append(out, l.state)
		}
	}
	return out, height, nil
}

// changes returns what is closed when there is something new.
func (g *Gateway) changes() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiters
}

// failed returns the detectors that break a rule.
func (g *Gateway) failed() map[traffic.JunctionID][]FailedDetector {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[traffic.JunctionID][]FailedDetector{}
	for id, j := range g.junctions {
		if len(j.Failed) > 0 {
			out[id] = j.Failed
		}
	}
	return out
}
