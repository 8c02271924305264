package bus

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// ServeHTTP answers requests of [Bus.RoundTripper] on subject by h until ctx ends:
// one message holds an HTTP/1.1 request, its reply the response, as they would be
// on a connection. Members of a queue group share requests; at most so many are in
// hand at once, others are told to come again (503). Answers that are larger than
// the server takes are an error (500); they are never cut.
func (b *Bus) ServeHTTP(ctx context.Context, subject, queue string, concurrent int, h http.Handler) error {
	places := make(chan struct{}, concurrent)
	var wg sync.WaitGroup
	defer wg.Wait()
	sub, err := b.NC.QueueSubscribe(subject, queue, func(m *nats.Msg) {
		if m.Reply == "" {
			return
		}
		select {
		case places <- struct{}{}:
		default:
			b.answer(m, &response{status: http.StatusServiceUnavailable})
			return
		}
		wg.Go(func() {
			r := serveOne(ctx, h, m.Data)
			<-places // before the answer: who has it may ask again at once
			b.answer(m, r)
		})
	})
	if err != nil {
		return kind.Errorf(kindOf(err), "bus: serving %s: %w", subject, err)
	}
	<-ctx.Done()
	if err := sub.Unsubscribe(); err != nil && !b.NC.IsClosed() {
		b.log.Warn("bus: cannot end a subscription", "subject", subject, "err", err)
	}
	return nil
}

// response is an http.ResponseWriter that keeps what is written.
type response struct {
	status int
	header http.Header
	body   bytes.Buffer
}

func (r *response) Header() http.Header {
	if r.header == nil {
		r.header = http.Header{}
	}
	return r.header
}

func (r *response) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
}

func (r *response) Write(p []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	return r.body.Write(p)
}

func serveOne(ctx context.Context, h http.Handler, data []byte) (r *response) {
	r = &response{}
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
	if err != nil {
		r.WriteHeader(http.StatusBadRequest)
		return r
	}
	defer func() {
		if p := recover(); p != nil { // as net/http does for its handlers
			r = &response{status: http.StatusInternalServerError}
		}
	}()
	h.ServeHTTP(r, req.WithContext(ctx))
	r.WriteHeader(http.StatusOK)
	return r
}

func (b *Bus) answer(m *nats.Msg, r *response) {
	var out bytes.Buffer
	err := (&http.Response{StatusCode: r.status, ProtoMajor: 1, ProtoMinor: 1, Header: r.header,
		Body: io.NopCloser(&r.body), ContentLength: int64(r.body.Len())}).Write(&out)
	if limit := b.NC.MaxPayload(); err == nil && int64(out.Len()) > limit {
		out.Reset()
		err = (&http.Response{StatusCode: http.StatusInternalServerError, ProtoMajor: 1, ProtoMinor: 1,
			Body:          io.NopCloser(bytes.NewReader(nil)),
			Header:        http.Header{"X-Error": {fmt.Sprintf("the answer is larger than %d bytes", limit)}},
			ContentLength: 0}).Write(&out)
	}
	if err == nil {
		err = m.Respond(out.Bytes())
	}
	if err != nil {
		b.log.Warn("bus: cannot answer a request", "subject", m.Subject, "err", err)
	}
}

// RoundTripper sends HTTP requests to whoever serves subject: see [Bus.ServeHTTP].
// The host of a request means nothing. Errors have kind Unavailable.
func (b *Bus) RoundTripper(subject string) http.RoundTripper { return overNATS{b, subject} }

type overNATS struct {
	b       *Bus
	subject string
}

func (o overNATS) RoundTrip(r *http.Request) (*http.Response, error) {
	var out bytes.Buffer
	if err := r.Write(&out); err != nil { // closes the body
		return nil, fmt.Errorf("bus: request to %s: %w", o.subject, err)
	}
	data, err := o.b.Request(r.Context(), o.subject, out.Bytes())
	if err != nil {
		return nil, err
	}
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data)), r)
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "bus: answer of %s: %w", o.subject, err)
	}
	return res, nil
}
