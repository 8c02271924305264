package bus

import (
	"context"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// carrier lets the propagator read and write NATS headers, whose keys keep
// their case. https://www.w3.org/TR/trace-context/
type carrier nats.Header

func (c carrier) Get(k string) string { return nats.Header(c).Get(k) }
func (c carrier) Set(k, v string)     { nats.Header(c).Set(k, v) }
func (c carrier) Keys() []string {
	ks := make([]string, 0, len(c))
	for k := range c {
		ks = append(ks, k)
	}
	return ks
}

var propagator propagation.TraceContext

// Inject writes the trace context of ctx into h and returns h, made if it was
// nil and is needed.
func Inject(ctx context.Context, h nats.Header) nats.Header {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return h
	}
	if h == nil {
		h = nats.Header{}
	}
	propagator.Inject(ctx, carrier(h))
	return h
}

// Extract returns ctx with the trace context that h carries, if any.
func Extract(ctx context.Context, h nats.Header) context.Context {
	if len(h) == 0 {
		return ctx
	}
	return propagator.Extract(ctx, carrier(h))
}

func tracer() trace.Tracer {
	return otel.Tracer("github.com/stopline-traffic/stopline/services/internal/bus")
}
