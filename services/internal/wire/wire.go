// Package wire turns protobuf and JSON into the types of pkg and back. It is
// the only place below the edges that knows the generated code.
//
// Decoding refuses what it does not know: unknown JSON fields, unknown protobuf
// fields, values out of the range of their type. What a signer meant by a field
// that we do not understand is not ours to guess.
package wire

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
)

// marshal encodes a message of ours; that cannot fail but for invalid UTF-8,
// which the decoders below keep out.
func marshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("wire: encode %T: %v", m, err))
	}
	return b
}

// Decode decodes a message from a payload of the given content type.
func Decode(contentType string, payload []byte, m proto.Message) error {
	var err error
	switch contentType {
	case identity.Protobuf:
		err = proto.UnmarshalOptions{RecursionLimit: 16}.Unmarshal(payload, m)
		if err == nil {
			err = unknown(m.ProtoReflect())
		}
	case identity.JSON:
		err = protojson.UnmarshalOptions{RecursionLimit: 16}.Unmarshal(payload, m)
	default:
		err = fmt.Errorf("content_type %.60q: must be %s or %s", contentType, identity.Protobuf, identity.JSON)
	}
	if err != nil {
		return kind.Errorf(kind.Invalid, "%s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// unknown refuses fields that the schema does not have, at any depth.
func unknown(m protoreflect.Message) error {
	if u := m.GetUnknown(); len(u) > 0 {
		return fmt.Errorf("%d bytes of unknown fields", len(u))
	}
	for _, f := range nested(m.Descriptor()) {
		if !m.Has(f) {
			continue
		}
		if !f.IsList() {
			if err := unknown(m.Get(f).Message()); err != nil {
				return fmt.Errorf("%s: %w", f.Name(), err)
			}
			continue
		}
		l := m.Get(f).List()
		for i := range l.Len() {
			if err := unknown(l.Get(i).Message()); err != nil {
				return fmt.Errorf("%s[%d]: %w", f.Name(), i, err)
			}
		}
	}
	return nil
}

// nestedFields holds what [nested] has found out: every field of every frame
// would be looked at otherwise.
var nestedFields sync.Map // of protoreflect.FullName to []protoreflect.FieldDescriptor

// nested returns the fields that hold messages. The schema has no maps, as their
// encoding is not the same every time.
func nested(d protoreflect.MessageDescriptor) []protoreflect.FieldDescriptor {
	if v, ok := nestedFields.Load(d.FullName()); ok {
		return v.([]protoreflect.FieldDescriptor)
	}
	var out []protoreflect.FieldDescriptor
	for i := range d.Fields().Len() {
		if f := d.Fields().Get(i); f.Message() != nil {
			out = append(out, f)
		}
	}
	nestedFields.Store(d.FullName(), out)
	return out
}

// FrameToProto returns the wire form of a frame.
func FrameToProto(f *traffic.Frame) *pb.Frame {
	m := &pb.Frame{
		District: string(f.District), Junction: string(f.Junction), Device: string(f.Device),
		BootEpoch: f.BootEpoch, Seq: f.Seq, TimeUnixNano: f.Time.UnixNano(),
		IntervalMs: uint32(f.Interval.Milliseconds()), Signal: SignalToProto(f.Signal),
	}
	if f.Prev != [32]byte{} {
		m.Prev = f.Prev[:]
	}
	for _, r := range f.Readings {
		m.Readings = append(m.Readings, &pb.Reading{
			Detector: string(r.Detector), Count: r.Count, OccupancyPermille: r.OccupancyPermille, SpeedCms: r.SpeedCMS,
			Vehicles: r.Vehicles, Halted: r.Halted, HeadWaitMs: r.HeadWaitMS, Priority: uint32(r.Priority), Ahead: aheadToProto(r.Ahead),
		})
	}
	for _, e := range f.Events {
		m.Events = append(m.Events, &pb.Event{Code: uint32(e.Code), Param: uint32(e.Param), OffsetMs: e.OffsetMS})
	}
	for _, r := range f.Results {
		m.Results = append(m.Results, ResultToProto(r))
	}
	return m
}

func aheadToProto(as []traffic.Approach) []uint32 {
	if len(as) == 0 {
		return nil
	}
	out := make([]uint32, 0, 2*len(as))
	for _, a := range as {
		out = append(out, a.DistanceCM, a.SpeedCMS)
	}
	return out
}

func aheadFromProto(in []uint32) ([]traffic.Approach, error) {
	if len(in)%2 != 0 {
		return nil, fmt.Errorf("%d numbers, must be pairs of distance and speed", len(in))
	}
	if len(in) == 0 {
		return nil, nil
	}
	out := make([]traffic.Approach, len(in)/2)
	for i := range out {
		out[i] = traffic.Approach{DistanceCM: in[2*i], SpeedCMS: in[2*i+1]}
	}
	return out, nil
}

// EncodeFrame returns the protobuf payload of a frame.
func EncodeFrame(f *traffic.Frame) []byte { return marshal(FrameToProto(f)) }

// SignalToProto returns the wire form of a signal.
func SignalToProto(s traffic.Signal) *pb.Signal {
	return &pb.Signal{State: string(s.State), Stage: int32(s.Stage), SinceMs: uint64(max(s.SinceMS, 0)), Mode: string(s.Mode), Trip: s.Trip, Override: s.Override}
}

// SignalFromProto is the reverse of [SignalToProto].
func SignalFromProto(s *pb.Signal) traffic.Signal {
	return traffic.Signal{
		State: traffic.State(s.GetState()), Stage: int(s.GetStage()),
		SinceMS: int64(min(s.GetSinceMs(), math.MaxInt64)), Mode: traffic.Mode(s.GetMode()), Trip: s.GetTrip(), Override: s.GetOverride(),
	}
}

// ResultToProto returns the wire form of a command's result.
func ResultToProto(r traffic.CommandResult) *pb.CommandResult {
	return &pb.CommandResult{Seq: r.Seq, Applied: r.Applied, Reason: r.Reason}
}

// ResultFromProto is the reverse of [ResultToProto].
func ResultFromProto(r *pb.CommandResult) traffic.CommandResult {
	return traffic.CommandResult{Seq: r.GetSeq(), Applied: r.GetApplied(), Reason: r.GetReason()}
}

func outOf(field string, v any, limit any) error {
	return kind.Errorf(kind.Invalid, "%s: %v is more than its type allows, %v", field, v, limit)
}

// DecodeFrame decodes a frame's payload. Errors name the field and the rule.
func DecodeFrame(contentType string, payload []byte) (*traffic.Frame, error) {
	if contentType == identity.Protobuf {
		if f, ok := fastFrame(payload); ok {
			return f, nil
		}
	}
	return slowFrame(contentType, payload)
}

// slowFrame decodes any frame, and says what is wrong with it.
func slowFrame(contentType string, payload []byte) (*traffic.Frame, error) {
	var m pb.Frame
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	f := &traffic.Frame{
		District: traffic.DistrictID(m.District), Junction: traffic.JunctionID(m.Junction),
		FrameKey: traffic.FrameKey{Device: traffic.DeviceID(m.Device), BootEpoch: m.BootEpoch, Seq: m.Seq},
		Time:     time.Unix(0, m.TimeUnixNano).UTC(), Interval: time.Duration(m.IntervalMs) * time.Millisecond,
		Signal: SignalFromProto(m.Signal),
	}
	switch len(m.Prev) {
	case 0:
	case 32:
		f.Prev = [32]byte(m.Prev)
	default:
		return nil, kind.Errorf(kind.Invalid, "prev: %d bytes, must be none or 32", len(m.Prev))
	}
	f.Readings = make([]traffic.Reading, len(m.Readings))
	for i, r := range m.Readings {
		if r.Priority > math.MaxUint8 {
			return nil, outOf(fmt.Sprintf("readings[%d].priority", i), r.Priority, math.MaxUint8)
		}
		ahead, err := aheadFromProto(r.Ahead)
		if err != nil {
			return nil, kind.Errorf(kind.Invalid, "readings[%d].ahead: %w", i, err)
		}
		f.Readings[i] = traffic.Reading{
			Detector: traffic.DetectorID(r.Detector), Count: r.Count, OccupancyPermille: r.OccupancyPermille, SpeedCMS: r.SpeedCms,
			Vehicles: r.Vehicles, Halted: r.Halted, HeadWaitMS: r.HeadWaitMs, Priority: traffic.Priority(r.Priority), Ahead: ahead,
		}
	}
	var err error
	if f.Events, err = events(m.Events); err != nil {
		return nil, err
	}
	for _, r := range m.Results {
		f.Results = append(f.Results, ResultFromProto(r))
	}
	return f, nil
}

// EncodeCommand returns the protobuf payload of a command.
func EncodeCommand(c *traffic.Command) []byte {
	return marshal(&pb.Command{
		District: string(c.District), Junction: string(c.Junction), Seq: c.Seq, Height: c.Height,
		RestsOn: &pb.FrameKey{Device: string(c.RestsOn.Device), BootEpoch: c.RestsOn.BootEpoch, Seq: c.RestsOn.Seq},
		Policy:  c.Policy, PolicyVersion: c.PolicyVersion, Controller: c.Controller, ControllerVersion: c.ControllerVersion,
		IssuedUnixNano: c.Issued.UnixNano(), ExpiresUnixNano: c.Expires.UnixNano(), Stage: uint32(c.Stage), Rule: c.Rule,
	})
}

// DecodeCommand decodes a command's payload.
func DecodeCommand(contentType string, payload []byte) (*traffic.Command, error) {
	var m pb.Command
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	if m.Stage > math.MaxInt16 {
		return nil, outOf("stage", m.Stage, math.MaxInt16)
	}
	return &traffic.Command{
		District: traffic.DistrictID(m.District), Junction: traffic.JunctionID(m.Junction), Seq: m.Seq, Height: m.Height,
		RestsOn: traffic.FrameKey{Device: traffic.DeviceID(m.RestsOn.GetDevice()), BootEpoch: m.RestsOn.GetBootEpoch(), Seq: m.RestsOn.GetSeq()},
		Policy:  m.Policy, PolicyVersion: m.PolicyVersion, Controller: m.Controller, ControllerVersion: m.ControllerVersion,
		Issued: time.Unix(0, m.IssuedUnixNano).UTC(), Expires: time.Unix(0, m.ExpiresUnixNano).UTC(),
		Stage: int(m.Stage), Rule: m.Rule,
	}, nil
}

// EncodeImport returns the protobuf payload of an import.
func EncodeImport(i *traffic.Import) []byte {
	m := &pb.Import{
		District: string(i.District), Importer: i.Importer, Run: i.Run, Seq: i.Seq, Log: i.Log, Sha256: i.SHA256[:], Device: string(i.Device),
		TimeUnixNano: i.Time.UnixNano(), IntervalMs: uint32(i.Interval / time.Millisecond), Events: make([]*pb.Event, len(i.Events)),
	}
	for k, e := range i.Events {
		m.Events[k] = &pb.Event{Code: uint32(e.Code), Param: uint32(e.Param), OffsetMs: e.OffsetMS}
	}
	return marshal(m)
}

// DecodeImport decodes an import's payload. Errors name the field and the rule.
func DecodeImport(contentType string, payload []byte) (*traffic.Import, error) {
	var m pb.Import
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	if len(m.Sha256) != 32 {
		return nil, kind.Errorf(kind.Invalid, "sha256: %d bytes, must be 32", len(m.Sha256))
	}
	i := &traffic.Import{
		District: traffic.DistrictID(m.District), Importer: m.Importer, Run: m.Run, Seq: m.Seq, Log: m.Log, SHA256: [32]byte(m.Sha256),
		Device: traffic.DeviceID(m.Device), Time: time.Unix(0, m.TimeUnixNano).UTC(), Interval: time.Duration(m.IntervalMs) * time.Millisecond,
	}
	var err error
	i.Events, err = events(m.Events)
	return i, err
}

func events(ms []*pb.Event) ([]traffic.Event, error) {
	if len(ms) == 0 {
		return nil, nil
	}
	out := make([]traffic.Event, len(ms))
	for i, e := range ms {
		if e.Code > math.MaxUint16 {
			return nil, outOf(fmt.Sprintf("events[%d].code", i), e.Code, math.MaxUint16)
		}
		if e.Param > math.MaxUint16 {
			return nil, outOf(fmt.Sprintf("events[%d].param", i), e.Param, math.MaxUint16)
		}
		out[i] = traffic.Event{Code: uint16(e.Code), Param: uint16(e.Param), OffsetMS: e.OffsetMs}
	}
	return out, nil
}

// EncodeHealth returns the protobuf payload of a word on a detector's health.
func EncodeHealth(h *traffic.Health) []byte {
	return marshal(&pb.Health{
		District: string(h.District), Junction: string(h.Junction), Seq: h.Seq, Height: h.Height,
		RestsOn:  &pb.FrameKey{Device: string(h.RestsOn.Device), BootEpoch: h.RestsOn.BootEpoch, Seq: h.RestsOn.Seq},
		Detector: string(h.Detector), Failed: h.Failed, Rule: h.Rule, Reason: h.Reason,
		TimeUnixNano: h.Time.UnixNano(), SinceUnixNano: h.Since.UnixNano(),
	})
}

// DecodeHealth decodes the payload of a word on a detector's health.
func DecodeHealth(contentType string, payload []byte) (*traffic.Health, error) {
	var m pb.Health
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	return &traffic.Health{
		District: traffic.DistrictID(m.District), Junction: traffic.JunctionID(m.Junction), Seq: m.Seq, Height: m.Height,
		RestsOn:  traffic.FrameKey{Device: traffic.DeviceID(m.RestsOn.GetDevice()), BootEpoch: m.RestsOn.GetBootEpoch(), Seq: m.RestsOn.GetSeq()},
		Detector: traffic.DetectorID(m.Detector), Failed: m.Failed, Rule: m.Rule, Reason: m.Reason,
		Time: time.Unix(0, m.TimeUnixNano).UTC(), Since: time.Unix(0, m.SinceUnixNano).UTC(),
	}, nil
}

// DecodeChange decodes the payload of a registry record: JSON in the form of
// [identity.Change], or the protobuf message.
func DecodeChange(contentType string, payload []byte) (identity.Change, error) {
	if contentType == identity.JSON {
		return identity.ParseChange(payload)
	}
	var m pb.RegistryChange
	if err := Decode(contentType, payload, &m); err != nil {
		return identity.Change{}, err
	}
	c := identity.Change{
		District: traffic.DistrictID(m.District), Action: m.Action, Type: identity.EntryType(m.Type),
		ID: m.Id, Body: m.Body, Nonce: m.Nonce, Base: m.Base, Until: m.Until,
	}
	for _, a := range m.Approvals {
		c.Approvals = append(c.Approvals, identity.Approval{Key: identity.KeyID(a.KeyId), Signature: a.Signature})
	}
	return c, nil
}

// EncodeChange returns the protobuf payload of a registry record.
func EncodeChange(c identity.Change) []byte {
	m := &pb.RegistryChange{
		District: string(c.District), Action: c.Action, Type: string(c.Type), Id: c.ID, Body: c.Body, Nonce: c.Nonce, Base: c.Base, Until: c.Until,
	}
	for _, a := range c.Approvals {
		m.Approvals = append(m.Approvals, &pb.Approval{KeyId: string(a.Key), Signature: a.Signature})
	}
	return marshal(m)
}

// EncodeBatch returns a batch's bytes, which name it: see [ledger.RequestID].
func EncodeBatch(b *pb.Batch) []byte { return marshal(b) }

// DecodeBatch decodes a batch.
func DecodeBatch(b []byte) (*pb.Batch, error) {
	var m pb.Batch
	if err := Decode(identity.Protobuf, b, &m); err != nil {
		return nil, err
	}
	for i, r := range m.Records {
		if len(r.Salt) != len(ledger.Salt{}) {
			return nil, kind.Errorf(kind.Invalid, "batch: records[%d].salt: %d bytes, must be 32", i, len(r.Salt))
		}
	}
	return &m, nil
}

// Candidate decodes one record as far as it can be; what stops it is in Err.
// It shares memory with raw. salt must be 32 bytes.
func Candidate(raw, salt []byte) validate.Candidate {
	c := validate.Candidate{Raw: raw, Salt: ledger.Salt(salt)}
	c.Envelope, c.Err = identity.ParseEnvelope(raw)
	if c.Err != nil {
		return c
	}
	e := c.Envelope
	switch e.Kind {
	case identity.KindFrame:
		c.Frame, c.Err = DecodeFrame(e.ContentType, e.Payload)
	case identity.KindCommand:
		c.Command, c.Err = DecodeCommand(e.ContentType, e.Payload)
	case identity.KindImport:
		c.Import, c.Err = DecodeImport(e.ContentType, e.Payload)
	case identity.KindHealth:
		c.Health, c.Err = DecodeHealth(e.ContentType, e.Payload)
	case identity.KindPlan:
		c.Plan, c.Err = DecodeFallback(e.ContentType, e.Payload)
	case identity.KindAccess:
		c.Access, c.Err = DecodeAccess(e.ContentType, e.Payload)
	case identity.KindRequest:
		c.Request, c.Err = DecodeRequest(e.ContentType, e.Payload)
	case identity.KindOverride:
		c.Override, c.Err = DecodeOverride(e.ContentType, e.Payload)
	case identity.KindDeletion:
		c.Deletion, c.Err = DecodeDeletion(e.ContentType, e.Payload)
	case identity.KindRegistry, identity.KindRedaction:
		var ch identity.Change
		if ch, c.Err = DecodeChange(e.ContentType, e.Payload); c.Err == nil {
			c.Change = &ch
		}
	default:
		// The kind is known and its payload is not read yet; rules about who may
		// sign it still hold.
	}
	return c
}

// Candidates decodes the records of a batch.
func Candidates(b *pb.Batch) []validate.Candidate {
	out := make([]validate.Candidate, len(b.Records))
	for i, r := range b.Records {
		out[i] = Candidate(r.Envelope, r.Salt)
	}
	return out
}

// VerifySignatures fills SignatureValid of every candidate whose envelope could
// be parsed and whose signer the registry knows, in one batch.
func VerifySignatures(v *identity.Verifier, reg *identity.Registry, cs []validate.Candidate) {
	at := make([]int, 0, len(cs))
	for i := range cs {
		e := cs[i].Envelope
		h, ok := reg.Holder(e.Key)
		if !ok || len(e.Signature) == 0 {
			continue
		}
		v.Add(h.Key, identity.SigningInput(e.Kind, e.ContentType, e.Payload), e.Signature)
		at = append(at, i)
	}
	for k, ok := range v.Flush() {
		cs[at[k]].SignatureValid = ok
	}
}

// BlockToProto returns the wire form of a block; batches and verdicts may be
// nil where the payload is gone.
func BlockToProto(b *ledger.Block, batches [][]byte, verdicts ledger.Verdicts) *pb.Block {
	m := &pb.Block{
		Header: b.Header.Marshal(), Leaves: ledger.MarshalLeaves(b.Leaves), Metadata: b.Metadata,
		Batches: batches, Verdicts: verdicts,
	}
	for _, v := range b.Votes {
		m.Votes = append(m.Votes, &pb.VoteSignature{Validator: v.Validator, Signature: v.Signature})
	}
	return m
}

// BlockFromProto is the reverse of [BlockToProto]. It checks the form only; see
// [ledger.Block.Check].
func BlockFromProto(m *pb.Block) (*ledger.Block, error) {
	h, err := ledger.ParseHeader(m.Header)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "block: %w", err)
	}
	leaves, err := ledger.ParseLeaves(m.Leaves)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "block %d: %w", h.Height, err)
	}
	b := &ledger.Block{Header: h, Leaves: leaves, Metadata: m.Metadata}
	for _, v := range m.Votes {
		b.Votes = append(b.Votes, ledger.Vote{Validator: v.Validator, Signature: v.Signature})
	}
	return b, nil
}

// EncodeQuarantined returns the bytes of a record that was refused. Its reason
// must be valid UTF-8.
//
// The reason may quote what a sender wrote: bytes that are no text are replaced.
func EncodeQuarantined(m *pb.Quarantined) []byte {
	if !utf8.ValidString(m.Reason) {
		m = proto.CloneOf(m)
		m.Reason = strings.ToValidUTF8(m.Reason, "\uFFFD")
	}
	return marshal(m)
}

// DecodeQuarantined decodes a record that was refused.
func DecodeQuarantined(b []byte) (*pb.Quarantined, error) {
	var m pb.Quarantined
	if err := Decode(identity.Protobuf, b, &m); err != nil {
		return nil, err
	}
	if len(m.Salt) != len(ledger.Salt{}) {
		return nil, kind.Errorf(kind.Invalid, "quarantined: salt: %d bytes, must be 32", len(m.Salt))
	}
	return &m, nil
}

// EncodeBlock returns a block's bytes.
func EncodeBlock(m *pb.Block) []byte { return marshal(m) }

// DecodeBlock decodes a block's bytes.
func DecodeBlock(b []byte) (*pb.Block, error) {
	var m pb.Block
	if err := Decode(identity.Protobuf, b, &m); err != nil {
		return nil, err
	}
	return &m, nil
}

// EncodeStatus returns a status message's bytes.
func EncodeStatus(m *pb.Status) []byte { return marshal(m) }
