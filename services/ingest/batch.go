package ingest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
)

// BatchLimits bound requests that carry many records: POST /v1/batch, and
// SubmitBatch by gRPC.
//
// The body of a POST is one of
//
//	application/json         {"envelopes": [ENVELOPE, …]}
//	application/x-protobuf   a stopline.v1.SubmitBatchRequest
//	application/x-ndjson     an envelope in JSON on each line; empty lines count for nothing
//
// The answer to a request that is good in itself is 200 with one Receipt for each
// record in their order, even if all of them are refused: a
// stopline.v1.SubmitBatchResponse in JSON or protobuf (by Accept, as for single
// records), or a Receipt a line. The records are stored in the order given. One
// that is answered busy is tried again until [BatchLimits.Wait] is over; then it
// and all behind it that are not stored are answered busy, and there is a
// Retry-After. Sending the whole again is safe: what is stored gets the same
// receipt.
//
// A request as a whole is answered with a problem, as single records are: 400 (rule
// batch, empty), 413 (size, too-many), 415, or 429 (too-many-batches). Then
// nothing of it was stored.
type BatchLimits struct {
	// Records in one request; 0 means 1000.
	Records int
	// Bytes of the body of one POST; 0 means 8 MiB. By gRPC it is
	// GRPCConfig.MaxMessage.
	Bytes int
	// Requests in hand at once, over HTTP; 0 means 16.
	Requests int
	// Wait is how long a request's records are tried while we are busy; 0 means
	// 10 s. What is on its way to the disk by then is waited for.
	Wait time.Duration
}

// Reasons to refuse a whole request.
const (
	ReasonBatch   = "batch" // its form
	ReasonTooMany = "too-many"

	// Busy.
	ReasonBatches = "too-many-batches"
)

const (
	// NDJSON is the media type of lines of JSON.
	NDJSON = "application/x-ndjson"
	// bodyWait bounds the time in which the body of a batch must come.
	bodyWait = 30 * time.Second
)

func (l BatchLimits) orDefaults() BatchLimits {
	return BatchLimits{or(l.Records, 1000), or(l.Bytes, 8<<20), or(l.Requests, 16), or(l.Wait, 10*time.Second)}
}

func (l BatchLimits) validate(maxRecord int) error {
	var errs []error
	l = l.orDefaults()
	for _, f := range []struct {
		name            string
		value, min, max int64
	}{
		{"Records", int64(l.Records), 1, 1 << 16}, {"Bytes", int64(l.Bytes), int64(or(maxRecord, identity.MaxEnvelope)) + slack, 1 << 30},
		{"Requests", int64(l.Requests), 1, 4096}, {"Wait", int64(l.Wait), 1, int64(5 * time.Minute)},
	} {
		if f.value < f.min || f.value > f.max {
			errs = append(errs, fmt.Errorf("ingest: Batch.%s: %d, must be %d to %d", f.name, f.value, f.min, f.max))
		}
	}
	return errors.Join(errs...)
}

func (s *Service) tooMany() *refusal {
	return &refusal{ReasonTooMany, "envelopes", fmt.Sprintf("envelopes: more than %d, that many are taken at once", s.Batch.Records)}
}

var errNone = &refusal{ReasonEmpty, "envelopes", "envelopes: must not be empty"}

// store stores items in their order and returns a receipt for each. It fails
// only if ctx ends; then some may be stored.
func (s *Service) store(ctx context.Context, items []*item, wait time.Duration, halt <-chan struct{}) ([]*pb.Receipt, error) {
	r := s.newRow(DoorBatch)
	r.until, r.halt = time.Now().Add(wait), halt
	for _, it := range items {
		r.add(it)
	}
	r.close()
	r.run(ctx)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// None is on its way any more.
	_, why := r.rest()
	receipts := make([]*pb.Receipt, len(items))
	for i, it := range items {
		if it.final {
			receipts[i] = it.answer.receipt()
		} else {
			receipts[i] = why.receipt()
		}
	}
	return receipts, nil
}

func (s *Service) postBatch(w http.ResponseWriter, r *http.Request) {
	fail := func(status int, ref *refusal) {
		s.refuse(turn{door: DoorBatch}, ref, func(answer) {})
		problem(w, status, ref.reason, ref.field, ref.text)
	}
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != identity.Protobuf && mediaType != identity.JSON && mediaType != NDJSON {
		fail(http.StatusUnsupportedMediaType, &refusal{ReasonContentType, "Content-Type", fmt.Sprintf("Content-Type: %.60q, must be %s, %s or %s",
			r.Header.Get("Content-Type"), identity.Protobuf, identity.JSON, NDJSON)})
		return
	}
	if c := r.Header.Get("Content-Encoding"); c != "" && c != "identity" {
		fail(http.StatusUnsupportedMediaType, &refusal{ReasonContentType, "Content-Encoding", fmt.Sprintf("Content-Encoding: %.60q, must not be used", c)})
		return
	}
	select {
	case s.batches <- struct{}{}:
		defer func() { <-s.batches }()
	default:
		w.Header().Set("Retry-After", retryAfter)
		s.busyBatch()
		problem(w, http.StatusTooManyRequests, ReasonBatches, "", fmt.Sprintf("%d requests with many records are in hand, no more are taken", s.Batch.Requests))
		return
	}
	body, ref, status := s.readBatch(w, r)
	if ref != nil {
		fail(status, ref)
		return
	}
	items, ref := s.split(mediaType, body)
	if ref != nil {
		status = http.StatusBadRequest
		if ref.reason == ReasonTooMany {
			status = http.StatusRequestEntityTooLarge
		}
		fail(status, ref)
		return
	}
	receipts, err := s.store(r.Context(), items, s.Batch.Wait, nil)
	if err != nil {
		return // nobody is there to tell; what was taken goes its way and is counted
	}
	for _, x := range receipts {
		if x.Status == pb.Receipt_STATUS_BUSY {
			w.Header().Set("Retry-After", retryAfter)
		}
	}
	accept := r.Header.Get("Accept")
	contentType := identity.JSON
	switch {
	case mediaType == NDJSON:
		contentType = NDJSON
	case strings.Contains(accept, identity.Protobuf) && !strings.Contains(accept, identity.JSON):
		contentType = identity.Protobuf
	}
	b, err := encodeReceipts(contentType, receipts)
	if err != nil {
		problem(w, http.StatusInternalServerError, "internal", "", err.Error())
		return
	}
	write(w, http.StatusOK, contentType, b)
}

// busyBatch counts a request that nobody has looked into.
func (s *Service) busyBatch() {
	s.mu.Lock()
	s.counts.Received++
	s.counts.Busy[ReasonBatches]++
	c := s.at(DoorBatch)
	c.Received++
	c.Busy++
	s.mu.Unlock()
}

// readBatch reads the body of a request. status goes with the refusal.
func (s *Service) readBatch(w http.ResponseWriter, r *http.Request) (body []byte, ref *refusal, status int) {
	// Who sends slowly must not keep others out. Not every ResponseWriter can do
	// this; those of net/http can.
	c := http.NewResponseController(w)
	if c.SetReadDeadline(time.Now().Add(bodyWait)) == nil {
		defer func() { _ = c.SetReadDeadline(time.Time{}) }() // it could be set before
	}
	tooLarge := &refusal{ReasonSize, "body", fmt.Sprintf("body: more than %d bytes", s.Batch.Bytes)}
	if r.ContentLength > int64(s.Batch.Bytes) {
		return nil, tooLarge, http.StatusRequestEntityTooLarge
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(s.Batch.Bytes)))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, tooLarge, http.StatusRequestEntityTooLarge
	case err != nil:
		return nil, &refusal{ReasonBody, "body", fmt.Sprintf("body: %v", err)}, http.StatusBadRequest
	case len(body) == 0:
		return nil, &refusal{ReasonEmpty, "body", "body: must not be empty"}, http.StatusBadRequest
	}
	return body, nil, 0
}

// split takes the records out of a body. Nothing is counted if it returns a
// refusal, which is of the body as a whole.
func (s *Service) split(mediaType string, body []byte) ([]*item, *refusal) {
	var raws [][]byte
	var err error
	// Whatever they are, more need not be held to know that they are too many.
	enough := s.Batch.Records + 1
	decode := s.fromJSON
	switch mediaType {
	case NDJSON:
		for line := range bytes.Lines(body) {
			if line = bytes.TrimSpace(line); len(line) > 0 {
				raws = append(raws, line)
			}
			if len(raws) == enough {
				break
			}
		}
	case identity.JSON:
		raws, err = splitJSON(body, enough)
	default:
		decode = s.canonical
		raws, err = splitProto(body, enough)
	}
	switch {
	case err != nil:
		return nil, &refusal{ReasonBatch, "body", "body: " + err.Error()}
	case len(raws) == 0:
		return nil, errNone
	case len(raws) > s.Batch.Records:
		return nil, s.tooMany()
	}
	items := make([]*item, len(raws))
	for i, raw := range raws {
		envelope, _, ref := decode(raw)
		// The body is let go of before the records are stored.
		items[i] = s.item(DoorBatch, bytes.Clone(envelope), ref)
	}
	return items, nil
}

// splitJSON splits {"envelopes": […]} and does not look into the envelopes: one
// that is malformed is for its own receipt, as long as it is JSON. It stops when
// it has enough.
func splitJSON(body []byte, enough int) (raws [][]byte, err error) {
	d := json.NewDecoder(bytes.NewReader(body))
	want := func(t json.Token) error {
		got, err := d.Token()
		switch {
		case err != nil:
			return fmt.Errorf("JSON: %w", noEOF(err))
		case got != t:
			return fmt.Errorf("JSON: %.60q at offset %d, want %q", fmt.Sprint(got), d.InputOffset(), fmt.Sprint(t))
		}
		return nil
	}
	// No other member, and this one once: what would be skipped would look stored.
	for _, t := range []json.Token{json.Delim('{'), "envelopes", json.Delim('[')} {
		if err := want(t); err != nil {
			return nil, err
		}
	}
	for d.More() {
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return nil, fmt.Errorf("JSON: envelope %d: %w", len(raws), noEOF(err))
		}
		if raws = append(raws, raw); len(raws) == enough {
			return raws, nil
		}
	}
	for _, t := range []json.Token{json.Delim(']'), json.Delim('}')} {
		if err := want(t); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("JSON: something follows the object, offset %d", d.InputOffset())
	}
	return raws, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// splitProto splits a stopline.v1.SubmitBatchRequest and does not look into the
// envelopes, which share memory with body. It stops when it has enough.
func splitProto(body []byte, enough int) (raws [][]byte, err error) {
	for b := body; len(b) > 0 && len(raws) < enough; {
		at := len(body) - len(b)
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 {
			return nil, fmt.Errorf("protobuf: offset %d: %w", at, protowire.ParseError(l))
		}
		if n != 1 || t != protowire.BytesType {
			return nil, fmt.Errorf("protobuf: offset %d: field %d of wire type %d, must be 1 (envelopes) of type 2", at, n, t)
		}
		raw, m := protowire.ConsumeBytes(b[l:])
		if m < 0 {
			return nil, fmt.Errorf("protobuf: envelope %d, offset %d: %w", len(raws), at, protowire.ParseError(m))
		}
		raws = append(raws, raw)
		b = b[l+m:]
	}
	return raws, nil
}

// encodeReceipts writes receipts as the answer to a batch.
func encodeReceipts(contentType string, receipts []*pb.Receipt) ([]byte, error) {
	if contentType == identity.Protobuf {
		return proto.Marshal(&pb.SubmitBatchResponse{Receipts: receipts})
	}
	var out bytes.Buffer
	line := func(m proto.Message) error {
		b, err := protojson.Marshal(m)
		if err == nil {
			err = json.Compact(&out, b) // protojson adds a space at random
		}
		out.WriteByte('\n')
		return err
	}
	if contentType == identity.JSON {
		err := line(&pb.SubmitBatchResponse{Receipts: receipts})
		return out.Bytes(), err
	}
	for _, r := range receipts {
		if err := line(r); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}
