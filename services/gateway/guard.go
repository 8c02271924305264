package gateway

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// The metadata of a call, in gRPC and as headers in HTTP.
const (
	headerPurpose = "stopline-purpose"
	headerCase    = "stopline-case"
	headerBasis   = "stopline-legal-basis"
	// headerCovert asks that the reading stays out of listings for so many days, at
	// most as many as its purpose allows.
	headerCovert = "stopline-covert-days"
	// HeaderReceipt carries the answer's AccessReceipt, base64.
	HeaderReceipt = "stopline-access-receipt"
	// Between our own REST door and the gRPC server: a secret of this process, and
	// whose certificate the door has seen.
	headerInner = "stopline-inner"
	headerCert  = "stopline-inner-certificate"
	headerFrom  = "stopline-inner-from"
)

// Guard stands before every method: who asks, what for, may they, is it within
// bounds, and is it on record. No method can be reached around it. Open it first.
type Guard struct {
	District traffic.DistrictID
	Auth     *Authenticator
	// Engine is the access policy in force; nil grants the public methods only.
	Engine func() *access.Engine
	// Recorder is asked before every answer that is not public.
	Recorder *Recorder
	Limits   *Limits
	// Objects says what a request is about.
	Objects func(ctx context.Context, method string, req proto.Message) ([]access.Object, error)
	// Approved says which second person has approved a request, empty for nobody.
	Approved func(req proto.Message, c call) string
	Now      func() time.Time
	Log      *slog.Logger
	// Inner is the secret of the REST door.
	Inner string

	validator protovalidate.Validator
	counted   counted

	calls, denied, unauthenticated, invalid, limited, unrecorded atomic.Uint64
}

// GuardCounts count calls since the start.
type GuardCounts struct {
	Calls, Denied, Unauthenticated, Invalid, Limited, Unrecorded uint64
}

// Open makes the guard ready.
func (g *Guard) Open() (err error) {
	if g.Auth == nil || g.Engine == nil || g.Recorder == nil || g.Limits == nil || g.Now == nil || g.Log == nil {
		return errors.New("gateway: guard: all of Auth, Engine, Recorder, Limits, Now and Log are needed")
	}
	g.validator, err = protovalidate.New()
	return err
}

// Counts returns the counts so far.
func (g *Guard) Counts() GuardCounts {
	return GuardCounts{g.calls.Load(), g.denied.Load(), g.unauthenticated.Load(), g.invalid.Load(), g.limited.Load(), g.unrecorded.Load()}
}

// call is what the guard knows of a call, for the methods behind it.
type call struct {
	by      access.Principal
	purpose string
	caseNo  string
	basis   string
	// approved is the second person, where there is one.
	approved string
	// source is where a call of the public comes from.
	source string
}

type callKey struct{}

// caller returns who asks, in a method behind the guard.
func caller(ctx context.Context) call {
	c, _ := ctx.Value(callKey{}).(call)
	return c
}

func first(md metadata.MD, key string) string {
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// who says who asks: by certificate, else by token, else the public.
func (g *Guard) who(ctx context.Context, md metadata.MD) (access.Principal, error) {
	if v := md.Get("authorization"); len(v) > 0 {
		token, ok := strings.CutPrefix(v[0], "Bearer ")
		if !ok || len(v) > 1 {
			return access.Principal{}, nobody("authorization: must be one Bearer token")
		}
		return g.Auth.Bearer(ctx, token)
	}
	if inner := first(md, headerInner); inner != "" {
		if g.Inner == "" || subtle.ConstantTimeCompare([]byte(inner), []byte(g.Inner)) != 1 {
			return access.Principal{}, nobody("%s: is not for others to send", headerInner)
		}
		if c := first(md, headerCert); c != "" {
			return g.Auth.CertificateKey(c)
		}
		return access.Principal{}, nil
	}
	if p, ok := peer.FromContext(ctx); ok {
		if t, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(t.State.PeerCertificates) > 0 {
			return g.Auth.Certificate(t.State.PeerCertificates[0])
		}
	}
	return access.Principal{}, nil
}

// refuse makes an error with its machine-readable reason.
func refuse(c codes.Code, reason, text string, details ...protoadapt.MessageV1) error {
	st := status.New(c, text)
	details = append(details, &errdetails.ErrorInfo{Reason: reason, Domain: "stopline"})
	if d, err := st.WithDetails(details...); err == nil {
		st = d
	}
	return st.Err()
}

// enter does everything that comes before a method. It returns the call, the
// access decision's record as it was made, and what to do when the call is over.
func (g *Guard) enter(ctx context.Context, method string, req proto.Message) (context.Context, *entered, error) {
	g.calls.Add(1)
	m, ok := access.Methods[method]
	if !ok {
		return ctx, nil, refuse(codes.Unimplemented, "UNKNOWN_METHOD", "method: is not known")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	by, err := g.who(ctx, md)
	if err != nil {
		g.unauthenticated.Add(1)
		if !errors.Is(err, errNobody) {
			return ctx, nil, refuse(codes.Unavailable, "ISSUER_UNREACHABLE", err.Error())
		}
		return ctx, nil, refuse(codes.Unauthenticated, "CREDENTIALS", err.Error())
	}
	if by.ID == "" && !m.Public {
		g.unauthenticated.Add(1)
		return ctx, nil, refuse(codes.Unauthenticated, "CREDENTIALS", "credentials: a client certificate or a Bearer token is needed")
	}
	c := call{by: by, purpose: first(md, headerPurpose), caseNo: first(md, headerCase), basis: first(md, headerBasis), source: g.source(ctx, md)}
	release, wait, ok := g.Limits.Enter(c.account(), method, m)
	if !ok {
		g.limited.Add(1)
		return ctx, nil, refuse(codes.ResourceExhausted, "LIMIT", fmt.Sprintf("limit: too many calls, try again in %s", wait), retryIn(wait))
	}
	e := &entered{g: g, method: method, m: m, release: release, call: c}
	if err := g.decide(ctx, e, md, req); err != nil {
		release()
		return ctx, e, err // what is on record has a receipt
	}
	return context.WithValue(ctx, callKey{}, e.call), e, nil
}

// account is whose limits a call counts against.
func (c call) account() string {
	if c.by.ID == "" {
		return "\x00" + c.source // no agency's name
	}
	return c.by.Client.Agency
}

// source is the address that a call comes from.
func (g *Guard) source(ctx context.Context, md metadata.MD) string {
	if first(md, headerInner) == g.Inner && g.Inner != "" {
		return first(md, headerFrom)
	}
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}

// entered is a call that is under way.
type entered struct {
	g       *Guard
	method  string
	m       access.Method
	call    call
	objects []access.Object
	record  traffic.Access
	promise Promise
	release func()
}

// decide checks the request, asks the policy, and puts the answer on record.
func (g *Guard) decide(ctx context.Context, e *entered, md metadata.MD, req proto.Message) error {
	if err := g.validator.Validate(req); err != nil {
		g.invalid.Add(1)
		return invalid(err)
	}
	if e.m.Public {
		return nil
	}
	covert, err := covertDays(md)
	if err != nil {
		g.invalid.Add(1)
		return err
	}
	var unresolved error
	if g.Objects != nil {
		e.objects, unresolved = g.Objects(context.WithValue(ctx, callKey{}, e.call), e.method, req)
	}
	if g.Approved != nil {
		e.call.approved = g.Approved(req, e.call)
	}
	d := g.may(e, e.call.by)
	if d.Granted && covert > d.CovertDays {
		d = access.Decision{Reason: fmt.Sprintf("%s: purpose %s allows at most %d days", headerCovert, e.call.purpose, d.CovertDays)}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		return refuse(codes.Internal, "INTERNAL", "request: cannot be encoded again")
	}
	e.record = traffic.Access{District: g.District, Time: g.Now().UTC(), By: traffic.Agent{Agency: e.call.by.Client.Agency, Name: e.call.by.ID},
		Method: e.method, Purpose: clip(e.call.purpose), Case: clip(e.call.caseNo), LegalBasis: clip(e.call.basis), Granted: d.Granted, Policies: d.Policies,
		Phase: traffic.AccessUnary, Count: 1, Request: sha256.Sum256(b)}
	if d.Granted && covert > 0 { // what was denied is never hidden
		e.record.CovertUntil = e.record.Time.AddDate(0, 0, covert)
	}
	for _, o := range e.objects[:min(len(e.objects), 1000)] {
		e.record.Objects = append(e.record.Objects, o.String())
	}
	if e.m.Stream {
		e.record.Phase = traffic.AccessOpened
	}
	if err := g.put(ctx, e, d.Granted); err != nil {
		g.unrecorded.Add(1)
		return err
	}
	if !d.Granted {
		g.denied.Add(1)
		return refuse(codes.PermissionDenied, "POLICY", d.Reason)
	}
	return unresolved
}

// may asks the policy about a call as it is now.
func (g *Guard) may(e *entered, by access.Principal) access.Decision {
	return g.Engine().Decide(access.Call{Principal: by, Method: e.method, Objects: e.objects, Purpose: e.call.purpose, Case: e.call.caseNo,
		LegalBasis: e.call.basis, ApprovedBy: e.call.approved, Time: g.Now()})
}

// covertDays reads for how long a reading is to stay out of listings.
func covertDays(md metadata.MD) (int, error) {
	v := first(md, headerCovert)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > 366 {
		return 0, invalidField(headerCovert, "range", "must be a number of days, 1 to 366")
	}
	return n, nil
}

// clip bounds what somebody has written into a header, for a record.
func clip(s string) string {
	if s = strings.ToValidUTF8(s, "\uFFFD"); len(s) > 128 {
		s = strings.ToValidUTF8(s[:128], "")
	}
	return s
}

// put puts a call on record; where many alike come in a minute the first stands
// for itself and the rest are counted.
func (g *Guard) put(ctx context.Context, e *entered, granted bool) error {
	if e.m.Counted && granted && !g.counted.first(e, g.Now()) {
		return nil
	}
	if e.m.Counted && granted {
		e.record.Phase = traffic.AccessCounted
	}
	awaited := e.m.Agreed && granted
	p, err := g.Recorder.Put(ctx, identity.KindAccess, awaited, encodeAccess(e.record))
	if err == nil && awaited {
		_, err = g.Recorder.WaitAgreed(ctx, p)
	}
	if err != nil {
		return refuse(codes.Unavailable, "NOT_ON_RECORD", err.Error(), retryIn(time.Second))
	}
	e.promise = p
	return nil
}

func encodeAccess(a traffic.Access) func(traffic.Turn) []byte {
	return func(t traffic.Turn) []byte { a.Turn = t; return wire.EncodeAccess(&a) }
}

// receipt is the header of an answer, empty where there is none.
func (e *entered) receipt() metadata.MD {
	if e == nil || e.promise == (Promise{}) {
		return nil
	}
	b, err := proto.Marshal(e.g.Recorder.Receipt(e.promise))
	if err != nil {
		return nil // a message of ours, with fields that are bytes: it marshals
	}
	return metadata.Pairs(HeaderReceipt, base64.StdEncoding.EncodeToString(b))
}

// Unary is the interceptor of single answers.
func (g *Guard) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	m, ok := req.(proto.Message)
	if !ok {
		return nil, refuse(codes.Internal, "INTERNAL", "request: is no message")
	}
	ctx, e, err := g.enter(ctx, info.FullMethod, m)
	if md := e.receipt(); md != nil {
		if err := grpc.SetHeader(ctx, md); err != nil {
			return nil, refuse(codes.Internal, "INTERNAL", "header: "+err.Error())
		}
	}
	if err != nil {
		return nil, err
	}
	defer e.release()
	return handler(ctx, req)
}

// recheck is how often a stream's right to go on is looked at again.
const recheck = 2 * time.Second

// Stream is the interceptor of streams. The request is the first message; the
// method gets it from a stream that hands it out again.
func (g *Guard) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if strings.HasPrefix(info.FullMethod, "/grpc.reflection.") { // says what the API is, and that is public
		md, _ := metadata.FromIncomingContext(ss.Context())
		release, wait, ok := g.Limits.Enter(call{source: g.source(ss.Context(), md)}.account(), info.FullMethod, access.Method{Public: true, Stream: true})
		if !ok {
			return refuse(codes.ResourceExhausted, "LIMIT", fmt.Sprintf("limit: too many calls, try again in %s", wait), retryIn(wait))
		}
		defer release()
		return handler(srv, ss)
	}
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	s := &guarded{ServerStream: ss, ctx: ctx}
	s.enter = func(m proto.Message) error {
		ctx, e, err := g.enter(s.ctx, info.FullMethod, m)
		if md := e.receipt(); md != nil {
			if err := ss.SetHeader(md); err != nil && ctx.Err() == nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		s.ctx, s.entered = ctx, e
		s.watch.Go(func() { g.watch(ctx, cancel, e, s) })
		return nil
	}
	err := handler(srv, s)
	cause := context.Cause(ctx)
	cancel(nil)
	s.watch.Wait()
	if s.entered == nil {
		return err
	}
	s.entered.release()
	if err := g.closeStream(s); err != nil {
		return err
	}
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(cause, &st) { // ended by us, with the reason
		return cause
	}
	return err
}

// closeStream puts the end of a stream on record. The stream's context may have
// ended with it.
func (g *Guard) closeStream(s *guarded) error {
	e := s.entered
	if e.m.Public {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), 5*time.Second)
	defer cancel()
	r := e.record
	r.Phase, r.Time, r.Count = traffic.AccessClosed, g.Now().UTC(), max(s.sent.Load(), 1)
	if _, err := g.Recorder.Put(ctx, identity.KindAccess, false, encodeAccess(r)); err != nil {
		g.unrecorded.Add(1)
		g.Log.Error("gateway: the end of a stream is not on record", "client", e.call.by.ID, "method", e.method, "err", err)
		return refuse(codes.Unavailable, "NOT_ON_RECORD", err.Error())
	}
	return nil
}

// watch records a stream once a minute, and ends it when its right has ended.
func (g *Guard) watch(ctx context.Context, end context.CancelCauseFunc, e *entered, s *guarded) {
	if e.m.Public {
		return
	}
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	minute := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		by, ok := g.Auth.Still(e.call.by.ID)
		d := access.Decision{Reason: "client: is not in the registry any more"}
		if ok {
			d = g.may(e, by)
		}
		if !d.Granted {
			g.denied.Add(1)
			end(refuse(codes.PermissionDenied, "POLICY", d.Reason))
			return
		}
		if time.Since(minute) < time.Minute {
			continue
		}
		minute = time.Now()
		r := e.record
		r.Phase, r.Time, r.Count = traffic.AccessMinute, g.Now().UTC(), max(s.sent.Load(), 1)
		if _, err := g.Recorder.Put(ctx, identity.KindAccess, false, encodeAccess(r)); err != nil && ctx.Err() == nil {
			g.unrecorded.Add(1)
			end(refuse(codes.Unavailable, "NOT_ON_RECORD", err.Error()))
			return
		}
	}
}

// guarded is a stream behind the guard.
type guarded struct {
	grpc.ServerStream
	ctx     context.Context
	enter   func(proto.Message) error
	entered *entered
	sent    atomic.Uint64
	watch   sync.WaitGroup
}

func (s *guarded) Context() context.Context { return s.ctx }

func (s *guarded) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if s.entered != nil {
		return nil
	}
	p, ok := m.(proto.Message)
	if !ok {
		return refuse(codes.Internal, "INTERNAL", "request: is no message")
	}
	return s.enter(p)
}

func (s *guarded) SendMsg(m any) error {
	if s.entered == nil { // a method that answers before it was asked
		return refuse(codes.Internal, "INTERNAL", "stream: answered before the request was checked")
	}
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	if err := s.ServerStream.SendMsg(m); err != nil {
		return err
	}
	s.sent.Add(1)
	return nil
}

// invalidField refuses a request for one field.
func invalidField(field, rule, text string) error {
	return refuse(codes.InvalidArgument, "INVALID", field+": "+text,
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: text, Reason: rule}}})
}

// invalid names the field and the rule of a request that is refused.
func invalid(err error) error {
	var v *protovalidate.ValidationError
	if !errors.As(err, &v) {
		return refuse(codes.Internal, "INTERNAL", "request: "+err.Error())
	}
	br := &errdetails.BadRequest{}
	var texts []string
	for _, x := range v.Violations {
		field := protovalidate.FieldPathString(x.Proto.GetField())
		br.FieldViolations = append(br.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: field, Description: x.Proto.GetMessage(), Reason: x.Proto.GetRuleId()})
		texts = append(texts, field+": "+x.Proto.GetMessage())
	}
	return refuse(codes.InvalidArgument, "INVALID", strings.Join(texts, "; "), br)
}

// counted sums calls that are recorded once a minute.
type counted struct {
	mu   sync.Mutex
	rows map[countedKey]*countedRow
}

type countedKey struct{ client, method, purpose, caseNo, basis, objects string }

type countedRow struct {
	minute time.Time
	more   uint64 // since the one that was recorded
	record traffic.Access
}

// first reports whether a call is the first of its minute, which is recorded at
// once. The rest are counted, until [Guard.Flush].
func (c *counted) first(e *entered, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rows == nil {
		c.rows = map[countedKey]*countedRow{}
	}
	k := countedKey{e.call.by.ID, e.method, e.record.Purpose, e.record.Case, e.record.LegalBasis, strings.Join(e.record.Objects, " ")}
	if r := c.rows[k]; r != nil {
		r.more++
		return false
	}
	c.rows[k] = &countedRow{minute: now, record: e.record}
	return true
}

// over returns the rows whose minute is over; all of them where all is set.
func (c *counted) over(now time.Time, all bool) []traffic.Access {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []traffic.Access
	for k, r := range c.rows {
		if !all && now.Sub(r.minute) < time.Minute {
			continue
		}
		delete(c.rows, k)
		if r.more > 0 {
			r.record.Phase, r.record.Count, r.record.Time = traffic.AccessCounted, r.more, now.UTC()
			out = append(out, r.record)
		}
	}
	return out
}

// Run writes the counts of each minute until ctx ends, and the last ones then.
func (g *Guard) Run(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		done := false
		select {
		case <-ctx.Done():
			done = true
		case <-tick.C:
		}
		for _, r := range g.counted.over(g.Now(), done) {
			put, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			_, err := g.Recorder.Put(put, identity.KindAccess, false, encodeAccess(r))
			cancel()
			if err != nil {
				g.unrecorded.Add(1)
				g.Log.Error("gateway: a minute's count is not on record", "client", r.By.Name, "method", r.Method, "count", r.Count, "err", err)
			}
		}
		if done {
			return nil
		}
	}
}
