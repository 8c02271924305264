package wire

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// RequestToProto returns a request as the API shows it.
func RequestToProto(r *traffic.Request) *pb.PriorityRequest {
	m := &pb.PriorityRequest{District: string(r.District), Id: r.ID, Agency: r.By.Agency, Requester: r.By.Name, Class: pb.PriorityClass(r.Class), Vehicle: r.Vehicle,
		Line: r.Line, Requested: stamp(r.Time), Expires: stamp(r.Expires), Purpose: r.Purpose, CaseNumber: r.Case, Degraded: r.Degraded, Revision: r.Revision, Cancelled: r.Cancelled}
	if r.Class == traffic.Bus {
		m.Lateness = durationpb.New(r.Lateness)
	}
	for _, s := range r.Stops {
		m.Stops = append(m.Stops, &pb.PriorityStop{Junction: string(s.Junction), Group: s.Group, Arrival: stamp(s.Arrival)})
	}
	return m
}

// PriorityToProto returns a request with what has become of it, as the API shows
// it.
func PriorityToProto(e *priority.Entry) *pb.Priority {
	m := &pb.Priority{Request: RequestToProto(&e.Request), State: pb.PriorityState(e.State), Index: e.Index}
	for i := range e.Stops {
		s := &e.Stops[i]
		m.Progress = append(m.Progress, &pb.PriorityProgress{Junction: string(s.Junction), Group: s.Group, State: pb.PriorityState(s.State), Rule: s.Rule,
			Arrival: stamp(s.Arrival), Since: stamp(s.Since), Command: s.Command, Observed: string(s.Observed), ObservedTime: stamp(s.GreenAt)})
	}
	return m
}

// EncodePriority returns a request's message as signal-control tells it.
func EncodePriority(m *pb.Priority) []byte { return marshal(m) }

// DecodePriority is the reverse of [EncodePriority].
func DecodePriority(b []byte) (*pb.Priority, error) {
	var m pb.Priority
	if err := proto.Unmarshal(b, &m); err != nil {
		return nil, kind.Errorf(kind.Invalid, "priority: %w", err)
	}
	if m.Request == nil || m.Request.Id == "" {
		return nil, kind.Errorf(kind.Invalid, "priority: request.id: must not be empty")
	}
	return &m, nil
}
