package gateway

import (
	"cmp"
	"context"
	"net/url"
	"slices"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/internal/wire"
	"google.golang.org/protobuf/encoding/protowire"
)

// accessPart says who read what, by the sealed records of it.
type accessPart struct {
	pb.UnimplementedAccessServiceServer
	a *API
}

func newAccessPart(a *API) *accessPart { return &accessPart{a: a} }

func (p *accessPart) register(s *grpc.Server) { pb.RegisterAccessServiceServer(s, p) }

const listAccess = "/stopline.v1.AccessService/ListAccess"

// objects: whose readings are asked for; who does not say asks for their own at
// least.
func (p *accessPart) objects(ctx context.Context, _ string, req proto.Message) ([]access.Object, error) {
	r, ok := req.(*pb.ListAccessRequest)
	if !ok {
		return nil, nil
	}
	return []access.Object{agencyAccess(cmp.Or(r.Agency, caller(ctx).by.Client.Agency))}, nil
}

func agencyAccess(agency string) access.Object {
	return access.Object{Type: "Access", ID: agency, Agency: agency}
}

func (p *accessPart) ListAccess(ctx context.Context, r *pb.ListAccessRequest) (*pb.ListAccessResponse, error) {
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	from, err := asTime("start_time", r.StartTime)
	if err != nil {
		return nil, err
	}
	to, err := asTime("end_time", r.EndTime)
	if err != nil {
		return nil, err
	}
	if !from.IsZero() && !to.IsZero() && !from.Before(to) {
		return nil, invalidField("end_time", "after", "must be later than start_time")
	}
	c := caller(ctx)
	agency := r.Agency
	// Whoever may see those of nobody in particular may see all.
	if agency == "" && !p.a.may(ctx, listAccess, access.Object{Type: "Access", ID: "*"}) {
		agency = c.by.Client.Agency
	}
	q := set(url.Values{}, "kind", string(identity.KindAccess), "from", rfc3339(from), "to", rfc3339(to), "after", after, "agency", agency)
	out := &pb.ListAccessResponse{}
	size := pageSize(r.PageSize)
	// What is not to be listed leaves pages short: look on for a while.
	for range 8 {
		q.Set("limit", strconv.Itoa(size-len(out.Records)))
		page, err := p.a.audit.payloads(ctx, q)
		if err != nil {
			return nil, err
		}
		for i := range page.Records {
			if x := p.sealed(ctx, r, &page.Records[i]); x != nil {
				out.Records = append(out.Records, x)
			}
		}
		after = page.Next
		if after == "" || len(out.Records) >= size {
			break
		}
		q.Set("after", after)
	}
	out.NextPageToken = nextPage(r, after)
	return out, nil
}

// sealed returns a record as it is listed, nil where it is not.
func (p *accessPart) sealed(ctx context.Context, r *pb.ListAccessRequest, x *indexed) *pb.SealedAccess {
	if len(x.Envelope) == 0 {
		return nil
	}
	c := wire.Candidate(x.Envelope, x.Salt)
	switch {
	case c.Access == nil, r.Subject != "" && c.Access.By.Name != r.Subject, p.a.covert(c.Access, caller(ctx)),
		!p.a.may(ctx, listAccess, agencyAccess(c.Access.By.Agency)):
		return nil
	}
	m := &pb.AccessRecord{}
	if err := wire.Decode(c.Envelope.ContentType, c.Envelope.Payload, m); err != nil {
		return nil // unreachable: it was decoded a moment ago
	}
	h := x.commitment()
	return &pb.SealedAccess{Record: m, Index: x.Index, Commitment: h[:]}
}

// least is the smallest count that the public is told.
const least = 10

func (p *accessPart) GetAccessSummary(ctx context.Context, r *pb.GetAccessSummaryRequest) (*pb.GetAccessSummaryResponse, error) {
	var sums struct {
		Counts []struct {
			Agency  string `json:"agency"`
			Purpose string `json:"purpose"`
			Granted bool   `json:"granted"`
			Count   uint64 `json:"count"`
		} `json:"counts"`
	}
	if err := p.a.audit.get(ctx, "/access-summary", url.Values{"month": {r.Month}}, &sums); err != nil {
		return nil, err
	}
	out := &pb.GetAccessSummaryResponse{Month: r.Month}
	for _, c := range sums.Counts {
		out.Counts = append(out.Counts, &pb.AccessCount{Agency: c.Agency, Purpose: c.Purpose, Granted: c.Granted, Count: c.Count})
	}
	out.Counts = aggregate(out.Counts, r.Month >= p.a.now().UTC().Format("2006-01"))
	return out, nil
}

// aggregate leaves nothing that tells of fewer than ten readings: smaller rows are
// one row, other, and left out where they are fewer together. While a month runs,
// counts are in tens: from one answer to the next nobody could see else when
// somebody read.
func aggregate(in []*pb.AccessCount, runs bool) []*pb.AccessCount {
	var out []*pb.AccessCount
	other := map[bool]uint64{}
	for _, c := range in {
		if c.Count < least {
			other[c.Granted] += c.Count
			continue
		}
		out = append(out, c)
	}
	for granted, n := range other {
		if n >= least {
			out = append(out, &pb.AccessCount{Agency: "other", Purpose: "other", Granted: granted, Count: n})
		}
	}
	for _, c := range out {
		if runs {
			c.Count -= c.Count % least
		}
	}
	slices.SortFunc(out, func(a, b *pb.AccessCount) int {
		return cmp.Or(cmp.Compare(a.Agency, b.Agency), cmp.Compare(a.Purpose, b.Purpose), cmp.Compare(protowire.EncodeBool(a.Granted), protowire.EncodeBool(b.Granted)))
	})
	return out
}

// logPart answers about the public log, by what audit reads of it.
type logPart struct {
	pb.UnimplementedLogServiceServer
	a *API
}

func newLogPart(a *API) *logPart { return &logPart{a: a} }

func (p *logPart) register(s *grpc.Server) { pb.RegisterLogServiceServer(s, p) }

func (p *logPart) objects(context.Context, string, proto.Message) ([]access.Object, error) {
	return nil, nil
}

func (p *logPart) GetCheckpoint(ctx context.Context, _ *pb.GetCheckpointRequest) (*pb.GetCheckpointResponse, error) {
	var c struct {
		Note string `json:"note"`
		Size uint64 `json:"size"`
	}
	if err := p.a.audit.get(ctx, "/checkpoint", nil, &c); err != nil {
		return nil, err
	}
	out := &pb.GetCheckpointResponse{Note: c.Note, Size: c.Size}
	p.a.g.mu.Lock()
	if p.a.g.sealed.Size == c.Size {
		out.Height = p.a.g.sealed.Height
	}
	p.a.g.mu.Unlock()
	return out, nil
}

// proofDoc is audit's answer.
type proofDoc struct {
	Size   uint64   `json:"size"`
	Leaf   []byte   `json:"leaf_hash"`
	Hashes [][]byte `json:"hashes"`
}

func (p *logPart) GetInclusionProof(ctx context.Context, r *pb.GetInclusionProofRequest) (*pb.GetInclusionProofResponse, error) {
	var d proofDoc
	if err := p.a.audit.get(ctx, "/inclusion", url.Values{"index": {strconv.FormatUint(r.Index, 10)}, "size": {strconv.FormatUint(r.Size, 10)}}, &d); err != nil {
		return nil, err
	}
	return &pb.GetInclusionProofResponse{Index: r.Index, Size: d.Size, LeafHash: d.Leaf, Hashes: d.Hashes}, nil
}

func (p *logPart) GetConsistencyProof(ctx context.Context, r *pb.GetConsistencyProofRequest) (*pb.GetConsistencyProofResponse, error) {
	if r.FromSize > r.ToSize {
		return nil, invalidField("to_size", "order", "must not be smaller than from_size")
	}
	var d proofDoc
	if err := p.a.audit.get(ctx, "/consistency", url.Values{"from": {strconv.FormatUint(r.FromSize, 10)}, "to": {strconv.FormatUint(r.ToSize, 10)}}, &d); err != nil {
		return nil, err
	}
	return &pb.GetConsistencyProofResponse{FromSize: r.FromSize, ToSize: d.Size, Hashes: d.Hashes}, nil
}
