package gateway

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/stopline-traffic/stopline/api/openapi"
	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// The OWASP API Security Top 10 (2023) against the whole API:
//
//	API1  object level        TestMatrix: own and others' requests, records, access
//	API2  authentication      TestMatrixCredentials, TestOwnTokens, TestOIDC, TestTokensForOneCall
//	API3  property level      TestMatrixProperties, TestMassAssignment
//	API4  consumption         TestMatrixConsumption, TestBodySize, fuzz_test.go
//	API5  function level      TestMatrix: every role at every method
//	API6  business flows      priority: quotas, one request for one key
//	API7  request forgery     TestMatrixForgery, TestForeignIssuers
//	API8  misconfiguration    TestMatrixMisconfiguration
//	API9  inventory           TestMatrixInventory
//	API10 other services      TestMatrixAudit
//
// What must come out of TestMatrix is not written down: the policy is asked, about
// objects that the table names on its own account. STOPLINE_MATRIX=all tries every
// combination.

// purpose is what a call says of itself.
type purpose struct{ code, caseNo, basis string }

var purposes = []purpose{
	{"operations", "", ""}, {"maintenance", "", ""}, {"emergency-response", "", ""}, {"transit-service", "", ""}, {"planning", "", ""},
	{"investigation", "K-17/26", "warrant"}, {"investigation", "", "warrant"}, {"investigation", "K-17/26", "hunch"},
	{"litigation", "K-17/26", "court-order"}, {"audit", "", ""}, {"governance", "", ""}, {"", "", ""}, {"because", "", ""},
}

// row is one method with one object.
type row struct {
	name string // of the object
	req  proto.Message
	// objects are those that the policy has to be asked about, by who asks.
	objects func(by access.Principal) []access.Object
	// approved is a second person, by who asks and what for.
	approved func(by access.Principal, p purpose) string
}

// The objects that the world of the matrix has.
const (
	fireRequest, transitRequest = "FIREREQUEST", "BUSREQUEST"
	roadsOverride               = "ROADSOVERRIDE"
	frameLeaf, fireLeaf         = 11, 12
	transitLeaf, accessLeaf     = 13, 14
	noLeaf                      = 99
)

var leaves = map[uint64]indexed{
	frameLeaf:   {Index: frameLeaf, Height: 1, Kind: "frame", Junction: ledgertest.Junction},
	fireLeaf:    {Index: fireLeaf, Height: 1, Kind: "request", Requester: "fire/fire-desk-1"},
	transitLeaf: {Index: transitLeaf, Height: 1, Kind: "request", Requester: "transit/transit-desk-1"},
	accessLeaf:  {Index: accessLeaf, Height: 1, Kind: "access", Requester: "police/police-1"},
}

func always(o ...access.Object) func(access.Principal) []access.Object {
	return func(access.Principal) []access.Object { return o }
}

func aJunction(id string) func(access.Principal) []access.Object {
	return always(access.Object{Type: "Junction", ID: id, Junction: id})
}

func aRecord(i uint64) func(access.Principal) []access.Object {
	l := leaves[i] // of one that is not there nothing is known
	agency, _, _ := strings.Cut(l.Requester, "/")
	return always(access.Object{Type: "Record", ID: fmt.Sprint(i), Kind: l.Kind, Agency: agency, Junction: l.Junction})
}

// rows are the requests of every method. A change that the policy grants does
// nothing here: it names what is not there.
func (m *matrix) rows() map[string][]row {
	j := ledgertest.Junction
	hour := func(n int) *timestamppb.Timestamp {
		return timestamppb.New(time.Now().Add(time.Duration(n) * time.Hour))
	}
	hex64 := strings.Repeat("ab", 32)
	filter := &pb.RecordFilter{Kind: "frame"}
	records := always(access.Object{Type: "Record", ID: "*", Kind: "frame"})
	requests := func(make func(id string) proto.Message) []row {
		return []row{
			{"fire's", make(fireRequest), always(access.Object{Type: "Request", ID: fireRequest, Agency: "fire"}), nil},
			{"transit's", make(transitRequest), always(access.Object{Type: "Request", ID: transitRequest, Agency: "transit"}), nil},
			{"none", make("NONE"), always(access.Object{Type: "Request", ID: "NONE"}), nil},
		}
	}
	perRecord := func(make func(i uint64) proto.Message) (out []row) {
		for _, i := range []uint64{frameLeaf, fireLeaf, transitLeaf, accessLeaf, noLeaf} {
			out = append(out, row{fmt.Sprint("leaf ", i), make(i), aRecord(i), nil})
		}
		return out
	}
	proposal := always(access.Object{Type: "Proposal", ID: hex64})
	own := func(by access.Principal) []access.Object {
		return []access.Object{{Type: "Access", ID: by.Client.Agency, Agency: by.Client.Agency}}
	}
	device := func(junction string) func(access.Principal) []access.Object {
		return always(access.Object{Type: "Device", ID: "x", Junction: junction})
	}
	export := &pb.ExportRecordsRequest{Filter: filter}
	approvedExport := &pb.ExportRecordsRequest{Filter: filter, Approval: m.approval}
	return map[string][]row{
		"TrafficService/GetNetwork":          {{"", &pb.GetNetworkRequest{}, nil, nil}},
		"TrafficService/GetJunctionState":    {{"", &pb.GetJunctionStateRequest{Junction: j}, aJunction(j), nil}, {"none", &pb.GetJunctionStateRequest{Junction: "J9"}, aJunction("J9"), nil}},
		"TrafficService/ListJunctionStates":  {{"all", &pb.ListJunctionStatesRequest{}, nil, nil}, {"one", &pb.ListJunctionStatesRequest{Junctions: []string{j}}, aJunction(j), nil}},
		"TrafficService/WatchJunctionStates": {{"all", &pb.WatchJunctionStatesRequest{}, nil, nil}, {"one", &pb.WatchJunctionStatesRequest{Junctions: []string{j}}, aJunction(j), nil}},
		"TrafficService/ListJunctionHistory": {{"", &pb.ListJunctionHistoryRequest{Junction: j, StartTime: hour(-2), EndTime: hour(-1)}, aJunction(j), nil}},
		"TrafficService/GetPerformance":      {{"", &pb.GetPerformanceRequest{Junction: j, StartTime: hour(-2), EndTime: hour(-1)}, aJunction(j), nil}},

		"PriorityService/RequestPriority": {{"", &pb.RequestPriorityRequest{IdempotencyKey: "matrix-1", Request: &pb.PriorityRequest{Class: pb.PriorityClass_PRIORITY_CLASS_EMERGENCY, Vehicle: "v",
			Stops: []*pb.PriorityStop{{Junction: "J9", Group: "g", Arrival: hour(1)}}}}, nil, nil}},
		"PriorityService/GetPriority":    requests(func(id string) proto.Message { return &pb.GetPriorityRequest{Id: id} }),
		"PriorityService/WatchPriority":  requests(func(id string) proto.Message { return &pb.WatchPriorityRequest{Id: id} }),
		"PriorityService/CancelPriority": requests(func(id string) proto.Message { return &pb.CancelPriorityRequest{Id: id} }),
		"PriorityService/UpdateArrival": requests(func(id string) proto.Message {
			return &pb.UpdateArrivalRequest{Id: id, Stops: []*pb.PriorityStop{{Junction: "J9", Group: "g", Arrival: hour(1)}}}
		}),
		"PriorityService/ListPriorities": {{"", &pb.ListPrioritiesRequest{}, nil, nil}},
		"PriorityService/Override": {{"", &pb.OverrideRequest{Junction: "J9", Action: pb.OverrideAction_OVERRIDE_ACTION_FLASH, Reason: "test", Duration: durationpb.New(time.Minute), IdempotencyKey: "matrix-1"},
			aJunction("J9"), nil}},
		"PriorityService/ReleaseOverride": {{"none", &pb.ReleaseOverrideRequest{Id: "NONE"}, always(access.Object{Type: "Override", ID: "NONE"}), nil}},
		"PriorityService/ListOverrides":   {{"", &pb.ListOverridesRequest{Junction: j}, aJunction(j), nil}},

		"EvidenceService/SearchRecords": {{"", &pb.SearchRecordsRequest{Filter: filter}, records, nil},
			{"access", &pb.SearchRecordsRequest{Filter: &pb.RecordFilter{Kind: "access"}}, always(access.Object{Type: "Record", ID: "*", Kind: "access"}), nil}},
		"EvidenceService/GetBundle":    perRecord(func(i uint64) proto.Message { return &pb.GetBundleRequest{Index: i} }),
		"EvidenceService/GetChain":     perRecord(func(i uint64) proto.Message { return &pb.GetChainRequest{Index: i} }),
		"EvidenceService/VerifyBundle": {{"", &pb.VerifyBundleRequest{Bundle: []byte("x")}, nil, nil}},
		"EvidenceService/ExportRecords": {{"alone", export, records, nil},
			{"approved", approvedExport, records, func(by access.Principal, p purpose) string {
				if by.ID == "police-1" && p == m.approvedFor {
					return "police-2"
				}
				return ""
			}}},
		"EvidenceService/ApproveExport": {{"", &pb.ApproveExportRequest{Filter: filter, Requester: "somebody"}, records, nil}},

		"RegistryService/ListEntries":    {{"", &pb.ListEntriesRequest{}, nil, nil}},
		"RegistryService/GetEntry":       {{"", &pb.GetEntryRequest{Type: "junction", Id: j}, always(access.Object{Type: "Entry", ID: "junction/" + j}), nil}},
		"RegistryService/ListProposals":  {{"", &pb.ListProposalsRequest{}, nil, nil}},
		"RegistryService/GetProposal":    {{"", &pb.GetProposalRequest{Id: hex64}, proposal, nil}},
		"RegistryService/ProposeChange":  {{"", &pb.ProposeChangeRequest{Document: []byte("{}")}, nil, nil}},
		"RegistryService/SignProposal":   {{"", &pb.SignProposalRequest{Id: hex64, KeyId: hex64[:32], Signature: make([]byte, 64)}, proposal, nil}},
		"RegistryService/SubmitProposal": {{"", &pb.SubmitProposalRequest{Id: hex64, Envelope: []byte("x")}, proposal, nil}},

		"DeviceService/CreateClaim":  {{"", &pb.CreateClaimRequest{Device: "x", Junction: j}, device(j), nil}},
		"DeviceService/Enrol":        {{"", &pb.EnrolRequest{Claim: hex64, Key: make([]byte, 32), Proof: make([]byte, 64)}, nil, nil}},
		"DeviceService/RotateKey":    {{"", &pb.RotateKeyRequest{Device: "x", NewKey: make([]byte, 32), OldProof: make([]byte, 64), NewProof: make([]byte, 64)}, nil, nil}},
		"DeviceService/RevokeDevice": {{"", &pb.RevokeDeviceRequest{Device: "x", Reason: "stolen"}, device(""), nil}},
		"DeviceService/ListDevices":  {{"", &pb.ListDevicesRequest{}, nil, nil}, {"of one", &pb.ListDevicesRequest{Junction: j}, aJunction(j), nil}},

		"AccessService/ListAccess": {{"own", &pb.ListAccessRequest{}, own, nil},
			{"police's", &pb.ListAccessRequest{Agency: "police"}, always(access.Object{Type: "Access", ID: "police", Agency: "police"}), nil}},
		"AccessService/GetAccessSummary": {{"", &pb.GetAccessSummaryRequest{Month: "2026-11"}, nil, nil}},

		"LogService/GetCheckpoint":       {{"", &pb.GetCheckpointRequest{}, nil, nil}},
		"LogService/GetInclusionProof":   {{"", &pb.GetInclusionProofRequest{Index: 1}, nil, nil}},
		"LogService/GetConsistencyProof": {{"", &pb.GetConsistencyProofRequest{FromSize: 1, ToSize: 2}, nil, nil}},
	}
}

// methods are all of the API by name, as its descriptors have them.
func methods(t testing.TB) map[string]protoreflect.MethodDescriptor {
	t.Helper()
	out := map[string]protoreflect.MethodDescriptor{}
	protoregistry.GlobalFiles.RangeFilesByPackage("stopline.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			if s.Name() == "IngestService" { // ingest's own door
				continue
			}
			for k := range s.Methods().Len() {
				m := s.Methods().Get(k)
				out[fmt.Sprintf("%s/%s", s.Name(), m.Name())] = m
			}
		}
		return true
	})
	return out
}

// matrix is a world with objects of several agencies.
type matrix struct {
	*apiWorld
	conns       *grpc.ClientConn
	clients     []access.Principal
	tokens      map[string]string
	all         map[string]protoreflect.MethodDescriptor
	approval    string
	approvedFor purpose
	garbage     atomic.Pointer[string] // what audit answers instead
	outside     http.Client
}

const (
	expiredClient = "gone-1"
	visitor       = "visitor-1"
)

func matrixKey(name string) ed25519.PrivateKey {
	seed := make([]byte, 32)
	copy(seed, name)
	return ed25519.NewKeyFromSeed(seed)
}

func newMatrix(t testing.TB) *matrix {
	t.Helper()
	m := &matrix{tokens: map[string]string{}, all: methods(t), outside: http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	t.Cleanup(m.outside.CloseIdleConnections)
	extra := map[string]identity.Client{}
	for name, c := range map[string]struct{ role, until string }{expiredClient: {"operator", "2020-01-01T00:00:00Z"}, visitor: {"visitor", "2100-01-01T00:00:00Z"}} {
		extra[name] = identity.Client{Agency: "roads", TokenKey: identity.PublicKey(matrixKey(name).Public().(ed25519.PublicKey)), Roles: []string{c.role}, Until: c.until}
	}
	m.apiWorld = newAPIWorld(t, apiOptions{entries: extra, audit: http.HandlerFunc(m.answer), edit: func(c *APIConfig) {
		c.Limits = &Limits{Rate: 1e6, Burst: 1e6, Concurrent: 1e4, Streams: 1e4, PriorityConcurrent: 1e4, Total: 1e4}
	}}).ready()
	m.conns = m.conn(nil)
	m.frame(1, "r")
	m.seed()
	known := m.api.registry().Clients()
	for _, id := range slices.Sorted(maps.Keys(known)) {
		m.clients = append(m.clients, access.Principal{ID: id, Client: known[id]})
		key := matrixKey(id)
		if k, err := m.d.Key(district.ClientKey(id)); err == nil {
			key = k
		}
		token, err := NewToken("harbour", id, key, m.api.now(), 10*time.Minute, "")
		if err != nil {
			t.Fatal(err)
		}
		m.tokens[id] = token
	}
	m.clients = append(m.clients, access.Principal{}) // the public
	// One person's word for another's export.
	m.approvedFor = purpose{"investigation", "K-17/26", "warrant"}
	a, err := pb.NewEvidenceServiceClient(m.conns).ApproveExport(as(t.Context(), m.headers("police-2", m.approvedFor)), &pb.ApproveExportRequest{Filter: &pb.RecordFilter{Kind: "frame"}, Requester: "police-1"})
	if err != nil {
		t.Fatal(err)
	}
	m.approval = a.Approval
	return m
}

// seed puts requests of two agencies and an override into the gateway.
func (m *matrix) seed() {
	for _, part := range m.api.parts {
		p, ok := part.(*priorityPart)
		if !ok {
			continue
		}
		now := time.Now()
		p.mu.Lock()
		for id, agency := range map[string]string{fireRequest: "fire", transitRequest: "transit"} {
			p.own[id] = &ownRequest{first: &traffic.Request{District: "harbour", ID: id, By: traffic.Agent{Agency: agency, Name: agency + "-desk-1"}, Time: now,
				Stops: []traffic.Stop{{Junction: "J1", Group: "g", Arrival: now.Add(time.Minute)}}, Expires: now.Add(time.Hour)}, revision: 1, at: now, refused: "test: a request that has ended"}
		}
		p.overrides[roadsOverride] = &override{o: traffic.Override{ID: roadsOverride, Junction: "J1", By: traffic.Agent{Agency: "roads", Name: "operator-1"}}}
		p.mu.Unlock()
	}
}

// answer is audit's.
func (m *matrix) answer(w http.ResponseWriter, r *http.Request) {
	if g := m.garbage.Load(); g != nil {
		_, _ = io.WriteString(w, *g)
		return
	}
	var out any
	switch p := r.URL.Path; {
	case strings.HasPrefix(p, "/record/"):
		for i, l := range leaves {
			if p == fmt.Sprintf("/record/%d", i) {
				out = l
			}
		}
	case p == "/v1/records", p == "/payloads":
		page := indexPage{}
		for _, i := range slices.Sorted(maps.Keys(leaves)) {
			page.Records = append(page.Records, leaves[i])
		}
		out = page
	}
	if out == nil {
		notFound(w, "there is no "+r.URL.Path)
		return
	}
	_ = json.NewEncoder(w).Encode(out)
}

// headers are those of a call.
func (m *matrix) headers(client string, p purpose) http.Header {
	h := http.Header{}
	for k, v := range map[string]string{headerPurpose: p.code, headerCase: p.caseNo, headerBasis: p.basis} {
		if v != "" {
			h.Set(k, v)
		}
	}
	if t := m.tokens[client]; t != "" {
		h.Set("Authorization", "Bearer "+t)
	}
	return h
}

// grpcCall makes a call and returns its first answer's code. Of a stream that goes
// on the rest is not waited for.
func (m *matrix) grpcCall(ctx context.Context, d protoreflect.MethodDescriptor, h http.Header, req proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	method := fmt.Sprintf("/%s/%s", d.Parent().FullName(), d.Name())
	out, err := protoregistry.GlobalTypes.FindMessageByName(d.Output().FullName())
	if err != nil {
		return err
	}
	answer := out.New().Interface()
	if !d.IsStreamingServer() {
		err := m.conns.Invoke(as(ctx, h), method, req, answer)
		// What audit does not answer in time is not decided either.
		for n := 0; n < 3 && status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "audit cannot be asked"); n++ {
			err = m.conns.Invoke(as(ctx, h), method, req, answer)
		}
		return err
	}
	s, err := m.conns.NewStream(as(ctx, h), &grpc.StreamDesc{ServerStreams: true}, method)
	if err == nil {
		err = s.SendMsg(req)
	}
	if err == nil {
		err = s.CloseSend()
	}
	if err == nil {
		err = s.RecvMsg(answer)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

var pathVariable = regexp.MustCompile(`\{([a-z_]+)\}`)

// restRequests makes the HTTP requests that a method's bindings want.
func restRequests(d protoreflect.MethodDescriptor, req proto.Message) (out []*http.Request, err error) {
	rule, ok := proto.GetExtension(d.Options(), annotations.E_Http).(*annotations.HttpRule)
	if !ok || rule == nil {
		return nil, fmt.Errorf("%s has no HTTP annotation", d.FullName())
	}
	for _, b := range append([]*annotations.HttpRule{rule}, rule.AdditionalBindings...) {
		raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(req)
		if err != nil {
			return nil, err
		}
		var fields map[string]any
		if err := json.Unmarshal(raw, &fields); err != nil {
			return nil, err
		}
		method, template := http.MethodGet, b.GetGet()
		if template == "" {
			method, template = http.MethodPost, b.GetPost()
		}
		missing := false
		at := pathVariable.ReplaceAllStringFunc(template, func(v string) string {
			name := strings.Trim(v, "{}")
			value, ok := fields[name]
			missing = missing || !ok
			delete(fields, name)
			return url.PathEscape(fmt.Sprint(value))
		})
		if missing { // the binding is for other requests
			continue
		}
		body := io.Reader(http.NoBody)
		if method == http.MethodPost {
			rest, err := json.Marshal(fields)
			if err != nil {
				return nil, err
			}
			body = strings.NewReader(string(rest))
		} else if q := flatten(url.Values{}, "", fields); len(q) > 0 {
			at += "?" + q.Encode()
		}
		r, err := http.NewRequest(method, at, body)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no binding fits %v", d.FullName(), req)
	}
	return out, nil
}

// flatten puts fields into a query.
func flatten(q url.Values, prefix string, fields map[string]any) url.Values {
	for k, v := range fields {
		switch v := v.(type) {
		case map[string]any:
			flatten(q, prefix+k+".", v)
		case []any:
			for _, x := range v {
				q.Add(prefix+k, fmt.Sprint(x))
			}
		default:
			q.Set(prefix+k, fmt.Sprint(v))
		}
	}
	return q
}

// restCall makes the calls and returns their statuses.
func (m *matrix) restCall(ctx context.Context, d protoreflect.MethodDescriptor, h http.Header, req proto.Message) (out []int, err error) {
	rs, err := restRequests(d, req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends streams
	for _, r := range rs {
		r = r.WithContext(ctx)
		r.URL.Scheme, r.URL.Host = "http", m.api.Addr()
		r.Header = h.Clone()
		res, err := m.outside.Do(r)
		for n := 0; n < 10 && err == nil && res.StatusCode == http.StatusServiceUnavailable && r.Method == http.MethodGet; n++ {
			_ = res.Body.Close()
			res, err = m.outside.Do(r)
		}
		if err != nil {
			return nil, err
		}
		if !d.IsStreamingServer() {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err := errors.Join(err, res.Body.Close()); err != nil {
			return nil, err
		}
		out = append(out, res.StatusCode)
	}
	return out, nil
}

// cell is what must come of a call.
type cell int

const (
	granted cell = iota
	denied
	nobodyKnown
)

func (c cell) String() string { return [...]string{"granted", "denied", "unauthenticated"}[c] }

func ofCode(err error) cell {
	switch status.Code(err) {
	case codes.Unauthenticated:
		return nobodyKnown
	case codes.PermissionDenied:
		return denied
	}
	return granted // or wrong in another way, which the policy has nothing to do with
}

func ofStatus(n int) cell {
	switch n {
	case http.StatusUnauthorized:
		return nobodyKnown
	case http.StatusForbidden:
		return denied
	}
	return granted
}

// job is one combination, and what the policy says of it.
type job struct {
	method string
	row    row
	by     access.Principal
	p      purpose
	want   cell
}

// jobs are the combinations that are tried, and how often each answer is expected:
// all of one method, or of every method where none is named, of these a part. Of
// each client at each object every answer is tried at least once.
func (m *matrix) jobs(t *testing.T, engine *access.Engine, only string) (jobs []job, count map[cell]int) {
	t.Helper()
	count = map[cell]int{}
	every := 4 // of those that are like others
	switch {
	case only != "" || os.Getenv("STOPLINE_MATRIX") == "all":
		every = 1
	case raced:
		every = 1 << 20
	}
	for name, rs := range m.rows() {
		if only != "" && only != name {
			continue
		}
		method := "/stopline.v1." + name
		rule := access.Methods[method]
		for nth, r := range rs {
			for who, by := range m.clients {
				tried := map[cell]bool{}
				for i, p := range purposes {
					// What a purpose lacks does not depend on the object.
					lacks := p.code == "" || p.code == "because" || p.code == "investigation" && p != purposes[5]
					if nth > 0 && lacks {
						continue
					}
					j := job{name, r, by, p, granted}
					call := access.Call{Principal: by, Method: method, Purpose: p.code, Case: p.caseNo, LegalBasis: p.basis, Time: m.api.now()}
					if r.objects != nil {
						call.Objects = r.objects(by)
					}
					if r.approved != nil {
						call.ApprovedBy = r.approved(by, p)
					}
					switch {
					case rule.Public:
					case by.ID == "":
						j.want = nobodyKnown
					case !engine.Decide(call).Granted:
						j.want = denied
					}
					if turn := 1 + i*7 + who*3 + len(name) + nth; tried[j.want] && turn%every != 0 {
						continue
					}
					tried[j.want] = true
					count[j.want]++
					jobs = append(jobs, j)
				}
			}
		}
	}
	return jobs, count
}

// play makes the calls by both doors, and returns what came out otherwise.
func (m *matrix) play(jobs []job) (wrong []string) {
	work := make(chan job)
	var group sync.WaitGroup
	var mu sync.Mutex
	for range 48 {
		group.Go(func() {
			for j := range work {
				h, d := m.headers(j.by.ID, j.p), m.all[j.method]
				bad := func(door string, got any) {
					mu.Lock()
					defer mu.Unlock()
					wrong = append(wrong, fmt.Sprintf("%s %s (%s) as %q for %+v: got %v, want it %s", door, j.method, j.row.name, j.by.ID, j.p, got, j.want))
				}
				// What two methods for devices say themselves of a false proof.
				own := j.method == "DeviceService/Enrol" || j.method == "DeviceService/RotateKey"
				if err := m.grpcCall(m.t.Context(), d, h, j.row.req); ofCode(err) != j.want && !(own && ofCode(err) == denied) {
					bad("gRPC", err)
				}
				codes, err := m.restCall(m.t.Context(), d, h, j.row.req)
				if err != nil {
					bad("REST", err)
				}
				for _, c := range codes {
					if ofStatus(c) != j.want && !(own && ofStatus(c) == denied) {
						bad("REST", c)
					}
				}
			}
		})
	}
	for _, j := range jobs {
		work <- j
	}
	close(work)
	group.Wait()
	return wrong
}

// Every role at every method, for every purpose, about its own objects and those
// of others: both doors answer what the policy says, and every denial is on record.
func TestMatrix(t *testing.T) {
	m := newMatrix(t)
	rows := m.rows()
	for name := range m.all {
		if len(rows[name]) == 0 {
			t.Errorf("%s: the matrix has no row for it", name)
		}
	}
	jobs, count := m.jobs(t, m.api.engine(), "")
	// The oracle knows all three answers, or it would prove nothing.
	if count[granted] < 200 || count[denied] < 500 || count[nobodyKnown] < 50 {
		t.Fatalf("the policy gives %v, want many of each", count)
	}
	refusals := map[string]int{} // by client and method
	for _, j := range jobs {
		if j.want != denied {
			continue
		}
		rs, err := restRequests(m.all[j.method], j.row.req)
		if err != nil {
			t.Fatal(err)
		}
		refusals[j.by.ID+" /stopline.v1."+j.method] += 1 + len(rs)
	}
	if wrong := m.play(jobs); len(wrong) > 0 {
		t.Fatalf("%d of %d combinations come out otherwise than the policy says:\n%s", len(wrong), len(jobs), strings.Join(wrong[:min(len(wrong), 20)], "\n"))
	}
	t.Logf("%d combinations by two doors: %d granted, %d denied, %d unauthenticated", len(jobs), count[granted], count[denied], count[nobodyKnown])
	got := map[string]int{}
	wait(t, "every denial on record", func() bool {
		clear(got)
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, a := range m.sealed {
			if !a.Granted {
				got[a.By.Name+" "+a.Method]++
			}
		}
		return maps.Equal(got, refusals)
	})
}

// The matrix would notice: against a policy with one rule more or less, as if the
// gateway had forgotten it, both doors differ.
func TestMatrixNotices(t *testing.T) {
	m := newMatrix(t)
	for rule, method := range map[string]string{
		"emergency-corridor": "PriorityService/GetPriority", "own-access": "AccessService/ListAccess", "operators-explain": "EvidenceService/GetBundle",
		"live-operations": "TrafficService/WatchJunctionStates", "technicians-enrol": "DeviceService/ListDevices",
	} {
		p := access.Default()
		at := strings.Index(p.Cedar, `@id("`+rule+`")`)
		if at < 0 {
			t.Fatalf("the default policy has no rule %s", rule)
		}
		p.Cedar = p.Cedar[:at] + p.Cedar[at+strings.Index(p.Cedar[at:], ";")+1:]
		without, err := access.Compile("harbour", p)
		if err != nil {
			t.Fatal(err)
		}
		jobs, _ := m.jobs(t, without, method)
		real, _ := m.jobs(t, m.api.engine(), method)
		jobs = slices.DeleteFunc(jobs, func(j job) bool { // whose answer is the same take time only
			return !slices.ContainsFunc(real, func(r job) bool {
				return r.row.name == j.row.name && r.by.ID == j.by.ID && r.p == j.p && r.want != j.want
			})
		})
		jobs = jobs[:min(len(jobs), 10)]
		wrong := m.play(jobs)
		for _, door := range []string{"gRPC ", "REST "} {
			if !slices.ContainsFunc(wrong, func(w string) bool { return strings.HasPrefix(w, door+method) }) {
				t.Errorf("without %s, %sdoes not differ at %s: %v", rule, door, method, wrong)
			}
		}
	}
}

// API2: every method with every false credential, by both doors.
func TestMatrixCredentials(t *testing.T) {
	m := newMatrix(t)
	now := m.api.now()
	operator, err := m.d.Key(district.ClientKey("operator-1"))
	if err != nil {
		t.Fatal(err)
	}
	token := func(method jwt.SigningMethod, key any, edit func(jwt.MapClaims)) string {
		t.Helper()
		c := jwt.MapClaims{"iss": "operator-1", "sub": "operator-1", "aud": Audience("harbour"), "iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}
		if edit != nil {
			edit(c)
		}
		s, err := jwt.NewWithClaims(method, c).SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := token(jwt.SigningMethodEdDSA, operator, nil)
	once, err := NewToken("harbour", "operator-1", operator, now, time.Minute, "one")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.grpcCall(t.Context(), m.all["TrafficService/GetJunctionState"], http.Header{"Authorization": {"Bearer " + once}, headerPurpose: {"operations"}},
		&pb.GetJunctionStateRequest{Junction: "J1"}); err != nil {
		t.Fatalf("a token for one call: %v", err)
	}
	bad := map[string]string{
		"none":            "",
		"no token":        "Bearer ",
		"not a token":     "Bearer x.y.z",
		"basic":           "Basic b3BlcmF0b3ItMTp4",
		"alg none":        "Bearer " + token(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil),
		"HMAC by the key": "Bearer " + token(jwt.SigningMethodHS256, []byte(operator.Public().(ed25519.PublicKey)), nil),
		"another's key":   "Bearer " + token(jwt.SigningMethodEdDSA, matrixKey("thief"), nil),
		"cut short":       "Bearer " + good[:len(good)-4],
		"expired": "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) {
			c["iat"], c["exp"] = now.Add(-10*time.Minute).Unix(), now.Add(-time.Minute).Unix()
		}),
		"without an end":      "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { delete(c, "exp") }),
		"for a year":          "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["exp"] = now.AddDate(1, 0, 0).Unix() }),
		"from the future":     "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["iat"] = now.Add(5 * time.Minute).Unix() }),
		"another audience":    "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["aud"] = Audience("airport") }),
		"another's name":      "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["iss"], c["sub"] = "police-1", "police-1" }),
		"in another's name":   "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["sub"] = "police-1" }),
		"of nobody":           "Bearer " + token(jwt.SigningMethodEdDSA, operator, func(c jwt.MapClaims) { c["iss"], c["sub"] = "nobody", "nobody" }),
		"used before":         "Bearer " + once,
		"two tokens in one":   "Bearer " + good + " " + good,
		"larger than allowed": "Bearer " + strings.Repeat("x", 9<<10),
	}
	for name, rs := range m.rows() {
		if access.Methods["/stopline.v1."+name].Public {
			continue
		}
		for what, auth := range bad {
			h := m.headers("", purposes[0])
			if auth != "" {
				h.Set("Authorization", auth)
			}
			if err := m.grpcCall(t.Context(), m.all[name], h, rs[0].req); ofCode(err) != nobodyKnown {
				t.Errorf("gRPC %s with a token %s: got %v, want it unauthenticated", name, what, err)
			}
			codes, err := m.restCall(t.Context(), m.all[name], h, rs[0].req)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range codes {
				if ofStatus(c) != nobodyKnown {
					t.Errorf("REST %s with a token %s: got %d, want 401", name, what, c)
				}
			}
		}
	}
}

// API3: nobody writes a field that is not theirs to write, in any method, and
// nobody is shown a record that they could not have asked for by its number.
func TestMatrixProperties(t *testing.T) {
	m := newMatrix(t)
	for name, d := range m.all {
		rs, err := restRequests(d, m.rows()[name][0].req)
		if err != nil {
			t.Fatal(err)
		}
		// By REST a method without a query has nowhere to put another field: it is
		// passed over, and must change nothing.
		onlyPath := rs[0].Method == http.MethodGet && len(pathVariable.FindAllString(proto.GetExtension(d.Options(), annotations.E_Http).(*annotations.HttpRule).GetGet(), -1)) == d.Input().Fields().Len()
		auditing := purpose{"audit", "", ""}
		without, err := m.restCall(t.Context(), d, m.headers("auditor-1", auditing), m.rows()[name][0].req)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"agency_id", "roles", "approvedBy", "granted", "__proto__"} {
			if d.Input().Fields().ByJSONName(f) != nil || d.Input().Fields().ByName(protoreflect.Name(f)) != nil {
				t.Errorf("%s: has the field %s, choose another that it does not have", name, f)
			}
			r := rs[0].Clone(t.Context())
			if r.Method == http.MethodGet {
				q := r.URL.Query()
				q.Set(f, "x")
				r.URL.RawQuery = q.Encode()
			} else {
				r.Body = io.NopCloser(strings.NewReader(`{"` + f + `":"x"}`))
				r.ContentLength = -1
			}
			r.URL.Scheme, r.URL.Host = "http", m.api.Addr()
			r.Header = m.headers("auditor-1", auditing)
			res, err := m.outside.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = res.Body.Close()
			want := http.StatusBadRequest
			if onlyPath {
				want = without[0]
			}
			if res.StatusCode != want {
				t.Errorf("%s with the field %s: got %s, want %d", name, f, res.Status, want)
			}
		}
	}
	engine := m.api.engine()
	for _, tc := range []struct {
		client string
		p      purpose
	}{{"operator-1", purpose{"operations", "", ""}}, {"auditor-1", purpose{"audit", "", ""}}, {"police-1", purpose{"investigation", "K-17/26", "warrant"}}} {
		r, err := pb.NewEvidenceServiceClient(m.conns).SearchRecords(as(t.Context(), m.headers(tc.client, tc.p)), &pb.SearchRecordsRequest{})
		if err != nil {
			t.Fatalf("%s: %v", tc.client, err)
		}
		by, _ := m.api.guard.Auth.Still(tc.client)
		shown := map[uint64]bool{}
		for _, x := range r.Records {
			shown[x.Index] = true
		}
		for i := range leaves {
			may := engine.Decide(access.Call{Principal: by, Method: evidenceService + "SearchRecords", Objects: aRecord(i)(by), Purpose: tc.p.code, Case: tc.p.caseNo, LegalBasis: tc.p.basis, Time: m.api.now()}).Granted
			// An access record has an author of its own who hides it; here it cannot be read.
			if shown[i] && !may || may && !shown[i] && i != accessLeaf {
				t.Errorf("%s: leaf %d is shown: %v, the policy says %v", tc.client, i, shown[i], may)
			}
		}
	}
}

// API4: what asks for too much is refused by its form, in any method that has such
// a field.
func TestMatrixConsumption(t *testing.T) {
	m := newMatrix(t)
	n := 0
	for name, d := range m.all {
		for field, v := range map[protoreflect.Name]protoreflect.Value{
			"page_size": protoreflect.ValueOfInt32(1001), "page_token": protoreflect.ValueOfString(strings.Repeat("x", 513)),
		} {
			f := d.Input().Fields().ByName(field)
			if f == nil {
				continue
			}
			for i, bad := range []protoreflect.Value{v, protoreflect.ValueOfInt32(-1)} {
				if i == 1 && field != "page_size" {
					continue
				}
				n++
				req := proto.Clone(m.rows()[name][0].req)
				req.ProtoReflect().Set(f, bad)
				if err := m.grpcCall(t.Context(), d, m.headers("auditor-1", purpose{"audit", "", ""}), req); status.Code(err) != codes.InvalidArgument {
					t.Errorf("%s with %s %v: got %v, want INVALID_ARGUMENT", name, field, bad, err)
				}
			}
		}
		// A list without a page could grow without bound.
		if strings.HasPrefix(string(d.Name()), "List") && name != "PriorityService/ListOverrides" && d.Input().Fields().ByName("page_size") == nil {
			t.Errorf("%s has no page_size", name)
		}
	}
	if n < 10 {
		t.Errorf("%d requests tried, want those of all lists", n)
	}
}

// API7: nothing that a client sends makes the gateway call anybody.
func TestMatrixForgery(t *testing.T) {
	m := newMatrix(t)
	var hits atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	defer elsewhere.Close()
	// No field takes an address.
	for name, d := range m.all {
		fields := d.Input().Fields()
		for i := range fields.Len() {
			if f := string(fields.Get(i).Name()); regexp.MustCompile(`(^|_)(ur[il]|host|callback|webhook|address|endpoint|redirect)($|_)`).MatchString(f) {
				t.Errorf("%s has the field %s: what does the gateway do with it?", name, f)
			}
		}
	}
	forged, err := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{"iss": elsewhere.URL, "sub": "x", "aud": Audience("harbour"), "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}).SignedString(matrixKey("x"))
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{"Authorization": {"Bearer " + forged}, headerPurpose: {elsewhere.URL}, "X-Forwarded-Host": {elsewhere.URL}, "Forwarded": {"host=" + elsewhere.URL}}
	for name, rs := range m.rows() {
		if err := m.grpcCall(t.Context(), m.all[name], h, rs[0].req); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: got %v, want UNAUTHENTICATED", name, err)
		}
		// Where an id could be a path for audit.
		for _, id := range []string{"../record/14", elsewhere.URL, "J1?payload=1", "%2e%2e/x", "a\nb"} {
			req := proto.Clone(rs[0].req)
			for _, field := range []protoreflect.Name{"junction", "id", "device", "type"} {
				if f := req.ProtoReflect().Descriptor().Fields().ByName(field); f != nil && f.Kind() == protoreflect.StringKind && !f.IsList() {
					req.ProtoReflect().Set(f, protoreflect.ValueOfString(id))
				}
			}
			if err := m.grpcCall(t.Context(), m.all[name], m.headers("auditor-1", purpose{"audit", "", ""}), req); status.Code(err) == codes.Internal {
				t.Errorf("%s with %q: got %v", name, id, err)
			}
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("the gateway has called a server that a client named, %d times", n)
	}
}

// API8: what every answer says, and what no answer says.
func TestMatrixMisconfiguration(t *testing.T) {
	m := newMatrix(t)
	for _, at := range []string{"/v1/states", "/v1/nothing", "/v1/network", "/docs/", "/openapi.json", "/debug/pprof/", "/metrics", "/.env"} {
		for _, method := range []string{"GET", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH"} {
			r, err := http.NewRequestWithContext(t.Context(), method, "http://"+m.api.Addr()+at, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Origin", "https://elsewhere.example")
			res, err := m.outside.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err := errors.Join(err, res.Body.Close()); err != nil {
				t.Fatal(err)
			}
			for k, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
				"Access-Control-Allow-Origin": "", "Server": "", "X-Powered-By": ""} {
				if got := res.Header.Get(k); got != want {
					t.Errorf("%s %s: %s is %q, want %q", method, at, k, got, want)
				}
			}
			if !strings.Contains(res.Header.Get("Content-Security-Policy"), "default-src 'none'") {
				t.Errorf("%s %s: no content security policy", method, at)
			}
			if public := method == "GET" && (at == "/v1/network" || at == "/docs/" || at == "/openapi.json"); (res.StatusCode == http.StatusOK) != public {
				t.Errorf("%s %s: got %s", method, at, res.Status)
			}
			if strings.Contains(string(body), "goroutine ") || strings.Contains(string(body), ".go:") {
				t.Errorf("%s %s: the answer says how it is made: %.200s", method, at, body)
			}
		}
	}
}

// API9: what is served, what is described and what is guarded are the same.
func TestMatrixInventory(t *testing.T) {
	m := newMatrix(t)
	served := map[string]bool{}
	for service, info := range m.api.server.GetServiceInfo() {
		if strings.HasPrefix(service, "grpc.reflection.") {
			continue
		}
		for _, x := range info.Methods {
			served["/"+service+"/"+x.Name] = x.IsServerStream
			if x.IsClientStream {
				t.Errorf("%s/%s takes a stream: the guard sees its first message only", service, x.Name)
			}
		}
	}
	var doc struct {
		Paths map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(openapi.JSON, &doc); err != nil {
		t.Fatal(err)
	}
	for name, d := range m.all {
		full := "/stopline.v1." + name
		rule, ok := access.Methods[full]
		stream, is := served[full]
		if !ok || !is {
			t.Errorf("%s: in the access table %v, served %v, want both", full, ok, is)
		}
		if stream != d.IsStreamingServer() || rule.Stream != stream {
			t.Errorf("%s: a stream by its descriptor %v, its server %v, its rule %v", full, d.IsStreamingServer(), stream, rule.Stream)
		}
		delete(served, full)
		rs, err := restRequests(d, m.rows()[name][0].req)
		if err != nil {
			t.Fatal(err)
		}
		if get := rs[0].Method == http.MethodGet; get == rule.Write && name != "EvidenceService/VerifyBundle" && name != "EvidenceService/ExportRecords" { // which read
			t.Errorf("%s: is a write by its rule: %v, and %s by REST", full, rule.Write, rs[0].Method)
		}
		ext := proto.GetExtension(d.Options(), annotations.E_Http).(*annotations.HttpRule)
		at := pathVariable.ReplaceAllStringFunc(ext.GetGet()+ext.GetPost(), func(v string) string {
			return "{" + d.Input().Fields().ByName(protoreflect.Name(strings.Trim(v, "{}"))).JSONName() + "}"
		})
		if doc.Paths[at][strings.ToLower(rs[0].Method)] == nil {
			t.Errorf("%s: %s %s is not in openapi.json", full, rs[0].Method, at)
		}
	}
	for full := range served {
		t.Errorf("%s is served, and no descriptor of the API has it", full)
	}
	for full := range access.Methods {
		if m.all[strings.TrimPrefix(full, "/stopline.v1.")] == nil {
			t.Errorf("%s is in the access table, and there is no such method", full)
		}
	}
	// What is in the table of another service, of old versions or of nobody.
	for _, full := range []string{"/stopline.v1.IngestService/SubmitBatch", "/stopline.v0.TrafficService/GetNetwork", "/stopline.v1.TrafficService/Reset", "/x/y"} {
		err := m.conns.Invoke(as(t.Context(), m.headers("operator-1", purposes[0])), full, &pb.GetNetworkRequest{}, &pb.GetNetworkResponse{})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: got %v, want UNIMPLEMENTED", full, err)
		}
	}
	// One that is served and that nobody has put into the table is refused.
	_, err := m.api.guard.Unary(as(t.Context(), nil), &pb.GetNetworkRequest{}, &grpc.UnaryServerInfo{FullMethod: "/stopline.v1.TrafficService/Forgotten"},
		func(context.Context, any) (any, error) { t.Error("the method was reached"); return nil, nil })
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a method that is not in the table: got %v, want UNIMPLEMENTED", err)
	}
}

// API10: what another service answers is not believed: nonsense is an error, and
// nothing of it is handed on.
func TestMatrixAudit(t *testing.T) {
	m := newMatrix(t)
	for _, garbage := range []string{"", "null", "{", "[]", `{"index":"x"}`, `<html>secret-of-audit</html>`, `{"index":11,"kind":"frame","requester":7}`, strings.Repeat("[", 100_000)} {
		m.garbage.Store(&garbage)
		for name, rs := range m.rows() {
			rule := access.Methods["/stopline.v1."+name]
			if !strings.HasPrefix(name, "Evidence") && !strings.HasPrefix(name, "Log") && !strings.HasPrefix(name, "Access") && !strings.HasSuffix(name, "History") && !strings.HasSuffix(name, "Performance") {
				continue
			}
			err := m.grpcCall(t.Context(), m.all[name], m.headers("auditor-1", purpose{"audit", "", ""}), rs[0].req)
			if err != nil && strings.Contains(err.Error(), "secret-of-audit") {
				t.Errorf("%s: hands on what audit said: %v", name, err)
			}
			if status.Code(err) == codes.Unknown || rule.Public && status.Code(err) == codes.Unauthenticated {
				t.Errorf("%s with %.20q from audit: got %v", name, garbage, err)
			}
		}
	}
}
