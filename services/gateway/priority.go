package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// priorityPart takes requests for priority and overrides, and tells what became
// of them.
//
// A request is put on record and then asked of signal-control directly, too: while
// nothing is agreed that decides alone. What becomes of it the part finds out by
// itself, from the agreed records, with a [priority.Book] of its own. It stores
// nothing: after a start it takes over the book of signal-control.
type priorityPart struct {
	pb.UnimplementedPriorityServiceServer
	a *API

	mu   sync.Mutex
	book *priority.Book
	// base is the newest block that the book came with; held are records that came
	// before the book did.
	base   uint64
	loaded bool
	held   []heldRecord
	lost   bool // some of them were given up
	// own are the records of requests that are durable and not agreed yet, by id.
	own map[string]*ownRequest
	// alone is what signal-control says while it decides alone.
	alone     map[string]*aloneRequest
	overrides map[string]*override
	changed   chan struct{} // closed and replaced at each change
}

type heldRecord struct {
	b     *decided.Block
	index uint64
	c     *validate.Candidate
}

type ownRequest struct {
	first    *traffic.Request
	revision uint64 // newest
	at       time.Time
	refused  string // by the rules, before it was put on record
}

type aloneRequest struct {
	m  *pb.Priority
	at time.Time
}

const (
	heldMost = 1 << 16
	ownMost  = 1 << 14
	ownAge   = 30 * time.Minute
	// bookWait is how long the book of signal-control is asked for at a start.
	bookWait = 5 * time.Second
	// directWait is how long signal-control may take to say that it decides alone.
	directWait = 300 * time.Millisecond
	// agreeWait is how long a change of a request waits to be agreed before it is
	// answered without.
	agreeWait = time.Second
	// defaultRequest is how long after its last arrival a request ends that does not
	// say when.
	defaultRequest = 10 * time.Minute
)

func newPriorityPart(a *API) *priorityPart {
	return &priorityPart{a: a, book: priority.NewBook(priority.Default(), rulesOf(a.registry())), own: map[string]*ownRequest{},
		alone: map[string]*aloneRequest{}, overrides: map[string]*override{}, changed: make(chan struct{})}
}

// rulesOf returns the timing rules that the district's policy in force names: how
// long a change takes says when a request is due.
func rulesOf(reg *identity.Registry) timing.Rules {
	for _, e := range reg.Entries(identity.TypePolicy) {
		var p identity.Policy
		if e.Status != identity.Active || json.Unmarshal(e.Body, &p) != nil {
			continue
		}
		if r, err := timing.RulesNamed(p.Rules); err == nil {
			return r
		}
	}
	r, err := timing.RulesNamed("field")
	if err != nil {
		return timing.Rules{} // unreachable: a constant name
	}
	return r
}

func (p *priorityPart) register(s *grpc.Server) { pb.RegisterPriorityServiceServer(s, p) }

const priorityService = "/stopline.v1.PriorityService/"

func (p *priorityPart) objects(_ context.Context, _ string, req proto.Message) ([]access.Object, error) {
	switch r := req.(type) {
	case *pb.RequestPriorityRequest, *pb.ListPrioritiesRequest:
		return nil, nil
	case *pb.OverrideRequest:
		return []access.Object{junctionObject(r.Junction)}, nil
	case *pb.ListOverridesRequest:
		if r.Junction == "" {
			return nil, nil
		}
		return []access.Object{junctionObject(r.Junction)}, nil
	case *pb.ReleaseOverrideRequest:
		p.mu.Lock()
		defer p.mu.Unlock()
		o, ok := p.overrides[r.Id]
		if !ok {
			return []access.Object{{Type: "Override", ID: r.Id}}, kind.Errorf(kind.NotFound, "id: there is no override %.26q", r.Id)
		}
		return []access.Object{{Type: "Override", ID: r.Id, Agency: o.o.By.Agency, Junction: string(o.o.Junction)}}, nil
	case interface{ GetId() string }:
		m := p.view(r.GetId())
		if m == nil {
			return []access.Object{{Type: "Request", ID: r.GetId()}}, kind.Errorf(kind.NotFound, "id: there is no request %.26q", r.GetId())
		}
		return []access.Object{requestObject(m)}, nil
	}
	return nil, nil
}

func requestObject(m *pb.Priority) access.Object {
	return access.Object{Type: "Request", ID: m.Request.Id, Agency: m.Request.Agency}
}

// derivedID makes an id that the same agency's same key gives again, also after a
// restart, and nobody else's.
func derivedID(what, agency, key string) string {
	h := sha256.Sum256([]byte("stopline " + what + " v1\n" + strconv.Itoa(len(agency)) + "\n" + agency + "\n" + key))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(h[:16]))
}

// accepted takes what was agreed.
func (p *priorityPart) accepted(b *decided.Block, r *decided.Record, c *validate.Candidate) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.Override != nil {
		p.agreedOverride(c.Override, r.Index)
	}
	if c.Frame != nil {
		p.showOverride(c.Frame)
	}
	if c.Request == nil && c.Frame == nil && c.Command == nil {
		return
	}
	if !p.loaded {
		if len(p.held) >= heldMost {
			p.held, p.lost = nil, true
		}
		p.held = append(p.held, heldRecord{b, r.Index, c})
		return
	}
	p.tell(b, r.Index, c)
}

// tell tells the book; mu is held.
func (p *priorityPart) tell(b *decided.Block, index uint64, c *validate.Candidate) {
	h := uint64(b.Header.Height)
	if h <= p.base {
		return // the book came with it
	}
	reg := p.a.registry() // that of the block: it changes after its records
	p.book.Block(h, b.Header.Time)
	switch {
	case c.Request != nil:
		p.book.Request(reg, index, c.Request)
		if o := p.own[c.Request.ID]; o != nil && o.revision <= c.Request.Revision {
			delete(p.own, c.Request.ID)
		}
	case c.Frame != nil:
		p.book.Frame(reg, c.Frame)
	case c.Command != nil:
		p.book.Command(c.Command)
	}
	if len(p.book.Changed()) > 0 {
		p.wake()
	}
}

// wake wakes whoever waits for a change; mu is held.
func (p *priorityPart) wake() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// run takes over signal-control's book, listens to what it decides alone, and has
// units told until they have heard.
func (p *priorityPart) run(ctx context.Context) error {
	return run.All(ctx,
		run.Actor{Name: "book", Run: p.load},
		run.Actor{Name: "priorities", Run: func(ctx context.Context) error {
			return p.a.bus().Subscribe(ctx, topic.PriorityAll(p.a.district()), func(_ string, data []byte) { p.heard(data) })
		}},
		run.Actor{Name: "status", Run: p.hearUnits},
		run.Actor{Name: "overrides", Run: p.tellUnits},
	)
}

// load asks signal-control for its book. Where there is none the part begins with
// what is agreed from now on.
func (p *priorityPart) load(ctx context.Context) error {
	deadline := time.Now().Add(bookWait)
	for {
		err := p.fetch(ctx)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		if time.Now().After(deadline) {
			p.a.log().Warn("gateway: what was asked before this start is not known: signal-control does not say", "err", err)
			p.mu.Lock()
			p.begin()
			p.mu.Unlock()
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
	<-ctx.Done()
	return nil
}

func (p *priorityPart) fetch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	b, err := p.a.bus().Request(ctx, topic.Ask(p.a.district(), topic.SignalControlUser, "priority-book"), nil)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return errors.New("signal-control has none")
	}
	book := priority.NewBook(priority.Default(), rulesOf(p.a.registry()))
	if err := book.Restore(b); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if first := p.firstHeld(); first > book.Known()+1 || p.lost {
		p.held, p.lost = nil, false
		return fmt.Errorf("signal-control is at block %d, this is at %d", book.Known(), first)
	}
	p.book, p.base = book, book.Known()
	p.begin()
	return nil
}

func (p *priorityPart) firstHeld() uint64 {
	if len(p.held) == 0 {
		return 0
	}
	return uint64(p.held[0].b.Header.Height)
}

// begin goes on with the book there is; mu is held.
func (p *priorityPart) begin() {
	p.loaded = true
	for _, h := range p.held {
		p.tell(h.b, h.index, h.c)
	}
	p.held = nil
	p.wake()
}

// heard takes what signal-control says. What it decided by agreement follows from
// the log; only what it decides alone is news.
func (p *priorityPart) heard(data []byte) {
	m, err := wire.DecodePriority(data)
	if err != nil {
		p.a.log().Warn("gateway: signal-control's word on a request cannot be read", "err", err)
		return
	}
	if !m.Request.Degraded {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.decidedAlone(m)
}

func (p *priorityPart) decidedAlone(m *pb.Priority) {
	now := p.a.now()
	for id, x := range p.alone {
		if now.Sub(x.at) > ownAge {
			delete(p.alone, id)
		}
	}
	if len(p.alone) < ownMost {
		p.alone[m.Request.Id] = &aloneRequest{m, now}
		p.wake()
	}
}

// view is a request as it stands, nil where there is none. mu must not be held.
func (p *priorityPart) view(id string) *pb.Priority {
	p.a.g.mu.Lock()
	sealed := p.a.g.sealed.Size
	p.a.g.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.viewLocked(id, sealed)
}

func (p *priorityPart) viewLocked(id string, sealed uint64) *pb.Priority {
	if e, ok := p.book.Entry(id); ok {
		m := wire.PriorityToProto(e)
		m.Sealed = m.Index < sealed
		// The whole was refused, or its newest change: people want to know why.
		for _, s := range m.Progress {
			if s.Rule == "" {
				s.Rule = e.Rule
			}
		}
		return m
	}
	if x := p.alone[id]; x != nil {
		return proto.Clone(x.m).(*pb.Priority)
	}
	o := p.own[id]
	if o == nil {
		return nil
	}
	m := &pb.Priority{Request: wire.RequestToProto(o.first), State: pb.PriorityState_PRIORITY_STATE_RECEIVED}
	rule := "received: on record, and not agreed yet"
	if o.refused != "" {
		m.State, rule = pb.PriorityState_PRIORITY_STATE_REJECTED, o.refused
	}
	for _, s := range m.Request.Stops {
		m.Progress = append(m.Progress, &pb.PriorityProgress{Junction: s.Junction, Group: s.Group, State: m.State, Rule: rule, Arrival: s.Arrival, Since: m.Request.Requested})
	}
	return m
}

// asked makes a request's record of what a client asks. Its errors name the field.
func (p *priorityPart) asked(ctx context.Context, in *pb.PriorityRequest, key string) (*traffic.Request, error) {
	by := caller(ctx)
	for field, given := range map[string]bool{
		"district": in.District != "" && in.District != string(p.a.district()), "id": in.Id != "", "agency": in.Agency != "", "requester": in.Requester != "",
		"requested": in.Requested != nil, "degraded": in.Degraded, "revision": in.Revision != 0, "cancelled": in.Cancelled,
		"purpose": in.Purpose != "" && in.Purpose != by.purpose, "case_number": in.CaseNumber != "" && in.CaseNumber != by.caseNo,
	} {
		if given {
			return nil, invalidField("request."+field, "given-by-the-gateway", "is not for clients to say")
		}
	}
	if want := map[pb.PriorityClass]string{pb.PriorityClass_PRIORITY_CLASS_EMERGENCY: "emergency-response", pb.PriorityClass_PRIORITY_CLASS_TRANSIT: "transit-service"}[in.Class]; want != by.purpose {
		return nil, invalidField("request.class", "purpose", fmt.Sprintf("goes with purpose %s, this call is for %s", want, by.purpose))
	}
	now := p.a.now().UTC()
	r := &traffic.Request{District: p.a.district(), Time: now, ID: derivedID("request", by.by.Client.Agency, key), Revision: 1,
		By: traffic.Agent{Agency: by.by.Client.Agency, Name: by.by.ID}, Class: traffic.Priority(in.Class), Vehicle: in.Vehicle, Line: in.Line,
		Lateness: in.Lateness.AsDuration().Truncate(time.Millisecond), Purpose: by.purpose, Case: clip(by.caseNo)}
	var err error
	if r.Stops, err = stopsOf("request.stops", in.Stops); err != nil {
		return nil, err
	}
	if r.Expires, err = asTime("request.expires", in.Expires); err != nil {
		return nil, err
	}
	if r.Expires.IsZero() {
		r.Expires = r.Stops[len(r.Stops)-1].Arrival.Add(defaultRequest)
		if most := now.Add(2 * time.Hour); r.Expires.After(most) {
			r.Expires = most
		}
	}
	return r, p.judge(identity.KindRequest, wire.EncodeRequest(r))
}

func stopsOf(field string, in []*pb.PriorityStop) ([]traffic.Stop, error) {
	var out []traffic.Stop
	for i, s := range in {
		at, err := asTime(fmt.Sprintf("%s[%d].arrival", field, i), s.GetArrival())
		if err != nil {
			return nil, err
		}
		out = append(out, traffic.Stop{Junction: traffic.JunctionID(s.GetJunction()), Group: s.GetGroup(), Arrival: at})
	}
	return out, nil
}

// judge puts a record that is to be made before the validators' rules: what they
// would refuse is not put on record.
func (p *priorityPart) judge(k identity.RecordKind, payload []byte) error {
	e := identity.Sign(p.a.key(), k, identity.Protobuf, payload)
	c := wire.Candidate(e.Marshal(), make([]byte, 32))
	if c.Err != nil {
		return kind.Errorf(kind.Invalid, "request: %w", c.Err)
	}
	// Its number is given when it is put on record.
	if c.Request != nil {
		c.Request.Turn = traffic.Turn{Epoch: 1, Seq: 1}
	}
	if c.Override != nil {
		c.Override.Turn = traffic.Turn{Epoch: 1, Seq: 1}
	}
	c.SignatureValid = true
	if v := validate.NewState(validate.Edge()).Judge(p.a.registry(), p.a.now(), &c); !v.OK {
		field, text, ok := strings.Cut(v.Reason, ": ")
		if !ok {
			field, text = "request", v.Reason
		}
		return invalidField(field, string(v.Rule), text)
	}
	return nil
}

// record puts a request on record, and asks signal-control directly.
func (p *priorityPart) record(ctx context.Context, r *traffic.Request) error {
	var payload []byte
	if _, err := p.a.recorder.Put(ctx, identity.KindRequest, false, func(t traffic.Turn) []byte {
		r.Turn = t
		payload = wire.EncodeRequest(r)
		return payload
	}); err != nil {
		return err
	}
	// The same bytes that are on record: a signature of Ed25519 has one value.
	p.direct(ctx, r, identity.Sign(p.a.key(), identity.KindRequest, identity.Protobuf, payload).Marshal())
	return nil
}

// direct asks signal-control without waiting for agreement. Where it decides alone
// that is put on record too.
func (p *priorityPart) direct(ctx context.Context, r *traffic.Request, envelope []byte) {
	wait, cancel := context.WithTimeout(ctx, directWait)
	defer cancel()
	b, err := p.a.bus().Request(wait, topic.Ask(p.a.district(), topic.SignalControlUser, "priority"), envelope)
	if err == nil && len(b) > 0 {
		var m *pb.Priority
		if m, err = wire.DecodePriority(b); err == nil && m.Request.Degraded && r.Revision == 1 {
			p.mu.Lock()
			p.decidedAlone(m)
			p.mu.Unlock()
			err = p.mark(ctx, r)
		}
	}
	if err != nil { // what is on record comes to it by agreement
		p.a.log().Warn("gateway: signal-control could not be asked directly", "request", r.ID, "err", err)
	}
}

// mark puts on record that a request was decided without agreement.
func (p *priorityPart) mark(ctx context.Context, r *traffic.Request) error {
	next := *r
	next.Degraded, next.Time = true, p.a.now().UTC()
	p.mu.Lock()
	next.Revision = p.nextRevision(r.ID)
	p.mu.Unlock()
	_, err := p.a.recorder.Put(ctx, identity.KindRequest, false, func(t traffic.Turn) []byte {
		next.Turn = t
		return wire.EncodeRequest(&next)
	})
	return err
}

// nextRevision numbers the next record of a request; mu is held.
func (p *priorityPart) nextRevision(id string) uint64 {
	n := uint64(1)
	if e, ok := p.book.Entry(id); ok {
		n = e.Request.Revision
	}
	o := p.own[id]
	if o == nil {
		o = &ownRequest{revision: n, at: p.a.now()}
		if e, ok := p.book.Entry(id); ok {
			o.first = &e.Request
		}
		p.own[id] = o
	}
	o.revision = max(o.revision, n) + 1
	return o.revision
}

func (p *priorityPart) RequestPriority(ctx context.Context, in *pb.RequestPriorityRequest) (*pb.RequestPriorityResponse, error) {
	r, err := p.asked(ctx, in.Request, in.IdempotencyKey)
	if err != nil {
		// The same key is the same request, also when its arrivals are over by now.
		if m := p.view(derivedID("request", caller(ctx).by.Client.Agency, in.IdempotencyKey)); m == nil || !sameRequest(m, in.Request) {
			return nil, err
		}
	}
	if r != nil {
		p.mu.Lock()
		known := p.viewLocked(r.ID, math.MaxUint64) != nil
		now := p.a.now()
		if !known {
			for id, o := range p.own {
				if now.Sub(o.at) > ownAge {
					delete(p.own, id)
				}
			}
			if len(p.own) >= ownMost {
				p.mu.Unlock()
				return nil, kind.Errorf(kind.Unavailable, "%d requests wait to be agreed already", ownMost)
			}
			o := &ownRequest{first: r, revision: 1, at: now}
			if p.loaded {
				o.refused = p.book.Check(p.a.registry(), now, r)
			}
			p.own[r.ID] = o
			if strings.HasPrefix(o.refused, priority.RuleQuota) {
				// A stolen credential must not fill the log; that it was asked is on record.
				p.mu.Unlock()
				return &pb.RequestPriorityResponse{Priority: p.view(r.ID)}, nil
			}
		}
		p.mu.Unlock()
		if !known {
			if err := p.record(ctx, r); err != nil {
				p.mu.Lock()
				delete(p.own, r.ID) // asked again it is put on record again
				p.mu.Unlock()
				return nil, err
			}
		}
	}
	m := p.view(derivedID("request", caller(ctx).by.Client.Agency, in.IdempotencyKey))
	if m == nil {
		return nil, kind.Errorf(kind.Internal, "request: is not known after it was put on record")
	}
	if !sameRequest(m, in.Request) {
		return nil, kind.Errorf(kind.Conflict, "idempotency_key: was used for another request, %s", m.Request.Id)
	}
	return &pb.RequestPriorityResponse{Priority: m}, nil
}

// sameRequest reports whether a request asks what is known already. Arrivals may
// have been changed since.
func sameRequest(m *pb.Priority, in *pb.PriorityRequest) bool {
	r := m.Request
	if r.Class != in.Class || r.Vehicle != in.Vehicle || r.Line != in.Line {
		return false
	}
	if r.Revision > 1 {
		return true
	}
	return slices.EqualFunc(r.Stops, in.Stops, func(a, b *pb.PriorityStop) bool {
		return a.Junction == b.Junction && a.Group == b.Group && equalTime(a.Arrival, b.Arrival)
	})
}

func equalTime(a, b *timestamppb.Timestamp) bool { return a.AsTime().Equal(b.AsTime()) }

func (p *priorityPart) GetPriority(_ context.Context, in *pb.GetPriorityRequest) (*pb.GetPriorityResponse, error) {
	m := p.view(in.Id)
	if m == nil {
		return nil, kind.Errorf(kind.NotFound, "id: there is no request %.26q", in.Id)
	}
	return &pb.GetPriorityResponse{Priority: m}, nil
}

func (p *priorityPart) ListPriorities(ctx context.Context, in *pb.ListPrioritiesRequest) (*pb.ListPrioritiesResponse, error) {
	after, err := pageAt(in, in.PageToken)
	if err != nil {
		return nil, err
	}
	out := &pb.ListPrioritiesResponse{}
	for _, id := range p.ids() {
		if id.key <= after && after != "" {
			continue
		}
		m := p.view(id.id)
		// Whose requests may be seen is said for each.
		if m == nil || !in.Ended && ended(m.State) || !p.a.may(ctx, priorityService+"GetPriority", requestObject(m)) {
			continue
		}
		if len(out.Priorities) == pageSize(in.PageSize) {
			break
		}
		out.Priorities = append(out.Priorities, m)
		if len(out.Priorities) == pageSize(in.PageSize) {
			out.NextPageToken = nextPage(in, id.key)
		}
	}
	return out, nil
}

// idAt is a request with its place in a list, the oldest first.
type idAt struct{ key, id string }

func (p *priorityPart) ids() []idAt {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []idAt
	have := map[string]bool{}
	for _, e := range p.book.All() {
		have[e.Request.ID] = true
		out = append(out, idAt{fmt.Sprintf("%020d", e.Order), e.Request.ID})
	}
	// Those that are not agreed come after all that are.
	for id, o := range p.own {
		if !have[id] && o.first != nil {
			have[id] = true
			out = append(out, idAt{fmt.Sprintf("~%020d %s", o.at.UnixNano(), id), id})
		}
	}
	for id := range p.alone {
		if !have[id] {
			out = append(out, idAt{"~~" + id, id})
		}
	}
	slices.SortFunc(out, func(a, b idAt) int { return strings.Compare(a.key, b.key) })
	return out
}

func ended(s pb.PriorityState) bool { return priority.State(s).Ended() }

func (p *priorityPart) WatchPriority(in *pb.WatchPriorityRequest, out grpc.ServerStreamingServer[pb.WatchPriorityResponse]) error {
	ctx := out.Context()
	var last *pb.Priority
	for {
		p.mu.Lock()
		next := p.changed // before looking: what comes after is not missed
		p.mu.Unlock()
		m := p.view(in.Id)
		if m == nil {
			return kind.Errorf(kind.NotFound, "id: there is no request %.26q", in.Id)
		}
		if !proto.Equal(m, last) {
			if err := out.Send(&pb.WatchPriorityResponse{Priority: m}); err != nil {
				return err
			}
			last = m
		}
		if ended(m.State) && m.Index > 0 || ended(m.State) && m.State == pb.PriorityState_PRIORITY_STATE_REJECTED {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-next:
		case <-time.After(time.Second): // seals come without a word
		}
	}
}

// change puts a later record of a request on record and waits a little for it to
// be agreed.
func (p *priorityPart) change(ctx context.Context, id string, edit func(*traffic.Request) error) (*pb.Priority, error) {
	by := caller(ctx)
	p.mu.Lock()
	var r traffic.Request
	e, ok := p.book.Entry(id)
	o := p.own[id]
	switch {
	case ok && e.State.Ended():
		p.mu.Unlock()
		return nil, kind.Errorf(kind.Stale, "id: request %s has ended: %s", id, e.State)
	case ok:
		r = e.Request
	case o != nil && o.first != nil && o.refused == "":
		r = *o.first
	default:
		p.mu.Unlock()
		return nil, kind.Errorf(kind.NotFound, "id: there is no request %.26q under way", id)
	}
	if by.by.Client.Agency != r.By.Agency {
		p.mu.Unlock()
		return nil, kind.Errorf(kind.Denied, "id: request %s is another agency's", id)
	}
	r.Time, r.By.Name, r.Degraded = p.a.now().UTC(), by.by.ID, false
	if err := edit(&r); err != nil {
		p.mu.Unlock()
		return nil, err
	}
	if err := p.judge(identity.KindRequest, wire.EncodeRequest(&r)); err != nil {
		p.mu.Unlock()
		return nil, err
	}
	r.Revision = p.nextRevision(id)
	p.mu.Unlock()
	if err := p.record(ctx, &r); err != nil {
		return nil, err
	}
	deadline := time.NewTimer(agreeWait)
	defer deadline.Stop()
	for {
		p.mu.Lock()
		next := p.changed
		e, ok := p.book.Entry(id)
		p.mu.Unlock()
		if ok && e.Request.Revision >= r.Revision {
			if e.Request.Revision == r.Revision && e.Rule != priority.RuleIn && !e.State.Ended() {
				return nil, kind.Errorf(kind.Stale, "request: the change is refused by %s", e.Rule)
			}
			break
		}
		select {
		case <-next:
			continue
		case <-ctx.Done():
		case <-deadline.C:
		}
		break
	}
	m := p.view(id)
	if m == nil {
		return nil, kind.Errorf(kind.Internal, "request: is not known after it was put on record")
	}
	return m, nil
}

func (p *priorityPart) UpdateArrival(ctx context.Context, in *pb.UpdateArrivalRequest) (*pb.UpdateArrivalResponse, error) {
	stops, err := stopsOf("stops", in.Stops)
	if err != nil {
		return nil, err
	}
	m, err := p.change(ctx, in.Id, func(r *traffic.Request) error {
		r.Stops = stops
		return nil
	})
	return &pb.UpdateArrivalResponse{Priority: m}, err
}

func (p *priorityPart) CancelPriority(ctx context.Context, in *pb.CancelPriorityRequest) (*pb.CancelPriorityResponse, error) {
	if m := p.view(in.Id); m != nil && m.State == pb.PriorityState_PRIORITY_STATE_CANCELLED {
		return &pb.CancelPriorityResponse{Priority: m}, nil
	}
	m, err := p.change(ctx, in.Id, func(r *traffic.Request) error {
		r.Cancelled = true
		return nil
	})
	return &pb.CancelPriorityResponse{Priority: m}, err
}
