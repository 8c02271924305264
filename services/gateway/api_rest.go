package gateway

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/grpc-ecosystem/grpc-gateway/v2/utilities"
	"google.golang.org/genproto/googleapis/api/httpbody"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/stopline-traffic/stopline/api/openapi"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/kind"
)

// REST is made of the gRPC methods by grpc-gateway, over a connection within this
// process: every call passes the one guard. Errors are problem documents, RFC
// 9457. Streams are server-sent events for who accepts text/event-stream, else
// one JSON object a line.

//go:embed docs
var docFiles embed.FS

// problem is an answer that is an error: RFC 9457, with the fields that broke a
// rule.
type problem struct {
	Type     string         `json:"type"`
	Title    string         `json:"title"`
	Status   int            `json:"status"`
	Detail   string         `json:"detail"`
	Instance string         `json:"instance,omitempty"`
	Errors   []problemField `json:"errors,omitempty"`
	retry    time.Duration
}

// problemField is one field that broke a rule.
type problemField struct {
	Field  string `json:"field"`
	Rule   string `json:"rule"`
	Detail string `json:"detail"`
}

// status turns an error of a method into a gRPC status: what is wrong here is for
// our log, and not for the client.
func (a *API) status(err error) error {
	if err == nil {
		return nil
	}
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return err
	}
	switch {
	case errors.Is(err, context.Canceled):
		return refuse(codes.Canceled, "CANCELED", "the call was ended by its client")
	case errors.Is(err, context.DeadlineExceeded):
		return refuse(codes.DeadlineExceeded, "DEADLINE", "the call took longer than its deadline")
	}
	switch kind.Of(err) {
	case kind.Invalid:
		return refuse(codes.InvalidArgument, "INVALID", err.Error())
	case kind.NotFound:
		return refuse(codes.NotFound, "NOT_FOUND", err.Error())
	case kind.Conflict:
		return refuse(codes.Aborted, "CONFLICT", err.Error())
	case kind.Stale:
		return refuse(codes.FailedPrecondition, "STALE", err.Error())
	case kind.Unavailable:
		return refuse(codes.Unavailable, "UNAVAILABLE", err.Error(), retryIn(time.Second))
	case kind.Denied:
		return refuse(codes.PermissionDenied, "POLICY", err.Error())
	}
	a.log().Error("gateway: a call failed", "err", err)
	return refuse(codes.Internal, "INTERNAL", "the call could not be answered; it has been logged")
}

// titles of problems, by reason; others have that of their HTTP status.
var titles = map[string]string{
	"CREDENTIALS": "Who asks has not been proven", "POLICY": "The access policy does not allow it", "INVALID": "The request breaks a rule",
	"LIMIT": "Too many calls", "NOT_ON_RECORD": "The reading cannot be put on record", "NOT_FOUND": "There is no such thing",
	"TOO_LARGE": "The request is too large", "DRAINING": "The gateway is being ended",
}

// problemOf makes a problem of a status. httpStatus 0 is that of the code.
func problemOf(st *status.Status, httpStatus int, instance string) problem {
	p := problem{Status: httpStatus, Detail: st.Message(), Instance: instance}
	reason := ""
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason = d.Reason
		case *errdetails.RetryInfo:
			p.retry = d.RetryDelay.AsDuration()
		case *errdetails.BadRequest:
			for _, v := range d.FieldViolations {
				p.Errors = append(p.Errors, problemField{Field: v.Field, Rule: v.Reason, Detail: v.Description})
			}
		}
	}
	if p.Status == 0 {
		p.Status = runtime.HTTPStatusFromCode(st.Code())
		if reason == "TOO_LARGE" {
			p.Status = http.StatusRequestEntityTooLarge
		}
	}
	if reason == "" {
		reason = strings.ReplaceAll(strings.ToUpper(st.Code().String()), " ", "_")
	}
	p.Type = "urn:stopline:problem:" + strings.ToLower(strings.ReplaceAll(reason, "_", "-"))
	if p.Title = titles[reason]; p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	return p
}

func (p *problem) write(w http.ResponseWriter) {
	b, err := json.Marshal(p)
	if err != nil { // unreachable: strings and numbers
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Del("Transfer-Encoding")
	h.Set("Content-Type", "application/problem+json")
	h.Set("Content-Length", strconv.Itoa(len(b)))
	if p.Status == http.StatusTooManyRequests || p.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", strconv.Itoa(max(int(p.retry.Round(time.Second)/time.Second), 1)))
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="stopline"`)
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(b) // the client may have gone
}

// answer is a response in the making, and what is known of its request.
type answer struct {
	http.ResponseWriter
	begun bool // something was written
	over  bool // it was answered by a problem: the rest is dropped
	large *limitedBody
	path  string
	// sparse: the request has a field mask, and what it left out is no zero.
	sparse bool
}

// sparse is a message of which only what is set is shown.
type sparse struct{ proto.Message }

type answerKey struct{}

func (w *answer) WriteHeader(code int) {
	if !w.over {
		w.begun = true
		w.ResponseWriter.WriteHeader(code)
	}
}

func (w *answer) Write(b []byte) (int, error) {
	if w.over {
		return len(b), nil
	}
	w.begun = true
	return w.ResponseWriter.Write(b)
}

func (w *answer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Flush is for grpc-gateway's streams.
func (w *answer) Flush() {
	if !w.over {
		_ = http.NewResponseController(w.ResponseWriter).Flush() // the next write tells that the client has gone
	}
}

// limitedBody notes that a body was too long, and frees the connection from the
// body's deadline when it has come.
type limitedBody struct {
	io.ReadCloser
	tooLarge bool
	end      func()
}

func (l *limitedBody) Read(b []byte) (int, error) {
	n, err := l.ReadCloser.Read(b)
	var mb *http.MaxBytesError
	l.tooLarge = l.tooLarge || errors.As(err, &mb)
	if err != nil {
		l.end()
	}
	return n, err
}

// bodyTime is how long the body of a request may take.
const bodyTime = 30 * time.Second

const verifyPath = "/v1/bundles:verify"

// verifyBundle may be as large as a bundle.
const verifyBundle = "/stopline.v1.EvidenceService/VerifyBundle"

func (a *API) newREST() (http.Handler, error) {
	ctx := context.Background()
	mux := runtime.NewServeMux(
		runtime.WithDisablePathLengthFallback(), // a POST is never a GET
		runtime.WithIncomingHeaderMatcher(func(h string) (string, bool) {
			switch h = strings.ToLower(h); h {
			case headerPurpose, headerCase, headerBasis, headerCovert:
				return h, true
			}
			return "", false // Authorization is forwarded in any case
		}),
		runtime.WithOutgoingHeaderMatcher(func(h string) (string, bool) {
			switch h {
			case HeaderReceipt, "content-disposition":
				return h, true
			}
			return "", false
		}),
		runtime.WithMetadata(a.innerMetadata),
		runtime.WithErrorHandler(a.restError),
		runtime.WithRoutingErrorHandler(func(ctx context.Context, m *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, code int) {
			p := problem{Type: "about:blank", Title: http.StatusText(code), Status: code, Detail: fmt.Sprintf("%s %.200s: the API has no such method", r.Method, r.URL.Path), Instance: r.URL.Path}
			p.write(w)
		}),
		runtime.WithStreamErrorHandler(streamError),
		runtime.WithForwardResponseRewriter(func(ctx context.Context, m proto.Message) (any, error) {
			if w, ok := ctx.Value(answerKey{}).(*answer); ok && w.sparse {
				return sparse{m}, nil
			}
			return m, nil
		}),
		runtime.SetQueryParameterParser(strictQuery{}),
		runtime.WithMarshalerOption(runtime.MIMEWildcard, &lines{restJSON}),
		runtime.WithMarshalerOption("text/event-stream", &events{lines{restJSON}}),
	)
	for _, err := range []error{
		pb.RegisterTrafficServiceHandlerClient(ctx, mux, pb.NewTrafficServiceClient(&a.conns)),
		pb.RegisterPriorityServiceHandlerClient(ctx, mux, pb.NewPriorityServiceClient(&a.conns)),
		pb.RegisterEvidenceServiceHandlerClient(ctx, mux, pb.NewEvidenceServiceClient(&a.conns)),
		pb.RegisterRegistryServiceHandlerClient(ctx, mux, pb.NewRegistryServiceClient(&a.conns)),
		pb.RegisterDeviceServiceHandlerClient(ctx, mux, pb.NewDeviceServiceClient(&a.conns)),
		pb.RegisterAccessServiceHandlerClient(ctx, mux, pb.NewAccessServiceClient(&a.conns)),
		pb.RegisterLogServiceHandlerClient(ctx, mux, pb.NewLogServiceClient(&a.conns)),
	} {
		if err != nil {
			return nil, err
		}
	}
	docs, err := fs.Sub(docFiles, "docs")
	if err != nil {
		return nil, err
	}
	outer := http.NewServeMux()
	outer.Handle("/", mux)
	outer.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openapi.JSON) // the client may have gone
	})
	outer.Handle("GET /docs/", http.StripPrefix("/docs/", http.FileServerFS(docs)))
	outer.Handle("GET /docs", http.RedirectHandler("/docs/", http.StatusMovedPermanently))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		q := r.URL.Query()
		if !legible(r.URL.Path, q) {
			p := problem{Type: "about:blank", Title: http.StatusText(http.StatusBadRequest), Status: http.StatusBadRequest, Detail: "path and query: must be UTF-8"}
			p.write(w)
			return
		}
		out := &answer{ResponseWriter: w, path: r.URL.Path, sparse: q.Has("readMask") || q.Has("read_mask")}
		limit := a.cfg.MaxBody
		if r.URL.Path == verifyPath {
			limit = maxBundle * 3 / 2 // base64
		}
		if r.ContentLength > limit {
			tooLarge(out, r, limit)
			return
		}
		if r.Body != nil && r.Body != http.NoBody {
			c := http.NewResponseController(w)
			if c.SetReadDeadline(time.Now().Add(bodyTime)) == nil {
				out.large = &limitedBody{ReadCloser: http.MaxBytesReader(w, r.Body, limit), end: func() { _ = c.SetReadDeadline(time.Time{}) }}
			} else { // a test's recorder
				out.large = &limitedBody{ReadCloser: http.MaxBytesReader(w, r.Body, limit), end: func() {}}
			}
			r.Body = out.large
		}
		outer.ServeHTTP(out, r.WithContext(context.WithValue(r.Context(), answerKey{}, out)))
	}), nil
}

// legible reports whether a path and a query are UTF-8, as all text of the API is:
// neither messages nor files can have other names.
func legible(path string, q url.Values) bool {
	if !utf8.ValidString(path) {
		return false
	}
	for k, vs := range q {
		if !utf8.ValidString(k) || slices.ContainsFunc(vs, func(v string) bool { return !utf8.ValidString(v) }) {
			return false
		}
	}
	return true
}

func tooLarge(w http.ResponseWriter, r *http.Request, limit int64) {
	w.Header().Set("Connection", "close") // nobody reads the rest
	p := problemOf(status.Convert(refuse(codes.ResourceExhausted, "TOO_LARGE", fmt.Sprintf("request: larger than %d bytes", limit))), 0, r.URL.Path)
	p.write(w)
}

// innerMetadata is what the REST door says of a call beside its headers.
func (a *API) innerMetadata(_ context.Context, r *http.Request) metadata.MD {
	md := metadata.Pairs(headerInner, a.guard.Inner)
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		c := r.TLS.PeerCertificates[0]
		// The guard knows keys only, so the time is looked at here.
		if now := a.now(); now.Before(c.NotBefore) || now.After(c.NotAfter) {
			md.Set(headerCert, "expired")
		} else {
			md.Set(headerCert, CertificateID(c))
		}
	}
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		md.Set(headerFrom, host)
	}
	return md
}

// restError answers a call that failed before there was an answer.
func (a *API) restError(ctx context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
	if md, ok := runtime.ServerMetadataFromContext(ctx); ok {
		for _, v := range md.HeaderMD.Get(HeaderReceipt) { // what was denied is on record too
			w.Header().Set(HeaderReceipt, v)
		}
	}
	out, _ := ctx.Value(answerKey{}).(*answer)
	if out != nil && out.large != nil && out.large.tooLarge {
		tooLarge(w, r, a.cfg.MaxBody)
		return
	}
	httpStatus := 0
	var hs *runtime.HTTPStatusError
	if errors.As(err, &hs) {
		httpStatus, err = hs.HTTPStatus, hs.Err
	}
	p := problemOf(status.Convert(err), httpStatus, r.URL.Path)
	if p.Status == http.StatusBadRequest && len(p.Errors) == 0 { // grpc-gateway could not read it
		p.Type, p.Title = "urn:stopline:problem:invalid", titles["INVALID"]
		p.Errors = []problemField{formError(p.Detail)}
	}
	p.write(w)
}

// formError names the field that could not be read, as far as its reader says.
func formError(text string) problemField {
	f := problemField{Field: "request", Rule: "form", Detail: text}
	if m := unknownField.FindStringSubmatch(text); m != nil {
		f.Field, f.Rule, f.Detail = m[1], "unknown", "the method has no such field"
	} else if m := badField.FindStringSubmatch(text); m != nil {
		f.Field = m[1]
	}
	return f
}

var (
	unknownField = regexp.MustCompile(`unknown field "([^"]{1,128})"`)
	badField     = regexp.MustCompile(`(?:for field |parsing (?:field|list) |field: |parameter: )"?([A-Za-z0-9_.]{1,128})`)
)

// streamError answers a stream that failed before its first message by a problem,
// and lets one that fails later end with it.
func streamError(ctx context.Context, err error) *status.Status {
	st := status.Convert(err)
	if w, ok := ctx.Value(answerKey{}).(*answer); ok && !w.begun {
		p := problemOf(st, 0, w.path)
		p.write(w)
		w.over = true
	}
	return st
}

var restJSON = runtime.JSONPb{
	MarshalOptions: protojson.MarshalOptions{EmitDefaultValues: true},
	// A field that the method does not know is refused, never passed over.
	UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: false},
}

// lines is JSON; of a stream one message a line, without the envelope that
// grpc-gateway puts around it, and an error as a problem.
type lines struct{ runtime.JSONPb }

// Marshal encodes a message, or one of a stream.
func (l *lines) Marshal(v any) ([]byte, error) {
	switch m := v.(type) {
	case *httpbody.HttpBody:
		return m.GetData(), nil
	case sparse:
		return protojson.Marshal(m.Message)
	case map[string]any: // {"result": message} of a stream
		if r, ok := m["result"]; ok && len(m) == 1 {
			return l.JSONPb.Marshal(r)
		}
	case map[string]proto.Message: // {"error": status}
		if s, ok := m["error"].(*spb.Status); ok {
			p := problemOf(status.FromProto(s), 0, "")
			return json.Marshal(map[string]any{"error": &p})
		}
	}
	return l.JSONPb.Marshal(v)
}

// ContentType is JSON's, or what a body says of itself.
func (l *lines) ContentType(v any) string {
	if b, ok := v.(*httpbody.HttpBody); ok {
		return b.GetContentType()
	}
	return l.JSONPb.ContentType(v)
}

// StreamContentType is that of streams.
func (l *lines) StreamContentType(any) string { return "application/x-ndjson" }

// events is a stream of server-sent events, as the HTML standard has them.
type events struct{ lines }

// Marshal encodes one event.
func (e *events) Marshal(v any) ([]byte, error) {
	name := ""
	b, err := e.lines.Marshal(v)
	if _, failed := v.(map[string]proto.Message); failed {
		name = "event: error\n"
	} else if _, stream := v.(map[string]any); !stream {
		return b, err // an answer that is no stream
	}
	return append([]byte(name+"data: "), b...), err
}

// Delimiter ends an event.
func (e *events) Delimiter() []byte { return []byte("\n\n") }

// StreamContentType is that of streams.
func (e *events) StreamContentType(any) string { return "text/event-stream" }

// strictQuery refuses parameters that the method does not know.
type strictQuery struct{}

// Parse reads a query into a request.
func (strictQuery) Parse(m proto.Message, values url.Values, filter *utilities.DoubleArray) error {
	for name := range values {
		d := m.ProtoReflect().Descriptor()
		for part := range strings.SplitSeq(name, ".") {
			var f protoreflect.FieldDescriptor
			if d != nil {
				if f = d.Fields().ByJSONName(part); f == nil {
					f = d.Fields().ByTextName(part)
				}
			}
			if f == nil {
				return fmt.Errorf("unknown field %q", clip(name))
			}
			d = f.Message()
		}
	}
	return (&runtime.DefaultQueryParser{}).Parse(m, values, filter)
}
