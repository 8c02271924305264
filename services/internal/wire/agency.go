package wire

import (
	"math"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// nanos returns a time's number, 0 for none.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// moment is nanos the other way.
func moment(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// EncodeAccess returns the protobuf payload of an access record.
func EncodeAccess(a *traffic.Access) []byte {
	m := &pb.AccessRecord{
		District: string(a.District), Epoch: a.Turn.Epoch, Seq: a.Turn.Seq, TimeUnixNano: nanos(a.Time),
		Agency: a.By.Agency, Subject: a.By.Name, Method: a.Method, Objects: a.Objects,
		Purpose: a.Purpose, CaseNumber: a.Case, LegalBasis: a.LegalBasis, Granted: a.Granted, Policies: a.Policies,
		Phase: a.Phase, Count: a.Count, CovertUntilUnixNano: nanos(a.CovertUntil),
	}
	if a.Request != [32]byte{} {
		m.RequestDigest = a.Request[:]
	}
	return marshal(m)
}

// DecodeAccess decodes the payload of an access record.
func DecodeAccess(contentType string, payload []byte) (*traffic.Access, error) {
	var m pb.AccessRecord
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	a := &traffic.Access{
		District: traffic.DistrictID(m.District), Turn: traffic.Turn{Epoch: m.Epoch, Seq: m.Seq}, Time: moment(m.TimeUnixNano),
		By: traffic.Agent{Agency: m.Agency, Name: m.Subject}, Method: m.Method, Objects: m.Objects,
		Purpose: m.Purpose, Case: m.CaseNumber, LegalBasis: m.LegalBasis, Granted: m.Granted, Policies: m.Policies,
		Phase: m.Phase, Count: m.Count, CovertUntil: moment(m.CovertUntilUnixNano),
	}
	switch len(m.RequestDigest) {
	case 0:
	case len(a.Request):
		copy(a.Request[:], m.RequestDigest)
	default:
		return nil, kind.Errorf(kind.Invalid, "request_digest: %d bytes, must be 32 or none", len(m.RequestDigest))
	}
	return a, nil
}

// EncodeRequest returns the protobuf payload of a priority request.
func EncodeRequest(r *traffic.Request) []byte {
	m := &pb.RequestRecord{
		District: string(r.District), Epoch: r.Turn.Epoch, Seq: r.Turn.Seq, TimeUnixNano: nanos(r.Time),
		Id: r.ID, Revision: r.Revision, Agency: r.By.Agency, Requester: r.By.Name, Class: pb.PriorityClass(r.Class),
		Vehicle: r.Vehicle, Line: r.Line, LatenessMs: r.Lateness.Milliseconds(), ExpiresUnixNano: nanos(r.Expires),
		Purpose: r.Purpose, CaseNumber: r.Case, Cancelled: r.Cancelled, Degraded: r.Degraded,
	}
	for _, s := range r.Stops {
		m.Stops = append(m.Stops, &pb.RequestStop{Junction: string(s.Junction), Group: s.Group, ArrivalUnixNano: nanos(s.Arrival)})
	}
	return marshal(m)
}

// DecodeRequest decodes the payload of a priority request.
func DecodeRequest(contentType string, payload []byte) (*traffic.Request, error) {
	var m pb.RequestRecord
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	if m.Class < 0 || m.Class > pb.PriorityClass_PRIORITY_CLASS_EMERGENCY {
		return nil, kind.Errorf(kind.Invalid, "class: %d is unknown", m.Class)
	}
	if m.LatenessMs > math.MaxInt64/int64(time.Millisecond) || m.LatenessMs < math.MinInt64/int64(time.Millisecond) {
		return nil, kind.Errorf(kind.Invalid, "lateness_ms: %d is out of range", m.LatenessMs)
	}
	r := &traffic.Request{
		District: traffic.DistrictID(m.District), Turn: traffic.Turn{Epoch: m.Epoch, Seq: m.Seq}, Time: moment(m.TimeUnixNano),
		ID: m.Id, Revision: m.Revision, By: traffic.Agent{Agency: m.Agency, Name: m.Requester}, Class: traffic.Priority(m.Class),
		Vehicle: m.Vehicle, Line: m.Line, Lateness: time.Duration(m.LatenessMs) * time.Millisecond, Expires: moment(m.ExpiresUnixNano),
		Purpose: m.Purpose, Case: m.CaseNumber, Cancelled: m.Cancelled, Degraded: m.Degraded,
	}
	for i, s := range m.Stops {
		if s == nil {
			return nil, kind.Errorf(kind.Invalid, "stops[%d]: missing", i)
		}
		r.Stops = append(r.Stops, traffic.Stop{Junction: traffic.JunctionID(s.Junction), Group: s.Group, Arrival: moment(s.ArrivalUnixNano)})
	}
	return r, nil
}

// actions of an override, by the number of the message's enum.
var actions = [...]traffic.OverrideAction{"", traffic.OverridePlan, traffic.OverrideHold, traffic.OverrideFlash, traffic.OverrideRelease}

// EncodeOverride returns the protobuf payload of an override. An action that is
// none of [traffic.OverrideAction]'s becomes unspecified, which no validator
// takes.
func EncodeOverride(o *traffic.Override) []byte {
	m := &pb.OverrideRecord{
		District: string(o.District), Epoch: o.Turn.Epoch, Seq: o.Turn.Seq, TimeUnixNano: nanos(o.Time),
		Id: o.ID, Junction: string(o.Junction), Plan: o.Plan, Stage: int32(o.Stage), Reason: o.Reason,
		Agency: o.By.Agency, Operator: o.By.Name, ExpiresUnixNano: nanos(o.Expires), Releases: o.Releases,
	}
	for i, a := range actions {
		if a == o.Action {
			m.Action = pb.OverrideAction(i)
		}
	}
	return marshal(m)
}

// DecodeOverride decodes the payload of an override.
func DecodeOverride(contentType string, payload []byte) (*traffic.Override, error) {
	var m pb.OverrideRecord
	if err := Decode(contentType, payload, &m); err != nil {
		return nil, err
	}
	if m.Action < 0 || int(m.Action) >= len(actions) {
		return nil, kind.Errorf(kind.Invalid, "action: %d is unknown", int32(m.Action))
	}
	return &traffic.Override{
		District: traffic.DistrictID(m.District), Turn: traffic.Turn{Epoch: m.Epoch, Seq: m.Seq}, Time: moment(m.TimeUnixNano),
		ID: m.Id, Junction: traffic.JunctionID(m.Junction), Action: actions[m.Action], Plan: m.Plan, Stage: int(m.Stage),
		Reason: m.Reason, By: traffic.Agent{Agency: m.Agency, Name: m.Operator}, Expires: moment(m.ExpiresUnixNano), Releases: m.Releases,
	}, nil
}
