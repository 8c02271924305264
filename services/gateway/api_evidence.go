package gateway

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/api/httpbody"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// evidencePart searches and proves records, by what audit has.
type evidencePart struct {
	pb.UnimplementedEvidenceServiceServer
	a *API
	// verifying bounds bundles in hand at once: each takes some memory, and anybody
	// may send one.
	verifying chan struct{}
}

const evidenceService = "/stopline.v1.EvidenceService/"

func newEvidencePart(a *API) *evidencePart {
	return &evidencePart{a: a, verifying: make(chan struct{}, 4)}
}

func (p *evidencePart) register(s *grpc.Server) { pb.RegisterEvidenceServiceServer(s, p) }

func (p *evidencePart) objects(ctx context.Context, _ string, req proto.Message) ([]access.Object, error) {
	switch r := req.(type) {
	case *pb.GetBundleRequest:
		return p.recordObject(ctx, r.Index)
	case *pb.GetChainRequest:
		if r.Index != 0 {
			return p.recordObject(ctx, r.Index)
		}
		return []access.Object{junctionObject(r.Junction)}, nil
	case interface{ GetFilter() *pb.RecordFilter }: // before it is known which
		f := r.GetFilter()
		return []access.Object{{Type: "Record", ID: "*", Kind: f.GetKind(), Junction: f.GetJunction()}}, nil
	}
	return nil, nil
}

func (r *indexed) object() access.Object {
	return access.Object{Type: "Record", ID: strconv.FormatUint(r.Index, 10), Kind: r.Kind, Agency: r.agency(), Junction: r.Junction}
}

func (p *evidencePart) recordObject(ctx context.Context, index uint64) ([]access.Object, error) {
	r, err := p.a.audit.record(ctx, index)
	if err != nil {
		return []access.Object{{Type: "Record", ID: strconv.FormatUint(index, 10)}}, err
	}
	return []access.Object{r.object()}, nil
}

func (r *indexed) info() *pb.RecordInfo {
	i := &pb.RecordInfo{Index: r.Index, Height: r.Height, Kind: r.Kind, Junction: r.Junction, Device: r.Device, Time: timestamp(r.Time),
		BlockTime: timestamp(r.BlockTime), Requester: r.Requester, CaseNumber: r.Case, Rule: r.Rule, Absent: r.State}
	if r.Command != nil {
		i.Command, i.PolicyVersion = r.Seq, r.Command.PolicyVersion
	}
	return i
}

// query makes audit's filters of a request's. Its error names the field.
func query(f *pb.RecordFilter) (url.Values, error) {
	q := url.Values{}
	from, err := asTime("filter.start_time", f.GetStartTime())
	if err != nil {
		return nil, err
	}
	to, err := asTime("filter.end_time", f.GetEndTime())
	if err != nil {
		return nil, err
	}
	if !from.IsZero() && !to.IsZero() && !from.Before(to) {
		return nil, invalidField("filter.end_time", "after", "must be later than start_time")
	}
	k := f.GetKind()
	if k != "" && !identity.RecordKind(k).Valid() {
		return nil, invalidField("filter.kind", "known", "is no kind of record")
	}
	if f.GetCommand() != 0 {
		if k != "" && k != string(identity.KindCommand) {
			return nil, invalidField("filter.command", "kind", "goes with kind command only")
		}
		k = string(identity.KindCommand)
		q.Set("seq", strconv.FormatUint(f.Command, 10))
	}
	if f.GetHeight() != 0 {
		q.Set("height", strconv.FormatUint(f.Height, 10))
	}
	return set(q, "kind", k, "junction", f.GetJunction(), "device", f.GetDevice(), "requester", f.GetRequester(), "case", f.GetCaseNumber(),
		"from", rfc3339(from), "to", rfc3339(to), "policy_version", f.GetPolicyVersion()), nil
}

// page returns one page of records that the caller may see. Records of access are
// found only by their kind: their payload says whether they may be listed yet.
func (p *evidencePart) page(ctx context.Context, method string, f *pb.RecordFilter, limit int, after string, payloads bool) (indexPage, error) {
	q, err := query(f)
	if err != nil {
		return indexPage{}, err
	}
	q.Set("limit", strconv.Itoa(limit))
	set(q, "after", after)
	find := p.a.audit.search
	if payloads || f.GetKind() == string(identity.KindAccess) {
		find = p.a.audit.payloads
	}
	page, err := find(ctx, q)
	if err != nil {
		return page, err
	}
	shown := page.Records[:0]
	for _, r := range page.Records {
		if r.Kind == string(identity.KindAccess) && (f.GetKind() != r.Kind || p.a.hidden(ctx, &r)) {
			continue
		}
		if p.a.may(ctx, method, r.object()) {
			shown = append(shown, r)
		}
	}
	page.Records = shown
	return page, nil
}

// hidden reports whether an access record may not be listed yet: it is of a
// covert investigation of another agency, or nobody can tell any more.
func (a *API) hidden(ctx context.Context, r *indexed) bool {
	if len(r.Envelope) == 0 {
		return true
	}
	x := wire.Candidate(r.Envelope, r.Salt).Access
	return x == nil || a.covert(x, caller(ctx))
}

// covert reports whether an access record is not for a caller's eyes yet.
func (a *API) covert(x *traffic.Access, c call) bool {
	return a.now().Before(x.CovertUntil) && x.By.Agency != c.by.Client.Agency
}

func (p *evidencePart) SearchRecords(ctx context.Context, r *pb.SearchRecordsRequest) (*pb.SearchRecordsResponse, error) {
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	page, err := p.page(ctx, evidenceService+"SearchRecords", r.Filter, pageSize(r.PageSize), after, false)
	if err != nil {
		return nil, err
	}
	out := &pb.SearchRecordsResponse{NextPageToken: nextPage(r, page.Next)}
	for i := range page.Records {
		out.Records = append(out.Records, page.Records[i].info())
	}
	return out, nil
}

// chainDoc is audit's answer to why a junction did what it did.
type chainDoc struct {
	Summary string `json:"summary"`
	Steps   []struct {
		Role string `json:"role"`
		indexed
		Says string `json:"says"`
	} `json:"steps"`
	Missing []string `json:"missing"`
}

// steps of a chain in the words of the API.
var steps = map[string]string{"reading": "reading", "decision": "command", "response": "response", "lamps": "response", "green": "response", "end": "response"}

// visible returns a record by its leaf, if it may be shown at all.
func (p *evidencePart) visible(ctx context.Context, index uint64) (indexed, error) {
	r, err := p.a.audit.record(ctx, index)
	if err != nil || r.Kind != string(identity.KindAccess) {
		return r, err
	}
	if err := p.a.audit.get(ctx, fmt.Sprintf("/record/%d", index), url.Values{"payload": {"1"}}, &r); err != nil {
		return r, err
	}
	if p.a.hidden(ctx, &r) {
		return r, kind.Errorf(kind.NotFound, "index: the log has no record %d that can be shown", index)
	}
	return r, nil
}

// chainOf returns the query of the chain that a request names, and the record
// that it named itself.
func (p *evidencePart) chainOf(ctx context.Context, r *pb.GetChainRequest) (url.Values, *indexed, error) {
	if r.Index != 0 {
		if r.Junction != "" || r.Time != nil {
			return nil, nil, invalidField("index", "alone", "goes without junction and time")
		}
		x, err := p.visible(ctx, r.Index)
		if err != nil {
			return nil, nil, err
		}
		if x.Junction == "" {
			return nil, &x, nil
		}
		return chainQuery(&x), &x, nil
	}
	if r.Junction == "" {
		return nil, nil, invalidField("junction", "required", "junction, or index, must be given")
	}
	if _, ok := p.a.registry().Junction(traffic.JunctionID(r.Junction)); !ok {
		return nil, nil, kind.Errorf(kind.NotFound, "junction: the registry has no %.63q", r.Junction)
	}
	at, err := asTime("time", r.Time)
	if err != nil {
		return nil, nil, err
	}
	if at.IsZero() {
		at = p.a.now()
	}
	return url.Values{"junction": {r.Junction}, "at": {rfc3339(at)}}, nil, nil
}

// chainQuery asks for the chain that a record is in: that of a request or of an
// override begins with it.
func chainQuery(x *indexed) url.Values {
	if x.Kind == string(identity.KindRequest) || x.Kind == string(identity.KindOverride) {
		return url.Values{"index": {strconv.FormatUint(x.Index, 10)}}
	}
	return url.Values{"junction": {x.Junction}, "at": {rfc3339(x.Time)}}
}

func (p *evidencePart) GetChain(ctx context.Context, r *pb.GetChainRequest) (*pb.GetChainResponse, error) {
	q, x, err := p.chainOf(ctx, r)
	if err != nil {
		return nil, err
	}
	out := &pb.GetChainResponse{}
	if x != nil && x.Kind != string(identity.KindFrame) && x.Kind != string(identity.KindCommand) && !q.Has("index") {
		out.Links = append(out.Links, &pb.ChainLink{Step: x.Kind, Record: x.info(), Text: x.Rule})
	}
	if q == nil {
		out.Account = fmt.Sprintf("record %d is of kind %s and is about no junction", x.Index, x.Kind)
		return out, nil
	}
	var c chainDoc
	if err := p.a.audit.get(ctx, "/v1/chain", q, &c); err != nil {
		return nil, err
	}
	for i := range c.Steps {
		s := &c.Steps[i]
		step := steps[s.Role]
		if step == "" {
			step = s.Role
		}
		out.Links = append(out.Links, &pb.ChainLink{Step: step, Record: s.info(), Text: s.Says})
	}
	out.Account = strings.Join(append([]string{c.Summary}, c.Missing...), "; ")
	return out, nil
}

func (p *evidencePart) GetBundle(ctx context.Context, r *pb.GetBundleRequest) (*httpbody.HttpBody, error) {
	x, err := p.visible(ctx, r.Index)
	if err != nil {
		return nil, err
	}
	records := []string{strconv.FormatUint(r.Index, 10)}
	if r.Chain && x.Junction != "" {
		var c chainDoc
		if err := p.a.audit.get(ctx, "/v1/chain", chainQuery(&x), &c); err != nil {
			return nil, err
		}
		for i := range c.Steps {
			if c.Steps[i].Index != r.Index {
				records = append(records, strconv.FormatUint(c.Steps[i].Index, 10))
			}
		}
	}
	b, err := p.a.audit.raw(ctx, "/v1/bundle", url.Values{"records": {strings.Join(records, ",")}})
	if err != nil {
		return nil, err
	}
	if err := grpc.SetHeader(ctx, metadata.Pairs("content-disposition", fmt.Sprintf(`attachment; filename="evidence-%d.zip"`, r.Index))); err != nil {
		return nil, err
	}
	return &httpbody.HttpBody{ContentType: "application/zip", Data: b}, nil
}

func (p *evidencePart) VerifyBundle(ctx context.Context, r *pb.VerifyBundleRequest) (*pb.VerifyBundleResponse, error) {
	select {
	case p.verifying <- struct{}{}:
		defer func() { <-p.verifying }()
	default:
		return nil, refuse(codes.ResourceExhausted, "LIMIT", "limit: as many bundles as can be are being verified", retryIn(time.Second))
	}
	report, err := ledger.VerifyBundle(r.Bundle, p.a.policy)
	out := &pb.VerifyBundleResponse{Verified: err == nil && report.Outcome == ledger.Pass, Statement: report.Text()}
	if err != nil {
		out.Reason = err.Error()
	}
	return out, ctx.Err()
}

// approvalTime is how long an approval of an export can be used.
const approvalTime = time.Hour

// approval is the second person's word, signed by the gateway: bound to what may
// be exported, by whom, for which purpose and case, and until when.
type approval struct {
	By        string `json:"by"`
	Requester string `json:"for"`
	Filter    []byte `json:"of"`
	Purpose   string `json:"purpose"`
	Case      string `json:"case"`
	Until     int64  `json:"until"`
}

const approvalDomain = "stopline export approval v1\n"

// maxApproval bounds the token.
const maxApproval = 512

func filterDigest(f *pb.RecordFilter) []byte { return ofRequest(f) }

func (p *evidencePart) ApproveExport(ctx context.Context, r *pb.ApproveExportRequest) (*pb.ApproveExportResponse, error) {
	c := caller(ctx)
	if r.Requester == c.by.ID {
		return nil, invalidField("requester", "another", "must be another person than the one who approves")
	}
	if _, ok := p.a.registry().Clients()[r.Requester]; !ok {
		return nil, invalidField("requester", "known", "is no client in the registry")
	}
	if _, err := query(r.Filter); err != nil {
		return nil, err
	}
	until := p.a.now().Add(approvalTime).Truncate(time.Second)
	b, err := json.Marshal(approval{By: c.by.ID, Requester: r.Requester, Filter: filterDigest(r.Filter), Purpose: c.purpose, Case: c.caseNo, Until: until.Unix()})
	if err != nil {
		return nil, err
	}
	sig := ed25519.Sign(p.a.key(), append([]byte(approvalDomain+string(p.a.district())+"\n"), b...))
	token := base64.RawURLEncoding.EncodeToString(append(sig, b...))
	if len(token) > maxApproval {
		return nil, invalidField("requester", "max_len", "is too long a name, with that of who approves")
	}
	return &pb.ApproveExportResponse{Approval: token, Expires: timestamp(until)}, nil
}

// approved says who has approved an export, empty for nobody.
func (a *API) approved(req proto.Message, c call) string {
	r, ok := req.(*pb.ExportRecordsRequest)
	if !ok || r.Approval == "" {
		return ""
	}
	b, err := base64.RawURLEncoding.DecodeString(r.Approval)
	if err != nil || len(b) < ed25519.SignatureSize {
		return ""
	}
	sig, b := b[:ed25519.SignatureSize], b[ed25519.SignatureSize:]
	if !ed25519.Verify(a.key().Public().(ed25519.PublicKey), append([]byte(approvalDomain+string(a.district())+"\n"), b...), sig) {
		return ""
	}
	var t approval
	if json.Unmarshal(b, &t) != nil || t.Requester != c.by.ID || t.By == c.by.ID || !bytes.Equal(t.Filter, filterDigest(r.Filter)) ||
		t.Purpose != c.purpose || t.Case != c.caseNo || !a.now().Before(time.Unix(t.Until, 0)) {
		return ""
	}
	// Who has left meanwhile approves nothing.
	if by, ok := a.guard.Auth.Still(t.By); !ok || !a.now().Before(by.Client.Expires()) {
		return ""
	}
	return t.By
}

// exportPage is how many records one message of an export holds at most.
const exportPage = 200

func (p *evidencePart) ExportRecords(r *pb.ExportRecordsRequest, out grpc.ServerStreamingServer[pb.ExportRecordsResponse]) error {
	ctx := out.Context()
	for after := ""; ; {
		page, err := p.page(ctx, evidenceService+"ExportRecords", r.Filter, exportPage, after, true)
		if err != nil {
			return err
		}
		m := &pb.ExportRecordsResponse{}
		size := 0
		for i := range page.Records {
			x := &page.Records[i]
			if size += len(x.Envelope); size > 2<<20 { // a client takes 4 MiB
				if err := out.Send(m); err != nil {
					return err
				}
				m, size = &pb.ExportRecordsResponse{}, len(x.Envelope)
			}
			m.Records = append(m.Records, &pb.ExportedRecord{Info: x.info(), Envelope: x.Envelope, Salt: x.Salt})
		}
		if len(m.Records) > 0 {
			if err := out.Send(m); err != nil {
				return err
			}
		}
		if after = page.Next; after == "" {
			return nil
		}
	}
}
