package ingest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Handler takes records by HTTP:
//
//	POST /v1/frames    records of kind frame
//	POST /v1/records   records of any kind
//	POST /v1/batch     many at once, see [BatchLimits]
//
// The body of the first two is one stopline.v1.Envelope, as application/x-protobuf in any
// encoding, or as application/json in protobuf's JSON form; payload and
// signature are base64 there. The payload's bytes are stored as they came. The
// commitment is to the canonical encoding, see package identity.
//
// The answer to what was stored is 200 with a stopline.v1.Receipt, in protobuf
// if the request accepts that and not JSON. Other answers to a POST are RFC 9457
// problems with the members rule, and field where one is to blame:
//
//	400  refused, see detail; the same body never passes
//	413  too large
//	415  other content type or coding
//	429  a queue or the stream is full; Retry-After says when to come again
//	503  cannot store now, or not known whether it was stored, or decisions are
//	     behind; Retry-After, and send the same bytes again
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/frames", func(w http.ResponseWriter, r *http.Request) { s.post(w, r, identity.KindFrame) })
	mux.HandleFunc("POST /v1/batch", s.postBatch)
	mux.HandleFunc("POST /v1/records", func(w http.ResponseWriter, r *http.Request) { s.post(w, r, "") })
	return mux
}

// retryAfter is what busy senders are told to wait, seconds.
const retryAfter = "1"

func (s *Service) post(w http.ResponseWriter, r *http.Request, only identity.RecordKind) {
	envelope, ref, status := s.body(w, r, only)
	if ref != nil {
		s.refuse(turn{door: DoorHTTP}, ref, func(answer) {})
		problem(w, status, ref.reason, ref.field, ref.text)
		return
	}
	answers := make(chan answer, 1)
	s.take(envelope, turn{door: DoorHTTP}, func(a answer) { answers <- a })
	var a answer
	select {
	case a = <-answers:
	case <-r.Context().Done():
		return // nobody is there to tell; the record goes its way and is counted
	}
	switch {
	case a.status == pb.Receipt_STATUS_STORED:
		receipt(w, r, a)
	case a.reason == ReasonQueueFull || a.reason == ReasonStreamFull:
		w.Header().Set("Retry-After", retryAfter)
		problem(w, http.StatusTooManyRequests, a.reason, "", a.text)
	default:
		w.Header().Set("Retry-After", retryAfter)
		problem(w, http.StatusServiceUnavailable, a.reason, "", a.text)
	}
}

// body reads a request's envelope. status goes with the refusal.
func (s *Service) body(w http.ResponseWriter, r *http.Request, only identity.RecordKind) ([]byte, *refusal, int) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != identity.Protobuf && mediaType != identity.JSON {
		return nil, &refusal{ReasonContentType, "Content-Type", fmt.Sprintf("Content-Type: %.60q, must be %s or %s",
			r.Header.Get("Content-Type"), identity.Protobuf, identity.JSON)}, http.StatusUnsupportedMediaType
	}
	if c := r.Header.Get("Content-Encoding"); c != "" && c != "identity" {
		return nil, &refusal{ReasonContentType, "Content-Encoding", fmt.Sprintf("Content-Encoding: %.60q, must not be used", c)}, http.StatusUnsupportedMediaType
	}
	limit := s.MaxRecord + slack
	if mediaType == identity.JSON {
		limit = s.MaxRecord*4/3 + 1024 // base64, names and some white space
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(limit)))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, &refusal{ReasonSize, "body", fmt.Sprintf("body: more than %d bytes; an envelope may have %d", limit, s.MaxRecord)}, http.StatusRequestEntityTooLarge
	case err != nil:
		return nil, &refusal{ReasonBody, "body", fmt.Sprintf("body: %v", err)}, http.StatusBadRequest
	}
	envelope, e, ref := s.decode(mediaType, b)
	switch {
	case ref != nil && ref.reason == ReasonSize:
		return nil, ref, http.StatusRequestEntityTooLarge
	case ref != nil:
		return nil, ref, http.StatusBadRequest
	case only != "" && e.Kind != only:
		return nil, &refusal{ReasonKind, "kind", fmt.Sprintf("kind: %s, must be %s here", e.Kind, only)}, http.StatusBadRequest
	}
	return envelope, nil, 0
}

// decode turns a body into a canonical envelope.
func (s *Service) decode(mediaType string, b []byte) ([]byte, identity.Envelope, *refusal) {
	if mediaType == identity.JSON {
		return s.fromJSON(b)
	}
	return s.canonical(b)
}

// receipt writes the receipt of a stored record.
func receipt(w http.ResponseWriter, r *http.Request, a answer) {
	accept := r.Header.Get("Accept")
	if strings.Contains(accept, identity.Protobuf) && !strings.Contains(accept, identity.JSON) {
		b, err := proto.Marshal(a.receipt())
		if err != nil {
			problem(w, http.StatusInternalServerError, "internal", "", err.Error())
			return
		}
		write(w, http.StatusOK, identity.Protobuf, b)
		return
	}
	b, err := protojson.Marshal(a.receipt())
	var out bytes.Buffer
	if err == nil {
		err = json.Compact(&out, b) // protojson adds a space at random
	}
	if err != nil {
		problem(w, http.StatusInternalServerError, "internal", "", err.Error())
		return
	}
	out.WriteByte('\n')
	write(w, http.StatusOK, identity.JSON, out.Bytes())
}

// problem writes an RFC 9457 problem.
func problem(w http.ResponseWriter, status int, rule, field, detail string) {
	b, err := json.Marshal(struct {
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
		Rule   string `json:"rule"`
		Field  string `json:"field,omitempty"`
	}{"urn:stopline:problem:" + rule, http.StatusText(status), status, detail, rule, field})
	if err != nil { // strings and a number: cannot be
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	write(w, status, "application/problem+json", append(b, '\n'))
}

func write(w http.ResponseWriter, status int, contentType string, b []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(b) // the sender has gone; it will ask again with the same bytes
}
