package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
)

// option is one of our call options; gRPC passes over it.
type option struct {
	grpc.EmptyCallOption
	header, value string
	receipt       *pb.AccessReceipt
	must          bool
}

// Purpose says what the call is for, by a code of the district's access policy.
func Purpose(code string) grpc.CallOption { return option{header: "stopline-purpose", value: code} }

// Case names the case that the call is for.
func Case(number string) grpc.CallOption { return option{header: "stopline-case", value: number} }

// LegalBasis names the legal basis of the call, by a code of the access policy.
func LegalBasis(code string) grpc.CallOption {
	return option{header: "stopline-legal-basis", value: code}
}

// Covert asks that the reading stays out of listings for so many days, at most as
// many as its purpose allows. Its record is in the log at once like any other.
func Covert(days int) grpc.CallOption {
	return option{header: "stopline-covert-days", value: strconv.Itoa(days)}
}

// Receipt fills r with the answer's receipt; it stays empty where none comes.
func Receipt(r *pb.AccessReceipt) grpc.CallOption { return option{receipt: r} }

// MustReceipt makes the call fail with [ErrReceipt] where its answer has no
// receipt.
func MustReceipt() grpc.CallOption { return option{must: true} }

// asked is what our options ask of a call.
type asked struct {
	headers  []string
	receipts []*pb.AccessReceipt
	must     bool
}

func options(opts []grpc.CallOption) (a asked) {
	for _, o := range opts {
		o, ok := o.(option)
		if !ok {
			continue
		}
		if o.header != "" && o.value != "" {
			a.headers = append(a.headers, o.header, o.value)
		}
		if o.receipt != nil {
			a.receipts = append(a.receipts, o.receipt)
		}
		a.must = a.must || o.must
	}
	return a
}

// backoff between attempts where the gateway does not say.
const (
	firstWait = 100 * time.Millisecond
	mostWait  = 5 * time.Second
)

// pause is how long to wait before an attempt, the first is 1: twice as long each
// time, less up to a half, so that many clients do not come back at once.
func pause(attempt int) time.Duration {
	d := min(firstWait<<min(attempt-1, 16), mostWait)
	return d - rand.N(d/2+1)
}

// unary makes one call, again where that helps and does no harm.
func (c *Client) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	a := options(opts)
	ctx = metadata.AppendToOutgoingContext(ctx, a.headers...)
	for attempt := 1; ; attempt++ {
		var header metadata.MD
		err := invoke(ctx, method, req, reply, cc, append(opts[:len(opts):len(opts)], grpc.Header(&header))...)
		if err == nil {
			return c.received(method, header, a)
		}
		wait, again := Again(err, attempt, harmless(method, req))
		if !again || attempt >= c.o.Attempts {
			return err
		}
		if end, ok := ctx.Deadline(); ok && time.Until(end) <= wait {
			return err // it says more than that the time is over
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}

// Again reports whether a call that failed is worth another attempt, and after
// which wait. attempt counts from 1; twice says that the call may be made although
// the one before may have been carried out.
func Again(err error, attempt int, twice bool) (wait time.Duration, again bool) {
	st, ok := status.FromError(err)
	if !ok {
		return 0, false
	}
	wait = pause(attempt)
	untouched := false
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.RetryInfo:
			if said := d.RetryDelay.AsDuration(); said > 0 {
				// A little after, not all at once.
				wait = said + rand.N(said/10+time.Millisecond)
			}
		case *errdetails.ErrorInfo:
			switch d.Reason {
			case "LIMIT", "DRAINING", "NOT_ON_RECORD", "ISSUER_UNREACHABLE":
				untouched = true
			}
		}
	}
	switch st.Code() {
	case codes.ResourceExhausted:
		return wait, untouched // else a message is too large, and stays so
	case codes.Unavailable:
		return wait, untouched || twice
	}
	return 0, false
}

// harmless reports whether a call can be made twice: a reading, a write that
// carries an idempotency key, and what the gateway answers again by itself.
func harmless(method string, req any) bool {
	switch method {
	case pb.DeviceService_Enrol_FullMethodName, pb.DeviceService_RotateKey_FullMethodName:
		return true
	}
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(method, "/"), "/", "."))
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return false
	}
	m, ok := d.(protoreflect.MethodDescriptor)
	if !ok {
		return false
	}
	if rule, ok := proto.GetExtension(m.Options(), annotations.E_Http).(*annotations.HttpRule); ok && rule.GetGet() != "" {
		return true
	}
	r, ok := req.(proto.Message)
	if !ok {
		return false
	}
	f := r.ProtoReflect().Descriptor().Fields().ByName("idempotency_key")
	return f != nil && r.ProtoReflect().Has(f)
}

// stream adds what a stream carries, and looks at its receipt.
func (c *Client) stream(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	a := options(opts)
	s, err := open(metadata.AppendToOutgoingContext(ctx, a.headers...), d, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &receiptStream{ClientStream: s, c: c, method: method, a: a}, nil
}

// receiptStream verifies the receipt before it gives out the first message.
type receiptStream struct {
	grpc.ClientStream
	c      *Client
	method string
	a      asked
	seen   bool
}

func (s *receiptStream) RecvMsg(m any) error {
	if err := s.ClientStream.RecvMsg(m); err != nil || s.seen {
		return err
	}
	header, err := s.Header()
	if err != nil {
		return err
	}
	if err := s.c.received(s.method, header, s.a); err != nil {
		return err
	}
	s.seen = true
	return nil
}

// Follow reads a stream and opens it again when it ends for a reason that passes.
// handle is called with each message, in order. Follow returns nil when the
// gateway ends the stream for good, what handle returns where that is not nil, and
// else the error that will not pass. Streams of the gateway begin with what is the
// case, so that after a break nothing that counts is missing.
func Follow[M any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[M], error), handle func(*M) error) error {
	for attempt := 1; ; attempt++ {
		err := followOnce(ctx, open, func(m *M) error {
			attempt = 0 // it works: the next break is the first again
			return handle(m)
		})
		var own *handleError
		if errors.As(err, &own) {
			return own.error
		}
		if err == nil {
			return nil
		}
		wait, again := Again(err, max(attempt, 1), true)
		if !again {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}

// handleError is what a caller's own function returned.
type handleError struct{ error }

func (e *handleError) Unwrap() error { return e.error }

func followOnce[M any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[M], error), handle func(*M) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := open(ctx)
	if err != nil {
		return err
	}
	for {
		m, err := s.Recv()
		if err != nil {
			return ended(err)
		}
		if err := handle(m); err != nil {
			return &handleError{err}
		}
	}
}

// WatchJunctionStates hands states to handle until ctx ends, across breaks.
func (c *Client) WatchJunctionStates(ctx context.Context, r *pb.WatchJunctionStatesRequest, handle func(*pb.WatchJunctionStatesResponse) error, opts ...grpc.CallOption) error {
	return Follow(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[pb.WatchJunctionStatesResponse], error) {
		return c.Traffic.WatchJunctionStates(ctx, r, opts...)
	}, handle)
}

// WatchPriority hands a request's states to handle until the request has ended,
// across breaks. After a break the newest state may come again.
func (c *Client) WatchPriority(ctx context.Context, r *pb.WatchPriorityRequest, handle func(*pb.WatchPriorityResponse) error, opts ...grpc.CallOption) error {
	return Follow(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[pb.WatchPriorityResponse], error) {
		return c.Priority.WatchPriority(ctx, r, opts...)
	}, handle)
}
