package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// BenchmarkCorridorToFirstCommand measures, beside a whole district in real time,
// from before the call of RequestPriority until the first command that serves it is
// on the street: put on record, agreed by the validators, decided, signed, sent. One
// request after the other; a quota bounds how many there may be.
func BenchmarkCorridorToFirstCommand(b *testing.B) {
	tn := newTown(b, 9)
	type ordered struct {
		id string
		at time.Time
	}
	orders := make(chan ordered, 1024)
	stop, err := tn.street.bus.Listen(topic.Command(tn.district.Genesis.District, "x")[:len(topic.Command(tn.district.Genesis.District, "x"))-1]+"*", "", func(m *nats.Msg) {
		at := time.Now()
		if c := wire.Candidate(m.Data, make([]byte, 32)); c.Command != nil {
			if id, ok := priority.RequestOf(c.Command.Rule); ok {
				orders <- ordered{id, at}
			}
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	desks := []struct{ client, vehicle string }{{"ambulance-desk-1", "A"}, {"fire-desk-1", "F"}}
	perHour := priority.Default().PerHour[traffic.Emergency] - 5
	var took []time.Duration
	for n := 0; b.Loop(); n++ {
		if n >= len(desks)*perHour {
			break // the agencies' hour is used up
		}
		d := desks[n%len(desks)]
		ctx := tn.as(d.client, "emergency-response")
		j := tn.defs[n%len(tn.defs)]
		group := j.Groups[slices.IndexFunc(j.Groups, func(g traffic.Group) bool { return g.Kind == traffic.Vehicles })]
		began := time.Now()
		r, err := tn.api().RequestPriority(ctx, &pb.RequestPriorityRequest{IdempotencyKey: fmt.Sprintf("bench-%d-%d", b.N, n),
			Request: emergency(fmt.Sprintf("%s-%d", d.vehicle, n%19+1), []*pb.PriorityStop{{Junction: string(j.ID), Group: group.Name}}, 5*time.Second)})
		if err != nil {
			b.Fatal(err)
		}
		id := r.Priority.Request.Id
		for wait := time.After(20 * time.Second); ; {
			select {
			case o := <-orders:
				if o.id != id {
					continue
				}
				took = append(took, o.at.Sub(began))
			case <-wait:
				b.Fatalf("no command for request %d: %v", n, r.Priority)
			}
			break
		}
		if _, err := tn.api().CancelPriority(ctx, &pb.CancelPriorityRequest{Id: id}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(len(took)), "requests")
	b.ReportMetric(quantileMS(took, .5), "p50-ms")
	b.ReportMetric(quantileMS(took, .99), "p99-ms")
	b.ReportMetric(quantileMS(took, 1), "max-ms")
}
