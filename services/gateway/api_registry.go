package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// registryPart reads the registry in force, and carries proposals round. It signs
// nothing: officials do, with keys that are never here.
type registryPart struct {
	pb.UnimplementedRegistryServiceServer
	a      *API
	sender *bus.Sender
}

func newRegistryPart(a *API) (*registryPart, error) {
	s, err := bus.NewSender(bus.SenderConfig{Bus: a.bus(), Logger: a.log()})
	if err != nil {
		return nil, err
	}
	return &registryPart{a: a, sender: s}, nil
}

func (p *registryPart) register(s *grpc.Server) { pb.RegisterRegistryServiceServer(s, p) }

func (p *registryPart) run(ctx context.Context) error {
	<-ctx.Done()
	p.sender.Close()
	return nil
}

func (p *registryPart) objects(_ context.Context, _ string, req proto.Message) ([]access.Object, error) {
	switch r := req.(type) {
	case *pb.GetEntryRequest:
		return []access.Object{{Type: "Entry", ID: r.Type + "/" + r.Id}}, nil
	case interface{ GetId() string }:
		return []access.Object{{Type: "Proposal", ID: r.GetId()}}, nil
	}
	return nil, nil
}

func entryOf(e identity.Entry) *pb.RegistryEntry {
	return &pb.RegistryEntry{Type: string(e.Type), Id: e.ID, Status: string(e.Status), SinceHeight: e.Since, Body: string(e.Body)}
}

func (p *registryPart) ListEntries(_ context.Context, r *pb.ListEntriesRequest) (*pb.ListEntriesResponse, error) {
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	out := &pb.ListEntriesResponse{Height: uint64(p.a.g.cfg.State.Height())}
	entries := p.a.registry().Entries(identity.EntryType(r.Type))
	key := func(e identity.Entry) string { return string(e.Type) + "\x00" + e.ID }
	slices.SortFunc(entries, func(a, b identity.Entry) int { return strings.Compare(key(a), key(b)) })
	for _, e := range entries {
		switch {
		case after != "" && key(e) <= after:
			continue
		case len(out.Entries) == pageSize(r.PageSize):
			last := out.Entries[len(out.Entries)-1]
			out.NextPageToken = nextPage(r, last.Type+"\x00"+last.Id)
			return out, nil
		}
		out.Entries = append(out.Entries, entryOf(e))
	}
	return out, nil
}

func (p *registryPart) GetEntry(_ context.Context, r *pb.GetEntryRequest) (*pb.GetEntryResponse, error) {
	e, ok := p.a.registry().Entry(identity.EntryType(r.Type), r.Id)
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "id: the registry has no %.32s %.127q", r.Type, r.Id)
	}
	return &pb.GetEntryResponse{Entry: entryOf(e)}, nil
}

// onTheWay is a proposal as the stream keeps it: its newest message counts.
type onTheWay struct {
	Document json.RawMessage `json:"document"`
	Filed    time.Time       `json:"filed"`
	By       string          `json:"by"`
	// Of the record, once it was submitted.
	Commitment []byte `json:"commitment,omitempty"`
	// Status where it does not follow from the registry: refused, in-force.
	Status string `json:"status,omitempty"`
	Reason string `json:"reason,omitempty"`

	seq uint64 // of the message; 0: none yet
	id  string
}

// States of a proposal.
const (
	proposalOpen      = "open"
	proposalSubmitted = "submitted"
	proposalInForce   = "in-force"
	proposalRefused   = "refused"
)

// proposalID is the hash of what approvals are signed over: approvals do not
// change it.
func proposalID(c identity.Change) (string, error) {
	in, err := identity.ApprovalInput(c)
	if err != nil {
		return "", err
	}
	h := sha256.Sum256(in)
	return hex.EncodeToString(h[:]), nil
}

// load reads a proposal, with kind NotFound where there is none.
func (p *registryPart) load(ctx context.Context, id string) (*onTheWay, error) {
	s, err := p.a.bus().JS.Stream(ctx, topic.ProposalStream)
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "proposals cannot be read: %w", err)
	}
	return p.loadFrom(ctx, s, id)
}

func (p *registryPart) loadFrom(ctx context.Context, s jetstream.Stream, id string) (*onTheWay, error) {
	m, err := s.GetLastMsgForSubject(ctx, topic.Proposal(p.a.district(), id))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, kind.Errorf(kind.NotFound, "id: there is no proposal %s", id)
	}
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "proposals cannot be read: %w", err)
	}
	o := &onTheWay{seq: m.Sequence, id: id}
	if err := json.Unmarshal(m.Data, o); err != nil {
		return nil, fmt.Errorf("proposal %s: %w", id, err)
	}
	return o, nil
}

// save keeps a proposal, if nobody else has changed it meanwhile.
func (p *registryPart) save(ctx context.Context, o *onTheWay) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	ack, err := p.a.bus().JS.PublishMsg(ctx, &nats.Msg{Subject: topic.Proposal(p.a.district(), o.id), Data: b}, jetstream.WithExpectLastSequencePerSubject(o.seq))
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant):
		return kind.Errorf(kind.Conflict, "id: somebody else has changed the proposal: read it again")
	case err != nil:
		return kind.Errorf(kind.Unavailable, "the proposal cannot be kept: %w", err)
	}
	o.seq = ack.Sequence
	return nil
}

// view is a proposal as the API tells of it now.
func (p *registryPart) view(o *onTheWay) (*pb.RegistryProposal, error) {
	doc, err := identity.ParseProposal(o.Document)
	if err != nil {
		return nil, fmt.Errorf("proposal %s: %w", o.id, err)
	}
	c := doc.Change
	out := &pb.RegistryProposal{Id: o.id, Document: o.Document, Filed: timestamp(o.Filed), Status: proposalOpen}
	reg := p.a.registry()
	gov, _ := reg.Governance()
	need := gov.Need(c.Type, c.Action)
	var departments []string
	for _, a := range c.Approvals {
		out.SignedBy = append(out.SignedBy, string(a.Key))
		if h, ok := reg.Holder(a.Key); ok && h.Status == identity.Active {
			if e, ok := reg.Entry(identity.TypeOfficial, h.ID); ok {
				var of identity.Official
				if json.Unmarshal(e.Body, &of) == nil && need.Counts(h.ID, of) {
					departments = append(departments, of.Department)
				}
			}
		}
	}
	if n := len(slices.Compact(slices.Sorted(slices.Values(departments)))); len(departments) < need.Officials || n < need.Departments {
		out.Missing = need.Progress(departments) + "; who submits it counts too"
	}
	e, found := reg.Entry(c.Type, c.ID)
	now := []byte(reg.Base(c.Type, c.ID))
	done := found && (c.Action == identity.Revoke && e.Status == identity.Revoked || c.Action == identity.Put && string(e.Body) == string(c.Body))
	switch {
	case o.Status != "":
		out.Status, out.Reason = o.Status, o.Reason
	case len(o.Commitment) > 0:
		p.a.g.mu.Lock()
		f, refused := p.a.g.refused.by[hex.EncodeToString(o.Commitment)]
		p.a.g.mu.Unlock()
		switch out.Status = proposalSubmitted; {
		case refused:
			out.Status, out.Reason = proposalRefused, f.Rule+": "+f.Reason
		case done && string(now) != string(c.Base):
			out.Status = proposalInForce
		}
	case string(now) != string(c.Base):
		out.Reason = "the entry was changed after this was proposed: propose it again"
	}
	return out, nil
}

func (p *registryPart) ProposeChange(ctx context.Context, r *pb.ProposeChangeRequest) (*pb.ProposeChangeResponse, error) {
	doc, err := identity.ParseProposal(r.Document)
	if err != nil {
		return nil, invalidField("document", "proposal", err.Error())
	}
	c := doc.Change
	reg := p.a.registry()
	switch {
	case c.District != reg.District():
		return nil, invalidField("document", "district", fmt.Sprintf("is for district %.63q, this is %q", c.District, reg.District()))
	case string(c.Base) != string(reg.Base(c.Type, c.ID)):
		return nil, invalidField("document", "base", "is not to what is in force: propose it again")
	}
	if err := p.compiles(&c); err != nil {
		return nil, err
	}
	for i, a := range c.Approvals {
		if err := p.goodApproval(c, a); err != nil {
			return nil, invalidField(fmt.Sprintf("document.change.approvals[%d]", i), "signature", err.Error())
		}
	}
	id, err := proposalID(c)
	if err != nil {
		return nil, err
	}
	o, err := p.load(ctx, id)
	switch {
	case kind.Of(err) == kind.NotFound:
		o, err = &onTheWay{id: id, Filed: p.a.now().UTC(), By: caller(ctx).by.ID}, nil
		if o.Document, err = doc.Marshal(); err != nil {
			return nil, err
		}
		err = p.save(ctx, o)
	case err == nil: // filed before: its signatures are joined
		err = p.join(ctx, o, c.Approvals)
	}
	if err != nil {
		return nil, err
	}
	v, err := p.view(o)
	return &pb.ProposeChangeResponse{Proposal: v}, err
}

// compiles refuses an access policy that no gateway could use.
func (p *registryPart) compiles(c *identity.Change) error {
	if c.Type != identity.TypeAccess || c.Action != identity.Put {
		return nil
	}
	var policy identity.AccessPolicy
	if err := json.Unmarshal(c.Body, &policy); err != nil {
		return invalidField("document", "access-policy", err.Error())
	}
	if _, err := access.Compile(p.a.district(), policy); err != nil {
		return invalidField("document", "access-policy", err.Error())
	}
	return nil
}

// goodApproval reports whether an official in force has signed a change.
func (p *registryPart) goodApproval(c identity.Change, a identity.Approval) error {
	h, ok := p.a.registry().Holder(a.Key)
	if !ok || h.Type != identity.TypeOfficial || h.Status != identity.Active {
		return fmt.Errorf("%.32s is no official in force", string(a.Key))
	}
	in, err := identity.ApprovalInput(c)
	if err != nil {
		return err
	}
	if !identity.VerifyBytes(h.Key, in, a.Signature) {
		return fmt.Errorf("is not that of %.32s over this change", string(a.Key))
	}
	return nil
}

// join adds approvals to a proposal that is kept.
func (p *registryPart) join(ctx context.Context, o *onTheWay, more []identity.Approval) error {
	doc, err := identity.ParseProposal(o.Document)
	if err != nil {
		return fmt.Errorf("proposal %s: %w", o.id, err)
	}
	changed := false
	for _, a := range more {
		if slices.ContainsFunc(doc.Change.Approvals, func(b identity.Approval) bool { return b.Key == a.Key }) {
			continue
		}
		if len(doc.Change.Approvals) >= identity.MaxApprovals {
			return kind.Errorf(kind.Invalid, "id: %d officials have signed already, which is the most", identity.MaxApprovals)
		}
		doc.Change.Approvals, changed = append(doc.Change.Approvals, a), true
	}
	if !changed {
		return nil
	}
	if o.Document, err = doc.Marshal(); err != nil {
		return err
	}
	return p.save(ctx, o)
}

func (p *registryPart) GetProposal(ctx context.Context, r *pb.GetProposalRequest) (*pb.GetProposalResponse, error) {
	o, err := p.load(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	v, err := p.view(o)
	return &pb.GetProposalResponse{Proposal: v}, err
}

func (p *registryPart) ListProposals(ctx context.Context, r *pb.ListProposalsRequest) (*pb.ListProposalsResponse, error) {
	after, err := pageAt(r, r.PageToken)
	if err != nil {
		return nil, err
	}
	s, err := p.a.bus().JS.Stream(ctx, topic.ProposalStream)
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "proposals cannot be read: %w", err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(topic.ProposalAll(p.a.district())))
	if err != nil {
		return nil, kind.Errorf(kind.Unavailable, "proposals cannot be read: %w", err)
	}
	var ids []string
	for subject := range info.State.Subjects {
		ids = append(ids, subject[strings.LastIndexByte(subject, '.')+1:])
	}
	slices.Sort(ids)
	out := &pb.ListProposalsResponse{}
	for _, id := range ids {
		if after != "" && id <= after {
			continue
		}
		if len(out.Proposals) == pageSize(r.PageSize) {
			out.NextPageToken = nextPage(r, out.Proposals[len(out.Proposals)-1].Id)
			break
		}
		o, err := p.loadFrom(ctx, s, id)
		if kind.Of(err) == kind.NotFound && err != nil { // it ended a moment ago
			continue
		}
		if err != nil {
			return nil, err
		}
		v, err := p.view(o)
		if err != nil {
			return nil, err
		}
		out.Proposals = append(out.Proposals, v)
	}
	return out, nil
}

// open returns a proposal that can still be signed and submitted.
func (p *registryPart) open(ctx context.Context, id string) (*onTheWay, *identity.Proposal, error) {
	o, err := p.load(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	v, err := p.view(o)
	if err != nil {
		return nil, nil, err
	}
	if v.Status != proposalOpen {
		return nil, nil, kind.Errorf(kind.Stale, "id: the proposal is %s", v.Status)
	}
	doc, err := identity.ParseProposal(o.Document)
	return o, doc, err
}

func (p *registryPart) SignProposal(ctx context.Context, r *pb.SignProposalRequest) (*pb.SignProposalResponse, error) {
	o, doc, err := p.open(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	a := identity.Approval{Key: identity.KeyID(r.KeyId), Signature: r.Signature}
	if err := p.goodApproval(doc.Change, a); err != nil {
		return nil, invalidField("signature", "approval", err.Error())
	}
	if err := p.join(ctx, o, []identity.Approval{a}); err != nil {
		return nil, err
	}
	v, err := p.view(o)
	return &pb.SignProposalResponse{Proposal: v}, err
}

func (p *registryPart) SubmitProposal(ctx context.Context, r *pb.SubmitProposalRequest) (*pb.SubmitProposalResponse, error) {
	o, doc, err := p.open(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	e, err := identity.ParseEnvelope(r.Envelope)
	if err != nil {
		return nil, invalidField("envelope", "form", err.Error())
	}
	if !e.Kind.ChangesRegistry() {
		return nil, invalidField("envelope", "kind", fmt.Sprintf("is of kind %.32q, must be registry or redaction", string(e.Kind)))
	}
	h, ok := p.a.registry().Holder(e.Key)
	if !ok || h.Status != identity.Active || !h.May(e.Kind) || !e.Verify(h.Key) {
		return nil, invalidField("envelope", "signature", "is not signed by an official in force")
	}
	c, err := wire.DecodeChange(e.ContentType, e.Payload)
	if err != nil {
		return nil, invalidField("envelope", "payload", err.Error())
	}
	if id, err := proposalID(c); err != nil || id != r.Id {
		return nil, invalidField("envelope", "payload", "is not the change that was proposed")
	}
	receipt, err := p.sender.Send(ctx, doc.Change.District, e.Kind, p.a.cfg.Name, r.Envelope)
	switch {
	case err != nil && kind.Of(err) == kind.Invalid:
		o.Status, o.Reason = proposalRefused, err.Error()
	case err != nil:
		return nil, kind.Errorf(kind.Unavailable, "the record could not be brought to ingest: %w", err)
	default:
		o.Commitment = receipt.Commitment
		if want := ledger.Commit(ledger.Salt(receipt.Salt), r.Envelope); string(want[:]) != string(receipt.Commitment) {
			return nil, fmt.Errorf("ingest's receipt is not for the record")
		}
	}
	if err := p.save(ctx, o); err != nil {
		return nil, err
	}
	v, err := p.view(o)
	return &pb.SubmitProposalResponse{Proposal: v}, err
}
